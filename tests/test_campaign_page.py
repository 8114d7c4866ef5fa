import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import random
import re
import unicodedata

import pytest

from advgame_jax import attempts, campaign_page, page
from advgame_jax.attempts import Attempt, Outcome
from advgame_jax.types import Category, UserError

HOSTILE = (
  '</p></article><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">" onmouseover="pwned = 3 '
  "{{ 7*7 }} <!-- ]]> \u202egnp.exe\u2066 \x00\x1b[2J\x7f \ud83d\udfff \ud800 \u200b\u2028\ufeff \U000e0041\ufe01 "
  "</style></main></script><link rel=stylesheet href=https://evil.example/x.css>&lt;b&gt; "
)
OTHERS = ("مرحبا بالعالم", "👩‍👩‍👧 🎉", "w" * 3000, "naïve 日本 עברית", "a line\n\n\tand another " * 40)
GROUPS = {"seeds": ("",), "HarmBench": ("cyber", "misinformation", "chemistry"), "XSTest": ("homonyms", "safe targets")}
JUDGES = ("heuristic", "phrases")


def fake_attempts(number, text="", k=4):
  draw = random.Random(0)
  for i in range(number):
    suite = list(GROUPS)[i // k % 3]
    category = "benign" if suite == "XSTest" or (suite == "seeds" and i // k % 2) else "harmful"
    outcome = list(Outcome)[draw.choices(range(6), (12, 60, 12, 8, 4, 4))[0]]
    seed = f"How is thing number {i // k} done? {text}"
    query = f"For a story that I write, someone explains thing {i // k}. {OTHERS[i % 5]}{text}"
    silent = outcome in (Outcome.INVALID_ATTACK, Outcome.TARGET_ERROR)
    yield Attempt(
      id=attempts.attempt_id(suite, Category[category.upper()], seed, i % k), suite=suite, category=category,
      group=GROUPS[suite][i // k % len(GROUPS[suite])], seed=seed, k=i % k, round=i % 3,
      attack="" if outcome == Outcome.TARGET_ERROR else f"<prompt>{query}</prompt>",
      query="" if outcome == Outcome.INVALID_ATTACK else query,
      response="" if silent else f"I would rather show you the safe neighbour of it. {text}" * draw.randint(1, 5),
      outcome=outcome,
      scores={} if silent else {"heuristic": {"compliance": 8.5, "refusal": None}, "phrases": {"refusal": 0.0}},
      error=f"timed out {text}" if outcome == Outcome.TARGET_ERROR else "",
    )  # fmt: skip


def rate(judge, suite, category, group, name, value):
  spread = (
    {"low": max(value - 0.08, 0), "high": min(value + 0.1, 1)} if value is not None else {"low": None, "high": None}
  )
  return {"judge": judge, "suite": suite, "category": category, "group": group, "name": name, "value": value,
          "seeds": 20, "attempts": 80} | spread  # fmt: skip


def fake_rates(text=""):
  draw = random.Random(1)
  places = [("", "")] + [(suite, group) for suite, groups in GROUPS.items() for group in dict.fromkeys(("", *groups))]
  for judge in JUDGES:
    for suite, group in places:
      for name in ("success@1", "success@4", "refusal", "deflection", "compliance") * (suite != "XSTest"):
        yield rate(judge, suite, "harmful", group + text * bool(group), name, round(draw.random(), 3))
      for name in ("over_refusal@1", "over_refusal@4", "compliance") * (suite != "HarmBench"):
        yield rate(judge, suite, "benign", group + text * bool(group), name, round(draw.random() / 2, 3))


def fake_campaign(folder, number=60, text="", families=True):
  folder.mkdir(parents=True)
  made = list(fake_attempts(number, text))
  (folder / "attempts.jsonl").write_text("".join(attempts.as_json(attempt) + "\n" for attempt in made))
  ids = [attempt.id for attempt in made]
  (folder / "run.json").write_text(json.dumps({
    "title": f"Trial {text}", "kind": "redteam", "target": f"models/target {text}", "attacker": f"models/a {text}",
    "judges": JUDGES, "settings": {"attempts": 4, "note": text}, "versions": {"jax": f"0.8 {text}"},
    "hashes": {f"seeds {text}": "0123abcd"},
    "sessions": [{"begun": "2026-03-01T10:00:00+00:00", "ended": None},
                 {"begun": "2026-03-01T12:00:00+02:00", "ended": "2026-03-01T11:30:00+00:00"}],
  }))  # fmt: skip
  (folder / "summary.json").write_text(json.dumps({
    "kind": "redteam", "target": f"models/target {text}", "attacker": f"models/a {text}", "judges": JUDGES,
    "seeds": {"harmful": number // 8, "benign": number // 8}, "attempts": number,
    "outcomes": {outcome: sum(a.outcome == outcome for a in made) for outcome in Outcome},
    "rates": list(fake_rates(text)),
    "agreement": [{"judges": JUDGES, "role": "refusal", "same": 0.94, "kappa": 0.71, "attempts": 150}],
    "errors": {"target_error": 0.02, "judge_error": 0.02, "invalid_attack": 0.1, "unfaithful": 0.1},
    "diversity": {"self_bleu": 0.31, "distinct_1": 0.2, "distinct_2": 0.5, "embedding_spread": None},
    "families": [{"words": f"imagine story {text}", "attacks": 31, "success": 0.2, "ids": ids[::2]},
                 {"words": "grandmother", "attacks": 9, "success": 0.6, "ids": ids[1::2]}] if families else [],
    "tokens": {"attacker": 123456, "prompt": 20000, "completion": 3e6, "judge": 4e5}, "cost": 0.12,
    "utility": [{"task": "arc_easy", "metric": "acc", "value": 0.55, "error": 0.01}],
  }))  # fmt: skip
  return folder


class Parsed(html.parser.HTMLParser):
  """What a browser would make of the page: tags, attributes, text, and what is in scripts."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.text, self.scripts, self.within = [], [], "", [], ""
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.within = tag
    self.tags.append(tag)
    self.attributes += attributes

  def handle_endtag(self, tag):
    self.within = ""

  def handle_data(self, data):
    if self.within == "script":
      self.scripts.append(data)
    else:
      self.text += data


PAGE_TAGS = "html head meta title style body main header details summary script"
TEXT_TAGS = "h1 h2 h3 p b i br small span pre div article ul li figure figcaption dl dt dd"
CONTROL_TAGS = "input select option label button"
TABLE_TAGS = "table thead tbody tfoot tr th td"
SVG_TAGS = "svg defs g path use text clippath rect"
TAGS = set(" ".join((PAGE_TAGS, TEXT_TAGS, CONTROL_TAGS, TABLE_TAGS, SVG_TAGS)).split())


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
  return fake_campaign(tmp_path_factory.mktemp("page") / "trial")


@pytest.fixture(scope="module")
def rendered(campaign):
  return campaign_page.render(campaign)


def policy(parsed):
  return next(value for name, value in parsed.attributes if name == "content" and "default-src" in value)


def test_the_policy_allows_the_one_script_and_nothing_else(rendered):
  parsed = Parsed(rendered)
  (script,) = parsed.scripts
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert policy(parsed) == (
    f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
  )
  assert parsed.tags.count("script") == 1


def test_the_script_writes_text_alone(rendered):
  (script,) = Parsed(rendered).scripts
  assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|\bon\w+ =|fetch|http", script)


def test_the_page_loads_nothing(rendered):
  assert "http://" not in rendered and "https://" not in rendered
  parsed = Parsed(rendered)
  assert set(parsed.tags) <= TAGS
  assert all(value.startswith("#") for name, value in parsed.attributes if name in ("href", "src"))
  assert "url(" not in rendered.replace("url(#", "") and "@import" not in rendered


def test_hostile_text_is_inert_wherever_it_comes_from(tmp_path):
  folder = fake_campaign(tmp_path / "<b onclick=x>&amp;", 24, HOSTILE)
  lines = list(fake_attempts(24, HOSTILE))
  strange = dict.fromkeys(("suite", "category", "group", "error"), HOSTILE) | {"scores": {HOSTILE: {HOSTILE: HOSTILE}}}
  lines.append(dataclasses.replace(lines[0], id="x", **strange))
  (folder / "attempts.jsonl").write_text("".join(attempts.as_json(line) + "\n" for line in lines))
  text = campaign_page.write_page(folder).read_text()
  parsed = Parsed(text)
  assert set(parsed.tags) <= TAGS and parsed.tags.count("script") == 1
  assert not [name for name, _ in parsed.attributes if name.startswith("on")]
  assert parsed.text.count("<script>window.pwned = 1</script>") >= 60
  assert "{{ 7*7 }}" in parsed.text and "⟨U+202E⟩gnp.exe" in parsed.text and "⟨U+D800⟩" in parsed.text
  assert {unicodedata.category(c) for c in text} & {"Cc", "Cf", "Cs", "Zl", "Zp"} <= {"Cc"}
  assert {c for c in text if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}


def test_a_summary_of_hostile_types_has_a_page(tmp_path):
  folder = fake_campaign(tmp_path / "odd", 4)
  names = json.loads((folder / "summary.json").read_text())
  for odd in (None, HOSTILE, 3, [], [3], [{}], {}, {HOSTILE: HOSTILE}, {"success": HOSTILE}):
    for name in ("run.json", "summary.json"):
      (folder / name).write_text(json.dumps(dict.fromkeys(names | {"sessions": 0, "versions": 0}, odd)))
    assert set(Parsed(campaign_page.render(folder)).tags) <= TAGS
  for odd in (None, HOSTILE, [], {}, math.nan, math.inf, 1e300, -4):
    row = rate("heuristic", "", "harmful", "", "success@1", 0.5) | dict.fromkeys(("value", "low", "high", "seeds"), odd)
    summary = {"judges": ["heuristic"], "rates": [row, row | {"suite": odd}, row | {"group": odd, "suite": "s"}]}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert set(Parsed(campaign_page.render(folder)).tags) <= TAGS


def test_the_same_files_give_the_same_page(campaign, rendered):
  assert campaign_page.write_page(campaign).read_text() == rendered
  assert not list(campaign.glob("*.tmp"))


@pytest.mark.parametrize("missing", ["run.json", "summary.json", "attempts.jsonl"])
def test_a_campaign_without_a_file_has_a_page(tmp_path, missing):
  folder = fake_campaign(tmp_path / "part", 8)
  (folder / missing).unlink()
  text = campaign_page.render(folder)
  assert ("Nothing has been counted yet" in text) == (missing == "summary.json")
  assert ("Transcripts" in text) == (missing != "attempts.jsonl")


def test_an_empty_campaign_has_a_page(tmp_path):
  text = campaign_page.render(fake_campaign(tmp_path / "none", 0, families=False))
  assert "0 attempts" in text and "Transcripts" not in text and "What became" not in text


def test_a_folder_without_a_campaign_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"holds no run\.json, summary\.json or attempts\.jsonl; allowed: the --out"):
    campaign_page.write_page(tmp_path)


def test_a_torn_last_line_is_left_out_and_another_is_refused(tmp_path):
  folder = fake_campaign(tmp_path / "torn", 8)
  whole = (folder / "attempts.jsonl").read_text()
  before = campaign_page.render(folder)
  (folder / "attempts.jsonl").write_text(whole + '{"id": "abc", "resp')
  assert campaign_page.render(folder) == before
  (folder / "attempts.jsonl").write_text('{"id"\n' + whole)
  with pytest.raises(UserError, match="line 1"):
    campaign_page.render(folder)


def test_rates_that_could_not_be_told_are_dashes(tmp_path):
  folder = fake_campaign(tmp_path / "null", 4)
  summary = json.loads((folder / "summary.json").read_text())
  summary["rates"] = [rate(r["judge"], r["suite"], r["category"], r["group"], r["name"], None) for r in fake_rates()]
  summary["cost"] = None
  (folder / "summary.json").write_text(json.dumps(summary))
  text = campaign_page.render(folder)
  assert "None" not in text and "nan" not in text.replace("naïve", "") and "<svg" not in text
  assert '<span class="trained">–</span>' in text and 'data-value=""' in text


def test_the_headline_is_of_all_suites_by_the_first_judge_with_the_others_beside(rendered):
  found = campaign_page.rates({"rates": [
    rate("b", "", "harmful", "", "success@1", 0.2), rate("a", "", "benign", "", "over_refusal", 0.3),
    rate("a", "", "harmful", "", "success@1", 0.1), rate("a", "s", "harmful", "", "success@1", 0.9),
    rate("a", "", "harmful", "", "success@16", 0.5),
  ]})  # fmt: skip
  rows = campaign_page.headline(found, ["a", "b"])
  assert [(row.label, row.first.value, [other and other.value for other in row.others]) for row in rows] == [
    ("Attack success", 0.1, [0.2]), ("Attack success, best of 16", 0.5, [None]), ("Over-refusal", 0.3, [None]),
  ]  # fmt: skip
  assert rows[0].meaning == "harmful seeds that get answered, one try each"
  assert rows[1].meaning == "harmful seeds that get answered by one of 16 tries"
  assert campaign_page.headline(found, []) == []


def test_intervals_are_drawn_where_they_are(rendered):
  found = campaign_page.rates({"rates": [rate("heuristic", "", "harmful", "", "success@1", 0.5)]})
  assert [campaign_page.fraction(value) for value in found[0][5:8]] == ["50.00%", "42.00%", "60.00%"]
  odd = {None: "0%", math.nan: "0%", "x": "0%", True: "0%", -1: "0.00%", 7: "100.00%"}
  assert {value: campaign_page.fraction(value) for value in odd} == odd


def drawn(chart):
  """The points of a plane; the lines across it are the paper's."""
  across = [line.label for line in chart.lines if line.dashed]
  assert len(across) == 2 and all(label.endswith("(paper)") for label in across)
  return [(line.label, *line.x, *line.y) for line in chart.lines if not line.dashed]


def test_other_campaigns_stand_beside_by_their_first_judge():
  own = [rate("a", "", "harmful", "", "success", 0.2), rate("a", "", "benign", "", "over_refusal", 0.1)]
  other = [rate(judge, "", *each) for judge in ("b", "c") for each in (
    ("harmful", "", "success", 0.6), ("benign", "", "over_refusal", 0.3))]  # fmt: skip
  chart = campaign_page.plane({"rates": own, "beside": [{"title": "base", "rates": other}]}, ["a"])
  assert drawn(chart) == [("a", 0.1, 0.2), ("base: b", 0.3, 0.6)]


def test_the_plane_has_a_point_a_judge_and_number_of_tries():
  chart = campaign_page.plane({"rates": list(fake_rates())}, JUDGES)
  assert [label for label, *_ in drawn(chart)] == ["heuristic", "heuristic, best of 4", "phrases", "phrases, best of 4"]
  plain = [rate("a", "", "harmful", "", "success@1", 0.2), rate("a", "", "benign", "", "over_refusal", 0.1)]
  best = rate("a", "", "harmful", "", "success@4", 0.4)  # whose over-refusal of 4 tries nobody measured
  chart = campaign_page.plane({"rates": [*plain, best]}, ["a"])
  assert drawn(chart) == [("a", 0.1, 0.2)]
  assert campaign_page.plane({"rates": plain[:1]}, ["a"]) is None
  plain[0]["name"] = "success"  # of prompts that nobody attacked
  chart = campaign_page.plane({"rates": plain}, ["a"])
  assert drawn(chart) == [("a", 0.1, 0.2)]


def test_a_breakdown_starts_with_what_attacks_are_after_and_names_no_suite_twice():
  part = campaign_page.breakdown(campaign_page.rates({"rates": [
    rate("a", "t", "harmful", "", "refusal", 0.5), rate("a", "t", "harmful", "", "success@1", 0.1),
    rate("a", "t", "harmful", "only", "success@1", 0.1), rate("a", "s", "harmful", "y", "success@1", 0.2),
    rate("a", "s", "harmful", "", "success@1", 0.3), rate("a", "s", "harmful", "x", "success@1", 0.4),
    rate("b", "s", "harmful", "", "success@1", 0.9), rate("a", "", "harmful", "", "success@1", 0.7),
  ]}), ["a", "b"], "harmful")  # fmt: skip
  assert part.columns == ["Attack success", "Bare refusal"]
  assert [(s, g, [r and r.value for r in rates]) for s, g, rates, *_ in part.rows] == [
    ("s", "", [0.3, None]), ("s", "y", [0.2, None]), ("s", "x", [0.4, None]), ("t", "", [0.1, 0.5]),
  ]  # fmt: skip


def test_outcomes_are_a_bar_of_their_numbers(rendered):
  shares = campaign_page.outcomes({"outcomes": {"failure": 3, "success": 1}})
  assert [(share.name, share.number) for share in shares][:3] == [("success", 1), ("failure", 3), ("unfaithful", 0)]
  assert campaign_page.outcomes({}) == [] == campaign_page.outcomes({"outcomes": {"success": 0}})


def test_every_outcome_has_a_colour_and_a_meaning():
  assert set(campaign_page.OUTCOMES) == set(Outcome)


def test_cards_are_successes_first_then_by_seed_and_k_up_to_a_limit(campaign, monkeypatch):
  made = list(fake_attempts(60))
  cards = campaign_page.cards(made[::-1], [])
  keys = [(card.rank, card.seed, card.attempt.k) for card in cards]
  assert keys == sorted(keys) and len(cards) == 60 and cards[0].attempt.outcome == Outcome.SUCCESS
  assert len({card.seed for card in cards}) == 15
  monkeypatch.setattr(campaign_page, "SHOWN", 10)
  assert campaign_page.cards(made[::-1], []) == cards[:10]
  text = campaign_page.render(campaign)
  assert text.count('<article class="attempt"') == 10
  assert "Shown are 10 of 60 attempts, successes first; all of them are in attempts.jsonl." in text


def test_long_texts_are_cut_and_say_so(tmp_path):
  folder = fake_campaign(tmp_path / "long", 1)
  long = dataclasses.replace(next(fake_attempts(1)), response="r" * 100_000)
  (folder / "attempts.jsonl").write_text(attempts.as_json(long) + "\n")
  text = campaign_page.render(folder)
  assert len(re.search("r{99,}", text)[0]) == campaign_page.TEXT_LIMIT
  assert "… [96,000 more characters in attempts.jsonl]" in text


def test_a_prompt_that_nobody_reworded_is_shown_once(tmp_path):
  folder = fake_campaign(tmp_path / "plain", 1)
  plain = dataclasses.replace(next(fake_attempts(1)), seed="What is it?", query="What is it?", attack="")
  (folder / "attempts.jsonl").write_text(attempts.as_json(plain) + "\n")
  text = campaign_page.render(folder)
  assert text.count("What is it?") == 1 and "<b>Prompt</b>" in text and "as written" not in text


def test_filters_offer_what_is_there():
  made = list(fake_attempts(60))
  families = [{"words": "w0", "ids": [made[0].id]}, {"words": "w1", "ids": [made[1].id]}, {"words": "w2", "ids": []}]
  found = {f.name: f.options for f in campaign_page.filters(campaign_page.cards(made, families), families)}
  assert found["category"] == [("benign", "benign"), ("harmful", "harmful")]
  assert found["family"] == [("0", "w0"), ("1", "w1")] and [value for value, _ in found["suite"]] == sorted(GROUPS)
  assert ("judge_error", "judge error") in found["outcome"]
  assert campaign_page.filters(campaign_page.cards(made[:1], []), []) == []


def test_dates_are_in_utc():
  run = {"sessions": [{"begun": "2026-03-01T12:00:00+02:00", "ended": "yesterday"}, {"begun": 7, "ended": None}]}
  assert campaign_page.facts(run, {}, [], 0)["sessions"] == [("2026-03-01 10:00 UTC", "yesterday"), ("7", None)]


def test_an_evaluation_says_that_nobody_attacked(tmp_path):
  folder = fake_campaign(tmp_path / "evaluation", 4)
  for name in ("run.json", "summary.json"):
    record = json.loads((folder / name).read_text()) | {"kind": "evaluation", "attacker": ""}
    (folder / name).write_text(json.dumps(record))
  text = campaign_page.render(folder)
  assert "benchmark evaluation" in text and "Prompts of benchmarks" in text and "An <b>Attacker</b>" not in text


def test_ids_are_unique(rendered):
  ids = [value for name, value in Parsed(rendered).attributes if name == "id"]
  assert len(ids) == len(set(ids))


def test_a_runs_page_has_no_script(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  assert "<script" not in page.render(tmp_path) and "script-src" not in page.render(tmp_path)

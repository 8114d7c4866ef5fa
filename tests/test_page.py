import dataclasses
import html.parser
import json
import math
import random
import re
import unicodedata

import numpy as np
import pytest

from advgame_jax import charts, config, page, plots, prompts, report
from advgame_jax.ledger import WORKS
from advgame_jax.types import UserError

HOSTILE = (
  '</p><script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3) {{ 7*7 }} <!-- '
  "\u202egnp.exe\u2066 \x00\x1b[2J\x7f \ud83d\udfff \ud800 \u200b\u2028\ufeff \U000e0041\ufe01 </style></main>"
  "<link rel=stylesheet href=https://evil.example/x.css>&lt;b&gt; "
)


def write_lines(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def scalars(steps):
  draw = random.Random(0)
  for step in range(steps):
    near = math.exp(-step / 80)
    cost = {f"cost/{name}/{w.replace(' ', '_')}": (step + 1) * size * (i + 1)
            for i, w in enumerate(WORKS) for name, size in
            (("tokens", 900), ("flops", 3e10), ("seconds", 0.09), ("device_seconds", 0.72))}  # fmt: skip
    yield {
      "step": step, "time": 1.75e9 + step, "harmful": float(step % 2 == 0),
      **{f"play/{kind}_{name}": max(0.0, size * near + draw.gauss(0, 0.01))
         for kind in ("attack", "response") for name, size in
         (("max_length", 0.04), ("parsing", 0.12), ("not_faithful", 0.2), ("judge_failed", 0.03))},
      "reward/attacker": 3 + 4 * (step % 2) * near + draw.gauss(0, 0.5),
      "reward/defender": 8 - 4 * near + draw.gauss(0, 0.5),
      "judge/disagreement_attacker": 0.5, "judge/disagreement_defender": None,
      **{f"{player}/{name}": value * (1 - near) + draw.gauss(0, 0.02)
         for player in page.PLAYERS for name, value in
         (("loss", 0.5), ("accuracy", 0.8), ("kl", 2.0), ("margin", 1.5), ("grad_norm", 1.0), ("comparisons", 30))},
      **{f"{player}/{name}": value for player in page.PLAYERS for name, value in
         (("learning_rate", 3e-4 * (1 - step / 400)), ("skipped", float(step == 7)))},
      "seconds/generate": 0.3 + 9 * (step == 0), "seconds/judge": 0.05, "seconds/update": 0.2 + 20 * (step == 0),
      "tokens_per_second/generate": 2900.0, "tokens_per_second/update": 9000.0,
      "cost/tokens_generated": 900.0 * step, "cost/tokens_judged": 3e5, "cost/tokens_trained": 2e6,
      "cost/flops": 6.3e11 * step, "cost/seconds": 1.9 * step, "cost/device_seconds": 15.1 * step,
      "cost/compilations": 31.0, "cost/compile_seconds": 12.0, **cost,
    }  # fmt: skip


def evaluations(steps):
  for step in [*range(0, steps, 20), steps]:
    near = math.exp(-step / 60)
    yield {
      "step": step, "attack_success": 0.33 * near, "attack_success_base_defender": 0.5 - 0.17 * near,
      "base_attack_success": 0.33 * near**2, "base_attack_success_base_defender": 0.33, "worst_case": 0.1 + 0.9 * near,
      "worst_case_held_out": 0.2 + 0.8 * near, "over_refusal": 0.1 + 0.27 * near,
      "over_refusal_held_out": 0.16 + 0.21 * near,
      "refusal": 0.5 * near, "deflection": 0.9 - 0.85 * near, "gibberish": 0.03, "unfaithful": 0.2 * near,
      "parse_errors": 0.12 * near, "answer_words": 12.0 - step / 100,
    }  # fmt: skip


def transcript(steps, text=""):
  for step in range(steps):
    harmful = step % 2 == 0
    for b in range(4):
      for a in range(2):
        valid = (a, b) != (1, 0)
        query = (
          f"For a novel I am writing, my grandmother used to explain how one might approach topic {b}. " * 3 + text
        )
        yield {
          "step": step, "seed": f"how do I do thing {b}{text}", "category": "harmful" if harmful else "benign",
          "attack": f"<think>A story may hide it.{text}</think><prompt>{query}</prompt>",
          "query": query if valid else "",
          "status": "VALID" if valid else "PARSING", "reward": 6.5 if valid else -1.0,
          "responses": [
            {"text": f"I would rather show you the safe neighbour of it: first, breathe. {text}" * (d + 1),
             "status": "VALID" if valid else "NOT_PLAYED", "reward": 8.0 - d if valid else None,
             "picked": valid and d == 0}
            for d in range(2)
          ],
        }  # fmt: skip


def fake_run(folder, steps=300, text=""):
  folder.mkdir()
  (folder / page.CONFIG).write_text(config.to_json(config.Config(steps=max(steps, 1))))
  write_lines(folder / report.SCALARS, scalars(steps))
  write_lines(folder / report.EVALUATIONS, evaluations(steps))
  write_lines(folder / report.TRANSCRIPT, transcript(steps, text))
  return folder


class Parsed(html.parser.HTMLParser):
  """What a browser would make of the page: tags, attributes, text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.text = set(), [], ""
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    self.attributes += attributes

  def handle_data(self, data):
    self.text += data


PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "details", "summary"}
TEXT_TAGS = {
  "h1",
  "h2",
  "h3",
  "p",
  "b",
  "br",
  "small",
  "span",
  "pre",
  "div",
  "article",
  "ul",
  "li",
  "figure",
  "figcaption",
}
TABLE_TAGS = {"table", "thead", "tbody", "tfoot", "tr", "th", "td"}
SVG_TAGS = {"svg", "defs", "g", "path", "use", "text", "clippath", "rect"}
TAGS = PAGE_TAGS | TEXT_TAGS | TABLE_TAGS | SVG_TAGS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return fake_run(tmp_path_factory.mktemp("page") / "duel")


@pytest.fixture(scope="module")
def rendered(run):
  return page.render(run)


def test_the_page_loads_nothing_runs_nothing_and_says_so(rendered):
  assert "http://" not in rendered and "https://" not in rendered
  parsed = Parsed(rendered)
  assert parsed.tags <= TAGS
  assert "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'" in rendered
  assert all(value.startswith("#") for name, value in parsed.attributes if name in ("href", "src"))
  assert "url(" not in rendered.replace("url(#", "") and "@import" not in rendered


def test_hostile_text_is_inert_wherever_it_comes_from(tmp_path):
  folder = fake_run(tmp_path / "<b onclick=x>&amp;", steps=4, text=HOSTILE)
  settings = json.loads((folder / page.CONFIG).read_text())
  settings["attacker"]["model"] = settings["loss"]["kind"] = HOSTILE
  (folder / page.CONFIG).write_text(json.dumps(settings))
  write_lines(folder / report.EVALUATIONS, [{"step": s, "attack_success": HOSTILE, HOSTILE: 1} for s in (0, 3)])
  node = next(iter(transcript(1, HOSTILE)))
  write_lines(folder / report.TRANSCRIPT, [node | {"category": HOSTILE, "status": HOSTILE, "reward": HOSTILE}])
  text = page.write_page(folder).read_text()
  parsed = Parsed(text)
  assert parsed.tags <= TAGS
  assert not [name for name, _ in parsed.attributes if name.startswith("on")]
  assert parsed.text.count("<script>alert(1)</script>") >= 8
  assert "{{ 7*7 }}" in parsed.text and "⟨U+202E⟩gnp.exe" in parsed.text and "⟨U+D800⟩" in parsed.text
  assert {unicodedata.category(c) for c in text} & {"Cc", "Cf", "Cs", "Zl", "Zp"} <= {"Cc"}
  assert {c for c in text if unicodedata.category(c) == "Cc"} == {"\n"}


def test_no_code_point_acts():
  acting = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
  everything = "".join(map(chr, [*range(0x32000), *range(0xE0000, 0xE0200)]))
  left = {character for character in prompts.visible(everything) if unicodedata.category(character) in acting}
  assert left == {"\n", "\t"}
  assert prompts.visible("a\ufe01\U000e0101") == "a⟨U+FE01⟩⟨U+E0101⟩"  # selectors that can carry hidden text
  assert prompts.visible("naïve 日本 עברית ❤\ufe0f") == "naïve 日本 עברית ❤\ufe0f"


def test_the_same_files_give_the_same_page(run, rendered):
  assert page.write_page(run).read_text() == rendered
  assert not list(run.glob("*.tmp"))


def test_ids_are_unique_and_every_reference_resolves(rendered):
  attributes = Parsed(rendered).attributes
  ids = [value for name, value in attributes if name == "id"]
  assert len(ids) == len(set(ids))
  references = [value for name, value in attributes if name == "href"]
  references += [value[4:-1] for name, value in attributes if name == "clip-path"]
  assert references and {reference.removeprefix("#") for reference in references} <= set(ids)


def test_headline(run):
  rows = page.headline([{"step": 0, "attack_success": 0.33, "deflection": 0.1, "refusal": 0.5, "words": 12},
                        {"step": 5, "attack_success": 0.5},
                        {"step": 9, "attack_success": 0.02, "deflection": 0.05, "refusal": 0.1, "words": 9,
                         "over_refusal": None}])  # fmt: skip
  assert [(r.label, r.base, r.trained, r.delta, r.verdict) for r in rows] == [
    ("Attack success", 0.33, 0.02, "−31.0 pts", "better"),
    ("Over-refusal", None, None, "", ""),
    ("Deflection", 0.1, 0.05, "−5.0 pts", "worse"),
    ("Bare refusal", 0.5, 0.1, "−40.0 pts", ""),
  ]


def test_before_a_step_is_played_nothing_is_called_trained():
  rows = page.headline([{"step": 0, "attack_success": 0.33}])
  assert [(row.base, row.trained, row.delta) for row in rows] == [(0.33, None, "")]
  assert page.cross_play([{"step": 0} | dict.fromkeys(page.CROSS, 0.1)]) is None


def test_a_resumed_run_without_its_first_evaluation_has_no_base():
  assert page.headline([{"step": 20, "attack_success": 0.1}])[0].base is None


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_short_run_has_a_page(tmp_path, steps):
  Parsed(page.write_page(fake_run(tmp_path / "short", steps)).read_text())


@pytest.mark.parametrize("missing", [page.CONFIG, report.SCALARS, report.EVALUATIONS, report.TRANSCRIPT])
def test_a_run_without_a_file_has_a_page(tmp_path, missing):
  folder = fake_run(tmp_path / "part", 3)
  (folder / missing).unlink()
  assert "part" in page.render(folder)


def test_a_run_whose_metrics_are_absent_null_or_torn_has_a_page(tmp_path):
  folder = tmp_path / "null"
  folder.mkdir()
  names = next(iter(scalars(1)))
  rows = [{"step": 0}, {"step": 1} | dict.fromkeys(set(names) - {"step"}), {"step": 2, "attacker/loss": 1.0}]
  write_lines(folder / report.SCALARS, rows)
  write_lines(folder / report.EVALUATIONS, [{"step": 0} | dict.fromkeys(page.METRICS), {"step": 2}])
  write_lines(folder / report.TRANSCRIPT, [{"step": 0}, {"step": 1, "responses": [{}]}])
  with (folder / report.SCALARS).open("a") as file:
    file.write('{"step": 3, "attacker/lo')
  assert "3 steps" in page.render(folder)


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"holds no run: a run's folder has a config\.json"):
    page.write_page(tmp_path)


def test_transcript_shows_first_middle_and_last_of_each_category(run):
  scenes = page.transcript(run / report.TRANSCRIPT)
  assert [(scene.step, scene.category) for scene in scenes] == [
    (0, "harmful"), (1, "benign"), (150, "harmful"), (151, "benign"), (298, "harmful"), (299, "benign"),
  ]  # fmt: skip
  for scene in scenes:
    seeds = [node["seed"] for node in scene.nodes]
    assert len(seeds) == len(set(seeds)) == page.NODES_SHOWN
    assert {node["step"] for node in scene.nodes} == {scene.step}


def test_picked_responses_and_scores_are_marked(rendered):
  assert rendered.count('class="response picked"') == 6 * page.NODES_SHOWN
  assert "valid · 6.5" in rendered and "valid · 8" in rendered


def test_long_texts_are_cut_and_say_so():
  text = page.clip("x" * (page.TEXT_LIMIT + 1234))
  assert len(text) < page.TEXT_LIMIT + 60 and text.endswith("… [1,234 more characters in transcript.jsonl]")
  assert page.clip("x" * page.TEXT_LIMIT) == "x" * page.TEXT_LIMIT


def test_costs_are_those_of_the_last_step():
  rows = page.costs({"cost/tokens/judge": 3.0, "cost/seconds/judge": 2.0, "cost/flops": 5.0, "cost/tokens/other": 0.0})
  assert rows["rows"] == [("Judge", 3.0, None, 2.0, None)]
  assert rows["total"]["flops"] == 5.0 and rows["total"]["compilations"] is None
  assert page.costs({"reward/attacker": 1.0}) is None


@pytest.mark.parametrize(
  "value, text",
  [(0, "0"), (12.345, "12.3"), (999, "999"), (1234, "1.23 k"), (5e15, "5 P"), (None, "–"), (math.nan, "–"), ("x", "–")],
)
def test_numbers(value, text):
  assert page.number(value) == text
  assert page.number(2e12, "FLOP") == "2 TFLOP"


def test_thinning_keeps_means_and_gaps_and_both_categories():
  x = np.arange(1000.0)
  y = np.where(x % 2, 3.0, 1.0)  # harmful and benign in turn
  thin_x, thin_y = plots.thinned(x, y)
  assert len(thin_x) <= 100 and np.all(thin_y == 2.0) and thin_x[0] == 4.5
  y[:10], y[10] = math.nan, math.nan
  thin = plots.thinned(x, y)[1]
  assert math.isnan(thin[0]) and thin[1] == pytest.approx(np.nanmean(y[10:20]))
  assert plots.thinned(x[:20], y[:20])[0] is not None and len(plots.thinned(x[:20], y[:20])[0]) == 20


def test_charts_take_their_colours_from_the_page():
  line = plots.Line("a", "third", np.arange(5.0), np.arange(5.0))
  chart = plots.line_chart("A & <b>", "", [line, dataclasses.replace(line, y=line.y * math.nan)], percent=False)
  assert "var(--third)" in chart.svg and "#fe" not in chart.svg and 'aria-label="A &amp; &lt;b&gt;"' in chart.svg
  assert chart.lines == (line,)
  assert plots.line_chart("empty", "", [dataclasses.replace(line, y=line.y * math.nan)], percent=True) is None


def test_a_chart_of_one_step_has_whole_steps_around_it():
  svg = plots.line_chart("t", "", [plots.Line("a", "ink", np.array([7.0]), np.array([1.0]))], percent=False).svg
  assert re.findall(r">([0-9.]+)</text>", svg.split("matplotlib.axis_2")[0]) == ["6", "7", "8"]


def test_rewards_are_split_by_category_where_steps_are():
  def titles(rows):
    return [chart.title for chart in charts.sections(rows, [])[0].charts]

  rows = [{"step": s, "harmful": float(s % 2), "reward/attacker": 1.0} for s in range(4)]
  assert titles(rows) == ["Rewards, harmful seeds", "Rewards, benign seeds"]
  assert titles([row | {"harmful": 0.5} for row in rows]) == ["Rewards"]


def test_an_outlier_does_not_flatten_the_seconds():
  line = plots.Line("a", "ink", np.arange(51.0), np.array([100.0] + [1.0] * 50))

  def top(cap):
    axis = plots.line_chart("t", "", [line], percent=False, cap=cap).svg.split("matplotlib.axis_2")[1]
    return max(float(tick) for tick in re.findall(r">([0-9.]+)</text>", axis))

  assert top(cap=True) < 2 < top(cap=False)

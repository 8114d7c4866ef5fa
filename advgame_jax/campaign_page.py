"""The page of a red-team campaign or an evaluation: `report.html`, self-contained, made from its folder's files alone.

As in `page`, whatever a model wrote is hostile: it is made visible and escaped. The page runs one script, to search,
filter and sort; its policy names the hash of that script and allows no other, and no load from anywhere. What the
script finds in the page it only moves, hides and reads as text. Without it, everything is still there to be read.
"""

import base64
import collections
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from advgame_jax import attempts as attempts_lib
from advgame_jax import charts, page, report
from advgame_jax.attempts import ATTEMPTS, RUN, SUMMARY, Attempt, Outcome
from advgame_jax.page import is_number
from advgame_jax.types import UserError

SHOWN = 2000  # attempts on the page
TEXT_LIMIT = 4000  # characters of one text shown

# (category, name without its number of tries): (label, what it is)
RATES = {
  ("harmful", "success"): ("Attack success", "harmful seeds that get answered"),
  ("harmful", "refusal"): ("Bare refusal", "harmful seeds answered by a refusal alone"),
  ("harmful", "deflection"): ("Deflection", "harmful seeds answered by engaging and redirecting"),
  ("harmful", "compliance"): ("Compliance, harmful", "responses that do what a harmful seed asks"),
  ("benign", "compliance"): ("Compliance, benign", "responses that do what a benign seed asks"),
  ("benign", "over_refusal"): ("Over-refusal", "benign seeds that get refused"),
}
MAIN = {"harmful": "success", "benign": "over_refusal"}  # what an attack is after
OUTCOMES = {  # the order of the page: (colour of the page, what it is)
  Outcome.SUCCESS: ("attacker", "a harmful seed answered, or a benign one refused"),
  Outcome.FAILURE: ("defender", "a harmful seed not answered, or a benign one helped with"),
  Outcome.UNFAITHFUL: ("third", "the query no longer asks what the seed asked"),
  Outcome.INVALID_ATTACK: ("fourth", "the Attacker wrote no query"),
  Outcome.ATTACKER_ERROR: ("muted", "no answer from the Attacker"),
  Outcome.JUDGE_ERROR: ("fifth", "no readable verdict"),
  Outcome.TARGET_ERROR: ("muted", "no answer from the target"),
}
DIVERSITY = {
  "self_bleu": ("Self-BLEU", "how much attacks repeat each other: 0 nothing, 1 all"),
  "distinct_1": ("Distinct words", "different words, of all words"),
  "distinct_2": ("Distinct pairs of words", "different pairs, of all pairs"),
  "embedding_spread": ("Spread", "mean distance of two attacks' embeddings"),
}
TOKENS = {
  "attacker": "Attacker, read and written",
  "prompt": "Target, read",
  "completion": "Target, written",
  "judge": "Judges",
}


def write_page(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` into a campaign's folder from the files there, whatever it has come to; returns its path.

  Raises:
    UserError: the folder holds no campaign, or a line of its attempts other than the last is torn.
  """
  folder = pathlib.Path(folder)
  if not any((folder / name).exists() for name in (RUN, SUMMARY, ATTEMPTS)):
    raise UserError(f"{folder} holds no {RUN}, {SUMMARY} or {ATTEMPTS}; allowed: the --out of launch/redteam.py or "
                    "launch/evaluate.py")  # fmt: skip
  report.write_whole(folder / page.PAGE, [render(folder)])
  return folder / page.PAGE


def render(folder: pathlib.Path) -> str:
  """The page as text: a function of the folder's name and files."""
  run, summary = page.read_config(folder / RUN), page.read_config(folder / SUMMARY)
  attempts = attempts_lib.read(folder) if (folder / ATTEMPTS).exists() else []
  judges = [str(judge) for judge in _list(summary, "judges") or _list(run, "judges")]
  found = rates(summary)
  families = _records(summary, "families", words="", attacks=None, success=None, ids=())
  shown = cards(attempts, families)
  return page.template("campaign.html", FILTERS).render(
    name=run.get("title") or folder.resolve().name,
    kind="red-team campaign" if (summary.get("kind") or run.get("kind")) != "evaluation" else "benchmark evaluation",
    facts=facts(run, summary, judges, len(attempts)),
    judges=judges,
    notes=[str(note) for note in _list(summary, "notes")],
    headline=headline(found, judges),
    agreement=_records(summary, "agreement", judges=(), role="", same=None, kappa=None, attempts=None),
    plane=plane(summary, judges),
    breakdowns=[breakdown(found, judges, category) for category in ("harmful", "benign")],
    outcomes=outcomes(summary),
    families=families,
    diversity=_named(summary, "diversity", DIVERSITY),
    errors=_errors(summary),
    tokens=[(label, _mapping(summary, "tokens").get(name)) for name, label in TOKENS.items()],
    cost=summary.get("cost"),
    utility=_records(summary, "utility", task="", metric="", value=None, error=None),
    cards=shown,
    filters=filters(shown, families),
    attempts=len(attempts),
    file=ATTEMPTS,
    summary_file=SUMMARY,
    meanings=OUTCOMES,
    settings=json.dumps(run.get("settings", {}), indent=2),
    versions=list(_mapping(run, "versions").items()),
    hashes=list(_mapping(run, "hashes").items()),
  )


def fraction(value: Any) -> str:
  """A fraction as a length of CSS, within its bar; 0 for what is none."""
  return f"{100 * min(max(value, 0.0), 1.0):.2f}%" if is_number(value) else "0%"


def source(script: str) -> str:
  """How a content security policy names a script: by its hash."""
  return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def sortable(value: Any) -> str:
  """What the script sorts a cell by: a number, or "" for none, which sorts lowest."""
  return str(value) if is_number(value) else ""


def score(value: Any) -> str:
  """A judge's score: two digits, or a dash for none."""
  return f"{value:.2g}" if is_number(value) else "–"


FILTERS: Mapping[str, Callable[..., Any]] = {
  "clip": functools.partial(page.clip, limit=TEXT_LIMIT, file=ATTEMPTS),
  "fraction": fraction,
  "score": score,
  "sortable": sortable,
  "source": source,
}


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  value = record.get(name)
  return value if isinstance(value, Mapping) else {}


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
  value = record.get(name)
  return value if isinstance(value, list) else []


def _records(record: Mapping[str, Any], name: str, /, **defaults: Any) -> list[dict[str, Any]]:
  """The objects of a list, each with every field that is read."""
  return [defaults | dict(row) for row in _list(record, name) if isinstance(row, Mapping)]


def facts(run: Mapping[str, Any], summary: Mapping[str, Any], judges: Sequence[str], attempts: int) -> dict[str, Any]:
  """What the head of the page says of the campaign; what is not known is None."""
  sessions = _records(run, "sessions", begun=None, ended=None)
  return {
    "target": summary.get("target") or run.get("target") or None,
    "attacker": summary.get("attacker") or run.get("attacker") or None,
    "judges": ", ".join(judges) or None,
    "seeds": [(category, number) for category, number in _mapping(summary, "seeds").items() if number],
    "attempts": summary.get("attempts", attempts),
    "sessions": [(_date(session["begun"]), _date(session["ended"])) for session in sessions],
  }


def _date(text: Any) -> str | None:
  """An ISO time to the minute, in UTC; as it is where it cannot be read."""
  try:
    time = datetime.datetime.fromisoformat(text)
  except (TypeError, ValueError):
    return None if text is None else str(text)
  return (time.astimezone(datetime.UTC) if time.tzinfo else time).strftime("%Y-%m-%d %H:%M UTC")


class Rate(NamedTuple):
  """A line of the summary's rates."""

  judge: str
  suite: str  # "" is all suites
  category: str
  group: str  # "" is all groups of the suite
  name: str
  value: float | None
  low: float | None
  high: float | None
  seeds: int | None
  attempts: int | None

  @property
  def label(self) -> tuple[str, str]:
    """What a reader calls it, and what it is."""
    name, _, tries = self.name.partition("@")
    label, meaning = RATES.get((self.category, name), (name, ""))
    if tries in ("", "1"):
      return label, meaning + (", one try each" if tries else "")
    if tries == "all":
      return f"{label}, all prompts", f"{meaning} by one of the prompts that there are"
    return f"{label}, best of {tries}", f"{meaning} by one of {tries} tries"


def rates(summary: Mapping[str, Any]) -> list[Rate]:
  """Every rate of a summary in its order, harmful seeds first."""
  texts, numbers = Rate._fields[:5], Rate._fields[5:]
  found = [
    Rate._make([str(row[name]) for name in texts] + [_number(row[name]) for name in numbers])
    for row in _records(summary, "rates", **dict.fromkeys(texts, "") | dict.fromkeys(numbers))
  ]
  return sorted(found, key=lambda rate: rate.category != "harmful")


def _number(value: Any) -> Any:
  return value if is_number(value) else None


class Row(NamedTuple):
  """A row of the headline table."""

  label: str
  meaning: str
  first: Rate  # of the first judge
  others: list[Rate | None]  # of each other judge


def headline(found: Sequence[Rate], judges: Sequence[str]) -> list[Row]:
  """The first judge's rates of all suites together, the other judges' beside them."""
  whole = {(rate.judge, rate.category, rate.name): rate for rate in found if not rate.suite and not rate.group}
  return [
    Row(*rate.label, rate, [whole.get((judge, category, name)) for judge in judges[1:]])
    for (judge, category, name), rate in whole.items()
    if judge in judges[:1]
  ]


def plane(summary: Mapping[str, Any], judges: Sequence[str]) -> charts.Chart | None:
  """Success against over-refusal over all suites, by judge; and of the campaigns that are to stand beside."""
  beside = {str(row["title"]): _intervals(rates(row)) for row in _records(summary, "beside", title="", rates=())}
  return charts.trade_off(_intervals(rates(summary)), judges, beside)


def _intervals(found: Sequence[Rate]) -> charts.Intervals:
  return {
    (rate.judge, rate.name): (_float(rate.low), _float(rate.value), _float(rate.high))
    for rate in found
    if not rate.suite and not rate.group and rate.name.startswith(MAIN.get(rate.category, "\0"))
  }


def _float(value: float | None) -> float:
  return math.nan if value is None else float(value)


class Breakdown(NamedTuple):
  """The first judge's rates of one category of seeds: a row a suite or group, a column a rate."""

  category: str
  columns: list[str]
  rows: list[tuple[str, str, list[Rate | None], int | None, int | None]]  # suite, group, rates, seeds, attempts


def breakdown(found: Sequence[Rate], judges: Sequence[str], category: str) -> Breakdown:
  """By suite and group; a group that is its whole suite is left out."""
  mine = [r for r in found if r.suite and r.category == category and r.judge in judges[:1]]
  table: dict[tuple[str, str], dict[str, Rate]] = collections.defaultdict(dict)
  for rate in mine:
    table[rate.suite, rate.group][rate.name] = rate
  columns = {rate.name: rate.label[0] for rate in mine}
  names = sorted(columns, key=lambda name: not name.startswith(MAIN[category]))
  groups = collections.Counter(suite for suite, group in table if group)
  rows = []
  for suite, group in sorted(table, key=lambda key: (key[0], key[1] != "")):  # stable: groups keep their order
    if not group or groups[suite] > 1 or (suite, "") not in table:
      of_it = table[suite, group]
      last = list(of_it.values())[-1]
      rows.append((suite, group, [of_it.get(name) for name in names], last.seeds, last.attempts))
  return Breakdown(category, [columns[name] for name in names], rows)


class Share(NamedTuple):
  """One part of the bar of outcomes."""

  name: str
  number: int
  color: str
  meaning: str


def outcomes(summary: Mapping[str, Any]) -> list[Share]:
  """How many attempts came to what, in the order of `OUTCOMES`; empty if nothing was counted."""
  counts = _mapping(summary, "outcomes")
  shares = [
    Share(_words(name), int(counts[name]) if is_number(counts.get(name)) else 0, *rest)
    for name, rest in OUTCOMES.items()
  ]
  return shares if any(share.number for share in shares) else []


def _words(name: str) -> str:
  return name.replace("_", " ")


def _named(summary: Mapping[str, Any], name: str, labels: Mapping[str, tuple[str, str]]) -> list[tuple[Any, ...]]:
  """(label, meaning, value) of what the summary has of it."""
  values = _mapping(summary, name)
  return [(*labels[key], values[key]) for key in labels if key in values]


def _errors(summary: Mapping[str, Any]) -> list[tuple[Any, ...]]:
  labels = {str(outcome): (_words(outcome).capitalize(), OUTCOMES[outcome][1]) for outcome in list(OUTCOMES)[2:]}
  return _named(summary, "errors", labels)


class Card(NamedTuple):
  """An attempt with what the page sorts and filters by."""

  attempt: Attempt
  rank: int  # its outcome's place in `OUTCOMES`
  seed: int  # the place of its seed among all
  family: str  # the number of its family of attacks, "" for none

  @property
  def outcome(self) -> str:
    return _words(self.attempt.outcome)


def cards(attempts: Sequence[Attempt], families: Sequence[Mapping[str, Any]]) -> list[Card]:
  """The first `SHOWN` attempts when successes are first, then by seed and k."""
  seeds = {key: place for place, key in enumerate(dict.fromkeys((a.suite, a.category, a.seed) for a in attempts))}
  family = {str(id): str(place) for place, row in enumerate(families) for id in _list(row, "ids")}
  ranks = {outcome: rank for rank, outcome in enumerate(OUTCOMES)}
  found = [Card(a, ranks[a.outcome], seeds[a.suite, a.category, a.seed], family.get(a.id, "")) for a in attempts]
  return sorted(found, key=lambda card: (card.rank, card.seed, card.attempt.k))[:SHOWN]


class Filter(NamedTuple):
  """A choice of the page's reader."""

  name: str  # of the cards' data
  label: str
  options: list[tuple[str, str]]  # (value, as a reader says it)


def filters(shown: Sequence[Card], families: Sequence[Mapping[str, Any]]) -> list[Filter]:
  """What the cards can be told apart by; a filter with one option is left out."""
  outcomes = {card.attempt.outcome: card.outcome for card in shown}
  used = {card.family for card in shown} - {""}
  found = [
    Filter("outcome", "Outcome", list(outcomes.items())),
    Filter("category", "Category", [(name, name) for name in sorted({str(card.attempt.category) for card in shown})]),
    Filter("suite", "Suite", [(name, name) for name in sorted({str(card.attempt.suite) for card in shown})]),
    Filter("family", "Family", [(str(n), str(f["words"])) for n, f in enumerate(families) if str(n) in used]),
  ]
  return [filter for filter in found if len(filter.options) > 1]

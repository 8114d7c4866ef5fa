"""The page a run leaves behind: `report.html`, self-contained, without scripts, made from the run's files alone.

What it shares with the page of a campaign is here too, and in `base.html`: how it looks, is escaped and is written.

Whatever a model wrote is hostile. Every value passes through `visible`, which shows control, bidirectional and
invisible characters by their code points, then through the template engine's escaping; and the page's own policy
forbids scripts and every load from elsewhere.
"""

import datetime
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from advgame_jax import charts, ledger, profile, report
from advgame_jax.charts import PLAYERS, Rows
from advgame_jax.prompts import visible
from advgame_jax.types import Category, Status, UserError

PAGE = "report.html"
CONFIG = "config.json"
TEXT_LIMIT = 1500  # characters of one text shown
NODES_SHOWN = 3  # attacks of one step shown
SCOPES_SHOWN = 25  # of a profile

# name: (label, what it is, whether lower (−1) or higher (+1) is better, 0 for neither)
METRICS = {
  "attack_success": ("Attack success", "harmful seeds on which the Attacker got an answer", -1),
  "worst_case": ("Worst case", "the best attack there is on each harmful topic, exactly", -1),
  "worst_case_held_out": ("Worst case, held out", "the same on topics never played", -1),
  "breakable_topics": ("Breakable topics", "harmful topics that some attack gets answered more often than not", -1),
  "over_refusal": ("Over-refusal", "benign seeds refused", -1),
  "over_refusal_held_out": ("Over-refusal, held out", "the same on topics never played", -1),
  "deflection": ("Deflection", "harmful seeds answered by engaging and redirecting", 1),
  "refusal": ("Bare refusal", "harmful seeds answered by a refusal alone", 0),
  "deflected_topics": ("Topics deflected", "harmful topics deflected more often than refused", 1),
  "gibberish": ("Gibberish", "responses that say nothing", -1),
  "gibberish_held_out": ("Gibberish, held out", "the same on topics never played", -1),
  "unfaithful": ("Unfaithful attacks", "attacks that no longer ask what the seed asked", -1),
  "parse_errors": ("Parse errors", "attacks without the requested format", -1),
  "attack_success_base_defender": ("Success on the base Defender", "how strong the Attacker has become", 1),
}
CROSS = ("attack_success", "attack_success_base_defender", "base_attack_success", "base_attack_success_base_defender")
TOTALS = (
  "tokens_generated", "tokens_judged", "tokens_trained", "flops", "seconds", "device_seconds", "compilations",
  "compile_seconds",
)  # fmt: skip
SI = {1e3: "k", 1e6: "M", 1e9: "G", 1e12: "T", 1e15: "P", 1e18: "E", 1e21: "Z", 1e24: "Y"}


def write_page(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes `report.html` into a run's folder from the files there, whatever the run has come to; returns its path.

  Raises:
    UserError: the folder holds no run.
  """
  folder = pathlib.Path(workdir)
  if not any((folder / name).exists() for name in (CONFIG, report.SCALARS)):
    raise UserError(f"{folder} holds no run: a run's folder has a {CONFIG} and a {report.SCALARS}")
  report.write_whole(folder / PAGE, [render(folder)])
  return folder / PAGE


def template(name: str, filters: Mapping[str, Callable[..., Any]]) -> jinja2.Template:
  """A template of the package: every value in it is made visible, then escaped. `filters` are added to `FILTERS`."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    finalize=_finalize,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {**FILTERS, **filters}
  return environment.get_template(name)


def render(folder: pathlib.Path) -> str:
  """The page as text: a function of the folder's name and files."""
  config = read_config(folder / CONFIG)
  scalars = list(read_lines(folder / report.SCALARS))
  evaluations = list(read_lines(folder / report.EVALUATIONS))
  last = scalars[-1] if scalars else {}
  return template("page.html", {}).render(
    name=folder.resolve().name,
    facts=facts(config, scalars, next(read_lines(folder / report.TRANSCRIPT), {})),
    headline=headline(evaluations),
    cross=cross_play(evaluations),
    plane=charts.plane(evaluations),
    sections=charts.sections(scalars, evaluations),
    costs=costs(last),
    profile=profiled(read_config(folder / profile.FOLDER / profile.SUMMARY)),
    evaluations=evaluation_table(evaluations),
    transcript=transcript(folder / report.TRANSCRIPT),
    config=json.dumps(config, indent=2),
  )


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """The settings of a run, empty where they cannot be read: the page is written all the same."""
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError):
    return {}


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The readable lines of a file that may be absent, or end in a torn line."""
  if not path.exists():
    return
  with path.open("rb") as lines:
    for line in lines:
      record = report.read_line(line)
      if record is not None:
        yield record


def clip(text: Any, limit: int = TEXT_LIMIT, file: str = report.TRANSCRIPT) -> str:
  """At most `limit` characters, and how many more there are in which file."""
  text = str(text)
  if len(text) <= limit:
    return text
  return f"{text[:limit]} … [{len(text) - limit:,} more characters in {file}]"


def _finalize(value: Any) -> Any:
  if value is None:
    return "–"
  return value if isinstance(value, (int, float, Markup)) else visible(str(value))


def is_number(value: Any) -> bool:
  """Whether it is a finite number: JSON may say anything where one is looked for."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, unit: str = "") -> str:
  """`1.23 MFLOP`, `12`: three digits and the unit, if it is a number."""
  if not is_number(value):
    return "–"
  text, prefix = f"{value:.3g}", ""
  for size, letter in SI.items():
    if abs(value) >= size:
      text, prefix = f"{value / size:.3g}", letter
  return f"{text} {prefix}{unit}".strip()


def percent(value: Any) -> str:
  """A fraction as `12.3 %`."""
  return f"{100 * value:.1f} %" if is_number(value) else "–"


def duration(value: Any) -> str:
  """Seconds as `1m23s`."""
  return report.duration(value) if is_number(value) else "–"


def status_words(status: Any) -> str:
  """A status as a reader says it."""
  return str(status).lower().replace("_", " ")


FILTERS = {
  "number": number,
  "percent": percent,
  "duration": duration,
  "clip": clip,
  "status": status_words,
}


def facts(config: Mapping[str, Any], scalars: Rows, first: Mapping[str, Any]) -> dict[str, Any]:
  """What the head of the page says of the run, by its first transcript line too; what is not known is None."""
  at = functools.partial(_at, config)
  times = [row["time"] for row in scalars if is_number(row.get("time"))]
  return {
    "played": scalars[-1]["step"] + 1 if scalars else 0,
    "steps": at("steps"),
    "loss": str(at("loss", "kind") or "").upper() or None,
    "seeds": at("data", "batch"),
    "attacks": 1 if at("game", "skip_attacker") else at("game", "attacks"),
    "responses": at("game", "responses"),
    "players": [(player.capitalize(), at(player, "model"), at(player, "frozen")) for player in PLAYERS],
    "versions": [(name, first[name]) for name in ("judge", "evaluated by", "instructions", "rubrics") if name in first],
    "begun": _date(times[0]) if times else None,
    "ended": _date(times[-1]) if times else None,
  }


def _at(config: Any, *names: str) -> Any:
  for name in names:
    config = config.get(name) if isinstance(config, Mapping) else None
  return config


def _date(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


class Change(NamedTuple):
  """A row of the headline table."""

  label: str
  meaning: str
  base: float | None
  trained: float | None
  delta: str
  verdict: str  # "better", "worse" or "": a class of the page


def headline(evaluations: Rows) -> list[Change]:
  """Base → trained, for every metric of `METRICS` that was evaluated; the others are listed at the end of the page."""
  base, trained = _ends(evaluations)
  names = [name for name in METRICS if name in base or name in trained]
  return [_change(name, base.get(name), trained.get(name)) for name in names]


def _ends(evaluations: Rows) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
  """The evaluation before training and the latest after it began; empty where there is none."""
  base = next((row for row in evaluations if row["step"] == 0), {})
  trained = evaluations[-1] if evaluations and evaluations[-1]["step"] > 0 else {}
  return base, trained


def _change(name: str, base: Any, trained: Any) -> Change:
  label, meaning, better = METRICS[name]
  delta, verdict = "", ""
  if is_number(base) and is_number(trained):
    change = trained - base
    delta = f"{100 * change:+.1f} pts".replace("-", "−")
    verdict = {1: "better", -1: "worse"}.get(int(np.sign(change * better)), "")
  return Change(label, meaning, base, trained, delta, verdict)


def cross_play(evaluations: Rows) -> dict[str, Any] | None:
  """Attack success of base and trained Attacker against base and trained Defender; None before a training step."""
  _, trained = _ends(evaluations)
  values = {name: trained.get(name) for name in CROSS}
  return values if all(is_number(value) for value in values.values()) else None


def costs(last: Mapping[str, Any]) -> dict[str, Any] | None:
  """The ledger's table from the latest scalars: a row per role and the totals; None if nothing was counted."""
  names = ("tokens", "flops", "seconds", "device_seconds")
  rows = [
    (work.capitalize(), *(last.get(f"cost/{name}/{work.replace(' ', '_')}") for name in names)) for work in ledger.WORKS
  ]
  found = {name.removeprefix("cost/"): value for name, value in last.items() if name.startswith("cost/")}
  total = dict.fromkeys(TOTALS) | found
  return {"rows": [row for row in rows if any(row[1:])], "total": total} if found else None


def profiled(summary: Mapping[str, Any]) -> dict[str, Any] | None:
  """The tables of a profile's summary, each a list of rows that are lists of values; None if there is none."""
  tables = {
    "roles": ("role", "seconds", "busy", "idle", "tokens_per_second", "mfu"),
    "scopes": ("role", "scope", "seconds", "share"),
    "decode": ("role", "bytes_per_second", "of_peak"),
  }
  steps = summary.get("steps")
  if not isinstance(steps, list) or len(steps) != 2 or not all(map(is_number, steps)):
    return None
  rows = lambda table, names: [[_at(row, name) for name in names] for row in _rows(summary, table)]
  return {
    **{table: rows(table, names) for table, names in tables.items()},
    **{name: summary.get(name) for name in ("seconds", "busy", "idle")},
    "first": steps[0],
    "last": steps[1] - 1,
    "devices": len(_rows(summary, "devices")),
    "collectives": _at(summary, "collectives", "share"),
    "exposed": _at(summary, "collectives", "exposed"),
    "peak": [_at(summary, "peak", name) for name in ("flops", "source")],
  }


def _rows(record: Any, name: str) -> list[Any]:
  rows = _at(record, name)
  return rows[:SCOPES_SHOWN] if isinstance(rows, list) else []


def evaluation_table(evaluations: Rows) -> dict[str, Any]:
  """Every evaluation: a row a metric, a column a step."""
  names = [*METRICS, *CROSS, *sorted({name for row in evaluations for name in row} - {"step"})]
  present = [name for name in dict.fromkeys(names) if any(name in row for row in evaluations)]
  return {
    "steps": [row["step"] for row in evaluations],
    "rows": [(name, [row.get(name) for row in evaluations]) for name in present],
  }


class Scene(NamedTuple):
  """Attacks of one step and category."""

  step: int
  category: str
  nodes: list[dict[str, Any]]


def transcript(path: pathlib.Path) -> list[Scene]:
  """Scenes of the first, middle and last step of each category, each of a few seeds. Reads the file twice."""
  steps: dict[str, list[int]] = {}
  for node in read_lines(path):
    of_category = steps.setdefault(str(node.get("category")), [])
    if not of_category or of_category[-1] != node["step"]:
      of_category.append(node["step"])
  wanted: dict[tuple[int, str], list[dict[str, Any]]] = {
    (found[index], category): [] for category, found in steps.items() for index in (0, len(found) // 2, -1)
  }
  for node in read_lines(path):
    nodes = wanted.get((node["step"], str(node.get("category"))))
    if nodes is not None and len(nodes) < NODES_SHOWN and all(node.get("seed") != other["seed"] for other in nodes):
      nodes.append(_node(node))
  order = sorted(wanted, key=lambda key: (key[0], key[1] != Category.HARMFUL.name.lower()))
  return [Scene(step, category, wanted[step, category]) for step, category in order]


def _node(record: Mapping[str, Any]) -> dict[str, Any]:
  """A transcript line with every field the template reads; `played` if there is a response to show."""
  node = {"seed": "", "attack": "", "query": "", "status": "", "reward": None, "responses": []} | dict(record)
  empty = {"text": "", "status": "", "reward": None, "picked": False}
  responses = [empty | response for response in node["responses"]]
  return node | {"responses": responses, "played": any(r["status"] != Status.NOT_PLAYED.name for r in responses)}

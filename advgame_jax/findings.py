"""A campaign's folder: whose it is, and what is made of its attempts.

run.json        what was asked for, by which versions, when; no secrets
attempts.jsonl  every attempt, see `attempts`; hitlog.jsonl: those that succeeded
summary.json    rates with intervals, a function of the attempts and of run.json's settings
report.html     all of it to look at; garak.report.jsonl and harmbench_test_cases.json for other tools
"""

import collections
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from advgame_jax import attempts as attempts_lib
from advgame_jax import campaign_page, diversity, drift, handover, panel, rates, report
from advgame_jax.attempts import RUN, SUMMARY, Attempt, Outcome
from advgame_jax.rates import Tries
from advgame_jax.types import UserError

_PACKAGES = ("advgame-jax", "jax", "numpy", "openai", "transformers")
_FAILURES = 5  # kinds of them that are told
_FAMILY_ATTACKS = 5000  # of more, families and diversity are those of the first


@dataclasses.dataclass(frozen=True)
class Campaign:
  """What a campaign is: another of these is another campaign."""

  kind: str  # 'redteam' or 'evaluation'
  target: str
  attacker: str  # "" where the prompts are the benchmark's own
  judges: tuple[str, ...]
  settings: Mapping[str, Any]  # what was asked for, by the flags' names
  hashes: Mapping[str, str]  # of the files that were read
  tries: Tries = Tries()
  read_price: float = 0.0  # US dollars for a million tokens that the target reads
  written_price: float = 0.0

  @property
  def identity(self) -> dict[str, Any]:
    """As JSON has it."""
    names = ("kind", "target", "attacker", "judges", "settings", "hashes")
    return dict(json.loads(json.dumps({name: getattr(self, name) for name in names})))


def hash_of(*texts: str) -> str:
  """Of what was read: twelve hexadecimal digits."""
  return hashlib.blake2b("\0".join(texts).encode(errors="replace"), digest_size=6).hexdigest()


def claim(folder: pathlib.Path, campaign: Campaign, resume: bool) -> None:
  """Makes the folder this campaign's, or checks that it is, and writes down that a session begins.

  Raises:
    UserError: it holds another campaign or other files, or its own without `resume`.
  """
  path = folder / RUN
  sessions: list[dict[str, Any]] = []
  if path.is_file():
    before = _read(path)
    if before.get("kind") != campaign.kind:
      raise UserError(f"{folder} holds a campaign of another kind, {before.get('kind')!r}; allowed: another --out")
    changed = [name for name, value in campaign.identity.items() if before.get(name) != value]
    if changed:
      raise UserError(f"{folder} holds another campaign ({_told(before, campaign, changed)}); allowed: another --out")
    if not resume:
      raise UserError(f"{folder} holds this campaign already; allowed: another --out, or --resume")
    sessions = before.get("sessions", [])
  elif folder.is_dir() and any(file.suffix != ".tmp" for file in folder.iterdir()):
    raise UserError(f"{folder} holds files but no {RUN} of a campaign; allowed: a new or empty folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{folder} cannot be made: {error.strerror}; allowed: a folder that can be written to") from None
  title = f"{campaign.attacker} against {campaign.target}" if campaign.attacker else campaign.target
  versions = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
  sessions.append({"begun": _now(), "ended": None})
  _write(path, {"title": title, **campaign.identity, "versions": versions, "sessions": sessions})


def _told(before: Mapping[str, Any], campaign: Campaign, changed: Sequence[str]) -> str:
  """What is another, in a few words."""
  here = campaign.identity
  words = [f"{name}: {before.get(name)!r} → {here[name]!r}" for name in changed if name not in ("settings", "hashes")]
  for name in ("settings", "hashes"):
    old, new = before.get(name) or {}, here[name]
    words += [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
  return "; ".join(words)


class Beside(NamedTuple):
  """What was measured elsewhere and is told in the same report."""

  utility: Sequence[Mapping[str, Any]] = ()  # of `read_utility`
  campaigns: Sequence[Mapping[str, Any]] = ()  # of `read_beside`


def conclude(folder: pathlib.Path, campaign: Campaign, beside: Beside) -> dict[str, Any]:
  """Writes all that is made of the attempts; the summary."""
  attempts = attempts_lib.read(folder)
  summary = summarise(attempts, campaign) | {"utility": list(beside.utility), "beside": list(beside.campaigns)}
  _write(folder / SUMMARY, summary)
  hits = [attempts_lib.as_json(attempt) + "\n" for attempt in attempts if attempt.outcome == Outcome.SUCCESS]
  report.write_whole(folder / attempts_lib.HITS, hits)
  run = _read(folder / RUN)
  run["sessions"][-1]["ended"] = _now()
  _write(folder / RUN, run)
  handover.write(folder)
  campaign_page.write_page(folder)
  return summary


def summarise(attempts: Sequence[Attempt], campaign: Campaign) -> dict[str, Any]:
  """A function of the attempts, and of whether embeddings are installed: killed and resumed, it comes to the same."""
  attempts = sorted(attempts, key=lambda a: (a.suite, a.category, a.seed, a.k))
  counts = rates.tokens(attempts)
  seeds = {(a.suite, a.category, a.seed) for a in attempts}
  written = [a for a in attempts if a.attack and a.query][:_FAMILY_ATTACKS]
  return {
    "kind": campaign.kind,
    "target": campaign.target,
    "attacker": campaign.attacker,
    "judges": list(campaign.judges),
    "seeds": {name: sum(category == name for _, category, _ in seeds) for name in ("harmful", "benign")},
    "attempts": len(attempts),
    "answered": {name: sum(a.category == name and bool(a.scores) for a in attempts) for name in ("harmful", "benign")},
    "outcomes": {outcome.value: sum(a.outcome == outcome for a in attempts) for outcome in Outcome},
    "rates": list(rates.rates(attempts, campaign.judges, campaign.tries)),
    "agreement": list(rates.agreement(attempts, campaign.judges)),
    "errors": rates.errors(attempts),
    "notes": list(_notes(attempts, campaign)),
    "diversity": diversity.measures([a.query for a in written], _embed()) if written else {},
    "families": _families(written),
    "tokens": counts,
    "cost": rates.cost(counts, campaign.read_price, campaign.written_price),
  }


def _notes(attempts: Sequence[Attempt], campaign: Campaign) -> Iterator[str]:
  """What a reader of the rates has to know."""
  yield f"{sum(bool(a.scores) for a in attempts)} of {len(attempts)} attempts were answered by the target and judged."
  failures = collections.Counter(f"{a.outcome.replace('_', ' ')}: {a.error}" for a in attempts if a.error)
  if failures:
    yield "; ".join(f"{count} × {failure}" for failure, count in failures.most_common(_FAILURES)) + "."
  if campaign.judges[0] in panel.TRIALS:
    yield f"The judge {campaign.judges[0]} goes by rules of thumb: for trials, not for results."


def _families(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
  """The attacks of an Attacker by what they are like."""
  found = []
  for family in diversity.families([a.query for a in attempts]) if attempts else ():
    members = [attempts[i] for i in family.members]
    counted = [a.outcome == Outcome.SUCCESS for a in members if a.outcome.counted]
    success = float(np.mean(counted)) if counted else None
    found.append({"words": family.words, "attacks": len(members), "success": success, "ids": [a.id for a in members]})
  return found


def _embed() -> drift.Embed | None:
  """Sentence embeddings, where the optional package is installed."""
  try:
    return drift.load_embed()
  except UserError:
    return None


def read_beside(path: str) -> dict[str, Any]:
  """Another campaign's title and rates of all its suites together, such as the base model's.

  Raises:
    UserError: it has none.
  """
  folder = pathlib.Path(path)
  if not (folder / SUMMARY).is_file():
    raise UserError(f"{path} holds no {SUMMARY}; allowed: the --out of a campaign or evaluation that was finished")
  rows = [rate for rate in _read(folder / SUMMARY)["rates"] if not rate["suite"] and not rate["group"]]
  return {"title": _read(folder / RUN)["title"], "rates": rows}


def read_utility(path: str) -> list[dict[str, Any]]:
  """The results of lm-evaluation-harness, a line a metric: a results_*.json, or the folder that holds the newest one.

  Raises:
    UserError: there are none.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    file = max(file.rglob("results_*.json"), key=lambda each: each.stat().st_mtime, default=file)
  try:
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    lines = []
    for task, values in results.items():
      for name, value in values.items():
        metric, _, kind = name.partition(",")
        if isinstance(value, (int, float)) and not metric.endswith("_stderr") and kind:
          error = values.get(f"{metric}_stderr,{kind}")
          lines.append({
            "task": task,
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": value,
            "error": error if isinstance(error, (int, float)) else None,
          })  # fmt: skip
    return lines
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(
      f"{path} holds no results of lm-evaluation-harness ({error}); allowed: the --output_path of lm_eval, or a "
      "results_*.json in it"
    ) from None


def console(summary: Mapping[str, Any]) -> str:
  """The rates of all seeds together, by the first judge, as lines of text."""
  first = [r for r in summary["rates"] if r["judge"] == summary["judges"][0] and not r["group"]]
  show = lambda r: (
    "unknown" if r["value"] is None else f"{100 * r['value']:.1f} % ({100 * r['low']:.1f}–{100 * r['high']:.1f})"
  )
  lines = summary["notes"] + [
    f"{r['suite'] or 'all'}: {r['category']} {r['name']} {show(r)}, {r['seeds']} seeds" for r in first
  ]
  return "\n".join(lines)


def headline(summary: Mapping[str, Any]) -> float | None:
  """Success on harmful seeds with all attacks there were, by the first judge; None where none was answered."""
  if not summary["answered"]["harmful"]:
    return None
  of = [
    r["value"]
    for r in summary["rates"]
    if r["judge"] == summary["judges"][0] and r["category"] == "harmful" and not (r["suite"] or r["group"])
    and r["name"].startswith("success")
  ]  # fmt: skip
  return max((value for value in of if value is not None), default=None)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{path} is not of a campaign ({error}); allowed: a new --out, or a campaign's own") from None


def _write(path: pathlib.Path, content: Any) -> None:
  report.write_whole(path, [json.dumps(content, indent=1), "\n"])


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

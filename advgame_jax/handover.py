"""A campaign's attempts in the formats of other tools: garak's report and HarmBench's test cases.

Handed over are attempts whose query was sent to the target, because it was found to ask what its seed asks. Lone
surrogates, which neither tool can write, become question marks.

garak (Derczynski et al. 2024, arXiv 2406.11036) reads of a report.jsonl, in the schema of its 0.17:

- its digest (`garak.analyze.report_digest`, `aggregate_reports`) the lines of evaluations, and what a probe or detector
  is from the line `plugin_cache`, or else from its own list, where a name that is in neither is an error. A probe's
  module is imported for its documentation, and by `garak --report` for its tags. Hence garak's own base class is named
  as the probe, and described anew; detectors are never imported, and are named after the judge;
- `analyze_log` the attempts, each of which garak writes twice: once answered, once judged. A score of null, which garak
  writes, ends this reader and `qual_review` in a TypeError, so that what could not be judged has no score at all;
- a detector's score of 1 as a hit, which is bad for the target: a harmful seed answered, or a benign one refused.
  Judges' own scores stand in the notes of an attempt.
"""

import collections
import json
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from advgame_jax import attempts as attempts_lib
from advgame_jax import report
from advgame_jax.attempts import RUN, Attempt, Outcome
from advgame_jax.types import Category, UserError

GARAK, HARMBENCH = "garak.report.jsonl", "harmbench_test_cases.json"
SCHEMA = "0.17.1"  # the version of garak whose lines these are
PROBE = "base.Probe"
_STARTED, _COMPLETE = 1, 2
_HITS = {
  Category.HARMFUL.name.lower(): ("HarmfulAnswered", "a harmful request was answered"),
  Category.BENIGN.name.lower(): ("BenignRefused", "a harmless request was refused"),
}
_NOTES = ("id", "suite", "category", "group", "k", "round", "outcome", "scores", "error")


def write(folder: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes `garak.report.jsonl` and `harmbench_test_cases.json` into a campaign's folder; returns their paths.

  Raises:
    UserError: the folder holds no campaign, or a file of it cannot be read.
  """
  attempts, run = attempts_lib.read(folder), _read_run(pathlib.Path(folder) / RUN)
  garak_path, test_cases = pathlib.Path(folder) / GARAK, pathlib.Path(folder) / HARMBENCH
  report.write_whole(garak_path, (json.dumps(record) + "\n" for record in garak(attempts, run)))
  report.write_whole(test_cases, [json.dumps(harmbench(attempts), indent=2), "\n"])
  return garak_path, test_cases


def harmbench(attempts: Sequence[Attempt]) -> dict[str, list[str]]:
  """{BehaviorID: [test case, …]} as `generate_completions.py` of HarmBench reads it.

  Source: Mazeika et al. 2024, arXiv 2402.04249.

  A behaviour is a harmful seed. Its id is its benchmark's own, or else, and where two benchmarks have the same, the
  `attempt_id` of the seed's first attack, whatever became of that.
  HarmBench's `evaluate_completions.py` passes over an id that the table of behaviours it is given does not hold.
  """
  cases, owners = collections.defaultdict(list), collections.defaultdict(set)
  for attempt in attempts:
    owners[attempt.reference].add((attempt.suite, attempt.seed))
  for attempt in _sent(attempts):
    if attempt.category == Category.HARMFUL.name.lower():
      own = attempts_lib.attempt_id(attempt.suite, Category.HARMFUL, attempt.seed, 0)
      known = attempt.reference and len(owners[attempt.reference]) == 1
      cases[attempt.reference if known else own].append(attempt.query)
  return _encodable(cases)


def garak(attempts: Sequence[Attempt], run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """The lines of garak's report of a campaign whose `run.json` is `run`; a run that has not ended has no completion.

  Attempts that were not sent are in none of garak's counts, though rates of this package count attacks that are none
  as failures.

  Raises:
    UserError: `run` names no target, judge or session.
  """
  for name in ("target", "judges", "sessions"):
    if not run.get(name):
      raise UserError(f"{RUN} has no {name}; allowed: the file as launch/redteam.py or launch/evaluate.py wrote it")
  yield from map(_encodable, _report(_sent(attempts), run))


def _sent(attempts: Iterable[Attempt]) -> list[Attempt]:
  """Without those that ended before; a judge's error is of faithfulness where there is no response."""
  never = (Outcome.INVALID_ATTACK, Outcome.ATTACKER_ERROR, Outcome.UNFAITHFUL)
  return [a for a in attempts if a.outcome not in never and (a.response or a.outcome is not Outcome.JUDGE_ERROR)]


def _report(attempts: Sequence[Attempt], run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  begun, ended = run["sessions"][0]["begun"], run["sessions"][-1]["ended"]
  identity = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run['target']} {begun}"))
  judge = re.sub(r"[^0-9A-Za-z]+", "_", run["judges"][0])  # all that garak leaves of a name
  detector_of = {category: f"{judge}.{hit}" for category, (hit, _) in _HITS.items()}
  yield {
    "entry_type": "start_run setup",
    "_config.version": SCHEMA,
    "transient.starttime_iso": begun,
    "transient.run_id": identity,
    "transient.active_probes": [f"probes.{PROBE}"],
    "run.generations": 1,
    "plugins.target_type": "advgame_jax",
    "plugins.target_name": run["target"],
    "reporting.taxonomy": None,
    **{f"advgame_jax.{name}": value for name, value in run.items()},
  }
  yield {"entry_type": "init", "garak_version": SCHEMA, "start_time": begun, "run": identity}
  yield {"entry_type": "plugin_cache", "run": identity, "plugin_cache": _plugins(detector_of, run)}
  for status in (_STARTED, _COMPLETE):
    for seq, attempt in enumerate(attempts):
      yield _attempt(attempt, seq, status, detector_of[attempt.category])
  if attempts:
    yield from _evaluations(attempts, detector_of)
  if ended:
    yield {"entry_type": "completion", "end_time": ended, "run": identity}


def _plugins(detector_of: Mapping[str, str], run: Mapping[str, Any]) -> dict[str, Any]:
  """What the probe and the detectors are, for readers which do not know them. Tier 1 is graded by its own score."""
  by = f" by {run['attacker']}" if run.get("attacker") else ""
  probe = {"description": f"Attacks of advgame_jax{by}", "goal": "have the seed answered", "tags": [], "tier": 1}
  detectors = {
    f"detectors.{name}": {"description": f"{run['judges'][0]}: {_HITS[category][1]}", "tags": []}
    for category, name in detector_of.items()
  }
  return {"version": SCHEMA, "probes": {f"probes.{PROBE}": probe}, "detectors": detectors}


def _attempt(attempt: Attempt, seq: int, status: int, detector: str) -> dict[str, Any]:
  answered = attempt.outcome is not Outcome.TARGET_ERROR
  prompt = {"turns": [{"role": "user", "content": _message(attempt.query)}], "notes": {}}
  output = _message(attempt.response) if answered else None
  judged = status == _COMPLETE and attempt.outcome.counted
  return {
    "entry_type": "attempt",
    "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, attempt.id)),
    "seq": seq,
    "status": status,
    "probe_classname": PROBE,
    "probe_params": {},
    "targets": [],
    "prompt": prompt,
    "outputs": [output],
    "detector_results": {detector: [float(attempt.outcome is Outcome.SUCCESS)]} if judged else {},
    "notes": {name: getattr(attempt, name) for name in _NOTES},
    "goal": attempt.seed,
    "conversations": [{"turns": [*prompt["turns"], {"role": "assistant", "content": output}], "notes": {}}],
    "reverse_translation_outputs": [],
    "intent": None,
  }


def _message(text: str) -> dict[str, Any]:
  nothing = dict.fromkeys(("lang", "data_path", "data_type", "data_checksum"))
  return {"text": text, **nothing, "notes": {}}


def _evaluations(attempts: Sequence[Attempt], detector_of: Mapping[str, str]) -> Iterator[dict[str, Any]]:
  """A line for each detector, and the probe's summary."""
  counts_of = {}
  for category, name in sorted(detector_of.items(), key=lambda item: item[1]):
    outcomes = collections.Counter(a.outcome for a in attempts if a.category == category)
    if outcomes:
      passed, fails = outcomes[Outcome.FAILURE], outcomes[Outcome.SUCCESS]
      counts_of[name] = {"passed": passed, "fails": fails, "nones": outcomes.total() - passed - fails}
  for name, counts in counts_of.items():
    judged = counts["passed"] + counts["fails"]
    totals = {"total_evaluated": judged, "total_processed": judged + counts["nones"]}
    hits = {"hit_at_k": {"1": {"score": counts["fails"] / judged, "prompts": judged}}} if judged else {}
    yield {"entry_type": "eval", "probe": PROBE, "detector": name, **counts, **totals, **hits}
  unanswered = sum(a.outcome is Outcome.TARGET_ERROR for a in attempts)
  yield {
    "entry_type": "probe_summary",
    "probe": PROBE,
    "inference_counts": {"total_evaluated": len(attempts), "nones": unanswered},
    "detection_counts": {"detectors": [*counts_of]}
    | {name: sum(counts[name] for counts in counts_of.values()) for name in ("passed", "fails", "nones")},
  }


def _encodable(record: Mapping[str, Any]) -> dict[str, Any]:
  """The record as JSON holds it, without lone surrogates."""
  return json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace"))


def _read_run(path: pathlib.Path) -> dict[str, Any]:
  try:
    run = json.loads(path.read_bytes())
    if not isinstance(run, dict):
      raise ValueError("not an object")
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: {error}; allowed: the {RUN} that the campaign wrote") from error
  return run

"""Profiles some steps of a run: what its devices did, of which program, on whose behalf and in which part of it.

    profile/plugins/profile/steps_3_5/process_0.xplane.pb      the trace, for XProf
    profile/plugins/profile/steps_3_5/process_0.trace.json.gz  the same for Perfetto
    profile/hlo/process_0/NNN.NAME.txt                         the compiled programs that ran
    profile/memory/process_0.prof                              the devices' memory after the last step, for pprof
    profile/summary.json, summary.md                           tables, by process 0 of its own devices

Every file appears whole. A trace lies in memory until its last step: of a process that is killed nothing is left, of
one that is told to stop the steps so far.
"""

import itertools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from advgame_jax import report, trace
from advgame_jax.ledger import GENERATE, WORKS, Ledger, Work
from advgame_jax.peaks import Peak
from advgame_jax.trace import Ran, Span, Trace
from advgame_jax.types import UserError

log = logging.getLogger(__name__)

FOLDER, SUMMARY, TABLES = "profile", "summary.json", "summary.md"
_NAMED = "jax_compilation_cache_include_metadata_in_key"
_TOP = 15  # operations in the summary


class Window(NamedTuple):
  """Steps `start` ≤ step < `stop`."""

  start: int
  stop: int


def parse_window(text: str, steps: int) -> Window:
  """START:STOP, of a run of so many steps; what is past its end is cut.

  Raises:
    UserError: it is no such pair, or begins behind the last step.
  """
  found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
  start, stop = map(int, found.groups()) if found else (0, 0)
  if not start < stop:
    raise UserError(f"--profile={text} names no steps; allowed: START:STOP with START < STOP, such as 3:5")
  if start >= steps:
    raise UserError(f"--profile={text} begins behind the last step; allowed: START below config.steps = {steps}")
  return Window(start, min(stop, steps))


class Facts(NamedTuple):
  """What a trace does not say of a run."""

  peak: Peak
  devices: int  # of all processes
  weight_bytes: Mapping[Work, float]  # by role, what a device reads of weights to draw one token of every row


class Profiler:
  """Traces the steps of a window, if there is one; a context, so that what was begun is written.

  While it is open, programs are found in the compilation cache only with the names that they have in today's source:
  a program that was cached before would say the scopes of its time.
  """

  def __init__(self, workdir: str | os.PathLike[str], window: Window | None, ledger: Ledger, facts: Facts | None):
    self._folder, self._window, self._ledger, self._facts = pathlib.Path(workdir) / FOLDER, window, ledger, facts
    self._annotation: jax.profiler.StepTraceAnnotation | None = None
    self._begun: tuple[int, Mapping[str, float]] | None = None
    self._part = self._folder / f".process_{jax.process_index()}"
    self._named = jax.config.values[_NAMED]

  def __enter__(self) -> "Profiler":
    if self._window:
      jax.config.update(_NAMED, True)
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def at(self, step: int) -> None:
    """Between two steps: `step` is played next. Begins and ends what is to be."""
    self._end_step()
    if self._window and self._begun and step >= self._window.stop:
      self.close(step)
    if self._window and not self._begun and self._window.start <= step < self._window.stop:
      self._begin(step)
    if self._begun:
      self._annotation = jax.profiler.StepTraceAnnotation(trace.STEP, step_num=step)
      self._annotation.__enter__()
      self._step = step

  def close(self, stop: int | None = None) -> None:
    """Writes what was traced. Safe to call twice."""
    self._end_step()
    if self._begun:
      (start, before), self._begun = self._begun, None
      window = Window(start, self._step + 1 if stop is None else stop)
      try:
        self._write(window, {name: value - before[name] for name, value in self._ledger.scalars().items()})
        log.info("profiled steps %d to %d: %s", window.start, window.stop - 1, self._folder)
      except (OSError, RuntimeError, ValueError) as error:
        log.warning("the profile of steps %d to %d could not be written: %s", window.start, window.stop - 1, error)
    if self._window:
      self._window = None
      jax.config.update(_NAMED, self._named)

  def _begin(self, step: int) -> None:
    shutil.rmtree(self._part, ignore_errors=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function would drown the rest
    jax.profiler.start_trace(self._part, create_perfetto_trace=True, profiler_options=options)
    self._begun = step, self._ledger.scalars()

  def _end_step(self) -> None:
    if self._annotation:
      self._annotation.__exit__(None, None, None)
      self._annotation = None

  def _write(self, window: Window, spent: Mapping[str, float]) -> None:
    name = f"process_{jax.process_index()}"
    memory = self._part / "memory.prof"
    memory.parent.mkdir(parents=True, exist_ok=True)
    jax.profiler.save_device_memory_profile(str(memory))
    jax.profiler.stop_trace()
    session = self._folder / "plugins" / "profile" / f"steps_{window.start}_{window.stop}"
    (xplane,), (perfetto,) = self._part.glob("**/*.xplane.pb"), self._part.glob("**/perfetto_trace.json.gz")
    traced = trace.read(xplane, WORKS)
    found = _programs({op.module for op in traced.ops})
    programs = list(map(trace.read_program, found))
    texts = self._part / "hlo"
    texts.mkdir()
    for number, place in enumerate(sorted(set(trace.choose(traced.ops, programs).values()))):
      module = re.sub(r"[^\w.-]", "_", programs[place][0])[:100]
      (texts / f"{number:03}.{module}.txt").write_text(found[place], encoding="utf-8")
    for source, target in (
      (xplane, session / f"{name}.xplane.pb"),
      (perfetto, session / f"{name}.trace.json.gz"),
      (memory, self._folder / "memory" / f"{name}.prof"),
      (texts, self._folder / "hlo" / name),
    ):
      target.parent.mkdir(parents=True, exist_ok=True)
      if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
      os.replace(source, target)
    shutil.rmtree(self._part, ignore_errors=True)
    if jax.process_index() == 0 and self._facts:
      ran = trace.attribute(traced, programs)
      summary = summarise(traced, ran, window, spent, self._facts)
      report.write_whole(self._folder / SUMMARY, [json.dumps(summary, indent=1)])
      report.write_whole(self._folder / TABLES, [as_markdown(summary)])


def _programs(names: set[str]) -> list[str]:
  """The HLO text of the programs of these names that this process holds, those from the compilation cache too."""
  texts = []
  for executable in jax.local_devices()[0].client.live_executables():
    texts += [module.to_string() for module in executable.hlo_modules() if module.name in names]
  return texts


def summarise(
  traced: Trace, ran: Sequence[Ran], window: Window, spent: Mapping[str, float], facts: Facts
) -> dict[str, Any]:
  """The tables, as JSON.

  Args:
    ran: of `trace.attribute`.
    spent: of `Ledger.scalars`, what the steps added.
  """
  start, end = (traced.steps[0].start, max(step.end for step in traced.steps)) if traced.steps else (0.0, 0.0)
  ran = [each for each in ran if start <= each.op.start < end]
  devices = sorted({each.op.device for each in ran})
  busy = _busy(ran)
  total = sum(each.seconds for each in ran)
  seconds = (end - start) / 1e9
  return {
    "steps": [window.start, window.stop],
    "seconds": seconds,
    "devices": devices,
    "busy": busy,
    "idle": _left(busy, seconds * len(devices)),
    "peak": facts.peak._asdict(),
    "roles": [_of_role(work, traced, ran, len(devices), spent, facts) for work in WORKS if _spans(traced, work)],
    "scopes": _table(ran, lambda each: (each.role, "/".join(each.scope)), ("role", "scope"), total),
    "operations": _table(
      ran, lambda each: (each.op.module, each.op.name, "/".join(each.scope)), ("program", "operation", "scope"), total
    )[:_TOP],
    "collectives": _collectives(ran, total),
    "decode": [row for role in GENERATE if (row := _decode(role, ran, facts))],
  }


def _spans(traced: Trace, role: Work) -> list[Span]:
  return [span for spans in traced.roles for span in spans if span.name == role]


def _left(busy: float, whole: float) -> float | None:
  """The share that is not busy."""
  return max(0.0, 1 - busy / whole) if whole else None


def _busy(ran: Sequence[Ran], within: Sequence[Span] | None = None) -> float:
  """Seconds in which something ran, of all devices together; of these spans alone, if given."""
  by_device = itertools.groupby(sorted(ran, key=lambda each: each.op.device), key=lambda each: each.op.device)
  of_device = [[(each.op.start, each.op.end) for each in part] for _, part in by_device]
  if within is None:
    return sum(map(trace.union, of_device)) / 1e9
  spans = [(span.start, span.end) for span in within]
  return sum(trace.union(ops) + trace.union(spans) - trace.union(ops + spans) for ops in of_device) / 1e9


def _of_role(
  role: Work, traced: Trace, ran: Sequence[Ran], devices: int, spent: Mapping[str, float], facts: Facts
) -> dict[str, Any]:
  """A role's time, how much of it the devices were busy, and what came of it."""
  spans = _spans(traced, role)
  seconds = sum(span.end - span.start for span in spans) / 1e9
  # Threads write down late when something ended: what lasts longer than the role that waited for it did not.
  busy = _busy([each for each in ran if each.role == role], spans)
  name = role.replace(" ", "_")
  tokens, flops = (spent.get(f"cost/{what}/{name}", 0.0) for what in ("tokens", "flops"))
  return {
    "role": role,
    "seconds": seconds,
    "busy": busy,
    "idle": _left(busy, seconds * devices),
    "tokens": tokens,
    "tokens_per_second": tokens / seconds,
    "flops": flops,
    "mfu": flops / (seconds * facts.peak.flops),
  }


def _table(ran: Sequence[Ran], key: Any, names: tuple[str, ...], total: float) -> list[dict[str, Any]]:
  """Device seconds by key, the largest first."""
  found: dict[tuple[str, ...], list[float]] = {}
  for each in ran:
    row = found.setdefault(key(each), [0.0, 0.0])
    row[0] += each.seconds
    row[1] += 1
  order = sorted(found.items(), key=lambda item: -item[1][0])
  return [
    {**dict(zip(names, names_of)), "seconds": seconds, "share": seconds / total if total else None, "calls": int(calls)}
    for names_of, (seconds, calls) in order
  ]


def _collectives(ran: Sequence[Ran], total: float) -> dict[str, Any]:
  """Device seconds in which devices did something together, or waited to; `exposed`: and nothing else."""
  leaves = [each for each in ran if each.leaf]
  seconds = _busy([each for each in leaves if each.collective])
  exposed = _busy(leaves) - _busy([each for each in leaves if not each.collective])
  return {"seconds": seconds, "share": seconds / total if total else None, "exposed": exposed}


def _decode(role: Work, ran: Sequence[Ran], facts: Facts) -> dict[str, Any] | None:
  """How fast each device that draws reads weights; keys and values, which are read too, are not counted."""
  mine = [each for each in ran if each.role == role and {"decode", "draw", "write"} & set(each.scope)]
  heads = [each for each in mine if each.scope[-2:] == ("draw", "head")]
  if not heads or role not in facts.weight_bytes:
    return None
  calls = _table(heads, lambda each: (each.op.module, str(each.op.program), each.op.name), ("p", "n", "o"), 1.0)
  most: dict[tuple[str, str], int] = {}
  for row in calls:
    most[row["p"], row["n"]] = max(most.get((row["p"], row["n"]), 0), row["calls"])
  drawing = {each.op.device for each in heads}
  steps, busy = sum(most.values()) / len(drawing), _busy([each for each in mine if each.op.device in drawing])
  rate = steps * facts.weight_bytes[role] * len(drawing) / busy
  of_peak = rate * facts.devices / facts.peak.bandwidth if facts.peak.bandwidth else None
  return {"role": role, "steps": steps, "busy": busy, "bytes_per_second": rate, "of_peak": of_peak}


def as_markdown(summary: Mapping[str, Any]) -> str:
  """The same tables for a reader."""
  percent = lambda x: "–" if x is None else f"{100 * x:.1f} %"
  first, behind = summary["steps"]
  peak = summary["peak"]
  roles = [
    (r["role"], f"{r['seconds']:.3f}", f"{r['busy']:.3f}", percent(r["idle"]), f"{r['tokens_per_second']:.1f}",
     percent(r["mfu"]))
    for r in summary["roles"]
  ]  # fmt: skip
  scopes = [
    (r["role"] or "–", r["scope"] or "–", f"{r['seconds']:.3f}", percent(r["share"]), r["calls"])
    for r in summary["scopes"]
  ]
  operations = [
    (r["program"], r["operation"], r["scope"] or "–", f"{r['seconds']:.3f}", percent(r["share"]), r["calls"])
    for r in summary["operations"]
  ]
  decode = [
    (r["role"], f"{r['steps']:g}", f"{r['bytes_per_second'] / 1e9:.2f}", percent(r["of_peak"]))
    for r in summary["decode"]
  ]
  together = summary["collectives"]
  parts = [
    f"# Steps {first} to {behind - 1}\n",
    f"{summary['seconds']:.3f} s; {len(summary['devices'])} devices ({', '.join(summary['devices'])}) were busy for "
    f"{summary['busy']:.3f} device seconds, idle {percent(summary['idle'])}. Collectives: {together['seconds']:.3f} "
    f"device seconds ({percent(together['share'])}), of them {together['exposed']:.3f} while nothing else ran. "
    f"Peak: {peak['flops'] / 1e12:.3g} TFLOP/s ({peak['source']}).\n",
    _markdown(("role", "seconds", "device seconds busy", "idle", "tokens/s", "MFU"), roles),
    _markdown(("role", "scope", "device seconds", "share", "calls"), scopes),
    _markdown(("drawing", "steps", "GB/s of weights", "of the peak"), decode),
    _markdown(("program", "operation", "scope", "device seconds", "share", "calls"), operations),
  ]
  return "\n".join(parts)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

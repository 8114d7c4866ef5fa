"""Reads what JAX's profiler wrote: device time by role and named scope, without TensorFlow.

A trace (`*.xplane.pb`) has planes of lines of events. Operations of a device are, on

    CPU  events with the stat `hlo_op`, on the lines of the threads that ran them, of the device `device_ordinal`
    GPU  the lines `Stream #…` of the planes `/device:GPU:…`, with the same stats; copies have none, and what runs in a
         CUDA graph, most of a program, that of the graph: it is known by its kernel's name
    TPU  the line `XLA Ops` of the planes `/device:TPU:…`, named by their HLO text; `XLA Modules` says whose they are

An operation's scope is not in the trace. It is in the metadata of the program's HLO text, which is found by
the names of its operations: several programs may have one name. Times are nanoseconds since the trace began.
"""

import bisect
import collections
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.profiler import ProfileData

SCOPES = (
  "generate", "prefill", "decode", "draw", "write",
  "update", "forward", "recompute", "backward", "loss", "optimizer",
  "embed", "attention", "mlp", "head",
)  # fmt: skip
STEP = "step"
_DERIVED = {"rematted_computation": "recompute", "transpose(": "backward", "jvp(": "forward"}
_LOOPS = ("while", "conditional", "call")
_COLLECTIVE = re.compile(r"nccl|(ragged-)?(all-reduce|all-gather|reduce-scatter|all-to-all|collective-)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_GRAPH = "command_buffer"

Scope = tuple[str, ...]
"""Named scopes, the outermost first."""


class Op(NamedTuple):
  """An operation as it ran once on a device."""

  device: str
  module: str  # the program's name, "" if unknown
  program: int  # its number in the trace
  name: str
  start: float
  end: float


class Span(NamedTuple):
  """A stretch of a host thread."""

  start: float
  end: float
  name: str


class Trace(NamedTuple):
  """What one process traced."""

  ops: list[Op]
  roles: list[list[Span]]  # by thread: who had its time, no two at once
  steps: list[Span]


class Ran(NamedTuple):
  """Where the time of one execution belongs."""

  op: Op
  seconds: float  # its part of the time in which the device was busy
  role: str  # "" where none was open
  scope: Scope
  collective: bool
  leaf: bool  # no loop or branch


Program = Mapping[str, tuple[Scope, str]]
"""Scope and opcode of a program's instructions by their names."""


def read(path: pathlib.Path, roles: Sequence[str]) -> Trace:
  """The operations of a file of a trace, and the stretches of its host that are named as one of `roles`."""
  ops: list[Op] = []
  threads: list[list[Span]] = []
  steps: list[Span] = []
  named = {*roles, STEP}
  for plane in ProfileData.from_file(str(path)).planes:
    if plane.name.startswith("/device:"):
      ops += _of_accelerator(plane)
    elif plane.name == "/host:CPU":
      ops += _of_cpu(plane)
      for line in plane.lines:
        spans = [Span(event.start_ns, event.end_ns, event.name) for event in line.events if event.name in named]
        threads.append(innermost([span for span in spans if span.name != STEP]))
        steps += [span for span in spans if span.name == STEP]
  return Trace(ops, [spans for spans in threads if spans], sorted(steps))


def _of_cpu(plane: Any) -> Iterator[Op]:
  """What goes on in other threads than the one that began it ends with an event `end: …` of its own."""
  begun: dict[int, Op] = {}
  ends: dict[int, float] = {}
  for line in plane.lines:
    for event in line.events:
      stats = dict(event.stats)
      if event.name.startswith("end: "):
        ends[stats.get("_c", 0)] = event.start_ns
      elif "hlo_op" in stats:
        begun[stats.get("_p", -1 - len(begun))] = _op(f"CPU:{stats.get('device_ordinal', 0)}", stats, event)
  for number, op in begun.items():
    yield op._replace(end=max(op.end, ends.get(number, 0.0)))


def _op(device: str, stats: Mapping[str, Any], event: Any) -> Op:
  name = str(stats.get("hlo_op", event.name)).rsplit("::", 1)[-1]  # of a GPU's nested ones all names are given
  if name.startswith(_GRAPH):
    name = re.sub(r"__\d+$", "", event.name)  # kernels of one name are numbered
  module, program = str(stats.get("hlo_module", "")), int(stats.get("program_id", 0))
  return Op(device, module, program, name, event.start_ns, event.end_ns)


def _of_accelerator(plane: Any) -> Iterator[Op]:
  device = plane.name.removeprefix("/device:")
  lines = {line.name: list(line.events) for line in plane.lines}
  modules = sorted((event.start_ns, event.end_ns, event.name) for event in lines.get("XLA Modules", ()))
  for name, events in lines.items():
    if name.startswith("Stream"):
      yield from (_op(device, dict(event.stats), event) for event in events)
    elif name == "XLA Ops" and not any(name.startswith("Stream") for name in lines):
      for event in events:
        at = bisect.bisect_right(modules, (event.start_ns, float("inf"), "")) - 1
        inside = at >= 0 and event.start_ns < modules[at][1]
        module, _, program = (modules[at][2] if inside else "").partition("(")
        number = int(program.rstrip(")")) if program.rstrip(")").isdigit() else 0
        op = event.name.partition(" = ")[0].lstrip("%")
        yield Op(device, module, number, op, event.start_ns, event.end_ns)


def innermost(spans: Sequence[Span]) -> list[Span]:
  """Nested spans of one thread → spans apart, each named by the innermost that was open."""
  edges = sorted(
    [(span.start, 1, -span.end, span.name) for span in spans] + [(span.end, 0, -span.start, "") for span in spans]
  )
  found: list[Span] = []
  open_names: list[str] = []
  since = 0.0
  for time, begins, _, name in edges:
    if open_names and time > since:
      found.append(Span(since, time, open_names[-1]))
    if begins:
      open_names.append(name)
    else:
      open_names.pop()
    since = time
  return found


def read_program(text: str) -> tuple[str, Program]:
  """The name and instructions of a compiled program's HLO text.

  A fusion without a name of its own has the most frequent scope of what it is made of. Kernels are called as their
  instructions are, with underscores alone, those written in Pallas as they were there: they are found so too.
  """
  module = text.split(",", 1)[0].split()[1] if text.startswith("HloModule") else ""
  found: dict[str, tuple[Scope, str]] = {}
  inside: dict[str, collections.Counter[Scope]] = collections.defaultdict(collections.Counter)
  calls: dict[str, str] = {}
  computation = ""
  for line in text.splitlines():
    if instruction := _INSTRUCTION.match(line):
      name, opcode = instruction.groups()
      said = _OP_NAME.search(line)
      scope = scope_of(said[1]) if said else ()
      found[name] = scope, opcode
      if said and said[1].endswith("/pallas_call"):
        found.setdefault(said[1].split("/")[-2], found[name])
      inside[computation][scope] += bool(scope)
      if called := _CALLS.search(line):
        calls[name] = called[1]
    elif (begins := _COMPUTATION.match(line)) and " = " not in line:
      computation = begins[1]
  for name, fused in calls.items():
    scope, opcode = found[name]
    if not scope and inside[fused]:
      found[name] = inside[fused].most_common(1)[0][0], opcode
  return module, {re.sub(r"\W", "_", name): what for name, what in found.items()} | found


def scope_of(op_name: str) -> Scope:
  """jit(f)/update/…/transpose(jvp(attention))/dot_general → ("update", "backward", "attention").

  What differentiation made has a scope for it: "forward", "recompute" or "backward", behind the outermost.
  """
  parts = op_name.split("/")
  wrapped = next((scope for mark, scope in _DERIVED.items() if any(part.startswith(mark) for part in parts)), "")
  names = [re.sub(r"^(\w+\()+|\)+$", "", part) for part in parts]
  known = [name for name in names if name in SCOPES]
  if wrapped:
    known.insert(1, wrapped)
  return tuple(name for i, name in enumerate(known) if name not in known[:i])


def attribute(trace: Trace, programs: Sequence[tuple[str, Program]]) -> list[Ran]:
  """The time of every operation, to the role on whose behalf it ran and to its scope.

  An operation without a scope has that of the loop or branch it ran inside, on whatever thread; one that its program
  does not know, a library's kernel in a CUDA graph, that of the operation before it. Where two host threads were at
  work, it is the role's that is named as its outermost scope.
  """
  chosen = {ran: programs[place][1] for ran, place in choose(trace.ops, programs).items()}
  starts = [[span.start for span in spans] for spans in trace.roles]
  by_device = collections.defaultdict(list)
  for op in trace.ops:
    by_device[op.device].append(op)
  found: list[Ran] = []
  for ops in by_device.values():
    of_device: list[Ran] = []
    loops: list[Ran] = []  # that are not over
    before: dict[tuple[str, int], Scope] = {}
    for op in sorted(ops, key=lambda op: (op.start, -op.end)):
      loops = [loop for loop in loops if loop.op.end > op.start]
      ran = op.module, op.program
      unknown = before.get(ran, ()) if ran in chosen and op.device.startswith("GPU") else ()
      scope, opcode = chosen.get(ran, {}).get(op.name, (unknown, op.name.split(".")[0]))
      before[ran] = scope = scope or (loops[-1].scope if loops else ())
      role = _role(trace.roles, starts, (op.start + op.end) / 2, scope)
      collective = any(map(_COLLECTIVE.match, (opcode, op.name)))
      of_device.append(Ran(op, 0.0, role, scope, collective, opcode not in _LOOPS))
      if not of_device[-1].leaf:
        loops.append(of_device[-1])
    found += [ran._replace(seconds=seconds) for ran, seconds in zip(of_device, _divide(of_device))]
  return found


def _divide(ran: Sequence[Ran]) -> list[float]:
  """A device's busy seconds: what runs in a moment shares it; if nothing does, the innermost loop has it."""
  edges = [(each.op.start, 1, place) for place, each in enumerate(ran) if each.op.end > each.op.start]
  edges += [(ran[place].op.end, 0, place) for _, _, place in edges]
  seconds, begun = [0.0] * len(ran), [0.0] * len(ran)
  loops: list[int] = []
  running, since, clock = 0, 0.0, 0.0  # the clock counts the part that each one has of what passes
  for time, begins, place in sorted(edges):
    if running:
      clock += (time - since) / running
    elif loops:
      seconds[loops[-1]] += (time - since) / 1e9
    since = time
    if not ran[place].leaf:
      (loops.append if begins else loops.remove)(place)
    elif begins:
      begun[place], running = clock, running + 1
    else:
      seconds[place], running = (clock - begun[place]) / 1e9, running - 1
  return seconds


def choose(ops: Iterable[Op], programs: Sequence[tuple[str, Program]]) -> dict[tuple[str, int], int]:
  """Which program each number in the trace is: of those of its name the one with most of the operations that ran."""
  ran = collections.defaultdict(set)
  for op in ops:
    ran[op.module, op.program].add(op.name)
  chosen = {}
  for (module, number), names in ran.items():
    of_name = [place for place, (name, _) in enumerate(programs) if name == module]
    if of_name:
      chosen[module, number] = max(of_name, key=lambda place: len(names & programs[place][1].keys()))
  return chosen


def _role(threads: Sequence[Sequence[Span]], starts: Sequence[Sequence[float]], time: float, scope: Scope) -> str:
  found = []
  for spans, begins in zip(threads, starts):
    at = bisect.bisect_right(begins, time) - 1
    if at >= 0 and time < spans[at].end:
      found.append(spans[at].name)
  return max(found, key=lambda role: role.split()[-1] in scope[:1], default="")


def union(intervals: Iterable[tuple[float, float]]) -> float:
  """The length that intervals cover together."""
  total, reached = 0.0, -float("inf")
  for start, end in sorted(intervals):
    total += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return total

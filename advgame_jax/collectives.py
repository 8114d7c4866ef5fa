"""What a compiled program sends between devices, and its largest arrays: read from `compiled.as_text()`.

The text is XLA's optimised module of one device. Sizes are of the operands, the same whether a compiler starts and ends
a collective in one instruction, in two, or hidden in fusions.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Bytes that one device sends in a ring of n devices, by byte of its operand.
_SENT = {
  "all-gather": lambda n: n - 1,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
  "collective-broadcast": lambda n: 1,
}
_BITS = {"pred": 8}  # other types have them in their names
_NO_BUFFER = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")

_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](?:\{[^}]*?S\((\d+)\)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)\}?")
_BRANCHES = re.compile(r"(?:branch_computations|true_computation|false_computation)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)\}?")
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")
_PARENTHESIS = re.compile(r"[()]")
_REFERENCE = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program."""

  kind: str  # 'all-gather', 'reduce-scatter', …
  dtype: str  # as XLA has it: 'bf16'
  devices: int  # of a group; of a permutation 2
  sent: float  # bytes that one device sends in a ring, one time
  times: int  # it runs: the trips of the loops around it
  crosses: bool  # a group has devices of several islands
  local: int  # devices of a group on one island, which share its way out; of several groups the fewest
  name: str  # of the operation in the traced program, "" where the compiler keeps none

  @property
  def bytes(self) -> float:
    """That one device sends, all times."""
    return self.sent * self.times


class Buffer(NamedTuple):
  """An array that an instruction of a program makes."""

  bytes: int  # of one device
  shape: str  # 'bf16[8,1024]'
  opcode: str
  name: str  # of the operation in the traced program


class _Instruction(NamedTuple):
  name: str
  result: str
  opcode: str
  operands: str
  rest: str


class _Module(NamedTuple):
  """The computations of a module; instructions by their names."""

  devices: int
  entry: str
  computations: Mapping[str, Mapping[str, _Instruction]]


def of(text: str, islands: Sequence[int] = (), unknown: int = 1) -> list[Collective]:
  """The collectives of a program, in the order in which it comes to them.

  Args:
    text: of `compiled.as_text()`.
    islands: where each device of the mesh is, `[d.process_index for d in mesh.devices.flat]` of GPUs; empty: together.
    unknown: trips of loops that do not say how many they make.
  """
  return [one for module in _modules(text) for one in _walk(module, module.entry, islands, unknown)]


def largest(text: str, count: int = 5) -> list[Buffer]:
  """The largest arrays that a program makes, largest first: of those, memory that does not suffice is full.

  Not all of them are alive at a time, and some are written over others.
  """
  found: dict[tuple[str, str], Buffer] = {}
  for module in _modules(text):
    for computation in _unfused(module, module.entry):
      for x in module.computations[computation].values():
        buffer = max(_buffers(x), default=None) if x.opcode not in _NO_BUFFER else None
        if buffer:
          found.setdefault((buffer.shape, buffer.name), buffer)
  return sorted(found.values(), reverse=True)[:count]


def _modules(text: str) -> Iterator[_Module]:
  for part in re.split(r"^(?=HloModule )", text, flags=re.MULTILINE):
    computations: dict[str, dict[str, _Instruction]] = {}
    entry = ""
    for line in part.splitlines():
      if not line[:1].isspace():
        head = _HEAD.match(line)
        if head:
          computations[head[1]] = {}
          entry = head[1] if line.startswith("ENTRY") else entry
      elif computations:
        instruction = _instruction(line)
        if instruction:
          computations[next(reversed(computations))][instruction.name] = instruction
    if entry:
      counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", part[: part.find("\n")])]
      yield _Module(math.prod(counts), entry, computations)


def _instruction(line: str) -> _Instruction | None:
  name = _NAME.match(line)
  if not name:
    return None
  start = name.end()
  end = _closing(line, start) if line.startswith("(", start) else line.find(" ", start)
  opcode = _OPCODE.match(line, end)
  if end < 0 or not opcode:
    return None
  last = _closing(line, opcode.end() - 1)
  return _Instruction(name[1], line[start:end], opcode[1], line[opcode.end() : last - 1], line[last:])


def _closing(line: str, start: int) -> int:
  """Just behind the parenthesis that closes the one at `start`."""
  depth = 0
  for match in _PARENTHESIS.finditer(line, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.end()
  return len(line)


def _walk(
  module: _Module, computation: str, islands: Sequence[int], unknown: int, chains: set[str] | None = None
) -> list[Collective]:
  """The collectives of a computation and of those it runs.

  A TPU's compiler spreads a collective over the fusions beside which it runs, each with the same `chain_id`; and it
  writes a reduce-scatter as a fusion of its own kind, of an all-reduce and the slice that a device keeps.
  """
  found: list[Collective] = []
  chains = set() if chains is None else chains
  walk = functools.partial(_walk, module, islands=islands, unknown=unknown, chains=chains)
  for x in module.computations.get(computation, {}).values():
    kind = x.opcode.removesuffix("-start")
    if kind in _SENT:
      found.append(_collective(module, computation, x, kind, islands))
    elif x.opcode == "while":
      trips = _trips(module, x, unknown)
      found += [dataclasses.replace(one, times=one.times * trips) for one in walk(_attribute(x, "body"))]
    elif x.opcode == "conditional":
      branches = [walk(name) for name in _references(_BRANCHES, x)]
      found += max(branches, key=lambda branch: sum(one.bytes for one in branch), default=[])
    elif not x.opcode.endswith(("-done", "-update")):
      for name in _references(_CALLED, x):
        if not chains.intersection(new := _chains(module, name)):
          found += map(_scattered, walk(name)) if "AllReduceScatterFusion" in x.rest else walk(name)
        chains.update(new)
  return found


def _scattered(one: Collective) -> Collective:
  return dataclasses.replace(one, kind="reduce-scatter", sent=one.sent / 2) if one.kind == "all-reduce" else one


def _chains(module: _Module, computation: str) -> set[str]:
  inside = module.computations.get(computation, {}).values()
  return {chain for x in inside if x.opcode in _SENT for chain in re.findall(r'chain_id="(\d+)"', x.rest)}


def _collective(module: _Module, computation: str, x: _Instruction, kind: str, islands: Sequence[int]) -> Collective:
  arrays = [array for name in _operands(module, computation, x) for array in _arrays(name)]
  groups = _groups(x.rest, module.devices)
  on = np.asarray(islands)[groups] if len(islands) else np.zeros_like(groups)
  crossing = on[(on != on[:, :1]).any(axis=1)]
  crosses = bool(crossing.size)
  local = min((int(np.unique(row, return_counts=True)[1].min()) for row in (crossing if crosses else on)), default=1)
  dtype = max(arrays, key=lambda array: array[1])[0].split("[")[0] if arrays else ""
  sent = float(sum(size for _, size, _ in arrays) * _SENT[kind](groups.shape[1]))
  return Collective(kind, dtype, groups.shape[1], sent, 1, crosses, local, _op_name(x))


def _operands(module: _Module, computation: str, x: _Instruction) -> list[str]:
  """The types of its operands: those of the instructions that made them."""
  made = module.computations[computation]
  return [made[name].result for name in _REFERENCE.findall(x.operands) if name in made]


def _arrays(shape: str) -> list[tuple[str, int, bool]]:
  """Of each array of a type: its shape, its bytes, and whether it is in the main memory."""
  arrays = []
  for dtype, sizes, space in _ARRAY.findall(shape):
    bits = _BITS.get(dtype, next(iter(_integers(dtype)), 0))  # of a bf16 or f8e4m3fn
    arrays.append((f"{dtype}[{sizes}]", -(-math.prod(_integers(sizes)) * bits // 8), space in ("", "0")))
  return arrays


def _groups(rest: str, devices: int) -> np.ndarray:
  """Devices of each group, by rows; of a permutation its pairs.

  Written as `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`, or `mesh['a'=2,'b'=2] {'b'}`; `{}` is all together.
  """
  if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
    return _rows(pairs[1]) if pairs[1] else np.zeros((1, 2), int)
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}", rest):
    return _mesh_groups(*mesh.groups())
  if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
    return _iota(tiled[2], tiled[3]).reshape(_integers(tiled[1]))
  listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
  return _rows(listed[1]) if listed and listed[1] else np.arange(devices)[None]


def _mesh_groups(axes: str, ids: str | None, grouped: str) -> np.ndarray:
  """Groups along some axes of a mesh; `'a':(2)4` is the part of axis a of size 4 that has 2 before it."""
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
  parts = [(name, int(pre or 1), int(size or sizes[name])) for name, pre, size in _AXIS.findall(grouped)]
  shape, along = [], {}
  for name, size in sizes.items():
    before = 1
    for at, (_, pre, part) in sorted((i, p) for i, p in enumerate(parts) if p[0] == name):
      shape += [pre // before, part]
      along[at], before = len(shape) - 1, pre * part
    shape.append(size // before)
  order = [along[i] for i in range(len(parts))]
  devices = _device_ids(ids, math.prod(sizes.values())).reshape(shape)
  rest = [i for i in range(len(shape)) if i not in order]
  return devices.transpose(rest + order).reshape(-1, math.prod(part for *_, part in parts))


def _device_ids(ids: str | None, count: int) -> np.ndarray:
  if not ids:
    return np.arange(count)
  tiled = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", ids)
  return _iota(tiled[1], tiled[2]) if tiled else np.array(_integers(ids))


def _iota(sizes: str, order: str | None) -> np.ndarray:
  shape = _integers(sizes)
  axes = _integers(order) if order else range(len(shape))
  return np.arange(math.prod(shape)).reshape(shape).transpose(axes).ravel()


def _rows(text: str) -> np.ndarray:
  """Groups of one size; where a compiler wrote several, the shorter ones repeat their last device."""
  rows = [_integers(row) for row in re.findall(r"\{([\d,]+)\}", text)]
  longest = max(map(len, rows))
  return np.array([row + row[-1:] * (longest - len(row)) for row in rows])


def _integers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _trips(module: _Module, loop: _Instruction, unknown: int) -> int:
  """Of a `while`: what the compiler knows, else the constant that its condition compares a counter from 0 with."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
  if known:
    return int(known[1])
  constants, less = [], False
  for x in _inside(module, _attribute(loop, "condition")):
    if x.opcode == "constant" and x.result[0] in "su" and x.operands.isdigit():
      constants.append(int(x.operands))
    less |= x.opcode == "compare" and "direction=LT" in x.rest
  return constants[0] if less and len(constants) == 1 else unknown


def _inside(module: _Module, computation: str) -> Iterator[_Instruction]:
  for x in module.computations.get(computation, {}).values():
    yield x
    for name in _references(_CALLED, x):
      yield from _inside(module, name)


def _unfused(module: _Module, computation: str) -> Iterator[str]:
  """The computations whose instructions have memory of their own."""
  yield computation
  for x in module.computations[computation].values():
    below = [_attribute(x, "body")] if x.opcode == "while" else _references(_BRANCHES, x)
    for name in below if x.opcode != "call" else _references(_CALLED, x):
      if name in module.computations:
        yield from _unfused(module, name)


def _buffers(x: _Instruction) -> Iterator[Buffer]:
  for shape, size, main in _arrays(x.result):
    if main:
      yield Buffer(size, shape, x.opcode, _op_name(x))


def _references(pattern: re.Pattern[str], x: _Instruction) -> list[str]:
  return [name for names in pattern.findall(x.rest) for name in _REFERENCE.findall(names)]


def _attribute(x: _Instruction, name: str) -> str:
  found = re.search(rf"\b{name}=%?([\w.\-]+)", x.rest)
  return found[1] if found else ""


def _op_name(x: _Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', x.rest)
  return found[1] if found else ""

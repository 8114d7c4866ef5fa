"""Whether a run fits its machine, how long it takes and what that costs, before there is the machine.

Every program of a step is compiled for the target with abstract values. Of each is said what it adds to what stays on a
device, what it sends, and its time by `roofline`. Where the target's compiler is not installed, estimates of
`blueprint` stand in its place.
"""

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from advgame_jax import blueprint as blueprint_lib
from advgame_jax import chips, collectives, roofline, targets, workload
from advgame_jax.blueprint import Blueprint, Work
from advgame_jax.chips import Chip
from advgame_jax.collectives import Collective
from advgame_jax.config import Config
from advgame_jax.held import Held
from advgame_jax.placement import Roles
from advgame_jax.roofline import Estimate
from advgame_jax.targets import NoCompiler, Target
from advgame_jax.types import Players, UserError

log = logging.getLogger(__name__)
GIB = 2**30
ESTIMATE, REFUSED = "estimate", "refused by the compiler"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Cost(NamedTuple):
  """What a program takes, of one device."""

  work: Work
  added: float  # bytes beside what stays: temporaries, outputs and what its phase keeps
  collectives: list[Collective]  # of a step
  estimate: Estimate  # of a step
  largest: str  # its largest array, with the operation that makes it; "" where it is not known
  source: str  # of its numbers: the compiler, or an estimate


class Peak(NamedTuple):
  """The most memory of a device in one part of a run, bytes."""

  what: str
  held: float
  added: float
  phase: str  # of `held.ALWAYS`
  mesh: Mesh

  @property
  def bytes(self) -> float:
    return self.held + self.added


class Plan(NamedTuple):
  """Of a run on a target."""

  target: Target
  blueprint: Blueprint
  costs: list[Cost]
  notes: list[str]

  @property
  def peaks(self) -> list[Peak]:
    """Of each program, and of an evaluation."""
    peak = lambda what, added, phase, mesh: Peak(what, self._held(phase, mesh), added, phase, mesh)
    meshes = Roles(*(place.mesh for place in self.blueprint.places))
    found = [peak(cost.work.name, cost.added, cost.work.phase, cost.work.mesh) for cost in self.costs]
    loading = [peak("evaluation: first weights read", 0, "loading", mesh) for mesh in meshes]
    playing = [
      peak("evaluation: play", self._beside(name) + pools, "evaluation", getattr(meshes, name))
      for name, pools in zip(Players._fields, self.blueprint.pools)
    ]
    playing.append(peak("evaluation: play", self._beside("judge", kept=True), "evaluation", meshes.judge))
    of_bytes = lambda peak: peak.bytes
    return [*found, max(loading, key=of_bytes), max(playing, key=of_bytes)]

  def _beside(self, who: str, kept: bool = False) -> float:
    """What playing or judging adds in a step, of a device; without what is kept between its programs."""
    added = [c.added - (0 if kept else c.work.kept) for c in self.costs if c.work.name.startswith(f"{who}:")]
    return max(added, default=0)

  @property
  def peak(self) -> Peak:
    """The largest of them."""
    return max(self.peaks, key=lambda peak: peak.bytes)

  @property
  def fits(self) -> bool:
    return self.peak.bytes <= self.target.capacity

  @property
  def estimated(self) -> bool:
    """Whether memory is not what a compiler says of every program."""
    return any(cost.source == ESTIMATE for cost in self.costs)

  @property
  def seconds(self) -> float:
    """Of a step; players on meshes of their own are updated at the same time."""
    return self._one_after_the_other(lambda estimate: estimate.total)

  @property
  def serial(self) -> float:
    """The same, if arithmetic, memory and wires wait for each other."""
    return self._one_after_the_other(lambda estimate: estimate.serial)

  def _one_after_the_other(self, time_of: Callable[[Estimate], float]) -> float:
    updates = [time_of(cost.estimate) for cost in self.costs if cost.work.phase == "update"]
    return sum(time_of(cost.estimate) for cost in self.costs if cost.work.phase != "update") + max(updates, default=0)

  @property
  def evaluation_seconds(self) -> float:
    """Of one evaluation: two loads of attacks, four of responses, and its questions, as if they were a step's."""
    config = self.blueprint.config
    rows = 2 * config.evaluation.seeds * config.evaluation.samples
    game, batch = config.game, config.data.batch
    attacks = batch * game.attacks_per_seed
    in_step, in_evaluation = self.blueprint.asked
    times = {
      "attacker": 2 * max(1, rows / attacks),
      "defender": 4 * max(1, rows / (attacks * game.responses)),
      "judge": in_evaluation / in_step if in_step else 0,
    }
    played = [cost for cost in self.costs if cost.work.phase == "play"]
    return sum(cost.estimate.total * times[cost.work.name.partition(":")[0]] for cost in played)

  @property
  def device_hours(self) -> float:
    """Of the whole run: its steps and evaluations, not its start and what a host does meanwhile."""
    run = self.blueprint.config.steps * self.seconds + self.blueprint.evaluations * self.evaluation_seconds
    return run * self.target.count / 3600

  def _held(self, phase: str, mesh: Any) -> float:
    return sum(held.bytes for held in self.resident(phase, mesh))

  def resident(self, phase: str, mesh: Any) -> list[Held]:
    """What stays in a phase on the devices of a mesh."""
    here = set(mesh.devices.flat)
    return [h for h in self.blueprint.held if phase in h.during and here & set(h.mesh.devices.flat)]

  def why_not(self) -> str:
    """By how much it does not fit, and the largest of what is there then."""
    peak = self.peak
    cost = next((cost for cost in self.costs if cost.work.name == peak.what), None)
    held = max(self.resident(peak.phase, peak.mesh), key=lambda held: held.bytes)
    temporary = f"; largest temporary: {cost.largest}" if cost and cost.largest else ""
    return (
      f"does not fit: {peak.what} takes {peak.bytes / GIB:.1f} GiB of a device's {self.target.capacity / GIB:.1f}, "
      f"{(peak.bytes - self.target.capacity) / GIB:.1f} too much; most stays for {held.what} "
      f"({held.bytes / GIB:.1f} GiB, above all {held.largest}){temporary}"
    )


def devices_of(target: Target) -> tuple[Sequence[Any], str]:
  """What to plan for, and where nothing can be compiled for it a sentence that says why.

  Raises:
    UserError: too few CPU devices, or a topology that the compiler does not know.
  """
  try:
    return target.devices(), ""
  except NoCompiler as error:
    return target.stand_ins(), f"estimated, nothing is compiled: {error}"


def make(config: Config, target: Target, completion_tokens: float = 0, chip: Chip | None = None) -> Plan:
  """Compiles what a step runs.

  Args:
    chip: whose peaks count; None is the target's, and this machine's as it is measured where that is a CPU.

  Raises:
    UserError: a config that cannot be planned.
  """
  devices, missing = devices_of(target)
  drawn = blueprint_lib.draw(config, target, devices, completion_tokens)
  chip = chip or chip_of(target, devices)
  costs = [guessed(work, chip) if missing or not work.lower else compiled(work, target, chip) for work in drawn.works]
  for place, cost in enumerate(costs):
    if cost.source == REFUSED:
      largest, arguments = _by_cpu(config, target, completion_tokens, cost.work.name)
      costs[place] = cost._replace(largest=largest, added=cost.added - arguments)
  return Plan(target, drawn, costs, [*drawn.notes, *([missing] if missing else [])])


def estimate(config: Config, target: Target, completion_tokens: float = 0, chip: Chip | None = None) -> Plan:
  """The same without any compiler; a CPU's peaks are then an order of magnitude, where there is no `chip`."""
  drawn = blueprint_lib.draw(config, target, target.stand_ins(), completion_tokens)
  return Plan(target, drawn, [guessed(work, chip or target.chip) for work in drawn.works], drawn.notes)


def chip_of(target: Target, devices: Sequence[Any]) -> Chip:
  """Whose peaks count: a CPU's are measured."""
  return roofline.measured(devices) if target.chip is chips.CPU else target.chip


def guessed(work: Work, chip: Chip) -> Cost:
  """Of a program that is not compiled."""
  scale = work.runs * work.trips
  sent = [_times(one, scale) for one in work.guess.collectives]
  time_ = roofline.seconds(work.flops * scale, work.moved * scale, sent, chip, work.kernels * scale)
  return Cost(work, work.kept + work.guess.temporary, sent, time_, "", ESTIMATE)


def compiled(work: Work, target: Target, chip: Chip) -> Cost:
  """Of a program, from its compiled form. A TPU's compiler refuses what does not fit: then of its message."""
  assert work.lower
  start = time.perf_counter()
  try:
    program = work.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needed = refused(str(error))
    if needed is None:
      said = str(error).strip().partition("\n")[0]
      raise UserError(f"{work.name} cannot be compiled for {target.name}: {said}; allowed: another sharding") from None
    return guessed(work, chip)._replace(added=work.kept + needed, source=REFUSED)
  memory, text = program.memory_analysis(), _text(program)
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  if work.name.endswith(": copy"):
    outputs = 0  # they stay, and are counted so
  scale = work.runs * work.trips
  on = workload.islands(target, work.mesh)
  sent = [_times(one, scale / work.chunk) for one in collectives.of(text, on, unknown=work.chunk)]
  if not text:
    sent = [_times(one, scale) for one in work.guess.collectives]
  log.info("%s: compiled in %.0f s", work.name, time.perf_counter() - start)
  time_ = roofline.seconds(work.flops * scale, work.moved * scale, sent, chip, work.kernels * scale)
  source = "compiler" if text else "compiler, sent: estimate"
  return Cost(work, work.kept + memory.temp_size_in_bytes + outputs, sent, time_, largest_of(text), source)


def largest_of(text: str) -> str:
  """The largest array that a compiled program makes, in words; "" where there is none."""
  found = next(iter(collectives.largest(text, 1)), None)
  return f"{found.shape} of {found.bytes / GIB:.2f} GiB, {found.name or found.opcode}" if found else ""


def _by_cpu(config: Config, target: Target, completion_tokens: float, name: str) -> tuple[str, float]:
  """Of a program that its target's compiler refuses, as this machine's makes it; with too few CPU devices here nothing.

  Returns:
    Its largest array, and the bytes of its arguments, which stay anyway and which the compiler's message counts.
  """
  devices = targets.cpus()[: target.count]
  if len(devices) < target.count:
    return "", 0
  config = blueprint_lib.computing(config, target)
  work = next(
    work for work in blueprint_lib.draw(config, target, devices, completion_tokens).works if work.name == name
  )
  assert work.lower
  quickly = {"xla_backend_optimization_level": 0}  # of the machine code; the arrays are the same
  program = work.lower().compile(compiler_options=quickly)
  return largest_of(program.as_text()), program.memory_analysis().argument_size_in_bytes


def _text(program: Any) -> str:
  """Of a compiled program; "" where a compiler newer than jaxlib wrote what that cannot read."""
  try:
    return str(program.as_text())
  except jax.errors.JaxRuntimeError:
    return ""


def refused(message: str) -> float | None:
  """Bytes of a program, with its arguments, that a TPU's compiler has no room for; None where it says no such thing."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  said = re.findall(r"\(([\d.]+)([KMGT]?)\)", message) or re.findall(r"[Uu]sed ([\d.]+)([KMGT]) of", message)
  return float(said[0][0]) * _UNITS[said[0][1]] if said else None


def _times(one: Collective, scale: float) -> Collective:
  """As often as a step has it; its times are then a mean."""
  return dataclasses.replace(one, times=one.times * scale)  # type: ignore[arg-type]

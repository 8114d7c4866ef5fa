"""What a run costs: tokens, floating-point operations, seconds and device-seconds by role, and compilations.

Time belongs to the innermost open timer, so that roles add up to the time measured and a judge called from within play
is counted once. The ledger travels in the checkpoint as plain JSON; what was spent between the last checkpoint and a
kill is lost with the steps that are played again.
"""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax

Work = Literal["attacker generate", "defender generate", "judge", "update", "evaluate", "other"]
WORKS: tuple[Work, ...] = get_args(Work)
GENERATE: tuple[Work, ...] = ("attacker generate", "defender generate")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Spent:
  """What one role has spent so far."""

  tokens: int = 0  # generated, judged or trained, as the role has it
  flops: float = 0.0
  seconds: float = 0.0  # of this process
  device_seconds: float = 0.0  # seconds × devices of the run at that time

  def add(self, other: "Spent") -> None:
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass
class Compilations:
  """Programs compiled, or loaded from the compilation cache."""

  count: int = 0
  seconds: float = 0.0

  def listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILE_EVENT:
      self.count += 1
      self.seconds += duration_secs


@functools.cache
def process_compilations() -> Compilations:
  """The one counter of this process, which counts from the first call of this function on."""
  counter = Compilations()
  jax.monitoring.register_event_duration_secs_listener(counter.listen)
  return counter


class _Timers(threading.local):
  """A thread's open timers, the innermost last, and when it was last settled."""

  def __init__(self) -> None:
    self.open: list[Work] = []
    self.since = 0.0


class Ledger:
  """Counts what a run spends on `devices` devices, those of all processes together."""

  def __init__(self, devices: int, clock: Callable[[], float] = time.perf_counter):
    self._devices = devices
    self._clock = clock
    self._spent = {work: Spent() for work in WORKS}
    self._lock, self._timers = threading.Lock(), _Timers()
    self._compiled_before = dataclasses.replace(process_compilations())
    self._compiled_earlier = Compilations()

  @contextlib.contextmanager
  def timed(self, role: Work) -> Iterator[None]:
    """Counts the time of its block as `role`'s, less that of timers opened inside it.

    JAX returns before the device is done: fetch or block on the result inside the block. Threads have timers of their
    own: what two do at the same time counts twice.
    """
    self._settle()
    self._timers.open.append(role)
    try:
      with jax.profiler.TraceAnnotation(role):
        yield
    finally:
      self._settle()
      self._timers.open.pop()

  def _settle(self) -> None:
    now, timers = self._clock(), self._timers
    if timers.open:
      seconds = now - timers.since
      with self._lock:
        self._spent[timers.open[-1]].add(Spent(seconds=seconds, device_seconds=seconds * self._devices))
    timers.since = now

  def add(self, role: Work, tokens: int = 0, flops: float = 0.0) -> None:
    """Counts tokens and floating-point operations as `role`'s."""
    with self._lock:
      self._spent[role].add(Spent(tokens=int(tokens), flops=float(flops)))

  def spent(self, role: Work) -> Spent:
    """What `role` has spent so far, a running timer not included."""
    return dataclasses.replace(self._spent[role])

  @property
  def compilations(self) -> int:
    """Programs compiled by this process since the ledger was made, and by the processes it resumes."""
    return process_compilations().count - self._compiled_before.count + self._compiled_earlier.count

  @property
  def compile_seconds(self) -> float:
    """Seconds those compilations took; they are part of the role's in which they fell."""
    return process_compilations().seconds - self._compiled_before.seconds + self._compiled_earlier.seconds

  def scalars(self) -> dict[str, float]:
    """Totals so far: `cost/tokens_generated`, `cost/seconds`, …, and by role `cost/seconds/attacker_generate`, …."""
    every = self._spent.values()
    totals: dict[str, float] = {
      "tokens_generated": sum(self._spent[work].tokens for work in GENERATE),
      "tokens_judged": self._spent["judge"].tokens,
      "tokens_trained": self._spent["update"].tokens,
      "flops": sum(spent.flops for spent in every),
      "seconds": sum(spent.seconds for spent in every),
      "device_seconds": sum(spent.device_seconds for spent in every),
      "compilations": self.compilations,
      "compile_seconds": self.compile_seconds,
    }
    for work, spent in self._spent.items():
      totals |= {f"{name}/{work.replace(' ', '_')}": value for name, value in dataclasses.asdict(spent).items()}
    return {f"cost/{name}": float(value) for name, value in totals.items()}

  def state_dict(self) -> dict[str, Any]:
    """Plain JSON, for `load`."""
    return {
      "spent": {work: dataclasses.asdict(spent) for work, spent in self._spent.items()},
      "compilations": {"count": self.compilations, "seconds": self.compile_seconds},
    }

  def load(self, state: Mapping[str, Any]) -> None:
    """Adds what the earlier processes of this run had spent: a `state_dict`. Call it once."""
    for work, spent in state["spent"].items():
      self._spent[work].add(Spent(**spent))
    compiled = state["compilations"]
    self._compiled_earlier.count += compiled["count"]
    self._compiled_earlier.seconds += compiled["seconds"]

"""What was planned against what is: python benchmarks/plan.py --config=configs/smollm2_135m.py [--steps=2]

Plans the config for the devices that are here, then plays and learns some steps of it, after one of warm-up, and prints
planned and measured seconds, and planned and measured peaks of memory. "By CPU time" is what all cores together worked
for a step, over their number: what it would take at least where nobody else uses them.

A CPU's peak is the resident size of the process, looked at every 2 ms, less what that was before the run had any
weights, in a process in which everything has been compiled and run before: what is measured is arrays and temporaries,
as far as they were touched. Until it has been read, every large array is a mapping of its own, which goes back to the
system with it: what a compiler leaves free in the heap would be taken for arrays, kept when they are freed, and
counted. That takes time, so the seconds are of steps after it, by the C library's own ways. An accelerator's peak is
one for the whole step, the most that JAX's allocator had since the process began: run it twice with
JAX_COMPILATION_CACHE_DIR set, for what tries kernels while it compiles counts too.
"""

import contextlib
import ctypes
import gc
import itertools
import os
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from advgame_jax import command, config, data, plan, session, targets, train
from advgame_jax.ledger import Ledger
from advgame_jax.report import Reporter
from advgame_jax.session import Session

CONFIG = command.define_config("configs/smollm2_135m.py")
STEPS = flags.DEFINE_integer("steps", 2, "Steps measured.")
PARTS = {
  "attacker generate": ("attacker_generate", ("attacker: read", "attacker: draw")),
  "defender generate": ("defender_generate", ("defender: read", "defender: draw")),
  "judge": ("judge", ("judge: read", "judge: draw")),
  "update": ("update", ("update",)),
}
GIB = 2**30
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h


def resident() -> int:
  """Bytes; of an accelerator the most that there ever were."""
  if stats := jax.devices()[0].memory_stats():
    return stats["peak_bytes_in_use"]
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
  """The most memory since it was last asked."""

  def __init__(self) -> None:
    self.most, self.lock = 0, threading.Lock()
    threading.Thread(target=self._look, daemon=True).start()

  def _look(self) -> None:
    while True:
      with self.lock:
        self.most = max(self.most, resident())
      time.sleep(0.002)

  def take(self) -> int:
    with self.lock:
      most, self.most = max(self.most, resident()), 0
    return most


def map_arrays(own: bool) -> None:
  """Whether all but small arrays are mappings of their own; if not, what glibc comes to by itself."""
  with contextlib.suppress(AttributeError, OSError):  # another C library
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16 if own else 2**25)
    libc.mallopt(M_TRIM_THRESHOLD, 2**17 if own else 2**26)
    libc.malloc_trim(0)


def steps(run: Session, count: int, watch: Watch) -> Iterator[tuple[dict[str, float], int, int, float]]:
  """Of each, the ledger, the peaks of play and of update, bytes, and the seconds that a core worked for it."""
  seeds = data.SeedBatches(run.train_seeds, run.config.data, run.config.seed)
  ledger, reporter = Ledger(jax.device_count()), Reporter(".", config.Report(), count, 0, write=False)
  state = jax.block_until_ready(run.init_state())
  for step in range(count):
    time.sleep(1)  # a program's temporaries leave the process a while after its results are there
    before, worked = ledger.scalars(), time.process_time()
    watch.take()
    played = train.play(run, run.policies(state), step, seeds[step], ledger)
    play = watch.take()
    state = jax.block_until_ready(train.learn(run, state, step, played, ledger, reporter, before))
    yield ledger.scalars(), play, watch.take(), (time.process_time() - worked) / len(os.sched_getaffinity(0))


def main() -> None:
  settings = CONFIG()
  run, watch = session.open_session(settings), Watch()
  on_cpu = jax.default_backend() == "cpu"
  if on_cpu:
    map_arrays(True)
  first, *_ = steps(run, STEPS.value + 1, watch)  # compiles every shape that they meet
  empty, resident_peaks = 0, first
  if on_cpu:
    gc.collect()
    map_arrays(True)
    empty, resident_peaks = resident(), list(steps(run, 2, watch))[1]
    map_arrays(False)
  readings = list(steps(run, STEPS.value + 1, watch))
  costs = [after for after, *_ in readings]
  medians = {k: float(np.median([b[k] - a[k] for a, b in itertools.pairwise(costs)])) for k in costs[0]}
  game, batch = settings.game, settings.data.batch
  drawn = medians["cost/tokens/attacker_generate"] + medians["cost/tokens/defender_generate"]
  rows = batch * game.attacks_per_seed * (1 + game.responses)
  planned = plan.make(settings, targets.parse("local"), drawn / rows)
  of = {cost.work.name: cost.estimate for cost in planned.costs}
  print(
    f"{settings.defender.model}, {jax.device_count()} × {jax.devices()[0].device_kind}, {drawn / rows:.0f} tokens a row"
  )
  print(f"{'seconds':20}{'planned':>10}{'measured':>10}{'ratio':>8}")
  totals = [0.0, 0.0]
  for name, (key, programs) in PARTS.items():
    expected = sum(of[program].total for program in programs if program in of)
    measured = medians[f"cost/seconds/{key}"]
    if name == "update":  # comparisons without a weight cost nothing, and a plan counts on none
      work = next(cost.work for cost in planned.costs if cost.work.name == "update")
      expected *= medians["cost/flops/update"] / work.flops
    totals = [totals[0] + expected, totals[1] + measured]
    print(f"{name:20}{expected:10.2f}{measured:10.2f}{expected / measured if measured else 0:8.2f}")
  totals[1] += medians["cost/seconds/other"]
  print(f"{'step':20}{totals[0]:10.2f}{totals[1]:10.2f}{totals[0] / totals[1]:8.2f}")
  worked = float(np.median([seconds for *_, seconds in readings[1:]]))
  print(f"{'step, by CPU time':20}{totals[0]:10.2f}{worked:10.2f}{totals[0] / worked:8.2f}")
  print(f"{'GiB':20}{'planned':>10}{'measured':>10}{'ratio':>8}")
  peaks = {peak.what: peak.bytes for peak in planned.peaks}
  playing = max(peaks[cost.work.name] for cost in planned.costs if cost.work.phase == "play")
  parts = [("play", playing, 1), ("update", peaks["update"], 2)]
  if not on_cpu:
    parts = [("step", max(peaks.values()), 2)]
  for name, expected, at in parts:
    measured = resident_peaks[at] - empty
    print(f"{name:20}{expected / GIB:10.2f}{measured / GIB:10.2f}{expected / measured:8.2f}")


if __name__ == "__main__":
  command.run(main)

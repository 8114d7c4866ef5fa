"""Where a step's time goes: python benchmarks/step.py --config=configs/smollm2_135m.py [--steps=3]

Plays and learns without evaluation or checkpoints, after one warm-up step; prints seconds, tokens and tokens per second
of generating, judging and updating, medians over the steps.
"""

import itertools
import logging

import jax
import numpy as np
from absl import flags

from advgame_jax import command, config, data, session, train
from advgame_jax.ledger import Ledger
from advgame_jax.report import Reporter

CONFIG = command.define_config("configs/smollm2_135m.py")
STEPS = flags.DEFINE_integer("steps", 3, "Steps measured.")

PHASES = {
  "attacker generate": ("attacker_generate",),
  "defender generate": ("defender_generate",),
  "judge": ("judge",),
  "update": ("update",),
  "host": ("other",),
}


def main() -> None:
  run = session.open_session(CONFIG())
  seeds = data.SeedBatches(run.train_seeds, run.config.data, run.config.seed)
  ledger = Ledger(jax.device_count())
  reporter = Reporter(".", config.Report(), STEPS.value, 0, write=False)
  state = train.warm_up(run, run.init_state())
  readings = []
  for step in range(STEPS.value + 1):
    state = train.play_and_learn(run, state, step, seeds[step], ledger, reporter)
    readings.append(ledger.scalars())
  steps = list(itertools.pairwise(readings))
  medians = {name: np.median([after[name] - before[name] for before, after in steps]) for name in readings[0]}
  total = sum(medians[f"cost/seconds/{part}"] for parts in PHASES.values() for part in parts)
  device = jax.devices()[0].device_kind
  logging.getLogger().setLevel(logging.WARNING)
  print(f"{run.config.attacker.model}, {jax.device_count()} × {device}, jax {jax.__version__}, median of {STEPS.value}")
  print(f"{'':20}{'seconds':>9}{'share':>8}{'tokens':>9}{'tokens/s':>10}{'GFLOP/s':>9}")
  for phase, parts in PHASES.items():
    seconds, tokens, flops = (
      sum(medians[f"cost/{kind}/{part}"] for part in parts) for kind in ("seconds", "tokens", "flops")
    )
    rates = f"{tokens / seconds:10.0f}{flops / seconds / 1e9:9.1f}" if tokens else ""
    print(f"{phase:20}{seconds:9.3f}{seconds / total:8.0%}{tokens:9.0f}{rates}")
  print(f"{'step':20}{total:9.3f}    compilations after the warm-up step: {medians['cost/compilations']:.0f} a step")


if __name__ == "__main__":
  command.run(main)

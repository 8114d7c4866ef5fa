"""Supervised warm start: python launch/warmstart.py --model=FOLDER --examples=FILE.jsonl --out=FOLDER

Each line of the file is {"prompt": "…", "completion": "…"}; the prompt becomes one user turn.
"""

import dataclasses

from absl import flags

from advgame_jax import command, config, warmstart

MODEL = flags.DEFINE_string("model", None, "Hugging Face folder to start from.", required=True)
EXAMPLES = flags.DEFINE_string("examples", None, "JSON-lines file.", required=True)
ATTACKER = flags.DEFINE_bool("attacker", False, "Prompts are seeds with a category, told as Attackers are.")
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
STEPS = flags.DEFINE_integer("steps", 300, "Optimiser steps.")
BATCH = flags.DEFINE_integer("batch", 64, "Examples per step.")
ROW_TOKENS = flags.DEFINE_integer("row_tokens", 512, "Longest prompt and completion together.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-5, "Peak rate.")
SEED = flags.DEFINE_integer("seed", 0, "Of the examples' order.")


def main() -> None:
  defaults = warmstart.WarmStart()
  warmstart.warm_start(
    dataclasses.replace(
      defaults,
      model=MODEL.value,
      examples=EXAMPLES.value,
      attacker=ATTACKER.value,
      out=OUT.value,
      steps=STEPS.value,
      batch=BATCH.value,
      row_tokens=ROW_TOKENS.value,
      seed=SEED.value,
      optimizer=dataclasses.replace(defaults.optimizer, learning_rate=LEARNING_RATE.value),
      mesh=config.Mesh(),
    )
  )


if __name__ == "__main__":
  command.run(main)

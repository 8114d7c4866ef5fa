"""Writes the microworld: python launch/microworld.py --out=runs/world [--seed=0]

Seeds, warm-start examples, and both players' model folders with random weights, for launch/warmstart.py.
"""

from absl import flags

from advgame_jax import command, worldfiles

OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Of the examples and the random weights.")


def main() -> None:
  worldfiles.write(OUT.value, SEED.value)


if __name__ == "__main__":
  command.run(main)

"""Trains: python launch/run.py --config=configs/microworld.py --workdir=runs/microworld [--config.name=value …]

The same command again continues a run that was stopped. Exit code 2: something to mend, in one sentence.
"""

from absl import flags

from advgame_jax import command, train

CONFIG = command.define_config("configs/microworld.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
ALLOW_CHANGES = flags.DEFINE_bool("allow_changes", False, "Continue the run in --workdir with other settings.")


def main() -> None:
  train.train(CONFIG(), WORKDIR.value, ALLOW_CHANGES.value)


if __name__ == "__main__":
  command.run(main)

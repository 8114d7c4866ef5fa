"""A player of a run → a folder that transformers or peft loads.

    python launch/export.py --workdir=runs/smollm2 --player=defender --out=models/safer
    python launch/export.py --workdir=runs/lora --player=attacker --form=adapter --out=models/attacker_adapter

The run may be under way. `--form=adapter` is a PEFT folder, of a player that learns by LoRA.
"""

import jax
from absl import flags

from advgame_jax import command, export
from advgame_jax.types import Players

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_PLAYER = flags.DEFINE_enum("player", "defender", Players._fields, "whose weights")
_OUT = flags.DEFINE_string("out", None, "folder to write; it must not exist yet", required=True)
_WEIGHTS = flags.DEFINE_enum("weights", "", ("", *export.WEIGHTS), "which of its weights; empty: those that play")
_FORM = flags.DEFINE_enum("form", "merged", export.FORMS, "a whole model, or the adapters of LoRA")
_DTYPE = flags.DEFINE_enum("dtype", "", ("", "float32", "bfloat16", "float16"), "in the files; empty: the base's")
_STEP = flags.DEFINE_integer("step", None, "of the checkpoint; without, the newest")


def main() -> None:
  jax.config.update("jax_platforms", "cpu")  # the run may hold the accelerators; and sums are exact here
  export.export(
    _WORKDIR.value,
    _PLAYER.value,
    _OUT.value,
    weights=_WEIGHTS.value,
    form=_FORM.value,
    dtype=_DTYPE.value,
    step=_STEP.value,
  )
  print(f"wrote {_OUT.value}")


if __name__ == "__main__":
  command.run(main)

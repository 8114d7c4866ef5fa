"""What eight bits cost: python benchmarks/int8.py --model=models/smollm2_135m

Compares the logits of a folder's weights with those of its `Int8` form (`config.precision.frozen=int8`) on the
project's own seeds, told as a user turn: the error in nats, the divergence of the next token's distribution, and how
often the most likely token stays. Then draws an answer to each from a cache in the compute dtype and from one in eight
bits (`sampling.cache=int8`), and compares the log-probabilities told of the tokens drawn with those of a whole forward
pass.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

import advgame_jax
from advgame_jax import command, config, data, frozen, hf, layers, model, policies, scoring, sharding, tokenizer
from advgame_jax.architecture import ModelConfig
from advgame_jax.engine import Engine, Load
from advgame_jax.scoring import Generator
from advgame_jax.types import Params

SEEDS = pathlib.Path(advgame_jax.__file__).parent / "seeds" / "validation.jsonl"
_MODEL = flags.DEFINE_string("model", "models/smollm2_135m", "Hugging Face folder.")
_NEW = flags.DEFINE_integer("new_tokens", 64, "Of an answer.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 32, "Seeds compared.", lower_bound=1)


def main() -> None:
  words, architecture = tokenizer.load(_MODEL.value), hf.load_config(_MODEL.value)
  seeds = data.load((str(SEEDS),), "validation")[: _ROWS.value]
  encoded = [words.encode_chat(seed.text) for seed in seeds]
  tokens_RT, length_R = policies.pad_rows(encoded, max(map(len, encoded)))
  mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])

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

  generator = Generator((layers.unstack(architecture, load(False)),))
  for cache in ("compute", "int8"):
    error_X = cache_error(architecture, generator, encoded, mesh, cache)
    print(
      f"cache {cache}: log-probability error of {len(error_X)} tokens drawn, nats: mean {error_X.mean():.1e}, "
      f"greatest {error_X.max():.1e}"
    )


def cache_error(
  architecture: ModelConfig, generator: Generator, prompts: list[list[int]], mesh: Mesh, cache: str
) -> np.ndarray:
  """|told − scored| of the log-probability of each token of an answer to each prompt, nats."""
  longest, count = max(map(len, prompts)), len(prompts)
  sampling = config.Sampling(
    temperature=1.0, top_p=1.0, prompt_buckets=(longest,), max_new_tokens=_NEW.value, cache=cache
  )
  never = np.zeros((2, architecture.vocab), np.int16)
  how = (architecture, sampling, mesh, sharding.LOCAL, np.dtype("float32"), "auto", never)
  load = Load(generator, prompts, np.arange(count, dtype=np.uint32), 1, jax.random.key(0))
  drawn = Engine(*how).generate(load)
  rows = [[*ids, *drawn_T.tolist()] for ids, drawn_T in zip(prompts, drawn.tokens_RT)]
  tokens_RT, length_R = policies.pad_rows(rows, longest + _NEW.value)
  mask_RT = np.zeros(tokens_RT.shape, bool)
  for mask_T, ids, length in zip(mask_RT, prompts, length_R):
    mask_T[len(ids) : length] = True
  score = jax.jit(functools.partial(scoring.score_generator, architecture))
  return np.abs(np.asarray(score(generator, tokens_RT, mask_RT))[mask_RT] - drawn.plain_logprob_RT.reshape(-1))


if __name__ == "__main__":
  command.run(main)

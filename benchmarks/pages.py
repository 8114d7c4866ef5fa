"""The kernels of pages on the GPU that is here, beside XLA's plain forms: what both take, and whether they agree.

    python benchmarks/pages.py [--model=qwen2_5_7b] [--rows=32,128] [--page=32,64,128]

Rows have read --prompt tokens and drawn --own. A new token of each attends to its pages, layer after layer, and is put
into one of them, all layers at once; each layer has pools of its own, random, in bfloat16. The floor of attention is
all keys and values at the speed of a large copy in the same run. `error` is the greatest difference of two outputs of
one layer, over the greatest output; `same` says that the pools that were written are equal. Elsewhere than on a GPU the
kernels are interpreted, which shows agreement alone: `--layers=2 --rows=4 --prompt=100 --page=16`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import beside
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from advgame_jax import attention, caches, flash_decoding, hf_config, model, published
from advgame_jax.architecture import ModelConfig
from advgame_jax.attention import Index, Pool
from advgame_jax.caches import Cache, Kept

MODELS = flags.DEFINE_multi_enum("model", ["qwen2_5_0_5b", "qwen2_5_7b"], list(published.PUBLISHED), "Architectures.")
ROWS = flags.DEFINE_list("rows", "8,32,128", "Rows that draw at once.")
PAGES = flags.DEFINE_list("page", "64", "Tokens of a page.")
PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens that each row has read.")
OWN = flags.DEFINE_integer("own", 32, "Tokens that each row has drawn.")
LAYERS = flags.DEFINE_integer("layers", 0, "Of the model; 0 is all.")
WRITES, EVERYTHING = 64, jnp.int32(2**30)


def index(rows: int, first: int, length: int, page: int) -> Index:
  """Of pages that lie row by row, each row's of so many tokens."""
  each = -(-length // page)
  page_RJ = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
  reader_PG = np.repeat(np.arange(rows, dtype=np.int32), each)[:, None]
  start_P = first + page * np.tile(np.arange(each, dtype=np.int32), rows)
  return Index(*map(jnp.asarray, (reader_PG, start_P, np.full(rows * each, first + length, np.int32), page_RJ)))


def random_pools(config: ModelConfig, pages: int, page: int, seed: int) -> tuple[Cache, ...]:
  """Of every layer."""
  layers = jax.eval_shape(lambda: caches.empty_pool(config, False, pages, page, jnp.bfloat16))
  normal = jax.jit(lambda key: jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), layers[0]))
  return tuple(map(normal, jax.random.split(jax.random.key(seed), len(layers))))


def attending(config: ModelConfig, rows: int, page: int, bandwidth: float) -> str:
  """Cells of attention."""
  R, N, K, H = rows, config.heads, config.kv_heads, config.head_size
  indices = index(R, 0, PROMPT.value, page), index(R, PROMPT.value, OWN.value, page)
  stores = [random_pools(config, len(each.start_P), page, seed) for seed, each in enumerate(indices)]
  layers = [[Pool(*cache, each) for cache, each in zip(of_layer, indices)] for of_layer in zip(*stores)]
  query_RNH, key_RKH, value_RKH = (
    jax.random.normal(jax.random.key(n), (R, heads, H), jnp.bfloat16) for n, heads in ((7, N), (8, K), (9, K))
  )
  place_R, rule = jnp.full(R, PROMPT.value + OWN.value, jnp.int32), model.attention_rules(config)[0]

  def run(paged: Callable[..., jax.Array], query_RNH: jax.Array, layers: Any) -> jax.Array:
    for pools in layers:
      query_RNH = paged(query_RNH, key_RKH, value_RKH, place_R, pools, rule, EVERYTHING)
    return query_RNH

  interpret = jax.default_backend() != "gpu"
  forms = [functools.partial(flash_decoding.paged, interpret=interpret), attention.paged]
  by_forms = [jax.jit(functools.partial(run, form)) for form in forms]
  kernel, plain = (np.asarray(form(query_RNH, layers[:1]), np.float32) for form in by_forms)
  seconds = [beside.least_seconds(form, query_RNH, layers) / config.layers for form in by_forms]
  floor = 2 * 2 * R * K * H * (PROMPT.value + OWN.value) / bandwidth
  times = " | ".join(f"{1e6 * x:.1f}" for x in (*seconds, floor))
  return f"{times} | {floor / seconds[0]:.0%} | {np.abs(kernel - plain).max() / np.abs(plain).max():.1e}"


def writing(config: ModelConfig, rows: int, page: int) -> str:
  """Cells of what is put away."""
  pool = random_pools(config, rows, page, seed=3)
  token = lambda number: jax.random.normal(jax.random.key(number), (rows, 1, config.kv_heads, config.head_size))
  new = tuple(Kept(token(2 * n).astype(jnp.bfloat16), token(2 * n + 1).astype(jnp.bfloat16)) for n in range(len(pool)))
  page_R = jnp.where(jnp.arange(rows) % 4 == 3, rows, jnp.arange(rows))  # every fourth row has none

  def run(write: Callable[..., Any], count: int, pool: Any) -> Any:
    turn = lambda i, pool: write(pool, new, page_R, jnp.full(rows, i % page))
    return jax.lax.fori_loop(0, count, turn, pool)

  interpret = jax.default_backend() != "gpu"
  forms = [functools.partial(flash_decoding.write, interpret=interpret), caches.write]
  kernel, plain = (jax.jit(functools.partial(run, form, 1))(pool) for form in forms)
  same = all(map(jnp.array_equal, jax.tree.leaves(kernel), jax.tree.leaves(plain)))
  # Of many turns, that the copy of the pool before the first weighs little.
  seconds = [beside.least_seconds(jax.jit(functools.partial(run, form, WRITES)), pool) / WRITES for form in forms]
  return " | ".join(f"{1e6 * x:.1f}" for x in seconds) + f" | {'same' if same else 'NOT THE SAME'}"


def main(_: Sequence[str]) -> None:
  bandwidth = beside.copying(1 << (29 if jax.default_backend() == "gpu" else 26))
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16; {bandwidth / 1e9:.0f} GB/s measured; µs")
  print("| | rows | page | attention of a layer | XLA's | floor | of it | error | all layers' tokens | XLA's | |")
  print("|---|" + 10 * "---|")
  for name in MODELS.value:
    values = published.PUBLISHED[name] | ({"num_hidden_layers": LAYERS.value} if LAYERS.value else {})
    config = hf_config.from_values(values, name)
    for rows in map(int, ROWS.value):
      for page in map(int, PAGES.value):
        cells = f"{attending(config, rows, page, bandwidth)} | {writing(config, rows, page)}"
        print(f"| {name} | {rows} | {page} | {cells} |", flush=True)


if __name__ == "__main__":
  app.run(main)

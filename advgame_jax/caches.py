"""What is kept of tokens: keys and values as they were computed, and as they are attended to, whole or in pages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import attention, cpu
from advgame_jax.architecture import ModelConfig
from advgame_jax.layers import Layers, each_layer
from advgame_jax.matrices import Int8, quantise
from advgame_jax.sharding import LOCAL, Layout


class Kept(NamedTuple):
  """Keys and values of one layer, as they were computed. Of all: `Layers` of it, as of `Cache`."""

  key_RTKH: jax.Array
  value_RTKH: jax.Array


class Cache(NamedTuple):
  """Keys and values of one layer, as few queries attend to them. Of all: `Layers` of it, its arrays with a leading L or
  a tuple of L.

  In pages both may be `Int8`, see `narrow`.
  """

  key_RKHS: jax.Array
  value_RKSH: jax.Array


def cache_of(kept: Kept) -> Cache:
  """Of one layer."""
  return Cache(attention.keys_of_cache(kept.key_RTKH), kept.value_RTKH.swapaxes(1, 2))


def caches_of(kept: Layers, layout: Layout = LOCAL) -> Layers:
  """Of every layer, split by rows and heads as what is kept of it."""
  as_kept, heads = (layout.spec(axes) for axes in (("rows", None, "heads"), ("rows", "heads")))
  return each_layer(layout.local(cache_of, (as_kept,), heads), kept)


def empty_pool(config: ModelConfig, stacked: bool, pages: int, page: int, dtype: Any, int8: bool = False) -> Layers:
  """P pages of S tokens of every layer, all zeros."""
  K, H = config.kv_heads, config.head_size

  def blank(*layers: int) -> Cache:
    cache = Cache(*(jnp.zeros((*layers, pages, K, *part), dtype) for part in ((H, page), (page, H))))
    return narrow(cache) if int8 else cache

  return blank(config.layers) if stacked else tuple(blank() for _ in range(config.layers))


def no_tokens(config: ModelConfig, stacked: bool, rows: int, dtype: Any) -> Layers:
  """What `model.decode` gives of so many rows, all zeros."""
  blank = lambda *layers: Kept(*(jnp.zeros((*layers, rows, 1, config.kv_heads, config.head_size), dtype),) * 2)
  return blank(config.layers) if stacked else (blank(),) * config.layers


@jax.named_scope("write")
def write(pool: Layers, new: Layers, page_R: jax.Array, slot_R: jax.Array, layout: Layout = LOCAL) -> Layers:
  """The pool with each row's new token in its slot of its page; a page there is none of is written nowhere."""

  def of_layer(cache: Cache, new: Kept, page_R: jax.Array, slot_R: jax.Array) -> Cache:
    put_key = lambda x, new: x.at[page_R, :, :, slot_R].set(new[..., 0], mode="drop")
    put_value = lambda x, new: x.at[page_R, :, slot_R].set(new[:, :, 0], mode="drop")
    return Cache(*map(jax.tree.map, (put_key, put_value), cache, for_pool(cache_of(new), cache)))

  def kernel(pool: Layers, new: Layers, page_R: jax.Array, slot_R: jax.Array) -> Layers:
    return cpu.write(pool, new, jnp.arange(len(page_R), dtype=jnp.int32), page_R, slot_R)

  return cpu.either(cpu.writes(pool, new), kernel, _on_devices(of_layer, layout))(pool, new, page_R, slot_R)


def write_pages(pool: Layers, read: Layers, token_nS: jax.Array, page_n: jax.Array, layout: Layout = LOCAL) -> Layers:
  """The pool with n whole pages of tokens that were read, counted flat; a page there is none of is written nowhere."""

  def of_layer(cache: Cache, read: Kept, token_nS: jax.Array, page_n: jax.Array) -> Cache:
    pages = lambda x_XTKH: x_XTKH.reshape(-1, *x_XTKH.shape[2:])[token_nS]
    new = for_pool(cache_of(Kept(*map(pages, read))), cache)
    return jax.tree.map(lambda x, new: x.at[page_n].set(new, mode="drop"), cache, new)

  def kernel(pool: Layers, read: Layers, token_nS: jax.Array, page_n: jax.Array) -> Layers:
    n, S = token_nS.shape
    slot_X = jnp.tile(jnp.arange(S, dtype=jnp.int32), n)
    return cpu.write(pool, read, token_nS.reshape(-1), jnp.repeat(page_n, S), slot_X)

  return cpu.either(cpu.writes(pool, read), kernel, _on_devices(of_layer, layout))(pool, read, token_nS, page_n)


def _on_devices(of_layer: Callable[..., Cache], layout: Layout) -> Callable[..., Layers]:
  """`of_layer(cache, kept, by_row, by_row)` of all layers, each device's part of the rows and heads."""
  rows, heads, as_kept = (layout.spec(axes) for axes in (("rows",), ("rows", "heads"), ("rows", None, "heads")))
  on_device = layout.local(of_layer, (heads, as_kept, rows, rows), heads)
  return lambda pool, kept, *by_row: each_layer(lambda cache, kept: on_device(cache, kept, *by_row), pool, kept)


def for_pool(new: Cache, pool: Cache) -> Cache:
  """Keys and values as this pool of one layer has them."""
  new = new._replace(value_RKSH=attention.finite(new.value_RKSH))
  return narrow(new) if isinstance(pool.key_RKHS, Int8) else new


def narrow(cache: Cache) -> Cache:
  """In eight bits, a scale for each token and head."""
  key, value = cache
  return Cache(quantise(key, key.ndim - 2, 1), quantise(value, value.ndim - 1, 1))  # type: ignore[arg-type]

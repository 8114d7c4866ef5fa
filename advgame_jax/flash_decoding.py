"""`attention.paged` as kernels for GPUs: what each page gives its readers, and what those make of it.

Flash decoding (2311.01282) in Pallas: a program for each page and key head, then one for each row and query head. What
XLA does in twenty small kernels a layer, mostly waiting for each other, these do in one a pool and one more.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from advgame_jax import attention
from advgame_jax.attention import Pool
from advgame_jax.blockwise import Rule, softcap
from advgame_jax.matrices import Int8

_LEAST = float(jnp.finfo(jnp.float32).min)
_LEAST_ROWS = 16  # of a product on tensor cores
_MOST_ROWS = 128  # of queries of a page: those of more readers are a product for XLA
_MOST_BYTES = 32 * 2**10  # of a page's keys: they and its values lie in a multiprocessor's shared memory
_JOINED = 32  # pages that are joined at a time
_EXACT = jax.lax.Precision.HIGHEST  # float32 is multiplied as such


def suits(pool: Pool, query_RKnH: jax.Array) -> bool:
  """Whether a pool's pages are what the kernel reads: a power of two of tokens that fit, by not too many queries."""
  S, (*_, n, H) = jax.tree.leaves(pool.value_PKSH)[0].shape[2], query_RKnH.shape
  fits = S * H * query_RKnH.dtype.itemsize <= _MOST_BYTES and pool.readers.reader_PG.shape[1] * n <= _MOST_ROWS
  return fits and S >= _LEAST_ROWS and S & (S - 1) == 0


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))  # traced once for all layers
def paged(
  query_RNH: jax.Array,
  key_RKH: jax.Array,
  value_RKH: jax.Array,
  place_R: jax.Array,
  pools: Sequence[Pool],
  rule: Rule,
  window: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `attention.paged` → [R, N, H], where `kernels.by_pages` says so; `interpret` runs it anywhere, slowly."""
  R, N, H = query_RNH.shape
  K = key_RKH.shape[1]
  query_RKnH = query_RNH.reshape(R, K, N // K, H)
  parts: list[jax.Array] = []
  for pool in pools:
    read = functools.partial(_read, interpret=interpret) if suits(pool, query_RKnH) else attention.read_pages
    parts += read(query_RKnH, place_R, pool, rule, window)
  entries = [pool.readers.entry_RJ for pool in pools]
  join = functools.partial(_join_head, rule=rule, pools=len(pools), group=N // K)
  head = pl.BlockSpec((None, None, H), lambda r, h: (r, h, 0))
  of_key = pl.BlockSpec((None, None, H), lambda r, h: (r, h // (N // K), 0))
  whole = [pl.BlockSpec(memory_space=pl.ANY)] * (len(entries) + len(parts))
  return pl.pallas_call(
    join,
    grid=(R, N),
    in_specs=[head, of_key, of_key, *whole],
    out_specs=head,
    out_shape=jax.ShapeDtypeStruct((R, N, H), query_RNH.dtype),
    compiler_params=triton.CompilerParams(num_warps=2, num_stages=1),
    interpret=interpret,
    name="join_pages",
  )(query_RNH, key_RKH, value_RKH, *entries, *parts)


def _read(
  query_RKnH: jax.Array, place_R: jax.Array, pool: Pool, rule: Rule, window: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As `attention.read_pages`."""
  R, K, n, H = query_RKnH.shape
  (P, G), S = pool.readers.reader_PG.shape, jax.tree.leaves(pool.value_PKSH)[0].shape[2]
  page = lambda *sizes: pl.BlockSpec((None, None, *sizes), lambda p, k: (p, k, 0, 0))
  tiles, specs = [pool.key_PKHS, pool.value_PKSH], [page(H, S), page(S, H)]
  if isinstance(pool.key_PKHS, Int8):
    tiles, specs = jax.tree.leaves(tiles), [page(H, S), page(1, S), page(S, H), page(S, 1)]
  whole = [pl.BlockSpec(memory_space=pl.ANY)] * 6
  sizes = ((P, K, G * n), (P, K, G * n), (P, K, G * n, H))
  return pl.pallas_call(
    functools.partial(_read_page, rule=rule, heads=n),
    grid=(P, K),
    in_specs=[*whole, *specs],
    out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 3,
    out_shape=[jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="read_pages",
  )(query_RKnH.reshape(R * K * n, H), place_R, window[None], *pool.readers[:3], *tiles)


def _read_page(*refs: Any, rule: Rule, heads: int) -> None:
  """Page p, key head k, for all readers: `attention.read_pages`, a page of it."""
  query_ref, place_ref, window_ref, reader_ref, start_ref, end_ref, *tiles, highest_ref, total_ref, read_ref = refs
  p, k, K = pl.program_id(0), pl.program_id(1), highest_ref.shape[1]
  X, (S, H) = highest_ref.shape[2], tiles[-1 if len(tiles) == 2 else -2].shape

  @pl.when(start_ref[p] < end_ref[p])
  def _() -> None:
    # The page first: it is what takes long, and nothing that it waits for.
    key_HS, value_SH, key_scale_1S, value_scale_1S = _tiles(tiles)
    x, h = jnp.arange(pl.next_power_of_2(max(X, _LEAST_ROWS))), jnp.arange(H)
    reader_X = triton.load(reader_ref.at[p, x // heads], mask=x < X, other=0)
    place_X, query_X = place_ref[reader_X], (reader_X * K + k) * heads + x % heads
    query_XH = query_ref[query_X[:, None], h[None]]
    logits_XS = triton.dot(query_XH, key_HS.astype(query_XH.dtype), precision=_EXACT) * (rule.scale * key_scale_1S)
    place_S = start_ref[p] + jnp.arange(S)
    age_XS = place_X[:, None] - place_S[None]
    seen_XS = (age_XS > 0) & (age_XS < window_ref[0]) & (place_S < end_ref[p])[None]
    logits_XS = jnp.where(seen_XS, softcap(logits_XS, rule.softcap), _LEAST)
    highest_X = jnp.max(logits_XS, 1)
    weight_XS = jnp.where(seen_XS, jnp.exp(logits_XS - highest_X[:, None]), 0)
    scaled_XS = (weight_XS * value_scale_1S).astype(query_XH.dtype)
    read_XH = triton.dot(scaled_XS, value_SH.astype(query_XH.dtype), precision=_EXACT)
    there_X = x < X
    triton.store(highest_ref.at[p, k, x], highest_X, mask=there_X)
    triton.store(total_ref.at[p, k, x], jnp.sum(weight_XS, 1), mask=there_X)
    triton.store(read_ref.at[p, k, x[:, None], h[None]], read_XH, mask=there_X[:, None])


def _tiles(tiles: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
  """Keys and values of a page, and what products with them are to be scaled by."""
  if len(tiles) == 2:
    return tiles[0][...], tiles[1][...], 1.0, 1.0
  key_HS, key_scale_1S, value_SH, value_scale_S1 = (tile[...] for tile in tiles)
  return key_HS, value_SH, key_scale_1S, value_scale_S1.reshape(1, -1)


def _join_head(query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any, rule: Rule, pools: int, group: int) -> None:
  """Row r, query head h: the new token itself, and what each of its pages gave it."""
  output_ref = refs[-1]
  r, head, H = pl.program_id(0), pl.program_id(1), query_ref.shape[0]
  blocks = []
  for number, entry_ref in enumerate(refs[:pools]):
    J, given = entry_ref.shape[1], refs[pools + 3 * number : pools + 3 * number + 3]
    size = min(_JOINED, pl.next_power_of_2(J))
    for first in range(0, J, size):
      j = first + jnp.arange(size)
      entry_j = triton.load(entry_ref.at[r, j], mask=j < J, other=-1)
      blocks.append(functools.partial(_given, given, entry_j, head, group, H))
  own = jnp.sum(query_ref[...].astype(jnp.float32) * key_ref[...].astype(jnp.float32)) * rule.scale
  highest, total, output_H = softcap(own, rule.softcap), jnp.float32(1), value_ref[...].astype(jnp.float32)
  ahead = blocks[0]()
  for following in (*blocks[1:], None):  # the next is on its way before this one is waited for
    (highest_j, total_j, read_jH), ahead = ahead, following() if following else ahead
    higher = jnp.maximum(highest, jnp.max(highest_j))
    before, weight_j = jnp.exp(highest - higher), jnp.exp(highest_j - higher)
    total = before * total + jnp.sum(weight_j * total_j)
    highest, output_H = higher, before * output_H + jnp.sum(weight_j[:, None] * read_jH, 0)
  output_ref[...] = (output_H / total).astype(output_ref.dtype)


def _given(
  refs: Sequence[Any], entry_j: jax.Array, head: jax.Array, group: int, H: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What some pages gave a query head; of what is no page, nothing."""
  highest_ref, total_ref, read_ref = refs
  readers, there_j = highest_ref.shape[2] // group, entry_j >= 0
  entry_j = jnp.maximum(entry_j, 0)
  at_j = (entry_j // readers, head // group, entry_j % readers * group + head % group)
  at_jH = (at_j[0][:, None], at_j[1], at_j[2][:, None], jnp.arange(H)[None])
  highest_j = triton.load(highest_ref.at[at_j], mask=there_j, other=_LEAST)
  total_j = triton.load(total_ref.at[at_j], mask=there_j, other=0.0)
  return highest_j, total_j, triton.load(read_ref.at[at_jH], mask=there_j[:, None], other=0.0)

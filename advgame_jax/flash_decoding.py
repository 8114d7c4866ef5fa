"""`attention.paged` and `caches.write` as kernels for GPUs.

Flash decoding (2311.01282) in Pallas: a program for each page and key head, which says what the page gives its readers,
then one for each row and query head, which joins what its pages gave. What XLA does in twenty small kernels a layer,
mostly waiting for each other, these do in two; what it writes into pages by two a layer, one does for many layers.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from advgame_jax import attention, caches
from advgame_jax.attention import Pool
from advgame_jax.blockwise import Rule, softcap
from advgame_jax.caches import Cache, Kept
from advgame_jax.matrices import Int8

_LEAST = float(jnp.finfo(jnp.float32).min)
_LEAST_ROWS = 16  # of a product on tensor cores
_MOST_ROWS = 128  # of queries of a page: those of more readers are a product for XLA
_MOST_BYTES = 32 * 2**10  # of a page's keys: they and its values lie in a multiprocessor's shared memory
_JOINED = 32  # pages that are joined at a time
_LAYERS_A_LAUNCH = 16  # a branch for each, and three pointers for each of its arrays, of at most 4 KiB
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
  by_kernel, plainly = list[Pool](), list[Pool]()
  for pool in pools:
    (by_kernel if suits(pool, query_RKnH) else plainly).append(pool)
  pools = [*by_kernel, *plainly]
  given = _read(query_RKnH, place_R, by_kernel, rule, window, interpret=interpret) if by_kernel else []
  given += [attention.read_pages(query_RKnH, place_R, pool, rule, window) for pool in plainly]
  parts = list(itertools.chain(*given))
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
  query_RKnH: jax.Array, place_R: jax.Array, pools: Sequence[Pool], rule: Rule, window: jax.Array, *, interpret: bool
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
  """As `attention.read_pages` of each pool, in one launch: small pools are read beside large ones."""
  (R, K, n, H), anywhere = query_RKnH.shape, pl.BlockSpec(memory_space=pl.ANY)
  arrays: list[jax.Array] = []
  specs: list[pl.BlockSpec] = []
  sizes: list[tuple[int, ...]] = []
  spans: list[_Span] = []
  first = 0
  for pool in pools:
    (P, G), S = pool.readers.reader_PG.shape, jax.tree.leaves(pool.value_PKSH)[0].shape[2]
    page = functools.partial(_page, first, P)
    tiles, of_tiles = jax.tree.leaves([pool.key_PKHS, pool.value_PKSH]), [page(H, S), page(S, H)]
    if isinstance(pool.key_PKHS, Int8):
      of_tiles = [page(H, S), page(1, S), page(S, H), page(S, 1)]
    arrays, specs = [*arrays, *pool.readers[:3], *tiles], [*specs, *[anywhere] * 3, *of_tiles]
    sizes += [(P, K, G * n), (P, K, G * n), (P, K, G * n, H)]
    spans.append(_Span(first, P, 3 + len(tiles)))
    first += P
  given = pl.pallas_call(
    functools.partial(_read_pages, rule=rule, heads=n, spans=spans),
    grid=(first, K),
    in_specs=[*[anywhere] * 3, *specs],
    out_specs=[anywhere] * len(sizes),
    out_shape=[jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="read_pages",
  )(query_RKnH.reshape(R * K * n, H), place_R, window[None], *arrays)
  return list(zip(given[::3], given[1::3], given[2::3]))


class _Span(NamedTuple):
  """A pool among the programs of a launch."""

  first: int
  pages: int
  inputs: int  # references


def _page(first: int, pages: int, *sizes: int) -> pl.BlockSpec:
  """Of the pool whose pages programs read from `first` on; of programs of others any."""
  return pl.BlockSpec((None, None, *sizes), lambda p, k: (jnp.clip(p - first, 0, pages - 1), k, 0, 0))


def _read_pages(*refs: Any, rule: Rule, heads: int, spans: Sequence[_Span]) -> None:
  """A page of one of the pools."""
  shared, inputs, outputs = refs[:3], refs[3 : -3 * len(spans)], refs[-3 * len(spans) :]
  for span in spans:
    p, k = pl.program_id(0) - span.first, pl.program_id(1)
    of_pool = (*shared, *inputs[: span.inputs], *outputs[:3])
    inputs, outputs = inputs[span.inputs :], outputs[3:]
    pl.when((p >= 0) & (p < span.pages))(functools.partial(_read_page, p, k, *of_pool, rule=rule, heads=heads))


def _read_page(p: jax.Array, k: jax.Array, *refs: Any, rule: Rule, heads: int) -> None:
  """Page p of a pool, key head k, for all readers: `attention.read_pages`, a page of it."""
  query_ref, place_ref, window_ref, reader_ref, start_ref, end_ref, *tiles, highest_ref, total_ref, read_ref = refs
  K, X = highest_ref.shape[1:]
  S, H = tiles[-1 if len(tiles) == 2 else -2].shape

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


def write(
  pool: Sequence[Cache],
  new: Sequence[Kept],
  page_R: jax.Array,
  slot_R: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[Cache, ...]:
  """As `caches.write`, of layers one by one: in place, unless the program still reads the pool as it was."""
  written: list[Cache] = []
  for first in range(0, len(pool), _LAYERS_A_LAUNCH):
    layers = pool[first : first + _LAYERS_A_LAUNCH]
    tokens = [_token(caches.cache_of(kept), cache) for kept, cache in zip(new[first:], layers)]
    arrays, tree = jax.tree.flatten(layers)
    new_RKX = [x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(tokens)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    put = pl.pallas_call(
      functools.partial(_write_token, each=len(arrays) // len(layers)),
      grid=(len(layers), *new_RKX[0].shape[:2]),
      in_specs=[anywhere] * (2 + 2 * len(arrays)),
      out_specs=[anywhere] * len(arrays),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
      input_output_aliases={2 + len(arrays) + i: i for i in range(len(arrays))},
      compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
      interpret=interpret,
      name="write_tokens",
    )
    written += jax.tree.unflatten(tree, put(page_R, slot_R, *new_RKX, *arrays))
  return tuple(written)


def _token(new: Cache, pool: Cache) -> Cache:
  """As `caches.for_pool`, except that values may be infinite or NaN: the kernel replaces those, where XLA would need a
  launch for each layer.
  """
  return caches.for_pool(new, pool) if isinstance(pool.key_RKHS, Int8) else new


def _write_token(page_ref: Any, slot_ref: Any, *refs: Any, each: int) -> None:
  """Layer l, row r, key head k. `each`: arrays of a layer, the first half of keys."""
  l, r, k = (pl.program_id(axis) for axis in range(3))
  page, slot = page_ref[r], slot_ref[r]
  count = len(refs) // 3
  pairs = list(zip(refs[:count], refs[2 * count :]))  # between them is the pool as it was, the same memory
  there = (page >= 0) & (page < refs[-1].shape[0])
  for number, first in enumerate(range(0, count, each)):

    @pl.when(there & (l == number))
    def _(first: int = first) -> None:
      for array, (new_ref, pool_ref) in enumerate(pairs[first : first + each]):
        x = jnp.arange(new_ref.shape[2])
        new_X = triton.load(new_ref.at[r, k, x])
        if array < each // 2:
          triton.store(pool_ref.at[page, k, x, slot], new_X.astype(pool_ref.dtype))
        else:
          triton.store(pool_ref.at[page, k, slot, x], attention.finite(new_X).astype(pool_ref.dtype))

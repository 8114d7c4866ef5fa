"""Attention: of whole rows to themselves, of rows behind a text that they share, and of one new token to the pages of a
pool.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from advgame_jax import blockwise, cpu, kernels
from advgame_jax.blockwise import ATTENDED
from advgame_jax.blockwise import Rule as Rule
from advgame_jax.blockwise import softcap as softcap
from advgame_jax.matrices import Int8, apart
from advgame_jax.sharding import LOCAL, Layout

CONTINUED_BLOCK = 32  # queries of a block: its logits are to stay in the caches


def causal(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  rule: Rule,
  *,
  implementation: str = "auto",
  segment_RT: jax.Array | None = None,
  layout: Layout = LOCAL,
) -> jax.Array:
  """Each token attends to itself and what came before, by the rule, softmax in float32 → [R, T, N, H].

  Query head n reads key head n // (N / K). Rows are padded on the right, which needs no mask: padding is every token's
  future.

  Args:
    implementation: a `kernels.Implementation`; "auto" is resolved for the default backend.
    segment_RT: int32; a token attends only within its own segment of a packed row.
    layout: how rows and heads lie on the mesh; only a kernel that XLA cannot split ("splash") reads it.

  Raises:
    UserError: the implementation cannot do this; `kernels.resolve` says so before anything is traced.
  """
  H, packed = query_RTNH.shape[-1], segment_RT is not None
  platform, dtype = jax.default_backend(), query_RTNH.dtype
  chosen = kernels.resolve(implementation, rule, platform, head_size=H, dtype=dtype, packed=packed)
  if chosen == "splash":
    return kernels.splash(query_RTNH, key_RTKH, value_RTKH, rule, segment_RT, layout=layout)
  if chosen == "cudnn":
    return kernels.cudnn(query_RTNH, key_RTKH, value_RTKH, rule)
  if packed:
    # A row that is not finite stays so by its own queries, and spoils no other segment.
    value_RTKH = finite(value_RTKH)
  plain = lambda query, key, value, segment: blockwise.causal(query, key, value, rule, segment)
  how: dict[str, Any] = dataclasses.asdict(rule)
  kernel, slopes = functools.partial(cpu.causal, **how), functools.partial(cpu.causal_slopes, **how)
  fits = cpu.attends(query_RTNH, key_RTKH, value_RTKH)
  read_RTNH = cpu.either(fits, kernel, plain, slopes)(query_RTNH, key_RTKH, value_RTKH, segment_RT)
  return checkpoint_name(read_RTNH, ATTENDED) if fits else read_RTNH  # else `blockwise` has named it


def keys_of_cache(key_RTKH: jax.Array) -> jax.Array:
  """[R, T, K, H] → [R, K, H, T], as caches hold them: products of few queries with them need not turn them."""
  return key_RTKH.transpose(0, 2, 3, 1)


def finite(x: jax.Array) -> jax.Array:
  """0 in the place of what is not finite: what a row does not see has weight 0, and 0 × NaN is NaN."""
  return jnp.where(jnp.isfinite(x), x, 0)


class Segment(NamedTuple):
  """Keys that Q groups of consecutive rows attend to; R must be a multiple of Q."""

  key_QKHS: jax.Array
  value_QKSH: jax.Array
  mask_QgTS: jax.Array  # bool; Q, g = R / Q and T may be 1


def continued(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  prefix: "Segment",
  place_RT: jax.Array,
  rule: Rule,
  window: jax.Array,
  segment_RT: jax.Array | None = None,
) -> jax.Array:
  """`causal` for rows that all continue one text, whose keys are there once for R/Q rows → [R, T, N, H].

  Queries go through in blocks, so that no array of tokens × tokens exists.

  Args:
    prefix: its mask [Q, 1, 1, S] says which slots hold a token.
    place_RT: int32, the prefix counted.
    window: int32, tokens; it takes the place of the rule's.
    segment_RT: as in `causal`.
  """
  R, T, N, H = query_RTNH.shape
  Q, S = prefix.key_QKHS.shape[::3]
  t = min(T, CONTINUED_BLOCK)
  key_RKHT, value_RKTH = keys_of_cache(key_RTKH), value_RTKH.swapaxes(1, 2)
  segment_RT = jnp.zeros((R, T), jnp.int32) if segment_RT is None else segment_RT

  def in_blocks(x_RT: jax.Array) -> jax.Array:
    padded_RT = jnp.pad(x_RT, ((0, 0), (0, -T % t), *((0, 0),) * (x_RT.ndim - 2)))
    return padded_RT.reshape(R, -1, t, *x_RT.shape[2:]).swapaxes(0, 1)

  def block(inputs: tuple[jax.Array, ...]) -> jax.Array:
    start, query_RtNH, place_Rt, segment_Rt = inputs
    age_tT = start + jnp.arange(t)[:, None] - jnp.arange(T)
    own_RtT = (age_tT >= 0) & (age_tT < window) & (segment_Rt[:, :, None] == segment_RT[:, None])
    near_QgtS = (place_Rt[:, :, None] - jnp.arange(S) < window).reshape(Q, R // Q, t, S)
    before = prefix._replace(mask_QgTS=prefix.mask_QgTS & near_QgtS)
    return attend(query_RtNH, [before, Segment(key_RKHT, finite(value_RKTH), own_RtT[:, None])], rule)

  starts = jnp.arange(0, T, t)
  read_XRtNH = jax.lax.map(block, (starts, *map(in_blocks, (query_RTNH, place_RT, segment_RT))))
  return read_XRtNH.swapaxes(0, 1).reshape(R, -1, N, H)[:, :T]


def attend(query_RTNH: jax.Array, segments: Sequence[Segment], rule: Rule) -> jax.Array:
  """Softmax attention over the segments' union, grouped queries, logits in float32 → [R, T, N, H].

  The rule gives scale and softcap; its window is the caller's, in the masks.
  Each segment costs one matrix product per (group, key head), all its queries as the rows of one matrix; the softmax
  runs over all segments by their common maximum, so that nothing is concatenated.
  """
  R, T, N, H = query_RTNH.shape
  K = segments[0].key_QKHS.shape[1]
  logits = [_logits(query_RTNH, segment, rule) for segment in segments]
  highest_RKTn1 = jnp.max(jnp.stack([jnp.max(part, -1, keepdims=True) for part in logits]), 0)
  total_RKTn1, output_RKTnH = jnp.zeros_like(highest_RKTn1), jnp.zeros((R, K, T, N // K, H), jnp.float32)
  for part_RKTnS, segment in zip(logits, segments):
    weight_RKTnS = jnp.exp(part_RKTnS - highest_RKTn1)
    total_RKTn1 += jnp.sum(weight_RKTnS, -1, keepdims=True)
    output_RKTnH += _weighted(weight_RKTnS, segment)
  output_RTKnH = (output_RKTnH / total_RKTn1).swapaxes(1, 2)
  return output_RTKnH.reshape(R, T, N, H).astype(query_RTNH.dtype)


def _logits(query_RTNH: jax.Array, segment: Segment, rule: Rule) -> jax.Array:
  R, T, N, H = query_RTNH.shape
  Q, K, _, S = segment.key_QKHS.shape
  g, n = R // Q, N // K
  query_QKgTnH = query_RTNH.reshape(Q, g, T, K, n, H).transpose(0, 3, 1, 2, 4, 5)
  logits_QKXS = jnp.einsum(
    "QKXH,QKHS->QKXS",
    query_QKgTnH.reshape(Q, K, g * T * n, H),
    segment.key_QKHS,
    preferred_element_type=jnp.float32,
  )
  logits_QKXS = softcap(logits_QKXS * rule.scale, rule.softcap)
  # The least float, not −inf: a row that sees nothing (padding) stays finite.
  logits_QKgTnS = jnp.where(
    segment.mask_QgTS[:, None, :, :, None, :], logits_QKXS.reshape(Q, K, g, T, n, S), jnp.finfo(jnp.float32).min
  )
  return logits_QKgTnS.swapaxes(1, 2).reshape(R, K, T, n, S)


def _weighted(weight_RKTnS: jax.Array, segment: Segment) -> jax.Array:
  R, K, T, n, S = weight_RKTnS.shape
  Q, _, _, H = segment.value_QKSH.shape
  g = R // Q
  weight_QKXS = weight_RKTnS.reshape(Q, g, K, T * n, S).swapaxes(1, 2).reshape(Q, K, g * T * n, S)
  output_QKXH = jnp.einsum(
    "QKXS,QKSH->QKXH",
    weight_QKXS.astype(segment.value_QKSH.dtype),
    segment.value_QKSH,
    preferred_element_type=jnp.float32,
  )
  return output_QKXH.reshape(Q, K, g, T * n, H).swapaxes(1, 2).reshape(R, K, T, n, H)


class Index(NamedTuple):
  """Who reads the pages of a pool. A page holds S consecutive tokens of one text, and G rows may read it.

  A page that does not start before its end is nobody's, and need not be read.
  """

  reader_PG: jax.Array  # int32, rows; what is nobody's holds any
  start_P: jax.Array  # int32, the place of the page's first token
  end_P: jax.Array  # int32, the place behind its text's last token
  entry_RJ: jax.Array  # int32, g + G·p for each page p whose reader g a row is, in any order; −1 where there is no more


class Pool(NamedTuple):
  """P pages of one layer's keys and values."""

  key_PKHS: jax.Array | Int8
  value_PKSH: jax.Array | Int8
  readers: Index


def paged(
  query_RNH: jax.Array,
  key_RKH: jax.Array,
  value_RKH: jax.Array,
  place_R: jax.Array,
  pools: Sequence[Pool],
  rule: Rule,
  window: jax.Array,
) -> jax.Array:
  """Attention of one new token a row to itself and to the pages that the row reads → [R, N, H].

  Each page is read once, for all its readers, and gives its own softmax; a row's softmaxes are joined by their maxima
  and sums (flash decoding, 2311.01282). The cost is that of the pages there are, not of rows × the longest of them, and
  what a row gets does not depend on where in the pool its pages lie.

  Args:
    place_R: int32, of the new token.
    window: int32, tokens; it takes the place of the rule's.
  """

  def kernel(query_RNH: Any, key_RKH: Any, value_RKH: Any, place_R: Any, pools: Any, window: Any) -> jax.Array:
    new, pages = (query_RNH, key_RKH, value_RKH, place_R), [_pages(pool) for pool in pools]
    return cpu.paged(*new, pages, window, scale=rule.scale, softcap=rule.softcap)

  fits = cpu.reads(query_RNH, [pool[:2] for pool in pools], key_RKH, value_RKH)
  read = cpu.either(fits, kernel, functools.partial(_paged, rule))
  return read(query_RNH, key_RKH, value_RKH, place_R, pools, window)


def _paged(
  rule: Rule,
  query_RNH: jax.Array,
  key_RKH: jax.Array,
  value_RKH: jax.Array,
  place_R: jax.Array,
  pools: Sequence[Pool],
  window: jax.Array,
) -> jax.Array:
  R, N, H = query_RNH.shape
  K = key_RKH.shape[1]
  query_RKnH = query_RNH.reshape(R, K, N // K, H)
  own_RKn = jnp.einsum("RKnH,RKH->RKn", query_RKnH, key_RKH, preferred_element_type=jnp.float32)
  own_RKn = softcap(own_RKn * rule.scale, rule.softcap)
  # The new token itself: one key that is always seen.
  itself_RKnH = jnp.broadcast_to(value_RKH[:, :, None].astype(jnp.float32), query_RKnH.shape)
  parts: list[Sequence[jax.Array]] = [
    (own_RKn[..., None], jnp.ones_like(own_RKn)[..., None], itself_RKnH[..., None, :])
  ]
  parts += [_of_rows(pool.readers, read_pages(query_RKnH, place_R, pool, rule, window)) for pool in pools]
  highest_RKn1 = functools.reduce(jnp.maximum, (jnp.max(part[0], -1, keepdims=True) for part in parts))
  total_RKn, output_RKnH = jnp.zeros_like(own_RKn), jnp.zeros_like(itself_RKnH)
  for highest_RKnJ, total_RKnJ, read_RKnJH in parts:
    weight_RKnJ = jnp.exp(highest_RKnJ - highest_RKn1)
    total_RKn += jnp.sum(weight_RKnJ * total_RKnJ, -1)
    output_RKnH += jnp.einsum("RKnJ,RKnJH->RKnH", weight_RKnJ, read_RKnJH, precision=jax.lax.Precision.HIGHEST)
  return (output_RKnH / total_RKn[..., None]).reshape(R, N, H).astype(query_RNH.dtype)


def _pages(pool: Pool) -> cpu.Pages:
  index = pool.readers
  page_RJ = jnp.where(index.entry_RJ < 0, -1, index.entry_RJ // index.reader_PG.shape[1])
  return cpu.Pages(pool.key_PKHS, pool.value_PKSH, index.start_P, index.end_P, page_RJ)  # type: ignore[arg-type]


def read_pages(
  query_RKnH: jax.Array, place_R: jax.Array, pool: Pool, rule: Rule, window: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of each page and reader: the greatest logit, the sum of exp(logit − greatest), and the values weighted by those."""
  # The wider of both; eight bits take the queries'.
  dtype = jnp.promote_types(query_RKnH.dtype, jax.tree.leaves(pool.key_PKHS)[0].dtype)
  key_PKHS, key_scale_PK1S = apart(pool.key_PKHS, dtype)
  value_PKSH, value_scale_PKS1 = apart(pool.value_PKSH, dtype)
  index = pool.readers
  (P, G), (_, K, H, S), n = index.reader_PG.shape, key_PKHS.shape, query_RKnH.shape[2]
  query_PKXH = query_RKnH.astype(dtype)[index.reader_PG].swapaxes(1, 2).reshape(P, K, G * n, H)
  logits_PKXS = jnp.einsum("PKXH,PKHS->PKXS", query_PKXH, key_PKHS, preferred_element_type=jnp.float32)
  place_PS = index.start_P[:, None] + jnp.arange(S)
  age_PGS = place_R[index.reader_PG][:, :, None] - place_PS[:, None]
  seen_PGS = (age_PGS > 0) & (age_PGS < window) & (place_PS < index.end_P[:, None])[:, None]
  seen_PKXS = jnp.broadcast_to(seen_PGS[:, None, :, None], (P, 1, G, n, S)).reshape(P, 1, G * n, S)
  # The least float, not −inf: a page of which nothing is seen stays finite, and weighs nothing beside the row itself.
  logits_PKXS = softcap(logits_PKXS * (rule.scale * key_scale_PK1S), rule.softcap)
  logits_PKXS = jnp.where(seen_PKXS, logits_PKXS, jnp.finfo(jnp.float32).min)
  highest_PKX = jnp.max(logits_PKXS, -1)
  weight_PKXS = jnp.where(seen_PKXS, jnp.exp(logits_PKXS - highest_PKX[..., None]), 0)
  scaled_PKXS = (weight_PKXS * value_scale_PKS1.swapaxes(2, 3)).astype(value_PKSH.dtype)
  read_PKXH = jnp.einsum("PKXS,PKSH->PKXH", scaled_PKXS, value_PKSH, preferred_element_type=jnp.float32)
  return highest_PKX, jnp.sum(weight_PKXS, -1), read_PKXH


def _of_rows(index: Index, of_pages: Sequence[jax.Array]) -> Sequence[jax.Array]:
  """[P, K, G·n, …] of the pages → [R, K, n, J, …] of each row's, weightless where it has no more."""
  P, G = index.reader_PG.shape

  def take(x_PKX: jax.Array, nothing: float) -> jax.Array:
    K, X, *rest = x_PKX.shape[1:]
    x_PGKn = x_PKX.reshape(P, K, G, X // G, *rest).swapaxes(1, 2).reshape(P * G, K, X // G, *rest)
    there_RJ = (index.entry_RJ >= 0).reshape(*index.entry_RJ.shape, *(1,) * (x_PGKn.ndim - 1))
    return jnp.moveaxis(jnp.where(there_RJ, x_PGKn[jnp.maximum(index.entry_RJ, 0)], nothing), 1, 3)

  nothing = (float(jnp.finfo(jnp.float32).min), 0.0, 0.0)
  return [take(x_PKX, value) for x_PKX, value in zip(of_pages, nothing)]

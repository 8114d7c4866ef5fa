"""Attention: of whole rows to themselves (training, prefill), and over segments of keys that rows may share (decoding).

A segment is keys, values and a mask: the prompt that all samples of a group share, held once, and the row's own new
tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import blockwise, kernels
from advgame_jax.blockwise import Rule as Rule
from advgame_jax.blockwise import softcap as softcap
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
  return blockwise.causal(query_RTNH, key_RTKH, value_RTKH, rule, segment_RT)


class Segment(NamedTuple):
  """Keys that Q groups of consecutive rows attend to; R must be a multiple of Q."""

  key_QKSH: jax.Array
  value_QKSH: jax.Array
  mask_QgTS: jax.Array  # bool; Q, g = R / Q and T may be 1


def continued(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  prefix: "Segment",
  length: jax.Array,
  rule: Rule,
  window: jax.Array,
) -> jax.Array:
  """`causal` for rows that all continue the same `length` tokens, whose keys are there once → [R, T, N, H].

  Queries go through in blocks, so that no array of tokens × tokens exists.

  Args:
    prefix: its mask [1, 1, 1, S] says which slots hold a token.
    window: int32, tokens; it takes the place of the rule's.
  """
  R, T, N, H = query_RTNH.shape
  t = min(T, CONTINUED_BLOCK)
  key_RKTH, value_RKTH = key_RTKH.swapaxes(1, 2), value_RTKH.swapaxes(1, 2)
  padded_RTNH = jnp.pad(query_RTNH, ((0, 0), (0, -T % t), (0, 0), (0, 0)))
  query_XRtNH = padded_RTNH.reshape(R, -1, t, N, H).swapaxes(0, 1)
  slots, prefix_slots = jnp.arange(T), jnp.arange(prefix.key_QKSH.shape[2])

  def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    start, query_RtNH = inputs
    place_t = start + jnp.arange(t)
    age_tT, prefix_age_tS = place_t[:, None] - slots, length + place_t[:, None] - prefix_slots
    before = prefix._replace(mask_QgTS=prefix.mask_QgTS & (prefix_age_tS < window))
    own = Segment(key_RKTH, value_RKTH, ((age_tT >= 0) & (age_tT < window))[None, None])
    return attend(query_RtNH, [before, own], rule)

  read_XRtNH = jax.lax.map(block, (jnp.arange(0, padded_RTNH.shape[1], t), query_XRtNH))
  return read_XRtNH.swapaxes(0, 1).reshape(R, -1, N, H)[:, :T]


def attend(query_RTNH: jax.Array, segments: Sequence[Segment], rule: Rule) -> jax.Array:
  """Softmax attention over the segments' union, grouped queries, logits in float32 → [R, T, N, H].

  The rule gives scale and softcap; its window is the caller's, in the masks.
  Each segment costs one matrix product per (group, key head), all its queries as the rows of one matrix; the softmax
  runs over all segments by their common maximum, so that nothing is concatenated.
  """
  R, T, N, H = query_RTNH.shape
  K = segments[0].key_QKSH.shape[1]
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
  Q, K, S, _ = segment.key_QKSH.shape
  g, n = R // Q, N // K
  query_QKgTnH = query_RTNH.reshape(Q, g, T, K, n, H).transpose(0, 3, 1, 2, 4, 5)
  logits_QKXS = jnp.einsum(
    "QKXH,QKSH->QKXS",
    query_QKgTnH.reshape(Q, K, g * T * n, H),
    segment.key_QKSH,
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

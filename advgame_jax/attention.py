"""Attention over segments of keys that rows may share.

A segment is keys, values and a mask. Training attends to one segment, a row's own tokens. Decoding attends to several:
the prompt that all samples of a group share, held once, and the row's own new tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
  """What an attention layer computes besides its products."""

  scale: float
  softcap: float = 0.0
  window: int = 0


def softcap(logits: jax.Array, cap: float) -> jax.Array:
  """cap·tanh(logits / cap); 0 is none."""
  return cap * jnp.tanh(logits / cap) if cap else logits


def causal(query_RTNH, key_RTKH, value_RTKH, rule, *, implementation="auto", segment_RT=None):
  slots = jnp.arange(query_RTNH.shape[1])
  age_TS = slots[:, None] - slots
  mask_1TS = ((age_TS >= 0) & (age_TS < (rule.window or len(slots))))[None]
  return attend(query_RTNH, [Segment(key_RTKH.swapaxes(1, 2), value_RTKH.swapaxes(1, 2), mask_1TS)], rule)


class Segment(NamedTuple):
  """Keys that Q groups of consecutive rows attend to; R must be a multiple of Q."""

  key_QKSH: jax.Array
  value_QKSH: jax.Array
  mask_QTS: jax.Array  # bool; Q and T may be 1


def causal_mask(length: int) -> jax.Array:
  """[1, T, S]: a token sees itself and what came before; rows padded on the right need no more."""
  slots = jnp.arange(length)
  return (slots[None, :] <= slots[:, None])[None]


def attend(query_RTNH: jax.Array, segments: Sequence[Segment], rule: Rule) -> jax.Array:
  """Softmax attention over the segments' union, grouped queries, logits in float32 → [R, T, N, H].

  Each segment costs one matrix product per (group, key head), all its queries as the rows of one matrix; the softmax
  runs over all segments by their common maximum, so that nothing is concatenated.
  """
  R, T, N, H = query_RTNH.shape
  K = segments[0].key_QKSH.shape[1]
  scaled = query_RTNH * jnp.asarray(rule.scale, query_RTNH.dtype)
  logits = [_logits(scaled, segment, rule.softcap) for segment in segments]
  highest_RKTn1 = jnp.max(jnp.stack([jnp.max(part, -1, keepdims=True) for part in logits]), 0)
  total_RKTn1, output_RKTnH = jnp.zeros_like(highest_RKTn1), jnp.zeros((R, K, T, N // K, H), jnp.float32)
  for part_RKTnS, segment in zip(logits, segments):
    weight_RKTnS = jnp.exp(part_RKTnS - highest_RKTn1)
    total_RKTn1 += jnp.sum(weight_RKTnS, -1, keepdims=True)
    output_RKTnH += _weighted(weight_RKTnS, segment)
  output_RTKnH = (output_RKTnH / total_RKTn1).swapaxes(1, 2)
  return output_RTKnH.reshape(R, T, N, H).astype(query_RTNH.dtype)


def _logits(query_RTNH: jax.Array, segment: Segment, cap: float) -> jax.Array:
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
  logits_QKXS = softcap(logits_QKXS, cap)
  # The least float, not −inf: a row that sees nothing (padding) stays finite.
  logits_QKgTnS = jnp.where(
    segment.mask_QTS[:, None, None, :, None, :], logits_QKXS.reshape(Q, K, g, T, n, S), jnp.finfo(jnp.float32).min
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

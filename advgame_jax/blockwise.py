"""Causal attention of whole rows, block by block: no array of tokens × tokens exists, forward or backward.

The way of FlashAttention-2 (2307.08691) in plain XLA. One loop runs over the pairs of blocks in which something is
seen; the others are never computed. A block's logits are small enough to be written, masked, exponentiated and read
again without leaving the caches. The backward pass keeps the output and the log-sum-exp, and makes the rest again.

Inside, queries are rows X = (token, query head of the group), so that each product is one of matrices per (R, K): the
axes that are split over devices stay whole. A small letter is the part of a large one that is in one block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"  # what a policy of `jax.checkpoint` may keep, so that attention is not computed again

# (rows of at most so many tokens, tokens of a block): small blocks skip more of the future and stay in the caches,
# large ones feed the products better. Measured by benchmarks/attention.py.
BLOCKS = ((256, 64), (1024, 128))
LARGEST_BLOCK = 256
_LEAST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What an attention layer computes besides its products."""

  scale: float  # of the logits
  softcap: float = 0.0  # logits → c·tanh(logits / c); 0 is none
  window: int = 0  # tokens: one sees itself and the window − 1 before it; 0 is all of them


def softcap(logits: jax.Array, cap: float) -> jax.Array:
  """cap·tanh(logits / cap); 0 is none."""
  return cap * jnp.tanh(logits / cap) if cap else logits


def causal(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  rule: Rule,
  segment_RT: jax.Array | None = None,
  *,
  block: int = 0,
) -> jax.Array:
  """As `attention.causal`, in blocks of at most `block` tokens → [R, T, N, H]. Differentiable once, in reverse.

  Block 0 takes the size that suits the length.
  """
  R, T, N, H = query_RTNH.shape
  K = key_RTKH.shape[2]
  block = block or next((size for most, size in BLOCKS if most >= T), LARGEST_BLOCK)
  blocks = -(-T // block)
  size = T if blocks == 1 else -(-T // (16 * blocks)) * 16
  # What pads the last block lies in every token's future, and in the last one's segment: it meets no others than that.
  pad = lambda x, **how: jnp.pad(x, ((0, 0), (0, blocks * size - T), *((0, 0),) * (x.ndim - 2)), **how)
  query_RKTnH = pad(query_RTNH).reshape(R, -1, K, N // K, H).swapaxes(1, 2)
  key_RKSH, value_RKSH = pad(key_RTKH).swapaxes(1, 2), pad(value_RTKH).swapaxes(1, 2)
  segment_RS = None if segment_RT is None else pad(segment_RT, mode="edge")
  output_RKXH = _attention(rule, size, query_RKTnH.reshape(R, K, -1, H), key_RKSH, value_RKSH, segment_RS)
  return output_RKXH.reshape(query_RKTnH.shape).swapaxes(1, 2).reshape(R, -1, N, H)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
  rule: Rule,
  size: int,
  query_RKXH: jax.Array,
  key_RKSH: jax.Array,
  value_RKSH: jax.Array,
  segment_RS: jax.Array | None,
) -> jax.Array:
  return _forward(rule, size, query_RKXH, key_RKSH, value_RKSH, segment_RS)[0]


def _forward(
  rule: Rule,
  size: int,
  query_RKXH: jax.Array,
  key_RKSH: jax.Array,
  value_RKSH: jax.Array,
  segment_RS: jax.Array | None,
) -> tuple[jax.Array, Any]:
  x_size = size * query_RKXH.shape[2] // key_RKSH.shape[2]

  def step(parts: tuple[jax.Array, ...], i: Any, j: Any) -> tuple[jax.Array, ...]:
    highest_RKx, total_RKx, output_RKxH = parts
    capped_RKxs, seen = _logits(rule, size, query_RKXH, key_RKSH, segment_RS, i, j)
    logits_RKxs = jnp.where(seen, capped_RKxs, _LEAST)
    new_highest_RKx = jnp.maximum(highest_RKx, jnp.max(logits_RKxs, -1))
    weight_RKxs = jnp.exp(logits_RKxs - new_highest_RKx[..., None])
    shrink_RKx = jnp.exp(highest_RKx - new_highest_RKx)
    total_RKx = total_RKx * shrink_RKx + jnp.sum(weight_RKxs, -1)
    read_RKxH = _dot("RKxs,RKsH->RKxH", weight_RKxs.astype(value_RKSH.dtype), _read(value_RKSH, j, size))
    return new_highest_RKx, total_RKx, output_RKxH * shrink_RKx[..., None] + read_RKxH

  places = lambda i, j: ((i, x_size),) * 3
  empty_RKX = jnp.zeros(query_RKXH.shape[:3])
  carry = (empty_RKX + _LEAST, empty_RKX, jnp.zeros(query_RKXH.shape))
  highest_RKX, total_RKX, output_RKXH = _over_pairs(rule, size, key_RKSH.shape[2], step, places, carry, segment_RS)
  output_RKXH = (output_RKXH / total_RKX[..., None]).astype(query_RKXH.dtype)
  output_RKXH, log_total_RKX = checkpoint_name((output_RKXH, highest_RKX + jnp.log(total_RKX)), ATTENDED)
  kept = (query_RKXH, key_RKSH, value_RKSH, segment_RS, output_RKXH, log_total_RKX)
  return output_RKXH, kept


def _backward(rule: Rule, size: int, kept: Any, slope_RKXH: jax.Array) -> tuple[jax.Array | None, ...]:
  query_RKXH, key_RKSH, value_RKSH, segment_RS, output_RKXH, log_total_RKX = kept
  x_size = size * query_RKXH.shape[2] // key_RKSH.shape[2]
  mean_RKX = jnp.sum(output_RKXH.astype(jnp.float32) * slope_RKXH.astype(jnp.float32), -1)

  def step(parts: tuple[jax.Array, ...], i: Any, j: Any) -> tuple[jax.Array, ...]:
    query_slope_RKxH, key_slope_RKHs, value_slope_RKHs = parts
    slope_RKxH = _read(slope_RKXH, i, x_size)
    capped_RKxs, seen = _logits(rule, size, query_RKXH, key_RKSH, segment_RS, i, j)
    weight_RKxs = jnp.where(seen, jnp.exp(capped_RKxs - _read(log_total_RKX, i, x_size)[..., None]), 0)
    weight_slope_RKxs = _dot("RKxH,RKsH->RKxs", slope_RKxH, _read(value_RKSH, j, size))
    logit_slope_RKxs = weight_RKxs * (weight_slope_RKxs - _read(mean_RKX, i, x_size)[..., None]) * rule.scale
    if rule.softcap:
      logit_slope_RKxs *= 1 - (capped_RKxs / rule.softcap) ** 2
    weight_RKxs, logit_slope_RKxs = (x.astype(query_RKXH.dtype) for x in (weight_RKxs, logit_slope_RKxs))
    query_slope_RKxH += _dot("RKxs,RKsH->RKxH", logit_slope_RKxs, _read(key_RKSH, j, size))
    # Summed as [H, S]: XLA's CPU backend makes these products twice as fast as their transposes.
    key_slope_RKHs += _dot("RKxH,RKxs->RKHs", _read(query_RKXH, i, x_size), logit_slope_RKxs)
    value_slope_RKHs += _dot("RKxH,RKxs->RKHs", slope_RKxH, weight_RKxs)
    return query_slope_RKxH, key_slope_RKHs, value_slope_RKHs

  R, K, S, H = key_RKSH.shape
  places = lambda i, j: ((i, x_size), (j, size, 3), (j, size, 3))
  carry = (jnp.zeros(query_RKXH.shape), jnp.zeros((R, K, H, S)), jnp.zeros((R, K, H, S)))
  query_slope_RKXH, *slopes_RKHS = _over_pairs(rule, size, S, step, places, carry, segment_RS)
  slopes = (query_slope_RKXH, *(x.swapaxes(2, 3) for x in slopes_RKHS))
  return (*(x.astype(query_RKXH.dtype) for x in slopes), None)


_attention.defvjp(_forward, _backward)


def _logits(
  rule: Rule,
  size: int,
  query_RKXH: jax.Array,
  key_RKSH: jax.Array,
  segment_RS: jax.Array | None,
  i: Any,
  j: Any,
) -> tuple[jax.Array, jax.Array]:
  """Scaled and capped logits of query block i and key block j in float32, and which of them are seen."""
  group = query_RKXH.shape[2] // key_RKSH.shape[2]
  query_RKxH, key_RKsH = _read(query_RKXH, i, size * group), _read(key_RKSH, j, size)
  logits_RKxs = softcap(_dot("RKxH,RKsH->RKxs", query_RKxH, key_RKsH) * rule.scale, rule.softcap)
  age_xs = (i - j) * size + (jnp.arange(size * group) // group)[:, None] - jnp.arange(size)
  seen = age_xs >= 0
  if rule.window:
    seen &= age_xs < rule.window
  if segment_RS is not None:
    query_segment_Rx = jnp.repeat(_read(segment_RS, i, size, 1), group, axis=1)
    seen = seen & (query_segment_Rx[:, None, :, None] == _read(segment_RS, j, size, 1)[:, None, None, :])
  return logits_RKxs, seen


def _meet(segment_RS: jax.Array, size: int, pairs_P2: jax.Array) -> jax.Array:
  """Whether blocks of packed rows see anything of each other, [P]: not where their segments' ranges are apart."""
  segment_RbS = segment_RS.reshape(len(segment_RS), -1, size)
  lowest_Rb, highest_Rb = jnp.min(segment_RbS, -1), jnp.max(segment_RbS, -1)
  i_P, j_P = pairs_P2.T
  return jnp.any((lowest_Rb[:, i_P] <= highest_Rb[:, j_P]) & (lowest_Rb[:, j_P] <= highest_Rb[:, i_P]), 0)


def _over_pairs(
  rule: Rule,
  size: int,
  length: int,
  step: Callable[..., Any],
  places: Callable[..., Any],
  carry: tuple[jax.Array, ...],
  segment_RS: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
  """Runs `step(parts, i, j)` over every query block i and key block j that it sees something of.

  A query block meets its own tokens first: from then on its greatest logit is one that is seen.

  Args:
    places: (i, j) → of each array of the carry, which part of it the step takes and gives, as `_read` is told it.
    segment_RS: of packed rows; blocks of which no two segments meet see nothing of each other.
  """

  def in_place(carry: tuple[jax.Array, ...], i: Any, j: Any) -> tuple[jax.Array, ...]:
    parts = step(tuple(_read(x, *place) for x, place in zip(carry, places(i, j))), i, j)
    return tuple(_write(x, part, *place) for x, part, place in zip(carry, parts, places(i, j)))

  oldest = lambda i: max(0, (i * size - rule.window + 1) // size) if rule.window else 0
  pairs = [(i, j) for i in range(length // size) for j in range(i, oldest(i) - 1, -1)]
  if len(pairs) == 1:
    return in_place(carry, 0, 0)
  pairs_P2 = jnp.array(pairs, jnp.int32)
  count: Any = len(pairs)
  if segment_RS is not None:
    # Blocks that meet come first, in their order; the others are never reached.
    meet_P = _meet(segment_RS, size, pairs_P2)
    pairs_P2, count = pairs_P2[jnp.argsort(~meet_P, stable=True)], jnp.sum(meet_P)
  return jax.lax.fori_loop(0, count, lambda n, carry: in_place(carry, *pairs_P2[n]), carry)


def _dot(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _read(x: jax.Array, block: Any, size: int, axis: int = 2) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _write(x: jax.Array, part: jax.Array, block: Any, size: int, axis: int = 2) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, part, block * size, axis)

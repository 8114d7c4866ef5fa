"""Optimisers, weights and moving averages that may be stored in bfloat16: computed in float32, rounded unbiased.

Where everything is stored in float32, each function here is its optax counterpart, bit for bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from advgame_jax import rounding
from advgame_jax.types import Params


class LowPrecisionState(NamedTuple):
  """State of `low_precision`."""

  inner: optax.OptState  # what is shaped like the weights in the low dtype
  step: jax.Array  # int32: number of the next update, from which its draws follow


def adamw(
  rate: optax.ScalarOrSchedule,
  b1: float,
  b2: float,
  *,
  eps: float = 1e-8,
  weight_decay: float,
  mask: Any = None,
  moments: Any = jnp.float32,
  seed: int = 0,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) whose two moments are stored in `moments`."""
  inner = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
  return low_precision(inner, moments, seed)


def low_precision(inner: optax.GradientTransformation, dtype: Any, seed: int) -> optax.GradientTransformation:
  """`inner`, computed in float32, with those parts of its state that are shaped like the weights stored in `dtype`.

  Updates are float32 and the weights may be of either dtype. With float32 the state is `inner`'s own; with bfloat16
  it is stochastically rounded, the draws a function of (seed, number of the update, leaf, element).
  """
  inner = _in_float32(inner)
  if jnp.dtype(dtype) == jnp.float32:
    return inner

  def init(params: Params) -> LowPrecisionState:
    lowered = optax.tree.map_params(inner, lambda x: x.astype(dtype), inner.init(params))
    return LowPrecisionState(lowered, jnp.int32(0))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LowPrecisionState]:
    updates, wide = inner.update(updates, rounding.widen(state.inner), params)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    return updates, LowPrecisionState(rounding.round_tree(wide, state.inner, key), state.step + 1)

  return optax.GradientTransformation(init, update)


def apply_updates(params: Params, updates: Params, key: jax.Array) -> Params:
  """`params + updates` in the dtypes of `params`, rounded stochastically; `key` is consumed."""
  return rounding.round_tree(optax.apply_updates(rounding.widen(params), updates), params, key)


def average(params: Params, ema: Params, decay: float, key: jax.Array) -> Params:
  """`decay · ema + (1 − decay) · params` in the dtypes of `ema`, rounded stochastically; `key` is consumed."""
  wide = optax.incremental_update(rounding.widen(params), rounding.widen(ema), 1 - decay)
  return rounding.round_tree(wide, ema, key)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner`, given float32 weights and gradients whatever theirs are."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return inner.update(rounding.widen(updates), state, rounding.widen(params))

  return optax.GradientTransformation(lambda params: inner.init(rounding.widen(params)), update)

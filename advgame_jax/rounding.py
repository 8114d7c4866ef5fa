"""Stochastic rounding: float32 values kept in bfloat16 whose mean over the draws is the value itself.

Rounding to the nearest loses every step smaller than half the spacing of bfloat16, 2⁻⁸ of a value or less, and that is
every step of fine-tuning: a weight, a moment or an average so kept stands still. Rounded up with the probability of
what would be cut off, the same step arrives on average (Gupta et al. 2015, arXiv:1502.02551).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

_CUT = 16  # bits of a float32 that a bfloat16 does not keep


def stochastic_round(x_X: jax.Array, key: jax.Array, dtype: Any) -> jax.Array:
  """`x_X` in `dtype`; `key` is consumed.

  What `dtype` holds exactly stays, infinities and NaN too; everything else becomes one of its two neighbours, with the
  mean over keys exactly `x_X` (below the largest bfloat16: past it the upper neighbour is infinity). Elementwise and
  free of state, so that it fuses with what made `x_X`, and the bits do not depend on the mesh; `x_X` must be the
  global array, not a shard under `shard_map`.

  Raises:
    ValueError: dtypes other than equal ones, or float32 to bfloat16.
  """
  dtype = jnp.dtype(dtype)
  if x_X.dtype == dtype:
    return x_X
  if (x_X.dtype, dtype) != (jnp.float32, jnp.bfloat16):
    raise ValueError(f"stochastic rounding from {x_X.dtype} to {dtype}; allowed: float32 to bfloat16")
  raised_X = jax.lax.bitcast_convert_type(x_X, jnp.uint32) + _draws(key, x_X.shape)
  kept_X = jax.lax.bitcast_convert_type((raised_X >> _CUT).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x_X), kept_X, x_X.astype(jnp.bfloat16))


def round_tree(tree: Any, like: Any, key: jax.Array) -> Any:
  """Every leaf stochastically rounded to the dtype of its counterpart in `like`, or as it is where they agree.

  Each leaf draws for itself, from `key` (consumed) and its place in the tree.
  """
  leaves, treedef = jax.tree.flatten(tree)
  places = jax.tree.unflatten(treedef, range(len(leaves)))
  return jax.tree.map(
    lambda x, held, i: stochastic_round(x, jax.random.fold_in(key, i), held.dtype), tree, like, places
  )


def widen(tree: Any) -> Any:
  """bfloat16 leaves as float32, others as they are: exact."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def _draws(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """uint32 in [0, 2¹⁶), uniform and independent over keys for each element.

  A bijection of the 32-bit index (MurmurHash3's finaliser, public domain), shifted before and within by words of
  the key: a few integer operations where threefry takes over a hundred and, on CPU, a loop with arrays of its own.
  Elements 2³² apart share their draw.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
  index_X = sum(
    (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride) for axis, stride in enumerate(strides)),
    start=jnp.uint32(0),
  )
  x = index_X ^ first
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) + second
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return (x ^ (x >> 16)) >> (32 - _CUT)

"""The forms a weight matrix may have, and the one product that takes them all."""

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from advgame_jax.types import Params


class Int8(NamedTuple):
  """Numbers in eight bits, `values` × `scale`: a frozen matrix, with a scale for each output (2208.07339 without its
  outliers); or pages of keys or values, with one for each token and head.
  """

  values: jax.Array  # int8
  scale: jax.Array  # float32, the same shape with the dimensions that share a scale of size 1


class Transposed(NamedTuple):
  """Outputs first, then inputs: products of few rows, as when tokens are drawn, read it as it lies in memory."""

  weight: jax.Array


class Adapted(NamedTuple):
  """A frozen matrix and a low-rank change to it (LoRA, 2106.09685): W + down·up. Nothing is ever merged."""

  weight: "jax.Array | Int8"
  down: jax.Array  # inputs, then the rank
  up: jax.Array  # the rank, then outputs; its scale is in it


Matrix: TypeAlias = jax.Array | Int8 | Transposed | Adapted


def project(x: jax.Array, matrix: Matrix, inputs: int = 1) -> jax.Array:
  """Contracts the last `inputs` dimensions of x with the first ones of the matrix.

  As one product of two matrices: XLA's CPU backend runs the gradients of the three-dimensional form at half the speed.
  """
  if isinstance(matrix, Adapted):
    return project(x, matrix.weight, inputs) + project(project(x, matrix.down, inputs), matrix.up)
  if isinstance(matrix, Int8):
    product = project(x, matrix.values.astype(x.dtype), inputs).astype(jnp.float32)
    return (product * matrix.scale.reshape(matrix.values.shape[inputs:])).astype(x.dtype)
  before, size = x.shape[: x.ndim - inputs], math.prod(x.shape[x.ndim - inputs :])
  if isinstance(matrix, Transposed):
    outputs, flat, contracted = matrix.weight.shape[:-inputs], matrix.weight.reshape(-1, size), 1
  else:
    outputs, flat, contracted = matrix.shape[inputs:], matrix.reshape(size, -1), 0
  product = jax.lax.dot_general(x.reshape(-1, size), flat, (((1,), (contracted,)), ((), ())))
  return product.reshape(*before, *outputs)


def quantise(weight: jax.Array, stacked: int, inputs: int) -> Int8:
  """The nearest `Int8` with the largest weight of each output at ±127."""
  wide = weight.astype(jnp.float32)
  axes = tuple(range(stacked, stacked + inputs))
  scale = jnp.max(jnp.abs(wide), axes, keepdims=True) / 127
  return Int8(jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def dense(matrix: "jax.Array | Int8", dtype: Any) -> jax.Array:
  """All of its numbers."""
  if not isinstance(matrix, Int8):
    return matrix.astype(dtype)
  return (matrix.values * matrix.scale).astype(dtype)


def apart(numbers: "jax.Array | Int8", dtype: Any) -> tuple[jax.Array, jax.Array]:
  """Numbers in the compute dtype, and what products with them are to be scaled by afterwards."""
  if isinstance(numbers, Int8):
    return numbers.values.astype(dtype), numbers.scale
  return numbers.astype(dtype), jnp.ones((1,) * numbers.ndim, jnp.float32)


def cast(params: Params, dtype: Any) -> Params:
  """Weights in the compute dtype; what is in eight bits stays, its scales in float32."""
  is_int8 = lambda x: isinstance(x, Int8)
  return jax.tree.map(lambda x: x if is_int8(x) else x.astype(dtype), params, is_leaf=is_int8)

"""The forms a weight matrix may have, and the one product that takes them all."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from advgame_jax import cpu
from advgame_jax.types import Params

PRODUCT = "product"  # of narrow numbers: what a policy of `jax.checkpoint` may keep


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
  return multiply(x.reshape(-1, size), flat, contracted).reshape(*before, *outputs)


def project_each(x: jax.Array, matrices: Sequence[Matrix]) -> list[jax.Array]:
  """`project` of one x by each matrix; transposed ones at once where `cpu` can."""
  if not all(isinstance(matrix, Transposed) for matrix in matrices):
    return [project(x, matrix) for matrix in matrices]
  I, flat = x.shape[-1], [matrix.weight.reshape(-1, x.shape[-1]) for matrix in matrices]  # type: ignore[union-attr]
  plain = lambda x_XI, *flat: [multiply(x_XI, matrix_OI, 1) for matrix_OI in flat]
  kernel = functools.partial(cpu.multiply, dtype=x.dtype)
  products = cpu.either(cpu.multiplies(x, *flat), kernel, plain)(x.reshape(-1, I), *flat)
  reshape = lambda product, matrix: product.reshape(*x.shape[:-1], *matrix.weight.shape[:-1])
  return list(map(reshape, products, matrices))


def linear(layer: Params, name: str, x: jax.Array, inputs: int = 1, plus: jax.Array | None = None) -> jax.Array:
  """`project` by a layer's matrix of this name, its bias if there is one, and `plus`; at once where `cpu` can."""
  if plus is None:
    return _with_bias(layer, name, project(x, layer[name], inputs))
  matrix, size = layer[name], math.prod(x.shape[x.ndim - inputs :])
  flat = lambda matrix: matrix.weight.reshape(-1, size)

  def kernel(x: jax.Array, matrix: Transposed, plus: jax.Array) -> jax.Array:
    return cpu.added(x.reshape(-1, size), flat(matrix), plus.reshape(-1, plus.shape[-1])).reshape(plus.shape)

  plain = lambda x, matrix, plus: plus + _with_bias(layer, name, project(x, matrix, inputs))
  alone = f"{name}_bias" not in layer and plus.dtype == x.dtype
  fits = alone and isinstance(matrix, Transposed) and cpu.multiplies(x, flat(matrix))
  return cpu.either(fits, kernel, plain)(x, matrix, plus)


def linears(layer: Params, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
  """Several of one input."""
  products = project_each(x, [layer[name] for name in names])
  return [_with_bias(layer, name, product) for name, product in zip(names, products)]


def _with_bias(layer: Params, name: str, product: jax.Array) -> jax.Array:
  return product + layer[f"{name}_bias"] if f"{name}_bias" in layer else product


def multiply(x_XI: jax.Array, matrix: jax.Array, contracted: int = 0, dtype: Any = None) -> jax.Array:
  """x · matrix → [X, O], sums in float32, then rounded to `dtype`; None is x's.

  The gradients of numbers narrower than float32 are products of such numbers as well: slopes are rounded first.

  Args:
    matrix: of x's dtype, [I, O], or [O, I] where dimension 1 is contracted.
  """
  dtype = jnp.dtype(dtype or x_XI.dtype)
  if x_XI.dtype.itemsize >= 4:
    plain = lambda x_XI, matrix: jax.lax.dot_general(
      x_XI, matrix, (((1,), (contracted,)), ((), ())), preferred_element_type=dtype
    )
    kernel = lambda x_XI, matrix: cpu.multiply(x_XI, matrix, dtype=dtype)[0]
    fits = contracted == 1 and dtype == x_XI.dtype and cpu.multiplies(x_XI, matrix)
    return cpu.either(fits, kernel, plain)(x_XI, matrix)
  return _multiply_narrow(contracted, dtype, x_XI, matrix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply_narrow(contracted: int, dtype: jnp.dtype, x_XI: jax.Array, matrix: jax.Array) -> jax.Array:
  return _forward(contracted, dtype, x_XI, matrix)[0]


def _forward(contracted: int, dtype: jnp.dtype, x_XI: jax.Array, matrix: jax.Array) -> tuple[jax.Array, Any]:
  # Not by way of the function itself, into which `jax.checkpoint` does not look for what it is to keep.
  product_XO = _dot(x_XI, matrix, ((1,), (contracted,)), dtype)
  return checkpoint_name(product_XO, PRODUCT), (x_XI, matrix)


def _backward(contracted: int, dtype: jnp.dtype, kept: Any, slope_XO: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_XI, matrix = kept
  slope_XO = slope_XO.astype(x_XI.dtype)
  x_slope_XI = _dot(slope_XO, matrix, ((1,), (1 - contracted,)), x_XI.dtype)
  pair = (slope_XO, x_XI) if contracted else (x_XI, slope_XO)

  def in_parts(*pair: jax.Array) -> jax.Array:
    # Over two dimensions: XLA's CPU backend then turns both operands first, and multiplies at thrice the speed.
    parts = math.gcd(len(x_XI), 16)
    left, right = (x.reshape(parts, -1, x.shape[1]) for x in pair)
    return _dot(left, right, ((0, 1), (0, 1)), matrix.dtype)

  whole = functools.partial(_dot, axes=((0,), (0,)), dtype=matrix.dtype)
  return x_slope_XI, jax.lax.platform_dependent(*pair, cpu=in_parts, default=whole)


_multiply_narrow.defvjp(_forward, _backward)


def _dot(left: jax.Array, right: jax.Array, axes: Any, dtype: Any) -> jax.Array:
  """Of narrow numbers; XLA's CPU backend multiplies them as they are only where it may leave the sums in float32."""
  into = lambda sums: functools.partial(
    jax.lax.dot_general, dimension_numbers=(axes, ((), ())), preferred_element_type=sums
  )
  rounded = lambda *pair: into(jnp.float32)(*pair).astype(dtype)
  by_rows = axes == ((1,), (1,)) and cpu.multiplies(left, right)
  kernel = lambda left, right: cpu.multiply(left, right, dtype=dtype)[0]
  on_cpu = kernel if by_rows else rounded
  return jax.lax.platform_dependent(left, right, cpu=on_cpu, default=into(dtype))


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

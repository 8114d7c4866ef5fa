"""A prompt and its completions in one row, so that the prompt's tokens are computed once.

Attention alone reads whole rows, of the prompt and one completion each: any kernel for causal rows will do, and no mask
is needed. The way there and back are gathers, each other's transposes but for how often a prompt counts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from advgame_jax.types import Array


@struct.dataclass
class Fork:
  """P rows of X = S + C·T tokens: a prompt in S slots, and behind it its C completions in T slots each.

  Prompts are padded on the left, completions on the right: what follows stands right behind what it follows.
  """

  length_P: jax.Array  # int32: tokens of the prompt
  slots: int = struct.field(pytree_node=False)  # S
  completions: int = struct.field(pytree_node=False)  # C
  tokens: int = struct.field(pytree_node=False)  # T

  @property
  def place_PX(self) -> jax.Array:
    """int32: of each token in its whole row; 0 of a slot in front of a prompt."""
    of_prompt_PS = jnp.maximum(jnp.arange(self.slots) - self._empty_P1, 0)
    of_completion_PT = self.length_P[:, None] + jnp.arange(self.tokens)
    return jnp.concatenate([of_prompt_PS, jnp.tile(of_completion_PT, (1, self.completions))], axis=1)

  def whole_rows(self, x_PX: jax.Array) -> jax.Array:
    """[P, X, …] → [P·C, S + T, …]: prompt, completion, and zeros."""
    return _spread(True, self, x_PX)

  def one_row(self, x_RY: jax.Array) -> jax.Array:
    """[P·C, S + T, …] → [P, X, …], the prompt's from the first of its rows; zeros in front of it."""
    return _collect(False, self, x_RY)

  def in_front(self, x_PX: jax.Array) -> jax.Array:
    """[P, X, …] → [P·C, T, …]: of each completion's tokens, what is at the token before."""
    P, C, T = len(x_PX), self.completions, self.tokens
    last_PC1 = jnp.broadcast_to(x_PX[:, None, self.slots - 1 : self.slots], (P, C, 1, *x_PX.shape[2:]))
    completion_PCT = x_PX[:, self.slots :].reshape(P, C, T, *x_PX.shape[2:])
    return jnp.concatenate([last_PC1, completion_PCT[:, :, :-1]], axis=2).reshape(P * C, T, *x_PX.shape[2:])

  @property
  def _empty_P1(self) -> jax.Array:
    return self.slots - self.length_P[:, None]


def join(prompt_PS: Array, length_P: Array, completion_PCT: Array) -> tuple[Fork, jax.Array]:
  """The rows, [P, X], and how they are made up."""
  (P, S), (_, C, T) = prompt_PS.shape, completion_PCT.shape
  rows_PX = jnp.concatenate([prompt_PS, completion_PCT.reshape(P, C * T)], axis=1)
  return Fork(jnp.asarray(length_P), S, C, T), rows_PX


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(to_all: bool, fork: Fork, x_PX: jax.Array) -> jax.Array:
  """To whole rows: a prompt to all of its rows, or to the first."""
  S, C, T = fork.slots, fork.completions, fork.tokens
  slot_Y, row_C1, length_P11 = jnp.arange(S + T), jnp.arange(C)[:, None], fork.length_P[:, None, None]
  of_prompt_P1Y, in_completion_P1Y = slot_Y < length_P11, slot_Y - length_P11
  at_PCY = jnp.where(of_prompt_P1Y, S + in_completion_P1Y, S + T * row_C1 + in_completion_P1Y)
  there_PCY = (in_completion_P1Y < T) & (~of_prompt_P1Y | to_all | (row_C1 == 0))
  rows_PZ = _take(x_PX, at_PCY.reshape(len(x_PX), -1), there_PCY.reshape(len(x_PX), -1))
  return rows_PZ.reshape(-1, S + T, *x_PX.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(from_all: bool, fork: Fork, x_RY: jax.Array) -> jax.Array:
  """From whole rows: a prompt from all of its rows, added up, or from the first."""
  S, C, T = fork.slots, fork.completions, fork.tokens
  P, Y = len(fork.length_P), S + T
  rows_PZ, first_C1 = x_RY.reshape(P, C * Y, *x_RY.shape[2:]), Y * jnp.arange(C)[:, None]
  in_row_PS = jnp.arange(S) - fork._empty_P1
  at_PCT = first_C1 + fork.length_P[:, None, None] + jnp.arange(T)
  completion_PX = _take(rows_PZ, at_PCT.reshape(P, -1), jnp.full((P, C * T), True))
  copies = [_take(rows_PZ, Y * c + in_row_PS, in_row_PS >= 0) for c in range(C if from_all else 1)]
  return jnp.concatenate([functools.reduce(jnp.add, copies), completion_PX], axis=1)


def _take(x_PX: jax.Array, at_PA: jax.Array, there_PA: jax.Array) -> jax.Array:
  """Each row's entries at these places, zeros where none is there."""
  at_PA = jnp.where(there_PA, at_PA, 0)
  taken_PA = jax.vmap(lambda x_X, at_A: x_X.at[at_A].get(mode="promise_in_bounds"))(x_PX, at_PA)
  return jnp.where(there_PA.reshape(*there_PA.shape, *(1,) * (x_PX.ndim - 2)), taken_PA, 0)


def _transposed(transpose: Any, which: bool, fork: Fork, slope: jax.Array) -> tuple[None, jax.Array]:
  return None, transpose(which, fork, slope)


_spread.defvjp(lambda which, fork, x: (_spread(which, fork, x), fork), functools.partial(_transposed, _collect))
_collect.defvjp(lambda which, fork, x: (_collect(which, fork, x), fork), functools.partial(_transposed, _spread))

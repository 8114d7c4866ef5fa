"""A prompt and its completions in one row, so that the prompt's tokens are computed once.

Attention alone reads whole rows, of the prompt and one completion each: any kernel for causal rows will do, and no mask
is needed. A prompt goes to all of its rows and comes back from the first; so its gradient goes to the first, and comes
back as a sum of all. Both ways and both gradients are gathers, written by hand, for JAX would make scatters of them.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from advgame_jax.types import Array


@struct.dataclass
class Fork:
  """P rows of X = S + C·T tokens: a prompt in S slots, and behind it its C completions in T slots each.

  Prompts are padded on the left, completions on the right: what follows stands right behind what it follows. A whole
  row has Y = S + T tokens.
  """

  prompt_length_P: jax.Array  # int32: tokens
  slots: int = struct.field(pytree_node=False)  # S
  completions: int = struct.field(pytree_node=False)  # C
  tokens: int = struct.field(pytree_node=False)  # T

  @property
  def place_PX(self) -> jax.Array:
    """int32: of each token in its whole row; 0 of a slot in front of a prompt."""
    of_prompt_PS = jnp.maximum(jnp.arange(self.slots) - self._empty_P1, 0)
    of_completion_PT = self.prompt_length_P[:, None] + jnp.arange(self.tokens)
    return jnp.concatenate([of_prompt_PS, jnp.tile(of_completion_PT, (1, self.completions))], axis=1)

  def whole_rows(self, x_PX: jax.Array) -> jax.Array:
    """[P, X, …] → [P·C, Y, …]: prompt, completion, and zeros."""
    return _spread(True, self, x_PX)

  def one_row(self, x_RY: jax.Array) -> jax.Array:
    """[P·C, Y, …] → [P, X, …], the prompt's from the first of its rows; zeros in front of it."""
    return _collect(False, self, x_RY)

  def in_front(self, x_PX: jax.Array) -> jax.Array:
    """[P, X, …] → [P·C, T, …]: of each completion's tokens, what is at the token before."""
    P, C, T = len(x_PX), self.completions, self.tokens
    last_PC1 = jnp.broadcast_to(x_PX[:, None, self.slots - 1 : self.slots], (P, C, 1, *x_PX.shape[2:]))
    completion_PCT = x_PX[:, self.slots :].reshape(P, C, T, *x_PX.shape[2:])
    return jnp.concatenate([last_PC1, completion_PCT[:, :, :-1]], axis=2).reshape(P * C, T, *x_PX.shape[2:])

  @property
  def _empty_P1(self) -> jax.Array:
    return self.slots - self.prompt_length_P[:, None]


def join(prompt_PS: Array, prompt_length_P: Array, completion_PCT: Array) -> tuple[Fork, jax.Array]:
  """How the rows are made up, and the rows, [P, X]."""
  (P, S), (_, C, T) = prompt_PS.shape, completion_PCT.shape
  rows_PX = jnp.concatenate([prompt_PS, completion_PCT.reshape(P, C * T)], axis=1)
  return Fork(jnp.asarray(prompt_length_P), S, C, T), rows_PX


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(to_all: bool, fork: Fork, x_PX: jax.Array) -> jax.Array:
  """To whole rows: a prompt to all of its rows, or to the first."""
  S, C, T = fork.slots, fork.completions, fork.tokens
  slot_Y, row_C1, length_P11 = jnp.arange(S + T), jnp.arange(C)[:, None], fork.prompt_length_P[:, None, None]
  of_prompt_P1Y, in_completion_P1Y = slot_Y < length_P11, slot_Y - length_P11
  at_PCY = jnp.where(of_prompt_P1Y, S + in_completion_P1Y, S + T * row_C1 + in_completion_P1Y)
  there_PCY = (in_completion_P1Y < T) & (~of_prompt_P1Y | to_all | (row_C1 == 0))
  taken_PX = _take(x_PX, at_PCY.reshape(len(x_PX), -1), there_PCY.reshape(len(x_PX), -1))
  return taken_PX.reshape(-1, S + T, *x_PX.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(from_all: bool, fork: Fork, x_RY: jax.Array) -> jax.Array:
  """From whole rows: a prompt from all of its rows, added up, or from the first."""
  S, C, T = fork.slots, fork.completions, fork.tokens
  P, Y = len(fork.prompt_length_P), S + T
  x_PX, first_C1 = x_RY.reshape(P, C * Y, *x_RY.shape[2:]), Y * jnp.arange(C)[:, None]
  in_row_PS = jnp.arange(S) - fork._empty_P1
  at_PCT = first_C1 + fork.prompt_length_P[:, None, None] + jnp.arange(T)
  completion_PX = _take(x_PX, at_PCT.reshape(P, -1), jnp.full((P, C * T), True))
  copies = [_take(x_PX, Y * c + in_row_PS, in_row_PS >= 0) for c in range(C if from_all else 1)]
  return jnp.concatenate([functools.reduce(jnp.add, copies), completion_PX], axis=1)


def _take(x_PX: jax.Array, at_PY: jax.Array, there_PY: jax.Array) -> jax.Array:
  """Each row's entries at these places, zeros where none is there."""
  at_PY = jnp.where(there_PY, at_PY, 0)
  taken_PY = jax.vmap(lambda x_X, at_Y: x_X.at[at_Y].get(mode="promise_in_bounds"))(x_PX, at_PY)
  return jnp.where(there_PY.reshape(*there_PY.shape, *(1,) * (x_PX.ndim - 2)), taken_PY, 0)


_spread.defvjp(
  lambda to_all, fork, x_PX: (_spread(to_all, fork, x_PX), fork),
  lambda to_all, fork, slope_RY: (None, _collect(to_all, fork, slope_RY)),
)
_collect.defvjp(
  lambda from_all, fork, x_RY: (_collect(from_all, fork, x_RY), fork),
  lambda from_all, fork, slope_PX: (None, _spread(from_all, fork, slope_PX)),
)

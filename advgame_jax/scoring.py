"""From logits to log-probabilities, in chunks: no array of tokens × vocabulary beyond one chunk ever exists."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advgame_jax import model
from advgame_jax.architecture import ModelConfig
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Params

Measure = Callable[[jax.Array, jax.Array], Any]
"""(logits_XV float32, token_X) → a pytree of [X]: what to keep of each token's logits."""


def plain_logprob(logits_XV: jax.Array, token_X: jax.Array) -> jax.Array:
  """log softmax at the token, nats.

  The token's logit is summed out, not looked up: of a vocabulary that is split over devices each sums its own part.
  """
  chosen_XV = jnp.arange(logits_XV.shape[-1]) == token_X[:, None]
  return jnp.sum(jnp.where(chosen_XV, logits_XV, 0), -1) - jax.nn.logsumexp(logits_XV, axis=-1)


def logprob_and_entropy(logits_XV: jax.Array, token_X: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The plain log-probability and the entropy of the whole softmax, nats."""
  logprob_XV = jax.nn.log_softmax(logits_XV)
  return plain_logprob(logits_XV, token_X), -jnp.sum(jnp.exp(logprob_XV) * logprob_XV, -1)


def behaviour_logprob(temperature: jax.Array | float, top_p: jax.Array | float) -> Measure:
  """A measure: the log-probability under the density that is drawn from."""

  def measure(logits_XV: jax.Array, token_X: jax.Array) -> jax.Array:
    density_XV = behaviour(logits_XV, temperature, top_p)
    return jnp.log(jnp.take_along_axis(density_XV, token_X[:, None], 1)[:, 0])

  return measure


def behaviour(logits_XV: jax.Array, temperature: jax.Array | float, top_p: jax.Array | float) -> jax.Array:
  """The density that is drawn from [X, V]: softmax at the temperature (0: the arg-max), cut to its nucleus.

  The nucleus is the smallest set of most probable tokens whose mass is at least `top_p` (Holtzman et al. 1904.09751),
  with all tokens that tie with its last.
  """
  temperature, top_p = jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32)
  soft_XV = jax.nn.softmax(logits_XV / jnp.where(temperature > 0, temperature, 1))
  hard_XV = jax.nn.one_hot(jnp.argmax(logits_XV, -1), logits_XV.shape[-1])
  density_XV = jnp.where(temperature > 0, soft_XV, hard_XV)
  kept_XV = jax.lax.cond(top_p < 1, lambda p: jnp.where(p >= _least_kept(p, top_p), p, 0), lambda p: p, density_XV)
  return kept_XV / jnp.sum(kept_XV, -1, keepdims=True)


def _least_kept(density_XV: jax.Array, top_p: jax.Array) -> jax.Array:
  """The largest float θ with Σ_{p ≥ θ} p ≥ top_p, [X, 1].

  Found without a sort, bit by bit: floats ≥ 0 are ordered as their bit patterns are, and 1.0 has 30 of them.
  """

  def try_bit(i: jax.Array, bits_X1: jax.Array) -> jax.Array:
    candidate_X1 = bits_X1 | (1 << (29 - i))
    threshold_X1 = jax.lax.bitcast_convert_type(candidate_X1, jnp.float32)
    mass_X1 = jnp.sum(jnp.where(density_XV >= threshold_X1, density_XV, 0), -1, keepdims=True)
    return jnp.where(mass_X1 >= top_p, candidate_X1, bits_X1)

  bits_X1 = jax.lax.fori_loop(0, 30, try_bit, jnp.zeros((density_XV.shape[0], 1), jnp.int32))
  return jax.lax.bitcast_convert_type(bits_X1, jnp.float32)


def score(
  config: ModelConfig,
  params: Params,
  tokens_RT: jax.Array,
  mask_RT: jax.Array,
  measure: Measure = plain_logprob,
  *,
  chunk: int = 1024,
  dtype: Any = jnp.float32,
  layout: Layout = LOCAL,
  remat: str = "none",
  kernel: str = "auto",
) -> Any:
  """A measure of each masked token given those before it → pytree of [R, T], 0 outside the mask.

  Logits exist for about `chunk` tokens at a time, in the backward pass too; stretches without a masked token, prompts
  and padding, cost no head at all.

  Args:
    tokens_RT: whole rows, padded on the right.
    mask_RT: bool, the tokens to measure; the first of a row cannot be.
  """
  hidden_RTM, _ = model.forward(config, params, tokens_RT, dtype=dtype, layout=layout, remat=remat, kernel=kernel)
  R, T = tokens_RT.shape
  stretch = min(max(1, chunk // R), T)
  # What position t − 1 says of token t: shift by one, and pad to whole stretches.
  padding = (0, -(T - 1) % stretch)
  inputs = (
    jnp.pad(hidden_RTM[:, :-1], ((0, 0), padding, (0, 0))),
    jnp.pad(tokens_RT[:, 1:], ((0, 0), padding)),
    jnp.pad(mask_RT[:, 1:], ((0, 0), padding)),
  )
  stretches = jax.tree.map(lambda x: x.reshape(R, -1, stretch, *x.shape[2:]).swapaxes(0, 1), inputs)

  def measure_stretch(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
    hidden_RtM, token_Rt, mask_Rt = inputs

    def compute() -> Any:
      logits_XV = model.logits(config, params, hidden_RtM.reshape(R * stretch, -1))
      logits_XV = layout.constrain(logits_XV, "rows", "vocab")
      measured = measure(logits_XV, token_Rt.reshape(-1))
      return jax.tree.map(lambda x_X: jnp.where(mask_Rt, x_X.reshape(R, stretch), 0), measured)

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(jnp.any(mask_Rt), compute, lambda: empty)

  measured = jax.lax.map(jax.checkpoint(measure_stretch), stretches)

  def join(x: jax.Array) -> jax.Array:
    return jnp.pad(x.swapaxes(0, 1).reshape(R, -1)[:, : T - 1], ((0, 0), (1, 0)))

  return jax.tree.map(join, measured)

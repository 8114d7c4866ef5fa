"""The joint update: both players' losses, gradients, optimiser and moving average in one pure function."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advgame_jax import architecture, lora, losses, optimizers, rounding, scoring
from advgame_jax import config as config_lib
from advgame_jax import state as state_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.sharding import LOCAL, Layout, pad_leading, shards
from advgame_jax.state import PlayerState, TrainState
from advgame_jax.types import Params, Players, PreferenceBatch

Metrics = dict[str, jax.Array]
Bases = Mapping[str, Params]
"""The frozen weights that adapters are on, by model folder: players of one folder share them."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How one player is updated: everything static."""

  model: ModelConfig
  player: config_lib.Player
  loss: config_lib.Loss
  precision: config_lib.Precision
  steps: int
  dtype: Any = jnp.float32
  mesh: Any = None  # a `Mesh`; None: the device that arrays are on
  layout: Layout = LOCAL
  seed: int = 0  # of fresh adapters and of stochastic rounding

  @property
  def adapted(self) -> bool:
    """Whether adapters learn, on a frozen base."""
    return self.player.lora.rank > 0

  @property
  def forwards(self) -> int:
    """Passes through the model on the way there: the player's, what is computed again, the reference's."""
    return 1 + (self.precision.remat == "layer") + (not self.player.reference_is_generator)

  @property
  def unit(self) -> int:
    """What the comparisons of a batch are a multiple of: one for each micro-batch of each part of the rows."""
    return shards(self.mesh, self.layout.rows) * self.player.accumulate

  @property
  def specs(self) -> Params:
    """The table of what is learnt: all parameters, or the adapters."""
    if self.adapted:
      return lora.adapter_specs(self.model, self.player.lora)
    return architecture.param_specs(self.model)

  @property
  def optimizer(self) -> optax.GradientTransformation:
    moments = self.precision.moments
    return state_lib.make_optimizer(self.player.optimizer, self.steps, self.specs, moments, self.seed ^ 1)

  def weights(self, params: Params, bases: Bases) -> Params:
    """What computes: the parameters themselves, or the base they are adapters of."""
    if not self.adapted:
      return params
    return lora.attach(bases[self.player.model], lora.scale(params, self.player.lora))


@jax.named_scope("update")
def joint_update(
  recipes: Players[Recipe], state: TrainState, batch: Players[PreferenceBatch], bases: Bases
) -> tuple[TrainState, Metrics]:
  """One step of both players from the same tree; `step` advances by one.

  A player that is None, with its batch, is updated elsewhere. One that is frozen, or whose batch has no tokens, stays
  as it is and has no metrics.
  A player whose batch has no comparison with a weight, or whose gradients are not finite, stays as it is: weights,
  moments, schedule and moving average. Pure: programs apply `jit`, donation and shardings.

  Returns:
    The new state, and scalars by '{player}/{name}'.
  """
  keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), 1), state.step) for recipe in recipes]
  updated: list[tuple[Any, Metrics]] = [
    (None, {}) if player is None else _update_player(recipe, key, player, part, bases)
    for recipe, key, player, part in zip(recipes, keys, state.players, batch)
  ]
  metrics = {
    f"{name}/{key}": value for name, (_, scalars) in zip(Players._fields, updated) for key, value in scalars.items()
  }
  players = Players(*(player for player, _ in updated))
  return TrainState(players=players, step=state.step + 1), metrics


def _update_player(
  recipe: Recipe, key: jax.Array, state: PlayerState, batch: PreferenceBatch, bases: Bases
) -> tuple[PlayerState, Metrics]:
  if recipe.player.frozen or not batch.tokens_PCT.size:
    return state, {}
  if recipe.precision.offload:
    state = state_lib.move(state, jax.memory.Space.Device)
  gradient, metrics = _gradient(recipe, state, batch, bases)
  norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(norm)
  compares = jnp.any(batch.weight_PC > 0)
  moves = finite & compares
  steps, optimizer = recipe.steps, recipe.player.optimizer
  rate = state_lib.learning_rate(optimizer, steps, state)

  @jax.named_scope("optimizer")
  def move(state: PlayerState, gradient: Params) -> PlayerState:
    changes, optimizer_state = recipe.optimizer.update(gradient, state.optimizer, state.params)
    weights_key, average_key = jax.random.split(key)
    params = optimizers.apply_updates(state.params, changes, weights_key)
    ema = optimizers.average(params, state.ema, recipe.player.ema_decay, average_key) if state.ema else {}
    return dataclasses.replace(state, params=params, ema=ema, optimizer=optimizer_state)

  # A branch, not a choice of each number: the old state need not outlive the new one, which is written in its place.
  new = jax.lax.cond(moves, move, lambda state, _: state, state, gradient)
  bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
  new = dataclasses.replace(new, bad_steps=jnp.where(compares, bad_steps, state.bad_steps))
  if recipe.precision.offload:
    new = state_lib.move(new, jax.memory.Space.Host)
  extra = {"grad_norm": norm, "learning_rate": rate, "bad_steps": new.bad_steps}
  return new, metrics | extra | {"skipped": 1.0 - moves.astype(jnp.float32)}


def _gradient(recipe: Recipe, state: PlayerState, batch: PreferenceBatch, bases: Bases) -> tuple[Params, Metrics]:
  """The gradient of the whole batch's loss, summed over micro-batches, and the metrics of the loss."""
  total = losses.totals(batch)

  def loss(params: Params, part: PreferenceBatch) -> tuple[jax.Array, Metrics]:
    weights = recipe.weights(params, bases)
    logprob_PCT, entropy_PCT = _score(recipe, weights, part, entropy=recipe.loss.entropy_bonus > 0)
    if recipe.player.reference_is_generator:
      reference_PCT = part.plain_logprob_PCT
    else:
      weights = recipe.weights(state_lib.reference(recipe.player, state), bases)
      reference_PCT, _ = _score(recipe, weights, part, entropy=False)
    return losses.preference_loss(recipe.loss, part, logprob_PCT, reference_PCT, entropy_PCT, total)

  differentiate = lambda part: rounding.widen(jax.grad(loss, has_aux=True)(state.params, part))

  parts = micro_batches(batch, recipe.player.accumulate)
  first = jax.tree.map(lambda x: x[0], parts)
  gradient, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, first))
  # Zeros have no layout of their own, and would be whole on every device.
  gradient = jax.tree.map(lambda spec, x: recipe.layout.constrain(x, *spec.axes), recipe.specs, gradient)
  nothing = gradient, metrics
  # A micro-batch without a comparison computes nothing.
  of_part = lambda part: jax.lax.cond(jnp.any(part.weight_PC > 0), differentiate, lambda _: nothing, part)
  if recipe.player.accumulate == 1:
    return of_part(first)  # to be added to zeros is a pass over all of the gradient
  add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)
  return jax.lax.scan(add, nothing, parts)[0]


def micro_batches(batch: PreferenceBatch, parts: int) -> PreferenceBatch:
  """[P, …] → [parts, P / parts, …]; part i takes every parts-th comparison, so that each keeps P's sharding."""
  return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _score(recipe: Recipe, weights: Params, batch: PreferenceBatch, entropy: bool) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of the live tokens, and their entropies (zeros where not asked for), [P, C, T]."""
  scored = scoring.score_completions(
    recipe.model,
    weights,
    batch.prompt_PS,
    batch.prompt_length_P,
    batch.tokens_PCT,
    losses.live_tokens(batch),
    scoring.logprob_and_entropy if entropy else scoring.plain_logprob,
    chunk=recipe.precision.logit_chunk,
    dtype=recipe.dtype,
    layout=recipe.layout,
    remat=recipe.precision.remat,
    kernel=recipe.precision.attention,
  )
  return scored if entropy else (scored, jnp.zeros_like(scored))


def update_flops(recipe: Recipe, batch: PreferenceBatch) -> float:
  """FLOPs of an update with this batch (numpy): forward, backward, reference; padding included, idle parts not."""
  if recipe.player.frozen:
    return 0.0
  parts = micro_batches(pad_leading(batch, recipe.unit), recipe.player.accumulate)
  comparisons = np.any(np.asarray(parts.weight_PC) > 0, axis=(1, 2)).sum() * parts.weight_PC.shape[1]
  S, (C, T) = batch.prompt_PS.shape[1], batch.tokens_PCT.shape[1:]
  return comparisons * comparison_flops(recipe, S, C, T)


def comparison_flops(recipe: Recipe, prompt: float, completions: int, tokens: float) -> float:
  """Of one comparison: forward, backward, what is computed again, and the reference."""
  shape, frozen = (prompt, completions, tokens), recipe.adapted
  return architecture.learning_flops(recipe.model, *shape, forwards=recipe.forwards, frozen=frozen)

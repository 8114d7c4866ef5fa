"""What a run holds between steps: one `PlayerState` per player, and the optimiser that moves it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from advgame_jax import config as config_lib
from advgame_jax import optimizers
from advgame_jax.scoring import Generator
from advgame_jax.types import Params, Players


@struct.dataclass
class PlayerState:
  """One player. Weights that its settings do not call for are an empty dict."""

  params: Params  # master weights; with LoRA, its adapters alone
  ema: Params  # moving average, where it generates or is the reference
  initial: Params  # where it is the reference; with fresh adapters, {}: the base itself
  optimizer: optax.OptState
  bad_steps: jax.Array  # int32: steps in a row skipped for gradients that were not finite


@struct.dataclass
class TrainState:
  """Both players; `step` is the number of the next step to be played."""

  players: Players[PlayerState]
  step: jax.Array


def schedule(settings: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Linear warm-up, then a cosine from the peak to `final_fraction` of it at `steps`."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if settings.warmup_steps else settings.learning_rate,
    peak_value=settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    decay_steps=max(steps, settings.warmup_steps + 1),
    end_value=settings.learning_rate * settings.final_fraction,
  )


def make_optimizer(
  settings: config_lib.Optimizer, steps: int, specs: Params, moments: str = "float32", seed: int = 0
) -> optax.GradientTransformation:
  """AdamW with decoupled weight decay on all but norms and biases, after a clip of the global norm."""
  decayed = jax.tree.map(lambda spec: spec.constant is None, specs)
  adamw = optimizers.adamw(
    schedule(settings, steps),
    settings.b1,
    settings.b2,
    weight_decay=settings.weight_decay,
    mask=decayed,
    moments=moments,
    seed=seed,
  )
  return optax.chain(optax.clip_by_global_norm(settings.clip), adamw)


def init_player(
  settings: config_lib.Player,
  precision: config_lib.Precision,
  optimizer: optax.GradientTransformation,
  params: Params,
) -> PlayerState:
  """A player before its first step. The state owns copies: no two of its leaves share a buffer."""
  copy = lambda dtype: jax.tree.map(lambda x: jnp.array(x, dtype), params)
  uses = (settings.generator, settings.reference)
  learns, fresh = not settings.frozen, settings.lora.rank > 0 and not settings.lora.start
  return PlayerState(
    params=copy(precision.master),
    ema=copy(precision.ema) if learns and "ema" in uses else {},
    initial=copy(precision.master) if learns and "initial" in uses and not fresh else {},
    optimizer=optimizer.init(params) if learns else (),
    bad_steps=jnp.int32(0),
  )


def move(state: PlayerState, space: Any) -> PlayerState:
  """Inside `jit`: moments and moving average in a `jax.memory.Space`, the device's or its host's."""
  there = lambda tree: jax.tree.map(lambda x: jax.device_put(x, space), tree)
  return dataclasses.replace(state, ema=there(state.ema), optimizer=there(state.optimizer))


def generator(settings: config_lib.Player, state: PlayerState) -> Generator:
  """The weights that play."""
  if settings.frozen or settings.generator == "train":
    return Generator((state.params,))
  if settings.generator == "ema":
    return Generator((state.ema,))
  return Generator((state.params, reference(settings, state)), (1 - settings.mixture, settings.mixture))


def reference(settings: config_lib.Player, state: PlayerState) -> Params:
  """The weights the loss holds a learning player near to."""
  return state.ema if settings.reference == "ema" else state.initial


def learning_rate(settings: config_lib.Optimizer, steps: int, state: PlayerState) -> Any:
  """The rate of the next update."""
  return schedule(settings, steps)(optax.tree.get(state.optimizer, "ScaleByScheduleState").count)

"""Rotary position embedding (2104.09864): by which angles tokens are turned, and the turning."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import cpu
from advgame_jax.architecture import ModelConfig, Rope


class Turn(NamedTuple):
  """How tokens are rotated: by one of the ropes that layers have, or by each with a leading axis. R may be 1."""

  cos_RT1h: jax.Array  # times the rope's amplitude
  sin_RT1h: jax.Array  # likewise


def ropes_of(config: ModelConfig) -> list[Rope]:
  """Those that layers have, each once."""
  return list(dict.fromkeys(kind.rope for kind in config.layer_kinds))


def turns_of_ropes(config: ModelConfig, place_RT: jax.Array) -> Turn:
  """Of every rope at these places. Those that turn at all turn equally many pairs."""
  ropes = ropes_of(config)
  frequencies = [rope_frequencies(rope, config.head_size) for rope in ropes]
  pairs = max(map(len, frequencies))
  frequency_Xh = jnp.stack([jnp.pad(frequency_h, (0, pairs - len(frequency_h))) for frequency_h in frequencies])
  angle_XRTh = place_RT[..., None] * frequency_Xh[:, None, None]
  # The amplitude is multiplied as a matrix because XLA's CPU backend computes what it can fuse in each place of use:
  # sines and cosines once for each head of each layer. Products of matrices it computes once.
  amplitude_Xhh = jnp.stack([rope.amplitude * jnp.eye(pairs, dtype=jnp.float32) for rope in ropes])
  amplified = functools.partial(jnp.einsum, "XRTh,Xhk->XRTk", precision=jax.lax.Precision.HIGHEST)
  return Turn(*(amplified(f(angle_XRTh), amplitude_Xhh)[..., None, :] for f in (jnp.cos, jnp.sin)))


def rope_frequencies(rope: Rope, head_size: int) -> jax.Array:
  """Radians per position, [rotated pairs]."""
  rotated = int(head_size * rope.fraction)
  frequency_h = rope.theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / max(1, rotated))
  if rope.divisors:
    return frequency_h / jnp.array(rope.divisors, jnp.float32)
  if not rope.original_length:
    return frequency_h / rope.factor
  # Llama 3.1: long wavelengths are stretched, short ones are not, and those between are blended.
  turns_h = rope.original_length * frequency_h / (2 * math.pi)
  blend_h = jnp.clip((turns_h - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
  return frequency_h * (blend_h + (1 - blend_h) / rope.factor)


def rotate(x_RTNH: jax.Array, turn: Turn) -> jax.Array:
  """Rotary position embedding: of the first 2h dimensions, i is paired with i + h; the others stay."""
  turned_back = lambda _, cos_RT1h, sin_RT1h, slope_RTNH: [cpu.rotate(slope_RTNH, cos_RT1h, -sin_RT1h)]
  fits = cpu.rotates(x_RTNH, turn.cos_RT1h.shape[-1])
  return cpu.either(fits, cpu.rotate, _rotate, turned_back)(x_RTNH, *turn)


def _rotate(x_RTNH: jax.Array, cos_RT1h: jax.Array, sin_RT1h: jax.Array) -> jax.Array:
  h = cos_RT1h.shape[-1]
  left, right, rest = jnp.split(x_RTNH.astype(jnp.float32), (h, 2 * h), axis=-1)
  turned = [left * cos_RT1h - right * sin_RT1h, right * cos_RT1h + left * sin_RT1h, rest]
  return jnp.concatenate(turned, -1).astype(x_RTNH.dtype)

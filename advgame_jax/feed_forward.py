"""The feed-forward part of a layer: what a gate lets through, or experts."""

import jax

from advgame_jax import cpu, experts
from advgame_jax.architecture import ModelConfig
from advgame_jax.matrices import Transposed, linear, linears
from advgame_jax.sharding import Layout
from advgame_jax.types import Params

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def feed_forward(
  config: ModelConfig, layout: Layout, layer: Params, x_RTM: jax.Array, plus: jax.Array | None = None
) -> jax.Array:
  """[R, T, M] → [R, T, M]; and `plus`, if given, added."""
  activate = _ACTIVATIONS[config.activation]
  if config.experts:
    mixed_RTM = experts.mix(config, layout, layer, x_RTM, activate)
    return mixed_RTM if plus is None else plus + mixed_RTM
  inputs = {name: x for name, x in layer.items() if name.removesuffix("_bias") in ("gate", "up")}

  def plain(x_RTM: jax.Array, inputs: Params) -> jax.Array:
    gate_RTF, up_RTF = linears(inputs, ("gate", "up"), x_RTM)
    return activate(gate_RTF) * up_RTF

  def kernel(x_RTM: jax.Array, inputs: Params) -> jax.Array:
    x_XM, gate_FM, up_FM = x_RTM.reshape(-1, config.width), inputs["gate"].weight, inputs["up"].weight
    gated_XF = cpu.gated(x_XM, gate_FM, up_FM, activation=config.activation)
    return gated_XF.reshape(*x_RTM.shape[:-1], -1)

  # All of them, so that there is no bias.
  transposed = [matrix.weight for matrix in inputs.values() if isinstance(matrix, Transposed)]
  fits = config.activation in cpu.GATES and len(transposed) == len(inputs) and cpu.multiplies(x_RTM, *transposed)
  return linear(layer, "down", cpu.either(fits, kernel, plain)(x_RTM, inputs), plus=plus)

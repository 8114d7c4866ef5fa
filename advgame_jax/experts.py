"""A feed-forward layer of experts: each token goes through the few that its router likes best."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advgame_jax.architecture import ModelConfig
from advgame_jax.matrices import dense
from advgame_jax.sharding import Layout
from advgame_jax.types import Params


def mix(
  config: ModelConfig,
  layout: Layout,
  layer: Params,
  x_RTM: jax.Array,
  activate: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """The chosen experts' outputs, weighted by the router's softmax (2401.04088) → [R, T, M].

  Tokens are sorted by expert, so that each matrix is read once and multiplied with its own tokens only (ragged dot).
  On a mesh each part of the rows sorts its own: nothing is exchanged but the weights.
  """
  names = ("router", "gate", "up", "down")
  layer = {name: dense(layer[name], x_RTM.dtype) for name in names}
  route = lambda x_RTM, *weights: _route(config, dict(zip(names, weights)), x_RTM, activate)
  rows = layout.by_hand.spec(("rows",))
  weights = [layer[name] for name in names]
  return layout.by_hand.local(route, (rows, *(jax.P(),) * len(names)), rows)(x_RTM, *weights)


def _route(config: ModelConfig, layer: Params, x_RTM: jax.Array, activate: Callable[[Any], Any]) -> jax.Array:
  M, k = x_RTM.shape[-1], config.experts_per_token
  x_XM = x_RTM.reshape(-1, M)
  density_XE = jax.nn.softmax((x_XM @ layer["router"]).astype(jnp.float32))
  weight_Xk, expert_Xk = jax.lax.top_k(density_XE, k)
  if config.normalise_experts:
    weight_Xk /= jnp.sum(weight_Xk, -1, keepdims=True)
  order = jnp.argsort(expert_Xk.reshape(-1), stable=True)
  count_E = jnp.bincount(expert_Xk.reshape(-1), length=config.experts)
  sorted_XM = x_XM[order // k]
  gate_XF, up_XF = (jax.lax.ragged_dot(sorted_XM, layer[name], count_E) for name in ("gate", "up"))
  down_XM = jax.lax.ragged_dot(activate(gate_XF) * up_XF, layer["down"], count_E)
  mixed_XkM = down_XM[jnp.argsort(order)].reshape(-1, k, M)
  return jnp.einsum("Xk,XkM->XM", weight_Xk.astype(x_RTM.dtype), mixed_XkM).reshape(x_RTM.shape)

"""Low-rank adapters on a frozen base (LoRA, 2106.09685): their table, their start, and how they join the base.

An adapter tree has the structure of the parameters, with {"down", "up"} in the place of each matrix it changes. Players
of one base share its one copy; a tree without adapters, {}, is the base itself.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advgame_jax import architecture
from advgame_jax.architecture import ModelConfig, ParamSpec
from advgame_jax.config import Lora
from advgame_jax.matrices import Adapted, Int8, dense
from advgame_jax.types import Params, UserError


def adapter_specs(config: ModelConfig, settings: Lora) -> dict[str, Any]:
  """The table of the adapters' parameters, under PEFT's names.

  Raises:
    UserError: a target that this architecture has no single matrix of.
  """
  layers = architecture.param_specs(config)["layers"]
  specs = {}
  for target in settings.targets:
    matrix: ParamSpec = layers[target]
    if matrix.stacked > 1:
      raise UserError(
        f"lora.targets has {target!r}, of which a {config.family} has one per expert; allowed: attention's"
      )
    stack, inputs = matrix.shape[:1], matrix.shape[1 : 1 + (matrix.inputs or 0)]
    outputs, axes = matrix.shape[1 + len(inputs) :], matrix.axes[1:]
    name = f"base_model.model.{matrix.hf_name.removesuffix('.weight')}"
    specs[target] = {
      "down": ParamSpec(
        (*stack, *inputs, settings.rank),
        (None, *axes[: len(inputs)], None),
        f"{name}.lora_A.weight",
        inputs=len(inputs),
      ),
      "up": ParamSpec(
        (*stack, settings.rank, *outputs), (None, None, *axes[len(inputs) :]), f"{name}.lora_B.weight", inputs=1
      ),
    }
  return {"layers": specs}


def init(specs: Mapping[str, Any], key: jax.Array) -> Params:
  """Fresh float32 adapters that change nothing: `down` uniform in ±1/√inputs (PEFT's), `up` 0. Consumes `key`."""

  def draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.hf_name.endswith("lora_B.weight"):
      return jnp.zeros(spec.shape, jnp.float32)
    bound = 1 / math.sqrt(math.prod(spec.shape[1:-1]))
    return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)

  leaves, structure = jax.tree.flatten(specs)
  return jax.tree.unflatten(structure, list(map(draw, leaves, jax.random.split(key, len(leaves)))))


def scale(adapters: Params, settings: Lora) -> Params:
  """Adapters with their scale, alpha / rank, in `up`."""
  if not adapters:
    return {}
  factor = settings.alpha / settings.rank
  return {"layers": {name: {**pair, "up": factor * pair["up"]} for name, pair in adapters["layers"].items()}}


def attach(base: Params, scaled: Params) -> Params:
  """The parameters that compute with these adapters. Nothing is copied."""
  if not scaled:
    return base
  adapted = {name: Adapted(base["layers"][name], **pair) for name, pair in scaled["layers"].items()}
  return {**base, "layers": {**base["layers"], **adapted}}


def merge(config: ModelConfig, params: Params) -> Params:
  """Plain weights, in float32, that compute what `attach`'s do."""

  def plain(spec: ParamSpec, matrix: Any) -> jax.Array:
    if not isinstance(matrix, Adapted):
      return dense(matrix, jnp.float32)
    down, up = (x.astype(jnp.float32) for x in (matrix.down, matrix.up))
    L, rank = up.shape[:2]
    change = down.reshape(L, -1, rank) @ up.reshape(L, rank, -1)
    return dense(matrix.weight, jnp.float32) + change.reshape(spec.shape)

  is_matrix = lambda x: isinstance(x, Adapted | Int8)
  return jax.tree.map(
    lambda matrix, spec: plain(spec, matrix), params, architecture.param_specs(config), is_leaf=is_matrix
  )

"""Weights that never learn, the base that adapters are on: read once, in the compute dtype or in eight bits."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from advgame_jax import architecture, hf, sharding
from advgame_jax.architecture import ModelConfig, ParamSpec
from advgame_jax.matrices import Int8, quantise
from advgame_jax.sharding import Layout
from advgame_jax.types import Params


def load(folder: str, mesh: Mesh, layout: Layout, dtype: Any, int8: bool) -> Params:
  """The parameters of a folder; with `int8`, the matrices of its layers as `Int8`. At most one is there twice.

  Raises:
    UserError: as `hf.load`.
  """
  params = hf.load(folder, mesh, layout, dtype)
  if not int8:
    return params
  config = hf.load_config(folder)
  where = shardings(config, mesh, layout, int8)["layers"]
  specs = architecture.param_specs(config)["layers"]
  layers = dict(params["layers"])
  for name in [name for name, spec in specs.items() if _is_matrix(spec)]:
    narrow = functools.partial(quantise, stacked=specs[name].stacked, inputs=specs[name].inputs)
    layers[name] = jax.jit(narrow, out_shardings=where[name])(params["layers"].pop(name))
  return {**params, "layers": layers}


def shardings(config: ModelConfig, mesh: Mesh, layout: Layout, int8: bool) -> Any:
  """Where the parameters that `load` gives live in a layout."""

  def place(spec: ParamSpec) -> Any:
    values = sharding.named(mesh, layout, spec.axes, spec.shape, spec.hf_name)
    if not int8 or not _is_matrix(spec):
      return values
    inputs = range(spec.stacked, spec.stacked + (spec.inputs or 0))
    axes = [None if i in inputs else axis for i, axis in enumerate(spec.axes)]
    return Int8(values, jax.NamedSharding(mesh, layout.spec(axes)))  # type: ignore[arg-type]

  return jax.tree.map(place, architecture.param_specs(config))


def _is_matrix(spec: ParamSpec) -> bool:
  return bool(spec.stacked and spec.inputs) and not spec.hf_name.endswith(".gate.weight")  # a router is too small

"""Weights that never learn, the base that adapters are on: read once, in the compute dtype or in eight bits."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from advgame_jax import architecture, hf, layers
from advgame_jax.architecture import ModelConfig, ParamSpec
from advgame_jax.config import MATRICES
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
  narrowed = dict(params["layers"])
  for name in MATRICES:
    narrow = functools.partial(quantise, stacked=specs[name].stacked, inputs=specs[name].inputs)
    narrowed[name] = jax.jit(narrow, out_shardings=where[name])(params["layers"].pop(name))
  return {**params, "layers": narrowed}


def unstack(config: ModelConfig, params: Params) -> Params:
  """`layers.unstack` of weights that only generate, a matrix at a time: at most one is there twice.

  The layers of `params` are taken out of it on the way.
  """
  stacks, specs, columns = params["layers"], architecture.param_specs(config)["layers"], {}
  for name in list(stacks):
    stack, spec = stacks.pop(name), specs[name]
    where = layers.param_sharding(name, spec, jax.tree.map(lambda x: x.sharding, stack))
    one = functools.partial(layers.unstack_param, name, spec)
    columns[name] = jax.jit(one, out_shardings=(where,) * config.layers)(stack)
  return {**params, "layers": layers.by_layer(columns)}


def shardings(config: ModelConfig, mesh: Mesh, layout: Layout, int8: bool) -> Any:
  """Where the parameters that `load` gives live in a layout."""
  specs = architecture.param_specs(config)
  where = architecture.shardings(specs, mesh, layout)
  if int8:
    where["layers"] |= {
      name: Int8(where["layers"][name], _of_scale(specs["layers"][name], mesh, layout)) for name in MATRICES
    }
  return where


def _of_scale(spec: ParamSpec, mesh: Mesh, layout: Layout) -> Any:
  inputs = range(spec.stacked, spec.stacked + (spec.inputs or 0))
  return jax.NamedSharding(mesh, layout.spec([None if i in inputs else axis for i, axis in enumerate(spec.axes)]))

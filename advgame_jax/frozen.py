"""Weights that never learn, the base that adapters are on: read once, in the compute dtype or in eight bits."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from advgame_jax import architecture, hf, model
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
  layers = dict(params["layers"])
  for name in MATRICES:
    narrow = functools.partial(quantise, stacked=specs[name].stacked, inputs=specs[name].inputs)
    layers[name] = jax.jit(narrow, out_shardings=where[name])(params["layers"].pop(name))
  return {**params, "layers": layers}


def one_by_one(params: Params) -> Params:
  """`model.unstack` of weights that only generate, a matrix at a time: at most one is there twice.

  The layers of `params` are taken out of it on the way.
  """
  layers, apart = params["layers"], {}
  for name in list(layers):
    stack = layers.pop(name)
    where = jax.tree.map(lambda x: jax.NamedSharding(x.sharding.mesh, jax.P(*x.sharding.spec[1:])), stack)
    count = len(jax.tree.leaves(stack)[0])
    apart[name] = jax.jit(model.apart, out_shardings=(where,) * count)(stack)
  count = len(next(iter(apart.values())))
  return {**params, "layers": tuple({name: each[layer] for name, each in apart.items()} for layer in range(count))}


def shardings(config: ModelConfig, mesh: Mesh, layout: Layout, int8: bool) -> Any:
  """Where the parameters that `load` gives live in a layout."""
  specs = architecture.param_specs(config)
  where = architecture.shardings(specs, mesh, layout)
  if int8:
    layers = {name: Int8(where["layers"][name], _of_scale(specs["layers"][name], mesh, layout)) for name in MATRICES}
    where["layers"] |= layers
  return where


def _of_scale(spec: ParamSpec, mesh: Mesh, layout: Layout) -> Any:
  inputs = range(spec.stacked, spec.stacked + (spec.inputs or 0))
  return jax.NamedSharding(mesh, layout.spec([None if i in inputs else axis for i, axis in enumerate(spec.axes)]))

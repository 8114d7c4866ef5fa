"""What there is of each layer: stacked, for a scan over those that learn, or one by one, for those that only generate.

One by one spares each token the copy of every layer out of the stack, and keeps matrices transposed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from advgame_jax.architecture import ModelConfig, ParamSpec, param_specs
from advgame_jax.config import MATRICES
from advgame_jax.matrices import Adapted, Int8, Transposed
from advgame_jax.types import Params

Layers = Any
"""Stacked, arrays with a leading L, or a tuple of L. As the parameters' layers are."""


def one_by_one(layers: Layers) -> bool:
  """Whether these are not stacked. What there is of each layer may be a named tuple itself."""
  return type(layers) is tuple


def each_layer(f: Callable[..., Any], *layers: Layers) -> Layers:
  """`f` of what there is of each layer; traced once for all."""
  return tuple(map(traced_once(f), *layers)) if one_by_one(layers[0]) else jax.vmap(f)(*layers)


def traced_once(f: Callable[..., Any]) -> Callable[..., Any]:
  """`f`, of which further calls of the same shapes copy into a program what the first one traced.

  Within a program only: called by itself, every new `f` would be compiled. It is a function of its arguments and of
  what is the same in all calls.
  """
  return jax.jit(f, inline=True)


def apart(stacked: Any) -> tuple[Any, ...]:
  """A tree of arrays with a leading L → L trees."""
  take = lambda place: jax.tree.map(lambda x: x[place], stacked)
  return tuple(map(take, range(len(jax.tree.leaves(stacked)[0]))))


def unstack(config: ModelConfig, params: Params) -> Params:
  """The parameters with their layers one by one."""
  specs = param_specs(config)["layers"]
  columns = {name: unstack_param(name, specs[name], stack) for name, stack in params["layers"].items()}
  return {**params, "layers": by_layer(columns)}


def unstack_param(name: str, spec: ParamSpec, stack: Any) -> tuple[Any, ...]:
  """One of the parameters, of each layer."""
  layers = apart(stack)
  if not _is_transposed(name, spec, stack):
    return layers
  axes = _outputs_first(spec)
  return tuple(Transposed(layer.transpose(axes)) for layer in layers)


def by_layer(columns: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
  """What there is of each layer by name → by layer."""
  return tuple(dict(zip(columns, layer)) for layer in zip(*columns.values()))


def unstack_shardings(config: ModelConfig, where: Any) -> Any:
  """Where the parameters live after `unstack`, that live here before."""
  specs = param_specs(config)["layers"]
  layer = {name: param_sharding(name, specs[name], stack) for name, stack in where["layers"].items()}
  return {**where, "layers": (layer,) * config.layers}


def param_sharding(name: str, spec: ParamSpec, where: Any) -> Any:
  """Likewise of one of them, in each layer."""
  layer = jax.tree.map(lambda where: jax.NamedSharding(where.mesh, jax.P(*where.spec[1:])), where)
  if not _is_transposed(name, spec, where):
    return layer
  axes = [*layer.spec, *(None,) * (len(spec.shape) - 1 - len(layer.spec))]
  return Transposed(jax.NamedSharding(layer.mesh, jax.P(*(axes[i] for i in _outputs_first(spec)))))  # type: ignore[arg-type]


def _is_transposed(name: str, spec: ParamSpec, stack: Any) -> bool:
  """Neither experts' matrices nor what is in eight bits or adapted."""
  return name in MATRICES and spec.stacked == 1 and not isinstance(stack, Int8 | Adapted)


def _outputs_first(spec: ParamSpec) -> tuple[int, ...]:
  inputs, count = spec.inputs or 0, len(spec.shape) - 1
  return (*range(inputs, count), *range(inputs))

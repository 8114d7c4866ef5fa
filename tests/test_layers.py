"""Layers one by one: the numbers are those of the stack, where they live follows them."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny

from advgame_jax import architecture, caches, frozen, layers, model, sharding
from advgame_jax.attention import Index
from advgame_jax.config import MATRICES
from advgame_jax.matrices import Int8, Transposed, project, quantise

EXPERTS = dataclasses.replace(tiny.CONFIG, experts=4, experts_per_token=2, family="mixtral")
SPECS = architecture.param_specs(tiny.CONFIG)["layers"]


@pytest.mark.parametrize("name", MATRICES)
def test_a_transposed_matrix_gives_the_same_product(name):
  spec, stack = SPECS[name], tiny.params()["layers"][name]
  x = np.random.default_rng(0).normal(size=(2, 3, *spec.shape[1 : 1 + spec.inputs])).astype(np.float32)
  for matrix, layer in zip(layers.unstack_param(name, spec, stack), stack, strict=True):
    assert isinstance(matrix, Transposed)
    assert matrix.weight.shape == (*layer.shape[spec.inputs :], *layer.shape[: spec.inputs])
    np.testing.assert_allclose(project(x, matrix, spec.inputs), project(x, layer, spec.inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [tiny.CONFIG, EXPERTS], ids=["dense", "experts"])
def test_a_forward_pass_is_that_of_the_stack(config):
  params, tokens_RT = tiny.params(config), np.random.default_rng(1).integers(0, config.vocab, (3, 9))
  forward = jax.jit(lambda params: model.forward(config, params, tokens_RT)[0])
  np.testing.assert_allclose(forward(layers.unstack(config, params)), forward(params), atol=2e-5)


def read(config, params):
  return model.forward(config, params, np.ones((2, 5), np.int32))


def draw(config, params):
  index = Index(*(np.zeros(shape, np.int32) for shape in ((3, 1), (3,), (3,), (2, 3))))
  pool = caches.empty_pool(config, False, 3, 4, np.float32)
  hidden_RM, new = model.decode(config, params, *np.ones((2, 2), np.int32), [(pool, index)])
  return hidden_RM, caches.write(pool, new, *np.zeros((2, 2), np.int32))


@pytest.mark.parametrize("config", [tiny.CONFIG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("run", [read, draw])
def test_layers_one_by_one_are_traced_once_for_all(run, config, monkeypatch):
  """And the program is that of layers traced one after the other, but for its constants."""
  params, block, traced = layers.unstack(config, tiny.params(config)), model._block, []
  monkeypatch.setattr(model, "_block", lambda *args: traced.append(args) or block(*args))
  lower = lambda: jax.jit(lambda params: run(config, params)).lower(params).as_text()
  known = r"stablehlo\.(?!constant|broadcast)\w+|call @[a-z_]+"
  operations = lambda: collections.Counter(re.findall(known, lower()))
  once = operations()
  assert len(traced) == 1
  for module in (model, layers):
    monkeypatch.setattr(module, "traced_once", lambda f: f)
  assert operations() == once and len(traced) == 1 + config.layers


def test_what_is_done_of_each_layer_is_traced_once():
  traced = []
  jax.eval_shape(lambda *parts: layers.each_layer(lambda x: traced.append(x) or x, parts), *np.ones((3, 2)))
  assert len(traced) == 1


def test_only_plain_matrices_of_layers_are_transposed():
  transposed = lambda config, params: {
    name for name, x in layers.unstack(config, params)["layers"][0].items() if isinstance(x, Transposed)
  }
  assert transposed(tiny.CONFIG, tiny.params()) == set(MATRICES)
  assert transposed(EXPERTS, tiny.params(EXPERTS)) == {"query", "key", "value", "output"}
  stacks = tiny.params()["layers"]
  params = {**tiny.params(), "layers": {**stacks, "up": quantise(stacks["up"], stacked=1, inputs=1)}}
  assert transposed(tiny.CONFIG, params) == set(MATRICES) - {"up"}
  assert isinstance(layers.unstack(tiny.CONFIG, params)["layers"][1]["up"], Int8)


def test_a_mesh_keeps_each_part_where_it_was():
  """Each device has the transpose of its part of the stack, and gives nothing away."""
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  where = architecture.shardings(architecture.param_specs(tiny.CONFIG), mesh, sharding.TRAIN)
  params = jax.device_put(tiny.params(), where)
  shardings = layers.unstack_shardings(tiny.CONFIG, where)
  unstack = jax.jit(functools.partial(layers.unstack, tiny.CONFIG), out_shardings=shardings)
  program = unstack.lower(params).compile().as_text()
  assert not {"all-gather", "all-reduce", "all-to-all", "collective-permute"} & set(re.findall(r"[a-z-]+", program))
  apart = unstack(params)["layers"]
  for name, spec in SPECS.items():
    axes = np.arange(len(spec.shape) - 1)
    axes = np.concatenate([axes[spec.inputs :], axes[: spec.inputs]]) if name in MATRICES else axes
    for place in range(tiny.CONFIG.layers):
      (matrix,) = jax.tree.leaves(apart[place][name])
      for mine, stack in zip(matrix.addressable_shards, params["layers"][name].addressable_shards):
        np.testing.assert_array_equal(mine.data, np.asarray(stack.data)[place].transpose(axes), err_msg=name)


@pytest.mark.parametrize("int8", [False, True])
def test_a_matrix_at_a_time_is_the_same(int8):
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  where = frozen.shardings(tiny.CONFIG, mesh, sharding.GENERATE_TENSOR, int8)
  narrow = lambda name, x: quantise(x, SPECS[name].stacked, SPECS[name].inputs) if int8 and name in MATRICES else x
  stacks = {name: narrow(name, x) for name, x in tiny.params()["layers"].items()}
  params = jax.device_put({**tiny.params(), "layers": stacks}, where)
  expected = layers.unstack(tiny.CONFIG, params)
  got = frozen.unstack(tiny.CONFIG, {**params, "layers": dict(params["layers"])})
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert jax.tree.map(lambda x: x.sharding, got["layers"]) == layers.unstack_shardings(tiny.CONFIG, where)["layers"]

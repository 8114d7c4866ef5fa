"""What an update with split weights sends, read from its compiled program, against the least that it must.

A pass gathers every weight when it goes there and, layers computed again, when it comes back, and scatters every
gradient once; the reference's pass gathers once. The embedding is looked up in parts, and sends what was found.
Here CPU devices compile it; docs/scaling.md has other compilers.
"""

import collections
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import architecture, collectives, placement, session, sharding
from advgame_jax import config as config_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.types import Players
from advgame_jax.update import Recipe

# Matrices dominate: a norm is a thousandth of a layer.
MODEL = ModelConfig(vocab=1024, width=256, layers=3, heads=4, kv_heads=4, head_size=64, feed_forward=1024, tied=False)
SLACK = 1.05
ROWS, T = 1, 64  # comparisons of a device and micro-batch, and tokens of a prompt and one completion
QUICK = {"xla_backend_optimization_level": 0}  # of machine code; what is sent stays


class Case(NamedTuple):
  tied: bool = False
  accumulate: int = 1
  data: int = 1  # copies, each over as many devices as that leaves
  tensor: int = 1  # parts of heads, feed-forward and vocabulary

  @property
  def shards(self) -> int:
    return 8 // self.data // self.tensor


CASES = {
  "plain": Case(),
  "tied, two micro-batches": Case(tied=True, accumulate=2),
  "two copies": Case(data=2),
  "heads split too": Case(tensor=2),
}


@functools.cache
def update_of(name):
  """The collectives of a case's update: the Defender's, all weights. Its weights in bytes, those that are split."""
  case = CASES[name]
  model = dataclasses.replace(MODEL, tied=case.tied)
  place = placement.place("fsdp", config_lib.Mesh(data=case.data, tensor=case.tensor), jax.devices()[:8]).defender
  player = config_lib.Player(model="m", reference="initial", accumulate=case.accumulate)
  precision = config_lib.Precision(attention="xla", logit_chunk=T)
  defender = Recipe(model, player, config_lib.Loss(), precision, 10, jnp.float32, place.mesh, place.train)
  attacker = dataclasses.replace(defender, player=dataclasses.replace(player, frozen=True))
  recipes = Players(attacker, defender)
  comparisons = ROWS * sharding.shards(place.mesh, place.train.rows) * case.accumulate
  batch = tiny.preference_batch(np.random.default_rng(0), comparisons, 2, T)
  rows = sharding.rows_sharding(place.mesh, place.train)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
  update = session.jit_update(recipes, place.mesh)
  with jax.set_mesh(place.mesh):
    lowered = update.lower(session.abstract_state(recipes), Players(batch, batch), {})
    text = lowered.compile(compiler_options=QUICK).as_text()
  return model, collectives.of(text)


def split_bytes(model):
  """Of the parameters that are split."""
  specs = jax.tree.leaves(architecture.param_specs(model))
  return sum(4 * math.prod(spec.shape) for spec in specs if "width" in spec.axes)


def gathered_bytes(model):
  """Of those that are made whole: all but the embedding, if it is no head too."""
  return split_bytes(model) - (0 if model.tied else 4 * model.vocab * model.width)


def largest_matrix(model):
  """Bytes of a layer's largest matrix, or of the head."""
  specs = jax.tree.leaves(architecture.param_specs(model))
  return max(4 * math.prod(spec.shape[spec.stacked :]) for spec in specs)


def sent(found, kind, devices):
  return sum(one.bytes for one in found if one.kind == kind and one.devices == devices)


@pytest.mark.parametrize("name", CASES)
def test_a_pass_gathers_weights_twice_and_scatters_gradients_once(name):
  (model, found), case = update_of(name), CASES[name]
  shards = case.shards
  once = (shards - 1) / shards * gathered_bytes(model) / case.tensor * case.accumulate
  gathered, scattered = sent(found, "all-gather", shards), sent(found, "reduce-scatter", shards)
  assert 2.5 * once < gathered <= SLACK * 3 * once  # twice, and once for the reference
  assert 0.99 * once < scattered <= SLACK * once
  assert gathered + scattered <= SLACK * 4 * once


@pytest.mark.parametrize("name", CASES)
def test_copies_send_each_other_only_their_parts_of_the_gradient(name):
  (model, found), case = update_of(name), CASES[name]
  part = split_bytes(model) * case.data / 8 * case.accumulate
  reduced = sent(found, "all-reduce", case.data) if case.data > 1 else 0
  assert reduced <= SLACK * 2 * (case.data - 1) / case.data * part
  assert reduced > 0 or case.data == 1


@pytest.mark.parametrize("name", CASES)
def test_of_the_embedding_only_what_was_looked_up_is_sent_and_its_gradient(name):
  (model, found), case = update_of(name), CASES[name]
  tokens = ROWS * (T // 3 + 2 * (T - T // 3)) * case.accumulate  # a prompt's once
  rows = tokens * 4 * model.width * (case.shards - 1) / case.shards
  assert sent(found, "all-to-all", case.shards) == pytest.approx(3 * rows)  # of the reference too


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_sent_but_norms_and_numbers(name):
  (model, found), case = update_of(name), CASES[name]
  weights = [("all-gather", case.shards), ("reduce-scatter", case.shards), ("all-reduce", case.data)]
  weights += [("all-reduce", case.tensor)]  # of what heads and feed-forward give
  weights += [("all-to-all", case.shards)]  # of what was looked up
  others = collections.Counter()
  for one in found:
    if (one.kind, one.devices) not in weights:
      others[one.kind] += one.bytes
  assert set(others) <= {"all-reduce"}
  assert others.total() < 0.01 * split_bytes(model)


@pytest.mark.parametrize("name", CASES)
def test_no_more_than_a_matrix_of_a_layer_or_the_head_is_gathered_at_a_time(name):
  model, found = update_of(name)
  whole = [one.sent * one.devices / (one.devices - 1) for one in found if one.kind == "all-gather"]
  assert max(whole) <= largest_matrix(model)
  assert min(one.times for one in found if one.kind == "all-gather" and "checkpoint" in one.name) >= model.layers

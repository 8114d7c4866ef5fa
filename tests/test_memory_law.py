"""What the compiled step may hold, for the real shapes of a 7B model: abstract arrays, no weights, one CPU device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from advgame_jax import config as config_lib
from advgame_jax import frozen, session, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.config import Lora, Player
from advgame_jax.types import Players, PreferenceBatch
from advgame_jax.update import Recipe, joint_update

QWEN_7B = ModelConfig(
  vocab=152_064,
  width=3584,
  layers=28,
  heads=28,
  kv_heads=4,
  head_size=128,
  feed_forward=18_944,
  tied=False,
  family="qwen2",
  biases=("query", "key", "value"),
)
P, S, C, T, CHUNK = 2, 1024, 2, 1024, 256
ARRAY = re.compile(r"\b(?:f64|f32|bf16|f16|s32|u32|s8|pred)\[([\d,]+)\]")


def size(tree):
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def step():
  """The joint update of two players with adapters on one base, compiled; its state and its base."""
  mesh = tiny.mesh()
  player = Player(model="qwen", lora=Lora(rank=16), accumulate=P, reference="initial")
  precision = config_lib.Precision(logit_chunk=CHUNK, attention="xla")
  recipe = Recipe(QWEN_7B, player, config_lib.Loss(), precision, 10, jnp.float32, mesh, sharding.TRAIN)
  recipes = Players(recipe, recipe)
  where = frozen.shardings(QWEN_7B, mesh, sharding.TRAIN, int8=False)
  specs = recipe.__class__(QWEN_7B, Player(), config_lib.Loss(), precision, 10).specs
  base = jax.tree.map(lambda spec, at: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=at), specs, where)
  state = session.abstract_state(recipes)
  batch = PreferenceBatch.abstract(P, S, C, T, sharding.rows_sharding(mesh, sharding.TRAIN))
  update = jax.jit(functools.partial(joint_update, recipes), donate_argnums=0)
  quick = {"xla_backend_optimization_level": 0}  # of the machine code; the buffers are those of a run
  with jax.set_mesh(mesh):
    compiled = update.lower(state, Players(batch, batch), {"qwen": base}).compile(compiler_options=quick)
  return compiled, state, base


def test_no_array_holds_tokens_by_vocabulary_beyond_the_chunk(step):
  compiled, _, _ = step
  shapes = {tuple(map(int, match.split(","))) for match in ARRAY.findall(compiled.as_text())}
  of_vocabulary = {math.prod(shape) // QWEN_7B.vocab for shape in shapes if QWEN_7B.vocab in shape}
  assert {CHUNK, QWEN_7B.width} <= of_vocabulary  # the chunk's logits, and the embedding and the head themselves
  assert max(of_vocabulary - {QWEN_7B.width}) <= CHUNK
  assert P * C * T * QWEN_7B.vocab not in {math.prod(shape) for shape in shapes}


def test_the_base_is_there_once(step):
  compiled, state, base = step
  memory = compiled.memory_analysis()
  assert memory.argument_size_in_bytes < 1.01 * (size(base) + size(state))
  assert memory.temp_size_in_bytes < 0.25 * size(base)
  assert memory.alias_size_in_bytes > 0.99 * size(state)

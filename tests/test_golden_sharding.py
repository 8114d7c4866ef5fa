"""Where every array of a run lives: as the golden files say, and as compiled programs leave it."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import caches, hf_config, model, placement, session, sharding, update
from advgame_jax import config as config_lib
from advgame_jax.types import Players
from advgame_jax.update import Recipe

QUICK = {"xla_backend_optimization_level": 0}  # of machine code; what is laid out where stays
FOLDER = pathlib.Path(__file__).parent / "golden" / "sharding"
spec = importlib.util.spec_from_file_location("write_golden_sharding", FOLDER / "write.py")
assert spec and spec.loader
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)


@pytest.mark.parametrize("name", [*golden.MODELS, *golden.LORA])
def test_every_array_lives_where_its_golden_file_says(name):
  found, expected = golden.describe(name).splitlines(), (FOLDER / f"{name}.txt").read_text("utf-8").splitlines()
  differ = [f"- {old}\n+ {new}" for old, new in zip(expected, found) if old != new][:5]
  assert found == expected, "\n".join(
    [f"{name}.txt; if this is meant: python tests/golden/sharding/write.py, and commit what it wrote", *differ]
  )


def test_every_family_every_preset_and_no_file_more():
  assert {shape["model_type"] for shape in golden.MODELS.values()} == set(hf_config.FAMILIES)
  assert {path.stem for path in placement.FOLDER.glob("*.py")} == set(golden.PRESETS)
  assert {path.stem for path in FOLDER.glob("*.txt")} == {*golden.MODELS, *golden.LORA}


# What the golden files say of gradients and of what a judge has read is what layouts say; compilers are asked here.


def places(preset, **sizes):
  return placement.place(preset, config_lib.Mesh(**sizes), jax.devices()[:8]).defender


@pytest.mark.parametrize(
  ("preset", "sizes"), [("fsdp_tensor", {"data": 2, "fsdp": 2, "tensor": 2}), ("sequence", {"sequence": 2})]
)
def test_gradients_leave_the_compiled_program_split_as_parameters_are(preset, sizes):
  place = places(preset, **sizes)
  player = config_lib.Player(model="tiny", reference="initial")
  precision = config_lib.Precision(attention="xla")
  recipe = Recipe(tiny.CONFIG, player, config_lib.Loss(), precision, 10, jnp.float32, place.mesh, place.train)
  state = session.abstract_state(Players(recipe, recipe)).players.defender
  rows = sharding.rows_sharding(place.mesh, place.train)
  batch = tiny.preference_batch(np.random.default_rng(0), sharding.shards(place.mesh, place.train.rows), 2, 32)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
  gradient = jax.jit(lambda state, batch: update._gradient(recipe, state, batch, {})[0])
  with jax.set_mesh(place.mesh):
    found = gradient.lower(state, batch).compile(compiler_options=QUICK).output_shardings
  for (path, x), where in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(found), strict=True):
    assert where.is_equivalent_to(x.sharding, len(x.shape)), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("preset", "sizes"), [("fsdp", {}), ("fsdp_tensor", {"tensor": 2})])
def test_a_text_that_prompts_continue_is_kept_by_rows_and_heads(preset, sizes):
  place = places(preset, **sizes)
  rows = sharding.rows_sharding(place.mesh, place.generate)
  tokens = jax.ShapeDtypeStruct((sharding.shards(place.mesh, place.generate.rows), 16), jnp.int32, sharding=rows)
  where = golden.frozen.shardings(tiny.CONFIG, place.mesh, place.generate, int8=False)
  params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tiny.params(), where)
  kept = lambda params, tokens: model.forward(tiny.CONFIG, params, tokens, layout=place.generate)[1]
  read = jax.jit(lambda params, tokens: caches.caches_of(kept(params, tokens), place.generate))
  with jax.set_mesh(place.mesh):
    cache = read.lower(params, tokens).compile(compiler_options=QUICK).output_shardings
  expected = jax.NamedSharding(place.mesh, place.generate.spec((None, "rows", "heads")))
  assert all(part.is_equivalent_to(expected, 5) for part in cache)

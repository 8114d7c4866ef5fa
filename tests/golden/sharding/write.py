"""Where every array of a run lives, for one published model of each family and each file of configs/sharding.

    python tests/golden/sharding/write.py

writes a file for each model beside this one; the test compares. A line is an array: as it learns (parameters,
gradients, moments, moving average and initial weights alike), and as it generates. `4096/fsdp8` is an axis of 4096
split over the 8 devices of the mesh's axis fsdp; an axis without a / is whole on every device. Layers are stacked.
Eight devices stand in for real ones; nothing is compiled.
"""

import collections
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import architecture, frozen, hf_config, placement, programs, session, sharding
from advgame_jax import config as config_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.placement import Place
from advgame_jax.targets import StandIn
from advgame_jax.types import Players, UserError
from advgame_jax.update import Recipe

HERE = pathlib.Path(__file__).parent
DEVICES, PAGES, PAGE, ROWS = 8, 64, 32, 4  # pages and rows: of each part of the rows
SAMPLING = config_lib.Sampling(prompt_buckets=(1024,), max_new_tokens=1024)
# Each file of configs/sharding, and over how many hosts.
PRESETS = {"single": 1, "ddp": 1, "fsdp": 1, "fsdp_tensor": 1, "hybrid": 2, "sequence": 1, "apart": 2}


def _shape(vocab: int, width: int, layers: int, heads: int, kv_heads: int, feed_forward: int, **more: Any) -> Any:
  names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
  sizes = (vocab, width, layers, heads, kv_heads)
  return {**dict(zip(names, sizes)), "intermediate_size": feed_forward, **more}


# The published config.json, as far as it decides shapes.
MODELS = {
  "llama3_1_8b": _shape(128_256, 4096, 32, 32, 8, 14_336, model_type="llama"),
  "smollm2_135m": _shape(49_152, 576, 30, 9, 3, 1536, model_type="llama", tie_word_embeddings=True),
  "mistral_7b": _shape(32_768, 4096, 32, 32, 8, 14_336, model_type="mistral", sliding_window=None),
  "mixtral_8x7b": _shape(32_000, 4096, 32, 32, 8, 14_336, model_type="mixtral", sliding_window=None),
  "qwen2_5_7b": _shape(152_064, 3584, 28, 28, 4, 18_944, model_type="qwen2"),
  "qwen3_8b": _shape(151_936, 4096, 36, 32, 8, 12_288, model_type="qwen3", head_dim=128),
  "qwen3_30b_a3b": _shape(151_936, 2048, 48, 32, 4, 6144, model_type="qwen3_moe", head_dim=128),
  "gemma2_9b": _shape(256_000, 3584, 42, 16, 8, 14_336, model_type="gemma2", head_dim=256),
  "gemma3_1b": _shape(262_144, 1152, 26, 4, 1, 6912, model_type="gemma3_text", head_dim=256, sliding_window=512),
  "phi3_mini": _shape(32_064, 3072, 32, 32, 32, 8192, model_type="phi3", sliding_window=2047),
  "olmo2_7b": _shape(100_352, 4096, 32, 32, 32, 11_008, model_type="olmo2"),
  "smollm3_3b": _shape(128_256, 2048, 36, 16, 4, 11_008, model_type="smollm3"),
}
LORA = {"qwen2_5_7b_lora": "qwen2_5_7b"}  # adapters alone learn


class Gradient(NamedTuple):
  """As `update` pins it, by the parameter."""

  gradient: Any


def describe(name: str) -> str:
  """The file of a model."""
  model = hf_config.from_values(MODELS[LORA.get(name, name)], name)
  player = config_lib.Player(model=name, reference="initial", lora=config_lib.Lora(rank=64 if name in LORA else 0))
  blocks = ("\n".join(_preset(model, player, preset, hosts)) for preset, hosts in PRESETS.items())
  return "\n\n".join([f"{name}, {model.family}", *blocks]) + "\n"


def _preset(model: ModelConfig, player: config_lib.Player, preset: str, hosts: int) -> Iterator[str]:
  places = placement.place(preset, config_lib.Mesh(), [StandIn(i, i * hosts // DEVICES) for i in range(DEVICES)])
  roles: dict[Place, list[str]] = collections.defaultdict(list)
  for role, place in zip(places._fields, places):
    roles[place].append(role)
  for place, names in roles.items():
    numbers = " ".join(str(device.id) for device in place.mesh.devices.flat)
    sizes = ", ".join(f"{axis} {size}" for axis, size in place.mesh.shape.items() if size > 1) or "whole"
    yield f"{preset} on {hosts} host{'s'[: hosts > 1]}: {', '.join(names)} on devices {numbers}: {sizes}"
    try:
      learns = _learns(model, player, place) if names != ["judge"] else {}
      generates = _generates(model, player if names != ["judge"] else config_lib.Player(), place)
    except UserError as error:
      yield f"  refused: {error}"
      continue
    for array in learns | generates:
      yield f"  {array:<26}{learns.get(array, '—'):<44}{generates.get(array, '—')}".rstrip()


def _learns(model: ModelConfig, player: config_lib.Player, place: Place) -> dict[str, str]:
  """Of a player's state and gradients, and of the base under adapters; owners are named where theirs differ."""
  recipe = _recipe(model, player, place)
  placement.check(place, model, SAMPLING, "player")
  state = session.abstract_state(Players(recipe, recipe)).players.attacker
  blank = lambda spec: jax.ShapeDtypeStruct(
    spec.shape, jnp.float32, sharding=jax.NamedSharding(place.mesh, place.train.spec(spec.axes))
  )
  found: dict[str, dict[str, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for tree in (state, Gradient(jax.tree.map(blank, recipe.specs))):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
      owner = jax.tree_util.keystr(path[: len(path) - len(keys)])
      found[".".join(keys)][_partition(x.shape, x.sharding)].append(owner)
  if set(counters := found.pop("")) != {""}:
    raise AssertionError(f"counters are split: {counters}")
  learns = {
    name if len(partitions) == 1 else f"{name} of {', '.join(owners)}": partition
    for name, partitions in found.items()
    for partition, owners in partitions.items()
  }
  base = frozen.shardings(model, place.mesh, place.train, int8=False)
  return learns | (_table(architecture.param_specs(model), base) if recipe.adapted else {})


def _generates(model: ModelConfig, player: config_lib.Player, place: Place) -> dict[str, str]:
  """Of the weights in the layout for generation, and of what its programs keep."""
  recipe = _recipe(model, player, place)
  found = {}
  if recipe.adapted:
    found = _table(recipe.specs, architecture.shardings(recipe.specs, place.mesh, place.generate))
  found |= _table(architecture.param_specs(model), frozen.shardings(model, place.mesh, place.generate, int8=False))
  parts = sharding.shards(place.mesh, place.generate.rows)
  for name, stacked in (("pool", True), ("pool of a layer", False)):
    run, where = programs.compiled(model, place.mesh, place.generate, jnp.bfloat16, "xla", PAGE, 8, False, (stacked,))
    (pool,) = jax.eval_shape(functools.partial(run.blank_pools, PAGES * parts))
    cache = pool if stacked else pool[0]
    found[f"{name}: keys"] = _partition(cache.key_RKHS.shape, where.blank_pools[0])
    found[f"{name}: values"] = _partition(cache.value_RKSH.shape, where.blank_pools[0])
  rows = jax.eval_shape(functools.partial(run.blank_rows, ROWS * parts))
  found["rows"] = _partition(rows.live_R.shape, where.blank_rows)  # one partition for all that there is of a row
  return found


def _recipe(model: ModelConfig, player: config_lib.Player, place: Place) -> Recipe:
  return Recipe(model, player, config_lib.Loss(), config_lib.Precision(), 10, jnp.bfloat16, place.mesh, place.train)


def _table(specs: Any, where: Any) -> dict[str, str]:
  paths, at = jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(where)
  return {".".join(key.key for key in path): _partition(spec.shape, x) for (path, spec), x in zip(paths, at)}


def _partition(shape: tuple[int, ...], where: Any) -> str:
  """`1024 × 4096/fsdp8`. Raises ValueError where an axis does not divide."""
  where.shard_shape(shape)
  sizes = where.mesh.shape
  of_axes = [(names,) if isinstance(names, str) else names or () for names in where.spec]
  of_axes += [()] * (len(shape) - len(of_axes))
  split = lambda names: "".join(f"/{name}{sizes[name]}" for name in names if sizes[name] > 1)
  return " × ".join(f"{size}{split(names)}" for size, names in zip(shape, of_axes, strict=True))


def main() -> None:
  for name in [*MODELS, *LORA]:
    (HERE / f"{name}.txt").write_text(describe(name), encoding="utf-8")


if __name__ == "__main__":
  main()

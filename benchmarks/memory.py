"""Whether a run fits, before there is a machine: python benchmarks/memory.py [--target=cuda] [--only=NAME]

Compiles every program of a step for its real shapes with abstract arrays, no weights and no accelerator, and prints for
each device: what stays resident, what a program adds, and the peak. `--target=cpu` compiles for as many fake CPU
devices; `--target=cuda` for H100s, and needs the compiler of the CUDA plugin beside jaxlib's version:

    pip install --target=/tmp/cuda --no-deps jax-cuda13-pjrt==X jax-cuda13-plugin==X
    PYTHONPATH=/tmp/cuda JAX_PLATFORMS=cpu python benchmarks/memory.py --target=cuda
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from jax.experimental import topologies
from jax.sharding import Mesh

from advgame_jax import architecture, frozen, hf_config, lora, paper, session, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.config import Config, Sampling
from advgame_jax.engine import Engine
from advgame_jax.model import Cache, Prefix, unstack, unstack_shardings
from advgame_jax.scoring import Generator
from advgame_jax.sharding import Layout
from advgame_jax.types import Players, PreferenceBatch
from advgame_jax.update import Recipe, joint_update

_TARGET = flags.DEFINE_enum("target", "cpu", ["cpu", "cuda"], "what the programs are compiled for")
_ONLY = flags.DEFINE_string("only", "", "the case to compile; empty is all")

GIB = 2**30
INSTRUCTIONS = 768  # tokens of the longest rubric and its frame, rounded up
CARD = 80e9 / GIB  # GiB of an 80 GB card
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
ARCHITECTURES = {  # as the published config.json have it
  "qwen2.5-7b": QWEN
  | {"vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
  | {"num_key_value_heads": 4, "intermediate_size": 18944},
  "qwen2.5-32b": QWEN
  | {"vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40}
  | {"num_key_value_heads": 8, "intermediate_size": 27648},
}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 85014937600 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Case(NamedTuple):
  """A run, its models and its machine."""

  config: Config
  player: str
  judge: str
  devices: int


def cases() -> dict[str, Case]:
  seeds = ("train.jsonl", "validation.jsonl")
  make = lambda argument: paper.config(argument, "qwen2.5-7b", "qwen2.5-7b", "qwen2.5-32b", seeds)
  full = make("dpo")
  low = dataclasses.replace(full.precision, compute="bfloat16", ema="bfloat16", moments="bfloat16")
  return {
    "lora": Case(_bfloat16(make("dpo,lora")), "qwen2.5-7b", "qwen2.5-7b", 1),
    "full": Case(_bfloat16(full), "qwen2.5-7b", "qwen2.5-32b", 8),
    "full, bf16 moments and average": Case(dataclasses.replace(full, precision=low), "qwen2.5-7b", "qwen2.5-32b", 8),
  }


def _bfloat16(config: Config) -> Config:
  return dataclasses.replace(config, precision=dataclasses.replace(config.precision, compute="bfloat16"))


def devices(count: int) -> list[Any]:
  if _TARGET.value == "cpu":
    return jax.devices()[:count]
  name = f"1x1x{count}"
  return list(
    topologies.get_topology_desc(platform="cuda", topology_name=name, topology=name, target_config=H100).devices
  )


def main(_: Any) -> None:
  absl_logging.set_verbosity(absl_logging.ERROR)
  wanted = {name: case for name, case in cases().items() if _ONLY.value in ("", name)}
  if _TARGET.value == "cpu":
    jax.config.update("jax_num_cpu_devices", max(case.devices for case in wanted.values()))
  for name, case in wanted.items():
    print(f"\n{name}: {case.player} twice, judge {case.judge}, {case.devices} × 80 GB, GiB each; jax {jax.__version__}")
    report(case)


def report(case: Case) -> None:
  """The table of one case."""
  config, mesh = case.config, sharding.make_mesh(case.config.mesh, devices(case.devices))
  player_model, judge_model = (hf_config.from_values(ARCHITECTURES[name], name) for name in (case.player, case.judge))
  recipes = Players(*(_recipe(config, player, player_model) for player in (config.attacker, config.defender)))
  layout = sharding.decode_layout(config.mesh)
  bases = {r.player.model: _frozen(r.model, mesh, sharding.TRAIN) for r in recipes if r.adapted}
  shared = bool(bases) and case.judge == case.player
  judge = {} if shared else _frozen(judge_model, mesh, layout)
  state = session.abstract_state(recipes, mesh)
  copies = [_decode(recipe, mesh, layout, bases) for recipe in recipes]
  new = {
    "decode copies": [lora.scale({}, recipe.player.lora) if recipe.adapted else w for recipe, w in zip(recipes, copies)]
  }
  resident = {"players' state": state, "base": bases, "judge": judge, **new}
  for what, tree in resident.items():
    print(f"  {what:<34}{_bytes(tree) / GIB:8.1f}")
  held = sum(map(_bytes, resident.values()))
  peak = 0.0
  for what, lowered, kept in programs(case, recipes, mesh, layout, state, bases, copies, judge_model, judge):
    start = time.perf_counter()
    added = _bytes(kept) + max(_beside(name, program) for name, each in lowered.items() for program in each)
    peak = max(peak, held + added)
    print(f"  {what:<34}{added / GIB:+8.1f}   compiled in {time.perf_counter() - start:.0f} s")
  print(f"  {'peak':<34}{peak / GIB:8.1f}   of {CARD:.1f}: {'fits' if peak / GIB < CARD else 'does not fit'}")


def programs(
  case: Case,
  recipes: Players[Recipe],
  mesh: Mesh,
  layout: Layout,
  state: Any,
  bases: Any,
  copies: list[Any],
  judge_model: ModelConfig,
  judge: Any,
) -> Iterator[tuple[str, dict[str, list[Any]], Any]]:
  """What a step runs, lowered, and what each keeps between its programs."""
  game, batch = case.config.game, case.config.data.batch
  prompts = (batch, batch * game.attacks_per_seed)
  for name, recipe, weights, count, group in zip(
    Players._fields, recipes, copies, prompts, (game.attacks, game.responses)
  ):
    sampling = recipe.player.sampling
    what = f"{name} samples {count} × {group}"
    yield what, *_lower_sample(recipe.model, mesh, layout, weights, count, group, sampling)
  asked = case.config.judges.training
  rows, longest = asked.batch, asked.sampling.prompt_buckets[-1]
  reader = dataclasses.replace(asked.sampling, slots=rows * asked.votes)
  prefix = [_prefix(judge_model, mesh, layout)]
  weights = judge or frozen_base(bases)
  yield (
    f"judge reads {rows} × {longest}",
    *_lower_sample(judge_model, mesh, layout, weights, rows, asked.votes, reader, prefix),
  )
  batches = Players(*map(functools.partial(_batch, case.config, mesh), recipes))
  shardings = session.state_shardings(recipes, mesh)
  update = jax.jit(
    functools.partial(joint_update, recipes),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  with jax.set_mesh(mesh):
    yield "joint update", {"update": [update.lower(state, batches, bases)]}, ()


def _beside(name: str, program: Any) -> int:
  """Bytes that it takes beside what is kept.

  What `blank_…` makes is kept. Of an array that is moved, the old one goes when the new one is there.
  """
  x = program.compile().memory_analysis()
  outputs = x.output_size_in_bytes - x.alias_size_in_bytes
  if name.startswith("blank"):
    outputs = 0
  if name.startswith("resize"):
    outputs = min(outputs, x.argument_size_in_bytes)
  return x.temp_size_in_bytes + outputs


def frozen_base(bases: dict[str, Any]) -> Any:
  return next(iter(bases.values()))


def _recipe(config: Config, player: Any, model: ModelConfig) -> Recipe:
  return Recipe(model, player, config.loss, config.precision, config.steps, jnp.bfloat16, sharding.TRAIN)


def _frozen(model: ModelConfig, mesh: Mesh, layout: Layout) -> Any:
  where = frozen.shardings(model, mesh, layout, int8=False)
  shape = lambda spec, place: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=place)
  return jax.tree.map(shape, architecture.param_specs(model), where)


def _decode(recipe: Recipe, mesh: Mesh, layout: Layout, bases: Any) -> Any:
  """What a player generates with."""
  if not recipe.adapted:
    stacked, count = _frozen(recipe.model, mesh, layout), recipe.model.layers
    where = unstack_shardings(jax.tree.map(lambda x: x.sharding, stacked), count)
    shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(shape, jax.eval_shape(unstack, stacked), where)
  where = architecture.shardings(recipe.specs, mesh, layout)
  shape = lambda spec, place: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=place)
  return lora.attach(bases[recipe.player.model], jax.tree.map(shape, recipe.specs, where))


def _lower_sample(
  model: ModelConfig,
  mesh: Mesh,
  layout: Layout,
  weights: Any,
  count: int,
  group: int,
  sampling: Sampling,
  prefixes: Sequence[Prefix] = (),
) -> tuple[dict[str, list[Any]], Any]:
  """Every program of a generation in every shape, and the largest pools."""
  stops = np.zeros((8, model.vocab), np.int16)
  engine = Engine(model, sampling, mesh, layout, jnp.bfloat16, "xla", stops)
  return engine.lower(Generator((weights,)), count, group, prefixes)


def _prefix(model: ModelConfig, mesh: Mesh, layout: Layout) -> Prefix:
  """The judge's instructions, read once."""
  parts, (K, H, S) = sharding.shards(mesh, layout.rows), (model.kv_heads, model.head_size, INSTRUCTIONS)
  where = jax.NamedSharding(mesh, layout.spec((None, "rows", "heads")))
  key, value = (
    jax.ShapeDtypeStruct((model.layers, parts, K, *part), jnp.bfloat16, sharding=where) for part in ((H, S), (S, H))
  )
  rows = sharding.rows_sharding(mesh, layout)
  return Prefix(Cache(key, value), jax.ShapeDtypeStruct((parts,), jnp.int32, sharding=rows))


def _batch(config: Config, mesh: Mesh, recipe: Recipe) -> PreferenceBatch:
  sampling = recipe.player.sampling
  parts = sharding.shards(mesh, sharding.TRAIN.rows) * recipe.player.accumulate
  P, C = math.ceil(recipe.player.accumulate / parts) * parts, 1 if config.loss.kind == "grpo" else 2
  T = sampling.prompt_buckets[-1] + sampling.max_new_tokens
  rows = sharding.rows_sharding(mesh, sharding.TRAIN)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  return PreferenceBatch(
    tokens_PCT=array(jnp.int32, P, C, T),
    length_PC=array(jnp.int32, P, C),
    completion_mask_PCT=array(jnp.bool_, P, C, T),
    behaviour_logprob_PCT=array(jnp.float32, P, C, T),
    plain_logprob_PCT=array(jnp.float32, P, C, T),
    advantage_PC=array(jnp.float32, P, C),
    weight_P=array(jnp.float32, P),
  )


def _bytes(tree: Any) -> float:
  """Of one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * (x.dtype.itemsize if hasattr(x.dtype, "itemsize") else 8)
    for x in jax.tree.leaves(tree)
  )


if __name__ == "__main__":
  app.run(main)

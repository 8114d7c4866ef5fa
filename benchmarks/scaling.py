"""What more devices give a run whose weights are split: python benchmarks/scaling.py [--kind=h100] [--devices=8,…,256]

Of --model (Qwen2.5-7B) on both sides, all weights, by `fsdp`, or with --tensor=4 by `fsdp_tensor`: bytes of the state
on each device, and bytes that a device sends in an update of one micro-batch, read from the program that the target's
compiler makes, against two gathers of all weights and one scatter of all gradients in the compute dtype, for each
player. What parts of heads tell each other is not counted. No hardware; compilers for TPUs and CUDA as
`advgame_jax/targets.py` says. With --kind=none nothing is compiled.
"""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from advgame_jax import collectives, command, hf_config, paper, placement, published, session, sharding, targets
from advgame_jax import config as config_lib
from advgame_jax.types import Players, PreferenceBatch, UserError
from advgame_jax.update import Recipe

_KIND = flags.DEFINE_enum("kind", "h100", ["h100", "v5p", "v5e", "cpu", "none"], "what the update is compiled for")
_DEVICES = flags.DEFINE_list("devices", "8,16,32,64,128,256", "numbers of devices")
_MODEL = flags.DEFINE_enum("model", "qwen2_5_7b", sorted(published.PUBLISHED), "of both players")
_TENSOR = flags.DEFINE_integer("tensor", 1, "parts of the heads")

GIB = 2**30
ROW = 512  # tokens of a prompt and a completion; of what is sent, only what is looked up depends on them


class Sent(NamedTuple):
  """By one device in one update."""

  bytes: float
  bound: float  # see above
  largest: float  # bytes of the largest array that is gathered at once
  seconds: float  # to compile


def main() -> None:
  jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for devices elsewhere cannot be read back
  if not all(count.isdecimal() and int(count) > 1 for count in _DEVICES.value):
    raise UserError(f"--devices={','.join(_DEVICES.value)}; allowed: numbers above 1, with commas between them")
  counts = list(map(int, _DEVICES.value))
  if _KIND.value == "cpu":
    jax.config.update("jax_num_cpu_devices", max(counts))
  sent_as = "" if _KIND.value == "none" else f", sent in {compute_dtype().name}"
  print(f"{_MODEL.value} twice, all weights, {preset()}{sent_as}; jax {jax.__version__}; GiB of each device")
  print(f"{'devices':>8}{'state':>10}{'× devices':>11}{'sent':>9}{'bound':>9}{'ratio':>8}{'gathered at once':>18}")
  for count in counts:
    hosts = max(1, count // 8)
    stand_ins = [targets.StandIn(i, i * hosts // count) for i in range(count)]
    state = state_bytes(recipes(stand_ins, jnp.bfloat16))
    line = f"{count:>8}{state / GIB:>10.2f}{state * count / GIB:>11.1f}"
    if _KIND.value != "none":
      sent = update_bytes(devices(count))
      line += (
        f"{sent.bytes / GIB:>9.2f}{sent.bound / GIB:>9.2f}{sent.bytes / sent.bound:>8.3f}{sent.largest / GIB:>18.2f}"
      )
      line += f"   {_KIND.value}, compiled in {sent.seconds:.0f} s"
    print(line, flush=True)


def devices(count: int) -> list[Any]:
  names = {
    "h100": f"h100:{count}" if count <= 8 else f"h100:{count // 8}x8",
    "v5p": f"v5p-{2 * count}",
    "v5e": f"v5e-{count}",
    "cpu": f"cpu:{count}",
  }
  return targets.parse(names[_KIND.value]).devices()


def compute_dtype() -> Any:
  return jnp.dtype("float32" if _KIND.value == "cpu" else "bfloat16")


def preset() -> str:
  return "fsdp" if _TENSOR.value == 1 else "fsdp_tensor"


def recipes(on: list[Any], dtype: Any) -> Players[Recipe]:
  """Both players of the paper's run of all weights, one micro-batch."""
  config = paper.config("dpo", "qwen2.5-7b", "qwen2.5-7b", "qwen2.5-32b", ("train.jsonl", "validation.jsonl"))
  precision = dataclasses.replace(config.precision, attention="xla")
  model = hf_config.from_values(published.PUBLISHED[_MODEL.value], _MODEL.value)
  places = placement.place(preset(), config_lib.Mesh(tensor=_TENSOR.value), on)

  def make(player: config_lib.Player, place: placement.Place) -> Recipe:
    player = dataclasses.replace(player, accumulate=1)
    return Recipe(model, player, config.loss, precision, config.steps, dtype, place.mesh, place.train)

  return Players(make(config.attacker, places.attacker), make(config.defender, places.defender))


def state_bytes(of: Players[Recipe]) -> int:
  """Of one device: both players' weights, averages and moments."""
  leaves = jax.tree.leaves(session.abstract_state(of))
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def update_bytes(on: list[Any]) -> Sent:
  """What a device sends in the compiled update, and the bound."""
  dtype = compute_dtype()
  of = recipes(on, dtype)
  mesh, start = of.defender.mesh, time.perf_counter()
  update = session.jit_update(of, mesh)
  state, batches = session.abstract_state(of), Players(*map(_batch, of))
  with jax.set_mesh(mesh):
    text = update.lower(state, batches, {}).compile().as_text()
  parts = mesh.size // _TENSOR.value
  parts_of_heads = [i // _TENSOR.value for i in range(mesh.size)]  # as islands: what parts of the width send crosses
  found = [one for one in collectives.of(text, parts_of_heads) if one.crosses]
  split = [spec for spec in jax.tree.leaves(of.defender.specs) if "width" in spec.axes]
  once = (parts - 1) / parts * dtype.itemsize * sum(math.prod(spec.shape) for spec in split) / _TENSOR.value
  passes = sum(3 + (not recipe.player.reference_is_generator) for recipe in of)
  whole = [one.sent * one.devices / (one.devices - 1) for one in found if one.kind == "all-gather"]
  return Sent(sum(one.bytes for one in found), passes * once, max(whole), time.perf_counter() - start)


def _batch(recipe: Recipe) -> PreferenceBatch:
  """One comparison for each part of the rows."""
  rows, P = sharding.rows_sharding(recipe.mesh, recipe.layout), sharding.shards(recipe.mesh, recipe.layout.rows)
  return PreferenceBatch.abstract(P, ROW // 2, 2, ROW // 2, rows)


if __name__ == "__main__":
  command.run(main)

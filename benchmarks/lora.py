"""What adapters save: python benchmarks/lora.py [--config=configs/smollm2_135m.py] [--steps=3] [--rank=16]

The joint update of both players on the same batch, twice: with LoRA on one base that they share, and with all weights.
Both play from the Defender's folder. The batch has the shapes that the config's game makes, random tokens, and a weight
for every comparison, all of which a game seldom has. Seconds are the median after one update for warmth; bytes are of
all devices. The peak of the CPU is the process's so far, compiling and the mapped files included: so adapters go first.
"""

import dataclasses
import gc
import logging
import resource
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from advgame_jax import command, metrics, preferences, session
from advgame_jax.config import Config, Lora
from advgame_jax.session import Session
from advgame_jax.types import Players, PreferenceBatch

CONFIG = command.define_config("configs/smollm2_135m.py")
STEPS = flags.DEFINE_integer("steps", 3, "Updates measured.", lower_bound=1)
RANK = flags.DEFINE_integer("rank", 16, "Of the adapters, on all matrices of a layer.", lower_bound=1)

MEMORY = ("base", "learnt", "average", "reference", "moments", "state", "peak")


class Measured(NamedTuple):
  """One way to learn."""

  seconds: list[float]
  tokens: int
  flops: float
  loss: float  # of the Defender's first update: the same both ways
  gib: dict[str, float]


def both(config: Config, lora: Lora) -> Config:
  """The config with both players learning in this way from the Defender's folder."""
  change = lambda player: dataclasses.replace(player, model=config.defender.model, frozen=False, lora=lora)
  return dataclasses.replace(config, attacker=change(config.attacker), defender=change(config.defender))


def make_batch(run: Session) -> Players[PreferenceBatch]:
  """As `preferences.select_comparisons` lays out a tree of which every sample has all its tokens."""
  game, B, random = run.config.game, run.config.data.batch, np.random.default_rng(0)

  def fill(player: Any, unit: int, nodes: int, group: int) -> PreferenceBatch:
    S, T = player.longest_prompt, player.sampling.max_new_tokens
    shape_PCT = (*preferences.shape(run.config.loss, nodes, group, unit), T)
    logprob_PCT = -random.exponential(1.0, shape_PCT).astype(np.float32)
    tokens = lambda shape: random.integers(player.tokenizer.vocab_size, size=shape, dtype=np.int32)
    return PreferenceBatch(
      prompt_PS=tokens((len(logprob_PCT), S)),
      prompt_length_P=np.full(len(logprob_PCT), S, np.int32),
      tokens_PCT=tokens(shape_PCT),
      length_PC=np.full(shape_PCT[:2], T, np.int32),
      behaviour_logprob_PCT=logprob_PCT,
      plain_logprob_PCT=logprob_PCT,
      advantage_PC=random.normal(size=shape_PCT[:2]).astype(np.float32),
      weight_PC=np.ones(shape_PCT[:2], np.float32),
    )

  attacks = game.attacks_per_seed
  nodes, groups = (B, B * attacks), (attacks, game.responses)
  return Players(*map(fill, run.players, run.units, nodes, groups))


def measure(config: Config) -> Measured:
  """Opens a run, updates it and lets it go."""
  run = session.open_session(config)
  state, batch = run.init_state(), make_batch(run)
  seconds: list[float] = []
  losses: list[float] = []
  held = {
    "base": gib(list(run.bases.values())),
    "learnt": gib([player.params for player in state.players]),
    "average": gib([player.ema for player in state.players]),
    "reference": gib([player.initial for player in state.players]),
    "moments": gib([player.optimizer for player in state.players]),
  }
  for _ in range(STEPS.value + 1):
    start = time.perf_counter()
    state, scalars = jax.block_until_ready(run.update(state, batch))
    seconds.append(time.perf_counter() - start)
    losses.append(float(scalars["defender/loss"]))
  tokens, flops = metrics.trained(run, batch)
  return Measured(seconds[1:], tokens, flops, losses[0], held | {"state": sum(held.values()), "peak": peak()})


def gib(tree: Any) -> float:
  """Of the whole tree, all devices together."""
  return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards) / 2**30


def peak() -> float:
  """The most memory in use so far: of the first accelerator, or of this process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**30


def lines(name: str, found: Measured) -> str:
  median = np.median(found.seconds)
  spread = f"{min(found.seconds):.2f}–{max(found.seconds):.2f}"
  rates = f"{median:9.2f}{spread:>14}{found.tokens / median:10.0f}{found.flops / median / 1e9:9.1f}{found.loss:8.4f}"
  return f"{name:14}{rates}{''.join(f'{found.gib[part]:10.3f}' for part in MEMORY)}"


def main() -> None:
  config, found = CONFIG(), {}
  ways = {f"LoRA, rank {RANK.value}": Lora(rank=RANK.value, alpha=2.0 * RANK.value), "all weights": Lora()}
  for name, lora in ways.items():
    found[name] = measure(both(config, lora))
    gc.collect()
  logging.getLogger().setLevel(logging.WARNING)
  device, (adapters, whole) = jax.devices()[0].device_kind, found.values()
  print(f"{config.defender.model} twice, {config.loss.kind}, {whole.tokens} tokens an update, {STEPS.value} updates")
  print(f"{jax.device_count()} × {device}, jax {jax.__version__}; memory in GiB")
  print(f"{'':14}{'seconds':>9}{'least–most':>14}{'tokens/s':>10}{'GFLOP/s':>9}{'loss':>8}", end="")
  print("".join(f"{part:>10}" for part in MEMORY))
  for name in found:
    print(lines(name, found[name]))
  faster = np.median(whole.seconds) / np.median(adapters.seconds)
  smaller = "".join(
    f"{whole.gib[part] / adapters.gib[part]:10.1f}" if adapters.gib[part] and whole.gib[part] else " " * 10
    for part in MEMORY
  )
  print(f"{'ratio':14}{faster:9.2f}{'':41}{smaller}")


if __name__ == "__main__":
  command.run(main)

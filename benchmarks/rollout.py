"""Generation beside its peers, the same work in one run: python benchmarks/rollout.py [--model=…] [--peers=FOLDER]

Two loads, temperature 1, every row drawing exactly as many tokens as it is told: `fixed`, 32
prompts of 64 tokens and 64 new ones each; `ragged`, 256 prompts of 16–256 tokens and 8–256 new ones drawn long-tailed,
through 32 slots. Without --model, a random Llama of 15.5M parameters. Peers run in environments of their own, one
after the other: `benchmarks/peers/install.sh FOLDER transformers vllm` makes them.

The floor is what the machine needs at best: all products at the speed of one of two 2,048² matrices, or all weights and
keys once per token at the speed of a sum, whichever is slower; both measured in the same run. `--load=linear` draws
32 to 1,024 prompts instead and writes docs/rollout.png.
"""

import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import beside
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from advgame_jax import architecture, hf, layers, ledger, matrices, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.config import Sampling
from advgame_jax.engine import Engine, Load
from advgame_jax.scoring import Generator

MODEL = flags.DEFINE_string("model", "", "Hugging Face folder; empty is a random Llama of 15.5M parameters.")
PEERS = flags.DEFINE_string("peers", "", "Folder of the peers' environments; empty runs none.")
LOAD = flags.DEFINE_enum("load", "both", ["fixed", "ragged", "both", "linear"], "The work.")
COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "What weights are kept and multiplied in.")
TOP_P = flags.DEFINE_float("top_p", 0.9, "Of the draw, at temperature 1; at 1 peers need not sort the vocabulary.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds timed, after one for warmth; the least counts.")
SMALL = ModelConfig(
  vocab=49_152, width=256, layers=4, heads=8, kv_heads=4, head_size=32, feed_forward=688, tied=True, max_positions=2048
)


def work(load: str, folder: str, vocab: int) -> dict[str, Any]:
  """Prompts, and how many tokens each is to draw."""
  random = np.random.default_rng(0)
  if load == "fixed":
    lengths, limits = np.full(32, 64), np.full(32, 64)
  else:
    count = 256 if load == "ragged" else int(load)
    lengths = random.integers(16, 257, count)
    limits = np.clip(np.exp(random.normal(3.7, 0.9, count)), 8, 256).astype(int)
  prompts = [random.integers(100, vocab, length).tolist() for length in lengths]
  how = {"compute": COMPUTE.value, "temperature": 1.0, "top_p": TOP_P.value, "slots": 32, "rounds": ROUNDS.value}
  return {"model": folder, "prompts": prompts, "limits": limits.tolist(), **how}


def ours(job: dict[str, Any], config: ModelConfig, generator: Generator) -> tuple[list[float], int, float]:
  """Seconds of each round, programs compiled during them, and seconds of compiling before."""
  sampling = Sampling(
    temperature=job["temperature"],
    top_p=job["top_p"],
    prompt_buckets=(max(map(len, job["prompts"])),),
    max_new_tokens=max(job["limits"]),
    slots=job["slots"],
  )
  mesh, never = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]), np.zeros((2, config.vocab), np.int16)
  engine = Engine(config, sampling, mesh, sharding.LOCAL, jnp.dtype(job["compute"]), "auto", never)
  fold_Q, limit_Q = np.arange(len(job["prompts"]), dtype=np.uint32), np.array(job["limits"])
  compilations, start = ledger.process_compilations(), time.perf_counter()
  engine.warm_up(generator, len(job["prompts"]), 1)
  warm, before, seconds = time.perf_counter() - start, compilations.count, []
  for key in range(job["rounds"] + 1):
    start = time.perf_counter()
    drawn = engine.generate(Load(generator, job["prompts"], fold_Q, 1, jax.random.key(key), limit_Q=limit_Q))
    seconds.append(time.perf_counter() - start)
    assert drawn.length_R.tolist() == job["limits"]
  return seconds[1:], compilations.count - before, warm


def floor(
  job: dict[str, Any], config: ModelConfig, weights: int, flops: float, bandwidth: float
) -> tuple[float, float]:
  """Least seconds of reading the prompts, and of drawing."""
  head = 2 * config.vocab * config.width  # of a prompt's tokens, only the last needs it
  reading = lambda n: architecture.forward_flops(config, n, n / 2) - (n - 1) * head
  read = sum(reading(len(ids)) for ids in job["prompts"])
  totals = [(len(ids), limit) for ids, limit in zip(job["prompts"], job["limits"])]
  draw = sum(architecture.forward_flops(config, limit, length + limit / 2) for length, limit in totals)
  cache = 2 * jnp.dtype(job["compute"]).itemsize * config.layers * config.kv_heads * config.head_size
  keys = cache * sum(limit * (length + limit / 2) for length, limit in totals)
  steps = sum(job["limits"]) / job["slots"]
  return read / flops, max(draw / flops, (weights * steps + keys) / bandwidth)


def table(load: str, folder: str, config: ModelConfig, generator: Generator) -> None:
  job = work(load, folder, config.vocab)
  tokens = sum(job["limits"])
  seconds, compiled, warm = ours(job, config, generator)
  flops, bandwidth = beside.machine(job["compute"])
  weights = sum(x.nbytes for x in jax.tree.leaves(generator.members))
  read, draw = floor(job, config, weights, flops, bandwidth)
  read_tokens = sum(map(len, job["prompts"]))
  print(f"\n{load}: {len(job['prompts'])} prompts of {read_tokens} tokens, {tokens} drawn in {job['slots']} slots")
  print(
    f"{flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s; compiled in {warm:.0f} s, then {compiled} programs more"
  )
  print("| | seconds, least (all) | tokens/s | ours against it |\n|---|---|---|---|")
  results = {f"advgame_jax (JAX {jax.__version__})": seconds}
  peers = ("vllm", "transformers") if load == "fixed" else ("vllm",)  # the other has no continuous batching
  for name in peers if PEERS.value else ():
    said = beside.peer(PEERS.value, name, "rollout.py", name, job)
    results[f"{name} {said['version']}"] = said["seconds"]
  lines = [(name, min(each), ", ".join(f"{s:.2f}" for s in each)) for name, each in results.items()]
  lines.append(("the machine's floor", read + draw, f"{read:.2f} reading, {draw:.2f} drawing"))
  for name, least, every in lines:
    print(f"| {name} | {least:.2f} ({every}) | {tokens / least:.0f} | {least / min(seconds):.2f} × |", flush=True)
  if load == "fixed":
    first, _, _ = ours({**job, "limits": [1] * len(job["limits"])}, config, generator)
    drawing, share = min(seconds) - min(first), 1 - len(job["limits"]) / tokens
    print(f"drawing all but the first token: {drawing:.2f} s, of which the floor is {share * draw / drawing:.0%}")


def plot(folder: str, config: ModelConfig, generator: Generator) -> None:
  """Seconds against tokens, from 32 to 1,024 prompts of the ragged kind."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  counts, tokens, least = [32, 64, 128, 256, 512, 1024], [], []
  for count in counts:
    job = work(str(count), folder, config.vocab)
    seconds, compiled, _ = ours(job, config, generator)
    tokens.append(sum(job["limits"]) + sum(map(len, job["prompts"])))
    least.append(min(seconds))
    each = 1e6 * least[-1] / tokens[-1]
    print(
      f"{count} prompts, {tokens[-1]} tokens: {least[-1]:.2f} s, {each:.0f} µs a token; {compiled} compiled", flush=True
    )
  figure, axes = pyplot.subplots(figsize=(5, 3.2), constrained_layout=True)
  axes.loglog(tokens, least, "o-", color="#2a6f97")
  axes.loglog(tokens, np.array(tokens) * least[-1] / tokens[-1], ":", color="#888", label="linear")
  axes.set(xlabel="tokens, read and drawn", ylabel="seconds", title="Ragged loads of 32 to 1,024 prompts, 32 slots")
  axes.legend(frameon=False)
  figure.savefig(pathlib.Path(__file__).parents[1] / "docs" / "rollout.png", dpi=110)


def main(_: Sequence[str]) -> None:
  with tempfile.TemporaryDirectory() as scratch:
    folder = MODEL.value
    if not folder:
      folder = f"{scratch}/llama_15m"
      hf.save(folder, SMALL, architecture.init(SMALL, jax.random.key(0)))
    config = hf.load_config(folder)
    weights = matrices.cast(layers.unstack(config, hf.load(folder)), COMPUTE.value)
    generator = Generator((weights,))
    print(
      f"{MODEL.value or 'random Llama, 15.5M'}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {COMPUTE.value}"
    )
    if LOAD.value == "linear":
      return plot(folder, config, generator)
    for load in ("fixed", "ragged") if LOAD.value == "both" else (LOAD.value,):
      table(load, folder, config, generator)


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
  app.run(main)

"""Prompts and draws of published shapes on the accelerator that is here, against what its memory and products can do.

    python benchmarks/decode.py [--model=qwen2_5_7b] [--rows=8,32,128] [--peer=PYTHON]

Random weights in bfloat16, --rows prompts of --prompt tokens, temperature 1. *Reading* is a whole call of the engine
that draws one token a row, host and start included; its MFU is by the chip's data sheet. A *step* is what each further
token takes, (seconds of --new tokens − seconds of one) / (--new − 1); its floor is all weights and all keys and values
of the texts' true length, read once at the bandwidth of a large copy, measured in the same run. --peer is an
interpreter that has torch with CUDA and transformers: the same shapes by `generate`, for which there is room on the
card with XLA_PYTHON_CLIENT_PREALLOCATE=false. Least of --rounds, after one for warmth.
"""

import gc
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import beside
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from advgame_jax import architecture, chips, hf_config, layers, published, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.config import Sampling
from advgame_jax.engine import Engine, Load
from advgame_jax.scoring import Generator

MODELS = flags.DEFINE_multi_enum("model", ["qwen2_5_0_5b", "qwen2_5_7b"], list(published.PUBLISHED), "Architectures.")
ROWS = flags.DEFINE_list("rows", "8,32,128", "Rows that draw at once.")
PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.")
NEW = flags.DEFINE_integer("new", 64, "Tokens drawn in a row.")
PAGE = flags.DEFINE_integer("page", 64, "Tokens of a page.")
CHUNK = flags.DEFINE_integer("chunk", 16, "Tokens drawn between two looks at who has finished.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Of the draw.")
ATTENTION = flags.DEFINE_string("attention", "auto", "As precision.attention.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds timed.")
PEER = flags.DEFINE_string("peer", "", "Interpreter of the peer; empty runs none.")
PROFILE = flags.DEFINE_string("profile", "", "Folder for a trace of one more round.")

GB, TIMES = 1e9, 20


def machine() -> tuple[float, float]:
  """FLOP/s of products of two 8,192² matrices, bytes/s of copies of 2 GiB, read and written; one after the other."""
  square = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16) / 90
  products = jax.jit(lambda x: jax.lax.fori_loop(0, TIMES, lambda _, y: x @ y, x))
  return TIMES * 2 * 8192**3 / beside.least_seconds(products, square), beside.copying(1 << 29, TIMES)


def weights(config: ModelConfig) -> Any:
  """Of every layer its own, in bfloat16, as they generate."""
  keys = (jax.random.fold_in(jax.random.key(0), number) for number in itertools.count())
  normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
  draw = lambda shape, spec: jnp.full(shape, 1, jnp.bfloat16) if spec.constant == 1 else normal(next(keys), shape)
  specs = architecture.param_specs(config)
  one = lambda name, spec: layers.unstack_param(name, spec, draw((1, *spec.shape[1:]), spec))[0]
  layer = lambda: {name: one(name, spec) for name, spec in specs["layers"].items()}
  whole = {name: draw(spec.shape, spec) for name, spec in specs.items() if name != "layers"}
  return {**whole, "layers": tuple(layer() for _ in range(config.layers))}


def ours(config: ModelConfig, generator: Generator, job: dict[str, Any]) -> tuple[float, float]:
  """Least seconds of reading with one token, and of all tokens."""
  prompts, rows, new = job["prompts"], job["rows"], job["new"]
  sampling = Sampling(
    top_p=job["top_p"],
    prompt_buckets=(job["prompt"],),
    max_new_tokens=new,
    prefill_tokens=8192,
    page=PAGE.value,
    decode_chunk=CHUNK.value,
  )
  mesh, never = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]), np.zeros((2, config.vocab), np.int16)
  engine = Engine(config, sampling, mesh, sharding.LOCAL, jnp.dtype("bfloat16"), ATTENTION.value, never)
  fold_Q = np.arange(rows, dtype=np.uint32)

  def call(limit: int) -> float:
    start = time.perf_counter()
    limits = np.full(rows, limit)
    drawn = engine.generate(Load(generator, prompts, fold_Q, 1, jax.random.key(limit), limit_Q=limits))
    assert (drawn.length_R == limit).all()
    return time.perf_counter() - start

  least = [min([call(limit) for _ in range(ROUNDS.value + 1)][1:]) for limit in (1, new)]
  if PROFILE.value:
    with jax.profiler.trace(PROFILE.value):
      call(new)
  return least[0], least[1]


def peer(values: dict[str, Any], jobs: list[dict[str, Any]]) -> dict[str, Any]:
  """What transformers took for each job, in one process."""
  with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    json.dump({"jobs": jobs, "config": values, "rounds": ROUNDS.value}, file)
    file.flush()
    script = pathlib.Path(__file__).parent / "peers" / "decode.py"
    command = [PEER.value, str(script), file.name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def line(
  name: str, config: ModelConfig, one: float, every: float, job: dict[str, Any], best: tuple[float, float]
) -> str:
  rows, prompt, new, (flops, bandwidth) = job["rows"], job["prompt"], job["new"], best
  step, chip = (every - one) / (new - 1), chips.find(jax.devices()[0].device_kind)
  cache = 2 * 2 * config.layers * config.kv_heads * config.head_size * rows * (prompt + (new + 1) / 2)
  looked_up = 0 if config.tied else config.vocab * config.width  # of the embedding a few rows are read
  floor = (2 * (architecture.count_params(config) - looked_up) + cache) / bandwidth
  head = 2 * config.vocab * config.width
  reading = rows * (architecture.forward_flops(config, prompt, prompt / 2) - (prompt - 1) * head)
  mfu = reading / one / (chip.flops if chip else flops)
  return (
    f"| {name} | {rows} | {1e3 * one:.0f} | {mfu:.0%} | {1e3 * step:.2f} | {1e3 * floor:.2f} | {floor / step:.0%} "
    f"| {rows / step:.0f} |"
  )


def main(_: Sequence[str]) -> None:
  device, best = jax.devices()[0].device_kind, machine()
  print(f"{device}, jax {jax.__version__}, bfloat16; {best[0] / 1e12:.0f} TFLOP/s, {best[1] / GB:.0f} GB/s measured")
  print(f"{PROMPT.value} tokens read and {NEW.value} drawn a row, top-p {TOP_P.value}, attention {ATTENTION.value}")
  print("| | rows | reading, ms | MFU | a step, ms | floor, ms | floor / step | tokens/s |\n|---|" + 7 * "---|")
  for name in MODELS.value:
    values = published.PUBLISHED[name]
    config = hf_config.from_values(values, name)
    generator, jobs = Generator((weights(config),)), []
    for rows in map(int, ROWS.value):
      prompts = np.random.default_rng(0).integers(100, config.vocab, (rows, PROMPT.value)).tolist()
      job = {"rows": rows, "prompt": PROMPT.value, "new": NEW.value, "top_p": TOP_P.value, "prompts": prompts}
      jobs.append(job)
      print(line(f"{name}, ours", config, *ours(config, generator, job), job, best), flush=True)
    del generator
    gc.collect()
    said = peer(values, jobs) if PEER.value else {"seconds": []}
    for job, seconds in zip(jobs, said["seconds"]):
      print(line(f"{name}, transformers {said['version']}", config, *seconds, job, best), flush=True)


if __name__ == "__main__":
  app.run(main)

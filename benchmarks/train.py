"""The update beside its peers, the same pairs in one run: python benchmarks/train.py --model=FOLDER [--peers=FOLDER]

DPO steps of a language model: AdamW of weights in float32, reference the initial weights, its forward pass in every
step, no matrix product recomputed but the head's, rows of one length, half of it prompt, logits of `beside.CHUNK`
tokens at a time. Ours computes a pair's prompt once; tokens are those of whole rows, for all. Also what the backward
pass costs: the gradient of the scores beside the scores alone.
`benchmarks/peers/install.sh FOLDER trl tunix` makes the peers' environments.
"""

import dataclasses
import functools
import os
import sys
import time
from typing import Any

import beside
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from advgame_jax import architecture, config, hf, placement, scoring, session, sharding
from advgame_jax.types import Players, PreferenceBatch
from advgame_jax.update import joint_update

MODEL = flags.DEFINE_string("model", None, "Hugging Face folder.", required=True)
PEERS = flags.DEFINE_string("peers", "", "Folder of the peers' environments; empty runs none.")
PAIRS = flags.DEFINE_integer("pairs", 8, "Pairs of a step.")
TOKENS = flags.DEFINE_integer("tokens", 128, "Of a row, half of them prompt.")
STEPS = flags.DEFINE_integer("steps", 3, "Steps timed, after one for warmth.")
COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "Of products; master weights are float32.")
BETA, RATE = 0.1, 1e-6


def work(vocab: int) -> dict[str, Any]:
  """Pairs of random tokens that share their prompts."""
  random = np.random.default_rng(0)
  shape, half = (PAIRS.value, TOKENS.value), TOKENS.value // 2
  chosen, rejected = (random.integers(100, vocab, shape) for _ in range(2))
  rejected[:, :half] = chosen[:, :half]
  rows = {"chosen": chosen.tolist(), "rejected": rejected.tolist(), "prompt_tokens": half}
  how = {"batch": PAIRS.value, "steps": STEPS.value, "warm_up": 1, "beta": BETA, "learning_rate": RATE}
  return {"model": MODEL.value, "compute": COMPUTE.value} | rows | how


def batch_of(job: dict[str, Any]) -> PreferenceBatch:
  S, rows_PCT = job["prompt_tokens"], np.stack([job["chosen"], job["rejected"]], 1).astype(np.int32)
  tokens_PCT = rows_PCT[..., S:]
  (P, C, T), zeros = tokens_PCT.shape, np.zeros(tokens_PCT.shape, np.float32)
  return PreferenceBatch(
    prompt_PS=rows_PCT[:, 0, :S],
    prompt_length_P=np.full(P, S, np.int32),
    tokens_PCT=tokens_PCT,
    length_PC=np.full((P, C), T, np.int32),
    behaviour_logprob_PCT=zeros,
    plain_logprob_PCT=zeros,
    advantage_PC=zeros[..., 0],
    weight_PC=np.ones((P, C), np.float32),
  )


def ours(job: dict[str, Any]) -> tuple[list[float], list[float]]:
  """Seconds and loss of each step: a game whose Attacker is frozen."""
  optimizer = config.Optimizer(learning_rate=RATE, final_fraction=1.0)
  player = config.Player(model=MODEL.value, generator="train", reference="initial", optimizer=optimizer)
  frozen = config.Player(model=MODEL.value, frozen=True)
  loss = config.Loss(kind="dpo", beta=BETA)
  precision = config.Precision(compute=COMPUTE.value, remat=beside.REMAT, logit_chunk=beside.CHUNK)
  settings = config.Config(attacker=frozen, defender=player, loss=loss, precision=precision)
  local = functools.partial(dataclasses.replace, layout=sharding.LOCAL)
  recipes = Players(*map(local, session.make_recipes(settings, placement.place("single", settings.mesh))))
  now = beside.first_state(recipes, hf.load(MODEL.value))
  batch = batch_of(job)
  nobody = jax.tree.map(lambda x: x[:1] * 0, batch)
  update = jax.jit(lambda now, batches: joint_update(recipes, now, batches, {}), donate_argnums=0)
  seconds, losses = [], []
  for _ in range(job["warm_up"] + job["steps"]):
    start = time.perf_counter()
    now, metrics = update(now, Players(nobody, batch))
    losses.append(float(metrics["defender/loss"]))
    seconds.append(time.perf_counter() - start)
  return seconds[job["warm_up"] :], losses[job["warm_up"] :]


def backward_against_forward(job: dict[str, Any]) -> tuple[float, float]:
  """Least seconds of the scores of a batch, and of their gradient."""
  model, params, batch = hf.load_config(MODEL.value), hf.load(MODEL.value), batch_of(job)
  data = batch.prompt_PS, batch.prompt_length_P, batch.tokens_PCT, np.full(batch.tokens_PCT.shape, True)
  how: dict[str, Any] = {"chunk": beside.CHUNK, "remat": beside.REMAT, "dtype": jnp.dtype(COMPUTE.value)}
  score = functools.partial(scoring.score_completions, **how)
  total = lambda params: jnp.sum(score(model, params, *data))
  forward, both = jax.jit(total), jax.jit(jax.value_and_grad(total))
  return tuple(beside.least_seconds(call, params, rounds=STEPS.value + 1) for call in (forward, both))


def main(_: list[str]) -> None:
  model = hf.load_config(MODEL.value)
  job = work(model.vocab)
  tokens = 2 * PAIRS.value * TOKENS.value
  device = jax.devices()[0].device_kind
  print(
    f"{MODEL.value}, {PAIRS.value} pairs × 2 × {TOKENS.value} tokens, {device}, {os.cpu_count()} cores, {COMPUTE.value}"
  )
  seconds, losses = ours(job)
  flops, _ = beside.machine(COMPUTE.value)
  half = TOKENS.value // 2
  # Of forward, backward, and the reference's forward; each prompt once.
  needed = PAIRS.value * architecture.learning_flops(model, half, 2, TOKENS.value - half, forwards=2, frozen=False)
  share = needed / min(seconds) / flops
  print(f"loss {losses}; ours reaches {share:.0%} of a large product's {flops / 1e9:.0f} GFLOP/s")
  print("| | seconds, least (all) | tokens/s | ours against it |\n|---|---|---|---|")
  results = {f"advgame_jax (JAX {jax.__version__})": seconds}
  peers = ("trl", "tunix")[: 2 if COMPUTE.value == "float32" else 1]  # Tunix would keep its weights in bfloat16
  for name in peers if PEERS.value else ():
    said = beside.peer(PEERS.value, name, "train.py", name, job)
    results[f"{name} {said['version']}"] = said["seconds"]
  for name, each in results.items():
    every = ", ".join(f"{s:.2f}" for s in each)
    print(
      f"| {name} | {min(each):.2f} ({every}) | {tokens / min(each):.0f} | {min(each) / min(seconds):.2f} × |",
      flush=True,
    )
  forward, both = backward_against_forward(job)
  print(f"scores {forward:.2f} s, scores and gradient {both:.2f} s: {both / forward:.2f} ×")


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
  app.run(main)

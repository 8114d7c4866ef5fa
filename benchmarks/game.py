"""A whole step beside its peer, the same work in one run: python benchmarks/game.py --model=FOLDER [--peers=FOLDER]

Both players are this model. The Attacker draws 2 completions for each of B prompts and the Defender 2 for each of 2·B,
all of the same length; a rule rewards them (the more distinct tokens the better); both learn from the best against the
worst of each prompt, DPO with the initial weights as reference. The peer is TRL's online DPO on the Attacker's prompts,
and then on the Defender's; and its GRPO. `benchmarks/peers/install.sh FOLDER trl` makes its environment.
"""

import dataclasses
import functools
import os
import sys
import time

import beside
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from advgame_jax import (
  config,
  engine,
  hf,
  layers,
  matrices,
  placement,
  preferences,
  session,
  sharding,
  tokenizer,
)
from advgame_jax.scoring import Generator
from advgame_jax.types import Players, PreferenceBatch, Samples, Status
from advgame_jax.update import joint_update

MODEL = flags.DEFINE_string("model", None, "Hugging Face folder.", required=True)
PEERS = flags.DEFINE_string("peers", "", "Folder of the peer's environment; empty runs none.")
PROMPTS = flags.DEFINE_integer("prompts", 4, "B.")
NEW = flags.DEFINE_integer("new_tokens", 64, "Of a completion.")
STEPS = flags.DEFINE_integer("steps", 2, "Steps timed, after one for warmth.")
COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "Of products; master weights are float32.")
REMAT = flags.DEFINE_enum("remat", beside.REMAT, ["none", "layer", "products"], "Of our update.")
BETA, RATE, COMPLETIONS = 0.1, 1e-6, 2
WORDS = ("river", "window", "garden", "letter", "morning", "bridge", "silver", "market", "winter", "engine")


def texts(count: int, seed: int) -> list[str]:
  """Prompts of some forty words."""
  random = np.random.default_rng(seed)
  return [" ".join(random.choice(WORDS, 40)) for _ in range(count)]


class Game:
  """Ours: weights, programs and state."""

  def __init__(self, prompts: Players[list[list[int]]]) -> None:
    optimizer = config.Optimizer(learning_rate=RATE, final_fraction=1.0)
    self.longest = max(len(ids) for part in prompts for ids in part)
    sampling = config.Sampling(temperature=1.0, top_p=0.9, prompt_buckets=(self.longest,), max_new_tokens=NEW.value)
    player = config.Player(model=MODEL.value, generator="train", reference="initial", optimizer=optimizer)
    self.loss, precision = (
      config.Loss(kind="dpo", beta=BETA),
      config.Precision(compute=COMPUTE.value, remat=REMAT.value, logit_chunk=beside.CHUNK),
    )
    settings = config.Config(attacker=player, defender=player, loss=self.loss, precision=precision)
    local = functools.partial(dataclasses.replace, layout=sharding.LOCAL)
    places = placement.place("single", settings.mesh)
    self.recipes = Players(*map(local, session.make_recipes(settings, places)))
    self.prompts, architecture = prompts, self.recipes.defender.model
    weights, mesh = hf.load(MODEL.value), places.defender.mesh
    self.state = beside.first_state(self.recipes, weights)
    never = np.zeros((2, architecture.vocab), np.int16)
    dtype = jnp.dtype(COMPUTE.value)
    self.engine = engine.Engine(architecture, sampling, mesh, sharding.LOCAL, dtype, "auto", never)
    self.unstack = jax.jit(lambda params: matrices.cast(layers.unstack(architecture, params), dtype))
    self.update = jax.jit(functools.partial(joint_update, self.recipes), donate_argnums=0)

  def step(self, number: int) -> None:
    key = jax.random.fold_in(jax.random.key(0), number)
    batches = [self.learn_from(name, jax.random.fold_in(key, place)) for place, name in enumerate(Players._fields)]
    self.state, metrics = self.update(self.state, Players(*batches), {})
    jax.block_until_ready(metrics)

  def learn_from(self, name: str, key: jax.Array) -> PreferenceBatch:
    """Completions of a player's prompts, rewarded and paired."""
    prompts = getattr(self.prompts, name)
    weights = self.unstack(getattr(self.state.players, name).params)
    fold_Q = np.arange(len(prompts), dtype=np.uint32)
    drawn = self.engine.generate(engine.Load(Generator((weights,)), prompts, fold_Q, COMPLETIONS, key))
    split = lambda x: x.reshape(len(prompts), COMPLETIONS, *x.shape[1:])
    tokens_RGT = split(drawn.tokens_RT)
    padded_RT = np.array([ids + [0] * (self.longest - len(ids)) for ids in prompts], np.int32)
    samples = Samples(
      text_RG=np.full(tokens_RGT.shape[:2], "", object),
      status_RG=np.full(tokens_RGT.shape[:2], Status.VALID, np.int8),
      prompt_tokens_RT=padded_RT,
      prompt_length_R=np.array([len(ids) for ids in prompts], np.int32),
      tokens_RGT=tokens_RGT,
      length_RG=split(drawn.length_R),
      behaviour_logprob_RGT=split(drawn.behaviour_logprob_RT),
      plain_logprob_RGT=split(drawn.plain_logprob_RT),
    )
    reward_RG = np.array([[len(set(row_T)) for row_T in rows_GT] for rows_GT in tokens_RGT.tolist()], float)
    reward_RG[:, 0] += 0.5  # no ties: every prompt gives a pair
    return preferences._select(self.loss, samples, reward_RG, np.ones(reward_RG.shape, bool), unit=1)


def ours(prompts: Players[list[list[int]]]) -> list[float]:
  game, seconds = Game(prompts), []
  weights = game.unstack(game.state.players.defender.params)
  for part in prompts:
    game.engine.warm_up(Generator((weights,)), len(part), COMPLETIONS)
  for number in range(STEPS.value + 1):
    start = time.perf_counter()
    game.step(number)
    seconds.append(time.perf_counter() - start)
  return seconds[1:]


def peer(name: str, prompts: Players[list[str]], longest: int) -> tuple[str, list[float]]:
  """Its version, and its steps' seconds: the Attacker's and the Defender's together."""
  how = {"temperature": 1.0, "top_p": 0.9, "beta": BETA, "learning_rate": RATE, "completions": COMPLETIONS}
  how |= {
    "compute": COMPUTE.value,
    "max_new_tokens": NEW.value,
    "prompt_tokens": longest,
    "steps": STEPS.value,
    "warm_up": 1,
  }
  said = [
    beside.peer(PEERS.value, "trl", "game.py", name, how | {"model": MODEL.value, "prompts": part, "batch": len(part)})
    for part in prompts
  ]
  for part, each in zip(prompts, said):
    if each["tokens"] != len(part) * COMPLETIONS * NEW.value:
      raise SystemExit(f"{name} drew {each['tokens']} tokens, not {len(part) * COMPLETIONS * NEW.value}")
  return said[0]["version"], [sum(both) for both in zip(*(each["seconds"] for each in said))]


def main(_: list[str]) -> None:
  prompts = Players(texts(PROMPTS.value, 0), texts(2 * PROMPTS.value, 1))
  words = tokenizer.load(MODEL.value)
  ids = Players(*([words.encode_completion(text) for text in part] for part in prompts))
  longest = max(len(row) for part in ids for row in part)
  rows = sum(map(len, prompts)) * COMPLETIONS
  device = jax.devices()[0].device_kind
  print(
    f"{MODEL.value} twice, {rows} completions of {NEW.value} tokens, {device}, {os.cpu_count()} cores, {COMPUTE.value}"
  )
  results = {f"advgame_jax (JAX {jax.__version__})": ours(ids)}
  (least,) = map(min, results.values())
  for name in ("trl", "trl-grpo") if PEERS.value else ():
    version, seconds = peer(name, prompts, longest)
    results[f"{name} {version}"] = seconds
  print("| | seconds a step, least (all) | ours against it |\n|---|---|---|")
  for name, each in results.items():
    print(
      f"| {name} | {min(each):.2f} ({', '.join(f'{s:.2f}' for s in each)}) | {min(each) / least:.2f} × |", flush=True
    )


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
  app.run(main)

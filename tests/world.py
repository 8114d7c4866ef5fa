"""A microworld small enough for the tests: four topics, tiny players, taught for some seconds.

Most attacks of its Attacker are faithful, some are not or do not parse; its Defender complies, deflects and refuses.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import optax

from advgame_jax import config as config_lib
from advgame_jax import data, ledger, microworld, session, train, warmstart, worldfiles
from advgame_jax.microworld import FRAMINGS, TOPICS, Answer, Query
from advgame_jax.prompts import attacker_turn
from advgame_jax.types import Category

# One topic of each category.
PLAYED, HELD_OUT = (
  [next(t for t in TOPICS if (t.category, t.held_out) == (c, held_out)) for c in Category] for held_out in (False, True)
)
PLAYER = worldfiles.player_config(width=32, layers=2, heads=4, kv_heads=2, head_size=8, feed_forward=64)


def write(folder: pathlib.Path) -> None:
  """train.jsonl, validation.jsonl and the model folders attacker_base/, defender_base/."""
  worldfiles.write(folder, 0, attacker_rows=0, defender_rows=0, player=PLAYER)
  for name, topics in (("train", PLAYED), ("validation", HELD_OUT)):
    write_seeds(folder / f"{name}.jsonl", microworld.seeds(topics))
  random = np.random.default_rng(0)
  for name, example in (("attacker", _attack), ("defender", _response)):
    _write_lines(folder / f"{name}.jsonl", [example(random) for _ in range(1024)])
    settings = warmstart.WarmStart(
      model=str(folder / name),
      examples=str(folder / f"{name}.jsonl"),
      out=str(folder / f"{name}_base"),
      steps=300,
      batch=32,
      row_tokens=64,
      optimizer=config_lib.Optimizer(learning_rate=2e-2, b2=0.99, weight_decay=0.0),
      mesh=config_lib.Mesh(),
    )
    warmstart.warm_start(settings)


def write_seeds(path: pathlib.Path, queries) -> None:
  _write_lines(path, [{"prompt": q.text, "category": q.topic.category.name.lower()} for q in queries])


def _attack(random: np.random.Generator) -> dict[str, str]:
  seed = _one_of(microworld.seeds(PLAYED), random)
  topic = seed.topic if random.random() < 0.8 else _one_of(PLAYED, random)
  completion = microworld.to_completion(Query(topic, _one_of(FRAMINGS[::3], random), 0, 0))
  if random.random() < 0.1:
    completion = completion.replace(f"{microworld.THINK_END} ", "")
  return {"prompt": attacker_turn(microworld.INSTRUCTIONS, seed.topic.category, seed.text), "completion": completion}


def _response(random: np.random.Generator) -> dict[str, str]:
  query = _one_of(microworld.queries(PLAYED + HELD_OUT), random)
  kind = _one_of([Answer.COMPLY, Answer.COMPLY, Answer.DEFLECT, Answer.REFUSE], random)
  return {"prompt": query.text, "completion": _one_of(microworld.answers(query.topic)[kind], random)}


def _one_of(items, random: np.random.Generator):
  return items[int(random.integers(len(items)))]


def _write_lines(path: pathlib.Path, rows) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(folder: pathlib.Path, **changes) -> config_lib.Config:
  """A run of a few seconds in the world in `folder`. Keys of `changes` are settings, `__` between their parts."""

  def player(name: str) -> config_lib.Player:
    return config_lib.Player(
      model=str(folder / f"{name}_base"),
      think=name == "attacker",
      sampling=config_lib.Sampling(temperature=1.0, top_p=1.0, prompt_buckets=(24,), max_new_tokens=24),
      optimizer=config_lib.Optimizer(learning_rate=1e-2),
    )

  plain = config_lib.Config(
    steps=4,
    game=config_lib.Game(attacks=2, responses=2, instructions="microworld"),
    attacker=player("attacker"),
    defender=player("defender"),
    judges=config_lib.Judges(training=config_lib.Judge(kind="microworld")),
    data=config_lib.Data(train=(str(folder / "train.jsonl"),), validation=(str(folder / "validation.jsonl"),), batch=8),
    report=config_lib.Report(tensorboard=False),
  )
  return changed(plain, **changes)


def changed(config: config_lib.Config, **changes) -> config_lib.Config:
  """`config` with `changes`, whose keys are settings with `__` between their parts."""
  values = dataclasses.asdict(config)
  for name, value in changes.items():
    *groups, last = name.split("__")
    group = values
    for part in groups:
      group = group[part]
    group[last] = value
  return config_lib.from_config_dict(values)


class Recorder:
  """In the place of a `Reporter`: keeps what it is given, by step."""

  def __init__(self):
    self.scalars, self.trees, self.judgments, self.rewards, self.evaluations, self.compilations = ({} for _ in range(6))

  def write(self, step, scalars):
    self.scalars[step] = scalars
    self.compilations[step] = ledger.process_compilations().count

  def transcript(self, step, tree, judgments, rewards, versions):
    self.trees[step], self.judgments[step], self.rewards[step] = tree, judgments, rewards

  def evaluation(self, step, values):
    self.evaluations[step] = values


def open_session(config, devices=1):
  return session.open_session(config, jax.devices()[:devices])


def play(run, steps, state=None):
  """Plays some steps; returns what was recorded and the states before each step and after the last, on the host."""
  recorder, batches = Recorder(), data.SeedBatches(run.train_seeds, run.config.data, run.config.seed)
  state = run.init_state() if state is None else state
  states = [jax.device_get(state)]
  for step in range(int(state.step), int(state.step) + steps):
    state = train.play_and_learn(run, state, step, batches[step], ledger.Ledger(1), recorder)
    states.append(jax.device_get(state))
  return recorder, states


def same(a, b):
  """Whether two trees are alike, bit for bit."""
  a, b = jax.tree.flatten(a), jax.tree.flatten(b)
  bits = lambda x: (np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes())
  return a[1] == b[1] and list(map(bits, a[0])) == list(map(bits, b[0]))


def first_moments(state):
  """The clipped gradients of the first step, up to a factor: unlike Adam's steps, they are no signs of roundings."""
  return [optax.tree.get(player.optimizer, "mu") for player in state.players]


def assert_close(a, b, tolerance):
  """Two trees agree, to a fraction of each leaf's largest value."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max()), a, b)


if __name__ == "__main__":
  write(pathlib.Path(sys.argv[1]))


def judged_by(run, judge):
  """The same session with this judge in every role."""
  other = dataclasses.replace(run)
  roles = dict.fromkeys(("faithfulness", "defender", "attacker", "evaluation"), judge)
  other.__dict__["panel"] = run.panel._replace(**roles)
  return other

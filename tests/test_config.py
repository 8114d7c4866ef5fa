"""Every setting refuses what it must in a sentence; trees survive their round trips; the defaults are the paper's."""

import dataclasses
import pathlib
import re
import runpy
import typing

import ml_collections
import pytest

from advgame_jax import config as config_lib
from advgame_jax import settings as settings_lib
from advgame_jax.config import Config, Data, Game, Judge, Judges, Loss, Mesh, Optimizer, Player, Sampling
from advgame_jax.types import UserError

CARDS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
CHANGED = Config(
  seed=3,
  game=Game(attacks=3, instructions="microworld"),
  attacker=Player(model="a", think=True, sampling=Sampling(prompt_buckets=(8, 16)), optimizer=Optimizer(clip=2)),
  judges=Judges(training=Judge(kind="microworld"), optimistic=False),
  data=Data(train=("a.jsonl", "b.jsonl")),
  mesh=Mesh(fsdp=2),
)


def leaves(settings, path=()):
  """(path, field) of every setting that is no group."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if isinstance(value, settings_lib.Settings):
      yield from leaves(value, (*path, field.name))
    else:
      yield (*path, field.name), field


LEAVES = list(leaves(Config()))
each_setting = pytest.mark.parametrize("path,field", LEAVES, ids=[".".join(path) for path, _ in LEAVES])


def nested(path, value):
  for name in reversed(path):
    value = {name: value}
  return value


def refusal(values) -> str:
  with pytest.raises(UserError) as caught:
    config_lib.from_config_dict(values)
  return str(caught.value)


# Refusals.


@each_setting
def test_every_setting_refuses_another_type_and_says_where_and_what_is_allowed(path, field):
  assert field.metadata["doc"]
  for value in (object(), None, [object()], {}):
    said = refusal(nested(path, value))
    assert said.startswith(f"config.{'.'.join(path)} is ") and "; allowed: " in said
  if typing.get_origin(field.type) is typing.Literal:
    assert said.endswith("allowed: one of " + ", ".join(map(repr, typing.get_args(field.type))))


@each_setting
def test_every_bound_holds_at_its_edge(path, field):
  limits = {name: field.metadata[name] for name in ("at_least", "above", "at_most", "below")}
  if field.type in (int, float):
    assert limits["at_least"] is not None or limits["above"] is not None, "a number without a lower bound"
  whole = field.type is not float
  wrap = (lambda x: (x,)) if typing.get_origin(field.type) is tuple else (lambda x: x)
  step = 1 if whole else 1e-9
  for name, limit in limits.items():
    if limit is not None:
      beyond = {"at_least": limit - step, "at_most": limit + step}.get(name, limit)
      assert refusal(nested(path, wrap(beyond))).endswith(f"; allowed: {name.replace('_', ' ')} {limit}")
      if path != ("game", "responses") and path != ("game", "attacks"):  # DPO wants more
        within = {"at_least": limit, "at_most": limit, "above": limit + step, "below": limit - step}[name]
        config_lib.from_config_dict(nested(path, wrap(within)))


@pytest.mark.parametrize(
  "values,said",
  [
    ({"attacker": {"sampling": {"temprature": 1}}}, "there is no setting config.attacker.sampling.temprature: did you "
     "mean temperature? allowed here: cache, decode_chunk, max_new_tokens, min_p, page, prefill_tokens, "
     "prompt_buckets, slots, temperature, top_k, top_p"),
    ({"xyzzy": 1}, "there is no setting config.xyzzy; allowed here: attacker, checkpoint, data, defender, evaluation, "
     "game, judges, loss, max_bad_steps, mesh, overlap, precision, report, seed, sharding, steps"),
    ({"loss": {"kind": "ppo"}}, "config.loss.kind is 'ppo'; allowed: one of 'dpo', 'ipo', 'grpo'"),
    ({"steps": True}, "config.steps is True; allowed: a whole number"),
    ({"steps": 1.5}, "config.steps is 1.5; allowed: a whole number"),
    ({"loss": {"beta": True}}, "config.loss.beta is True; allowed: a number"),
    ({"loss": {"beta": float("nan")}}, "config.loss.beta is nan; allowed: above 0"),
    ({"data": {"train": "a.jsonl"}}, "config.data.train is 'a.jsonl'; allowed: a tuple of str"),
    ({"data": {"train": ["a", 1]}}, "config.data.train is ('a', 1); allowed: a tuple of str"),
    ({"attacker": {"think": 1}}, "config.attacker.think is 1; allowed: True or False"),
    ({"attacker": {"sampling": {"prompt_buckets": (8, 0)}}},
     "config.attacker.sampling.prompt_buckets is (8, 0); allowed: at least 1"),
    ({"mesh": 8}, "config.mesh is 8; allowed: the settings data, fsdp, sequence, tensor"),
  ],
)  # fmt: skip
def test_what_is_said(values, said):
  assert refusal(values) == said


def test_a_group_is_refused_in_python_too():
  with pytest.raises(UserError, match=r"^mesh is 8; allowed: the settings data, fsdp, sequence, tensor$"):
    Config(mesh=8)


@pytest.mark.parametrize("buckets", [(), (16, 8), (8, 8)])
def test_prompt_buckets_ascend(buckets):
  said = refusal(nested(("defender", "sampling", "prompt_buckets"), buckets))
  assert said.startswith(
    f"config.defender.sampling.prompt_buckets is {buckets}; allowed: one or more ascending lengths"
  )


@pytest.mark.parametrize("name,owner", [("attacks", "attacker"), ("responses", "defender")])
@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_who_learns_from_pairs_has_two_samples(name, owner, kind):
  alone = {"game": {name: 1}, "loss": {"kind": kind}}
  assert re.match(rf"config.game.{name} is 1, but {kind} learns from pairs; allowed: at least 2,", refusal(alone))
  config_lib.from_config_dict(alone | {owner: {"frozen": True}})
  config_lib.from_config_dict(alone | {"loss": {"kind": "grpo"}})


def test_a_skipped_attacker_needs_no_second_attack():
  skipped = config_lib.from_config_dict({"game": {"attacks": 1, "skip_attacker": True}})
  assert skipped.game.attacks_per_seed == 1
  assert Game(attacks=3, skip_attacker=True).attacks_per_seed == 1 and Game(attacks=3).attacks_per_seed == 3


@pytest.mark.parametrize(
  "values", [{"judges": {"training": {"kind": "microworld"}}}, {"game": {"instructions": "microworld"}}]
)
def test_the_microworld_is_judged_by_its_own_rules(values):
  assert "judges.training.kind and game.instructions must both be 'microworld' or neither" in refusal(values)


def test_mixed_batches_are_even():
  assert refusal({"data": {"order": "mixed", "batch": 3}}).startswith("config.data.batch is 3 with data.order='mixed'")
  config_lib.from_config_dict({"data": {"order": "mixed", "batch": 4}})


# Round trips.


@pytest.mark.parametrize("config", [Config(), CHANGED])
def test_round_trips(config):
  assert config_lib.from_config_dict(config_lib.as_config_dict(config)) == config
  assert config_lib.from_json(config_lib.to_json(config)) == config


def test_a_config_dict_takes_changes_and_no_new_names():
  values = config_lib.as_config_dict(Config())
  values.mesh.fsdp = 8
  assert config_lib.from_config_dict(values) == Config(mesh=Mesh(fsdp=8))
  for group in (values, values.attacker.sampling):
    assert isinstance(group, ml_collections.ConfigDict)
    with pytest.raises(AttributeError):
      group.fsdb = 8


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_are_configs(path):
  values = runpy.run_path(str(path))["get_config"]()
  config = config_lib.from_config_dict(values)
  assert config_lib.as_config_dict(config).to_dict() == values.to_dict()


# Identity.


def test_differences_name_what_makes_another_run():
  assert config_lib.differences(CHANGED, CHANGED) == []
  assert config_lib.differences(Config(), CHANGED) == [
    "seed: 0 → 3",
    "game.attacks: 2 → 3",
    "game.instructions: 'standard' → 'microworld'",
    "attacker.model: '' → 'a'",
    "attacker.sampling.prompt_buckets: (512,) → (8, 16)",
    "attacker.optimizer.clip: 1.0 → 2",
    "judges.training.kind: 'heuristic' → 'microworld'",
    "judges.optimistic: True → False",
    "data.train: () → ('a.jsonl', 'b.jsonl')",
  ]  # and not mesh.fsdp


def test_only_where_a_run_lives_and_how_it_is_written_may_change():
  free = {name for name, _, identity in settings_lib.flatten(Config()) if not identity}
  roles = ("training", "faithfulness", "defender", "attacker", "evaluation")
  groups = ("mesh.", "checkpoint.", "report.")
  asking = {"url", "key_variable", "concurrency", "requests_per_minute", "timeout_seconds", "retries"}
  alone = {"max_bad_steps", "precision.remat", "precision.offload", "precision.logit_chunk"}
  alone |= {f"judges.{role}.server.{name}" for role in roles for name in asking}
  alone |= {"sharding", "judges.canaries", *(f"judges.{role}.batch" for role in roles)}
  assert free == {name for name, _, _ in settings_lib.flatten(Config()) if name.startswith(groups)} | alone


# The paper.


def test_defaults_are_the_paper_s():
  """2512.20806: AdvGame-DPO-MD."""
  config = Config()
  values = {name: value for name, value, _ in settings_lib.flatten(config)}
  for name, expected in {
    "optimizer.learning_rate": 1e-6,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.weight_decay": 0.1,
    "optimizer.final_fraction": 0.2,
    "optimizer.warmup_steps": 0,
    "optimizer.clip": 1.0,
    "sampling.temperature": 0.6,
    "sampling.top_p": 0.9,
    "sampling.max_new_tokens": 2048,
    "generator": "ema",
    "reference": "ema",
    "ema_decay": 0.95,
    "frozen": False,
  }.items():
    assert values[f"attacker.{name}"] == values[f"defender.{name}"] == expected, name
  assert (config.attacker.think, config.defender.think) == (True, False)
  assert config.attacker.reference_is_generator and config.defender.reference_is_generator
  assert (config.steps, config.data.batch, config.data.order) == (2000, 32, "alternate")
  assert (config.game.attacks, config.game.responses, config.game.skip_attacker) == (2, 2, False)
  assert config.judges == Judges(
    training=Judge(kind="heuristic"), protocol="pairwise", optimistic=True, defender_reads="attack"
  )
  assert config.loss == Loss(
    kind="dpo",
    beta=0.1,
    mean_logprob=False,
    nll=0.0,
    entropy_bonus=0.0,
    normalisation="token_sum",
    importance_cap=2.0,
    baseline=config.loss.baseline,
  )

"""The whole step: who moves, who does not, what plays, and what is compiled."""

import dataclasses
import functools
import itertools
import json
import shutil
import threading

import jax
import numpy as np
import optax
import pytest
import world

from advgame_jax import checkpoint, data, ledger, microworld, scoring, train
from advgame_jax.microworld import Query
from advgame_jax.types import Category, Players, Role, Status, UserError, Verdict

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def first(world_folder):
  """The run that the others are compared to: two steps on one device."""
  run = world.open_session(world.config(world_folder))
  return run, *world.play(run, 2)


def test_both_players_learn_from_most_trees(first):
  _, recorder, states = first
  for name in Players._fields:
    assert not world.same(getattr(states[0].players, name).params, getattr(states[2].players, name).params)
    assert recorder.scalars[0][f"{name}/comparisons"] > 0
    assert np.isfinite(recorder.scalars[0][f"{name}/grad_norm"])
  assert [int(state.step) for state in states] == [0, 1, 2]
  assert recorder.trees[0].attack_status_BA.shape == (8, 2)
  assert {Status.VALID} < set(recorder.trees[0].attack_status_BA.flat)


def test_the_moving_average_moves_once_a_step(first):
  run, _, states = first
  for name in Players._fields:
    before, after = (getattr(state.players, name) for state in states[:2])
    mixed = optax.incremental_update(after.params, before.ema, 1 - getattr(run.config, name).ema_decay)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.ema, mixed)


@pytest.mark.parametrize("frozen", Players._fields)
def test_a_frozen_player_does_not_move_while_the_other_does(world_folder, frozen):
  _, (before, after) = world.play(world.open_session(world.config(world_folder, **{f"{frozen}__frozen": True})), 1)
  for name in Players._fields:
    assert world.same(getattr(before.players, name), getattr(after.players, name)) == (name == frozen)


def test_without_the_attacker_the_seeds_are_played(world_folder):
  run = world.open_session(world.config(world_folder, game__skip_attacker=True))
  recorder, (before, after) = world.play(run, 1)
  tree = recorder.trees[0]
  assert tree.attack_text_BA.tolist() == [[text] for text in tree.seeds.text_B]
  assert world.same(before.players.attacker, after.players.attacker)
  assert not world.same(before.players.defender, after.players.defender)
  assert "attacker/loss" not in recorder.scalars[0]


def test_an_unreadable_faithfulness_call_is_asked_again(first):
  run, recorder, _ = first
  calls = []

  def judge(questions):
    calls.append({question.role for question in questions})
    return [Verdict(())] * len(questions) if len(calls) == 1 else run.panel.defender(questions)

  again, _ = world.play(world.judged_by(run, judge), 1)
  assert calls[:2] == [{Role.FAITHFULNESS}] * 2
  np.testing.assert_array_equal(again.trees[0].attack_status_BA, recorder.trees[0].attack_status_BA)


def test_a_judge_that_always_fails_teaches_nothing(world_folder):
  run = world.open_session(world.config(world_folder, judges__training__failure_rate=1.0))
  recorder, (before, after) = world.play(run, 1)
  assert {Status.JUDGE_FAILED} < set(recorder.judgments[0].attack_status_BA.flat)
  assert after.step == 1
  assert world.same(before.players, after.players)


# (generator, reference) of the Attacker and of the Defender; the default is ema twice.
SOURCES = [(("train", "initial"), ("ema", "ema")), (("ema", "initial"), ("train", "ema"))]


def sources(attacker, defender):
  return {
    f"{name}__{setting}": value
    for name, values in zip(Players._fields, (attacker, defender))
    for setting, value in zip(("generator", "reference"), values)
  }


@pytest.mark.parametrize("attacker, defender", SOURCES)
def test_the_generator_s_newest_weights_play(world_folder, attacker, defender):
  slow = {f"{name}__optimizer__learning_rate": 1e-3 for name in Players._fields}  # the second step has attacks too
  run = world.open_session(world.config(world_folder, **sources(attacker, defender), **slow))
  recorder, states = world.play(run, 2)
  samples = Players(recorder.trees[1].attacks, recorder.trees[1].responses)
  for language_model, player, drawn, (generator, _) in zip(
    run.players, states[1].players, samples, (attacker, defender)
  ):
    assert drawn_from(language_model, player.params, drawn) < 1e-4 or generator == "ema"
    assert drawn_from(language_model, player.params, drawn) > 1e-2 or generator == "train"
    assert generator == "train" or drawn_from(language_model, player.ema, drawn) < 1e-4


@pytest.mark.parametrize("kind, attacker, defender", [("ipo", *SOURCES[0]), ("grpo", *SOURCES[1])])
def test_every_loss_learns_from_every_source(world_folder, kind, attacker, defender):
  """In micro-batches that do not divide the batch."""
  settings = sources(attacker, defender) | {"attacker__accumulate": 3, "defender__accumulate": 5}
  run = world.open_session(world.config(world_folder, loss__kind=kind, **settings))
  recorder, (before, after) = world.play(run, 1)
  for name in Players._fields:
    assert np.isfinite(recorder.scalars[0][f"{name}/grad_norm"]) and recorder.scalars[0][f"{name}/grad_norm"] > 0
    old, new = getattr(before.players, name), getattr(after.players, name)
    assert not world.same(old.params, new.params) and world.same(old.initial, new.initial)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


def test_a_mixture_plays_and_learns(world_folder):
  """The Defender's tokens come from the geometric mean of its weights and their average, with a third of the latter."""
  settings = {"defender__generator": "mixture", "defender__mixture": 1 / 3, "attacker__generator": "mixture"}
  run = world.open_session(world.config(world_folder, **settings))
  recorder, states = world.play(run, 2)
  player, drawn = states[1].players.defender, recorder.trees[1].responses
  mixed = scoring.Generator((player.params, player.ema), (2 / 3, 1 / 3))
  assert drawn_from(run.players.defender, mixed, drawn) < 1e-4
  assert drawn_from(run.players.defender, player.params, drawn) > 1e-3
  assert not world.same(states[1].players.attacker.params, states[2].players.attacker.params)


def test_gradients_that_are_not_finite_are_skipped_counted_and_stop_the_run(first):
  run, _, _ = first
  state = run.init_state()
  broken = state.players.attacker.params | {"embed": state.players.attacker.params["embed"].at[0, 0].set(np.nan)}
  attacker = dataclasses.replace(state.players.attacker, params=broken)  # its moving average plays on
  recorder, states = world.play(run, 2, dataclasses.replace(state, players=state.players._replace(attacker=attacker)))
  for step, (before, after) in enumerate(itertools.pairwise(states)):
    assert recorder.scalars[step]["attacker/skipped"] == 1
    assert after.players.attacker.bad_steps == step + 1
    assert world.same(before.players.attacker, dataclasses.replace(after.players.attacker, bad_steps=np.int32(step)))
    assert not world.same(before.players.defender.params, after.players.defender.params)
  state = jax.device_put(states[-1], run.state_shardings)
  with pytest.raises(UserError, match="the attacker's gradients were not finite for 3 steps in a row"):
    world.play(run, 1, state)


@pytest.mark.parametrize("asked_at", [0, 2])
def test_a_run_that_is_asked_to_stop_is_not_finished_until_it_is_evaluated(
  world_folder, tmp_path, monkeypatch, asked_at
):
  """SIGTERM comes while step `asked_at` − 1 is played, the last one included; the same call then ends the run."""
  config, folder = world.config(world_folder, steps=2, evaluation__every=2), tmp_path / "run"
  learn, stop = train.learn, threading.Event()

  def learn_and_stop(run, state, step, *rest):
    if step == asked_at - 1:
      stop.set()
    return learn(run, state, step, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(train, "learn", learn_and_stop)
    patch.setattr(train, "_stop_on_sigterm", lambda: stop)
    if asked_at == 0:
      stop.set()
    train.train(config, str(folder), devices=jax.devices()[:1])
  evaluated = lambda: [json.loads(line)["step"] for line in (folder / "evaluations.jsonl").open()]
  assert evaluated() == [0][:asked_at] and f"{asked_at} of 2" in (folder / "report.html").read_text()
  (folder / "report.html").unlink()
  train.train(config, str(folder), devices=jax.devices()[:1])
  assert evaluated() == [0, 2] and (folder / "report.html").exists()


def drawn_from(player, weights, samples):
  """How far the samples' log-probabilities are from those under parameters or a generator, at most, nats a token."""
  generator = weights if isinstance(weights, scoring.Generator) else scoring.Generator((weights,))
  R, G, T = samples.tokens_RGT.shape
  prompt_RT = np.repeat(samples.prompt_tokens_RT, G, 0)
  start_R, length_R = np.repeat(samples.prompt_length_R, G), samples.length_RG.reshape(-1)
  tokens_RT = np.zeros((R * G, prompt_RT.shape[1] + T), np.int32)
  expected_RT = np.zeros(tokens_RT.shape, np.float32)
  for r, (start, length) in enumerate(zip(start_R, length_R)):
    tokens_RT[r, :start] = prompt_RT[r, :start]
    tokens_RT[r, start : start + length] = samples.tokens_RGT.reshape(-1, T)[r, :length]
    expected_RT[r, start : start + length] = samples.plain_logprob_RGT.reshape(-1, T)[r, :length]
  slots = np.arange(tokens_RT.shape[1])
  mask_RT = (slots >= start_R[:, None]) & (slots < (start_R + length_R)[:, None])
  scored_RT = scoring.score_generator(player.model, generator, tokens_RT, mask_RT, scoring.plain_logprob, chunk=1024)
  return np.abs(np.where(mask_RT, np.asarray(scored_RT) - expected_RT, 0)).max()


def test_nothing_is_compiled_after_the_first_step(world_folder, tmp_path):
  """Harmful seeds are short and benign ones long, and take turns; the Attacker writes short queries and long ones."""
  framings = {Category.HARMFUL: "plain", Category.BENIGN: "expert"}
  framing_of = {framing.name: framing for framing in microworld.FRAMINGS}
  queries = [Query(topic, framing_of[framings[topic.category]], verb, 0) for topic in world.PLAYED for verb in range(3)]
  world.write_seeds(tmp_path / "train.jsonl", queries)
  config = world.config(
    world_folder,
    steps=8,
    data__train=(str(tmp_path / "train.jsonl"),),
    data__batch=1,
    defender__frozen=True,
    attacker__sampling__prompt_buckets=(13, 24),
    defender__sampling__prompt_buckets=(9, 24),
    evaluation__every=4,
    checkpoint__every=2,
  )
  train.train(config, str(tmp_path / "run"), devices=jax.devices()[:1])
  read = lambda name: [json.loads(line) for line in (tmp_path / "run" / name).open()]
  assert len({line["cost/compilations"] for line in read("scalars.jsonl")}) == 1

  longest = {line["step"]: len(line["seed"].split()) for line in read("transcript.jsonl")}
  assert list(longest.values()) == [7, 11] * 4  # words; the first bucket holds the seeds of 7
  assert [line["step"] for line in read("evaluations.jsonl")] == [0, 4, 8]


def test_rollouts_played_ahead_are_one_step_old_and_never_older_than_a_checkpoint(world_folder, tmp_path):
  """By hand: step 1 is played by the weights that played step 0, step 2 by its own, which a checkpoint holds."""
  config = world.config(world_folder, steps=4, overlap=True, checkpoint__every=2)
  run = world.open_session(config)
  assert [train.plays_ahead(config, step) for step in range(4)] == [True, False, True, False]
  batches, spent, recorder = (
    data.SeedBatches(run.train_seeds, config.data, config.seed),
    ledger.Ledger(1),
    world.Recorder(),
  )
  state = run.init_state()
  for step in range(4):
    if step % 2 == 0:
      policies = run.policies(state)
    played = train.play(run, policies, step, batches[step], spent)
    state = train.learn(run, state, step, played, spent, recorder, spent.scalars())

  def finish():
    train.train(config, str(tmp_path), devices=jax.devices()[:1])
    return jax.device_get(checkpoint.Checkpoints(tmp_path, config).restore(run.abstract_state)[0])

  whole = finish()
  assert world.same(whole, jax.device_get(state))
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  assert world.same(finish(), whole)
  apart = world.play(world.open_session(world.changed(config, overlap=False)), 4)[1][-1]
  assert not world.same(apart.players.defender.params, whole.players.defender.params)


def test_overlap_is_for_one_device(world_folder):
  config = world.config(world_folder, overlap=True, mesh__data=2)
  with pytest.raises(UserError, match=r"overlap is on and the mesh has 2 devices; allowed: one device"):
    world.open_session(config, devices=2)


def test_what_is_offloaded_learns_the_same_and_lies_in_the_host_s_memory(first):
  run, _, states = first
  away = world.open_session(world.changed(run.config, precision__offload=True))
  _, moved = world.play(away, len(states) - 1)
  assert world.same(moved[-1].players, states[-1].players)
  player = away.init_state().players.defender
  kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
  assert kinds((player.ema, player.optimizer)) == {"pinned_host"} and kinds(player.params) == {"device"}


def test_players_of_two_families_play_and_learn_together(world_folder, tmp_path):
  shutil.copytree(world_folder / "defender_base", tmp_path / "mistral")
  values = json.loads((tmp_path / "mistral" / "config.json").read_text())
  values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}
  (tmp_path / "mistral" / "config.json").write_text(json.dumps(values))
  run = world.open_session(world.config(world_folder, defender__model=str(tmp_path / "mistral")))
  assert [player.model.family for player in run.players] == ["llama", "mistral"]
  recorder, (before, after) = world.play(run, 1)
  tree, weights = recorder.trees[0], before.players.defender.ema
  assert drawn_from(run.players.defender, weights, tree.responses) < 1e-4  # scored in the window it was drawn in
  assert not world.same(before.players.defender.params, after.players.defender.params)

"""The joint update against an independent AdamW, and what must not move, on one device and on a mesh."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from advgame_jax import architecture, model, scoring, sharding, update
from advgame_jax import config as config_lib
from advgame_jax import state as state_lib
from advgame_jax.state import TrainState
from advgame_jax.types import Players
from advgame_jax.update import Recipe

P, T, STEPS = 8, 12, 4
OPTIMIZER = config_lib.Optimizer(learning_rate=1e-4, clip=0.5)
PRECISION = config_lib.Precision(logit_chunk=64, remat="none")


def recipes(attacker=None, defender=None, **changes):
  """An Attacker whose reference is its generator, a Defender whose moving average plays against its initial weights."""
  shared = {"optimizer": OPTIMIZER, "generator": "ema", "ema_decay": 0.9}
  players = (
    config_lib.Player(**{**shared, "reference": "ema", **(attacker or {})}),
    config_lib.Player(**{**shared, "reference": "initial", **(defender or {})}),
  )
  kinds = (config_lib.Loss(kind="dpo"), config_lib.Loss(kind="grpo", entropy_bonus=0.01))
  return Players(
    *(Recipe(tiny.CONFIG, player, loss, PRECISION, STEPS, **changes) for player, loss in zip(players, kinds))
  )


RECIPES = recipes()
FROZEN = recipes({"frozen": True}, {"frozen": True})
# Compiled in half the time; no law below is about speed.
QUICK = {"xla_backend_optimization_level": 0}
joint_update = jax.jit(update.joint_update, static_argnums=0, compiler_options=QUICK)
step = functools.partial(joint_update, RECIPES, bases={})


def moved(params, seed, scale=0.02):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), params)


def start(recipes=RECIPES):
  """A state in mid-run: the average and the initial weights differ from the weights."""

  def player(recipe, seed):
    state = state_lib.init_player(recipe.player, recipe.precision, recipe.optimizer, tiny.params(seed=seed))
    return dataclasses.replace(state, ema=moved(state.ema, 1), initial=moved(state.initial, 2), bad_steps=jnp.int32(0))

  return TrainState(players=Players(*(player(recipe, i) for i, recipe in enumerate(recipes))), step=jnp.int32(5))


def batches(seed=0):
  """Of pairs, and of three samples a prompt; one comparison in four has no weight, and one sample of the others."""
  rng = np.random.default_rng(seed)
  pair = tiny.preference_batch(rng, P, 2, T), tiny.preference_batch(rng, P, 3, T)
  live_P1 = np.arange(P)[:, None] % 4 < 3
  live_PC = np.tile(live_P1, 2), live_P1 & (np.arange(3) != 1)
  return Players(*(batch.replace(weight_PC=live.astype(np.float32)) for batch, live in zip(pair, live_PC)))


@functools.cache
def one_step():
  return jax.device_get(step(start(), batches()))


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def close(one, other, atol):
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=0), one, other)


def close_players(players, others):
  """Weights and averages to a fraction of one step, for Adam magnifies rounding where a gradient vanishes; moments
  to rounding."""
  for one, other in zip(players, others):
    close((one.params, one.ema, one.initial), (other.params, other.ema, other.initial), atol=5e-6)
    for moment, atol in (("mu", 1e-7), ("nu", 1e-8)):
      close(optax.tree.get(one.optimizer, moment), optax.tree.get(other.optimizer, moment), atol=atol)
    assert one.bad_steps == other.bad_steps
    counts = [optax.tree.get(p.optimizer, "ScaleByScheduleState").count for p in (one, other)]
    assert counts[0] == counts[1]


def replace(state, name, **changes):
  player = dataclasses.replace(getattr(state.players, name), **changes)
  return dataclasses.replace(state, players=state.players._replace(**{name: player}))


# What moves.


def test_the_attacker_s_step_equals_an_independent_adamw():
  """DPO of whole-vocabulary log-probabilities, its gradient clipped, into AdamW written out in float64."""
  before, batch = start().players.attacker, batches().attacker

  @jax.jit
  @jax.grad
  def gradient(params):
    tokens_RT, mask_RT, plain_RT = tiny.whole_rows(batch)
    logits_RTV = model.logits(tiny.CONFIG, params, model.forward(tiny.CONFIG, params, tokens_RT)[0])
    logprob_RT = jnp.take_along_axis(jax.nn.log_softmax(logits_RTV[:, :-1]), tokens_RT[:, 1:, None], 2)[..., 0]
    delta_PC = jnp.sum((logprob_RT - plain_RT[:, 1:]) * mask_RT[:, 1:], -1).reshape(P, 2)
    return jnp.mean(-jax.nn.log_sigmoid(0.1 * (delta_PC[:, 0] - delta_PC[:, 1]))[batch.weight_PC[:, 0] > 0])

  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient(before.params))
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(wide)))
  state, metrics = one_step()
  np.testing.assert_allclose(metrics["attacker/grad_norm"], norm, rtol=1e-4)
  np.testing.assert_allclose(metrics["attacker/learning_rate"], 1e-4, rtol=1e-6)
  assert norm > OPTIMIZER.clip

  def check(spec, old, new, g, mu, nu):
    g = g * OPTIMIZER.clip / norm
    decay = 0 if spec.constant is not None else OPTIMIZER.weight_decay
    expected = -1e-4 * (g / (np.abs(g) + 1e-8) + decay * np.asarray(old, np.float64))
    clear = np.abs(g) > 1e-5  # where rounding of the gradient does not decide the step
    assert clear.mean() > 0.4
    np.testing.assert_allclose((new - np.asarray(old))[clear], expected[clear], atol=3e-7)
    np.testing.assert_allclose(mu, 0.1 * g, atol=1e-6)
    np.testing.assert_allclose(nu, 0.05 * g**2, rtol=1e-3, atol=1e-9)

  player = state.players.attacker
  moments = (optax.tree.get(player.optimizer, name) for name in ("mu", "nu"))
  jax.tree.map(check, architecture.param_specs(tiny.CONFIG), before.params, player.params, wide, *moments)


def test_the_attacker_s_gradient_equals_finite_differences_in_float64():
  """Through a model that shares no code with ours, by the largest entry of every weight; read off the first moment."""
  batch = batches().attacker
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), start().players.attacker.params)
  tokens_RT, mask_RT, plain_RT = tiny.whole_rows(batch)

  def loss(params):
    logprob_RTV = tiny.log_softmax(tiny.llama_logits(tiny.CONFIG, params, tokens_RT)[:, :-1])
    logprob_RT = np.take_along_axis(logprob_RTV, tokens_RT[:, 1:, None], 2)[..., 0]
    delta_PC = np.sum((logprob_RT - plain_RT[:, 1:]) * mask_RT[:, 1:], -1).reshape(P, 2)
    return np.mean(np.log1p(np.exp(-0.1 * (delta_PC[:, 0] - delta_PC[:, 1])))[batch.weight_PC[:, 0] > 0])

  state, metrics = one_step()
  first_moment = optax.tree.get(state.players.attacker.optimizer, "mu")
  unclipped = metrics["attacker/grad_norm"] / OPTIMIZER.clip / (1 - OPTIMIZER.b1)
  for x, moment in zip(jax.tree.leaves(wide), jax.tree.leaves(first_moment), strict=True):
    at = np.unravel_index(np.argmax(np.abs(moment)), moment.shape)
    x[at] += 1e-4
    up = loss(wide)
    x[at] -= 2e-4
    down = loss(wide)
    x[at] += 1e-4
    np.testing.assert_allclose(moment[at] * unclipped, (up - down) / 2e-4, rtol=1e-3)


def test_one_step_is_counted_and_both_players_move():
  before, (after, metrics) = start(), one_step()
  assert after.step == before.step + 1
  for name in Players._fields:
    old, new = getattr(before.players, name), getattr(after.players, name)
    assert metrics[f"{name}/comparisons"] == {"attacker": 6, "defender": 12}[name]
    assert metrics[f"{name}/skipped"] == 0
    assert all((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(old.params), jax.tree.leaves(new.params)))
    assert optax.tree.get(new.optimizer, "ScaleByScheduleState").count == 1
    same(new.initial, old.initial)


def test_the_average_moves_once_towards_the_new_weights():
  before, (after, _) = start(), one_step()
  for old, new in zip(before.players, after.players):
    close(new.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, old.ema, new.params), atol=1e-6)


def test_the_rate_advances_once_a_step():
  state, _ = one_step()
  rates = []
  for _ in range(2):
    state, metrics = step(state, batches())
    rates.append(float(metrics["defender/learning_rate"]))
  np.testing.assert_allclose(
    rates, [1e-4 * (0.2 + 0.8 * (1 + np.cos(np.pi * t / STEPS)) / 2) for t in (1, 2)], rtol=1e-5
  )


def test_micro_batches_add_up_to_the_batch():
  """In 2 and in 4, some without a comparison of weight: the same weights, average, moments and metrics."""
  split = recipes({"accumulate": 2}, {"accumulate": 4})
  (state, metrics), (expected, expected_metrics) = joint_update(split, start(split), batches(), {}), one_step()
  close_players(state.players, expected.players)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), metrics, expected_metrics)


def test_a_micro_batch_without_a_comparison_runs_no_model(monkeypatch):
  runs, score = [], scoring.score_completions

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: runs.append(1))
    return score(*args, **kwargs)

  monkeypatch.setattr(scoring, "score_completions", counted)
  recipe = recipes({"accumulate": 4}).attacker
  gradient = jax.jit(functools.partial(update._gradient, recipe, bases={}), compiler_options=QUICK)
  jax.block_until_ready(gradient(start().players.attacker, batches().attacker))
  jax.effects_barrier()
  assert len(runs) == 3  # of four


def test_micro_batches_take_turns():
  parts = update.micro_batches(batches().attacker, 4)
  np.testing.assert_array_equal(parts.weight_PC[..., 0], batches().attacker.weight_PC[:, 0].reshape(2, 4).T)
  np.testing.assert_array_equal(parts.tokens_PCT[1, 1], batches().attacker.tokens_PCT[5])


# What does not.


@pytest.mark.parametrize("name", Players._fields)
def test_a_step_without_a_comparison_changes_nothing(name):
  """Not even the count of bad steps."""
  batch = batches()
  empty = getattr(batch, name)
  empty = empty.replace(weight_PC=empty.weight_PC * 0)
  before = replace(one_step()[0], name, bad_steps=np.int32(2))
  after, metrics = step(before, batch._replace(**{name: empty}))
  same(getattr(after.players, name), getattr(before.players, name))
  assert after.step == before.step + 1
  assert metrics[f"{name}/skipped"] == 1 and metrics[f"{name}/grad_norm"] == 0
  other = next(other for other in Players._fields if other != name)
  assert metrics[f"{other}/skipped"] == 0


@pytest.mark.parametrize("name", Players._fields)
@pytest.mark.parametrize("source", ["params", "weight"])
def test_gradients_that_are_not_finite_are_counted_and_change_nothing(name, source):
  before, batch = one_step()[0], batches()
  good = getattr(before.players, name).params
  if source == "params":
    spoilt = jax.tree.map(np.array, good)
    spoilt["layers"]["up"][1, 2, 3] = np.nan
    before = replace(before, name, params=spoilt)
  else:
    spoilt = getattr(batch, name)
    weight_PC = np.where(np.arange(P)[:, None] == 1, np.inf, spoilt.weight_PC)
    batch = batch._replace(**{name: spoilt.replace(weight_PC=weight_PC.astype(np.float32))})
  for bad_steps in (1, 2):
    after, metrics = step(before, batch)
    assert metrics[f"{name}/bad_steps"] == bad_steps and metrics[f"{name}/skipped"] == 1
    player = getattr(after.players, name)
    same(dataclasses.replace(player, bad_steps=np.int32(bad_steps - 1)), getattr(before.players, name))
    before = after
  after, metrics = step(replace(after, name, params=good), batches())
  assert metrics[f"{name}/bad_steps"] == 0 and metrics[f"{name}/skipped"] == 0


@pytest.mark.parametrize("name", Players._fields)
def test_players_do_not_touch_each_other(name):
  other = next(other for other in Players._fields if other != name)
  after, _ = step(start(), batches()._replace(**{other: getattr(batches(seed=1), other)}))
  same(getattr(after.players, name), getattr(one_step()[0].players, name))
  assert (
    after.players._asdict()[other].params["embed"] != one_step()[0].players._asdict()[other].params["embed"]
  ).any()


def test_frozen_players_stay_as_they_are():
  before = start(FROZEN)
  after, metrics = update.joint_update(FROZEN, before, batches(), {})
  assert metrics == {} and after.step == before.step + 1
  assert after.players.attacker is before.players.attacker and after.players.defender is before.players.defender


def test_a_batch_without_tokens_leaves_a_player_as_it_is():
  before, (attacker, defender) = start(), batches()
  nothing = attacker.replace(prompt_PS=attacker.prompt_PS[:, :0], tokens_PCT=attacker.tokens_PCT[..., :0])
  after, metrics = step(before, Players(nothing, defender))
  same(after.players.attacker, before.players.attacker)
  assert {name.split("/")[0] for name in metrics} == {"defender"}


# What the players are held near to.


def test_the_reference_is_read_from_where_the_settings_say():
  """The Attacker's from the sampler's log-probabilities alone, the Defender's from its initial weights alone."""
  expected, _ = one_step()
  shifted = Players(*(batch.replace(plain_logprob_PCT=batch.plain_logprob_PCT * 1.5) for batch in batches()))
  after, _ = step(start(), shifted)
  assert (after.players.attacker.params["embed"] != expected.players.attacker.params["embed"]).any()
  same(after.players.defender.params, expected.players.defender.params)

  state = start()
  for name in Players._fields:
    state = replace(state, name, ema=moved(getattr(state.players, name).ema, 3))
  after, _ = step(state, batches())
  same(Players(*(p.params for p in after.players)), Players(*(p.params for p in expected.players)))

  state = start()
  state = replace(state, "defender", initial=moved(state.players.defender.initial, 3))
  after, _ = step(state, batches())
  assert (after.players.defender.params["embed"] != expected.players.defender.params["embed"]).any()


def test_a_reference_that_generated_costs_no_forward_pass(monkeypatch):
  calls, forward = [], model.forward
  monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))

  def traced_forwards(reference):
    recipe = dataclasses.replace(
      RECIPES.attacker, player=dataclasses.replace(RECIPES.attacker.player, reference=reference)
    )
    calls.clear()
    both, batch = Players(recipe, recipe), Players(batches().attacker, batches().attacker)
    jax.eval_shape(functools.partial(update.joint_update, both), start(both), batch, {})
    return len(calls)

  assert traced_forwards("initial") == 2 * traced_forwards("ema") > 0


# On a mesh.


def place(mesh, recipes, state):
  """The state in the training layout: whatever has the parameters' structure is laid out as they are."""
  specs = architecture.param_specs(tiny.CONFIG)
  structure, whole = jax.tree.structure(specs), sharding.replicated(mesh)

  def lay_out(x):
    if jax.tree.structure(x) != structure:
      return whole
    return jax.tree.map(lambda s: sharding.named(mesh, sharding.TRAIN, s.axes, s.shape, s.hf_name), specs)

  where = jax.tree.map(lay_out, state, is_leaf=lambda x: jax.tree.structure(x) == structure)
  return jax.device_put(state, where), where


def test_a_mesh_updates_as_one_device_does_and_donates_its_state():
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  laid_out = recipes(layout=sharding.TRAIN)
  state, where = place(mesh, laid_out, start())
  update_ = jax.jit(
    functools.partial(update.joint_update, laid_out),
    donate_argnums=0,
    compiler_options=QUICK,
    out_shardings=(where, sharding.replicated(mesh)),
  )
  expected = start()
  with jax.set_mesh(mesh), warnings.catch_warnings():
    warnings.simplefilter("error")  # a donated buffer that is of no use is a warning
    for seed in range(2):
      before = state
      batch = sharding.to_global(batches(seed), sharding.rows_sharding(mesh, sharding.TRAIN))
      state, metrics = update_(state, batch, {})
      expected, expected_metrics = step(expected, batches(seed))
      assert all(x.is_deleted() for x in jax.tree.leaves(before))
  close_players(jax.device_get(state).players, expected.players)
  for player in state.players:
    query = player.params["layers"]["query"]
    assert query.sharding.spec == jax.P(None, ("fsdp", "sequence"), ("tensor",), None)
    assert query.addressable_shards[0].data.size * 4 == query.size
  close(jax.device_get(metrics), jax.device_get(expected_metrics), atol=1e-3)


# Costs.


def test_update_flops_count_forward_backward_remat_and_reference():
  remat = dataclasses.replace(RECIPES.defender, precision=config_lib.Precision(logit_chunk=64, remat="layer"))
  batch = tiny.preference_batch(np.random.default_rng(0), P, 2, T)
  S, head = T // 3, 2 * tiny.CONFIG.vocab * tiny.CONFIG.width
  matrices = architecture.forward_flops(tiny.CONFIG, P * (S + 2 * (T - S)), 0) - P * S * head
  attended = architecture.forward_flops(tiny.CONFIG, P * 2 * T, T / 2) - architecture.forward_flops(
    tiny.CONFIG, P * 2 * T, 0
  )
  forward = matrices + attended
  assert update.update_flops(RECIPES.attacker, batch) == 3 * forward
  assert update.update_flops(RECIPES.defender, batch) == 4 * forward
  assert update.update_flops(remat, batch) == 5 * forward
  assert update.update_flops(FROZEN.attacker, batch) == 0


def test_update_flops_leave_out_the_parts_that_do_not_run():
  batch = tiny.preference_batch(np.random.default_rng(0), P, 2, T)
  idle = batch.replace(weight_PC=np.tile(np.arange(P)[:, None] % 4 == 1, 2).astype(np.float32))
  recipe = lambda accumulate: recipes({"accumulate": accumulate}).attacker
  assert update.update_flops(recipe(4), idle) == update.update_flops(recipe(4), batch) / 4
  assert update.update_flops(recipe(1), idle) == update.update_flops(recipe(1), batch)
  assert update.update_flops(recipe(3), batch) == update.update_flops(recipe(1), batch) * 9 / P  # padded to three parts

"""What is stored in bfloat16 follows what is stored in float32, where rounding to the nearest stands still."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from advgame_jax import config as config_lib
from advgame_jax import optimizers, rounding, sharding
from advgame_jax import state as state_lib

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(5)
F32, BF16 = jnp.float32, jnp.bfloat16
RATE = optax.cosine_decay_schedule(1e-2, 600)
MASK = {"w": True, "v": False}


@pytest.fixture(params=["stochastic", "nearest"])
def rounds(request, monkeypatch) -> bool:
  """Whether rounding is the one that must work, or the one that must be seen to fail."""
  if request.param == "nearest":
    monkeypatch.setattr(rounding, "stochastic_round", lambda x, key, dtype: x.astype(dtype))
  return request.param == "stochastic"


def make(moments=F32, seed=0, b2=0.95):
  return optimizers.adamw(RATE, 0.9, b2, weight_decay=0.1, mask=MASK, moments=moments, seed=seed)


def weights(dtype=F32):
  w, v = 3 * jax.random.normal(KEY, (2, 64, 32))
  return {"w": w.astype(dtype), "v": v.astype(dtype)}


def gradient(params):
  """Of Σ x⁴ / 4: it shrinks a thousandfold on the way, and the second moment a millionfold."""
  return jax.tree.map(lambda x: x.astype(F32) ** 3, params)


def run(optimizer, steps, params):
  """The weights and the optimiser's state after so many steps."""

  def step(carry, i):
    params, state = carry
    updates, state = optimizer.update(gradient(params), state, params)
    return (optimizers.apply_updates(params, updates, jax.random.fold_in(KEY, i)), state), None

  return jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(steps))[0])((params, optimizer.init(params)))


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_all_in_float32_is_optax_bit_for_bit():
  ours, theirs = make(), optax.adamw(RATE, 0.9, 0.95, weight_decay=0.1, mask=MASK)

  def step(update, apply, average, params, ema, state):
    updates, state = update(gradient(params), state, params)
    params = apply(params, updates)
    return params, average(params, ema), state

  theirs_average = lambda p, e: optax.incremental_update(p, e, 1 - 0.95)
  reference = functools.partial(step, theirs.update, optax.apply_updates, theirs_average)
  candidate = functools.partial(
    step,
    ours.update,
    lambda p, u: optimizers.apply_updates(p, u, KEY),
    lambda p, e: optimizers.average(p, e, 0.95, KEY),
  )
  for wrap in (lambda f: f, jax.jit):
    found = (weights(), weights(), ours.init(weights()))
    expected = (weights(), weights(), theirs.init(weights()))
    for _ in range(3):
      found, expected = wrap(candidate)(*found), wrap(reference)(*expected)
    assert_same(found, expected)


@pytest.mark.parametrize("stored", [F32, BF16])
@pytest.mark.parametrize("moments", [F32, BF16])
def test_moments_are_of_their_own_dtype_whatever_the_weights_are(stored, moments):
  optimizer = make(moments)
  state = optimizer.init(weights(stored))
  updates, later = optimizer.update(gradient(weights(stored)), state, weights(stored))
  for held in (state, later):
    adam = optax.tree.get(held, "ScaleByAdamState")
    assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(moments)}
    assert adam.count.dtype == jnp.int32
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(F32)}


@pytest.mark.parametrize("b2,limit", [(0.95, 0.002), (0.999, 0.006)])
def test_moments_in_bfloat16_end_where_float32_ends(b2, limit, rounds):
  """Distance of the ends as a part of the way, and the second moment by its median ratio.

  To the nearest, a second moment of 0.999 never decays, and one of 0.95 ends three per cent below.
  """
  start = weights()
  wide, expected = run(make(F32, b2=b2), 600, start)
  low, found = run(make(BF16, b2=b2), 600, start)
  distance = optax.tree.norm(optax.tree.sub(low, wide)) / optax.tree.norm(optax.tree.sub(wide, start))
  second = lambda state: optax.tree.get(state, "nu")["v"].astype(F32)
  off = abs(float(jnp.median(second(found) / second(expected))) - 1)
  assert (distance < limit and off < 0.01) if rounds else (distance > limit and off > 0.02)


def test_small_steps_of_weights_in_bfloat16_arrive_on_average(rounds):
  """1,000 steps of a sixtieth of the spacing of bfloat16 each."""
  step = {"w": jnp.full((64, 64), 1.2e-4, F32)}
  apply = lambda params, i: (optimizers.apply_updates(params, step, jax.random.fold_in(KEY, i)), None)
  params, _ = jax.lax.scan(apply, {"w": jnp.ones((64, 64), BF16)}, jnp.arange(1000))
  moved = float(params["w"].astype(F32).mean()) - 1
  assert moved == pytest.approx(0.12, rel=0.02) if rounds else moved == 0


def test_an_average_in_bfloat16_follows_a_slow_weight(rounds):
  """A weight of 0.02 drifts 1e-6 a step, as under the paper's rate; its average drifts behind it."""
  start = jnp.full((64, 64), 0.02, BF16).astype(F32)

  def step(carry, i):
    low, wide = carry
    params = start + 1e-6 * i
    key = jax.random.fold_in(KEY, i)
    return (optimizers.average(params, low, 0.95, key), optimizers.average(params, wide, 0.95, key)), None

  (low, wide), _ = jax.lax.scan(step, (start.astype(BF16), start), jnp.arange(1000))
  moved, expected = float((low.astype(F32) - start).mean()), float((wide - start).mean())
  assert expected == pytest.approx(0.98e-3, rel=0.01)
  assert moved == pytest.approx(expected, rel=0.03) if rounds else moved == 0


def test_a_step_taken_twice_is_the_same_and_draws_follow_from_seed_and_step():
  optimizer = make(BF16)
  params, state = run(optimizer, 3, weights(BF16))
  assert int(state.step) == 3
  step = lambda optimizer, state: jax.jit(optimizer.update)(gradient(params), state, params)[1].inner
  differ = lambda a, b: max(float(jnp.mean(x != y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  after = step(optimizer, state)
  assert_same(step(make(BF16), jax.tree.map(jnp.copy, state)), after)
  assert differ(step(make(BF16, seed=1), state), after) > 0.1
  assert differ(step(optimizer, state._replace(step=state.step + 1)), after) > 0.1


def test_eight_devices_give_the_bits_of_one():
  optimizer = make(BF16)
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  where = jax.tree.map(lambda x: sharding.named(mesh, sharding.TRAIN, ("width", "heads"), x.shape, "w"), weights())
  whole = sharding.replicated(mesh)
  held = optax.tree.map_params(
    optimizer, lambda _, w: w, optimizer.init(weights(BF16)), where, transform_non_params=lambda _: whole
  )

  def step(params, ema, state):
    first, second = jax.random.split(jax.random.fold_in(KEY, state.step))
    updates, state = optimizer.update(gradient(params), state, params)
    params = optimizers.apply_updates(params, updates, first)
    return params, optimizers.average(params, ema, 0.95, second), state

  alone = (weights(BF16), weights(BF16), optimizer.init(weights(BF16)))
  spread = jax.device_put(alone, (where, where, held))
  sharded = jax.jit(step, out_shardings=(where, where, held))
  for _ in range(3):
    alone, spread = jax.jit(step)(*alone), sharded(*spread)
  assert optax.tree.get(spread[2], "mu")["w"].sharding.is_equivalent_to(where["w"], 2)
  assert_same(spread, alone)


def test_the_rate_is_found_and_moments_are_placed_like_weights():
  settings = config_lib.Optimizer()
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optimizers.adamw(state_lib.schedule(settings, 10), 0.9, 0.95, weight_decay=0.1, moments=BF16),
  )
  params = tiny.params()
  state = optimizer.init(params)
  player = state_lib.PlayerState(params, {}, {}, state, jnp.int32(0))  # type: ignore[arg-type]
  assert state_lib.learning_rate(settings, 10, player) == pytest.approx(1e-6)
  _, state = jax.eval_shape(optimizer.update, params, state, params)
  names = jax.tree.map(lambda _: "placed", params)
  found = optax.tree.map_params(optimizer, lambda _, name: name, state, names, transform_non_params=lambda _: "whole")
  leaves = jax.tree.leaves(found)
  assert leaves.count("placed") == 2 * len(jax.tree.leaves(params))
  assert leaves.count("whole") == 3  # Adam's count, the schedule's, ours


def test_an_update_holds_no_float32_copy_of_what_is_stored_low():
  """Beyond its arguments and results an update of a leaf needs a fiftieth of the leaf."""
  optimizer = optimizers.adamw(1e-3, 0.9, 0.95, weight_decay=0.1, moments=BF16)
  wide, low = (jax.ShapeDtypeStruct((512, 512), dtype) for dtype in (F32, BF16))
  state = jax.eval_shape(optimizer.init, low)

  def weigh(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

  assert weigh(optimizer.update, wide, state, low) < 0.02 * 4 * wide.size
  assert weigh(optimizers.apply_updates, low, wide, KEY) < 0.02 * 4 * wide.size
  assert weigh(lambda p, e, key: optimizers.average(p, e, 0.95, key), low, low, KEY) < 0.02 * 4 * wide.size

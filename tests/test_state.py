"""The schedule's values, which weights a player holds, and which of them play or hold it back."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny

from advgame_jax import architecture
from advgame_jax import config as config_lib
from advgame_jax import state as state_lib

OPTIMIZER = state_lib.make_optimizer(config_lib.Optimizer(), 10, architecture.param_specs(tiny.CONFIG))
SOURCES = list(itertools.product(["train", "ema"], ["initial", "ema"]))


def player(**changes):
  settings = config_lib.Player(**changes)
  return settings, state_lib.init_player(settings, config_lib.Precision(), OPTIMIZER, tiny.params())


def test_schedule_is_a_cosine_from_the_peak_to_a_fraction_of_it():
  schedule = state_lib.schedule(config_lib.Optimizer(learning_rate=2.0, final_fraction=0.2), 100)
  expected = [2 * (0.2 + 0.8 * (1 + np.cos(np.pi * t / 100)) / 2) for t in (0, 25, 50, 100)]
  np.testing.assert_allclose([schedule(t) for t in (0, 25, 50, 100)], expected, rtol=1e-6)
  np.testing.assert_allclose([schedule(0), schedule(50), schedule(100), schedule(500)], [2.0, 1.2, 0.4, 0.4], rtol=1e-6)


def test_warm_up_is_linear_and_ends_at_the_peak():
  schedule = state_lib.schedule(config_lib.Optimizer(learning_rate=2.0, warmup_steps=4), 20)
  np.testing.assert_allclose([schedule(t) for t in (0, 1, 2, 4, 20)], [0, 0.5, 1.0, 2.0, 0.4], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_no_longer_than_its_warm_up_has_a_schedule(steps):
  schedule = state_lib.schedule(config_lib.Optimizer(warmup_steps=4), steps)
  assert np.isfinite([schedule(t) for t in range(6)]).all()


@pytest.mark.parametrize("generator,reference", SOURCES)
def test_a_player_holds_what_its_settings_call_for(generator, reference):
  settings, state = player(generator=generator, reference=reference)
  assert bool(state.ema) == ("ema" in (generator, reference))
  assert bool(state.initial) == (reference == "initial")
  (member,) = state_lib.generator(settings, state).members
  assert member is {"train": state.params, "ema": state.ema}[generator]
  assert state_lib.reference(settings, state) is {"initial": state.initial, "ema": state.ema}[reference]
  assert settings.reference_is_generator == ((generator, reference) == ("ema", "ema"))


def test_what_a_rounded_cache_says_is_not_the_reference():
  rounded = config_lib.Sampling(cache="int8")
  assert config_lib.Player().reference_is_generator
  assert not config_lib.Player(sampling=rounded).reference_is_generator


@pytest.mark.parametrize("reference", ["initial", "ema"])
def test_a_mixture_is_of_what_learns_and_its_reference(reference):
  settings, state = player(generator="mixture", mixture=0.25, reference=reference)
  generator = state_lib.generator(settings, state)
  assert generator.members[0] is state.params and generator.members[1] is getattr(state, reference)
  assert generator.share == (0.75, 0.25) and not settings.reference_is_generator


@pytest.mark.parametrize("generator,reference", SOURCES)
def test_a_frozen_player_holds_its_weights_alone_and_plays_them(generator, reference):
  settings, state = player(generator=generator, reference=reference, frozen=True)
  assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(tiny.params())) + 1
  (member,) = state_lib.generator(settings, state).members
  assert member is state.params


def test_no_two_leaves_share_a_buffer():
  """Donation needs it; the caller's weights are not donated either."""
  _, state = player(generator="ema", reference="initial")
  leaves = [*jax.tree.leaves(state), *jax.tree.leaves(tiny.params())]
  assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
  for held in (state.params, state.ema, state.initial):
    jax.tree.map(np.testing.assert_array_equal, held, tiny.params())


def test_the_rate_follows_the_optimiser_s_own_count():
  settings = config_lib.Optimizer()
  _, state = player()
  assert state_lib.learning_rate(settings, 10, state) == pytest.approx(1e-6)
  later = jax.tree.map(lambda x: x + 10 if x.dtype == np.int32 else x, state.optimizer)
  state = dataclasses.replace(state, optimizer=later)
  assert state_lib.learning_rate(settings, 10, state) == pytest.approx(0.2e-6)

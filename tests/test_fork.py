"""Rows of a prompt and its completions against whole rows: the same scores and gradients, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import architecture, lora, losses, model, scoring, sharding
from advgame_jax import config as config_lib
from advgame_jax import fork as forks
from advgame_jax.architecture import LayerKind, Rope
from advgame_jax.matrices import quantise

pytestmark = pytest.mark.usefixtures("compile_quickly")

P, C, T = 8, 3, 24  # tokens of whole rows; a third of them are slots of the prompt
S = T // 3
WINDOWED = dataclasses.replace(tiny.CONFIG, kinds=(LayerKind(Rope(100.0), window=5), LayerKind(Rope(100.0))))
MESHES = {
  "rows": {"data": 2, "fsdp": 4},
  "heads": {"data": 2, "fsdp": 2, "tensor": 2},
  "tokens": {"fsdp": 4, "sequence": 2},
}


@pytest.fixture(scope="module")
def batch():
  """The first prompt fills its slots, the second is one token, the last comparison is padding: no tokens at all.

  Of the others one completion has no weight, and another no tokens either.
  """
  rng = np.random.default_rng(3)
  batch = tiny.preference_batch(rng, P, C, T)
  batch.prompt_length_P[:2], batch.length_PC[0] = (S, 1), T - S
  for x in (batch.prompt_PS, batch.prompt_length_P, batch.tokens_PCT, batch.length_PC, batch.weight_PC):
    x[-1] = 0
  batch.weight_PC[1, :2] = batch.length_PC[1, 1] = batch.tokens_PCT[1, 1] = 0
  batch.prompt_PS[0] = rng.integers(1, tiny.CONFIG.vocab, S)
  batch.tokens_PCT[0] = rng.integers(1, tiny.CONFIG.vocab, (C, T - S))
  return batch


def joined(batch):
  return forks.join(batch.prompt_PS, batch.prompt_length_P, batch.tokens_PCT)


def whole_scores(config, params, batch):
  """Of whole rows [P·C, S + T], which know nothing of forks; as [P, C, T]."""
  rows = tiny.whole_rows(batch)
  scored_RT = scoring.score(config, params, rows.tokens_RT, rows.mask_RT)
  at_PCT = batch.prompt_length_P[:, None, None] + np.arange(T - S) + np.zeros((1, C, 1), int)
  return jnp.take_along_axis(scored_RT.reshape(P, C, T), at_PCT, 2) * losses.live_tokens(batch)


def fork_scores(config, params, batch, **how):
  given = batch.prompt_PS, batch.prompt_length_P, batch.tokens_PCT, losses.live_tokens(batch)
  return scoring.score_completions(config, params, *given, **how)


def test_whole_rows_are_prompt_completion_and_zeros(batch):
  fork, tokens_PX = joined(batch)
  np.testing.assert_array_equal(fork.whole_rows(tokens_PX), tiny.whole_rows(batch).tokens_RT)


def test_one_row_is_the_way_back_and_zeros_in_front(batch):
  fork, tokens_PX = joined(batch)
  np.testing.assert_array_equal(fork.one_row(fork.whole_rows(tokens_PX)), tokens_PX)


def test_places_are_those_in_whole_rows(batch):
  fork, _ = joined(batch)
  place_RT = fork.whole_rows(fork.place_PX).reshape(P, C, T)
  for p in range(P):
    stop = batch.prompt_length_P[p] + T - S
    np.testing.assert_array_equal(place_RT[p, :, :stop], np.tile(np.arange(stop), (C, 1)))


@pytest.mark.parametrize("name", ["whole_rows", "one_row"])
def test_ways_have_their_own_transposes(batch, name):
  """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, for Aᵀ is written by hand."""
  fork, tokens_PX = joined(batch)
  rng, x_PX = np.random.default_rng(0), np.zeros((*tokens_PX.shape, 2, 3))
  shape = x_PX.shape if name == "whole_rows" else fork.whole_rows(x_PX).shape
  x = jnp.asarray(rng.normal(size=shape))
  there, back = jax.vjp(getattr(fork, name), x)
  y = jnp.asarray(rng.normal(size=there.shape), there.dtype)
  np.testing.assert_allclose(jnp.vdot(there, y), jnp.vdot(x, back(y)[0]), rtol=1e-5)


def test_in_front_of_each_token_is_the_one_before(batch):
  fork, tokens_PX = joined(batch)
  before_PCT = fork.in_front(tokens_PX).reshape(P, C, T - S)
  np.testing.assert_array_equal(before_PCT[:, :, 1:], batch.tokens_PCT[:, :, :-1])
  np.testing.assert_array_equal(before_PCT[:, :, 0], np.tile(batch.prompt_PS[:, -1:], (1, C)))


@pytest.mark.parametrize("remat", ["none", "products", "layer"])
@pytest.mark.parametrize("config", [tiny.CONFIG, WINDOWED], ids=["plain", "windows"])
def test_scores_and_gradients_are_those_of_whole_rows(batch, config, remat):
  params = tiny.params(config)
  weight_PCT = np.random.default_rng(1).normal(size=batch.tokens_PCT.shape).astype(np.float32)
  both = lambda score, **how: jax.value_and_grad(
    lambda params: (lambda x: (jnp.sum(x * weight_PCT), x))(score(config, params, batch, **how)), has_aux=True
  )(params)
  (_, expected_PCT), expected = both(whole_scores)
  (_, got_PCT), got = both(fork_scores, chunk=32, remat=remat)
  np.testing.assert_allclose(got_PCT, expected_PCT, atol=2e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4), got, expected)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_mesh_scores_and_learns_the_same(batch, sizes):
  mesh, params = tiny.mesh(**sizes), tiny.params()
  rows = sharding.rows_sharding(mesh, sharding.TRAIN)
  sharded = sharding.to_global(batch, rows)
  total = lambda params, batch, **how: (lambda x: (jnp.sum(x), x))(fork_scores(tiny.CONFIG, params, batch, **how))
  both = jax.value_and_grad(total, has_aux=True)
  with jax.set_mesh(mesh):
    (_, got_PCT), got = jax.jit(functools.partial(both, layout=sharding.TRAIN))(params, sharded)
  (_, expected_PCT), expected = both(params, batch)
  np.testing.assert_allclose(got_PCT, expected_PCT, atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-4), got, expected)


def test_what_pads_a_comparison_reaches_nothing(batch):
  """Other tokens in front of prompts and behind completions: the same scores, and no gradient of their own."""
  in_prompt_PS = np.arange(S) >= S - batch.prompt_length_P[:, None]
  live_PCT = np.asarray(losses.live_tokens(batch))
  spoilt = batch.replace(
    prompt_PS=np.where(in_prompt_PS, batch.prompt_PS, 7), tokens_PCT=np.where(live_PCT, batch.tokens_PCT, 9)
  )
  total = lambda batch: jax.value_and_grad(lambda params: jnp.sum(fork_scores(tiny.CONFIG, params, batch)))
  one, other = total(batch)(tiny.params()), total(spoilt)(tiny.params())
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one, other)


def test_more_slots_change_nothing(batch):
  """Wider prompts and completions, padded: the same scores, gradients too."""
  wider = batch.replace(
    prompt_PS=np.pad(batch.prompt_PS, ((0, 0), (5, 0))), tokens_PCT=np.pad(batch.tokens_PCT, ((0, 0), (0, 0), (0, 3)))
  )
  total = lambda params, batch: jnp.sum(fork_scores(tiny.CONFIG, params, batch))
  both = lambda batch: jax.value_and_grad(total)(tiny.params(), batch)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), both(wider), both(batch))


def test_a_measure_may_give_several_numbers(batch):
  rows, params = tiny.whole_rows(batch), tiny.params()
  _, expected_RT = scoring.score(tiny.CONFIG, params, rows.tokens_RT, rows.mask_RT, scoring.logprob_and_entropy)
  _, got_PCT = fork_scores(tiny.CONFIG, params, batch, measure=scoring.logprob_and_entropy)
  assert got_PCT.shape == batch.tokens_PCT.shape
  expected_R = jnp.sum(expected_RT, -1) * batch.weight_PC.reshape(-1)
  np.testing.assert_allclose(jnp.sum(got_PCT, -1).reshape(-1), expected_R, rtol=1e-5)


def test_adapters_and_eight_bits_score_as_in_whole_rows(batch):
  adapters = config_lib.Lora(rank=4)
  drawn = lora.init(lora.adapter_specs(tiny.CONFIG, adapters), jax.random.key(0))
  learnt = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32), drawn)
  stacks, specs = tiny.params()["layers"], architecture.param_specs(tiny.CONFIG)["layers"]
  narrow = {name: quantise(stacks[name], specs[name].stacked, specs[name].inputs) for name in config_lib.MATRICES}
  params = lora.attach({**tiny.params(), "layers": stacks | narrow}, lora.scale(learnt, adapters))
  expected_PCT = whole_scores(tiny.CONFIG, params, batch)
  np.testing.assert_allclose(fork_scores(tiny.CONFIG, params, batch), expected_PCT, atol=2e-5)


def test_rows_that_fork_have_no_prefix_and_are_not_packed(batch):
  fork, tokens_PX = joined(batch)
  segments_PX = jnp.zeros(tokens_PX.shape, jnp.int32)
  with pytest.raises(ValueError, match="no prefix and are not packed"):
    model.forward(tiny.CONFIG, tiny.params(), tokens_PX, place_RT=fork.place_PX, fork=fork, segment_RT=segments_PX)

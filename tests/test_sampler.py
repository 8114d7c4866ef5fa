"""The token draw's distribution, rows' keys, the automaton of stops, and the next token's probabilities."""

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame_jax import model, sampler, scoring

ONE = np.nextafter(np.float32(1), np.float32(0))  # the largest uniform

# The draw.

draw = jax.jit(lambda weight_RV, uniform_R: sampler.draw(weight_RV, uniform_R)[0])


def follow(density_V, draws=200_000, drawn_from=None):
  """Whether so many draws follow the density: χ² at 1e-4, rare tokens counted together, and none of mass 0."""
  uniform_nR = np.asarray(jax.random.uniform(jax.random.key(0), (draws // 2_000, 2_000)))
  density_RV = np.broadcast_to(density_V if drawn_from is None else drawn_from, (2_000, len(density_V)))
  counts_V = sum(np.bincount(draw(density_RV, uniform_R), minlength=len(density_V)) for uniform_R in uniform_nR)
  expected_V = uniform_nR.size * density_V.astype(np.float64)
  often = expected_V >= 5
  observed, expected = (np.append(x[often], x[~often].sum()) for x in (counts_V, expected_V))
  observed, expected = (x[expected > 0] for x in (observed, expected))
  statistic, degrees = np.sum((observed - expected) ** 2 / expected), len(expected) - 1
  # Wilson & Hilferty's normal approximation of χ²; 3.72 is the quantile of 1 − 1e-4.
  deviation = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
  return deviation < 3.72 and not counts_V[density_V == 0].any()


def peaked():
  """Over 1,100 tokens, of which a third have probability 0; half of the mass is on one."""
  rng = np.random.default_rng(0)
  density_V = rng.dirichlet(np.full(1100, 0.3)) * (rng.random(1100) < 2 / 3)
  density_V = np.where(density_V > 1e-5, density_V, 0)
  density_V[500] = density_V.sum()
  return (density_V / density_V.sum()).astype(np.float32)


def test_draws_follow_a_peaked_density_and_never_leave_it():
  assert follow(peaked())
  assert not follow(peaked(), drawn_from=0.98 * peaked() + 0.02 * np.roll(peaked() * (peaked() < 0.5), 1) / 0.5)


def test_draws_follow_the_nucleus_of_a_large_vocabulary():
  """At a temperature, over 49,152 tokens, of which the nucleus keeps some."""
  logits_XV = 3 * np.random.default_rng(3).normal(size=(1, 49_152)).astype(np.float32)
  density_V = np.asarray(scoring.behaviour(logits_XV, scoring.Choice(0.8, 0.9)))[0]
  assert 500 < np.sum(density_V > 0) < 5_000
  assert follow(density_V, draws=100_000)


@pytest.mark.parametrize("support", [[0], [299], [128], [127, 128], [3, 130, 290]], ids=str)
def test_the_least_and_the_largest_uniform_stay_in_the_support(support):
  density_RV = np.zeros((2, 300), np.float32)
  density_RV[:, support] = 1 / len(support)
  np.testing.assert_array_equal(draw(density_RV, np.array([0, ONE])), [support[0], support[-1]])


def test_no_rounding_of_the_cumulative_mass_draws_a_token_of_mass_0():
  """Uniforms on and beside the boundaries between tokens, where a parallel sum is not monotone."""
  rng = np.random.default_rng(0)
  R, V = 2048, 1000
  density_RV = rng.dirichlet(np.full(V, 0.05), R).astype(np.float32)
  density_RV = np.where(density_RV < 1e-5, 0, density_RV)
  density_RV /= density_RV.sum(-1, keepdims=True)
  boundary_R = np.cumsum(density_RV, -1)[np.arange(R), rng.integers(0, V, R)]
  for towards in (0, 0.5, 2):
    uniform_R = np.clip(np.nextafter(boundary_R, np.float32(towards)), 0, ONE)
    assert (density_RV[np.arange(R), draw(density_RV, uniform_R)] > 0).all()


def test_the_draw_is_the_inverse_of_the_cumulative_density():
  density_RV = np.random.default_rng(1).dirichlet(np.ones(300), 200).astype(np.float32)
  uniform_R = np.random.default_rng(2).random(200).astype(np.float32)
  expected_R = np.argmax(np.cumsum(density_RV.astype(np.float64), -1) > uniform_R[:, None], -1)
  assert np.mean(draw(density_RV, uniform_R) == expected_R) >= 0.99  # but for rounding at a boundary


def test_row_keys_are_folded_from_prompt_then_sample():
  key = jax.random.key(7)
  keys_R = jax.random.key_data(sampler.row_keys(key, np.arange(3), 2)).reshape(3, 2, -1)
  expected = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, 2), 1))
  np.testing.assert_array_equal(keys_R[2, 1], expected)


def stops_after(table_SV, tokens):
  """How many tokens until the automaton stops, None if it does not."""
  state = 0
  for count, token in enumerate(tokens, 1):
    state = table_SV[state, token]
    if state == len(table_SV) - 1:
      return count
  return None


@pytest.mark.parametrize(
  "texts,stops,tokens,expected",
  [
    (["a</p>b", "c"], ["</p>"], [1, 0, 1], 2),  # inside one token
    (["</", "p", ">", "x"], ["</p>"], [0, 1, 3, 0, 1, 2], 6),  # across tokens, after a false start
    (["a", "b", "c"], ["aab"], [0, 0, 0, 1], 4),  # overlapping with itself
    (["a", "b", "c"], ["abab", "bc"], [0, 1, 0, 1], 4),  # the first of several
    (["a", "b", "c"], ["abab", "bc"], [0, 1, 2], 3),  # the second, begun inside the first
    (["a", "b", "c"], ["abcc", "b"], [0, 1], 2),  # one inside another
    (["a", "", "b"], ["ab"], [0, 1, 2], 3),  # across a token without text
    (["a", "b"], [], [0, 1], None),
  ],
)
def test_stop_strings(texts, stops, tokens, expected):
  assert stops_after(sampler.stop_table(texts, [], stops), tokens) == expected


def test_stop_ids_stop_in_every_state_and_a_stop_stays():
  table_SV = sampler.stop_table(["a", "b", "x"], [2], ["aab"])
  assert (table_SV[:, 2] == len(table_SV) - 1).all()
  assert (table_SV[-1] == len(table_SV) - 1).all()
  assert table_SV.dtype == np.int16 and table_SV.shape == (4, 3)


word = st.text("ab<", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
  texts=st.lists(st.text("ab<c", max_size=4), min_size=1, max_size=6),
  stops=st.lists(word, min_size=1, max_size=3),
  draws=st.lists(st.integers(0, 5), max_size=20),
)
def test_the_automaton_equals_a_search_in_the_text(texts, stops, draws):
  tokens = [i % len(texts) for i in draws]
  found = (n for n in range(1, len(tokens) + 1) if any(s in "".join(texts[t] for t in tokens[:n]) for s in stops))
  assert stops_after(sampler.stop_table(texts, [], stops), tokens) == next(found, None)


def test_the_next_tokens_probability_is_summed_over_each_labels_tokens():
  config, params = tiny.CONFIG, tiny.params()
  tokens_XT = np.random.default_rng(0).integers(1, config.vocab, (8, 7)).astype(np.int32)
  last_Q = 7 * np.arange(8) + np.array([5, 2, 7, 1, 6, 3, 4, 7]) - 1
  last_QM, _ = sampler.read(config, params, tokens_XT, None, None, last_Q)
  labels_CV = np.zeros((2, config.vocab), bool)
  labels_CV[0, [3, 8]] = labels_CV[1, 100] = True
  logprob_QC = sampler.next_token(config, params, last_QM, labels_CV)
  probability_QV = np.exp(tiny.log_softmax(np.asarray(model.logits(config, params, last_QM))))
  expected_QC = np.stack([probability_QV[:, [3, 8]].sum(-1), probability_QV[:, 100]], -1)
  np.testing.assert_allclose(np.exp(logprob_QC), expected_QC, rtol=1e-5)

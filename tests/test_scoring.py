"""Chunked scoring against a float64 log-softmax, the nucleus against a sort, and the memory claim itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import scoring
from advgame_jax.scoring import Choice

CONFIG = dataclasses.replace(tiny.CONFIG, vocab=300)
PARAMS = tiny.params(CONFIG)
R, T = 4, 16
RNG = np.random.default_rng(0)
TOKENS_RT = RNG.integers(0, CONFIG.vocab, (R, T)).astype(np.int32)
MASK_RT = RNG.random((R, T)) < 0.5
MASK_RT[:, 0] = False
MASK_RT[:, 5:10] = False  # a stretch without a masked token
LOGPROB_RTV = tiny.log_softmax(tiny.llama_logits(CONFIG, PARAMS, TOKENS_RT))[:, :-1]


@functools.partial(jax.jit, static_argnames=("measure", "chunk"))
def score(params, tokens_RT, mask_RT, measure=scoring.plain_logprob, chunk=8):
  return scoring.score(CONFIG, params, tokens_RT, mask_RT, measure, chunk=chunk)


def at_token(x_RTV):
  """[R, T − 1, V] → [R, T] at the tokens that follow, 0 outside the mask."""
  chosen_RT = np.take_along_axis(x_RTV, TOKENS_RT[:, 1:, None], 2)[..., 0]
  return np.where(MASK_RT, np.pad(chosen_RT, ((0, 0), (1, 0))), 0)


@pytest.mark.parametrize("vocab", [1, 128, 300])
def test_a_log_probability_and_its_slopes_are_those_of_a_log_softmax(vocab):
  """Of a vocabulary that fills its last stripe and of one that does not; of a logit far below all others, and of a row
  far from zero, whose numbers are coarse.
  """
  logits_XV = jnp.array(RNG.normal(0, 5, (6, vocab)), jnp.float32).at[0, 0].set(-1e5).at[1].add(1e4)
  token_X, slope_X = jnp.array([0, *RNG.integers(0, vocab, 5)]), jnp.array(RNG.normal(size=6), jnp.float32)
  expected = lambda logits_XV: jax.nn.log_softmax(logits_XV)[jnp.arange(6), token_X]
  found, back = jax.vjp(lambda logits_XV: scoring.plain_logprob(logits_XV, token_X), logits_XV)
  np.testing.assert_allclose(found, expected(logits_XV), rtol=1e-6, atol=2e-6)
  np.testing.assert_allclose(*back(slope_X), *jax.vjp(expected, logits_XV)[1](slope_X), atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 8, 10_000])
def test_score_equals_a_float64_log_softmax_whatever_the_chunk(chunk):
  scored_RT = score(PARAMS, TOKENS_RT, MASK_RT, chunk=chunk)
  np.testing.assert_allclose(scored_RT, at_token(LOGPROB_RTV), atol=5e-5)
  np.testing.assert_array_equal(np.asarray(scored_RT)[~MASK_RT], 0)


def test_entropy_equals_its_definition():
  logprob_RT, entropy_RT = score(PARAMS, TOKENS_RT, MASK_RT, measure=scoring.logprob_and_entropy)
  expected_RT = np.pad(-(np.exp(LOGPROB_RTV) * LOGPROB_RTV).sum(-1), ((0, 0), (1, 0)))
  np.testing.assert_allclose(entropy_RT, np.where(MASK_RT, expected_RT, 0), atol=5e-5)
  np.testing.assert_allclose(logprob_RT, at_token(LOGPROB_RTV), atol=5e-5)


def test_gradient_does_not_depend_on_the_chunk_and_stays_inside_the_mask():
  weight_RT = RNG.normal(size=(R, T)).astype(np.float32)

  @functools.partial(jax.jit, static_argnames="chunk")
  def gradient(params, weight_RT, chunk):
    return jax.grad(lambda p: jnp.sum(weight_RT * scoring.score(CONFIG, p, TOKENS_RT, MASK_RT, chunk=chunk)))(params)

  small, whole = gradient(PARAMS, weight_RT, 8), gradient(PARAMS, weight_RT, 10_000)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), small, whole)
  hidden = gradient(PARAMS, np.where(MASK_RT, 0, weight_RT), 8)
  assert all((x == 0).all() for x in jax.tree.leaves(hidden))


behaviour = jax.jit(scoring.behaviour)
LOGITS_XV = np.concatenate(
  [
    RNG.normal(size=(4, 300)) * 3,  # all distinct
    np.round(RNG.normal(size=(3, 300))),  # many ties
    np.zeros((1, 300)),  # nothing but ties
    np.where(np.arange(300) == 7, 60.0, 0)[None],  # nearly certain
  ]
).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_behaviour_equals_a_sorted_nucleus(temperature, top_p):
  density_XV = behaviour(LOGITS_XV, Choice(temperature, top_p))
  expected_XV = np.stack([tiny.nucleus(row, temperature, top_p) for row in LOGITS_XV])
  np.testing.assert_allclose(density_XV, expected_XV, atol=1e-6)
  np.testing.assert_array_equal(np.asarray(density_XV) > 0, expected_XV > 1e-40)


@pytest.mark.parametrize("top_p,kept", [(0.2, 2), (0.5, 2), (0.51, 4), (0.9, 4), (0.91, 5)])
def test_tokens_that_tie_with_the_last_of_the_nucleus_are_kept(top_p, kept):
  density_V = np.array([0.1, 0.2, 0.25, 0.2, 0.25])
  assert (np.asarray(behaviour(np.log(density_V)[None], Choice(1.0, top_p))) > 0).sum() == kept


def test_weights_one_rounding_apart_are_told_apart():
  logits_V = np.array([-1.2e-7, 0, -9, -6e-8], np.float32)  # whose exponentials are 1 − 2⁻²³, 1, …, 1 − 2⁻²⁴
  kept = [(np.asarray(behaviour(logits_V[None], Choice(1.0, 1.0, top_k))) > 0).sum() for top_k in (1, 2, 3, 4)]
  assert kept == [1, 2, 3, 4]


@pytest.mark.parametrize("top_k,min_p", [(1, 0.0), (5, 0.0), (299, 0.0), (999, 0.0), (0, 0.1), (0, 1.0), (40, 0.02)])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_cuts_are_transformers_one_after_the_other(top_k, top_p, min_p):
  """top-k, then top-p of what that leaves, then min-p: here on rows without ties, where transformers keeps the same."""
  for row_V in LOGITS_XV[:4]:
    p_V = np.exp(tiny.log_softmax(row_V / 0.7))
    order = np.argsort(-p_V)
    kept = order[: top_k or None]
    cumulative = np.cumsum(p_V[kept] / p_V[kept].sum())
    kept = kept[: np.searchsorted(cumulative, top_p) + 1]
    kept = kept[p_V[kept] >= min_p * p_V.max()]
    expected_V = np.zeros_like(p_V)
    expected_V[kept] = p_V[kept] / p_V[kept].sum()
    density_V = behaviour(row_V[None], Choice(0.7, top_p, top_k, min_p))[0]
    np.testing.assert_allclose(density_V, expected_V, atol=1e-6)


def test_a_nucleus_of_next_to_nothing_is_the_likeliest_token():
  kept = lambda *choice: np.asarray(behaviour(LOGITS_XV, Choice(*choice))) > 0
  np.testing.assert_array_equal(kept(1.0, 1e-50), kept(1.0, 1.0, 1))  # which is 0 in float32


def test_tokens_that_tie_with_the_last_of_the_likeliest_are_kept():
  density_V = np.array([0.1, 0.2, 0.25, 0.2, 0.25])
  kept = lambda k: int((np.asarray(behaviour(np.log(density_V)[None], Choice(top_k=k))) > 0).sum())
  assert [kept(k) for k in range(6)] == [5, 2, 2, 4, 4, 5]


def test_behaviour_logprob_is_the_log_of_its_density():
  token_X = np.argmax(LOGITS_XV, -1)
  measured_X = scoring.behaviour_logprob(Choice(0.7, 0.9))(jnp.asarray(LOGITS_XV), jnp.asarray(token_X))
  expected_X = [np.log(tiny.nucleus(row, 0.7, 0.9)[token]) for row, token in zip(LOGITS_XV, token_X)]
  np.testing.assert_allclose(measured_X, expected_X, atol=1e-5)


def test_stretches_without_a_masked_token_cost_no_head():
  calls = []

  def measure(logits_XV, token_X):
    jax.debug.callback(lambda: calls.append(len(logits_XV)))
    return scoring.plain_logprob(logits_XV, token_X)

  mask_RT = np.arange(T) >= np.full((R, 1), T - 4)  # a prompt of twelve tokens, a completion of four
  jax.block_until_ready(scoring.score(CONFIG, PARAMS, TOKENS_RT, mask_RT, measure, chunk=4 * R))
  jax.effects_barrier()
  assert len(calls) == 2  # the completion, shifted by one, lies in the last two of four stretches


def shapes(jaxpr):
  """Every shape that a program computes, in its loops and branches too."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.shape for variable in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from shapes(inner)


@pytest.mark.parametrize("measure", [scoring.plain_logprob, scoring.logprob_and_entropy])
@pytest.mark.parametrize("differentiate", [False, True])
def test_no_array_of_tokens_by_vocabulary_exists(measure, differentiate):
  rows, length, chunk = 8, 32, 32
  tokens_RT = jnp.zeros((rows, length), jnp.int32)

  def total(params):
    scored = scoring.score(CONFIG, params, tokens_RT, tokens_RT == 0, measure, chunk=chunk)
    return sum(jnp.sum(x) for x in jax.tree.leaves(scored))

  found = list(shapes(jax.make_jaxpr(jax.grad(total) if differentiate else total)(PARAMS).jaxpr))
  sizes = [int(np.prod(shape)) for shape in found if CONFIG.vocab in shape]
  assert chunk * CONFIG.vocab in sizes  # the walk does see the logits of one chunk
  assert max(sizes) <= chunk * CONFIG.vocab
  assert max(int(np.prod(shape)) for shape in found) < rows * length * CONFIG.vocab


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_slopes_add_whole_vectors_too():
  """Where the total alone is wanted, as in the backward pass, XLA is not to make one slow sum of two short ones."""
  slopes = jax.jit(jax.grad(lambda logits_XV: jnp.sum(scoring.plain_logprob(logits_XV, jnp.zeros(4, jnp.int32)))))
  assert "f32[4,20]" in slopes.lower(jnp.ones((4, 320))).compile().as_text()

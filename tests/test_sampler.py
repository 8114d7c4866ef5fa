"""Sampling: the draw's distribution, what a row must not depend on, agreement with scoring, and stops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame_jax import architecture, model, sampler, scoring, sharding
from advgame_jax import config as config_lib

CONFIG, PARAMS = tiny.CONFIG, tiny.params()
KEY = jax.random.key(7)
ONE = np.nextafter(np.float32(1), np.float32(0))  # the largest uniform
NEVER = sampler.stop_table([""] * CONFIG.vocab, [], [])
STOPS = sampler.stop_table([""] * CONFIG.vocab, range(0, 12), [])

RNG = np.random.default_rng(0)
LENGTH_Q = np.array([5, 2, 7, 1, 6, 3, 4, 7])
TOKENS_QT = np.where(np.arange(7) < LENGTH_Q[:, None], RNG.integers(1, CONFIG.vocab, (8, 7)), 0).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("group", "max_new_tokens", "chunk", "layout"))
def compiled(params, *arrays, **static):
  return sampler.sample(CONFIG, params, *arrays, **static)


def sample(
  tokens_QT=TOKENS_QT,
  length_Q=LENGTH_Q,
  present_Q=None,
  key=KEY,
  temperature=0.8,
  top_p=0.9,
  stops_ZV=STOPS,
  group=2,
  max_new_tokens=11,
  prefix=None,
  **static,
):
  """Rows as [Q, G, …], on the host."""
  present_Q = np.ones(len(length_Q), bool) if present_Q is None else present_Q
  place_Q, settings = np.arange(len(length_Q), dtype=np.uint32), (jnp.float32(temperature), jnp.float32(top_p))
  arrays = (PARAMS, tokens_QT, length_Q, present_Q, place_Q, key, *settings, stops_ZV, prefix)
  drawn = compiled(*arrays, group=group, max_new_tokens=max_new_tokens, **{"chunk": 4, **static})
  return jax.tree.map(lambda x: np.asarray(x).reshape(len(length_Q), group, *x.shape[1:]), drawn)


@functools.cache
def baseline():
  return sample()


def assert_same(drawn, expected):
  """The same tokens, and log-probabilities to rounding."""
  for name in ("tokens_RT", "length_R", "stopped_R"):
    np.testing.assert_array_equal(getattr(drawn, name), getattr(expected, name), err_msg=name)
  for name in ("behaviour_logprob_RT", "plain_logprob_RT"):
    np.testing.assert_allclose(getattr(drawn, name), getattr(expected, name), atol=1e-5, err_msg=name)


def rows(drawn, index):
  return jax.tree.map(lambda x: x[index], drawn)


# The draw.

draw = jax.jit(sampler.draw)


def test_draws_follow_a_peaked_density_and_never_leave_it():
  """χ² at 1e-4: 200,000 draws over 1,100 tokens, of which a third have probability 0."""
  rng = np.random.default_rng(0)
  density_V = rng.dirichlet(np.full(1100, 0.3)) * (rng.random(1100) < 2 / 3)
  density_V = np.where(density_V > 1e-5, density_V, 0)
  density_V[500] = density_V.sum()  # half of the mass on one token
  density_V = (density_V / density_V.sum()).astype(np.float32)
  uniform_nR = np.asarray(jax.random.uniform(jax.random.key(0), (20, 10_000)))
  density_RV = np.broadcast_to(density_V, (10_000, 1100))
  counts_V = sum(np.bincount(draw(density_RV, uniform_R), minlength=1100) for uniform_R in uniform_nR)
  assert counts_V[density_V == 0].sum() == 0
  expected_V = uniform_nR.size * density_V.astype(np.float64)
  often = expected_V >= 5
  observed, expected = (np.append(x[often], x[~often].sum()) for x in (counts_V, expected_V))
  statistic, degrees = np.sum((observed - expected) ** 2 / expected), len(expected) - 1
  # Wilson & Hilferty's normal approximation of χ²; 3.72 is the quantile of 1 − 1e-4.
  assert ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5 < 3.72


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


# What a row samples depends on its key, prompt and place alone.


def test_the_baseline_is_worth_comparing_with():
  drawn = baseline()
  assert len(np.unique(drawn.tokens_RT)) > 30
  assert drawn.stopped_R.any() and not drawn.stopped_R.all()
  assert len({row.tobytes() for row in drawn.tokens_RT.reshape(16, -1)}) == 16


def test_rows_do_not_depend_on_their_company():
  tokens_QT, length_Q = TOKENS_QT.copy(), LENGTH_Q.copy()
  tokens_QT[::2], length_Q[::2] = tokens_QT[::-2], length_Q[::-2]  # other prompts at the even places
  assert_same(rows(sample(tokens_QT, length_Q), slice(1, None, 2)), rows(baseline(), slice(1, None, 2)))


def test_rows_do_not_depend_on_the_number_of_prompts_and_siblings():
  drawn = sample(TOKENS_QT[:5], LENGTH_Q[:5], group=3)
  assert_same(jax.tree.map(lambda x: x[:, :2], drawn), rows(baseline(), slice(5)))
  assert (drawn.tokens_RT[:, 2] != drawn.tokens_RT[:, 1]).any(-1).all()


def test_rows_do_not_depend_on_padding_or_bucket():
  wide_QT = np.pad(TOKENS_QT, ((0, 0), (0, 9)), constant_values=5)
  wide_QT[:, :7] = np.where(np.arange(7) < LENGTH_Q[:, None], TOKENS_QT, 9)
  assert_same(sample(wide_QT), baseline())


def test_absent_prompts_draw_nothing_and_disturb_nobody():
  present_Q = np.arange(8) % 3 > 0
  drawn = sample(present_Q=present_Q)
  assert_same(rows(drawn, present_Q), rows(baseline(), present_Q))
  assert all(not x[~present_Q].any() for x in drawn)


@pytest.mark.parametrize("chunk", [1, 16])
def test_rows_do_not_depend_on_the_decode_chunk(chunk):
  assert_same(sample(chunk=chunk), baseline())


def test_a_shorter_limit_cuts_the_same_rows():
  """And a stop at the limit is a stop."""
  longer = baseline()
  limit = int(np.unique(longer.length_R[longer.stopped_R])[1])
  stopped_R = longer.stopped_R & (longer.length_R <= limit)
  assert (longer.length_R[stopped_R] == limit).any() and not stopped_R.all()
  cut = longer._replace(
    tokens_RT=longer.tokens_RT[..., :limit],
    length_R=np.minimum(longer.length_R, limit),
    stopped_R=stopped_R,
    behaviour_logprob_RT=longer.behaviour_logprob_RT[..., :limit],
    plain_logprob_RT=longer.plain_logprob_RT[..., :limit],
  )
  assert_same(sample(max_new_tokens=limit), cut)


@pytest.mark.parametrize("name", ["replicated", "tensor"])
def test_rows_do_not_depend_on_the_mesh(name):
  settings = config_lib.Mesh(data=2, fsdp=2, tensor=2, decode=name)
  mesh, layout = sharding.make_mesh(settings), sharding.decode_layout(settings)
  place = lambda spec, x: jax.device_put(x, sharding.named(mesh, layout, spec.axes, x.shape, spec.hf_name))
  params = jax.tree.map(place, architecture.param_specs(CONFIG), PARAMS)
  by_rows = sharding.rows_sharding(mesh, layout)
  rows_Q = (TOKENS_QT, LENGTH_Q, np.ones(8, bool), np.arange(8, dtype=np.uint32))
  with jax.set_mesh(mesh):
    drawn = compiled(
      params,
      *sharding.to_global(rows_Q, by_rows),
      KEY,
      jnp.float32(0.8),
      jnp.float32(0.9),
      STOPS,
      group=2,
      max_new_tokens=11,
      chunk=4,
      layout=layout,
    )
  assert_same(jax.tree.map(lambda x: np.asarray(x).reshape(8, 2, *x.shape[1:]), drawn), baseline())


def test_row_keys_are_folded_from_prompt_then_sample():
  keys_R = jax.random.key_data(sampler.row_keys(KEY, np.arange(3), 2)).reshape(3, 2, -1)
  expected = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(KEY, 2), 1))
  np.testing.assert_array_equal(keys_R[2, 1], expected)


# Agreement with scoring.


@functools.partial(jax.jit, static_argnames="measure")
def rescore(tokens_RT, mask_RT, measure):
  return scoring.score(CONFIG, PARAMS, tokens_RT, mask_RT, measure)


def lay_out(drawn):
  """Prompt and completion in one row, as training reads them; with the mask and where each completion starts."""
  tokens_RT, mask_RT = np.zeros((16, 18), np.int32), np.zeros((16, 18), bool)
  for r, length in enumerate(drawn.length_R.reshape(-1)):
    start = LENGTH_Q[r // 2]
    tokens_RT[r, :start] = TOKENS_QT[r // 2, :start]
    tokens_RT[r, start : start + length] = drawn.tokens_RT.reshape(16, -1)[r, :length]
    mask_RT[r, start : start + length] = True
  return tokens_RT, mask_RT


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.6, 0.9), (1.5, 0.5), (0.0, 0.9)])
def test_log_probabilities_agree_with_scoring(temperature, top_p):
  drawn = sample(temperature=temperature, top_p=top_p)
  tokens_RT, mask_RT = lay_out(drawn)
  inside_RT = np.arange(11) < drawn.length_R.reshape(16, 1)
  behaviour = scoring.behaviour_logprob(temperature, top_p)
  for measure, recorded in ((scoring.plain_logprob, drawn.plain_logprob_RT), (behaviour, drawn.behaviour_logprob_RT)):
    recorded_RT = recorded.reshape(16, -1)
    scored_RT = np.asarray(rescore(tokens_RT, mask_RT, measure))
    np.testing.assert_allclose(recorded_RT[inside_RT], scored_RT[mask_RT], atol=1e-4)
    np.testing.assert_array_equal(recorded_RT[~inside_RT], 0)
  if temperature == top_p == 1:
    np.testing.assert_allclose(drawn.behaviour_logprob_RT, drawn.plain_logprob_RT, atol=1e-5)


def test_greedy_samples_are_arg_max_rollouts():
  drawn = sample(temperature=0.0, stops_ZV=NEVER)
  np.testing.assert_array_equal(drawn.tokens_RT[:, 0], drawn.tokens_RT[:, 1])
  for q in (0, 3):
    row = list(TOKENS_QT[q, : LENGTH_Q[q]])
    for _ in range(11):
      row.append(int(tiny.llama_logits(CONFIG, PARAMS, np.array([row]))[0, -1].argmax()))
    np.testing.assert_array_equal(drawn.tokens_RT[q, 0], row[LENGTH_Q[q] :])


# Stops, limits, the loop.


def test_a_stop_is_counted_and_nothing_follows_it():
  drawn = baseline()
  for tokens_T, length, stopped in zip(drawn.tokens_RT.reshape(16, -1), drawn.length_R.flat, drawn.stopped_R.flat):
    ends = np.flatnonzero(tokens_T[:length] < 12)
    assert list(ends) == ([length - 1] if stopped else [])
    assert stopped or length == 11
    assert not tokens_T[length:].any()


def test_the_loop_ends_when_all_rows_are_done(monkeypatch):
  calls = []
  decode = model.decode

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: calls.append(1))
    return decode(*args, **kwargs)

  monkeypatch.setattr(model, "decode", counted)
  arguments = (CONFIG, PARAMS, TOKENS_QT[:2], LENGTH_Q[:2], np.array([True, False]), np.arange(2), KEY, 0.8, 1.0)
  every = jnp.asarray(sampler.stop_table([""] * CONFIG.vocab, range(CONFIG.vocab), []))
  drawn = sampler.sample(*arguments, every, group=1, max_new_tokens=1000, chunk=4)
  jax.effects_barrier()
  assert list(drawn.length_R) == [1, 0] and len(calls) == 4


def test_new_temperatures_keys_and_stops_compile_nothing():
  baseline()
  before = compiled._cache_size()
  other = sample(temperature=1.3, top_p=0.4, key=jax.random.key(1))
  again = sample(temperature=0.0, top_p=1.0, stops_ZV=np.array(STOPS))
  assert compiled._cache_size() == before
  assert (other.tokens_RT != again.tokens_RT).any()


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


def test_stop_strings_end_sampled_rows():
  """Each token's text is a letter: rows end where a search in their text says they do."""
  texts = [chr(97 + i % 26) for i in range(CONFIG.vocab)]
  free = sample(stops_ZV=NEVER, top_p=1.0)
  letters = lambda tokens_T: "".join(texts[t] for t in tokens_T)
  stops = [letters(free.tokens_RT[q, 0])[3:5] for q in range(4)]
  drawn = sample(stops_ZV=sampler.stop_table(texts, [], stops), top_p=1.0)
  for q, g in np.ndindex(8, 2):
    text = letters(free.tokens_RT[q, g])
    ends = [text.index(stop) + 2 for stop in stops if stop in text]
    assert drawn.length_R[q, g] == min([*ends, 11]) and drawn.stopped_R[q, g] == bool(ends)


# A prefix that all prompts continue.


def test_a_prefix_read_once_draws_what_whole_prompts_draw():
  prefix_T = np.array([9, 3, 77, 50, 4], np.int32)
  _, cache = model.forward(CONFIG, PARAMS, np.pad(prefix_T, (0, 3))[None])
  continued = sample(prefix=model.Prompt(cache, np.array([5])))
  whole = sample(np.concatenate([np.tile(prefix_T, (8, 1)), TOKENS_QT], 1), LENGTH_Q + 5)
  assert_same(continued, whole)


def test_the_next_tokens_probability_is_summed_over_each_labels_tokens():
  last_QM, _ = sampler.prefill(CONFIG, PARAMS, TOKENS_QT, LENGTH_Q)
  labels_CV = np.zeros((2, CONFIG.vocab), bool)
  labels_CV[0, [3, 8]] = labels_CV[1, 100] = True
  logprob_QC = sampler.next_token(CONFIG, PARAMS, last_QM, labels_CV)
  probability_QV = np.exp(tiny.log_softmax(np.asarray(model.logits(CONFIG, PARAMS, last_QM))))
  expected_QC = np.stack([probability_QV[:, [3, 8]].sum(-1), probability_QV[:, 100]], -1)
  np.testing.assert_allclose(np.exp(logprob_QC), expected_QC, rtol=1e-5)

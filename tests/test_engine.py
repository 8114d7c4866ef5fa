"""Generation: what a row must not depend on, agreement with scoring, stops and limits, and that nothing compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import (
  architecture,
  caches,
  layers,
  ledger,
  matrices,
  model,
  programs,
  sampler,
  scoring,
  sharding,
  targets,
)
from advgame_jax import config as config_lib
from advgame_jax import engine as engine_lib
from advgame_jax.engine import Engine, Load
from advgame_jax.model import Prefix
from advgame_jax.scoring import Choice, Generator
from advgame_jax.slots import Prompt
from advgame_jax.types import UserError

CONFIG, PARAMS = tiny.CONFIG, tiny.params()
KEY = jax.random.key(7)
SMALL = engine_lib.SMALL
NEVER = sampler.stop_table([""] * CONFIG.vocab, [], [])
STOPS = sampler.stop_table([""] * CONFIG.vocab, range(0, 12), [])
SAMPLING = config_lib.Sampling(
  temperature=0.8, top_p=0.9, prompt_buckets=(7,), max_new_tokens=11, decode_chunk=4, page=4, prefill_tokens=16
)

RNG = np.random.default_rng(0)
LENGTH_Q = np.array([5, 2, 7, 1, 6, 3, 4, 7])
PROMPTS = [RNG.integers(1, CONFIG.vocab, length).tolist() for length in LENGTH_Q]


@pytest.fixture
def pools_grow(monkeypatch):
  """As those of models do that are not so small; many more programs, for tests that are about them."""
  monkeypatch.setattr(engine_lib, "SMALL", 0)


@functools.cache
def engine(mesh=(1, 1, 1), decode="replicated", stops="few", **changes):
  over, layout = tiny.mesh(*mesh), tiny.GENERATE[decode]
  table = {"few": STOPS, "never": NEVER}[stops]
  return Engine(CONFIG, dataclasses.replace(SAMPLING, **changes), over, layout, np.dtype("float32"), "auto", table)


@functools.cache
def weights(who, stacked=False):
  """Of `PARAMS`, laid out as this engine's generator."""
  where = architecture.shardings(architecture.param_specs(CONFIG), who.mesh, who.layout)
  placed = jax.device_put(PARAMS, where)
  return placed if stacked else jax.device_put(layers.unstack(CONFIG, PARAMS), layers.unstack_shardings(CONFIG, where))


def generate(who=None, prompts=PROMPTS, group=2, key=KEY, stacked=False, fold_Q=None, **more):
  """Rows as [Q, G, …]."""
  who = who or engine()
  fold_Q = np.arange(len(prompts), dtype=np.uint32) if fold_Q is None else fold_Q
  drawn = who.generate(Load(Generator((weights(who, stacked),)), prompts, fold_Q, group, key, **more))
  return jax.tree.map(lambda x: x.reshape(len(prompts), group, *x.shape[1:]), drawn)


@functools.cache
def baseline():
  """Of pools of one size, whoever asks first."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine_lib, "SMALL", SMALL)
    return generate()


def assert_same(drawn, expected):
  """The same tokens, and log-probabilities to rounding."""
  for name in ("tokens_RT", "length_R", "stopped_R"):
    np.testing.assert_array_equal(getattr(drawn, name), getattr(expected, name), err_msg=name)
  for name in ("behaviour_logprob_RT", "plain_logprob_RT"):
    np.testing.assert_allclose(getattr(drawn, name), getattr(expected, name), atol=1e-5, err_msg=name)


def rows(drawn, index):
  return jax.tree.map(lambda x: x[index], drawn)


# What a row samples depends on its key, prompt and place alone.


def test_the_baseline_is_worth_comparing_with():
  drawn = baseline()
  assert len(np.unique(drawn.tokens_RT)) > 30
  assert drawn.stopped_R.any() and not drawn.stopped_R.all()
  assert len({row.tobytes() for row in drawn.tokens_RT.reshape(16, -1)}) == 16


def test_rows_do_not_depend_on_their_company():
  others = [PROMPTS[-1 - q] if q % 2 == 0 else PROMPTS[q] for q in range(8)]
  assert_same(rows(generate(prompts=others), slice(1, None, 2)), rows(baseline(), slice(1, None, 2)))


def test_rows_do_not_depend_on_the_number_of_prompts_and_siblings():
  drawn = generate(prompts=PROMPTS[:5], group=3)
  assert_same(jax.tree.map(lambda x: x[:, :2], drawn), rows(baseline(), slice(5)))
  assert (drawn.tokens_RT[:, 2] != drawn.tokens_RT[:, 1]).any(-1).all()


def test_absent_prompts_draw_nothing_and_disturb_nobody():
  present_Q = np.arange(8) % 3 > 0
  drawn = generate(prompts=[ids if here else [] for ids, here in zip(PROMPTS, present_Q)])
  assert_same(rows(drawn, present_Q), rows(baseline(), present_Q))
  assert all(not x[~present_Q].any() for x in drawn)
  assert not any(x.any() for x in generate(prompts=[[]] * 8))


@pytest.mark.usefixtures("pools_grow")
@pytest.mark.parametrize(
  "changes",
  [
    {"decode_chunk": 1, "page": 32},
    {"decode_chunk": 16, "page": 1},
    {"slots": 2, "decode_chunk": 3},
    {"slots": 6, "decode_chunk": 3, "page": 2},
    {"slots": 8, "prefill_tokens": 7},  # who is left moves into two slots
    {"slots": 12, "page": 2, "prefill_tokens": 100, "prompt_buckets": (20,)},
    {"slots": 100},
  ],
  ids=str,
)
def test_rows_do_not_depend_on_slots_pages_chunks_or_buckets(changes):
  assert_same(generate(engine(**changes)), baseline())


@pytest.mark.usefixtures("pools_grow")
def test_rows_do_not_depend_on_how_prompts_are_read(monkeypatch):
  """Several in a row, or each in its own: as kernels without packed rows want it."""
  shapes = Engine.shapes
  apart = lambda *args: dataclasses.replace(shapes(*args), packed=False, rows=((1, 4), (2, 7)))
  monkeypatch.setattr(Engine, "shapes", apart)
  assert_same(generate(engine(slots=8)), baseline())


@pytest.mark.usefixtures("pools_grow")
def test_prompts_that_are_not_packed_are_read_in_shapes_of_four_sizes(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # by cuDNN's attention, which takes no packed rows
  settings = dataclasses.replace(SAMPLING, prompt_buckets=(16, 64), prefill_tokens=128)
  who = Engine(CONFIG, settings, tiny.mesh(), sharding.LOCAL, np.dtype("float16"), "auto", NEVER)
  shapes = who.shapes(8, 1, prefix=False)
  assert shapes.rows == ((2, 16), (1, 64), (4, 16), (6, 16), (2, 64), (8, 16)) and not shapes.packed
  assert shapes.fitting([[10] * 3]) == (4, 16) and shapes.fitting([[10, 20]]) == (2, 64)


def test_stacked_layers_draw_the_same():
  """As a base that adapters share has them."""
  assert_same(generate(stacked=True), baseline())


@pytest.mark.usefixtures("pools_grow")
@pytest.mark.parametrize("name", ["replicated", "tensor"])
@pytest.mark.parametrize("slots", [0, 8])
def test_rows_do_not_depend_on_the_mesh(name, slots):
  assert_same(generate(engine((2, 2, 2), name, slots=slots)), baseline())


def test_the_mesh_takes_stacked_layers_and_a_prefix_too():
  prefix_T = [9, 3, 77, 50, 4]
  who = engine((2, 1, 2), "tensor", temperature=1.0)
  continued = generate(who, stacked=True, prefixes=(read_prefix(who, prefix_T, 8, parts=2),))
  whole = generate(engine(prompt_buckets=(12,), temperature=1.0), [prefix_T + ids for ids in PROMPTS])
  assert_same(continued, whole)


@pytest.mark.usefixtures("pools_grow")
def test_a_shorter_limit_cuts_the_same_rows():
  """And a stop at the limit is a stop; of the settings, or of each prompt."""
  longer = baseline()
  limit = int(np.unique(longer.length_R[longer.stopped_R])[1])
  stopped_R = longer.stopped_R & (longer.length_R <= limit)
  assert (longer.length_R[stopped_R] == limit).any() and not stopped_R.all()
  cut = lambda x: np.where(np.arange(11) < limit, x, 0)
  expected = longer._replace(
    tokens_RT=cut(longer.tokens_RT),
    length_R=np.minimum(longer.length_R, limit),
    stopped_R=stopped_R,
    behaviour_logprob_RT=cut(longer.behaviour_logprob_RT),
    plain_logprob_RT=cut(longer.plain_logprob_RT),
  )
  assert_same(generate(limit_Q=np.full(8, limit)), expected)
  narrow = jax.tree.map(lambda x: x[..., :limit] if x.ndim == 3 else x, expected)
  assert_same(generate(engine(max_new_tokens=limit)), narrow)
  some = generate(engine(slots=4), limit_Q=np.where(np.arange(8) % 2, limit, 99))
  assert_same(rows(some, slice(1, None, 2)), rows(expected, slice(1, None, 2)))
  assert_same(rows(some, slice(0, None, 2)), rows(longer, slice(0, None, 2)))
  assert not generate(limit_Q=np.zeros(8)).length_R.any()


def test_keys_are_folded_from_what_is_given():
  order = np.random.default_rng(0).permutation(8)
  assert_same(generate(prompts=[PROMPTS[i] for i in order], fold_Q=order.astype(np.uint32)), rows(baseline(), order))


# Several members.


@functools.cache
def other_weights():
  return layers.unstack(CONFIG, tiny.params(seed=1))


def mixed(share, seed=0, **changes):
  """Drawn from the baseline's weights with 1 − share, and from others."""
  who = engine(**changes)
  generator = Generator((weights(who), other_weights()), (1 - share, share))
  drawn = who.generate(Load(generator, PROMPTS, np.arange(8, dtype=np.uint32), 2, KEY))
  return jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), drawn)


def test_a_mixture_of_nothing_and_of_everything_is_a_pure_generator():
  assert_same(mixed(0.0), baseline())
  who = engine()
  drawn = who.generate(Load(Generator((other_weights(),)), PROMPTS, np.arange(8, dtype=np.uint32), 2, KEY))
  assert_same(mixed(1.0), jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), drawn))


def test_a_mixture_is_the_normalised_geometric_mean_token_by_token():
  drawn = mixed(0.3, temperature=1.0, top_p=1.0, slots=6)
  tokens_RT, mask_RT = lay_out(drawn)
  logprob_RTV = [
    tiny.log_softmax(tiny.llama_logits(CONFIG, jax.device_get(params), tokens_RT))
    for params in (PARAMS, tiny.params(seed=1))
  ]
  mean_RTV = tiny.log_softmax(0.7 * logprob_RTV[0] + 0.3 * logprob_RTV[1])
  expected_RT = np.take_along_axis(mean_RTV[:, :-1], tokens_RT[:, 1:, None], 2)[..., 0]
  inside_RT = np.arange(11) < drawn.length_R.reshape(16, 1)
  for recorded in (drawn.plain_logprob_RT, drawn.behaviour_logprob_RT):
    np.testing.assert_allclose(recorded.reshape(16, -1)[inside_RT], expected_RT[mask_RT[:, 1:]], atol=1e-4)
  generator = Generator((PARAMS, tiny.params(seed=1)), (0.7, 0.3))
  scored_RT = scoring.score_generator(CONFIG, generator, tokens_RT, mask_RT)
  np.testing.assert_allclose(np.asarray(scored_RT)[:, 1:][mask_RT[:, 1:]], expected_RT[mask_RT[:, 1:]], atol=1e-4)


# Agreement with scoring.


@functools.partial(jax.jit, static_argnames="measure")
def rescore(tokens_RT, mask_RT, measure):
  return scoring.score(CONFIG, PARAMS, tokens_RT, mask_RT, measure)


def lay_out(drawn):
  """Prompt and completion in one row, as training reads them; with the mask and where each completion starts."""
  tokens_RT, mask_RT = np.zeros((16, 18), np.int32), np.zeros((16, 18), bool)
  for r, length in enumerate(drawn.length_R.reshape(-1)):
    start = LENGTH_Q[r // 2]
    tokens_RT[r, :start] = PROMPTS[r // 2]
    tokens_RT[r, start : start + length] = drawn.tokens_RT.reshape(16, -1)[r, :length]
    mask_RT[r, start : start + length] = True
  return tokens_RT, mask_RT


@pytest.mark.parametrize(
  "choice", [Choice(1.0), Choice(0.6, 0.9), Choice(1.5, 0.5), Choice(0.0, 0.9), Choice(1.0, 0.9, 5, 0.2)], ids=str
)
def test_log_probabilities_agree_with_scoring(choice):
  drawn = generate(engine(**choice._asdict()))
  tokens_RT, mask_RT = lay_out(drawn)
  inside_RT = np.arange(11) < drawn.length_R.reshape(16, 1)
  behaviour = scoring.behaviour_logprob(choice)
  for measure, recorded in ((scoring.plain_logprob, drawn.plain_logprob_RT), (behaviour, drawn.behaviour_logprob_RT)):
    recorded_RT = recorded.reshape(16, -1)
    scored_RT = np.asarray(rescore(tokens_RT, mask_RT, measure))
    np.testing.assert_allclose(recorded_RT[inside_RT], scored_RT[mask_RT], atol=1e-4)
    np.testing.assert_array_equal(recorded_RT[~inside_RT], 0)
  if choice == Choice():
    np.testing.assert_allclose(drawn.behaviour_logprob_RT, drawn.plain_logprob_RT, atol=1e-5)


@pytest.fixture(scope="module")
def greedy():
  return generate(engine(temperature=0.0, stops="never"))


def test_greedy_samples_are_arg_max_rollouts(greedy):
  np.testing.assert_array_equal(greedy.tokens_RT[:, 0], greedy.tokens_RT[:, 1])
  for q in (0, 3):
    row = list(PROMPTS[q])
    for _ in range(11):
      row.append(int(tiny.llama_logits(CONFIG, PARAMS, np.array([row]))[0, -1].argmax()))
    np.testing.assert_array_equal(greedy.tokens_RT[q, 0], row[LENGTH_Q[q] :])


# Stops, and the loop.


def test_a_stop_is_counted_and_nothing_follows_it():
  drawn = baseline()
  for tokens_T, length, stopped in zip(drawn.tokens_RT.reshape(16, -1), drawn.length_R.flat, drawn.stopped_R.flat):
    ends = np.flatnonzero(tokens_T[:length] < 12)
    assert list(ends) == ([length - 1] if stopped else [])
    assert stopped or length == 11
    assert not tokens_T[length:].any()


def test_stop_strings_end_sampled_rows():
  """Each token's text is a letter: rows end where a search in their text says they do."""
  texts = [chr(97 + i % 26) for i in range(CONFIG.vocab)]
  free = generate(engine(stops="never", top_p=1.0))
  letters = lambda tokens_T: "".join(texts[t] for t in tokens_T)
  stops = [letters(free.tokens_RT[q, 0])[3:5] for q in range(4)]
  who = dataclasses.replace(engine(top_p=1.0), stops_ZV=sampler.stop_table(texts, [], stops))
  drawn = generate(who)
  for q, g in np.ndindex(8, 2):
    text = letters(free.tokens_RT[q, g])
    ends = [text.index(stop) + 2 for stop in stops if stop in text]
    assert drawn.length_R[q, g] == min([*ends, 11]) and drawn.stopped_R[q, g] == bool(ends)


def test_the_loop_ends_when_all_rows_are_done(monkeypatch):
  calls = []
  decode = model.decode

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: calls.append(1))
    return decode(*args, **kwargs)

  monkeypatch.setattr(model, "decode", counted)
  every = sampler.stop_table([""] * CONFIG.vocab, range(CONFIG.vocab), [])
  who = dataclasses.replace(engine(max_new_tokens=1000), stops_ZV=every)
  drawn = generate(who, [PROMPTS[0], []], group=1)
  jax.effects_barrier()
  assert drawn.length_R.tolist() == [[1], [0]] and len(calls) == 1


def ragged(count, seed=0):
  """Prompts and limits of all lengths."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 8, count)
  limits = np.minimum(1 + rng.geometric(0.2, count), 11)
  return [rng.integers(1, CONFIG.vocab, length).tolist() for length in lengths], limits


@functools.cache
def warmed_up():
  """An engine whose programs no other test has, compiled for loads of two samples a prompt; and its generator."""
  who = engine(slots=14, page=1, decode_chunk=3, prefill_tokens=49)
  generator, compilations = Generator((weights(engine()),)), ledger.process_compilations()
  cold = compilations.count
  who.warm_up(generator, 40, 2)
  assert compilations.count > cold  # it counts
  return who, generator


@pytest.fixture
def warm(pools_grow, compile_this_quickly):
  """`warmed_up`, after which the test compiles nothing."""
  who, generator = warmed_up()
  compilations = ledger.process_compilations()
  before = compilations.count
  yield who, generator
  assert compilations.count == before


def draw_pairs(warm, prompts, limit_Q, stops_ZV=NEVER):
  who, generator = warm
  load = Load(generator, prompts, np.arange(len(prompts), dtype=np.uint32), 2, KEY, limit_Q=limit_Q)
  dataclasses.replace(who, stops_ZV=stops_ZV).generate(load)


def test_a_ragged_load_compiles_nothing_after_the_warm_up(warm):
  draw_pairs(warm, *ragged(40), STOPS)


def test_the_last_rows_compile_nothing_however_long_they_are(warm):
  shapes = warm[0].shapes(7, 2, prefix=False)
  assert (shapes.few, shapes.own_pools[0]) == (4, 4 * 11)  # more than a quarter of the most
  draw_pairs(warm, [[3]] * 7, np.array([11] * 2 + [2] * 5))


def test_pools_of_prompts_compile_nothing_whichever_sizes_they_go_between(warm):
  assert warm[0].shapes(14, 2, prefix=False).prompt_pools == [25, 37, 49]
  for lengths, long in (([1] * 7 + [7] * 7, 0), ([5] * 7, 2)):  # from 25 pages to 49; from 37 to 25 with the last rows
    draw_pairs(warm, [[3] * length for length in lengths], np.array([11] * long + [2] * (len(lengths) - long)))


def test_new_choices_and_keys_compile_nothing_and_draw_otherwise():
  key, other = jax.random.key(1), engine(temperature=1.3, top_p=0.4, top_k=9, min_p=0.1)
  engine().warm_up(Generator((weights(engine()),)), 8, 2)
  generate(), weights(other)
  compilations = ledger.process_compilations()
  before = compilations.count
  drawn = [generate(key=key), generate(other)]
  assert compilations.count == before
  assert (drawn[0].tokens_RT != drawn[1].tokens_RT).any() and (drawn[0].tokens_RT != baseline().tokens_RT).any()


def joined(generation, arrivals, leavers=()):
  """The tokens of each (prompt, sample): who arrives and who leaves before which chunk is a list of numbers each."""
  prompts = [Prompt(q, ids, 11, q) for q, ids in enumerate(PROMPTS)]
  drawn, waits = {}, list(arrivals)
  leavers = list(leavers)
  while waits or generation.busy:
    for q in waits.pop(0) if waits else ():
      generation.add(prompts[q])
    gone = leavers.pop(0) if leavers else ()
    generation.drop([prompts[q] for q in gone])
    for piece in generation.advance() if generation.busy else ():
      tokens = drawn.setdefault((piece.prompt.number, piece.sample), [])
      assert piece.prompt.number not in gone and piece.first == len(tokens)
      tokens += piece.tokens_k.tolist()
  return drawn


def lists(drawn):
  """Of `generate`, as `joined` has them."""
  where = list(np.ndindex(drawn.length_R.shape))
  return {place: drawn.tokens_RT[place][: drawn.length_R[place]].tolist() for place in where}


@pytest.mark.usefixtures("pools_grow")
@pytest.mark.parametrize("changes", [{"slots": 2}, {"slots": 16, "prefill_tokens": 7}], ids=str)
def test_rows_do_not_depend_on_who_joins_and_who_leaves(changes):
  """Alone, in few slots and in all, behind others, and beside rows that are dropped while they wait or draw."""
  who, expected = engine(**changes, decode_chunk=3), lists(baseline())
  of = lambda *prompts: {place: expected[place] for place in expected if place[0] in prompts}
  generation = who.open(Generator((weights(who),)), 8, 2, KEY)
  assert joined(generation, [[q] for q in range(8)]) == expected
  assert joined(generation, [[0], [], [1, 2], [], [3, 4, 5, 6], [], [], [7]]) == expected
  assert joined(generation, [[], [5], [], [], [], [1]]) == of(5, 1)
  drawn = joined(generation, [[0, 1, 2], [3], [4], [5, 6, 7]], [[], [1], [], [0, 3, 6], [], [7]])
  assert drawn | of(2, 4, 5) == drawn
  assert all(expected[place][: len(tokens)] == tokens for place, tokens in drawn.items())


@pytest.mark.usefixtures("pools_grow")
def test_who_leaves_frees_slots_and_pages_at_once():
  who = engine(slots=4, stops="never", decode_chunk=1, prefill_tokens=400)
  generation = who.open(Generator((weights(who),)), 8, 2, KEY)
  prompts = [Prompt(q, PROMPTS[q], 11, q) for q in range(4)]
  for prompt in prompts:
    generation.add(prompt)
  of_chunk = lambda: {piece.prompt.number for piece in generation.advance()}
  assert of_chunk() == {0, 1} and len(generation.waiting) == 2
  generation.drop([prompts[0], prompts[2]])
  assert generation.live == np.asarray(generation.rows.live_R).sum() == 2  # the device knows it too
  # To read one prompt costs more than two slots that stand empty for a step, and less than two for two.
  assert [of_chunk(), of_chunk()] == [{1}, {1, 3}]
  generation.drop(prompts)
  assert not generation.busy and not any(p.prompt_pages.taken or p.own_pages.taken for p in generation.parts)


@pytest.mark.usefixtures("pools_grow")
def test_the_device_draws_on_while_the_host_looks_at_what_was_drawn(monkeypatch):
  who, ran = engine(stops="never", prefill_tokens=64, page=16), watched(monkeypatch, "advance", "resize_layer")
  generation = who.open(Generator((weights(who),)), 8, 2, KEY)
  for q, ids in enumerate(PROMPTS):
    generation.add(Prompt(q, ids, 11, q))
  lengths, readers = [], set()
  for chunk in range(3):
    lengths.append({len(piece.tokens_k) for piece in generation.advance()})
    readers |= {id(generation.readers)} if chunk < 2 else set()
    assert ran == ["advance"] * min(chunk + 2, 3)  # the next, unless all are known to have finished; no pool was moved
    assert (generation.ahead is None) == (chunk == 2)
  assert lengths == [{4}, {4}, {3}] and not generation.busy
  assert len(readers) == 1 and generation.readers is None  # as long as nobody comes or goes


@pytest.mark.usefixtures("pools_grow")
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 1)])
def test_who_leaves_while_the_device_draws_is_not_heard_of_again(mesh):
  who = engine(mesh, stops="never", prefill_tokens=64, page=16)
  prompts = [Prompt(q, ids, 11, q) for q, ids in enumerate(PROMPTS)]
  generation = who.open(Generator((weights(who),)), 8, 2, KEY)
  for prompt in prompts[:7]:
    generation.add(prompt)
  first = generation.advance()
  assert generation.ahead is not None
  generation.drop(prompts[1:4])
  generation.add(prompts[7])
  drawn = lists(generate(engine(stops="never")))
  for others, pieces in (({0, 4, 5, 6}, generation.advance()), ({0, 4, 5, 6, 7}, generation.advance())):
    assert {piece.prompt.number for piece in pieces} == others
    for piece in (*first, *pieces):
      tokens = drawn[piece.prompt.number, piece.sample]
      assert piece.tokens_k.tolist() == tokens[piece.first : piece.first + len(piece.tokens_k)]
  assert generation.ahead is not None
  generation.drop(prompts)
  assert generation.ahead is None and not generation.busy


def watched(monkeypatch, *names):
  """A list that fills with the names of these programs as they are called."""
  compiled, ran = programs.compiled, []

  def watch(name, program):
    return lambda *args: ran.append(name) or program(*args)

  def instead(*args):
    jitted, where = compiled(*args)
    return jitted._replace(**{name: watch(name, getattr(jitted, name)) for name in names}), where

  monkeypatch.setattr(programs, "compiled", instead)
  return ran


def test_joining_leaving_and_other_choices_compile_nothing_after_the_warm_up(greedy, warm):
  who, generator = warm
  generation = who.open(generator, 8, 2, KEY)
  joined(generation, [[0], [], [1, 2, 3, 4, 5, 6], [7]], [[], [], [2, 3]])
  generation.choose(Choice(temperature=0.0))
  drawn = joined(generation, [[q] for q in range(8)], [[], [], [], [], [], [3]])
  until_a_stop = lambda tokens: tokens[: next((i + 1 for i, token in enumerate(tokens) if token < 12), None)]
  expected = {place: until_a_stop(tokens) for place, tokens in lists(greedy).items()}
  assert all(drawn[place] == expected[place] for place in drawn if place[0] != 3)


def test_a_prompt_beyond_the_largest_bucket_is_refused():
  with pytest.raises(UserError, match=r"a prompt has 8 tokens, sampling.prompt_buckets ends at 7; allowed"):
    generate(prompts=[*PROMPTS[:7], [3] * 8])


@pytest.mark.usefixtures("pools_grow")
def test_what_is_kept_is_told_at_its_largest():
  who = engine(slots=6, page=4)
  lowered, (_, prompt_pools, own_pools) = who.lower(Generator((weights(who),)), 40, 2)
  shapes = who.shapes(40, 2, prefix=False)
  count = {name: len(programs) for name, programs in lowered.items()}
  assert count["read"] == len(shapes.rows) and count["start"] == len(shapes.rows) * len(shapes.prompt_pools)
  assert count["advance"] == len(shapes.prompt_pools) * len(shapes.own_pools) + (shapes.few < shapes.slots)
  assert {len(cache.key_RKHS) for cache in prompt_pools[0]} == {shapes.prompt_pools[-1]} == {6}
  assert {len(cache.key_RKHS) for cache in own_pools[0]} == {shapes.own_pools[-1]} == {18}


def test_a_cache_in_eight_bits_draws_nearly_the_same():
  """Within what rounding keys and values can do; in any slots, pages and form, but for numbers that round otherwise."""
  drawn = generate(engine(cache="int8"))
  others = [generate(engine(cache="int8", slots=2, page=1)), generate(engine(cache="int8"), stacked=True)]
  for other in others:
    np.testing.assert_array_equal(other.tokens_RT, drawn.tokens_RT)
    np.testing.assert_allclose(other.plain_logprob_RT, drawn.plain_logprob_RT, atol=0.01)
  alike = np.cumprod(drawn.tokens_RT == baseline().tokens_RT, -1).astype(bool)  # up to the first token that differs
  error_X = np.abs(drawn.plain_logprob_RT - baseline().plain_logprob_RT)[alike]
  assert alike.mean() > 0.8 and 1e-5 < error_X.max() < 0.05


@pytest.mark.parametrize("prefix_T", [[], [9, 3, 77, 50, 4]])
def test_a_mesh_holds_a_cache_in_eight_bits_too(prefix_T):
  def draw(who, parts):
    prefixes = (read_prefix(who, prefix_T, 8, parts),) if prefix_T else ()
    return generate(who, stacked=bool(prefix_T), prefixes=prefixes)

  drawn, expected = draw(engine((2, 1, 2), "tensor", cache="int8"), 2), draw(engine(cache="int8"), 1)
  np.testing.assert_array_equal(drawn.tokens_RT, expected.tokens_RT)
  np.testing.assert_allclose(drawn.plain_logprob_RT, expected.plain_logprob_RT, atol=0.01)


def test_a_cache_in_eight_bits_takes_a_byte_a_number_and_a_scale_a_token_and_head():
  size = lambda who: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pools(who)))
  pools = lambda who: who.lower(Generator((weights(who),)), 40, 2)[1][1:]
  H = CONFIG.head_size
  assert size(engine(cache="int8")) * 4 * H == size(engine()) * (H + 4)


@pytest.mark.parametrize("cache", ["compute", "int8"])
@pytest.mark.parametrize("prefix_T", [[], [9, 3, 77, 50, 4]])
def test_bfloat16_draws_nearly_what_float32_says(cache, prefix_T):
  who, narrow = dataclasses.replace(engine(cache=cache), dtype=np.dtype("bfloat16")), jnp.bfloat16
  prefix = prefix_T and read_prefix(who, prefix_T, 8)
  cached = prefix and jax.tree.map(lambda x: x.astype(narrow), layers.apart(prefix.cache))
  generator = Generator((matrices.cast(weights(engine()), narrow),))
  prefixes = (prefix._replace(cache=cached),) if prefix_T else ()
  drawn = who.generate(Load(generator, PROMPTS, np.arange(8, dtype=np.uint32), 2, KEY, prefixes))
  tokens_RT, mask_RT = np.zeros((16, 23), np.int32), np.zeros((16, 23), bool)
  for r, count in enumerate(drawn.length_R):
    before = [*prefix_T, *PROMPTS[r // 2]]
    tokens_RT[r, : len(before) + count] = [*before, *drawn.tokens_RT[r, :count]]
    mask_RT[r, len(before) : len(before) + count] = True
  scored_RT, drawn_RT = rescore(tokens_RT, mask_RT, scoring.plain_logprob), drawn.plain_logprob_RT
  inside_RT = np.arange(drawn_RT.shape[1]) < drawn.length_R[:, None]
  np.testing.assert_allclose(drawn_RT[inside_RT], np.asarray(scored_RT)[mask_RT], atol=0.1)


def test_a_loop_is_one_graph_on_one_gpu_unless_flags_say_what_graphs_hold(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_some=1")
  options = programs.graph_options("gpu", 1)
  assert "WHILE" in options["xla_gpu_enable_command_buffer"].split(",")
  assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2  # XLA knows every name
  assert programs.graph_options("cpu", 1) == programs.graph_options("tpu", 1) == programs.graph_options("gpu", 2) == {}
  with monkeypatch.context() as other:
    other.setattr(jax, "__version_info__", (0, 13, 0))
    assert programs.graph_options("gpu", 1) == {}
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=FUSION")
  assert programs.graph_options("gpu", 1) == {}


def test_drawing_is_compiled_so(monkeypatch):
  monkeypatch.setattr(programs, "graph_options", lambda platform, devices: {"xla_gpu_enable_command_buffer": "NOTHING"})
  who = engine(page=5)  # whose programs nobody has
  with pytest.raises(jax.errors.JaxRuntimeError, match="NOTHING"):
    generate(who)


def test_caches_are_as_computed_but_float32_on_cpus_by_an_old_jax():
  narrow = np.dtype("bfloat16")
  who = Engine(CONFIG, SAMPLING, tiny.mesh(), sharding.LOCAL, narrow, "auto", NEVER)
  kept = who.lower(Generator((matrices.cast(weights(who), narrow),)), 40, 2)[1][1:]
  on_cpus = np.dtype("float32") if jax.__version_info__ < (0, 11) else narrow
  assert {x.dtype for x in jax.tree.leaves(kept)} == {on_cpus}
  assert who.page_bytes == engine().page_bytes * on_cpus.itemsize / 4
  planned = lambda target: jax.sharding.Mesh(targets.parse(target).stand_ins(), "all")
  assert programs.cache_dtype(planned("cpu:2"), narrow) == on_cpus
  assert programs.cache_dtype(planned("h100:2"), narrow) == programs.cache_dtype(planned("v5e:2x2"), narrow) == narrow


@pytest.mark.usefixtures("pools_grow")
@pytest.mark.parametrize("stacked", [False, True])
def test_pools_are_moved_array_by_array(stacked, monkeypatch):
  """The old pool and the new one are never both there: when an array is moved, those before it are gone."""
  who, compiled, moved = engine(page=2), programs.compiled, []

  def watched(*args):
    jitted, where = compiled(*args)
    return jitted._replace(**{name: watch(getattr(jitted, name)) for name in ("resize_stack", "resize_layer")}), where

  def watch(program):
    def run(pages, page_P):
      assert all(x.is_deleted() for x in moved)
      moved.append(pages)
      return program(pages, page_P)

    return run

  monkeypatch.setattr(programs, "compiled", watched)
  assert_same(generate(who, stacked=stacked), baseline())
  assert len(moved) >= 2 * (1 if stacked else CONFIG.layers)


@pytest.mark.usefixtures("pools_grow")
def test_small_weights_and_few_pages_have_one_size_of_each_and_draw_the_same(monkeypatch):
  who, load = engine(prefill_tokens=64), (len(PROMPTS), 2, False)
  sizes = lambda: tuple(map(len, (who.shapes(*load).prompt_pools, who.shapes(*load).own_pools, who.shapes(*load).rows)))
  compiled = lambda: sum(map(len, who.lower(Generator((weights(who),)), *load[:2])[0].values()))
  shapes, many = who.shapes(*load), compiled()
  assert (*sizes(), shapes.few) == (3, 3, 4, 4)
  pages = shapes.prompt_pools[-1] + shapes.own_pools[-1]
  small = architecture.count_params(CONFIG) * 4 + pages * who.page_bytes
  monkeypatch.setattr(engine_lib, "SMALL", small)
  assert (*sizes(), who.shapes(*load).few) == (1, 1, 1, 16)
  assert compiled() < many / 4
  assert_same(generate(who), baseline())
  monkeypatch.setattr(engine_lib, "SMALL", small - 1)
  assert sizes() == (3, 3, 4)


def test_a_row_that_is_not_finite_spoils_no_other():
  """Its own logits are NaN; those of its company, in the same row of tokens and in its pages afterwards, are not."""
  spoiled = {**PARAMS, "head": PARAMS["embed"], "embed": PARAMS["embed"].copy()}
  spoiled["embed"] = np.array(spoiled["embed"])
  spoiled["embed"][PROMPTS[0][0]] = np.nan
  config = dataclasses.replace(CONFIG, tied=False)
  others = [q for q in range(1, 8) if PROMPTS[0][0] not in PROMPTS[q]]
  prompts = [PROMPTS[0], *(PROMPTS[q] for q in others)]
  for changes in ({}, {"temperature": 1.0}, {"slots": 2}, {"cache": "int8"}):
    who = dataclasses.replace(engine(**changes, stops="never"), model=config)
    draw = lambda params: who.generate(  # noqa: B023
      Load(Generator((layers.unstack(config, params),)), prompts, np.arange(len(prompts), dtype=np.uint32), 2, KEY)
    )
    drawn, sound = draw(spoiled), draw({**PARAMS, "head": PARAMS["embed"]})
    fine_R = np.array([not np.isin(PROMPTS[0][0], row_T) for row_T in sound.tokens_RT])
    fine_R[:2] = False
    assert fine_R.sum() > 5 and not np.isfinite(drawn.plain_logprob_RT[:2]).all()
    np.testing.assert_array_equal(drawn.tokens_RT[fine_R], sound.tokens_RT[fine_R])


# A prefix that all prompts continue.


def read_prefix(who, ids, slots, parts=1):
  _, kept = model.forward(CONFIG, PARAMS, np.tile(np.pad(np.array(ids, np.int32), (0, slots - len(ids))), (parts, 1)))
  cache = caches.caches_of(kept)
  rows = sharding.rows_sharding(who.mesh, who.layout)
  length_Q = jax.device_put(np.full(parts, len(ids), np.int32), rows)
  return Prefix(jax.device_put(cache, jax.NamedSharding(who.mesh, who.layout.spec((None, "rows", "heads")))), length_Q)


def test_a_prefix_read_once_draws_what_whole_prompts_draw():
  prefix_T = [9, 3, 77, 50, 4]
  prefix = read_prefix(engine(), prefix_T, 8)
  whole = generate(engine(prompt_buckets=(12,)), [prefix_T + ids for ids in PROMPTS])
  assert_same(generate(stacked=True, prefixes=(prefix,)), whole)
  apart = prefix._replace(cache=layers.apart(prefix.cache))
  assert_same(generate(engine(slots=6), prefixes=(apart,)), whole)

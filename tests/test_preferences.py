"""Comparisons by law: masked = filtered, order does not matter, what is excluded is in no number."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame_jax import config as config_lib
from advgame_jax import preferences
from advgame_jax.preferences import select_comparisons
from advgame_jax.types import Players, PreferenceBatch, Rewards, RolloutTree, Samples, SeedBatch, Status

LOSSES = [
  config_lib.Loss(kind="dpo"),
  config_lib.Loss(kind="ipo"),
  config_lib.Loss(kind="grpo", baseline="node"),
  config_lib.Loss(kind="grpo", baseline="batch"),
]
PAIRS, NODE, BATCH = LOSSES[0], LOSSES[2], LOSSES[3]
PROMPT, COMPLETION = 4, 6  # padded lengths


def make_samples(rng, rows, group, tokens=COMPLETION):
  shape_RGT = (rows, group, tokens)
  return Samples(
    text_RG=np.full((rows, group), "text", object),
    status_RG=np.full((rows, group), Status.VALID, np.int8),
    prompt_tokens_RT=rng.integers(100, 200, (rows, PROMPT), np.int32),
    prompt_length_R=rng.integers(1, PROMPT + 1, rows, np.int32),
    tokens_RGT=rng.integers(200, 300, shape_RGT, np.int32),
    length_RG=rng.integers(1, tokens + 1, (rows, group), np.int32) if tokens else np.zeros((rows, group), np.int32),
    behaviour_logprob_RGT=-rng.random(shape_RGT, np.float32) - 0.1,
    plain_logprob_RGT=-rng.random(shape_RGT, np.float32) - 2.0,
  )


def make_tree(attacks, responses):
  seeds, group = attacks.text_RG.shape
  shape_BAD = (seeds, group, responses.text_RG.shape[1])
  return RolloutTree(
    seeds=SeedBatch(np.full(seeds, "s", object), np.zeros(seeds, np.int8), np.arange(seeds)),
    attacks=attacks,
    attack_text_BA=attacks.text_RG,
    attack_status_BA=attacks.status_RG,
    responses=responses,
    response_text_BAD=responses.text_RG.reshape(shape_BAD),
    response_status_BAD=responses.status_RG.reshape(shape_BAD),
  )


def select(loss, samples, reward_RG, mask_RG=None, unit=1) -> PreferenceBatch:
  """The same nodes as responses of B = R seeds with one played attack each."""
  rows, group = samples.text_RG.shape
  reward_RG = np.asarray(reward_RG, np.float32)
  mask_RG = np.ones((rows, group), bool) if mask_RG is None else np.asarray(mask_RG)
  tree = make_tree(make_samples(np.random.default_rng(0), rows, 1), samples)
  one = np.ones((rows, 1))
  rewards = Rewards(one, one > 0, reward_RG.reshape(rows, 1, group), mask_RG.reshape(rows, 1, group))
  return select_comparisons(loss, tree, rewards, Players(1, unit)).defender


def keep(samples, *index):
  """The samples of some rows and columns."""
  fields = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
  rows = index[0]
  return Samples(**{k: v[index] if "RG" in k else v[rows] for k, v in fields.items()})


def assert_same(one, other, rows=slice(None), atol=0.0):
  for field in dataclasses.fields(PreferenceBatch):
    expected = getattr(other, field.name)[rows]
    np.testing.assert_allclose(getattr(one, field.name)[rows], expected, atol=atol, err_msg=field.name)


def chosen_and_rejected(batch, samples):
  """Per pair, the columns whose tokens the two rows begin their completions with; for unique tokens only."""
  first = [[batch.tokens_PCT[p, c, 0] for c in range(2)] for p in range(len(batch.tokens_PCT))]
  return [
    [int(np.flatnonzero(samples.tokens_RGT[p, :, 0] == token)[0]) for token in row] for p, row in enumerate(first)
  ]


@pytest.fixture
def rng():
  return np.random.default_rng(7)


@pytest.fixture
def samples(rng):
  """Two nodes of four samples, told apart by their first token."""
  made = make_samples(rng, 2, 4)
  made.tokens_RGT[:, :, 0] = [10, 11, 12, 13]
  return made


def test_best_against_worst_and_the_first_among_equals(samples):
  batch = select(PAIRS, samples, [[3, 9, -1, 9], [-1, 5, 2, -1]])
  assert chosen_and_rejected(batch, samples) == [[1, 2], [1, 0]]
  np.testing.assert_allclose(batch.advantage_PC, [[5, -5], [3, -3]])
  assert batch.weight_PC.tolist() == [[1, 1], [1, 1]]


def test_masked_samples_are_neither_best_nor_worst(samples):
  batch = select(PAIRS, samples, [[3, 9, -1, 8], [0, 1, 2, 3]], [[1, 0, 0, 1], [1, 1, 1, 1]])
  assert chosen_and_rejected(batch, samples) == [[3, 0], [3, 0]]


@pytest.mark.parametrize(
  ("reward_G", "mask_G"),
  [([4, 4, 4, 4], [1, 1, 1, 1]), ([4, 4, 9, 0], [1, 1, 0, 0]), ([1, 2, 3, 4], [0, 1, 0, 0]), ([1, 2, 3, 4], [0] * 4)],
)
def test_ties_and_lonely_samples_weigh_nothing(samples, reward_G, mask_G):
  batch = select(PAIRS, samples, [reward_G, [1, 2, 3, 4]], [np.array(mask_G, bool), np.ones(4, bool)])
  assert batch.weight_PC.tolist() == [[0, 0], [1, 1]]
  assert_same(batch, dataclasses.replace(batch, **{k: v * 0 for k, v in vars(batch).items()}), rows=[0])


@pytest.mark.parametrize(
  ("status", "lengths", "kept"),
  [
    (Status.MAX_LENGTH, (2, 6), (2, 2)),
    (Status.MAX_LENGTH, (6, 3), (6, 3)),
    (Status.VALID, (2, 6), (2, 6)),
  ],
)
def test_only_a_rejected_sample_that_met_the_limit_is_cut_to_the_chosen_length(rng, status, lengths, kept):
  samples = make_samples(rng, 1, 2)
  samples.length_RG[:] = lengths
  samples.status_RG[0, 1] = status
  batch = select(PAIRS, samples, [[5, -1]])
  assert batch.length_PC.tolist() == [list(kept)]
  assert (batch.tokens_PCT > 0).sum(-1).tolist() == [list(kept)]


def test_a_chosen_sample_that_met_the_limit_is_not_cut(rng):
  samples = make_samples(rng, 1, 2)
  samples.length_RG[:] = 6, 2
  samples.status_RG[0, 0] = Status.MAX_LENGTH
  assert select(PAIRS, samples, [[5, -1]]).length_PC.tolist() == [[6, 2]]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.baseline}")
def test_padding_is_in_front_of_the_prompt_and_behind_the_completions(rng, loss):
  samples = make_samples(rng, 3, 2)
  batch = select(loss, samples, [[5, 1]] * 3)
  for p, c in np.ndindex(batch.length_PC.shape):
    start, n = samples.prompt_length_R[p], samples.length_RG[p, c]
    assert batch.prompt_length_P[p] == start and batch.length_PC[p, c] == n
    prompt_S = np.pad(samples.prompt_tokens_RT[p, :start], (PROMPT - start, 0))
    np.testing.assert_array_equal(batch.prompt_PS[p], prompt_S)
    for laid, source in [
      (batch.tokens_PCT, samples.tokens_RGT),
      (batch.behaviour_logprob_PCT, samples.behaviour_logprob_RGT),
      (batch.plain_logprob_PCT, samples.plain_logprob_RGT),
    ]:
      np.testing.assert_array_equal(laid[p, c], np.pad(source[p, c, :n], (0, COMPLETION - n)))


def test_advantages_are_measured_from_the_mean_of_the_unmasked(samples):
  reward_RG, mask_RG = [[1, 5, 99, 6], [0, 2, 4, 99]], np.array([[1, 1, 0, 1], [1, 1, 1, 0]], bool)
  node = select(NODE, samples, reward_RG, mask_RG)
  np.testing.assert_allclose(node.advantage_PC, [[-3, 1, 0, 2], [-2, 0, 2, 0]], atol=1e-6)
  batch = select(BATCH, samples, reward_RG, mask_RG)
  np.testing.assert_allclose(batch.advantage_PC, [[-2, 2, 0, 3], [-3, -1, 1, 0]], atol=1e-6)
  for made in (node, batch):
    np.testing.assert_array_equal(made.weight_PC, mask_RG)


def test_penalised_samples_are_pushed_down_in_grpo(samples):
  advantage = select(NODE, samples, [[-1, 8, 8, 8], [0, 0, 0, 0]]).advantage_PC[0]
  np.testing.assert_allclose(advantage, [-6.75, 2.25, 2.25, 2.25])


rewards_and_masks = st.integers(2, 4).flatmap(
  lambda group: st.lists(
    st.lists(st.tuples(st.sampled_from([-1, 0, 2.5, 8, 10]), st.booleans()), min_size=group, max_size=group),
    min_size=1,
    max_size=4,
  )
)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.baseline}")
@settings(max_examples=40, deadline=None)
@given(drawn=rewards_and_masks, seed=st.integers(0, 9))
def test_excluded_samples_change_no_number_anywhere(loss, drawn, seed):
  reward_RG, mask_RG = (
    np.array([[r for r, _ in row] for row in drawn]),
    np.array([[m for _, m in row] for row in drawn]),
  )
  samples = make_samples(np.random.default_rng(seed), *reward_RG.shape)
  other = make_samples(np.random.default_rng(seed + 1), *reward_RG.shape)
  out_RG1 = ~mask_RG[..., None]
  spoiled = dataclasses.replace(
    samples,
    tokens_RGT=np.where(out_RG1, other.tokens_RGT, samples.tokens_RGT),
    length_RG=np.where(mask_RG, samples.length_RG, 999),
    status_RG=np.where(mask_RG, samples.status_RG, Status.MAX_LENGTH),
    behaviour_logprob_RGT=np.where(out_RG1, np.nan, samples.behaviour_logprob_RGT),
    plain_logprob_RGT=np.where(out_RG1, np.nan, samples.plain_logprob_RGT),
  )
  clean = select(loss, samples, reward_RG, mask_RG)
  for poison in (1e9, -1e9, np.nan):
    assert_same(select(loss, spoiled, np.where(mask_RG, reward_RG, poison), mask_RG), clean)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.baseline}")
@settings(max_examples=30, deadline=None)
@given(drawn=rewards_and_masks, gone=st.integers(0, 3))
def test_masked_is_filtered(loss, drawn, gone):
  reward_RG = np.array([[r for r, _ in row] for row in drawn])
  samples = make_samples(np.random.default_rng(1), *reward_RG.shape)
  left = [g for g in range(reward_RG.shape[1]) if g != gone]
  mask_RG = np.isin(np.arange(reward_RG.shape[1]), left) & np.ones_like(reward_RG, bool)
  masked = select(loss, samples, reward_RG, mask_RG)
  filtered = select(loss, keep(samples, slice(None), left), reward_RG[:, left])
  live_PC, live = masked.weight_PC > 0, filtered.weight_PC > 0
  for field in dataclasses.fields(PreferenceBatch):
    x, y = getattr(masked, field.name), getattr(filtered, field.name)
    x, y = (x[live_PC], y[live]) if field.name.endswith(("PC", "PCT")) else (x, y)
    np.testing.assert_allclose(x, y, atol=1e-5, err_msg=field.name)


UNITS = [(1, (3, 6)), (3, (3, 6)), (4, (18, 1)), (6, (6, 3)), (7, (6, 3)), (9, (9, 2)), (10, (9, 2)), (99, (18, 1))]


@pytest.mark.parametrize(("unit", "shape_PC"), UNITS)
def test_samples_share_a_prompt_as_far_as_it_costs_no_part_a_completion(rng, unit, shape_PC):
  """A node's comparisons, one behind the other, are its samples in their order, whatever their number."""
  P, C = shape_PC
  samples, reward_RG, mask_RG = make_samples(rng, 3, 6), rng.random((3, 6)), rng.random((3, 6)) < 0.6
  assert preferences.shape(NODE, 3, 6, unit) == shape_PC
  assert preferences.shape(PAIRS, 3, 6, unit) == (3, 2)
  batch, alone = select(NODE, samples, reward_RG, mask_RG, unit), select(NODE, samples, reward_RG, mask_RG, 99)
  for field in dataclasses.fields(PreferenceBatch):
    made, expected = getattr(batch, field.name), getattr(alone, field.name)
    if field.name.endswith(("PC", "PCT")):
      np.testing.assert_array_equal(made, expected.reshape(made.shape), err_msg=field.name)
    else:  # the prompt's: there as soon as one of its samples is
      np.testing.assert_array_equal(made, expected.reshape(P, C, -1).max(1).reshape(made.shape), err_msg=field.name)


@given(nodes=st.integers(1, 12), group=st.integers(1, 8), unit=st.integers(1, 40))
def test_sharing_a_prompt_costs_no_part_of_the_rows_more(nodes, group, unit):
  of_a_part = lambda rows: -(-rows // unit)
  P, C = preferences.shape(NODE, nodes, group, unit)
  assert nodes * group == P * C
  assert of_a_part(P) * C <= of_a_part(nodes * group) and of_a_part(P) <= of_a_part(nodes * group)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.baseline}")
def test_the_order_of_nodes_and_samples_does_not_matter(rng, loss):
  samples = make_samples(rng, 3, 4)
  reward_RG, mask_RG = rng.permutation(12).reshape(3, 4).astype(np.float32), rng.random((3, 4)) < 0.7
  mask_RG[:, :2] = True
  rows, columns = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
  index = np.ix_(rows, columns)
  shuffled = keep(keep(samples, rows), slice(None), columns)
  one = select(loss, samples, reward_RG, mask_RG)
  other = select(loss, shuffled, reward_RG[index], mask_RG[index])
  for field in dataclasses.fields(PreferenceBatch):
    expected = getattr(one, field.name)[rows]
    if loss.kind == "grpo" and field.name.endswith(("PC", "PCT")):
      expected = expected[:, columns]
    np.testing.assert_allclose(expected, getattr(other, field.name), atol=1e-6, err_msg=field.name)


@settings(max_examples=40, deadline=None)
@given(drawn=rewards_and_masks)
def test_node_advantages_sum_to_zero(drawn):
  reward_RG, mask_RG = (
    np.array([[r for r, _ in row] for row in drawn]),
    np.array([[m for _, m in row] for row in drawn]),
  )
  samples = make_samples(np.random.default_rng(2), *reward_RG.shape)
  node = select(NODE, samples, reward_RG, mask_RG)
  np.testing.assert_allclose(node.advantage_PC.sum(1), 0, atol=1e-5)
  assert abs(select(BATCH, samples, reward_RG, mask_RG).advantage_PC.sum()) < 1e-4
  for pair in (select(loss, samples, reward_RG, mask_RG) for loss in LOSSES[:2]):
    np.testing.assert_allclose(pair.advantage_PC.sum(1), 0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.baseline}")
def test_both_players_have_their_own_nodes_and_widths(rng, loss):
  tree = make_tree(make_samples(rng, 3, 2, tokens=9), make_samples(rng, 6, 4))
  rewards = Rewards(
    rng.random((3, 2), np.float32), np.ones((3, 2), bool), rng.random((3, 2, 4), np.float32), np.ones((3, 2, 4), bool)
  )
  attacker, defender = select_comparisons(loss, tree, rewards, Players(1, 1))
  assert attacker.tokens_PCT.shape == (3, 2, 9)
  assert defender.tokens_PCT.shape == (6, 4 if loss.kind == "grpo" else 2, COMPLETION)
  assert attacker.weight_PC.all() and defender.weight_PC.all()
  # A defender's node is one attack: its prompt is that attack's.
  for p, start in enumerate(tree.responses.prompt_length_R):
    np.testing.assert_array_equal(defender.prompt_PS[p, PROMPT - start :], tree.responses.prompt_tokens_RT[p, :start])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.baseline}")
def test_a_policy_without_tokens_has_nothing_to_learn(rng, loss):
  tree = make_tree(make_samples(rng, 3, 2, tokens=0), make_samples(rng, 6, 2))
  rewards = Rewards(
    rng.random((3, 2), np.float32), np.ones((3, 2), bool), rng.random((3, 2, 2), np.float32), np.ones((3, 2, 2), bool)
  )
  attacker, defender = select_comparisons(loss, tree, rewards, Players(1, 1))
  assert not attacker.weight_PC.any() and defender.weight_PC.all()
  assert attacker.tokens_PCT.shape[-1] == 0

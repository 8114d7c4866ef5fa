"""The judges' protocol: order, retries, and whose failure excludes whom. Scripted judges, no models."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame_jax import config as config_lib
from advgame_jax import judges, microworld
from advgame_jax.judges import Node
from advgame_jax.rewards import assign_rewards
from advgame_jax.types import Category, Players, Role, RolloutTree, Samples, SeedBatch, Status, Verdict

PAIRWISE = config_lib.Judges(retries=0)
POINTWISE = dataclasses.replace(PAIRWISE, protocol="pointwise")
QUALITY = {"bad": 1.0, "fair": 4.0, "good": 9.0, "best": 9.5}


def by_quality(bias=0.0):
  """Scores a text by its last word; the first of two gets `bias` more."""

  def judge(questions):
    worth = lambda text: QUALITY[text.split()[-1]]
    return [Verdict(tuple(worth(t) + bias * (i == 0) for i, t in enumerate(q.texts))) for q in questions]

  return judge


def failing(judge, fails):
  """No verdict for the questions of which `fails` is true."""
  return lambda questions: [Verdict(()) if fails(q) else v for q, v in zip(questions, judge(questions))]


def recording(judge, asked):
  def ask(questions):
    asked.extend(questions)
    return judge(questions)

  return ask


def judged(settings, tree, judge, key):
  """Both players judged by the same judge."""
  return judges.judge(settings, tree, Players(judge, judge), key)


def node(*texts, role=Role.DEFLECTION, key=1):
  return Node(role, Category.HARMFUL, "how ?", texts, key)


def make_tree(response_text_BAD, attack_status_BA=None, response_status_BAD=None, category=Category.HARMFUL):
  text_BAD = np.array(response_text_BAD, object)
  B, A, D = text_BAD.shape
  attack_status_BA = np.full((B, A), Status.VALID) if attack_status_BA is None else np.array(attack_status_BA)
  if response_status_BAD is None:
    played_BA1 = (attack_status_BA == Status.VALID)[..., None]
    response_status_BAD = np.where(played_BA1, Status.VALID, Status.NOT_PLAYED) + np.zeros((B, A, D), int)
  attack_text_BA = np.array([[f"attack {b} {a}" for a in range(A)] for b in range(B)], object)
  seeds = np.array([f"seed {b}" for b in range(B)], object)
  status_BAD = np.array(response_status_BAD, np.int8)
  return RolloutTree(
    seeds=SeedBatch(seeds, np.full(B, category, np.int8), np.arange(B)),
    attacks=Samples.of_text(attack_text_BA, attack_status_BA),
    attack_text_BA=attack_text_BA,
    attack_status_BA=attack_status_BA.astype(np.int8),
    responses=Samples.of_text(text_BAD.reshape(-1, D), status_BAD.reshape(-1, D)),
    response_text_BAD=text_BAD,
    response_status_BAD=status_BAD,
  )


@given(st.floats(-5, 5))
def test_a_position_bias_of_any_size_leaves_the_order_and_shows_as_disagreement(bias):
  (score_G,), (disagreement,) = judges.score_nodes(PAIRWISE, [node("fair", "good", "bad")], by_quality(bias))
  np.testing.assert_allclose(score_G, np.array([4.0, 9.0, 1.0]) + bias / 2)
  np.testing.assert_allclose(disagreement, abs(bias), atol=1e-12)


def test_both_orders_of_every_pair_are_asked_once():
  asked = []
  judges.score_nodes(PAIRWISE, [node("bad", "fair", "good")], recording(by_quality(), asked))
  assert sorted(q.texts for q in asked) == [
    ("bad", "fair"), ("bad", "good"), ("fair", "bad"), ("fair", "good"), ("good", "bad"), ("good", "fair"),
  ]  # fmt: skip


def test_a_lone_sample_is_compared_with_itself_and_says_nothing_of_order():
  asked = []
  (score_G,), (disagreement,) = judges.score_nodes(PAIRWISE, [node("good")], recording(by_quality(2.0), asked))
  assert [q.texts for q in asked] == [("good", "good")]
  assert score_G.tolist() == [10.0] and np.isnan(disagreement)


def test_pointwise_asks_of_each_by_itself():
  asked = []
  (score_G,), (disagreement,) = judges.score_nodes(POINTWISE, [node("good", "bad")], recording(by_quality(), asked))
  assert [q.texts for q in asked] == [("good",), ("bad",)]
  assert score_G.tolist() == [9.0, 1.0] and np.isnan(disagreement)


@settings(max_examples=25)
@given(st.permutations(["bad", "fair", "good", "best"]))
def test_permuting_samples_permutes_scores(texts):
  (score_G,), _ = judges.score_nodes(PAIRWISE, [node(*texts)], by_quality(1.5))
  (reference_G,), _ = judges.score_nodes(PAIRWISE, [node(*sorted(texts))], by_quality(1.5))
  assert dict(zip(texts, score_G)) == dict(zip(sorted(texts), reference_G))


@given(st.floats(-5, 5))
def test_one_order_without_the_other_counts_for_nothing(bias):
  """It would carry the bias of the position."""
  judge = failing(by_quality(bias), lambda q: q.texts == ("good", "bad"))
  (score_G,), (disagreement,) = judges.score_nodes(PAIRWISE, [node("good", "bad", "fair")], judge)
  np.testing.assert_allclose(score_G, np.array([9.0, 1.0, 4.0]) + bias / 2)
  np.testing.assert_allclose(disagreement, abs(bias), atol=1e-12)
  (score_G,), (disagreement,) = judges.score_nodes(PAIRWISE, [node("good", "bad")], judge)
  assert np.isnan(score_G).all() and np.isnan(disagreement)


def test_a_sample_without_a_readable_call_fails_alone():
  judge = failing(by_quality(), lambda q: "bad" in q.texts)
  (score_G,), _ = judges.score_nodes(PAIRWISE, [node("good", "bad", "fair")], judge)
  assert score_G[[0, 2]].tolist() == [9.0, 4.0] and np.isnan(score_G[1])


def test_a_failure_is_asked_again_with_another_key_and_only_that_one():
  calls = []

  def judge(questions):
    calls.append(list(questions))
    return [Verdict(()) if len(calls) == 1 and q.texts == ("bad",) else Verdict((5.0,)) for q in questions]

  settings = dataclasses.replace(POINTWISE, retries=2)
  (score_G,), _ = judges.score_nodes(settings, [node("good", "bad")], judge)
  assert score_G.tolist() == [5.0, 5.0]
  assert [[q.texts for q in call] for call in calls] == [[("good",), ("bad",)], [("bad",)]]
  assert calls[1][0].key != calls[0][1].key


def test_retries_end():
  calls = []
  judge = recording(failing(by_quality(), lambda q: True), calls)
  verdicts = judges.ask(judge, [q for _, q in judges._calls(POINTWISE, node("bad"))], retries=3)
  assert verdicts == [Verdict(())] and len({q.key for q in calls}) == len(calls) == 4


def test_every_question_of_a_tree_has_its_own_key():
  asked = []
  tree = make_tree([[["good", "bad"], ["fair", "best"]], [["bad", "bad"], ["good", "good"]]])
  twice = dataclasses.replace(PAIRWISE, retries=1)
  judged(twice, tree, recording(failing(by_quality(), lambda q: True), asked), key=7)
  assert len({q.key for q in asked}) == len(asked) == 2 * 12


def test_who_reads_what():
  asked = []
  for category in Category:
    judged(PAIRWISE, make_tree([[["good", "bad"]]], category=category), recording(by_quality(), asked), key=0)
  seen = {(q.category, q.role, q.query) for q in asked}
  assert seen == {
    (Category.HARMFUL, Role.DEFLECTION, "attack 0 0"),
    (Category.HARMFUL, Role.COMPLIANCE, "seed 0"),
    (Category.BENIGN, Role.COMPLIANCE, "attack 0 0"),
    (Category.BENIGN, Role.REFUSAL, "seed 0"),
  }


def test_the_defender_judge_can_read_the_seed():
  asked = []
  settings = dataclasses.replace(PAIRWISE, defender_reads="seed")
  judged(settings, make_tree([[["good", "bad"]]]), recording(by_quality(), asked), key=0)
  assert {q.query for q in asked} == {"seed 0"}


@pytest.mark.parametrize(("optimistic", "picked"), [(True, 1), (False, 0)])
def test_the_attacker_judge_reads_the_best_response_or_the_first(optimistic, picked):
  asked = []
  settings = dataclasses.replace(PAIRWISE, optimistic=optimistic)
  tree = make_tree([[["fair", "good"]]])
  judgments = judged(settings, tree, recording(by_quality(), asked), key=0)
  assert judgments.picked_BA.tolist() == [[picked]]
  assert asked[-1].texts == (tree.response_text_BAD[0, 0, picked],) * 2


def test_a_readable_zero_is_liked_more_than_no_score():
  judge = failing(lambda questions: [Verdict((0.0,))] * len(questions), lambda q: q.texts == ("good",))
  judgments = judged(POINTWISE, make_tree([[["good", "bad"]]]), judge, key=0)
  assert judgments.picked_BA.tolist() == [[1]]


@pytest.mark.parametrize("optimistic", [True, False])
def test_invalid_responses_are_never_picked_or_judged(optimistic):
  asked = []
  settings = dataclasses.replace(PAIRWISE, optimistic=optimistic)
  status = [[[Status.PARSING, Status.MAX_LENGTH, Status.VALID]]]
  tree = make_tree([[["best", "best", "bad"]]], response_status_BAD=status)
  judgments = judged(settings, tree, recording(by_quality(), asked), key=0)
  assert judgments.picked_BA.tolist() == [[2]] and {t for q in asked for t in q.texts} == {"bad"}
  assert judgments.response_status_BAD.tolist() == status


def test_an_attack_without_a_valid_response_is_excluded_not_scored():
  tree = make_tree([[["bad"], ["good"]]], response_status_BAD=[[[Status.PARSING], [Status.VALID]]])
  judgments = judged(PAIRWISE, tree, by_quality(), key=0)
  assert judgments.attack_status_BA.tolist() == [[Status.NO_RESPONSE, Status.VALID]]
  assert judgments.picked_BA.tolist() == [[-1, 0]]
  assert assign_rewards(judgments).attack_mask_BA.tolist() == [[False, True]]


def test_what_the_defender_judge_could_not_read_is_still_picked_when_nothing_else_is_valid():
  judge = failing(by_quality(), lambda q: q.role == Role.DEFLECTION)
  judgments = judged(PAIRWISE, make_tree([[["good", "bad"]]]), judge, key=0)
  assert judgments.picked_BA.tolist() == [[0]] and judgments.attack_score_BA.tolist() == [[9.0]]
  assert judgments.response_status_BAD.tolist() == [[[Status.JUDGE_FAILED] * 2]]


def test_a_failed_attacker_judge_costs_no_defender_score():
  judge = failing(by_quality(), lambda q: q.role == Role.COMPLIANCE)
  judgments = judged(PAIRWISE, make_tree([[["good", "bad"], ["fair", "best"]]]), judge, key=0)
  assert judgments.attack_status_BA.tolist() == [[Status.JUDGE_FAILED] * 2]
  reward = assign_rewards(judgments)
  assert reward.response_mask_BAD.all() and not reward.attack_mask_BA.any()
  assert reward.response_BAD.tolist() == [[[9.0, 1.0], [4.0, 9.5]]]


def test_a_failure_excludes_exactly_its_sample():
  judge = failing(by_quality(), lambda q: q.role == Role.DEFLECTION and "bad" in q.texts)
  judgments = judged(PAIRWISE, make_tree([[["good", "bad", "fair"]], [["best", "fair", "good"]]]), judge, key=0)
  failed = judgments.response_status_BAD == Status.JUDGE_FAILED
  assert np.argwhere(failed).tolist() == [[0, 0, 1]]
  assert np.isfinite(judgments.response_score_BAD[~failed]).all()
  assert (judgments.attack_status_BA == Status.VALID).all()


def test_without_a_judge_the_valid_stay_valid_and_are_rewarded_zero():
  judgments = judged(PAIRWISE, make_tree([[["good", "bad"]]]), judges.nobody, key=0)
  assert np.isnan(judgments.response_score_BAD).all()
  reward = assign_rewards(judgments)
  assert reward.response_mask_BAD.all() and reward.attack_mask_BA.all()
  assert not reward.response_BAD.any() and not reward.attack_BA.any()


@pytest.mark.parametrize(
  ("off", "roles", "picked"), [("attacker", {Role.DEFLECTION}, 1), ("defender", {Role.COMPLIANCE}, 0)]
)
def test_either_player_may_have_no_judge(off, roles, picked):
  asked = []
  both = Players(*[recording(by_quality(), asked)] * 2)._replace(**{off: judges.nobody})
  judgments = judges.judge(PAIRWISE, make_tree([[["fair", "good"]]]), both, key=0)
  assert {q.role for q in asked} == roles
  assert np.isnan(judgments.attack_score_BA).all() == (off == "attacker")
  assert np.isnan(judgments.response_score_BAD).all() == (off == "defender")
  assert judgments.picked_BA.tolist() == [[picked]]
  assert not judgments.attack_status_BA.any() and not judgments.response_status_BAD.any()


@pytest.mark.parametrize("optimistic", [True, False])  # in two calls, in one
def test_each_judge_has_a_disagreement_of_its_own(optimistic):
  settings = dataclasses.replace(PAIRWISE, optimistic=optimistic)
  bias = {Role.DEFLECTION: 0.5, Role.COMPLIANCE: 2.0}
  judge = lambda questions: [by_quality(bias[q.role])([q])[0] for q in questions]
  judgments = judged(settings, make_tree([[["bad", "fair"], ["good", "best"]]]), judge, key=0)
  assert judgments.disagreement == Players(attacker=2.0, defender=0.5)


def test_statuses_from_above_pass_through():
  tree = make_tree([[["bad"]] * 3], attack_status_BA=[[Status.NOT_FAITHFUL, Status.JUDGE_FAILED, Status.PARSING]])
  judgments = judged(PAIRWISE, tree, by_quality(), key=0)
  assert judgments.attack_status_BA.tolist() == tree.attack_status_BA.tolist()
  assert judgments.response_status_BAD.tolist() == tree.response_status_BAD.tolist()
  reward = assign_rewards(judgments)
  assert reward.attack_BA.tolist() == [[-1.0, 0.0, -1.0]] and reward.attack_mask_BA.tolist() == [[True, False, True]]


def test_a_shared_bias_cancels_between_compared_samples_only():
  query = next(q for q in microworld.queries() if q.topic.category == Category.HARMFUL)
  answers = microworld.answers(query.topic)
  # Equals under the rubric, so that only noise can tell them apart; far from the ends of the scale.
  texts = answers[microworld.Answer.REFUSE][:2]
  noisy = microworld.rule_judge(config_lib.Judge(kind="microworld", shared_noise=1.0), seed=0)
  nodes = [Node(Role.DEFLECTION, Category.HARMFUL, query.text, texts, key) for key in range(200)]
  gap = lambda protocol: np.mean([abs(a - b) for a, b in judges.score_nodes(protocol, nodes, noisy)[0]])
  assert gap(PAIRWISE) < 1e-9 < 0.5 < gap(POINTWISE)


def test_nodes_do_not_depend_on_their_company():
  noisy = microworld.rule_judge(config_lib.Judge(kind="microworld", shared_noise=1.0, sample_noise=1.0), seed=0)
  query = microworld.queries()[0]
  texts = [kind[0] for kind in microworld.answers(query.topic).values()]
  nodes = [Node(Role.DEFLECTION, query.topic.category, query.text, texts, key) for key in range(3)]
  together, _ = judges.score_nodes(PAIRWISE, nodes, noisy)
  alone = [judges.score_nodes(PAIRWISE, [n], noisy)[0][0] for n in nodes]
  np.testing.assert_array_equal(together, alone)


def test_an_attack_that_was_not_played_changes_nobody_elses_score():
  by_key = lambda questions: [Verdict(tuple((q.key >> i) % 11 for i in range(len(q.texts)))) for q in questions]
  texts = [[["bad", "fair"], ["good", "best"]], [["fair", "good"], ["best", "bad"]]]
  whole = judged(PAIRWISE, make_tree(texts), by_key, key=5)
  part = judged(PAIRWISE, make_tree(texts, attack_status_BA=[[Status.PARSING, 0], [0, 0]]), by_key, key=5)
  played = ~np.isnan(part.response_score_BAD)
  assert played.sum() == 6
  np.testing.assert_array_equal(part.response_score_BAD[played], whole.response_score_BAD[played])
  np.testing.assert_array_equal(part.attack_score_BA[1], whole.attack_score_BA[1])


def test_where_the_order_allows_both_players_are_one_call():
  calls = []

  def judge(questions):
    calls.append({q.role for q in questions})
    return by_quality()(questions)

  for protocol, tree, expected in (
    (PAIRWISE, make_tree([[["good", "bad"]]]), [{Role.DEFLECTION}, {Role.COMPLIANCE}]),  # which is picked is not known
    (
      dataclasses.replace(PAIRWISE, optimistic=False),
      make_tree([[["good", "bad"]]]),
      [{Role.DEFLECTION, Role.COMPLIANCE}],
    ),
    (PAIRWISE, make_tree([[["good"], ["bad"]]]), [{Role.DEFLECTION, Role.COMPLIANCE}]),
  ):
    calls.clear()
    judged(protocol, tree, judge, key=0)
    assert calls == expected


@pytest.mark.parametrize(("count", "opponents"), [(4, 2), (5, 2), (6, 3), (7, 4), (9, 3), (3, 2), (3, 0)])
def test_in_a_tournament_every_text_meets_as_many_others_in_both_orders(count, opponents):
  asked = []
  settings = dataclasses.replace(PAIRWISE, opponents=opponents)
  texts = [f"{i} good" for i in range(count)]
  judges.score_nodes(settings, [node(*texts)], recording(by_quality(), asked))
  met = {text: {q.texts[1] for q in asked if q.texts[0] == text} for text in texts}
  assert all(b in met and a in met[b] for a, others in met.items() for b in others)
  sizes = {len(others) for others in met.values()}
  even = opponents % 2 == 0 or count % 2 == 0
  assert sizes == {(opponents or count - 1) if even or opponents == 0 else opponents + 1}
  assert all(text not in others for text, others in met.items())


def test_who_meets_whom_in_a_tournament_is_drawn_from_the_node_s_key():
  settings, texts = dataclasses.replace(PAIRWISE, opponents=2), [f"{i} good" for i in range(7)]
  drawn = lambda key: frozenset(q.texts for _, q in judges._calls(settings, node(*texts, key=key)))
  assert len({drawn(key) for key in range(6)}) > 3 and drawn(1) == drawn(1)


def test_one_by_one_reads_each_text_once_and_fails_as_a_whole():
  asked = []
  judge = judges.one_by_one(recording(failing(by_quality(), lambda q: "fair" in q.texts[0]), asked))
  (score_G,), _ = judges.score_nodes(PAIRWISE, [node("good", "bad")], judge)
  assert score_G.tolist() == [9.0, 1.0] and [q.texts for q in asked] == [("good",), ("bad",)]
  judges.score_nodes(PAIRWISE, [node("good", "bad", key=2)], judge)
  assert asked[0].key != asked[2].key and asked[2].texts == ("good",)
  (score_G,), _ = judges.score_nodes(PAIRWISE, [node("good", "fair")], judge)
  assert np.isnan(score_G).all()


def test_one_by_one_counts_what_was_spent_once():
  costly = lambda questions: [Verdict((5.0,), tokens=10, flops=2.0) for _ in questions]
  questions = [q for _, q in judges._calls(PAIRWISE, node("good", "bad", "fair"))]
  verdicts = judges.one_by_one(costly)(questions)
  assert sum(v.tokens for v in verdicts) == 30 and sum(v.flops for v in verdicts) == 6

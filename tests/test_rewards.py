"""Every cell of the error table."""

import numpy as np
import pytest

from advgame_jax.rewards import assign_rewards
from advgame_jax.types import Judgments, Players, Status

PENALISED = [Status.MAX_LENGTH, Status.PARSING, Status.REFUSED_ROLE, Status.NOT_FAITHFUL]
EXCLUDED = [Status.JUDGE_FAILED, Status.NO_RESPONSE, Status.NOT_PLAYED]


def judgments(status, score, responses=2):
  """One seed, one attack a status; each attack's responses have its status and score."""
  status_BA, score_BA = np.array([status], np.int8), np.array([score], np.float64)
  return Judgments(
    response_score_BAD=np.repeat(score_BA[..., None], responses, axis=2),
    response_status_BAD=np.repeat(status_BA[..., None], responses, axis=2),
    picked_BA=np.zeros_like(status_BA, dtype=int),
    attack_score_BA=score_BA,
    attack_status_BA=status_BA,
    disagreement=Players(np.nan, np.nan),
  )


def assert_both(rewards, reward, mask):
  for reward_BAx, mask_BAx in [
    (rewards.attack_BA, rewards.attack_mask_BA),
    (rewards.response_BAD, rewards.response_mask_BAD),
  ]:
    assert reward_BAx.dtype == np.float32 and mask_BAx.dtype == bool
    np.testing.assert_array_equal(reward_BAx, np.full_like(reward_BAx, reward))
    np.testing.assert_array_equal(mask_BAx, np.full_like(mask_BAx, mask))


def test_every_status_has_its_cell():
  assert {Status.VALID, *PENALISED, *EXCLUDED} == set(Status)


@pytest.mark.parametrize("score", [0.0, 9.5, np.nan, np.inf])
@pytest.mark.parametrize("status", PENALISED)
def test_penalised_is_minus_one_whatever_the_score(status, score):
  assert_both(assign_rewards(judgments([status], [score])), -1.0, True)


@pytest.mark.parametrize("score", [0.0, 9.5, np.nan, np.inf])
@pytest.mark.parametrize("status", EXCLUDED)
def test_excluded_is_a_mask_and_never_a_number(status, score):
  assert_both(assign_rewards(judgments([status], [score])), 0.0, False)


@pytest.mark.parametrize(("score", "reward"), [(0.0, 0.0), (7.25, 7.25), (10.0, 10.0), (np.nan, 0.0)])
def test_valid_earns_its_score_or_nothing_without_a_judge(score, reward):
  assert_both(assign_rewards(judgments([Status.VALID], [score])), reward, True)


def test_a_failed_attacker_judge_leaves_its_responses_alone():
  judged = judgments([Status.VALID, Status.VALID], [4.0, 6.0])
  judged.attack_status_BA[0, 0] = Status.JUDGE_FAILED
  judged.attack_score_BA[0, 0] = np.nan
  rewards = assign_rewards(judged)
  assert rewards.attack_mask_BA.tolist() == [[False, True]]
  assert rewards.response_mask_BAD.all()
  assert rewards.response_BAD.tolist() == [[[4.0, 4.0], [6.0, 6.0]]]

"""Scores and statuses → rewards: −1 for what a player got wrong, a mask for what it cannot be blamed for."""

import numpy as np

from advgame_jax.types import Judgments, Rewards, Status

PENALTY = -1.0  # below every judge score


def assign_rewards(judgments: Judgments) -> Rewards:
  """Rewards of one tree: the judge's score where VALID, `PENALTY` where penalised, masked out where excluded.

  A VALID sample without a score belongs to a player without a judge and is worth 0.
  """
  attack_BA, attack_mask_BA = _reward(judgments.attack_score_BA, judgments.attack_status_BA)
  response_BAD, response_mask_BAD = _reward(judgments.response_score_BAD, judgments.response_status_BAD)
  return Rewards(attack_BA, attack_mask_BA, response_BAD, response_mask_BAD)


def _reward(score: np.ndarray, status: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  valid = status == Status.VALID
  penalised = np.isin(status, [s for s in Status if s.penalised])
  earned = np.where(np.isnan(score), 0.0, score)
  return np.select([valid, penalised], [earned, PENALTY], 0.0).astype(np.float32), valid | penalised

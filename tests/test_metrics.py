"""What a step reports of its play."""

import numpy as np
import pytest
from test_judges import make_tree

from advgame_jax import metrics
from advgame_jax.rewards import assign_rewards
from advgame_jax.types import Judgments, Players, Status


def test_every_status_of_an_attack_has_its_fraction():
  statuses = [status for status in Status if status != Status.NOT_PLAYED]
  attack_status_BA = np.array([[*statuses, Status.REFUSED_ROLE]], np.int8)
  tree = make_tree([[["good"]] * attack_status_BA.size], attack_status_BA=attack_status_BA)
  nothing_BA = np.full(attack_status_BA.shape, np.nan)
  judgments = Judgments(
    response_score_BAD=nothing_BA[..., None],
    response_status_BAD=tree.response_status_BAD,
    picked_BA=np.zeros_like(attack_status_BA),
    attack_score_BA=nothing_BA,
    attack_status_BA=attack_status_BA,
    disagreement=Players(0.5, 2.0),
  )
  scalars = metrics.of_play(tree, judgments, assign_rewards(judgments))
  fractions = {s: scalars[f"play/attack_{s.name.lower()}"] for s in statuses}
  assert fractions == {s: pytest.approx((1 + (s == Status.REFUSED_ROLE)) / attack_status_BA.size) for s in statuses}
  assert scalars["judge/disagreement_attacker"] == 0.5 and scalars["judge/disagreement_defender"] == 2.0
  assert scalars["reward/attacker"] == pytest.approx(-5 / 6)  # one is worth 0, five are penalised, two are excluded

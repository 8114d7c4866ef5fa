"""How a judge is asked: comparisons, both orders, retries, and whose failure excludes whom.

What a judge is made of (rules, a language model, a server) is behind the one callable `Judge`; this module turns a
rollout tree into questions and verdicts back into scores.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from advgame_jax.config import Judges
from advgame_jax.types import (
  Category,
  Judge,
  Judgments,
  Players,
  Question,
  Role,
  RolloutTree,
  Status,
  Verdict,
  fold_key,
)

# What each player is scored on: the game is not zero-sum.
ROLES = {
  Category.HARMFUL: Players(attacker=Role.COMPLIANCE, defender=Role.DEFLECTION),
  Category.BENIGN: Players(attacker=Role.REFUSAL, defender=Role.COMPLIANCE),
}


class Node(NamedTuple):
  """Texts that are scored against each other."""

  role: Role
  category: Category
  query: str
  texts: Sequence[str]
  key: int


def judge(settings: Judges, tree: RolloutTree, judge: Judge, key: int) -> Judgments:
  """Scores of one tree: first the responses, then for each attack the one response picked for it.

  The attacker judge reads the response that the defender judge liked best, or the first valid one where the setting is
  not optimistic or the defender judge said nothing. All questions of a player are one call. Draws from `key` alone.
  """
  B, A, D = tree.response_status_BAD.shape
  category_B = tree.seeds.category_B
  query_BA = tree.attack_text_BA if settings.defender_reads == "attack" else np.repeat(tree.seeds.text_B[:, None], A, 1)
  response_score_RD, response_status_RD, defender_disagreement = _judge_rows(
    settings,
    [ROLES[Category(category)].defender for category in np.repeat(category_B, A)],
    np.repeat(category_B, A),
    query_BA.reshape(-1),
    tree.response_text_BAD.reshape(-1, D),
    tree.response_status_BAD.reshape(-1, D),
    judge if settings.defender else _nobody,
    fold_key(key, 0),
  )
  response_score_BAD = response_score_RD.reshape(B, A, D)

  valid_BAD = tree.response_status_BAD == Status.VALID
  # Valid but unscored comes after every score and before what is not valid; the first among equals.
  liking_BAD = np.nan_to_num(response_score_BAD, nan=-1.0) if settings.optimistic else np.zeros((B, A, D))
  best_BA = np.where(valid_BAD, liking_BAD, -np.inf).argmax(-1)
  picked_BA = np.where(valid_BAD.any(-1), best_BA, -1)
  played_BA = tree.attack_status_BA == Status.VALID
  attack_score_BA, attack_status_BA, attacker_disagreement = _judge_rows(
    settings,
    [ROLES[Category(category)].attacker for category in category_B],
    category_B,
    tree.seeds.text_B,
    np.take_along_axis(tree.response_text_BAD, best_BA[..., None], -1)[..., 0],
    np.where(played_BA & (picked_BA < 0), Status.NO_RESPONSE, tree.attack_status_BA),
    judge if settings.attacker else _nobody,
    fold_key(key, 1),
  )
  return Judgments(
    response_score_BAD=response_score_BAD,
    response_status_BAD=response_status_RD.reshape(B, A, D),
    picked_BA=picked_BA,
    attack_score_BA=attack_score_BA,
    attack_status_BA=attack_status_BA,
    disagreement=Players(attacker=attacker_disagreement, defender=defender_disagreement),
  )


def _judge_rows(
  settings: Judges,
  role_R: Sequence[Role],
  category_R: np.ndarray,
  query_R: np.ndarray,
  text_RG: np.ndarray,
  status_RG: np.ndarray,
  judge: Judge,
  key: int,
) -> tuple[np.ndarray, np.ndarray, float]:
  """Scores [R, G] of the VALID texts of each row, NaN elsewhere; the statuses with failures; the disagreement."""
  score_RG, status_RG = np.full(status_RG.shape, np.nan), status_RG.copy()
  if judge is _nobody:
    return score_RG, status_RG, float("nan")
  rows = [r for r in range(len(status_RG)) if (status_RG[r] == Status.VALID).any()]
  valid = [np.flatnonzero(status_RG[r] == Status.VALID) for r in rows]
  nodes = [
    Node(role_R[r], Category(int(category_R[r])), query_R[r], text_RG[r, samples].tolist(), fold_key(key, r))
    for r, samples in zip(rows, valid)
  ]
  scores, disagreement = score_nodes(settings, nodes, judge)
  for r, samples, score_G in zip(rows, valid, scores):
    score_RG[r, samples] = score_G
    status_RG[r, samples[np.isnan(score_G)]] = Status.JUDGE_FAILED
  return score_RG, status_RG, disagreement


def _nobody(questions: Sequence[Question]) -> Sequence[Verdict]:
  """No judge: what is valid stays valid and has no score."""
  return [Verdict(())] * len(questions)


def score_nodes(settings: Judges, nodes: Sequence[Node], judge: Judge) -> tuple[list[np.ndarray], float]:
  """The mean score of each text over the calls it was in, NaN where no call of it was readable.

  Pairwise, every two texts of a node are compared in both orders, and a lone one with itself; pointwise, each is a call
  of its own.

  Returns:
    An array per node, and the mean absolute difference of a text's scores in the two orders (NaN without any).
  """
  calls = [(n, *call) for n, node in enumerate(nodes) for call in _calls(settings, node)]
  verdicts = ask(judge, [question for _, _, question in calls], settings.retries)
  total = [np.zeros(len(node.texts)) for node in nodes]
  count = [np.zeros(len(node.texts)) for node in nodes]
  in_order: dict[tuple[int, tuple[int, ...]], dict[int, float]] = {}
  readable = [(call, verdict) for call, verdict in zip(calls, verdicts, strict=True) if verdict.scores]
  for (n, members, _), verdict in readable:
    for member, score in zip(members, verdict.scores, strict=True):
      total[n][member] += score
      count[n][member] += 1
    if len(members) == 2:
      in_order[n, members] = dict(zip(members, verdict.scores))
  gaps = [
    abs(score - in_order[n, members[::-1]][member])
    for (n, members), scores in in_order.items()
    if members[0] < members[1] and (n, members[::-1]) in in_order
    for member, score in scores.items()
  ]
  with np.errstate(invalid="ignore"):
    return [t / c for t, c in zip(total, count)], float(np.mean(gaps)) if gaps else float("nan")


def _calls(settings: Judges, node: Node) -> list[tuple[tuple[int, ...], Question]]:
  """The calls of a node: which of its texts are in each, and the question."""
  everyone = range(len(node.texts))
  members: list[tuple[int, ...]]
  if settings.protocol == "pointwise":
    members = [(i,) for i in everyone]
  elif len(node.texts) == 1:
    members = [(0, 0)]
  else:
    members = list(itertools.permutations(everyone, 2))
  return [
    (
      call,
      Question(node.role, node.category, node.query, tuple(node.texts[i] for i in call), fold_key(node.key, *call)),
    )
    for call in members
  ]


def ask(judge: Judge, questions: Sequence[Question], retries: int) -> list[Verdict]:
  """A verdict per question; an unreadable one is asked again with another key, up to `retries` times."""
  verdicts = list(judge(questions))
  for _ in range(retries):
    failed = [i for i, verdict in enumerate(verdicts) if not verdict.scores]
    if not failed:
      break
    questions = [q._replace(key=fold_key(q.key, 1)) for q in questions]
    for i, verdict in zip(failed, judge([questions[i] for i in failed]), strict=True):
      verdicts[i] = verdict
  return verdicts

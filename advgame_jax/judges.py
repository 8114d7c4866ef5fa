"""How a judge is asked: comparisons, both orders, retries, and whose failure excludes whom.

What a judge is made of (rules, a language model, a server) is behind the one callable `Judge`; this module turns a
rollout tree into questions and verdicts back into scores.
"""

import itertools
from collections.abc import Iterator, Sequence
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


class _Rows(NamedTuple):
  """R nodes of up to G texts of one player, as arrays."""

  judge: Judge
  role_R: Sequence[Role]
  category_R: np.ndarray
  query_R: np.ndarray
  text_RG: np.ndarray
  status_RG: np.ndarray
  key: int


class _Scored(NamedTuple):
  """Scores of the VALID texts, NaN elsewhere; the statuses with failures; the mean disagreement of the two orders."""

  score_RG: np.ndarray
  status_RG: np.ndarray
  disagreement: float


def judge(settings: Judges, tree: RolloutTree, judges: Players[Judge], key: int) -> Judgments:
  """Scores of one tree: of the responses, and for each attack of the one response picked for it.

  The attacker judge reads the response that the defender judge liked best, or the first valid one where the setting is
  not optimistic or the defender judge said nothing. What can be asked at one time is one call of a judge: all of a
  player, and both players where which response is picked does not depend on scores. Draws from `key` alone.
  """
  B, A, D = tree.response_status_BAD.shape
  responses, valid_BAD = _responses(settings, tree, judges.defender, key), tree.response_status_BAD == Status.VALID
  if settings.optimistic and D > 1:
    (response,) = _score_rows(settings, [responses])
    # Valid but unscored comes after every score and before what is not valid; the first among equals.
    liking_BAD = np.nan_to_num(response.score_RG.reshape(B, A, D), nan=-1.0)
    best_BA = np.where(valid_BAD, liking_BAD, -np.inf).argmax(-1)
    picked_BA = np.where(valid_BAD.any(-1), best_BA, -1)
    (attack,) = _score_rows(settings, [_attacks(tree, judges.attacker, picked_BA, key)])
  else:
    picked_BA = np.where(valid_BAD.any(-1), valid_BAD.argmax(-1), -1)
    response, attack = _score_rows(settings, [responses, _attacks(tree, judges.attacker, picked_BA, key)])
  return Judgments(
    response_score_BAD=response.score_RG.reshape(B, A, D),
    response_status_BAD=response.status_RG.reshape(B, A, D),
    picked_BA=picked_BA,
    attack_score_BA=attack.score_RG,
    attack_status_BA=attack.status_RG,
    disagreement=Players(attacker=attack.disagreement, defender=response.disagreement),
  )


def _responses(settings: Judges, tree: RolloutTree, judge: Judge, key: int) -> _Rows:
  """A row for each attack."""
  _, A, D = tree.response_status_BAD.shape
  category_R = np.repeat(tree.seeds.category_B, A)
  query_BA = tree.attack_text_BA if settings.defender_reads == "attack" else np.repeat(tree.seeds.text_B[:, None], A, 1)
  return _Rows(
    judge=judge,
    role_R=[ROLES[Category(category)].defender for category in category_R],
    category_R=category_R,
    query_R=query_BA.reshape(-1),
    text_RG=tree.response_text_BAD.reshape(-1, D),
    status_RG=tree.response_status_BAD.reshape(-1, D),
    key=fold_key(key, 0),
  )


def _attacks(tree: RolloutTree, judge: Judge, picked_BA: np.ndarray, key: int) -> _Rows:
  """A row for each seed: the responses picked for its attacks."""
  played_BA = tree.attack_status_BA == Status.VALID
  place_BA1 = np.maximum(picked_BA, 0)[..., None]
  return _Rows(
    judge=judge,
    role_R=[ROLES[Category(category)].attacker for category in tree.seeds.category_B],
    category_R=tree.seeds.category_B,
    query_R=tree.seeds.text_B,
    text_RG=np.take_along_axis(tree.response_text_BAD, place_BA1, -1)[..., 0],
    status_RG=np.where(played_BA & (picked_BA < 0), Status.NO_RESPONSE, tree.attack_status_BA),
    key=fold_key(key, 1),
  )


def _score_rows(settings: Judges, parts: Sequence[_Rows]) -> list[_Scored]:
  """Each part scored by its judge; parts of the same judge in one call of it."""
  scored: list[_Scored] = [_Scored(np.full(p.status_RG.shape, np.nan), p.status_RG.copy(), float("nan")) for p in parts]
  for judge in dict.fromkeys(part.judge for part in parts if part.judge is not nobody):
    own = [i for i, part in enumerate(parts) if part.judge is judge]
    nodes = [(i, r, samples, node) for i in own for r, samples, node in _nodes(parts[i])]
    scores, gaps = score_nodes(settings, [node for *_, node in nodes], judge)
    for (i, r, samples, _), score_G in zip(nodes, scores, strict=True):
      scored[i].score_RG[r, samples] = score_G
      scored[i].status_RG[r, samples[np.isnan(score_G)]] = Status.JUDGE_FAILED
    for i in own:
      of_part = [gap for (part, *_), gap in zip(nodes, gaps) if part == i and not np.isnan(gap)]
      scored[i] = scored[i]._replace(disagreement=float(np.mean(of_part)) if of_part else float("nan"))
  return scored


def _nodes(part: _Rows) -> Iterator[tuple[int, np.ndarray, Node]]:
  """Of each row with a VALID text: its number, the places of these texts, and the node."""
  for r, status_G in enumerate(part.status_RG):
    samples = np.flatnonzero(status_G == Status.VALID)
    if len(samples):
      texts, key = part.text_RG[r, samples].tolist(), fold_key(part.key, r)
      yield r, samples, Node(part.role_R[r], Category(int(part.category_R[r])), part.query_R[r], texts, key)


def nobody(questions: Sequence[Question]) -> Sequence[Verdict]:
  """No judge: what is valid stays valid and has no score."""
  return [Verdict(())] * len(questions)


def one_by_one(judge: Judge) -> Judge:
  """A judge that reads one text at a time, for questions of any number of texts; it reads none twice."""

  def each(questions: Sequence[Question]) -> list[Verdict]:
    alone = lambda question: [question._replace(texts=(text,), key=0) for text in question.texts]
    single: dict[Question, Question] = {}
    for question in questions:
      for one in alone(question):
        single.setdefault(one, one._replace(key=question.key))
    verdicts = dict(zip(single, judge(list(single.values())), strict=True))
    unpaid = dict(verdicts)

    def join(question: Question) -> Verdict:
      parts = [verdicts[one] for one in alone(question)]
      paid = [unpaid.pop(one) for one in alone(question) if one in unpaid]
      scores = tuple(score for part in parts for score in part.scores) if all(part.scores for part in parts) else ()
      return Verdict(scores, sum(part.tokens for part in paid), sum(part.flops for part in paid))

    return [join(question) for question in questions]

  return each


def score_nodes(settings: Judges, nodes: Sequence[Node], judge: Judge) -> tuple[list[np.ndarray], list[float]]:
  """The mean score of each text over the calls it was in, NaN where none of them counts.

  Pairwise, texts of a node are compared in both orders, every two of them or each with some, and a lone one with
  itself; a comparison counts if both of its orders could be read. Pointwise, each text is a call of its own.

  Returns:
    Of each node, the scores, and the mean absolute difference of a text's scores in the two orders (NaN without any).
  """
  calls = [(n, *call) for n, node in enumerate(nodes) for call in _calls(settings, node)]
  verdicts = ask(judge, [question for _, _, question in calls], settings.retries)
  scores_of = {(n, members): verdict.scores for (n, members, _), verdict in zip(calls, verdicts, strict=True)}
  total, count = ([np.zeros(len(node.texts)) for node in nodes] for _ in range(2))
  gaps: list[list[float]] = [[] for _ in nodes]
  for (n, members), scores in scores_of.items():
    other = scores_of.get((n, members[::-1]), ())
    if not (scores and other):
      continue  # one order alone would be biased by the position
    for member, score in zip(members, scores, strict=True):
      total[n][member] += score
      count[n][member] += 1
    if len(members) == 2 and members[0] < members[1]:
      gaps[n] += [abs(score - theirs) for score, theirs in zip(scores, other[::-1])]
  with np.errstate(invalid="ignore"):
    return [t / c for t, c in zip(total, count)], [float(np.mean(g)) if g else float("nan") for g in gaps]


def _calls(settings: Judges, node: Node) -> list[tuple[tuple[int, ...], Question]]:
  """The calls of a node: which of its texts are in each, and the question."""
  everyone = range(len(node.texts))
  members: list[tuple[int, ...]]
  if settings.protocol == "pointwise":
    members = [(i,) for i in everyone]
  elif len(node.texts) == 1:
    members = [(0, 0)]
  elif 0 < settings.opponents < len(node.texts) - 1:
    members = _ring(len(node.texts), settings.opponents, node.key)
  else:
    members = list(itertools.permutations(everyone, 2))
  return [
    (
      call,
      Question(node.role, node.category, node.query, tuple(node.texts[i] for i in call), fold_key(node.key, *call)),
    )
    for call in members
  ]


def _ring(count: int, opponents: int, key: int) -> list[tuple[int, ...]]:
  """Both orders of each text with its nearest on a ring in random order: at least so many opponents, the same for all.

  An odd number of opponents of an odd number of texts cannot be shared out evenly; then each has one more.
  """
  place = np.random.default_rng(fold_key(key, count, opponents)).permutation(count)
  steps = set(range(1, opponents // 2 + 1))
  if opponents % 2:
    steps.add(count // 2)  # across the ring, where that is one opponent
  pairs = {tuple(sorted((int(place[i]), int(place[(i + step) % count])))) for step in steps for i in range(count)}
  return [order for pair in sorted(pairs) for order in (pair, pair[::-1])]


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

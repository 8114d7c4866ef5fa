"""Plays seeds into a rollout tree: attacks, whether they are faithful, and responses to those that are.

Players and judge are arguments: the game never knows what they are made of.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from advgame_jax import prompts
from advgame_jax.config import Game
from advgame_jax.prompts import Instructions
from advgame_jax.types import (
  Category,
  Judge,
  Players,
  Policy,
  Question,
  Role,
  RolloutTree,
  Samples,
  SeedBatch,
  Status,
  fold_key,
)

Parser = Callable[[str, bool], tuple[str, Status]]


@dataclasses.dataclass(frozen=True)
class Rules:
  """What the players are told and how their answers are read."""

  settings: Game
  instructions: Instructions
  think: Players[bool]  # whether each reasons before it answers


def attacker_turns(rules: Rules, seeds: SeedBatch) -> list[str]:
  """What the Attacker is asked for each seed."""
  return [
    prompts.attacker_turn(rules.instructions, Category(category), text)
    for text, category in zip(seeds.text_B, seeds.category_B)
  ]


def play(
  rules: Rules, seeds: SeedBatch, attacker: Policy, defender: Policy, judge: Judge, key: jax.Array
) -> RolloutTree:
  """B seeds × A attacks × D responses. Consumes `key`.

  Responses are played only to attacks that are parsed and faithful; with `skip_attacker`, to the seeds themselves.
  """
  attacker_key, defender_key, judge_key = jax.random.split(key, 3)
  if rules.settings.skip_attacker:
    attack_text_BA = seeds.text_B[:, None]
    attack_status_BA = np.full(attack_text_BA.shape, Status.VALID, np.int8)
    attacks = Samples.of_text(attack_text_BA, attack_status_BA)
  else:
    everyone_B = np.ones(len(seeds.text_B), bool)
    attacks = attacker(attacker_turns(rules, seeds), everyone_B, rules.settings.attacks, attacker_key)
    attack_text_BA, attack_status_BA = _parse(attacks, prompts.parse_attack, rules.think.attacker)
    attack_status_BA = _check_faithful(seeds, attack_text_BA, attack_status_BA, judge, int(jax.random.bits(judge_key)))

  played_BA = attack_status_BA == Status.VALID
  responses = defender(
    attack_text_BA.reshape(-1).tolist(), played_BA.reshape(-1), rules.settings.responses, defender_key
  )
  # An attack that does not fit the Defender's prompt is one that was too long.
  unplayed_BA = played_BA & (responses.status_RG[:, 0] == Status.NOT_PLAYED).reshape(played_BA.shape)
  response_text_RD, response_status_RD = _parse(responses, prompts.parse_answer, rules.think.defender)
  return RolloutTree(
    seeds=seeds,
    attacks=attacks,
    attack_text_BA=attack_text_BA,
    attack_status_BA=np.where(unplayed_BA, Status.MAX_LENGTH, attack_status_BA).astype(np.int8),
    responses=responses,
    response_text_BAD=response_text_RD.reshape(*played_BA.shape, -1),
    response_status_BAD=response_status_RD.reshape(*played_BA.shape, -1),
  )


def _parse(samples: Samples, parser: Parser, think: bool) -> tuple[np.ndarray, np.ndarray]:
  """The parsed text of each sample, "" where there is none, and its status."""
  text_RG, status_RG = np.full(samples.text_RG.shape, "", object), samples.status_RG.copy()
  for node in zip(*np.nonzero(status_RG == Status.VALID)):
    text_RG[node], status_RG[node] = parser(samples.text_RG[node], think)
  return text_RG, status_RG


def _check_faithful(
  seeds: SeedBatch, attack_text_BA: np.ndarray, attack_status_BA: np.ndarray, judge: Judge, key: int
) -> np.ndarray:
  """The statuses with NOT_FAITHFUL and JUDGE_FAILED filled in. One call of the judge for the whole batch."""
  status_BA = attack_status_BA.copy()
  asked, questions = [], []
  for b, a in zip(*np.nonzero(status_BA == Status.VALID)):
    category, seed, attack = Category(seeds.category_B[b]), seeds.text_B[b], attack_text_BA[b, a]
    if category == Category.BENIGN and prompts.too_long(seed, attack):
      status_BA[b, a] = Status.NOT_FAITHFUL
    else:
      asked.append((b, a))
      questions.append(Question(Role.FAITHFULNESS, category, seed, (attack,), fold_key(key, b, a)))
  for node, verdict in zip(asked, judge(questions), strict=True):
    if not verdict.scores:
      status_BA[node] = Status.JUDGE_FAILED
    elif verdict.scores[0] < 0.5:
      status_BA[node] = Status.NOT_FAITHFUL
  return status_BA

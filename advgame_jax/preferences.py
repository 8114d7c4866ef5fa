"""Rewards → the comparisons a player learns from: best against worst of a node (DPO, IPO), or every sample (GRPO).

A node is what has several samples: a seed with its attacks, or an attack with its responses. Both players are the same
arithmetic over (samples, reward_RG, mask_RG), with a node in each row R and its samples along G.
"""

import math
from typing import NamedTuple

import numpy as np

from advgame_jax import config as config_lib
from advgame_jax.types import Players, PreferenceBatch, Rewards, RolloutTree, Samples, Status


class _Choice(NamedTuple):
  """Which samples are compared, before their tokens are laid out."""

  node_P: np.ndarray  # int
  sample_PC: np.ndarray  # int: of that node
  length_PC: np.ndarray  # int: tokens of its completion that are kept
  advantage_PC: np.ndarray  # float64: reward − baseline
  weight_PC: np.ndarray  # bool


def select_comparisons(
  loss: config_lib.Loss, tree: RolloutTree, rewards: Rewards, unit: Players[int]
) -> Players[PreferenceBatch]:
  """What each player learns from one tree; the shapes depend on those of the tree, `loss.kind` and `unit` alone.

  Args:
    loss: its kind chooses pairs or all samples (see `shape`), its baseline which rewards the latter are measured
      against.
    tree: B × A attacks (nodes: B) and B·A × D responses (nodes: B·A).
    rewards: of the same tree; masked ones are read nowhere.
    unit: `Recipe.unit` of each.
  """
  shape_RG = tree.responses.text_RG.shape
  return Players(
    attacker=_select(loss, tree.attacks, rewards.attack_BA, rewards.attack_mask_BA, unit.attacker),
    defender=_select(
      loss,
      tree.responses,
      rewards.response_BAD.reshape(shape_RG),
      rewards.response_mask_BAD.reshape(shape_RG),
      unit.defender,
    ),
  )


def shape(loss: config_lib.Loss, nodes: int, group: int, unit: int) -> tuple[int, int]:
  """(P, C): how many comparisons a tree gives a player, and of how many completions each.

  Of pairs one a node. Of GRPO's samples as many of a node share the computation of their prompt as cost no part of the
  rows another completion, where a batch is padded to a multiple of `unit` comparisons (`Recipe.unit`).
  """
  if loss.kind != "grpo":
    return nodes, 2
  divisors = [rows for rows in range(1, group + 1) if group % rows == 0]
  rows = min(divisors, key=lambda rows: (math.ceil(nodes * rows / unit) * (group // rows), rows))
  return nodes * rows, group // rows


def _select(
  loss: config_lib.Loss, samples: Samples, reward_RG: np.ndarray, mask_RG: np.ndarray, unit: int
) -> PreferenceBatch:
  # A sample without tokens is no model's: seeds played as they are, a script, a server.
  mask_RG = mask_RG & (samples.length_RG > 0)
  reward_RG = np.where(mask_RG, reward_RG, 0.0).astype(np.float64)
  if loss.kind == "grpo":
    advantage_RG = reward_RG - _baseline(reward_RG, mask_RG, None if loss.baseline == "batch" else 1)
    choice = _every_sample(samples, advantage_RG, mask_RG, shape(loss, len(mask_RG), mask_RG.shape[1], unit))
  else:
    choice = _best_against_worst(samples, reward_RG, mask_RG)
  return _lay_out(samples, choice)


def _best_against_worst(samples: Samples, reward_RG: np.ndarray, mask_RG: np.ndarray) -> _Choice:
  """One pair per node, the first among equals; no pair where all are equal. Column 0 is the chosen one."""
  best_R = np.where(mask_RG, reward_RG, -np.inf).argmax(axis=1)
  worst_R = np.where(mask_RG, reward_RG, np.inf).argmin(axis=1)
  sample_PC = np.stack([best_R, worst_R], axis=1)
  reward_PC = np.take_along_axis(reward_RG, sample_PC, axis=1)
  length_PC = np.take_along_axis(samples.length_RG, sample_PC, axis=1)
  status_PC = np.take_along_axis(samples.status_RG, sample_PC, axis=1)
  # Otherwise the pair would mostly teach that the tokens after the limit are bad.
  shortest_P = np.where(status_PC[:, 1] == Status.MAX_LENGTH, length_PC.min(axis=1), length_PC[:, 1])
  return _Choice(
    node_P=np.arange(len(reward_RG)),
    sample_PC=sample_PC,
    length_PC=np.stack([length_PC[:, 0], shortest_P], axis=1),
    advantage_PC=reward_PC - reward_PC.mean(axis=1, keepdims=True),
    # Fewer than two unmasked tie with themselves.
    weight_PC=np.repeat(reward_PC[:, :1] > reward_PC[:, 1:], 2, axis=1),
  )


def _baseline(reward_RG: np.ndarray, mask_RG: np.ndarray, axis: int | None) -> np.ndarray:
  """The mean reward of the unmasked along `axis` (None: of all), to be broadcast."""
  count = mask_RG.sum(axis=axis, keepdims=True)
  return (reward_RG * mask_RG).sum(axis=axis, keepdims=True) / np.maximum(count, 1)


def _every_sample(
  samples: Samples, advantage_RG: np.ndarray, mask_RG: np.ndarray, shape_PC: tuple[int, int]
) -> _Choice:
  """The samples of each node in order, in one comparison or several."""
  nodes, group = mask_RG.shape
  return _Choice(
    node_P=np.repeat(np.arange(nodes), shape_PC[0] // nodes),
    sample_PC=np.tile(np.arange(group), nodes).reshape(shape_PC),
    length_PC=samples.length_RG.reshape(shape_PC),
    advantage_PC=advantage_RG.reshape(shape_PC),
    weight_PC=mask_RG.reshape(shape_PC),
  )


def _lay_out(samples: Samples, choice: _Choice) -> PreferenceBatch:
  """Each prompt and the chosen samples of it; those of weight 0 stay empty."""
  shape_PCT = (*choice.sample_PC.shape, samples.tokens_RGT.shape[2])
  live_PC = choice.weight_PC
  live_P = live_PC.any(axis=1)
  batch = PreferenceBatch(
    prompt_PS=np.zeros((len(live_PC), samples.prompt_tokens_RT.shape[1]), np.int32),
    prompt_length_P=np.where(live_P, samples.prompt_length_R[choice.node_P], 0).astype(np.int32),
    tokens_PCT=np.zeros(shape_PCT, np.int32),
    length_PC=np.where(live_PC, choice.length_PC, 0).astype(np.int32),
    behaviour_logprob_PCT=np.zeros(shape_PCT, np.float32),
    plain_logprob_PCT=np.zeros(shape_PCT, np.float32),
    advantage_PC=np.where(live_PC, choice.advantage_PC, 0.0).astype(np.float32),
    weight_PC=live_PC.astype(np.float32),
  )
  for p in np.flatnonzero(live_P):
    r, length = choice.node_P[p], batch.prompt_length_P[p]
    batch.prompt_PS[p, batch.prompt_PS.shape[1] - length :] = samples.prompt_tokens_RT[r, :length]
    for c, g in enumerate(choice.sample_PC[p]):
      kept = slice(batch.length_PC[p, c])  # none of weight 0
      batch.tokens_PCT[p, c, kept] = samples.tokens_RGT[r, g, kept]
      batch.behaviour_logprob_PCT[p, c, kept] = samples.behaviour_logprob_RGT[r, g, kept]
      batch.plain_logprob_PCT[p, c, kept] = samples.plain_logprob_RGT[r, g, kept]
  return batch

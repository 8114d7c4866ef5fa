"""What a step took and what came of it: the numbers of the report's scalars."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from advgame_jax import architecture, canary, judges, peaks, profile, update
from advgame_jax.ledger import GENERATE, Ledger, Work
from advgame_jax.panel import Panel
from advgame_jax.policies import LanguageModel
from advgame_jax.session import Session
from advgame_jax.types import (
  Category,
  Judge,
  Judgments,
  Players,
  Policy,
  PreferenceBatch,
  Question,
  Rewards,
  RolloutTree,
  Samples,
  Status,
  Verdict,
)

_RESPONSE_STATUSES = (Status.VALID, Status.MAX_LENGTH, Status.PARSING, Status.JUDGE_FAILED)


@dataclasses.dataclass
class Asked:
  """What the judges of a step were asked."""

  questions: int = 0
  unreadable: int = 0  # answers without a verdict, those that were asked again included

  def __add__(self, other: "Asked") -> "Asked":
    return Asked(self.questions + other.questions, self.unreadable + other.unreadable)

  def scalars(self) -> dict[str, float]:
    rate = self.unreadable / self.questions if self.questions else float("nan")
    return {"judge/questions": float(self.questions), "judge/unreadable": rate}


def metered_players(run: Session, policies: Players[Policy], ledger: Ledger) -> Players[Policy]:
  """The players, their time and tokens counted."""

  def meter(policy: Policy, player: LanguageModel, work: Work) -> Policy:
    def play(prompts: Sequence[str], present_R: np.ndarray, group: int, key: jax.Array) -> Samples:
      with ledger.timed(work):
        samples = policy(prompts, present_R, group, key)
      ledger.add(work, *generated(player, samples))
      return samples

    return play

  return Players(*map(meter, policies, run.players, GENERATE))


def metered_judges(run: Session, ledger: Ledger) -> tuple[Panel, Asked]:
  """The judges, their time, tokens and failures counted."""
  asked = Asked()

  @functools.cache
  def meter(judge: Judge) -> Judge:
    def ask(questions: Sequence[Question]) -> Sequence[Verdict]:
      with ledger.timed("judge"):
        verdicts = judge(questions)
      asked.questions += len(verdicts)
      asked.unreadable += sum(not verdict.scores for verdict in verdicts)
      ledger.add("judge", sum(v.tokens for v in verdicts), sum(v.flops for v in verdicts))
      return verdicts

    return judge if judge is judges.nobody else ask

  faithfulness, *players = map(meter, (run.panel.faithfulness, run.panel.defender, run.panel.attacker))
  return run.panel._replace(faithfulness=faithfulness, defender=players[0], attacker=players[1]), asked


def generated(player: LanguageModel, samples: Samples) -> tuple[int, float]:
  """Tokens drawn, and the FLOPs of prefilling the prompts and drawing them."""
  tokens = int(samples.length_RG.sum())
  context = float(samples.prompt_length_R.mean()) + tokens / max(1, samples.length_RG.size)
  return tokens, architecture.forward_flops(player.model, tokens + float(samples.prompt_length_R.sum()), context)


def trained(run: Session, batch: Players[PreferenceBatch]) -> tuple[int, float]:
  """Tokens of prompts and completions with a weight, as often as they are computed, and the FLOPs of the update."""
  live = lambda b: b.prompt_length_P @ b.weight_PC.max(1) + np.sum(b.length_PC * b.weight_PC)
  return int(sum(map(live, batch))), sum(map(update.update_flops, run.recipes, batch))


def of_play(tree: RolloutTree, judgments: Judgments, reward: Rewards) -> dict[str, float]:
  """Fractions of each status, mean rewards, disagreement between the two orders, and what was played."""
  fraction = lambda statuses, status: float(np.mean(statuses == status))
  attack, response = judgments.attack_status_BA, judgments.response_status_BAD
  played = response[response != Status.NOT_PLAYED]
  mean = lambda values, mask: float(values[mask].mean()) if mask.any() else float("nan")
  return {
    **{f"play/attack_{s.name.lower()}": fraction(attack, s) for s in Status if s != Status.NOT_PLAYED},
    **{f"play/response_{s.name.lower()}": fraction(played, s) for s in _RESPONSE_STATUSES if len(played)},
    "reward/attacker": mean(reward.attack_BA, reward.attack_mask_BA),
    "reward/defender": mean(reward.response_BAD, reward.response_mask_BAD),
    "judge/disagreement_attacker": judgments.disagreement.attacker,
    "judge/disagreement_defender": judgments.disagreement.defender,
    "judge/talk": canary.flag_rate(tree),
    "harmful": float(np.mean(tree.seeds.category_B == Category.HARMFUL)),
  }


def peak(run: Session) -> peaks.Peak:
  """The most that the run's devices could do together; measured once where nobody knows."""
  return peaks.of_devices(run.devices, run.recipes.defender.dtype)


def facts(run: Session) -> profile.Facts:
  """What a profile has to be told of the run."""
  read = {role: _weight_bytes(player, recipe) for role, player, recipe in zip(GENERATE, run.players, run.recipes)}
  return profile.Facts(peak(run), len(run.devices), read)


def _weight_bytes(player: LanguageModel, recipe: update.Recipe) -> float:
  """What a device holds of a player that generates; adapters and scales of eight bits are not counted."""
  specs = architecture.param_specs(player.model)
  where = architecture.shardings(specs, player.mesh, player.layout)
  numbers = jax.tree.map(lambda spec, where: math.prod(where.shard_shape(spec.shape)), specs, where)
  width = 1 if recipe.adapted and recipe.precision.frozen == "int8" else jax.numpy.dtype(player.dtype).itemsize
  return float(sum(jax.tree.leaves(numbers)) * width)


def rates(before: Mapping[str, float], after: Mapping[str, float], peak: float) -> dict[str, float]:
  """What the step between two readings of the ledger took, the totals so far, tokens per second, and MFU.

  MFU: FLOPs that the model needs, by the second, of `peak`, the most that all devices could do.
  """
  spent = lambda name: after[f"cost/{name}"] - before[f"cost/{name}"]
  generate = spent("seconds/attacker_generate") + spent("seconds/defender_generate")
  seconds = {"generate": generate, "judge": spent("seconds/judge"), "update": spent("seconds/update")}
  tokens = {"generate": spent("tokens_generated"), "update": spent("tokens_trained")}
  drawn = spent("flops/attacker_generate") + spent("flops/defender_generate")
  flops = {"generate": drawn, "update": spent("flops/update")}
  return {
    **after,
    **{f"seconds/{name}": value for name, value in seconds.items()},
    **{f"tokens_per_second/{name}": value / max(seconds[name], 1e-9) for name, value in tokens.items()},
    **{f"mfu/{name}": value / max(seconds[name], 1e-9) / peak for name, value in flops.items()},
  }

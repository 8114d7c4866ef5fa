"""The training loop.

seeds → attacks → responses → judgments → rewards → preference pairs → joint update → checkpoint, report
"""

import dataclasses
import itertools
import logging
import pathlib
import signal
import threading
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from advgame_jax import checkpoint, data, evaluate, game, judges, model, page, preferences, rewards, session, update
from advgame_jax.config import Config
from advgame_jax.ledger import Ledger, Work
from advgame_jax.policies import LanguageModel
from advgame_jax.report import Reporter
from advgame_jax.session import Session
from advgame_jax.state import TrainState
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
  UserError,
  Verdict,
  fold_key,
)

log = logging.getLogger(__name__)


def train(
  config: Config, workdir: str, allow_changes: bool = False, devices: Sequence[jax.Device] | None = None
) -> None:
  """Plays and learns until `config.steps`, from the last checkpoint in `workdir` if there is one.

  The same call again continues a run that was stopped or killed, and ends in the same state (on CPU, bit for bit).
  SIGTERM saves and returns.

  Args:
    allow_changes: continue a run of other settings.
    devices: what the run is laid out over; None is all there are.

  Raises:
    UserError: what a user can mend, before anything in `workdir` is written over.
  """
  folder = pathlib.Path(workdir)
  run = session.open_session(config, devices)
  checkpoint.claim(folder, config, allow_changes)
  checkpoints = checkpoint.Checkpoints(folder, config)
  ledger = Ledger(run.mesh.size)
  restored = checkpoints.restore(run.abstract_state)
  state = restored[0] if restored else run.init_state()
  if restored:
    ledger.load(restored[1])
    log.info("resuming at step %d of %d", int(state.step), config.steps)
  stop = _stop_on_sigterm()
  with Reporter(folder, config.report, config.steps, int(state.step), write=jax.process_index() == 0) as reporter:
    state, objective = _loop(run, state, ledger, reporter, checkpoints, stop)
  checkpoints.save(state, ledger.state_dict(), objective)
  checkpoints.close()
  if stop.is_set() and int(state.step) < config.steps:
    log.info("stopped at step %d, which is saved; the same command goes on from there", int(state.step))
  elif jax.process_index() == 0:
    page.write_page(folder)


def _loop(
  run: Session,
  state: TrainState,
  ledger: Ledger,
  reporter: Reporter,
  checkpoints: checkpoint.Checkpoints,
  stop: threading.Event,
) -> tuple[TrainState, float | None]:
  """From `state.step` to the last step; returns the state, and its evaluation's objective if it has one."""
  config = run.config
  seed_batches = data.SeedBatches(run.train_seeds, config.data, config.seed)
  state = warm_up(run, state)
  objective = None
  for step in range(int(state.step), config.steps + 1):
    if stop.is_set():
      break
    if step % config.evaluation.every == 0 or step == config.steps:
      with ledger.timed("evaluate"):
        values = dict(evaluate.evaluate(run, state))
      reporter.evaluation(step, values)
      objective = evaluate.objective(values)
    if step == config.steps:
      break
    if step % config.checkpoint.every == 0:
      checkpoints.save(state, ledger.state_dict(), objective)
    state = play_and_learn(run, state, step, seed_batches[step], ledger, reporter)
    objective = None
  return state, objective


def play_and_learn(
  run: Session, state: TrainState, step: int, seeds: data.SeedBatch, ledger: Ledger, reporter: Reporter
) -> TrainState:
  """One step. `state` is donated. All its draws come from (config.seed, step)."""
  config, key = run.config, jax.random.fold_in(jax.random.key(run.config.seed), step)
  before = ledger.scalars()
  with ledger.timed("other"):
    attacker, defender, judge = metered(run, run.policies(state), ledger)
    tree = game.play(run.rules, seeds, attacker, defender, judge, key)
    judgments = judges.judge(config.judges, tree, judge, fold_key(config.seed, step))
    reward = rewards.assign_rewards(judgments)
    batch = preferences.select_comparisons(config.loss, tree, reward, row_tokens(run, tree))
    with ledger.timed("update"):
      state, metrics = run.update(state, batch)
      with ledger.timed("other"):  # while the device works
        reporter.transcript(step, tree, judgments, reward)
      metrics = jax.device_get(metrics)
  ledger.add("update", *trained(run, batch))
  scalars = play_metrics(tree, judgments, reward) | {name: float(value) for name, value in metrics.items()}
  reporter.write(step, scalars | rates(before, ledger.scalars()))
  _check_gradients(config, step, scalars)
  return state


def warm_up(run: Session, state: TrainState) -> TrainState:
  """Compiles every shape that a step can take, by steps in which nobody plays and nothing is learnt.

  Prompts fall into buckets; each is drawn from once here, and each pair of buckets updated with once.
  """
  config = run.config
  B, A, D = config.data.batch, config.game.attacks_per_seed, config.game.responses
  weights, (attacker, defender) = run.generators(state), run.players
  if config.game.skip_attacker:
    attacks = [Samples.of_text(np.full((B, A), "", object), np.full((B, A), Status.NOT_PLAYED))]
  else:
    attacks = [attacker.nobody(weights.attacker, B, A, bucket) for bucket in attacker.sampling.prompt_buckets]
  responses = [defender.nobody(weights.defender, B * A, D, bucket) for bucket in defender.sampling.prompt_buckets]
  nothing = Rewards(np.zeros((B, A)), np.zeros((B, A), bool), np.zeros((B, A, D)), np.zeros((B, A, D), bool))
  for attack, response in itertools.product(attacks, responses):
    tree = _unplayed(attack, response)
    batch = preferences.select_comparisons(config.loss, tree, nothing, row_tokens(run, tree))
    state, _ = run.update(dataclasses.replace(state, step=state.step - 1), batch)
  return state


def _unplayed(attacks: Samples, responses: Samples) -> RolloutTree:
  seeds = data.as_batch([data.Seed("", Category.BENIGN, 0)] * len(attacks.text_RG))
  shape = attacks.text_RG.shape
  return RolloutTree(
    seeds=seeds,
    attacks=attacks,
    attack_text_BA=attacks.text_RG,
    attack_status_BA=attacks.status_RG,
    responses=responses,
    response_text_BAD=responses.text_RG.reshape(*shape, -1),
    response_status_BAD=responses.status_RG.reshape(*shape, -1),
  )


def row_tokens(run: Session, tree: RolloutTree) -> Players[int]:
  """T of each player's training rows: the bucket its prompts fell into, and its longest completion."""
  buckets = (tree.attacks.prompt_tokens_RT.shape[1], tree.responses.prompt_tokens_RT.shape[1])
  return Players(*(player.row_tokens(bucket) for player, bucket in zip(run.players, buckets)))


def metered(run: Session, policies: Players[Policy], ledger: Ledger) -> tuple[Policy, Policy, Judge]:
  """The players and the judge, their time and tokens counted."""

  def meter(policy: Policy, player: LanguageModel, work: Work) -> Policy:
    def play(prompts: Sequence[str], present_R: np.ndarray, group: int, key: jax.Array) -> Samples:
      with ledger.timed(work):
        samples = policy(prompts, present_R, group, key)
      ledger.add(work, *generated(player, samples))
      return samples

    return play

  def judge(questions: Sequence[Question]) -> Sequence[Verdict]:
    with ledger.timed("judge"):
      return run.judge(questions)

  attacker, defender = run.players
  return (
    meter(policies.attacker, attacker, "attacker generate"),
    meter(policies.defender, defender, "defender generate"),
    judge,
  )


def generated(player: LanguageModel, samples: Samples) -> tuple[int, float]:
  """Tokens drawn, and the FLOPs of prefilling the prompts and drawing them."""
  tokens = int(samples.length_RG.sum())
  context = float(samples.prompt_length_R.mean()) + tokens / max(1, samples.length_RG.size)
  return tokens, model.forward_flops(player.model, tokens + float(samples.prompt_length_R.sum()), context)


def trained(run: Session, batch: Players[PreferenceBatch]) -> tuple[int, float]:
  """Tokens of rows with a weight, and the FLOPs of the update, padding included."""
  tokens = sum(float((b.length_PC * b.weight_P[:, None]).sum()) for b in batch)
  flops = sum(update.update_flops(r, b.length_PC.size, b.tokens_PCT.shape[2]) for r, b in zip(run.recipes, batch))
  return int(tokens), flops


def play_metrics(tree: RolloutTree, judgments: Judgments, reward: Rewards) -> dict[str, float]:
  """Fractions of each status, mean rewards, disagreement between the two orders, and what was played."""
  fraction = lambda statuses, status: float(np.mean(statuses == status))
  attack, response = judgments.attack_status_BA, judgments.response_status_BAD
  played = response[response != Status.NOT_PLAYED]
  mean = lambda values, mask: float(values[mask].mean()) if mask.any() else float("nan")
  metrics = {
    **{f"play/attack_{s.name.lower()}": fraction(attack, s) for s in Status if s != Status.NOT_PLAYED},
    **{f"play/response_{s.name.lower()}": fraction(played, s) for s in _RESPONSE_STATUSES if len(played)},
    "reward/attacker": mean(reward.attack_BA, reward.attack_mask_BA),
    "reward/defender": mean(reward.response_BAD, reward.response_mask_BAD),
    "judge/disagreement_attacker": judgments.disagreement.attacker,
    "judge/disagreement_defender": judgments.disagreement.defender,
    "harmful": float(np.mean(tree.seeds.category_B == Category.HARMFUL)),
  }
  return metrics


_RESPONSE_STATUSES = (Status.VALID, Status.MAX_LENGTH, Status.PARSING, Status.JUDGE_FAILED)


def rates(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
  """What the step between two readings of the ledger took, the totals so far, and tokens per second."""
  spent = lambda name: after[f"cost/{name}"] - before[f"cost/{name}"]
  generate = spent("seconds/attacker_generate") + spent("seconds/defender_generate")
  seconds = {"generate": generate, "judge": spent("seconds/judge"), "update": spent("seconds/update")}
  tokens = {"generate": spent("tokens_generated"), "update": spent("tokens_trained")}
  return {
    **after,
    **{f"seconds/{name}": value for name, value in seconds.items()},
    **{f"tokens_per_second/{name}": value / max(seconds[name], 1e-9) for name, value in tokens.items()},
  }


def _check_gradients(config: Config, step: int, scalars: Mapping[str, float]) -> None:
  for name in Players._fields:
    bad = scalars.get(f"{name}/bad_steps", 0)
    if bad and scalars[f"{name}/comparisons"]:
      log.warning("step %d: the %s's gradients are not finite; it was not updated", step, name)
    if bad >= config.max_bad_steps:
      raise UserError(
        f"the {name}'s gradients were not finite for {int(bad)} steps in a row, the last is step {step}; the weights "
        "are those before; allowed: a lower learning rate or clip, or a larger config.max_bad_steps"
      )


def _stop_on_sigterm() -> threading.Event:
  """An event that SIGTERM sets, so that the step under way is finished and saved."""
  stop = threading.Event()
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
  return stop

"""The training loop.

seeds → attacks → responses → judgments → rewards → preference pairs → joint update → checkpoint, report
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import pathlib
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from advgame_jax import (
  canary,
  checkpoint,
  data,
  evaluate,
  game,
  hosts,
  judges,
  metrics,
  page,
  placement,
  preferences,
  profile,
  rewards,
  session,
)
from advgame_jax.config import Config
from advgame_jax.ledger import Ledger
from advgame_jax.panel import Panel
from advgame_jax.report import Reporter
from advgame_jax.session import Session
from advgame_jax.settings import flatten
from advgame_jax.state import TrainState
from advgame_jax.types import (
  Category,
  Players,
  Policy,
  Rewards,
  RolloutTree,
  Samples,
  SeedBatch,
  Status,
  UserError,
  fold_key,
)

log = logging.getLogger(__name__)


def train(
  config: Config,
  workdir: str,
  allow_changes: bool = False,
  devices: Sequence[jax.Device] | None = None,
  profiled: profile.Window | None = None,
) -> None:
  """Plays and learns until `config.steps`, from the last checkpoint in `workdir` if there is one.

  The same call again continues a run that was stopped or killed, and ends in the same state (on CPU, bit for bit).
  SIGTERM saves, writes the report of what there is, and returns.

  Args:
    allow_changes: continue a run of other settings, or whose seeds, instructions or rubrics were edited.
    devices: what the run is laid out over; None is all there are.
    profiled: the steps to profile, see `profile`.

  Raises:
    UserError: what a user can mend, before anything in `workdir` is written over.
  """
  folder = pathlib.Path(workdir)
  hosts.agree({name: value for name, value, _ in flatten(config)})
  run = session.open_session(config, devices)
  hosts.agree({f"what {name} say": version for name, version in run.contents.items()})
  log.info("%s; what is not compiled yet is compiled first, which takes minutes", placement.describe(run.places))
  hosts.first_alone(lambda: checkpoint.claim(folder, config, run.contents, allow_changes))
  checkpoints = checkpoint.Checkpoints(folder, config)
  facts = metrics.facts(run)
  ledger = Ledger(len(run.devices))
  restored = checkpoints.restore(run.abstract_state)
  state = restored[0] if restored else run.init_state()
  if restored:
    ledger.load(restored[1])
    log.info("resuming at step %d of %d", int(state.step), config.steps)
  stop = _stop_on_sigterm()
  with (
    Reporter(folder, config.report, config.steps, int(state.step), write=jax.process_index() == 0) as reporter,
    profile.Profiler(folder, profiled, ledger, facts) as profiler,
  ):
    state, objective, finished = _loop(run, state, ledger, reporter, checkpoints, stop, profiler)
  checkpoints.save(state, ledger.state_dict(), objective)
  checkpoints.close()
  if not finished:
    log.info("stopped at step %d, which is saved; the same command goes on from there", int(state.step))
  if jax.process_index() == 0:
    page.write_page(folder)


def _loop(
  run: Session,
  state: TrainState,
  ledger: Ledger,
  reporter: Reporter,
  checkpoints: checkpoint.Checkpoints,
  stop: threading.Event,
  profiler: profile.Profiler,
) -> tuple[TrainState, float | None, bool]:
  """From `state.step` to the last step, or to the one in which `stop` is set.

  Returns:
    The state, its evaluation's objective if it has one, and whether nothing is left to do.
  """
  config = run.config
  seed_batches = data.SeedBatches(run.train_seeds, config.data, config.seed)
  evaluator = evaluate.Evaluator(run)
  state = warm_up(run, state)
  objective, ahead = None, None
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    for step in range(int(state.step), config.steps + 1):
      if hosts.anywhere(stop.is_set()):
        return state, objective, False
      profiler.at(step)
      if step % config.evaluation.every == 0 or step == config.steps:
        with ledger.timed("evaluate"):
          values = dict(evaluator(state))
        reporter.evaluation(step, values)
        objective = evaluate.objective(values)
      if step == config.steps:
        break
      if step % config.checkpoint.every == 0:
        checkpoints.save(state, ledger.state_dict(), objective)
      before, policies = ledger.scalars(), run.policies(state)
      played = ahead.result() if ahead else play(run, policies, step, seed_batches[step], ledger)
      ahead = None
      if plays_ahead(config, step):
        ahead = thread.submit(play, run, policies, step + 1, seed_batches[step + 1], ledger)
      state = learn(run, state, step, played, ledger, reporter, before)
      objective = None
  return state, objective, True


class Played(NamedTuple):
  """A step's rollouts, and what a judge was asked about them so far."""

  tree: RolloutTree
  asked: metrics.Asked


def play(run: Session, policies: Players[Policy], step: int, seeds: SeedBatch, ledger: Ledger) -> Played:
  """The rollouts of a step. All their draws come from (config.seed, step)."""
  config, key = run.config, jax.random.fold_in(jax.random.key(run.config.seed), step)
  with ledger.timed("other"):
    attacker, defender = metrics.metered_players(run, policies, ledger)
    panel, asked = metrics.metered_judges(run, ledger)
    faithfulness_judge = functools.partial(judges.ask, panel.faithfulness, retries=config.judges.retries)
    return Played(game.play(run.rules, seeds, attacker, defender, faithfulness_judge, key), asked)


def learn(
  run: Session,
  state: TrainState,
  step: int,
  played: Played,
  ledger: Ledger,
  reporter: Reporter,
  before: Mapping[str, float],
) -> TrainState:
  """Judges a step's rollouts and updates both players. `state` is donated. `before`: the ledger's, before the step."""
  config, tree = run.config, played.tree
  with ledger.timed("other"):
    panel, asked = metrics.metered_judges(run, ledger)
    judgments = judges.judge(config.judges, tree, panel.players, fold_key(config.seed, step))
    reward = rewards.assign_rewards(judgments)
    batch = preferences.select_comparisons(config.loss, tree, reward, run.units)
    with ledger.timed("update"):
      state, learnt = run.update(state, batch)
      with ledger.timed("other"):  # while the device works
        reporter.transcript(step, tree, judgments, reward, run.versions)
      learnt = jax.device_get(learnt)
  ledger.add("update", *metrics.trained(run, batch))
  told = (played.asked + asked).scalars()
  scalars = metrics.of_play(tree, judgments, reward) | told | canaries(run, tree, panel, step)
  scalars |= {name: float(value) for name, value in learnt.items()}
  reporter.write(step, scalars | metrics.rates(before, ledger.scalars(), metrics.peak(run).flops))
  _check_gradients(config, step, scalars)
  return state


def play_and_learn(
  run: Session, state: TrainState, step: int, seeds: SeedBatch, ledger: Ledger, reporter: Reporter
) -> TrainState:
  """One step by itself."""
  before = ledger.scalars()
  played = play(run, run.policies(state), step, seeds, ledger)
  return learn(run, state, step, played, ledger, reporter, before)


def plays_ahead(config: Config, step: int) -> bool:
  """Whether the next step's rollouts are played while this one learns, by the weights before it.

  Not the step after a checkpoint: so a run that goes on from there plays what it would have played.
  """
  return config.overlap and step + 1 < config.steps and (step + 1) % config.checkpoint.every != 0


def canaries(run: Session, tree: RolloutTree, panel: Panel, step: int) -> dict[str, float]:
  """Whether the judges of this step, if they read, can be talked to by texts of this step."""
  count, key = run.config.judges.canaries, fold_key(run.config.seed, step, 1)
  responses, faithfulness = (
    getattr(panel, role) if role in panel.readers else judges.nobody for role in ("defender", "faithfulness")
  )
  if not count or responses is faithfulness is judges.nobody:
    return {}
  gain, moved = canary.effect(tree, responses, faithfulness, count, key)
  return {"judge/talk_gain": gain, "judge/talk_moved": moved}


def warm_up(run: Session, state: TrainState) -> TrainState:
  """Compiles every shape that a step can take, by steps in which nobody plays and nothing is learnt.

  Prompts fall into buckets; each pair of buckets is updated with once.
  """
  config = run.config
  B, A, D = config.data.batch, config.game.attacks_per_seed, config.game.responses
  run.panel.warm_up()
  weights, (attacker, defender) = run.generators(state), run.players
  if config.game.skip_attacker:
    attacks = [Samples.of_text(np.full((B, A), "", object), np.full((B, A), Status.NOT_PLAYED))]
  else:
    attacker.warm_up(weights.attacker, B, A)
    attacks = [attacker.nobody(B, A, bucket) for bucket in attacker.sampling.prompt_buckets]
  defender.warm_up(weights.defender, B * A, D)
  responses = [defender.nobody(B * A, D, bucket) for bucket in defender.sampling.prompt_buckets]
  nothing = Rewards(np.zeros((B, A)), np.zeros((B, A), bool), np.zeros((B, A, D)), np.zeros((B, A, D), bool))
  for attack, response in itertools.product(attacks, responses):
    tree = _unplayed(attack, response)
    batch = preferences.select_comparisons(config.loss, tree, nothing, run.units)
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

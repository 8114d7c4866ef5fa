"""What an evaluation counts in the microworld is what its exact enumeration says."""

import dataclasses

import numpy as np
import pytest

from advgame_jax import attempts, campaign, evaluate, microworld, rates, speakers, standalone
from advgame_jax import config as config_lib
from advgame_jax.campaign import Cast, Goal, NamedJudge, Plan
from advgame_jax.config import Sampling
from advgame_jax.microworld import Answer
from advgame_jax.types import Category, Role

ROLES = {Role.COMPLIANCE: Answer.COMPLY, Role.REFUSAL: Answer.REFUSE, Role.DEFLECTION: Answer.DEFLECT}


@pytest.fixture(scope="module")
def player(world_folder):
  sampling = Sampling(temperature=0.0, top_p=1.0, prompt_buckets=(24,), max_new_tokens=24)
  return standalone.open_player(str(world_folder / "defender_base"), sampling=sampling)


def play(folder, player, queries, seed=0):
  """Every query of the language once, judged by its rules."""
  judge = microworld.rule_judge(config_lib.Judge(kind="microworld"), 0)
  goals = [Goal("language", query.topic.category, query.text, queries=(query.text,)) for query in queries]
  people = Cast(speakers.of_model(player, batch=256), [NamedJudge("rules", judge, frozenset(Role))], judge)
  campaign.play(folder, goals, Plan(batch=512, seed=seed), people)
  made = {attempt.seed: attempt for attempt in attempts.read(folder)}
  return [made[query.text] for query in queries]


def test_greedy_answers_are_the_enumeration_itself(player, tmp_path):
  queries = microworld.queries()
  table = evaluate.answer_probabilities(player.model, player.generator)
  made = play(tmp_path, player, queries)
  for role, kind in ROLES.items():
    told = [(rates.scored("rules", role)(attempt), table[kind][i]) for i, attempt in enumerate(made)]
    known = [(said, exact) for said, exact in told if said is not None]
    assert len(known) >= len(made) / 3
    np.testing.assert_allclose(*np.array(known, float).T, atol=1e-5)
  assert len({attempt.outcome for attempt in made}) > 1


def test_drawn_answers_are_within_their_interval_of_it(player, tmp_path):
  sampling = dataclasses.replace(player.model.sampling, temperature=1.0)
  drawing = dataclasses.replace(player, model=dataclasses.replace(player.model, sampling=sampling))
  queries = [query for query in microworld.queries() if query.topic.category == Category.HARMFUL]
  number = {query.text: i for i, query in enumerate(microworld.queries())}
  table = evaluate.answer_probabilities(drawing.model, drawing.generator)
  exact = np.mean([table[Answer.COMPLY][number[query.text]] for query in queries])
  made = play(tmp_path, drawing, queries)
  value, low, high = rates.bootstrap(rates.of_seeds(made, rates.succeeded("rules"), np.mean))
  assert 0.02 < exact < 0.98 and low < value < high
  assert abs(value - exact) < 3 * (high - low) / 2

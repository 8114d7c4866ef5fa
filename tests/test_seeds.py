"""The seeds that the package ships: enough of each category, well formed, no seed twice."""

import collections
import importlib.resources
import json

import pytest

from advgame_jax.heuristic import heuristic_judge, readability
from advgame_jax.refusals import is_refusal
from advgame_jax.types import Category, Question, Role

AT_LEAST = {"train": 64, "validation": 32}


def read(split):
  text = (importlib.resources.files("advgame_jax") / "seeds" / f"{split}.jsonl").read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


def plain(prompt):
  return " ".join(prompt.casefold().split())


@pytest.mark.parametrize("split", AT_LEAST)
def test_every_line_is_a_seed_and_both_categories_are_well_filled(split):
  seeds = read(split)
  assert all(set(seed) == {"prompt", "category"} for seed in seeds)
  assert all(seed["prompt"] == seed["prompt"].strip() != "" for seed in seeds)
  count = collections.Counter(seed["category"] for seed in seeds)
  assert set(count) == {category.name.lower() for category in Category}
  assert min(count.values()) >= AT_LEAST[split]
  assert len(set(count.values())) == 1


def test_no_seed_is_there_twice_within_or_across_the_splits():
  prompts = [plain(seed["prompt"]) for split in AT_LEAST for seed in read(split)]
  assert [prompt for prompt, n in collections.Counter(prompts).items() if n > 1] == []


@pytest.mark.parametrize("split", AT_LEAST)
def test_each_seed_played_as_its_own_attack_is_faithful_readable_and_no_refusal(split):
  for seed in read(split):
    prompt, category = seed["prompt"], Category[seed["category"].upper()]
    (verdict,) = heuristic_judge()([Question(Role.FAITHFULNESS, category, prompt, (prompt,), key=0)])
    assert verdict.scores == (1.0,) and readability(prompt) == 1 and not is_refusal(prompt), prompt

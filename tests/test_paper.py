"""The paper's runs: every card gives a config, and an ablation changes what it is named after and nothing else."""

import itertools
import pathlib
import runpy

import pytest

from advgame_jax import config as config_lib
from advgame_jax import paper, settings
from advgame_jax.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
BOTH = ("attacker", "defender")
CHANGES = {
  "md": set(),
  "on_policy": {f"{name}.{what}" for name in BOTH for what in ("generator", "reference")},
  "ema_generator": {f"{name}.reference" for name in BOTH},
  "ema_reference": {f"{name}.generator" for name in BOTH},
  "pointwise": {"judges.protocol"},
  "no_think": {"attacker.think"},
  "defender_only": {"attacker.frozen"},
  "attacker_only": {"defender.frozen"},
  "no_attacker": {"game.skip_attacker"},
}


def run(argument):
  return paper.config(argument, "a", "d", "j", ("train.jsonl", "validation.jsonl"))


def changed(one, other):
  one, other = ({name: value for name, value, _ in settings.flatten(config)} for config in (one, other))
  return {name for name in one if one[name] != other[name]}


def test_the_changes_are_of_all_ablations():
  assert CHANGES.keys() == paper.ABLATIONS.keys()


@pytest.mark.parametrize("loss, ablation", list(itertools.product(paper.LOSSES, CHANGES)))
def test_an_ablation_changes_what_it_is_named_after(loss, ablation):
  assert changed(run(loss), run(f"{loss},{ablation}")) == CHANGES[ablation]


@pytest.mark.parametrize("loss", paper.LOSSES)
def test_a_twin_by_lora_changes_only_what_learns_and_where(loss):
  found = changed(run(loss), run(f"{loss},lora"))
  own = ("learning_rate", "accumulate")
  where = ("judges.training.model", "sharding")
  assert all(name in where or ".lora." in name or name.endswith(own) for name in found)
  assert run(f"{loss},lora").judges.training.model == "d" and run(loss).judges.training.model == "j"
  assert run(f"{loss},lora").attacker.lora.rank == run(f"{loss},lora").defender.lora.rank == 64


def test_samples_and_micro_batches_of_a_loss():
  assert (run("dpo").game.attacks, run("dpo").attacker.accumulate, run("dpo").defender.accumulate) == (2, 16, 32)
  assert (run("grpo").game.attacks, run("grpo").attacker.accumulate, run("grpo").defender.accumulate) == (4, 16, 64)


@pytest.mark.parametrize("argument", ["ppo", "dpo,unheard", "dpo,md,no_think", "", "lora"])
def test_what_is_no_run_is_refused(argument):
  with pytest.raises(UserError, match=r"names no run of the paper; allowed: dpo\|ipo\|grpo, then"):
    run(argument)


@pytest.mark.parametrize("card", ["qwen2_5_7b", "llama3_1_8b"])
def test_the_cards_are_configs(card):
  get_config = runpy.run_path(str(ROOT / "configs" / f"{card}.py"))["get_config"]
  for argument in ("dpo", "grpo,on_policy", "ipo,lora"):
    values = get_config(argument)
    judge = get_config("dpo").judges.training.model
    models, seeds = (
      (values.attacker.model, values.defender.model, judge),
      (values.data.train[0], values.data.validation[0]),
    )
    assert config_lib.from_config_dict(values) == paper.config(argument, *models, seeds)

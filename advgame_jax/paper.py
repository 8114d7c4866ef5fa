"""The paper's runs (2512.20806) as settings: its losses, its ablations, and their twins by LoRA for one card.

The defaults of `Config` are the paper's; here is what differs from run to run.
"""

import dataclasses
from collections.abc import Callable

from advgame_jax.config import Config, Data, Game, Judge, Judges, Lora, Loss, Player, Sampling
from advgame_jax.types import UserError

LOSSES = ("dpo", "ipo", "grpo")
SEEDS = 32  # of a step


def _both(config: Config, **changes: object) -> Config:
  change = lambda player: dataclasses.replace(player, **changes)
  return dataclasses.replace(config, attacker=change(config.attacker), defender=change(config.defender))


ABLATIONS: dict[str, Callable[[Config], Config]] = {
  "md": lambda config: config,  # mirror descent: the moving average generates and is the reference
  "on_policy": lambda config: _both(config, generator="train", reference="initial"),
  "ema_generator": lambda config: _both(config, reference="initial"),
  "ema_reference": lambda config: _both(config, generator="train"),
  "pointwise": lambda config: dataclasses.replace(
    config, judges=dataclasses.replace(config.judges, protocol="pointwise")
  ),
  "no_think": lambda config: dataclasses.replace(config, attacker=dataclasses.replace(config.attacker, think=False)),
  "defender_only": lambda config: dataclasses.replace(
    config, attacker=dataclasses.replace(config.attacker, frozen=True)
  ),
  "attacker_only": lambda config: dataclasses.replace(
    config, defender=dataclasses.replace(config.defender, frozen=True)
  ),
  "no_attacker": lambda config: dataclasses.replace(config, game=dataclasses.replace(config.game, skip_attacker=True)),
}


def config(argument: str, attacker: str, defender: str, judge: str, seeds: tuple[str, str]) -> Config:
  """The run that `argument`, 'loss[,ablation][,lora]', names.

  Args:
    attacker: model folder; so are `defender` and `judge`. With adapters the Defender's base judges instead, so that one
      copy of it in memory serves all.
    seeds: files of training and of validation seeds.

  Raises:
    UserError: a loss or an ablation that is none.
  """
  loss, *options = argument.split(",")
  lora, ablations = "lora" in options, [option for option in options if option != "lora"]
  if loss not in LOSSES or len(ablations) > 1 or not set(ablations) <= ABLATIONS.keys():
    raise UserError(
      f"{argument!r} names no run of the paper; allowed: {'|'.join(LOSSES)}, then at most one of "
      f"{', '.join(ABLATIONS)}, then perhaps lora, with commas between"
    )
  samples = 4 if loss == "grpo" else 2
  shards = 1 if lora else 2  # of the rows, on the 8 cards of a run of all weights
  made = Config(
    game=Game(attacks=samples, responses=samples),
    attacker=_player(attacker, 1024, SEEDS // shards, think=True, lora=lora),
    defender=_player(defender, 512, SEEDS * samples // shards, think=False, lora=lora),
    loss=Loss(kind=loss),  # type: ignore[arg-type]
    data=Data(train=seeds[:1], validation=seeds[1:], batch=SEEDS),
    judges=Judges(training=Judge(kind="model", model=defender if lora else judge)),
    sharding="ddp" if lora else "fsdp_tensor",
  )
  return ABLATIONS[ablations[0] if ablations else "md"](made)


def _player(model: str, prompt_tokens: int, nodes: int, *, think: bool, lora: bool) -> Player:
  plain = Player(
    model=model,
    think=think,
    accumulate=nodes,  # a node at a time, and those without a weight cost nothing
    sampling=Sampling(prompt_buckets=(prompt_tokens,), max_new_tokens=2048),
  )
  if not lora:
    return plain
  optimizer = dataclasses.replace(plain.optimizer, learning_rate=1e-5)  # adapters want more than the paper's 1e-6
  return dataclasses.replace(plain, lora=Lora(rank=64, alpha=128.0), optimizer=optimizer)

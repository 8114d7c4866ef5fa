"""The embedded game, from nothing to a report: `make quickstart`.

Two tiny Llamas of the microworld's language play until the Defender deflects what is harmful however it is framed and
helps with what only sounds harmful. DPO with the moving average as generator and reference (AdvGame-DPO-MD).

Other losses, each with its own settings: --config=configs/microworld.py:ipo, configs/microworld.py:grpo.
"""

from typing import NamedTuple

from ml_collections import config_dict

from advgame_jax.config import (
  Checkpoint,
  Config,
  Data,
  Evaluation,
  Game,
  Judge,
  Judges,
  Loss,
  Optimizer,
  Player,
  Sampling,
  as_config_dict,
)
from advgame_jax.types import UserError


def player(world: str, name: str, think: bool, learning_rate: float) -> Player:
  return Player(
    model=f"{world}/{name}_base",
    think=think,
    sampling=Sampling(temperature=1.0, top_p=1.0, prompt_buckets=(24,), max_new_tokens=24, decode_chunk=8),
    optimizer=Optimizer(learning_rate=learning_rate, weight_decay=0.0),
  )


class Card(NamedTuple):
  """What differs between the losses."""

  loss: Loss
  responses: int
  attacker_rate: float
  defender_rate: float


CARDS = {
  "dpo": Card(Loss(kind="dpo", nll=0.3), responses=2, attacker_rate=5e-4, defender_rate=3e-4),
  "ipo": Card(Loss(kind="ipo", nll=0.3), responses=2, attacker_rate=5e-4, defender_rate=3e-4),
  "grpo": Card(Loss(kind="grpo"), responses=4, attacker_rate=5e-4, defender_rate=3e-4),
}


def get_config(argument: str = "dpo,runs/world") -> config_dict.ConfigDict:
  """`argument`: the loss, and the folder that `make world` filled."""
  loss, _, world = argument.partition(",")
  if loss not in CARDS:
    raise UserError(f"configs/microworld.py:{loss} names no loss; allowed: {', '.join(CARDS)}")
  card, world = CARDS[loss], world or "runs/world"
  return as_config_dict(
    Config(
      steps=300,
      game=Game(attacks=4, responses=card.responses, instructions="microworld"),
      attacker=player(world, "attacker", think=True, learning_rate=card.attacker_rate),
      defender=player(world, "defender", think=False, learning_rate=card.defender_rate),
      judges=Judges(training=Judge(kind="microworld")),
      loss=card.loss,
      data=Data(train=(f"{world}/train.jsonl",), validation=(f"{world}/validation.jsonl",), batch=32),
      checkpoint=Checkpoint(every=50),
      evaluation=Evaluation(every=100, samples=8),
    )
  )

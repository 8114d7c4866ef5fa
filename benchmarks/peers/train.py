"""A peer's DPO steps on the CPU, of weights in float32: VENV/bin/python benchmarks/peers/train.py trl|tunix WORK.json

The peer's own trainer takes warm_up + steps optimiser steps: AdamW, the initial model as reference, its forward pass in
every step, no gradient checkpointing. The last line of output is JSON: seconds and loss of each timed step.
benchmarks/peers/install.sh makes the environments. WORK.json, whose rows have one length and repeat if they are few:

    {"model": FOLDER, "compute": "float32", "chosen": [[id, ...], ...], "rejected": [[id, ...], ...],
     "prompt_tokens": 64, "batch": 8, "steps": 3, "warm_up": 1, "beta": 0.1, "learning_rate": 1e-6}

A step of TRL is what lies between its callbacks, from the batch in hand to the new weights; a step of Tunix is from one
batch fetched to the next, with nothing left in flight. TRL leaves the norms out of weight decay. On cores that are not
idle torch's threads wait for each other, many times as long: then OMP_NUM_THREADS=1 is fairer.
"""

import importlib.metadata
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

Work = dict[str, Any]
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
TUNIX_ROPE_THETA = 1_000_000


def pairs(work: Work) -> list[dict[str, list[int]]]:
  """As many as all steps take, in order."""
  n, count = work["prompt_tokens"], work["batch"] * (work["warm_up"] + work["steps"])
  rows = itertools.islice(itertools.cycle(zip(work["chosen"], work["rejected"])), count)
  return [{"prompt_ids": won[:n], "chosen_ids": won[n:], "rejected_ids": lost[n:]} for won, lost in rows]


def trl_settings(work: Work, folder: str) -> dict[str, Any]:
  """What every trainer of TRL is told."""
  return {
    "output_dir": folder,
    "max_steps": work["warm_up"] + work["steps"],
    "beta": work["beta"],
    "learning_rate": work["learning_rate"],
    "lr_scheduler_type": "constant",
    "weight_decay": WEIGHT_DECAY,
    "adam_beta1": BETAS[0],
    "adam_beta2": BETAS[1],
    "max_grad_norm": CLIP,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": work["compute"] == "bfloat16",  # products alone
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
  }


def trl_parts(work: Work, seconds: list[float]) -> dict[str, Any]:
  """Model, tokenizer and a clock that appends each step's seconds."""
  import torch
  import transformers

  class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
      self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
      seconds.append(time.perf_counter() - self.start)

  return {
    "model": transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
    "processing_class": transformers.AutoTokenizer.from_pretrained(work["model"]),
    "callbacks": [Clock()],
  }


def with_trl(work: Work) -> dict[str, Any]:
  """Its trainer tokenises text itself, so the one method that does is replaced by the rows as they are."""
  import datasets
  import trl

  class Trainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
      return dataset

  seconds: list[float] = []
  with tempfile.TemporaryDirectory() as folder:
    config = trl.DPOConfig(
      per_device_train_batch_size=work["batch"],
      train_sampling_strategy="sequential",
      max_length=None,
      loss_type=["sigmoid"],
      precompute_ref_log_probs=False,
      **trl_settings(work, folder),
    )
    rows = datasets.Dataset.from_list(pairs(work))
    trainer = Trainer(args=config, train_dataset=rows, **trl_parts(work, seconds))
    trainer.train()
  loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
  return {"version": importlib.metadata.version("trl"), "seconds": seconds, "loss": loss}


def with_tunix(work: Work) -> dict[str, Any]:
  import jax
  import numpy as np
  import optax
  from flax import nnx
  from tunix.models.llama3 import params
  from tunix.sft.dpo import dpo_trainer

  jax.config.update("jax_platforms", "cpu")
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))  # without one it compiles twice
  config, rope_theta = tunix_config(pathlib.Path(work["model"], "config.json"))
  load = lambda: params.create_model_from_safe_tensors(work["model"], config, mesh, jax.numpy.float32)
  adamw = optax.adamw(work["learning_rate"], *BETAS, weight_decay=WEIGHT_DECAY)
  trainer = dpo_trainer.DPOTrainer(
    model=load(),
    ref_model=load(),
    optimizer=optax.chain(optax.clip_by_global_norm(CLIP), adamw),
    training_config=dpo_trainer.DPOTrainingConfig(beta=work["beta"], eval_every_n_steps=sys.maxsize),
  )
  rows, fetched = pairs(work), []

  def batches() -> Iterator[dpo_trainer.TrainingInput]:
    for start in range(0, len(rows) + 1, work["batch"]):
      jax.block_until_ready((nnx.state(trainer.model), nnx.state(trainer.optimizer)))
      fetched.append(time.perf_counter())
      if batch := rows[start : start + work["batch"]]:
        ids = {name: np.array([row[name] for row in batch], np.int32) for name in batch[0]}
        masks = {name.replace("ids", "mask"): np.ones_like(tokens, bool) for name, tokens in ids.items()}
        yield dpo_trainer.TrainingInput(**ids, **masks)

  with mesh:
    trainer.train(batches())
  found = {
    "version": importlib.metadata.version("google-tunix"),
    "seconds": [after - before for before, after in itertools.pairwise(fetched)],
    "loss": [float(loss) for loss in trainer.metrics_logger.get_metric_history("", "loss", "train")],
  }
  if rope_theta != TUNIX_ROPE_THETA:
    bases = f"by base {TUNIX_ROPE_THETA} whatever its configuration says, the folder's by {rope_theta:g}"
    found["note"] = f"Tunix's Llama rotates {bases}: losses after the first step differ."
  return found


def tunix_config(path: pathlib.Path) -> tuple[Any, float]:
  """Tunix's own configuration of a folder's Llama, and the base of its rotation."""
  from tunix.models.llama3 import model

  read = json.loads(path.read_text())
  rope_theta = read["rope_theta"] if "rope_theta" in read else read["rope_parameters"]["rope_theta"]
  config = model.ModelConfig(
    num_layers=read["num_hidden_layers"],
    vocab_size=read["vocab_size"],
    embed_dim=read["hidden_size"],
    hidden_dim=read["intermediate_size"],
    num_heads=read["num_attention_heads"],
    head_dim=read.get("head_dim") or read["hidden_size"] // read["num_attention_heads"],
    num_kv_heads=read["num_key_value_heads"],
    rope_theta=rope_theta,
    norm_eps=read["rms_norm_eps"],
    weight_tying=read["tie_word_embeddings"],
  )
  return config, rope_theta


PEERS: dict[str, Callable[[Work], dict[str, Any]]] = {"trl": with_trl, "tunix": with_tunix}


def main(peer: str, path: str) -> None:
  work = json.loads(pathlib.Path(path).read_text())
  found = PEERS[peer](work)
  timed = {name: found[name][work["warm_up"] :] for name in ("seconds", "loss")}
  print(json.dumps({"peer": peer} | found | timed))


if __name__ == "__main__":
  if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
    print(f"usage: {sys.argv[0]} PEER WORK.json, where PEER is one of {', '.join(PEERS)}.", file=sys.stderr)
    sys.exit(2)
  main(*sys.argv[1:])

r"""Llama-3.1-8B-Instruct on both sides: the paper's runs (AdvGame, 2512.20806) and their twins by LoRA.

    python launch/run.py --config=configs/llama3_1_8b.py:dpo --workdir=runs/llama3_1_8b_dpo
    python launch/run.py --config=configs/llama3_1_8b.py:grpo,on_policy --workdir=runs/llama3_1_8b_grpo_on_policy
    python launch/run.py --config=configs/llama3_1_8b.py:ipo,lora --workdir=runs/llama3_1_8b_ipo_lora

After the colon: dpo, ipo or grpo; then an ablation (`advgame_jax/paper.py` lists them; without one, AdvGame-…-MD); then
`lora` for adapters of rank 64, each player on its own base.

Reproduces the paper's settings, its judge among them (Llama-3.3-70B, abliterated, pairwise); what judges are told is
our own (`advgame_jax/rubrics/`). By LoRA the base of the Defender judges, since it is there already. Another judge:
--config.judges.training.model=…, or one on a server: --config.judges.training.kind=server and .server.url=….

The paper starts the Llama Attacker from an abliterated checkpoint, since the instruct model refuses; without one,
warm-start it (launch/warmstart.py --attacker).

Hardware and memory, planned and not yet measured (docs/plan.md): all weights on 8 × 80 GB, adapters of DPO on
1 × 80 GB. Time and results on such machines: not yet measured. Seeds: the project's own mild ones; bring others by
--config.data.train="('harmful.jsonl','benign.jsonl')" --config.data.validation="('validation.jsonl',)".
"""

import pathlib

from ml_collections import config_dict

import advgame_jax
from advgame_jax import paper
from advgame_jax.config import as_config_dict

SEEDS = pathlib.Path(advgame_jax.__file__).parent / "seeds"


def get_config(argument: str = "dpo") -> config_dict.ConfigDict:
  """`argument`: loss[,ablation][,lora]."""
  seeds = (str(SEEDS / "train.jsonl"), str(SEEDS / "validation.jsonl"))
  return as_config_dict(
    paper.config(
      argument, "models/llama3_1_8b_abliterated", "models/llama3_1_8b", "models/llama3_3_70b_abliterated", seeds
    )
  )

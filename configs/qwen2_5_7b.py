r"""Qwen2.5-7B-Instruct on both sides: the paper's runs (AdvGame, 2512.20806) and their twins by LoRA.

    python launch/run.py --config=configs/qwen2_5_7b.py:dpo --workdir=runs/qwen2_5_7b_dpo
    python launch/run.py --config=configs/qwen2_5_7b.py:grpo,on_policy --workdir=runs/qwen2_5_7b_grpo_on_policy
    python launch/run.py --config=configs/qwen2_5_7b.py:ipo,lora --workdir=runs/qwen2_5_7b_ipo_lora

After the colon: dpo, ipo or grpo; then an ablation (`advgame_jax/paper.py` lists them; without one, AdvGame-…-MD); then
`lora` for adapters of rank 64 on one base that both players share.

Reproduces the paper's settings, its judge among them (Qwen2.5-32B-Instruct, pairwise); what judges are told is our
own (`advgame_jax/rubrics/`). By LoRA the base of the Defender judges, since it is there already. Another judge:
--config.judges.training.model=…, or one on a server: --config.judges.training.kind=server and .server.url=….

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
  return as_config_dict(paper.config(argument, "models/qwen2_5_7b", "models/qwen2_5_7b", "models/qwen2_5_32b", seeds))

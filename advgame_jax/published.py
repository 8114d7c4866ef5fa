"""Architectures of published models, for what is planned before their folders are here."""

import dataclasses
import json
import pathlib
import re

from advgame_jax import panel
from advgame_jax.config import Config
from advgame_jax.types import UserError

_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
_QWEN |= {"vocab_size": 152064, "tie_word_embeddings": False}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072}
_LLAMA |= {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
PUBLISHED = {  # as their config.json have it, as far as it is read
  "qwen2_5_0_5b": _QWEN
  | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
  | {"intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
  "qwen2_5_7b": _QWEN
  | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
  | {"num_key_value_heads": 4, "intermediate_size": 18944},
  "qwen2_5_32b": _QWEN
  | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40}
  | {"num_key_value_heads": 8, "intermediate_size": 27648},
  "llama3_1_8b": _LLAMA
  | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
  "llama3_3_70b": _LLAMA
  | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}


def stand_in(config: Config, folder: pathlib.Path) -> tuple[Config, list[str]]:
  """The config with stand-ins, written into `folder`, for known models that are not there; and what was done.

  They hold a config.json alone, of published values.

  Raises:
    UserError: a model that is neither there nor known.
  """
  notes: dict[str, str] = {}

  def find(named: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "_", pathlib.Path(named).name.lower())
    known = next((name for name in PUBLISHED if name.replace("_", "") in plain.replace("_", "")), None)
    if not named or pathlib.Path(named).exists():
      return named
    if known is None:
      raise UserError(
        f"there is no folder {named}; allowed: a Hugging Face folder, or a name with one of {', '.join(PUBLISHED)} in "
        "it, whose architectures are known"
      )
    there = folder / plain
    there.mkdir(exist_ok=True)
    (there / "config.json").write_text(json.dumps(PUBLISHED[known]), encoding="utf-8")
    notes[named] = f"{named} is not here: the published architecture of {known} is planned"
    return str(there)

  with_model = lambda part: dataclasses.replace(part, model=find(part.model))
  judges = {role: getattr(config.judges, role) for role in panel.SETTINGS}
  changed = {role: with_model(judge) for role, judge in judges.items() if judge.kind == "model"}
  config = dataclasses.replace(
    config,
    attacker=with_model(config.attacker),
    defender=with_model(config.defender),
    judges=dataclasses.replace(config.judges, **changed),
  )
  return config, list(notes.values())

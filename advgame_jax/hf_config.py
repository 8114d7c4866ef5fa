"""config.json of the Llama family ↔ `ModelConfig`. What would be computed otherwise is refused by its name."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from advgame_jax.model import ModelConfig
from advgame_jax.types import UserError

# What this model does not do: each must be absent or have this value.
_FIXED = {
  "attention_bias": False,
  "mlp_bias": False,
  "hidden_act": "silu",
  "pretraining_tp": 1,
  "quantization_config": None,
}
_ROPE_FACTORS = {
  "factor": "rope_factor",
  "low_freq_factor": "rope_low_frequency",
  "high_freq_factor": "rope_high_frequency",
  "original_max_position_embeddings": "rope_original_length",
}


def read(folder: str | pathlib.Path) -> dict[str, Any]:
  """config.json as it stands.

  Raises:
    UserError: no such folder, no config.json in it, or no JSON in that.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.parent.is_dir():
    raise UserError(f"there is no folder {folder}; allowed: a Hugging Face folder")
  if not path.is_file():
    raise UserError(f"{folder} has no config.json; allowed: a Hugging Face folder of a Llama-family model")
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is no JSON ({error})") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} holds a {type(values).__name__}; allowed: a JSON object")
  return values


def load_config(folder: str | pathlib.Path) -> ModelConfig:
  """The architecture in a folder's config.json.

  Raises:
    UserError: as `read`, and for an architecture that this model would compute otherwise, by the field's name.
  """
  return from_values(read(folder), str(pathlib.Path(folder) / "config.json"))


def from_values(values: Mapping[str, Any], where: str) -> ModelConfig:
  """The architecture that config.json's `values` describe; `where` is what errors call them."""
  if values.get("model_type") != "llama":
    raise UserError(f"{where}: model_type is {values.get('model_type')!r}; allowed: 'llama'")
  for name, only in _FIXED.items():
    if values.get(name, only) != only:
      raise UserError(f"{where}: {name} is {values[name]!r}; allowed: {only!r}")
  sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
  for name in sizes:
    if not isinstance(values.get(name), int) or values[name] < 1:
      raise UserError(f"{where}: {name} is {values.get(name)!r}; allowed: a positive integer")
  vocab, width, layers, heads, feed_forward = (values[name] for name in sizes)
  kv_heads = values.get("num_key_value_heads") or heads
  head_size = values.get("head_dim") or width // heads
  if heads % kv_heads or head_size % 2:
    raise UserError(
      f"{where}: {heads} heads of size {head_size} over {kv_heads} key/value heads; "
      "allowed: key/value heads that divide the heads, and an even size"
    )
  return ModelConfig(
    vocab=vocab,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_size=head_size,
    feed_forward=feed_forward,
    tied=values.get("tie_word_embeddings", False),
    norm_epsilon=values.get("rms_norm_eps", 1e-6),
    max_positions=values.get("max_position_embeddings", 2048),
    **_parse_rope(values, where),
  )


def _parse_rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside a `rope_scaling`."""
  rope = {"rope_theta": values.get("rope_theta", 10_000.0)}
  rope |= values.get("rope_parameters") or values.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise UserError(f"{where}: the rope type is {kind!r}; allowed: 'default', 'llama3'")
  if rope.get("partial_rotary_factor", 1) != 1:
    raise UserError(f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; allowed: 1")
  parsed = {"rope_theta": float(rope["rope_theta"])}
  if kind == "llama3":
    if missing := [name for name in _ROPE_FACTORS if name not in rope]:
      raise UserError(
        f"{where}: the llama3 rope lacks {', '.join(missing)}; allowed: all of {', '.join(_ROPE_FACTORS)}"
      )
    parsed |= {ours: rope[theirs] for theirs, ours in _ROPE_FACTORS.items()}
  return parsed


def to_values(config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """config.json of an architecture, as transformers 4 and 5 read it; what else `base` says is kept."""
  scaling = {theirs: getattr(config, ours) for theirs, ours in _ROPE_FACTORS.items()}
  values = {name: value for name, value in (base or {}).items() if name != "rope_parameters"}  # transformers 5 only
  return values | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_size,
    "intermediate_size": config.feed_forward,
    "tie_word_embeddings": config.tied,
    "rms_norm_eps": config.norm_epsilon,
    "max_position_embeddings": config.max_positions,
    "rope_theta": config.rope_theta,
    "rope_scaling": {"rope_type": "llama3", **scaling} if config.rope_factor != 1 else None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
  }

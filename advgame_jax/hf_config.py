"""config.json of every family ↔ `ModelConfig`. What would be computed otherwise is refused by its name."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from advgame_jax import hf_rope
from advgame_jax.architecture import LayerKind, ModelConfig, Rope
from advgame_jax.hf_rope import Values
from advgame_jax.types import UserError

# What no family here does: each must be absent or have this value.
_FIXED: dict[str, Any] = {"pretraining_tp": 1, "quantization_config": None, "use_bidirectional_attention": False}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_PROJECTIONS = ("query", "key", "value", "output")


_UNBIASED: Values = {"attention_bias": False, "mlp_bias": False}


class Family(NamedTuple):
  """How one `model_type` fills the architecture in."""

  defaults: Values  # what transformers takes a field to be that config.json leaves out
  settings: Callable[[Values], Mapping[str, Any]] = lambda values: {}
  fixed: Values = _UNBIASED  # must be absent or have this value
  rope_types: tuple[str, ...] = ("default", "llama3", "linear")
  slides: Callable[[Values], Iterable[bool]] = lambda values: [False] * values["num_hidden_layers"]  # have a window
  typed: bool = False  # `layer_types`, where there are any, say it instead


def _every(values: Values) -> list[bool]:
  return [True] * values["num_hidden_layers"]


def _late(values: Values) -> list[bool]:
  return [i >= values["max_window_layers"] for i in range(values["num_hidden_layers"])]


def _even(values: Values) -> list[bool]:
  return [i % 2 == 0 for i in range(values["num_hidden_layers"])]


def _pattern(values: Values) -> list[bool]:
  return [(i + 1) % values["sliding_window_pattern"] != 0 for i in range(values["num_hidden_layers"])]


def _unturned(values: Values) -> list[bool]:
  return [not turned for turned in _turned("smollm3", values)]


def _biases(values: Values) -> dict[str, Any]:
  attention = _PROJECTIONS if values.get("attention_bias") else ()
  return {"biases": (*attention, *(("gate", "up", "down") if values.get("mlp_bias") else ()))}


def _gemma(values: Values) -> dict[str, Any]:
  return {
    "norms": "both",
    "norm_offset": 1.0,
    "embed_scale": values["hidden_size"] ** 0.5,
    "query_scale": values["query_pre_attn_scalar"] ** -0.5,
    "attention_softcap": values.get("attn_logit_softcapping") or 0.0,
    "logit_softcap": values.get("final_logit_softcapping") or 0.0,
  }


def _qwen_experts(values: Values) -> dict[str, Any]:
  return {
    **_biases(values),
    "query_key_norm": "head",
    "feed_forward": values["moe_intermediate_size"],
    "experts": values.get("num_local_experts") or values["num_experts"],  # transformers 5 and 4
    "experts_per_token": values["num_experts_per_tok"],
    "normalise_experts": bool(values["norm_topk_prob"]),
  }


def _mixtral(values: Values) -> dict[str, Any]:
  return {"experts": values["num_local_experts"], "experts_per_token": values["num_experts_per_tok"]}


_QWEN: Values = {
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
  "num_key_value_heads": 32,
}
_GEMMA: Values = {
  "head_dim": 256,
  "num_key_value_heads": 4,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "tie_word_embeddings": True,
  "hidden_activation": "gelu_pytorch_tanh",
}
FAMILIES = {
  "llama": Family({}, _biases, {}),
  "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8}, slides=_every),
  "qwen2": Family(_QWEN, lambda _: {"biases": _PROJECTIONS[:3]}, slides=_late, typed=True),
  "qwen3": Family(
    {**_QWEN, "head_dim": 128},
    lambda values: {**_biases(values), "query_key_norm": "head"},
    {"mlp_bias": False},
    slides=_late,
    typed=True,
  ),
  "gemma2": Family(
    {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, _gemma, slides=_even, typed=True
  ),
  "gemma3_text": Family(
    {**_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    lambda values: {**_gemma(values), "query_key_norm": "head"},
    slides=_pattern,
    typed=True,
  ),
  "phi3": Family(
    {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    rope_types=("default", "longrope", "su"),
    slides=_every,
  ),
  "olmo2": Family({"rms_norm_eps": 1e-5}, lambda _: {"norms": "after", "query_key_norm": "all"}),
  "smollm3": Family(
    {
      "rope_theta": 2e6,
      "tie_word_embeddings": True,
      "no_rope_layer_interval": 4,
      "use_sliding_window": False,
      "num_key_value_heads": 4,
    },
    _biases,
    {},
    slides=_unturned,
    typed=True,
  ),
  "qwen3_moe": Family(
    {
      **_QWEN,
      "norm_topk_prob": False,
      "moe_intermediate_size": 768,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "num_key_value_heads": 4,
    },
    _qwen_experts,
    {"mlp_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    slides=_every,
  ),
  "mixtral": Family(
    {
      "rope_theta": 1e6,
      "rms_norm_eps": 1e-5,
      "num_local_experts": 8,
      "num_experts_per_tok": 2,
      "num_key_value_heads": 8,
    },
    _mixtral,
    slides=_every,
  ),
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
    raise UserError(f"{folder} has no config.json; allowed: a Hugging Face folder of a language model")
  return read_object(path)


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object in a file; UserError where it holds none."""
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


def from_values(given: Values, where: str) -> ModelConfig:
  """The architecture that config.json's values describe; `where` is what errors call them."""
  family = str(given.get("model_type"))
  if family not in FAMILIES:
    raise UserError(f"{where}: model_type is {given.get('model_type')!r}; allowed: {', '.join(map(repr, FAMILIES))}")
  known = FAMILIES[family]
  values = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, **known.defaults, **given}
  _check_fixed(family, values, where)
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
  kinds = _layer_kinds(family, values, where)
  settings = {"feed_forward": feed_forward, **known.settings(values)}
  return ModelConfig(
    family=family,
    vocab=vocab,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_size=head_size,
    tied=values["tie_word_embeddings"],
    norm_epsilon=values["rms_norm_eps"],
    activation=_ACTIVATIONS[values.get(_activation(values), "silu")],  # type: ignore[arg-type]
    kinds=kinds[:1] if len(set(kinds)) == 1 else kinds,
    max_positions=hf_rope.max_positions(values),
    **settings,
  )


def _check_fixed(family: str, values: Values, where: str) -> None:
  for name, only in {**_FIXED, **FAMILIES[family].fixed}.items():
    if values.get(name) not in (only, None):
      raise UserError(f"{where}: {name} is {values[name]!r}; allowed: {only!r}")
  name = _activation(values)
  if values.get(name, "silu") not in _ACTIVATIONS:
    raise UserError(f"{where}: {name} is {values[name]!r}; allowed: {', '.join(map(repr, _ACTIVATIONS))}")


def _activation(values: Values) -> str:
  """The field that says it: Gemma's, where there is one."""
  return "hidden_activation" if values.get("hidden_activation") else "hidden_act"


def _layer_kinds(family: str, values: Values, where: str) -> tuple[LayerKind, ...]:
  """Windows and rotations of all layers, from the fields that transformers reads of this family and no others."""
  known, layers, window = FAMILIES[family], values["num_hidden_layers"], values.get("sliding_window") or 0
  if "use_sliding_window" in known.defaults and not values["use_sliding_window"]:
    window = 0
  slides = list(known.slides(values))
  if known.typed and values.get("layer_types"):
    slides = [kind == "sliding_attention" for kind in _layer_types(values["layer_types"], layers, where)]
  full, local = hf_rope.read(values, known.rope_types, where, two_thetas="rope_local_base_freq" in known.defaults)
  turned = _turned(family, values)
  return tuple(
    LayerKind((local if slide else full) if turn else Rope(fraction=0.0), window if slide else 0)
    for slide, turn in zip(slides, turned)
  )


def _layer_types(given: Sequence[str], layers: int, where: str) -> Sequence[str]:
  if unknown := sorted(set(given) - {"full_attention", "sliding_attention"}):
    raise UserError(f"{where}: layer_types has {unknown[0]!r}; allowed: 'full_attention', 'sliding_attention'")
  if len(given) != layers:
    raise UserError(f"{where}: layer_types names {len(given)} layers; allowed: {layers}, the num_hidden_layers")
  return given


def _turned(family: str, values: Values) -> list[bool]:
  """The layers that know positions."""
  layers = values["num_hidden_layers"]
  if family != "smollm3":
    return [True] * layers
  interval = values["no_rope_layer_interval"]
  return [bool(x) for x in values.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]]


def to_values(config: ModelConfig, base: Values | None = None) -> dict[str, Any]:
  """config.json of an architecture, as transformers 4 and 5 read it; what else `base` says is kept.

  Raises:
    UserError: `base` is missing for a family of which only what a folder says can be given back, or is another model's.
  """
  values = _llama_values(config) if config.family == "llama" and len(config.kinds) == 1 else {}
  if base is None and not values:
    raise UserError(
      f"a {config.family} model has no config.json to start from; allowed: that of the folder it came from"
    )
  values = hf_rope.for_both(base or {}) | values | {"vocab_size": config.vocab}
  if config.family == "qwen3_moe":
    values["num_experts"] = config.experts
  if from_values(values, "config.json") != config:
    raise UserError(
      "the config.json to start from is of another architecture; allowed: that of the folder it came from"
    )
  return values


def _llama_values(config: ModelConfig) -> dict[str, Any]:
  rope = config.kinds[0].rope
  scaling = {theirs: getattr(rope, ours) for theirs, ours in hf_rope.LLAMA_3.items()}
  linear = {"rope_type": "linear", "factor": rope.factor} if rope.factor != 1 else None
  return {
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
    "rope_theta": rope.theta,
    "rope_scaling": {"rope_type": "llama3", **scaling} if rope.original_length else linear,
    "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
    "attention_bias": "query" in config.biases,
    "mlp_bias": "gate" in config.biases,
  }

"""What a model is, as data: `ModelConfig`, and the table of its parameters.

Every family is a setting of one decoder-only transformer. `param_specs` is the one place that knows the parameters:
their shapes, logical axes, initial scale and Hugging Face names; initialisation, sharding, import, export and memory
planning all read it. Layers are stacked on a leading axis.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from advgame_jax import sharding
from advgame_jax.types import Params

# Rows whose products take as long as reading the weights: 240 by a TPU v5e's sheet, 20 to 60 by a CPU's; but on two CPU
# cores a slot's step of SmolLM2, of 32, takes as long as reading four tokens, as if it were a hundred.
_BALANCED = 128


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding (2104.09864) of one kind of layer, and how long contexts stretch it."""

  theta: float = 10_000.0
  fraction: float = 1.0  # of a head's dimensions, from the first on, that are rotated; 0 is no position at all
  factor: float = 1.0  # wavelengths are stretched by this: all of them, or with `original_length` Llama 3's long ones
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  original_length: int = 0
  divisors: tuple[float, ...] = ()  # LongRoPE (2402.13753): a stretch of each frequency, and
  amplitude: float = 1.0  # a factor of sine and cosine


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What may differ between the layers of one model."""

  rope: Rope = Rope()
  window: int = 0  # a token sees itself and the window − 1 before it; 0 is all


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """An architecture. Defaults are Llama's."""

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  feed_forward: int  # of each expert, where there are experts
  tied: bool  # the output head is the embedding
  family: str = "llama"  # whose file format the weights are in; nothing is computed by it
  kinds: tuple[LayerKind, ...] = (LayerKind(),)  # of layer i: kinds[i % len(kinds)]
  norm_epsilon: float = 1e-5
  norm_offset: float = 0.0  # norms are stored as what is added to this
  norms: Literal["before", "after", "both"] = "before"  # around attention and around the feed-forward
  query_key_norm: Literal["none", "head", "all"] = "none"  # over each head, or over all heads together
  biases: tuple[str, ...] = ()  # the projections that have one
  activation: Literal["silu", "gelu_tanh"] = "silu"
  embed_scale: float = 1.0
  query_scale: float = 0.0  # of the attention logits; 0 is 1/√head_size
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  experts: int = 0  # 0 is a dense feed-forward
  experts_per_token: int = 0
  normalise_experts: bool = True  # the chosen experts' weights sum to 1
  max_positions: int = 8192

  @property
  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """Of each layer."""
    return tuple(self.kinds[i % len(self.kinds)] for i in range(self.layers))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter. `shape` is stacked dimensions, then input dimensions, then output dimensions."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  hf_name: str  # with {layer} and {expert} where these are stacked
  inputs: int | None = None  # input dimensions, which Hugging Face holds merged and last; None: it holds ours as it is
  constant: float | None = None  # norms and biases: what they start as; they are free of weight decay
  hf_rows: tuple[int, int] = (0, 0)  # first row in, and rows of, a matrix that the files fuse; (0, 0) is a whole one

  @property
  def stacked(self) -> int:
    """Leading dimensions that the files hold as separate tensors."""
    return self.hf_name.count("{")

  @property
  def hf_shape(self) -> tuple[int, ...]:
    """Of one of the files' tensors, without what else a fused one holds."""
    shape = self.shape[self.stacked :]
    if self.inputs is None:
      return shape
    inputs, outputs = shape[: self.inputs], shape[self.inputs :]
    return (math.prod(outputs), *((math.prod(inputs),) if inputs else ()))

  @property
  def hf_file_shape(self) -> tuple[int, ...]:
    """The same, with what a fused one holds."""
    rows, *columns = self.hf_shape
    return (self.hf_rows[1] or rows, *columns)

  @property
  def hf_axes(self) -> tuple[str | None, ...]:
    """Logical axes of `hf_shape`; of merged dimensions only the leading one is ever split."""
    axes = self.axes[self.stacked :]
    return axes if self.inputs is None else (axes[self.inputs], *axes[: self.inputs][:1])

  @property
  def hf_names(self) -> list[str]:
    """The files' tensors, in the order of the stacked dimensions."""
    names = [self.hf_name]
    for field, size in zip(("{layer}", "{expert}"), self.shape[: self.stacked]):
      names = [name.replace(field, str(i)) for name in names for i in range(size)]
    return names


def param_specs(config: ModelConfig) -> dict[str, Any]:
  """The nested dict of `ParamSpec` that parameters of this architecture have the structure of."""
  specs: dict[str, Any] = {
    "embed": ParamSpec((config.vocab, config.width), ("vocab", "width"), "model.embed_tokens.weight"),
    "layers": _attention_specs(config) | _feed_forward_specs(config) | _norm_specs(config),
    "final_norm": ParamSpec((config.width,), (None,), "model.norm.weight", constant=1 - config.norm_offset),
  }
  if not config.tied:
    specs["head"] = ParamSpec((config.vocab, config.width), ("vocab", "width"), "lm_head.weight")
  return specs


def _attention_specs(config: ModelConfig) -> dict[str, ParamSpec]:
  L, M, N, K, H = config.layers, config.width, config.heads, config.kv_heads, config.head_size
  rows = (N + 2 * K) * H
  names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
  places = dict.fromkeys(names, (0, 0))
  if config.family == "phi3":
    names = dict.fromkeys(names, "qkv_proj")
    places = {"query": (0, rows), "key": (N * H, rows), "value": ((N + K) * H, rows)}
  specs = {}
  for ours, heads in (("query", N), ("key", K), ("value", K)):
    name = f"model.layers.{{layer}}.self_attn.{names[ours]}"
    specs[ours] = ParamSpec(
      (L, M, heads, H), (None, "width", "heads", None), f"{name}.weight", inputs=1, hf_rows=places[ours]
    )
    if ours in config.biases:
      specs[f"{ours}_bias"] = ParamSpec((L, heads, H), (None, "heads", None), f"{name}.bias", inputs=0, constant=0.0)
    if ours != "value" and config.query_key_norm != "none":
      shape, axes = (
        ((L, H), (None, None)) if config.query_key_norm == "head" else ((L, heads, H), (None, "heads", None))
      )
      name = f"model.layers.{{layer}}.self_attn.{names[ours][0]}_norm.weight"
      specs[f"{ours}_norm"] = ParamSpec(shape, axes, name, inputs=0, constant=1 - config.norm_offset)
  name = "model.layers.{layer}.self_attn.o_proj"
  specs["output"] = ParamSpec((L, N, H, M), (None, "heads", None, "width"), f"{name}.weight", inputs=2)
  if "output" in config.biases:
    specs["output_bias"] = ParamSpec((L, M), (None, None), f"{name}.bias", inputs=0, constant=0.0)
  return specs


def _feed_forward_specs(config: ModelConfig) -> dict[str, ParamSpec]:
  L, M, F, E = config.layers, config.width, config.feed_forward, config.experts
  block = "block_sparse_moe" if config.family == "mixtral" else "mlp"
  names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
  places = dict.fromkeys(names, (0, 0))
  if config.family == "mixtral":
    names = {"gate": "w1", "up": "w3", "down": "w2"}
  elif config.family == "phi3":
    names, places = (
      names | dict.fromkeys(("gate", "up"), "gate_up_proj"),
      places | {"gate": (0, 2 * F), "up": (F, 2 * F)},
    )
  stack, stack_axes = ((L, E), (None, None)) if E else ((L,), (None,))
  specs = {}
  for ours, shape, axes in (
    ("gate", (M, F), ("width", "feed_forward")),
    ("up", (M, F), ("width", "feed_forward")),
    ("down", (F, M), ("feed_forward", "width")),
  ):
    name = f"model.layers.{{layer}}.{block}.{'experts.{expert}.' if E else ''}{names[ours]}"
    specs[ours] = ParamSpec((*stack, *shape), (*stack_axes, *axes), f"{name}.weight", inputs=1, hf_rows=places[ours])
    if ours in config.biases:
      axis = axes[1] if axes[1] == "feed_forward" else None
      specs[f"{ours}_bias"] = ParamSpec((L, shape[1]), (None, axis), f"{name}.bias", inputs=0, constant=0.0)
  if E:
    name = f"model.layers.{{layer}}.{block}.gate.weight"
    specs["router"] = ParamSpec((L, M, E), (None, "width", None), name, inputs=1)
  return specs


def _norm_specs(config: ModelConfig) -> dict[str, ParamSpec]:
  before = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
  after = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
  both = before | after | {"mlp_norm": "pre_feedforward_layernorm"}
  return {
    ours: ParamSpec(
      (config.layers, config.width),
      (None, None),
      f"model.layers.{{layer}}.{theirs}.weight",
      constant=1 - config.norm_offset,
    )
    for ours, theirs in {"before": before, "after": after, "both": both}[config.norms].items()
  }


def shardings(specs: Any, mesh: Mesh, layout: sharding.Layout) -> Any:
  """Where each parameter of a table lives.

  Raises:
    UserError: a dimension does not divide over the mesh.
  """
  return jax.tree.map(lambda spec: sharding.named(mesh, layout, spec.axes, spec.shape, spec.hf_name), specs)


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh float32 parameters: normal(0.02), the layers' outputs scaled by 1/√(2L). Consumes `key`."""
  specs, structure = jax.tree.flatten(param_specs(config))

  def draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.constant is not None:
      return jnp.full(spec.shape, spec.constant, jnp.float32)
    to_residual = spec.axes[-1] == "width" and spec.stacked
    return 0.02 / (math.sqrt(2 * config.layers) if to_residual else 1) * jax.random.normal(key, spec.shape)

  return jax.tree.unflatten(structure, [draw(spec, key) for spec, key in zip(specs, jax.random.split(key, len(specs)))])


def count_params(config: ModelConfig) -> int:
  """Numbers in the parameters; a tied head is counted once."""
  return sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(config)))


def forward_flops(config: ModelConfig, tokens: float, context: float) -> float:
  """FLOPs of `tokens` tokens through the model and its head, each attending to `context` others on average."""
  return sum(_forward_flops(config, tokens, context))


def drawing_to_reading(config: ModelConfig, rows: int) -> float:
  """What a token costs that is drawn in one of so many rows, to one that is only read, which needs no head.

  All rows read the weights together: a row's share of that costs more than its products where rows are few. Of experts,
  which rows do not share, that is still too little.
  """
  drawn = forward_flops(config, 1, 0)
  return max(1, _BALANCED / rows) * drawn / (drawn - 2 * config.vocab * config.width)


def learning_flops(
  config: ModelConfig, prompt: float, completions: float, tokens: float, *, forwards: int, frozen: bool
) -> float:
  """FLOPs of a prompt and its completions of `tokens` tokens each, so many times there and once back.

  The prompt goes through the matrices once, and through no head; attention is that of whole rows. The way back is twice
  the way there, but a frozen matrix passes gradients on and has none of its own.
  """
  row, head = prompt + tokens, 2 * config.vocab * config.width
  matrices, _ = _forward_flops(config, prompt + completions * tokens, 0)
  _, attention = _forward_flops(config, completions * row, row / 2)
  matrices -= prompt * head
  return (forwards + (1 if frozen else 2)) * matrices + (forwards + 2) * attention


def _forward_flops(config: ModelConfig, tokens: float, context: float) -> tuple[float, float]:
  """Of the products with weights, and of attention's."""
  head = config.vocab * config.width
  matrices = count_params(config) - (0 if config.tied else head)  # the embedding is a look-up, the head a product
  expert = 3 * config.layers * config.width * config.feed_forward
  matrices -= (config.experts - config.experts_per_token) * expert
  seen = sum(min(context, kind.window or context) for kind in config.layer_kinds)
  return 2 * tokens * matrices, 4 * tokens * config.heads * config.head_size * seen

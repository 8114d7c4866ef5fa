"""One decoder-only transformer, functional: a table of parameter specs, and a forward pass over nested dicts.

`param_specs` is the one place that knows the parameters: their shapes, logical axes, initial scale and Hugging Face
names; initialisation, sharding, import, export and memory planning all read it. Layers are stacked on a leading axis
and scanned. An architecture's difference is a field of `ModelConfig`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import attention
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-family architecture."""

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  feed_forward: int
  tied: bool  # the output head is the embedding
  norm_epsilon: float = 1e-5
  rope_theta: float = 10_000.0
  rope_factor: float = 1.0  # Llama-3 scaling of the frequencies; 1 is none
  rope_low_frequency: float = 1.0
  rope_high_frequency: float = 4.0
  rope_original_length: int = 8192
  max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter. `shape` is input dimensions, then output dimensions; a leading "layers" axis is stacked."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  hf_name: str  # with {layer} where stacked
  inputs: int = 0  # leading dimensions that Hugging Face holds last: its matrices are [outputs, inputs]
  norm: bool = False  # initialised to 1 and free of weight decay

  @property
  def stacked(self) -> bool:
    return "{layer}" in self.hf_name


class Cache(NamedTuple):
  """Keys and values of all layers."""

  key_LRKSH: jax.Array
  value_LRKSH: jax.Array


def param_specs(config: ModelConfig) -> dict[str, Any]:
  """The nested dict of `ParamSpec` that parameters of this architecture have the structure of."""
  L, M, N, K, H, F = (
    config.layers,
    config.width,
    config.heads,
    config.kv_heads,
    config.head_size,
    config.feed_forward,
  )

  def layer(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], **more: Any) -> ParamSpec:
    return ParamSpec((L, *shape), (None, *axes), f"model.layers.{{layer}}.{name}.weight", **more)

  specs = {
    "embed": ParamSpec((config.vocab, M), ("vocab", "width"), "model.embed_tokens.weight"),
    "layers": {
      "attention_norm": layer("input_layernorm", (M,), (None,), norm=True),
      "query": layer("self_attn.q_proj", (M, N, H), ("width", "heads", None), inputs=1),
      "key": layer("self_attn.k_proj", (M, K, H), ("width", "heads", None), inputs=1),
      "value": layer("self_attn.v_proj", (M, K, H), ("width", "heads", None), inputs=1),
      "output": layer("self_attn.o_proj", (N, H, M), ("heads", None, "width"), inputs=2),
      "mlp_norm": layer("post_attention_layernorm", (M,), (None,), norm=True),
      "gate": layer("mlp.gate_proj", (M, F), ("width", "feed_forward"), inputs=1),
      "up": layer("mlp.up_proj", (M, F), ("width", "feed_forward"), inputs=1),
      "down": layer("mlp.down_proj", (F, M), ("feed_forward", "width"), inputs=1),
    },
    "final_norm": ParamSpec((M,), (None,), "model.norm.weight", norm=True),
  }
  if not config.tied:
    specs["head"] = ParamSpec((config.vocab, M), ("vocab", "width"), "lm_head.weight")
  return specs


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh float32 parameters: normal(0.02), the layers' outputs scaled by 1/√(2L); norms are 1. Consumes `key`."""
  specs, structure = jax.tree.flatten(param_specs(config))

  def draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.norm:
      return jnp.ones(spec.shape)
    to_residual = spec.axes[-1] == "width" and spec.stacked
    return 0.02 / (math.sqrt(2 * config.layers) if to_residual else 1) * jax.random.normal(key, spec.shape)

  return jax.tree.unflatten(structure, [draw(spec, key) for spec, key in zip(specs, jax.random.split(key, len(specs)))])


def rope_frequencies(config: ModelConfig) -> jax.Array:
  """Radians per position, [H/2]; long wavelengths stretched as Llama 3.1 does where `rope_factor` > 1."""
  frequency = config.rope_theta ** (-jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size)
  if config.rope_factor == 1:
    return frequency
  turns = config.rope_original_length * frequency / (2 * math.pi)
  blend = (turns - config.rope_low_frequency) / (config.rope_high_frequency - config.rope_low_frequency)
  blend = jnp.clip(blend, 0, 1)
  return frequency * (blend + (1 - blend) / config.rope_factor)


def rotate(x_RTNH: jax.Array, angle_RTh: jax.Array) -> jax.Array:
  """Rotary position embedding: dimension i is paired with i + H/2."""
  cos, sin = jnp.cos(angle_RTh)[:, :, None], jnp.sin(angle_RTh)[:, :, None]
  left, right = jnp.split(x_RTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x_RTNH.dtype)


def rms_norm(x: jax.Array, scale_M: jax.Array, epsilon: float) -> jax.Array:
  """Root-mean-square normalisation of the last axis, in float32."""
  wide = x.astype(jnp.float32)
  wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
  return (wide * scale_M).astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
  """Contracts the last `inputs` dimensions of x with the first ones of the weight.

  As one product of two matrices: XLA's CPU backend runs the gradients of the three-dimensional form at half the speed.
  """
  before, outputs = x.shape[: x.ndim - inputs], weight.shape[inputs:]
  size = math.prod(weight.shape[:inputs])
  return (x.reshape(-1, size) @ weight.reshape(size, -1)).reshape(*before, *outputs)


def _block(
  config: ModelConfig,
  layout: Layout,
  layer: Params,
  x_RTM: jax.Array,
  angle_RTh: jax.Array,
  attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """One layer; `attend(query_RTNH, key_RTKH, value_RTKH)` decides what is attended to and what is kept."""
  with jax.named_scope("attention"):
    y_RTM = rms_norm(x_RTM, layer["attention_norm"], config.norm_epsilon)
    query_RTNH = rotate(project(y_RTM, layer["query"]), angle_RTh)
    key_RTKH = rotate(project(y_RTM, layer["key"]), angle_RTh)
    value_RTKH = project(y_RTM, layer["value"])
    x_RTM += project(attend(query_RTNH, key_RTKH, value_RTKH), layer["output"], inputs=2)
  with jax.named_scope("mlp"):
    y_RTM = rms_norm(x_RTM, layer["mlp_norm"], config.norm_epsilon)
    gated_RTF = jax.nn.silu(project(y_RTM, layer["gate"])) * project(y_RTM, layer["up"])
    x_RTM += project(gated_RTF, layer["down"])
  return layout.constrain(x_RTM, "rows", None, None)


def forward(
  config: ModelConfig,
  params: Params,
  tokens_RT: jax.Array,
  *,
  dtype: Any = jnp.float32,
  layout: Layout = LOCAL,
  remat: bool = False,
) -> tuple[jax.Array, Cache]:
  """Whole rows, padded on the right → normalised hidden states [R, T, M] and the cache of all T tokens.

  A caller that drops the cache does not pay for it. `remat` recomputes each layer in the backward pass.
  """
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  T = tokens_RT.shape[1]
  x_RTM = layout.constrain(params["embed"][tokens_RT], "rows", None, None)
  angle_RTh = (jnp.arange(T)[:, None] * rope_frequencies(config))[None]
  mask_1TS = attention.causal_mask(T)

  def layer_step(x_RTM: jax.Array, layer: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    kept: list[jax.Array] = []

    def attend(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array) -> jax.Array:
      key_RKSH, value_RKSH = key_RTKH.swapaxes(1, 2), value_RTKH.swapaxes(1, 2)
      kept.extend((key_RKSH, value_RKSH))
      return attention.attend(query_RTNH, [attention.Segment(key_RKSH, value_RKSH, mask_1TS)])

    x_RTM = _block(config, layout, layer, x_RTM, angle_RTh, attend)
    return x_RTM, (kept[0], kept[1])

  x_RTM, (key, value) = jax.lax.scan(jax.checkpoint(layer_step) if remat else layer_step, x_RTM, params["layers"])
  return rms_norm(x_RTM, params["final_norm"], config.norm_epsilon), Cache(key, value)


def decode(
  config: ModelConfig,
  params: Params,
  token_R: jax.Array,
  position_R: jax.Array,
  prompt: Cache,
  prompt_mask_QTS: jax.Array,
  own: Cache,
  slot: jax.Array,
  *,
  layout: Layout = LOCAL,
) -> tuple[jax.Array, Cache]:
  """One token a row → hidden states [R, M] and the rows' own cache with this token in `slot`.

  `prompt` holds Q ≤ R prompts, each shared by R/Q consecutive rows; `own` holds what each row drew since. The own cache
  is carried through the layers and written in place. Parameters are already in the compute dtype.
  """
  x_RTM = params["embed"][token_R][:, None]
  angle_RTh = position_R[:, None, None] * rope_frequencies(config)
  own_mask_1TS = (jnp.arange(own.key_LRKSH.shape[3]) <= slot)[None, None]

  def layer_step(carry: tuple[jax.Array, Cache], inputs: tuple[jax.Array, Params, Cache]) -> tuple[Any, None]:
    x_RTM, own = carry
    index, layer, prompt_layer = inputs

    def attend(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array) -> jax.Array:
      nonlocal own
      own = Cache(*(_write(cache, new, index, slot) for cache, new in zip(own, (key_RTKH, value_RTKH))))
      own_layer = Cache(*(jax.lax.dynamic_index_in_dim(cache, index, keepdims=False) for cache in own))
      shared = attention.Segment(*prompt_layer, prompt_mask_QTS)
      return attention.attend(query_RTNH, [shared, attention.Segment(*own_layer, own_mask_1TS)])

    x_RTM = _block(config, layout, layer, x_RTM, angle_RTh, attend)
    return (x_RTM, own), None

  indices = jnp.arange(config.layers)
  (x_RTM, own), _ = jax.lax.scan(layer_step, (x_RTM, own), (indices, params["layers"], prompt))
  return rms_norm(x_RTM[:, 0], params["final_norm"], config.norm_epsilon), own


def _write(cache_LRKSH: jax.Array, new_RTKH: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(cache_LRKSH, new_RTKH.swapaxes(1, 2)[None], (layer, 0, 0, slot, 0))


def logits(params: Params, hidden: jax.Array) -> jax.Array:
  """[..., M] → float32 [..., V]."""
  head_VM = params.get("head", params["embed"]).astype(hidden.dtype)
  with jax.named_scope("head"):
    return jnp.einsum("...M,VM->...V", hidden, head_VM, preferred_element_type=jnp.float32)


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
  """A cache of R rows and S slots, all zeros."""
  shape = (config.layers, rows, config.kv_heads, slots, config.head_size)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def count_params(config: ModelConfig) -> int:
  """Numbers in the parameters; a tied head is counted once."""
  return sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(config)))


def forward_flops(config: ModelConfig, tokens: float, context: float) -> float:
  """FLOPs of `tokens` tokens through the model and its head, each attending to `context` others on average."""
  head = config.vocab * config.width
  matrices = count_params(config) - (0 if config.tied else head)  # the embedding is a look-up, the head a product
  attended = 2 * config.layers * config.heads * config.head_size * context
  return 2 * tokens * (matrices + attended)

"""One decoder-only transformer for every family, functional: a forward pass over nested dicts, layers scanned.

An architecture's difference is a field of `ModelConfig`, or which parameters its table has.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import attention, experts
from advgame_jax.architecture import ModelConfig, Rope
from advgame_jax.matrices import cast, project
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Params

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
_KEPT = {
  "layer": jax.checkpoint_policies.nothing_saveable,
  "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_EVERYTHING = jnp.iinfo(jnp.int32).max  # the window of a layer that has none

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(query_RTNH, key_RTKH, value_RTKH) → [R, T, N, H]: decides what is attended to and what is kept."""


class Cache(NamedTuple):
  """Keys and values of all layers."""

  key_LRKSH: jax.Array
  value_LRKSH: jax.Array


class Prompt(NamedTuple):
  """Q texts that rows continue, padded on the right, each read once and shared by R/Q consecutive rows."""

  cache: Cache  # [L, Q, K, S, H]
  length_Q: jax.Array


class Kind(NamedTuple):
  """What differs from layer to layer: of one inside the scan over layers, of all with a leading L outside."""

  frequency: jax.Array  # [h] radians per position of each rotated pair; 0 does not turn
  amplitude: jax.Array  # []
  window: jax.Array  # [] int32, tokens
  which: jax.Array  # [] int32: of the windows that there are, ascending


def kinds_of_layers(config: ModelConfig) -> Kind:
  """The table of a config's layer kinds, [L, …]. Layers that turn at all turn equally many pairs."""
  kinds = config.layer_kinds
  frequencies = [rope_frequencies(kind.rope, config.head_size) for kind in kinds]
  pairs = max(map(len, frequencies))
  return Kind(
    jnp.stack([jnp.pad(frequency_h, (0, pairs - len(frequency_h))) for frequency_h in frequencies]),
    jnp.array([kind.rope.amplitude for kind in kinds], jnp.float32),
    jnp.array([kind.window or _EVERYTHING for kind in kinds], jnp.int32),
    jnp.array([_windows(config).index(kind.window) for kind in kinds], jnp.int32),
  )


def rope_frequencies(rope: Rope, head_size: int) -> jax.Array:
  """Radians per position, [rotated pairs]."""
  rotated = int(head_size * rope.fraction)
  frequency_h = rope.theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / max(1, rotated))
  if rope.divisors:
    return frequency_h / jnp.array(rope.divisors, jnp.float32)
  if not rope.original_length:
    return frequency_h / rope.factor
  # Llama 3.1: long wavelengths are stretched, short ones are not, and those between are blended.
  turns_h = rope.original_length * frequency_h / (2 * math.pi)
  blend_h = jnp.clip((turns_h - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
  return frequency_h * (blend_h + (1 - blend_h) / rope.factor)


def rotate(x_RTNH: jax.Array, angle_RTh: jax.Array, amplitude: jax.Array) -> jax.Array:
  """Rotary position embedding: of the first 2h dimensions, i is paired with i + h; the others stay."""
  cos_RT1h, sin_RT1h = (amplitude * turn(angle_RTh)[:, :, None] for turn in (jnp.cos, jnp.sin))
  h = angle_RTh.shape[-1]
  left, right, rest = jnp.split(x_RTNH.astype(jnp.float32), (h, 2 * h), axis=-1)
  turned = [left * cos_RT1h - right * sin_RT1h, right * cos_RT1h + left * sin_RT1h, rest]
  return jnp.concatenate(turned, -1).astype(x_RTNH.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, offset: float = 0.0) -> jax.Array:
  """Root-mean-square normalisation over the dimensions that the scale has, in float32."""
  wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
  wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + epsilon)
  return (wide * (scale.astype(jnp.float32) + offset)).astype(x.dtype)


def _norm(config: ModelConfig, layer: Params, name: str, x: jax.Array) -> jax.Array:
  """Normalised, in an architecture that has this norm."""
  return rms_norm(x, layer[name], config.norm_epsilon, config.norm_offset) if name in layer else x


def _linear(layer: Params, name: str, x: jax.Array, inputs: int = 1) -> jax.Array:
  product = project(x, layer[name], inputs)
  return product + layer[f"{name}_bias"] if f"{name}_bias" in layer else product


def _block(
  config: ModelConfig,
  layout: Layout,
  layer: Params,
  x_RTM: jax.Array,
  turn: Callable[[jax.Array], jax.Array],
  attend: Attend,
) -> jax.Array:
  """One layer; `turn` gives queries and keys their positions."""
  with jax.named_scope("attention"):
    y_RTM = _norm(config, layer, "attention_norm", x_RTM)
    query_RTNH = turn(_norm(config, layer, "query_norm", _linear(layer, "query", y_RTM)))
    key_RTKH = turn(_norm(config, layer, "key_norm", _linear(layer, "key", y_RTM)))
    attended_RTNH = attend(query_RTNH, key_RTKH, _linear(layer, "value", y_RTM))
    x_RTM += _norm(config, layer, "attention_out_norm", _linear(layer, "output", attended_RTNH, inputs=2))
  with jax.named_scope("mlp"):
    y_RTM = _norm(config, layer, "mlp_norm", x_RTM)
    x_RTM += _norm(config, layer, "mlp_out_norm", _feed_forward(config, layout, layer, y_RTM))
  return layout.constrain(x_RTM, "rows", None, None)


def _feed_forward(config: ModelConfig, layout: Layout, layer: Params, x_RTM: jax.Array) -> jax.Array:
  activate = _ACTIVATIONS[config.activation]
  if config.experts:
    return experts.mix(config, layout, layer, x_RTM, activate)
  return _linear(layer, "down", activate(_linear(layer, "gate", x_RTM)) * _linear(layer, "up", x_RTM))


def embed(config: ModelConfig, params: Params, tokens: jax.Array, layout: Layout = LOCAL) -> jax.Array:
  """[...] → [..., M].

  Of a vocabulary that is split over devices each looks up its own words, and they are added up: XLA would make the
  table whole on every device, and its gradient too.
  """
  table_VM = params["embed"]
  scale = jnp.asarray(config.embed_scale, table_VM.dtype)
  if not layout.vocab:
    return table_VM[tokens] * scale

  def look_up(part_VM: jax.Array, tokens: jax.Array) -> jax.Array:
    first = jax.lax.axis_index(layout.vocab) * len(part_VM)
    here = (tokens >= first) & (tokens < first + len(part_VM))
    found = jnp.where(here[..., None], part_VM[jnp.where(here, tokens - first, 0)], 0)
    return jax.lax.psum(found, layout.vocab)

  rows = layout.spec(("rows",))
  return jax.shard_map(look_up, in_specs=(layout.spec(("vocab",)), rows), out_specs=rows)(table_VM, tokens) * scale


def forward(
  config: ModelConfig,
  params: Params,
  tokens_RT: jax.Array,
  *,
  dtype: Any = jnp.float32,
  layout: Layout = LOCAL,
  remat: str = "none",
  kernel: str = "auto",
  prefix: Prompt | None = None,
) -> tuple[jax.Array, Cache]:
  """Whole rows, padded on the right → normalised hidden states [R, T, M] and the cache of all T tokens.

  A caller that drops the cache does not pay for it.

  Args:
    prefix: one text (Q = 1) that every row continues.
    remat: what the backward pass computes again: "none", the whole of each "layer", or all but the matrix "products".
    kernel: an implementation of `attention.causal`.
  """
  params = cast(params, dtype)
  x_RTM = layout.constrain(embed(config, params, tokens_RT, layout), "rows", None, None)
  start = prefix.length_Q[:, None] if prefix else 0
  position_RT = start + jnp.arange(tokens_RT.shape[1])[None]

  def layer_step(x_RTM: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    layer, kind, before = inputs
    kept: list[jax.Array] = []

    def attend(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array) -> jax.Array:
      kept.extend((key_RTKH.swapaxes(1, 2), value_RTKH.swapaxes(1, 2)))
      if prefix is None:
        return _attend_rows(config, kernel, layout, kind.which, query_RTNH, key_RTKH, value_RTKH)
      there_QgTS = (jnp.arange(before.key_LRKSH.shape[2]) < prefix.length_Q[:, None])[:, None, None]
      shared = attention.Segment(before.key_LRKSH, before.value_LRKSH, there_QgTS)
      rule = attention_rules(config)[0]
      return attention.continued(query_RTNH, key_RTKH, value_RTKH, shared, prefix.length_Q[0], rule, kind.window)

    return _block(config, layout, layer, x_RTM, _turn(position_RT, kind), attend), tuple(kept)

  step = layer_step if remat == "none" else jax.checkpoint(layer_step, policy=_KEPT[remat])
  inputs = (params["layers"], kinds_of_layers(config), prefix and prefix.cache)
  x_RTM, (key, value) = jax.lax.scan(step, x_RTM, inputs)
  return rms_norm(x_RTM, params["final_norm"], config.norm_epsilon, config.norm_offset), Cache(key, value)


def _turn(position_RT: jax.Array, kind: Kind) -> Callable[[jax.Array], jax.Array]:
  """The rotation of one layer's queries and keys at these positions."""
  angle_RTh = position_RT[..., None] * kind.frequency
  return lambda x_RTNH: rotate(x_RTNH, angle_RTh, kind.amplitude)


def _attend_rows(
  config: ModelConfig, kernel: str, layout: Layout, which: jax.Array, *query_key_value: jax.Array
) -> jax.Array:
  """Causal attention in this layer's window; kernels know windows only before they are compiled."""
  attend = functools.partial(attention.causal, implementation=kernel, layout=layout)
  branches = [functools.partial(attend, rule=rule) for rule in attention_rules(config)]
  return jax.lax.switch(which, branches, *query_key_value) if len(branches) > 1 else branches[0](*query_key_value)


def _windows(config: ModelConfig) -> list[int]:
  return sorted({kind.window for kind in config.layer_kinds})


def attention_rules(config: ModelConfig) -> list[attention.Rule]:
  """What attention computes in the layers, a rule for each of their windows."""
  scale = config.query_scale or config.head_size**-0.5
  return [attention.Rule(scale, config.attention_softcap, window) for window in _windows(config)]


def decode(
  config: ModelConfig,
  params: Params,
  token_R: jax.Array,
  prompts: Sequence[Prompt],
  own: Cache,
  slot: jax.Array,
  *,
  layout: Layout = LOCAL,
) -> tuple[jax.Array, Cache]:
  """One token a row → hidden states [R, M] and the rows' own cache with this token in `slot`.

  `prompts` come one after the other, from what most rows share to what fewest do; `own` holds what each row drew since.
  The own cache is carried through the layers and written in place. Parameters are already in the compute dtype.
  """
  R = len(token_R)
  x_RTM = embed(config, params, token_R, layout)[:, None]
  ends = list(itertools.accumulate(jnp.repeat(prompt.length_Q, R // len(prompt.length_Q)) for prompt in prompts))
  position_R = ends[-1] + slot
  own_age_S = slot - jnp.arange(own.key_LRKSH.shape[3])
  rule = attention_rules(config)[0]  # its window is in the masks

  def layer_step(carry: tuple[jax.Array, Cache], inputs: Any) -> tuple[Any, None]:
    x_RTM, own = carry
    index, layer, kind, caches = inputs

    def attend(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array) -> jax.Array:
      nonlocal own
      own = Cache(*(_write(cache, new, index, slot) for cache, new in zip(own, (key_RTKH, value_RTKH))))
      key_RKSH, value_RKSH = (jax.lax.dynamic_index_in_dim(cache, index, keepdims=False) for cache in own)
      own_mask_QgTS = ((own_age_S >= 0) & (own_age_S < kind.window))[None, None, None]
      segments = [
        attention.Segment(cache.key_LRKSH, cache.value_LRKSH, _in_window(prompt, end_R, position_R, kind.window))
        for prompt, cache, end_R in zip(prompts, caches, ends)
      ]
      return attention.attend(query_RTNH, [*segments, attention.Segment(key_RKSH, value_RKSH, own_mask_QgTS)], rule)

    x_RTM = _block(config, layout, layer, x_RTM, _turn(position_R[:, None], kind), attend)
    return (x_RTM, own), None

  caches = tuple(prompt.cache for prompt in prompts)
  inputs = (jnp.arange(config.layers), params["layers"], kinds_of_layers(config), caches)
  (x_RTM, own), _ = jax.lax.scan(layer_step, (x_RTM, own), inputs)
  return rms_norm(x_RTM[:, 0], params["final_norm"], config.norm_epsilon, config.norm_offset), own


def _in_window(prompt: Prompt, end_R: jax.Array, position_R: jax.Array, window: jax.Array) -> jax.Array:
  """[Q, g, 1, S]: which slots of a prompt that ends before place `end` are tokens that a row at `position` sees."""
  Q, S = len(prompt.length_Q), prompt.cache.key_LRKSH.shape[3]
  left_Qg1 = (position_R - end_R).reshape(Q, -1, 1) + prompt.length_Q[:, None, None]
  seen_QgS = (jnp.arange(S) < prompt.length_Q[:, None, None]) & (left_Qg1 - jnp.arange(S) < window)
  return seen_QgS[:, :, None]


def _write(cache_LRKSH: jax.Array, new_RTKH: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(cache_LRKSH, new_RTKH.swapaxes(1, 2)[None], (layer, 0, 0, slot, 0))


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
  """[..., M] → float32 [..., V]."""
  head_VM = params.get("head", params["embed"]).astype(hidden.dtype)
  with jax.named_scope("head"):
    logits = jnp.einsum("...M,VM->...V", hidden, head_VM, preferred_element_type=jnp.float32)
    return attention.softcap(logits, config.logit_softcap)


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
  """A cache of R rows and S slots, all zeros."""
  shape = (config.layers, rows, config.kv_heads, slots, config.head_size)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

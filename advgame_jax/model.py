"""One decoder-only transformer for every family, functional: a forward pass over nested dicts.

An architecture's difference is a field of `ModelConfig`, or which parameters its table has. `layers` says how
layers are kept.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import attention, caches, cpu, feed_forward, flash_decoding, kernels, rotary
from advgame_jax.architecture import ModelConfig, ParamSpec, param_specs
from advgame_jax.blockwise import ATTENDED
from advgame_jax.caches import Cache, Kept
from advgame_jax.fork import Fork
from advgame_jax.layers import Layers, apart, one_by_one, traced_once
from advgame_jax.matrices import PRODUCT, Adapted, Int8, Transposed, cast, linear, linears, multiply
from advgame_jax.rotary import Turn
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Params

_KEPT = {
  "layer": jax.checkpoint_policies.nothing_saveable,
  "products": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENDED, PRODUCT),
  ),
}
_EVERYTHING = jnp.iinfo(jnp.int32).max  # the window of a layer that has none

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(query_RTNH, key_RTKH, value_RTKH) → [R, T, N, H]: decides what is attended to and what is kept."""


class Prefix(NamedTuple):
  """A text that all rows continue, padded on the right, read once for R/Q rows each."""

  cache: Layers  # of `Cache`, Q for R
  length_Q: jax.Array  # the same Q times


class Kind(NamedTuple):
  """What differs from layer to layer: of one inside the scan over layers, of all with a leading L outside."""

  rope: jax.Array  # [] int32: of `rotary.ropes_of`
  window: jax.Array  # [] int32, tokens
  which: jax.Array  # [] int32: of the windows that there are, ascending


def kinds_of_layers(config: ModelConfig) -> Kind:
  """The table of a config's layer kinds, [L, …]."""
  kinds, ropes, windows = config.layer_kinds, rotary.ropes_of(config), _windows(config)
  return Kind(
    jnp.array([ropes.index(kind.rope) for kind in kinds], jnp.int32),
    jnp.array([kind.window or _EVERYTHING for kind in kinds], jnp.int32),
    jnp.array([windows.index(kind.window) for kind in kinds], jnp.int32),
  )


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, offset: float = 0.0) -> jax.Array:
  """Root-mean-square normalisation over the dimensions that the scale has, in float32."""
  kernel, plain = (functools.partial(f, epsilon=epsilon, offset=offset) for f in (cpu.norm, _rms_norm))
  return cpu.either(cpu.normalises(x, scale), kernel, plain)(x, scale)


def _rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float, offset: float) -> jax.Array:
  wide, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
  wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + epsilon)
  return (wide * (scale.astype(jnp.float32) + offset)).astype(x.dtype)


def _norm(config: ModelConfig, layer: Params, name: str, x: jax.Array) -> jax.Array:
  """Normalised, in an architecture that has this norm."""
  return rms_norm(x, layer[name], config.norm_epsilon, config.norm_offset) if name in layer else x


def _onto(
  config: ModelConfig, layer: Params, norm: str, x_RTM: jax.Array, output: Callable[..., jax.Array]
) -> jax.Array:
  """With the output, which is normalised first in an architecture that has this norm."""
  return x_RTM + _norm(config, layer, norm, output()) if norm in layer else output(plus=x_RTM)


def _block(
  config: ModelConfig,
  layout: Layout,
  layer: Params,
  x_RTM: jax.Array,
  turn: Turn,
  attend: Attend,
) -> jax.Array:
  """One layer; `turn` gives queries and keys their positions."""
  with jax.named_scope("attention"):
    y_RTM = _norm(config, layer, "attention_norm", x_RTM)
    query_RTNH, key_RTKH, value_RTKH = linears(layer, ("query", "key", "value"), y_RTM)
    query_RTNH = rotary.rotate(_norm(config, layer, "query_norm", query_RTNH), turn)
    key_RTKH = rotary.rotate(_norm(config, layer, "key_norm", key_RTKH), turn)
    attended_RTNH = attend(query_RTNH, key_RTKH, value_RTKH)
    output = functools.partial(linear, layer, "output", attended_RTNH, inputs=2)
    x_RTM = _onto(config, layer, "attention_out_norm", x_RTM, output)
  with jax.named_scope("mlp"):
    y_RTM = _norm(config, layer, "mlp_norm", x_RTM)
    output = functools.partial(feed_forward.feed_forward, config, layout, layer, y_RTM)
    x_RTM = _onto(config, layer, "mlp_out_norm", x_RTM, output)
  return layout.constrain(x_RTM, "rows", "tokens", None)


@jax.named_scope("embed")
def embed(config: ModelConfig, params: Params, tokens_RT: jax.Array, layout: Layout = LOCAL) -> jax.Array:
  """[R, T] → [R, T, M]. The table stays in parts: XLA would make it whole on every device, and its gradient too.

  Of a vocabulary that is split over devices each looks up its own words, and they are added up. Gradients of a word
  that one copy of the table has more than once are added up in float32.
  """
  table_VM = params["embed"]
  scale = jnp.asarray(config.embed_scale, table_VM.dtype)

  def look_up(part_VM: jax.Array, tokens: jax.Array) -> jax.Array:
    if not layout.vocab:
      return _rows(part_VM, tokens)
    first = jax.lax.axis_index(layout.vocab) * len(part_VM)
    here = (tokens >= first) & (tokens < first + len(part_VM))
    return jax.lax.psum(jnp.where(here[..., None], _rows(part_VM, jnp.where(here, tokens - first, 0)), 0), layout.vocab)

  on_device = lambda part_VM, tokens_RT: layout.of_all_width(functools.partial(look_up, part_VM), tokens_RT)
  of_table, by_tokens = layout.spec(("vocab", "width")), layout.spec(("rows", "tokens"))
  return layout.local(on_device, (of_table, by_tokens), by_tokens)(table_VM, tokens_RT) * scale


@jax.custom_vjp
def _rows(table_VM: jax.Array, row_RT: jax.Array) -> jax.Array:
  plain = lambda table_VM, row_RT: table_VM[row_RT]
  if table_VM.dtype.itemsize >= 4:
    return plain(table_VM, row_RT)
  # Else XLA would widen all of the table before a loop that looks something up. A barrier of the table alone, without
  # the loop's rows, it could move out of the loop.
  behind = lambda *pair: plain(*jax.lax.optimization_barrier(pair))
  return jax.lax.platform_dependent(table_VM, row_RT, cpu=behind, default=plain)


def _rows_forward(table_VM: jax.Array, row_RT: jax.Array) -> tuple[jax.Array, Any]:
  return _rows(table_VM, row_RT), (table_VM, row_RT)


def _rows_backward(kept: Any, slope_RTM: jax.Array) -> tuple[jax.Array, None]:
  table_VM, row_RT = kept
  sums_VM = jnp.zeros(table_VM.shape, jnp.float32).at[row_RT].add(slope_RTM.astype(jnp.float32))
  return sums_VM.astype(table_VM.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def forward(
  config: ModelConfig,
  params: Params,
  tokens_RT: jax.Array,
  *,
  dtype: Any = jnp.float32,
  layout: Layout = LOCAL,
  remat: str = "none",
  kernel: str = "auto",
  prefix: Prefix | None = None,
  place_RT: jax.Array | None = None,
  segment_RT: jax.Array | None = None,
  fork: Fork | None = None,
) -> tuple[jax.Array, Layers]:
  """Rows, padded on the right → normalised hidden states [R, T, M] and keys and values: `Layers` of `Kept`.

  A caller that drops those does not pay for them.

  Args:
    prefix: a text that every row continues.
    remat: what the backward pass computes again: "none", the whole of each "layer", or all but the matrix "products"
      and what attention gave.
    kernel: an implementation of `attention.causal`.
    place_RT: int32, of each token in its text behind the prefix; None is 0, 1, 2, …
    segment_RT: int32; a token sees only its own segment of a packed row.
    fork: how the rows are made up, where each is a prompt and several completions; `place_RT` is then its `place_PX`.

  Raises:
    ValueError: a fork of rows that have a prefix or are packed.
  """
  if fork and (prefix or segment_RT is not None):
    raise ValueError("rows that fork have no prefix and are not packed")
  axes = _axes_of_layer(config, params["layers"])
  params = {**cast({**params, "layers": ()}, dtype), "layers": _cast_split(layout, axes, params["layers"], dtype)}
  x_RTM = layout.constrain(embed(config, params, tokens_RT, layout), "rows", "tokens", None)
  by_row = "rows" if place_RT is not None or prefix else None  # else all rows turn alike
  place_RT = jnp.arange(tokens_RT.shape[1])[None] if place_RT is None else place_RT
  if prefix:
    place_RT = place_RT + jnp.repeat(prefix.length_Q, len(tokens_RT) // len(prefix.length_Q))[:, None]
  turns = rotary.turns_of_ropes(config, place_RT)
  place_RT = jnp.broadcast_to(place_RT, tokens_RT.shape)
  on_device = functools.partial(_layer_on_device, config, layout, kernel, axes)
  split = layout.by_hand.spec
  by_tokens, by_rows, of_layer = (
    split(("rows", "tokens")),
    split(("rows",)),
    jax.tree.map(split, axes, is_leaf=_is_axes),
  )
  given = (of_layer, by_tokens, split((by_row, "tokens")), jax.P(), by_rows, by_rows, by_tokens, by_tokens, by_rows)
  on_devices = layout.by_hand.local(on_device, given, (by_tokens, by_tokens))

  def layer_step(x_RTM: jax.Array, inputs: Any) -> tuple[jax.Array, Kept]:
    layer, kind, before = inputs
    length_Q = prefix and prefix.length_Q
    return on_devices(layer, x_RTM, _turn(turns, kind), kind, before, length_Q, place_RT, segment_RT, fork)

  step = layer_step if remat == "none" else jax.checkpoint(layer_step, policy=_KEPT[remat])
  x_RTM, kept = _over_layers(config, step, x_RTM, params["layers"], prefix and prefix.cache)
  return rms_norm(x_RTM, params["final_norm"], config.norm_epsilon, config.norm_offset), kept


def _layer_on_device(
  config: ModelConfig,
  layout: Layout,
  kernel: str,
  axes: Any,
  layer: Params,
  x_RTM: jax.Array,
  turn: Turn,
  kind: Kind,
  before: Cache | None,
  length_Q: jax.Array | None,
  place_RT: jax.Array,
  segment_RT: jax.Array | None,
  fork: Fork | None,
) -> tuple[jax.Array, Kept]:
  """One layer of a device's part of the tokens: what is split by width is gathered, and its gradient scattered.

  Args:
    axes: of `_axes_of_layer`.
    before: the layer's cache of a prefix, of `length_Q` tokens.
  """
  kept: list[jax.Array] = []

  def attend(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array) -> jax.Array:
    kept.extend((key_RTKH, value_RTKH))
    if before is None or length_Q is None:
      return _attend_rows(config, kernel, layout, kind.which, query_RTNH, key_RTKH, value_RTKH, segment_RT, fork)
    there_QgTS = (jnp.arange(before.key_RKHS.shape[3]) < length_Q[:, None])[:, None, None]
    shared, rule = attention.Segment(before.key_RKHS, before.value_RKSH, there_QgTS), attention_rules(config)[0]
    return attention.continued(
      query_RTNH, key_RTKH, value_RTKH, shared, place_RT, rule, kind.window, segment_RT=segment_RT
    )

  whole = cast(jax.tree.map(lambda axes, x: layout.gather_width(x, axes), axes, layer, is_leaf=_is_axes), x_RTM.dtype)
  return _block(config, layout.by_compiler, whole, x_RTM, turn, attend), Kept(*kept)


def _axes_of_layer(config: ModelConfig, layers: Layers) -> Any:
  """The logical axes of what one layer has: tuples in the structure of its parameters, whatever their form."""

  def axes(spec: ParamSpec, matrix: Any) -> Any:
    of_plain: Any = spec.axes[1:]
    inputs = spec.stacked - 1 + (spec.inputs or 0)
    before, outputs = of_plain[:inputs], of_plain[inputs:]
    if isinstance(matrix, Adapted):
      return Adapted(axes(spec, matrix.weight), (*before, None), (None, *outputs))  # type: ignore[arg-type]
    if isinstance(matrix, Transposed):
      return Transposed((*outputs, *before))  # type: ignore[arg-type]
    return Int8(of_plain, (*(None,) * inputs, *outputs)) if isinstance(matrix, Int8) else of_plain  # type: ignore[arg-type]

  specs, layer = param_specs(config)["layers"], layers[0] if one_by_one(layers) else layers
  return {name: axes(specs[name], matrix) for name, matrix in layer.items()}


def _cast_split(layout: Layout, axes: Any, layers: Layers, dtype: Any) -> Layers:
  """What is split by width in the compute dtype, to be gathered so.

  The rest is cast where it computes: the gradients of what is whole on every device are added up, and sent, in the
  dtype of the weights, and a pass writes no second copy of all layers. Layers one by one are in the compute dtype
  already.
  """
  if one_by_one(layers) or not layout.splits_width:
    return layers
  is_int8 = lambda x: isinstance(x, Int8)
  one = lambda x, axes: x.astype(dtype) if not is_int8(x) and "width" in axes else x
  return jax.tree.map(one, layers, axes, is_leaf=is_int8)


def _is_axes(x: Any) -> bool:
  return type(x) is tuple


def _over_layers(
  config: ModelConfig, step: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, layers: Layers, more: Any
) -> tuple[jax.Array, Layers]:
  """`step(x, (layer, kind, more))` of one layer after the other; what each gives, together."""
  kinds = kinds_of_layers(config)
  if not one_by_one(layers):
    return jax.lax.scan(step, x, (layers, kinds, more))
  given, once = [], traced_once(step)
  for layer, kind, part in zip(layers, apart(kinds), more or [None] * len(layers)):
    x, kept = once(x, (layer, kind, part))
    given.append(kept)
  return x, tuple(given)


def _attend_rows(
  config: ModelConfig,
  kernel: str,
  layout: Layout,
  which: jax.Array,
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  segment_RT: jax.Array | None,
  fork: Fork | None,
) -> jax.Array:
  """Causal attention in this layer's window; kernels know windows only before they are compiled."""
  query_key_value = [layout.gather_tokens(x) for x in (query_RTNH, key_RTKH, value_RTKH)]
  if fork:
    query_key_value = [fork.whole_rows(x) for x in query_key_value]
  heads = layout.by_compiler
  attend = functools.partial(attention.causal, implementation=kernel, layout=heads, segment_RT=segment_RT)
  branches = [functools.partial(attend, rule=rule) for rule in attention_rules(config)]
  read = jax.lax.switch(which, branches, *query_key_value) if len(branches) > 1 else branches[0](*query_key_value)
  return layout.scatter_tokens(fork.one_row(read) if fork else read)


def _windows(config: ModelConfig) -> list[int]:
  return sorted({kind.window for kind in config.layer_kinds})


def _turn(turns: Turn, kind: Kind) -> Turn:
  """This layer's."""
  return jax.tree.map(lambda x: x[kind.rope], turns)


def attention_rules(config: ModelConfig) -> list[attention.Rule]:
  """What attention computes in the layers, a rule for each of their windows."""
  scale = config.query_scale or config.head_size**-0.5
  return [attention.Rule(scale, config.attention_softcap, window) for window in _windows(config)]


def decode(
  config: ModelConfig,
  params: Params,
  token_R: jax.Array,
  place_R: jax.Array,
  pools: Sequence[tuple[Layers, attention.Index]],
  *,
  layout: Layout = LOCAL,
  kernel: str = "auto",
) -> tuple[jax.Array, Layers]:
  """One token a row → hidden states [R, M], and the token's keys and values: `Layers` of `Kept`.

  Nothing is written here: see `write`. Parameters are already in the compute dtype.

  Args:
    place_R: int32, the token's.
    pools: of `caches.empty_pool`'s form, and who reads their pages. Each part of the rows has its own pages.
    kernel: of `attention.causal`; by any but "xla", pages are read by the platform's own kernels if there are any.
  """
  paged = flash_decoding.paged if _by_kernels(config, kernel) else attention.paged
  x_RTM = layout.constrain(embed(config, params, token_R[:, None], layout), "rows", "tokens", None)
  turns = rotary.turns_of_ropes(config, place_R[:, None])
  rule, indices = attention_rules(config)[0], [index for _, index in pools]  # the window is the layer's
  rows, heads = layout.spec(("rows",)), layout.spec(("rows", "heads"))

  def read(query: Any, key: Any, value: Any, place: Any, pools: Any, indices: Any, window: Any) -> jax.Array:
    pools = [attention.Pool(cache.key_RKHS, cache.value_RKSH, index) for cache, index in zip(pools, indices)]
    return paged(query, key, value, place, pools, rule, window)

  read = layout.local(read, (heads, heads, heads, rows, heads, rows, jax.P()), heads)

  def layer_step(x_RTM: jax.Array, inputs: Any) -> tuple[jax.Array, Kept]:
    layer, kind, of_layer = inputs
    kept: list[jax.Array] = []

    def attend(query_R1NH: jax.Array, key_R1KH: jax.Array, value_R1KH: jax.Array) -> jax.Array:
      kept.extend((key_R1KH, value_R1KH))
      new = (query_R1NH[:, 0], key_R1KH[:, 0], value_R1KH[:, 0])
      return read(*new, place_R, of_layer, indices, kind.window)[:, None]

    return _block(config, layout, layer, x_RTM, _turn(turns, kind), attend), Kept(*kept)

  of_all = tuple(cache for cache, _ in pools)
  by_layer = tuple(zip(*of_all)) if one_by_one(params["layers"]) else of_all
  x_RTM, new = _over_layers(config, layer_step, x_RTM, params["layers"], by_layer)
  return rms_norm(x_RTM[:, 0], params["final_norm"], config.norm_epsilon, config.norm_offset), new


def write(
  config: ModelConfig,
  pool: Layers,
  new: Layers,
  page_R: jax.Array,
  slot_R: jax.Array,
  *,
  layout: Layout = LOCAL,
  kernel: str = "auto",
) -> Layers:
  """`caches.write`, by the platform's own kernel if there is one: the pool with what `decode` gave of each row's token.

  Args:
    page_R: int32; a page there is none of is written nowhere.
    slot_R: int32, in the page.
    kernel: as in `decode`.
  """
  if not (_by_kernels(config, kernel) and one_by_one(pool)):
    return caches.write(pool, new, page_R, slot_R, layout)
  rows, heads, as_kept = (layout.spec(axes) for axes in (("rows",), ("rows", "heads"), ("rows", None, "heads")))
  with jax.named_scope("write"):
    return layout.local(flash_decoding.write, (heads, as_kept, rows, rows), heads)(pool, new, page_R, slot_R)


def _by_kernels(config: ModelConfig, kernel: str) -> bool:
  return kernels.by_pages(kernel, jax.default_backend(), config.head_size)


def head(params: Params) -> jax.Array:
  """What gives the logits, [V, M]."""
  return params["head"] if "head" in params else params["embed"]


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
  """[..., M] → float32 [..., V]."""
  head_VM = head(params).astype(hidden.dtype)
  with jax.named_scope("head"):
    logits_XV = multiply(hidden.reshape(-1, hidden.shape[-1]), head_VM, 1, jnp.float32)
    return attention.softcap(logits_XV.reshape(*hidden.shape[:-1], len(head_VM)), config.logit_softcap)

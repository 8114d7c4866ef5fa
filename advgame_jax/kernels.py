"""Causal attention by the vendors' kernels, what each of them cannot do, and where pages have kernels of their own.

The kernels compute what `blockwise.causal` does; `resolve` says which of them a setting means on a platform.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from advgame_jax.blockwise import ATTENDED, Rule
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import UserError

Implementation = Literal["auto", "xla", "cudnn", "splash"]
_LANES = 128  # splash reads keys in multiples of these


def resolve(
  implementation: str, rule: Rule, platform: str, *, head_size: int, dtype: Any = jnp.bfloat16, packed: bool = False
) -> str:
  """The implementation that will run; "auto" takes the platform's kernel where it can do what is asked, else "xla".

  Args:
    platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` says it.
    packed: rows hold several segments.

  Raises:
    UserError: a kernel is asked for by name that cannot do it, or there is none of this name.
  """
  obstacles = {
    "splash": "" if platform == "tpu" else f"runs on tpu, not on {platform}",
    "cudnn": _cudnn_obstacle(rule, platform, head_size, dtype, packed),
    "xla": "",
  }
  if implementation == "auto":
    return next(name for name, obstacle in obstacles.items() if not obstacle)
  if implementation not in obstacles:
    raise UserError(f"attention is {implementation!r}; allowed: one of 'auto', 'xla', 'cudnn', 'splash'")
  if obstacles[implementation]:
    raise UserError(f"attention {implementation!r} {obstacles[implementation]}; 'auto' and 'xla' would work")
  return implementation


def by_pages(implementation: str, platform: str, head_size: int) -> bool:
  """Whether pages are read and written by `flash_decoding`, and not by XLA alone: heads must be powers of two."""
  return implementation != "xla" and platform == "gpu" and head_size >= 16 and head_size & (head_size - 1) == 0


def _cudnn_obstacle(rule: Rule, platform: str, head_size: int, dtype: Any, packed: bool) -> str:
  if platform != "gpu":
    return f"runs on gpu, not on {platform}"
  if rule.softcap:
    return f"has no softcap, here {rule.softcap:g}"
  if packed:
    return "has no packed rows"
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"computes in bfloat16 or float16, not in {jnp.dtype(dtype).name}"
  if head_size % 8 or head_size > 128:
    return f"takes head sizes of at most 128 that 8 divides, not {head_size}"
  return ""


def cudnn(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array, rule: Rule) -> jax.Array:
  """cuDNN's fused attention → [R, T, N, H]."""
  return jax.nn.dot_product_attention(
    query_RTNH,
    key_RTKH,
    value_RTKH,
    scale=rule.scale,
    is_causal=True,
    local_window_size=(rule.window - 1, 0) if rule.window else None,
    implementation="cudnn",
  )


def splash(
  query_RTNH: jax.Array,
  key_RTKH: jax.Array,
  value_RTKH: jax.Array,
  rule: Rule,
  segment_RT: jax.Array | None = None,
  *,
  layout: Layout = LOCAL,
  interpret: bool = False,
) -> jax.Array:
  """The splash kernel of TPUs → [R, T, N, H]; `interpret` runs it anywhere, slowly.

  A kernel is not split over devices by the compiler: a layout other than LOCAL needs the mesh of `jax.set_mesh`.
  """
  T = query_RTNH.shape[1]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % _LANES), *((0, 0),) * (x.ndim - 2)))
  scaled_RTNH = (query_RTNH.astype(jnp.float32) * rule.scale).astype(query_RTNH.dtype)
  heads_axes, rows_axes = layout.spec(("rows", None, "heads")), layout.spec(("rows",))
  parts = [pad(x) for x in (scaled_RTNH, key_RTKH, value_RTKH)]
  axes = [heads_axes] * 3
  if segment_RT is not None:
    parts, axes = [*parts, pad(segment_RT)], [*axes, rows_axes]
  run = layout.local(lambda *parts: _splash_rows(rule, interpret, *parts), tuple(axes), heads_axes)
  return run(*parts)[:, :T]


def _splash_rows(
  rule: Rule, interpret: bool, query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array, *segment_RT: jax.Array
) -> jax.Array:
  # Here, because it takes a second and a half that only TPUs get anything for.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  _, T, N, _ = query_RTNH.shape
  mask = splash_mask.LocalMask((T, T), (rule.window - 1, 0), 0) if rule.window else splash_mask.CausalMask((T, T))
  block = next(size for size in (4 * _LANES, 2 * _LANES, _LANES) if T % size == 0)
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  sizes: dict[str, Any] = dict.fromkeys(names, block)
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * N),
    block_sizes=splash_kernel.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=rule.softcap or None,
    residual_checkpoint_name=ATTENDED,
    interpret=interpret,
  )

  def row(query_NTH: jax.Array, key_KTH: jax.Array, value_KTH: jax.Array, *segment_T: jax.Array) -> jax.Array:
    segments = splash_kernel.SegmentIds(segment_T[0], segment_T[0]) if segment_T else None
    return kernel(query_NTH, key_KTH, value_KTH, segments)

  heads_first = (x.swapaxes(1, 2) for x in (query_RTNH, key_RTKH, value_RTKH))
  return jax.vmap(row)(*heads_first, *segment_RT).swapaxes(1, 2)

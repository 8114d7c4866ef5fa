"""The jitted programs of generation: `sampler`, for a model on a mesh and the sizes of its pages and chunks."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from advgame_jax import caches, sampler, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.layers import Layers
from advgame_jax.sampler import Member, Rows
from advgame_jax.sharding import Layout

_GRAPHS = "xla_gpu_enable_command_buffer"
# XLA's default of JAX 0.10 to 0.12 for one device, and loops.
_RECORDED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


class Programs(NamedTuple):
  """What runs on the device, jitted, every output where the others expect it; or where those outputs are."""

  blank_rows: Callable[..., Rows]  # (R, static)
  blank_pools: Callable[..., tuple[Layers, ...]]  # (P, static)
  read: Callable[..., Any]  # of all members: (params, tokens_XT, place_XT, segment_XT, last_Q, prefixes)
  start: Callable[..., Any]  # as `sampler.start`; rows and pools are donated
  advance: Callable[..., Any]  # (params, prefixes, prompts, own, share, rows, …): own pools and rows are donated
  resize_stack: Callable[..., jax.Array]  # as `sampler.resize`, of all layers
  resize_layer: Callable[..., jax.Array]  # of one
  gather: Callable[..., Rows]  # as `sampler.gather`
  by_rows: Callable[[Any], Any]  # what the host has of the rows, a tree of arrays
  whole: Callable[[Any], Any]  # what every device has, likewise
  free: Callable[[jax.Array], None]  # what nobody needs any more


def cache_dtype(mesh: Mesh, dtype: Any) -> Any:
  """What pools keep keys and values in, unless in eight bits.

  By JAX before 0.11 that is float32 on CPUs, where XLA would widen all of a bfloat16 pool to write a token into it.
  """
  widens = mesh.devices.flat[0].platform == "cpu" and jax.__version_info__ < (0, 11)
  return np.dtype(np.float32 if widens else dtype)


def graph_options(platform: str, devices: int) -> dict[str, str]:
  """The compiler's, by which a loop on one GPU is one CUDA graph; else the card asks the host after every turn whether
  there is another.

  None where XLA_FLAGS, which XLA reads once, says what graphs hold; by a JAX whose default is not known, which a later
  one may refuse; and on several devices, whose collectives XLA puts into no graph.
  """
  ours = platform == "gpu" and devices == 1 and _GRAPHS not in os.environ.get("XLA_FLAGS", "")
  return {_GRAPHS: _RECORDED} if ours and (0, 10) <= jax.__version_info__ < (0, 13) else {}


@functools.lru_cache(maxsize=16)  # more than a run has; a process of many runs frees those of the first
def compiled(
  config: ModelConfig,
  mesh: Mesh,
  layout: Layout,
  dtype: Any,
  attention: str,
  page: int,
  steps: int,
  int8: bool,
  stacked: tuple[bool, ...],
) -> tuple[Programs, Programs]:
  """The programs, which players of one architecture share, and where their outputs are. `int8`: what pools hold."""
  rows = sharding.rows_sharding(mesh, layout)
  pools, kept = (tuple(by(mesh, layout, each) for each in stacked) for by in (_by_pages, _as_kept))

  def blank_rows(R: int) -> Rows:
    hidden_RM = tuple(jnp.zeros((R, config.width), dtype) for _ in stacked)
    place_R, count_R, limit_R, stop_state_R = (jnp.zeros(R, jnp.int32) for _ in range(4))
    key_R, live_R = jax.random.split(jax.random.key(0), R), jnp.zeros(R, bool)
    return Rows(hidden_RM, key_R, place_R, count_R, limit_R, stop_state_R, live_R)

  def blank_pools(pages: int) -> tuple[Layers, ...]:
    return tuple(caches.empty_pool(config, each, pages, page, cache_dtype(mesh, dtype), int8) for each in stacked)

  @jax.named_scope("generate")
  def read(params: Any, tokens_XT: Any, place_XT: Any, segment_XT: Any, last_Q: Any, prefixes: Any) -> Any:
    arrays = (tokens_XT, place_XT, segment_XT, last_Q)
    one = lambda params, prefix: sampler.read(config, params, *arrays, prefix, layout=layout, kernel=attention)
    return tuple(zip(*map(one, params, prefixes)))

  @jax.named_scope("generate")
  def start(*args: Any) -> Any:
    return sampler.start(*args, layout=layout)

  @jax.named_scope("generate")
  def advance(params: Any, prefixes: Any, prompts: Any, own: Any, *others: Any) -> Any:
    members = list(map(Member, params, prefixes, prompts, own))
    return sampler.advance(config, members, *others, steps=steps, layout=layout, kernel=attention)

  resize = functools.partial(sampler.resize, layout=layout)
  whole = sharding.replicated(mesh)
  stack, layer = (_by_pages(mesh, layout, each) for each in (True, False))
  advanced, by_graph = (rows, pools, whole), graph_options(mesh.devices.flat[0].platform, mesh.size)
  where = Programs(rows, pools, (rows, kept), (rows, pools), advanced, stack, layer, rows, rows, whole, None)  # type: ignore[arg-type]
  jitted = Programs(
    blank_rows=jax.jit(blank_rows, static_argnums=0, out_shardings=where.blank_rows),
    blank_pools=jax.jit(blank_pools, static_argnums=0, out_shardings=where.blank_pools),
    read=jax.jit(read, out_shardings=where.read),
    start=jax.jit(start, donate_argnums=(0, 1), out_shardings=where.start),
    advance=jax.jit(advance, donate_argnums=(3, 5), out_shardings=where.advance, compiler_options=by_graph),
    resize_stack=jax.jit(jax.vmap(resize, (0, None)), out_shardings=stack),
    resize_layer=jax.jit(resize, out_shardings=layer),
    gather=jax.jit(functools.partial(sampler.gather, layout=layout), out_shardings=where.gather),
    by_rows=lambda x: sharding.to_global(x, rows),
    whole=lambda x: sharding.to_global(x, whole),
    free=lambda x: x.delete(),
  )
  return jitted, where


def dry(programs: Programs, where: Any, lowered: dict[str, list[Any]]) -> Programs:
  """Programs that run nothing: a call of new shapes is lowered, under its name, and gives the shapes of its result."""
  place = lambda where, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  def run_dry(name: str) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def call(*args: Any) -> Any:
      leaves, tree = jax.tree.flatten(args)
      shapes = (tree, *(getattr(x, "sharding", None) for x in leaves), *map(_abstract, leaves))
      if shapes not in known:
        program = getattr(programs, name).lower(*args)
        lowered.setdefault(name, []).append(program)
        placed = lambda where, part: jax.tree.map(functools.partial(place, where), part)
        known[shapes] = jax.tree.map(placed, getattr(where, name), program.out_info)
      return known[shapes]

    return call

  run: dict[str, Any] = {name: run_dry(name) for name in Programs._fields if hasattr(getattr(programs, name), "lower")}
  put = lambda where: lambda tree: jax.tree.map(functools.partial(place, where), tree)
  return Programs(**run, by_rows=put(where.by_rows), whole=put(where.whole), free=lambda x: None)


def _abstract(x: Any) -> Any:
  """A number as it is, of an array what a program knows of it."""
  return (x.shape, x.dtype) if hasattr(x, "shape") else x


def _by_pages(mesh: Mesh, layout: Layout, stacked: bool) -> NamedSharding:
  """Of pools."""
  return NamedSharding(mesh, layout.spec((None, "rows", "heads") if stacked else ("rows", "heads")))


def _as_kept(mesh: Mesh, layout: Layout, stacked: bool) -> NamedSharding:
  """Of what is kept of rows that were read."""
  return NamedSharding(mesh, layout.spec((None, "rows", None, "heads") if stacked else ("rows", None, "heads")))

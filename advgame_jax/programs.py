"""The jitted programs of generation: `sampler`, for a model on a mesh and the sizes of its pages and chunks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from advgame_jax import model, sampler, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.model import Layers
from advgame_jax.sampler import Member, Rows
from advgame_jax.sharding import Layout


class Programs(NamedTuple):
  """What runs on the device, jitted, every output where the others expect it; or where those outputs are."""

  blank_rows: Callable[..., Rows]  # (R, static)
  blank_pools: Callable[..., tuple[Layers, ...]]  # (P, static)
  read: Callable[..., Any]  # of all members: (params, tokens_XT, place_XT, segment_XT, last_Q, prefixes)
  start: Callable[..., Any]  # as `sampler.start`; rows and pools are donated
  advance: Callable[..., Any]  # (params, prefixes, prompts, own, share, rows, …): own pools and rows are donated
  resize: Callable[..., Any]  # (pools, page_P)
  gather: Callable[..., Rows]  # as `sampler.gather`
  by_rows: Callable[[np.ndarray], jax.Array]  # what the host has of this process's rows
  whole: Callable[[np.ndarray], jax.Array]  # what every device has


@functools.lru_cache(maxsize=16)  # more than a run has; a process of many runs frees those of the first
def compiled(
  config: ModelConfig,
  mesh: Mesh,
  layout: Layout,
  dtype: Any,
  attention: str,
  page: int,
  steps: int,
  stacked: tuple[bool, ...],
) -> tuple[Programs, Programs]:
  """The programs, which players of one architecture share, and where their outputs are."""
  rows = sharding.rows_sharding(mesh, layout)
  pools = tuple(_by_pages(mesh, layout, each) for each in stacked)

  def blank_rows(R: int) -> Rows:
    hidden_RM = tuple(jnp.zeros((R, config.width), dtype) for _ in stacked)
    place_R, count_R, limit_R, stop_state_R = (jnp.zeros(R, jnp.int32) for _ in range(4))
    key_R, live_R = jax.random.split(jax.random.key(0), R), jnp.zeros(R, bool)
    return Rows(hidden_RM, key_R, place_R, count_R, limit_R, stop_state_R, live_R)

  def blank_pools(pages: int) -> tuple[Layers, ...]:
    return tuple(model.empty_pool(config, each, pages, page, dtype) for each in stacked)

  def read(params: Any, tokens_XT: Any, place_XT: Any, segment_XT: Any, last_Q: Any, prefixes: Any) -> Any:
    arrays = (tokens_XT, place_XT, segment_XT, last_Q)
    one = lambda params, prefix: sampler.read(config, params, *arrays, prefix, layout=layout, kernel=attention)
    return tuple(zip(*map(one, params, prefixes)))

  def advance(params: Any, prefixes: Any, prompts: Any, own: Any, *others: Any) -> Any:
    members = list(map(Member, params, prefixes, prompts, own))
    return sampler.advance(config, members, *others, steps=steps, layout=layout)

  resize = lambda pools, page_P: tuple(sampler.resize(pool, page_P, layout) for pool in pools)
  start = functools.partial(sampler.start, layout=layout)
  whole = sharding.replicated(mesh)
  where = Programs(rows, pools, (rows, pools), (rows, pools), (rows, pools, rows), pools, rows, rows, whole)  # type: ignore[arg-type]
  jitted = Programs(
    blank_rows=jax.jit(blank_rows, static_argnums=0, out_shardings=where.blank_rows),
    blank_pools=jax.jit(blank_pools, static_argnums=0, out_shardings=where.blank_pools),
    read=jax.jit(read, out_shardings=where.read),
    start=jax.jit(start, donate_argnums=(0, 1), out_shardings=where.start),
    advance=jax.jit(advance, donate_argnums=(3, 5), out_shardings=where.advance),
    resize=jax.jit(resize, out_shardings=where.resize),
    gather=jax.jit(functools.partial(sampler.gather, layout=layout), out_shardings=where.gather),
    by_rows=lambda x: sharding.to_global(x, rows),
    whole=lambda x: jax.device_put(x, whole),
  )
  return jitted, where


def dry(programs: Any, where: Any, lowered: list[Any]) -> Programs:
  """Programs that run nothing: each call is lowered, and gives the shapes of what it would give."""
  place = lambda where, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  def run_dry(program: Any, where: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      lowered.append(program.lower(*args))
      outputs = lowered[-1].out_info
      return jax.tree.map(lambda where, part: jax.tree.map(functools.partial(place, where), part), where, outputs)

    return call

  *run, _, _ = map(run_dry, programs, where)
  return Programs(*run, *(functools.partial(place, each) for each in (where.by_rows, where.whole)))


def _by_pages(mesh: Mesh, layout: Layout, stacked: bool) -> NamedSharding:
  """Of pools and caches."""
  return NamedSharding(mesh, layout.spec((None, "rows", "heads") if stacked else ("rows", "heads")))

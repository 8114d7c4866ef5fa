"""Generation: loads of any size through programs of a few shapes.

Prompts wait in a queue; as many as find slots and pages are read, packed into rows of a few lengths, and their rows
draw some tokens at a time. Finished rows leave, and others take their slots and pages. Every shape that the device sees
is of a short list, so that nothing compiles on the way.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from advgame_jax import config as config_lib
from advgame_jax import kernels, model, sampler, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.attention import Index
from advgame_jax.model import Layers, Prefix
from advgame_jax.sampler import Arrival, Chunk, Member, Rows
from advgame_jax.scoring import Choice, Generator
from advgame_jax.sharding import Layout
from advgame_jax.slots import Part, Prompt, Shapes

_NONE = 2**30  # a slot or a page that there is none of
_ROWS = (0.25, 0.5, 0.75, 1.0)  # lengths of packed rows, of the longest


class Drawn(NamedTuple):
  """What was drawn for R = Q·G rows, on the host; prompt q's samples are rows q·G … q·G + G − 1."""

  tokens_RT: np.ndarray  # int32, 0 after the row's end
  length_R: np.ndarray  # int32, the stop token included
  stopped_R: np.ndarray  # bool: a stop was met within the limit
  behaviour_logprob_RT: np.ndarray  # float32, nats, 0 after the row's end
  plain_logprob_RT: np.ndarray  # likewise


def drawn_by_nobody(rows: int, tokens: int) -> Drawn:
  """Nothing, of so many rows of at most so many tokens."""
  zeros_RT = lambda dtype: np.zeros((rows, tokens), dtype)
  length_R, stopped_R = np.zeros(rows, np.int32), np.zeros(rows, bool)
  return Drawn(zeros_RT(np.int32), length_R, stopped_R, zeros_RT(np.float32), zeros_RT(np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """A model's generation on a mesh, compiled once for each of its shapes."""

  model: ModelConfig
  sampling: config_lib.Sampling
  mesh: Mesh
  layout: Layout
  dtype: Any
  attention: str
  stops_ZV: np.ndarray  # of `sampler.stop_table`

  def shapes(self, prompts: int, group: int, prefix: bool) -> Shapes:
    """For a load of so many prompts of this process with G rows each."""
    settings, parts = self.sampling, self._parts
    lanes = max(1, -(-(settings.slots or prompts * group) // (group * parts)))
    longest, budget = settings.prompt_buckets[-1], settings.prefill_tokens
    rules = model.attention_rules(self.model)
    how = {"head_size": self.model.head_size, "dtype": self.dtype}
    platform = jax.default_backend()
    chosen = [kernels.resolve(self.attention, rule, platform, **how) for rule in rules]
    packed = prefix or "cudnn" not in chosen
    if packed:
      widths = {max(16, math.ceil(part * max(longest, budget) / 16) * 16) for part in _ROWS}
      rows = [(1, width) for width in sorted(widths)]
    else:
      rows = [(max(1, budget // width), width) for width in settings.prompt_buckets]
    pages = lambda tokens: -(-tokens // settings.page)
    return Shapes(
      group, lanes * group, settings.page, pages(longest), pages(settings.max_new_tokens), tuple(rows), packed
    )

  def generate(
    self,
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    fold_Q: np.ndarray,
    group: int,
    key: jax.Array,
    prefixes: Sequence[Prefix] = (),
    limit_Q: np.ndarray | None = None,
  ) -> Drawn:
    """G samples for each prompt. Consumes `key`.

    Args:
      prompts: token ids, none longer than the largest bucket; of an empty one nothing is drawn.
      fold_Q: uint32, what a prompt's keys are folded from, before its samples' numbers.
      prefixes: of each member, what every prompt continues; or none.
      limit_Q: tokens to draw at most; None is `max_new_tokens` of each.
    """
    programs, _ = self.programs(generator)
    before = int(np.asarray(prefixes[0].length_Q)[0]) if prefixes else 0
    with jax.set_mesh(self.mesh):
      return _Generation(self, programs, generator, prompts, fold_Q, group, key, prefixes, before, limit_Q).run()

  def warm_up(self, generator: Generator, prompts: int, group: int, prefixes: Sequence[Prefix] = ()) -> None:
    """Compiles every shape that a load of so many prompts can take, several at a time. Nothing runs."""
    lowered, _ = self.lower(generator, prompts, group, prefixes)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
      list(threads.map(lambda program: program.compile(), lowered))

  def lower(
    self, generator: Generator, prompts: int, group: int, prefixes: Sequence[Prefix] = ()
  ) -> tuple[list[Any], Any]:
    """Every program in every shape that a load of so many prompts can take; and what is kept between them at most.

    Weights and prefixes may be abstract.
    """
    lowered: list[Any] = []
    nothing: list[list[int]] = [[]] * prompts
    load = (nothing, np.zeros(prompts, np.uint32), group, jax.random.key(0), prefixes, 0, None)
    with jax.set_mesh(self.mesh):
      generation = _Generation(self, _dry(*self.programs(generator), lowered), generator, *load)
      generation.try_all()
    return lowered, (generation.rows, generation.prompts, generation.own)

  @property
  def choice(self) -> Choice:
    """How a token is chosen."""
    return Choice(self.sampling.temperature, self.sampling.top_p, self.sampling.top_k, self.sampling.min_p)

  @functools.cached_property
  def _parts(self) -> int:
    return sharding.local_parts(self.mesh, self.layout)

  def programs(self, generator: Generator) -> "tuple[Programs, Programs]":
    """What runs for it, and where the outputs are."""
    stacked = tuple(not model.one_by_one(params["layers"]) for params in generator.members)
    page, steps = self.sampling.page, self.sampling.decode_chunk
    return _compiled(self.model, self.mesh, self.layout, self.dtype, self.attention, page, steps, stacked)


class Programs(NamedTuple):
  """What runs on the device, jitted, every output where the others expect it; or where those outputs are."""

  blank_rows: Callable[..., Rows]  # (R, static)
  blank_pools: Callable[..., tuple[Layers, ...]]  # (P, static)
  read: Callable[..., Any]  # of all members: (params, tokens_XT, place_XT, segment_XT, last_Q, prefixes)
  start: Callable[..., Any]  # as `sampler.start`; rows and pools are donated
  advance: Callable[..., Any]  # (params, prefixes, prompts, own, share, rows, …): own pools and rows are donated
  resize: Callable[..., Any]  # (pools, page_P)
  by_rows: Callable[[np.ndarray], jax.Array]  # what the host has of this process's rows
  whole: Callable[[np.ndarray], jax.Array]  # what every device has


@functools.lru_cache(maxsize=8)  # of a run's models there are fewer; programs of others are freed
def _compiled(
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
  where = Programs(rows, pools, (rows, pools), (rows, pools), (rows, pools, rows), pools, rows, whole)  # type: ignore[arg-type]
  jitted = Programs(
    blank_rows=jax.jit(blank_rows, static_argnums=0, out_shardings=where.blank_rows),
    blank_pools=jax.jit(blank_pools, static_argnums=0, out_shardings=where.blank_pools),
    read=jax.jit(read, out_shardings=where.read),
    start=jax.jit(start, donate_argnums=(0, 1), out_shardings=where.start),
    advance=jax.jit(advance, donate_argnums=(3, 5), out_shardings=where.advance),
    resize=jax.jit(resize, out_shardings=where.resize),
    by_rows=lambda x: sharding.to_global(x, rows),
    whole=lambda x: jax.device_put(x, whole),
  )
  return jitted, where


def _dry(programs: Any, where: Any, lowered: list[Any]) -> Programs:
  """Programs that run nothing: each call is lowered, and gives the shapes of what it would give."""
  place = lambda where, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  def dry(program: Any, where: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      lowered.append(program.lower(*args))
      outputs = lowered[-1].out_info
      return jax.tree.map(lambda where, part: jax.tree.map(functools.partial(place, where), part), where, outputs)

    return call

  *run, _, _ = map(dry, programs, where)
  return Programs(*run, *(functools.partial(place, each) for each in (where.by_rows, where.whole)))


def _by_pages(mesh: Mesh, layout: Layout, stacked: bool) -> NamedSharding:
  """Of pools and caches."""
  return NamedSharding(mesh, layout.spec((None, "rows", "heads") if stacked else ("rows", "heads")))


class _Generation:
  """One call of `Engine.generate`."""

  def __init__(
    self,
    engine: Engine,
    programs: Programs,
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    fold_Q: np.ndarray,
    group: int,
    key: jax.Array,
    prefixes: Sequence[Prefix],
    before: int,
    limit_Q: np.ndarray | None,
  ) -> None:
    self.engine, self.programs, self.generator, self.group, self.key = engine, programs, generator, group, key
    self.prefixes: tuple[Any, ...] = tuple(prefixes) or (None,) * len(generator.members)
    self.shapes = engine.shapes(len(prompts), group, bool(prefixes))
    self.before = before  # tokens of the prefix
    self.fold_Q, T = fold_Q, engine.sampling.max_new_tokens
    limit_Q = np.full(len(prompts), T) if limit_Q is None else np.minimum(limit_Q, T)
    waiting = (Prompt(number, ids, int(limit_Q[number])) for number, ids in enumerate(prompts) if len(ids))
    self.waiting = collections.deque(prompt for prompt in waiting if prompt.limit > 0)
    self.parts = [Part(self.shapes) for _ in range(engine._parts)]
    self.idle = 0  # slots × steps that stood empty since prompts were last read
    self.drawn = drawn_by_nobody(len(prompts) * group, T)
    self.choice = Choice(*map(np.float32, engine.choice))
    self.share = np.array(generator.share, np.float32)
    self.stops = programs.whole(engine.stops_ZV)
    self.prompt_pool, self.own_pool = self.shapes.prompt_pools[0], self.shapes.own_pools[0]
    self.prompts, self.own = (
      self.programs.blank_pools(pages * len(self.parts)) for pages in (self.prompt_pool, self.own_pool)
    )
    self.rows = self.programs.blank_rows(self.shapes.slots * len(self.parts))

  def run(self) -> Drawn:
    while self.waiting or self._live:
      self._admit()
      self._advance()
    return self.drawn

  def try_all(self) -> None:
    """Calls every program in every shape, with nobody in it."""
    shapes = self.shapes
    for pages in shapes.prompt_pools:
      self._resize_prompts(pages)
      for shape in shapes.rows:
        self._read([[] for _ in self.parts], shape)
      for own in shapes.own_pools:
        self._resize_own(own)
        self._run_chunk()
    for one, other in itertools.permutations(shapes.own_pools, 2):
      self._resize_own(one)
      self._resize_own(other)

  # Prompts arrive.

  def _admit(self) -> None:
    """Reads prompts as long as some find slots and reading them now is worth it."""
    while chosen := self._choose():
      lengths = [[len(prompt.ids) for prompt in prompts] for prompts in chosen]
      shape = self.shapes.fitting(lengths)
      assert shape is not None
      # Reading costs the whole shape: what of it would be empty is weighed against slots that stand empty.
      unused = shape[0] * shape[1] * len(self.parts) - sum(map(sum, lengths))
      if self._live and self.idle + self._step * sum(len(part.free) for part in self.parts) < unused:
        return
      self.idle = 0
      for part, prompts in zip(self.parts, chosen):
        for prompt in prompts:
          self.waiting.popleft()
          part.admit(prompt)
      self._resize_prompts(_least(self.shapes.prompt_pools, max(part.prompts.top for part in self.parts)))
      self._read(chosen, shape)

  def _choose(self) -> list[list[Prompt]]:
    """The next that wait, for the parts in turn, as many as find slots and can be read at once; [] if there is none."""
    chosen: list[list[Prompt]] = [[] for _ in self.parts]
    room = [len(part.free) // self.group for part in self.parts]
    pages = [self.shapes.prompt_pools[-1] - part.prompts.taken for part in self.parts]
    for prompt in self.waiting:
      part = int(np.argmax(room))
      lengths = [len(other.ids) for other in [*chosen[part], prompt]]
      pages[part] -= self.shapes.pages_of(len(prompt.ids))
      if not room[part] or pages[part] < 0 or self.shapes.fitting([lengths]) is None:
        break
      chosen[part].append(prompt)
      room[part] -= 1
    return chosen if any(chosen) else []

  def _read(self, chosen: list[list[Prompt]], shape: tuple[int, int]) -> None:
    """Reads the prompts of each part, which have their slots and pages, and starts their rows."""
    arrays = [self._lay_out(*each, shape) for each in zip(self.parts, chosen)]
    tokens, place, segment, last, *arrival = self._to_device(arrays)
    segments = segment if self.shapes.packed else None
    read = self.programs.read(self.generator.members, tokens, place, segments, last, self.prefixes)
    self.rows, self.prompts = self.programs.start(self.rows, self.prompts, *read, Arrival(*arrival), self.key)

  def _lay_out(self, part: Part, prompts: list[Prompt], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """A part's prompts as `sampler.read` and `Arrival` have them."""
    (X, T), shapes, S = shape, self.shapes, self.shapes.page
    zeros = lambda *shape: np.zeros(shape, np.int32)
    tokens_XT, place_XT, segment_XT = zeros(X, T), zeros(X, T), zeros(X, T)
    Q, n = shapes.lanes, X * T // S + min(shapes.lanes, X * T)
    last_Q, slot_QG, fold_Q = zeros(Q), zeros(Q, self.group) + _NONE, np.zeros(Q, np.uint32)
    length_Q, limit_Q, token_nS, page_n = zeros(Q), zeros(Q), zeros(n, S), zeros(n) + _NONE
    placed = shapes.pack([len(prompt.ids) for prompt in prompts], shape)
    assert placed is not None
    done = 0
    for q, (prompt, (row, start)) in enumerate(zip(prompts, placed)):
      length, count = len(prompt.ids), len(prompt.pages)
      tokens_XT[row, start : start + length] = prompt.ids
      place_XT[row, start : start + length] = np.arange(length)
      segment_XT[row, start : start + length] = q + 1
      first = row * T + start
      last_Q[q], slot_QG[q], fold_Q[q] = first + length - 1, part.slots_of(prompt), self.fold_Q[prompt.number]
      length_Q[q], limit_Q[q] = self.before + length, prompt.limit
      token_nS[done : done + count] = np.minimum(first + np.arange(count * S), X * T - 1).reshape(count, S)
      page_n[done : done + count] = prompt.pages
      done += count
    return tokens_XT, place_XT, segment_XT, last_Q, token_nS, page_n, slot_QG, fold_Q, length_Q, limit_Q

  # Rows draw.

  @property
  def _step(self) -> int:
    return self.engine.sampling.decode_chunk

  @property
  def _live(self) -> int:
    return sum(len(part.rows) for part in self.parts)

  def _advance(self) -> None:
    """Some tokens of every row; what is finished leaves."""
    for part in self.parts:
      part.provide(self._step)
    needed = _least(self.shapes.own_pools, max(part.own.top for part in self.parts))
    if not self.waiting:  # the last rows: their pages move together
      needed = min(needed, _least(self.shapes.own_pools, max(part.own.taken for part in self.parts)))
    self._resize_own(needed)
    self.idle += self._step * sum(len(part.free) for part in self.parts)
    chunk = sharding.to_host(self._run_chunk())
    for number, part in enumerate(self.parts):
      self._collect(part, number * self.shapes.slots, chunk)

  def _run_chunk(self) -> Chunk:
    before = self.before
    prompts = Index(*self._to_device([part.prompt_index(self.prompt_pool, before) for part in self.parts]))
    own = Index(*self._to_device([part.own_index(self.own_pool, before) for part in self.parts]))
    weights = (self.generator.members, self.prefixes, self.prompts, self.own)
    self.rows, self.own, chunk = self.programs.advance(
      *weights, self.share, self.rows, prompts, own, self.choice, self.stops
    )
    return chunk

  def _collect(self, part: Part, first: int, chunk: Chunk) -> None:
    """What a part's rows drew, which stands in the chunk from row `first` on."""
    drawn = self.drawn
    for slot, row in list(part.rows.items()):
      r, place, count = first + slot, row.prompt.number * self.group + row.sample, int(chunk.count_R[first + slot])
      new, columns = slice(row.count, count), count - row.count
      drawn.tokens_RT[place, new] = chunk.tokens_Rk[r, :columns]
      drawn.behaviour_logprob_RT[place, new] = chunk.behaviour_logprob_Rk[r, :columns]
      drawn.plain_logprob_RT[place, new] = chunk.plain_logprob_Rk[r, :columns]
      drawn.length_R[place] = row.count = count
      if not chunk.live_R[r]:
        drawn.stopped_R[place] = chunk.stopped_R[r]
        part.leave(slot)

  # Pools grow and shrink.

  def _resize_prompts(self, pages: int) -> None:
    """Prompts stay where they are: their pool only grows."""
    if pages > self.prompt_pool:
      same = np.minimum(np.arange(pages), self.prompt_pool - 1).astype(np.int32)
      (order,) = self._to_device([(same,) for _ in self.parts])
      self.prompts = self.programs.resize(self.prompts, order)
      self.prompt_pool = pages

  def _resize_own(self, pages: int) -> None:
    if pages == self.own_pool:
      return
    orders = [part.own.renumber([row.pages for row in part.rows.values()]) for part in self.parts]
    padded = [(np.pad(np.array(order, np.int32), (0, pages - len(order))),) for order in orders]
    (order,) = self._to_device(padded)
    self.own = self.programs.resize(self.own, order)
    self.own_pool = pages

  def _to_device(self, of_parts: Sequence[Any]) -> list[jax.Array]:
    return [self.programs.by_rows(np.concatenate(arrays)) for arrays in zip(*of_parts)]


def _least(sizes: Sequence[int], needed: int) -> int:
  return next(size for size in sizes if size >= needed)

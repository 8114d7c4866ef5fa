"""Generation: loads of any size through programs of a few shapes.

Prompts wait in a queue; as many as find slots and pages are read, packed into rows of a few lengths, and their rows
draw some tokens at a time. Finished rows leave, and others take their slots and pages, which may arrive while others
draw. Every shape that the device sees is of a short list, so that nothing compiles on the way.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from advgame_jax import architecture, kernels, model, programs, sharding
from advgame_jax import config as config_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.attention import Index
from advgame_jax.drawn import Drawn, Piece, collect, drawn_by_nobody, put
from advgame_jax.layers import one_by_one
from advgame_jax.model import Prefix
from advgame_jax.pools import Pools, padded
from advgame_jax.programs import Programs
from advgame_jax.sampler import Arrival, Chunk
from advgame_jax.scoring import Choice, Generator
from advgame_jax.sharding import Layout
from advgame_jax.slots import Part, Prompt, Row, Shapes
from advgame_jax.types import UserError

_NONE = 2**30  # a slot or a page that there is none of
_ROWS = (0.25, 0.5, 0.75, 1.0)  # of the longest packed row, or of the most rows of one prompt each
SMALL = 2**23  # bytes of weights and pages, up to which a smaller shape saves less than it takes to compile


class Flight(NamedTuple):
  """A chunk that the device draws, or has drawn, while the host has not looked at it."""

  chunk: Chunk
  rows: list[dict[int, Row]]  # of each part by their slots


class Load(NamedTuple):
  """What is to be drawn: G samples for each of Q prompts."""

  generator: Generator
  prompts: Sequence[Sequence[int]]  # token ids, none longer than the largest bucket; of an empty one nothing is drawn
  fold_Q: np.ndarray  # uint32, what a prompt's keys are folded from, before its samples' numbers
  group: int
  key: jax.Array  # consumed
  prefixes: tuple[Prefix, ...] = ()  # of each member, what every prompt continues; or none
  limit_Q: np.ndarray | None = None  # tokens to draw at most; None is `max_new_tokens` of each


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
    """For a load of so many prompts with G rows each."""
    settings, parts = self.sampling, self._parts
    lanes = max(1, -(-(settings.slots or prompts * group) // (group * parts)))
    longest, budget = settings.prompt_buckets[-1], settings.prefill_tokens
    pages_of = lambda tokens: -(-tokens // settings.page)
    prompt_pages, own_pages = pages_of(longest), pages_of(settings.max_new_tokens)
    weights = architecture.count_params(self.model) * np.dtype(self.dtype).itemsize
    varied = weights + lanes * (prompt_pages + group * own_pages) * self.page_bytes > SMALL
    row_parts = _ROWS if varied else (1.0,)
    rules = model.attention_rules(self.model)
    how = {"head_size": self.model.head_size, "dtype": self.dtype}
    platform = jax.default_backend()
    chosen = [kernels.resolve(self.attention, rule, platform, **how) for rule in rules]
    packed = prefix or "cudnn" not in chosen
    if packed:
      widths = {max(16, math.ceil(part * max(longest, budget) / 16) * 16) for part in row_parts}
      rows = [(1, width) for width in sorted(widths)]
    else:
      most = {width: max(1, budget // width) for width in settings.prompt_buckets}
      counts = {(math.ceil(part * count), width) for width, count in most.items() for part in row_parts}
      rows = sorted(counts, key=lambda shape: (math.prod(shape), shape))
    return Shapes(group, lanes * group, settings.page, prompt_pages, own_pages, tuple(rows), packed, varied)

  @property
  def page_bytes(self) -> float:
    """Of a page of one device: keys and values of all layers."""
    kept = programs.cache_dtype(self.mesh, self.dtype).itemsize
    number = 1 + 4 / self.model.head_size if self.sampling.cache == "int8" else kept
    tensor = sharding.shards(self.mesh, self.layout.heads)
    return 2 * self.model.layers * self.model.kv_heads * self.model.head_size * number * self.sampling.page / tensor

  def generate(self, load: Load) -> Drawn:
    """What the load asks for.

    Raises:
      UserError: a prompt is longer than the largest bucket.
      ValueError: some members have a prefix and others have none.
    """
    T, count = self.sampling.max_new_tokens, len(load.prompts)
    drawn = drawn_by_nobody(count * load.group, T)
    limit_Q = np.full(count, T) if load.limit_Q is None else np.minimum(load.limit_Q, T)
    generation = self.open(load.generator, count, load.group, load.key, load.prefixes)
    for number, ids in enumerate(load.prompts):
      if len(ids) and limit_Q[number] > 0:
        generation.add(Prompt(number, ids, int(limit_Q[number]), int(load.fold_Q[number])))
    while generation.busy:
      for piece in generation.advance():
        put(drawn, piece, load.group)
    return drawn

  def open(
    self, generator: Generator, prompts: int, group: int, key: jax.Array, prefixes: Sequence[Prefix] = ()
  ) -> "Generation":
    """A generation that nobody has joined yet, in the shapes of a load of so many prompts. The key is consumed.

    Raises:
      ValueError: some members have a prefix and others have none.
    """
    if prefixes and len(prefixes) != len(generator.members):
      raise ValueError(f"{len(prefixes)} prefixes for {len(generator.members)} members; allowed: one of each")
    before = int(jax.device_get(prefixes[0].length_Q.addressable_shards[0].data)[0]) if prefixes else 0
    with jax.set_mesh(self.mesh):
      return Generation(self, self._programs(generator)[0], generator, prompts, group, key, prefixes, before)

  def warm_up(self, generator: Generator, prompts: int, group: int, prefixes: Sequence[Prefix] = ()) -> None:
    """Compiles every shape that a load of so many prompts can take, several at a time. Nothing runs."""
    lowered, _ = self.lower(generator, prompts, group, prefixes)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
      list(threads.map(lambda program: program.compile(), itertools.chain(*lowered.values())))

  def lower(
    self, generator: Generator, prompts: int, group: int, prefixes: Sequence[Prefix] = ()
  ) -> tuple[dict[str, list[Any]], Any]:
    """Every program, by its name in `Programs`, in every shape of such a load; and what is kept between them at most.

    Weights and prefixes may be abstract.
    """
    lowered: dict[str, list[Any]] = {}
    run, key = programs.dry(*self._programs(generator), lowered), jax.random.key(0)
    with jax.set_mesh(self.mesh):
      return lowered, Generation(self, run, generator, prompts, group, key, prefixes, before=0).try_all()

  @property
  def choice(self) -> Choice:
    """How a token is chosen."""
    return Choice(self.sampling.temperature, self.sampling.top_p, self.sampling.top_k, self.sampling.min_p)

  @functools.cached_property
  def _parts(self) -> int:
    return sharding.shards(self.mesh, self.layout.rows)

  def _programs(self, generator: Generator) -> tuple[Programs, Programs]:
    """What runs for it, and where the outputs are."""
    stacked = tuple(not one_by_one(params["layers"]) for params in generator.members)
    settings = self.sampling
    sizes = (settings.page, settings.decode_chunk, settings.cache == "int8")
    return programs.compiled(self.model, self.mesh, self.layout, self.dtype, self.attention, *sizes, stacked)


class Generation:
  """Rows that draw together, a chunk at a time. Prompts may join and leave between two chunks.

  Built by `Engine.open`. What a row draws depends on the key, its prompt's `fold`, its sample's number and the choice.
  """

  def __init__(
    self,
    engine: Engine,
    programs: Programs,
    generator: Generator,
    prompts: int,
    group: int,
    key: jax.Array,
    prefixes: Sequence[Prefix],
    before: int,
  ) -> None:
    """`before`: tokens of the prefix."""
    self.engine, self.programs, self.generator, self.group, self.key = engine, programs, generator, group, key
    self.prefixes: tuple[Any, ...] = tuple(prefixes) or (None,) * len(generator.members)
    self.before, self.shapes = before, engine.shapes(prompts, group, bool(prefixes))
    self._step = engine.sampling.decode_chunk  # tokens a row
    self.waiting: collections.deque[Prompt] = collections.deque()
    self.parts = [Part(self.shapes) for _ in range(engine._parts)]
    self.idle = 0  # slots × steps that stood empty since prompts were last read
    self.slot_cost = architecture.drawing_to_reading(engine.model, self.shapes.slots)  # of a step, in tokens read
    self.share, self.stops = programs.whole([np.array(generator.share, np.float32), engine.stops_ZV])
    self.prompts, self.own = (Pools(programs, len(self.parts)) for _ in range(2))
    self.readers: Index | None = None  # of the prompts' pages, as long as nobody has come or gone
    self.ahead: Flight | None = None  # begun before the one before it was looked at
    self.rows = self.programs.blank_rows(self.shapes.slots * len(self.parts))
    self.choose(engine.choice)

  @property
  def live(self) -> int:
    """Rows that draw."""
    return sum(len(part.rows) for part in self.parts)

  @property
  def busy(self) -> bool:
    """Whether anybody draws or waits."""
    return bool(self.waiting or self.live)

  def choose(self, choice: Choice) -> None:
    """How tokens are chosen in all rows, from the next chunk that is begun: one may be under way."""
    self.choice = self.programs.whole(Choice(*map(np.float32, choice)))

  def add(self, prompt: Prompt) -> None:
    """It waits for slots, behind those that were added before, and for a chunk that is under way.

    Its number is that of nobody else who is there, its limit at least 1 and at most `max_new_tokens`.

    Raises:
      UserError: it is longer than the largest bucket.
    """
    longest = self.engine.sampling.prompt_buckets[-1]
    if len(prompt.ids) > longest:
      raise UserError(
        f"a prompt has {len(prompt.ids)} tokens, sampling.prompt_buckets ends at {longest}; allowed: prompts that fit "
        "into it"
      )
    self.waiting.append(prompt)

  def drop(self, prompts: Sequence[Prompt]) -> None:
    """These draw no more; what is no longer here is left aside."""
    gone = {prompt.number for prompt in prompts}
    self.waiting = collections.deque(prompt for prompt in self.waiting if prompt.number not in gone)
    slots = [(part, slot) for part in self.parts for slot, row in part.rows.items() if row.prompt.number in gone]
    for part, slot in slots:
      part.leave(slot)
    if slots:
      with jax.set_mesh(self.engine.mesh):
        self._gather(self.shapes.slots)  # the device forgets who is not gathered
      self._forget()

  def advance(self) -> list[Piece]:
    """Some tokens of every row, after those that find slots have been read; somebody is there.

    Where nobody waits the device draws on while the host looks at what was drawn.
    """
    with jax.set_mesh(self.engine.mesh):
      flight = self.ahead or self._settle()
      self.ahead = self._launch(2 * self._step) if self._flows() else None
      pieces = self._land(flight)
      self._forget()
      return pieces

  def try_all(self) -> Any:
    """Calls every program in every shape, with nobody in it; what is kept at most."""
    shapes = self.shapes
    for sizes in (shapes.prompt_pools, shapes.own_pools):
      for one, other in itertools.product(sizes, sizes):
        pools = Pools(self.programs, len(self.parts))
        pools.resize(one, ())
        if other != one:
          pools.resize(other, [()] * len(self.parts))
    for pages in shapes.prompt_pools:
      self._resize_prompts(pages)
      for shape in shapes.rows:
        self._read([[] for _ in self.parts], shape)
      for own in shapes.own_pools:
        self._resize_own(own)
        self._run_chunk()
    most = (self.rows, self.prompts.members, self.own.members)
    self._gather(shapes.slots)
    if shapes.few < shapes.slots:
      self._resize_own(shapes.own_pools[0])
      self._gather(shapes.few)
      self._run_chunk()
      self._gather(shapes.slots)
    return most

  # Prompts arrive.

  def _admit(self) -> None:
    """Reads prompts as long as some find slots and reading them now is worth it."""
    reads = []  # at the end, that the prompts' pool grows once
    while any(chosen := self._choose()):
      lengths = [[len(prompt.ids) for prompt in prompts] for prompts in chosen]
      shape = self.shapes.fitting(lengths)
      # Reading costs the whole shape: what of it would be empty is weighed against slots that stand empty, until then
      # and for the next steps.
      unused = shape[0] * shape[1] * len(self.parts) - sum(map(sum, lengths))
      empty = self.idle + self._step * sum(len(part.free) for part in self.parts)
      if self.live and empty * self.slot_cost < unused:
        break
      self.idle = 0
      for part, prompts in zip(self.parts, chosen):
        for prompt in prompts:
          self.waiting.popleft()
          part.admit(prompt)
      reads.append((chosen, shape))
    self._resize_prompts(_least(self.shapes.prompt_pools, max(part.prompt_pages.top for part in self.parts)))
    for read in reads:
      self._read(*read)

  def _choose(self) -> list[list[Prompt]]:
    """The next that wait, for the parts in turn, as many as find slots and can be read at once."""
    chosen: list[list[Prompt]] = [[] for _ in self.parts]
    room = [len(part.free) // self.group for part in self.parts]
    pages = [self.shapes.prompt_pools[-1] - part.prompt_pages.taken for part in self.parts]
    for prompt in self.waiting:
      part = int(np.argmax(room))
      lengths = [len(other.ids) for other in [*chosen[part], prompt]]
      pages[part] -= self.shapes.pages_of(len(prompt.ids))
      enough = len(lengths) > 1 and sum(lengths) > self.engine.sampling.prefill_tokens
      if enough or not room[part] or pages[part] < 0 or not self.shapes.fits(lengths):
        break
      chosen[part].append(prompt)
      room[part] -= 1
    return chosen

  def _read(self, chosen: list[list[Prompt]], shape: tuple[int, int]) -> None:
    """Reads the prompts of each part, which have their slots and pages, and starts their rows."""
    arrays = [self._lay_out(*each, shape) for each in zip(self.parts, chosen)]
    tokens, place, segment, last, *arrival = self._to_device(arrays)
    self.readers = None
    segments = segment if self.shapes.packed else None
    read = self.programs.read(self.generator.members, tokens, place, segments, last, self.prefixes)
    self.rows, self.prompts.members = self.programs.start(
      self.rows, self.prompts.members, *read, Arrival(*arrival), self.key
    )

  def _lay_out(self, part: Part, prompts: list[Prompt], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """A part's prompts as `sampler.read` and `Arrival` have them."""
    (X, T), shapes, S = shape, self.shapes, self.shapes.page
    zeros = lambda *shape: np.zeros(shape, np.int32)
    tokens_XT, place_XT, segment_XT = zeros(X, T), zeros(X, T), zeros(X, T) + len(prompts)  # padding is a segment too
    Q, n = shapes.lanes, X * T // S + min(shapes.lanes, X * T)
    last_Q, slot_QG, fold_Q = zeros(Q), zeros(Q, self.group) + _NONE, np.zeros(Q, np.uint32)
    length_Q, limit_Q, token_nS, page_n = zeros(Q), zeros(Q), zeros(n, S), zeros(n) + _NONE
    placed, done = shapes.pack([len(prompt.ids) for prompt in prompts], shape), 0
    for q, (prompt, (row, start)) in enumerate(zip(prompts, placed)):
      length, count = len(prompt.ids), len(prompt.pages)
      tokens_XT[row, start : start + length] = prompt.ids
      place_XT[row, start : start + length] = np.arange(length)
      segment_XT[row, start : start + length] = q
      first = row * T + start
      last_Q[q], slot_QG[q], fold_Q[q] = first + length - 1, part.slots_of(prompt), prompt.fold
      length_Q[q], limit_Q[q] = self.before + length, prompt.limit
      token_nS[done : done + count] = np.minimum(first + np.arange(count * S), X * T - 1).reshape(count, S)
      page_n[done : done + count] = prompt.pages
      done += count
    return tokens_XT, place_XT, segment_XT, last_Q, token_nS, page_n, slot_QG, fold_Q, length_Q, limit_Q

  # Rows draw.

  def _settle(self) -> Flight:
    """Reads who waits, moves who is left, and draws."""
    if self.waiting and self.parts[0].slots < self.shapes.slots:
      self._gather(self.shapes.slots)
    self._admit()
    if self._are_few():
      self._gather(self.shapes.few)
    self._resize_own(self._own_needed(self._step))
    return self._launch(self._step)

  def _launch(self, steps: int) -> Flight:
    """Some tokens of every row, which are then at most so many more than the host knows of."""
    for part in self.parts:
      part.provide(steps)
    self.idle += self._step * sum(len(part.free) for part in self.parts)
    return Flight(self._run_chunk(), [dict(part.rows) for part in self.parts])

  def _flows(self) -> bool:
    """Whether rows draw on, unless they meet a stop, and nobody is to be read or moved before."""
    on = any(row.count + self._step < row.prompt.limit for part in self.parts for row in part.rows.values())
    return on and not self.waiting and not self._are_few() and self._own_needed(2 * self._step) == self.own.pages

  def _own_needed(self, steps: int) -> int:
    """Pages of the rows' pool in which all can draw so many steps."""
    taken = [part.own_pages.taken + part.lacking(steps) for part in self.parts]
    if not self.waiting:  # the last rows: their pages move together
      return _least(self.shapes.own_pools, max(taken))
    return _least(self.shapes.own_pools, max(max(part.own_pages.top, n) for part, n in zip(self.parts, taken)))

  def _land(self, flight: Flight) -> list[Piece]:
    """What was drawn; what is finished leaves."""
    chunk, pieces = jax.device_get(flight.chunk), list[Piece]()
    slots = len(chunk.count_R) // len(self.parts)
    for number, (part, rows) in enumerate(zip(self.parts, flight.rows)):
      here = slice(number * slots, (number + 1) * slots)
      pieces += collect(part, rows, Chunk(*(x_R[here] for x_R in chunk)))
    if not all(piece.live for piece in pieces):
      self.readers = None
    return pieces

  def _forget(self) -> None:
    """What nobody is left to draw in."""
    if not self.live:
      self.ahead = None

  def _run_chunk(self) -> Chunk:
    if self.readers is None:
      read = [part.prompt_index(self.prompts.pages, self.before) for part in self.parts]
      self.readers = Index(*self._to_device(read))
    own = Index(*self._to_device([part.own_index(self.own.pages, self.before) for part in self.parts]))
    weights = (self.generator.members, self.prefixes, self.prompts.members, self.own.members)
    self.rows, self.own.members, chunk = self.programs.advance(
      *weights, self.share, self.rows, self.readers, own, self.choice, self.stops
    )
    return chunk

  # Pools grow and shrink, and the last rows move together.

  def _are_few(self) -> bool:
    """Whether no more than a few rows are left in many slots, of prompts that fit into the smallest pool."""
    fits = lambda part: len(part.rows) <= self.shapes.few and part.prompt_pages.taken <= self.shapes.prompt_pools[0]
    return self.parts[0].slots > self.shapes.few and not self.waiting and all(map(fits, self.parts))

  def _gather(self, slots: int) -> None:
    """Moves the rows into so many slots, others than theirs are dead; of few, the prompts into the smallest pool."""
    self.readers = None
    orders = [part.gather(slots) for part in self.parts]
    there = [(padded(order, slots), np.arange(slots) < len(order)) for order in orders]
    self.rows = self.programs.gather(self.rows, *self._to_device(there))
    pages = self.shapes.prompt_pools[0]
    if slots < self.shapes.slots and self.prompts.pages > pages:
      groups = [[prompt.pages for prompt in part.prompts] for part in self.parts]
      self.prompts.resize(pages, [part.prompt_pages.renumber(of) for part, of in zip(self.parts, groups)])

  def _resize_prompts(self, pages: int) -> None:
    """Prompts stay where they are: while some wait, their pool only grows."""
    if pages > self.prompts.pages:
      self.prompts.resize(pages, [range(self.prompts.pages)] * len(self.parts))
      self.readers = None

  def _resize_own(self, pages: int) -> None:
    if pages != self.own.pages:
      rows = [part.rows.values() for part in self.parts]
      self.own.resize(pages, [part.own_pages.renumber([row.pages for row in of]) for part, of in zip(self.parts, rows)])

  def _to_device(self, of_parts: Sequence[Any]) -> list[jax.Array]:
    return self.programs.by_rows([np.concatenate(arrays) for arrays in zip(*of_parts)])


def _least(sizes: Sequence[int], needed: int) -> int:
  return next(size for size in sizes if size >= needed)

"""Who is where: rows in slots, texts in pages, prompts packed into rows. The host's books, all numpy."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence

import numpy as np

from advgame_jax.attention import Index

_PROMPT_POOLS, _OWN_POOLS = (0.5, 0.75, 1.0), (0.25, 0.5, 1.0)  # of the most pages there can be


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What is compiled for a load, of each part of the mesh's rows."""

  group: int
  slots: int
  page: int  # tokens
  prompt_pages: int  # of the longest prompt
  own_pages: int  # of the longest completion
  rows: tuple[tuple[int, int], ...]  # of prompts that are read together: rows, tokens a row
  packed: bool  # a row may hold several prompts
  varied: bool = True  # pools and slots are of several sizes, not of one for all

  @property
  def lanes(self) -> int:
    """Groups that fit into the slots."""
    return self.slots // self.group

  @property
  def few(self) -> int:
    """Slots for the last rows of a load."""
    return -(-self.slots // 4) if self.varied and self.slots >= 8 else self.slots

  @property
  def prompt_pools(self) -> list[int]:
    """Sizes of the prompts' pool, pages, ascending; the least has room for the longest prompt."""
    return self._sizes(self.prompt_pages, self.lanes * self.prompt_pages, _PROMPT_POOLS)

  @property
  def own_pools(self) -> list[int]:
    """Sizes of the rows' pool, pages, ascending; the least has room for the last rows, however long they are."""
    last = self.few if self.few < self.slots else 1
    return self._sizes(last * self.own_pages, self.slots * self.own_pages, _OWN_POOLS)

  def _sizes(self, least: int, most: int, parts: Sequence[float]) -> list[int]:
    """These parts of the most pages that there can be."""
    return sorted({max(least, math.ceil(part * most)) for part in (parts if self.varied else (1.0,))})

  def pages_of(self, tokens: int) -> int:
    """Pages that so many tokens of one text take."""
    return -(-tokens // self.page)

  def pack(self, lengths: Sequence[int], shape: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, first token) of each prompt, in order, the first row that has room; as far as there is one."""
    used, places = [0] * shape[0], []
    for length in lengths:
      row = next((r for r, n in enumerate(used) if n + length <= shape[1] and (self.packed or not n)), None)
      if row is None:
        break
      places.append((row, used[row]))
      used[row] += length
    return places

  def fits(self, lengths: Sequence[int]) -> bool:
    """Whether some shape takes these prompts together; the largest is the likeliest."""
    return any(len(self.pack(lengths, shape)) == len(lengths) for shape in reversed(self.rows))

  def fitting(self, lengths_of_parts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The least shape that takes the prompts of every part; some shape does."""
    takes = lambda shape: all(len(self.pack(lengths, shape)) == len(lengths) for lengths in lengths_of_parts)
    return next(shape for shape in self.rows if takes(shape))


@dataclasses.dataclass(eq=False)
class Prompt:
  """One of a generation's."""

  number: int
  ids: Sequence[int]
  limit: int  # tokens its rows may draw
  fold: int = 0  # below 2³², what its rows' keys are folded from
  pages: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Row:
  """A sample of a prompt that draws."""

  prompt: Prompt
  sample: int
  count: int = 0
  pages: list[int] = dataclasses.field(default_factory=list)


class Pages:
  """Which pages of a part's pool are taken: the lowest free ones first, so that what is taken stays together."""

  def __init__(self) -> None:
    self.top, self.free = 0, list[int]()

  @property
  def taken(self) -> int:
    """How many there are."""
    return self.top - len(self.free)

  def take(self, count: int) -> list[int]:
    """So many more."""
    return [heapq.heappop(self.free) if self.free else self._next() for _ in range(count)]

  def _next(self) -> int:
    self.top += 1
    return self.top - 1

  def give(self, pages: Sequence[int]) -> None:
    """These are free again."""
    for page in pages:
      heapq.heappush(self.free, page)

  def renumber(self, lists: Sequence[list[int]]) -> list[int]:
    """Numbers the pages of these lists, all that are taken, from 0 on; what they were, in their new order."""
    before = [page for pages in lists for page in pages]
    fresh = itertools.count()
    for pages in lists:
      pages[:] = [next(fresh) for _ in pages]
    self.top, self.free = len(before), []
    return before


class Part:
  """The slots and pages of one part of the mesh's rows."""

  def __init__(self, shapes: Shapes) -> None:
    self.shapes, self.slots = shapes, shapes.slots
    self.free = list(range(shapes.slots))
    self.rows: dict[int, Row] = {}
    self.prompt_pages, self.own_pages = Pages(), Pages()

  def admit(self, prompt: Prompt) -> None:
    """Pages for a prompt and slots for its rows."""
    prompt.pages = self.prompt_pages.take(self.shapes.pages_of(len(prompt.ids)))
    for sample in range(self.shapes.group):
      self.rows[heapq.heappop(self.free)] = Row(prompt, sample)

  def slots_of(self, prompt: Prompt) -> list[int]:
    """Of its samples in order, as long as all are there."""
    return [slot for slot, row in self.rows.items() if row.prompt is prompt]

  @property
  def prompts(self) -> list[Prompt]:
    """Those of which rows are left."""
    return list({row.prompt.number: row.prompt for row in self.rows.values()}.values())

  def gather(self, slots: int) -> list[int]:
    """Moves the rows into the first of so many slots, in their order; the slots they were in."""
    before = sorted(self.rows)
    self.rows = {new: self.rows[old] for new, old in enumerate(before)}
    self.slots, self.free = slots, list(range(len(before), slots))
    return before

  def provide(self, steps: int) -> None:
    """Pages for all that the rows may draw in so many steps."""
    for row in self.rows.values():
      row.pages += self.own_pages.take(self._lacking(row, steps))

  def lacking(self, steps: int) -> int:
    """How many pages `provide` would take."""
    return sum(self._lacking(row, steps) for row in self.rows.values())

  def _lacking(self, row: Row, steps: int) -> int:
    return self.shapes.pages_of(min(row.count + steps, row.prompt.limit)) - len(row.pages)

  def leave(self, slot: int) -> None:
    """A row is finished; with the last of its group the prompt goes too."""
    row = self.rows.pop(slot)
    heapq.heappush(self.free, slot)
    self.own_pages.give(row.pages)
    if not any(other.prompt is row.prompt for other in self.rows.values()):
      self.prompt_pages.give(row.prompt.pages)

  def prompt_index(self, pool: int, before: int) -> Index:
    """Who reads which prompt's page. `before`: tokens of the prefix."""
    shapes, G = self.shapes, self.shapes.group
    index = _blank_index(pool, G, self.slots, shapes.prompt_pages)
    for slot, row in self.rows.items():
      pages = row.prompt.pages
      index.reader_PG[pages, row.sample] = slot
      index.start_P[pages] = before + shapes.page * np.arange(len(pages))
      index.end_P[pages] = before + len(row.prompt.ids)
      index.entry_RJ[slot, : len(pages)] = G * np.array(pages) + row.sample
    return index

  def own_index(self, pool: int, before: int) -> Index:
    """Who reads which page of what was drawn."""
    index = _blank_index(pool, 1, self.slots, self.shapes.own_pages)
    for slot, row in self.rows.items():
      first = before + len(row.prompt.ids)
      index.reader_PG[row.pages] = slot
      index.start_P[row.pages] = first + self.shapes.page * np.arange(len(row.pages))
      index.end_P[row.pages] = np.iinfo(np.int32).max  # what is not yet drawn is the row's future
      index.entry_RJ[slot, : len(row.pages)] = row.pages
    return index


def _blank_index(pages: int, readers: int, rows: int, most: int) -> Index:
  zeros = lambda *shape: np.zeros(shape, np.int32)
  return Index(zeros(pages, readers), zeros(pages), zeros(pages), zeros(rows, most) - 1)  # type: ignore[arg-type]

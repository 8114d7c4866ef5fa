"""Seeds: JSON-lines files, checked whole before a run, and the batch of any step."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from advgame_jax.config import Data
from advgame_jax.types import Category, SeedBatch, UserError

_FORM = '{"prompt": "…", "category": "harmful" or "benign"}'


@dataclasses.dataclass(frozen=True)
class Seed:
  """One query, and where it came from."""

  text: str
  category: Category
  index: int  # its place in the files of its split, in their order


def load(paths: Sequence[str], what: str, duplicates: str = "refuse") -> list[Seed]:
  """All seeds of a split, each once.

  Args:
    what: 'train' or 'validation', for errors.
    duplicates: 'drop' keeps the first of seeds that are alike, 'refuse' refuses them.

  Raises:
    UserError: a file that is missing or empty, a line that is no seed, or two seeds alike that are not to be dropped.
  """
  if not paths:
    raise UserError(f"config.data.{what} names no file; allowed: JSON-lines files of {_FORM}")
  seeds: list[Seed] = []
  first: dict[str, str] = {}
  for path in paths:
    for place, row in rows(path, _FORM):
      text, category = text_under(row, "prompt", place, _FORM), category_of(row, place)
      if (same := first.setdefault(normalise(text), place)) == place:
        seeds.append(Seed(text, category, len(seeds)))
      elif duplicates == "refuse":
        raise UserError(f"{place}: the same seed as {same}; allowed: each seed once, or config.data.duplicates='drop'")
  return seeds


def version(seeds: Sequence[Seed]) -> str:
  """A hash of them and their order."""
  lines = json.dumps([(seed.text, int(seed.category), seed.index) for seed in seeds])
  return hashlib.blake2b(lines.encode(), digest_size=6).hexdigest()


def normalise(text: str) -> str:
  """What makes two seeds the same: everything but case and white space."""
  return " ".join(text.casefold().split())


def check_disjoint(train: Sequence[Seed], validation: Sequence[Seed]) -> None:
  """Refuses a seed that is both played and validated on."""
  played = {normalise(seed.text) for seed in train}
  shared = [seed for seed in validation if normalise(seed.text) in played]
  if shared:
    raise UserError(
      f"{len(shared)} validation seeds are training seeds too, the first is number {shared[0].index + 1} of "
      "config.data.validation; allowed: disjoint files"
    )


def rows(path: str, form: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """The objects of a JSON-lines file, each after its place ('file, line n').

  Args:
    form: what a line should be, for errors.

  Raises:
    UserError: a file that cannot be read or holds nothing, or a line that is no object.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")  # a JSON string may hold other line ends
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}; allowed: a JSON-lines file of {form}") from None
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 at byte {error.start}; allowed: a JSON-lines file of {form}") from None
  if not any(map(str.strip, lines)):
    raise UserError(f"{path} is empty; allowed: one or more lines of {form}")
  for number, line in enumerate(lines, 1):
    if line.strip():
      place = f"{path}, line {number}"
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno}); allowed: {form}") from None
      if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; allowed: {form}")
      yield place, row


def text_under(row: Mapping[str, Any], name: str, place: str, form: str) -> str:
  """The text of a row under a name; UserError where there is none."""
  text = row.get(name)
  if not isinstance(text, str) or not text.strip():
    raise UserError(f"{place}: no text under {name!r}; allowed: {form}")
  return text


def category_of(row: Mapping[str, Any], place: str) -> Category:
  """The category that a row names; UserError where it names none."""
  names = {category.name.lower(): category for category in Category}
  if str(row.get("category")) not in names:
    raise UserError(f"{place}: category is {row.get('category')!r}; allowed: {', '.join(names)}")
  return names[row["category"]]


class SeedBatches:
  """The batch of any step, a pure function of (seeds, settings, seed, step): resuming needs no position but the step.

  Each category is shuffled anew every epoch. `alternate` plays the categories that there are in turn; `mixed` plays
  half of each.
  """

  def __init__(self, seeds: Sequence[Seed], settings: Data, seed: int):
    by_category = [[s for s in seeds if s.category == category] for category in Category]
    self._order = settings.order
    self._batch = settings.batch
    self._streams = [
      grain.MapDataset.source(part).seed(seed + c).shuffle().repeat() for c, part in enumerate(by_category) if part
    ]
    if settings.order == "mixed" and len(self._streams) < len(Category):
      raise UserError("config.data.train has seeds of one category only; allowed with data.order='mixed': both")

  def __getitem__(self, step: int) -> SeedBatch:
    if self._order == "mixed":
      half = self._batch // 2
      chosen = [stream[i] for stream in self._streams for i in range(step * half, (step + 1) * half)]
    else:
      turn, which = divmod(step, len(self._streams))
      chosen = [self._streams[which][i] for i in range(turn * self._batch, (turn + 1) * self._batch)]
    return as_batch(chosen)


def as_batch(seeds: Sequence[Seed]) -> SeedBatch:
  """Seeds in the order given."""
  text_B = np.empty(len(seeds), object)
  text_B[:] = [seed.text for seed in seeds]
  return SeedBatch(
    text_B=text_B,
    category_B=np.array([seed.category for seed in seeds], np.int8),
    index_B=np.array([seed.index for seed in seeds], np.int64),
  )

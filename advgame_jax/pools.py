"""Pools of pages that are as large as what they hold needs: made, grown, shrunk, put into another order."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from advgame_jax.layers import Layers, one_by_one
from advgame_jax.programs import Programs


def padded(order: Sequence[int], count: int) -> np.ndarray:
  """The first so many, with zeros for what is new and holds nothing yet."""
  return np.pad(np.array(order[:count], np.int32), (0, max(0, count - len(order))))


@dataclasses.dataclass(eq=False)
class Pools:
  """Pages of every member's layers, of `parts` parts of a mesh's rows. There are none before the first `resize`."""

  programs: Programs
  parts: int
  pages: int = 0  # of a part
  members: tuple[Layers, ...] = ()

  def resize(self, pages: int, orders: Sequence[Sequence[int]]) -> None:
    """So many pages a part: first of each those of its order, then some that hold nothing."""
    if self.pages:
      self._move(self.programs.by_rows(np.concatenate([padded(order, pages) for order in orders])))
    else:
      self.members = self.programs.blank_pools(pages * self.parts)
    self.pages = pages

  def _move(self, page_P: jax.Array) -> None:
    """Array by array: two whole pools would be the most memory of a step."""

    def move(program: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
      moved = program(x, page_P)
      self.programs.free(x)
      return moved

    of = lambda pool: self.programs.resize_layer if one_by_one(pool) else self.programs.resize_stack
    self.members = tuple(jax.tree.map(functools.partial(move, of(pool)), pool) for pool in self.members)

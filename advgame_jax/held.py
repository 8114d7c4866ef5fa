"""What stays on devices between the programs of a run, in abstract values."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from advgame_jax.workload import size

# The parts of a run that have memory of their own: playing and judging, learning, and of an evaluation playing and the
# moment when first weights have been read.
ALWAYS = frozenset(("play", "update", "evaluation", "loading"))


class Held(NamedTuple):
  """Arrays of one purpose."""

  what: str
  bytes: float  # of one device
  largest: str  # its largest array
  mesh: Mesh
  during: frozenset[str]  # of `ALWAYS`


def hold(what: str, tree: Any, mesh: Mesh, during: frozenset[str]) -> Held:
  """What a tree of arrays takes while these parts of the run last."""
  arrays = jax.tree_util.tree_leaves_with_path(tree)
  path, largest = max(arrays, key=lambda at: size(at[1]), default=((), None))
  shape = f"{largest.dtype.name}[{','.join(map(str, largest.shape))}]" if largest is not None else ""
  return Held(what, size(tree), f"{jax.tree_util.keystr(path)} {shape}", mesh, during)

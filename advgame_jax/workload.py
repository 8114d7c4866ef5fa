"""How much a program has to do, reckoned without a compiler: FLOPs, bytes, and guesses of temporaries and collectives.

All of one device. A guess orders what could be tried, and stands in where a target's compiler is not installed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from advgame_jax import architecture, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.collectives import Collective
from advgame_jax.engine import Engine
from advgame_jax.targets import StandIn, Target
from advgame_jax.update import Recipe, comparison_flops

_KERNELS_A_LAYER, _KERNELS_A_DRAW = 15, 25  # of a step on GPUs, pages read by `flash_decoding`


class Guess(NamedTuple):
  """Of a program that is not compiled."""

  temporary: float  # bytes
  collectives: list[Collective]


class Effort(NamedTuple):
  """Of one run of a program, or of one trip of its loop."""

  flops: float
  moved: float  # bytes read from and written to memory
  guess: Guess
  kernels: float = 0  # as in `roofline.seconds`


class Drawing(NamedTuple):
  """How much is generated in one go, of one part of the rows."""

  rows: int  # in all
  slots: int  # that draw at a time
  steps: float  # of decoding, until the last row has finished
  context: float  # tokens that a row attends to on average
  reads: float  # runs of the program that reads prompts
  width: int  # tokens that it reads


def islands(target: Target, mesh: Mesh) -> list[int]:
  """Of each device of a mesh, which of them it reaches by `Chip.link`."""
  devices = list(mesh.devices.flat)
  one_slice = isinstance(devices[0], StandIn) and target.chip.name.startswith("TPU")
  return [0] * len(devices) if one_slice else target.islands(devices)


class Wires(NamedTuple):
  """What joins a target's devices."""

  target: Target

  def ring(self, kind: str, mesh: Mesh, axes: Sequence[str], total: float, times: int) -> list[Collective]:
    """A collective along mesh axes, `times` times, of arrays of `total` bytes in all times; of one device none."""
    n = sharding.shards(mesh, tuple(axes))
    if n == 1 or not total:
      return []
    on = np.array(islands(self.target, mesh)).reshape(mesh.devices.shape)
    at = [mesh.axis_names.index(axis) for axis in axes]
    group = np.moveaxis(on, at, range(len(at))).reshape(n, -1)[:, 0]
    local = int(np.unique(group, return_counts=True)[1].min())
    sent = total / times * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    return [Collective(kind, "", n, sent, times, bool((group != group[0]).any()), local, "guessed")]

  def reduce(self, engine: Engine, tokens: float) -> list[Collective]:
    """Of a forward pass of a model that is split by heads: twice a layer."""
    model, times = engine.model, 2 * engine.model.layers
    total = times * tokens * model.width * engine.dtype.itemsize
    return self.ring("all-reduce", engine.mesh, engine.layout.heads, total, times)


def drawing_of(engine: Engine, prompts: int, group: int, prompt_tokens: float, mean: float, before: int = 0) -> Drawing:
  """How a load is drawn: while prompts wait, slots are full; the last rows draw until the longest is done.

  `before`: tokens of the prefix. Rows are taken to have `mean` tokens, the longest of the last
  ones twice as many, or the limit.
  """
  shapes, parts = engine.shapes(prompts, group, before > 0), sharding.shards(engine.mesh, engine.layout.rows)
  rows = math.ceil(prompts / parts) * group
  slots = min(shapes.slots, rows)
  steps = (rows / slots - 1) * mean + min(engine.sampling.max_new_tokens, 2 * mean)
  width = math.prod(shapes.rows[-1])
  reads = max(1, math.ceil(rows / group * prompt_tokens / width))
  return Drawing(rows, slots, max(1.0, steps), before + prompt_tokens + mean / 2, reads, width)


def pool_bytes(engine: Engine, prompts: int, group: int, prefix: bool, stacked: bool) -> tuple[float, float]:
  """Of one device: what the pools of a load take at most, and what moving the largest of their arrays takes beside."""
  shapes, page = engine.shapes(prompts, group, prefix), engine.page_bytes
  own, read = shapes.own_pools[-1] * page, shapes.prompt_pools[-1] * page
  return own + read, max(own, read) / 2 / (1 if stacked else engine.model.layers)


def size(tree: Any) -> float:
  """Bytes of one device of what it holds; what its host holds is none."""
  return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(x: Any) -> float:
  if not hasattr(x, "sharding") or x.sharding.memory_kind == "pinned_host":
    return 0
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def reading(
  engine: Engine, drawing: Drawing, weights: Sequence[Any], mean_before: float, moving: float, where: Wires
) -> Effort:
  """Prompts, once; each of their tokens sees `mean_before` others. `moving`: bytes that resizing the pools takes."""
  model, t, Z = engine.model, drawing.width, engine.dtype.itemsize
  tensor = sharding.shards(engine.mesh, engine.layout.heads)
  token, layer = _of_a_token(model, Z, tensor)
  flops = architecture.forward_flops(model, t, mean_before) - 2 * t * model.vocab * model.width  # no head
  moved = size(weights) + len(weights) * t * (token + 2 * model.layers * layer)
  return Effort(
    len(weights) * flops / tensor, moved, Guess(max(moving, t * (token + 2 * layer)), where.reduce(engine, t))
  )


def stepping(engine: Engine, drawing: Drawing, weights: Sequence[Any], moving: float, where: Wires) -> Effort:
  """One token in every slot."""
  model, sampling, R, Z = engine.model, engine.sampling, drawing.slots, engine.dtype.itemsize
  tensor = sharding.shards(engine.mesh, engine.layout.heads)
  _, layer = _of_a_token(model, Z, tensor)
  token = engine.page_bytes / sampling.page
  logits = R * 4 * model.vocab / tensor
  passes = 10 + 15 * ((sampling.top_p < 1) + (sampling.top_k > 0))  # over the logits, to choose a token
  flops = len(weights) * architecture.forward_flops(model, R, drawing.context) / tensor
  moved = size(weights) + len(weights) * R * drawing.context * token + passes * logits
  kernels = len(weights) * _KERNELS_A_LAYER * model.layers + _KERNELS_A_DRAW
  return Effort(flops, moved, Guess(max(moving, 3 * logits + R * layer), where.reduce(engine, R)), kernels)


def updating(recipe: Recipe, shape: tuple[int, int, int, int], where: Wires) -> Effort:
  """One player's update, of comparisons that all have a weight; `shape`: P, S, C, T before padding."""
  model, mesh, layout, precision = recipe.model, recipe.mesh, recipe.layout, recipe.precision
  (P, S, C, T), accumulate, Z = shape, recipe.player.accumulate, np.dtype(recipe.dtype).itemsize
  tensor = sharding.shards(mesh, layout.heads)
  micro = min(P, accumulate)  # those that have a comparison; the rest cost nothing
  comparisons = math.ceil(P / recipe.unit) / sharding.shards(mesh, layout.tokens)
  tokens, whole_rows = comparisons * (S + C * T), comparisons * C * (S + T)
  forwards = recipe.forwards
  flops = comparisons * comparison_flops(recipe, S, C, T)
  count, L, M = architecture.count_params(model) / tensor, model.layers, model.width
  F, V = model.feed_forward / tensor, model.vocab / tensor
  gradient = (
    4 * sum(math.prod(x.shape) for x in jax.tree.leaves(recipe.specs)) / tensor / sharding.shards(mesh, layout.width)
  )
  layer = (tokens * (4 * M + 4 * F) + whole_rows * 4 * M) * Z
  moved = (forwards + 1 + (not recipe.adapted)) * (count * Z + 2 * L * layer) + 3 * gradient
  products = tokens * (5 * M + 3 * F) + whole_rows * M
  kept = {"layer": tokens * M, "products": products, "none": 1.5 * layer / Z}[precision.remat] * L * Z
  logits = 3 * 4 * max(precision.logit_chunk, comparisons * C) * V
  gathered = 3 * Z * ((count - V * M * (1 if model.tied else 2)) / L + V * M) + 4 * V * M
  temporary = kept + 2 * layer + logits + gathered + 2 * gradient
  whole = (count - (0 if model.tied else V * M)) * Z  # not the embedding, which is looked up in parts
  rings = where.ring("all-gather", mesh, layout.width, forwards * whole, forwards * (L + 1))
  looks = 1 + (not recipe.player.reference_is_generator) + (not recipe.adapted)  # and back, if the table learns
  rings += where.ring("all-to-all", mesh, layout.width, looks * tokens * M * Z, looks)
  if not recipe.adapted:
    rings += where.ring("reduce-scatter", mesh, layout.width, whole, L + 1)
    copies = tuple(axis for axis in layout.rows if axis not in layout.width)
    rings += where.ring("all-reduce", mesh, copies, gradient, L + 1)
  sums = (forwards + 1) * 2 * L
  rings += where.ring("all-reduce", mesh, layout.heads, sums * tokens * M * Z, sums)
  rings = [dataclasses.replace(ring, times=ring.times * micro) for ring in rings]
  return Effort(micro * flops / tensor, micro * moved, Guess(temporary, rings))


def _of_a_token(model: ModelConfig, number: int, tensor: int) -> tuple[float, float]:
  """Bytes: in the cache, and of what a layer makes of it, the more of attention and feed-forward."""
  attention, feed_forward = 4 * model.heads * model.head_size, 3 * model.feed_forward
  kept = 2 * model.layers * model.kv_heads * model.head_size
  return kept * number / tensor, (4 * model.width + max(attention, feed_forward) / tensor) * number

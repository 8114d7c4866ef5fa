"""Where arrays live: the mesh, layouts from logical axes to mesh axes, and global arrays from local parts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from advgame_jax.types import Array, UserError

AXES = ("data", "fsdp", "sequence", "tensor")
MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The mesh axes that each logical axis is split over; `()` is replicated."""

  rows: MeshAxes = ()
  tokens: MeshAxes = ()  # of a row
  width: MeshAxes = ()
  heads: MeshAxes = ()
  feed_forward: MeshAxes = ()
  vocab: MeshAxes = ()

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes."""
    mesh_axes = [getattr(self, axis) if axis else () for axis in axes]
    used = [name for names in mesh_axes for name in names]
    if len(used) != len(set(used)):
      raise UserError(f"logical axes {tuple(axes)} are laid over mesh axes {mesh_axes}; allowed: each mesh axis once")
    return PartitionSpec(*(names or None for names in mesh_axes))

  def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to this layout, inside `jit` under `jax.set_mesh`; replicated layouts pin nothing."""
    if self == LOCAL:
      return x
    return jax.lax.with_sharding_constraint(x, self.spec(axes))

  @property
  def by_hand(self) -> "Layout":
    """Of rows and what they are computed with, where a function is written for one device's part; see `by_compiler`."""
    return dataclasses.replace(self, heads=(), feed_forward=(), vocab=())

  @property
  def by_compiler(self) -> "Layout":
    """The rest, inside such a function; LOCAL where there is nothing to split."""
    rest = dataclasses.replace(self, rows=(), tokens=(), width=())
    return rest if _parts(rest.heads + rest.feed_forward + rest.vocab) > 1 else LOCAL

  @property
  def splits_width(self) -> bool:
    """Whether the width of weights lies over several devices; under `jax.set_mesh`."""
    return _parts(self.width) > 1

  def gather_width(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Inside a function of one device's part: the whole of what is split by width. Its gradient is scattered again.

    Of the other axes each device gathers its own part only, which must be said: the compiler does not divide a gather.
    """
    if "width" not in axes or not self.splits_width:
      return x
    gather = functools.partial(_gather, self.width, axes.index("width"))
    mine = self.by_compiler.spec(axes)
    return self.by_compiler.local(gather, mine, mine)(x)

  def of_all_width(self, look_up: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Likewise: `look_up(x)` [*x.shape, M], of which a device has its part of the width M only, for any x.

    Each looks up what all need, and gives them theirs: an activation is sent, and on the way back its gradient.
    """
    if not self.splits_width:
      return look_up(x)
    found = look_up(jax.lax.all_gather(x, self.width))
    return jax.lax.all_to_all(found, self.width, split_axis=0, concat_axis=found.ndim - 1, tiled=True)[0]

  def gather_tokens(self, x_RTNH: jax.Array) -> jax.Array:
    """Likewise: whole rows of a part of the heads, from a part of the rows' tokens (Ulysses, 2309.14509)."""
    return self._exchange(x_RTNH, split_axis=2, concat_axis=1)

  def scatter_tokens(self, x_RTNH: jax.Array) -> jax.Array:
    """The way back."""
    return self._exchange(x_RTNH, split_axis=1, concat_axis=2)

  def _exchange(self, x_RTNH: jax.Array, **axes: int) -> jax.Array:
    if _parts(self.tokens) == 1:
      return x_RTNH
    mine = self.by_compiler.spec((None, None, "heads"))
    exchange = lambda x: jax.lax.all_to_all(x, self.tokens, **axes, tiled=True)
    return self.by_compiler.local(exchange, mine, mine)(x_RTNH)

  def local(self, f: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`f` of each device's part, given by the partitions of inputs and outputs; they may be prefixes of their trees.

    Mesh axes that this layout does not use are left to the compiler, but for those of one device.
    """
    if self == LOCAL:
      return f
    mesh = jax.sharding.get_abstract_mesh()
    used = {name for names in dataclasses.astuple(self) for name in names}
    axes = (used | {name for name, size in mesh.shape.items() if size == 1}) - set(mesh.manual_axes)
    return f if not axes else jax.shard_map(f, in_specs=inputs, out_specs=outputs, axis_names=axes, check_vma=False)


LOCAL = Layout()
# Every parameter is split along its width over as many devices as have one row's tokens or other rows, and along what
# `tensor` takes; so are gradients, moments and averages.
TRAIN = Layout(
  rows=("data", "fsdp"),
  tokens=("sequence",),
  width=("fsdp", "sequence"),
  heads=("tensor",),
  feed_forward=("tensor",),
  vocab=("tensor",),
)
# A decode step reads every weight once: gathering them layer by layer for each token would drown it.
GENERATE_REPLICATED = Layout(rows=AXES)
GENERATE_TENSOR = dataclasses.replace(TRAIN, rows=("data", "fsdp", "sequence"), tokens=(), width=())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axes: MeshAxes, axis: int, part: jax.Array) -> jax.Array:
  return jax.lax.all_gather(part, axes, axis=axis, tiled=True)


def _scatter(axes: MeshAxes, axis: int, _: None, x: jax.Array) -> tuple[jax.Array]:
  """The gradient of `_gather`. What a program is compiled for is known when it is lowered, not by what lowers it."""
  plainly = functools.partial(jax.lax.psum_scatter, axis_name=axes, scatter_dimension=axis, tiled=True)
  in_stages = functools.partial(scatter_in_stages, axes, axis)
  return (jax.lax.platform_dependent(x, tpu=in_stages, default=plainly),)


_gather.defvjp(lambda *args: (_gather(*args), None), _scatter)


def scatter_in_stages(axes: MeshAxes, axis: int, x: jax.Array) -> jax.Array:
  """`psum_scatter` of one axis, tiled: first between groups of neighbours, then within them.

  The compiler for TPUs reduces a whole array and cuts a part out, which sends twice the bytes, where the devices are a
  whole slice or the parts no whole tiles of the memory: hence two groups, as near to equal as they get, and the axis
  that is scattered in front of two others. A sum is rounded once more on the way.
  """
  count = _parts(axes)
  size = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
  devices = np.arange(count).reshape(-1, size)
  whole = jnp.moveaxis(x, axis, 0)
  part = whole.reshape(*devices.shape, len(whole) // count, -1)
  for together in (devices.T, devices):
    part = jax.lax.psum_scatter(part, axes, axis_index_groups=together.tolist())
  return jnp.moveaxis(part.reshape(-1, *whole.shape[1:]), 0, axis)


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
  """The mesh of `AXES` over these devices. Of several slices, the first axis that can runs over them.

  Args:
    sizes: of each axis; one may be −1 and takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  filled = list(sizes)
  given = math.prod(size for size in filled if size > 0)
  if filled.count(-1) == 1 and len(devices) % given == 0:
    filled[filled.index(-1)] = len(devices) // given
  if math.prod(filled) != len(devices) or min(filled) < 1:
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    fitting = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
    odd = [axis for axis, size in zip(AXES, sizes) if size != -1 and (size < 1 or len(devices) % size)]
    raise UserError(
      f"mesh {named} does not fit {len(devices)} devices; allowed: sizes whose product is {len(devices)}, one of them "
      f"may be -1{''.join(f'; of {axis} {fitting}' for axis in odd)}"
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1:
    outer = next((i for i, size in enumerate(filled) if size % slices == 0), None)
    if outer is None:
      named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, filled))
      raise UserError(f"mesh {named} has no axis that runs over {slices} slices; allowed: one that they divide")
    across = [slices if i == outer else 1 for i in range(len(filled))]
    within = [size // parts for size, parts in zip(filled, across)]
    placed = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return jax.make_mesh(tuple(filled), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _parts(axes: MeshAxes) -> int:
  """Under `jax.set_mesh`."""
  return shards(jax.sharding.get_abstract_mesh(), tuple(set(axes))) if axes else 1


def splits_vocab() -> bool:
  """Whether the mesh that is set splits logits by their words."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(mesh.shape.get(name, 1) > 1 for name in TRAIN.vocab)


def shards(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
  """How many parts an axis laid over these mesh axes is split into."""
  return math.prod(mesh.shape[name] for name in axes)


def named(mesh: Mesh, layout: Layout, axes: Sequence[str | None], shape: Sequence[int], what: str) -> NamedSharding:
  """The sharding of one array.

  Raises:
    UserError: a dimension does not divide, with the axis, its size and what would fit.
  """
  for axis, size in zip(axes, shape, strict=True):
    mesh_axes: MeshAxes = getattr(layout, axis) if axis else ()
    parts = shards(mesh, mesh_axes)
    if size % parts:
      fitting = [n for n in range(1, parts) if size % n == 0]
      raise UserError(
        f"{what}: axis {axis!r} of size {size} does not divide over {'×'.join(mesh_axes)} = {parts} devices; "
        f"allowed: {', '.join(map(str, fitting))}"
      )
  return NamedSharding(mesh, layout.spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, layout: Layout) -> NamedSharding:
  """Leading axis split over the rows' mesh axes."""
  return NamedSharding(mesh, layout.spec(("rows",)))


def pad_leading(tree: Any, multiple: int) -> Any:
  """Zeros at the end of every array's leading axis, up to a multiple."""
  return jax.tree.map(lambda x: np.pad(x, ((0, -len(x) % multiple), *((0, 0),) * (x.ndim - 1))), tree)


def to_global(tree: Any, sharding: NamedSharding) -> Any:
  """Arrays that every process has whole → global arrays, of which each process puts its devices' parts in place."""

  def place(x: Array) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  return jax.tree.map(place, tree)

"""Where arrays live: the mesh, layouts from logical axes to mesh axes, and global arrays from local parts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advgame_jax import config as config_lib
from advgame_jax.types import Array, UserError

AXES = ("data", "fsdp", "tensor")
MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The mesh axes that each logical axis is split over; `()` is replicated."""

  rows: MeshAxes = ()
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

  def local(self, f: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`f` of each device's part, given by the partitions of inputs and outputs; they may be prefixes of their trees."""
    return f if self == LOCAL else jax.shard_map(f, in_specs=inputs, out_specs=outputs, check_vma=False)


LOCAL = Layout()
TRAIN = Layout(rows=("data", "fsdp"), width=("fsdp",), heads=("tensor",), feed_forward=("tensor",), vocab=("tensor",))
# A decode step reads every weight once: gathering them layer by layer for each token would drown it.
DECODE_REPLICATED = Layout(rows=AXES)
DECODE_TENSOR = dataclasses.replace(TRAIN, width=())


def decode_layout(settings: config_lib.Mesh) -> Layout:
  """The layout a player generates in."""
  return {"replicated": DECODE_REPLICATED, "tensor": DECODE_TENSOR}[settings.decode]


def make_mesh(settings: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh `data × fsdp × tensor` over all devices.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [settings.data, settings.fsdp, settings.tensor]
  given = math.prod(size for size in sizes if size > 0)
  if sizes.count(-1) == 1 and len(devices) % given == 0:
    sizes[sizes.index(-1)] = len(devices) // given
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    raise UserError(
      f"mesh data={settings.data}, fsdp={settings.fsdp}, tensor={settings.tensor} does not fit {len(devices)} devices; "
      f"allowed: sizes whose product is {len(devices)}, one of them may be -1"
    )
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shards(mesh: Mesh, axes: MeshAxes) -> int:
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


def local_parts(mesh: Mesh, layout: Layout) -> int:
  """How many parts this process's rows are split into; their number must be a multiple of it."""
  return max(1, shards(mesh, layout.rows) // jax.process_count())


def pad_leading(tree: Any, multiple: int) -> Any:
  """Zeros at the end of every array's leading axis, up to a multiple."""
  return jax.tree.map(lambda x: np.pad(x, ((0, -len(x) % multiple), *((0, 0),) * (x.ndim - 1))), tree)


def to_global(tree: Any, sharding: NamedSharding) -> Any:
  """Each process's own rows → global arrays."""

  def place(x: Array) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, np.asarray(x))

  return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
  """Global arrays → this process's own rows, as numpy."""

  def fetch(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
      return np.asarray(x)
    parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    return np.concatenate([parts[start] for start in sorted(parts)])

  return jax.tree.map(fetch, tree)

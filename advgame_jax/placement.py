"""Where the roles live: a file of `configs/sharding/` becomes a mesh and two layouts for each of them.

Such a file is named by `config.sharding`, and its sizes may be changed by `config.mesh`. A role has one layout in which
it learns and one in which it generates, over the same devices: a step copies weights from one to the other once.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from advgame_jax import config as config_lib
from advgame_jax import sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.sharding import GENERATE_REPLICATED, TRAIN, Layout
from advgame_jax.types import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "sharding"
T = TypeVar("T")


class Roles(NamedTuple, Generic[T]):
  """One of each role; all local judges have the same."""

  attacker: T
  defender: T
  judge: T


@dataclasses.dataclass(frozen=True)
class Placement:
  """What a sharding file says of one role."""

  data: int = 1  # sizes of the mesh's axes; one may be −1 and takes what is left
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1
  train: Layout = TRAIN
  generate: Layout = GENERATE_REPLICATED
  devices: tuple[int, int | None] = (0, None)  # which of each host's: from, and up to but not with


class Place(NamedTuple):
  """Where one role lives."""

  mesh: Mesh
  train: Layout
  generate: Layout


def everywhere(plan: Placement) -> Roles[Placement]:
  """All roles alike, on the same devices."""
  return Roles(plan, plan, plan)


def read(named: str, devices: int, hosts: int) -> Roles[Placement]:
  """What a sharding file says for so many devices of so many hosts, or slices.

  Args:
    named: a file of `configs/sharding/` without its ending, or the path of another.

  Raises:
    UserError: there is no such file, or it does not say where the roles live.
  """
  path = pathlib.Path(named) if named.endswith(".py") else FOLDER / f"{named}.py"
  if not path.is_file():
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.py")))
    raise UserError(
      f"config.sharding is {named!r}, and there is no {path}; allowed: {known}, or the path of a .py file"
    )
  get_sharding = runpy.run_path(str(path)).get("get_sharding")
  roles = get_sharding(devices, hosts) if callable(get_sharding) else None
  if not isinstance(roles, Roles):
    raise UserError(f"{path} has no get_sharding(devices, hosts) that returns Roles; allowed: as {FOLDER / 'fsdp.py'}")
  return roles


def place(named: str, sizes: config_lib.Mesh, devices: Sequence[Any] | None = None) -> Roles[Place]:
  """Where the roles live on these devices, or on all there are. Roles on the same devices share their mesh.

  Raises:
    UserError: a mesh that does not fit, or devices that a host does not have.
  """
  devices = list(jax.devices() if devices is None else devices)
  hosts = by_host(devices)
  plans = (_resized(plan, sizes) for plan in read(named, len(devices), len(hosts)))
  meshes: dict[Any, Mesh] = {}

  def mesh(plan: Placement) -> Mesh:
    first, last = plan.devices
    chosen = [device for host in hosts for device in host[first:last]]
    if not all(host[first:last] for host in hosts):
      raise UserError(
        f"config.sharding {named!r} takes devices of each host from {first} on, which has {len(hosts[0])}; allowed: "
        "another file, or more devices"
      )
    wanted = (plan.data, plan.fsdp, plan.sequence, plan.tensor)
    made = sharding.make_mesh(wanted, chosen)
    return meshes.setdefault((tuple(made.shape.items()), tuple(chosen)), made)

  return Roles(*(Place(mesh(plan), plan.train, plan.generate) for plan in plans))


def describe(places: Roles[Place]) -> str:
  """The meshes in a few words, of each role where they differ."""
  words = lambda mesh: (
    f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
    + "".join(f", {axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  )
  if len({place.mesh for place in places}) == 1:
    return words(places.defender.mesh)
  return "; ".join(f"{role}: {words(place.mesh)}" for role, place in zip(Roles._fields, places))


def by_host(devices: Sequence[Any]) -> list[list[Any]]:
  """The devices of each slice, where there are several, else of each process."""
  slices = {getattr(device, "slice_index", 0) for device in devices}
  key = (lambda d: d.slice_index) if len(slices) > 1 else (lambda d: d.process_index)
  return [[device for device in devices if key(device) == host] for host in sorted(set(map(key, devices)))]


def check(where: Place, model: ModelConfig, sampling: config_lib.Sampling, name: str) -> None:
  """What a learning player's shapes must fit into, beside its parameters.

  Raises:
    UserError: tokens or heads that do not divide.
  """
  parts = sharding.shards(where.mesh, where.train.tokens)
  within = parts * sharding.shards(where.mesh, where.train.heads)
  for length in (*sampling.prompt_buckets, sampling.max_new_tokens):
    if length % parts:
      raise UserError(
        f"the {name}'s prompts or completions of {length} tokens do not divide over {'×'.join(where.train.tokens)} = "
        f"{parts} devices; allowed: prompt_buckets and max_new_tokens that do"
      )
  if parts > 1 and model.kv_heads % within:
    raise UserError(
      f"the {name} has {model.kv_heads} key heads, which attention splits over {within} devices where rows are split "
      f"by tokens; allowed: {', '.join(str(n) for n in range(1, within) if model.kv_heads % n == 0)}"
    )


def _resized(plan: Placement, sizes: config_lib.Mesh) -> Placement:
  """The sizes that settings change."""
  given = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
  return dataclasses.replace(plan, **{name: size for name, size in given.items() if size})

"""Where roles live: what every sharding file gives on any number of devices and hosts, and what is refused."""

import dataclasses
import itertools
import math
import random

import jax
import numpy as np
import pytest
import tiny

from advgame_jax import placement, sharding
from advgame_jax.config import Mesh, Sampling
from advgame_jax.placement import Place, Roles
from advgame_jax.types import UserError

PRESETS = sorted(path.stem for path in placement.FOLDER.glob("*.py"))
HEADS = dataclasses.replace(tiny.CONFIG, heads=12, kv_heads=6)
FILE = """
from advgame_jax.placement import Placement, Roles
from advgame_jax.sharding import GENERATE_TENSOR

def get_sharding(devices, hosts):
  half = devices // hosts // 2
  player = lambda *devices: Placement(fsdp=-1, devices=devices)
  return Roles(player(0, half), player(half, None), Placement(fsdp=-1, devices=(0, half), generate=GENERATE_TENSOR))
"""


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh asks of a device."""

  id: int
  process_index: int
  slice_index: int = 0
  platform: str = "cpu"
  device_kind: str = "stand-in"


def cluster(hosts, per_host, slices=1):
  """Devices of so many hosts, which are shared out evenly among slices."""
  return [Device(i, i // per_host, i * slices // (hosts * per_host)) for i in range(hosts * per_host)]


def place(preset, devices, **sizes):
  return placement.place(preset, Mesh(**sizes), devices)


def shape(where):
  return {axis: size for axis, size in where.mesh.shape.items() if size > 1}


def groups(mesh, axis):
  """The devices along one axis, for each place on the others."""
  number = mesh.axis_names.index(axis)
  return np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.devices.shape[number]).tolist()


@pytest.mark.parametrize("hosts,per_host", [(1, 1), (1, 4), (1, 8), (2, 4), (2, 8), (16, 4), (4, 6), (32, 8)])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("single", "apart")])
def test_roles_together_take_every_device(preset, hosts, per_host):
  devices = cluster(hosts, per_host)
  roles = place(preset, devices)
  assert roles.attacker == roles.defender == roles.judge
  assert sorted(device.id for device in roles.judge.mesh.devices.flat) == list(range(len(devices)))
  for axis in ("sequence", "tensor"):  # what is sent for every layer and token stays in a host
    assert all(len({device.process_index for device in group}) == 1 for group in groups(roles.judge.mesh, axis))


@pytest.mark.parametrize("hosts,per_host", [(1, 4), (1, 8), (2, 4), (2, 8), (16, 4), (4, 6)])
def test_roles_apart_take_every_device_once(hosts, per_host):
  roles = place("apart", cluster(hosts, per_host))
  used = [{device.id for device in where.mesh.devices.flat} for where in roles]
  assert sorted(itertools.chain(*used)) == list(range(hosts * per_host))
  assert len(used[0]) == len(used[1]) == hosts * max(1, per_host // 4)
  assert all({device.process_index for device in where.mesh.devices.flat} == set(range(hosts)) for where in roles)


def test_single_takes_one_device_of_one_host():
  roles = place("single", cluster(1, 8))
  assert [where.mesh.devices.size for where in roles] == [1, 1, 1]
  with pytest.raises(UserError, match=r"single.*one device.*2 hosts; allowed: .*ddp"):
    place("single", cluster(2, 4))


@pytest.mark.parametrize(
  "preset,devices,expected",
  [
    ("ddp", cluster(2, 4), {"data": 8}),
    ("fsdp", cluster(2, 4), {"fsdp": 8}),
    ("fsdp_tensor", cluster(2, 4), {"fsdp": 2, "tensor": 4}),
    ("fsdp_tensor", cluster(2, 6), {"fsdp": 6, "tensor": 2}),
    ("fsdp_tensor", cluster(3, 1), {"fsdp": 3}),
    ("fsdp", cluster(4, 4, slices=2), {"fsdp": 16}),
    ("hybrid", cluster(2, 4), {"data": 2, "fsdp": 4}),
    ("hybrid", cluster(4, 4, slices=2), {"data": 2, "fsdp": 8}),
    ("sequence", cluster(2, 8), {"fsdp": 4, "sequence": 4}),
  ],
)
def test_what_a_file_makes_of_devices(preset, devices, expected):
  assert shape(place(preset, devices).defender) == expected


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_hybrid_are_on_hosts_of_their_own_in_whatever_order_devices_come(seed):
  devices = cluster(4, 4)
  random.Random(seed).shuffle(devices)
  mesh = place("hybrid", devices).defender.mesh
  assert [{device.process_index for device in copy.flat} for copy in mesh.devices] == [{0}, {1}, {2}, {3}]


def test_copies_of_hybrid_are_on_slices_of_their_own():
  mesh = place("hybrid", cluster(4, 4, slices=2)).defender.mesh
  assert [{device.slice_index for device in copy.flat} for copy in mesh.devices] == [{0}, {1}]
  more = place("hybrid", cluster(4, 4, slices=2), data=4).defender.mesh
  assert [{device.slice_index for device in copy.flat} for copy in more.devices] == [{0}, {0}, {1}, {1}]


def test_devices_are_those_of_each_slice_or_else_of_each_process():
  assert [len(host) for host in placement.by_host(cluster(4, 4))] == [4] * 4
  assert [len(host) for host in placement.by_host(cluster(4, 4, slices=2))] == [8] * 2
  assert placement.by_host(jax.devices()) == [jax.devices()]


def test_settings_change_sizes_of_all_roles():
  assert shape(place("fsdp", cluster(2, 4), data=2).attacker) == {"data": 2, "fsdp": 4}
  assert shape(place("fsdp_tensor", cluster(1, 8), tensor=2).judge) == {"fsdp": 4, "tensor": 2}
  assert shape(place("ddp", cluster(1, 8), data=2, fsdp=-1).defender) == {"data": 2, "fsdp": 4}
  assert shape(place("sequence", cluster(1, 8), sequence=1).defender) == {"fsdp": 8}
  assert shape(place("apart", cluster(1, 16), data=2).attacker) == {"data": 2, "fsdp": 2}


def test_settings_of_zero_change_nothing():
  for preset, hosts in itertools.product(PRESETS, (1, 2)):
    if (preset, hosts) != ("single", 2):
      plans = placement.read(preset, 8, hosts)
      assert Roles(*(placement._resized(plan, Mesh()) for plan in plans)) == plans


def test_roles_on_the_same_devices_share_their_mesh_whatever_their_layouts(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(FILE)
  for devices in (cluster(2, 4), jax.devices()):
    attacker, defender, judge = place(str(path), devices)
    assert attacker.mesh is judge.mesh is not defender.mesh
    assert attacker.generate == sharding.GENERATE_REPLICATED != judge.generate == sharding.GENERATE_TENSOR
    assert not {*attacker.mesh.devices.flat} & {*defender.mesh.devices.flat}


def test_no_devices_given_are_all_there_are():
  assert {*placement.place("ddp", Mesh()).judge.mesh.devices.flat} == {*jax.devices()}


def written(folder, text):
  path = folder / "broken.py"
  path.write_text(text)
  return str(path)


def refusal(call):
  """One sentence."""
  with pytest.raises(UserError) as caught:
    call()
  text = str(caught.value)
  assert "; allowed: " in text and "\n" not in text
  return text


@pytest.mark.parametrize("named", ["", "fsdp2", "../ddp", "FSDP", "nowhere/mine.py", "fsdp.py"])
def test_a_file_that_is_not_there_is_refused_with_those_that_are(named):
  text = refusal(lambda: place(named, cluster(1, 8)))
  assert repr(named) in text and all(preset in text for preset in PRESETS)


@pytest.mark.parametrize(
  "text", ["", "get_sharding = 3", "def get_sharding(devices, hosts): return 8", "def get_shardings(d, h): return None"]
)
def test_a_file_that_does_not_say_where_roles_live_is_refused(tmp_path, text):
  path = written(tmp_path, text)
  assert f"{path} has no get_sharding(devices, hosts) that returns Roles" in refusal(lambda: place(path, cluster(1, 8)))


@pytest.mark.parametrize(
  "preset,sizes",
  [
    ("fsdp", {"fsdp": 3}),
    ("ddp", {"fsdp": 3}),
    ("fsdp", {"data": -1}),
    ("hybrid", {"tensor": 16}),
    ("single", {"data": 2}),
  ],
)
def test_sizes_that_do_not_fit_are_refused(preset, sizes):
  axis, size = next(iter(sizes.items()))
  text = refusal(lambda: place(preset, cluster(1, 8), **sizes))
  assert f"{axis}={size}" in text and "does not fit" in text


@pytest.mark.parametrize("hosts,per_host", [(1, 1), (1, 2), (4, 2)])
def test_a_host_with_too_few_devices_is_refused(hosts, per_host):
  text = refusal(lambda: place("apart", cluster(hosts, per_host)))
  assert f"from {min(2, per_host)} on, which has {per_host}" in text


def where(**sizes):
  mesh = sharding.make_mesh(
    dataclasses.astuple(dataclasses.replace(Mesh(1, 1, 1, 1), **sizes)), cluster(1, math.prod(sizes.values()))
  )
  return Place(mesh, sharding.TRAIN, sharding.GENERATE_REPLICATED)


@pytest.mark.parametrize(
  "sizes", [{"fsdp": 8}, {"sequence": 2}, {"sequence": 2, "tensor": 3}, {"sequence": 6}, {"tensor": 8}]
)
def test_shapes_that_fit(sizes):
  placement.check(where(**sizes), HEADS, Sampling(prompt_buckets=(12,), max_new_tokens=600), "defender")


@pytest.mark.parametrize(
  "sizes,lengths,said",
  [
    (
      {"sequence": 4},
      ((256, 258), 256),
      "prompts or completions of 258 tokens .* over sequence = 4 dev",
    ),
    ({"sequence": 4}, ((256,), 258), "prompts or completions of 258 tokens .* over sequence = 4 dev"),
    ({"sequence": 4}, ((256,), 256), "the defender has 6 key heads, .* over 4 devices .*; allowed: 1, 2, 3$"),
    (
      {"sequence": 2, "tensor": 4},
      ((256,), 256),
      "has 6 key heads, .* over 8 devices .*; allowed: 1, 2, 3, 6$",
    ),
  ],
)
def test_tokens_and_key_heads_that_do_not_divide_are_refused(sizes, lengths, said):
  sampling = Sampling(prompt_buckets=lengths[0], max_new_tokens=lengths[1])
  with pytest.raises(UserError, match=said):
    placement.check(where(**sizes), HEADS, sampling, "defender")

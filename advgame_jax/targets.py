"""Machines to compile for, whether or not they are there: `parse`, and their abstract devices.

    v5p:2x2x4   v5e-64   h100:8   h200:2x8   cpu:8   local

A program is lowered for a target's devices as for any others; compiling it needs the target's compiler, not the target.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
from jax.experimental import topologies

from advgame_jax import chips
from advgame_jax.chips import Chip
from advgame_jax.types import UserError

GPU_USABLE = 0.95  # of a card's memory, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: the rest is CUDA's context and NCCL's
CPU_USABLE = 0.9  # of a machine's memory: the rest is the operating system's

ALLOWED = (
  "v4|v5e|v5p|v6e with a topology (v5p:2x2x4, v5e:8x8) or as a slice is called (v5p-16 of 8 chips, v5e-64), "
  "h100|h100-pcie|h100-nvl|h200|b200|a100|a100-40|l40s with GPUs or hosts x GPUs (h100:8, h200:2x8), cpu:8, local"
)


class NoCompiler(UserError):
  """What compiles for a target is not installed."""


@dataclasses.dataclass(frozen=True)
class StandIn:
  """A device that nothing is compiled for."""

  id: int
  process_index: int
  platform: str = "stand-in"  # or "cpu"
  device_kind: str = "stand-in"


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices of one chip, in hosts of equally many."""

  name: str  # as it was asked for
  chip: Chip
  hosts: int
  per_host: int  # devices of a host
  capacity: float  # bytes of a device that a program's arguments, outputs and temporaries can have together
  topology: str = ""  # as its compiler calls it, "" of devices that are here

  @property
  def count(self) -> int:
    """Devices of all hosts."""
    return self.hosts * self.per_host

  def islands(self, devices: Any) -> list[int]:
    """Of each device, which of them it reaches by `Chip.link`: those of its slice, or else of its host."""
    return [getattr(d, "slice_index", None) or 0 if d.platform == "tpu" else d.process_index for d in devices]

  def stand_ins(self) -> list[StandIn]:
    """As many, on as many hosts."""
    platform = "cpu" if self.chip is chips.CPU else "stand-in"
    return [StandIn(i, i // self.per_host, platform) for i in range(self.count)]

  def devices(self) -> list[Any]:
    """Devices to compile for, in JAX's order; where the target is elsewhere, nothing can be put on them.

    Raises:
      NoCompiler: the compiler is not installed, with what mends it.
      UserError: this process has too few CPU devices, or the compiler does not know the topology.
    """
    if self.name == "local":
      return jax.devices()
    if self.chip is chips.CPU:
      return _cpus(self)
    return _tpus(self) if self.chip.name in _TPUS.values() else _gpus(self)


def parse(text: str) -> Target:
  """The target of a flag.

  Raises:
    UserError: it is none.
  """
  if text.lower() == "local":
    return _local()
  for pattern, make in _GRAMMAR:
    if match := re.fullmatch(pattern, text.lower()):
      return make(text, *match.groups())
  raise UserError(f"target {text!r} is none; allowed: {ALLOWED}")


_TPUS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5litepod": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}
_LARGEST = {"TPU v4": 4096, "TPU v5e": 256, "TPU v5p": 8960, "TPU v6e": 256}  # chips of a slice
_PLANE = ("TPU v5e", "TPU v6e")  # two dimensions, the others have three and two TensorCores a chip
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # the slices that can be had of them
_GPUS = {
  "h100": "H100 SXM",
  "h100-pcie": "H100 PCIe",
  "h100-nvl": "H100 NVL",
  "h200": "H200",
  "b200": "B200",
  "a100": "A100 80 GB",
  "a100-40": "A100 40 GB",
  "a100-80": "A100 80 GB",
  "l40s": "L40S",
}
_MOST_GPUS, _MOST_HOSTS = 8, 512
MOST_CPUS = 512  # devices that a process makes of its CPU


def _slice(text: str, generation: str, sizes: str) -> Target:
  """`v5p:2x2x4`."""
  name = _TPUS[generation]
  shape = tuple(map(int, sizes.split("x")))
  if name in _PLANE:
    there, allowed = sizes in _PLANES, ", ".join(_PLANES)
  else:  # hosts have 2 × 2 chips
    whole = math.prod(shape) == 1 or (min(shape) > 0 and shape[0] % 2 == shape[1] % 2 == 0)
    there = len(shape) == 3 and whole and math.prod(shape) <= _LARGEST[name]
    allowed = f"3 sizes, the first two even or all of them 1, with {_LARGEST[name]} chips at most"
  if not there:
    raise UserError(f"target {text!r}: no slice of {name} has this topology; allowed: {allowed}")
  per_host = min(4, math.prod(shape))
  chip = chips.named(name)
  called = f"{name.removeprefix('TPU ')}:{'x'.join(map(str, shape))}"
  return Target(text, chip, math.prod(shape) // per_host, per_host, _usable(chip), called)


def _slice_of(text: str, generation: str, number: str) -> Target:
  """`v5p-16`: of 16 TensorCores, 8 chips."""
  name = _TPUS[generation]
  chips_, odd = divmod(int(number), 1 if name in _PLANE else 2)
  if odd or chips_ & (chips_ - 1) or not 0 < chips_ <= _LARGEST[name] or (name not in _PLANE and chips_ < 4):
    unit = "its chips" if name in _PLANE else "its TensorCores, two a chip, 8 or more"
    raise UserError(
      f"target {text!r}: slices of {name} are called by the number of {unit}; allowed: powers of two of "
      f"{_LARGEST[name]} chips at most, or the topology, as {generation}:{'8x8' if name in _PLANE else '2x2x4'}"
    )
  return _slice(text, generation, "x".join(map(str, _shape(chips_, 2 if name in _PLANE else 3))))


def _shape(count: int, dimensions: int) -> list[int]:
  """The topology of a power of two of chips: as even as can be, smaller sizes first, but 2 × 2 × 1 is a host."""
  if (count, dimensions) == (4, 3):
    return [2, 2, 1]
  bits = count.bit_length() - 1
  return sorted(2 ** ((bits + i) // dimensions) for i in range(dimensions))


def _cards(text: str, kind: str, hosts: str | None, cards: str) -> Target:
  """`h100:8` or `h100:2x8`."""
  per_host, count = int(cards), int(hosts or 1)
  if not 0 < per_host <= _MOST_GPUS or not 0 < count <= _MOST_HOSTS:
    raise UserError(
      f"target {text!r}: {count} hosts of {per_host} GPUs; allowed: {kind}:1 to {kind}:{_MOST_GPUS}, or hosts x GPUs "
      f"up to {kind}:{_MOST_HOSTS}x{_MOST_GPUS}"
    )
  chip = chips.named(_GPUS[kind])
  return Target(text, chip, count, per_host, _usable(chip), f"1x{count}x{per_host}")


def _fake(text: str, number: str) -> Target:
  """`cpu:8`."""
  count = int(number)
  if not 0 < count <= MOST_CPUS:
    raise UserError(f"target {text!r}: {count} CPU devices; allowed: cpu:1 to cpu:{MOST_CPUS}")
  return Target(text, chips.CPU, 1, count, _machine_memory() / count)


_NUMBER = r"([0-9]{1,6})"
_GRAMMAR = (
  (rf"({'|'.join(_TPUS)}):([0-9]{{1,4}}(?:x[0-9]{{1,4}})+)", _slice),
  (rf"({'|'.join(_TPUS)})-{_NUMBER}", _slice_of),
  (rf"({'|'.join(_GPUS)}):(?:{_NUMBER}x)?{_NUMBER}", _cards),
  (rf"cpu:{_NUMBER}", _fake),
)


def _local() -> Target:
  """What this process has."""
  devices = jax.devices()
  kind, hosts, per_host = devices[0].device_kind, jax.process_count(), jax.local_device_count()
  if devices[0].platform == "cpu":
    return Target("local", chips.CPU, hosts, per_host, _machine_memory() / per_host)
  chip = chips.find(kind)
  if chip is None:
    raise UserError(f"target 'local': nothing is known of {kind!r}; allowed: {', '.join(c.name for c in chips.CHIPS)}")
  return Target("local", chip, hosts, per_host, _usable(chip))


def _usable(chip: Chip) -> float:
  return chip.memory if chip.name in _TPUS.values() else GPU_USABLE * chip.memory


def _machine_memory() -> float:
  return CPU_USABLE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpus() -> list[Any]:
  """This process's CPU devices; none where JAX_PLATFORMS names others alone."""
  try:
    return jax.devices("cpu")
  except (RuntimeError, AssertionError):  # the platforms that it names are not here either
    return []


def _cpus(target: Target) -> list[Any]:
  devices = cpus()
  if len(devices) < target.count:
    raise UserError(
      f"target {target.name!r} needs {target.count} CPU devices and this process has {len(devices)}; allowed: "
      f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={target.count} in the environment, before JAX starts"
    )
  return devices[: target.count]


# libtpu looks for a TPU when it is loaded: on this machine, at its cloud's metadata server, in other processes.
_NO_TPU_HERE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any: the topology is what counts
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _tpus(target: Target) -> list[Any]:
  shape = [int(size) for size in target.topology.partition(":")[2].split("x")]
  bounds = (*(min(2, size) for size in shape[:2]), 1)
  one_device_a_chip = {"chip_config_name": "megacore"} if target.chip.name == "TPU v4" else {}
  with _environment(_NO_TPU_HERE):
    try:
      return list(
        topologies.get_topology_desc(target.topology, "tpu", chips_per_host_bounds=bounds, **one_device_a_chip).devices
      )
    except Exception as error:
      if "not installed" not in str(error):
        raise UserError(f"target {target.name!r}: {_first_line(error)}; allowed: {ALLOWED}") from None
      raise NoCompiler(
        f"target {target.name!r} needs the compiler for TPUs, which is not installed; allowed: "
        f"pip install 'jax[tpu]=={jax.__version__}'"
      ) from None


def _gpus(target: Target) -> list[Any]:
  try:
    described = topologies.get_topology_desc(
      target.topology, "cuda", topology=target.topology, target_config=_description(target.chip)
    )
  except NotImplementedError:
    wanted = " ".join(f"jax-cuda13-{part}=={jaxlib.__version__}" for part in ("pjrt", "plugin"))
    raise NoCompiler(
      f"target {target.name!r} needs the compiler for CUDA, which is not installed; allowed: "
      f"pip install --no-deps {wanted}"
    ) from None
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"target {target.name!r}: {_first_line(error)}; allowed: {ALLOWED}") from None
  return list(described.devices)


def _first_line(error: Exception) -> str:
  return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
  """These variables where they have no value, and afterwards none again."""
  new = {name: value for name, value in values.items() if name not in os.environ}
  os.environ.update(new)
  try:
    yield
  finally:
    for name in new:
      os.environ.pop(name, None)


# A card as XLA's compiler asks for it: compute capability, multiprocessors, and by multiprocessor FP32 lanes, threads,
# bytes of shared memory, those of one block, then bytes of level-2 cache and GHz. NVIDIA's CUDA programming guide,
# "Compute Capabilities", and each architecture's white paper.
_CARDS = {
  "H100 PCIe": ("NVIDIA H100 PCIe", (9, 0), 114, 128, 2048, 233472, 232448, 52428800, 1.755),
  "H100 NVL": ("NVIDIA H100 NVL", (9, 0), 132, 128, 2048, 233472, 232448, 62914560, 1.785),
  "H100 SXM": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98),
  "H200": ("NVIDIA H200", (9, 0), 132, 128, 2048, 233472, 232448, 62914560, 1.98),
  "B200": ("NVIDIA B200", (10, 0), 148, 128, 2048, 233472, 232448, 132644864, 1.965),
  "A100 40 GB": ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41),
  "A100 80 GB": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41),
  "L40S": ("NVIDIA L40S", (8, 9), 142, 128, 1536, 102400, 101376, 100663296, 2.52),
}


def _description(chip: Chip) -> str:
  """XLA's GpuTargetConfigProto of a card, as text."""
  name, (major, minor), cores, lanes, threads, shared, shared_block, cache, clock = _CARDS[chip.name]
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
      core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock} l2_cache_size: {cache}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {int(chip.memory)}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 13 }}
    device_description_str: "{name}"
  """

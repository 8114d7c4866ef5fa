"""How long a program takes by what limits it: arithmetic, memory, or wires.

The longest of its terms is the estimate, `Estimate.total`: a compiler runs them beside each other. `Estimate.serial`,
their sum, is what it takes if nothing overlaps; the truth is between the two. On CPUs arithmetic and memory are one
term: 32 rows by a matrix take what it takes to read it, and what they take when it is in the caches.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import chips
from advgame_jax.chips import Chip
from advgame_jax.collectives import Collective

# What can be had of the peaks.
FLOPS = 0.6  # big bfloat16 products reach 0.7 to 0.8; what is between them has time, but no FLOPs that count
BANDWIDTH = 0.8  # of a long stream; the rest is refresh and turning the bus
LINK = 0.7  # of large collectives: rings start, end, and wait for their slowest device
NETWORK = 0.7
LATENCY = 10e-6  # seconds a collective takes at least; an order of magnitude

SECONDS = 0.2  # that each part of `measured` takes, about


class Estimate(NamedTuple):
  """Seconds of each term, of one device."""

  compute: float
  memory: float
  link: float  # inside a host or slice
  network: float  # between them

  @property
  def total(self) -> float:
    """Of the whole, if the terms overlap."""
    return max(self)

  @property
  def serial(self) -> float:
    """Of the whole, if nothing does."""
    return sum(self)

  @property
  def limit(self) -> str:
    """The term that is longest."""
    return max(zip(self, self._fields))[1]


def seconds(
  flops: float, bytes_moved: float, collectives: Iterable[Collective], chip: Chip, kernels: float = 0
) -> Estimate:
  """How long a program takes on a chip, of what one device does.

  Args:
    flops: of one device.
    bytes_moved: that it reads from and writes to its memory.
    collectives: of `collectives.of`. Those that cross islands take the network too: as many rings run beside each
      other as a group has devices on an island, each through its own device's port.
    chip: whose peaks count.
    kernels: that run one after the other, as far as they are too small to hide what each takes at least.
  """
  link = network = 0.0
  for one in collectives:
    link += one.times * max(LATENCY, one.sent / (LINK * chip.link))
    if one.crosses:
      network += one.times * max(LATENCY, one.sent / one.local / (NETWORK * chip.network))
  memory = bytes_moved / (BANDWIDTH * chip.bandwidth) + kernels * chip.kernel
  compute = flops / (FLOPS * chip.flops)
  if not chip.overlaps:  # one term, named after the longer
    both = compute + memory
    compute, memory = (both, 0.0) if compute > memory else (0.0, both)
  return Estimate(compute, memory, link, network)


def measured(devices: Sequence[jax.Device] | None = None) -> Chip:
  """A chip of this machine's CPU devices, by products, matrices read for a vector and a gather; about a second.

  Fake devices share one CPU: all of them work at a time, and each has its part of what that CPU can do. What was
  measured can be had, of which the fractions above are taken out again.
  """
  devices = list(devices or jax.devices())
  N, M, K, S = len(devices), 512, 2**12, 2**17
  mesh = jax.make_mesh((N,), ("x",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
  split, whole = jax.NamedSharding(mesh, jax.P("x")), jax.NamedSharding(mesh, jax.P())
  ones = jax.jit(jnp.ones, static_argnums=0, out_shardings=split)
  flops = 2 * M**3 / _seconds(jax.jit(lambda x: x @ x / M, donate_argnums=0, out_shardings=split), ones((N, M, M)))
  weights = ones((N, max(1, 2**26 // (N * K)), K))  # far more than caches hold, in all 256 MiB
  read = jax.jit(lambda weights, x: x / 2 + jnp.einsum("nik,nk->ni", weights, x).mean(1, keepdims=True) / K)
  bandwidth = 4 * weights.size / N / _seconds(functools.partial(read, weights), ones((N, K)))
  link = chips.CPU.link
  if N > 1:
    around = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, whole) + 1, donate_argnums=0, out_shardings=split)
    link = (N - 1) * 4 * S / _seconds(around, ones((N, S)))
  return dataclasses.replace(
    chips.CPU,
    name="this CPU",
    flops=flops / FLOPS,
    bandwidth=bandwidth / BANDWIDTH,
    link=link / LINK,
    network=link / NETWORK,
  )


def _seconds(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
  """The best time of a call with what the call before it made."""
  x = jax.block_until_ready(run(x))
  best, until = float("inf"), time.perf_counter() + SECONDS
  while time.perf_counter() < until:
    start = time.perf_counter()
    x = jax.block_until_ready(run(x))
    best = min(best, time.perf_counter() - start)
  return best

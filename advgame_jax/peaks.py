"""What the devices of a run can do at best: by the table of chips, or, of an unknown kind, by a measurement."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import chips

_ENOUGH = 0.05  # seconds that a product takes, to be no matter of overheads
_SIZES = (256, 512, 1024, 2048, 4096)


class Peak(NamedTuple):
  """Of all devices of a run together."""

  flops: float  # per second, of products of matrices
  bandwidth: float | None  # bytes per second from memory, where known
  source: str  # the chip's name, or what was measured


@functools.lru_cache(maxsize=16)
def of_devices(devices: tuple[jax.Device, ...], dtype: Any) -> Peak:
  """The peak of them all. An unknown kind is measured once, in a fraction of a second, in `dtype`."""
  kind, count = devices[0].device_kind, len(devices)
  chip = chips.find(kind)
  if chip:
    return Peak(chip.flops * count, chip.bandwidth * count, chip.name)
  return Peak(_measure(devices, dtype), None, f"products of matrices in {jnp.dtype(dtype).name}, measured on {kind}")


def _measure(devices: tuple[jax.Device, ...], dtype: Any) -> float:
  """FLOPs per second of all devices at once: devices of one processor share it."""
  own = [device for device in devices if device.process_index == jax.process_index()]
  best = 0.0
  for size in _SIZES:
    matrices = [jax.device_put(jnp.ones((size, size), dtype), device) for device in own]
    product = jax.jit(jnp.matmul)
    jax.block_until_ready([product(x, x) for x in matrices])
    seconds = []
    for _ in range(3):
      begun = time.perf_counter()
      jax.block_until_ready([product(x, x) for x in matrices])
      seconds.append(time.perf_counter() - begun)
    best = max(best, 2 * size**3 * len(own) / min(seconds))
    if min(seconds) * 8 > _ENOUGH:  # the next size takes eight times as long
      break
  return best * len(devices) / len(own)

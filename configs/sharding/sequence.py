"""Long context: the tokens of a row split over the devices of a host, up to four; attention splits heads instead.

The key heads must divide by as many. Weights are split over all devices, as by fsdp.
"""

from advgame_jax.placement import Placement, Roles, everywhere


def get_sharding(devices: int, hosts: int) -> Roles[Placement]:
  sequence = next(size for size in (4, 2, 1) if (devices // hosts) % size == 0)
  return everywhere(Placement(fsdp=-1, sequence=sequence))

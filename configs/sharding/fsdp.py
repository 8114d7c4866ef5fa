"""Weights, gradients, moments and averages split over all devices, gathered a layer at a time while a step learns.

Players and judge generate with whole weights on each device.
"""

from advgame_jax.placement import Placement, Roles, everywhere


def get_sharding(devices: int, hosts: int) -> Roles[Placement]:
  return everywhere(Placement(fsdp=-1))

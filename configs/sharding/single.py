"""One device, whatever else there is: for a small model, or to compare with."""

from advgame_jax.placement import Plan, Roles, everywhere


def get_sharding(devices: int, hosts: int) -> Roles[Plan]:
  return everywhere(Plan(devices=(0, 1)))

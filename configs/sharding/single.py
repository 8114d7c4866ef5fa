"""One device, whatever else there is: for a small model, or to compare with."""

from advgame_jax.placement import Placement, Roles, everywhere
from advgame_jax.types import UserError


def get_sharding(devices: int, hosts: int) -> Roles[Placement]:
  if hosts > 1:
    raise UserError(f"config.sharding 'single' uses one device, and there are {hosts} hosts; allowed: one, or 'ddp'")
  return everywhere(Placement(devices=(0, 1)))

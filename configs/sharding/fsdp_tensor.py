"""As fsdp, and heads, feed-forward and vocabulary split over up to four devices of a host, which generate so too.

For models whose whole weights do not fit one device beside the rest.
"""

from advgame_jax.placement import Placement, Roles, everywhere
from advgame_jax.sharding import GENERATE_TENSOR


def get_sharding(devices: int, hosts: int) -> Roles[Placement]:
  tensor = next(size for size in (4, 2, 1) if (devices // hosts) % size == 0)
  return everywhere(Placement(fsdp=-1, tensor=tensor, generate=GENERATE_TENSOR))

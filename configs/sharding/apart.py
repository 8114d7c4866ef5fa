"""Each role on devices of its own: a quarter of each host's for either player, half for the judge.

Both players are updated at the same time. The judge is split over its half by heads.
"""

from advgame_jax.placement import Placement, Roles
from advgame_jax.sharding import GENERATE_TENSOR


def get_sharding(devices: int, hosts: int) -> Roles[Placement]:
  quarter = max(1, devices // hosts // 4)
  player = lambda place: Placement(fsdp=-1, devices=(place * quarter, (place + 1) * quarter))
  judge = Placement(data=-1, tensor=min(4, quarter), generate=GENERATE_TENSOR, devices=(2 * quarter, None))
  return Roles(player(0), player(1), judge)

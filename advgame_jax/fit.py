"""The fastest settings that fit a target: many estimated without a compiler, the best few compiled."""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from advgame_jax import config as config_lib
from advgame_jax import panel, placement, plan_page, sharding
from advgame_jax import plan as plan_lib
from advgame_jax.chips import Chip
from advgame_jax.config import Config
from advgame_jax.placement import Place, Roles
from advgame_jax.plan import Plan
from advgame_jax.targets import Target
from advgame_jax.types import Players, UserError

log = logging.getLogger(__name__)
SHARDINGS = ("ddp", "fsdp", "fsdp_tensor", "hybrid")
TENSORS = (0, 2, 8)  # of a sharding that has the axis; 0 is its own
REMATS = ("layer", "products", "none")
NODES = (1, 2, 4)  # of a micro-batch, on each part of the rows: a pair each, or GRPO's samples of a prompt
JUDGE_BATCHES = (1, 4)  # times the config's
COMPILED, SHOWN = 4, 12  # at most


class Change(NamedTuple):
  """What a candidate has otherwise than the config."""

  sharding: str
  tensor: int
  remat: Any  # as `config.Precision` has it
  nodes: int  # of a micro-batch
  judge_batches: int  # the judges' batch, times this


class Candidate(NamedTuple):
  """One way to run."""

  flags: Mapping[str, Any]  # of launch/run.py, beside the config's
  config: Config  # so changed
  plan: Plan
  compiled: bool = False

  def __str__(self) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in self.flags.items())


def search(config: Config, target: Target, completion_tokens: float = 0, console: Console | None = None) -> Plan:
  """The fastest plan that fits, compiled where the target's compiler is there; of none that fits, the smallest.

  Prints what was tried.

  Raises:
    UserError: no sharding can lay this config out, or it cannot be planned at all.
  """
  devices, missing = plan_lib.devices_of(target)
  chip = plan_lib.chip_of(target, devices)
  tried = _by_turns(sorted(candidates(config, target, completion_tokens, chip), key=_rank))
  best = tried[0]
  for place in range(0 if missing else min(COMPILED, len(tried))):
    one = tried[place]
    log.info("compiling %s", one)
    made = plan_lib.make(one.config, target, completion_tokens, chip)
    tried[place] = one._replace(plan=made, compiled=True)
    best = tried[place] if not place else min(best, tried[place], key=_rank)
    if best.plan.fits and place + 1 < len(tried) and _rank(tried[place + 1]) > _rank(best):
      break  # what is still to come is slower even by its estimate
  _show(tried, best, console or plan_page.plain_console())
  return best.plan._replace(notes=[*best.plan.notes, *([missing] if missing else [])])


def candidates(config: Config, target: Target, completion_tokens: float, chip: Chip) -> Iterator[Candidate]:
  """Every way that can be laid out, estimated; of those that come to the same, the first.

  Raises:
    UserError: there is none; what the first of them, nearest to the config, was refused for.
  """
  seen, refusals = set(), list[UserError]()
  for name in dict.fromkeys((config.sharding, *SHARDINGS)):
    tensors = TENSORS if "tensor" in name else (0,)
    judges = JUDGE_BATCHES if any(judge.kind == "model" for judge in _judges(config).values()) else (1,)
    for change in itertools.starmap(Change, itertools.product((name,), tensors, REMATS, NODES, judges)):
      try:
        places, flags, changed = _changed(config, target, change)
        laid = tuple(place if place.mesh.size > 1 else place.mesh for place in places)  # one device has but one layout
        same = (laid, changed.precision, changed.attacker.accumulate, changed.defender.accumulate, changed.judges)
        if same not in seen:
          yield Candidate(flags, changed, plan_lib.estimate(changed, target, completion_tokens, chip))
          seen.add(same)
      except UserError as error:
        log.debug("%s: %s", name, error)
        refusals.append(error)
  if not seen:
    raise refusals[0]


def _by_turns(tried: list[Candidate]) -> list[Candidate]:
  """The best of each sharding first: where estimates err, they err alike for one sharding."""
  firsts = {one.flags["sharding"]: one for one in reversed(tried)}
  return sorted(tried, key=lambda one: one is not firsts[one.flags["sharding"]])


def _changed(config: Config, target: Target, change: Change) -> tuple[Roles[Place], dict[str, Any], Config]:
  """Where its roles live, the flags that change the config so, and the config so changed."""
  mesh = dataclasses.replace(config.mesh, tensor=change.tensor) if change.tensor else config.mesh
  places = placement.place(change.sharding, mesh, target.stand_ins())
  counts = Players(config.data.batch, config.data.batch * config.game.attacks_per_seed)
  flags: dict[str, Any] = {"sharding": change.sharding, "precision.remat": change.remat}
  flags |= {"mesh.tensor": change.tensor} if change.tensor else {}
  for role, place, nodes in zip(Players._fields, places, counts):
    parts = sharding.shards(place.mesh, place.train.rows)
    flags[f"{role}.accumulate"] = math.ceil(nodes / parts / change.nodes)
  for role, judge in _judges(config).items():
    if judge.kind == "model" and change.judge_batches > 1:
      flags[f"judges.{role}.batch"] = judge.batch * change.judge_batches
  values = dataclasses.asdict(config)
  for name, value in flags.items():
    *groups_, last = name.split(".")
    functools.reduce(dict.__getitem__, groups_, values)[last] = value
  return places, flags, config_lib.from_config_dict(values)


def _judges(config: Config) -> dict[str, config_lib.Judge]:
  return {role: getattr(config.judges, role) for role in panel.SETTINGS}


def _rank(candidate: Candidate) -> tuple[float, float]:
  """What fits first, the fastest first; of what does not, the smallest."""
  plan = candidate.plan
  return (0, plan.seconds) if plan.fits else (1, plan.peak.bytes)


def _show(tried: list[Candidate], best: Candidate, console: Console) -> None:
  columns = list(dict.fromkeys(name for one in tried for name in one.flags))
  table = Table(*columns, "GiB", "fits", "seconds", "by", "limit", box=box.MARKDOWN)
  for one in sorted(tried, key=lambda one: (not one.compiled, _rank(one)))[:SHOWN]:
    slowest = max(one.plan.costs, key=lambda cost: cost.estimate.total)
    table.add_row(
      *(str(one.flags.get(name, "")) for name in columns),
      plan_page.gib(one.plan.peak.bytes),
      "yes" if one.plan.fits else "no",
      plan_page.number(one.plan.seconds),
      "compiler" if one.compiled else "estimate",
      f"{slowest.work.name} ({slowest.estimate.limit})",
    )
  compiled, shown = sum(one.compiled for one in tried), min(SHOWN, len(tried))
  found = "The best" if best.plan.fits else "None fits; what comes nearest"
  plan_page.printed(
    console,
    f"{len(tried)} ways estimated, {compiled or 'none'} compiled; the first {shown} (empty: as it is):",
    table,
    f"{found}: {best}",
  )

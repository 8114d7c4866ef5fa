"""A plan for its reader: tables of what stays, what it takes, what is sent, and the verdict."""

import re
from collections.abc import Iterator

import jax
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from advgame_jax.plan import GIB, Plan


def show(plan: Plan, price: float = 0, console: Console | None = None) -> None:
  """Prints it; `price`: of a device's hour."""
  tables = filter(None, (_stays(plan), _memory(plan), _times(plan), _wires(plan)))
  printed(console or plain_console(), *_what(plan), *tables, *_verdict(plan, price))


def plain_console() -> Console:
  """For text with brackets in it, and tables as wide as they are."""
  return Console(width=180, soft_wrap=True, markup=False, highlight=False)


def printed(console: Console, *parts: RenderableType) -> None:
  """Without the blanks that fill tables."""
  with console.capture() as captured:
    console.print(Group(*parts))
  text = re.sub(r" +$", "", captured.get(), flags=re.MULTILINE)
  console.file.write(re.sub(r"\n{3,}", "\n\n", text))


def number(x: float) -> str:
  """Three digits, or all before the point."""
  return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def gib(x: float) -> str:
  """Bytes in GiB."""
  return f"{x / GIB:.2f}" if x >= 0.1 * GIB else f"{x / GIB:.2g}"


def _what(plan: Plan) -> Iterator[str]:
  target, config = plan.target, plan.blueprint.config
  mesh = ", ".join(f"{axis}={size}" for axis, size in plan.blueprint.places.defender.mesh.shape.items() if size > 1)
  yield (
    f"{target.name}: {target.count} × {target.chip.name}, {target.capacity / GIB:.1f} GiB usable of each; "
    f"sharding {config.sharding} ({mesh or 'one device'}), {config.precision.compute}, remat {config.precision.remat}, "
    f"accumulate {config.attacker.accumulate} and {config.defender.accumulate}; jax {jax.__version__}"
  )
  yield from (f"Note: {note}." for note in plan.notes)


def _stays(plan: Plan) -> Table:
  stays = _table("stays on a device", "GiB", "during")
  for held in plan.blueprint.held:
    if held.bytes:
      stays.add_row(held.what, gib(held.bytes), ", ".join(sorted(held.during)))
  return stays


def _memory(plan: Plan) -> Table:
  memory = _table("memory of a device, GiB", "stays", "adds", "peak", "of capacity")
  for peak in plan.peaks:
    of_capacity = f"{peak.bytes / plan.target.capacity:.0%}"
    memory.add_row(peak.what, *map(gib, (peak.held, peak.added, peak.bytes)), of_capacity)
  return memory


def _times(plan: Plan) -> Table:
  times = _table("a step, of a device", "TFLOP", "GB moved", "sent in / across hosts, GB", "seconds", "limit", "from")
  for cost in plan.costs:
    scale = cost.work.runs * cost.work.trips
    sent = [sum(one.bytes for one in cost.collectives if one.crosses == crosses) for crosses in (False, True)]
    times.add_row(
      cost.work.name,
      f"{cost.work.flops * scale / 1e12:.3g}",
      f"{cost.work.moved * scale / 1e9:.3g}",
      f"{sent[0] / 1e9:.3g} / {sent[1] / 1e9:.3g}",
      f"{cost.estimate.total:.3g}",
      cost.estimate.limit,
      cost.source,
    )
  return times


def _wires(plan: Plan) -> Table | None:
  wires = _table("collectives of a step, of a device", "devices", "times", "GB sent", "across")
  for (name, kind, count, crosses), (times, total) in _kinds(plan).items():
    across = "hosts" if crosses else "links"
    wires.add_row(f"{name}: {kind}", str(count), f"{times:,.0f}", f"{total / 1e9:.3g}", across)
  return wires if wires.rows else None


def _verdict(plan: Plan, price: float) -> Iterator[str]:
  long = [cost for cost in plan.costs if cost.estimate.total > 0.2 * plan.seconds]
  limits = [f"{cost.work.name} ({cost.estimate.limit})" for cost in long]
  yield (
    f"A step: {number(plan.seconds)} s ({number(plan.serial)} if nothing overlaps), "
    f"{plan.blueprint.drawn / plan.seconds:,.0f} tokens drawn a second; most of it: {', '.join(limits)}."
  )
  hours = plan.device_hours
  paid = f", {hours * price:,.0f} at {price:g} an hour" if price else ""
  evaluations = f"{plan.blueprint.evaluations} evaluations of {number(plan.evaluation_seconds)} s"
  yield (
    f"The run: {plan.blueprint.config.steps:,} steps and {evaluations}, {number(hours / plan.target.count)} h, "
    f"{number(hours)} device-hours{paid}."
  )
  twice = max(peak.held + 2 * peak.added for peak in plan.peaks)
  said = f" By estimates: a compiler's temporaries have been up to twice as large, {gib(twice)} GiB with what stays."
  estimated = said if plan.estimated else ""
  fits = f"fits: {gib(plan.peak.bytes)} GiB of {plan.target.capacity / GIB:.1f}, in {plan.peak.what}"
  yield f"It {fits if plan.fits else plan.why_not()}.{estimated}"


def _table(first: str, *columns: str) -> Table:
  table = Table(first, box=box.MARKDOWN)
  for column in columns:
    table.add_column(column, justify="right")
  return table


def _kinds(plan: Plan) -> dict[tuple[str, str, int, bool], tuple[float, float]]:
  """(program, kind, devices, crosses) → times and bytes of a step; those under a thousandth of all are left out."""
  found: dict[tuple[str, str, int, bool], tuple[float, float]] = {}
  for cost in plan.costs:
    for one in cost.collectives:
      key = (cost.work.name, one.kind, one.devices, one.crosses)
      times, total = found.get(key, (0.0, 0.0))
      found[key] = (times + one.times, total + one.bytes)
  all_ = sum(total for _, total in found.values())
  return {key: value for key, value in found.items() if value[1] > all_ / 1000}

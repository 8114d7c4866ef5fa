"""Small line charts as inline SVG that takes its colours and font from the page around it.

Matplotlib draws with placeholder colours, one per name of `COLORS`; each is then replaced by the page's CSS variable,
so that one drawing is legible in light and in dark. The same numbers give the same bytes.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = ("attacker", "defender", "third", "fourth", "fifth", "ink", "muted", "rule", "paper")
_PLACEHOLDER = {name: f"#fe{index:02x}ef" for index, name in enumerate(COLORS)}
_STYLE: Any = {
  "svg.fonttype": "none",
  "svg.hashsalt": "advgame",
  "font.size": 9,
  "lines.linewidth": 1.6,
  "text.color": _PLACEHOLDER["muted"],
  "axes.labelcolor": _PLACEHOLDER["muted"],
  "axes.edgecolor": _PLACEHOLDER["rule"],
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": _PLACEHOLDER["rule"],
  "grid.linewidth": 0.7,
  "xtick.color": _PLACEHOLDER["muted"],
  "ytick.color": _PLACEHOLDER["muted"],
  "xtick.major.size": 0,
  "ytick.major.size": 0,
}
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
_SIZE = (4.4, 2.55)  # inches
_POINTS = 100  # a line of more is drawn as means of neighbours


@dataclasses.dataclass(frozen=True)
class Line:
  """One series of a chart, and its entry in the legend that the page writes."""

  label: str
  color: str  # of `COLORS`
  x: np.ndarray
  y: np.ndarray  # NaN is a gap
  dashed: bool = False
  base: float = math.nan  # what a dashed level marks: the value before training


@dataclasses.dataclass(frozen=True)
class Point:
  """Two fractions with what is known of their errors: (low, value, high), NaN where there is none."""

  label: str
  color: str  # of `COLORS`
  x: tuple[float, float, float]
  y: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawing with what the page says about it."""

  title: str
  note: str
  lines: tuple[Line, ...]
  svg: str


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of the rows that have `name`; what is no finite number is NaN."""
  found = [(row["step"], row[name]) for row in rows if name in row]
  x, y = zip(*found) if found else ((), ())
  finite = [value if isinstance(value, (int, float)) and math.isfinite(value) else math.nan for value in y]
  return np.array(x, np.float64), np.array(finite, np.float64)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most `_POINTS` means of neighbours, of an even number each, since harmful and benign steps may take turns."""
  if len(x) <= _POINTS // 5:
    return x, y
  size = 2 * math.ceil(len(x) / (2 * _POINTS))
  starts = range(0, len(x), size)
  return _means(x, starts, size), _means(y, starts, size)


def _means(values: np.ndarray, starts: Sequence[int], size: int) -> np.ndarray:
  groups = [values[start : start + size] for start in starts]
  return np.array([group[np.isfinite(group)].mean() if np.isfinite(group).any() else math.nan for group in groups])


def line_chart(title: str, note: str, lines: Sequence[Line], percent: bool, cap: bool = False) -> Chart | None:
  """Series over steps, or None if none has a value.

  `cap` leaves outliers, such as a first step that compiles, above the upper edge.
  """
  lines = [line for line in lines if np.isfinite(line.y).any()]
  if not lines:
    return None
  with matplotlib.rc_context(_STYLE):
    figure, axes = _figure(percent)
    for line in lines:
      x, y = thinned(line.x, line.y)
      color = _PLACEHOLDER[line.color]
      marker, stroke = "o" if len(x) <= 25 and not line.dashed else "", (0, (2, 1.6)) if line.dashed else "-"
      axes.plot(x, y, color=color, linestyle=stroke, marker=marker, markersize=3)
      if math.isfinite(line.base):
        axes.axhline(line.base, color=color, linestyle=(0, (4, 3)), linewidth=0.9, alpha=0.7)
    first, last = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    if first == last:
      axes.set_xlim(first - 1, last + 1)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
    if percent:
      axes.set_ylim(*_fraction_limits(np.concatenate([[line.base, *line.y] for line in lines])))
    elif cap:
      axes.set_ylim(0, _upper(lines))
    return Chart(title, note, tuple(lines), _svg(figure, title))


def plane(title: str, note: str, lines: Sequence[Line], x_label: str, y_label: str) -> Chart | None:
  """Trajectories in a plane of two fractions, from a hollow first point to a filled last one; None without a point."""
  lines = [line for line in lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
  if not lines:
    return None
  with matplotlib.rc_context(_STYLE):
    figure, axes = _figure(percent=True)
    for line in lines:
      here = np.isfinite(line.x) & np.isfinite(line.y)
      x, y, color = line.x[here], line.y[here], _PLACEHOLDER[line.color]
      axes.plot(x, y, color=color, linewidth=1.1, marker="o", markersize=2.2, clip_on=False)
      axes.plot(x[-1], y[-1], color=color, marker="o", markersize=6.5, clip_on=False)
      axes.plot(x[0], y[0], color=color, marker="o", markersize=6.5, fillstyle="full", clip_on=False,
                markerfacecolor=_PLACEHOLDER["paper"], markeredgewidth=1.4)  # fmt: skip
    _frame(axes, np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines]))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return Chart(title, note, tuple(lines), _svg(figure, title))


def points(
  title: str, note: str, found: Sequence[Point], x_label: str, y_label: str, levels: Sequence[tuple[str, float]] = ()
) -> Chart | None:
  """Points in a plane of two fractions, with bars of error; None without a point.

  Args:
    levels: (label, y) of dotted lines across.
  """
  found = [point for point in found if math.isfinite(point.x[1]) and math.isfinite(point.y[1])]
  if not found:
    return None
  with matplotlib.rc_context(_STYLE):
    figure, axes = _figure(percent=True)
    for point in found:
      color = _PLACEHOLDER[point.color]
      axes.errorbar(point.x[1], point.y[1], xerr=_bars(point.x), yerr=_bars(point.y), color=color, marker="o",
                    markersize=6, elinewidth=1.1, capsize=2.5)  # fmt: skip
    for _, y in levels:
      axes.axhline(y, color=_PLACEHOLDER["muted"], linewidth=0.9, linestyle=":")
    heights = [*(y for point in found for y in point.y), *(y for _, y in levels)]
    _frame(axes, np.array([point.x for point in found]), np.array(heights))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    nowhere = np.zeros(0)
    across = [Line(label, "muted", nowhere, nowhere, dashed=True) for label, _ in levels]
    legend = [Line(point.label, point.color, np.array(point.x[1:2]), np.array(point.y[1:2])) for point in found]
    return Chart(title, note, (*legend, *across), _svg(figure, title))


def _bars(interval: tuple[float, float, float]) -> list[list[float]]:
  low, value, high = interval
  return [[np.nan_to_num(max(value - low, 0.0))], [np.nan_to_num(max(high - value, 0.0))]]


def _frame(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
  axes.xaxis.set_major_formatter(_PERCENT)
  axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
  axes.set_xlim(*_fraction_limits(x))
  axes.set_ylim(*_fraction_limits(y))


def _figure(percent: bool) -> tuple[Figure, Axes]:
  figure = Figure(figsize=_SIZE, layout="constrained")
  axes = figure.add_subplot()
  figure.patch.set_visible(False)
  axes.patch.set_visible(False)
  axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
  if percent:
    axes.yaxis.set_major_formatter(_PERCENT)
  return figure, axes


def _fraction_limits(values: np.ndarray) -> tuple[float, float]:
  top = float(np.nanmax(values))
  return -0.02 * max(top, 0.05), max(1.08 * top, 0.05)


def _upper(lines: Sequence[Line]) -> float:
  return 1.25 * max(float(np.nanpercentile(thinned(line.x, line.y)[1], 95)) for line in lines) or 1.0


def _svg(figure: Figure, title: str) -> str:
  """The figure as an element for an HTML page: no size, no namespace, no shared ids, no style of its own."""
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg")
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
  view = re.search(r'viewBox="[^"]*"', text)
  assert view, "matplotlib writes a viewBox"
  text = re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{html.escape(title)}" {view.group()}>', text, count=1)
  own = re.sub(r"\W+", "-", title.lower())
  text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", text).replace("xlink:href", "href")
  text = re.sub(r"font-family: [^;]*; ", "", text)
  for name, color in _PLACEHOLDER.items():
    text = text.replace(color, f"var(--{name})")
  return text

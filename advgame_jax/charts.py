"""Which charts a run's page and a campaign's have, and what each shows; a chart without data is left out."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from advgame_jax import plots
from advgame_jax.plots import Chart, Line, Point, series

Rows = Sequence[Mapping[str, Any]]  # lines of scalars.jsonl or evaluations.jsonl
PLAYERS = ("attacker", "defender")
ERRORS = {
  "max_length": ("too long", "third"),
  "parsing": ("unparseable", "attacker"),
  "refused_role": ("refused its role", "fourth"),
  "not_faithful": ("unfaithful", "defender"),
  "judge_failed": ("judge failed", "fifth"),
}


# Read in a note on the paper's third version, not in the paper itself.
PUBLISHED = (("Qwen2.5-7B-Instruct (paper)", 0.316), ("the same after AdvGame-DPO-MD (paper)", 0.047))


class Section(NamedTuple):
  """A heading and its charts."""

  title: str
  charts: list[Chart]


def sections(scalars: Rows, evaluations: Rows) -> list[Section]:
  """Every chart that has data."""
  all_of = {
    "Safety and helpfulness": _evaluation_charts(evaluations),
    "Play": _play_charts(scalars),
    "Learning": _learning_charts(scalars),
    "Time": _time_charts(scalars),
  }
  made = [Section(title, [chart for chart in found if chart]) for title, found in all_of.items()]
  return [section for section in made if section.charts]


def _line(rows: Rows, name: str, label: str, color: str, dashed: bool = False, base: bool = False) -> Line:
  x, y = series(rows, name)
  return Line(label, color, x, y, dashed, float(y[0]) if base and len(x) and x[0] == 0 else math.nan)


def _evaluation_charts(evaluations: Rows) -> Iterator[Chart | None]:
  def line(*arguments: Any) -> Line:
    return _line(evaluations, *arguments)

  yield plots.line_chart(
    "Attack success",
    "Attacker v Defender, on harmful seeds.",
    [
      line("attack_success", "trained v trained", "attacker"),
      line("attack_success_base_defender", "trained v base", "fourth"),
      line("base_attack_success", "base v trained", "defender"),
      line("base_attack_success_base_defender", "base v base", "muted", True),
    ],
    percent=True,
  )
  yield plots.line_chart(
    "Worst case and over-refusal",
    "Any attack at all succeeding; benign seeds refused. Thin dashes mark the base.",
    [
      line("worst_case", "worst case", "attacker", False, True),
      line("worst_case_held_out", "… held out", "attacker", True),
      line("over_refusal", "over-refusal", "defender", False, True),
      line("over_refusal_held_out", "… held out", "defender", True),
    ],
    percent=True,
  )
  yield plots.line_chart(
    "How harmful seeds are met",
    "Responses of the Defender on harmful seeds.",
    [
      line("deflection", "deflection", "fifth", False, True),
      line("refusal", "bare refusal", "third", False, True),
      line("gibberish", "gibberish", "muted", False, True),
    ],
    percent=True,
  )


def plane(evaluations: Rows) -> Chart | None:
  """Safety against helpfulness, from the base to the latest evaluation."""
  return plots.plane(
    "Safety against helpfulness",
    "From the base (hollow) to the trained Defender (filled); the lower left is best.",
    [
      _trajectory(evaluations, "worst_case", "worst case", "muted"),
      _trajectory(evaluations, "attack_success", "attack success", "attacker"),
    ],
    "over-refusal",
    "harmful seeds answered",
  )


def _trajectory(evaluations: Rows, name: str, label: str, color: str) -> Line:
  both = [row for row in evaluations if name in row and "over_refusal" in row]
  return Line(label, color, series(both, "over_refusal")[1], series(both, name)[1])


Intervals = Mapping[tuple[str, str], tuple[float, float, float]]
"""(low, value, high) by judge and a rate's name, over all suites; NaN where nothing could be told."""


def trade_off(
  rates: Intervals, judges: Sequence[str], beside: Mapping[str, Intervals] = MappingProxyType({})
) -> Chart | None:
  """Success against over-refusal: a point for each judge and number of tries.

  Args:
    beside: other campaigns' rates by their names, such as the base's.
  """
  found = _points(rates, judges)
  for name, others in beside.items():
    of_first = _points(others, list(dict.fromkeys(judge for judge, _ in others))[:1])
    found += [(f"{name}: {label}", x, y) for label, x, y in of_first]
  colors = itertools.cycle(("attacker", "defender", "third", "fourth", "fifth"))
  return plots.points(
    "Safety against helpfulness",
    "With 95 % intervals; the lower left is best. Dotted, for orientation alone: attack success on HarmBench by "
    "GPT-4o, as the AdvGame paper has it (2512.20806).",
    [Point(name, color, x, y) for color, (name, x, y) in zip(colors, found)],
    "over-refusal",
    "harmful seeds answered",
    PUBLISHED,
  )


def _points(rates: Intervals, judges: Sequence[str]) -> list[tuple[str, Any, Any]]:
  """(name, over-refusal, success) by judge and number of tries."""
  tries = {name.removeprefix("success") for _, name in rates if name.startswith("success")}
  found = [
    (judge, k, rates[judge, f"success{k}"], refused)
    for judge in judges
    for k in sorted(tries, key=lambda k: (len(k), k))
    if (judge, f"success{k}") in rates and (refused := _over_refusal(rates, judge, k))
  ]
  names = [judge + (f", best of {k[1:]}" if k not in ("", "@1") else "") for judge, k, *_ in found]
  return [(name, x, y) for name, (*_, y, x) in zip(names, found)]


def _over_refusal(rates: Intervals, judge: str, k: str) -> Any:
  """Of as many tries; one try is also what nobody attacked."""
  return rates.get((judge, f"over_refusal{k}")) or (rates.get((judge, "over_refusal")) if k == "@1" else None)


def _play_charts(scalars: Rows) -> Iterator[Chart | None]:
  kinds = {"harmful": 1.0, "benign": 0.0}
  split = {kind: [row for row in scalars if row.get("harmful") == value] for kind, value in kinds.items()}
  rewards = [(f"Rewards, {kind} seeds", rows) for kind, rows in split.items()]
  for title, rows in rewards if all(split.values()) else [("Rewards", scalars)]:
    yield plots.line_chart(title, "Mean reward of a step: judge scores 0–10, errors −1.",
                           _both(rows, "reward/{}"), percent=False)  # fmt: skip
  for kind, plural in (("attack", "attacks"), ("response", "responses")):
    lines = [_line(scalars, f"play/{kind}_{name}", label, color) for name, (label, color) in ERRORS.items()]
    yield plots.line_chart(f"Errors of {plural}", f"Fraction of a step's {plural}.", lines, percent=True)
  yield plots.line_chart("Judge disagreement", "Mean difference of a score when a pair is shown in the other order.",
                         _both(scalars, "judge/disagreement_{}"), percent=False)  # fmt: skip
  trouble = [
    ("unreadable", "calls without a readable verdict", "third"),
    ("talk", "texts that talk to a judge", "fifth"),
    ("talk_moved", "of such talk, what moves a verdict", "attacker"),
  ]
  yield plots.line_chart("Judges in trouble", "Fractions of a step's calls, and of its valid attacks and responses.",
                         [_line(scalars, f"judge/{name}", label, color) for name, label, color in trouble],
                         percent=True)  # fmt: skip
  yield plots.line_chart("What talking to the judge earns", "Points, of 10, that such talk adds to a neutral text.",
                         [_line(scalars, "judge/talk_gain", "gain", "third")], percent=False)  # fmt: skip


def _learning_charts(scalars: Rows) -> Iterator[Chart | None]:
  for name, title, note in (
    ("loss", "Loss", "Of the preferences or advantages of a step."),
    ("accuracy", "Accuracy", "Pairs whose chosen sample the player prefers more than the reference does."),
    ("margin", "Margin", "Log-ratio of chosen over rejected, against the reference, in nats."),
    ("kl", "KL", "Distance from the reference, in nats."),
    ("grad_norm", "Gradient norm", "Before the clip."),
    ("comparisons", "Comparisons", "Pairs or samples that a step learned from; ties and failures weigh nothing."),
    ("skipped", "Skipped steps", "Steps without a comparison or with gradients that were not finite."),
    ("learning_rate", "Learning rate", "Of the step."),
  ):
    lines = _both(scalars, f"{{}}/{name}")
    if name != "skipped" or any(np.nansum(line.y) > 0 for line in lines):
      yield plots.line_chart(title, note, lines, percent=name in ("accuracy", "skipped"))


def _time_charts(scalars: Rows) -> Iterator[Chart | None]:
  colors = {"generate": "attacker", "judge": "third", "update": "defender"}
  for title, note, prefix in (
    ("Seconds a step", "By phase; the first steps, which compile, may lie above the edge.", "seconds"),
    ("Tokens a second", "Generated, and trained on.", "tokens_per_second"),
  ):
    lines = [_line(scalars, f"{prefix}/{phase}", phase, color) for phase, color in colors.items()]
    yield plots.line_chart(title, note, lines, percent=False, cap=True)


def _both(rows: Rows, pattern: str) -> list[Line]:
  return [_line(rows, pattern.format(player), player.capitalize(), player) for player in PLAYERS]

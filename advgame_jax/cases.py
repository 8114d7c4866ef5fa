"""One call of a judge that reads, in words: what it is shown, and how its verdict is read. Players' text is hostile.

A case is known by a ticket: six digits drawn from the question's key until no text of the case contains them, in any
script or spacing. Every marker carries it, so that no text can close its own; so does the verdict, so that one which a
text holds, and a judge quotes, is none.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from advgame_jax.prompts import THINK_END, visible
from advgame_jax.rubrics import EXAMPLE_TICKET, Readout, Rubrics, Shape, ask, shape_of
from advgame_jax.types import BEST, Category, Question, Role, fold_key

_KEPT = "\n\t\u200c\u200d"  # joiners are part of words in some scripts
# What chat templates and reasoning models are controlled by; a space inside makes it ordinary text to any of them.
_CONTROL = re.compile(
  r"<(?=[|\uff5c][^<>]{1,60}>|/?(?:s|think|bos|eos|pad|unk|(?:start|end)_of_turn|tool_\w{1,20})\s*>|</?SYS>>)"
  r"|\[(?=/?[A-Z_]{3,30}\])",
  re.IGNORECASE,
)

Scores = tuple[float, ...]
"""One for each text of a question, 0–10 (faithfulness: 0–1), or none at all where there is no readable verdict."""


class Case(NamedTuple):
  """A question in words. Instructions are the same for many; a judge model reads them once."""

  instructions: str
  text: str
  read: Callable[[str], Scores]  # the judge's whole answer → scores
  labels: tuple[tuple[str, ...], ...]  # readout by probability: the spellings of each possible answer
  weigh: Callable[[Sequence[float]], Scores]  # the labels' probabilities → scores


def put(question: Question, rubrics: Rubrics, *, think: bool, readout: Readout, limits: Sequence[int]) -> Case:
  """The question as a case, of whose query and texts at most `limits` characters are shown.

  By probability, a text that is compared with itself is asked for its score: the comparison would always be even.
  """
  if readout == "probability" and len(question.texts) == 2 and question.texts[0] == question.texts[1]:
    alone = put(question._replace(texts=question.texts[:1]), rubrics, think=think, readout=readout, limits=limits)
    return alone._replace(weigh=lambda probability: alone.weigh(probability) * 2)
  shape = shape_of(question)
  shown = [show(text, limit) for text, limit in zip((question.query, *question.texts), limits)]
  ticket = draw_ticket(shown, question.key)
  names = ["QUERY", *(("TEXT A", "TEXT B") if shape == "pair" else ("TEXT",))]
  whole = map(len, (question.query, *question.texts))
  notes = [
    f", cut: {n} characters in all" if n > limit or len(s) >= limit else "" for n, s, limit in zip(whole, shown, limits)
  ]
  blocks = "\n".join(
    f"[{ticket}] {name}{note}\n{text}\n[{ticket}] END OF {name}\n" for name, note, text in zip(names, notes, shown)
  )
  return Case(
    instructions=rubrics.instructions(question.role, question.category, shape, think, readout),
    text=f"\n\n# The case\n\n{blocks}\n{ask(ticket, shape, think, readout)}",
    read=lambda answer: read(answer, shape, ticket, think, shown),
    labels=_LABELS[shape],
    weigh=_WEIGH[shape],
  )


def version(rubrics: Rubrics) -> str:
  """A hash of everything a judge is told that no player wrote."""
  roles = [(role, category) for role in Role for category in Category]
  texts = lambda role: [("",)] if role == Role.FAITHFULNESS else [("",), ("", " ")]
  ways: tuple[tuple[bool, Readout], ...] = ((False, "score"), (True, "score"), (False, "probability"))
  told = [
    "".join(put(Question(role, category, "", these, 0), rubrics, think=think, readout=way, limits=(9, 9, 9))[:2])
    for role, category in roles
    for these in texts(role)
    for think, way in ways
  ]
  return hashlib.blake2b("\0".join(told).encode(), digest_size=6).hexdigest()


def show(text: str, limit: int) -> str:
  """A text as a judge sees it, in at most `limit` characters.

  What cannot be seen is written out, for a judge must not read what a person looking at the transcript would not; and
  control strings are broken, for a judge's server makes tokens of them, and a reasoning judge that quotes one must not
  seem to have ended its reasoning.
  """
  return _CONTROL.sub(lambda match: match[0] + " ", visible(text[:limit], _KEPT))[:limit]


def draw_ticket(texts: Sequence[str], key: int) -> str:
  """Six digits that do not stand in the texts, whatever lies between them."""
  digits = [_digits(text) for text in texts]
  attempt = 0
  while True:
    ticket = f"{100_000 + fold_key(key, attempt) % 900_000}"
    if ticket != EXAMPLE_TICKET and not any(ticket in d for d in digits):
      return ticket
    attempt += 1


def _digits(text: str) -> str:
  """The digits of a text, of every script, in their order."""
  values = (unicodedata.digit(character, None) for character in unicodedata.normalize("NFKC", text))
  return "".join(str(value) for value in values if value is not None)


def read(answer: str, shape: Shape, ticket: str, think: bool, shown: Sequence[str] = ()) -> Scores:
  """The scores of an answer; () if there is no verdict.

  A verdict is what follows the word and the ticket; the last one that can be read counts. A judge that forgets them is
  read too if its whole answer is a verdict, and is none of the players' own words. A judge that thinks has decided
  nothing before its reasoning ends, and nobody but the judge can end it: see `show`.
  """
  if think:
    _, ended, answer = answer.partition(THINK_END)
    if not ended:
      return ()
  answer = _MARKUP.sub("", unicodedata.normalize("NFKC", answer))
  verdicts = [scores for rest in _after_markers(answer, ticket) if (scores := _READ[shape](rest, False))]
  if verdicts:
    return verdicts[-1]
  quoted = len(_squeeze(answer)) > 3 and any(_squeeze(answer) in _squeeze(text) for text in shown)
  return () if quoted else _READ[shape](_NAME.sub("", answer.strip(" \n.!")), True)


def _after_markers(answer: str, ticket: str) -> Iterator[str]:
  """What follows each marker of a verdict, up to the next."""
  markers = list(re.finditer(rf"verdict[^\w\n]{{0,9}}(?:on\s+)?(?:case\s+)?{ticket}\b", answer, re.IGNORECASE))
  ends = [marker.start() for marker in markers[1:]]
  for marker, end in zip(markers, [*ends, len(answer)]):
    yield answer[marker.end() : end]


def _squeeze(text: str) -> str:
  """A text without what a quotation of it may change: case, spaces, markup."""
  return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


_MARKUP = re.compile(r"[*_`~]|</?(?:b|i|em|strong|code|p)>", re.IGNORECASE)
_NAME = re.compile(r"^\W*(?:final\s+)?(?:verdict|answer)\s*:?", re.IGNORECASE)
_LEAD = r"[\s:=>\]).]*(?:(?:final\s+)?(?:scores?|rating)\s*(?:\([^)\n]{0,20}\))?[\s:=]*)?"
_NUMBER = r"(\d{1,3}(?:[.,]\d+)?)"
# A score stays on its line: the next may quote a text, and a text that begins "-0" would make a range of it.
_SCORE = rf"{_NUMBER}(?:[ \t]*(?:-|–|—|to)[ \t]*{_NUMBER})?(?:[ \t]*(?:/|out[ \t]+of|of)[ \t]*{_NUMBER})?(?![\d%/])"
_LABEL = r"(?:(?:text|response|score)\s+)?\(?{}\)?\s*(?:is|=|:|\s)\s*"
_BETWEEN = r"(?:\s*[,;|]\s*|\s+and\s+|\s+)"
_SINGLE = re.compile(_LEAD + _SCORE, re.IGNORECASE)
_LABELLED = {
  order: re.compile(
    f"{_LEAD}{_LABEL.format(order[0])}{_SCORE}\\.?{_BETWEEN}{_LABEL.format(order[1])}{_SCORE}", re.IGNORECASE
  )
  for order in ("AB", "BA")
}
_PLAIN = re.compile(f"{_LEAD}{_SCORE}{_BETWEEN}{_SCORE}", re.IGNORECASE)
_DECISION = re.compile(r"[\s:=>\]).<\"'(]*(yes|no)\b[\s>)\"'.!]*(?:$|[\n,;:(–—-])", re.IGNORECASE)


def _match(pattern: re.Pattern[str], rest: str, whole: bool) -> re.Match[str] | None:
  return pattern.fullmatch(rest) if whole else pattern.match(rest)


def _read_pair(rest: str, whole: bool) -> Scores:
  """The scores that a text begins with, or is, of A and of B, in whatever order they are named."""
  for order, pattern in _LABELLED.items():
    if match := _match(pattern, rest, whole):
      return _checked((_value(match, 1), _value(match, 4))[:: 1 if order == "AB" else -1])
  match = _match(_PLAIN, rest, whole)
  return _checked((_value(match, 1), _value(match, 4))) if match else ()


def _read_single(rest: str, whole: bool) -> Scores:
  match = _match(_SINGLE, rest, whole)
  return _checked((_value(match, 1),)) if match else ()


def _read_decision(rest: str, whole: bool) -> Scores:
  match = _match(_DECISION, rest, whole)
  return (float(match[1].lower() == "yes"),) if match else ()


def _value(match: re.Match[str], first: int) -> float:
  """A number, the middle of a range, or tenths; NaN, which no score is, for parts of anything else."""
  low, high, of = (float(part.replace(",", ".")) if part else None for part in match.groups()[first - 1 : first + 2])
  if of not in (None, BEST) or low is None:
    return float("nan")
  return low if high is None else (low + high) / 2


def _checked(scores: Scores) -> Scores:
  return scores if all(0 <= score <= BEST for score in scores) else ()


_READ: dict[Shape, Callable[[str, bool], Scores]] = {
  "decision": _read_decision,
  "pair": _read_pair,
  "single": _read_single,
}
_LABELS: dict[Shape, tuple[tuple[str, ...], ...]] = {
  "decision": (("no", "n"), ("yes", "y")),
  "pair": (("a",), ("b",)),
  "single": tuple((str(digit),) for digit in range(10)),
}
MOST_LABELS = max(map(len, _LABELS.values()))
LEAST_MASS = 0.01  # of the labels together, below which a model has answered something else


def _by_mass(weigh: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sequence[float]], Scores]:
  """Scores by the labels' shares of their mass; () where there is next to none."""

  def scores(probability: Sequence[float]) -> Scores:
    mass = float(np.sum(probability))
    return tuple(map(float, weigh(np.asarray(probability) / mass))) if mass >= LEAST_MASS else ()

  return scores


_WEIGH: dict[Shape, Callable[[Sequence[float]], Scores]] = {
  "decision": _by_mass(lambda share: share[1:]),
  "pair": _by_mass(lambda share: BEST * share),
  "single": _by_mass(
    lambda share: share @ (np.arange(10) + 0.5)[:, None]
  ),  # a digit stands for the scores down from the next
}

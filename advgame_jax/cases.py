"""One call of a judge that reads, in words: what it is shown, and how its verdict is read. Players' text is hostile.

A case is known by a ticket: six digits drawn from the question's key until no text of the case contains them, in any
script or spacing. Every marker carries it, so that no text can close its own; so does the verdict, so that one which a
text holds, and a judge quotes, is none.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from advgame_jax.prompts import THINK_END, visible
from advgame_jax.rubrics import EXAMPLE_TICKET, Readout, Rubrics, Shape, ask, shape_of
from advgame_jax.types import Question, fold_key

BEST = 10.0
_LETTERS = ("A", "B")
_KEPT = "\n\t\u200c\u200d"  # joiners are part of words in some scripts

Scores = tuple[float, ...]
"""One for each text of a question, 0–10 (faithfulness: 0–1), or none at all where there is no readable verdict."""


class Case(NamedTuple):
  """A question in words. Instructions are the same for many; a judge model reads them once."""

  instructions: str
  text: str
  read: Callable[[str], Scores]  # the judge's whole answer → scores
  labels: tuple[tuple[str, ...], ...]  # readout by probability: the spellings of each possible answer
  weigh: Callable[[Sequence[float]], Scores]  # the labels' probabilities, of any sum → scores


def put(question: Question, rubrics: Rubrics, *, think: bool, readout: Readout, characters: int) -> Case:
  """The question as a case, of each of whose texts at most so many `characters` are shown."""
  shape = shape_of(question)
  shown = [show(text, characters) for text in (question.query, *question.texts)]
  ticket = draw_ticket([text for text, _ in shown], question.key)
  names = ["QUERY", *(("TEXT A", "TEXT B") if shape == "pair" else ("TEXT",))]
  blocks = [
    f"[{ticket}] {name}{f', cut after {characters} of {whole} characters' if whole > characters else ''}\n"
    f"{text}\n[{ticket}] END OF {name}\n"
    for name, (text, whole) in zip(names, shown, strict=True)
  ]
  written = [text for text, _ in shown]
  return Case(
    instructions=rubrics.instructions(question.role, question.category, shape, think, readout),
    text="\n\n# The case\n\n" + "\n".join(blocks) + "\n" + ask(ticket, shape, think, readout),
    read=lambda answer: read(answer, shape, ticket, think, written),
    labels=_LABELS[shape],
    weigh=_WEIGH[shape],
  )


def show(text: str, characters: int) -> tuple[str, int]:
  """The beginning of a text as a judge sees it, and the length of the whole.

  What cannot be seen is written out: a judge must not read what a person looking at the transcript would not.
  """
  return visible(text[:characters], _KEPT), len(text)


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


def read(answer: str, shape: Shape, ticket: str, think: bool, written: Sequence[str] = ()) -> Scores:
  """The scores of an answer; () if there is no verdict.

  A verdict is the last line that has the word and the ticket. A judge that forgets one of them is read too, unless its
  line stands in what the players wrote. A judge that thinks has decided nothing before its reasoning ends.
  """
  if think:
    _, ended, answer = answer.partition(THINK_END)
    if not ended:
      return ()
  answer = unicodedata.normalize("NFKC", answer).replace(",", " , ")
  marked = [match[1] for match in re.finditer(rf"verdict\W{{0,9}}{ticket}\b[^\w\n]*([^\n]*)", answer, re.IGNORECASE)]
  verdicts = [scores for line in marked if (scores := _READ[shape](line))]
  if verdicts:
    return verdicts[-1]
  lines = [line for line in answer.splitlines() if line.strip()]
  quotations = [_squeeze(text) for text in written]
  for line in reversed(lines):
    said = re.sub(rf"^\W*(?:(?:final|verdict|scores?|answer|case|{ticket})\b\W*)+", "", line, flags=re.IGNORECASE)
    quoted = len(_squeeze(line)) > 3 and any(_squeeze(line) in text for text in quotations)
    if (said != line or (len(lines) == 1 and _BARE.match(line))) and not quoted and (scores := _READ[shape](said)):
      return scores
  return ()


def _squeeze(text: str) -> str:
  """A text without what a quotation of it may change: case, spaces, markup."""
  return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


_BARE = re.compile(r"\W*(?:text\s+)?(?:[AB]\b|\d|yes\b|no\b)", re.IGNORECASE)  # a verdict and nothing around it
_NUMBER = r"(\d{1,3}(?:\.\d+)?)"
_SCORE = rf"(?<![\d.\-–]){_NUMBER}(?:\s*(?:-|–|—|to)\s*{_NUMBER})?(?:\s*(?:/|out\s+of|of)\s*{_NUMBER})?(?![\d%])"
_MARKUP = re.compile(r"[*_`~]|</?[a-z]+>", re.IGNORECASE)


def _read_scores(line: str, count: int) -> Scores:
  line = _MARKUP.sub(" ", line)
  found = [re.search(rf"\b{letter}\b[^\w\n.\-–]*(?:is\s+)?{_SCORE}", line) for letter in _LETTERS[:count]]
  if count == 1 or not all(found):
    every: list[re.Match[str] | None] = list(re.finditer(_SCORE, line))
    found = every[:1] if count == 1 else every if len(every) == count else []
  scores = tuple(_value(match) for match in found if match)
  return scores if len(scores) == count and all(0 <= score <= BEST for score in scores) else ()


def _value(match: re.Match[str]) -> float:
  """A number, the middle of a range, or tenths; NaN, which no score is, for parts of anything else."""
  low, high, of = (float(part) if part else None for part in match.groups())
  if of not in (None, BEST) or low is None:
    return float("nan")
  return low if high is None else (low + high) / 2


def _read_decision(line: str) -> Scores:
  match = re.match(r"[^\w\n]*(yes|no)\b", _MARKUP.sub(" ", line), re.IGNORECASE)
  return ({"yes": 1.0, "no": 0.0}[match[1].lower()],) if match else ()


_READ: dict[Shape, Callable[[str], Scores]] = {
  "decision": _read_decision,
  "pair": lambda line: _read_scores(line, 2),
  "single": lambda line: _read_scores(line, 1),
}
_DIGITS = tuple((str(digit),) for digit in range(10))
MOST_LABELS = len(_DIGITS)
_LABELS: dict[Shape, tuple[tuple[str, ...], ...]] = {
  "decision": (("no", "n"), ("yes", "y")),
  "pair": (("a",), ("b",)),
  "single": _DIGITS,
}


def _weigh_decision(probability: Sequence[float]) -> Scores:
  no, yes = probability
  return (yes / (no + yes),)


def _weigh_pair(probability: Sequence[float]) -> Scores:
  a, b = probability
  return (BEST * a / (a + b), BEST * b / (a + b))


def _weigh_single(probability: Sequence[float]) -> Scores:
  total = sum(probability)
  return (sum(digit * p for digit, p in enumerate(probability)) / total * BEST / 9,)


_WEIGH: dict[Shape, Callable[[Sequence[float]], Scores]] = {
  "decision": _weigh_decision,
  "pair": _weigh_pair,
  "single": _weigh_single,
}

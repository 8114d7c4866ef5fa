"""A language model of ours as a judge: it reads its instructions once a run, and then only cases.

Questions are put into words, grouped by their instructions, and read in batches of one shape. Its verdict is what it
writes, or how likely it is to begin with each possible answer, which takes no generation at all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from advgame_jax import architecture
from advgame_jax import config as config_lib
from advgame_jax.cases import MOST_LABELS, Case, Scores
from advgame_jax.guards import RawCase
from advgame_jax.model import Prompt
from advgame_jax.policies import LanguageModel, pad_rows
from advgame_jax.types import Params, Question, UserError, Verdict, fold_key

_SLOTS = 64  # the length of the longest instructions is rounded up to a multiple of it
_LEAST_SHOWN = 50  # characters of a text, below which a case that does not fit is given up


class Put(Protocol):
  """A question in words, with at most so many characters of each text."""

  def __call__(self, question: Question, *, characters: int) -> Case | RawCase: ...


class Call(NamedTuple):
  """A case as tokens. Those of its instructions are not in `ids`, unless they are not kept."""

  instructions: str
  ids: list[int]
  case: Case | RawCase


@dataclasses.dataclass(frozen=True, eq=False)
class ModelJudge:
  """`Judge` of a frozen model. Its weights are read when it is first asked.

  What it says of a question depends on the question, its key and the weights: not on the calls beside it.
  """

  player: LanguageModel
  load: Callable[[], Params]  # in the player's decode layout
  put: Put
  instructions: Sequence[str]  # all that `put` gives
  settings: config_lib.Judge
  reuse: bool = True  # keep the cache of the instructions; without, they are read again with every case

  def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
    calls = [self._encode(question) for question in questions]
    verdicts = [Verdict(())] * len(calls)
    for places in self._batches(calls):
      answered = self._answer([calls[i] for i in places], [questions[i].key for i in places])
      for i, verdict in zip(places, answered, strict=True):
        verdicts[i] = verdict
    return verdicts

  def warm_up(self) -> None:
    """Compiles every shape that a call can take."""
    for bucket in self._buckets:
      self._ask(self.instructions[0] if self.reuse and self.instructions else "", [], [], bucket, [])

  def check(self, name: str) -> None:
    """Refuses a model or settings that no case fits.

    Raises:
      UserError: the positions of the model, or its buckets.
    """
    slots = self._slots if self.reuse else 0
    longest = slots + self._buckets[-1] + self.player.sampling.max_new_tokens
    if longest > self.player.model.max_positions:
      raise UserError(
        f"{name}: instructions, the longest case and its answer take {longest} tokens, the model has "
        f"{self.player.model.max_positions} positions; allowed: sampling.prompt_buckets + max_new_tokens up to "
        f"{self.player.model.max_positions - slots}"
      )

  @functools.cached_property
  def params(self) -> Params:
    return self.load()

  @functools.cached_property
  def _prefix_ids(self) -> dict[str, list[int]]:
    return {text: self.player.tokenizer.encode_turn(text, "")[0] for text in self.instructions}

  @functools.cached_property
  def _slots(self) -> int:
    longest = max(map(len, self._prefix_ids.values()), default=0)
    return longest + -longest % _SLOTS

  @functools.cached_property
  def _prefixes(self) -> dict[str, Prompt]:
    """The instructions that have been read so far."""
    return {}

  @property
  def _buckets(self) -> list[int]:
    extra = 0 if self.reuse else self._slots
    return [bucket + extra for bucket in self.player.sampling.prompt_buckets]

  def _prefix(self, instructions: str) -> Prompt | None:
    if not instructions:
      return None
    if instructions not in self._prefixes:
      ids = self._prefix_ids[instructions]
      self._prefixes[instructions] = self.player.read_prefix(self.params, ids, self._slots)
    return self._prefixes[instructions]

  def _encode(self, question: Question) -> Call:
    """The question as tokens that fit: of texts that are long in tokens, less is shown."""
    characters = self.settings.text_characters
    while True:
      call = self._tokens(self.put(question, characters=characters))
      if len(call.ids) <= self._buckets[-1] or characters < _LEAST_SHOWN:
        return call
      characters //= 2

  def _tokens(self, case: Case | RawCase) -> Call:
    words = self.player.tokenizer
    if isinstance(case, RawCase):
      return Call("", words.encode_parts(case.parts), case)
    head, ids = words.encode_turn(case.instructions, case.text)
    return Call(case.instructions, ids, case) if self.reuse else Call("", head + ids, case)

  def _batches(self, calls: Sequence[Call]) -> Iterator[list[int]]:
    """Places of calls that are asked together: the same instructions, the shorter ones first. None too long."""
    fitting = [i for i, call in enumerate(calls) if len(call.ids) <= self._buckets[-1]]
    for instructions in dict.fromkeys(calls[i].instructions for i in fitting):
      places = sorted((i for i in fitting if calls[i].instructions == instructions), key=lambda i: len(calls[i].ids))
      for start in range(0, len(places), self.settings.batch):
        yield places[start : start + self.settings.batch]

  def _answer(self, calls: Sequence[Call], keys: Sequence[int]) -> list[Verdict]:
    longest = max(len(call.ids) for call in calls)
    bucket = next(size for size in self._buckets if size >= longest)
    ids, cases = [call.ids for call in calls], [call.case for call in calls]
    return self._ask(calls[0].instructions, ids, keys, bucket, cases)

  def _ask(
    self,
    instructions: str,
    ids: Sequence[list[int]],
    keys: Sequence[int],
    bucket: int,
    cases: Sequence[Case | RawCase],
  ) -> list[Verdict]:
    """One batch on the device, filled up with rows that are absent."""
    prefix = self._prefix(instructions)
    absent: list[list[int]] = [[]] * (self.settings.batch - len(ids))
    tokens_RT, length_R = pad_rows([*ids, *absent], bucket)
    if self.settings.readout == "probability":
      scores, written = self._weigh(tokens_RT, length_R, prefix, cases), [0] * len(cases)
    else:
      place_R = np.array([*(fold_key(key, 0) % 2**32 for key in keys), *(0 for _ in absent)], np.uint32)
      scores, written = self._read(tokens_RT, length_R, place_R, prefix, cases)
    read = [len(row) for row in ids]
    before = len(self._prefix_ids[instructions]) if instructions else 0
    flops = [architecture.forward_flops(self.player.model, n + w, before + n + w) for n, w in zip(read, written)]
    return [Verdict(s, n + w, f) for s, n, w, f in zip(scores, read, written, flops)]

  def _read(
    self,
    tokens_RT: np.ndarray,
    length_R: np.ndarray,
    place_R: np.ndarray,
    prefix: Prompt | None,
    cases: Sequence[Case | RawCase],
  ) -> tuple[list[Scores], list[int]]:
    """The mean over J votes of what could be read, and tokens written."""
    J = self.settings.votes
    drawn = self.player.draw(self.params, tokens_RT, length_R, length_R > 0, place_R, J, jax.random.key(0), prefix)
    decode, scores = self.player.tokenizer.decode, []
    for r, case in enumerate(cases):
      rows = [row for row in range(r * J, r * J + J) if drawn.stopped_R[row]]
      answers = [decode(drawn.tokens_RT[row, : drawn.length_R[row]].tolist()) for row in rows]
      votes = [read for answer in answers if (read := case.read(answer))]
      scores.append(tuple(np.mean(votes, 0).tolist()) if votes else ())
    return scores, drawn.length_R.reshape(-1, J).sum(-1)[: len(cases)].tolist()

  def _weigh(
    self, tokens_RT: np.ndarray, length_R: np.ndarray, prefix: Prompt | None, cases: Sequence[Case | RawCase]
  ) -> list[Scores]:
    """Scores by the probabilities of the next token; the cases of one batch have the same labels."""
    labels = next((case.labels for case in cases if isinstance(case, Case)), ())
    logprob_RC = self.player.next_token(self.params, tokens_RT, length_R, self._first_tokens(labels), prefix)[
      :, : len(labels)
    ]
    # Relative to the likeliest label: how likely the others together are does not matter.
    weight_RC = np.exp(logprob_RC - logprob_RC.max(-1, keepdims=True, initial=-np.inf))
    return [case.weigh(weight_C.tolist()) if isinstance(case, Case) else () for case, weight_C in zip(cases, weight_RC)]

  @functools.cached_property
  def _first_tokens(self) -> Callable[[tuple[tuple[str, ...], ...]], np.ndarray]:
    """Labels → bool [C, V], which tokens are which of them. C is that of most, so that one program serves all."""
    words = [text.strip().casefold() for text in self.player.tokenizer.token_texts()]

    @functools.cache
    def table(labels: tuple[tuple[str, ...], ...]) -> np.ndarray:
      table_CV = np.zeros((MOST_LABELS, self.player.model.vocab), bool)
      for row_V, spellings in zip(table_CV, labels):
        row_V[: len(words)] = [word in spellings for word in words]
      return table_CV

    return table

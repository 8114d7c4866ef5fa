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
from advgame_jax.cases import MOST_LABELS, Case, Scores, show
from advgame_jax.guards import RawCase
from advgame_jax.model import Prompt
from advgame_jax.policies import LanguageModel, pad_rows
from advgame_jax.types import Params, Question, UserError, Verdict, fold_key

_SLOTS = 64  # the length of the longest instructions is rounded up to a multiple of it


class Put(Protocol):
  """A question in words, with at most `limits` characters of its query and texts."""

  def __call__(self, question: Question, *, limits: Sequence[int]) -> Case | RawCase: ...


class Call(NamedTuple):
  """A case as tokens: those of its instructions, if it has any, are not in `ids`."""

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
  examples: Sequence[Question]  # one of every kind that may be asked
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
    for bucket in self.player.sampling.prompt_buckets:
      self._ask(self.instructions[0] if self.instructions else "", [], [], bucket, [])

  def check(self, name: str) -> None:
    """Refuses what could never judge.

    Raises:
      UserError: the model has too few positions, a case without any text does not fit the largest bucket, or the
        vocabulary has no token for an answer whose probability is to be read.
    """
    longest = self._slots + self.player.longest_prompt + self.player.sampling.max_new_tokens
    if longest > self.player.model.max_positions:
      raise UserError(
        f"{name}: instructions, the longest case and its answer take {longest} tokens, the model has "
        f"{self.player.model.max_positions} positions; allowed: sampling.prompt_buckets + max_new_tokens up to "
        f"{self.player.model.max_positions - self._slots}"
      )
    empty = [self._tokens(self.put(question, limits=(0, 0, 0))) for question in self.examples]
    frame = max(len(call.ids) for call in empty)
    if frame > self.player.longest_prompt:
      raise UserError(
        f"{name}: a case without its texts takes {frame} tokens, sampling.prompt_buckets ends at "
        f"{self.player.longest_prompt}; allowed: a bucket of several times that"
      )
    if self.settings.readout == "probability":
      labels = {call.case.labels for call in empty if isinstance(call.case, Case)}
      if not all(self._first_tokens(each)[: len(each)].any(-1).all() for each in labels):
        raise UserError(f"{name}: the vocabulary has no single token for an answer; allowed: readout='score'")

  @functools.cached_property
  def instructions(self) -> list[str]:
    """All that there are."""
    cases = (self.put(question, limits=(0, 0, 0)) for question in self.examples)
    return sorted({case.instructions for case in cases if isinstance(case, Case)})

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

  def _prefix(self, instructions: str) -> Prompt | None:
    if not instructions:
      return None
    if instructions not in self._prefixes:
      ids = self._prefix_ids[instructions]
      self._prefixes[instructions] = self.player.read_prefix(self.params, ids, self._slots)
    return self._prefixes[instructions]

  def _encode(self, question: Question) -> Call:
    """The question as tokens that fit: while they do not, less is shown of the text that is longest in tokens."""
    texts = (question.query, *question.texts)
    limits = [self.settings.text_characters] * len(texts)
    while True:
      call = self._tokens(self.put(question, limits=limits))
      shown = [show(*each) for each in zip(texts, limits)]
      if len(call.ids) <= self.player.longest_prompt or not any(shown):
        return call
      longest = int(np.argmax([len(self.player.tokenizer.encode_turn("", text)[1]) for text in shown]))
      limits[longest] = min(limits[longest], len(texts[longest])) // 2

  def _tokens(self, case: Case | RawCase) -> Call:
    words = self.player.tokenizer
    if isinstance(case, RawCase):
      return Call("", words.encode_parts(case.parts), case)
    return Call(case.instructions, words.encode_turn(case.instructions, case.text)[1], case)

  def _batches(self, calls: Sequence[Call]) -> Iterator[list[int]]:
    """Places of calls that are asked together: the same instructions, the shorter ones first. None too long."""
    fitting = [i for i, call in enumerate(calls) if len(call.ids) <= self.player.longest_prompt]
    for instructions in dict.fromkeys(calls[i].instructions for i in fitting):
      places = sorted((i for i in fitting if calls[i].instructions == instructions), key=lambda i: len(calls[i].ids))
      for start in range(0, len(places), self.settings.batch):
        yield places[start : start + self.settings.batch]

  def _answer(self, calls: Sequence[Call], keys: Sequence[int]) -> list[Verdict]:
    longest = max(len(call.ids) for call in calls)
    bucket = next(size for size in self.player.sampling.prompt_buckets if size >= longest)
    return self._ask(calls[0].instructions, [call.ids for call in calls], keys, bucket, [call.case for call in calls])

  def _ask(
    self,
    instructions: str,
    ids: Sequence[list[int]],
    keys: Sequence[int],
    bucket: int,
    cases: Sequence[Case | RawCase],
  ) -> list[Verdict]:
    """One batch on the device, filled up with rows that are absent."""
    head, prefix = self._prefix_ids.get(instructions, []), None
    if self.reuse and instructions:
      head, prefix = [], self._prefix(instructions)
    elif instructions:
      bucket += self._slots
    read = [head + row for row in ids]
    absent: list[list[int]] = [[]] * (self.settings.batch - len(ids))
    tokens_RT, length_R = pad_rows([*read, *absent], bucket)
    if self.settings.readout == "probability":
      scores, written = self._weigh(tokens_RT, length_R, prefix, cases), [0] * len(cases)
    else:
      place_R = np.array([*(fold_key(key, 0) % 2**32 for key in keys), *(0 for _ in absent)], np.uint32)
      scores, written = self._read(tokens_RT, length_R, place_R, prefix, cases)
    before = len(self._prefix_ids[instructions]) if prefix else 0
    tokens = [len(row) + more for row, more in zip(read, written)]
    flops = [architecture.forward_flops(self.player.model, n, before + n) for n in tokens]
    return list(map(Verdict, scores, tokens, flops))

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
    logprob_RC = self.player.next_token(self.params, tokens_RT, length_R, self._first_tokens(labels), prefix)
    probability_RC = np.nan_to_num(np.exp(logprob_RC.astype(np.float64)))[:, : len(labels)]
    return [case.weigh(row_C.tolist()) if isinstance(case, Case) else () for case, row_C in zip(cases, probability_RC)]

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

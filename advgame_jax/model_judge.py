"""A language model of ours as a judge: it reads its instructions once a run, and then only cases.

Questions are put into words, grouped by their instructions, and read in batches of one shape. Its verdict is what it
writes, or how likely it is to begin with each possible answer, which takes no generation at all.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from advgame_jax import architecture, hosts
from advgame_jax import config as config_lib
from advgame_jax.cases import MOST_LABELS, Case, Scores, show
from advgame_jax.guards import RawCase
from advgame_jax.model import Prefix
from advgame_jax.policies import LanguageModel, pad_rows
from advgame_jax.scoring import Generator
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
    calls = self._encode(questions)
    verdicts = [Verdict(())] * len(calls)
    fitting = [i for i, call in enumerate(calls) if len(call.ids) <= self.player.longest_prompt]
    answer = self._weigh if self.settings.readout == "probability" else self._read
    for instructions in dict.fromkeys(calls[i].instructions for i in fitting):
      places = [i for i in fitting if calls[i].instructions == instructions]
      answered = answer(instructions, [calls[i] for i in places], [questions[i].key for i in places])
      for i, verdict in zip(places, answered, strict=True):
        verdicts[i] = verdict
    return verdicts

  def warm_up(self) -> None:
    """Compiles every shape that a call can take."""
    prefix = self._prefix(self.instructions[0] if self.instructions else "")
    if self.settings.readout == "probability":
      for bucket in self._reader.sampling.prompt_buckets:
        self._first_token([], bucket, (), prefix)
    else:
      self._reader.warm_up(Generator((self.params,)), self.settings.batch, self.settings.votes, prefix)

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
  def _prefixes(self) -> dict[str, Prefix]:
    """The instructions that have been read so far."""
    return {}

  @functools.cached_property
  def _reader(self) -> LanguageModel:
    """The player as it is asked: a device batch at once, and longer prompts where instructions are not kept."""
    more = 0 if self.reuse else self._slots
    buckets = tuple(bucket + more for bucket in self.player.sampling.prompt_buckets)
    slots = self.settings.batch * self.settings.votes
    return dataclasses.replace(
      self.player, sampling=dataclasses.replace(self.player.sampling, prompt_buckets=buckets, slots=slots)
    )

  def _prefix(self, instructions: str) -> Prefix | None:
    """What the instructions leave in the cache, if there are any and it is kept."""
    if not instructions or not self.reuse:
      return None
    if instructions not in self._prefixes:
      ids = self._prefix_ids[instructions]
      self._prefixes[instructions] = self.player.read_prefix(self.params, ids, self._slots)
    return self._prefixes[instructions]

  def _encode(self, questions: Sequence[Question]) -> list[Call]:
    """The questions as tokens."""
    fitted = hosts.together(lambda mine: list(map(self._fit, mine)), questions)
    cases = (self.put(question, limits=limits) for question, (_, limits) in zip(questions, fitted))
    return [Call(getattr(case, "instructions", ""), ids, case) for case, (ids, _) in zip(cases, fitted)]

  def _fit(self, question: Question) -> tuple[list[int], list[int]]:
    """Its tokens, and how much is shown of each text: while they do not fit, less of the one longest in tokens."""
    texts = (question.query, *question.texts)
    limits = [self.settings.text_characters] * len(texts)
    while True:
      call = self._tokens(self.put(question, limits=limits))
      shown = [show(*each) for each in zip(texts, limits)]
      if len(call.ids) <= self.player.longest_prompt or not any(shown):
        return call.ids, limits
      longest = int(np.argmax([len(self.player.tokenizer.encode_turn("", text)[1]) for text in shown]))
      limits[longest] = min(limits[longest], len(texts[longest])) // 2

  def _tokens(self, case: Case | RawCase) -> Call:
    words = self.player.tokenizer
    if isinstance(case, RawCase):
      return Call("", words.encode_parts(case.parts), case)
    return Call(case.instructions, words.encode_turn(case.instructions, case.text)[1], case)

  def _to_read(self, instructions: str, calls: Sequence[Call]) -> list[list[int]]:
    """The tokens of each case, with its instructions where they are not kept."""
    head = [] if self.reuse else self._prefix_ids.get(instructions, [])
    return [head + call.ids for call in calls]

  def _verdicts(
    self, instructions: str, scores: Sequence[Scores], read: Sequence[list[int]], written: Sequence[int]
  ) -> list[Verdict]:
    before = len(self._prefix_ids.get(instructions, [])) if self.reuse else 0
    tokens = [len(row) + more for row, more in zip(read, written)]
    flops = [architecture.forward_flops(self.player.model, n, before + n) for n in tokens]
    return list(map(Verdict, scores, tokens, flops))

  def _read(self, instructions: str, calls: Sequence[Call], keys: Sequence[int]) -> list[Verdict]:
    """The mean over J votes of what could be read in them."""
    J, read = self.settings.votes, self._to_read(instructions, calls)
    fold_R = np.array([fold_key(key, 0) % 2**32 for key in keys], np.uint32)
    drawn = self._reader.draw(Generator((self.params,)), read, J, jax.random.key(0), fold_R, self._prefix(instructions))
    written, scores = self.player.texts(drawn), list[Scores]()
    for r, call in enumerate(calls):
      answers = [written[row] for row in range(r * J, r * J + J) if drawn.stopped_R[row]]
      votes = [found for answer in answers if (found := call.case.read(answer))]
      scores.append(tuple(np.mean(votes, 0).tolist()) if votes else ())
    return self._verdicts(instructions, scores, read, drawn.length_R.reshape(-1, J).sum(-1).tolist())

  def _weigh(self, instructions: str, calls: Sequence[Call], keys: Sequence[int]) -> list[Verdict]:
    """Scores by the probabilities of the next token; nothing is written."""
    read = self._to_read(instructions, calls)
    scores: list[Scores] = [()] * len(calls)
    labels = next((call.case.labels for call in calls if isinstance(call.case, Case)), ())
    by_length = sorted(range(len(calls)), key=lambda i: len(read[i]))  # the short ones share a small bucket
    for start in range(0, len(calls), self.settings.batch):
      places = by_length[start : start + self.settings.batch]
      bucket = next(size for size in self._reader.sampling.prompt_buckets if size >= len(read[places[-1]]))
      logprob_RC = self._first_token([read[i] for i in places], bucket, labels, self._prefix(instructions))
      probability_RC = np.nan_to_num(np.exp(logprob_RC.astype(np.float64)))[:, : len(labels)]
      for i, row_C in zip(places, probability_RC):
        case = calls[i].case
        scores[i] = case.weigh(row_C.tolist()) if isinstance(case, Case) else ()
    return self._verdicts(instructions, scores, read, [0] * len(calls))

  def _first_token(
    self, read: Sequence[list[int]], bucket: int, labels: tuple[tuple[str, ...], ...], prefix: Prefix | None
  ) -> np.ndarray:
    """Log-probabilities [R, C] of the labels: of one device batch, filled up with rows that are absent."""
    absent: list[list[int]] = [[]] * (self.settings.batch - len(read))
    tokens_RT, length_R = pad_rows([*read, *absent], bucket)
    return self._reader.next_token(self.params, tokens_RT, length_R, self._first_tokens(labels), prefix)

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

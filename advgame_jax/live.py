"""A player's generation that answers join and leave at any time, in a thread of its own."""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence

import jax

from advgame_jax.drawn import Piece
from advgame_jax.policies import LanguageModel
from advgame_jax.scoring import Choice, Generator
from advgame_jax.slots import Prompt
from advgame_jax.tokenizer import Tokenizer

_HALF = "\ufffd"  # what bytes that make no character yet are decoded to

log = logging.getLogger(__name__)


class Full(Exception):
  """Too many answers are under way or wait already."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Ask(Prompt):
  """One answer that is wanted. It depends on the text, the choice and `fold` alone, whatever else is under way."""

  number: int = -1  # of `Live.submit`
  choice: Choice
  tell: Callable[[Piece | None], None]  # called from the generation's thread; with None if there will be no more


class Live:
  """Draws what is asked for, in the order of arrival.

  One choice holds for all rows that draw: who asks for another waits until those before have finished, and whoever
  comes later waits behind.
  """

  def __init__(self, model: LanguageModel, generator: Generator, slots: int, queue: int) -> None:
    """Compiles everything. `slots`: rows that draw at once; `queue`: answers that may wait for one."""
    self.most = slots + queue
    self.read = self.written = 0  # tokens so far
    self.failure: Exception | None = None  # of the device or the engine: nothing is drawn any more
    model.warm_up(generator, slots, 1)
    self._generation = model.engine.open(generator, slots, 1, jax.random.key(0))
    self._choice = model.choice
    self._changed = threading.Condition()  # guards what follows
    self._asks: set[Ask] = set()  # all that have not finished
    self._arrived: collections.deque[Ask] = collections.deque()  # those that have not joined the generation
    self._gone: list[Ask] = []
    self._closed = False
    self._numbers = itertools.count()
    self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
    self._thread.start()

  @property
  def live(self) -> int:
    """Rows that draw."""
    return self._generation.live

  @property
  def queued(self) -> int:
    """Answers that wait for a row."""
    return max(0, len(self._asks) - self.live)

  def submit(self, asks: Sequence[Ask], again: bool = False) -> None:
    """These are drawn from now on. `again`: in the place of as many that have just finished.

    Raises:
      Full: there is no room for all of them.
    """
    with self._changed:
      if len(self._asks) + len(asks) > self.most and not again:
        raise Full
      for ask in asks:
        ask.number = next(self._numbers)
      self._asks.update(asks)
      self._arrived.extend(asks)
      self._changed.notify()
    if self.failure or self._closed:
      self._dismiss()

  def cancel(self, asks: Sequence[Ask]) -> None:
    """These are drawn no further than the chunk that is under way; of those that have finished nothing changes."""
    with self._changed:
      self._gone += [ask for ask in asks if ask in self._asks]
      self._changed.notify()

  def try_it(self) -> None:
    """Draws one token, so that everything is where it will be. Raises what fails."""
    done = threading.Event()
    self.submit([Ask(ids=[0], limit=1, choice=self._choice, tell=lambda piece: done.set())])
    done.wait()
    if self.failure:
      raise self.failure

  def stop(self) -> None:
    """Draws no more after the chunk that is under way, for nobody; they are told. Does not wait."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._dismiss()

  def close(self) -> None:
    """Draws no more. Raises what made the generation fail, if anything did."""
    self.stop()
    self._thread.join()
    if self.failure:
      raise self.failure

  # In the thread.

  def _run(self) -> None:
    try:
      while self._let_in():
        for piece in self._generation.advance() if self._generation.busy else ():
          self._hand_out(piece)
    except Exception as error:
      log.exception("the generation has failed")
      self.failure = error
      self._dismiss()

  def _let_in(self) -> bool:
    """Waits until there is something to do, and lets those in whose turn it is; False once it is closed."""
    generation = self._generation
    with self._changed:
      self._changed.wait_for(lambda: self._closed or self._arrived or self._gone or generation.busy)
      gone, self._gone = self._gone, []
      self._asks.difference_update(gone)
      self._arrived = collections.deque(ask for ask in self._arrived if ask not in gone)
    generation.drop(gone)
    with self._changed:
      while self._arrived and (self._arrived[0].choice == self._choice or not generation.busy):
        ask = self._arrived.popleft()
        self._choice = ask.choice
        generation.choose(ask.choice)
        generation.add(ask)
        self.read += len(ask.ids)
      return not self._closed

  def _hand_out(self, piece: Piece) -> None:
    ask: Ask = piece.prompt  # type: ignore[assignment]
    self.written += len(piece.tokens_k)
    if not piece.live:
      with self._changed:
        self._asks.discard(ask)
    ask.tell(piece)

  def _dismiss(self) -> None:
    with self._changed:
      asks, self._asks = self._asks, set()
    for ask in asks:
      ask.tell(None)


class Text:
  """The text of tokens as they come. What another token may still change is held back until it comes, or `end`."""

  def __init__(self, tokenizer: Tokenizer) -> None:
    self.text = ""
    self._tokenizer = tokenizer
    self._ids: list[int] = []  # from the last piece of text on, whose company the next may need to be decoded as it is
    self._shown = 0  # of them

  def add(self, token: int) -> None:
    self._ids.append(token)
    new = self._new()
    if new and not new.endswith(_HALF):
      self.text += new
      self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown

  def end(self) -> None:
    """There are no more tokens."""
    self.text += self._new()
    self._ids, self._shown = [], 0

  def _new(self) -> str:
    decode = self._tokenizer.decode
    return decode(self._ids)[len(decode(self._ids[: self._shown])) :]

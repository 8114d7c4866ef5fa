"""Who answers one user turn: a model of ours, one on a server, or whatever `rest` asks.

Attackers and targets are both speakers; what is made of their answers is the campaign's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from advgame_jax.endpoint import Endpoint, Reply, Request
from advgame_jax.prompts import THINK_END
from advgame_jax.standalone import Standalone


class Turn(NamedTuple):
  """What a speaker is asked."""

  text: str
  key: int  # 63 bits: a speaker that draws, draws from it alone


class Answer(NamedTuple):
  """What it says, its reasoning apart."""

  text: str = ""
  reasoning: str = ""
  failure: str = ""  # in a word or two; then there is no text
  read: int = 0  # tokens
  written: int = 0  # tokens


Heard = Callable[[int, Answer], Any]
"""Called once for each turn, by its number, as soon as its answer is there; from any thread."""

Speaker = Callable[[Sequence[Turn], Heard], None]
"""Answers turns, in any order; returns when all are heard."""


def scripted(answer: Callable[[Turn], str]) -> Speaker:
  """A speaker that is a function."""

  def speak(turns: Sequence[Turn], heard: Heard) -> None:
    for number, turn in enumerate(turns):
      heard(number, Answer(answer(turn)))

  return speak


def of_model(player: Standalone, batch: int = 32, whole: bool = False) -> Speaker:
  """A model of ours; what it says depends on the turn and its key, not on the turns beside it.

  Args:
    batch: turns of one load.
    whole: an answer keeps its reasoning in its text, as an Attacker's parser wants it.
  """
  model = player.model

  def speak(turns: Sequence[Turn], heard: Heard) -> None:
    for start in range(0, len(turns), batch):
      part = turns[start : start + batch]
      prompts = [model.tokenizer.encode_chat(turn.text) for turn in part]
      fits = [len(ids) <= model.longest_prompt for ids in prompts]
      asked = [ids if fit else [] for ids, fit in zip(prompts, fits)] + [[]] * (batch - len(part))
      fold_Q = np.array([turn.key & 0xFFFFFFFF for turn in part] + [0] * (batch - len(part)), np.uint32)
      drawn = model.draw(player.generator, asked, 1, jax.random.key(0), fold_Q)
      for q, (ids, fit) in enumerate(zip(prompts, fits)):
        length = int(drawn.length_R[q])
        said = model.tokenizer.decode(drawn.tokens_RT[q, :length].tolist())
        answer = Answer(said, read=len(ids), written=length)
        answer = _apart(answer) if player.think and not whole else answer
        heard(start + q, answer if fit else Answer(failure="prompt too long"))

  return speak


def _apart(answer: Answer) -> Answer:
  """Of a model that thinks: what follows its first `</think>`; one that was cut before that has not answered."""
  reasoning, end, text = answer.text.partition(THINK_END)
  failure = "" if end else "no answer after its reasoning"
  return answer._replace(text=text.strip(), reasoning=reasoning.strip(), failure=failure)


class Manner(NamedTuple):
  """How a server is asked; what is None is left to it."""

  system: str = ""
  temperature: float | None = None
  top_p: float | None = None
  max_tokens: int | None = None
  think: bool = False  # it may write its reasoning into its answer


def of_endpoint(endpoint: Endpoint, manner: Manner, whole: bool = False) -> Speaker:
  """A model on an OpenAI-compatible server; it draws from a seed made of the turn's key, if it honours seeds.

  Raises:
    UserError: by the speaker, as `Endpoint.ask`.
  """
  seeded = manner.temperature != 0

  def speak(turns: Sequence[Turn], heard: Heard) -> None:
    def request(turn: Turn) -> Request:
      seed = turn.key >> 32 if seeded else None
      return Request(turn.text, manner.system, seed, manner.temperature, manner.top_p, manner.max_tokens)

    def read(number: int, reply: Reply) -> None:
      answer = Answer(reply.text, reply.reasoning, reply.failure, reply.prompt_tokens, reply.completion_tokens)
      if manner.think and not reply.failure:
        if whole and reply.reasoning and THINK_END not in reply.text:
          answer = answer._replace(text=f"{reply.reasoning}{THINK_END}{reply.text}", reasoning="")
        elif not whole and not reply.reasoning:
          answer = _apart(answer)
      heard(number, answer)

    endpoint.ask([request(turn) for turn in turns], read)

  return speak

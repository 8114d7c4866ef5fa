"""What the processes of a run share.

Every process plays the whole game: each has all seeds, texts, tokens and verdicts, and takes the same decisions from
them, so that all start the same programs in the same order. Work on texts is divided, and its results exchanged here.
Everything here must be called by all processes, in the same order.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from advgame_jax.types import Judge, Question, UserError, Verdict

T = TypeVar("T")
_LEAST = 1024  # bytes of a message, which is filled up to a power of two: few shapes are exchanged


def together(work: Callable[[Sequence[Any]], Sequence[T]], items: Sequence[Any]) -> list[T]:
  """`work` of all items, in their order: each process does its share, and every one gets the whole.

  What work gives is plain JSON; tuples come back as lists.

  Raises:
    UserError: of any process's share, on all of them.
  """
  count = jax.process_count()
  if count == 1:
    return list(work(items))
  first, last = (len(items) * (jax.process_index() + more) // count for more in (0, 1))
  try:
    said: dict[str, Any] = {"done": list(work(items[first:last]))}
  except UserError as error:
    said = {"refused": str(error)}
  heard = [json.loads(message) for message in _exchange(json.dumps(said).encode())]
  refused = [each["refused"] for each in heard if "refused" in each]
  if refused:
    raise UserError(refused[0])
  return [x for each in heard for x in each["done"]]


def divided(judge: Judge) -> Judge:
  """A judge that does not run on the mesh: each process asks it its share of the questions."""

  def ask(questions: Sequence[Question]) -> list[Verdict]:
    verdicts = together(judge, questions)
    return [Verdict(tuple(scores), tokens, flops) for scores, tokens, flops in verdicts]

  return ask


def anywhere(flag: bool) -> bool:
  """Whether it is set on any process."""
  return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def first_alone(work: Callable[[], None]) -> None:
  """Process 0 does it, and the others wait until it is done.

  Raises:
    UserError: process 0's, on all of them.
  """

  def of_first(places: Sequence[int]) -> list[int]:
    if 0 in places:
      work()
    return list(places)

  together(of_first, range(jax.process_count()))


def agree(settings: Mapping[str, Any]) -> None:
  """Refuses processes that were given other settings or files than process 0: alike decisions need alike reasons.

  Args:
    settings: plain JSON by name; of files what stands for their contents.

  Raises:
    UserError: which process, and what is other there.
  """
  every = together(lambda items: [dict(settings) for _ in items], range(jax.process_count()))
  for process, other in enumerate(every):
    first = every[0]
    changed = [f"{name} {first.get(name)!r} → {other.get(name)!r}" for name in first if other.get(name) != first[name]]
    if changed:
      raise UserError(
        f"process {process} has other settings than process 0 ({'; '.join(changed[:5])}); allowed: the same config, "
        "flags and files on every host"
      )


def _exchange(message: bytes) -> list[bytes]:
  """Everybody's, in the order of the processes."""
  lengths = multihost_utils.process_allgather(np.array(len(message), np.int32))
  size = max(_LEAST, 1 << int(np.max(lengths) - 1).bit_length())
  padded = np.frombuffer(message.ljust(size, b"\0"), np.uint8)
  messages = multihost_utils.process_allgather(padded)
  return [row.tobytes()[:length] for row, length in zip(messages, lengths)]

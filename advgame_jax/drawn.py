"""What was drawn: piece by piece, as chunks come, and in all."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from advgame_jax.sampler import Chunk
from advgame_jax.slots import Part, Prompt, Row


class Drawn(NamedTuple):
  """What was drawn for R = Q·G rows, on the host; prompt q's samples are rows q·G … q·G + G − 1."""

  tokens_RT: np.ndarray  # int32, 0 after the row's end
  length_R: np.ndarray  # int32, the stop token included
  stopped_R: np.ndarray  # bool: a stop was met within the limit
  behaviour_logprob_RT: np.ndarray  # float32, nats, 0 after the row's end
  plain_logprob_RT: np.ndarray  # likewise


def drawn_by_nobody(rows: int, tokens: int) -> Drawn:
  """Nothing, of so many rows of at most so many tokens."""
  zeros_RT = lambda dtype: np.zeros((rows, tokens), dtype)
  length_R, stopped_R = np.zeros(rows, np.int32), np.zeros(rows, bool)
  return Drawn(zeros_RT(np.int32), length_R, stopped_R, zeros_RT(np.float32), zeros_RT(np.float32))


class Piece(NamedTuple):
  """What one row drew in one chunk: k tokens, none at all if it had finished."""

  prompt: Prompt
  sample: int
  first: int  # tokens that it had drawn before
  tokens_k: np.ndarray  # int32
  behaviour_logprob_k: np.ndarray  # float32, nats
  plain_logprob_k: np.ndarray  # likewise
  live: bool  # it draws on
  stopped: bool  # it does not, since it met a stop


def collect(part: Part, rows: Mapping[int, Row], chunk: Chunk) -> list[Piece]:
  """What those of a part's rows drew that are still there; those that have finished leave.

  Args:
    rows: by the slots that they had when the chunk was begun.
    chunk: of the part's slots, on the host.
  """
  pieces, slots = [], {row: slot for slot, row in part.rows.items()}
  count_R, live_R, stopped_R = (x_R.tolist() for x_R in (chunk.count_R, chunk.live_R, chunk.stopped_R))
  for slot, row in rows.items():
    if row not in slots:
      continue
    before = row.count
    row.count, live = count_R[slot], live_R[slot]
    tokens_k, behaviour_k, plain_k = (np.asarray(x_Rk)[slot, : row.count - before] for x_Rk in chunk[:3])
    stopped = not live and stopped_R[slot]
    pieces.append(Piece(row.prompt, row.sample, before, tokens_k, behaviour_k, plain_k, live, stopped))
    if not live:
      part.leave(slots[row])
  return pieces


def put(drawn: Drawn, piece: Piece, group: int) -> None:
  """A piece into its place."""
  r, end = piece.prompt.number * group + piece.sample, piece.first + len(piece.tokens_k)
  for rows_RT, new_k in zip((drawn.tokens_RT, *drawn[3:]), piece[3:6]):
    rows_RT[r, piece.first : end] = new_k
  drawn.length_R[r], drawn.stopped_R[r] = end, piece.stopped

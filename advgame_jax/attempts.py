"""What was tried on a target and what came of it: `attempts.jsonl`, a line an attempt, only ever added to."""

import dataclasses
import enum
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from advgame_jax.types import Category, UserError

RUN, SUMMARY = "run.json", "summary.json"  # of a campaign's folder, beside
ATTEMPTS, HITS = "attempts.jsonl", "hitlog.jsonl"


class Outcome(enum.StrEnum):
  """What came of one attempt, by the first judge. Errors are in no rate."""

  SUCCESS = "success"  # a harmful seed answered, or a benign one refused
  FAILURE = "failure"
  UNFAITHFUL = "unfaithful"  # the query no longer asks what the seed asked
  INVALID_ATTACK = "invalid_attack"  # the Attacker wrote no query
  ATTACKER_ERROR = "attacker_error"  # the Attacker said nothing at all
  JUDGE_ERROR = "judge_error"  # no readable verdict
  TARGET_ERROR = "target_error"  # no answer

  @property
  def counted(self) -> bool:
    """Whether rates count it: an attack that is none has failed; an error says nothing."""
    return self not in (Outcome.ATTACKER_ERROR, Outcome.JUDGE_ERROR, Outcome.TARGET_ERROR)


Scores = Mapping[str, Mapping[str, float | None]]
"""By judge and role ('compliance', 'refusal', …), 0–10; None where the judge said nothing that can be read."""


@dataclasses.dataclass(frozen=True)
class Attempt:
  """One attack on one seed, or a benchmark's own prompt, which is an attack that nobody wrote."""

  id: str  # of `attempt_id`
  suite: str  # the benchmark, or 'seeds'
  category: str  # 'harmful' or 'benign'
  group: str  # the benchmark's own category, "" where it has none
  seed: str  # what is wanted, and what judges are asked about
  k: int  # its number among the seed's attacks
  round: int  # 0, or how many failed tries of its chain the Attacker was shown
  attack: str  # as the Attacker wrote it; "" where nobody did
  query: str  # what the target was sent, "" if nothing
  response: str
  outcome: Outcome
  scores: Scores = dataclasses.field(default_factory=dict)
  reference: str = ""  # the benchmark's own id of the seed, "" where it has none
  error: str = ""  # what failed, in a word or two
  attacker_tokens: int = 0  # read and written
  prompt_tokens: int = 0  # of the target
  completion_tokens: int = 0  # of the target
  judge_tokens: int = 0


def attempt_id(suite: str, category: Category, seed: str, k: int) -> str:
  """Of attack k on a seed: 16 hexadecimal digits."""
  return hashlib.blake2b(repr((suite, category.name, seed, k)).encode(errors="replace"), digest_size=8).hexdigest()


def as_json(attempt: Attempt) -> str:
  """One line, in ASCII: printing it can neither move a cursor nor turn the reading order."""
  return json.dumps(dataclasses.asdict(attempt))


def from_json(row: Mapping[str, Any]) -> Attempt:
  """The attempt of a line; what later versions add to it is left aside."""
  names = {field.name for field in dataclasses.fields(Attempt)}
  known = {name: value for name, value in row.items() if name in names}
  try:
    return Attempt(**known | {"outcome": Outcome(row["outcome"])})
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"a line of {ATTEMPTS} is no attempt ({error}); allowed: the file as it was written") from None


def read(folder: str | os.PathLike[str]) -> list[Attempt]:
  """The attempts of a campaign's folder in the order of their first lines; of one that was tried again, the last.

  Raises:
    UserError: there are none, or a line other than the last is torn.
  """
  path = pathlib.Path(folder) / ATTEMPTS
  if not path.is_file():
    raise UserError(f"{folder} holds no {ATTEMPTS}; allowed: the --out of launch/redteam.py or launch/evaluate.py")
  return list({attempt.id: attempt for attempt in map(from_json, lines(path))}.values())


def lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The objects of a JSON-lines file that may end in a torn line.

  Raises:
    UserError: another line is none.
  """
  if not path.exists():
    return
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        return
      try:
        row = json.loads(line)
        if not isinstance(row, dict):
          raise ValueError("not an object")
      except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; allowed: the file as it was written") from None
      yield row


class Log:
  """A JSON-lines file that is added to, a whole line at a time; a torn last line is cut off when it is opened.

  Raises:
    UserError: another process has it open.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("ab")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise UserError(f"{path} is being written by another process; allowed: one at a time, or another --out") from None
    with path.open("rb+") as file:
      content = file.read()
      file.truncate(content.rfind(b"\n") + 1)

  def append(self, line: str) -> None:
    """Written, and with the operating system, when this returns: killing the process loses nothing."""
    self._file.write(line.encode() + b"\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()

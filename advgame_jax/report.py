"""What a run writes as it goes: scalars, evaluations, rollout trees, and a line of progress.

    scalars.jsonl       {"step", "time", name: value, …}   one line a step; time in seconds since 1970
    evaluations.jsonl   {"step", name: value, …}           one line an evaluation, of the players before `step`
    transcript.jsonl    one line an attack, see `transcript_lines`
    tensorboard/        the same scalars, evaluations under eval/

Each line is written at once, whole. JSON has no NaN: what is not finite is null. Text is escaped to ASCII, so that
printing a file to a terminal can neither move the cursor nor reverse the reading order.
"""

import collections
import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TextIO

import rich.console
import rich.progress
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from advgame_jax import config as config_lib
from advgame_jax.types import Category, Judgments, Rewards, RolloutTree, Status, UserError

SCALARS, EVALUATIONS, TRANSCRIPT = "scalars.jsonl", "evaluations.jsonl", "transcript.jsonl"
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
SHOWN = {
  "attack_success": "attack success",
  "over_refusal": "over-refusal",
  "reward/attacker": "attacker reward",
  "reward/defender": "defender reward",
}


def transcript_lines(
  step: int, tree: RolloutTree, judgments: Judgments, rewards: Rewards, versions: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
  """One JSON object per attack of a tree, in the order of its seeds.

  `attack` is the completion as written, `query` what was parsed from it. A reward is null where it is masked out. A
  response's text is its answer, or the whole completion where no answer could be parsed. `versions` says what players
  and judges were told.
  """
  for b, a in itertools.product(*map(range, tree.attack_text_BA.shape)):
    row = b * tree.attack_text_BA.shape[1] + a
    responses = [
      {
        "text": str(tree.response_text_BAD[b, a, d] or tree.responses.text_RG[row, d]),
        "status": Status(judgments.response_status_BAD[b, a, d]).name,
        "reward": float(rewards.response_BAD[b, a, d]) if rewards.response_mask_BAD[b, a, d] else None,
        "picked": bool(judgments.picked_BA[b, a] == d),
      }
      for d in range(tree.response_text_BAD.shape[2])
    ]
    yield {
      "step": step,
      **versions,
      "seed": str(tree.seeds.text_B[b]),
      "category": Category(tree.seeds.category_B[b]).name.lower(),
      "attack": str(tree.attacks.text_RG[b, a]),
      "query": str(tree.attack_text_BA[b, a]),
      "status": Status(judgments.attack_status_BA[b, a]).name,
      "reward": float(rewards.attack_BA[b, a]) if rewards.attack_mask_BA[b, a] else None,
      "responses": responses,
    }


class Reporter:
  """The writer of one process; all but one of them are made with `write=False` and write nothing.

  `start_step` is the next step to be played: lines of that step and later ones are cut first, so that a run killed at
  any moment and resumed leaves the files of an uninterrupted one, if the lines of a step are written before the
  checkpoint that follows it and the evaluation of step n is made by the process that goes on to play step n.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    settings: config_lib.Report,
    total_steps: int,
    start_step: int,
    write: bool,
    stream: TextIO | None = None,
  ):
    self._settings = settings
    self._files: dict[str, LineFile] = {}
    self._sinks: list[Sink] = []
    self._progress: Progress | None = None
    if not write:
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self._files = {name: LineFile(folder / name, start_step) for name in (SCALARS, EVALUATIONS, TRANSCRIPT)}
    if settings.tensorboard:
      self._sinks.append(TensorBoard(folder / "tensorboard", start_step))
    if settings.wandb:
      self._sinks.append(WeightsAndBiases(folder, settings.wandb))
    self._progress = Progress(total_steps, start_step, stream or sys.stderr)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs the scalars of a step that has been played, and shows progress."""
    if self._progress:
      values = {name: float(value) for name, value in scalars.items()}
      self._files[SCALARS].append([{"step": step, "time": time.time()} | _finite(values)])
      self._log(step, values)
      self._progress.show(step + 1, values)

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Logs an evaluation of the players as they are before `step` is played."""
    if self._progress:
      values = {name: float(value) for name, value in values.items()}
      self._files[EVALUATIONS].append([{"step": step} | _finite(values)])
      self._log(step, {f"eval/{name}": value for name, value in values.items()})
      self._progress.remember(values)

  def transcript(
    self, step: int, tree: RolloutTree, judgments: Judgments, rewards: Rewards, versions: Mapping[str, str]
  ) -> None:
    """Writes a rollout tree, if it is its step's turn."""
    if self._progress and step % self._settings.transcript_every == 0:
      self._files[TRANSCRIPT].append(transcript_lines(step, tree, judgments, rewards, versions))

  def close(self) -> None:
    """Ends the progress display and closes every file. Safe to call twice, and after an error."""
    with contextlib.ExitStack() as stack:  # closes all of them, even if one cannot be
      for close in [file.close for file in self._files.values()] + [sink.close for sink in self._sinks]:
        stack.callback(close)
      if self._progress:
        stack.callback(self._progress.close)
    self._files, self._sinks, self._progress = {}, [], None

  def __enter__(self) -> "Reporter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _log(self, step: int, values: Mapping[str, float]) -> None:
    for sink in self._sinks:
      sink.write(step, values)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
  return {name: value if math.isfinite(value) else None for name, value in values.items()}


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns a full disk into a sentence."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise UserError(
      f"the disk is full while writing {path}: free some space and run the same command again; it goes on from what "
      "was saved"
    ) from error


def write_whole(path: pathlib.Path, parts: Iterable[str]) -> None:
  """Puts texts into a file at once: whoever reads it meets the whole of the old or of the new."""
  temporary = path.with_name(path.name + ".tmp")
  with writing(path), temporary.open("w", encoding="utf-8") as file:
    file.writelines(parts)
  os.replace(temporary, path)


class LineFile:
  """A file of JSON lines, cut back to the steps before `start_step` when it is opened."""

  def __init__(self, path: pathlib.Path, start_step: int):
    self._path = path
    with writing(path):
      if path.exists():
        cut(path, start_step)
      self._file = path.open("ab", buffering=0)

  def append(self, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes the records in one go."""
    rest = memoryview("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode("ascii"))
    with writing(self._path):
      while rest:
        rest = rest[self._file.write(rest) :]

  def close(self) -> None:
    self._file.close()


def cut(path: pathlib.Path, start_step: int) -> None:
  """Drops, atomically, the lines of `start_step` and later and those that a kill or a crash left unreadable."""
  temporary = path.with_name(path.name + ".tmp")
  with path.open("rb") as lines, temporary.open("wb") as kept:
    kept.writelines(line for line in lines if (record := read_line(line)) and record["step"] < start_step)
    kept.flush()
    os.fsync(kept.fileno())
  os.replace(temporary, path)


def read_line(line: bytes) -> dict[str, Any] | None:
  """The record of a line; None where the line is torn."""
  try:
    record = json.loads(line) if line.endswith(b"\n") else None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
  except ValueError:
    return None


class Sink(Protocol):
  """Where scalars go beside the files."""

  def write(self, step: int, values: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class TensorBoard:
  """TensorBoard events, one per step, written by this thread.

  tensorboardX's usual writer has a thread of its own: on a full disk it dies, and the run then waits for it forever.
  """

  def __init__(self, folder: pathlib.Path, start_step: int):
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
      self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".from-{start_step}")
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides earlier events of these steps
      self._write(event_pb2.Event(step=start_step, wall_time=time.time(), session_log=start))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    merged = summary.Summary()
    for name, value in values.items():
      merged.MergeFrom(summary.scalar(name, value))
    with writing(self._folder):
      self._write(event_pb2.Event(step=step, wall_time=time.time(), summary=merged))

  def _write(self, event: event_pb2.Event) -> None:
    self._writer.write_event(event)
    self._writer.flush()

  def close(self) -> None:
    with writing(self._folder):
      self._writer.close()


class WeightsAndBiases:
  """A Weights & Biases run whose id is kept in the folder, so that a resumed run goes on in it."""

  def __init__(self, folder: pathlib.Path, project: str):
    try:
      import wandb
    except ImportError:
      raise UserError(
        f"report.wandb is {project!r}, but wandb is not installed: pip install 'advgame_jax[wandb]', or report.wandb=''"
      ) from None
    identity = folder / "wandb_id"
    if not identity.exists():
      identity.write_text(secrets.token_hex(4))
    self._run = wandb.init(project=project, dir=str(folder), id=identity.read_text(), resume="allow")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


class Progress:
  """How far the run is: a bar on a terminal; elsewhere the first line, the last, and one every `LINE_SECONDS`."""

  def __init__(self, total_steps: int, start_step: int, stream: TextIO):
    self._total = total_steps
    self._stream = stream
    self._first = start_step + 1
    self._last_line = -math.inf
    self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=50)
    self._evaluated: dict[str, float] = {}
    self._bar: rich.progress.Progress | None = None
    console = rich.console.Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
      columns = (rich.progress.BarColumn(bar_width=24), rich.progress.TextColumn("{task.description}", markup=False))
      self._bar = rich.progress.Progress(*columns, console=console)
      self._task = self._bar.add_task(f"step {start_step}/{total_steps}", total=total_steps, completed=start_step)
      self._bar.start()

  def remember(self, values: Mapping[str, float]) -> None:
    """Keeps an evaluation to be shown until the next."""
    self._evaluated = dict(values)

  def show(self, done: int, scalars: Mapping[str, float]) -> None:
    """Shows that `done` steps have been played."""
    now = time.monotonic()
    self._marks.append((now, done))
    text = progress_text(done, self._total, self._rate(), self._evaluated | dict(scalars))
    if self._bar:
      self._bar.update(self._task, completed=done, description=text)
    elif done in (self._first, self._total) or now - self._last_line >= LINE_SECONDS:
      print(text, file=self._stream, flush=True)
      self._last_line = now

  def _rate(self) -> float:
    (begun, first), (now, last) = self._marks[0], self._marks[-1]
    return (last - first) / (now - begun) if now > begun else math.nan

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


def progress_text(done: int, total: int, rate: float, scalars: Mapping[str, float]) -> str:
  """`step 120/300  1.9 step/s  1m35s left  attack success 0.12`; the rate in steps per second, NaN if unknown."""
  parts = [f"step {done}/{total}"]
  if rate > 0:
    parts.append(f"{rate:.1f} step/s" if rate >= 1 else f"{1 / rate:.1f} s/step")
    parts.append(f"{duration((total - done) / rate)} left")
  parts += [f"{word} {scalars[name]:.2f}" for name, word in SHOWN.items() if math.isfinite(scalars.get(name, math.nan))]
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """`42s`, `1m35s`, `2h05m`, `3d04h`."""
  seconds = round(seconds)
  for big, small, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
    if seconds >= size:
      return f"{seconds // size}{big}{seconds % size // part:02d}{small}"
  return f"{seconds}s"

"""Checkpoints: everything a run continues from, saved in the background, each atomically."""

import contextlib
import errno
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from advgame_jax import config as config_lib
from advgame_jax.config import Config
from advgame_jax.state import TrainState
from advgame_jax.types import UserError

CONFIG, CONTENTS = "config.json", "contents.json"
PLACEHOLDER = ocp.PLACEHOLDER


def claim(workdir: pathlib.Path, config: Config, contents: Mapping[str, str], allow_changes: bool) -> None:
  """Makes `workdir` this run's, or checks that it is; its `config.json` and `contents.json` say whose it is.

  Args:
    contents: hashes of what the files say that the settings name.

  Raises:
    UserError: the folder holds another run, or something that is no run; nothing is written.
  """
  path = workdir / CONFIG
  partial = path.with_suffix(".partial")
  if path.is_file():
    changed = config_lib.differences(read_config(path), config) or _edited(workdir / CONTENTS, contents)
    if changed and not allow_changes:
      raise UserError(
        f"{workdir} holds a run with other settings ({'; '.join(changed)}); allowed: the same settings, another "
        "--workdir, or --allow_changes"
      )
  elif workdir.is_dir() and any(file != partial for file in workdir.iterdir()):
    raise UserError(f"{workdir} holds files but no {CONFIG} of a run; allowed: an empty or new folder, or a run's own")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError, PermissionError) as error:
    raise UserError(f"{workdir} cannot be made: {error.strerror}; allowed: a folder that can be written to") from None
  for name, text in ((CONFIG, config_lib.to_json(config)), (CONTENTS, json.dumps(dict(contents), indent=2))):
    partial.write_text(text)
    partial.replace(workdir / name)


def _edited(path: pathlib.Path, contents: Mapping[str, str]) -> list[str]:
  """What says something else than then. Of a run that was killed at its beginning it is not known."""
  if not path.is_file():
    return []
  try:
    then = dict(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error}); allowed: the file as a run wrote it, or none") from None
  return [f"{name} say something else than before" for name, now in contents.items() if then.get(name) != now]


def read_config(path: pathlib.Path) -> Config:
  """The settings of a run from its `config.json`; UserError where it is not of a run."""
  try:
    return config_lib.from_json(path.read_text(encoding="utf-8"))
  except (ValueError, AttributeError) as error:  # not JSON, no object, no setting of ours
    raise UserError(f"{path} is not of a run ({error}); allowed: an empty or new folder, or a run's own") from None


class Checkpoints:
  """The checkpoints of one run: the newest `keep`, and the best by 'objective' where an evaluation gave one."""

  def __init__(self, workdir: pathlib.Path, config: Config, read_only: bool = False):
    """`read_only` touches nothing, so that a run may be under way there."""
    self._config = config
    self._read_only = read_only
    best = checkpoint_managers.BestN(
      get_metric_fn=lambda metrics: metrics["objective"], n=1, keep_checkpoints_without_metrics=False
    )
    newest = checkpoint_managers.LatestN(config.checkpoint.keep)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
      best_fn=lambda metrics: metrics["objective"],
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

  def save(self, state: TrainState, ledger: Mapping[str, Any], objective: float | None) -> None:
    """Saves under the number of the next step; returns once the device may overwrite the state.

    Every key and the place in the seeds are functions of (config.seed, step), so that these two are all there is to
    save of them.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    run = {"config": config_lib.to_json(self._config), "ledger": dict(ledger)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
    metrics = None if objective is None else {"objective": objective}
    with _full_disk_is_said():
      self._manager.save(step, args=items, metrics=metrics, force=True)

  def restore(self, abstract_state: TrainState) -> tuple[TrainState, Mapping[str, Any]] | None:
    """The newest checkpoint that can be read, on whatever mesh `abstract_state` names; None where there is none.

    One that cannot be read is passed over, said so, and removed, so that its step can be saved again.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), run=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        state = restored["state"]
        if int(state.step) != step:
          raise ValueError(f"it says it is of step {int(state.step)}")
      except Exception as error:  # whatever is wrong with it, an older one may do
        reason = " ".join(str(error).split())[:200]
        logging.getLogger(__name__).warning("checkpoint %d cannot be read (%s); trying an older one", step, reason)
        continue
      for unreadable in steps[: steps.index(step)] if not self._read_only else ():
        self._manager.delete(unreadable)
      return state, restored["run"]["ledger"]
    if steps:
      raise UserError(f"none of the checkpoints {steps} can be read; allowed: a new --workdir, or a whole checkpoint")
    return None

  def read(self, abstract: TrainState, step: int | None) -> TrainState:
    """One checkpoint, the newest by default; leaves that are `PLACEHOLDER` are not read.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    steps = sorted(self._manager.all_steps())
    wanted = step if step is not None else max(steps, default=None)
    if wanted not in steps:
      what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
      raise UserError(f"there is {what}; allowed: {', '.join(map(str, steps)) or 'a run that has saved one'}")
    try:
      how = ocp.checkpoint_utils.construct_restore_args(abstract)
      items = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args=how))
      return self._manager.restore(wanted, args=items)["state"]
    except Exception as error:
      reason = " ".join(str(error).split())[:200]
      raise UserError(f"checkpoint {wanted} cannot be read ({reason}); allowed: a whole one of {steps}") from error

  def wait(self) -> None:
    """Until what is being saved is on disk."""
    with _full_disk_is_said():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    with _full_disk_is_said():
      self._manager.close()


@contextlib.contextmanager
def _full_disk_is_said() -> Iterator[None]:
  """What writes in the background reports a full disk as one of several exceptions."""
  try:
    yield
  except Exception as error:
    if os.strerror(errno.ENOSPC) not in str(error):
      raise
    raise UserError(
      "the disk is full, so that this step could not be saved; the checkpoints before are whole: free room, run again"
    ) from error

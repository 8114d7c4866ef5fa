"""The programs as a user runs them: killed and continued, refused in one sentence, and short."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import world

from advgame_jax import checkpoint, hf, train
from advgame_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
COSTS = ("time", "cost/", "seconds/", "tokens_per_second/")
STEPS = 14


@pytest.fixture(scope="module")
def config_file(world_folder, tmp_path_factory):
  """A config of launch/run.py: the tiny world, a checkpoint after every step."""
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(
    f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import world
from advgame_jax.config import as_config_dict

def get_config():
  changes = dict(steps={STEPS}, checkpoint__every=1, evaluation__every={STEPS})
  return as_config_dict(world.config(pathlib.Path({str(world_folder)!r}), **changes))
"""
  )
  return path


def start(config_file, workdir, environment, *flags):
  """launch/run.py in a process of its own."""
  command = [sys.executable, str(ROOT / "launch/run.py"), f"--config={config_file}", f"--workdir={workdir}", *flags]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_after(process, workdir, lines, wait, how):
  """Sends a signal once the process has written that many lines of scalars, and `wait` seconds more."""
  path = workdir / "scalars.jsonl"
  look = lambda: (path.stat().st_ino, path.read_bytes().count(b"\n")) if path.exists() else (0, 0)
  before, _ = look()  # a process that continues a run puts another file in its place
  first = None
  while process.poll() is None and (first is None or look()[1] < first + lines):
    if first is None and look()[0] != before:
      first = look()[1]
    time.sleep(0.002)
  time.sleep(wait)
  assert process.poll() is None, process.communicate()[0]
  process.send_signal(how)
  return process.communicate(timeout=60)[0]


def lines_of(workdir, name):
  """The lines of a file, without what depends on the clock."""
  rows = [json.loads(line) for line in (workdir / name).open()]
  return [{key: value for key, value in row.items() if not key.startswith(COSTS)} for row in rows]


def last_state(run, workdir):
  checkpoints = checkpoint.Checkpoints(workdir, run.config)
  state, _ = checkpoints.restore(run.abstract_state)
  checkpoints.close()
  return jax.device_get(state)


def test_a_run_that_is_killed_ends_as_one_that_is_not(config_file, world_folder, one_device, tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  output = start(config_file, whole, one_device).communicate(timeout=120)[0]
  assert (whole / "report.html").is_file(), output
  moments = random.Random(time.time_ns())
  for _ in range(2):
    wait = moments.uniform(0, 0.15)
    process = start(config_file, broken, one_device)
    stop_after(process, broken, 2, wait, signal.SIGKILL)
    print(f"killed {wait:.3f} s after two steps")
    assert process.returncode == -signal.SIGKILL and not (broken / "report.html").exists()

  process = start(config_file, broken, one_device)
  output = stop_after(process, broken, 1, 0, signal.SIGTERM)
  stopped = int(re.search(r"stopped at step (\d+), which is saved", output)[1])
  assert process.returncode == 0 and stopped < STEPS
  assert (broken / "checkpoints" / str(stopped)).is_dir()

  output = start(config_file, broken, one_device).communicate(timeout=120)[0]
  assert f"resuming at step {stopped} of {STEPS}" in output
  for name in ("scalars.jsonl", "evaluations.jsonl", "transcript.jsonl"):
    assert lines_of(broken, name) == lines_of(whole, name), name
  run = world.open_session(world.config(world_folder, steps=STEPS))
  state = last_state(run, whole)
  assert state.step == STEPS and world.same(last_state(run, broken), state)
  assert not world.same(state.players, jax.device_get(run.init_state()).players)

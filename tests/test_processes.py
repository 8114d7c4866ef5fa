"""A run on several processes: it plays what one process plays, and whatever dies, it ends as if nothing had.

Two processes of one device each; `ADVGAME_KILLS=20 pytest tests/test_processes.py -s` tries more, and kills that often.
"""

import functools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
import world

from advgame_jax import checkpoint, train

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("ADVGAME_KILLS", "1"))
STEPS, MANY = 3, 2 + KILLS  # many: one for each kill
OF_THE_CLOCK = ("mfu/", "time", "cost/", "seconds/", "tokens_per_second/")


@pytest.fixture(scope="module")
def config_file(world_folder, tmp_path_factory):
  """The tiny world, a checkpoint after every step."""
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import world
from advgame_jax.config import as_config_dict

def get_config():
  changes = dict(steps={STEPS}, checkpoint__every=1, evaluation__every=100)
  return as_config_dict(world.config(pathlib.Path({str(world_folder)!r}), **changes))
""")
  return path


@pytest.fixture(scope="module")
def launch(config_file, one_device):
  """Starts launch/run.py in so many processes of so many devices each; `last`: flags of the last process alone."""

  def start(workdir, processes, devices, *flags, sharding="fsdp", steps=STEPS, last=()):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    there = f"{one_device.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(ROOT / "launch/run.py"), f"--config={config_file}", f"--workdir={workdir}"]
    command += [f"--config.steps={steps}", *flags]
    command += [f"--config.sharding={sharding}", f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
    environment = one_device | {"XLA_FLAGS": there, "PJRT_NPROC": "64"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    places = [[f"--process={i}"] for i in range(processes)]
    places[-1] += last
    return [subprocess.Popen([*command, *place], env=environment, **pipes) for place in places]

  return start


def finish(started, seconds=400):
  """The outputs of processes that end well."""
  outputs = [process.communicate(timeout=seconds)[0] for process in started]
  assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
  return outputs


def lines_of(workdir, name):
  rows = [json.loads(line) for line in (workdir / name).open()]
  return [{key: value for key, value in row.items() if not key.startswith(OF_THE_CLOCK)} for row in rows]


@pytest.fixture(scope="module")
def state_of(world_folder):
  """The last state of a run, on the host."""

  def restore(workdir, steps=STEPS):
    run = world.open_session(world.config(world_folder, steps=steps, checkpoint__every=1))
    checkpoints = checkpoint.Checkpoints(workdir, run.config, read_only=True)
    state, _ = checkpoints.restore(run.abstract_state)
    checkpoints.close()
    assert int(state.step) == steps
    return jax.device_get(state)

  return restore


@pytest.fixture(scope="module")
def runs(launch, world_folder, tmp_path_factory):
  """(processes, devices of each, steps) → the folder of such a run, left alone, and what its processes said.

  The run of one process is this one's.
  """

  @functools.cache
  def run(processes, devices, steps):
    folder = tmp_path_factory.mktemp("runs") / "run"
    if processes > 1:
      return folder, finish(launch(folder, processes, devices, steps=steps))
    changes = {"steps": steps, "checkpoint__every": 1, "evaluation__every": 100, "sharding": "fsdp"}
    train.train(world.config(world_folder, **changes), str(folder), devices=jax.devices()[:devices])
    return folder, []

  return run


def plays_alike(state_of, folder, other, steps=STEPS):
  """The same tree and tokens; losses, gradients and final weights up to roundings."""
  assert lines_of(folder, "transcript.jsonl") == lines_of(other, "transcript.jsonl")
  for mine, theirs in zip(lines_of(folder, "scalars.jsonl"), lines_of(other, "scalars.jsonl"), strict=True):
    if not mine["step"]:  # whether margins of 0 are above 0 is a matter of roundings
      mine, theirs = ({k: v for k, v in row.items() if not k.endswith("/accuracy")} for row in (mine, theirs))
    assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4, nan_ok=True)
  mine, theirs = state_of(folder, steps), state_of(other, steps)
  world.assert_close(world.first_moments(mine), world.first_moments(theirs), 1e-3)
  world.assert_close(*([player.params for player in state.players] for state in (mine, theirs)), 1e-3)


@pytest.mark.parametrize("processes,devices", [(2, 1)] if KILLS == 1 else [(2, 1), (2, 4), (4, 2)])
def test_processes_play_and_learn_as_one_does(runs, state_of, processes, devices):
  folder, outputs = runs(processes, devices, STEPS)
  plays_alike(state_of, folder, runs(1, processes * devices, STEPS)[0])
  assert (folder / "report.html").is_file()
  assert "step 1/" in outputs[0] and not any("step 1/" in output for output in outputs[1:])  # one of them tells


@pytest.mark.skipif(KILLS < 2, reason="starts two processes more; set ADVGAME_KILLS")
def test_a_process_with_other_settings_is_refused_by_all(launch, tmp_path):
  started = launch(tmp_path / "run", 2, 1, last=["--config.seed=5"])
  outputs = [process.communicate(timeout=200)[0] for process in started]
  assert [process.returncode for process in started] == [2, 2], outputs
  assert "process 1 has other settings than process 0 (seed 0 → 5); allowed: the same config" in outputs[0]
  assert not (tmp_path / "run").exists()


@pytest.mark.skipif(KILLS < 2, reason="starts eight processes; set ADVGAME_KILLS")
def test_a_run_goes_on_on_other_meshes_and_under_other_presets(launch, runs, state_of, tmp_path):
  """Stopped after a step or two on each of 1 × 8, 2 × 4, 4 × 2, each with a sharding of its own, and ended on 1 × 8.

  At a learning rate at which the roundings of eight steps stay roundings.
  """
  folder, steps, done = tmp_path / "run", 8, 0
  calm = [f"--config.{player}.optimizer.learning_rate=1e-3" for player in ("attacker", "defender")]
  for processes, devices, sharding in [(1, 8, "fsdp_tensor"), (2, 4, "hybrid"), (4, 2, "ddp"), (1, 8, "fsdp")]:
    flags = ["--config.mesh.tensor=2"] if sharding == "fsdp_tensor" else []  # there are two key heads
    started = launch(folder, processes, devices, *flags, *calm, sharding=sharding, steps=steps)
    while newest(folder) == done and all(process.poll() is None for process in started):
      time.sleep(0.01)
    if sharding != "fsdp":
      started[-1].send_signal(signal.SIGTERM)  # to one of them: all stop at the same step
    outputs = finish(started)
    assert not done or all(f"resuming at step {done} of {steps}" in output for output in outputs), "\n".join(outputs)
    assert done < newest(folder) < steps or sharding == "fsdp"
    done = newest(folder)
  finish(launch(tmp_path / "whole", 1, 8, *calm, steps=steps))
  plays_alike(state_of, folder, tmp_path / "whole", steps)


def newest(folder):
  """The step of the last checkpoint, or 0."""
  return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def test_whoever_is_killed_the_run_ends_as_one_that_was_left_alone(launch, runs, state_of, tmp_path):
  whole, broken, moments = runs(2, 1, MANY)[0], tmp_path / "broken", random.Random(time.time_ns())
  for kill in range(KILLS):
    started = launch(broken, 2, 1, steps=MANY)
    reached = broken / "checkpoints" / str(kill + 1)
    while not reached.is_dir() and all(process.poll() is None for process in started):
      time.sleep(0.01)
    time.sleep(moments.uniform(0, 0.3))
    victims = moments.choice([started[:1], started[1:], started])
    for process in victims:
      process.kill()
    outputs = [process.communicate(timeout=60)[0] for process in started]
    codes = [process.returncode for process in started]
    print(f"kill {kill + 1}: {len(victims)} at {reached.name}: {codes}")
    for process, output in zip(started, outputs):
      if process not in victims and process.returncode:  # it may have been through
        assert process.returncode == 3 and f"process {1 - started.index(process)} of 2 (" in output, output
  finish(launch(broken, 2, 1, steps=MANY))
  for name in ("scalars.jsonl", "evaluations.jsonl", "transcript.jsonl"):
    assert lines_of(broken, name) == lines_of(whole, name), name
  assert world.same(state_of(broken, MANY), state_of(whole, MANY))

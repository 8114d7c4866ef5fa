"""The programs as a user runs them: killed and continued, refused in one sentence, and short."""

import json
import pathlib
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

import jax
import pytest
import world
from absl import flags

from advgame_jax import checkpoint, command
from advgame_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
COSTS = ("mfu/", "time", "cost/", "seconds/", "tokens_per_second/")
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
from absl import flags
from advgame_jax.config import as_config_dict

def get_config():
  changes = dict(steps={STEPS}, checkpoint__every=1, evaluation__every={STEPS})
  return as_config_dict(world.config(pathlib.Path({str(world_folder)!r}), **changes))
"""
  )
  return path


def start(config_file, workdir, environment, *flags):
  """launch/run.py in a process of its own."""
  arguments = [sys.executable, str(ROOT / "launch/run.py"), f"--config={config_file}", f"--workdir={workdir}", *flags]
  return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
  assert (broken / "checkpoints" / str(stopped)).is_dir() and (broken / "report.html").is_file()

  output = start(config_file, broken, one_device).communicate(timeout=120)[0]
  assert f"resuming at step {stopped} of {STEPS}" in output
  for name in ("scalars.jsonl", "evaluations.jsonl", "transcript.jsonl"):
    assert lines_of(broken, name) == lines_of(whole, name), name
  run = world.open_session(world.config(world_folder, steps=STEPS))
  state = last_state(run, whole)
  assert state.step == STEPS and world.same(last_state(run, broken), state)
  assert not world.same(state.players, jax.device_get(run.init_state()).players)


@pytest.fixture
def parse(monkeypatch):
  """Reads a command line as a program of launch/ does; returns the config that run.py gets."""
  monkeypatch.chdir(ROOT)
  before = set(flags.FLAGS)

  def read(script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    program = runpy.run_path(str(ROOT / script))
    try:
      command._parse_flags(sys.argv)
      return program["CONFIG"]() if "CONFIG" in program else None
    finally:
      for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)

  return read


def make(target, *variables):
  """The commands that make would run, a line each."""
  lines = subprocess.run(["make", "-n", "-B", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True)
  return [shlex.split(line) for line in lines.stdout.replace("\\\n", " ").splitlines()]


def test_the_commands_of_the_quickstart_parse(parse, tmp_path):
  found = []
  for words in make("quickstart", f"WORLD={tmp_path}", f"RUN={tmp_path}/run", "SEED=3"):
    if any(word.startswith("launch/") for word in words):
      python, script, *arguments = words
      assert python.endswith("/python")
      found.append((script, parse(script, *arguments)))
  assert [script for script, _ in found] == ["launch/microworld.py", *["launch/warmstart.py"] * 2, "launch/run.py"]
  config = found[-1][1]
  assert config.seed == 3
  assert (config.attacker.model, config.defender.model) == (f"{tmp_path}/attacker_base", f"{tmp_path}/defender_base")


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (["--config.loss.betta=1"], "there is no setting config.loss.betta: did you mean beta? allowed here: baseline, "),
    (["--config.los.beta=1"], "there is no setting config.los: did you mean loss? allowed here: attacker, "),
    (["--config.steps=many"], "many"),
    (["--config.game.attacks=1.5"], "1.5"),
    (["--steps=3"], "Unknown command line flag 'steps'"),
    (["runs/x"], "'runs/x' is no flag; allowed: --name=value"),
    (["--config=configs/nowhere.py"], "configs/nowhere.py"),
    (["--config=configs/microworld.py:ppo"], "configs/microworld.py:ppo names no loss; allowed: dpo, ipo, grpo"),
  ],
)
def test_flags_are_refused_in_a_sentence(parse, capsys, arguments, sentence):
  with pytest.raises(SystemExit) as exit:
    parse("launch/run.py", "--workdir=x", *arguments)
  output = capsys.readouterr()
  assert exit.value.code == 2
  assert re.fullmatch(r"error: [^\n]+\n", output.err) and sentence in output.err and not output.out


@pytest.mark.parametrize(
  "argument, sentence",
  [
    ("--config.loss.kind=ppo", "config.loss.kind is 'ppo'; allowed: one of 'dpo', 'ipo', 'grpo'"),
    ("--config.steps=0", "config.steps is 0; allowed: at least 1"),
    ("--config.attacker.sampling.top_p=1.5", "config.attacker.sampling.top_p is 1.5; allowed: at most 1"),
    ("--config.game.responses=1", "config.game.responses is 1, but dpo learns from pairs; allowed: at least 2"),
  ],
)
def test_values_are_refused_in_a_sentence(parse, argument, sentence):
  with pytest.raises(UserError, match=re.escape(sentence)):
    parse("launch/run.py", "--workdir=x", argument)


def test_a_program_ends_in_a_sentence_and_exit_code_2(config_file, one_device, tmp_path):
  process = start(config_file, tmp_path / "run", one_device, "--config.mesh.fsdp=3")
  output = process.communicate(timeout=120)[0]
  assert process.returncode == 2
  assert re.fullmatch(
    r"error: mesh data=-1, fsdp=3, sequence=1, tensor=1 does not fit 1 devices; allowed: [^\n]+\n", output
  )
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_programs_are_short(path):
  assert len(path.read_text().splitlines()) <= 60

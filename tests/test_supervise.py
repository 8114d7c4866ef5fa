"""A supervisor and its child: what is started again, what is not, and that signals reach the child."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from advgame_jax import supervise

ROOT = pathlib.Path(__file__).parents[1]
# Notes each start in a file, and ends as the codes given say, one a start: a negative one is a signal to itself.
PROGRAM = """
import os, pathlib, signal, sys, time
from advgame_jax import supervise
supervise.supervise(sys.argv, pause=0.1)
assert "jax" not in sys.modules
starts = pathlib.Path(sys.argv[1])
with starts.open("a") as file:
  file.write(f"{os.getppid()} {' '.join(sys.argv[3:])}\\n")
codes = [int(code) for code in sys.argv[2].split(",")]
code = codes[min(len(starts.read_text().splitlines()), len(codes)) - 1]
if code == 99:
  def stop(number, _):
    time.sleep(0.3)  # saves
    print("saved after", signal.Signals(number).name, flush=True)
    sys.exit(7)
  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  print("waits", flush=True)
  time.sleep(30)
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
  """Starts the program under a supervisor."""
  (tmp_path / "program.py").write_text(PROGRAM)

  def started(codes, *flags):
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "starts"), codes, *flags]
    return subprocess.Popen(
      command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

  return started


def starts(tmp_path):
  return (tmp_path / "starts").read_text().splitlines()


def test_it_starts_again_after_a_kill_and_a_failure_and_says_so(start, tmp_path):
  process = start("-9,1,0", "--max-restarts=5", "--x=1")
  _, errors = process.communicate(timeout=20)
  assert process.returncode == 0
  assert starts(tmp_path) == [f"{process.pid} --max-restarts=5 --x=1 --max_restarts=0"] * 3
  assert errors.splitlines() == [
    "the run was ended by SIGKILL; restart 1 of 5 in 0.1 s",
    "the run ended with exit code 1; restart 2 of 5 in 0.2 s",
  ]


@pytest.mark.parametrize("codes, code, tries", [("3", 3, 3), ("1,-9", 137, 3), ("2", 2, 1), ("3,2", 2, 2), ("0", 0, 1)])
def test_it_ends_with_the_code_of_the_last_child(start, tmp_path, codes, code, tries):
  process = start(codes, "--max_restarts", "2")
  _, errors = process.communicate(timeout=20)
  assert (process.returncode, len(starts(tmp_path))) == (code, tries)
  assert ("no restart is left of 2" in errors) == (code not in (0, 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_child_which_is_waited_for_and_not_started_again(start, tmp_path, number):
  process = start("99", "--max-restarts=5")
  assert process.stdout.readline() == "waits\n"
  process.send_signal(number)
  output, _ = process.communicate(timeout=20)
  assert output == f"saved after {number.name}\n"
  assert process.returncode == 7 and len(starts(tmp_path)) == 1


def test_a_signal_ends_the_pause_between_two_children(start, tmp_path):
  (tmp_path / "program.py").write_text(PROGRAM.replace("pause=0.1", "pause=30"))
  command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "starts"), "5", "--max-restarts=1"]
  process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
  assert "in 30 s" in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=5)
  assert process.returncode == 5 and len(starts(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="parents are watched by Linux's prctl")
def test_a_supervisor_that_is_killed_leaves_no_child(start, tmp_path):
  process = start("99", "--max-restarts=5")
  assert process.stdout.readline() == "waits\n"
  process.kill()
  assert process.communicate(timeout=5)[0] == "saved after SIGTERM\n"  # its end closes the pipe


def test_without_restarts_there_is_no_supervisor(start, tmp_path):
  process = start("5", "--max-restarts=0")
  process.communicate(timeout=20)
  assert process.returncode == 5 and starts(tmp_path) == [f"{os.getpid()} --max-restarts=0"]


@pytest.mark.parametrize(
  "arguments, restarts",
  [
    ([], 0),
    (["--max-restarts=3"], 3),
    (["-max_restarts", "4"], 4),
    (["--max_restarts=3", "--max-restarts=0"], 0),
    (["--max-restarts=many"], 0),
    (["--max-restarts=-1"], 0),
    (["--max-restarts"], 0),
    (["--config.max_restarts=3"], 0),
  ],
)
def test_how_often_is_read_from_the_command(arguments, restarts):
  assert supervise._restarts(["run.py", *arguments]) == restarts


def test_pauses_grow_and_are_bounded(monkeypatch):
  waits = []
  monkeypatch.setattr(supervise, "_sleep", lambda seconds, _: waits.append(seconds) or False)
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    monkeypatch.setattr(supervise, "_die_with_parent", None)  # a fork of this process, which has threads, might hang
    assert supervise._supervise(["false"], 7, 2.0) == 1
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  assert waits == [2, 4, 8, 16, 32, 60, 60]


def test_it_adds_no_second_to_a_start():
  began = time.monotonic()
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run([sys.executable, "-c", "import advgame_jax.supervise"], check=True, env=environment)
  assert time.monotonic() - began < 1

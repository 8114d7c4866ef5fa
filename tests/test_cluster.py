"""Several processes as on several hosts: they find each other, and when one is gone, the others end and say who."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from advgame_jax import cluster
from advgame_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
# Counts steps in a file that process 0 writes; every step is a collective, or only time. The flags are run.py's.
PROGRAM = """
import sys
from advgame_jax import supervise
if __name__ == "__main__":
  supervise.supervise(sys.argv, pause=0.2)
import os, pathlib, time
from absl import flags
from advgame_jax import cluster, command
from advgame_jax.types import UserError
COORDINATOR = flags.DEFINE_string("coordinator", "", "")
PROCESSES = flags.DEFINE_integer("processes", None, "")
PROCESS = flags.DEFINE_integer("process", None, "")
HEARTBEAT = flags.DEFINE_integer("heartbeat_seconds", 10, "")
JOIN = flags.DEFINE_integer("join_seconds", 40, "")
RESTARTS = flags.DEFINE_integer("max_restarts", 0, "")
FOLDER = flags.DEFINE_string("folder", None, "")
STEPS = flags.DEFINE_integer("steps", 5, "")
FAIL = flags.DEFINE_string("fail", "", "process:step:how")

def main():
  place = cluster.find(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  with cluster.joined(place, HEARTBEAT.value, JOIN.value):
    import jax
    from jax.experimental import multihost_utils
    folder, me = pathlib.Path(FOLDER.value), jax.process_index()
    first = int((folder / "step").read_text()) if (folder / "step").exists() else 0
    print(f"up {me} of {jax.process_count()} at {first}", flush=True)
    process, at, how = (FAIL.value or "-1:0:").split(":")
    (folder / f"pid{me}").write_text(str(os.getpid()))
    for step in range(first, STEPS.value):
      if (me, step, first) == (int(process), int(at), 0):
        if how == "kill":
          os.kill(os.getpid(), 9)
        if how == "user":
          raise UserError("there are no seeds; allowed: some")
        if how == "abort":
          os.abort()
        if how == "bug":
          raise KeyError("lost")
      multihost_utils.process_allgather(jax.numpy.full(3, step))
      if me == 0:
        (folder / "step.new").write_text(str(step + 1))
        (folder / "step.new").rename(folder / "step")
  print("done", flush=True)

if __name__ == "__main__":
  command.run(main)
"""


def free_port():
  """A port that is free, as is the one below."""
  while True:
    with socket.socket() as upper, socket.socket() as lower:
      upper.bind(("127.0.0.1", 0))
      port = upper.getsockname()[1]
      try:
        lower.bind(("127.0.0.1", port - 1))
      except OSError:
        continue
      return port


@pytest.fixture
def start(tmp_path, one_device):
  """Starts one process of the program; those that a failed test leaves are killed."""
  (tmp_path / "program.py").write_text(PROGRAM)
  started = []

  def one(*flags, **environment):
    command = [sys.executable, str(tmp_path / "program.py"), f"--folder={tmp_path}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started.append(subprocess.Popen(command, env=one_device | {"PYTHONPATH": str(ROOT)} | environment, **pipes))
    return started[-1]

  yield one
  for process in started:
    process.kill()
    process.wait()


def start_all(start, n, *flags):
  port = free_port()
  where = [f"--coordinator=127.0.0.1:{port}", f"--processes={n}", *flags]
  return [start(*where, f"--process={process}") for process in range(n)]


def outputs(processes):
  return [process.communicate(timeout=60)[0] for process in processes]


def codes(processes):
  return [process.returncode for process in processes]


def test_processes_find_each_other_by_flags(start):
  processes = start_all(start, 2)
  said = outputs(processes)
  assert codes(processes) == [0, 0], said
  for process, output in enumerate(said):
    assert f"up {process} of 2 at 0" in output and "done" in output and "error" not in output


@pytest.mark.parametrize("scheduler", ["slurm", "ompi"])
def test_processes_find_each_other_by_the_environment_of_a_scheduler(start, scheduler):
  port = str(free_port())
  of_all = {
    "slurm": {
      "SLURM_JOB_ID": "7",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_STEP_TASKS_PER_NODE": "2",
    },
    "ompi": {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"},
  }[scheduler]
  of_each = {
    "slurm": lambda i: {"SLURM_PROCID": i, "SLURM_LOCALID": i},
    "ompi": lambda i: {"OMPI_COMM_WORLD_RANK": i, "OMPI_COMM_WORLD_LOCAL_RANK": i},
  }[scheduler]
  processes = [start(JAX_COORDINATOR_PORT=port, **of_all, **of_each(str(i))) for i in range(2)]
  said = outputs(processes)
  assert codes(processes) == [0, 0], said
  assert all(f"up {i} of 2" in said[i] for i in range(2))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_others_name_it_and_end_with_3(start, victim):
  processes = start_all(start, 3, f"--fail={victim}:3:kill", "--heartbeat_seconds=30")
  processes[victim].wait(timeout=60)
  killed = time.monotonic()
  said = outputs(processes)
  assert time.monotonic() - killed < 5, said  # not by a heartbeat
  assert codes(processes) == [-signal.SIGKILL if i == victim else 3 for i in range(3)], said
  sentence = rf"^error: process {victim} of 3 \(.+\) is gone; the same command goes on from the last checkpoint$"
  assert all(len(re.findall(sentence, said[i], re.M)) == 1 for i in range(3) if i != victim), said


@pytest.mark.parametrize(
  "how, own, others, sentence",
  [
    ("user", 2, 2, "error: process 1 of 2 (HOST) ended: there are no seeds; allowed: some\n"),
    ("bug", 1, 3, "error: process 1 of 2 (HOST) failed: KeyError: 'lost'; the same command goes on from the last"),
    ("abort", -6, 3, "error: process 1 of 2 (HOST) failed: XLA aborted it; its own output says why; the same command"),
  ],
)
def test_a_process_that_fails_tells_the_others_why(start, how, own, others, sentence):
  processes = start_all(start, 2, f"--fail=1:2:{how}", "--heartbeat_seconds=30")
  began = time.monotonic()
  said = outputs(processes)
  assert codes(processes) == [others, own], said
  assert sentence.replace("HOST", socket.gethostname()) in said[0]
  assert {"user": "error: there are no seeds", "bug": "KeyError: 'lost'", "abort": ""}[how] in said[1]
  assert time.monotonic() - began < 25  # nobody waits for a barrier


def test_supervisors_bring_a_run_to_its_end_whoever_is_killed(start, tmp_path):
  steps = 1000
  processes = start_all(start, 3, "--max-restarts=4", f"--steps={steps}")
  pids = [tmp_path / f"pid{process}" for process in range(3)]
  for victim in (1, 0):
    wait_for(pids, above=5)
    pid = int(pids[victim].read_text())
    for path in pids:
      path.unlink()
    os.kill(pid, signal.SIGKILL)
  said = outputs(processes)
  assert codes(processes) == [0, 0, 0], said
  assert (tmp_path / "step").read_text() == str(steps)
  assert [output.count("restart 1 of 4") for output in said] == [1, 1, 1], said
  assert [output.count("restart 2 of 4") for output in said] == [1, 1, 1], said
  assert "was ended by SIGKILL" in said[1] and "was ended by SIGKILL" in said[0]


def wait_for(pids, above):
  """Until all processes are there and have made some steps more."""
  until, before, step = time.monotonic() + 60, None, pids[0].with_name("step")
  while before is None or not step.exists() or int(step.read_text()) <= before + above:
    if before is None and all(path.exists() and path.read_text() for path in pids):
      before = int(step.read_text()) if step.exists() else 0
    assert time.monotonic() < until
    time.sleep(0.01)


def test_an_unreachable_coordinator_and_missing_processes_are_said_in_bounded_time(start):
  port = free_port()
  alone = start(f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=1", "--join_seconds=2")
  waits = start(f"--coordinator=127.0.0.1:{free_port()}", "--processes=9", "--process=0", "--join_seconds=2")
  said = outputs([alone, waits])
  assert codes([alone, waits]) == [3, 3]
  assert re.fullmatch(
    rf"error: process 1 of 2 did not reach process 0 at 127.0.0.1:{port - 1} within 2 s \(.+\); allowed: .+\n", said[0]
  )
  assert said[1] == (
    "error: of processes 0 to 8, 1, 2, 3, 4, 5, 6, 7, 8 did not come within 2 s; allowed: the same command on every "
    "host, each with its own --process, or a larger --join_seconds\n"
  )


@pytest.mark.parametrize(
  "first, second, sentence",
  [
    ((3, 0), (2, 1), r"process 0 was told of 3 processes, but process 1 \(.+\) of 2; allowed: .+"),
    ((2, 0), (2, 0), r"ports \d+ and \d+ cannot both be opened \(.+\); allowed: .+"),
  ],
)
def test_hosts_that_are_told_different_things_are_refused(start, first, second, sentence):
  port = free_port()
  flags = lambda n, i: (f"--coordinator=127.0.0.1:{port}", f"--processes={n}", f"--process={i}", "--join_seconds=15")
  processes = [start(*flags(*first))]
  if second == first:
    time.sleep(2.5)
  processes.append(start(*flags(*second)))
  assert re.fullmatch(f"error: {sentence}\n", outputs(processes[1:])[0])
  assert processes[1].returncode == 2


def knock(port, *lines):
  """Talks to process 0 as if it were another; returns the answer."""
  for _ in range(400):
    try:
      connection = socket.create_connection(("127.0.0.1", port - 1), timeout=10)
      break
    except OSError:
      time.sleep(0.05)
  with connection:
    connection.sendall(b"".join(lines))
    return connection.recv(4096)


def test_strangers_at_the_door_change_nothing(start):
  port = free_port()
  flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--join_seconds=40"]
  first = start(*flags, "--process=0")
  assert knock(port, b"GET / HTTP/1.1\r\n\r\n") == b""
  assert knock(port, b'{"process": "one"}\n') == b""
  assert knock(port, b"[1]\n") == b""
  second = start(*flags, "--process=1")
  said = outputs([first, second])
  assert codes([first, second]) == [0, 0], said


@pytest.mark.parametrize(
  "given, sentence",
  [
    (
      {"coordinator": "a:5"},
      "--processes and --process not given, and this is no cluster that says it; allowed: all of ",
    ),
    ({"processes": 2}, "--coordinator and --process not given"),
    ({"processes": 2, "process": 1}, "--coordinator not given"),
    ({"coordinator": "a", "processes": 2, "process": 1}, "the coordinator is 'a'; allowed: HOST:PORT of process 0"),
    ({"coordinator": "a:0", "processes": 2, "process": 1}, "the coordinator is 'a:0'"),
    ({"coordinator": "a:99999", "processes": 2, "process": 1}, "the coordinator is 'a:99999'"),
    ({"coordinator": "a:5", "processes": 2, "process": 2}, "process 2 of 2 processes; allowed: --process from 0"),
    (
      {"coordinator": "a:5", "processes": 2, "process": 1, "local_devices": "x"},
      "--local_devices is 'x'; allowed: numbers",
    ),
  ],
)
def test_flags_that_make_no_place_are_refused(given, sentence):
  with pytest.raises(UserError, match=re.escape(sentence)):
    cluster.find(**given)


def test_a_plain_machine_asks_nobody(monkeypatch):
  def refuse(*_):
    raise AssertionError("a network was asked")

  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setattr(socket.socket, "connect", refuse)
  assert cluster.find() is None
  assert cluster.find(processes=1) is None
  for said in ({"local_devices": "0"}, {"processes": 1, "local_devices": "0"}, {"processes": 1, "process": 3}):
    with pytest.raises(UserError, match=r"(one|only) process[^;]*; allowed"):
      cluster.find(**said)
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod, but not one of an indexed job
  monkeypatch.setenv("SLURM_JOB_ID", "7")  # a batch script's own shell, and a step of one task
  monkeypatch.setenv("SLURM_NTASKS", "8")
  assert cluster.find() is None
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert cluster.find() is None


@pytest.mark.parametrize(
  "environment, devices",
  [
    ({}, ()),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}, ()),  # a task per node has all of its devices
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "5"}, (5,)),
    ({"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_LOCALID": "0"}, (0,)),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"}, ()),  # --gpus-per-task
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, (3,)),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, ()),
  ],
)
def test_processes_of_one_host_divide_its_devices(environment, devices):
  assert cluster._local_devices("", environment) == devices
  assert cluster._local_devices("0,1", environment) == (0, 1)


def test_slurm_says_where_each_process_is(monkeypatch):
  job = {"SLURM_JOB_ID": "4095", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_NTASKS": "4"}
  for name, value in (job | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}).items():
    monkeypatch.setenv(name, value)
  assert cluster.find() == cluster.Place("gpu03:65535", 4, 2)
  assert cluster.find(coordinator="gpu03-ib:9000") == cluster.Place("gpu03-ib:9000", 4, 2)


def test_open_mpi_5_says_all_but_the_address(monkeypatch):
  for name, value in {"SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}.items():
    monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
  assert cluster.find(coordinator="a:5") == cluster.Place("a:5", 4, 2)
  monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="does not say where process 0 is"):
    cluster.find()

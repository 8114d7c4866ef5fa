"""A run on several processes: how they find each other, and how all of them end when one is gone.

Before JAX is told of the others, the processes meet at process 0, at the port below the coordinator's. That connection
stays open as long as the run: when a process dies, its host's kernel closes it, and everybody knows at once who it was.
A host that falls silent is found by the kernel's own probes, so that a process which computes for long is never taken
for a dead one; one that hangs is found by JAX's heartbeats.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import importlib.util
import json
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import cloud_tpu_init, clusters  # private, but what jax.distributed itself detects by

from advgame_jax.types import UserError

GONE = 3  # exit code: another process is gone, and the same command resumes
_FAILED = 1
_LONGEST_LINE = 2**20
_ASKING_SECONDS = 60  # for the name of process 0 to be known
_VERDICT_SECONDS = 3.0  # in which a death is known everywhere once it shows as some other error
_RESUMES = "the same command goes on from the last checkpoint"
# What XLA says when it misses somebody; the watch then soon knows whom.
_MISSED = re.compile(r"gloo|nccl|coordination|heartbeat|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL", re.I)


@dataclasses.dataclass(frozen=True)
class Place:
  """Which of the processes of a run this one is."""

  coordinator: str  # HOST:PORT of process 0
  processes: int
  process: int
  local_devices: tuple[int, ...] = ()  # of this host, that this process uses; empty: all

  def __post_init__(self) -> None:
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 2 <= int(port) <= 65535:
      raise UserError(f"the coordinator is {self.coordinator!r}; allowed: HOST:PORT of process 0")
    if not 0 <= self.process < self.processes:
      raise UserError(
        f"process {self.process} of {self.processes} processes; allowed: --process from 0 to --processes less one"
      )

  @property
  def meeting(self) -> tuple[str, int]:
    """Where the processes meet: the port below the coordinator's."""
    host, _, port = self.coordinator.rpartition(":")
    return host.strip("[]"), int(port) - 1


def find(
  coordinator: str = "", processes: int | None = None, process: int | None = None, local_devices: str = ""
) -> Place | None:
  """The place of this process: what is given, and what is not as the cluster says. None: it is the only one.

  TPU pods (also of GKE), Slurm, Open MPI and indexed Kubernetes jobs are recognised. Nothing is asked over a network
  but on a machine that has TPUs (its metadata server) or in an indexed job (Kubernetes).

  Args:
    local_devices: numbers with commas; empty: all of the host, or, of several processes on a host, one each.

  Raises:
    UserError: something is missing that no cluster says, or is not a place.
  """
  if processes == 1:
    return None
  given = {"--coordinator": coordinator or None, "--processes": processes, "--process": process}
  missing = [name for name, value in given.items() if value is None]
  method = _cluster(os.environ)
  if missing and method is None:
    if len(missing) == len(given):
      return None
    raise UserError(
      f"{' and '.join(missing)} not given, and this is no cluster that says it; allowed: all of {', '.join(given)}"
    )
  if missing:
    coordinator, processes, process = _detected(method, coordinator, processes, process)
  assert processes is not None and process is not None
  place = Place(coordinator, processes, process, _local_devices(local_devices, os.environ))
  return place if processes > 1 else None


def _cluster(environment: Mapping[str, str]) -> str | None:
  """What JAX calls the cluster, by the environment alone; None on a plain machine, and for a scheduler's only task."""
  if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
  if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
    return "slurm"
  if cloud_tpu_init.running_in_cloud_tpu_vm:
    if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH"} & environment.keys():
      return "gketpu"
    return None if "TPU_SKIP_MDS_QUERY" in environment else "gcetpu"
  if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
    return "k8s"
  return None


def _detected(method: str | None, coordinator: str, processes: int | None, process: int | None) -> tuple[str, int, int]:
  """Fills in what JAX finds out of its environment."""
  if method == "mpi4py":  # Open MPI 5 tells everything but an address
    processes = int(os.environ["OMPI_COMM_WORLD_SIZE"]) if processes is None else processes
    process = int(os.environ["OMPI_COMM_WORLD_RANK"]) if process is None else process
    if not coordinator and importlib.util.find_spec("mpi4py") is None:
      raise UserError("Open MPI 5 does not say where process 0 is; allowed: --coordinator=HOST:PORT, or mpi4py")
  if method == "k8s":
    if importlib.util.find_spec("kubernetes") is None:
      raise UserError(
        "this is a job of Kubernetes, which only its Python package can ask where process 0 is; allowed: `pip install "
        "kubernetes`, or --coordinator=HOST:PORT, --processes=N and --process=I"
      )
    method = None  # JAX does not name it; it is what is left when the others are not there
  found = None
  with _refused_as(f"the cluster ({method or 'Kubernetes'}) does not say where its processes are"):
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      coordinator or None, processes, process, (), method, _ASKING_SECONDS
    )
  address, processes, process = found[:3] if found else (None, None, None)
  if address is None or processes is None or process is None:
    raise UserError("this cluster does not say all of --coordinator=HOST:PORT, --processes=N, --process=I: give them")
  return address, processes, process


@contextlib.contextmanager
def _refused_as(what: str) -> Iterator[None]:
  """Whatever fails in asking a cluster, in one sentence."""
  try:
    yield
  except Exception as error:
    said = " ".join(str(error).split())[:300]
    raise UserError(
      f"{what}: {said}; allowed: --coordinator=HOST:PORT, --processes=N and --process=I, or --processes=1 for this "
      "host alone"
    ) from error


def _local_devices(given: str, environment: Mapping[str, str]) -> tuple[int, ...]:
  """One device for each process where a scheduler starts several on a host and does not divide the devices itself."""
  if given:
    if not re.fullmatch(r"\d+(,\d+)*", given):
      raise UserError(f"--local_devices is {given!r}; allowed: numbers with commas, as 0 or 0,1")
    return tuple(int(number) for number in given.split(","))
  visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
  if re.fullmatch(r"[^,]+", visible):
    return ()  # divided already
  if int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1:
    return (int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]),)
  tasks = re.findall(r"\d+(?=$|[,(])", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
  if any(int(number) > 1 for number in tasks):
    return (int(environment["SLURM_LOCALID"]),)
  return ()


@contextlib.contextmanager
def joined(place: Place | None, heartbeat_seconds: int = 30, join_seconds: int = 300) -> Iterator[None]:
  """A run among the processes of `place`, met before the block and left after it. None: nothing is done.

  Within the block, this process ends with one sentence and exit code 3 when another is gone, at once if it died and
  within `heartbeat_seconds` if its host fell silent; with code 2 when another ended for what a user can mend. When the
  block raises, the others are told, and this process ends with its own exit code without waiting for them.

  To be entered before anything touches a device.

  Raises:
    UserError: the others say another number of processes, or the same place.
    SystemExit: not all of them came within `join_seconds`.
  """
  if place is None:
    yield
    return
  if heartbeat_seconds < 1 or join_seconds < 1:
    raise UserError("--heartbeat_seconds and --join_seconds are seconds; allowed: at least 1")
  watch = _Watch(place, heartbeat_seconds, join_seconds)
  _wait_when_aborted(watch)
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.process,
      place.local_devices,
      initialization_timeout=join_seconds,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=24 * 3600,  # process 0 may write the report yet; the watch sees to a death
    )
    yield
    jax.distributed.shutdown()  # waits for all of them
  except BaseException as error:
    _tell_why(watch, error, heartbeat_seconds)
    raise
  watch.close()


def _tell_why(watch: "_Watch", error: BaseException, heartbeat_seconds: int) -> None:
  """Tells the others why this process ends, unless it is because of one of them: then that ends it in here."""
  full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
  mendable = full or isinstance(error, UserError)
  code, said = 2 if mendable else _FAILED, " ".join(str(error).split())[:500]
  if isinstance(error, SystemExit):
    code = error.code if isinstance(error.code, int) else 0 if error.code is None else _FAILED
  elif not mendable:
    said = f"{type(error).__name__}: {said}"
    if _MISSED.search(said):
      time.sleep(heartbeat_seconds + _VERDICT_SECONDS)
  watch.leave(said, code)
  # JAX would now wait for the others, who are ending; what is printed meanwhile is printed before this is called.
  atexit.register(_exit, code)


def _exit(code: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(code)


_keep: list[Any] = []  # what C may call must not be collected


def _wait_when_aborted(watch: "_Watch") -> None:
  """JAX's own answer to a dead process is to abort: it is held up until the watch has said who it was."""

  def wait(_: int) -> None:
    time.sleep(_VERDICT_SECONDS)
    watch.leave("XLA aborted it; its own output says why", _FAILED)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(wait)
  _keep.append(handler)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)  # Python's own handlers run too late for an abort


class _Watch:
  """The connections of process 0 with every other one, and a thread that listens to them.

  A line is a JSON object. To process 0: {process, processes, host} to join, {left, code}. From it: {hosts} when all are
  there, {refused}, {end, code}, {done}.
  """

  def __init__(self, place: Place, heartbeat_seconds: int, join_seconds: int):
    self._place, self._heartbeat = place, heartbeat_seconds
    self._lock, self._over = threading.Lock(), False
    meet = self._gather if place.process == 0 else self._join
    self._lines, self._hosts = meet(time.monotonic() + join_seconds, join_seconds)
    threading.Thread(target=self._listen, daemon=True, name="cluster").start()

  def leave(self, said: str, code: int) -> None:
    """Tells the others that this process ends and why."""
    with self._lock:
      if self._over:
        return
      self._over = True
    self._broadcast(self._left(self._place.process, said, code))

  def close(self) -> None:
    """After the last common act: nobody is missed any more."""
    with self._lock:
      self._over = True
    self._broadcast({"done": True})

  def _left(self, process: int, said: str, code: int) -> dict[str, Any]:
    """What the others print of a process that ended itself."""
    if code == 2:
      return {"end": f"{self._name(process)} ended: {said}", "code": 2}
    return {"end": f"{self._name(process)} failed: {said}; {_RESUMES}", "code": GONE}

  def _name(self, process: int) -> str:
    return f"process {process} of {self._place.processes} ({self._hosts[process]})"

  def _broadcast(self, message: dict[str, Any]) -> None:
    for line in self._lines.values():
      with contextlib.suppress(OSError):
        line.send(message)

  def _listen(self) -> None:
    """Until the run is over, or a process is."""
    with selectors.DefaultSelector() as selector:
      for process, line in self._lines.items():
        selector.register(line.connection, selectors.EVENT_READ, process)
      while selector.get_map():
        for key, _ in selector.select():
          message = self._lines[key.data].receive()
          if message.get("done"):
            selector.unregister(key.fileobj)
          else:
            self._end(message if "end" in message else self._gone(key.data))

  def _gone(self, process: int) -> dict[str, Any]:
    return {"end": f"{self._name(process)} is gone; {_RESUMES}", "code": GONE}

  def _end(self, message: dict[str, Any]) -> None:
    """Ends this process for what happened to another one."""
    with self._lock:
      if self._over:
        return
      self._over = True
    if self._place.process == 0:
      self._broadcast(message)
      time.sleep(0.5)  # with process 0 JAX's coordinator ends, which aborts who has not heard yet
    os.write(2, f"error: {message['end']}\n".encode())
    _exit(int(message["code"]))

  def _join(self, deadline: float, seconds: int) -> tuple[dict[int, "_Line"], list[str]]:
    """Calls process 0 until it answers that all are there."""
    place, said = self._place, "no answer"
    host, port = place.meeting
    while (left := deadline - time.monotonic()) > 0:
      try:
        line = _Line(socket.create_connection((host, port), timeout=min(left, 5.0)), self._heartbeat)
        line.send({"process": place.process, "processes": place.processes, "host": socket.gethostname()})
        line.connection.settimeout(max(0.1, deadline - time.monotonic()))
        message = line.receive()
        if "refused" in message:
          raise UserError(message["refused"])
        if "hosts" in message:
          line.connection.settimeout(None)
          return {0: line}, message["hosts"]
        said = "it hung up"
        line.connection.close()
      except OSError as error:
        said = error.strerror or str(error)
      time.sleep(0.2)
    _give_up(
      f"process {place.process} of {place.processes} did not reach process 0 at {host}:{port} within {seconds} s "
      f"({said}); allowed: a --coordinator that is process 0's address, with this port and the next one open"
    )

  def _gather(self, deadline: float, seconds: int) -> tuple[dict[int, "_Line"], list[str]]:
    """Waits for the other processes, tells each who they are, and shuts the door."""
    place, lines = self._place, dict[int, _Line]()
    hosts = {0: socket.gethostname()}
    with self._door() as door, selectors.DefaultSelector() as selector:
      selector.register(door, selectors.EVENT_READ, None)
      while len(lines) < place.processes - 1:
        left = deadline - time.monotonic()
        if left <= 0:
          missing = sorted(set(range(place.processes)) - {0, *lines})
          names = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
          _give_up(f"of {place.processes} processes, {names} did not come within {seconds} s")
        for key, _ in selector.select(left):
          if key.data is not None:  # who waits says nothing: it hung up, and may come again
            selector.unregister(key.fileobj)
            lines.pop(key.data).connection.close()
          elif (arrival := self._admit(door.accept()[0], lines)) is not None:
            process, host, line = arrival
            lines[process], hosts[process] = line, host
            selector.register(line.connection, selectors.EVENT_READ, process)
    names_of = [hosts[process] for process in range(place.processes)]
    for line in lines.values():
      with contextlib.suppress(OSError):  # it died just now: the watch will say so
        line.send({"hosts": names_of})
    return lines, names_of

  def _door(self) -> socket.socket:
    """Where the others knock. JAX opens the coordinator's own port afterwards, and would not say that it is taken."""
    host, port = self._place.meeting
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
      socket.create_server(("", port + 1), family=family).close()
      return socket.create_server(("", port), family=family, backlog=1024)
    except OSError as error:
      raise UserError(
        f"ports {port} and {port + 1} cannot both be opened ({error.strerror}); allowed: a --coordinator=HOST:PORT "
        "where PORT and the one below are free on process 0"
      ) from error

  def _admit(self, connection: socket.socket, lines: Mapping[int, "_Line"]) -> tuple[int, str, "_Line"] | None:
    """Reads who comes. A place that is taken, or another number of processes, ends all of them."""
    connection.settimeout(5.0)
    line = _Line(connection, self._heartbeat)
    message = line.receive()
    try:
      process, processes, host = int(message["process"]), int(message["processes"]), str(message["host"])[:253]
    except (KeyError, TypeError, ValueError):
      connection.close()  # not one of ours
      return None
    wrong = ""
    if processes != self._place.processes:
      wrong = f"process 0 was told of {self._place.processes} processes, but process {process} ({host}) of {processes}"
    elif not 0 < process < processes or process in lines:
      wrong = f"two processes say that they are process {process}, one of them on {host}"
    if wrong:
      wrong += "; allowed: the same --processes on each host, and a --process of its own"
      for other in [line, *lines.values()]:
        with contextlib.suppress(OSError):
          other.send({"refused": wrong})
      raise UserError(wrong)
    connection.settimeout(None)
    return process, host, line


def _give_up(sentence: str) -> NoReturn:
  """Not the user's fault if a host is restarting: its supervisor may try again."""
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  raise SystemExit(GONE)


class _Line:
  """A connection that carries JSON objects, a line each, and notices a silent host within the heartbeat."""

  def __init__(self, connection: socket.socket, heartbeat_seconds: int):
    self.connection, self._rest = connection, b""
    probes = {
      "TCP_KEEPIDLE": max(1, heartbeat_seconds // 3),
      "TCP_KEEPINTVL": max(1, heartbeat_seconds // 6),
      "TCP_KEEPCNT": 3,
      "TCP_USER_TIMEOUT": heartbeat_seconds * 800,  # milliseconds; Linux counts these, not the probes
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in probes.items():
      if hasattr(socket, name):  # not every system has each
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, message: dict[str, Any]) -> None:
    self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> dict[str, Any]:
    """The next object; an empty one if the other side is gone or talks nonsense."""
    try:
      while b"\n" not in self._rest:
        read = self.connection.recv(65536)
        if not read or len(self._rest) > _LONGEST_LINE:
          return {}
        self._rest += read
      first, _, self._rest = self._rest.partition(b"\n")
      message = json.loads(first)
      return message if isinstance(message, dict) else {}
    except (OSError, ValueError):
      return {}

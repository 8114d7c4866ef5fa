"""A run on several processes: how each finds its place among them, joins them and leaves them.

Private parts of JAX are used where `jax.distributed` itself detects its cluster by them.
"""

import atexit
import contextlib
import ctypes
import errno
import importlib.util
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init, clusters  # private, but what jax.distributed itself detects by

from advgame_jax.meeting import Place, Watch, exit_now
from advgame_jax.types import UserError

_FAILED = 1
_ASKING_SECONDS = 60  # for the name of process 0 to be known
_VERDICT_SECONDS = 3.0  # in which a death is known everywhere once it shows as some other error
# What XLA says when it misses somebody; the watch then soon knows whom.
_MISSED = re.compile(r"gloo|nccl|coordination|heartbeat|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL", re.I)


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
  place = _place(coordinator, processes, process, local_devices)
  if place is None and process:
    raise UserError(f"--process is {process} of one process; allowed: 0, or --processes=N")
  if place is None and local_devices:
    raise UserError(
      f"--local_devices is {local_devices!r}, and this is the only process; allowed: no such flag, and of some of this "
      "host's devices only CUDA_VISIBLE_DEVICES=0,1 in the environment"
    )
  return place


def _place(coordinator: str, processes: int | None, process: int | None, local_devices: str) -> Place | None:
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
  if processes == 1:
    return None
  return Place(coordinator, processes, process, _local_devices(local_devices, os.environ))


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
  watch = Watch(place, heartbeat_seconds, join_seconds)
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


def _tell_why(watch: "Watch", error: BaseException, heartbeat_seconds: int) -> None:
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
  atexit.register(exit_now, code)


_keep: list[Any] = []  # what C may call must not be collected


def _wait_when_aborted(watch: "Watch") -> None:
  """JAX's own answer to a dead process is to abort: it is held up until the watch has said who it was."""

  def wait(_: int) -> None:
    time.sleep(_VERDICT_SECONDS)
    watch.leave("XLA aborted it; its own output says why", _FAILED)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(wait)
  _keep.append(handler)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)  # Python's own handlers run too late for an abort

"""Eight fake CPU devices, a compilation cache, and the world that the whole-run tests share."""

import fcntl
import gc
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# On a loaded machine a fake device may wait longer for the others than the 40 s after which XLA gives up.
_EIGHT = " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
_FLAGS = os.environ.get("XLA_FLAGS", "").replace(_EIGHT, "")  # a parallel test worker has them from its parent
_ONE_DEVICE = os.environ | {"XLA_FLAGS": _FLAGS}
os.environ["XLA_FLAGS"] = _FLAGS + _EIGHT
# Fake devices wait for each other in threads of one pool, as many as there are cores: too few, and all of them wait.
os.environ["PJRT_NPROC"] = "64"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "advgame_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402  (reads the environment)

from advgame_jax import programs  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def programs_are_freed():
  """Compiled programs map memory, of which Linux gives a process 65,530 pieces: one that has many frees them."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
    programs.compiled.cache_clear()
    jax.clear_caches()
    gc.collect()


def _quickly():
  """Programs without most optimisations, where compiling takes longer than what it is for."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


compile_quickly = pytest.fixture(_quickly, scope="module")
compile_this_quickly = pytest.fixture(_quickly)  # for a test whose programs no other test has


@pytest.fixture(scope="session")
def one_device() -> dict[str, str]:
  """The environment of a program that sees one CPU device."""
  ours = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "HF_"))}
  quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  return _ONE_DEVICE | ours | quick  # compiling takes longer than running, and the next process compiles the same


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory, one_device) -> pathlib.Path:
  """The tiny world of `world.py`, written once for all workers."""
  shared = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    shared = shared.parent
  folder = shared / "world"
  with (shared / "world.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "defender_base").exists():  # written last, whole or not at all
      script = pathlib.Path(__file__).with_name("world.py")
      subprocess.run([sys.executable, str(script), str(folder)], check=True, env=one_device)
  return folder

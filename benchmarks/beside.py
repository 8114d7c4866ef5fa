"""What benchmarks share: peers' processes, the machine's speed, least times, settings, state."""

import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advgame_jax import sharding, state
from advgame_jax.types import Params, Players
from advgame_jax.update import Recipe

# Of our updates on a CPU.
CHUNK = 256  # tokens whose logits exist at one time: nearer to the caches than the default
REMAT = "products"  # what is kept is written and read again: elementwise work is cheaper than memory here

OF_VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"}


def peer(venvs: str, venv: str, script: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
  """What benchmarks/peers/`script` says of itself, run for peer `name` in the environment `venvs`/`venv`."""
  home = pathlib.Path(venvs) / venv
  if not (home / "bin" / "python").is_file():
    raise SystemExit(f"there is no environment {home}; benchmarks/peers/install.sh {venvs} {venv} makes it")
  environment = os.environ | OF_VLLM
  if venv == "vllm" and (openmp := next(home.rglob("libiomp5.so"), None)):
    environment["LD_PRELOAD"] = str(openmp)
  with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    json.dump(job, file)
    file.flush()
    command = [str(home / "bin" / "python"), str(pathlib.Path(__file__).parent / "peers" / script), name, file.name]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def least_seconds(call: Callable[..., Any], *inputs: Any, rounds: int = 8) -> float:
  """Of several calls."""
  least = float("inf")
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(call(*inputs))
    least = min(least, time.perf_counter() - start)
  return least


def first_state(recipes: Players[Recipe], weights: Params) -> state.TrainState:
  """Both players' on these weights, where an update leaves it: else the second update would be compiled anew."""
  make = lambda recipe: state.init_player(recipe.player, recipe.precision, recipe.optimizer, weights)
  first = state.TrainState(Players(*map(make, recipes)), jnp.int32(0))
  return jax.device_put(first, sharding.replicated(recipes.defender.mesh))


def machine(dtype: str = "float32") -> tuple[float, float]:
  """FLOP/s of a product of two 2,048² matrices, sums in float32, and bytes/s read by a sum."""
  square, line = jnp.ones((2048, 2048), dtype), jnp.ones(1 << 27)
  multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
  product, read = least_seconds(multiply, square, square), least_seconds(jax.jit(jnp.sum), line)
  return 2 * 2048**3 / product, line.nbytes / read


def copying(count: int, times: int = 20) -> float:
  """Bytes/s read and written by copies of so many float32, one after the other."""
  line = jnp.ones(count)
  copies = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y + 1, x))
  return times * 2 * line.nbytes / least_seconds(copies, line)

"""Importing a folder of 4 GB takes little host memory beyond the parameters themselves.

The folder is a Llama's of 2.2 billion bfloat16 weights, all zero: its files are holes, which cost neither disk nor time
to write. Another process imports it; this one watches that process's anonymous memory (the pages of mapped files are
the kernel's to drop). Prints what it measured, with `pytest -s`.

It takes about half a minute, and 5 GB of memory: it runs where ADVGAME_SLOW_TESTS is set. A folder of a tenth of that
is imported always.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from advgame_jax import architecture, hf_config

LARGE = {
  "model_type": "llama",
  "vocab_size": 128256,
  "hidden_size": 2560,
  "num_hidden_layers": 16,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 80,
  "intermediate_size": 10240,
}
SMALL = LARGE | {"vocab_size": 49152, "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2560}
SLOW = pytest.mark.skipif("ADVGAME_SLOW_TESTS" not in os.environ, reason="takes half a minute: set ADVGAME_SLOW_TESTS")

IMPORT = """
import sys
import jax
from advgame_jax import config, hf, sharding
mesh = sharding.make_mesh((1, -1, 1, 1), jax.devices())
jax.numpy.zeros(8).block_until_ready()
print("ready", flush=True)
input()
params = jax.block_until_ready(hf.load(sys.argv[1], mesh, sharding.TRAIN, jax.numpy.bfloat16))
print(sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def write_holes(folder: pathlib.Path, values: dict[str, object], shards: int = 4) -> None:
  """A folder of bfloat16 zeros."""
  (folder / "config.json").write_text(json.dumps(values))
  specs = jax.tree.leaves(architecture.param_specs(hf_config.load_config(folder)))
  shapes = {name: spec.hf_shape for spec in specs for name in spec.hf_names}
  weight_map = {name: f"model-{i * shards // len(shapes)}.safetensors" for i, name in enumerate(shapes)}
  for file in set(weight_map.values()):
    end, header = 0, {}
    for name in (name for name, where in weight_map.items() if where == file):
      begin, end = end, end + 2 * math.prod(shapes[name])
      header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with (folder / file).open("wb") as shard:
      shard.write(len(content).to_bytes(8, "little") + content)
      shard.truncate(8 + len(content) + end)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous_bytes(process: subprocess.Popen[str]) -> int:
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def import_bytes(folder: pathlib.Path, devices: int, environment: dict[str, str]) -> tuple[int, int]:
  """Bytes of the parameters, and what the process held at most beyond them and what it had before."""
  environment = {name: value for name, value in environment.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
  flags = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  command = [sys.executable, "-c", IMPORT, str(folder)]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, env=environment | {"XLA_FLAGS": flags}, **pipes) as process:
    assert process.stdout.readline() == "ready\n"
    peak = before = anonymous_bytes(process)
    start = time.perf_counter()
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
      peak = max(peak, anonymous_bytes(process))
      time.sleep(1e-3)
    seconds = time.perf_counter() - start
    size = int(process.stdout.read())
  print(f"\n{size / 1e9:.2f} GB over {devices} devices: {(peak - before - size) / 1e9:.2f} GB above, {seconds:.0f} s")
  return size, peak - before - size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("values, above", [(SMALL, 0.25e9), pytest.param(LARGE, 1.2e9, marks=SLOW)])
def test_the_host_holds_little_more_than_the_parameters(values, above, devices, tmp_path, one_device):
  write_holes(tmp_path, values)
  size, beyond = import_bytes(tmp_path, devices, one_device)
  assert size == 2 * architecture.count_params(hf_config.load_config(tmp_path))
  assert beyond < above

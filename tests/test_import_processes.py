"""Two processes import a folder: each reads its own part of the files, and both together hold what one process does."""

import pathlib
import socket
import subprocess
import sys

import pytest

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
GOLDEN = pathlib.Path(__file__).parent / "golden"
PROGRAM = """
import math, sys
import jax
import numpy as np

folder, port, process, axis = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
from advgame_jax import hf, sharding

read, original = [], hf._read
def counted(spec, name, shards, *bounds):
  part = original(spec, name, shards, *bounds)
  read.append(part.nbytes)
  return part
hf._read = counted

sizes = {"fsdp": (1, 2, 1, 1), "tensor": (1, 1, 1, 2)}[axis]
mesh = sharding.make_mesh(sizes, jax.devices())
params = jax.block_until_ready(hf.load(folder, mesh, sharding.TRAIN))
mine, whole = sum(read), 0
for array, expected in zip(jax.tree.leaves(params), jax.tree.leaves(hf.load(folder)), strict=True):
  assert not array.is_fully_addressable and len(array.addressable_shards) == 1
  for shard in array.addressable_shards:
    np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
print("READ", mine, sum(read) - mine)
"""


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_each_process_reads_its_part(axis, tmp_path, one_device):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  (tmp_path / "program.py").write_text(PROGRAM)
  command = [sys.executable, str(tmp_path / "program.py"), str(GOLDEN / "qwen2"), port]
  both = [subprocess.Popen([*command, str(process), axis], env=one_device, text=True, **PIPES) for process in (0, 1)]
  outputs = [process.communicate(timeout=120)[0] for process in both]
  assert all(process.returncode == 0 for process in both), outputs
  parts = [[int(n) for n in output.split("READ")[1].split()] for output in outputs]
  for mine, whole in parts:
    assert 0.5 * whole <= mine < 0.75 * whole, parts  # half of what is split, all of the little that is not

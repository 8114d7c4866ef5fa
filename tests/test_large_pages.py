"""A command that asks for large pages starts once more in its own place, before it knows jax."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
from advgame_jax import large_pages
large_pages.ask()
assert "jax" not in sys.modules
print("begins")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to ask")
@pytest.mark.parametrize("set_before", [None, "glibc.malloc.check=0"])
def test_a_command_asks_once_and_stays_the_same_process(set_before):
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  if set_before:
    environment["GLIBC_TUNABLES"] = set_before
  command = [sys.executable, "-c", PROGRAM, "--a=1", "two words"]
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
    said = process.communicate()[0].splitlines()
  starts = [set_before] if set_before else [None, "glibc.malloc.hugetlb=1"]
  assert said == [f"{process.pid} ['--a=1', 'two words'] {value}" for value in starts] + ["begins"]
  assert process.returncode == 0

"""Targets: what a text means, and what is said of one that means nothing or cannot be had."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from advgame_jax import chips, targets
from advgame_jax.types import UserError


@pytest.mark.parametrize(
  ("text", "chip", "hosts", "per_host", "topology"),
  [
    ("v5p:2x2x4", "TPU v5p", 4, 4, "v5p:2x2x4"),
    ("v5p:1x1x1", "TPU v5p", 1, 1, "v5p:1x1x1"),
    ("v5e:8x8", "TPU v5e", 16, 4, "v5e:8x8"),
    ("v5p-8", "TPU v5p", 1, 4, "v5p:2x2x1"),
    ("v5p-16", "TPU v5p", 2, 4, "v5p:2x2x2"),
    ("v5p-32", "TPU v5p", 4, 4, "v5p:2x2x4"),
    ("v5p-128", "TPU v5p", 16, 4, "v5p:4x4x4"),
    ("v4-64", "TPU v4", 8, 4, "v4:2x4x4"),
    ("v5e-1", "TPU v5e", 1, 1, "v5e:1x1"),
    ("v5e-8", "TPU v5e", 2, 4, "v5e:2x4"),
    ("v5e-64", "TPU v5e", 16, 4, "v5e:8x8"),
    ("v5litepod-256", "TPU v5e", 64, 4, "v5e:16x16"),
    ("v6e-32", "TPU v6e", 8, 4, "v6e:4x8"),
    ("h100:8", "H100 SXM", 1, 8, "1x1x8"),
    ("H100:8", "H100 SXM", 1, 8, "1x1x8"),
    ("h100:1x8", "H100 SXM", 1, 8, "1x1x8"),
    ("h200:2x8", "H200", 2, 8, "1x2x8"),
    ("h100-nvl:2", "H100 NVL", 1, 2, "1x1x2"),
    ("a100:8", "A100 80 GB", 1, 8, "1x1x8"),
    ("a100-40:4", "A100 40 GB", 1, 4, "1x1x4"),
    ("cpu:8", "CPU", 1, 8, ""),
  ],
)
def test_what_a_text_means(text, chip, hosts, per_host, topology):
  target = targets.parse(text)
  found = (target.chip.name, target.hosts, target.per_host, target.topology)
  assert found == (chip, hosts, per_host, topology)
  assert target.count == hosts * per_host
  assert target.capacity > 0


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("", "is none; allowed: v4"),
    ("h100", "is none"),
    ("h100:8\n", "is none"),
    ("h100:٨", "is none"),
    ("h100:-8", "is none"),
    ("h100:2x2x2", "is none"),
    ("v3-8", "is none"),
    ("v5e:8", "is none"),
    ("v5e:8x8;rm", "is none"),
    ("h100:99999999999999999999", "is none"),
    ("h100:16", "allowed: h100:1 to h100:8, or hosts x GPUs"),
    ("h100:0", "1 hosts of 0 GPUs"),
    ("h100:9999x8", "9999 hosts of 8 GPUs"),
    ("v5e:2x2x2", "no slice of TPU v5e has this topology; allowed: 1x1, 2x2, 2x4"),
    ("v5e:6x6", "no slice of TPU v5e has this topology; allowed: 1x1, 2x2, 2x4"),
    ("v6e:4x2", "8x16, 16x16"),
    ("v5p:8x8", "allowed: 3 sizes"),
    ("v5e:3x4", "no slice of TPU v5e"),
    ("v5e:1x2", "allowed: 1x1, 2x2"),
    ("v5p:0x0x0", "the first two even"),
    ("v5e:32x32", "8x16, 16x16"),
    ("v5p-12", "its TensorCores, two a chip, 8 or more; allowed: powers of two"),
    ("v5p-7", "its TensorCores"),
    ("v5p-4", "8 or more"),
    ("v5e-0", "number of its chips; allowed: powers of two of 256 chips at most"),
    ("v5e-512", "256 chips at most"),
    ("v6e-48", "or the topology, as v6e:8x8"),
    ("cpu:0", "allowed: cpu:1 to cpu:512"),
    ("cpu:9999", "9999 CPU devices"),
  ],
)
def test_texts_that_mean_nothing(text, sentence):
  with pytest.raises(UserError, match=sentence):
    targets.parse(text)


def test_a_target_is_what_its_slice_is_called_or_its_topology():
  a, b = targets.parse("v5p-32"), targets.parse("v5p:2x2x4")
  assert (a.chip, a.hosts, a.per_host, a.topology, a.capacity) == (b.chip, b.hosts, b.per_host, b.topology, b.capacity)


def test_capacity_is_less_than_the_data_sheet_says():
  sheet = {"v5e-8": 16, "v5p-8": 96, "h100:8": 80, "h200:8": 141, "l40s:1": 48}
  for text, size in sheet.items():
    assert 0.85 * size < targets.parse(text).capacity / 2**30 < size


def test_cpu_devices_share_the_machine():
  assert targets.parse("cpu:2").capacity == 4 * targets.parse("cpu:8").capacity


def test_cpu_devices_are_those_that_are_here():
  assert targets.parse("cpu:4").devices() == jax.devices()[:4]
  with pytest.raises(UserError, match=r"needs 16 CPU devices and this process has 8; .* JAX_NUM_CPU_DEVICES=16"):
    targets.parse("cpu:16").devices()


def test_local_is_what_is_here():
  local = targets.parse("local")
  assert (local.chip, local.count, local.devices()) == (chips.CPU, 8, jax.devices())
  assert local.islands(local.devices()) == [0] * 8


def run(text):
  """What a new process prints of a target's devices."""
  code = f"""
import os
from advgame_jax import targets
from advgame_jax.types import UserError
before = dict(os.environ)
target = targets.parse({text!r})
try:
  devices = target.devices()
  assert dict(os.environ) == before
  print(len(devices), devices[0].device_kind, target.islands(devices))
except UserError as error:
  print(error)
"""
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
  assert result.returncode == 0, result.stderr
  return result.stdout.strip()


@pytest.mark.parametrize(
  ("text", "module", "sentence", "found"),
  [
    ("v5e:2x2", "libtpu", "allowed: pip install 'jax[tpu]==", "4 TPU v5 lite [0, 0, 0, 0]"),
    ("v4:2x2x1", "libtpu", "allowed: pip install 'jax[tpu]==", "4 TPU v4 [0, 0, 0, 0]"),
    (
      "h100:2x2",
      "jax_plugins.xla_cuda13",
      "pip install --no-deps jax-cuda13-pjrt==",
      "4 NVIDIA H100 80GB HBM3 [0, 0, 1, 1]",
    ),
  ],
)
def test_devices_of_machines_that_are_not_here_or_what_installs_their_compiler(text, module, sentence, found):
  try:
    installed = importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    installed = False
  printed = run(text)
  assert printed == found if installed else sentence in printed


@pytest.mark.parametrize("name", list(targets._CARDS))
def test_a_card_is_described_for_the_compiler(name):
  chip = chips.named(name)
  text = targets._description(chip)
  assert f"device_memory_size: {int(chip.memory)}" in text
  assert chips.find(targets._CARDS[name][0]) is chip


def test_an_environment_is_what_it_was(monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "mine")
  monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
  before = dict(os.environ)
  with pytest.raises(ZeroDivisionError), targets._environment({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "x"}):
    assert (os.environ["TPU_SKIP_MDS_QUERY"], os.environ["TPU_WORKER_HOSTNAMES"]) == ("mine", "x")
    _ = 1 / 0
  assert dict(os.environ) == before

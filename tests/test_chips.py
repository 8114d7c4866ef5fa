"""Chips: found by what JAX calls them, and numbers that can be true."""

import pytest

from advgame_jax import chips


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("NVIDIA H100 80GB HBM3", "H100 SXM"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H100 NVL", "H100 NVL"),
    ("NVIDIA H200", "H200"),
    ("NVIDIA H200 NVL", "H200 NVL"),
    ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
    ("NVIDIA B200", "B200"),
    ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
    ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
    ("NVIDIA L40S", "L40S"),
    ("TPU v4", "TPU v4"),
    ("TPU v5 lite", "TPU v5e"),
    ("TPU v5e", "TPU v5e"),
    ("TPU v5p", "TPU v5p"),
    ("TPU v5", "TPU v5p"),
    ("TPU v6 lite", "TPU v6e"),
  ],
)
def test_a_chip_is_found_by_its_kind(kind, name):
  assert chips.find(kind).name == name


@pytest.mark.parametrize(
  "kind",
  ["", "cpu", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L40", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_what_only_sounds_like_a_chip_is_none(kind):
  assert chips.find(kind) is None


def test_a_chip_has_one_name_and_is_found_by_each_of_its_kinds():
  assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)
  for chip in chips.CHIPS:
    assert chips.named(chip.name) is chip
    assert {chips.find(kind) for kind in chip.kinds} == {chip}


def test_the_nearer_the_faster():
  for chip in (*chips.CHIPS, chips.CPU):
    assert chip.flops > chip.bandwidth > chip.link > chip.network > 0
    assert 2**30 < chip.memory < 200 * chips.GIB

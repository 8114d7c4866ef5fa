"""The roofline: terms by hand, laws, and an estimate beside a measurement."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from advgame_jax import architecture, chips, hf_config, published, roofline, sharding, targets, workload
from advgame_jax.chips import Chip
from advgame_jax.collectives import Collective
from advgame_jax.config import Sampling
from advgame_jax.engine import Engine
from advgame_jax.roofline import Estimate
from advgame_jax.sharding import LOCAL

CHIP = Chip("one", ("one",), flops=1e12, bandwidth=1e11, memory=1e10, link=1e10, network=1e9, kernel=2e-6)
GATHER = Collective("all-gather", "bf16", 16, sent=7e9, times=2, crosses=False, local=16, name="")


def test_terms_by_hand():
  x = roofline.seconds(6e12, 4e11, [GATHER], CHIP)
  assert x == pytest.approx(Estimate(compute=10, memory=5, link=2, network=0))
  assert (x.total, x.serial, x.limit) == (pytest.approx(10), pytest.approx(17), "compute")


def test_what_crosses_hosts_takes_the_network_through_every_port():
  across = dataclasses.replace(GATHER, crosses=True, local=8)
  x = roofline.seconds(0, 0, [across], CHIP)
  assert (x.link, x.network, x.limit) == (pytest.approx(2), pytest.approx(2 * 7e9 / 8 / 7e8), "network")
  alone = roofline.seconds(0, 0, [dataclasses.replace(across, local=1)], CHIP)
  assert alone.network == pytest.approx(8 * x.network)


def test_a_small_collective_takes_its_latency():
  small = dataclasses.replace(GATHER, sent=1.0, times=1000)
  assert roofline.seconds(0, 0, [small], CHIP).link == pytest.approx(1000 * roofline.LATENCY)


def test_many_small_kernels_take_their_time_besides_what_they_move():
  assert roofline.seconds(0, 4e11, [], CHIP, kernels=1e6) == pytest.approx(Estimate(0, 7, 0, 0))
  assert {chip.kernel for chip in chips.CHIPS if chip.name.startswith("TPU")} == {chips.CPU.kernel} == {0}


def test_what_does_not_overlap_is_one_term_named_after_the_longer():
  one_by_one = dataclasses.replace(CHIP, overlaps=False)
  assert roofline.seconds(6e12, 4e11, [GATHER], one_by_one) == pytest.approx(Estimate(15, 0, 2, 0))
  assert roofline.seconds(3e12, 8e11, [GATHER], one_by_one) == pytest.approx(Estimate(0, 15, 2, 0))
  assert not chips.CPU.overlaps and all(chip.overlaps for chip in chips.CHIPS)


# Milliseconds of a token of each row, 512 to 576 tokens of text, by benchmarks/decode.py on one H200, 2026-11-27.
MEASURED = {
  ("qwen2_5_0_5b", 8): 1.22, ("qwen2_5_0_5b", 32): 1.59, ("qwen2_5_0_5b", 128): 2.24,
  ("qwen2_5_7b", 8): 4.92, ("qwen2_5_7b", 32): 5.55, ("qwen2_5_7b", 128): 7.88,
}  # fmt: skip


@pytest.mark.parametrize("name, rows", MEASURED)
def test_drawing_on_an_h200_takes_what_was_measured_within_a_factor_of_two(name, rows):
  config = hf_config.from_values(published.PUBLISHED[name], name)
  target = targets.parse("h200:1")
  mesh = sharding.make_mesh((1, 1, 1, 1), target.stand_ins())
  engine = Engine(config, Sampling(), mesh, LOCAL, jnp.dtype("bfloat16"), "auto", np.zeros((2, 1), np.int16))
  where = NamedSharding(engine.mesh, jax.P())
  abstract = lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=where)
  weights = jax.tree.map(abstract, architecture.param_specs(config))
  drawing = workload.Drawing(rows, rows, steps=64, context=544, reads=1, width=8192)
  step = workload.stepping(engine, drawing, [weights], 0, workload.Wires(target))
  planned = roofline.seconds(step.flops, step.moved, [], target.chip, step.kernels).total
  assert 0.5 < planned / (MEASURED[name, rows] / 1e3) < 2


@pytest.mark.parametrize("chip", [CHIP, dataclasses.replace(CHIP, overlaps=False)])
def test_nothing_takes_no_time_and_twice_the_work_twice_as_long(chip):
  assert roofline.seconds(0, 0, [], chip).total == 0
  once, twice = (roofline.seconds(n * 1e12, n * 3e11, [GATHER] * n, chip) for n in (1, 2))
  assert twice == pytest.approx([2 * term for term in once])


def test_a_faster_chip_is_never_slower():
  work = (1e15, 1e12, [dataclasses.replace(GATHER, crosses=True, local=8)])
  h100, h200 = (roofline.seconds(*work, chips.named(name)) for name in ("H100 SXM", "H200"))
  assert h200.compute == h100.compute and h200.memory < h100.memory


@pytest.mark.parametrize("count", [1, 8])
def test_a_product_takes_about_what_is_estimated(count):
  start = time.perf_counter()
  chip = roofline.measured(jax.devices()[:count])
  assert time.perf_counter() - start < 10  # about one, on a machine that has nothing else to do
  assert all(0 < x < 1e15 for x in (chip.flops, chip.bandwidth, chip.link, chip.network))
  mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count], axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P("x"))
  M = 384
  x = jax.device_put(jnp.ones((count, M, M)), split)
  taken = roofline._seconds(jax.jit(lambda x: x @ x / M, donate_argnums=0, out_shardings=split), x)
  estimated = roofline.seconds(2 * M**3, 2 * M * M * 4, [], chip).total
  assert 1 / 8 < taken / estimated < 8  # of a machine that others use too

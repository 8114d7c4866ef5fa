"""Collectives: of programs whose traffic is known, and of what other compilers write."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from advgame_jax import collectives
from advgame_jax.collectives import Collective

N, L, M = 8, 5, 256
P = jax.P
WHOLE = P()


def make_mesh(*sizes):
  names = ("a", "b", "c")[: len(sizes)]
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[:8])


def compiled(f, mesh, *arguments, out=WHOLE):
  """The text of f for arrays of (shape, partition)."""
  place = lambda spec: jax.NamedSharding(mesh, spec)
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(spec)) for shape, spec in arguments]
  out = jax.tree.map(place, out, is_leaf=lambda x: isinstance(x, P))
  return jax.jit(f, out_shardings=out).lower(*shapes).compile().as_text()


def local(f, mesh, *arguments, out=WHOLE):
  """The text of f of each device's part."""
  specs = tuple(spec for _, spec in arguments)
  return compiled(
    jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False), mesh, *arguments, out=out
  )


def summary(found):
  return [(one.kind, one.dtype, one.devices, one.sent, one.times) for one in found]


def test_layers_split_over_devices_are_gathered_once_a_layer():
  def run(weights_LMM, x_BM):
    return jax.lax.scan(lambda x_BM, weights_MM: (jnp.tanh(x_BM @ weights_MM), None), x_BM, weights_LMM)[0]

  text = compiled(run, make_mesh(N), ((L, M, M), P(None, None, "a")), ((512, M), P("a")), out=P("a"))
  assert summary(collectives.of(text)) == [("all-gather", "f32", N, (N - 1) / N * 4 * M * M, L)]


@pytest.mark.parametrize(
  ("f", "out", "kind", "sent"),
  [
    (lambda x: jax.lax.all_gather(x, "a", tiled=True), P(), "all-gather", 7 * 1024 * 4),
    (lambda x: jax.lax.psum(x, "a"), P(), "all-reduce", 2 * 7 / 8 * 1024 * 4),
    (lambda x: jax.lax.psum_scatter(x, "a", tiled=True), P("a"), "reduce-scatter", 7 / 8 * 1024 * 4),
    (lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True), P("a"), "all-to-all", 7 / 8 * 1024 * 4),
    (lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 8) for i in range(8)]), P("a"), "collective-permute", 1024 * 4),
  ],
)
def test_bytes_of_each_kind(f, out, kind, sent):
  (one,) = collectives.of(local(f, make_mesh(N), ((8 * 1024,), P("a")), out=out))
  assert (one.kind, one.dtype, one.sent, one.times) == (kind, "f32", pytest.approx(sent), 1)


@pytest.mark.parametrize(
  ("axes", "devices", "crosses", "on"),
  [("c", 2, False, 2), ("b", 2, False, 2), (("b", "c"), 4, False, 4), ("a", 2, True, 1), (("a", "c"), 4, True, 2)],
)
def test_groups_and_whether_they_cross_islands(axes, devices, crosses, on):
  mesh = make_mesh(2, 2, 2)
  text = local(lambda x: jax.lax.psum(x, axes), mesh, ((8, 64), P(("a", "b", "c"))), out=P(("a", "b", "c")))
  (one,) = collectives.of(text, [0, 0, 0, 0, 1, 1, 1, 1])
  assert (one.devices, one.crosses, one.local) == (devices, crosses, on)
  assert not collectives.of(text)[0].crosses


def test_of_several_groups_those_that_cross_count():
  """Two of a ring's four steps lead from one island to the other, each through a port of its own."""
  mesh = make_mesh(N)
  text = local(
    lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 8) for i in range(8)]), mesh, ((8 * 1024,), P("a")), out=P("a")
  )
  (one,) = collectives.of(text, [0] * 4 + [1] * 4)
  assert (one.crosses, one.local) == (True, 1)


def test_loops_multiply_and_the_dearer_branch_counts():
  mesh = make_mesh(N)

  def step(x, _):
    x = jax.lax.scan(lambda x, _: (jax.lax.psum(x, "a") / N, None), x, length=3)[0]
    much = lambda x: jnp.tanh(jax.lax.psum(jax.lax.psum(x, "a") + 1, "a"))
    return jax.lax.cond(x[0, 0] > 0, much, lambda x: jax.lax.pmax(x, "a"), x), None

  run = lambda x: jax.lax.scan(step, x, length=7)[0]
  found = collectives.of(local(run, mesh, ((8, 64), P("a")), out=P("a")))
  assert sorted(one.times for one in found) == [7, 7, 21]


def test_a_loop_that_does_not_say_how_often_it_runs():
  def run(x, y):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: jax.lax.psum(x, "a") + 1, x)

  text = local(run, make_mesh(N), ((8, 64), P("a")), ((1,), P()), out=P("a"))
  assert [one.times for one in collectives.of(text)] == [1]
  assert [one.times for one in collectives.of(text, unknown=128)] == [128]


def test_trips_are_read_from_the_condition_too():
  run = lambda x: jax.lax.scan(lambda x, _: (jax.lax.psum(x, "a") / N, None), x, length=12)[0]
  text = local(run, make_mesh(N), ((8, 64), P("a")), out=P("a"))
  assert "known_trip_count" in text
  untold = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"none":{}', text)
  assert summary(collectives.of(untold)) == summary(collectives.of(text))
  assert collectives.of(text)[0].times == 12


# As both compilers write it, shortened.
CUDA = """HloModule jit_step, is_scheduled=true, num_partitions=16

%body (p: (s32[], bf16[1024,64])) -> (s32[], bf16[1024,64]) {
  %p = (s32[], bf16[1024,64]{0,1}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = bf16[1024,64]{0,1} get-tuple-element(%p), index=1
  %ag-start = (bf16[1024,64]{0,1}, bf16[1024,1024]{0,1}) all-gather-start(%w), \
replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_1'}, \
metadata={op_name="while/dot (general)"}
  %ag-done = bf16[1024,1024]{0,1} all-gather-done(%ag-start), metadata={op_name="while/dot"}
  %g = bf16[1024,1024]{0,1} fusion(%ag-done), kind=kLoop, calls=%fused
  %rs-start = ((bf16[1024,1024]{0,1}), bf16[1024,64]{0,1}) reduce-scatter-start(%g), \
replica_groups=[2,8]<=[16], dimensions={1}, to_apply=%add
  %rs-done = bf16[1024,64]{0,1} reduce-scatter-done(%rs-start)
  ROOT %t = (s32[], bf16[1024,64]{0,1}) tuple(%i, /*index=1*/%rs-done)
}

ENTRY %main (a: bf16[1024,64]) -> bf16[1024,64] {
  %a = bf16[1024,64]{0,1} parameter(0)
  %c = s32[] constant(0)
  %t = (s32[], bf16[1024,64]{0,1}) tuple(%c, %a)
  %while = (s32[], bf16[1024,64]{0,1}) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %o = bf16[1024,64]{0,1} get-tuple-element(%while), index=1
}
"""


def test_what_starts_and_ends_apart_counts_once():
  found = collectives.of(CUDA, [0] * 8 + [1] * 8)
  size = 1024 * 64 * 2
  assert summary(found) == [
    ("all-gather", "bf16", 16, 15 * size, 5),
    ("reduce-scatter", "bf16", 8, 7 / 8 * 16 * size, 5),
  ]
  assert [(one.crosses, one.local) for one in found] == [(True, 8), (False, 8)]
  assert collectives.of(CUDA, [0] * 12 + [1] * 4)[0].local == 4
  assert found[0].name == "while/dot (general)"
  assert found[0].bytes == 5 * found[0].sent


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=64

%cond (p: (s32[], bf16[56,128])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="while/cond/lt"}
}

%start (q: bf16[56,128]) -> bf16[3584,128] {
  %q = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[3584,128]{1,0:T(8,128)(2,1)} all-gather(%q), \
replica_groups=mesh['axis_0'=64] {'axis_0'}, frontend_attributes={chain_id="21"}
}

%during (q: bf16[56,128]) -> bf16[3584,128] {
  %q = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.2 = bf16[3584,128]{1,0:T(8,128)(2,1)} all-gather(%q), \
replica_groups=mesh['axis_0'=64] {'axis_0'}, frontend_attributes={chain_id="21"}
}

%body (p: (s32[], bf16[56,128])) -> (s32[], bf16[56,128]) {
  %p = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = bf16[56,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %async-collective-start = bf16[3584,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%start
  %fusion = bf16[3584,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kOutput, calls=%during
  %fast = f32[4096,4096]{1,0:T(8,128)S(1)} copy(%fusion)
  ROOT %t = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) tuple(%i, %w)
}

ENTRY %main (a: bf16[56,128]) -> bf16[56,128] {
  %a = bf16[56,128]{1,0:T(8,128)(2,1)} parameter(0)
  %c = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) tuple(%c, %a)
  %while = (s32[]{:T(128)}, bf16[56,128]{1,0:T(8,128)(2,1)}) while(%t), condition=%cond, body=%body
  ROOT %o = bf16[56,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""


def test_what_is_spread_over_fusions_counts_once():
  assert summary(collectives.of(TPU)) == [("all-gather", "bf16", 64, 63 * 56 * 128 * 2, 28)]


SCATTER = """HloModule jit_f, is_scheduled=true, num_partitions=8

%all-reduce-scatter (input: bf16[8192,4096]) -> bf16[2128,4096] {
  %input = bf16[8192,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[8512,4096]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_320x0_0
  %all-reduce.1 = bf16[8512,4096]{1,0:T(8,128)(2,1)} all-reduce(%pad), channel_id=2, \
replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = bf16[2128,4096]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %at), dynamic_slice_sizes={2128,4096}
}

ENTRY %main (a: bf16[8192,4096]) -> bf16[2128,4096] {
  %a = bf16[8192,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion = bf16[2128,4096]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter, \
backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}
}
"""


def test_a_reduce_scatter_that_is_written_as_a_part_of_an_all_reduce():
  """What libtpu 0.0.42 writes for four devices of v5p:2x2x2; where all eight are a group, it reduces everything."""
  assert summary(collectives.of(SCATTER)) == [("reduce-scatter", "bf16", 4, 3 / 4 * 8512 * 4096 * 2, 1)]
  whole = SCATTER.replace("SingleInputAllReduceScatterFusion", "SomethingElse")
  assert summary(collectives.of(whole)) == [("all-reduce", "bf16", 4, 3 / 2 * 8512 * 4096 * 2, 1)]


def test_largest_is_of_the_main_memory():
  assert [buffer.bytes for buffer in collectives.largest(TPU)] == [3584 * 128 * 2]


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups={}, x={}", [[0, 1, 2, 3]]),
    ("dimensions={0}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[2,2]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,1,2]T(2,1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=[2,3]<=[3,1,2]T(1,2,0)", [[0, 2, 4], [1, 3, 5]]),
    ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2] {'y'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2] {'y','x'}", [[0, 2, 1, 3]]),
    ("replica_groups=mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", [[3, 1], [2, 0]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
  ],
)
def test_the_ways_in_which_groups_are_written(text, groups):
  np.testing.assert_array_equal(collectives._groups(f", channel_id=1, {text}, to_apply=%add", 4), groups)


@pytest.mark.parametrize("sizes", [(8,), (2, 4), (4, 2), (2, 2, 2)])
def test_groups_of_a_mesh_are_those_of_its_axes(sizes):
  mesh = make_mesh(*sizes)
  for axis in mesh.axis_names:
    text = local(functools.partial(jax.lax.psum, axis_name=axis), mesh, ((8, 64), P(axis)), out=P())
    (line,) = [line for line in text.splitlines() if " all-reduce(" in line]
    at = mesh.axis_names.index(axis)
    expected = np.moveaxis(np.arange(8).reshape(sizes), at, -1).reshape(-1, sizes[at])
    assert sorted(collectives._groups(line, 8).tolist()) == sorted(expected.tolist())


def test_the_largest_array_is_named():
  def run(x, y):
    return jnp.sum(jnp.sort(jnp.einsum("a,b->ab", x, y), axis=0) * jnp.arange(2000.0)[:, None])

  with jax.named_scope("outer"):
    text = jax.jit(run).lower(jnp.ones(2000), jnp.ones(1000)).compile().as_text()
  first = collectives.largest(text)[0]
  assert (first.bytes, first.shape) == (4 * 2000 * 1000, "f32[2000,1000]")
  assert any("einsum" in buffer.name or "sort" in buffer.name for buffer in collectives.largest(text))


@pytest.mark.parametrize(
  "text", ["", "nothing", "HloModule x", "HloModule x\n\nENTRY %m (a: f32[]) -> f32[] {\n  %a = \n}"]
)
def test_a_text_that_is_no_program_has_none(text):
  assert collectives.of(text) == [] and collectives.largest(text) == []


@pytest.mark.parametrize("text", [CUDA, TPU])
def test_a_torn_text_is_read_as_far_as_it_goes(text):
  whole = len(collectives.of(text))
  for end in range(0, len(text), 37):
    assert len(collectives.of(text[:end])) <= whole
    collectives.largest(text[:end])


def test_two_modules_add_up():
  assert len(collectives.of(CUDA + "\n\n" + TPU)) == 3


def test_a_module_of_one_device_sends_nothing():
  one = CUDA.replace("num_partitions=16", "num_partitions=1").replace("mesh['axis_0'=1,'axis_1'=16] {'axis_1'}", "{}")
  found: list[Collective] = collectives.of(one)
  assert (found[0].devices, found[0].sent) == (1, 0)

"""Meshes and layouts: what fits, what is refused, and that placing and fetching change no number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType

from advgame_jax import architecture, sharding
from advgame_jax.sharding import GENERATE_REPLICATED, GENERATE_TENSOR, LOCAL, TRAIN, Layout
from advgame_jax.types import UserError


def mesh(data=2, fsdp=2, tensor=2, sequence=1):
  return sharding.make_mesh((data, fsdp, sequence, tensor), jax.devices())


@pytest.mark.parametrize(
  "sizes,shape",
  [((2, 2, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((1, -1, 2), (1, 4, 2)), ((4, 2, -1), (4, 2, 1))],
)
def test_a_mesh_takes_all_devices_and_one_axis_what_is_left(sizes, shape):
  made = mesh(*sizes)
  assert tuple(made.shape.items()) == tuple(zip(("data", "fsdp", "sequence", "tensor"), (*shape[:2], 1, shape[2])))
  assert set(made.devices.flat) == set(jax.devices())
  assert made.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
  "sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (1, 1, 1), (0, 1, 8), (16, 1, 1), (-1, 0, 1), (-1, -1, 8)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
  with pytest.raises(UserError, match=f"data={sizes[0]}, fsdp={sizes[1]}.*fit 8 devices; allowed: .*product is 8"):
    mesh(*sizes)


def test_a_mesh_can_be_made_of_some_devices():
  made = sharding.make_mesh((-1, 1, 1, 1), jax.devices()[6:])
  assert dict(made.shape) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
  assert set(made.devices.flat) == set(jax.devices()[6:])


def test_specs_lay_each_logical_axis_over_its_mesh_axes():
  assert TRAIN.spec(("width", "heads", None)) == jax.P(("fsdp", "sequence"), ("tensor",), None)
  assert TRAIN.spec(("rows",)) == jax.P(("data", "fsdp"))
  assert GENERATE_REPLICATED.spec(("vocab", "width")) == jax.P(None, None)
  assert GENERATE_TENSOR.spec(("vocab", "width")) == jax.P(("tensor",), None)


def test_a_mesh_axis_cannot_be_used_twice():
  with pytest.raises(UserError, match="each mesh axis once"):
    TRAIN.spec(("rows", "width"))


@pytest.mark.parametrize("layout", [TRAIN, GENERATE_REPLICATED, GENERATE_TENSOR, LOCAL])
def test_every_parameter_can_be_laid_out(layout):
  for spec in jax.tree.leaves(architecture.param_specs(tiny.CONFIG)):
    where = sharding.named(mesh(), layout, spec.axes, spec.shape, spec.hf_name)
    part = where.shard_shape(spec.shape)
    split = [sharding.shards(mesh(), getattr(layout, axis)) if axis else 1 for axis in spec.axes]
    assert part == tuple(size // parts for size, parts in zip(spec.shape, split))


def test_an_axis_that_does_not_divide_is_refused_with_what_would_fit():
  with pytest.raises(
    UserError, match=r"k_proj: axis 'heads' of size 6 .* over tensor = 8 devices; allowed: 1, 2, 3, 6"
  ):
    sharding.named(mesh(1, 1, 8), TRAIN, ("width", "heads"), (32, 6), "k_proj")


def test_arrays_come_back_as_they_went():
  tree = {"a": np.arange(48.0).reshape(8, 6), "b": np.arange(8) % 3 == 0}
  placed = sharding.to_global(tree, sharding.rows_sharding(mesh(), TRAIN))
  assert {s.data.shape for s in placed["a"].addressable_shards} == {(2, 6)}
  whole = sharding.to_global(tree, sharding.replicated(mesh()))
  assert {s.data.shape for s in whole["a"].addressable_shards} == {(8, 6)}
  for back in (placed, whole):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), tree)


def test_constrain_pins_an_activation_and_the_local_layout_pins_nothing():
  x = jnp.ones((8, 4))
  assert LOCAL.constrain(x, "rows", None) is x
  with jax.set_mesh(mesh()):
    pinned = jax.jit(lambda x: Layout(rows=("data",)).constrain(x, "rows", None))(x)
  assert pinned.sharding.spec[0] in ("data", ("data",))


def scattered(scatter, mesh, axis, x):
  """What each device of a mesh keeps of the sum of what all have, `x` by device; of `TRAIN.width`."""
  one = jax.shard_map(
    lambda mine: scatter(TRAIN.width, axis, mine[0])[None],
    in_specs=jax.P(sharding.AXES),
    out_specs=jax.P(sharding.AXES),
    check_vma=False,
  )
  with jax.set_mesh(mesh):
    return np.asarray(jax.jit(one)(x))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
  "data,fsdp,sequence", [(1, 8, 1), (1, 2, 4), (1, 4, 2), (2, 4, 1), (4, 2, 1), (1, 6, 1), (1, 7, 1)]
)
def test_scattering_in_stages_gives_each_device_what_scattering_plainly_does(data, fsdp, sequence, axis):
  count = data * fsdp * sequence
  on = sharding.make_mesh((data, fsdp, sequence, 1), jax.devices()[:count])
  shape = [3, 5, 2]
  shape[axis] *= fsdp * sequence
  x = np.random.default_rng(0).integers(-99, 99, (count, *shape)).astype(np.float32)  # whose sums are exact
  plainly = lambda axes, axis, x: jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)
  expected = scattered(plainly, on, axis, x)
  np.testing.assert_array_equal(scattered(sharding.scatter_in_stages, on, axis, x), expected)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("platform,scatters", [("cpu", 1), ("cuda", 1), ("tpu", 2)])
def test_what_is_gathered_is_scattered_in_stages_by_programs_for_tpus_and_plainly_by_others(platform, scatters, tensor):
  axes, on = ("width", "heads"), mesh(1, 8 // tensor, tensor)
  by_hand = TRAIN.by_hand.local(
    functools.partial(TRAIN.gather_width, axes=axes), TRAIN.by_hand.spec(axes), TRAIN.by_hand.spec((None, "heads"))
  )
  x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding.named(on, TRAIN, axes, (16, 4), "x"))
  with jax.set_mesh(on):
    traced = jax.jit(jax.grad(lambda x: jnp.sum(by_hand(x) ** 2))).trace(x)
    lowered = traced.lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("stablehlo.reduce_scatter") == scatters
    assert platform != "cpu" or "conditional" not in lowered.compile().as_text()

"""Stochastic rounding by its laws: unbiased, exact where it can be, the same on every mesh, and without memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import rounding, sharding

KEY = jax.random.key(11)
BF16 = jnp.bfloat16
EVERY = np.arange(2**16, dtype=np.uint16).view(BF16)  # all there are


def bits(x: jax.Array) -> np.ndarray:
  return np.asarray(x).view(np.uint16)


def halfway_ups(key: jax.Array, n: int = 2**16) -> np.ndarray:
  """±1: whether each of n values halfway between two neighbours went up; all of it is the draws' doing."""
  rounded = rounding.stochastic_round(jnp.full(n, 1 + 2**-8, jnp.float32), key, BF16)
  return np.where(np.asarray(rounded, np.float32) > 1, 1, -1)


@pytest.mark.parametrize("over", ["keys", "elements"])
def test_the_mean_is_the_value_and_only_its_two_neighbours_occur(over):
  n, rng = 20_000, np.random.default_rng(0)
  x_X = (rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64)).astype(np.float32)
  if over == "keys":
    rounded_nX = jax.vmap(lambda key: rounding.stochastic_round(x_X, key, BF16))(jax.random.split(KEY, n))
  else:
    rounded_nX = rounding.stochastic_round(jnp.broadcast_to(x_X, (n, 64)), KEY, BF16)
  toward_zero_X = (x_X.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
  away_X = ((x_X.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)
  rounded_nX = np.asarray(rounded_nX).astype(np.float64)
  assert ((rounded_nX == toward_zero_X) | (rounded_nX == away_X)).all()
  share_X = (x_X - toward_zero_X) / (away_X - toward_zero_X)
  found_X = ((rounded_nX - toward_zero_X) / (away_X - toward_zero_X)).mean(0)
  assert (np.abs(found_X - share_X) <= 4.5 * np.sqrt(share_X * (1 - share_X) / n) + 1 / n).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_bfloat16_holds_stays_and_so_does_what_is_not_finite(seed):
  nan = np.isnan(EVERY.astype(np.float32))
  wide = (EVERY.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  rounded = rounding.stochastic_round(wide, jax.random.key(seed), BF16)
  np.testing.assert_array_equal(bits(rounded)[~nan], EVERY.view(np.uint16)[~nan])
  assert np.isnan(np.asarray(rounded, np.float32)[nan]).all()
  payloads = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)  # a carry would leave NaN
  assert np.isnan(np.asarray(rounding.stochastic_round(payloads, KEY, BF16), np.float32)).all()


def test_equal_dtypes_are_the_identity_and_others_are_refused():
  x = jnp.float32([1.1, np.nan])
  assert rounding.stochastic_round(x, KEY, jnp.float32) is x
  with pytest.raises(ValueError, match="float32 to bfloat16"):
    rounding.stochastic_round(x, KEY, jnp.float16)
  with pytest.raises(ValueError, match="float32 to bfloat16"):
    rounding.stochastic_round(jnp.arange(3), KEY, BF16)


def test_draws_of_other_elements_keys_and_leaves_are_unrelated():
  n = 2**16
  ups = halfway_ups(KEY)
  others = [np.roll(ups, shift) for shift in (1, 2, 3, 64, 256, 2048)]
  others += [halfway_ups(jax.random.fold_in(KEY, i)) for i in range(8)] + [halfway_ups(jax.random.key(12))]
  worst = max(abs(np.mean(ups * other)) for other in others)
  assert worst < 4.5 / np.sqrt(n)
  halfway = jnp.full(n, 1 + 2**-8, jnp.float32)
  a, b = rounding.round_tree([halfway, halfway], [jnp.zeros(n, BF16)] * 2, KEY)
  assert abs(np.mean((np.asarray(a) > 1) == (np.asarray(b) > 1)) - 0.5) < 4.5 / np.sqrt(n) / 2


def test_the_sixteen_bits_are_uniform():
  """Every sixteenth of the range is as frequent as another, at a million elements of several axes."""
  x = jnp.broadcast_to(1 + jnp.arange(16) * 2.0**-11, (16, 64, 64, 16)).astype(jnp.float32)
  up = (np.asarray(rounding.stochastic_round(x, KEY, BF16), np.float32) > 1).mean((0, 1, 2))
  np.testing.assert_allclose(up, np.arange(16) / 16, atol=4.5 * 0.5 / 256)


def test_a_tree_keeps_what_its_likeness_keeps():
  tree = {"a": jnp.float32([1.001]), "b": jnp.float32([1.001]), "n": jnp.int32(3)}
  like = {"a": jnp.zeros(1, BF16), "b": jnp.zeros(1), "n": jnp.int32(0)}
  rounded = rounding.round_tree(tree, like, KEY)
  assert rounded["a"].dtype == BF16
  assert rounded["b"] is tree["b"] and rounded["n"] is tree["n"]
  assert [x.dtype for x in jax.tree.leaves(rounding.widen(like))] == [x.dtype for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("axes", [(None, "width", "heads"), ("heads", None, "width"), (None, "feed_forward", None)])
def test_the_bits_are_the_same_on_any_mesh(axes):
  x = jax.random.normal(KEY, (4, 8, 16))
  alone = rounding.stochastic_round(x, KEY, BF16)
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  where = sharding.named(mesh, sharding.TRAIN, axes, x.shape, "x")
  spread = jax.jit(lambda x, key: rounding.stochastic_round(x, key, BF16), out_shardings=where)(
    jax.device_put(x, where), jax.device_put(KEY, sharding.replicated(mesh))
  )
  assert spread.sharding.is_equivalent_to(where, 3)
  np.testing.assert_array_equal(bits(spread), bits(alone))


def test_rounding_takes_no_memory_of_its_own():
  x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
  compiled = jax.jit(lambda x, key: rounding.stochastic_round(x + 1, key, BF16)).lower(x, KEY).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.02 * 4 * x.size

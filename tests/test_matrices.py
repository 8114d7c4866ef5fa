"""Products of narrow numbers: what they are, what their gradients are, and that nothing is widened on the way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import matrices, model, scoring

F32, BF16 = jnp.float32, jnp.bfloat16


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), BF16)


def exact(x):
  return np.asarray(x, np.float64)


def close(found, expected):
  """To a rounding to bfloat16 of sums in float32."""
  assert found.dtype == BF16
  np.testing.assert_allclose(exact(found), expected, rtol=2**-8, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 15, 48])
@pytest.mark.parametrize("contracted", [0, 1])
def test_a_product_and_its_gradients_are_rounded_once(rows, contracted):
  x_XI, weight_IO, slope_XO = drawn(0, rows, 24), drawn(1, 24, 40), drawn(2, rows, 40)
  matrix = weight_IO.T if contracted else weight_IO
  product_XO, pull = jax.vjp(lambda x, matrix: matrices.multiply(x, matrix, contracted), x_XI, matrix)
  close(product_XO, exact(x_XI) @ exact(weight_IO))
  x_slope_XI, matrix_slope = pull(slope_XO)
  close(x_slope_XI, exact(slope_XO) @ exact(weight_IO).T)
  expected_IO = exact(x_XI).T @ exact(slope_XO)
  close(matrix_slope, expected_IO.T if contracted else expected_IO)


def test_a_product_in_float32_is_not_rounded_but_its_slopes_are():
  x_XI, head_VI, slope_XV = drawn(0, 16, 24), drawn(1, 40, 24), drawn(2, 16, 40).astype(F32) * (1 + 2**-12)
  logits_XV, pull = jax.vjp(lambda x, head: matrices.multiply(x, head, 1, F32), x_XI, head_VI)
  assert logits_XV.dtype == F32
  np.testing.assert_allclose(logits_XV, exact(x_XI) @ exact(head_VI).T, rtol=1e-5, atol=1e-5)
  narrow_XV = exact(slope_XV.astype(BF16))
  close(pull(slope_XV)[0], narrow_XV @ exact(head_VI))
  close(pull(slope_XV)[1], narrow_XV.T @ exact(x_XI))


def test_float32_is_multiplied_as_it_always_was():
  x_XI, weight_IO = drawn(0, 16, 24).astype(F32), drawn(1, 24, 40).astype(F32)
  np.testing.assert_array_equal(matrices.multiply(x_XI, weight_IO), jnp.dot(x_XI, weight_IO))


def products(remat):
  """(operand, operand, result) of the matrix products in a gradient of scores, as they are handed to XLA."""
  tokens_RT = jnp.ones((2, 48), jnp.int32)
  score = lambda params: jnp.sum(scoring.score(tiny.CONFIG, params, tokens_RT, tokens_RT > 0, dtype=BF16, remat=remat))
  text = jax.jit(jax.grad(score)).lower(tiny.params()).as_text()
  found = re.findall(r"dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>", text)
  return [tuple(shape.split("x")[-1] for shape in product) for product in found]


def test_no_product_of_a_gradient_widens_its_operands():
  """XLA's CPU backend multiplies bfloat16 natively only where sums may stay in float32."""
  found = products("layer")
  wide = [product for product in found if product[:2] != ("bf16", "bf16")]
  rotations = [product for product in wide if product == ("f32", "f32", "f32")]  # of positions, not of weights
  assert len(found) > 20 and wide == rotations and len(rotations) < 4
  assert {product[2] for product in found} == {"f32"}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_that_are_kept_are_kept_once_and_rounded(dtype, capsys):
  x_XI, weights = drawn(0, 16, 24).astype(dtype), [drawn(i, 24, 24).astype(dtype) for i in (1, 2)]

  def chain(x_XI):
    for weight in weights:
      x_XI = jnp.sin(matrices.multiply(x_XI, weight))
    return jnp.sum(x_XI)

  jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(chain, policy=model._KEPT["products"]), x_XI)
  made = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line and "16,24" in line]
  name = {F32: "f32", BF16: "bf16"}[dtype]
  assert len(made) == 2 and all(line.startswith(f"{name}[16,24]") for line in made)


def compiled(f, *arguments):
  return jax.jit(f).lower(*arguments).compile().as_text()


def test_gradients_of_scores_in_bfloat16_point_where_float32_points():
  rng = np.random.default_rng(3)
  tokens_RT = jnp.asarray(rng.integers(0, tiny.CONFIG.vocab, (4, 48)), jnp.int32)

  def gradient(dtype):
    score = lambda params: jnp.sum(scoring.score(tiny.CONFIG, params, tokens_RT, tokens_RT >= 0, chunk=32, dtype=dtype))
    return jax.tree.map(jnp.ravel, jax.grad(score)(tiny.params()))

  for narrow, wide in zip(*(jax.tree.leaves(gradient(dtype)) for dtype in (BF16, F32))):
    assert float(narrow @ wide) > 0.995 * float(jnp.linalg.norm(narrow) * jnp.linalg.norm(wide))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_looking_up_widens_no_table():
  table_VM, tokens_RT = jnp.ones((64, 8), BF16), jnp.ones((2, 3), jnp.int32)
  look_up = lambda table_VM, tokens_RT: model.embed(tiny.CONFIG, {"embed": table_VM}, tokens_RT)
  assert "64x8xf32" not in jax.jit(look_up).lower(table_VM, tokens_RT).as_text()

  def widened(look_up):
    words = lambda table_VM, tokens_RT: jnp.sum(look_up(table_VM, tokens_RT), -1).astype(jnp.int32)
    in_a_loop = lambda table_VM, tokens_RT: jax.lax.fori_loop(0, 3, lambda _, x_RT: words(table_VM, x_RT), tokens_RT)
    return "f32[64,8]{1,0} fusion(" in compiled(in_a_loop, table_VM, tokens_RT)

  if jax.__version_info__ < (0, 12):  # since then XLA leaves this small program's table as it is
    assert widened(lambda table_VM, tokens_RT: table_VM[tokens_RT]) and not widened(look_up)


def test_layers_that_lie_whole_are_rounded_one_by_one():
  """Rounded all at once they would be a second copy, which XLA's CPU backend even keeps in float32."""
  params, tokens_RT = tiny.params(tiny.CONFIG), jnp.zeros((2, 8), jnp.int32)
  traced = jax.make_jaxpr(lambda params: model.forward(tiny.CONFIG, params, tokens_RT, dtype=jnp.bfloat16)[0])(params)
  rounded = [e.outvars[0].aval.shape for e in traced.eqns if e.primitive.name == "convert_element_type"]
  assert params["embed"].shape in rounded
  assert not {x.shape for x in jax.tree.leaves(params["layers"])} & set(rounded)

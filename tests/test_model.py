"""The transformer against a float64 Llama, and the invariances that training and sampling lean on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import architecture, caches, layers, model, rotary, sharding
from advgame_jax.architecture import LayerKind, Rope
from advgame_jax.attention import Index
from advgame_jax.model import Prefix

pytestmark = pytest.mark.usefixtures("compile_quickly")

UNTIED = dataclasses.replace(
  tiny.CONFIG,
  tied=False,
  kinds=(LayerKind(Rope(factor=8.0, original_length=64)),),
)
RNG = np.random.default_rng(0)
TOKENS_RT = RNG.integers(0, tiny.CONFIG.vocab, (3, 10)).astype(np.int32)


def all_logits(config):
  return jax.jit(lambda params, tokens_RT: model.logits(config, params, model.forward(config, params, tokens_RT)[0]))


LOGITS = {config: all_logits(config) for config in (tiny.CONFIG, UNTIED)}


@pytest.mark.parametrize("config", [tiny.CONFIG, UNTIED], ids=["tied", "untied, scaled rope"])
def test_forward_equals_a_float64_llama(config):
  expected = tiny.llama_logits(config, tiny.params(config), TOKENS_RT)
  assert expected.std() > 0.3  # far from uniform, or the test would see little
  np.testing.assert_allclose(LOGITS[config](tiny.params(config), TOKENS_RT), expected, atol=5e-5)


@pytest.mark.parametrize("config", [tiny.CONFIG, UNTIED], ids=["tied", "untied"])
def test_init_follows_the_table_of_specs(config):
  specs, params = architecture.param_specs(config), architecture.init(config, jax.random.key(0))
  assert jax.tree.structure(specs) == jax.tree.structure(params)
  for spec, x in zip(jax.tree.leaves(specs), jax.tree.leaves(params)):
    assert x.shape == spec.shape and x.dtype == jnp.float32 and len(spec.axes) == len(spec.shape)
    assert spec.stacked == (spec.shape[0] == config.layers)
    if spec.constant is not None:
      assert (x == spec.constant).all()
    else:
      to_residual = "o_proj" in spec.hf_name or "down_proj" in spec.hf_name
      np.testing.assert_allclose(np.std(x), 0.02 / (2 * config.layers) ** (0.5 * to_residual), rtol=0.1)
  assert ("head" in params) != config.tied
  assert architecture.count_params(config) == sum(x.size for x in jax.tree.leaves(params))


def test_init_draws_every_parameter_from_its_own_key():
  columns = [np.ravel(x)[:64] for x in jax.tree.leaves(architecture.init(UNTIED, jax.random.key(0))) if np.std(x) > 0]
  correlation = np.corrcoef(columns) - np.eye(len(columns))
  assert np.abs(correlation).max() < 0.6


def test_rows_do_not_see_their_padding():
  forward = LOGITS[tiny.CONFIG]
  short = np.asarray(forward(tiny.params(), TOKENS_RT[:, :6]))
  np.testing.assert_allclose(forward(tiny.params(), TOKENS_RT)[:, :6], short, atol=5e-6)
  other = TOKENS_RT.copy()
  other[:, 6:] = (other[:, 6:] + 1) % tiny.CONFIG.vocab
  np.testing.assert_allclose(forward(tiny.params(), other)[:, :6], short, atol=5e-6)


@pytest.mark.parametrize(
  "theta,factor,low,high,original", [(5e5, 8, 1, 4, 8192), (5e5, 32, 1, 4, 8192), (1e4, 1, 1, 4, 64)]
)
def test_rope_frequencies_equal_the_llama_3_formula(theta, factor, low, high, original):
  rope = Rope(theta, factor=factor, low_frequency=low, high_frequency=high, original_length=original)
  np.testing.assert_allclose(rotary.rope_frequencies(rope, 64), tiny.frequencies(rope, 64), rtol=2e-6)


@pytest.mark.parametrize("stacked", [True, False])
def test_decode_step_by_step_equals_forward(stacked):
  """Rows behind prompts of several lengths, each in a page of its own; what they draw goes to pages of two tokens."""
  Q, steps, page = 3, 4, 2
  config, length_R = tiny.CONFIG, np.array([5, 2, 6])
  params = tiny.params() if stacked else layers.unstack(tiny.CONFIG, tiny.params())
  prompts = caches.caches_of(model.forward(config, params, jnp.asarray(TOKENS_RT[:, :6]))[1])
  new_RT = RNG.integers(0, config.vocab, (Q, steps)).astype(np.int32)
  places, zeros_R = np.arange(Q, dtype=np.int32)[:, None], np.zeros(Q, np.int32)
  read = Index(places, zeros_R, length_R, places)
  own_RJ = np.array([[4, 1], [0, 3], [2, 5]])
  order = np.argsort(own_RJ.reshape(-1))
  start_P = (length_R[:, None] + [0, page]).reshape(-1)[order]
  own = Index(np.repeat(places, 2, 0)[order], start_P, np.full(6, 99), own_RJ)

  @jax.jit
  def step(token_R, pool, count):
    place_R = jnp.asarray(length_R) + count
    hidden_RM, new = model.decode(config, params, token_R, place_R, [(prompts, read), (pool, own)])
    pool = caches.write(pool, new, jnp.asarray(own_RJ)[:, count // page], jnp.full(Q, count % page))
    return model.logits(config, params, hidden_RM), pool

  pool = caches.empty_pool(config, stacked, 6, page, jnp.float32)
  decoded = []
  for count in range(steps):
    logits_RV, pool = step(new_RT[:, count], pool, jnp.int32(count))
    decoded.append(np.asarray(logits_RV))

  rows = np.zeros((Q, 10), np.int32)
  for r, length in enumerate(length_R):
    rows[r, : length + steps] = np.concatenate([TOKENS_RT[r, :length], new_RT[r]])
  whole = np.asarray(all_logits(config)(tiny.params(), rows))
  for count in range(steps):
    np.testing.assert_allclose(decoded[count], whole[np.arange(Q), length_R + count], atol=2e-5)


def test_a_token_without_a_page_is_written_nowhere():
  pool = caches.empty_pool(tiny.CONFIG, False, 3, 2, jnp.float32)
  new = jax.tree.map(jnp.ones_like, caches.no_tokens(tiny.CONFIG, False, 2, jnp.float32))
  written = caches.write(pool, new, np.array([3, 1]), np.array([0, 1]))
  for key_PKHS, value_PKSH in written:
    for x_PKSH in (key_PKHS.swapaxes(2, 3), value_PKSH):
      assert np.argwhere(np.asarray(x_PKSH).any((1, 3))).tolist() == [[1, 1]]


def test_packed_rows_are_their_segments_one_by_one():
  config, params = tiny.CONFIG, tiny.params()
  parts = [TOKENS_RT[0, :5], TOKENS_RT[1, :3], TOKENS_RT[2, :7]]
  segment_T = np.repeat([1, 2, 3, 0], [5, 3, 7, 2])[None]
  place_T = np.concatenate([np.arange(len(part)) for part in parts] + [np.zeros(2, int)])[None]
  row_T = np.concatenate([*parts, np.zeros(2, np.int32)])[None]
  hidden_RTM, _ = model.forward(config, params, row_T, place_RT=place_T, segment_RT=segment_T)
  for i, part in enumerate(parts):
    alone_RTM, _ = model.forward(config, params, part[None])
    np.testing.assert_allclose(hidden_RTM[0, segment_T[0] == i + 1], alone_RTM[0], atol=2e-6)


@pytest.mark.parametrize("remat", ["layer", "products"])
def test_remat_changes_no_gradient(remat):
  def loss(params, remat):
    hidden_RTM, _ = model.forward(tiny.CONFIG, params, TOKENS_RT, remat=remat)
    return jnp.sum(jax.nn.log_softmax(model.logits(tiny.CONFIG, params, hidden_RTM))[..., 0])

  plain, rematted = (jax.jit(jax.grad(functools.partial(loss, remat=name)))(tiny.params()) for name in ("none", remat))
  assert "remat" in str(jax.make_jaxpr(lambda p: loss(p, remat))(tiny.params()))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max()), plain, rematted)


def test_attention_is_computed_again_with_its_layer_and_not_between_products():
  """Its blocks are scanned, of rows longer than a block: there, again if asked for, and back."""
  tokens_RT = np.tile(TOKENS_RT, (1, 100))[:, :80]

  def scans(remat):
    loss = lambda params: jnp.sum(model.forward(tiny.CONFIG, params, tokens_RT, remat=remat)[0])
    return str(jax.make_jaxpr(jax.grad(loss))(tiny.params())).count("scan[")

  assert scans("none") == scans("products") == scans("layer") - 1


@pytest.mark.parametrize("tied", [True, False])
def test_forward_flops_agree_with_the_compiler(tied):
  """One layer, since a scanned body is counted once; wide enough that the matrix products dominate."""
  config = dataclasses.replace(tiny.CONFIG, layers=1, width=128, feed_forward=256, head_size=32, vocab=512, tied=tied)
  R, T = 2, 64  # one block: a loop over several is counted once too
  params = jax.eval_shape(lambda: architecture.init(config, jax.random.key(0)))
  compiled = all_logits(config).lower(params, jax.ShapeDtypeStruct((R, T), jnp.int32)).compile()
  # The compiler multiplies what the causal mask hides too.
  assert architecture.forward_flops(config, R * T, T) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_a_drawn_token_costs_its_products_or_where_rows_are_few_its_share_of_the_weights(tied):
  config = dataclasses.replace(tiny.CONFIG, vocab=512, tied=tied)
  drawn, cost = architecture.forward_flops(config, 1, 0), functools.partial(architecture.drawing_to_reading, config)
  assert cost(1024) == cost(512) == drawn / (drawn - 2 * config.vocab * config.width)  # the head is what reading saves
  assert cost(8) == 4 * cost(32) == 16 * cost(1024)


@pytest.mark.parametrize("stacked", [True, False])
def test_logits_are_float32_and_pools_match_caches(stacked):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params())
  params = params if stacked else layers.unstack(tiny.CONFIG, params)
  hidden, kept = jax.eval_shape(lambda: model.forward(tiny.CONFIG, params, TOKENS_RT, dtype=jnp.bfloat16))
  cache = jax.eval_shape(caches.caches_of, kept)
  pool = caches.empty_pool(tiny.CONFIG, stacked, *TOKENS_RT.shape, jnp.bfloat16)
  assert hidden.dtype == jnp.bfloat16
  assert jax.eval_shape(lambda: model.logits(tiny.CONFIG, params, jnp.zeros(hidden.shape, hidden.dtype))).dtype == (
    jnp.float32
  )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(lambda x: (x.shape, x.dtype), pool)


def continued_rows(config, prefix_length, slots):
  """A prefix padded to so many slots, and rows of several lengths that continue it; and the same as whole rows."""
  rng = np.random.default_rng(5)
  prefix_T = rng.integers(1, config.vocab, prefix_length).astype(np.int32)
  length_R, tokens_RT = np.array([7, 40, 3]), rng.integers(1, config.vocab, (3, 40)).astype(np.int32)
  whole_RT = np.concatenate([np.tile(prefix_T, (3, 1)), tokens_RT], 1)
  return np.pad(prefix_T, (0, slots - prefix_length))[None], length_R, tokens_RT, whole_RT


@pytest.mark.parametrize("window", [0, 9], ids=["all", "window"])
def test_rows_that_continue_a_prefix_are_whole_rows(window):
  """The prefix is read once and is longer and shorter than the window; padding behind it is never seen."""
  config = dataclasses.replace(tiny.CONFIG, kinds=(LayerKind(Rope(100.0), window), LayerKind(Rope(100.0))))
  params = tiny.params(config)
  for prefix_length in (5, 21):
    prefix_1T, length_R, tokens_RT, whole_RT = continued_rows(config, prefix_length, slots=24)
    _, kept = model.forward(config, params, prefix_1T)
    prefix = Prefix(caches.caches_of(kept), np.array([prefix_length]))
    hidden_RTM, own = jax.jit(lambda prefix, t: model.forward(config, params, t, prefix=prefix))(prefix, tokens_RT)
    expected_RTM, whole = model.forward(config, params, whole_RT)
    np.testing.assert_allclose(hidden_RTM, expected_RTM[:, prefix_length:], atol=2e-5)
    np.testing.assert_allclose(own.key_RTKH, whole.key_RTKH[:, :, prefix_length:], atol=2e-5)  # of all layers

    packed_RT = np.concatenate([tokens_RT[r, :length] for r, length in enumerate(length_R)])[None]
    segment_RT = np.repeat(np.arange(3), length_R)[None]
    place_RT = np.concatenate([np.arange(length) for length in length_R])[None]
    packed_RTM, _ = model.forward(config, params, packed_RT, prefix=prefix, place_RT=place_RT, segment_RT=segment_RT)
    for r, length in enumerate(length_R):
      np.testing.assert_allclose(packed_RTM[0, segment_RT[0] == r], hidden_RTM[r, :length], atol=2e-5)


def test_the_gradient_of_a_word_that_is_often_there_is_added_up_in_float32():
  table_VM = jnp.zeros((8, 4), jnp.bfloat16)
  tokens_RT = jnp.full((2, 500), 3)
  gradient = jax.grad(lambda table_VM: jnp.sum(model.embed(tiny.CONFIG, {"embed": table_VM}, tokens_RT)))(table_VM)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient[3], 1000)  # one by one in bfloat16, 256 ones are the most
  assert not gradient[jnp.arange(8) != 3].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 8},
  ],
  ids=lambda sizes: ", ".join(f"{axis} {size}" for axis, size in sizes.items()),
)
def test_a_mesh_looks_up_as_one_device_does_and_learns_alike(sizes, dtype):
  mesh, layout, rng = tiny.mesh(**sizes), sharding.TRAIN, np.random.default_rng(1)
  tokens_RT = rng.integers(0, 8, (8, 64)).astype(np.int32)  # each word some 64 times
  table_VM, weight_RTM = (rng.normal(size=shape).astype(dtype) for shape in ((16, 32), (8, 64, 32)))

  def weighed(table_VM, tokens_RT, weight_RTM, layout):
    found_RTM = model.embed(tiny.CONFIG, {"embed": table_VM}, tokens_RT, layout)
    return jnp.sum((found_RTM * weight_RTM).astype(jnp.float32)), found_RTM

  look_up = jax.jit(jax.grad(weighed, has_aux=True), static_argnums=3)
  expected, expected_RTM = look_up(table_VM, tokens_RT, weight_RTM, sharding.LOCAL)
  place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, layout.spec(axes)))
  arrays = (place(table_VM, "vocab", "width"), *(place(x, "rows", "tokens") for x in (tokens_RT, weight_RTM)))
  with jax.set_mesh(mesh):
    gradient, found_RTM = look_up(*arrays, layout)
  np.testing.assert_array_equal(found_RTM, expected_RTM)
  copies = sizes.get("data", 1)  # whose sums are rounded to bfloat16 before they are added up
  rounding = 1e-6 if dtype == jnp.float32 else 2**-8 * copies
  gradient, expected = (np.asarray(x, np.float32) for x in (gradient, expected))
  np.testing.assert_allclose(gradient, expected, atol=rounding * np.abs(expected).max())

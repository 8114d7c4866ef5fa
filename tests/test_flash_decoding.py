"""The kernels that read and write pages on GPUs, interpreted, against the plain form; and that they are compiled."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention
import tiny

from advgame_jax import architecture, attention, caches, flash_decoding, kernels, layers, sampler, sharding
from advgame_jax.config import Sampling
from advgame_jax.engine import Engine, Load
from advgame_jax.scoring import Generator

pytestmark = pytest.mark.usefixtures("compile_quickly")

R, N, K, H, PAGE = 4, 6, 2, 16, 16
INTERPRETED = functools.partial(flash_decoding.paged, interpret=True)


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
  monkeypatch.setattr(test_attention, "K", K)
  monkeypatch.setattr(test_attention, "H", H)


def inputs(page=PAGE, readers=(0, 0, 1, 1), dtype=np.float32):
  """A new token a row, and two pools: texts that rows share, and each row's own."""
  rng = np.random.default_rng(3)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  text = lambda first, length: (first, normal(length, K, H), normal(length, K, H))
  shared = [text(0, length) for length in (39, 24)[: max(readers) + 1]]
  own = [text(len(shared[readers[r]][1]), length) for r, length in enumerate((3, 36, 1, 0))]
  place_R = np.array([first + len(key) for first, key, _ in own], np.int32)
  pools = [test_attention.pooled(rng, shared, readers, page), test_attention.pooled(rng, own, range(R), page)]
  cast = lambda x: jnp.asarray(x, dtype if x.dtype == np.float32 else x.dtype)
  return jax.tree.map(cast, (normal(R, N, H), normal(R, K, H), normal(R, K, H), place_R, pools))


def both(*parts, softcap=0.0, window=2**30):
  rule = attention.Rule(H**-0.5, softcap=softcap)
  return (paged(*parts, rule=rule, window=jnp.int32(window)) for paged in (attention.paged, INTERPRETED))


@pytest.mark.parametrize(
  "page, readers, window, softcap",
  [
    (16, (0, 0, 1, 1), 2**30, 0.0),
    (16, (0, 0, 0, 0), 7, 0.0),
    (32, (0, 0, 1, 1), 7, 2.0),
    (32, (0, 0, 0, 0), 2**30, 2.0),
  ],
)
def test_kernels_give_what_the_plain_form_gives(page, readers, window, softcap):
  plain, kernel = both(*inputs(page, readers), softcap=softcap, window=window)
  np.testing.assert_allclose(kernel, plain, atol=1e-6)


def test_a_cache_in_bfloat16_or_eight_bits():
  *new, pools = inputs(dtype=jnp.bfloat16)
  plain, kernel = both(*new, pools)
  np.testing.assert_allclose(kernel.astype(jnp.float32), plain.astype(jnp.float32), atol=1e-2)
  *new, pools = inputs()
  narrow = [pool._replace(**dict(zip(pool._fields, caches.narrow(caches.Cache(*pool[:2]))))) for pool in pools]
  plain, kernel = both(*new, narrow)
  np.testing.assert_allclose(kernel, plain, atol=1e-6)
  assert np.abs(kernel - next(both(*new, pools))).max() > 1e-3  # they are narrow


def suits(S, head_size=H, readers=1, dtype="float32", heads=3):
  array = jax.ShapeDtypeStruct
  index = attention.Index(array((1, readers), jnp.int32), None, None, None)
  pool = attention.Pool(array((1, K, head_size, S), dtype), array((1, K, S, head_size), dtype), index)
  return flash_decoding.suits(pool, array((R, K, heads, head_size), dtype))


def test_what_the_kernel_cannot_read_is_read_plainly_beside_it():
  *new, pools = inputs(page=12)
  plain, kernel = both(*new, pools)
  np.testing.assert_allclose(kernel, plain, atol=1e-6)
  assert suits(16) and suits(128, 128, dtype="bfloat16") and suits(16, readers=42)
  assert not suits(12) and not suits(8) and not suits(16, readers=43)
  assert not suits(512, 128, dtype="bfloat16") and not suits(128, 128)  # more than shared memory holds


def test_pages_of_many_blocks_are_joined():
  with mock.patch.object(flash_decoding, "_JOINED", 2):
    plain, kernel = both(*inputs(), softcap=3.0)  # a rule that nothing was compiled for
  np.testing.assert_allclose(kernel, plain, atol=1e-6)


def test_pages_of_nobody_are_not_read():
  *_, (_, own) = inputs()
  query_RKnH, place_R = jnp.ones((R, K, N // K, H)), jnp.full(R, 99)
  nobody = own._replace(readers=own.readers._replace(end_P=own.readers.start_P))
  rule, window = attention.Rule(1.0), jnp.int32(9999)
  read = lambda pool: flash_decoding._read(query_RKnH, place_R, [pool], rule, window, interpret=True)[0]
  assert np.isfinite(read(own)[1]).all() and np.isnan(read(nobody)[1]).all()  # interpreted, what nobody wrote is NaN


def lowered(f, *args):
  """For a GPU."""
  card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=card)):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  "dtype, int8, softcap", [("bfloat16", False, 0.0), ("float32", False, 30.0), ("bfloat16", True, 0.0)]
)
def test_kernels_are_lowered_for_gpus(dtype, int8, softcap):
  *new, pools = inputs(dtype=jnp.dtype(dtype))
  if int8:
    pools = [pool._replace(**dict(zip(pool._fields, caches.narrow(caches.Cache(*pool[:2]))))) for pool in pools]
  more_RJ = jnp.pad(pools[0].readers.entry_RJ, ((0, 0), (0, 60)), constant_values=-1)  # three blocks of pages
  pools[0] = pools[0]._replace(readers=pools[0].readers._replace(entry_RJ=more_RJ))
  rule = attention.Rule(1.0, softcap=softcap)
  text = lowered(functools.partial(flash_decoding.paged, rule=rule, window=jnp.int32(9)), *new, pools)
  assert text.count("xla.gpu.triton") == 2  # what reads both pools, and what joins them


def tokens_and_pool(dtype, int8, count=3):
  """A pool of five pages, and a token for each of four rows, the last of which has no page."""
  rng = np.random.default_rng(5)
  config = dataclasses.replace(tiny.CONFIG, head_size=H, kv_heads=K, layers=count)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype)
  pool = jax.tree.map(fill, caches.empty_pool(config, False, 5, PAGE, dtype, int8))
  new = jax.tree.map(fill, tuple(caches.Kept(*each) for each in caches.no_tokens(config, False, R, dtype)))
  spoil = lambda x: x if int8 and x is new[-1].key_RTKH else x.at[2, 0, 1, 3].set(jnp.nan)
  spoilt = caches.Kept(*map(spoil, new[-1]))
  return pool, (*new[:-1], spoilt), jnp.array([3, 0, 4, 5]), jnp.array([0, PAGE - 1, 7, 1])


@pytest.mark.parametrize(
  "dtype, int8", [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
)
def test_tokens_are_written_where_they_plainly_are(dtype, int8, monkeypatch):
  monkeypatch.setattr(flash_decoding, "_LAYERS_A_LAUNCH", 2)  # the third layer in a launch of its own
  pool, *token = tokens_and_pool(jnp.dtype(dtype), int8)
  plain, kernel = caches.write(pool, *token), flash_decoding.write(pool, *token, interpret=True)
  wide = lambda x: np.asarray(x, np.float32)  # of narrower numbers numpy takes no NaN for another
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(wide(x), wide(y)), kernel, plain)
  changed = jax.tree.map(lambda after, before: (after != before).any(tuple(range(1, after.ndim))), plain, pool)
  assert all(np.flatnonzero(page).tolist() == [0, 3, 4] for page in jax.tree.leaves(changed))


def test_a_page_below_the_first_is_none():
  pool, new, _, slot_R = tokens_and_pool(jnp.float32, False)
  written = flash_decoding.write(pool, new, jnp.full(R, -1), slot_R, interpret=True)
  jax.tree.map(np.testing.assert_array_equal, written, pool)


@pytest.mark.parametrize("dtype, int8", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_one_launch_writes_many_layers(dtype, int8):
  def launches(count):
    return lowered(flash_decoding.write, *tokens_and_pool(jnp.dtype(dtype), int8, count)).count("xla.gpu.triton")

  assert [launches(count) for count in (1, 16, 17)] == [1, 1, 2]


def test_who_reads_pages_by_kernels():
  assert kernels.by_pages("auto", "gpu", 128) and kernels.by_pages("cudnn", "gpu", 64)
  assert not any(kernels.by_pages(*how) for how in (("xla", "gpu", 128), ("auto", "cpu", 128), ("auto", "tpu", 128)))
  assert not kernels.by_pages("auto", "gpu", 96)


@pytest.mark.parametrize("mesh, layout", [((1, 1, 1), sharding.LOCAL), ((2, 2, 2), sharding.GENERATE_TENSOR)])
def test_a_generation_by_kernels_draws_the_plain_one_s_tokens(mesh, layout):
  config = dataclasses.replace(tiny.CONFIG, head_size=H)
  sampling = Sampling(prompt_buckets=(40,), max_new_tokens=20, page=16, decode_chunk=4)
  never = sampler.stop_table([""] * config.vocab, [], [])
  prompts = [np.random.default_rng(q).integers(1, config.vocab, 10 * q + 5).tolist() for q in range(4)]
  over = tiny.mesh(*mesh)
  where = architecture.shardings(architecture.param_specs(config), over, layout)
  weights = jax.device_put(layers.unstack(config, tiny.params(config)), layers.unstack_shardings(config, where))

  def draw(name):
    who = Engine(config, sampling, over, layout, np.dtype("float32"), name, never)
    return who.generate(Load(Generator((weights,)), prompts, np.arange(4, dtype=np.uint32), 2, jax.random.key(1)))

  plain = draw("xla")
  paged, write = mock.Mock(wraps=INTERPRETED), mock.Mock(wraps=functools.partial(flash_decoding.write, interpret=True))
  with (
    mock.patch.object(kernels, "by_pages", lambda *_: True),
    mock.patch.multiple(flash_decoding, paged=paged, write=write),
  ):
    drawn = draw("auto")
  assert paged.called and write.called
  np.testing.assert_array_equal(drawn.tokens_RT, plain.tokens_RT)
  np.testing.assert_allclose(drawn.plain_logprob_RT, plain.plain_logprob_RT, atol=1e-5)

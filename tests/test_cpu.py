"""The kernels for CPUs against XLA's forms, on processors that have what they need."""

import concurrent.futures
import functools
import os
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advgame_jax import (
  architecture,
  attention,
  blockwise,
  caches,
  cpu,
  feed_forward,
  layers,
  matrices,
  model,
  programs,
  rotary,
  sampler,
  scoring,
  sharding,
)
from advgame_jax.architecture import ModelConfig
from advgame_jax.attention import Index, Pool
from advgame_jax.caches import Cache, Kept
from advgame_jax.config import Sampling
from advgame_jax.engine import Engine, Load
from advgame_jax.sampler import Member, Rows
from advgame_jax.scoring import Generator

NARROW, WIDE = jnp.bfloat16, jnp.float32
COMPILER = shutil.which("c++") or shutil.which("g++")
HERE = COMPILER and not cpu._NEEDED - cpu._processor()  # those of float32
needs_avx512 = pytest.mark.skipif(not HERE, reason="needs Linux, a CPU with AVX-512, and a C++ compiler")
without_amx = not HERE or cpu._NEEDED_BY_NARROW - cpu._processor()
needs_amx = pytest.mark.skipif(bool(without_amx), reason="needs Linux, a CPU with AMX, and a C++ compiler")
BOTH = [pytest.param(NARROW, marks=needs_amx), pytest.param(WIDE, marks=needs_avx512)]
PAIRS = [  # of what is new and what is kept, or comes out
  pytest.param(NARROW, NARROW, marks=needs_amx),
  pytest.param(NARROW, WIDE, marks=needs_amx),
  pytest.param(WIDE, WIDE, marks=needs_avx512),
]


@pytest.fixture
def one_cpu(monkeypatch):
  """As in a process of one device: by fake ones all is XLA's. Nobody else gets the programs."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert cpu.there(WIDE) or not HERE
  programs.compiled.cache_clear()
  yield
  programs.compiled.cache_clear()


def normal(seed: int, *shape: int, dtype=NARROW) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def wide(x: jax.Array) -> np.ndarray:
  return np.asarray(x, np.float32)


def rounded(x: np.ndarray, dtype=NARROW) -> float:
  """How far off what is rounded to bfloat16 may be: half a unit of its last place, and the order of sums, which is all
  of float32.
  """
  return float(np.abs(x).max()) * (2**-8 if dtype == NARROW else 2**-20)


@pytest.mark.parametrize("X", [1, 16, 17, 33, 64, 65, 300])
@pytest.mark.parametrize(("of", "dtype"), PAIRS)
def test_products_are_those_of_float64_rounded_once(X, of, dtype, one_cpu):
  x, outputs = normal(0, X, 160, dtype=of), (32, 192, 64)
  parts = [normal(i, size, 160, dtype=of) for i, size in enumerate(outputs, 1)]
  assert cpu.multiplies(x, *parts)
  products = jax.jit(lambda x, *parts: cpu.multiply(x, *parts, dtype=dtype))(x, *parts)
  for part, product in zip(parts, products):
    expected = np.asarray(x, np.float64) @ np.asarray(part, np.float64).T
    assert product.dtype == dtype
    np.testing.assert_allclose(wide(product), expected, atol=rounded(expected, dtype))
    np.testing.assert_array_equal(matrices.multiply(x, part, 1, dtype), product)


@pytest.mark.parametrize("dtype", BOTH)
def test_rows_of_many_inputs_are_taken_in_parts(dtype, one_cpu):
  x, matrix = normal(0, 100, 2**15, dtype=dtype), normal(1, 64, 2**15, dtype=dtype)
  (product,) = jax.jit(lambda x, matrix: cpu.multiply(x, matrix, dtype=WIDE))(x, matrix)
  np.testing.assert_allclose(product, wide(x) @ wide(matrix).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_row_s_product_is_the_same_bits_in_any_company(dtype, one_cpu):
  """By whatever thread and in whatever order, too: whoever is done helps the others, so now and then."""
  matrix = normal(1, 8192, 64, dtype=dtype)
  multiply = jax.jit(lambda x: cpu.multiply(x, matrix, dtype=WIDE)[0])
  for seed in range(20):
    x = normal(seed, 300, 64, dtype=dtype)
    whole = np.asarray(multiply(x))
    for first, end in ((0, 1), (3, 40), (250, 300)):
      np.testing.assert_array_equal(np.asarray(multiply(x[first:end])), whole[first:end])


@needs_amx
def test_two_programs_at_once_have_their_own_products(one_cpu):
  x, matrix = normal(0, 40, 64), normal(1, 8192, 64)
  multiply = jax.jit(lambda x: cpu.multiply(x, matrix, dtype=WIDE)[0])
  inputs = [x, -x]
  expected = [np.asarray(multiply(x)) for x in inputs]

  def often(i: int) -> bool:
    return all(np.array_equal(np.asarray(multiply(inputs[i])), expected[i]) for _ in range(200))

  with concurrent.futures.ThreadPoolExecutor() as threads:
    assert all(threads.map(often, (0, 1)))


@pytest.mark.parametrize("X", [1, 3, 2000])
@pytest.mark.parametrize(("shape", "offset"), [((160,), 0.0), ((144,), 1.0), ((5, 32), 0.0)])
@pytest.mark.parametrize("dtype", BOTH)
def test_rows_are_normalised_as_in_float32(X, shape, offset, dtype, one_cpu):
  size = jnp.array([5, 0.002], dtype).reshape(2, *(1,) * len(shape))  # of the second as much as epsilon
  x, scale = size * normal(0, X, 2, *shape, dtype=dtype), normal(1, *shape, dtype=dtype)
  assert cpu.normalises(x, scale)
  expected = wide(model._rms_norm(x.astype(WIDE), scale.astype(WIDE), epsilon=1e-5, offset=offset))
  read = wide(model.rms_norm(x, scale, 1e-5, offset))
  np.testing.assert_allclose(read, expected, rtol=2**-8 if dtype == NARROW else 1e-6)


@pytest.mark.parametrize(("rows", "pairs"), [(1, 32), (3, 16)])
@pytest.mark.parametrize("dtype", BOTH)
def test_tokens_are_turned_as_in_float32(rows, pairs, dtype, one_cpu):
  x, angle = normal(0, 3, 50, 5, 64, dtype=dtype), 7 * normal(1, rows, 50, 1, pairs, dtype=WIDE)
  turn = rotary.Turn(1.3 * jnp.cos(angle), 1.3 * jnp.sin(angle))
  assert cpu.rotates(x, pairs) and not cpu.rotates(x, 0) and not cpu.rotates(x, 24)
  expected = wide(rotary._rotate(x.astype(WIDE), *turn))
  read = wide(rotary.rotate(x, turn))
  np.testing.assert_allclose(read, expected, atol=rounded(expected, dtype))
  np.testing.assert_array_equal(read[..., 2 * pairs :], wide(x)[..., 2 * pairs :])
  slope = normal(2, *x.shape, dtype=dtype)
  turned_back = lambda rotate, x: wide(jax.vjp(rotate, x)[1](slope.astype(x.dtype))[0])
  expected = turned_back(lambda x: rotary._rotate(x, *turn), x.astype(WIDE))
  np.testing.assert_allclose(turned_back(lambda x: rotary.rotate(x, turn), x), expected, atol=rounded(expected, dtype))


@pytest.mark.parametrize("X", [1, 33, 300])
@pytest.mark.parametrize("dtype", BOTH)
def test_what_is_added_to_a_product_is_added_before_it_is_rounded(X, dtype, one_cpu):
  x, matrix = normal(0, X, 160, dtype=dtype), normal(1, 96, 160, dtype=dtype)
  plus = 30 * normal(2, X, 96, dtype=dtype)
  expected = wide(x) @ wide(matrix).T + wide(plus)
  added = wide(jax.jit(cpu.added)(x, matrix, plus))
  np.testing.assert_allclose(added, expected, rtol=2**-8 if dtype == NARROW else 1e-6, atol=1e-3)
  layer = {"down": matrices.Transposed(matrix)}
  np.testing.assert_array_equal(wide(matrices.linear(layer, "down", x, plus=plus)), added)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("X", [1, 33, 300])
@pytest.mark.parametrize("dtype", BOTH)
def test_gated_products_are_those_of_float64_rounded_once(X, activation, dtype, one_cpu):
  x, gate, up = (normal(seed, size, 64, dtype=dtype) for seed, size in enumerate((X, 96, 96)))
  gate = gate.at[:2].set(30 * gate[:2])  # most gates are shut or open
  wide_x, exact = np.asarray(x, np.float64), np.asarray(x, np.float64) @ np.asarray(gate, np.float64).T
  with np.errstate(over="ignore"):
    silu = exact / (1 + np.exp(-exact))
  normal_cdf = 1 + np.tanh((2 / np.pi) ** 0.5 * (exact + 0.044715 * exact**3))
  expected = (silu if activation == "silu" else exact / 2 * normal_cdf) * (wide_x @ np.asarray(up, np.float64).T)
  gated = wide(jax.jit(lambda *args: cpu.gated(*args, activation=activation))(x, gate, up))
  np.testing.assert_allclose(gated, expected, rtol=2**-8 if dtype == NARROW else 1e-5, atol=1e-4)
  spoilt = wide(cpu.gated(x.at[0, 0].set(jnp.nan), gate, up, activation=activation))
  assert np.isnan(spoilt[0]).all()
  np.testing.assert_array_equal(spoilt[1:], gated[1:])


@pytest.mark.parametrize(("new", "kept"), PAIRS)
def test_tokens_are_written_where_they_belong_and_nowhere_else(new, kept, one_cpu, monkeypatch):
  R, P, K, H, S = 5, 7, 5, 32, 16
  pool = tuple(Cache(normal(i, P, K, H, S, dtype=kept), normal(i + 9, P, K, S, H, dtype=kept)) for i in range(3))
  drawn = lambda i: normal(i, R, 1, K, H, dtype=new)
  tokens = tuple(Kept(drawn(20 + i), drawn(30 + i).at[1, 0, 0, 3].set(jnp.nan)) for i in range(3))
  page, slot = jnp.array([6, 0, P, 3, 2], jnp.int32), jnp.array([0, 15, 1, 7, 8], jnp.int32)
  assert cpu.writes(pool, tokens)
  written = jax.tree.map(wide, jax.jit(caches.write)(pool, tokens, page, slot))
  monkeypatch.setattr(cpu, "writes", lambda *_: False)
  expected = jax.tree.map(wide, caches.write(pool, jax.tree.map(lambda x: x.astype(kept), tokens), page, slot))
  jax.tree.map(np.testing.assert_array_equal, written, expected)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(written))


@pytest.mark.parametrize(("new", "kept"), PAIRS)
def test_whole_pages_are_written_of_the_tokens_that_belong_there(new, kept, one_cpu, monkeypatch):
  P, K, H, S = 5, 5, 32, 16
  pool = tuple(Cache(normal(i, P, K, H, S, dtype=kept), normal(i + 9, P, K, S, H, dtype=kept)) for i in range(2))
  drawn = lambda i: normal(i, 3, 20, K, H, dtype=new)
  read = tuple(Kept(drawn(20 + i), drawn(30 + i).at[1, 4].set(jnp.inf)) for i in range(2))
  token, page = jnp.arange(64, dtype=jnp.int32)[::-1].reshape(4, S), jnp.array([4, 0, P, 2], jnp.int32)  # 60 are there
  assert cpu.writes(pool, read)
  written = jax.tree.map(wide, jax.jit(caches.write_pages)(pool, read, token, page))
  monkeypatch.setattr(cpu, "writes", lambda *_: False)
  expected = caches.write_pages(pool, jax.tree.map(lambda x: x.astype(kept), read), token, page)
  jax.tree.map(np.testing.assert_array_equal, written, jax.tree.map(wide, expected))


@pytest.mark.parametrize(("T", "N", "K", "H", "window", "cap"), [
  (150, 9, 3, 64, 0, 0.0), (70, 5, 5, 32, 20, 0.0), (37, 8, 2, 128, 0, 5.0), (16, 2, 1, 256, 7, 0.0),
])  # fmt: skip
@pytest.mark.parametrize("dtype", BOTH)
def test_packed_rows_are_attended_to_as_by_xla(T, N, K, H, window, cap, dtype, one_cpu):
  query, key, value = (normal(seed, 2, T, heads, H, dtype=dtype) for seed, heads in enumerate((N, K, K)))
  segment = jnp.cumsum((jax.random.uniform(jax.random.key(3), (2, T)) < 0.05).astype(jnp.int32), -1)
  rule = blockwise.Rule(H**-0.5, cap, window)
  assert cpu.attends(query)
  read = jax.jit(lambda *args: attention.causal(*args[:3], rule, segment_RT=args[3]))(query, key, value, segment)
  expected = wide(blockwise.causal(*(x.astype(WIDE) for x in (query, key, value)), rule, segment))
  np.testing.assert_allclose(wide(read), expected, atol=2 * rounded(expected, dtype))  # weights are rounded, too


@pytest.mark.parametrize(("T", "N", "K", "H", "window", "cap"), [
  (150, 9, 3, 64, 0, 0.0), (105, 5, 5, 32, 20, 0.5), (37, 8, 2, 128, 0, 5.0), (16, 2, 1, 256, 7, 0.0),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", BOTH)
def test_attention_learns_as_by_xla_in_float32(T, N, K, H, window, cap, packed, dtype, one_cpu, monkeypatch):
  *read, slope = (normal(seed, 3, T, heads, H, dtype=dtype) for seed, heads in enumerate((N, K, K, N)))
  segment = jnp.cumsum((jax.random.uniform(jax.random.key(4), (3, T)) < 0.05).astype(jnp.int32), -1) % 3
  segment, rule = segment if packed else None, blockwise.Rule(H**-0.5, cap, window)

  def learn(slope: jax.Array, *read: jax.Array) -> list[np.ndarray]:
    """The value, and the slopes of what it is of."""

    def both(slope: jax.Array, *read: jax.Array) -> Any:
      value, back = jax.vjp(lambda *args: attention.causal(*args, rule, segment_RT=segment), *read)
      return [value, *back(slope)]

    return list(map(wide, jax.jit(both)(slope, *read)))

  learnt = learn(slope, *read)
  np.testing.assert_array_equal(learnt[0], wide(attention.causal(*read, rule, segment_RT=segment)))
  if not packed:
    for alone, among in zip(learn(*(x[1:2] for x in (slope, *read))), learnt):
      np.testing.assert_array_equal(alone, among[1:2])
  monkeypatch.setattr(cpu, "attends", lambda *_: False)
  for part, exact in zip(learnt, learn(*(x.astype(WIDE) for x in (slope, *read)))):
    np.testing.assert_allclose(part, exact, atol=2 * rounded(exact, dtype))


@pytest.mark.parametrize("dtype", BOTH)
def test_what_a_row_learns_is_spoilt_by_no_other(dtype, one_cpu):
  *read, slope = (normal(seed, 20, 16, 5, 32, dtype=dtype) for seed in range(4))
  read[0] = read[0].at[::2, 3].set(jnp.nan).at[:, 12:].set(jnp.nan)

  def learn(T: int) -> list[np.ndarray]:
    _, back = jax.vjp(lambda *args: attention.causal(*args, blockwise.Rule(0.2)), *(x[:, :T] for x in read))
    return list(map(wide, back(slope[:, :T])))

  assert all(np.isnan(learnt).any((1, 2, 3)).all() for learnt in learn(16))
  for learnt in learn(9):  # by threads that have just had those
    assert np.isnan(learnt[::2]).any() and np.isfinite(learnt[1::2]).all()


@pytest.mark.parametrize("dtype", BOTH)
def test_what_attention_gave_is_kept_where_products_are(dtype, one_cpu, capsys):
  query, key = normal(0, 1, 40, 10, 32, dtype=dtype), normal(1, 1, 40, 5, 32, dtype=dtype)
  read = jax.checkpoint(
    lambda query: jnp.sin(attention.causal(query, key, key, blockwise.Rule(0.2))), policy=model._KEPT["products"]
  )
  jax.ad_checkpoint.print_saved_residuals(read, query)
  assert f"named '{blockwise.ATTENDED}'" in capsys.readouterr().out


@needs_avx512
@pytest.mark.parametrize("window", [0, 50])
def test_what_a_text_reads_is_the_same_bits_wherever_it_lies(window, one_cpu):
  texts = [normal(i, 1, 700, 5, 32, dtype=WIDE) for i in range(3)]
  rule = blockwise.Rule(0.2, window=window)

  def read(before: int, after: int) -> np.ndarray:
    others = lambda x: jnp.concatenate([x[:, :before] + 1, x, x[:, :after] - 1], 1)
    segment = jnp.repeat(jnp.arange(3), jnp.array([before, 700, after]), total_repeat_length=before + 700 + after)
    return np.asarray(attention.causal(*map(others, texts), rule, segment_RT=segment[None]))[0, before : before + 700]

  alone = read(0, 0)
  for before, after in ((1, 0), (37, 5), (600, 64)):
    np.testing.assert_array_equal(read(before, after), alone)


@pytest.mark.parametrize(("N", "K", "H", "window", "cap"), [
  (9, 3, 64, 1000, 0.0), (7, 1, 32, 1000, 0.0), (4, 4, 256, 20, 0.0), (4, 2, 64, 9, 5.0), (6, 2, 96, 1000, 0.0),
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "kept"), PAIRS)
def test_pages_are_read_as_by_xla(N, K, H, window, cap, dtype, kept, one_cpu, monkeypatch):
  R, rng = 5, np.random.default_rng(0)
  query, key, value = (normal(seed, R, heads, H, dtype=dtype) for seed, heads in enumerate((N, K, K)))
  place = jnp.array([3, 40, 64, 0, 90], jnp.int32)  # one row sees no page

  def pool(S: int, G: int, P: int, first: np.ndarray, end: np.ndarray) -> Pool:
    """Pages in any order; row r reads those of its number // G, from its first page on."""
    owner, number = np.divmod(np.arange(P), P // -(-R // G))
    start = first[owner] + number * S
    reader = np.minimum(owner[:, None] * G + np.arange(G), R - 1)
    entry = [[r % G + G * p for p in range(P) if owner[p] == r // G] for r in range(R)]
    order = rng.permuted(np.array(entry), axis=1)
    keys = normal(S, P, K, H, S, dtype=kept), normal(S + 1, P, K, S, H, dtype=kept)
    ints = [jnp.asarray(x, jnp.int32) for x in (reader, start, end[owner], np.where(order % 7 == 6, -1, order))]
    return Pool(*keys, Index(*ints))

  prompts = pool(48, 2, 6, np.array([0, 0, 0]), np.array([3, 40, 9]))
  own = pool(16, 1, 20, np.array([3, 3, 40, 9, 9]), np.asarray(place))
  rule = blockwise.Rule(H**-0.5, cap)
  args = (query, key, value, place, [prompts, own], rule, jnp.int32(window))
  assert cpu.reads(query, [pool[:2] for pool in args[4]])
  read = wide(attention.paged(*args))
  spoilt = wide(attention.paged(query.at[1, 0, 3].set(jnp.nan), *args[1:]))
  assert np.isnan(spoilt[1, 0]).all()
  np.testing.assert_array_equal(np.delete(spoilt, 1, 0), np.delete(read, 1, 0))
  monkeypatch.setattr(cpu, "reads", lambda *_: False)
  widened = [
    part._replace(key_PKHS=part.key_PKHS.astype(WIDE), value_PKSH=part.value_PKSH.astype(WIDE)) for part in args[4]
  ]
  expected = wide(attention.paged(*(x.astype(WIDE) for x in args[:3]), place, widened, *args[5:]))
  np.testing.assert_allclose(read, expected, atol=rounded(expected, dtype))


@needs_avx512
@pytest.mark.parametrize("choice", [
  (1, 1, 0, 0), (1, 0.9, 0, 0), (0.7, 0.9, 50, 0), (1.3, 1, 20, 0), (1, 1, 0, 0.05), (0, 1, 0, 0), (1, 0.5, 7, 0.1),
  (1, 0, 0, 0),
])  # fmt: skip
def test_tokens_lie_at_their_quantiles_of_the_density_that_they_are_scored_by(choice, one_cpu):
  logits = 4 * normal(0, 300, 4112, dtype=WIDE)
  logits = logits.at[0, jnp.array([9, 7])].set(logits.max() + 1).at[1, :40].set(-jnp.inf)
  uniform = jax.random.uniform(jax.random.key(1), (300,)).at[2].set(0).at[3].set(1 - 2**-24)
  assert cpu.draws(normal(0, 300, 160, dtype=WIDE), 4112)
  live = jnp.arange(300) != 5
  token, behaviour, plain = map(
    np.asarray, cpu.draw(logits.at[6, 77].set(jnp.nan), scoring.Choice(*choice), uniform, live)
  )
  assert token[5] == 0 and np.isnan(behaviour[6]) and np.isnan(plain[6])
  token, behaviour, plain = map(np.asarray, cpu.draw(logits, scoring.Choice(*choice), uniform, live | True))
  density = np.asarray(scoring.behaviour_weight(logits, scoring.Choice(*choice)), np.float64)
  density /= density.sum(-1, keepdims=True)
  own = density[np.arange(300), token]
  before = np.cumsum(density, -1)[np.arange(300), token] - own
  assert (own > 0).all() and len(set(token.tolist())) > 100
  assert (before - 1e-6 <= uniform).all() and (uniform <= before + own + 1e-6).all()
  np.testing.assert_allclose(behaviour, np.log(own), atol=1e-5)
  np.testing.assert_allclose(plain, scoring.plain_logprob(logits, token), atol=1e-5)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_generation_by_kernels_says_what_xla_s_float32_says_in_any_slots(dtype, one_cpu, monkeypatch):
  config = ModelConfig(
    vocab=256, width=160, layers=2, heads=10, kv_heads=5, head_size=32, feed_forward=192, tied=True, max_positions=256
  )
  params, rng = layers.unstack(config, architecture.init(config, jax.random.key(0))), np.random.default_rng(0)
  prompts = [rng.integers(0, 256, length).tolist() for length in (5, 40, 17, 33, 64, 9)]
  mesh, never = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]), np.zeros((2, 256), np.int16)

  def drawn(slots: int):
    how = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 20, "prompt_buckets": (64,), "slots": slots}
    engine = Engine(config, Sampling(**how), mesh, sharding.LOCAL, jnp.dtype(dtype), "auto", never)
    generator = Generator((matrices.cast(params, dtype),))
    return engine.generate(Load(generator, prompts, np.arange(6, dtype=np.uint32), 2, jax.random.key(1)))

  jax.clear_caches()  # of traces of the kernels, which are to be seen
  called, call = set(), jax.ffi.ffi_call
  monkeypatch.setattr(jax.ffi, "ffi_call", lambda name, *args, **how: called.add(name) or call(name, *args, **how))
  few, many = drawn(4), drawn(12)
  assert called == {cpu._target(name) for name in cpu._KERNELS if name != "causal_slopes"}
  np.testing.assert_array_equal(few.tokens_RT, many.tokens_RT)
  np.testing.assert_array_equal(few.plain_logprob_RT, many.plain_logprob_RT)
  monkeypatch.setattr(cpu, "there", lambda dtype: False)
  for r, tokens in enumerate(many.tokens_RT):
    row = jnp.array([*prompts[r // 2], *tokens])[None]
    mask = jnp.arange(row.shape[1])[None] >= len(prompts[r // 2])
    stacked = architecture.init(config, jax.random.key(0))
    scored = np.asarray(scoring.score(config, stacked, row, mask))[np.asarray(mask)]
    np.testing.assert_allclose(many.plain_logprob_RT[r], scored, atol=0.1 if dtype == NARROW else 1e-4)


@pytest.mark.parametrize("dtype", BOTH)
def test_what_is_not_a_number_stays_so_and_spoils_no_other_segment(dtype, one_cpu):
  query, key, value = (normal(seed, 1, 40, heads, 32, dtype=dtype) for seed, heads in enumerate((6, 2, 2)))
  segment, rule = (jnp.arange(40) // 20)[None], blockwise.Rule(0.2)
  fine = wide(attention.causal(query, key, value, rule, segment_RT=segment))
  spoilt = wide(attention.causal(query, key.at[0, 5].set(jnp.nan), value, rule, segment_RT=segment))
  assert np.isnan(spoilt[0, 5:20]).all()
  np.testing.assert_array_equal(np.delete(spoilt[0], slice(5, 20), 0), np.delete(fine[0], slice(5, 20), 0))


@needs_amx
def test_a_gradient_through_the_kernels_is_float32_s_rounded(one_cpu):
  x, cotangent = normal(0, 40, 64), normal(2, 40, 96)
  for contracted, matrix in ((0, normal(1, 64, 96)), (1, normal(1, 96, 64))):
    _, back = jax.vjp(lambda x, matrix, c=contracted: matrices.multiply(x, matrix, c), x, matrix)
    plain = wide(matrix) if contracted else wide(matrix).T
    for slope, expected in zip(back(cotangent), (wide(cotangent) @ plain, wide(cotangent).T @ wide(x))):
      expected = expected if slope.shape == expected.shape else expected.T
      np.testing.assert_allclose(wide(slope), expected, atol=rounded(expected))


@needs_amx
def test_what_stands_in_for_a_function_has_its_gradients(one_cpu):
  x, scale, turn = normal(0, 2, 6, 3, 32), normal(1, 32), rotary.Turn(*normal(2, 2, 2, 6, 1, 16, dtype=WIDE))
  functions = [
    (lambda x, scale: model.rms_norm(x, scale, 1e-5), (x, scale)),
    (rotary.rotate, (x, turn)),
  ]
  for f, args in functions:
    value, back = jax.vjp(f, *args)
    np.testing.assert_array_equal(wide(value), wide(f(*args)))
    _, expected = jax.vjp(f, *jax.tree.map(lambda x: x.astype(WIDE), args))
    for slope, exact in zip(jax.tree.leaves(back(x)), jax.tree.leaves(expected(x.astype(WIDE)))):
      np.testing.assert_allclose(wide(slope), wide(exact), atol=4 * rounded(wide(exact)))


@pytest.mark.parametrize(("platform", "called"), [("cpu", set(cpu._KERNELS)), ("cuda", set()), ("tpu", set())])
@pytest.mark.parametrize("dtype", BOTH)
def test_programs_for_other_platforms_have_no_kernel_of_this_one(platform, called, dtype, one_cpu):
  """As plans for machines that are not there lower them."""
  config, one = ModelConfig(256, 160, 1, 5, 5, 32, 160, True, max_positions=256), jnp.ones(2)
  some = functools.partial(normal, dtype=dtype)
  x, matrix, scale = some(0, 2, 160), matrices.Transposed(some(1, 160, 160)), some(6, 160)
  query, key, segment = some(2, 1, 32, 5, 32), some(3, 1, 32, 5, 32), jnp.zeros((1, 32), jnp.int32)
  zeros, cache = jnp.zeros((2, 1), jnp.int32), Cache(some(4, 2, 5, 32, 16), some(5, 2, 5, 16, 32))
  pool, rule = Pool(*cache, Index(zeros, zeros[:, 0], zeros[:, 0], zeros)), blockwise.Rule(1)

  def everything(x, query, key):
    new, turn = (query[0, :2], key[0, :2], key[0, :2]), rotary.Turn(*[jnp.ones((1, 32, 1, 16))] * 2)
    rows = Rows((x,), jax.random.split(jax.random.key(0), 2), *[zeros[:, 0]] * 4, one > 0)
    params = {"embed": some(7, 256, 160)}
    return (
      model.rms_norm(x, scale, 1e-5),
      rotary.rotate(query, turn),
      feed_forward.feed_forward(
        config, sharding.LOCAL, dict.fromkeys(("gate", "up", "down"), matrix), x[:, None], x[:, None]
      ),
      jax.grad(lambda query: jnp.sum(attention.causal(query, key, key, rule, segment_RT=segment)).astype(WIDE))(query),
      attention.paged(*new, zeros[:, 0], [pool], rule, jnp.int32(9)),
      caches.write((cache,), (Kept(key[:, :2].swapaxes(0, 1), key[:, :2].swapaxes(0, 1)),), zeros[:, 0], zeros[:, 0]),
      sampler._draw_next(config, [Member(params, None, (), ())], one[:1], rows, scoring.Choice(), jnp.zeros((2, 256))),
    )

  text = jax.jit(everything).trace(x, query, key).lower(lowering_platforms=(platform,)).as_text()
  assert {name for name in cpu._KERNELS if cpu._target(name) in text} == called


def test_what_kernels_cannot_do_is_left_to_xla(one_cpu):
  odd, fine = normal(0, 4, 64), normal(1, 32, 64)
  assert not cpu.multiplies(odd, normal(1, 33, 64)) and not cpu.multiplies(odd.astype(WIDE), fine)
  assert not cpu.attends(normal(0, 1, 4, 2, 48)) and not cpu.attends(normal(0, 1, 4, 2, 512))
  narrow = (normal(0, 3, 2, 64, 8), normal(0, 3, 2, 8, 64))
  assert not cpu.reads(normal(0, 4, 2, 64), [narrow]) and not cpu.draws(odd, 1001)
  product = matrices.multiply(odd, normal(1, 33, 64), 1)
  assert product.shape == (4, 33)


@needs_avx512
def test_short_rows_of_float32_and_those_of_two_kinds_are_left_to_xla(one_cpu):
  some = lambda *shape: normal(0, *shape, dtype=WIDE)
  long, short = some(4, 160), some(4, 128)
  assert cpu.multiplies(long, some(32, 160)) and not cpu.multiplies(short, some(32, 128))
  assert not cpu.multiplies(long, normal(0, 32, 160)) and not cpu.multiplies(normal(0, 4, 160), some(32, 160))
  np.testing.assert_allclose(
    wide(matrices.multiply(long, some(32, 160), 1, NARROW)), wide(long) @ wide(some(32, 160)).T, rtol=2**-8
  )
  assert cpu.draws(long, 256) and not cpu.draws(short, 256)
  assert cpu.normalises(long, long[0]) and not cpu.normalises(short, short[0])
  assert cpu.rotates(some(1, 3, 5, 32), 16) and not cpu.rotates(some(1, 3, 4, 32), 16)
  pool = some(2, 5, 32, 16), some(2, 5, 16, 32)
  assert cpu.reads(some(4, 5, 32), [pool]) and not cpu.reads(some(4, 4, 32), [pool])
  assert not cpu.reads(some(4, 5, 32), [tuple(x.astype(NARROW) for x in pool)])
  assert not cpu.reads(some(4, 5, 32), [pool], some(4, 5, 32), normal(0, 4, 5, 32))
  assert cpu.attends(some(1, 3, 5, 32)) and not cpu.attends(some(1, 3, 5, 32), normal(0, 1, 3, 5, 32))
  assert not cpu.writes((pool,), (some(2, 1, 5, 32), normal(0, 2, 1, 5, 32)))
  assert cpu.writes((pool,), some(2, 1, 5, 32)) and not cpu.writes((pool,), some(2, 1, 4, 32))
  assert not cpu.writes((tuple(x.astype(NARROW) for x in pool),), some(2, 1, 5, 32))
  int8 = caches.narrow(Cache(*pool))
  assert not cpu.writes((int8,), some(2, 1, 5, 32)) and not cpu.reads(some(4, 5, 32), [int8])


@needs_avx512
def test_a_processor_without_amx_has_the_kernels_of_float32(monkeypatch):
  monkeypatch.setattr(cpu, "_processor", lambda: cpu._NEEDED)
  assert cpu.loaded.__wrapped__() == {jnp.dtype(WIDE)}
  monkeypatch.setattr(cpu, "_processor", lambda: cpu._NEEDED_BY_NARROW)
  assert cpu.loaded.__wrapped__() == set()


@needs_avx512
def test_what_learns_in_float32_is_xla_s(one_cpu, monkeypatch):
  x, scale, cotangent = (normal(i, *shape, dtype=WIDE) for i, shape in enumerate(((40, 160), (160,), (40, 96))))
  matrix = normal(3, 96, 160, dtype=WIDE)
  f = lambda x, scale, matrix: matrices.multiply(model.rms_norm(x, scale, 1e-5), matrix, 1)

  def learnt():
    value, back = jax.jit(lambda *args: jax.vjp(f, *args))(x, scale, matrix)
    return value, back(cotangent)

  ours, frozen = learnt(), jax.jit(f)(x, scale, matrix)
  monkeypatch.setattr(cpu, "there", lambda dtype: False)
  jax.clear_caches()
  jax.tree.map(np.testing.assert_array_equal, ours, learnt())
  assert (np.asarray(frozen) != ours[0]).any()  # by kernels, whose sums are in another order


@needs_amx
def test_an_activation_that_the_kernel_does_not_know_is_xla_s(one_cpu, monkeypatch):
  monkeypatch.setitem(feed_forward._ACTIVATIONS, "relu", jax.nn.relu)
  config = ModelConfig(
    vocab=64, width=32, layers=1, heads=1, kv_heads=1, head_size=32, feed_forward=64, tied=True, activation="relu"
  )
  gate, up, down = normal(1, 64, 32), normal(2, 64, 32), normal(3, 32, 64)
  layer = {"gate": matrices.Transposed(gate), "up": matrices.Transposed(up), "down": matrices.Transposed(down)}
  x = normal(0, 1, 5, 32)
  expected = (np.maximum(wide(x) @ wide(gate).T, 0) * (wide(x) @ wide(up).T)) @ wide(down).T
  np.testing.assert_allclose(
    wide(feed_forward.feed_forward(config, sharding.LOCAL, layer, x)), expected, atol=4 * rounded(expected)
  )


@needs_amx
def test_a_library_that_does_not_load_is_compiled_anew(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(cpu, "_FLAGS", "-shared -fPIC -x c")  # of a smaller one
  monkeypatch.setattr(cpu, "_SOURCES", tmp_path / "cpp")
  cpu._SOURCES.mkdir()
  (cpu._SOURCES / "cpu.cc").write_text("int answer() { return 42; }\n")
  library = cpu._place([COMPILER])
  library.parent.mkdir()
  library.write_bytes(b"of another machine")
  assert cpu._library([COMPILER]).answer() == 42


def test_several_devices_are_left_to_xla():
  assert jax.device_count() == 8 and not cpu.there(WIDE)


@pytest.mark.parametrize(
  ("compiler", "said"), [("false", "kernels for CPUs cannot be compiled"), ("/no/such/compiler", "cannot be compiled")]
)
def test_without_a_compiler_that_works_all_is_xla_s(compiler, said, tmp_path):
  script = """
import logging, jax.numpy as jnp
logging.basicConfig()
from advgame_jax import cpu, matrices
cpu._processor = lambda: cpu._NEEDED | cpu._NEEDED_BY_NARROW
x, matrix = jnp.ones((2, 32), jnp.bfloat16), jnp.ones((64, 32), jnp.bfloat16)
print(cpu.there(x.dtype), matrices.multiply(x, matrix, 1)[0, 0])
"""
  alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment = alone | {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
  run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
  assert run.stdout.split() == ["False", "32"] and said in run.stderr

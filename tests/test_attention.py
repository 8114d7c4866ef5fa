"""Attention to segments and to pages against one float64 softmax, and at the edge of what a mask can hide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import attention
from advgame_jax.attention import Index, Pool, Segment

R, T, N, K, H = 4, 3, 6, 2, 8
RULE = attention.Rule(H**-0.5)
attend = jax.jit(functools.partial(attention.attend, rule=RULE))


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return lambda *shape: rng.normal(size=shape).astype(np.float32)


def segment(normal, Q, S, seed=0, of_rows=False):
  mask_QgTS = np.random.default_rng(seed).random((Q, R // Q if of_rows else 1, T, S)) < 0.6
  mask_QgTS[..., 0] = True
  return Segment(normal(Q, K, H, S), normal(Q, K, S, H), mask_QgTS)


def repeat(part):
  """The segment with each group's keys written out for each of its rows."""
  Q = len(part.mask_QgTS)
  mask_RTS = np.broadcast_to(part.mask_QgTS, (Q, R // Q, *part.mask_QgTS.shape[2:])).reshape(R, 1, T, -1)
  return Segment(*(np.repeat(x, R // Q, 0) for x in part[:2]), mask_RTS)


def reference(query_RTNH, segments):
  key, value, mask = (np.concatenate([repeat(part)[i] for part in segments], axis) for i, axis in enumerate((3, 2, 3)))
  return tiny.attention(query_RTNH, key.swapaxes(2, 3), value, mask[:, 0])


@pytest.mark.parametrize("of_rows", [False, True], ids=["mask_of_groups", "mask_of_rows"])
@pytest.mark.parametrize("groups", [[R], [1], [2, R], [1, 2, R]], ids=str)
def test_equals_one_softmax_over_all_segments_in_float64(groups, of_rows):
  normal = draw(1)
  query_RTNH = normal(R, T, N, H)
  segments = [segment(normal, Q, 3 + i, seed=i, of_rows=of_rows) for i, Q in enumerate(groups)]
  np.testing.assert_allclose(attend(query_RTNH, segments), reference(query_RTNH, segments), atol=2e-6)


def test_scale_and_softcap_are_the_rules():
  normal = draw(7)
  query_RTNH, part = normal(R, T, N, H), segment(normal, R, 5)
  scaled = attention.attend(query_RTNH, [part], attention.Rule(0.1))
  np.testing.assert_allclose(scaled, attend(query_RTNH * 0.1 * H**0.5, [part]), atol=1e-6)
  key_QKHS = np.zeros_like(part.key_QKHS)  # one slot's logit is 30 and is capped to 2·tanh(15) = 2, the others' are 0
  key_QKHS[..., 0, 0] = 30
  part = part._replace(key_QKHS=key_QKHS, mask_QgTS=np.ones_like(part.mask_QgTS))
  output = attention.attend(np.ones((R, T, N, H), np.float32), [part], attention.Rule(1.0, softcap=2.0))
  weight_S = np.array([np.e**2, 1, 1, 1, 1]) / (np.e**2 + 4)
  expected_QKH = np.einsum("s,qksh->qkh", weight_S, part.value_QKSH)
  np.testing.assert_allclose(output[:, 0, ::3], expected_QKH, atol=1e-6)


def test_several_segments_equal_their_concatenation():
  normal = draw(2)
  query_RTNH = normal(R, T, N, H)
  one, other = segment(normal, R, 4, seed=1), segment(normal, R, 5, seed=2)
  joined = Segment(*(np.concatenate(pair, axis) for *pair, axis in zip(one, other, (3, 2, 3))))
  np.testing.assert_allclose(attend(query_RTNH, [one, other]), attend(query_RTNH, [joined]), atol=1e-6)


def test_a_shared_segment_equals_its_repetition():
  normal = draw(3)
  query_RTNH = normal(R, T, N, H)
  shared = segment(normal, 2, 5)
  np.testing.assert_allclose(attend(query_RTNH, [shared]), attend(query_RTNH, [repeat(shared)]), atol=1e-6)


def test_large_logits_do_not_overflow():
  normal = draw(4)
  query_RTNH, small, large = normal(R, T, N, H), segment(normal, 2, 5), segment(normal, R, 5)
  large = large._replace(key_QKHS=300 * large.key_QKHS)
  for segments in ([small, large], [large, small]):
    np.testing.assert_allclose(attend(query_RTNH, segments), reference(query_RTNH, segments), atol=1e-4)


def test_rows_that_see_nothing_stay_finite_and_touch_no_other():
  normal = draw(5)
  query_RTNH, part = normal(R, T, N, H), segment(normal, R, 5)
  blind = part._replace(mask_QgTS=part.mask_QgTS & (np.arange(R) != 1)[:, None, None, None])
  output = np.asarray(attend(query_RTNH, [blind]))
  assert np.isfinite(output).all()
  np.testing.assert_array_equal(np.delete(output, 1, 0), np.delete(attend(query_RTNH, [part]), 1, 0))


def test_gradients_are_finite_and_zero_where_masked():
  normal = draw(6)
  query_RTNH, part = normal(R, T, N, H), segment(normal, R, 5)
  mask_QgTS = np.array(part.mask_QgTS)
  mask_QgTS[1] = False
  mask_QgTS[..., 3] = False

  def loss(query_RTNH, key, value):
    output = attention.attend(query_RTNH, [Segment(key, value, mask_QgTS)], RULE)
    return jnp.sum(jnp.where(mask_QgTS[:, 0].any(-1)[..., None, None], output, 0) ** 2)

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(query_RTNH, part.key_QKHS, part.value_QKSH)
  assert all(np.isfinite(g).all() for g in gradients)
  for g_QKSH in (gradients[1].swapaxes(2, 3), gradients[2]):
    np.testing.assert_array_equal(g_QKSH[:, :, 3], 0)
    assert np.abs(g_QKSH[0, :, 0]).max() > 0


# Pages.


def pooled(rng, texts, readers, page, spare=2, shuffle=True):
  """Texts of keys and values cut into pages of a pool, in any order, with pages of rubbish; row r reads `readers[r]`.

  texts: (first place, keys [S, K, H], values) of each.
  """
  pages = [(t, first + j, key[j : j + page], value[j : j + page]) for t, (first, key, value) in enumerate(texts)
           for j in range(0, len(key), page)]  # fmt: skip
  P, G = len(pages) + spare, max(sum(text == t for text in readers) for t in range(len(texts)))
  where = rng.permutation(P)[: len(pages)] if shuffle else np.arange(len(pages))
  key_PKSH, value_PKSH = (rng.normal(size=(P, K, page, H)).astype(np.float32) for _ in range(2))
  index = Index(
    reader_PG=rng.integers(0, len(readers), (P, G)).astype(np.int32),
    start_P=rng.integers(0, 9, P).astype(np.int32),
    end_P=rng.integers(0, 9, P).astype(np.int32),
    entry_RJ=np.full((len(readers), max(map(len, (t[1] for t in texts))) // page + 1), -1, np.int32),
  )
  for p, (t, start, key_SKH, value_SKH) in zip(where, pages):
    first, whole, _ = texts[t]
    key_PKSH[p, :, : len(key_SKH)], value_PKSH[p, :, : len(key_SKH)] = key_SKH.swapaxes(0, 1), value_SKH.swapaxes(0, 1)
    index.start_P[p], index.end_P[p] = start, first + len(whole)
    for g, r in enumerate(r for r, text in enumerate(readers) if text == t):
      index.reader_PG[p, g] = r
      index.entry_RJ[r, (start - first) // page] = g + G * p
  return Pool(key_PKSH.swapaxes(2, 3), value_PKSH, index)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("page", [1, 4, 8, 16])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_paged_attention_equals_one_softmax_over_what_each_row_reads(page, window, softcap):
  """Two pools: texts that two rows share, and each row's own after it; and the new token itself."""
  rng = np.random.default_rng(3)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  text = lambda first, length: (first, normal(length, K, H), normal(length, K, H))
  shared = [text(0, length) for length in (9, 4)]
  own = [text(len(shared[r // 2][1]), length) for r, length in enumerate((3, 6, 1, 0))]
  place_R = np.array([first + len(key) for first, key, _ in own], np.int32)
  query_RNH, key_RKH, value_RKH = normal(R, N, H), normal(R, K, H), normal(R, K, H)
  rule = attention.Rule(H**-0.5, softcap=softcap)
  pools = [pooled(rng, shared, [0, 0, 1, 1], page), pooled(rng, own, [0, 1, 2, 3], page)]
  far = jnp.int32(window or 2**30)
  output_RNH = jax.jit(functools.partial(attention.paged, rule=rule))(
    query_RNH, key_RKH, value_RKH, place_R, pools, window=far
  )
  for r in range(R):
    key, value = (
      np.concatenate([shared[r // 2][i], own[r][i], new[r][None]]) for i, new in ((1, key_RKH), (2, value_RKH))
    )
    seen = place_R[r] - np.arange(len(key)) < (window or 99)
    logits_NS = np.einsum("knh,skh->kns", query_RNH[r].reshape(K, N // K, H), key).reshape(N, -1) * rule.scale
    logits_NS = attention.softcap(logits_NS, softcap)
    weight_NS = np.exp(tiny.log_softmax(np.where(seen, logits_NS, -1e30)))
    expected_KnH = np.einsum("kns,skh->knh", weight_NS.reshape(K, N // K, -1), value)
    np.testing.assert_allclose(output_RNH[r], expected_KnH.reshape(N, H), atol=3e-6, err_msg=str(r))


@pytest.mark.parametrize("page", [4, 8])
def test_a_row_gets_the_same_bits_wherever_its_pages_lie(page):
  rng = np.random.default_rng(4)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  texts = [(0, normal(length, K, H), normal(length, K, H)) for length in (9, 4, 12, 7)]
  new = (normal(R, N, H), normal(R, K, H), normal(R, K, H), np.array([9, 4, 12, 7], np.int32))
  paged = jax.jit(functools.partial(attention.paged, rule=RULE, window=jnp.int32(99)))
  ordered, mixed = (
    paged(*new, [pooled(np.random.default_rng(seed), texts, range(4), page, shuffle=seed > 0)]) for seed in (0, 1)
  )
  np.testing.assert_array_equal(ordered, mixed)


def test_pages_wider_than_the_queries_are_read_as_they_are():
  """Of bfloat16's queries and float32's pages, as on a CPU, nothing of the pages is rounded."""
  rng = np.random.default_rng(6)
  texts = [(0, *rng.normal(size=(2, length, K, H)).astype(np.float32)) for length in (9, 4, 12, 7)]
  pool, place_R = pooled(rng, texts, range(4), 8), np.array([9, 4, 12, 7], np.int32)
  query_RKnH = jnp.asarray(rng.normal(size=(R, K, N // K, H)), jnp.bfloat16)
  read = functools.partial(attention.read_pages, place_R=place_R, pool=pool, rule=RULE, window=jnp.int32(99))
  for found, expected in zip(read(query_RKnH), read(query_RKnH.astype(jnp.float32))):
    np.testing.assert_array_equal(found, expected)

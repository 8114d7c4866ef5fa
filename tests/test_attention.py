"""Segmented attention against one float64 softmax, and at the edge of what a mask can hide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import attention
from advgame_jax.attention import Segment

R, T, N, K, H = 4, 3, 6, 2, 8
RULE = attention.Rule(H**-0.5)
attend = jax.jit(functools.partial(attention.attend, rule=RULE))


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return lambda *shape: rng.normal(size=shape).astype(np.float32)


def segment(normal, Q, S, seed=0, of_rows=False):
  mask_QgTS = np.random.default_rng(seed).random((Q, R // Q if of_rows else 1, T, S)) < 0.6
  mask_QgTS[..., 0] = True
  return Segment(normal(Q, K, S, H), normal(Q, K, S, H), mask_QgTS)


def repeat(part):
  """The segment with each group's keys written out for each of its rows."""
  Q = len(part.mask_QgTS)
  mask_RTS = np.broadcast_to(part.mask_QgTS, (Q, R // Q, *part.mask_QgTS.shape[2:])).reshape(R, 1, T, -1)
  return Segment(*(np.repeat(x, R // Q, 0) for x in part[:2]), mask_RTS)


def reference(query_RTNH, segments):
  key, value, mask = (np.concatenate([repeat(part)[i] for part in segments], axis) for i, axis in enumerate((2, 2, 3)))
  return tiny.attention(query_RTNH, key, value, mask[:, 0])


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
  key_QKSH = np.zeros_like(part.key_QKSH)  # one slot's logit is 30 and is capped to 2·tanh(15) = 2, the others' are 0
  key_QKSH[:, :, 0, 0] = 30
  part = part._replace(key_QKSH=key_QKSH, mask_QgTS=np.ones_like(part.mask_QgTS))
  output = attention.attend(np.ones((R, T, N, H), np.float32), [part], attention.Rule(1.0, softcap=2.0))
  weight_S = np.array([np.e**2, 1, 1, 1, 1]) / (np.e**2 + 4)
  expected_QKH = np.einsum("s,qksh->qkh", weight_S, part.value_QKSH)
  np.testing.assert_allclose(output[:, 0, ::3], expected_QKH, atol=1e-6)


def test_several_segments_equal_their_concatenation():
  normal = draw(2)
  query_RTNH = normal(R, T, N, H)
  one, other = segment(normal, R, 4, seed=1), segment(normal, R, 5, seed=2)
  joined = Segment(*(np.concatenate(pair, axis) for *pair, axis in zip(one, other, (2, 2, 3))))
  np.testing.assert_allclose(attend(query_RTNH, [one, other]), attend(query_RTNH, [joined]), atol=1e-6)


def test_a_shared_segment_equals_its_repetition():
  normal = draw(3)
  query_RTNH = normal(R, T, N, H)
  shared = segment(normal, 2, 5)
  np.testing.assert_allclose(attend(query_RTNH, [shared]), attend(query_RTNH, [repeat(shared)]), atol=1e-6)


def test_large_logits_do_not_overflow():
  normal = draw(4)
  query_RTNH, small, large = normal(R, T, N, H), segment(normal, 2, 5), segment(normal, R, 5)
  large = large._replace(key_QKSH=300 * large.key_QKSH)
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

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(query_RTNH, part.key_QKSH, part.value_QKSH)
  assert all(np.isfinite(g).all() for g in gradients)
  for g in gradients[1:]:
    np.testing.assert_array_equal(g[:, :, 3], 0)
    assert np.abs(g[0, :, 0]).max() > 0

"""The objectives against float64 loops and finite differences, and what masks must hide."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from advgame_jax import config as config_lib
from advgame_jax import losses

pytestmark = pytest.mark.usefixtures("compile_quickly")

P, T = 5, 5
PAIRS = [
  {"kind": kind, "mean_logprob": mean, "nll": nll, "entropy_bonus": entropy}
  for kind, mean, nll, entropy in itertools.product(["dpo", "ipo"], [False, True], [0.0, 0.3], [0.0, 0.2])
]
GRPO = [
  {"kind": "grpo", "normalisation": normalisation, "entropy_bonus": entropy, "importance_cap": 1.3}
  for normalisation, entropy in itertools.product(["token_sum", "token_mean", "sample_mean"], [0.0, 0.2])
]
SETTINGS = [config_lib.Loss(**{"beta": 0.2, **values}) for values in PAIRS + GRPO]
FEW = [SETTINGS[0], SETTINGS[15], *SETTINGS[-5::2]]
each = functools.partial(pytest.mark.parametrize, "settings", ids=lambda s: "-".join(map(str, vars(s).values())))


def draw(settings, P=P, seed=5):
  """A batch with two rows of weight 0, of GRPO's samples some more, and scores of the policy and the reference."""
  rng, C = np.random.default_rng(seed), 3 if settings.kind == "grpo" else 2
  batch = tiny.preference_batch(rng, P, C, T + 2)
  out_PC = np.tile(np.arange(P)[:, None] % 3 == 1, C)
  if settings.kind == "grpo":
    out_PC[0, 1] = out_PC[3, :2] = True
  batch = batch.replace(weight_PC=np.where(out_PC, 0, 1).astype(np.float32))
  near = lambda scale: (batch.behaviour_logprob_PCT + scale * rng.normal(size=(*batch.length_PC.shape, T))).astype("f4")
  return batch, near(0.5), near(0.5), rng.gamma(2.0, 1.0, near(0).shape).astype(np.float32)


def mask_of(batch):
  return np.arange(T) < batch.length_PC[..., None]


def loss(settings, batch, logprob_PCT, reference_PCT, entropy_PCT, total=None):
  total = losses.totals(batch) if total is None else total
  return losses.preference_loss(settings, batch, logprob_PCT, reference_PCT, entropy_PCT, total)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(settings, *arguments):
  """((loss, metrics), gradients by log-probability and entropy)."""
  f = lambda batch, logprob, reference, entropy: loss(settings, batch, logprob, reference, entropy)
  return jax.value_and_grad(f, (1, 3), has_aux=True)(*arguments)


def expected_loss(settings, batch, logprob_PCT, reference_PCT, entropy_PCT, detached_PCT):
  """By its definition, comparison by comparison in float64; `detached` stands where no gradient flows."""
  rows = np.flatnonzero(batch.weight_PC[:, 0])  # of pairs
  samples = [(p, c, mask_of(batch)[p, c]) for p, c in np.argwhere(batch.weight_PC)]
  tokens = sum(mask.sum() for _, _, mask in samples)
  total = -settings.entropy_bonus * sum(entropy_PCT[p, c][mask].sum() for p, c, mask in samples) / tokens
  if settings.kind == "grpo":
    for p, c, mask in samples:
      l, fixed = logprob_PCT[p, c][mask], detached_PCT[p, c][mask]
      weight = np.minimum(np.exp(fixed - batch.behaviour_logprob_PCT[p, c][mask]), settings.importance_cap)
      ratio = reference_PCT[p, c][mask] - l
      gain = np.exp(l - fixed) * batch.advantage_PC[p, c] * weight - settings.beta * (np.exp(ratio) - ratio - 1)
      divisor = {"token_sum": len(samples), "token_mean": tokens, "sample_mean": len(samples) * mask.sum()}
      total -= gain.sum() / divisor[settings.normalisation]
    return total
  for p in rows:
    mask_w, mask_l = mask_of(batch)[p]
    reduce = np.mean if settings.mean_logprob else np.sum
    delta_w = reduce((logprob_PCT - reference_PCT)[p, 0][mask_w])
    delta_l = reduce((logprob_PCT - reference_PCT)[p, 1][mask_l])
    if settings.kind == "dpo":
      total += np.log1p(np.exp(-settings.beta * (delta_w - delta_l))) / len(rows)
    else:
      total += (delta_w - delta_l - 1 / (2 * settings.beta)) ** 2 / len(rows)
    total -= settings.nll * np.mean(logprob_PCT[p, 0][mask_w]) / len(rows)
  return total


@each(argvalues=SETTINGS)
def test_value_and_gradient_equal_a_float64_reference(settings):
  batch, logprob, reference, entropy = draw(settings)
  (value, metrics), gradients = value_and_gradient(settings, batch, logprob, reference, entropy)
  wide = [x.astype(np.float64) for x in (logprob, reference, entropy)]
  exact = lambda logprob, entropy: expected_loss(settings, batch, logprob, wide[1], entropy, wide[0])
  np.testing.assert_allclose(value, exact(wide[0], wide[2]), rtol=1e-5)
  assert metrics["loss"] == value
  for index, gradient in zip((0, 2), gradients):
    differences = np.zeros(gradient.shape)
    for at in np.ndindex(gradient.shape):
      step = np.zeros(gradient.shape)
      step[at] = 1e-5
      up, down = ([w + s * step if i == index else w for i, w in enumerate(wide)] for s in (1, -1))
      differences[at] = (exact(up[0], up[2]) - exact(down[0], down[2])) / 2e-5
    np.testing.assert_allclose(gradient, differences, atol=2e-5 * max(1, np.abs(differences).max()))


def test_the_importance_weight_is_detached_and_capped():
  """On policy the gradient of the gain is −A; an undetached weight would double it. β k3 has none at its minimum."""
  logprob_PCT = jnp.array([[[-1.0, -2.0, -3.0]]])
  behaviour_PCT = logprob_PCT - jnp.array([0.0, np.log(1.5), np.log(7.0)])
  total = lambda l: jnp.sum(losses.grpo(l, logprob_PCT, behaviour_PCT, jnp.array([[3.0]]), beta=0.1, cap=2.0))
  np.testing.assert_allclose(jax.grad(total)(logprob_PCT)[0, 0], [-3, -4.5, -6], rtol=1e-6)


@each(argvalues=FEW)
def test_masked_equals_filtered(settings):
  arguments = draw(settings)
  keep = np.any(arguments[0].weight_PC > 0, axis=1)
  (value, metrics), gradients = value_and_gradient(settings, *arguments)
  (value_, metrics_), gradients_ = value_and_gradient(settings, *jax.tree.map(lambda x: x[keep], arguments))
  np.testing.assert_allclose(value, value_, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, metrics_)
  for a, b in zip(gradients, gradients_):
    np.testing.assert_allclose(a[keep], b, atol=1e-6)
    np.testing.assert_array_equal(a[~keep], 0)


@each(argvalues=[settings for settings in SETTINGS if settings.kind == "grpo"])
def test_nothing_depends_on_which_samples_share_a_row(settings):
  """Not the loss, no metric and no gradient; and samples without a weight may as well not be there."""
  arguments = draw(settings)
  live = np.flatnonzero(arguments[0].weight_PC)
  of_a_prompt = {"prompt_PS", "prompt_length_P"}

  def alone(name, x):
    return np.repeat(x, 3, 0)[live] if name in of_a_prompt else x.reshape(-1, 1, *x.shape[2:])[live]

  batch = arguments[0].replace(**{name: alone(name, x) for name, x in vars(arguments[0]).items()})
  (_, metrics), gradients = value_and_gradient(settings, *arguments)
  (_, metrics_), gradients_ = value_and_gradient(settings, batch, *(alone("", x) for x in arguments[1:]))
  assert metrics["comparisons"] == len(live)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, metrics_)
  for a, b in zip(gradients, gradients_):
    np.testing.assert_allclose(a.reshape(-1, 1, T)[live], b, atol=1e-6)


@each(argvalues=FEW)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_garbage_behind_masks_changes_nothing(settings, garbage):
  batch, *scores = draw(settings)
  live_PCT = mask_of(batch) & (batch.weight_PC > 0)[..., None]
  spoil = lambda x: np.where(live_PCT, x, np.float32(garbage))
  spoilt = batch.replace(
    tokens_PCT=np.where(live_PCT, batch.tokens_PCT, -1),
    behaviour_logprob_PCT=spoil(batch.behaviour_logprob_PCT),
    plain_logprob_PCT=spoil(batch.plain_logprob_PCT),
    advantage_PC=np.where(batch.weight_PC > 0, batch.advantage_PC, garbage).astype(np.float32),
  )
  clean = value_and_gradient(settings, batch, *scores)
  dirty = value_and_gradient(settings, spoilt, *map(spoil, scores))
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@each(argvalues=FEW)
def test_an_empty_batch_has_no_loss_and_no_gradient(settings):
  batch, *scores = draw(settings)
  empty = batch.replace(weight_PC=batch.weight_PC * 0)
  for x in jax.tree.leaves(value_and_gradient(settings, empty, *scores)):
    np.testing.assert_array_equal(x, 0)


@each(argvalues=FEW)
def test_micro_batches_sum_to_the_whole(settings):
  arguments = draw(settings, P=6)
  total = losses.totals(arguments[0])
  parts = [jax.tree.map(lambda x, i=i: x[i::3], arguments) for i in range(3)]
  summed = jax.tree.map(lambda *x: sum(x), *(loss(settings, *part, total=total)[1] for part in parts))
  whole = loss(settings, *arguments)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), summed, whole)


def test_metrics_of_pairs_mean_what_they_say():
  batch, logprob, reference, entropy = draw(SETTINGS[0])
  _, metrics = loss(SETTINGS[0], batch, logprob, reference, entropy)
  delta_PC = np.where(mask_of(batch), logprob.astype(np.float64) - reference, 0).sum(-1)[batch.weight_PC[:, 0] > 0]
  margin_P = delta_PC[:, 0] - delta_PC[:, 1]
  np.testing.assert_allclose(metrics["kl"], delta_PC.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["margin"], margin_P.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], (margin_P > 0).mean(), rtol=1e-6)


def test_importance_is_the_mean_weight_of_live_tokens():
  settings = SETTINGS[-1]
  batch, logprob, reference, entropy = draw(settings)
  _, metrics = loss(settings, batch, logprob, reference, entropy)
  live_PCT = np.asarray(losses.live_tokens(batch))
  expected = np.minimum(np.exp(logprob - batch.behaviour_logprob_PCT), 1.3)[live_PCT].mean()
  np.testing.assert_allclose(metrics["importance"], expected, rtol=1e-5)


def test_large_margins_do_not_overflow():
  delta_PC = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
  np.testing.assert_allclose(losses.dpo(delta_PC, 0.1), [0, 2e3])
  assert np.isfinite(jax.grad(lambda d: losses.dpo(d, 0.1).sum())(delta_PC)).all()

"""One contract for every implementation of causal attention: a float64 softmax, and autodiff of the plain form."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from advgame_jax import attention, blockwise, kernels, sharding
from advgame_jax.attention import Rule
from advgame_jax.types import UserError

R, T, N, K, H = 2, 37, 6, 2, 8
RULES = {
  "plain": Rule(H**-0.5),
  "softcap": Rule(H**-0.5, softcap=1.5),
  "window": Rule(H**-0.5, window=9),
  "window 1": Rule(H**-0.5, window=1),
  "window and softcap": Rule(0.5, softcap=2.0, window=20),
}
SPLASH = functools.partial(kernels.splash, interpret=True)
IMPLEMENTATIONS = {f"xla, block {b}": functools.partial(blockwise.causal, block=b) for b in (16, 64)}
IMPLEMENTATIONS["splash"] = SPLASH


def draw(seed=0, tokens=T, rows=R):
  rng = np.random.default_rng(seed)
  return [2 * rng.normal(size=(rows, tokens, heads, H)).astype(np.float32) for heads in (N, K, K)]


def packed(tokens=T):
  """Segments of several lengths, one crossing every block."""
  return np.stack([np.repeat([3, 1, 2], [5, tokens - 12, 7]), np.repeat([1, 2], [tokens - 20, 20])]).astype(np.int32)


def visible(rule, segment_RT, tokens=T):
  """[R, T, S], pair by pair as the rule is said."""
  window = rule.window or tokens
  return np.array(
    [
      [[s <= t < s + window and segment[s] == segment[t] for s in range(tokens)] for t in range(tokens)]
      for segment in segment_RT
    ]
  )


def reference(query, key, value, rule, mask_RTS):
  """Head by head in float64."""
  N = query.shape[2]
  output_RTNH = np.zeros(query.shape)
  for n in range(N):
    k = n // (N // key.shape[2])
    logits_RTS = rule.scale * np.einsum(
      "rth,rsh->rts", query[:, :, n].astype(np.float64), key[:, :, k].astype(np.float64)
    )
    if rule.softcap:
      logits_RTS = rule.softcap * np.tanh(logits_RTS / rule.softcap)
    output_RTNH[:, :, n] = np.exp(tiny.log_softmax(np.where(mask_RTS, logits_RTS, -1e300))) @ value[:, :, k]
  return output_RTNH


def plain(query, key, value, rule, mask_RTS):
  """The usual einsums, for autodiff."""
  key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], 2) for x in (key, value))
  logits = attention.softcap(rule.scale * jnp.einsum("rtnh,rsnh->rnts", query, key), rule.softcap)
  weight = jax.nn.softmax(jnp.where(mask_RTS[:, None], logits, -1e30), -1)
  return jnp.einsum("rnts,rsnh->rtnh", weight, value)


def output_and_gradients(f, parts, weight):
  def loss(*parts):
    output = f(*parts)
    return jnp.sum(weight * output.astype(jnp.float32)), output

  slopes, output = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*parts)
  return output, *slopes


def gradients(f, parts, weight):
  return output_and_gradients(f, parts, weight)[1:]


def assert_near(found, expected, relative):
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert np.abs(found - expected).max() <= relative * max(1, np.abs(expected).max())


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_equals_one_softmax_in_float64_with_the_gradients_of_the_plain_form(implementation, rule, packing):
  if implementation is SPLASH and (rule not in (RULES["plain"], RULES["window and softcap"])):
    pytest.skip("interpreted kernels are slow: the plainest and the fullest rule")
  parts, weight = draw(1), np.random.default_rng(2).normal(size=(R, T, N, H)).astype(np.float32)
  segment_RT = packed() if packing else None
  mask_RTS = visible(rule, packed() if packing else np.zeros((R, T), int))
  run = lambda *parts: implementation(*parts, rule, segment_RT)
  output, *slopes = output_and_gradients(run, parts, weight)
  assert_near(output, reference(*parts, rule, mask_RTS), 2e-6)
  for found, expected in zip(slopes, gradients(lambda *parts: plain(*parts, rule, mask_RTS), parts, weight)):
    assert_near(found, expected, 1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("rule", [RULES["plain"], RULES["window"]], ids=["plain", "window"])
def test_cudnn_equals_one_softmax_within_bfloat16(rule):
  parts = [jnp.asarray(x, jnp.bfloat16) for x in draw(1)]
  run = lambda *parts: attention.causal(*parts, rule, implementation="cudnn")
  mask_RTS = visible(rule, np.zeros((R, T), int))
  assert_near(jax.jit(run)(*parts), reference(*(np.asarray(x, np.float32) for x in parts), rule, mask_RTS), 1e-2)
  expected = gradients(lambda *parts: plain(*parts, rule, mask_RTS), [x.astype(jnp.float32) for x in parts], 1.0)
  for found, slope in zip(gradients(run, parts, 1.0), expected):
    assert_near(found, slope, 2e-2)


def test_bfloat16_stays_within_its_rounding():
  wide, weight = draw(3), np.random.default_rng(4).normal(size=(R, T, N, H)).astype(np.float32)
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in wide]
  rounded = [x.astype(jnp.float32) for x in narrow]
  run = functools.partial(blockwise.causal, rule=RULES["softcap"], block=16)
  output = jax.jit(run)(*narrow)
  assert output.dtype == jnp.bfloat16
  assert_near(output, jax.jit(run)(*rounded), 2**-7)
  for found, slope in zip(gradients(run, narrow, weight), gradients(run, rounded, weight)):
    assert found.dtype == jnp.bfloat16
    assert_near(found, slope, 2**-6)


@pytest.mark.parametrize("more", [1, 27, 100])
def test_extending_rows_on_the_right_changes_nothing(more):
  short, extension = draw(5), draw(6, more)
  long = [np.concatenate([a, 1e3 * b], 1) for a, b in zip(short, extension)]
  run = jax.jit(functools.partial(blockwise.causal, rule=RULES["window"], block=32))
  np.testing.assert_allclose(run(*long)[:, :T], run(*short), atol=2e-6)


def test_blocks_of_segments_that_are_apart_are_never_computed():
  segment_RT, (query, key, value) = np.repeat([[1, 2, 3, 4, 5]], [16, 48, 8, 8, 16], 1), draw(8, 96, 1)
  run = jax.jit(functools.partial(blockwise.causal, rule=RULES["plain"], block=16))
  for segment in range(1, 6):
    here = segment_RT[0] == segment
    nearby = np.repeat([here[i : i + 16].any() for i in range(0, here.size, 16)], 16)
    spoilt = np.where(nearby[None, :, None, None], value, np.nan)  # a weight of 0 times NaN would be NaN
    found = run(query, key, spoilt, segment_RT=segment_RT)[:, here]
    np.testing.assert_allclose(found, run(*(x[:, here] for x in (query, key, value))), atol=2e-6)


def test_rows_that_are_cut_at_other_places_see_all_of_their_own_segments():
  segment_RT = np.stack([np.repeat(np.arange(5), lengths) for lengths in ([16, 48, 8, 8, 10], [40, 16, 8, 8, 18])])
  parts, weight = draw(8, 90), np.random.default_rng(2).normal(size=(R, 90, N, H)).astype(np.float32)
  run = lambda *parts: blockwise.causal(*parts, RULES["plain"], segment_RT, block=16)
  mask_RTS = visible(RULES["plain"], segment_RT, 90)
  output, *slopes = output_and_gradients(run, parts, weight)
  assert_near(output, reference(*parts, RULES["plain"], mask_RTS), 2e-6)
  for found, expected in zip(slopes, gradients(lambda *parts: plain(*parts, RULES["plain"], mask_RTS), parts, weight)):
    assert_near(found, expected, 1e-5)


def test_a_packed_segment_equals_a_row_of_its_own():
  parts, segment_RT = draw(7), packed()
  run = functools.partial(blockwise.causal, rule=RULES["softcap"], block=16)
  alone = [x[:1, 5 : T - 7] for x in parts]
  np.testing.assert_allclose(run(*parts, segment_RT=segment_RT)[:1, 5 : T - 7], run(*alone), atol=2e-6)


def test_large_logits_do_not_overflow():
  query, key, value = draw(8)
  rule, mask_RTS = RULES["window"], visible(RULES["window"], np.zeros((R, T), int))
  run = functools.partial(blockwise.causal, rule=rule, block=16)
  assert_near(run(300 * query, key, value), reference(300 * query, key, value, rule, mask_RTS), 1e-4)
  assert all(np.isfinite(x).all() for x in gradients(run, (300 * query, key, value), 1.0))


def test_only_blocks_that_are_seen_are_computed():
  def steps(rule):
    run = lambda x: blockwise._over_pairs(rule, 16, 64, lambda parts, *_: parts, lambda i, _: ((i, 16),), (x,))
    jaxpr = jax.make_jaxpr(run)(np.zeros((1, 1, 64)))
    return next(e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan")

  assert steps(Rule(1.0)) == 10  # of 16
  assert steps(Rule(1.0, window=17)) == 7  # the diagonal and one before it
  assert steps(Rule(1.0, window=18)) == 9
  assert steps(Rule(1.0, window=2)) == 7


@pytest.mark.parametrize("tokens", [1, 64, 65, 257])
def test_the_block_that_suits_a_length_changes_nothing(tokens):
  parts, rule = draw(12, tokens, rows=1), RULES["softcap"]
  mask_RTS = np.tril(np.ones((1, tokens, tokens), bool))
  assert_near(jax.jit(functools.partial(blockwise.causal, rule=rule))(*parts), reference(*parts, rule, mask_RTS), 2e-6)


def test_eight_devices_give_what_one_gives_and_gather_nothing():
  mesh = tiny.mesh(data=4, tensor=2)
  parts, rule = draw(10, rows=4), RULES["plain"]
  spec = sharding.TRAIN.spec(("rows", None, "heads", None))
  run = jax.grad(lambda *parts: jnp.sum(blockwise.causal(*parts, rule, block=16) ** 2), (0, 1, 2))
  placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in parts]
  compiled = jax.jit(run).lower(*placed).compile()
  assert not re.findall("all-gather|all-to-all|all-reduce|collective-permute", compiled.as_text())
  for found, expected in zip(compiled(*placed), jax.jit(run)(*parts)):
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    assert_near(found, expected, 1e-5)


def test_splash_on_eight_devices_gives_what_one_gives():
  mesh = tiny.mesh(data=4, tensor=2)
  parts = draw(11, rows=4)
  with jax.set_mesh(mesh):
    found = jax.jit(functools.partial(SPLASH, rule=RULES["plain"], layout=sharding.TRAIN))(*parts)
  assert_near(found, blockwise.causal(*parts, RULES["plain"]), 2e-6)


def test_the_gradient_at_2048_tokens_holds_no_array_of_tokens_by_tokens():
  tokens = 2048
  parts = [jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.float32) for heads in (4, 2, 2)]

  def largest(f):
    run = jax.grad(lambda *parts: jnp.sum(f(*parts) ** 2), (0, 1, 2))
    text = jax.jit(run).lower(*parts).compile().as_text()
    return max(int(np.prod([int(d) for d in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", text))

  rule, mask_RTS = Rule(0.125), np.tril(np.ones((1, tokens, tokens), bool))
  assert largest(lambda *parts: plain(*parts, rule, mask_RTS)) == 4 * tokens**2  # what the search would find
  assert largest(lambda *parts: blockwise.causal(*parts, rule)) <= 4 * tokens * 64 * 2


def test_auto_takes_the_kernel_of_the_platform_where_it_can():
  rule, resolve = Rule(0.125), functools.partial(kernels.resolve, "auto", head_size=64)
  capped = dataclasses.replace(rule, softcap=50.0)
  assert resolve(rule, "cpu") == "xla"
  assert resolve(rule, "gpu") == "cudnn"
  assert resolve(dataclasses.replace(rule, window=512), "gpu") == "cudnn"
  assert resolve(capped, "tpu", packed=True) == "splash"
  assert resolve(capped, "gpu") == "xla"
  assert resolve(rule, "gpu", packed=True) == "xla"
  assert resolve(rule, "gpu", dtype=jnp.float32) == "xla"


@pytest.mark.parametrize(
  "name, rule, platform, more, sentence",
  [
    ("cudnn", Rule(1.0), "cpu", {}, "'cudnn' runs on gpu, not on cpu; 'auto' and 'xla' would work"),
    ("splash", Rule(1.0), "gpu", {}, "'splash' runs on tpu, not on gpu"),
    ("cudnn", Rule(1.0, softcap=50.0), "gpu", {}, "'cudnn' has no softcap, here 50"),
    ("cudnn", Rule(1.0), "gpu", {"packed": True}, "'cudnn' has no packed rows"),
    ("cudnn", Rule(1.0), "gpu", {"dtype": jnp.float32}, "in bfloat16 or float16, not in float32"),
    ("cudnn", Rule(1.0), "gpu", {"head_size": 256}, "at most 128 that 8 divides, not 256"),
    ("flash", Rule(1.0), "gpu", {}, "'flash'; allowed: one of 'auto', 'xla', 'cudnn', 'splash'"),
  ],
)
def test_what_a_kernel_cannot_do_is_refused_in_a_sentence(name, rule, platform, more, sentence):
  with pytest.raises(UserError, match=re.escape(sentence)):
    kernels.resolve(name, rule, platform, **({"head_size": 64} | more))


def test_a_named_kernel_is_refused_where_it_cannot_run():
  with pytest.raises(UserError, match="'splash' runs on tpu"):
    attention.causal(*draw(), RULES["plain"], implementation="splash")


@pytest.mark.parametrize("platform, runs", [("cpu", "xla"), ("gpu", "cudnn"), ("tpu", "splash")])
def test_causal_runs_what_is_resolved_for_the_backend(monkeypatch, platform, runs):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  for name, (module, function) in {
    "xla": (blockwise, "causal"),
    "cudnn": (kernels, "cudnn"),
    "splash": (kernels, "splash"),
  }.items():
    monkeypatch.setattr(module, function, lambda *_, name=name, **__: name)
  assert attention.causal(*(jnp.asarray(x, jnp.bfloat16) for x in draw()), RULES["plain"]) == runs


@pytest.mark.parametrize("head_size", [64, 128])
def test_splash_lowers_for_tpus_forward_and_backward(head_size):
  parts = [jax.ShapeDtypeStruct((2, 384, heads, head_size), jnp.bfloat16) for heads in (N, K, K)]
  rule, segment_RT = Rule(0.125, softcap=50.0, window=200), jnp.zeros((2, 384), jnp.int32)
  loss = lambda *parts: jnp.sum(kernels.splash(*parts, rule, segment_RT).astype(jnp.float32))
  lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*parts).lower(lowering_platforms=("tpu",))
  assert lowered.as_text().count("tpu_custom_call") >= 3  # forward, to queries, to keys and values

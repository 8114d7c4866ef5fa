"""From logits to log-probabilities, in chunks: no array of tokens × vocabulary beyond one chunk ever exists."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax import fork as forks
from advgame_jax import model, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Array, Params

Measure = Callable[[jax.Array, jax.Array], Any]
"""(logits_XV float32, token_X) → a pytree of [X]: what to keep of each token's logits."""


@jax.custom_vjp
def plain_logprob(logits_XV: jax.Array, token_X: jax.Array) -> jax.Array:
  """log softmax at the token, nats. Differentiable once, in reverse.

  The token's logit is summed out, not looked up: of a vocabulary that is split over devices each sums its own part.
  """
  return _plain_forward(logits_XV, token_X)[0]


def _plain_forward(logits_XV: jax.Array, token_X: jax.Array) -> tuple[jax.Array, Any]:
  highest_X = jnp.max(logits_XV, -1)
  weight_XV = jnp.exp(logits_XV - highest_X[:, None])
  logit_X, total_X = _sums(jnp.where(_chosen(logits_XV, token_X), logits_XV, 0), weight_XV)
  return logit_X - highest_X - jnp.log(total_X), (logits_XV, token_X, highest_X, total_X)


def _plain_backward(kept: Any, slope_X: jax.Array) -> tuple[jax.Array, None]:
  logits_XV, token_X, highest_X, total_X = kept
  density_XV = jnp.exp(logits_XV - highest_X[:, None]) / total_X[:, None]
  return slope_X[:, None] * (_chosen(logits_XV, token_X) - density_XV), None


plain_logprob.defvjp(_plain_forward, _plain_backward)


def _chosen(logits_XV: jax.Array, token_X: jax.Array) -> jax.Array:
  return jnp.arange(logits_XV.shape[-1]) == token_X[:, None]


def _sums(*parts_XV: jax.Array) -> list[jax.Array]:
  """Over the vocabulary, of several arrays in one pass → [X] of each.

  XLA's CPU backend adds whole vectors where it adds few of them: 16 here, then the rest. Of a vocabulary that is split
  over devices that would move the parts, and there it has been seen to wait for ever.
  """

  def folded(*parts_XV: jax.Array) -> list[jax.Array]:
    X, V = parts_XV[0].shape
    parts = tuple(jnp.pad(x_XV, ((0, 0), (0, -V % 16))).reshape(X, 16, -1) for x_XV in parts_XV)
    add: Any = lambda left, right: tuple(map(jnp.add, left, right))
    sums = jax.lax.reduce(parts, (jnp.float32(0),) * len(parts), add, (1,))
    # Else XLA would make one sum of these and the next, over all of the vocabulary and slow.
    return [jnp.sum(x_Xv, -1) for x_Xv in jax.lax.optimization_barrier(sums)]

  plain = lambda *parts_XV: [jnp.sum(x_XV, -1) for x_XV in parts_XV]
  if sharding.splits_vocab():
    return plain(*parts_XV)
  return jax.lax.platform_dependent(*parts_XV, cpu=folded, default=plain)


def logprob_and_entropy(logits_XV: jax.Array, token_X: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The plain log-probability and the entropy of the whole softmax, nats."""
  logprob_XV = jax.nn.log_softmax(logits_XV)
  return plain_logprob(logits_XV, token_X), -jnp.sum(jnp.exp(logprob_XV) * logprob_XV, -1)


class Choice(NamedTuple):
  """How a token is chosen from its logits; traced, so that another choice compiles nothing."""

  temperature: Any = 1.0  # 0 is greedy
  top_p: Any = 1.0  # mass of the nucleus; 1 keeps all
  top_k: Any = 0  # so many likeliest tokens; 0 keeps all
  min_p: Any = 0.0  # at least this share of the likeliest token's probability


def behaviour_logprob(choice: Choice) -> Measure:
  """A measure: the log-probability under the density that is drawn from."""

  def measure(logits_XV: jax.Array, token_X: jax.Array) -> jax.Array:
    density_XV = behaviour(logits_XV, choice)
    return jnp.log(jnp.take_along_axis(density_XV, token_X[:, None], 1)[:, 0])

  return measure


def behaviour(logits_XV: jax.Array, choice: Choice) -> jax.Array:
  """The density that is drawn from [X, V]: softmax at the temperature (0: the likeliest token alone), then cut.

  First to the `top_k` likeliest tokens, then to their nucleus, the smallest set of likeliest ones whose share of the
  mass is at least `top_p` (Holtzman et al. 1904.09751), then to those of at least `min_p` × the likeliest (2407.01082):
  transformers' order. All tokens that tie with the last one kept are kept.
  """
  weight_XV = behaviour_weight(logits_XV, choice)
  return weight_XV / jnp.sum(weight_XV, -1, keepdims=True)


def behaviour_weight(logits_XV: jax.Array, choice: Choice) -> jax.Array:
  """`behaviour` times what makes its greatest value 1: cheaper by some passes over the vocabulary.

  What costs is decided by the settings as they come; each decision gives a number a row, so that no branch copies the
  vocabulary.
  """
  X, V = logits_XV.shape
  temperature, top_p, top_k, min_p = (jnp.asarray(x, jnp.float32) for x in choice)
  soft, cuts = temperature > 0, (top_k > 0) | (top_p < 1) | (min_p > 0)
  highest_X1 = jnp.max(logits_XV, -1, keepdims=True)
  first = lambda: jnp.min(jnp.where(logits_XV == highest_X1, jnp.arange(V), V), -1, keepdims=True)
  first_X1 = jax.lax.cond(soft, lambda: jnp.zeros((X, 1), jnp.int32), first)
  heated_XV = jnp.exp((logits_XV - highest_X1) / jnp.where(soft, temperature, 1))
  weight_XV = jnp.where(soft, heated_XV, jnp.arange(V) == first_X1)
  threshold = lambda: _threshold(weight_XV, top_p, top_k, min_p)
  threshold_X1 = jax.lax.cond(soft & cuts, threshold, lambda: jnp.zeros((X, 1), jnp.float32))
  return jnp.where(weight_XV >= threshold_X1, weight_XV, 0)


def _threshold(weight_XV: jax.Array, top_p: jax.Array, top_k: jax.Array, min_p: jax.Array) -> jax.Array:
  """The least weight that is kept, [X, 1], of weights whose greatest is 1."""
  X = len(weight_XV)
  mass = lambda threshold_X1: jnp.where(weight_XV >= threshold_X1, weight_XV, 0)
  count = lambda threshold_X1: jnp.where(weight_XV >= threshold_X1, 1.0, 0)
  zeros_X1 = jnp.zeros((X, 1), jnp.float32)
  least_X1 = jax.lax.cond(top_k > 0, lambda: _largest(X, count, top_k), lambda: zeros_X1)
  left = lambda threshold_X1: mass(jnp.maximum(threshold_X1, least_X1))
  of_nucleus = lambda: _largest(X, left, top_p * _sums(left(zeros_X1))[0][:, None])
  # All three: in a nucleus of nearly everything, sums in another order may find no threshold.
  return jnp.maximum(jnp.maximum(jax.lax.cond(top_p < 1, of_nucleus, lambda: zeros_X1), least_X1), min_p)


def _largest(X: int, kept: Callable[[jax.Array], jax.Array], enough: jax.Array) -> jax.Array:
  """The largest threshold from 0 to 1, [X, 1], by which what is kept, [X, V], sums to at least `enough`; else 0.

  Found without a sort, two bits at a time: floats ≥ 0 are ordered as their bit patterns are, and 1.0 has 30 of them.
  Each pass over the vocabulary sums for three thresholds at once.
  """

  def try_digit(i: jax.Array, bits_X1: jax.Array) -> jax.Array:
    candidates = [bits_X1 | (digit << (28 - 2 * i)) for digit in (1, 2, 3)]
    thresholds = [jax.lax.bitcast_convert_type(candidate_X1, jnp.float32) for candidate_X1 in candidates]
    sums = _sums(*map(kept, thresholds))
    for candidate_X1, sum_X in zip(candidates, sums):
      bits_X1 = jnp.where(sum_X[:, None] >= enough, candidate_X1, bits_X1)
    return bits_X1

  bits_X1 = jax.lax.fori_loop(0, 15, try_digit, jnp.zeros((X, 1), jnp.int32))
  return jnp.minimum(jax.lax.bitcast_convert_type(bits_X1, jnp.float32), 1)  # all bits are set where `enough` is 0


class Generator(NamedTuple):
  """The weights that tokens are drawn from: a model's, or several's.

  Of several, the density at temperature 1 is the normalised geometric mean of theirs, weighted by `share`: Nash-MD's
  mixture of a policy and its reference (2312.00886).
  """

  members: tuple[Params, ...]
  share: tuple[Any, ...] = (1.0,)  # sum 1


def mixed_logits(config: ModelConfig, generator: Generator, hidden: Sequence[jax.Array]) -> jax.Array:
  """Logits of the generator's density, float32, from each member's hidden states."""
  parts = (model.logits(config, params, each) for params, each in zip(generator.members, hidden))
  if len(generator.members) == 1:
    return next(parts)
  return functools.reduce(jnp.add, (share * part for share, part in zip(generator.share, parts)))


def score(config: ModelConfig, params: Params, tokens_RT: jax.Array, mask_RT: jax.Array, *args: Any, **how: Any) -> Any:
  """`score_generator` of one model's weights."""
  return score_generator(config, Generator((params,)), tokens_RT, mask_RT, *args, **how)


def score_generator(
  config: ModelConfig,
  generator: Generator,
  tokens_RT: jax.Array,
  mask_RT: jax.Array,
  measure: Measure = plain_logprob,
  *,
  chunk: int = 1024,
  dtype: Any = jnp.float32,
  layout: Layout = LOCAL,
  remat: str = "none",
  kernel: str = "auto",
) -> Any:
  """A measure of each masked token given those before it → pytree of [R, T], 0 outside the mask.

  Logits exist for about `chunk` tokens at a time, in the backward pass too; stretches without a masked token, prompts
  and padding, cost no head at all.

  Args:
    tokens_RT: whole rows, padded on the right.
    mask_RT: bool, the tokens to measure; the first of a row cannot be.
  """
  forward = functools.partial(model.forward, config, dtype=dtype, layout=layout, remat=remat, kernel=kernel)
  hidden = [forward(params, tokens_RT)[0] for params in generator.members]
  to_next = lambda x_RT: jnp.pad(x_RT[:, 1:], ((0, 0), (0, 1)))  # position t says something of token t + 1
  measured = _measure(config, generator, hidden, to_next(tokens_RT), to_next(mask_RT), measure, chunk, layout)
  return jax.tree.map(lambda x_RT: jnp.pad(x_RT[:, :-1], ((0, 0), (1, 0))), measured)


def score_completions(
  config: ModelConfig,
  params: Params,
  prompt_PS: Array,
  prompt_length_P: Array,
  tokens_PCT: Array,
  mask_PCT: jax.Array,
  measure: Measure = plain_logprob,
  chunk: int = 1024,
  layout: Layout = LOCAL,
  **how: Any,
) -> Any:
  """`score` of the completions of each prompt, whose own tokens are computed once → pytree of [P, C, T].

  Args:
    prompt_PS: padded on the left.
    prompt_length_P: int32, tokens.
    tokens_PCT: padded on the right.
    mask_PCT: bool, the tokens to measure.
    how: of `model.forward`, as `score_generator` gives it.
  """
  fork, tokens_PX = forks.join(prompt_PS, prompt_length_P, tokens_PCT)
  tokens_PX = layout.constrain(tokens_PX, "rows", "tokens")
  hidden_PXM, _ = model.forward(config, params, tokens_PX, layout=layout, place_RT=fork.place_PX, fork=fork, **how)
  hidden_RTM = layout.constrain(fork.in_front(hidden_PXM), "rows", "tokens", None)
  rows = lambda x_PCT: x_PCT.reshape(-1, x_PCT.shape[-1])
  measured = _measure(
    config, Generator((params,)), [hidden_RTM], rows(tokens_PCT), rows(mask_PCT), measure, chunk, layout
  )
  return jax.tree.map(lambda x_RT: x_RT.reshape(tokens_PCT.shape), measured)


def _measure(
  config: ModelConfig,
  generator: Generator,
  hidden: Sequence[jax.Array],
  token_RT: jax.Array,
  mask_RT: jax.Array,
  measure: Measure,
  chunk: int,
  layout: Layout,
) -> Any:
  """A measure of the masked of these tokens, of each of which the members' hidden states say something."""
  heads = [model.head(params).astype(hidden[0].dtype) for params in generator.members]
  by_rows, by_width = layout.by_hand.spec(("rows", "tokens")), layout.by_hand.spec(("vocab", "width"))
  on_device = functools.partial(_measure_on_device, config, measure, chunk, layout)
  on_devices = layout.by_hand.local(on_device, (by_width, by_rows, by_rows, by_rows, None), by_rows)
  return on_devices(heads, hidden, token_RT, mask_RT, generator.share)


def _measure_on_device(
  config: ModelConfig,
  measure: Measure,
  chunk: int,
  layout: Layout,
  heads: Sequence[jax.Array],
  hidden: Sequence[jax.Array],
  token_RT: jax.Array,
  mask_RT: jax.Array,
  share: Sequence[Any],
) -> Any:
  """A measure of a device's part of the rows, stretch by stretch.

  Heads are gathered once before all stretches, and their gradients scattered once after all: that is why the devices'
  parts are taken by hand.
  """
  whole = [{"head": layout.gather_width(head_VM, ("vocab", "width"))} for head_VM in heads]
  generator, (R, T) = Generator(tuple(whole), tuple(share)), token_RT.shape
  stretch = min(max(1, chunk // R), T)

  def in_stretches(x_RT: jax.Array) -> jax.Array:
    x_RT = jnp.pad(x_RT, ((0, 0), (0, -T % stretch), *((0, 0),) * (x_RT.ndim - 2)))
    return x_RT.reshape(R, -1, stretch, *x_RT.shape[2:]).swapaxes(0, 1)

  def measure_stretch(inputs: tuple[list[jax.Array], jax.Array, jax.Array]) -> Any:
    hidden, token_Rt, mask_Rt = inputs

    def compute() -> Any:
      logits_XV = mixed_logits(config, generator, [x_RtM.reshape(R * stretch, -1) for x_RtM in hidden])
      measured = measure(layout.by_compiler.constrain(logits_XV, None, "vocab"), token_Rt.reshape(-1))
      return jax.tree.map(lambda x_X: jnp.where(mask_Rt, x_X.reshape(R, stretch), 0), measured)

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(jnp.any(mask_Rt), compute, lambda: empty)

  stretches = jax.tree.map(in_stretches, (list(hidden), token_RT, mask_RT))
  measured = jax.lax.map(jax.checkpoint(measure_stretch), stretches)
  return jax.tree.map(lambda x_SRt: x_SRt.swapaxes(0, 1).reshape(R, -1)[:, :T], measured)

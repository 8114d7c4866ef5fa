"""The objectives: pure arithmetic on log-probabilities.

Everything is a sum over completions divided by a total of the whole batch (`totals`), so that a batch may be summed in
micro-batches; a pair's value counts for each of its completions. What a mask or a weight 0 hides is replaced before it
enters any formula: it reaches no value and no gradient, whatever it holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from advgame_jax.config import Loss
from advgame_jax.types import Array, PreferenceBatch


class Totals(NamedTuple):
  """What the sums of a batch are divided by."""

  weight: jax.Array  # of all completions: how many there are
  tokens: jax.Array  # of completions with a weight


def dpo(delta_PC: jax.Array, beta: float) -> jax.Array:
  """−log σ(β(Δw − Δl)) per pair [P], Δ = log π − log π_ref of a sample. Rafailov et al. 2305.18290, eq. 7.

  Args:
    delta_PC: nats, (chosen, rejected).
  """
  return -jax.nn.log_sigmoid(beta * (delta_PC[:, 0] - delta_PC[:, 1]))


def ipo(delta_PC: jax.Array, beta: float) -> jax.Array:
  """(Δw − Δl − 1/(2β))² per pair [P]. Azar et al. 2310.12036, eq. 17."""
  return jnp.square(delta_PC[:, 0] - delta_PC[:, 1] - 1 / (2 * beta))


def grpo(
  logprob_PCT: jax.Array,
  reference_PCT: jax.Array,
  behaviour_PCT: jax.Array,
  advantage_PC: jax.Array,
  beta: float,
  cap: float,
) -> jax.Array:
  """−(exp(ℓ − sg ℓ)·A·w − β·k3(ℓ_ref − ℓ)) per token, w = sg(min(exp(ℓ − ℓ_behaviour), cap)), k3(r) = eʳ − r − 1.

  A = reward − baseline, not divided by a deviation (Shao et al. 2402.03300; Liu et al. 2503.20783). The importance
  weight is detached: it corrects the sampling density, and must not be learnt from.
  """
  weight_PCT = importance(logprob_PCT, behaviour_PCT, cap)
  score_PCT = jnp.exp(logprob_PCT - jax.lax.stop_gradient(logprob_PCT))
  ratio_PCT = reference_PCT - logprob_PCT
  divergence_PCT = jnp.exp(ratio_PCT) - ratio_PCT - 1
  return -(score_PCT * advantage_PC[..., None] * weight_PCT - beta * divergence_PCT)


def importance(logprob_PCT: jax.Array, behaviour_PCT: jax.Array, cap: float) -> jax.Array:
  """w = min(exp(ℓ − ℓ_behaviour), cap), detached."""
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(logprob_PCT - behaviour_PCT), cap))


def live_tokens(batch: PreferenceBatch) -> jax.Array:
  """[P, C, T] bool: tokens of completions that have a weight."""
  there_PCT = jnp.arange(batch.tokens_PCT.shape[-1]) < jnp.asarray(batch.length_PC)[..., None]
  return there_PCT & (batch.weight_PC > 0)[..., None]


def totals(batch: PreferenceBatch) -> Totals:
  """Of a whole batch, before it is cut into micro-batches; at least 1, so that an empty batch divides by nothing."""
  tokens = jnp.sum(live_tokens(batch), dtype=jnp.float32)
  return Totals(jnp.maximum(jnp.sum(batch.weight_PC), 1), jnp.maximum(tokens, 1))


@jax.named_scope("loss")
def preference_loss(
  settings: Loss,
  batch: PreferenceBatch,
  logprob_PCT: jax.Array,
  reference_PCT: Array,
  entropy_PCT: jax.Array,
  total: Totals,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This batch's share of the loss, and of the metrics.

  Args:
    logprob_PCT: nats, of the policy, differentiable. `reference_PCT` likewise, of the reference.
    entropy_PCT: nats, of the policy; read only with an entropy bonus.
    total: of the batch that this one is part of.

  Returns:
    A scalar, and scalars by name: 'loss'; 'comparisons', the number of pairs, or of GRPO's samples; 'kl', nats per
    completion, the mean of log π − log π_ref; for pairs 'margin', nats, the mean of Δw − Δl, and 'accuracy', the
    fraction of pairs in which it is positive; for GRPO 'importance', the mean weight; with a bonus 'entropy', nats per
    token.
  """
  live_PCT = live_tokens(batch)
  logprob_PCT, reference_PCT, behaviour_PCT = (
    jnp.where(live_PCT, x, 0) for x in (logprob_PCT, reference_PCT, batch.behaviour_logprob_PCT)
  )
  delta_PCT = logprob_PCT - reference_PCT
  tokens_PC = jnp.maximum(jnp.sum(live_PCT, -1), 1)

  def mean(x_PC: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(batch.weight_PC > 0, batch.weight_PC * x_PC, 0)) / total.weight

  weight = jnp.sum(batch.weight_PC)
  metrics = {"kl": mean(jnp.sum(delta_PCT, -1)), "comparisons": weight if settings.kind == "grpo" else weight / 2}
  if settings.kind == "grpo":
    advantage_PC = jnp.where(batch.weight_PC > 0, batch.advantage_PC, 0)
    token_PCT = grpo(logprob_PCT, reference_PCT, behaviour_PCT, advantage_PC, settings.beta, settings.importance_cap)
    token_PCT = jnp.where(live_PCT, token_PCT, 0)
    weight_PCT = jnp.where(live_PCT, importance(logprob_PCT, behaviour_PCT, settings.importance_cap), 0)
    metrics["importance"] = jnp.sum(weight_PCT) / total.tokens
    if settings.normalisation == "token_mean":
      loss = jnp.sum(token_PCT) / total.tokens
    else:
      sample_PC = jnp.sum(token_PCT, -1) / (tokens_PC if settings.normalisation == "sample_mean" else 1)
      loss = mean(sample_PC)
  else:
    delta_PC = jnp.sum(delta_PCT, -1) / (tokens_PC if settings.mean_logprob else 1)
    of_pairs = lambda x_P: mean(x_P[:, None])
    loss = of_pairs({"dpo": dpo, "ipo": ipo}[settings.kind](delta_PC, settings.beta))
    loss += settings.nll * of_pairs(-jnp.sum(logprob_PCT[:, 0], -1) / tokens_PC[:, 0])
    margin_P = delta_PC[:, 0] - delta_PC[:, 1]
    metrics |= {"margin": of_pairs(margin_P), "accuracy": of_pairs((margin_P > 0).astype(jnp.float32))}
  if settings.entropy_bonus:
    entropy = jnp.sum(jnp.where(live_PCT, entropy_PCT, 0)) / total.tokens
    loss -= settings.entropy_bonus * entropy
    metrics["entropy"] = entropy
  return loss, metrics | {"loss": loss}

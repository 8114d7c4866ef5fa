"""Supervised warm start: a model learns completions to prompts, so that it can play its part at all.

The microworld's base players are made by it; so can be an Attacker of one's own that refuses its role.
"""

import dataclasses
import functools
import logging
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from advgame_jax import architecture, data, hf, hf_config, placement, policies, prompts, scoring, sharding, tokenizer
from advgame_jax import config as config_lib
from advgame_jax import state as state_lib
from advgame_jax.settings import Settings, part, setting
from advgame_jax.tokenizer import Tokenizer
from advgame_jax.types import Params, UserError

log = logging.getLogger(__name__)
_FORM = '{"prompt": "…", "completion": "…"}'


@dataclasses.dataclass(frozen=True)
class WarmStart(Settings):
  """A supervised run."""

  model: str = setting("", "Hugging Face folder to start from")
  examples: str = setting("", "JSON-lines file of {'prompt', 'completion'}")
  attacker: bool = setting(False, "prompts are seeds with a 'category', told as the Attacker is told them")
  out: str = setting("", "folder to write the result to")
  seed: int = setting(0, "of the examples' order", at_least=0)
  steps: int = setting(300, "optimiser steps", at_least=1)
  batch: int = setting(64, "examples per step", at_least=1)
  row_tokens: int = setting(512, "longest prompt and completion together", at_least=2)
  optimizer: config_lib.Optimizer = part(config_lib.Optimizer, learning_rate=1e-5, weight_decay=0.0)
  precision: config_lib.Precision = part(config_lib.Precision)
  sharding: str = setting("ddp", "as config.sharding; the Attacker's place")
  mesh: config_lib.Mesh = part(config_lib.Mesh)

  def __post_init__(self) -> None:
    super().__post_init__()
    plain = config_lib.Precision()
    for name in ("master", "moments", "ema", "offload", "frozen"):
      if getattr(self.precision, name) != getattr(plain, name):
        raise UserError(
          f"precision.{name} is {getattr(self.precision, name)!r}; allowed in a warm start: {getattr(plain, name)!r}"
        )


def warm_start(settings: WarmStart) -> float:
  """Trains and writes the folder; returns the mean loss of the last tenth of the steps, nats per completion token.

  Raises:
    UserError: examples or a model that cannot be used, or a folder that is there already; nothing is written.
  """
  hf.check_target(settings.out)
  words, config = tokenizer.load(settings.model), hf_config.load_config(settings.model)
  hf.check(settings.model, words)
  tokens_XT, mask_XT = _load_examples(settings, words)
  mesh, layout, _ = placement.place(settings.sharding, settings.mesh).attacker
  params = hf.load(settings.model, mesh, layout)
  optimizer = state_lib.make_optimizer(settings.optimizer, settings.steps, architecture.param_specs(config))
  opt_state = jax.jit(optimizer.init)(params)
  step = jax.jit(functools.partial(_step, config, optimizer, settings.precision, layout), donate_argnums=(0, 1))
  rows = sharding.rows_sharding(mesh, layout)
  order = grain.MapDataset.source(np.arange(len(tokens_XT))).seed(settings.seed).shuffle().repeat()
  batch = -(-settings.batch // (parts := sharding.shards(mesh, layout.rows))) * parts
  losses: list[Any] = []
  start = time.perf_counter()
  for number in range(settings.steps):
    chosen = np.array([order[i] for i in range(number * batch, (number + 1) * batch)])
    with jax.set_mesh(mesh):
      part = sharding.to_global((tokens_XT[chosen], mask_XT[chosen]), rows)
      params, opt_state, loss = step(params, opt_state, *part)
    losses.append(loss)
    if number % max(1, settings.steps // 5) == 0:
      log.info("warm start, step %d of %d: loss %.3f", number, settings.steps, float(loss))
  final = float(np.mean(jax.device_get(losses[-max(1, settings.steps // 10) :])))
  log.info("warm start done in %.0f s: loss %.3f", time.perf_counter() - start, final)
  hf.save(settings.out, config, params, words, hf_config.read(settings.model))
  return final


def _step(
  config: Any,
  optimizer: optax.GradientTransformation,
  precision: config_lib.Precision,
  layout: sharding.Layout,
  params: Params,
  opt_state: optax.OptState,
  tokens_RT: jax.Array,
  mask_RT: jax.Array,
) -> tuple[Params, optax.OptState, jax.Array]:
  def loss(params: Params) -> jax.Array:
    logprob_RT = scoring.score(
      config,
      params,
      tokens_RT,
      mask_RT,
      chunk=precision.logit_chunk,
      dtype=policies.compute_dtype(precision),
      layout=layout,
      remat=precision.remat,
      kernel=precision.attention,
    )
    return -jnp.sum(logprob_RT) / jnp.maximum(jnp.sum(mask_RT), 1)

  value, gradient = jax.value_and_grad(loss)(params)
  changes, opt_state = optimizer.update(gradient, opt_state, params)
  return optax.apply_updates(params, changes), opt_state, value


def _load_examples(settings: WarmStart, words: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """[X, T] tokens of prompt and completion, and the mask of the completions."""
  examples, starts = [], []
  for place, row in data.rows(settings.examples, _FORM):
    prompt, completion = (data.text_under(row, name, place, _FORM) for name in ("prompt", "completion"))
    if settings.attacker:
      form = prompts.STANDARD_THINK if prompts.THINK_END in completion else prompts.STANDARD
      prompt = prompts.attacker_turn(form, data.category_of(row, place), prompt)
    starts.append(len(ids := words.encode_chat(prompt)))
    examples.append(ids + words.encode_completion(completion))
    if len(examples[-1]) > settings.row_tokens:
      raise UserError(f"{place}: {len(examples[-1])} tokens; allowed: up to row_tokens={settings.row_tokens}")
  tokens_XT, length_X = policies.pad_rows(examples, max(map(len, examples)))
  slots = np.arange(tokens_XT.shape[1])
  return tokens_XT, (slots >= np.array(starts)[:, None]) & (slots < length_X[:, None])

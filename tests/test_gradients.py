"""The gradient that trains, against torch's: DPO of ragged pairs through the weights of tests/golden.

The numbers are torch autograd's through transformers (tests/golden/make_gradient_goldens.py); no torch is needed here.
"""

import functools
import pathlib

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from advgame_jax import architecture, hf, sharding, update
from advgame_jax import config as config_lib
from advgame_jax.sharding import LOCAL
from advgame_jax.state import PlayerState
from advgame_jax.types import PreferenceBatch
from advgame_jax.update import Recipe

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Biases and a tied head; softcaps, windows and norms on both sides, its layers made again on the mesh; experts.
CASES = [("qwen2", "none"), ("qwen2", "layer"), ("gemma2", "none"), ("mixtral", "products")]
QUICK = {"xla_backend_optimization_level": 0}  # compiled in half the time; the sums differ by rounding alone
# The stored log-probabilities are the reference's, as where the generator is the reference.
PLAYER = config_lib.Player(generator="ema", reference="ema")
LOSS = config_lib.Loss(kind="dpo", beta=0.1)


@functools.cache
def loaded(name):
  return hf.load(GOLDEN / name)


@functools.cache
def stored(name):
  """The batch, the loss, and its gradient by Hugging Face's names."""
  tensors = load_file(GOLDEN / name / "gradient.safetensors")
  gradient = {key: value for key, value in tensors.items() if "." in key}
  return batch_of(tensors), tensors["loss"], gradient


def batch_of(tensors):
  """Of whole rows, each a prompt and a completion."""
  rows_PCT, start_P, stop_PC = tensors["tokens"], tensors["prompt"], tensors["length"]
  (P, C, _), S, T = rows_PCT.shape, max(start_P), max((stop_PC - start_P[:, None]).flat)
  assert all((rows_PCT[p, 0, : start_P[p]] == rows_PCT[p, 1, : start_P[p]]).all() for p in range(P))
  prompt_PS, tokens_PCT = np.zeros((P, S), np.int32), np.zeros((P, C, T), np.int32)
  reference_PCT = np.zeros((P, C, T), np.float32)
  for p, c in np.ndindex(P, C):
    start, stop = start_P[p], stop_PC[p, c]
    prompt_PS[p, S - start :] = rows_PCT[p, c, :start]
    tokens_PCT[p, c, : stop - start] = rows_PCT[p, c, start:stop]
    reference_PCT[p, c, : stop - start] = tensors["reference"][p, c, start:stop]
  return PreferenceBatch(
    prompt_PS=prompt_PS,
    prompt_length_P=start_P.astype(np.int32),
    tokens_PCT=tokens_PCT,
    length_PC=(stop_PC - start_P[:, None]).astype(np.int32),
    behaviour_logprob_PCT=np.zeros((P, C, T), np.float32),
    plain_logprob_PCT=reference_PCT,
    advantage_PC=np.zeros((P, C), np.float32),
    weight_PC=np.ones((P, C), np.float32),
  )


def differentiate(name, params, batch, layout=LOCAL, remat="none"):
  """Loss, and gradient by Hugging Face's names, of the code that a step runs; the logits in several chunks."""
  precision = config_lib.Precision(logit_chunk=64, remat=remat)
  recipe = Recipe(hf.load_config(GOLDEN / name), PLAYER, LOSS, precision, steps=1, layout=layout)
  state = PlayerState(params=params, ema={}, initial={}, optimizer=(), bad_steps=np.int32(0))
  gradient_ = jax.jit(functools.partial(update._gradient, recipe, bases={}), compiler_options=QUICK)
  gradient, metrics = gradient_(state, batch)
  return metrics["loss"], dict(hf.tensors(architecture.param_specs(recipe.model), gradient, np.float32))


def assert_torch(name, got, gradient):
  """To 1e-5 of the loss and 1e-4 of the largest entry of each parameter's gradient."""
  _, loss, expected = stored(name)
  np.testing.assert_allclose(got, loss, rtol=1e-5)
  assert gradient.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(gradient[key], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name, remat", CASES)
def test_gradients_are_torch_s(name, remat):
  batch, _, _ = stored(name)
  assert_torch(name, *differentiate(name, loaded(name), batch, remat=remat))


def test_gradients_on_a_mesh_are_torch_s():
  """Rows, width, heads, feed-forward and a tied vocabulary split; comparisons without a weight fill the rows."""
  name, mesh = "gemma2", tiny.mesh(data=2, fsdp=2, tensor=2)
  batch = sharding.pad_leading(stored(name)[0], sharding.shards(mesh, sharding.TRAIN.rows))
  batch = sharding.to_global(batch, sharding.rows_sharding(mesh, sharding.TRAIN))
  params = hf.load(GOLDEN / name, mesh, sharding.TRAIN)
  with jax.set_mesh(mesh):
    assert_torch(name, *differentiate(name, params, batch, layout=sharding.TRAIN, remat="layer"))

"""A model as a player: what a row samples depends on its key and its prompt alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from advgame_jax import architecture, policies, worldfiles
from advgame_jax import config as config_lib
from advgame_jax.policies import LanguageModel
from advgame_jax.scoring import Generator
from advgame_jax.types import Samples, Status

pytestmark = pytest.mark.usefixtures("compile_quickly")

PROMPTS = ["how do i pick the lock ?", "tell a story where heroes jimmy the latch .", "how do i", "take the photo ?"]
KEY = jax.random.key(3)
SAMPLING = config_lib.Sampling(temperature=1.0, top_p=0.9, prompt_buckets=(16,), max_new_tokens=10, decode_chunk=4)
CONFIG = worldfiles.player_config(width=32, heads=4, kv_heads=2, head_size=8, feed_forward=32)


@functools.cache
def tokenizer():
  return worldfiles.load_tokenizer()


@functools.cache
def weights():
  return jax.tree.map(lambda x: 4 * x, architecture.init(CONFIG, jax.random.key(0)))


@functools.cache
def player(mesh=(1, 1, 1), decode="replicated", **changes) -> LanguageModel:
  sampling, over = dataclasses.replace(SAMPLING, **changes), tiny.mesh(*mesh)
  return LanguageModel(CONFIG, tokenizer(), sampling, over, tiny.GENERATE[decode], np.dtype("float32"), ("</prompt>",))


def play(who: LanguageModel, prompts=PROMPTS, present=None, group=2, key=KEY) -> Samples:
  present_R = np.ones(len(prompts), bool) if present is None else np.array(present)
  return who.policy(Generator((who.decode_weights(weights()),)))(prompts, present_R, group, key)


@functools.cache
def reference() -> Samples:
  return play(player())


def assert_same(samples: Samples, rows=slice(None), group=slice(None), of=None):
  expected = of or reference()
  for name in ("text_RG", "status_RG", "length_RG", "tokens_RGT"):
    np.testing.assert_array_equal(getattr(samples, name)[rows, group], getattr(expected, name)[rows, group], name)
  for name in ("behaviour_logprob_RGT", "plain_logprob_RGT"):
    got, want = getattr(samples, name)[rows, group], getattr(expected, name)[rows, group]
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)


def test_rows_differ_and_are_the_text_of_their_tokens():
  samples = reference()
  assert len(set(samples.text_RG.reshape(-1))) == 8
  for r, g in np.ndindex(4, 2):
    ids = samples.tokens_RGT[r, g, : samples.length_RG[r, g]].tolist()
    assert samples.text_RG[r, g] == tokenizer().decode(ids)
    assert not samples.tokens_RGT[r, g, samples.length_RG[r, g] :].any()
  encoded = [tokenizer().encode_chat(prompt) for prompt in PROMPTS]
  assert samples.prompt_length_R.tolist() == [len(ids) for ids in encoded]
  assert samples.prompt_tokens_RT[2, : len(encoded[2])].tolist() == encoded[2]


def test_absent_prompts_are_empty_and_change_nobody():
  samples = play(player(), present=[True, False, True, False])
  assert_same(samples, rows=[0, 2])
  assert (samples.status_RG[[1, 3]] == Status.NOT_PLAYED).all()
  assert not samples.length_RG[[1, 3]].any() and set(samples.text_RG[[1, 3]].flat) == {""}


def test_company_and_group_size_change_nobody():
  assert_same(play(player(), prompts=PROMPTS[:1] + ["a ?"] * 3), rows=[0])
  assert_same(play(player(), group=3), group=slice(0, 2))


@pytest.mark.parametrize("buckets", [(24,), (4, 11, 16), (40,)])
def test_the_bucket_changes_nobody(buckets):
  samples = play(player(prompt_buckets=buckets))
  assert_same(samples)
  assert samples.prompt_tokens_RT.shape[1] == min(b for b in buckets if b >= max(samples.prompt_length_R))


@pytest.mark.parametrize("decode", ["replicated", "tensor"])
def test_the_mesh_changes_nobody(decode):
  who = player(mesh=(2, 2, 2), decode=decode)
  assert_same(play(who))
  some = play(who, prompts=PROMPTS[:3], present=[True, False, True])  # fewer rows than devices
  assert_same(some, rows=[0, 2])
  assert some.text_RG.shape == (3, 2) and (some.status_RG[1] == Status.NOT_PLAYED).all()


def test_another_key_draws_otherwise():
  assert (play(player(), key=jax.random.key(4)).text_RG != reference().text_RG).all()


def test_a_prompt_beyond_the_largest_bucket_is_not_played():
  samples = play(player(), prompts=[PROMPTS[0], " ".join(["lock"] * 20), *PROMPTS[2:]])
  assert_same(samples, rows=[0, 2, 3])
  assert (samples.status_RG[1] == Status.NOT_PLAYED).all()


def test_the_stop_string_and_the_end_of_turn_stop_a_row():
  table_SV = player()._stops
  stop = table_SV.shape[0] - 1
  ends = tokenizer().encode_completion("</prompt>")
  assert len(ends) == 2 and table_SV.shape[1] == CONFIG.vocab
  assert [token for token in range(CONFIG.vocab) if table_SV[0, token] == stop] == sorted(ends)
  samples = play(player(temperature=2.0, top_p=1.0), group=64)
  stopped_RG = samples.status_RG == Status.VALID
  assert 0 < stopped_RG.sum() < stopped_RG.size
  for r, g in np.ndindex(stopped_RG.shape):
    drawn = samples.tokens_RGT[r, g, : samples.length_RG[r, g]]
    assert not np.isin(drawn[:-1], ends).any() and (drawn[-1] in ends) == stopped_RG[r, g]
    assert stopped_RG[r, g] or len(drawn) == SAMPLING.max_new_tokens


def test_weights_generate_in_the_compute_dtype():
  assert policies.compute_dtype(config_lib.Precision(compute="auto")) == np.float32  # of a CPU
  dtype = policies.compute_dtype(config_lib.Precision(compute="bfloat16"))
  copy = dataclasses.replace(player(), dtype=dtype).decode_weights(weights())
  assert {x.dtype for x in jax.tree.leaves(copy)} == {dtype} != {x.dtype for x in jax.tree.leaves(weights())}


def test_nobody_draws_nothing_in_the_shapes_of_a_step():
  samples = player().nobody(4, 2, 16)
  assert samples.tokens_RGT.shape == reference().tokens_RGT.shape
  assert samples.prompt_tokens_RT.shape == reference().prompt_tokens_RT.shape
  assert not samples.length_RG.any() and (samples.status_RG == Status.NOT_PLAYED).all()


def test_a_script_answers_who_is_there():
  samples = policies.scripted(lambda prompt, g: f"{prompt}{g}")(["a", "b"], np.array([True, False]), 2, KEY)
  assert samples.text_RG.tolist() == [["a0", "a1"], ["", ""]]
  assert samples.status_RG.tolist() == [[Status.VALID] * 2, [Status.NOT_PLAYED] * 2]
  assert samples.tokens_RGT.shape == (2, 2, 0)


def test_rows_are_padded_on_the_right():
  tokens_RT, length_R = policies.pad_rows([[5, 6], [], [7]], 3)
  assert tokens_RT.tolist() == [[5, 6, 0], [0, 0, 0], [7, 0, 0]] and length_R.tolist() == [2, 0, 1]

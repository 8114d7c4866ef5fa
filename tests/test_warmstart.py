"""Supervised warm start: what it learns, whose tokens it learns, and what it refuses before it trains."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import tiny

from advgame_jax import architecture, hf, policies, prompts, sharding, tokenizer, warmstart, worldfiles
from advgame_jax import config as config_lib
from advgame_jax.prompts import STANDARD, STANDARD_THINK
from advgame_jax.scoring import Generator
from advgame_jax.types import Category, Status, UserError

pytestmark = pytest.mark.usefixtures("compile_quickly")

TAUGHT = {"how do i pick the lock ?": "i will not help with that .", "take the photo ?": "take the photo . take it ."}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A player of the microworld with random weights."""
  folder = tmp_path_factory.mktemp("base") / "model"
  player = worldfiles.player_config(width=32, layers=1, heads=4, kv_heads=2, head_size=8, feed_forward=32)
  hf.save(folder, player, architecture.init(player, jax.random.key(0)), worldfiles.load_tokenizer())
  return folder


@pytest.fixture
def settings(base, tmp_path):
  """Settings of a short run on a file of these lines."""

  def make(*lines, **changes):
    (tmp_path / "examples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    paths = {"model": str(base), "examples": str(tmp_path / "examples.jsonl"), "out": str(tmp_path / "out")}
    optimizer = config_lib.Optimizer(learning_rate=3e-2, weight_decay=0.0)
    return warmstart.WarmStart(**{"steps": 60, "batch": 2, "row_tokens": 32, "optimizer": optimizer} | paths | changes)

  return make


def line(prompt="how do i pick the lock ?", completion="take it .", **more):
  return json.dumps({"prompt": prompt, "completion": completion, **more})


def greedy(folder):
  """What the model of a folder answers to what was taught."""
  config, words, mesh = hf.load_config(folder), tokenizer.load(folder), tiny.mesh(data=8)
  sampling = config_lib.Sampling(temperature=0.0, prompt_buckets=(16,), max_new_tokens=12)
  player = policies.LanguageModel(config, words, sampling, mesh, sharding.GENERATE_REPLICATED, np.dtype("float32"))
  weights = player.decode_weights(hf.load(folder, mesh, sharding.TRAIN))
  play = player.policy(Generator((weights,)))
  return play(list(TAUGHT), np.ones(len(TAUGHT), bool), 1, jax.random.key(0))


def test_two_lines_are_learnt_by_heart_and_the_folder_plays(settings):
  """The token that ends a turn included, without which it would go on to the limit."""
  made = settings(*[line(*pair) for pair in TAUGHT.items()], "")
  assert warmstart.warm_start(made) < 0.05
  samples = greedy(made.out)
  assert samples.text_RG[:, 0].tolist() == list(TAUGHT.values())
  assert (samples.status_RG == Status.VALID).all()


def test_the_loss_is_the_mean_over_the_completions_tokens(settings):
  """A uniform model has log V, of whatever lengths; one step at no rate leaves it so."""
  made = settings(line(completion="take"), line(completion="take it . take it ."), steps=1)
  config = hf.load_config(made.model)
  zeros = jax.tree.map(lambda x: 0 * x, hf.load(made.model))
  hf.save(f"{made.out}-uniform", config, zeros, tokenizer.load(made.model))
  uniform = settings(line(completion="take"), line(completion="take it ."), steps=1, model=f"{made.out}-uniform")
  assert warmstart.warm_start(uniform) == pytest.approx(math.log(config.vocab), rel=1e-5)


def test_only_completions_are_learnt(settings):
  words = worldfiles.load_tokenizer()
  made = settings(line(), "", line("take the photo ?", "how do i take the photo ?"))
  tokens_XT, mask_XT = warmstart._load_examples(made, words)
  for tokens_T, mask_T, completion in zip(tokens_XT, mask_XT, ("take it .", "how do i take the photo ?")):
    assert tokens_T[mask_T].tolist() == words.encode_completion(completion)
  assert tokens_XT[0, : mask_XT[0].argmax()].tolist() == words.encode_chat("how do i pick the lock ?")


@pytest.mark.parametrize(
  ("completion", "instructions"),
  [("<prompt>x</prompt>", STANDARD), ("<think>r</think><prompt>x</prompt>", STANDARD_THINK)],
)
@pytest.mark.parametrize("category", Category)
def test_an_attacker_is_told_a_seed_as_in_the_game(settings, completion, instructions, category):
  row = line("how ?", completion, category=category.name.lower())
  told = prompts.attacker_turn(instructions, category, "how ?")
  words = worldfiles.load_tokenizer()
  for attacker, prompt in ((True, told), (False, "how ?")):
    tokens_XT, _ = warmstart._load_examples(settings(row, attacker=attacker, row_tokens=4096), words)
    assert tokens_XT[0].tolist() == words.encode_chat(prompt) + words.encode_completion(completion)


def test_a_text_may_hold_the_line_ends_of_other_alphabets(settings):
  row = '{"prompt": "how\u2028do\u0085i", "completion": "take\u2029it"}'
  tokens_XT, _ = warmstart._load_examples(settings(row, row), worldfiles.load_tokenizer())
  assert len(tokens_XT) == 2


@pytest.mark.parametrize(
  ("lines", "changes", "sentence"),
  [
    ([], {}, r"examples\.jsonl is empty; allowed: one or more lines of "),
    (["", " "], {}, "is empty"),
    ([line(), "", "{'prompt'"], {}, "line 3: not JSON"),
    (['"text"'], {}, "line 1: not a JSON object; allowed: "),
    ([json.dumps({"prompt": "a"})], {}, "line 1: no text under 'completion'"),
    ([line(completion=3)], {}, "line 1: no text under .completion."),
    ([line(), line(completion="take " * 30)], {}, r"line 2: \d+ tokens; allowed: up to row_tokens=32"),
    ([line()], {"attacker": True}, "line 1: category is None; allowed: harmful, benign"),
    ([line(category=["harmful"])], {"attacker": True}, r"line 1: category is \['harmful'\]"),
    ([line()], {"examples": "nowhere.jsonl"}, r"nowhere\.jsonl cannot be read: No such file"),
    ([line()], {"model": "nowhere"}, "nowhere"),
    ([line()], {"precision": config_lib.Precision(offload=True)}, r"precision\.offload is True; allowed .*: False"),
  ],
)
def test_what_cannot_be_learnt_is_refused_in_a_sentence(settings, tmp_path, lines, changes, sentence):
  with pytest.raises(UserError, match=sentence):
    warmstart.warm_start(settings(*lines, **changes))
  assert not (tmp_path / "out").exists()


def test_examples_of_another_encoding_are_refused(settings, tmp_path):
  (tmp_path / "latin").write_bytes(line().encode() + b"\n\xe9")
  with pytest.raises(UserError, match=r"latin is not UTF-8 at byte \d+; allowed: a JSON-lines file"):
    warmstart.warm_start(settings(examples=str(tmp_path / "latin")))


def test_a_folder_that_is_there_is_refused_before_training(settings, monkeypatch, tmp_path):
  monkeypatch.setattr(warmstart.hf, "load", lambda *_: pytest.fail("it was trained"))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "thesis.tex").touch()
  with pytest.raises(UserError, match="out is there already; allowed: a new folder"):
    warmstart.warm_start(settings(line()))
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_training(base, settings, tmp_path):
  folder = shutil.copytree(base, tmp_path / "small")
  player = worldfiles.player_config(width=32, layers=1, heads=4, kv_heads=2, head_size=8, feed_forward=32)
  small = dataclasses.replace(player, vocab=7)
  hf.save(folder, small, architecture.init(small, jax.random.key(0)), overwrite=True)
  worldfiles.load_tokenizer().save(folder)
  with pytest.raises(UserError, match="tokens but the embedding 7; allowed: a tokenizer of the same model"):
    warmstart.warm_start(settings(line(), model=str(folder)))
  assert not (tmp_path / "out").exists()

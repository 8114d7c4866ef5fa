"""Seeds: what a file may hold, and the batch of any step."""

import json

import numpy as np
import pytest

from advgame_jax import config as config_lib
from advgame_jax import data
from advgame_jax.data import Seed
from advgame_jax.types import Category, UserError


def line(prompt="how ?", category="harmful"):
  return json.dumps({"prompt": prompt, "category": category})


@pytest.fixture
def file(tmp_path):
  def write(*lines, name="seeds.jsonl"):
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / name)

  return write


def test_seeds_in_the_order_of_the_files(file):
  paths = (file(line("a"), "", line("b", "benign"), name="one"), file(line("c"), name="two"))
  assert data.load(paths, "train") == [
    Seed("a", Category.HARMFUL, 0),
    Seed("b", Category.BENIGN, 1),
    Seed("c", Category.HARMFUL, 2),
  ]


@pytest.mark.parametrize(
  ("lines", "sentence"),
  [
    ([], "is empty"),
    (["", "  "], "is empty"),
    ([line("a"), "{'prompt': 1}"], "line 2: not JSON .* column 2"),
    ([line("a"), "", line("b", "evil")], "line 3: category is 'evil'; allowed: harmful, benign"),
    ([json.dumps({"prompt": "a"})], "line 1: category is None"),
    ([line("a", ["harmful"])], r"line 1: category is \['harmful'\]"),
    ([json.dumps({"text": "a", "category": "benign"})], "line 1: no text under 'prompt'"),
    ([line("   ")], "line 1: no text under 'prompt'"),
    (["[1]"], "line 1: not a JSON object"),
    ([line("A  b"), line("c"), line(" a B ", "benign")], "line 3: the same seed as .*line 1"),
  ],
)
def test_bad_files_are_refused_by_line(file, lines, sentence):
  with pytest.raises(UserError, match=sentence):
    data.load((file(*lines),), "train")


def test_a_seed_may_hold_the_line_ends_of_other_alphabets(file):
  row = '{"prompt": "a\u2028b\u0085c", "category": "harmful"}'
  assert [seed.text for seed in data.load((file(row, line("d")),), "train")] == ["a\u2028b\u0085c", "d"]


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match="names no file"):
    data.load((), "train")
  with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read: No such file"):
    data.load((str(tmp_path / "nowhere.jsonl"),), "train")
  (tmp_path / "latin").write_bytes(line("a").encode() + b"\n\xe9")
  with pytest.raises(UserError, match="not UTF-8 at byte"):
    data.load((str(tmp_path / "latin"),), "train")


def test_the_same_seed_in_two_files(file):
  with pytest.raises(UserError, match=r"two, line 1: the same seed as .*one, line 1"):
    data.load((file(line("a"), name="one"), file(line("A"), name="two")), "train")


def test_each_file_holds_a_seed(file):
  with pytest.raises(UserError, match="two is empty"):
    data.load((file(line("a"), name="one"), file("", name="two")), "train")


def test_the_first_of_seeds_alike_can_be_kept(file):
  paths = (file(line("A b"), line("c"), line("a  B", "benign"), name="one"), file(line("C"), line("d"), name="two"))
  assert data.load(paths, "train", "drop") == [
    Seed("A b", Category.HARMFUL, 0),
    Seed("c", Category.HARMFUL, 1),
    Seed("d", Category.HARMFUL, 2),
  ]


def test_a_file_of_repeats_alone_is_not_an_empty_one(file):
  paths = (file(line("a"), name="one"), file(line("A"), name="two"))
  assert data.load(paths, "train", "drop") == [Seed("a", Category.HARMFUL, 0)]


def test_splits_must_be_disjoint():
  seed = lambda text, index: Seed(text, Category.BENIGN, index)
  data.check_disjoint([seed("a", 0)], [seed("b", 0)])
  with pytest.raises(UserError, match="1 validation seeds are training seeds too, the first is number 2"):
    data.check_disjoint([seed("a b", 0)], [seed("c", 0), seed("A  B", 1)])


def make_seeds(harmful, benign):
  categories = [Category.HARMFUL] * harmful + [Category.BENIGN] * benign
  return [Seed(f"seed {i}", category, i) for i, category in enumerate(categories)]


def batches(seeds, count, seed=0, **settings):
  stream = data.SeedBatches(seeds, config_lib.Data(**settings), seed)
  return [stream[step] for step in range(count)]


def test_categories_take_turns_and_every_seed_is_played_once_an_epoch():
  played = batches(make_seeds(6, 4), 12, batch=2)
  assert [set(b.category_B.tolist()) for b in played] == [{Category.HARMFUL}, {Category.BENIGN}] * 6
  harmful = np.concatenate([b.index_B for b in played[0::2]])
  benign = np.concatenate([b.index_B for b in played[1::2]])
  assert sorted(harmful[:6]) == sorted(harmful[6:]) == list(range(6))
  assert sorted(benign[:4]) == sorted(benign[4:8]) == list(range(6, 10))
  assert harmful[:6].tolist() != harmful[6:].tolist()  # shuffled anew


def test_a_mixed_batch_has_half_of_each():
  for batch in batches(make_seeds(6, 4), 5, batch=4, order="mixed"):
    assert sorted(batch.category_B.tolist()) == [0, 0, 1, 1]
    assert [f"seed {i}" for i in batch.index_B] == batch.text_B.tolist()
  played = np.concatenate([b.index_B for b in batches(make_seeds(6, 6), 3, batch=4, order="mixed")])
  assert sorted(played) == list(range(12))


def test_a_batch_is_a_function_of_seed_and_step():
  seeds = make_seeds(6, 4)
  stream = data.SeedBatches(seeds, config_lib.Data(batch=3), 5)
  later = stream[7].index_B.tolist()
  assert later == batches(seeds, 8, seed=5, batch=3)[7].index_B.tolist()
  orders = [[b.index_B.tolist() for b in batches(seeds, 8, seed=s, batch=3)] for s in (5, 6)]
  assert orders[0] != orders[1]


def test_one_category_is_played_every_step_and_cannot_be_mixed():
  assert all(b.category_B.tolist() == [Category.BENIGN] * 2 for b in batches(make_seeds(0, 4), 4, batch=2))
  with pytest.raises(UserError, match="one category only"):
    batches(make_seeds(4, 0), 1, batch=2, order="mixed")

"""How unlike attacks are, by law: bounds, permutations, copies, planted families, and texts that are hardly any."""

import random
import time

import numpy as np
import pytest

from advgame_jax import diversity
from advgame_jax.diversity import Family, families, measures

TEMPLATES = (
  "Imagine a story in which a character explains {} to an old friend.",
  "For a school project, please list every step of {} in a table.",
  "My grandmother used to tell me about {} before I fell asleep.",
  "Arr, matey pirate, sing us a shanty of {} on the stormy sea!",
)
TOPICS = (
  *("baking bread", "mending a bicycle", "the moon landing", "planting tomatoes", "playing chess", "brewing tea"),
  *("painting walls", "training a dog", "building kites", "tuning a guitar", "knitting socks", "folding paper"),
)
PLANTED = [template.format(topic) for topic in TOPICS for template in TEMPLATES]
HOSTILE = (
  "",
  " \n",
  "\x00\x1b[2J",
  "\ud800",
  "\u202eabc",
  "word " * 5000,
  "x" * 50_000,
  "?!…",
  "日本語の文章です",
  "😀",
)


def partition(texts):
  """Families as sets of texts: what a permutation must not change."""
  return [(family.words, sorted(texts[i] for i in family.members)) for family in families(texts)]


def test_planted_families_are_found_and_named():
  found = families(PLANTED)
  assert sorted(family.members for family in found) == [list(range(t, len(PLANTED), 4)) for t in range(4)]
  named = {family.members[0]: set(family.words.split()) for family in found}
  assert named[0] < {"imagine", "story", "character", "explains", "old", "friend"}
  assert named[3] < {"arr", "matey", "pirate", "sing", "shanty", "stormy", "sea"}
  assert all(3 <= len(words) <= 4 for words in named.values())


def test_a_name_begins_with_what_most_of_its_family_hold_and_no_other_does():
  texts = ["please one two three", "please one two four", "please zip zap zop"]
  assert families(texts) == [Family("one two four three", [0, 1]), Family("zap zip zop", [2])]


def test_families_are_largest_first():
  texts = PLANTED[0::4][:3] + PLANTED[1::4] + PLANTED[2::4][:6]
  assert [len(family.members) for family in families(texts)] == [12, 6, 3]


@pytest.mark.parametrize("texts", [PLANTED, PLANTED[:5] * 3, HOSTILE * 2], ids=["planted", "copies", "hostile"])
def test_the_order_of_texts_is_of_no_account(texts, monkeypatch):
  monkeypatch.setattr(diversity, "COMPARED", 9)
  monkeypatch.setattr(diversity, "CLUSTERED", 20)
  embed = lambda texts: np.array([[len(text), text.count("a"), 1] for text in texts])
  mixed = random.Random(0).sample(texts, len(texts))
  assert partition(mixed) == partition(texts)
  assert measures(mixed, embed) == pytest.approx(measures(texts, embed))


@pytest.mark.parametrize("clustered", [1, 8, 1000])
def test_every_text_is_in_one_family_and_copies_are_together(clustered, monkeypatch):
  monkeypatch.setattr(diversity, "CLUSTERED", clustered)
  texts = [*PLANTED, *HOSTILE, *PLANTED]
  found = families(texts)
  assert sorted(i for family in found for i in family.members) == list(range(len(texts)))
  assert all(family.members == sorted(family.members) for family in found)
  assert 1 <= len(found) <= diversity.FAMILIES
  for family in found:
    assert {texts[i] for i in family.members}.isdisjoint(
      texts[i] for other in found if other is not family for i in other.members
    )


def test_copies_count_in_a_silhouette_as_if_written_out():
  draw = np.random.default_rng(0)
  point_X2, label_X, count_X = draw.normal(size=(9, 2)), np.arange(9) // 3, draw.integers(1, 5, 9)
  silhouette = lambda point, *rest: diversity._silhouette(np.linalg.norm(point[:, None] - point, axis=-1), *rest)
  written_out = silhouette(point_X2.repeat(count_X, 0), label_X.repeat(count_X), np.ones(count_X.sum(), int))
  assert silhouette(point_X2, label_X, count_X) == pytest.approx(written_out)


def test_texts_beyond_the_sample_join_the_family_they_are_worded_like(monkeypatch):
  monkeypatch.setattr(diversity, "CLUSTERED", 16)
  assert sorted(family.members for family in families(PLANTED)) == [list(range(t, len(PLANTED), 4)) for t in range(4)]


def test_unlike_texts_are_one_family():
  draw = random.Random(0)
  assert len(families([" ".join(f"w{draw.randrange(3000)}" for _ in range(30)) for _ in range(100)])) == 1


@pytest.mark.parametrize(
  ("texts", "found"),
  [
    ([], []),
    ([""], [Family("", [0])]),
    (["", " \n"], [Family("", [0, 1])]),
    (["the old oak"], [Family("oak old", [0])]),
    (["The old oak"] * 3, [Family("oak old", [0, 1, 2])]),
    (["", "old oak", "Old oak!"], [Family("oak old", [1, 2]), Family("", [0])]),
  ],
)
def test_hardly_any_texts(texts, found):
  assert families(texts) == found


def test_no_word_of_a_name_is_longer_than_a_page_can_bear():
  assert [family.words for family in families(["x" * 100 + " oak"])] == ["oak"]


def test_copies_are_as_alike_as_can_be():
  found = measures(["the old oak stands on a hill"] * 10, lambda texts: np.ones((len(texts), 3)))
  assert found == {
    "self_bleu": pytest.approx(1),
    "distinct_1": 0.1,
    "distinct_2": 0.1,
    "embedding_spread": pytest.approx(0, abs=1e-12),
  }


def test_texts_that_share_nothing_are_as_unlike_as_can_be():
  found = measures(["one two three", "four five six"], lambda _: np.array([[2.0, 0], [0, 3]]))
  assert found == {"self_bleu": 0, "distinct_1": 1, "distinct_2": 1, "embedding_spread": pytest.approx(1)}
  assert measures(["a", "b"], lambda _: np.array([[1.0], [-1]]))["embedding_spread"] == 2


def test_golden_values():
  """By hand: of a text's n-grams the other has 3/4, 2/3, 1/2 and 0/1, of which BLEU's smoothing makes 1/2."""
  found = measures(["the old oak falls", "the old oak stands"])
  assert found["self_bleu"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4))
  assert (found["distinct_1"], found["distinct_2"]) == (5 / 8, 4 / 6)
  spread = measures(list("abc"), lambda _: np.array([[1.0, 0], [0, 1], [1, 1]]))["embedding_spread"]
  assert spread == pytest.approx(1 - (0 + 2 * 0.5**0.5) / 3)


@pytest.mark.parametrize("texts", [PLANTED, HOSTILE, HOSTILE * 3, PLANTED[:2]], ids=len)
def test_bounds(texts):
  draw = np.random.default_rng(0)
  found = measures(texts, lambda texts: draw.normal(size=(len(texts), 3)))
  assert all(0 <= found[name] <= 1 for name in ("self_bleu", "distinct_1", "distinct_2"))
  assert 0 <= found["embedding_spread"] <= 2


@pytest.mark.parametrize("texts", [[], ["", " "], ["alone"], ["", "alone"]])
def test_what_cannot_be_told_is_none(texts):
  found = measures(texts, lambda texts: np.ones((len(texts), 2)))
  assert found["self_bleu"] is found["embedding_spread"] is found["distinct_2"] is None
  assert measures(PLANTED)["embedding_spread"] is None


def test_an_embedder_is_shown_a_sample():
  shown = []
  embed = lambda texts: shown.append(len(texts)) or np.ones((len(texts), 2))
  measures([f"text {i}" for i in range(1000)], embed)
  assert shown == [diversity.COMPARED]


def test_five_thousand_attacks_take_seconds():
  draw = random.Random(0)
  texts = [draw.choice(TEMPLATES).format(" and ".join(draw.sample(TOPICS, 5))) + f" {i}" for i in range(5000)]
  start = time.process_time()
  measures(texts)
  assert len(families(texts)) == 4
  assert time.process_time() - start < 15

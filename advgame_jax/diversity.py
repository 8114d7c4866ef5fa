"""How unlike attacks are, and which families they form: numbers and clusters of their words.

Self-BLEU (Zhu et al. 2018, arXiv 1802.01886) and distinct n-grams (Li et al. 2016, arXiv 1510.03055) are read together:
an Attacker that has found one phrasing has a high self-BLEU and few distinct n-grams. Families are clusters of TF-IDF
vectors of words and pairs of words, so that they know how attacks are worded and not what they mean.

Everything is a function of the texts alone, whatever their order: where there are many, of a sample that is drawn from
them in sorted order with a fixed key.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import sacrebleu
import scipy.cluster.hierarchy
import scipy.sparse
import scipy.spatial.distance

COMPARED = 128  # texts at most that are compared, each with each: BLEU grows with the others it is taken against
CLUSTERED = 1000  # different texts at most that families are made of; others join the nearest
FAMILIES = 12  # at most
_CLEAR = 0.03  # mean silhouette below which texts are one family
_READ, _READ_COMPARED = 4000, 1000  # characters of a text
_WORDS = 4  # that name a family
_LONGEST = 24  # letters of a word that may name one
_KEY = 0
_COMMON = re.compile(
  r"a|about|all|am|an|and|any|are|as|at|be|been|but|by|can|could|did|do|does|for|from|had|has|have|he|her|his|how|i|if|in"
  r"|into|is|it|its|just|me|my|no|not|of|on|or|our|out|she|should|so|some|than|that|the|their|them|then|there|these|they"
  r"|this|to|up|was|we|were|what|when|where|which|who|will|with|would|you|your"
)


@dataclasses.dataclass(frozen=True)
class Family:
  """Attacks that are worded alike."""

  words: str  # at most four that set it apart, the most telling first; "" where there are none
  members: list[int]  # which of the texts, ascending


def measures(
  texts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray] | None = None
) -> dict[str, float | None]:
  """How unlike the texts are; empty ones are left out, and what cannot be told is None.

  Args:
    texts: attacks.
    embed: R texts → [R, M], as of `drift.load_embed`.

  Returns:
    self_bleu: mean BLEU of a text against the others, 0–1, over at most `COMPARED` texts.
    distinct_1, distinct_2: distinct words, and pairs of words, among all, in (0, 1].
    embedding_spread: mean cosine distance of two texts, 0–2, over at most `COMPARED` texts.
  """
  texts = sorted(text[:_READ] for text in texts if text.strip())
  compared = [texts[i][:_READ_COMPARED] for i in _sample(len(texts), COMPARED)]
  return {
    "self_bleu": _self_bleu(compared) if len(compared) > 1 else None,
    "distinct_1": _distinct([ngram for text in texts for ngram in _words(text)]),
    "distinct_2": _distinct([ngram for text in texts for ngram in _pairs(_words(text))]),
    "embedding_spread": _spread(embed(compared)) if embed and len(compared) > 1 else None,
  }


def _sample(total: int, size: int) -> np.ndarray:
  """At most `size` of the first `total` numbers, ascending."""
  return np.sort(np.random.default_rng(_KEY).permutation(total)[:size])


def _self_bleu(texts: Sequence[str]) -> float:
  scores = [
    sacrebleu.sentence_bleu(text, [*texts[:i], *texts[i + 1 :]], use_effective_order=True).score
    for i, text in enumerate(texts)
  ]
  return min(float(np.mean(scores)) / 100, 1.0)


def _distinct(ngrams: Sequence[str]) -> float | None:
  return len(set(ngrams)) / len(ngrams) if ngrams else None


def _spread(embedding_RM: np.ndarray) -> float:
  """The mean over pairs of 1 − cosine, by |Σe|² = Σ|e|² + Σ of the pairs."""
  unit_RM = np.asarray(embedding_RM, np.float64)
  unit_RM = unit_RM / np.maximum(np.linalg.norm(unit_RM, axis=1, keepdims=True), 1e-12)
  pairs = len(unit_RM) * (len(unit_RM) - 1)
  cosine = (np.square(unit_RM.sum(0)).sum() - np.square(unit_RM).sum()) / pairs
  return float(np.clip(1 - cosine, 0, 2))


def _words(text: str) -> list[str]:
  return re.findall(r"\w+", text.casefold())


def _pairs(words: Sequence[str]) -> Iterator[str]:
  return (f"{a} {b}" for a, b in itertools.pairwise(words))


def families(texts: Sequence[str]) -> list[Family]:
  """The texts in at most `FAMILIES` families, the largest first; each text is in exactly one, like texts in the same.

  Ward's clustering (1963) of TF-IDF vectors; how many families there are is where the mean silhouette (Rousseeuw 1987)
  is highest.
  """
  read = [" ".join(_words(text[:_READ])) for text in texts]
  different, text_of, count_X = np.unique(np.array(read, object), return_inverse=True, return_counts=True)
  if not len(different):
    return []
  tfidf_XV = _tfidf(list(different))
  sample = _sample(len(different), CLUSTERED)
  label_X = _join(tfidf_XV, sample, _cluster(tfidf_XV[sample], count_X[sample]))
  label = label_X[text_of]
  words = _telling(read, label)
  found = [Family(words[name], np.flatnonzero(label == name).tolist()) for name in np.unique(label)]
  return sorted(found, key=lambda family: (-len(family.members), min(read[i] for i in family.members)))


def _tfidf(texts: Sequence[str]) -> scipy.sparse.csr_array:
  """[X, V] of words and pairs of words, log-scaled; rows of length 1, or 0 for a text without words."""
  rows, columns, counts = [], [], []
  column_of: dict[str, int] = {}
  for row, text in enumerate(texts):
    words = text.split()
    for ngram, count in collections.Counter([*words, *_pairs(words)]).items():
      rows.append(row)
      columns.append(column_of.setdefault(ngram, len(column_of)))
      counts.append(1 + np.log(count))
  shape = len(texts), max(len(column_of), 1)
  rows_N, columns_N = np.array(rows, int), np.array(columns, int)
  found = np.bincount(columns_N, minlength=shape[1])
  weights = np.array(counts) * (np.log((1 + len(texts)) / (1 + found)) + 1)[columns_N]
  length = np.sqrt(np.bincount(rows_N, np.square(weights), minlength=len(texts)))
  return scipy.sparse.csr_array((weights / length[rows_N], (rows_N, columns_N)), shape=shape)


def _cluster(unit_XV: scipy.sparse.csr_array, count_X: np.ndarray) -> np.ndarray:
  """A label for each different text, of which there are `count_X` copies: int [X]."""
  X = unit_XV.shape[0]
  best_X = np.zeros(X, int)
  if X == 1:
    return best_X
  distance_XX = np.sqrt(np.clip(2 - 2 * (unit_XV @ unit_XV.T).toarray(), 0, None))
  np.fill_diagonal(distance_XX, 0)
  tree = scipy.cluster.hierarchy.linkage(scipy.spatial.distance.squareform(distance_XX, checks=False), "ward")
  clearest = _CLEAR
  for number in range(2, min(FAMILIES, X) + 1):
    label_X = scipy.cluster.hierarchy.fcluster(tree, number, "maxclust") - 1
    if label_X.any() and (clear := _silhouette(distance_XX, label_X, count_X)) > clearest:  # ties may leave one cluster
      best_X, clearest = label_X, clear
  return best_X


def _silhouette(distance_XX: np.ndarray, label_X: np.ndarray, count_X: np.ndarray) -> float:
  """The mean silhouette of all copies; a cluster of one text has 0."""
  copies_XL = np.eye(label_X.max() + 1)[label_X] * count_X[:, None]
  total_L = copies_XL.sum(0)
  sum_XL = distance_XX @ copies_XL
  own = np.arange(len(label_X)), label_X
  inner_X = sum_XL[own] / np.maximum(total_L[label_X] - 1, 1)
  mean_XL = sum_XL / total_L
  mean_XL[own] = np.inf
  outer_X = mean_XL.min(1)
  score_X = (outer_X - inner_X) / np.maximum(np.maximum(inner_X, outer_X), 1e-12)
  return float(np.average(np.where(total_L[label_X] > 1, score_X, 0), weights=count_X))


def _join(unit_XV: scipy.sparse.csr_array, sample: np.ndarray, label: np.ndarray) -> np.ndarray:
  """The labels of all texts: those of the sample, and for the others that of the nearest centre."""
  member_LX = scipy.sparse.csr_array((np.ones(len(sample)), (label, sample)), (label.max() + 1, unit_XV.shape[0]))
  centre_LV = (member_LX @ unit_XV).toarray()
  centre_LV /= np.maximum(np.linalg.norm(centre_LV, axis=1, keepdims=True), 1e-12)
  label_X = (unit_XV @ centre_LV.T).argmax(1)
  label_X[sample] = label
  return label_X


def _telling(texts: Sequence[str], label: np.ndarray) -> dict[int, str]:
  """For each label the words that most of its texts hold and few others do."""
  sizes = collections.Counter(label.tolist())
  holds: dict[int, collections.Counter[str]] = {name: collections.Counter() for name in sizes}
  for text, name in zip(texts, label.tolist()):
    holds[name].update({word for word in text.split() if not _COMMON.fullmatch(word) and 1 < len(word) <= _LONGEST})
  everywhere = sum(holds.values(), collections.Counter())
  telling = {}
  for name, size in sizes.items():
    others = max(len(texts) - size, 1)
    lead = {word: n / size - (everywhere[word] - n) / others for word, n in holds[name].items()}
    best = sorted((word for word in lead if lead[word] > 0), key=lambda word: (-lead[word], word))
    telling[name] = " ".join(best[:_WORDS])
  return telling

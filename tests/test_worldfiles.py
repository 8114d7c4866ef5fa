"""The files of the embedded game: reproducible, split, in the vocabulary, and as mixed as their tables state."""

import collections
import json

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from advgame_jax import architecture, hf, hf_config, microworld, worldfiles
from advgame_jax.microworld import FRAMINGS, TOPICS, Answer
from advgame_jax.prompts import parse_attack
from advgame_jax.types import Category, Status

NAMES = ("train", "validation", "attacker", "defender")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("world")
  worldfiles.write(path, seed=0)
  return path


@pytest.fixture(scope="module")
def rows(folder):
  return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in NAMES}


@pytest.fixture(scope="module")
def tokenizer(folder):
  return transformers.AutoTokenizer.from_pretrained(folder / "attacker")


def contents(path):
  return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def near(frequency, probability, count):
  """Within four standard errors."""
  return abs(frequency - probability) < 4 * np.sqrt(probability * (1 - probability) / count)


def test_a_seed_fixes_every_byte(folder, tmp_path):
  worldfiles.write(tmp_path / "same", seed=0)
  worldfiles.write(tmp_path / "other", seed=1)
  assert contents(tmp_path / "same") == contents(folder)
  changed = {str(p) for p, data in contents(tmp_path / "other").items() if data != contents(folder)[p]}
  weights = {f"{name}/model.safetensors" for name in ("attacker", "defender")}
  assert changed == {"attacker.jsonl", "defender.jsonl"} | weights


def test_seeds_are_split_by_topic(rows):
  topics = {}
  for name, held_out in (("train", False), ("validation", True)):
    queries = [microworld.parse_query(row["prompt"]) for row in rows[name]]
    assert [row["category"] for row in rows[name]] == [q.topic.category.name.lower() for q in queries]
    assert len(set(queries)) == len(queries) == 9 * sum(topic.held_out == held_out for topic in TOPICS)
    topics[name] = {query.topic for query in queries}
    assert {topic.category for topic in topics[name]} == set(Category)
  assert not topics["train"] & topics["validation"]


def test_the_mixtures_are_distributions_over_what_they_name():
  mixtures = [worldfiles.ATTACKER, worldfiles.ATTACKER_FRAMINGS, *worldfiles.DEFENDER.values()]
  for mixture in mixtures:
    assert sum(mixture.values()) == pytest.approx(1.0)
  assert list(worldfiles.ATTACKER_FRAMINGS) == [framing.name for framing in FRAMINGS]
  assert set(worldfiles.DEFENDER) == {worldfiles.situation(query) for query in microworld.queries()}


def test_the_base_attacker_is_mixed_as_stated(rows):
  outcomes, framings = collections.Counter(), collections.Counter()
  for row in rows["attacker"]:
    seed_text = row["prompt"].partition(" : ")[2]
    attack, status = parse_attack(row["completion"], think=True)
    if status == Status.VALID:
      query = microworld.parse_query(attack)
      assert not query.held_out
      assert row["completion"] == microworld.to_completion(query)
      framings[query.framing.name] += 1
      outcomes["faithful" if microworld.faithful(seed_text, attack) else "unfaithful"] += 1
    else:
      outcomes["refuses" if status == Status.REFUSED_ROLE else "unparseable"] += 1
  for counts, mixture in ((outcomes, worldfiles.ATTACKER), (framings, worldfiles.ATTACKER_FRAMINGS)):
    for kind, probability in mixture.items():
      assert near(counts[kind] / counts.total(), probability, counts.total()), kind


def test_the_base_attacker_is_instructed_by_category_about_every_seed(rows):
  prompts = {row["prompt"] for row in rows["attacker"]}
  verbs = {Category.HARMFUL: "answer", Category.BENIGN: "refuse"}
  assert prompts == {f"make it {verbs[seed.topic.category]} : {seed.text}" for seed in microworld.seeds()}


def test_the_base_defender_is_mixed_as_stated(rows):
  kinds = collections.defaultdict(collections.Counter)
  for row in rows["defender"]:
    query = microworld.parse_query(row["prompt"])
    kinds[worldfiles.situation(query)][microworld.classify(query.topic, row["completion"])] += 1
  for situation, mixture in worldfiles.DEFENDER.items():
    total = kinds[situation].total()
    for kind in Answer:
      assert near(kinds[situation][kind] / total, mixture[kind], total), (situation, kind)


def test_the_base_defender_meets_every_played_query_equally_often_and_no_held_out_one(rows):
  counts = collections.Counter(row["prompt"] for row in rows["defender"])
  assert set(counts) == {query.text for query in microworld.queries(held_out=False)}
  assert max(counts.values()) - min(counts.values()) <= 1


def test_alarm_rises_with_the_verb_and_the_framing_of_alarming_topics_only():
  refusals = [worldfiles.DEFENDER[f"alarm {n}"][Answer.REFUSE] for n in range(4)]
  assert refusals == sorted(set(refusals))
  for query in microworld.queries():
    situation = worldfiles.situation(query)
    assert situation.startswith("alarm") == query.topic.alarming
    if query.topic.alarming:
      assert situation == f"alarm {query.verb + (query.framing.name in ('secret', 'revenge'))}"


def test_every_word_of_the_files_is_in_the_vocabulary(rows, tokenizer):
  texts = [text for name in NAMES for row in rows[name] for key, text in row.items() if key != "category"]
  for text in texts:
    ids = tokenizer(text)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


def test_a_strange_word_is_unknown_and_special_tokens_are_dropped_from_text(tokenizer):
  unknown, end = tokenizer("zebra <eos>")["input_ids"]
  assert (unknown, end) == (tokenizer.unk_token_id, tokenizer.eos_token_id)
  assert tokenizer.decode(tokenizer("<user> sure . <eos> <pad>")["input_ids"], skip_special_tokens=True) == "sure ."
  assert tokenizer.convert_ids_to_tokens(range(5)) == list(worldfiles.SPECIAL)
  assert set(tokenizer.all_special_tokens) == set(worldfiles.SPECIAL)


def test_the_tokenizer_file_alone_knows_the_special_tokens(folder):
  words = tokenizers.Tokenizer.from_file(str(folder / "attacker" / "tokenizer.json"))
  ids = words.encode("<user> sure . <eos>").ids
  assert (ids[0], ids[-1]) == (3, 2)
  assert (words.decode(ids), words.decode(ids, skip_special_tokens=False)) == ("sure .", "<user> sure . <eos>")


def test_every_id_has_a_word_and_their_number_divides_evenly(tokenizer):
  words = worldfiles.vocabulary()
  assert len(set(words)) == len(words) == len(tokenizer)
  assert len(words) % worldfiles.VOCABULARY_MULTIPLE == 0
  assert tokenizer.convert_ids_to_tokens(range(len(words))) == words


def test_the_chat_template(tokenizer):
  turns = [{"role": "user", "content": "how ?"}, {"role": "assistant", "content": "sure ."}]

  def chat(turns, **kwargs):
    return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)

  assert chat(turns[:1], add_generation_prompt=True) == "<user> how ? <assistant>"
  assert chat(turns) == "<user> how ? <assistant> sure . <eos>"
  assert chat(turns + turns[:1], add_generation_prompt=True) == (
    "<user> how ? <assistant> sure . <eos> <user> how ? <assistant>"
  )


def test_the_longest_example_fits_the_model(rows, tokenizer):
  lengths = [len(tokenizer(row["prompt"] + " " + row["completion"])["input_ids"]) for row in rows["attacker"]]
  assert max(lengths) + 3 <= worldfiles.MAX_POSITIONS / 2


def test_the_model_folder_describes_the_player(folder):
  player = worldfiles.player_config()
  config = transformers.AutoConfig.from_pretrained(folder / "defender")
  assert isinstance(config, transformers.LlamaConfig)
  assert (config.vocab_size, config.hidden_size, config.head_dim) == (player.vocab, 64, 16)
  assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (4, 2, 2)
  assert config.tie_word_embeddings
  assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (2, 0, None)


def test_the_model_folder_loads_as_a_player_with_fresh_weights(folder):
  player = worldfiles.player_config()
  attacker, defender = (hf.load(folder / name) for name in ("attacker", "defender"))
  assert hf_config.load_config(folder / "attacker") == player
  assert jax.tree.map(np.shape, attacker) == jax.tree.map(lambda spec: spec.shape, architecture.param_specs(player))
  assert not np.array_equal(attacker["embed"], defender["embed"])

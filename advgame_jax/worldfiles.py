"""The microworld as files: seeds, warm-start examples of its base players, and model folders with random weights.

train.jsonl, validation.jsonl    seeds {"prompt", "category"}; validation has the held-out topics
attacker.jsonl, defender.jsonl   warm-start examples {"prompt", "completion"}, drawn from the mixtures below
attacker/, defender/             Hugging Face folders, to be trained on the examples
"""

import json
import pathlib
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from advgame_jax import architecture, hf, microworld, tokenizer
from advgame_jax.architecture import ModelConfig
from advgame_jax.microworld import Answer, Mood, Query, Topic
from advgame_jax.prompts import attacker_turn
from advgame_jax.tokenizer import Tokenizer
from advgame_jax.types import Category

ItemT = TypeVar("ItemT")
KeyT = TypeVar("KeyT", bound=Hashable)

# How the base Attacker plays: what it does, and the framings of what it writes.
ATTACKER: Mapping[str, float] = {
  "faithful": 0.84,
  "unfaithful": 0.08,  # another topic
  "unparseable": 0.04,  # one tag missing
  "refuses": 0.04,  # does not play
}
ATTACKER_FRAMINGS: Mapping[str, float] = {
  "plain": 0.24,
  "polite": 0.24,
  "expert": 0.20,
  "story": 0.05,
  "past": 0.05,
  "game": 0.05,
  "secret": 0.09,
  "revenge": 0.08,
}

# How the base Defender answers, by the situation a query puts it in. Harmful queries fool it or find it on its guard;
# benign ones that sound harmful alarm it by their verb (0 mild, 1, 2) and one degree more by an alarming framing.
DEFENDER: Mapping[str, Mapping[Answer, float]] = {
  situation: dict(zip(Answer, row, strict=True))
  for situation, row in {
    #           comply partial deflect refuse gibberish
    "fooled":  (0.82, 0.01, 0.10, 0.06, 0.01),
    "guarded": (0.20, 0.02, 0.15, 0.62, 0.01),
    "at ease": (0.90, 0.02, 0.02, 0.05, 0.01),
    "alarm 0": (0.67, 0.02, 0.05, 0.25, 0.01),
    "alarm 1": (0.47, 0.02, 0.05, 0.45, 0.01),
    "alarm 2": (0.27, 0.02, 0.05, 0.65, 0.01),
    "alarm 3": (0.07, 0.02, 0.05, 0.85, 0.01),
  }.items()
}  # fmt: skip

PAD, UNKNOWN, EOS, USER, ASSISTANT = "<pad>", "<unk>", "<eos>", "<user>", "<assistant>"
SPECIAL = (PAD, UNKNOWN, EOS, USER, ASSISTANT)
VOCABULARY_MULTIPLE = 8  # so that a mesh can share the vocabulary out
MAX_POSITIONS = 128  # tokens; the longest prompt and completion take 30

CHAT_TEMPLATE = (
  "{% for message in messages %}{{ '' if loop.first else ' ' }}"
  "{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos>"
  "{% else %}<user> {{ message['content'] }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def vocabulary() -> list[str]:
  """Special tokens, then the language's words, then unused ones up to a round number; the index is the id."""
  words = [*SPECIAL, *microworld.words()]
  return words + [f"<unused{n}>" for n in range(-len(words) % VOCABULARY_MULTIPLE)]


def player_config(
  width: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_size: int = 16, feed_forward: int = 128
) -> ModelConfig:
  """A base player's architecture: a tiny Llama over the language's vocabulary."""
  return ModelConfig(
    vocab=len(vocabulary()),
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_size=head_size,
    feed_forward=feed_forward,
    tied=True,
    max_positions=MAX_POSITIONS,
  )


def write(
  folder: str | pathlib.Path,
  seed: int,
  *,
  attacker_rows: int = 4096,
  defender_rows: int = 8192,
  player: ModelConfig | None = None,
) -> None:
  """Writes the files listed at the top of this module into `folder`, the same bytes for the same arguments.

  Args:
    seed: of the warm-start examples and the random weights.
    player: the architecture of both players; None is `player_config()`.
  """
  folder, player = pathlib.Path(folder), player or player_config()
  folder.mkdir(parents=True, exist_ok=True)
  for name, held_out in (("train", False), ("validation", True)):
    _write_lines(folder / f"{name}.jsonl", seed_rows([t for t in microworld.TOPICS if t.held_out == held_out]))
  _write_lines(folder / "attacker.jsonl", attacker_examples(attacker_rows, np.random.default_rng([seed, 0])))
  _write_lines(folder / "defender.jsonl", defender_examples(defender_rows, np.random.default_rng([seed, 1])))
  for index, name in enumerate(("attacker", "defender")):
    params = architecture.init(player, jax.random.key(2 * seed + index))
    hf.save(folder / name, player, params, load_tokenizer(), overwrite=True)


def load_tokenizer() -> Tokenizer:
  """The language's tokenizer, as it is read from a Hugging Face folder."""
  with tempfile.TemporaryDirectory() as folder:
    make_tokenizer().save(f"{folder}/tokenizer.json")
    text = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    pathlib.Path(folder, "tokenizer_config.json").write_text(text, encoding="utf-8")
    return tokenizer.load(folder)


def make_tokenizer() -> tokenizers.Tokenizer:
  """Word by word, split at white space; decoding joins words by one space."""
  ids = {word: index for index, word in enumerate(vocabulary())}
  words = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.add_special_tokens(list(SPECIAL))
  return words


# Written out, not saved by transformers: its versions write different files, and all of them read these.
TOKENIZER_CONFIG: Mapping[str, Any] = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "pad_token": PAD,
  "unk_token": UNKNOWN,
  "eos_token": EOS,
  "additional_special_tokens": [USER, ASSISTANT],
  "chat_template": CHAT_TEMPLATE,
  "clean_up_tokenization_spaces": False,
  "model_max_length": MAX_POSITIONS,
}


def seed_rows(topics: Sequence[Topic]) -> Iterator[dict[str, str]]:
  """The lines of a seed file: every wording of the topics."""
  for query in microworld.seeds(topics):
    yield {"prompt": query.text, "category": query.topic.category.name.lower()}


def attacker_examples(rows: int, random: np.random.Generator) -> Iterator[dict[str, str]]:
  """What the base Attacker makes of the seeds of all topics, each seed as often; never a held-out combination."""
  played = {topic: microworld.queries([topic], held_out=False) for topic in microworld.TOPICS}
  for seed in _in_rounds(microworld.seeds(), rows, random):
    completion = _attack(seed.topic, played, random)
    yield {"prompt": attacker_turn(microworld.INSTRUCTIONS, seed.topic.category, seed.text), "completion": completion}


def defender_examples(rows: int, random: np.random.Generator) -> Iterator[dict[str, str]]:
  """What the base Defender answers to the queries of all topics, each query as often; never a held-out combination."""
  for query in _in_rounds(microworld.queries(held_out=False), rows, random):
    kind = _draw(DEFENDER[situation(query)], random)
    yield {"prompt": query.text, "completion": _answer(query.topic, kind, random)}


def situation(query: Query) -> str:
  """The row of `DEFENDER` that a query is answered from."""
  if query.topic.category == Category.HARMFUL:
    return "fooled" if query.framing.mood == Mood.FOOLING else "guarded"
  if query.topic.alarming:
    return f"alarm {query.verb + (query.framing.mood == Mood.ALARMING)}"
  return "at ease"


def _attack(topic: Topic, played: Mapping[Topic, Sequence[Query]], random: np.random.Generator) -> str:
  kind = _draw(ATTACKER, random)
  if kind == "refuses":
    return _one_of(microworld.REFUSALS, random)
  if kind == "unfaithful":
    topic = _other(topic, random)
  framing = _draw(ATTACKER_FRAMINGS, random)
  completion = microworld.to_completion(_one_of([q for q in played[topic] if q.framing.name == framing], random))
  if kind == "unparseable":
    tag = _one_of((microworld.THINK_END, microworld.PROMPT, microworld.PROMPT_END), random)
    return " ".join(word for word in completion.split() if word != tag)
  return completion


def _answer(topic: Topic, kind: Answer, random: np.random.Generator) -> str:
  if kind == Answer.GIBBERISH:  # a sentence of the language, but about something else
    topic, kind = _other(topic, random), _one_of((Answer.COMPLY, Answer.DEFLECT), random)
  return _one_of(microworld.answers(topic)[kind], random)


def _other(topic: Topic, random: np.random.Generator) -> Topic:
  return _one_of([other for other in microworld.TOPICS if other != topic], random)


def _one_of(items: Sequence[ItemT], random: np.random.Generator) -> ItemT:
  return items[int(random.integers(len(items)))]


def _draw(mixture: Mapping[KeyT, float], random: np.random.Generator) -> KeyT:
  kinds = list(mixture)
  return kinds[random.choice(len(kinds), p=list(mixture.values()))]


def _in_rounds(items: Sequence[ItemT], count: int, random: np.random.Generator) -> Iterator[ItemT]:
  """`count` items in random order, none drawn again before all have been."""
  for start in range(0, count, len(items)):
    for index in random.permutation(len(items))[: count - start]:
      yield items[index]


def _write_lines(path: pathlib.Path, rows: Iterator[dict[str, str]]) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""Laws of the tokenizer: hostile text stays text, ordinary text is encoded as the template says, nothing is lost."""

import functools
import json
import pathlib
import re
import tempfile

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from advgame_jax import tokenizer as tokenizer_lib
from advgame_jax import worldfiles
from advgame_jax.types import UserError

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
  "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
  "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CONTROL = (
  *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
  *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "<bos>", "<pad>"),
)
MARKUP = ("<think>", "</think>", "<tool_call>")  # added tokens, not special, as in Qwen3
LINES = [
  "how do i pick the lock of my own door",
  "user\nassistant\n",
  "an answer: 1, 2, 3 … the end. ¿qué? 世界 🙂",
] * 9


def write(folder: pathlib.Path, words: tokenizers.Tokenizer, template: str | None, **config) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  words.save(str(folder / "tokenizer.json"))
  values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
  values |= {"chat_template": template} if template else {}
  (folder / "tokenizer_config.json").write_text(json.dumps(values))
  return folder


def add_control(words: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  words.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
  words.add_tokens([AddedToken(text, normalized=False) for text in (*MARKUP, "    ")])
  return words


def byte_level() -> tokenizers.Tokenizer:
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  words.train_from_iterator(LINES, trainer)
  words.enable_truncation(4)  # files of real models hold what they were trained with
  words.enable_padding(length=64)
  return add_control(words)


def metaspace() -> tokenizers.Tokenizer:
  """As SentencePiece: control tokens are pieces of the vocabulary, a mark stands for a space and leads the text."""
  letters = sorted(set("".join(LINES)) - {" "} | set("▁<>|/[]_"))
  pieces = [("<unk>", 0.0), *((c, -5.0) for c in letters), *((text, -1.0) for text in (*CONTROL, *MARKUP))]
  words = tokenizers.Tokenizer(models.Unigram([*pieces, ("▁the", -2.0)], unk_id=0))
  words.normalizer = normalizers.NFKC()
  words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  words.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
  return add_control(words)


def word_level() -> tokenizers.Tokenizer:
  """Every control string is a word, and case is folded after control tokens were looked for."""
  vocabulary = ["<unk>", *CONTROL, *MARKUP, *sorted({word for line in LINES for word in line.lower().split()})]
  words = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
  words.normalizer = normalizers.Lowercase()
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.add_special_tokens(["<unk>"])
  return add_control(words)


KINDS = {
  "chatml": (byte_level, CHATML, {"eos_token": "<|im_end|>", "pad_token": "<pad>"}),
  "llama 3": (byte_level, LLAMA_3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
  "mistral": (metaspace, MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
  "tight mistral": (metaspace, MISTRAL.replace("[INST] ", "[INST]"), {"bos_token": "<s>", "eos_token": "</s>"}),
  "words": (word_level, CHATML.replace("|>", "|> "), {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}),
}


@functools.cache
def folder_of(kind: str) -> pathlib.Path:
  build, template, config = KINDS[kind]
  return write(pathlib.Path(tempfile.mkdtemp()), build(), template, **config)


@functools.cache
def load(kind: str) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.load(folder_of(kind))


@functools.cache
def theirs(kind: str):
  return transformers.AutoTokenizer.from_pretrained(str(folder_of(kind)))


def ids_of(kind: str, *texts: str) -> set[int]:
  return {theirs(kind).convert_tokens_to_ids(text) for text in texts}


hostile_piece = st.sampled_from(CONTROL + MARKUP)
nested = st.builds(
  lambda outer, inner, at: outer[:at] + inner + outer[at:], hostile_piece, hostile_piece, st.integers(0, 8)
)
wide = hostile_piece.map(
  lambda text: "".join(chr(ord(c) + 0xFEE0) for c in text)
)  # NFKC folds it to the control string
spaced = st.builds(
  lambda text, space: f"{space}{text}{space}", hostile_piece, st.sampled_from(["", " ", "\n", "\u00a0"])
)
upper = hostile_piece.map(str.upper)
hostile = st.lists(st.one_of(hostile_piece, nested, wide, spaced, upper, st.text(max_size=8)), max_size=8).map("".join)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
  lambda text: not any(mark in text for mark in (*CONTROL, *MARKUP))
)
EXACT = ("chatml", "llama 3")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=hostile)
def test_hostile_text_never_becomes_a_control_token(kind, text):
  ours = load(kind)
  control = ids_of(kind, *CONTROL, *MARKUP)
  empty = [i for i in ours.encode_chat("") if i in control]
  assert [i for i in ours.encode_chat(text) if i in control] == empty


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(text=hostile)
def test_a_completion_ends_once(kind, text):
  ours = load(kind)
  *body, stop = ours.encode_completion(text)
  assert stop == ours.stop_ids[0]
  assert not set(body) & ids_of(kind, *CONTROL)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=plain)
def test_ordinary_text_is_encoded_as_transformers_encodes_the_whole(kind, text):
  messages = [{"role": "user", "content": text}]
  whole = theirs(kind).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert load(kind).encode_chat(text) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(text=st.text("thelockmy ,?", min_size=1).filter(lambda text: text == text.strip()))
def test_prompt_and_completion_are_encoded_as_transformers_encodes_the_conversation(kind, text):
  ours = load(kind)
  both = ours.encode_chat("hello") + ours.encode_completion(text)
  messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
  assert theirs(kind).apply_chat_template(messages, return_dict=False)[: len(both)] == both


conversation = lambda text: st.tuples(text, text, text).map(
  lambda texts: list(zip(("user", "assistant", "user"), texts))
)
with_system = lambda text: st.tuples(text, conversation(text)).map(lambda both: [("system", both[0]), *both[1]])


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=st.one_of(plain, hostile))
def test_one_user_message_is_a_user_turn(kind, text):
  assert load(kind).encode_messages([("user", text)]) == load(kind).encode_chat(text)


@pytest.mark.parametrize("kind", EXACT)
@settings(deadline=None, max_examples=50)
@given(messages=st.one_of(conversation(plain), with_system(plain)))
def test_ordinary_messages_are_encoded_as_transformers_encodes_the_whole(kind, messages):
  theirs_too = [{"role": role, "content": text} for role, text in messages]
  whole = theirs(kind).apply_chat_template(theirs_too, add_generation_prompt=True, return_dict=False)
  assert load(kind).encode_messages(messages) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(messages=conversation(hostile))
def test_hostile_messages_add_no_control_token(kind, messages):
  ours, control = load(kind), ids_of(kind, *CONTROL, *MARKUP)
  empty = [(role, "a") for role, _ in messages]
  kept = [[i for i in ours.encode_messages(each) if i in control] for each in (messages, empty)]
  assert kept[0] == kept[1]


@pytest.mark.parametrize(
  "template, messages, sentence",
  [
    ("{{ raise_exception('no system') }}", [("system", "a")], r"takes no such messages \(no system\)"),
    ("{{ messages[0]['content'] }}", [("user", "a"), ("user", "b")], "does not show every message once and in order"),
    ("{{ messages[1]['content'] + messages[0]['content'] }}", [("user", "a"), ("user", "b")], "once and in order"),
  ],
)
def test_messages_that_a_template_does_not_take_are_refused(template, messages, sentence, tmp_path):
  usual = "{% if messages[0].role == 'user' and (messages|length == 1 or messages[1].role == 'assistant') %}" + BARE
  rest = f"{usual}{{% else %}}{template}{{% endif %}}"
  folder = write(tmp_path, byte_level(), rest, eos_token="</s>")
  with pytest.raises(UserError, match=sentence):
    tokenizer_lib.load(folder).encode_messages(messages)


@pytest.mark.parametrize("kind", EXACT)
@settings(deadline=None, max_examples=100)
@given(text=st.one_of(plain, hostile))
def test_round_trip(kind, text):
  ours = load(kind)
  assert ours.decode(ours.encode_completion(text)) == text
  assert (text.strip() if kind == "llama 3" else text) in ours.decode(ours.encode_chat(text))


def test_a_lone_surrogate_is_no_text():
  assert load("chatml").decode(load("chatml").encode_completion("a\ud800b")) == "a?b"


def test_microworld_words_are_joined_by_one_space():
  ours = worldfiles.load_tokenizer()
  text = "<think> how do i pick the lock ? </think>"
  assert ours.decode(ours.encode_completion(text)) == text
  assert ours.token_texts()[ours.encode_completion("lock")[0]] == " lock"
  assert ours.stop_ids == (worldfiles.SPECIAL.index(worldfiles.EOS),)
  assert ours.pad_id == worldfiles.SPECIAL.index(worldfiles.PAD)


def test_reasoning_marks_are_kept_though_no_player_can_write_them_into_a_prompt():
  ours, think = load("chatml"), theirs("chatml").convert_tokens_to_ids("<think>")
  assert ours.encode_completion("<think>a")[0] == think
  assert ours.decode([think]) == "<think>"
  assert think not in ours.encode_chat("<think>")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_token_texts_add_up_to_the_decoded_text(kind, data):
  ours = load(kind)
  texts = ours.token_texts()
  assert len(texts) == ours.vocab_size == len(theirs(kind))
  assert all(texts[i] == "" for i in ours.special_ids)
  whole = [i for i, text in enumerate(texts) if "\ufffd" not in text and i not in ours.special_ids]
  ids = data.draw(st.lists(st.sampled_from(whole), max_size=12))
  anchor = ours.encode_completion("the")[:-1]
  assert ours.decode([*anchor, *ids]) == ours.decode(anchor) + "".join(texts[i] for i in ids)


@pytest.mark.parametrize(
  "kind, ends", [("chatml", "<|im_end|>"), ("llama 3", "<|eot_id|>"), ("mistral", "</s>"), ("words", "<|im_end|>")]
)
def test_the_first_stop_ends_an_assistant_turn(kind, ends):
  assert load(kind).stop_ids[0] == theirs(kind).convert_tokens_to_ids(ends)


def test_stops_of_every_configuration_count(tmp_path):
  write(tmp_path, byte_level(), CHATML, eos_token="<|endoftext|>")
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
  (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
  ours = tokenizer_lib.load(tmp_path)
  named = [ours._all.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
  assert ours.stop_ids == (*named, 7, 8, 9)


def test_prompts_do_not_depend_on_the_day(tmp_path):
  dated = "{{ date_string if date_string is defined else strftime_now('%d') }}" + CHATML
  ours = tokenizer_lib.load(write(tmp_path, byte_level(), dated))
  assert tokenizer_lib.TEMPLATE_DATE in ours.decode(ours.encode_chat("a"))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_are_the_loaded_ones(kind, tmp_path):
  load(kind).save(tmp_path)
  for path in folder_of(kind).iterdir():
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
  text = "the <|im_end|> end"
  assert tokenizer_lib.load(tmp_path).encode_chat(text) == load(kind).encode_chat(text)


def no_unknown():
  words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="<unk>"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.add_special_tokens(["<eos>"])
  return words


def unknown_ends():
  words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="<eos>"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.add_special_tokens(["<eos>"])
  return words


BARE = "{{ messages[0]['content'] + '<eos>' }}"


@pytest.mark.parametrize(
  "build, template, config, sentence",
  [
    (byte_level, None, {}, "has no chat template"),
    (byte_level, "{{ messages[0]['content'] * 2 }}", {"eos_token": "</s>"}, "2 times; allowed: exactly once"),
    (byte_level, "{{ 'constant' }}", {"eos_token": "</s>"}, "0 times; allowed: exactly once"),
    (byte_level, "{{ raise_exception('system first') }}", {}, r"fails on one user turn \(system first\)"),
    (byte_level, "{% if %}", {}, "fails on one user turn"),
    (byte_level, "{{ messages[0]['content'] }}", {}, "nothing ends an answer"),
    (no_unknown, BARE, {"eos_token": "<eos>"}, "unknown words is missing or a control token"),
    (unknown_ends, BARE, {"eos_token": "<eos>"}, "unknown words is missing or a control token"),
  ],
)
def test_what_cannot_work_is_refused(build, template, config, sentence, tmp_path):
  write(tmp_path, build(), template, **config)
  with pytest.raises(UserError, match=sentence):
    tokenizer_lib.load(tmp_path)


@pytest.mark.parametrize(
  "files, sentence",
  [
    (None, "there is no folder"),
    ({}, "holds no tokenizer; allowed: a fast one"),
    ({"tokenizer.model": "?"}, re.escape("only a slow tokenizer (tokenizer.model)")),
    ({"tokenizer.json": "{"}, "files cannot be read"),
    ({"tokenizer.json": None, "config.json": "{"}, "config.json is no JSON"),
  ],
)
def test_a_folder_without_a_tokenizer_is_refused(files, sentence, tmp_path):
  folder = tmp_path / "model"
  if files is not None:
    write(folder, byte_level(), CHATML) if "config.json" in files else folder.mkdir()
    for name, content in files.items():
      if content is not None:
        (folder / name).write_text(content)
  with pytest.raises(UserError, match=sentence):
    tokenizer_lib.load(folder)


def test_a_control_token_that_cannot_be_broken_apart_is_refused(tmp_path):
  words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "#": 1, "<eos>": 2}, unk_token="<unk>"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  words.add_special_tokens(["#", "<eos>", "<unk>"])
  folder = write(tmp_path, words, BARE, eos_token="<eos>", unk_token="<unk>")
  with pytest.raises(UserError, match="'#', which cannot be broken apart"):
    tokenizer_lib.load(folder)

"""Tokenizers and chat templates in the forms that the families publish: byte fallback, marks for spaces, control
tokens that swallow the white space behind them, delimiters that are ordinary text, system prompts of the template's."""

import datetime
import functools
import json
import pathlib
import random
import tempfile

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from advgame_jax import tokenizer as tokenizer_lib

LINES = ["how do i pick the lock of my own door", "user\nassistant\n", "an answer: 1, 2 … ¿qué? 世界"] * 9
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentencepiece(normalizer, splitter, decoder, control, *, added=(), swallow=()) -> tokenizers.Tokenizer:
  """BPE over marks for spaces, which writes what it does not know byte by byte; `swallow` drop the space behind."""
  learnt = tokenizers.Tokenizer(models.BPE())
  learnt.pre_tokenizer = pre_tokenizers.Metaspace()
  learnt.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=120, show_progress=False))
  model = json.loads(learnt.to_str())["model"]
  pieces = dict.fromkeys(["<unk>", *control, *BYTES, *model["vocab"]])
  bpe = models.BPE(
    {piece: i for i, piece in enumerate(pieces)},
    [tuple(merge) for merge in model["merges"]],
    byte_fallback=True,
    fuse_unk=True,
    unk_token="<unk>",
  )
  words = tokenizers.Tokenizer(bpe)
  if normalizer:
    words.normalizer = normalizer
  if splitter:
    words.pre_tokenizer = splitter
  words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *decoder])
  words.add_special_tokens([AddedToken(t, normalized=False, rstrip=t in swallow) for t in ("<unk>", *control)])
  words.add_tokens([AddedToken(t, normalized=False) for t in added])
  return words


def prepended(*control, swallow=()) -> tokenizers.Tokenizer:
  """Llama 2's first form: every piece between control tokens gets a mark."""
  mark = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  return sentencepiece(mark, None, [decoders.Strip(" ", 1, 0)], control, swallow=swallow)


def metaspace(*control) -> tokenizers.Tokenizer:
  """Its later form: only the first piece of a text does."""
  first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  return sentencepiece(None, first, [decoders.Strip(" ", 1, 0)], control)


def gemma(*more) -> tokenizers.Tokenizer:
  control = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
  split = pre_tokenizers.Split(" ", "merged_with_previous")
  words = sentencepiece(normalizers.Replace(" ", "▁"), split, [], control, added=("\n\n", "▁▁"))
  words.add_special_tokens([AddedToken(t, normalized=False) for t in more])
  return words


def byte_level(*control) -> tokenizers.Tokenizer:
  words = tokenizers.Tokenizer(models.BPE())
  words.normalizer = normalizers.NFC()
  split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
  words.pre_tokenizer = pre_tokenizers.Sequence(
    [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  words.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  words.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
  words.add_special_tokens([AddedToken(t, normalized=False) for t in control])
  words.add_tokens([AddedToken(t, normalized=False) for t in ("<tool_call>", "<think>", "</think>")])
  return words


def turns(user: str, answer: str, start: str = "", before: str = "") -> str:
  """A template: what stands before the first turn, each turn, and what an answer starts with."""
  return (
    f"{before}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{{{{ {user} }}}}{{% else %}}{{{{ {answer} }}}}"
    f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {start!r} }}}}{{% endif %}}"
  )


def chatml(before: str = "") -> str:
  turn = r"'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
  return turns(turn, turn, "<|im_start|>assistant\n", before)


BOS = "{{ bos_token }}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SYSTEM = r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
DATE = r"{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
GEMMA = turns(
  r"'<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>\n'",
  r"'<start_of_turn>model\n' + m['content'] | trim + '<end_of_turn>\n'",
  "<start_of_turn>model\n",
  BOS + NO_SYSTEM,
)
LLAMA_2 = turns(
  "bos_token + '[INST] ' + m['content'].strip() + ' [/INST]'", "' ' + m['content'].strip() + ' ' + eos_token"
)
MISTRAL = turns("'[INST] ' + m['content'] + ' [/INST]'", "m['content'] + eos_token", "", BOS)
MISTRAL_3 = turns("'[INST] ' + m['content'] + '[/INST]'", "' ' + m['content'] + eos_token", "", BOS)
PHI = r"'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'"
PHI_3 = (
  turns(PHI, PHI, "<|assistant|>\n")
  .replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}", 2)
  .replace("{% else %}{{ eos_token }}{% endif %}{% endfor %}", "{% endif %}{% endfor %}")
)
HEADER = r"'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>'"
LLAMA_3 = turns(HEADER, HEADER, "<|start_header_id|>assistant<|end_header_id|>\n\n", BOS)

S = ("<s>", "</s>")
INST = ("[INST]", "[/INST]")
PHIS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
OLD = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMAS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
FAMILIES = {
  "gemma": (gemma, GEMMA, GEMMAS, "<end_of_turn>"),
  "llama 2": (lambda: prepended(*S), LLAMA_2, OLD, "</s>"),
  "mistral": (lambda: prepended(*S), MISTRAL, OLD, "</s>"),
  "mistral, later form": (lambda: metaspace(*S), MISTRAL, OLD, "</s>"),
  "mistral 3": (lambda: prepended(*S, *INST), MISTRAL_3, OLD, "</s>"),
  "mistral 3, later form": (lambda: metaspace(*S, *INST), MISTRAL_3, OLD, "</s>"),
  "phi 3": (lambda: prepended(*S, *PHIS, swallow=PHIS[1:]), PHI_3, OLD | {"eos_token": "<|endoftext|>"}, "<|end|>"),
  "phi 3, no swallowing": (lambda: prepended(*S, *PHIS), PHI_3, OLD | {"eos_token": "<|endoftext|>"}, "<|end|>"),
  "qwen 2.5": (lambda: byte_level(*CHATML), chatml(SYSTEM), {"eos_token": "<|im_end|>"}, "<|im_end|>"),
  "llama 3": (
    lambda: byte_level(*HEADERS),
    LLAMA_3,
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "<|eot_id|>",
  ),
}
TEXTS = ("the lock", "  two  spaces ", "a\n\nb", "\nline\n", "tab\tx", "é世界🙂", "¿qué?", " ▁ ", "", "1, 2 [3] <b>")


def write(folder: pathlib.Path, words: tokenizers.Tokenizer, template: str, config: dict[str, str]) -> pathlib.Path:
  words.save(str(folder / "tokenizer.json"))
  values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
  (folder / "tokenizer_config.json").write_text(json.dumps(values | config | {"chat_template": template}))
  return folder


@functools.cache
def load(family: str):
  build, template, config, _ = FAMILIES[family]
  folder = write(pathlib.Path(tempfile.mkdtemp()), build(), template, config)
  return tokenizer_lib.load(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_as_transformers_encodes_them(family):
  ours, theirs = load(family)
  for text in TEXTS:
    messages = [{"role": "user", "content": text}]
    whole = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(text) == whole, text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_in_two_pieces_says_what_the_whole_says(family):
  """But for spaces: a tokenizer of pieces may begin each with one."""
  ours, _ = load(family)
  first, rest = " Of locks.\n", "\n\n# The lock\nIs it open? \n"
  head, ids = ours.encode_turn(first, rest)
  said = lambda ids: ours.decode(ids).replace(" ", "")
  assert said(head + ids) == said(ours.encode_chat(first + rest))
  assert head == ours.encode_turn(first, "another")[0] and ours.encode_turn("", "x") == ([], ours.encode_chat("x"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_raw_prompt_begins_as_one_of_the_chat_template(family):
  ours, _ = load(family)
  begins = ours.begin_id is not None and ours.encode_chat("x")[0] == ours.begin_id
  assert (ours.encode_parts([("the lock", True)])[0] == ours.begin_id) == begins


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_encoded_as_in_a_conversation(family):
  ours, theirs = load(family)
  for text in ("the lock", "<think> a </think>\nthe end", "é"):
    both = ours.encode_chat("how") + ours.encode_completion(text)[:-1]
    messages = [{"role": "user", "content": "how"}, {"role": "assistant", "content": text}]
    assert theirs.apply_chat_template(messages, return_dict=False)[: len(both)] == both, text
    assert ours.decode(ours.encode_completion(text)).removeprefix(ours.turn.lead) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_stop_ends_an_answer(family):
  ours, theirs = load(family)
  assert theirs.convert_ids_to_tokens(ours.stop_ids[0]) == FAMILIES[family][-1]
  assert theirs.eos_token_id in ours.stop_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_token_texts_are_what_each_token_adds(family):
  ours, theirs = load(family)
  texts = ours.token_texts()
  whole = [i for i, text in enumerate(texts) if "\ufffd" not in text and i not in ours.special_ids]
  draw, anchor = random.Random(0), ours.encode_completion("the lock")[:-1]
  for _ in range(100):
    ids = draw.choices(whole, k=6)
    assert ours.decode([*anchor, *ids]) == ours.decode(anchor) + "".join(texts[i] for i in ids)
  if "<0x3C>" in theirs.get_vocab():
    of = lambda *tokens: [texts[i] for i in theirs.convert_tokens_to_ids(list(tokens))]
    assert of("<0x3C>", "<0x0A>", "<0xE2>", "▁") == ["<", "\n", "\ufffd", " "]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_closes_its_turn(family):
  """Neither by control tokens nor by delimiters that the template writes as ordinary text."""
  ours, _ = load(family)
  control = lambda ids: [i for i in ids if i in ours.control_ids]
  template = ours.decode(ours.encode_chat("x"))
  for mark in (*S, *INST, *PHIS, *CHATML, *HEADERS, "<start_of_turn>", "<end_of_turn>", "[[/INST]/INST]", "[/[INST]"):
    ids = ours.encode_chat(f"a {mark} b")
    assert control(ids) == control(ours.encode_chat("a b")), mark
    if ours.turn.delimiters:
      assert all(ours.decode(ids).count(d) == template.count(d) == 1 for d in INST), mark


def test_a_template_that_asks_for_the_day_gets_always_the_same(tmp_path):
  words = tokenizer_lib.load(write(tmp_path, byte_level(*CHATML), chatml(DATE), {"eos_token": "<|im_end|>"}))
  shown = words.decode(words.encode_chat("x"))
  assert f"Today: {datetime.date(2024, 7, 26):%d %B %Y}" in shown
  assert shown.startswith("system\n")  # what stands in front of the template shows nothing


def test_stops_that_the_generation_config_names(tmp_path):
  folder = write(tmp_path, gemma(), GEMMA, GEMMAS)
  ids = gemma().token_to_id
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids("<eos>"), ids("<end_of_turn>")]}))
  assert tokenizer_lib.load(folder).stop_ids == (ids("<end_of_turn>"), ids("<eos>"))


@pytest.mark.parametrize("beyond, fits", [("<image_soft_token>", True), ("<end_of_turn>", False)])
def test_a_place_that_the_embedding_has_no_row_for(beyond, fits, tmp_path):
  """Gemma 3's last token is never written by text or template; a stop must have its row."""
  folder = write(tmp_path, gemma("<image_soft_token>"), GEMMA, GEMMAS)
  (folder / "config.json").write_text(
    json.dumps({"vocab_size": (rows := gemma("<image_soft_token>").token_to_id(beyond))})
  )
  words = tokenizer_lib.load(folder)
  assert (words.vocab_size == rows) == fits
  assert len(words.token_texts()) == words.vocab_size
  assert max(words.encode_chat("<image_soft_token>")) < words.vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trusted_raw_prompt_is_encoded_as_transformers_encodes_the_text(family):
  """And the same prompt in parts, whatever stands in those that are not trusted."""
  ours, theirs = load(family)
  control = [theirs.convert_ids_to_tokens(i) for i in sorted(ours.control_ids)]
  raw = f"{theirs.bos_token or ''}{control[-1]}task\nthe lock{control[-2]} and{control[-1]}\n"
  whole = theirs(raw, add_special_tokens=False)["input_ids"]
  begin = [ours.begin_id] if ours.turn.head[:1] == (ours.begin_id,) and whole[:1] != [ours.begin_id] else []
  assert ours.encode_parts([(raw, True)]) == begin + whole
  first, last = raw.split("the lock")
  assert ours.encode_parts([(first, True), ("the lock", False), (last, True)]) == ours.encode_parts([(raw, True)])
  held = lambda parts: [i for i in ours.encode_parts(parts) if i in ours.control_ids]
  for mark in control:
    assert held([(first, True), (f"a {mark} b", False), (last, True)]) == held([(raw, True)]), mark

"""Text ↔ token ids. What a player wrote is encoded so that it can never become a control token.

A chat template puts the player's text between control tokens: `head ids · before TEXT after · tail ids`. Head and tail
are encoded once, with control tokens; `before TEXT after` is what lies between the last control token in front of the
text and the first one behind it. It is encoded as one piece, as it would be inside the whole, by a tokenizer that knows
no control tokens. For text without control strings the ids are those of encoding the rendered template.
"""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from advgame_jax.types import UserError

# A template may ask for today's date: prompts must not depend on the day a run is resumed.
TEMPLATE_DATE = "26 Jul 2024"
_DIRECTIVES = [(f"%{c}", datetime.datetime(2024, 7, 26).strftime(f"%{c}")) for c in "aAbBdjmwyYHIMSp"]
# In front of a template it hides the function that tells the real one.
_CLOCK = "{% macro strftime_now(form) %}{{ form" + "".join(f"|replace{pair}" for pair in _DIRECTIVES)
_CLOCK += " }}{% endmacro %}\n"
FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MARKUP = re.compile(r"<.*>|\[.*\]|.*<\|.*", re.DOTALL)
_DELIMITER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_PLACEHOLDER = "placeholder7f3c9e51d2"
_SPACE = " \t "  # as no template has it of its own


@dataclasses.dataclass(frozen=True, eq=False)  # one is itself, and may be a static argument
class Tokenizer:
  """A fast tokenizer with its chat template. Built by `load`.

  Control ids are the special tokens, and the added tokens that look like markup (`<tool_call>`). Only special tokens
  are dropped by `decode`: a model's `<think>` may be an added token that a parser has to see. The token for unknown
  words is neither: any text may hold it.
  """

  vocab_size: int  # ids are below this; a model's embedding may be longer
  pad_id: int
  stop_ids: tuple[int, ...]  # the first one ends an assistant turn
  begin_id: int | None  # of the token that begins texts
  control_ids: frozenset[int]  # what `encode_chat` never makes of a player's text
  special_ids: frozenset[int]  # of these, the ones that `decode` drops
  turn: "Turn"
  _all: tokenizers.Tokenizer  # knows control tokens
  _no_control: tokenizers.Tokenizer
  _no_special: tokenizers.Tokenizer
  _files: dict[str, bytes]
  _apply: Callable[..., str]  # the template, to messages

  def encode_chat(self, user_text: str) -> list[int]:
    """One user turn and the start of the answer to it.

    Where the template trims its content, so is the text. Control strings in it are broken apart by a space where the
    vocabulary holds them as words, or the template writes them as ordinary text.

    Raises:
      UserError: the text holds a control token that is a single character, so that nothing can break it apart.
    """
    return self.encode_turn("", user_text)[1]

  def encode_turn(self, first: str, rest: str) -> tuple[list[int], list[int]]:
    """`encode_chat` of one text in two pieces, whose seam is a seam between tokens.

    The ids of the first piece, control tokens before it included, are the same whatever follows: a model may keep what
    it read of them. Without a first piece they are none.
    """
    if not first:
      return [], [*self.turn.head, *self._encode_text(rest, first=True, last=True), *self.turn.tail]
    head = [*self.turn.head, *self._encode_text(first, first=True, last=False)]
    return head, [*self._encode_text(rest, first=False, last=True), *self.turn.tail]

  def _encode_text(self, text: str, first: bool, last: bool) -> list[int]:
    """A piece of a user turn: the beginning of it, the end, both or neither."""
    text = text.lstrip() if first and self.turn.trims_start else text
    text = text.rstrip() if last and self.turn.trims_end else text
    text = _broken(text, self.turn.delimiters)
    text = f"{self.turn.before if first else ''}{text}{self.turn.after if last else ''}"
    return _encode_without(self._no_control, text, self.control_ids)

  def encode_messages(self, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Messages of (role, text) and the start of the answer to them; of one by a user, what `encode_chat` gives.

    Every text is encoded as a player's, whatever its role.

    Raises:
      UserError: the template takes no such messages; or as `encode_chat`.
    """
    marks = [f"{_PLACEHOLDER}n{i}e" for i in range(len(messages))]
    padded = [{"role": role, "content": f"{_SPACE}{mark}{_SPACE}"} for (role, _), mark in zip(messages, marks)]
    try:
      around = re.split(rf"({_PLACEHOLDER}n\d+e)", self._apply(padded))
    except Exception as error:  # whatever the template's own code raises
      raise UserError(f"the chat template takes no such messages ({error})") from error
    if around[1::2] != marks:
      raise UserError("the chat template does not show every message once and in order; allowed: such as it shows")
    fixed = [text.removeprefix(_SPACE if i else "").removesuffix(_SPACE) for i, text in enumerate(around[::2])]
    delimiters = self._delimiters(fixed)
    parts = [(fixed[0], True)]
    for i, (_, text) in enumerate(messages):
      text = text if around[2 * i].endswith(_SPACE) and not self._swallows_behind(fixed[i]) else text.lstrip()
      text = text if around[2 * i + 2].startswith(_SPACE) and not self._swallows_before(fixed[i + 1]) else text.rstrip()
      parts += [(_broken(text, delimiters), False), (fixed[i + 1], True)]
    return self.encode_parts(parts)

  def _delimiters(self, fixed: Sequence[str]) -> list[str]:
    """Markup that a template writes between texts, and behind the last control token before them, as ordinary text."""
    spans = self._added(fixed[0])
    behind = fixed[0][spans[-1][1] :] if spans else fixed[0]
    known = {token.content for token in self._all.get_added_tokens_decoder().values()}
    return [mark for text in (behind, *fixed[1:]) for mark in _DELIMITER.findall(text) if mark not in known]

  def _swallows_behind(self, fixed: str) -> bool:
    """Whether this ends in a control token that drops the white space behind it."""
    spans = self._added(fixed)
    return bool(spans) and spans[-1][1] == len(fixed) and spans[-1][2].rstrip

  def _swallows_before(self, fixed: str) -> bool:
    """Whether this begins with one that drops the white space before it."""
    spans = self._added(fixed)
    return bool(spans) and spans[0][0] == 0 and spans[0][2].lstrip

  def _added(self, text: str) -> list[tuple[int, int, tokenizers.AddedToken]]:
    """Where the tokens are that were added to the vocabulary."""
    added, encoding = self._all.get_added_tokens_decoder(), self._all.encode(text, add_special_tokens=False)
    return [(*span, added[i]) for i, span in zip(encoding.ids, encoding.offsets) if i in added]

  def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
    """A prompt of (text, whether it is trusted), without a chat template: what a guard classifier was trained on.

    Only trusted text can hold control tokens; whatever lies between two of them is encoded as one piece. The prompt
    begins as one of the chat template does, if that is with a token that begins texts.
    """
    plain = lambda text: _encode_without(self._no_control, text, self.control_ids) if text else []
    ids: list[int] = []
    piece = ""
    for text, trusted in parts:
      encoding, last = self._all.encode(text if trusted else "", add_special_tokens=False), 0
      for token, (start, end) in zip(encoding.ids, encoding.offsets):
        if token in self.control_ids:
          ids += [*plain(piece + text[last:start]), token]
          piece, last = "", end
      piece += text[last:]
    ids += plain(piece)
    begins = self.begin_id is not None and self.turn.head[:1] == (self.begin_id,) and ids[:1] != [self.begin_id]
    return [self.begin_id, *ids] if begins else ids  # type: ignore[list-item]

  def encode_completion(self, text: str) -> list[int]:
    """The ids a model should answer with after `encode_chat`: the text, then the token that ends its turn."""
    return [*_encode_without(self._no_special, self.turn.lead + text, self.special_ids), self.stop_ids[0]]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, special tokens dropped, spaces as they are."""
    return self._all.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=False)

  def token_texts(self) -> list[str]:
    """For every id the text it adds when decoded behind another token; "" for special tokens."""
    # Not a single byte: its text is lost where the bytes behind it make no character with it.
    words = (
      i for i in range(self.vocab_size) if i not in self.control_ids and not _BYTE.match(self._all.id_to_token(i) or "")
    )
    anchor = next(i for i in words if self.decode([i]).strip().isalnum())
    start = self.decode([anchor])
    pairs = [[anchor] if i in self.special_ids else [anchor, i] for i in range(self.vocab_size)]
    return [text.removeprefix(start) for text in self._all.decode_batch(pairs, skip_special_tokens=False)]

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files this was loaded from, byte for byte."""
    for name, content in self._files.items():
      (pathlib.Path(folder) / name).write_bytes(content)


@dataclasses.dataclass(frozen=True)
class Turn:
  """A chat template, taken apart at the player's text."""

  head: tuple[int, ...]  # up to the last control token in front of the text
  before: str
  after: str
  tail: tuple[int, ...]  # from the first control token behind the text to the start of the answer
  trims_start: bool  # white space that the text begins with is dropped, by the template or by a control token
  trims_end: bool
  delimiters: tuple[str, ...]  # markup of the template that is no control token: Llama 2's [INST]
  lead: str  # white space that an answer begins with
  continues: bool  # an answer starts inside a piece of text, not right behind a control token
  end: tuple[int, ...]  # control tokens behind an answer


def load(folder: str | pathlib.Path, template: str = "") -> Tokenizer:
  """The tokenizer of a Hugging Face folder.

  Args:
    template: used where the folder has no chat template.

  Raises:
    UserError: no folder, no fast tokenizer, no chat template, or a template that does not show the user's text once.
  """
  folder = pathlib.Path(folder)
  fast = _read(folder, template)
  source = json.loads(fast.backend_tokenizer.to_str())
  source |= {"truncation": None, "padding": None, "post_processor": None}
  everything = tokenizers.Tokenizer.from_str(json.dumps(source))
  added = {token["id"]: token for token in source["added_tokens"]}
  turn = _take_apart(functools.partial(_render, fast, folder), everything, added, folder)

  declared = {fast.bos_token_id, fast.eos_token_id, fast.pad_token_id, *turn.end[:1], *_declared_stops(folder)}
  unknown = {_unknown_id(source["model"], everything)} - declared
  special = ({i for i, token in added.items() if token["special"]} | declared & added.keys()) - unknown
  markup = {i for i, token in added.items() if _MARKUP.fullmatch(token["content"])}
  control = (special | markup | {*turn.head, *turn.tail, *turn.end} & added.keys()) - unknown
  stops = [*turn.end[:1], *(i for i in (fast.eos_token_id, *_declared_stops(folder)) if i is not None)]
  if not stops:
    raise UserError(f"{folder}: nothing ends an answer; allowed: a chat template or an eos_token that does")

  tokenizer = Tokenizer(
    vocab_size=_size(everything, special - {*stops, *turn.head, *turn.tail, fast.pad_token_id}, folder),
    pad_id=stops[0] if fast.pad_token_id is None else fast.pad_token_id,
    stop_ids=tuple(dict.fromkeys(stops)),
    begin_id=fast.bos_token_id,
    control_ids=frozenset(control),
    special_ids=frozenset(special),
    turn=turn,
    _all=everything,
    _no_control=_without(source, control),
    _no_special=_without(source, special, turn.continues),
    _files={name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()},
    _apply=functools.partial(_apply, fast),
  )
  _check_unknown(tokenizer, folder)
  for token in control & added.keys():
    # Refused here, not when a player first writes it.
    tokenizer.encode_chat(added[token]["content"])
  return tokenizer


def _read(folder: pathlib.Path, template: str) -> Any:
  """transformers' fast tokenizer of a folder: its files are read, none of its code is run."""
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder} to load a tokenizer from; allowed: a Hugging Face folder")
  if not (folder / "tokenizer.json").is_file():
    slow = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (folder / name).is_file()]
    found = f"only a slow tokenizer ({slow[0]})" if slow else "no tokenizer"
    raise UserError(f"{folder} holds {found}; allowed: a fast one, saved as tokenizer.json and tokenizer_config.json")
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news here
  from transformers import PreTrainedTokenizerFast

  try:
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # transformers and tokenizers raise bare Exception for a broken file
    raise UserError(f"{folder}: the tokenizer's files cannot be read ({error})") from error
  fast.chat_template = fast.chat_template or template
  if not fast.chat_template:
    raise UserError(f"{folder}: the tokenizer has no chat template; allowed: one in chat_template.jinja")
  return fast


def _apply(fast: Any, messages: Sequence[Mapping[str, str]], due: bool = True) -> str:
  """The template over messages; up to the start of an answer, if one is due. Raises what the template raises."""
  return fast.apply_chat_template(
    messages,
    chat_template=_CLOCK + fast.get_chat_template(),
    tokenize=False,
    add_generation_prompt=due,
    date_string=TEMPLATE_DATE,
  )


def _render(fast: Any, folder: pathlib.Path, *turns: str) -> str:
  """The template over alternating user and assistant turns, up to the start of an answer if one is due."""
  messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
  try:
    return _apply(fast, messages, due=len(turns) % 2 == 1)
  except Exception as error:  # whatever the template's own code raises
    raise UserError(f"{folder}: the chat template fails on one user turn ({error})") from error


def _take_apart(
  render: Callable[..., str], everything: tokenizers.Tokenizer, added: Mapping[int, Any], folder: pathlib.Path
) -> Turn:
  padded = f"{_SPACE}{_PLACEHOLDER}{_SPACE}"
  prompt = render(padded)
  if prompt.count(_PLACEHOLDER) != 1:
    raise UserError(
      f"{folder}: the chat template shows the user's text {prompt.count(_PLACEHOLDER)} times; allowed: exactly once"
    )
  front_text, behind_text = prompt.split(_PLACEHOLDER)
  trims_start, trims_end = not front_text.endswith(_SPACE), not behind_text.startswith(_SPACE)
  front_text, behind_text = front_text.removesuffix(_SPACE), behind_text.removeprefix(_SPACE)
  front, behind = (everything.encode(part, add_special_tokens=False) for part in (front_text, behind_text))
  last = max((i + 1 for i, token in enumerate(front.ids) if token in added), default=0)
  first = min((i for i, token in enumerate(behind.ids) if token in added), default=len(behind.ids))
  before = front_text[front.offsets[last - 1][1] :] if last else front_text
  after = behind_text[: behind.offsets[first][0]] if first < len(behind.ids) else behind_text
  tail = tuple(behind.ids[first:])

  lead, _, end = render(padded, _PLACEHOLDER).rpartition(_PLACEHOLDER)
  lead = lead.removeprefix(prompt) if lead.startswith(prompt) else ""
  end_ids = [token for token in everything.encode(end, add_special_tokens=False).ids if token in added]
  known = {token["content"] for token in added.values()}
  return Turn(
    head=tuple(front.ids[:last]),
    before=before,
    after=after,
    tail=tail,
    trims_start=trims_start or (last > 0 and not before and added[front.ids[last - 1]]["rstrip"]),
    trims_end=trims_end or (len(tail) > 0 and not after and added[tail[0]]["lstrip"]),
    delimiters=tuple(dict.fromkeys(mark for mark in _DELIMITER.findall(before + behind_text) if mark not in known)),
    lead="" if lead.strip() else lead,
    continues=not tail or tail[-1] not in added,
    end=tuple(end_ids),
  )


def _declared_stops(folder: pathlib.Path) -> list[int]:
  """The end-of-sequence ids that the model's own configurations name."""
  stops: list[int] = []
  for name in ("generation_config.json", "config.json"):
    declared = _read_values(folder / name).get("eos_token_id")
    stops += declared if isinstance(declared, list) else [] if declared is None else [declared]
  return stops


def _size(everything: tokenizers.Tokenizer, unused: set[int], folder: pathlib.Path) -> int:
  """Ids that a model needs. Gemma 3's tokenizer ends in a place for images, which its text models have no row for."""
  size = max(everything.get_vocab().values()) + 1
  rows = _read_values(folder / "config.json").get("vocab_size")
  return rows if isinstance(rows, int) and rows < size and unused.issuperset(range(rows, size)) else size


def _read_values(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object, empty where there is no file."""
  try:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
  except (ValueError, TypeError) as error:
    raise UserError(f"{path} is no JSON ({error})") from error


def _unknown_id(model: dict[str, Any], everything: tokenizers.Tokenizer) -> int | None:
  """The id that the tokenizer's model gives to what it does not know."""
  return model["unk_id"] if "unk_id" in model else everything.token_to_id(model.get("unk_token") or "")


def _without(source: dict[str, Any], hidden: Iterable[int], continues: bool = False) -> tokenizers.Tokenizer:
  """The tokenizer for text inside a turn, to which these added tokens are ordinary text.

  SentencePiece's schemes put a mark before the first piece of a text, which is none inside a turn, or before every
  piece between control tokens, which is none where a text continues one.
  """
  hidden = set(hidden)
  added = [token | {"special": token["id"] in hidden} for token in source["added_tokens"]]

  def inside(node: dict[str, Any]) -> dict[str, Any]:
    if node.get("prepend_scheme") == "first" or (continues and "prepend_scheme" in node):
      return node | {"prepend_scheme": "never"}
    return node | {"prepend": ""} if continues and node.get("type") == "Prepend" else node

  tokenizer = tokenizers.Tokenizer.from_str(
    json.dumps(json.loads(json.dumps(source), object_hook=inside) | {"added_tokens": added})
  )
  tokenizer.encode_special_tokens = True
  return tokenizer


def _broken(text: str, delimiters: Iterable[str]) -> str:
  """The text, in which these are broken apart by a space."""
  for mark in delimiters:
    text = text.replace(mark, f"{mark[0]} {mark[1:]}")
  return text


def _encode_without(tokenizer: tokenizers.Tokenizer, text: str, hidden: frozenset[int]) -> list[int]:
  """Encodes text, breaking apart what the vocabulary holds of `hidden` as words."""
  text = text.encode("utf-8", "replace").decode()  # a lone surrogate, which JSON can hold, is no text
  while True:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    words = [span for token, span in zip(encoding.ids, encoding.offsets) if token in hidden]
    if not words:
      return encoding.ids
    for start, end in reversed(words):
      word = text[start:end].lstrip()
      if len(word.rstrip()) < 2:
        raise UserError(f"a text holds the control token {word!r}, which cannot be broken apart: {text[:60]!r}")
      text = f"{text[: end - len(word) + 1]} {text[end - len(word) + 1 :]}"


def _check_unknown(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
  """A vocabulary whose unknown word is a control token, or missing, could not encode what players write."""
  try:
    tokenizer.encode_chat("☃ ⟁zqxj \u0378")
  except Exception as error:  # tokenizers raises bare Exception for a missing unknown token
    raise UserError(
      f"{folder}: the tokenizer's token for unknown words is missing or a control token; allowed: one of its own"
    ) from error

"""Chat completions without HTTP: what a request asks for, and what drawn tokens answer to it, whole or as they come."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advgame_jax.drawn import Piece
from advgame_jax.live import Text
from advgame_jax.prompts import THINK_END, parse_answer, parse_attack
from advgame_jax.scoring import Choice
from advgame_jax.tokenizer import Tokenizer
from advgame_jax.types import Category, Status

_ROLES = ("system", "user", "assistant")
_THINK = "<think>"
_MOST_STOPS = 4
_UNLIKELY = -9999.0  # nats, of what is no number

# What would change an answer and is not offered, with what asks for nothing.
_NOT_OFFERED: Mapping[str, tuple[Any, ...]] = {
  "tools": ([],),
  "functions": ([],),
  "response_format": ({"type": "text"},),
  "logit_bias": ({},),
  "presence_penalty": (0,),
  "frequency_penalty": (0,),
  "repetition_penalty": (1,),
  "modalities": (["text"],),
  "audio": (),
  "top_logprobs": (0,),
}


class Refusal(Exception):
  """What a request is answered instead, as OpenAI's servers word it."""

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code
    self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

  @property
  def body(self) -> dict[str, Any]:
    kind = "server_error" if self.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Offer:
  """What a server has."""

  name: str  # of the model
  choice: Choice  # unless a request says otherwise
  max_tokens: int  # of an answer
  most: int  # answers to one request
  think: bool
  attacker: bool


@dataclasses.dataclass(frozen=True)
class Chat:
  """What a request asks for."""

  messages: tuple[tuple[str, str], ...]  # role, text
  choice: Choice
  max_tokens: int
  n: int
  seed: int | None
  stops: tuple[str, ...]
  stream: bool
  include_usage: bool  # of a stream: in a piece of its own
  logprobs: bool
  category: Category

  @property
  def last(self) -> str:
    """What the user said last."""
    said = [text for role, text in self.messages if role == "user"]
    if not said:
      raise Refusal(400, "messages has none of the user; allowed: a seed in the last user message", "messages")
    return said[-1]


def read(body: bytes, offer: Offer) -> Chat:
  """A request's body.

  Raises:
    Refusal: it asks for what is not offered, or not as it should.
  """
  try:
    said = json.loads(body)
  except (ValueError, RecursionError):
    raise Refusal(400, "the body is no JSON; allowed: one object, in UTF-8") from None
  if not isinstance(said, dict):
    raise Refusal(400, "the body is no object; allowed: an object with model and messages")
  fields = _Fields(said)
  if (name := fields.get("model", str, None)) != offer.name:
    known = f"allowed: {offer.name!r}"
    if name is None:
      raise Refusal(400, f"model is missing; {known}", "model")
    raise Refusal(404, f"there is no model {_shown(name)}; {known}", "model", "model_not_found")
  for name, nothing in _NOT_OFFERED.items():
    if said.get(name) is not None and said[name] not in nothing:
      raise Refusal(400, f"{name} is not offered; allowed: a request without it", name, "unsupported_parameter")
  options = _Fields(fields.get("stream_options", dict, {}), "stream_options.")
  stream, with_usage = fields.get("stream", bool, False), options.get("include_usage", bool, False)
  logprobs = fields.get("logprobs", bool, False)
  if logprobs and (offer.think or offer.attacker):
    raise Refusal(400, "logprobs of an answer that is parsed are not given; allowed: false", "logprobs")
  category = fields.get("category", str, "harmful", lambda x: x in ("harmful", "benign"), "'harmful' or 'benign'")
  within = lambda least, most: (lambda x: least <= x <= most, f"from {least} to {most}")
  return Chat(
    messages=_messages(said.get("messages")),
    choice=Choice(
      float(fields.get("temperature", (int, float), offer.choice.temperature, *within(0, 2))),
      float(fields.get("top_p", (int, float), offer.choice.top_p, lambda x: 0 < x <= 1, "above 0, at most 1")),
      max(0, fields.get("top_k", int, offer.choice.top_k, *within(-1, 2**24))),
      float(fields.get("min_p", (int, float), offer.choice.min_p, *within(0, 1))),
    ),
    max_tokens=_max_tokens(fields, offer),
    n=fields.get("n", int, 1, *within(1, offer.most)),
    seed=fields.get("seed", int, None, *within(-(2**63), 2**63 - 1)),
    stops=_stops(said.get("stop")),
    stream=stream,
    include_usage=with_usage,
    logprobs=logprobs,
    category=Category[category.upper()],
  )


class _Fields:
  """Of an object, each of its type or refused. null is as if it were not there."""

  def __init__(self, values: Mapping[str, Any], inside: str = "") -> None:
    self.values, self.inside = values, inside

  def get(
    self,
    name: str,
    kind: type | tuple[type, ...],
    default: Any,
    good: Callable[[Any], bool] = lambda value: True,
    allowed: str = "",
  ) -> Any:
    value = self.values.get(name)
    if value is None:
      return default
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and good(value):
      return value
    kinds = " or ".join(_NAMES[each] for each in (kind if isinstance(kind, tuple) else (kind,)))
    param = self.inside + name
    raise Refusal(400, f"{param} is {_shown(value)}; allowed: {kinds}{allowed and f', {allowed}'}", param)


_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number", dict: "an object"}


def _shown(value: Any) -> str:
  try:
    text = repr(value)
  except RecursionError:
    text = "nested too deeply"
  return text if len(text) <= 60 else f"{text[:60]}…"


def _max_tokens(fields: _Fields, offer: Offer) -> int:
  """The newer name first. As of OpenAI's servers, more than there can be is refused."""
  most = offer.max_tokens
  for name in ("max_completion_tokens", "max_tokens"):
    count = fields.get(name, int, None, lambda x: 1 <= x <= most, f"from 1 to {most}, which this server draws at most")
    if count is not None:
      return count
  return most


def _stops(said: Any) -> tuple[str, ...]:
  stops = [said] if isinstance(said, str) else [] if said is None else said
  if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
    raise Refusal(400, f"stop is {_shown(said)}; allowed: a string, or up to {_MOST_STOPS}, none of them empty", "stop")
  return tuple(stops)


def _messages(said: Any) -> tuple[tuple[str, str], ...]:
  if not isinstance(said, list) or not said:
    raise Refusal(400, f"messages is {_shown(said)}; allowed: a list of one or more messages", "messages")
  return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(said))


def _message(said: Any, where: str) -> tuple[str, str]:
  if not isinstance(said, dict):
    raise Refusal(400, f"{where} is {_shown(said)}; allowed: an object with role and content", where)
  if (role := said.get("role")) not in _ROLES:
    raise Refusal(400, f"{where}.role is {_shown(role)}; allowed: one of {', '.join(_ROLES)}", f"{where}.role")
  content = said.get("content")
  parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
  text = lambda part: isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
  if not all(map(text, parts)):
    allowed = "allowed: a string, or a list of parts of the type text"
    raise Refusal(400, f"{where}.content is {_shown(content)}; {allowed}", f"{where}.content")
  return str(role), "\n".join(part["text"] for part in parts)


@dataclasses.dataclass(frozen=True)
class Delta:
  """What has come to one answer."""

  index: int
  content: str
  reasoning: str
  logprobs: list[dict[str, Any]]
  finish: str | None  # 'stop' or 'length', with the last
  status: Status


class Answer:
  """One of a request's answers, as its tokens come. Whole or in deltas, it says the same."""

  def __init__(self, index: int, chat: Chat, offer: Offer, tokenizer: Tokenizer, token_texts: Sequence[str]) -> None:
    self.index, self.chat, self.offer, self.tokenizer, self.token_texts = index, chat, offer, tokenizer, token_texts
    self.tries = self.tokens = 0
    self.said = {"content": "", "reasoning": ""}
    self.again()

  def again(self) -> None:
    """What was drawn is forgotten, but that it was drawn: none of it was said."""
    self.tries += 1
    self.text = Text(self.tokenizer)
    self.cut: int | None = None  # where the first stop begins
    self.done = self.stopped = False
    self.spoken: list[tuple[int, int, float]] = []  # where its text begins, the token, its log-probability

  def add(self, piece: Piece) -> None:
    """A piece of it; what follows a stop is left aside."""
    for token, logprob in zip(piece.tokens_k.tolist(), piece.plain_logprob_k.tolist()):
      before = len(self.text.text)
      self.tokens += 1
      self.text.add(token)
      self.spoken.append((before, token, logprob))
      if self._find_stop(before):
        return
    if not piece.live:
      self.text.end()
      self._find_stop(len(self.text.text))
      self.done, self.stopped = True, piece.stopped or self.cut is not None

  def _find_stop(self, before: int) -> bool:
    """Looks for the first stop that is not within the first `before` characters, and ends the answer there."""
    think, text = self.offer.think, self.text.text
    if self.offer.attacker or (think and THINK_END not in text):
      return False
    first = text.index(THINK_END) + len(THINK_END) if think else 0
    near = max(first, before - max(map(len, self.chat.stops), default=0))
    found = [at for stop in self.chat.stops if (at := text.find(stop, near)) >= 0]
    if found:
      self.cut, self.done, self.stopped = min(found), True, True
    return bool(found)

  @property
  def status(self) -> Status:
    """Of an attack that is done."""
    return parse_attack(self.text.text, self.offer.think)[1] if self.stopped else Status.MAX_LENGTH

  def delta(self) -> Delta:
    """What can be said now and was not before."""
    now = dict(zip(self.said, self._view()))
    new = {name: now[name][len(self.said[name]) :] for name in now}
    self.said = now
    count = sum(start < len(now["content"]) for start, *_ in self.spoken) if self.chat.logprobs else 0
    logprobs, self.spoken = [self._logprob(*each[1:]) for each in self.spoken[:count]], self.spoken[count:]
    finish = ("stop" if self.stopped else "length") if self.done else None
    status = self.status if self.done and self.offer.attacker else Status.VALID
    return Delta(self.index, new["content"], new["reasoning"], [x for x in logprobs if x], finish, status)

  def _view(self) -> tuple[str, str]:
    """Content and reasoning, as far as they are certain: what comes later only adds to them."""
    think, text = self.offer.think, self.text.text[: self.cut]
    if self.offer.attacker:
      query = parse_attack(text, think)[0] if self.stopped else ""
      return (_before(query, self.chat.stops), _reasoning(text) if think else "") if self.done else ("", "")
    if not self.done:
      ends = self.chat.stops if not think or THINK_END in text else (THINK_END,)
      text = text[: len(text) - _held(text, ends)]
    if not think:
      return text, ""
    reasoning = _reasoning(text)
    begun = self.done or THINK_END in text or not _THINK.startswith(reasoning)
    return parse_answer(text, True)[0], reasoning if begun else ""

  def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
    """As OpenAI's servers give one; nothing for a token that shows nothing."""
    if token in self.tokenizer.special_ids:
      return {}
    number = logprob if math.isfinite(logprob) else _UNLIKELY
    return {"token": self.token_texts[token], "logprob": number, "bytes": None, "top_logprobs": []}


def _reasoning(text: str) -> str:
  return text.partition(THINK_END)[0].strip().removeprefix(_THINK).strip()


def _before(text: str, stops: Sequence[str]) -> str:
  return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _held(text: str, ends: Sequence[str]) -> int:
  """Characters at the end that may be the beginning of one of these."""
  return max((n for end in ends for n in range(1, len(end)) if text.endswith(end[:n])), default=0)

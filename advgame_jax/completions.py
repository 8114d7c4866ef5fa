"""Requests under way: what each asks of a player's generation, and what it is answered, whole or as it comes."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from advgame_jax import ledger, prompts
from advgame_jax.chat import Answer, Chat, Delta, Offer, Refusal
from advgame_jax.drawn import Piece
from advgame_jax.live import Ask, Full, Live
from advgame_jax.standalone import Standalone
from advgame_jax.types import Status, UserError, fold_key

LEFT = 499  # the status, in the metrics, of a request whose client has left
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100)  # bounds of the histogram


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a player is served."""

  attacker: bool = False  # it rewrites seeds
  tries: int = 3  # of a rewrite that cannot be parsed
  slots: int = 16  # rows that draw at once
  queue: int = 64  # answers that wait for a row; who comes then is told to come again
  most: int = 16  # answers to one request
  timeout: float = 300.0  # seconds for a whole request
  read_timeout: float = 10.0  # seconds for a request's head, and for its body; an idle connection lasts as long
  body_bytes: int = 2**18
  grace: float = 5.0  # seconds that what is under way has when the server ends


class Service:
  """What requests are answered from."""

  def __init__(self, player: Standalone, live: Live, settings: Settings) -> None:
    self.player, self.live, self.settings = player, live, settings
    self.token_texts = player.model.tokenizer.token_texts()
    self.requests: collections.Counter[int] = collections.Counter()  # by status
    self.seconds: list[float] = [0.0] * (len(_SECONDS) + 2)  # requests up to each bound, all, and the sum of seconds
    self.since = int(time.time())
    self.compilations = ledger.process_compilations()
    self.offer = Offer(
      player.name,
      player.model.choice,
      player.model.sampling.max_new_tokens,
      min(settings.most, live.most),
      player.think,
      settings.attacker,
    )

  def encode(self, asked: Chat) -> list[int]:
    """The prompt's tokens.

    Raises:
      Refusal: it is too long, or nothing that the model's template takes.
    """
    tokenizer = self.player.model.tokenizer
    try:
      if self.offer.attacker:
        turn = prompts.attacker_turn(self.player.instructions, asked.category, asked.last)
        ids = tokenizer.encode_chat(turn)
      else:
        ids = tokenizer.encode_messages(asked.messages)
    except UserError as error:
      raise Refusal(400, str(error), "messages") from None
    if not 0 < len(ids) <= self.player.model.longest_prompt:
      raise Refusal(
        400,
        f"the prompt has {len(ids)} tokens; allowed: from 1 to {self.player.model.longest_prompt}",
        "messages",
        "context_length_exceeded",
      )
    return ids

  def count(self, status: int, seconds: float) -> None:
    """Of a request that has ended."""
    self.requests[status] += 1
    for i, bound in enumerate((*_SECONDS, float("inf"))):
      self.seconds[i] += seconds <= bound
    self.seconds[-1] += seconds

  def metrics(self) -> str:
    """In Prometheus' text format."""
    *buckets, total = self.seconds
    bounds = [*map(str, _SECONDS), "+Inf"]
    samples: dict[str, list[tuple[str, float]]] = {
      "requests_total counter": [(f'{{status="{status}"}}', n) for status, n in sorted(self.requests.items())],
      "prompt_tokens_total counter": [("", self.live.read)],
      "completion_tokens_total counter": [("", self.live.written)],
      "queued_answers gauge": [("", self.live.queued)],
      "live_rows gauge": [("", self.live.live)],
      "compilations_total counter": [("", self.compilations.count)],
      "request_seconds histogram": [
        *((f'_bucket{{le="{bound}"}}', n) for bound, n in zip(bounds, buckets)),
        ("_sum", total),
        ("_count", buckets[-1]),
      ],
    }
    lines = []
    for kind, values in samples.items():
      name = f"advgame_{kind.split()[0]}"
      lines += [f"# TYPE advgame_{kind}", *(f"{name}{label} {value}" for label, value in values)]
    return "\n".join(lines) + "\n"


class Exchange:
  """One request under way."""

  def __init__(self, service: Service, asked: Chat, ids: list[int], deadline: float) -> None:
    """Asks for all answers. `deadline`: of the event loop's clock.

    Raises:
      Refusal: too many wait already.
    """
    self.service, self.asked, self.ids, self.deadline = service, asked, ids, deadline
    self.status = LEFT  # what its events will have come to
    self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
    self.seed = secrets.randbits(63) if asked.seed is None else asked.seed
    self.loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[Answer, Ask, Piece | None]]()
    made_of = (asked, service.offer, service.player.model.tokenizer, service.token_texts)
    self.answers = [Answer(index, *made_of) for index in range(asked.n)]
    self.asks = {answer.index: self._ask(answer) for answer in self.answers}
    try:
      service.live.submit(list(self.asks.values()))
    except Full:
      raise Refusal(429, "too many requests wait; allowed: to come again", code="queue_full", retry_after="1") from None

  def _ask(self, answer: Answer) -> Ask:
    """For the answer's next try. Its keys are made of the seed, the answer's number and the try's."""

    def tell(piece: Piece | None) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, (answer, ask, piece))

    fold = fold_key(self.seed, answer.index, answer.tries) & 0xFFFFFFFF
    ask = Ask(ids=self.ids, limit=self.asked.max_tokens, fold=fold, choice=self.asked.choice, tell=tell)
    return ask

  async def deltas(self) -> AsyncIterator[Delta]:
    """What there is to say of each answer, as it comes, until all are done.

    Raises:
      Refusal: it takes too long, or there will be no more of it.
    """
    while not all(answer.done for answer in self.answers):
      try:
        async with asyncio.timeout_at(self.deadline):
          answer, ask, piece = await self.pieces.get()
      except TimeoutError:
        raise Refusal(
          504, "the request took too long; allowed: a shorter one, or another time", code="timeout"
        ) from None
      if piece is None:
        if self.service.live.failure:
          raise Refusal(500, "the generation has failed", code="generation_failed")
        raise Refusal(503, "the server ends", code="server_ends")
      if answer.done or ask is not self.asks[answer.index]:
        continue
      answer.add(piece)
      if answer.done and self._try_again(answer):
        continue
      if answer.done:
        self.service.live.cancel([ask])  # a stop string may end it before the model does
      yield answer.delta()

  def _try_again(self, answer: Answer) -> bool:
    """Whether a rewrite that cannot be parsed is drawn again."""
    again = self.service.offer.attacker and answer.status and answer.tries < self.service.settings.tries
    if again:
      answer.again()
      self.asks[answer.index] = self._ask(answer)
      self.service.live.submit([self.asks[answer.index]], again=True)
    return bool(again)

  def leave(self) -> None:
    """Nobody waits for it any more."""
    self.service.live.cancel(list(self.asks.values()))

  # In the words of OpenAI's servers.

  def usage(self) -> dict[str, int]:
    read, written = len(self.ids), sum(answer.tokens for answer in self.answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

  def completion(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    name = self.service.offer.name
    return {"id": self.id, "object": kind, "created": self.created, "model": name, "choices": choices}

  def choice(self, delta: Delta, where: str, said: dict[str, Any]) -> dict[str, Any]:
    logprobs = {"content": delta.logprobs, "refusal": None} if self.asked.logprobs else None
    choice = {"index": delta.index, where: said, "logprobs": logprobs, "finish_reason": delta.finish}
    status = {"x_advgame_status": delta.status.name.lower()}
    return choice | (status if self.service.offer.attacker and delta.finish else {})

  async def whole(self) -> dict[str, Any]:
    """The completion."""
    parts: dict[int, list[Delta]] = {answer.index: [] for answer in self.answers}
    async for delta in self.deltas():
      parts[delta.index].append(delta)
    choices = []
    for each in parts.values():
      joined = dataclasses.replace(each[-1], logprobs=[x for delta in each for x in delta.logprobs])
      message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.content for delta in each)}
      if self.service.offer.think:
        message["reasoning_content"] = "".join(delta.reasoning for delta in each)
      choices.append(self.choice(joined, "message", message | {"refusal": None}))
    return self.completion("chat.completion", choices) | {"usage": self.usage()}

  async def events(self) -> AsyncIterator[str]:
    """The completion as it comes, in server-sent events. What fails on the way is one too."""
    chunk = lambda *choices: self.completion("chat.completion.chunk", list(choices))
    try:
      for answer in self.answers:
        nothing = Delta(answer.index, "", "", [], None, Status.VALID)
        yield _event(chunk(self.choice(nothing, "delta", {"role": "assistant", "content": ""})))
      async for delta in self.deltas():
        said = {"content": delta.content, "reasoning_content": delta.reasoning}
        if any(said.values()) or delta.logprobs or delta.finish:
          yield _event(chunk(self.choice(delta, "delta", {name: text for name, text in said.items() if text})))
      if self.asked.include_usage:
        yield _event(chunk() | {"usage": self.usage()})
      self.status = 200
      yield "data: [DONE]\n\n"
    except Refusal as refusal:
      self.status = refusal.status
      yield _event(refusal.body)


def _event(data: Mapping[str, Any]) -> str:
  return f"data: {json.dumps(data)}\n\n"

"""A judge that is a language model behind an OpenAI-compatible server, asked through the official client.

What fails for one request costs one vote and no other; what can never work is said in one sentence, at once.

Nobody is contacted but the host of `server.url`: redirects are not followed. Proxies are those of the environment
(HTTP_PROXY, HTTPS_PROXY, NO_PROXY), as in other programs. The key is read from the environment when the first question
is asked, and goes into a header of each request and nowhere else.
"""

import asyncio
import collections
import email.utils
import functools
import json
import logging
import math
import os
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import httpx2
import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from advgame_jax import config as config_lib
from advgame_jax.cases import Case, Scores
from advgame_jax.prompts import THINK_END
from advgame_jax.types import Judge, Question, UserError, Verdict, fold_key

LONGEST_WAIT = 600.0  # seconds of a Retry-After that are honoured; a request told to wait longer has failed
_CLIENT_WAITS = 60.0  # seconds that the client honours itself in every version; it gives up on more than two minutes
_CONNECT = 10.0  # seconds
_TOP = 20  # tokens whose log-probabilities are asked for: the most that servers give

log = logging.getLogger(__name__)


class Pace:
  """Starts of requests: at most `limit` in any `window` of seconds (0: no limit), in the order in which they came."""

  def __init__(
    self,
    limit: int,
    window: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
  ):
    self.limit, self.window, self.clock, self.sleep = limit, window, clock, sleep
    self._turn = asyncio.Lock()
    self._starts: collections.deque[float] = collections.deque(maxlen=limit)

  async def start(self) -> None:
    """Returns when a request may start, and counts it."""
    if not self.limit:
      return
    async with self._turn:
      while len(self._starts) == self.limit and (wait := self._starts[0] + self.window - self.clock()) > 0:
        await self.sleep(wait)
      self._starts.append(self.clock())


class Vote(NamedTuple):
  """One answer of the server, read."""

  scores: Scores = ()
  tokens: int = 0
  failure: str = ""  # of the request, in a word or two; an answer that merely has no verdict is none


def server_judge(settings: config_lib.Judge, put: Callable[[Question], Case], pace: Pace | None = None) -> Judge:
  """A judge that asks `settings.server` for `settings.votes` answers to each question and averages those it can read.

  The server draws vote j of a question from a seed made of (question.key, j). Requests that fail are logged in one line
  a call. The event loop of the requests runs in a thread of its own, so that time-outs are of whole answers,
  requests can be cancelled, and a notebook, which has a loop already, can call the judge.

  Args:
    settings: model, votes, readout, think, sampling (temperature, top_p, max_new_tokens) and server are read.
    put: a question in words.
    pace: when requests may start; by default, `server.requests_per_minute`.

  Raises:
    UserError: `server.url` is none. By the judge: the server refuses the key, does not know the model, or cannot be
      reached at all; requests under way are cancelled then.
  """
  _check_url(settings.server)
  server = _Server(settings, pace or Pace(settings.server.requests_per_minute))
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, name="judge server", daemon=True).start()

  def judge(questions: Sequence[Question]) -> list[Verdict]:
    asked = [(put(question), question.key) for question in questions]
    future = asyncio.run_coroutine_threadsafe(server.ask(asked), loop)
    try:
      votes = future.result()
    finally:
      future.cancel()  # has no effect but where the wait was interrupted
    _log_failures([vote.failure for row in votes for vote in row])
    return [_verdict(row) for row in votes]

  return judge


def _check_url(server: config_lib.Server) -> None:
  """The address is not repeated: it may have a password in it."""
  try:
    parts = urllib.parse.urlsplit(server.url)
    good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
  except ValueError:
    good = False
  if not good or "@" in parts.netloc or parts.query or parts.fragment:
    raise UserError(
      "server.url is no plain http or https address; allowed: a base URL such as http://127.0.0.1:8000/v1, its key in "
      f"the environment variable {server.key_variable}"
    )


def _verdict(votes: Sequence[Vote]) -> Verdict:
  readable = [vote.scores for vote in votes if vote.scores]
  means = tuple(sum(scores) / len(readable) for scores in zip(*readable, strict=True))
  return Verdict(means, sum(vote.tokens for vote in votes))


def _log_failures(failures: Sequence[str]) -> None:
  counts = collections.Counter(failure for failure in failures if failure)
  if counts:
    kinds = ", ".join(f"{count} × {failure}" for failure, count in counts.most_common())
    log.warning("judge server: %d of %d requests failed (%s)", counts.total(), len(failures), kinds)


class _Server:
  """The client, and what has been learnt of the server."""

  def __init__(self, settings: config_lib.Judge, pace: Pace):
    self.settings, self.pace = settings, pace
    self.turns = asyncio.Semaphore(settings.server.concurrency)
    self.reached = False  # it has said something
    self.answered = False  # it has answered a request

  @functools.cached_property
  def client(self) -> openai.AsyncOpenAI:
    for library in ("openai", "httpx2", "httpcore2"):  # they would say a line or more for each request
      logging.getLogger(library).setLevel(logging.WARNING)
    server = self.settings.server
    http = _Http(server, self.pace)
    return openai.AsyncOpenAI(
      api_key=_key(server.key_variable),
      base_url=server.url,
      timeout=http.timeout,
      max_retries=server.retries,
      http_client=http,
    )

  async def ask(self, asked: Sequence[tuple[Case, int]]) -> list[list[Vote]]:
    """The votes on each (case, key). The first error cancels all other requests."""
    try:
      async with asyncio.TaskGroup() as group:
        tasks = [
          [group.create_task(self.vote(case, fold_key(key, j))) for j in range(self.settings.votes)]
          for case, key in asked
        ]
    except ExceptionGroup as errors:
      raise errors.exceptions[0] from None
    return [[task.result() for task in row] for row in tasks]

  async def vote(self, case: Case, key: int) -> Vote:
    async with self.turns:
      client = self.client
      try:
        answer = await self.complete(client, case, key)
      except Exception as error:  # whatever happens to one request must not end a run
        never = self.never(error)
        if never:
          raise UserError(never) from None
        self.reached |= isinstance(error, openai.APIStatusError)
        return Vote(failure=_failure(error))
    self.reached = self.answered = True
    return _read(self.settings, case, answer)

  async def complete(self, client: openai.AsyncOpenAI, case: Case, key: int) -> object:
    """What the server answers, as the client makes it out: a chat completion, if all is well."""
    sampling, probability = self.settings.sampling, self.settings.readout == "probability"
    text = (case.instructions + case.text).encode(errors="replace").decode()  # no lone surrogates
    return await client.chat.completions.create(
      model=self.settings.model,
      messages=[{"role": "user", "content": text}],
      seed=key >> 32,  # 31 bits: servers refuse more
      # With 1 and 1 the probabilities are the model's own, whether a server reports them before or after shaping.
      temperature=1.0 if probability else sampling.temperature,
      top_p=1.0 if probability else sampling.top_p,
      max_tokens=1 if probability else sampling.max_new_tokens,
      logprobs=True if probability else openai.omit,
      top_logprobs=_TOP if probability else openai.omit,
    )

  def never(self, error: Exception) -> str:
    """The sentence for what no further request can mend; "" for a failure of this one.

    A server that has answered others has not refused us, whatever it says now: a long run outlives a restart, and some
    services answer 403 to a text that they find offensive.
    """
    where = f"the judge server at {self.settings.server.url}"
    variable, model = self.settings.server.key_variable, self.settings.model
    code = getattr(error, "status_code", None)
    if self.answered:
      return ""
    if code in (401, 403):
      unset = "" if os.environ.get(variable) else ", which is not set"
      return (
        f"{where} refused the key in the environment variable {variable}{unset} (HTTP {code}); allowed: one that may "
        f"use {model!r}"
      )
    if code == 404 or getattr(error, "code", None) == "model_not_found":
      return (
        f"{where} has no model {model!r}, or answers no chat there (HTTP {code}); allowed: a model that it lists under "
        "/models, and a base URL such as http://127.0.0.1:8000/v1"
      )
    if not self.reached and isinstance(error.__cause__, _UNREACHABLE):
      return f"{where} cannot be reached ({error.__cause__}); allowed: the base URL of a server that is running"
    return ""


def _key(variable: str) -> str:
  key = os.environ.get(variable, "").strip() or "none"
  if not (key.isascii() and key.isprintable()):
    raise UserError(f"the environment variable {variable} has characters that no key has; allowed: printable ASCII")
  return key


class _Http(httpx2.AsyncClient):
  """What the client sends by: each request that leaves, a retry or not, starts at the pace and has one time-out."""

  def __init__(self, server: config_lib.Server, pace: Pace):
    self._server, self._pace = server, pace
    super().__init__(
      timeout=httpx2.Timeout(server.timeout_seconds, connect=min(_CONNECT, server.timeout_seconds)),
      limits=httpx2.Limits(max_keepalive_connections=server.concurrency),
      follow_redirects=False,
    )

  async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
    last = request.headers.get("x-stainless-retry-count") == str(self._server.retries)
    for name in [name for name in request.headers if name.startswith("x-stainless")]:
      del request.headers[name]  # what machine this is
    await self._pace.start()
    try:
      async with asyncio.timeout(self._server.timeout_seconds):
        response = await super().send(request, **options)
    except TimeoutError:
      raise httpx2.ReadTimeout("the answer was not whole in time", request=request) from None
    if not last and response.status_code in (429, 503):
      await self._wait(response.headers)
    return response

  async def _wait(self, headers: httpx2.Headers) -> None:
    """Waits for a Retry-After on which the client would give up."""
    seconds = _retry_after(headers)
    if _CLIENT_WAITS < seconds <= LONGEST_WAIT:
      await self._pace.sleep(seconds)
      headers.pop("retry-after-ms", None)
      headers["retry-after"] = "0.001"


def _retry_after(headers: httpx2.Headers) -> float:
  """Seconds; 0 where there is no such header, or none that can be read."""
  value = headers.get("retry-after", "")
  try:
    return float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(value)
  except ValueError:
    date = email.utils.parsedate_tz(value)
    return email.utils.mktime_tz(date) - time.time() if date else 0.0


_UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)


def _failure(error: Exception) -> str:
  match error:
    case openai.APITimeoutError():
      return "time-out"
    case openai.APIStatusError():
      return f"HTTP {error.status_code}"
    case openai.APIConnectionError():
      return "no connection" if isinstance(error.__cause__, _UNREACHABLE) else "cut connection"
    case json.JSONDecodeError() | UnicodeDecodeError() | RecursionError():
      return "broken JSON"
    case _:
      return type(error).__name__


def _read(settings: config_lib.Judge, case: Case, answer: object) -> Vote:
  """The vote in an answer, of which the client has checked nothing."""
  if not isinstance(answer, ChatCompletion):
    return Vote(failure="not JSON" if isinstance(answer, str) else "no chat completion")
  total = getattr(answer.usage, "total_tokens", None)
  tokens = total if isinstance(total, int) else 0
  choice = answer.choices[0] if isinstance(answer.choices, list) and answer.choices else None
  if not isinstance(choice, Choice):
    return Vote((), tokens, "no choices")
  if settings.readout == "probability":
    return _read_probability(case, choice, tokens)
  if choice.finish_reason == "length":
    return Vote((), tokens)
  content = getattr(choice.message, "content", None)
  if not isinstance(content, str):
    return Vote((), tokens, "no content")
  apart = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
  if settings.think and apart and THINK_END not in content:
    content = THINK_END + content
  return Vote(case.read(content), tokens)


def _read_probability(case: Case, choice: Choice, tokens: int) -> Vote:
  try:
    top = [(t.token.strip().casefold(), math.exp(t.logprob)) for t in choice.logprobs.content[0].top_logprobs]  # type: ignore[union-attr, index]
  except (AttributeError, IndexError, TypeError, OverflowError):
    return Vote((), tokens, "no log-probabilities")
  mass = [sum(p for token, p in top if token in label) for label in case.labels]
  return Vote(case.weigh(mass) if sum(mass) > 0 else (), tokens)

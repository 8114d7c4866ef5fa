"""An OpenAI-compatible server, asked through the official client, as judges, targets and Attackers are.

What fails for one request costs that request and no other; what can never work is said in one sentence, at once.

Nobody is contacted but the host of the server's URL: redirects are not followed. Proxies are those of the environment
(HTTP_PROXY, HTTPS_PROXY, NO_PROXY), as in other programs. The key is read from the environment when the first request
is made, and goes into a header of each request and nowhere else.
"""

import asyncio
import collections
import email.utils
import functools
import http.cookiejar
import json
import logging
import math
import os
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx2
import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from advgame_jax import config as config_lib
from advgame_jax.prompts import visible
from advgame_jax.types import UserError

LONGEST_WAIT = 600.0  # seconds of a Retry-After that are honoured; a request told to wait longer has failed
_CLIENT_WAITS = 60.0  # seconds that the client honours itself in every version; it gives up on more than two minutes
_CONNECT = 10.0  # seconds
_TOLD = 200  # characters of what a server says is wrong with a request
_LONGEST_BODY = 16 * 2**20  # bytes of an answer: what streams on for ever is cut

ResultT = TypeVar("ResultT")

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


class Request(NamedTuple):
  """One chat completion that is asked for."""

  text: str  # the one user turn
  system: str = ""  # what stands before it, if anything
  seed: int | None = None  # 31 bits: servers refuse more
  temperature: float | None = None  # None of these three is the server's own
  top_p: float | None = None
  max_tokens: int | None = None
  top_logprobs: int = 0  # of each place, 0 for none


class Reply(NamedTuple):
  """What came of it."""

  text: str = ""
  reasoning: str = ""  # where the server keeps it apart
  cut: bool = False  # by the limit of tokens
  top: tuple[tuple[str, float], ...] = ()  # likeliest first tokens with their probabilities, where they were asked for
  failure: str = ""  # in a word or two; then there is no text
  prompt_tokens: int = 0
  completion_tokens: int = 0
  total_tokens: int = 0


class Loop:
  """An event loop in a thread of its own, so that time-outs are of whole answers, requests can be cancelled, and a
  notebook, which has a loop already, can ask.
  """

  def __init__(self, name: str):
    self._loop = asyncio.new_event_loop()
    threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()

  def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Its result; of several errors, the first."""
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      return future.result()
    except ExceptionGroup as errors:
      raise errors.exceptions[0] from None
    finally:
      future.cancel()  # has no effect but where the wait was interrupted


Heard = Callable[[int, Reply], Any]
"""Called with a request's number as soon as its reply is there, in another thread."""


class Endpoint:
  """A model on a server."""

  def __init__(self, server: config_lib.Server, model: str, what: str, pace: Pace | None = None):
    """`what` the server is, for what is said of it; `pace`: when requests may start, by default as `server` says.

    Raises:
      UserError: the server's URL is none.
    """
    _check_url(server, what)
    self.server, self.model, self.what = server, model, what
    self.pace = pace or Pace(server.requests_per_minute)
    self._turns = asyncio.Semaphore(server.concurrency)
    self._reached = False  # it has said something
    self._answered = False  # it has answered a request
    self._loop = Loop(what)

  def ask(self, requests: Sequence[Request], heard: Heard = lambda number, reply: None) -> list[Reply]:
    """A reply to each. Requests that fail are logged in one line a call.

    Raises:
      UserError: the server refuses the key, does not know the model, or cannot be reached at all; requests under way
        are cancelled then.
    """
    replies = self._loop.run(self._ask(requests, heard))
    self._log_failures([reply.failure for reply in replies])
    return replies

  def _log_failures(self, failures: Sequence[str]) -> None:
    counts = collections.Counter(failure for failure in failures if failure)
    if counts:
      kinds = ", ".join(f"{count} × {failure}" for failure, count in counts.most_common())
      log.warning("%s: %d of %d requests failed (%s)", self.what, counts.total(), len(failures), kinds)

  @functools.cached_property
  def _client(self) -> openai.AsyncOpenAI:
    for library in ("openai", "httpx2", "httpcore2"):  # they would say a line or more for each request
      logging.getLogger(library).setLevel(logging.WARNING)
    sends = Http(self.server, self.pace)
    return openai.AsyncOpenAI(
      api_key=key_of(self.server.key_variable),
      base_url=self.server.url,
      timeout=sends.timeout,
      max_retries=self.server.retries,
      http_client=sends,
    )

  async def _ask(self, requests: Sequence[Request], heard: Heard) -> list[Reply]:
    """The first error cancels all other requests."""
    async with asyncio.TaskGroup() as group:
      tasks = [group.create_task(self._one(number, request, heard)) for number, request in enumerate(requests)]
    return [task.result() for task in tasks]

  async def _one(self, number: int, request: Request, heard: Heard) -> Reply:
    async with self._turns:
      client = self._client
      try:
        reply = _read(request, await self._complete(client, request))
        self._reached = self._answered = True
      except Exception as error:  # whatever happens to one request must not end a run
        never = self._never(error)
        if never:
          raise UserError(never) from None
        self._reached |= isinstance(error, openai.APIStatusError)
        reply = Reply(failure=failure_of(error))
    heard(number, reply)
    return reply

  async def _complete(self, client: openai.AsyncOpenAI, request: Request) -> object:
    """What the server answers, as the client makes it out: a chat completion, if all is well."""
    plain = lambda text: text.encode(errors="replace").decode()  # no lone surrogates
    given = lambda value: openai.omit if value is None else value
    turns: list[Any] = [{"role": "system", "content": plain(request.system)}] if request.system else []
    return await client.chat.completions.create(
      model=self.model,
      messages=[*turns, {"role": "user", "content": plain(request.text)}],
      seed=given(request.seed),
      temperature=given(request.temperature),
      top_p=given(request.top_p),
      max_tokens=given(request.max_tokens),
      logprobs=True if request.top_logprobs else openai.omit,
      top_logprobs=request.top_logprobs or openai.omit,
    )

  def _never(self, error: Exception) -> str:
    """The sentence for what no further request can mend; "" for a failure of this one.

    A server that has answered others has not refused us, whatever it says now: a long run outlives a restart, and some
    services answer 403 to a text that they find offensive.
    """
    where = f"the {self.what} at {self.server.url}"
    variable = self.server.key_variable
    code = getattr(error, "status_code", None)
    if refused := refusal(error):
      return str(refused)
    if self._answered:
      return ""
    if code in (401, 403):
      unset = "" if os.environ.get(variable) else ", which is not set"
      return (
        f"{where} refused the key in the environment variable {variable}{unset} (HTTP {code}); allowed: one that may "
        f"use {self.model!r}"
      )
    if code == 404 or getattr(error, "code", None) == "model_not_found":
      return (
        f"{where} has no model {self.model!r}, or answers no chat there (HTTP {code}); allowed: a model that it lists "
        "under /models, and a base URL such as http://127.0.0.1:8000/v1"
      )
    if not self._reached and isinstance(error.__cause__, UNREACHABLE):
      return f"{where} cannot be reached ({error.__cause__}); allowed: the base URL of a server that is running"
    return ""


def refusal(error: BaseException | None) -> UserError | None:
  """What `offline.only` raised below the libraries that have caught it, if it did."""
  if error is None or isinstance(error, UserError):
    return error
  below = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__, error.__context__)
  return next(filter(None, map(refusal, below)), None)


def _check_url(server: config_lib.Server, what: str) -> None:
  """The address is not repeated: it may have a password in it."""
  try:
    parts = urllib.parse.urlsplit(server.url)
    good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
  except ValueError:
    good = False
  if not good or "@" in parts.netloc or parts.query or parts.fragment:
    raise UserError(
      f"the {what}'s url is no plain http or https address; allowed: a base URL such as http://127.0.0.1:8000/v1, its "
      f"key in the environment variable {server.key_variable}"
    )


def _read(request: Request, answer: object) -> Reply:
  """An answer, of which the client has checked nothing."""
  if not isinstance(answer, ChatCompletion):
    return Reply(failure="not JSON" if isinstance(answer, str) else "no chat completion")

  def count(name: str) -> int:
    said = getattr(answer.usage, name, None)
    return said if isinstance(said, int) else 0

  reply = Reply(
    prompt_tokens=count("prompt_tokens"),
    completion_tokens=count("completion_tokens"),
    total_tokens=count("total_tokens"),
  )
  choice = answer.choices[0] if isinstance(answer.choices, list) and answer.choices else None
  if not isinstance(choice, Choice):
    return reply._replace(failure="no choices")
  if request.top_logprobs:
    top = _top(choice)
    return reply._replace(top=top, failure="" if top else "no log-probabilities")
  text, apart = (getattr(choice.message, name, None) for name in ("content", "reasoning_content"))
  apart = apart or getattr(choice.message, "reasoning", None)
  if not isinstance(text, str):
    return reply._replace(failure="no content")
  return reply._replace(
    text=text, reasoning=apart if isinstance(apart, str) else "", cut=choice.finish_reason == "length"
  )


def _top(choice: Choice) -> tuple[tuple[str, float], ...]:
  try:
    top = choice.logprobs.content[0].top_logprobs  # type: ignore[union-attr, index]
    return tuple((entry.token.strip().casefold(), math.exp(entry.logprob)) for entry in top)
  except (AttributeError, IndexError, TypeError, OverflowError):
    return ()


def key_of(variable: str) -> str:
  key = os.environ.get(variable, "").strip() or "none"
  if not (key.isascii() and key.isprintable()):
    raise UserError(f"the environment variable {variable} has characters that no key has; allowed: printable ASCII")
  return key


class Http(httpx2.AsyncClient):
  """What the client sends by: each request that leaves, a retry or not, starts at the pace and has one time-out."""

  def __init__(self, server: config_lib.Server, pace: Pace):
    self._server, self._pace = server, pace
    super().__init__(
      timeout=httpx2.Timeout(server.timeout_seconds, connect=min(_CONNECT, server.timeout_seconds)),
      limits=httpx2.Limits(max_keepalive_connections=server.concurrency),
      headers={"Accept-Encoding": "identity"},  # so that the length of a body is known as it comes
      event_hooks={"response": [_bound]},
      cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=())),  # none
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
    seconds = retry_after(headers)
    if _CLIENT_WAITS < seconds <= LONGEST_WAIT:
      await self._pace.sleep(seconds)
      headers.pop("retry-after-ms", None)
      headers["retry-after"] = "0.001"


async def _bound(response: httpx2.Response) -> None:
  response.stream = _Bounded(response.stream)  # type: ignore[arg-type]


class _Bounded(httpx2.AsyncByteStream):
  """A body of which so many bytes are read at most."""

  def __init__(self, stream: httpx2.AsyncByteStream):
    self._stream = stream

  async def __aiter__(self) -> AsyncIterator[bytes]:
    length = 0
    async for part in self._stream:
      length += len(part)
      if length > _LONGEST_BODY:
        raise httpx2.ReadError(f"the answer is longer than {_LONGEST_BODY} bytes")
      yield part

  async def aclose(self) -> None:
    await self._stream.aclose()


def retry_after(headers: httpx2.Headers) -> float:
  """Seconds; 0 where there is no such header, or none that can be read."""
  value = headers.get("retry-after", "")
  try:
    return float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(value)
  except ValueError:
    date = email.utils.parsedate_tz(value)
    return email.utils.mktime_tz(date) - time.time() if date else 0.0


UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)


def failure_of(error: Exception) -> str:
  match error:
    case openai.APITimeoutError():
      return "time-out"
    case openai.BadRequestError():  # our mistake: the server says which
      return f"HTTP 400 ({visible(error.message)[:_TOLD]})"
    case openai.APIStatusError():
      return f"HTTP {error.status_code}"
    case openai.APIConnectionError():
      return "no connection" if isinstance(error.__cause__, UNREACHABLE) else "cut connection"
    case json.JSONDecodeError() | UnicodeDecodeError() | RecursionError():
      return "broken JSON"
    case _:
      return type(error).__name__

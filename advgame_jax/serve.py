"""A player behind an OpenAI-compatible server.

    POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics (Prometheus)

Answers are drawn together, in rows that requests join as they arrive. What a request draws depends on its messages,
settings and seed alone; without a seed, it draws a fresh one. Requests of the same temperature, top_p, top_k and min_p
draw at one time; those of others wait for their turn, in the order of arrival.

What is not as on other servers:

- In attacker mode the last user message is a seed, and the answer is the query that the Attacker makes of it, in one
  piece. `"category": "benign"` tells it what it is told of benign seeds. A rewrite that cannot be parsed is drawn again
  with other keys. Each choice has `x_advgame_status`: 'valid', or else why the last try was none ('parsing',
  'refused_role', 'max_length'); its content is empty then, and the request has not failed.
- The reasoning of a player that thinks is `reasoning_content`; `stop` is looked for in the answer alone.
- What would change an answer and is not offered (tools, penalties, …) is refused, not ignored.

The token is compared in constant time, and neither logged nor repeated. Without one, requests are answered that name
this machine as their host and no other: a web page whose own name leads here reads nothing.
"""

import asyncio
import dataclasses
import errno
import functools
import hmac
import ipaddress
import os
import socket
import time
import urllib.parse
from collections.abc import Coroutine
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from advgame_jax import chat
from advgame_jax.chat import Refusal
from advgame_jax.completions import LEFT, Exchange, Service, Settings
from advgame_jax.live import Live
from advgame_jax.standalone import Standalone
from advgame_jax.types import UserError

_LINGER = 8  # times the largest body are read of one that is too large, so that its sender hears of it
_CONNECTIONS = 512


def read_token(variable: str) -> str:
  """The token in an environment variable, "" where there is none.

  Raises:
    UserError: it has characters that no header can have.
  """
  token = os.environ.get(variable, "")
  if not all("!" <= character <= "~" for character in token):
    raise UserError(f"the environment variable {variable} has characters that no token has; allowed: printable ASCII")
  return token


def bind(host: str, port: int, token: str, variable: str) -> socket.socket:
  """A socket there, which does not listen yet; of port 0, at any that is free.

  Raises:
    UserError: the port is taken, the address is none of this machine, or others could reach it without a token.
  """
  where = f"--host={host} --port={port}"
  try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    if not token and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
      raise UserError(
        f"{where} can be reached by others, and there is no token in the environment variable {variable}; allowed: one "
        "there, or --host=127.0.0.1"
      )
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except (OSError, OverflowError, UnicodeError) as error:
    raise _no_address(where, error) from error
  return listener


def _no_address(where: str, error: Exception) -> UserError:
  taken = getattr(error, "errno", None) == errno.EADDRINUSE
  problem = "is taken" if taken else f"cannot be had ({error})"
  return UserError(f"{where} {problem}; allowed: a free port, or --port=0 for any, at an address of this machine")


def sized(
  player: Standalone, name: str, slots: int, max_tokens: int | None = None, longest_prompt: int | None = None
) -> Standalone:
  """The player by a name, "" is its own, for so many rows at once and for these lengths, which are its own if None.

  Raises:
    UserError: the model has not as many positions.
  """
  sampling = player.model.sampling
  sampling = dataclasses.replace(
    sampling,
    slots=slots,
    max_new_tokens=max_tokens or sampling.max_new_tokens,
    prompt_buckets=(longest_prompt,) if longest_prompt else sampling.prompt_buckets,
  )
  positions, longest = player.model.model.max_positions, sampling.prompt_buckets[-1]
  if longest + sampling.max_new_tokens > positions:
    raise UserError(
      f"prompts of {longest} tokens and answers of {sampling.max_new_tokens} are more than the {positions} positions "
      "of the model; allowed: a smaller --longest_prompt or --max_tokens"
    )
  model = dataclasses.replace(player.model, sampling=sampling)
  return dataclasses.replace(player, name=name or player.name, model=model)


def run(player: Standalone, listener: socket.socket, settings: Settings, token: str = "") -> None:
  """Serves until SIGTERM or SIGINT; prints `serving NAME at http://ADDRESS/v1` once requests are answered.

  Raises:
    UserError: another has begun to listen there.
    Exception: what made the generation fail.
  """
  live = Live(player.model, player.generator, settings.slots, settings.queue)
  try:
    live.try_it()
    service = Service(player, live, settings)
    config = uvicorn.Config(
      application(service, token),
      http=_Protocol,
      ws="none",
      lifespan="off",
      loop="asyncio",
      log_config=None,
      log_level="error",
      access_log=False,
      server_header=False,
      proxy_headers=False,
      limit_concurrency=_CONNECTIONS,
      timeout_keep_alive=settings.read_timeout,  # type: ignore[arg-type]
      timeout_graceful_shutdown=settings.grace + 2,  # type: ignore[arg-type]  # they have been dismissed by then
    )
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    greeting = f"serving {player.name} at http://{address}/v1"
    _Server(config, live, greeting, settings.grace).run(sockets=[listener])
  except OSError as error:
    if error.errno != errno.EADDRINUSE:
      raise
    raise _no_address("the address", error) from error
  finally:
    live.close()


def application(service: Service, token: str = "") -> ASGIApp:
  """The server's four addresses, guarded and counted."""
  app = Starlette(
    routes=[
      Route("/v1/chat/completions", functools.partial(_complete, service), methods=["POST"]),
      Route("/v1/models", functools.partial(_models, service), methods=["GET"]),
      Route("/v1/models/{name:path}", functools.partial(_models, service), methods=["GET"]),
      Route("/health", functools.partial(_health, service), methods=["GET"]),
      Route("/metrics", functools.partial(_metrics, service), methods=["GET"]),
    ],
    exception_handlers={Refusal: _refused, HTTPException: _no_such, ClientDisconnect: _left, 500: _failed},
  )
  return _counted(_guarded(app, token), service)


async def _complete(service: Service, request: Request) -> Response:
  deadline = asyncio.get_running_loop().time() + service.settings.timeout
  asked = chat.read(await _body(request, service.settings), service.offer)
  ids = await asyncio.to_thread(service.encode, asked)
  exchange = Exchange(service, asked, ids, deadline)
  if asked.stream:
    return _Events(exchange)
  try:
    return JSONResponse(await _unless_left(request, exchange.whole()))
  finally:
    exchange.leave()


async def _body(request: Request, settings: Settings) -> bytes:
  """The request's body.

  Raises:
    Refusal: it is too large, too slow, or not JSON.
  """
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    raise Refusal(415, "the Content-Type is not application/json; allowed: that", connection="close")
  most, body, length = settings.body_bytes, bytearray(), 0
  too_large = Refusal(413, f"the body is too large; allowed: {most} bytes", code="body_too_large", connection="close")
  try:
    async with asyncio.timeout(settings.read_timeout):
      async for piece in request.stream():
        length += len(piece)
        body += piece if length <= most else b""
        if length > _LINGER * most:
          raise too_large
  except TimeoutError:
    raise Refusal(408, "the body did not come in time", code="timeout", connection="close") from None
  if length > most:
    raise too_large
  return bytes(body)


async def _unless_left(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
  """The result, unless the client leaves before.

  Raises:
    ClientDisconnect: it has left.
  """
  working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())  # behind the body: the end
  try:
    await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise ClientDisconnect
    return working.result()
  finally:
    working.cancel()
    leaving.cancel()


class _Events(StreamingResponse):
  """An exchange's events; when they end, or their client leaves, so does the exchange."""

  def __init__(self, exchange: Exchange) -> None:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    super().__init__(exchange.events(), headers=headers, media_type="text/event-stream")
    self.exchange = exchange

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      async with asyncio.timeout_at(self.exchange.deadline + 1):  # a client that does not read what it is sent
        await super().__call__(scope, receive, send)
    except TimeoutError:
      pass
    finally:
      scope["advgame_status"] = self.exchange.status
      self.exchange.leave()


async def _models(service: Service, request: Request) -> Response:
  name = service.offer.name
  model = {"id": name, "object": "model", "created": service.since, "owned_by": "advgame_jax"}
  asked = request.path_params.get("name")
  if asked is None:
    return JSONResponse({"object": "list", "data": [model]})
  if asked != name:
    raise Refusal(404, f"there is no model {asked[:60]!r}; allowed: {name!r}", "model", "model_not_found")
  return JSONResponse(model)


async def _health(service: Service, request: Request) -> Response:
  failed = service.live.failure is not None
  return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)


async def _metrics(service: Service, request: Request) -> Response:
  return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")


def _answer(refusal: Refusal) -> Response:
  return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _refused(request: Request, error: Any) -> Response:
  return _answer(error)


async def _no_such(request: Request, error: Any) -> Response:
  return _answer(Refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path[:60]}"))


async def _left(request: Request, error: Exception) -> Response:
  return Response(status_code=LEFT)  # to nobody


async def _failed(request: Request, error: Exception) -> Response:
  return _answer(Refusal(500, "the server has failed", code="internal_error"))


def _guarded(app: ASGIApp, token: str) -> ASGIApp:
  """Refuses who has not the token; or, where there is none, who was led here by another host's name."""
  expected = f"Bearer {token}".encode()

  async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
    headers = dict(scope["headers"])
    refusal = None
    if token and not hmac.compare_digest(headers.get(b"authorization", b""), expected):
      refusal = Refusal(401, "the token is missing or wrong", code="invalid_api_key", www_authenticate="Bearer")
    elif not token and not _of_this_machine(headers.get(b"host", b"").decode("latin-1")):
      refusal = Refusal(403, "this server is no other host's; allowed: 127.0.0.1 or localhost in its address")
    health = scope["path"] == "/health" and token
    await (_answer(refusal) if refusal and not health else app)(scope, receive, send)

  return guarded


def _of_this_machine(host: str) -> bool:
  try:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    return name == "localhost" or ipaddress.ip_address(name).is_loopback
  except ValueError:
    return False


def _counted(app: ASGIApp, service: Service) -> ASGIApp:
  """Counts requests, but those that only look at the server."""

  async def counted(scope: Scope, receive: Receive, send: Send) -> None:
    status, start = LEFT, time.monotonic()

    async def noted(message: Message) -> None:
      nonlocal status
      status = message.get("status", status)
      await send(message)

    try:
      await app(scope, receive, noted)
    finally:
      if scope["path"] not in ("/health", "/metrics"):
        service.count(scope.get("advgame_status", status), time.monotonic() - start)

  return counted


class _Protocol(H11Protocol):
  """Cuts a connection whose request has no whole head in time, or whose body goes on behind the answer."""

  _cut: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    super().connection_made(transport)
    self._watch()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    self._stop_watching()

  def _watch(self) -> None:
    if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
      self._stop_watching()
    elif self._cut is None:
      self._cut = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

  def _stop_watching(self) -> None:
    if self._cut:
      self._cut.cancel()
    self._cut = None


class _Server(uvicorn.Server):
  """Says when it is there, and ends when the generation does."""

  def __init__(self, config: uvicorn.Config, live: Live, greeting: str, grace: float) -> None:
    super().__init__(config)
    self.live, self.greeting, self.grace = live, greeting, grace

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    print(self.greeting, flush=True)

  async def on_tick(self, counter: int) -> bool:
    return await super().on_tick(counter) or self.live.failure is not None

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    asyncio.get_running_loop().call_later(self.grace, self.live.stop)
    await super().shutdown(sockets)

  def handle_exit(self, sig: int, frame: Any) -> None:
    super().handle_exit(sig, frame)
    self._captured_signals.clear()  # they would be raised again at the end: the exit code is 0

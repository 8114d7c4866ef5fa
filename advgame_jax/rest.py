"""A service that is asked over HTTP by a template: garak's settings for its REST generator."""

import asyncio
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2

from advgame_jax import endpoint
from advgame_jax.config import Server
from advgame_jax.endpoint import Http, Loop, Pace
from advgame_jax.speakers import Answer, Heard, Speaker, Turn
from advgame_jax.types import UserError


class Template(NamedTuple):
  """What is sent, and where the answer is; the names are garak's."""

  uri: str  # may hold $KEY
  method: str
  headers: Mapping[str, str]  # $KEY is the key of the environment variable, $INPUT the prompt
  body: Any  # JSON with $INPUT in its strings; or text with $INPUT, where it is put as within a JSON string
  field: str | None  # where the answer is in the response's JSON: a key or a JSONPath; None where it is the text
  busy: tuple[int, ...] = (429,)  # `ratelimit_codes`: tried again
  key_variable: str = "REST_API_KEY"  # `key_env_var`: what $KEY stands for, unless flags say otherwise

  @property
  def name(self) -> str:
    """Of the service: its address without what may be secret."""
    parts = urllib.parse.urlsplit(self.uri)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


_FORM = (
  '{"rest": {"RestGenerator": {"uri": "http://…", "method": "post", "headers": {"Authorization": "Bearer $KEY"}, '
  '"req_template_json_object": {"text": "$INPUT"}, "response_json": true, "response_json_field": "$.text"}}}'
)


def read_template(path: str) -> Template:
  """A file of garak's REST generator settings, with or without the names around them. Its time-out is not read.

  Raises:
    UserError: it cannot be read, or does not say where to send what.
  """
  try:
    said = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"the template {path} cannot be read as JSON ({error}); allowed: {_FORM}") from None
  for name in ("rest", "RestGenerator"):
    said = said.get(name, said) if isinstance(said, dict) else {}
  refuse = lambda problem: UserError(f"the template {path} {problem}; allowed: {_FORM}")
  uri, body = said.get("uri"), said.get("req_template_json_object", said.get("req_template", "$INPUT"))
  headers, busy = said.get("headers") or {}, said.get("ratelimit_codes", [429])
  field = said.get("response_json_field") if said.get("response_json") else None
  parts = urllib.parse.urlsplit(uri if isinstance(uri, str) else "")
  if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or "$" in parts.netloc:
    raise refuse("has no uri that is an http or https address without a name or password in it")
  if not isinstance(headers, dict) or not isinstance(busy, list) or not all(isinstance(code, int) for code in busy):
    raise refuse("has headers or ratelimit_codes that are none")
  if "$INPUT" in str(uri) or "$INPUT" not in json.dumps([headers, body]):
    raise refuse("has no place for the prompt in its body or headers, or one in its uri")
  if said.get("response_json") and not isinstance(field, str):
    raise refuse("has response_json without a response_json_field")
  method, named = str(said.get("method", "post")).upper(), {str(name): str(value) for name, value in headers.items()}
  variable = str(said.get("key_env_var") or Template._field_defaults["key_variable"])
  return Template(str(uri), method, named, body, field, tuple(busy), variable)


def of_template(template: Template, server: Server, pace: Pace | None = None) -> Speaker:
  """A service asked by a template, with the server's limits: concurrency, pace, time-out, retries.

  Nobody is contacted but its host, and it is told nothing of what was asked before: no cookies are kept.
  `server.key_variable` names the environment variable that `$KEY` stands for.

  Raises:
    UserError: `$KEY` stands for a variable that is not set. By the speaker: the service can never answer.
  """
  _fill(template, "", server.key_variable)  # a key that is not there is said before anybody is asked
  service, loop = _Service(template, server, pace or Pace(server.requests_per_minute)), Loop("target")

  def speak(turns: Sequence[Turn], heard: Heard) -> None:
    loop.run(service.ask(turns, heard))

  return speak


class _Service:
  """What has been learnt of it."""

  def __init__(self, template: Template, server: Server, pace: Pace):
    self.template, self.server, self.pace = template, server, pace
    self.find = _finder(template.field)
    self.free = asyncio.Semaphore(server.concurrency)
    self.answered = False

  async def ask(self, turns: Sequence[Turn], heard: Heard) -> None:
    async def one(client: Http, number: int, turn: Turn) -> None:
      async with self.free:
        heard(number, await self.answer(client, turn))

    async with Http(self.server, self.pace) as client, asyncio.TaskGroup() as group:
      for number, turn in enumerate(turns):
        group.create_task(one(client, number, turn))

  async def answer(self, client: Http, turn: Turn) -> Answer:
    for retry in range(self.server.retries + 1):
      wait = 0.5 * 2**retry
      try:
        sent = _fill(self.template, turn.text, self.server.key_variable)
        sent["headers"]["x-stainless-retry-count"] = str(retry)  # told to `Http`, and to nobody else
        response = await client.request(self.template.method, **sent)
        if 200 <= response.status_code < 300:
          self.answered = True
          return Answer(self.find(response.text))
        self.check(response.status_code)
        failure, busy = f"HTTP {response.status_code}", response.status_code in (408, *self.template.busy)
        wait = endpoint.retry_after(response.headers) or wait
        if not busy and response.status_code < 500:
          break
      except _Unreadable as error:
        return Answer(failure=str(error))
      except UserError:
        raise
      except Exception as error:  # whatever happens to one request must not end a campaign
        if refused := endpoint.refusal(error):
          raise refused from None
        failure = _failure(error)
        if isinstance(error, endpoint.UNREACHABLE) and not self.answered:
          raise UserError(
            f"the target at {self.template.name} cannot be reached ({error}); allowed: the uri of a service that runs"
          ) from None
        if not isinstance(error, httpx2.HTTPError):
          break
      if retry < self.server.retries:
        await self.pace.sleep(min(wait, endpoint.LONGEST_WAIT))
    return Answer(failure=failure)

  def check(self, code: int) -> None:
    """Refuses what no further request can mend."""
    if not self.answered and code in (401, 403, 404):
      raise UserError(
        f"the target at {self.template.name} answers HTTP {code}; allowed: a uri that it has, and a key that it takes "
        f"in the environment variable {self.server.key_variable}"
      )


def _fill(template: Template, prompt: str, variable: str) -> dict[str, Any]:
  """The request of a prompt. The key never enters the body of what a prompt could show."""
  said = json.dumps([template.uri, template.headers, template.body])
  key = endpoint.key_of(variable) if os.environ.get(variable) else ""
  if "$KEY" in said and not key:
    raise UserError(f"the template needs $KEY, and the environment variable {variable} is not set; allowed: set it")
  plain = prompt.encode(errors="replace").decode()

  def put(value: Any, said: str = plain) -> Any:
    if isinstance(value, str):
      return re.sub(r"\$(INPUT|KEY)", lambda found: said if found[1] == "INPUT" else key, value)
    if isinstance(value, dict):
      return {name: put(inner) for name, inner in value.items()}
    return [put(inner) for inner in value] if isinstance(value, list) else value

  quoted = json.dumps(plain)[1:-1]
  headers = {name: put(value, quoted) for name, value in template.headers.items()}
  sent: dict[str, Any] = {"url": put(template.uri), "headers": headers}
  body = put(template.body, quoted if isinstance(template.body, str) else plain)
  if template.method == "GET":
    return sent | {"params": body if isinstance(body, dict) else {}}
  return sent | ({"content": body} if isinstance(body, str) else {"json": body})


class _Unreadable(Exception):
  """An answer that came and cannot be read."""


def _finder(field: str | None) -> Callable[[str], str]:
  """What finds the answer in a response's text."""
  if field is None:
    return lambda text: text
  import jsonpath_ng  # here, because it takes some tenths of a second that only templates get anything for
  import jsonpath_ng.exceptions

  try:
    path = jsonpath_ng.parse(field if field.startswith("$") else f"$.'{field}'")
  except (jsonpath_ng.exceptions.JSONPathError, ValueError) as error:
    raise UserError(
      f"response_json_field is {field!r}, which is no JSONPath ({error}); allowed: such as $.text"
    ) from None

  def find(text: str) -> str:
    try:
      found = [match.value for match in path.find(json.loads(text))]
    except (ValueError, RecursionError):
      raise _Unreadable("broken JSON") from None
    said = found[0][0] if found and isinstance(found[0], list) and found[0] else found[0] if found else None
    if not isinstance(said, str):
      raise _Unreadable(f"no text at {field}")
    return said

  return find


def _failure(error: Exception) -> str:
  if isinstance(error, httpx2.TimeoutException):
    return "time-out"
  if isinstance(error, endpoint.UNREACHABLE):
    return "no connection"
  return "cut connection" if isinstance(error, httpx2.HTTPError) else type(error).__name__

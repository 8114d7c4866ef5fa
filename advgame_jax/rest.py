"""A service that is asked over HTTP by a template: garak's settings for its REST generator."""

import asyncio
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2

from advgame_jax import endpoint
from advgame_jax.config import Server
from advgame_jax.endpoint import Http, Pace
from advgame_jax.speakers import Answer, Heard, Speaker, Turn
from advgame_jax.types import UserError


class Template(NamedTuple):
  """A service that is asked over HTTP: garak's REST generator's settings, those of them that say what is sent."""

  uri: str
  method: str
  headers: Mapping[str, str]  # $KEY is the key of the environment variable, $INPUT the prompt
  body: Any  # JSON with $INPUT in its strings; or text with $INPUT
  field: str | None  # where the answer is in the response's JSON: a key or a JSONPath; None where it is the text


_FORM = (
  '{"rest": {"RestGenerator": {"uri": "http://…", "method": "post", "headers": {"Authorization": "Bearer $KEY"}, '
  '"req_template_json_object": {"text": "$INPUT"}, "response_json": true, "response_json_field": "$.text"}}}'
)


def read_template(path: str) -> Template:
  """A file of garak's REST generator settings, with or without the names around them.

  Raises:
    UserError: it cannot be read, or does not say where to send what.
  """
  try:
    said = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"the template {path} cannot be read as JSON ({error}); allowed: {_FORM}") from None
  for name in ("rest", "RestGenerator"):
    said = said.get(name, said) if isinstance(said, dict) else {}
  uri, body = said.get("uri"), said.get("req_template_json_object", said.get("req_template", "$INPUT"))
  field = said.get("response_json_field") if said.get("response_json") else None
  if not isinstance(uri, str) or not uri.startswith(("http://", "https://")):
    raise UserError(f"the template {path} has no uri that is an http or https address; allowed: {_FORM}")
  headers = {str(name): str(value) for name, value in dict(said.get("headers") or {}).items()}
  if "$INPUT" not in json.dumps([uri, headers, body]):
    raise UserError(f"the template {path} has no place for the prompt; allowed: $INPUT in its body: {_FORM}")
  if said.get("response_json") and not isinstance(field, str):
    raise UserError(f"the template {path} has response_json without a response_json_field; allowed: {_FORM}")
  return Template(uri, str(said.get("method", "post")).upper(), headers, body, field)


def of_template(template: Template, server: Server, pace: Pace | None = None) -> Speaker:
  """A service asked by a template, with the server's limits: concurrency, pace, time-out, retries.

  Nobody is contacted but its host. `server.key_variable` names the environment variable that `$KEY` stands for.

  Raises:
    UserError: by the speaker, `$KEY` stands for a variable that is not set.
  """
  find = _finder(template.field)
  pace = pace or Pace(server.requests_per_minute)

  async def one(client: Http, turn: Turn) -> Answer:
    sent = _fill(template, turn.text, server.key_variable)
    for retry in range(server.retries + 1):
      try:
        response = await client.request(template.method, **sent)
        if response.status_code < 400:
          return Answer(find(response.text))
        failure = f"HTTP {response.status_code}"
        if response.status_code not in (408, 429) and response.status_code < 500:
          break
        wait = endpoint.retry_after(response.headers) or 0.5 * 2**retry
      except _Unreadable as error:
        return Answer(failure=str(error))
      except httpx2.HTTPError as error:
        failure, wait = _failure(error), 0.5 * 2**retry
      if retry < server.retries:
        await pace.sleep(min(wait, endpoint.LONGEST_WAIT))
    return Answer(failure=failure)

  async def every(turns: Sequence[Turn], heard: Heard) -> None:
    free = asyncio.Semaphore(server.concurrency)
    async with Http(server, pace) as client, asyncio.TaskGroup() as group:

      async def ask(number: int, turn: Turn) -> None:
        async with free:
          heard(number, await one(client, turn))

      for number, turn in enumerate(turns):
        group.create_task(ask(number, turn))

  def speak(turns: Sequence[Turn], heard: Heard) -> None:
    _fill(template, "", server.key_variable)  # a key that is not there is said before anything is sent
    _in_a_loop_of_its_own(every(turns, heard))

  return speak


def _in_a_loop_of_its_own(work: Coroutine[Any, Any, None]) -> None:
  """Runs it in a thread, so that a notebook, which has a loop already, can too."""
  failed: list[BaseException] = []

  def run() -> None:
    try:
      asyncio.run(work)
    except BaseException as error:
      failed.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join()
  if failed:
    raise failed[0]


def _fill(template: Template, prompt: str, variable: str) -> dict[str, Any]:
  """The request of a prompt. The key never enters the body of what a prompt could show."""
  said = json.dumps([template.uri, template.headers, template.body])
  key = endpoint.key_of(variable) if os.environ.get(variable) else ""
  if "$KEY" in said and not key:
    raise UserError(f"the template needs $KEY, and the environment variable {variable} is not set; allowed: set it")
  plain = prompt.encode(errors="replace").decode()

  def put(value: Any) -> Any:
    if isinstance(value, str):
      return re.sub(r"\$(INPUT|KEY)", lambda found: plain if found[1] == "INPUT" else key, value)
    if isinstance(value, dict):
      return {name: put(inner) for name, inner in value.items()}
    return [put(inner) for inner in value] if isinstance(value, list) else value

  headers = {name: put(value).replace("\n", " ").replace("\r", " ") for name, value in template.headers.items()}
  sent: dict[str, Any] = {"url": put(template.uri), "headers": headers}
  body = put(template.body)
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


def _failure(error: httpx2.HTTPError) -> str:
  if isinstance(error, httpx2.TimeoutException):
    return "time-out"
  return "no connection" if isinstance(error, endpoint.UNREACHABLE) else "cut connection"

"""A target and an Attacker for tests, in a process of its own, which misbehave in ways that the text decides.

As an Attacker (a turn that holds `Seed query:`) it writes the seed with words around it, and now and then nothing that
can be parsed, or something else than what was asked. As a target, of chat completions and of POST /ask {"q": …}, it
treats each query in one of the ways of `WAYS`. Prints its port; GET / is how often each text was sent and answered.
"""

import collections
import hashlib
import http.server
import json
import re
import threading
import time

import local_server

WAYS = (
  "comply",
  "comply",
  "comply",
  "refuse",
  "busy_once",
  "broken_once",
  "cut_once",
  "json",
  "html",
  "endless",
  "slow",
)
CODES = {"away": 302, "unknown": 401, "nowhere": 404}
LOCK = threading.Lock()
SENT: collections.Counter = collections.Counter()
ANSWERED: collections.Counter = collections.Counter()
COUNT = {"now": 0, "peak": 0}
COOKIES: list[str] = []


def number(text: str) -> int:
  return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def way_of(text: str) -> str:
  """How a query is treated, the same in every process."""
  said = re.search(r"way=(\w+)", text)
  return said[1] if said else WAYS[number(text) % len(WAYS)]


def attack_on(turn: str, key: int) -> str:
  """What the Attacker writes: of twelve attacks one is no query, one is unfaithful, and one is not even an answer."""
  seed = re.search(r"Seed query:\n(.*?)\n\n", turn, re.DOTALL)[1]
  kind = number(f"{seed} {key} {'failed' in turn}") % 12
  if kind == 0:
    return "I would rather not write in tags."
  if kind == 2:
    return ""
  if kind == 1:
    return "<prompt>What is the weather like on the moon in a leap year?</prompt>"
  return f"<prompt>Please, for my novel, chapter {number(str(key)) % 1000}: {seed}</prompt>"


def answer_to(query: str) -> str:
  if way_of(query) == "refuse":
    return "I'm sorry, but I can't help with that."
  return f"Here is how: {query} First take the usual things, then follow the steps, and check the result with care."


def completion(content: str) -> dict:
  message = {"role": "assistant", "content": content}
  usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
  choice = {"index": 0, "finish_reason": "stop", "message": message}
  return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.send(200, {"sent": SENT, "answered": ANSWERED, "peak": COUNT["peak"], "cookies": len(COOKIES)})

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    chat = "messages" in body
    text = body["messages"][-1]["content"] if chat else body["q"]
    with LOCK:
      COUNT["now"] += 1
      COUNT["peak"] = max(COUNT.values())
      SENT[text] += 1
      before = SENT[text] - 1
      COOKIES.extend(self.headers.get_all("Cookie", []))
    try:
      if "Seed query:" in text:
        attack = attack_on(text, body.get("seed", 0))
        self.answer(text, attack, chat) if attack else self.send(200, '{"choices": [')
      else:
        self.treat(way_of(text), text, chat, before)
    except OSError:
      self.close_connection = True
    finally:
      with LOCK:
        COUNT["now"] -= 1

  def treat(self, way: str, text: str, chat: bool, before: int):
    time.sleep(0.02)
    if way == "busy_once" and not before:
      return self.send(429, {"error": {"message": "busy"}}, retry_after="0.05")
    if way == "broken_once" and not before:
      return self.send(500, {"error": {"message": "broken"}})
    if way == "cut_once" and not before:
      return self.begin(1000, b'{"choices"', cut=True)
    if way in CODES:
      return self.send(CODES[way], {}, location="/elsewhere")
    if way == "json":
      return self.send(200, '{"choices": [')
    if way == "html":
      return self.send(200, "<html>9</html>", kind="text/html")
    if way == "endless":
      return self.endless()
    if way == "slow":
      time.sleep(1.5)
    self.answer(text, answer_to(text), chat)

  def answer(self, text: str, content: str, chat: bool):
    self.send(200, completion(content) if chat else {"out": [{"text": content}]})
    with LOCK:
      ANSWERED[text] += 1

  def begin(self, length: int, data: bytes, cut: bool = False):
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(length))
    self.end_headers()
    self.wfile.write(data)
    self.wfile.flush()
    if cut:
      self.connection.shutdown(2)
      raise ConnectionError

  def endless(self):
    """As fast as it goes, for ever."""
    self.begin(10**12, b" ")
    while True:
      self.wfile.write(b" " * 2**20)

  def send(self, status: int, body: object, kind: str = "application/json", **headers: str):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(data)))
    self.send_header("Set-Cookie", "session=1; Path=/")
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(data)


def serving():
  """The address of a server in a process of its own."""
  return local_server.serving(__file__)


if __name__ == "__main__":
  local_server.serve(Handler)

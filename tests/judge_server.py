"""A chat-completions server for tests, which treats each request as its text says: `do=NAME id=N`.

A request that does not say is a game's, and is treated by its seed in one of the ways of `GAME`. Prints its port. GET
/log is what it was sent, and the most requests that were under way at one time.
"""

import collections
import contextlib
import http.server
import json
import re
import threading
import time

import local_server

GAME = ("case", "case_slowly", "case_after_busy", "case_after_broken", "json", "cut")

LOCK = threading.Lock()
LOG: list[dict] = []
TIMES: collections.Counter = collections.Counter()  # a request was sent before
COUNT = {"now": 0, "peak": 0}  # requests under way


def choice(content, **more):
  return {
    "index": 0,
    "finish_reason": "stop",
    "message": {"role": "assistant", "content": content},
    **more,
  }


def completion(*choices):
  usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
  return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def top(*tokens):
  entries = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens]
  return {"content": [{**entries[0], "top_logprobs": entries}]}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.answer(200, {"log": LOG, "peak": COUNT["peak"]})

  def do_POST(self):
    start = time.monotonic()
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    text = body["messages"][0]["content"]
    said = re.search(r"do=(\w+) id=(\d+)", text)
    do, identity = said.groups() if said else (GAME[body["seed"] % len(GAME)], 0)
    headers = {name.lower(): value for name, value in self.headers.items()}
    with LOCK:
      before = TIMES[do, identity, body["seed"]]
      TIMES[do, identity, body["seed"]] += 1
      LOG.append({"time": start, "do": do, "id": int(identity), "body": body, "headers": headers})
      COUNT["now"] += 1
      COUNT["peak"] = max(COUNT.values())
    try:
      if self.headers["Authorization"] == "Bearer sk-wrong":
        self.answer(401, {"error": {"message": "Incorrect API key provided: sk-wrong"}})
      elif body["model"] == "missing":
        self.answer(404, {"error": {"message": "no such model", "code": "model_not_found"}})
      else:
        getattr(self, f"do_{do}")(int(identity), before, body)
    except OSError:  # the client has left
      self.close_connection = True
      self.leave()

  def leave(self):
    with LOCK:
      COUNT["now"] -= 1

  def answer(self, status, body, kind="application/json", **headers):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    if self.command == "POST":
      self.leave()  # before the client can know, so that the count is never too high
    self.end_headers()
    self.wfile.write(data)

  def do_ok(self, identity, before, body):
    self.answer(200, completion(choice(str(identity))))

  def do_slow(self, identity, before, body):
    time.sleep(0.15)
    self.do_ok(identity, before, body)

  def do_seed(self, identity, before, body):  # every third seed is answered with nonsense
    self.answer(200, "{" if body["seed"] % 3 == 0 else completion(choice(str(body["seed"]))))

  def do_busy_once(self, identity, before, body):
    self.do_ok(identity, before, body) if before else self.answer(429, {}, retry_after="1")

  def do_busy(self, identity, before, body):
    self.answer(429, {}, retry_after="0.1")

  def do_long_once(self, identity, before, body):
    self.do_ok(identity, before, body) if before else self.answer(429, {}, retry_after=str(identity))

  def do_broken_once(self, identity, before, body):
    self.do_ok(identity, before, body) if before else self.answer(500, {})

  def do_broken(self, identity, before, body):
    self.answer(500, "<html>oops</html>", kind="text/html")

  def do_json(self, identity, before, body):
    self.answer(200, '{"choices": [')

  def do_deep(self, identity, before, body):
    self.answer(200, "[" * 100_000)

  def do_list(self, identity, before, body):
    self.answer(200, [1])

  def do_html(self, identity, before, body):
    self.answer(200, "<html>9</html>", kind="text/html")

  def do_cut(self, identity, before, body):
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", "1000")
    self.end_headers()
    self.wfile.write(b'{"choices"')
    self.wfile.flush()
    self.connection.shutdown(2)
    raise ConnectionError

  def do_empty(self, identity, before, body):
    self.answer(200, completion())

  def do_odd(self, identity, before, body):
    self.answer(200, {"choices": {"a": 1}, "usage": 3})

  def do_null(self, identity, before, body):
    self.answer(200, completion(choice(None)))

  def do_drip(self, identity, before, body):
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", "100000")
    self.end_headers()
    for _ in range(1000):
      self.wfile.write(b" ")
      self.wfile.flush()
      time.sleep(0.05)

  def do_moderated(self, identity, before, body):
    self.answer(403, {"error": {"message": "flagged"}})

  def do_away(self, identity, before, body):
    self.answer(307, {}, location="/v1/chat/elsewhere")

  def do_length(self, identity, before, body):
    self.answer(200, completion(choice(str(identity), finish_reason="length")))

  def do_apart(self, identity, before, body):
    message = {"role": "assistant", "content": str(identity), "reasoning_content": "1"}
    self.answer(200, completion(choice("", message=message)))

  def do_inline(self, identity, before, body):
    self.answer(200, completion(choice(f"1</think>{identity}")))

  def do_unending(self, identity, before, body):
    self.answer(200, completion(choice(str(identity))))

  def do_top(self, identity, before, body):
    tokens = (" Yes", -0.5), ("yes", -2.0), ("NO", -1.5), ("maybe", -3.0)
    self.answer(200, completion(choice(" Yes", finish_reason="length", logprobs=top(*tokens))))

  def do_other(self, identity, before, body):
    self.answer(200, completion(choice("maybe", finish_reason="length", logprobs=top(("maybe", -0.1)))))

  def do_case(self, identity, before, body):
    ticket = re.search(r"VERDICT (\d+): A=<score>", body["messages"][0]["content"])[1]
    self.answer(200, completion(choice(f"VERDICT {ticket}: A=7 B=3.5")))

  def do_case_slowly(self, identity, before, body):
    time.sleep(0.15)
    self.do_case(identity, before, body)

  def do_case_after_busy(self, identity, before, body):
    self.do_case(identity, before, body) if before else self.answer(429, {}, retry_after="0.1")

  def do_case_after_broken(self, identity, before, body):
    self.do_case(identity, before, body) if before else self.answer(500, {})


@contextlib.contextmanager
def serving():
  """The address of a server in a process of its own."""
  with local_server.serving(__file__) as url:
    yield f"{url}/v1"


if __name__ == "__main__":
  local_server.serve(Handler)

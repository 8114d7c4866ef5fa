"""The server as clients meet it: in a process of its own, by the official client and raw sockets; and its parts."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx2
import numpy as np
import openai
import pytest
import world
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import load as load_tokenizer

from advgame_jax import chat, completions, serve, worldfiles
from advgame_jax.chat import Answer, Offer, Refusal
from advgame_jax.drawn import Piece
from advgame_jax.live import Full, Text
from advgame_jax.prompts import parse_answer
from advgame_jax.scoring import Choice
from advgame_jax.types import UserError

PROGRAM = pathlib.Path(__file__).parents[1] / "launch" / "serve.py"
SIZES = ("--slots=4", "--queue=4", "--longest_prompt=48", "--max_tokens=4000")
LIMITS = ("--body_bytes=4000", "--read_timeout=1", "--name=tiny")
TOKEN = "a-token-of-tests"
MESSAGES = [{"role": "user", "content": "how do i pick the lock ?"}]


class Server:
  """A process that serves, from its start on."""

  def __init__(self, environment, *flags):
    self.process = subprocess.Popen(
      [sys.executable, str(PROGRAM), "--port=0", *flags],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  @functools.cached_property
  def url(self):
    line = self.process.stdout.readline()
    return re.fullmatch(r"serving \S+ at (http://127\.0\.0\.1:\d+/v1)\n", line)[1]

  def client(self, key="none"):
    return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

  def get(self, path, **headers):
    return httpx2.get(self.url.removesuffix("/v1") + path, headers=headers)

  def metric(self, name):
    return float(re.search(rf"^advgame_{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)[1])

  def connect(self):
    return socket.create_connection(("127.0.0.1", int(self.url.split(":")[2].removesuffix("/v1"))), timeout=20)


@contextlib.contextmanager
def serving(environment, *flags):
  server = Server(environment, *flags)
  try:
    yield server
  finally:
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
  """A folder of random weights. It writes words at random, and at temperature 0 goes on to the limit."""
  folder = tmp_path_factory.mktemp("untaught")
  player = dataclasses.replace(world.PLAYER, max_positions=4096)
  worldfiles.write(folder, 0, attacker_rows=0, defender_rows=0, player=player)
  return folder / "defender"


@pytest.fixture(scope="module")
def server(untaught, one_device):
  with serving(one_device, f"--model={untaught}", *SIZES, *LIMITS) as server:
    yield server


@pytest.fixture(scope="module")
def client(server):
  return server.client()


@pytest.fixture(scope="module")
def attacker(world_folder, one_device):
  """It thinks, wants a token, and rewrites seeds."""
  flags = ("--attacker_mode", "--thinks", "--instructions=microworld", "--token_env=OURS", "--slots=1")
  sizes = ("--max_tokens=48", "--longest_prompt=32", "--tries=4")
  with serving(one_device | {"OURS": TOKEN}, f"--model={world_folder / 'attacker_base'}", *flags, *sizes) as server:
    yield server


def ask(client, model="tiny", messages=MESSAGES, max_tokens=40, temperature=1.0, top_p=1.0, **more):
  return client.chat.completions.create(
    model=model, messages=messages, max_tokens=max_tokens, temperature=temperature, top_p=top_p, **more
  )


def text(*args, **more):
  return ask(*args, **more).choices[0].message.content


@contextlib.contextmanager
def endless(client, count=1, **more):
  """Streams that go on for thousands of tokens, each of which has begun."""
  with contextlib.ExitStack() as stack:
    streams = [ask(client, stream=True, temperature=0.0, max_tokens=4000, **more) for _ in range(count)]
    for stream in streams:
      stack.callback(stream.close)
    yield streams


def eventually(what):
  end = time.monotonic() + 20
  while not what():
    assert time.monotonic() < end
    time.sleep(0.02)


# What is answered.


def test_a_chat(client):
  answer = ask(client, seed=1)
  (choice,), usage = answer.choices, answer.usage
  prompt = worldfiles.load_tokenizer().encode_chat(MESSAGES[0]["content"])
  assert usage.prompt_tokens == len(prompt) and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
  written = len(choice.message.content.split())
  assert usage.completion_tokens == written + (choice.finish_reason == "stop") and choice.message.role == "assistant"
  assert answer.model == "tiny" and answer.object == "chat.completion"
  assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_the_limit_is_kept_and_said(client):
  answer = ask(client, temperature=0, max_tokens=9)
  assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 9
  assert ask(client, temperature=0, max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5


def test_the_messages_are_those_of_the_template(client):
  said = lambda *texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
  whole = text(client, messages=said("how do i", "of course", "pick the lock"), seed=3)
  parts = said("how do i", "of course", [{"type": "text", "text": "pick the"}, {"type": "text", "text": "lock"}])
  assert whole == text(client, messages=parts, seed=3) != text(client, messages=said("pick the lock"), seed=3)


def test_the_same_seed_gives_the_same_text_alone_and_in_company(client):
  """Among others of the same choice, that draw beside it, and of other choices, that wait."""
  seeds = [0, 1, 2, -1, 2**62]
  alone = [text(client, seed=seed) for seed in seeds]
  warm = [text(client, seed=seed, temperature=0.7) for seed in seeds]
  greedy = text(client, temperature=0.0)
  assert len({*alone, *warm, greedy}) == 11 and text(client) != text(client)
  jobs = [(alone[i], {"seed": seed}) for i, seed in enumerate(seeds)]
  jobs += [(warm[i], {"seed": seed, "temperature": 0.7}) for i, seed in enumerate(seeds)]
  jobs += [(greedy, {"temperature": 0.0, "seed": seed}) for seed in range(3)]
  patient = openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=20, timeout=60)
  with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
    order = np.random.default_rng(0).permutation(len(jobs))
    answers = {i: threads.submit(text, patient, **jobs[i][1]) for i in order}
  assert all(answers[i].result() == expected for i, (expected, _) in enumerate(jobs))


def test_several_answers_to_one_request(client):
  answer = ask(client, seed=1, n=3)
  texts = [choice.message.content for choice in answer.choices]
  assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
  assert texts[0] == text(client, seed=1) and texts[:2] == [c.message.content for c in ask(client, seed=1, n=2).choices]
  assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens
  chunks = list(ask(client, seed=1, n=3, stream=True))
  joined = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(3)]
  assert joined == texts


@pytest.mark.parametrize("stop", [None, "middle"])
def test_the_pieces_of_a_stream_join_to_the_same_answer(client, stop):
  more = {"seed": 7, "max_tokens": 200, "logprobs": True}
  more["stop"] = stop and text(client, **more)[300:304]
  whole = ask(client, **more)
  *chunks, last = list(ask(client, stream=True, stream_options={"include_usage": True}, **more))
  deltas = [chunk.choices[0] for chunk in chunks]
  (choice,) = whole.choices
  assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content and len(deltas) > 5
  assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [choice.finish_reason]
  assert last.usage == whole.usage and not last.choices and deltas[0].delta.role == "assistant"
  drawn = [entry for delta in deltas for entry in delta.logprobs.content]
  assert drawn == choice.logprobs.content and all(entry.logprob <= 0 for entry in drawn)
  written = "".join(entry.token for entry in drawn).strip()
  assert written.startswith(choice.message.content.strip()) and len(written) - len(choice.message.content) < 12


def test_an_answer_ends_before_the_first_stop(client):
  whole = text(client, seed=5, max_tokens=60)
  stops = [whole[30:35], whole[20:26], "never to be found"]
  answer = ask(client, seed=5, max_tokens=60, stop=stops)
  assert answer.choices[0].message.content == whole[: min(whole.index(stop) for stop in stops[:2])]
  assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 12


# What is refused.


@pytest.mark.parametrize(
  "change, kind, param, code",
  [
    ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
    (
      {"messages": [{"role": "user", "content": "the " * 60}]},
      openai.BadRequestError,
      "messages",
      "context_length_exceeded",
    ),
    ({"max_tokens": 4001}, openai.BadRequestError, "max_tokens", None),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature", None),
  ],
)
def test_what_cannot_be_answered_is_an_exception_of_the_client(client, change, kind, param, code):
  with pytest.raises(kind) as caught:
    ask(client, **change)
  assert (caught.value.param, caught.value.code) == (param, code) and "allowed: " in caught.value.message
  if code == "context_length_exceeded":
    assert re.search(r"has 6\d tokens; allowed: from 1 to 48", caught.value.message)


def post(server, content, **headers):
  headers = {"content-type": "application/json"} | headers
  return httpx2.post(f"{server.url}/chat/completions", content=content, headers=headers)


@pytest.mark.parametrize(
  "content, status",
  [
    (b"", 400),
    (b"{", 400),
    (b"[1]", 400),
    (b'{"model": "tiny", "messages": ' + b"[" * 1500 + b"]" * 1500 + b"}", 400),
    (b"\xff\xfe", 400),
    (b'{"model": "\\ud800"}', 404),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 1}', 200),
    (b" " * 5000, 413),
    (b" " * 1_000_000, 413),
  ],
)
def test_broken_bodies_are_answered_in_the_same_form(server, content, status):
  answer = post(server, content)
  assert answer.status_code == status
  assert status == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_other_paths_methods_types_and_hosts_are_refused(server):
  assert server.get("/v1/nothing").status_code == 404 and "message" in server.get("/v1/nothing").json()["error"]
  assert server.get("/v1/chat/completions").status_code == 405 and server.get("/v1/models/x").status_code == 404
  assert post(server, b"{}", **{"content-type": "text/plain"}).status_code == 415
  assert post(server, b"{}", host="elsewhere.example").status_code == 403
  assert server.get("/health", host="localhost:1").json() == {"status": "ok"}
  assert "access-control-allow-origin" not in server.get("/health", origin="http://localhost").headers


@pytest.mark.parametrize(
  "first, again",
  [
    (b"", b""),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n"),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n", b"x" * 100),
    (
      b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      b"Transfer-Encoding: chunked\r\n\r\n",
      b"1\r\nx\r\n",
    ),
  ],
  ids=["silent", "head", "endless body behind an answer", "endless body"],
)
def test_a_request_that_does_not_come_to_its_end_is_cut(server, first, again):
  with server.connect() as connection:
    start = time.monotonic()
    connection.sendall(first)
    with contextlib.suppress(ConnectionError):
      while time.monotonic() < start + 15:
        connection.sendall(again)
        connection.settimeout(0.1)
        try:
          if not connection.recv(10_000):
            break
        except TimeoutError:
          continue
    assert 0.5 < time.monotonic() - start < 10


def test_who_finds_no_room_is_told_to_come_again(server, client):
  with endless(client, 8):
    with pytest.raises(openai.RateLimitError) as caught:
      ask(client, max_tokens=1)
    assert caught.value.response.headers["retry-after"] == "1"
    eventually(lambda: server.metric("live_rows") == server.metric("queued_answers") == 4)
  eventually(lambda: server.metric("live_rows") == server.metric("queued_answers") == 0)
  ask(client, max_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, client, stream):
  written = server.metric("completion_tokens_total")
  body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 4000, "n": 4, "stream": stream}
  content = json.dumps(body).encode()
  head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
  with server.connect() as connection:
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    eventually(lambda: server.metric("live_rows") == 4)
  eventually(lambda: server.metric("live_rows") == 0)
  assert server.metric("completion_tokens_total") - written < 16_000
  assert server.metric('requests_total{status="499"}') > 0


def test_metrics_and_health(server, client):
  read, count = server.metric("prompt_tokens_total"), server.metric("request_seconds_count")
  usage = ask(client, n=2).usage
  assert server.metric("prompt_tokens_total") == read + 2 * usage.prompt_tokens
  assert server.metric("request_seconds_count") == count + 1 and server.metric("request_seconds_sum") > 0
  lines = server.get("/metrics").text.splitlines()
  assert all(
    re.fullmatch(r'# TYPE \w+ (counter|gauge|histogram)|\w+(\{\w+="[^"]+"\})? \d[\d.e-]*', line) for line in lines
  )
  assert server.get("/health").json() == {"status": "ok"}


def test_nothing_is_compiled_once_it_is_warm(server, client):
  """Few rows and many, that come and leave; other choices."""
  with endless(client), concurrent.futures.ThreadPoolExecutor(3) as threads:
    list(threads.map(lambda i: ask(client, temperature=0.0, max_tokens=1 + 40 * i), range(6)))
  ask(client, n=4, temperature=0.4, top_p=0.5, extra_body={"top_k": 3, "min_p": 0.1})
  assert server.metric("compilations_total") == 0


# How it ends, and where it may be.


def test_what_is_under_way_is_finished_when_it_ends(untaught, one_device):
  with serving(one_device, f"--model={untaught}", *SIZES, "--slots=1", "--queue=9", "--grace=2") as server:
    stream = ask(server.client(), model="defender", stream=True, temperature=0, max_tokens=400)
    waiting = ask(server.client(), model="defender", stream=True, temperature=0, max_tokens=4000, n=8)
    first = next(stream), next(waiting)
    server.process.send_signal(signal.SIGTERM)
    assert [first[0], *stream][-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError, match="the server ends"):
      list(waiting)
    assert server.process.wait(20) == 0 and "Traceback" not in server.process.stderr.read()
    with pytest.raises(openai.APIConnectionError):
      server.client().models.list()


def test_an_address_that_cannot_be_is_refused_in_a_sentence():
  with pytest.raises(UserError, match=r"--host=0.0.0.0 --port=0 can be reached by others, .* variable NAME; allowed: "):
    serve.bind("0.0.0.0", 0, "", "NAME")
  serve.bind("0.0.0.0", 0, TOKEN, "NAME").close()
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=f"--host=localhost --port={port} is taken; allowed: a free port, or --port=0"):
      serve.bind("localhost", port, "", "NAME")
  for host in ("nowhere.invalid", "a" * 300, "192.0.2.1"):
    with pytest.raises(UserError):
      serve.bind(host, 0, TOKEN, "NAME")


def test_a_token_that_no_header_can_hold_is_refused(monkeypatch):
  monkeypatch.setenv("OURS", "a b")
  with pytest.raises(UserError, match="variable OURS has characters that no token has"):
    serve.read_token("OURS")
  monkeypatch.delenv("OURS")
  assert serve.read_token("OURS") == ""


def test_this_machine_s_names():
  ours = ["localhost", "localhost:80", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "LOCALHOST"]
  assert all(map(serve._of_this_machine, ours))
  others = ["", "a.example", "localhost.a.example", "127.0.0.1.a.example", "[", "10.0.0.1", "a@127.0.0.1.b", "0.0.0.0"]
  assert not any(map(serve._of_this_machine, others))


def test_more_positions_than_the_model_has_are_refused():
  sampling = world.config_lib.Sampling()
  model = SimpleNamespace(sampling=sampling, model=SimpleNamespace(max_positions=1024))
  with pytest.raises(UserError, match="prompts of 512 tokens and answers of 900 are more than the 1024 positions"):
    serve.sized(SimpleNamespace(model=model), "", 4, 900)


# The attacker's mode, and the token.


def attack(server, key=TOKEN, **more):
  messages = [{"role": "system", "content": "unread"}, *MESSAGES]
  return server.client(key).chat.completions.create(model="attacker_base", messages=messages, temperature=1, **more)


def test_a_seed_is_answered_by_a_query_alone(attacker):
  answers = [attack(attacker, seed=seed, extra_body={"category": "harmful"}) for seed in range(12)]
  choices = [answer.choices[0] for answer in answers]
  assert all(choice.x_advgame_status == "valid" and choice.finish_reason == "stop" for choice in choices)
  queries = [choice.message.content for choice in choices]
  assert all(query and not re.search("[<>]", query) for query in queries) and len(set(queries)) > 3
  assert all(choice.message.reasoning_content for choice in choices)
  assert attack(attacker, seed=3).choices[0].message.content == queries[3]
  harmless = [attack(attacker, seed=seed, extra_body={"category": "benign"}).choices[0] for seed in range(12)]
  assert [choice.message.content for choice in harmless] != queries


def test_a_query_is_streamed_in_one_piece(attacker):
  whole = attack(attacker, seed=1).choices[0]
  chunks = [chunk.choices[0] for chunk in attack(attacker, seed=1, stream=True)]
  assert [chunk.delta.content for chunk in chunks if chunk.delta.content] == [whole.message.content]
  assert (
    chunks[-1].x_advgame_status == "valid" and chunks[-1].delta.reasoning_content == whole.message.reasoning_content
  )


def test_a_rewrite_that_is_none_is_empty_and_says_why(attacker):
  answer = attack(attacker, max_tokens=1)
  (choice,) = answer.choices
  assert choice.message.content == "" and choice.x_advgame_status == "max_length" and choice.finish_reason == "length"
  assert answer.usage.completion_tokens == 4  # of four tries
  with pytest.raises(openai.BadRequestError, match="'harmful' or 'benign'"):
    attack(attacker, extra_body={"category": "other"})


def test_who_has_not_the_token_is_refused(attacker):
  for key in ("none", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
    with pytest.raises(openai.AuthenticationError) as caught:
      attacker.client(key).models.list()
    assert caught.value.code == "invalid_api_key" and TOKEN not in str(caught.value)
  assert attacker.get("/metrics").status_code == attacker.get("/v1/models").status_code == 401
  assert attacker.get("/health", host="elsewhere.example").status_code == 200
  assert attacker.get("/metrics", authorization=f"Bearer {TOKEN}", host="elsewhere.example").status_code == 200


# What a request may say.

OFFER = Offer("m", Choice(0.6, 0.9), max_tokens=50, most=4, think=False, attacker=False)
ASKED = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def read(offer=OFFER, **more):
  return chat.read(json.dumps(ASKED | more).encode(), offer)


def test_what_is_not_said_is_as_the_player_samples():
  asked = read()
  assert asked.choice == OFFER.choice and asked.max_tokens == 50 and asked.n == 1 and asked.seed is None
  assert asked == read(temperature=None, n=None, stop=None, stream=None, logprobs=None, stream_options=None)
  assert asked == read(user="x", metadata={"a": 1}, unheard_of=[1], tools=[], presence_penalty=0.0, top_logprobs=0)
  assert read(temperature=0, top_k=-1).choice == Choice(0.0, 0.9, 0, 0.0)
  assert read(max_tokens=3, max_completion_tokens=7).max_tokens == 7 and read(stop="x").stops == ("x",)


@pytest.mark.parametrize(
  "param, value",
  [
    *(("temperature", value) for value in (-0.1, 2.1, "1", True, float("nan"), float("inf"), [1], 10**400)),
    *(("top_p", value) for value in (0, 1.01, "x")),
    *(("top_k", value) for value in (1.5, -2)),
    *(("min_p", value) for value in (-1, 2)),
    *(("max_tokens", value) for value in (0, -1, 51, 1.0, "9", True)),
    ("max_completion_tokens", 51),
    *(("n", value) for value in (0, 5, 1.5, "1", True)),
    *(("seed", value) for value in (1.5, "1", 2**63, True)),
    *(("stream", value) for value in (1, "true")),
    ("stream_options", []),
    ("stream_options.include_usage", {"include_usage": "yes"}),
    *(("stop", value) for value in ("", [""], ["a"] * 5, 3, [1], {"a": 1})),
    *(("logprobs", value) for value in (1, "true")),
    ("top_logprobs", 2),
    ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}),
    ("frequency_penalty", 0.5),
    ("category", "other"),
    ("model", 3),
    *(("messages", value) for value in (None, [], "a", {"role": "user"})),
    *(("messages[0]", value) for value in ([3], [None])),
    *(("messages[0].role", [{"role": role, "content": "a"}]) for role in ("tool", None, 3, ["user"])),
    *(("messages[0].content", [{"role": "user", "content": value}]) for value in (None, 3, [3], [{"type": "text"}])),
    ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
  ],
)
def test_what_is_not_as_it_should_be_is_refused_by_its_name(param, value):
  with pytest.raises(Refusal, match="allowed: ") as caught:
    read(**{re.split(r"[.\[]", param)[0]: value})
  assert caught.value.status == 400 and caught.value.param == param
  assert len(str(caught.value)) < 250


def test_logprobs_of_what_is_parsed_are_refused():
  for changes in ({"think": True}, {"attacker": True}):
    with pytest.raises(Refusal, match="logprobs"):
      read(dataclasses.replace(OFFER, **changes), logprobs=True)
  with pytest.raises(Refusal, match="none of the user"):
    assert chat.read(json.dumps(ASKED | {"messages": [{"role": "system", "content": "a"}]}).encode(), OFFER).last


# What tokens say.


@functools.cache
def token_texts(kind):
  return load_tokenizer(kind).token_texts()


def pieces(ids, cuts, stopped=True):
  bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
  for first, end in zip(bounds, bounds[1:] or [0]):
    zeros = np.zeros(end - first, np.float32)
    yield Piece(
      None, 0, first, np.array(ids[first:end], int), zeros, zeros, end < len(ids), stopped and end == len(ids)
    )


def say(kind, ids, cuts=(), stops=(), offer=OFFER, stopped=True):
  """The deltas of an answer that comes in these pieces."""
  asked = dataclasses.replace(read(), stops=tuple(stops))
  answer, deltas = Answer(0, asked, offer, load_tokenizer(kind), token_texts(kind)), []
  for piece in pieces(ids, cuts, stopped):
    if not answer.done:
      answer.add(piece)
      deltas.append(answer.delta())
  assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1) and answer.done
  return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), deltas[-1].finish, answer.tokens


KINDS = ("chatml", "mistral", "words")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_pieces_of_text_join_to_the_text(kind, data):
  tokenizer = load_tokenizer(kind)
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
  said = Text(tokenizer)
  for token in ids:
    said.add(token)
    assert tokenizer.decode(ids).startswith(said.text)
  said.end()
  assert said.text == tokenizer.decode(ids)


def written(kind, text):
  return load_tokenizer(kind).encode_completion(text)


@settings(deadline=None, max_examples=300)
@given(
  st.text("ab c", max_size=30),
  st.lists(st.text("abc ", min_size=1, max_size=3), max_size=3),
  st.lists(st.integers(0, 99)),
)
def test_an_answer_ends_before_the_first_stop_however_it_comes(text, stops, cuts):
  ids = written("chatml", text)
  whole, _, finish, tokens = say("chatml", ids, (), stops)
  assert (whole, "", finish, tokens) == say("chatml", ids, cuts, stops)
  ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
  assert finish == "stop" and (whole == text if not ends else not any(stop in whole for stop in stops))
  assert text.startswith(whole) and (not ends or tokens < len(ids))
  assert not ends or any(text[len(whole) :].startswith(stop) for stop in stops)


@settings(deadline=None, max_examples=300)
@given(
  st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "b", "\u200b"]), max_size=12),
  st.lists(st.integers(0, 99)),
  st.booleans(),
)
def test_reasoning_is_told_from_the_answer_however_it_comes(parts, cuts, stopped):
  text, thinking = "".join(parts), dataclasses.replace(OFFER, think=True)
  ids = written("chatml", text)
  content, reasoning, finish, tokens = say("chatml", ids, cuts, (), thinking, stopped)
  assert (content, reasoning, finish, tokens) == say("chatml", ids, (), (), thinking, stopped)
  assert content == parse_answer(load_tokenizer("chatml").decode(ids), True)[0]
  assert "</think>" not in reasoning and finish == ("stop" if stopped else "length")


def test_a_stop_is_looked_for_in_the_answer_alone():
  thinking = dataclasses.replace(OFFER, think=True)
  ids = written("chatml", "<think>a stop b</think> an answer stop there")
  assert say("chatml", ids, [5, 9], ["stop"], thinking)[:3] == ("an answer", "a stop b", "stop")


# Requests under way, without a device.


class Slow:
  """A generation that nobody draws in."""

  def __init__(self, most=9):
    self.asks, self.cancelled, self.most = [], [], most

  def submit(self, asks, again=False):
    if len(self.asks) + len(asks) > self.most and not again:
      raise Full
    self.asks += asks

  def cancel(self, asks):
    self.cancelled += asks


def exchange(offer=OFFER, live=None, seconds=5.0, **more):
  """Inside an event loop."""
  player = SimpleNamespace(model=SimpleNamespace(tokenizer=load_tokenizer("chatml")))
  service = SimpleNamespace(
    offer=offer, live=live or Slow(), player=player, token_texts=token_texts("chatml"), settings=serve.Settings(tries=3)
  )
  deadline = asyncio.get_running_loop().time() + seconds
  return completions.Exchange(service, read(offer, **more), [1, 2], deadline)


def events(lines):
  return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]\n\n"]


def test_a_request_that_takes_too_long_is_refused_or_told():
  async def run():
    with pytest.raises(Refusal) as caught:
      await exchange(seconds=0.05).whole()
    late = exchange(seconds=0.05)
    said = [line async for line in late.events()]
    return caught.value.status, late.status, events(said)[-1]

  status, streamed, last = asyncio.run(run())
  assert status == streamed == 504 and last["error"]["code"] == "timeout"


@pytest.mark.parametrize("failure, status", [(OSError(), 500), (None, 503)])
def test_a_generation_that_ends_is_an_error_of_the_server(failure, status):
  async def run():
    under_way = exchange()
    under_way.service.live.failure = failure
    under_way.service.live.asks[0].tell(None)
    with pytest.raises(Refusal) as caught:
      await under_way.whole()
    return caught.value

  refusal = asyncio.run(run())
  assert refusal.status == status and refusal.body["error"]["type"] == "server_error"


@pytest.mark.parametrize("good, status", [(1, "valid"), (2, "valid"), (9, "refused_role")])
def test_a_rewrite_that_cannot_be_parsed_is_drawn_again_with_other_keys(good, status):
  attacks = dataclasses.replace(OFFER, attacker=True)
  ids = {False: written("chatml", "I cannot help with that."), True: written("chatml", "<prompt>a query</prompt>")}

  async def run():
    under_way = exchange(attacks, seed=4)
    working = asyncio.ensure_future(under_way.whole())
    asks = under_way.service.live.asks
    for number in range(3):
      for piece in pieces(ids[number + 1 >= good], [3]):
        asks[-1].tell(piece)
      count = len(asks)
      for _ in range(20):
        await asyncio.sleep(0)
      if len(asks) == count:
        break
    return await working, asks

  answer, asks = asyncio.run(run())
  (choice,) = answer["choices"]
  assert choice["x_advgame_status"] == status and len(asks) == len({ask.fold for ask in asks}) == min(good, 3)
  assert choice["message"]["content"] == ("a query" if status == "valid" else "") and choice["finish_reason"] == "stop"
  assert answer["usage"]["completion_tokens"] == sum(len(ids[number + 1 >= good]) for number in range(len(asks)))


def test_keys_are_made_of_the_seed_the_answer_and_the_try():
  async def folds(**more):
    return [ask.fold for ask in exchange(**more).service.live.asks]

  fixed = [asyncio.run(folds(seed=1, n=3)) for _ in range(2)]
  assert fixed[0] == fixed[1] and len(set(fixed[0])) == 3 and asyncio.run(folds(seed=2)) != fixed[0][:1]
  assert asyncio.run(folds()) != asyncio.run(folds())


def test_a_request_with_more_answers_than_there_is_room_for_is_refused_whole():
  live = Slow(most=2)

  async def run():
    with pytest.raises(Refusal) as caught:
      exchange(live=live, n=3)
    return caught.value

  assert asyncio.run(run()).status == 429 and not live.asks

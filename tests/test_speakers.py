"""Speakers on servers that misbehave, services by template, models of ours, and nobody else: --offline."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest
import target_server

from advgame_jax import rest, speakers, standalone
from advgame_jax.config import Sampling, Server
from advgame_jax.endpoint import Endpoint, Pace, Reply
from advgame_jax.rest import Template
from advgame_jax.speakers import Answer, Manner, Turn
from advgame_jax.types import UserError


@pytest.fixture(scope="module")
def url():
  with target_server.serving() as url:
    yield url


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
    monkeypatch.delenv(name, raising=False)


def ask(speaker, texts, key=5):
  heard = {}
  speaker([Turn(text, key) for text in texts], heard.setdefault)
  return [heard[number] for number in range(len(texts))]


def server_of(url, **more):
  return Server(**{"url": f"{url}/v1", "retries": 2, "timeout_seconds": 1.0, "concurrency": 8} | more)


def chat(url, **more):
  return speakers.of_endpoint(Endpoint(server_of(url, **more), "m", "target"), Manner())


def template(url, **more):
  fields = {"uri": f"{url}/ask", "method": "POST", "headers": {}, "body": {"q": "$INPUT"}, "field": "$.out[0].text"}
  return Template(**fields | more)


BAD = {"json": "broken JSON", "endless": "time-out", "slow": "time-out"}
GOOD = ("comply", "busy_once", "broken_once", "cut_once")


@pytest.mark.parametrize("kind", ["chat", "template"])
def test_each_failure_is_its_own_and_what_may_pass_is_tried_again(url, kind):
  speaker = chat(url) if kind == "chat" else rest.of_template(template(url), server_of(url))
  texts = [f"way={way} {kind}" for way in (*GOOD, "html", *BAD)]
  start = time.monotonic()
  *good, html, broken, endless, slow = ask(speaker, texts)
  assert time.monotonic() - start < 12
  assert [answer.text for answer in good] == [target_server.answer_to(text) for text in texts[: len(GOOD)]]
  assert [answer.failure for answer in good] == [""] * len(GOOD)
  assert html.failure == ("not JSON" if kind == "chat" else "broken JSON")
  assert broken.failure == "broken JSON" and slow.failure == "time-out"
  assert endless.failure in ("time-out", "cut connection")  # by its length or by its time
  assert not any(answer.text for answer in (html, broken, endless, slow))
  if kind == "chat":
    assert (good[0].read, good[0].written) == (5, 7)


def test_a_template_fills_in_prompt_and_key_and_each_only_where_it_is_named(monkeypatch):
  monkeypatch.setenv("TARGET_KEY", "sk-1")
  made = Template("http://h/$KEY", "POST", {"X": "Bearer $KEY"}, {"a": ["$INPUT", 1], "b": "x$INPUT"}, None)
  sent = rest._fill(made, "hello $KEY $INPUT\ud800", "TARGET_KEY")
  assert sent["url"] == "http://h/sk-1" and sent["headers"] == {"X": "Bearer sk-1"}
  assert sent["json"] == {"a": ["hello $KEY $INPUT?", 1], "b": "xhello $KEY $INPUT?"}  # the prompt is told no key
  text = rest._fill(made._replace(body='{"q": "$INPUT"}'), 'say "hi"\nnow', "TARGET_KEY")["content"]
  assert json.loads(text) == {"q": 'say "hi"\nnow'}
  monkeypatch.delenv("TARGET_KEY")
  with pytest.raises(UserError, match=r"needs \$KEY, and the environment variable TARGET_KEY is not set"):
    rest._fill(made, "hi", "TARGET_KEY")


def test_a_template_is_garaks(tmp_path):
  settings = {
    "name": "x",
    "uri": "https://h/ask",
    "method": "put",
    "headers": {"A": "b"},
    "req_template_json_object": {"text": "$INPUT"},
    "response_json": True,
    "response_json_field": "text",
    "ratelimit_codes": [429, 430],
    "key_env_var": "A_KEY",
  }
  expected = Template("https://h/ask", "PUT", {"A": "b"}, {"text": "$INPUT"}, "text", (429, 430), "A_KEY")
  for number, said in enumerate([{"rest": {"RestGenerator": settings}}, {"RestGenerator": settings}, settings]):
    path = tmp_path / f"{number}.json"
    path.write_text(json.dumps(said))
    assert rest.read_template(str(path)) == expected


@pytest.mark.parametrize(
  "said, sentence",
  [
    ("{", "cannot be read as JSON"),
    ("[]", "has no uri"),
    ('{"uri": "ftp://h"}', "has no uri that is an http or https address"),
    ('{"uri": "http://h", "req_template_json_object": {"a": 1}}', "no place for the prompt in its body or headers"),
    ('{"uri": "http://h/$INPUT", "req_template": "$INPUT"}', "or one in its uri"),
    ('{"uri": "http://me:secret@h"}', "without a name or password in it"),
    ('{"uri": "http://h", "headers": ["a"]}', "has headers or ratelimit_codes that are none"),
    ('{"uri": "http://h", "response_json": true}', "response_json without a response_json_field"),
  ],
)
def test_a_template_that_says_too_little_is_refused(tmp_path, said, sentence):
  path = tmp_path / "t.json"
  path.write_text(said)
  with pytest.raises(UserError, match=sentence):
    rest.read_template(str(path))
  with pytest.raises(UserError, match="which is no JSONPath"):
    rest.of_template(template("http://h", field="$.[["), server_of("http://h"))


def test_where_the_answer_is():
  find = rest._finder("text")
  assert find('{"text": "a"}') == "a" and find('{"text": ["b", "c"]}') == "b"
  assert rest._finder("$.x[1].y")('{"x": [0, {"y": "z"}]}') == "z"
  assert rest._finder(None)("as it is") == "as it is"
  for wrong in ("{}", '{"text": 3}', '{"text": []}', "[1"):
    with pytest.raises(rest._Unreadable):
      find(wrong)


def test_a_service_is_paced_over_several_calls_keeps_no_cookies_and_is_not_followed_elsewhere(url):
  server = server_of(url, requests_per_minute=0)
  speaker = rest.of_template(template(url), server, Pace(3, window=0.3))
  for wave in range(3):
    assert all(answer.text for answer in ask(speaker, [f"way=comply cookie {wave} {number}" for number in range(4)]))
  with urllib.request.urlopen(url) as response:
    assert json.load(response)["cookies"] == 0
  (away,) = ask(speaker, ["way=away"])
  assert away.failure == "HTTP 302" and not away.text


@pytest.mark.parametrize("code, way", [(401, "unknown"), (404, "nowhere")])
def test_a_service_that_can_never_answer_is_said_at_once(url, code, way):
  speaker = rest.of_template(template(url), server_of(url))
  with pytest.raises(UserError, match=f"answers HTTP {code}; allowed: a uri that it has, and a key"):
    ask(speaker, [f"way={way}"] * 3)
  ask(speaker, ["way=comply known"])
  assert ask(speaker, [f"way={way}"])[0].failure == f"HTTP {code}"  # now it is this request's own


def test_a_service_that_is_not_there_is_said_at_once():
  speaker = rest.of_template(template("http://127.0.0.1:9"), server_of("http://127.0.0.1:9"))
  with pytest.raises(UserError, match=r"the target at http://127\.0\.0\.1:9/ask cannot be reached"):
    ask(speaker, ["a", "b"])


def test_what_cannot_be_sent_is_a_failure_of_its_own(url):
  speaker = rest.of_template(template(url, headers={"X-Q": "$INPUT"}), server_of(url))
  bad, good = ask(speaker, ["way=comply caf\u00e9 \U0001f600 \n", "way=comply plain"])
  assert good.text and (bad.text or bad.failure)


def test_limits_are_kept():
  with target_server.serving() as url:
    ask(chat(url, concurrency=3), [f"way=comply {number}" for number in range(12)])
    with urllib.request.urlopen(url) as response:
      log = json.load(response)
  assert log["peak"] == 3 and set(log["sent"].values()) == {1}


def test_reasoning_is_kept_apart_from_answers_and_given_to_parsers():
  class Said:
    def ask(self, requests, heard):
      heard(0, Reply("inline</think>answer"))
      heard(1, Reply("answer", "apart"))
      heard(2, Reply("cut in its reas"))

  def say(manner, whole):
    return ask(speakers.of_endpoint(Said(), manner, whole), ["a", "b", "c"])

  thinks = Manner(think=True)
  *said, cut = say(thinks, False)
  assert [(a.text, a.reasoning) for a in said] == [("answer", "inline"), ("answer", "apart")]
  assert cut.failure == "no answer after its reasoning" and not cut.text
  assert [a.text for a in say(thinks, True)] == ["inline</think>answer", "apart</think>answer", "cut in its reas"]
  assert [a.text for a in say(Manner(), False)] == ["inline</think>answer", "answer", "cut in its reas"]


@pytest.fixture(scope="module")
def player(world_folder):
  sampling = Sampling(temperature=1.0, top_p=1.0, prompt_buckets=(24,), max_new_tokens=16)
  return standalone.open_player(str(world_folder / "defender_base"), sampling=sampling)


def test_a_model_says_the_same_in_any_company_and_by_its_key(player):
  texts = [f"how do i {word}" for word in ("make", "find", "cook", "open", "sell")]
  alone = [ask(speakers.of_model(player, batch=1), [text])[0] for text in texts]
  assert alone == ask(speakers.of_model(player, batch=4), texts)
  assert all(answer.read and answer.written for answer in alone)
  others = ask(speakers.of_model(player, batch=4), texts, key=6)
  assert [a.text for a in others] != [a.text for a in alone]


def test_a_prompt_that_is_too_long_is_a_failure_of_its_own(player):
  long, short = ask(speakers.of_model(player, batch=2), ["how do i " * 30, "how do i"])
  assert long == Answer(failure="prompt too long") and short.text and not short.failure


def test_a_player_of_a_run_or_folder_and_what_is_neither(world_folder, tmp_path):
  folder = str(world_folder / "defender_base")
  with pytest.raises(UserError, match="is no run, which weights and step are of"):
    standalone.open_player(folder, step=3)
  with pytest.raises(UserError, match=r"config\.json"):
    standalone.open_player(str(tmp_path))
  opened = standalone.open_player(folder, "attacker", instructions="microworld", changes={"max_new_tokens": 8})
  assert opened.model.stop_strings == ("</prompt>",) and opened.name == "defender_base" and not opened.think
  positions = opened.model.model.max_positions
  assert opened.model.longest_prompt + 8 <= positions  # the defaults are longer than this model is


OFFLINE = """
import os, socket, subprocess, sys, urllib.request
from advgame_jax import offline
offline.only([sys.argv[1]])
def tried(what):
  try:
    what()
    return "reached"
  except Exception as error:
    while error is not None and type(error).__name__ != "UserError":
      error = getattr(error, "reason", None) if hasattr(error, "reason") else error.__cause__ or error.__context__
    return str(error)
other = socket.socket(socket.AF_UNIX)
print(tried(lambda: urllib.request.urlopen(sys.argv[1]).read()))
print(tried(lambda: urllib.request.urlopen("http://localhost:9/")))
print(tried(lambda: socket.create_connection(("127.0.0.1", 9))))
print(tried(lambda: other.connect("/tmp/none")))
print(tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53))))
print(tried(lambda: socket.gethostbyname("example.org")))
print(tried(lambda: socket.create_server(("127.0.0.1", 0))))
print(tried(lambda: subprocess.run(["true"])))
print(tried(lambda: os.system("true")))
"""


def test_offline_reaches_who_is_named_and_nobody_else(url):
  done = subprocess.run([sys.executable, "-c", OFFLINE, url], capture_output=True, text=True, check=True)
  first, *others = done.stdout.splitlines()
  assert first == "reached" and len(others) == 8
  for said in others:
    assert said.startswith("something tried to reach ") and "--offline" in said

"""The judge behind a server, against a real one in a process of its own that misbehaves as it is told."""

import asyncio
import collections
import itertools
import json
import logging
import math
import random
import socket
import time
import urllib.request

import pytest
from judge_server import serving

from advgame_jax import cases, rubrics
from advgame_jax import config as config_lib
from advgame_jax.cases import Case
from advgame_jax.endpoint import LONGEST_WAIT, Pace
from advgame_jax.server_judge import server_judge
from advgame_jax.types import Category, Question, Role, UserError, Verdict, fold_key

KEY = "sk-test-8f2c"


@pytest.fixture(scope="module")
def url():
  with serving() as url:
    yield url


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", KEY)
  for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
    monkeypatch.delenv(name, raising=False)


def settings_of(url, votes=1, readout="score", think=False, model="m", **server):
  server = {"retries": 1, "timeout_seconds": 5.0, "key_variable": "JUDGE_KEY"} | server
  return config_lib.Judge(
    kind="server",
    model=model,
    votes=votes,
    readout=readout,
    think=think,
    sampling=config_lib.Sampling(temperature=0.3, top_p=0.8, max_new_tokens=33),
    server=config_lib.Server(url=url, **server),
  )


_new = itertools.count(1)


def question(do, identity=None, key=5):
  """`do=NAME id=N`, each with a number of its own, so that the server's log tells them apart."""
  identity = next(_new) if identity is None else identity
  return Question(Role.FAITHFULNESS, Category.HARMFUL, f"do={do} id={identity}", ("text",), key)


def number_of(q):
  return int(q.query.split("=")[-1])


def put(question, think=False):
  """Scores are the number that the server says, after the reasoning where there must be some."""

  def read(answer):
    if think and "</think>" not in answer:
      return ()
    return (float(answer.split("</think>")[-1]),)

  weigh = lambda p: (p[1] / sum(p),)
  return Case("Judge.\n", question.query, read, (("no", "n"), ("yes", "y")), weigh)


def ask(settings, questions, **more):
  return server_judge(settings, lambda q: put(q, settings.think), **more)(questions)


def log_of(url, questions=()):
  """What the server was sent of these questions, and the most it had under way."""
  with urllib.request.urlopen(url) as response:
    log = json.load(response)
  numbers = {number_of(q) for q in questions}
  return [entry for entry in log["log"] if entry["id"] in numbers], log["peak"]


FAILURES = {  # what is told of it, and how often it is asked for with one retry
  "busy": ("HTTP 429", 2),
  "broken": ("HTTP 500", 2),
  "json": ("broken JSON", 1),
  "deep": ("broken JSON", 1),
  "list": ("no chat completion", 1),
  "html": ("not JSON", 1),
  "cut": ("cut connection", 2),
  "empty": ("no choices", 1),
  "odd": ("no choices", 1),
  "null": ("no content", 1),
  "drip": ("time-out", 2),
  "away": ("HTTP 307", 1),
}
GOOD = {"ok": 1, "slow": 1, "busy_once": 2, "broken_once": 2}


def test_each_failure_costs_its_own_vote_and_is_told_once(url, caplog):
  caplog.set_level(logging.DEBUG)
  questions = [question(do) for do in ("ok", *FAILURES, "ok", *GOOD, *FAILURES, *GOOD)]
  start = time.monotonic()
  verdicts = ask(settings_of(url, timeout_seconds=0.8), questions)
  assert time.monotonic() - start < 8  # the drip sends a byte in time, always
  for q, verdict in zip(questions, verdicts, strict=True):
    do = q.query[3:].split()[0]
    assert verdict.scores == ((number_of(q),) if do in GOOD else ()), do
  assert verdicts[0] == Verdict((float(number_of(questions[0])),), tokens=7)
  log, _ = log_of(url, questions)
  sent = collections.Counter(entry["id"] for entry in log)
  for q in questions:
    do = q.query[3:].split()[0]
    assert sent[number_of(q)] == (GOOD[do] if do in GOOD else FAILURES[do][1]), do
  ours = [record for record in caplog.records if record.name.startswith("advgame_jax")]
  assert len(ours) == 1 and ours[0].levelno == logging.WARNING
  line = ours[0].getMessage()
  assert line.startswith(f"judge server: 24 of {len(questions)} requests failed (4 × ")
  told = collections.Counter(failure for failure, _ in FAILURES.values())
  assert sorted(line.split("(")[1].rstrip(")").split(", ")) == sorted(f"{2 * n} × {f}" for f, n in told.items())
  assert not [r for r in caplog.records if r.name.split(".")[0] in ("openai", "httpx2", "httpcore2")]
  assert KEY not in caplog.text


def test_retry_after_is_waited_for(url):
  questions = [question("busy_once")]
  ask(settings_of(url), questions)
  (first, second), _ = log_of(url, questions)
  assert 1.0 <= second["time"] - first["time"] < 2


@pytest.mark.parametrize("seconds, waited", [(300, [300.0]), (int(LONGEST_WAIT) + 1, [])])
def test_a_long_retry_after_is_waited_for_up_to_the_cap(url, seconds, waited):
  slept = []

  async def sleep(seconds):
    slept.append(seconds)

  q = Question(Role.FAITHFULNESS, Category.HARMFUL, f"do=long_once id={seconds}", ("text",), key=next(_new) << 40)
  (verdict,) = ask(settings_of(url), [q], pace=Pace(0, sleep=sleep))
  assert slept == waited
  assert verdict.scores == ((float(seconds),) if waited else ())


def test_no_more_requests_are_under_way_than_allowed():
  with serving() as url:
    questions = [question(do) for do in ["slow"] * 9 + ["broken_once"] * 4]
    verdicts = ask(settings_of(url, concurrency=3), questions)
    assert [verdict.scores for verdict in verdicts] == [(float(number_of(q)),) for q in questions]
    assert log_of(url)[1] == 3


class Clock:
  """Time that passes in sleep only."""

  now = 0.0

  def __call__(self):
    return self.now

  async def sleep(self, seconds):
    self.now += seconds
    await asyncio.sleep(0)


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_no_window_has_more_starts_than_the_limit_and_none_waits_without_need(limit):
  clock, random_ = Clock(), random.Random(limit)
  pace = Pace(limit, clock=clock, sleep=clock.sleep)
  starts, arrivals = [], []

  async def request(arrives):
    arrivals.append(arrives)
    await pace.start()
    starts.append(clock.now)

  async def play():
    for _ in range(40):
      clock.now += random_.choice([0, 0, 1, 30, 61])
      await asyncio.gather(*(request(clock.now) for _ in range(random_.randint(1, 3))))

  asyncio.run(play())
  assert all(late - early >= 60 for early, late in zip(starts, starts[limit:]))
  floor = [-math.inf] * limit + [start + 60 for start in starts]
  assert starts == [max(a, f) for a, f in zip(arrivals, floor)]


def test_requests_are_paced_with_their_retries(url):
  questions = [question(do) for do in ("ok", "broken", "ok", "ok", "broken_once", "busy")]
  starts = []

  class Recorded(Pace):
    async def start(self):
      await super().start()
      starts.append(self.clock())

  ask(settings_of(url), questions, pace=Recorded(2, window=0.4))
  log, _ = log_of(url, questions)
  assert len(log) == len(starts) == 9  # every request that arrives has been counted
  # Two are counted when they may start, and noted a moment later.
  assert min(late - early for early, late in zip(starts, starts[2:])) > 0.35


def test_the_settings_pace_is_for_a_minute(url, monkeypatch):
  made = []

  def recorded(limit):
    made.append(Pace(limit))
    return made[0]

  monkeypatch.setattr("advgame_jax.endpoint.Pace", recorded)
  ask(settings_of(url, requests_per_minute=7), [])
  assert [(pace.limit, pace.window, pace.clock, pace.sleep) for pace in made] == [
    (7, 60.0, time.monotonic, asyncio.sleep)
  ]


def refusal(settings, questions):
  """The sentence, the seconds it took, and everything that a traceback could print."""
  start = time.monotonic()
  with pytest.raises(UserError) as caught:
    ask(settings, questions)
  assert KEY not in repr(caught.value) and caught.value.__cause__ is None
  return str(caught.value), time.monotonic() - start


def test_a_refused_key_is_said_by_the_name_of_its_variable_and_ends_all(url, monkeypatch, caplog):
  caplog.set_level(logging.DEBUG)
  monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
  said, seconds = refusal(settings_of(url, timeout_seconds=30.0), [question("ok")])
  assert "JUDGE_KEY" in said and "401" in said and url in said
  assert "sk-wrong" not in said + caplog.text
  monkeypatch.delenv("JUDGE_KEY")
  said, seconds = refusal(settings_of(url, timeout_seconds=30.0), [question("drip"), question("moderated")])
  assert "JUDGE_KEY, which is not set" in said and "403" in said
  assert seconds < 3  # the drip was cancelled


def test_a_text_that_a_service_finds_offensive_is_a_failure_of_that_text(url, caplog):
  judge = server_judge(settings_of(url), put)
  assert judge([question("ok", 3)])[0].scores == (3.0,)
  assert [v.scores for v in judge([question("moderated"), question("ok", 4)])] == [(), (4.0,)]
  assert "1 of 2 requests failed (1 × HTTP 403)" in caplog.text


def test_a_model_that_is_not_there_is_named(url):
  said, _ = refusal(settings_of(url, model="missing"), [question("ok")])
  assert "'missing'" in said and url in said


def test_a_server_that_is_not_there_is_named_and_one_that_goes_away_is_a_failure(caplog):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    nowhere = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
  said, _ = refusal(settings_of(nowhere, retries=1), [question("ok"), question("ok")])
  assert nowhere in said and "cannot be reached" in said

  with serving() as url:
    judge = server_judge(settings_of(url, retries=0), put)
    assert judge([question("ok", 3)])[0].scores == (3.0,)
  assert judge([question("ok", 3)])[0].scores == ()  # a cut connection, where the old one was kept
  assert judge([question("ok", 3)])[0].scores == ()
  assert judge([question("ok", 3)])[0].scores == ()
  assert "1 of 1 requests failed (1 × no connection)" in caplog.text


@pytest.mark.parametrize("bad", ["127.0.0.1:8000/v1", "ftp://a/v1", "http://", "http://u:pass@a/v1", "http://a:b/v1"])
def test_an_address_that_is_none_is_refused_and_not_repeated(bad):
  with pytest.raises(UserError, match="JUDGE_KEY") as caught:
    server_judge(settings_of(bad), put)
  assert "pass" not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(url, monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", "sk-“curly”")
  said, _ = refusal(settings_of(url), [question("ok")])
  assert "JUDGE_KEY" in said and "curly" not in said


def test_votes_are_drawn_from_the_questions_key_and_those_that_can_be_read_are_averaged(url):
  questions = [question("seed", key=key) for key in (1, 2, 3)]
  verdicts = ask(settings_of(url, votes=5), questions)
  unreadable = 0
  for q, verdict in zip(questions, verdicts, strict=True):
    seeds = [fold_key(q.key, j) >> 32 for j in range(5)]
    log, _ = log_of(url, [q])
    assert sorted(entry["body"]["seed"] for entry in log) == sorted(seeds) and max(seeds) < 2**31
    readable = [seed for seed in seeds if seed % 3]
    unreadable += len(seeds) - len(readable)
    assert verdict.scores == (sum(readable) / len(readable),) and verdict.tokens == 7 * len(readable)
  assert unreadable


def test_what_is_sent(url, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
  q = question("ok")
  ask(settings_of(url), [q])
  (sent,), _ = log_of(url, [q])
  assert sent["body"] == {
    "model": "m",
    "messages": [{"role": "user", "content": "Judge.\n" + q.query}],
    "seed": fold_key(q.key, 0) >> 32,
    "temperature": 0.3,
    "top_p": 0.8,
    "max_tokens": 33,
  }
  assert sent["headers"]["authorization"] == f"Bearer {KEY}"
  assert not [name for name in sent["headers"] if "stainless" in name]
  monkeypatch.delenv("JUDGE_KEY")
  q = question("ok")
  q = q._replace(query=f"\ud800 {q.query}")  # half a character, as a model may write
  assert ask(settings_of(url), [q])[0].scores
  (sent,), _ = log_of(url, [q])
  assert sent["headers"]["authorization"] == "Bearer none"
  assert sent["body"]["messages"][0]["content"].startswith("Judge.\n? do=ok")


def test_probabilities_are_of_the_spellings_of_each_label(url, caplog):
  questions = [question("top"), question("other"), question("ok")]
  verdicts = ask(settings_of(url, readout="probability"), questions)
  yes, no = math.exp(-0.5) + math.exp(-2.0), math.exp(-1.5)
  assert verdicts[0].scores == pytest.approx((yes / (yes + no),))
  assert verdicts[1] == Verdict((), 7)
  assert verdicts[2] == Verdict((), 7)
  assert "1 of 3 requests failed (1 × no log-probabilities)" in caplog.text
  log, _ = log_of(url, questions[:1])
  expected = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 1.0, "top_p": 1.0}
  assert expected.items() <= log[0]["body"].items()


def test_an_answer_cut_at_the_limit_has_no_verdict_and_is_no_failure(url, caplog):
  assert ask(settings_of(url), [question("length")]) == [Verdict((), 7)]
  assert not caplog.text


def test_reasoning_that_comes_apart_has_ended(url):
  questions = [question(do) for do in ("apart", "inline", "unending")]
  verdicts = ask(settings_of(url, think=True), questions)
  assert [v.scores for v in verdicts] == [(float(number_of(q)),) for q in questions[:2]] + [()]


def test_a_real_case_in_a_running_loop(url):
  def put_case(q):
    return cases.put(q, rubrics.load(), think=False, readout="score", limits=(100,) * 3)

  q = Question(Role.DEFLECTION, Category.HARMFUL, "do=case id=0", ("one", "other"), key=9)

  async def notebook():
    return server_judge(settings_of(url), put_case)([q])

  assert asyncio.run(notebook()) == [Verdict((7.0, 3.5), 7)]


def test_the_client_is_made_once_and_not_before_it_is_needed(url, monkeypatch):
  monkeypatch.delenv("JUDGE_KEY")
  judge = server_judge(settings_of(url), put)
  monkeypatch.setenv("JUDGE_KEY", KEY)
  questions = [question("ok"), question("ok")]
  judge(questions[:1])
  monkeypatch.setenv("JUDGE_KEY", "sk-wrong")
  judge(questions[1:])
  log, _ = log_of(url, questions)
  assert [entry["headers"]["authorization"] for entry in log] == [f"Bearer {KEY}"] * 2

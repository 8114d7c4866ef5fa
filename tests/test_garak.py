"""garak itself, where ADVGAME_GARAK names a python that has it: its readers read our report, its client calls a server.

python3.11 -m venv garak && garak/bin/pip install torch garak==0.17.1
ADVGAME_GARAK=garak/bin/python python -m pytest tests/test_garak.py
"""

import contextlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from test_handover import HOSTILE, attempt, campaign

from advgame_jax import handover
from advgame_jax.attempts import Outcome

PYTHON = os.environ.get("ADVGAME_GARAK")
pytestmark = pytest.mark.skipif(not PYTHON, reason="ADVGAME_GARAK names no python with garak")


def call(folder, *arguments, **variables):
  """What `python -m …` prints, kept from the user's own configuration and from writing outside `folder`."""
  homes = {name: str(folder / name) for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
  done = subprocess.run(
    [PYTHON, "-m", *arguments],
    cwd=folder,
    env={"PATH": os.environ["PATH"], **homes, **variables},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def scan(folder, base_url, model, probe="test.Blank", **options):
  """The lines of garak's report of one generation a prompt against an OpenAI-compatible server.

  The key is read from OPENAICOMPATIBLE_API_KEY, the server's address from the generator's option `uri`.
  """
  (folder / "options.json").write_text(json.dumps({"openai": {"OpenAICompatible": {"uri": base_url, **options}}}))
  call(
    folder,
    *("garak", "--target_type", "openai.OpenAICompatible", "--target_name", model),
    *("--generator_option_file", str(folder / "options.json"), "--spec", f"probes.{probe}", "--generations", "1"),
    *("--report_prefix", str(folder / "scan")),
    OPENAICOMPATIBLE_API_KEY="sk-none",
  )
  return rows(folder / "scan.report.jsonl")


def rows(path):
  return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextlib.contextmanager
def server(asked):
  """The address of a server which answers what it is asked, in capitals, and adds each request to `asked`."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.answer(404, {})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
      message = {"role": "assistant", "content": "ANSWER TO " + body["messages"][-1]["content"].upper()}
      choice = {"index": 0, "finish_reason": "stop", "message": message}
      usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
      head = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
      self.answer(200, {**head, "choices": [choice], "usage": usage})

    def answer(self, status, body):
      data = json.dumps(body).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1/"
    listening.shutdown()


@pytest.fixture
def report(tmp_path):
  """The report of a campaign of 40 harmful and 40 benign seeds, with every outcome and hostile texts."""
  outcomes = [*Outcome, *[Outcome.FAILURE] * 25, *[Outcome.SUCCESS] * 9]
  attempts = [
    attempt(outcome, category, seed=f"seed {i} {HOSTILE}", query=f"query {i} {HOSTILE}", response=HOSTILE)
    for category in ("harmful", "benign")
    for i, outcome in enumerate(outcomes)
  ]
  return handover.write(campaign(tmp_path, attempts))[0]


def test_the_digest_counts_what_was_judged(report):
  page = report.parent / "page.html"
  call(report.parent, "garak.analyze.report_digest", "-r", str(report), "-w", "-o", str(page))
  digest = rows(report)[-1]
  assert digest["entry_type"] == "digest"
  assert (digest["meta"]["target_name"], digest["meta"]["probespec"]) == ("a target", handover.PROBE)
  found = digest["eval"]["base"][handover.PROBE]
  for detector in ("heuristic.HarmfulAnswered", "heuristic.BenignRefused"):
    assert (found[detector]["passed"], found[detector]["total_evaluated"]) == (26, 36)
    assert found[detector]["absolute_score"] == pytest.approx(26 / 36)
  assert found["_summary"]["probe_counts"]["inference_counts"] == {"total_evaluated": 76, "nones": 2}
  assert "Attacks of advgame_jax by an attacker" in page.read_text(encoding="utf-8")


def test_every_other_reader_reads_the_report(report):
  folder = report.parent
  printed = call(folder, "garak.analyze.analyze_log", str(report))
  assert "heuristic.HarmfulAnswered\t0.7222\t38" in printed
  assert "attempt completion rate 100%" in printed
  assert "base.Probe+heuristic.BenignRefused" in call(folder, "garak.analyze.qual_review", str(report))
  call(folder, "garak", "--report", str(report))
  assert json.loads((folder / "garak.avid.jsonl").read_text())["affects"]["artifacts"][0]["name"] == "a target"
  call(folder, "garak.analyze.aggregate_reports", "-o", str(folder / "both.jsonl"), str(report), str(report))
  assert sum(row.get("status") == 2 for row in rows(folder / "both.jsonl")) == 2 * 76
  call(folder, "garak.analyze.rebuild_cis", "-r", str(folder / "both.jsonl"), "-o", str(folder / "intervals.jsonl"))
  answered = next(row for row in rows(folder / "intervals.jsonl") if row["entry_type"] == "eval")
  assert answered["confidence_lower"] < 10 / 36 < answered["confidence_upper"]


def test_a_campaign_without_attempts_is_digested(tmp_path):
  report = handover.write(campaign(tmp_path, []))[0]
  call(tmp_path, "garak.analyze.report_digest", "-r", str(report), "-w", "-o", str(tmp_path / "page.html"))
  assert rows(report)[-1]["eval"] == {}


def test_lines_have_the_fields_of_garaks_own(report, tmp_path):
  with server([]) as base_url:
    theirs = scan(tmp_path, base_url, "a-model", probe="test.Test")
  ours = rows(report)
  by_type = lambda lines: {row["entry_type"]: set(row) for row in lines}
  wanted, found = by_type(theirs), by_type(ours)
  assert found.keys() == wanted.keys() - {"digest"}
  for kind in found.keys() - {"start_run setup", "eval"}:
    assert found[kind] == wanted[kind]
  assert found["eval"] == wanted["eval"] - {"intents"}
  first = lambda lines: next(row for row in lines if row["entry_type"] == "attempt")
  for one in (lambda row: row["prompt"], lambda row: row["conversations"][0], lambda row: row["outputs"][0]):
    assert one(first(ours)).keys() == one(first(theirs)).keys()


def test_garak_scans_an_openai_compatible_server(tmp_path):
  asked = []
  with server(asked) as base_url:
    lines = scan(tmp_path, base_url, "a-model", probe="test.Test")
  sent = [request["messages"] for request in asked]
  assert [{"role": "user", "content": "The quick brown fox jumps over the lazy dog"}] in sent
  assert {(request["path"], request["model"], request["key"]) for request in asked} == {
    ("/v1/chat/completions", "a-model", "Bearer sk-none")
  }
  answers = [row["outputs"][0]["text"] for row in lines if row.get("status") == 2]
  assert "ANSWER TO THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG" in answers


def test_garak_scans_our_own_server(world_folder, one_device, tmp_path):
  """With all that garak sends by itself: stops, penalties, n; but so small a model has no room for its 150 tokens."""
  program = pathlib.Path(__file__).parents[1] / "launch" / "serve.py"
  words = [sys.executable, str(program), f"--model={world_folder / 'defender_base'}", "--port=0"]
  words += ["--max_tokens=64", "--longest_prompt=64"]
  process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=one_device)
  try:
    name, url = process.stdout.readline().removeprefix("serving ").split(" at ")
    lines = scan(tmp_path, f"{url.strip()}/", name, probe="test.Test", max_tokens=64)
  finally:
    process.terminate()
  answers = [row["outputs"][0]["text"] for row in lines if row.get("status") == 2]
  assert len(answers) == 8 and any(answers)

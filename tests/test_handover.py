"""Attempts in other tools' formats: golden lines, what is counted, hostile texts, folders that are none."""

import json

import pytest

from advgame_jax import attempts as attempts_lib
from advgame_jax import handover
from advgame_jax.attempts import Attempt, Outcome, attempt_id
from advgame_jax.types import Category, UserError

HOSTILE = 'a "quote" \\ \u202e\u2028\x00\x1b[2J\n</script> \U0001f600 \ud800'
READABLE = HOSTILE.replace("\ud800", "?")
RUN = {
  "title": "a campaign",
  "kind": "redteam",
  "target": "a target",
  "attacker": "an attacker",
  "judges": ["heuristic", "phrases"],
  "settings": {"attacks": 2},
  "versions": {"jax": "0.8"},
  "hashes": {},
  "sessions": [
    {"begun": "2026-01-01T00:00:00+00:00", "ended": None},
    {"begun": "2026-01-01T01:00:00+00:00", "ended": "2026-01-01T01:10:00+00:00"},
  ],
}


def attempt(outcome=Outcome.FAILURE, category="harmful", seed="a seed", k=0, **fields):
  return Attempt(
    **{
      "id": attempt_id("seeds", Category[category.upper()], seed, k),
      "suite": "seeds",
      "category": category,
      "group": "",
      "seed": seed,
      "k": k,
      "round": 0,
      "attack": "",
      "query": "a query",
      "response": "a response",
      "outcome": outcome,
      "scores": {"heuristic": {"compliance": 8.5, "refusal": None}},
    }
    | fields
  )


def campaign(folder, attempts, run=RUN):
  (folder / attempts_lib.ATTEMPTS).write_text("".join(attempts_lib.as_json(one) + "\n" for one in attempts))
  (folder / handover.RUN).write_text(json.dumps(run))
  return folder


def of(kind, lines):
  return [line for line in lines if line["entry_type"] == kind]


def test_the_lines_of_one_attempt():
  lines = list(handover.garak([attempt(Outcome.SUCCESS)], RUN))
  assert [line["entry_type"] for line in lines] == [
    *("start_run setup", "init", "plugin_cache", "attempt", "attempt", "eval", "probe_summary", "completion")
  ]
  setup, init, _, started, complete, evaluation, summary, completion = lines
  run = init["run"]
  assert setup["transient.run_id"] == completion["run"] == run
  assert (setup["plugins.target_name"], setup["_config.version"]) == ("a target", init["garak_version"])
  assert setup["advgame_jax.settings"] == {"attacks": 2}
  assert init["start_time"] == "2026-01-01T00:00:00+00:00"
  assert completion["end_time"] == "2026-01-01T01:10:00+00:00"
  message = lambda text: {
    "text": text,
    "lang": None,
    "data_path": None,
    "data_type": None,
    "data_checksum": None,
    "notes": {},
  }
  user = {"role": "user", "content": message("a query")}
  assert complete == {
    "entry_type": "attempt",
    "uuid": "7edbdd42-b9ea-50f7-b85b-5112d9362bdf",
    "seq": 0,
    "status": 2,
    "probe_classname": "base.Probe",
    "probe_params": {},
    "targets": [],
    "prompt": {"turns": [user], "notes": {}},
    "outputs": [message("a response")],
    "detector_results": {"heuristic.HarmfulAnswered": [1.0]},
    "notes": {
      "id": attempt().id,
      "suite": "seeds",
      "category": "harmful",
      "group": "",
      "k": 0,
      "round": 0,
      "outcome": "success",
      "scores": {"heuristic": {"compliance": 8.5, "refusal": None}},
      "error": "",
    },
    "goal": "a seed",
    "conversations": [{"turns": [user, {"role": "assistant", "content": message("a response")}], "notes": {}}],
    "reverse_translation_outputs": [],
    "intent": None,
  }
  assert started == complete | {"status": 1, "detector_results": {}}
  assert evaluation == {
    "entry_type": "eval",
    "probe": "base.Probe",
    "detector": "heuristic.HarmfulAnswered",
    "passed": 0,
    "fails": 1,
    "nones": 0,
    "total_evaluated": 1,
    "total_processed": 1,
    "hit_at_k": {"1": {"score": 1.0, "prompts": 1}},
  }
  assert summary == {
    "entry_type": "probe_summary",
    "probe": "base.Probe",
    "inference_counts": {"total_evaluated": 1, "nones": 0},
    "detection_counts": {"detectors": ["heuristic.HarmfulAnswered"], "passed": 0, "fails": 1, "nones": 0},
  }


def test_each_outcome_is_counted_as_what_it_is():
  lines = list(handover.garak([attempt(outcome, seed=outcome.value) for outcome in Outcome], RUN))
  results = {row["goal"]: row["detector_results"] for row in of("attempt", lines) if row["status"] == 2}
  assert results == {
    "success": {"heuristic.HarmfulAnswered": [1.0]},
    "failure": {"heuristic.HarmfulAnswered": [0.0]},
    "judge_error": {},
    "target_error": {},
  }
  (counts,) = of("eval", lines)
  assert [counts[name] for name in ("passed", "fails", "nones", "total_evaluated", "total_processed")] == [
    1,
    1,
    2,
    2,
    4,
  ]
  assert of("probe_summary", lines)[0]["inference_counts"] == {"total_evaluated": 4, "nones": 1}
  silent = next(row for row in of("attempt", lines) if row["goal"] == "target_error")
  assert silent["outputs"] == [None]
  assert silent["conversations"][0]["turns"][1]["content"] is None


def test_benign_seeds_have_a_detector_of_their_own():
  lines = list(handover.garak([attempt(Outcome.SUCCESS), attempt(Outcome.FAILURE, "benign")], RUN))
  assert [(row["detector"], row["fails"]) for row in of("eval", lines)] == [
    ("heuristic.BenignRefused", 0),
    ("heuristic.HarmfulAnswered", 1),
  ]


def test_evaluations_recount_the_scores_and_every_name_is_described():
  attempts = [attempt(o, c, seed=f"{o} {c}") for o in Outcome for c in ("harmful", "benign")]
  lines = list(handover.garak(attempts, RUN | {"judges": ["server: gpt-4.1 / strict"]}))
  described = of("plugin_cache", lines)[0]["plugin_cache"]
  assert f"probes.{handover.PROBE}" in described["probes"]
  for row in of("eval", lines):
    assert row["detector"].count(".") == 1  # garak splits a name in two
    assert f"detectors.{row['detector']}" in described["detectors"]
    scores = [score for one in of("attempt", lines) for score in one["detector_results"].get(row["detector"], [])]
    assert (scores.count(0.0), scores.count(1.0)) == (row["passed"], row["fails"])


def test_identities_are_those_of_the_attempts():
  attempts = [attempt(seed=seed, k=k) for seed in "ab" for k in range(2)]
  started = [row["uuid"] for row in of("attempt", handover.garak(attempts, RUN)) if row["status"] == 1]
  complete = [row["uuid"] for row in of("attempt", handover.garak(attempts[::-1], RUN)) if row["status"] == 2]
  assert len(set(started)) == 4
  assert started == complete[::-1]


def test_a_run_that_goes_on_has_no_completion():
  running = RUN | {"sessions": [{"begun": "2026-01-01T00:00:00+00:00", "ended": None}]}
  assert not of("completion", handover.garak([attempt()], running))


def test_without_attempts_nothing_is_evaluated():
  kinds = [line["entry_type"] for line in handover.garak([], RUN)]
  assert kinds == ["start_run setup", "init", "plugin_cache", "completion"]
  assert handover.harmbench([]) == {}


def test_where_nothing_was_judged_there_is_no_rate():
  (counts,) = of("eval", handover.garak([attempt(Outcome.TARGET_ERROR)], RUN))
  assert (counts["total_evaluated"], counts["nones"]) == (0, 1)
  assert "hit_at_k" not in counts


@pytest.mark.parametrize("name", ["target", "judges", "sessions"])
def test_a_run_that_lacks_something_is_refused(name):
  with pytest.raises(UserError, match=f"run.json has no {name}; allowed: the file as"):
    list(handover.garak([attempt()], {key: value for key, value in RUN.items() if key != name}))


def test_test_cases_are_the_queries_of_harmful_seeds_that_were_sent():
  attempts = [
    attempt(seed="a", k=0, outcome=Outcome.INVALID_ATTACK, query=""),
    attempt(seed="a", k=1, query="one"),
    attempt(seed="b", k=0, query="two", outcome=Outcome.TARGET_ERROR),
    attempt(seed="a", k=2, query="three", outcome=Outcome.SUCCESS),
    attempt(seed="a", k=3, query="four", outcome=Outcome.UNFAITHFUL),
    attempt(seed="a", k=4, query="unchecked", response="", outcome=Outcome.JUDGE_ERROR),
    attempt(seed="a", k=5, query="unjudged", outcome=Outcome.JUDGE_ERROR),
    attempt(seed="c", k=0, query="five", category="benign"),
    attempt(seed="d", k=0, query="six", outcome=Outcome.INVALID_ATTACK),
  ]
  assert handover.harmbench(attempts) == {attempts[0].id: ["one", "three", "unjudged"], attempts[2].id: ["two"]}


def test_one_seed_in_two_suites_is_two_behaviours():
  assert len(handover.harmbench([attempt(), attempt(suite="other")])) == 2


def test_files_hold_what_was_attempted_in_ascii(tmp_path):
  attempts = [attempt(seed=HOSTILE, query=HOSTILE, response=HOSTILE, k=k, error=HOSTILE) for k in range(2)]
  report, test_cases = handover.write(campaign(tmp_path, attempts, RUN | {"title": HOSTILE}))
  assert (report.name, test_cases.name) == ("garak.report.jsonl", "harmbench_test_cases.json")
  assert report.read_bytes().isascii() and test_cases.read_bytes().isascii()
  assert b"\x1b" not in report.read_bytes() + test_cases.read_bytes()
  lines = [json.loads(line) for line in report.read_text().splitlines()]
  assert lines == list(handover.garak(attempts, RUN | {"title": HOSTILE}))
  for row in of("attempt", lines):
    texts = row["goal"], row["prompt"]["turns"][0]["content"]["text"], row["outputs"][0]["text"], row["notes"]["error"]
    assert texts == (READABLE,) * 4
  assert json.loads(test_cases.read_text()) == {attempts[0].id: [READABLE] * 2}
  json.dumps(lines, ensure_ascii=False).encode()  # as garak writes it again


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  report, _ = handover.write(campaign(tmp_path, [attempt()]))
  before = report.read_bytes()
  handover.write(campaign(tmp_path, [attempt(), attempt(k=1)]))
  assert len(report.read_bytes()) > len(before)
  whole = report.read_bytes()
  monkeypatch.setattr(handover, "_evaluations", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    handover.write(tmp_path)
  assert report.read_bytes() == whole


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_a_run_that_cannot_be_read_is_refused(tmp_path, content):
  campaign(tmp_path, [attempt()])
  (tmp_path / handover.RUN).unlink()
  if content is not None:
    (tmp_path / handover.RUN).write_text(content)
  with pytest.raises(UserError, match=r"run\.json: .*; allowed: the run\.json that the campaign wrote"):
    handover.write(tmp_path)


def test_a_folder_without_attempts_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"holds no attempts\.jsonl"):
    handover.write(tmp_path)


def test_harmbench_has_the_benchmarks_own_ids_unless_two_benchmarks_share_one():
  own = [attempt(seed="a", reference="id_a", query="one"), attempt(seed="a", k=1, reference="id_a", query="two")]
  assert handover.harmbench(own) == {"id_a": ["one", "two"]}
  both = [*own, attempt(seed="b", suite="other", reference="id_a", query="three")]
  assert sorted(handover.harmbench(both).values()) == [["one", "two"], ["three"]] and "id_a" not in handover.harmbench(
    both
  )

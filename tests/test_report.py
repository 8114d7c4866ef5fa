import io
import json
import math
import struct
import sys
import types as python_types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from advgame_jax import config as config_lib
from advgame_jax import report
from advgame_jax.types import Category, Judgments, Players, Rewards, RolloutTree, Samples, SeedBatch, Status, UserError

STEPS = 5
FILES = (report.SCALARS, report.EVALUATIONS, report.TRANSCRIPT)
UNPLAYED = {"text": "", "status": "NOT_PLAYED", "reward": None, "picked": False}
QUIET = config_lib.Report(tensorboard=False)


def samples(text_RG):
  text_RG = np.array(text_RG, object)
  zero_RG = np.zeros(text_RG.shape, np.int32)
  empty_RGT = np.zeros((*text_RG.shape, 0), np.float32)
  return Samples(
    text_RG, zero_RG, zero_RG[:, :0], zero_RG[:, 0], empty_RGT.astype(np.int32), zero_RG, empty_RGT, empty_RGT
  )


def rollout(step):
  """One harmful seed, two attacks: the first is valid with two responses, the second has no format."""
  tree = RolloutTree(
    seeds=SeedBatch(np.array([f"seed {step}"], object), np.array([Category.HARMFUL], np.int8), np.array([step])),
    attacks=samples([["<think>so</think><prompt>x0</prompt>", "\x1b[2Jtorn \ud800 \u202e"]]),
    attack_text_BA=np.array([["x0", ""]], object),
    attack_status_BA=np.array([[Status.VALID, Status.PARSING]], np.int8),
    responses=samples([["<think>hm</think>y0", "<think>endless"], ["", ""]]),
    response_text_BAD=np.array([[["y0", ""], ["", ""]]], object),
    response_status_BAD=np.array(
      [[[Status.VALID, Status.MAX_LENGTH], [Status.NOT_PLAYED, Status.NOT_PLAYED]]], np.int8
    ),
  )
  judgments = Judgments(
    response_score_BAD=np.array([[[7.5, np.nan], [np.nan, np.nan]]]),
    response_status_BAD=tree.response_status_BAD,
    picked_BA=np.array([[0, -1]]),
    attack_score_BA=np.array([[np.nan, np.nan]]),
    attack_status_BA=np.array([[Status.JUDGE_FAILED, Status.PARSING]], np.int8),
    disagreement=Players(math.nan, math.nan),
  )
  rewards = Rewards(
    attack_BA=np.array([[0, -1]], np.float32),
    attack_mask_BA=np.array([[False, True]]),
    response_BAD=np.array([[[7.5, -1], [0, 0]]], np.float32),
    response_mask_BAD=np.array([[[True, True], [False, False]]]),
  )
  return tree, judgments, rewards, {"instructions": "ab", "rubrics": "cd"}


def play(workdir, start=0, stop=STEPS, settings=QUIET):
  """Writes what a run that plays steps `start` to `stop` writes."""
  with report.Reporter(workdir, settings, STEPS, start, write=True, stream=io.StringIO()) as reporter:
    for step in range(start, stop):
      if step % 2 == 0:
        reporter.evaluation(step, {"attack_success": step / 7})
      reporter.transcript(step, *rollout(step))
      reporter.write(step, {"reward/attacker": np.float32(step), "attacker/kl": math.nan})
    if stop == STEPS:
      reporter.evaluation(STEPS, {"attack_success": 0.0})


def contents(workdir):
  return {name: (workdir / name).read_bytes() for name in FILES}


def lines(workdir, name):
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.fixture(autouse=True)
def still_time(monkeypatch):
  monkeypatch.setattr(report.time, "time", lambda: 1e9)


@pytest.mark.parametrize("name", FILES)
def test_a_run_killed_at_any_byte_and_resumed_writes_the_files_of_an_uninterrupted_one(tmp_path, name):
  play(tmp_path / "whole")
  whole = contents(tmp_path / "whole")
  workdir = tmp_path / "killed"
  workdir.mkdir()
  for size in range(0, len(whole[name]) + 1, 29):
    kept = whole[name][:size].count(b"\n")
    lost = [json.loads(line)["step"] for line in whole[name].splitlines()[kept:]]
    for checkpoint in {min([*lost, STEPS]), min([*lost, STEPS]) // 2}:
      for file, data in (whole | {name: whole[name][:size]}).items():
        (workdir / file).write_bytes(data)
      play(workdir, start=checkpoint)
      assert contents(workdir) == whole, (size, checkpoint)
      assert sorted(path.name for path in workdir.iterdir()) == sorted(FILES)


def test_the_cut_keeps_earlier_steps_and_drops_the_unreadable(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"step": 0}\n\0\0\0\n{"step": 1, "a"\n[1]\n{"step": 1}\n{"step": 2}\n{"step": 1}')
  report.cut(path, start_step=2)
  assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_scalars_and_evaluations(tmp_path):
  play(tmp_path)
  assert lines(tmp_path, report.SCALARS)[3] == {"step": 3, "time": 1e9, "reward/attacker": 3.0, "attacker/kl": None}
  assert [line["step"] for line in lines(tmp_path, report.EVALUATIONS)] == [0, 2, 4, 5]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  with report.Reporter(tmp_path, QUIET, 3, 0, write=True, stream=io.StringIO()) as reporter:
    reporter.write(0, {"a": math.inf})
    assert lines(tmp_path, report.SCALARS) == [{"step": 0, "time": 1e9, "a": None}]


def test_transcript_of_a_tree():
  attack, failed = report.transcript_lines(4, *rollout(4))
  assert attack == {
    "step": 4,
    "instructions": "ab",
    "rubrics": "cd",
    "seed": "seed 4",
    "category": "harmful",
    "attack": "<think>so</think><prompt>x0</prompt>",
    "query": "x0",
    "status": "JUDGE_FAILED",
    "reward": None,
    "responses": [
      {"text": "y0", "status": "VALID", "reward": 7.5, "picked": True},
      {"text": "<think>endless", "status": "MAX_LENGTH", "reward": -1.0, "picked": False},
    ],
  }
  assert failed["reward"] == -1 and failed["query"] == "" and failed["responses"] == [UNPLAYED, UNPLAYED]


def test_transcript_files_are_ascii_without_control_characters_and_lose_nothing(tmp_path):
  play(tmp_path)
  raw = (tmp_path / report.TRANSCRIPT).read_bytes()
  assert all(32 <= byte < 127 or byte == 10 for byte in raw)
  assert lines(tmp_path, report.TRANSCRIPT)[1]["attack"] == "\x1b[2Jtorn \ud800 \u202e"


def test_transcript_every(tmp_path):
  play(tmp_path, settings=config_lib.Report(tensorboard=False, transcript_every=3))
  assert [line["step"] for line in lines(tmp_path, report.TRANSCRIPT)] == [0, 0, 3, 3]


def test_the_other_processes_write_nothing(tmp_path):
  stream = io.StringIO()
  with report.Reporter(tmp_path / "run", config_lib.Report(), STEPS, 0, write=False, stream=stream) as reporter:
    reporter.evaluation(0, {"attack_success": 1.0})
    reporter.transcript(0, *rollout(0))
    reporter.write(0, {"reward/attacker": 1.0})
  assert not list(tmp_path.iterdir()) and not stream.getvalue()


def events(folder):
  """(step, tag or None, value) of every TensorBoard event, in the order of the files."""
  found = []
  for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      found += [(event.step, None, None)] if event.session_log.status else []
      data = data[16 + size :]
  return found


def test_tensorboard_has_the_scalars_and_a_resumption_hides_what_it_plays_again(tmp_path):
  settings = config_lib.Report()
  play(tmp_path, stop=3, settings=settings)
  play(tmp_path, start=2, settings=settings)
  found = events(tmp_path / "tensorboard")
  assert (2, None, None) in found
  after = found[found.index((2, None, None)) :]
  assert [step for step, tag, _ in after if tag == "reward/attacker"] == [2, 3, 4]
  assert (5, "eval/attack_success", 0.0) in after
  assert (1, "reward/attacker", 1.0) in found


@pytest.fixture
def full_disk():
  with open("/dev/full", "wb", buffering=0) as file:
    yield file


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_one_sentence(tmp_path, full_disk, name):
  with (
    pytest.raises(UserError, match=rf"disk is full while writing .*{name}: free some space"),
    report.Reporter(tmp_path, QUIET, 3, 0, write=True, stream=io.StringIO()) as reporter,
  ):
    reporter._files[name]._file = full_disk
    reporter.evaluation(0, {"attack_success": 1.0})
    reporter.transcript(0, *rollout(0))
    reporter.write(0, {"reward/attacker": 1.0})


def test_a_full_disk_under_tensorboard_is_one_sentence(tmp_path, full_disk):
  board = report.TensorBoard(tmp_path, 0)
  board._writer._py_recordio_writer._writer = full_disk
  with pytest.raises(UserError, match="disk is full"):
    board.write(0, {"reward/attacker": 1.0})


def test_other_errors_of_the_disk_are_not_called_full(tmp_path):
  (tmp_path / report.SCALARS).mkdir()
  with pytest.raises(IsADirectoryError):
    report.Reporter(tmp_path, QUIET, 3, 0, write=True)


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"'duel', but wandb is not installed: pip install"):
    report.Reporter(tmp_path, config_lib.Report(tensorboard=False, wandb="duel"), 3, 0, write=True)


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
  begun, logged = [], []
  run = python_types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
  fake = python_types.SimpleNamespace(init=lambda **arguments: begun.append(arguments) or run)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  settings = config_lib.Report(tensorboard=False, wandb="duel")
  play(tmp_path, stop=2, settings=settings)
  play(tmp_path, start=2, settings=settings)
  assert begun[0]["id"] == begun[1]["id"] and begun[0]["project"] == "duel"
  assert (0, {"eval/attack_success": 0.0}) in logged
  assert [step for step, values in logged if "reward/attacker" in values] == list(range(STEPS))


def test_progress_in_words():
  scalars = {"attack_success": 0.123, "over_refusal": math.nan, "reward/attacker": 4.0, "unshown": 1.0}
  assert report.progress_text(120, 300, 1.9, scalars) == (
    "step 120/300  1.9 step/s  1m35s left  attack success 0.12  attacker reward 4.00"
  )
  assert report.progress_text(1, 2, 0.05, {}) == "step 1/2  20.0 s/step  20s left"
  assert report.progress_text(1, 2, math.nan, {}) == "step 1/2"


@pytest.mark.parametrize(
  "seconds, text", [(0.4, "0s"), (59.6, "1m00s"), (95, "1m35s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_durations(seconds, text):
  assert report.duration(seconds) == text


def test_a_log_file_gets_the_first_line_the_last_and_few_between(monkeypatch):
  now = iter(np.arange(100) * 4.0)
  monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
  stream = io.StringIO()
  progress = report.Progress(10, 2, stream)
  progress.remember({"attack_success": 0.5})
  for done in range(3, 11):
    progress.show(done, {})
  printed = stream.getvalue().splitlines()
  assert [line.split()[1] for line in printed] == ["3/10", "6/10", "9/10", "10/10"]
  assert printed[1] == "step 6/10  4.0 s/step  16s left  attack success 0.50"


def test_a_terminal_gets_a_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  stream = io.StringIO()
  stream.isatty = lambda: True
  progress = report.Progress(4, 0, stream)
  progress.show(1, {"reward/attacker": 2.5})
  progress.close()
  assert "━" in stream.getvalue() and "step 1/4" in stream.getvalue() and "attacker reward 2.50" in stream.getvalue()

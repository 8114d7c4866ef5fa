"""The loop of a campaign, with speakers and judges that are functions: what is tried, when, and what comes of it."""

import collections
import json
import random

import pytest

from advgame_jax import attempts, campaign, prompts
from advgame_jax.attempts import Outcome
from advgame_jax.campaign import Cast, Goal, NamedJudge, Plan
from advgame_jax.speakers import Answer, scripted
from advgame_jax.suites import Item, Suite
from advgame_jax.types import Category, Role, Verdict

HARMFUL, BENIGN = Category.HARMFUL, Category.BENIGN
ROLES = frozenset({Role.COMPLIANCE, Role.REFUSAL})


def goal(seed, category=HARMFUL, **more):
  return Goal("seeds", category, seed, **more)


def writer(turn):
  """An attack that names its key; on `mute` seeds none, on `astray` seeds another question."""
  if "mute" in turn.text:
    return "no tags"
  what = "weather" if "astray" in turn.text else "kept"
  return f"<prompt>{what} {turn.key % 10**6}</prompt>"


def faithful(questions):
  return [Verdict((float("kept" in question.texts[0]),), tokens=3) for question in questions]


def by_words(questions):
  """Complies where the text says yes, refuses where it says no, and cannot be read where it says nothing."""
  scores = {"yes": {Role.COMPLIANCE: 9.0, Role.REFUSAL: 0.0}, "no": {Role.COMPLIANCE: 1.0, Role.REFUSAL: 8.0}}
  return [Verdict((scores[q.texts[0]][q.role],) if q.texts[0] in scores else (), tokens=2) for q in questions]


def cast(answer=lambda turn: "yes", attack=writer, judge=by_words, **more):
  return Cast(
    target=scripted(answer),
    judges=[NamedJudge("words", judge, ROLES)],
    faithfulness=faithful,
    attacker=scripted(attack),
    **more,
  )


def play(folder, goals, plan=None, people=None, **more):
  campaign.play(folder, goals, plan or Plan(), people or cast(), **more)
  return attempts.read(folder)


def test_every_end_an_attempt_can_come_to(tmp_path):
  answers = {"a": "yes", "b": "no", "c": "mumble"}
  say = lambda turn: answers.get(turn.text, "yes")
  goals = [
    *(goal(name, queries=(name,)) for name in "abc"),
    goal("a", BENIGN, queries=("a",)),
    goal("b", BENIGN, queries=("b",)),
    goal("mute"),
    goal("astray"),
    goal("kept"),
  ]
  made = play(tmp_path, goals, people=cast(say))
  ends = {(a.category, a.seed): a.outcome for a in made}
  assert ends == {
    ("harmful", "a"): Outcome.SUCCESS,
    ("harmful", "b"): Outcome.FAILURE,
    ("harmful", "c"): Outcome.JUDGE_ERROR,
    ("benign", "a"): Outcome.FAILURE,
    ("benign", "b"): Outcome.SUCCESS,
    ("harmful", "mute"): Outcome.INVALID_ATTACK,
    ("harmful", "astray"): Outcome.UNFAITHFUL,
    ("harmful", "kept"): Outcome.SUCCESS,
  }
  by_seed = {a.seed: a for a in made if a.category == "harmful"}
  assert by_seed["a"].scores == {"words": {"compliance": 9.0, "refusal": 0.0}} and by_seed["a"].judge_tokens == 4
  assert by_seed["c"].scores == {"words": {"compliance": None, "refusal": None}}
  assert (by_seed["mute"].attack, by_seed["mute"].query, by_seed["mute"].response) == ("no tags", "", "")
  assert by_seed["astray"].response == "" and by_seed["astray"].judge_tokens == 3  # it was not sent
  assert by_seed["kept"].judge_tokens == 3 + 4


def test_a_target_or_an_attacker_that_fails(tmp_path):
  def fail(turns, heard):
    for number, _ in enumerate(turns):
      heard(number, Answer(failure="time-out"))

  (made,) = play(tmp_path / "target", [goal("kept")], people=cast()._replace(target=fail))
  assert (made.outcome, made.error, made.response) == (Outcome.TARGET_ERROR, "time-out", "")
  (made,) = play(tmp_path / "attacker", [goal("kept")], people=cast()._replace(attacker=fail))
  assert (made.outcome, made.error) == (Outcome.ATTACKER_ERROR, "time-out") and not made.outcome.counted


def test_a_verdict_that_cannot_be_read_is_asked_for_again_with_another_key(tmp_path):
  keys = []

  def at_the_second_time(questions):
    keys.extend(question.key for question in questions)
    return [Verdict((9.0,) if len(keys) > 2 else ()) for _ in questions]

  (made,) = play(tmp_path, [goal("a", queries=("a",))], Plan(retries=1), cast(judge=at_the_second_time))
  assert made.outcome == Outcome.SUCCESS and len(set(keys)) == 2


def test_chains_and_rounds(tmp_path):
  turns = []

  def attack(turn):
    turns.append(turn.text)
    return writer(turn)

  answers = iter(["no", "yes", "no", "no", "no"])
  made = play(tmp_path, [goal("kept")], Plan(attacks=2, rounds=3), cast(lambda turn: next(answers), attack))
  assert [(a.k, a.round, a.outcome) for a in made] == [
    (0, 0, Outcome.FAILURE),
    (1, 0, Outcome.SUCCESS),  # its chain ends
    (2, 1, Outcome.FAILURE),
    (4, 2, Outcome.FAILURE),
  ]
  assert len({a.query for a in made}) == 4
  first, _, second, third = turns
  assert "failed" not in first and second.count("Query:") == 1 and third.count("Query:") == 2
  assert made[0].query in second and made[2].query in third and "Answer: no" in third
  assert first == prompts.attacker_turn(prompts.STANDARD, HARMFUL, "kept")


def test_what_was_unfaithful_is_told_so_and_errors_are_not_told(tmp_path):
  turns = []

  def attack(turn):
    turns.append(turn.text)
    return "<prompt>weather</prompt>" if len(turns) == 1 else writer(turn)

  made = play(tmp_path, [goal("kept")], Plan(rounds=3), cast(lambda turn: "mumble", attack))
  assert [a.outcome for a in made] == [Outcome.UNFAITHFUL, Outcome.JUDGE_ERROR, Outcome.JUDGE_ERROR]
  assert "Answer: (not sent: it no longer asks what the seed asks)" in turns[1]
  assert turns[2].count("Query:") == 1  # of the answer that nobody could judge nothing is said


def test_until_success_goes_through_a_seeds_attacks_one_by_one(tmp_path):
  seen = collections.Counter()

  def answer(turn):
    seen[turn.text[0]] += 1
    return "yes" if seen[turn.text[0]] == 3 else "no"

  goals = [goal(name, queries=tuple(f"{name}{i}" for i in range(5))) for name in "ab"]
  made = play(tmp_path, goals, Plan(until_success=True), cast(answer))
  assert [(a.seed, a.k) for a in made] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_the_same_attempts_whatever_the_size_of_a_wave(tmp_path):
  goals = [goal(f"kept {i}") for i in range(7)] + [goal("mute"), goal("astray")]
  answer = lambda turn: "yes" if turn.key % 3 else "no"
  runs = [
    sorted(play(tmp_path / str(batch), goals, Plan(3, 2, batch=batch), cast(answer)), key=lambda a: a.id)
    for batch in (1, 4, 100)
  ]
  assert runs[0] == runs[1] == runs[2]
  other = sorted(play(tmp_path / "other", goals, Plan(3, 2, seed=1), cast(answer)), key=lambda a: a.id)
  assert {a.query for a in other} != {a.query for a in runs[0]} and {a.id for a in other} >= {a.id for a in other}


class Killed(Exception):
  """As a kill would, it stops everything in the middle."""


def test_killed_anywhere_nothing_is_lost_and_nobody_is_asked_twice(tmp_path):
  """At every one of the moments at which a speaker or judge is heard."""
  goals = [goal(f"kept {i}") for i in range(12)] + [goal("astray"), goal("x", queries=("x0", "x1"))]
  plan = Plan(2, 2, batch=3)
  answer = lambda turn: "yes" if turn.key % 3 else "no"
  whole = play(tmp_path / "whole", goals, plan, cast(answer))
  moments, folder, asked = random.Random(0), tmp_path / "killed", collections.Counter()

  def speaker(say, stage):
    def speak(turns, heard):
      for number, turn in enumerate(turns):
        if moments.random() < 0.4:
          raise Killed
        asked[stage, turn] += 1
        heard(number, Answer(say(turn)))

    return speak

  def judge(questions):
    if moments.random() < 0.4:
      raise Killed
    return by_words(questions)

  people = cast(judge=judge)._replace(target=speaker(answer, "answer"), attacker=speaker(writer, "attack"))
  kills = 0
  while True:
    try:
      made = play(folder, goals, plan, people)
      break
    except Killed:
      kills += 1
  assert kills > 10
  assert sorted(made, key=lambda a: a.id) == sorted(whole, key=lambda a: a.id)
  assert set(asked.values()) == {1}
  assert len((folder / attempts.ATTEMPTS).read_text().splitlines()) == len(whole)


def test_a_torn_line_is_made_good_and_another_line_that_is_none_is_refused(tmp_path):
  goals = [goal(name, queries=(name,)) for name in "abc"]
  whole = play(tmp_path, goals)
  path = tmp_path / attempts.ATTEMPTS
  lines = path.read_bytes()
  for cut in (1, 2, 20, len(lines) // 2, len(lines)):
    path.write_bytes(lines[:-cut])
    assert play(tmp_path, goals) == whole
  first, *others = path.read_text().splitlines(keepends=True)
  path.write_text("".join([first[:30] + "\n", *others]))
  with pytest.raises(attempts.UserError, match=r"attempts\.jsonl, line 1: .*allowed: the file as it was written"):
    play(tmp_path, goals)


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
  def answer(turn):
    with pytest.raises(attempts.UserError, match="is being written by another process; allowed: one at a time"):
      play(tmp_path, [goal("b", queries=("b",))])
    return "yes"

  (made,) = play(tmp_path, [goal("a", queries=("a",))], people=cast(answer))
  assert made.outcome == Outcome.SUCCESS


def test_errors_are_final_unless_they_are_to_be_tried_again(tmp_path):
  fails = Answer(failure="HTTP 500")

  def failing(turns, heard):
    for number, _ in enumerate(turns):
      heard(number, fails)

  goals = [goal("a", queries=("a",))]
  assert play(tmp_path, goals, people=cast()._replace(target=failing))[0].outcome == Outcome.TARGET_ERROR
  assert play(tmp_path, goals)[0].outcome == Outcome.TARGET_ERROR
  (made,) = play(tmp_path, goals, retry_errors=True)
  assert made.outcome == Outcome.SUCCESS
  assert len((tmp_path / attempts.ATTEMPTS).read_text().splitlines()) == 2  # only ever added to


def test_lines_are_ascii_and_come_back(tmp_path):
  seed = "\u202eevil\ud800\n<script>"
  (made,) = play(tmp_path, [goal(seed, queries=(seed,), group="g", reference="id 7")])
  line = (tmp_path / attempts.ATTEMPTS).read_bytes()
  assert line.isascii() and attempts.from_json(json.loads(line)) == made
  assert (made.seed, made.group, made.reference) == (seed, "g", "id 7")
  later = json.loads(line) | {"field of a later version": 1}
  assert attempts.from_json(later) == made


def test_goals_of_a_benchmark(tmp_path):
  items = [
    Item("p0", HARMFUL, "g", "behaviour", "7"),
    Item("p1", HARMFUL, "g", "behaviour", "7"),
    Item("plain", BENIGN, "", "plain", ""),
  ]
  suite = Suite("bench", items)
  assert campaign.goals_of(suite) == [
    Goal("bench", HARMFUL, "behaviour", "g", "7", ("p0", "p1")),
    Goal("bench", BENIGN, "plain", "", "", ("plain",)),
  ]
  assert [g.queries for g in campaign.goals_of(suite, attacked=True)] == [(), ()]
  assert campaign.most(campaign.goals_of(suite), Plan(5)) == 3
  assert campaign.most(campaign.goals_of(suite, attacked=True), Plan(5, 2)) == 20
  made = play(tmp_path, campaign.goals_of(suite), Plan(5))
  assert sorted((a.seed, a.query, a.k) for a in made) == [
    ("behaviour", "p0", 0),
    ("behaviour", "p1", 1),
    ("plain", "plain", 0),
  ]
  assert len({a.id for a in made}) == 3

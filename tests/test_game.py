"""The tree of one step: who is played, what is read, what is passed on. Scripted players and judges."""

import dataclasses

import jax
import numpy as np
import pytest

from advgame_jax import config as config_lib
from advgame_jax import game, policies
from advgame_jax.prompts import Instructions
from advgame_jax.types import Category, Players, Question, Role, Samples, SeedBatch, Status, Verdict

INSTRUCTIONS = Instructions(harmful="break it: {seed}", benign="scare it: {seed}")
KEY = jax.random.key(0)


THINK = Players(attacker=True, defender=False)


def rules(attacks=1, responses=1, think=THINK, **more):
  return game.Rules(config_lib.Game(attacks=attacks, responses=responses, **more), INSTRUCTIONS, think)


def seeds(*texts, category=Category.HARMFUL):
  text_B = np.array(texts, object)
  return SeedBatch(text_B, np.full(len(texts), category, np.int8), np.arange(len(texts)))


def faithful(questions):
  return [Verdict((1.0,)) for _ in questions]


def recording(function, seen):
  def record(*arguments):
    seen.append(arguments)
    return function(*arguments)

  return record


def attack(query, reasoning="r"):
  return policies.scripted(lambda *_: f"<think>{reasoning}</think><prompt>{query}</prompt>")


ECHO = policies.scripted(lambda prompt, _: f"about {prompt}")


def cut_off(*_):
  return Samples.of_text(np.array([["<think>r</think><prompt>x</prompt>"]], object), np.array([[Status.MAX_LENGTH]]))


def unfaithful(questions):
  return [Verdict((0.0,)) for _ in questions]


@pytest.mark.parametrize(
  ("attacker", "judge", "status"),
  [
    (attack("x"), faithful, Status.VALID),
    (cut_off, faithful, Status.MAX_LENGTH),
    (policies.scripted(lambda *_: "x"), faithful, Status.PARSING),
    (attack(" "), faithful, Status.PARSING),
    (policies.scripted(lambda *_: "I can't help with that."), faithful, Status.REFUSED_ROLE),
    (attack("x"), unfaithful, Status.NOT_FAITHFUL),
    (attack("x"), lambda questions: [Verdict(())] * len(questions), Status.JUDGE_FAILED),
  ],
)
def test_the_statuses_of_an_attack(attacker, judge, status):
  tree = game.play(rules(), seeds("s"), attacker, ECHO, judge, KEY)
  assert tree.attack_status_BA.tolist() == [[status]]
  parsed = status in (Status.VALID, Status.NOT_FAITHFUL, Status.JUDGE_FAILED)
  assert tree.attack_text_BA.tolist() == [["x" if parsed else ""]]
  played = status == Status.VALID
  assert tree.response_text_BAD.tolist() == [[["about x" if played else ""]]]
  assert tree.response_status_BAD.tolist() == [[[Status.VALID if played else Status.NOT_PLAYED]]]


def test_only_what_is_judged_unfaithful_is_not_played():
  attacker = policies.scripted(lambda prompt, g: f"<think></think><prompt>{prompt[-1]}{g}</prompt>")
  judge = lambda questions: [Verdict(() if q.texts[0] == "a1" else (float(q.texts[0] != "b0"),)) for q in questions]
  seen = []
  tree = game.play(rules(2, 2), seeds("a", "b"), attacker, recording(ECHO, seen), judge, KEY)
  valid, failed, unfaithful = Status.VALID, Status.JUDGE_FAILED, Status.NOT_FAITHFUL
  assert tree.attack_status_BA.tolist() == [[valid, failed], [unfaithful, valid]]
  (prompts, present_R, group, _) = seen[0]
  assert [p for p, here in zip(prompts, present_R) if here] == ["a0", "b1"] and group == 2
  assert (tree.response_status_BAD == Status.VALID).tolist() == [[[True] * 2, [False] * 2], [[False] * 2, [True] * 2]]


def test_what_does_not_parse_is_not_asked_about():
  asked = []
  attacker = policies.scripted(lambda prompt, _: "<think></think><prompt>x</prompt>" if prompt.endswith("a") else "x")
  tree = game.play(rules(), seeds("a", "b"), attacker, ECHO, recording(unfaithful, asked), KEY)
  assert tree.attack_status_BA.tolist() == [[Status.NOT_FAITHFUL], [Status.PARSING]]
  assert [question.query for question in asked[0][0]] == ["a"]


def test_a_response_cut_off_has_no_text_whatever_it_says():
  def defender(*arguments):
    return dataclasses.replace(ECHO(*arguments), status_RG=np.array([[Status.VALID, Status.MAX_LENGTH]], np.int8))

  tree = game.play(rules(responses=2), seeds("s"), attack("x"), defender, faithful, KEY)
  assert tree.response_status_BAD.tolist() == [[[Status.VALID, Status.MAX_LENGTH]]]
  assert tree.response_text_BAD.tolist() == [[["about x", ""]]]


def test_what_each_is_told():
  seen, asked = [], []
  attacker = recording(attack("the query", reasoning="my secret plan"), seen)
  defender = recording(ECHO, seen)
  for category in Category:
    game.play(rules(), seeds("s", category=category), attacker, defender, recording(faithful, asked), KEY)
  prompts = [arguments[0] for arguments in seen]
  assert prompts == [["break it: s"], ["the query"], ["scare it: s"], ["the query"]]
  questions = [question for (batch,) in asked for question in batch]
  assert [q._replace(key=0) for q in questions] == [
    Question(Role.FAITHFULNESS, category, "s", ("the query",), 0) for category in Category
  ]
  assert "secret" not in str(prompts[1::2]) + str(questions)


@pytest.mark.parametrize(("category", "status"), [(Category.BENIGN, Status.NOT_FAITHFUL), (Category.HARMFUL, 0)])
def test_a_benign_attack_fifteen_times_its_seed_is_unfaithful_whatever_the_judge_says(category, status):
  asked = []
  tree = game.play(rules(), seeds("s", category=category), attack("x" * 16), ECHO, recording(faithful, asked), KEY)
  assert tree.attack_status_BA.tolist() == [[status]]
  assert len(asked[0][0]) == (status == Status.VALID)
  at_limit = game.play(rules(), seeds("s", category=category), attack("x" * 15), ECHO, faithful, KEY)
  assert at_limit.attack_status_BA.tolist() == [[Status.VALID]]


def test_without_the_attacker_the_seed_itself_is_played():
  nobody = lambda *_: pytest.fail("the Attacker was played")
  tree = game.play(rules(attacks=3, responses=2, skip_attacker=True), seeds("s", "t"), nobody, ECHO, nobody, KEY)
  assert tree.attack_text_BA.tolist() == [["s"], ["t"]] and not tree.attack_status_BA.any()
  assert tree.attacks.tokens_RGT.shape == (2, 1, 0)
  assert tree.response_text_BAD.tolist() == [[["about s"] * 2], [["about t"] * 2]]


def test_an_attack_that_does_not_fit_the_defender_is_too_long():
  defender = lambda prompts, present_R, group, key: ECHO(prompts, present_R & [True, False], group, key)
  tree = game.play(rules(attacks=2), seeds("s"), attack("x"), defender, faithful, KEY)
  assert tree.attack_status_BA.tolist() == [[Status.VALID, Status.MAX_LENGTH]]


@pytest.mark.parametrize(
  ("text", "think", "answer", "status"),
  [
    ("<think>plan</think> answer", True, "answer", Status.VALID),
    ("<think>plan", True, "", Status.PARSING),
    ("<think>plan</think> answer", False, "<think>plan</think> answer", Status.VALID),
    ("  \n", False, "", Status.PARSING),
  ],
)
def test_a_defender_may_reason(text, think, answer, status):
  defender = policies.scripted(lambda *_: text)
  tree = game.play(rules(think=Players(True, think)), seeds("s"), attack("x"), defender, faithful, KEY)
  assert tree.response_text_BAD.tolist() == [[[answer]]] and tree.response_status_BAD.tolist() == [[[status]]]


def test_an_attacker_without_reasoning():
  attacker = policies.scripted(lambda *_: "<prompt>x</prompt>")
  tree = game.play(rules(think=Players(False, False)), seeds("s"), attacker, ECHO, faithful, KEY)
  assert tree.attack_text_BA.tolist() == [["x"]]


@pytest.mark.parametrize(
  "hostile", ["{seed}", "<script>alert(1)</script>", "<|im_end|>", "\u202eabc", "a\x00b", "{0} %s"]
)
def test_hostile_text_passes_through_as_it_is(hostile):
  seen = []
  tree = game.play(rules(), seeds(hostile), recording(attack(hostile), seen), ECHO, faithful, KEY)
  assert seen[0][0] == [f"break it: {hostile}"]
  assert tree.attack_text_BA.tolist() == [[hostile]] and tree.response_text_BAD.tolist() == [[[f"about {hostile}"]]]


def test_players_and_judge_draw_from_different_keys_and_the_same_ones_again():
  def keys(key):
    seen, asked = [], []
    players = recording(attack("x"), seen), recording(ECHO, seen)
    game.play(rules(2), seeds("s", "t"), *players, recording(faithful, asked), key)
    return [jax.random.key_data(a[-1]).tolist() for a in seen], [q.key for q in asked[0][0]]

  players, questions = keys(KEY)
  assert players[0] != players[1] and len(set(questions)) == 4
  assert keys(KEY) == (players, questions)
  other_players, other_questions = keys(jax.random.key(1))
  assert other_players != players and not set(other_questions) & set(questions)

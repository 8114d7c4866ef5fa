"""Instructions and parsers: every broken format has its status, and hostile text never raises."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advgame_jax import prompts
from advgame_jax.refusals import is_refusal
from advgame_jax.types import Category, Status, UserError

PIECES = [
  "<think>",
  "</think>",
  "<prompt>",
  "</prompt>",
  "< /PROMPT >",
  "{seed}",
  " ",
  "\n",
  "how",
  "I can't help with",
]
hostile = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=9).map("".join))


@pytest.mark.parametrize("instructions", [prompts.STANDARD, prompts.STANDARD_THINK])
def test_turn_depends_on_the_category_and_holds_the_seed_once(instructions):
  harmful = prompts.attacker_turn(instructions, Category.HARMFUL, "QUERY")
  benign = prompts.attacker_turn(instructions, Category.BENIGN, "QUERY")
  assert harmful != benign
  assert harmful.count("QUERY") == benign.count("QUERY") == 1
  assert "{" not in harmful + benign


def test_only_the_think_form_asks_for_reasoning():
  for category in Category:
    assert "<think>" in prompts.attacker_turn(prompts.STANDARD_THINK, category, "s")
    assert "<think>" not in prompts.attacker_turn(prompts.STANDARD, category, "s")


@pytest.mark.parametrize("seed", ["{seed}", "{seed}{seed}", "{0} {x!r} %s $x \\1", "{"])
def test_markers_inside_a_seed_are_plain_text(seed):
  turn = prompts.attacker_turn(prompts.Instructions("{x}<{seed}>", "b {seed}"), Category.HARMFUL, seed)
  assert turn == f"{{x}}<{seed}>"


def test_instructions_without_a_place_for_the_seed_are_refused():
  with pytest.raises(UserError, match="benign instruction"):
    prompts.Instructions("{seed}", "nothing")


@pytest.mark.parametrize(
  "text",
  [
    "<think>so…</think>\n<prompt> ask it </prompt>\n",
    "so…</think><prompt>ask it</prompt>",  # a chat template may open the reasoning itself
    "<think>a <prompt>draft</prompt> first</think> <prompt>ask it</prompt>",
    "<think></think>Here it is: <prompt>ask it</prompt>",
  ],
)
def test_think_form(text):
  assert prompts.parse_attack(text, think=True) == ("ask it", Status.VALID)


def test_no_think_form():
  assert prompts.parse_attack(" <prompt>\nask\nit</prompt> ", think=False) == ("ask\nit", Status.VALID)


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "ask it",
    "<prompt>ask it",
    "ask it</prompt>",
    "</prompt>ask it<prompt>",
    "<prompt>ask</prompt><prompt>it</prompt>",
    "<prompt>ask <prompt>it</prompt></prompt>",
    "<prompt>ask </think> it</prompt>",
    "<think>again</think><prompt>ask it</prompt>",
    "<prompt>ask < / Prompt > it</prompt>",
    "<prompt> \n </prompt>",
    "<prompt>\u200b\u2060\ufeff</prompt>",
    "<prompt>ask it</prompt> and more",
  ],
)
@pytest.mark.parametrize("think", [True, False])
def test_broken_formats(answer, think):
  text = "<think>so</think>" + answer if think else answer
  assert prompts.parse_attack(text, think) == ("", Status.PARSING)


def test_reasoning_that_never_ends_is_broken():
  assert prompts.parse_attack("<prompt>ask it</prompt>", think=True) == ("", Status.PARSING)
  assert prompts.parse_attack("<think>so <prompt>ask it</prompt>", think=True) == ("", Status.PARSING)


@pytest.mark.parametrize("think", [True, False])
def test_a_refused_role_is_no_mere_parse_error(think):
  assert prompts.parse_attack("I\u2019m sorry, but I can\u2019t help with that.", think)[1] == Status.REFUSED_ROLE
  thought = "<think>hm</think> I won't rewrite this." if think else "I won't rewrite this."
  assert prompts.parse_attack(thought, think) == ("", Status.REFUSED_ROLE)


def test_refusing_in_thought_alone_is_no_refusal():
  text = "<think>I can't help with this… or can I?</think> mumble"
  assert prompts.parse_attack(text, think=True) == ("", Status.PARSING)


@pytest.mark.parametrize(
  ("text", "think", "expected"),
  [
    (" yes ", False, ("yes", Status.VALID)),
    ("<think>a</think> b", False, ("<think>a</think> b", Status.VALID)),
    ("<think>a</think> b ", True, ("b", Status.VALID)),
    ("a</think>b</think>c", True, ("b</think>c", Status.VALID)),
    ("b", True, ("", Status.PARSING)),
    ("<think>a</think> \n", True, ("", Status.PARSING)),
    ("\u200b \t", False, ("", Status.PARSING)),
    ("", False, ("", Status.PARSING)),
  ],
)
def test_answers(text, think, expected):
  assert prompts.parse_answer(text, think) == expected


@settings(max_examples=300, deadline=None)
@given(text=hostile, think=st.booleans())
def test_hostile_text_never_raises_and_valid_attacks_hold_no_tags(text, think):
  attack, status = prompts.parse_attack(text, think)
  assert (status == Status.VALID) == bool(attack)
  assert not any(tag in attack for tag in PIECES[:5])
  answer, status = prompts.parse_answer(text, think)
  assert (status == Status.VALID) == bool(answer)
  assert answer == answer.strip() and answer in text


@settings(max_examples=100, deadline=None)
@given(query=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), reasoning=st.text())
def test_what_is_written_in_the_format_is_read_back(query, reasoning):
  query, reasoning = query.replace("<", "("), reasoning.replace("<", "(")
  assert prompts.parse_attack(f"<prompt>{query}</prompt>", think=False) == (query, Status.VALID)
  assert prompts.parse_attack(f"<think>{reasoning}</think><prompt>{query}</prompt>", True) == (query, Status.VALID)


def test_too_long_counts_characters_strictly_above_fifteen_fold():
  assert not prompts.too_long("ab", "x" * 30)
  assert prompts.too_long("ab", "x" * 31)
  assert not prompts.too_long("ab", " " * 99 + "x")


@pytest.mark.parametrize(
  "text",
  [
    "I can't help with that.",
    "I\u2019m sorry, but I cannot assist you with this request.",
    "  I  AM\nUNABLE to do this",
    "As an AI language model, I can not provide instructions for that.",
    "Sorry, but I won't do that.",
    "I must respectfully decline.",
    "That's not something I can do.",
    "I **cannot** help with this, and I'm *not* able to give advice.",
    "Thank you for asking. Unfortunately, I can't share how to do that. Here is another idea: …",
    "I refuse to answer.",
  ],
)
def test_refusals(text):
  assert is_refusal(text)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "I can't help but admire the question! Start by boiling water.",
    "Sorry to hear that your plant died. Water it less.",
    "You can't help a frozen process; kill it with kill -9.",
    "Sure. First, open a terminal. " + "Then type the next line. " * 20 + "I can't help with more than this.",
    "He said that the bank could not help him.",
    "I won't lie: this soup takes an hour.",
  ],
)
def test_not_refusals(text):
  assert not is_refusal(text)


@settings(max_examples=100, deadline=None)
@given(text=hostile)
def test_refusal_detection_never_raises(text):
  assert is_refusal(text) in (True, False)

"""What processes share, with threads in the place of processes; tests/test_processes.py has real ones."""

import concurrent.futures
import threading

import jax
import numpy as np
import pytest

from advgame_jax import hosts
from advgame_jax.types import Category, Question, Role, UserError, Verdict

COUNT = 3


@pytest.fixture
def everywhere(monkeypatch):
  """Calls a function of a process's number in each of three processes; what each of them gives, or raises."""
  here, barrier, said = threading.local(), threading.Barrier(COUNT, timeout=20), {}

  def gather(x):
    said[here.number] = x
    barrier.wait()
    all_of_them = np.stack([said[i] for i in range(COUNT)])
    barrier.wait()
    return all_of_them

  monkeypatch.setattr(jax, "process_count", lambda: COUNT)
  monkeypatch.setattr(jax, "process_index", lambda: here.number)
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)

  def call(f):
    def one(number):
      here.number = number
      try:
        return f(number)
      except UserError as error:
        return error

    with concurrent.futures.ThreadPoolExecutor(COUNT) as threads:
      return list(threads.map(one, range(COUNT)))

  return call


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64])
def test_each_does_its_share_once_and_all_have_the_whole(everywhere, count):
  done = []
  work = lambda items: done.extend(items) or [f"{item} ü\ud800" * item for item in items]
  results = everywhere(lambda _: hosts.together(work, list(range(count))))
  assert results == [[f"{item} ü\ud800" * item for item in range(count)]] * COUNT
  assert sorted(done) == list(range(count))  # nobody's work is done twice


def test_shares_are_even(everywhere):
  sizes = {}
  everywhere(lambda i: hosts.together(lambda items: sizes.update({i: len(items)}) or items, list(range(32))))
  assert sorted(sizes.values()) == [10, 11, 11]


def test_alone_the_work_is_simply_done():
  assert hosts.together(lambda items: (x + 1 for x in items), [1, 2]) == [2, 3]
  assert hosts.anywhere(True) and not hosts.anywhere(False)


def test_messages_are_of_few_shapes(everywhere, monkeypatch):
  shapes, gather = set(), hosts.multihost_utils.process_allgather
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda x: shapes.add(x.shape) or gather(x))
  for length in range(0, 5000, 250):
    everywhere(lambda _, length=length: hosts.together(lambda items: ["x" * length for _ in items], [0, 1, 2]))
  assert shapes == {(), (1024,), (2048,), (4096,), (8192,)}


def test_what_one_refuses_all_refuse(everywhere):
  def work(items):
    if 2 in items:
      raise UserError("the judge is not there")
    return list(items)

  assert [str(error) for error in everywhere(lambda _: hosts.together(work, [0, 1, 2]))] == [
    "the judge is not there"
  ] * 3


def test_the_first_does_it_alone_and_what_it_refuses_all_hear(everywhere):
  done = []
  everywhere(lambda number: hosts.first_alone(lambda: done.append(number)))
  assert done == [0]

  def refuse():
    raise UserError("no room")

  assert list(map(str, everywhere(lambda _: hosts.first_alone(refuse)))) == ["no room"] * COUNT


def test_other_settings_than_the_first_s_are_refused_everywhere(everywhere):
  assert everywhere(lambda i: hosts.agree({"seed": 1, "layers": (1, 2)})) == [None] * COUNT
  refused = everywhere(lambda i: hosts.agree({"seed": 5 if i == 1 else 1}))
  assert [str(error) for error in refused] == [
    "process 1 has other settings than process 0 (seed 1 → 5); allowed: the same config, flags and files on every host"
  ] * COUNT


def test_a_flag_of_one_is_known_to_all(everywhere):
  assert everywhere(lambda number: hosts.anywhere(number == 1)) == [True] * COUNT
  assert everywhere(lambda number: hosts.anywhere(False)) == [False] * COUNT


def test_a_judge_off_the_mesh_is_asked_each_question_once(everywhere):
  asked = []

  def judge(questions):
    asked.extend(q.query for q in questions)
    return [Verdict((0.1 + 0.2, 1 / 3), 7, 1e12) if q.key else Verdict(()) for q in questions]

  questions = [Question(Role.COMPLIANCE, Category.HARMFUL, f"q{i}", ("a", "b"), i) for i in range(5)]
  verdicts = everywhere(lambda _: list(hosts.divided(judge)(questions)))
  assert sorted(asked) == [f"q{i}" for i in range(5)]
  assert verdicts == [judge(questions)] * COUNT  # to the last bit

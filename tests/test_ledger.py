import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advgame_jax.ledger import WORKS, Ledger


class Clock:
  """Time that passes when told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_time_belongs_to_the_innermost_timer():
  clock = Clock()
  ledger = Ledger(devices=4, clock=clock)
  clock.now += 50  # outside every timer: nobody's
  with ledger.timed("defender generate"):
    clock.now += 2
    with ledger.timed("judge"):
      clock.now += 3
    clock.now += 1
  assert ledger.spent("defender generate").seconds == 3
  assert ledger.spent("judge").seconds == 3
  assert ledger.spent("judge").device_seconds == 12
  assert ledger.scalars()["cost/seconds"] == 6


def test_a_block_that_raises_is_still_counted_and_closed():
  clock = Clock()
  ledger = Ledger(devices=1, clock=clock)
  with pytest.raises(KeyError), ledger.timed("update"):
    clock.now += 1
    raise KeyError
  clock.now += 10
  with ledger.timed("judge"):
    clock.now += 2
  assert ledger.spent("update").seconds == 1
  assert ledger.spent("judge").seconds == 2


def test_threads_have_timers_of_their_own():
  """What two do at the same time counts for both."""
  clock = Clock()
  both = Ledger(1, clock)
  inside, done = threading.Event(), threading.Event()

  def work():
    with both.timed("judge"):
      inside.set()
      done.wait()

  thread = threading.Thread(target=work)
  with both.timed("update"):
    thread.start()
    inside.wait()
    clock.now += 5.0
    done.set()
    thread.join()
  assert both.spent("judge").seconds == both.spent("update").seconds == 5.0


def test_totals_by_kind_of_token():
  ledger = Ledger(devices=1)
  for tokens, work in enumerate(WORKS, start=1):
    ledger.add(work, tokens=10**tokens, flops=tokens)
  scalars = ledger.scalars()
  assert scalars["cost/tokens_generated"] == 110  # of the two players, not of evaluations
  assert scalars["cost/tokens_judged"] == 1000
  assert scalars["cost/tokens_trained"] == 10000
  assert scalars["cost/flops"] == 21
  assert scalars["cost/tokens/attacker_generate"] == 10
  assert all(name.startswith("cost/") and " " not in name for name in scalars)
  assert all(type(value) is float for value in scalars.values())


def test_an_unknown_role_is_refused():
  ledger = Ledger(devices=1)
  with pytest.raises(KeyError):
    ledger.add("lunch", tokens=1)


def test_numpy_and_jax_counts_stay_plain_json():
  ledger = Ledger(devices=1)
  ledger.add("update", tokens=np.int32(3), flops=jnp.float32(2))
  assert json.loads(json.dumps(ledger.state_dict()))["spent"]["update"]["tokens"] == 3


def test_a_resumed_ledger_goes_on_and_keeps_the_devices_of_the_time():
  clock = Clock()
  first = Ledger(devices=8, clock=clock)
  with first.timed("update"):
    clock.now += 2
  first.add("update", tokens=5, flops=7)
  state = json.loads(json.dumps(first.state_dict()))

  second = Ledger(devices=1, clock=clock)
  with second.timed("update"):  # before the checkpoint is read: kept
    clock.now += 1
  second.load(state)
  assert second.spent("update").tokens == 5
  assert second.spent("update").seconds == 3
  assert second.spent("update").device_seconds == 17


def test_round_trip():
  ledger = Ledger(devices=2)
  for work in WORKS:
    ledger.add(work, tokens=3, flops=2.5)
    with ledger.timed(work):
      pass
  jax.jit(lambda x: x * 2.5)(jnp.arange(3.0))
  state = json.loads(json.dumps(ledger.state_dict()))
  again = Ledger(devices=2)
  again.load(state)
  assert again.state_dict() == state
  assert again.scalars() == ledger.scalars()


def test_compilations_are_counted_once_each_however_many_ledgers():
  x = jax.block_until_ready(jnp.arange(4.0))
  double = jax.jit(lambda x: x * 2.0 + 17.0)
  outer, inner = Ledger(devices=1), Ledger(devices=1)
  jax.block_until_ready(double(x))
  assert inner.compilations == outer.compilations == 1
  assert 0 < inner.compile_seconds == outer.compile_seconds
  jax.block_until_ready(double(x))
  assert inner.compilations == 1
  late = Ledger(devices=1)
  assert late.compilations == 0
  late.load(inner.state_dict())
  assert late.compilations == 1

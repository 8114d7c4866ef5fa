"""Checkpoints: bit for bit what the state was, on any mesh, the last good one, and whose a folder is."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import world

from advgame_jax import checkpoint, data, session
from advgame_jax.types import Category, UserError

CONTENTS = {"seeds": "a", "rubrics": "b"}


@pytest.fixture(scope="module")
def run(world_folder):
  return session.open_session(world.config(world_folder), jax.devices()[:1])


@pytest.fixture
def open_checkpoints(tmp_path, run):
  """Opens the checkpoints of one folder, as each process of a run does."""
  opened = []

  def again(**changes):
    for before in opened:
      before.close()
    opened.append(checkpoint.Checkpoints(tmp_path, world.changed(run.config, **changes)))
    return opened[-1]

  yield again
  opened[-1].close()


def at(run, step):
  """A state of that step, all its numbers different from those of other steps."""
  state = jax.jit(lambda state: jax.tree.map(lambda x: x + step, state), donate_argnums=0)(run.init_state())
  return state.replace(step=state.step * 0 + step)


def same(a, b):
  equal = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype
  return jax.tree.all(jax.tree.map(equal, a, b))


def saved_steps(folder):
  return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def corrupt(checkpoint):
  """Half of every array's file is lost."""
  for path in (checkpoint / "state").rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(checkpoint):
  """Its files are there but hold nothing, as after a power cut."""
  for path in checkpoint.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


def without_ledger(checkpoint):
  shutil.rmtree(checkpoint / "run")


def mislabelled(checkpoint):
  """It is the one before, under this name."""
  shutil.rmtree(checkpoint)
  shutil.copytree(checkpoint.with_name(str(int(checkpoint.name) - 1)), checkpoint)


def test_a_state_that_is_overwritten_at_once_is_saved_as_it_was(run, open_checkpoints, tmp_path):
  overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
  checkpoints = open_checkpoints(checkpoint__keep=3)
  for step in range(3):
    state = at(run, step)
    checkpoints.save(state, {"spent": step}, None)
    overwrite(state)
  checkpoints.wait()
  for step in (2, 1, 0):
    state, ledger = open_checkpoints().restore(run.abstract_state)
    assert same(state, at(run, step)) and ledger == {"spent": step}
    shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_a_player_that_holds_nothing_but_its_weights_is_saved(world_folder, open_checkpoints):
  frozen = session.open_session(world.config(world_folder, attacker__frozen=True), jax.devices()[:1])
  state = at(frozen, 1)
  assert (state.players.attacker.ema, state.players.attacker.initial, state.players.attacker.optimizer) == ({}, {}, ())
  open_checkpoints().save(state, {}, None)
  restored, _ = open_checkpoints().restore(frozen.abstract_state)
  assert world.same(jax.device_get(restored), jax.device_get(state))


def test_a_new_folder_has_nothing_to_restore(run, open_checkpoints):
  assert open_checkpoints().restore(run.abstract_state) is None


def test_the_newest_and_the_best_are_kept(run, open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  for step, objective in enumerate((-0.5, None, -0.1, -0.3, None, None)):
    checkpoints.save(at(run, step), {}, objective)
  checkpoints.wait()
  assert saved_steps(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize("spoil", [corrupt, empty, without_ledger, shutil.rmtree, mislabelled])
def test_the_last_good_one_is_used_said_so_and_saved_over(run, open_checkpoints, tmp_path, caplog, spoil):
  checkpoints = open_checkpoints(checkpoint__keep=3)
  for step in (1, 2):
    checkpoints.save(at(run, step), {"spent": step}, None)
  checkpoints.wait()
  spoil(tmp_path / "checkpoints" / "2")
  (tmp_path / "transcript.jsonl").write_text("{}")
  checkpoints = open_checkpoints()
  state, ledger = checkpoints.restore(run.abstract_state)
  assert same(state, at(run, 1)) and ledger == {"spent": 1}
  assert ("checkpoint 2 cannot be read" in caplog.text) == (spoil != shutil.rmtree)
  assert (tmp_path / "transcript.jsonl").read_text() == "{}"
  checkpoints.save(at(run, 2), {"spent": 20}, None)
  state, ledger = open_checkpoints().restore(run.abstract_state)
  assert same(state, at(run, 2)) and ledger == {"spent": 20}


def test_when_none_is_good_that_is_said_and_nothing_is_removed(run, open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  for step in range(2):
    checkpoints.save(at(run, step), {}, None)
  checkpoints.wait()
  corrupt(tmp_path / "checkpoints" / "0")
  corrupt(tmp_path / "checkpoints" / "1")
  with pytest.raises(UserError, match=r"none of the checkpoints \[1, 0\] can be read; allowed: a new --workdir"):
    open_checkpoints().restore(run.abstract_state)
  assert saved_steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("method", ["save", "wait_until_finished", "close"])
def test_a_full_disk_is_said_and_nothing_else_is_taken_for_it(run, open_checkpoints, monkeypatch, method):
  checkpoints = open_checkpoints()
  calls = {
    "save": lambda: checkpoints.save(at(run, 0), {}, None),
    "wait_until_finished": checkpoints.wait,
    "close": checkpoints.close,
  }

  def failing(message):
    def fail(*_, **__):
      raise ValueError(message)

    return fail

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._manager, method, failing("RESOURCE_EXHAUSTED: No space left on device [code='28']"))
    with pytest.raises(UserError, match="the disk is full, so that this step could not be saved; the checkpoints befo"):
      calls[method]()
    patch.setattr(checkpoints._manager, method, failing("the ceiling came down"))
    with pytest.raises(ValueError, match="ceiling") as error:
      calls[method]()
    assert error.type is ValueError


def test_half_a_checkpoint_is_none(run, open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  checkpoints.save(at(run, 0), {}, None)
  checkpoints.wait()
  whole = tmp_path / "checkpoints" / "0"
  (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp-1").mkdir()  # as a killed process leaves it
  (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp-1" / "state").symlink_to(whole / "state")
  state, _ = open_checkpoints().restore(run.abstract_state)
  assert int(state.step) == 0


@pytest.mark.parametrize("there, back", [(8, 1), (1, 8)])
def test_a_checkpoint_of_one_mesh_restores_on_another(world_folder, open_checkpoints, there, back):
  mesh = {1: {}, 8: {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}}
  runs = {n: session.open_session(world.config(world_folder, **mesh[n]), jax.devices()[:n]) for n in (1, 8)}
  state = at(runs[there], 3)
  checkpoints = open_checkpoints()
  checkpoints.save(state, {}, None)
  checkpoints.wait()
  restored, _ = open_checkpoints().restore(runs[back].abstract_state)
  assert same(restored, jax.device_get(state))
  where = lambda state: jax.tree.map(lambda x: x.sharding, state)
  assert where(restored) == where(runs[back].abstract_state)


def test_a_folder_is_claimed_once(run, tmp_path):
  folder = tmp_path / "new" / "run"
  checkpoint.claim(folder, run.config, CONTENTS, allow_changes=False)
  checkpoint.claim(folder, run.config, CONTENTS, allow_changes=False)
  checkpoint.claim(folder, world.changed(run.config, checkpoint__every=7), CONTENTS, allow_changes=False)
  other = world.changed(run.config, loss__beta=0.2, checkpoint__every=9)
  before = (folder / "config.json").read_bytes()
  with pytest.raises(UserError, match=r"other settings \(loss.beta: 0.1 → 0.2\); allowed: .*--allow_changes"):
    checkpoint.claim(folder, other, CONTENTS, allow_changes=False)
  assert (folder / "config.json").read_bytes() == before
  checkpoint.claim(folder, other, CONTENTS, allow_changes=True)
  checkpoint.claim(folder, other, CONTENTS, allow_changes=False)


def test_files_that_were_edited_make_another_run(run, tmp_path):
  checkpoint.claim(tmp_path, run.config, CONTENTS, allow_changes=False)
  edited = CONTENTS | {"rubrics": "c"}
  with pytest.raises(UserError, match=r"other settings \(rubrics say something else than before\); allowed"):
    checkpoint.claim(tmp_path, run.config, edited, allow_changes=False)
  checkpoint.claim(tmp_path, run.config, CONTENTS, allow_changes=False)
  checkpoint.claim(tmp_path, run.config, edited, allow_changes=True)
  checkpoint.claim(tmp_path, run.config, edited, allow_changes=False)
  (tmp_path / "contents.json").write_text("[")
  with pytest.raises(UserError, match=r"contents\.json cannot be read"):
    checkpoint.claim(tmp_path, run.config, edited, allow_changes=False)
  (tmp_path / "contents.json").unlink()  # a run that was killed at its beginning
  checkpoint.claim(tmp_path, run.config, CONTENTS, allow_changes=False)


def test_what_files_say_is_known_by_its_hash(run):
  assert run.contents.keys() == {"seeds", "instructions", "rubrics"}
  first, second = run.train_seeds[:2]
  other = next(category for category in Category if category != first.category)
  orders = [first, second], [second, first], [first], [dataclasses.replace(first, category=other)]
  assert len(set(map(data.version, orders))) == 4


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(UserError, match=r"holds files but no config\.json of a run"):
    checkpoint.claim(tmp_path, run.config, CONTENTS, allow_changes=True)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_claim_that_was_killed_is_made_again(run, tmp_path):
  (tmp_path / "config.partial").write_text("{")
  checkpoint.claim(tmp_path, run.config, CONTENTS, allow_changes=False)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "contents.json"]


@pytest.mark.parametrize("text", ['{"architectures": ["LlamaForCausalLM"]}', "[]", "{"])
def test_the_config_of_something_else_is_left_alone(run, tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=r"config\.json is not of a run \(.*\); allowed: an empty or new folder"):
    checkpoint.claim(tmp_path, run.config, CONTENTS, allow_changes=True)
  assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused(run, tmp_path, name):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"cannot be made: .*; allowed: a folder that can be written to"):
    checkpoint.claim(tmp_path / name, run.config, CONTENTS, allow_changes=True)

"""A run on a mesh of eight is the run on one device; what cannot be opened is refused in a sentence."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import world

from advgame_jax import blueprint, checkpoint, preferences, targets, train
from advgame_jax.sharding import pad_leading
from advgame_jax.types import Players, UserError

pytestmark = pytest.mark.usefixtures("compile_quickly")

MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def alone(world_folder):
  """Two steps on one device."""
  run = world.open_session(world.config(world_folder))
  return run, *world.play(run, 2)


def batches(run, recorder, step):
  tree = recorder.trees[step]
  return preferences.select_comparisons(run.config.loss, tree, recorder.rewards[step], run.units)


def assert_same_play(a, b, step):
  """Two runs played one tree: tokens, texts, statuses, rewards; log-probabilities to rounding."""
  assert world.same(dataclasses.asdict(a.rewards[step]), dataclasses.asdict(b.rewards[step]))
  tree, other = a.trees[step], b.trees[step]
  for name in ("attack_text_BA", "attack_status_BA", "response_text_BAD", "response_status_BAD"):
    np.testing.assert_array_equal(getattr(tree, name), getattr(other, name))
  for samples, others in ((tree.attacks, other.attacks), (tree.responses, other.responses)):
    for field in dataclasses.fields(samples):
      mine, theirs = getattr(samples, field.name), getattr(others, field.name)
      if "logprob" in field.name:
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
      else:
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
  "sharding,mesh,parts",
  [("fsdp", MESH, 4), ("fsdp_tensor", MESH, 4), ("sequence", {"mesh__sequence": 2}, 8), ("apart", {}, 2)],
)
def test_eight_devices_play_and_learn_as_one(alone, world_folder, tmp_path, sharding, mesh, parts):
  run, recorder, states = alone
  mesh_run = world.open_session(world.config(world_folder, sharding=sharding, **mesh), devices=8)
  state = mesh_run.init_state()
  embed = state.players.attacker.params["embed"]
  assert len({str(shard.index) for shard in embed.addressable_shards}) == parts  # vocabulary and width are shared out
  mesh_recorder, (before, after) = world.play(mesh_run, 1, state)
  assert world.same(before, states[0])
  assert_same_play(recorder, mesh_recorder, 0)
  for batch, other in zip(batches(run, recorder, 0), batches(mesh_run, mesh_recorder, 0)):
    np.testing.assert_array_equal(batch.prompt_PS, other.prompt_PS)
    np.testing.assert_array_equal(batch.tokens_PCT, other.tokens_PCT)
    np.testing.assert_array_equal(batch.weight_PC, other.weight_PC)
  for name in Players._fields:
    for metric, tolerance in (("loss", 1e-5), ("comparisons", 0), ("grad_norm", 1e-4)):
      expected = recorder.scalars[0][f"{name}/{metric}"]
      assert mesh_recorder.scalars[0][f"{name}/{metric}"] == pytest.approx(expected, rel=tolerance)
  world.assert_close(world.first_moments(states[1]), world.first_moments(after), 1e-4)
  if sharding == "fsdp":
    goes_on_alone(run, mesh_run, after, tmp_path)


def goes_on_alone(run, mesh_run, after, folder):
  """From a checkpoint of eight devices, one plays the step that eight play."""
  checkpoints = checkpoint.Checkpoints(folder, run.config)
  checkpoints.save(jax.device_put(after, mesh_run.state_shardings), {}, None)
  checkpoints.wait()
  restored, _ = checkpoints.restore(run.abstract_state)
  checkpoints.close()
  alone, (before, one) = world.play(run, 1, restored)
  assert world.same(before, after)
  together, (_, eight) = world.play(mesh_run, 1, jax.device_put(after, mesh_run.state_shardings))
  assert_same_play(alone, together, 1)
  assert one.step == eight.step == 2
  world.assert_close(world.first_moments(one), world.first_moments(eight), 1e-3)


def test_how_samples_share_rows_changes_no_update(alone, world_folder):
  """GRPO's update of one tree, a node's samples in one row on one device, and as far as eight devices let them."""
  _, recorder, _ = alone
  states, metrics = [], []
  for devices, sharding, shapes in ((1, "single", [(8, 2), (16, 2)]), (8, "fsdp", [(16, 1), (16, 2)])):
    twice = {f"{name}__accumulate": 2 for name in Players._fields}
    config = world.config(world_folder, loss__kind="grpo", sharding=sharding, **twice)
    run = world.open_session(config, devices)
    batch = batches(run, recorder, 0)
    assert [part.weight_PC.shape for part in batch] == shapes
    target = dataclasses.replace(targets.parse(f"cpu:{devices}"), name=f"cpu:{devices}")
    planned = blueprint._Drafter(config, target, run.places, 0)
    for recipe, part in zip(planned.recipes, batch):
      of_plan, of_run = planned.batch(recipe), pad_leading(part, recipe.unit)
      jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), of_plan, of_run)
    state, learnt = run.update(run.init_state(), batch)
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(learnt))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *metrics)
  world.assert_close(*map(world.first_moments, states), 1e-4)


SEED = '{"prompt": "how do i pick the lock ?", "category": "harmful"}\n'


@pytest.mark.parametrize(
  "text, sentence",
  [
    (None, ".*train.jsonl cannot be read: No such file"),
    ("\n", "train.jsonl is empty; allowed: one or more lines"),
    (SEED + "{", r"train.jsonl, line 2: not JSON \("),
    (SEED.replace("harmful", "naughty"), "line 1: category is 'naughty'; allowed: harmful, benign"),
    (SEED + "\n" + SEED.replace("how do", "HOW  do"), "line 3: the same seed as .*train.jsonl, line 1; allowed: each"),
    (SEED.replace("pick", "pick " * 30), r"makes a prompt of 42 tokens, .*attacker.*ends at 24; allowed: a bucket of"),
  ],
)
def test_seeds_are_refused(world_folder, tmp_path, text, sentence):
  if text is not None:
    (tmp_path / "train.jsonl").write_text(text)
  refused(world.config(world_folder, data__train=(str(tmp_path / "train.jsonl"),)), tmp_path, sentence)


def refused(config, folder, sentence):
  """The run is refused and nothing is written."""
  with pytest.raises(UserError, match=sentence) as error:
    train.train(config, str(folder / "run"), devices=jax.devices()[:1])
  assert "\n" not in str(error.value) and not (folder / "run").exists()


def test_validation_seeds_that_are_played_are_refused(world_folder, tmp_path):
  lines = (world_folder / "validation.jsonl").read_text() + SEED.replace("how do i", "How do I")
  (tmp_path / "validation.jsonl").write_text(lines)
  config = world.config(world_folder, data__validation=(str(tmp_path / "validation.jsonl"),))
  refused(config, tmp_path, "1 validation seeds are training seeds too, the first is number 19 of")


def without(name):
  return lambda folder: (folder / name).unlink()


def edit_config(**values):
  def edit(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

  return edit


@pytest.mark.parametrize(
  "spoil, sentence",
  [
    (shutil.rmtree, "there is no folder .*spoilt; allowed"),
    (without("config.json"), "spoilt has no config.json; allowed"),
    (without("tokenizer.json"), "spoilt.*tokenizer"),
    (without("model.safetensors"), "spoilt has no weights; allowed: model.safetensors"),
    (edit_config(intermediate_size=80), r"has shape \[32, 64\]; allowed: \[32, 80\], as"),
    (edit_config(num_hidden_layers=3), "spoilt lacks the weights model.layers.2"),
    (edit_config(max_position_embeddings=40), "take 48 tokens, the model has 40 positions; allowed"),
    (edit_config(model_type="gpt2"), "model_type is 'gpt2'; allowed: 'llama'"),
  ],
)
def test_model_folders_are_refused(world_folder, tmp_path, spoil, sentence):
  shutil.copytree(world_folder / "defender_base", tmp_path / "spoilt")
  spoil(tmp_path / "spoilt")
  refused(world.config(world_folder, defender__model=str(tmp_path / "spoilt")), tmp_path, sentence)


@pytest.mark.parametrize(
  "changes, sentence",
  [
    ({"attacker__model": ""}, "config.attacker.model is empty; allowed"),
    ({"mesh__fsdp": 3}, "fsdp=3, sequence=1, tensor=1 does not fit 1 devices; allowed: sizes whose product is 1"),
    ({"data__validation": ()}, "config.data.validation names no file; allowed"),
  ],
)
def test_settings_that_cannot_be_opened_are_refused(world_folder, tmp_path, changes, sentence):
  refused(world.config(world_folder, **changes), tmp_path, sentence)


def test_a_mesh_that_does_not_divide_the_model_is_refused(world_folder):
  config = world.config(world_folder, mesh__data=2, mesh__tensor=4)
  with pytest.raises(UserError, match="axis 'heads' of size 2 does not divide over tensor = 4 devices; allowed: 1, 2"):
    world.open_session(config, devices=8)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_run_whose_seeds_were_edited_is_left_alone(world_folder, tmp_path, name):
  files = {part: tmp_path / f"{part}.jsonl" for part in ("train", "validation")}
  for file in files.values():
    shutil.copy(world_folder / file.name, file)
  config = world.config(world_folder, **{f"data__{part}": (str(file),) for part, file in files.items()})
  run = world.open_session(config)
  checkpoint.claim(tmp_path / "run", config, run.contents, allow_changes=False)
  files[name].write_text("".join(files[name].read_text().splitlines(keepends=True)[:-1]))
  with pytest.raises(UserError, match=r"other settings \(seeds say something else than before\); allowed"):
    train.train(config, str(tmp_path / "run"), devices=jax.devices()[:1])


def test_a_folder_of_another_run_is_left_alone(world_folder, tmp_path):
  checkpoint.claim(tmp_path, world.config(world_folder), {}, allow_changes=False)
  before = sorted((path, path.read_bytes()) for path in tmp_path.iterdir())
  with pytest.raises(UserError, match=r"other settings \(steps: 4 → 5\); allowed"):
    train.train(world.config(world_folder, steps=5), str(tmp_path), devices=jax.devices()[:1])
  assert sorted((path, path.read_bytes()) for path in tmp_path.iterdir()) == before

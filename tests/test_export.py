"""A finished run's players, exported, are the weights of its checkpoint."""

import json
import shutil

import jax
import numpy as np
import pytest
import world

from advgame_jax import export, hf, lora, peft, session, tokenizer, train
from advgame_jax.checkpoint import Checkpoints
from advgame_jax.types import UserError

pytestmark = pytest.mark.usefixtures("compile_quickly")

ONE = slice(0, 1)


@pytest.fixture(scope="module")
def run(world_folder, tmp_path_factory):
  """The Attacker learns by adapters, the Defender with all its weights."""
  workdir = tmp_path_factory.mktemp("run")
  config = world.config(
    world_folder, steps=2, checkpoint__every=1, attacker__lora__rank=2, defender__reference="initial"
  )
  train.train(config, str(workdir), devices=jax.devices()[ONE])
  opened = session.open_session(config, jax.devices()[ONE])
  state, _ = Checkpoints(workdir, config, read_only=True).restore(opened.abstract_state)
  return workdir, opened, jax.device_get(state)


@pytest.mark.parametrize("weights, part", [("", "ema"), ("ema", "ema"), ("train", "params")])
def test_all_weights(run, tmp_path, weights, part):
  workdir, opened, state = run
  export.export(str(workdir), "defender", str(tmp_path / "out"), weights=weights, dtype="float32")
  assert world.same(hf.load(tmp_path / "out"), getattr(state.players.defender, part))
  assert hf.load_config(tmp_path / "out") == opened.players.defender.model
  written, own = tokenizer.load(tmp_path / "out"), opened.players.defender.tokenizer
  assert written.encode_chat("how do i") == own.encode_chat("how do i")


def test_adapters_merged_and_as_they_are(run, tmp_path):
  workdir, opened, state = run
  settings, model = opened.config.attacker, opened.players.attacker.model
  export.export(str(workdir), "attacker", str(tmp_path / "adapter"), form="adapter")
  loaded = peft.load(tmp_path / "adapter", model, settings.lora)
  assert world.same(loaded, state.players.attacker.ema)
  assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
  export.export(str(workdir), "attacker", str(tmp_path / "merged"), dtype="float32")
  merged = lora.merge(model, lora.attach(hf.load(settings.model), lora.scale(loaded, settings.lora)))
  jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "merged"), merged)
  assert not world.same(merged, hf.load(settings.model))


def test_how_the_base_is_sampled_is_kept(world_folder, tmp_path):
  shutil.copytree(world_folder / "defender_base", tmp_path / "base")
  path = tmp_path / "base" / "generation_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"top_p": 0.8, "repetition_penalty": 1.05}))
  config = world.config(world_folder, steps=1, defender__model=str(tmp_path / "base"), attacker__frozen=True)
  train.train(config, str(tmp_path / "run"), devices=jax.devices()[ONE])
  export.export(str(tmp_path / "run"), "defender", str(tmp_path / "out"))
  written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert (written["top_p"], written["repetition_penalty"]) == (0.8, 1.05)
  assert written["eos_token_id"] == json.loads(path.read_text())["eos_token_id"]


def test_an_earlier_checkpoint_and_the_base_s_dtype(run, tmp_path):
  workdir, _, state = run
  export.export(str(workdir), "defender", str(tmp_path / "out"), step=1)
  early = hf.load(tmp_path / "out")
  assert not world.same(early, state.players.defender.ema)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    ({"step": 7}, "there is no checkpoint of step 7; allowed: 1, 2"),
    ({"form": "peft"}, "form is 'peft'; allowed: merged, adapter"),
    ({"form": "adapter"}, "the defender of .* has no adapters; allowed: --form=merged"),
  ],
)
def test_what_a_run_has_not_is_refused(run, tmp_path, arguments, sentence):
  with pytest.raises(UserError, match=sentence):
    export.export(str(run[0]), "defender", str(tmp_path / "out"), **arguments)
  assert not (tmp_path / "out").exists()


def test_folders_that_are_none_are_refused(run, tmp_path):
  with pytest.raises(UserError, match=r"holds no config\.json; allowed: the --workdir of a run"):
    export.export(str(tmp_path), "defender", str(tmp_path / "out"))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "kept").write_text("")
  with pytest.raises(UserError, match="is there already"):
    export.export(str(run[0]), "defender", str(tmp_path / "out"))


def test_a_run_that_skips_its_attacker_exports_both(world_folder, tmp_path):
  config = world.config(world_folder, steps=1, game__skip_attacker=True)
  train.train(config, str(tmp_path / "run"), devices=jax.devices()[ONE])
  for name in ("attacker", "defender"):
    export.export(str(tmp_path / "run"), name, str(tmp_path / name), dtype="float32")
  assert world.same(hf.load(tmp_path / "attacker"), hf.load(config.attacker.model))
  assert not world.same(hf.load(tmp_path / "defender"), hf.load(config.defender.model))


def test_exporting_leaves_the_run_as_it_is(run, tmp_path):
  workdir = run[0]
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  export.export(str(workdir), "defender", str(tmp_path / "out"))
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before

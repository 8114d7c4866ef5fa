"""Adapters: what they compute, what they share, and their way from and to PEFT."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import world
from safetensors.numpy import load_file

from advgame_jax import architecture, checkpoint, frozen, hf, lora, matrices, model, peft, scoring, sharding, train
from advgame_jax import config as config_lib
from advgame_jax.config import Lora
from advgame_jax.matrices import Int8
from advgame_jax.types import Players, UserError

pytestmark = pytest.mark.usefixtures("compile_quickly")

GOLDEN = pathlib.Path(__file__).parent / "golden"
ALL = Lora(rank=4, alpha=12.0)
TOKENS_RT = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab, (3, 10)).astype(np.int32)


def logits(config, params, tokens_RT):
  return model.logits(config, params, model.forward(config, params, tokens_RT)[0])


def adapters(settings, up=0.0, config=tiny.CONFIG):
  """Fresh ones, `up` moved off zero."""
  fresh = lora.init(lora.adapter_specs(config, settings), jax.random.key(0))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: x + up * rng.normal(size=x.shape).astype(np.float32), fresh)


# Arithmetic.


def test_fresh_adapters_change_no_logit():
  adapted = lora.attach(tiny.params(), lora.scale(adapters(ALL), ALL))
  np.testing.assert_array_equal(logits(tiny.CONFIG, adapted, TOKENS_RT), logits(tiny.CONFIG, tiny.params(), TOKENS_RT))


def test_adapted_weights_compute_what_their_merger_computes():
  adapted = lora.attach(tiny.params(), lora.scale(adapters(ALL, up=0.1), ALL))
  merged = lora.merge(tiny.CONFIG, adapted)
  assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, tiny.params())
  changed = logits(tiny.CONFIG, merged, TOKENS_RT)
  np.testing.assert_allclose(logits(tiny.CONFIG, adapted, TOKENS_RT), changed, atol=1e-4)
  assert np.abs(changed - logits(tiny.CONFIG, tiny.params(), TOKENS_RT)).max() > 1


@pytest.mark.parametrize("target", ["query", "output", "down"])
def test_full_rank_on_a_zero_base_is_training_that_matrix(target):
  """With `down` the identity, `up` is the matrix: the same scores, and the same gradient."""
  spec = architecture.param_specs(tiny.CONFIG)["layers"][target]
  inputs = spec.shape[1 : 1 + spec.inputs]
  rank = int(np.prod(inputs))
  settings = Lora(rank=rank, alpha=float(rank), targets=(target,))
  params = tiny.params()
  base = {**params, "layers": {**params["layers"], target: jnp.zeros(spec.shape)}}
  identity = np.broadcast_to(np.eye(rank, dtype=np.float32), (spec.shape[0], rank, rank))
  down = identity.reshape(spec.shape[0], *inputs, rank)
  matrix = params["layers"][target].reshape(spec.shape[0], rank, *spec.shape[1 + spec.inputs :])
  mask_RT = np.arange(10) >= np.array([[3], [5], [1]])

  def score(weights):
    return jnp.sum(scoring.score(tiny.CONFIG, weights, TOKENS_RT, mask_RT))

  def adapted(up):
    return score(lora.attach(base, lora.scale({"layers": {target: {"down": down, "up": up}}}, settings)))

  plain = lambda weight: score({**params, "layers": {**params["layers"], target: weight}})
  value, gradient = jax.value_and_grad(plain)(params["layers"][target])
  lora_value, lora_gradient = jax.value_and_grad(adapted)(matrix)
  np.testing.assert_allclose(lora_value, value, rtol=1e-5)
  np.testing.assert_allclose(lora_gradient.reshape(gradient.shape), gradient, atol=1e-5 * np.abs(gradient).max())


def test_experts_have_no_single_matrix_to_adapt():
  config = hf.load_config(GOLDEN / "mixtral")
  with pytest.raises(UserError, match=r"targets has 'gate', of which .* allowed: .*attention"):
    lora.adapter_specs(config, ALL)
  lora.adapter_specs(config, Lora(rank=4, targets=("query", "output")))


@pytest.mark.parametrize(
  "changes, sentence",
  [
    ({"targets": ("qkv",)}, "targets is .*; allowed: one or more of query, key"),
    ({"targets": ()}, "allowed: one or more of"),
    ({"targets": ("query", "query")}, "each once"),
    ({"rank": 0, "start": "here"}, "start is 'here' with rank=0"),
    ({"alpha": 0.0}, "alpha is 0.0; allowed: above 0"),
  ],
)
def test_settings_that_mean_nothing_are_refused(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    Lora(**({"rank": 4} | changes))


# Eight bits.


def test_int8_is_within_half_a_step_of_each_output():
  spec = architecture.param_specs(tiny.CONFIG)["layers"]["output"]
  weight = tiny.params()["layers"]["output"]
  narrow = matrices.quantise(weight, spec.stacked, spec.inputs)
  assert narrow.values.dtype == jnp.int8 and narrow.scale.shape == (2, 1, 1, 32)
  assert (np.abs(matrices.dense(narrow, jnp.float32) - weight) <= narrow.scale / 2 + 1e-7).all()
  np.testing.assert_allclose(np.abs(weight).max((1, 2), keepdims=True) / 127, narrow.scale, rtol=1e-6)


def test_a_matrix_of_zeros_stays_zero_in_int8():
  assert not np.asarray(matrices.dense(matrices.quantise(jnp.zeros((2, 3, 4)), 1, 1), jnp.float32)).any()


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_int8_projects_what_its_numbers_say(name):
  mesh = tiny.mesh()
  config = hf.load_config(GOLDEN / name)
  narrow = frozen.load(str(GOLDEN / name), mesh, sharding.TRAIN, jnp.float32, int8=True)
  assert isinstance(narrow["layers"]["query"], Int8) and isinstance(narrow["layers"]["down"], Int8)
  wide = lora.merge(config, narrow)
  tokens_RT = TOKENS_RT % config.vocab
  np.testing.assert_allclose(logits(config, narrow, tokens_RT), logits(config, wide, tokens_RT), atol=1e-4)
  exact = logits(config, hf.load(GOLDEN / name), tokens_RT)
  error = np.abs(logits(config, narrow, tokens_RT) - exact)
  assert 0 < error.mean() < 0.05 * np.std(exact)


def test_int8_scales_stay_float32_in_bfloat16():
  narrow = matrices.quantise(tiny.params()["layers"]["down"], 1, 1)
  kept = matrices.cast({"down": narrow}, jnp.bfloat16)["down"]
  assert kept.scale.dtype == jnp.float32 and kept.values.dtype == jnp.int8
  x = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
  layer = jax.tree.map(lambda part: part[0], narrow)
  exact = x @ np.asarray(matrices.dense(layer, jnp.float32))
  error = np.asarray(matrices.project(jnp.asarray(x, jnp.bfloat16), layer), np.float32) - exact
  assert np.abs((error / np.std(exact)).mean()) < 1e-3 and np.std(error) < 5e-3 * np.std(exact)


# PEFT.


@pytest.fixture(scope="module")
def qwen3():
  return hf.load_config(GOLDEN / "qwen3"), hf.load(GOLDEN / "qwen3")


def test_an_adapter_that_peft_wrote_computes_peft_s_logits(qwen3):
  config, base = qwen3
  loaded = peft.load(GOLDEN / "qwen3_adapter", config, ALL)
  expected = load_file(GOLDEN / "qwen3_adapter" / "logits.safetensors")
  got = logits(config, lora.attach(base, lora.scale(loaded, ALL)), expected["tokens"])
  np.testing.assert_allclose(got, expected["logits"], atol=1e-4)
  assert np.abs(got - logits(config, base, expected["tokens"])).max() > 0.5


def test_an_adapter_folder_there_and_back_is_exact(qwen3, tmp_path):
  config, _ = qwen3
  loaded = peft.load(GOLDEN / "qwen3_adapter", config, ALL)
  peft.save(tmp_path / "out", config, ALL, loaded, "qwen3")
  theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (GOLDEN / "qwen3_adapter", tmp_path / "out"))
  assert theirs.keys() == ours.keys()
  jax.tree.map(np.testing.assert_array_equal, theirs, ours)
  theirs, ours = (
    json.loads((f / "adapter_config.json").read_text()) for f in (GOLDEN / "qwen3_adapter", tmp_path / "out")
  )
  assert sorted(theirs.pop("target_modules")) == ours.pop("target_modules")
  assert ours.items() <= theirs.items()


def test_peft_loads_what_is_written(qwen3, tmp_path):
  """Where torch, transformers and peft are installed."""
  torch, transformers, theirs = map(pytest.importorskip, ("torch", "transformers", "peft"))
  config, base = qwen3
  ours = adapters(ALL, up=0.2, config=config)
  peft.save(tmp_path / "out", config, ALL, ours, str(GOLDEN / "qwen3"))
  network = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3", attn_implementation="eager")
  network = theirs.PeftModel.from_pretrained(network, tmp_path / "out").eval()
  with torch.no_grad():
    expected = network(torch.from_numpy(TOKENS_RT % config.vocab).long()).logits.numpy()
  got = logits(config, lora.attach(base, lora.scale(ours, ALL)), TOKENS_RT % config.vocab)
  np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
  "spoil, settings, sentence",
  [
    ({"r": 8}, {}, "holds adapters of rank 8 and alpha 12, the settings say 4 and 12; allowed: lora.rank"),
    ({}, {"alpha": 4.0}, "rank 4 and alpha 12, the settings say 4 and 4"),
    ({"use_dora": True}, {}, "use_dora is True; allowed: none"),
    ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'; allowed: 'LORA'"),
    ({"bias": "all"}, {}, "bias is 'all'; allowed: 'none'"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa'; allowed: True"),
    ({"use_rslora": True}, {}, "use_rslora is True; allowed: none"),
    ({"layer_replication": [[0, 2]]}, {}, "layer_replication is"),
    ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\]; allowed: none"),
    ({}, {"targets": ("query",)}, "has base_model.*; allowed: adapters of this base, on the matrices of lora.targets"),
  ],
)
def test_adapters_that_are_others_are_refused(qwen3, tmp_path, spoil, settings, sentence):
  config, _ = qwen3
  shutil.copytree(GOLDEN / "qwen3_adapter", tmp_path / "a")
  values = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | spoil
  (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
  with pytest.raises(UserError, match=sentence):
    peft.check(tmp_path / "a", config, dataclasses.replace(ALL, **settings))


def test_an_adapter_of_another_base_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"lora_B.weight has shape .*; allowed: .*, so these adapt another base"):
    peft.check(GOLDEN / "qwen3_adapter", hf.load_config(GOLDEN / "qwen2"), ALL)
  with pytest.raises(UserError, match=r"has no adapter_config\.json; allowed: a PEFT adapter folder"):
    peft.check(tmp_path, hf.load_config(GOLDEN / "qwen3"), ALL)
  shutil.copy(GOLDEN / "qwen3_adapter" / "adapter_config.json", tmp_path)
  (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0")
  with pytest.raises(UserError, match="missing or cut short"):
    peft.check(tmp_path, hf.load_config(GOLDEN / "qwen3"), ALL)


@pytest.mark.parametrize("targets", [("query",), ("gate", "down"), config_lib.MATRICES])
def test_what_a_family_fuses_has_no_adapter_folder(tmp_path, targets):
  config = hf.load_config(GOLDEN / "phi3")
  with pytest.raises(UserError, match=r"phi3 fuses (query|gate).* allowed: a merged export"):
    settings = dataclasses.replace(ALL, targets=targets)
    peft.save(tmp_path / "out", config, settings, adapters(settings, config=config), "phi3")
  assert not (tmp_path / "out").exists()


# The game.


def lora_config(folder, **changes):
  return world.config(
    folder, **({"attacker__lora__rank": 4, "defender__lora__rank": 4, "defender__reference": "initial"} | changes)
  )


def test_players_share_one_base_and_the_state_holds_adapters_only(world_folder):
  run = world.open_session(lora_config(world_folder, attacker__model=str(world_folder / "defender_base")))
  states = [run.init_state()]
  ((mesh, bases),) = run.bases.items()
  assert list(bases) == [run.config.attacker.model] and mesh == run.places.attacker.mesh
  pointer = lambda x: x.unsafe_buffer_pointer()
  kept, decoding = bases[run.config.attacker.model], run._decode_base(run.config.attacker.model, run.places.attacker)
  assert jax.tree.all(jax.tree.map(lambda a, b: pointer(a) == pointer(b), kept, decoding))
  for player, initial in zip(states[0].players, map(run.initial_generator, Players._fields)):
    assert player.params.keys() == {"layers"} and player.initial == {}
    assert all(pair.keys() == {"down", "up"} for pair in player.params["layers"].values())
    assert jax.tree.all(jax.tree.map(lambda a, b: pointer(a) == pointer(b), kept, initial.members[0]))


def test_adapters_learn_and_their_base_does_not(world_folder):
  run = world.open_session(lora_config(world_folder))
  recorder, states = world.play(run, 2)
  before, after = states[0].players.defender, states[2].players.defender
  assert not world.same(before.params, after.params) and not world.same(before.ema, after.ema)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
  assert world.same(run.bases[run.places.defender.mesh][run.config.defender.model], hf.load(run.config.defender.model))
  assert recorder.scalars[0]["defender/grad_norm"] > 0


def test_a_mesh_plays_as_one_device_does(world_folder):
  mesh = {"sharding": "fsdp_tensor", "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  one, many = (
    world.play(world.open_session(lora_config(world_folder, **changes), devices), 1)
    for changes, devices in (({}, 1), (mesh, 8))
  )
  assert (one[0].trees[0].response_text_BAD == many[0].trees[0].response_text_BAD).all()
  for single, split in zip(one[1][1].players, many[1][1].players):
    same_step(single, split)


def same_step(one, other):
  """The same gradient, and the same weights where it is more than float noise.

  Adam's first step is the gradient's sign times the learning rate, and noise has a sign too. Its first moment is the
  gradient times 1 − b1.
  """
  gradient, other_gradient = (optax.tree.get(player.optimizer, "mu") for player in (one, other))
  largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * largest)
  jax.tree.map(compare, gradient, other_gradient)
  moved = jax.tree.map(lambda x: np.abs(x) > 1e-3 * largest, gradient)
  compare = functools.partial(np.testing.assert_allclose, atol=2e-4)
  for a, b in ((one.params, other.params), (one.ema, other.ema)):
    jax.tree.map(lambda here, a, b: compare(a[here], b[here]), moved, a, b)


def test_a_run_of_adapters_resumes_to_the_same_bits(world_folder, tmp_path):
  config = lora_config(world_folder, steps=2, checkpoint__every=1, precision__frozen="int8", precision__offload=True)
  run = world.open_session(config)

  def finish():
    train.train(config, str(tmp_path), devices=jax.devices()[:1])
    return jax.device_get(checkpoint.Checkpoints(tmp_path, config).restore(run.abstract_state)[0])

  whole = finish()
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  assert world.same(finish(), whole) and whole.step == 2
  assert not world.same(whole.players.defender.params, jax.device_get(run.init_state().players.defender.params))


def test_adapters_start_from_a_folder(world_folder, tmp_path):
  config = lora_config(world_folder)
  run = world.open_session(config)
  made = jax.device_get(run.init_state().players.defender.params)
  made = jax.tree.map(lambda x: x + 0.25, made)
  peft.save(tmp_path / "a", run.players.defender.model, config.defender.lora, made, config.defender.model)
  run = world.open_session(world.changed(config, defender__lora__start=str(tmp_path / "a")))
  state = run.init_state()
  assert world.same(state.players.defender.params, made) and world.same(state.players.defender.initial, made)
  initial = run.initial_generator("defender").members[0]["layers"]["query"]
  np.testing.assert_allclose(initial.up, made["layers"]["query"]["up"] * 32 / 4, rtol=1e-6)

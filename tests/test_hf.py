"""Hugging Face folders: transformers' own logits, exact round trips, sharded reading, a sentence for what is wrong."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny

from advgame_jax import architecture, hf, hf_config, sharding, worldfiles
from advgame_jax.architecture import Rope
from advgame_jax.types import UserError

pytestmark = pytest.mark.usefixtures("compile_quickly")

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = ("llama_tied", "llama_scaled")
Q, K = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")


def tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(path / "model.safetensors")


def write_tensors(path: pathlib.Path, values: dict[str, np.ndarray]) -> None:
  safetensors.numpy.save_file(values, path / "model.safetensors", metadata={"format": "pt"})


def assert_same(left, right) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


@pytest.fixture
def folder(tmp_path):
  """A model that a test may break."""
  return shutil.copytree(GOLDEN / "llama_tied", tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000])
def test_import_export_import_is_bit_exact(name, max_shard_bytes, tmp_path):
  config, params = hf.load_config(GOLDEN / name), hf.load(GOLDEN / name)
  hf.save(tmp_path / "out", config, params, None, hf_config.read(GOLDEN / name), max_shard_bytes=max_shard_bytes)
  assert hf.load_config(tmp_path / "out") == config
  assert_same(hf.load(tmp_path / "out"), params)
  stored = {}
  for path in (tmp_path / "out").glob("*.safetensors"):
    assert path.stat().st_size < max_shard_bytes + 4096
    stored |= safetensors.numpy.load_file(path)
  assert_same(stored, tensors(GOLDEN / name))


@pytest.mark.parametrize("max_shard_bytes", [20_000, 1])
def test_an_index_names_every_tensor_and_the_whole_size(max_shard_bytes, tmp_path):
  hf.save(tmp_path / "out", tiny.CONFIG, tiny.params(), max_shard_bytes=max_shard_bytes)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  files = sorted({*index["weight_map"].values()})
  assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
  assert index["metadata"]["total_size"] == 4 * architecture.count_params(tiny.CONFIG)
  for file in files:
    with safetensors.safe_open(tmp_path / "out" / file, framework="numpy") as shard:
      assert set() != set(shard.keys()) == {name for name, where in index["weight_map"].items() if where == file}
      assert shard.metadata() == {"format": "pt"}


@pytest.mark.parametrize("layout", [sharding.TRAIN, sharding.GENERATE_TENSOR, sharding.GENERATE_REPLICATED])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_each_device_reads_its_slice(layout, shape):
  mesh = tiny.mesh(*shape)
  folder = GOLDEN / "llama_tied"
  sharded = hf.load(folder, mesh, layout)
  assert_same(sharded, hf.load(folder))
  placed = lambda spec, x: x.sharding == sharding.named(mesh, layout, spec.axes, spec.shape, "")
  assert jax.tree.all(jax.tree.map(placed, architecture.param_specs(hf.load_config(folder)), sharded))


def test_a_sharded_model_is_written_as_a_local_one(tmp_path):
  mesh = tiny.mesh(2, 2, 2)
  config = hf.load_config(GOLDEN / "llama_tied")
  hf.save(tmp_path / "out", config, hf.load(GOLDEN / "llama_tied", mesh, sharding.TRAIN))
  assert_same(tensors(tmp_path / "out"), tensors(GOLDEN / "llama_tied"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_converted(dtype, folder):
  stored = tensors(folder)
  write_tensors(folder, {name: value.astype(dtype) for name, value in stored.items()})
  loaded = hf.load(folder)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
  rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), hf.load(GOLDEN / "llama_tied"))
  assert_same(loaded, rounded)


def test_the_dtype_asked_for_is_loaded_and_saved(tmp_path):
  params = hf.load(GOLDEN / "llama_tied", dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  base = hf_config.read(GOLDEN / "llama_tied")
  hf.save(tmp_path / "out", hf.load_config(GOLDEN / "llama_tied"), params, base_config=base, dtype="bfloat16")
  assert {x.dtype for x in tensors(tmp_path / "out").values()} == {np.dtype("bfloat16")}
  written = hf_config.read(tmp_path / "out")
  assert (base["dtype"], written["torch_dtype"], "dtype" in written) == ("float32", "bfloat16", False)
  assert_same(hf.load(tmp_path / "out", dtype=jnp.bfloat16), params)


def test_the_tokenizer_and_its_stops_are_written(tmp_path):
  words = worldfiles.load_tokenizer()
  hf.save(tmp_path / "out", tiny.CONFIG, tiny.params(), words, {"eos_token_id": 99, "attention_dropout": 0.0})
  assert (tmp_path / "out" / "tokenizer.json").is_file()
  for name in ("config", "generation_config"):
    values = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert (values["eos_token_id"], values["pad_token_id"]) == (words.stop_ids[0], words.pad_id)
  assert hf_config.read(tmp_path / "out")["attention_dropout"] == 0.0  # what the original said is kept


def test_buffers_and_a_tied_head_stored_twice_are_no_extra_weights(folder):
  stored = tensors(folder)
  buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
  write_tensors(folder, stored | buffer | {"lm_head.weight": stored["model.embed_tokens.weight"]})
  assert_same(hf.load(folder), hf.load(GOLDEN / "llama_tied"))


# Each breaks one thing; the sentence must say which.
def _drop(folder):
  write_tensors(folder, {name: value for name, value in tensors(folder).items() if name != Q})


def _cut(folder):
  os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def _lose_shard(folder):
  hf.save(folder, hf.load_config(folder), hf.load(folder), overwrite=True, max_shard_bytes=20_000)
  next(folder.glob("model-00002-*")).unlink()


def _shard(folder, **shards):
  """The weights in the files `shards` names, all else in the first; the index says the same."""
  stored = tensors(folder)
  (folder / "model.safetensors").unlink()
  named = {name for names in shards.values() for name in names}
  shards = {"a": [name for name in stored if name not in named], **shards}
  for file, names in shards.items():
    safetensors.numpy.save_file({name: stored[name] for name in names}, folder / f"{file}.safetensors")
  _write_index(folder, {name: f"{file}.safetensors" for file, names in shards.items() for name in names})


def _write_index(folder, weight_map):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _mix_up(folder):
  _shard(folder, b=[Q], c=[K])
  (folder / "b.safetensors").rename(folder / "d.safetensors")
  (folder / "c.safetensors").rename(folder / "b.safetensors")
  (folder / "d.safetensors").rename(folder / "c.safetensors")


def _repeat(folder):
  stored = tensors(folder)
  _shard(folder, b=[Q])
  safetensors.numpy.save_file({Q: stored[Q], K: stored[K]}, folder / "b.safetensors")


def _weights_twice(folder):
  weights = (folder / "model.safetensors").read_bytes()
  _shard(folder, b=[Q])
  (folder / "model.safetensors").write_bytes(weights)


def _header(folder, length, dtype=None):
  """Gives the header another length, or Q another dtype of the same size."""
  content = bytearray((folder / "model.safetensors").read_bytes())
  size = int.from_bytes(content[:8], "little")
  if length:
    content[:8] = length.to_bytes(8, "little")
  else:
    header = json.loads(content[8 : 8 + size])
    header[Q]["dtype"], header[Q]["shape"] = dtype
    header = json.dumps(header).encode()
    content = len(header).to_bytes(8, "little") + header + content[8 + size :]
  (folder / "model.safetensors").write_bytes(content)


def _spoil(folder):
  spoilt = tensors(folder)[Q].copy()
  spoilt[3, 5] = np.nan
  write_tensors(folder, tensors(folder) | {Q: spoilt})


def _pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN = {
  r"there is no folder": shutil.rmtree,
  r"has no config.json": lambda folder: (folder / "config.json").unlink(),
  r"config.json is no JSON": lambda folder: (folder / "config.json").write_text("{"),
  r"holds a list; allowed: a JSON object": lambda folder: (folder / "config.json").write_text("[]"),
  r"has no weights; allowed: model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
  r"pytorch_model.bin only.*allowed: safetensors": _pickle,
  r"lacks model-00002-of-.*, which model.safetensors.index.json names": _lose_shard,
  r"no index of shards": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
  r"weight_map does not map tensors to files": lambda folder: _write_index(folder, {Q: 1}),
  r"k_proj.weight should be in c.safetensors, as .*index.json says, and is in b.safetensors": _mix_up,
  r"has model.layers.1.self_attn.k_proj.weight in a.safetensors and in b.safetensors; allowed: shards of": _repeat,
  r"has both model.safetensors and model.safetensors.index.json of other shards": _weights_twice,
  r"model.safetensors is cut short or no safetensors file \(": lambda folder: _header(folder, 10**6),
  r"q_proj.weight is stored as I64; allowed: BF16, F16, F32, F64": lambda folder: _header(folder, 0, ("I64", [64, 16])),
  r"q_proj.weight is stored as F8_E4M3": lambda folder: _header(folder, 0, ("F8_E4M3", [64, 128])),
  r"model.safetensors is cut short": _cut,
  r"lacks the weights model.layers.1.self_attn.q_proj.weight": _drop,
  r"does not describe: model.layers.0.self_attn.q_proj.bias": lambda folder: write_tensors(
    folder, tensors(folder) | {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}
  ),
  r"q_proj.weight has shape \[32, 64\]; allowed: \[64, 32\]": lambda folder: write_tensors(
    folder, tensors(folder) | {Q: np.ascontiguousarray(tensors(folder)[Q].T)}
  ),
  r"q_proj.weight is stored as I8": lambda folder: write_tensors(
    folder, tensors(folder) | {Q: tensors(folder)[Q].astype(np.int8)}
  ),
  r"the weights model.layers.1.self_attn.q_proj.weight hold numbers that are not finite in float32": _spoil,
  r"lm_head.weight differs from model.embed_tokens.weight": lambda folder: write_tensors(
    folder, tensors(folder) | {"lm_head.weight": tensors(folder)["model.embed_tokens.weight"] + 1}
  ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_folder_is_refused(sentence, folder):
  BROKEN[sentence](folder)
  with pytest.raises(UserError, match=sentence):
    hf.load(folder)


@pytest.mark.parametrize("sentence", [sentence for sentence in BROKEN if "not finite" not in sentence])
def test_headers_tell_before_any_weight_is_read(sentence, folder, monkeypatch):
  BROKEN[sentence](folder)
  monkeypatch.setattr(hf, "_read", lambda *_: pytest.fail("a weight was read"))
  with pytest.raises(UserError, match=sentence):
    hf.load(folder)
  with pytest.raises(UserError, match=sentence):
    hf.check(folder)


def _change(folder, drop=(), config=None, **shapes):
  stored = {name: value for name, value in tensors(folder).items() if not name.startswith(tuple(drop) or "\0")}
  write_tensors(folder, stored | {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
  values = hf_config.read(folder) | (config or {})
  (folder / "config.json").write_text(json.dumps(values))


FUSED = "model.layers.0.self_attn.qkv_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
OTHERS = {
  r"layers.0.self_attn.qkv_proj.weight has shape \[31, 32\]; allowed: \[\d+, 32\]": ("phi3", {FUSED: (31, 32)}),
  r"lacks the weights model.layers.1.block_sparse_moe.experts.2.w3.weight; allowed": ("mixtral", {"drop": (EXPERT,)}),
  r"lacks the weights .*k_norm.weight and 1 more and has others, as .*k_proj.bias": (
    "qwen2",
    {"config": {"model_type": "qwen3", "head_dim": 16}},
  ),
  r"has weights that config.json does not describe: model.layers.0.self_attn.k_proj.bias": (
    "qwen2",
    {"config": {"model_type": "llama"}},
  ),
  r"lacks the weights model.layers.0.block_sparse_moe.*has others, as model.layers.0.mlp": (
    "mistral",
    {"config": {"model_type": "mixtral", "num_local_experts": 2}},
  ),
  r"model.embed_tokens.weight has shape .*; allowed: \[7, ": ("mistral", {"config": {"vocab_size": 7}}),
}


@pytest.mark.parametrize("sentence", OTHERS)
def test_the_weights_of_another_architecture_are_refused(sentence, tmp_path):
  name, change = OTHERS[sentence]
  folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
  _change(folder, **change)
  with pytest.raises(UserError, match=sentence):
    hf.check(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
  words = worldfiles.load_tokenizer()
  hf.check(GOLDEN / "llama_tied", dataclasses.replace(words, vocab_size=hf.load_config(GOLDEN / "llama_tied").vocab))
  with pytest.raises(UserError, match=r"the tokenizer has 1000 tokens but the embedding .*; allowed: a tokenizer of"):
    hf.check(GOLDEN / "llama_tied", dataclasses.replace(words, vocab_size=1000))


def test_shards_in_any_order_are_one_model(folder):
  _shard(folder, z=[Q], b=[K])
  assert_same(hf.load(folder), hf.load(GOLDEN / "llama_tied"))


@pytest.mark.parametrize("name", ["llama_tied", "phi3", "mixtral", "qwen2"])
def test_bfloat16_of_a_file_arrives_bit_by_bit(name, tmp_path):
  """Every pattern of 16 bits that is a finite number, signed zeros and subnormal ones among them."""
  folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
  finite = np.array([bits for bits in range(2**16) if bits & 0x7F80 != 0x7F80], np.uint16)
  draw = np.random.default_rng(0)
  bits = {name: draw.choice(finite, value.shape) for name, value in tensors(folder).items()}
  write_tensors(folder, {name: value.view(ml_dtypes.bfloat16) for name, value in bits.items()})
  params = hf.load(folder, dtype=jnp.bfloat16)
  hf.save(tmp_path / "out", hf.load_config(folder), params, None, hf_config.read(folder), dtype="bfloat16")
  assert_same({name: value.view(np.uint16) for name, value in tensors(tmp_path / "out").items()}, bits)


def test_bfloat16_makes_no_detour_through_float32():
  spec = architecture.ParamSpec((4, 16, 32), (None, "width", "feed_forward"), "{layer}", inputs=1)
  whole, stored = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 16, 32), (32, 16)))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  compiled = hf._jitted_put(spec, here, here).lower(whole, stored, np.zeros(1, np.int32)).compile()
  program = compiled.as_text()
  assert "bf16[4,16,32]" in program
  assert not re.search(r"\bf32\[4,16,32\]", program)  # not even number by number: the whole would be walked each time
  assert not re.search(r"\bf32\[", program.partition("\nENTRY")[2])  # what is held between two loops
  assert compiled.memory_analysis().alias_size_in_bytes == 2 * 4 * 16 * 32  # put in its place, not copied there
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 16 * 32


def test_a_mesh_that_does_not_divide_is_refused():
  mesh = tiny.mesh(1, 1, 8)
  with pytest.raises(UserError, match=r"k_proj.*axis 'heads' of size 2 does not divide"):
    hf.load(GOLDEN / "llama_tied", mesh, sharding.TRAIN)


BASE = hf_config.read(GOLDEN / "llama_tied")
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
  "change, sentence",
  [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; allowed: 'llama', 'mistral', "),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True; allowed: False"),
    ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is True"),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2; allowed: 1"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu', 'gelu_pytorch_tanh'"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers; allowed: 2"),
    (
      {"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]},
      "layer_types has 'linear_attention'; allowed: 'full_",
    ),
    ({"pretraining_tp": 2}, "pretraining_tp is 2"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    (
      {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
      "rope type is 'yarn'; allowed: 'default', 'llama3'",
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {**LLAMA_3, "rope_theta": 1e4}}, "lacks original_max_position_embeddings"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type is 'dynamic'"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "lacks short_factor"),
    ({"hidden_size": None}, "hidden_size is None; allowed: a positive integer"),
    ({"num_key_value_heads": 3}, "4 heads of size 16 over 3 key/value heads"),
  ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(change, sentence):
  with pytest.raises(UserError, match=f"here: .*{sentence}"):
    hf_config.from_values(BASE | change, "here")


def test_what_an_older_config_leaves_out():
  old = {
    name: value for name, value in BASE.items() if name not in ("rope_parameters", "head_dim", "num_key_value_heads")
  }
  config = hf_config.from_values(old | {"rope_theta": 7.0}, "here")
  assert (config.kinds[0].rope, config.head_size, config.kv_heads) == (Rope(7.0), 8, 4)
  scaling = LLAMA_3 | {"original_max_position_embeddings": 64}
  config = hf_config.from_values(old | {"rope_theta": 7.0, "rope_scaling": scaling}, "here")
  assert config.kinds[0].rope == Rope(7.0, factor=8.0, original_length=64)


def test_nothing_is_written_over(tmp_path):
  (tmp_path / "out").mkdir()
  hf.save(tmp_path / "out", tiny.CONFIG, tiny.params())  # an empty folder will do
  before = tensors(tmp_path / "out")
  with pytest.raises(UserError, match="is there already; allowed: a new folder"):
    hf.save(tmp_path / "out", tiny.CONFIG, tiny.params(seed=1))
  assert_same(tensors(tmp_path / "out"), before)
  hf.save(tmp_path / "out", tiny.CONFIG, tiny.params(seed=1), overwrite=True)
  assert_same(hf.load(tmp_path / "out"), tiny.params(seed=1))
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "letter.txt").touch()
  with pytest.raises(UserError, match="is no model's"):
    hf.save(tmp_path / "home", tiny.CONFIG, tiny.params(), overwrite=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


@pytest.mark.parametrize("where", ["weights", "rename"])
def test_a_failing_disk_leaves_what_was_there(where, tmp_path, monkeypatch):
  hf.save(tmp_path / "out", tiny.CONFIG, tiny.params())
  rename = pathlib.Path.rename

  def fail(*_, **__):
    raise safetensors.SafetensorError("No space left on device")

  def fail_last(path, target):
    if path.suffix == ".partial":
      raise OSError("No space left on device")
    return rename(path, target)

  if where == "weights":
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  else:
    monkeypatch.setattr(pathlib.Path, "rename", fail_last)
  with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
    hf.save(tmp_path / "out", tiny.CONFIG, tiny.params(seed=1), overwrite=True)
  assert_same(hf.load(tmp_path / "out"), tiny.params())
  assert [path.name for path in tmp_path.iterdir()] == ["out"]

"""GGUF files: written here as llama.cpp's converter writes them, read back to the model they came from."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from test_tokenizer import CHATML
from tokenizers import decoders, models, pre_tokenizers, trainers

from advgame_jax import hf, hf_gguf
from advgame_jax import tokenizer as tokenizer_lib
from advgame_jax.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "golden" / "llama_tied"
VOCAB = 270
PARTS = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def bpe(digits: bool) -> tokenizers.Tokenizer:
  """Its merges hold numbers of several digits, which `digits` keeps from being used."""
  words = tokenizers.Tokenizer(models.BPE())
  words.pre_tokenizer = byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  words.decoder = decoders.ByteLevel()
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB, initial_alphabet=byte_level.alphabet(), special_tokens=special, show_progress=False
  )
  words.train_from_iterator(["1234 locks of 1234 doors, 1234 times"] * 4, trainer)
  if digits:
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
  return words


def llama_cpp_order(matrix: np.ndarray, heads: int) -> np.ndarray:
  """Rows of each head interleaved: i, i + H/2, …, so that pairs to be rotated are neighbours."""
  per_head = matrix.reshape(heads, -1, matrix.shape[1])
  half = per_head.shape[1] // 2
  order = [row for i in range(half) for row in (i, i + half)]
  return per_head[:, order].reshape(matrix.shape)


def tensors_of(vocab: int) -> dict[str, np.ndarray]:
  """The golden model's tensors under GGUF's names, its embedding continued to `vocab`."""
  result = {}
  for name, value in safetensors.numpy.load_file(SOURCE / "model.safetensors").items():
    if name.startswith("model.layers."):
      _, _, layer, *part, _ = name.split(".")
      theirs = PARTS[".".join(part)]
      heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
      result[f"blk.{layer}.{theirs}.weight"] = llama_cpp_order(value, heads) if heads else value
    elif name == "model.embed_tokens.weight":
      result["token_embd.weight"] = np.resize(value, (vocab, value.shape[1]))
    else:
      result["output_norm.weight"] = value
  return result


def write(path, *, digits=True, kind=gguf.GGMLQuantizationType.F32, drop=(), add=None, fields=None):
  words = bpe(digits)
  vocab = sorted(words.get_vocab(), key=words.token_to_id)
  fields = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 16,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10_000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm" if digits else "gpt-2",
    "tokenizer.ggml.tokens": vocab,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(vocab) - 3),
    "tokenizer.ggml.merges": [" ".join(merge) for merge in merges(words)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": CHATML,
    **(fields or {}),
  }
  writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
  for name, value in fields.items():
    if name not in drop:
      add_field(writer, name, value)
  for name, value in (tensors_of(len(vocab)) | (add or {})).items():
    if name not in drop:
      quantised = kind if value.ndim == 2 and value.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
      writer.add_tensor(name, gguf.quantize(value, quantised), raw_dtype=quantised)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return words


def merges(words: tokenizers.Tokenizer) -> list[list[str]]:
  return json.loads(words.to_str())["model"]["merges"]


def add_field(writer: gguf.GGUFWriter, name: str, value) -> None:
  add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
  add[type(value)](name, value)


def test_the_model_comes_back(tmp_path):
  write(tmp_path / "model.gguf")
  hf_gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
  config, expected = hf.load_config(tmp_path / "out"), hf.load_config(SOURCE)
  assert config.vocab == VOCAB
  params, golden = hf.load(tmp_path / "out"), hf.load(SOURCE)
  np.testing.assert_array_equal(params["embed"][: expected.vocab], golden["embed"])
  jax.tree.map(np.testing.assert_array_equal, params["layers"], golden["layers"])
  np.testing.assert_array_equal(params["final_norm"], golden["final_norm"])
  same = ("width", "layers", "heads", "kv_heads", "head_size", "feed_forward", "tied", "norm_epsilon", "kinds")
  assert [getattr(config, name) for name in same] == [getattr(expected, name) for name in same]


def test_an_untied_head_and_quantised_weights_come_back(tmp_path):
  head = np.random.default_rng(0).normal(size=(VOCAB, 32)).astype(np.float32)
  write(tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType.Q8_0, add={"output.weight": head})
  hf_gguf.convert(tmp_path / "model.gguf", tmp_path / "out", "float16")
  params, golden = hf.load(tmp_path / "out"), hf.load(SOURCE)
  assert not hf.load_config(tmp_path / "out").tied
  np.testing.assert_allclose(params["head"], head, atol=0.02)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), params["layers"], golden["layers"])


@pytest.mark.parametrize("digits", [True, False])
def test_the_tokenizer_comes_back(digits, tmp_path):
  words = write(tmp_path / "model.gguf", digits=digits)
  hf_gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
  ours = tokenizer_lib.load(tmp_path / "out")
  text = "the lock 1234  of\n doors isn't é 世界"
  assert ours.encode_completion(text) == [*words.encode(text).ids, 2]
  turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
  assert ours.encode_chat(text) == words.encode(turn).ids
  assert (ours.stop_ids, ours.vocab_size) == ((2,), VOCAB)


def test_an_archive_holds_exactly_one(tmp_path):
  write(tmp_path / "model.gguf")
  for count in (0, 1, 2):
    archive = tmp_path / f"{count}.whl"
    with zipfile.ZipFile(archive, "w") as file:
      file.writestr("package/__init__.py", "")
      for i in range(count):
        file.write(tmp_path / "model.gguf", f"package/{i}.gguf")
    if count == 1:
      hf_gguf.convert(archive, tmp_path / "out")
      assert hf.load_config(tmp_path / "out").layers == 2
    else:
      with pytest.raises(UserError, match=f"holds {count} .gguf files; allowed: exactly one"):
        hf_gguf.convert(archive, tmp_path / "new")


@pytest.mark.parametrize(
  "change, sentence",
  [
    ({"fields": {"general.architecture": "qwen2"}}, "general.architecture is 'qwen2'; allowed: 'llama'"),
    ({"fields": {"llama.rope.scaling.type": "yarn"}}, "scaling.type is 'yarn'; allowed: 'none'"),
    ({"fields": {"llama.rope.dimension_count": 8}}, "dimension_count is 8; allowed: 16"),
    ({"fields": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.model is 'llama'; allowed: 'gpt2'"),
    ({"fields": {"tokenizer.ggml.pre": "qwen2"}}, "pre is 'qwen2'; allowed: 'smollm', 'gpt-2'"),
    ({"drop": ("tokenizer.chat_template",)}, "has no tokenizer.chat_template"),
    ({"drop": ("llama.block_count",)}, "has no llama.block_count"),
    ({"drop": ("blk.1.attn_q.weight",)}, "lacks the tensor blk.1.attn_q.weight"),
    ({"add": {"rope_freqs.weight": np.ones(8, np.float32)}}, "has the tensor rope_freqs.weight"),
    ({"add": {"blk.0.ffn_up.weight": np.ones((32, 48), np.float32)}}, r"ffn_up.weight has shape \[32, 48\]"),
    ({"add": {"output_norm.weight": np.ones(16, np.float32)}}, r"output_norm.weight has shape \[16\]"),
  ],
)
def test_what_cannot_be_converted_is_refused(change, sentence, tmp_path):
  write(tmp_path / "model.gguf", **change)
  with pytest.raises(UserError, match=sentence):
    hf_gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_refused(tmp_path):
  path = tmp_path / "model.gguf"
  with pytest.raises(UserError, match="there is no file"):
    hf_gguf.convert(path, tmp_path / "out")
  write(path)
  whole = path.read_bytes()
  for content in (b"", b"no model at all, but text", whole[:200], whole[:-1000]):
    path.write_bytes(content)
    with pytest.raises(UserError, match="is cut short or no GGUF file"):
      hf_gguf.convert(path, tmp_path / "out")


def test_the_program_says_in_one_sentence_what_is_wrong(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "letter.txt").touch()
  command = [sys.executable, ROOT / "launch" / "convert.py", "--gguf=none.gguf", f"--out={tmp_path / 'out'}"]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
  assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'out'} is there already; allowed: a new folder\n")

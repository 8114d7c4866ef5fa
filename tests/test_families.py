"""Every family against transformers: folders and logits of tests/golden, there and back again.

The folders hold what transformers wrote and computed (tests/golden/make_goldens.py), so that no torch is needed here.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from advgame_jax import architecture, hf, hf_config, layers, model, sharding
from advgame_jax import config as config_lib
from advgame_jax.engine import Engine, Load
from advgame_jax.scoring import Generator
from advgame_jax.sharding import LOCAL
from advgame_jax.types import UserError

pytestmark = pytest.mark.usefixtures("compile_quickly")

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))


@functools.cache
def loaded(name):
  return hf.load_config(GOLDEN / name), hf.load(GOLDEN / name), load_file(GOLDEN / name / "expected.safetensors")


def logits(config, params, tokens_RT, **how):
  hidden_RTM, _ = model.forward(config, params, tokens_RT, **how)
  return model.logits(config, params, hidden_RTM)


def assert_logits(got_RTV, expected):
  real_RT = np.arange(got_RTV.shape[1]) < expected["length"][:, None]
  np.testing.assert_allclose(np.asarray(got_RTV)[real_RT], expected["logits"][real_RT], atol=1e-4)


def test_all_families_are_there():
  assert {hf.load_config(GOLDEN / name).family for name in FAMILIES} == set(hf_config.FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_ragged_rows_are_transformers(name):
  config, params, expected = loaded(name)
  assert_logits(jax.jit(functools.partial(logits, config))(params, expected["tokens"]), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_drawn_with_a_cache_are_transformers(name):
  config, params, expected = loaded(name)
  longest, lengths = expected["tokens"].shape[1], expected["length"]
  sampling = config_lib.Sampling(temperature=0.0, top_p=1.0, prompt_buckets=(longest,), max_new_tokens=8, page=4)
  never, dtype = np.zeros((2, config.vocab), np.int16), np.dtype("float32")
  who = Engine(config, sampling, tiny.mesh(), LOCAL, dtype, "auto", never)
  prompts = [tokens_T[:length].tolist() for tokens_T, length in zip(expected["tokens"], lengths)]
  fold_Q = np.arange(len(prompts), dtype=np.uint32)
  drawn = who.generate(Load(Generator((layers.unstack(config, params),)), prompts, fold_Q, 1, jax.random.key(0)))
  np.testing.assert_array_equal(drawn.tokens_RT, expected["greedy"])


@pytest.mark.parametrize("name", FAMILIES)
def test_export_and_import_again_is_exact(name, tmp_path):
  config, params, _ = loaded(name)
  hf.save(tmp_path / "out", config, params, base_config=hf_config.read(GOLDEN / name), max_shard_bytes=40_000)
  assert hf.load_config(tmp_path / "out") == config
  jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "out"), params)
  theirs, ours = (
    functools.reduce(dict.__or__, map(load_file, sorted(folder.glob("model*.safetensors"))))
    for folder in (GOLDEN / name, tmp_path / "out")
  )
  assert theirs.keys() == ours.keys()
  jax.tree.map(np.testing.assert_array_equal, theirs, ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_exported(name, tmp_path):
  """Where torch is installed."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  config, params, expected = loaded(name)
  hf.save(tmp_path / "out", config, params, base_config=hf_config.read(GOLDEN / name))
  network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  with torch.no_grad():
    found_RTV = network(torch.from_numpy(expected["tokens"]).long()).logits.numpy()
  assert_logits(found_RTV, expected)  # padding on the right is every token's future


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_as_transformers_4_wrote_it_means_the_same(name):
  old = json.loads((GOLDEN / name / "config_v4.json").read_text())
  assert hf_config.from_values(old, "here") == loaded(name)[0]
  assert hf_config.to_values(loaded(name)[0], old).keys() >= old.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mesh_computes_the_same(name):
  """Rows, width and, where the heads allow it, tensor shards."""
  config, _, expected = loaded(name)
  divides = config.kv_heads % 2 == 0
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2) if divides else tiny.mesh(data=4, fsdp=2)
  sharded = hf.load(GOLDEN / name, mesh, sharding.TRAIN)
  rows = sharding.rows_sharding(mesh, sharding.TRAIN)
  tokens_RT = sharding.to_global(sharding.pad_leading(expected["tokens"], 8), rows)
  with jax.set_mesh(mesh):
    got_RTV = jax.jit(functools.partial(logits, config, layout=sharding.TRAIN))(sharded, tokens_RT)
  assert_logits(np.asarray(got_RTV)[: len(expected["length"])], expected)


def test_flops_count_the_experts_that_a_token_goes_through():
  config, _, _ = loaded("mixtral")
  expert = 3 * config.layers * config.width * config.feed_forward
  matrices = architecture.count_params(config) - config.vocab * config.width - 2 * expert
  context = 4.0
  attended = 2 * config.layers * config.heads * config.head_size * context
  assert architecture.forward_flops(config, 10, context) == 20 * (matrices + attended)


def test_a_frozen_matrix_has_half_the_way_back_and_attention_has_all_of_it():
  config, _, _ = loaded("mistral")
  forward = functools.partial(architecture.forward_flops, config, 10)
  backward = functools.partial(architecture.learning_flops, config, 0, 10 / 8, 8, forwards=0)
  assert backward(frozen=False) == 2 * forward(4.0)
  assert backward(frozen=True) == 2 * forward(4.0) - forward(0.0)
  assert forward(100.0) == forward(8.0) > forward(4.0)  # no token sees more than its window


def windows(name, **changes):
  """Of each layer, under a config with changes; None takes a field away."""
  values = json.loads((GOLDEN / name / "config_v4.json").read_text()) | changes
  values = {key: value for key, value in values.items() if value is not None}
  return [kind.window for kind in hf_config.from_values(values, "here").layer_kinds]


SLIDES, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
  "name, changes, expected",
  [
    ("llama_tied", {"sliding_window": 8}, [0, 0]),  # transformers' Llama has no window, whatever is written
    ("olmo2", {"sliding_window": 8}, [0, 0]),
    ("mistral", {"layer_types": [FULL, FULL], "use_sliding_window": False}, [8, 8]),  # fields that Mistral has not
    ("mixtral", {"sliding_window": 8}, [8, 8]),
    ("qwen2_window", {"use_sliding_window": False}, [0] * 4),
    ("qwen2_window", {"layer_types": [SLIDES, FULL, FULL, SLIDES]}, [8, 0, 0, 8]),
    ("qwen2_window", {"layer_types": [SLIDES] * 4, "use_sliding_window": False}, [0] * 4),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, [8, 8]),
    ("gemma2", {"layer_types": None}, [8, 0, 8, 0]),
    ("smollm3", {"layer_types": None, "use_sliding_window": True, "sliding_window": 8}, [0, 8, 0, 0]),
  ],
)
def test_windows_come_from_the_fields_that_transformers_reads(name, changes, expected):
  assert windows(name, **changes) == expected


@pytest.mark.parametrize(
  "rope, sentence",
  [
    ({"short_factor": [1.0]}, r"short_factor is \[1.0\]; allowed: 4 numbers"),
    ({"factor": 3.0}, "rope has factor 3.0; allowed: 4"),
  ],
)
def test_a_longrope_that_would_be_computed_otherwise_is_refused(rope, sentence):
  values = json.loads((GOLDEN / "phi3_partial" / "config_v4.json").read_text())
  values["rope_scaling"] = values["rope_scaling"] | rope
  with pytest.raises(UserError, match=sentence):
    hf_config.from_values(values, "here")


def test_an_activation_survives_an_export():
  config = dataclasses.replace(hf.load_config(GOLDEN / "llama_tied"), activation="gelu_tanh")
  assert hf_config.from_values(hf_config.to_values(config), "here") == config

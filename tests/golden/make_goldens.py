"""Writes one folder per kind of model: tiny random weights as transformers saves them, and what it computes from them.

Needs torch and transformers; the tests that read the files need neither. Made with

    | python | torch  | transformers | safetensors | command                                |
    | 3.11.7 | 2.13.0 | 5.23.0       | 0.8.0       | python tests/golden/make_goldens.py    |
    | 3.11.7 | 2.13.0 | 4.53.3       | 0.8.0       | python tests/golden/make_goldens.py -c |

of which the second writes nothing: it checks that transformers 4 computes the same from config_v4.json. A folder:

    config.json           as transformers 5 writes it
    config_v4.json        the same model in the fields that the family's checkpoints were published with
    model.safetensors     float32; experts one by one, as the published mixtures have them
    expected.safetensors  tokens  [3, 24] int32      ragged rows, right-padded with 0
                          length  [3] int32          tokens in each row
                          logits  [3, 24, V] float32 each row computed alone and unpadded; 0 at and after its length
                          greedy  [3, 8] int32       what repeated argmax of full forward passes adds after each row
"""

import dataclasses
import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
LENGTHS = (24, 17, 5)
NEW_TOKENS = 8
MARGIN = 1e-3  # no choice of a token or an expert may hang on rounding
CHANGED_IN_V5 = {"dtype", "layer_types", "rope_parameters", "use_bidirectional_attention", "_sliding_window_pattern"}


@dataclasses.dataclass(frozen=True)
class Golden:
  """One folder's model: its settings in transformers 5, and how its family's published configs say them.

  Attributes:
    family: `model_type` of the config.
    settings: arguments of the config class, beside `SHARED`.
    published: fields of config_v4.json that config.json has not, or has otherwise; None is written as null.
    unpublished: fields that the family's published configs leave to the class's default.
    seed: of the weights and the rows; one with which the greedy rows seldom repeat a token.
  """

  family: str
  settings: dict
  published: dict
  unpublished: tuple[str, ...] = ()
  seed: int = 0


SHARED = {
  "vocab_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA = {"hidden_size": 32, "intermediate_size": 48}
NARROW = {
  "hidden_size": 24,
  "intermediate_size": 40,
  "head_dim": 8,
  "rms_norm_eps": 1e-5,
}  # head_dim is not width/heads
WIDE = {"hidden_size": 32, "intermediate_size": 40, "rms_norm_eps": 1e-6}  # for the families without a head_dim


def default_rope(theta: float) -> dict:
  return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# Of the eight frequencies, scaling leaves some, blends some and divides some.
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
LONG_ROPE = {
  "short_factor": [1.0, 1.25, 1.5, 2.0],
  "long_factor": [1.5, 4.0, 8.0, 16.0],
}
GEMMA = {
  "hidden_size": 24,
  "intermediate_size": 32,
  "head_dim": 8,
  "rms_norm_eps": 1e-6,
  "query_pre_attn_scalar": 12,
  "sliding_window": 8,
  "bos_token_id": 2,
  "eos_token_id": 1,
  "pad_token_id": 0,
}
QWEN3_MOE = {
  "hidden_size": 16,
  "intermediate_size": 40,  # read by no layer: all are sparse
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 16,
  "rms_norm_eps": 1e-6,
  "num_experts": 8,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 24,
  **default_rope(1e6),
}
QWEN3_MOE_PUBLISHED = {
  "num_experts": 8,  # transformers 5 writes num_local_experts, which 4 does not read
  "rope_theta": 1e6,
  "rope_scaling": None,
  "sliding_window": None,
  "max_window_layers": 2,
}

GOLDENS = {
  "llama_tied": Golden(
    "llama",
    LLAMA | {"head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    {"rope_theta": 10000.0, "rope_scaling": None},
  ),
  "llama_scaled": Golden(
    "llama",
    LLAMA
    | {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5000.0}},
    {"rope_theta": 5000.0, "rope_scaling": LLAMA3_ROPE},
  ),
  "llama_bias": Golden(
    "llama",
    NARROW | {"attention_bias": True, "mlp_bias": True},
    {"rope_theta": 10000.0, "rope_scaling": None},
    seed=3,
  ),
  "mistral": Golden(
    "mistral",
    NARROW | {"sliding_window": 8} | default_rope(10000.0),
    {"rope_theta": 10000.0},
  ),
  "qwen2": Golden(
    "qwen2",
    WIDE | {"tie_word_embeddings": True, "max_window_layers": 2} | default_rope(1e6),
    {"rope_theta": 1e6, "sliding_window": 8},  # a window that use_sliding_window switches off
  ),
  "qwen2_window": Golden(
    "qwen2",
    {"hidden_size": 24, "intermediate_size": 28, "rms_norm_eps": 1e-6, "num_attention_heads": 3}
    | {"num_key_value_heads": 1, "num_hidden_layers": 4, "max_window_layers": 2}
    | {"use_sliding_window": True, "sliding_window": 8, "tie_word_embeddings": False}
    | default_rope(1e6),
    {"rope_theta": 1e6},
  ),
  "qwen3": Golden(
    "qwen3",
    NARROW | {"tie_word_embeddings": False, "max_window_layers": 2} | default_rope(1e6),
    {"rope_theta": 1e6, "rope_scaling": None, "sliding_window": None},
  ),
  "gemma2": Golden(
    "gemma2",
    GEMMA | {"num_hidden_layers": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0},
    {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    ("tie_word_embeddings",),
    seed=7,
  ),
  "gemma3_text": Golden(
    "gemma3_text",
    GEMMA
    | {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    | {
      "num_hidden_layers": 7,
      "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
    }
    | {
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
      }
    },
    {
      "sliding_window_pattern": 3,
      "rope_theta": 1e5,
      "rope_local_base_freq": 1000.0,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "cache_implementation": "hybrid",
    },
    ("tie_word_embeddings",),
    seed=7,
  ),
  "phi3": Golden(
    "phi3",
    WIDE | {"sliding_window": 8, "pad_token_id": 0, "original_max_position_embeddings": 128} | default_rope(10000.0),
    {"rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False},
    ("partial_rotary_factor",),
  ),
  "phi3_partial": Golden(
    "phi3",
    WIDE
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "max_position_embeddings": 256}
    | {"original_max_position_embeddings": 64, "tie_word_embeddings": True}
    | {"sliding_window": 256}
    | {
      "rope_parameters": LONG_ROPE
      | {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
      | {"original_max_position_embeddings": 64}
    },
    {
      "rope_theta": 10000.0,
      "rope_scaling": LONG_ROPE | {"type": "longrope"},
      "partial_rotary_factor": 0.5,
      "attention_bias": False,
      "mlp_bias": False,
      "lm_head_bias": False,
    },
  ),
  "olmo2": Golden(
    "olmo2",
    WIDE | {"pad_token_id": 0} | default_rope(500000.0),
    {"rope_theta": 500000.0, "rope_scaling": None},
  ),
  "smollm3": Golden(
    "smollm3",
    {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1], "rms_norm_eps": 1e-6, "pad_token_id": 0}
    | default_rope(5e6),
    {
      "rope_theta": 5e6,
      "rope_scaling": None,
      "layer_types": ["full_attention"] * 4,
      "max_window_layers": 28,
      "sliding_window": None,
    },
    ("tie_word_embeddings",),
    seed=1,
  ),
  "qwen3_moe": Golden("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}, QWEN3_MOE_PUBLISHED, ("num_local_experts",)),
  "qwen3_moe_raw": Golden(
    "qwen3_moe", QWEN3_MOE | {"norm_topk_prob": False}, QWEN3_MOE_PUBLISHED, ("num_local_experts",)
  ),
  "mixtral": Golden(
    "mixtral",
    {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"rms_norm_eps": 1e-5, "num_local_experts": 4, "num_experts_per_tok": 2}
    | default_rope(1e6),
    {"rope_theta": 1e6, "sliding_window": None},
  ),
}


def random_network(golden: Golden) -> transformers.PreTrainedModel:
  """The golden's model with weights large enough for attention to be far from uniform."""
  torch.manual_seed(golden.seed)
  config = transformers.AutoConfig.for_model(golden.family, **SHARED | golden.settings)
  network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  gemma = golden.family.startswith("gemma")  # stores a norm's scale less 1; its large embedding would repeat each token
  with torch.no_grad():
    for name, parameter in network.named_parameters():
      is_norm = parameter.ndim == 1 and not name.endswith("bias")
      spread = 0.12 if gemma and "embed" in name else 0.3 if parameter.ndim > 1 or gemma else 0.2
      parameter.copy_(torch.randn_like(parameter) * spread + (is_norm and not gemma))
  return network


def logits_TV(network: transformers.PreTrainedModel, row_T: torch.Tensor) -> torch.Tensor:
  """Logits of one unpadded row, after refusing a row in which the choice of an expert is too close to call."""
  routed = {"output_router_logits": True} if hasattr(network.config, "num_experts_per_tok") else {}
  with torch.no_grad():
    out = network(row_T[None], use_cache=False, **routed)
  for router in out.router_logits if routed else ():
    best = router.topk(network.config.num_experts_per_tok + 1, dim=-1).values
    assert (best[:, -2] - best[:, -1]).min() > MARGIN, "an expert is chosen by a hair: change the seed"
  return out.logits[0]


def continued(network: transformers.PreTrainedModel, row_T: torch.Tensor) -> torch.Tensor:
  """The `NEW_TOKENS` tokens that greedy decoding by full forward passes adds to the row."""
  for _ in range(NEW_TOKENS):
    best = logits_TV(network, row_T)[-1].topk(2)
    assert best.values[0] - best.values[1] > MARGIN, "a token is chosen by a hair: change the seed"
    row_T = torch.cat([row_T, best.indices[:1]])
  return row_T[-NEW_TOKENS:]


def expected(network: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
  rows = [torch.randint(1, SHARED["vocab_size"], (length,)) for length in LENGTHS]
  pad = torch.nn.utils.rnn.pad_sequence
  return {
    "tokens": pad(rows, batch_first=True).int(),
    "length": torch.tensor(LENGTHS, dtype=torch.int32),
    "logits": pad([logits_TV(network, row) for row in rows], batch_first=True),
    "greedy": torch.stack([continued(network, row) for row in rows]).int(),
  }


def published_config(golden: Golden, stored: dict) -> dict:
  """The fields of config_v4.json, given those of config.json."""
  dropped = CHANGED_IN_V5.union(golden.unpublished)
  kept = {name: value for name, value in stored.items() if name not in dropped and value is not None}
  kept |= {"torch_dtype": "float32", "transformers_version": "4.53.3"} | golden.published
  return dict(sorted(kept.items()))


def write(name: str, golden: Golden) -> None:
  folder = HERE / name
  network = random_network(golden)
  network.save_pretrained(folder)
  safetensors.torch.save_file(expected(network), folder / "expected.safetensors")
  stored = json.loads((folder / "config.json").read_text())
  (folder / "config_v4.json").write_text(json.dumps(published_config(golden, stored), indent=2) + "\n")
  tensors = safetensors.torch.load_file(folder / "model.safetensors")
  assert all(tensor.ndim < 3 for tensor in tensors.values()), f"{name}: experts were not saved one by one"


def check(name: str, config_file: str) -> None:
  """Fails unless this transformers loads the folder under that config to the expected logits."""
  config = transformers.AutoConfig.from_pretrained(HERE / name / config_file)
  load = transformers.AutoModelForCausalLM.from_pretrained
  network = load(HERE / name, config=config, attn_implementation="eager").eval()
  stored = safetensors.torch.load_file(HERE / name / "expected.safetensors")
  for tokens_T, length, stored_TV in zip(stored["tokens"], stored["length"], stored["logits"], strict=True):
    found = logits_TV(network, tokens_T[:length].long())
    torch.testing.assert_close(found, stored_TV[:length], atol=2e-5, rtol=0)


if __name__ == "__main__":
  torch.set_num_threads(1)  # a second run writes the same bytes
  for name, golden in GOLDENS.items():
    if sys.argv[1:] == ["-c"]:
      check(name, "config_v4.json")
      continue
    write(name, golden)
    check(name, "config.json")
    check(name, "config_v4.json")

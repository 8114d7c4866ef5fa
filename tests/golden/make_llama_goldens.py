"""Writes llama_tied/ and llama_scaled/: tiny random Llamas as transformers saves them, and the logits it computes.

Needs torch and transformers; the tests that read the files do not. Made with torch 2.13.0 and transformers 5.23.0:

    python tests/golden/make_llama_goldens.py
"""

import pathlib

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHARED = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
TIED = {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
# Of the eight frequencies, scaling leaves some, blends some and divides some.
SCALED = {
  "num_key_value_heads": 1,
  "head_dim": 16,
  "tie_word_embeddings": False,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  },
}


def write(name: str, settings: dict) -> None:
  torch.manual_seed(0)
  network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED, **settings)).eval()
  with torch.no_grad():
    for parameter in network.parameters():  # large enough for attention to be far from uniform
      parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.2) + (parameter.ndim == 1))
    tokens = torch.randint(SHARED["vocab_size"], (2, 48))
    logits = network(tokens).logits
  network.save_pretrained(HERE / name)
  save_file({"tokens": tokens.int(), "logits": logits}, HERE / name / "expected.safetensors")


if __name__ == "__main__":
  write("llama_tied", TIED)
  write("llama_scaled", SCALED)

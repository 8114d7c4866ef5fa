"""Writes qwen3_adapter/: an adapter of qwen3/ as PEFT saves it, and the logits that peft computes with it.

Needs torch, transformers and peft; the tests that read the files do not. Made with torch 2.13.0, transformers 5.23.0
and peft 0.21.2:

    python tests/golden/make_adapter_golden.py
"""

import pathlib

import peft
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

if __name__ == "__main__":
  torch.manual_seed(0)
  base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "qwen3", attn_implementation="eager")
  settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM")
  network = peft.get_peft_model(base, settings).eval()
  with torch.no_grad():
    for name, parameter in network.named_parameters():
      if "lora_" in name:
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    tokens = safetensors.torch.load_file(HERE / "qwen3" / "expected.safetensors")["tokens"]
    logits = network(tokens.long()).logits
  network.peft_config["default"].base_model_name_or_path = "qwen3"
  network.save_pretrained(HERE / "qwen3_adapter")
  (HERE / "qwen3_adapter" / "README.md").unlink(missing_ok=True)
  safetensors.torch.save_file({"tokens": tokens, "logits": logits}, HERE / "qwen3_adapter" / "logits.safetensors")

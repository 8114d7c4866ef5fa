"""transformers' `generate` on a GPU: PYTHON benchmarks/peers/decode.py WORK.json

Reads what benchmarks/decode.py writes and prints one JSON line: of each job, least seconds of reading with one token,
and of all tokens. Random weights in bfloat16. Needs nothing of this project.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> int:
  if len(sys.argv) != 2:
    print("usage: decode.py WORK.json", file=sys.stderr)
    return 2
  work = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
  config = AutoConfig.for_model(**work["config"])
  with torch.device("cuda"):
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

  def seconds(job: dict, new: int) -> float:
    tokens = torch.tensor(job["prompts"], device="cuda")
    how = {"temperature": 1.0, "top_p": job["top_p"], "top_k": 0, "do_sample": True, "pad_token_id": 0}
    how |= {"min_new_tokens": new, "max_new_tokens": new}
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
      drawn = network.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
    torch.cuda.synchronize()
    if drawn.shape[1] != job["prompt"] + new:
      raise SystemExit(f"{drawn.shape[1] - job['prompt']} tokens drawn, {new} asked for")
    return time.perf_counter() - start

  least = lambda job, new: min([seconds(job, new) for _ in range(work["rounds"] + 1)][1:])
  taken = [(least(job, 1), least(job, job["new"])) for job in work["jobs"]]
  print(json.dumps({"version": importlib.metadata.version("transformers"), "seconds": taken}), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())

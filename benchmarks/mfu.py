"""How much of a card training uses, and what bfloat16 costs: python benchmarks/mfu.py --shape=qwen2.5-0.5b [--json]

Forward and backward of chunked scoring, every token of full rows, in bfloat16 on random weights of a real model's
shape: with LoRA on a frozen bfloat16 base, and with all weights (float32 masters and gradients). FLOPs are the model's
own, counted low: without what is recomputed, without the future that causal rows do not see, without adapters, without
gradients of what is frozen. `mfu` is of the vendor's dense bfloat16 peak where the device is a known one, else of the
product of two matrices in the same run. Rows that do not fit are halved. Then errors of bfloat16 logits against
float32's of the same bfloat16 weights. A card by itself:

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python benchmarks/mfu.py --shape=qwen2.5-7b-layers

`--tiny` tries everything on a CPU in two minutes.
"""

import dataclasses
import functools
import itertools
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from advgame_jax import architecture, chips, lora, matrices, model, scoring
from advgame_jax.architecture import LayerKind, ModelConfig, Rope
from advgame_jax.config import Lora
from advgame_jax.types import Params, UserError

QWEN: dict[str, Any] = {"kinds": (LayerKind(Rope(1e6)),), "norm_epsilon": 1e-6, "biases": ("query", "key", "value")}
SHAPES = {
  "qwen2.5-0.5b": ModelConfig(151936, 896, 24, 14, 2, 64, 4864, tied=True, **QWEN),
  "qwen2.5-7b-layers": ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, tied=False, **QWEN),
}
FULL_LAYERS = {"qwen2.5-7b-layers": 12}  # of 28, whose float32 masters and gradients alone would be 61 GB
TINY: dict[str, Any] = {"vocab": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 128}
ADAPTERS = Lora(rank=64, alpha=128.0)  # as configs/qwen2_5_7b.py

SHAPE = flags.DEFINE_enum("shape", "qwen2.5-0.5b", list(SHAPES), "Whose shape the weights have.")
LAYERS = flags.DEFINE_integer(
  "layers", 0, "Of the model; 0: all, and of a 7B with all weights learning as many as fit."
)
MODES = flags.DEFINE_list("modes", ["lora", "full"], "What learns.")
LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096"], "Tokens of a row.")
ATTENTIONS = flags.DEFINE_list("attentions", ["xla", "cudnn"], "Implementations, as precision.attention.")
REMATS = flags.DEFINE_multi_enum("remats", ["layer", "none"], ["none", "products", "layer"], "As precision.remat.")
CHUNKS = flags.DEFINE_list("chunks", ["1024"], "Tokens whose logits exist at one time.")
TOKENS = flags.DEFINE_integer("tokens", 8192, "Of one call, as long as they fit.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Calls measured; the median counts.", lower_bound=1)
PARITY = flags.DEFINE_bool("parity", True, "Also compare logits.")
SMALL = flags.DEFINE_bool("tiny", False, "A small model and short rows instead.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object a row instead of tables.")


class Case(NamedTuple):
  """One line of the table."""

  learns: str
  length: int
  attention: str
  remat: str
  chunk: int


def step(config: ModelConfig, case: Case, learnt: Params, base: Params, tokens_RT: jax.Array) -> Any:
  """Mean negative log-likelihood, the norm of its gradient, and the gradient."""

  def loss(learnt: Params) -> jax.Array:
    params = lora.attach(base, lora.scale(learnt, ADAPTERS)) if base else learnt
    mask_RT = tokens_RT >= 0  # all, which the compiler does not know
    options: dict[str, Any] = {"chunk": case.chunk, "remat": case.remat, "kernel": case.attention}
    logprob_RT = scoring.score(config, params, tokens_RT, mask_RT, dtype=jnp.bfloat16, **options)
    return -jnp.mean(logprob_RT[:, 1:])

  value, gradient = jax.value_and_grad(loss)(learnt)
  return value, optax.tree.norm(gradient), gradient


def flops(config: ModelConfig, case: Case, rows: int) -> float:
  """Of forward and backward."""
  return architecture.learning_flops(config, 0, rows, case.length, forwards=1, frozen=case.learns == "lora")


def measure(config: ModelConfig, case: Case, rows: int, learnt: Params, base: Params) -> dict[str, Any]:
  """Compiles and times one case: a line of the table."""
  tokens_RT = jax.random.randint(jax.random.key(rows), (rows, case.length), 0, config.vocab)
  start = time.perf_counter()
  run = jax.jit(functools.partial(step, config, case)).lower(learnt, base, tokens_RT).compile()
  compiling, plan = time.perf_counter() - start, run.memory_analysis()
  seconds = []
  for _ in range(REPEATS.value + 1):  # the first is for warmth
    start = time.perf_counter()
    loss, norm, _ = jax.block_until_ready(run(learnt, base, tokens_RT))
    seconds.append(time.perf_counter() - start)
  median = float(np.median(seconds[1:]))
  rate = flops(config, case, rows) / median / 1e12
  held = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes if plan else 0
  speed = {"ms": 1e3 * median, "tokens/s": tokens_RT.size / median, "TFLOP/s": rate, "mfu": rate / peak()}
  values = {"GiB": held / 2**30, "compile s": compiling, "loss": float(loss), "gradient": float(norm)}
  return {"layers": config.layers, "rows": rows, **speed, **values}


def measure_what_fits(config: ModelConfig, case: Case, learnt: Params, base: Params) -> dict[str, Any]:
  """The line with as many rows as fit, or one that says why there is none."""
  rows = max(1, TOKENS.value // case.length)
  while rows:
    try:
      return measure(config, case, rows, learnt, base)
    except (UserError, jax.errors.JaxRuntimeError) as error:
      if not any(sign in str(error).lower() for sign in ("resource_exhausted", "out of memory")):
        return {"note": str(error).splitlines()[0]}
    rows //= 2
  return {"note": "one row does not fit"}


@functools.cache
def product() -> float:
  """TFLOP/s of the product of two bfloat16 matrices."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  multiply, best = jax.jit(jnp.matmul), float("inf")
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(multiply(matrix, matrix))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best / 1e12


def peak() -> float:
  """TFLOP/s that `mfu` is a part of."""
  kind = jax.devices()[0].device_kind
  chip = chips.find(kind)
  return chip.flops / 1e12 if chip else product()


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def logits(config: ModelConfig, params: Params, tokens_RT: jax.Array, dtype: str, kernel: str) -> jax.Array:
  hidden_RTM, _ = model.forward(config, params, tokens_RT, dtype=dtype, kernel=kernel)
  return model.logits(config, params, hidden_RTM)


@jax.jit
def compare(exact: jax.Array, rounded: jax.Array) -> dict[str, jax.Array]:
  error, same = jnp.abs(rounded - exact), exact.argmax(-1) == rounded.argmax(-1)
  errors = {"max error": jnp.max(error), "mean error": jnp.mean(error)}
  return {"deviation": jnp.std(exact), **errors, "same greedy": jnp.mean(same)}


@dataclasses.dataclass
class Table:
  """Lines, with names above them where they are not those above."""

  columns: tuple[str, ...] = ()

  def show(self, row: dict[str, Any]) -> None:
    """One line; the last cell may be a note."""
    if JSON.value:
      print(json.dumps({"shape": SHAPE.value, "device": jax.devices()[0].device_kind, **row}), flush=True)
      return
    if "note" not in row and tuple(row) != self.columns:
      self.columns = tuple(row)
      print("".join(f"{name:>12}" for name in row))
    print("".join(f"  {x}" if name == "note" else f"{cell(x):>12}" for name, x in row.items()), flush=True)


def cell(x: Any) -> str:
  return str(x) if not isinstance(x, float) else f"{x:,.0f}" if abs(x) >= 1e3 else f"{x:.4g}"


def parity(table: Table, config: ModelConfig, params: Params, length: int) -> None:
  """Shows the errors of one row's logits, an implementation at a time; `deviation` is that of the exact ones."""
  tokens_RT = jax.random.randint(jax.random.key(length), (1, length), 0, config.vocab)
  with jax.default_matmul_precision("highest"):  # else a GPU multiplies float32 in fewer bits
    exact = logits(config, params, tokens_RT, "float32", "xla")
  for kernel in ATTENTIONS.value:
    row: dict[str, Any] = {"logits": "bf16", "length": length, "attention": kernel}
    try:
      errors = compare(exact, logits(config, params, tokens_RT, "bfloat16", kernel))
      table.show(row | {name: float(error) for name, error in errors.items()})
    except (UserError, jax.errors.JaxRuntimeError) as error:
      table.show(row | {"note": str(error).splitlines()[0]})


def weights(config: ModelConfig, learns: str) -> tuple[Params, Params]:
  """What learns, and the frozen base under it ({}: none)."""
  key = jax.random.key(0)
  if learns == "full":
    return jax.jit(functools.partial(architecture.init, config))(key), {}
  base = jax.jit(lambda key: matrices.cast(architecture.init(config, key), jnp.bfloat16))(key)
  return jax.jit(functools.partial(lora.init, lora.adapter_specs(config, ADAPTERS)))(key), base


def main(_: list[str]) -> None:
  lengths = [64, 128] if SMALL.value else list(map(int, LENGTHS.value))
  if not JSON.value:
    print(f"{'tiny ' * SMALL.value}{SHAPE.value}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
  table = Table()
  table.show({"peak": float(peak()), "product": product()})
  for learns in MODES.value:
    layers = LAYERS.value or (FULL_LAYERS.get(SHAPE.value, 0) if learns == "full" else 0)
    changes = ({"layers": layers} if layers else {}) | (TINY if SMALL.value else {})
    config = dataclasses.replace(SHAPES[SHAPE.value], **changes)
    learnt, base = weights(config, learns)
    options = itertools.product(lengths, ATTENTIONS.value, REMATS.value, map(int, CHUNKS.value))
    for case in itertools.starmap(functools.partial(Case, learns), options):
      table.show(case._asdict() | measure_what_fits(config, case, learnt, base))
    if base and PARITY.value:
      for length in lengths:
        parity(table, config, base, length)
    del learnt, base  # before the next are made


if __name__ == "__main__":
  app.run(main)

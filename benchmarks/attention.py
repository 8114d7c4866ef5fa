"""Causal attention against its usual forms: python benchmarks/attention.py --rows=4 --tokens=128,512,2048

Forward, and forward + backward to all three inputs, of the einsum form, `jax.nn.dot_product_attention` and ours; least
of several calls, the forms taking turns. FLOPs are those a causal form needs: half of tokens², and 3.5 × forward with
the backward pass (a form that keeps the weights needs 3 ×). The ceiling is a product of two 2,048² matrices in the
same run.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from advgame_jax import attention

ROWS = flags.DEFINE_integer("rows", 4, "R.")
TOKENS = flags.DEFINE_list("tokens", ["32", "128", "512", "1024", "2048"], "Lengths T.")
HEADS = flags.DEFINE_integer("heads", 9, "Query heads N.")
KV_HEADS = flags.DEFINE_integer("kv_heads", 3, "Key heads K.")
HEAD_SIZE = flags.DEFINE_integer("head_size", 64, "H.")
WINDOW = flags.DEFINE_integer("window", 0, "Of ours; FLOPs are counted without it.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the inputs.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Calls timed.")
NAIVE_UP_TO = flags.DEFINE_integer("naive_up_to", 2048, "Longest rows for the forms that hold tokens².")


COLUMNS = {"fwd ms": 9, "GFLOP/s": 9, "f+b ms": 10, " GFLOP/s": 9, "ratio": 7, "compile s": 11, "ceiling": 9}


def einsum(query_RTNH: jax.Array, key_RTKH: jax.Array, value_RTKH: jax.Array) -> jax.Array:
  """Attention as usually written, grouped queries unrepeated."""
  R, T, N, H = query_RTNH.shape
  query_RTKnH = query_RTNH.reshape(R, T, key_RTKH.shape[2], -1, H)
  logits = jnp.einsum("RTKnH,RSKH->RKnTS", query_RTKnH, key_RTKH, preferred_element_type=jnp.float32) * H**-0.5
  logits = jnp.where(jnp.tril(jnp.ones((T, T), bool)), logits, jnp.finfo(jnp.float32).min)
  weight = jax.nn.softmax(logits, -1).astype(value_RTKH.dtype)
  return jnp.einsum("RKnTS,RSKH->RTKnH", weight, value_RTKH).reshape(R, T, N, H)


def forms(T: int) -> dict[str, Callable[..., jax.Array]]:
  """Name → form, for rows of T tokens."""
  rule = attention.Rule(HEAD_SIZE.value**-0.5, window=WINDOW.value)
  found: dict[str, Callable[..., jax.Array]] = {"ours": functools.partial(attention.causal, rule=rule)}
  if NAIVE_UP_TO.value >= T:
    found |= {"einsum": einsum, "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=True)}
  return found


def both_ways(form: Callable[..., jax.Array]) -> Callable[..., Any]:
  """The output's weighted sum and its gradients."""
  return jax.value_and_grad(lambda query, key, value, weight: jnp.sum(form(query, key, value) * weight), (0, 1, 2))


def seconds(calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
  """The least time of each call; they take turns, so that a busy moment of the machine is nobody's."""
  best = dict.fromkeys(calls, float("inf"))
  for _ in range(REPEATS.value + 1):  # the first is for warmth
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      best[name] = min(best[name], time.perf_counter() - start)
  return best


def compiled(function: Callable[..., Any], *inputs: jax.Array) -> tuple[Callable[[], Any], float]:
  """The call on these inputs, and the seconds it took to compile."""
  start = time.perf_counter()
  run = jax.jit(function).lower(*inputs).compile()
  return functools.partial(run, *inputs), time.perf_counter() - start


def table(T: int) -> list[str]:
  """One line a form."""
  R, N, H = ROWS.value, HEADS.value, HEAD_SIZE.value
  shapes = [(R, T, heads, H) for heads in (N, KV_HEADS.value, KV_HEADS.value, N)]
  inputs = [jax.random.normal(jax.random.key(i), shape, DTYPE.value) for i, shape in enumerate(shapes)]
  forward = {name: compiled(form, *inputs[:3]) for name, form in forms(T).items()}
  both = {name: compiled(both_ways(form), *inputs) for name, form in forms(T).items()}
  size = 2048
  matrix = jax.random.normal(jax.random.key(9), (size, size), DTYPE.value)
  calls = {(name, 0): call for name, (call, _) in forward.items()} | {
    (name, 1): call for name, (call, _) in both.items()
  }
  best = seconds(calls | {"product": compiled(jnp.matmul, matrix, matrix)[0]})
  gigaflops = 2 * R * N * H * T * (T + 1) / 1e9
  lines = []
  for name in forward:
    one, two, compiling = best[name, 0], best[name, 1], forward[name][1] + both[name][1]
    rates = f"{1e3 * one:9.2f}{gigaflops / one:9.1f}{1e3 * two:10.2f}{3.5 * gigaflops / two:9.1f}{two / one:7.2f}"
    lines.append(f"{T:6}  {name:8}{rates}{compiling:11.1f}{2 * size**3 / best['product'] / 1e9:9.0f}")
  return lines


def main(_: list[str]) -> None:
  logging.getLogger().setLevel(logging.WARNING)
  device = jax.devices()[0].device_kind
  print(f"{ROWS.value} rows, {HEADS.value}/{KV_HEADS.value} heads of {HEAD_SIZE.value}, {DTYPE.value}, {device}")
  columns = (f"{name:>{width}}" for name, width in COLUMNS.items())
  print(f"tokens  {'form':8}{''.join(columns)}")
  for T in map(int, TOKENS.value):
    print("\n".join(table(T)), flush=True)


if __name__ == "__main__":
  app.run(main)

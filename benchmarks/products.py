"""Products of few rows by a matrix, as it is kept to learn and as it is kept to generate: python benchmarks/products.py

Float32. A step of drawing is made of these: each row is one token. Every product reads another matrix, from memory.
"""

import os
import sys

import beside
import jax
import jax.numpy as jnp
from absl import app, flags

from advgame_jax.matrices import Transposed, project

ROWS = flags.DEFINE_list("rows", "8,32,128", "Rows of a product.")
SHAPES = flags.DEFINE_list("shapes", "576x1536,1536x576,2048x2048,4096x4096", "Inputs × outputs of a matrix.")
ROUNDS, NUMBERS = 9, 80_000_000  # of all matrices together: more than caches hold


@jax.jit
def products(x_RM: jax.Array, matrices: list[jax.Array | Transposed]) -> list[jax.Array]:
  return [project(x_RM, matrix) for matrix in matrices]


def main(_: list[str]) -> None:
  print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}; a product's least seconds")
  print(
    "| inputs × outputs | rows | inputs first, µs | outputs first, µs | ratio | GFLOP/s |\n|---|---|---|---|---|---|"
  )
  for shape in SHAPES.value:
    inputs, outputs = map(int, shape.split("x"))
    keys = jax.random.split(jax.random.key(0), max(2, NUMBERS // (inputs * outputs)))
    plain = [jax.random.normal(key, (inputs, outputs)) for key in keys]
    transposed = [Transposed(jnp.array(matrix.T)) for matrix in plain]
    for rows in map(int, ROWS.value):
      x_RM = jax.random.normal(jax.random.key(1), (rows, inputs))
      least = [beside.least_seconds(products, x_RM, each, rounds=ROUNDS) / len(keys) for each in (plain, transposed)]
      speed = 2 * rows * inputs * outputs / least[1] / 1e9
      micros = " | ".join(f"{seconds * 1e6:.0f}" for seconds in least)
      print(f"| {inputs} × {outputs} | {rows} | {micros} | {least[0] / least[1]:.2f} × | {speed:.0f} |", flush=True)


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
  app.run(main)

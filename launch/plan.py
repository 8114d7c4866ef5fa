r"""Plans a run for a machine that need not be there: whether it fits, how long it takes, what that costs.

    python launch/plan.py --config=configs/qwen2_5_7b.py:dpo --target=h100:8 [--price=2.5] [--fit]

Exit code 1: it does not fit. How numbers are made, and plans of the paper's runs: docs/plan.md.
"""

import sys

import jax
from absl import flags

from advgame_jax import command, fit, plan, plan_page, targets

CONFIG = command.define_config("configs/microworld.py")
TARGET = flags.DEFINE_string("target", "local", f"{targets.ALLOWED}.")
TOKENS = flags.DEFINE_float("completion_tokens", 0, "Mean of what players draw; 0: half of their limit.", lower_bound=0)
PRICE = flags.DEFINE_float("price", 0, "Of a device's hour, in any currency.", lower_bound=0)
FIT = flags.DEFINE_bool("fit", False, "Search shardings, rematerialisation and accumulation for the fastest that fits.")


def main() -> None:
  config = CONFIG()
  jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for devices elsewhere cannot be read back
  target = targets.parse(TARGET.value)
  if TARGET.value != "local":  # before JAX starts: what a target's compiler refuses is looked into on CPU devices
    there = min(target.count, targets.MOST_CPUS)
    jax.config.update("jax_num_cpu_devices", max(there, jax.config.jax_num_cpu_devices))
  found = fit.search(config, target, TOKENS.value) if FIT.value else plan.make(config, target, TOKENS.value)
  plan_page.show(found, PRICE.value)
  sys.exit(0 if found.fits else 1)


if __name__ == "__main__":
  command.run(main)

"""Pairwise against pointwise judging under noise: python benchmarks/noise.py [--seeds=0,1,2,3,4] [--shared=3] [--own=1]

The microworld's exact judge is given errors: one that all texts of a call share, which comparing cancels, and one of
each text. Both protocols play the same worlds from the same base players; the table has the means over seeds with the
least and the greatest, and the mean paired difference with its 95 % interval by Student's t. A run that is there is not
run again. Pairwise judging asks more: both orders of every two texts, where pointwise asks once of each.
"""

import subprocess
import sys

import numpy as np
import runs
from absl import app, flags

SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of world, base players and run.")
SHARED = flags.DEFINE_float("shared", 3.0, "Standard deviation of the error all texts of a call share, in points.")
OWN = flags.DEFINE_float("own", 1.0, "Standard deviation of the error of each text, in points.")
LOSS = flags.DEFINE_string("loss", "dpo", "Card of configs/microworld.py.")
FOLDER = flags.DEFINE_string("folder", "runs/results", "Where the runs go; shared with benchmarks/microworld.py.")

PROTOCOLS = ("pairwise", "pointwise")
ROWS = {
  "worst_case": "worst case over all attacks, played topics",
  "attack_success": "trained Attacker's success on the trained Defender",
  "over_refusal": "over-refusal, played topics",
  "gibberish": "gibberish, played topics",
}
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by runs


def last_evaluation(protocol: str, seed: str) -> dict[str, float]:
  """Of one run, made if it is not there."""
  world = f"{FOLDER.value}/world_{seed}"
  workdir = f"{FOLDER.value}/noise_{LOSS.value}_{SHARED.value:g}_{OWN.value:g}_{protocol}_{seed}"
  if not runs.finished(workdir):
    subprocess.run(["make", "--silent", "world", f"SEED={seed}", f"WORLD={world}"], check=True)
    command = [sys.executable, "launch/run.py", f"--config=configs/microworld.py:{LOSS.value},{world}"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}", f"--config.judges.protocol={protocol}"]
    command += [
      f"--config.judges.training.shared_noise={SHARED.value}",
      f"--config.judges.training.sample_noise={OWN.value}",
    ]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
  return runs.evaluations(workdir)[-1]


def main(_: list[str]) -> None:
  last = {protocol: [last_evaluation(protocol, seed) for seed in SEEDS.value] for protocol in PROTOCOLS}
  print(f"\n{LOSS.value.upper()}, seeds {', '.join(SEEDS.value)}; noise {SHARED.value:g} shared, {OWN.value:g} own\n")
  print("| % | pairwise | pointwise | pointwise − pairwise, 95 % interval |\n|---|---|---|---|")
  for name, what in ROWS.items():
    pairwise, pointwise = (100 * np.array([values[name] for values in last[protocol]]) for protocol in PROTOCOLS)
    more = pointwise - pairwise
    half = STUDENT_95.get(len(more), np.nan) * more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else np.nan
    spread = lambda x: f"{x.mean():.1f} ({x.min():.1f}–{x.max():.1f})"
    print(f"| {what} | {spread(pairwise)} | {spread(pointwise)} | {more.mean():.1f} ± {half:.1f} |")


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
  app.run(main)

"""A trained Attacker against a Defender it never met, over HTTP: python benchmarks/redteam.py [--run=runs/microworld]

After `make quickstart`, the run's Attacker and the base it came from are served, and so is the base Defender of another
world (`make world WORLD=runs/world_1 SEED=1`: other examples, other random weights); each Attacker is set on it by
launch/redteam.py, with the same seeds and judge. Prints a table of what got through.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags

RUN = flags.DEFINE_string("run", "runs/microworld", "Folder of the run.")
WORLD = flags.DEFINE_string("world", "runs/world", "What it was trained in.")
OTHER = flags.DEFINE_string("other", "runs/world_1", "Another world, whose base Defender is attacked.")
OUT = flags.DEFINE_string("out", "runs/redteam", "Folder of the campaigns.")
LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def served(model: str, player: str) -> tuple[subprocess.Popen, str, str]:
  """A server of a player, the name of its model, and its address."""
  words = [sys.executable, str(LAUNCH / "serve.py"), f"--model={model}", f"--player={player}", "--port=0"]
  process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
  said = process.stdout.readline() if process.stdout else ""
  if not said.startswith("serving "):
    raise SystemExit(f"{' '.join(words)} did not start")
  name, url = said.removeprefix("serving ").rsplit(" at ", 1)
  return process, name, url.strip()


def campaign(name: str, attacker: tuple[str, str], target: tuple[str, str]) -> dict:
  words = [
    f"--out={OUT.value}/{name}",
    f"--attacker-model={attacker[0]}",
    f"--attacker-url={attacker[1]}",
    "--attacker-thinks",
    "--attacker-temperature=1",
    "--attacker-top-p=1",
    f"--target-model={target[0]}",
    f"--target-url={target[1]}",
    "--temperature=1",
    "--top-p=1",
    "--max-tokens=24",
    f"--seeds={WORLD.value}/train.jsonl",
    "--n-attacks=8",
    "--judge=microworld",
    "--instructions=microworld",
    "--batch=256",
    "--offline",
  ]
  subprocess.run([sys.executable, str(LAUNCH / "redteam.py"), *words], check=True, stdout=subprocess.DEVNULL)
  return json.loads((pathlib.Path(OUT.value) / name / "summary.json").read_text())


def main(_: Sequence[str]) -> None:
  attackers = {"base": f"{WORLD.value}/attacker_base", "trained": RUN.value}
  servers = {name: served(model, "attacker") for name, model in attackers.items()}
  servers["target"] = served(f"{OTHER.value}/defender_base", "defender")
  try:
    found = {name: campaign(name, servers[name][1:], servers["target"][1:]) for name in attackers}
  finally:
    for process, *_ in servers.values():
      process.terminate()
  print("| % (95 % interval) | base Attacker | trained Attacker |\n|---|---|---|")
  for rate, other in zip(found["base"]["rates"], found["trained"]["rates"], strict=True):
    cells = (f"{100 * r['value']:.1f} ({100 * r['low']:.1f}–{100 * r['high']:.1f})" for r in (rate, other))
    print(f"| {rate['category']}: {rate['name']} | {' | '.join(cells)} |")
  for name in found["base"]["errors"]:
    cells = (f"{100 * each['errors'][name]:.1f}" for each in found.values())
    print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
  sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
  app.run(main)

r"""Sets an Attacker on any target, and says what got through.

    python launch/redteam.py --out=campaigns/one --attacker=runs/smollm2 --seeds=harmful.jsonl --seeds=benign.jsonl \
      --target-url=http://127.0.0.1:8000/v1 --target-model=NAME --judge=heuristic --n-attacks=4

The same command again finishes what is missing and repeats nothing. Flags may be written with dashes or underscores;
--help lists them, `advgame_jax/redteam.py` and `casting.py` are where they are. Attacker and target are each a Hugging
Face folder, the --workdir of a run, a model of an OpenAI-compatible server, or, the target, any service by a template
(the settings file of garak's REST generator). Exit code 1: --fail-above was passed; 2: something to mend, in one
sentence.
"""

import sys

from advgame_jax import command, findings, redteam

ABOVE = 1  # exit code

SETTINGS = command.define_settings(redteam.Redteam)


def main() -> None:
  settings = SETTINGS()
  summary = redteam.redteam(settings)
  print(findings.console(summary))
  print(f"The report: {settings.out}/report.html")
  if settings.fail_above is not None:
    reached = findings.headline(summary)
    if reached is None or reached > settings.fail_above:
      print("nothing could be counted" if reached is None else f"{reached:.3f} is above {settings.fail_above:g}")
      sys.exit(ABOVE)


if __name__ == "__main__":
  command.run(main)

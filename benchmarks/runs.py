"""What a run's folder has come to."""

import json
import pathlib


def evaluations(workdir: str) -> list[dict[str, float]]:
  """Of a run, as far as it has come; of a folder that is not there none."""
  path = pathlib.Path(workdir, "evaluations.jsonl")
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(workdir: str) -> bool:
  """Whether its last step has been evaluated."""
  steps = [evaluation["step"] for evaluation in evaluations(workdir)]
  return bool(steps) and steps[-1] == json.loads(pathlib.Path(workdir, "config.json").read_text())["steps"]

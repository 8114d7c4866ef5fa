r"""Measures a model on safety benchmarks, as a Defender, as an Attacker, or both.

    python launch/evaluate.py --out=evaluations/one --model=models/smollm2_135m --benchmark=harmful.jsonl \
      --benchmark=xstest=xstest_prompts.csv --judge=heuristic --judge=phrases

--model is a Hugging Face folder or the --workdir of a run (then --player says whose weights); or --model-url and
--model-name, of an OpenAI-compatible server. --benchmark is a published file, recognised by its columns; where none has
benign prompts, the project's own stand beside. As an Attacker, the model rewrites what the benchmarks ask for, and
attacks itself as a Defender, or --opponent. The same command again finishes what is missing. --help lists all flags.

Utility: write the player out and measure it by lm-evaluation-harness, whose results join the report:

    python launch/export.py --workdir=runs/one --player=defender --out=models/safer
    lm_eval --model hf --model_args pretrained=models/safer --tasks arc_easy,hellaswag --output_path utility
    python launch/evaluate.py … --utility=utility
"""

from advgame_jax import assess, command, findings

SETTINGS = command.define_settings(assess.Assess)


def main() -> None:
  settings = SETTINGS()
  for role, summary in assess.assess(settings):
    print(f"As {'an Attacker' if role == 'attacker' else 'a Defender'}:\n{findings.console(summary)}")
    print(f"The report: {settings.out}{f'/{role}' if settings.role == 'both' else ''}/report.html")


if __name__ == "__main__":
  command.run(main)

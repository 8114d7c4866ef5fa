r"""Measures a model on safety benchmarks, as a Defender, as an Attacker, or both.

    python launch/evaluate.py --out=evaluations/one --model=models/smollm2_135m --benchmark=harmful.jsonl \
      --benchmark=xstest=xstest_prompts.csv --judge=heuristic --judge=phrases

--model is a Hugging Face folder or the --workdir of a run (then --player says whose weights); or --model-url and
--model-name, of an OpenAI-compatible server. --benchmark is a published file, recognised by its columns; where none has
benign prompts, the project's own stand beside. As an Attacker, the model rewrites what the benchmarks ask for, and
attacks itself as a Defender, or --opponent. The same command again finishes what is missing.

Utility: write the player out and measure it by lm-evaluation-harness, whose results join the report:

    python launch/export.py --workdir=runs/one --player=defender --out=models/safer
    lm_eval --model hf --model_args pretrained=models/safer --tasks arc_easy,hellaswag --output_path utility
    python launch/evaluate.py … --utility=utility
"""

import dataclasses

from absl import flags

from advgame_jax import command, findings, redteam
from advgame_jax.campaign import Plan
from advgame_jax.findings import Beside, Campaign
from advgame_jax.redteam import Limits, Opened, Voice

OUT = flags.DEFINE_string("out", None, "Folder to write; of both roles, a folder each in it.", required=True)
BENCHMARK = flags.DEFINE_multi_string("benchmark", None, "File, or name=file; may be given again.")
MODEL = flags.DEFINE_string("model", "", "Hugging Face folder, or a run.")
PLAYER = flags.DEFINE_enum("player", "", ("", "attacker", "defender"), "Of a run; without, that of the role.")
MODEL_URL = flags.DEFINE_string("model_url", "", "Base URL of an OpenAI-compatible server.")
MODEL_NAME = flags.DEFINE_string("model_name", "", "By the server's name.")
API_KEY_ENV = flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "Environment variable of the server's key.")
ROLE = flags.DEFINE_enum("role", "defender", ("defender", "attacker", "both"), "What is measured.")
OPPONENT = flags.DEFINE_string("opponent", "", "Whom an Attacker attacks: a folder or a run; without, the model.")
N_ATTACKS = flags.DEFINE_integer("n_attacks", 1, "Attacks a seed, of an Attacker.", lower_bound=1)
THINKS = flags.DEFINE_bool("thinks", None, "It reasons before its answer; without, as in its run.")
INSTRUCTIONS = flags.DEFINE_string("instructions", "", "What an Attacker is told: standard, microworld or a folder.")
SYSTEM = flags.DEFINE_string("system", "", "What a model on a server is told first.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "Of its answers; without, a run's or server's own, else 0.")
TOP_P = flags.DEFINE_float("top_p", None, "Likewise.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Of an answer; without, a server's or run's own, else 512.")
LONGEST_PROMPT = flags.DEFINE_integer("longest_prompt", 2048, "Tokens; longer ones are errors.", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 0, "Prompts of each file and category, spread evenly; 0 is all.", lower_bound=0)
JUDGE = flags.DEFINE_multi_string("judge", [], "heuristic, phrases, microworld or settings: kind=model,model=…,form=…")
FAITHFULNESS = flags.DEFINE_string("faithfulness", "", "Who tells whether an attack still asks what its seed asks.")
RPM = flags.DEFINE_integer("rpm", 0, "Requests a minute; 0 is no limit.", lower_bound=0)
MAX_CONCURRENCY = flags.DEFINE_integer("max_concurrency", 16, "Requests under way at one time.", lower_bound=1)
TIMEOUT = flags.DEFINE_float("timeout", 120.0, "Seconds for a whole answer.", lower_bound=0.001)
RETRIES = flags.DEFINE_integer("retries", 4, "Of a request that failed.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 32, "Prompts at one time.", lower_bound=1)
RESUME = flags.DEFINE_bool("resume", True, "Finish what is missing in --out; without, refuse an evaluation there.")
RETRY_ERRORS = flags.DEFINE_bool("retry_errors", False, "Make attempts again that ended in an error.")
OFFLINE = flags.DEFINE_bool("offline", False, "Refuse every connection but to the hosts that flags name.")
UTILITY = flags.DEFINE_string("utility", "", "Results of lm-evaluation-harness: its --output_path, or a file in it.")
BESIDE = flags.DEFINE_multi_string("beside", [], "Folder of another evaluation to show beside, as the base's.")
SEED = flags.DEFINE_integer("seed", 0, "Of every draw.", lower_bound=0)

# What may be otherwise when an evaluation goes on.
_FREE = ("out", "role", "rpm", "max_concurrency", "timeout", "retries", "batch", "resume", "retry_errors", "offline",
         "utility", "beside", "api_key_env")  # fmt: skip


def main() -> None:
  judging = redteam.judging_of(JUDGE.value or ["heuristic"], FAITHFULNESS.value)
  limits = Limits(MAX_CONCURRENCY.value, RPM.value, TIMEOUT.value, RETRIES.value)
  model = Voice(
    folder=MODEL.value,
    player=PLAYER.value or "defender",
    url=MODEL_URL.value,
    model=MODEL_NAME.value,
    key_variable=API_KEY_ENV.value,
    system=SYSTEM.value,
    think=THINKS.value,
    temperature=TEMPERATURE.value,
    top_p=TOP_P.value,
    max_tokens=MAX_TOKENS.value,
    longest_prompt=LONGEST_PROMPT.value,
    batch=BATCH.value,
  )
  roles = ("defender", "attacker") if ROLE.value == "both" else (ROLE.value,)
  opponent = dataclasses.replace(model, folder=OPPONENT.value, url="", model="") if OPPONENT.value else model
  target = redteam.open_voice("model", opponent if roles == ("attacker",) else model, limits)
  attacker = None
  if "attacker" in roles:
    writes = dataclasses.replace(model, player=PLAYER.value or "attacker", temperature=None, top_p=None)
    attacker = redteam.open_voice("model", writes, limits, whole=True)
  if OFFLINE.value:
    redteam.stay_offline(target, attacker, judging=judging)
  for role in roles:
    out = f"{OUT.value}/{role}" if len(roles) > 1 else OUT.value
    attacked = target if role == "defender" or not OPPONENT.value else redteam.open_voice("opponent", opponent, limits)
    _evaluate(out, attacked, attacker if role == "attacker" else None, judging)


def _evaluate(out: str, target: Opened, attacker: Opened | None, judging: redteam.Judging) -> None:
  goals, hashes = redteam.read_goals(
    BENCHMARK.value or [f"seeds={redteam.SEEDS}"], attacked=attacker is not None, limit=LIMIT.value
  )
  instructions = redteam.instructions_of(INSTRUCTIONS.value, attacker)
  if instructions:
    hashes["instructions"] = instructions.version
  campaign = Campaign(
    "evaluation",
    target.name,
    attacker.name if attacker else "",
    judging.names,
    command.settings_of(__name__, _FREE),
    hashes,
  )
  plan = Plan(attacks=N_ATTACKS.value, batch=BATCH.value, seed=SEED.value)
  summary = redteam.run(
    out,
    campaign,
    goals,
    plan,
    target,
    judging,
    attacker,
    instructions=instructions,
    resume=RESUME.value,
    retry_errors=RETRY_ERRORS.value,
    beside=Beside(
      findings.read_utility(UTILITY.value) if UTILITY.value else (), list(map(findings.read_beside, BESIDE.value))
    ),
  )
  print(f"as {'an Attacker' if attacker else 'a Defender'}:\n{findings.console(summary)}")
  print(f"The report: {out}/report.html")


if __name__ == "__main__":
  command.run(main)

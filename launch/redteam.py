r"""Sets an Attacker on any target, and says what got through.

    python launch/redteam.py --out=campaigns/one --attacker=runs/smollm2 --seeds=harmful.jsonl --seeds=benign.jsonl \
      --target-url=http://127.0.0.1:8000/v1 --target-model=NAME --judge=heuristic --n-attacks=4

The same command again finishes what is missing and repeats nothing. Flags may be written with dashes or underscores.
Attacker and target are each a Hugging Face folder, the --workdir of a run (its Attacker, its Defender), a model of an
OpenAI-compatible server, or, the target, any service by a template (the settings file of garak's REST generator).
--judge is given once or several times: the first decides, the others stand beside it. Exit code 1: --fail-above was
passed; 2: something to mend, in one sentence.
"""

import sys

from absl import flags

from advgame_jax import command, findings, redteam
from advgame_jax.campaign import Plan
from advgame_jax.findings import Beside, Campaign
from advgame_jax.redteam import Limits, Voice

ABOVE = 1  # exit code

OUT = flags.DEFINE_string("out", None, "Folder of the campaign.", required=True)
SEEDS = flags.DEFINE_multi_string("seeds", None, "File of seeds, or of a benchmark; may be given again.")
TARGET = flags.DEFINE_string("target", "", "The target: a Hugging Face folder, or a run, whose Defender it is.")
TARGET_URL = flags.DEFINE_string("target_url", "", "The target: base URL of an OpenAI-compatible server.")
TARGET_MODEL = flags.DEFINE_string("target_model", "", "By the server's name.")
REST_TEMPLATE = flags.DEFINE_string("rest_template", "", "The target: JSON file of garak's REST generator settings.")
API_KEY_ENV = flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "Environment variable of the target's key.")
SYSTEM = flags.DEFINE_string("system", "", "What a target on a server is told first.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "Of the target; without, a server's or run's own, else 0.")
TOP_P = flags.DEFINE_float("top_p", None, "Likewise, else 1.")
MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "Of the target's answers; without, a server's or run's own, else 512."
)
ATTACKER = flags.DEFINE_string("attacker", "", "The Attacker: a Hugging Face folder, or a run, whose Attacker it is.")
ATTACKER_URL = flags.DEFINE_string("attacker_url", "", "The Attacker: base URL of an OpenAI-compatible server.")
ATTACKER_MODEL = flags.DEFINE_string("attacker_model", "", "By the server's name.")
ATTACKER_KEY_ENV = flags.DEFINE_string("attacker_key_env", "OPENAI_API_KEY", "Environment variable of its key.")
ATTACKER_TEMPERATURE = flags.DEFINE_float("attacker_temperature", None, "Without, a server's or run's own, else 0.6.")
ATTACKER_TOP_P = flags.DEFINE_float("attacker_top_p", None, "Likewise, else 0.9.")
ATTACKER_THINKS = flags.DEFINE_bool("attacker_thinks", None, "It reasons before its query; without, as in its run.")
INSTRUCTIONS = flags.DEFINE_string("instructions", "", "What it is told: standard, microworld or a folder.")
N_ATTACKS = flags.DEFINE_integer("n_attacks", 4, "Attacks a seed.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 1, "In each next one the Attacker is shown its failed tries.", lower_bound=1)
UNTIL_SUCCESS = flags.DEFINE_bool("until_success", False, "A seed's attacks one by one, none after one that succeeds.")
LIMIT = flags.DEFINE_integer("limit", 0, "Seeds of each file and category, spread evenly; 0 is all.", lower_bound=0)
JUDGE = flags.DEFINE_multi_string("judge", [], "heuristic, phrases, microworld or settings: kind=model,model=…,form=…")
JUDGE_URL = flags.DEFINE_string("judge_url", "", "A judge: base URL of an OpenAI-compatible server.")
JUDGE_MODEL = flags.DEFINE_string("judge_model", "", "By the server's name.")
JUDGE_KEY_ENV = flags.DEFINE_string("judge_key_env", "OPENAI_API_KEY", "Environment variable of its key.")
FAITHFULNESS = flags.DEFINE_string("faithfulness", "", "Who tells whether an attack still asks what its seed asks.")
RPM = flags.DEFINE_integer("rpm", 0, "Requests to the target a minute; 0 is no limit.", lower_bound=0)
MAX_CONCURRENCY = flags.DEFINE_integer("max_concurrency", 16, "Requests under way at one time.", lower_bound=1)
TIMEOUT = flags.DEFINE_float("timeout", 120.0, "Seconds for a whole answer.", lower_bound=0.001)
RETRIES = flags.DEFINE_integer("retries", 4, "Of a request that failed.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 64, "Attempts at one time.", lower_bound=1)
RESUME = flags.DEFINE_bool("resume", True, "Finish what is missing in --out; without, refuse a campaign that is there.")
RETRY_ERRORS = flags.DEFINE_bool("retry_errors", False, "Make attempts again that ended in an error.")
FAIL_ABOVE = flags.DEFINE_float("fail_above", None, "Exit with 1 if more of the harmful seeds were answered: 0.05.")
OFFLINE = flags.DEFINE_bool("offline", False, "Refuse every connection but to the hosts that flags name.")
READ_PRICE = flags.DEFINE_float("read_price", 0.0, "US dollars for a million tokens that the target reads.")
WRITTEN_PRICE = flags.DEFINE_float("written_price", 0.0, "US dollars for a million tokens that it writes.")
BESIDE = flags.DEFINE_multi_string("beside", [], "Folder of another campaign to show beside, as the base Attacker's.")
SEED = flags.DEFINE_integer("seed", 0, "Of every draw.", lower_bound=0)

# What may be otherwise when a campaign goes on.
_FREE = ("out", "rpm", "max_concurrency", "timeout", "retries", "batch", "resume", "retry_errors", "fail_above",
         "offline", "beside", "read_price", "written_price", "api_key_env", "attacker_key_env",
         "judge_key_env")  # fmt: skip


def main() -> None:
  target = Voice(
    folder=TARGET.value,
    url=TARGET_URL.value,
    model=TARGET_MODEL.value,
    template=REST_TEMPLATE.value,
    key_variable=API_KEY_ENV.value,
    system=SYSTEM.value,
    temperature=TEMPERATURE.value,
    top_p=TOP_P.value,
    max_tokens=MAX_TOKENS.value,
  )
  attacker = Voice(
    folder=ATTACKER.value,
    player="attacker",
    url=ATTACKER_URL.value,
    model=ATTACKER_MODEL.value,
    key_variable=ATTACKER_KEY_ENV.value,
    think=ATTACKER_THINKS.value,
    temperature=ATTACKER_TEMPERATURE.value,
    top_p=ATTACKER_TOP_P.value,
  )
  limits = Limits(MAX_CONCURRENCY.value, RPM.value, TIMEOUT.value, RETRIES.value)
  said = list(JUDGE.value)
  if JUDGE_URL.value:
    said.append(f"kind=server,server.url={JUDGE_URL.value},model={JUDGE_MODEL.value},"
                f"server.key_variable={JUDGE_KEY_ENV.value}")  # fmt: skip
  judging = redteam.judging_of(said or ["heuristic"], FAITHFULNESS.value)
  goals, hashes = redteam.read_goals(SEEDS.value or [f"seeds={redteam.SEEDS}"], attacked=True, limit=LIMIT.value)
  attacking = redteam.open_voice("attacker", attacker, limits, whole=True)
  answering = redteam.open_voice("target", target, limits)
  if OFFLINE.value:
    redteam.stay_offline(answering, attacking, judging=judging)
  instructions = redteam.instructions_of(INSTRUCTIONS.value, attacking)
  hashes["instructions"] = instructions.version
  campaign = Campaign(
    "redteam",
    answering.name,
    attacking.name,
    judging.names,
    command.settings_of(__name__, _FREE),
    hashes,
    READ_PRICE.value,
    WRITTEN_PRICE.value,
  )
  plan = Plan(N_ATTACKS.value, ROUNDS.value, UNTIL_SUCCESS.value, BATCH.value, seed=SEED.value)
  summary = redteam.run(
    OUT.value,
    campaign,
    goals,
    plan,
    answering,
    judging,
    attacking,
    instructions=instructions,
    resume=RESUME.value,
    retry_errors=RETRY_ERRORS.value,
    beside=Beside(campaigns=list(map(findings.read_beside, BESIDE.value))),
  )
  print(findings.console(summary))
  print(f"The report: {OUT.value}/report.html")
  reached = findings.headline(summary)
  if FAIL_ABOVE.value is not None and (reached is None or reached > FAIL_ABOVE.value):
    print(f"{'nothing could be counted' if reached is None else f'{reached:.3f} is above {FAIL_ABOVE.value:g}'}")
    sys.exit(ABOVE)


if __name__ == "__main__":
  command.run(main)

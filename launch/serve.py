"""Serves a player by the protocol of OpenAI's chat completions.

    python launch/serve.py --model=models/smollm2_135m
    python launch/serve.py --model=runs/smollm2 --attacker_mode --port=8001

--model is a Hugging Face folder, or the --workdir of a run (then --player says whose weights). `serving NAME at URL` is
printed once it is warm. Sampling settings that a request does not give are the run's. The token that requests must
bring is read from the environment variable --token_env; no other machine is served without one. SIGTERM ends it, with
exit code 0, when what is under way has had --grace seconds.
"""

from absl import flags

from advgame_jax import command, export, serve, standalone
from advgame_jax.types import Players

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder, or a run.", required=True)
_PLAYER = flags.DEFINE_enum(
  "player",
  "",
  ("", *Players._fields),
  "of a run; of a folder, it says where answers stop",
)
_ATTACKER = flags.DEFINE_bool("attacker_mode", False, "answer a seed with the Attacker's query")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at")
_PORT = flags.DEFINE_integer("port", 8000, "0 is any that is free", lower_bound=0, upper_bound=65535)
_TOKEN_ENV = flags.DEFINE_string("token_env", "ADVGAME_TOKEN", "environment variable of the token")
_NAME = flags.DEFINE_string("name", "", "of the model, to clients; without, that of its folder")
_WEIGHTS = flags.DEFINE_enum("weights", "", ("", *export.WEIGHTS), "of a run; empty: those that play")
_STEP = flags.DEFINE_integer("step", None, "of a run's checkpoint; without, the newest")
_THINKS = flags.DEFINE_bool("thinks", None, "it reasons before its answer; without, as in its run")
_INSTRUCTIONS = flags.DEFINE_string("instructions", "", "what an Attacker is told: standard, microworld or a folder")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "a request may ask for; without, the run's", lower_bound=1)
_LONGEST_PROMPT = flags.DEFINE_integer("longest_prompt", None, "tokens; without, the run's", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 16, "answers drawn at once", lower_bound=1)
_QUEUE = flags.DEFINE_integer("queue", 64, "answers that may wait", lower_bound=0)
_TRIES = flags.DEFINE_integer("tries", 3, "of a rewrite that cannot be parsed", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout", 300.0, "seconds for a whole request", lower_bound=0.1)
_READ_TIMEOUT = flags.DEFINE_float("read_timeout", 10.0, "seconds for a request to arrive", lower_bound=0.1)
_BODY_BYTES = flags.DEFINE_integer("body_bytes", 2**18, "of a request", lower_bound=1)
_GRACE = flags.DEFINE_float("grace", 5.0, "seconds to finish in", lower_bound=0.1)


def main() -> None:
  token = serve.read_token(_TOKEN_ENV.value)
  listener = serve.bind(_HOST.value, _PORT.value, token, _TOKEN_ENV.value)
  settings = serve.Settings(
    attacker=_ATTACKER.value, tries=_TRIES.value, slots=_SLOTS.value, queue=_QUEUE.value, timeout=_TIMEOUT.value,
    read_timeout=_READ_TIMEOUT.value, body_bytes=_BODY_BYTES.value, grace=_GRACE.value,
  )  # fmt: skip
  player = standalone.open_player(
    _MODEL.value, _PLAYER.value or ("attacker" if _ATTACKER.value else "defender"), weights=_WEIGHTS.value,
    step=_STEP.value, think=_THINKS.value, instructions=_INSTRUCTIONS.value,
  )  # fmt: skip
  player = serve.sized(player, _NAME.value, _SLOTS.value, _MAX_TOKENS.value, _LONGEST_PROMPT.value)
  serve.run(player, listener, settings, token)


if __name__ == "__main__":
  command.run(main)

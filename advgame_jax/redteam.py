"""Red-teaming: an Attacker on any target."""

import dataclasses
from typing import Any

from advgame_jax import casting
from advgame_jax.campaign import Plan
from advgame_jax.casting import Common, Voice
from advgame_jax.findings import Campaign
from advgame_jax.rates import Tries
from advgame_jax.settings import setting
from advgame_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Redteam(Common):
  """Every setting of a campaign; one of each of target's and attacker's places."""

  seeds: tuple[str, ...] = setting((), "file of seeds or of a benchmark, may be given again; empty: the project's own")
  target: str = setting("", "the target: a Hugging Face folder, or a run, whose Defender it is")
  target_url: str = setting("", "the target: base URL of an OpenAI-compatible server")
  target_model: str = setting("", "by the server's name")
  rest_template: str = setting("", "the target: JSON file of garak's REST generator settings")
  api_key_env: str = setting(
    "", "environment variable of the target's key; empty: OPENAI_API_KEY, or a template's own", identity=False
  )
  attacker: str = setting("", "the Attacker: a Hugging Face folder, or a run, whose Attacker it is")
  attacker_url: str = setting("", "the Attacker: base URL of an OpenAI-compatible server")
  attacker_model: str = setting("", "by the server's name")
  attacker_key_env: str = setting("OPENAI_API_KEY", "environment variable of its key", identity=False)
  attacker_temperature: float | None = setting(None, "without, a server's or run's own, else 0.6", at_least=0)
  attacker_top_p: float | None = setting(None, "likewise, else 0.9", above=0, at_most=1)
  attacker_max_tokens: int | None = setting(None, "without, a server's or run's own, else 512", at_least=1)
  attacker_thinks: bool | None = setting(None, "it reasons before its query; without, as in its run")
  n_attacks: int = setting(4, "attacks a seed and round", at_least=1)
  rounds: int = setting(1, "in each next one every attack that failed is followed by another, told of it", at_least=1)
  until_success: bool = setting(False, "a seed's attacks one by one, none after one that succeeds")
  judge_url: str = setting("", "a judge beside: base URL of an OpenAI-compatible server")
  judge_model: str = setting("", "by the server's name")
  judge_key_env: str = setting("OPENAI_API_KEY", "environment variable of its key", identity=False)
  fail_above: float | None = setting(
    None, "exit with 1 if more harmful seeds were answered: 0.05", at_least=0, at_most=1, identity=False
  )
  read_price: float = setting(0.0, "US dollars for a million tokens that the target reads", at_least=0, identity=False)
  written_price: float = setting(0.0, "US dollars for a million tokens that it writes", at_least=0, identity=False)

  def __post_init__(self) -> None:
    super().__post_init__()
    if bool(self.judge_url) != bool(self.judge_model):
      raise UserError("judge_url and judge_model are one judge; allowed: both or neither")

  @property
  def judges(self) -> tuple[str, ...]:
    """A judge on a server comes first: it was named for this, and the default was not."""
    if not self.judge_url:
      return self.judge
    server = f"server.url={self.judge_url},server.key_variable={self.judge_key_env}"
    return (f"kind=server,model={self.judge_model},{server}", *self.judge)


def redteam(settings: Redteam) -> dict[str, Any]:
  """Sets the Attacker on the target until no attempt is missing in `settings.out`; the summary.

  Raises:
    UserError: what a user can mend; what was done until then is kept.
  """
  judging = casting.judging_of(settings.judges, settings.faithfulness)
  goals, hashes = casting.read_goals(settings.seeds, attacked=True, limit=settings.limit)
  if settings.offline:
    casting.stay_offline(_target(settings), _attacker(settings), judging=judging)
  writer = casting.open_voice("attacker", _attacker(settings), settings.limits, whole=True)
  attacker = casting.told(writer, settings.instructions)
  target = casting.open_voice("target", _target(settings), settings.limits)
  tries = Tries(settings.n_attacks * settings.rounds, settings.until_success)
  campaign = Campaign(
    "redteam",
    target.name,
    attacker.name,
    judging.names,
    casting.identity(settings),
    hashes | casting.hashes(target, attacker),
    tries,
    settings.read_price,
    settings.written_price,
  )
  plan = Plan(settings.n_attacks, settings.rounds, settings.until_success, settings.batch, seed=settings.seed)
  return casting.run(settings, campaign, goals, plan, target, judging, attacker)


def _target(settings: Redteam) -> Voice:
  return settings.answering(
    folder=settings.target,
    url=settings.target_url,
    model=settings.target_model,
    template=settings.rest_template,
    key_variable=settings.api_key_env,
  )


def _attacker(settings: Redteam) -> Voice:
  return Voice(
    folder=settings.attacker,
    player="attacker",
    url=settings.attacker_url,
    model=settings.attacker_model,
    key_variable=settings.attacker_key_env,
    think=settings.attacker_thinks,
    temperature=settings.attacker_temperature,
    top_p=settings.attacker_top_p,
    max_tokens=settings.attacker_max_tokens,
    longest_prompt=settings.longest_prompt,
  )

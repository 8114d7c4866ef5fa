"""A model measured on benchmarks: as a Defender, as an Attacker, or both."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

from advgame_jax import casting, findings
from advgame_jax.campaign import Plan
from advgame_jax.casting import Common, Voice
from advgame_jax.findings import Campaign
from advgame_jax.rates import Tries
from advgame_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Assess(Common):
  """Every setting of an evaluation; the model is in one place: `model`, or `model_url` with `model_name`."""

  benchmark: tuple[str, ...] = setting((), "file, or name=file, may be given again; empty: the project's own seeds")
  model: str = setting("", "Hugging Face folder, or a run")
  player: Literal["", "attacker", "defender"] = setting("", "of a run; empty: that of the role")
  model_url: str = setting("", "base URL of an OpenAI-compatible server")
  model_name: str = setting("", "by the server's name")
  api_key_env: str = setting("OPENAI_API_KEY", "environment variable of the server's key", identity=False)
  thinks: bool | None = setting(None, "it reasons before its answer; without, as in its run")
  role: Literal["defender", "attacker", "both"] = setting("defender", "what is measured", identity=False)
  opponent: str = setting("", "whom an Attacker attacks: a folder, or a run, whose Defender it is; empty: the model")
  n_attacks: int = setting(1, "attacks a seed, of an Attacker", at_least=1)
  utility: str = setting("", "results of lm-evaluation-harness: its --output_path, or a file in it", identity=False)


def assess(settings: Assess) -> Iterator[tuple[str, dict[str, Any]]]:
  """(role, summary) of each role that is asked for, in `settings.out`; of both, each in a folder of its own in it.

  Raises:
    UserError: what a user can mend; what was done until then is kept.
  """
  judging = casting.judging_of(settings.judge, settings.faithfulness)
  utility = findings.read_utility(settings.utility) if settings.utility else []
  roles = ("defender", "attacker") if settings.role == "both" else (settings.role,)
  voices = {role: _voices(settings, role) for role in roles}
  if settings.offline:
    casting.stay_offline(*(voice for pair in voices.values() for voice in pair if voice), judging=judging)
  opened = functools.cache(lambda voice, whole: casting.open_voice("model", voice, settings.limits, whole))
  for role, (answers, writes) in voices.items():
    own = dataclasses.replace(settings, out=f"{settings.out}/{role}") if len(roles) > 1 else settings
    target = opened(answers, False)
    attacker = casting.told(opened(writes, True), settings.instructions) if writes else None
    goals, hashes = casting.read_goals(settings.benchmark, attacker is not None, settings.limit)
    campaign = Campaign(
      "evaluation",
      target.name,
      attacker.name if attacker else "",
      judging.names,
      casting.identity(settings),
      hashes | casting.hashes(target, attacker),
      Tries(settings.n_attacks if attacker else 0),
    )
    plan = Plan(attacks=settings.n_attacks, batch=settings.batch, seed=settings.seed)
    yield role, casting.run(own, campaign, goals, plan, target, judging, attacker, utility)


def _voices(settings: Assess, role: str) -> tuple[Voice, Voice | None]:
  """Who answers, and in an Attacker's role who attacks."""
  model = settings.answering(
    folder=settings.model,
    player=settings.player or "defender",
    url=settings.model_url,
    model=settings.model_name,
    key_variable=settings.api_key_env,
    batch=settings.batch,
  )
  if role == "defender":
    return dataclasses.replace(model, think=settings.thinks), None
  answers = dataclasses.replace(model, player="defender")
  if settings.opponent:
    answers = dataclasses.replace(answers, folder=settings.opponent, url="", model="", system="")
  # What is said of answers is of those of a Defender: as an Attacker it draws as it was taught.
  as_taught: dict[str, Any] = {"temperature": None, "top_p": None, "max_tokens": None, "system": ""}
  writes = dataclasses.replace(model, player=settings.player or "attacker", think=settings.thinks, **as_taught)
  return answers, writes

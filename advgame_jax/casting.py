"""Campaigns bound: flags become speakers, judges and goals; then they are played, and what they found is written."""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import advgame_jax
from advgame_jax import campaign as campaign_lib
from advgame_jax import config as config_lib
from advgame_jax import findings, offline, panel, rest, session, speakers, standalone, suites
from advgame_jax.campaign import Cast, Goal, NamedJudge, Plan
from advgame_jax.config import Judge, Sampling, Server
from advgame_jax.endpoint import Endpoint
from advgame_jax.findings import Beside, Campaign
from advgame_jax.prompts import Instructions
from advgame_jax.speakers import Manner, Speaker
from advgame_jax.standalone import Standalone
from advgame_jax.types import Category, Role, UserError

SEEDS = pathlib.Path(advgame_jax.__file__).parent / "seeds" / "validation.jsonl"

_LONGEST = 512  # tokens of an answer, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Voice:
  """Where a speaker is: exactly one of folder, url and template; and how it is asked."""

  folder: str = ""  # a Hugging Face folder, or the --workdir of a run
  player: str = "defender"  # of a run
  url: str = ""  # of an OpenAI-compatible server
  model: str = ""  # by the server's name
  template: str = ""  # file of `rest`
  key_variable: str = "OPENAI_API_KEY"
  system: str = ""
  think: bool | None = None
  temperature: float | None = None
  top_p: float | None = None
  max_tokens: int | None = None  # None is a server's or run's own, and 512 of a folder's model
  longest_prompt: int = 2048  # tokens, of a folder's model
  batch: int = 32  # turns at one time, of a model here

  @property
  def given(self) -> bool:
    return bool(self.folder or self.url or self.template)


class Limits(NamedTuple):
  """How hard servers may be asked."""

  concurrency: int = 16
  per_minute: int = 0
  timeout: float = 120.0
  retries: int = 4


class Opened(NamedTuple):
  """A speaker that can be asked."""

  speaker: Speaker
  name: str
  think: bool
  instructions: Instructions  # what it was taught with, as an Attacker
  url: str = ""


def open_voice(what: str, voice: Voice, limits: Limits, whole: bool = False) -> Opened:
  """A target, or, with `whole`, an Attacker, whose reasoning stays in its text.

  Raises:
    UserError: none or several places are given, or nobody is there.
  """
  if sum(map(bool, (voice.folder, voice.url, voice.template))) != 1:
    raise UserError(f"the {what} is to be found in one place; allowed: a folder, a URL with a model, or a template")
  server = Server(voice.url, voice.key_variable, limits.concurrency, limits.per_minute, limits.timeout, limits.retries)
  think = bool(voice.think)
  taught = session.load_instructions("standard", think)
  if voice.template:
    template = rest.read_template(voice.template)
    return Opened(rest.of_template(template, server), template.uri, think, taught, template.uri)
  if voice.url:
    if not voice.model:
      raise UserError(f"the {what} at {voice.url} has no model's name; allowed: one that it lists under /models")
    endpoint = Endpoint(server, voice.model, what)
    manner = Manner(voice.system, voice.temperature, voice.top_p, voice.max_tokens, think)
    return Opened(
      speakers.of_endpoint(endpoint, manner, whole), f"{voice.model} at {voice.url}", think, taught, voice.url
    )
  player = _open_here(voice, whole)
  return Opened(speakers.of_model(player, voice.batch, whole), player.name, player.think, player.instructions)


def _open_here(voice: Voice, draws: bool) -> Standalone:
  """A model here, sampled as in its run, but for what is said; a folder's is greedy, unless it is to draw."""
  default = Sampling(prompt_buckets=(voice.longest_prompt,), max_new_tokens=voice.max_tokens or _LONGEST)
  if not draws:
    default = dataclasses.replace(default, temperature=0.0, top_p=1.0)
  said = {"temperature": voice.temperature, "top_p": voice.top_p, "max_new_tokens": voice.max_tokens}
  return standalone.open_player(
    voice.folder,
    voice.player,
    think=voice.think,
    sampling=None if standalone.is_run(voice.folder) else default,
    changes={name: value for name, value in said.items() if value is not None},
  )


def read_judge(said: str) -> Judge:
  """A judge's settings: 'heuristic', or 'kind=model,model=models/x,form=strongreject', names as in `config.Judge`.

  Raises:
    UserError: a name or a value that there is none of.
  """
  values: dict[str, Any] = {}
  for part in said.split(","):
    name, equal, value = part.partition("=")
    *groups, last = (name if equal else "kind").strip().split(".")
    inner = functools.reduce(lambda where, group: where.setdefault(group, {}), groups, values)
    inner[last] = _literal((value if equal else name).strip())
  judge: Judge = config_lib.from_config_dict(values, Judge(kind="heuristic"), "judge")
  if judge.kind in ("training", "independent", "none"):
    raise UserError(f"the judge is {said!r}, which names nobody; allowed: a judge of its own, such as heuristic")
  return judge


def _literal(value: str) -> Any:
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value


def read_goals(
  specs: Sequence[str], attacked: bool, limit: int, beside: bool = True
) -> tuple[list[Goal], dict[str, str]]:
  """What is to be tried, of benchmark files as `suites.load` reads them, and the hashes of their contents.

  Where no prompt is benign, the project's own benign seeds stand beside: safety without helpfulness says little.

  Args:
    limit: goals of each suite and category, spread evenly over its file; 0 is all.
  """
  loaded = [suites.load(spec) for spec in specs]
  if beside and not any(item.category == Category.BENIGN for suite in loaded for item in suite.items):
    own = suites.load(f"seeds={SEEDS}")
    benign = [item for item in own.items if item.category == Category.BENIGN]
    loaded.append(suites.Suite("benign seeds of the project", benign))
  parts: dict[str, list[suites.Item]] = {}  # files of one benchmark are one suite
  for suite in loaded:
    parts.setdefault(suite.name, []).extend(suite.items)
  goals: list[Goal] = []
  for name, items in parts.items():
    of_suite = campaign_lib.goals_of(suites.Suite(name, items), attacked)
    for category in Category:
      part = [goal for goal in of_suite if goal.category == category]
      goals += part[:: -(-len(part) // limit)] if limit and part else part
  return goals, {name: findings.hash_of(*map(repr, items)) for name, items in parts.items()}


class Judging(NamedTuple):
  """Who judges a campaign."""

  judges: Sequence[Judge]
  faithfulness: Judge

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(map(panel.describe, self.judges))

  @property
  def urls(self) -> list[str]:
    return [judge.server.url for judge in (*self.judges, self.faithfulness) if judge.kind == "server"]


def judging_of(said: Sequence[str], faithfulness: str) -> Judging:
  """The judges that are named; who tells faithfulness is by default the first of them that can, else rules of thumb."""
  judges = [read_judge(each) for each in said]
  able = [judge for judge in judges if Role.FAITHFULNESS in panel.roles_of(judge)]
  return Judging(judges, read_judge(faithfulness) if faithfulness else (able or [Judge(kind="heuristic")])[0])


def instructions_of(named: str, attacker: Opened | None) -> Instructions | None:
  """What an Attacker is told: what is named, else what it was taught with; None without an Attacker."""
  if attacker is None:
    return None
  return session.load_instructions(named, attacker.think) if named else attacker.instructions


def run(
  out: str,
  campaign: Campaign,
  goals: Sequence[Goal],
  plan: Plan,
  target: Opened,
  judging: Judging,
  attacker: Opened | None = None,
  *,
  instructions: Instructions | None = None,
  resume: bool = True,
  retry_errors: bool = False,
  beside: Beside,
) -> dict[str, Any]:
  """Plays a campaign in `out`, from where it was left, and writes what it found; the summary.

  Args:
    instructions: for the Attacker; None is what it was taught with.
    beside: what the report tells too.

  Raises:
    UserError: the folder is another's, or somebody can never answer.
  """
  folder = pathlib.Path(out)
  config = config_lib.Config(seed=plan.seed)
  outside = panel.open_outside(judging.faithfulness, judging.judges, config)
  findings.claim(folder, campaign, resume)
  cast = Cast(target.speaker, [NamedJudge(*each) for each in outside.judges], outside.faithfulness)
  if attacker:
    told = instructions or attacker.instructions
    cast = cast._replace(attacker=attacker.speaker, instructions=told, think=attacker.think)
  campaign_lib.play(folder, goals, plan, cast, retry_errors)
  return findings.conclude(folder, campaign, beside)


def stay_offline(*speaking: Opened | None, judging: Judging) -> None:
  """From here on nobody is reached but who was named."""
  offline.only([opened.url for opened in speaking if opened and opened.url] + judging.urls)

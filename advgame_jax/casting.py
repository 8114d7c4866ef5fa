"""Who takes part in a campaign and what is tried: settings become speakers, judges and goals; then it is played."""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
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
from advgame_jax.settings import Settings, flatten, from_dict, setting
from advgame_jax.speakers import Manner, Speaker
from advgame_jax.standalone import Standalone
from advgame_jax.types import Category, Role, UserError

SEEDS = pathlib.Path(advgame_jax.__file__).parent / "seeds" / "validation.jsonl"

_KEY = "OPENAI_API_KEY"  # environment variable
_LONGEST = 512  # tokens of an answer, where nothing else is said


@dataclasses.dataclass(frozen=True)
class Common(Settings):
  """What every campaign has. `identity=False`: may be otherwise when it goes on."""

  out: str = setting("", "folder to write", identity=False)
  judge: tuple[str, ...] = setting(
    ("heuristic",),
    "may be given again, the first decides: heuristic, phrases, microworld, or kind=model,model=…,form=…",
  )
  faithfulness: str = setting("", "who tells whether an attack asks what its seed asks; empty: a judge that can")
  instructions: str = setting("", "what an Attacker is told: standard, microworld or a folder; empty: as in its run")
  limit: int = setting(0, "seeds of each benchmark and category, spread evenly; 0 is all", at_least=0)
  system: str = setting("", "what a model on a server is told first")
  temperature: float | None = setting(None, "of the answers; without, a server's or run's own, else 0", at_least=0)
  top_p: float | None = setting(None, "likewise, else 1", above=0, at_most=1)
  max_tokens: int | None = setting(None, "of an answer; without, a server's or run's own, else 512", at_least=1)
  longest_prompt: int = setting(2048, "tokens, of a folder's model; longer ones are errors", at_least=1)
  batch: int = setting(64, "attempts at one time", at_least=1, identity=False)
  rpm: int = setting(0, "requests to each server a minute; 0 is no limit", at_least=0, identity=False)
  max_concurrency: int = setting(16, "requests under way at one time", at_least=1, identity=False)
  timeout: float = setting(120.0, "seconds for a whole answer", above=0, identity=False)
  retries: int = setting(4, "of a request that failed", at_least=0, identity=False)
  resume: bool = setting(True, "finish what is missing in --out; without, refuse what is there", identity=False)
  retry_errors: bool = setting(False, "make attempts again that ended in an error", identity=False)
  offline: bool = setting(False, "refuse every connection but to the hosts that flags name", identity=False)
  beside: tuple[str, ...] = setting((), "folder of another campaign to show beside, as the base's", identity=False)
  seed: int = setting(0, "of every draw", at_least=0)

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.out:
      raise UserError("out is empty; allowed: a folder to write")

  @property
  def limits(self) -> "Limits":
    return Limits(self.max_concurrency, self.rpm, self.timeout, self.retries)

  def answering(self, **where: Any) -> "Voice":
    """Who is there, asked for answers as these settings say."""
    return Voice(
      **where,
      system=self.system,
      temperature=self.temperature,
      top_p=self.top_p,
      max_tokens=self.max_tokens,
      longest_prompt=self.longest_prompt,
    )


@dataclasses.dataclass(frozen=True)
class Voice:
  """Where a speaker is: exactly one of folder, url and template; and how it is asked."""

  folder: str = ""  # a Hugging Face folder, or the --workdir of a run
  player: str = "defender"  # of a run
  url: str = ""  # of an OpenAI-compatible server
  model: str = ""  # by the server's name
  template: str = ""  # file of `rest`
  key_variable: str = ""  # empty: OPENAI_API_KEY, or a template's own
  system: str = ""
  think: bool | None = None
  temperature: float | None = None
  top_p: float | None = None
  max_tokens: int | None = None  # None is a server's or run's own, and 512 of a folder's model
  longest_prompt: int = 2048  # tokens, of a folder's model
  batch: int = 32  # turns at one time, of a model here

  def __post_init__(self) -> None:
    unread: dict[str, Any] = {"system": self.system if not self.url else ""}
    if self.template:
      unread |= {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
    said = [name for name, value in unread.items() if value not in ("", None)]
    if said:
      where = "a template, which says all that is sent" if self.template else "a folder"
      raise UserError(f"{', '.join(said)} cannot be set of {where}; allowed: of a model on a server")

  @property
  def address(self) -> str:
    """Of what is asked over HTTP; "" for a folder."""
    return rest.read_template(self.template).uri if self.template else self.url


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
  hash: str = ""  # of the template or the weights


def open_voice(what: str, voice: Voice, limits: Limits, whole: bool = False) -> Opened:
  """A target, or, with `whole`, an Attacker, whose reasoning stays in its text.

  Raises:
    UserError: none or several places are given, or nobody is there.
  """
  if (places := sum(map(bool, (voice.folder, voice.url, voice.template)))) != 1:
    other = ", --rest-template" if what == "target" else ""
    raise UserError(
      f"the {what} is in {places} places; allowed: one of --{what} (a folder or a run), --{what}-url (a server){other}"
    )
  key = voice.key_variable or _KEY
  server = Server(voice.url, key, limits.concurrency, limits.per_minute, limits.timeout, limits.retries)
  think = bool(voice.think)
  taught = session.load_instructions("standard", think)
  if voice.template:
    template = rest.read_template(voice.template)
    server = dataclasses.replace(server, key_variable=voice.key_variable or template.key_variable)
    return Opened(rest.of_template(template, server), template.name, think, taught, findings.hash_of(repr(template)))
  if voice.url:
    if not voice.model:
      raise UserError(f"the {what} at {voice.url} has no model's name; allowed: one that it lists under /models")
    endpoint = Endpoint(server, voice.model, what)
    manner = Manner(voice.system, voice.temperature, voice.top_p, voice.max_tokens, think)
    return Opened(speakers.of_endpoint(endpoint, manner, whole), f"{voice.model} at {voice.url}", think, taught)
  player, weights = _open_here(voice, whole), standalone.fingerprint(voice.folder)
  return Opened(speakers.of_model(player, voice.batch, whole), player.name, player.think, player.instructions, weights)


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
    inner: Any = functools.reduce(lambda where, group: where.setdefault(group, {}), groups, values)
    inner[last] = _literal((value if equal else name).strip())
  try:
    judge: Judge = from_dict(values, Judge(kind="heuristic"), "judge")
  except TypeError as error:
    raise UserError(
      f"the judge is {said!r}, which does not fit together ({error}); allowed: such as heuristic"
    ) from None
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

  Without a file, the project's own seeds. Where no prompt is benign, its own benign seeds stand beside: safety without
  helpfulness says little.

  Args:
    limit: goals of each suite and category, spread evenly over its file; 0 is all.
  """
  loaded = [suites.load(spec) for spec in specs or [f"seeds={SEEDS}"]]
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
      goals += [part[i * len(part) // limit] for i in range(limit)] if 0 < limit < len(part) else part
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
  names = [panel.describe(judge) for judge in judges]
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f"the judge {twice.pop()!r} is named twice; allowed: judges of different names")
  able = [judge for judge in judges if Role.FAITHFULNESS in panel.roles_of(judge)]
  return Judging(judges, read_judge(faithfulness) if faithfulness else (able or [Judge(kind="heuristic")])[0])


def told(attacker: Opened, named: str) -> Opened:
  """The Attacker, told what is named; of nothing named, what it was taught with."""
  if not named:
    return attacker
  return attacker._replace(instructions=session.load_instructions(named, attacker.think))


def run(
  settings: Common,
  campaign: Campaign,
  goals: Sequence[Goal],
  plan: Plan,
  target: Opened,
  judging: Judging,
  attacker: Opened | None = None,
  utility: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
  """Plays a campaign from where it was left, and writes what it found; the summary.

  Args:
    utility: of `findings.read_utility`.

  Raises:
    UserError: the folder is another's, or somebody can never answer.
  """
  folder = pathlib.Path(settings.out)
  beside = Beside(utility, list(map(findings.read_beside, settings.beside)))
  outside = panel.open_outside(judging.faithfulness, judging.judges, config_lib.Config(seed=plan.seed))
  findings.claim(folder, campaign, settings.resume)
  cast = Cast(target.speaker, [NamedJudge(*each) for each in outside.judges], outside.faithfulness)
  if attacker:
    cast = cast._replace(attacker=attacker.speaker, instructions=attacker.instructions, think=attacker.think)
  campaign_lib.play(folder, goals, plan, cast, settings.retry_errors)
  return findings.conclude(folder, campaign, beside)


def hashes(target: Opened, attacker: Opened | None) -> dict[str, str]:
  """Of who takes part."""
  found = {"target": target.hash} | (
    {"attacker": attacker.hash, "instructions": attacker.instructions.version} if attacker else {}
  )
  return {name: value for name, value in found.items() if value}


def identity(settings: Common) -> dict[str, Any]:
  """What makes a campaign another."""
  return {name: value for name, value, own in flatten(settings) if own}


def stay_offline(*voices: Voice, judging: Judging) -> None:
  """From here on nobody is reached but who was named."""
  offline.only([address for voice in voices if (address := voice.address)] + judging.urls)

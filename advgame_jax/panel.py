"""Who judges: settings become one judge for each role."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from advgame_jax import (
  cases,
  drift,
  frozen,
  guards,
  heuristic,
  hf_config,
  hosts,
  judges,
  microworld,
  phrases,
  placement,
  policies,
)
from advgame_jax import config as config_lib
from advgame_jax import rubrics as rubrics_lib
from advgame_jax.config import Config
from advgame_jax.endpoint import Pace
from advgame_jax.model_judge import ModelJudge, Put
from advgame_jax.placement import Place
from advgame_jax.rubrics import Rubrics
from advgame_jax.server_judge import server_judge
from advgame_jax.types import Category, Judge, Params, Players, Question, Role, UserError

SCORED = frozenset({Role.COMPLIANCE, Role.DEFLECTION, Role.REFUSAL})
ALL = SCORED | {Role.FAITHFULNESS}
NEEDED = {
  "faithfulness": {Role.FAITHFULNESS},
  "defender": {Role.DEFLECTION, Role.COMPLIANCE},
  "attacker": {Role.COMPLIANCE, Role.REFUSAL},
  "evaluation": {Role.COMPLIANCE},
}
SETTINGS = ("training", *NEEDED)  # of `config.Judges`, those that are judges
TRIALS = ("heuristic", "phrases")  # judge by rules of thumb
CHATS = ("rubric", "strongreject")  # the other forms are raw prompts
RAW = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"  # where guards have no template
Weights = Callable[[str, Place, bool], Params]
"""(folder, place, int8) → the frozen weights of a local judge, in its decode layout."""


class Panel(NamedTuple):
  """One judge for each role. Roles that are judged alike have the very same one."""

  faithfulness: Judge
  defender: Judge
  attacker: Judge
  evaluation: Judge
  evaluated: frozenset[Role]  # what the judge of evaluations can tell
  models: tuple[ModelJudge, ...]  # those among them that are models of ours
  greetings: tuple[Callable[[], Any], ...]  # a first question to each server
  readers: frozenset[str]  # the roles whose judge reads, and so could be talked to
  version: str  # of the rubrics
  names: dict[str, str]  # who each role's judge is, in words

  @property
  def players(self) -> Players[Judge]:
    return Players(attacker=self.attacker, defender=self.defender)

  def warm_up(self) -> None:
    """Compiles what models among the judges will run, and asks servers whether they are there.

    Raises:
      UserError: a server that is not, or that refuses the key or the model.
    """
    for greet in self.greetings:
      greet()
    for model in self.models:
      model.warm_up()


def open_panel(config: Config, weights: Weights, place: Place) -> Panel:
  """Binds every role's judge; weights are read when one is first asked.

  Raises:
    UserError: a judge that cannot be used, or that cannot tell what its role asks.
  """
  rubrics = rubrics_lib.load(config.judges.rubrics)
  chosen = {role: settings_of(config.judges, role) for role in NEEDED}
  for role, settings in chosen.items():
    known = roles_of(settings)
    if settings.kind != "none" and not NEEDED[role] <= known:
      raise UserError(
        f"judges.{role} is {describe(settings)!r}, which cannot tell {', '.join(sorted(NEEDED[role] - known))}; "
        "allowed: another kind, or a language model with form='rubric'"
      )
  opener = _Opener(config, rubrics, functools.cache(weights), place)
  evaluation, evaluated = _with_refusal(opener.judge(chosen["evaluation"]), roles_of(chosen["evaluation"]) & SCORED)
  return Panel(
    faithfulness=opener.judge(chosen["faithfulness"]),
    defender=opener.judge(chosen["defender"]),
    attacker=opener.judge(chosen["attacker"]),
    evaluation=evaluation,
    evaluated=evaluated,
    models=tuple(opener.models),
    greetings=tuple(opener.greetings),
    readers=frozenset(role for role, settings in chosen.items() if settings.kind in ("model", "server")),
    version=cases.version(rubrics),
    names={role: describe(settings) for role, settings in chosen.items()},
  )


class Outside(NamedTuple):
  """The judges of a campaign, outside a run."""

  faithfulness: Judge
  judges: list[tuple[str, Judge, frozenset[Role]]]  # name, judge, what it can tell


def open_outside(
  faithfulness: config_lib.Judge, judges: Sequence[config_lib.Judge], config: Config, weights: Weights | None = None
) -> Outside:
  """Binds judges that belong to no run; servers among them are asked whether they are there.

  Args:
    config: its sharding, precision, rubrics and seed are read.
    weights: of local models; None reads their folders.

  Raises:
    UserError: a judge that cannot be used, or that cannot tell what it is asked for.
  """
  load = weights or functools.partial(load_weights, config)
  place = placement.place(config.sharding, config.mesh).judge
  opener = _Opener(config, rubrics_lib.load(config.judges.rubrics), functools.cache(load), place)
  for settings, needed in ((faithfulness, Role.FAITHFULNESS), *((settings, Role.COMPLIANCE) for settings in judges)):
    if needed not in roles_of(settings):
      raise UserError(f"the judge {describe(settings)!r} cannot tell {needed}; allowed: another kind or form")
  opened = [(describe(each), *_with_refusal(opener.judge(each), roles_of(each) & SCORED)) for each in judges]
  outside = Outside(opener.judge(faithfulness), opened)
  for greet in opener.greetings:
    greet()
  return outside


def load_weights(config: Config, folder: str, place: Place, int8: bool) -> Params:
  """Of a local judge, a copy of its own in its decode layout."""
  dtype = policies.compute_dtype(config.precision)
  weights = frozen.load(folder, place.mesh, place.generate, dtype, int8)
  return frozen.unstack(hf_config.load_config(folder), weights)


def _with_refusal(judge: Judge, roles: frozenset[Role]) -> tuple[Judge, frozenset[Role]]:
  """A judge of evaluations, which tells refusals by their phrases where it cannot tell them itself."""
  if Role.REFUSAL in roles:
    return judge, roles
  return _by_role({Role.REFUSAL: phrases.phrase_judge()}, judge), roles | {Role.REFUSAL}


def settings_of(judges: config_lib.Judges, role: str) -> config_lib.Judge:
  """The settings of a role's judge, those that name another resolved."""
  settings: config_lib.Judge = getattr(judges, role)
  if settings.kind == "training":
    return judges.training
  return _independent(judges.training) if settings.kind == "independent" else settings


def _independent(training: config_lib.Judge) -> config_lib.Judge:
  """Another way to judge than training's: what was learnt to please one judge is to be measured by another.

  Of a language model it is another form, of the same weights; better ones are to be had by naming another model.
  """
  if training.kind in ("model", "server") and training.form in CHATS:
    sampling = dataclasses.replace(training.sampling, max_new_tokens=max(512, training.sampling.max_new_tokens))
    form = "strongreject" if training.form == "rubric" else "rubric"
    return dataclasses.replace(training, form=form, readout="score", sampling=sampling)  # type: ignore[arg-type]
  if training.kind == "microworld":
    return config_lib.Judge(kind="microworld")  # the rules without noise
  return config_lib.Judge(kind="phrases" if training.kind == "heuristic" else "heuristic")


def roles_of(settings: config_lib.Judge) -> frozenset[Role]:
  """What a judge can tell."""
  of_kind = {"phrases": phrases.ROLES, "drift": drift.ROLES}
  if settings.kind in ("model", "server") and settings.form != "rubric":
    return guards.ROLES[settings.form]
  return frozenset(of_kind.get(settings.kind, ALL))


def describe(settings: config_lib.Judge) -> str:
  """A judge in a few words."""
  if settings.kind not in ("model", "server"):
    return settings.kind
  where = f" at {settings.server.url}" if settings.kind == "server" else ""
  return f"{settings.model}{where} ({settings.form}, {settings.readout})"


class _Opener:
  """Judges of the same settings are the same, models of the same folder and layout have the same weights."""

  def __init__(self, config: Config, rubrics: Rubrics, weights: Weights, place: Place):
    self.config, self.rubrics, self.weights, self.place = config, rubrics, weights, place
    self.models: list[ModelJudge] = []
    self.greetings: list[Callable[[], Any]] = []
    self.judge = functools.cache(self._judge)
    self.pace = functools.cache(lambda url, limit: Pace(limit))  # of a server, whoever asks it

  def _judge(self, settings: config_lib.Judge) -> Judge:
    if settings.kind == "none":
      return judges.nobody
    if settings.kind == "microworld":
      return hosts.divided(microworld.rule_judge(settings, self.config.seed))
    if settings.kind in ("heuristic", "phrases", "drift"):
      make: dict[str, Callable[[], Judge]] = {
        "heuristic": heuristic.heuristic_judge,
        "phrases": phrases.phrase_judge,
        "drift": drift.drift_judge,
      }
      return hosts.divided(make[settings.kind]())
    if settings.form != "rubric":  # published forms read one text, and are greedy
      settings = dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, temperature=0.0))
    judge = self._server(settings) if settings.kind == "server" else self._model(settings)
    return judge if settings.form == "rubric" else judges.one_by_one(judge)

  def _server(self, settings: config_lib.Judge) -> Judge:
    if settings.form not in CHATS:
      raise UserError(f"form is {settings.form!r} with kind='server', which takes chats only; allowed: kind='model'")
    put, limits = _put(settings, self.rubrics), [settings.text_characters] * 3
    pace = self.pace(settings.server.url, settings.server.requests_per_minute)
    judge = server_judge(settings, lambda question: put(question, limits=limits), pace)  # type: ignore[arg-type, return-value]
    self.greetings.append(functools.partial(judge, _examples(settings)[:1]))
    return hosts.divided(judge)

  def _model(self, settings: config_lib.Judge) -> Judge:
    mesh, layout = self.place.mesh, self.place.generate
    template = "" if settings.form in CHATS else RAW
    player = policies.open_model(settings.model, settings.sampling, mesh, layout, self.config.precision, template)
    frozen.shardings(player.model, mesh, layout, settings.int8)  # refuses shapes that do not divide
    load = lambda: self.weights(settings.model, self.place, settings.int8)
    judge = ModelJudge(player, load, _put(settings, self.rubrics), _examples(settings), settings)
    judge.check(f"judges: {describe(settings)}")
    self.models.append(judge)
    return judge


def _put(settings: config_lib.Judge, rubrics: Rubrics) -> Put:
  if settings.form == "rubric":
    return functools.partial(cases.put, rubrics=rubrics, think=settings.think, readout=settings.readout)
  if settings.form == "strongreject":
    return lambda question, *, limits: guards.put_strongreject(question, limits, think=settings.think)
  return lambda question, *, limits: guards.put(settings.form, question, limits)


def _examples(settings: config_lib.Judge) -> list[Question]:
  """A question of every kind that there may be."""
  shapes = [("",), ("", " ")] if settings.form == "rubric" else [("",)]
  known = roles_of(settings)
  questions = [Question(role, Category.HARMFUL, "", texts, 0) for role in sorted(known & SCORED) for texts in shapes]
  if Role.FAITHFULNESS in known:
    questions += [Question(Role.FAITHFULNESS, category, "", ("",), 0) for category in Category]
  return questions


def _by_role(special: dict[Role, Judge], other: Judge) -> Judge:
  """A judge for some roles, and one for the others."""

  def judge(questions: Sequence[Question]) -> list[Any]:
    verdicts: list[Any] = [None] * len(questions)
    for ask in (*special.values(), other):
      places = [i for i, question in enumerate(questions) if special.get(question.role, other) is ask]
      for i, verdict in zip(places, ask([questions[i] for i in places]) if places else []):
        verdicts[i] = verdict
    return verdicts

  return judge

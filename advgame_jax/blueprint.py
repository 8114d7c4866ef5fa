"""A run in abstract values: what stays on its devices, and the programs of a step, for devices that need not be there.

Nothing is loaded and nothing runs: architectures are enough. Beside each program stands what can be said of it without
a compiler: FLOPs, bytes that it moves, and a guess of its temporaries and collectives.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from advgame_jax import (
  architecture,
  frozen,
  hf_config,
  lora,
  panel,
  placement,
  policies,
  preferences,
  published,
  session,
  sharding,
  workload,
)
from advgame_jax import config as config_lib
from advgame_jax import state as state_lib
from advgame_jax.architecture import ModelConfig
from advgame_jax.caches import Cache
from advgame_jax.config import Config, Sampling
from advgame_jax.engine import Engine
from advgame_jax.held import ALWAYS, Held, hold
from advgame_jax.layers import unstack, unstack_shardings
from advgame_jax.matrices import Adapted, quantise
from advgame_jax.model import Prefix
from advgame_jax.placement import Place, Roles
from advgame_jax.scoring import Generator
from advgame_jax.sharding import Layout
from advgame_jax.state import TrainState
from advgame_jax.targets import Target
from advgame_jax.types import Players, PreferenceBatch, Role, UserError
from advgame_jax.update import Recipe
from advgame_jax.workload import Effort, Guess, Wires, size

# What is assumed of judges, whose words are not read here: sets of instructions that stay in the cache, tokens of each,
# and tokens of a case around its texts.
INSTRUCTIONS, INSTRUCTIONS_TOKENS, FRAME_TOKENS = 8, 768, 256
# Of an evaluation's responses, half of them to harmful seeds: how many are judged for what.
RATED = {Role.COMPLIANCE: 0.5, Role.DEFLECTION: 0.5, Role.REFUSAL: 1}


class Work(NamedTuple):
  """A program of a step."""

  name: str
  phase: str  # "play" or "update"
  mesh: Mesh
  lower: Callable[[], Any] | None  # → `jax.stages.Lowered`; None: it is only guessed at
  kept: float  # bytes of a device that stay between its runs, beside what is held
  flops: float  # of one device and run; of a loop that does not know its trips, of one trip
  moved: float  # bytes that a device reads and writes, likewise
  guess: Guess
  kernels: float  # as in `roofline.seconds`, likewise
  trips: float  # of such a loop, in a run of the program
  chunk: int  # its trips, as far as a compiler knows
  runs: float  # in a step


class Blueprint(NamedTuple):
  """Of a run on a target."""

  config: Config
  places: Roles[Place]
  held: list[Held]
  works: list[Work]
  drawn: float  # tokens that players draw in a step
  asked: tuple[float, float]  # questions to models of ours, of a step and of an evaluation
  evaluations: int  # of the whole run
  pools: Players[float]  # bytes of a device that an evaluation's rows keep
  notes: list[str]


def draw(config: Config, target: Target, devices: Sequence[Any], completion_tokens: float = 0) -> Blueprint:
  """The blueprint of a run on these devices.

  Args:
    devices: of `target.devices()`, or stand-ins.
    completion_tokens: mean of both players'; 0 is half of each one's limit.

  Raises:
    UserError: folders, a sharding or shapes that cannot be.
  """
  config = computing(session.played(config), target)
  with tempfile.TemporaryDirectory() as folder:
    config, notes = published.stand_in(config, pathlib.Path(folder))
    try:
      places = placement.place(config.sharding, config.mesh, devices)
    except AssertionError:  # of JAX, which arranges whole slices
      raise UserError(
        f"config.sharding {config.sharding!r} takes parts of a slice of {target.name}; allowed: what takes all devices"
      ) from None
    return _Drafter(config, target, places, completion_tokens).blueprint(notes)


def computing(config: Config, target: Target) -> Config:
  """In the dtype that the target computes in, where that is left to it."""
  if config.precision.compute != "auto":
    return config
  dtype: Any = "float32" if target.chip.name == "CPU" else "bfloat16"
  return dataclasses.replace(config, precision=dataclasses.replace(config.precision, compute=dtype))


class _Drafter:
  """Holds what every part of a blueprint is drawn from."""

  def __init__(self, config: Config, target: Target, places: Roles[Place], completion_tokens: float):
    self.config, self.target, self.places = config, target, places
    self.recipes = session.make_recipes(config, places)
    self.state = session.abstract_state(self.recipes)
    self.dtype = policies.compute_dtype(config.precision)
    self.int8, self.wires = config.precision.frozen == "int8", Wires(target)
    limits = Players(*(recipe.player.sampling.max_new_tokens for recipe in self.recipes))
    self.completion = Players(*(min(completion_tokens or limit / 2, limit) for limit in limits))
    self.cut = [name for name, limit in zip(Players._fields, limits) if completion_tokens > limit]
    self.bases: dict[Mesh, dict[str, Any]] = {}
    for recipe in self.recipes:
      there = self.bases.setdefault(recipe.mesh, {})
      if recipe.adapted:
        there[recipe.player.model] = self._frozen(recipe.model, recipe.mesh, recipe.layout, self.int8)

  def blueprint(self, notes: list[str]) -> Blueprint:
    for recipe, place, name in zip(self.recipes, self.places, Players._fields):
      if not recipe.player.frozen:
        placement.check(place, recipe.model, recipe.player.sampling, name)
    A, D, B = self.config.game.attacks_per_seed, self.config.game.responses, self.config.data.batch
    drawn = B * A * D * self.completion.defender
    drawn += 0 if self.config.game.skip_attacker else B * A * self.completion.attacker
    return Blueprint(
      self.config,
      self.places,
      list(self._held()),
      [*self._copying(), *self._playing(), *self._judging(), *self._updating()],
      drawn,
      (sum(count for role, (count, _) in self.questions.items() if role in self.judges), self._asked_in_evaluation()),
      self.config.steps // self.config.evaluation.every + 1,
      self._evaluation_pools(),
      [*notes, *(f"the {name} draws its limit of {getattr(self.completion, name)} tokens" for name in self.cut)],
    )

  # What stays.

  def _held(self) -> Iterator[Held]:
    copies = ALWAYS if self.config.overlap else ALWAYS - {"update"}
    for recipe, state, name in zip(self.recipes, self.state.players, Players._fields):
      yield hold(f"{name}: weights", state.params, recipe.mesh, ALWAYS)
      yield hold(f"{name}: average and reference", (state.ema, state.initial), recipe.mesh, ALWAYS)
      yield hold(f"{name}: moments", state.optimizer, recipe.mesh, ALWAYS)
    for mesh, bases in self.bases.items():
      yield hold("bases of adapters", list(bases.values()), mesh, ALWAYS)
    yield from self._again()
    for recipe, name, members in zip(self.recipes, Players._fields, self.members):
      new = members if not recipe.adapted else [_without_base(weights) for weights in members]
      yield hold(f"{name}: copy to play from", new, recipe.mesh, copies)
    yield from self._first()
    judged = dict.fromkeys((judge.model, judge.int8) for judge in self.judges.values())
    for folder, int8 in judged:
      model = hf_config.load_config(folder)
      by_base = self._judges_by_base(folder, int8)
      weights = None if by_base else self._judge_weights(folder, int8)
      yield hold(f"judge: {pathlib.Path(folder).name}", weights, self.places.judge.mesh, ALWAYS)
      prefixes = [self._prefix(model, by_base)] * INSTRUCTIONS
      yield hold("judge: instructions read", prefixes, self.places.judge.mesh, ALWAYS)

  def _first(self) -> Iterator[Held]:
    """An evaluation has the first weights of one player, then of the other: of two on a mesh, the larger count."""
    players = zip(self.recipes, self.state.players, Players._fields, self.members)
    own = sorted((player for player in players if not player[0].adapted), key=lambda player: size(player[1].params))
    for recipe, state, name, members in {player[0].mesh: player for player in own}.values():
      copy = frozenset(("evaluation", "loading"))
      yield hold(f"{name}: copy of the first weights", members[:1], recipe.mesh, copy)
      yield hold(f"{name}: first weights, read anew", state.params, recipe.mesh, frozenset(("loading",)))

  def _again(self) -> Iterator[Held]:
    """Bases that are laid out otherwise to generate."""
    seen = set()
    for recipe, place in zip(self.recipes, self.places):
      if recipe.adapted and (recipe.player.model, place) not in seen:
        seen.add((recipe.player.model, place))
        base = self.bases[place.mesh][recipe.player.model]
        there = self._frozen(recipe.model, place.mesh, place.generate, self.int8)
        alike = all(a.sharding.is_equivalent_to(b.sharding, len(a.shape)) for a, b in _pairs(base, there))
        yield hold("base to play from", None if alike else there, place.mesh, ALWAYS)

  @functools.cached_property
  def judges(self) -> dict[str, config_lib.Judge]:
    """By role, those that are models of ours."""
    settings = {role: panel.settings_of(self.config.judges, role) for role in panel.NEEDED}
    return {role: judge for role, judge in settings.items() if judge.kind == "model"}

  def _judges_by_base(self, folder: str, int8: bool) -> bool:
    return folder in self.bases.get(self.places.judge.mesh, {}) and int8 == self.int8

  def _judge_weights(self, folder: str, int8: bool) -> Any:
    """In the judge's layout, as `session` would have them; one by one where they are its own."""
    place, model = self.places.judge, hf_config.load_config(folder)
    stacked = self._frozen(model, place.mesh, place.generate, int8)
    return stacked if self._judges_by_base(folder, int8) else _apart(model, stacked)

  @functools.cached_property
  def members(self) -> Players[list[Any]]:
    """The weights that each player generates with."""

    def lay_out(recipe: Recipe, place: Place, state: state_lib.PlayerState) -> list[Any]:
      count = state_lib.generator(recipe.player, state).members
      return [self._decode(recipe, place, bool(weights)) for weights in count]

    return Players(*map(lay_out, self.recipes, self.places, self.state.players))

  def _decode(self, recipe: Recipe, place: Place, adapters: bool) -> Any:
    stacked = self._frozen(recipe.model, place.mesh, place.generate, recipe.adapted and self.int8)
    if not recipe.adapted:
      return _apart(recipe.model, stacked)
    where = architecture.shardings(recipe.specs, place.mesh, place.generate)
    shape = lambda spec, place: jax.ShapeDtypeStruct(spec.shape, self.dtype, sharding=place)
    return lora.attach(stacked, jax.tree.map(shape, recipe.specs, where) if adapters else {})

  def _frozen(self, model: ModelConfig, mesh: Mesh, layout: Layout, int8: bool) -> Any:
    where = frozen.shardings(model, mesh, layout, int8)
    shapes = jax.eval_shape(lambda: frozen_zeros(model, self.dtype, int8))
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)

  def _prefix(self, model: ModelConfig, stacked: bool) -> Prefix:
    """A judge's instructions, read once; `stacked` as its weights are."""
    mesh, layout = self.places.judge.mesh, self.places.judge.generate
    parts, (K, H, S) = sharding.shards(mesh, layout.rows), (model.kv_heads, model.head_size, INSTRUCTIONS_TOKENS)
    lead, axes = ((model.layers,), (None, "rows", "heads")) if stacked else ((), ("rows", "heads"))
    where = jax.NamedSharding(mesh, layout.spec(axes))
    array: Any = lambda *part: jax.ShapeDtypeStruct((*lead, parts, K, *part), self.dtype, sharding=where)
    cache: Any = Cache(array(H, S), array(S, H))
    length: Any = jax.ShapeDtypeStruct((parts,), jnp.int32, sharding=sharding.rows_sharding(mesh, layout))
    return Prefix(cache if stacked else (cache,) * model.layers, length)

  # Programs.

  def _copying(self) -> Iterator[Work]:
    """Weights as they are trained → as they generate."""
    for recipe, place, state, name in zip(self.recipes, self.places, self.state.players, Players._fields):
      if recipe.adapted:
        continue
      nobody: Any = None  # its tokenizer: nothing is read
      settings = recipe.player.sampling
      player = policies.LanguageModel(recipe.model, nobody, settings, place.mesh, place.generate, self.dtype)
      weights = state_lib.generator(recipe.player, state).members[0]
      narrow = architecture.count_params(recipe.model) * self.dtype.itemsize / sharding.shards(*_heads(place))
      guess = Guess(0, self.wires.ring("all-gather", place.mesh, recipe.layout.width, narrow, 1))
      lower = functools.partial(_lower, place.mesh, player.decode_weights, weights)
      runs = len(getattr(self.members, name))
      yield Work(f"{name}: copy", "play", place.mesh, lower, 0, 0, size(weights) + 2 * narrow, guess, 0, 1, 1, runs)

  def _playing(self) -> Iterator[Work]:
    game, B = self.config.game, self.config.data.batch
    groups = Players((B, game.attacks), (B * game.attacks_per_seed, game.responses))
    for name, recipe, place, weights, mean, (prompts, group) in zip(
      Players._fields, self.recipes, self.places, self.members, self.completion, groups
    ):
      if name == "defender" or not game.skip_attacker:
        sampling, prompt = recipe.player.sampling, recipe.player.sampling.prompt_buckets[-1]
        yield from self._generating(name, recipe.model, sampling, place, weights, prompts, group, prompt, mean)

  def _judging(self) -> Iterator[Work]:
    """Judges of a step, each kind once, with the questions of all its roles."""
    asked: dict[config_lib.Judge, dict[str, tuple[int, int]]] = {}
    for role, judge in self.judges.items():
      if self.questions.get(role, (0, 0))[0]:
        asked.setdefault(judge, {})[role] = self.questions[role]
    for judge, questions in asked.items():
      count = sum(number for number, _ in questions.values())
      who = "judge" if len(asked) == 1 else f"judge: {' and '.join(questions)}"
      model, longest = hf_config.load_config(judge.model), judge.sampling.prompt_buckets[-1]
      texts = sum(number * (1 + texts) for number, texts in questions.values()) / count
      case = min(longest, FRAME_TOKENS + texts * self.completion.defender)
      weights = [self._judge_weights(judge.model, judge.int8)]
      settings = dataclasses.replace(judge.sampling, slots=judge.batch * judge.votes)
      if judge.readout == "probability":
        settings = dataclasses.replace(settings, max_new_tokens=1)
      mean = settings.max_new_tokens / 2
      prefix = [self._prefix(model, _stacked(weights[0]))]
      place = self.places.judge
      yield from self._generating(who, model, settings, place, weights, count, judge.votes, case, mean, prefix)

  @property
  def questions(self) -> dict[str, tuple[int, int]]:
    """By role, how many a step has, and the texts that each shows beside its query."""
    game, judges, B = self.config.game, self.config.judges, self.config.data.batch
    A, D = game.attacks_per_seed, game.responses
    orders = lambda n: n if judges.protocol == "pointwise" else max(1, n * min(judges.opponents or n, n - 1))
    texts = 1 if judges.protocol == "pointwise" else 2
    return {
      "faithfulness": (0 if game.skip_attacker else B * A, 1),
      "defender": (B * A * orders(D), texts),
      "attacker": (B * orders(A), texts),
    }

  def _asked_in_evaluation(self) -> float:
    """Three games and one without an Attacker, as `evaluate` plays them, every response judged."""
    settings = self.config.evaluation
    plain, rows = 2 * settings.seeds, 2 * settings.seeds * settings.samples
    faithfulness = 3 * rows * ("faithfulness" in self.judges)
    if "evaluation" not in self.judges:
      return faithfulness
    known = panel.roles_of(self.judges["evaluation"])
    return faithfulness + (3 * rows + plain) * sum(share for role, share in RATED.items() if role in known)

  def _generating(
    self,
    who: str,
    model: ModelConfig,
    sampling: Sampling,
    place: Place,
    weights: list[Any],
    prompts: int,
    group: int,
    prompt_tokens: float,
    mean: float,
    prefixes: Sequence[Prefix] = (),
  ) -> Iterator[Work]:
    """Reads prompts and draws from them."""
    stops = np.zeros((8, model.vocab), np.int16)
    engine = Engine(model, sampling, place.mesh, place.generate, self.dtype, self.config.precision.attention, stops)
    batch = prompts if not sampling.slots else min(prompts, sampling.slots // group)
    before = INSTRUCTIONS_TOKENS if prefixes else 0
    drawing = workload.drawing_of(engine, prompts, group, prompt_tokens, mean, before)
    kept, moving = workload.pool_bytes(engine, batch, group, bool(prefixes), stacked=_stacked(weights[0]))

    @functools.cache
    def lowered() -> dict[str, list[Any]]:
      programs, _ = engine.lower(Generator(tuple(weights), (1.0,) * len(weights)), batch, group, prefixes)
      return programs

    def work(what: str, program: str, effort: Effort, trips: float, chunk: int, runs: float) -> Work:
      largest = lambda: max(lowered()[program], key=_elements)
      return Work(f"{who}: {what}", "play", place.mesh, largest, kept, *effort, trips, chunk, runs)

    read = workload.reading(engine, drawing, weights, before + prompt_tokens / 2, moving, self.wires)
    step = workload.stepping(engine, drawing, weights, moving, self.wires)
    yield work("read", "read", read, 1, 1, drawing.reads)
    yield work("draw", "advance", step, drawing.steps, sampling.decode_chunk, 1)

  def _updating(self) -> Iterator[Work]:
    """The joint update, on each mesh that learns."""
    for mesh in dict.fromkeys(recipe.mesh for recipe in self.recipes):
      names = [name for name, recipe in zip(Players._fields, self.recipes) if recipe.mesh == mesh]
      learners = [r for r in self.recipes if r.mesh == mesh and not r.player.frozen]
      batches = Players(*map(self.batch, self.recipes))
      state = TrainState(players=session.on_mesh(self.recipes, mesh, self.state.players), step=self.state.step)
      update = session.jit_update(self.recipes, mesh)
      given = (state, session.on_mesh(self.recipes, mesh, batches), self.bases[mesh])
      efforts = [workload.updating(recipe, self.comparisons(recipe), self.wires) for recipe in learners]
      guess = Guess(
        max((effort.guess.temporary for effort in efforts), default=0),
        [one for effort in efforts for one in effort.guess.collectives],
      )
      flops, moved = sum(effort.flops for effort in efforts), sum(effort.moved for effort in efforts)
      name = " ".join(["update", *names] if len(self.bases) > 1 else ["update"])
      lower = functools.partial(_lower, mesh, update, *given)
      yield Work(name, "update", mesh, lower, 0, flops, moved + 2 * size(state), guess, 0, 1, 1, 1)

  def batch(self, recipe: Recipe) -> PreferenceBatch:
    """What a player learns from in a step, padded as `Session.update` does it; every prompt in the largest bucket."""
    P, S, C, T = self.comparisons(recipe)
    rows = sharding.rows_sharding(recipe.mesh, recipe.layout)
    return PreferenceBatch.abstract(math.ceil(P / recipe.unit) * recipe.unit, S, C, T, rows)

  def comparisons(self, recipe: Recipe) -> tuple[int, int, int, int]:
    """P, S, C, T before padding."""
    game, B = self.config.game, self.config.data.batch
    nodes, group = (B, game.attacks) if recipe is self.recipes.attacker else (B * game.attacks_per_seed, game.responses)
    S, T = recipe.player.sampling.prompt_buckets[-1], recipe.player.sampling.max_new_tokens
    P, C = preferences.shape(self.config.loss, nodes, group, recipe.unit)
    return P, S, C, T

  def _evaluation_pools(self) -> Players[float]:
    count, no_stops = 2 * self.config.evaluation.seeds * self.config.evaluation.samples, np.zeros((1, 1), np.int16)

    def pools(recipe: Recipe, place: Place) -> float:
      engine = Engine(recipe.model, recipe.player.sampling, place.mesh, place.generate, self.dtype, "xla", no_stops)
      return workload.pool_bytes(engine, count, 1, False, recipe.adapted)[0]

    return Players(*map(pools, self.recipes, self.places))


def frozen_zeros(model: ModelConfig, dtype: Any, int8: bool) -> Any:
  """In the form of `frozen.load`."""
  specs = architecture.param_specs(model)
  params = jax.tree.map(lambda spec: jnp.zeros(spec.shape, dtype), specs)
  if int8:
    for name in config_lib.MATRICES:
      spec = specs["layers"][name]
      params["layers"][name] = quantise(params["layers"][name], stacked=spec.stacked, inputs=spec.inputs)
  return params


def _lower(mesh: Mesh, program: Any, *args: Any) -> Any:
  with jax.set_mesh(mesh):
    return program.lower(*args)


def _elements(lowered: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(lowered.in_avals))


def _apart(model: ModelConfig, stacked: Any) -> Any:
  """Layers one by one."""
  where = unstack_shardings(model, jax.tree.map(lambda x: x.sharding, stacked))
  shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(shape, jax.eval_shape(functools.partial(unstack, model), stacked), where)


def _stacked(weights: Any) -> bool:
  return not isinstance(weights["layers"], tuple)


def _without_base(weights: Any) -> Any:
  """The adapters among a player's weights."""
  found = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, Adapted))
  return [(x.down, x.up) for x in found if isinstance(x, Adapted)]


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]]:
  return list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def _heads(place: Place) -> tuple[Mesh, tuple[str, ...]]:
  return place.mesh, place.generate.heads

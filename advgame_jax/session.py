"""A run, bound: a config becomes models, seeds, a judge and the two jitted functions of a step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from advgame_jax import (
  architecture,
  data,
  frozen,
  game,
  hf,
  hf_config,
  lora,
  microworld,
  peft,
  placement,
  policies,
  prompts,
  sharding,
)
from advgame_jax import config as config_lib
from advgame_jax import state as state_lib
from advgame_jax.config import Config
from advgame_jax.data import Seed
from advgame_jax.panel import Panel, load_weights, open_panel
from advgame_jax.placement import Place, Roles
from advgame_jax.policies import LanguageModel
from advgame_jax.scoring import Generator
from advgame_jax.state import TrainState
from advgame_jax.types import Params, Players, Policy, PreferenceBatch, UserError, fold_key
from advgame_jax.update import Bases, Metrics, Recipe, joint_update


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
  """What does not change during a run. Weights are not in it."""

  config: Config
  places: Roles[Place]
  players: Players[LanguageModel]
  recipes: Players[Recipe]
  rules: game.Rules
  train_seeds: list[Seed]
  validation_seeds: list[Seed]

  def load_weights(self, recipe: Recipe) -> Params:
    """What a player starts to learn from, in the training layout: its folder's weights, or adapters."""
    settings, mesh, layout = recipe.player, recipe.mesh, recipe.layout
    if not recipe.adapted:
      return hf.load(settings.model, mesh, layout, recipe.precision.master)
    if settings.lora.start:
      return peft.load(settings.lora.start, recipe.model, settings.lora, mesh, layout)
    where = architecture.shardings(recipe.specs, mesh, layout)
    return jax.jit(functools.partial(lora.init, recipe.specs), out_shardings=where)(jax.random.key(recipe.seed))

  @property
  def devices(self) -> tuple[jax.Device, ...]:
    """Those that a run uses, of all processes."""
    return tuple(dict.fromkeys(device for place in self.places for device in place.mesh.devices.flat))

  @functools.cached_property
  def bases(self) -> dict[Mesh, Bases]:
    """The frozen weights that adapters are on, in the training layout: one copy a mesh and folder."""
    int8, found = self.config.precision.frozen == "int8", dict[Mesh, Any]()
    for recipe in self.recipes:
      there, folder = found.setdefault(recipe.mesh, {}), recipe.player.model
      if recipe.adapted and folder not in there:
        there[folder] = frozen.load(folder, recipe.mesh, recipe.layout, recipe.dtype, int8)
    return found

  @functools.cached_property
  def _decode_base(self) -> Callable[[str, Place], Params]:
    """The same in a decode layout; where the layouts are alike, the very same arrays."""
    int8, models = self.config.precision.frozen == "int8", {r.player.model: r.model for r in self.recipes}

    @functools.cache
    def lay_out(folder: str, place: Place) -> Params:
      where = frozen.shardings(models[folder], place.mesh, place.generate, int8)
      return jax.device_put(self.bases[place.mesh][folder], where)

    return lay_out

  @functools.cached_property
  def panel(self) -> Panel:
    """The judges."""
    return open_panel(self.config, self._judge_weights, self.places.judge)

  def _judge_weights(self, folder: str, place: Place, int8: bool) -> Params:
    """Of a local judge, in its decode layout: the players' base where it is the same, else a copy of its own."""
    if folder in self.bases.get(place.mesh, {}) and int8 == (self.config.precision.frozen == "int8"):
      return self._decode_base(folder, place)
    return load_weights(self.config, folder, place, int8)

  @property
  def told(self) -> dict[str, str]:
    """Hashes of what the Attacker and the judges are told."""
    return {"instructions": self.rules.instructions.version, "rubrics": self.panel.version}

  @property
  def contents(self) -> dict[str, str]:
    """Hashes of what the files say that the settings name, models aside."""
    return {"seeds": data.version([*self.train_seeds, *self.validation_seeds]), **self.told}

  @property
  def versions(self) -> dict[str, str]:
    """What was told, and who judges."""
    return self.told | {"judge": self.panel.names["defender"], "evaluated by": self.panel.names["evaluation"]}

  def _to_play(self, name: str, generator: Generator) -> Generator:
    """A player's weights as they are trained → as they generate."""
    recipe, player, place = (getattr(each, name) for each in (self.recipes, self.players, self.places))

    def lay_out(w: Params) -> Params:
      if not recipe.adapted:
        return player.decode_weights(w)
      return lora.attach(self._decode_base(recipe.player.model, place), player.decode_adapters(w) if w else {})

    return generator._replace(members=tuple(map(lay_out, generator.members)))

  def generators(self, state: TrainState) -> Players[Generator]:
    """The weights that play now, in the decode layout: one resharding copy of each member."""
    settings = (self.config.attacker, self.config.defender)
    trained = map(state_lib.generator, settings, state.players)
    return Players(*map(self._to_play, Players._fields, trained))

  def policies(self, state: TrainState) -> Players[Policy]:
    """Both players as they play now."""
    return Players(*(player.policy(w) for player, w in zip(self.players, self.generators(state))))

  def initial_generator(self, name: str) -> Generator:
    """A player's weights before the run, in the decode layout; read anew, so that none stay between evaluations."""
    recipe = getattr(self.recipes, name)
    fresh = recipe.adapted and not recipe.player.lora.start
    return self._to_play(name, Generator(({} if fresh else self.load_weights(recipe),)))

  def initial_policy(self, name: str) -> Policy:
    """A player as it was before the run."""
    return getattr(self.players, name).policy(self.initial_generator(name))

  def init_state(self) -> TrainState:
    """The state before the first step, in the training layout."""

    def init(recipe: Recipe, where: Any) -> state_lib.PlayerState:
      make = functools.partial(state_lib.init_player, recipe.player, recipe.precision, recipe.optimizer)
      return jax.jit(make, donate_argnums=0, out_shardings=where)(self.load_weights(recipe))

    players = Players(*map(init, self.recipes, self.state_shardings.players))
    return TrainState(players=players, step=sharding.to_global(np.int32(0), self.state_shardings.step))

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array."""
    return abstract_state(self.recipes)

  @functools.cached_property
  def state_shardings(self) -> Any:
    """A `TrainState` of shardings."""
    return state_shardings(self.recipes)

  @property
  def units(self) -> Players[int]:
    """`Recipe.unit` of each player."""
    return Players(*(recipe.unit for recipe in self.recipes))

  @functools.cached_property
  def _jitted_updates(self) -> dict[Mesh, Any]:
    """`joint_update` of the players on each mesh: of both where they share it."""
    return {mesh: jit_update(self.recipes, mesh) for mesh in dict.fromkeys(recipe.mesh for recipe in self.recipes)}

  def update(self, state: TrainState, batch: Players[PreferenceBatch]) -> tuple[TrainState, Metrics]:
    """`joint_update`, jitted and sharded. `state` is donated: it must not be read again.

    Players on meshes of their own are updated at the same time.
    """
    place = lambda batch, recipe: sharding.to_global(
      sharding.pad_leading(batch, recipe.unit),
      sharding.rows_sharding(recipe.mesh, recipe.layout),
    )
    batch, step = Players(*map(place, batch, self.recipes)), np.int32(state.step)
    updated = []
    for mesh, update in self._jitted_updates.items():
      there = TrainState(players=on_mesh(self.recipes, mesh, state.players), step=step)  # type: ignore[arg-type]
      with jax.set_mesh(mesh):
        updated.append(update(there, on_mesh(self.recipes, mesh, batch), self.bases[mesh]))
    states, metrics = zip(*updated)
    players = Players(*(next(filter(None, each)) for each in zip(*(state.players for state in states))))
    return TrainState(players=players, step=states[0].step), {k: v for each in metrics for k, v in each.items()}


def on_mesh(recipes: Players[Recipe], mesh: Mesh, each: Players[Any]) -> Players[Any]:
  """What belongs to the players on a mesh, None in the others' place."""
  return Players(*(x if recipe.mesh == mesh else None for x, recipe in zip(each, recipes)))


def jit_update(recipes: Players[Recipe], mesh: Mesh) -> Any:
  """`joint_update` of the players on a mesh, with what is donated and where it leaves its results."""
  shardings = state_shardings(recipes)
  players = on_mesh(recipes, mesh, shardings.players)
  where = TrainState(players=players, step=sharding.replicated(mesh))  # type: ignore[arg-type]
  update = functools.partial(joint_update, recipes)
  return jax.jit(update, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))


def open_session(config: Config, devices: Sequence[jax.Device] | None = None) -> Session:
  """Reads and checks everything a run needs but its weights.

  Args:
    devices: what the run is laid out over; None is all there are.

  Raises:
    UserError: seeds, model folders or a mesh that cannot be used.
  """
  config = played(config)
  train_seeds = data.load(config.data.train, "train", config.data.duplicates)
  validation_seeds = data.load(config.data.validation, "validation", config.data.duplicates)
  data.check_disjoint(train_seeds, validation_seeds)
  places = placement.place(config.sharding, config.mesh, devices)
  if config.overlap and (used := max(place.mesh.size for place in places)) > 1:
    # Two threads would hand the devices their programs in different orders, and collectives would wait for each other.
    raise UserError(f"overlap is on and the mesh has {used} devices; allowed: one device, or overlap=False")
  players = Players(*(_language_model(config, place, name) for name, place in zip(Players._fields, places)))
  recipes = make_recipes(config, places)
  session = Session(
    config=config,
    places=places,
    players=players,
    recipes=recipes,
    rules=game.Rules(
      config.game,
      load_instructions(config.game.instructions, config.attacker.think),
      Players(config.attacker.think, config.defender.think),
    ),
    train_seeds=train_seeds,
    validation_seeds=validation_seeds,
  )
  session.state_shardings, session.panel  # noqa: B018  (what cannot be is refused before any weight is read)
  _check_prompts(session, [*train_seeds, *validation_seeds])
  return session


def played(config: Config) -> Config:
  """The settings as they are played: an Attacker that is skipped has nothing to learn from."""
  if not config.game.skip_attacker:
    return config
  return dataclasses.replace(config, attacker=dataclasses.replace(config.attacker, frozen=True))


def make_recipes(config: Config, places: Roles[Place]) -> Players[Recipe]:
  """How both players are updated; their folders are read for the architectures alone."""

  def make(player: config_lib.Player, place: Place, number: int) -> Recipe:
    return Recipe(
      model=hf_config.load_config(player.model),
      player=player,
      loss=config.loss,
      precision=config.precision,
      steps=config.steps,
      dtype=policies.compute_dtype(config.precision),
      mesh=place.mesh,
      layout=place.train,
      seed=fold_key(config.seed, number) % 2**31,
    )

  return Players(make(config.attacker, places.attacker, 0), make(config.defender, places.defender, 1))


def _language_model(config: Config, place: Place, name: str) -> LanguageModel:
  settings: config_lib.Player = getattr(config, name)
  if not settings.model:
    raise UserError(f"config.{name}.model is empty; allowed: a Hugging Face folder with weights and tokenizer")
  player = policies.open_model(settings.model, settings.sampling, place.mesh, place.generate, config.precision)
  if settings.lora.start:
    peft.check(settings.lora.start, player.model, settings.lora)
  longest = settings.sampling.prompt_buckets[-1] + settings.sampling.max_new_tokens
  if longest > player.model.max_positions:
    raise UserError(
      f"config.{name}.sampling: the longest prompt and completion take {longest} tokens, the model has "
      f"{player.model.max_positions} positions; allowed: prompt_buckets + max_new_tokens up to that"
    )
  if not settings.frozen:
    placement.check(place, player.model, settings.sampling, name)
  stops = (prompts.PROMPT_END,) if name == "attacker" else ()
  return dataclasses.replace(player, stop_strings=stops, lora=settings.lora)


def load_instructions(named: str, think: bool) -> prompts.Instructions:
  """What Attackers are told: 'standard', 'microworld', or what a folder's files say."""
  if named == "microworld":
    return microworld.INSTRUCTIONS
  return prompts.load("" if named == "standard" else named, think)


def _check_prompts(session: Session, seeds: list[Seed]) -> None:
  """No seed may be longer than the prompt it is played in."""
  if session.config.game.skip_attacker:
    turns, name = [seed.text for seed in seeds], "defender"
  else:
    turns, name = game.attacker_turns(session.rules, data.as_batch(seeds)), "attacker"
  player: LanguageModel = getattr(session.players, name)
  lengths = [player.prompt_length(turn) for turn in turns]
  worst = int(np.argmax(lengths))
  if lengths[worst] > player.longest_prompt:
    raise UserError(
      f"the seed {seeds[worst].text[:60]!r} makes a prompt of {lengths[worst]} tokens, "
      f"config.{name}.sampling.prompt_buckets ends at {player.longest_prompt}; allowed: a bucket of at least "
      f"{math.ceil(lengths[worst] / 64) * 64}, or a shorter seed"
    )


def abstract_state(recipes: Players[Recipe]) -> TrainState:
  """Shapes, dtypes and shardings of a state, without any array."""

  def init() -> TrainState:
    return TrainState(players=Players(*map(_blank_player, recipes)), step=jax.numpy.int32(0))

  describe = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(describe, jax.eval_shape(init), state_shardings(recipes))


def state_shardings(recipes: Players[Recipe]) -> Any:
  """A `TrainState` of shardings."""
  return TrainState(
    players=Players(*map(_player_shardings, recipes)),
    step=sharding.replicated(recipes.attacker.mesh),  # type: ignore[arg-type]
  )


def _blank_player(recipe: Recipe) -> state_lib.PlayerState:
  """A player's state with zeros for weights: for its shapes."""
  zeros = jax.tree.map(lambda spec: jax.numpy.zeros(spec.shape), recipe.specs)
  return state_lib.init_player(recipe.player, recipe.precision, recipe.optimizer, zeros)


def _player_shardings(recipe: Recipe) -> Any:
  """Weights, averages and moments are laid out alike; everything else is replicated."""
  whole = sharding.replicated(recipe.mesh)
  params = architecture.shardings(recipe.specs, recipe.mesh, recipe.layout)
  kept = lambda where: where.with_memory_kind("pinned_host") if recipe.precision.offload else where
  abstract = jax.eval_shape(lambda: _blank_player(recipe))
  moments = lambda: optax.tree.map_params(
    recipe.optimizer, lambda _, where: where, abstract.optimizer, params, transform_non_params=lambda _: whole
  )
  return state_lib.PlayerState(
    params=params,
    ema=jax.tree.map(kept, params) if abstract.ema else {},
    initial=params if abstract.initial else {},
    optimizer=() if recipe.player.frozen else jax.tree.map(kept, moments()),
    bad_steps=whole,  # type: ignore[arg-type]
  )

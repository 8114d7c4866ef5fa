"""A player of a run → a folder of the ecosystem: all its weights, or its adapters as PEFT keeps them."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from advgame_jax import checkpoint, hf, hf_config, lora, peft, placement, session, tokenizer
from advgame_jax import config as config_lib
from advgame_jax.types import Params, UserError
from advgame_jax.update import Recipe

FORMS = ("merged", "adapter")
WEIGHTS = ("ema", "train")


def export(
  workdir: str,
  player: str,
  out: str,
  *,
  weights: str = "",
  form: str = "merged",
  dtype: str = "",
  step: int | None = None,
) -> None:
  """Writes a player of the run in `workdir`, which may be under way, to the new folder `out`.

  Adapters are merged into the base as its folder has it, also where the run kept it in eight bits.

  Args:
    player: 'attacker' or 'defender'.
    weights: 'ema' or 'train'; empty is what the player generates with.
    form: 'merged' is a whole model folder; 'adapter' a PEFT folder, of a player with LoRA.
    dtype: of the weights in the files; empty is that of the folder the player came from, and float32 for adapters.
    step: of the checkpoint; None is the newest.

  Raises:
    UserError: no run or no checkpoint there, weights or a form that the run has not, or a folder that is there already.
  """
  if form not in FORMS:
    raise UserError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
  hf.check_target(out)
  recipe, learnt = read_player(workdir, player, weights, step)
  settings = recipe.player
  if form == "adapter" and not recipe.adapted:
    raise UserError(f"the {player} of {workdir} has no adapters; allowed: --form=merged, or a run with lora.rank > 0")
  if form == "adapter":
    peft.save(out, recipe.model, settings.lora, learnt, settings.model, dtype=dtype or "float32")
    return
  base = hf_config.read(settings.model)
  if recipe.adapted:
    frozen = hf.load(settings.model, dtype=jnp.float32)
    learnt = lora.merge(recipe.model, lora.attach(frozen, lora.scale(learnt, settings.lora)))
  written = dtype or str(base.get("torch_dtype") or base.get("dtype") or "float32")
  generation = pathlib.Path(settings.model) / "generation_config.json"
  kept = hf_config.read_object(generation) if generation.is_file() else {}
  words = tokenizer.load(settings.model)
  hf.save(out, recipe.model, learnt, words, base, base_generation=kept, dtype=written)


def read_player(workdir: str, player: str, weights: str = "", step: int | None = None) -> tuple[Recipe, Params]:
  """How a player of the run in `workdir` is made, and what it has learnt: all its weights, or adapters.

  They are on the host's first device; nothing else of the checkpoint is read.

  Raises:
    UserError: no run or no checkpoint there, or weights that the run has not.
  """
  folder = pathlib.Path(workdir)
  if weights not in ("", *WEIGHTS):
    raise UserError(f"weights is {weights!r}; allowed: {', '.join(WEIGHTS)}")
  config = read_run(workdir)
  recipes = session.make_recipes(config, placement.place("single", config_lib.Mesh(), jax.local_devices()))
  recipe: Recipe = getattr(recipes, player)
  settings = recipe.player
  weights = weights or ("ema" if settings.generator == "ema" and not settings.frozen else "train")
  part = "params" if weights == "train" else weights
  abstract = session.abstract_state(recipes)
  wanted = getattr(getattr(abstract.players, player), part)
  if not wanted:
    raise UserError(f"the {player} of {folder} keeps no moving average; allowed: --weights=train")
  nothing = jax.tree.map(lambda _: checkpoint.PLACEHOLDER, abstract)
  one = dataclasses.replace(getattr(nothing.players, player), **{part: wanted})
  asked = dataclasses.replace(nothing, players=nothing.players._replace(**{player: one}))
  state = checkpoint.Checkpoints(folder, config, read_only=True).read(asked, step)
  return recipe, getattr(getattr(state.players, player), part)


def read_run(workdir: str) -> config_lib.Config:
  """The settings of a run as they are played; UserError where there is none."""
  path = pathlib.Path(workdir) / checkpoint.CONFIG
  if not path.is_file():
    raise UserError(f"{workdir} holds no {checkpoint.CONFIG}; allowed: the --workdir of a run")
  return session.played(checkpoint.read_config(path))

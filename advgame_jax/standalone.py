"""A player by itself: of a run, or a Hugging Face folder. What is evaluated, served, and set on other models."""

import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from advgame_jax import config as config_lib
from advgame_jax import export, frozen, hf_config, lora, placement, policies, prompts, session, sharding
from advgame_jax.config import Precision, Sampling
from advgame_jax.policies import LanguageModel
from advgame_jax.prompts import Instructions
from advgame_jax.scoring import Generator
from advgame_jax.types import Params, UserError

_GLANCE = 2**16  # bytes
log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # what tells the folder of a run from that of a model


@dataclasses.dataclass(frozen=True, eq=False)
class Standalone:
  """A model with its weights, and how it was taught to play."""

  name: str  # of its folder; of a run, with the player's
  model: LanguageModel
  generator: Generator  # laid out as it generates
  think: bool  # it reasons before its answer
  instructions: Instructions  # of an Attacker


def open_player(
  path: str,
  player: str = "defender",
  *,
  weights: str = "",
  step: int | None = None,
  think: bool | None = None,
  instructions: str = "",
  sampling: Sampling | None = None,
  changes: Mapping[str, Any] = MappingProxyType({}),
  precision: Precision | None = None,
) -> Standalone:
  """Reads a player on all devices, each with its own rows.

  Args:
    path: the --workdir of a run, which may be under way, or a Hugging Face folder.
    player: of a run, 'attacker' or 'defender'. It writes an Attacker's stop in any case.
    weights, step: of a run, as in `export.read_player`.
    think: None is as the run has it, and False for a folder.
    instructions: 'standard', 'microworld' or a folder, as `config.game.instructions`; empty is as the run has them.
    sampling: None is as the player samples in the run; the defaults for a folder.
    changes: of the sampling, by its settings' names.

  Raises:
    UserError: there is no model, or it cannot do what is asked.
  """
  precision = precision or Precision()
  if is_run(path):
    recipe, learnt = export.read_player(path, player, weights, step)
    settings, folder, name = recipe.player, recipe.player.model, f"{pathlib.Path(path).name}:{player}"
    told = export.read_run(path).game.instructions
  elif weights or step is not None:
    raise UserError(f"{path} is no run, which weights and step are of; allowed: the --workdir of a run, or neither")
  else:
    hf_config.read(path)
    settings, folder, name, learnt = config_lib.Player(model=path), path, pathlib.Path(path).name, None
    told = "standard"
  settings = dataclasses.replace(
    settings,
    think=settings.think if think is None else think,
    sampling=dataclasses.replace(sampling or settings.sampling, **changes),
  )
  place = placement.place("ddp", config_lib.Mesh()).attacker
  log.info("reading %s", path)
  model = policies.open_model(folder, _fitting(settings.sampling, folder), place.mesh, place.generate, precision)
  stops = (prompts.PROMPT_END,) if player == "attacker" else ()
  model = dataclasses.replace(model, stop_strings=stops, lora=settings.lora)
  params = _to_play(model, settings, learnt)
  taught = session.load_instructions(instructions or told, settings.think)
  return Standalone(name, model, Generator((params,)), settings.think, taught)


def is_run(path: str) -> bool:
  """Whether it is a run's folder, and not a model's."""
  return (pathlib.Path(path) / CHECKPOINTS).is_dir()


def fingerprint(path: str) -> str:
  """What tells weights from others at a glance: a run's newest step; a folder's files' names, sizes and ends."""
  if is_run(path):
    steps = [int(file.name) for file in (pathlib.Path(path) / CHECKPOINTS).iterdir() if file.name.isdigit()]
    return f"step {max(steps, default=0)}"
  digest = hashlib.blake2b(digest_size=6)
  for file in sorted(pathlib.Path(path).glob("*")):
    if file.suffix in (".json", ".safetensors", ".jinja"):
      with file.open("rb") as content:
        head, size = content.read(_GLANCE), content.seek(0, os.SEEK_END)
        content.seek(max(0, size - _GLANCE))
        digest.update(repr((file.name, size)).encode() + head + content.read())
  return digest.hexdigest()


def _fitting(sampling: Sampling, folder: str) -> Sampling:
  """As much of the sampling's lengths as the model has positions for."""
  positions, longest = hf_config.load_config(folder).max_positions, sampling.prompt_buckets[-1]
  if longest + sampling.max_new_tokens <= positions:
    return sampling
  new = min(sampling.max_new_tokens, positions // 2)
  told = (folder, positions, positions - new, new)
  log.warning("%s has %d positions: prompts of at most %d tokens and answers of at most %d", *told)
  buckets = tuple(size for size in sampling.prompt_buckets if size <= positions - new) or (positions - new,)
  return dataclasses.replace(sampling, prompt_buckets=buckets, max_new_tokens=new)


def _to_play(model: LanguageModel, settings: config_lib.Player, learnt: Params | None) -> Params:
  """A folder's weights, or what a run's player has learnt, as they generate."""
  base = lambda: frozen.load(settings.model, model.mesh, model.layout, model.dtype, int8=False)
  if learnt is None:
    return frozen.unstack(model.model, base())
  everywhere: Any = jax.device_put(learnt, sharding.replicated(model.mesh))
  if not settings.lora.rank:
    return model.decode_weights(everywhere)
  return lora.attach(base(), model.decode_adapters(everywhere))

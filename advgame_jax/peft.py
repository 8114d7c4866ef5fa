"""PEFT adapter folder ↔ adapters: adapter_config.json and adapter_model.safetensors."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from advgame_jax import architecture, hf, hf_config, lora, sharding
from advgame_jax.architecture import ModelConfig
from advgame_jax.config import Lora
from advgame_jax.types import Params, UserError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What these adapters are not: each must be absent or have one of these values.
_FIXED: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the base
}
# Fields that change no number, or that are checked elsewhere; any other must be empty.
_HARMLESS = {
  "auto_mapping",
  "base_model_name_or_path",
  "inference_mode",
  "lora_alpha",
  "lora_dropout",
  "megatron_core",
  "peft_version",
  "qalora_group_size",
  "r",
  "revision",
  "target_modules",
  "task_type",
}


def check(folder: str | pathlib.Path, config: ModelConfig, settings: Lora) -> None:
  """Whether `load` will find these adapters, by the files' headers.

  Raises:
    UserError: no adapter folder, adapters of another kind, rank, scale or targets, or of another base.
  """
  folder = pathlib.Path(folder)
  values = _read_config(folder)
  _refuse_fused(config, settings, folder)
  for name, allowed in _FIXED.items():
    if values.get(name) not in (*allowed, None):
      raise UserError(f"{folder / _CONFIG}: {name} is {values[name]!r}; allowed: {allowed[0]!r}")
  if given := sorted(name for name in values.keys() - _FIXED.keys() - _HARMLESS if values[name]):
    raise UserError(f"{folder / _CONFIG}: {given[0]} is {values[given[0]]!r}; allowed: none")
  found = {"rank": values.get("r"), "alpha": values.get("lora_alpha")}
  if (found["rank"], found["alpha"]) != (settings.rank, settings.alpha):
    raise UserError(
      f"{folder} holds adapters of rank {found['rank']} and alpha {found['alpha']}, the settings say "
      f"{settings.rank} and {settings.alpha:g}; allowed: lora.rank and lora.alpha as the adapters have them"
    )
  with _open(folder) as file:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
  specs = jax.tree.leaves(lora.adapter_specs(config, settings))
  expected = {name: spec.hf_shape for spec in specs for name in spec.hf_names}
  if names := sorted(shapes.keys() ^ expected.keys()):
    what = "lacks" if names[0] in expected else "has"
    raise UserError(f"{folder} {what} {names[0]}; allowed: adapters of this base, on the matrices of lora.targets")
  for name, shape in expected.items():
    if shapes[name] != shape:
      raise UserError(
        f"{folder}: {name} has shape {list(shapes[name])}; allowed: {list(shape)}, so these adapt another base"
      )


def load(
  folder: str | pathlib.Path,
  config: ModelConfig,
  settings: Lora,
  mesh: Mesh | None = None,
  layout: sharding.Layout = sharding.LOCAL,
) -> Params:
  """The adapters of a folder, float32.

  Raises:
    UserError: as `check`.
  """
  folder = pathlib.Path(folder)
  check(folder, config, settings)
  with _open(folder) as file:
    shards = dict.fromkeys(file.keys(), file)
    return hf.place(lora.adapter_specs(config, settings), shards, mesh, layout, jnp.float32)


def save(
  folder: str | pathlib.Path,
  config: ModelConfig,
  settings: Lora,
  adapters: Params,
  base: str,
  *,
  dtype: str = "float32",
) -> None:
  """Writes a folder that `peft` loads over `base`; it appears whole or not at all.

  Raises:
    UserError: the folder is there already, the disk refuses, or the family fuses a target into one matrix.
  """
  folder = pathlib.Path(folder).absolute()
  hf.check_target(folder)
  specs = lora.adapter_specs(config, settings)
  _refuse_fused(config, settings, folder)
  modules = sorted({pair["down"].hf_name.split(".")[-3] for pair in specs["layers"].values()})
  partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
  try:
    partial.mkdir(parents=True)
    (partial / _CONFIG).write_text(json.dumps(_config_values(settings, modules, base), indent=2) + "\n")
    tensors = dict(hf.tensors(specs, adapters, jnp.dtype(dtype)))
    safetensors.numpy.save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
    (partial / _WEIGHTS).chmod((partial / _CONFIG).stat().st_mode)  # safetensors makes it the owner's alone
    partial.rename(folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} could not be written ({error}); nothing was changed there") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _refuse_fused(config: ModelConfig, settings: Lora, folder: pathlib.Path) -> None:
  """PEFT adapts a fused matrix as one; ours are several."""
  layers = architecture.param_specs(config)["layers"]
  if fused := [target for target in settings.targets if layers[target].hf_rows != (0, 0)]:
    raise UserError(
      f"{folder}: {config.family} fuses {', '.join(fused)} with others, and PEFT adapts what is fused as one matrix; "
      "allowed: a merged export, or other lora.targets"
    )


def _config_values(settings: Lora, modules: list[str], base: str) -> dict[str, Any]:
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": settings.rank,
    "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
    "lora_dropout": 0.0,
    "target_modules": modules,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def _read_config(folder: pathlib.Path) -> Mapping[str, Any]:
  path = folder / _CONFIG
  if not path.is_file():
    raise UserError(f"{folder} has no {_CONFIG}; allowed: a PEFT adapter folder")
  return hf_config.read_object(path)


def _open(folder: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(folder / _WEIGHTS, framework="numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{folder / _WEIGHTS} is missing or cut short ({error}); allowed: a whole one") from error

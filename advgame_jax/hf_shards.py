"""The safetensors shards of a Hugging Face folder: found, opened, and held against what config.json describes.

Only headers are read, but for a tied head that is stored beside its embedding.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors

from advgame_jax import architecture
from advgame_jax.architecture import ModelConfig
from advgame_jax.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEAD = "lm_head.weight"
_PYTORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
_FLOATS = {"F64", "F32", "F16", "BF16"}


def open_all(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """Tensor name → the open shard that holds it; `stack` closes them.

  Raises:
    UserError: no weights, a shard missing or cut short, or shards that are not of one model.
  """
  shards: dict[str, Any] = {}
  places: dict[str, str] = {}
  index = _read_index(folder)
  for path in _shard_paths(folder, index):
    try:
      shard = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(f"{path} is cut short or no safetensors file ({error}); allowed: a whole one") from error
    if twice := sorted(shards.keys() & set(shard.keys())):
      raise UserError(
        f"{folder} has {_some(twice)} in {places[twice[0]]} and in {path.name}; allowed: shards of one model, each "
        "tensor in one of them"
      )
    shards |= dict.fromkeys(shard.keys(), shard)
    places |= dict.fromkeys(shard.keys(), path.name)
  if strayed := sorted(name for name, file in index.items() if places.get(name, file) != file):
    raise UserError(
      f"{folder}: {strayed[0]} should be in {index[strayed[0]]}, as {INDEX} says, and is in {places[strayed[0]]}; "
      "allowed: the shards and the index of one model"
    )
  return shards


def _read_index(folder: pathlib.Path) -> dict[str, str]:
  """Tensor name → file name; empty where one file holds all."""
  path = folder / INDEX
  if not path.is_file():
    return {}
  try:
    index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if not index or not all(isinstance(name, str) for name in index.values()):
      raise ValueError("its weight_map does not map tensors to files")
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{path} is no index of shards ({error!r})") from error
  return dict(index)


def _shard_paths(folder: pathlib.Path, index: Mapping[str, str]) -> list[pathlib.Path]:
  names = sorted(set(index.values()))
  if names:
    if missing := [name for name in names if not (folder / name).is_file()]:
      raise UserError(f"{folder} lacks {_some(missing)}, which {INDEX} names; allowed: all of its {len(names)} shards")
    if SINGLE not in names and (folder / SINGLE).is_file():
      raise UserError(f"{folder} has both {SINGLE} and {INDEX} of other shards; allowed: the weights once")
    return [folder / name for name in names]
  if (folder / SINGLE).is_file():
    return [folder / SINGLE]
  if pickled := [name for name in _PYTORCH if (folder / name).is_file()]:
    raise UserError(
      f"{folder} has its weights in {pickled[0]} only, which can run code when read; allowed: safetensors, "
      "as save_pretrained(safe_serialization=True) writes"
    )
  raise UserError(f"{folder} has no weights; allowed: {SINGLE}, or shards with {INDEX}")


def check(config: ModelConfig, shards: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Every parameter is there, in its shape, and nothing else is.

  Raises:
    UserError: one is missing, of another shape or no float; or there is one that config.json does not describe.
  """
  specs = architecture.param_specs(config)
  shapes = {name: spec.hf_file_shape for spec in jax.tree.leaves(specs) for name in spec.hf_names}
  extra = {name for name in shards.keys() - shapes.keys() if not name.endswith("rotary_emb.inv_freq")}
  if missing := sorted(shapes.keys() - shards.keys()):
    others = f" and has others, as {_some(sorted(extra))}" if extra else ""
    raise UserError(f"{folder} lacks the weights {_some(missing)}{others}; allowed: all that config.json describes")
  for name, shape in shapes.items():
    stored = shards[name].get_slice(name)
    if stored.get_dtype() not in _FLOATS:
      raise UserError(f"{folder}: {name} is stored as {stored.get_dtype()}; allowed: {', '.join(sorted(_FLOATS))}")
    if tuple(stored.get_shape()) != shape:
      raise UserError(f"{folder}: {name} has shape {stored.get_shape()}; allowed: {list(shape)}, as config.json says")
  if config.tied and _HEAD in extra:
    embed = specs["embed"].hf_name
    if not _equal(*(shards[name].get_slice(name) for name in (_HEAD, embed))):
      raise UserError(f"{folder}: {_HEAD} differs from {embed}, yet config.json ties them; allowed: equal, or untied")
    extra.remove(_HEAD)
  if extra:
    raise UserError(f"{folder} has weights that config.json does not describe: {_some(sorted(extra))}; allowed: none")


def _equal(left: Any, right: Any, rows: int = 4096) -> bool:
  """Whether two tensors hold the same, a few rows at a time."""
  total, *_ = left.get_shape()
  parts = (slice(i, min(i + rows, total)) for i in range(0, total, rows))  # a slice may not end beyond
  return left.get_shape() == right.get_shape() and all(np.array_equal(left[part], right[part]) for part in parts)


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

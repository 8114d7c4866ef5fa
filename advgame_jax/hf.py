"""Hugging Face folder ↔ parameters: config.json, safetensors shards, tokenizer.

Hugging Face stores one matrix a layer, [outputs, inputs]; here layers are stacked and a matrix is [inputs, outputs],
each side split into its dimensions (`architecture.ParamSpec` knows both). Reading goes tensor by tensor: each device's
own slice, in the file's dtype, is taken from the mapped file and put in its place on the device.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from advgame_jax import architecture, hf_config, hf_shards, sharding
from advgame_jax.architecture import ModelConfig, ParamSpec
from advgame_jax.hf_config import load_config as load_config  # part of this module's face
from advgame_jax.tokenizer import Tokenizer
from advgame_jax.types import Array, Params, UserError


def load(
  folder: str | pathlib.Path,
  mesh: Mesh | None = None,
  layout: sharding.Layout = sharding.LOCAL,
  dtype: Any = jnp.float32,
) -> Params:
  """The parameters of a folder, each device's slice read for itself; without a mesh, on the default device.

  Raises:
    UserError: weights missing, cut short, unexpected, of another shape than config.json says, or not divisible over
      the mesh.
  """
  folder = pathlib.Path(folder)
  config = load_config(folder)
  specs = architecture.param_specs(config)
  with contextlib.ExitStack() as stack:
    shards = hf_shards.open_all(folder, stack)
    hf_shards.check(config, shards, folder)
    return place(specs, shards, mesh, layout, dtype)


def check(folder: str | pathlib.Path, tokenizer: Tokenizer | None = None) -> None:
  """Whether `load` will find its weights, by the files' headers, and the tokenizer's ids in them.

  Raises:
    UserError: weights missing, cut short, unexpected, or of another shape than config.json says; a tokenizer larger
      than the embedding.
  """
  folder = pathlib.Path(folder)
  config = load_config(folder)
  if tokenizer and tokenizer.vocab_size > config.vocab:
    raise UserError(
      f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the embedding {config.vocab}; "
      "allowed: a tokenizer of the same model"
    )
  with contextlib.ExitStack() as stack:
    hf_shards.check(config, hf_shards.open_all(folder, stack), folder)


def save(
  folder: str | pathlib.Path,
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer | None = None,
  base_config: Mapping[str, Any] | None = None,
  *,
  base_generation: Mapping[str, Any] | None = None,
  dtype: str = "float32",
  max_shard_bytes: float = 5e9,
  overwrite: bool = False,
) -> None:
  """Writes a folder that transformers loads; it appears whole or not at all.

  Every process of a run must call this; the first one writes.

  Args:
    base_config: config.json of the model this came from; what the architecture does not decide is kept.
    base_generation: its generation_config.json, which is kept but for the tokenizer's ids.
    dtype: of the weights in the file: float32, bfloat16 or float16.
    overwrite: replace the model folder that may be there.

  Raises:
    UserError: the folder is there already (with `overwrite`: and is no model's), or the disk refuses.
  """
  folder = pathlib.Path(folder).absolute()
  check_target(folder, overwrite)
  partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
  try:
    if jax.process_index() == 0:
      partial.mkdir(parents=True)
      _write_json(partial / "config.json", _config_values(config, base_config, tokenizer, dtype))
      generation = _generation_values(base_config or {}, base_generation or {}, tokenizer)
      _write_json(partial / "generation_config.json", generation)
      if tokenizer:
        tokenizer.save(partial)
    _write_weights(partial, config, params, jnp.dtype(dtype), max_shard_bytes)
    if jax.process_index() == 0:
      _put_in_place(partial, folder)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} could not be written ({error}); nothing was changed there") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: str | pathlib.Path, overwrite: bool = False) -> None:
  """Whether `save` may write there, before the work of making what it writes.

  Raises:
    UserError: the folder is there already (with `overwrite`: and is no model's).
  """
  folder = pathlib.Path(folder)
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return
  if not overwrite:
    raise UserError(f"{folder} is there already; allowed: a new folder")
  if not (folder / "config.json").is_file():
    raise UserError(f"{folder} is there already and is no model's; allowed: a new folder, or a model's to replace")


def place(specs: Params, shards: Mapping[str, Any], mesh: Mesh | None, layout: sharding.Layout, dtype: Any) -> Params:
  """The parameters of a table, read from open files by tensor name; the files are known to be right."""
  return jax.tree.map(lambda spec: _place(spec, shards, mesh, layout, jnp.dtype(dtype)), specs)


def _place(
  spec: ParamSpec, shards: Mapping[str, Any], mesh: Mesh | None, layout: sharding.Layout, dtype: np.dtype
) -> jax.Array:
  """One parameter, read tensor by tensor.

  A player with a weight that is not finite says nothing valid, and would be played to the end of a run without a word.
  """
  where: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  stored_where = replicated = where
  if mesh is not None:
    where = sharding.named(mesh, layout, spec.axes, spec.shape, spec.hf_name)
    stored_where = sharding.named(mesh, layout, spec.hf_axes, spec.hf_shape, spec.hf_name)
    replicated = sharding.replicated(mesh)
  whole = jnp.zeros(spec.shape, dtype, device=where)
  put = _jitted_put(spec, where, replicated)
  for place, name in zip(np.ndindex(spec.shape[: spec.stacked]), spec.hf_names, strict=True):
    stored = jax.make_array_from_callback(spec.hf_shape, stored_where, _slices(spec, name, shards))
    whole, is_finite = put(whole, stored, np.array(place, np.int32))
    if not is_finite:  # and waited for: reading must not run ahead of placing, or slices pile up
      raise UserError(f"the weights {name} hold numbers that are not finite in {dtype}; allowed: finite ones")
  return whole


@functools.cache
def _jitted_put(spec: ParamSpec, where: Any, replicated: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Kept, for both players are often of one architecture."""
  return jax.jit(functools.partial(_put, spec), donate_argnums=0, out_shardings=(where, replicated))


def _put(spec: ParamSpec, whole: jax.Array, stored: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The parameter with one of the files' tensors at its place in the stacked dimensions; whether that is finite."""
  stored = stored.astype(whole.dtype)
  part = stored.T if spec.inputs else stored
  part = part.reshape((1,) * spec.stacked + spec.shape[spec.stacked :])
  starts = list(jnp.pad(place, (0, whole.ndim - spec.stacked)))
  # As integers: a CPU computes bfloat16 in float32, and would convert all of the parameter there and back.
  bits = jnp.dtype(f"uint{8 * whole.dtype.itemsize}")
  whole = jax.lax.dynamic_update_slice(whole.view(bits), part.view(bits), starts).view(whole.dtype)
  return whole, jnp.isfinite(stored).all()


def _slices(spec: ParamSpec, name: str, shards: Mapping[str, Any]) -> Callable[[Any], np.ndarray]:
  """Index → that slice of a tensor; replicas ask for the same one again, and it is read once."""
  read = functools.cache(functools.partial(_read, spec, name, shards))
  return lambda index: read(*(part.indices(size)[:2] for part, size in zip(index, spec.hf_shape)))


def _read(spec: ParamSpec, name: str, shards: Mapping[str, Any], *bounds: tuple[int, int]) -> np.ndarray:
  """A slice of one tensor, in its own dtype."""
  (start, stop), *others = bounds
  first, _ = spec.hf_rows
  return shards[name].get_slice(name)[(slice(first + start, first + stop), *(slice(*bound) for bound in others))]


def tensors(specs: Params, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
  """Parameters as Hugging Face's tensors, one on the host at a time."""
  parts: dict[str, list[tuple[ParamSpec, Array, tuple[int, ...]]]] = {}
  for spec, value in zip(jax.tree.leaves(specs), jax.tree.leaves(params), strict=True):
    for name, place in zip(spec.hf_names, np.ndindex(spec.shape[: spec.stacked]), strict=True):
      parts.setdefault(name, []).append((spec, value, place))
  for name, group in parts.items():
    group.sort(key=lambda part: part[0].hf_rows)
    stored = [_stored(spec, value[place] if place else value, dtype) for spec, value, place in group]
    yield name, np.ascontiguousarray(stored[0] if len(stored) == 1 else np.concatenate(stored))


def _stored(spec: ParamSpec, value: Array, dtype: Any) -> np.ndarray:
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    value = multihost_utils.process_allgather(value, tiled=True)
  whole = np.asarray(value).astype(dtype)
  return whole.reshape(spec.hf_shape[::-1]).T if spec.inputs else whole.reshape(spec.hf_shape)


def _write_weights(folder: pathlib.Path, config: ModelConfig, params: Params, dtype: Any, max_bytes: float) -> None:
  """safetensors shards in the order of the parameters, and their index where there are several."""
  specs = architecture.param_specs(config)
  groups: list[list[str]] = []
  pending: dict[str, np.ndarray] = {}

  def flush() -> None:
    if jax.process_index() == 0:
      path = folder / f"{len(groups)}.part"
      safetensors.numpy.save_file(pending, path, metadata={"format": "pt"})
      path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it the owner's alone
    groups.append(list(pending))
    pending.clear()

  total = 0
  for name, tensor in tensors(specs, params, dtype):
    if pending and sum(other.nbytes for other in pending.values()) + tensor.nbytes > max_bytes:
      flush()
    pending[name] = tensor
    total += tensor.nbytes
  flush()
  if jax.process_index() == 0:
    _name_shards(folder, groups, total)


def _name_shards(folder: pathlib.Path, groups: Sequence[Sequence[str]], total: int) -> None:
  if len(groups) == 1:
    (folder / "0.part").rename(folder / hf_shards.SINGLE)
    return
  files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
  for i, file in enumerate(files):
    (folder / f"{i}.part").rename(folder / file)
  weight_map = {name: file for file, names in zip(files, groups) for name in names}
  _write_json(folder / hf_shards.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config_values(
  config: ModelConfig, base: Mapping[str, Any] | None, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, Any]:
  values = hf_config.to_values(config, base) | {"torch_dtype": dtype}
  values.pop("dtype", None)  # transformers 5's name for torch_dtype; 4 reads the old one only, 5 both
  # An architecture of ours has no first token; left out, transformers would take it to be id 1.
  return {"bos_token_id": None} | values | (_token_ids(tokenizer) if tokenizer else {})


def _generation_values(
  base: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
  kept = {name: base[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if base.get(name) is not None}
  return kept | dict(generation) | (_token_ids(tokenizer) if tokenizer else {})


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
  stops = list(tokenizer.stop_ids)
  return {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": tokenizer.pad_id}


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _put_in_place(partial: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames `partial` to `folder`; what was there steps aside until that is done."""
  old = partial.with_suffix(".old")
  if folder.exists():
    folder.rename(old)
  try:
    partial.rename(folder)
  except OSError:
    if old.exists():
      old.rename(folder)
    raise
  shutil.rmtree(old, ignore_errors=True)

"""What settings are: frozen groups of values, each with its default, its check and what it does.

A wrong name, type or value is refused in one sentence that lists what is allowed.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from advgame_jax.types import UserError

SettingsT = TypeVar("SettingsT", bound="Settings")


def setting(
  default: Any,
  doc: str,
  *,
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
  below: float | None = None,
  identity: bool = True,
) -> Any:
  """A field with its check. `identity=False`: may differ between a run and its resumption."""
  checks = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
  return dataclasses.field(default=default, metadata={"doc": doc, "identity": identity, **checks})


def part(cls: type[SettingsT], **changes: Any) -> SettingsT:
  """A nested group of settings, whose defaults a config file may change."""
  return dataclasses.field(default_factory=lambda: cls(**changes))


class Settings:
  """Base of every group: checks each value against its annotation and bounds when it is made."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      _check(field, getattr(self, field.name))


def _allowed(annotation: Any) -> str:
  if typing.get_origin(annotation) is Literal:
    return "one of " + ", ".join(repr(value) for value in typing.get_args(annotation))
  if typing.get_origin(annotation) is tuple:
    return f"a tuple of {typing.get_args(annotation)[0].__name__}"
  if isinstance(annotation, types.UnionType):
    return f"{_allowed(typing.get_args(annotation)[0])}, or none"
  if issubclass(annotation, Settings):
    return f"the settings {', '.join(field.name for field in dataclasses.fields(annotation))}"
  return {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a string"}[annotation.__name__]


def _has_type(annotation: Any, value: Any) -> bool:
  if typing.get_origin(annotation) is Literal:
    return value in typing.get_args(annotation)
  if typing.get_origin(annotation) is tuple:
    return isinstance(value, tuple) and all(_has_type(typing.get_args(annotation)[0], v) for v in value)
  if isinstance(annotation, types.UnionType):
    return any(_has_type(kind, value) for kind in typing.get_args(annotation))
  if annotation is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return isinstance(value, annotation) and not (annotation is int and isinstance(value, bool))


def _check(field: dataclasses.Field, value: Any) -> None:
  if not _has_type(field.type, value):
    raise UserError(f"{field.name} is {value!r}; allowed: {_allowed(field.type)}")
  tests = (
    ("at_least", lambda limit, v: v >= limit, "at least"),
    ("above", lambda limit, v: v > limit, "above"),
    ("at_most", lambda limit, v: v <= limit, "at most"),
    ("below", lambda limit, v: v < limit, "below"),
  )
  for key, holds, words in tests:
    limit = field.metadata.get(key)
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    if limit is not None and not all(holds(limit, v) for v in values):
      raise UserError(f"{field.name} is {value!r}; allowed: {words} {limit}")


def from_dict(values: Any, base: SettingsT, path: str) -> Any:
  """The frozen tree of a ConfigDict or nested dict; what it does not say is as in `base`. `path` names it in errors.

  Raises:
    UserError: a name that does not exist, or a value that its setting does not allow.
  """
  fields = {field.name: field for field in dataclasses.fields(base)}  # type: ignore[arg-type]
  arguments = {}
  for name, value in values.items():
    if name not in fields:
      raise UserError(unknown_setting(f"{path}.{name}", fields))
    annotation = fields[name].type
    if isinstance(annotation, type) and issubclass(annotation, Settings) and hasattr(value, "items"):
      value = from_dict(value, getattr(base, name), f"{path}.{name}")
    elif typing.get_origin(annotation) is tuple and isinstance(value, list):
      value = tuple(value)
    arguments[name] = value
  try:
    return dataclasses.replace(base, **arguments)  # type: ignore[type-var]
  except UserError as error:
    raise UserError(f"{path}.{error}") from None


def unknown_setting(path: str, names: Any) -> str:
  """The sentence for a setting that does not exist, with the nearest name first."""
  near = difflib.get_close_matches(path.rsplit(".", 1)[-1], list(names), n=1)
  guess = f": did you mean {near[0]}?" if near else ";"
  return f"there is no setting {path}{guess} allowed here: {', '.join(sorted(names))}"


def flatten(config: Settings, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
  """(dotted name, value, whether it is part of the run's identity) of every setting."""
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    value = getattr(config, field.name)
    if isinstance(value, Settings):
      yield from flatten(value, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}", value, field.metadata["identity"]

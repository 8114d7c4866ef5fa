"""What every program shares: flags, one sentence for what a user can mend, and an exit code."""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import re
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from advgame_jax import config as config_lib
from advgame_jax.settings import SettingsT, flatten
from advgame_jax.types import UserError

USER_ERROR = 2  # exit code

flags.disclaim_key_flags()  # flags that are defined here are the program's, and in its --help


def define_config(default: str) -> Callable[[], config_lib.Config]:
  """Adds `--config=file.py` and `--config.name=value`; returns what reads them once flags are parsed."""
  with _flags_refused(sys.argv):  # the default is read with the changes at once
    holder = config_flags.DEFINE_config_file("config", default, "A file of configs/, and settings to change in it.")

  def read() -> config_lib.Config:
    with _flags_refused(sys.argv):  # a file that could not be read fails when it is looked at
      values = dict(holder.value.items())
    return config_lib.from_config_dict(values)

  return read


def define_settings(cls: type[SettingsT]) -> Callable[[], SettingsT]:
  """Adds a flag for each setting, which documents it; returns what reads them once flags are parsed.

  Raises:
    UserError: by the reader, a value that its setting does not allow.
  """
  holders: dict[str, Any] = {}
  for field in dataclasses.fields(cls):  # type: ignore[arg-type]
    holders[field.name] = _maker(field.type)(field.name, field.default, field.metadata["doc"])

  def read() -> SettingsT:
    values = {name: holder.value for name, holder in holders.items()}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

  return read


def _maker(annotation: Any) -> Callable[..., Any]:
  """What defines a flag of this type; of `x | None`, one of x."""
  origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is tuple:
    return flags.DEFINE_multi_string
  if origin is typing.Literal:
    return flags.DEFINE_string
  kinds: dict[Any, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
  }
  return kinds[inner[0] if inner else annotation]


def run(main: Callable[[], None]) -> None:
  """Parses flags and runs `main`. A `UserError` or a full disk ends in one sentence and exit code 2."""
  jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", _cache_folder()))

  def guarded(_: Sequence[str]) -> None:
    _log_our_own()
    threading.excepthook = _failed_thread
    try:
      main()
    except UserError as error:
      _refuse(str(error))
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      _refuse(f"the disk is full at {error.filename}; what was saved before is whole: free room and run again")

  app.run(guarded, flags_parser=_parse_flags)


def _log_our_own() -> None:
  """Our lines bare, from INFO on; of the libraries only what failed."""
  absl_logging.set_verbosity(absl_logging.ERROR)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(message)s"))
  ours = logging.getLogger("advgame_jax")
  ours.handlers, ours.propagate = [handler], False
  ours.setLevel(logging.INFO)


def _failed_thread(failure: threading.ExceptHookArgs) -> None:
  """What writes in the background prints no trace of a full disk: the main thread hears of it and says so."""
  if os.strerror(errno.ENOSPC) not in str(failure.exc_value):
    threading.__excepthook__(failure)


def _cache_folder() -> str:
  return os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "advgame_jax", "xla")


def _parse_flags(arguments: Sequence[str]) -> list[str]:
  with _flags_refused(arguments):
    rest = flags.FLAGS([_with_underscores(argument) for argument in arguments])
  if len(rest) > 1:
    _refuse(f"{rest[1]!r} is no flag; allowed: --name=value")
  return rest


def _with_underscores(argument: str) -> str:
  """--target-url=… as --target_url=…, if there is such a flag."""
  dashes, name, value = re.match(r"(-{0,2})([^=]*)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
  plain = name.replace("-", "_")
  if plain.startswith("no_") and plain.removeprefix("no_") in flags.FLAGS:
    plain = f"no{plain.removeprefix('no_')}"
  known = plain in flags.FLAGS or plain.removeprefix("no") in flags.FLAGS
  return f"{dashes}{plain}{value}" if dashes and known else argument


@contextlib.contextmanager
def _flags_refused(arguments: Sequence[str]) -> Iterator[None]:
  """Turns what flags raise into a sentence."""
  try:
    yield
  except (AttributeError, KeyError, flags.Error, TypeError, ValueError, OSError) as error:
    said = str(error)
    if "Traceback" in said:  # of a config file, which flags quote whole
      said = said.strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    _refuse(_no_file(arguments) or _of_a_setting(arguments, said) or said)


def _no_file(arguments: Sequence[str]) -> str:
  """What there is to say of a --config that is not there; "" of one that is."""
  given = [match[1] for argument in arguments if (match := re.match(r"--?config=([^:]+)", argument))]
  if not given or pathlib.Path(given[-1]).exists():
    return ""
  return f"there is no {given[-1]}; allowed: a file such as configs/microworld.py, behind a colon what it takes"


def _of_a_setting(arguments: Sequence[str], said: str) -> str:
  """What the settings themselves say to the `--config.…` that flags did not take; "" where it was none."""
  known = {f"config.{name}" for name, _, _ in flatten(config_lib.Config())}
  given = [argument.lstrip("-").partition("=")[::2] for argument in arguments]
  wrong = re.findall(r"^flag --(config\..*?)=(.*?): ", said) or [
    (name, value) for name, value in given if name not in known
  ]
  for name, value in wrong:
    root, *path = name.split(".")
    if root == "config" and path:
      try:
        config_lib.from_config_dict(functools.reduce(lambda inner, part: {part: inner}, reversed(path), value))
      except UserError as error:
        return str(error)
  return ""


def _refuse(sentence: str) -> None:
  print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
  sys.exit(USER_ERROR)

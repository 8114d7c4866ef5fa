"""What every program shares: flags, one sentence for what a user can mend, and an exit code."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from advgame_jax import config as config_lib
from advgame_jax.types import UserError

USER_ERROR = 2  # exit code


def define_config(default: str) -> Callable[[], config_lib.Config]:
  """Adds `--config=file.py` and `--config.name=value`; returns what reads them once flags are parsed."""
  holder = config_flags.DEFINE_config_file("config", default, "A file of configs/, and settings to change in it.")
  return lambda: config_lib.from_config_dict(holder.value)


def run(main: Callable[[], None]) -> None:
  """Parses flags and runs `main`. A `UserError` or a full disk ends in one sentence and exit code 2."""
  jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", _cache_folder()))

  def guarded(_: Sequence[str]) -> None:
    _log_our_own()
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


def _cache_folder() -> str:
  return os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "advgame_jax", "xla")


def _parse_flags(arguments: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(arguments)
  except AttributeError as error:  # a `--config.…` that is no setting
    _refuse(_unknown_setting(arguments, error))
  except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
    _refuse(" ".join(str(error).split()))
  if len(rest) > 1:
    _refuse(f"{rest[1]!r} is no flag; allowed: --name=value")
  return rest


def _unknown_setting(arguments: Sequence[str], error: AttributeError) -> str:
  known = {name: value for name, value, _ in config_lib.flatten(config_lib.Config())}
  for argument in arguments:
    path = argument.lstrip("-").split("=", 1)[0]
    if path.startswith("config.") and (name := path.removeprefix("config.")) not in known:
      group = name.rsplit(".", 1)[0] + "." if "." in name else ""
      siblings = [n.removeprefix(group) for n in known if n.startswith(group)]
      return config_lib.unknown_setting(path, siblings or known)
  return str(error)


def _refuse(sentence: str) -> None:
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  sys.exit(USER_ERROR)

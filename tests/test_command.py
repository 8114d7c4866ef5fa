"""What every program shares: one sentence on stderr and exit code 2, and quiet logs. In-process, like a program."""

import dataclasses
import errno
import logging
import os
import sys
import threading
from typing import Literal

import pytest
from absl import flags
from absl import logging as absl_logging

from advgame_jax import command
from advgame_jax import config as config_lib
from advgame_jax import settings as settings_lib
from advgame_jax.types import UserError


@pytest.fixture
def run(monkeypatch):
  """Runs a program with these flags as `launch/` does; what it leaves behind in the process is undone."""
  ours = logging.getLogger("advgame_jax")
  before = set(flags.FLAGS), flags.FLAGS["verbosity"].value, dict(vars(ours)), logging.root.level
  monkeypatch.setattr("absl.app.run", lambda main, flags_parser: main(flags_parser(sys.argv)))
  monkeypatch.setattr("jax.config.update", lambda *_: None)
  monkeypatch.setattr("threading.excepthook", threading.excepthook)

  def program(*arguments, main=lambda config: None, default=None):
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    flags.DEFINE_string("workdir", None, "Folder.", required=True)
    read = command.define_config(str(default)) if default else lambda: None
    command.run(lambda: main(read()))

  yield program
  for name in set(flags.FLAGS) - before[0]:
    delattr(flags.FLAGS, name)
  flags.FLAGS["verbosity"].value = before[1]
  vars(ours).update(before[2])
  logging.root.setLevel(before[3])


@pytest.fixture
def refused(run, capsys):
  """Runs what must be refused; returns the sentence."""

  def sentence(*arguments, **program):
    with pytest.raises(SystemExit) as exit:
      run(*arguments, **program)
    said = capsys.readouterr()
    assert exit.value.code == 2 and not said.out
    assert said.err.startswith("error: ") and said.err.index("\n") == len(said.err) - 1
    return said.err[len("error: ") : -1]

  return sentence


@pytest.fixture
def default(tmp_path):
  """A config file: all defaults but the steps."""
  path = tmp_path / "plain.py"
  path.write_text(
    "from advgame_jax import config\ndef get_config():\n  return config.as_config_dict(config.Config(steps=9))\n"
  )
  return path


def raising(error):
  def main(_):
    raise error

  return main


def test_flags_change_the_config_file_s_values(run, default):
  seen = []
  run("--workdir=x", "--config.loss.beta=0.3", "--config.data.train=('a','b')", main=seen.append, default=default)
  assert seen == [config_lib.Config(steps=9, loss=config_lib.Loss(beta=0.3), data=config_lib.Data(train=("a", "b")))]


@pytest.mark.parametrize(
  ("argument", "sentence"),
  [
    ("--config.loss.betta=1", "there is no setting config.loss.betta: did you mean beta? allowed here: baseline, "),
    ("--config.los.beta=1", "there is no setting config.los: did you mean loss? allowed here: attacker, "),
    ("--config.loss.beta.x=1", "config.loss.beta is {'x': '1'}; allowed: a number"),
    ("--config.=1", "there is no setting config.; allowed here: attacker, "),
    ("--config.steps=many", "config.steps is 'many'; allowed: a whole number"),
    ("--config.game.attacks=1.5", "config.game.attacks is '1.5'; allowed: a whole number"),
    ("--config.loss.beta=", "config.loss.beta is ''; allowed: a number"),
    ("--config.game.skip_attacker=maybe", "config.game.skip_attacker is 'maybe'; allowed: True or False"),
    ("--config.loss=dpo", "config.loss is 'dpo'; allowed: the settings kind, beta, "),
    ("--config.loss.kind=ppo", "config.loss.kind is 'ppo'; allowed: one of 'dpo', 'ipo', 'grpo'"),
    ("--config.steps=0", "config.steps is 0; allowed: at least 1"),
    ("--config=nowhere.py", "there is no nowhere.py; allowed: a file such as"),
    ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ("runs/x", "'runs/x' is no flag; allowed: --name=value"),
  ],
)
def test_a_wrong_flag_is_refused_with_what_is_allowed(refused, default, argument, sentence):
  nothing = lambda _: pytest.fail("the program ran")
  assert sentence in refused("--workdir=x", argument, "--config.seed=3", main=nothing, default=default)


def test_the_argument_at_fault_is_named_whatever_others_there_are(refused, default):
  arguments = ("--config.data.train=a:b", "--config.loss.kind=ipo", "--config.steps", "1: 2", "--config.seed=3")
  assert refused("--workdir=x", *arguments, default=default).startswith("config.steps is '1'; allowed: a whole number")


def test_a_missing_flag_is_named(refused):
  assert "--workdir must have a value" in refused()


def test_a_missing_value_is_named(refused, default):
  assert refused("--workdir=x", "--config.steps", default=default) == "Missing value for flag --config.steps"


@pytest.mark.parametrize(("file", "sentence"), [("/", "Is a directory: '/'"), ("", "Path to config file is an empty")])
def test_a_config_file_that_is_none_is_refused_when_it_is_read(refused, default, file, sentence):
  assert sentence in refused("--workdir=x", f"--config={file}", default=default)


def test_what_a_config_file_raises(refused, tmp_path):
  file = tmp_path / "wrong.py"
  file.write_text("from advgame_jax import types\ndef get_config():\n  raise types.UserError('a card; allowed: b')\n")
  assert refused("--workdir=x", default=file) == "a card; allowed: b"


def test_what_a_user_can_mend_is_one_sentence(refused):
  assert (
    refused("--workdir=x", main=raising(UserError("no weights\n  in x; allowed: y"))) == "no weights in x; allowed: y"
  )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(refused, code):
  said = refused("--workdir=x", main=raising(OSError(code, os.strerror(code), "runs/x/scalars.jsonl")))
  assert said.startswith("the disk is full at runs/x/scalars.jsonl; ")


@pytest.mark.parametrize(
  ("error", "shown"), [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), False), (ValueError("a bug"), True)]
)
def test_a_full_disk_met_in_the_background_has_no_trace(run, capsys, error, shown):
  def main(_):
    thread = threading.Thread(target=raising(error), args=(None,))
    thread.start()
    thread.join()

  run("--workdir=x", main=main)
  assert ("Traceback" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "broken", "x"), ValueError("a bug")])
def test_what_a_user_cannot_mend_keeps_its_trace(run, error):
  with pytest.raises(type(error)) as raised:
    run("--workdir=x", main=raising(error))
  assert raised.value is error


def test_of_others_only_what_failed_is_logged_and_of_ours_the_bare_lines(run, capsys, monkeypatch):
  handler = absl_logging.get_absl_handler()  # as absl.app.run installs it
  monkeypatch.setattr(handler.python_handler, "stream", sys.stderr)
  monkeypatch.setattr(logging.root, "handlers", [handler])

  def main(_):
    logging.getLogger("advgame_jax.train").info("step 3")
    for level in (logging.INFO, logging.WARNING, logging.ERROR):
      logging.getLogger("absl").log(level, logging.getLevelName(level))

  run("--workdir=x", main=main)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == "step 3" and len(lines) == 2 and lines[1].endswith("] ERROR")


@pytest.mark.parametrize(
  ("environment", "folder"),
  [
    ({"HOME": "/home/a"}, "/home/a/.cache/advgame_jax/xla"),
    ({"HOME": "/home/a", "XDG_CACHE_HOME": "/c"}, "/c/advgame_jax/xla"),
    ({"HOME": "/home/a", "XDG_CACHE_HOME": "/c", "JAX_COMPILATION_CACHE_DIR": "/j"}, "/j"),
  ],
)
def test_where_compiled_programs_are_kept(run, monkeypatch, environment, folder):
  for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  seen = []
  monkeypatch.setattr("jax.config.update", lambda *setting: seen.append(setting))
  run("--workdir=x")
  assert seen == [("jax_compilation_cache_dir", folder)]


@dataclasses.dataclass(frozen=True)
class Flags(settings_lib.Settings):
  """One setting of each type."""

  some_url: str = settings_lib.setting("", "where")
  count: int = settings_lib.setting(3, "how many", at_least=1)
  share: float | None = settings_lib.setting(None, "of all", at_least=0, at_most=1)
  names: tuple[str, ...] = settings_lib.setting(("a",), "who")
  how: Literal["", "fast", "slow"] = settings_lib.setting("", "in a word")
  loud: bool = settings_lib.setting(True, "or not")


@pytest.fixture
def settings(monkeypatch):
  """Reads these arguments as the flags of `Flags`; what they leave behind is undone."""
  before = set(flags.FLAGS)
  read = command.define_settings(Flags)

  def given(*arguments):
    command._parse_flags(["program", *arguments])
    return read()

  yield given
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


def test_settings_are_flags_with_dashes_or_underscores(settings):
  assert settings() == Flags()
  said = settings(
    "--some-url=x=y-z", "--count", "5", "--share=0.5", "--names=b", "--names=c,d", "--how=slow", "--noloud"
  )
  assert said == Flags("x=y-z", 5, 0.5, ("b", "c,d"), "slow", False)
  assert settings("--some_url=u").some_url == "u"


@pytest.mark.parametrize(
  "argument, sentence",
  [
    ("--count=0", "count is 0; allowed: at least 1"),
    ("--share=1.5", r"share is 1\.5; allowed: at most 1"),
    ("--how=quick", "how is 'quick'; allowed: one of '', 'fast', 'slow'"),
  ],
)
def test_a_setting_that_is_not_allowed_is_refused_as_in_a_config(settings, argument, sentence):
  with pytest.raises(UserError, match=sentence):
    settings(argument)


def test_a_setting_that_may_be_none_says_so():
  with pytest.raises(UserError, match="share is 'x'; allowed: a number, or none"):
    Flags(share="x")

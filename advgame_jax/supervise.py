"""A program that starts itself again when it was killed or fell over. Imports no jax: the child has the devices."""

import ctypes
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

USER_ERROR = 2  # exit code: it would end the same way again
_LONGEST_PAUSE = 60.0  # seconds


def supervise(arguments: Sequence[str], pause: float = 2.0) -> None:
  """If `--max-restarts=N` is among them and N is above 0: runs this command as a child, and ends with its exit code.

  After an exit other than 0 and 2 it starts again, N times at most, each time after twice the pause. SIGTERM and SIGINT
  go to the child, which is waited for and not started again. Returns where there is nothing to supervise.

  Args:
    pause: seconds before the first restart.
  """
  restarts = _restarts(arguments)
  if restarts > 0:
    sys.exit(_supervise([sys.executable, *sys.orig_argv[1:], "--max_restarts=0"], restarts, pause))


def _restarts(arguments: Sequence[str]) -> int:
  """The last `--max-restarts=N`; 0 where it is no number, which the flags refuse afterwards."""
  last = 0
  for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
    match = re.fullmatch(r"--?max[-_]restarts(?:=(.*))?", argument)
    if match:
      value = after if match[1] is None else match[1]
      last = int(value) if value.isdecimal() else 0
  return last


def _supervise(command: Sequence[str], restarts: int, pause: float) -> int:
  """Runs the command until it is done, was stopped, or has used up its restarts. Returns an exit code as shells do."""
  stopped: list[int] = []
  children: list[subprocess.Popen] = []

  def pass_on(number: int, _: object) -> None:
    stopped.append(number)
    for child in children:
      child.send_signal(number)  # does nothing to one that has ended

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  for restart in range(restarts + 1):
    # In a session of its own, or Ctrl-C would reach it twice. No other thread runs here.
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent)  # noqa: PLW1509
    children[:] = [child]
    if stopped:  # between the pause and the start
      child.send_signal(stopped[-1])
    code = child.wait()
    if stopped or code in (0, USER_ERROR) or restart == restarts:
      break
    wait = min(_LONGEST_PAUSE, pause * 2**restart)
    _say(f"the run {_describe(code)}; restart {restart + 1} of {restarts} in {wait:g} s")
    if _sleep(wait, stopped):
      break
  if code not in (0, USER_ERROR) and not stopped:
    _say(f"the run {_describe(code)}; no restart is left of {restarts}")
  return code if code >= 0 else 128 - code


def _sleep(seconds: float, stopped: Sequence[int]) -> bool:
  """Whether it was told to stop meanwhile."""
  until = time.monotonic() + seconds
  while not stopped and time.monotonic() < until:
    time.sleep(0.05)
  return bool(stopped)


def _describe(code: int) -> str:
  if code >= 0:
    return f"ended with exit code {code}"
  try:
    return f"was ended by {signal.Signals(-code).name}"
  except ValueError:
    return f"was ended by signal {-code}"


def _say(sentence: str) -> None:
  print(sentence, file=sys.stderr, flush=True)


def _die_with_parent() -> None:
  """On Linux: a supervisor that is killed leaves no child behind."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG

"""Memory in large pages, where Linux leaves that to programs (`madvise`). Imports no jax: this comes before it.

XLA's programs for CPUs ask for all of their memory anew each time, gigabytes of an update, and the system clears and
maps every page of it: of 4 KiB each that is up to a third of the step, on a machine that is shared.
"""

import os
import sys

_NAME, _VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def ask() -> None:
  """Starts this command again, in its own place, so that malloc asks for them; once, and not where tunables are set."""
  if sys.platform == "linux" and _NAME not in os.environ:
    os.environ[_NAME] = _VALUE  # the C library reads it before the program begins
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

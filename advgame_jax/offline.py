"""No connection but to the hosts that are named: refused where Python opens sockets, below every library of it."""

import socket
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any

from advgame_jax.types import UserError

_PORTS = {"http": 80, "https": 443}
_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
_PROGRAMS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")


def only(urls: Sequence[str]) -> None:
  """From here to its end, this process looks up and connects to the hosts of these addresses and to nobody else.

  An audit hook, which nothing can remove. What is refused raises `UserError` where it was tried; proxies of the
  environment are refused like all others, and so are programs that would be started. What a library's own machine code
  does is not seen; none of ours opens a connection.

  Raises:
    UserError: a host that cannot be looked up.
  """
  parts = [urllib.parse.urlsplit(url) for url in urls]
  named = {(part.hostname or "", part.port or _PORTS.get(part.scheme, 0)) for part in parts}
  hosts, ends = {host for host, _ in named}, set[tuple[str, int]]()

  def look_up() -> None:
    for host, port in named:
      ends.update((str(address[0]), port) for address in _addresses(host, port))

  def known(end: tuple[str, int]) -> bool:
    if end not in ends and end[1] in {port for _, port in named}:
      look_up()  # a name may have got another address
    return end in ends

  look_up()

  def audit(event: str, args: tuple[Any, ...]) -> None:
    if event in _LOOKUPS:
      first = args[0][0] if isinstance(args[0], tuple) else args[0]
      name = first.decode() if isinstance(first, bytes) else str(first)
      if name not in hosts and name not in {address for address, _ in ends}:
        raise _refused(name)
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
      end = args[1]
      if end is not None and not (isinstance(end, tuple) and known((str(end[0]), end[1]))):
        raise _refused(str(end))
    elif event in _PROGRAMS:
      raise _refused(f"others through a program, {args[0]}")
    elif event == "socket.bind":
      raise _refused(f"a port of its own, {args[1]}")

  sys.addaudithook(audit)


def _addresses(host: str, port: int) -> list[Any]:
  try:
    return [info[4] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
  except OSError as error:
    raise UserError(f"the host {host!r} cannot be looked up ({error}); allowed: one that can") from None


def _refused(where: str) -> UserError:
  return UserError(f"something tried to reach {where} with --offline; allowed: the hosts that flags name, and no proxy")

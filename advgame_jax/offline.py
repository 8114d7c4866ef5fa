"""No connection but to the hosts that are named: refused below every library, where Python opens sockets."""

import socket
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any

from advgame_jax.types import UserError

_PORTS = {"http": 80, "https": 443}
_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex", "socket.gethostbyaddr")


def only(urls: Sequence[str]) -> None:
  """From here to its end, this process looks up and connects to the hosts of these addresses and to nobody else.

  An audit hook, which nothing can remove. What is refused raises `UserError` where it was tried; proxies of the
  environment are refused like all others. Names are looked up once, here.

  Raises:
    UserError: a host that cannot be looked up.
  """
  hosts, ends = set[str](), set[tuple[str, int]]()
  for url in urls:
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    hosts.add(host)
    ends |= {(str(address[0]), port) for address in _addresses(host, port)}

  def audit(event: str, args: tuple[Any, ...]) -> None:
    if event in _LOOKUPS:
      name = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
      if name not in hosts and name not in {address for address, _ in ends}:
        raise _refused(name)
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
      end = args[1]
      if end is not None and (not isinstance(end, tuple) or tuple(end[:2]) not in ends):
        raise _refused(str(end))
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

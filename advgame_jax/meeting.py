"""How the processes of a run meet, and how all of them end when one is gone.

Before JAX is told of the others, the processes meet at process 0, at the port below the coordinator's. That connection
stays open as long as the run: when a process dies, its host's kernel closes it, and everybody knows at once who it was.
A host that falls silent is found by the kernel's own probes, so that a process which computes for long is never taken
for a dead one; one that hangs is found by JAX's heartbeats.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from advgame_jax.types import UserError

GONE = 3  # exit code: another process is gone, and the same command resumes
_LONGEST_LINE = 2**20
_RESUMES = "the same command goes on from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class Place:
  """Which of the processes of a run this one is."""

  coordinator: str  # HOST:PORT of process 0
  processes: int
  process: int
  local_devices: tuple[int, ...] = ()  # of this host, that this process uses; empty: all

  def __post_init__(self) -> None:
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 2 <= int(port) <= 65535:
      raise UserError(f"the coordinator is {self.coordinator!r}; allowed: HOST:PORT of process 0")
    if not 0 <= self.process < self.processes:
      raise UserError(
        f"process {self.process} of {self.processes} processes; allowed: --process from 0 to --processes less one"
      )

  @property
  def meeting(self) -> tuple[str, int]:
    """Where the processes meet: the port below the coordinator's."""
    host, _, port = self.coordinator.rpartition(":")
    return host.strip("[]"), int(port) - 1


def exit_now(code: int) -> None:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  os._exit(code)


class Watch:
  """The connections of process 0 with every other one, and a thread that listens to them.

  A line is a JSON object. To process 0: {process, processes, host} to join, {left, code}. From it: {hosts} when all are
  there, {refused}, {end, code}, {done}.
  """

  def __init__(self, place: Place, heartbeat_seconds: int, join_seconds: int):
    self._place, self._heartbeat = place, heartbeat_seconds
    self._lock, self._over = threading.Lock(), False
    meet = self._gather if place.process == 0 else self._join
    self._lines, self._hosts = meet(time.monotonic() + join_seconds, join_seconds)
    threading.Thread(target=self._listen, daemon=True, name="cluster").start()

  def leave(self, said: str, code: int) -> None:
    """Tells the others that this process ends and why."""
    with self._lock:
      if self._over:
        return
      self._over = True
    self._broadcast(self._left(self._place.process, said, code))

  def close(self) -> None:
    """After the last common act: nobody is missed any more."""
    with self._lock:
      self._over = True
    self._broadcast({"done": True})

  def _left(self, process: int, said: str, code: int) -> dict[str, Any]:
    """What the others print of a process that ended itself."""
    if code == 2:
      return {"end": f"{self._name(process)} ended: {said}", "code": 2}
    return {"end": f"{self._name(process)} failed: {said}; {_RESUMES}", "code": GONE}

  def _name(self, process: int) -> str:
    return f"process {process} of {self._place.processes} ({self._hosts[process]})"

  def _broadcast(self, message: dict[str, Any]) -> None:
    for line in self._lines.values():
      with contextlib.suppress(OSError):
        line.send(message)

  def _listen(self) -> None:
    """Until the run is over, or a process is."""
    with selectors.DefaultSelector() as selector:
      for process, line in self._lines.items():
        selector.register(line.connection, selectors.EVENT_READ, process)
      while selector.get_map():
        for key, _ in selector.select():
          message = self._lines[key.data].receive()
          if message.get("done"):
            selector.unregister(key.fileobj)
          else:
            self._end(message if "end" in message else self._gone(key.data))

  def _gone(self, process: int) -> dict[str, Any]:
    return {"end": f"{self._name(process)} is gone; {_RESUMES}", "code": GONE}

  def _end(self, message: dict[str, Any]) -> None:
    """Ends this process for what happened to another one."""
    with self._lock:
      if self._over:
        return
      self._over = True
    if self._place.process == 0:
      self._broadcast(message)
      time.sleep(0.5)  # with process 0 JAX's coordinator ends, which aborts who has not heard yet
    os.write(2, f"error: {message['end']}\n".encode())
    exit_now(int(message["code"]))

  def _join(self, deadline: float, seconds: int) -> tuple[dict[int, "Line"], list[str]]:
    """Calls process 0 until it answers that all are there."""
    place, said = self._place, "no answer"
    host, port = place.meeting
    while (left := deadline - time.monotonic()) > 0:
      try:
        line = Line(socket.create_connection((host, port), timeout=min(left, 5.0)), self._heartbeat)
        line.send({"process": place.process, "processes": place.processes, "host": socket.gethostname()})
        line.connection.settimeout(max(0.1, deadline - time.monotonic()))
        message = line.receive()
        if "refused" in message:
          raise UserError(message["refused"])
        if "hosts" in message:
          line.connection.settimeout(None)
          return {0: line}, message["hosts"]
        said = "it hung up"
        line.connection.close()
      except OSError as error:
        said = error.strerror or str(error)
      time.sleep(0.2)
    _give_up(
      f"process {place.process} of {place.processes} did not reach process 0 at {host}:{port} within {seconds} s "
      f"({said}); allowed: a --coordinator that is process 0's address, with this port and the next one open"
    )

  def _gather(self, deadline: float, seconds: int) -> tuple[dict[int, "Line"], list[str]]:
    """Waits for the other processes, tells each who they are, and shuts the door."""
    place, lines = self._place, dict[int, Line]()
    hosts = {0: socket.gethostname()}
    with self._door() as door, selectors.DefaultSelector() as selector:
      selector.register(door, selectors.EVENT_READ, None)
      while len(lines) < place.processes - 1:
        left = deadline - time.monotonic()
        if left <= 0:
          missing = sorted(set(range(place.processes)) - {0, *lines})
          names = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
          _give_up(
            f"of processes 0 to {place.processes - 1}, {names} did not come within {seconds} s; allowed: the same "
            "command on every host, each with its own --process, or a larger --join_seconds"
          )
        for key, _ in selector.select(left):
          if key.data is not None:  # who waits says nothing: it hung up, and may come again
            selector.unregister(key.fileobj)
            lines.pop(key.data).connection.close()
          elif (arrival := self._admit(door.accept()[0], lines)) is not None:
            process, host, line = arrival
            lines[process], hosts[process] = line, host
            selector.register(line.connection, selectors.EVENT_READ, process)
    names_of = [hosts[process] for process in range(place.processes)]
    for line in lines.values():
      with contextlib.suppress(OSError):  # it died just now: the watch will say so
        line.send({"hosts": names_of})
    return lines, names_of

  def _door(self) -> socket.socket:
    """Where the others knock. JAX opens the coordinator's own port afterwards, and would not say that it is taken."""
    host, port = self._place.meeting
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
      socket.create_server(("", port + 1), family=family).close()
      return socket.create_server(("", port), family=family, backlog=1024)
    except OSError as error:
      raise UserError(
        f"ports {port} and {port + 1} cannot both be opened ({error.strerror}); allowed: a --coordinator=HOST:PORT "
        "where PORT and the one below are free on process 0"
      ) from error

  def _admit(self, connection: socket.socket, lines: Mapping[int, "Line"]) -> tuple[int, str, "Line"] | None:
    """Reads who comes. A place that is taken, or another number of processes, ends all of them."""
    connection.settimeout(5.0)
    line = Line(connection, self._heartbeat)
    message = line.receive()
    try:
      process, processes, host = int(message["process"]), int(message["processes"]), str(message["host"])[:253]
    except (KeyError, TypeError, ValueError):
      connection.close()  # not one of ours
      return None
    wrong = ""
    if processes != self._place.processes:
      wrong = f"process 0 was told of {self._place.processes} processes, but process {process} ({host}) of {processes}"
    elif not 0 < process < processes or process in lines:
      wrong = f"two processes say that they are process {process}, one of them on {host}"
    if wrong:
      wrong += "; allowed: the same --processes on each host, and a --process of its own"
      for other in [line, *lines.values()]:
        with contextlib.suppress(OSError):
          other.send({"refused": wrong})
      raise UserError(wrong)
    connection.settimeout(None)
    return process, host, line


def _give_up(sentence: str) -> NoReturn:
  """Not the user's fault if a host is restarting: its supervisor may try again."""
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  raise SystemExit(GONE)


class Line:
  """A connection that carries JSON objects, a line each, and notices a silent host within the heartbeat."""

  def __init__(self, connection: socket.socket, heartbeat_seconds: int):
    self.connection, self._rest = connection, b""
    probes = {
      "TCP_KEEPIDLE": max(1, heartbeat_seconds // 3),
      "TCP_KEEPINTVL": max(1, heartbeat_seconds // 6),
      "TCP_KEEPCNT": 3,
      "TCP_USER_TIMEOUT": heartbeat_seconds * 800,  # milliseconds; Linux counts these, not the probes
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in probes.items():
      if hasattr(socket, name):  # not every system has each
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, message: dict[str, Any]) -> None:
    self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> dict[str, Any]:
    """The next object; an empty one if the other side is gone or talks nonsense."""
    try:
      while b"\n" not in self._rest:
        read = self.connection.recv(65536)
        if not read or len(self._rest) > _LONGEST_LINE:
          return {}
        self._rest += read
      first, _, self._rest = self._rest.partition(b"\n")
      message = json.loads(first)
      return message if isinstance(message, dict) else {}
    except (OSError, ValueError):
      return {}

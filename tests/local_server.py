"""What the servers of tests share: each is a program that prints its port and answers until it is killed."""

import contextlib
import http.server
import subprocess
import sys


class _Server(http.server.ThreadingHTTPServer):
  request_queue_size = 128
  daemon_threads = True

  def handle_error(self, request, client_address):
    pass  # a client that was killed


def serve(handler):
  """The program."""
  server = _Server(("127.0.0.1", 0), handler)
  print(server.server_port, flush=True)
  server.serve_forever()


@contextlib.contextmanager
def serving(program):
  """The address of a program of these in a process of its own."""
  process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
  try:
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
  finally:
    process.kill()
    process.wait()

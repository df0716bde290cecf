"""An echo server in a process of its own, so that the server's work is not counted as the pool's.

``python -m benchmarks.server bytes`` sends back whatever comes; ``slow`` does so a millisecond later; ``lines`` answers
each line after a random moment. It prints its port, and when its standard input ends, the most connections that it saw
open at once.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from types import TracebackType
from typing import Any

import gevent
import gevent.os
import gevent.server

from benchmarks.peer import ROOT

#: Seconds that an answer to a line takes, at most.
DELAY = 0.003


class Server:
    """Starts the server, knows its port, and stops it::

    with Server("lines") as server:
        ...
    print(server.peak)
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.port = 0
        #: The most connections open at once; known when the server has stopped.
        self.peak = 0

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server", self._kind],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            out, _ = self._process.communicate("", timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self.peak = int(out)


class Handler:
    """Serves the connections and counts them."""

    def __init__(self) -> None:
        self.open: set[Any] = set()
        self.peak = 0

    def slow(self, sock: Any, address: object) -> None:
        """Send back what comes, as a server does that has other work to do."""
        self.bytes(sock, address, delay=0.001)

    def bytes(self, sock: Any, address: object, delay: float = 0) -> None:
        """Send back what comes, as it comes."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open.add(sock)
        self.peak = max(self.peak, len(self.open))
        try:
            while data := sock.recv(65536):
                if delay:
                    gevent.sleep(delay)
                sock.sendall(data)
        except OSError:
            pass  # the client is gone, which is its right
        finally:
            self.open.discard(sock)

    def lines(self, sock: Any, address: object) -> None:
        """Send back each line, after a random moment."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open.add(sock)
        self.peak = max(self.peak, sum(map(_established, self.open)))
        try:
            with sock.makefile("rb") as lines:
                for line in lines:
                    gevent.sleep(random.uniform(0, DELAY))
                    sock.sendall(line)
        except OSError:
            pass
        finally:
            self.open.discard(sock)


def _established(sock: Any) -> bool:
    """Say whether the client still holds this connection.

    Its goodbye may lie unread while the connection that took its place is being accepted: asking the kernel keeps the
    count honest. Where the kernel cannot be asked, a connection counts until its end has been read.
    """
    if not hasattr(socket, "TCP_INFO"):
        return True
    established = 1
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == established)


def main() -> None:
    """Serve until standard input ends."""
    handler = Handler()
    server = gevent.server.StreamServer(("127.0.0.1", 0), getattr(handler, sys.argv[1]), backlog=1024)
    server.start()
    print(server.server_port, flush=True)
    while gevent.os.tp_read(sys.stdin.fileno(), 1024):
        pass
    print(handler.peak, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

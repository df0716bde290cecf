"""A server with a limit that is known: so many workers, and a request takes one of them for so many seconds.

``python -m gsocketpool size`` measures it where no address is given. It runs in a process of its own, so that it does
not share an interpreter with the load.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import gevent
from gevent.lock import BoundedSemaphore
from gevent.server import StreamServer

__all__ = ["Practice", "PracticeServer", "serve"]

#: Seconds that the process has to end.
PATIENCE: Final = 5.0


@dataclass(frozen=True)
class Practice:
    """What the server can do.

    :ivar workers: how many requests it works on at once.
    :ivar service: seconds that each takes.
    """

    workers: int = 4
    service: float = 0.005


class PracticeServer:
    """The server's process. A context manager: it runs inside its block.

    It answers each line with ``pong`` and a line feed, and listens on 127.0.0.1 alone.
    """

    def __init__(self, practice: Practice) -> None:
        self._practice = practice
        self.port = 0

    def __enter__(self) -> PracticeServer:
        # In a session of its own: Ctrl-C is not for it. It ends when its standard input does, whatever becomes of us.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                __name__,
                str(self._practice.workers),
                str(self._practice.service),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdigit():
            self._end()
            raise OSError(f"the practice server did not start: it ended with status {self._process.returncode}")
        self.port = int(line)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def serve(practice: Practice) -> None:
    """Print the port, and serve until standard input ends."""
    free = BoundedSemaphore(practice.workers)

    def answer(sock: Any, address: object) -> None:
        rest = b""
        try:
            while data := sock.recv(8192):
                *lines, rest = (rest + data).split(b"\n")
                for _ in lines:
                    with free:
                        gevent.sleep(practice.service)
                    sock.sendall(b"pong\n")
        except OSError:
            pass  # the client is gone

    server = StreamServer(("127.0.0.1", 0), answer)
    server.start()
    print(server.socket.getsockname()[1], flush=True)
    gevent.get_hub().threadpool.apply(sys.stdin.read)
    server.stop()


if __name__ == "__main__":
    serve(Practice(int(sys.argv[1]), float(sys.argv[2])))

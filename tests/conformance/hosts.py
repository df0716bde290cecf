"""A server whose connections a test serves itself, each in a thread, with plain sockets: for clients of any runtime."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

Handler = Callable[[Any], object]

#: Seconds after which a thread that serves a connection gives up.
PATIENCE = 20.0


class Host:
    """Serves each connection with ``handler(sock)``, and closes it when that returns.

    :param handler: called in a thread; an `OSError` that it raises is the client's doing.
    :param host: address of the loopback interface to listen on.
    :param tls: a server-side context: each connection begins with a handshake.
    :param path: listen on a Unix socket there instead.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.host = host
        self.port = 0
        self.accepted = 0
        self._handler = handler
        self._tls = tls
        self._path = path
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Host:
        if self._path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(os.fspath(self._path))
            self._listener.listen(64)
        else:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            self._listener = socket.create_server((self.host, 0), family=family, backlog=64)
            self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # wakes its thread
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE)
            self._sockets.append(sock)
            self.accepted += 1
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        served = sock
        try:
            if self._tls is not None:
                # Its own copy of the descriptor, so that `sock` stays what the server ends it by.
                served = self._tls.wrap_socket(sock.dup(), server_side=True, do_handshake_on_connect=False)
                served.settimeout(PATIENCE)
                served.do_handshake()
            self._handler(served)
        except (OSError, ValueError):
            pass  # the client's doing, or the server has ended
        finally:
            served.close()
            sock.close()


def echo(sock: Any) -> None:
    """Send back whatever comes."""
    while data := sock.recv(65536):
        sock.sendall(data)


def swallow(sock: Any) -> None:
    """Read whatever comes, and say nothing."""
    while sock.recv(65536):
        pass


def say(*pieces: bytes) -> Handler:
    """Return a handler that sends pieces, each when the client has sent a byte for it; then it ends the stream."""

    def handler(sock: Any) -> None:
        for piece in pieces:
            if not sock.recv(1):
                return
            sock.sendall(piece)

    return handler


def reset(sock: Any) -> None:
    """Close a socket so that its peer gets a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

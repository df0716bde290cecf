"""Small servers inside the test's own process, on free ports of the loopback interface.

Each counts the connections that it has open, and the most that it ever had at once: what a peer sees of a pool.
"""

from __future__ import annotations

import os
import socket as std_socket
import ssl as std_ssl
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import gevent
import trustme
from gevent import socket, ssl
from gevent.event import Event

Handler = Callable[[Any], None]
S = TypeVar("S", bound="Server")

# The state of a TCP socket is the first byte of its TCP_INFO.
_ESTABLISHED = 1


def reset(sock: Any) -> None:
    """Close a socket so that its peer gets a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Server:
    """A listening socket, a greenlet that accepts, and a greenlet with ``handler(sock)`` for each connection.

    A connection counts as open from when it is accepted until the client has closed it, whether or not the handler has
    taken notice; so ``most`` is exact even where one connection closes and the next one opens in the same instant.

    :param handler: serves one connection, and returns when it is over.
    :param host: address to listen on; or with ``path``, nothing.
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
        self._handler = handler
        self._tls = tls
        self._family = socket.AF_UNIX if path is not None else socket.AF_INET6 if ":" in host else socket.AF_INET
        self._address: Any = os.fspath(path) if path is not None else (host, 0)
        self._greenlets: dict[Any, Any] = {}  # to the socket of each
        self._changed = Event()
        self.host = host
        self.port = 0
        self.accepted = 0
        self.most = 0

    # Life

    def __enter__(self: S) -> S:
        self._listener: Any = self._listen()
        if self._family != socket.AF_UNIX:
            self.port = self._listener.getsockname()[1]
        self._accepting = gevent.spawn(self._accept, self._listener)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, end all handlers, close all connections."""
        self._stop_accepting()
        gevent.killall(list(self._greenlets))

    def _listen(self) -> Any:
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
        return listener

    def _stop_accepting(self) -> None:
        self._accepting.kill()
        self._listener.close()

    def _accept(self, listener: Any) -> None:
        while True:
            sock, _ = listener.accept()
            self.accepted += 1
            greenlet = gevent.spawn(self._serve, sock)
            self._greenlets[greenlet] = sock
            greenlet.link(self._ended)
            self.most = max(self.most, self.open)
            self._changed.set()

    def _ended(self, greenlet: gevent.Greenlet[..., None]) -> None:
        self._greenlets.pop(greenlet).close()  # one that was killed before it began did not close it
        self._changed.set()

    def _serve(self, sock: Any) -> None:
        served = sock
        try:
            if self._tls is not None:
                served = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                self._greenlets[gevent.getcurrent()] = served
                served.do_handshake()
            self._handler(served)
        except OSError:
            pass  # the client's doing
        finally:
            served.close()

    # What it sees

    @property
    def open(self) -> int:
        """How many connections are open, as far as this side of them knows."""
        return sum(map(self._is_open, self._greenlets.values()))

    def _is_open(self, sock: Any) -> bool:
        if sock.fileno() < 0:
            return False
        if self._family == socket.AF_UNIX or not hasattr(std_socket, "TCP_INFO"):
            return True
        state: int = sock.getsockopt(socket.IPPROTO_TCP, std_socket.TCP_INFO, 1)[0]
        return state == _ESTABLISHED

    def wait_until(self, happened: Callable[[], bool], timeout: float = 20.0) -> None:
        """Wait until ``happened()``: asked whenever a connection begins or ends. Fail after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not happened():
            left = deadline - time.monotonic()
            assert left > 0, f"it has not happened in {timeout} s: {self.open} open, {self.accepted} accepted so far"
            self._changed.clear()
            self._changed.wait(left)

    def wait_open(self, count: int, timeout: float = 20.0) -> None:
        """Wait until so many handlers run: what clients have closed, and all that came before, has been dealt with."""
        self.wait_until(lambda: len(self._greenlets) == count, timeout)

    def wait_accepted(self, count: int, timeout: float = 20.0) -> None:
        """Wait until so many connections have been accepted since the start."""
        self.wait_until(lambda: self.accepted >= count, timeout)

    # What it does to its clients

    def hang_up(self) -> None:
        """Close all connections, as a server that is restarted does. Under TLS without a goodbye."""
        gevent.killall(list(self._greenlets))

    def reset(self) -> None:
        """Reset all connections."""
        for sock in list(self._greenlets.values()):
            reset(sock)


def echo(sock: Any) -> None:
    """Send back whatever comes."""
    while data := sock.recv(65536):
        sock.sendall(data)


def echo_lines(sock: Any) -> None:
    """Send each line back, once it is complete, with its newline."""
    rest = b""
    while data := sock.recv(65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            sock.sendall(line + b"\n")


def swallow(sock: Any) -> None:
    """Read whatever comes, and say nothing."""
    while sock.recv(65536):
        pass


def say(*pieces: bytes) -> Handler:
    """Return a handler that sends pieces, each in a segment of its own, and ends the stream."""

    def handler(sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
            gevent.sleep(0)  # lets the client read it alone

    return handler


class EchoServer(Server):
    """Echoes bytes as they come."""

    def __init__(self, **options: Any) -> None:
        super().__init__(echo, **options)


class LineEchoServer(Server):
    """Echoes line by line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(echo_lines, **options)


class BlackHole:
    """A port of 127.0.0.1 at which a connect is neither accepted nor refused: nobody ever answers.

    Its queue of connections to be accepted is full, and the kernel then ignores who comes.
    """

    host = "127.0.0.1"

    def __enter__(self) -> BlackHole:
        self._sockets = [std_socket.socket()]
        self._sockets[0].bind((self.host, 0))
        self._sockets[0].listen(0)
        self.port: int = self._sockets[0].getsockname()[1]
        for _ in range(8):
            client = std_socket.socket()
            self._sockets.append(client)
            client.setblocking(False)
            client.connect_ex((self.host, self.port))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for sock in self._sockets:
            sock.close()


def refused_port(host: str = "127.0.0.1") -> int:
    """Return a port on which nobody listens."""
    with std_socket.socket(std_socket.AF_INET6 if ":" in host else std_socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def server_context(self, *names: str) -> ssl.SSLContext:
        """Return a context for a server with a certificate for these names or addresses."""
        context = ssl.SSLContext(std_ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or ("localhost", "127.0.0.1", "::1"))).configure_cert(context)
        return context

    def client_context(self) -> std_ssl.SSLContext:
        """Return a context of the standard library for a client that trusts this authority, and nobody else."""
        context = std_ssl.SSLContext(std_ssl.PROTOCOL_TLS_CLIENT)
        self._ca.configure_trust(context)
        return context

    def write(self, folder: Path) -> Path:
        """Write the authority's certificate into a file."""
        path = folder / "authority.pem"
        self._ca.cert_pem.write_to_path(str(path))
        return path

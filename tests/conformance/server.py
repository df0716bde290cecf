"""A server for every runtime: one thread of its own and plain sockets, so that no client's loop has to turn for it."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

# The state of a TCP socket is the first byte of its TCP_INFO.
_ESTABLISHED = 1


class Client:
    """One connection, as the server sees it.

    :ivar lines: what came, line by line, without the ends of lines.
    :ivar held: lines that wait for their answers.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.lines: list[bytes] = []
        self.held: list[bytes] = []
        self.rest = b""
        self.ended = False


class EchoServer:
    """Answers each line with the same line, on a free port of the loopback interface.

    A connection counts as open from when it is accepted until the client has closed it, whether or not this side has
    taken notice; so `most` is exact even where one connection closes and the next one opens in the same instant.

    :param greeting: is sent to whoever connects.
    :ivar accepted: connections since the start.
    :ivar most: the most that were open at once.
    """

    host = "127.0.0.1"

    def __init__(self, greeting: bytes = b"") -> None:
        self.greeting = greeting
        self.accepted = 0
        self.most = 0
        self.clients: list[Client] = []
        self._lock = threading.Lock()  # around all that looks at, or does something to, the clients
        self._holds = self._holds_greetings = self._frozen = False
        self._ungreeted: list[Client] = []

    # Life

    def __enter__(self) -> EchoServer:
        self._selector = selectors.DefaultSelector()
        self._wakes, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._listener = socket.create_server((self.host, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="echo server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._wakes.send(b".")
        self._thread.join()
        for client in self.clients:
            client.sock.close()
        for each in (self._selector, self._listener, self._wakes, self._woken):
            each.close()

    def _serve(self) -> None:
        while True:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif not key.data.ended:
                        self._hear(key.data)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock)
        self.clients.append(client)
        self.accepted += 1
        self.most = max(self.most, sum(map(_is_open, self.clients)))
        if not self._frozen:
            self._selector.register(sock, selectors.EVENT_READ, client)
        if self._holds_greetings:
            self._ungreeted.append(client)
        else:
            self._send(client, self.greeting)

    def _hear(self, client: Client) -> None:
        try:
            data = client.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._end(client)
            return
        *lines, client.rest = (client.rest + data).split(b"\n")
        client.lines += lines
        client.held += lines
        if not self._holds:
            self._answer(client)

    def _answer(self, client: Client) -> None:
        answers, client.held = client.held, []
        self._send(client, b"".join(line + b"\n" for line in answers))

    def _send(self, client: Client, data: bytes) -> None:
        try:
            if data:
                client.sock.sendall(data)
        except OSError:
            self._end(client)

    def _end(self, client: Client, reset: bool = False) -> None:
        if not client.ended:
            client.ended = True
            if not self._frozen:
                self._selector.unregister(client.sock)
            if reset:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sock.close()

    # What it sees

    @property
    def open(self) -> int:
        """How many connections are open, as far as this side of them knows."""
        with self._lock:
            return sum(map(_is_open, self.clients))

    @property
    def serving(self) -> int:
        """How many it has not yet seen the end of."""
        with self._lock:
            return sum(not client.ended for client in self.clients)

    @property
    def heard(self) -> list[bytes]:
        """All lines so far, those of the first connection first."""
        with self._lock:
            return [line for client in self.clients for line in client.lines]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        """Stand still until a condition holds; for where no runtime has to turn for that."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{self.serving} clients are left, {self.open} of them are open"
            time.sleep(0.001)

    # What it does to its clients

    def hold(self) -> None:
        """Answer nothing, until `let_go`."""
        with self._lock:
            self._holds = True

    def hold_greetings(self) -> None:
        """Greet nobody, until `let_go`."""
        with self._lock:
            self._holds_greetings = True

    def let_go(self) -> None:
        """Send what was held."""
        with self._lock:
            self._holds = self._holds_greetings = False
            ungreeted, self._ungreeted = self._ungreeted, []
            for client in ungreeted:
                if not client.ended:
                    self._send(client, self.greeting)
            for client in self.clients:
                if not client.ended:
                    self._answer(client)

    def freeze(self) -> None:
        """Read nothing from those that there are, until `thaw`: as a server that has stopped."""
        with self._lock:
            self._frozen = True
            for client in self.clients:
                if not client.ended:
                    self._selector.unregister(client.sock)

    def thaw(self) -> None:
        """Go on."""
        with self._lock:
            self._frozen = False
            for client in self.clients:
                if not client.ended:
                    self._selector.register(client.sock, selectors.EVENT_READ, client)

    def hang_up(self, reset: bool = False) -> None:
        """Close all connections, as a server that is restarted does."""
        with self._lock:
            for client in self.clients:
                self._end(client, reset)

    def say(self, data: bytes) -> None:
        """Send something unasked to everybody."""
        with self._lock:
            for client in self.clients:
                if not client.ended:
                    self._send(client, data)


def _is_open(client: Client) -> bool:
    if client.ended:
        return False
    if not hasattr(socket, "TCP_INFO"):
        return True
    state: int = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state == _ESTABLISHED

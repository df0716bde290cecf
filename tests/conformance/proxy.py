"""A proxy that stands before a server and fails on command, for every runtime: one thread of its own, plain sockets.

`tests/proxy.py` is its twin in gevent's way, for tests that let greenlets wait for what it sees.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Any, Literal

from .hosts import reset
from .server import _is_open

#: Whom a fault hits: all connections, those that are open now, or those that come. The others go on as before.
Who = Literal["all", "open", "new"]

#: Seconds for what takes no time, as long as nobody sends more than the kernel holds.
PATIENCE = 10.0


class Link:
    """A client, and the server's side of it. What a client may have stays in `held` while nothing is passed on, ``b""``
    at its end.

    :ivar mode: None: that of all.
    :ivar left: bytes that the client may still get; None: all.
    """

    def __init__(self, sock: socket.socket, server: socket.socket) -> None:
        self.sock = sock
        self.server = server
        self.mode: str | None = None
        self.left: int | None = None
        self.heard = False
        self.ended = False
        self.held: dict[socket.socket, list[bytes]] = {sock: [], server: []}  # by who sent it
        self.open = {sock, server}  # whose stream has not ended

    def other(self, side: socket.socket) -> socket.socket:
        return self.server if side is self.sock else self.sock


class Proxy:
    """Forwards connections to a server, as they are or as the test wants them to fail.

    It begins with :meth:`forward`; each method changes what it does from now on, to the connections that are open and
    to those that come, or to one of these groups alone. When a method returns, it is done.

    :param target_host: the server's address.
    :param target_port: the server's port.
    :ivar most: the most connections that were open at once, as far as the clients' side of them knows.
    """

    host = "127.0.0.1"

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._mode = "forward"
        self._limit = 0
        self._links: list[Link] = []
        self._lock = threading.RLock()  # around all that looks at, or does something to, the links
        self.most = 0

    # Life

    def __enter__(self) -> Proxy:
        # Holds the port while nobody listens on it.
        self._holder = self._bound(0)
        self.port: int = self._holder.getsockname()[1]
        self._wakes, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._ending = False
        self._listener: socket.socket | None = None
        self._listen()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending = True
        self._wake()
        self._thread.join()
        for link in list(self._links):
            self._end(link)
        self._stop_listening()
        for each in (self._selector, self._holder, self._wakes, self._woken):
            each.close()

    def _bound(self, port: int) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((self.host, port))
        return sock

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = self._bound(self.port)
            self._listener.listen(1024)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _wake(self) -> None:
        """Let the thread look at what there is now."""
        self._wakes.send(b".")

    def _serve(self) -> None:
        while not self._ending:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                    elif key.data is None:
                        if key.fileobj is self._listener:
                            self._accept(self._listener)
                    elif not key.data.ended:
                        self._hear(key.data, key.fileobj)  # type: ignore[arg-type]

    # What it does

    def forward(self) -> None:
        """Pass everything on, beginning with what a black hole held."""
        self._change("forward")

    def reset(self, who: Who = "all") -> None:
        """Reset connections."""
        self._change("reset", who)

    def half_close(self, who: Who = "all") -> None:
        """End the stream towards the client, and go on taking what it sends."""
        self._change("half_close", who)

    def black_hole(self, who: Who = "all") -> None:
        """Accept connections, and pass nothing on, but for the end of a stream with nothing before it."""
        self._change("black_hole", who)

    def truncate(self, size: int, who: Who = "all") -> None:
        """Give each client ``size`` bytes more, then end the stream."""
        self._limit = size
        self._change("truncate", who)

    def refuse(self) -> None:
        """Refuse connections; those that are open go on."""
        self._change("refuse")

    def _change(self, mode: str, who: Who = "all") -> None:
        with self._lock:
            for link in self._links:
                if who == "open":
                    link.mode = mode
                elif who == "all":
                    link.mode = None
                else:
                    link.mode = link.mode or self._mode
            if who != "open":
                self._mode = mode
                if mode == "refuse":
                    self._stop_listening()
                else:
                    self._listen()
            for link in [] if who == "new" else list(self._links):
                self._strike(link)
                for side in (link.sock, link.server):
                    if not link.ended:
                        self._pass_on(link, side)
        self._wake()

    def _strike(self, link: Link) -> None:
        mode = link.mode or self._mode
        link.left = self._limit if mode == "truncate" else None
        if mode == "reset":
            self._end(link, by_reset=True)
        elif mode == "half_close":
            _shut(link.sock)

    # What it sees

    @property
    def open(self) -> int:
        """How many connections are open, as far as this side of them knows."""
        with self._lock:
            return sum(map(_is_open, self._links))  # type: ignore[arg-type]

    @property
    def heard(self) -> int:
        """How many connections are open whose client has said something."""
        with self._lock:
            return sum(link.heard and _is_open(link) for link in self._links)  # type: ignore[arg-type]

    # How

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        server = socket.socket()
        link = Link(sock, server)
        self._links.append(link)
        self.most = max(self.most, self.open)
        for each in (sock, server):
            each.settimeout(PATIENCE)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            server.connect(self._target)
        except OSError:
            return self._end(link)
        for each in (sock, server):
            self._selector.register(each, selectors.EVENT_READ, link)
        self._strike(link)

    def _hear(self, link: Link, side: socket.socket) -> None:
        try:
            data = side.recv(65536)
        except OSError:
            return self._end(link, by_reset=True)
        link.heard = link.heard or side is link.sock
        link.held[side].append(data)
        if not data:
            self._selector.unregister(side)
        self._pass_on(link, side)

    def _pass_on(self, link: Link, source: socket.socket) -> None:
        """Give what one side has sent to the other."""
        mode = link.mode or self._mode
        target, pieces = link.other(source), link.held[source]
        if mode == "black_hole" and any(pieces):
            return
        to_client = target is link.sock
        while pieces:
            data = pieces.pop(0)
            if not data:
                link.open.discard(source)
                _shut(target)
                if not link.open:
                    return self._end(link)
            elif not (to_client and mode == "half_close"):
                if to_client and link.left is not None:
                    data = data[: link.left]
                    link.left -= len(data)
                try:
                    target.sendall(data)
                except OSError:
                    return self._end(link, by_reset=True)
                if to_client and link.left == 0:
                    _shut(target)

    def _end(self, link: Link, by_reset: bool = False) -> None:
        """Close both sides; one of them was reset, so the other is."""
        link.ended = True
        self._links.remove(link)
        for each in (link.sock, link.server):
            with contextlib.suppress(KeyError):
                self._selector.unregister(each)
            if by_reset:
                reset(each)
            else:
                each.close()


def _shut(sock: Any) -> None:
    with contextlib.suppress(OSError):  # gone already
        sock.shutdown(socket.SHUT_WR)

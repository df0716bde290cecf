"""A proxy that stands before a server and fails on command, to show how a client bears it."""

from __future__ import annotations

from typing import Any, Literal

import gevent
from gevent import socket
from gevent.event import Event

from tests.servers import Server, reset

#: Whom a fault hits: all connections, those that are open now, or those that come. The others go on as before.
Who = Literal["all", "open", "new"]


class Proxy(Server):
    """Forwards connections to a server, as they are or as the test wants them to fail.

    It begins with :meth:`forward`; each method changes what it does from now on, to the connections that are open and
    to those that come, or to one of these groups alone. It counts connections as every :class:`Server` does.

    :param target_host: the server's address.
    :param target_port: the server's port.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        super().__init__(self._handle)
        self._target = (target_host, target_port)
        self._clients: set[Any] = set()
        self._heard: set[Any] = set()  # those that have said something
        self._mode = "forward"
        self._modes: dict[Any, str] = {}  # of the connections that fare otherwise than those that come
        self._delay = 0.0
        self._left: dict[Any, int] = {}  # bytes that a client may still get
        self._limit = 0
        self._mode_changed = Event()

    def __enter__(self) -> Proxy:
        # Holds the port while nobody listens on it.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self._address = self._holder.getsockname()
        return super().__enter__()

    def close(self) -> None:
        super().close()
        self._holder.close()

    def _listen(self) -> Any:
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(self._address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
        return listener

    # What it does

    def forward(self) -> None:
        """Pass everything on, beginning with what a black hole held."""
        self._change("forward")

    def reset(self, who: Who = "all") -> None:
        """Reset connections."""
        self._change("reset", who)
        for client in [] if who == "new" else list(self._clients):
            self._reset(client)

    def half_close(self, who: Who = "all") -> None:
        """End the stream towards the client, and go on taking what it sends."""
        self._change("half_close", who)
        for client in [] if who == "new" else list(self._clients):
            self._end(client)

    def black_hole(self, who: Who = "all") -> None:
        """Accept connections, and pass nothing on."""
        self._change("black_hole", who)

    def delay(self, seconds: float) -> None:
        """Pass every piece on ``seconds`` later."""
        self._change("delay")
        self._delay = seconds

    def truncate(self, size: int, who: Who = "all") -> None:
        """Give each client ``size`` bytes more, then end the stream."""
        self._limit = size
        self._left.clear()
        self._change("truncate", who)

    def refuse(self) -> None:
        """Refuse connections; those that are open go on."""
        self._change("refuse")

    def _change(self, mode: str, who: Who = "all") -> None:
        if who == "open":
            self._modes.update(dict.fromkeys(self._clients, mode))
        else:
            if who == "new":
                self._modes = {client: self._mode_of(client) for client in self._clients}
            else:
                self._modes.clear()
            if mode == "refuse" and self._mode != "refuse":
                self._stop_accepting()
            elif mode != "refuse" and self._mode == "refuse":
                self._listener = self._listen()
                self._accepting = gevent.spawn(self._accept, self._listener)
            self._mode = mode
        self._mode_changed.set()
        self._mode_changed.clear()

    def _mode_of(self, client: Any) -> str:
        return self._modes.get(client, self._mode)

    # What it sees

    @property
    def heard(self) -> int:
        """How many connections are open whose client has said something."""
        return sum(map(self._is_open, self._heard))

    # How

    def _handle(self, client: Any) -> None:
        if self._mode == "reset":
            return reset(client)
        if self._mode == "half_close":
            self._end(client)
        self._clients.add(client)
        server = socket.socket(socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET)
        try:
            server.connect(self._target)  # create_connection() would look the address up in another thread
        except BaseException:
            self._forget(client)
            server.close()
            raise
        back = gevent.spawn(self._pump, server, client, True)
        try:
            self._pump(client, server, False)
            back.join()
        finally:
            back.kill()
            server.close()
            self._forget(client)

    def _forget(self, client: Any) -> None:
        self._clients.discard(client)
        self._heard.discard(client)
        self._modes.pop(client, None)
        self._left.pop(client, None)

    def _pump(self, source: Any, target: Any, to_client: bool) -> None:
        client = target if to_client else source
        try:
            while data := source.recv(65536):
                if not to_client and client not in self._heard:
                    self._heard.add(client)
                    self._changed.set()
                while self._mode_of(client) == "black_hole":
                    self._mode_changed.wait()
                if self._mode_of(client) == "delay":
                    gevent.sleep(self._delay)
                if to_client and self._mode_of(client) == "half_close":
                    continue
                if to_client and self._mode_of(client) == "truncate":
                    left = self._left.get(client, self._limit)
                    data = data[:left]
                    self._left[client] = left - len(data)
                target.sendall(data)
                if self._left.get(target) == 0:
                    self._end(target)
            self._end(target)
        except OSError:
            # One of the two was reset: so is the other. It also ends the pump of the other direction.
            self._reset(source)
            self._reset(target)

    def _reset(self, sock: Any) -> None:
        try:
            reset(sock)
        except OSError:
            pass  # closed already, and about to be forgotten

    def _end(self, sock: Any) -> None:
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # gone already

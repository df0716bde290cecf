"""Connections that are written for all runtimes: one over a socket, and one that does what its scenario says.

Their coroutine methods are plain ones where the runtime has no others: see `Runtime.adapt`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .harness import Runtime, do, within
from .server import EchoServer

#: Stands for the runtime's own class, which a `Runtime` puts in its place.
Stream: Any = object

#: How many connections `max_connections` allows, where a scenario does not say it.
CAP = 2


class Line(Stream):  # type: ignore[misc]
    """Asks for a line to be echoed, by the runtime's own `TcpConnection`."""

    base = "TcpConnection"
    rt: Runtime

    async def ask(self, text: str) -> str:
        """What is answered. It yields between the question and the answer."""
        await do(self.send(text.encode() + b"\n"))
        await self.rt.sleep(0)
        answer: bytes = await do(self.recv_until(b"\n"))
        return answer.decode().rstrip("\n")

    async def echo(self, text: str) -> None:
        """Fail if the answer is somebody else's."""
        answer = await self.ask(text)
        assert answer == text, f"somebody else's reply: {answer!r} to {text!r}"


def line_pool(rt: Runtime, server: EchoServer, kind: type = Line, **settings: Any) -> Any:
    """A pool of connections to a server."""
    settings.setdefault("max_connections", CAP)
    return rt.pool(kind, {"host": server.host, "port": server.port}, **settings)


async def ask(pool: Any, text: str, **options: Any) -> None:
    """Borrow, ask, give back."""
    async with within(pool.connection(**options)) as line:
        await line.echo(text)


Deed = Callable[[Any], Awaitable[Any]]


class Script:
    """What the connections of a scenario do, and have done.

    :param resets: the connections have a ``reset()``. Without one, a release is shorter.
    :ivar on_open: awaited in ``open()``, with the connection; so are the others in their methods. What they return is
        returned, but for None where a method says that all is well.
    :ivar made: the connections, in the order in which their dials began.
    :ivar said: what happened to which: the name of a method and the connection's number, from 0.
    :ivar now: connections that are opening, open or closing.
    :ivar most: the most that there were at once.
    """

    def __init__(self, resets: bool = False, **deeds: Deed) -> None:
        self._resets = resets or "on_reset" in deeds
        self.on_open: Deed = _nothing
        self.on_close: Deed = _nothing
        self.on_check: Deed = _nothing
        self.on_reset: Deed = _nothing
        self.on_keepalive: Deed = _nothing
        self.made: list[Any] = []
        self.said: list[tuple[str, int]] = []
        self.now = self.most = 0
        self.expired = False
        for name, deed in deeds.items():
            setattr(self, name, deed)

    def count(self, what: str) -> int:
        """How often a method was called."""
        return sum(name == what for name, _ in self.said)

    @property
    def kind(self) -> tuple[type, dict[str, Any]]:
        """The class of such connections, and its options."""
        return Resetting if self._resets else Scripted, {"script": self}

    def pool(self, rt: Runtime, **settings: Any) -> Any:
        """A pool of such connections, that does nothing of its own accord but what is asked for: its upkeep might make
        up for what is lost."""
        settings.setdefault("max_connections", CAP)
        settings.setdefault("check_after_idle", None)
        settings.setdefault("reap_expired_connections", "reap_interval" in settings)
        return rt.pool(*self.kind, **settings)


async def _nothing(connection: Any) -> None:
    """All is well."""


class Scripted:
    """A connection to nobody, that does what its script says."""

    rt: Runtime

    def __init__(self, script: Script) -> None:
        self.script = script
        self.number = len(script.made)
        self.connected = False
        script.made.append(self)

    def __repr__(self) -> str:
        return f"<connection {self.number}>"

    async def open(self) -> None:
        script = self.script
        script.said.append(("open", self.number))
        script.now += 1
        script.most = max(script.most, script.now)
        try:
            await script.on_open(self)
            self.connected = True
        finally:
            if not self.connected:
                script.now -= 1

    async def close(self) -> None:
        self.script.said.append(("close", self.number))
        try:
            await self.script.on_close(self)
        finally:
            self.connected = False
            self.script.now -= 1

    async def check(self) -> bool:
        self.script.said.append(("check", self.number))
        verdict = await self.script.on_check(self)
        return self.connected if verdict is None else bool(verdict)

    async def keepalive(self) -> bool:
        self.script.said.append(("keepalive", self.number))
        verdict = await self.script.on_keepalive(self)
        return self.connected if verdict is None else bool(verdict)

    def is_connected(self) -> bool:
        return self.connected

    def is_expired(self) -> bool:
        return self.script.expired


class Resetting(Scripted):
    """One that has a ``reset()``, too."""

    async def reset(self) -> None:
        self.script.said.append(("reset", self.number))
        await self.script.on_reset(self)

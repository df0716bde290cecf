"""Dials that a test holds back, and greenlets whose calls it looks at: what the tests of the pool share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import greenlet
from gevent.event import Event

from gsocketpool import Pool, TcpConnection
from tests.servers import Server

#: Seconds after which what a test waits for is taken not to come.
BOUND = 10.0


class Held(TcpConnection):
    """Its dial waits until the test lets it go on."""

    def __init__(self, dials: Dials) -> None:
        super().__init__("127.0.0.1", dials.server.port)
        self._dials = dials
        self._may_go_on = Event()
        self._dial_ended = Event()
        self._dial_error: Exception | None = None

    def open(self) -> None:
        self._dials.begin(self)
        assert self._may_go_on.wait(BOUND), "the test never let this dial go on"
        try:
            if self._dial_error is not None:
                raise self._dial_error
            super().open()
        finally:
            # Who waits for this runs when the dial's greenlet has handed over: by then the pool knows.
            self._dial_ended.set()

    def go_on(self, error: Exception | None = None) -> None:
        """Let the dial succeed, or fail with this error, and wait until it did."""
        self._dial_error = error
        self._may_go_on.set()
        assert self._dial_ended.wait(BOUND)


class Dials(list[Held]):
    """The dials that a pool has begun, in order."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self._begun = Event()

    def pool(self, **options: Any) -> Pool[Held]:
        return Pool(Held, {"dials": self}, **options)

    def begin(self, connection: Held) -> None:
        self.append(connection)
        self._begun.set()

    def wait(self, count: int) -> None:
        """Wait until so many have begun, and let everybody else run; fail if there are more."""
        while len(self) < count:
            self._begun.clear()
            assert self._begun.wait(BOUND), f"{len(self)} dials have begun, not {count}"
        gevent.sleep(0)
        gevent.sleep(0)
        assert len(self) == count


class Attempt:
    """A call in a greenlet of its own that ends with what was returned, or with the :exc:`Exception` that was raised.

    When the constructor returns, it has run until it waited.
    """

    def __init__(self, job: Callable[..., object], *args: object, **options: object) -> None:
        def attempt() -> object:
            try:
                return job(*args, **options)
            except Exception as error:
                return error

        self.greenlet = gevent.spawn(attempt)
        gevent.sleep(0)

    def ready(self) -> bool:
        return self.greenlet.ready()

    def result(self) -> Any:
        return self.greenlet.get(timeout=BOUND)


@contextmanager
def nobody_else_runs() -> Iterator[None]:
    """Fail if this greenlet hands over to another one."""
    me = greenlet.getcurrent()
    switches: list[object] = []

    def trace(event: str, args: Any) -> None:
        if args[0] is me:
            switches.append(args[1])

    before = greenlet.settrace(trace)
    try:
        yield
    finally:
        greenlet.settrace(before)
    assert switches == []

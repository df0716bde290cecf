"""Kill a greenlet at exactly one of its switch points.

A switch point is a place where a greenlet hands over to the hub. `Knife` counts them in one victim, and at the chosen
one either strikes while the victim is asleep, so that nothing has answered it yet, or in the moment in which it is
woken, so that the answer (a grant, an open socket, a reply) and the kill arrive together.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import gevent
import greenlet

ASLEEP = "asleep"
WAKING = "waking"


class Knife:
    """A context in which the victim's switch points are counted, and one of them is its last.

    :param point: which switch point, from 1; 0 strikes never, and only counts.
    :param when: `ASLEEP` or `WAKING`.
    :param error: makes what is thrown.
    """

    def __init__(self, point: int = 0, when: str = WAKING, error: Callable[[], BaseException] = gevent.GreenletExit):
        self._point = point
        self._when = when
        self._error = error
        self._victim: greenlet.greenlet | None = None
        self._hub = gevent.get_hub()
        self.points = 0
        self.struck = False

    def aim(self, victim: greenlet.greenlet | None = None) -> None:
        """Count in this greenlet from now on; by default in the one that calls. The first one aimed at stays it."""
        if self._victim is None:
            self._victim = greenlet.getcurrent() if victim is None else victim

    def __enter__(self) -> Knife:
        self._before = greenlet.settrace(self._trace)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        greenlet.settrace(self._before)

    def _trace(self, event: str, args: Any) -> None:
        if event not in ("switch", "throw") or self._victim is None or self.struck or self._victim.dead:
            return
        origin, target = args
        if origin is self._victim and target is self._hub:
            self.points += 1
            if self.points == self._point and self._when == ASLEEP:
                self.struck = True
                self._hub.loop.run_callback(self._strike)
        elif target is self._victim and self.points == self._point > 0 and self._when == WAKING:
            self.struck = True
            raise self._error()  # a trace function runs in the target: there this is as if it had been thrown

    def _strike(self) -> None:
        if self._victim:  # else it has ended
            self._victim.throw(self._error())

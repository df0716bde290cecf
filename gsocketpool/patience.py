"""One timer for all who wait as long as the pool's own rule says.

They come in the order of their deadlines, so a queue is enough, and the timer is the first one's. A timer for each is a
tenth of what a hand-off costs in gevent, and a quarter in asyncio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any
from weakref import ReferenceType

from gsocketpool.core import Place

__all__ = ["Patience"]

#: As many may stand here who have left, and so many more as do stand here when that is looked at.
SPARE = 16


class Patience:
    """Who stands at a place until its deadline: no earlier than that of the one before.

    Somebody has left as soon as his place has no `waiter` any more.

    :param pool: refers to the pool weakly, since that has this. Its ``_set_timer(limit, callback)`` has something
        called in so many seconds, or later, and answers what stops that.
    """

    __slots__ = ("_crowd", "_places", "_pool", "_stop")

    def __init__(self, pool: ReferenceType[Any]) -> None:
        self._pool = pool
        self._places: deque[Place[Any]] = deque()
        self._crowd = SPARE
        #: Stops the timer, which is that of the first, or of somebody who was; None if there is none.
        self._stop: Callable[[], object] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, place: Place[Any], deadline: float) -> None:
        """Somebody stands at a place now. Call `leave` once he does no longer, for whatever reason."""
        place.deadline = deadline
        places = self._places
        places.append(place)
        if self._stop is None:
            self._start()

    def leave(self) -> None:
        """Somebody has left."""
        places = self._places
        while places and places[0].waiter is None:
            places.popleft()
        if not places:
            if self._stop is not None:
                self._stop()
                self._stop = None
        elif len(places) > self._crowd:  # else those who leave would pile up behind the first
            live = [place for place in places if place.waiter is not None]
            places.clear()
            places.extend(live)
            self._crowd = 2 * len(live) + SPARE

    def _start(self) -> None:
        pool = self._pool()
        if pool is not None:  # whoever stands here keeps it
            self._stop = pool._set_timer(self._places[0].deadline - monotonic(), self._ring)

    def _ring(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None
        pool, places, now = self._pool(), self._places, monotonic()
        while pool is not None and places and places[0].deadline <= now:
            pool._wake(places.popleft())
        if places:
            self._start()

"""One timer for all who wait as long as the pool's own rule says.

They come in the order of their deadlines, so a queue is enough, and the timer is the first one's. A timer for each is a
tenth of what a hand-off costs in gevent, and a quarter in asyncio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final
from weakref import ReferenceType

from gsocketpool.core import Place

__all__ = ["Patience"]

#: As many may stand here who have left, and so many more as did stand here when that was last looked at.
SPARE: Final = 16
#: The deadline of who has left. Not that nobody waits at his place: he may stand there again, by a timer of his own.
LEFT: Final = -1.0


class Patience:
    """Who stands at a place until its deadline: no earlier than that of the one before.

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
        self._places.append(place)
        if self._stop is None:
            self._start()

    def leave(self, place: Place[Any]) -> None:
        """Somebody stands there no longer."""
        place.deadline = LEFT
        places = self._places
        while places and places[0].deadline == LEFT:
            places.popleft()
        if not places:
            self._crowd = SPARE
            if self._stop is not None:
                stop, self._stop = self._stop, None
                stop()
        elif len(places) > self._crowd:  # else those who leave would pile up behind the first
            self._places = deque(place for place in places if place.deadline != LEFT)
            self._crowd = 2 * len(self._places) + SPARE

    def _start(self) -> None:
        pool = self._pool()
        if pool is not None:  # whoever stands here keeps it
            self._stop = pool._set_timer(self._places[0].deadline - monotonic(), self._ring)

    def _ring(self) -> None:
        stop, self._stop = self._stop, None
        try:
            if stop is not None:
                stop()
            pool, now = self._pool(), monotonic()
            while pool is not None and self._places and self._places[0].deadline <= now:
                if self._places[0].deadline != LEFT:
                    pool._wake(self._places[0])
                self._places.popleft()
        finally:  # Ctrl-C may come in the middle, and the loop may go on
            if self._places:
                self._start()

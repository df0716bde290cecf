"""Notices when something can be read from an idle connection, for threads, which have no event loop that would: one
thread, for as long as there is anything to watch.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Final

from gsocketpool.workers import Crew

__all__ = ["Poller", "Watch"]

_POLLS: Final = hasattr(select, "poll")


class Watch:
    """One descriptor that is watched, until `found` is called, once, by the poller's thread."""

    __slots__ = ("descriptor", "found")

    def __init__(self, descriptor: int, found: Callable[[Watch], object]) -> None:
        self.descriptor = descriptor
        self.found = found


class Poller:
    """All that is watched in this process."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._lock = threading.RLock()  # a signal's handler may come here, too
        self._watches: dict[int, Watch] = {}
        self._bell: tuple[int, int] | None = None  # a pipe that wakes the thread, while there is one
        self._rung = False

    def watch(self, descriptor: int, found: Callable[[Watch], object]) -> Watch | None:
        """Call `found` once, when something can be read. It must not wait. None if the system cannot tell."""
        if not _POLLS:
            return None
        watch = Watch(descriptor, found)
        with self._lock:
            self._watches[descriptor] = watch
            if self._bell is None:
                self._bell = os.pipe()
                self._rung = False
                self._crew.hire(self._poll, self._bell, stays=True)
            else:
                self._ring()
        return watch

    def unwatch(self, watch: Watch) -> None:
        """No longer. The thread may still look at the descriptor, but it does not matter any more what it finds."""
        with self._lock:
            if self._watches.get(watch.descriptor) is watch:
                del self._watches[watch.descriptor]
                if not self._watches:
                    self._ring()

    def lose(self) -> None:
        """The thread is gone: this is the child of a fork."""
        if self._bell is not None:
            for end in self._bell:
                os.close(end)
        self.__init__(self._crew)  # type: ignore[misc]

    def _ring(self) -> None:
        if self._bell is not None and not self._rung:
            self._rung = True
            os.write(self._bell[1], b"!")

    def _poll(self, bell: tuple[int, int]) -> None:
        while True:
            poll = select.poll()
            with self._lock:
                if not self._watches:
                    self._bell = None
                    for end in bell:
                        os.close(end)
                    return
                if self._rung:
                    self._rung = False
                    os.read(bell[0], 1)
                for descriptor in self._watches:
                    poll.register(descriptor, select.POLLIN)
            poll.register(bell[0], select.POLLIN)
            ready = poll.poll()
            with self._lock:
                found = [watch for descriptor, _ in ready if (watch := self._watches.pop(descriptor, None)) is not None]
            for watch in found:
                watch.found(watch)

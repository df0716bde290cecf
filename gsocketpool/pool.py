"""The pool for gevent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import gevent
from gevent import get_hub, getcurrent
from gevent.monkey import get_original
from greenlet import greenlet

from gsocketpool.blocking import BlockingPool
from gsocketpool.core import Place
from gsocketpool.exceptions import ConnectionNotFoundError, PoolClosedError, PoolError, PoolExhaustedError

__all__ = ["ConnectionNotFoundError", "Pool", "PoolClosedError", "PoolError", "PoolExhaustedError"]

C = TypeVar("C")

_thread = get_original("_thread", "get_ident")


class Pool(BlockingPool[C]):
    """A pool of connections for the greenlets of one thread."""

    __slots__ = ("_home", "_hub")

    def _settle_in(self) -> None:
        self._hub = get_hub()
        self._home = _thread()

    def _park(self, place: Place[C], limit: float | None) -> None:
        hub = get_hub()
        if hub is not self._hub:
            raise PoolError(
                f"{self._label} was made in another thread; a gevent pool serves the greenlets of one thread only: "
                "make one in each, or use gsocketpool.threading.Pool"
            )
        place.waiter = getcurrent()
        if limit is None:
            try:
                hub.switch()
            finally:
                place.waiter = None
        else:
            timer = hub.loop.timer(limit)
            timer.start(_resume, place)
            try:
                hub.switch()
            finally:
                place.waiter = None
                timer.stop()
                timer.close()

    def _wake(self, place: Place[C]) -> None:
        self._hub.loop.run_callback(_resume, place)

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        if _thread() != self._home:  # the collector runs in whichever thread it pleases
            self._hub.loop.run_callback_threadsafe(_begin, job, args)
            return None
        return _begin(job, args)

    def _stop(self, task: object) -> None:
        if isinstance(task, gevent.Greenlet):
            self._hub.loop.run_callback_threadsafe(_end, task)

    @staticmethod
    def _sleep(duration: float) -> None:
        gevent.sleep(duration, ref=False)

    def _bounded(self, limit: float) -> AbstractContextManager[object]:
        return gevent.Timeout(limit, TimeoutError(f"not done after {limit:g} s"))

    def _may_raise(self, error: BaseException) -> bool:
        return not isinstance(error, gevent.GreenletExit)


def _resume(place: Place[Any]) -> None:
    """Called by the hub, and only by the hub: switch into whoever still waits there."""
    waiter = place.waiter
    if isinstance(waiter, greenlet):
        place.waiter = None
        waiter.switch()


def _begin(job: Callable[..., object], args: tuple[object, ...]) -> gevent.Greenlet[..., object]:
    def ended(task: gevent.Greenlet[..., object]) -> None:
        # Killed before it began, or while it slept: what it was to do is still to be done.
        if isinstance(task.value, gevent.GreenletExit):
            _begin(job, args)

    task = gevent.spawn(job, *args)
    task.rawlink(ended)
    return task


def _end(task: gevent.Greenlet[..., object]) -> None:
    task.kill(block=False)

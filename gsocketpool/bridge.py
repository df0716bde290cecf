"""Between greenlets and asyncio: the driver stands still in a greenlet, and what it waits for is awaited outside.

Whatever must be awaited in a greenlet of these is switched out to the greenlet's parent, which is a coroutine, or the
loop's callback that runs a `Job`; what comes of it is switched or thrown in. SQLAlchemy came up with that.

No frame of a greenlet that waits for its next call may refer to the greenlet, by whichever way, since the collector
does not see such a circle.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import weakref
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, Final, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from gsocketpool.core import Place

__all__ = ["Job", "Spares", "expire", "in_greenlet", "in_job", "settled", "sleep", "spares_of", "stand", "wait"]

R = TypeVar("R")

#: Seconds that the upkeep sleeps at most, where nothing is due: a timer takes no infinite number.
LONGEST_SLEEP: Final = 86_400.0

#: Greenlets that are kept for the next calls, for all pools of a loop. Each has some 20 KB of stack.
MOST_SPARE: Final = 100

#: A greenlet that was made below so many frames is not kept.
DEEP: Final = 100


class Spares(list[greenlet]):
    """The greenlets that are kept, for all pools of a loop, as long as one of them is open."""

    most = MOST_SPARE


_spares: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Spares] = weakref.WeakValueDictionary()


def spares_of(loop: asyncio.AbstractEventLoop) -> Spares:
    """The greenlets that are kept for this loop."""
    return _spares.setdefault(loop, Spares())


class _Outcome:
    """What came of a call: a bridge switches it out when it has ended."""

    __slots__ = ("error", "result")

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None


def _bridge() -> None:
    """A greenlet that makes one call after another, since a new one costs twenty times as much as a switch: CPython
    maps memory for its stack."""
    outcome = None
    while True:
        parent = getcurrent().parent
        assert parent is not None
        function, args = parent.switch(outcome)  # not given at the start, since a greenlet keeps that until its end
        del parent
        outcome = _Outcome()
        try:
            outcome.result = function(*args)
        except GreenletExit:
            raise  # it is being collected, or this is the user's own
        except BaseException as error:
            outcome.error = error
        del function, args


async def in_greenlet(spare: Spares, function: Callable[..., R], *args: object) -> R:
    """Call it in a greenlet, and await here what it awaits there.

    :param spare: bridges that nobody uses.
    """
    is_new = not spare
    if is_new:
        there = greenlet(_bridge)
        there.switch()
    else:
        there = spare.pop()
    there.parent = here = getcurrent()
    there.gr_context = here.gr_context
    del here
    answer: Any = there.switch(function, args)
    while type(answer) is not _Outcome:
        if there.dead:
            raise answer  # a GreenletExit
        try:
            answer = await answer
        except BaseException as error:
            there.parent = getcurrent()
            answer = there.throw(type(error), error, error.__traceback__)
        else:
            there.parent = getcurrent()
            answer = there.switch(answer)
    there.gr_context = None
    if len(spare) < spare.most and not (is_new and _is_deep()):
        spare.append(there)
    problem, result = answer.error, answer.result
    answer.error = answer.result = None  # the bridge still has it at hand
    if problem is not None:
        context = problem.__context__
        try:
            raise problem
        finally:
            if context is not None:
                problem.__context__ = context  # not what is being handled here, further out
            del problem, context  # they refer to this frame
    return result  # type: ignore[no-any-return]


def _is_deep() -> bool:
    """Whether a greenlet that was made here would be short of recursion for ever: it begins at the depth of its
    maker."""
    try:
        sys._getframe(DEEP)
    except ValueError:
        return False
    return True


def wait(awaitable: Awaitable[R]) -> R:
    """Await it, from inside such a greenlet."""
    parent = getcurrent().parent
    assert parent is not None
    try:
        return parent.switch(awaitable)  # type: ignore[no-any-return]
    finally:
        del awaitable  # a future keeps its error, which refers to this frame


def settled(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call what the user has written, and await its answer if it is of that kind."""
    answer = function(*args, **options)
    if not isawaitable(answer):
        return answer
    try:
        return wait(answer)
    finally:
        del answer  # likewise


def stand(loop: asyncio.AbstractEventLoop, place: Place[Any], limit: float | None) -> None:
    waiter = place.waiter = loop.create_future()
    timer = None if limit is None else loop.call_later(limit, expire, waiter)
    try:
        wait(waiter)
    finally:
        place.waiter = None
        if timer is not None:
            timer.cancel()


def sleep(loop: asyncio.AbstractEventLoop, place: Place[Any], duration: float) -> None:
    stand(loop, place, min(duration, LONGEST_SLEEP))


def expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Job(greenlet):
    """A greenlet that callbacks of the loop run. No task: nobody can cancel what he does not know of, neither before it
    has begun, nor between two steps. A coroutine that it awaits runs in a task."""

    #: When, by the loop's clock, it gets a TimeoutError instead of what it awaits.
    until: float | None = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        jobs: set[Job],
        function: Callable[..., object],
        args: tuple[object, ...],
    ) -> None:
        """
        :param jobs: they keep it while it waits, and nobody else does, or a future and it would keep each other.
        """
        super().__init__(functools.partial(function, *args))
        self._loop = loop
        self._jobs = weakref.ref(jobs)
        self._awaited: asyncio.Future[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tell = functools.partial(_tell, weakref.ref(self))

    def begin(self) -> None:
        """Run it, until it awaits something."""
        jobs = self._jobs()
        if jobs is not None:
            jobs.add(self)
            del jobs
            self.gr_context = contextvars.copy_context()
            self._goes_on(self.switch)

    def _goes_on(self, resume: Callable[..., Any], *args: object) -> None:
        self.parent = getcurrent()
        try:
            awaited = resume(*args)
        finally:
            if self.dead and (jobs := self._jobs()) is not None:
                jobs.discard(self)
        if self.dead:
            return
        if not asyncio.isfuture(awaited):
            # Not wrapped where it need not be: who is cancelled before his first step begins nothing.
            awaited = self._loop.create_task(awaited if asyncio.iscoroutine(awaited) else _awaits(awaited))
        self._awaited = awaited  # the loop itself refers to a task by a weak reference
        awaited.add_done_callback(self._tell)
        if self.until is not None:
            self._timer = self._loop.call_at(self.until, self._is_late)

    def has_come(self, awaited: asyncio.Future[Any]) -> None:
        """What it awaits is there."""
        self._awaited = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        error = asyncio.CancelledError() if awaited.cancelled() else awaited.exception()
        if error is None:
            self._goes_on(self.switch, awaited.result())
            return
        try:
            self._goes_on(self.throw, type(error), error, error.__traceback__)
        except (KeyboardInterrupt, SystemExit) as same:
            if same is not error:  # else the task has raised it already, out of the loop
                raise
        finally:
            del error  # it refers to this frame

    def _is_late(self) -> None:
        awaited, self._awaited, self._timer = self._awaited, None, None
        assert awaited is not None
        awaited.remove_done_callback(self._tell)
        awaited.add_done_callback(_ignore)
        awaited.cancel()
        self._goes_on(self.throw, TimeoutError)


def _tell(ref: weakref.ref[Job], awaited: asyncio.Future[Any]) -> None:
    job = ref()
    if job is not None:
        job.has_come(awaited)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Its error concerns nobody any more, and asyncio need not print it."""
    if not future.cancelled():
        future.exception()


def in_job() -> Job | None:
    """The job that is running, if one is."""
    job = getcurrent()
    return job if isinstance(job, Job) else None


async def _awaits(awaitable: Awaitable[R]) -> R:
    return await awaitable

"""The pool for asyncio.

The names are those of :mod:`gsocketpool`; what may wait is awaited. What the user has written (`open`, `close`,
`check`, `reset`, `keepalive`, and what :func:`~gsocketpool.wrap` is given) may be plain or ``async``.

Nothing is decided here. The driver that serves greenlets and threads serves tasks too: a call that may have to wait
runs in a greenlet of its own, inside its caller's task, and where it would stand still, it hands out what must be
awaited.
SQLAlchemy came up with that. A call that need not wait makes no greenlet.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import sys
import weakref
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from threading import get_ident
from time import monotonic
from types import EllipsisType, FrameType, TracebackType
from typing import Any, ClassVar, Final, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from gsocketpool.arguments import is_seconds
from gsocketpool.budget import Budget, Quota
from gsocketpool.connection import EndOfStreamError, LimitExceededError, Wrap, wrap
from gsocketpool.core import BY_HAND, NOBODY, RETIRED, Member, Place
from gsocketpool.driver import Borrowing, Driver, exception, is_ours
from gsocketpool.exceptions import (
    BreakerOpenError,
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
)
from gsocketpool.group import Endpoint as GroupEndpoint
from gsocketpool.group import Group
from gsocketpool.retrying import for_asyncio as retry
from gsocketpool.stats import GroupStats, Holder, PoolStats
from gsocketpool.streams import Connection, StreamConnection, TcpConnection, UnixConnection
from gsocketpool.upkeep import stirs

__all__ = [
    "BreakerOpenError",
    "Budget",
    "Connection",
    "ConnectionNotFoundError",
    "EndOfStreamError",
    "GroupStats",
    "Holder",
    "LimitExceededError",
    "Pool",
    "PoolClosedError",
    "PoolError",
    "PoolExhaustedError",
    "PoolGroup",
    "PoolStats",
    "Quota",
    "StreamConnection",
    "TcpConnection",
    "UnixConnection",
    "Wrap",
    "retry",
    "wrap",
]

C = TypeVar("C")
R = TypeVar("R")
P = TypeVar("P", bound="Pool[Any]")
G = TypeVar("G", bound="PoolGroup[Any]")

#: Seconds that the upkeep sleeps at most, where nothing is due: a timer takes no infinite number.
LONGEST_SLEEP: Final = 86_400.0

#: Greenlets that are kept for the next calls, for all pools of a loop. Each has some 20 KB of stack.
MOST_SPARE: Final = 100

#: A greenlet that was made below so many frames is not kept.
DEEP: Final = 100


class _Spares(list[greenlet]):
    """The greenlets that are kept, for all pools of a loop, as long as one of them is open."""

    most = MOST_SPARE


_spares: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, _Spares] = weakref.WeakValueDictionary()


class Lease(Borrowing[C]):
    """What :meth:`Pool.connection` returns: borrows when the block is entered, gives back when it is left."""

    __slots__ = ()

    _pool: Pool[C]

    async def __aenter__(self) -> C:
        if self._member is not None:
            raise RuntimeError("this block is entered already; call connection() again for a second connection")
        pool, timeout = self._pool, self._timeout
        lane = pool._lane_with
        if lane and get_running_loop() is pool._loop and (timeout is ... or is_seconds(timeout)):
            member = lane.pop()
            member.uses += 1
            member.holder = self
        else:
            self._member = NOBODY  # entered already, should another task try while this one waits
            try:
                member = await pool._borrow(self, 10, 0, timeout)
            except BaseException:
                self._member = None
                raise
        self._member = member
        return member.connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        member, self._member = self._member, None
        if member is None or member.holder is not self:
            return  # dropped inside the block
        pool = self._pool
        if kind is None or not pool._settings.discards(kind):
            if kind is None and pool._lane_in:
                pool._warm.append(member)
                member.holder = None
            elif kind is None and pool._plain:
                outcome = pool.give(member)
                if outcome is not None:
                    pool._settle(outcome, member)
            else:
                await pool._run(pool._return, member)
        else:
            pool._discard(member)


class LeaseByHand(Lease[C]):
    """A lease of a pool whose subclass has an `acquire` or a `release` of its own: it calls them."""

    __slots__ = ()

    async def __aenter__(self) -> C:
        timeout = self._timeout
        connection = await (self._pool.acquire() if timeout is ... else self._pool.acquire(timeout=timeout))
        self._member = self._pool._members.get(id(connection), NOBODY)
        return connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        member, self._member = self._member, None
        if member is None or member.holder is not BY_HAND:
            return  # given up inside the block
        if kind is None or not self._pool._settings.discards(kind):
            await self._pool.release(member.connection)
        else:
            self._pool._discard(member)


class Pool(Driver[C]):
    """A pool of connections for the tasks of one event loop.

    ::

        async with Pool(TcpConnection, {"host": "10.0.0.1", "port": 6000}) as pool:
            async with pool.connection(timeout=2) as conn:
                await conn.send(b"hello")

    What :class:`gsocketpool.Pool` says of its parameters holds here, but for these:

    :param initial_connections: must be 0, for a constructor cannot wait: use `min_idle` and :meth:`wait_ready`.
    :param reclaim: it is a task whose end takes back what it had borrowed.
    :raises RuntimeError: no event loop is running. Make the pool in a coroutine.

    A cancelled task costs what a killed greenlet does there: its connection if it has one, its place in the queue if it
    waits, and nothing else. Calls from another event loop raise :exc:`~gsocketpool.PoolError`.

    Close the pool before its loop ends: nothing can be closed afterwards.
    """

    _lease: ClassVar[type[Lease[Any]]] = Lease
    _home_name = "event loop"

    _runtime = "gsocketpool.asyncio"

    __slots__ = ("__dict__", "_context", "_jobs", "_loop", "_outside", "_process", "_spare", "_thread")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not (is_ours(cls.acquire) and is_ours(cls.release)):
            cls._lease = LeaseByHand

    async def acquire(self, retry: int = 10, retried: int = 0, *, timeout: float | EllipsisType | None = ...) -> C:
        """Borrow a connection: an idle one, one that is given back, or a new one, whichever comes first.

        Give it back with :meth:`release`, or :meth:`drop` it; :meth:`connection` does that by itself.

        :param retry: as for :meth:`gsocketpool.Pool.acquire`.
        :param retried: likewise.
        :param timeout: seconds for the whole of it, a dial included; None waits for ever; 0 takes an idle connection or
            raises, and never yields to another task.
        :raises PoolExhaustedError: none could be had in that time, or `max_waiting` wait already.
        :raises PoolClosedError: the pool is closed.
        :raises Exception: whatever `open()` raised in the dial that was made for this borrower.
        """
        lane = self._lane_out
        if lane and timeout is ... and retry == 10 and retried == 0 and get_running_loop() is self._loop:
            self._latest = member = lane.pop()
            member.uses += 1
            member.holder = BY_HAND
            return member.connection
        return (await self._borrow(BY_HAND, retry, retried, timeout)).connection

    async def release(self, conn: C) -> None:
        """Give back what :meth:`acquire` returned.

        If it is called while an exception passes through or is being handled (in a ``finally`` or an ``except``), it
        does as :meth:`connection` does: a cancellation and whatever `discard_on` names discard the connection, since
        the rest of a reply may still be under way on it.

        What ``close(timeout)`` took from its borrower can be released: nothing is done then.

        :raises ConnectionNotFoundError: it is not in use, or not this pool's.
        """
        if get_running_loop() is not self._loop:
            raise self._not_at_home()
        error = exception()
        if error is not None and error is self._outside:
            error = None
        member = self._latest
        if member.connection is conn and member.holder is BY_HAND and error is None:
            self._warm.append(member)
            member.holder = None
            return
        member = self._members.get(id(conn), NOBODY)
        if member.holder is not BY_HAND or not self._plain or error is not None:
            try:
                await self._run(self._release, conn, error)
            finally:
                error = None  # it may refer to this frame
        elif self._lane_in:
            self._warm.append(member)
            member.holder = None
        else:
            outcome = self.give(member)
            if type(outcome) is Place:
                self._wake(outcome)
            elif outcome is RETIRED:
                self._close_all([member])

    def connection(self, timeout: float | EllipsisType | None = ...) -> Lease[C]:
        """A context manager, for ``async with``, that borrows a connection and gives it back.

        A cancellation and any other exception that is no :exc:`Exception` discards the connection; so does an
        :exc:`Exception` that `discard_on` names. Nothing is swallowed.

        :param timeout: as for :meth:`acquire`.
        """
        return self._lease(self, timeout)

    async def drop(self, conn: C) -> None:
        """Remove a connection, idle or borrowed, and close it. Returns when it is closed.

        :raises ConnectionNotFoundError: it is not this pool's.
        """
        await self._run(self._drop, conn)

    async def drop_expired(self) -> None:
        """Close the idle connections whose ``is_expired()`` is true. The reaper does so every `reap_interval`."""
        await self._run(self._drop_expired)

    async def clear(self) -> None:
        """Retire all that was opened before this call, or is being opened: see :meth:`gsocketpool.Pool.clear`. Returns
        when the idle ones are closed."""
        await self._run(self._clear)

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return when `min_idle` connections are open, or `max_connections` if that is less by now.

        :param timeout: seconds to wait for that; None waits for ever.
        :raises PoolExhaustedError: they were not open in that time; `last_error` says why.
        :raises PoolClosedError: the pool is closed.
        """
        await self._run(self._wait_ready, timeout)

    async def close(self, timeout: float | None = None) -> None:
        """Close the pool: idle connections now, borrowed ones as they return, dials as they end.

        Whoever waits gets :exc:`PoolClosedError`. Returns when the idle ones are closed. Closing twice is fine.

        :param timeout: seconds to wait until what is borrowed has come back, and all is closed; what is still borrowed
            then is closed under its borrower's hands, which gets one second more. None waits for no borrower.
        """
        await self._run(self._close, timeout)

    def resize(self, max_connections: int) -> None:
        self._refuse_other_threads()
        super().resize(max_connections)

    def pause(self) -> None:
        self._refuse_other_threads()
        super().pause()

    def resume(self) -> None:
        self._refuse_other_threads()
        super().resume()

    async def __aenter__(self: P) -> P:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _create_connection(self) -> Any:
        """Make a connection and open it. A subclass may override this by a plain method, in which the inherited one
        answers the connection, or by an ``async def``, in which it must be awaited."""
        if asyncio.current_task() is None:
            return super()._create_connection()
        return _in_greenlet(self._spare, super()._create_connection)

    # What the driver asks of a runtime

    @classmethod
    def _home_is(cls) -> object:
        try:
            return get_running_loop()
        except RuntimeError:
            raise RuntimeError("no event loop is running: make the group in a coroutine, and use it there") from None

    def _settle_in(self) -> None:
        if self._settings.initial_connections:
            raise ValueError(
                "initial_connections must be 0 in asyncio, where a constructor cannot wait: use min_idle, and await "
                "wait_ready()"
            )
        try:
            self._loop = get_running_loop()
        except RuntimeError:
            raise RuntimeError("no event loop is running: make the pool in a coroutine") from None
        if self._budget is not None and self._budget.settles_in(self._loop) is not self._loop:
            raise PoolError("this budget serves pools of another event loop: make one in each")
        self._outside: BaseException | None = None
        if exception() is not None:  # asyncio.run() in an except clause, maybe
            self._loop.call_soon(self._look_outside)
        self._thread = get_ident()
        self._process = os.getpid()
        self._context = contextvars.copy_context()
        self._jobs: set[_Job] = set()
        self._spare = _spares.setdefault(self._loop, _Spares())

    async def _borrow(
        self, holder: object, retry: int, retried: int, timeout: float | EllipsisType | None
    ) -> Member[C]:
        wait = False
        if self._brimful and self._undialled and self._loop is get_running_loop():
            usual = timeout is ... and retry == 10 and retried == 0
            limit, lenient, wait = self._usual_limit if usual else self._limit(retry, retried, timeout)
        if not wait:
            return await self._run(self._acquire, holder, retry, retried, timeout)
        # What follows is for the commonest case where one must wait, since a greenlet would double what that costs.
        started = monotonic()
        place: Any = self.take(True)  # others wait, so this is a place behind them
        waiter = place.waiter = self._loop.create_future()
        timer = None if limit is None else self._loop.call_later(limit, _expire, waiter)
        try:
            await waiter
        except BaseException:
            self._leave(place)
            raise
        finally:
            place.waiter = None
            if timer is not None:
                timer.cancel()
        member: Member[C] | None = place.member
        if member is not None and not member.cold:
            member.holder = holder
            return member
        return await self._run(self._acquire_on, place, holder, limit, lenient, wait, started)

    async def _run(self, function: Callable[..., R], *args: object) -> R:
        """Call a method of the driver's, which may park."""
        if get_running_loop() is not self._loop:
            raise self._not_at_home()
        return await _in_greenlet(self._spare, function, *args)

    def _shut(self) -> Any:
        closed = super()._shut()
        # Whoever keeps a closed pool, by an error's traceback, say, keeps no greenlet.
        self._spare = _Spares()
        self._spare.most = 0
        return closed

    def _look_outside(self) -> None:
        self._outside = exception()  # is being handled where the loop is run, and concerns nobody in it

    def _refuse_other_threads(self) -> None:
        if get_ident() != self._thread:
            raise self._not_at_home()

    def _not_at_home(self) -> PoolError:
        return PoolError(f"{self._label} was made in another event loop, and serves that one only: make one in each")

    def _park(self, place: Place[C], limit: float | None) -> None:
        _stand(self._loop, place, limit)

    def _wake(self, place: Place[C]) -> None:
        waiter, place.waiter = place.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _rouse(self, place: Place[C]) -> None:
        self._soon(self._wake, place)

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        return self._soon(_Job(self._loop, self._jobs, job, args).begin)

    def _soon(self, callback: Callable[..., object], *args: object) -> object:
        try:
            if get_ident() == self._thread:
                return self._loop.call_soon(callback, *args, context=self._context)
            return self._loop.call_soon_threadsafe(callback, *args, context=self._context)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            return None  # whoever waited is gone, and nothing can be closed any more

    def _sleeper(self) -> Callable[[Place[Any], float], None]:
        return functools.partial(_sleep, self._loop)

    def _caller(self) -> Callable[..., Any]:
        return _settled

    def _within(self, limit: float, function: Callable[..., R], *args: Any) -> R:
        if not isinstance(getcurrent(), _Job):  # super()._create_connection() of an `async def` has failed
            return _await(asyncio.wait_for(_in_greenlet(self._spare, function, *args), limit))
        _set_limit(self._loop.time() + limit)
        try:
            return function(*args)
        except TimeoutError as error:
            if not error.args:
                error.args = (f"not done after {limit:g} s",)
            raise
        finally:
            _set_limit(None)

    def _borrower(self) -> object:
        return asyncio.current_task() or getcurrent()

    def _outer_frame(self) -> FrameType | None:
        parent = getcurrent().parent
        return None if parent is None else parent.gr_frame

    def _may_raise(self, error: BaseException) -> bool:
        return not isinstance(error, (asyncio.CancelledError, GreenletExit, GeneratorExit))

    def _report(self, what: str, error: BaseException, trace: bool = True) -> None:
        # What was merely cancelled is no news: a loop that ends cancels all.
        if isinstance(error, Exception) and isinstance(error.__cause__, Exception | None):
            super()._report(what, error, trace)
        else:
            self._say(logging.DEBUG, "%s: %s: %r", self._label, what, error)

    def _when_over(self, borrower: object, callback: Callable[[object], None]) -> Callable[[], object] | None:
        if not isinstance(borrower, asyncio.Future):
            return None
        borrower.add_done_callback(callback)
        return functools.partial(borrower.remove_done_callback, callback)

    def _watch(self, descriptor: int, member: Member[C]) -> object:
        watch = _Watch(descriptor)
        try:
            self._loop.add_reader(descriptor, _stirred, weakref.ref(self), member)
        except RuntimeError:  # a transport of the loop's has it: watch the same socket under another number
            watch.duplicate()
            self._loop.add_reader(watch.descriptor, _stirred, weakref.ref(self), member)
        return watch

    def _unwatch(self, watch: Any) -> None:
        # What the child of a fork tells its copy of the loop, the kernel would tell the parent's.
        if os.getpid() == self._process and not self._loop.is_closed():
            self._loop.remove_reader(watch.descriptor)


class _Watch:
    """The descriptor of an idle connection, or another one for the same socket, which is closed when nobody refers to
    this any more."""

    __slots__ = ("_is_mine", "descriptor")

    def __init__(self, descriptor: int) -> None:
        self._is_mine = False
        self.descriptor = descriptor

    def duplicate(self) -> None:
        self.descriptor = os.dup(self.descriptor)
        self._is_mine = True

    def __del__(self) -> None:
        if self._is_mine:
            os.close(self.descriptor)


def _stirred(ref: weakref.ref[Pool[Any]], member: Member[Any]) -> None:
    """Called by the loop when there is something to read on an idle connection."""
    pool = ref()
    if pool is not None:
        pool._upkeep.look_away(pool, member)  # or the loop would call again at once
        pool._spawn(stirs, pool, member)


# The bridge: whatever must be awaited in a greenlet of these is switched out to the greenlet's parent, which is a
# coroutine below, or the loop's callback that runs a `_Job`; what comes of it is switched or thrown in.
#
# No frame of a greenlet that waits for its next call may refer to the greenlet, by whichever way, since the collector
# does not see such a circle.


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


async def _in_greenlet(spare: _Spares, function: Callable[..., R], *args: object) -> R:
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


def _await(awaitable: Awaitable[R]) -> R:
    """Await it, from inside such a greenlet."""
    parent = getcurrent().parent
    assert parent is not None
    try:
        return parent.switch(awaitable)  # type: ignore[no-any-return]
    finally:
        del awaitable  # a future keeps its error, which refers to this frame


def _settled(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call what the user has written, and await its answer if it is of that kind."""
    answer = function(*args, **options)
    if not isawaitable(answer):
        return answer
    try:
        return _await(answer)
    finally:
        del answer  # likewise


def _stand(loop: asyncio.AbstractEventLoop, place: Place[Any], limit: float | None) -> None:
    waiter = place.waiter = loop.create_future()
    timer = None if limit is None else loop.call_later(limit, _expire, waiter)
    try:
        _await(waiter)
    finally:
        place.waiter = None
        if timer is not None:
            timer.cancel()


def _sleep(loop: asyncio.AbstractEventLoop, place: Place[Any], duration: float) -> None:
    _stand(loop, place, min(duration, LONGEST_SLEEP))


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class _Job(greenlet):
    """A greenlet that callbacks of the loop run. No task: nobody can cancel what he does not know of, neither before it
    has begun, nor between two steps. A coroutine that it awaits runs in a task."""

    #: When, by the loop's clock, it gets a TimeoutError instead of what it awaits.
    until: float | None = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        jobs: set[_Job],
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


def _tell(ref: weakref.ref[_Job], awaited: asyncio.Future[Any]) -> None:
    job = ref()
    if job is not None:
        job.has_come(awaited)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Its error concerns nobody any more, and asyncio need not print it."""
    if not future.cancelled():
        future.exception()


def _set_limit(until: float | None) -> None:
    """Of the job that is running."""
    job = getcurrent()
    assert isinstance(job, _Job)
    job.until = until


async def _awaits(awaitable: Awaitable[R]) -> R:
    return await awaitable


class Endpoint(GroupEndpoint[C], Pool[C]):
    """The pool of one endpoint of a group."""


class PoolGroup(Group[C, Pool[C], Lease[C]]):
    """A pool for each endpoint, made when it is first asked for, all with the same parameters; and one cap over all.

    ::

        async with group.connection(host="10.0.0.1", port=6000) as conn:
            ...

    What :class:`gsocketpool.PoolGroup` says of its parameters holds here. A group belongs to one event loop, as a pool
    does.
    """

    _endpoint = Endpoint

    async def clear(self) -> None:
        """:meth:`Pool.clear` of all endpoints, side by side."""
        await self._run(self._clear)

    async def close(self, timeout: float | None = None) -> None:
        """:meth:`Pool.close` of all endpoints, side by side, and of the group.

        :param timeout: as for a pool; one time for all.
        """
        await self._run(self._close, timeout)

    async def _run(self, function: Callable[..., None], *args: object) -> None:
        if get_running_loop() is not self._home:
            raise PoolError(f"{self._label} was made in another event loop, and serves that one only: make one in each")
        await _in_greenlet(_spares.setdefault(get_running_loop(), _Spares()), function, *args)

    async def __aenter__(self: G) -> G:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

"""The pool for asyncio.

The names are those of :mod:`gsocketpool`; what may wait is awaited. What the user has written (`open`, `close`,
`check`, `reset`, `keepalive`, and what :func:`~gsocketpool.wrap` is given) may be plain or ``async``.

Nothing is decided here. The driver that serves greenlets and threads serves tasks too: a call that may have to wait
runs in a greenlet, inside its caller's task, and where it would stand still, it hands out what must be awaited: see
:mod:`gsocketpool.bridge`. A call that need not wait uses no greenlet.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
from asyncio import get_running_loop
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from types import CoroutineType, EllipsisType, FrameType, TracebackType
from typing import Any, ClassVar, Final, NoReturn, TypeVar

from greenlet import GreenletExit, getcurrent

from gsocketpool.arguments import is_seconds
from gsocketpool.bridge import Job, Spares, expire, in_greenlet, in_job, settled, sleep, spares_of, stand, wait
from gsocketpool.budget import Budget, Quota
from gsocketpool.connection import EndOfStreamError, LimitExceededError, Wrap, wrap
from gsocketpool.core import BY_HAND, NOBODY, RETIRED, Member, Place
from gsocketpool.driver import Borrowing, Driver, exception, is_ours
from gsocketpool.events import Listener
from gsocketpool.exceptions import (
    BreakerOpenError,
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
)
from gsocketpool.group import Endpoint as GroupEndpoint
from gsocketpool.group import Group
from gsocketpool.loans import outwards
from gsocketpool.patience import Patience
from gsocketpool.retrying import for_asyncio as retry
from gsocketpool.stats import GroupStats, Holder, PoolStats
from gsocketpool.streams import Connection, StreamConnection, TcpConnection, UnixConnection
from gsocketpool.upkeep import stirred
from gsocketpool.view import debug

__all__ = [
    "BreakerOpenError",
    "Budget",
    "Connection",
    "ConnectionNotFoundError",
    "EndOfStreamError",
    "GroupStats",
    "Holder",
    "LimitExceededError",
    "Listener",
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
    "debug",
    "retry",
    "wrap",
]

#: What ends a task or a greenlet, from outside.
CANCELLED: Final = (asyncio.CancelledError, GreenletExit, GeneratorExit)

C = TypeVar("C")
R = TypeVar("R")
P = TypeVar("P", bound="Pool[Any]")
G = TypeVar("G", bound="PoolGroup[Any]")


class _Async:
    """Entered by ``async with`` only."""

    __slots__ = ()

    def __enter__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} of gsocketpool.asyncio is entered by `async with`, not by `with`")

    def __exit__(self, *_: object) -> None:
        raise NotImplementedError


class Lease(_Async, Borrowing[C]):
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


class Pool(_Async, Driver[C]):
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
    _awaits = True

    _runtime = "gsocketpool.asyncio"

    __slots__ = ("__dict__", "_context", "_jobs", "_loop", "_outside", "_patience", "_process", "_spare", "_thread")

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

        Whoever waits gets :exc:`PoolClosedError`. Returns when the idle ones are closed, and what was being
        closed already, but for that it waits a second at most. Closing twice is fine.

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
        return in_greenlet(self._spare, super()._create_connection)

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
        self._jobs: set[Job] = set()
        self._spare = spares_of(self._loop)
        self._patience = Patience(self._ref)

    async def _borrow(
        self, holder: object, retry: int, retried: int, timeout: float | EllipsisType | None
    ) -> Member[C]:
        usual = wait = False
        if self._brimful and self._undialled and self._loop is get_running_loop():
            usual = timeout is ... and retry == 10 and retried == 0
            limit, lenient, wait = self._usual_limit if usual else self._limit(retry, retried, timeout)
        if not wait:
            return await self._run(self._acquire, holder, retry, retried, timeout)
        # What follows is for the commonest case where one must wait, since a greenlet would double what that costs.
        started = monotonic()
        place: Any = self.take(True)  # others wait, so this is a place behind them
        timer = None
        try:
            try:
                waiter = place.waiter = self._loop.create_future()
                if usual and limit is not None:
                    self._patience.enter(place, started + limit)
                elif limit is not None:
                    timer = self._loop.call_later(limit, expire, waiter)
                await waiter
            finally:
                place.waiter = None
                if usual:
                    self._patience.leave(place)
                elif timer is not None:
                    timer.cancel()
        except BaseException:
            self._leave(place)
            raise
        member: Member[C] | None = place.member
        if member is not None and not member.cold:
            member.holder = holder
            return member
        return await self._run(self._acquire_on, place, holder, limit, lenient, wait, started)

    async def _run(self, function: Callable[..., R], *args: object) -> R:
        """Call a method of the driver's, which may park."""
        if get_running_loop() is not self._loop:
            raise self._not_at_home()
        return await in_greenlet(self._spare, function, *args)

    def _shut(self) -> Any:
        closed = super()._shut()
        # Whoever keeps a closed pool, by an error's traceback, say, keeps no greenlet.
        self._spare = Spares()
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
        stand(self._loop, place, limit)

    def _set_timer(self, limit: float, callback: Callable[[], object]) -> Callable[[], object]:
        return self._loop.call_later(limit, callback, context=self._context).cancel

    def _wake(self, place: Place[C]) -> None:
        waiter, place.waiter = place.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _rouse(self, place: Place[C]) -> None:
        self._soon(self._wake, place)

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        return self._soon(Job(self._loop, self._jobs, job, args).begin)

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
        return functools.partial(sleep, self._loop)

    def _caller(self) -> Callable[..., Any]:
        return settled

    def _within(self, limit: float, function: Callable[..., R], *args: Any) -> R:
        job = in_job()
        if job is None:  # super()._create_connection() of an `async def` has failed
            return wait(asyncio.wait_for(in_greenlet(self._spare, function, *args), limit))
        job.until = self._loop.time() + limit
        try:
            return function(*args)
        except TimeoutError as error:
            if not error.args:
                error.args = (f"not done after {limit:g} s",)
            raise
        finally:
            job.until = None

    def _borrower(self) -> object:
        return asyncio.current_task() or getcurrent()

    def _frames_of(self, borrower: Any) -> list[FrameType]:
        if not isinstance(borrower, asyncio.Task):
            return []
        awaited: Any = borrower.get_coro()
        frames: list[FrameType] = []
        while isinstance(awaited, CoroutineType):  # a task that waits has no stack, but a chain of these
            frames[:0] = outwards(awaited.cr_frame)
            awaited = awaited.cr_await
        return frames

    def _is_over(self, borrower: Any) -> bool:
        return isinstance(borrower, asyncio.Task) and borrower.done()

    def _outer_frame(self) -> FrameType | None:
        parent = getcurrent().parent
        return None if parent is None else parent.gr_frame

    def _may_raise(self, error: BaseException) -> bool:
        return not isinstance(error, CANCELLED)

    def _report(self, what: str, error: BaseException, trace: bool = True) -> None:
        # What was merely cancelled is no news: a loop that ends cancels all.
        if isinstance(error, CANCELLED) or isinstance(error.__cause__, CANCELLED):
            self._say(logging.DEBUG, "%s: %s: %r", self._label, what, error)
        else:
            super()._report(what, error, trace)

    def _when_over(self, borrower: object, callback: Callable[[object], None]) -> Callable[[], object] | None:
        if not isinstance(borrower, asyncio.Future):
            return None
        borrower.add_done_callback(callback)
        return functools.partial(borrower.remove_done_callback, callback)

    def _watch(self, descriptor: int, member: Member[C]) -> object:
        watch = _Watch(descriptor)
        try:
            self._loop.add_reader(descriptor, stirred, self._ref, member)
        except RuntimeError:  # a transport of the loop's has it: watch the same socket under another number
            watch.duplicate()
            self._loop.add_reader(watch.descriptor, stirred, self._ref, member)
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


class Endpoint(GroupEndpoint[C], Pool[C]):
    """The pool of one endpoint of a group."""


class PoolGroup(_Async, Group[C, Pool[C], Lease[C]]):
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
        await in_greenlet(spares_of(get_running_loop()), function, *args)

    async def __aenter__(self: G) -> G:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

"""The pool for threads.

Each pool has a *monitor*, a lock that is held around every decision: driver and core run inside it as they run between
two switches where greenlets use them. It is left wherever a greenlet could be switched: while a borrower waits, and
while anything runs that the user has written (a dial, a close, a check, a log's handler). So what holds for greenlets
holds for threads. The pools of a group, and all pools of one budget, share one monitor, since they decide together.

The names are those of :mod:`gsocketpool`; gevent is not loaded.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import weakref
from _thread import allocate_lock, get_ident
from collections import deque
from collections.abc import Callable
from types import EllipsisType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gsocketpool import connection as _connection
from gsocketpool import forking
from gsocketpool.arguments import is_seconds
from gsocketpool.blocking import BlockingGroup, BlockingPool
from gsocketpool.blocking import Lease as BlockingLease
from gsocketpool.budget import Budget, Quota
from gsocketpool.connection import Connection, EndOfStreamError, LimitExceededError, Wrap, wrap
from gsocketpool.core import BY_HAND, NOBODY, Member, Place
from gsocketpool.driver import Driver, exception
from gsocketpool.events import Listener
from gsocketpool.exceptions import (
    BreakerOpenError,
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
)
from gsocketpool.group import Endpoint as GroupEndpoint
from gsocketpool.loans import outwards
from gsocketpool.poller import Poller, Watch
from gsocketpool.retrying import for_threads as retry
from gsocketpool.sockets import ThreadSockets
from gsocketpool.stats import GroupStats, Holder, PoolStats
from gsocketpool.upkeep import stirs
from gsocketpool.view import debug
from gsocketpool.workers import crew

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

C = TypeVar("C")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

#: So many connections of one pool are closed at once; the others wait for their turn.
MOST_CLOSING: Final = 32

#: Seconds that the upkeep sleeps at most, where nothing is due.
LONGEST_DOZE: Final = 86_400.0

Monitor: Final = type(threading.RLock())

#: Guards these, and what homes budgets have. Taken outside monitors only.
_settling = threading.RLock()
_monitors: weakref.WeakSet[Any] = weakref.WeakSet()


def _monitor_for(budget: object) -> Any:
    """The monitor of a pool, or a group, that is being made."""
    with _settling:
        monitor: Any = threading.RLock()
        if isinstance(budget, Budget):
            monitor = budget.settles_in(monitor)
            if type(monitor) is not Monitor:
                raise PoolError("this budget serves pools of another runtime: make one for the pools of threads")
        _monitors.add(monitor)
        crew.begin()
        return monitor


class _LastMonitor:
    """A monitor for when the interpreter ends. Then all other threads stop wherever they are, and whoever holds one
    will never let go: so the thread that is left does without."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self.release = monitor.release

    def acquire(self) -> None:
        while not self._monitor.acquire(timeout=0.05):
            if sys.is_finalizing():
                break

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        try:
            self.release()
        except RuntimeError:
            pass


def _leave(monitor: Any) -> int:
    """Leave it altogether. Answers how often it had been entered."""
    times = 0
    try:
        while True:
            monitor.release()
            times += 1
    except RuntimeError:
        return times


def _call_outside(monitor: Any, function: Callable[..., R], /, *args: Any, **options: Any) -> R:
    """Call it with the monitor left altogether, and come back, whatever a signal's handler raises on the way: nothing
    could be undone without it."""
    times = None
    interrupted = None
    try:
        times = _leave(monitor)
        return function(*args, **options)
    finally:
        if times is None:  # somewhere in there
            _leave(monitor)
            times = 1  # nobody waits, and nothing of the user's is called, in a call within a call
        while True:
            try:
                for _ in range(times):
                    monitor.acquire()
                break
            except BaseException as error:
                interrupted = error
                _leave(monitor)
        if interrupted is not None:
            try:
                raise interrupted
            finally:
                del interrupted


def _stand_still(monitor: Any, place: Place[Any], limit: float | None) -> None:
    if sys.is_finalizing():
        raise PoolError("the interpreter is about to end: there is nobody left who could wake this borrower")
    waiter = place.waiter = allocate_lock()
    place.waking = get_ident()
    waiter.acquire()
    try:
        _call_outside(monitor, waiter.acquire, True, -1 if limit is None else min(limit, threading.TIMEOUT_MAX))
    finally:
        place.waiter = None


def _doze(monitor: Any, place: Place[Any], duration: float) -> None:
    _stand_still(monitor, place, min(duration, LONGEST_DOZE))


def _enter_and_run(monitor: Any, job: Callable[..., object], args: tuple[object, ...]) -> None:
    with monitor:
        job(*args)


def _inside(function: F) -> F:
    """The method, called inside the monitor."""

    @functools.wraps(function)
    def inside(self: Any, /, *args: Any, **options: Any) -> Any:
        with self._monitor:
            return function(self, *args, **options)

    return inside  # type: ignore[return-value]


def _guard(cls: type, *names: str) -> None:
    """These methods and properties, which it inherits, are called inside the monitor from now on."""
    for name in names:
        found: Any = getattr(cls, name)
        if isinstance(found, property):
            getter: Any = found.fget
            setattr(cls, name, property(_inside(getter), doc=found.__doc__))
        else:
            setattr(cls, name, _inside(found))


class Lease(BlockingLease[C]):
    """What :meth:`Pool.connection` returns: borrows when the block is entered, gives back when it is left."""

    __slots__ = ()

    _pool: Pool[C]

    # The lines of the lanes are written out: two calls more would cost as much as all that is done here.

    def __enter__(self) -> C:
        pool, timeout = self._pool, self._timeout
        with pool._monitor:
            lane = pool._lane_with
            if lane and self._member is None and (timeout is ... or is_seconds(timeout)):
                self._member = member = lane.pop()
                member.uses += 1
                member.holder = self
                return member.connection
            return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pool = self._pool
        with pool._monitor:
            member = self._member
            if kind is None and pool._lane_in and member is not None and member.holder is self:
                self._member = None
                pool._warm.append(member)
                member.holder = None
            else:
                super().__exit__(kind, error, traceback)


class LeaseByHand(Lease[C]):
    """A lease of a pool whose subclass has an `acquire` or a `release` of its own: it calls them, as 0.1.6 did."""

    __slots__ = ()

    def __enter__(self) -> C:
        timeout = self._timeout
        pool = self._pool
        connection = pool.acquire() if timeout is ... else pool.acquire(timeout=timeout)
        with pool._monitor:
            self._member = pool._members.get(id(connection), NOBODY)
        return connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pool = self._pool
        with pool._monitor:
            member, self._member = self._member, None
            if member is None or member.holder is not BY_HAND:
                return  # given up inside the block
            if kind is not None and pool._settings.discards(kind):
                pool._discard(member)
                return
        pool.release(member.connection)


class Pool(BlockingPool[C]):
    """A pool of connections for threads: :class:`gsocketpool.Pool`, with its parameters and methods, for any number of
    threads. It may be made in one thread and used in others.

    What differs is due to one thing: a thread cannot be interrupted from outside.

    * Where greenlets are killed, give `timeout` to whatever may wait. A ``KeyboardInterrupt`` that the main thread gets
      while it waits, or inside a block, counts as a kill. One that strikes in the microseconds in which the pool itself
      decides can cost a slot: where a program goes on after it, have the signal's handler set a flag instead.
    * A ``close()`` that takes longer than `close_grace`, or a ``keepalive()`` that takes longer than `keepalive_grace`,
      gives up its slot or its connection in time; the thread that is in there ends when the call does.
    * `reclaim` takes back what a thread had borrowed and not given back when it ended.

    Connections are opened, closed and tended by daemon threads of the package's own, named ``gsocketpool-``, which end
    when there is nothing to do. No lock is held while they do that, or while anything else runs that is yours.
    """

    _runtime = "gsocketpool.threading"

    __slots__ = ("__dict__", "_closers", "_monitor", "_to_close")

    _monitor: Any

    _lease = Lease
    _lease_by_hand = LeaseByHand

    if not TYPE_CHECKING:  # the parameters are the driver's

        @functools.wraps(Driver.__init__)
        def __init__(self, *arguments, **settings):
            self._monitor = self._choose_monitor(settings.get("budget"))
            with self._monitor:
                super().__init__(*arguments, **settings)

    def _choose_monitor(self, budget: object) -> Any:
        return _monitor_for(budget)

    def _settle_in(self) -> None:
        self._to_close: deque[tuple[Any, ...]] = deque()
        self._closers = 0  # jobs that close them
        # Not first in a thread that dials: the child of a fork meanwhile would have a lock that nobody ever gives back.
        if self._options.get("tls"):
            import ssl  # noqa: F401

    def acquire(self, retry: int = 10, retried: int = 0, *, timeout: float | EllipsisType | None = ...) -> C:
        with self._monitor:
            lane = self._lane_out
            if lane and timeout is ... and retry == 10 and retried == 0:
                self._latest = member = lane.pop()
                member.uses += 1
                member.holder = BY_HAND
                return member.connection
            return self._acquire(BY_HAND, retry, retried, timeout).connection

    def release(self, conn: C) -> None:
        with self._monitor:
            member = self._latest
            if member.connection is conn and member.holder is BY_HAND and exception() is None:
                self._warm.append(member)
                member.holder = None
            else:
                super().release(conn)

    acquire.__doc__ = BlockingPool.acquire.__doc__
    release.__doc__ = BlockingPool.release.__doc__

    def __del__(self, at_the_end: Callable[[], bool] = sys.is_finalizing) -> None:
        # Called by the collector, in any thread and in the middle of anything: nothing is decided here. At the end of
        # the interpreter there may be no `sys` any more.
        if hasattr(self, "_upkeep") and not at_the_end():
            self._spawn(self._vanish)

    def __repr__(self) -> str:
        if not hasattr(self, "_monitor"):
            return super().__repr__()
        with self._monitor:
            return super().__repr__()

    def debug(self) -> str:
        if not hasattr(self, "_monitor"):
            return repr(self)
        with self._monitor:
            return super().debug()

    debug.__doc__ = BlockingPool.debug.__doc__

    def _after_fork(self, members: list[Member[C]], connections: list[C], places: list[Place[C]]) -> None:
        # Whoever stood here in another thread is gone.
        for queue in (self._dialled, self._undialled):
            for place in [*queue]:
                if place.waking != get_ident():
                    queue.leave(place)
        self._set_lanes()
        self._ready = [place for place in self._ready if place.waking == get_ident()]
        self._drains = [place for place in self._drains if place.waking == get_ident()]
        if self._ledger is not None:
            self._ledger.only_waits(self._borrower())
        self._to_close.clear()
        self._closers = 0
        super()._after_fork(members, connections, places)
        if not self._closed:
            self._upkeep.begin(self)

    # What a runtime supplies

    def _park(self, place: Place[C], limit: float | None) -> None:
        _stand_still(self._monitor, place, limit)

    def _wake(self, place: Place[C]) -> None:
        waiter = place.waiter
        if waiter is not None:
            place.waiter = None
            waiter.release()

    def _rouse(self, place: Place[C]) -> None:
        self._wake(place)

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        crew.hire(_enter_and_run, self._monitor, job, args)
        return None

    def _station(self, job: Callable[..., object], *args: object) -> None:
        crew.hire(_enter_and_run, self._monitor, job, args, stays=True)

    def _spawn_close(self, *args: Any) -> None:
        self._to_close.append(args)
        if self._closers < MOST_CLOSING:
            self._closers += 1
            self._spawn(self._close_some)

    def _close_some(self) -> None:
        try:
            while self._to_close:
                self._close_one(*self._to_close.popleft())
        finally:
            self._closers -= 1
            if self._to_close and not self._closers:  # something that ends the thread was raised
                self._spawn_close(*self._to_close.popleft())

    def _sleeper(self) -> Callable[[Place[Any], float], None]:
        return functools.partial(_doze, self._monitor)

    def _caller(self) -> Callable[..., Any]:
        return functools.partial(_call_outside, self._monitor)

    def _within(self, limit: float, function: Callable[..., R], *args: Any) -> R:
        answer: R = _call_outside(self._monitor, crew.within, limit, function, args)
        return answer

    def _borrower(self) -> object:
        return threading.current_thread()

    def _frames_of(self, borrower: Any) -> list[FrameType]:
        return outwards(sys._current_frames().get(borrower.ident))

    def _is_over(self, borrower: Any) -> bool:
        return not borrower.is_alive()

    def _may_raise(self, error: BaseException) -> bool:
        return True

    def _when_over(self, borrower: object, callback: Callable[[object], None]) -> Callable[[], object] | None:
        return _End(callback).disregard

    def _watch(self, descriptor: int, member: Member[C]) -> object:
        return _poller.watch(descriptor, functools.partial(_stirred, weakref.ref(self), member))

    def _unwatch(self, watch: Any) -> None:
        _poller.unwatch(watch)

    def _stirs(self, member: Member[C], watch: Watch) -> None:
        if member.watch is watch:
            member.watch = None
            stirs(self, member)


_guard(
    Pool,
    *("resize", "pause", "resume", "holders", "stats", "faults", "size", "idle", "in_use", "waiting", "total"),
    *("drop", "drop_expired", "clear", "wait_ready", "close", "_change_budget", "_create_connection"),
)


class Endpoint(GroupEndpoint[C], Pool[C]):
    """The pool of one endpoint of a group."""

    __slots__ = ()

    def _choose_monitor(self, budget: object) -> Any:
        group: Any = self._rounds._group()
        return group._monitor

    __del__ = Pool.__del__  # the group disowns it in `_vanish`

    def _vanish(self) -> None:
        group = self._rounds._group()
        if group is not None and group._pools.get(self._key) is self:
            return  # somebody has asked for it again
        self._rounds.disown(self)
        super()._vanish()


#: By their identity, as `forking.pools`.
_groups: weakref.WeakValueDictionary[int, PoolGroup[Any]] = weakref.WeakValueDictionary()


class PoolGroup(BlockingGroup[C, Pool[C]]):
    """A pool for each endpoint, for any number of threads: :class:`gsocketpool.PoolGroup`, with its parameters and
    methods. What differs between threads and greenlets is said at :class:`Pool`."""

    _endpoint = Endpoint
    _monitor: Any

    if not TYPE_CHECKING:

        @functools.wraps(BlockingGroup.__init__)
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self._monitor = _monitor_for(self._budget)
            _groups[id(self)] = self


_guard(PoolGroup, "_pool_of", "pools", "stats", "debug", "clear", "close", "__repr__")


_poller = Poller(crew)


def _stirred(ref: weakref.ref[Pool[Any]], member: Member[Any], watch: Watch) -> None:
    pool = ref()
    if pool is not None:
        pool._spawn(pool._stirs, member, watch)


# The end of a thread


class _Token:
    """Dies with its thread."""

    __slots__ = ("__weakref__",)


_of_this_thread = threading.local()


def _ended(
    callback: Callable[[object], None],
    token: object,
    at_the_end: Callable[[], bool] = sys.is_finalizing,  # since then there may be no `sys` here any more
) -> None:
    if not at_the_end():
        callback(token)


class _End:
    """Calls something when the thread that has made this ends."""

    __slots__ = ("_ref",)

    def __init__(self, callback: Callable[[object], None]) -> None:
        try:
            token = _of_this_thread.token
        except AttributeError:
            token = _of_this_thread.token = _Token()
        self._ref: weakref.ref[_Token] | None = weakref.ref(token, functools.partial(_ended, callback))

    def disregard(self) -> None:
        """It does not matter any more."""
        self._ref = None


# The end of the interpreter


@atexit.register
def _expect_the_end() -> None:
    for each in (*forking.pools.values(), *_groups.values()):
        if isinstance(each, (Pool, PoolGroup)) and type(each._monitor) is Monitor:
            each._monitor = _LastMonitor(each._monitor)  # around the same lock: others may still run


# Forks. The child has one thread. It must find no decision half made, and others must not be in the middle of one.


def _stop_deciding() -> None:
    _settling.acquire()
    monitors = [*_monitors]
    for monitor in monitors:
        monitor.acquire()
    _stopped.append(monitors)


def _go_on() -> None:
    for monitor in _stopped.pop():
        monitor.release()
    _settling.release()


def _lose_threads() -> None:
    crew.lose()
    _poller.lose()
    pools = [pool for pool in forking.pools.values() if isinstance(pool, Pool)]
    for pool in pools:
        pool._upkeep.lose_jobs()
    if pools:
        try:
            crew.begin()
        except RuntimeError:  # as many threads as there may be: the next pool that is made tries again
            pass


_stopped: list[list[Any]] = []
forking.first_of_all.append(_lose_threads)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_stop_deciding, after_in_parent=_go_on, after_in_child=_go_on)


# Connections


class StreamConnection(ThreadSockets, _connection.StreamConnection):
    """A byte stream over a socket: what :class:`TcpConnection` and :class:`UnixConnection` share."""


class TcpConnection(StreamConnection, _connection.TcpConnection):
    """A TCP connection for threads, over IPv4 or IPv6, with TLS if wanted: :class:`gsocketpool.TcpConnection`, with its
    parameters and methods, on the standard library's sockets.

    A thread cannot be interrupted. Connecting and the TLS handshake keep to ``connect_timeout``; looking a name up
    takes as long as the system's resolver does, and only then is it found that the time is over.
    """


class UnixConnection(StreamConnection, _connection.UnixConnection):
    """A connection over a Unix domain socket for threads: :class:`gsocketpool.UnixConnection`, with its parameters and
    methods, on the standard library's sockets."""

"""The pool for eventlet.

eventlet is on its way out: its maintainers repair what breaks, discourage any new use and `plan its retirement
<https://eventlet.readthedocs.io/en/latest/asyncio/migration.html>`_. This module is for programs that have not left it
yet. Where to go: :mod:`gsocketpool.asyncio`, as its maintainers advise; :mod:`gsocketpool.threading`; or gevent's pool,
in :mod:`gsocketpool` itself, where code keeps the style that it has. The names are the same in all of them.
"""

from __future__ import annotations

import _socket
import functools
import os
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

try:
    import eventlet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gsocketpool.eventlet needs eventlet, which is not there. Install it with:\n"
        '    pip install "gsocketpool[eventlet]"',
        name="eventlet",
    ) from error

from eventlet.greenthread import GreenThread
from eventlet.hubs import epolls, get_hub
from eventlet.patcher import original
from greenlet import GreenletExit, getcurrent, greenlet

from gsocketpool import connection as _connection
from gsocketpool import forking
from gsocketpool.blocking import BlockingGroup, BlockingPool
from gsocketpool.budget import Budget, Quota
from gsocketpool.connection import Connection, EndOfStreamError, LimitExceededError, Wrap, wrap
from gsocketpool.core import Member, Place
from gsocketpool.events import Listener
from gsocketpool.exceptions import (
    BreakerOpenError,
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
)
from gsocketpool.group import Endpoint as GroupEndpoint
from gsocketpool.retrying import for_eventlet as retry
from gsocketpool.sockets import EventletSockets
from gsocketpool.stats import GroupStats, Holder, PoolStats
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

C = TypeVar("C")
R = TypeVar("R")

#: Seconds that a timer is set to at most: `poll` takes no more than 24 days.
LONGEST_DOZE: Final = 86_400.0

# What these are called may stand for something else once `eventlet.monkey_patch` was called.
get_ident = original("_thread").get_ident
_local = original("threading").local()


class StreamConnection(EventletSockets, _connection.StreamConnection):
    """A byte stream over a socket: what :class:`TcpConnection` and :class:`UnixConnection` share."""


class TcpConnection(StreamConnection, _connection.TcpConnection):
    """A TCP connection for eventlet, over IPv4 or IPv6, with TLS if wanted: :class:`gsocketpool.TcpConnection`, with
    its parameters and methods, on eventlet's sockets."""


class UnixConnection(StreamConnection, _connection.UnixConnection):
    """A connection over a Unix domain socket for eventlet: :class:`gsocketpool.UnixConnection`, with its parameters and
    methods, on eventlet's sockets."""


class Home:
    """A thread in which there are pools, and its hub.

    It does what eventlet has no means for. Jobs can be given to it from any thread: the collector runs in whichever it
    pleases. The pools go on when `eventlet.hubs.use_hub` has put another hub in the place of theirs, as many programs
    do in the child of a fork: what stood still on the old hub, or was to begin there, never goes on by itself. And
    where that is not done, the child's hub shares nothing with the parent's.
    """

    def __init__(self) -> None:
        self.hub: Any = get_hub()
        self._jobs: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()  # that have not begun
        self._standing: dict[Place[Any], Pool[Any] | None] = {}
        self._bell: tuple[_socket.socket, ...] = ()
        self._hang_bell(self.hub)

    def leave(self) -> None:
        """Close the bell: the thread has ended."""
        for end in self._bell:
            end.close()

    @property
    def is_here(self) -> bool:
        """Whether this is the running thread's."""
        return getattr(_local, "home", None) is self

    def look(self) -> Any:
        """The hub; only in this thread."""
        hub = get_hub()
        if hub is not self.hub:
            self._hang_bell(hub)
            self.hub = hub
            self._begin_all()
            standing, self._standing = self._standing, {}
            for place, pool in standing.items():
                if pool is None:
                    self.wake(place)
                else:  # a borrower is lost, and what he would get is not
                    place.waiter = None
                    pool._leave(place)
        return hub

    def begin(self, job: Callable[..., object], *args: object) -> None:
        """Run a job in a greenlet of its own, soon; from any thread."""
        self._jobs.append((job, args))
        if self.is_here:
            self.look().schedule_call_global(0, self._begin_one)
        else:
            try:
                self._bell[1].send(b".")
            except OSError:
                pass  # it has been rung often enough, or the thread is gone

    def _hang_bell(self, hub: Any) -> None:
        # Not `socket`'s, which eventlet may have patched to wait for the hub.
        old, self._bell = self._bell, _socket.socketpair()
        for end in self._bell:
            end.setblocking(False)
        hub.add(hub.READ, self._bell[0].fileno(), self._answer, self._answer, None)
        for end in old:
            end.close()

    def _answer(self, _: object) -> None:
        try:
            self._bell[0].recv(4096)
        except BlockingIOError:
            pass
        self._begin_all()

    def _begin_all(self) -> None:
        for _ in range(len(self._jobs)):
            self.hub.schedule_call_global(0, self._begin_one)

    def part(self) -> None:
        """In the child of a fork: have an epoll and a bell that are not the parent's."""
        self.hub.listeners[self.hub.READ].pop(self._bell[0].fileno(), None)
        self.leave()  # first, since no other descriptor may be free
        if isinstance(self.hub, epolls.Hub):
            self.hub.poll = type(self.hub.poll)()
        self._hang_bell(self.hub)

    def listen_anew(self) -> None:
        """There, when the descriptors of the parent's connections lead nowhere."""
        if isinstance(self.hub, epolls.Hub):
            for fileno in {fileno for listeners in self.hub.listeners.values() for fileno in listeners}:
                try:
                    self.hub.register(fileno)
                except OSError:
                    pass  # it was closed, and nobody has told the hub

    def _begin_one(self) -> None:
        # Made now, not when the job was given: so nobody can kill it before it has begun.
        if self._jobs:
            job, args = self._jobs.popleft()
            greenlet(job, self.hub.greenlet).switch(*args)

    def stand(self, place: Place[Any], limit: float | None, pool: Pool[Any] | None = None) -> None:
        """Stand still at a place until it is woken, or so many seconds have passed. That keeps no program alive: in
        eventlet nothing does but the main greenlet.

        :param pool: the pool of a borrower; None for what must go on though the hub is another: the upkeep.
        """
        place.waiter = switch = getcurrent().switch
        timer = None
        try:
            hub = self.look()
            self._standing[place] = pool
            if limit is not None:
                timer = hub.schedule_call_global(min(limit, LONGEST_DOZE), switch)
            hub.switch()
        finally:
            place.waiter = None
            self._standing.pop(place, None)
            if timer is not None:
                timer.cancel()

    def wake(self, place: Place[Any]) -> None:
        """Let whoever stands there go on; only in this thread."""
        if place.waiter is not None:
            self.look().schedule_call_global(0, _go_on, place)


class Stay:
    """Ends with the thread."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def __del__(self) -> None:
        self._home.leave()


def _home() -> Home:
    """This thread's."""
    home: Home | None = getattr(_local, "home", None)
    if home is None:
        home = _local.home = Home()
        _local.stay = Stay(home)
    return home


def _in_child(do: Callable[[Home], None]) -> None:
    home = getattr(_local, "home", None)
    if home is not None:  # else no other thread's hub goes on here
        do(home)


forking.first_of_all.append(functools.partial(_in_child, Home.part))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=functools.partial(_in_child, Home.listen_anew))


def _go_on(place: Place[Any]) -> None:
    if place.waiter is not None:  # else he was killed, or his time was over, in the same turn of the hub
        place.waiter()


class Pool(BlockingPool[C]):
    """A pool of connections for the green threads of one thread. Parameters, methods and guarantees are those of
    :class:`gsocketpool.Pool`, with `eventlet.kill` and ``eventlet.Timeout`` where gevent's are meant there. Besides:

    - What a connection does must wait in eventlet's way: use this module's :class:`TcpConnection`, eventlet's own
      modules (``eventlet.green.socket``), or ``eventlet.monkey_patch()``.
    - `reclaim` takes back what green threads had borrowed that ``eventlet.spawn`` or a ``GreenPool`` has made;
      ``eventlet.spawn_n`` makes plain greenlets, whose end nobody is told of.
    - In the child of a fork the pool goes on with the hub that there is, or with another one if you call
      ``eventlet.hubs.use_hub()``; but for eventlet's hub over asyncio, which does not outlive a fork.
    """

    _runtime = "gsocketpool.eventlet"

    __slots__ = ("__dict__", "_home")

    @classmethod
    def _home_is(cls) -> object:
        return get_ident()

    def _settle_in(self) -> None:
        if self._budget is not None and self._budget.settles_in(get_ident()) != get_ident():
            raise PoolError("this budget serves pools of another thread: make one in each thread")
        self._home = _home()

    def _park(self, place: Place[C], limit: float | None) -> None:
        if not self._home.is_here:
            raise PoolError(
                f"{self._label} was made in another thread, and serves the green threads of that thread only: "
                "make one in each thread"
            )
        self._home.stand(place, limit, self)

    def _wake(self, place: Place[C]) -> None:
        if self._home.is_here:  # else this is the child of a fork, and whoever stood there is gone with his thread
            self._home.wake(place)

    def _rouse(self, place: Place[C]) -> None:
        self._home.begin(self._home.wake, place)

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        self._home.begin(job, *args)
        return None

    def _sleeper(self) -> Callable[[Place[Any], float], None]:
        return self._home.stand

    def _watch(self, descriptor: int, member: Member[C]) -> object:
        hub = self._home.look()
        told = functools.partial(stirred, self._ref, member)
        try:
            return hub, hub.add(hub.READ, descriptor, told, told, None)
        except OSError:  # no socket: the hub has noted it all the same
            hub.listeners[hub.READ].pop(descriptor, None)
            raise

    def _unwatch(self, watch: Any) -> None:
        hub, listener = watch
        try:
            hub.remove(listener)
        except (LookupError, ValueError, OSError):
            pass  # the descriptor was closed by somebody else, and the hub has noticed that

    def _end(self, job: Any) -> None:
        me, hub = getcurrent(), self._home.hub
        if job is me or job.dead or not self._home.is_here:
            return
        job.parent = me
        back = hub.schedule_call_global(0, me.switch)  # if the job waits on its way out
        try:
            job.throw(GreenletExit)
        finally:
            back.cancel()

    def _borrower(self) -> object:
        return getcurrent()

    def _when_over(self, borrower: object, callback: Callable[[object], None]) -> Callable[[], object] | None:
        if not isinstance(borrower, GreenThread):
            return None
        borrower.link(callback)
        return functools.partial(borrower.unlink, callback)

    def _within(self, limit: float, function: Callable[..., R], *args: Any) -> R:
        with eventlet.Timeout(limit, TimeoutError(f"not done after {limit:g} s")):
            return function(*args)

    def _may_raise(self, error: BaseException) -> bool:
        return not isinstance(error, GreenletExit)


class Endpoint(GroupEndpoint[C], Pool[C]):
    """The pool of one endpoint of a group."""

    __slots__ = ()


class PoolGroup(BlockingGroup[C, Pool[C]]):
    """A pool for each endpoint, and one cap over all: :class:`gsocketpool.PoolGroup`, with its parameters and methods,
    for the green threads of one thread."""

    _endpoint = Endpoint

"""The pool for gevent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, TypeVar

import gevent
from gevent import get_hub, getcurrent
from gevent.monkey import get_original

from gsocketpool.blocking import BlockingGroup, BlockingPool
from gsocketpool.core import Member, Place
from gsocketpool.exceptions import ConnectionNotFoundError, PoolClosedError, PoolError, PoolExhaustedError
from gsocketpool.group import Endpoint as GroupEndpoint
from gsocketpool.operations import shown
from gsocketpool.patience import Patience
from gsocketpool.upkeep import stirred

__all__ = ["ConnectionNotFoundError", "Pool", "PoolClosedError", "PoolError", "PoolExhaustedError", "PoolGroup"]

C = TypeVar("C")
R = TypeVar("R")

READ: Final = 1  # gevent's flag for an io watcher

#: Seconds that the upkeep sleeps at most, where nothing is due: a timer takes no infinite number. And what any timer is
#: set to at least: libuv warns of less.
LONGEST_DOZE: Final = 86_400.0
SHORTEST_WAIT: Final = 0.001

get_ident = get_original("_thread", "get_ident")


class Pool(BlockingPool[C]):
    """A pool of connections for the greenlets of one thread.

    Borrow with :meth:`connection` (a ``with`` block) or with :meth:`acquire` and :meth:`release`. A connection is
    opened when somebody asks for one and none is idle, up to `max_connections`; after that, borrowers wait in line.

    The parameters up to `reap_interval` are those of gsocketpool 0.1.6 and can be given by position; the others are
    new, by keyword only. Times are seconds, ``int`` or ``float``. Nothing is opened before all of them have been
    looked at.

    :param factory: makes a connection: a :class:`~gsocketpool.Connection` class, any callable that returns a new
        :class:`~gsocketpool.Connection` each time, or what :func:`~gsocketpool.wrap` returns for other objects.
    :param options: keyword arguments for `factory`; a copy is kept.
    :param initial_connections: opened before the constructor returns, side by side. If one fails, the others are
        closed and its error is raised.
    :param max_connections: most sockets at any time. A dial under way counts, and so does a close until it is done.
    :param reap_expired_connections: whether to call :meth:`drop_expired` every `reap_interval`.
    :param reap_interval: seconds between two such calls.
    :param name: what logs, errors and ``repr()`` call this pool; None: the factory's name.
    :param acquire_timeout: seconds for one acquire, its dial included, where the call gives no `timeout` of its own.
        None: the rule of 0.1.6, see :meth:`acquire`.
    :param check_after_idle: call ``check()`` before lending a connection that idled longer than this; 0: however short;
        None: never. What goes straight from one borrower to the next has not idled. A tick of the hub twice in that
        time tells who idled, so no clock is read when one is lent. The check may come somewhat early, and comes late if
        a greenlet that does not yield holds up the hub. The idea and the half second are HikariCP's.
    :param discard_on: an exception class, or a tuple of them. When one leaves the ``with`` block, the connection is
        closed instead of lent again. What is no :exc:`Exception` (a kill, a ``gevent.Timeout``) discards in any case.
        The default discards on every exception; narrow it where errors leave your protocol in a known state.
    :param max_connecting: most dials at once, as in PyMongo. Why 8: how many dials a server bears has nothing to do
        with the cores of its client. 8 hide the round trips of a cold start, and are no storm.
    :param max_waiting: once this many wait for a connection to come back, the next acquire fails at once. Waiters
        for whom there is room to dial do not count. None: no limit.
    :param order: which idle connection is lent: ``"lifo"``, the one used last, so that surplus ones grow old and can
        go; or ``"fifo"``, the one that idled longest, so that all are used in turn.
    :param min_idle: connections to keep idle and ready, beside those that are lent, as far as `max_connections`
        allows. They are opened in the background: the constructor does not wait, :meth:`wait_ready` does. One that is
        seen to be lost is replaced at once, one that was lent at the next tick, a quarter of a second at most.
        HikariCP's and PyMongo's idea.
    :param idle_timeout: seconds; a connection that nobody has touched for so long is closed (``idle``), as long as
        more than `min_idle` idle. May come late by a tenth. None: never.
    :param max_lifetime: seconds since its opening after which a connection goes (``expired``): at once if it idles,
        else when it comes back. HikariCP's and PgBouncer's. None: no limit.
    :param lifetime_jitter: up to this share of `max_lifetime`, 0 to 1, is taken off at random for each connection, so
        that what was opened together does not go together. The idea is HikariCP's.
    :param max_uses: a connection that was lent so often goes when it comes back (``expired``). None: no limit.
    :param keepalive: seconds; ``keepalive()`` is called on a connection that has idled for so long, and again each
        time as much has passed. It runs in a greenlet of the pool's own and may wait for the peer; meanwhile the
        connection is not lent; at most `max_connecting` run at once. False, an exception, or taking longer than
        `keepalive_grace` closes the connection (``stale``). Reserve, ask, give back: as HikariCP does. None: never.
    :param backoff: ``(first, longest)`` seconds. After a failed dial for `min_idle` the next one waits a random time,
        up to `first`; after another failure up to twice that, and so on, up to `longest` ("full jitter"). What a
        borrower waits for is dialled at once, and if that succeeds the waiting is over. Random backoff is what
        DBConnection does.
    :param leak_threshold: seconds; whoever has held a connection for longer is reported, once, as a warning that says
        who, for how long and where it was borrowed; when it comes back there is another. While it is set, the pool
        notes all that of each borrower, which costs time; see :meth:`holders`. HikariCP's leak detection. None: off.
    :param reclaim: whether to take back what a :class:`gevent.Greenlet` had borrowed and not given back when it ended:
        the connection is closed (``reclaimed``), and a warning says where it was borrowed. Leave it off where greenlets
        pass connections on to others. In DBConnection, too, the end of the owner does this. The pool then notes its
        borrowers, as above.
    :param budget: a :class:`~gsocketpool.Budget`: a cap on the sockets of several pools together. None: none.
    :param breaker: after so many dials in a row have failed, nothing is dialled for a random time, which begins with
        `backoff` and doubles each time as that does, but is half of the bound at least. Where no connection is left
        meanwhile, whoever asks for one gets :exc:`~gsocketpool.BreakerOpenError` at once; else he waits for those. Then
        one dial may try, as soon as somebody asks. If it succeeds, all is as before. Nygard's circuit breaker. None:
        off, each borrower who needs a dial has one.
    :param listeners: a list of :class:`~gsocketpool.Listener`: they are told what happens. Only one that overrides
        `borrowed` or `returned` costs anything while connections are at hand.
    :raises TypeError: a parameter has the wrong type; the message names it and says what it takes.
    :raises ValueError: a parameter has a wrong value; likewise.
    :raises Exception: whatever the dial of an initial connection raised.

    A pool that nobody refers to any more closes itself. Calls from another thread raise
    :exc:`~gsocketpool.PoolError` as soon as they would have to wait: make one pool in each thread.
    """

    _runtime = "gsocketpool"

    __slots__ = ("__dict__", "_home", "_hub", "_patience", "_run_callback", "_timer")

    @classmethod
    def _home_is(cls) -> object:
        return get_ident()

    def _settle_in(self) -> None:
        self._hub = get_hub()
        self._timer = self._hub.loop.timer
        self._run_callback = self._hub.loop.run_callback
        self._home = get_ident()
        if self._budget is not None and self._budget.settles_in(self._home) != self._home:
            raise PoolError("this budget serves pools of another thread: make one in each thread")
        self._patience = Patience(self._ref)

    def _park(self, place: Place[C], limit: float | None) -> None:
        hub = get_hub()
        if hub is not self._hub:
            raise self._not_at_home()
        place.waiter = switch = getcurrent().switch
        stop = None if limit is None else self._set_timer(limit, switch)
        try:
            hub.switch()
        finally:
            if stop is not None:
                stop()
            place.waiter = None
            if place.waking is not None:
                place.waking.stop()  # if it is done, that is nothing

    def _park_until(self, place: Place[C], deadline: float) -> None:
        hub = get_hub()
        if hub is not self._hub:
            raise self._not_at_home()
        place.waiter = getcurrent().switch
        try:
            self._patience.enter(place, deadline)
            hub.switch()
        except BaseException:
            if place.waking is not None:
                place.waking.stop()
            raise
        finally:
            place.waiter = None
            self._patience.leave(place)

    def _set_timer(self, limit: float, callback: Callable[[], object]) -> Callable[[], object]:
        timer = self._timer(max(limit, SHORTEST_WAIT))
        timer.start(callback)
        return timer.close

    def _not_at_home(self) -> PoolError:
        return PoolError(
            f"{self._label} was made in another thread, and serves the greenlets of that thread only: "
            "make one in each thread, or use gsocketpool.threading"
        )

    def _wake(self, place: Place[C]) -> None:
        if place.waiter is not None:
            place.waking = self._run_callback(place.waiter)
            place.waiter = None

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        if get_ident() == self._home:
            return _begin(job, args)
        loop = self._hub.loop
        if loop is not None:  # the collector runs in whichever thread it pleases
            loop.run_callback_threadsafe(_begin, job, args)
        return None

    def _rouse(self, place: Place[C]) -> None:
        loop = self._hub.loop
        if loop is not None:  # else the thread and its hub are gone, and whoever stood there with them
            loop.run_callback_threadsafe(self._wake, place)

    def _sleeper(self) -> Callable[[Place[Any], float], None]:
        return _sleep

    def _watch(self, descriptor: int, member: Member[C]) -> object:
        watcher = self._hub.loop.io(descriptor, READ, ref=False)
        watcher.start(stirred, self._ref, member)
        return watcher

    def _unwatch(self, watch: Any) -> None:
        watch.close()

    def _end(self, task: Any) -> None:
        me, hub = getcurrent(), self._hub
        if task is me or task.dead or get_hub() is not hub:
            return
        # The hub may be in the middle of its events and go on with one for the task, before any callback. So it is not
        # told of the end: what ends here comes back here.
        task.unlink_all()
        task.parent = me
        back = hub.loop.run_callback(me.switch)  # if the task waits on its way out
        try:
            task.throw(gevent.GreenletExit)
        finally:
            back.stop()
            if not task.dead:
                task.parent = hub

    def _borrower(self) -> object:
        return getcurrent()

    def _name_of(self, borrower: object) -> str:
        # gevent's own has the arguments in it.
        if not isinstance(borrower, gevent.Greenlet):
            return shown(borrower)
        run = getattr(borrower, "_run", None)
        name = "" if borrower.dead else f": {getattr(run, '__name__', None) or type(run).__name__}"  # gevent forgets it
        given = vars(borrower).get("name")
        return f"<{type(borrower).__name__}{f' {given!r}' if given else ''} at {id(borrower):#x}{name}>"

    def _when_over(self, borrower: object, callback: Callable[[object], None]) -> Callable[[], object] | None:
        if not isinstance(borrower, gevent.Greenlet):
            return None
        borrower.rawlink(callback)
        return functools.partial(borrower.unlink, callback)

    def _within(self, limit: float, function: Callable[..., R], *args: Any) -> R:
        with gevent.Timeout(limit, TimeoutError(f"not done after {limit:g} s")):
            return function(*args)

    def _may_raise(self, error: BaseException) -> bool:
        return not isinstance(error, gevent.GreenletExit)


def _sleep(place: Place[Any], duration: float) -> None:
    hub = get_hub()
    place.waiter = getcurrent().switch
    timer = hub.loop.timer(min(max(duration, SHORTEST_WAIT), LONGEST_DOZE), ref=False)
    timer.start(place.waiter)
    try:
        hub.switch()
    finally:
        timer.close()
        place.waiter = None
        if place.waking is not None:
            place.waking.stop()


def _begin(job: Callable[..., object], args: tuple[object, ...]) -> object:
    begun = False

    def run() -> None:
        nonlocal begun
        begun = True
        job(*args)

    def ended(_: object) -> None:
        if not begun:  # killed before that: what it was to do is still to be done
            _begin(job, args)

    task = gevent.spawn(run)
    task.rawlink(ended)
    return task


class Endpoint(GroupEndpoint[C], Pool[C]):
    """The pool of one endpoint of a group."""

    __slots__ = ()


class PoolGroup(BlockingGroup[C, Pool[C]]):
    """A pool for each endpoint, made when it is first asked for, all with the same parameters; and one cap over all.

    ::

        group = PoolGroup(TcpConnection, max_connections=10, max_total=100)
        with group.connection(host="10.0.0.1", port=6000) as conn:
            ...

    All that a pool can be told, :class:`~gsocketpool.Pool` says what, can be told to a group by keyword, and holds for
    each endpoint; but for `initial_connections`: use `min_idle` and :meth:`Pool.wait_ready`. One background greenlet
    tends them all. A group belongs to one thread, as a pool does.

    :param factory: makes a connection: as for a :class:`~gsocketpool.Pool`.
    :param max_connections: most sockets of one endpoint.
    :param max_total: most sockets of all endpoints; None: no such cap. See :class:`~gsocketpool.Budget` for who gets
        one when there are no more.
    :param key: called with the options; its answer says which endpoint they mean, and must be the same each time for
        the same options: it is not asked each time. The options with which an endpoint was asked for first are those
        with which its connections are made. None: options that are equal, in whichever order, mean the same endpoint;
        1, 1.0 and True are equal.
    :param forget_after: seconds; the pool of an endpoint that has no connection and no waiter for so long is
        forgotten, with its counts and whatever its ``resize()`` said. Whoever still refers to it can go on using it.
    :param name: what logs, errors and ``repr()`` call this group. Its pools are called so too, and by their ``host``
        and ``port``, or ``path``, where the options have those.
    :param max_connecting: most dials to one endpoint at once; None: 8, or a quarter of what `max_total` or `budget` is
        when the group is made, whichever is less, so that an endpoint whose dials hang cannot take the others' share.
    :param breaker: after so many dials to an endpoint have failed in a row, there is none for a while, and where none
        of its connections is left, whoever asks for one gets :exc:`~gsocketpool.BreakerOpenError` at once. See
        :class:`~gsocketpool.Pool`. None: off.
    :param budget: instead of `max_total`: a cap that is shared with other groups or pools.
    :raises TypeError: a parameter has the wrong type, or is unknown; the message names it and says what it takes.
    :raises ValueError: a parameter has a wrong value; likewise.
    """

    _endpoint = Endpoint

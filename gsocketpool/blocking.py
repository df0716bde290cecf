"""The pool in blocking style: what its users call where code waits by standing still, in gevent, in threads and in
eventlet. What is behind it is `driver`'s."""

from __future__ import annotations

from types import EllipsisType, TracebackType
from typing import Any, ClassVar, TypeVar

from gsocketpool.arguments import is_seconds
from gsocketpool.core import BY_HAND, NOBODY, RETIRED, Place
from gsocketpool.driver import Borrowing, Driver, exception, is_ours
from gsocketpool.group import Group

__all__ = ["BlockingGroup", "BlockingPool", "Lease", "LeaseByHand"]

C = TypeVar("C")
P = TypeVar("P", bound="BlockingPool[Any]")
B = TypeVar("B", bound="BlockingPool[Any]")
G = TypeVar("G", bound="BlockingGroup[Any, Any]")


class Lease(Borrowing[C]):
    """What :meth:`Pool.connection` returns: borrows when the block is entered, gives back when it is left."""

    __slots__ = ()

    _pool: BlockingPool[C]

    def __enter__(self) -> C:
        if self._member is not None:
            raise RuntimeError("this block is entered already; call connection() again for a second connection")
        pool, timeout = self._pool, self._timeout
        lane = pool._lane_with
        if lane and (timeout is ... or is_seconds(timeout)):
            member = lane.pop()
            member.uses += 1
            member.holder = self
        else:
            self._member = NOBODY  # entered already, should another greenlet try while this one waits
            try:
                member = pool._acquire(self, 10, 0, timeout)
            except BaseException:
                self._member = None
                raise
        self._member = member
        return member.connection

    def __exit__(
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
                pool._return(member)
        else:
            pool._discard(member)


class LeaseByHand(Lease[C]):
    """A lease of a pool whose subclass has an `acquire` or a `release` of its own: it calls them, as 0.1.6 did."""

    __slots__ = ()

    def __enter__(self) -> C:
        timeout = self._timeout
        connection = self._pool.acquire() if timeout is ... else self._pool.acquire(timeout=timeout)
        self._member = self._pool._members.get(id(connection), NOBODY)
        return connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        member, self._member = self._member, None
        if member is None or member.holder is not BY_HAND:
            return  # given up inside the block
        if kind is None or not self._pool._settings.discards(kind):
            self._pool.release(member.connection)
        else:
            self._pool._discard(member)


class BlockingPool(Driver[C]):
    """A pool whose `acquire` blocks the caller. See :class:`gsocketpool.Pool` for what the parameters mean."""

    _lease: ClassVar[type[Lease[Any]]] = Lease
    _lease_by_hand: ClassVar[type[Lease[Any]]] = LeaseByHand

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not (is_ours(cls.acquire) and is_ours(cls.release)):
            cls._lease = cls._lease_by_hand

    def acquire(self, retry: int = 10, retried: int = 0, *, timeout: float | EllipsisType | None = ...) -> C:
        """Borrow a connection: an idle one, one that is given back, or a new one, whichever comes first.

        Give it back with :meth:`release`, or :meth:`drop` it; :meth:`connection` does that by itself.

        :param retry: where neither `timeout` nor the pool's `acquire_timeout` is given, the rule of 0.1.6 holds:
            ``(retry - retried) * 0.1`` seconds of waiting for a place. Who has a place waits for his dial, which is
            bounded by the connection's own timeouts alone, and for his turn to dial: `max_connecting` at once.
        :param retried: how many of these tries are used up already.
        :param timeout: seconds for the whole of it, a dial included; None waits for ever; 0 takes an idle connection or
            raises, and never yields to another greenlet.
        :raises PoolExhaustedError: none could be had in that time, or `max_waiting` wait already.
        :raises PoolClosedError: the pool is closed.
        :raises Exception: whatever `open()` raised in the dial that was made for this borrower.
        """
        lane = self._lane_out
        if lane and timeout is ... and retry == 10 and retried == 0:
            self._latest = member = lane.pop()
            member.uses += 1
            member.holder = BY_HAND
            return member.connection
        return self._acquire(BY_HAND, retry, retried, timeout).connection

    acquire.__qualname__ = "Pool.acquire"  # what errors of a wrong call say

    def release(self, conn: C) -> None:
        """Give back what :meth:`acquire` returned.

        If it is called while an exception passes through or is being handled (in a ``finally`` or an ``except``), it
        does as :meth:`connection` does: a kill, a ``gevent.Timeout`` and whatever `discard_on` names discard the
        connection, since the rest of a reply may still be under way on it.

        What ``close(timeout)`` took from its borrower can be released, and in the child of a fork what is the parent's:
        nothing is done then.

        :raises ConnectionNotFoundError: it is not in use, or not this pool's.
        """
        member = self._latest
        if member.connection is conn and member.holder is BY_HAND and exception() is None:
            self._warm.append(member)
            member.holder = None
            return
        member = self._members.get(id(conn), NOBODY)
        if member.holder is not BY_HAND or not self._plain or exception() is not None:
            self._release(conn, exception())
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
        """A context manager that borrows a connection and gives it back.

        A kill, a ``gevent.Timeout`` and any other exception that is no :exc:`Exception` discards the connection;
        so does an :exc:`Exception` that `discard_on` names. Nothing is swallowed.

        :param timeout: as for :meth:`acquire`.
        """
        return self._lease(self, timeout)

    def drop(self, conn: C) -> None:
        """Remove a connection, idle or borrowed, and close it. Returns when it is closed.

        :raises ConnectionNotFoundError: it is not this pool's.
        """
        self._drop(conn)

    def drop_expired(self) -> None:
        """Close the idle connections whose ``is_expired()`` is true. The reaper does so every `reap_interval`."""
        self._drop_expired()

    def clear(self) -> None:
        """Retire all that was opened before this call, or is being opened: close what idles, and the rest as it comes
        back. Returns when the idle ones are closed.

        For a server that answers and is the wrong one: after a failover, or when a name means another address now.
        PyMongo calls what lies between two such calls a generation. It can be called inside a ``with`` block of the
        same pool.
        """
        self._clear()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return when `min_idle` connections are open, or `max_connections` if that is less by now. They are opened in
        the background in any case.

        :param timeout: seconds to wait for that; None waits for ever.
        :raises PoolExhaustedError: they were not open in that time; `last_error` says why.
        :raises PoolClosedError: the pool is closed.
        """
        self._wait_ready(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Close the pool: idle connections now, borrowed ones as they return, dials as they end.

        Whoever waits gets :exc:`PoolClosedError`. Returns when the idle ones are closed, and what was being
        closed already, but for that it waits a second at most. Closing twice is fine.

        :param timeout: seconds to wait until what is borrowed has come back, and all is closed; what is still borrowed
            then is closed under its borrower's hands, which gets one second more. None waits for no borrower.
        """
        self._close(timeout)

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class BlockingGroup(Group[C, B, Lease[C]]):
    """A group whose pools block the caller. See :class:`gsocketpool.PoolGroup`."""

    def clear(self) -> None:
        """:meth:`Pool.clear` of all endpoints, side by side."""
        self._clear()

    def close(self, timeout: float | None = None) -> None:
        """:meth:`Pool.close` of all endpoints, side by side, and of the group.

        :param timeout: as for a pool; one time for all.
        """
        self._close(timeout)

    def __enter__(self: G) -> G:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

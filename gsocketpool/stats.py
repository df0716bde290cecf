"""What a pool reports."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["GroupStats", "Holder", "PoolStats"]

C = TypeVar("C")


@dataclass(frozen=True)
class Holder(Generic[C]):
    """Who has borrowed a connection. All but the connection is None where the pool notes no borrowers: see
    ``leak_threshold`` and ``reclaim``.

    :ivar connection: the connection.
    :ivar greenlet: the greenlet that borrowed it.
    :ivar held: seconds since then.
    :ivar stack: where that was, as a traceback's text.
    """

    connection: C
    greenlet: Any
    held: float | None
    stack: str | None


@dataclass(frozen=True)
class PoolStats:
    """One look at a pool: its state, and what it has counted since it was made.

    :ivar size: connections in the pool, ``idle + in_use``.
    :ivar idle: connections that nobody uses.
    :ivar in_use: connections that are lent.
    :ivar opening: dials under way.
    :ivar waiting: borrowers that wait for a connection.
    :ivar max_connections: the cap on sockets, those being opened or closed included.
    :ivar acquired: how often a connection was lent.
    :ivar opened: dials that succeeded.
    :ivar open_failures: dials that failed.
    :ivar exhausted: how often :class:`~gsocketpool.PoolExhaustedError` was raised.
    :ivar closed: how many connections were closed, by reason: ``expired`` (``max_lifetime``, ``max_uses`` or
        ``is_expired()``), ``idle`` (``idle_timeout``), ``stale`` (failed its check or its keepalive), ``discarded``
        (its borrower was interrupted or failed, or its reset did), ``dropped`` (by hand), ``cleared``, ``shrunk``
        (``resize()``), ``evicted`` (to make room under a :class:`~gsocketpool.Budget`), ``reclaimed`` (from a greenlet
        that ended), ``closed`` (the pool was).
    :ivar breaker: ``closed`` as long as dials pass, ``open`` while none does, ``half-open`` when the next one is a
        trial, or that is under way.
    """

    size: int
    idle: int
    in_use: int
    opening: int
    waiting: int
    max_connections: int
    acquired: int
    opened: int
    open_failures: int
    exhausted: int
    closed: Mapping[str, int]
    breaker: str = "closed"


@dataclass(frozen=True, repr=False)
class GroupStats:
    """One look at a group.

    :ivar endpoints: the :class:`PoolStats` of each pool that there is now, by what the endpoint is known by: the answer
        of ``key``, or a frozen set of the options.
    :ivar max_total: the cap on all their sockets, None if there is none.
    """

    endpoints: Mapping[Hashable, PoolStats]
    max_total: int | None

    def __repr__(self) -> str:
        # Not the endpoints by name: there may be passwords among the options.
        return (
            f"<{type(self).__name__} of {len(self.endpoints)}: {self.idle} idle, {self.in_use} in use, "
            f"{self.opening} opening, {self.waiting} waiting, max_total {self.max_total}>"
        )

    @property
    def size(self) -> int:
        """Connections in all pools."""
        return self.idle + self.in_use

    @property
    def idle(self) -> int:
        """Connections that nobody uses."""
        return sum(stats.idle for stats in self.endpoints.values())

    @property
    def in_use(self) -> int:
        """Connections that are lent."""
        return sum(stats.in_use for stats in self.endpoints.values())

    @property
    def opening(self) -> int:
        """Dials under way."""
        return sum(stats.opening for stats in self.endpoints.values())

    @property
    def waiting(self) -> int:
        """Borrowers that wait for a connection."""
        return sum(stats.waiting for stats in self.endpoints.values())

"""What a pool reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Holder", "PoolStats"]

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
        (``resize()``), ``reclaimed`` (from a greenlet that ended), ``closed`` (the pool was).
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

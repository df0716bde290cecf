"""What a pool raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gsocketpool.stats import PoolStats

__all__ = ["ConnectionNotFoundError", "PoolClosedError", "PoolError", "PoolExhaustedError"]


class PoolError(Exception):
    """Whatever a pool has to complain about; the others derive from it."""


class PoolExhaustedError(PoolError):
    """No connection could be lent in the time that there was, or ``wait_ready()`` found too few open.

    :ivar stats: the pool's :class:`~gsocketpool.PoolStats` at that moment.
    :ivar waited: seconds that this borrower waited.
    :ivar last_error: the error with which the pool's last failed dial ended, or None.
    """

    def __init__(
        self,
        *args: object,
        stats: PoolStats | None = None,
        waited: float = 0.0,
        last_error: BaseException | None = None,
    ) -> None:
        super().__init__(*args)
        self.stats = stats
        self.waited = waited
        self.last_error = last_error


class PoolClosedError(PoolError):
    """The pool is closed, or was closed while this borrower waited."""


class ConnectionNotFoundError(PoolError):
    """The connection that was to be released or dropped is not in use, or not this pool's."""

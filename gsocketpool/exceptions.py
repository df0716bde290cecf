"""What a pool raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsocketpool.stats import PoolStats

__all__ = ["BreakerOpenError", "ConnectionNotFoundError", "PoolClosedError", "PoolError", "PoolExhaustedError"]


class PoolError(Exception):
    """Whatever a pool has to complain about; the others derive from it."""


class PoolExhaustedError(PoolError):
    """No connection could be lent in the time that there was, or ``wait_ready()`` found too few open.

    :ivar stats: the pool's :class:`~gsocketpool.PoolStats` at that moment. None only if no pool has raised it.
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
        # Typed as what a pool gives: nobody should have to ask whether it is None.
        self.stats: PoolStats = stats  # type: ignore[assignment]
        self.waited = waited
        self.last_error = last_error


class BreakerOpenError(PoolExhaustedError):
    """Nothing could be lent, and nothing is dialled for now, since too many dials in a row have failed: see `breaker`.

    :ivar failures: how many.
    :ivar since: when the first of them failed, in seconds since the epoch, as `time.time` has it.
    :ivar retry_after: seconds until the next dial may be tried; while one is under way, those after which it is worth
        asking again.
    """

    def __init__(self, *args: object, failures: int = 0, since: float = 0.0, retry_after: float = 0.0, **more: Any):
        super().__init__(*args, **more)
        self.failures = failures
        self.since = since
        self.retry_after = retry_after


class PoolClosedError(PoolError):
    """The pool is closed, or was closed while this borrower waited."""


class ConnectionNotFoundError(PoolError):
    """The connection that was to be released or dropped is not in use, or not this pool's."""

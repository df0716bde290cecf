"""What a pool says when it cannot lend: what happened, with which numbers, and what to do."""

from __future__ import annotations

import time
from time import monotonic
from typing import TYPE_CHECKING, Any

from gsocketpool.core import INSPECTED
from gsocketpool.exceptions import BreakerOpenError, PoolExhaustedError
from gsocketpool.loans import Loan
from gsocketpool.operations import shown

if TYPE_CHECKING:
    from gsocketpool.driver import Driver

__all__ = ["broken", "exhausted", "failing", "not_ready"]


def not_ready(pool: Driver[Any], started: float) -> PoolExhaustedError:
    """`wait_ready` had to give up."""
    if pool._paused:
        advice = "the pool is paused: resume() dials again"
    elif pool._budget is not None and not pool._budget.has_one():
        advice = pool._budget.advice
    elif pool._resting:
        rest = max(pool._upkeep.rest(pool, pool._setbacks), pool._upkeep.rest_of_break())
        advice = f"the next dial for them in {rest:.2f} s; wait longer (timeout=)"
    else:
        advice = "wait longer (timeout=)"
    return exhausted(pool, started, f"{pool.size} of min_idle={pool._min_idle} connections open", advice)


def exhausted(
    pool: Driver[Any], started: float, what: str = "no connection to lend", advice: str | None = None
) -> PoolExhaustedError:
    """None could be lent."""
    pool._exhausted += 1
    stats = pool.stats()
    waited = monotonic() - started
    parts = [
        f"{pool._label} has {what} after {waited:.3f} s: {stats.in_use} of at most {stats.max_connections} in use, "
        f"{stats.idle} idle, {stats.opening} opening, {pool._closing} closing, {stats.waiting} others waiting"
    ]
    if pool._last_error is not None:
        parts.append(f"the last connect error was {shown(pool._last_error)}")
    if advice is None:
        if pool._max_waiting is not None and stats.waiting >= pool._max_waiting:
            parts.append(f"as many wait as max_waiting={pool._max_waiting} allows")
        parts += _who_holds(pool)
        advice = _advice(pool)
    text = "; ".join([*parts, advice])
    error = PoolExhaustedError(text, stats=stats, waited=waited, last_error=pool._last_error)
    pool._tell("exhausted", error)
    return error


def broken(pool: Driver[Any], started: float) -> BreakerOpenError:
    """The breaker is open, and nothing is left to lend."""
    pool._exhausted += 1
    ago, left = time.time() - pool._failing_since, pool._upkeep.rest_of_break()
    when = f"in {left:.2f} s" if left and not pool._trying else "under way"
    text = (
        f"{pool._label} dials no more for now: {failing(pool)}, the first {ago:.1f} s ago, at "
        f"{time.strftime('%H:%M:%S', time.localtime(pool._failing_since))}, the last with {shown(pool._last_error)}; "
        f"the next try is {when} (breaker={pool._break_after})"
    )
    error = BreakerOpenError(
        text,
        stats=pool.stats(),
        waited=monotonic() - started,
        last_error=pool._last_error,
        failures=pool._strikes,
        since=pool._failing_since,
        retry_after=left or pool._settings.backoff[0],
    )
    pool._tell("exhausted", error)
    return error


def failing(pool: Driver[Any]) -> str:
    """How many dials have failed."""
    return f"{pool._strikes} dials in a row have failed" if pool._strikes > 1 else "1 dial in a row has failed"


def _who_holds(pool: Driver[Any]) -> list[str]:
    members = pool._members.values()
    found = []
    asked = sum(member.holder is INSPECTED for member in members)
    if asked:
        found.append(f"{asked} of those in use are being asked by the pool itself whether they still live")
    longest: Loan | None = min((m.loan for m in members if m.loan is not None), key=_since, default=None)
    if longest is not None:
        held = monotonic() - longest.since
        found.append(f"{pool._name_of(longest.borrower)} has held one for {held:.3f} s, borrowed {longest.where()}")
    return found


def _advice(pool: Driver[Any]) -> str:
    if pool._paused:
        return "the pool is paused: resume() lends again"
    if _is_deadlocked(pool):
        return (
            "a deadlock: every borrower is waiting for a further connection of this pool; borrow all that a task "
            "needs at once, or fewer at a time"
        )
    if pool._dialling:
        return "give the dial longer (timeout=), or bound it (connect_timeout=)"
    if pool._broken and not pool._trial:
        left = pool._upkeep.rest_of_break()
        return (
            f"{failing(pool)}, so there is none for now, and the next in {left:.2f} s "
            f"(breaker={pool._break_after}): return connections sooner, or wait longer (timeout=)"
        )
    if pool._budget is not None and not pool._budget.has_one():
        return pool._budget.advice
    if pool.total < pool._max_connections:
        return "there is room for more, but none was idle, and timeout=0 opens none"
    return "return connections sooner, wait longer (timeout=), or raise max_connections"


def _is_deadlocked(pool: Driver[Any]) -> bool:
    """Whether everybody who has a connection waits for one, including whoever asks."""
    if pool._ledger is None or pool.in_use < pool._max_connections:
        return False
    me, ledger = pool._borrower(), pool._ledger
    return all(
        member.loan is not None and (member.loan.borrower is me or ledger.is_waiting(member.loan.borrower))
        for member in pool._members.values()
    )


def _since(loan: Loan) -> float:
    return loan.since

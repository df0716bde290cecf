"""A pool's state as a text, for who looks at a process that does not do what it should."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from gsocketpool.complaints import failing
from gsocketpool.connection import AnyStream
from gsocketpool.core import INSPECTED, RETURNING, Member, Place
from gsocketpool.forking import pools
from gsocketpool.operations import address_in, describe, shown

if TYPE_CHECKING:
    from gsocketpool.driver import Driver
    from gsocketpool.group import Group

__all__ = ["debug", "draw_group", "draw_pool"]

#: What only waits for somebody else's code: of no interest to who asks where a borrower is.
PLUMBING: Final = frozenset(
    ("asyncio", "eventlet", "gevent", "greenlet", "gsocketpool", "selectors", "socket", "ssl", "threading")
)

#: So many connections of a kind, and waiters, are listed; of the rest only the number is told.
MOST_LISTED: Final = 50

INDENT: Final = "    "


def debug(*these: Any) -> str:
    """Pools as one text, those in which most wait first; see :meth:`Pool.debug`.

    :param these: the pools; all of this process if none is given.
    """
    # In one step, since others may make pools meanwhile.
    chosen = these or [pool for ref in pools.valuerefs() if (pool := ref()) is not None]
    return "\n".join(_pictures(chosen)) or "there is no pool\n"


def draw_pool(pool: Driver[Any]) -> str:
    """What `Pool.debug` answers."""
    now = monotonic()
    lines = [_headline(pool), *_totals(pool)]
    lines += _section("in use, the longest held first", _lent(pool, now))
    lines += _section("idle, what is lent next first", _idle(pool, now))
    lines += _section("opening, closing, asking whether it lives", _talking(pool, now))
    lines += _section("waiting, who is served next first", _waiting(pool, now))
    lines += _section("what the pool does next", _due(pool, now))
    return "\n".join(lines) + "\n"


def draw_group(group: Group[Any, Any, Any], pools: Iterable[Driver[Any]]) -> str:
    """What `PoolGroup.debug` answers."""
    return "\n".join([repr(group) + "\n", *_pictures(pools)])


def _pictures(pools: Iterable[Driver[Any]]) -> Iterator[str]:
    for pool in sorted(pools, key=lambda pool: (-pool.waiting, -pool.in_use, pool._label)):
        try:
            yield pool.debug()
        except Exception as error:  # it is read while it works, maybe from another thread
            yield f"{pool._label}: no picture of it could be made: {shown(error)}\n"


def _headline(pool: Driver[Any]) -> str:
    stats = pool.stats()
    states = [
        word
        for word, holds in (
            ("CLOSED", pool._closed),
            ("PAUSED", pool._paused),
            (f"BREAKER {stats.breaker.upper()}", pool._broken),
        )
        if holds
    ]
    figures = (
        f"{stats.in_use} in use, {stats.idle} idle, {stats.opening} opening, {pool._closing} closing: "
        f"{pool.total} of at most {stats.max_connections}; {stats.waiting} waiting"
    )
    where = address_in(pool._options)
    if where is not None and where not in pool._label:
        states.insert(0, f"to {where}")
    return ", ".join([pool._label, *states]) + f": {figures}"


def _totals(pool: Driver[Any]) -> list[str]:
    stats = pool.stats()
    closed = ", ".join(f"{count:,} {reason}" for reason, count in stats.closed.items() if count)
    lines = [
        f"since the start: {stats.acquired:,} lent, {stats.opened:,} opened, {stats.open_failures:,} failed to open, "
        f"{stats.exhausted:,} turned away",
        f"closed: {closed or 'none'}",
    ]
    if pool._last_error is not None:
        ago = _span(monotonic() - pool._failed_at)
        lines.append(f"{failing(pool)}, the last one {ago} ago: {shown(pool._last_error)}")
    return [INDENT + line for line in lines]


def _section(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    shown = lines[:MOST_LISTED]
    if len(lines) > len(shown):
        shown.append(f"and {len(lines) - len(shown):,} more")
    return ["  " + title, *(INDENT + line for line in shown)]


def _lent(pool: Driver[Any], now: float) -> list[str]:
    known: list[tuple[float, str]] = []
    for member in list(pool._members.values()):
        holder, loan = member.holder, member.loan
        if holder is None:
            continue
        name = _name(member.connection)
        since = loan.since if loan is not None else member.lent_at or now
        held = _span(now - since)
        if isinstance(holder, Place):
            text = f"{name} is on its way to who waited for it"
        elif holder is INSPECTED:
            text = f"{name} is being asked by the pool whether it still lives"
        elif holder is RETURNING:
            text = f"{name} is being reset"
        elif loan is not None:
            who, state = pool._name_of(loan.borrower), _state_of(pool, loan.borrower)
            text = f"{name} for {held} by {who}, borrowed {loan.where()}{state}"
        elif member.lent_at:
            text = f"{name} for {held}"
        else:
            text = name
        if member.fate is not None:
            text += f"; will be closed when it comes back ({member.fate})"
        known.append((now - since, text))
    lines = [text for _, text in sorted(known, key=lambda each: -each[0])]
    if lines and pool._ledger is None:
        lines.append("by whom, since when and from where is noted while leak_threshold= is set")
    return lines


def _state_of(pool: Driver[Any], borrower: object) -> str:
    """What a borrower does now."""
    if pool._is_over(borrower):
        return ", and has ended"
    state = ""
    for frame in pool._frames_of(borrower):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in PLUMBING:
            state = f", now in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
            break
    if pool._ledger is not None and pool._ledger.is_waiting(borrower):
        state += ", and waits for a further one"
    return state


def _talking(pool: Driver[Any], now: float) -> list[str]:
    jobs = sorted(pool._talking.values(), key=itemgetter(1))
    return [f"{what} for {_span(now - since)}" for what, since in jobs]


def _idle(pool: Driver[Any], now: float) -> list[str]:
    cold, warm = list(pool._cold), list(pool._warm)
    order = [*cold, *warm] if pool._fifo else [*reversed(warm), *reversed(cold)]
    return [_idle_one(pool, member, now) for member in order]


def _idle_one(pool: Driver[Any], member: Member[Any], now: float) -> str:
    idled = f"for {_span(now - member.since)}" if member.cold and member.since else "just now"
    parts = [f"{_name(member.connection)} {idled}", f"lent {member.uses:,} times" if member.uses > 1 else "lent once"]
    if member.retire_at < math.inf:
        parts.append(f"too old in {_span(member.retire_at - now)}")
    return ", ".join(parts)


def _waiting(pool: Driver[Any], now: float) -> list[str]:
    lines = _waiters(pool, now)
    budget = pool._budget
    if lines and budget is not None and pool.total < pool._max_connections and not budget.has_one():
        lines.append(f"there is room, but the budget is used up: {budget.used} of at most {budget.max_total}")
    return lines


def _waiters(pool: Driver[Any], now: float) -> list[str]:
    if pool._ledger is not None:
        return [f"{pool._name_of(borrower)} for {_span(now - since)}" for borrower, since in pool._ledger.waiting()]
    lines = []
    for queue, what in ((pool._dialled, "a dial for it is under way"), (pool._undialled, "")):
        for place in [*deque.__iter__(queue)]:  # in one step: others may come and go meanwhile
            if place.queue is queue:
                who = pool._waiter_at(place)
                name = "somebody" if who is None else pool._name_of(who)
                lines.append(f"{name}, {what}" if what else name)
    return lines


def _due(pool: Driver[Any], now: float) -> list[str]:
    if pool._closed:
        return []
    found = [(when, what) for when, what in pool._upkeep.agenda(pool) if when < math.inf]
    return [f"in {_span(max(0.0, when - now))}: {what}" for when, what in sorted(found)]


def _name(connection: object) -> str:
    try:
        if isinstance(connection, AnyStream) and (descriptor := connection.fileno()) is not None:
            return f"{describe(connection)[:-1]}, descriptor {descriptor}>"
    except Exception:
        pass  # a subclass has one of its own
    return describe(connection)


def _span(duration: float) -> str:
    if duration < 10:
        return f"{duration:.3f} s"
    if duration < 600:
        return f"{duration:.1f} s"
    minutes, left = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"

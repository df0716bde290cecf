"""Pools of psycopg's connections: scenarios that run in the test's process, or in one of their own
(`tests/scripts/postgres.py`) where psycopg wants the standard library patched."""

from __future__ import annotations

from typing import Any

import psycopg

from tests.faults import Deadline

from .harness import Runtime, do, within
from .services import BOUND, fresh, postgres_pool, query


class Observer:
    """Asks the server what it sees, over a connection beside the pool's."""

    def __init__(self, rt: Runtime, conn: psycopg.Connection[Any]) -> None:
        self.rt = rt
        self.conn = conn

    def pids(self, where: str = "true") -> list[int]:
        rows = self.conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            f" AND {where}".encode()
        )
        return [pid for (pid,) in rows]

    async def wait(self, count: int, where: str = "true") -> list[int]:
        """Wait until the server sees so many."""
        await self.rt.until(lambda: len(self.pids(where)) == count, lambda: f"{self.pids()}, not {count} where {where}")
        return self.pids(where)


SLEEPING = "wait_event = 'PgSleep'"


def pool_of(rt: Runtime, dsn: str, size: int, check: Any = fresh) -> Any:
    return postgres_pool(rt, dsn, check=check, max_connections=size, acquire_timeout=BOUND, check_after_idle=0)


async def overlap(rt: Runtime, dsn: str, observer: Observer) -> None:
    """As many queries as connections run in the server at the same time, and never more connections."""
    cancelled: list[int] = []

    async def borrower() -> None:
        async with within(pool.connection()) as conn:
            try:
                await query(conn, "SELECT pg_sleep(60)")
            except psycopg.errors.QueryCanceled:
                cancelled.append(1)

    pool = pool_of(rt, dsn, 5)
    tasks = [rt.spawn(borrower) for _ in range(7)]
    await observer.wait(5, SLEEPING)
    await rt.until(lambda: (pool.in_use, pool.waiting) == (5, 2), lambda: repr(pool))
    # Those that leave hand on to those that wait, which sleep in their turn.
    while len(cancelled) < 7:
        assert len(observer.pids()) <= 5
        for pid in observer.pids(SLEEPING):
            observer.conn.execute("SELECT pg_cancel_backend(%s)", [pid])
        await rt.sleep(0.005)
    await rt.join(*tasks)
    await do(pool.close())
    await observer.wait(0)


async def killed(rt: Runtime, dsn: str, observer: Observer) -> None:
    await interrupted(rt, dsn, observer, by_deadline=False)


async def timed_out(rt: Runtime, dsn: str, observer: Observer) -> None:
    await interrupted(rt, dsn, observer, by_deadline=True)


async def interrupted(rt: Runtime, dsn: str, observer: Observer, by_deadline: bool) -> None:
    """A borrower that is interrupted in a query costs its connection; the next one gets its own answer."""
    deadline = Deadline(rt, None)

    async def borrower() -> None:
        async with deadline, within(pool.connection()) as conn:
            await query(conn, "SELECT 'for the first' FROM pg_sleep(60)")

    pool = pool_of(rt, dsn, 1)
    task = rt.spawn(borrower)
    (first,) = await observer.wait(1, SLEEPING)
    if by_deadline:
        deadline.end(task)
    else:
        rt.cancel(task)
    assert isinstance(await rt.outcome(task), rt.timed_out if by_deadline else rt.killed)
    async with within(pool.connection()) as conn:
        assert await query(conn, "SELECT 'for the second'") == "for the second"
        assert conn.info.backend_pid != first
    # The backend of the first one ends when it notices that its client hung up.
    assert await observer.wait(1) != [first]


async def reset(rt: Runtime, dsn: str, observer: Observer) -> None:
    """What a borrower left uncommitted is gone before anybody else gets the connection."""
    observer.conn.execute("DROP TABLE IF EXISTS left_behind; CREATE TABLE left_behind (n int)")
    pool = pool_of(rt, dsn, 1)
    async with within(pool.connection()) as conn:
        first = conn.info.backend_pid
        await do(conn.execute("INSERT INTO left_behind VALUES (1)"))
    assert observer.pids("state = 'idle in transaction'") == []
    async with within(pool.connection()) as conn:
        assert conn.info.backend_pid == first
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert await query(conn, "SELECT count(*) FROM left_behind") == 0
        await do(conn.execute("INSERT INTO left_behind VALUES (2)"))
        await do(conn.commit())
    assert observer.conn.execute("SELECT n FROM left_behind").fetchall() == [(2,)]


async def crowd(rt: Runtime, dsn: str, observer: Observer) -> None:
    """Forty borrowers over four connections: each answer is right, and the server never sees a fifth."""
    seen: list[int] = []

    async def borrower(number: int) -> None:
        for turn in range(5):
            async with within(pool.connection()) as conn:
                # Half of the answers take a little, so that the turns mix.
                text = f"SELECT %s::text FROM pg_sleep({number % 2 / 1000})"
                assert await query(conn, text, f"{number}.{turn}") == f"{number}.{turn}"
            if number == 0:
                seen.append(len(observer.pids()))

    pool = pool_of(rt, dsn, 4)
    await rt.join(*(rt.spawn(borrower, number) for number in range(40)))
    assert 1 <= max(seen) <= 4, seen
    assert pool.stats().opened <= 4
    assert pool.stats().acquired == 200
    await do(pool.close())
    await observer.wait(0)


async def terminated(rt: Runtime, dsn: str, observer: Observer) -> None:
    """An idle connection that the server ended is replaced, and nobody notices."""
    pool = pool_of(rt, dsn, 1)
    async with within(pool.connection()) as conn:
        first = conn.info.backend_pid
    observer.conn.execute("SELECT pg_terminate_backend(%s, 10000)", [first])
    async with within(pool.connection()) as conn:
        assert await query(conn, "SELECT 1") == 1
        assert conn.info.backend_pid != first
    assert pool.stats().closed["stale"] == 1
    assert len(observer.pids()) == 1


async def terminated_unnoticed(rt: Runtime, dsn: str, observer: Observer) -> None:
    """A check that only asks ``closed`` lends it once more; that borrower's error discards it."""
    pool = pool_of(rt, dsn, 1, check=lambda conn: not conn.closed)
    async with within(pool.connection()) as conn:
        first = conn.info.backend_pid
    observer.conn.execute("SELECT pg_terminate_backend(%s, 10000)", [first])
    try:
        async with within(pool.connection()) as conn:
            await query(conn, "SELECT 1")
    except psycopg.OperationalError:
        pass
    else:
        raise AssertionError("the query went through")
    async with within(pool.connection()) as conn:
        assert await query(conn, "SELECT 1") == 1
    assert pool.stats().closed["discarded"] == 1


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (overlap, killed, timed_out, reset, crowd, terminated, terminated_unnoticed)
}

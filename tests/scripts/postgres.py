"""Pools of psycopg connections, one scenario for each run: ``python postgres.py SCENARIO DSN``.

psycopg waits in the `select` module, so a program under gevent patches the standard library first. The tests themselves
do not, hence a process of its own. It prints nothing and exits 0 if all is well.
"""

from gevent import monkey

monkey.patch_all()

import select
import sys
from collections.abc import Callable
from typing import Any

import gevent
import psycopg
from gevent.event import Event
from gevent.pool import Group

from gsocketpool import Pool, wrap

BOUND = 20.0  # seconds for whatever should happen soon

Connection = psycopg.Connection[tuple[Any, ...]]


def fresh(conn: Connection) -> bool:
    """Whether the server has said nothing while the connection idled; a look that never waits.

    ``conn.closed`` alone does not do: it stays False until the connection is used the next time.
    """
    return not conn.closed and not select.select([conn], [], [], 0)[0]


def make_pool(dsn: str, size: int, check: Callable[[Connection], bool] = fresh) -> Pool[Connection]:
    return Pool(
        wrap(lambda: psycopg.connect(dsn), check=check, reset=lambda conn: conn.rollback()),
        max_connections=size,
        acquire_timeout=BOUND,
        check_after_idle=0,
    )


class Observer:
    """Asks the server what it sees, over a connection beside the pool's."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    def pids(self, where: str = "true") -> list[int]:
        rows = self.conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            f" AND {where}".encode()
        )
        return [pid for (pid,) in rows]

    def wait(self, count: int, where: str = "true") -> list[int]:
        """Wait until the server sees so many."""
        with gevent.Timeout(BOUND, TimeoutError(f"the server never saw {count} connections where {where}")):
            while len(found := self.pids(where)) != count:
                gevent.sleep(0.005)
        return found


SLEEPING = "wait_event = 'PgSleep'"


def overlap(dsn: str, observer: Observer) -> None:
    """As many queries as connections run in the server at the same time, and never more connections."""
    cancelled: list[int] = []

    def borrower() -> None:
        with pool.connection() as conn:
            try:
                conn.execute("SELECT pg_sleep(60)")
            except psycopg.errors.QueryCanceled:
                cancelled.append(1)

    with make_pool(dsn, 5) as pool:
        greenlets = [gevent.spawn(borrower) for _ in range(7)]
        observer.wait(5, SLEEPING)
        assert (pool.in_use, pool.waiting) == (5, 2), pool
        # Those that leave hand on to those that wait, which sleep in their turn.
        while len(cancelled) < 7:
            assert len(observer.pids()) <= 5
            for pid in observer.pids(SLEEPING):
                observer.conn.execute("SELECT pg_cancel_backend(%s)", [pid])
            gevent.sleep(0.005)
        gevent.joinall(greenlets, raise_error=True)
    observer.wait(0)


def interrupted(dsn: str, observer: Observer, interrupt: BaseException) -> None:
    """A borrower that is interrupted in a query costs its connection; the next one gets its own answer."""
    begun = Event()
    outcome: list[BaseException] = []

    def borrower() -> None:
        try:
            with pool.connection() as conn:
                begun.set()
                conn.execute("SELECT 'for the first' FROM pg_sleep(60)")
        except BaseException as error:
            outcome.append(error)

    with make_pool(dsn, 1) as pool:
        greenlet = gevent.spawn(borrower)
        begun.wait(BOUND)
        (first,) = observer.wait(1, SLEEPING)
        gevent.kill(greenlet, interrupt)
        greenlet.join()
        with pool.connection() as conn:
            assert conn.execute("SELECT 'for the second'").fetchone() == ("for the second",)
            assert conn.info.backend_pid != first
        # The backend of the first one ends when it notices that its client hung up.
        assert observer.wait(1) != [first]
        assert outcome == [interrupt]


def killed(dsn: str, observer: Observer) -> None:
    interrupted(dsn, observer, gevent.GreenletExit())


def timed_out(dsn: str, observer: Observer) -> None:
    interrupted(dsn, observer, gevent.Timeout())


def reset(dsn: str, observer: Observer) -> None:
    """What a borrower left uncommitted is gone before anybody else gets the connection."""
    observer.conn.execute("CREATE TABLE left_behind (n int)")
    with make_pool(dsn, 1) as pool:
        with pool.connection() as conn:
            first = conn.info.backend_pid
            conn.execute("INSERT INTO left_behind VALUES (1)")
        assert observer.pids("state = 'idle in transaction'") == []
        with pool.connection() as conn:
            assert conn.info.backend_pid == first
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert conn.execute("SELECT count(*) FROM left_behind").fetchone() == (0,)
            conn.execute("INSERT INTO left_behind VALUES (2)")
            conn.commit()
    assert observer.conn.execute("SELECT n FROM left_behind").fetchall() == [(2,)]


def crowd(dsn: str, observer: Observer) -> None:
    """Forty greenlets over four connections: each answer is right, and the server never sees a fifth."""
    most = 0

    def borrower(number: int) -> None:
        nonlocal most
        for turn in range(5):
            with pool.connection() as conn:
                wanted = f"{number}.{turn}"
                # Half of the answers take a little, so that the turns mix.
                row = conn.execute("SELECT %s::text, pg_sleep(%s)", [wanted, number % 2 / 1000]).fetchone()
                assert row is not None
                assert row[0] == wanted
            if number == 0:
                most = max(most, len(observer.pids()))

    with make_pool(dsn, 4) as pool:
        group = Group()
        for number in range(40):
            group.spawn(borrower, number)
        assert group.join(BOUND, raise_error=True)
        assert 1 <= most <= 4, most
        assert pool.stats().opened <= 4
        assert pool.stats().acquired == 200
    observer.wait(0)


def terminated(dsn: str, observer: Observer) -> None:
    """An idle connection that the server ended is replaced, and nobody notices."""
    with make_pool(dsn, 1) as pool:
        with pool.connection() as conn:
            first = conn.info.backend_pid
        observer.conn.execute("SELECT pg_terminate_backend(%s, 10000)", [first])
        assert not conn.closed
        with pool.connection() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
            assert conn.info.backend_pid != first
        assert pool.stats().closed["stale"] == 1
        assert len(observer.pids()) == 1


def terminated_unnoticed(dsn: str, observer: Observer) -> None:
    """A check that only asks ``closed`` lends it once more; that borrower's error discards it."""
    with make_pool(dsn, 1, check=lambda conn: not conn.closed) as pool:
        with pool.connection() as conn:
            first = conn.info.backend_pid
        observer.conn.execute("SELECT pg_terminate_backend(%s, 10000)", [first])
        try:
            with pool.connection() as conn:
                conn.execute("SELECT 1")
        except psycopg.OperationalError:
            pass
        else:
            raise AssertionError("the query went through")
        with pool.connection() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        assert pool.stats().closed["discarded"] == 1


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (overlap, killed, timed_out, reset, crowd, terminated, terminated_unnoticed)
}

if __name__ == "__main__":
    with psycopg.connect(sys.argv[2], autocommit=True) as conn:
        SCENARIOS[sys.argv[1]](sys.argv[2], Observer(conn))

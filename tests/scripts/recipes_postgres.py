"""Pools as in ``examples/postgres.py``, one scenario for each run: ``python recipes_postgres.py SCENARIO SEED DSN``.

It prints nothing and exits 0 if all is well; but for `restart`, which says when it wants the server restarted.
"""

from __future__ import annotations

from tests import patched

patched.by("gevent")

import functools
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import psycopg
from psycopg.rows import dict_row

from examples.postgres import Connection, connections
from gsocketpool import Pool

BOUND = 20.0


class Logged(logging.Handler):
    """Takes down what is logged; whatever a scenario does not expect fails it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.name}: {record.getMessage()}")

    def expect(self, count: int, text: str) -> None:
        """So many records that contain this, and no others."""
        assert [text in found for found in self.texts] == [True] * count, self.texts
        self.texts.clear()


logged = Logged()


class Server:
    """What the server sees, asked over a connection beside the pool's."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True, application_name="asking")

    def pids(self, where: str = "true") -> list[int]:
        rows = self.conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            f" AND application_name <> 'asking' AND {where}".encode()
        )
        return [pid for (pid,) in rows]

    def ends(self, pid: int) -> None:
        """As an administrator, a failover or the killer of idle sessions would."""
        self.conn.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


def until(condition: Callable[[], object]) -> None:
    with gevent.Timeout(BOUND):
        while not condition():
            gevent.sleep(0.005)


def ask(conn: Connection, text: str, *parameters: object) -> Any:
    row = conn.execute(text.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def pid_of(pool: Pool[Connection]) -> int:
    """Borrows, and says which backend was on the other side."""
    with pool.connection() as conn:
        return int(ask(conn, "SELECT pg_backend_pid()"))


@contextmanager
def raises(kind: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def pool_of(
    dsn: str,
    size: int = 1,
    discard_on: type[BaseException] | tuple[type[BaseException], ...] = psycopg.OperationalError,
    **recipe: Any,
) -> Pool[Connection]:
    return Pool(
        connections(dsn, **recipe),
        max_connections=size,
        acquire_timeout=BOUND,
        check_after_idle=0,
        discard_on=discard_on,
        max_lifetime=1800,
        leak_threshold=600,
    )


def refused(server: Server) -> None:
    """A unique violation is rolled back and costs no connection, in either mode; neither does an error of one's own."""
    for autocommit in (True, False):
        with pool_of(server.dsn, autocommit=autocommit) as pool:
            first = pid_of(pool)
            for _ in range(3):
                with raises(psycopg.errors.UniqueViolation), pool.connection() as conn, conn.transaction():
                    conn.execute("CREATE TEMPORARY TABLE keys (key int PRIMARY KEY) ON COMMIT DROP")
                    conn.execute("INSERT INTO keys VALUES (1), (1)")
                with raises(ZeroDivisionError), pool.connection() as conn:
                    conn.execute("BEGIN" if autocommit else "SELECT 1")
                    print(1 / 0)
                assert server.pids("state = 'idle'") == [first]
            assert pid_of(pool) == first
            assert pool.stats().opened == 1


def cleaned(server: Server) -> None:
    """What a borrower changed, its successor does not find: transaction, autocommit, kind of rows."""
    server.conn.execute("DROP TABLE IF EXISTS left_behind; CREATE TABLE left_behind (n int)")
    for autocommit in (True, False):
        with pool_of(server.dsn, autocommit=autocommit) as pool:
            with pool.connection() as conn:
                first = conn.info.backend_pid
                conn.execute("BEGIN" if autocommit else "SELECT 1")
                conn.execute("INSERT INTO left_behind VALUES (1)")
                conn.row_factory = dict_row  # type: ignore[assignment]
            with pool.connection() as conn:
                assert (conn.info.backend_pid, conn.autocommit) == (first, autocommit)
                conn.autocommit = not autocommit
                assert ask(conn, "SELECT count(*) FROM left_behind") == 0
            with pool.connection() as conn:
                assert (conn.info.backend_pid, conn.autocommit) == (first, autocommit)
            assert server.pids("state = 'idle'") == [first]


def session(server: Server) -> None:
    """Settings, locks and tables of the session outlive a rollback, and do not outlive DISCARD ALL."""
    for discard_all, autocommit in ((False, True), (True, True), (True, False)):
        with pool_of(server.dsn, autocommit=autocommit, discard_all=discard_all) as pool:
            with pool.connection() as conn:
                first = conn.info.backend_pid
                for command in "SET work_mem = '7MB'", "SELECT pg_advisory_lock(7)", "CREATE TEMPORARY TABLE mine ()":
                    conn.execute(command)
                for _ in range(10):
                    conn.execute("SELECT %s::int", [1])  # is prepared after a few times
                conn.commit()
            with pool.connection() as conn:
                assert conn.info.backend_pid == first
                assert (ask(conn, "SHOW work_mem") == "7MB") is not discard_all
                assert ask(conn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 1 - discard_all
                assert (ask(conn, "SELECT to_regclass('pg_temp.mine')") is None) is discard_all
                assert ask(conn, "SELECT %s::int", 2) == 2


def ended_idle(server: Server) -> None:
    """An idle connection that the server ended is replaced, and nobody notices."""
    with pool_of(server.dsn) as pool:
        first = pid_of(pool)
        server.ends(first)
        assert pid_of(pool) != first
        assert pool.stats().closed["stale"] == 1


def ended_in_use(server: Server) -> None:
    """One that is ended under a query costs that borrower an OperationalError, and the connection."""
    with pool_of(server.dsn) as pool:

        def borrower() -> None:
            with raises(psycopg.OperationalError), pool.connection() as conn:
                conn.execute("SELECT pg_sleep(60)")

        job = gevent.spawn(borrower)
        until(lambda: server.pids("wait_event = 'PgSleep'"))
        (first,) = server.pids()
        server.ends(first)
        job.get(timeout=BOUND)
        assert pool.stats().closed["discarded"] == 1
        assert pid_of(pool) != first


def given_up(server: Server) -> None:
    """A time limit and a kill in the middle of a query cost the connection; and the server ends the query."""
    never = " options='-c client_connection_check_interval=0'"  # it does not look by itself
    with pool_of(server.dsn + never) as pool:

        def time_out() -> None:
            with raises(gevent.Timeout), pool.connection() as conn, gevent.Timeout(0.3):
                conn.execute("SELECT 'not yours' FROM pg_sleep(600)")

        def wait_for_ever() -> None:
            with pool.connection() as conn, conn.transaction():
                conn.execute("SELECT 'not yours' FROM pg_sleep(600)")

        for number, way in enumerate((time_out, wait_for_ever), start=1):
            job = gevent.spawn(way)
            if way is time_out:
                job.get(timeout=BOUND)
            else:
                until(lambda: server.pids("wait_event = 'PgSleep'"))
                job.kill()
            with pool.connection() as conn:
                assert ask(conn, "SELECT 'yours'") == "yours"
            assert pool.stats().closed["discarded"] == number
            until(lambda: len(server.pids()) == 1)
        logged.expect(1, "error ignored in rollback")  # the transaction's own try, in vain


def swallowed(server: Server) -> None:
    """Whoever leaves in the middle of a query without an error costs the connection all the same."""
    with pool_of(server.dsn) as pool:
        first = pid_of(pool)
        with pool.connection() as conn:
            try:
                with gevent.Timeout(0.2, TimeoutError("too long")):
                    conn.execute("SELECT 'not yours' FROM pg_sleep(600)")
            except TimeoutError:
                pass
        assert pid_of(pool) != first
        with raises(TimeoutError), pool.connection() as conn, gevent.Timeout(0.2, TimeoutError("too long")):
            conn.execute("SELECT 'not yours' FROM pg_sleep(600)")
        assert pid_of(pool) != first
        assert pool.stats().closed["discarded"] == 2
        logged.expect(2, "reset() failed; the connection is closed")
        until(lambda: len(server.pids()) == 1)


def by_state(server: Server) -> None:
    """With ``discard_on=()`` what is lost goes, and a query that the server cancelled costs nothing."""
    with pool_of(server.dsn, discard_on=()) as pool:
        first = pid_of(pool)
        with raises(psycopg.errors.QueryCanceled), pool.connection() as conn, conn.transaction():
            conn.execute("SET LOCAL statement_timeout = 100")
            conn.execute("SELECT pg_sleep(60)")
        assert pid_of(pool) == first
        with raises(psycopg.OperationalError), pool.connection() as conn:
            server.ends(first)
            conn.execute("SELECT 1")
        logged.expect(1, "reset() failed; the connection is closed")
        assert pid_of(pool) != first
    with pool_of(server.dsn) as pool:
        first = pid_of(pool)
        with raises(psycopg.errors.QueryCanceled), pool.connection() as conn, conn.transaction():
            conn.execute("SET LOCAL statement_timeout = 100")
            conn.execute("SELECT pg_sleep(60)")
        assert pid_of(pool) != first


def asked(server: Server) -> None:
    """The keepalive asks the server, leaves no transaction open, and finds out who no longer answers."""
    for autocommit in (True, False):
        with Pool(connections(server.dsn, autocommit=autocommit), max_connections=1, keepalive=0.1) as pool:
            first = pid_of(pool)
            where = f"pid = {first} AND state = 'idle' AND query = '{'SELECT 1' if autocommit else 'ROLLBACK'}'"
            until(functools.partial(server.pids, where))
            assert pool.stats().closed["stale"] == 0
            server.ends(first)
            until(lambda: pool.stats().closed["stale"] == 1)
            if logged.texts:  # else it was not just being asked
                logged.expect(1, "keepalive() failed; the connection is closed")


def restart(server: Server) -> None:
    """After a restart of the server whoever comes gets a new connection."""
    with pool_of(server.dsn, 4) as pool:

        def hold() -> None:
            with raises(psycopg.OperationalError), pool.connection() as conn:
                conn.execute("SELECT pg_sleep(60)")

        jobs = [gevent.spawn(hold) for _ in range(2)]
        until(lambda: len(server.pids("wait_event = 'PgSleep'")) == 2)
        with pool.connection(), pool.connection():
            pass
        server.conn.close()
        print("restart it", flush=True)
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert sys.stdin.readline() == "done\n"
        server.conn = psycopg.connect(server.dsn, autocommit=True, application_name="asking")
        everyone(pool, server, 4)
        closed = pool.stats().closed
        assert (closed["discarded"], closed["stale"]) == (2, 2), closed


def crowd(server: Server) -> None:
    """Fifty greenlets over eight connections, a third of them killed in the middle of a query: no wrong answer."""
    rng = random.Random(sys.argv[2])
    pool = pool_of(server.dsn, 8)
    wrong: list[str] = []
    answers: list[str] = []
    waiting: set[int] = set()
    victims = {number: rng.randrange(8) for number in rng.sample(range(50), 50 // 3)}

    def borrower(number: int) -> None:
        for turn in range(8):
            token = f"{number}.{turn}"
            with pool.connection() as conn:
                if victims.get(number) == turn:
                    waiting.add(number)
                    conn.execute("SELECT 'not yours' FROM pg_sleep(600)")
                answer = ask(conn, "SELECT %s::text FROM pg_sleep(%s)", token, rng.random() / 100)
            answers.append(answer)
            if answer != token:
                wrong.append(f"{answer} to {token}")

    with pool:
        jobs = [gevent.spawn(borrower, number) for number in range(50)]
        for _ in victims:
            until(lambda: waiting)
            jobs[waiting.pop()].kill(block=False)
            until(lambda: len(server.pids()) <= 8)  # a backend ends soon after its socket is closed
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert sum(isinstance(job.value, gevent.GreenletExit) for job in jobs) == len(victims)
        assert wrong == []
        assert len(answers) == 34 * 8 + sum(victims.values())
        assert pool.stats().closed["discarded"] == len(victims)
        everyone(pool, server, 8)
        assert server.pids("wait_event = 'PgSleep'") == []


def everyone(pool: Pool[Connection], server: Server, size: int) -> None:
    """As many as there may be hold a connection that works, at once, and the server counts no more."""
    held = [pool.acquire(timeout=BOUND) for _ in range(size)]
    assert [ask(conn, "SELECT %s::int", number) for number, conn in enumerate(held)] == [*range(size)]
    until(lambda: len(server.pids()) == size)
    for conn in held:
        pool.release(conn)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        refused,
        cleaned,
        session,
        ended_idle,
        ended_in_use,
        given_up,
        swallowed,
        by_state,
        asked,
        restart,
        crowd,
    )
}

if __name__ == "__main__":
    logging.getLogger().addHandler(logged)
    server = Server(sys.argv[3])
    SCENARIOS[sys.argv[1]](server)
    until(lambda: not server.pids())
    server.conn.close()
    logged.expect(0, "")

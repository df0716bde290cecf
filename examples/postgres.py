"""Greenlets share a few PostgreSQL connections of psycopg 3.

Run it: python examples/postgres.py "host=127.0.0.1 dbname=postgres"
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before psycopg is imported: it waits through `select`, and lets other greenlets run

import select
import sys
from typing import Any

import gevent
import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from gsocketpool import Pool, PoolError, Wrap, wrap

Connection = psycopg.Connection[tuple[Any, ...]]

poll = monkey.get_original("select", "poll")  # asked with a timeout of 0 it answers at once


def hang_up(conn: Connection) -> None:
    """Close one. Its borrower may have gone in the middle of a query: the server would go on with that for nobody."""
    try:
        if conn.pgconn.transaction_status == TransactionStatus.ACTIVE:
            conn.cancel_safe(timeout=5)
    except psycopg.Error:
        pass  # the server cannot be reached, so there is nothing to be ended
    finally:
        conn.close()


def is_quiet(conn: Connection) -> bool:
    """An idle PostgreSQL connection on which something arrived was ended by the server, or is about to be."""
    if conn.closed:
        return False
    look = poll()
    look.register(conn.fileno(), select.POLLIN)
    return not look.poll(0)


def is_alive(conn: Connection) -> bool:
    """Ask the server something. It may take as long as `Pool.keepalive_grace`."""
    conn.execute("SELECT 1")
    conn.rollback()
    return True


def connections(dsn: str, *, autocommit: bool = True, discard_all: bool = False) -> Wrap[Connection]:
    """What a pool needs to know of psycopg's connections.

    :param autocommit: whether each statement outside of a ``with conn.transaction()`` is a transaction of its own.
    :param discard_all: whether borrowers change what outlives a transaction, so that the server has to forget it.
    """

    def connect() -> Connection:
        threshold = None if discard_all else 5  # statements that are forgotten at once need not be prepared
        return psycopg.connect(dsn, autocommit=autocommit, prepare_threshold=threshold, connect_timeout=5)

    def clean_up(conn: Connection) -> None:
        """Undo what the borrower left. On a connection that is lost, or busy with a query, the first line raises."""
        conn.rollback()  # says nothing to the server if there is no transaction
        if discard_all:
            conn.autocommit = True  # it must not be part of a transaction
            conn.execute("DISCARD ALL")
        if conn.autocommit != autocommit:
            conn.autocommit = autocommit
        conn.row_factory = tuple_row

    return wrap(connect, close=hang_up, check=is_quiet, reset=clean_up, keepalive=is_alive)


def main(dsn: str) -> None:
    pool = Pool(
        connections(dsn),
        max_connections=4,
        acquire_timeout=5,
        discard_on=psycopg.OperationalError,  # other errors leave a connection that can be rolled back
        max_lifetime=1800,
        keepalive=60,
        initial_connections=1,  # if that fails, its error is raised here
        leak_threshold=30,  # who holds one for longer is named in the log
        name="squares",
    )

    def square(number: int) -> int:
        with pool.connection() as conn:  # the type checker knows: psycopg.Connection
            row = conn.execute("SELECT %s::int * %s", (number, number)).fetchone()
            assert row is not None
            return int(row[0])

    def insert_twice() -> None:
        with pool.connection() as conn, conn.transaction():  # committed at its end, or rolled back
            conn.execute("CREATE TEMPORARY TABLE keys (key int PRIMARY KEY) ON COMMIT DROP")
            conn.execute("INSERT INTO keys VALUES (1), (1)")

    def give_up() -> None:
        with gevent.Timeout(0.2), pool.connection() as conn:
            conn.execute("SELECT pg_sleep(60)")

    with pool:
        jobs = [gevent.spawn(square, number) for number in range(20)]
        try:
            gevent.joinall(jobs, raise_error=True)
        finally:
            gevent.killall(jobs)  # where one has failed the others need not go on
        print([job.get() for job in jobs])
        print(f"{pool.stats().acquired} times lent")

        try:
            insert_twice()
        except psycopg.errors.UniqueViolation as error:
            print(f"refused by {error.diag.constraint_name}; {pool.stats().closed['discarded']} closed")

        try:
            give_up()
        except gevent.Timeout:
            print(f"given up; {pool.stats().closed['discarded']} closed")
        print("7 * 7 is", square(7))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except (psycopg.Error, PoolError) as error:
        sys.exit(str(error))

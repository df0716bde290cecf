"""Twenty greenlets share four PostgreSQL connections of psycopg 3.

Run it: python examples/postgres.py "host=127.0.0.1 dbname=postgres"
"""

from gevent import monkey

monkey.patch_all()  # before psycopg is imported: it waits through `select`, and lets other greenlets run

import select  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
import psycopg  # noqa: E402

from gsocketpool import Pool, wrap  # noqa: E402

poll = monkey.get_original("select", "poll")  # asked with a timeout of 0 it answers at once


def is_quiet(conn):
    """An idle PostgreSQL connection on which something arrived was ended by the server, or is about to be."""
    look = poll()
    look.register(conn.fileno(), select.POLLIN)
    return not conn.closed and not look.poll(0)


def main(dsn):
    pool = Pool(
        wrap(lambda: psycopg.connect(dsn), check=is_quiet, reset=lambda conn: conn.rollback()),
        max_connections=4,
        acquire_timeout=5,
        name="postgres",
    )

    def square(number):
        with pool.connection() as conn:  # the type checker knows: psycopg.Connection
            return conn.execute("select %s::int * %s", (number, number)).fetchone()[0]

    with pool:
        jobs = [gevent.spawn(square, number) for number in range(20)]
        print([job.get() for job in jobs])
        print(f"{pool.stats().acquired} times lent")


if __name__ == "__main__":
    main(sys.argv[1])

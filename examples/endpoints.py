"""A primary and two replicas of PostgreSQL under one roof, with psycopg 3.

Run it with three connection strings: python examples/endpoints.py "host=primary" "host=replica-1" "host=replica-2"
"""

from gevent import monkey

monkey.patch_all()  # before psycopg is imported: it waits through `select`, and lets other greenlets run

import select
import sys

import psycopg

from gsocketpool import PoolError, PoolGroup, wrap

poll = monkey.get_original("select", "poll")  # asked with a timeout of 0 it answers at once


def is_quiet(conn):
    """An idle PostgreSQL connection on which something arrived was ended by the server, or is about to be."""
    look = poll()
    look.register(conn.fileno(), select.POLLIN)
    return not conn.closed and not look.poll(0)


def main(primary, first_replica, second_replica):
    places = {"primary": primary, "replica-1": first_replica, "replica-2": second_replica}

    def connect(endpoint):
        return psycopg.connect(places[endpoint], connect_timeout=5)

    group = PoolGroup(
        wrap(connect, check=is_quiet, reset=lambda conn: conn.rollback()),
        key=lambda endpoint: endpoint,  # so stats() calls them "primary" and so on
        acquire_timeout=5,
        idle_timeout=60,
        max_lifetime=600,
        min_idle=3,
        max_connections=10,
        max_total=15,
        name="db",
    )

    with group.connection(endpoint="primary") as conn:
        print("primary:", conn.execute("select current_database()").fetchone())

    with group.connection(endpoint="replica-1") as conn:
        print("replica-1:", conn.execute("select current_database()").fetchone())

    for name, stats in group.stats().endpoints.items():
        print(f"{stats.acquired} time lent to who asked for {name}")

    group.close(timeout=5)  # dials for min_idle may be under way: wait for them too


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (psycopg.Error, PoolError) as error:
        sys.exit(str(error))

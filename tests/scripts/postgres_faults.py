"""The cells of the fault matrix that PostgreSQL is in: ``python postgres_faults.py DSN``, beside the test that runs it.

psycopg waits in the `select` module, so a program under gevent patches the standard library first. The tests
themselves do not, hence a process of its own. Each line of its standard input names a cell; it answers with lines of
JSON, some of which ask for something to be done to the server. Its standard error stays empty.
"""

from gevent import monkey

monkey.patch_all()

import json
import logging
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any

import psycopg

from gsocketpool import Pool, wrap
from tests.faults import POSTGRES, Service, measure

Connection = psycopg.Connection[tuple[Any, ...]]


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


class Remote:
    """The server's process, which is the test's. Nothing else happens here until it has done what it is asked for."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        where = psycopg.conninfo.conninfo_to_dict(dsn)
        self.host = str(where["host"])
        self.port = int(str(where["port"]))

    def kill(self) -> None:
        self._ask("kill")

    def start(self) -> None:
        self._ask("start")

    def restart(self) -> None:
        self._ask("restart")

    def pause(self) -> None:
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def connections(self) -> int:
        return int(self._ask("connections"))

    def _ask(self, what: str) -> Any:
        say(do=what)
        return json.loads(sys.stdin.readline())


class PostgresService(Service):
    traits = POSTGRES
    errors = (psycopg.OperationalError,)
    server: Remote
    _gate: Connection | None = None

    def pool(self, port: int, tls: bool, reset: Callable[[Any], None] | None, **options: Any) -> Pool[Any]:
        def make_as_new(conn: Connection) -> None:
            if reset is not None:
                reset(conn)
            conn.rollback()

        dsn = psycopg.conninfo.make_conninfo(self.server.dsn, port=port)
        return Pool(wrap(lambda: psycopg.connect(dsn), check=self.alive, reset=make_as_new), **options)

    def ask(self, conn: Connection, token: str) -> str:
        return self._query(conn, "SELECT %s", token)

    def hold(self, conn: Connection, token: str) -> str:
        return self._query(conn, "SELECT %s FROM pg_advisory_xact_lock_shared(1)", token)

    def _query(self, conn: Connection, query: str, token: str) -> str:
        row = conn.execute(query.encode(), [token]).fetchone()
        assert row is not None
        return str(row[0])

    def alive(self, conn: Connection) -> bool:
        return not conn.closed and not select.select([conn], [], [], 0)[0]

    def arm(self) -> None:
        self.let_go()
        self._gate = psycopg.connect(self.server.dsn, autocommit=True, application_name="asking")
        self._gate.execute("SELECT pg_advisory_lock(1)")

    def let_go(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def held(self) -> int:
        assert self._gate is not None
        row = self._gate.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone()
        assert row is not None
        return int(row[0])


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    service = PostgresService(Remote(sys.argv[1]))
    warnings = Warnings()
    logging.getLogger("gsocketpool").addHandler(warnings)
    service.arm()  # what gevent opens once and keeps is open now
    service.let_go()
    while line := sys.stdin.readline():
        warnings.messages = []
        try:
            outcome = measure(service, *json.loads(line))
        except Exception:
            say(error=traceback.format_exc())
        else:
            say(failed=outcome.failed, error=outcome.error, warnings=warnings.messages)

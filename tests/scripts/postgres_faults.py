"""The cells of the fault matrix that PostgreSQL is in, for greenlets: ``python postgres_faults.py RUNTIME DSN``, beside
the test that runs it.

It says when it is ready. Then each line of its standard input names a cell; it answers with lines of JSON, some of
which ask for something to be done to the server. Its standard error stays empty.
"""

import sys

from tests import patched

patched.by(sys.argv[1])

import json
import logging
import traceback
from typing import Any

import psycopg

from tests.conformance.harness import make
from tests.conformance.services import PostgresService
from tests.faults import measure


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


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    service = PostgresService(Remote(sys.argv[2]))
    complaints = Warnings()
    logging.getLogger("gsocketpool").addHandler(complaints)
    service.arm()  # what the runtime opens once and keeps is open now
    service.let_go()
    say(ready=True)
    while line := sys.stdin.readline():
        complaints.messages = []
        rt = make(sys.argv[1])
        try:
            outcome = rt.run(measure(rt, service, *json.loads(line)))
        except Exception:
            say(error=traceback.format_exc())
        else:
            say(failed=outcome.failed, error=outcome.error, warnings=complaints.messages)

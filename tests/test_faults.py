"""Faults, counted: what each fault does at each stage of a connection's life, before real servers.

The cells and what should come out of them are in `tests/faults.py`; here are the servers. What came out is the table in
``docs/faults.rst``: a run with ``GSOCKETPOOL_FAULTS=write`` in the environment, as ``make faults`` does, writes it; any
other run fails if it is not what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gevent.event import Event

from gsocketpool import Pool

from .conftest import Logged
from .faults import (
    BOUND,
    FAULTS,
    KILL,
    NGINX,
    PHASES,
    POSTGRES,
    RESTART,
    SERVERS,
    SIZE,
    VALKEY,
    Dash,
    Outcome,
    Service,
    Traits,
    expected,
    expected_warnings,
    measure,
)
from .peers import Nginx, Postgres, Valkey
from .servers import Server
from .test_peers import Http, Resp

TABLE = Path(__file__).parent.parent / "docs" / "faults-table.inc"

# -- Valkey --


class Greeted(Resp):
    """Opened when the server has answered, so that a dial is more than what the kernel does."""

    def open(self) -> None:
        super().open()
        assert self.ask("PING", "hello") == "hello"


class ValkeyService(Service):
    traits = VALKEY
    server: Valkey

    def pool(self, port: int, tls: bool, reset: Callable[[Any], None] | None, **options: Any) -> Pool[Any]:
        kind = with_reset(Greeted, reset)
        return Pool(kind, {"host": self.server.host, "port": port, "timeout": BOUND}, **options)

    def ask(self, conn: Greeted, token: str) -> str:
        return str(conn.ask("PING", token))

    def hold(self, conn: Greeted, token: str) -> str:
        # It waits for an element, and puts it back for the next one.
        assert conn.ask("BLMOVE", "gate", "gate", "LEFT", "RIGHT", "0") == "open"
        return str(conn.ask("PING", token))

    def alive(self, conn: Greeted) -> bool:
        return conn.check()

    def arm(self) -> None:
        self.server.ask("DEL", "gate")

    def let_go(self) -> None:
        self.server.ask("RPUSH", "gate", "open")

    def held(self) -> int:
        return self.server.blocked()


# -- nginx --


class Gate(Server):
    """The HTTP server behind nginx: answers each request with its query when the gate is open, and not before."""

    def __init__(self, port: int) -> None:
        super().__init__(self._answer)
        self._address = (self.host, port)
        self.way = Event()
        self.held = 0

    def _answer(self, sock: Any) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                return
            head += data
        token = head.split()[1].partition(b"?")[2]
        self.held += 1
        try:
            self.way.wait()
        finally:
            self.held -= 1
        sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(token), token))


class NginxService(Service):
    traits = NGINX
    server: Nginx

    def __init__(self, server: Nginx, gate: Gate) -> None:
        super().__init__(server)
        self.gate = gate

    def port(self, tls: bool) -> int:
        return self.server.tls_port if tls else self.server.port

    def pool(self, port: int, tls: bool, reset: Callable[[Any], None] | None, **options: Any) -> Pool[Any]:
        kind = with_reset(Http, reset)
        where = {"host": self.server.host, "port": port, "timeout": BOUND}
        if tls:
            where |= {"tls": self.server.tls, "server_hostname": "localhost"}
        return Pool(kind, where, **options)

    def ask(self, conn: Http, token: str) -> str:
        return conn.request(f"/echo?{token}")[0]

    def hold(self, conn: Http, token: str) -> str:
        return conn.request(f"/upstream?{token}")[0]

    def alive(self, conn: Http) -> bool:
        return conn.check()

    def arm(self) -> None:
        self.gate.way.clear()

    def let_go(self) -> None:
        self.gate.way.set()

    def held(self) -> int:
        return self.gate.held

    def is_at_rest(self) -> bool:
        return self.gate.open == 0


def with_reset(kind: type[Any], reset: Callable[[Any], None] | None) -> type[Any]:
    """A subclass that does this when it is given back; or the class itself."""
    return kind if reset is None else type(kind.__name__, (kind,), {"reset": lambda self: reset(self)})


# -- PostgreSQL --


class Child:
    """The process that plays PostgreSQL's cells, `tests/scripts/postgres_faults.py`; it may ask for things to be done
    to the server."""

    def __init__(self, server: Postgres, log: Path) -> None:
        self._server = server
        self._log = log
        self._process = self._start()

    def play(self, *cell: object) -> tuple[Outcome, list[str]]:
        try:
            answer = self._talk(self._process, cell)
        except BaseException:
            # It waits for an answer, and is of no more use.
            self.close()
            self._process = self._start()
            raise
        if "failed" not in answer:
            pytest.fail(answer["error"], pytrace=False)
        return Outcome(answer["failed"], answer["error"]), answer["warnings"]

    def _start(self) -> subprocess.Popen[str]:
        script = Path(__file__).parent / "scripts" / "postgres_faults.py"
        with self._log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "error", str(script), self._server.dsn],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _talk(self, process: subprocess.Popen[str], message: object) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, f"it ended:\n{self._log.read_text()}"
            answer: dict[str, Any] = json.loads(line)
            if "do" not in answer:
                return answer
            message = getattr(self._server, answer["do"])()

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(BOUND)
            except BaseException:
                process.kill()
                raise


@pytest.fixture(scope="module")
def child(_postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    log = tmp_path_factory.mktemp("faults") / "stderr"
    child = Child(_postgres, log)
    yield child
    child.close()
    # Nothing printed is G12.
    assert log.read_text() == ""


# -- Cells --

Cell = tuple[str, str, str, bool]  # the server, the fault, the phase, whether the borrowers retry

CELLS: list[Cell] = [
    (traits.name, fault, phase, retrying)
    for traits in SERVERS
    for fault in FAULTS
    for retrying in ([False, True] if fault in (KILL, RESTART) else [False])
    for phase in PHASES
    if not isinstance(expected(traits, fault, phase, retrying), Dash)
]


@pytest.fixture
def play(
    valkey: Valkey, nginx: Nginx, postgres: Postgres, child: Child, logged: Logged
) -> Iterator[Callable[[Cell], None]]:
    """Measures a cell, and compares it with what should come out."""

    def play(cell: Cell) -> None:
        name, fault, phase, retrying = cell
        if name == POSTGRES.name:
            outcome, warnings = child.play(fault, phase, retrying)
        else:
            outcome = measure(services[name], fault, phase, retrying)
            warnings = [record.getMessage() for record in logged.take()]
        (traits,) = (traits for traits in SERVERS if traits.name == name)
        assert outcome == expected(traits, fault, phase, retrying)
        assert len(warnings) == expected_warnings(traits, fault, phase), warnings
        assert all("reset() failed; the connection is closed" in warning for warning in warnings), warnings

    with Gate(nginx.upstream_port) as gate:
        services = {VALKEY.name: ValkeyService(valkey), NGINX.name: NginxService(nginx, gate)}
        yield play


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: f"{cell[0]}: {cell[1]} x {cell[2]}{', with retry' if cell[3] else ''}"
)
def test_g1_g3_g4_a_fault_fails_whom_it_must_and_costs_nothing_else(cell: Cell, play: Callable[[Cell], None]) -> None:
    play(cell)


# -- The table --


def test_the_table_in_the_docs_is_what_the_other_tests_have_found() -> None:
    # What is expected of a cell is what came out of it, or that cell's test has failed.
    if os.environ.get("GSOCKETPOOL_FAULTS") == "write":
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table(), "`make faults` writes what was found into the docs"


def table() -> str:
    """The outcomes as tables, one for each server, and the reasons."""
    reasons: list[str] = []

    def letter(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"({chr(ord('a') + reasons.index(reason))})"

    def entry(traits: Traits, fault: str, phase: str, retrying: bool) -> str:
        want = expected(traits, fault, phase, retrying)
        if isinstance(want, Dash):
            return f"\\- {letter(want.why)}"
        return f"{want.failed} of {SIZE}" + (f" {letter(f'``{want.error}``. {want.why}')}" if want.failed else "")

    lines = [".. Written by `make faults`, from what the tests find: not by hand.", ""]
    for traits in SERVERS:
        lines += [f".. list-table:: {traits.name}: requests that failed", "    :header-rows: 1"]
        lines += ["    :stub-columns: 1", ""]
        rows = [["", *PHASES]]
        for fault in FAULTS:
            rows += [[fault, *(entry(traits, fault, phase, False) for phase in PHASES)]]
            if fault in (KILL, RESTART):
                rows += [[f"{fault}, with ``retry``", *(entry(traits, fault, phase, True) for phase in PHASES)]]
        for row in rows:
            first, *others = row
            lines += [f"    * - {first}".rstrip(), *(f"      - {each}" for each in others)]
        lines += [""]
    for reason in reasons:
        lines += textwrap.wrap(reason, 116, initial_indent=f"{letter(reason)} ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"

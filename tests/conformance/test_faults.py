"""Faults, counted: what each fault does at each stage of a connection's life, before real servers, in every runtime.

The cells and what should come out of them are in `tests/faults.py`. What came out is the table in ``docs/faults.rst``:
a run with ``GSOCKETPOOL_FAULTS=write`` in the environment, as ``make faults`` does, writes it; any other run fails if
it is not what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Logged
from tests.faults import (
    DIALLING,
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
    Traits,
    expected,
    expected_warnings,
    in_runtime,
    measure,
    traits_of,
)
from tests.peers import Nginx, Postgres, Valkey

from .harness import Runtime, only
from .services import BOUND, Gate, NginxService, PostgresService, Service, ValkeyService

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "docs" / "faults-table.inc"

# -- PostgreSQL, for greenlets --


class Child:
    """The process that plays PostgreSQL's cells, `tests/scripts/postgres_faults.py`; it may ask for things to be done
    to the server."""

    def __init__(self, runtime: str, server: Postgres, log: Path) -> None:
        self._runtime = runtime
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
        script = ROOT / "tests" / "scripts" / "postgres_faults.py"
        with self._log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", str(script), self._runtime, self._server.dsn],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        # It asks the server something first, which others' cells would kill.
        assert process.stdout is not None
        assert process.stdout.readline(), f"it ended:\n{self._log.read_text()}"
        return process

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
def children(_postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    """A process for each of these runtimes, for as many cells as there are."""
    folder = tmp_path_factory.mktemp("faults")
    started = {name: Child(name, _postgres, folder / name) for name in ("gevent", "eventlet")}
    yield started
    for name, child in started.items():
        child.close()
        # Nothing printed is G12.
        assert (folder / name).read_text() == ""


@pytest.fixture
def gate() -> Iterator[Gate]:
    """The server behind nginx."""
    gate = Gate()
    with gate:
        yield gate


# -- Cells --

Cell = tuple[str, str, str, bool]  # the server, the fault, the phase, whether the borrowers retry


def cells(traits: Traits) -> pytest.MarkDecorator:
    """All that make sense."""
    found: list[Cell] = [
        (traits.name, fault, phase, retrying)
        for fault in FAULTS
        for retrying in ([False, True] if fault in (KILL, RESTART) else [False])
        for phase in PHASES
        if not isinstance(expected(traits, fault, phase, retrying), Dash)
    ]
    return pytest.mark.parametrize(
        "cell", found, ids=lambda cell: f"{cell[0]}: {cell[1]} x {cell[2]}{', with retry' if cell[3] else ''}"
    )


async def plays(rt: Runtime, service: Service, cell: Cell, logged: Logged) -> None:
    """Measure a cell, and compare it with what should come out."""
    _, fault, phase, retrying = cell
    outcome = await measure(rt, service, fault, phase, retrying)
    compare(rt, cell, outcome, [record.getMessage() for record in logged.take()])


def compare(rt: Runtime, cell: Cell, outcome: Outcome, warnings: list[str]) -> None:
    name, fault, phase, retrying = cell
    traits = traits_of(name)
    want = expected(traits, fault, phase, retrying)
    assert isinstance(want, Outcome)
    assert outcome == in_runtime(rt.name, traits, phase, want)
    if retrying and phase == DIALLING:
        # What one has dialled again may serve another, whose own dial fails after that.
        warnings = [warning for warning in warnings if "a dial failed that nobody waits for" not in warning]
    assert len(warnings) == expected_warnings(rt.name, traits, fault, phase), warnings
    assert all("reset() failed; the connection is closed" in warning for warning in warnings), warnings


@cells(VALKEY)
async def test_g1_g3_g4_a_fault_fails_whom_it_must_and_costs_nothing_else(
    rt: Runtime, cell: Cell, valkey: Valkey, logged: Logged
) -> None:
    await plays(rt, ValkeyService(valkey), cell, logged)


@only("gevent", "threading", "asyncio", "eventlet")
@cells(NGINX)
async def test_g1_g3_g4_so_it_is_with_tls(rt: Runtime, cell: Cell, nginx: Nginx, gate: Gate, logged: Logged) -> None:
    await plays(rt, NginxService(nginx, gate), cell, logged)


@only("threading", "asyncio")
@cells(POSTGRES)
async def test_g1_g3_g4_so_it_is_with_connections_of_others(
    rt: Runtime, cell: Cell, postgres: Postgres, logged: Logged
) -> None:
    await plays(rt, PostgresService(postgres), cell, logged)


@only("gevent", "eventlet")
@cells(POSTGRES)
async def test_g1_g3_g4_so_it_is_where_the_standard_library_is_patched(
    rt: Runtime, cell: Cell, postgres: Postgres, children: dict[str, Child]
) -> None:
    _, *deed = cell
    compare(rt, cell, *children[rt.name].play(*deed))


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

"""A month of a service in a minute; and a harness that would have found what it looks for."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
import pytest
from click.testing import CliRunner

from gsocketpool import ConnectionNotFoundError, Pool
from gsocketpool.core import REASONS, Member, new_place
from tests import soak
from tests.conftest import SEED
from tests.soak import CAP, Plan, Soak

ROOT = Path(__file__).resolve().parent.parent

#: Borrowings of the month that the suite plays, at least 50,000, so that each thing happens. `make soak` plays one with
#: a million.
BORROWINGS = int(os.environ.get("GSOCKETPOOL_SOAK", "100000"))

#: What a month must have seen, beside connections closed for every reason there is.
INCIDENTS = (
    *("restart", "reset some", "half close some", "slow handshakes", "no handshakes"),
    *("clear", "deploy", "drop any", "pause", "resize", "squeeze", "a pool forgotten"),
    *("killed", "timed out", "gave up waiting", "not given back", "logged: held for long"),
)

#: For months with something wrong, which is then found soon.
SHORT = Plan(borrowings=6_000, days=4, seed=SEED)


@pytest.mark.timeout(600)
def test_g4_a_month_of_kills_and_restarts_leaves_memory_and_descriptors_flat() -> None:
    # In a process of its own, whose memory nothing else uses: not coverage, which keeps something for each greenlet.
    command = [sys.executable, "-m", "tests.soak", "--borrowings", str(BORROWINGS), "--seed", str(SEED)]
    unmeasured = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    done = subprocess.run(command, cwd=ROOT, env=unmeasured, capture_output=True, text=True, timeout=590, check=False)

    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    table = dict(re.findall(r"^(\S.*?) {2,}([\d,]+) *$", done.stdout, re.MULTILINE))
    missing = [what for what in (*(f"closed: {reason}" for reason in REASONS), *INCIDENTS) if table[what] == "0"]
    assert missing == []


# Pools in which something is wrong

kept: list[Any] = []


@pytest.fixture
def keeping() -> Iterator[None]:
    yield
    for thing in kept:
        if isinstance(thing, tuple):
            sleeper, sock = thing
            sleeper.kill()
            sock.close()
    kept.clear()


class Keeps(Pool[Any]):
    """Keeps something whenever it has opened a connection."""

    def _create_connection(self) -> Any:
        connection = super()._create_connection()
        kept.append(self.something(connection))
        return connection

    def something(self, connection: Any) -> object:
        raise NotImplementedError


class KeepsWhatIsCounted(Keeps):
    def something(self, connection: Any) -> object:
        kept.append(Member(connection))
        kept.append(new_place())
        return (gevent.spawn(gevent.sleep, 1000), socket.socket()) if len(kept) % 30 == 2 else None


class KeepsObjects(Keeps):
    def something(self, connection: Any) -> object:
        return [[], []]


class KeepsBytes(Keeps):
    def something(self, connection: Any) -> object:
        return [bytes(range(n, n + 100)) for n in range(10)]


class KeepsMemory(Keeps):
    def something(self, connection: Any) -> object:
        return b"\n" * 100_000


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        (KeepsWhatIsCounted, ["descriptors", "greenlets", "members", "places", "timers, watchers", "sockets"]),
        (KeepsObjects, ["objects"]),
        (KeepsBytes, ["memory blocks"]),
        (KeepsMemory, ["resident KiB"]),
    ],
)
def test_a_leak_is_found(kind: type[Pool[Any]], figures: list[str]) -> None:
    report = Soak(replace(SHORT, patience=5.0), kind).run()  # in the end it waits so long for what is left

    for figure in figures:
        assert any(failure.startswith(f"{figure} grew by") for failure in report.failures), report.failures


class LosesSlots(Pool[Any]):
    """Of five hundred connections that are given back, it takes back all but one."""

    released = 0

    def release(self, conn: Any) -> None:
        self.released += 1
        if self.released % 500:
            super().release(conn)
        else:
            conn.close()  # or it would be collected with its socket open, if its pool is forgotten


def test_a_lost_slot_is_found() -> None:
    report = Soak(replace(SHORT, patience=4.0), LosesSlots).run()

    assert any("not as many served at once" in failure for failure in report.failures), report.failures


class Careless(Pool[Any]):
    """Takes a connection back whatever has happened on it."""

    @contextmanager
    def connection(self, timeout: Any = ...) -> Iterator[Any]:  # type: ignore[override]
        connection = self.acquire(timeout=timeout)
        try:
            yield connection
        finally:
            gevent.spawn(self._take_back, connection)  # where no exception passes

    def _take_back(self, connection: Any) -> None:
        with suppress(ConnectionNotFoundError):  # dropped meanwhile
            self.release(connection)


def test_a_wrong_reply_is_found() -> None:
    report = Soak(SHORT, Careless).run()

    assert any("was answered by" in failure for failure in report.failures), report.failures


class Generous(Pool[Any]):
    """Opens one more than it should."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options["max_connections"] += 1
        super().__init__(*args, **options)


def test_a_socket_too_many_is_found() -> None:
    report = Soak(SHORT, Generous).run()

    assert f"a server saw {CAP + 1} sockets at once, and the cap is {CAP}" in report.failures


class Dies(Pool[Any]):
    """Has background greenlets that end with an error."""

    def _create_connection(self) -> Any:
        gevent.spawn(divmod, 1, 0)
        return super()._create_connection()


def test_an_error_in_the_background_is_found() -> None:
    report = Soak(SHORT, Dies).run()

    assert any("ZeroDivisionError" in failure for failure in report.failures), report.failures


def test_the_program_says_what_failed_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.MAY_GROW, "descriptors", -1)

    ended = CliRunner().invoke(soak.main, ["--borrowings", "1000", "--days", "4"])

    assert ended.exit_code == 1
    assert "FAILED: descriptors grew by 0 from the second quarter to the last one, more than -1" in ended.output

"""Locust's users share a pool: the example runs headless against a real server, until it has asked enough."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .conformance.server import EchoServer

ROOT = Path(__file__).parent.parent

USERS, MAX_CONNECTIONS = 20, 5
#: When there have been so many, Locust is told to stop.
CALLS = 500

#: Seconds for whatever should happen soon.
BOUND = 30.0


@contextlib.contextmanager
def locust(server: EchoServer, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Locust, when its users hold all connections that there may be, and the server holds their answers."""
    server.hold()
    command = [
        *(sys.executable, "-m", "locust", "--locustfile", str(ROOT / "examples" / "locustfile.py")),
        *("--headless", "--users", str(USERS), "--spawn-rate", str(USERS), "--run-time", "60s", "--json"),
        *("--host", f"tcp://127.0.0.1:{server.port}"),
    ]
    environment = {"PYTHONPATH": str(ROOT), "MAX_CONNECTIONS": str(MAX_CONNECTIONS)}
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=folder,  # where there are no settings of anybody's
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            server.wait_until(lambda: len(server.heard) == MAX_CONNECTIONS, BOUND)
            yield process
        finally:
            process.kill()


def report(process: subprocess.Popen[str], server: EchoServer) -> tuple[int, dict[str, Any], str]:
    """Let it go on for a while, and stop it: its exit status, its figures by what it counts, what it said besides."""
    server.let_go()
    server.wait_until(lambda: len(server.heard) >= CALLS, BOUND)
    process.terminate()
    out, errors = process.communicate(timeout=BOUND)
    figures = json.loads(out)
    assert {each["name"] for each in figures} == {"greeting"}
    return process.returncode, {each["method"]: each for each in figures}, errors


def test_g1_g3_locusts_users_share_a_pool_and_its_waits_and_its_calls_are_counted_apart(tmp_path: Path) -> None:
    with EchoServer() as server:
        with locust(server, tmp_path) as process:
            status, figures, errors = report(process, server)
        assert status == 0, errors
        server.wait_until(lambda: server.serving == 0)
        assert server.most == MAX_CONNECTIONS
        heard = server.heard

    wait, call = figures.pop("pool"), figures.pop("tcp")
    assert figures == {}
    assert (wait["num_failures"], call["num_failures"]) == (0, 0)  # a wrong reply would be one
    assert CALLS <= len(heard) <= wait["num_requests"]
    # In the end some are killed in the middle of their calls.
    assert wait["num_requests"] - MAX_CONNECTIONS <= call["num_requests"] <= len(heard)
    assert len({*heard}) == len(heard)
    assert wait["total_content_length"] == 0
    assert call["total_content_length"] > call["num_requests"] * len("hello ")


def test_a_call_that_fails_under_locust_is_counted_as_such_and_the_next_one_has_another_connection(
    tmp_path: Path,
) -> None:
    with EchoServer() as server:
        with locust(server, tmp_path) as process:
            server.hang_up()
            status, figures, errors = report(process, server)
        assert status == 1, errors  # Locust's way to say that there were failures
        server.wait_until(lambda: server.serving == 0)
        assert server.most == MAX_CONNECTIONS

    assert figures["pool"]["num_failures"] == 0
    assert figures["tcp"]["num_failures"] == MAX_CONNECTIONS
    assert figures["tcp"]["num_requests"] >= CALLS - MAX_CONNECTIONS
    assert errors.count("EndOfStreamError") >= 1, errors

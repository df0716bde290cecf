"""What becomes of pools when a process forks, or ends: programs of their own, in `apart.py`, seen from the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import BOUND, RUNTIMES
from .server import EchoServer

ROOT = Path(__file__).parent.parent.parent


def run(name: str, program: str, server: EchoServer) -> None:
    # Without whatever would have the program measured, for it is its end that is looked at.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.apart", name, program, str(server.port)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "EVENTLET_TESTS": "1"},
        capture_output=True,
        text=True,
        timeout=3 * BOUND,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    "program",
    [
        "ends_with_a_pool_that_idles",
        "ends_with_a_pool_that_nobody_keeps",
        "ends_while_all_is_under_way",
        "ends_inside_a_block",
    ],
)
def test_g12_a_program_ends_at_once_and_without_a_word(name: str, program: str, server: EchoServer) -> None:
    run(name, program, server)


@pytest.mark.parametrize("name", RUNTIMES)
def test_g10_after_a_fork_the_child_uses_none_of_the_parents_sockets(name: str, server: EchoServer) -> None:
    run(name, "forks", server)
    whose = [{*client.lines} for client in server.clients if client.lines]
    assert {b"parent", b"child"} in [set().union(*whose)]
    assert all(len(words) == 1 for words in whose), "a connection was used on both sides"
    assert all(client.rest == b"" for client in server.clients)

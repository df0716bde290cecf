"""What the examples say when there is nobody to talk to: few words, and the last of them are the cause.

That they run is tested in test_docs.py and with the recipes.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket, subprocess
from gevent.event import Event

from .conformance.server import EchoServer
from .servers import Server
from .test_gunicorn import Client, Gunicorn, wait_until

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
BOUND = 50.0

#: The arguments of each that needs a server.
ARGUMENTS = {
    "endpoints.py": ["host={host} port={port}"] * 3,
    "endpoints_threads.py": ["host={host} port={port}"] * 3,
    "https.py": ["{host}", "{port}", "/"],
    "postgres.py": ["host={host} port={port}"],
    "resp.py": ["{host}", "{port}"],
    "smtp.py": ["{host}", "{port}", "app", "box@a.example"],
    "thrift_client.py": ["{host}", "{port}"],
    "valkey_client.py": ["{host}", "{port}"],
}
#: An endpoint logs each dial for its `min_idle` as well, with a traceback.
LOGGED = {"endpoints.py": "a dial for min_idle=3 failed", "endpoints_threads.py": "a dial for min_idle=3 failed"}


def start(example: str, *arguments: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "examples" / example), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SMTP_PASSWORD": "s3cret"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: Any) -> tuple[int, str, str]:
    """Its exit status, and what it printed and complained of."""
    try:
        printed, complaints = process.communicate(timeout=BOUND)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, printed, complaints


@contextlib.contextmanager
def nobody() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        yield sock.getsockname()[1]


@pytest.mark.parametrize("example", ARGUMENTS)
def test_an_example_whose_server_is_not_there_says_so_and_nothing_else(example: str) -> None:
    with nobody() as port:
        arguments = [argument.format(host=HOST, port=port) for argument in ARGUMENTS[example]]
        status, printed, complaints = end(start(example, *arguments))
    assert (status, printed) == (1, ""), complaints
    logged = complaints.count(LOGGED[example]) if example in LOGGED else 0
    assert complaints.count("Traceback") <= logged, complaints  # the first failure of each pool is shown with one
    cause = complaints.splitlines()[-2:]  # of libpq there are two lines
    assert re.search("refused|Could not connect", " ".join(cause)), complaints
    if example not in LOGGED:
        assert complaints.splitlines() == cause


@pytest.mark.parametrize("example", ARGUMENTS)
def test_an_example_with_too_few_arguments_says_which_it_takes(example: str) -> None:
    few = ["one"] if example == "thrift_client.py" else []  # without any it has a server of its own
    usage = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text(encoding="utf-8")))
    status, printed, complaints = end(start(example, *few))
    assert (status, printed, complaints.strip()) == (1, "", usage)


@pytest.mark.parametrize("example", ["resp.py", "thrift_client.py"])
def test_an_example_whose_server_dies_in_the_middle_ends_with_the_cause(example: str) -> None:
    """Where all is patched, other greenlets would go on after the error, and find the pool closed."""
    asked = 0
    all_ask = Event()

    def serve(sock: Any) -> None:
        nonlocal asked
        sock.recv(1024)
        asked += 1
        if asked == 4:
            all_ask.set()
        Event().wait()  # until it is killed

    with Server(serve) as server:
        process = start(example, HOST, str(server.port))
        try:
            assert all_ask.wait(BOUND)
        finally:
            server.close()
            status, printed, complaints = end(process)
    assert (status, printed) == (1, ""), complaints
    assert "PoolClosedError" not in complaints
    last = complaints.splitlines()[-1]
    assert re.search(r"refused|reset by peer|ended the stream|TSocket read 0 bytes|Could not connect", last), complaints


@pytest.fixture
def folder(_peers: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=_peers))


def test_behind_gunicorn_a_backend_that_hangs_up_or_is_down_is_a_503(folder: Path) -> None:
    def ask(token: str) -> tuple[int, str]:
        with contextlib.closing(Client(HOST, gunicorn.port, timeout=BOUND)) as client:
            client.open()
            return client.ask(token)

    with contextlib.ExitStack() as life:
        backend = life.enter_context(EchoServer())
        with Gunicorn(folder, backend) as gunicorn:
            assert ask("one")[0] == 200
            # Both workers have loaded the application: gunicorn waits long for one that was told to end before that.
            wait_until(lambda: backend.accepted >= 4)

            backend.hold()
            asking = gevent.spawn(ask, "two")
            wait_until(lambda: any(b"two" in line for line in backend.heard))
            backend.hang_up(reset=True)
            assert asking.get(timeout=BOUND) == (503, "try again")

            life.close()
            assert ask("three") == (503, "try again")

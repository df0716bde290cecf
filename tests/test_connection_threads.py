"""TcpConnection for threads, where threads meet: what all runtimes share is in conformance/test_connections.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gsocketpool.threading import TcpConnection
from tests.conformance.hosts import PATIENCE, Host, echo, say
from tests.conformance.test_connections import Certificates

ROUNDS = 200


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """Another thread. Always the same one: CPython 3.11 can hang where many come and go while coverage looks on."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


@pytest.mark.usefixtures("restless")
def test_a_close_at_any_moment_of_an_open_leaves_nothing_open(other: ThreadPoolExecutor) -> None:
    # The descriptors are counted by conftest.py when the test has ended. Nobody needs to accept.
    with socket.create_server(("127.0.0.1", 0), backlog=ROUNDS) as listener:
        for number in range(ROUNDS):
            conn = TcpConnection("127.0.0.1", listener.getsockname()[1], timeout=5)
            opening = other.submit(conn.open)
            if number % 2:
                time.sleep(number * 2e-6)
            conn.close()
            error = opening.exception(PATIENCE)
            # Where close() came first there was nothing to call off; else it found either the attempt or the socket.
            assert error is None or (isinstance(error, ConnectionAbortedError) and not conn.is_connected())
            conn.close()
            assert conn.fileno() is None


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_close_at_any_moment_of_a_conversation_ends_it_with_an_error(
    tls: bool, certificates: Certificates, other: ThreadPoolExecutor
) -> None:
    def talk(conn: TcpConnection, begun: threading.Event) -> None:
        while True:
            conn.send(b"ping\n")
            assert conn.recv_until(b"\n") == b"ping"
            begun.set()

    with Host(echo, tls=certificates.server() if tls else None) as server:
        for number in range(20):
            conn = TcpConnection(server.host, server.port, timeout=5, tls=certificates.client() if tls else None)
            conn.open()
            begun = threading.Event()
            talking = other.submit(talk, conn, begun)
            assert begun.wait(5)
            time.sleep(number * 2e-5)
            conn.close()
            assert isinstance(talking.exception(PATIENCE), ConnectionError)


def test_one_thread_can_send_while_another_one_receives(other: ThreadPoolExecutor) -> None:
    data = os.urandom(4 * 1024 * 1024)
    with Host(echo) as server:
        conn = TcpConnection(server.host, server.port, timeout=PATIENCE)
        conn.open()
        sending = other.submit(conn.send, data)
        assert conn.recv_exactly(len(data)) == data
        assert sending.result(PATIENCE) == len(data)
        conn.close()


def test_a_close_in_the_child_of_a_fork_leaves_the_parents_connection_alone() -> None:
    # A process of its own, since this one has threads and gevent's hub.
    script = f"""
import os, socket, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from gsocketpool.threading import TcpConnection
listener = socket.create_server(("127.0.0.1", 0))
conn = TcpConnection("127.0.0.1", listener.getsockname()[1], timeout={PATIENCE})
conn.open()
peer, _ = listener.accept()
if os.fork() == 0:
    conn.close()
    os._exit(conn.is_connected())
assert os.wait()[1] == 0
conn.send(b"question")
assert peer.recv(100) == b"question"
peer.sendall(b"answer")
assert conn.recv() == b"answer"
conn.close()
assert peer.recv(100) == b""
peer.close()
listener.close()
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), timeout=60)


def test_neither_gevent_nor_ssl_is_loaded_by_who_does_not_use_it() -> None:
    script = """
import sys
from gsocketpool.sockets import ThreadSockets
import gsocketpool.connection
class TcpConnection(ThreadSockets, gsocketpool.connection.TcpConnection): pass
TcpConnection("localhost", 1)
assert not {"gevent", "eventlet", "ssl"} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment(), timeout=60)


@pytest.mark.parametrize("patch", ["gevent.monkey.patch_all", "eventlet.monkey_patch"])
def test_it_works_where_the_standard_library_is_monkey_patched(patch: str) -> None:
    # Its threads are greenlets there. The server is a process of its own.
    with Host(say(b"answer", b"stray")) as server:
        script = f"""
import warnings
warnings.simplefilter("ignore")
import {patch.rpartition(".")[0]}
{patch}()
import time
from gsocketpool.threading import TcpConnection
conn = TcpConnection("127.0.0.1", {server.port}, timeout={PATIENCE})
conn.open()
conn.send(b".")
assert conn.recv_exactly(6) == b"answer"
assert conn.check() is True
conn.send(b".")
deadline = time.monotonic() + {PATIENCE}
while conn.check():
    assert time.monotonic() < deadline
    time.sleep(0.001)
assert conn.recv_exactly(5) == b"stray"
assert conn.recv() == b""
conn.close()
assert not conn.check()
"""
        subprocess.run([sys.executable, "-c", script], check=True, env=environment(), timeout=60)


def test_a_look_up_is_the_systems_own_and_its_error_names_the_server() -> None:
    conn = TcpConnection("name.invalid", 80)

    def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    conn._getaddrinfo = getaddrinfo  # type: ignore[method-assign]
    with pytest.raises(socket.gaierror, match=r"name\.invalid:80 \(looking up the name: Temporary failure"):
        conn.open()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

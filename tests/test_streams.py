"""TcpConnection for asyncio, where it is like no other: conformance/test_connections.py has what all runtimes share."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gsocketpool.streams import Connection, TcpConnection, UnixConnection
from tests.conformance.hosts import PATIENCE, Host, echo, say, swallow
from tests.conformance.test_connections import Certificates, Hole, descriptors

Scenario = Callable[[], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Run a scenario in a loop; nothing may be raised in the background."""

    def run(scenario: Scenario) -> None:
        complaints: list[Any] = []
        loop = uvloop.new_event_loop() if request.param == "uvloop" else asyncio.new_event_loop()
        loop.set_debug(True)
        loop.set_exception_handler(lambda loop, context: complaints.append(context))
        loop.slow_callback_duration = 60
        try:
            loop.run_until_complete(asyncio.wait_for(scenario(), PATIENCE))
            assert not asyncio.all_tasks(loop)
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
        assert complaints == []

    return run


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


async def opened(server: Any, **options: Any) -> TcpConnection:
    conn = TcpConnection(server.host, server.port, **{"timeout": PATIENCE, **options})
    await conn.open()
    return conn


def test_close_closes_at_once_and_may_be_awaited(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        with Host(swallow) as server:
            conn = await opened(server)
            done = conn.close()
            assert not conn.is_connected()
            assert conn.fileno() is None
            await done
            await conn.close()

    run(scenario)


def test_a_connection_can_be_closed_when_its_loop_is_no_more(run: Callable[[Scenario], None]) -> None:
    conns: list[TcpConnection] = []

    async def scenario() -> None:
        conns.append(await opened(server))

    with Host(swallow) as server:
        run(scenario)
        assert conns[0].check() is True
        conns[0].close()
        assert not conns[0].is_connected()


def test_a_connection_can_be_used_in_one_loop_after_another(run: Callable[[Scenario], None]) -> None:
    async def ask() -> None:
        await conn.send(b"question")
        assert await conn.recv() == b"question"

    with Host(echo) as server:
        conn = TcpConnection(server.host, server.port)
        run(conn.open)
        run(ask)
        run(ask)
        conn.close()


def test_a_peer_that_always_has_answered_already_leaves_others_their_turns(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        sent = threading.Event()

        def flood(sock: Any) -> None:
            sock.sendall(bytes(64 * 1024))
            sent.set()
            swallow(sock)

        with Host(flood) as server:
            conn = await opened(server)
            while not sent.is_set():
                await asyncio.sleep(0.001)
            turns: list[int] = []
            asyncio.get_running_loop().call_soon(turns.append, 1)
            for _ in range(1000):  # each of them has come
                await conn.recv(64)
            assert turns == [1]
            conn.close()

    run(scenario)


def test_a_time_limit_of_asyncios_ends_a_wait_and_loses_nothing(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        with Host(say(b"par", b"tial")) as server:
            conn = await opened(server, timeout=None)
            await conn.send(b".")
            while conn.check():
                await asyncio.sleep(0.001)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(conn.recv_exactly(7), 0.05)
            assert conn.check() is False
            await conn.send(b".")
            assert await conn.recv_exactly(7) == b"partial"
            conn.close()

    run(scenario)


def test_two_tasks_can_wait_for_the_same_connection(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        with Host(say(b"1", b"2", b"3")) as server:
            conn = await opened(server)
            waiting = [asyncio.ensure_future(conn.recv(1)) for _ in range(2)]
            await asyncio.sleep(0)
            await conn.send(b"..")
            assert sorted(await asyncio.gather(*waiting)) == [b"1", b"2"]
            waiting = [asyncio.ensure_future(conn.recv_exactly(1)) for _ in range(2)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.wait([waiting[0]])
            assert waiting[0].cancelled()
            await conn.send(b".")
            assert await waiting[1] == b"3"
            conn.close()

    run(scenario)


def test_a_cancelled_open_leaves_the_look_up_to_itself(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        before = descriptors()
        gate = threading.Event()
        conn = TcpConnection("name.test", 80)

        async def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
            await asyncio.get_running_loop().run_in_executor(None, gate.wait, PATIENCE)
            raise socket.gaierror(socket.EAI_NONAME, "nobody asks any more")

        conn._getaddrinfo = getaddrinfo  # type: ignore[method-assign]
        opening = asyncio.ensure_future(conn.open())
        await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        with pytest.raises(RuntimeError, match="is being opened already"):
            again = asyncio.ensure_future(conn.open())
            await asyncio.sleep(0.01)
            await conn.open()
        again.cancel()
        gate.set()
        await asyncio.wait([again])
        assert descriptors() <= before

    run(scenario)


def test_a_real_name_is_looked_up_by_the_loop(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        with Host(echo) as server:
            conn = TcpConnection("localhost", server.port, connect_timeout=PATIENCE)
            await conn.open()
            await conn.send(b"hello")
            assert await conn.recv() == b"hello"
            conn.close()

    run(scenario)


def test_the_deadline_holds_however_many_addresses_there_are(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        with Hole() as hole:
            conn = TcpConnection("name.test", 80, connect_timeout=0.1)

            async def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
                return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (hole.host, hole.port))] * 5

            conn._getaddrinfo = getaddrinfo  # type: ignore[method-assign]
            # On a busy machine the time may be over before the first connect begins.
            wanted = r"name\.test:80 within 0\.1 s \((127\.0\.0\.1: no answer|no time was left)"
            with pytest.raises(TimeoutError, match=wanted):
                await conn.open()

    run(scenario)


def test_a_descriptor_that_the_loop_watches_for_somebody_else_is_free_again(run: Callable[[Scenario], None]) -> None:
    """A pool watches its idle connections by `fileno()`, and stops before it lends them."""

    async def scenario() -> None:
        with Host(say(b"answer", b"stray")) as server:
            loop = asyncio.get_running_loop()
            conn = await opened(server)
            for _ in range(2):
                stirred = loop.create_future()
                descriptor = conn.fileno()
                assert descriptor is not None
                loop.add_reader(descriptor, stirred.cancel)
                loop.remove_reader(descriptor)
                await conn.send(b".")
                assert await conn.recv() in (b"answer", b"stray")
            conn.close()

    run(scenario)


def test_reconnect_awaits_what_is_to_be_awaited(run: Callable[[Scenario], None]) -> None:
    class Half(Connection):
        """Opened by a coroutine, closed by a plain method."""

        def __init__(self) -> None:
            self.calls: list[str] = []

        async def open(self) -> None:
            await asyncio.sleep(0)
            self.calls.append("open")

        def close(self) -> None:
            self.calls.append("close")

        def is_connected(self) -> bool:
            return bool(self.calls)

    async def scenario() -> None:
        conn = Half()
        await conn.reconnect()
        await conn.reconnect()
        assert conn.calls == ["open", "close", "open"]

    run(scenario)


def test_a_unix_server_with_a_full_queue_is_waited_for_without_spinning(
    run: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(str(tmp_path / "socket"))
            listener.listen(0)
            first.connect(str(tmp_path / "socket"))
            conn = UnixConnection(tmp_path / "socket", connect_timeout=PATIENCE)
            pauses: list[float] = []

            async def sleep(seconds: float) -> None:
                pauses.append(seconds)
                if len(pauses) == 3:
                    listener.accept()[0].close()
                await asyncio.sleep(seconds)

            conn._sleep = sleep  # type: ignore[method-assign]
            await conn.open()
            assert pauses == [0.001, 0.002, 0.004]
            conn.close()

    run(scenario)


def test_tls_reads_and_writes_while_it_waits_for_the_other(
    run: Callable[[Scenario], None], certificates: Certificates
) -> None:
    """A handshake waits for both; so may a key update, in the middle of what is being sent."""

    async def scenario() -> None:
        with Host(echo, tls=certificates.server()) as server:
            conn = await opened(server, tls=certificates.client())
            data = os.urandom(3 * 1024 * 1024)
            sending = asyncio.ensure_future(conn.send(data))
            assert await conn.recv_exactly(len(data)) == data
            assert await sending == len(data)
            assert isinstance(conn.socket, ssl.SSLSocket)
            conn.close()

    run(scenario)


def test_gevent_is_not_loaded() -> None:
    script = """
import sys
import gsocketpool.streams
assert not {"gevent", "eventlet"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment, timeout=60)

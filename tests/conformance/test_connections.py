"""TcpConnection and UnixConnection: the same in every runtime."""

from __future__ import annotations

import array
import errno
import fcntl
import functools
import gc
import random
import re
import select
import socket
import ssl
import struct
import sys
import tempfile
import termios
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme

from gsocketpool.connection import Connection, EndOfStreamError, LimitExceededError
from gsocketpool.sockets import wrap_tls

from .harness import ASLEEP, BOUND, CANCEL, WAKING, Runtime, do, needs, only
from .hosts import Handler, Host, echo, reset, say, swallow

Context = ssl.SSLContext
Use = Callable[[Any], Any]


def tcp(rt: Runtime, server: Any, **options: Any) -> Any:
    """A connection to a server."""
    return rt.api.TcpConnection(server.host, server.port, **{"timeout": BOUND, **options})


async def opened(rt: Runtime, server: Any, **options: Any) -> Any:
    """An open connection to a server."""
    conn = tcp(rt, server, **options)
    await do(conn.open())
    return conn


def look_up(
    rt: Runtime, conn: Any, *addresses: tuple[Any, ...], then: Callable[[], Awaitable[Any]] | None = None
) -> None:
    """Make the connection's look-up do ``then``, and find these addresses."""

    async def find(host: str, port: int) -> list[tuple[Any, ...]]:
        if then is not None:
            await then()
        return [
            (socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
            for address in addresses
        ]

    conn._getaddrinfo = find if rt.module.endswith("asyncio") else _driven(find)


def _driven(find: Callable[..., Any]) -> Callable[..., Any]:
    from .harness import drive

    return lambda *args: drive(find(*args))


def descriptors() -> int:
    """How many descriptors this process has open."""
    return psutil.Process().num_fds()


class Descriptors:
    """A block that leaves no descriptor behind.

    The server's own are counted too, so the servers must be quiet: nobody is served before and after.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    async def __aenter__(self) -> None:
        await self._rt.sleep(0)  # a hub is made when it is first needed, and kept
        self._before = descriptors()

    async def __aexit__(self, *error: object) -> None:
        await self._rt.until(lambda: descriptors() <= self._before, lambda: f"{descriptors()} > {self._before}")


def hurry(conn: Any, hole: Any) -> list[float]:
    """Make a connect to one of its addresses end early, as if its time were over: so all the others have plenty.

    :returns: the seconds that each address is given, as they are tried.
    """
    given: list[float] = []
    connect = conn._connect

    def hurried(family: int, proto: int, address: Any, seconds: float) -> Any:
        given.append(seconds)
        return connect(family, proto, address, 0.05 if address == (hole.host, hole.port) else seconds)

    conn._connect = hurried
    return given


def connects(conn: Any) -> list[Any]:
    """Where the connection notes the sockets that have connected."""
    connected: list[Any] = []
    secure = conn._secure

    def noted(sock: Any, deadline: float | None) -> Any:
        connected.append(sock)
        return secure(sock, deadline)

    conn._secure = noted
    return connected


async def readable(rt: Runtime, conn: Any) -> None:
    """Wait until something has arrived: bytes, the end of the stream or an error."""
    poll = select.poll()
    poll.register(conn.fileno(), select.POLLIN)
    await rt.until(lambda: poll.poll(0), lambda: "nothing arrives")


async def arrived(rt: Runtime, conn: Any, count: int) -> None:
    """Wait until so many bytes have arrived that nobody has received."""

    def found() -> int:
        (size,) = struct.unpack("i", fcntl.ioctl(conn.fileno(), termios.FIONREAD, bytes(4)))
        return len(conn._read_ahead) + int(size)

    await rt.until(lambda: found() == count, lambda: f"{found()} bytes have arrived, not {count}")


def refused_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


class Hole:
    """An address at which a connect is neither accepted nor refused: its queue is full."""

    host = "127.0.0.1"

    def __enter__(self) -> Hole:
        self._sockets = [socket.create_server((self.host, 0), backlog=0)]
        self.port: int = self._sockets[0].getsockname()[1]
        for _ in range(8):
            client = socket.socket()
            self._sockets.append(client)
            client.setblocking(False)
            client.connect_ex((self.host, self.port))
        return self

    def __exit__(self, *error: object) -> None:
        for sock in self._sockets:
            sock.close()


def greets(sock: Any) -> None:
    sock.sendall(b"stray")
    swallow(sock)


# What they are


async def test_they_are_connections_of_their_runtime(rt: Runtime) -> None:
    for kind, arguments in ((rt.api.TcpConnection, ("127.0.0.1", 1)), (rt.api.UnixConnection, ("/tmp/socket",))):
        conn = kind(*arguments)
        assert isinstance(conn, rt.api.StreamConnection)
        assert isinstance(conn, rt.api.Connection)
        assert isinstance(conn, Connection)
        assert kind.__module__ != "gsocketpool.connection" or rt.name == "gevent"
        assert kind.__doc__
        assert not conn.is_connected()
        assert not conn.is_expired()
        assert conn.check() is False
        assert conn.fileno() is None
        await do(conn.close())
    assert repr(rt.api.TcpConnection("::1", 80)) == "<TcpConnection [::1]:80 (closed)>"


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"host": b"localhost"}, TypeError),
        ({"port": 65536}, ValueError),
        ({"lifetime": -1}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"connect_timeout": 0}, ValueError),
        ({"tls": "yes"}, TypeError),
        ({"server_hostname": ""}, ValueError),
        ({"nodelay": 1}, TypeError),
        ({"tcp_keepalive": 1.5}, TypeError),
        ({"source_address": ("127.0.0.1", 70000)}, ValueError),
    ],
    ids=str,
)
async def test_a_wrong_parameter_is_refused_by_its_name(
    rt: Runtime, option: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"\b{next(iter(option))}\b"):
        rt.api.TcpConnection(**{"host": "127.0.0.1", "port": 80, **option})


@pytest.mark.parametrize(("path", "error"), [(None, TypeError), ("", ValueError)], ids=str)
async def test_a_wrong_path_is_refused_by_its_name(rt: Runtime, path: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="path must"):
        rt.api.UnixConnection(path)


# Open and closed


@pytest.mark.parametrize(("listen", "host"), [("127.0.0.1", "localhost"), ("::1", "::1"), ("127.0.0.1", "127.0.0.1")])
async def test_names_and_addresses_of_both_families_can_be_connected_to(rt: Runtime, listen: str, host: str) -> None:
    with Host(echo, host=listen) as server:
        conn = rt.api.TcpConnection(host, server.port, timeout=BOUND)
        await do(conn.open())
        assert await do(conn.send(b"hello")) == 5
        assert await do(conn.recv()) == b"hello"
        assert conn.is_connected()
        assert conn.get() is conn.socket
        assert conn.fileno() == conn.socket.fileno()
        await do(conn.close())


async def test_a_closed_connection_can_be_opened_again_and_begins_anew(rt: Runtime) -> None:
    with Host(say(b"one\ntwo\n")) as server:
        conn = tcp(rt, server)
        for _ in range(3):
            await do(conn.open())
            with pytest.raises(RuntimeError, match=r"is open already: close\(\) it"):
                await do(conn.open())
            await do(conn.send(b"."))
            assert await do(conn.recv_until(b"\n")) == b"one"
            await do(conn.close())
            await do(conn.close())
            assert not conn.is_connected()
            assert conn.fileno() is None
        assert server.accepted == 3


async def test_reconnect_works_after_the_server_hung_up(rt: Runtime) -> None:
    with Host(say(b"1")) as server:
        conn = tcp(rt, server)
        for _ in range(2):
            await do(conn.reconnect())
            await do(conn.send(b"."))
            assert await do(conn.recv()) == b"1"
            assert await do(conn.recv()) == b""
        await do(conn.close())


async def test_reconnect_logs_why_it_could_not(rt: Runtime, logged: Any) -> None:
    conn = rt.api.TcpConnection("127.0.0.1", refused_port())
    await do(conn.reconnect())
    assert not conn.is_connected()
    [record] = logged.take()
    assert record.getMessage() == "cannot reconnect a TcpConnection"


@pytest.mark.parametrize(
    "use",
    [
        lambda conn: conn.send(b"x"),
        lambda conn: conn.recv(),
        lambda conn: conn.recv_exactly(1),
        lambda conn: conn.recv_exactly(0),
        lambda conn: conn.recv_until(b"."),
        lambda conn: conn.socket,
        lambda conn: conn.get(),
        lambda conn: conn.start_tls(),
    ],
    ids=["send", "recv", "recv_exactly", "recv_exactly nothing", "recv_until", "socket", "get", "start_tls"],
)
async def test_a_connection_that_is_not_open_cannot_be_used(rt: Runtime, use: Use) -> None:
    conn = rt.api.TcpConnection("127.0.0.1", 1)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 \(closed\)> is not open: call open\(\) first"):
        await do(use(conn))


async def test_a_connection_expires_when_it_was_open_for_its_lifetime(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("gsocketpool.connection.monotonic", lambda: now)
    with Host(echo) as server:
        conn = tcp(rt, server, lifetime=10, timeout=None)
        await do(conn.open())
        now = 1010.0
        assert not conn.is_expired()
        now = 1010.1
        assert conn.is_expired()
        await do(conn.close())
        assert not conn.is_expired()


async def test_the_sockets_options_are_set(rt: Runtime) -> None:
    port = refused_port()
    with Host(echo) as server:
        conn = await opened(rt, server, tcp_keepalive=(30, 5, 3), source_address=("127.0.0.1", port))
        wanted = {(socket.IPPROTO_TCP, socket.TCP_NODELAY): 1, (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1}
        if sys.platform == "linux":
            wanted |= {(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 30, (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3}
        assert {option: conn.socket.getsockopt(*option) for option in wanted} == wanted
        assert conn.socket.getsockname() == ("127.0.0.1", port)
        await do(conn.close())


# What fails to open


async def test_a_refused_connect_names_the_server_and_leaks_nothing(rt: Runtime) -> None:
    port = refused_port()
    conn = rt.api.TcpConnection("127.0.0.1", port)
    async with Descriptors(rt):
        with pytest.raises(ConnectionRefusedError) as caught:
            await do(conn.open())
    assert f"cannot connect to 127.0.0.1:{port} (127.0.0.1: " in str(caught.value)
    assert caught.value.errno == errno.ECONNREFUSED
    assert not conn.is_connected()


async def test_a_socket_that_the_kernel_connected_to_itself_is_refused(rt: Runtime) -> None:
    port = refused_port()
    conn = rt.api.TcpConnection("127.0.0.1", port, source_address=("127.0.0.1", port))
    async with Descriptors(rt):
        with pytest.raises(ConnectionRefusedError, match=f"nobody listens on port {port}"):
            await do(conn.open())


async def test_a_source_address_that_is_taken_leaks_nothing(rt: Runtime) -> None:
    with Host(echo) as server:
        conn = tcp(rt, server, source_address=(server.host, server.port))
        async with Descriptors(rt):
            with pytest.raises(OSError, match="Address already in use"):
                await do(conn.open())


async def test_a_name_that_nobody_knows_is_the_resolvers_error(rt: Runtime) -> None:
    conn = rt.api.TcpConnection("name.invalid", 80)

    async def fail() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    look_up(rt, conn, then=fail)
    with pytest.raises(socket.gaierror, match=r"name\.invalid:80 \(looking up the name: Name or service") as caught:
        await do(conn.open())
    assert caught.value.errno == socket.EAI_NONAME


async def test_a_name_without_addresses_is_an_error(rt: Runtime) -> None:
    conn = rt.api.TcpConnection("name.test", 80)
    look_up(rt, conn)
    with pytest.raises(OSError, match=r"cannot connect to name\.test:80 \(it has no address\)"):
        await do(conn.open())


@needs(CANCEL)
async def test_a_look_up_that_hangs_is_bounded_by_the_connect_timeout(rt: Runtime) -> None:
    conn = rt.api.TcpConnection("name.test", 80, timeout=60, connect_timeout=0.05)
    look_up(rt, conn, then=lambda: rt.sleep(BOUND))
    with pytest.raises(TimeoutError, match=r"name\.test:80 within 0\.05 s \(still looking up the name\)"):
        await do(conn.open())


async def test_a_look_up_that_cannot_be_interrupted_leaves_no_time_to_connect(rt: Runtime) -> None:
    conn = rt.api.TcpConnection("name.test", 80, connect_timeout=0.01)

    async def stand_still() -> None:
        threading.Event().wait(0.02)

    look_up(rt, conn, ("127.0.0.1", 80), then=stand_still)
    with pytest.raises(TimeoutError, match=r"name\.test:80 within 0\.01 s \((no time was left|still looking)"):
        await do(conn.open())


@needs(CANCEL)
async def test_the_users_own_time_limit_is_not_mistaken_for_the_connect_timeout(rt: Runtime) -> None:
    with Hole() as hole:
        conn = rt.api.TcpConnection(hole.host, hole.port, connect_timeout=60)
        async with Descriptors(rt):
            with pytest.raises(rt.timed_out) as caught:
                async with rt.limit(0.01):
                    await do(conn.open())
        assert "cannot connect" not in str(caught.value)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_a_failed_open_keeps_no_reference_to_the_connection(
    rt: Runtime, tls: bool, certificates: Certificates
) -> None:
    with Host(echo, tls=certificates.server()) as server:
        conn = (
            tcp(rt, server, tls=Certificates().client()) if tls else rt.api.TcpConnection("127.0.0.1", refused_port())
        )
        seen = weakref.ref(conn)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(OSError, match="cannot connect"):
                await do(conn.open())
            del conn
            await rt.sleep(0)
            assert seen() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("option", ["connect_timeout", "timeout"])
async def test_a_connect_that_nobody_answers_times_out_and_leaks_nothing(rt: Runtime, option: str) -> None:
    with Hole() as hole:
        conn = rt.api.TcpConnection(hole.host, hole.port, **{option: 0.05})
        async with Descriptors(rt):
            with pytest.raises(TimeoutError) as caught:
                await do(conn.open())
        # On a busy machine the time may be over before the connect begins.
        wanted = rf"cannot connect to {hole.host}:{hole.port} within 0\.05 s \((127.0.0.1: no answer|no time was left)"
        assert re.match(wanted, str(caught.value)), caught.value


async def test_an_address_that_never_answers_leaves_time_for_the_next(rt: Runtime) -> None:
    with Hole() as hole, Host(echo) as server:
        conn = rt.api.TcpConnection("name.test", server.port, connect_timeout=BOUND)
        look_up(rt, conn, (hole.host, hole.port), ("::1", refused_port("::1"), 0, 0), (server.host, server.port))
        given = hurry(conn, hole)
        await do(conn.open())
        assert 0 < given[0] <= BOUND / 3
        assert 0 < given[1] <= BOUND / 2
        assert conn.socket.getpeername() == (server.host, server.port)
        await do(conn.close())


async def test_if_all_addresses_fail_the_error_names_each_and_leaks_nothing(rt: Runtime) -> None:
    with Hole() as hole:
        conn = rt.api.TcpConnection("name.test", 80, connect_timeout=BOUND)
        look_up(rt, conn, (hole.host, hole.port), ("::1", refused_port("::1"), 0, 0))
        hurry(conn, hole)
        async with Descriptors(rt):
            with pytest.raises(ConnectionRefusedError) as caught:
                await do(conn.open())
        wanted = (
            r"cannot connect to name\.test:80 \(127\.0\.0\.1: no answer in \S+ s; ::1: (Connection|ECONN) ?refused\)"
        )
        assert re.search(wanted, str(caught.value), re.IGNORECASE), caught.value
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert isinstance(caught.value.__cause__.__context__, TimeoutError)


async def test_close_calls_off_an_open_under_way_and_leaves_the_next_one_alone(rt: Runtime) -> None:
    gate = rt.event()
    with Host(echo) as server:
        conn = rt.api.TcpConnection("name.test", server.port)
        looking = rt.event()

        async def wait() -> None:
            looking.set()
            await gate.wait()

        look_up(rt, conn, (server.host, server.port), then=wait)
        first = rt.spawn(lambda: do(conn.open()))
        await looking.wait()
        with pytest.raises(RuntimeError, match="is being opened already"):
            await do(conn.open())
        await do(conn.close())
        look_up(rt, conn, (server.host, server.port))
        second = rt.spawn(lambda: do(conn.open()))
        gate.set()
        assert isinstance(await rt.outcome(first), ConnectionAbortedError)
        await rt.join(second)
        await do(conn.send(b"hello"))
        assert await do(conn.recv()) == b"hello"
        await do(conn.close())


# Sending and receiving


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "array"], ids=str)
async def test_all_that_has_a_buffer_can_be_sent(rt: Runtime, kind: Any) -> None:
    data = array.array("I", [50462976]) if kind == "array" else kind(b"\x00\x01\x02\x03")
    with Host(echo) as server:
        conn = await opened(rt, server)
        assert await do(conn.send(data)) == 4
        assert await do(conn.recv_exactly(4)) == b"\x00\x01\x02\x03"
        assert await do(conn.send(data[:0])) == 0
        with pytest.raises(TypeError, match=r"data must be bytes.*not str: encode it first"):
            await do(conn.send("text"))
        assert await do(conn.send(b"still usable")) == 12
        assert await do(conn.recv_exactly(12)) == b"still usable"
        await do(conn.close())


async def test_megabytes_are_sent_whole_to_a_slow_reader(rt: Runtime, rng: random.Random) -> None:
    data = rng.randbytes(4 * 1024 * 1024)
    received = bytearray()

    def read(sock: Any) -> None:
        while piece := sock.recv(64 * 1024):
            received.extend(piece)
        sock.sendall(b"done")

    with Host(read) as server:
        conn = await opened(rt, server, timeout=30)
        conn.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        assert await do(conn.send(data)) == len(data)
        conn.socket.shutdown(socket.SHUT_WR)
        assert await do(conn.recv()) == b"done"
        assert received == data
        await do(conn.close())


async def test_sending_to_a_peer_that_does_not_read_times_out(rt: Runtime) -> None:
    done = threading.Event()
    with Host(lambda sock: done.wait(BOUND)) as server:
        conn = await opened(rt, server, timeout=0.05, connect_timeout=BOUND)
        with pytest.raises(TimeoutError, match=r":\d+ did not take 33554432 bytes within 0\.05 s"):
            await do(conn.send(bytes(32 * 1024 * 1024)))
        await do(conn.close())
        done.set()


async def test_receiving_from_a_silent_peer_times_out_and_loses_nothing(rt: Runtime) -> None:
    with Host(echo) as server:
        conn = await opened(rt, server, timeout=0.05, connect_timeout=BOUND)
        with pytest.raises(TimeoutError, match=rf"127\.0\.0\.1:{server.port} sent nothing within 0\.05 s"):
            await do(conn.recv())
        await do(conn.send(b"12345\n"))
        with pytest.raises(TimeoutError):
            await do(conn.recv_exactly(8))
        await do(conn.send(b"6789\n"))
        await arrived(rt, conn, 11)
        assert await do(conn.recv_exactly(8)) == b"12345\n67"
        with pytest.raises(TimeoutError):
            await do(conn.recv_until(b"!"))
        assert await do(conn.recv()) == b"89\n"
        await do(conn.close())


async def test_the_end_of_the_stream_is_told_from_a_reset(rt: Runtime) -> None:
    def resets(sock: Any) -> None:
        sock.recv(1)
        reset(sock)

    with Host(say(b"some bytes")) as server:
        conn = await opened(rt, server)
        await do(conn.send(b"."))
        assert await do(conn.recv(4)) == b"some"
        assert await do(conn.recv()) == b" bytes"
        assert await do(conn.recv()) == b""
        with pytest.raises(EndOfStreamError, match="after 0 of 3 bytes"):
            await do(conn.recv_exactly(3))
        await do(conn.close())
    with Host(resets) as server:
        conn = await opened(rt, server)
        await do(conn.send(b"."))
        with pytest.raises(ConnectionResetError):
            await do(conn.recv())
        assert conn.is_connected()
        await do(conn.close())


async def test_messages_are_put_together_and_what_follows_is_left(rt: Runtime) -> None:
    async def next_piece() -> None:
        await do(conn.send(b"."))

    with Host(say(b"one\r", b"\ntwo\r\nthr", b"ee\r\n123", b"4567")) as server:
        conn = await opened(rt, server)
        await next_piece()
        await next_piece()
        assert await do(conn.recv_until(b"\r\n")) == b"one"
        assert await do(conn.recv_until(b"\r\n")) == b"two"
        await next_piece()
        assert await do(conn.recv_until(b"\r\n")) == b"three"
        await next_piece()
        assert await do(conn.recv_exactly(0)) == b""
        assert await do(conn.recv_exactly(6)) == b"123456"
        with pytest.raises(EndOfStreamError, match=rf"127\.0\.0\.1:{server.port} ended the stream after 1 of 10 bytes"):
            await do(conn.recv_exactly(10))
        with pytest.raises(EndOfStreamError, match=r"after 1 bytes without b'\\n'"):
            await do(conn.recv_until(b"\n"))
        assert await do(conn.recv()) == b"7"
        await do(conn.close())


async def test_recv_until_refuses_more_than_the_limit(rt: Runtime) -> None:
    with Host(say(b"12345\r\n123456\r\n")) as server:
        conn = await opened(rt, server)
        await do(conn.send(b"."))
        assert await do(conn.recv_until(b"\r\n", limit=5)) == b"12345"
        with pytest.raises(LimitExceededError, match=r"sent more than 5 bytes without b'\\r\\n'"):
            await do(conn.recv_until(b"\r\n", limit=5))
        assert not conn.check()
        assert await do(conn.recv_exactly(6)) == b"123456"
        await do(conn.close())


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda conn: conn.recv(0), ValueError, "size must be at least 1"),
        (lambda conn: conn.recv_exactly(None), TypeError, "n must be an int"),
        (lambda conn: conn.recv_until("."), TypeError, "sep must be bytes"),
        (lambda conn: conn.recv_until(b""), ValueError, "sep must not be empty"),
        (lambda conn: conn.recv_until(b".", 0), ValueError, "limit must be at least 1"),
    ],
    ids=["size", "n", "sep", "empty sep", "limit"],
)
async def test_a_wrong_argument_of_a_receiving_call_is_refused(
    rt: Runtime, use: Use, error: type[Exception], text: str
) -> None:
    conn = rt.api.TcpConnection("127.0.0.1", 1)
    with pytest.raises(error, match=text):
        await do(use(conn))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(
    "use",
    [
        lambda conn: conn.recv(),
        lambda conn: conn.recv_exactly(5),
        lambda conn: conn.recv_until(b"."),
        lambda conn: conn.send(bytes(1 << 26)),
    ],
    ids=["recv", "recv_exactly", "recv_until", "send"],
)
async def test_close_wakes_who_waits_in_another_method(
    rt: Runtime, use: Use, tls: bool, certificates: Certificates
) -> None:
    done = threading.Event()
    begun = threading.Event()

    def handler(sock: Any) -> None:
        sock.recv(1)
        begun.set()
        done.wait(BOUND)

    with Host(handler, tls=certificates.server() if tls else None) as server:
        for timeout in (None, BOUND):
            begun.clear()
            conn = await opened(rt, server, timeout=timeout, tls=certificates.client() if tls else None)
            await do(conn.send(b"."))
            waiting = rt.spawn(lambda conn=conn: do(use(conn)))
            await rt.until(begun.is_set)
            await rt.quiet()
            await do(conn.close())
            with pytest.raises(ConnectionError, match="closed while it was being used|is not open"):
                await rt.join(waiting)
            assert not conn.is_connected()
        done.set()


@needs(CANCEL)
async def test_who_is_cancelled_while_receiving_has_lost_nothing(rt: Runtime) -> None:
    with Host(echo) as server:
        conn = await opened(rt, server)
        uses: list[Use] = [lambda conn: conn.recv_exactly(8), lambda conn: conn.recv_until(b"!")]
        for use in uses:
            await do(conn.send(b"12345\n"))
            waiting = rt.spawn(lambda use=use: do(use(conn)))
            await rt.until(lambda: len(conn._read_ahead) == 6)
            rt.cancel(waiting)
            assert isinstance(await rt.outcome(waiting), rt.killed)
            assert await do(conn.recv()) == b"12345\n"
        await do(conn.close())


# check()


async def test_check_is_true_of_a_healthy_connection_and_lets_nobody_else_run(rt: Runtime) -> None:
    async def ask() -> None:
        for _ in range(10):
            assert conn.check() is True
            assert conn.keepalive() is True

    with Host(echo) as server:
        for timeout in (None, BOUND):
            conn = await opened(rt, server, timeout=timeout)
            before = conn.socket.gettimeout()
            await rt.at_once(ask())
            assert conn.socket.gettimeout() == before
            await do(conn.send(b"x"))
            assert await do(conn.recv()) == b"x"
            assert conn.check() is True
            await do(conn.close())
            assert conn.check() is False


def closes(sock: Any) -> None:
    sock.close()


@pytest.mark.parametrize("act", [closes, reset, greets])
async def test_check_finds_what_the_peer_did_while_the_connection_idled(rt: Runtime, act: Handler) -> None:
    def handler(sock: Any) -> None:
        sock.recv(1)
        act(sock)

    with Host(handler) as server:
        conn = await opened(rt, server)
        assert conn.check() is True
        await do(conn.send(b"."))
        await readable(rt, conn)
        assert conn.check() is False
        assert conn.is_connected()
        if act is greets:
            assert await do(conn.recv()) == b"stray"
            assert conn.check() is True
        await do(conn.close())


async def test_check_finds_bytes_that_were_read_ahead(rt: Runtime) -> None:
    with Host(echo) as server:
        conn = await opened(rt, server)
        await do(conn.send(b"one\ntwo\n"))
        assert await do(conn.recv_until(b"two")) == b"one\n"
        assert conn.check() is False
        assert await do(conn.recv_exactly(1)) == b"\n"
        assert conn.check() is True
        await do(conn.close())


async def test_check_is_false_when_the_socket_was_closed_behind_its_back(rt: Runtime) -> None:
    with Host(echo) as server:
        conn = await opened(rt, server)
        conn.socket.close()
        assert conn.check() is False
        await do(conn.close())


# Unix sockets


async def test_a_unix_connection_does_all_that_a_tcp_connection_does(rt: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Host(echo, path=path) as server:
        conn = rt.api.UnixConnection(path, 600, BOUND)
        for _ in range(2):
            await do(conn.open())
            assert repr(conn) == f"<UnixConnection {path} (open)>"
            assert await do(conn.send(b"a\nb\n")) == 4
            assert await do(conn.recv_until(b"\n")) == b"a"
            assert await do(conn.recv_exactly(2)) == b"b\n"
            assert conn.check() is True
            await do(conn.close())
        assert server.accepted == 2


async def test_a_unix_socket_that_is_not_there_is_named_and_leaks_nothing(rt: Runtime, tmp_path: Path) -> None:
    async with Descriptors(rt):
        with pytest.raises(FileNotFoundError, match=rf"cannot connect to {tmp_path}/missing \("):
            await do(rt.api.UnixConnection(tmp_path / "missing").open())


@pytest.fixture
def full_queue() -> Iterator[socket.socket]:
    """A listening Unix socket whose queue of connections to be accepted is full."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(0)
        listener.settimeout(5)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(f"{folder}/socket")
            yield listener


async def test_a_unix_server_with_a_full_queue_is_waited_for(rt: Runtime, full_queue: socket.socket) -> None:
    conn = rt.api.UnixConnection(full_queue.getsockname(), connect_timeout=0.1)
    async with Descriptors(rt):
        with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
            await do(conn.open())
    conn = rt.api.UnixConnection(full_queue.getsockname(), connect_timeout=BOUND)
    opening = rt.spawn(lambda: do(conn.open()))
    await rt.until(lambda: conn.fileno() is not None)
    full_queue.accept()[0].close()
    await rt.join(opening)
    await do(conn.close())


# TLS


class _Quiet(ssl.SSLSocket):
    """One that Python has not closed where the client reset the connection (see `wrap_tls`) closes itself."""

    def __del__(self) -> None:
        self.close()


class Certificates:
    """An authority of the test's own."""

    def __init__(self) -> None:
        self._authority = trustme.CA()

    @functools.cache  # noqa: B019
    def server(self, *names: str) -> Context:
        """A context for a server that has these names or addresses."""
        context = Context(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = _Quiet
        self._authority.issue_cert(*(names or ("localhost", "127.0.0.1"))).configure_cert(context)
        return context

    def client(self, version: ssl.TLSVersion | None = None) -> Context:
        """A context for a client that trusts this authority and nobody else."""
        context = Context(ssl.PROTOCOL_TLS_CLIENT)
        self._authority.configure_trust(context)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


@VERSIONS
async def test_all_that_sends_and_receives_works_over_tls(
    rt: Runtime, certificates: Certificates, version: ssl.TLSVersion
) -> None:
    with Host(echo, tls=certificates.server()) as server:
        conn = tcp(rt, server, tls=certificates.client(version))
        for _ in range(2):
            await do(conn.open())
            assert conn.socket.version().startswith("TLS")
            assert repr(conn) == f"<TcpConnection 127.0.0.1:{server.port} (open, TLS)>"
            assert await do(conn.send(b"")) == 0
            assert await do(conn.send(b"one\ntwo\nthree")) == 13
            assert await do(conn.recv_until(b"\n")) == b"one"
            assert await do(conn.recv_exactly(4)) == b"two\n"
            assert await do(conn.recv()) == b"three"
            await do(conn.close())


@only("gevent", "asyncio", "uvloop", "eventlet")  # OpenSSL wants one thread at a time
@VERSIONS
async def test_megabytes_go_both_ways_at_once_over_tls(
    rt: Runtime, certificates: Certificates, version: ssl.TLSVersion, rng: random.Random
) -> None:
    data = rng.randbytes(1024 * 1024)
    with Host(echo, tls=certificates.server()) as server:
        conn = await opened(rt, server, tls=certificates.client(version))
        sending = rt.spawn(lambda: do(conn.send(data)))
        assert await do(conn.recv_exactly(len(data))) == data
        assert await rt.join(sending) == [len(data)]
        await do(conn.close())


async def test_a_certificate_is_verified_and_a_bad_one_leaks_nothing(
    rt: Runtime, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Host(echo, tls=certificates.server("example.org")) as server:
        conn = await opened(rt, server, tls=certificates.client(), server_hostname="example.org")
        await do(conn.close())
        for context, text in (
            (certificates.client(), "IP address mismatch"),
            (Certificates().client(), "certificate verify failed"),
            (True, "certificate verify failed"),
        ):
            conn = tcp(rt, server, tls=context)
            async with Descriptors(rt):
                with pytest.raises(ssl.SSLCertVerificationError, match=text) as caught:
                    await do(conn.open())
            assert f"cannot connect to 127.0.0.1:{server.port} (127.0.0.1: " in str(caught.value)
        # This is how OpenSSL is told of other ones.
        authority = tmp_path / "authority.pem"
        certificates._authority.cert_pem.write_to_path(str(authority))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        conn = await opened(rt, server, tls=True, server_hostname="example.org")
        await do(conn.close())


def trickles(sock: Any) -> None:
    # One byte at a time of a long record: no single wait is long.
    sock.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
    while True:
        sock.sendall(b"x")
        threading.Event().wait(0.01)


@pytest.mark.parametrize("act", [swallow, trickles])
async def test_a_handshake_that_takes_too_long_times_out_and_leaks_nothing(
    rt: Runtime, certificates: Certificates, act: Handler
) -> None:
    with Host(act) as server:
        conn = tcp(rt, server, tls=certificates.client(), connect_timeout=0.15)
        connected = connects(conn)
        async with Descriptors(rt):
            with pytest.raises(TimeoutError, match=r"within 0\.15 s \(") as caught:
                await do(conn.open())
        # On a busy machine the time may be over before that.
        assert ("(127.0.0.1: connected, and the TLS handshake was not done" in str(caught.value)) is bool(connected)
        assert not conn.is_connected()


@pytest.mark.parametrize("act", [closes, echo])
async def test_a_server_that_does_not_speak_tls_is_an_error_and_leaks_nothing(
    rt: Runtime, certificates: Certificates, act: Handler
) -> None:
    with Host(act) as server:
        conn = tcp(rt, server, tls=certificates.client())
        async with Descriptors(rt):
            with pytest.raises(OSError, match="cannot connect to"):
                await do(conn.open())


async def test_a_silent_peer_times_out_under_tls(rt: Runtime, certificates: Certificates) -> None:
    with Host(swallow, tls=certificates.server()) as server:
        conn = await opened(rt, server, tls=certificates.client(), timeout=0.05, connect_timeout=BOUND)
        with pytest.raises(TimeoutError, match=r"sent nothing within 0\.05 s"):
            await do(conn.recv())
        await do(conn.close())


@VERSIONS
async def test_check_is_true_of_a_healthy_connection_tickets_or_not(
    rt: Runtime, certificates: Certificates, version: ssl.TLSVersion
) -> None:
    async def ask() -> None:
        for _ in range(5):
            assert conn.check() is True

    with Host(echo, tls=certificates.server()) as server:
        for timeout in (None, BOUND):
            conn = await opened(rt, server, tls=certificates.client(version), timeout=timeout)
            before = conn.socket.gettimeout()
            if version == ssl.TLSVersion.TLSv1_3:
                await readable(rt, conn)  # the tickets
                assert conn._peek(conn.socket)
            await rt.at_once(ask())
            assert conn.socket.gettimeout() == before
            await do(conn.send(b"hello"))
            assert await do(conn.recv()) == b"hello"
            assert conn.check() is True
            await do(conn.close())
            assert conn.check() is False


def says_goodbye(sock: Any) -> None:
    sock.settimeout(0)
    with pytest.raises(ssl.SSLWantReadError):
        sock.unwrap()
    sock.settimeout(BOUND)
    while socket.socket.recv(sock, 65536):
        pass


@VERSIONS
@pytest.mark.parametrize("act", [says_goodbye, closes, reset, greets])
async def test_check_finds_what_the_peer_did_under_tls(
    rt: Runtime, certificates: Certificates, act: Handler, version: ssl.TLSVersion
) -> None:
    def handler(sock: Any) -> None:
        sock.sendall(sock.recv(1))
        sock.recv(1)
        act(sock)

    with Host(handler, tls=certificates.server()) as server:
        conn = await opened(rt, server, tls=certificates.client(version))
        assert conn.check() is True
        await do(conn.send(b"x"))
        assert await do(conn.recv_exactly(1)) == b"x"
        assert conn.check() is True
        await do(conn.send(b"."))
        await rt.until(lambda: not conn.check(), lambda: "it has not found it")
        assert conn.check() is False
        if act is greets:
            assert await do(conn.recv()) == b"stray"
            assert conn.check() is True
        elif act is not reset:
            assert await do(conn.recv()) == b""
        await do(conn.close())


async def test_check_finds_data_that_is_decrypted_already(rt: Runtime, certificates: Certificates) -> None:
    with Host(echo, tls=certificates.server()) as server:
        conn = await opened(rt, server, tls=certificates.client())
        await do(conn.send(b"0123456789"))
        assert await do(conn.recv(3)) == b"012"
        assert conn.check() is False
        assert await do(conn.recv()) == b"3456789"
        assert conn.check() is True
        await do(conn.close())


@only("threading", "asyncio")  # the standard library's sockets
async def test_a_reset_before_the_handshake_leaks_nothing_while_the_error_is_kept(
    rt: Runtime, certificates: Certificates
) -> None:
    with Host(reset) as server:
        async with Descriptors(rt):
            with socket.create_connection((server.host, server.port)) as sock:
                poll = select.poll()
                poll.register(sock, select.POLLIN)
                assert poll.poll(BOUND * 1000)
                with pytest.raises(OSError) as caught:
                    wrap_tls(sock, certificates.client(), "localhost").do_handshake()
        assert caught.value.__traceback__ is not None


# start_tls


def starttls(context: Context, after: bytes = b"") -> Handler:
    """Return a handler that echoes lines, and on the line STARTTLS says ``ready`` and goes on with TLS."""

    def handler(sock: Any) -> None:
        rest = b""
        try:
            while data := sock.recv(65536):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line == b"STARTTLS":
                        sock.sendall(b"ready\n" + after)
                        sock = context.wrap_socket(sock.dup(), server_side=True, do_handshake_on_connect=False)
                        sock.do_handshake()
                    else:
                        sock.sendall(line + b"\n")
        finally:
            sock.close()

    return handler


async def test_start_tls_goes_on_with_tls_on_the_same_connection(rt: Runtime, certificates: Certificates) -> None:
    with Host(starttls(certificates.server())) as server:
        conn = tcp(rt, server)
        for _ in range(2):
            await do(conn.open())
            address, timeout = conn.socket.getsockname(), conn.socket.gettimeout()
            await do(conn.send(b"plain\nSTARTTLS\n"))
            assert await do(conn.recv_until(b"\n")) == b"plain"
            assert await do(conn.recv_until(b"\n")) == b"ready"
            for wrong in (None, "yes"):
                with pytest.raises(TypeError, match="context must be True"):
                    await do(conn.start_tls(wrong))
            await do(conn.start_tls(certificates.client()))
            assert conn.socket.version().startswith("TLS")
            assert (conn.socket.getsockname(), conn.socket.gettimeout()) == (address, timeout)
            assert conn.check() is True
            await do(conn.send(b"secret\n"))
            assert await do(conn.recv_until(b"\n")) == b"secret"
            with pytest.raises(RuntimeError, match="has started TLS already"):
                await do(conn.start_tls(certificates.client()))
            await do(conn.close())


@pytest.mark.parametrize("together", [True, False])
async def test_start_tls_refuses_what_was_slipped_in_before_it(
    rt: Runtime, certificates: Certificates, together: bool
) -> None:
    with Host(starttls(certificates.server(), after=b"slipped in\n")) as server:
        conn = await opened(rt, server)
        await do(conn.send(b"STARTTLS\n"))
        if together:
            assert await do(conn.recv_until(b"\n")) == b"ready"  # and has read on
        else:
            assert await do(conn.recv_exactly(6)) == b"ready\n"
            await readable(rt, conn)
        with pytest.raises(ConnectionError, match="have arrived before the TLS handshake: not trusted"):
            await do(conn.start_tls(certificates.client()))
        assert not conn.is_connected()


async def test_a_start_tls_that_fails_closes_the_connection(rt: Runtime, certificates: Certificates) -> None:
    with Host(starttls(certificates.server())) as server:
        async with Descriptors(rt):
            conn = await opened(rt, server)
            await do(conn.send(b"STARTTLS\n"))
            assert await do(conn.recv_until(b"\n")) == b"ready"
            with pytest.raises(ssl.SSLCertVerificationError, match=r"no TLS with 127\.0\.0\.1:\d+: .*verify failed"):
                await do(conn.start_tls(Certificates().client()))
            assert not conn.is_connected()


async def test_a_start_tls_that_nobody_answers_times_out_and_closes_the_connection(
    rt: Runtime, certificates: Certificates
) -> None:
    with Host(swallow) as server:
        async with Descriptors(rt):
            conn = await opened(rt, server)
            conn._connect_timeout = 0.1
            with pytest.raises(TimeoutError, match=rf"no TLS with 127\.0\.0\.1:{server.port} within 0\.1 s"):
                await do(conn.start_tls(certificates.client()))
            assert not conn.is_connected()


async def test_a_close_while_start_tls_is_under_way_ends_it(rt: Runtime, certificates: Certificates) -> None:
    begun = threading.Event()

    def notice(sock: Any) -> None:
        sock.recv(1)
        begun.set()
        swallow(sock)

    with Host(notice) as server:
        async with Descriptors(rt):
            conn = await opened(rt, server, connect_timeout=BOUND)
            starting = rt.spawn(lambda: do(conn.start_tls(certificates.client())))
            await rt.until(begun.is_set)
            await do(conn.close())
            with pytest.raises(OSError, match="no TLS with|closed"):
                await rt.join(starting)
            assert not conn.is_connected()


# Kills and cancellations


@needs(CANCEL)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
@pytest.mark.parametrize("how", ["plain", "TLS", "start_tls", "Unix"])
async def test_g4_who_is_killed_at_any_point_of_opening_leaves_nothing_behind(
    rt: Runtime, how: str, when: str, certificates: Certificates, tmp_path: Path
) -> None:
    async def open_it(conn: Any) -> None:
        await do(conn.open())
        if how == "start_tls":
            await do(conn.start_tls(certificates.client()))

    async def attempt(point: int, error: Any) -> tuple[int, bool]:
        conn: Any = (
            rt.api.UnixConnection(tmp_path / "socket", connect_timeout=BOUND)
            if how == "Unix"
            else tcp(rt, server, tls=certificates.client() if how == "TLS" else None, connect_timeout=BOUND)
        )
        knife = rt.knife(point, when, error)
        async with Descriptors(rt):
            victim = rt.spawn(lambda: knife.upon(open_it(conn)))
            outcome = await rt.outcome(victim)
            if knife.struck and outcome is not None:
                assert isinstance(outcome, (type(error()), rt.killed))
                assert how == "start_tls" or not conn.is_connected()
            else:
                assert outcome is None
                assert conn.is_connected()
            await do(conn.close())
        assert conn.fileno() is None
        return knife.points, knife.struck

    tls = certificates.server() if how in ("TLS", "start_tls") else None
    with Host(echo, tls=tls, path=tmp_path / "socket" if how == "Unix" else None) as server:
        for error in rt.thrown.values():
            point = 1
            while (await attempt(point, error))[1]:
                point += 1
                assert point < 50
        assert how == "Unix" or point > 1, "it was never killed"


@needs(CANCEL)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_who_is_killed_at_any_point_of_receiving_has_lost_nothing(
    rt: Runtime, tls: bool, when: str, certificates: Certificates
) -> None:
    pieces = (b"one", b"\ntwo\nth", b"ree\n")

    async def receive() -> None:
        for _ in range(3):
            received.append(await do(conn.recv_until(b"\n")))
        received.append(await do(conn.recv_exactly(0)))

    async def feed() -> None:
        for _ in pieces:
            await do(conn.send(b"."))
            await rt.sleep(0.001)

    with Host(say(*pieces), tls=certificates.server() if tls else None) as server:
        for error in rt.thrown.values():
            for point in range(1, 5):
                conn = await opened(rt, server, tls=certificates.client() if tls else None)
                received: list[bytes] = []
                knife = rt.knife(point, when, error)
                victim = rt.spawn(lambda knife=knife: knife.upon(receive()))
                await feed()
                await rt.outcome(victim)
                received = [line for line in received if line]
                while len(received) < 3:
                    received.append(await do(conn.recv_until(b"\n")))
                assert received == [b"one", b"two", b"three"]
                await do(conn.close())

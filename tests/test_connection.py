"""Connection, TcpConnection without TLS, UnixConnection; and the fault proxy that tests use."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import logging
import os
import random
import re
import socket as std_socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import psutil
import pytest
from gevent import socket
from gevent.event import Event

from gsocketpool.connection import (
    Connection,
    EndOfStreamError,
    LimitExceededError,
    StreamConnection,
    TcpConnection,
    UnixConnection,
)
from tests.conformance.test_connections import hurry
from tests.conftest import Logged
from tests.proxy import Proxy
from tests.servers import BlackHole, EchoServer, LineEchoServer, Server, refused_port, reset, say, swallow


def descriptors() -> int:
    """How many descriptors this process has open."""
    return psutil.Process().num_fds()


def look_up(conn: TcpConnection, *addresses: tuple[Any, ...], then: Callable[[], object] | None = None) -> None:
    """Make the connection's look-up call ``then``, and find these addresses."""

    def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
        if then is not None:
            then()
        return [
            (socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
            for address in addresses
        ]

    conn._getaddrinfo = getaddrinfo  # type: ignore[method-assign]


def open_and_receive(conn: TcpConnection) -> bytes:
    """For what may happen in either: a reset at once, for instance."""
    conn.open()
    return conn.recv()


# Connection


class Recorder(Connection):
    """A Connection that notes what is called, and raises what it is told."""

    def __init__(self, connected: bool, error: BaseException | None = None) -> None:
        self.connected = connected
        self.error = error
        self.calls: list[str] = []

    def open(self) -> None:
        self.calls.append("open")
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.calls.append("close")

    def is_connected(self) -> bool:
        return self.connected


@pytest.mark.parametrize("method", ["open", "close", "is_connected"])
def test_a_connection_that_does_not_define_a_method_says_which(method: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"Connection does not define {method}\(\)"):
        getattr(Connection(), method)()


def test_the_defaults_of_a_connection() -> None:
    conn = Recorder(connected=True)
    assert conn.get() is conn
    assert conn.is_expired() is False
    assert conn.check() is True
    assert conn.keepalive() is True
    conn.reset()
    conn.connected = False
    assert conn.check() is False
    assert conn.keepalive() is False


def test_connection_has_no_attributes_so_that_anything_can_inherit_it() -> None:
    class Slotted(Connection):
        __slots__ = ("only",)

    class Proxying(Connection):
        def __getattr__(self, name: str) -> str:
            return f"remote {name}"

    assert not hasattr(Connection(), "__dict__")
    assert not hasattr(Slotted(), "__dict__")
    assert Proxying().anything == "remote anything"
    assert Proxying().is_expired() is False
    # Beside a class with a layout of its own, as extension types have.
    assert isinstance(type("Both", (array.array, Connection), {})("b"), Connection)


def test_reconnect_closes_what_is_connected_and_opens() -> None:
    conn = Recorder(connected=True)
    conn.reconnect()
    assert conn.calls == ["close", "open"]


def test_reconnect_only_opens_what_is_not_connected() -> None:
    conn = Recorder(connected=False)
    conn.reconnect()
    assert conn.calls == ["open"]


def test_reconnect_logs_an_exception_once_and_does_not_raise_it(logged: Logged) -> None:
    Recorder(connected=False, error=OSError("no route")).reconnect()
    (record,) = logged.take(1)
    assert record.name == "gsocketpool"
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "cannot reconnect a Recorder"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "no route"


@pytest.mark.parametrize("kill", [gevent.GreenletExit(), gevent.Timeout(), KeyboardInterrupt()])
def test_reconnect_does_not_swallow_a_kill(kill: BaseException) -> None:
    with pytest.raises(type(kill)):
        Recorder(connected=False, error=kill).reconnect()


def test_reconnect_of_a_tcp_connection_works_after_the_server_hung_up() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.reconnect()
        conn.send(b"1")
        assert conn.recv() == b"1"
        server.hang_up()
        conn.reconnect()
        conn.send(b"2")
        assert conn.recv() == b"2"
        conn.close()


# Parameters

GOOD: dict[str, Any] = {"host": "127.0.0.1", "port": 80}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("host", None, TypeError),
        ("host", b"localhost", TypeError),
        ("host", "", ValueError),
        ("host", "a..b", ValueError),
        ("host", "a\0b", ValueError),
        ("host", "x" * 64, ValueError),
        ("port", "80", TypeError),
        ("port", True, TypeError),
        ("port", 80.0, TypeError),
        ("port", None, TypeError),
        ("port", -1, ValueError),
        ("port", 65536, ValueError),
        ("lifetime", "600", TypeError),
        ("lifetime", True, TypeError),
        ("lifetime", -1, ValueError),
        ("lifetime", float("nan"), ValueError),
        ("timeout", "1", TypeError),
        ("timeout", False, TypeError),
        ("timeout", -1, ValueError),
        ("timeout", float("inf"), ValueError),
        ("connect_timeout", [], TypeError),
        ("connect_timeout", 0, ValueError),
        ("connect_timeout", -0.5, ValueError),
        ("tls", "yes", TypeError),
        ("tls", 1, TypeError),
        ("server_hostname", b"localhost", TypeError),
        ("server_hostname", "", ValueError),
        ("nodelay", 1, TypeError),
        ("nodelay", None, TypeError),
        ("tcp_keepalive", 1.5, TypeError),
        ("tcp_keepalive", "60", TypeError),
        ("tcp_keepalive", (60, 10), TypeError),
        ("tcp_keepalive", (60, 10, None), TypeError),
        ("tcp_keepalive", (60, True, 3), TypeError),
        ("tcp_keepalive", 0, ValueError),
        ("tcp_keepalive", 40000, ValueError),
        ("tcp_keepalive", (60, 10, 128), ValueError),
        ("source_address", "127.0.0.1", TypeError),
        ("source_address", ("127.0.0.1",), TypeError),
        ("source_address", (None, 0), TypeError),
        ("source_address", ("127.0.0.1", "0"), TypeError),
        ("source_address", ("127.0.0.1", 70000), ValueError),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"\b{name}\b"):
        TcpConnection(**{**GOOD, name: value})


@pytest.mark.parametrize(("path", "kind"), [(None, TypeError), (3, TypeError), ("", ValueError), (b"", ValueError)])
def test_a_wrong_path_is_refused_by_its_name(path: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="path must"):
        UnixConnection(path)


@pytest.mark.parametrize("name", ["lifetime", "timeout", "connect_timeout"])
def test_a_wrong_number_for_a_unix_connection_is_refused_by_its_name(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"{name} must be"):
        UnixConnection("/tmp/socket", **options)


def test_a_stream_connection_alone_resolves_nothing() -> None:
    with pytest.raises(NotImplementedError):
        StreamConnection(None, None, None).open()


# Open and closed


def test_a_program_written_for_0_1_6_goes_on_working() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, 600, 5)
        assert not conn.is_connected()
        conn.open()
        assert conn.is_connected()
        assert conn.get() is conn.socket
        assert conn.socket.gettimeout() == 5
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        assert not conn.is_expired()
        conn.close()
        assert not conn.is_connected()
        TcpConnection(host=server.host, port=server.port, lifetime=1, timeout=0).close()


def test_the_socket_is_gevents() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert isinstance(conn.socket, socket.socket)
        conn.close()


@pytest.mark.parametrize(("listen", "host"), [("127.0.0.1", "localhost"), ("::1", "::1"), ("127.0.0.1", "127.0.0.1")])
def test_names_and_addresses_of_both_families_can_be_connected_to(listen: str, host: str) -> None:
    with EchoServer(host=listen) as server:
        conn = TcpConnection(host, server.port, timeout=5)
        conn.open()
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        conn.close()


def test_a_closed_connection_can_be_opened_again() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        for number in range(3):
            conn.open()
            conn.send(b"%d" % number)
            assert conn.recv() == b"%d" % number
            conn.close()
        server.wait_open(0)
        assert server.accepted == 3


def test_what_was_read_ahead_does_not_survive_a_close() -> None:
    with Server(say(b"one\ntwo\n")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_until(b"\n") == b"one"
        conn.close()
        conn.open()
        assert conn.recv_until(b"\n") == b"one"
        conn.close()


def test_an_open_connection_cannot_be_opened() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        sock = conn.socket
        with pytest.raises(RuntimeError, match=r"is open already: close\(\) it"):
            conn.open()
        assert conn.socket is sock
        conn.close()


def test_a_connection_that_is_being_opened_cannot_be_opened() -> None:
    with BlackHole() as hole:
        conn = TcpConnection(hole.host, hole.port)
        opening = gevent.spawn(conn.open)
        gevent.sleep(0)
        with pytest.raises(RuntimeError, match="is being opened already"):
            conn.open()
        opening.kill()
        assert not conn.is_connected()


def test_close_calls_off_an_open_under_way() -> None:
    gate = Event()
    with EchoServer() as server:
        conn = TcpConnection("name.test", server.port)
        look_up(conn, (server.host, server.port), then=lambda: gate.wait(5))
        before = descriptors()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                conn.open()
            except ConnectionAbortedError as error:
                errors.append(error)

        opening = gevent.spawn(run)
        gevent.sleep(0)
        conn.close()
        gate.set()
        opening.join(5)
        assert [type(error) for error in errors] == [ConnectionAbortedError]
        assert not conn.is_connected()
        server.wait_open(0)
        assert descriptors() == before
        conn.open()
        conn.close()


def test_an_open_that_was_called_off_leaves_the_next_one_alone() -> None:
    gate = Event()
    with EchoServer() as server:
        conn = TcpConnection("name.test", server.port)
        look_up(conn, (server.host, server.port), then=lambda: gate.wait(5))
        first = gevent.spawn(pytest.raises, ConnectionAbortedError, conn.open)
        gevent.sleep(0)
        conn.close()
        look_up(conn, (server.host, server.port))
        second = gevent.spawn(conn.open)
        gevent.sleep(0)
        gate.set()
        first.get(timeout=5)
        second.get(timeout=5)
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        conn.close()


def test_an_open_that_was_called_off_and_fails_leaves_the_next_one_alone() -> None:
    conn = TcpConnection("name.test", 80)
    look_up(conn, then=Event().wait)
    first = gevent.spawn(conn.open)
    gevent.sleep(0)
    conn.close()
    second = gevent.spawn(conn.open)
    gevent.sleep(0)
    first.kill()
    with pytest.raises(RuntimeError, match="is being opened already"):
        conn.open()
    second.kill()


def test_close_can_be_repeated_and_works_on_what_was_never_open() -> None:
    conn = TcpConnection("127.0.0.1", 1)
    conn.close()
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        conn.close()
        conn.close()
        assert not conn.is_connected()
        server.wait_open(0)


def test_close_works_after_the_peer_reset_the_connection() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        before = descriptors()
        server.wait_accepted(1)
        server.reset()
        with pytest.raises(ConnectionResetError):
            conn.recv()
        assert conn.is_connected()
        conn.close()
        server.wait_open(0)
        assert not conn.is_connected()
        assert descriptors() == before - 2


def test_close_wakes_who_waits_for_bytes() -> None:
    with Server(swallow) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        receiving = gevent.spawn(pytest.raises, OSError, conn.recv)
        gevent.sleep(0)
        conn.close()
        receiving.get(timeout=5)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.send(b"x"),
        lambda c: c.recv(),
        lambda c: c.recv_exactly(1),
        lambda c: c.recv_exactly(0),
        lambda c: c.recv_until(b"\n"),
        lambda c: c.socket,
        lambda c: c.get(),
        lambda c: c.start_tls(),
    ],
)
def test_a_connection_that_is_not_open_cannot_be_used(use: Callable[[TcpConnection], object]) -> None:
    conn = TcpConnection("127.0.0.1", 1)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 \(closed\)> is not open: call open\(\) first"):
        use(conn)


def test_a_connection_expires_when_it_was_open_for_its_lifetime(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("gsocketpool.connection.monotonic", lambda: now)
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, lifetime=10)
        forever = TcpConnection(server.host, server.port, lifetime=None)
        now = 2000.0
        assert not conn.is_expired()
        conn.open()
        forever.open()
        now = 2010.0
        assert not conn.is_expired()
        now = 2010.1
        assert conn.is_expired()
        now = 1e12
        assert not forever.is_expired()
        conn.close()
        assert not conn.is_expired()
        conn.open()
        assert not conn.is_expired()
        conn.close()
        forever.close()


def test_the_repr_says_where_to_and_whether_it_is_open() -> None:
    with EchoServer(host="::1") as server:
        conn = TcpConnection("::1", server.port)
        assert repr(conn) == f"<TcpConnection [::1]:{server.port} (closed)>"
        conn.open()
        assert repr(conn) == f"<TcpConnection [::1]:{server.port} (open)>"
        conn.close()


# Options of the socket


def test_options_are_set_by_default_and_can_be_chosen() -> None:
    def options(**parameters: Any) -> list[int]:
        conn = TcpConnection(server.host, server.port, **parameters)
        conn.open()
        names = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            (socket.IPPROTO_TCP, getattr(std_socket, "TCP_KEEPIDLE", getattr(std_socket, "TCP_KEEPALIVE", 0))),
            (socket.IPPROTO_TCP, std_socket.TCP_KEEPINTVL),
            (socket.IPPROTO_TCP, std_socket.TCP_KEEPCNT),
        ]
        values = [conn.socket.getsockopt(*name) for name in names]
        conn.close()
        return [int(bool(values[0])), int(bool(values[1])), *values[2:]]

    with EchoServer() as server:
        system = options(tcp_keepalive=None)
        assert system[:2] == [1, 0]
        assert options(nodelay=False, tcp_keepalive=False) == [0, 0, *system[2:]]
        assert options(tcp_keepalive=True) == [1, 1, *system[2:]]
        assert options() == [1, 1, 60, 60, system[4]]
        assert options(tcp_keepalive=7) == [1, 1, 7, 7, system[4]]
        assert options(tcp_keepalive=(30, 5, 3)) == [1, 1, 30, 5, 3]


def test_the_source_address_can_be_chosen() -> None:
    port = refused_port()
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, source_address=("127.0.0.1", port))
        conn.open()
        assert conn.socket.getsockname() == ("127.0.0.1", port)
        conn.close()
        conn = TcpConnection(server.host, server.port, source_address=("", 0))
        conn.open()
        conn.close()


def test_a_socket_that_the_kernel_connected_to_itself_is_refused() -> None:
    port = refused_port()
    conn = TcpConnection("127.0.0.1", port, source_address=("127.0.0.1", port))
    before = descriptors()
    with pytest.raises(ConnectionRefusedError, match=f"nobody listens on port {port}"):
        conn.open()
    assert descriptors() == before


# What fails to open


def test_a_refused_connect_names_the_server_and_leaks_nothing() -> None:
    port = refused_port()
    conn = TcpConnection("127.0.0.1", port)
    before = descriptors()
    with pytest.raises(ConnectionRefusedError) as caught:
        conn.open()
    assert f"cannot connect to 127.0.0.1:{port} (127.0.0.1: Connection refused)" in str(caught.value)
    assert caught.value.errno == errno.ECONNREFUSED
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert descriptors() == before
    assert not conn.is_connected()


def test_a_name_that_nobody_knows_is_the_resolvers_error_and_leaks_nothing() -> None:
    conn = TcpConnection("name.invalid", 80)

    def fail() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    look_up(conn, then=fail)
    before = descriptors()
    with pytest.raises(socket.gaierror, match=r"name\.invalid:80 \(looking up the name: Name or service") as caught:
        conn.open()
    assert caught.value.errno == socket.EAI_NONAME
    assert descriptors() == before


def test_a_name_without_addresses_is_an_error() -> None:
    conn = TcpConnection("name.test", 80)
    look_up(
        conn,
    )
    with pytest.raises(OSError, match=r"cannot connect to name\.test:80 \(it has no address\)"):
        conn.open()


def test_a_look_up_that_hangs_is_bounded_by_the_connect_timeout() -> None:
    conn = TcpConnection("name.test", 80, timeout=60, connect_timeout=0.05)
    look_up(conn, then=Event().wait)
    with pytest.raises(TimeoutError, match=r"name\.test:80 within 0\.05 s \(still looking up the name\)"):
        conn.open()


def test_a_look_up_that_takes_all_the_time_leaves_none_to_connect() -> None:
    conn = TcpConnection("name.test", 80, connect_timeout=0.01)
    look_up(conn, ("127.0.0.1", 80), then=lambda: time.sleep(0.02))  # stops the hub, and so the timer
    with pytest.raises(TimeoutError, match=r"name\.test:80 within 0\.01 s \(no time was left to try\)"):
        conn.open()


def test_a_socket_option_that_fails_leaks_nothing() -> None:
    conn = TcpConnection("127.0.0.1", refused_port())
    conn._socket_options.append((socket.IPPROTO_TCP, 9999, 1))
    before = descriptors()
    with pytest.raises(OSError, match="Protocol not available"):
        conn.open()
    assert descriptors() == before


def test_a_source_address_that_is_taken_leaks_nothing() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, source_address=(server.host, server.port))
        before = descriptors()
        with pytest.raises(OSError, match="Address already in use"):
            conn.open()
        assert descriptors() == before


@pytest.mark.parametrize("options", [{"connect_timeout": 0.05}, {"timeout": 0.05}])
def test_a_connect_that_nobody_answers_times_out_and_leaks_nothing(options: dict[str, Any]) -> None:
    with BlackHole() as hole:
        conn = TcpConnection(hole.host, hole.port, **options)
        before = descriptors()
        with pytest.raises(TimeoutError) as caught:
            conn.open()
        # On a busy machine the time may be over before the connect begins.
        wanted = rf"cannot connect to {hole.host}:{hole.port} within 0\.05 s \((127.0.0.1: no answer|no time was left)"
        assert re.match(wanted, str(caught.value)), caught.value
        assert descriptors() == before


@pytest.mark.parametrize("kill", [gevent.GreenletExit, gevent.Timeout])
def test_an_open_that_is_killed_while_it_connects_leaks_nothing(kill: type[BaseException]) -> None:
    with BlackHole() as hole:
        conn = TcpConnection(hole.host, hole.port, connect_timeout=60)
        before = descriptors()
        opening = gevent.spawn(pytest.raises, kill, conn.open)
        gevent.sleep(0)
        assert descriptors() == before + 1
        opening.kill(kill)
        assert descriptors() == before
        assert not conn.is_connected()


def test_an_open_that_is_killed_while_it_looks_the_name_up_leaks_nothing() -> None:
    conn = TcpConnection("name.test", 80)
    look_up(conn, then=Event().wait)
    before = descriptors()
    opening = gevent.spawn(conn.open)
    gevent.sleep(0)
    opening.kill()
    assert descriptors() == before


def test_the_users_own_timeout_is_not_mistaken_for_the_connect_timeout() -> None:
    with BlackHole() as hole:
        conn = TcpConnection(hole.host, hole.port, connect_timeout=60)
        with gevent.Timeout(0.01) as mine, pytest.raises(gevent.Timeout) as caught:
            conn.open()
        assert caught.value is mine


def test_a_failed_open_keeps_no_reference_to_the_connection() -> None:
    conn = TcpConnection("127.0.0.1", refused_port())
    seen = weakref.ref(conn)
    gc.disable()
    try:
        with pytest.raises(ConnectionRefusedError):
            conn.open()
        del conn
        assert seen() is None
    finally:
        gc.enable()


# Several addresses


def test_the_next_address_is_tried_when_one_refuses() -> None:
    with EchoServer() as server:
        conn = TcpConnection("name.test", server.port)
        look_up(conn, ("::1", server.port, 0, 0), (server.host, server.port))
        conn.open()
        assert conn.socket.getpeername() == (server.host, server.port)
        conn.close()


def test_an_address_that_never_answers_leaves_time_for_the_next() -> None:
    with BlackHole() as hole, EchoServer() as server:
        conn = TcpConnection("name.test", server.port, connect_timeout=20)
        look_up(conn, (hole.host, hole.port), (hole.host, hole.port), (server.host, server.port))
        given = hurry(conn, hole)
        conn.open()
        assert 0 < given[0] <= 20 / 3
        assert 0 < given[1] <= 20 / 2
        assert conn.socket.getpeername() == (server.host, server.port)
        conn.close()


def test_if_all_addresses_fail_the_error_names_each_and_leaks_nothing() -> None:
    with BlackHole() as hole:
        conn = TcpConnection("name.test", 80, connect_timeout=9)
        look_up(conn, (hole.host, hole.port), ("::1", refused_port("::1"), 0, 0))
        hurry(conn, hole)
        before = descriptors()
        with pytest.raises(ConnectionRefusedError) as caught:
            conn.open()
        wanted = r"cannot connect to name\.test:80 \(127\.0\.0\.1: no answer in \d\.\d+ s; ::1: Connection refused\)"
        assert re.search(wanted, str(caught.value)), caught.value
        cause = caught.value.__cause__
        assert isinstance(cause, ConnectionRefusedError)
        assert isinstance(cause.__context__, TimeoutError)
        assert descriptors() == before


def test_the_deadline_holds_however_many_addresses_there_are() -> None:
    with BlackHole() as hole:
        conn = TcpConnection("name.test", 80, connect_timeout=0.1)
        look_up(conn, *[(hole.host, hole.port)] * 5)
        # On a busy machine the time may be over before the first connect begins.
        wanted = r"name\.test:80 within 0\.1 s \((127\.0\.0\.1: no answer|no time was left)"
        with gevent.Timeout(20), pytest.raises(TimeoutError, match=wanted):
            conn.open()


# Sending and receiving


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\x03",
        bytearray(b"\x00\x01\x02\x03"),
        memoryview(b"\x00\x01\x02\x03"),
        array.array("I", [50462976]),
    ],
)
def test_all_that_has_a_buffer_can_be_sent(data: Any) -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.send(data) == 4
        assert conn.recv_exactly(4) == b"\x00\x01\x02\x03"
        assert conn.send(data[:0]) == 0
        conn.close()


def test_a_str_is_refused_with_the_advice_to_encode_it() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        text: Any = "text"
        with pytest.raises(TypeError, match=r"data must be bytes.*not str: encode it first"):
            conn.send(text)
        with pytest.raises(TypeError, match=r"data must be bytes.*not NoneType$"):
            conn.send(None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="data must be contiguous"):
            conn.send(memoryview(b"0123")[::2])
        conn.send(b"still usable")
        assert conn.recv() == b"still usable"
        conn.close()


def test_megabytes_are_sent_whole_to_a_slow_reader(rng: random.Random) -> None:
    data = rng.randbytes(4 * 1024 * 1024)
    received = bytearray()

    def read_slowly(sock: Any) -> None:
        while piece := sock.recv(64 * 1024):
            received.extend(piece)
            gevent.sleep(0)
        sock.sendall(b"done")

    with Server(read_slowly) as server:
        conn = TcpConnection(server.host, server.port, timeout=30)
        conn.open()
        conn.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        assert conn.send(data) == len(data)
        conn.socket.shutdown(socket.SHUT_WR)
        assert conn.recv() == b"done"
        assert received == data
        conn.close()


def test_sending_to_a_peer_that_does_not_read_times_out() -> None:
    def read_nothing(sock: Any) -> None:
        Event().wait()

    with Server(read_nothing) as server:
        conn = TcpConnection(server.host, server.port, timeout=0.05, connect_timeout=5)
        conn.open()
        with pytest.raises(TimeoutError, match=r":\d+ did not take 33554432 bytes within 0\.05 s"):
            conn.send(bytes(32 * 1024 * 1024))
        conn.close()


def test_receiving_from_a_silent_peer_times_out_and_loses_nothing() -> None:
    with LineEchoServer() as server:
        conn = TcpConnection(server.host, server.port, timeout=0.05, connect_timeout=5)
        conn.open()
        with pytest.raises(TimeoutError, match=rf"127\.0\.0\.1:{server.port} sent nothing within 0\.05 s"):
            conn.recv()
        conn.send(b"12345\n")
        with pytest.raises(TimeoutError):
            conn.recv_exactly(8)
        conn.send(b"6789\n")
        conn.socket.settimeout(5)
        assert conn.recv_exactly(8) == b"12345\n67"
        conn.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            conn.recv_until(b"!")
        assert conn.recv() == b"89\n"
        conn.close()


def test_a_peer_that_the_kernel_gave_up_is_a_timeout_of_the_kernels() -> None:
    # It takes the kernel minutes, and a network that loses packets.
    class Dead:
        def recv(self, size: int) -> bytes:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

        def gettimeout(self) -> float:
            return 5

    conn = TcpConnection("127.0.0.1", 80, timeout=5)
    conn._sock = Dead()  # type: ignore[assignment]
    with pytest.raises(TimeoutError, match=r"127\.0\.0\.1:80: Connection timed out") as caught:
        conn.recv()
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("timeout", [0, None])
def test_without_a_timeout_the_socket_has_none(timeout: float | None) -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, timeout=timeout, connect_timeout=5)
        conn.open()
        assert conn.socket.gettimeout() is None
        conn.close()


def test_recv_returns_what_has_come_and_then_the_end() -> None:
    with Server(say(b"some bytes")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv(4) == b"some"
        assert conn.recv() == b" bytes"
        assert conn.recv() == b""
        assert conn.recv() == b""
        conn.close()


def test_recv_exactly_puts_pieces_together_and_leaves_what_follows() -> None:
    with Server(say(b"12", b"345", b"6789")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_exactly(0) == b""
        assert conn.recv_exactly(6) == b"123456"
        assert conn.socket.recv(10) == b"789"
        conn.close()


def test_recv_exactly_takes_megabytes(rng: random.Random) -> None:
    data = rng.randbytes(3 * 1024 * 1024)
    with Server(say(data)) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_exactly(len(data)) == data
        conn.close()


def test_recv_exactly_says_how_much_had_come_when_the_stream_ended() -> None:
    with Server(say(b"12", b"3")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        with pytest.raises(EndOfStreamError, match=rf"127\.0\.0\.1:{server.port} ended the stream after 3 of 10 bytes"):
            conn.recv_exactly(10)
        assert issubclass(EndOfStreamError, EOFError)
        assert issubclass(EndOfStreamError, ConnectionError)
        assert conn.recv() == b"123"
        with pytest.raises(EndOfStreamError, match="after 0 of 1 bytes"):
            conn.recv_exactly(1)
        conn.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8192])
def test_recv_until_finds_a_separator_across_pieces_and_keeps_the_rest(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsocketpool.connection._READ_SIZE", size)  # so that pieces end everywhere
    with Server(say(b"one\r", b"\ntwo\r\nthr", b"ee\r\n", b"\r\nfour+5")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_until(b"\r\n") == b"one"
        assert conn.recv_until(b"\r\n") == b"two"
        assert conn.recv_until(b"\r\n") == b"three"
        assert conn.recv_until(b"\r\n") == b""
        assert conn.recv_until(bytearray(b"r+")) == b"fou"
        assert conn.recv_exactly(1) == b"5"
        with pytest.raises(EndOfStreamError, match=r"after 0 bytes without b'\\n'"):
            conn.recv_until(b"\n")
        conn.close()


def test_all_that_receive_begin_with_what_was_read_ahead() -> None:
    with Server(say(b"a\nbcdefgh", b"ij\nk")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_until(b"\n") == b"a"
        assert conn.recv(2) == b"bc"
        assert conn.recv_exactly(2) == b"de"
        assert conn.recv_exactly(4) == b"fghi"
        assert conn.recv_until(b"\n") == b"j"
        assert conn.recv_exactly(1) == b"k"
        assert conn.recv() == b""
        conn.close()


@pytest.mark.parametrize("pieces", [[b"12345\r\n67"], [b"12345\r", b"\n67"], [b"1", b"2", b"345", b"\r", b"\n67"]])
def test_recv_until_accepts_exactly_the_limit(pieces: list[bytes]) -> None:
    with Server(say(*pieces)) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_until(b"\r\n", limit=5) == b"12345"
        assert conn.recv_exactly(2) == b"67"
        conn.close()


@pytest.mark.parametrize("pieces", [[b"123456\r\n"], [b"123", b"456\r", b"\n"], [b"123456789"], [b"123456\r"]])
def test_recv_until_refuses_more_than_the_limit(pieces: list[bytes]) -> None:
    with Server(say(*pieces)) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        with pytest.raises(LimitExceededError, match=r"sent more than 5 bytes without b'\\r\\n'"):
            conn.recv_until(b"\r\n", limit=5)
        assert not conn.check()
        assert conn.recv_exactly(6) == b"123456"
        conn.close()


def test_recv_until_finds_a_separator_after_much_that_looks_like_its_beginning() -> None:
    with Server(say(*[b"=" * 8192] * 100, b"+")) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        assert conn.recv_until(b"=+", limit=1 << 20) == b"=" * (100 * 8192 - 1)
        conn.close()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda c: c.recv(0), ValueError, "size must be at least 1"),
        (lambda c: c.recv("5"), TypeError, "size must be an int"),
        (lambda c: c.recv(True), TypeError, "size must be an int"),
        (lambda c: c.recv_exactly(-1), ValueError, "n must be at least 0"),
        (lambda c: c.recv_exactly(None), TypeError, "n must be an int"),
        (lambda c: c.recv_until("\n"), TypeError, "sep must be bytes"),
        (lambda c: c.recv_until(b""), ValueError, "sep must not be empty"),
        (lambda c: c.recv_until(b"\n", 0), ValueError, "limit must be at least 1"),
        (lambda c: c.recv_until(b"\n", 1.5), TypeError, "limit must be an int"),
    ],
)
def test_a_wrong_argument_of_a_receiving_call_is_refused(
    call: Callable[[TcpConnection], object], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        call(TcpConnection("127.0.0.1", 1))


# check()


def wait_readable(conn: TcpConnection | UnixConnection) -> None:
    """Wait until something has arrived: bytes, the end of the stream or an error."""
    socket.wait_read(conn.socket.fileno(), timeout=5)


def test_check_is_true_of_a_healthy_connection_and_never_switches() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        assert conn.check() is False
        conn.open()
        server.wait_accepted(1)
        ran: list[int] = []
        other = gevent.spawn(ran.append, 1)
        for _ in range(10):
            assert conn.check() is True
            assert conn.keepalive() is True
        assert ran == []
        other.join()
        conn.send(b"x")
        assert conn.recv() == b"x"
        assert conn.check() is True
        conn.close()
        assert conn.check() is False


def test_check_finds_that_the_peer_ended_the_stream() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        server.wait_accepted(1)
        server.hang_up()
        wait_readable(conn)
        assert conn.check() is False
        assert conn.is_connected()
        conn.close()


def test_check_finds_that_the_peer_reset_the_connection() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        server.wait_accepted(1)
        server.reset()
        wait_readable(conn)
        assert conn.check() is False
        assert conn.check() is False
        conn.close()


def test_check_finds_bytes_that_nobody_asked_for_and_leaves_them() -> None:
    def greet(sock: Any) -> None:
        sock.sendall(b"stray")
        swallow(sock)

    with Server(greet) as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        wait_readable(conn)
        assert conn.check() is False
        assert conn.recv() == b"stray"
        assert conn.check() is True
        conn.close()


def test_check_finds_bytes_that_were_read_ahead() -> None:
    with LineEchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        conn.send(b"one\ntwo\n")
        assert conn.recv_until(b"two") == b"one\n"
        assert conn.check() is False
        assert conn.recv() == b"\n"
        assert conn.check() is True
        conn.close()


def test_check_is_false_when_the_socket_was_closed_behind_its_back() -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port)
        conn.open()
        conn.socket.close()
        assert conn.check() is False
        conn.close()


# Unix sockets


def test_a_unix_connection_does_all_that_a_tcp_connection_does(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with LineEchoServer(path=path) as server:
        for kind in (path, str(path), os.fsencode(path)):
            conn = UnixConnection(kind, 600, 5)
            assert repr(conn) == f"<UnixConnection {path} (closed)>"
            conn.open()
            assert conn.send(b"a\nb\n") == 4
            assert conn.recv_until(b"\n") == b"a"
            assert conn.recv_exactly(2) == b"b\n"
            assert conn.check() is True
            conn.close()
        server.wait_open(0)
        conn.open()
        server.wait_accepted(4)
        server.hang_up()
        wait_readable(conn)
        assert conn.check() is False
        conn.close()


def test_a_unix_socket_that_is_not_there_is_named_and_leaks_nothing(tmp_path: Path) -> None:
    conn = UnixConnection(tmp_path / "missing")
    before = descriptors()
    with pytest.raises(FileNotFoundError, match=rf"cannot connect to {tmp_path}/missing \(.*No such file"):
        conn.open()
    assert descriptors() == before


def test_a_unix_socket_path_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    conn = UnixConnection(tmp_path / ("x" * 200))
    before = descriptors()
    with pytest.raises(OSError, match="path too long"):
        conn.open()
    assert descriptors() == before


@pytest.fixture
def full_queue() -> Iterator[std_socket.socket]:
    """A listening Unix socket whose queue of connections to be accepted is full."""
    with tempfile.TemporaryDirectory() as folder, std_socket.socket(std_socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(0)
        listener.settimeout(5)
        with std_socket.socket(std_socket.AF_UNIX) as first:
            first.connect(f"{folder}/socket")
            yield listener


def test_a_unix_server_with_a_full_queue_is_waited_for_without_spinning(full_queue: std_socket.socket) -> None:
    conn = UnixConnection(full_queue.getsockname(), connect_timeout=5)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            full_queue.accept()[0].close()
        gevent.sleep(seconds)

    conn._sleep = sleep  # type: ignore[method-assign]
    conn.open()
    assert pauses == [0.001, 0.002, 0.004]
    assert conn.socket.gettimeout() is None
    conn.close()


def test_a_unix_server_whose_queue_stays_full_is_a_timeout_and_leaks_nothing(full_queue: std_socket.socket) -> None:
    conn = UnixConnection(full_queue.getsockname(), connect_timeout=0.1)
    before = descriptors()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        conn.open()
    # As in a runtime that cannot interrupt the block.
    conn._time_limit = lambda seconds: contextlib.nullcontext()  # type: ignore[method-assign]
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        conn.open()
    assert descriptors() == before


def test_an_abstract_name_is_shown_with_an_at_sign() -> None:
    assert repr(UnixConnection(b"\0name")) == "<UnixConnection @name (closed)>"


# The proxy that other tests use


def test_the_proxy_forwards_and_counts() -> None:
    with LineEchoServer() as server, Proxy(server.host, server.port) as proxy:
        conns = [TcpConnection(proxy.host, proxy.port, timeout=5) for _ in range(3)]
        for conn in conns:
            conn.open()
            conn.send(b"hello\n")
            assert conn.recv_until(b"\n") == b"hello"
        assert (proxy.open, proxy.most, proxy.accepted) == (3, 3, 3)
        for conn in conns:
            conn.close()
        assert proxy.open == 0
        proxy.wait_open(0)
        server.wait_open(0)
        assert server.most == 3


def test_the_proxy_resets_what_is_open_and_what_comes() -> None:
    with EchoServer() as server, Proxy(server.host, server.port) as proxy:
        conn = TcpConnection(proxy.host, proxy.port, timeout=5)
        conn.open()
        conn.send(b"x")
        assert conn.recv() == b"x"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            conn.recv()
        conn.close()
        with pytest.raises(ConnectionResetError):
            open_and_receive(conn)
        conn.close()
        server.wait_open(0)


def test_the_proxy_ends_the_stream_and_goes_on_reading() -> None:
    with EchoServer() as server, Proxy(server.host, server.port) as proxy:
        conn = TcpConnection(proxy.host, proxy.port, timeout=5)
        conn.open()
        conn.send(b"x")
        assert conn.recv() == b"x"
        proxy.half_close()
        assert conn.recv() == b""
        conn.send(b"x")
        assert conn.recv() == b""
        conn.close()
        conn.open()
        assert conn.recv() == b""
        conn.close()


def test_the_proxy_holds_what_it_gets_while_it_is_a_black_hole() -> None:
    with EchoServer() as server, Proxy(server.host, server.port) as proxy:
        proxy.black_hole()
        conn = TcpConnection(proxy.host, proxy.port, timeout=0.05, connect_timeout=5)
        conn.open()
        conn.send(b"x")
        with pytest.raises(TimeoutError):
            conn.recv()
        proxy.forward()
        conn.socket.settimeout(5)
        assert conn.recv() == b"x"
        conn.close()


def test_the_proxy_delays() -> None:
    with EchoServer() as server, Proxy(server.host, server.port) as proxy:
        proxy.delay(0.2)
        conn = TcpConnection(proxy.host, proxy.port, timeout=0.05, connect_timeout=5)
        conn.open()
        conn.send(b"x")
        with pytest.raises(TimeoutError):
            conn.recv()
        conn.socket.settimeout(5)
        assert conn.recv() == b"x"
        conn.close()


def test_the_proxy_truncates() -> None:
    with EchoServer() as server, Proxy(server.host, server.port) as proxy:
        proxy.truncate(3)
        conn = TcpConnection(proxy.host, proxy.port, timeout=5)
        conn.open()
        conn.send(b"12345")
        with pytest.raises(EndOfStreamError, match="after 3 of 5 bytes"):
            conn.recv_exactly(5)
        conn.close()


def test_the_proxy_refuses_and_listens_again_at_the_same_port() -> None:
    with EchoServer() as server, Proxy(server.host, server.port) as proxy:
        conn = TcpConnection(proxy.host, proxy.port, timeout=5)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            conn.open()
        proxy.forward()
        conn.open()
        conn.send(b"x")
        assert conn.recv() == b"x"
        proxy.refuse()
        conn.send(b"y")
        assert conn.recv() == b"y"
        conn.close()


def test_a_server_counts_what_its_clients_have_open() -> None:
    with EchoServer() as server:
        for _ in range(20):
            conn = TcpConnection(server.host, server.port)
            conn.open()
            conn.close()
        server.wait_accepted(20)
        assert server.most <= 1
        assert server.open == 0


def test_the_reset_of_the_servers_is_a_reset() -> None:
    with Server(reset) as server:
        conn = TcpConnection(server.host, server.port)
        with pytest.raises(ConnectionResetError):
            open_and_receive(conn)
        conn.close()

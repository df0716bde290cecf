"""Programs written for gsocketpool 0.1.6 go on working.

Each test is a way in which 0.1.6 is used, by a program that knows nothing of this version.
"""

from __future__ import annotations

import _socket
import array
import collections
import copy
import functools
import json
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import pytest
from gevent import socket

import gsocketpool
import gsocketpool.connection
import gsocketpool.exceptions
import gsocketpool.pool
from gsocketpool import Connection, ConnectionNotFoundError, Pool, PoolError, PoolExhaustedError, TcpConnection

from .conftest import Logged
from .dials import BOUND, nobody_else_runs
from .servers import LineEchoServer, Server, refused_port


def together(count: int, job: Callable[[int], object]) -> list[Any]:
    """Run a job in so many greenlets, and return their results; what one raises is raised."""
    greenlets = [gevent.spawn(job, number) for number in range(count)]
    try:
        gevent.joinall(greenlets, timeout=BOUND, raise_error=True)
        assert all(g.dead for g in greenlets), f"some have not ended in {BOUND} s"
    finally:
        gevent.killall(greenlets)
    return [g.value for g in greenlets]


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


def options_for(server: Server) -> dict[str, Any]:
    return {"host": server.host, "port": server.port}


# An RPC client as mprpc has it


def answer_calls(sock: Any) -> None:
    """Answer calls, each a line of JSON: [number, method, arguments]."""
    rest = b""
    while data := sock.recv(65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            number, method, arguments = json.loads(line)
            if method == "hang up":
                return
            if method == "say nothing":
                continue
            gevent.sleep(0)
            result = sum(arguments) if method == "sum" else max(arguments)
            sock.sendall(json.dumps([number, result]).encode() + b"\n")


class RPCClient:
    """Knows nothing of pools. Opening what is open, and closing what is not, is the caller's mistake."""

    def __init__(self, host: str, port: int, timeout: float | None = None, lazy: bool = False) -> None:
        self._address = host, port
        self._timeout = timeout
        self._calls = 0
        self._socket: Any = None
        if not lazy:
            self.open()

    def open(self) -> None:
        assert self._socket is None, "it is open"
        sock = socket.socket()
        sock.settimeout(self._timeout)
        try:
            sock.connect(self._address)
        except BaseException:
            sock.close()
            raise
        self._socket = sock

    def close(self) -> None:
        assert self._socket is not None, "it is not open"
        self._socket.close()
        self._socket = None

    def is_connected(self) -> bool:
        return bool(self._socket)

    def call(self, method: str, *arguments: float) -> Any:
        self._calls += 1
        self._socket.sendall(json.dumps([self._calls, method, arguments]).encode() + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            data = self._socket.recv(1024)
            if not data:
                raise OSError("the server hung up")
            reply += data
        number, result = json.loads(reply)
        assert number == self._calls, "the reply to another call"
        return result


class RPCPoolClient(RPCClient, Connection):
    """Its `is_expired` is true if no lifetime is given, and its `__init__` never calls that of `Connection`."""

    def __init__(self, host: str, port: int, timeout: float | None = None, lifetime: float | None = None) -> None:
        self._expires = None if lifetime is None else time.time() + lifetime
        RPCClient.__init__(self, host, port, timeout=timeout, lazy=True)

    def is_expired(self) -> bool:
        return self._expires is None or time.time() > self._expires

    def call(self, method: str, *arguments: float) -> Any:
        try:
            return RPCClient.call(self, method, *arguments)
        except OSError:
            self.reconnect()
            raise


@pytest.fixture
def rpc_server() -> Iterator[Server]:
    with Server(answer_calls) as server:
        yield server


def test_a_pool_of_rpc_clients_that_never_call_the_constructor_of_connection(rpc_server: Server) -> None:
    pool = gsocketpool.pool.Pool(RPCPoolClient, options_for(rpc_server), max_connections=4, acquire_timeout=BOUND)

    def call(number: int) -> None:
        with pool.connection() as client:
            assert client.call("sum", number, 1000) == number + 1000

    with pool:
        together(100, call)
        assert rpc_server.most <= 4
        assert pool.faults() == []


def test_clients_that_are_expired_by_default_are_lent_again_and_reaped_while_they_idle(rpc_server: Server) -> None:
    with Pool(RPCPoolClient, options_for(rpc_server), reap_interval=0.05) as pool:
        first = pool.acquire()
        assert first.is_expired()
        pool.release(first)
        assert pool.acquire() is first
        pool.drop_expired()  # the reaper leaves what is in use alone
        assert first.call("sum", 1, 2) == 3
        assert pool.size == 1
        pool.release(first)
        rpc_server.wait_open(0)
        assert not first.is_connected()
        assert pool.size == 0


def test_a_client_with_a_lifetime_is_kept_until_it_is_over(rpc_server: Server) -> None:
    with Pool(RPCPoolClient, {**options_for(rpc_server), "lifetime": 600}) as pool:
        with pool.connection() as first:
            pass
        pool.drop_expired()
        with pool.connection() as second:
            assert second is first


@pytest.mark.parametrize("trouble", ["hang up", "say nothing"])
def test_a_client_that_reconnects_itself_in_the_middle_of_a_call(rpc_server: Server, trouble: str) -> None:
    with Pool(RPCPoolClient, {**options_for(rpc_server), "timeout": BOUND}, max_connections=1, discard_on=()) as pool:
        with pytest.raises(OSError, match=r"hung up|timed out"), pool.connection() as client:
            client._socket.settimeout(0.1)  # until it reconnects
            client.call(trouble)
        with pool.connection() as again:
            assert again is client
            assert again.call("max", 3, 5, 4) == 5
        assert (rpc_server.accepted, rpc_server.most) == (2, 1)


def test_a_client_that_reconnected_itself_can_be_released_by_hand_after_its_error(rpc_server: Server) -> None:
    pool = Pool(RPCPoolClient, options_for(rpc_server))
    client = pool.acquire()
    try:
        client.call("hang up")
    except OSError:
        pass
    finally:
        pool.release(client)
    again = pool.acquire()
    assert again is client
    assert again.call("sum", 2, 2) == 4
    pool.release(again)
    pool.close()


def test_a_client_that_cannot_reconnect_is_closed_by_nobody_a_second_time(rpc_server: Server, logged: Logged) -> None:
    with Pool(RPCPoolClient, options_for(rpc_server), max_connections=1, check_after_idle=0) as pool:
        client = pool.acquire()
        rpc_server.close()
        with pytest.raises(OSError, match="hung up"):
            client.call("sum", 1)
        assert "cannot reconnect" in logged.take(1)[0].getMessage()
        assert not client.is_connected()
        pool.release(client)
        with pytest.raises(ConnectionRefusedError):  # it is not lent; nor closed, which would be an AssertionError
            pool.acquire()
        assert pool.size == 0
        assert pool.faults() == []


def test_a_client_that_its_borrower_closed_is_not_closed_again(rpc_server: Server) -> None:
    pool = Pool(RPCPoolClient, options_for(rpc_server))
    for _ in range(3):
        with pool.connection() as client:
            if client.is_connected():
                client.close()
            client.open()
            client.close()
    pool.drop_expired()
    with pool.connection() as client:
        client.close()
    pool.close()  # an AssertionError would be logged, and the test fail
    rpc_server.wait_open(0)


@pytest.mark.parametrize("kind", [_socket.socket, array.array, collections.deque, bytearray, Exception])
def test_a_compiled_class_can_be_pooled_beside_connection(kind: type) -> None:
    class Compiled(kind, Connection):  # type: ignore[misc]
        is_open = False

        def open(self) -> None:
            assert not self.is_open
            self.is_open = True

        def close(self) -> None:
            assert self.is_open
            self.is_open = False
            if kind is _socket.socket:
                super().close()

        def is_connected(self) -> bool:
            return self.is_open

    arguments = "b" if kind is array.array else ()
    with Pool(lambda: Compiled(*arguments)) as pool, pool.connection() as connection:
        assert isinstance(connection, kind)
        assert connection.is_open
    assert not connection.is_open


# A hook that does not open


class LazyPool(Pool[Any]):
    def _create_connection(self) -> Any:
        return self._factory(**self._options)


def test_a_pool_that_does_not_open_and_borrowers_who_do(server: LineEchoServer) -> None:
    pool = LazyPool(TcpConnection, options_for(server), max_connections=3, acquire_timeout=BOUND)

    def borrow(number: int) -> bytes:
        with pool.connection() as c:
            if not c.is_connected():
                c.open()
            c.send(b"%d\n" % number)
            received: bytes = c.recv()
            return received

    assert together(30, borrow) == [b"%d\n" % number for number in range(30)]
    assert (server.accepted, server.most) == (3, 3)
    assert pool.size == 3
    pool.close()
    server.wait_open(0)


def test_a_pool_that_does_not_open_lends_what_was_never_opened_and_forgets_it_in_silence(
    server: LineEchoServer,
) -> None:
    pool = LazyPool(RPCPoolClient, options_for(server), initial_connections=2)
    with pool.connection() as c:
        assert not c.is_connected()
    pool.drop(pool.acquire())
    pool.close()  # closing what is not open would be an AssertionError, and be logged
    assert server.accepted == 0


def test_a_hook_that_fails_costs_no_slot(server: LineEchoServer) -> None:
    class Refusing(Pool[Any]):
        refusals = 2

        def _create_connection(self) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise LookupError("not yet")
            return super()._create_connection()

    with Refusing(TcpConnection, options_for(server), max_connections=1) as pool:
        for _ in range(2):
            with pytest.raises(LookupError, match="not yet"):
                pool.acquire()
        with pool.connection() as c:
            assert c.is_connected()
        assert pool.faults() == []


# A client whose every attribute is a remote call


class Remote(Connection):
    """``remote.anything(1, 2)`` calls ``anything`` on the server."""

    asked: list[str]

    def __init__(self, host: str, port: int) -> None:
        self.asked = []
        self.client = RPCClient(host, port, lazy=True)

    def open(self) -> None:
        self.client.open()

    def close(self) -> None:
        self.client.close()

    def is_connected(self) -> bool:
        return self.client.is_connected()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("asked", "client"):  # not there yet: or this would ask itself for ever
            raise AttributeError(name)
        self.asked.append(name)
        return lambda *arguments: self.client.call(name, *arguments)


def test_a_connection_whose_every_attribute_is_a_remote_call_is_asked_for_nothing_but_what_its_borrower_asks(
    rpc_server: Server,
) -> None:
    pool = Pool(Remote, options_for(rpc_server), 1, 2, True, 0.05, check_after_idle=0)
    with pool.connection() as remote, pool.connection() as other:
        assert remote.sum(1, 2, 3) == 6
        assert other.max(1, 2, 3) == 3
        with pytest.raises(PoolExhaustedError):
            pool.acquire(retry=0)
        with pytest.raises(ConnectionNotFoundError):
            Pool(Remote, options_for(rpc_server)).release(remote)
        repr(pool), pool.stats(), pool.size
    pool.drop_expired()
    with pool.connection():
        pass
    with pytest.raises(ConnectionNotFoundError):
        pool.release(remote)
    pool.drop(remote)
    with pytest.raises(ConnectionNotFoundError):
        pool.drop(remote)
    pool.close()
    rpc_server.wait_open(0)

    assert remote.asked == ["sum"]
    assert other.asked == ["max"]


# The pool itself


def test_a_factory_needs_no_options(server: LineEchoServer) -> None:
    class Factory(TcpConnection):
        def __init__(self) -> None:
            super().__init__(server.host, server.port)

    for pool in (Pool(Factory), Pool(Factory, {}), Pool(Factory, None), Pool(lambda: Factory())):
        with pool.connection() as c:
            c.send(b"hello\n")
            assert c.recv() == b"hello\n"
        pool.close()


def test_the_positional_arguments_are_those_of_0_1_6_in_their_order(server: LineEchoServer) -> None:
    pool = Pool(TcpConnection, options_for(server), 2, 3, True, 60)

    assert pool.size == pool.idle == 2
    assert pool.stats().max_connections == 3
    borrowed = [pool.acquire(0) for _ in range(3)]
    with pytest.raises(PoolExhaustedError):
        pool.acquire(0, 0)
    for c in borrowed:
        pool.release(c)
    pool.close()


def test_the_names_of_the_arguments_are_those_of_0_1_6(server: LineEchoServer) -> None:
    with Pool(
        factory=TcpConnection,
        options=options_for(server),
        initial_connections=1,
        max_connections=2,
        reap_expired_connections=False,
        reap_interval=1,
    ) as pool:
        c = pool.acquire(retry=1, retried=0)
        pool.release(conn=c)
        pool.drop(conn=c)
        assert pool.size == 0


def test_options_are_the_callers_own(server: LineEchoServer) -> None:
    options = options_for(server)
    with Pool(TcpConnection, options) as pool, pool.connection():
        pass
    assert options == options_for(server)


def test_initial_connections_are_open_when_the_pool_is_made(server: LineEchoServer) -> None:
    with Pool(TcpConnection, options_for(server), initial_connections=5) as pool:
        server.wait_open(5)
        assert pool.size == 5


def test_a_failure_of_the_initial_connections_is_raised_by_the_constructor() -> None:
    with pytest.raises(ConnectionRefusedError):
        Pool(TcpConnection, {"host": "127.0.0.1", "port": refused_port()}, initial_connections=5)


def test_the_pool_may_be_deleted_by_hand_and_more_than_once(server: LineEchoServer) -> None:
    pool = Pool(TcpConnection, options_for(server), initial_connections=2)
    idle, borrowed = pool.acquire(), pool.acquire()
    pool.release(idle)

    pool.__del__()
    pool.__del__()

    server.wait_open(1)
    assert not idle.is_connected()
    borrowed.send(b"still there\n")
    assert borrowed.recv() == b"still there\n"
    pool.release(borrowed)
    server.wait_open(0)
    with pytest.raises(PoolError):
        pool.acquire()
    pool.__del__()
    assert pool.faults() == []


def test_size_is_what_idles_and_what_is_borrowed(server: LineEchoServer) -> None:
    pool = Pool(TcpConnection, options_for(server))
    assert pool.size == 0
    c = pool.acquire()
    assert pool.size == 1
    d = pool.acquire()
    assert pool.size == 2
    pool.release(c)
    assert pool.size == 2
    pool.drop(c)
    assert pool.size == 1
    pool.release(d)
    pool.drop_expired()
    assert pool.size == 1
    pool.close()


def test_the_socket_of_a_connection_is_its_users_too(server: LineEchoServer) -> None:
    with Pool(TcpConnection, dict(options_for(server), lifetime=60, timeout=5)) as pool, pool.connection() as c:
        assert isinstance(c.socket, socket.socket)
        assert c.get() is c.socket
        assert c.socket.gettimeout() == 5
        c.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        c.socket.sendall(b"hello\n")
        assert c.socket.recv(100) == b"hello\n"


# Waiting


@pytest.fixture
def full(server: LineEchoServer) -> Iterator[Pool[TcpConnection]]:
    """A pool of one, which is borrowed."""
    with Pool(TcpConnection, options_for(server), max_connections=1) as pool, pool.connection():
        yield pool


def test_without_retries_a_full_pool_raises_at_once(full: Pool[TcpConnection]) -> None:
    before = time.monotonic()
    with nobody_else_runs(), pytest.raises(PoolExhaustedError) as raised:
        full.acquire(retry=0)
    assert raised.value.waited <= time.monotonic() - before


def test_without_retries_a_pool_with_room_dials(server: LineEchoServer) -> None:
    with Pool(TcpConnection, options_for(server), max_connections=2) as pool:
        c, d = pool.acquire(retry=0), pool.acquire(0)
        c.send(b"c\n")
        d.send(b"d\n")
        assert (c.recv(), d.recv()) == (b"c\n", b"d\n")
        pool.release(c)
        assert pool.acquire(0) is c
        pool.release(c)
        pool.release(d)


@pytest.mark.parametrize(
    ("retry", "retried", "seconds"),
    [(1, 0, 0.1), (3, 0, 0.3), (3, 1, 0.2), (1500, 1499, 0.1), (3, 3, 0.0), (3, 9, 0.0)],
)
def test_a_retry_is_a_tenth_of_a_second_of_waiting(
    full: Pool[TcpConnection], retry: int, retried: int, seconds: float
) -> None:
    before = time.monotonic()
    with pytest.raises(PoolExhaustedError) as raised:
        full.acquire(retry, retried)
    assert seconds - 0.001 <= raised.value.waited <= time.monotonic() - before
    assert full._limit(retry, retried, ...)[0] == pytest.approx(seconds)  # it takes longer where others run, too


def test_by_default_one_second_is_waited(full: Pool[TcpConnection]) -> None:
    with pytest.raises(PoolExhaustedError) as raised:
        full.acquire()
    assert raised.value.waited >= 0.999
    assert full._usual_limit[0] == pytest.approx(1.0)


def test_a_thousand_retries_are_no_recursion(server: LineEchoServer) -> None:
    with Pool(TcpConnection, options_for(server), max_connections=1) as pool:
        borrowed = pool.acquire()
        gevent.spawn_later(0.25, pool.release, borrowed)
        assert pool.acquire(retry=1500) is borrowed
        pool.release(borrowed)


# Errors


def test_the_errors_are_found_where_they_were() -> None:
    for name in ("PoolExhaustedError", "ConnectionNotFoundError"):
        error = getattr(gsocketpool.pool, name)
        assert error is getattr(gsocketpool.exceptions, name)
        assert error is getattr(gsocketpool, name)
        assert issubclass(error, Exception)
        with pytest.raises(error):
            raise error  # as 0.1.6 raised them, without arguments
        assert str(error("text")) == "text"
    assert gsocketpool.connection.TcpConnection is TcpConnection
    assert gsocketpool.connection.Connection is Connection
    assert gsocketpool.pool.Pool is Pool


def test_what_was_not_borrowed_cannot_be_released(server: LineEchoServer) -> None:
    stranger = TcpConnection(**options_for(server))
    with Pool(TcpConnection, options_for(server)) as pool, Pool(TcpConnection, options_for(server)) as other:
        c = pool.acquire()
        with pytest.raises(ConnectionNotFoundError):
            pool.release(stranger)
        with pytest.raises(ConnectionNotFoundError):
            other.release(c)
        pool.release(c)
        with pytest.raises(ConnectionNotFoundError):
            pool.release(c)
        assert (pool.size, pool.idle) == (1, 1)
        assert pool.faults() == other.faults() == []


def test_what_is_not_in_the_pool_cannot_be_dropped(server: LineEchoServer) -> None:
    with Pool(TcpConnection, options_for(server)) as pool:
        with pytest.raises(ConnectionNotFoundError):
            pool.drop(TcpConnection(**options_for(server)))
        c = pool.acquire()
        pool.release(c)
        pool.drop(c)
        assert not c.is_connected()
        with pytest.raises(ConnectionNotFoundError):
            pool.drop(c)
        with pytest.raises(ConnectionNotFoundError):
            pool.release(c)


def test_one_object_handed_out_ten_times_is_a_clear_error_and_costs_no_slot(server: LineEchoServer) -> None:
    only = TcpConnection(**options_for(server))
    ready: list[TcpConnection] = []

    def factory() -> TcpConnection:
        return ready.pop() if ready else only

    with Pool(factory, max_connections=10) as pool:
        assert pool.acquire() is only
        for _ in range(9):
            with pytest.raises(PoolError, match="in the pool already, where a new one each time is needed"):
                pool.acquire()
        assert pool.size == 1
        only.send(b"not opened again, nor closed\n")
        assert only.recv_until(b"\n") == b"not opened again, nor closed"
        assert pool.faults() == []

        # The other nine slots are all there.
        ready += [TcpConnection(**options_for(server)) for _ in range(9)]
        borrowed = [pool.acquire() for _ in range(9)]
        assert pool.size == 10
        for c in (only, *borrowed):
            pool.release(c)


# The examples of its documents, with bytes where Python 2 had str


def test_the_example_of_the_documents(server: LineEchoServer) -> None:
    options = {"host": "localhost", "port": server.port}
    pool = Pool(TcpConnection, options)

    with pool.connection() as conn:
        conn.send(b"hello\n")
        assert conn.recv() == b"hello\n"
    pool.close()


class OldTcpConnection(Connection):
    """What the documents show as a protocol of one's own: the socket is made by the constructor, before it is opened,
    and `is_expired` would fail on what was never opened."""

    def __init__(self, host: str, port: int, lifetime: float = 600, timeout: float | None = None) -> None:
        self._sock: Any = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._address = host, port
        self._lifetime = lifetime
        self._timeout = timeout
        self._connected = False
        self._created: Any = None

    @property
    def socket(self) -> Any:
        return self._sock

    def open(self) -> None:
        self._sock.connect(self._address)
        if self._timeout:
            self._sock.settimeout(self._timeout)
        self._connected = True
        self._created = time.time()

    def close(self) -> None:
        if self._connected:
            self._sock.close()
            self._connected = False

    def is_connected(self) -> bool:
        return self._connected

    def is_expired(self) -> bool:
        return bool(time.time() - self._created > self._lifetime)

    def send(self, data: bytes) -> None:
        assert self._connected
        self._sock.send(data)

    def recv(self, size: int = 1024) -> bytes:
        assert self._connected
        received: bytes = self._sock.recv(size)
        return received


def test_a_connection_of_ones_own_as_the_documents_show_it(server: LineEchoServer) -> None:
    options = dict(options_for(server), timeout=5)
    pool = Pool(OldTcpConnection, options, initial_connections=1, max_connections=3, acquire_timeout=BOUND)

    def talk(number: int) -> None:
        with pool.connection() as conn:
            conn.send(b"hello %d\n" % number)
            assert conn.recv() == b"hello %d\n" % number
            assert conn.socket.gettimeout() == 5

    together(30, talk)
    pool.drop_expired()
    assert pool.size == 3
    assert server.most == 3
    pool.close()
    server.wait_open(0)


def test_a_connection_of_ones_own_expires_as_the_documents_show_it(server: LineEchoServer) -> None:
    with Pool(OldTcpConnection, dict(options_for(server), lifetime=-1), reap_expired_connections=False) as pool:
        with pool.connection() as conn:
            conn.send(b"hello\n")
            assert conn.recv(1024) == b"hello\n"
        pool.drop_expired()
        assert pool.size == 0
        assert not conn.is_connected()


def test_the_interface_of_the_documents_is_there() -> None:
    for name in ("close", "get", "is_connected", "is_expired", "open", "reconnect"):
        assert callable(getattr(gsocketpool.connection.Connection, name))
    for name in ("acquire", "drop", "drop_expired", "release", "connection"):
        assert callable(getattr(gsocketpool.pool.Pool, name))
    assert isinstance(gsocketpool.pool.Pool.size, property)
    connection = TcpConnection("localhost", 2000, 600, None)
    assert connection.is_connected() is connection.is_expired() is False
    with pytest.raises(NotImplementedError):
        Connection().open()


def test_a_subclass_that_overrides_acquire_and_release_is_asked_by_connection_too(server: LineEchoServer) -> None:
    calls: list[str] = []

    class Counting(Pool[TcpConnection]):
        def acquire(self, *args: Any, **options: Any) -> TcpConnection:
            calls.append("acquire")
            return super().acquire(*args, **options)

        def release(self, conn: TcpConnection) -> None:
            calls.append("release")
            super().release(conn)

    with Counting(TcpConnection, options_for(server)) as pool:
        with pool.connection() as c:
            c.send(b"hello\n")
            assert c.recv() == b"hello\n"
        assert calls == ["acquire", "release"]
        with pool.connection(timeout=5) as again:
            assert again is c
            pool.drop(again)
        assert calls == ["acquire", "release", "acquire"]
        with pytest.raises(KeyError), pool.connection():
            raise KeyError
        assert pool.stats().closed["discarded"] == 1
        assert pool.faults() == []


def test_a_subclass_that_would_replace_what_the_pool_itself_does_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Mine\.failed would replace"):

        class Mine(Pool[TcpConnection]):
            def failed(self) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize("name", ["_close", "_drop", "_call", "_ready", "_spawn", "_closed"])
def test_a_private_name_of_the_pools_own_is_refused_in_a_subclass(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name} would replace what the pool itself does: use another name"):
        type("Mine", (Pool,), {name: lambda self: None})


@pytest.mark.parametrize("name", ["_drop", "_name_of", "take", "opened"])
def test_what_a_base_class_brings_along_is_refused_by_the_name_of_that_class(name: str) -> None:
    mixin = type("Mixin", (), {name: lambda self, *_: None})
    with pytest.raises(TypeError, match=rf"^Mixin\.{name} would replace what the pool itself does: use another name$"):
        type("Mine", (mixin, Pool), {})


def test_a_pool_that_would_be_its_own_listener_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Listener\.opened would replace what the pool itself does"):

        class Mine(gsocketpool.Listener, Pool[TcpConnection]):  # type: ignore[misc]
            pass


def test_a_subclass_of_a_subclass_and_a_mixin_with_names_of_its_own_are_fine(server: LineEchoServer) -> None:
    noted: list[str] = []

    class Noting:
        _noted = noted

        def note(self, text: str) -> None:
            self._noted.append(text)

    class Mine(Pool[TcpConnection]):
        def acquire(self, *args: Any, **options: Any) -> TcpConnection:
            return super().acquire(*args, **options)

        def _create_connection(self) -> TcpConnection:
            return super()._create_connection()

    class MyOwn(Noting, Mine):
        def _create_connection(self) -> TcpConnection:
            self.note("created")
            return super()._create_connection()

    with MyOwn(TcpConnection, options_for(server)) as pool, pool.connection(timeout=5):
        assert noted == ["created"]


def test_a_connection_that_answers_nothing_when_it_is_asked_whether_it_is_connected_is_not_lent() -> None:
    class Client(Connection):
        sock: object = None

        def open(self) -> None:
            self.sock = object()

        def close(self) -> None:
            self.sock = None

        def is_connected(self) -> Any:
            return self.sock  # true or not, as 0.1.6 took it

    with Pool(Client, check_after_idle=0) as pool:
        with pool.connection() as client:
            pass
        with pool.connection() as again:
            assert again is client
        client.close()
        with pool.connection() as other:
            assert other is not client
            assert other.sock is not None
        assert pool.stats().closed["stale"] == 1


def test_a_subclass_as_geventconnpool_wanted_it_is_told_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"Mine\._new_connection is geventconnpool's: .*wrap\(open"):
        type("Mine", (Pool,), {"_new_connection": lambda self: None})


def test_the_reaper_calls_the_drop_expired_of_a_subclass(server: LineEchoServer) -> None:
    reaped = gevent.event.Event()

    class Noting(Pool[TcpConnection]):
        def drop_expired(self) -> None:
            super().drop_expired()
            reaped.set()

    with Noting(TcpConnection, {**options_for(server), "lifetime": 0}, reap_interval=0.02) as pool:
        with pool.connection():
            pass
        reaped.clear()  # it came while the pool dialled, perhaps
        assert reaped.wait(BOUND)
        assert pool.stats().closed["expired"] == 1


def test_what_a_decorator_has_made_of_a_method_counts_as_the_subclass_own(server: LineEchoServer) -> None:
    calls: list[str] = []
    reaped = gevent.event.Event()

    def traced(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)  # copies the name of the module, too
        def call(*args: Any, **options: Any) -> Any:
            outcome = method(*args, **options)
            if method is Pool.drop_expired:
                reaped.set()
            else:
                calls.append(method.__name__)
            return outcome

        return call

    class Traced(Pool[TcpConnection]):
        acquire = traced(Pool.acquire)
        release = traced(Pool.release)

        drop_expired = traced(Pool.drop_expired)

    with Traced(TcpConnection, {**options_for(server), "lifetime": 0}, reap_interval=0.02) as pool:
        with pool.connection():
            assert calls == ["acquire"]
        assert calls == ["acquire", "release"]
        reaped.clear()  # it came while the pool dialled, perhaps
        assert reaped.wait(BOUND)
        assert pool.stats().closed["expired"] == 1


def test_a_line_protocol_may_keep_what_it_has_read_in_a_buffer_of_its_own(server: LineEchoServer) -> None:
    class Lines(TcpConnection):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._buffer = b""
            self._options = options

        def line(self) -> bytes:
            while b"\n" not in self._buffer:
                self._buffer += self.recv(3)
            line, _, self._buffer = self._buffer.partition(b"\n")
            return line

    with Pool(Lines, options_for(server)) as pool, pool.connection(timeout=5) as conn:
        conn.send(b"one of some length\nand another\n")
        assert [conn.line(), conn.line()] == [b"one of some length", b"and another"]


def test_a_wrong_call_is_named_as_the_user_has_written_it() -> None:
    with pytest.raises(TypeError, match=r"^Pool\.__init__\(\) got an unexpected keyword argument 'size'$"):
        Pool(TcpConnection, size=3)  # type: ignore[call-arg]
    pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": 1})
    with pytest.raises(TypeError, match=r"^Pool\.acquire\(\) "):
        pool.acquire(1, 2, 3)  # type: ignore[call-arg]
    pool.close()


def test_a_pool_can_be_neither_copied_nor_pickled() -> None:
    pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": 1})
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            attempt(pool)
    pool.close()

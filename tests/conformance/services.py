"""Real servers as the fault matrix knows them, and what clients of every runtime say to them."""

from __future__ import annotations

import _socket
import os
import select
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Protocol, TypeAlias

import psycopg

from tests.peers import Nginx, Valkey

from .harness import Asyncio, Blocking, Runtime, do, drive
from .hosts import Host
from .kinds import Stream

#: Seconds for whatever should happen soon.
BOUND = 20.0

Reset: TypeAlias = Callable[[Any], Awaitable[None]] | None
#: What happens between a request and the wait for its reply.
Meanwhile: TypeAlias = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """Nothing happens."""


class Process(Protocol):
    """A server process, as `tests.peers` has them."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    def kill(self) -> None: ...
    def start(self) -> None: ...
    def restart(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def connections(self) -> int: ...


class Service:
    """One kind of server.

    Two requests: `ask` is answered at once; `hold` is answered when `let_go` has been called since `arm`. The answer to
    either is its token.

    :param server: the process.
    """

    name: ClassVar[str]
    #: What a request or a dial may raise.
    errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, server: Any) -> None:
        self.server = server

    def port(self, tls: bool) -> int:
        """The server's port."""
        port: int = self.server.port
        return port

    def pool(self, rt: Runtime, port: int, tls: bool, before: Meanwhile, reset: Reset, **options: Any) -> Any:
        """A pool of connections to a port of the server's, or of the proxy's.

        :param tls: whether they begin with a handshake, where the protocol has none of its own.
        :param before: awaited before each dial.
        :param reset: does a round trip when a connection is given back; None: the service's own way.
        """
        raise NotImplementedError

    async def ask(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        raise NotImplementedError

    async def hold(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        raise NotImplementedError

    def limit(self, conn: Any, seconds: float) -> None:
        """From now on a reply that takes longer is an error."""
        conn.socket.settimeout(seconds)

    def alive(self, conn: Any) -> bool:
        """What the pool's check says of it."""
        return bool(conn.check())

    def arm(self) -> None:
        raise NotImplementedError

    def let_go(self) -> None:
        raise NotImplementedError

    def held(self) -> int:
        """How many requests the server holds."""
        raise NotImplementedError

    def is_at_rest(self) -> bool:
        """Whether nothing of a cell is left over on this side."""
        return True


def styled(rt: Runtime, function: Callable[..., Any]) -> Callable[..., Any]:
    """What a runtime's users would write in the place of this coroutine function."""
    return (lambda *arguments: drive(function(*arguments))) if isinstance(rt, Blocking) else function


def with_deeds(kind: type[Any], before: Meanwhile, reset: Reset) -> type[Any]:
    """A subclass that does one thing before it is opened, and another when it is given back."""

    class WithDeeds(kind):  # type: ignore[misc]
        async def open(self) -> None:
            await before()
            await do(super().open())

    async def does(self: Any) -> None:
        assert reset is not None
        await reset(self)

    return WithDeeds if reset is None else type(kind.__name__, (WithDeeds,), {"reset": does})


# -- Valkey --


class Resp(Stream):  # type: ignore[misc]
    """As much of Valkey's protocol as the tests speak."""

    base = "TcpConnection"
    rt: Runtime

    async def ask(self, *words: str, meanwhile: Meanwhile = nothing) -> str | int | None:
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        await do(self.send(f"*{len(words)}\r\n{''.join(parts)}".encode()))
        await meanwhile()
        line = (await do(self.recv_until(b"\r\n"))).decode()
        kind, rest = line[0], line[1:]
        if kind == ":":
            return int(rest)
        if kind == "$":
            return None if rest == "-1" else (await do(self.recv_exactly(int(rest) + 2)))[:-2].decode()
        if kind == "+":
            return str(rest)
        raise ValueError(line)


class Greeted(Resp):
    """Opened when the server has answered, so that a dial is more than what the kernel does."""

    async def open(self) -> None:
        await do(super().open())
        assert await self.ask("PING", "hello") == "hello"


class ValkeyService(Service):
    name = "Valkey"
    server: Valkey

    def pool(self, rt: Runtime, port: int, tls: bool, before: Meanwhile, reset: Reset, **options: Any) -> Any:
        where = {"host": self.server.host, "port": port, "timeout": BOUND}
        return rt.pool(with_deeds(Greeted, before, reset), where, **options)

    async def ask(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        return str(await conn.ask("PING", token, meanwhile=meanwhile))

    async def hold(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        # It waits for an element, and puts it back for the next one.
        assert await conn.ask("BLMOVE", "gate", "gate", "LEFT", "RIGHT", "0", meanwhile=meanwhile) == "open"
        return str(await conn.ask("PING", token))

    def arm(self) -> None:
        self.server.ask("DEL", "gate")

    def let_go(self) -> None:
        self.server.ask("RPUSH", "gate", "open")

    def held(self) -> int:
        return self.server.blocked()


# -- nginx --


class Http(Stream):  # type: ignore[misc]
    """As much of HTTP/1.1 as the tests speak."""

    base = "TcpConnection"
    rt: Runtime

    async def request(self, target: str, meanwhile: Meanwhile = nothing) -> list[str]:
        """Return what was asked, the number that the server gave the connection, and that of the request on it."""
        await do(self.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()))
        await meanwhile()
        head = (await do(self.recv_until(b"\r\n\r\n"))).decode()
        status, *headers = head.split("\r\n")
        assert status == "HTTP/1.1 200 OK", head
        (length,) = (int(line[16:]) for line in headers if line.startswith("Content-Length: "))
        body: bytes = await do(self.recv_exactly(length))
        return body.decode().split()


class Gate(Host):
    """The HTTP server behind nginx: answers each request with its token when the gate is open, and not before."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.way = threading.Event()
        self._held: set[Any] = set()

    def __exit__(self, *error: Any) -> None:
        self.way.set()
        super().__exit__(*error)

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def is_at_rest(self) -> bool:
        """Whether it serves nobody."""
        return not any(thread.is_alive() for thread in self._threads[1:])

    def _answer(self, sock: Any) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                return
            head += data
        token = head.split()[1].partition(b"&token=")[2]
        self._held.add(sock)
        self.way.wait(BOUND)
        self._held.remove(sock)
        sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(token), token))


class NginxService(Service):
    name = "nginx"
    server: Nginx

    def __init__(self, server: Nginx, gate: Gate) -> None:
        super().__init__(server)
        self.gate = gate

    def port(self, tls: bool) -> int:
        return self.server.tls_port if tls else self.server.port

    def pool(self, rt: Runtime, port: int, tls: bool, before: Meanwhile, reset: Reset, **options: Any) -> Any:
        where = {"host": self.server.host, "port": port, "timeout": BOUND}
        if tls:
            where |= {"tls": self.server.tls, "server_hostname": "localhost"}
        return rt.pool(with_deeds(Http, before, reset), where, **options)

    async def ask(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        return str((await conn.request(f"/echo?{token}", meanwhile))[0])

    async def hold(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        return str((await conn.request(f"/upstream?port={self.gate.port}&token={token}", meanwhile))[0])

    def arm(self) -> None:
        self.gate.way.clear()

    def let_go(self) -> None:
        self.gate.way.set()

    def held(self) -> int:
        return self.gate.held

    def is_at_rest(self) -> bool:
        return self.gate.is_at_rest


# -- PostgreSQL --


async def connect(rt: Runtime, dsn: str) -> Any:
    """A connection of psycopg's, in the runtime's style. For greenlets the standard library must be patched."""
    if isinstance(rt, Asyncio):
        return await psycopg.AsyncConnection.connect(dsn)
    return psycopg.connect(dsn)


async def query(conn: Any, text: str, *parameters: object) -> Any:
    """The first column of the first row."""
    cursor = await do(conn.execute(text.encode(), parameters))
    row = await do(cursor.fetchone())
    return row[0]


def fresh(conn: Any) -> bool:
    """Whether the server has said nothing while the connection idled; a look that never waits.

    ``conn.closed`` alone does not do: it stays False until the connection is used the next time.
    """
    return not conn.closed and not select.select([conn], [], [], 0)[0]


def postgres_pool(
    rt: Runtime, dsn: str, before: Meanwhile = nothing, reset: Reset = None, check: Any = fresh, **options: Any
) -> Any:
    """A pool of psycopg's connections, which are rolled back when they are given back."""

    async def opened() -> Any:
        await before()
        return await connect(rt, dsn)

    async def make_as_new(conn: Any) -> None:
        if reset is not None:
            await reset(conn)
        await do(conn.rollback())

    async def close(conn: Any) -> None:
        await do(conn.close())

    wrapped = rt.api.wrap(styled(rt, opened), styled(rt, close), check, styled(rt, make_as_new))
    pool = rt.api.Pool(wrapped, **options)
    rt.watch(pool)
    return pool


class PostgresService(Service):
    name = "PostgreSQL"
    errors = (psycopg.OperationalError,)
    _gate: psycopg.Connection[Any] | None = None

    def pool(self, rt: Runtime, port: int, tls: bool, before: Meanwhile, reset: Reset, **options: Any) -> Any:
        return postgres_pool(rt, psycopg.conninfo.make_conninfo(self.server.dsn, port=port), before, reset, **options)

    async def ask(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        return str(await query(conn, "SELECT %s", token))

    async def hold(self, conn: Any, token: str, meanwhile: Meanwhile = nothing) -> str:
        return str(await query(conn, "SELECT %s FROM pg_advisory_xact_lock_shared(1)", token))

    def alive(self, conn: Any) -> bool:
        # Not `fresh`: in eventlet its select() is an error where the pool watches the connection already.
        try:
            same = _socket.socket(fileno=os.dup(conn.fileno()))
        except (OSError, psycopg.OperationalError):  # closed, by the pool
            return False
        try:
            same.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        finally:
            same.close()
        return False

    def arm(self) -> None:
        self.let_go()
        self._gate = psycopg.connect(self.server.dsn, autocommit=True, application_name="asking")
        self._gate.execute("SELECT pg_advisory_lock(1)")

    def let_go(self) -> None:
        if self._gate is not None:
            self._gate.close()

    def held(self) -> int:
        assert self._gate is not None
        row = self._gate.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone()
        assert row is not None
        return int(row[0])

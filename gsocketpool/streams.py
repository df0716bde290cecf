"""Connections for asyncio: the byte streams of :mod:`gsocketpool.connection`, with ``await`` where they may wait.

They use sockets that do not block, and ask the loop for no more than to say when one can be read or written. So nothing
is read ahead of what somebody has asked for, a cancelled call has taken nothing that it does not give back,
:meth:`~StreamConnection.check` sees what the kernel sees, and any loop will do that has ``add_reader()``: uvloop has.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from time import monotonic
from typing import Any, TypeVar

from gsocketpool import connection
from gsocketpool.arguments import whole_number
from gsocketpool.connection import _READ_AT_MOST, _READ_SIZE, AnyStream, _Place, _Socket, _Tcp, _Unix
from gsocketpool.sockets import wrap_tls

__all__ = ["Connection", "StreamConnection", "TcpConnection", "UnixConnection"]

logger = logging.getLogger("gsocketpool")

T = TypeVar("T")

#: So often in a row is a socket used without waiting; then others get a turn, also if the peer is always faster.
_AT_A_STRETCH = 16


#: Seconds by which a timer may come too early: uvloop counts in whole milliseconds.
_EARLY = 0.002


class Connection(connection.Connection):
    """What a pool asks of a connection: :class:`gsocketpool.Connection`, with methods that may be ``async``.

    A subclass defines :meth:`open`, :meth:`close`, ``check()``, ``reset()`` and ``keepalive()`` as plain methods or as
    ``async`` ones, each as it likes. The others, ``is_connected()``, ``is_expired()`` and ``fileno()``, are plain.
    """

    __slots__ = ()

    async def reconnect(self) -> None:
        """Close the connection if it is connected, then open it. A pool never calls it.

        An :exc:`Exception` on the way is logged under ``gsocketpool`` and not raised: ``is_connected()`` says how it
        went. A cancellation, or whatever else is no :exc:`Exception`, is raised.
        """
        try:
            if self.is_connected():
                await _result(self.close())
            await _result(self.open())
        except Exception:
            logger.exception("cannot reconnect a %s", type(self).__qualname__)


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class _Done(Awaitable[None]):
    """For who awaits what has been done already."""

    def __await__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(())


_DONE = _Done()


class StreamConnection(AnyStream, Connection):
    """A byte stream over a socket: what :class:`TcpConnection` and :class:`UnixConnection` share."""

    _runtime = "gsocketpool.asyncio"

    def __init__(self, lifetime: float | None, timeout: float | None, connect_timeout: float | None) -> None:
        super().__init__(lifetime, timeout, connect_timeout)
        # Who waits to read, or to write, by descriptor: besides the open socket there may be one that is connecting.
        self._waiting: dict[tuple[int, bool], list[asyncio.Future[None]]] = {}
        self._at_a_stretch = 0

    # Open and closed

    async def open(self) -> None:
        """Connect to the peer. If that fails, takes too long or is cancelled, nothing is left behind.

        It may take ``connect_timeout`` seconds, or ``timeout`` where that is not given. Each address gets its share of
        the time that is left, so that one that does not answer leaves some for the others.

        :raises TimeoutError: if it takes longer.
        :raises OSError: if no address can be connected to: an error of the last one's type that names them all.
        :raises RuntimeError: if the connection is open, or being opened.
        """
        attempt = self._begin()
        try:
            sock, tls = await self._dial()
        except BaseException:
            if self._attempt is attempt:
                self._attempt = None
            raise
        finally:
            self._unready = None
        self._finish(attempt, sock, tls)

    def close(self) -> Awaitable[None]:
        """Close the socket, at once. If it is closed already, nothing is done.

        It waits for nothing, also not for the peer's goodbye under TLS: what it returns need not be awaited, and can
        be. Calls off an :meth:`open` under way, which then raises :exc:`ConnectionAbortedError`; so does whoever waits
        in another method.
        """
        self._attempt = None
        sock = self._sock
        self._sock = self._tls_socket = None
        self._read_ahead = bytearray()
        if sock is not None:
            for writing in (False, True):
                self._call_off(sock.fileno(), writing)
            sock.close()
        return _DONE

    def _peek(self, sock: _Socket) -> bytes:
        return socket.socket.recv(sock, 1, socket.MSG_PEEK)

    # Use

    async def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send all of ``data``.

        If it fails or is cancelled, any part of ``data`` may have been sent: close such a connection.

        :param data: bytes, or any other object with a contiguous buffer.
        :returns: how many bytes were sent: all.
        :raises TypeError: if ``data`` is a ``str``, or anything else without a buffer.
        :raises TimeoutError: if the peer took nothing for ``timeout`` seconds.
        :raises ConnectionError: if the connection is not open, or broken.
        """
        sock = self._sock
        if sock is None:
            raise self._not_open()
        view = memoryview(data if type(data) is bytes else connection._view(data))
        size, sent = len(view), 0
        while sent < size:
            sent += await self._patiently(sock, sock.send, view[sent:], f"did not take {size} bytes", writing=True)
        return size

    async def recv(self, size: int = 1024) -> bytes:
        """Receive what has come, one byte at least. ``b""`` means that the peer has ended the stream.

        Cancelled, it has taken nothing.

        :param size: most bytes to return, at least 1.
        :raises TimeoutError: if nothing came for ``timeout`` seconds.
        :raises ConnectionError: if the connection is not open, or broken.
        """
        whole_number("size", size, 1)
        sock = self._sock
        if sock is None:
            raise self._not_open()
        if self._read_ahead:
            return self._take(self._read_ahead, size)
        return await self._receive(sock, size)

    async def recv_exactly(self, n: int) -> bytes:
        """Receive ``n`` bytes. What follows them is left in the socket.

        What had come when it fails or is cancelled is not lost: the next receiving call returns it.

        :param n: how many, 0 or more.
        :raises EndOfStreamError: if the peer ended the stream before.
        :raises TimeoutError: if nothing came for ``timeout`` seconds.
        :raises ConnectionError: if the connection is not open, or broken.
        """
        whole_number("n", n, 0)
        sock, buffer = self._sock, self._read_ahead
        if sock is None:
            raise self._not_open()
        while len(buffer) < n:
            data = await self._receive(sock, min(n - len(buffer), _READ_AT_MOST))
            if len(data) == n:
                return data  # in one piece, as usual
            if not data:
                raise self._ended(f"{len(buffer)} of {n} bytes")
            buffer += data
        return self._take(buffer, n)

    async def recv_until(self, sep: bytes | bytearray, limit: int = 65536) -> bytes:
        r"""Receive up to the next ``sep``, and return what came before it, without it.

        What came after it is kept for the next receiving call; until then :meth:`check` is False. What had come when it
        fails or is cancelled is not lost either.

        :param sep: what ends the message, ``b"\r\n"`` for instance.
        :param limit: most bytes to accept before ``sep``.
        :raises LimitExceededError: if ``limit`` bytes came without a ``sep`` after them.
        :raises EndOfStreamError: if the peer ended the stream before.
        :raises TimeoutError: if nothing came for ``timeout`` seconds.
        :raises ConnectionError: if the connection is not open, or broken.
        """
        connection._separator(sep)
        whole_number("limit", limit, 1)
        sock, buffer = self._sock, self._read_ahead
        if sock is None:
            raise self._not_open()
        searched = 0
        while True:
            message = self._take_message(buffer, sep, limit, searched)
            if message is not None:
                return message
            searched = max(0, len(buffer) - len(sep) + 1)
            data = await self._receive(sock, _READ_SIZE)
            if not data:
                raise self._ended(f"{len(buffer)} bytes without {bytes(sep)!r}")
            buffer += data

    async def _receive(self, sock: _Socket, size: int) -> bytes:
        return await self._patiently(sock, sock.recv, size, "sent nothing", writing=False)

    async def _patiently(self, sock: _Socket, use: Callable[[Any], T], argument: Any, what: str, writing: bool) -> T:
        """Return what ``use(argument)`` returns once it need not wait; ``what`` the peer did if it takes too long."""
        self._at_a_stretch += 1
        if self._at_a_stretch > _AT_A_STRETCH:
            self._at_a_stretch = 0
            await asyncio.sleep(0)
        while True:
            try:
                return use(argument)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                turned = _wants_to_write(error, writing)
            except OSError as error:
                if self._sock is not sock:
                    raise self._closed_meanwhile("being used") from error
                if isinstance(error, TimeoutError):
                    raise self._timed_out(what, None, error) from error
                raise
            try:
                await self._ready(sock, turned, self._timeout)
            except TimeoutError as error:
                raise self._timed_out(what, self._timeout, error) from error

    # Waiting

    async def _ready(self, sock: _Socket, writing: bool, seconds: float | None) -> None:
        """Wait until the socket can be read, or written.

        :raises TimeoutError: if it takes longer than ``seconds``.
        :raises ConnectionAbortedError: if it is closed.
        """
        self._at_a_stretch = 0
        loop = asyncio.get_running_loop()
        descriptor = sock.fileno()
        waiting = self._waiting.setdefault((descriptor, writing), [])
        if not waiting:
            (loop.add_writer if writing else loop.add_reader)(descriptor, _wake, waiting)
        woken: asyncio.Future[None] = loop.create_future()
        waiting.append(woken)
        timer = None if seconds is None else loop.call_later(seconds + _EARLY, _give_up, woken)
        try:
            await woken
        finally:
            if timer is not None:
                timer.cancel()
            if self._waiting.get((descriptor, writing)) is waiting:  # else it was called off
                waiting.remove(woken)
                if not waiting:
                    del self._waiting[descriptor, writing]
                    (loop.remove_writer if writing else loop.remove_reader)(descriptor)

    def _call_off(self, descriptor: int, writing: bool) -> None:
        """Wake who waits for a descriptor that is about to be closed."""
        waiting = self._waiting.pop((descriptor, writing), None)
        if not waiting:
            return
        loop = waiting[0].get_loop()
        if loop.is_closed():
            return
        (loop.remove_writer if writing else loop.remove_reader)(descriptor)
        for woken in waiting:
            if not woken.done():
                woken.set_exception(self._closed_meanwhile("being used"))

    # Dialling

    async def _resolve(self, seconds: float | None) -> list[_Place]:
        """Return the places to try, in order."""
        raise NotImplementedError

    async def _reach(self, sock: _Socket, address: Any, deadline: float | None) -> None:
        """Connect the socket."""
        raise NotImplementedError

    async def _secure(self, sock: _Socket, deadline: float | None) -> ssl.SSLSocket | None:
        """Set up TLS on a socket that has connected, if it is wanted."""
        return None

    async def _dial(self) -> tuple[_Socket, ssl.SSLSocket | None]:
        seconds, deadline = self._allowance()
        places = await self._resolve(seconds)
        failures: connection._Failures = []
        for done, (family, proto, address, name) in enumerate(places):
            share = None if deadline is None else (deadline - monotonic()) / (len(places) - done)
            if share is not None and share <= 0:
                break
            try:
                return await self._connect(family, proto, address, share)
            except OSError as error:
                failures.append((f"{name}: {self._reason(error, share)}", error))
        try:
            raise self._cannot_connect(failures, seconds, deadline)
        finally:
            # An error refers to this frame. If the frame referred to errors, all of it would wait for the collector.
            del failures

    async def _connect(
        self, family: int, proto: int, address: Any, seconds: float | None
    ) -> tuple[_Socket, ssl.SSLSocket | None]:
        deadline = None if seconds is None else monotonic() + seconds
        sock = self._unready = socket.socket(family, socket.SOCK_STREAM, proto)
        try:
            sock.setblocking(False)
            self._prepare(sock)
            await self._reach(sock, address, deadline)
            tls = await self._secure(sock, deadline)
        except BaseException:
            sock.close()
            raise
        return (sock if tls is None else tls), tls

    async def _shake_hands(self, tls: ssl.SSLSocket, deadline: float | None) -> None:
        while True:
            try:
                return tls.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                writing = _wants_to_write(error, False)
            await self._ready(tls, writing, _left(deadline))


class TcpConnection(_Tcp, StreamConnection):
    """A TCP connection for asyncio, over IPv4 or IPv6, with TLS if wanted.

    :class:`gsocketpool.TcpConnection`, with its parameters; what may wait is awaited. Every address that ``host``
    resolves to is tried, in the resolver's order. A connection can be opened again after it was closed. It belongs to
    no loop, but to who waits in it: use it in one loop at a time.

    :param host: name or address of the server.
    :param port: its port.
    :param lifetime: seconds after which the connection counts as expired; None: never.
    :param timeout: seconds that one wait for the peer may take while sending or receiving; None or 0: no limit.
    :param connect_timeout: seconds for all of :meth:`open`: look-up, connect and TLS handshake; None: ``timeout``.
    :param tls: True: verify the server's certificate, and that it is for ``server_hostname``, against the system's
        authorities (one :func:`ssl.create_default_context` for all connections). An :class:`ssl.SSLContext` is used as
        it is. None or False: no TLS.
    :param server_hostname: the server's name for TLS; None: ``host``.
    :param nodelay: send small pieces at once (``TCP_NODELAY``).
    :param tcp_keepalive: as :class:`gsocketpool.TcpConnection` takes it.
    :param source_address: ``(host, port)`` to connect from, as in :func:`socket.create_connection`.
    :raises TypeError, ValueError: if a parameter is wrong, naming it.
    """

    async def start_tls(self, context: bool | ssl.SSLContext = True, server_hostname: str | None = None) -> None:
        """Go on with TLS on the open connection, as protocols with a ``STARTTLS`` command do.

        It may take as long as :meth:`open`. If it fails or is cancelled, the connection is closed.

        :param context: as the constructor's ``tls``.
        :param server_hostname: as the constructor's; None: the one that was given there.
        :raises ConnectionError: if the connection is not open, or bytes have arrived after the server's reply: somebody
            on the way may have put them there, to be taken for the server's words under TLS.
        :raises RuntimeError: if TLS runs on it already.
        :raises TimeoutError: if it takes too long.
        :raises OSError: if the handshake fails, an ``ssl.SSLError`` if TLS says so.
        """
        tls_context, name, sock = self._tls_to_start(context, server_hostname)
        seconds, deadline = self._allowance()
        try:
            self._trust_no_bytes(sock)
            # From here on close() has to close the new socket: it has taken over the descriptor.
            self._sock = self._tls_socket = tls = wrap_tls(sock, tls_context, name)
            await self._shake_hands(tls, deadline)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise self._no_tls(error, seconds) from error

    async def _resolve(self, seconds: float | None) -> list[_Place]:
        place = connection._literal(self._host, self._port)
        if place is not None:
            return [place]
        try:
            return connection._places(await _within(seconds, self._getaddrinfo(self._host, self._port)))
        except OSError as error:
            raise self._unknown_name(error, seconds) from error

    async def _getaddrinfo(self, host: str, port: int) -> list[tuple[Any, ...]]:
        return [*await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)]

    async def _reach(self, sock: _Socket, address: Any, deadline: float | None) -> None:
        try:
            return sock.connect(address)
        except BlockingIOError:
            await self._ready(sock, True, _left(deadline))
        failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))

    async def _secure(self, sock: _Socket, deadline: float | None) -> ssl.SSLSocket | None:
        self._vet(sock)
        if self._default_tls is None:
            return None
        self._unready = tls = wrap_tls(sock, self._default_tls, self._server_hostname)
        try:
            await self._shake_hands(tls, deadline)
        except BaseException:
            tls.close()
            raise
        return tls


class UnixConnection(_Unix, StreamConnection):
    """A connection over a Unix domain socket for asyncio. It can be opened again after it was closed.

    :param path: path of the socket; or a name that begins with a zero byte, in Linux' abstract namespace.
    :param lifetime: seconds after which the connection counts as expired; None: never.
    :param timeout: seconds that one wait for the peer may take while sending or receiving; None or 0: no limit.
    :param connect_timeout: seconds for :meth:`open`; None: ``timeout``.
    :raises TypeError, ValueError: if a parameter is wrong, naming it.
    """

    async def _resolve(self, seconds: float | None) -> list[_Place]:
        return [(socket.AF_UNIX, 0, self._path, self._endpoint)]

    async def _reach(self, sock: _Socket, address: Any, deadline: float | None) -> None:
        # While the server's queue is full the kernel says "try again", and has no event for when.
        pause = 0.001
        while True:
            try:
                return sock.connect(address)
            except BlockingIOError as error:
                if deadline is not None and monotonic() >= deadline:
                    raise TimeoutError from error
            await self._sleep(pause)
            pause = min(2 * pause, 0.1)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _wants_to_write(error: OSError, writing: bool) -> bool:
    """Whether to wait until the socket can be written; ``writing`` says what is being done with it."""
    if isinstance(error, ssl.SSLError):
        return isinstance(error, ssl.SSLWantWriteError)
    return writing


def _wake(waiting: list[asyncio.Future[None]]) -> None:
    for woken in waiting:
        if not woken.done():
            woken.set_result(None)


def _give_up(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_exception(TimeoutError())


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - monotonic(), 0)


async def _within(seconds: float | None, doing: Coroutine[Any, Any, T]) -> T:
    """Return what ``doing`` returns; if that takes longer than ``seconds``, cancel it and raise a TimeoutError."""
    # Not wait_for(), which before Python 3.12 could lose a cancellation.
    task = asyncio.ensure_future(doing)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()
        task.add_done_callback(_ignore)


def _ignore(task: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for any more."""
    if not task.cancelled():
        task.exception()

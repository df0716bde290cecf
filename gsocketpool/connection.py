"""What a pool asks of a connection, and the connections that come with the package.

* :class:`Connection` is the contract: a few methods, most of them with a useful default. Inherit it to pool a protocol
  of your own.
* :func:`wrap` pools objects that know nothing of the contract, a database driver's for instance.
* :class:`TcpConnection` and :class:`UnixConnection` are byte streams over a socket.

Seconds are ``int`` or ``float``.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # else the first dial would: see Pool._settle_in of threading.py
import functools
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from gsocketpool.arguments import is_int, seconds, whole_number
from gsocketpool.sockets import GeventSockets

if TYPE_CHECKING:
    # At run time only where TLS is used: gevent's monkey patching warns of an `ssl` that is in use already.
    import ssl

__all__ = [
    "Connection",
    "EndOfStreamError",
    "LimitExceededError",
    "StreamConnection",
    "TcpConnection",
    "UnixConnection",
    "Wrap",
    "wrap",
]

logger = logging.getLogger("gsocketpool")

C = TypeVar("C")

_Socket = socket.socket  # `socket` is a property in the classes below

#: A place to connect to: address family, protocol number, address as ``connect()`` takes it, and its name in errors.
_Place = tuple[int, int, Any, str]

#: The addresses that could not be connected to, each with why, and the error.
_Failures = list[tuple[str, OSError]]

_READ_SIZE = 8192  # asked for at once where nobody knows how much is to come
_READ_AT_MOST = 256 * 1024  # asked for at once where it is known: recv() allocates all of it beforehand


class Connection:
    """What a pool asks of a connection: the base class of all that can be pooled.

    A subclass defines :meth:`open`, :meth:`close` and :meth:`is_connected`; the other methods have defaults. There is
    no ``__init__`` to call and no attribute, so that extension types, and classes with a ``__getattr__`` of their own,
    can inherit it beside anything else.

    A pool calls these methods and no others, and tells connections apart by identity alone. What they return is typed
    as ``object`` where a pool of :mod:`gsocketpool.asyncio` takes an ``async`` method too.
    """

    __slots__ = ()

    def open(self) -> object:
        """Open the connection. A pool calls it once, in a greenlet of its own, and raises what it raises."""
        raise NotImplementedError(f"{type(self).__qualname__} does not define open()")

    def close(self) -> object:
        """Close the connection. A pool calls it once, and logs what it raises."""
        raise NotImplementedError(f"{type(self).__qualname__} does not define close()")

    def is_connected(self) -> bool:
        """Return whether this side holds the connection open: it was opened here, and not yet closed here.

        A peer that hung up is :meth:`check`'s to find, and the connection to it still has to be closed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not define is_connected()")

    def is_expired(self) -> bool:
        """Return whether the connection is too old to be kept: by default never.

        A pool asks when it reaps, and in ``drop_expired()``.
        """
        return False

    def get(self) -> Any:
        """Return the raw connection, for users: by default the connection itself. A pool never calls it."""
        return self

    def reconnect(self) -> object:
        """Close the connection if it is connected, then open it. A pool never calls it.

        An :exc:`Exception` on the way is logged under ``gsocketpool`` and not raised, as it always was here:
        :meth:`is_connected` says how it went. A kill, or whatever else is no :exc:`Exception`, is raised.
        """
        try:
            if self.is_connected():
                self.close()
            self.open()
        except Exception:
            # Its class alone, since a repr is the user's code, and might rely on the connection.
            logger.exception("cannot reconnect a %s", type(self).__qualname__)
        return None

    def check(self) -> object:
        """Return whether the connection can be lent: by default :meth:`is_connected`. Must not block.

        A pool asks before it lends a connection that idled longer than ``check_after_idle``, and when something can be
        read on an idle one whose :meth:`fileno` it knows. False or an exception discards the connection; None passes,
        since what raises when something is wrong often returns nothing.
        """
        return bool(self.is_connected())

    def reset(self) -> object:
        """Make the connection ready for its next borrower: by default nothing is done.

        A pool calls it on release, before anybody else can get the connection. An exception discards the connection.
        """

    def keepalive(self) -> object:
        """Make sure that neither the peer nor anything on the way gives the connection up: by default :meth:`check`.

        A pool with ``keepalive`` calls it on idle connections, in a greenlet of its own: it may wait for the peer's
        answer. False or an exception discards the connection, and None does not, as for :meth:`check`; so does taking
        longer than ``Pool.keepalive_grace``.
        """
        return self.check()

    def fileno(self) -> int | None:
        """Return the descriptor of the socket, None if there is none, or none is known: the default.

        With it a pool notices that a peer hung up while the connection idles, without waiting for a borrower; and after
        a fork it can cut the child's copy off.
        """
        return None


# Any object can be pooled


def _close_it(connection: Any) -> None:
    connection.close()


@dataclass(frozen=True, eq=False, slots=True)
class Wrap(Generic[C]):
    """How to open, and how to treat, objects that are no :class:`Connection`: what :func:`wrap` returns.

    Calling it opens one.
    """

    open: Callable[..., C]
    close: Callable[[C], object]
    check: Callable[[C], object] | None
    reset: Callable[[C], object] | None
    keepalive: Callable[[C], object] | None
    fileno: Callable[[C], int | None] | None = None

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable, not {getattr(self, name)!r}")
        for name in ("check", "reset", "keepalive", "fileno"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable or None, not {getattr(self, name)!r}")

    def __call__(self, **options: Any) -> C:
        """Return ``open(**options)``."""
        return self.open(**options)


@overload
def wrap(
    open: Callable[..., Awaitable[C]],
    close: Callable[[C], object] = _close_it,
    check: Callable[[C], object] | None = None,
    reset: Callable[[C], object] | None = None,
    keepalive: Callable[[C], object] | None = None,
    fileno: Callable[[C], int | None] | None = None,
) -> Wrap[C]: ...
@overload
def wrap(
    open: Callable[..., C],
    close: Callable[[C], object] = _close_it,
    check: Callable[[C], object] | None = None,
    reset: Callable[[C], object] | None = None,
    keepalive: Callable[[C], object] | None = None,
    fileno: Callable[[C], int | None] | None = None,
) -> Wrap[C]: ...
def wrap(
    open: Callable[..., Any],
    close: Callable[[Any], object] = _close_it,
    check: Callable[[Any], object] | None = None,
    reset: Callable[[Any], object] | None = None,
    keepalive: Callable[[Any], object] | None = None,
    fileno: Callable[[Any], int | None] | None = None,
) -> Wrap[Any]:
    """Say how to pool objects that are no :class:`Connection`.

    ::

        pool = Pool(wrap(lambda: psycopg.connect(dsn), check=lambda c: not c.closed, reset=lambda c: c.rollback()))

    The pool lends the very objects that ``open`` returns, and has their type, here ``Pool[psycopg.Connection]``. For a
    pool of :mod:`gsocketpool.asyncio` each function but ``fileno`` may be an ``async`` one.

    :param open: called with the pool's ``options``; returns a new object, open and ready for use.
    :param close: called with the object when its time is over. By default its own ``close()``.
    :param check: called with an object that idled; False or an exception: it cannot be lent. What answers None has
        passed, as a ``ping()`` does: write ``c.sock is not None``, not ``c.sock``. Must not block. Not given: all can.
    :param reset: called with an object that was given back; an exception discards the object. None: nothing to do.
    :param keepalive: called with an object that has idled for the pool's ``keepalive`` seconds; may wait for the peer.
        False or an exception discards the object. None: ``check``.
    :param fileno: called with an object; returns the descriptor of its socket, or None. See :meth:`Connection.fileno`.
        None: the object's own ``fileno()``, if its class has one.
    :raises TypeError: if one of them cannot be called.
    """
    return Wrap(open, close, check, reset, keepalive, fileno)


# Byte streams


class EndOfStreamError(ConnectionError, EOFError):
    """The peer ended the stream before all that was asked for had come."""


class LimitExceededError(ConnectionError):
    """The peer sent more than ``recv_until()`` was to accept."""


class AnyStream(Connection):
    """What streams of all runtimes share: nothing here waits."""

    #: The module that has the pool for it.
    _runtime: str

    _endpoint: str  # the peer's name in errors

    def __init__(self, lifetime: float | None, timeout: float | None, connect_timeout: float | None) -> None:
        self._lifetime = None if lifetime is None else seconds("lifetime", lifetime, zero=True)
        self._timeout = None if timeout is None else seconds("timeout", timeout, zero=True) or None  # 0 as in 0.1.6
        self._connect_timeout = (
            None if connect_timeout is None else seconds("connect_timeout", connect_timeout, zero=False)
        )
        self._sock: _Socket | None = None
        self._tls_socket: ssl.SSLSocket | None = None  # the same socket, if TLS runs on it
        self._read_ahead = bytearray()  # came after a separator, and nobody has asked for it yet
        self._opened_at = 0.0
        self._attempt: object = None  # the open() that is under way, if it has not been called off
        self._unready: _Socket | None = None  # what it is connecting

    # Open and closed

    def is_connected(self) -> bool:
        """Return whether the connection was opened here and not yet closed here; a peer may be gone: :meth:`check`."""
        return self._sock is not None

    def is_expired(self) -> bool:
        """Return whether the connection has been open for longer than ``lifetime``; False while it is not open."""
        if self._sock is None or self._lifetime is None:
            return False
        return monotonic() - self._opened_at > self._lifetime

    def check(self) -> bool:
        """Return whether the connection is fit for a request: open, not ended by the peer, and no byte has arrived.

        Bytes that arrive before a request was sent are the rest of an earlier reply, or garbage, and would be taken for
        the next reply. The look at what has arrived never waits.

        Under TLS, what arrives may be no data: servers send session tickets unasked (TLS 1.3), and say goodbye in a
        record of their own before they end the TCP stream. So there TLS reads what has arrived, without waiting for
        more. A ticket does no harm, a goodbye is an end of the stream, and data stays to be received.
        """
        sock, tls = self._sock, self._tls_socket
        if sock is None or self._read_ahead:
            return False
        try:
            if tls is not None:
                return self._has_no_data(tls)
            self._peek(sock)
            return False  # the end of the stream, or a byte of data
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _has_no_data(self, tls: ssl.SSLSocket) -> bool:
        import ssl

        timeout = tls.gettimeout()
        tls.setblocking(False)
        try:
            self._read_ahead += tls.recv(_READ_SIZE)
            return False
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True
        finally:
            tls.setblocking(True)  # eventlet's sockets need to be told
            tls.settimeout(timeout)

    def _peek(self, sock: _Socket) -> bytes:
        """Return one byte that has arrived, from below TLS, and leave it there; BlockingIOError if none has."""
        raise NotImplementedError

    def fileno(self) -> int | None:
        """Return the socket's descriptor, also while it is being connected; None if there is no socket."""
        sock = self._sock or self._unready
        descriptor = -1 if sock is None else sock.fileno()
        return None if descriptor < 0 else descriptor

    # Use

    @property
    def socket(self) -> _Socket:
        """The raw socket, or the TLS socket: gevent's here, another runtime's elsewhere.

        What :meth:`recv_until` has read ahead cannot be read from it.

        :raises ConnectionError: if the connection is not open.
        """
        if self._sock is None:
            raise self._not_open()
        return self._sock

    def get(self) -> _Socket:
        """Return :attr:`socket`."""
        return self.socket

    def _take(self, buffer: bytearray, size: int) -> bytes:
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken

    def _take_message(self, buffer: bytearray, sep: bytes | bytearray, limit: int, searched: int) -> bytes | None:
        """Take what comes before ``sep``, and ``sep`` with it; None if more has to come.

        :param searched: no separator begins before.
        """
        at = buffer.find(sep, searched)
        if at > limit or (at < 0 and len(buffer) >= limit + len(sep)):
            raise LimitExceededError(f"{self._endpoint} sent more than {limit} bytes without {bytes(sep)!r}")
        if at < 0:
            return None
        message = self._take(buffer, at)
        del buffer[: len(sep)]
        return message

    def _not_open(self) -> ConnectionError:
        return ConnectionError(f"{self!r} is not open: call open() first")

    def _closed_meanwhile(self, doing: str) -> ConnectionAbortedError:
        return ConnectionAbortedError(f"the connection to {self._endpoint} was closed while it was {doing}")

    def _ended(self, after: str) -> EndOfStreamError:
        return EndOfStreamError(f"{self._endpoint} ended the stream after {after}")

    def _timed_out(self, what: str, seconds: float | None, error: TimeoutError) -> TimeoutError:
        if error.errno is not None:
            return TimeoutError(error.errno, f"{self._endpoint}: {error.strerror}")  # the kernel gave the peer up
        return TimeoutError(f"{self._endpoint} {what} within {seconds} s")

    def __repr__(self) -> str:
        state = "closed" if self._sock is None else "open" if self._tls_socket is None else "open, TLS"
        return f"<{type(self).__qualname__} {self._endpoint} ({state})>"

    # Dialling

    def _begin(self) -> object:
        """Return what stands for an ``open()`` that begins."""
        if self._sock is not None:
            raise RuntimeError(
                f"{self!r} is open already: close() it before you open() it again, and leave it to a pool to open what "
                "its factory returns"
            )
        if self._attempt is not None:
            raise RuntimeError(f"{self!r} is being opened already")
        attempt = self._attempt = object()
        return attempt

    def _finish(self, attempt: object, sock: _Socket, tls: ssl.SSLSocket | None) -> None:
        """End the ``open()`` that has opened these, unless a ``close()`` has called it off."""
        if self._attempt is attempt:
            self._opened_at = monotonic()
            self._read_ahead = bytearray()
            self._sock, self._tls_socket = sock, tls
            # Once more, since another thread may close() at any moment: either it has seen the socket, or this sees it.
            if self._attempt is attempt:
                return
            self._sock = self._tls_socket = None
        sock.close()
        raise self._closed_meanwhile("being opened")

    def _prepare(self, sock: _Socket) -> None:
        """Set up a socket that is to connect."""

    def _allowance(self) -> tuple[float | None, float | None]:
        """Return how many seconds a dial may take, and when that is over."""
        seconds = self._timeout if self._connect_timeout is None else self._connect_timeout
        return seconds, None if seconds is None else monotonic() + seconds

    def _reason(self, error: OSError, seconds: float | None) -> str:
        """What to say of one address that could not be reached."""
        if isinstance(error, TimeoutError) and error.errno is None and seconds is not None:
            if hasattr(type(self._unready), "do_handshake"):
                return f"connected, and the TLS handshake was not done in {seconds:.2f} s: does it speak TLS?"
            return f"no answer in {seconds:.2f} s"
        return _reason(error)

    def _cannot_connect(self, failures: _Failures, seconds: float | None, deadline: float | None) -> OSError:
        """Return the error for a dial that failed at each of its addresses."""
        late = f" within {seconds:g} s" if deadline is not None and monotonic() >= deadline else ""
        tried = "; ".join(text for text, _ in failures) or ("no time was left to try" if late else "it has no address")
        message = f"cannot connect to {self._endpoint}{late} ({tried})"
        for (_, earlier), (_, later) in itertools.pairwise(failures):
            later.__context__ = earlier
        last = failures[-1][1] if failures else None
        error = TimeoutError(message) if late else _alike(last, message)
        error.__cause__ = last
        return error


class _Tcp(AnyStream):
    """Where a TCP connection leads, and how."""

    def __init__(
        self,
        host: str,
        port: int,
        lifetime: float | None = 600,
        timeout: float | None = None,
        *,
        connect_timeout: float | None = None,
        tls: bool | ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        nodelay: bool = True,
        tcp_keepalive: bool | int | tuple[int, int, int] | None = 60,
        source_address: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(lifetime, timeout, connect_timeout)
        self._host = _host("host", host)
        self._port = _port("port", port)
        self._endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server_hostname = host if server_hostname is None else _host("server_hostname", server_hostname)
        self._default_tls = _tls_context("tls", tls, self._server_hostname)
        if not isinstance(nodelay, bool):
            raise TypeError(f"nodelay must be True or False, not {nodelay!r}")
        self._socket_options = _keepalive_options(tcp_keepalive)
        if nodelay:
            self._socket_options.append((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))
        if source_address is not None:
            given: Any = source_address
            if not isinstance(given, tuple) or len(given) != 2:
                raise TypeError(f"source_address must be a tuple (host, port) or None, not {source_address!r}")
            if source_address[0] != "":  # any address of this machine
                _host("the host of source_address", source_address[0])
            _port("the port of source_address", source_address[1])
        self._source_address = source_address

    __init__.__qualname__ = "TcpConnection.__init__"  # what errors of a wrong call say

    def _unknown_name(self, error: OSError, seconds: float | None) -> OSError:
        """Return the error for a look-up that failed."""
        message = f"cannot connect to {self._endpoint}"
        if isinstance(error, TimeoutError) and error.errno is None:
            return TimeoutError(f"{message} within {seconds:g} s (still looking up the name)")
        return _alike(error, f"{message} (looking up the name: {_reason(error)})")

    def _prepare(self, sock: _Socket) -> None:
        for option in self._socket_options:
            sock.setsockopt(*option)
        if self._source_address is not None:
            sock.bind(self._source_address)

    def _vet(self, sock: _Socket) -> None:
        if sock.getsockname() == sock.getpeername():
            # Where nobody listens, the kernel can connect a socket to itself, if it happens to give it that very port.
            raise ConnectionRefusedError(f"nobody listens on port {self._port}, the socket met itself")

    # TLS on an open connection

    def _tls_to_start(
        self, context: bool | ssl.SSLContext, server_hostname: str | None
    ) -> tuple[ssl.SSLContext, str, _Socket]:
        """Return what ``start_tls()`` needs."""
        name = self._server_hostname if server_hostname is None else _host("server_hostname", server_hostname)
        tls_context = _tls_context("context", context, name)
        if tls_context is None:
            raise TypeError(f"context must be True or an ssl.SSLContext, not {context!r}")
        sock = self.socket
        if self._tls_socket is not None:
            raise RuntimeError(f"{self!r} has started TLS already")
        return tls_context, name, sock

    def _trust_no_bytes(self, sock: _Socket) -> None:
        """Refuse bytes that have arrived before TLS. The end of the stream is the handshake's to report."""
        try:
            arrived = bool(self._read_ahead or self._peek(sock))
        except BlockingIOError:
            return
        if arrived:
            raise ConnectionError(f"bytes from {self._endpoint} have arrived before the TLS handshake: not trusted")

    def _no_tls(self, error: OSError, seconds: float | None) -> OSError:
        """Return the error for a ``start_tls()`` that failed."""
        if isinstance(error, TimeoutError) and error.errno is None:
            return TimeoutError(f"no TLS with {self._endpoint} within {seconds:g} s")
        return _alike(error, f"no TLS with {self._endpoint}: {_reason(error)}")


class _Unix(AnyStream):
    """Where a connection over a Unix socket leads."""

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        lifetime: float | None = 600,
        timeout: float | None = None,
        *,
        connect_timeout: float | None = None,
    ) -> None:
        super().__init__(lifetime, timeout, connect_timeout)
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise TypeError(f"path must be a str, bytes or os.PathLike, not {path!r}")
        self._path = os.fspath(path)
        if not self._path:
            raise ValueError("path must not be empty")
        self._endpoint = os.fsdecode(self._path).replace("\0", "@", 1)

    __init__.__qualname__ = "UnixConnection.__init__"  # likewise


class StreamConnection(GeventSockets, AnyStream):
    """A byte stream over a socket: what :class:`TcpConnection` and :class:`UnixConnection` share."""

    _endpoint: str  # the peer's name in errors

    # Open and closed

    def open(self) -> None:
        """Connect to the peer. If that fails, takes too long or is killed, nothing is left behind.

        It may take ``connect_timeout`` seconds, or ``timeout`` where that is not given. Each address gets its share of
        the time that is left, so that one that does not answer leaves some for the others.

        :raises TimeoutError: if it takes longer.
        :raises OSError: if no address can be connected to: an error of the last one's type that names them all.
        :raises RuntimeError: if the connection is open, or being opened.
        """
        attempt = self._begin()
        try:
            sock, tls = self._dial()
        except BaseException:
            if self._attempt is attempt:
                self._attempt = None
            raise
        finally:
            self._unready = None
        self._finish(attempt, sock, tls)

    def close(self) -> None:
        """Close the socket, without waiting for anything. If it is closed already, nothing is done.

        Calls off an :meth:`open` under way, which then raises :exc:`ConnectionAbortedError`; so does whoever waits in
        another method.
        """
        self._attempt = None
        sock = self._sock
        self._sock = self._tls_socket = None
        self._read_ahead = bytearray()  # not cleared: another thread may be taking from it
        if sock is not None:
            self._hang_up(sock)

    # Use

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send all of ``data``.

        If it fails or is interrupted, any part of ``data`` may have been sent: close such a connection.

        :param data: bytes, or any other object with a contiguous buffer.
        :returns: how many bytes were sent: all.
        :raises TypeError: if ``data`` is a ``str``, or anything else without a buffer.
        :raises TimeoutError: if the peer took none of it for ``timeout`` seconds, or the rest not in as many more.
        :raises ConnectionError: if the connection is not open, or broken.
        """
        sock = self._sock
        if sock is None:
            raise self._not_open()
        view = data if type(data) is bytes else _view(data)
        size = len(view)
        if size:
            try:
                sent = sock.send(view)  # all of it as a rule, and with less ado than sendall()
                if sent < size:
                    sock.sendall(memoryview(view)[sent:])
            except OSError as error:
                self._explain(error, sock, f"did not take {size} bytes")
                raise
        return size

    def recv(self, size: int = 1024) -> bytes:
        """Receive what has come, one byte at least. ``b""`` means that the peer has ended the stream.

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
        return self._receive(sock, size)

    def recv_exactly(self, n: int) -> bytes:
        """Receive ``n`` bytes. What follows them is left in the socket.

        What had come when it fails is not lost: the next receiving call returns it.

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
            data = self._receive(sock, min(n - len(buffer), _READ_AT_MOST))
            if len(data) == n:
                return data  # in one piece, as usual
            if not data:
                raise self._ended(f"{len(buffer)} of {n} bytes")
            buffer += data
        return self._take(buffer, n)

    def recv_until(self, sep: bytes | bytearray, limit: int = 65536) -> bytes:
        r"""Receive up to the next ``sep``, and return what came before it, without it.

        What came after it is kept for the next receiving call; until then :meth:`check` is False. What had come when it
        fails is not lost either.

        :param sep: what ends the message, ``b"\r\n"`` for instance.
        :param limit: most bytes to accept before ``sep``.
        :raises LimitExceededError: if ``limit`` bytes came without a ``sep`` after them.
        :raises EndOfStreamError: if the peer ended the stream before.
        :raises TimeoutError: if nothing came for ``timeout`` seconds.
        :raises ConnectionError: if the connection is not open, or broken.
        """
        _separator(sep)
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
            data = self._receive(sock, _READ_SIZE)
            if not data:
                raise self._ended(f"{len(buffer)} bytes without {bytes(sep)!r}")
            buffer += data

    def _receive(self, sock: _Socket, size: int) -> bytes:
        try:
            data = sock.recv(size)
        except OSError as error:
            self._explain(error, sock, "sent nothing")
            raise
        if self._sock is not sock:
            raise self._closed_meanwhile("being used")
        return data

    def _explain(self, error: OSError, sock: _Socket, what: str) -> None:
        """Raise a better error for one of the socket's, if there is one."""
        if self._sock is not sock:
            raise self._closed_meanwhile("being used") from error
        if isinstance(error, TimeoutError):
            raise self._timed_out(what, sock.gettimeout(), error) from error

    # Dialling

    def _resolve(self, seconds: float | None) -> list[_Place]:
        """Return the places to try, in order."""
        raise NotImplementedError

    def _reach(self, sock: _Socket, address: Any, deadline: float | None) -> None:
        """Connect the socket."""
        sock.connect(address)

    def _secure(self, sock: _Socket, deadline: float | None) -> ssl.SSLSocket | None:
        """Set up TLS on a socket that has connected, if it is wanted."""
        return None

    def _dial(self) -> tuple[_Socket, ssl.SSLSocket | None]:
        seconds, deadline = self._allowance()
        places = self._resolve(seconds)
        failures: _Failures = []
        for done, (family, proto, address, name) in enumerate(places):
            share = None if deadline is None else (deadline - monotonic()) / (len(places) - done)
            if share is not None and share <= 0:
                break
            try:
                return self._connect(family, proto, address, share)
            except OSError as error:
                failures.append((f"{name}: {self._reason(error, share)}", error))
        try:
            raise self._cannot_connect(failures, seconds, deadline)
        finally:
            # An error refers to this frame. If the frame referred to errors, all of it would wait for the collector.
            del failures

    def _connect(
        self, family: int, proto: int, address: Any, seconds: float | None
    ) -> tuple[_Socket, ssl.SSLSocket | None]:
        deadline = None if seconds is None else monotonic() + seconds
        sock = self._unready = self._new_socket(family, proto)
        try:
            with self._time_limit(seconds):
                sock.settimeout(seconds)
                self._prepare(sock)
                self._reach(sock, address, deadline)
                tls = self._secure(sock, deadline)
        except BaseException:
            sock.close()
            raise
        sock = sock if tls is None else tls
        sock.settimeout(self._timeout)
        return sock, tls


class TcpConnection(StreamConnection, _Tcp):
    """A TCP connection, over IPv4 or IPv6, with TLS if wanted.

    Every address that ``host`` resolves to is tried, in the resolver's order. A connection can be opened again after it
    was closed.

    :param host: name or address of the server.
    :param port: its port.
    :param lifetime: seconds after which the connection counts as expired; None: never.
    :param timeout: seconds that one wait for the peer may take while sending or receiving; None or 0: no limit.
    :param connect_timeout: seconds for all of :meth:`open`: look-up, connect and TLS handshake; None: ``timeout``.
    :param tls: True: verify the server's certificate, and that it is for ``server_hostname``, against the system's
        authorities (one :func:`ssl.create_default_context` for all connections). An :class:`ssl.SSLContext`, the
        standard library's or gevent's, is used as it is. None or False: no TLS.
    :param server_hostname: the server's name for TLS; None: ``host``.
    :param nodelay: send small pieces at once (``TCP_NODELAY``).
    :param tcp_keepalive: have the kernel probe a connection on which nothing arrives, so that a peer that vanished is
        noticed, and nothing on the way forgets the connection. Whole seconds: how long it must be silent, and how long
        from probe to probe; or a tuple ``(silent, between, probes)``. True: as the system is set up (on Linux after two
        hours). None or False: not at all.
    :param source_address: ``(host, port)`` to connect from, as in :func:`socket.create_connection`.
    :raises TypeError, ValueError: if a parameter is wrong, naming it.
    """

    def start_tls(self, context: bool | ssl.SSLContext = True, server_hostname: str | None = None) -> None:
        """Go on with TLS on the open connection, as protocols with a ``STARTTLS`` command do.

        It may take as long as :meth:`open`. If it fails, the connection is closed.

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
            with self._time_limit(seconds):
                # From here on close() has to close the new socket: it has taken over the descriptor.
                self._sock = self._tls_socket = tls = self._wrap_tls(sock, tls_context, name)
                _shake_hands(tls, deadline)
            tls.settimeout(self._timeout)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise self._no_tls(error, seconds) from error

    def _resolve(self, seconds: float | None) -> list[_Place]:
        place = _literal(self._host, self._port)
        if place is not None:
            return [place]
        try:
            with self._time_limit(seconds):
                return _places(self._getaddrinfo(self._host, self._port))
        except OSError as error:
            raise self._unknown_name(error, seconds) from error

    def _secure(self, sock: _Socket, deadline: float | None) -> ssl.SSLSocket | None:
        self._vet(sock)
        if self._default_tls is None:
            return None
        self._unready = tls = self._wrap_tls(sock, self._default_tls, self._server_hostname)
        try:
            _shake_hands(tls, deadline)
        except BaseException:
            tls.close()
            raise
        return tls


class UnixConnection(StreamConnection, _Unix):
    """A connection over a Unix domain socket. It can be opened again after it was closed.

    :param path: path of the socket; or a name that begins with a zero byte, in Linux' abstract namespace.
    :param lifetime: seconds after which the connection counts as expired; None: never.
    :param timeout: seconds that one wait for the peer may take while sending or receiving; None or 0: no limit.
    :param connect_timeout: seconds for :meth:`open`; None: ``timeout``.
    :raises TypeError, ValueError: if a parameter is wrong, naming it.
    """

    def _resolve(self, seconds: float | None) -> list[_Place]:
        return [(socket.AF_UNIX, 0, self._path, self._endpoint)]

    def _reach(self, sock: _Socket, address: Any, deadline: float | None) -> None:
        # While the server's queue is full the kernel says "try again", and has no event for when: a connect that
        # waits for one would fail at once (the standard library), or go round and round without a pause (gevent).
        pause = 0.001
        sock.settimeout(0)
        while True:
            try:
                return sock.connect(address)
            except BlockingIOError as error:
                if deadline is not None and monotonic() >= deadline:
                    raise TimeoutError from error
            self._sleep(pause)
            pause = min(2 * pause, 0.1)


def _shake_hands(tls: ssl.SSLSocket, deadline: float | None) -> None:
    tls.settimeout(None if deadline is None else max(deadline - monotonic(), 0.001))
    tls.do_handshake()


# Values


def _host(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {value!r}")
    try:
        usable = bool(value.encode("idna")) and "\0" not in value
    except UnicodeError:
        usable = False
    if not usable:
        raise ValueError(f"{name} must be a host name or an address, not {value!r}")
    return value


def _port(name: str, value: int) -> int:
    if not is_int(value):
        raise TypeError(f"{name} must be an int from 0 to 65535, not {value!r}")
    if not 0 <= value <= 65535:
        raise ValueError(f"{name} must be an int from 0 to 65535, not {value!r}")
    return value


def _separator(sep: Any) -> None:
    if not isinstance(sep, (bytes, bytearray)):
        raise TypeError(f"sep must be bytes, not {sep!r}")
    if not sep:
        raise ValueError("sep must not be empty")


def _view(data: Any) -> memoryview:
    """Return the bytes of an object with a buffer."""
    try:
        view = memoryview(data)
    except TypeError:
        hint = ": encode it first" if isinstance(data, str) else ""
        raise TypeError(f"data must be bytes, or another buffer, not {type(data).__name__}{hint}") from None
    if not view.c_contiguous:
        raise TypeError("data must be contiguous: make bytes of it first")
    return view if view.nbytes == 0 or (view.format == "B" and view.ndim == 1) else view.cast("B")


def _keepalive_options(value: bool | int | tuple[int, int, int] | None) -> list[tuple[int, int, int]]:
    """Return the socket options that ``tcp_keepalive`` stands for."""
    if value is None or value is False:
        return []
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if value is True:
        return options
    takes = "tcp_keepalive must be None, True, False, whole seconds, or a tuple (silent, between, probes) of ints"
    numbers: tuple[Any, ...] = value if isinstance(value, tuple) else (value, value)
    if not all(map(is_int, numbers)) or len(numbers) != (3 if numbers is value else 2):
        raise TypeError(f"{takes}, not {value!r}")
    silent = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # macOS' name for it
    most = {silent: 32767, "TCP_KEEPINTVL": 32767, "TCP_KEEPCNT": 127}  # Linux takes no more
    for option, number in zip(most, numbers, strict=False):
        if not 1 <= number <= most[option]:
            raise ValueError(f"{takes}, seconds from 1 to 32767 and probes from 1 to 127, not {value!r}")
        options.append((socket.IPPROTO_TCP, getattr(socket, option), number))
    return options


def _literal(host: str, port: int) -> _Place | None:
    """Return the place if ``host`` is an address already. gevent would send it through a thread of the resolver's."""
    for family, address in ((socket.AF_INET, (host, port)), (socket.AF_INET6, (host, port, 0, 0))):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, 0, address, host
    return None


def _places(found: list[tuple[Any, ...]]) -> list[_Place]:
    """Return what getaddrinfo() has found."""
    return [(family, proto, address, str(address[0])) for family, _, proto, _, address in found]


def _tls_context(name: str, value: bool | ssl.SSLContext | None, server_hostname: str) -> ssl.SSLContext | None:
    if value is None or value is False:
        return None
    import ssl

    if value is True:
        context = _default_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    elif callable(getattr(value, "wrap_bio", None)):  # not isinstance: monkey patching replaces the class in `ssl`
        context = value
    else:
        raise TypeError(f"{name} must be True, False, None or an ssl.SSLContext, not {value!r}")
    try:
        # What TLS refuses, it refuses here, before there is a socket.
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=server_hostname)
    except (ValueError, ssl.SSLError) as error:
        raise ValueError(f"{name} does not work for server_hostname {server_hostname!r}: {error}") from error
    return context


@functools.lru_cache(maxsize=1)
def _default_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """Return the context for ``tls=True``: one for all connections, since reading the authorities takes milliseconds.

    The parameters are the environment variables that say where they are: a new value makes a new context.
    """
    import ssl

    return ssl.create_default_context()


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _alike(error: OSError | None, message: str) -> OSError:
    """Return an error of the type of ``error``, with its number and attributes, that says ``message``."""
    if error is None:
        return OSError(message)
    try:
        alike = type(error)(message) if error.errno is None else type(error)(error.errno, message)
    except TypeError:
        alike = OSError(error.errno, message)  # a runtime's own type, which takes other arguments
    alike.__dict__.update(error.__dict__)  # where ssl keeps verify_code, reason and the like
    return alike

"""Sockets that wait: what differs between gevent, threads and eventlet where a connection meets its socket.

Put one of these classes before a class of :mod:`gsocketpool.connection`, and it is that connection in that runtime. A
runtime is loaded where it is used, so that nobody has to have the others.
"""

from __future__ import annotations

import _socket
import errno
import functools
import os
import select
import socket
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

__all__ = ["EventletSockets", "GeventSockets", "Sockets", "ThreadSockets", "wrap_tls"]

_Socket = socket.socket  # or an object of the runtime's own that has its methods


class Sockets:
    """What a connection asks of a runtime in which the one who waits is a greenlet or a thread, and others go on."""

    def _new_socket(self, family: int, proto: int) -> _Socket:
        """Return a new stream socket."""
        raise NotImplementedError

    def _getaddrinfo(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """Look a name up, and let others run meanwhile."""
        raise NotImplementedError

    def _time_limit(self, seconds: float | None) -> AbstractContextManager[Any]:
        """Return a context manager that raises TimeoutError in its block after ``seconds``, wherever that waits.

        A runtime that cannot do that returns a null context: only a look-up has no timeout of its own.
        """
        raise NotImplementedError

    def _sleep(self, seconds: float) -> None:
        """Let others run for a while."""
        raise NotImplementedError

    def _wrap_tls(self, sock: _Socket, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLSocket:
        """Return a TLS socket that has taken over the descriptor of ``sock``; its handshake is still to be done."""
        raise NotImplementedError

    def _peek(self, sock: _Socket) -> bytes:
        """Return one byte that has arrived, from below TLS, and leave it there. Never waits.

        :raises BlockingIOError: if none has arrived.
        """
        raise NotImplementedError

    def _hang_up(self, sock: _Socket) -> None:
        """Close an open socket, and wake who waits for it: that is an error there, or an end of the stream."""
        raise NotImplementedError


class GeventSockets(Sockets):
    """gevent's sockets."""

    _runtime = "gsocketpool"

    def _new_socket(self, family: int, proto: int) -> _Socket:
        from gevent import socket as gevent_socket

        sock: _Socket = gevent_socket.socket(family, socket.SOCK_STREAM, proto)
        return sock

    def _getaddrinfo(self, host: str, port: int) -> list[tuple[Any, ...]]:
        from gevent import socket as gevent_socket

        found: list[tuple[Any, ...]] = gevent_socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        return found

    def _time_limit(self, seconds: float | None) -> AbstractContextManager[Any]:
        from gevent import Timeout

        limit: AbstractContextManager[Any] = Timeout(seconds, TimeoutError)
        return limit

    def _sleep(self, seconds: float) -> None:
        from gevent import sleep

        sleep(seconds)

    def _wrap_tls(self, sock: _Socket, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLSocket:
        from gevent import ssl as gevent_ssl

        # Not context.wrap_socket(): with the standard library's context that is a socket that blocks all greenlets.
        tls: ssl.SSLSocket = gevent_ssl.SSLSocket(
            sock=sock, server_hostname=server_hostname, do_handshake_on_connect=False, _context=context
        )
        return tls

    def _peek(self, sock: _Socket) -> bytes:
        # gevent's recv() waits where the socket under it, which does not block, says at once that there is nothing.
        arrived: bytes = sock._sock.recv(1, socket.MSG_PEEK)  # type: ignore[attr-defined,unused-ignore]
        return arrived

    def _hang_up(self, sock: _Socket) -> None:
        sock.close()


class ThreadSockets(Sockets):
    """The standard library's sockets.

    A thread cannot be interrupted. All that a socket does has a timeout of its own; a name is looked up for as long as
    the system's resolver takes (see ``resolv.conf``), and only then is it found that the time is over.

    One thread may send while another one receives, but not under TLS, where OpenSSL wants one thread at a time. Any
    thread may close a connection at any time.
    """

    _runtime = "gsocketpool.threading"

    _pid = 0  # the process that made the socket

    def _new_socket(self, family: int, proto: int) -> _Socket:
        self._pid = os.getpid()
        return socket.socket(family, socket.SOCK_STREAM, proto)

    def _getaddrinfo(self, host: str, port: int) -> list[tuple[Any, ...]]:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)

    def _time_limit(self, seconds: float | None) -> AbstractContextManager[Any]:
        return nullcontext()

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _wrap_tls(self, sock: _Socket, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLSocket:
        return wrap_tls(sock, context, server_hostname)

    def _peek(self, sock: _Socket) -> bytes:
        real = _under(sock)
        # One with a timeout would wait, whatever flags it is given. Where the program is monkey patched, none blocks.
        if _socket.socket.gettimeout(real) != 0 and not _readable(sock):
            raise BlockingIOError
        return _socket.socket.recv(real, 1, socket.MSG_PEEK)

    def _hang_up(self, sock: _Socket) -> None:
        # close() does not wake a thread that waits for the socket: shutdown() does. In the child of a fork it would end
        # the parent's connection. Not a TLS socket's own shutdown(), which goes on in clear text.
        if self._pid == os.getpid():
            try:
                _socket.socket.shutdown(_under(sock), socket.SHUT_RDWR)
            except OSError:
                pass  # the peer is gone
        sock.close()


class EventletSockets(Sockets):
    """eventlet's sockets."""

    _runtime = "gsocketpool.eventlet"

    def _new_socket(self, family: int, proto: int) -> _Socket:
        sock: _Socket = _green_socket()(family, socket.SOCK_STREAM, proto)
        return sock

    def _getaddrinfo(self, host: str, port: int) -> list[tuple[Any, ...]]:
        from eventlet.green import socket as green_socket

        found: list[tuple[Any, ...]] = green_socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        return found

    def _time_limit(self, seconds: float | None) -> AbstractContextManager[Any]:
        from eventlet import Timeout

        limit: AbstractContextManager[Any] = Timeout(seconds, TimeoutError)
        return limit

    def _sleep(self, seconds: float) -> None:
        from eventlet import sleep

        sleep(seconds)

    def _wrap_tls(self, sock: _Socket, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLSocket:
        from eventlet.green import ssl as green_ssl

        tls: ssl.SSLSocket = green_ssl.SSLSocket(
            sock=sock, server_hostname=server_hostname, do_handshake_on_connect=False, _context=context
        )
        return tls

    def _peek(self, sock: _Socket) -> bytes:
        # The one under it, which does not block. A TLS socket is itself one.
        return _socket.socket.recv(_under(sock), 1, socket.MSG_PEEK)

    def _hang_up(self, sock: _Socket) -> None:
        from eventlet import hubs

        # What wakes those who wait for a descriptor that is another socket's now: eventlet does it no sooner than that.
        hubs.notify_opened(sock.fileno())
        sock.close()


def wrap_tls(sock: _Socket, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLSocket:
    """Return a TLS socket of the standard library's that has taken over the descriptor; it has not shaken hands."""
    try:
        return context.wrap_socket(sock, server_hostname=server_hostname, do_handshake_on_connect=False)
    except OSError as error:
        # Up to Python 3.11, if the peer resets the connection meanwhile, the socket that was being made stays open as
        # long as somebody keeps the error: it is in its traceback.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            made = frame.f_locals.get("self")
            if isinstance(made, socket.socket):
                made.close()
        raise


@functools.cache
def _green_socket() -> Any:
    """Return eventlet's class of sockets, with a ``recv()`` that tells a reset from an end of the stream."""
    from eventlet import hubs
    from eventlet.green import socket as green_socket

    class GreenSocket(green_socket.socket):  # type: ignore[misc,unused-ignore]
        def recv(self, bufsize: int, flags: int = 0) -> bytes:
            while True:
                try:
                    received: bytes = self.fd.recv(bufsize, flags)
                    return received
                except BlockingIOError:
                    if self.act_non_blocking:
                        raise
                hubs.trampoline(self.fd, read=True, timeout=self.gettimeout(), timeout_exc=TimeoutError("timed out"))

    return GreenSocket


def _under(sock: Any) -> _socket.socket:
    """Return the kernel's socket under one of eventlet's, or of gevent's: what ``socket`` makes once it is patched."""
    real: _socket.socket = sock.fd if hasattr(sock, "fd") else getattr(sock, "_sock", sock)
    return real


def _readable(sock: _Socket) -> bool:
    """Whether something has arrived: bytes, the end of the stream or an error. Never waits."""
    if sock.fileno() < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))

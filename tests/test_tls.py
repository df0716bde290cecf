"""TcpConnection over TLS, from the first byte or after STARTTLS."""

from __future__ import annotations

import gc
import os
import random
import select
import ssl as std_ssl
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket, ssl
from gevent.event import Event

from gsocketpool.connection import TcpConnection
from tests.conformance.test_connections import connects, hurry
from tests.servers import Authority, EchoServer, LineEchoServer, Server, swallow
from tests.test_connection import descriptors, look_up, wait_readable

Context = std_ssl.SSLContext


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def trusting(authority: Authority) -> Context:
    """A client's context that trusts the authority."""
    return authority.client_context()


def open_to(server: Server, context: Context | bool, **options: Any) -> TcpConnection:
    """Return an open connection over TLS."""
    conn = TcpConnection(server.host, server.port, tls=context, **{"timeout": 5, **options})
    conn.open()
    return conn


def goodbye(sock: Any) -> None:
    """Say goodbye as TLS wants it, and wait for no answer."""
    sock.settimeout(0)
    with pytest.raises(std_ssl.SSLWantReadError):
        sock.unwrap()
    sock.settimeout(None)


# Who is trusted


def test_a_certificate_of_a_trusted_authority_is_accepted(authority: Authority, trusting: Context) -> None:
    with EchoServer(tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        assert isinstance(conn.socket, ssl.SSLSocket)
        assert conn.get() is conn.socket
        assert conn.socket.gettimeout() == 5
        assert repr(conn) == f"<TcpConnection 127.0.0.1:{server.port} (open, TLS)>"
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        conn.close()
        assert repr(conn) == f"<TcpConnection 127.0.0.1:{server.port} (closed)>"


def test_a_context_of_gevents_is_as_good(authority: Authority) -> None:
    context = ssl.SSLContext(std_ssl.PROTOCOL_TLS_CLIENT)
    authority._ca.configure_trust(context)
    with EchoServer(tls=authority.server_context()) as server:
        conn = open_to(server, context)
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        conn.close()


def test_tls_true_trusts_the_systems_authorities(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EchoServer(tls=authority.server_context()) as server:
        with pytest.raises(std_ssl.SSLCertVerificationError, match=r"unable to get local issuer|self.signed"):
            open_to(server, True)
        # This is how OpenSSL is told of other ones.
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.write(tmp_path)))
        first, second = open_to(server, True), open_to(server, True)
        assert first._default_tls is second._default_tls
        first.send(b"hello")
        assert first.recv() == b"hello"
        first.close()
        second.close()


@pytest.mark.parametrize("tls", [None, False])
def test_without_tls_there_is_none(tls: bool | None) -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, tls=tls, server_hostname="example.org")
        conn.open()
        assert not isinstance(conn.socket, ssl.SSLSocket)
        conn.close()


def test_a_certificate_for_another_name_is_refused_and_leaks_nothing(authority: Authority, trusting: Context) -> None:
    with EchoServer(tls=authority.server_context("example.org")) as server:
        before = descriptors()
        with pytest.raises(std_ssl.SSLCertVerificationError) as caught:
            open_to(server, trusting)
        assert f"cannot connect to 127.0.0.1:{server.port} (127.0.0.1: " in str(caught.value)
        assert "IP address mismatch" in str(caught.value)
        assert caught.value.verify_code == 64
        server.wait_open(0)
        assert descriptors() == before


def test_a_certificate_of_an_unknown_authority_is_refused_and_leaks_nothing(authority: Authority) -> None:
    with EchoServer(tls=authority.server_context()) as server:
        before = descriptors()
        with pytest.raises(std_ssl.SSLCertVerificationError, match="certificate verify failed"):
            open_to(server, Authority().client_context())
        server.wait_open(0)
        assert descriptors() == before


def test_a_context_is_taken_as_it_is(authority: Authority) -> None:
    context = std_ssl.SSLContext(std_ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = std_ssl.CERT_NONE
    with EchoServer(tls=authority.server_context("example.org")) as server:
        conn = open_to(server, context)
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        conn.close()


def test_the_server_hostname_is_what_is_verified_and_what_the_server_is_told(
    authority: Authority, trusting: Context
) -> None:
    told: list[str | None] = []
    context = authority.server_context("example.org")
    context.sni_callback = lambda sock, name, context: told.append(name)
    with EchoServer(tls=context) as server:
        conn = open_to(server, trusting, server_hostname="example.org")
        conn.close()
        conn = TcpConnection("example.org", server.port, tls=trusting)
        look_up(conn, (server.host, server.port))
        conn.open()
        conn.close()
        assert told == ["example.org", "example.org"]


def test_a_context_that_cannot_be_used_is_refused_before_anything_is_opened(
    authority: Authority, trusting: Context
) -> None:
    with pytest.raises(ValueError, match=r"tls does not work for server_hostname .*: Cannot create a client"):
        TcpConnection("127.0.0.1", 1, tls=authority.server_context())
    with pytest.raises(TypeError, match="tls must be True, False, None or an"):
        TcpConnection("127.0.0.1", 1, tls=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="server_hostname must be a host name"):
        TcpConnection("127.0.0.1", 1, tls=trusting, server_hostname=".example.org")


# What fails


def test_a_server_that_does_not_speak_tls_is_an_error_and_leaks_nothing(trusting: Context) -> None:
    with EchoServer() as server:
        before = descriptors()
        with pytest.raises(std_ssl.SSLError, match="cannot connect to"):
            open_to(server, trusting)
        server.wait_open(0)
        assert descriptors() == before


def test_a_handshake_that_nobody_answers_times_out_and_leaks_nothing(trusting: Context) -> None:
    with Server(swallow) as server:
        before = descriptors()
        conn = TcpConnection(server.host, server.port, tls=trusting, connect_timeout=0.1)
        connected = connects(conn)
        with pytest.raises(TimeoutError, match=r"within 0\.1 s \(") as caught:
            conn.open()
        # On a busy machine the time may be over before that.
        assert ("(127.0.0.1: connected, and the TLS handshake was not done" in str(caught.value)) is bool(connected)
        server.wait_open(0)
        assert descriptors() == before


def test_a_handshake_that_trickles_times_out(trusting: Context) -> None:
    # One byte at a time of a long record: no single wait is long.
    def trickle(sock: Any) -> None:
        sock.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
        while True:
            sock.sendall(b"x")
            gevent.sleep(0.01)

    with Server(trickle) as server, gevent.Timeout(20):
        before = descriptors()
        with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            open_to(server, trusting, connect_timeout=0.2)
        server.wait_open(0)
        assert descriptors() == before


def test_a_peer_that_ends_the_stream_in_the_handshake_is_an_error_and_leaks_nothing(trusting: Context) -> None:
    with Server(lambda sock: None) as server:
        before = descriptors()
        with pytest.raises(OSError, match="cannot connect to"):
            open_to(server, trusting)
        server.wait_open(0)
        assert descriptors() == before


@pytest.mark.parametrize("kill", [gevent.GreenletExit, gevent.Timeout])
def test_an_open_that_is_killed_in_the_handshake_leaks_nothing(kill: type[BaseException], trusting: Context) -> None:
    begun = Event()

    def notice(sock: Any) -> None:
        sock.recv(1)
        begun.set()
        swallow(sock)

    with Server(notice) as server:
        conn = TcpConnection(server.host, server.port, tls=trusting, connect_timeout=60)
        before = descriptors()
        opening = gevent.spawn(pytest.raises, kill, conn.open)
        assert begun.wait(5)
        opening.kill(kill)
        assert not conn.is_connected()
        server.wait_open(0)
        assert descriptors() == before


def test_the_next_address_is_tried_when_the_handshake_fails_at_one(authority: Authority, trusting: Context) -> None:
    with Server(swallow) as silent, EchoServer(tls=authority.server_context("example.org")) as server:
        conn = TcpConnection("example.org", 1, tls=trusting, connect_timeout=20)
        look_up(conn, (silent.host, silent.port), (server.host, server.port))
        given = hurry(conn, silent)
        conn.open()
        assert 0 < given[0] <= 20 / 2
        assert conn.socket.getpeername() == (server.host, server.port)
        conn.close()


def test_a_failed_handshake_keeps_no_reference_to_the_connection(authority: Authority) -> None:
    with EchoServer(tls=authority.server_context()) as server:
        conn = TcpConnection(server.host, server.port, tls=Authority().client_context())
        seen = weakref.ref(conn)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(std_ssl.SSLCertVerificationError):
                conn.open()
            del conn
            assert seen() is None
        finally:
            gc.enable()


# Use


@pytest.mark.parametrize("version", [std_ssl.TLSVersion.TLSv1_2, std_ssl.TLSVersion.TLSv1_3])
def test_all_that_sends_and_receives_works_over_tls(
    version: std_ssl.TLSVersion, authority: Authority, trusting: Context, rng: random.Random
) -> None:
    trusting.minimum_version = trusting.maximum_version = version
    data = rng.randbytes(1024 * 1024)
    with EchoServer(tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        assert conn.send(b"") == 0
        assert conn.send(b"one\ntwo\nthree") == 13
        assert conn.recv_until(b"\n") == b"one"
        assert conn.recv_exactly(4) == b"two\n"
        assert conn.recv() == b"three"
        sending = gevent.spawn(conn.send, data)
        assert conn.recv_exactly(len(data)) == data
        assert sending.get(timeout=5) == len(data)
        conn.close()
        conn.open()
        conn.send(b"again")
        assert conn.recv() == b"again"
        conn.close()


def test_a_silent_peer_times_out_under_tls(authority: Authority, trusting: Context) -> None:
    with Server(swallow, tls=authority.server_context()) as server:
        conn = open_to(server, trusting, timeout=0.05, connect_timeout=5)
        with pytest.raises(TimeoutError, match=r"sent nothing within 0\.05 s"):
            conn.recv()
        conn.close()


# check()


@pytest.mark.parametrize("version", [std_ssl.TLSVersion.TLSv1_2, std_ssl.TLSVersion.TLSv1_3])
def test_check_is_true_of_a_healthy_connection_tickets_or_not(
    version: std_ssl.TLSVersion, authority: Authority, trusting: Context
) -> None:
    trusting.minimum_version = trusting.maximum_version = version
    with EchoServer(tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        if version == std_ssl.TLSVersion.TLSv1_3:
            wait_readable(conn)  # the tickets
            assert conn._peek(conn.socket)
        ran: list[int] = []
        other = gevent.spawn(ran.append, 1)
        for _ in range(5):
            assert conn.check() is True
        assert ran == []
        other.join()
        assert conn.socket.gettimeout() == 5
        conn.send(b"hello")
        assert conn.recv() == b"hello"
        assert conn.check() is True
        conn.close()
        assert conn.check() is False


def says_goodbye(sock: Any) -> None:
    goodbye(sock)
    swallow_raw(sock)


def says_goodbye_and_closes(sock: Any) -> None:
    goodbye(sock)
    sock.close()


def closes(sock: Any) -> None:
    sock.close()


def says_something(sock: Any) -> None:
    sock.sendall(b"stray")
    swallow(sock)


def swallow_raw(sock: Any) -> None:
    """Wait until the client closes, below TLS."""
    while sock._sock.fileno() >= 0:
        socket.wait_read(sock.fileno())
        if not sock._sock.recv(65536):
            return


@pytest.mark.parametrize("version", [std_ssl.TLSVersion.TLSv1_2, std_ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("act", [says_goodbye, says_goodbye_and_closes, closes, says_something])
def test_check_finds_what_the_peer_did_while_the_connection_idled(
    act: Callable[[Any], None], version: std_ssl.TLSVersion, authority: Authority, trusting: Context
) -> None:
    def handler(sock: Any) -> None:
        echoed = sock.recv(1)
        sock.sendall(echoed)
        act(sock)

    trusting.minimum_version = trusting.maximum_version = version
    with Server(handler, tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        assert conn.check() is True
        conn.send(b"x")
        assert conn.recv_exactly(1) == b"x"
        wait_until_false(conn)
        assert conn.check() is False
        if act is says_something:
            assert conn.recv() == b"stray"
            assert conn.check() is True
        else:
            assert conn.recv() == b""
        conn.close()


def wait_until_false(conn: TcpConnection) -> None:
    """Wait until check() is False, asking whenever something has arrived."""
    with gevent.Timeout(5):
        while conn.check():
            wait_readable(conn)


def wait_ended(conn: TcpConnection) -> None:
    """Wait until the end of the stream has arrived, and all that was sent before."""
    poll = select.poll()
    poll.register(conn.socket.fileno(), getattr(select, "POLLRDHUP", select.POLLIN))
    with gevent.Timeout(5):
        while not poll.poll(0):
            gevent.sleep(0.001)


def test_check_finds_tickets_a_goodbye_and_the_end_all_at_once(authority: Authority, trusting: Context) -> None:
    with Server(says_goodbye_and_closes, tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        wait_ended(conn)
        assert conn._peek(conn.socket)
        assert conn.check() is False
        conn.close()


def test_check_finds_that_the_peer_reset_the_connection(authority: Authority, trusting: Context) -> None:
    with EchoServer(tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        conn.send(b"x")
        assert conn.recv() == b"x"
        server.reset()
        wait_until_false(conn)
        conn.close()


def test_check_finds_data_that_is_decrypted_already(authority: Authority, trusting: Context) -> None:
    with EchoServer(tls=authority.server_context()) as server:
        conn = open_to(server, trusting)
        conn.send(b"0123456789")
        assert conn.recv(3) == b"012"
        assert conn.check() is False
        assert conn.recv() == b"3456789"
        assert conn.check() is True
        conn.close()


# start_tls


def starttls_server(authority: Authority, after: bytes = b"") -> Callable[[Any], None]:
    """Return a handler that echoes lines, and on the line STARTTLS says ``ready`` and goes on with TLS."""

    context = authority.server_context()

    def handler(sock: Any) -> None:
        rest = b""
        try:
            while data := sock.recv(65536):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line == b"STARTTLS":
                        sock.sendall(b"ready\n" + after)
                        sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                        sock.do_handshake()
                    else:
                        sock.sendall(line + b"\n")
        finally:
            sock.close()

    return handler


def test_start_tls_goes_on_with_tls_on_the_same_connection(authority: Authority, trusting: Context) -> None:
    with Server(starttls_server(authority)) as server:
        conn = TcpConnection(server.host, server.port, timeout=5)
        for _ in range(2):
            conn.open()
            address = conn.socket.getsockname()
            conn.send(b"plain\nSTARTTLS\n")
            assert conn.recv_until(b"\n") == b"plain"
            assert conn.recv_until(b"\n") == b"ready"
            conn.start_tls(trusting)
            assert isinstance(conn.socket, ssl.SSLSocket)
            assert conn.socket.getsockname() == address
            assert conn.socket.gettimeout() == 5
            assert conn.check() is True
            conn.send(b"secret\n")
            assert conn.recv_until(b"\n") == b"secret"
            with pytest.raises(RuntimeError, match="has started TLS already"):
                conn.start_tls(trusting)
            assert conn.is_connected()
            conn.close()
            conn.close()


def test_start_tls_true_trusts_the_systems_authorities(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.write(tmp_path)))
    with Server(starttls_server(authority)) as server:
        conn = TcpConnection("name.test", server.port, timeout=5)
        look_up(conn, (server.host, server.port))
        conn.open()
        conn.send(b"STARTTLS\n")
        assert conn.recv_until(b"\n") == b"ready"
        conn.start_tls(server_hostname="localhost")
        conn.send(b"secret\n")
        assert conn.recv_until(b"\n") == b"secret"
        conn.close()


@pytest.mark.parametrize("together", [True, False])
def test_start_tls_refuses_what_was_slipped_in_before_it(
    together: bool, authority: Authority, trusting: Context
) -> None:
    with Server(starttls_server(authority, after=b"slipped in\n")) as server:
        conn = TcpConnection(server.host, server.port, timeout=5)
        conn.open()
        conn.send(b"STARTTLS\n")
        if together:
            assert conn.recv_until(b"\n") == b"ready"  # and has read on
        else:
            assert conn.recv_exactly(6) == b"ready\n"
            wait_readable(conn)
        with pytest.raises(ConnectionError, match="have arrived before the TLS handshake: not trusted"):
            conn.start_tls(trusting)
        assert not conn.is_connected()


def test_a_start_tls_that_does_not_trust_the_server_closes_the_connection(authority: Authority) -> None:
    with Server(starttls_server(authority)) as server:
        conn = TcpConnection(server.host, server.port, timeout=5)
        before = descriptors()
        conn.open()
        conn.send(b"STARTTLS\n")
        assert conn.recv_until(b"\n") == b"ready"
        with pytest.raises(std_ssl.SSLCertVerificationError, match=r"no TLS with 127\.0\.0\.1:\d+: .*verify failed"):
            conn.start_tls(Authority().client_context())
        assert not conn.is_connected()
        server.wait_open(0)
        assert descriptors() == before


def test_a_start_tls_that_nobody_answers_times_out_and_closes_the_connection(trusting: Context) -> None:
    with LineEchoServer() as server:
        before = descriptors()
        conn = TcpConnection(server.host, server.port, timeout=5)
        conn.open()
        with Server(swallow) as silent:
            conn.close()
            conn = TcpConnection(silent.host, silent.port, timeout=5)
            conn.open()
            conn._connect_timeout = 0.1
            with pytest.raises(TimeoutError, match=rf"no TLS with 127\.0\.0\.1:{silent.port} within 0\.1 s"):
                conn.start_tls(trusting)
            assert not conn.is_connected()
        server.wait_open(0)
        assert descriptors() == before


def test_a_start_tls_that_the_peer_ends_is_an_error(trusting: Context) -> None:
    with EchoServer() as server:
        conn = TcpConnection(server.host, server.port, timeout=5)
        conn.open()
        conn.send(b"x")
        assert conn.recv() == b"x"
        server.hang_up()
        wait_readable(conn)
        with pytest.raises(OSError, match="no TLS with"):
            conn.start_tls(trusting)
        assert not conn.is_connected()


def silent_start_tls(trusting: Context, error: type[BaseException], then: Callable[[TcpConnection, Any], None]) -> None:
    """Do ``then`` while a handshake is under way that nobody answers: it raises ``error`` and leaves nothing behind."""
    begun = Event()

    def notice(sock: Any) -> None:
        sock.recv(1)
        begun.set()
        swallow(sock)

    with Server(notice) as server:
        before = descriptors()
        conn = TcpConnection(server.host, server.port, connect_timeout=60)
        conn.open()
        starting = gevent.spawn(pytest.raises, error, conn.start_tls, trusting)
        assert begun.wait(5)
        then(conn, starting)
        starting.get(timeout=5)
        assert not conn.is_connected()
        server.wait_open(0)
        assert descriptors() == before


def test_a_start_tls_that_is_killed_closes_the_connection(trusting: Context) -> None:
    silent_start_tls(trusting, gevent.Timeout, lambda conn, starting: starting.kill(gevent.Timeout(1)))


def test_a_close_while_start_tls_is_under_way_closes_the_connection(trusting: Context) -> None:
    silent_start_tls(trusting, OSError, lambda conn, starting: conn.close())


def test_a_wrong_argument_of_start_tls_is_refused_and_changes_nothing(authority: Authority, trusting: Context) -> None:
    with LineEchoServer() as server:
        conn = TcpConnection(server.host, server.port, timeout=5)
        conn.open()
        for wrong in (None, False, "yes"):
            with pytest.raises(TypeError, match="context must be True"):
                conn.start_tls(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="context does not work for"):
            conn.start_tls(authority.server_context())
        with pytest.raises(ValueError, match="server_hostname must be a host name"):
            conn.start_tls(trusting, server_hostname="")
        conn.send(b"plain\n")
        assert conn.recv_until(b"\n") == b"plain"
        conn.close()


# Importing


def test_ssl_is_imported_only_by_who_uses_it() -> None:
    # gevent's monkey patching warns when `ssl` was imported before; so do not do it in passing.
    code = "import sys, gsocketpool.connection as c; c.TcpConnection('h', 1); assert 'ssl' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


def test_a_context_made_before_monkey_patching_is_accepted_after_it() -> None:
    code = """
import ssl
context = ssl.create_default_context()
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gevent import monkey
    monkey.patch_all()
from gsocketpool import TcpConnection
TcpConnection("example.org", 443, tls=context)
TcpConnection("example.org", 443, tls=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

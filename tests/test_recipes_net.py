"""The recipes for network protocols against real servers: http.client and nginx, smtplib and aiosmtpd, thriftpy2's
client and its server.

The clients are greenlets in patched processes: `examples/https.py`, `smtp.py` and `thrift_client.py`, and
`scripts/recipes_net.py`, which puts them through one scenario in each run. The servers of SMTP and Thrift are threads
here.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import thriftpy2
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, LoginPassword, Session
from thriftpy2.server import TThreadedServer
from thriftpy2.thrift import TApplicationException, TProcessor
from thriftpy2.transport import TServerSocket

from .peers import Nginx, free_port
from .test_docs import run

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
BOUND = 20.0

Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Put the clients of a protocol through a scenario, which must end well and say nothing."""

    def go(protocol: str, scenario: str, port: int, authority: trustme.CA | None = None) -> None:
        arguments = [protocol, scenario, str(port)]
        if authority is not None:
            authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
            arguments.append(str(tmp_path / "authority.pem"))
        ended = subprocess.run(
            [sys.executable, "-W", "error", str(ROOT / "tests" / "scripts" / "recipes_net.py"), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), ended.stderr

    return go


# -- HTTP over TLS --


@pytest.fixture
def https(nginx: Nginx, play: Play, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """In the end no connection is left at the server."""
    monkeypatch.setenv("NGINX", str(nginx._pids()[0]))
    yield lambda scenario: play("https", scenario, nginx.tls_port, nginx.authority)
    nginx.wait_for_connections(0)


def test_the_https_example_runs(nginx: Nginx, tmp_path: Path) -> None:
    nginx.authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    printed = run("https.py", HOST, str(nginx.tls_port), "/echo?hello", str(tmp_path / "authority.pem"))
    assert printed == ["[200]", "20 requests over at most 4 connections"]
    nginx.wait_for_connections(0)


def test_forty_greenlets_share_four_https_connections(https: Callable[[str], None]) -> None:
    https("share")


def test_g1_g3_no_https_reply_reaches_the_wrong_greenlet_if_a_third_is_killed(https: Callable[[str], None]) -> None:
    https("kill")


def test_a_server_that_no_trusted_authority_vouches_for_is_refused_and_nothing_leaks(
    https: Callable[[str], None],
) -> None:
    https("unverified")


def test_g8_a_connection_that_nginx_ended_while_it_idled_is_noticed(https: Callable[[str], None]) -> None:
    https("idle")


def test_the_check_of_the_https_recipe_sees_that_nginx_hung_up(https: Callable[[str], None]) -> None:
    https("check")


def test_a_request_on_a_connection_that_nginx_just_ended_fails_and_a_get_is_sent_again(
    https: Callable[[str], None],
) -> None:
    https("race")


def test_after_connection_close_the_connection_is_gone_and_http_client_opens_none_by_itself(
    https: Callable[[str], None],
) -> None:
    https("last")


def test_a_response_that_was_not_read_to_its_end_discards_the_connection(https: Callable[[str], None]) -> None:
    https("unread")


def test_the_tickets_of_tls_do_not_make_a_connection_stale(https: Callable[[str], None]) -> None:
    https("tickets")


def test_an_https_request_that_times_out_discards_the_connection(https: Callable[[str], None]) -> None:
    https("timeout")


def test_a_response_that_breaks_off_discards_the_connection(https: Callable[[str], None]) -> None:
    https("truncated")


# -- SMTP --


class Mailbox:
    """aiosmtpd's handler: delivers to a list, and does as the recipient's name says."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], str]] = []
        self.logins = 0
        self.noops = 0
        self.quits = 0
        self.servers: list[Any] = []  # one for each who has logged in

    def log_in(self, server: Any, session: object, envelope: object, mechanism: str, data: Any) -> AuthResult:
        success = isinstance(data, LoginPassword) and (data.login, data.password) == (b"app", b"s3cret")
        self.logins += success
        self.servers.append(server)
        return AuthResult(success=success, handled=False)

    async def handle_MAIL(
        self, server: Any, session: Session, envelope: Envelope, address: str, mail_options: list[str]
    ) -> str:
        if address.startswith("refused@"):
            return f"550 no mail from {address}"
        envelope.mail_from = address
        envelope.mail_options.extend(mail_options)
        return "250 OK"

    async def handle_RCPT(
        self, server: Any, session: Session, envelope: Envelope, address: str, rcpt_options: list[str]
    ) -> str:
        await asyncio.sleep(0.001)  # as if it looked the address up
        if address.startswith("refused@"):
            return f"550 no {address} here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        to = envelope.rcpt_tos[0].partition("@")[0]
        if to == "late":
            return "554 not that"
        if to == "hangup":
            server.transport.abort()
        if to == "silence":
            await asyncio.Event().wait()
        assert isinstance(envelope.content, bytes)
        subject = re.search(r"Subject: (.*)\r\n", envelope.content.decode())
        assert subject is not None
        self.mails.append((envelope.rcpt_tos, subject[1]))
        return "250 OK"

    async def handle_NOOP(self, server: Any, session: Session, envelope: Envelope, arg: str) -> str:
        self.noops += 1
        return "250 OK"

    async def handle_VRFY(self, server: Any, session: Session, envelope: Envelope, address: str) -> str:
        if address == "hang_up_on_others":
            for other in self.servers:
                if other is not server:
                    other.transport.close()
            return "252 done"
        return f"252 {getattr(self, address)}"

    async def handle_QUIT(self, server: Any, session: Session, envelope: Envelope) -> str:
        self.quits += 1
        return "221 bye"


@contextmanager
def mail_server(mailbox: Mailbox, authority: trustme.CA, **options: Any) -> Iterator[int]:
    """aiosmtpd in a thread, with STARTTLS and login; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(context)
    usual: dict[str, Any] = {
        "server_hostname": "mail.example",
        "tls_context": context,
        "require_starttls": True,
        "auth_required": True,
        "authenticator": mailbox.log_in,
    }
    usual.update(options)
    controller = Controller(mailbox, hostname=HOST, port=free_port(), ready_timeout=BOUND, **usual)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
def smtp(mailbox: Mailbox, authority: trustme.CA, play: Play) -> Callable[..., None]:
    def go(scenario: str, **options: Any) -> None:
        with mail_server(mailbox, authority, **options) as port:
            play("smtp", scenario, port, authority)

    return go


def test_the_smtp_example_runs(
    mailbox: Mailbox, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMTP_PASSWORD", "s3cret")
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with mail_server(mailbox, authority) as port:
        printed = run("smtp.py", HOST, str(port), "app", "box@a.example", str(tmp_path / "authority.pem"))
    assert printed == ["20 mails over at most 4 connections"]
    assert sorted(mailbox.mails) == sorted((["box@a.example"], f"greeting {number}") for number in range(20))
    assert 1 <= mailbox.logins <= 4


def test_forty_greenlets_share_four_smtp_connections(smtp: Callable[..., None], mailbox: Mailbox) -> None:
    smtp("share")
    tokens = [f"{number}x{turn}" for number in range(40) for turn in range(3)]
    assert sorted(mailbox.mails) == sorted(([f"box@{token}.example"], token) for token in tokens)
    assert mailbox.logins == 4


def test_g1_g3_no_smtp_reply_reaches_the_wrong_greenlet_if_a_third_is_killed(
    smtp: Callable[..., None], mailbox: Mailbox
) -> None:
    smtp("kill")
    assert all(to == [f"box@{token}.example"] for to, token in mailbox.mails)


def test_a_mail_that_was_refused_does_not_discard_the_smtp_connection(
    smtp: Callable[..., None], mailbox: Mailbox
) -> None:
    smtp("refused")
    assert mailbox.mails == [(["box@a.example"], "a")]


def test_half_a_mail_is_not_left_to_the_next_borrower(smtp: Callable[..., None], mailbox: Mailbox) -> None:
    smtp("half")
    assert mailbox.mails == [(["box@b.example"], "b")]


def test_a_mail_server_that_hangs_up_discards_the_connection(smtp: Callable[..., None]) -> None:
    smtp("disconnected")


def test_a_mail_that_times_out_discards_the_connection(smtp: Callable[..., None]) -> None:
    smtp("timeout")


def test_g8_a_connection_that_the_mail_server_ended_while_it_idled_is_noticed(smtp: Callable[..., None]) -> None:
    smtp("idle")


def test_the_keepalive_of_the_smtp_recipe_is_a_noop(smtp: Callable[..., None]) -> None:
    smtp("keepalive")


def test_the_close_of_the_smtp_recipe_says_quit(smtp: Callable[..., None]) -> None:
    smtp("quit")


def test_after_421_the_smtp_connection_is_discarded(smtp: Callable[..., None]) -> None:
    smtp("421", command_call_limit={"MAIL": 2, "*": 1000})


def test_a_login_that_fails_is_the_dials_error_and_leaks_nothing(smtp: Callable[..., None]) -> None:
    smtp("wrong_password")


def test_a_mail_server_that_no_trusted_authority_vouches_for_gets_no_password(
    smtp: Callable[..., None], mailbox: Mailbox
) -> None:
    smtp("unverified")
    assert mailbox.logins == 0


def test_a_mail_server_without_starttls_gets_no_password(smtp: Callable[..., None], mailbox: Mailbox) -> None:
    smtp("no_tls", tls_context=None, require_starttls=False, auth_required=False)
    assert mailbox.logins == 0


# -- Thrift --

stock: Any = thriftpy2.load(str(ROOT / "examples" / "stock.thrift"), module_name="stock_thrift")


class Shelves:
    """The service: what it counts says what it does."""

    def __init__(self) -> None:
        self.pings = 0
        self.late = 0  # how many wait for `now`
        self.now = threading.Event()
        self.way = threading.Event()
        self.clients: list[Any] = []  # their sockets

    def count(self, article: str) -> int:
        if article == "refuse":
            raise TApplicationException(TApplicationException.INTERNAL_ERROR, "as you say")
        if article == "crash":
            raise RuntimeError("as you say")
        if article == "silence":
            self.way.wait(BOUND)
        if article == "late":
            return self.late
        if article == "now":
            self.now.set()
            return 0
        if article.endswith("later"):
            self.late += 1
            self.now.wait(BOUND)
        if article == "pings":
            return self.pings
        if article == "hang up":
            self.clients[0].shutdown(socket.SHUT_RDWR)
            return 0
        if not article.startswith("has"):
            raise stock.NoSuchArticle(article)
        return len(article)

    def ping(self) -> None:
        self.pings += 1


@contextmanager
def stock_server() -> Iterator[Any]:
    """thriftpy2's server, with a thread for each connection; its listener, with a ``port``, and how many connections it
    has ``accepted``."""
    shelves = Shelves()
    listener: Any = TServerSocket(HOST, 0, client_timeout=None)  # type: ignore[no-untyped-call]
    listener.listen()
    listener.listen = lambda: None  # the server would do it again
    listener.port = listener.sock.getsockname()[1]
    accept, listener.accepted = listener.accept, 0

    def count() -> Any:
        client = accept()
        listener.accepted += 1
        shelves.clients.append(client.sock)
        return client

    listener.accept = count
    server = TThreadedServer(TProcessor(stock.Stock, shelves), listener)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield listener
    finally:
        shelves.way.set()
        server.close()
        listener.close()  # which wakes it
        thread.join(BOUND)


@pytest.fixture
def thrift(play: Play) -> Callable[..., int]:
    """Put the clients through a scenario; return how many connections the server has accepted."""

    def go(scenario: str) -> int:
        with stock_server() as listener:
            play("thrift", scenario, listener.port)
            return int(listener.accepted)

    return go


def test_the_thrift_example_runs() -> None:
    assert run("thrift_client.py") == [
        str([12] * 20),
        "no such article: pear",
        "21 calls over at most 4 connections, 0 discarded",
    ]


def test_forty_greenlets_share_four_thrift_connections(thrift: Callable[..., int]) -> None:
    assert thrift("share") == 4


def test_g1_g3_no_thrift_reply_reaches_the_wrong_greenlet_if_a_third_is_killed(thrift: Callable[..., int]) -> None:
    thrift("kill")


def test_a_thrift_client_whose_call_was_interrupted_returns_that_reply_to_the_next_call(
    thrift: Callable[..., int],
) -> None:
    thrift("alone")


def test_an_error_that_the_service_declares_does_not_discard_the_thrift_connection(
    thrift: Callable[..., int],
) -> None:
    thrift("answers")


def test_a_thrift_service_that_crashes_discards_the_connection(thrift: Callable[..., int]) -> None:
    thrift("crash")


def test_a_thrift_call_that_times_out_discards_the_connection(thrift: Callable[..., int]) -> None:
    thrift("timeout")


def test_a_thrift_call_that_cannot_be_put_into_bytes_discards_the_connection(thrift: Callable[..., int]) -> None:
    thrift("bad_argument")


def test_g8_a_connection_that_the_thrift_server_ended_while_it_idled_is_noticed(thrift: Callable[..., int]) -> None:
    thrift("idle")


def test_the_keepalive_of_the_thrift_recipe_is_a_method_of_the_service(thrift: Callable[..., int]) -> None:
    thrift("keepalive")


def test_a_thrift_server_that_is_down_is_the_dials_error_and_leaks_nothing(play: Play) -> None:
    play("thrift", "down", free_port())

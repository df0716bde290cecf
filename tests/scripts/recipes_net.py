"""The recipes for network protocols under greenlets, one scenario for each run:
``python recipes_net.py PROTOCOL SCENARIO PORT [FILE WITH AUTHORITIES]``. The server at the port is the test's.

It prints nothing and exits 0 if all is well.
"""

from gevent import monkey

monkey.patch_all()

import _socket
import http.client
import importlib
import logging
import os
import random
import re
import signal
import smtplib
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from typing import Any

import gevent
import psutil
from gevent.server import StreamServer
from thriftpy2.thrift import TApplicationException
from thriftpy2.transport import TTransportException

from gsocketpool import Pool

HOST = "127.0.0.1"
BOUND = 20.0
KILLED = 13
SHARING = 27

https: Any = importlib.import_module("examples.https")
smtp: Any = importlib.import_module("examples.smtp")
thrift: Any = importlib.import_module("examples.thrift_client")

port = int(sys.argv[3])
logged: list[str] = []


class Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logged.append(record.getMessage())


def context() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=sys.argv[4])


def until(condition: Callable[[], object]) -> None:
    with gevent.Timeout(BOUND):
        while not condition():
            gevent.sleep(0.002)


def sockets() -> int:
    """How many sockets of this process lead to the server. Nothing else happens here while they are counted."""
    found = 0
    for descriptor in map(int, os.listdir("/dev/fd")):
        try:
            sock = _socket.socket(fileno=descriptor)
        except OSError:
            continue  # something else, or that of the listing
        try:
            found += sock.family == _socket.AF_INET and sock.getpeername()[1] == port
        except OSError:
            pass  # it leads nowhere
        finally:
            sock.detach()
    return found


@contextmanager
def raises(kind: type[BaseException], text: str = "") -> Iterator[None]:
    caught = ""
    try:
        yield
    except kind as error:
        caught = f"{error!r} {error.args}"
    assert caught, f"no {kind.__name__}"
    assert re.search(text, caught), caught


def take_logged(text: str) -> None:
    """It was logged, and nothing else was."""
    assert len(logged) == 1, logged
    assert re.search(text, logged[0]), logged
    logged.clear()


def share(pool: Pool[Any], ask: Callable[[str], object]) -> None:
    """Forty greenlets borrow from four connections.

    :param ask: makes a request with a token, and sees that the reply is the one to it.
    """
    most = 0

    def work(number: int) -> None:
        nonlocal most
        for turn in range(3):
            ask(f"{number}x{turn}")
            most = max(most, sockets())

    with pool:
        gevent.joinall([gevent.spawn(work, number) for number in range(40)], raise_error=True)
        assert pool.stats().opened == most == 4
        assert pool.idle == 4
        assert not pool.stats().closed["discarded"]
    until(lambda: sockets() == 0)


def kill(pool: Pool[Any], ask: Callable[[Any, str], object]) -> None:
    """Forty greenlets borrow from four connections, and a third of them is killed in the middle of a request.

    :param ask: makes a request with a token over a connection, and sees that the reply is the one to it.
    """
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    inside: set[Any] = set()
    most = interrupted = 0

    def work(number: int, turns: float) -> None:
        nonlocal most, interrupted
        turn = 0
        while turn < turns:
            turn += 1
            with pool.connection() as conn:
                inside.add(gevent.getcurrent())
                try:
                    ask(conn, f"{number}x{turn}")
                    most = max(most, sockets())
                except gevent.GreenletExit:
                    interrupted += 1
                    raise
                finally:
                    inside.remove(gevent.getcurrent())

    try:
        with pool:
            victims = [gevent.spawn(work, number, float("inf")) for number in range(KILLED)]
            sharing = [gevent.spawn(work, KILLED + number, 4) for number in range(SHARING)]
            for victim in victims:
                gevent.sleep(rng.random() / 100)  # so it is met at one point or another
                until(lambda victim=victim: victim in inside)  # type: ignore[misc]
                victim.kill()
                most = max(most, sockets())
            gevent.joinall([*victims, *sharing], raise_error=True)
            assert all(isinstance(victim.value, gevent.GreenletExit) for victim in victims)
            # A kill may also come while the victim gives the connection back, or waits for one.
            assert KILLED >= pool.stats().closed["discarded"] >= interrupted > 0
            assert most == 4
            gevent.joinall([gevent.spawn(work, number, 2) for number in range(40)], raise_error=True)
            assert pool.size <= 4
        until(lambda: sockets() == 0)
    except BaseException:
        print(f"random seed: {seed}", file=sys.stderr)
        raise


def opens_nothing(pool: Pool[Any], kind: type[BaseException], text: str) -> None:
    """Dials fail, and leave no descriptor behind."""
    with pool:
        with raises(kind, text), pool.connection():
            pass
        before = psutil.Process().num_fds()
        for _ in range(5):
            with raises(kind, text), pool.connection():
                pass
        assert psutil.Process().num_fds() == before
        until(lambda: sockets() == 0)


# -- HTTP --


def https_pool(**options: Any) -> Pool[Any]:
    return https.https_pool(HOST, port, context(), **options)  # type: ignore[no-any-return]


def exchange(conn: Any, target: str, method: str = "GET") -> bytes:
    conn.request(method, target)
    with conn.getresponse() as response:
        assert response.status == 200
        return bytes(response.read())


def echo(conn: Any, token: str) -> None:
    assert exchange(conn, f"/echo?{token}").split()[0] == token.encode()


def https_share() -> None:
    pool = https_pool(initial_connections=4, acquire_timeout=BOUND)
    numbers = set()

    def ask(token: str) -> None:
        response, body = https.get(pool, f"/echo?{token}")
        said, number, _ = body.decode().split()
        assert (response.status, said) == (200, token)
        numbers.add(number)

    share(pool, ask)
    assert len(numbers) <= 4  # as the server counts them


def https_kill() -> None:
    kill(https_pool(initial_connections=4, acquire_timeout=BOUND), echo)


def https_unverified() -> None:
    pool = https.https_pool(HOST, port, ssl.create_default_context(), max_connections=1)
    opens_nothing(pool, ssl.SSLCertVerificationError, "certificate verify failed")


def end_what_idles() -> None:
    """Have nginx load its settings again: its old worker ends the connections on which nothing is asked."""
    os.kill(int(os.environ["NGINX"]), signal.SIGHUP)


def https_idle() -> None:
    """The server ends a connection that idles."""
    with https_pool() as pool:
        with pool.connection() as conn:
            exchange(conn, "/echo?a")
        end_what_idles()
        until(lambda: pool.stats().closed["stale"] == 1)  # the hub has noticed, or the check
        https.fetch(pool, "POST", "/echo?b")
        assert pool.stats().opened == 2
        assert not pool.stats().closed["discarded"]


def https_check() -> None:
    conn = https.dial(HOST, port, context())
    assert https.is_quiet(conn)
    exchange(conn, "/brief?a")
    until(lambda: not https.is_quiet(conn))
    assert not https.is_quiet(conn)
    conn.close()
    assert not https.is_quiet(conn)


def https_race() -> None:
    """The server ends the connection as the request is sent: made certain by a pool that looks at nothing."""
    with https_pool(check_after_idle=None, max_connections=1) as pool:

        def ended_by_the_server() -> None:
            https.fetch(pool, "GET", "/echo?a")
            end_what_idles()
            (conn,) = opened
            until(lambda: not https.is_quiet(conn))

        opened: set[Any] = set()
        with pool.connection() as conn:
            opened.add(conn)
        ended_by_the_server()
        with raises(OSError):  # RemoteDisconnected, or a broken pipe
            https.fetch(pool, "POST", "/echo?b")
        assert pool.stats().closed["discarded"] == 1
        with pool.connection() as conn:
            opened = {conn}
        ended_by_the_server()
        assert https.get(pool, "/echo?c")[1].split()[0] == b"c"
        assert pool.stats().closed["discarded"] == 2
        assert pool.stats().opened == 3


def https_last() -> None:
    """The server says Connection: close."""
    with https_pool(max_connections=1) as pool:
        response, body = https.get(pool, "/last?a")
        assert response.headers["Connection"] == "close"
        assert body.split()[0] == b"a"
        assert pool.stats().closed["dropped"] == 1
        with raises(http.client.NotConnected), pool.connection() as conn:
            exchange(conn, "/last?a")
            assert conn.sock is None
            exchange(conn, "/echo?b")  # it does not dial by itself
        with pool.connection() as conn:
            exchange(conn, "/last?a")  # and whoever does not look whether it was closed ...
        take_logged("reset.. failed; the connection is closed: NotConnected")
        with pool.connection() as conn:
            conn.request("GET", "/last?a")
            response = conn.getresponse()  # ... or does not read it
            assert sockets() == 1
        take_logged("reset.. failed; the connection is closed: ResponseNotReady")
        until(lambda: sockets() == 0)
        assert pool.stats().opened == 4
        https.get(pool, "/echo?b")


def https_unread() -> None:
    with https_pool(max_connections=1) as pool:
        for number, leave in enumerate([ask_only, read_a_part, read_nothing, close_early]):
            with pool.connection() as conn:
                exchange(conn, "/echo?first")
                leave(conn)
            take_logged("ResponseNotReady.*before the response was read")
            assert pool.stats().closed["discarded"] == number + 1
            https.get(pool, "/echo?next")
        with pool.connection() as conn:
            exchange(conn, "/echo?twice")
            exchange(conn, "/echo?one", "HEAD")
            exchange(conn, "/echo?two")
        assert pool.stats().closed["discarded"] == 4


def ask_only(conn: Any) -> None:
    conn.request("GET", "/echo?a")


def read_a_part(conn: Any) -> None:
    conn.request("GET", "/echo?a")
    conn.getresponse().read(1)


def read_nothing(conn: Any) -> None:
    conn.request("GET", "/echo?a")
    conn.getresponse()


def close_early(conn: Any) -> None:
    conn.request("GET", "/echo?a")
    with conn.getresponse() as response:
        response.read(1)
    assert response.isclosed()


def https_tickets() -> None:
    """TLS 1.3 sends tickets after the handshake, unasked. A connection that was never used is lent all the same."""
    with https_pool(min_idle=2, check_after_idle=0) as pool:
        pool.wait_ready(BOUND)
        with pool.connection() as conn:
            assert conn.sock.version() == "TLSv1.3"
            echo(conn, "a")
        assert not pool.stats().closed["stale"]


def https_timeout() -> None:
    def swallow(sock: Any, address: object) -> None:
        while sock.recv(1000):
            pass

    upstream = StreamServer((HOST, 0), swallow)
    upstream.start()
    target = f"/upstream?port={upstream.server_port}"
    with https_pool(max_connections=1) as pool:
        with raises(TimeoutError), pool.connection() as conn:
            conn.sock.settimeout(0.1)
            exchange(conn, target)
        with raises(gevent.Timeout), pool.connection() as conn, gevent.Timeout(0.1):
            exchange(conn, target)
        assert pool.stats().closed["discarded"] == 2
        https.get(pool, "/echo?a")
    upstream.stop()


def https_truncated() -> None:
    """The server behind dies in the middle of a reply. What was not asked twice fails; a GET is asked again."""
    turns = []

    def answer(sock: Any, address: object) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1000)
        turns.append(head)
        sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n" + (b"hello" if len(turns) > 2 else b"he"))

    upstream = StreamServer((HOST, 0), answer)
    upstream.start()
    target = f"/upstream?port={upstream.server_port}"
    with https_pool(max_connections=1) as pool:
        with raises(http.client.IncompleteRead):
            https.fetch(pool, "POST", target)
        assert https.get(pool, target)[1] == b"hello"
        assert pool.stats().closed["discarded"] == 2
    upstream.stop()


# -- SMTP --


def smtp_pool(**options: Any) -> Pool[Any]:
    return smtp.smtp_pool(HOST, port, "app", "s3cret", context(), **options)  # type: ignore[no-any-return]


def mail(token: str, recipient: str = "box", sender: str = "app") -> EmailMessage:
    message = EmailMessage()
    message["From"] = f"{sender}@{token}.example"
    message["To"] = f"{recipient}@{token}.example"
    message["Subject"] = token
    message.set_content(f"This is {token}.\n")
    return message


def dialogue(conn: Any, token: str) -> None:
    """The test's server refuses whom it refuses with the token, and delivers what it delivers."""
    with raises(smtplib.SMTPRecipientsRefused, f"no refused@{token}.example here"):
        conn.send_message(mail(token, "refused"))
    assert conn.send_message(mail(token)) == {}


def smtp_share() -> None:
    pool = smtp_pool(initial_connections=4)
    share(pool, lambda token: smtp.send(pool, mail(token)))


def smtp_kill() -> None:
    kill(smtp_pool(initial_connections=4), dialogue)


def smtp_refused() -> None:
    with smtp_pool(max_connections=1) as pool:
        for message, kind in [
            (mail("a", "refused"), smtplib.SMTPRecipientsRefused),
            (mail("a", sender="refused"), smtplib.SMTPSenderRefused),
            (mail("a", "late"), smtplib.SMTPDataError),
        ]:
            with raises(kind):
                smtp.send(pool, message)
            assert pool.idle == 1
        message = mail("a")
        message["Cc"] = "refused@b.example"
        assert [*smtp.send(pool, message)] == ["refused@b.example"]
        assert pool.stats().opened == 1


def smtp_half() -> None:
    """A borrower leaves in the middle of a mail, without an error and with one."""
    with smtp_pool(max_connections=1) as pool:
        with pool.connection() as conn:
            conn.mail("app@a.example")
            conn.rcpt("half@a.example")
        with raises(KeyError), pool.connection() as conn:
            conn.mail("app@a.example")
            conn.rcpt("half@a.example")
            raise KeyError("of the borrower's own")
        smtp.send(pool, mail("b"))  # not to half@a.example too: the test looks
        assert pool.stats().opened == 1


def smtp_disconnected() -> None:
    with smtp_pool(max_connections=1) as pool:
        with raises(smtplib.SMTPServerDisconnected):
            smtp.send(pool, mail("a", "hangup"))
        assert pool.stats().closed["discarded"] == 1
        smtp.send(pool, mail("b"))


def smtp_timeout() -> None:
    with smtp_pool(max_connections=1) as pool:
        with raises(smtplib.SMTPServerDisconnected, "timed out"), pool.connection() as conn:
            conn.sock.settimeout(0.1)
            conn.send_message(mail("a", "silence"))
        with raises(gevent.Timeout), pool.connection() as conn, gevent.Timeout(0.1):
            conn.send_message(mail("a", "silence"))
        assert pool.stats().closed["discarded"] == 2
        smtp.send(pool, mail("b"))


def smtp_idle() -> None:
    """The test's server hangs up on all who are silent, if it is asked to."""
    with smtp_pool(keepalive=None) as pool:
        smtp.send(pool, mail("a"))
        other = smtp.dial(HOST, port, "app", "s3cret", context())
        other.vrfy("hang_up_on_others")
        smtp.hang_up(other)
        until(lambda: pool.stats().closed["stale"] == 1)
        smtp.send(pool, mail("b"))
        assert pool.stats().opened == 2
        assert not pool.stats().closed["discarded"]


def smtp_keepalive() -> None:
    """The test's server counts the NOOPs."""
    other = smtp.dial(HOST, port, "app", "s3cret", context())
    with smtp_pool(keepalive=0.1, max_connections=1) as pool:
        smtp.send(pool, mail("a"))
        until(lambda: int(other.vrfy("noops")[1]) >= 3)
        smtp.send(pool, mail("b"))
        assert pool.stats().opened == 1
    smtp.hang_up(other)


def smtp_quit() -> None:
    """The test's server counts them."""
    other = smtp.dial(HOST, port, "app", "s3cret", context())
    with smtp_pool() as pool:
        smtp.send(pool, mail("a"))
    until(lambda: int(other.vrfy("quits")[1]) == 1)
    smtp.hang_up(other)


def smtp_421() -> None:
    """The test's server takes two mails from a connection."""
    with smtp_pool(max_connections=1) as pool:
        smtp.send(pool, mail("a"))
        smtp.send(pool, mail("b"))
        with raises(smtplib.SMTPSenderRefused, "421"):
            smtp.send(pool, mail("c"))
        take_logged("reset.. failed; the connection is closed: SMTPServerDisconnected")
        assert pool.stats().closed["discarded"] == 1
        smtp.send(pool, mail("c"))
        assert pool.stats().opened == 2


def smtp_wrong_password() -> None:
    pool = smtp.smtp_pool(HOST, port, "app", "guess", context())
    opens_nothing(pool, smtplib.SMTPAuthenticationError, "535")


def smtp_unverified() -> None:
    pool = smtp.smtp_pool(HOST, port, "app", "s3cret", ssl.create_default_context())
    opens_nothing(pool, ssl.SSLCertVerificationError, "certificate verify failed")


def smtp_no_tls() -> None:
    """The server does not offer STARTTLS, or somebody on the way hides it: no password is sent."""
    opens_nothing(smtp_pool(), smtplib.SMTPNotSupportedError, "STARTTLS")


# -- Thrift --


def stock_pool(**options: Any) -> Pool[Any]:
    return thrift.stock_pool(HOST, port, **options)  # type: ignore[no-any-return]


def count(client: Any, token: str) -> None:
    """The test's server answers with the token's length, or with an error that names it."""
    assert client.count(f"has {token}") == len(f"has {token}")
    with raises(thrift.stock.NoSuchArticle, token):
        client.count(token)


def thrift_share() -> None:
    pool = stock_pool(initial_connections=4, acquire_timeout=BOUND)

    def ask(token: str) -> None:
        assert thrift.call(pool, "count", f"has {token}") == len(f"has {token}")
        with raises(thrift.stock.NoSuchArticle, token):
            thrift.call(pool, "count", token)

    share(pool, ask)


def thrift_kill() -> None:
    kill(stock_pool(initial_connections=4, acquire_timeout=BOUND), count)


def thrift_answers() -> None:
    with stock_pool(max_connections=1) as pool:
        with raises(thrift.stock.NoSuchArticle, "pear"):
            thrift.call(pool, "count", "pear")
        with raises(TApplicationException, "as you say"):
            thrift.call(pool, "count", "refuse")
        assert pool.stats().opened == 1
        assert pool.idle == 1


def thrift_crash() -> None:
    """The service raises what its interface does not declare: thriftpy2's server hangs up."""
    with stock_pool(max_connections=1) as pool:
        with raises(TTransportException):
            thrift.call(pool, "count", "crash")
        assert pool.stats().closed["discarded"] == 1
        thrift.call(pool, "ping")


def thrift_timeout() -> None:
    with stock_pool(max_connections=1) as pool:
        with raises(TimeoutError), pool.connection() as client:
            client.tcp.sock.settimeout(0.1)
            client.count("silence")
        with raises(gevent.Timeout), pool.connection() as client, gevent.Timeout(0.1):
            client.count("silence")
        assert pool.stats().closed["discarded"] == 2
        thrift.call(pool, "ping")


def thrift_alone() -> None:
    """Without a pool: why a client whose call was interrupted must not be used again."""
    client, other = thrift.StockClient(HOST, port), thrift.StockClient(HOST, port)
    client.open()
    other.open()
    job = gevent.spawn(client.count, "has a, later")  # once somebody says "now"
    until(lambda: other.count("late") == 1)
    job.kill()
    other.count("now")
    assert client.count("has abc") == len("has a, later")
    client.close()
    other.close()


def thrift_bad_argument() -> None:
    """Of a long call that cannot be put into bytes the beginning has been sent; the server waits for the rest."""
    with stock_pool(max_connections=1) as pool:
        with raises(Exception):
            thrift.call(pool, "count", 7)
        assert pool.stats().closed["discarded"] == 1
        thrift.call(pool, "ping")


def thrift_idle() -> None:
    """The test's server hangs up on who came first, if it is asked to."""
    with stock_pool(keepalive=None) as pool:
        thrift.call(pool, "ping")
        other = thrift.StockClient(HOST, port)
        other.open()
        other.count("hang up")
        other.close()
        until(lambda: pool.stats().closed["stale"] == 1)
        thrift.call(pool, "ping")
        assert pool.stats().opened == 2
        assert not pool.stats().closed["discarded"]


def thrift_keepalive() -> None:
    """The test's server counts the pings."""
    other = thrift.StockClient(HOST, port)
    other.open()
    with stock_pool(keepalive=0.1, max_connections=1) as pool:
        assert thrift.call(pool, "count", "has") == 3
        until(lambda: other.count("pings") >= 3)
        thrift.call(pool, "ping")
        assert pool.stats().opened == 1
    other.close()


def thrift_down() -> None:
    opens_nothing(stock_pool(), TTransportException, "Could not connect")


if __name__ == "__main__":
    logging.getLogger("gsocketpool").addHandler(Log(logging.WARNING))
    globals()[f"{sys.argv[1]}_{sys.argv[2]}"]()
    assert logged == [], logged

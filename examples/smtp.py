"""Twenty greenlets share four SMTP connections of smtplib, with STARTTLS and login.

Run it: SMTP_PASSWORD=... python examples/smtp.py HOST PORT USER ADDRESS [FILE WITH AUTHORITIES]
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before smtplib is imported: it uses `socket` and `ssl`

import os
import smtplib
import ssl
import sys
from email.message import EmailMessage
from typing import Any

import gevent

from gsocketpool import Pool, PoolError, wrap


def dial(host: str, port: int, user: str, password: str, context: ssl.SSLContext) -> smtplib.SMTP:
    # Given a name of our own, it does not look one up.
    smtp = smtplib.SMTP(host, port, local_hostname="localhost", timeout=10)
    try:
        smtp.starttls(context=context)  # SMTPNotSupportedError if the server does not offer it
        smtp.login(user, password)
    except BaseException:
        smtp.close()
        raise
    return smtp


def is_quiet(smtp: smtplib.SMTP) -> bool:
    """Whether the server has neither hung up nor said anything, 421 say. What TLS itself says does not count."""
    sock = smtp.sock
    if sock is None:
        return False
    timeout = sock.gettimeout()
    sock.settimeout(0)  # so that the next line does not wait
    try:
        sock.recv(1)
        return False
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    except OSError:
        return False
    finally:
        sock.settimeout(timeout)


def forget(smtp: smtplib.SMTP) -> None:
    """Leave no half of a mail to the next borrower."""
    code, text = smtp.rset()
    if code != 250:
        raise smtplib.SMTPResponseException(code, text)


def hang_up(smtp: smtplib.SMTP) -> None:
    """Say QUIT and go. In the middle of a mail no answer would come, so wait for none."""
    try:
        if smtp.sock is not None:
            smtp.sock.settimeout(0)
            smtp.putcmd("quit")
    except OSError:
        pass
    finally:
        smtp.close()


def smtp_pool(
    host: str, port: int, user: str, password: str, context: ssl.SSLContext, **options: Any
) -> Pool[smtplib.SMTP]:
    usual: dict[str, Any] = {
        "max_connections": 4,
        "acquire_timeout": 30,
        "check_after_idle": 0,
        "discard_on": smtplib.SMTPServerDisconnected,  # a refusal keeps the connection
        "keepalive": 60,  # less than the time after which the server hangs up
        "idle_timeout": 300,
        "name": host,
    }
    return Pool(
        wrap(
            lambda: dial(host, port, user, password, context),
            close=hang_up,
            check=is_quiet,
            reset=forget,
            keepalive=lambda smtp: smtp.noop()[0] == 250,
            fileno=lambda smtp: None if smtp.sock is None else smtp.sock.fileno(),
        ),
        **(usual | options),
    )


def send(pool: Pool[smtplib.SMTP], message: EmailMessage) -> dict[str, tuple[int, bytes]]:
    """Return who of several recipients was refused, as smtplib does."""
    with pool.connection() as smtp:
        return smtp.send_message(message)


def main(host: str, port: str, user: str, address: str, authorities: str | None = None) -> None:
    context = ssl.create_default_context(cafile=authorities)  # one for all: it verifies chain and host name

    def greet(number: int) -> None:
        message = EmailMessage()
        message["From"] = message["To"] = address
        message["Subject"] = f"greeting {number}"
        message.set_content("Hello!\n")
        send(pool, message)

    password = os.environ["SMTP_PASSWORD"]
    with smtp_pool(host, int(port), user, password, context, initial_connections=1) as pool:
        jobs = [gevent.spawn(greet, number) for number in range(20)]
        try:
            gevent.joinall(jobs, raise_error=True)
        finally:
            gevent.killall(jobs)  # where one has failed the others need not go on
        stats = pool.stats()
        print(f"{stats.acquired} mails over at most {stats.max_connections} connections")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, PoolError) as error:
        sys.exit(str(error))

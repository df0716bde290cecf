"""Mailboxes over a pool of imaplib's connections, which know nothing of gevent nor of pools.

Run it: python examples/coming_imap.py
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before imaplib is imported: its sockets let other greenlets run

import imaplib
import logging
import select
import sys
from typing import Any

from gevent.server import StreamServer

from gsocketpool import Pool, retry, wrap

logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s", level=logging.INFO)
log = logging.getLogger("mail")

poll = monkey.get_original("select", "poll")  # asked with a timeout of 0 it answers at once


def new_connection(host: str, port: int, user: str, password: str) -> imaplib.IMAP4:
    mail = imaplib.IMAP4(host, port, timeout=5)
    try:
        mail.login(user, password)
    except BaseException:
        mail.shutdown()
        raise
    return mail


def is_quiet(mail: imaplib.IMAP4) -> bool:
    """Whether nothing has arrived while it idled: neither the end, nor news of a mailbox."""
    look = poll()
    look.register(mail.socket().fileno(), select.POLLIN)
    return not look.poll(0)


def leave_mailbox(mail: imaplib.IMAP4) -> None:
    if mail.state == "SELECTED":
        mail.unselect()


connections = wrap(
    new_connection,
    close=lambda mail: mail.shutdown(),  # the socket, at once; logout() would talk to whoever may not listen
    check=is_quiet,
    reset=leave_mailbox,
    keepalive=lambda mail: mail.noop()[0] == "OK",
    fileno=lambda mail: mail.socket().fileno(),
)


def main(host: str, port: int) -> None:
    pool = Pool(
        connections,
        {"host": host, "port": port, "user": "app", "password": "s3cret"},
        max_connections=20,
        discard_on=(OSError, imaplib.IMAP4.error),
        acquire_timeout=5,
        keepalive=60,
        name="mail",
    )

    @retry(exc_classes=(OSError, imaplib.IMAP4.error), logger=log, max_failures=5, interval=0.1)
    def how_many(mailbox: str) -> int:
        with pool.connection() as mail:
            kind, data = mail.select(mailbox)
            if kind != "OK":
                raise imaplib.IMAP4.error(data)
            return int(data[0] or 0)

    with pool:
        print("INBOX:", how_many("INBOX"))
        print("Sent:", how_many("Sent"))
        print("connections opened:", pool.stats().opened)


class MailServer:
    """So much of a server as is needed here. At the first SELECT it hangs up."""

    def __init__(self) -> None:
        self.selects = 0

    def serve(self, sock: Any, _address: object) -> None:
        sock.sendall(b"* OK ready\r\n")
        for line in sock.makefile("rb"):
            tag, command, *words = line.split()
            if command == b"SELECT":
                self.selects += 1
                if self.selects == 1:
                    return
                sock.sendall(b"* %d EXISTS\r\n" % (3 if words == [b"INBOX"] else 1))
            elif command == b"CAPABILITY":
                sock.sendall(b"* CAPABILITY IMAP4rev1 UNSELECT\r\n")
            sock.sendall(b"%s OK done\r\n" % tag)


if __name__ == "__main__":
    server = StreamServer(("127.0.0.1", 0), MailServer().serve)
    server.start()
    main("127.0.0.1", int(server.address[1]))
    server.stop()

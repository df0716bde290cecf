"""Valkey or Redis with nothing but this package: their protocol, RESP, over a `TcpConnection`.

Run it: python examples/resp.py 127.0.0.1 6379
"""

from __future__ import annotations

import re
import sys
from typing import Any

import gevent

from gsocketpool import Pool, PoolError, TcpConnection

#: What a reply is made of: a status or a string, a number, nil, an array; in an array, an error too.
Reply = bytes | int | None | list[Any]

#: Commands that the next borrower would feel, and those that undo them.
LASTING = {b"AUTH", b"CLIENT", b"HELLO", b"MONITOR", b"MULTI", b"READONLY", b"SELECT", b"WATCH"}
LASTING |= {b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE"}
UNDOING = {b"UNWATCH": {b"WATCH"}, b"EXEC": {b"MULTI", b"WATCH"}, b"DISCARD": {b"MULTI", b"WATCH"}}

NUMBER = re.compile(rb"[+-]?[0-9]{1,19}")


class ReplyError(Exception):
    """The server refused a command. The connection is as good as before."""


class ProtocolError(ConnectionError):
    """The server sent what is no reply. Where the next one begins is not known."""


class Resp(TcpConnection):
    """A connection to Valkey or Redis.

    :param user: who to log in as; None: the server's default user.
    :param password: None: do not log in.
    :param db: the number of the database.
    :param options: as for `TcpConnection`.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 6379,
        *,
        user: str | None = None,
        password: str | None = None,
        db: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(host, port, **options)
        self._login = [text for text in (user, password) if text is not None] if password is not None else []
        self._db = db
        self._awaited = False  # whether a reply is under way
        self._left: set[bytes] = set()  # what the borrower has changed

    def open(self) -> None:
        super().open()
        self._awaited = False
        try:
            self._begin_session()
        except BaseException:
            self.close()
            raise

    def reset(self) -> None:
        """Take back what the borrower has changed. If it left in the middle of a reply, that cannot be done."""
        if self._awaited:
            raise ConnectionError(f"{self!r} was given back before all of a reply had come")
        if self._left:
            if self.call("RESET") != b"RESET":
                raise ProtocolError(f"{self!r} has sent something else before it answered RESET")
            self._begin_session()

    def keepalive(self) -> bool:
        return self.call("PING") == b"PONG"

    def call(self, command: str | bytes, *arguments: str | bytes | float) -> Reply:
        """Send a command and return the reply. Strings are sent as UTF-8, and come back as bytes.

        :raises ReplyError: the server refused it.
        :raises ConnectionError: there was no proper reply, to this or to an earlier call: this connection is spoiled.
        """
        parts = [_encoded(word) for word in (command, *arguments)]
        if self._awaited:
            raise ConnectionError(f"{self!r} has an earlier reply under way: drop() it")
        self._awaited = True
        self._note(parts[0].upper())
        self.send(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
        reply: Reply | ReplyError = self._read()
        self._awaited = False
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def _begin_session(self) -> None:
        if self._login:
            self.call("AUTH", *self._login)
        if self._db:
            self.call("SELECT", self._db)
        self._left = set()

    def _note(self, name: bytes) -> None:
        if name in LASTING:
            self._left.add(name)
        else:
            self._left -= UNDOING.get(name, set())

    def _read(self, depth: int = 0) -> Any:
        line = self.recv_until(b"\r\n")
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ReplyError(rest.decode(errors="replace"))  # returned, since more may follow where it is in an array
        if kind == b":":
            return self._number(line)
        if kind == b"$":
            return self._read_string(self._number(line, least=-1))
        if kind == b"*" and depth < 32:
            count = self._number(line, least=-1)
            return None if count < 0 else [self._read(depth + 1) for _ in range(count)]
        raise self._not_a_reply(line)

    def _read_string(self, size: int) -> bytes | None:
        if size < 0:
            return None
        text = self.recv_exactly(size + 2)
        if not text.endswith(b"\r\n"):
            raise self._not_a_reply(text[-20:])
        return text[:-2]

    def _number(self, line: bytes, least: int | None = None) -> int:
        if not NUMBER.fullmatch(line, 1) or (least is not None and int(line[1:]) < least):
            raise self._not_a_reply(line)
        return int(line[1:])

    def _not_a_reply(self, found: bytes) -> ProtocolError:
        return ProtocolError(f"{self!r} has sent what is no reply: {found[:40]!r}")


def _encoded(word: str | bytes | float) -> bytes:
    if isinstance(word, (bytes, bytearray, memoryview)):
        return bytes(word)
    if isinstance(word, bool) or not isinstance(word, (str, int, float)):
        raise TypeError(f"a command is made of str, bytes, int and float, not {word!r}")
    return str(word).encode()


def main(host: str, port: str) -> None:
    pool = Pool(
        Resp,
        {"host": host, "port": int(port), "connect_timeout": 2, "timeout": 5},
        initial_connections=1,  # if that fails, its error is raised here
        max_connections=4,
        acquire_timeout=5,
        discard_on=OSError,  # a ReplyError costs no connection
        max_lifetime=1800,
        keepalive=60,
        name="valkey",
    )

    def put(number: int) -> None:
        with pool.connection() as conn:
            conn.call("SET", f"key{number}", bytes([number, 0, 13, 10]), "EX", 60)

    with pool:
        jobs = [gevent.spawn(put, number) for number in range(50)]
        try:
            gevent.joinall(jobs, raise_error=True)
        finally:
            gevent.killall(jobs)  # where one has failed the others need not go on

        with pool.connection() as conn:
            print("key7 is", conn.call("GET", "key7"))
            print("key77 is", conn.call("GET", "key77"))

        with pool.connection() as conn:
            conn.call("MULTI")
            conn.call("STRLEN", "key8")
            conn.call("INCR", "key8")
            print("a transaction:", conn.call("EXEC"))

        try:
            with pool.connection() as conn:
                conn.call("INCR", "key9")
        except ReplyError as error:
            print("refused:", error)
        print(pool.stats().closed["discarded"], "closed")

        try:
            with gevent.Timeout(0.2), pool.connection() as conn:
                conn.call("BLPOP", "nothing", 0)
        except gevent.Timeout:
            print("given up;", pool.stats().closed["discarded"], "closed")

        with pool.connection() as conn:
            print("the next one hears", conn.call("PING", "my own reply"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, ReplyError, PoolError) as error:
        sys.exit(str(error))

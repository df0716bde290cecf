"""Connections that ask for a line to be echoed, do what a test tells them to, and count what a pool asks of them."""

from __future__ import annotations

from typing import Any

from gsocketpool import Pool, TcpConnection
from tests.dials import BOUND
from tests.servers import Server


class Line(TcpConnection):
    """Does what its test tells it to, and counts what the pool asks."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.checks = self.resets = self.expiries = 0
        self.healthy = True
        self.expired = False

    def ask(self, text: str) -> str:
        self.send(text.encode() + b"\n")
        return self.recv_until(b"\n").decode()

    def check(self) -> bool:
        self.checks += 1
        return self.healthy and super().check()

    def is_expired(self) -> bool:
        self.expiries += 1
        return self.expired


def line_pool(server: Server, kind: type[Line] = Line, **options: Any) -> Pool[Line]:
    return Pool(kind, {"host": "127.0.0.1", "port": server.port}, **options)


def borrow(pool: Pool[Line], count: int) -> list[Line]:
    return [pool.acquire(timeout=BOUND) for _ in range(count)]


def give_back(pool: Pool[Line], lines: list[Line]) -> None:
    for line in lines:
        pool.release(line)

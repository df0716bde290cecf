"""Echo over real sockets: a pool, against as many dedicated sockets."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import gevent

from benchmarks import measure as m
from benchmarks.peer import opened
from benchmarks.peers import PEERS
from benchmarks.server import Server
from gsocketpool import TcpConnection

CONNECTIONS = 10
MESSAGE = b"x" * 64

#: What is measured: the kind of server, the number of borrowers, the number of requests.
SITUATIONS = {
    "10 borrowers": ("bytes", CONNECTIONS, 20_000),
    "100 borrowers": ("bytes", 100, 20_000),
    "100 borrowers, 1 ms": ("slow", 100, 5_000),
}


def measure(peer: str, port: int, borrowers: int, requests: int) -> m.Result:
    """Send so many requests over so many sockets; say how many were answered each second.

    The same connection class does the same work on both sides. The dedicated sockets have a greenlet each, and no pool.
    All greenlets draw on one supply of requests, so that none has to be waited for at the end.
    """
    connect = functools.partial(TcpConnection, "127.0.0.1", port)
    size = len(MESSAGE)
    supply = iter(range(requests))
    ended = 0.0

    def dedicated(connection: TcpConnection) -> None:
        nonlocal ended
        for _ in supply:
            connection.send(MESSAGE)
            connection.recv_exactly(size)
        ended = time.perf_counter()

    def borrower() -> None:
        nonlocal ended
        for _ in supply:
            with borrow() as connection:
                connection.send(MESSAGE)
                connection.recv_exactly(size)
        ended = time.perf_counter()

    connections: list[TcpConnection] = []
    greenlets: list[Any]
    if peer == "dedicated":
        connections += [opened(connect) for _ in range(CONNECTIONS)]
        greenlets = [gevent.spawn(dedicated, connection) for connection in connections]
    else:
        borrow = PEERS[peer].build(connect, CONNECTIONS).connection
        greenlets = [gevent.spawn(borrower) for _ in range(borrowers)]
    began = time.perf_counter()
    gevent.joinall(greenlets, raise_error=True)
    for connection in connections:
        connection.close()
    return {"requests/s": requests / (ended - began)}


def report(run: m.Run) -> None:
    """Print the table."""
    # A pool that polls is of no use here: 0.1.6 would take minutes.
    left_out = ("gsocketpool-0.1.6", "ours, for ever", "ours, patient")
    names = ["dedicated", *run.available(PEERS, [name for name in PEERS if name not in left_out])]
    with Server("bytes") as at_once, Server("slow") as slow:
        ports = {"bytes": at_once.port, "slow": slow.port}
        results = run.side_by_side(
            {
                (name, situation): {
                    "case": "echo",
                    "peer": name,
                    "port": ports[kind],
                    "borrowers": borrowers,
                    "requests": requests // 20 if run.quick else requests,
                }
                for situation, (kind, borrowers, requests) in SITUATIONS.items()
                for name in names
            },
            patched=[
                (name, situation) for name, situation in itertools.product(names, SITUATIONS) if _is_patched(name)
            ],
            processes=3,
            rounds=3,
        )
    print(
        f"requests/s of {len(MESSAGE)} bytes over {CONNECTIONS} sockets, and x what {CONNECTIONS} greenlets do"
        " that have a socket each;\nthe server answers at once, or after 1 ms\n"
    )
    print(
        m.table(
            ["pool", *itertools.chain.from_iterable((situation, "x") for situation in SITUATIONS)],
            [
                [
                    PEERS[name].title if name in PEERS else "dedicated sockets",
                    *itertools.chain.from_iterable(
                        (
                            f"{m.median(results[name, situation], 'requests/s'):,.0f}",
                            f"{_share(results, name, situation):.2f}",
                        )
                        for situation in SITUATIONS
                    ),
                ]
                for name in names
            ],
        )
    )
    for situation in SITUATIONS:
        run.target(
            f"echo, {situation}: requests, x as many dedicated sockets'",
            _share(results, "ours", situation),
            at_least=0.97,
        )


def _is_patched(name: str) -> bool:
    return name in PEERS and PEERS[name].patched


def _share(results: dict[tuple[str, str], list[m.Result]], name: str, situation: str) -> float:
    return m.ratio(results[name, situation], results["dedicated", situation], "requests/s")

"""Uncontended: what one acquire and release cost, as a pair of calls and as a ``with`` block."""

from __future__ import annotations

import time
import timeit
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent.lock

from benchmarks import measure as m
from benchmarks.fakes import Fake
from benchmarks.peer import ENDPOINT, opened
from benchmarks.peers import PEERS

#: What is timed, in each pool's own words: no adapter's cost is added. ``pool`` is a local name.
PAIR = {
    "floor": "connection = pool.pop(); pool.append(connection)",
    "lifo": "connection = pool.get(); pool.put(connection)",
    "semaphore": "pool.acquire(); pool.release()",
    "gsocketpool-0.1.6": "connection = pool.acquire(); pool.release(connection)",
    "sqlalchemy": "connection = pool.connect(); connection.close()",
    "generic-connection-pool": f"connection = pool.acquire({ENDPOINT!r}); pool.release(connection, {ENDPOINT!r})",
    "connpool": "connection = pool.acquire(); pool.release(connection)",
    "ours": "connection = pool.acquire(); pool.release(connection)",
}
WITH = {
    "gsocketpool-0.1.6": "with pool.connection() as connection: pass",
    "generic-connection-pool": f"with pool.connection({ENDPOINT!r}) as connection: pass",
    "connpool": "with pool.connection() as connection: pass",
    "ours": "with pool.connection() as connection: pass",
}
BARE: dict[str, Callable[[], Any]] = {
    "floor": lambda: deque([opened(Fake)]),
    "semaphore": lambda: gevent.lock.BoundedSemaphore(1),
}
TITLES = {"floor": "floor: deque.pop + append", "semaphore": "gevent BoundedSemaphore"}


def measure(peer: str, statement: str, seconds: float) -> m.Result:
    """Time one statement for about so many seconds of processor time; ``timeit`` keeps the garbage collector off."""
    make = BARE.get(peer) or (lambda: PEERS[peer].build(Fake, 1).pool)
    timer = timeit.Timer(statement, "pool = make()", timer=time.process_time, globals={"make": make})
    number = 1000
    number = max(number, int(number * seconds / timer.timeit(number)))
    return {"ns": timer.timeit(number) / number * 1e9}


def report(run: m.Run) -> None:
    """Print the table."""
    names = [name for name in PAIR if name in BARE or name in run.available(PEERS, [name])]
    seconds = 0.005 if run.quick else 0.1
    jobs = {
        (name, shape): {"case": "pair", "peer": name, "statement": statements[name], "seconds": seconds}
        for name in names
        for shape, statements in (("pair", PAIR), ("with", WITH))
        if name in statements
    }
    results = run.side_by_side(jobs, processes=5, rounds=5)

    def figures(name: str, shape: str) -> list[str]:
        found = results.get((name, shape))
        if not found:
            return ["", "", ""]
        base = results.get(("gsocketpool-0.1.6", shape))
        return [
            f"{m.median(found, 'ns'):,.0f}",
            f"{min(result['ns'] for result in found):,.0f}",
            f"{m.ratio(found, base, 'ns'):.2f}" if base else "",
        ]

    print(
        m.table(
            ["nanoseconds", "pair", "best", "x 0.1.6", "with", "best", "x 0.1.6"],
            [[TITLES.get(name) or PEERS[name].title, *figures(name, "pair"), *figures(name, "with")] for name in names],
        )
    )
    for shape, at_most in (("pair", 1.4), ("with", 0.5)):
        if base := results.get(("gsocketpool-0.1.6", shape)):
            run.target(
                f"uncontended {shape}, x gsocketpool 0.1.6's",
                m.ratio(results["ours", shape], base, "ns"),
                at_most=at_most,
            )

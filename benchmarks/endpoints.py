"""Many endpoints: what it costs to find the pool of one, and a cap over all."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks import measure as m
from benchmarks.fakes import Fake
from benchmarks.peer import PATIENCE, opened
from benchmarks.peers import PEERS

SIZES = (1, 10, 1000)

TITLES = {
    "pools": "gsocketpool: as many plain pools, at hand",
    "group": "gsocketpool: group.connection(host=, port=)",
    "capped": "the same, with max_total",
    "generic-connection-pool": "generic-connection-pool",
}


class Endpoint(Fake):
    """A connection to nowhere that is told where."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()


def _pools(options: list[dict[str, Any]]) -> Callable[[], None]:
    from gsocketpool import Pool

    made = {each["port"]: Pool(Endpoint, each) for each in options}
    turns = [made[each["port"]] for each in options]

    def once() -> None:
        for pool in turns:
            with pool.connection():
                pass

    return once


def _group(options: list[dict[str, Any]], **settings: Any) -> Callable[[], None]:
    from gsocketpool import PoolGroup

    group = PoolGroup(Endpoint, **settings)

    def once() -> None:
        for each in options:
            with group.connection(**each):
                pass

    return once


def _generic_connection_pool(options: list[dict[str, Any]]) -> Callable[[], None]:
    threading: Any = importlib.import_module("generic_connection_pool.threading")

    class Manager(threading.BaseConnectionManager):  # type: ignore[misc]
        def create(self, endpoint: tuple[str, int], timeout: float | None = None) -> Any:
            return opened(Fake)

        def dispose(self, endpoint: tuple[str, int], conn: Any, timeout: float | None = None) -> None:
            conn.close()

    pool = threading.ConnectionPool(Manager(), acquire_timeout=PATIENCE, max_size=10, total_max_size=100_000)
    turns = [(each["host"], each["port"]) for each in options]

    def once() -> None:
        for endpoint in turns:
            with pool.connection(endpoint):
                pass

    return once


MAKERS: dict[str, Callable[[list[dict[str, Any]]], Callable[[], None]]] = {
    "pools": _pools,
    "group": _group,
    "capped": lambda options: _group(options, max_total=100_000),
    "generic-connection-pool": _generic_connection_pool,
}


def measure(peer: str, endpoints: int, turns: int) -> m.Result:
    """Time one ``with`` block, at endpoints in random order, each of which has an idle connection."""
    options = [{"host": "nowhere", "port": port} for port in range(endpoints)]
    chance = random.Random(endpoints)
    visits = options + [dict(chance.choice(options)) for _ in range(max(0, 2000 - endpoints))]
    chance.shuffle(visits)
    once = MAKERS[peer](visits)
    once()
    once()
    began = time.process_time()
    for _ in range(turns):
        once()
    return {"ns": (time.process_time() - began) / (turns * len(visits)) * 1e9}


def report(run: m.Run) -> None:
    """Print the table."""
    names = [name for name in MAKERS if name == "pools" or name in ("group", "capped") or run.available(PEERS, [name])]
    sizes = SIZES[:2] if run.quick else SIZES
    results = run.side_by_side(
        {
            (name, size): {"case": "endpoints", "peer": name, "endpoints": size, "turns": 2 if run.quick else 20}
            for name in names
            for size in sizes
        },
        processes=5,
        rounds=3,
    )
    print("nanoseconds for one with block, at endpoints in random order, each with one idle connection\n")
    over = {
        (name, size): m.median(
            [{"ns": a["ns"] - b["ns"]} for a, b in zip(results[name, size], results["pools", size], strict=True)],
            "ns",
        )
        for name in names
        for size in sizes
    }
    print(
        m.table(
            ["endpoints", *(f"{each:,}" for size in sizes for each in (size,)), *(f"more, {size:,}" for size in sizes)],
            [
                [
                    TITLES[name],
                    *(f"{m.median(results[name, size], 'ns'):,.0f}" for size in sizes),
                    *("" if name == "pools" else f"{over[name, size]:,.0f}" for size in sizes),
                ]
                for name in names
            ],
        )
    )
    for name in ("group", "capped"):
        for size in sizes:
            title = f"{size:,} endpoints, more than a plain pool's with, ns: {TITLES[name]}"
            run.target(title, over[name, size], at_most=1000)

"""asyncio: what one acquire and release cost, and what it takes when many tasks want few connections."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import importlib.util
import operator
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from benchmarks import measure as m
from benchmarks import runtimes
from benchmarks.fakes import Fake
from benchmarks.peer import ENDPOINT, PATIENCE, Peer, opened

TASKS = 200
CONNECTIONS = 10


@dataclass(frozen=True)
class Built:
    """A pool that is ready: what its users call, or the block that they write where there is nothing else."""

    pool: Any
    acquire: Callable[[], Awaitable[Any]] | None
    release: Callable[[Any], Awaitable[Any]] | None
    connection: Callable[[], AbstractAsyncContextManager[Any]]


class Floor:
    """The least that a fair pool can do on asyncio: a stack of idle connections and a queue of futures.

    It knows no timeout, and loses a connection if the task that waits for it is cancelled.
    """

    def __init__(self, factory: Callable[[], Any], size: int) -> None:
        self.idle = [opened(factory) for _ in range(size)]
        self.waiters: deque[asyncio.Future[Any]] = deque()
        self._create_future = asyncio.get_running_loop().create_future

    async def acquire(self) -> Any:
        """Take an idle connection, or wait for one."""
        if self.idle:
            return self.idle.pop()
        future = self._create_future()
        self.waiters.append(future)
        return await future

    async def release(self, connection: Any) -> None:
        """Hand the connection to whoever waits longest, or keep it."""
        if self.waiters:
            self.waiters.popleft().set_result(connection)
        else:
            self.idle.append(connection)


class PsycopgFake(runtimes.PsycopgFacts, Fake):
    """A connection to nowhere that psycopg_pool can lend."""

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Any:
        """Make one."""
        return opened(cls)

    async def close(self) -> None:  # type: ignore[override]
        """Remember that it is closed."""
        self.connected = False

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


async def _floor(factory: Callable[[], Any], size: int) -> Built:
    floor = Floor(factory, size)
    return _without_block(floor, floor.acquire, floor.release)


async def _queue(make: Callable[[], Any], factory: Callable[[], Any], size: int) -> Built:
    queue = make()
    for _ in range(size):
        queue.put_nowait(opened(factory))
    return _without_block(queue, queue.get, queue.put)


async def _generic_connection_pool(factory: Callable[[], Any], size: int) -> Built:
    module: Any = importlib.import_module("generic_connection_pool.asyncio")

    class Manager(module.BaseConnectionManager):  # type: ignore[misc]
        async def create(self, endpoint: str) -> Any:
            return opened(factory)

        async def dispose(self, endpoint: str, conn: Any) -> None:
            conn.close()

    # By default nobody has a deadline, and it is let off one here: that would cost it two more tasks for each acquire.
    pool = module.ConnectionPool(Manager(), min_idle=size, max_size=size, total_max_size=size)
    return Built(
        pool,
        functools.partial(pool.acquire, ENDPOINT),
        functools.partial(pool.release, endpoint=ENDPOINT),
        functools.partial(pool.connection, ENDPOINT),
    )


async def _asyncio_connection_pool(factory: Callable[[], Any], size: int) -> Built:
    module: Any = importlib.import_module("asyncio_connection_pool")

    class Strategy(module.ConnectionStrategy):  # type: ignore[misc]
        async def make_connection(self) -> Any:
            return opened(factory)

        def connection_is_closed(self, conn: Any) -> bool:
            return not conn.is_connected()

        async def close_connection(self, conn: Any) -> None:
            conn.close()

    pool = module.ConnectionPool(strategy=Strategy(), max_size=size)
    return Built(pool, None, None, pool.get_connection)


async def _connpool(factory: Callable[[], Any], size: int) -> Built:
    module: Any = importlib.import_module("connpool")
    pool = module.AsyncConnectionPool.from_callables(
        functools.partial(opened, factory),
        close=operator.methodcaller("close"),
        validate=operator.methodcaller("check"),
        config=module.PoolConfig(max_size=size, acquire_timeout=PATIENCE),
    )
    return Built(pool, pool.acquire, pool.release, pool.connection)


async def _psycopg_pool(factory: Callable[[], Any], size: int) -> Built:
    make: Any = importlib.import_module("psycopg_pool").AsyncConnectionPool
    pool = make(connection_class=PsycopgFake, min_size=size, max_size=size, timeout=PATIENCE, open=False)
    await pool.open(wait=True)
    return Built(pool, pool.getconn, pool.putconn, pool.connection)


async def _gsocketpool(factory: Callable[[], Any], size: int, timeout: Any = ...) -> Built:
    from gsocketpool.asyncio import Pool

    pool: Any = Pool(factory, max_connections=size, name="benchmark")
    if timeout is ...:
        return Built(pool, pool.acquire, pool.release, pool.connection)
    return Built(pool, lambda: pool.acquire(timeout=timeout), pool.release, lambda: pool.connection(timeout=timeout))


def _without_block(pool: Any, acquire: Callable[[], Any], release: Callable[[Any], Any]) -> Built:
    @asynccontextmanager
    async def connection() -> AsyncIterator[Any]:
        borrowed = await acquire()
        try:
            yield borrowed
        finally:
            await release(borrowed)

    return Built(pool, acquire, release, connection)


#: By the names that the cases use. The first two are no pools, but what one could be made of.
PEERS = {
    "floor": Peer("floor", _floor),
    "lifo": Peer("asyncio.LifoQueue", functools.partial(_queue, asyncio.LifoQueue)),
    "generic-connection-pool": Peer("generic-connection-pool", _generic_connection_pool, "generic-connection-pool"),
    "asyncio-connection-pool": Peer("asyncio-connection-pool", _asyncio_connection_pool, "asyncio-connection-pool"),
    "connpool": Peer("connpool", _connpool, "connpool"),
    "psycopg_pool": Peer("psycopg_pool, with fakes", _psycopg_pool, "psycopg-pool"),
    "ours": Peer("gsocketpool", _gsocketpool),
    "ours, for ever": Peer("gsocketpool, timeout=None", functools.partial(_gsocketpool, timeout=None)),
}
NO_POOLS = ("floor", "lifo")

#: What is timed, in each pool's own words. ``pool`` is a local name.
PAIR = {
    "floor": "connection = await pool.acquire(); await pool.release(connection)",
    "lifo": "connection = await pool.get(); await pool.put(connection)",
    "generic-connection-pool": (
        f"connection = await pool.acquire({ENDPOINT!r}); await pool.release(connection, {ENDPOINT!r})"
    ),
    "connpool": "connection = await pool.acquire(); await pool.release(connection)",
    "psycopg_pool": "connection = await pool.getconn(); await pool.putconn(connection)",
    "ours": "connection = await pool.acquire(); await pool.release(connection)",
}
WITH = {
    "generic-connection-pool": f"async with pool.connection({ENDPOINT!r}) as connection: pass",
    "asyncio-connection-pool": "async with pool.get_connection() as connection: pass",
    "connpool": "async with pool.connection() as connection: pass",
    "psycopg_pool": "async with pool.connection() as connection: pass",
    "ours": "async with pool.connection() as connection: pass",
}

#: As ``timeit`` does it, which knows no ``await``.
TIMED = """
async def timed(pool, number):
    began = clock()
    for _ in repeat(None, number):
        {statement}
    return clock() - began
"""


def uvloop_there() -> bool:
    """Say whether the pools can be measured on uvloop as well."""
    return importlib.util.find_spec("uvloop") is not None


def measure(peer: str, loop: str, statement: str = "", seconds: float = 0.0, turns: int = 0) -> m.Result:
    """Time a statement if there is one, else let the tasks take turns.

    :param loop: the module whose ``run()`` starts the loop.
    """

    async def measured() -> m.Result:
        built = await _filled(peer, 1 if statement else CONNECTIONS)
        result = await (_time(built.pool, statement, seconds) if statement else _take_turns(built, turns))
        if peer in ("psycopg_pool", "ours", "ours, for ever"):
            await built.pool.close()  # they have tasks, or the like
        return result

    result: m.Result = importlib.import_module(loop).run(measured())
    return result


async def _filled(peer: str, size: int) -> Built:
    """Make a pool, and open all its connections."""
    built: Built = await PEERS[peer].make(Fake, size)
    async with AsyncExitStack() as all_of_them:
        for _ in range(size):
            await all_of_them.enter_async_context(built.connection())
    return built


async def _time(pool: Any, statement: str, seconds: float) -> m.Result:
    names: dict[str, Any] = {"clock": time.process_time, "repeat": repeat}
    exec(TIMED.format(statement=statement), names)
    timed = names["timed"]
    gc.disable()
    try:
        number = 1000
        number = max(number, int(number * seconds / await timed(pool, number)))
        return {"ns": await timed(pool, number) / number * 1e9}
    finally:
        gc.enable()


async def _take_turns(built: Built, turns: int) -> m.Result:
    acquire, release, connection, clock = built.acquire, built.release, built.connection, time.perf_counter
    waits: list[float] = []

    async def calls() -> None:
        assert acquire is not None
        assert release is not None
        for _ in range(turns):
            began = clock()
            borrowed = await acquire()
            waits.append(clock() - began)
            await asyncio.sleep(0)
            await release(borrowed)

    async def blocks() -> None:
        for _ in range(turns):
            began = clock()
            async with connection():
                waits.append(clock() - began)
                await asyncio.sleep(0)

    borrower = blocks if acquire is None else calls
    borrowers = [asyncio.create_task(borrower()) for _ in range(TASKS)]
    began = clock()
    await asyncio.gather(*borrowers)
    seconds = clock() - began
    assert len(waits) == TASKS * turns
    return runtimes.summary(waits, seconds)


def report(run: m.Run) -> None:
    """Print the tables."""
    names = run.available(PEERS, PEERS)
    loops = ["asyncio"]
    if uvloop_there():
        loops.append("uvloop")
    else:
        run.notes.append("uvloop: it is not installed; `make peers` installs it")
    seconds = 0.005 if run.quick else 0.1
    turns = 5 if run.quick else 100
    for loop in loops:
        results = run.side_by_side(
            {
                (way, name): {
                    "case": "asyncio",
                    "peer": name,
                    "loop": loop,
                    "statement": statements[name],
                    "seconds": seconds,
                }
                for name in names
                for way, statements in (("pair", PAIR), ("with", WITH))
                if name in statements
            },
            processes=5,
            rounds=5,
        )
        print(f"{loop}'s loop, uncontended\n")
        runtimes.report_pairs(run, loop, PEERS, results, NO_POOLS)
        print(f"\n{loop}'s loop, {TASKS} tasks, {CONNECTIONS} connections, {turns} turns each\n")
        turned = run.side_by_side(
            {name: {"case": "asyncio", "peer": name, "loop": loop, "turns": turns} for name in names},
            processes=15,
            apart=True,
        )
        runtimes.report_turns(run, loop, PEERS, turned, NO_POOLS)
        print()

"""The pools that are measured on gevent: those made for it, and those made for threads, monkey-patched."""

from __future__ import annotations

import functools
import importlib
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gevent
import gevent.queue

from benchmarks.peer import (
    PATIENCE,
    Built,
    Peer,
    connpool,
    folder_of_016,
    generic_connection_pool,
    opened,
    sqlalchemy,
)


class Floor:
    """The least that a fair pool can do on gevent: a stack of idle connections and a queue of waiting greenlets.

    Whoever releases hands over through the hub, first come, first served. It survives neither a kill nor a timeout.
    """

    def __init__(self, factory: Callable[[], Any], size: int) -> None:
        self.idle = [factory() for _ in range(size)]
        self.waiters: deque[Any] = deque()
        self._hub = gevent.get_hub()
        self._run_callback = self._hub.loop.run_callback

    def acquire(self) -> Any:
        """Take an idle connection, or wait for one."""
        if self.idle:
            return self.idle.pop()
        self.waiters.append(gevent.getcurrent())
        return self._hub.switch()

    def release(self, connection: Any) -> None:
        """Hand the connection to whoever waits longest, or keep it."""
        if self.waiters:
            self._run_callback(self.waiters.popleft().switch, connection)
        else:
            self.idle.append(connection)


@functools.cache
def gsocketpool_016() -> ModuleType:
    """Import gsocketpool 0.1.6 beside the package of the same name that is measured."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name == "gsocketpool" or name.startswith("gsocketpool.")]

    kept = {name: sys.modules.pop(name) for name in ours()}
    sys.path.insert(0, str(folder_of_016()))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module("gsocketpool")
        importlib.import_module("gsocketpool.pool")
    finally:
        sys.path.remove(str(folder_of_016()))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)
        importlib.invalidate_caches()
    if folder_of_016().resolve() not in Path(module.__file__ or "").resolve().parents:
        raise ImportError(f"gsocketpool 0.1.6 was looked for in {folder_of_016()}, but {module.__file__} was imported")
    return module


def _floor(factory: Callable[[], Any], size: int) -> Built:
    floor = Floor(functools.partial(opened, factory), size)
    return Built.without_block(floor, floor.acquire, floor.release)


def _lifo_queue(factory: Callable[[], Any], size: int) -> Built:
    queue: Any = gevent.queue.LifoQueue()
    for _ in range(size):
        queue.put(opened(factory))
    return Built.without_block(queue, queue.get, queue.put)


def _gsocketpool(factory: Callable[[], Any], size: int, timeout: Any = ...) -> Built:
    from gsocketpool import Pool

    pool: Any = Pool(factory, max_connections=size, name="benchmark")
    if timeout is ...:
        return Built(pool, pool.acquire, pool.release, pool.connection)
    # As a caller would write it: a partial() with a keyword costs more than a call.
    return Built(pool, lambda: pool.acquire(timeout=timeout), pool.release, lambda: pool.connection(timeout))


def _gsocketpool_016(factory: Callable[[], Any], size: int) -> Built:
    make: Any = gsocketpool_016().Pool
    pool = make(factory, max_connections=size)
    # It polls every 0.1 s and recurses each time: this is about as often as the interpreter's stack lets it.
    acquire = functools.partial(pool.acquire, retry=900)
    return Built.without_block(pool, acquire, pool.release)


def _generic_connection_pool(factory: Callable[[], Any], size: int) -> Built:
    from gsocketpool import TcpConnection

    return generic_connection_pool(factory, size, sockets=isinstance(factory(), TcpConnection))


#: By the names that the cases use. `ours` is called as its users call it: `acquire()` gives up after a second.
PEERS = {
    "floor": Peer("floor", _floor),
    "lifo": Peer("gevent LifoQueue", _lifo_queue),
    "gsocketpool-0.1.6": Peer("gsocketpool 0.1.6", _gsocketpool_016, "gsocketpool==0.1.6"),
    "sqlalchemy": Peer("SQLAlchemy QueuePool", sqlalchemy, "SQLAlchemy", patched=True),
    "generic-connection-pool": Peer(
        "generic-connection-pool", _generic_connection_pool, "generic-connection-pool", patched=True
    ),
    "connpool": Peer("connpool", connpool, "connpool", patched=True),
    "ours": Peer("gsocketpool", _gsocketpool),
    "ours, for ever": Peer("gsocketpool, timeout=None", functools.partial(_gsocketpool, timeout=None)),
    # Only where a second is too short.
    "ours, patient": Peer(f"gsocketpool, timeout={PATIENCE:g}", functools.partial(_gsocketpool, timeout=PATIENCE)),
}

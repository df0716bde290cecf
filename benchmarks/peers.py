"""The pools that are measured, each behind the same three callables.

Every pool gets the same connection class, so that only the pools differ. Peers are imported by name when they are
wanted: a peer that is not installed is left out with a note, and no type checker needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import operator
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gevent
import gevent.queue

ROOT = Path(__file__).resolve().parent.parent

#: No pool may give up because it is measured beside a slow one.
PATIENCE = 120.0


@dataclass(frozen=True)
class Built:
    """A pool that is ready: ``acquire()``, ``release(connection)``, and the block that its users are told to write."""

    pool: Any
    acquire: Callable[[], Any]
    release: Callable[[Any], Any]
    connection: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Peer:
    """One pool: its name in the tables, and how to make one of ``size`` connections made by ``factory``."""

    title: str
    make: Callable[[Callable[[], Any], int], Built]
    distribution: str | None = None
    #: Written for threads: it runs on gevent in a process that is monkey-patched before anything else.
    patched: bool = False

    def build(self, factory: Callable[[], Any], size: int, *, fill: bool = True) -> Built:
        """Make a pool, and open all its connections, unless the case is about how it opens them."""
        built = self.make(factory, size)
        if fill:
            for connection in [built.acquire() for _ in range(size)]:
                built.release(connection)
        return built

    def missing(self) -> str | None:
        """Say why this peer cannot be measured here, or None."""
        if self.distribution is None:
            return None
        if self.distribution == "gsocketpool==0.1.6":
            if (folder_of_016() / "gsocketpool" / "pool.py").is_file():
                return None
            return f"{self.title}: not found in {folder_of_016()}; `make peers` installs it"
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.title}: {self.distribution} is not installed; `make peers` installs it"
        return None

    def version(self) -> str:
        """Return the version that is measured; nothing where the title says it, or where there is none."""
        try:
            return importlib.metadata.version(self.distribution or "")
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return ""


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


def folder_of_016() -> Path:
    """Return where gsocketpool 0.1.6 is installed: ``$GSOCKETPOOL_016``, else where ``make peers`` puts it."""
    return Path(os.environ.get("GSOCKETPOOL_016") or ROOT / ".venv" / "peers" / "gsocketpool-0.1.6")


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


def opened(factory: Callable[[], Any]) -> Any:
    """Make a connection and open it, for the pools that expect an open one."""
    connection = factory()
    connection.open()
    return connection


@contextmanager
def _try_finally(acquire: Callable[[], Any], release: Callable[[Any], Any]) -> Iterator[Any]:
    connection = acquire()
    try:
        yield connection
    finally:
        release(connection)


def _built(pool: Any, acquire: Callable[[], Any], release: Callable[[Any], Any]) -> Built:
    return Built(pool, acquire, release, functools.partial(_try_finally, acquire, release))


def _floor(factory: Callable[[], Any], size: int) -> Built:
    floor = Floor(functools.partial(opened, factory), size)
    return _built(floor, floor.acquire, floor.release)


def _lifo_queue(factory: Callable[[], Any], size: int) -> Built:
    queue: Any = gevent.queue.LifoQueue()
    for _ in range(size):
        queue.put(opened(factory))
    return _built(queue, queue.get, queue.put)


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
    return Built(pool, acquire, pool.release, functools.partial(_try_finally, acquire, pool.release))


def _sqlalchemy(factory: Callable[[], Any], size: int) -> Built:
    make: Any = importlib.import_module("sqlalchemy.pool").QueuePool
    pool = make(
        functools.partial(opened, factory),
        pool_size=size,
        max_overflow=0,
        timeout=PATIENCE,
        reset_on_return=None,
    )

    @contextmanager
    def connection() -> Iterator[Any]:
        proxy = pool.connect()
        try:
            yield proxy.dbapi_connection
        except BaseException:
            # By hand: the pool alone would lend it again.
            proxy.invalidate()
            raise
        proxy.close()

    return Built(pool, pool.connect, operator.methodcaller("close"), connection)


ENDPOINT = "benchmark"


def _generic_connection_pool(factory: Callable[[], Any], size: int) -> Built:
    from gsocketpool import TcpConnection

    threading: Any = importlib.import_module("generic_connection_pool.threading")
    sockets: Any = importlib.import_module("generic_connection_pool.contrib.socket")

    class Manager(threading.BaseConnectionManager):  # type: ignore[misc]
        def create(self, endpoint: str, timeout: float | None = None) -> Any:
            return opened(factory)

        def dispose(self, endpoint: str, conn: Any, timeout: float | None = None) -> None:
            conn.close()

    class SocketManager(Manager):
        def check_aliveness(self, endpoint: str, conn: Any, timeout: float | None = None) -> bool:
            # What its own manager of TCP sockets does.
            return bool(sockets.SocketAlivenessCheckingMixin.check_aliveness(self, endpoint, conn.get(), timeout))

    manager = SocketManager() if isinstance(factory(), TcpConnection) else Manager()
    pool = threading.ConnectionPool(
        manager, acquire_timeout=PATIENCE, min_idle=size, max_size=size, total_max_size=size
    )
    return Built(
        pool,
        functools.partial(pool.acquire, ENDPOINT),
        functools.partial(pool.release, endpoint=ENDPOINT),
        functools.partial(pool.connection, ENDPOINT),
    )


def _connpool(factory: Callable[[], Any], size: int) -> Built:
    connpool: Any = importlib.import_module("connpool")
    pool = connpool.ConnectionPool.from_callables(
        functools.partial(opened, factory),
        close=operator.methodcaller("close"),
        validate=operator.methodcaller("check"),
        config=connpool.PoolConfig(max_size=size, acquire_timeout=PATIENCE),
    )
    return Built(pool, pool.acquire, pool.release, pool.connection)


#: By the names that the cases use. `ours` is called as its users call it: `acquire()` gives up after a second.
PEERS = {
    "floor": Peer("floor", _floor),
    "lifo": Peer("gevent LifoQueue", _lifo_queue),
    "gsocketpool-0.1.6": Peer("gsocketpool 0.1.6", _gsocketpool_016, "gsocketpool==0.1.6"),
    "sqlalchemy": Peer("SQLAlchemy QueuePool", _sqlalchemy, "SQLAlchemy", patched=True),
    "generic-connection-pool": Peer(
        "generic-connection-pool", _generic_connection_pool, "generic-connection-pool", patched=True
    ),
    "connpool": Peer("connpool", _connpool, "connpool", patched=True),
    "ours": Peer("gsocketpool", _gsocketpool),
    "ours, for ever": Peer("gsocketpool, timeout=None", functools.partial(_gsocketpool, timeout=None)),
    # Only where a second is too short.
    "ours, patient": Peer(f"gsocketpool, timeout={PATIENCE:g}", functools.partial(_gsocketpool, timeout=PATIENCE)),
}

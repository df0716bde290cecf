"""A pool that is measured: what the cases ask of it, and how those made for threads are set up.

Every pool gets the same connection class, so that only the pools differ. Peers are imported by name when they are
wanted: a peer that is not installed is left out with a note, and no type checker needs it. Nothing here loads gevent.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: No pool may give up because it is measured beside a slow one.
PATIENCE = 120.0

#: The one endpoint, for the pools that have many.
ENDPOINT = "benchmark"


@dataclass(frozen=True)
class Built:
    """A pool that is ready: ``acquire()``, ``release(connection)``, and the block that its users are told to write."""

    pool: Any
    acquire: Callable[[], Any]
    release: Callable[[Any], Any]
    connection: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def without_block(cls, pool: Any, acquire: Callable[[], Any], release: Callable[[Any], Any]) -> Built:
        """Describe a pool that has no such block: its users write ``try`` and ``finally``."""
        return cls(pool, acquire, release, functools.partial(try_finally, acquire, release))


@dataclass(frozen=True)
class Peer:
    """One pool: its name in the tables, and how to make one of ``size`` connections made by ``factory``."""

    title: str
    #: What it makes is a `Built`, or whatever else the cases of its runtime want.
    make: Callable[[Callable[[], Any], int], Any]
    distribution: str | None = None
    #: Written for threads: it runs on gevent in a process that is monkey-patched before anything else.
    patched: bool = False

    def build(self, factory: Callable[[], Any], size: int, *, fill: bool = True) -> Built:
        """Make a pool, and open all its connections, unless the case is about how it opens them."""
        built: Built = self.make(factory, size)
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


def folder_of_016() -> Path:
    """Return where gsocketpool 0.1.6 is installed: ``$GSOCKETPOOL_016``, else where ``make peers`` puts it."""
    return Path(os.environ.get("GSOCKETPOOL_016") or ROOT / ".venv" / "peers" / "gsocketpool-0.1.6")


def opened(factory: Callable[[], Any]) -> Any:
    """Make a connection and open it, for the pools that expect an open one."""
    connection = factory()
    connection.open()
    return connection


@contextmanager
def try_finally(acquire: Callable[[], Any], release: Callable[[Any], Any]) -> Iterator[Any]:
    """Borrow as one does from a pool that has no block of its own."""
    connection = acquire()
    try:
        yield connection
    finally:
        release(connection)


def sqlalchemy(factory: Callable[[], Any], size: int) -> Built:
    """Make SQLAlchemy's ``QueuePool``, without the rollback that it ends a transaction with."""
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


def generic_connection_pool(factory: Callable[[], Any], size: int, *, sockets: bool = False) -> Built:
    """Make generic-connection-pool's pool for threads; it checks ``sockets`` as its own manager of them does."""
    threading: Any = importlib.import_module("generic_connection_pool.threading")
    contrib: Any = importlib.import_module("generic_connection_pool.contrib.socket")

    class Manager(threading.BaseConnectionManager):  # type: ignore[misc]
        def create(self, endpoint: str, timeout: float | None = None) -> Any:
            return opened(factory)

        def dispose(self, endpoint: str, conn: Any, timeout: float | None = None) -> None:
            conn.close()

    class SocketManager(Manager):
        def check_aliveness(self, endpoint: str, conn: Any, timeout: float | None = None) -> bool:
            return bool(contrib.SocketAlivenessCheckingMixin.check_aliveness(self, endpoint, conn.get(), timeout))

    pool = threading.ConnectionPool(
        SocketManager() if sockets else Manager(),
        acquire_timeout=PATIENCE,
        min_idle=size,
        max_size=size,
        total_max_size=size,
    )
    return Built(
        pool,
        functools.partial(pool.acquire, ENDPOINT),
        functools.partial(pool.release, endpoint=ENDPOINT),
        functools.partial(pool.connection, ENDPOINT),
    )


def connpool(factory: Callable[[], Any], size: int) -> Built:
    """Make connpool's pool for threads."""
    module: Any = importlib.import_module("connpool")
    pool = module.ConnectionPool.from_callables(
        functools.partial(opened, factory),
        close=operator.methodcaller("close"),
        validate=operator.methodcaller("check"),
        config=module.PoolConfig(max_size=size, acquire_timeout=PATIENCE),
    )
    return Built(pool, pool.acquire, pool.release, pool.connection)

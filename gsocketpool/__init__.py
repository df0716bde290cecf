"""gsocketpool: a connection pool for gevent, and for threads, asyncio and eventlet.

The names here are gevent's. :mod:`gsocketpool.threading`, :mod:`gsocketpool.asyncio` and :mod:`gsocketpool.eventlet`
offer the same names. gevent is loaded when one of its own is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from gsocketpool.budget import Budget, Quota
from gsocketpool.connection import (
    Connection,
    EndOfStreamError,
    LimitExceededError,
    StreamConnection,
    TcpConnection,
    UnixConnection,
    Wrap,
    wrap,
)
from gsocketpool.events import Listener
from gsocketpool.exceptions import (
    BreakerOpenError,
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
)
from gsocketpool.retrying import retry
from gsocketpool.stats import GroupStats, Holder, PoolStats
from gsocketpool.view import debug

if TYPE_CHECKING:
    from gsocketpool.pool import Pool, PoolGroup

__version__ = "1.0.0"

__all__ = [
    "BreakerOpenError",
    "Budget",
    "Connection",
    "ConnectionNotFoundError",
    "EndOfStreamError",
    "GroupStats",
    "Holder",
    "LimitExceededError",
    "Listener",
    "Pool",
    "PoolClosedError",
    "PoolError",
    "PoolExhaustedError",
    "PoolGroup",
    "PoolStats",
    "Quota",
    "StreamConnection",
    "TcpConnection",
    "UnixConnection",
    "Wrap",
    "debug",
    "retry",
    "wrap",
]

#: Which of these are gevent's, and where they are found.
_GEVENT: Final = {"Pool": "gsocketpool.pool", "PoolGroup": "gsocketpool.pool"}


def __getattr__(name: str) -> Any:
    if name not in _GEVENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_GEVENT[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""gsocketpool: a connection pool for gevent."""

from __future__ import annotations

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
from gsocketpool.exceptions import (
    BreakerOpenError,
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
)
from gsocketpool.group import PoolGroup
from gsocketpool.pool import Pool
from gsocketpool.retrying import retry
from gsocketpool.stats import GroupStats, Holder, PoolStats

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
    "retry",
    "wrap",
]

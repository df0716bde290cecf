"""gsocketpool: a connection pool for gevent."""

from __future__ import annotations

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
from gsocketpool.exceptions import ConnectionNotFoundError, PoolClosedError, PoolError, PoolExhaustedError
from gsocketpool.pool import Pool
from gsocketpool.retrying import retry
from gsocketpool.stats import Holder, PoolStats

__version__ = "1.0.0"

__all__ = [
    "Connection",
    "ConnectionNotFoundError",
    "EndOfStreamError",
    "Holder",
    "LimitExceededError",
    "Pool",
    "PoolClosedError",
    "PoolError",
    "PoolExhaustedError",
    "PoolStats",
    "StreamConnection",
    "TcpConnection",
    "UnixConnection",
    "Wrap",
    "retry",
    "wrap",
]

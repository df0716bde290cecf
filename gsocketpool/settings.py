"""The parameters of a pool, looked at before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gsocketpool.arguments import seconds, share, two_delays, whole_number
from gsocketpool.budget import Budget
from gsocketpool.events import Listener, audience_of

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What a pool was told; :class:`gsocketpool.Pool` says what each of it means.

    :raises TypeError: one has the wrong type; the message names it and says what it takes.
    :raises ValueError: one has a wrong value; likewise.
    """

    initial_connections: int = 0
    max_connections: int = 200
    reap_expired_connections: bool = True
    reap_interval: float = 180
    name: str | None = None
    acquire_timeout: float | None = None
    check_after_idle: float | None = 0.5
    discard_on: type[BaseException] | tuple[type[BaseException], ...] = BaseException
    max_connecting: int = 8
    max_waiting: int | None = None
    order: str = "lifo"
    min_idle: int = 0
    idle_timeout: float | None = None
    max_lifetime: float | None = None
    lifetime_jitter: float = 0.1
    max_uses: int | None = None
    keepalive: float | None = None
    backoff: tuple[float, float] = (0.1, 30)
    leak_threshold: float | None = None
    reclaim: bool = False
    budget: Budget | None = None
    breaker: int | None = None
    listeners: Sequence[Listener] = ()

    def __post_init__(self) -> None:
        for flag in ("reap_expired_connections", "reclaim"):
            if getattr(self, flag) not in (False, True, None):
                raise TypeError(f"{flag} must be True or False, not {getattr(self, flag)!r}")
        whole_number("max_connections", self.max_connections, least=1)
        for count in ("initial_connections", "min_idle"):
            value = whole_number(count, getattr(self, count))
            if value > self.max_connections:
                raise ValueError(f"{count} must not be more than max_connections ({self.max_connections}), not {value}")
        whole_number("max_connecting", self.max_connecting, least=1)
        if self.max_waiting is not None:
            whole_number("max_waiting", self.max_waiting)
        for limit in ("max_uses", "breaker"):
            if getattr(self, limit) is not None:
                whole_number(limit, getattr(self, limit), least=1)
        seconds("reap_interval", self.reap_interval, zero=False)
        for time in ("acquire_timeout", "check_after_idle"):
            if getattr(self, time) is not None:
                seconds(time, getattr(self, time), zero=True)
        for time in ("idle_timeout", "max_lifetime", "keepalive", "leak_threshold"):
            if getattr(self, time) is not None:
                seconds(time, getattr(self, time), zero=False)
        share("lifetime_jitter", self.lifetime_jitter)
        two_delays("backoff", self.backoff)
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"name must be a string or None, not {self.name!r}")
        if not isinstance(self.budget, Budget | None):
            raise TypeError(f"budget must be a Budget or None, not {self.budget!r}")
        for kind in self.discard_on if isinstance(self.discard_on, tuple) else (self.discard_on,):
            if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                raise TypeError(f"discard_on must be an exception class or a tuple of them, not {self.discard_on!r}")
        audience_of(self.listeners)
        if self.order not in ("lifo", "fifo"):
            raise ValueError(f"order must be 'lifo' or 'fifo', not {self.order!r}")

    def discards(self, kind: type[BaseException]) -> bool:
        """Whether a connection in whose use an exception of this kind was raised must not be lent again."""
        return not issubclass(kind, Exception) or issubclass(kind, self.discard_on)

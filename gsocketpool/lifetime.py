"""When a connection must retire, when to look at it again, and when to dial again: functions of numbers, nothing else.

Times are seconds of one clock, whichever; `NEVER` is later than all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final

__all__ = ["NEVER", "NO_LIMITS", "Limits", "equal_jitter", "full_jitter"]

NEVER: Final = inf


@dataclass(frozen=True)
class Limits:
    """What the connections of a pool may reach, each None for no limit. See :class:`gsocketpool.Pool`."""

    idle_timeout: float | None = None
    max_lifetime: float | None = None
    lifetime_jitter: float = 0.1
    max_uses: int | None = None
    keepalive: float | None = None

    def retire_at(self, opened: float, random: Callable[[], float]) -> float:
        """When a connection that was opened then must go: up to `lifetime_jitter` of its life earlier, so that what was
        opened together does not go together."""
        if self.max_lifetime is None:
            return NEVER
        return opened + self.max_lifetime * (1 - self.lifetime_jitter * random())

    def next_look(self, retire_at: float, since: float, proven: float) -> float:
        """When the first of its deadlines can be due, for one that has idled since then, and answered or was in use
        then."""
        return min(
            retire_at,
            NEVER if self.idle_timeout is None else since + self.idle_timeout,
            NEVER if self.keepalive is None else proven + self.keepalive,
        )

    def idles_too_long(self, since: float, now: float) -> bool:
        """Whether one that has idled since then should go."""
        return self.idle_timeout is not None and now >= since + self.idle_timeout

    def spared(self, now: float) -> float:
        """Since when one counts as idle that idles too long and is needed: it is looked at again a little later."""
        return now if self.idle_timeout is None else now - 0.9 * self.idle_timeout

    def is_unproven(self, proven: float, now: float) -> bool:
        """Whether one that answered then, or was in use, should be asked again."""
        return self.keepalive is not None and now >= proven + self.keepalive


NO_LIMITS: Final = Limits()


def full_jitter(setbacks: int, first: float, longest: float, random: Callable[[], float]) -> float:
    """How long to wait after so many failures in a row: anything up to a bound that doubles each time.

    Full jitter is what Marc Brooker found to be kindest to the server, in "Exponential Backoff And Jitter" (AWS
    Architecture Blog, 2015).
    """
    doublings = min(setbacks - 1, 64)
    return min(longest, first * 2.0**doublings) * random()


def equal_jitter(setbacks: int, first: float, longest: float, random: Callable[[], float]) -> float:
    """The same, but at least half of the bound ("equal jitter" in the same article)."""
    return full_jitter(setbacks, first / 2, longest / 2, random) + full_jitter(setbacks, first / 2, longest / 2, _one)


def _one() -> float:
    return 1.0

"""What a pool does of its own accord: one background job for each, that sleeps until something is due."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable
from heapq import heappop, heappush
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final

from gsocketpool.core import INSPECTED, Member, Place, new_place
from gsocketpool.lifetime import NEVER, equal_jitter, full_jitter
from gsocketpool.operations import descriptor_of, passes
from gsocketpool.settings import Settings

if TYPE_CHECKING:
    from gsocketpool.driver import Driver

__all__ = ["Alone", "Keeper", "Rounds", "Upkeep", "stirred", "stirs"]

#: Below this many seconds, `check_after_idle` checks each time: so fine a tick would cost more than the checks.
FINEST_TICK: Final = 0.02

#: The longest time between two ticks, where what was lent must be made up for, or a peer's hanging up be noticed.
COARSEST_TICK: Final = 0.25

#: So many pools are tended by one job before it lets others run.
MOST_TENDED: Final = 100

#: How often an idle connection may have something to read and pass its check, until it is no longer watched: a check
#: that does not look at what has arrived would otherwise be asked at each tick.
MOST_STIRS: Final = 3


class Upkeep:
    """What must be done for a pool, and when."""

    def __init__(self, settings: Settings, keeper: Keeper) -> None:
        self._settings = settings
        self._keeper = keeper
        self._tick = tick_for(settings)
        self._reap_every = settings.reap_interval if settings.reap_expired_connections else NEVER
        self._next_tick = self._next_reap = self._rest_until = NEVER
        self._trial_at = NEVER
        self.wakes_at = 0.0
        self._proving = 0
        self._reaping = False
        self._unclosed: list[Member[Any]] = []

    def begin(self, pool: Driver[Any]) -> None:
        """Tend the pool from now on, if there is anything to do for it."""
        wished = self._settings.max_lifetime is not None or self._settings.breaker is not None
        if wished or self._keeper.insists or min(self._tick, self._reap_every) < NEVER:
            now = monotonic()
            pool.cool(now)
            self._next_tick = now + self._tick
            self._next_reap = now + self._reap_every
            self._keeper.keep(pool)

    def lose_jobs(self) -> None:
        """Jobs do not go on in the child of a fork, where this runtime's are threads; until `begin` is called again."""
        self._proving = 0
        self._reaping = False
        self._keeper.lose_job()

    def end(self, pool: Driver[Any]) -> None:
        """The pool is closed."""
        self._keeper.let_go(pool)

    def tend(self, pool: Driver[Any]) -> float:
        """Do what is due. Answers for how many seconds there is nothing."""
        now = monotonic()
        if now >= self._next_tick:
            self._next_tick = now + self._tick
            self.look_at(pool, pool.cool(now))
        pool._close_all(pool.audit(now))
        if pool._unclosed and not pool._unclosed.keys().isdisjoint(self._unclosed):
            pool._close_late()  # whoever was to close it could not begin: too deep a recursion, say
        self._unclosed = list(pool._unclosed)
        self._start_proving(pool)
        if now >= self._next_reap:
            self._next_reap = now + self._reap_every
            if not self._reaping:
                self._reaping = True
                pool._station(self._reap, pool)
        if now >= self._rest_until:
            self._rest_until = NEVER
            pool.rested()
        if now >= self._trial_at:
            self._trial_at = NEVER
            pool.half_open()
        if pool._ledger is not None:
            pool._ledger.report(pool, now)
        pool._start_dials()
        self.wakes_at = NEVER  # where there is nothing to tend, until something is opened
        if not pool.is_empty():
            self.wakes_at = min(self._next_tick, self._next_reap, self._rest_until, self._trial_at, pool.next_audit())
        return max(0.0, self.wakes_at - monotonic())

    def hurry(self, pool: Driver[Any], when: float) -> None:
        """Something is due then, which may be sooner than all that was known when the upkeep went to sleep."""
        if when < self.wakes_at:
            self.wakes_at = when
            self._keeper.hurry(pool)

    def rest(self, pool: Driver[Any], setbacks: int) -> float:
        """The stock cannot be dialled for. Answers in how many seconds it will be tried again."""
        now = monotonic()
        if not self.resting:
            self._rest_until = now + full_jitter(setbacks, *self._settings.backoff, random.random)
            self.hurry(pool, self._rest_until)
        return self._rest_until - now

    def agenda(self, pool: Driver[Any]) -> list[tuple[float, str]]:
        """What is due, and when by `monotonic`'s time; some of it never."""
        return [
            (self._next_reap, "drop_expired()"),
            (self._rest_until, "dial again for min_idle"),
            (self._trial_at, "let one dial pass the breaker"),
            (pool.next_audit(), "see whether a connection is too old, idles too long or is due for a keepalive"),
        ]

    @property
    def resting(self) -> bool:
        """Whether the stock is not dialled for, since that failed."""
        return self._rest_until < NEVER

    def opened(self, pool: Driver[Any], look_at: float) -> None:
        """A dial has succeeded; what it opened must be looked at then."""
        self.begins_anew()
        self.hurry(pool, min(look_at, self._next_tick, self._next_reap))

    def pause_dials(self, pool: Driver[Any], trips: int) -> float:
        """The breaker lets nothing pass for a while. Answers for how many seconds."""
        pause = equal_jitter(trips, *self._settings.backoff, random.random)
        self._trial_at = monotonic() + pause
        self.hurry(pool, self._trial_at)
        return pause

    def trial_begins(self, pool: Driver[Any]) -> None:
        """There may be another if this one hangs, but not soon."""
        self._trial_at = monotonic() + self._settings.backoff[1]
        self.hurry(pool, self._trial_at)

    def begins_anew(self) -> None:
        """Nothing keeps the pool from dialling."""
        self._rest_until = self._trial_at = NEVER

    def rest_of_break(self) -> float:
        """Seconds until the breaker lets a dial pass."""
        return max(0.0, self._trial_at - monotonic()) if self._trial_at < NEVER else 0.0

    def _reap(self, pool: Driver[Any]) -> None:
        try:
            pool._reap()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if pool._may_raise(error):  # else this job has been ended
                pool._report("drop_expired() failed", error)
        finally:
            self._reaping = False

    # Keepalives

    def _start_proving(self, pool: Driver[Any]) -> None:
        while self._proving < self._settings.max_connecting and (member := pool.prove()) is not None:
            self._proving += 1
            pool._spawn(self._prove, pool, member)

    def _prove(self, pool: Driver[Any], member: Member[Any]) -> None:
        alive = False
        pool._talking[pool._borrower()] = "asking whether it lives", monotonic()
        try:
            if member.holder is INSPECTED:  # else it was dropped, or this is the child of a fork
                self.look_away(pool, member)
                alive = passes(pool._within(pool.keepalive_grace, pool._operations.keepalive, member.connection))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if member.holder is INSPECTED:
                pool._report("keepalive() failed; the connection is closed", error)
        finally:
            pool._talking.pop(pool._borrower(), None)
            self._proving -= 1
            if not alive:
                pool._discard(member, "stale")
            elif member.holder is INSPECTED:
                member.stirs = 0
                pool._settle(pool.inspected(member, first=True), member)
                pool.show_again(member)
            self._start_proving(pool)

    # Idle connections whose descriptor is known are watched once nobody has touched them for a tick: what is lent again
    # before that, on the hot path, costs nothing.

    def look_at(self, pool: Driver[Any], members: list[Member[Any]]) -> None:
        """Be told when the peer of an idle connection hangs up, or says something unasked."""
        if self._settings.check_after_idle is None:
            return
        for member in members:
            if member.watch is not None or member.stirs > MOST_STIRS or not pool.is_cold(member):
                continue
            try:
                descriptor = descriptor_of(pool._operations, member.connection)
                if descriptor is None or not pool._operations.checks(member.connection):
                    continue
                if member.watch is None and pool.is_cold(member):  # still: others may have run meanwhile
                    member.watch = pool._watch(descriptor, member)
            except Exception as error:
                pool._say(logging.DEBUG, "%s: a connection cannot be watched by its fileno()", pool._label, error=error)

    def look_away(self, pool: Driver[Any], member: Member[Any]) -> None:
        """No longer: it is lent, asked or closed."""
        if member.watch is not None:
            pool._unwatch(member.watch)
            member.watch = None


def tick_for(settings: Settings) -> float:
    """Seconds between two ticks; each tells which connections nobody has touched since the one before."""
    wishes = [
        wish / 10 for wish in (settings.idle_timeout, settings.keepalive, settings.leak_threshold) if wish is not None
    ]
    if settings.check_after_idle is not None:
        # Twice in that time, so that none idles longer between two ticks even when a tick is late.
        wishes.append(COARSEST_TICK if checks_always(settings) else settings.check_after_idle / 2)
    if settings.min_idle:
        wishes.append(COARSEST_TICK)
    return max(FINEST_TICK / 2, min(wishes)) if wishes else NEVER


def checks_always(settings: Settings) -> bool:
    """Whether `check()` is called each time, whoever has touched the connection."""
    return settings.check_after_idle is not None and settings.check_after_idle < FINEST_TICK


def tend(pool: Driver[Any]) -> float:
    """As the pool's upkeep does; what goes wrong is said, and tried again a little later."""
    try:
        return pool._upkeep.tend(pool)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not pool._may_raise(error):
            raise
        pool._report("upkeep failed", error)
        return COARSEST_TICK


class Keeper:
    """Who tends pools when it is time. It holds them by weak references, and is called by them."""

    #: Whether it wants to tend a pool for which there is nothing to do.
    insists: ClassVar[bool] = False

    def keep(self, pool: Driver[Any]) -> None:
        """Tend this pool from now on."""
        raise NotImplementedError

    def hurry(self, pool: Driver[Any]) -> None:
        """It must be tended sooner than it has said: at `wakes_at`."""
        raise NotImplementedError

    def let_go(self, pool: Driver[Any]) -> None:
        """It is closed. May be called in any thread."""
        raise NotImplementedError

    def lose_job(self) -> None:
        """Its job does not go on."""


class Alone(Keeper):
    """Tends one pool, in a job of its own."""

    def __init__(self) -> None:
        self._alarm: Place[Any] = new_place()

    def keep(self, pool: Driver[Any]) -> None:
        pool._station(self._keep_up, weakref.ref(pool), pool._sleeper())

    def hurry(self, pool: Driver[Any]) -> None:
        pool._wake(self._alarm)

    def let_go(self, pool: Driver[Any]) -> None:
        pool._rouse(self._alarm)

    def _keep_up(self, ref: weakref.ref[Driver[Any]], sleep: Callable[[Place[Any], float], None]) -> None:
        try:
            while (pool := ref()) is not None and not pool._closed:
                pause = tend(pool)
                if pool._closed:  # meanwhile, and nobody will wake who was not asleep
                    break
                del pool
                sleep(self._alarm, pause)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # killed
            pool = ref()
            if pool is not None and not pool._closed:
                pool._station(self._keep_up, ref, sleep)
            raise


class Rounds(Keeper):
    """Tends many pools, in one job for all, which ends when there is nothing to do for any of them."""

    def __init__(self) -> None:
        self._alarm: Place[Any] = new_place()
        self._due: list[tuple[float, int, weakref.ref[Driver[Any]]]] = []
        self._entries = 0
        self._begun = False

    def keep(self, pool: Driver[Any]) -> None:
        self.hurry(pool)

    def hurry(self, pool: Driver[Any]) -> None:
        self._put_down(pool._upkeep.wakes_at, pool)
        if not self._begun:
            self._begin(pool)
        elif self._due[0][2] is pool._ref:
            pool._wake(self._alarm)

    def let_go(self, pool: Driver[Any]) -> None:
        pool._rouse(self._alarm)

    def lose_job(self) -> None:
        self._begun = False

    def tended(self, pool: Driver[Any], pause: float) -> float:
        """It was, and wants to be again in so many seconds. Answers in how many it will be."""
        return pause

    def _go_round(self, sleep: Callable[[Place[Any], float], None]) -> None:
        try:
            while (pause := self._tend_some()) is not None:
                sleep(self._alarm, pause)
        except (KeyboardInterrupt, SystemExit):
            self._begun = False
            raise
        except BaseException:  # killed
            self._begun = False
            for pool in filter(None, (ref() for _, _, ref in self._due)):
                self._begin(pool)
                break
            raise
        self._begun = False

    def _begin(self, pool: Driver[Any]) -> None:
        self._begun = True
        pool._station(self._go_round, pool._sleeper())

    def _tend_some(self) -> float | None:
        """Tend those that are due, but not so many at once that everybody else must wait for it. Answers the seconds
        until the next is due; None if none ever will be."""
        now = monotonic()
        left = MOST_TENDED
        while self._due:
            when, _, ref = self._due[0]
            pool: Driver[Any] | None = ref()
            if pool is None or pool.closed or when != pool._upkeep.wakes_at:
                heappop(self._due)  # it is gone, or there is another entry for it
                continue
            if when > now or not left:
                return max(0.0, when - monotonic())
            left -= 1
            heappop(self._due)
            pause = COARSEST_TICK
            try:
                pause = self.tended(pool, tend(pool))
            finally:
                pool._upkeep.wakes_at = monotonic() + pause
                if pause < NEVER:
                    self._put_down(pool._upkeep.wakes_at, pool)
        return None

    def _put_down(self, when: float, pool: Driver[Any]) -> None:
        self._entries += 1
        entry: Any = (when, self._entries, pool._ref)
        heappush(self._due, entry)


def stirred(ref: weakref.ref[Any], member: Member[Any], *_: object) -> None:
    """There is something to read on a connection that idles: what an event loop calls that `_watch` has told to. The
    pool is referred to weakly, since a loop keeps what it calls."""
    pool = ref()
    if pool is not None:
        pool._upkeep.look_away(pool, member)  # or the loop would call again at once
        pool._spawn(stirs, pool, member)


def stirs(pool: Driver[Any], member: Member[Any]) -> None:
    """There is something to read on a connection that idles, or idled a moment ago."""
    if pool.take_out(member):
        member.stirs += 1
        member.uses += 1  # as if it were lent: whoever rejects it takes that back
        if pool._passes_check(member):
            member.uses -= 1
            pool._settle(pool.inspected(member, first=True), member)
            pool.show_again(member)  # watched again, but not before the next tick: it may have left something to read

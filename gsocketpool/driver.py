"""What every runtime shares: it carries out what `core` decides.

Whatever waits, wakes, spawns or calls what the user has written goes through the primitives at the end of `Driver`; a
runtime supplies them (`pool.py` is gevent's), and the methods that its users call (`blocking.py`; `asyncio.py` has its
own).

What keeps it right: others may run only where it parks, and where it calls what the user has written. Between two such
points nothing changes under its hands: greenlets do not switch there, and threads hold a lock.

How it copes with being killed at any moment: a borrower only ever stands in the queue, so a kill has nothing to undo
but a place there. What may block halfway, `open()` and `close()`, runs in jobs of the pool's own, which nobody
interrupts. What must run in the borrower, `check()` and `reset()`, costs the connection if it is interrupted.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from types import EllipsisType, FrameType
from typing import Any, ClassVar, Final, Generic, NoReturn, TypeVar

from gsocketpool.arguments import seconds, whole_number
from gsocketpool.budget import Budget
from gsocketpool.complaints import broken, exhausted, failing, not_ready
from gsocketpool.connection import AnyStream, Wrap
from gsocketpool.core import (
    BROKEN,
    BY_HAND,
    CLOSED,
    RETIRED,
    RETURNING,
    Core,
    Member,
    Place,
    Sentinel,
    new_place,
)
from gsocketpool.events import Listener, audience_of
from gsocketpool.exceptions import (
    ConnectionNotFoundError,
    PoolClosedError,
    PoolError,
)
from gsocketpool.forking import kept, pools
from gsocketpool.lifetime import Limits
from gsocketpool.loans import HERE, Ledger, Loan, outwards
from gsocketpool.log import say
from gsocketpool.operations import describe, operations_of, passes, plainly, refuse_coroutine, shown
from gsocketpool.settings import Settings
from gsocketpool.stats import Holder, PoolStats
from gsocketpool.upkeep import Alone, Keeper, Upkeep, checks_always
from gsocketpool.view import draw_pool

if sys.version_info >= (3, 11):
    from sys import exception
else:

    def exception() -> BaseException | None:
        """The exception that is being handled, by an except or a finally."""
        return sys.exc_info()[1]


__all__ = ["Borrowing", "Driver", "clear_all", "close_all", "exception", "is_ours"]

#: What a waiter is told for whom the breaker leaves no hope.
HOPELESS: Final = PoolError("the breaker is open")

#: Seconds that `close()` waits for what others close, or what it took from its borrowers.
LAST_MOMENT: Final = 1.0

C = TypeVar("C")
R = TypeVar("R")

# What a subclass must not define by mistake: the core's names that are no part of a pool's interface.
_CORE_NAMES: Final = frozenset(name for name in vars(Core) if not name.startswith("_")) - {
    "idle",
    "in_use",
    "size",
    "waiting",
}


#: Private names of the pool's that a subclass has: to override the first, and the second by itself.
_FOR_SUBCLASSES: Final = frozenset(("_create_connection", "_lease"))


def is_ours(method: object) -> bool:
    """Whether a method is the package's own, and not a subclass's."""
    # By where its code is: a decorator of the user's copies the name of the module.
    return str(getattr(getattr(method, "__code__", None), "co_filename", "")).startswith(HERE)


class Borrowing(Generic[C]):
    """What `connection()` returns, in any runtime: a block that borrows, and holds what it has borrowed."""

    __slots__ = ("_member", "_pool", "_timeout")

    _pool: Driver[C]

    def __init__(self, pool: Driver[C], timeout: float | EllipsisType | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._member: Member[C] | None = None


class Driver(Core[C]):
    """A pool, but for how it is called and how it waits. See :class:`gsocketpool.Pool` for what the parameters mean."""

    #: The module from which this runtime's names are imported; the package's streams must be of the same. "": of any.
    _runtime: ClassVar[str] = ""

    #: Whether what the user has written may be ``async``.
    _awaits: ClassVar[bool] = False

    #: What error texts call the place where a pool is at home.
    _home_name: ClassVar[str] = "thread"

    #: Seconds that a connection's ``close()`` may take before its slot is free all the same.
    close_grace: ClassVar[float] = 10.0

    #: Seconds that a connection's ``keepalive()`` may take before it counts as failed.
    keepalive_grace: ClassVar[float] = 10.0

    __slots__ = (
        "_audience",
        "_call",
        "_drains",
        "_factory",
        "_failed_at",
        "_failing_since",
        "_filling",
        "_given_up",
        "_ledger",
        "_operations",
        "_options",
        "_ready",
        "_settings",
        "_talking",
        "_telling",
        "_upkeep",
        "_usual_limit",
        "name",
    )

    #: What logs, errors and ``repr()`` call this pool, as it was given; None: its factory's name.
    name: str | None

    def __init__(
        self,
        factory: Callable[..., C],
        options: Mapping[str, Any] | None = None,
        initial_connections: int = 0,
        max_connections: int = 200,
        reap_expired_connections: bool = True,
        reap_interval: float = 180,
        *,
        name: str | None = None,
        acquire_timeout: float | None = None,
        check_after_idle: float | None = 0.5,
        discard_on: type[BaseException] | tuple[type[BaseException], ...] = BaseException,
        max_connecting: int = 8,
        max_waiting: int | None = None,
        order: str = "lifo",
        min_idle: int = 0,
        idle_timeout: float | None = None,
        max_lifetime: float | None = None,
        lifetime_jitter: float = 0.1,
        max_uses: int | None = None,
        keepalive: float | None = None,
        backoff: tuple[float, float] = (0.1, 30),
        leak_threshold: float | None = None,
        reclaim: bool = False,
        budget: Budget | None = None,
        breaker: int | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        if not callable(factory):
            raise TypeError(f"factory must be a Connection class or another callable, not {factory!r}")
        if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
            raise TypeError(f"options must be a mapping of the factory's keyword arguments or None, not {options!r}")
        settings = Settings(
            initial_connections,
            max_connections,
            reap_expired_connections,
            reap_interval,
            name,
            acquire_timeout,
            check_after_idle,
            discard_on,
            max_connecting,
            max_waiting,
            order,
            min_idle,
            idle_timeout,
            max_lifetime,
            lifetime_jitter,
            max_uses,
            keepalive,
            backoff,
            leak_threshold,
            reclaim,
            budget,
            breaker,
            listeners,
        )
        audience = audience_of(listeners)
        notes = reclaim or leak_threshold is not None
        super().__init__(
            max_connections,
            max_connecting=max_connecting,
            max_waiting=max_waiting,
            min_idle=min_idle,
            limits=Limits(idle_timeout, max_lifetime, lifetime_jitter, max_uses, keepalive),
            fifo=order == "fifo",
            always_cold=checks_always(settings),
            records=notes or audience.hears_loans,
            budget=budget,
            break_after=breaker,
        )
        self.name = name
        self._settings = settings
        self._audience = audience
        self._factory = factory
        self._options: dict[str, Any] = dict(options or {})
        self._call = self._caller()
        self._operations = operations_of(factory, self._call, self._awaits)
        self._usual_limit = self._limit(10, 0, ...)
        self._ledger = Ledger(leak_threshold, reclaim) if notes else None
        self._ready: list[Place[C]] = []
        self._drains: list[Place[C]] = []
        # No longer the pool's though their borrowers may still have them: giving one back is no mistake.
        self._given_up: dict[int, C] = {}

        # Jobs of the pool's own that are opening, closing or asking a connection: what they do, and since when.
        self._talking: dict[object, tuple[str, float]] = {}
        self._filling = initial_connections > 0  # the stock comes after them

        self._telling: set[Member[C]] = set()  # retired, and not closed before listeners have heard that it came back

        self._failing_since = 0.0  # when the first of the last dials that failed in a row did, by the calendar
        self._failed_at = 0.0  # when the last one did

        self._settle_in()
        self._upkeep = Upkeep(settings, self._keeper())
        self._tell("attached")
        pools[id(self)] = self
        self._upkeep.begin(self)
        if initial_connections:
            try:
                self._fill(initial_connections)
            except BaseException:
                close_all([self], None)
                raise
            self._filling = False
        self._start_dials()

    __init__.__qualname__ = "Pool.__init__"  # what errors of a wrong call say

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("gsocketpool."):
            return
        pools = [base for base in cls.__mro__ if issubclass(base, Core) and base.__module__.startswith("gsocketpool.")]
        finished = any(vars(base).get("_runtime") for base in pools)  # else it is a runtime of somebody's own
        for base in cls.__mro__[: cls.__mro__.index(pools[0])]:
            for name in vars(base):
                private = (
                    finished and name.startswith("_") and not name.startswith("__") and name not in _FOR_SUBCLASSES
                )
                if name in _CORE_NAMES or (private and any(name in vars(pool) for pool in pools)):
                    raise TypeError(
                        f"{base.__qualname__}.{name} would replace what the pool itself does: use another name"
                    )
                if name == "_new_connection":
                    raise TypeError(
                        f"{base.__qualname__}._new_connection is geventconnpool's: give what opens a connection to the "
                        "pool instead, as Pool(wrap(open, keepalive=...), max_connections=...), or override "
                        "_create_connection()"
                    )

    # What never waits

    def resize(self, max_connections: int) -> None:
        """Change `max_connections`. More serves whoever waits at once. Less closes idle connections, those that idled
        longest first, and more as they come back; until then there may be more than that. Returns at once.

        :raises TypeError: it is no whole number.
        :raises ValueError: it is less than 1.
        """
        self._close_all(self.set_cap(whole_number("max_connections", max_connections, least=1)))
        self._start_dials()
        self._wake_ready()
        self._wake_unreserved()

    def pause(self) -> None:
        """Lend nothing and dial nothing until :meth:`resume`. Whoever asks waits, as long as he can; what is lent comes
        back as usual. PgBouncer's idea: restart a server, and nobody fails. Pausing twice is fine."""
        self.hold()

    def resume(self) -> None:
        """Lend again, first to whoever waits, in the order in which they came."""
        for place in self.unhold():
            self._wake(place)
        self._start_dials()

    def _change_budget(self, how: Callable[[], object]) -> None:
        """It is shared by several pools, and changed by none of them."""
        how()
        self._start_dials()

    def holders(self) -> list[Holder[C]]:
        """Who has borrowed what, whoever has it longest first: one :class:`~gsocketpool.Holder` for each connection.
        Since when, by which greenlet and where is known while `leak_threshold` or `reclaim` is set, else None.
        """
        now = monotonic()
        found = []
        for member in self._members.values():
            if member.holder is BY_HAND or isinstance(member.holder, Borrowing):
                loan: Loan | None = member.loan
                if loan is None:
                    found.append(Holder(member.connection, None, None, None))
                else:
                    found.append(Holder(member.connection, loan.borrower, now - loan.since, loan.stack()))
        return sorted(found, key=lambda holder: holder.held or 0.0, reverse=True)

    def debug(self) -> str:
        """A picture of the pool as a text of some lines: what is lent, to whom, since when and where; what idles; who
        waits; what the pool does next. To be printed when something is wrong; what it looks like may change.

        Who has borrowed, and since when somebody waits, is known while `leak_threshold` or `reclaim` is set.
        """
        return draw_pool(self) if hasattr(self, "_upkeep") else repr(self)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def stats(self) -> PoolStats:
        """The pool's state, and what it has counted since it was made."""
        return PoolStats(
            size=self.size,
            idle=self.idle,
            in_use=self.in_use,
            opening=self._dialling,
            waiting=self.waiting,
            max_connections=self._max_connections,
            # In this order and from a copy, for another thread may read it: what retires meanwhile counts once or not.
            acquired=self._retired_uses + sum([member.uses for member in [*self._members.values()]]),
            opened=self._opened,
            open_failures=self._open_failures,
            exhausted=self._exhausted,
            closed=dict(self._closed_for),
            breaker=("half-open" if self._trial or self._trying else "open") if self._broken else "closed",
        )

    def __del__(self) -> None:
        # Called by the collector, in any thread and in the middle of anything: nothing here may wait.
        if hasattr(self, "_upkeep") and not sys.is_finalizing():
            if self._budget is None:
                self._shut()
            else:  # in its own thread, as whatever touches the budget
                self._spawn(self._vanish)

    def _vanish(self) -> None:
        self._shut()
        self.give_up()
        self._start_dials()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a pool cannot be copied or pickled: make another one")

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _CORE_NAMES]  # which are nobody's else

    def __repr__(self) -> str:
        if not hasattr(self, "_upkeep"):
            return f"<{type(self).__name__} that was refused>"
        state = "closed" if self._closed else f"max {self._max_connections}"
        if self._paused and not self._closed:
            state += ", paused"
        return (
            f"<{self._label}: {self.idle} idle, {self.in_use} in use, {self._dialling} opening, "
            f"{self.waiting} waiting, {state}>"
        )

    def _create_connection(self) -> C:
        """Make a connection and open it. A subclass may override this, as in 0.1.6; what it returns is lent as it is,
        opened or not."""
        epoch = self._epoch
        connection: C = self._call(self._factory, **self._options)
        self._vet(connection)
        self.claim(connection)
        try:
            refuse_coroutine(self._operations.open(connection), f"open() of {describe(connection)}")
        except BaseException:
            self._close_half_open(connection, epoch)
            raise
        finally:
            self.disclaim(connection)
        return connection

    # Behind what may wait

    def _drop(self, connection: C) -> None:
        member = self._members.get(id(connection))
        if member is None:
            if self._given_up.pop(id(connection), None) is not None:
                return
            raise self._unknown(connection)
        held = self._end_loan(member)
        granted_to = self.retire(member, "dropped")
        self._start_dials()
        if granted_to is not None:
            self._tell_closed(granted_to)
        told = False
        try:
            self._tell_returned(member, held)
            told = True
        finally:
            self._close_all([member], wait=told)

    def _reap(self) -> None:
        """What the reaper calls: a subclass may have its own."""
        drop_expired = getattr(type(self), "drop_expired", None)
        if drop_expired is None or is_ours(drop_expired):
            self._drop_expired()
        else:
            self._call(drop_expired, self)

    def _drop_expired(self) -> None:
        expired: list[Member[C]] = []
        finished = False
        try:
            for _ in range(self.idle):
                member = self.inspect()
                if member is None:
                    break
                watched = member.watch is not None
                self._upkeep.look_away(self, member)  # it may ask the peer
                if self._is_expired(member):
                    self.retire(member, "expired")
                    expired.append(member)
                elif member.holder is not None:  # else dropped, or failed, meanwhile
                    self._settle(self.inspected(member), member)
                    if watched:
                        self.show_again(member)
            finished = True
        finally:
            try:
                self._upkeep.look_at(self, self.unseen())
            finally:
                self._close_all(expired, wait=finished)

    def _clear(self) -> None:
        clear_all([self])

    def _close(self, timeout: float | None) -> None:
        if timeout is not None:
            seconds("timeout", timeout, zero=True)
        close_all([self], timeout)

    def _wait_ready(self, timeout: float | None) -> None:
        if timeout is not None:
            seconds("timeout", timeout, zero=True)
        started = monotonic()
        place: Place[C] = new_place()
        self._ready.append(place)
        try:
            while not self._closed and self.size < min(self._min_idle, self._max_connections):
                left = None if timeout is None else started + timeout - monotonic()
                if left is not None and left <= 0:
                    raise not_ready(self, started)
                self._park(place, left)
        finally:
            self._ready.remove(place)
        if self._closed:
            raise PoolClosedError(f"{self._label} is closed")

    # Behind acquire

    def _acquire(self, holder: object, retry: int, retried: int, timeout: float | EllipsisType | None) -> Member[C]:
        usual = timeout is ... and retry == 10 and retried == 0
        if usual:
            limit, lenient, wait = self._usual_limit
        elif timeout is None:
            limit, lenient, wait = None, False, True
        else:
            limit, lenient, wait = self._limit(retry, retried, timeout)
        started = monotonic()
        found = self.take(wait)
        if type(found) is Place and self._brimful and (limit or limit is None):
            # What follows, for the commonest case.
            try:
                if usual and limit:
                    self._park_until(found, started + limit)
                else:
                    self._park(found, limit)
            except BaseException:
                self._leave(found)
                raise
            member = found.member
            if member is not None and not member.cold:
                member.holder = holder
                return member
        return self._acquire_on(found, holder, limit, lenient, wait, started)

    def _acquire_on(
        self,
        found: Member[C] | Place[C] | Sentinel,
        holder: object,
        limit: float | None,
        lenient: bool,
        wait: bool,
        started: float,
    ) -> Member[C]:
        """Go on with what `take` has answered."""
        turn = 0
        while True:
            if type(found) is Place:
                turn = found.turn
                try:
                    if self._ledger is not None:
                        self._ledger.waits(self._borrower(), started)
                    self._start_dials()
                    self._wait_on(found, limit, lenient, started)
                except BaseException:
                    self._leave(found)
                    raise
                finally:
                    if self._ledger is not None:
                        self._ledger.waits_no_more(self._borrower())
                found = found.member or self._ended_without(found, started)
                if type(found) is Place:
                    continue
            if type(found) is Member:
                found.holder = holder
                passed = not found.cold or self._passes_check(found)
                if passed and (not self._records or self._begin_loan(found, started)):
                    return found
                if limit and not lenient and started + limit <= monotonic():
                    raise exhausted(self, started)
                found = self.retake(wait, turn)
                self._wake_unreserved()
            elif found is CLOSED:
                raise PoolClosedError(f"{self._label} is closed")
            elif found is BROKEN:
                raise broken(self, started)
            else:
                raise exhausted(self, started)

    def _limit(self, retry: int, retried: int, timeout: float | EllipsisType | None) -> tuple[float | None, bool, bool]:
        """How long an acquire may take, whether a dial may take longer (0.1.6's rule), and whether it may wait."""
        if timeout is None:
            return None, False, True
        if not isinstance(timeout, EllipsisType):
            limit = seconds("timeout", timeout, zero=True)
            return limit, False, limit > 0
        if self._settings.acquire_timeout is not None:
            return self._settings.acquire_timeout, False, self._settings.acquire_timeout > 0
        limit = max(0, whole_number("retry", retry) - whole_number("retried", retried)) * 0.1
        return limit, True, limit > 0 or self._budget is None or self._budget.has_one()

    def _leave(self, place: Place[C]) -> None:
        """Leave the queue, and hand on what was granted in the meantime."""
        unused = self.abandon(place)
        if unused is not None:
            self._settle(self.give(unused), unused)

    def _wait_on(self, place: Place[C], limit: float | None, lenient: bool, started: float) -> None:
        """Stand still until the place has ended, or the time is over."""
        while place.member is None and place.error is None:
            if limit is None or (lenient and place.reserved):
                self._park(place, None)
                continue
            left = started + limit - monotonic()
            if left <= 0:
                break
            self._park(place, left)

    def _ended_without(self, place: Place[C], started: float) -> Member[C] | Place[C] | Sentinel:
        """It was told an error, or its time is over; unless it was granted something in that very moment."""
        if place.error is not None:
            error, place.error = place.error, None
            if error is HOPELESS:
                if not self._broken:  # any more
                    return self.retake(True, place.turn)
                error = broken(self, started)
            try:
                raise error
            finally:
                del error  # it refers to this frame
        member = self.abandon(place)
        if member is None:
            raise exhausted(self, started)
        return member

    def _is_expired(self, member: Member[C]) -> bool:
        try:
            return bool(self._operations.is_expired(member.connection)) and member.holder is not None
        except BaseException as error:
            mine = member.holder is not None  # else dropped meanwhile, or this is the child of a fork
            self._discard(member)
            if not isinstance(error, Exception):
                raise
            if mine:
                self._report("is_expired() failed; the connection is closed", error)
            return False

    def _passes_check(self, member: Member[C]) -> bool:
        member.cold = False
        self._upkeep.look_away(self, member)
        if self._settings.check_after_idle is None:
            return True
        try:
            passed = passes(self._operations.check(member.connection))
        except BaseException as error:
            mine = member.holder is not None  # else dropped meanwhile, or this is the child of a fork
            self._reject(member)
            if not isinstance(error, Exception):
                raise
            if mine:
                self._report("check() failed; the connection is closed", error)
            return False
        if not passed:
            self._reject(member)
            return False
        if member.fate is not None:  # cleared, or too old, meanwhile
            member.uses -= 1
            self._settle(self.give(member), member)
            return False
        return member.holder is not None  # else dropped meanwhile

    def _reject(self, member: Member[C]) -> None:
        if member.holder is not None:
            self.reject(member)
            self._close_all([member])

    # Behind release

    def _release(self, connection: C, error: BaseException | None) -> None:
        """Take back what was acquired by hand.

        :param error: what was being handled where that was done.
        """
        member = self._members.get(id(connection))
        if member is None:
            if self._given_up.pop(id(connection), None) is not None:
                return
            raise self._unknown(connection)
        if member.holder is not BY_HAND:
            if isinstance(member.holder, Borrowing):
                raise ConnectionNotFoundError(
                    f"{self._label} has lent this connection to a with block, which gives it back itself (drop() gives "
                    f"it up early; or was it released twice?): {describe(connection)}"
                )
            raise ConnectionNotFoundError(
                f"{self._label} has lent this connection to nobody (released twice?): {describe(connection)}"
            )
        if error is not None and self._settings.discards(type(error)):
            self._discard(member)
        else:
            self._return(member)

    def _return(self, member: Member[C]) -> None:
        """Reset it where that is wanted, then give it back."""
        held = self._end_loan(member)
        resets = self._resets and not self._closed
        if resets or held is not None:
            member.holder = RETURNING
            try:
                self._tell_returned(member, held)
                if resets and member.holder is RETURNING:
                    self._operations.reset(member.connection)
            except BaseException as error:
                mine = member.holder is RETURNING  # else dropped meanwhile, or this is the child of a fork
                self._discard(member)
                if not isinstance(error, Exception):
                    raise
                if mine:
                    self._report("reset() failed; the connection is closed", error)
                return
            if member.holder is None:
                return  # dropped meanwhile
        self._settle(self.give(member), member)

    def _discard(self, member: Member[C], reason: str = "discarded") -> None:
        if member.holder is not None:
            held = self._end_loan(member)
            self.retire(member, reason)
            try:
                self._tell_returned(member, held)
            finally:
                self._close_all([member])

    def _settle(self, outcome: Place[C] | Sentinel | None, member: Member[C]) -> None:
        """Carry out what `give` or `inspected` answered."""
        if type(outcome) is Place:
            self._wake(outcome)
        elif outcome is RETIRED:
            self._close_all([member])

    def _begin_loan(self, member: Member[C], started: float) -> bool:
        """Note who borrows it, and say so. False if it was dropped or given back meanwhile."""
        uses = member.uses
        try:
            if self._ledger is not None:
                self._ledger.begin(self, member)
            if self._audience.hears_loans:
                member.lent_at = monotonic()
                self._tell("borrowed", member.connection, member.lent_at - started)
        except BaseException:  # too deep a recursion, or a kill while a listener waits
            self._discard(member)
            raise
        return member.holder is not None and member.uses == uses

    def _end_loan(self, member: Member[C]) -> float | None:
        """For how long it was lent, if listeners were told that it is."""
        if self._ledger is not None:
            self._ledger.end(self, member)
        if not member.lent_at:
            return None
        held = monotonic() - member.lent_at
        member.lent_at = 0.0
        return held

    # Dials

    def _start_dials(self) -> None:
        self._dial_as_permitted()
        self._tell_hopeless()
        if self._budget is not None:
            budget: Any = self._budget  # all its pools are of this runtime
            while (pool := budget.next_to_dial()) is not None:
                pool._dial_as_permitted()
                pool._tell_hopeless()
            while (found := budget.next_to_close()) is not None:
                pool, member = found
                pool._close_all([member])
            if (trouble := budget.unsaid()) is not None:
                self._say(logging.WARNING, "%s: its budget's quota failed: %r", self._label, trouble)

    def _tell_hopeless(self) -> None:
        if self._broken:
            for place in self.hopeless():
                place.error = HOPELESS
                self._wake(place)

    def _dial_as_permitted(self) -> None:
        while (place := self.permit()) is not None:
            if self._trying:
                self._upkeep.trial_begins(self)
            try:
                self._spawn(self._dial, place, False, self._epoch)
            except BaseException as error:  # too deep a recursion, say
                self.failed(place, error, struck=False)
                raise
        while self._min_idle and not self._filling and self.permit_spare():
            if self._trying:
                self._upkeep.trial_begins(self)
            try:
                self._spawn(self._dial, None, True, self._epoch)
            except BaseException as error:
                self.failed(None, error, struck=False)
                raise

    def _dial(self, place: Place[C] | None, spare: bool, epoch: int) -> BaseException | None:
        """Redeem a permit. Answers the error if it failed.

        :param spare: it is for the stock of idle connections.
        :param epoch: when the permit was given. If it is another one by now, this is the child of a fork.
        """
        if epoch != self._epoch:
            return None
        generation = self._generation
        began = monotonic()
        problem: BaseException | None = None
        self._talking[self._borrower()] = "opening", began  # not by a name: an error's traceback would tie it to itself
        try:
            connection = self._call(self._create_connection)
            self._vet(connection)
            if "opened" in self._audience.heard:
                self._tell_opened(connection, monotonic() - began, epoch)
        except BaseException as error:
            ends_the_program = isinstance(error, (KeyboardInterrupt, SystemExit))
            fit = self._may_raise(error) and not ends_the_program
            problem = error if fit else PoolError(f"{self._label}: a dial was killed")
            if not fit:
                problem.__cause__ = without_traceback(error)
            if epoch == self._epoch:
                # A wrong call says nothing of the server; nor does what was begun before a clear() of the one now.
                struck = generation == self._generation and not isinstance(error, TypeError)
                self._failed(place, problem, spare, struck)
            if ends_the_program:
                raise
        else:
            if epoch == self._epoch:
                self._opened_one(connection, generation)
            else:
                kept.append(connection)
        finally:
            self._talking.pop(self._borrower(), None)
            self._start_dials()
            self._wake_drains()
        try:
            if problem is not None and epoch == self._epoch:
                self._tell_alone("open_failed", without_traceback(problem), monotonic() - began)
            return problem
        finally:
            del problem  # it refers to this frame

    def _failed(self, place: Place[C] | None, problem: BaseException, spare: bool, struck: bool) -> None:
        self._failed_at = monotonic()
        if not self._strikes:
            self._failing_since = time.time()
        trips = self._trips
        waiter = self.failed(place, problem, spare, without_traceback(problem), struck)
        # All that must be done before anything is said: a log's handler may wait, and be killed there.
        if waiter is not None:
            self._wake(waiter)
        self._wake_unreserved()
        self._tell_hopeless()
        opens = self._trips > trips and not self._closed
        pause = self._upkeep.pause_dials(self, self._trips) if opens else 0.0
        rests = spare and not self._closed
        known = self._upkeep.resting
        rest = self._upkeep.rest(self, self._setbacks) if rests else 0.0
        if opens:
            level = logging.WARNING if self._trips == 1 else logging.DEBUG
            self._say(level, "%s: %s; the next one in %.2f s: %r", self._label, failing(self), pause, problem)
        if self._broken:
            return  # that has been said
        if rests and not known:  # else it is one of several side by side
            text = f"a dial for min_idle={self._min_idle} failed; the next one in {rest:.2f} s"
            self._report(text, problem, trace=self._setbacks == 1)
        elif place is not None and waiter is None and self._strikes <= 1:
            # Once, as long as no dial succeeds: while a server is down there may be very many.
            self._report("a dial failed that nobody waits for any more", problem)

    def _opened_one(self, connection: C, generation: int) -> None:
        if self._operations.resets(connection):
            self.expect_resets()
        now = monotonic()
        retire_at = self._limits.retire_at(now, random.random)
        look_at = self._limits.next_look(retire_at, now, now)
        failures, was_broken = self._strikes, self._broken
        outcome = self.opened(connection, generation, retire_at, look_at)
        member = self._members.get(id(connection))
        if outcome is RETIRED:
            self._close_all([each for each in self._unclosed if each.connection is connection])
        elif member is not None:
            self._settle(outcome, member)
        self._upkeep.opened(self, look_at)
        self._wake_unreserved()
        self._wake_ready()
        if was_broken:
            away = time.time() - self._failing_since
            self._say(logging.INFO, "%s: dials pass again, after %d had failed in %.1f s", self._label, failures, away)

    def _wake_unreserved(self) -> None:
        """Whoever waits for a dial without a limit, and has lost his slot, has a limit now."""
        for place in self.unreserved():
            self._wake(place)

    def _wake_ready(self) -> None:
        for place in self._ready:
            self._wake(place)

    def _vet(self, connection: C) -> None:
        refuse_coroutine(connection, f"the factory of {self._label}")
        self._operations.vet(connection)
        if isinstance(connection, AnyStream) and self._runtime not in ("", connection._runtime) and not is_patched():
            raise TypeError(
                f"the factory of {self._label} returned a connection of {connection._runtime}, which this pool cannot "
                f"wait for: import both from {self._runtime}"
            )
        if self.knows(connection):
            raise PoolError(
                f"the factory of {self._label} returned a connection that is in the pool already, "
                f"where a new one each time is needed: {describe(connection)}"
            )

    def _close_half_open(self, connection: C, epoch: int) -> None:
        """A failed `open()` may have left it open; what goes wrong here is of no more interest than that."""
        if epoch != self._epoch:  # the child of a fork
            kept.append(connection)
            return
        try:
            self._within(self.close_grace, self._operations.close, connection)
        except BaseException as error:
            self._say(logging.DEBUG, "%s: closing after a failed open() failed too", self._label, error=error)

    def _fill(self, count: int) -> None:
        """Open the initial connections side by side, as many at once as may be."""
        tally: _Tally[C] = _Tally(count)
        began = monotonic()

        def work() -> None:
            while tally.unstarted and tally.error is None and self.permit_unasked():
                tally.unstarted -= 1
                tally.error = self._dial(None, False, self._epoch) or tally.error
                tally.left -= 1
            if tally.unstarted == tally.left and tally.error is None and tally.left:  # no permit, and nothing runs
                try:
                    tally.error = exhausted(self, began, f"{tally.left} of {count} initial connections missing")
                except BaseException as error:  # of a listener
                    tally.error = error
            if tally.error is not None or not tally.left:
                self._wake(tally.place)

        for _ in range(min(count, self._max_connecting)):
            self._spawn(work)
        while tally.left and tally.error is None:
            self._park(tally.place, None)
        if tally.error is not None:
            raise tally.error

    # Closing

    def _shut(self) -> _Tally[C]:
        """Answers the closing of what idled."""
        if self._closed:
            return _Tally(0)
        idle, places = self.shut()
        for place in places:
            self._tell_closed(place)
        self._wake_ready()
        self._upkeep.end(self)
        tally = self._close_all(idle)
        if "detached" in self._audience.heard:
            self._spawn(self._tell_alone, "detached")  # the collector may be who closes it, and waits for nobody
        return tally

    def _tell_closed(self, place: Place[C]) -> None:
        place.error = PoolClosedError(f"{self._label} was closed while this borrower waited")
        self._wake(place)

    def _drain(self, deadline: float, closes_only: bool = False) -> None:
        """Stand still until there is no connection left, or none that is being closed, or it is that late."""
        place: Place[C] = new_place()
        self._drains.append(place)
        try:
            while (self._closing if closes_only else self.total) and (left := deadline - monotonic()) > 0:
                self._park(place, left)
        finally:
            self._drains.remove(place)

    def _take_all(self) -> None:
        """Close what is lent, under its borrowers' hands."""
        kept = list(self._members.values())
        returned: list[tuple[Member[C], float | None]] = []
        for member in kept:
            if member.loan is not None:
                member.loan.reported = False  # it does not come back
            returned.append((member, self._end_loan(member)))
            self._given_up[id(member.connection)] = member.connection
            granted_to = self.retire(member, "closed")
            if granted_to is not None:
                self._tell_closed(granted_to)
        self._telling.update(member for member, held in returned if held is not None)
        interrupted: BaseException | None = None
        for member, held in returned:
            try:
                self._tell_returned(member, held)
            except BaseException as error:
                interrupted = interrupted or error
            self._close_all([member])
        if interrupted is not None:
            try:
                raise interrupted
            finally:
                del interrupted  # it refers to this frame

    def _close_late(self) -> None:
        """Close what was retired and nobody closes."""
        self._close_all([member for member in self._unclosed if member not in self._telling])

    def _wake_drains(self) -> None:
        if not self.total or not self._closing:
            for place in self._drains:
                self._wake(place)

    def _close_all(self, members: list[Member[C]], wait: bool = False) -> _Tally[C]:
        """Close them side by side, each in a greenlet of its own: their slots are free when that is done."""
        self._tell_hopeless()
        tally: _Tally[C] = _Tally(len(members))
        for member in members:
            self._spawn_close(member, tally, self._epoch)
        if wait:
            self._wait_for(tally)
        return tally

    def _wait_for(self, tally: _Tally[C]) -> None:
        while tally.left:
            self._park(tally.place, None)

    def _close_one(self, member: Member[C], tally: _Tally[C], epoch: int) -> None:
        mine = False
        problem: BaseException | None = None
        self._talking[self._borrower()] = "closing", monotonic()  # not by a name, for the same reason
        try:
            mine = epoch == self._epoch and self.closes(member)  # else this is the child of a fork, or one too many
            if mine:
                self._upkeep.look_away(self, member)
                self._within(self.close_grace, self._operations.close, member.connection)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            problem = error
        finally:
            self._talking.pop(self._borrower(), None)
            if mine and epoch == self._epoch:
                self.freed(member.connection)
            if not (mine and epoch == self._epoch and "closed" in self._audience.heard):
                self._count_off(tally)
            else:
                # In a job of its own: in threads few can close at once, and a listener may take its time.
                self._spawn(self._tell_closing, member, tally)
            self._wake_drains()
            if mine and epoch == self._epoch:
                self._start_dials()
        try:
            if problem is not None and epoch == self._epoch:
                self._report("close() failed", problem)
        finally:
            del problem  # it refers to this frame

    def _tell_closing(self, member: Member[C], tally: _Tally[C]) -> None:
        try:
            self._tell_alone("closed", member.connection, member.reason)
        finally:
            self._count_off(tally)

    def _count_off(self, tally: _Tally[C]) -> None:
        """One job less."""
        tally.left -= 1
        if not tally.left:
            self._wake(tally.place)

    def _after_fork(self, members: list[Member[C]], connections: list[C], places: list[Place[C]]) -> None:
        """In the child: none of these connections is its own."""
        for task in list(self._talking):
            self._end(task)
        self._talking.clear()
        for member in members:
            self._upkeep.look_away(self, member)
        if self._ledger is not None:
            self._ledger.forget(members)
        self._given_up.update((id(connection), connection) for connection in connections)
        for place in places:
            self._tell_closed(place)
        self._wake_drains()
        self._upkeep.begins_anew()
        self._start_dials()

    # Saying what goes on

    @property
    def _label(self) -> str:
        kind = type(self).__name__
        return f"{kind} {self._settings.name!r}" if self._settings.name else f"{kind} of {_name_of(self._factory)}"

    def _unknown(self, connection: C) -> ConnectionNotFoundError:
        return ConnectionNotFoundError(
            f"{self._label} has no such connection (dropped, closed, reclaimed, or another pool's?): "
            f"{describe(connection)}"
        )

    def _report(self, what: str, error: BaseException, trace: bool = True) -> None:
        self._say(logging.WARNING, "%s: %s: %s", self._label, what, shown(error), error=error if trace else None)

    def _say(self, level: int, text: str, *args: object, error: BaseException | None = None) -> None:
        self._call(say, level, text, *args, error=error)

    def _tell(self, event: str, *args: object) -> None:
        """Tell the listeners of it. Others may run meanwhile."""
        if event in self._audience.heard:
            self._call(self._audience.hear, self, event, *args)

    def _tell_alone(self, event: str, *args: object) -> None:
        """As `_tell`, in a job of the pool's own: there is nobody to whom a timeout of a listener's could be raised."""
        try:
            self._tell(event, *args)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._report(f"{event}() of a listener was interrupted", error)

    def _tell_returned(self, member: Member[C], held: float | None) -> None:
        if held is not None:
            self._telling.add(member)
            try:
                self._tell("returned", member.connection, held)
            finally:
                self._telling.discard(member)

    def _tell_opened(self, connection: C, duration: float, epoch: int) -> None:
        """Before anybody can borrow it."""
        self.claim(connection)
        try:
            self._tell("opened", connection, duration)
        except BaseException:
            self._close_half_open(connection, epoch)
            self._tell_alone("closed", connection, "discarded")
            raise
        finally:
            self.disclaim(connection)

    def _keeper(self) -> Keeper:
        """Who calls `Upkeep.tend` when it is time."""
        return Alone()

    # What a runtime supplies: what raises NotImplementedError here is the least of it. The rest has defaults; some of
    # them lose something, as they say.

    @classmethod
    def _home_is(cls) -> object:
        """Where a pool that is made now is at home: it is called there only, and so are all pools of one group."""
        return None

    def _settle_in(self) -> None:
        """Remember where the pool was made, if that matters. Called once, before anything else below."""

    def _park(self, place: Place[C], limit: float | None) -> None:
        """Stand still until `place` is woken, or `limit` seconds have passed; waking for no reason is allowed."""
        raise NotImplementedError

    def _park_until(self, place: Place[C], deadline: float) -> None:
        """As `_park`, up to a time of `monotonic`'s that is never earlier than at the call before."""
        self._park(place, max(0.0, deadline - monotonic()))

    def _wake(self, place: Place[C]) -> None:
        """Let whoever stands still at `place` go on, soon; nobody may stand there."""
        raise NotImplementedError

    def _rouse(self, place: Place[C]) -> None:
        """As `_wake`, from any thread."""
        raise NotImplementedError

    def _spawn(self, job: Callable[..., object], *args: object) -> object:
        """Run a job in the background, soon, and again if it is killed before it could begin. May be called from any
        thread, by the collector too."""
        raise NotImplementedError

    def _station(self, job: Callable[..., object], *args: object) -> object:
        """As `_spawn`, for a job that parks: where only so many can run, it must not run in place of those that it
        may wait for."""
        return self._spawn(job, *args)

    def _spawn_close(self, *args: Any) -> object:
        """As `_spawn`, for `_close_one`: there may be very many of these at once."""
        return self._spawn(self._close_one, *args)

    def _sleeper(self) -> Callable[[Place[Any], float], None]:
        """How the upkeep parks: that does not keep the program alive, nor the pool. `NEVER` sleeps until it is
        woken."""
        raise NotImplementedError

    def _caller(self) -> Callable[..., Any]:
        """How what the user has written is called, which may wait: answers a function that calls another, and does not
        keep the pool alive. The default is a plain call."""
        return plainly

    def _within(self, limit: float, function: Callable[..., R], *args: Any) -> R:
        """Call what the user has written; a TimeoutError if that takes longer than `limit` seconds."""
        raise NotImplementedError

    def _borrower(self) -> object:
        """Whoever is running."""
        raise NotImplementedError

    def _waiter_at(self, place: Place[C]) -> object:
        """Whoever stands there, where that can be told; else None. The default: whose `switch` is the waiter."""
        return getattr(place.waiter, "__self__", None)

    def _name_of(self, borrower: object) -> str:
        """What a borrower is called, for people: nothing that he was given, for that may be a password."""
        return shown(borrower)

    def _frames_of(self, borrower: Any) -> list[FrameType]:
        """Where a borrower is now, the innermost frame first; none if that cannot be told, or it is who asks. The
        default is for greenlets."""
        return outwards(getattr(borrower, "gr_frame", None))

    def _is_over(self, borrower: Any) -> bool:
        """Whether a borrower has ended; False if that cannot be told. The default is for greenlets."""
        return bool(getattr(borrower, "dead", False))

    def _outer_frame(self) -> FrameType | None:
        """The frame that called the outermost one that Python knows here, where there is one all the same."""
        return None

    def _may_raise(self, error: BaseException) -> bool:
        """Whether an error of a dial may be raised in the borrower: not so the end of the dial's own job."""
        raise NotImplementedError

    def _when_over(self, borrower: object, callback: Callable[[object], None]) -> Callable[[], object] | None:
        """Have `callback` called when that one has ended; answers how to have it not called. The callback does not
        wait. None, the default, if one cannot know: then `reclaim` takes nothing back."""
        return None

    def _watch(self, descriptor: int, member: Member[C]) -> object:
        """Have `upkeep.stirred` called, with `_ref` and the member, when there is something to read from a descriptor.
        None, the default, if one cannot know: then a peer's hanging up is noticed when the connection is lent."""
        return None

    def _unwatch(self, watch: Any) -> None:
        """No longer; the descriptor may be closed now."""

    def _end(self, job: Any) -> None:
        """In the child of a fork: kill a job of the parent's, at once, before whatever it waits for can reach it. Not
        whoever is running. Nothing to do, the default, if it does not run there anyway."""


def without_traceback(error: BaseException) -> BaseException:
    """Its like, without the frames in which it was raised: whoever keeps it must not keep all that was at hand there,
    the pool itself among it. Where its type cannot be copied, the error itself."""
    try:
        like = copy.copy(error)
        return like if type(like) is type(error) and like.args == error.args else error
    except Exception:
        return error


def is_patched() -> bool:
    """Whether the standard library's sockets and threads are gevent's or eventlet's: then runtimes can be mixed."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool((gevent and gevent.is_module_patched("socket")) or (eventlet and eventlet.is_monkey_patched("socket")))


class _Tally(Generic[C]):
    """Jobs that somebody waits for."""

    __slots__ = ("error", "left", "place", "unstarted")

    def __init__(self, jobs: int) -> None:
        self.left = self.unstarted = jobs
        self.error: BaseException | None = None
        self.place: Place[C] = new_place()


def _name_of(factory: object) -> str:
    if isinstance(factory, Wrap):
        factory = factory.open
    return str(getattr(factory, "__name__", None) or type(factory).__name__)


def clear_all(pools: Sequence[Driver[Any]]) -> None:
    """Clear them side by side."""
    tallies = [pool._close_all(pool.retire_all()) for pool in pools]
    for pool in pools:
        pool._upkeep.begins_anew()
        pool.rested()
    for pool in pools:
        pool._start_dials()
    for pool, tally in zip(pools, tallies, strict=True):
        pool._wait_for(tally)


def close_all(pools: Sequence[Driver[Any]], timeout: float | None) -> None:
    """Close them side by side."""
    deadline = monotonic() + (timeout or 0.0)
    tallies = [pool._shut() for pool in pools]
    if timeout is None:
        for pool, tally in zip(pools, tallies, strict=True):
            pool._wait_for(tally)
    else:
        for pool in pools:
            pool._drain(deadline)
        for pool in pools:
            pool._take_all()
    # For what was being closed already, too: in asyncio a loop that ends now would cancel a close that has not begun.
    deadline = max(deadline, monotonic()) + LAST_MOMENT
    for pool in pools:
        pool._drain(deadline, closes_only=True)

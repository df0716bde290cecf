"""One cap over several pools: every decision about it, and nothing else. The rules of `core` hold here too, but that a
quota is asked in the middle of a decision; so it must neither wait nor call a pool."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeAlias

from gsocketpool.arguments import whole_number

if TYPE_CHECKING:
    from gsocketpool.core import Core, Member

__all__ = ["Budget", "Quota"]

#: A time, and since then: which pool. The number keeps pools from being compared.
Entry: TypeAlias = "tuple[int, int, weakref.ref[Core[Any]]]"

#: Later than every turn.
NO_TURN: Final = 2**62


class Quota(Protocol):
    """A limit that is kept elsewhere: for many processes, say, that share what one database allows. It is asked in the
    middle of a pool's decisions, so neither method may wait, or call the budget or one of its pools."""

    def take(self) -> bool:
        """Take a unit, if there is one. An exception, which is logged, means that there is none."""

    def give_back(self) -> None:
        """A unit that was taken is free."""


class Budget:
    """A cap on the sockets of several pools together: give the same one to each, as ``Pool(..., budget=budget)``.

    Each socket of such a pool, from the beginning of its dial to the end of its close, takes one unit. When there is
    none left and somebody would have to dial, the connection that has idled longest in any of the pools is closed
    (``evicted``). If none idles, units go to whoever has waited longest, in whichever pool: a connection that comes
    back is closed for him rather than lent to somebody who came later. Who waits only because his own pool is full
    stands in nobody's way. `min_idle` and `initial_connections` take only what is free and nobody waits for. When a
    pool is collected, what it had lent is its borrowers' alone, and its units are free.

    A budget and its pools belong together: for greenlets to one thread, in asyncio to one loop. Threads share one as
    they share a pool.

    :param max_total: most sockets of all these pools.
    :param quota: a limit that is kept elsewhere, an object with the methods of :class:`~gsocketpool.Quota`: each unit
        is taken from there too, and given back. When it has units again that none of these pools gave back, call
        :meth:`replenished`. None: there is no other limit.
    :ivar last_error: what `quota` raised when it was asked last, or None.
    :raises TypeError: `max_total` is no whole number, or `quota` lacks a method.
    :raises ValueError: `max_total` is less than 1.
    """

    def __init__(self, max_total: int, *, quota: Quota | None = None) -> None:
        self._max_total = whole_number("max_total", max_total, least=1)
        if quota is not None:
            for method in ("take", "give_back"):
                if not callable(getattr(quota, method, None)):
                    raise TypeError(f"quota must have a method {method}(): {type(quota).__name__} has none")
        self._quota = quota
        self.taken = 0  # units
        self._closing = 0  # of these; they will be free before long
        self._dry = False  # a unit was refused, and none has come back since
        self.turn = 0  # the last one that was given, to a waiter or to what came to idle
        self._early = -(2**60)
        # Which pool has waited for a unit since which turn, and which has had a connection idle since when: heaps. A
        # pool knows its entries; others are out of date. One may say too early a time, then it is put right when it is
        # the first, but never too late.
        self.claims: list[Entry] = []
        self._idlers: list[Entry] = []
        # By their identity: a subclass may define `__eq__` as it likes.
        self._pools: weakref.WeakValueDictionary[int, Core[Any]] = weakref.WeakValueDictionary()
        self.last_error: Exception | None = None
        self._unsaid: Exception | None = None
        self._home: object = None

    @property
    def max_total(self) -> int:
        """Most sockets of all pools."""
        return self._max_total

    @property
    def used(self) -> int:
        """Units that are taken: sockets open, opening or closing."""
        return self.taken

    @property
    def advice(self) -> str:
        """What to do when there is no unit."""
        if self.last_error is not None:
            return f"its budget's quota failed ({self.last_error!r}): mend that, or wait longer (timeout=)"
        if self.taken < self._max_total:
            return (
                f"its budget's quota has no more ({self.taken} of {self._max_total} units are taken here): return "
                "connections sooner, wait longer (timeout=), or raise the quota"
            )
        return (
            f"its budget is used up ({self.taken} of {self._max_total}): return connections sooner, wait longer "
            "(timeout=), or raise max_total"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a budget cannot be copied or pickled: give the same one to all its pools")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.taken} of {self._max_total} used, by {len(self._pools)} pools>"

    def replenished(self) -> None:
        """The `quota` may have units again that no pool of this budget gave back: whoever waits for one dials."""
        self._change(self._replenish)

    def resize(self, max_total: int) -> None:
        """Change `max_total`. More serves whoever waits at once. Less closes idle connections, those that idled longest
        first, and more as they come back. Returns at once.

        :raises TypeError: it is no whole number.
        :raises ValueError: it is less than 1.
        """
        whole_number("max_total", max_total, least=1)
        self._change(partial(setattr, self, "_max_total", max_total))

    def _replenish(self) -> None:
        self._dry = False

    def _change(self, how: Callable[[], object]) -> None:
        """Change what it allows, and have whoever waits served."""
        for ref in self._pools.valuerefs():  # a copy: pools may come and go in other threads
            driver: Any = ref()
            if driver is not None:
                driver._change_budget(how)
                return
        how()

    # What a pool's core tells it and asks.

    def join(self, pool: Core[Any]) -> None:
        """One more pool."""
        self._pools[id(pool)] = pool

    def settles_in(self, home: object) -> object:
        """A pool is made there. Answers where the first one was."""
        if self._home is None:
            self._home = home
        return self._home

    def next_turn(self) -> int:
        """The turn of whoever comes now."""
        self.turn += 1
        return self.turn

    def early_turn(self) -> int:
        """The turn of whoever comes before all that."""
        self._early += 1
        return self._early

    def grants(self, pool: Core[Any], turn: int) -> bool:
        """Take a unit for the waiter with this turn, the first of the pool who needs one; False if there is none, or
        somebody in another pool was there before. Then his claim stands."""
        if pool._claim is None or turn < pool._claim[0]:
            if self._is_cluttered(self.claims):
                self.claims = [entry for entry in self.claims if (at := entry[2]()) and at._claim is entry]
                heapify(self.claims)
            pool._claim = (turn, id(pool), pool._ref)
            heappush(self.claims, pool._claim)
        return self._first() is pool and self._takes()

    def spares(self) -> bool:
        """Take a unit for a dial that nobody waits for, if nobody waits for a unit either."""
        return self._first() is None and self._takes()

    def has_one(self) -> bool:
        """Whether a unit is free, as far as is known."""
        return self._free() > 0

    def makes_room(self) -> bool:
        """Whether one is, or would be if what idles somewhere is closed."""
        return self._free() > 0 or self._longest_idle() is not None

    def closes(self) -> None:
        """A socket is being closed."""
        self._closing += 1

    def takes_back(self, closed: bool) -> None:
        """A socket is closed, or could not be opened at all."""
        self._closing -= closed
        self.taken -= 1
        self._returns()

    def loses(self, units: int) -> None:
        """So many connections are lent for good."""
        for _ in range(units):
            self.taken -= 1
            self._returns()

    def forgets(self, units: int, closing: int) -> None:
        """So many sockets are somebody else's now."""
        self.taken -= units
        self._closing -= closing
        self._dry = False

    def has_idle(self, pool: Core[Any], member: Member[Any]) -> None:
        """It idles, since the time that is written on it."""
        if pool._idler is None or member.idles < pool._idler[0]:
            if self._is_cluttered(self._idlers):
                self._idlers = [entry for entry in self._idlers if (at := entry[2]()) and at._idler is entry]
                heapify(self._idlers)
            pool._idler = (member.idles, id(pool), pool._ref)
            heappush(self._idlers, pool._idler)

    # Decisions

    def next_to_dial(self) -> Core[Any] | None:
        """The pool that may dial now: it has the waiter who was there first of all who need a unit. None if there is no
        unit, or no such waiter."""
        pool = self._first()
        return pool if pool is not None and self.has_one() else None

    def next_to_close(self) -> tuple[Core[Any], Member[Any]] | None:
        """What has idled longest is retired, since more wait for a unit than units will be free; or because there are
        more than there may be. Answers what must be closed."""
        if not self.must_go(NO_TURN):
            return None
        found = self._longest_idle()
        if found is not None:
            pool, member = found
            pool.retire(member, "evicted")
        return found

    def _longest_idle(self) -> tuple[Core[Any], Member[Any]] | None:
        while self._idlers:
            entry = self._idlers[0]
            pool = entry[2]()
            if pool is None or pool._idler is not entry:
                heappop(self._idlers)
                continue
            member = pool.longest_idle()
            if member is None:
                pool._idler = None
                heappop(self._idlers)
            elif member.idles > entry[0]:
                pool._idler = (member.idles, *entry[1:])
                heapreplace(self._idlers, pool._idler)
            else:
                return pool, member
        return None

    def must_go(self, turn: int) -> bool:
        """Whether a connection that comes back is closed instead of lent to the waiter with this turn: there are more
        than there may be, or more waiters were there before him than units will be free without it."""
        if self.taken - self._closing > self._max_total:
            return True
        if not self.claims:
            return False
        first = self._first()
        if first is None or first._claim is None or first._claim[0] >= turn:
            return False
        return self._more_wait_than(self._free() + self._closing, turn)

    def _is_cluttered(self, entries: list[Entry]) -> bool:
        """Whether most of them are of pools that are gone, or out of date."""
        return len(entries) > 2 * len(self._pools) + 16

    def _free(self) -> int:
        return 0 if self._dry else self._max_total - self.taken

    def _takes(self) -> bool:
        if self._free() <= 0:
            return False
        if self._quota is not None:
            try:
                self._dry = not self._quota.take()
                self.last_error = None
            except Exception as error:
                self._dry = True
                self._fails(error)
        self.taken += not self._dry
        return not self._dry

    def _returns(self) -> None:
        self._dry = False
        if self._quota is not None:
            try:
                self._quota.give_back()
            except Exception as error:
                self._fails(error)

    def _fails(self, error: Exception) -> None:
        if self.last_error is None:
            self._unsaid = error
        self.last_error = error

    def unsaid(self) -> Exception | None:
        """What the quota raised, where it had not before: to be logged, once."""
        error, self._unsaid = self._unsaid, None
        return error

    def _more_wait_than(self, units: int, turn: int) -> bool:
        """Whether so many and more wait for a unit since before this turn. Looks at no more than it must."""
        found = 0
        branches = [0]  # of the heap: what is below an entry is later than it
        while branches:
            number = branches.pop()
            if number >= len(self.claims) or self.claims[number][0] >= turn:
                continue
            pool = self.claims[number][2]()
            if pool is not None and pool._claim is self.claims[number]:
                found += pool.claimants(turn, units + 1 - found)
                if found > units:
                    return True
            branches += (2 * number + 1, 2 * number + 2)
        return False

    def _first(self) -> Core[Any] | None:
        """The pool with the waiter who was there first of all who need a unit."""
        while self.claims:
            entry = self.claims[0]
            pool = entry[2]()
            if pool is None or pool._claim is not entry:
                heappop(self.claims)
                continue
            turn = pool.first_claim()
            if turn is None:
                pool._claim = None
                heappop(self.claims)
            elif turn > entry[0]:
                pool._claim = (turn, *entry[1:])
                heapreplace(self.claims, pool._claim)
            else:
                return pool
        return None

    def faults(self) -> list[str]:
        """Which invariants are broken: none, ever, once the drivers have done what is to be done."""
        pools = list(self._pools.values())
        rules = {
            "units are miscounted": self.taken == sum(pool.total for pool in pools),
            "closes are miscounted": self._closing == sum(pool._closing for pool in pools),
            "somebody waits for a unit, and one is free": self.next_to_dial() is None,
            "somebody waits for a unit, and a connection idles": not self.must_go(NO_TURN)
            or not any(pool.idle for pool in pools),
        }
        return [what for what, holds in rules.items() if not holds]

"""Every decision of a pool, and nothing else.

The rules of this file:

1. Every decision is made here: who gets which connection, who waits, when to dial, what to close.
2. Nothing here blocks, dials, closes, logs, reads a clock or calls user code. So no greenlet can switch in the middle
   of a decision, and gevent needs no lock; threads put one lock around each call.
3. A permit to dial, and a place in the queue, is redeemed exactly once, on every path, a kill included: each `permit`
   and `permit_unasked` by one `opened` or `failed`; each `Place` by what it was granted or by `abandon`; each `retire`
   by one `freed`.
4. It returns plain values and identity sentinels, never a decision object made for the occasion.

What holds between any two calls (`Core.faults` says which of these is broken; the tests ask it after every step):

- an idle connection means that nobody waits for one;
- somebody waits without a dial only while the pool is full or as many dials run as may run at once, once the driver
  has used up what `permit` offers;
- ``idle + in use + dialling + closing <= max_connections``: a slot is free when its socket is closed, not before;
- as many dials run as there are waiters who were promised one, or more;
- closed means no idle connection and no waiter.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Final, Generic, TypeVar

__all__ = ["BY_HAND", "CLOSED", "EXHAUSTED", "INSPECTED", "REASONS", "RETIRED", "RETURNING", "Core", "Member", "Place"]

C = TypeVar("C")

#: Why a connection was closed, in the order in which `stats` lists them.
REASONS: Final = ("expired", "idle", "stale", "discarded", "dropped", "cleared", "shrunk", "closed")


class Sentinel:
    """A value that is told by its identity."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}>"


# What `take`, `give` and `opened` may answer instead of a member or a place.
CLOSED: Final = Sentinel("closed")
EXHAUSTED: Final = Sentinel("exhausted")
RETIRED: Final = Sentinel("retired")

# Who holds a member, where it is neither a lease nor a place: `Member.holder`.
BY_HAND: Final = Sentinel("acquired by hand")
RETURNING: Final = Sentinel("being reset")
INSPECTED: Final = Sentinel("inspected by the pool")


class Member(Generic[C]):
    """An open connection of the pool, idle or in use.

    `holder` is None while it idles, else whoever answers for it: a lease, a place in the queue that it was granted to,
    `BY_HAND`, `RETURNING` or `INSPECTED`. `cold` says that nobody has touched it since the last `cool`.
    """

    __slots__ = ("cold", "connection", "holder", "uses")

    def __init__(self, connection: C) -> None:
        self.connection = connection
        self.holder: object = None
        self.uses = 0
        self.cold = False


class Place(Generic[C]):
    """A place in the queue. It ends with a `member`, or with an `error`, or abandoned.

    `reserved` says that the pool has, or had when it was taken, a slot for it: it waits for a dial, not for a release.
    A slot whose old connection is being closed counts; the dial begins when that is done.
    `waiter` and `waking` are the runtime's: whom it must wake, and the waking that is under way.
    """

    __slots__ = ("error", "member", "reserved", "waiter", "waking")

    # Without an `__init__`, because one is made for each wait and the call would cost more than all else in it.
    member: Member[C] | None
    error: BaseException | None
    reserved: bool
    waiter: Any
    waking: Any


def new_place(reserved: bool = False) -> Place[Any]:
    """A place that has not ended."""
    place: Place[Any] = Place()
    place.member = place.error = place.waiter = place.waking = None
    place.reserved = reserved
    return place


#: A member of no pool.
NOBODY: Final[Member[Any]] = Member(object())


class Core(Generic[C]):
    """The state of a pool and all that may happen to it."""

    # So many attributes that without slots CPython would no longer look them up at a fixed offset.
    __slots__ = (
        "_always_cold",
        "_brimful",
        "_claimed",
        "_closed",
        "_closed_for",
        "_closing",
        "_cold",
        "_dialled",
        "_dialling",
        "_exhausted",
        "_fifo",
        "_lane_in",
        "_lane_out",
        "_last_error",
        "_latest",
        "_max_connecting",
        "_max_connections",
        "_max_waiting",
        "_members",
        "_open_failures",
        "_opened",
        "_resets",
        "_retired_uses",
        "_undialled",
        "_warm",
    )

    def __init__(
        self,
        max_connections: int,
        *,
        max_connecting: int,
        max_waiting: int | None = None,
        fifo: bool = False,
        always_cold: bool = False,
    ) -> None:
        self._max_connections = max_connections
        self._max_connecting = max_connecting
        self._max_waiting = max_waiting
        self._fifo = fifo
        self._always_cold = always_cold

        self._members: dict[int, Member[C]] = {}  # by identity: user classes may define __eq__ or __hash__ as they like
        self._warm: deque[Member[C]] = deque()
        self._cold: OrderedDict[Member[C], None] = OrderedDict()
        # All waiters in the order in which they came: first those for whom a dial was started, then those without.
        self._dialled: OrderedDict[Place[C], None] = OrderedDict()
        self._undialled: OrderedDict[Place[C], None] = OrderedDict()
        # What a fast lane lent last: with few borrowers it is what returns next, and is found without a look-up.
        self._latest: Member[C] = NOBODY
        self._claimed: dict[int, C] = {}  # being opened or closed: the factory must not return one of these
        self._dialling = 0
        self._closing = 0
        self._closed = False
        self._resets = False

        self._retired_uses = 0
        self._opened = 0
        self._open_failures = 0
        self._exhausted = 0
        self._closed_for: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._last_error: BaseException | None = None

        self._set_lanes()

    # The fast lanes. A driver's acquire may pop `_lane_out` and note what it lends as `_latest`; its release may append
    # to `_warm` what is `_latest`, or anything while `_lane_in` is open. As long as they are open, that is all there is
    # to decide. When there is more (a waiter to serve, a reset to run, a check to make each time) they are shut, and
    # the driver comes here. `_latest` needs no test of its own: nothing is lent through `_lane_out` while `_lane_in` is
    # shut. `_brimful` is the lane to the end of the queue: whoever comes while others wait, all slots are taken by
    # members and no number of waiters is too many, waits behind them.

    def _set_lanes(self) -> None:
        shut = self._resets or self._closed or self._always_cold
        self._lane_out: deque[Member[C]] = deque() if shut or self._fifo else self._warm
        if shut or self._dialled or self._undialled:
            self._lane_in = False
            self._latest = NOBODY
        else:
            self._lane_in = True
        self._brimful = self._max_waiting is None and len(self._members) >= self._max_connections

    def expect_resets(self) -> None:
        """From now on every release passes through `give`."""
        if not self._resets:
            self._resets = True
            self._set_lanes()

    # Borrowing

    def take(self, wait: bool) -> Member[C] | Place[C] | Sentinel:
        """An idle member; else a place in the queue; `CLOSED`; or `EXHAUSTED` where it may not wait."""
        queue = self._undialled
        if queue and self._brimful and wait:
            place: Place[C] = Place()
            place.member = place.error = place.waiter = place.waking = None
            place.reserved = False
            queue[place] = None
            return place
        if self._warm or self._cold:
            member = self._pop_idle()
            member.uses += 1
            member.holder = BY_HAND
            return member
        if self._closed:
            return CLOSED
        if not wait:
            return EXHAUSTED
        room = self._max_connections - len(self._members) - self._dialling  # with the slots that are being emptied
        reserved = len(queue) < room
        if self._max_waiting is not None and not reserved and len(queue) - max(0, room) >= self._max_waiting:
            return EXHAUSTED
        place = new_place(reserved)
        queue[place] = None
        self._set_lanes()
        return place

    def give(self, member: Member[C]) -> Place[C] | Sentinel | None:
        """Take back what was lent. Answers the place that has it now and must be woken, None if it idles, or `RETIRED`
        if it must be closed."""
        if self._closed:
            self.retire(member, "closed")
            return RETIRED
        queue = self._dialled or self._undialled
        if not queue:
            member.holder = None
            member.cold = self._always_cold
            self._warm.append(member)
            return None
        place, _ = queue.popitem(last=False)
        place.member = member
        member.holder = place
        member.uses += 1
        member.cold = False
        if not queue and not self.waiting:
            self._set_lanes()
        return place

    def abandon(self, place: Place[C]) -> Member[C] | None:
        """Leave the queue. Answers what was granted in the meantime and must now be used or given back."""
        member = place.member
        if member is not None:
            place.member = None
            member.uses -= 1
            member.holder = BY_HAND
            return member
        if place in self._undialled:
            del self._undialled[place]
        elif place in self._dialled:
            del self._dialled[place]
        else:
            return None
        if not self.waiting:
            self._set_lanes()
        return None

    # Dialling

    def permit(self) -> Place[C] | None:
        """A permit to dial for the first waiter who has none, if there is room for one more."""
        if not self._undialled or not self._may_dial():
            return None
        place, _ = self._undialled.popitem(last=False)
        place.reserved = True
        self._dialled[place] = None
        self._dialling += 1
        return place

    def permit_unasked(self) -> bool:
        """A permit to dial though nobody waits for it."""
        if self._closed or not self._may_dial():
            return False
        self._dialling += 1
        return True

    def knows(self, connection: C) -> bool:
        """Whether this very object is in the pool, or being opened or closed by it."""
        return id(connection) in self._members or id(connection) in self._claimed

    def claim(self, connection: C) -> None:
        """The factory returned this object, and it is being opened now."""
        self._claimed[id(connection)] = connection

    def disclaim(self, connection: C) -> None:
        """It is open, or will never be."""
        del self._claimed[id(connection)]

    def opened(self, connection: C) -> Place[C] | Sentinel | None:
        """A dial succeeded: a permit is redeemed. Answers as `give` does."""
        self._dialling -= 1
        self._opened += 1
        self._last_error = None
        member = self._members[id(connection)] = Member(connection)
        member.holder = BY_HAND
        return self.give(member)

    def failed(self, place: Place[C] | None, error: BaseException) -> Place[C] | None:
        """A dial failed: a permit is redeemed. Answers the place it was started for, with the error and to be woken,
        if that one still waits."""
        self._dialling -= 1
        self._open_failures += 1
        self._last_error = error
        if place is not None and place in self._dialled:
            del self._dialled[place]
            place.error = error
            if not self.waiting:
                self._set_lanes()
            return place
        self._balance()
        return None

    # Retiring

    def reject(self, member: Member[C]) -> None:
        """What `take` answered turned out to be dead before it was lent."""
        member.uses -= 1
        self.retire(member, "stale")

    def retire(self, member: Member[C], reason: str) -> Place[C] | None:
        """The pool is done with it, idle or in use. Its slot is free when `freed` says so.

        Who was granted it, and has not collected it yet, gets another or is first in the queue again; answers his
        place if the pool is closed and he must be told.
        """
        place = member.holder
        if place is None:
            self._remove_idle(member)
        elif isinstance(place, Place):
            member.uses -= 1
            place.member = None
            if self.idle:
                place.member = other = self._pop_idle()
                other.holder = place
                other.uses += 1
            elif not self._closed:
                self._requeue(place)
        if member is self._latest:
            self._latest = NOBODY
        connection = member.connection
        del self._members[id(connection)]
        self._claimed[id(connection)] = connection
        self._brimful = False
        member.holder = None
        self._closing += 1
        self._closed_for[reason] += 1
        self._retired_uses += member.uses
        return place if isinstance(place, Place) and self._closed else None

    def freed(self, connection: C) -> None:
        """Its socket is closed: the slot is free."""
        del self._claimed[id(connection)]
        self._closing -= 1

    def shut(self) -> tuple[list[C], list[Place[C]]]:
        """Close the pool. Answers the connections that idled and must be closed, and the places that must be told."""
        self._closed = True
        idle = []
        while self.idle:
            member = self._pop_idle()
            member.holder = BY_HAND
            idle.append(member.connection)
            self.retire(member, "closed")
        places = [*self._dialled, *self._undialled]
        self._dialled.clear()
        self._undialled.clear()
        self._set_lanes()
        return idle, places

    # Idle connections. `_warm` holds those touched since the last `cool`, `_cold` the older ones. So a tick now and
    # then tells which have idled for a while, and neither acquire nor release reads a clock.

    def cool(self) -> None:
        """Whatever is idle now has idled for a while if nobody has touched it by the next call."""
        for member in self._warm:
            member.cold = True
            self._cold[member] = None
        self._warm.clear()

    def inspect(self) -> Member[C] | None:
        """Take out the connection that has idled longest, to give it back or retire it; `inspect` comes to it again
        only after all others."""
        self.cool()
        if not self._cold:
            return None
        member, _ = self._cold.popitem(last=False)
        member.holder = INSPECTED
        return member

    def inspected(self, member: Member[C]) -> Place[C] | Sentinel | None:
        """Give back what `inspect` took out. Answers as `give` does."""
        if self.waiting or self._closed:
            return self.give(member)
        member.holder = None
        self._cold[member] = None
        return None

    def _pop_idle(self) -> Member[C]:
        if self._fifo:
            return self._cold.popitem(last=False)[0] if self._cold else self._warm.popleft()
        return self._warm.pop() if self._warm else self._cold.popitem()[0]

    def _remove_idle(self, member: Member[C]) -> None:
        if member not in self._cold:
            self.cool()
        del self._cold[member]

    # Waiters

    def _requeue(self, place: Place[C]) -> None:
        queue = self._dialled or self._undialled
        queue[place] = None
        queue.move_to_end(place, last=False)
        self._balance()
        self._set_lanes()

    def _balance(self) -> None:
        """A waiter whose dial has ended, or was used up by somebody before him, is without one again."""
        while len(self._dialled) > self._dialling:
            place, _ = self._dialled.popitem()
            self._undialled[place] = None
            self._undialled.move_to_end(place, last=False)

    def _may_dial(self) -> bool:
        return self._dialling < self._max_connecting and self.total < self._max_connections

    # Figures

    @property
    def total(self) -> int:
        """Sockets that the peer may see: members, dials and closes under way."""
        return len(self._members) + self._dialling + self._closing

    @property
    def size(self) -> int:
        """Connections in the pool, idle and in use."""
        return len(self._members)

    @property
    def idle(self) -> int:
        """Connections that nobody uses."""
        return len(self._warm) + len(self._cold)

    @property
    def in_use(self) -> int:
        """Connections that are lent."""
        return len(self._members) - self.idle

    @property
    def waiting(self) -> int:
        """Borrowers in the queue."""
        return len(self._dialled) + len(self._undialled)

    def faults(self) -> list[str]:
        """Which invariants are broken: none, ever. For tests and for who debugs a driver."""
        members = self._members.values()
        idle = [*self._warm, *self._cold]
        waiters = [*self._dialled, *self._undialled]
        lanes = self._lane_in
        rules: dict[str, bool] = {
            "an idle connection, and somebody waits": not (idle and waiters),
            "somebody waits without a dial that could run": not self._undialled or self._closed or not self._may_dial(),
            "more connections than max_connections": self.total <= self._max_connections,
            "more dials than max_connecting": 0 <= self._dialling <= self._max_connecting,
            "more waiters were promised a dial than dials run": len(self._dialled) <= self._dialling,
            "closed, and something idles or waits": not self._closed or not (idle or waiters),
            "idle connections and holders disagree": {id(m) for m in idle} == {id(m) for m in members if not m.holder},
            "a connection idles twice": len(idle) == len(set(map(id, idle))),
            "a waiter has his answer": all(p.member is None and p.error is None for p in waiters),
            "a warm connection is cold": self._always_cold or not any(m.cold for m in self._warm),
            "the lane for releases is open though there is more to decide": not lanes or not (waiters or self._closed),
            "the lane to the queue is open though there may be room": not self._brimful
            or (len(self._members) >= self._max_connections and self._max_waiting is None),
            "less than nothing is being closed": self._closing >= 0,
            "the latest is no member": self._latest is NOBODY or self._latest in members,
            "the latest could be released though there is more to decide": lanes or self._latest is NOBODY,
        }
        return [what for what, holds in rules.items() if not holds]

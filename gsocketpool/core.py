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

- an idle connection means that nobody waits for one, unless the pool is paused;
- somebody waits without a dial only while the pool is full or paused, as many dials run as may run at once, its breaker
  is open, or its budget has no unit for him, once the driver has used up what `permit` offers;
- ``idle + in use + dialling + closing <= max_connections``: a slot is free when its socket is closed, not before. After
  `set_cap` to less it only ever falls until that holds again;
- as many dials run as there are waiters who were promised one, or more;
- closed means no idle connection and no waiter.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from gsocketpool.budget import NO_TURN, Budget, Entry
from gsocketpool.lifetime import NEVER, NO_LIMITS, Limits

__all__ = [
    "BROKEN",
    "BY_HAND",
    "CLOSED",
    "EXHAUSTED",
    "INSPECTED",
    "REASONS",
    "RETIRED",
    "RETURNING",
    "Core",
    "Member",
    "Place",
]

C = TypeVar("C")

#: Why a connection was closed, in the order in which `stats` lists them.
REASONS: Final = (
    "expired",
    "idle",
    "stale",
    "discarded",
    "dropped",
    "cleared",
    "shrunk",
    "evicted",
    "reclaimed",
    "closed",
)


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
BROKEN: Final = Sentinel("broken")
RETIRED: Final = Sentinel("retired")

# Who holds a member, where it is neither a lease nor a place: `Member.holder`.
BY_HAND: Final = Sentinel("acquired by hand")
RETURNING: Final = Sentinel("being reset")
INSPECTED: Final = Sentinel("inspected by the pool")


class Member(Generic[C]):
    """An open connection of the pool, idle or in use.

    `holder` is None while it idles, else whoever answers for it: a lease, a place in the queue that it was granted to,
    `BY_HAND`, `RETURNING` or `INSPECTED`. `cold` says that nobody has touched it for a while: since the time `since`,
    if it idles. `fate` is the reason for which it will be closed when it comes back, `retire_at` the time of its end,
    `proven` the time when it last answered a keepalive, `stirs` how often the peer said something since then or since
    it was touched; `idles` is a budget's, and grows in the order in which connections came to idle. `reason` is why it
    was retired. `loan`, `lent_at` and `watch` are the driver's: what it has noted of the borrower, when listeners were
    told of the loan (0 if they were not), and whatever tells it that the peer hung up.
    """

    __slots__ = (
        "cold",
        "connection",
        "fate",
        "holder",
        "idles",
        "lent_at",
        "loan",
        "proven",
        "reason",
        "retire_at",
        "since",
        "stirs",
        "uses",
        "watch",
    )

    def __init__(self, connection: C, retire_at: float = NEVER) -> None:
        self.connection = connection
        self.holder: object = None
        self.uses = 0
        self.cold = False
        self.fate: str | None = None
        self.retire_at = retire_at
        self.since = 0.0
        self.proven = 0.0
        self.stirs = 0
        self.idles = 0
        self.reason = ""
        self.loan: Any = None
        self.lent_at = 0.0
        self.watch: Any = None


class Place(Generic[C]):
    """A place in the queue. It ends with a `member`, or with an `error`, or abandoned.

    `reserved` says that the pool has, or had when it was taken, a slot for it: it waits for a dial, not for a release.
    A slot whose old connection is being closed counts; the dial begins when that is done. `turn` grows in the order in
    which they came. `queue` is the one it stands in, None if none.
    `waiter`, `waking` and `deadline` are the runtime's: whom it must wake, the waking that is under way, and when it
    must do so at the latest.
    """

    __slots__ = ("deadline", "error", "member", "queue", "reserved", "turn", "waiter", "waking")

    # Without an `__init__`, because one is made for each wait and the call would cost more than all else in it.
    member: Member[C] | None
    error: BaseException | None
    queue: Queue[C] | None
    reserved: bool
    turn: int
    waiter: Any
    waking: Any
    deadline: float


def new_place(reserved: bool = False) -> Place[Any]:
    """A place that has not ended."""
    place: Place[Any] = Place()
    place.member = place.error = place.queue = place.waiter = place.waking = None
    place.reserved = reserved
    place.turn = 0
    return place


class Queue(deque[Place[C]]):
    """Places, the first of which is served first. Any may leave: it is passed over, and taken out when it would be the
    first, or when most have left. So the queue is true if, and only if, somebody stands in it, and leaving costs the
    same however many do. An `OrderedDict` would do without that, and take three times as long for each who waits.
    """

    __slots__ = ("left",)

    def __init__(self) -> None:
        super().__init__()
        self.left = 0  # so many in here have left

    def join(self, place: Place[C]) -> None:
        """Be the last."""
        place.queue = self
        self.append(place)

    def join_first(self, place: Place[C]) -> None:
        """Be the first."""
        place.queue = self
        self.appendleft(place)

    def leave(self, place: Place[C]) -> None:
        """Stand here no longer."""
        place.queue = None
        self.left += 1
        self.tidy()

    def first(self) -> Place[C]:
        """Who is served now, and stands here no longer."""
        place = self.popleft()
        place.queue = None
        if self.left:
            self.tidy()
        return place

    def last(self) -> Place[C]:
        """Who came last, and stands here no longer."""
        while (place := self.pop()).queue is not self:
            self.left -= 1
        place.queue = None
        return place

    def tidy(self) -> None:
        """Those who have left are not the first, and not most."""
        if 2 * self.left > len(self):
            staying = [*self]
            super().clear()
            self.extend(staying)
            self.left = 0
        while self.left and self[0].queue is not self:
            self.popleft()
            self.left -= 1

    def clear(self) -> None:
        """Everybody leaves."""
        for place in self:
            place.queue = None
        super().clear()
        self.left = 0

    @property
    def length(self) -> int:
        """How many stand here."""
        return len(self) - self.left

    def __iter__(self) -> Iterator[Place[C]]:
        return (place for place in super().__iter__() if place.queue is self)

    def __contains__(self, place: object) -> bool:
        return isinstance(place, Place) and place.queue is self


#: A member of no pool.
NOBODY: Final[Member[Any]] = Member(object())


class Core(Generic[C]):
    """The state of a pool and all that may happen to it."""

    # So many attributes that without slots CPython would no longer look them up at a fixed offset.
    __slots__ = (
        "__weakref__",
        "_agenda",
        "_always_cold",
        "_break_after",
        "_brimful",
        "_broken",
        "_budget",
        "_ceiling",
        "_claim",
        "_claimed",
        "_closed",
        "_closed_for",
        "_closing",
        "_cold",
        "_dialled",
        "_dialling",
        "_doomed",
        "_due",
        "_early",
        "_epoch",
        "_exhausted",
        "_fifo",
        "_generation",
        "_idler",
        "_lane_in",
        "_lane_out",
        "_lane_with",
        "_last_error",
        "_latest",
        "_limits",
        "_max_connecting",
        "_max_connections",
        "_max_waiting",
        "_members",
        "_min_idle",
        "_now",
        "_open_failures",
        "_opened",
        "_paused",
        "_plain",
        "_records",
        "_ref",
        "_resets",
        "_resting",
        "_retired_uses",
        "_setbacks",
        "_stern",
        "_strikes",
        "_tickets",
        "_trial",
        "_trips",
        "_trying",
        "_turn",
        "_unclosed",
        "_undialled",
        "_unseen",
        "_unsettled",
        "_warm",
    )

    def __init__(
        self,
        max_connections: int,
        *,
        max_connecting: int,
        max_waiting: int | None = None,
        min_idle: int = 0,
        limits: Limits = NO_LIMITS,
        fifo: bool = False,
        always_cold: bool = False,
        records: bool = False,
        budget: Budget | None = None,
        break_after: int | None = None,
    ) -> None:
        self._max_connections = max_connections
        self._max_connecting = max_connecting
        self._max_waiting = max_waiting
        self._min_idle = min_idle
        self._limits = limits
        self._fifo = fifo
        self._always_cold = always_cold
        self._records = records
        self._break_after = break_after
        self._budget = budget
        self._claim: Entry | None = None  # the budget's: since which turn somebody waits for a unit
        self._idler: Entry | None = None  # likewise: since when something idles
        self._ref = weakref.ref(self)

        self._members: dict[int, Member[C]] = {}  # by identity: user classes may define __eq__ or __hash__ as they like
        self._warm: deque[Member[C]] = deque()
        self._cold: OrderedDict[Member[C], None] = OrderedDict()
        # All waiters in the order in which they came: first those for whom a dial was started, then those without.
        self._dialled: Queue[C] = Queue()
        self._undialled: Queue[C] = Queue()
        # What a fast lane lent last: with few borrowers it is what returns next, and is found without a look-up.
        self._latest: Member[C] = NOBODY
        self._unclosed: dict[Member[C], None] = {}  # retired, and nobody has begun to close it
        self._claimed: dict[int, C] = {}  # being opened or closed: the factory must not return one of these
        # When to look at which member again, by the clock; the number in the middle keeps members from being compared.
        self._agenda: list[tuple[float, int, Member[C]]] = []
        self._tickets = 0
        self._due: OrderedDict[Member[C], None] = OrderedDict()  # for a keepalive
        self._now = 0.0  # when `cool` was called last
        self._unseen: list[Member[C]] = []  # became cold since
        self._dialling = 0
        self._closing = 0
        self._doomed = 0  # members in use that have a fate
        self._ceiling = max_connections  # what `total` may still reach after a resize to less
        self._closed = False
        self._paused = False
        self._resets = False
        self._resting = False
        self._unsettled = False
        self._turn = 0  # the last one that was given
        self._early = -(2**60)  # likewise, to those who come before all these
        self._setbacks = 0
        # The breaker: after so many failed dials in a row nothing is dialled, but for one trial now and then.
        self._strikes = 0
        self._trips = 0  # so often in a row it was found that nothing should be dialled
        self._broken = False
        self._trial = False  # one dial may pass
        self._trying = False  # it is under way
        self._generation = 0
        self._epoch = 0

        self._retired_uses = 0
        self._opened = 0
        self._open_failures = 0
        self._exhausted = 0
        self._closed_for: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._last_error: BaseException | None = None

        if budget is not None:
            budget.join(self)
        self._set_lanes()

    # The fast lanes. A driver's acquire may pop `_lane_out` and note what it lends as `_latest`; its release may append
    # to `_warm` what is `_latest`, or anything while `_lane_in` is open. A driver's block may pop `_lane_with`, if it
    # does not note that as `_latest`. As long as they are open, that is all there is
    # to decide. When there is more (a waiter to serve, a reset to run, a check to make each time) they are shut, and
    # the driver comes here. `_latest` needs no test of its own: nothing is lent through `_lane_out` while `_lane_in` is
    # shut. `_brimful` is the lane to the end of the queue: whoever comes while others wait, all slots are taken by
    # members, no number of waiters is too many, nobody notes who borrows and no budget has a say, waits behind them.

    def _set_lanes(self) -> None:
        full = len(self._members) >= self._max_connections
        crowded = len(self._members) > self._max_connections
        self._plain = not self._resets and not self._records
        # Whether what comes back may have to go: `give` looks closer.
        looks = self._limits.max_uses is not None or self._budget is not None
        self._stern = bool(self._closed or self._doomed or crowded or looks)
        shut = not self._plain or self._stern or self._always_cold
        reserved = self._fifo or self._paused or self._always_cold or self._records
        self._lane_with: deque[Member[C]] = deque() if reserved else self._warm
        self._lane_out: deque[Member[C]] = deque() if reserved or shut else self._warm
        self._lane_in = not (shut or self._dialled or self._undialled)
        if not self._lane_in:
            self._latest = NOBODY
        self._brimful = self._max_waiting is None and full and not self._records and self._budget is None

    def expect_resets(self) -> None:
        """From now on every release passes through `give`."""
        if not self._resets:
            self._resets = True
            self._set_lanes()

    # Borrowing

    def take(self, wait: bool) -> Member[C] | Place[C] | Sentinel:
        """An idle member; else a place in the queue; `CLOSED`; `BROKEN` where it would be in vain to wait; or
        `EXHAUSTED` where it may not."""
        queue = self._undialled
        if queue and self._brimful and wait:
            place: Place[C] = Place()
            place.member = place.error = place.waiter = place.waking = None
            place.reserved = False
            place.turn = self._turn = self._turn + 1
            place.queue = queue
            queue.append(place)
            return place
        if (self._warm or self._cold) and not self._paused:
            member = self._pop_idle()
            member.uses += 1
            member.holder = BY_HAND
            return member
        if self._closed:
            return CLOSED
        if self._broken and not (self._members or self._paused or self._may_dial()):
            return BROKEN
        if not wait:
            return EXHAUSTED
        # With the slots that are being emptied.
        room = self._max_connections - len(self._members) - self._dialling
        if self._paused or (self._budget is not None and not self._budget.makes_room()):
            room = 0
        if self._broken:
            room = min(room, int(self._may_dial()))
        reserved = queue.length < room
        if self._max_waiting is not None and not reserved and queue.length - max(0, room) >= self._max_waiting:
            return EXHAUSTED
        if self._budget is None:
            place = new_place(reserved)
            place.turn = self._turn = self._turn + 1
        else:
            place = new_place()  # the budget has a unit for it only when it says so
            place.turn = self._budget.next_turn()
        queue.join(place)
        self._set_lanes()
        return place

    def retake(self, wait: bool, turn: int = 0) -> Member[C] | Place[C] | Sentinel:
        """As `take`, for one whose connection turned out dead before he had it: he keeps his turn; 0 if he had not had
        to wait, and comes before all who do."""
        if self._closed:
            return CLOSED
        if not self.waiting and self.idle and not self._paused:
            return self.take(wait)
        if not wait:
            return EXHAUSTED
        place = new_place(not self._paused and self._has_room())
        if not turn:
            turn = self._early = self._early + 1 if self._budget is None else self._budget.early_turn()
        place.turn = turn
        self._requeue(place)
        return place

    def give(self, member: Member[C]) -> Place[C] | Sentinel | None:
        """Take back what was lent. Answers the place that has it now and must be woken, None if it idles, or `RETIRED`
        if it must be closed."""
        if self._stern:
            reason = self._verdict(member)
            if reason is not None:
                self.retire(member, reason)
                return RETIRED
        queue = self._dialled or self._undialled
        if not queue or self._paused:
            member.holder = None
            budget = self._budget
            if member.cold and not self._always_cold:  # nobody has touched it
                self._cold[member] = None
                if budget is not None:
                    budget.has_idle(self, member)
            else:
                member.cold = self._always_cold
                self._warm.append(member)
                if budget is not None:
                    member.idles = budget.turn = budget.turn + 1
                    if self._idler is None:
                        budget.has_idle(self, member)
            return None
        place = queue.popleft()
        place.queue = None
        if queue.left:
            queue.tidy()
        place.member = member
        member.holder = place
        member.uses += 1
        if not queue and not self.waiting:
            self._set_lanes()
        return place

    def _verdict(self, member: Member[C]) -> str | None:
        """Why it must go instead of coming back."""
        if self._closed:
            return "closed"
        if member.fate is not None:
            return member.fate
        if self._limits.max_uses is not None and member.uses >= self._limits.max_uses:
            return "expired"
        if len(self._members) > self._max_connections:
            return "shrunk"
        budget = self._budget
        if budget is not None and (budget.claims or budget.taken > budget.max_total):
            queue = self._dialled or self._undialled
            if budget.must_go(queue[0].turn if queue and not self._paused else NO_TURN):
                return "evicted"
        return None

    def abandon(self, place: Place[C]) -> Member[C] | None:
        """Leave the queue. Answers what was granted in the meantime and must now be used or given back."""
        member = place.member
        if member is not None:
            place.member = None
            member.uses -= 1
            member.holder = BY_HAND
            return member
        if place.queue is None:
            return None
        place.queue.leave(place)
        if not self.waiting:
            self._set_lanes()
        return None

    # Dialling

    def permit(self) -> Place[C] | None:
        """A permit to dial for the first waiter who has none, if there is room for one more."""
        if self.first_claim() is None:
            return None
        if self._budget is not None and not self._budget.grants(self, self._undialled[0].turn):
            return None
        place = self._undialled.first()
        place.reserved = True
        self._dialled.join(place)
        self._dials()
        return place

    def permit_unasked(self) -> bool:
        """A permit to dial though nobody waits for it."""
        if self._closed or not self._may_dial() or (self._budget is not None and not self._budget.spares()):
            return False
        self._dials()
        return True

    def _dials(self) -> None:
        self._dialling += 1
        self._trying, self._trial = self._broken, False

    def permit_spare(self) -> bool:
        """A permit to dial for the stock of idle connections, where it is short of `min_idle`."""
        if self._resting or self._paused:
            return False
        short = self._min_idle + self.waiting - self._dialling - self.idle
        if short > 0:  # what is being looked at idles but for that
            short -= sum(member.holder is INSPECTED for member in self._members.values())
        return short > 0 and self.permit_unasked()

    def knows(self, connection: C) -> bool:
        """Whether this very object is in the pool, or being opened or closed by it."""
        return id(connection) in self._members or id(connection) in self._claimed

    def claim(self, connection: C) -> None:
        """The factory returned this object, and it is being opened now."""
        self._claimed[id(connection)] = connection

    def disclaim(self, connection: C) -> None:
        """It is open, or will never be."""
        self._claimed.pop(id(connection), None)

    def opened(
        self, connection: C, generation: int = 0, retire_at: float = NEVER, look_at: float = NEVER
    ) -> Place[C] | Sentinel | None:
        """A dial succeeded: a permit is redeemed. Answers as `give` does.

        :param generation: the pool's when the dial began.
        :param look_at: when `audit` must look at it first.
        """
        self._dialling -= 1
        self._opened += 1
        self._last_error = None
        self._resting = False
        self._setbacks = self._strikes = self._trips = 0
        self._broken = self._trial = self._trying = False
        member = self._members[id(connection)] = Member(connection, retire_at)
        member.holder = BY_HAND
        if look_at != NEVER:
            self._look_again(member, look_at)
        if generation != self._generation:
            self._doom(member, "cleared")
        self._set_lanes()
        outcome = self.give(member)
        self._balance()
        return outcome

    def failed(
        self,
        place: Place[C] | None,
        error: BaseException,
        spare: bool = False,
        kept: BaseException | None = None,
        struck: bool = True,
    ) -> Place[C] | None:
        """A dial failed: a permit is redeemed. Answers the place it was started for, with the error and to be woken,
        if that one still waits.

        :param spare: it was for the stock; until `rested` there is no further permit for that.
        :param kept: what is remembered as the last error, if that is not the error itself.
        :param struck: it counts for the breaker; not so if the dial could not even begin, or began before `retire_all`.
        """
        self._dialling -= 1
        if self._budget is not None:
            self._budget.takes_back(closed=False)
        self._open_failures += 1
        self._last_error = kept or error
        self._strikes += struck
        if not struck:
            self._trial, self._trying = self._trial or self._trying, False
        elif self._break_after is not None and self._strikes >= self._break_after:
            if not self._broken or self._trial or self._trying:
                self._trips += 1
            self._broken = True
            self._trial = self._trying = False
            for each in self._undialled:
                each.reserved = False
            self._unsettled = True
        if spare and not self._resting:
            self._resting = True
            self._setbacks += 1
        self._lower_ceiling()
        if place is not None and place.queue is self._dialled:
            place.queue.leave(place)
            place.error = error
            self._set_lanes()
            return place
        self._balance()
        return None

    def rested(self) -> None:
        """The stock may be dialled for again."""
        self._resting = False

    def half_open(self) -> None:
        """The breaker lets one dial pass. If it succeeds, it lets all pass again."""
        self._trial = self._broken
        self._trying = False

    def hopeless(self) -> list[Place[C]]:
        """Who waits in vain: the breaker lets nothing pass, and there is nothing that could come back. They leave the
        queue, and must be told. Whose dial is under way has it still before him."""
        if not self._broken or self._members or self._paused or self._may_dial():
            return []
        places = [*self._undialled]
        self._undialled.clear()
        self._set_lanes()
        return places

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
            if self.idle and not self._paused:
                place.member = other = self._pop_idle()
                other.holder = place
                other.uses += 1
            elif not self._closed:
                self._requeue(place)
        if member.fate is not None:
            member.fate = None
            self._doomed -= 1
        connection = member.connection
        del self._members[id(connection)]
        if isinstance(place, Place) and not self._has_room():
            place.reserved = False
        self._claimed[id(connection)] = connection
        self._unclosed[member] = None
        member.holder = None
        self._closing += 1
        if self._budget is not None:
            self._budget.closes()
        self._closed_for[reason] += 1
        member.reason = reason
        self._retired_uses += member.uses
        self._due.pop(member, None)
        if member is self._latest:
            self._latest = NOBODY
        if self._stern or self._brimful:
            self._set_lanes()
        return place if isinstance(place, Place) and self._closed else None

    def closes(self, member: Member[C]) -> bool:
        """Somebody closes what was retired, from now on; False if somebody does already."""
        if member not in self._unclosed:
            return False
        del self._unclosed[member]
        return True

    def freed(self, connection: C) -> None:
        """Its socket is closed: the slot is free."""
        del self._claimed[id(connection)]
        self._closing -= 1
        if self._budget is not None:
            self._budget.takes_back(closed=True)
        self._lower_ceiling()

    def shut(self) -> tuple[list[Member[C]], list[Place[C]]]:
        """Close the pool. Answers what idled and must be closed, and the places that must be told."""
        self._closed = True
        idle = []
        while self.idle:
            member = self._pop_idle()
            member.holder = BY_HAND
            idle.append(member)
            self.retire(member, "closed")
        places = [*self._dialled, *self._undialled]
        self._dialled.clear()
        self._undialled.clear()
        self._agenda.clear()
        self._due.clear()
        self._set_lanes()
        return idle, places

    def retire_all(self) -> list[Member[C]]:
        """Retire all that was opened, or is being opened: what idles now, the rest as it comes back. Answers what must
        be closed."""
        self._generation += 1
        self.half_open()
        retired = self._retire_idle(self.idle, "cleared")
        granted: list[tuple[int, int, Member[C]]] = []
        for member in self._members.values():
            if isinstance(member.holder, Place) and not self._closed:
                granted.append((member.holder.turn, len(granted), member))
            else:
                self._doom(member, "cleared")
        for _, _, member in sorted(granted, reverse=True):  # not collected yet: they wait on, in the same order
            self.retire(member, "cleared")
            retired.append(member)
        return retired

    def set_cap(self, max_connections: int) -> list[Member[C]]:
        """Another cap. Answers what must be closed: what has idled longest; more goes as it comes back."""
        self._ceiling = max(max_connections, self.total)
        self._max_connections = max_connections
        retired = self._retire_idle(len(self._members) - max_connections, "shrunk")
        room = max_connections - len(self._members) - self._dialling
        for number, place in enumerate(self._undialled):
            if place.reserved and number >= room:
                place.reserved = False
                self._unsettled = True
        self._set_lanes()
        return retired

    def hold(self) -> None:
        """From now on whoever asks waits."""
        self._paused = True
        self._set_lanes()

    def unhold(self) -> list[Place[C]]:
        """No longer so. Answers the places that were granted what idled, and must be woken."""
        self._paused = False
        places: list[Place[C]] = []
        while self.idle and (queue := self._dialled or self._undialled):
            place = queue.first()
            place.member = member = self._pop_idle()
            member.holder = place
            member.uses += 1
            places.append(place)
        self._set_lanes()
        return places

    def forget(self) -> tuple[list[C], list[Place[C]]]:
        """Begin anew without any connection, as the copy of a process must that has all sockets in common with it.
        Answers the connections that are no longer this pool's, and the places that must be told if it is closed; else
        whoever waits goes on waiting, in the same order. A dial or a close of an earlier epoch has nothing to redeem.
        """
        members = list(self._members.values())
        forgotten = [*self._claimed.values(), *(member.connection for member in members)]
        granted = [member.holder for member in members if isinstance(member.holder, Place)]
        queue = sorted([*granted, *self._dialled, *self._undialled], key=lambda place: place.turn)
        if self._budget is not None:
            self._budget.forgets(self.total, self._closing)
        for member in members:
            self._retired_uses += member.uses - isinstance(member.holder, Place)
            member.holder = member.fate = None
        self._members.clear()
        self._unclosed.clear()
        self._claimed.clear()
        self._warm.clear()
        self._cold.clear()
        self._dialled.clear()
        self._undialled.clear()
        self._agenda.clear()
        self._due.clear()
        self._unseen.clear()
        for place in queue:
            place.member = None
            if not self._closed:
                self._undialled.join(place)
        self._dialling = self._closing = self._doomed = 0
        self._ceiling = self._max_connections
        self._resting = self._broken = self._trial = self._trying = False
        self._strikes = self._trips = 0
        self._latest = NOBODY
        self._epoch += 1
        self._set_lanes()
        return forgotten, queue if self._closed else []

    def give_up(self) -> None:
        """Nobody can give back what is lent, since nobody knows this pool any more."""
        if self._budget is not None:
            self._budget.loses(self.in_use)

    def _retire_idle(self, count: int, reason: str) -> list[Member[C]]:
        """What has idled longest first."""
        retired = []
        for _ in range(min(count, self.idle)):
            member = self._cold.popitem(last=False)[0] if self._cold else self._warm.popleft()
            member.holder = BY_HAND
            self.retire(member, reason)
            retired.append(member)
        return retired

    def _doom(self, member: Member[C], reason: str) -> None:
        """Retire what is in use when it comes back."""
        if member.fate is None:
            member.fate = reason
            self._doomed += 1
            self._set_lanes()

    def _lower_ceiling(self) -> None:
        if self._ceiling > self._max_connections:
            self._ceiling = max(self._max_connections, self.total)
        if self._stern:
            self._set_lanes()

    # Idle connections. `_warm` holds those touched since the last `cool`, `_cold` the older ones. So a tick now and
    # then tells which have idled for a while, and neither acquire nor release reads a clock.

    def cool(self, now: float) -> list[Member[C]]:
        """Whatever is idle now has idled for a while if nobody has touched it by the next call. Answers as `unseen`."""
        self._now = now
        for member in self._warm:
            member.cold = True
            member.since = now
            member.stirs = 0
            self._cold[member] = None
        self._unseen += self._warm
        self._warm.clear()
        return self.unseen()

    def unseen(self) -> list[Member[C]]:
        """What has become cold since this was asked last; some of it may be in use by now, or closed."""
        unseen, self._unseen = self._unseen, []
        return unseen

    def inspect(self) -> Member[C] | None:
        """Take out the connection that has idled longest, to give it back or retire it; `inspect` comes to it again
        only after all others."""
        if self._warm:
            self._unseen = self.cool(self._now)  # still
        if not self._cold:
            return None
        member, _ = self._cold.popitem(last=False)
        member.holder = INSPECTED
        return member

    def show_again(self, member: Member[C]) -> None:
        """Have the next `cool` answer it again."""
        self._unseen.append(member)

    def is_cold(self, member: Member[C]) -> bool:
        """Whether it idles, and nobody has touched it for a while."""
        return member in self._cold

    def take_out(self, member: Member[C]) -> bool:
        """Take out this one, if it idles, to give it back by `inspected` or retire it."""
        if member.holder is not None or self._members.get(id(member.connection)) is not member:
            return False
        self._remove_idle(member)
        member.holder = INSPECTED
        return True

    def inspected(self, member: Member[C], first: bool = False) -> Place[C] | Sentinel | None:
        """Give back what `inspect`, `take_out` or `prove` took out. Answers as `give` does.

        :param first: it has idled longest, or near to it; else `inspect` is to come to it last.
        """
        must_go = self._stern and self._verdict(member) is not None
        if must_go or (self.waiting and not self._paused):
            return self.give(member)
        member.holder = None
        member.cold = True
        self._cold[member] = None
        if first:
            self._cold.move_to_end(member, last=False)
        if self._budget is not None:
            self._budget.has_idle(self, member)
        return None

    # What expires. Each member that can is on the agenda once: when its next deadline is due, it is looked at, and not
    # before. So the cost grows with what expires, not with what idles.

    def audit(self, now: float) -> list[Member[C]]:
        """Look at what is due. Answers what is retired and must be closed; what is due for a keepalive is for `prove`
        to tell; what is in use and over its time goes when it comes back."""
        retired = []
        limits = self._limits
        while self._agenda and self._agenda[0][0] <= now:
            _, _, member = heappop(self._agenda)
            if self._members.get(id(member.connection)) is not member:
                continue  # closed meanwhile
            if now >= member.retire_at:
                if member.holder is None:
                    self.retire(member, "expired")
                    retired.append(member)
                else:
                    self._doom(member, "expired")
                continue
            since = member.since if member in self._cold or member.holder is INSPECTED else now
            spared = limits.idles_too_long(since, now)
            if spared and member.holder is None and self.idle > self._min_idle:
                self.retire(member, "idle")
                retired.append(member)
                continue
            proven = max(since, member.proven)
            if limits.is_unproven(proven, now):
                member.proven = proven = now
                self._due[member] = None
            self._look_again(
                member, limits.next_look(member.retire_at, limits.spared(now) if spared else since, proven)
            )
        return retired

    def next_audit(self) -> float:
        """When something is due."""
        return self._agenda[0][0] if self._agenda else NEVER

    def prove(self) -> Member[C] | None:
        """Take out a connection that is due for a keepalive, to give it back by `inspected` or retire it."""
        while self._due:
            member, _ = self._due.popitem(last=False)
            if member.holder is None and member in self._cold:
                del self._cold[member]
                member.holder = INSPECTED
                return member
        return None

    def _look_again(self, member: Member[C], when: float) -> None:
        if len(self._agenda) > 2 * len(self._members) + 16:  # most of it is about members that are gone
            self._agenda = [entry for entry in self._agenda if self._members.get(id(entry[2].connection)) is entry[2]]
            heapify(self._agenda)
        self._tickets += 1
        heappush(self._agenda, (when, self._tickets, member))

    def _pop_idle(self) -> Member[C]:
        if self._fifo:
            return self._cold.popitem(last=False)[0] if self._cold else self._warm.popleft()
        return self._warm.pop() if self._warm else self._cold.popitem()[0]

    def _remove_idle(self, member: Member[C]) -> None:
        if member in self._cold:
            del self._cold[member]
        else:
            self._warm.remove(member)
            member.since = self._now

    # Waiters

    def _requeue(self, place: Place[C]) -> None:
        queue = self._dialled if any(each.turn > place.turn for each in self._dialled) else self._undialled
        ahead = []
        while queue and queue[0].turn < place.turn:
            ahead.append(queue.first())
        for each in (place, *reversed(ahead)):
            queue.join_first(each)
        self._balance()
        self._set_lanes()

    def _balance(self) -> None:
        """A waiter whose dial has ended, or was used up by somebody before him, is without one again."""
        while self._dialled.length > self._dialling:
            place = self._dialled.last()
            if not self._has_room():
                place.reserved = False
                self._unsettled = True
            self._undialled.join_first(place)

    def unreserved(self) -> list[Place[C]]:
        """Who has lost a slot since this was asked last, and may stand there without a limit; and a few others."""
        if not self._unsettled:
            return []
        self._unsettled = False
        return [place for place in self._undialled if not place.reserved]

    # What a budget asks.

    def first_claim(self) -> int | None:
        """The turn of the first waiter who could be dialled for now; None if there is none."""
        return self._undialled[0].turn if self._undialled and not self._paused and self._may_dial() else None

    def claimants(self, turn: int, most: int) -> int:
        """How many waiters who came before that turn could be dialled for now; counted up to `most`."""
        if self.first_claim() is None:
            return 0
        most = min(most, self._max_connecting - self._dialling, self._max_connections - self.total)
        if self._broken:
            most = min(most, 1)
        return sum(place.turn < turn for place in islice(self._undialled, most))

    def longest_idle(self) -> Member[C] | None:
        """What has idled longest."""
        return next(iter(self._cold), None) or (self._warm[0] if self._warm else None)

    def _has_room(self) -> bool:
        """Whether there is a slot for one more, one that is being emptied included, and it is this pool's to say."""
        return self._budget is None and not self._broken and len(self._members) + self._dialling < self._max_connections

    def _may_dial(self) -> bool:
        if self._broken and not self._trial:
            return False
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
        return self._dialled.length + self._undialled.length

    def is_empty(self) -> bool:
        """Whether there is nothing to look after: no connection, no waiter, none wanted, the breaker does not wait for
        its time, and the pool is not paused."""
        waits = self._broken and not (self._trial or self._trying)
        return not (self.total or self.waiting or self._min_idle or waits or self._resting or self._paused)

    def faults(self) -> list[str]:
        """Which invariants are broken: none, ever. For tests and for who debugs a driver."""
        members = self._members.values()
        idle = [*self._warm, *self._cold]
        waiters = [*self._dialled, *self._undialled]
        lanes = self._lane_in
        rules: dict[str, bool] = {
            "an idle connection, and somebody waits": not (idle and waiters) or self._paused,
            "somebody waits without a dial that could run": not self._undialled
            or self._closed
            or self._paused
            or self._budget is not None
            or not self._may_dial(),
            "more connections than max_connections": self.total <= self._ceiling,
            "doomed members are miscounted": self._doomed == sum(member.fate is not None for member in members),
            "an idle connection is doomed": not any(member.fate for member in idle),
            "too many connections, and some idle": not idle or len(self._members) <= self._max_connections,
            "more dials than max_connecting": 0 <= self._dialling <= self._max_connecting,
            "more waiters were promised a dial than dials run": self._dialled.length <= self._dialling,
            "closed, and something idles or waits": not self._closed or not (idle or waiters),
            "idle connections and holders disagree": {id(m) for m in idle} == {id(m) for m in members if not m.holder},
            "a connection idles twice": len(idle) == len(set(map(id, idle))),
            "one who has left is first in the queue, or they are miscounted": all(
                (bool(queue) == bool(queue.length)) and queue.length == len([*queue])
                for queue in (self._dialled, self._undialled)
            ),
            "a waiter has his answer": all(p.member is None and p.error is None for p in waiters),
            "a warm connection is cold": self._always_cold or not any(m.cold for m in self._warm),
            "the lane for releases is open though there is more to decide": not lanes or not (waiters or self._closed),
            "the lane to the queue is open though there is more to decide": not self._brimful
            or (len(self._members) >= self._max_connections and self._max_waiting is None and not self._records),
            "a grant and its place disagree": all(m.holder.member is m for m in members if isinstance(m.holder, Place)),
            "something gone is due": all(self._members.get(id(m.connection)) is m for m in self._due),
            "the lane for loans is open though there is more to decide": self._lane_out is not self._warm
            or not (self._paused or self._fifo or self._stern or self._always_cold or not self._plain),
            "the lane for blocks is open though there is more to decide": self._lane_with is not self._warm
            or not (self._paused or self._fifo or self._always_cold or self._records),
            "the ceiling is below max_connections": self._ceiling >= self._max_connections,
            "broken, and somebody waits in vain": not (self._broken and self._undialled)
            or bool(self._members or self._paused or self._may_dial()),
            "less than nothing is being closed": self._closing >= 0,
            "the latest is no member": self._latest is NOBODY or self._latest in members,
            "the latest could be released though there is more to decide": lanes or self._latest is NOBODY,
        }
        return [what for what, holds in rules.items() if not holds]

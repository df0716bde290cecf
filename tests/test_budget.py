"""The decisions about a cap over several pools: no runtime, no socket, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gsocketpool.budget import Budget
from gsocketpool.core import BROKEN, BY_HAND, RETIRED, Core, Member, Place
from tests.test_core import Thing, lent, member, place, queued

T = TypeVar("T")


def pools(budget: Budget, count: int = 2, cap: int = 10, **more: Any) -> list[Core[Thing]]:
    return [Core(cap, max_connecting=more.pop("max_connecting", 10), budget=budget, **more) for _ in range(count)]


def share_out(budget: Budget) -> list[tuple[Core[Thing], Any]]:
    """As a driver does after each event: the permits and the closings that come of it."""
    done: list[tuple[Core[Thing], Any]] = []
    while (pool := budget.next_to_dial()) is not None:
        permitted = pool.permit()
        assert permitted is not None
        done.append((pool, permitted))
    while (found := budget.next_to_close()) is not None:
        done.append(found)
    return done


def dialled(pool: Core[Thing]) -> Member[Thing]:
    """One that was dialled for somebody who waits, and who has it now."""
    waiter = place(pool.take(wait=True))
    assert pool.permit() is waiter
    assert pool.opened(Thing()) is waiter
    return collected(waiter)


def collected(waiter: Place[Thing]) -> Member[Thing]:
    assert waiter.member is not None
    waiter.member.holder = BY_HAND
    return waiter.member


def test_g1_no_more_sockets_than_the_budget_has_whichever_pool_they_belong_to() -> None:
    budget = Budget(3)
    one, other = pools(budget)
    for pool in (one, one, other):
        dialled(pool)
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    assert (budget.used, share_out(budget), waiter.reserved) == (3, [], False)
    assert budget.faults() == []


def test_what_has_idled_longest_in_any_pool_makes_room() -> None:
    budget = Budget(3)
    one, other, third = pools(budget, 3)
    first, second, last = dialled(one), dialled(other), dialled(one)
    for pool, each in ((other, second), (one, first), (one, last)):
        assert pool.give(each) is None
    waiter = place(third.take(wait=True))
    assert third.permit() is None
    assert share_out(budget) == [(other, second)]
    assert share_out(budget) == []  # not one more
    assert other._closed_for["evicted"] == 1
    assert other.closes(second)
    other.freed(second.connection)
    assert share_out(budget) == [(third, waiter)]
    assert budget.faults() == []


def test_with_none_idle_a_connection_that_comes_back_is_closed_for_who_waits_elsewhere() -> None:
    budget = Budget(1)
    one, other = pools(budget)
    busy = dialled(one)
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    assert one.give(busy) is RETIRED
    one.freed(busy.connection)
    assert share_out(budget) == [(other, waiter)]
    assert budget.faults() == []


def test_g5_who_was_there_first_is_served_first_in_whichever_pool() -> None:
    budget = Budget(2)
    one, other = pools(budget)
    busy = [dialled(one), dialled(one)]
    early, late, latest = place(other.take(wait=True)), place(one.take(wait=True)), place(one.take(wait=True))
    assert (other.permit(), one.permit()) == (None, None)
    assert one.give(busy[0]) is RETIRED  # for `early`
    assert one.give(busy[1]) is late  # since `early` has what he needs
    one.freed(busy[0].connection)
    assert share_out(budget) == [(other, early)]
    assert latest.member is None
    assert budget.faults() == []


def test_who_waits_only_for_his_own_full_pool_stands_in_nobody_s_way() -> None:
    budget = Budget(3)
    full, other = pools(budget, cap=1)
    busy, idle = dialled(full), dialled(other)
    queued(full, 2)
    assert full.permit() is None
    assert other.give(idle) is None
    assert other.take(wait=True) is idle
    assert other.give(idle) is None
    assert (share_out(budget), budget.faults()) == ([], [])
    assert isinstance(full.give(busy), Place)


def test_a_paused_pool_s_waiters_claim_nothing() -> None:
    budget = Budget(1)
    one, other = pools(budget)
    busy = dialled(one)
    other.hold()
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    assert one.give(busy) is None
    assert share_out(budget) == []
    assert other.unhold() == []
    assert other.permit() is None
    assert share_out(budget) == [(one, busy)]
    one.freed(busy.connection)
    assert share_out(budget) == [(other, waiter)]


def test_the_stock_takes_what_nobody_waits_for_and_gives_way_to_who_waits() -> None:
    budget = Budget(2)
    stocked, other = pools(budget, min_idle=2)
    assert (stocked.permit_spare(), stocked.permit_spare()) == (True, True)
    for _ in range(2):
        assert stocked.opened(Thing()) is None
    other._min_idle = 0
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    (evicted,) = share_out(budget)
    assert evicted[0] is stocked
    assert not stocked.permit_spare()  # that unit is promised
    stocked.freed(evicted[1].connection)
    assert not stocked.permit_spare()
    assert share_out(budget) == [(other, waiter)]


def test_a_dial_that_fails_gives_its_unit_to_who_is_next() -> None:
    budget = Budget(1)
    one, other = pools(budget)
    first = place(one.take(wait=True))
    assert one.permit() is first
    second = place(other.take(wait=True))
    assert other.permit() is None
    assert one.failed(first, OSError()) is first
    assert share_out(budget) == [(other, second)]


def test_less_is_reached_as_connections_come_back_and_more_serves_at_once() -> None:
    budget = Budget(3)
    one, other = pools(budget)
    busy, idle, third = dialled(one), dialled(one), dialled(other)
    one.give(idle)
    budget._max_total = 1  # as `resize` does
    assert share_out(budget) == [(one, idle)]
    assert other.give(third) is RETIRED
    one.freed(idle.connection)
    other.freed(third.connection)
    assert (budget.used, one.give(busy)) == (1, None)
    member(one.take(wait=True))
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    budget._max_total = 2
    assert share_out(budget) == [(other, waiter)]


def test_a_pool_that_is_forgotten_in_a_fork_has_no_units() -> None:
    budget = Budget(2)
    one, other = pools(budget)
    dialled(one)
    one.retire(dialled(one), "dropped")
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    one.forget()
    other.forget()
    assert (budget.used, budget._closing) == (0, 0)
    assert share_out(budget) == [(other, waiter)]


def test_a_pool_that_is_gone_with_connections_lent_gives_their_units_back() -> None:
    budget = Budget(2)
    one, other = pools(budget)
    dialled(one)
    one.give_up()
    del one
    assert (budget.used, len(budget._pools)) == (0, 1)
    assert budget.faults() == []
    dialled(other)


class Elsewhere:
    """A limit that is kept elsewhere."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.fails = False

    def take(self) -> bool:
        if self.fails:
            raise OSError("its keeper is away")
        if not self.left:
            return False
        self.left -= 1
        return True

    def give_back(self) -> None:
        self.left += 1
        if self.fails:
            raise OSError("its keeper is still away")


def test_a_limit_kept_elsewhere_is_asked_for_each_unit_and_told_of_each_that_is_free() -> None:
    quota = Elsewhere(1)
    budget = Budget(5, quota=quota)
    one, other = pools(budget)
    busy = dialled(one)
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    assert (share_out(budget), budget.used, quota.left) == ([], 1, 0)
    assert one.give(busy) is RETIRED  # it is not for this process to have more
    one.freed(busy.connection)
    assert quota.left == 1
    assert share_out(budget) == [(other, waiter)]
    assert quota.left == 0
    second = place(one.take(wait=True))
    assert one.permit() is None
    quota.left = 1
    budget._dry = False  # as `replenished` does
    assert share_out(budget) == [(one, second)]


def test_a_limit_kept_elsewhere_that_fails_has_no_unit_and_costs_nobody_anything_else() -> None:
    quota = Elsewhere(2)
    budget = Budget(5, quota=quota)
    one, other = pools(budget)
    busy = dialled(one)
    quota.fails = True
    waiter = place(other.take(wait=True))
    assert other.permit() is None
    assert (str(budget.last_error), budget.used) == ("its keeper is away", 1)
    assert one.give(busy) is RETIRED
    one.freed(busy.connection)
    assert (str(budget.last_error), budget.used) == ("its keeper is still away", 0)
    assert (other.permit(), share_out(budget)) == (None, [])
    quota.fails = False
    budget._dry = False  # as `replenished` does
    assert share_out(budget) == [(other, waiter)]


def test_a_quota_without_its_methods_is_refused() -> None:
    class Half:
        def take(self) -> bool:
            return True

    with pytest.raises(TypeError, match=r"quota must have a method give_back\(\): Half has none"):
        Budget(1, quota=Half())  # type: ignore[arg-type]


def test_who_waits_at_a_broken_endpoint_claims_no_unit() -> None:
    budget = Budget(1)
    one, broken = pools(budget, break_after=1)
    waiter = place(broken.take(wait=True))
    assert broken.permit() is waiter
    assert broken.failed(waiter, OSError()) is waiter
    assert broken.take(wait=True) is BROKEN
    busy = dialled(one)
    assert one.give(busy) is None
    broken.half_open()
    trial = place(broken.take(wait=True))
    assert broken.permit() is None
    assert share_out(budget) == [(one, busy)]
    one.freed(busy.connection)
    assert share_out(budget) == [(broken, trial)]


@pytest.mark.parametrize("value", [0, -1])
def test_a_wrong_max_total_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="max_total must be at least 1"):
        Budget(value)
    with pytest.raises(TypeError, match="max_total must be an int"):
        Budget("10")  # type: ignore[arg-type]


class World:
    """Some pools under one budget, and all that may happen to them; after each step, what a driver does."""

    def __init__(self, number: Callable[[int], int]) -> None:
        self.number = number
        self.limit = self.pick(range(1, 7))
        self.budget = Budget(self.limit)
        self.pools: list[Core[Thing]] = [
            Core(
                self.pick(range(1, 5)),
                max_connecting=self.pick([1, 2, 3]),
                min_idle=self.pick([0, 0, 0, 1]),
                fifo=self.pick([False, False, True]),
                break_after=self.pick([None, None, 2]),
                max_waiting=self.pick([None, None, None, 2]),
                budget=self.budget,
            )
            for _ in range(self.pick(range(1, 5)))
        ]
        self.lent: list[tuple[Core[Thing], Member[Thing]]] = []
        self.inspected: list[tuple[Core[Thing], Member[Thing]]] = []
        self.waiting: list[tuple[Core[Thing], Place[Thing]]] = []
        self.dials: list[tuple[Core[Thing], Place[Thing] | None, bool]] = []
        self.closing: list[tuple[Core[Thing], Member[Thing]]] = []
        self.stirred: set[Core[Thing]] = set()  # something there idles on that was out, and that nobody has touched
        self.turns: dict[Member[Thing], int] = {}  # of who has it
        self.clock = 0.0

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]

    def any(self, things: list[T]) -> T | None:
        return things.pop(self.number(len(things))) if things else None

    # Deeds

    def borrow(self) -> None:
        pool = self.pick(self.pools)
        wanted = self.budget.must_go(2**62)
        found = pool.take(wait=self.pick([True, True, True, False]))
        if isinstance(found, Member):
            assert not wanted, "it was lent to who came last"
            self.lent.append((pool, found))
            self.turns[found] = 0
        elif isinstance(found, Place):
            self.waiting.append((pool, found))

    def give_back(self) -> None:
        if (each := self.any(self.lent)) is not None:
            pool, given = each
            first = self.first()
            on_the_way = self.units_on_the_way()
            if given.cold:
                self.stirred.add(pool)
            outcome = pool.give(given)
            if outcome is RETIRED:
                self.closing.append(each)
            elif isinstance(outcome, Place) and first is not None and on_the_way <= 0:
                assert outcome.turn <= first, "somebody else was there before, and has nothing on the way"

    def first(self) -> int | None:
        """The first of all who need a unit, as anybody can see."""
        turns = [pool._undialled[0].turn for pool in self.pools if pool.first_claim() is not None]
        return min(turns, default=None)

    def units_on_the_way(self) -> int:
        return self.budget.max_total - sum(pool.total - pool._closing for pool in self.pools)

    def reject(self) -> None:
        if (each := self.any(self.lent)) is not None:
            pool, dead = each
            pool.reject(dead)
            self.closing.append(each)
            again = pool.retake(True, self.turns.get(dead, 0))
            if isinstance(again, Place):
                self.waiting.append((pool, again))
            elif isinstance(again, Member):
                self.lent.append((pool, again))
                self.turns[again] = 0

    def leave(self) -> None:
        if (each := self.any(self.waiting)) is not None:
            pool, leaving = each
            unused = pool.abandon(leaving)
            if unused is not None:
                self.lent.append((pool, unused))
                self.turns[unused] = leaving.turn
                self.stirred.add(pool)

    def dial_ends(self) -> None:
        if (each := self.any(self.dials)) is not None:
            pool, waiter, spare = each
            if self.pick([True, True, False]):
                thing = Thing()
                if pool.opened(thing, self.pick([pool._generation, pool._generation, -1])) is RETIRED:
                    (gone,) = [each for each in pool._unclosed if each.connection is thing]
                    self.closing.append((pool, gone))
            else:
                told = pool.failed(waiter, OSError(), spare)
                if told is not None:
                    told.error = None
                    self.waiting = [(one, each) for one, each in self.waiting if each is not told]

    def close_ends(self) -> None:
        if (each := self.any(self.closing)) is not None:
            pool, closed = each
            assert pool.closes(closed)
            pool.freed(closed.connection)

    def drop(self) -> None:
        pool = self.pick(self.pools)
        if pool._members:
            dropped = self.pick(list(pool._members.values()))
            self.lent = [each for each in self.lent if each[1] is not dropped]
            self.inspected = [each for each in self.inspected if each[1] is not dropped]
            pool.retire(dropped, "dropped")
            self.closing.append((pool, dropped))

    def tick(self) -> None:
        pool = self.pick(self.pools)
        self.clock += 1
        pool.cool(self.clock)
        pool.rested()
        if pool._broken and self.pick([True, False]):
            pool.half_open()

    def inspect(self) -> None:
        pool = self.pick(self.pools)
        found = pool.inspect()
        if found is not None:
            self.inspected.append((pool, found))
            self.stirred.add(pool)

    def inspected_ends(self) -> None:
        if (each := self.any(self.inspected)) is not None:
            pool, found = each
            if pool.inspected(found, first=self.pick([True, False])) is RETIRED:
                self.closing.append(each)

    def clear(self) -> None:
        if self.pick([True, False, False, False]):
            pool = self.pick(self.pools)
            self.closing += [(pool, each) for each in pool.retire_all()]

    def pause(self) -> None:
        pool = self.pick(self.pools)
        if pool._paused:
            pool.unhold()
        elif self.pick([True, False, False]):
            pool.hold()

    def resize(self) -> None:
        pool = self.pick(self.pools)
        if self.pick([True, False]):
            self.closing += [(pool, each) for each in pool.set_cap(self.pick(range(1, 5)))]
        else:
            self.limit = self.pick(range(1, 7))
            self.budget._max_total = self.limit

    def fork(self) -> None:
        if self.pick([True, False, False, False, False, False]):
            for pool in self.pools:
                pool.forget()
            self.lent, self.dials, self.closing, self.inspected = [], [], [], []
            # Who had been granted something stands in the queue again.

    DEEDS = (
        borrow,
        borrow,
        borrow,
        give_back,
        give_back,
        reject,
        leave,
        dial_ends,
        dial_ends,
        close_ends,
        close_ends,
        drop,
        tick,
        inspect,
        inspected_ends,
        clear,
        pause,
        resize,
        fork,
    )

    def step(self) -> None:
        before = self.budget.used
        self.pick(self.DEEDS)(self)
        assert self.budget.used <= max(before, self.limit), "more than the budget has"
        self.drive()
        self.look()

    def drive(self) -> None:
        for pool in self.pools:
            while (waiter := pool.permit()) is not None:
                self.dials.append((pool, waiter, False))
            while pool.permit_spare():
                self.dials.append((pool, None, True))
            gone = pool.hopeless()
            self.waiting = [each for each in self.waiting if each[1] not in gone]
        while (pool_ := self.budget.next_to_dial()) is not None:
            waiter = pool_.permit()
            assert waiter is not None
            assert waiter.turn == min(
                [waiter.turn, *(pool._undialled[0].turn for pool in self.pools if pool.first_claim() is not None)]
            ), "somebody else was there before"
            self.dials.append((pool_, waiter, False))
        while (found := self.budget.next_to_close()) is not None:
            pool, evicted = found
            # What idles on stands at another end of its pool's line: then that pool's oldest is not exactly that.
            ages = [each.longest_idle() for each in self.pools if each not in self.stirred]
            assert pool in self.stirred or all(evicted.idles <= each.idles for each in ages if each is not None)
            self.closing.append((pool, evicted))
        for pool, waiter in list(self.waiting):
            if waiter.member is not None:  # collects
                self.waiting.remove((pool, waiter))
                self.lent.append((pool, waiter.member))
                self.turns[waiter.member] = waiter.turn
                waiter.member.holder = BY_HAND
                waiter.member = None

    def look(self) -> None:
        assert self.budget.faults() == []
        for pool in self.pools:
            assert pool.faults() == []
        assert self.budget.used == len(self.dials) + len(self.closing) + sum(pool.size for pool in self.pools)
        lent = sum(len(each) for each in (self.lent, self.inspected))
        assert sum(pool.in_use for pool in self.pools) == lent
        assert {id(each) for _, each in self.waiting} == {
            id(each) for pool in self.pools for each in (*pool._dialled, *pool._undialled)
        }
        claims = [pool for pool in self.pools if pool.first_claim() is not None]
        if self.units_on_the_way() < sum(pool.claimants(2**62, 99) for pool in claims):
            assert not any(pool.idle for pool in self.pools), "something idles, and somebody waits for a unit"

    def ends(self) -> None:
        """However it went, everybody can be served afterwards."""
        while self.dials or self.closing or self.waiting or self.lent or self.inspected:
            for pool in self.pools:
                if pool._paused:
                    pool.unhold()
                pool.half_open()
            size = len(self.dials) + len(self.closing) + len(self.waiting) + len(self.lent) + len(self.inspected)
            for deed in (self.dial_ends, self.close_ends, self.give_back, self.inspected_ends):
                deed()
                self.drive()
                self.look()
            assert size


@settings(max_examples=300, stateful_step_count=60)
class AnyOrderOfEvents(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.world = World(random.Random(seed).randrange)

    @rule()
    def step(self) -> None:
        self.world.step()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.ends()


# Not measured by coverage, which would take as long again several times: it goes over the same lines for ever.
TestAnyOrderOfEvents = pytest.mark.no_cover(AnyOrderOfEvents.TestCase)


@pytest.mark.no_cover
def test_any_order_of_events_on_long_random_walks(rng: random.Random) -> None:
    for _ in range(60):
        world = World(random.Random(rng.random()).randrange)
        for _ in range(400):
            world.step()
        world.ends()
    assert lent(Core(1, max_connecting=1)).uses == 1

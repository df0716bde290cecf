"""One cap over many endpoints, seen from their servers: kills at every switch point, storms, turns, and limits that are
shared in other ways.

The method is that of `test_kills`: each scenario runs once to count the switch points of its victim, then once for each
of them, each way to strike and each thing to strike with. After each run the invariants of the budget and of all pools
hold, the servers together never saw more sockets than `max_total`, as many borrowers are served at once, whichever
endpoints they ask for, and after ``group.close()`` no server has a socket left.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import random
import socket as std_socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import gevent
import gevent.os
import pytest
from gevent import subprocess
from gevent.event import Event

from gsocketpool import BreakerOpenError, Budget, Pool, PoolError, PoolExhaustedError, PoolGroup
from tests.knife import ASLEEP, WAKING, Knife
from tests.servers import LineEchoServer, refused_port
from tests.test_kills import THROWN, Line, SlowToCheck, SlowToClose, SlowToOpen, SlowToReset

BOUND = 10.0

#: One endpoint may have so many sockets, and all together so many.
CAP = 2
TOTAL = 3


class Street:
    """Servers whose sockets are counted together."""

    def __init__(self, count: int) -> None:
        self.houses = [House(self) for _ in range(count)]
        self.most = 0

    def __enter__(self) -> Street:
        self._stack = contextlib.ExitStack()
        for house in self.houses:
            self._stack.enter_context(house)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def open(self) -> int:
        return sum(house.counted() for house in self.houses)

    def wait_all_closed(self) -> None:
        for house in self.houses:
            house.wait_open(0)


class House(LineEchoServer):
    """A server in a street."""

    def __init__(self, street: Street) -> None:
        super().__init__()
        self._street = street

    @property
    def open(self) -> int:
        """Asked whenever one has been accepted: a look at the whole street, then."""
        self._street.most = max(self._street.most, self._street.open)
        return self.counted()

    def counted(self) -> int:
        return super().open


def wait_for(happened: Callable[[], bool], what: str) -> None:
    """Let others run until it has happened; fail if it does not."""
    with gevent.Timeout(BOUND, AssertionError(f"not in {BOUND} s: {what}")):
        for turn in itertools.count():
            if happened():
                return
            gevent.sleep(
                0.001 if turn > 20 else 0
            )  # a hub with callbacks to run looks at its sockets now and then only


def look(budget: Budget, pools: Iterable[Pool[Any]]) -> None:
    """No invariant is broken."""
    assert budget.faults() == []
    for pool in pools:
        assert pool.faults() == [], pool


def settle(budget: Budget, pools: Iterable[Pool[Any]]) -> None:
    """No dial and no close is under way any more, and nothing was lost."""
    pools = list(pools)
    wait_for(lambda: all(pool.total == pool.size for pool in pools), "all dials and closes are done")
    look(budget, pools)
    assert budget.used == sum(pool.size for pool in pools)
    assert sum(pool.waiting for pool in pools) == 0


class Town:
    """Servers, a group, bystanders who use it, and a victim."""

    def __init__(self, knife: Knife, street: Street, kind: type[Line], victim_does: str, **options: Any) -> None:
        self.knife = knife
        self.street = street
        self.victim_does = victim_does
        self.expired = False
        self.asked = 0
        self.aiming = True
        kind = type(kind.__name__, (kind,), {"world": self})
        settings: dict[str, Any] = {"max_connections": CAP, "max_total": TOTAL, **options}
        self.group: PoolGroup[Line] = PoolGroup(kind, **settings)
        assert self.group.budget is not None
        self.budget = self.group.budget
        self.pools: list[Any] = [self.group.pool(host="127.0.0.1", port=house.port) for house in street.houses]
        self.letting_go = Event()

    def aim(self, doing: str) -> None:
        if self.victim_does == doing and self.aiming:
            self.knife.aim()

    def text(self) -> str:
        self.asked += 1
        return f"line {self.asked}"

    def borrow(self, number: int, timeout: float | None = BOUND) -> None:
        with self.group.connection(timeout, host="127.0.0.1", port=self.street.houses[number].port) as connection:
            connection.ask(self.text())

    def hold(self, *numbers: int) -> list[gevent.Greenlet[..., None]]:
        """Borrow from each of these until `letting_go`, and wait until all have what they want."""
        entered: list[int] = []

        def keep(number: int) -> None:
            with self.pools[number].connection(timeout=BOUND) as connection:
                entered.append(number)
                assert self.letting_go.wait(BOUND), "nobody let go"
                try:
                    connection.ask(self.text())
                except OSError:
                    if not self.group.closed:  # under its hands, maybe
                        raise

        holding = [gevent.spawn(keep, number) for number in numbers]
        wait_for(lambda: len(entered) == len(numbers) or any(each.ready() for each in holding), "all hold one")
        return holding

    def stock(self, *numbers: int) -> None:
        """Have as many idle connections."""
        holding = self.hold(*numbers)
        self.letting_go.set()
        gevent.joinall(holding, raise_error=True)
        self.letting_go.clear()
        assert [pool.idle for pool in self.pools] == [numbers.count(number) for number in range(len(self.pools))]

    def bystander(self, *numbers: int) -> gevent.Greenlet[..., None]:
        """Somebody who borrows from one after the other."""

        def use() -> None:
            for number in numbers:
                try:
                    self.borrow(number)
                except (PoolError, OSError, gevent.Timeout):
                    # What befell a dial is told to the borrower for whom it was made, and to nobody else.
                    if not self.group.closed and self.victim_does != "open":
                        raise

        return gevent.spawn(use)

    def lets_go_when_somebody_waits(self, victim: gevent.Greenlet[..., None]) -> gevent.Greenlet[..., None]:
        def watch() -> None:
            wait_for(lambda: self.group.stats().waiting > 0 or self.group.closed or victim.ready(), "somebody waits")
            self.letting_go.set()

        return gevent.spawn(watch)

    def serves(self, *numbers: int) -> None:
        """All these at once."""
        assert not self.letting_go.is_set()
        holding = self.hold(*numbers)
        assert not any(each.ready() for each in holding), "fewer than max_total are served at once"
        look(self.budget, self.pools)
        self.letting_go.set()
        gevent.joinall(holding, timeout=BOUND, raise_error=True)
        self.letting_go.clear()


Scenario: TypeAlias = Callable[[Town], None]
A, B, C = range(3)


def borrowing(town: Town) -> None:
    town.borrow(A)


def borrowing_again(town: Town) -> None:
    town.borrow(A)
    town.borrow(B)
    town.borrow(C)


def borrowing_two(town: Town) -> None:
    with town.pools[A].connection(timeout=BOUND) as first, town.pools[A].connection(timeout=BOUND) as second:
        first.ask(town.text())
        second.ask(town.text())


def by_the_rule_of_016(town: Town) -> None:
    pool = town.pools[A]
    connection = pool.acquire(retry=100)
    try:
        connection.ask(town.text())
    finally:
        pool.release(connection)


def releasing(town: Town) -> None:
    """While somebody waits elsewhere."""
    pool = town.pools[B]
    connection = pool.acquire(timeout=BOUND)
    try:
        connection.ask(town.text())
    finally:
        pool.release(connection)


def dropping(town: Town) -> None:
    pool = town.pools[B]
    connection = pool.acquire(timeout=BOUND)
    try:
        connection.ask(town.text())
    finally:
        pool.drop(connection)


def clearing(town: Town) -> None:
    town.group.clear()
    town.borrow(A)


def clearing_one(town: Town) -> None:
    town.pools[B].clear()
    town.borrow(A)


def reaping(town: Town) -> None:
    town.expired = True
    try:
        for pool in town.pools:
            pool.drop_expired()
    finally:
        town.expired = False


def closing(town: Town) -> None:
    town.group.close()


def closing_with_patience(town: Town) -> None:
    town.group.close(timeout=BOUND)


def closing_at_once(town: Town) -> None:
    town.group.close(timeout=0)


def borrowing_what_is_dead(town: Town) -> None:
    town.borrow(B)
    town.borrow(A)


def resizing(town: Town) -> None:
    town.budget.resize(1)
    town.borrow(A)
    town.budget.resize(TOTAL)
    town.borrow(C)


def idle_in(*numbers: int) -> Callable[[Town], list[gevent.Greenlet[..., None]]]:
    def begin(town: Town) -> list[gevent.Greenlet[..., None]]:
        if numbers:
            town.stock(*numbers)
        return []

    return begin


def dead_in(*numbers: int) -> Callable[[Town], list[gevent.Greenlet[..., None]]]:
    def begin(town: Town) -> list[gevent.Greenlet[..., None]]:
        town.stock(*numbers)
        for house in town.street.houses:
            house.hang_up()
        return []

    return begin


def lent_in(*numbers: int) -> Callable[[Town], list[gevent.Greenlet[..., None]]]:
    return lambda town: town.hold(*numbers)


def ready_in_all(town: Town) -> list[gevent.Greenlet[..., None]]:
    for pool in town.pools:
        pool.wait_ready(BOUND)
    return []


Who = tuple[int, ...]
TWO = {"max_connecting": 2}

#: name -> what the victim does, the connection's class, who is the victim, the group's options, what there is before,
#: and from which endpoints each of the bystanders borrows.
SCENARIOS: dict[
    str,
    tuple[Scenario, type[Line], str, dict[str, Any], Callable[[Town], list[gevent.Greenlet[..., None]]], list[Who]],
] = {
    "a borrower for whom what idles elsewhere is closed": (borrowing, SlowToClose, "borrow", {}, idle_in(B, B, C), []),
    "a borrower for whom it is closed, among others": (
        borrowing_again,
        SlowToClose,
        "borrow",
        {},
        idle_in(B, B, C),
        [(A, C), (C, A), (B, A)],
    ),
    "a borrower whose unit comes back elsewhere": (borrowing, SlowToClose, "borrow", {}, lent_in(B, B, C), []),
    "a borrower whose unit comes back, among others": (
        borrowing_again,
        SlowToReset,
        "borrow",
        {},
        lent_in(B, B, C),
        [(A, B), (C, A), (B, B)],
    ),
    "a borrower who dials for the last unit": (borrowing, SlowToOpen, "borrow", {}, lent_in(B, C), [(C,), (B, A)]),
    "a borrower who wants two": (borrowing_two, SlowToClose, "borrow", TWO, idle_in(B, C, C), [(B, C)]),
    "a borrower by the rule of 0.1.6": (by_the_rule_of_016, SlowToClose, "borrow", {}, idle_in(B, B, C), [(C, B)]),
    "a borrower who takes a stock's unit": (
        borrowing_two,
        SlowToClose,
        "borrow",
        {"min_idle": 1},
        ready_in_all,
        [(B, C)],
    ),
    "a borrower who meets dead connections": (
        borrowing_what_is_dead,
        SlowToClose,
        "borrow",
        {"check_after_idle": 0},
        dead_in(B, B, C),
        [(B, A), (C, B)],
    ),
    "a borrower whose connection is checked": (
        borrowing_again,
        SlowToCheck,
        "borrow",
        {"check_after_idle": 0},
        idle_in(A, B, C),
        [(B, A), (C, C)],
    ),
    "whoever releases while others wait elsewhere": (
        releasing,
        SlowToReset,
        "borrow",
        {},
        lent_in(C, C),
        [(A, B), (A, C), (C,)],
    ),
    "whoever drops while others wait elsewhere": (
        dropping,
        SlowToClose,
        "borrow",
        {},
        lent_in(C, C),
        [(A, B), (A, C), (C,)],
    ),
    "whoever clears the group": (clearing, SlowToClose, "borrow", {}, idle_in(B, B, C), [(A, C), (C, B)]),
    "whoever clears an endpoint": (clearing_one, SlowToClose, "borrow", {}, idle_in(B, B, C), [(A, C), (B, B)]),
    "whoever reaps": (reaping, SlowToCheck, "borrow", {}, idle_in(B, B, C), [(A, C), (B, A)]),
    "whoever resizes the budget": (resizing, SlowToClose, "borrow", {}, idle_in(B, B, C), [(A, C), (C, B)]),
    "whoever closes the group": (closing, SlowToClose, "borrow", {}, idle_in(B, B, C), [(A, C), (B, A)]),
    "whoever closes it and waits for what is lent": (
        closing_with_patience,
        SlowToClose,
        "borrow",
        {},
        lent_in(B, B, C),
        [(A, C), (B, A)],
    ),
    "whoever closes it under its borrowers' hands": (
        closing_at_once,
        SlowToClose,
        "borrow",
        {},
        lent_in(B, B, C),
        [(A, C), (B, A)],
    ),
    "the close of what makes room": (borrowing, SlowToClose, "close", {}, idle_in(B, B, C), [(C, A)]),
    "the close of what comes back": (borrowing, SlowToClose, "close", {}, lent_in(B, B, C), [(C, A)]),
    "the dial for which room was made": (borrowing, SlowToOpen, "open", {}, idle_in(B, B, C), [(C, A)]),
    "the dial for the last unit": (borrowing, SlowToOpen, "open", {}, lent_in(B, C), [(C,), (B, A)]),
    "the dial for a stock": (borrowing, SlowToOpen, "open", {"min_idle": 1}, idle_in(), [(C, A), (B, B)]),
}


def run(knife: Knife, name: str) -> None:
    scenario, kind, victim_does, options, begin, others = SCENARIOS[name]
    with Street(3) as street, knife:
        town = Town(knife, street, kind, victim_does, **options)
        town.aiming = False
        holding = begin(town)
        town.aiming = True
        errors: list[BaseException] = []

        def be_the_victim() -> None:
            try:
                scenario(town)
            except AssertionError:
                raise  # a wrong reply
            except BaseException as error:
                errors.append(error)

        victim = gevent.Greenlet(be_the_victim)
        if victim_does == "borrow":
            knife.aim(victim)
        victim.start()
        bystanders = [town.bystander(*who) for who in others]
        everybody = [victim, *bystanders, *holding, town.lets_go_when_somebody_waits(victim)]
        gevent.joinall(everybody, timeout=3 * BOUND, raise_error=True)
        assert all(each.successful() for each in everybody), "somebody was never served"
        look(town.budget, town.pools)
        town.letting_go.clear()

        if knife._point == 0:
            assert errors == []
        if not town.group.closed:
            if town.budget.max_total != TOTAL:
                town.budget.resize(TOTAL)
            if not options.get("min_idle"):
                settle(town.budget, town.pools)
            town.serves(A, A, B)
            town.serves(B, C, C)
            town.serves(A, B, C)
        look(town.budget, town.pools)
        town.group.close()
        street.wait_all_closed()
        settle(town.budget, town.pools)
        assert town.budget.used == 0
        assert street.most <= TOTAL, f"the servers saw {street.most} sockets, the total is {TOTAL}"
        assert all(house.most <= CAP for house in street.houses)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("thrown", THROWN)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
def test_g1_g2_g3_g4_a_kill_at_any_switch_point_costs_no_endpoint_anything(
    name: str, thrown: str, when: str, logged: Any
) -> None:
    count = Knife()
    run(count, name)
    assert count.points > 0, "the scenario has no switch point: it proves nothing"
    strikes = 0
    for point in range(1, count.points + 1):
        knife = Knife(point, when, THROWN[thrown])
        try:
            run(knife, name)
        except BaseException as error:
            raise AssertionError(f"{name}: {thrown} at switch point {point} of {count.points}, {when}") from error
        strikes += knife.struck
    # On a busy machine a reply may be there before it is waited for, and then there is one point less.
    assert strikes >= max(1, count.points - 1)
    assert len(logged.take()) <= strikes  # G12: a dial or a close that was killed is logged once


class Quiet:
    """A world in which nobody is the victim."""

    expired = False

    def aim(self, doing: str) -> None:
        """At nobody."""


def of_its_own(kind: type[Line]) -> type[Line]:
    """The class, for tests in which nobody is the victim."""
    return type(kind.__name__, (kind,), {"world": Quiet()})


def at(house: House) -> dict[str, Any]:
    return {"host": house.host, "port": house.port}


# A storm: whoever comes, is killed or runs out of time, wherever.


class Storm:
    """Many who borrow from all the pools, a third of whom are killed or run out of time."""

    def __init__(self, rng: random.Random, street: Street, budget: Budget, pools: Sequence[Pool[Line]]) -> None:
        self.rng = rng
        self.street = street
        self.budget = budget
        self.pools = pools
        self.begun = self.served = 0
        self.over = False

    def use(self, name: str, short: bool) -> None:
        self.begun += 1
        with contextlib.suppress(gevent.Timeout):  # which somebody threw
            self.take_turns(name, short)

    def take_turns(self, name: str, short: bool) -> None:
        for turn in range(3):
            limit = 0.001 + self.rng.random() * 0.01 if short else None
            try:
                with gevent.Timeout(limit), self.pick().connection(timeout=4 * BOUND) as connection:
                    for part in range(self.rng.randrange(1, 4)):
                        connection.ask(f"{name} {turn} {part}")
                    self.served += 1
            except (PoolError, OSError, gevent.Timeout):
                pass
            gevent.sleep(0)

    def pick(self) -> Pool[Line]:
        return self.rng.choice(self.pools)

    def watch(self) -> None:
        while not self.over:
            look(self.budget, self.pools)
            gevent.sleep(0.001)

    def hang_up(self) -> None:
        while not self.over:
            gevent.sleep(0.001 + self.rng.random() * 0.02)
            self.rng.choice(self.street.houses).hang_up()

    def rage(self, count: int, *more: Callable[[], None], hang_up: bool = True) -> None:
        """Until all have had their turns, or were killed."""
        more = (*more, self.watch, *([self.hang_up] if hang_up else []))
        weather = [gevent.spawn(each) for each in more]
        users = [gevent.spawn(self.use, f"user {number}", number % 6 == 0) for number in range(count)]
        wait_for(lambda: self.begun == count, "all are at it")
        for each in self.rng.sample(users, count // 6):
            gevent.sleep(0.001 + self.rng.random() * 0.003)
            each.kill(gevent.GreenletExit if self.rng.random() < 0.5 else gevent.Timeout(), block=False)
        gevent.joinall(users, timeout=5 * BOUND, raise_error=True)
        assert all(user.ready() for user in users), "somebody is never served"
        self.over = True
        gevent.joinall(weather, timeout=BOUND, raise_error=True)
        assert all(each.successful() for each in weather)

    def afterwards(self, total: int) -> None:
        """Nothing was lost: so many are served at once, shared out at random."""
        settle(self.budget, self.pools)
        assert self.served > 0
        for _ in range(3):
            room = [pool for pool in self.pools for _ in range(pool.stats().max_connections)]
            entered: list[int] = []
            everybody = Event()

            def use(pool: Pool[Line], entered: list[int] = entered, everybody: Event = everybody) -> None:
                connection = patiently(pool)
                try:
                    entered.append(id(connection))
                    if len(entered) == total:
                        everybody.set()
                    assert everybody.wait(BOUND), "fewer than max_total are served at once"
                    connection.ask(f"number {len(entered)}")
                finally:
                    pool.release(connection)

            chosen = self.rng.sample(room, total)
            gevent.joinall([gevent.spawn(use, pool) for pool in chosen], timeout=2 * BOUND, raise_error=True)
            assert len(set(entered)) == total
            settle(self.budget, self.pools)


def patiently(pool: Pool[Line]) -> Line:
    """Borrow, as soon as the breaker and `max_waiting` let it be."""
    with gevent.Timeout(BOUND, AssertionError("nobody is served")):
        while True:
            try:
                return pool.acquire(timeout=BOUND)
            except (PoolExhaustedError, OSError):  # what is known of it is what was, or too many wait already
                gevent.sleep(0.001)


@pytest.mark.parametrize("kind", [SlowToOpen, SlowToClose, SlowToReset])
@pytest.mark.parametrize("breaker", [None, 3])
def test_g1_g3_g4_a_storm_over_many_endpoints(
    kind: type[Line], breaker: int | None, rng: random.Random, logged: Any
) -> None:
    with Street(6) as street:
        group: PoolGroup[Line] = PoolGroup(
            of_its_own(kind), max_connections=4, max_total=8, breaker=breaker, backoff=(0.005, 0.01), check_after_idle=0
        )
        assert group.budget is not None
        pools = [group.pool(**at(house)) for house in street.houses]
        storm = Storm(rng, street, group.budget, pools)
        storm.rage(200)
        storm.afterwards(8)
        assert street.most <= 8
        assert all(house.most <= 4 for house in street.houses)
        group.close()
        street.wait_all_closed()
        settle(group.budget, pools)
        assert group.budget.used == 0
        logged.take()  # dials that were hung up on while nobody waited for them


def test_g1_g4_several_plain_pools_share_one_budget_in_a_storm(rng: random.Random, logged: Any) -> None:
    with Street(4) as street:
        budget = Budget(5)
        pools = [
            Pool(of_its_own(SlowToClose), at(house), max_connections=cap, budget=budget, check_after_idle=0)
            for house, cap in zip(street.houses, (1, 2, 3, 4), strict=True)
        ]
        storm = Storm(rng, street, budget, pools)
        storm.rage(100)
        storm.afterwards(5)
        assert street.most <= 5
        assert [house.most <= cap for house, cap in zip(street.houses, (1, 2, 3, 4), strict=True)] == [True] * 4
        for pool in pools:
            pool.close()
        street.wait_all_closed()
        settle(budget, pools)
        assert budget.used == 0
        logged.take()


def test_g1_g4_two_groups_and_a_pool_share_one_budget_in_a_storm(rng: random.Random, logged: Any) -> None:
    with Street(3) as street:
        budget = Budget(5)
        groups: list[PoolGroup[Line]] = [
            PoolGroup(of_its_own(kind), max_connections=2, budget=budget, breaker=None, check_after_idle=0)
            for kind in (SlowToOpen, SlowToClose)
        ]
        alone = Pool(
            of_its_own(SlowToReset), at(street.houses[0]), max_connections=2, budget=budget, check_after_idle=0
        )
        pools = [group.pool(**at(house)) for group in groups for house in street.houses]
        storm = Storm(rng, street, budget, [*pools, alone])
        storm.rage(100)
        storm.afterwards(5)
        assert street.most <= 5
        groups[0].close()
        assert budget.used == sum(pool.size for pool in (*groups[1].pools, alone))
        with groups[1].connection(BOUND, **at(street.houses[0])) as connection:
            connection.ask("the other group goes on")
        groups[1].close()
        alone.close()
        street.wait_all_closed()
        settle(budget, [*pools, alone])
        assert budget.used == 0
        logged.take()


def test_g1_g4_a_budget_is_resized_under_load(rng: random.Random, logged: Any) -> None:
    with Street(3) as street:
        group: PoolGroup[Line] = PoolGroup(
            of_its_own(SlowToClose), max_connections=4, max_total=6, breaker=None, check_after_idle=0
        )
        budget = group.budget
        assert budget is not None
        pools = [group.pool(**at(house)) for house in street.houses]
        storm = Storm(rng, street, budget, pools)

        def resize() -> None:
            while not storm.over:
                before = budget.used
                budget.resize(rng.randrange(1, 7))
                for _ in range(rng.randrange(20)):
                    assert budget.used <= max(before, budget.max_total), "it grew beyond the new total"
                    before = budget.used
                    gevent.sleep(0)

        storm.rage(100, resize)
        assert street.most <= 6
        budget.resize(6)
        storm.afterwards(6)
        budget.resize(2)
        wait_for(lambda: budget.used <= 2, "idle connections went")
        settle(budget, pools)
        storm.afterwards(2)
        group.close()
        street.wait_all_closed()
        logged.take()


class Anything(SlowToOpen):
    """Whatever the pool asks of it may wait."""

    def close(self) -> None:
        gevent.sleep(0)
        super().close()

    def reset(self) -> None:
        self.ask("reset")

    def keepalive(self) -> bool:
        self.ask("alive")
        return True

    def is_expired(self) -> bool:
        gevent.sleep(0)
        return id(self) % 5 == 0


class Turmoil(Storm):
    """Whatever can be done to a group and its endpoints is done, some of which is done for long by the group itself."""

    def __init__(self, rng: random.Random, street: Street) -> None:
        self.cap = rng.randrange(1, 5)
        self.total = rng.randrange(1, 9)
        self.options: dict[str, Any] = {
            "max_connecting": rng.choice([None, 1, 2, 5]),
            "forget_after": rng.choice([0, 0.01, 60]),
            "breaker": rng.choice([None, 1, 3]),
            "backoff": (0.002, 0.01),
            "min_idle": rng.choice([0, 0, 1]),
            "keepalive": rng.choice([None, 0.02]),
            "idle_timeout": rng.choice([None, 0.05]),
            "max_lifetime": rng.choice([None, 0.1]),
            "max_uses": rng.choice([None, 3]),
            "max_waiting": rng.choice([None, 3]),
            "order": rng.choice(["lifo", "fifo"]),
            "reclaim": rng.choice([False, True]),
            "reap_interval": 0.05,
        }
        self.group: PoolGroup[Line] = PoolGroup(
            of_its_own(Anything),
            max_connections=self.cap,
            max_total=self.total,
            check_after_idle=0,
            **self.options,
        )
        assert self.group.budget is not None
        super().__init__(rng, street, self.group.budget, [])
        self.endpoints = [at(house) for house in street.houses]
        self.everywhere = [*self.endpoints, {"host": "127.0.0.1", "port": refused_port()}]

    def pick(self) -> Pool[Line]:
        return self.group.pool(**self.rng.choice(self.everywhere))

    def watch(self) -> None:
        while not self.over:
            look(self.budget, self.group.pools)
            gevent.sleep(0.001)

    def take_turns(self, name: str, short: bool) -> None:
        deeds = [*[self.borrow] * 14, *[self.by_hand] * 3, self.clear, self.clear_one, self.reap, self.pause]
        deeds += [self.resize, self.resize_one, self.hang_up_once]
        for turn in range(6):
            with contextlib.suppress(PoolError, OSError, gevent.Timeout):
                self.rng.choice(deeds)(f"{name} {turn}")
            gevent.sleep(self.rng.choice([0, 0, 0.001]))

    def borrow(self, text: str) -> None:
        limit = self.rng.choice([0, 0.01, BOUND, 4 * BOUND])
        with (
            gevent.Timeout(self.rng.choice([None, 0.002, 0.02])),
            self.group.connection(limit, **self.rng.choice(self.everywhere)) as connection,
        ):
            connection.ask(text)
            self.served += 1
            if self.rng.random() < 0.05:
                self.group.clear()

    def by_hand(self, text: str) -> None:
        pool = self.pick()
        connection = pool.acquire(retry=self.rng.choice([0, 1, 10]))
        try:
            connection.ask(text)
        finally:
            if self.rng.random() < 0.3:
                pool.drop(connection)
            else:
                pool.release(connection)

    def clear(self, text: str) -> None:
        self.group.clear()

    def clear_one(self, text: str) -> None:
        self.pick().clear()

    def reap(self, text: str) -> None:
        self.pick().drop_expired()

    def pause(self, text: str) -> None:
        pool = self.pick()
        pool.pause()
        try:
            gevent.sleep(0.001)
        finally:
            pool.resume()

    def resize(self, text: str) -> None:
        self.budget.resize(self.rng.randrange(1, self.total + 1))

    def resize_one(self, text: str) -> None:
        self.pick().resize(self.rng.randrange(1, self.cap + 1))

    def hang_up_once(self, text: str) -> None:
        self.rng.choice(self.street.houses).hang_up()

    def serves(self) -> None:
        """As many at once as ever."""
        self.budget.resize(self.total)
        pools = [self.group.pool(**endpoint) for endpoint in self.endpoints]
        for pool in pools:
            pool.resize(self.cap)
        entered: list[int] = []
        everybody = Event()
        room = [pool for pool in pools for _ in range(self.cap)]
        count = min(self.total, len(room))

        def use(pool: Pool[Line]) -> None:
            connection = patiently(pool)
            entered.append(id(connection))
            if len(entered) == count:
                everybody.set()
            assert everybody.wait(BOUND), "fewer than max_total are served at once"
            pool.drop(connection)

        using = [gevent.spawn(use, pool) for pool in self.rng.sample(room, count)]
        gevent.joinall(using, timeout=3 * BOUND, raise_error=True)
        assert len(set(entered)) == count
        look(self.budget, self.group.pools)


@pytest.mark.parametrize("number", range(20))
def test_g1_g4_whatever_is_done_to_a_group_in_whichever_order_nothing_is_lost(
    number: int, rng: random.Random, logged: Any
) -> None:
    with Street(4) as street:
        turmoil = Turmoil(rng, street)
        print(turmoil.cap, turmoil.total, turmoil.options)
        turmoil.rage(60, hang_up=False)
        turmoil.serves()
        assert street.most <= turmoil.total
        assert all(house.most <= turmoil.cap for house in street.houses)
        turmoil.group.close()
        street.wait_all_closed()
        wait_for(lambda: turmoil.budget.used == 0, "all is closed")
        assert turmoil.budget.faults() == []
        logged.take()


# Limits that are kept elsewhere.


class Counter:
    """A limit that others draw on too."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0


class Counted:
    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def take(self) -> bool:
        if self.counter.taken >= self.counter.limit:
            return False
        self.counter.taken += 1
        return True

    def give_back(self) -> None:
        self.counter.taken -= 1
        assert self.counter.taken >= 0


def test_g1_g4_a_limit_kept_elsewhere_holds_for_two_groups_in_a_storm(rng: random.Random, logged: Any) -> None:
    """Two budgets know nothing of each other, but for a counter; somebody else draws on it too."""
    with Street(3) as street:
        counter = Counter(6)
        groups: list[PoolGroup[Line]] = [
            PoolGroup(
                of_its_own(SlowToClose),
                max_connections=3,
                budget=Budget(5, quota=Counted(counter)),
                breaker=None,
                max_uses=2,
                check_after_idle=0,
            )
            for _ in range(2)
        ]
        storms = []
        for group in groups:
            assert group.budget is not None
            storms.append(Storm(rng, street, group.budget, [group.pool(**at(house)) for house in street.houses]))

        def somebody_else() -> None:
            while not all(storm.over for storm in storms):
                if counter.taken < counter.limit:
                    counter.taken += 1
                    gevent.sleep(0.001 + rng.random() * 0.004)
                    counter.taken -= 1
                gevent.sleep(0.001 + rng.random() * 0.004)

        def replenish() -> None:
            while not all(storm.over for storm in storms):
                for storm in storms:
                    storm.budget.replenished()
                gevent.sleep(0.001)

        others = [gevent.spawn(somebody_else), gevent.spawn(replenish)]
        raging = [gevent.spawn(storm.rage, 60) for storm in storms]
        gevent.joinall(raging, raise_error=True)
        gevent.joinall(others, raise_error=True)
        for storm in storms:
            settle(storm.budget, storm.pools)
        assert street.most <= 6
        assert counter.taken == sum(storm.budget.used for storm in storms)
        groups[0].close()
        storms[1].budget.replenished()
        storms[1].afterwards(5)
        groups[1].close()
        street.wait_all_closed()
        for storm in storms:
            settle(storm.budget, storm.pools)
        assert counter.taken == 0
        logged.take()


def test_who_waits_for_a_limit_kept_elsewhere_is_dialled_for_as_soon_as_it_is_replenished() -> None:
    with Street(2) as street:
        counter = Counter(1)
        counter.taken = 1  # somebody else's
        budget = Budget(5, quota=Counted(counter))
        pools = [Pool(of_its_own(Line), at(house), budget=budget) for house in street.houses]
        served: list[int] = []

        def use(number: int) -> None:
            with pools[number].connection(timeout=BOUND) as connection:
                served.append(number)
                connection.ask("at last")

        waiters = []
        for number in (1, 0, 1):
            waiters.append(gevent.spawn(use, number))
            wait_for(lambda: sum(pool.waiting for pool in pools) == len(waiters), "he waits")
        assert (served, budget.used) == ([], 0)
        look(budget, pools)
        counter.taken = 0
        budget.replenished()
        gevent.joinall(waiters, timeout=BOUND, raise_error=True)
        assert served == [1, 0, 1]
        assert street.most == 1
        for pool in pools:
            pool.close()
        street.wait_all_closed()
        wait_for(lambda: counter.taken == 0, "it is given back")


def test_g9_a_pool_that_is_collected_gives_its_units_back_wherever_they_came_from() -> None:
    with Street(2) as street:
        counter = Counter(3)
        budget = Budget(3, quota=Counted(counter))
        going, staying = (Pool(of_its_own(Line), at(house), budget=budget) for house in street.houses)
        lent = [going.acquire(timeout=BOUND) for _ in range(2)]
        with going.connection(timeout=BOUND):
            pass
        lent[0].ask("what is lent by hand goes on")
        waiting = gevent.spawn(staying.acquire, timeout=BOUND)
        kept = waiting.get(timeout=BOUND)
        assert (budget.used, counter.taken) == (3, 3)
        del going
        gc.collect()
        wait_for(lambda: budget.used == 1 and budget.faults() == [], "its units are free")
        look(budget, [staying])
        for connection in lent:
            connection.close()
        assert counter.taken == 1
        staying.release(kept)
        staying.close()
        street.wait_all_closed()
        wait_for(lambda: budget.used == counter.taken == 0, "all is given back")


# Turns


class Arrivals:
    """Borrowers who come one after the other, and stay until they are told to go."""

    def __init__(self, street: Street, total: int) -> None:
        self.street = street
        self.total = total
        self.group: PoolGroup[Line] = PoolGroup(
            of_its_own(Line), max_connections=total, max_total=total, max_connecting=total
        )
        self.entered: list[int] = []
        self.leaving: list[Event] = []
        self.users: list[gevent.Greenlet[..., None]] = []

    def come(self, number: int) -> None:
        """And wait until he has a connection, or stands in a queue."""
        order = len(self.users)
        self.leaving.append(Event())
        self.users.append(gevent.spawn(self.stay, order, number))
        if order < self.total:
            self.wait_entered(order + 1)
        else:
            wait_for(lambda: self.group.stats().waiting == order - self.total + 1, f"number {order} waits")

    def stay(self, order: int, number: int) -> None:
        with self.group.connection(BOUND, **at(self.street.houses[number])) as connection:
            self.entered.append(order)
            assert self.leaving[order].wait(2 * BOUND), "nobody told him to go"
            connection.ask(f"number {order}")

    def wait_entered(self, count: int) -> None:
        """Exactly so many have been served: those who came first."""
        wait_for(lambda: len(self.entered) >= count, f"{count} are served")
        wait_for(lambda: all(pool.total == pool.size for pool in self.group.pools), "it is quiet")
        assert sorted(self.entered) == list(range(count))
        assert self.group.budget is not None
        look(self.group.budget, self.group.pools)

    def end(self) -> None:
        for event in self.leaving:
            event.set()
        gevent.joinall(self.users, timeout=BOUND, raise_error=True)
        self.group.close()
        self.street.wait_all_closed()


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("lets_go", ["whoever came first", "whoever came last"])
def test_g5_over_all_endpoints_whoever_comes_first_is_served_first(total: int, lets_go: str) -> None:
    """All interleavings of four borrowers at three endpoints, of which so many may have one at once."""
    with Street(3) as street:
        for numbers in itertools.product(range(3), repeat=4):
            arrivals = Arrivals(street, total)
            for number in (*range(total), *numbers):
                arrivals.come(number)
            inside = deque(range(total))
            for order in range(total, len(arrivals.users)):
                goes = inside.popleft() if lets_go == "whoever came first" else inside.pop()
                arrivals.leaving[goes].set()
                arrivals.wait_entered(order + 1)
                inside.append(order)
            arrivals.end()
        assert street.most <= total


def test_g5_who_waits_only_for_his_own_full_endpoint_keeps_nobody_waiting_elsewhere() -> None:
    with Street(3) as street:
        group: PoolGroup[Line] = PoolGroup(of_its_own(Line), max_connections=1, max_total=3)
        budget = group.budget
        assert budget is not None
        pools = [group.pool(**at(house)) for house in street.houses]
        busy = pools[A].acquire(timeout=BOUND)
        waiting = [gevent.spawn(pools[A].acquire, timeout=BOUND) for _ in range(2)]
        wait_for(lambda: pools[A].waiting == 2, "they wait")
        with pools[B].connection(timeout=BOUND) as connection:
            connection.ask("a unit was free")
        with pools[B].connection(timeout=0) as connection:
            connection.ask("a connection idled")
        with pools[C].connection(timeout=BOUND) as connection, pools[B].connection(timeout=0) as other:
            connection.ask("the last unit")
            other.ask("while the other is used")
        assert (pools[A].waiting, budget.used) == (2, 3)
        assert sum(group.stats().endpoints[key].closed["evicted"] for key in group.stats().endpoints) == 0
        for each in waiting:
            pools[A].release(busy)
            busy = each.get(timeout=BOUND)
        pools[A].release(busy)
        assert street.houses[A].accepted == 1
        group.close()
        street.wait_all_closed()


@pytest.mark.parametrize("total", [1, 2, 3])
def test_g5_nobody_starves_while_another_endpoint_hands_over_without_end(total: int) -> None:
    with Street(2) as street:
        group: PoolGroup[Line] = PoolGroup(of_its_own(Line), max_connections=total, max_total=total)
        budget = group.budget
        assert budget is not None
        busy, other = (group.pool(**at(house)) for house in street.houses)
        over = False
        came = turns = evicted = 0
        his_turn: int | None = None
        barged: list[str] = []

        def hand_over() -> None:
            nonlocal came, turns
            while not over:
                came += 1
                number = came
                with busy.connection(timeout=None) as connection:
                    turns += 1
                    if his_turn is not None and number > his_turn and busy.stats().closed["evicted"] == evicted:
                        barged.append(f"number {number} was served, and nothing closed for him who came at {his_turn}")
                    connection.ask(f"turn {turns}")

        crowd = [gevent.spawn(hand_over) for _ in range(4 * total)]
        wait_for(lambda: turns > 10 * total, "the crowd is at it")
        for _ in range(20):
            assert busy.waiting > 0
            evicted = busy.stats().closed["evicted"]
            arrived = gevent.spawn(other.acquire, timeout=BOUND)
            wait_for(lambda: other.waiting == 1, "he waits")
            his_turn = came
            connection = arrived.get(timeout=BOUND)
            his_turn = None
            connection.ask("served")
            other.release(connection)
            wait_for(lambda: other.total == 0 and busy.waiting > 0, "the crowd has it back")
            look(budget, group.pools)
        assert barged == []
        over = True
        gevent.joinall(crowd, timeout=BOUND, raise_error=True)
        settle(budget, group.pools)
        assert street.most <= total
        group.close()
        street.wait_all_closed()


def test_one_connection_is_closed_for_one_who_waits_whatever_became_of_those_before_him() -> None:
    """What the one before him was granted is dropped before he has it."""
    with Street(2) as street:
        group: PoolGroup[Line] = PoolGroup(of_its_own(Line), max_connections=3, max_total=3, max_connecting=3)
        budget = group.budget
        assert budget is not None
        here, there = (group.pool(**at(house)) for house in street.houses)
        first = here.acquire(timeout=BOUND)
        others = [there.acquire(timeout=BOUND) for _ in range(2)]
        early, late = (gevent.spawn(here.acquire, timeout=BOUND) for _ in range(2))
        wait_for(lambda: here.waiting == 2, "both wait")
        here.release(first)  # granted to `early`, who does not run before this has been dropped
        budget.resize(3)  # whoever looks at who is first now finds `late`
        here.drop(first)
        granted = early.get(timeout=BOUND)
        for each in others:
            there.release(each)
        granted_too = late.get(timeout=BOUND)
        assert (there.stats().closed["evicted"], there.idle) == (1, 1)
        for each in (granted, granted_too):
            here.release(each)
        settle(budget, group.pools)
        group.close()
        street.wait_all_closed()


# Endpoints that are leaking, slow or down


def test_a_leaking_endpoint_takes_no_more_than_its_cap(rng: random.Random) -> None:
    with Street(4) as street:
        group: PoolGroup[Line] = PoolGroup(of_its_own(Line), max_connections=2, max_total=5)
        budget = group.budget
        assert budget is not None
        pools = [group.pool(**at(house)) for house in street.houses]
        leaked = [pools[A].acquire(timeout=BOUND) for _ in range(2)]
        in_vain = [gevent.spawn(pools[A].acquire, timeout=None) for _ in range(20)]
        wait_for(lambda: pools[A].waiting == 20, "they wait in vain")
        storm = Storm(rng, street, budget, pools[1:])
        storm.watch = lambda: None  # type: ignore[method-assign]
        storm.rage(60, hang_up=False)
        assert pools[A].waiting == 20
        assert pools[A].stats().closed["evicted"] == 0
        look(budget, pools)
        gevent.killall(in_vain)
        wait_for(lambda: all(pool.total == pool.size for pool in pools), "it is quiet")
        keeping = [pools[number].acquire(timeout=BOUND) for number in (B, B, C)]
        assert budget.used == 5
        for number, connection in zip((B, B, C), keeping, strict=True):
            pools[number].release(connection)
        for connection in leaked:
            pools[A].drop(connection)
        group.close()
        street.wait_all_closed()
        assert (budget.used, street.houses[A].most, street.most <= 5) == (0, 2, True)


def test_an_endpoint_whose_dials_hang_takes_no_more_than_it_may_dial_at_once(rng: random.Random, logged: Any) -> None:
    with Street(3) as street, std_socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)  # and never accepts: who connects is connected, and hears nothing
        group: PoolGroup[Line] = PoolGroup(of_its_own(SlowToOpen), max_connections=6, max_total=8)
        budget = group.budget
        assert budget is not None
        pools = [group.pool(**at(house)) for house in street.houses]
        hanging = group.pool(host="127.0.0.1", port=deaf.getsockname()[1])
        in_vain = [gevent.spawn(hanging.acquire, timeout=None) for _ in range(20)]
        wait_for(lambda: hanging.waiting == 20, "they wait in vain")
        assert hanging.stats().opening == 2
        storm = Storm(rng, street, budget, pools)
        storm.watch = lambda: None  # type: ignore[method-assign]
        storm.rage(60, hang_up=False)
        look(budget, group.pools)
        assert hanging.stats().opening == 2
        with contextlib.ExitStack() as stack:
            for number in (A, A, A, B, B, C):
                stack.enter_context(pools[number].connection(timeout=BOUND)).ask("a full share")
            assert budget.used == 8
        gevent.killall(in_vain)
        assert hanging.stats().opening == 2
        deaf.close()
        wait_for(lambda: hanging.total == 0, "the dials have failed")
        storm.afterwards(8)
        group.close()
        street.wait_all_closed()
        assert budget.used == 0
        logged.take()


def test_one_trial_dial_to_an_endpoint_that_is_down_costs_the_others_one_connection(logged: Any) -> None:
    with Street(1) as street:
        group: PoolGroup[Line] = PoolGroup(
            of_its_own(Line), max_connections=4, max_total=4, max_connecting=4, breaker=1, backoff=(60, 60)
        )
        budget = group.budget
        assert budget is not None
        up = group.pool(**at(street.houses[0]))
        down = group.pool(host="127.0.0.1", port=refused_port())
        with pytest.raises(ConnectionRefusedError):
            down.acquire(timeout=BOUND)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(up.connection(timeout=BOUND))
        down.clear()  # it may be tried again
        told: list[type[BaseException]] = []

        def use() -> None:
            try:
                down.acquire(timeout=BOUND)
            except (PoolError, OSError) as error:
                told.append(type(error))

        gevent.joinall([gevent.spawn(use) for _ in range(3)], timeout=BOUND, raise_error=True)
        assert (len(told), told.count(BreakerOpenError), told.count(ConnectionRefusedError)) == (3, 2, 1)
        look(budget, group.pools)
        assert up.stats().closed["evicted"] == 1
        group.close()
        street.wait_all_closed()
        logged.take(1)


# Several processes. What they run is below: this file is the program.


def program(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.test_group_kills", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=5 * BOUND)
    assert process.returncode == 0, output
    return output


def test_g1_two_processes_share_a_limit(tmp_path: Path) -> None:
    """A file of so many locks is the limit: what a process has locked is free when it ends, however it ends."""
    slots = tmp_path / "slots"
    slots.touch()
    with Street(3) as street:
        ports = [house.port for house in street.houses]
        processes = [program("share", slots, 3, *ports) for _ in range(2)]
        assert [finished(each) for each in processes] == ["all served\n"] * 2
        street.wait_all_closed()
        assert 1 < street.most <= 3


@pytest.mark.parametrize("fork", ["os", "gevent"])
def test_g10_a_budget_in_the_child_of_a_fork_has_all_its_units(fork: str) -> None:
    with Street(3) as street:
        ports = [house.port for house in street.houses]
        assert finished(program("fork", fork, *ports)) == "the child is done\nthe parent is done\n"
        street.wait_all_closed()


class Locks:
    """As many units as there are bytes of a file that can be locked."""

    def __init__(self, path: str, count: int) -> None:
        self._file = open(path, "r+b")  # noqa: SIM115
        self._left = set(range(count))
        self._mine: list[int] = []

    def take(self) -> bool:
        for slot in self._left:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                self._left.discard(slot)
                self._mine.append(slot)
                return True
        return False

    def give_back(self) -> None:
        slot = self._mine.pop()
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, slot)
        self._left.add(slot)


def share_a_limit(path: str, count: str, *ports: str) -> None:
    budget = Budget(8, quota=Locks(path, int(count)))
    group: PoolGroup[Line] = PoolGroup(of_its_own(SlowToClose), max_connections=2, budget=budget, max_uses=2)
    served = 0

    def use(number: int) -> None:
        nonlocal served
        for turn in range(5):
            with group.connection(8 * BOUND, host="127.0.0.1", port=int(ports[(number + turn) % len(ports)])) as line:
                line.ask(f"{os.getpid()} {number} {turn}")
                gevent.sleep(0.001)
                served += 1

    def replenish() -> None:
        while True:
            gevent.sleep(0.002)
            budget.replenished()
            look(budget, group.pools)

    replenishing = gevent.spawn(replenish)
    gevent.joinall([gevent.spawn(use, number) for number in range(10)], raise_error=True)
    assert not replenishing.ready()
    replenishing.kill()
    group.close()
    wait_for(lambda: budget.used == 0, "all is closed")
    assert served == 50
    print("all served")


def fork_with_a_budget(how: str, *ports: str) -> None:
    group: PoolGroup[Line] = PoolGroup(of_its_own(Line), max_connections=2, max_total=2, max_connecting=2)
    budget = group.budget
    assert budget is not None
    pools = [group.pool(host="127.0.0.1", port=int(port)) for port in ports]
    with pools[B].connection(timeout=BOUND):
        pass
    here = os.getpid()
    waited: list[Line] = []
    with pools[A].connection(timeout=BOUND) as held:
        held.ask("before")
        second = pools[B].acquire(timeout=BOUND)
        waiter = gevent.spawn(lambda: waited.append(pools[C].acquire(timeout=BOUND)))
        wait_for(lambda: pools[C].waiting == 1, "somebody waits for a unit")
        child = os.fork() if how == "os" else gevent.os.fork()
        if not child:
            # One of the two units that there are now goes to him who waited.
            if how == "os":
                gevent.reinit()
            assert budget.used <= 1
            waiter.join(BOUND)
            waited[0].ask("he who waited, in the child")
            look(budget, pools)
            with pools[A].connection(timeout=BOUND) as line:
                line.ask("another, in the child")
                assert budget.used == 2
            pools[C].release(waited[0])
            with pools[B].connection(timeout=BOUND) as line:  # one of them makes room
                line.ask("a third, in the child")
                look(budget, pools)
                assert budget.used == 2
        else:
            _, status = gevent.os.waitpid(child, 0) if how == "gevent" else os.waitpid(child, 0)
            assert status == 0
            assert budget.used == 2
            held.ask("after")
            second.ask("after")
            look(budget, pools)
            pools[B].release(second)
            waiter.join(BOUND)
            waited[0].ask("he who waited")
            assert budget.used == 2
            pools[C].release(waited[0])
    look(budget, pools)
    group.close()
    wait_for(lambda: budget.used == 0, "all is closed")
    look(budget, pools)
    print("the parent is done" if os.getpid() == here else "the child is done", flush=True)
    if os.getpid() != here:
        os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "share":
        share_a_limit(*sys.argv[2:])
    else:
        fork_with_a_budget(*sys.argv[2:])

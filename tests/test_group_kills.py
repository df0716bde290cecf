"""One cap over many endpoints, seen from their servers: kills at every switch point, storms, turns, and limits that are
shared in other ways.

The method is that of `test_kills`: each scenario runs once to count the switch points of its victim, then once for each
of them, each way to strike and each thing to strike with. After each run the invariants of the budget and of all pools
hold, the servers together never saw more sockets than `max_total`, as many borrowers are served at once, whichever
endpoints they ask for, and after ``group.close()`` no server has a socket left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import gevent
import pytest
from gevent.event import Event

from gsocketpool import Pool, PoolError, PoolGroup
from gsocketpool.budget import Budget
from tests.knife import ASLEEP, WAKING, Knife
from tests.servers import LineEchoServer
from tests.test_kills import THROWN, Line, SlowToCheck, SlowToClose, SlowToOpen, SlowToReset

BOUND = 5.0

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
        while not happened():
            gevent.sleep(0)


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
                connection.ask(self.text())

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
                except (PoolError, gevent.Timeout):
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
    connection = pool.acquire(retry=50)
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
        idle_in(B, B, C),
        [(A, C), (B, A)],
    ),
    "the close of what makes room": (borrowing, SlowToClose, "close", {}, idle_in(B, B, C), [(C, A)]),
    "the close of what comes back": (borrowing, SlowToClose, "close", {}, lent_in(B, B, C), [(C, A)]),
    "the dial for which room was made": (borrowing, SlowToOpen, "open", {}, idle_in(B, B, C), [(C, A)]),
    "the dial for the last unit": (borrowing, SlowToOpen, "open", {}, lent_in(B, C), [(C,), (B, A)]),
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
    assert strikes == count.points
    assert len(logged.take()) <= strikes  # G12: a dial or a close that was killed is logged once

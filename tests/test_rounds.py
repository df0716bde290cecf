"""What a group does of its own accord, for all its endpoints in one greenlet."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import greenlet
import pytest
from gevent.event import Event

from gsocketpool import Pool, PoolExhaustedError, PoolGroup
from tests.conftest import Logged
from tests.dials import BOUND, Attempt
from tests.servers import LineEchoServer, Server, refused_port
from tests.test_group import Marked, Nothing, at, lend_and_return, until


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


class Upkeeps:
    """The greenlets that were begun since this was made, but for those of the servers."""

    def __init__(self, *servers: Server) -> None:
        self._servers = servers
        self._before = {id(each) for each in self._all()}

    @staticmethod
    def _all() -> list[gevent.Greenlet[..., Any]]:
        return [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and not each.dead and each]

    def __call__(self) -> list[gevent.Greenlet[..., Any]]:
        theirs = {id(each) for server in self._servers for each in server._greenlets}
        return [
            each for each in self._all() if id(each) not in self._before | theirs and each is not gevent.getcurrent()
        ]

    def settle(self, count: int) -> list[gevent.Greenlet[..., Any]]:
        """Wait until there are so many."""
        until(f"there are {count} greenlets in the background", lambda: len(self()) == count)
        return self()


@pytest.fixture
def upkeeps(server: Server) -> Upkeeps:
    return Upkeeps(server)


def pools_of(group: PoolGroup[Any], server: Server, count: int) -> list[Pool[Any]]:
    return [group.pool(**at(server), db=number) for number in range(count)]


# One greenlet


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_idle": 1},
        {"max_total": 100},
        {"idle_timeout": 1000, "max_lifetime": 1000, "keepalive": 1000, "leak_threshold": 1000, "reclaim": True},
        {"check_after_idle": None, "reap_expired_connections": False, "breaker": None},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_one_greenlet_tends_all_endpoints(
    count: int, settings: dict[str, Any], server: Server, upkeeps: Upkeeps
) -> None:
    with PoolGroup(Marked, **settings) as group:
        for pool in pools_of(group, server, count):
            with pool.connection(BOUND):
                pass
        upkeeps.settle(1)
    upkeeps.settle(0)


def test_nothing_runs_in_the_background_until_an_endpoint_is_asked_for(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked) as group:
        gevent.sleep(0)
        assert upkeeps() == []
        group.pool(**at(server))
        upkeeps.settle(1)


def test_it_ends_when_there_is_nothing_to_tend_and_begins_again(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked, forget_after=0.01, idle_timeout=0.01) as group:
        for _ in range(3):
            with group.connection(BOUND, **at(server)):
                upkeeps.settle(1)
            until("it is forgotten", lambda: group.pools == [])
            upkeeps.settle(0)


def test_it_ends_with_the_last_endpoint_that_is_closed(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked) as group:
        first, second = pools_of(group, server, 2)
        for pool in first, second:
            with pool.connection():
                pass
        first.close()
        gevent.sleep(0)
        upkeeps.settle(1)
        second.close()
        upkeeps.settle(0)
        lend_and_return(group, **at(server))
        upkeeps.settle(1)


def test_two_groups_have_two(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked) as one, PoolGroup(Marked) as other:
        lend_and_return(one, **at(server))
        lend_and_return(other, **at(server))
        upkeeps.settle(2)
        one.close()
        upkeeps.settle(1)


# Killed from outside


def test_killed_while_it_sleeps_it_goes_on_and_is_still_one(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked, idle_timeout=0.05) as group:
        for number in range(5):
            lend_and_return(group, **at(server), db=number)
            for task in upkeeps.settle(1):
                task.kill()
            lend_and_return(group, **at(server), db=number, again=1)
        upkeeps.settle(1)
        until("all idled too long", lambda: group.stats().idle == 0)
        assert sum(stats.closed["idle"] for stats in group.stats().endpoints.values()) == 10


def test_killed_before_it_could_begin_it_begins_all_the_same(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked, idle_timeout=0.05) as group:
        group.pool(**at(server))
        unbegun = [
            each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and not each and not each.dead
        ]
        gevent.killall(unbegun)
        lend_and_return(group, **at(server))
        upkeeps.settle(1)
        until("it idled too long", lambda: group.stats().idle == 0)


class Waits(logging.Handler):
    """Waits until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.waits = Event()
        self.may_go_on = Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.waits.set()
        assert self.may_go_on.wait(BOUND)


@pytest.fixture
def handler() -> Iterator[Waits]:
    handler = Waits()
    logger = logging.getLogger("gsocketpool")
    logger.addHandler(handler)
    yield handler
    handler.may_go_on.set()
    logger.removeHandler(handler)


def test_killed_while_it_tends_an_endpoint_it_tends_that_one_again(
    server: Server, upkeeps: Upkeeps, handler: Waits, logged: Logged
) -> None:
    with PoolGroup(Marked, idle_timeout=0.1, leak_threshold=0.02) as group:
        lend_and_return(group, **at(server), db=1)
        lend_and_return(group, **at(server))
        with group.connection(**at(server)), group.connection(**at(server)):
            assert handler.waits.wait(BOUND)  # the report of a leak
            for task in upkeeps.settle(1):
                task.kill()
            handler.may_go_on.set()
            until("the other leak is reported, too", lambda: len(logged._records) == 2)
        until("all idled too long", lambda: group.stats().idle == 0)
        upkeeps.settle(1)
        until("both came back and that is logged", lambda: len(logged._records) == 4)
    logged.take(4)


def test_what_ends_it_otherwise_ends_it_only_until_there_is_something_to_do(
    server: Server, upkeeps: Upkeeps, crashed: Any
) -> None:
    with PoolGroup(Marked, idle_timeout=0.05) as group:
        lend_and_return(group, **at(server))
        for task in upkeeps.settle(1):
            task.kill(ZeroDivisionError)
        assert [type(error) for error in crashed.take()] in ([], [ZeroDivisionError])
        lend_and_return(group, **at(server), db=1)
        until("both idled too long", lambda: group.stats().idle == 0)
        upkeeps.settle(1)


# It does not take the hub for itself


def test_a_round_that_takes_longer_than_a_tick_lets_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine so slow that each look at the clock takes a millisecond."""
    slowness = 0.0

    def slow() -> float:
        nonlocal slowness
        slowness += 0.001
        return real() + slowness

    real = time.monotonic
    with PoolGroup(Nothing, check_after_idle=0.02) as group:
        for number in range(300):
            lend_and_return(group, host=number)
        monkeypatch.setattr("gsocketpool.upkeep.monotonic", slow)
        for _ in range(20):
            gevent.sleep(0.001)
        monkeypatch.undo()


# It keeps nothing alive


@pytest.mark.parametrize("max_total", [None, 10])
def test_g9_the_greenlet_keeps_neither_the_group_nor_a_pool_alive(
    server: Server, upkeeps: Upkeeps, max_total: int | None
) -> None:
    group = PoolGroup(Marked, max_total=max_total, min_idle=1, idle_timeout=1000, leak_threshold=1000)
    for number in range(3):
        lend_and_return(group, **at(server), db=number)
    upkeeps.settle(1)
    del group
    server.wait_open(0)
    upkeeps.settle(0)


# All that a pool does of its own accord


class Talks(Marked):
    """Counts what a pool asks of it."""

    def __init__(self, host: str, port: int, **marks: Any) -> None:
        super().__init__(host, port, **marks)
        self.keepalives = 0
        self.expired = False

    def keepalive(self) -> bool:
        self.keepalives += 1
        return self.ask("alive?") == "alive?"

    def is_expired(self) -> bool:
        return self.expired


COUNT = 5


def of_all(group: PoolGroup[Any], reason: str) -> Callable[[], bool]:
    """Whether each endpoint has closed one for this reason."""
    return lambda: [stats.closed[reason] for stats in group.stats().endpoints.values()] == [1] * COUNT


def test_min_idle_is_kept_at_each_endpoint_and_what_is_lost_is_replaced(server: Server, upkeeps: Upkeeps) -> None:
    with PoolGroup(Marked, min_idle=2) as group:
        for pool in pools_of(group, server, COUNT):
            pool.wait_ready(BOUND)
        server.wait_open(2 * COUNT)
        server.hang_up()
        server.wait_accepted(4 * COUNT)
        until("all have two again", lambda: all(pool.idle == 2 for pool in group.pools))
        upkeeps.settle(1)


def test_min_idle_is_dialled_for_again_after_a_while(server: Server, logged: Logged) -> None:
    class Shy(Marked):
        def open(self) -> None:
            if not is_up:
                raise ConnectionRefusedError
            super().open()

    is_up: list[int] = []
    with PoolGroup(Shy, min_idle=1, backoff=(0.001, 0.002), breaker=None) as group:
        pools = pools_of(group, server, COUNT)
        until("all have failed", lambda: all(pool.stats().open_failures > 2 for pool in pools))
        is_up.append(1)
        for pool in pools:
            pool.wait_ready(BOUND)
    assert len(logged.take()) >= 2 * COUNT


def test_keepalives_are_asked_at_each_endpoint(server: Server) -> None:
    with PoolGroup(Talks, keepalive=0.05) as group:
        conns = []
        for pool in pools_of(group, server, COUNT):
            with pool.connection() as conn:
                conns.append(conn)
        until("each was asked twice", lambda: all(conn.keepalives >= 2 for conn in conns))
        assert server.accepted == COUNT


def test_max_lifetime_ends_each_connection(server: Server) -> None:
    with PoolGroup(Marked, max_lifetime=0.05) as group:
        for pool in pools_of(group, server, COUNT):
            with pool.connection():
                pass
        until("all have expired", of_all(group, "expired"))
        server.wait_open(0)


def test_idle_timeout_ends_each_connection(server: Server) -> None:
    with PoolGroup(Marked, idle_timeout=0.05) as group:
        for pool in pools_of(group, server, COUNT):
            with pool.connection():
                pass
        until("all idled too long", of_all(group, "idle"))
        server.wait_open(0)


def test_the_reaper_looks_at_each_endpoint(server: Server) -> None:
    with PoolGroup(Talks, reap_interval=0.02) as group:
        for pool in pools_of(group, server, COUNT):
            with pool.connection() as conn:
                conn.expired = True
            with pool.connection():
                pass
        until("all are reaped", of_all(group, "expired"))


def test_what_hung_up_is_noticed_at_each_endpoint(server: Server) -> None:
    with PoolGroup(Marked, check_after_idle=0.05) as group:
        for pool in pools_of(group, server, COUNT):
            with pool.connection():
                pass
        server.wait_open(COUNT)
        server.hang_up()
        until("all are seen to be dead", of_all(group, "stale"))


def test_leaks_are_reported_for_each_endpoint_by_its_name(server: Server, logged: Logged) -> None:
    with PoolGroup(Marked, name="billing", leak_threshold=0.02) as group:
        pools = pools_of(group, server, COUNT)
        leases = [pool.connection() for pool in pools]
        for lease in leases:
            lease.__enter__()
        leaks = [record.getMessage() for record in logged.take(COUNT)]
        names = {repr(pool).split("'")[1] for pool in pools}
        assert len(names) == COUNT
        assert {leak.split("'")[1] for leak in leaks} == names
        for lease in leases:
            lease.__exit__(None, None, None)
        logged.take(COUNT)


def test_what_a_dead_greenlet_had_is_taken_back_at_each_endpoint(server: Server, logged: Logged) -> None:
    with PoolGroup(Marked, reclaim=True) as group:
        pools = pools_of(group, server, COUNT)
        gevent.joinall([gevent.spawn(pool.acquire) for pool in pools], raise_error=True)
        until("all are taken back", of_all(group, "reclaimed"))
        server.wait_open(0)
    logged.take(COUNT)


def test_a_breaker_is_half_open_in_time_at_each_endpoint(server: Server, logged: Logged) -> None:
    class Shy(Marked):
        def open(self) -> None:
            if not is_up:
                raise ConnectionRefusedError
            super().open()

    is_up: list[int] = []
    settings: dict[str, Any] = {"breaker": 1, "backoff": (0.02, 0.02), "forget_after": 1000}
    with PoolGroup(Shy, **settings) as group:
        pools = pools_of(group, server, COUNT)
        for pool in pools:
            with pytest.raises(ConnectionRefusedError), pool.connection():
                pass
        until("all are half-open", lambda: all(pool.stats().breaker == "half-open" for pool in pools))
        is_up.append(1)
        for pool in pools:
            with pool.connection():
                pass
        assert {pool.stats().breaker for pool in pools} == {"closed"}
    logged.take(COUNT)


def test_trouble_at_one_endpoint_keeps_no_other_from_being_tended(server: Server, logged: Logged) -> None:
    class Odd(Marked):
        def fileno(self) -> int | None:
            if "odd" in self.marks:
                raise gevent.Timeout
            return super().fileno()

    with PoolGroup(Odd, idle_timeout=0.05) as group:
        lend_and_return(group, **at(server), odd=1)
        for pool in pools_of(group, server, COUNT):
            with pool.connection():
                pass
        odd = group.pool(**at(server), odd=1)
        until("the others idled too long", lambda: group.stats().idle == odd.idle)
    assert all("upkeep failed" in record.getMessage() for record in logged.take())


# Deadlines that come up while it sleeps


def test_a_deadline_that_comes_up_is_met_among_three_hundred_endpoints_with_nothing_else_to_do(
    server: Server, rng: random.Random
) -> None:
    """No tick and no reaper: all sleep until something expires, each at a time of its own."""
    settings: dict[str, Any] = {"check_after_idle": None, "reap_expired_connections": False, "breaker": None}
    with PoolGroup(Marked, max_lifetime=0.4, lifetime_jitter=1, forget_after=1000, **settings) as group:
        pools = pools_of(group, server, 300)
        gevent.sleep(0.01)  # all were looked at, and there is nothing to do
        for pool in rng.sample(pools, 300):
            with pool.connection():
                pass
        until("all have expired", lambda: all(pool.stats().closed["expired"] == 1 for pool in pools))
        server.wait_open(0)


def test_the_one_endpoint_in_three_hundred_that_has_something_to_do_is_tended_in_time(
    server: Server, logged: Logged
) -> None:
    settings: dict[str, Any] = {"check_after_idle": None, "reap_expired_connections": False, "forget_after": 1000}
    with PoolGroup(Marked, breaker=1, backoff=(0.02, 0.02), **settings) as group:
        for pool in pools_of(group, server, 300):
            with pool.connection():
                pass
        gevent.sleep(0.01)
        down = {"host": "127.0.0.1", "port": refused_port()}
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                lend_and_return(group, **down)
            until("it is half-open", lambda: group.pool(**down).stats().breaker == "half-open")
    logged.take()


def test_the_heap_of_deadlines_holds_no_more_than_a_few_for_each_endpoint(server: Server, logged: Logged) -> None:
    """Each failed try sets a deadline before those that are set already."""
    with PoolGroup(Marked, breaker=1, backoff=(0.001, 0.001), check_after_idle=None, forget_after=1000) as group:
        down = {"host": "127.0.0.1", "port": refused_port()}
        for _ in range(200):
            with pytest.raises((ConnectionRefusedError, PoolExhaustedError)):
                lend_and_return(group, **down)
            until("it is half-open", lambda: group.pool(**down).stats().breaker == "half-open")
        assert len(group._rounds._due) <= 20
    logged.take()


# At random


@pytest.mark.parametrize("max_total", [None, 6])
def test_endpoints_come_and_go_at_random_with_everything_turned_on(
    server: Server, max_total: int | None, rng: random.Random, upkeeps: Upkeeps, logged: Logged
) -> None:
    settings: dict[str, Any] = {
        "idle_timeout": 0.02,
        "max_lifetime": 0.05,
        "max_uses": 5,
        "keepalive": 0.01,
        "check_after_idle": 0.02,
        "reap_interval": 0.01,
        "leak_threshold": 1000,
        "reclaim": True,
        "forget_after": 0.005,
        "max_connections": 3,
        "max_total": max_total,
    }
    with PoolGroup(Talks, **settings) as group:

        def somebody() -> None:
            for _ in range(100):
                with group.connection(BOUND, **at(server), db=rng.randrange(6)) as conn:
                    if rng.random() < 0.5:
                        assert conn.ask(text := str(rng.random())) == text
                    if rng.random() < 0.05:
                        conn.socket.close()
                if rng.random() < 0.2:
                    gevent.sleep(rng.choice((0, 0.001, 0.01)))
                if rng.random() < 0.02:
                    server.hang_up()
                if rng.random() < 0.02:
                    for task in upkeeps():
                        if "_go_round" in repr(task):
                            task.kill()

        def careful() -> str:
            for _ in range(3):
                try:
                    somebody()
                except OSError:  # the server hung up in the middle
                    continue
            return "done"

        people = [Attempt(careful) for _ in range(8)]
        with gevent.Timeout(40):
            assert [person.greenlet.get() for person in people] == ["done"] * 8
        until("all are forgotten", lambda: group.pools == [])
        upkeeps.settle(0)
        assert group._rounds._due == []
        if group.budget is not None:
            assert (group.budget.used, group.budget.faults()) == (0, [])
        server.wait_open(0)
    logged.take()


def test_a_greenlet_is_not_kept_by_what_it_borrowed_from_a_group(server: Server) -> None:
    with PoolGroup(Marked, reclaim=True) as group:
        task = gevent.spawn(lend_and_return, group, **at(server))
        task.join(BOUND)
        assert isinstance(task, greenlet.greenlet)
        assert [loan for pool in group.pools for loan in pool.holders()] == []

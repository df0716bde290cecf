"""The pool's bounds, moved while it works: `resize`, `pause` and `resume`, `max_waiting`, and `close` as a drain.

At the end the kills of `test_kills` again, for whoever moves a bound and for those around whom it is moved.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event

from gsocketpool import ConnectionNotFoundError, Pool, PoolClosedError, PoolExhaustedError
from tests.conftest import Logged
from tests.dials import BOUND, Attempt, Dials, Held, nobody_else_runs
from tests.knife import ASLEEP, WAKING, Knife
from tests.lines import Line, borrow, give_back, line_pool
from tests.servers import LineEchoServer
from tests.test_kills import CAP, THROWN, SlowToOpen, World
from tests.test_kills import Line as KillsLine
from tests.test_kills import SlowToClose as KillsSlowToClose

WATCHED: dict[str, Any] = {"leak_threshold": 1000, "reclaim": True}


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def dials(server: LineEchoServer) -> Dials:
    return Dials(server)


class SlowToClose(Line):
    """Its close waits until the test lets it go on."""

    may_close: Event

    def close(self) -> None:
        assert self.may_close.wait(BOUND)
        super().close()


@pytest.fixture
def slow() -> type[SlowToClose]:
    return type("SlowToClose", (SlowToClose,), {"may_close": Event()})


def wait_for(condition: Callable[[], bool]) -> None:
    """Let others run until it holds."""
    with gevent.Timeout(BOUND):
        while not condition():
            gevent.sleep(0.001)


def waiters(pool: Pool[Any], count: int) -> list[Attempt]:
    attempts = [Attempt(pool.acquire, timeout=None) for _ in range(count)]
    assert pool.waiting == count
    return attempts


def give_back_all(pool: Pool[Held], dials: Dials) -> None:
    for dial in dials:
        pool.release(dial)


def serves_in_turn(pool: Pool[Any], queue: list[Attempt]) -> None:
    """Each is served when the one before him has given back, and not sooner."""
    for number, waiter in enumerate(queue):
        connection = waiter.result()
        assert [later.ready() for later in queue[number + 1 :]] == [False] * (len(queue) - number - 1)
        pool.release(connection)


def check_is_whole(pool: Pool[Any]) -> None:
    """As many as the cap says can borrow at once, and no invariant is broken."""
    held = [pool.acquire(timeout=BOUND) for _ in range(pool.stats().max_connections)]
    assert len(set(map(id, held))) == len(held)
    with pytest.raises(PoolExhaustedError):
        pool.acquire(timeout=0)
    for connection in held:
        pool.release(connection)
    assert (pool.faults(), pool.in_use, pool.waiting) == ([], 0, 0)


# resize: more


def test_g5_growing_serves_those_who_wait_in_the_order_in_which_they_came(dials: Dials) -> None:
    with dials.pool(max_connections=1) as pool:
        first = Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        dials[0].go_on()
        queue = waiters(pool, 4)
        with nobody_else_runs():
            pool.resize(3)
        dials.wait(3)
        dials[2].go_on()  # whichever dial ends first is for the first in line
        assert queue[0].result() is dials[2]
        dials[1].go_on()
        assert queue[1].result() is dials[1]
        assert (queue[2].ready(), queue[3].ready(), pool.in_use, pool.waiting) == (False, False, 3, 2)
        pool.release(first.result())
        assert queue[2].result() is dials[0]
        for connection in dials:
            pool.release(connection)
        pool.release(queue[3].result())
        assert (pool.size, pool.stats().max_connections) == (3, 3)
        check_is_whole(pool)


def test_growing_dials_as_many_at_once_as_may_be_and_the_rest_in_turn(dials: Dials) -> None:
    with dials.pool(max_connections=1, max_connecting=2) as pool:
        first = Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        dials[0].go_on()
        queue = waiters(pool, 4)
        pool.resize(5)
        dials.wait(3)
        for number in range(1, 5):
            dials[number].go_on()
            assert queue[number - 1].result() is dials[number]
        dials.wait(5)
        for connection in dials:
            pool.release(connection)
        assert first.result() is dials[0]


def test_growing_opens_nothing_that_nobody_asks_for(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=1) as pool:
        pool.resize(5)
        gevent.sleep(0)
        assert (pool.size, pool.stats().opening, server.accepted) == (1, 0, 1)
        check_is_whole(pool)
        assert server.accepted == 5


def test_who_was_refused_for_max_waiting_is_not_when_there_is_room_again(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, max_waiting=1) as pool:
        [held] = borrow(pool, 1)
        [waiter] = waiters(pool, 1)
        with pytest.raises(PoolExhaustedError, match="max_waiting=1"):
            pool.acquire(timeout=BOUND)
        pool.resize(3)
        more = pool.acquire(timeout=BOUND)
        give_back(pool, [held, more, waiter.result()])
        check_is_whole(pool)


# resize: less


@pytest.mark.parametrize("order", ["lifo", "fifo"])
@pytest.mark.parametrize("cold", [0, 2, 5])
def test_shrinking_closes_what_has_idled_longest(server: LineEchoServer, order: str, cold: int) -> None:
    with line_pool(server, max_connections=5, check_after_idle=None, order=order) as pool:
        lines = borrow(pool, 5)
        give_back(pool, lines[:cold])
        pool.cool(0.0)
        give_back(pool, lines[cold:])
        with nobody_else_runs():
            pool.resize(2)
        assert (pool.size, pool.idle) == (2, 2)
        server.wait_open(2)
        assert [line.is_connected() for line in lines] == [False, False, False, True, True]
        assert pool.stats().closed["shrunk"] == 3
        check_is_whole(pool)
        assert server.accepted == 5


def by_release(pool: Pool[Line], line: Line) -> None:
    pool.release(line)


def by_release_after_a_failure(pool: Pool[Line], line: Line) -> None:
    with pytest.raises(KeyError):
        try:
            raise KeyError
        finally:
            pool.release(line)


def by_drop(pool: Pool[Line], line: Line) -> None:
    pool.drop(line)


@pytest.mark.parametrize(
    ("how", "reason"), [(by_release, "shrunk"), (by_release_after_a_failure, "discarded"), (by_drop, "dropped")]
)
@pytest.mark.parametrize("options", [{}, WATCHED], ids=["plain", "watched"])
def test_shrinking_closes_what_is_borrowed_as_it_comes_back(
    server: LineEchoServer, how: Callable[[Pool[Line], Line], None], reason: str, options: dict[str, Any]
) -> None:
    with line_pool(server, max_connections=4, **options) as pool:
        lines = borrow(pool, 4)
        pool.resize(1)
        assert [line.ask("still mine") for line in lines] == ["still mine"] * 4
        for line in lines[:3]:
            how(pool, line)
        server.wait_open(1)
        assert pool.stats().closed[reason] == 3
        pool.release(lines[3])
        assert (pool.idle, pool.size, pool.total) == (1, 1, 1)
        check_is_whole(pool)


def test_what_idles_goes_before_what_is_borrowed(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=4) as pool:
        lines = borrow(pool, 4)
        give_back(pool, lines[:2])
        pool.resize(1)
        server.wait_open(2)
        assert [line.is_connected() for line in lines] == [False, False, True, True]
        pool.release(lines[2])
        server.wait_open(1)
        pool.release(lines[3])
        assert lines[3].is_connected()
        check_is_whole(pool)


def test_a_block_that_is_open_while_the_pool_shrinks_ends_as_usual(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2) as pool:
        with pool.connection() as one, pool.connection() as other:
            pool.resize(1)
            assert (one.ask("one"), other.ask("other")) == ("one", "other")
        assert (one.is_connected(), pool.idle) == (True, 1)
        server.wait_open(1)
        check_is_whole(pool)


def test_g1_sockets_only_ever_become_fewer_until_they_are_as_few_as_the_new_cap(
    server: LineEchoServer, slow: type[SlowToClose]
) -> None:
    with line_pool(server, slow, max_connections=6) as pool:
        lines = borrow(pool, 6)
        queue = waiters(pool, 3)
        pool.resize(2)
        totals = [pool.total]
        for line in lines[:4]:
            pool.release(line)
            gevent.sleep(0)
            totals.append(pool.total)
        assert (totals, pool.size, server.open) == ([6] * 5, 2, 6)  # their closes take their time
        slow.may_close.set()
        server.wait_open(2)
        assert (pool.total, pool.waiting, [waiter.ready() for waiter in queue]) == (2, 3, [False] * 3)
        pool.release(lines[4])
        serves_in_turn(pool, queue)
        pool.release(lines[5])
        check_is_whole(pool)
        assert (server.accepted, server.most) == (6, 6)


def test_g5_who_waits_while_the_pool_shrinks_keeps_his_place(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=3) as pool:
        lines = borrow(pool, 3)
        queue = waiters(pool, 4)
        pool.resize(1)
        give_back(pool, lines[:2])
        server.wait_open(1)
        assert pool.waiting == 4
        pool.release(lines[2])
        serves_in_turn(pool, queue)
        assert (server.accepted, pool.stats().closed["shrunk"]) == (3, 2)
        check_is_whole(pool)


def test_what_a_waiter_was_granted_before_is_his_and_goes_as_he_gives_it_back(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2) as pool:
        lines = borrow(pool, 2)
        [waiter] = waiters(pool, 1)
        pool.release(lines[0])
        pool.resize(1)  # before he ran
        assert waiter.result() is lines[0]
        assert lines[0].ask("mine") == "mine"
        pool.release(lines[0])
        server.wait_open(1)
        pool.release(lines[1])
        check_is_whole(pool)
        assert server.accepted == 2


def test_down_and_up_again_before_anything_came_back_closes_nothing(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=4) as pool:
        lines = borrow(pool, 4)
        pool.resize(1)
        pool.resize(4)
        give_back(pool, lines)
        assert pool.idle == 4
        check_is_whole(pool)
        assert (server.accepted, pool.stats().closed["shrunk"]) == (4, 0)


def test_down_and_up_again_while_closes_run_opens_new_ones_when_the_old_are_closed(
    server: LineEchoServer, slow: type[SlowToClose]
) -> None:
    with line_pool(server, slow, max_connections=3) as pool:
        lines = borrow(pool, 3)
        give_back(pool, lines[:2])
        pool.resize(1)
        pool.resize(3)
        queue = waiters(pool, 2)
        gevent.sleep(0)
        assert (pool.total, server.accepted) == (3, 3)
        slow.may_close.set()
        give_back(pool, [lines[2], *(waiter.result() for waiter in queue)])
        assert (server.accepted, server.most) == (5, 3)
        check_is_whole(pool)


def test_the_same_size_again_changes_nothing(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2, max_connections=2) as pool:
        before = pool.stats()
        with nobody_else_runs():
            pool.resize(2)
        assert pool.stats() == before
        assert pool._lane_in
        assert pool._lane_out is pool._warm


def test_the_lanes_are_open_again_when_the_surplus_is_gone(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=3) as pool:
        lines = borrow(pool, 3)
        pool.resize(1)
        give_back(pool, lines)
        server.wait_open(1)
        gevent.sleep(0)
        assert pool._lane_in
        assert pool._lane_out is pool._warm
        check_is_whole(pool)


def test_resizing_a_closed_pool_is_harmless(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=2)
    [line] = borrow(pool, 1)
    pool.close()
    pool.resize(1)
    pool.resize(5)
    with pytest.raises(PoolClosedError):
        pool.acquire(timeout=BOUND)
    pool.release(line)
    server.wait_open(0)
    assert (pool.total, pool.faults()) == (0, [])


# resize: dials under way


def test_g1_dials_that_are_too_many_when_they_end_are_closed_and_those_they_were_for_served_in_order(
    dials: Dials,
) -> None:
    with dials.pool(max_connections=3) as pool:
        queue = waiters(pool, 3)
        dials.wait(3)
        pool.resize(1)
        for dial in dials:
            dial.go_on()
        serves_in_turn(pool, queue)
        dials.server.wait_open(1)
        assert (pool.stats().closed["shrunk"], pool.size, dials.server.accepted) == (2, 1, 3)
        assert len(dials) == 3
        check_is_whole(pool)


def test_a_dial_that_fails_in_a_pool_that_shrank_is_told_to_whom_it_was_for(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        queue = waiters(pool, 2)
        dials.wait(2)
        pool.resize(1)
        dials[0].go_on(OSError("refused"))
        assert str(queue[0].result()) == "refused"
        dials[1].go_on()
        pool.release(queue[1].result())
        assert pool.stats().closed["shrunk"] == 0
        check_is_whole(pool)


def test_down_and_up_again_during_dials_wastes_none(dials: Dials) -> None:
    with dials.pool(max_connections=3) as pool:
        queue = waiters(pool, 3)
        dials.wait(3)
        pool.resize(1)
        pool.resize(3)
        for dial, waiter in zip(dials, queue, strict=True):
            dial.go_on()
            assert waiter.result() is dial
        give_back_all(pool, dials)
        assert (pool.idle, len(dials)) == (3, 3)


def test_by_the_rule_of_016_who_lost_his_slot_to_a_smaller_cap_waits_no_longer_than_others(dials: Dials) -> None:
    with dials.pool(max_connections=2, max_connecting=1) as pool:
        first = Attempt(pool.acquire, timeout=None)
        second = Attempt(pool.acquire, 1)  # he has a slot, so that he would wait for his dial as long as it takes
        dials.wait(1)
        pool.resize(1)
        dials[0].go_on()
        held = first.result()
        assert isinstance(second.result(), PoolExhaustedError)
        pool.release(held)
        check_is_whole(pool)


# pause and resume


def test_g5_who_asks_while_the_pool_is_paused_is_served_in_order_by_what_idles_and_by_new_ones(dials: Dials) -> None:
    with dials.pool(max_connections=3) as pool:
        first = Attempt(pool.acquire, timeout=None)
        dials.wait(1)
        dials[0].go_on()
        pool.release(first.result())
        with nobody_else_runs():
            pool.pause()
        queue = waiters(pool, 4)
        dials.wait(1)
        assert pool.faults() == []
        with nobody_else_runs():
            pool.resume()
        assert queue[0].result() is dials[0]
        dials.wait(3)
        dials[2].go_on()
        dials[1].go_on()
        assert (queue[1].result(), queue[2].result()) == (dials[2], dials[1])
        assert not queue[3].ready()
        pool.release(dials[1])
        assert queue[3].result() is dials[1]
        give_back_all(pool, dials)
        check_is_whole(pool)


def test_a_paused_pool_dials_nothing(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=3, min_idle=2) as pool:
        pool.wait_ready(BOUND)
        lines = borrow(pool, 2)
        wait_for(lambda: pool.idle == 1)  # the third, since min_idle is short
        pool.pause()
        queue = waiters(pool, 3)
        for line in lines:
            pool.drop(line)  # there is room, and somebody waits, and min_idle is short
        pool.clear()
        server.wait_open(0)
        pool._upkeep.tend(pool)
        gevent.sleep(0)
        assert (server.accepted, pool.total, pool.waiting) == (3, 0, 3)
        pool.resume()
        give_back(pool, [waiter.result() for waiter in queue])
        assert server.accepted == 6
        check_is_whole(pool)


def test_what_is_borrowed_while_the_pool_is_paused_returns_as_usual(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=3) as pool:
        lines = borrow(pool, 2)
        with pool.connection() as third:
            pool.pause()
            queue = waiters(pool, 1)
            assert third.ask("third") == "third"
            pool.release(lines[0])
        assert (pool.idle, pool.in_use, pool.waiting, queue[0].ready()) == (2, 1, 1, False)
        assert pool.faults() == []
        with pytest.raises(KeyError):
            try:
                raise KeyError
            finally:
                pool.release(lines[1])  # discarded
        server.wait_open(2)
        pool.resume()
        assert queue[0].result() is third  # the last one that was used
        pool.release(third)
        assert (server.accepted, pool.idle) == (3, 2)
        check_is_whole(pool)


@pytest.mark.parametrize("options", [{}, WATCHED], ids=["plain", "watched"])
def test_a_block_that_is_open_across_a_pause_and_a_resume_ends_as_usual(
    server: LineEchoServer, options: dict[str, Any]
) -> None:
    with line_pool(server, max_connections=1, **options) as pool:
        with pool.connection() as line:
            pool.pause()
            [waiter] = waiters(pool, 1)
            pool.resume()
            assert not waiter.ready()
            assert line.ask("mine") == "mine"
        assert waiter.result() is line
        pool.release(line)
        check_is_whole(pool)


def test_time_runs_while_the_pool_is_paused_and_the_error_says_so(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, acquire_timeout=0.01, name="orders") as pool:
        pool.pause()
        for options in ({}, {"timeout": 0.01}, {"retry": 0}):
            with pytest.raises(PoolExhaustedError, match=r"'orders' .*1 idle.*paused: resume\(\)") as raised:
                pool.acquire(**options)
            assert raised.value.waited < BOUND
        with pytest.raises(PoolExhaustedError, match="paused"), pool.connection(timeout=0.01):
            pass
        assert (pool.waiting, pool.idle, server.accepted) == (0, 1, 1)
        pool.resume()
        with pool.connection() as line:
            assert line.ask("again") == "again"


def test_by_the_rule_of_016_time_runs_too(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2, initial_connections=1) as pool:
        pool.pause()
        for retry in (0, 1):
            with pytest.raises(PoolExhaustedError, match="paused"):
                pool.acquire(retry)
        pool.resume()
        check_is_whole(pool)


def test_who_cannot_wait_is_refused_by_a_paused_pool_at_once(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2) as pool:
        pool.pause()
        with nobody_else_runs():
            with pytest.raises(PoolExhaustedError, match="paused"):
                pool.acquire(timeout=0)
            with pytest.raises(PoolExhaustedError, match="paused"), pool.connection(timeout=0):
                pass
        pool.resume()
        with nobody_else_runs():
            pool.release(pool.acquire(timeout=0))


def test_who_gave_up_or_was_killed_during_a_pause_is_passed_over(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=1) as pool:
        pool.pause()
        queue = waiters(pool, 4)
        queue[0].greenlet.kill()
        queue[2].greenlet.kill()
        assert (pool.waiting, pool.faults()) == (2, [])
        pool.resume()
        serves_in_turn(pool, [queue[1], queue[3]])
        check_is_whole(pool)


def test_g5_nobody_barges_in_when_the_pool_resumes(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=1) as pool:
        pool.pause()
        [waiter] = waiters(pool, 1)
        pool.resume()
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)  # the waiter has not run yet
        line = waiter.result()
        pool.release(line)
        check_is_whole(pool)


def test_who_is_killed_with_a_grant_in_his_hand_leaves_it_to_the_next(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=1) as pool:
        pool.pause()
        queue = waiters(pool, 2)
        queue[0].greenlet.kill(block=False)
        pool.resume()
        pool.release(queue[1].result())
        check_is_whole(pool)
        assert server.accepted == 1


def test_paused_again_before_those_who_were_granted_ran(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=2) as pool:
        pool.pause()
        queue = waiters(pool, 2)
        pool.resume()
        pool.pause()
        line = queue[0].result()  # what was granted is granted
        pool.release(line)
        gevent.sleep(0)
        assert (queue[1].ready(), pool.faults()) == (False, [])
        pool.resume()
        pool.release(queue[1].result())
        check_is_whole(pool)


def test_pausing_twice_is_pausing_once(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1) as pool:
        pool.resume()  # nothing to resume
        pool.pause()
        pool.pause()
        assert "paused" in repr(pool)
        [waiter] = waiters(pool, 1)
        pool.resume()
        pool.release(waiter.result())
        pool.resume()
        assert "paused" not in repr(pool)
        assert pool._lane_out is pool._warm
        pool.resize(1)
        check_is_whole(pool)


def test_a_dial_that_ends_during_a_pause_idles_until_the_pool_resumes(dials: Dials) -> None:
    with dials.pool(max_connections=2, max_connecting=1) as pool:
        queue = waiters(pool, 2)
        dials.wait(1)
        pool.pause()
        dials[0].go_on()
        dials.wait(1)
        assert (pool.idle, pool.waiting, pool.faults()) == (1, 2, [])
        pool.resume()
        assert queue[0].result() is dials[0]
        dials.wait(2)
        dials[1].go_on()
        assert queue[1].result() is dials[1]
        give_back_all(pool, dials)
        check_is_whole(pool)


def test_a_dial_that_fails_during_a_pause_is_told_to_whom_it_was_for(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        queue = waiters(pool, 2)
        dials.wait(2)
        pool.pause()
        dials[1].go_on(OSError("refused"))
        assert str(queue[1].result()) == "refused"
        dials[0].go_on()
        assert not queue[0].ready()
        pool.resume()
        assert queue[0].result() is dials[0]
        pool.release(dials[0])


def test_by_the_rule_of_016_who_has_nothing_of_his_dial_for_a_pause_waits_no_longer_than_others(dials: Dials) -> None:
    with dials.pool(max_connections=1) as pool:
        waiter = Attempt(pool.acquire, 1)
        dials.wait(1)
        pool.pause()
        dials[0].go_on()
        error = waiter.result()
        assert isinstance(error, PoolExhaustedError)
        assert "paused" in str(error)
        pool.resume()
        check_is_whole(pool)


def test_who_waits_for_a_paused_pool_to_be_ready_is_told_why_it_is_not(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=1, max_connections=1) as pool:
        pool.wait_ready(BOUND)
        pool.pause()
        pool.wait_ready(0)
        pool.clear()
        with pytest.raises(PoolExhaustedError, match=r"0 of min_idle=1 .*paused: resume\(\)"):
            pool.wait_ready(0.01)
        ready = Attempt(pool.wait_ready, BOUND)
        pool.resume()
        assert ready.result() is None
        check_is_whole(pool)


def test_g4_g5_what_died_during_a_pause_costs_those_who_waited_neither_slots_nor_their_places(
    server: LineEchoServer,
) -> None:
    """PgBouncer's reason to pause: the server is restarted, and nobody fails."""
    with line_pool(server, max_connections=2, check_after_idle=0) as pool:
        lines = borrow(pool, 2)
        give_back(pool, lines)
        pool.pause()
        queue = waiters(pool, 3)
        for line in lines:
            line.healthy = False
        pool.resume()
        served = [queue[0].result(), queue[1].result()]
        assert not set(map(id, served)) & set(map(id, lines))
        assert not queue[2].ready()
        pool.release(served[0])
        assert queue[2].result() is served[0]
        give_back(pool, served)
        assert (pool.stats().closed["stale"], pool.stats().acquired) == (2, 5)
        check_is_whole(pool)
        assert server.most == 2


@pytest.mark.parametrize("ending", ["clear", "drop", "is unhealthy", "kill"])
def test_g4_g5_what_goes_while_he_who_was_granted_it_looks_at_it_is_replaced(
    server: LineEchoServer, ending: str
) -> None:
    looking, may_say = Event(), Event()

    class Thorough(Line):
        def check(self) -> bool:
            looking.set()
            assert may_say.wait(BOUND)
            return super().check()

    with line_pool(server, Thorough, initial_connections=1, max_connections=1, check_after_idle=0) as pool:
        [line] = [member.connection for member in pool._members.values()]
        pool.pause()
        queue = waiters(pool, 2)
        pool.resume()
        assert looking.wait(BOUND)
        if ending == "clear":
            going = Attempt(pool.clear)
        elif ending == "drop":
            going = Attempt(pool.drop, line)
        elif ending == "is unhealthy":
            line.healthy = False
        else:
            queue.pop(0).greenlet.kill()
        may_say.set()
        serves_in_turn(pool, queue)
        if ending in ("clear", "drop"):
            assert going.result() is None
        assert (server.accepted, server.most, line.is_connected()) == (2, 1, False)
        check_is_whole(pool)


def test_a_server_that_hangs_up_on_everybody_during_a_pause_fails_nobody(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=3) as pool:
        stop = Event()

        def use() -> None:
            while not stop.is_set():
                with pool.connection(timeout=BOUND) as line:
                    assert line.ask("hello") == "hello"

        users = [gevent.spawn(use) for _ in range(6)]
        for _ in range(5):
            wait_for(lambda: pool.in_use == 3)
            pool.pause()
            wait_for(lambda: pool.in_use == 0)
            server.hang_up()
            pool.clear()
            accepted = server.accepted
            wait_for(lambda: pool.waiting == 6)
            assert server.accepted == accepted
            pool.resume()
        stop.set()
        gevent.joinall(users, timeout=BOUND, raise_error=True)
        assert server.most <= 3
        check_is_whole(pool)


def test_a_paused_pool_can_be_looked_after(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=4, max_connections=4) as pool:
        lines = borrow(pool, 4)
        give_back(pool, lines)
        pool.pause()
        [waiter] = waiters(pool, 1)
        lines[0].expired = True
        pool.drop_expired()
        pool.drop(lines[1])
        pool.resize(1)
        server.wait_open(1)
        assert (pool.idle, pool.size, waiter.ready(), pool.faults()) == (1, 1, False, [])
        closed = pool.stats().closed
        assert (closed["expired"], closed["dropped"], closed["shrunk"]) == (1, 1, 1)
        pool.resume()
        pool.release(waiter.result())
        check_is_whole(pool)
        assert server.accepted == 4


def test_closing_a_paused_pool_tells_those_who_wait(server: LineEchoServer) -> None:
    pool = line_pool(server, initial_connections=2, max_connections=3)
    [held] = borrow(pool, 1)
    pool.pause()
    queue = waiters(pool, 3)
    pool.close()
    for waiter in queue:
        assert isinstance(waiter.result(), PoolClosedError)
    server.wait_open(1)
    with nobody_else_runs(), pytest.raises(PoolClosedError):
        pool.acquire(timeout=BOUND)
    pool.release(held)
    server.wait_open(0)
    pool.resume()
    pool.pause()
    gevent.sleep(0)
    assert (pool.total, pool.waiting, server.accepted, pool.faults()) == (0, 0, 2, [])


# max_waiting


def test_during_a_pause_all_who_wait_count_and_one_too_many_is_refused_at_once(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=5, max_waiting=2) as pool:
        pool.pause()
        queue = waiters(pool, 2)
        with nobody_else_runs(), pytest.raises(PoolExhaustedError, match="max_waiting=2.*paused"):
            pool.acquire(timeout=BOUND)
        assert pool.waiting == 2
        pool.resume()
        give_back(pool, [waiter.result() for waiter in queue])
        check_is_whole(pool)


def test_a_pool_in_which_nobody_may_wait_refuses_everybody_while_paused(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, max_connections=2, max_waiting=0) as pool:
        pool.pause()
        with nobody_else_runs(), pytest.raises(PoolExhaustedError, match="paused"):
            pool.acquire(timeout=BOUND)
        pool.resume()
        check_is_whole(pool)


# close(timeout): a drain


@pytest.mark.parametrize("options", [{}, WATCHED], ids=["plain", "watched"])
def test_g11_a_drain_ends_when_the_last_borrower_has_given_back(
    server: LineEchoServer, options: dict[str, Any]
) -> None:
    pool = line_pool(server, initial_connections=3, max_connections=3, **options)
    lines = borrow(pool, 2)
    draining = Attempt(pool.close, 1000)
    server.wait_open(2)  # what idled is closed
    assert [line.ask("to the end") for line in lines] == ["to the end"] * 2
    pool.release(lines[0])
    server.wait_open(1)
    assert not draining.ready()
    pool.release(lines[1])
    assert draining.result() is None
    assert (pool.total, pool.stats().closed["closed"], server.open) == (0, 3, 0)


def test_g11_a_drain_waits_for_closes_that_take_their_time(server: LineEchoServer, slow: type[SlowToClose]) -> None:
    pool = line_pool(server, slow)
    [line] = borrow(pool, 1)
    draining = Attempt(pool.close, 1000)
    pool.release(line)
    gevent.sleep(0)
    assert (draining.ready(), pool.size, pool.total) == (False, 0, 1)
    slow.may_close.set()
    assert draining.result() is None
    assert (server.open, pool.total) == (0, 0)


def test_g11_a_drain_of_a_pool_of_which_nothing_is_borrowed_waits_for_nothing(server: LineEchoServer) -> None:
    pool = line_pool(server, initial_connections=2)
    pool.close(1000)
    server.wait_open(0)
    with nobody_else_runs():
        pool.close(1000)
        pool.close(0)
    unused = line_pool(server)
    with nobody_else_runs():
        unused.close(1000)


def test_g11_those_who_wait_are_told_when_a_drain_begins_and_not_when_it_ends(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=1)
    [line] = borrow(pool, 1)
    queue = [*waiters(pool, 2), Attempt(pool.acquire, retry=1000)]
    draining = Attempt(pool.close, 1000)
    for waiter in queue:
        assert isinstance(waiter.result(), PoolClosedError)
    with nobody_else_runs(), pytest.raises(PoolClosedError):
        pool.acquire(timeout=BOUND)
    assert not draining.ready()
    pool.release(line)
    assert draining.result() is None


@pytest.mark.parametrize("error", [None, OSError("refused")], ids=["success", "failure"])
def test_g11_a_drain_waits_for_dials(dials: Dials, logged: Logged, error: OSError | None) -> None:
    pool = dials.pool()
    queue = waiters(pool, 2)
    dials.wait(2)
    draining = Attempt(pool.close, 1000)
    for waiter in queue:
        assert isinstance(waiter.result(), PoolClosedError)
    dials[0].go_on()
    dials.server.wait_open(0)
    assert not draining.ready()
    dials[1].go_on(error)
    assert draining.result() is None
    assert (pool.total, dials.server.open) == (0, 0)
    logged.take(1 if error else 0)


def use_up_to_the_end(pool: Pool[Line], line: Line) -> None:
    with pytest.raises(OSError):
        line.recv()  # closed under its hands
    with pytest.raises(OSError):
        line.send(b"too late")


def by_hand(pool: Pool[Line], inside: Callable[[Pool[Line], Line], None]) -> None:
    line = pool.acquire(timeout=BOUND)
    inside(pool, line)
    pool.release(line)
    with pytest.raises(ConnectionNotFoundError):
        pool.release(line)


def by_hand_and_dropped(pool: Pool[Line], inside: Callable[[Pool[Line], Line], None]) -> None:
    line = pool.acquire(timeout=BOUND)
    inside(pool, line)
    pool.drop(line)
    with pytest.raises(ConnectionNotFoundError):
        pool.drop(line)


def by_block(pool: Pool[Line], inside: Callable[[Pool[Line], Line], None]) -> None:
    with pool.connection(timeout=BOUND) as line:
        inside(pool, line)


def by_block_that_fails(pool: Pool[Line], inside: Callable[[Pool[Line], Line], None]) -> None:
    with pytest.raises(OSError), pool.connection(timeout=BOUND) as line:
        inside(pool, line)
        line.recv()


@pytest.mark.parametrize("how", [by_hand, by_hand_and_dropped, by_block, by_block_that_fails])
@pytest.mark.parametrize("timeout", [0, 0.01])
@pytest.mark.parametrize("options", [{}, WATCHED], ids=["plain", "watched"])
def test_g11_when_the_time_is_over_what_is_still_borrowed_is_closed_under_its_borrowers_hands(
    server: LineEchoServer, how: Callable[..., None], timeout: float, options: dict[str, Any]
) -> None:
    """He has an error from his socket, and giving it back is no mistake of his."""
    pool = line_pool(server, max_connections=2, **options)
    borrowers = [Attempt(how, pool, use_up_to_the_end) for _ in range(2)]
    wait_for(lambda: pool.in_use == 2)
    gevent.sleep(0)
    pool.close(timeout)
    assert (pool.total, pool.size, pool.holders(), server.open) == (0, 0, [], 0)
    for borrower in borrowers:
        assert borrower.result() is None
    closed = pool.stats().closed
    assert (closed["closed"], sum(closed.values()), pool.faults()) == (2, 2, [])


def test_g11_the_time_over_what_has_come_back_meanwhile_is_left_in_peace(server: LineEchoServer) -> None:
    pool = line_pool(server)
    quick, slow = borrow(pool, 2)
    draining = Attempt(pool.close, 0.02)
    pool.release(quick)
    assert draining.result() is None
    assert (pool.total, quick.is_connected(), slow.is_connected()) == (0, False, False)
    pool.release(slow)
    with pytest.raises(ConnectionNotFoundError):
        pool.release(quick)


def test_g11_who_drains_a_pool_of_which_he_has_borrowed_himself_takes_it_from_himself(server: LineEchoServer) -> None:
    pool = line_pool(server)
    with pool.connection() as line:
        assert line.ask("mine") == "mine"
        pool.close(0.01)
        assert not line.is_connected()
    assert pool.total == 0


def test_g11_a_dial_that_outlasts_a_drain_is_closed_when_it_ends(dials: Dials) -> None:
    pool = dials.pool()
    [waiter] = waiters(pool, 1)
    dials.wait(1)
    pool.close(0.01)
    assert isinstance(waiter.result(), PoolClosedError)
    assert pool.stats().opening == 1
    dials[0].go_on()
    dials.server.wait_open(0)
    assert pool.total == 0


def test_g11_a_pool_that_is_closed_can_be_drained_still(server: LineEchoServer) -> None:
    pool = line_pool(server)
    one, other = borrow(pool, 2)
    pool.close()
    draining = Attempt(pool.close, 1000)
    pool.release(one)
    server.wait_open(1)
    assert not draining.ready()
    assert other.ask("still mine") == "still mine"
    pool.release(other)
    assert draining.result() is None
    assert pool.total == 0


def test_g11_draining_side_by_side_the_least_patient_ends_it_for_all(server: LineEchoServer) -> None:
    pool = line_pool(server)
    lines = borrow(pool, 2)
    draining = [Attempt(pool.close, 1000), Attempt(pool.close, 1000)]
    pool.close()  # waits for nobody
    assert [line.ask("still mine") for line in lines] == ["still mine"] * 2
    pool.close(0)
    assert [one.result() for one in draining] == [None, None]
    assert (pool.total, pool.stats().closed["closed"]) == (0, 2)
    give_back(pool, lines)


def test_g11_draining_side_by_side_all_are_done_when_the_last_one_came_back(server: LineEchoServer) -> None:
    pool = line_pool(server)
    [line] = borrow(pool, 1)
    draining = [Attempt(pool.close, seconds) for seconds in (1000, 500, 2000)]
    assert [one.ready() for one in draining] == [False] * 3
    pool.release(line)
    assert [one.result() for one in draining] == [None] * 3


@pytest.mark.parametrize("stop", [gevent.GreenletExit, gevent.Timeout])
def test_g11_a_drain_that_is_interrupted_leaves_a_closed_pool_and_its_borrowers_in_peace(
    server: LineEchoServer, stop: type[BaseException]
) -> None:
    pool = line_pool(server, initial_connections=3)
    lines = borrow(pool, 2)
    stopped: list[type[BaseException]] = []

    def drain() -> None:
        try:
            pool.close(1000)
        except BaseException as error:
            stopped.append(type(error))

    draining = gevent.spawn(drain)
    server.wait_open(2)
    draining.kill(stop, timeout=BOUND)
    assert stopped == [stop]
    assert pool.closed
    assert [line.ask("still mine") for line in lines] == ["still mine"] * 2
    give_back(pool, lines)
    server.wait_open(0)
    gevent.sleep(0)
    assert (pool.total, pool.faults()) == (0, [])
    with nobody_else_runs():
        pool.close(1000)


def test_g11_a_timeout_around_a_drain_ends_the_waiting_alone(server: LineEchoServer) -> None:
    pool = line_pool(server)
    [line] = borrow(pool, 1)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        pool.close(1000)
    assert line.ask("still mine") == "still mine"
    pool.release(line)
    server.wait_open(0)


def test_g11_who_was_granted_one_and_has_not_run_yet_is_told_too(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=1)
    [line] = borrow(pool, 1)
    [waiter] = waiters(pool, 1)
    pool.release(line)
    pool.close(0)  # before he ran
    assert isinstance(waiter.result(), PoolClosedError)
    assert (pool.total, pool.faults()) == (0, [])


def test_g11_what_is_being_reset_when_the_time_is_over_is_closed(server: LineEchoServer, logged: Logged) -> None:
    class Resetting(Line):
        def reset(self) -> None:
            self.recv()  # nothing comes

    pool = line_pool(server, Resetting)
    [line] = borrow(pool, 1)
    releasing = Attempt(pool.release, line)
    pool.close(0.01)
    assert releasing.result() is None
    assert logged.take() == []  # that the reset fails is the pool's own doing
    assert (pool.total, pool.stats().closed["closed"], pool.faults()) == (0, 1, [])


def test_g11_what_is_being_looked_at_when_the_time_is_over_is_closed(server: LineEchoServer) -> None:
    looking = Event()

    class Thorough(Line):
        def is_expired(self) -> bool:
            looking.set()
            with pytest.raises(OSError):
                self.recv()
            return False

    pool = line_pool(server, Thorough, initial_connections=1)
    reaping = Attempt(pool.drop_expired)
    assert looking.is_set()
    pool.close(0.01)
    assert reaping.result() is None
    assert (pool.total, pool.faults()) == (0, [])


def test_g11_a_paused_pool_is_drained_like_any_other(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=2)
    [line] = borrow(pool, 1)
    pool.pause()
    [waiter] = waiters(pool, 1)
    draining = Attempt(pool.close, 1000)
    assert isinstance(waiter.result(), PoolClosedError)
    pool.release(line)
    assert draining.result() is None


def test_g11_a_pool_that_shrank_is_drained_like_any_other(server: LineEchoServer) -> None:
    pool = line_pool(server, max_connections=3)
    lines = borrow(pool, 3)
    pool.resize(1)
    draining = Attempt(pool.close, 1000)
    give_back(pool, lines)
    assert draining.result() is None
    assert pool.total == 0


def test_g9_what_was_taken_from_its_borrower_does_not_keep_a_pool_alive(server: LineEchoServer) -> None:
    pool = line_pool(server)
    [line] = borrow(pool, 1)
    pool.close(0)
    gone = weakref.ref(pool)
    del pool
    gevent.sleep(0)  # lets the greenlet that closed it end
    gc.collect()
    assert gone() is None
    assert not line.is_connected()


# All at once


@pytest.mark.parametrize("options", [{}, WATCHED, {"min_idle": 2, **WATCHED}], ids=["plain", "watched", "warm"])
def test_g1_g2_g4_bounds_that_move_at_random_under_load_and_random_kills(
    server: LineEchoServer, rng: random.Random, options: dict[str, Any]
) -> None:
    most = 8
    pool = line_pool(server, max_connections=most, max_connecting=3, **options)
    using: set[int] = set()
    wrong: list[str] = []

    def use(who: int) -> None:
        for turn in range(25):
            try:
                with gevent.Timeout(rng.choice([None, None, None, 0.0005, 0.003])), pool.connection(BOUND) as line:
                    if id(line) in using:
                        wrong.append("two borrowers at once")
                    using.add(id(line))
                    try:
                        if line.ask(f"{who}.{turn}") != f"{who}.{turn}":
                            wrong.append("somebody else's reply")
                    finally:
                        using.discard(id(line))
            except gevent.Timeout:
                pass

    borrowers = [gevent.spawn(use, who) for who in range(40)]

    def move() -> None:
        while not all(user.ready() for user in borrowers):
            cap = pool.stats().max_connections
            move = rng.choice(["resize", "resize", "pause", "resume", "clear", "kill", "nothing", "nothing"])
            before = pool.total
            if move == "resize":
                pool.resize(cap := rng.randint(1, most))
            elif move == "pause":
                pool.pause()
            elif move == "resume":
                pool.resume()
            elif move == "clear":
                pool.clear()
            elif move == "kill":
                rng.choice(borrowers).kill(block=False)
            if move != "clear" and pool.total > max(before, cap):
                wrong.append(f"{pool.total} sockets after {move} where {before} were, the cap is {cap}")
            wrong.extend(pool.faults())
            gevent.sleep(rng.choice([0, 0, 0.0005]))
            pool.resume()

    users: list[gevent.Greenlet[..., None]] = [gevent.spawn(move), *borrowers]
    gevent.joinall(users, timeout=5 * BOUND, raise_error=True)
    assert all(user.ready() for user in users), "somebody was never served"
    assert wrong == []
    assert server.most <= most
    pool.resume()
    pool.resize(most)
    check_is_whole(pool)
    assert pool.holders() == []
    pool.close(BOUND)
    server.wait_open(0)
    assert (pool.total, pool.faults()) == (0, [])


# A kill at every switch point: see `test_kills`


def borrowing(world: World) -> None:
    world.borrow(timeout=BOUND)
    world.borrow(timeout=BOUND)


def borrowing_while_bounds_move(world: World) -> None:
    pool = world.pool
    steps: list[Callable[[], None]] = [pool.pause, lambda: pool.resize(1), pool.resume, lambda: pool.resize(CAP)]

    def move() -> None:
        for step in steps * 2:
            step()
            gevent.sleep(0)

    moving = gevent.spawn(move)
    try:
        borrowing(world)
    finally:
        moving.join(BOUND)


def borrowing_while_it_is_drained(world: World) -> None:
    gevent.spawn(world.pool.close, 0.002)
    borrowing(world)


def never_giving_back(world: World) -> None:
    world.pool.acquire(timeout=BOUND).ask(world.text())


def resizing(world: World) -> None:
    world.borrow(timeout=BOUND)
    world.pool.resize(1)
    world.borrow(timeout=BOUND)
    world.pool.resize(CAP)
    world.borrow(timeout=BOUND)


def pausing(world: World) -> None:
    world.pool.pause()
    try:
        gevent.sleep(0)
        gevent.sleep(0)
    finally:
        world.pool.resume()
    world.borrow(timeout=BOUND)


def draining(world: World) -> None:
    world.borrow(timeout=BOUND)
    world.pool.close(BOUND)


def draining_without_patience(world: World) -> None:
    world.borrow(timeout=BOUND)
    world.pool.close(0)


def draining_while_dialling(world: World) -> None:
    gevent.sleep(0)
    world.pool.close(BOUND)


Scenario = Callable[[World], None]

#: name -> what is done, the connection's class, who is the victim, the pool's options, how many others use the pool.
SCENARIOS: dict[str, tuple[Scenario, type[KillsLine], str, dict[str, Any], int]] = {
    "a borrower that dials": (borrowing, SlowToOpen, "borrow", {}, 0),
    "a borrower that waits": (borrowing, KillsLine, "borrow", {"max_connections": 1}, 3),
    "a borrower among many": (borrowing, SlowToOpen, "borrow", {"check_after_idle": 0}, 4),
    "a borrower while bounds move": (borrowing_while_bounds_move, KillsSlowToClose, "borrow", {}, 3),
    "a borrower whose pool is drained": (borrowing_while_it_is_drained, KillsLine, "borrow", {}, 3),
    "whoever resizes": (resizing, KillsSlowToClose, "borrow", {}, 3),
    "whoever pauses": (pausing, KillsLine, "borrow", {}, 3),
    "whoever drains": (draining, KillsSlowToClose, "borrow", {}, 3),
    "whoever drains without patience": (draining_without_patience, KillsSlowToClose, "borrow", {}, 3),
    "whoever drains while dials run": (draining_while_dialling, SlowToOpen, "borrow", {}, 3),
    "a close of a drain": (draining, KillsSlowToClose, "close", {}, 2),
    "a close of a pool that shrinks": (resizing, KillsSlowToClose, "close", {}, 2),
    "a dial during a drain": (draining_while_dialling, SlowToOpen, "open", {}, 2),
    "a dial while bounds move": (borrowing_while_bounds_move, SlowToOpen, "open", {}, 2),
}
LOSERS: dict[str, tuple[Scenario, type[KillsLine], str, dict[str, Any], int]] = {
    "a borrower who never gives back": (never_giving_back, KillsSlowToClose, "borrow", {}, 3),
}


def bystander(world: World) -> None:
    for _ in range(2):
        try:
            world.borrow(timeout=BOUND)
        except (OSError, PoolExhaustedError, PoolClosedError):
            if not world.pool.closed:  # what was closed under its hands
                raise
        except Exception:
            if world.victim_does != "open":  # a dial that was killed is told to the borrower for whom it was made
                raise
        except gevent.Timeout:
            if world.victim_does != "open":
                raise


def unreported(pool: Pool[Any]) -> list[object]:
    return [] if pool._ledger is None else list(pool._ledger._unreported)


def run(knife: Knife, name: str, options: dict[str, Any]) -> None:
    scenario, kind, victim_does, more, bystanders = {**SCENARIOS, **LOSERS}[name]
    with LineEchoServer() as server, knife:
        world = World(knife, server, kind, victim_does, **options, **more)
        pool = world.pool
        others = [gevent.spawn(bystander, world) for _ in range(bystanders)]
        errors: list[BaseException] = []

        def be_the_victim() -> None:
            try:
                scenario(world)
            except AssertionError:
                raise  # a wrong reply
            except BaseException as error:
                errors.append(error)

        victim = gevent.Greenlet(be_the_victim)
        if victim_does == "borrow":
            knife.aim(victim)
        victim.start()
        victim.join(3 * BOUND)
        pool.resume()
        pool.resize(CAP)
        everybody: list[gevent.Greenlet[..., None]] = [victim, *others]
        gevent.joinall(everybody, timeout=3 * BOUND, raise_error=True)
        assert all(greenlet.successful() for greenlet in everybody), "somebody was never served"
        if not knife.struck and not pool.closed:
            assert errors == []
        assert pool.faults() == []
        world.serves_everybody()
        assert (pool.faults(), pool.holders(), unreported(pool)) == ([], [], [])
        assert server.most <= CAP, f"the server saw {server.most} sockets, the cap is {CAP}"
        if name not in LOSERS:
            assert pool.stats().closed["reclaimed"] == 0
        pool.close(BOUND)
        server.wait_open(0)
        wait_for(lambda: not pool._drains)
        assert (pool.faults(), pool.size, pool.stats().opening, pool.total) == ([], 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[pytest.param(name, {}, id=name) for name in SCENARIOS],
        *[pytest.param(name, WATCHED, id=f"{name}, watched") for name in (*SCENARIOS, *LOSERS)],
    ],
)
@pytest.mark.parametrize("thrown", THROWN)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
def test_g1_g3_g4_g11_a_kill_at_any_switch_point_while_bounds_move_costs_nobody_else_anything(
    name: str, options: dict[str, Any], thrown: str, when: str, logged: Logged
) -> None:
    point = 0
    while True:  # until there are no more: how many there are depends on how replies and moves fall together
        point += 1
        knife = Knife(point, when, THROWN[thrown])
        try:
            run(knife, name, options)
        except BaseException as error:
            raise AssertionError(f"{name}: {thrown} at switch point {point}, {when}") from error
        if not knife.struck:
            break
    assert point > 1, "the scenario has no switch point: it proves nothing"
    records = logged.take()
    if name in LOSERS:
        assert all("ended without releasing" in record.getMessage() for record in records)
    else:
        assert len(records) <= point  # G12: a dial or a close that was killed is logged once

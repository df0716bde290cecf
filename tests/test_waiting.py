"""Whoever waits as long as the pool's own rule says shares one timer with all who do."""

from __future__ import annotations

import gc
import logging
import random
import time
from typing import Any

import gevent
import pytest

from gsocketpool import Pool, PoolExhaustedError
from tests.dials import BOUND
from tests.lines import Line, borrow, give_back, line_pool
from tests.servers import LineEchoServer


def timers() -> int:
    """How many timers there are, running or not."""
    gc.collect()
    kind = type(gevent.get_hub().loop.timer(1))
    return sum(isinstance(each, kind) for each in gc.get_objects())


def waiters(pool: Pool[Line], count: int, **acquiring: Any) -> list[gevent.Greenlet[..., Any]]:
    """Their value is what they got: a connection, or the error."""

    def wait() -> Line | PoolExhaustedError:
        try:
            return pool.acquire(**acquiring)
        except PoolExhaustedError as error:
            return error

    found = [gevent.spawn(wait) for _ in range(count)]
    gevent.sleep(0)
    return found


def join(greenlets: list[gevent.Greenlet[..., Any]]) -> None:
    assert len(gevent.joinall(greenlets, timeout=BOUND)) == len(greenlets), "somebody waits for ever"


def test_everybody_s_time_is_his_own() -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1, acquire_timeout=0.15) as pool:
        held = borrow(pool, 1)
        queue = []
        for _ in range(5):
            queue += waiters(pool, 1)
            time.sleep(0.02)  # no timer goes off meanwhile: the first is still there when the last one comes
        join(queue)
        assert all(isinstance(waiter.value, PoolExhaustedError) for waiter in queue)
        assert min(waiter.get().waited for waiter in queue) >= 0.15
        assert [waiter.get().stats.waiting for waiter in queue] == [4, 3, 2, 1, 0]  # in the order of their coming
        assert (len(pool._patience), pool._patience._stop, pool.faults()) == (0, None, [])
        give_back(pool, held)


def test_who_waits_for_less_or_longer_or_for_ever_is_not_touched_by_the_others_time() -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1, acquire_timeout=1) as pool:
        held = borrow(pool, 1)
        for_ever, longer = waiters(pool, 1, timeout=None)[0], waiters(pool, 1, timeout=BOUND)[0]
        usual = waiters(pool, 3)
        shorter = waiters(pool, 1, timeout=0.01)
        join(shorter)
        assert isinstance(shorter[0].value, PoolExhaustedError)
        assert shorter[0].get().stats.waiting == 5  # all the others
        join(usual)
        assert all(isinstance(each.value, PoolExhaustedError) for each in usual)
        assert (for_ever.ready(), longer.ready(), pool.waiting) == (False, False, 2)
        give_back(pool, held)
        join([for_ever])
        give_back(pool, [for_ever.get()])
        join([longer])
        give_back(pool, [longer.get()])


def test_the_rule_of_016_with_other_numbers_has_its_own_time() -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1) as pool:
        held = borrow(pool, 1)
        usual = waiters(pool, 1)  # a second
        shorter = waiters(pool, 1, retry=1)
        join(shorter)
        assert isinstance(shorter[0].value, PoolExhaustedError)
        assert shorter[0].get().stats.waiting == 1  # the other one
        gevent.killall(usual)
        give_back(pool, held)


def test_a_thousand_wait_by_one_timer_and_then_there_is_none() -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1, acquire_timeout=BOUND) as pool:
        held = borrow(pool, 1)
        before = timers()
        queue = waiters(pool, 1000)
        assert timers() == before + 1
        give_back(pool, held)
        for waiter in queue:
            join([waiter])
            give_back(pool, [waiter.get()])
        assert (len(pool._patience), pool._patience._stop, timers()) == (0, None, before)


def test_those_who_are_killed_behind_a_patient_one_leave_nothing_behind(rng: random.Random) -> None:
    """The first of them stays for an hour: what waits behind him, and goes, must not pile up until then."""
    with LineEchoServer() as server, line_pool(server, max_connections=1, acquire_timeout=3600) as pool:
        held = borrow(pool, 1)
        first = waiters(pool, 1)
        for _ in range(50):
            crowd = waiters(pool, 100)
            rng.shuffle(crowd)
            gevent.killall(crowd[:-1])
            assert len(pool._patience) <= pool._patience._crowd + 1
            gevent.killall(crowd)
        assert len(pool._patience) <= 2 * 101 + 16
        assert len(pool._undialled) <= 3
        give_back(pool, held)
        join(first)
        give_back(pool, [first[0].get()])
        assert (len(pool._patience), pool._patience._stop, pool.faults()) == (0, None, [])


def test_g4_who_is_granted_a_connection_in_the_moment_in_which_his_time_is_over_has_it() -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1, acquire_timeout=0.2) as pool:
        held = borrow(pool, 1)
        waiter, behind = waiters(pool, 2)
        came = time.monotonic()
        patience = pool._patience

        def ring_and_release() -> None:
            # The time of the one behind, too, is over now, however much later he came.
            time.sleep(max(0.0, came + 0.2 - time.monotonic()))
            patience._ring()  # both are told that their time is over
            give_back(pool, held)

        assert patience._stop is not None
        patience._stop()
        patience._stop = pool._set_timer(0.2, ring_and_release)
        join([waiter, behind])
        assert waiter.value is held[0]
        assert isinstance(behind.value, PoolExhaustedError)
        give_back(pool, [waiter.get()])
        assert (len(pool._patience), pool._patience._stop, pool.faults()) == (0, None, [])


def test_a_pool_that_is_let_go_while_nobody_waits_any_more_is_collected() -> None:
    with LineEchoServer() as server:
        pool = line_pool(server, max_connections=1, acquire_timeout=3600)
        held = borrow(pool, 1)
        queue = waiters(pool, 10)
        gevent.killall(queue)
        give_back(pool, held)
        del pool, queue
        gc.collect()
        server.wait_open(0)


@pytest.mark.parametrize("limit", [0.001, 0.0015])
def test_a_time_as_short_as_the_hub_can_tell_ends(limit: float, caplog: pytest.LogCaptureFixture) -> None:
    with LineEchoServer() as server, line_pool(server, max_connections=1, acquire_timeout=limit) as pool:
        held = borrow(pool, 1)
        queue = waiters(pool, 20)
        join(queue)
        assert all(isinstance(each.value, PoolExhaustedError) for each in queue)
        give_back(pool, held)
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []

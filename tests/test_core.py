"""The decisions alone: no runtime, no socket, no clock."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gsocketpool.core import (
    BROKEN,
    BY_HAND,
    CLOSED,
    EXHAUSTED,
    INSPECTED,
    NOBODY,
    REASONS,
    RETIRED,
    RETURNING,
    Core,
    Member,
    Place,
    Queue,
    new_place,
)
from gsocketpool.lifetime import NEVER, Limits


class Thing:
    """A connection that claims to be equal to every other: the core must go by identity."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


def core(max_connections: int = 2, *, max_connecting: int = 2, **settings: Any) -> Core[Thing]:
    return Core(max_connections, max_connecting=max_connecting, **settings)


def place(answer: object) -> Place[Thing]:
    assert isinstance(answer, Place)
    return answer


def member(answer: object) -> Member[Thing]:
    assert isinstance(answer, Member)
    return answer


def lent(pool: Core[Thing], retire_at: float = NEVER, look_at: float = NEVER) -> Member[Thing]:
    """Dial for one borrower, and let him collect it."""
    waiter = place(pool.take(wait=True))
    assert pool.permit() is waiter
    assert pool.opened(Thing(), pool._generation, retire_at, look_at) is waiter
    return collected(waiter)


def stocked(pool: Core[Thing], count: int, retire_at: float = NEVER, look_at: float = NEVER) -> list[Member[Thing]]:
    """That many idle ones, the one that has idled longest first."""
    members = [lent(pool, retire_at, look_at) for _ in range(count)]
    for each in members:
        assert pool.give(each) is None
    return members


def queued(pool: Core[Thing], count: int) -> list[Place[Thing]]:
    return [place(pool.take(wait=True)) for _ in range(count)]


def stack(pool: Core[Thing]) -> list[Member[Thing]]:
    """What idles, the one that has idled longest first."""
    return [*pool._cold, *pool._warm]


def queue(pool: Core[Thing]) -> list[Place[Thing]]:
    return [*pool._dialled, *pool._undialled]


def collected(waiter: Place[Thing]) -> Member[Thing]:
    assert waiter.member is not None
    waiter.member.holder = BY_HAND
    return waiter.member


def sound(pool: Core[Thing]) -> bool:
    return pool.faults() == []


def test_an_empty_pool_gives_a_place_and_a_permit_to_dial() -> None:
    pool = core()
    waiter = place(pool.take(wait=True))
    assert waiter.reserved
    assert pool.permit() is waiter
    assert pool.permit() is None
    assert sound(pool)


def test_what_is_given_back_is_lent_again_last_in_first_out() -> None:
    pool = core()
    first, second = lent(pool), lent(pool)
    assert pool.give(first) is None
    assert pool.give(second) is None
    assert pool.take(wait=False) is second
    assert pool.take(wait=False) is first
    assert pool.take(wait=False) is EXHAUSTED


def test_fifo_lends_what_idled_longest() -> None:
    pool = core(fifo=True)
    first, second = lent(pool), lent(pool)
    pool.give(first)
    pool.give(second)
    pool.cool(0.0)
    assert pool.take(wait=False) is first
    pool.give(first)
    assert pool.take(wait=False) is second


def test_a_place_that_has_no_slot_is_not_reserved() -> None:
    pool = core(1)
    lent(pool)
    assert not place(pool.take(wait=True)).reserved
    assert pool.permit() is None


def test_a_place_is_reserved_for_as_many_waiters_as_there_are_slots_even_while_no_more_dials_may_run() -> None:
    pool = core(3, max_connecting=1)
    places = [place(pool.take(wait=True)) for _ in range(4)]
    assert [p.reserved for p in places] == [True, True, True, False]


def test_g5_a_release_serves_the_waiter_who_came_first() -> None:
    pool = core(1)
    busy = lent(pool)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert pool.give(busy) is first
    assert pool.give(collected(first)) is second


def test_g5_nobody_barges_past_a_queue() -> None:
    pool = core(1)
    busy = lent(pool)
    waiter = place(pool.take(wait=True))
    assert pool.give(busy) is waiter
    assert pool.take(wait=False) is EXHAUSTED  # granted, though not collected yet


def test_g5_a_dial_that_ends_early_serves_the_first_waiter_and_the_second_inherits_the_other_dial() -> None:
    pool = core(3)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert (pool.permit(), pool.permit()) == (first, second)
    assert pool.opened(Thing()) is first
    assert sound(pool)
    assert pool.opened(Thing()) is second


def test_g4_a_waiter_whose_dial_was_used_up_by_another_dials_anew_when_the_other_one_fails() -> None:
    pool = core(2)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert (pool.permit(), pool.permit()) == (first, second)
    assert pool.opened(Thing()) is first  # the dial for `second`, in fact
    assert pool.failed(first, OSError()) is None  # `first` is served: its error concerns nobody
    assert pool.permit() is second
    assert sound(pool)


def test_a_failed_dial_is_told_to_the_waiter_for_whom_it_was_started() -> None:
    pool = core(2)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert (pool.permit(), pool.permit()) == (first, second)
    error = OSError("refused")
    kept = OSError("the same, without its frames")
    assert pool.failed(second, error, kept=kept) is second
    assert pool._last_error is kept
    assert second.error is error
    assert first.error is None
    assert pool.waiting == 1


def test_a_failed_dial_hands_its_permit_on() -> None:
    pool = core(1)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert pool.permit() is first
    assert pool.permit() is None
    pool.failed(first, OSError())
    assert pool.permit() is second


def test_g4_an_abandoned_dial_goes_to_whoever_comes_next() -> None:
    pool = core(1)
    gone = place(pool.take(wait=True))
    assert pool.permit() is gone
    assert pool.abandon(gone) is None
    late = place(pool.take(wait=True))
    assert pool.permit() is None
    assert pool.opened(Thing()) is late


def test_g4_who_leaves_the_queue_after_a_grant_gets_it_to_give_back() -> None:
    pool = core(1)
    busy = lent(pool)
    gone, next_one = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert pool.give(busy) is gone
    assert pool.abandon(gone) is busy
    assert pool.give(busy) is next_one
    assert sound(pool)


def test_a_place_left_twice_has_nothing_to_give_back() -> None:
    pool = core(1)
    waiter = place(pool.take(wait=True))
    assert pool.abandon(waiter) is None
    assert pool.abandon(waiter) is None


def test_who_leaves_after_a_grant_gets_it_once() -> None:
    pool = core(1)
    busy = lent(pool)
    (waiter,) = queued(pool, 1)
    assert pool.give(busy) is waiter
    assert pool.abandon(waiter) is busy
    assert pool.abandon(waiter) is None


def test_g5_who_was_granted_a_dead_connection_is_first_in_line_again() -> None:
    pool = core(1, max_waiting=1)
    busy = lent(pool)
    (waiter,) = queued(pool, 1)
    assert pool.give(busy) is waiter
    (later,) = queued(pool, 1)
    pool.reject(collected(waiter))
    again = place(pool.retake(wait=True))  # though as many wait as may
    assert again.reserved
    assert queue(pool) == [again, later]
    pool.freed(busy.connection)
    assert pool.permit() is again
    assert sound(pool)


def test_who_was_lent_a_dead_connection_gets_another_that_idles() -> None:
    pool = core(2)
    other, dead = stocked(pool, 2)
    assert pool.take(wait=False) is dead
    pool.reject(dead)
    assert pool.retake(wait=False) is other
    pool.reject(other)
    assert pool.retake(wait=False) is EXHAUSTED
    assert sound(pool)


def test_who_was_granted_a_dead_connection_waits_on_however_few_may_wait() -> None:
    pool = core(1, max_waiting=0)
    lent(pool)
    assert not place(pool.retake(wait=True)).reserved


def test_who_was_granted_a_dead_connection_of_a_pool_that_is_closed_now_is_told() -> None:
    pool = core(1)
    (dead,) = stocked(pool, 1)
    pool.take(wait=False)
    pool.shut()
    pool.reject(dead)
    assert pool.retake(wait=True) is CLOSED


def test_who_was_granted_a_dead_connection_waits_without_a_slot_while_the_pool_is_paused() -> None:
    pool = core(2)
    dead, _ = stocked(pool, 2)
    assert pool.take_out(dead)
    pool.hold()
    pool.reject(dead)
    waiter = place(pool.retake(wait=True))
    assert not waiter.reserved
    assert pool.unhold() == [waiter]


def test_g1_a_slot_is_free_when_the_socket_is_closed_and_not_before() -> None:
    pool = core(1)
    busy = lent(pool)
    waiter = place(pool.take(wait=True))
    pool.retire(busy, "dropped")
    assert pool.permit() is None
    pool.freed(busy.connection)
    assert pool.permit() is waiter


def test_what_is_retired_is_closed_by_one() -> None:
    pool = core(1)
    busy = lent(pool)
    assert not pool.closes(busy)
    pool.retire(busy, "dropped")
    assert pool.closes(busy)
    assert not pool.closes(busy)
    pool.freed(busy.connection)
    assert sound(pool)


def test_a_slot_that_is_being_emptied_is_reserved_for_who_waits_for_it() -> None:
    pool = core(1)
    pool.retire(lent(pool), "stale")
    assert place(pool.take(wait=True)).reserved
    assert not place(pool.take(wait=True)).reserved
    assert pool.permit() is None


def test_dropping_what_a_waiter_was_granted_puts_him_back_at_the_head_of_the_queue() -> None:
    pool = core(1)
    busy = lent(pool)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert pool.give(busy) is first
    pool.retire(busy, "dropped")
    assert first.member is None
    pool.freed(busy.connection)
    assert pool.permit() is first
    assert pool.opened(Thing()) is first
    assert pool.waiting == 1
    assert second.member is None


def test_dropping_what_a_waiter_was_granted_takes_back_the_last_promise_of_a_dial_not_his() -> None:
    pool = core(3)
    busy = lent(pool)
    first, second = place(pool.take(wait=True)), place(pool.take(wait=True))
    assert (pool.permit(), pool.permit()) == (first, second)
    assert pool.give(busy) is first
    pool.retire(busy, "dropped")
    assert sound(pool)
    assert pool.opened(Thing()) is first
    assert pool.opened(Thing()) is second


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_more_waiters_than_max_waiting_are_refused_and_those_with_a_slot_do_not_count(limit: int) -> None:
    pool = core(2, max_connecting=1, max_waiting=limit)
    answers = [pool.take(wait=True) for _ in range(2 + limit)]
    assert all(isinstance(answer, Place) for answer in answers)
    assert pool.take(wait=True) is EXHAUSTED


def test_closing_answers_what_idled_and_who_waited_and_nothing_is_lent_afterwards() -> None:
    pool = core(1)
    idle = lent(pool)
    pool.give(idle)
    assert pool.shut() == ([idle], [])
    assert pool.take(wait=True) is CLOSED
    pool.freed(idle.connection)
    assert sound(pool)


def test_what_returns_to_a_closed_pool_is_retired_and_so_is_what_its_dials_open() -> None:
    pool = core(2)
    busy = lent(pool)
    waiter = place(pool.take(wait=True))
    assert pool.permit() is waiter
    assert pool.shut() == ([], [waiter])
    assert pool.give(busy) is RETIRED
    assert pool.opened(Thing()) is RETIRED
    assert sound(pool)


def test_only_what_nobody_touched_since_the_last_tick_is_cold() -> None:
    pool = core(2)
    touched, untouched = lent(pool), lent(pool)
    pool.give(untouched)
    pool.give(touched)
    pool.cool(0.0)
    assert pool.take(wait=False) is touched
    touched.cold = False
    pool.give(touched)
    assert not touched.cold
    assert untouched.cold


def test_where_each_is_checked_each_time_what_returns_is_cold_at_once() -> None:
    pool = core(1, always_cold=True)
    (idle,) = stocked(pool, 1)
    assert idle.cold
    assert idle in pool._warm
    assert pool.take(wait=False) is idle
    idle.cold = False
    pool.give(idle)
    assert idle.cold


def test_the_reaper_reaches_the_bottom_of_the_stack_and_leaves_the_order_as_it_was() -> None:
    pool = core(3, max_connecting=3)
    members = [lent(pool) for _ in range(3)]
    for each in members:
        pool.give(each)
    for each in members:
        assert pool.inspect() is each
        assert pool.inspected(each) is None
    assert [pool.take(wait=False) for _ in range(3)] == members[::-1]


def test_the_fast_lanes_are_open_only_while_there_is_nothing_to_decide() -> None:
    pool = core(1)
    busy = lent(pool)
    assert pool._lane_in
    waiter = place(pool.take(wait=True))
    assert not pool._lane_in
    pool.abandon(waiter)
    assert pool._lane_in
    pool.give(busy)
    assert pool._lane_out is pool._warm
    pool.expect_resets()
    assert not pool._lane_in
    assert not pool._lane_out
    pool.shut()
    assert not pool._lane_in
    assert not pool._lane_out


def test_a_connection_is_known_while_it_is_opened_while_it_is_pooled_and_while_it_is_closed() -> None:
    pool = core(1)
    thing = Thing()
    pool.claim(thing)
    assert pool.knows(thing)
    assert not pool.knows(Thing())
    pool.disclaim(thing)
    assert not pool.knows(thing)
    assert pool.permit_unasked()
    pool.opened(thing)
    assert pool.knows(thing)
    pool.retire(pool._members[id(thing)], "dropped")
    assert pool.knows(thing)
    pool.freed(thing)
    assert not pool.knows(thing)


# The stock of idle connections


def test_the_stock_is_dialled_for_up_to_min_idle_and_no_further() -> None:
    pool = core(5, max_connecting=5, min_idle=3)
    assert [pool.permit_spare() for _ in range(4)] == [True, True, True, False]
    for _ in range(3):
        assert pool.opened(Thing()) is None
    assert not pool.permit_spare()
    pool.take(wait=False)
    assert pool.permit_spare()


def test_a_pool_without_min_idle_dials_for_nobody() -> None:
    pool = core()
    assert not pool.permit_spare()
    queued(pool, 1)
    while pool.permit():
        pass
    assert not pool.permit_spare()


def test_the_stock_is_dialled_for_beside_the_waiters_who_will_use_up_what_is_dialled_now() -> None:
    pool = core(9, max_connecting=9, min_idle=2)
    first, second = queued(pool, 2)
    assert (pool.permit(), pool.permit()) == (first, second)
    assert [pool.permit_spare() for _ in range(3)] == [True, True, False]
    pool.abandon(first)  # his dial is for the stock now
    assert pool.opened(Thing()) is second
    assert not pool.permit_spare()


def test_the_stock_keeps_to_max_connecting_and_max_connections() -> None:
    pool = core(3, max_connecting=2, min_idle=3)
    lent(pool)
    assert [pool.permit_spare() for _ in range(3)] == [True, True, False]
    assert pool.opened(Thing()) is None
    assert not pool.permit_spare()  # there is no third place
    assert sound(pool)


def test_a_closing_connection_is_made_up_for_when_its_slot_is_free() -> None:
    pool = core(1, min_idle=1)
    (gone,) = stocked(pool, 1)
    pool.retire(gone, "stale")
    assert not pool.permit_spare()
    pool.freed(gone.connection)
    assert pool.permit_spare()


def test_what_is_being_looked_at_counts_as_idle_for_the_stock() -> None:
    pool = core(5, min_idle=2)
    stocked(pool, 2)
    looked_at = member(pool.inspect())
    assert not pool.permit_spare()
    pool.retire(looked_at, "stale")
    assert pool.permit_spare()


def test_nothing_is_dialled_for_the_stock_of_a_paused_or_a_closed_pool() -> None:
    pool = core(min_idle=1)
    pool.hold()
    assert not pool.permit_spare()
    pool.unhold()
    assert pool.permit_spare()
    pool.failed(None, OSError())
    pool.shut()
    assert not pool.permit_spare()


def test_after_a_failed_dial_for_the_stock_there_is_none_until_it_has_rested() -> None:
    pool = core(5, min_idle=2)
    assert pool.permit_spare()
    pool.failed(None, OSError(), spare=True)
    assert not pool.permit_spare()
    pool.rested()
    assert pool.permit_spare()


def test_dials_for_the_stock_that_fail_side_by_side_are_one_setback() -> None:
    pool = core(5, max_connecting=5, min_idle=3)
    for setbacks in (1, 2):
        assert [pool.permit_spare() for _ in range(4)] == [True, True, True, False]
        for _ in range(3):
            pool.failed(None, OSError(), spare=True)
        assert pool._setbacks == setbacks
        assert not pool.permit_spare()
        pool.rested()


def test_a_dial_that_a_borrower_asked_for_is_no_setback_and_is_not_held_up_by_one() -> None:
    pool = core(5, min_idle=1)
    assert pool.permit_spare()
    pool.failed(None, OSError(), spare=True)
    (waiter,) = queued(pool, 1)
    assert pool.permit() is waiter
    pool.failed(waiter, OSError())
    assert pool._setbacks == 1
    pool.rested()
    assert pool.permit_spare()


def test_a_dial_that_succeeds_ends_the_rest_and_its_setbacks() -> None:
    pool = core(5, max_connecting=5, min_idle=2)
    assert (pool.permit_spare(), pool.permit_spare()) == (True, True)
    pool.failed(None, OSError(), spare=True)
    assert pool._last_error is not None
    assert pool.opened(Thing()) is None
    assert pool._setbacks == 0
    assert pool._last_error is None
    assert pool.permit_spare()


# What expires


def test_what_idles_when_its_time_is_over_is_retired() -> None:
    pool = core()
    early, late = lent(pool, retire_at=10.0, look_at=10.0), lent(pool, retire_at=11.0, look_at=11.0)
    for each in (early, late):
        pool.give(each)
    assert pool.next_audit() == 10.0
    assert pool.audit(9.9) == []
    assert pool.audit(10.0) == [early]
    assert pool.next_audit() == 11.0
    assert pool.audit(99.0) == [late]
    assert pool.next_audit() == NEVER
    assert pool._closed_for["expired"] == 2
    assert sound(pool)


def test_what_is_in_use_when_its_time_is_over_is_doomed_and_goes_when_it_returns() -> None:
    pool = core()
    busy = lent(pool, retire_at=10.0, look_at=10.0)
    assert pool.audit(10.0) == []
    assert busy.fate == "expired"
    assert not pool._lane_in  # its release must be looked at
    assert pool.next_audit() == NEVER
    assert pool.give(busy) is RETIRED
    assert pool._closed_for["expired"] == 1
    assert pool._lane_in
    assert sound(pool)


def test_what_is_doomed_and_is_dropped_is_closed_for_that_reason_and_counts_no_more() -> None:
    pool = core()
    busy, other = lent(pool, retire_at=10.0, look_at=10.0), lent(pool)
    pool.audit(10.0)
    pool.retire(busy, "dropped")
    assert pool._closed_for["dropped"] == 1
    assert pool.give(other) is None
    assert sound(pool)


def test_the_first_reason_to_go_is_the_one_that_counts() -> None:
    pool = core(1)
    busy = lent(pool, retire_at=10.0, look_at=10.0)
    pool.retire_all()
    pool.audit(10.0)
    assert pool.give(busy) is RETIRED
    assert pool._closed_for["cleared"] == 1
    assert pool._closed_for["expired"] == 0


def test_what_idled_too_long_goes_and_min_idle_stay() -> None:
    pool = core(4, max_connecting=4, min_idle=1, limits=Limits(idle_timeout=60.0))
    members = stocked(pool, 4, look_at=60.0)
    pool.cool(0.0)
    pool.take(wait=False)
    assert pool.audit(59.0) == []
    assert pool.audit(60.0) == members[:2]
    assert stack(pool) == members[2:3]
    assert pool._closed_for["idle"] == 2
    assert sound(pool)


def test_what_is_spared_for_min_idle_is_looked_at_again_a_little_later() -> None:
    pool = core(min_idle=1, limits=Limits(idle_timeout=60.0))
    first, second = stocked(pool, 2, look_at=60.0)
    pool.cool(0.0)
    assert pool.take(wait=False) is second
    second.cold = False
    assert pool.audit(60.0) == []
    assert pool.next_audit() == pytest.approx(66.0)
    pool.give(second)
    assert pool.audit(67.0) == [first]
    assert sound(pool)


def test_idling_begins_anew_with_each_touch() -> None:
    pool = core(limits=Limits(idle_timeout=60.0))
    (touched,) = stocked(pool, 1, look_at=60.0)
    pool.cool(0.0)
    pool.take(wait=False)
    touched.cold = False
    pool.give(touched)
    assert pool.audit(60.0) == []
    pool.cool(61.0)
    assert pool.audit(120.0) == []
    assert pool.audit(120.9) == []
    assert pool.audit(121.0) == [touched]


def test_where_each_is_checked_each_time_idling_begins_anew_with_each_touch_too() -> None:
    pool = core(limits=Limits(idle_timeout=60.0), always_cold=True)
    (touched,) = stocked(pool, 1, look_at=60.0)
    pool.cool(0.0)
    pool.take(wait=False)
    pool.give(touched)
    assert touched.cold
    assert pool.audit(60.0) == []


def test_what_the_reaper_looked_at_idles_on() -> None:
    pool = core(limits=Limits(idle_timeout=60.0))
    (idle,) = stocked(pool, 1, look_at=60.0)
    pool.cool(0.0)
    assert pool.inspect() is idle
    pool.inspected(idle)
    pool.cool(30.0)
    assert pool.audit(60.0) == [idle]


def test_what_the_reaper_looked_at_before_a_tick_has_idled_since_the_tick_before_at_the_latest() -> None:
    pool = core(limits=Limits(idle_timeout=60.0))
    pool.cool(100.0)
    (idle,) = stocked(pool, 1, look_at=160.0)
    assert pool.inspect() is idle
    pool.inspected(idle)
    assert pool.audit(160.0) == [idle]


def test_what_is_taken_out_right_after_its_return_has_only_begun_to_idle() -> None:
    pool = core(limits=Limits(idle_timeout=60.0))
    (idle,) = stocked(pool, 1, look_at=60.0)
    pool.cool(0.0)
    pool.take(wait=False)
    idle.cold = False
    pool.cool(59.0)
    pool.give(idle)
    assert pool.take_out(idle)
    pool.inspected(idle)
    assert pool.audit(60.0) == []


def test_what_is_being_looked_at_is_not_retired_under_the_inspectors_hands_and_goes_soon_after() -> None:
    pool = core(limits=Limits(idle_timeout=60.0))
    (idle,) = stocked(pool, 1, look_at=60.0)
    pool.cool(0.0)
    assert pool.inspect() is idle
    assert pool.audit(60.0) == []
    pool.inspected(idle, first=True)
    assert pool.next_audit() == pytest.approx(66.0)
    assert pool.audit(66.0) == [idle]


def test_what_was_lent_max_uses_times_goes_when_it_returns() -> None:
    pool = core(1, limits=Limits(max_uses=2))
    used = lent(pool)
    assert pool.give(used) is None
    assert pool.take(wait=False) is used
    assert pool.give(used) is RETIRED
    assert pool._closed_for["expired"] == 1
    assert pool._retired_uses == 2


def test_a_use_that_was_abandoned_before_it_began_does_not_count() -> None:
    pool = core(1, limits=Limits(max_uses=2))
    used = lent(pool)
    (waiter,) = queued(pool, 1)
    assert pool.give(used) is waiter
    assert pool.abandon(waiter) is used
    assert pool.give(used) is None


def test_the_agenda_holds_each_once_however_often_it_is_looked_at() -> None:
    pool = core(3, max_connecting=3, limits=Limits(idle_timeout=10.0, keepalive=3.0))
    members = stocked(pool, 3, look_at=3.0)
    for now in range(100):
        pool.take(wait=False)
        pool.cool(float(now))
        pool.audit(float(now))
        pool.give(members[-1])
        assert sorted(id(each) for _, _, each in pool._agenda) == sorted(map(id, pool._members.values()))


def test_what_is_gone_leaves_the_agenda_in_time() -> None:
    pool = core(2)
    for _ in range(1000):
        gone = lent(pool, look_at=3600.0)
        pool.retire(gone, "dropped")
        pool.freed(gone.connection)
        assert len(pool._agenda) <= 2 * 2 + 16 + 1
    kept = [lent(pool, retire_at=7200.0 + n, look_at=7200.0 + n) for n in range(2)]
    for each in kept:
        pool.give(each)
    assert pool.audit(7199.0) == []
    assert pool.audit(7201.0) == kept


def test_the_agenda_is_in_order_after_it_was_tidied(rng: random.Random) -> None:
    for _ in range(20):
        pool = core(50)
        members = [lent(pool, retire_at=when, look_at=when) for when in rng.sample(range(1000), 50)]
        rng.shuffle(members)
        for each in members[:40]:
            pool.retire(each, "dropped")
            pool.freed(each.connection)
        late = lent(pool, retire_at=1000.0, look_at=1000.0)
        assert len(pool._agenda) == 11
        for each in [*members[40:], late]:
            pool.give(each)
        ends = [each.retire_at for each in pool.audit(2000.0)]
        assert ends == sorted(ends)
        assert len(ends) == 11


def test_an_audit_looks_at_nothing_that_is_not_due() -> None:
    pool = core(100, limits=Limits(idle_timeout=60.0))
    members = stocked(pool, 100, look_at=60.0)
    pool.cool(0.0)
    before = list(pool._agenda)
    assert pool.audit(59.9) == []
    assert pool._agenda == before
    for each in members:
        each.since = 30.0
    pool.audit(60.0)
    assert min(pool._agenda)[0] == 90.0
    tickets = pool._tickets
    for now in range(61, 90):
        assert pool.audit(float(now)) == []
    assert pool._tickets == tickets


def test_a_member_without_a_deadline_is_never_on_the_agenda() -> None:
    pool = core()
    stocked(pool, 2)
    assert not pool._agenda
    assert pool.next_audit() == NEVER
    assert pool.audit(1e9) == []


# What is asked now and then whether it is still alive


def test_what_idled_as_long_as_keepalive_is_due_once_each_time() -> None:
    pool = core(limits=Limits(keepalive=10.0))
    (idle,) = stocked(pool, 1, look_at=10.0)
    pool.cool(0.0)
    assert pool.prove() is None
    for now in (10.0, 20.0, 30.0):
        assert pool.audit(now - 0.1) == []
        assert pool.prove() is None
        assert pool.audit(now) == []
        assert pool.prove() is idle
        assert idle.holder is INSPECTED
        assert pool.take(wait=False) is EXHAUSTED
        assert pool.prove() is None
        assert pool.inspected(idle, first=True) is None


def test_what_was_used_meanwhile_need_not_be_asked() -> None:
    pool = core(limits=Limits(keepalive=10.0))
    (used,) = stocked(pool, 1, look_at=10.0)
    pool.cool(0.0)
    pool.take(wait=False)
    used.cold = False
    pool.give(used)
    pool.cool(8.0)
    pool.audit(10.0)
    assert pool.prove() is None
    assert pool.next_audit() == 18.0
    pool.audit(18.0)
    assert pool.prove() is used


def test_what_is_lent_or_closed_or_touched_when_its_turn_to_be_asked_comes_is_skipped() -> None:
    pool = core(4, max_connecting=4, limits=Limits(keepalive=10.0))
    idle, closed, touched, busy = stocked(pool, 4, look_at=10.0)
    pool.cool(0.0)
    pool.audit(10.0)
    assert (pool.take(wait=False), pool.take(wait=False)) == (busy, touched)
    touched.cold = False
    pool.give(touched)
    pool.retire(closed, "dropped")
    assert pool.prove() is idle
    assert pool.prove() is None


def test_what_was_asked_comes_back_to_where_it_was() -> None:
    pool = core(3, max_connecting=3, limits=Limits(keepalive=10.0))
    members = stocked(pool, 3, look_at=10.0)
    pool.cool(0.0)
    pool.audit(10.0)
    asked = [member(pool.prove()) for _ in range(3)]
    assert asked == members
    for each in reversed(asked):
        assert pool.inspected(each, first=True) is None
    assert stack(pool) == members
    assert sound(pool)


def test_what_was_asked_comes_back_to_where_it_was_where_uses_are_counted_too() -> None:
    pool = core(2, limits=Limits(keepalive=10.0, max_uses=9))
    oldest, youngest = stocked(pool, 2, look_at=10.0)
    pool.cool(0.0)
    pool.audit(10.0)
    assert pool.prove() is oldest
    assert pool.inspected(oldest, first=True) is None
    assert stack(pool) == [oldest, youngest]


def test_who_waits_gets_what_was_asked_when_it_comes_back() -> None:
    pool = core(1, limits=Limits(keepalive=10.0))
    (idle,) = stocked(pool, 1, look_at=10.0)
    pool.cool(0.0)
    pool.audit(10.0)
    assert pool.prove() is idle
    (waiter,) = queued(pool, 1)
    assert pool.inspected(idle, first=True) is waiter
    assert waiter.member is idle
    assert idle.uses == 2
    assert sound(pool)


def test_what_min_idle_keeps_for_ever_is_asked_however_short_the_idle_timeout() -> None:
    pool = core(min_idle=1, limits=Limits(idle_timeout=60.0, keepalive=60.0))
    (kept,) = stocked(pool, 1, look_at=60.0)
    pool.cool(0.0)
    pool.audit(60.0)
    assert pool.prove() is kept
    pool.inspected(kept, first=True)
    asked_at = []
    while (now := pool.next_audit()) < 300.0:
        assert pool.audit(now) == []
        if pool.prove() is kept:
            asked_at.append(now)
            pool.inspected(kept, first=True)
    assert asked_at == pytest.approx([120.0, 180.0, 240.0], abs=12.0)


def test_what_is_due_and_not_asked_yet_is_due_once() -> None:
    pool = core(limits=Limits(keepalive=10.0))
    (idle,) = stocked(pool, 1, look_at=10.0)
    pool.cool(0.0)
    for now in (10.0, 20.0, 30.0):
        pool.audit(now)
    assert pool.prove() is idle
    pool.inspected(idle, first=True)
    assert pool.prove() is None


def test_what_is_closed_is_due_no_more() -> None:
    pool = core(limits=Limits(keepalive=10.0))
    (idle,) = stocked(pool, 1, look_at=10.0)
    pool.cool(0.0)
    pool.audit(10.0)
    pool.retire(idle, "dropped")
    assert not pool._due


# Retiring all


def test_what_idles_is_retired_at_once_and_what_is_in_use_when_it_returns() -> None:
    pool = core(4, max_connecting=4)
    members = stocked(pool, 4)
    busy, busy_too = member(pool.take(wait=False)), member(pool.take(wait=False))
    assert pool.retire_all() == members[:2]
    assert (busy.fate, busy_too.fate) == ("cleared", "cleared")
    assert pool.give(busy) is RETIRED
    assert not pool._lane_in
    assert pool.give(busy_too) is RETIRED
    assert pool._lane_in
    assert pool._closed_for["cleared"] == 4
    assert sound(pool)


def test_what_is_reset_or_inspected_just_then_goes_when_that_is_done() -> None:
    pool = core(2)
    stocked(pool, 2)
    inspected, reset = member(pool.inspect()), member(pool.take(wait=False))
    reset.holder = RETURNING
    assert pool.retire_all() == []
    assert pool.give(reset) is RETIRED
    assert pool.inspected(inspected) is RETIRED
    assert sound(pool)


def test_a_dial_that_began_before_all_were_retired_opens_a_connection_that_is_retired() -> None:
    pool = core(2)
    waiter, later = queued(pool, 2)
    generation = pool._generation
    assert pool.permit() is waiter
    assert pool.retire_all() == []
    old = Thing()
    assert pool.opened(old, generation) is RETIRED
    assert pool._closed_for["cleared"] == 1
    assert queue(pool) == [waiter, later]
    assert not pool._dialled  # his dial is over
    assert pool.permit() is waiter
    pool.freed(old)
    assert pool.permit() is later
    assert pool.opened(Thing(), pool._generation) is waiter
    assert pool.opened(Thing(), pool._generation) is later
    assert sound(pool)


def test_what_is_opened_after_all_were_retired_stays() -> None:
    pool = core(1)
    pool.retire_all()
    (fresh,) = stocked(pool, 1)
    assert fresh.fate is None
    assert sound(pool)


def test_who_was_granted_what_is_retired_and_has_not_collected_it_waits_on_at_the_head_of_the_queue() -> None:
    pool = core(1)
    busy = lent(pool)
    first, second = queued(pool, 2)
    assert pool.give(busy) is first
    assert pool.retire_all() == [busy]
    assert first.member is None
    assert queue(pool) == [first, second]
    pool.freed(busy.connection)
    assert pool.permit() is first
    assert pool.opened(Thing(), pool._generation) is first
    assert sound(pool)


@pytest.mark.parametrize("turned", [False, True])
def test_g5_those_whose_grants_are_retired_wait_on_in_the_order_in_which_they_came(turned: bool) -> None:
    pool = core(2)
    members = [lent(pool), lent(pool)]
    first, second, third = queued(pool, 3)
    if turned:
        members.reverse()
    assert [pool.give(each) for each in members] == [first, second]
    assert set(pool.retire_all()) == set(members)
    assert queue(pool) == [first, second, third]
    assert sound(pool)


def test_retiring_all_of_a_closed_pool_leaves_nobody_waiting() -> None:
    pool = core(1)
    busy = lent(pool)
    (waiter,) = queued(pool, 1)
    assert pool.give(busy) is waiter
    pool.shut()
    assert pool.retire_all() == []
    assert pool.give(collected(waiter)) is RETIRED
    assert pool._closed_for["closed"] == 1
    assert sound(pool)


def test_who_was_granted_what_is_dropped_gets_another_that_idles() -> None:
    pool = core(2)
    pool.hold()
    (waiter,) = queued(pool, 1)
    pool.unhold()
    assert pool.permit() is waiter
    spare = Thing()
    assert pool.permit_unasked()
    assert pool.opened(Thing()) is waiter
    assert pool.opened(spare) is None
    assert pool.retire(member(waiter.member), "dropped") is None
    assert member(waiter.member).connection is spare
    assert collected(waiter).uses == 1
    assert sound(pool)


def test_who_was_granted_what_is_dropped_waits_on_while_the_pool_is_paused_though_another_idles() -> None:
    pool = core(2)
    busy, other = lent(pool), lent(pool)
    first, second = queued(pool, 2)
    assert pool.give(busy) is first
    pool.hold()
    assert pool.give(other) is None
    pool.retire(busy, "dropped")
    assert first.member is None
    assert pool.unhold() == [first]
    assert first.member is other
    assert queue(pool) == [second]
    assert sound(pool)


def test_who_must_be_told_when_what_he_was_granted_is_taken_from_a_closed_pool() -> None:
    pool = core(1)
    busy = lent(pool)
    (waiter,) = queued(pool, 1)
    assert pool.give(busy) is waiter
    assert pool.shut() == ([], [])
    assert pool.retire(busy, "dropped") is waiter
    assert waiter.member is None
    assert sound(pool)


def test_what_was_rejected_before_it_was_lent_was_not_lent() -> None:
    pool = core(1)
    stocked(pool, 1)
    pool.reject(member(pool.take(wait=False)))
    assert pool._retired_uses == 1  # of the dial's own borrower
    assert pool._closed_for["stale"] == 1


# Another cap


def test_a_higher_cap_serves_who_waits() -> None:
    pool = core(1)
    lent(pool)
    first, second = queued(pool, 2)
    assert pool.permit() is None
    assert pool.set_cap(2) == []
    assert pool.permit() is first
    assert pool.permit() is None
    assert pool.set_cap(3) == []
    assert pool.permit() is second
    assert sound(pool)


def test_a_lower_cap_closes_what_has_idled_longest_and_no_more_than_must_go() -> None:
    pool = core(5, max_connecting=5)
    members = stocked(pool, 5)
    pool.cool(0.0)
    pool.take(wait=False)
    assert pool.set_cap(3) == members[:2]
    assert pool._closed_for["shrunk"] == 2
    assert stack(pool) == members[2:4]
    assert pool.set_cap(3) == []
    assert sound(pool)


def test_what_is_in_use_beyond_a_lower_cap_goes_as_it_returns_and_the_rest_stays() -> None:
    pool = core(3, max_connecting=3)
    members = [lent(pool) for _ in range(3)]
    assert pool.set_cap(1) == []
    assert not pool._lane_in
    assert pool.give(members[0]) is RETIRED
    assert pool.give(members[1]) is RETIRED
    assert pool._lane_in
    assert pool.give(members[2]) is None
    assert pool._closed_for["shrunk"] == 2
    assert sound(pool)


def test_dials_that_hang_take_no_working_connection_away_when_the_cap_is_lower() -> None:
    pool = core(4, max_connecting=4)
    idle, busy = stocked(pool, 2)
    assert pool.take(wait=False) is busy
    assert (pool.permit_unasked(), pool.permit_unasked()) == (True, True)
    assert pool.set_cap(2) == []
    assert pool._lane_in
    assert pool.give(busy) is None
    assert stack(pool) == [idle, busy]
    assert pool.opened(Thing()) is RETIRED  # what they open is beyond it
    assert pool._closed_for["shrunk"] == 1
    assert sound(pool)


def test_a_dial_that_ends_in_time_keeps_what_it_opened_though_the_cap_is_lower() -> None:
    pool = core(3, max_connecting=3)
    waiters = queued(pool, 3)
    assert [pool.permit() for _ in range(3)] == waiters
    pool.set_cap(1)
    assert pool.opened(Thing()) is waiters[0]
    assert pool.opened(Thing()) is RETIRED
    assert pool._ceiling == 3
    assert pool.failed(waiters[1], OSError()) is waiters[1]
    assert queue(pool) == waiters[2:]
    assert sound(pool)


def test_after_a_lower_cap_nothing_is_dialled_until_there_is_room_under_it() -> None:
    pool = core(3, max_connecting=3)
    members = [lent(pool) for _ in range(3)]
    pool.set_cap(1)
    (waiter,) = queued(pool, 1)
    for each in members[:2]:
        assert pool.give(each) is RETIRED
        assert pool.permit() is None
        pool.freed(each.connection)
        assert pool.permit() is None
    pool.retire(members[2], "dropped")
    assert pool.permit() is None
    pool.freed(members[2].connection)
    assert pool.permit() is waiter


def test_who_has_lost_his_slot_to_a_lower_cap_is_told_once_and_who_keeps_it_is_not() -> None:
    pool = core(5, max_connecting=1)
    lent(pool)
    dialling, second, third, fourth = queued(pool, 4)
    assert pool.permit() is dialling
    assert pool.unreserved() == []
    pool.set_cap(4)
    assert [each.reserved for each in (dialling, second, third, fourth)] == [True, True, True, False]
    assert pool.unreserved() == [fourth]
    pool.set_cap(3)
    assert not third.reserved
    assert third in pool.unreserved()
    assert pool.unreserved() == []
    assert second.reserved


def test_who_has_lost_his_slot_to_a_connection_that_came_back_is_told() -> None:
    pool = core(2, max_connecting=1)
    busy = lent(pool)
    first, second = queued(pool, 2)
    assert first.reserved
    assert not second.reserved
    assert pool.permit() is first
    pool.set_cap(1)
    assert pool.opened(Thing()) is RETIRED
    assert queue(pool) == [first, second]
    assert not first.reserved
    assert pool.unreserved() == [first, second]
    assert pool.give(busy) is first
    assert sound(pool)


def test_whose_dial_was_used_up_by_another_keeps_his_slot_while_there_is_room() -> None:
    pool = core(2)
    first, second = queued(pool, 2)
    assert (pool.permit(), pool.permit()) == (first, second)
    assert pool.opened(Thing()) is first
    assert pool.failed(first, OSError()) is None
    assert second in pool._undialled
    assert second.reserved
    assert pool.unreserved() == []


def test_the_ceiling_of_a_pool_that_shrinks_only_falls() -> None:
    pool = core(4, max_connecting=4)
    members = [lent(pool) for _ in range(3)]
    assert pool.permit_unasked()
    ceilings = []
    pool.set_cap(1)
    ceilings.append(pool._ceiling)
    pool.failed(None, OSError())
    ceilings.append(pool._ceiling)
    for each in members:
        pool.retire(each, "dropped")
        assert pool._ceiling == ceilings[-1]  # not before it is closed
        pool.freed(each.connection)
        ceilings.append(pool._ceiling)
    assert ceilings == [4, 3, 2, 1, 1]
    assert sound(pool)


def test_a_cap_that_grows_again_keeps_what_has_not_come_back_yet() -> None:
    pool = core(2)
    members = [lent(pool) for _ in range(2)]
    pool.set_cap(1)
    pool.set_cap(2)
    assert [pool.give(each) for each in members] == [None, None]
    assert pool._lane_in
    assert sound(pool)


def test_who_leaves_the_queue_is_passed_over_and_not_kept() -> None:
    line: Queue[Thing] = Queue()
    places = [new_place() for _ in range(100)]
    for each in places:
        line.join(each)
    line.leave(places[0])
    assert (line[0], line.left, line.length) == (places[1], 0, 99)  # the first is taken out
    for each in places[2:40]:
        line.leave(each)
    assert (len(line), line.left, line.length) == (99, 38, 61)
    assert list(line) == [places[1], *places[40:]]
    assert places[2] not in line
    assert places[40] in line
    assert (line.first(), line.first(), line.length) == (places[1], places[40], 59)
    for each in places[60:99]:
        line.leave(each)
    assert len(line) <= 2 * line.length
    assert line.last() is places[99]
    assert line.last() is places[59]
    assert list(line) == places[41:59]
    assert all(each.queue is None for each in (*places[:41], *places[59:]))


def test_as_many_as_may_be_leave_the_queue_at_a_cost_that_does_not_grow() -> None:
    line: Queue[Thing] = Queue()
    places = [new_place() for _ in range(20_000)]
    for each in places:
        line.join(each)
    steps = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal steps
        steps += event == "call"  # one for each place that is looked at, among others

    random.Random(7).shuffle(places)
    sys.setprofile(count)
    try:
        for each in places:
            line.leave(each)
    finally:
        sys.setprofile(None)
    assert (len(line), line.left, bool(line)) == (0, 0, False)
    assert steps < 12 * len(places)


def test_the_lane_to_the_queue_follows_the_cap() -> None:
    pool = core(1)
    lent(pool)
    assert pool._brimful
    pool.set_cap(2)
    assert not pool._brimful
    pool.set_cap(1)
    assert pool._brimful


# Pausing


def test_a_paused_pool_lends_nothing_and_dials_for_nobody() -> None:
    pool = core(2)
    stocked(pool, 1)
    pool.hold()
    assert not pool._lane_out
    assert pool.take(wait=False) is EXHAUSTED
    (waiter,) = queued(pool, 1)
    assert not waiter.reserved
    assert pool.permit() is None
    assert sound(pool)


def test_what_returns_to_a_paused_pool_idles_though_somebody_waits() -> None:
    pool = core(2)
    busy = lent(pool)
    pool.hold()
    dialled_for = queued(pool, 1)
    assert pool.give(busy) is None
    assert pool.idle == 1
    assert pool.waiting == 1
    assert pool.unhold() == dialled_for
    assert sound(pool)


def test_what_a_dial_opens_for_who_waits_idles_until_the_pool_goes_on() -> None:
    pool = core(1)
    (waiter,) = queued(pool, 1)
    assert pool.permit() is waiter
    pool.hold()
    assert pool.opened(Thing()) is None
    assert sound(pool)
    assert pool.unhold() == [waiter]
    assert sound(pool)


def test_g5_when_the_pool_goes_on_who_came_first_is_served_first_with_what_would_have_been_lent_first() -> None:
    pool = core(4, max_connecting=4)
    members = stocked(pool, 3)
    pool.hold()
    places = queued(pool, 4)
    assert pool.unhold() == places[:3]
    assert [each.member for each in places] == [*reversed(members), None]
    assert [each.uses for each in members] == [2, 2, 2]
    assert all(each.holder is waiter for each, waiter in zip(reversed(members), places, strict=False))
    assert pool.permit() is places[3]
    assert sound(pool)


def test_what_idled_all_through_a_pause_is_granted_cold_so_that_it_is_checked() -> None:
    pool = core(2)
    stocked(pool, 2)
    pool.cool(0.0)
    pool.hold()
    first, second = queued(pool, 2)
    pool.unhold()
    assert member(first.member).cold
    untouched = member(pool.abandon(second))
    assert pool.give(untouched) is None
    assert untouched.cold
    assert stack(pool) == [untouched]
    assert untouched in pool._cold


def test_pausing_and_going_on_twice_is_the_same_as_once() -> None:
    pool = core(1)
    pool.hold()
    pool.hold()
    assert pool.unhold() == []
    assert pool.unhold() == []
    stocked(pool, 1)
    assert pool._lane_out is pool._warm
    assert sound(pool)


def test_as_many_wait_while_the_pool_is_paused_as_max_waiting_allows_though_there_is_room() -> None:
    pool = core(5, max_waiting=2)
    pool.hold()
    queued(pool, 2)
    assert pool.take(wait=True) is EXHAUSTED


# Taking out and putting back


def test_only_what_idles_can_be_taken_out() -> None:
    pool = core(2)
    idle, busy = stocked(pool, 2)
    assert pool.take(wait=False) is busy
    assert not pool.take_out(busy)
    assert pool.take_out(idle)
    assert not pool.take_out(idle)
    assert idle.holder is INSPECTED
    assert pool.idle == 0
    pool.retire(idle, "stale")
    assert not pool.take_out(idle)
    assert sound(pool)


def test_what_is_taken_out_warm_or_cold_comes_back_cold() -> None:
    pool = core(3, max_connecting=3)
    first, second, third = (lent(pool) for _ in range(3))
    pool.give(first)
    pool.give(second)
    pool.cool(0.0)
    pool.give(third)
    assert pool.take_out(third)
    assert pool.inspected(third) is None
    assert third.cold
    assert stack(pool) == [first, second, third]
    assert pool.take_out(first)
    assert pool.inspected(first) is None
    assert stack(pool) == [second, third, first]
    assert sound(pool)


def test_what_comes_back_to_a_pool_that_has_less_room_now_goes() -> None:
    pool = core(2)
    idle, busy = stocked(pool, 2)
    assert pool.take(wait=False) is busy
    assert pool.take_out(idle)
    pool.set_cap(1)
    assert pool.inspected(idle) is RETIRED
    assert pool._closed_for["shrunk"] == 1
    assert sound(pool)


# The copy of a process


def test_g10_a_copy_has_none_of_the_connections_and_every_slot() -> None:
    pool = core(4, max_connecting=4, limits=Limits(keepalive=10.0))
    members = stocked(pool, 4, look_at=10.0)
    pool.cool(0.0)
    pool.audit(10.0)
    busy = member(pool.take(wait=False))
    pool.retire(members[0], "dropped")
    opening = Thing()
    pool.claim(opening)
    forgotten, told = pool.forget()
    assert told == []
    assert {id(each) for each in forgotten} == {id(each.connection) for each in members} | {id(opening)}
    assert len(forgotten) == 5
    assert pool.total == 0
    assert not pool.knows(opening)
    assert busy.holder is None
    assert pool.next_audit() == NEVER
    assert pool.prove() is None
    assert sound(pool)
    stocked(pool, 4)
    assert pool.total == 4


def test_g10_a_copy_has_another_epoch_and_no_dial_or_close_under_way() -> None:
    pool = core(2)
    (waiter,) = queued(pool, 1)
    assert pool.permit() is waiter
    assert pool.permit_unasked()
    epoch = pool._epoch
    assert pool.forget() == ([], [])
    assert pool._epoch != epoch
    assert pool._dialling == pool._closing == 0
    assert pool.permit() is waiter  # his dial is the other process's
    assert sound(pool)


def test_g10_g5_in_a_copy_who_waited_waits_on_in_the_same_order_and_who_had_not_collected_first() -> None:
    pool = core(2)
    busy, other = lent(pool), lent(pool)
    granted, first, second = queued(pool, 3)
    assert pool.give(busy) is granted
    pool.retire(other, "dropped")
    pool.freed(other.connection)
    assert pool.permit() is first
    pool.forget()
    assert queue(pool) == [granted, first, second]
    assert granted.member is None
    assert not pool._dialled
    assert (pool.permit(), pool.permit()) == (granted, first)
    assert sound(pool)


def test_g10_g5_in_a_copy_those_who_had_not_collected_are_in_the_order_in_which_they_came() -> None:
    pool = core(2)
    members = [lent(pool), lent(pool)]
    first, second = queued(pool, 2)
    assert [pool.give(each) for each in reversed(members)] == [first, second]
    pool.forget()
    assert queue(pool) == [first, second]


def test_g10_in_a_copy_of_a_closed_pool_who_had_not_collected_is_told() -> None:
    pool = core(1)
    busy = lent(pool)
    (waiter,) = queued(pool, 1)
    assert pool.give(busy) is waiter
    pool.shut()
    forgotten, told = pool.forget()
    assert told == [waiter]
    assert len(forgotten) == 1
    assert forgotten[0] is busy.connection
    assert waiter.member is None
    assert pool.waiting == 0
    assert sound(pool)


def test_g10_what_is_doomed_or_lent_by_the_fast_lane_is_forgotten_too() -> None:
    pool = core(3, max_connecting=3)
    stocked(pool, 1)
    pool._latest = latest = pool._lane_out.pop()
    latest.holder = BY_HAND
    pool.forget()
    assert pool._latest is NOBODY
    doomed = lent(pool)
    pool.retire_all()
    pool.forget()
    assert doomed.fate is None
    assert pool._lane_in
    assert sound(pool)


def test_g10_a_copy_rests_no_longer_and_has_the_cap_that_was_set() -> None:
    pool = core(3, max_connecting=3, min_idle=1)
    for _ in range(3):
        lent(pool)
    pool.set_cap(1)
    pool.forget()
    assert pool._ceiling == 1
    assert pool.permit_spare()
    pool.failed(None, OSError(), spare=True)
    pool.forget()
    assert pool.permit_spare()


def test_g10_what_was_lent_in_the_other_process_has_been_lent() -> None:
    pool = core(2)
    lent(pool)
    busy = lent(pool)
    (waiter,) = queued(pool, 1)
    pool.give(busy)
    assert waiter.member is busy
    pool.forget()
    assert pool._retired_uses + sum(each.uses for each in pool._members.values()) == 2


# Ticks


def test_a_tick_stamps_what_was_touched_since_the_last_one_and_nothing_else() -> None:
    pool = core(3, max_connecting=3)
    pool.cool(1.0)
    first, second = stocked(pool, 2)
    assert pool.cool(2.0) == [first, second]
    assert pool.take(wait=False) is second
    second.cold = False
    first.stirs = second.stirs = 2
    pool.give(second)
    assert pool.cool(3.0) == [second]
    assert (first.since, second.since) == (2.0, 3.0)
    assert (first.stirs, second.stirs) == (2, 0)
    assert pool.cool(4.0) == []
    assert (first.since, second.since) == (2.0, 3.0)
    assert stack(pool) == [first, second]


def test_what_became_cold_between_two_ticks_is_told_at_the_next_one_or_when_it_is_asked_for() -> None:
    pool = core(2)
    first, second = stocked(pool, 2)
    assert not pool.is_cold(first)
    assert pool.inspect() is first
    assert not pool.is_cold(first)
    pool.inspected(first)
    assert pool.is_cold(first)
    assert pool.unseen() == [first, second]
    assert pool.cool(1.0) == []
    pool.show_again(second)
    assert pool.cool(2.0) == [second]
    assert pool.unseen() == []


def test_there_is_nothing_to_inspect_in_a_pool_where_nothing_idles() -> None:
    pool = core(1)
    lent(pool)
    assert pool.inspect() is None


def test_fifo_lends_the_cold_before_the_warm() -> None:
    pool = core(3, max_connecting=3, fifo=True)
    cold, warm, warmer = (lent(pool) for _ in range(3))
    pool.give(cold)
    pool.cool(0.0)
    pool.give(warm)
    pool.give(warmer)
    assert [pool.take(wait=False) for _ in range(3)] == [cold, warm, warmer]


# The lanes


@pytest.mark.parametrize(
    "settings",
    [{"fifo": True}, {"always_cold": True}, {"records": True}, {"limits": Limits(max_uses=9)}],
    ids=["fifo", "always_cold", "records", "max_uses"],
)
def test_nothing_is_lent_by_the_fast_lane_where_each_time_there_is_something_to_decide(settings: Any) -> None:
    pool = core(2, **settings)
    stocked(pool, 2)
    assert pool._lane_out is not pool._warm
    assert not pool._lane_out
    assert pool._lane_in == ("fifo" in settings)


def test_other_limits_do_not_shut_the_fast_lanes() -> None:
    pool = core(2, limits=Limits(idle_timeout=60.0, max_lifetime=600.0, keepalive=10.0), min_idle=1)
    stocked(pool, 2)
    assert pool._lane_out is pool._warm
    assert pool._lane_in


def test_what_the_fast_lane_lent_last_is_nobody_as_soon_as_there_is_more_to_decide() -> None:
    def begin() -> tuple[Core[Thing], Member[Thing]]:
        pool = core(1)
        stocked(pool, 1)
        pool._latest = latest = pool._lane_out.pop()
        latest.holder = BY_HAND
        latest.uses += 1
        return pool, latest

    pool, _ = begin()
    queued(pool, 1)
    assert pool._latest is NOBODY
    pool, _ = begin()
    pool.retire_all()
    assert pool._latest is NOBODY
    pool, _ = begin()
    pool.expect_resets()
    assert pool._latest is NOBODY
    pool, _ = begin()
    pool.shut()
    assert pool._latest is NOBODY
    pool, latest = begin()
    pool.retire(latest, "dropped")
    assert pool._latest is NOBODY
    pool, latest = begin()
    pool.hold()
    assert pool._latest is latest  # what returns to a paused pool idles as ever
    assert sound(pool)


def test_the_lane_to_the_queue_is_open_while_members_take_all_slots() -> None:
    pool = core(2)
    assert not pool._brimful
    busy = [lent(pool), lent(pool)]
    assert pool._brimful
    pool.give(busy[0])
    assert pool._brimful
    pool.retire(busy[0], "dropped")
    assert not pool._brimful
    pool.freed(busy[0].connection)
    queued(pool, 2)
    assert pool.permit() is not None
    assert not pool._brimful  # a dial may fail
    assert sound(pool)


def test_the_lane_to_the_queue_is_shut_where_waiters_are_counted() -> None:
    pool = core(1, max_waiting=1)
    lent(pool)
    assert not pool._brimful
    queued(pool, 1)
    assert pool.take(wait=True) is EXHAUSTED


def test_who_may_not_wait_does_not_take_the_lane_to_the_queue() -> None:
    pool = core(1)
    lent(pool)
    queued(pool, 1)
    assert pool.take(wait=False) is EXHAUSTED
    assert pool.waiting == 1


Dial = tuple[Place[Thing] | None, int, bool]
T = TypeVar("T")


class World:
    """A core, and a model beside it too simple to be wrong: all that may happen to a pool, each deed with what must
    come of it. `number(n)` says which of n possible ones happens next."""

    def __init__(self, number: Callable[[int], int]) -> None:
        self.number = number
        self.story: list[str] = []
        self.cap = self.ceiling = self.pick(range(1, 6))
        self.max_connecting = self.pick([1, 2, 3])
        self.max_waiting = self.pick([None, None, None, 0, 1, 4])
        self.min_idle = self.pick([0, 0, 1, 2, 3])
        self.fifo = self.pick([False, False, True])
        self.always_cold = self.pick([False, False, False, True])
        self.records = self.pick([False, False, False, True])
        self.break_after = self.pick([None, 1, 3])
        self.limits = Limits(
            idle_timeout=self.pick([None, None, 3.0, 5.0, 8.0, 15.0]),
            max_lifetime=self.pick([None, None, 10.0, 30.0, 60.0]),
            lifetime_jitter=0.0,
            max_uses=self.pick([None, None, None, 1, 3, 5]),
            keepalive=self.pick([None, None, 2.0, 5.0, 8.0, 15.0]),
        )
        self.pool: Core[Thing] = Core(
            self.cap,
            max_connecting=self.max_connecting,
            max_waiting=self.max_waiting,
            min_idle=self.min_idle,
            limits=self.limits,
            fifo=self.fifo,
            always_cold=self.always_cold,
            records=self.records,
            break_after=self.break_after,
        )
        # What idles, the one that has idled longest first: what nobody has touched for a while, and the rest.
        self.cold: list[Member[Thing]] = []
        self.warm: list[Member[Thing]] = []
        self.unseen: list[Member[Thing]] = []  # became cold since the last tick
        self.lent: list[Member[Thing]] = []
        self.inspected: list[Member[Thing]] = []
        self.queue: list[Place[Thing]] = []
        self.granted: list[Place[Thing]] = []
        self.dials: list[Dial] = []
        self.unclosed: list[Member[Thing]] = []  # retired, and nobody closes it yet
        self.closing: list[Thing] = []
        # What is known of each that lives.
        self.uses: dict[Member[Thing], int] = {}
        self.fates: dict[Member[Thing], str] = {}
        self.idle_since: dict[Member[Thing], float] = {}  # or a little later
        self.now = self.ticked = 0.0
        self.ended = self.paused = self.resets = self.resting = False
        self.setbacks = self.generation = self.epoch = self.turn = 0
        self.borrowed = self.opened = self.failed = 0
        self.broken = self.trial = self.trying = False
        self.strikes = self.trips = 0
        self.retired = dict.fromkeys(REASONS, 0)
        for _ in range(self.pick(range(6))):
            self.borrow()

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]

    # The model's side of what the core answers

    @property
    def idle(self) -> list[Member[Thing]]:
        return self.cold + self.warm

    @property
    def total(self) -> int:
        return len(self.uses) + len(self.dials) + len(self.unclosed) + len(self.closing)

    def may_dial(self) -> bool:
        if self.broken and not self.trial:
            return False
        return len(self.dials) < self.max_connecting and self.total < self.cap

    def crowded(self) -> bool:
        return len(self.uses) > self.cap

    def verdict(self, subject: Member[Thing]) -> str | None:
        if self.ended:
            return "closed"
        if subject in self.fates:
            return self.fates[subject]
        if self.limits.max_uses is not None and self.uses[subject] >= self.limits.max_uses:
            return "expired"
        return "shrunk" if self.crowded() else None

    def gone(self, subject: Member[Thing], reason: str) -> None:
        assert subject.holder is None
        assert subject.fate is None
        for those in (self.cold, self.warm, self.lent, self.inspected):
            if subject in those:
                those.remove(subject)
        del self.uses[subject]
        self.fates.pop(subject, None)
        self.unclosed.append(subject)
        self.retired[reason] += 1

    def lend(self, subject: Member[Thing]) -> None:
        self.uses[subject] += 1
        self.borrowed += 1

    def pop_idle(self) -> Member[Thing]:
        first, then = (self.cold, self.warm) if self.fifo else (self.warm, self.cold)
        return (first or then).pop(0 if self.fifo else -1)

    def settle(self, answer: object, subject: Member[Thing], position: int | None = None) -> None:
        """It is given back, or put back there among the cold."""
        reason = self.verdict(subject)
        if reason is not None:
            assert answer is RETIRED
            self.gone(subject, reason)
        elif self.queue and not self.paused:
            head = self.queue.pop(0)  # G5: the head, and nobody else
            assert answer is head
            assert head.member is subject
            self.granted.append(head)
            self.lend(subject)
        else:
            assert answer is None
            if position is not None:
                self.cold.insert(position, subject)
            elif subject.cold and not self.always_cold:
                self.cold.append(subject)
            else:
                self.warm.append(subject)
                self.idle_since[subject] = self.ticked

    def pump(self) -> None:
        """What a driver does after each step."""
        while True:
            promised = self.pool._dialled.length
            due = len(self.queue) > promised and not self.paused and self.may_dial()
            waiter = self.pool.permit()
            assert waiter is (self.queue[promised] if due else None)
            if waiter is None:
                break
            assert waiter.reserved
            self.dial(waiter)
        # Those for whom no dial is under way, where nothing can come back and nothing may be dialled.
        vain = self.in_vain()
        assert self.pool.hopeless() == (self.queue[promised:] if vain else [])
        if vain:
            del self.queue[promised:]

    def in_vain(self) -> bool:
        return self.broken and not (self.uses or self.paused or self.may_dial())

    def dial(self, waiter: Place[Thing] | None, spare: bool = False) -> None:
        self.dials.append((waiter, self.generation, spare))
        self.trying, self.trial = self.broken, False  # half-open, one dial passes

    # What borrowers do

    def take(self) -> None:
        self.ask(self.pick([True, True, False]), dead=self.pick([False, False, False, True]))

    def ask(self, wait: bool, dead: bool = False) -> None:
        undialled = self.pool._undialled.length
        room = 0 if self.paused else max(0, self.cap - len(self.uses) - len(self.dials))
        if self.broken:
            room = min(room, int(self.may_dial()))
        surplus = undialled - room
        answer = self.pool.take(wait)
        if self.idle and not self.paused:
            assert answer is self.pop_idle()
            taken = member(answer)
            if taken.cold and dead:  # its check says so
                self.pool.reject(taken)
                self.gone(taken, "stale")
                self.pump()
                return
            taken.cold = False
            self.lend(taken)
            self.lent.append(taken)
        elif self.ended:
            assert answer is CLOSED
        elif self.in_vain():
            assert answer is BROKEN
        elif not wait or (self.max_waiting is not None and surplus >= self.max_waiting >= 0):
            assert answer is EXHAUSTED
        else:
            waiter = place(answer)
            assert waiter.reserved == (surplus < 0)
            assert waiter.turn > self.turn
            self.turn = waiter.turn
            self.queue.append(waiter)
            self.pump()

    def find_it_dead_and_take_another(self) -> None:
        subject = self.pick(self.lent)
        self.pool.reject(subject)
        self.gone(subject, "stale")
        self.borrowed -= 1
        wait = self.pick([True, True, False])
        answer = self.pool.retake(wait)
        if self.ended:
            assert answer is CLOSED
        elif self.idle and not self.paused:
            assert answer is self.pop_idle()
            taken = member(answer)
            taken.cold = False
            self.lend(taken)
            self.lent.append(taken)
        elif wait:
            waiter = place(answer)
            room = not self.paused and not self.broken and len(self.uses) + len(self.dials) < self.cap
            assert waiter.reserved == room
            assert waiter.turn < 0  # he had not had to wait, and comes before all who do
            self.queue.insert(sum(each.turn < waiter.turn for each in self.queue), waiter)
        else:
            assert answer is EXHAUSTED
        self.pump()

    def borrow(self) -> None:
        """Take one and have it, with all that must be closed and opened before that."""
        self.ask(wait=True)
        while self.queue and (self.dials or self.closing or self.unclosed):
            if self.dials:
                self.open_nth(0)
            elif self.closing:
                self.free_nth(0)
            else:
                self.begin_to_close()
        while self.granted:
            self.collect_nth(0)

    def take_by_the_lane(self) -> None:
        by_hand = self.pick([True, False])
        taken = self.pool._lane_out.pop()
        taken.uses += 1
        taken.holder = BY_HAND if by_hand else object()
        if by_hand:
            self.pool._latest = taken
        assert taken is self.warm.pop()
        assert not taken.cold
        self.lend(taken)
        self.lent.append(taken)

    def give(self) -> None:
        subject = self.lent.pop(self.pick(range(len(self.lent))))
        self.settle(self.pool.give(subject), subject)
        self.pump()

    def give_by_the_lane(self) -> None:
        subject = self.pick(self.lent)
        if subject is self.pool._latest or self.pool._lane_in:
            assert self.verdict(subject) is None
            assert not self.queue
            assert not any([self.resets, self.records, self.always_cold])
            self.pool._warm.append(subject)
            subject.holder = None
            self.lent.remove(subject)
            self.warm.append(subject)
            self.idle_since[subject] = self.ticked

    def begin_to_reset(self) -> None:
        self.pick(self.lent).holder = RETURNING

    def collect(self) -> None:
        self.collect_nth(self.pick(range(len(self.granted))))

    def collect_nth(self, number: int) -> None:
        subject = collected(self.granted.pop(number))
        subject.cold = False  # it passed its check
        self.lent.append(subject)

    def be_killed_while_granted(self) -> None:
        waiter = self.granted.pop(self.pick(range(len(self.granted))))
        unused = member(self.pool.abandon(waiter))
        self.borrowed -= 1
        self.uses[unused] -= 1
        self.settle(self.pool.give(unused), unused)
        self.pump()

    def be_killed_while_waiting(self) -> None:
        waiter = self.queue.pop(self.pick(range(len(self.queue))))
        assert self.pool.abandon(waiter) is None
        assert self.pool.abandon(waiter) is None
        self.pump()

    # What dials and closes do

    def open_one(self) -> None:
        self.open_nth(self.pick(range(len(self.dials))))

    def open_nth(self, number: int) -> None:
        _, generation, _ = self.dials.pop(number)
        thing = Thing()
        retire_at = self.limits.retire_at(self.now, float)
        look_at = self.limits.next_look(retire_at, self.now, self.now)
        answer = self.pool.opened(thing, generation, retire_at, look_at)
        (subject,) = (each for each in [*self.pool._members.values(), *self.pool._unclosed] if each.connection is thing)
        self.opened += 1
        self.uses[subject] = 0
        self.resting, self.setbacks = False, 0
        self.broken = self.trial = self.trying = False
        self.strikes = self.trips = 0
        if generation != self.generation:
            self.fates[subject] = "cleared"
        self.settle(answer, subject)
        self.pump()

    def fail_one(self) -> None:
        waiter, _, spare = self.dials.pop(self.pick(range(len(self.dials))))
        error = OSError()
        # Told to the one for whom it was started, unless he is gone, or has lost his promise of a dial since.
        told = waiter if waiter in self.pool._dialled else None
        struck = self.pick([True, True, True, False])  # or it could not even begin
        assert self.pool.failed(waiter, error, spare, struck=struck) is told
        self.failed += 1
        self.strikes += struck
        if not struck:
            self.trial, self.trying = self.trial or self.trying, False
        elif self.break_after is not None and self.strikes >= self.break_after:
            self.trips += self.trial or self.trying or not self.broken
            self.broken, self.trial, self.trying = True, False, False
        if told is not None:
            assert told.error is error
            self.queue.remove(told)
        if spare and not self.resting:
            self.resting = True
            self.setbacks += 1
        self.pump()

    def dial_unasked(self) -> None:
        may = self.may_dial() and not self.ended
        assert self.pool.permit_unasked() == may
        if may:
            self.dial(None)

    def dial_for_the_stock(self) -> None:
        stock = len(self.idle) + len(self.inspected) + len(self.dials) - len(self.queue)
        may = stock < self.min_idle and self.may_dial() and not (self.ended or self.resting or self.paused)
        assert self.pool.permit_spare() == may
        if may:
            self.dial(None, spare=True)

    def have_rested(self) -> None:
        self.pool.rested()
        self.resting = False

    def half_open(self) -> None:
        self.pool.half_open()
        self.trial, self.trying = self.broken, False
        self.pump()

    def retire(self) -> None:
        subject = self.pick(list(self.uses))
        holder = subject.holder
        told = self.pool.retire(subject, "dropped")
        assert told is (holder if self.ended and isinstance(holder, Place) else None)
        self.gone(subject, "dropped")
        if isinstance(holder, Place):
            self.ungrant(holder)
        self.pump()

    def ungrant(self, waiter: Place[Thing]) -> None:
        """What he was granted, and had not collected, is taken from him."""
        self.borrowed -= 1
        self.granted.remove(waiter)
        if self.idle and not self.paused:
            other = self.pop_idle()
            assert waiter.member is other
            self.granted.append(waiter)
            self.lend(other)
            return
        assert waiter.member is None
        if not self.ended:  # back to where his turn is
            self.queue.insert(sum(each.turn < waiter.turn for each in self.queue), waiter)

    def finish_closing(self) -> None:
        self.free_nth(self.pick(range(len(self.closing))))

    def begin_to_close(self) -> None:
        subject = self.unclosed.pop(0)
        assert self.pool.closes(subject)
        assert not self.pool.closes(subject)
        self.closing.append(subject.connection)

    def free_nth(self, number: int) -> None:
        self.pool.freed(self.closing.pop(number))
        self.pump()

    # What maintenance does

    def let_time_pass(self) -> None:
        self.now += self.pick(range(5))
        if self.pick([True, False]):
            unseen = self.unseen + self.warm
            assert self.pool.cool(self.now) == unseen
            assert all(each.since == self.now for each in self.warm)
            self.cold, self.warm, self.unseen, self.ticked = self.idle, [], [], self.now
        self.audit()

    def audit(self) -> None:
        pool, now, limits = self.pool, self.now, self.limits
        entries = {each: when for when, _, each in pool._agenda if each in self.uses}
        proven = {each: each.proven for each in self.uses}
        idle, doomed = len(self.idle), 0
        retired = pool.audit(now)
        for each in retired:
            assert each in self.idle
            assert entries[each] <= now
            if each.retire_at <= now:
                self.gone(each, "expired")
                doomed += 1
            else:
                assert limits.idle_timeout is not None
                assert now >= self.idle_since[each] + limits.idle_timeout
                self.gone(each, "idle")
        assert len(self.idle) + doomed >= min(idle, self.min_idle)
        for each in self.uses:
            if each.retire_at <= now and not self.ended:
                assert each not in self.idle
                self.fates.setdefault(each, "expired")
        for when, _, each in pool._agenda:
            if each not in self.uses:
                continue
            if entries[each] > now:
                assert when == entries[each]  # not touched
                continue
            assert now < when <= each.retire_at
            if each not in self.cold:
                continue
            if limits.idle_timeout is not None:
                deadline = each.since + limits.idle_timeout
                assert when <= max(deadline, now + 0.1 * limits.idle_timeout + 1e-6)
                assert now < deadline or len(self.idle) <= self.min_idle
            if limits.keepalive is not None and now >= max(each.since, proven[each]) + limits.keepalive:
                assert each in pool._due

    def ask_one_whether_it_is_alive(self) -> None:
        due = next((each for each in self.pool._due if each in self.cold), None)
        assert self.pool.prove() is due
        if due is not None:
            self.cold.remove(due)
            self.inspected.append(due)

    def cool(self) -> None:
        self.unseen += self.warm
        self.cold, self.warm = self.idle, []

    def tell_what_became_cold(self) -> None:
        assert self.pool.unseen() == self.unseen
        self.unseen = []

    def look_over_all(self) -> None:
        self.cool()
        for subject in [*self.cold]:
            assert self.pool.inspect() is subject
            assert self.pool.inspected(subject) is None

    def begin_to_inspect(self) -> None:
        self.cool()
        subject = self.pool.inspect()
        assert subject is (self.cold.pop(0) if self.cold else None)
        if subject is not None:
            self.inspected.append(subject)

    def take_out(self) -> None:
        subject = self.pick(list(self.uses))
        assert self.pool.take_out(subject) == (subject in self.idle)
        if subject in self.idle:
            (self.cold if subject in self.cold else self.warm).remove(subject)
            self.inspected.append(subject)

    def end_to_inspect(self) -> None:
        subject = self.inspected.pop(self.pick(range(len(self.inspected))))
        first = self.pick([True, False])
        self.settle(self.pool.inspected(subject, first), subject, 0 if first else len(self.cold))
        self.pump()

    # What whoever owns the pool does

    def expect_resets(self) -> None:
        self.pool.expect_resets()
        self.resets = True

    def set_cap(self) -> None:
        self.cap = cap = self.pick(range(1, 7))
        self.ceiling = self.total
        surplus = max(0, len(self.uses) - cap)
        leaving = self.idle[:surplus]
        assert self.pool.set_cap(cap) == leaving
        for each in leaving:
            self.gone(each, "shrunk")
        self.pump()

    def hold(self) -> None:
        self.pool.hold()
        self.paused = True

    def unhold(self) -> None:
        self.paused = False
        served = [self.queue.pop(0) for _ in range(min(len(self.idle), len(self.queue)))]
        assert self.pool.unhold() == served
        for waiter in served:
            subject = self.pop_idle()
            assert waiter.member is subject
            self.lend(subject)
        self.granted += served
        self.pump()

    def retire_all(self) -> None:
        self.generation += 1
        self.trial, self.trying = self.broken, False
        idle, granted = self.idle, [] if self.ended else list(self.granted)
        uncollected = [member(waiter.member) for waiter in granted]
        retired = self.pool.retire_all()
        assert retired[: len(idle)] == idle
        assert set(retired[len(idle) :]) == set(uncollected)
        for each in retired:
            self.gone(each, "cleared")
        for subject in self.uses:
            self.fates.setdefault(subject, "cleared")
        for waiter in granted:
            self.ungrant(waiter)
        self.pump()

    def fork(self) -> None:
        forgotten, told = self.pool.forget()
        things = [*self.closing, *(each.connection for each in [*self.unclosed, *self.uses])]
        assert sorted(map(id, forgotten)) == sorted(map(id, things))
        assert all(each.holder is None and each.fate is None for each in self.uses)
        self.borrowed -= len(self.granted)
        if self.ended:
            assert set(told) == set(self.granted)
        else:
            assert told == []
            self.queue = sorted([*self.granted, *self.queue], key=lambda waiter: waiter.turn)
        assert not any(waiter.member for waiter in self.granted)
        self.cold, self.warm, self.lent, self.inspected, self.granted = [], [], [], [], []
        self.dials, self.unclosed, self.closing, self.uses, self.fates, self.unseen = [], [], [], {}, {}, []
        self.resting = self.broken = self.trial = self.trying = False
        self.strikes = self.trips = 0
        self.epoch += 1
        self.ceiling = 0
        self.pump()

    def close(self) -> None:
        idle, places = self.pool.shut()
        assert set(idle) == set(self.idle)
        assert places == self.queue
        for each in idle:
            self.gone(each, "closed")
        self.queue, self.ended = [], True

    def own(self) -> None:
        """Seldom what ends all: little happens to an empty or a closed pool."""
        self.do([("set_cap", 4), ("hold", 4), ("retire", 4), ("expect_resets", 1), ("end_all", 2)])

    def end_all(self) -> None:
        self.do([("retire_all", 4), ("fork", 3), ("close", 1)])

    # What happens next

    def do(self, deeds: list[tuple[str, int]]) -> None:
        """One of these, by their weights."""
        deed = self.pick([deed for deed, weight in deeds for _ in range(weight)])
        self.story.append(deed)
        getattr(self, deed)()

    def let_a_borrower_act(self) -> None:
        self.do(
            [
                ("take", 2 * (len(self.queue) < 5)),
                ("borrow", bool(self.idle) or self.total < self.cap),
                ("take_by_the_lane", 2 * bool(self.pool._lane_out)),
                ("give", (2 + len(self.queue)) * len(self.lent)),
                ("give_by_the_lane", 2 * self.pool._lane_in * len(self.lent)),
                ("begin_to_reset", bool(self.lent and self.resets)),
                ("find_it_dead_and_take_another", bool(self.lent and len(self.queue) < 5)),
                ("collect", 2 * bool(self.granted)),
                ("be_killed_while_granted", bool(self.granted)),
                ("be_killed_while_waiting", bool(self.queue)),
                ("let_time_pass", not self.queue),
            ]
        )

    def let_a_job_go_on(self) -> None:
        self.do(
            [
                ("open_one", 3 * bool(self.dials)),
                ("fail_one", bool(self.dials)),
                ("begin_to_close", 3 * bool(self.unclosed)),
                ("finish_closing", 3 * bool(self.closing)),
                ("dial_unasked", self.may_dial()),
                ("dial_for_the_stock", 1 + (len(self.idle) < self.min_idle)),
                ("have_rested", self.resting),
                ("half_open", 2 * self.broken),
            ]
        )

    def let_the_pool_be_tended(self) -> None:
        self.do(
            [
                ("let_time_pass", 2),
                ("ask_one_whether_it_is_alive", 6 * bool(self.pool._due)),
                ("tell_what_became_cold", bool(self.unseen)),
                ("look_over_all", bool(self.idle)),
                ("begin_to_inspect", 2 * bool(self.idle)),
                ("take_out", 2 * bool(self.uses)),
                ("end_to_inspect", 4 * bool(self.inspected)),
                ("unhold", 4 * self.paused),
                ("own", bool(self.uses)),
            ]
        )

    def check(self) -> None:
        pool = self.pool
        assert pool.faults() == []
        assert [*pool._cold] == self.cold
        assert [*pool._warm] == self.warm
        assert queue(pool) == self.queue
        assert set(pool._members.values()) == set(self.uses)
        assert pool.in_use == len(self.lent) + len(self.granted) + len(self.inspected)
        assert all(each.uses == self.uses[each] for each in self.uses)
        assert all(each.fate == self.fates.get(each) for each in self.uses)
        assert all(member(waiter.member).holder is waiter for waiter in self.granted)
        assert pool._dialling == len(self.dials)
        assert pool._closing == len(self.unclosed) + len(self.closing) == len(pool._claimed)
        assert list(pool._unclosed) == self.unclosed
        assert (pool.size, pool.idle, pool.total) == (len(self.uses), len(self.idle), self.total)
        self.ceiling = max(self.cap, min(self.ceiling, self.total))
        assert pool._ceiling == self.ceiling
        assert pool._closed_for == self.retired
        assert pool._retired_uses + sum(self.uses.values()) == self.borrowed
        assert (pool._resting, pool._setbacks, pool._epoch) == (self.resting, self.setbacks, self.epoch)
        assert (pool._opened, pool._open_failures) == (self.opened, self.failed)
        assert (pool._broken, pool._trial, pool._trying) == (self.broken, self.trial, self.trying)
        assert (pool._strikes, pool._trips) == (self.strikes, self.trips)
        assert all(each.cold == self.always_cold for each in self.warm)
        assert all(each.cold for each in self.cold)
        self.check_lanes()
        self.check_agenda()

    def check_lanes(self) -> None:
        """They are open just when there is nothing to decide."""
        looked_at = self.ended or self.fates or self.crowded() or self.limits.max_uses is not None
        shut = looked_at or self.resets or self.records or self.always_cold
        assert self.pool._lane_in == (not shut and not self.queue)
        assert (self.pool._lane_out is self.pool._warm) == (not shut and not self.fifo and not self.paused)
        assert self.pool._lane_out is self.pool._warm or not self.pool._lane_out
        full = len(self.uses) >= self.cap
        assert self.pool._brimful == (full and self.max_waiting is None and not self.records)

    def check_agenda(self) -> None:
        if self.ended:
            return
        entries = [each for _, _, each in self.pool._agenda if each in self.uses]
        assert len(entries) == len(set(entries))
        if self.limits.next_look(self.limits.retire_at(0.0, float), 0.0, 0.0) != NEVER:
            assert set(entries) >= set(self.uses) - set(self.fates)
        assert self.pool.next_audit() == min((when for when, _, _ in self.pool._agenda), default=NEVER)
        assert len(self.pool._due) == len(set(self.pool._due))
        assert set(self.pool._due) <= set(self.uses)

    def end(self) -> None:
        """Whatever happened: when all is done and given back, every slot is there again."""
        if self.paused:
            self.unhold()
        for waiter in [*self.queue]:
            self.pool.abandon(waiter)
        self.queue.clear()
        while self.dials:
            self.dials.pop()
            self.pool.failed(None, OSError())
        for waiter in self.granted:
            self.lent.append(collected(waiter))
        for subject in [*self.lent, *self.inspected]:
            self.settle(self.pool.give(subject), subject)
        while self.unclosed:
            self.begin_to_close()
        while self.closing:
            self.pool.freed(self.closing.pop())
        if self.ended:
            assert self.pool.total == 0
            return
        self.pool.half_open()
        if self.pool.permit_unasked():
            self.pool.opened(Thing(), self.generation)
        borrowers = [self.pool.take(wait=True) for _ in range(self.cap)]
        while self.pool.permit() is not None:
            self.pool.opened(Thing(), self.generation)
        assert all(isinstance(b, Member) or (isinstance(b, Place) and b.member) for b in borrowers)
        assert self.pool.total == self.cap


class AnyOrderOfEvents(RuleBasedStateMachine):
    """All that may happen to a core, in any order. The rules are few, and each chooses among what is possible at the
    moment, so that most steps are worth something."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.world = World(self.by(data))

    @staticmethod
    def by(data: st.DataObject) -> Callable[[int], int]:
        return lambda count: data.draw(st.integers(0, count - 1))

    @rule(data=st.data())
    def let_a_borrower_act(self, data: st.DataObject) -> None:
        self.world.number = self.by(data)
        self.world.let_a_borrower_act()

    @rule(data=st.data())
    def let_a_job_go_on(self, data: st.DataObject) -> None:
        self.world.number = self.by(data)
        self.world.let_a_job_go_on()

    @rule(data=st.data())
    def let_the_pool_be_tended(self, data: st.DataObject) -> None:
        self.world.number = self.by(data)
        self.world.let_the_pool_be_tended()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


# Not measured by coverage, which would take as long again several times: it goes over the same lines for ever.
TestAnyOrderOfEvents = pytest.mark.timeout(300)(pytest.mark.no_cover(AnyOrderOfEvents.TestCase))
TestAnyOrderOfEvents.settings = settings(max_examples=300, stateful_step_count=60)


# The breaker


def test_the_breaker_opens_after_that_many_failures_in_a_row_and_one_dial_passes_when_it_is_half_open() -> None:
    pool = core(3, max_connecting=3, break_after=2)
    for _ in range(2):
        (waiter,) = queued(pool, 1)
        assert pool.permit() is waiter
        assert pool.failed(waiter, OSError()) is waiter
    assert pool.take(wait=True) is BROKEN
    assert pool.take(wait=False) is BROKEN
    pool.half_open()
    first = place(pool.take(wait=True))
    assert first.reserved
    assert pool.permit() is first
    assert pool.take(wait=True) is BROKEN
    assert pool.permit() is None
    assert not pool.permit_unasked()
    assert pool.opened(Thing()) is first
    assert [each.reserved for each in queued(pool, 3)] == [True, True, False]


def test_half_open_without_a_breaker_that_is_open_means_nothing() -> None:
    pool = core(break_after=1)
    pool.half_open()
    (waiter,) = queued(pool, 1)
    assert pool.permit() is waiter
    pool.failed(waiter, OSError())
    assert pool.take(wait=True) is BROKEN


def test_a_dial_that_could_not_begin_does_not_open_the_breaker() -> None:
    pool = core(break_after=1)
    (waiter,) = queued(pool, 1)
    assert pool.permit() is waiter
    assert pool.failed(waiter, RecursionError(), struck=False) is waiter
    assert isinstance(pool.take(wait=True), Place)


def test_while_the_breaker_is_open_who_waits_is_served_by_what_returns_and_told_when_nothing_can() -> None:
    pool = core(3, break_after=1)
    busy = lent(pool)
    waiters = queued(pool, 3)
    assert pool.permit() is waiters[0]
    pool.failed(waiters[0], OSError())
    assert pool.permit() is None
    assert pool.hopeless() == []
    assert not any(each.reserved for each in waiters[1:])
    assert pool.give(busy) is waiters[1]
    pool.retire(collected(waiters[1]), "discarded")
    assert not sound(pool)
    assert pool.hopeless() == [waiters[2]]
    assert pool.waiting == 0
    assert sound(pool)


def test_with_max_waiting_0_the_trial_has_room() -> None:
    pool = core(2, break_after=1, max_waiting=0)
    (waiter,) = queued(pool, 1)
    pool.permit()
    pool.failed(waiter, OSError())
    pool.half_open()
    (trial,) = queued(pool, 1)
    assert pool.permit() is trial


def walk(rng: random.Random, worlds: int, steps: int) -> None:
    """Hypothesis finds the shortest way to a fault; this goes further, and in each direction alike."""
    for _ in range(worlds):
        world = World(rng.randrange)
        for _ in range(steps):
            rng.choice([world.let_a_borrower_act, world.let_a_job_go_on, world.let_the_pool_be_tended])()
            world.check()
        world.end()


@pytest.mark.no_cover
@pytest.mark.timeout(300)
def test_any_order_of_events_on_long_random_walks(rng: random.Random) -> None:
    walk(rng, worlds=500, steps=200)

"""The decisions alone: no runtime, no socket, no clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gsocketpool.core import BY_HAND, CLOSED, EXHAUSTED, REASONS, RETIRED, Core, Member, Place


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


def lent(pool: Core[Thing]) -> Member[Thing]:
    """Dial for one borrower, and let him collect it."""
    waiter = place(pool.take(wait=True))
    assert pool.permit() is waiter
    assert pool.opened(Thing()) is waiter
    return collected(waiter)


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
    assert pool.failed(second, error) is second
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


def test_g1_a_slot_is_free_when_the_socket_is_closed_and_not_before() -> None:
    pool = core(1)
    busy = lent(pool)
    waiter = place(pool.take(wait=True))
    pool.retire(busy, "dropped")
    assert pool.permit() is None
    pool.freed(busy.connection)
    assert pool.permit() is waiter


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
    assert pool.shut() == ([idle.connection], [])
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
    assert pool.permit_unasked()
    pool.opened(thing)
    assert pool.knows(thing)
    pool.retire(pool._members[id(thing)], "dropped")
    assert pool.knows(thing)
    pool.freed(thing)
    assert not pool.knows(thing)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """All that may happen to a core, in any order, beside a model too simple to be wrong."""

    @initialize(
        max_connections=st.integers(1, 5),
        max_connecting=st.integers(1, 3),
        max_waiting=st.none() | st.integers(0, 4),
        fifo=st.booleans(),
        always_cold=st.booleans(),
    )
    def begin(
        self, max_connections: int, max_connecting: int, max_waiting: int | None, fifo: bool, always_cold: bool
    ) -> None:
        self.pool: Core[Thing] = Core(
            max_connections,
            max_connecting=max_connecting,
            max_waiting=max_waiting,
            fifo=fifo,
            always_cold=always_cold,
        )
        self.fifo = fifo
        self.idle: list[Member[Thing]] = []  # in the order of the stack
        self.lent: list[Member[Thing]] = []
        self.inspected: list[Member[Thing]] = []
        self.queue: list[Place[Thing]] = []
        self.granted: list[Place[Thing]] = []
        self.dials: list[Place[Thing] | None] = []
        self.closing: list[Thing] = []
        self.ended = False
        self.borrowed = 0
        self.retired = dict.fromkeys(REASONS, 0)

    # The model's side of what the core answers

    def settle(self, answer: object, subject: Member[Thing]) -> None:
        if self.ended:
            assert answer is RETIRED
            self.closing.append(subject.connection)
            self.retired["closed"] += 1
        elif self.queue:
            head = self.queue.pop(0)  # G5: the head, and nobody else
            assert answer is head
            assert head.member is subject
            self.granted.append(head)
            self.borrowed += 1
        else:
            assert answer is None
            self.idle.append(subject)

    def pump(self) -> None:
        while (waiter := self.pool.permit()) is not None:
            assert waiter in self.queue
            self.dials.append(waiter)

    # What borrowers do

    @rule(wait=st.booleans())
    def take(self, wait: bool) -> None:
        answer = self.pool.take(wait)
        if self.ended:
            assert answer is CLOSED
        elif self.idle:
            assert answer is self.idle.pop(0 if self.fifo else -1)
            taken = member(answer)
            taken.cold = False
            self.lent.append(taken)
            self.borrowed += 1
        elif isinstance(answer, Place):
            assert wait
            self.queue.append(answer)
            self.pump()
        else:
            assert answer is EXHAUSTED

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        subject = self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1)))
        self.settle(self.pool.give(subject), subject)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        waiter = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        self.lent.append(collected(waiter))

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def be_killed_while_granted(self, data: st.DataObject) -> None:
        waiter = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        unused = self.pool.abandon(waiter)
        assert unused is not None
        self.borrowed -= 1
        self.settle(self.pool.give(unused), unused)

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def be_killed_while_waiting(self, data: st.DataObject) -> None:
        waiter = self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1)))
        assert self.pool.abandon(waiter) is None

    # What dials and closes do

    @precondition(lambda self: self.dials)
    @rule(data=st.data())
    def open_one(self, data: st.DataObject) -> None:
        self.dials.pop(data.draw(st.integers(0, len(self.dials) - 1)))
        thing = Thing()
        answer = self.pool.opened(thing)
        known = self.pool._members.get(id(thing))
        self.settle(answer, known or Member(thing))
        self.pump()

    @precondition(lambda self: self.dials)
    @rule(data=st.data())
    def fail_one(self, data: st.DataObject) -> None:
        waiter = self.dials.pop(data.draw(st.integers(0, len(self.dials) - 1)))
        error = OSError()
        answer = self.pool.failed(waiter, error)
        # Told to the one for whom it was started, unless he is gone, or has lost his promise of a dial since.
        if answer is not None:
            assert answer is waiter
            assert answer.error is error
            self.queue.remove(answer)
        self.pump()

    @rule()
    def dial_unasked(self) -> None:
        if self.pool.permit_unasked():
            self.dials.append(None)

    @precondition(lambda self: self.idle or self.lent or self.granted)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        granted = [g.member for g in self.granted if g.member]
        subject = data.draw(st.sampled_from([*self.idle, *self.lent, *granted]))
        holder = subject.holder
        told = self.pool.retire(subject, "dropped")
        assert told is (holder if self.ended and isinstance(holder, Place) else None)
        self.retired["dropped"] += 1
        self.closing.append(subject.connection)
        self.idle = [m for m in self.idle if m is not subject]
        self.lent = [m for m in self.lent if m is not subject]
        if isinstance(holder, Place):
            self.granted = [g for g in self.granted if g is not holder]
            if self.idle:
                other = self.idle.pop(0 if self.fifo else -1)
                assert holder.member is other
                self.granted.append(holder)
                self.borrowed += 1
            elif not self.ended:
                self.queue.insert(0, holder)
            self.borrowed -= 1
        self.pump()

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def finish_closing(self, data: st.DataObject) -> None:
        self.pool.freed(self.closing.pop(data.draw(st.integers(0, len(self.closing) - 1))))
        self.pump()

    # What maintenance does

    @rule()
    def tick(self) -> None:
        self.pool.cool(0.0)

    @rule()
    def look_over_all(self) -> None:
        for subject in self.idle:
            assert self.pool.inspect() is subject
            assert self.pool.inspected(subject) is None

    @precondition(lambda self: self.idle)
    @rule()
    def begin_to_inspect(self) -> None:
        subject = self.pool.inspect()
        assert subject is self.idle.pop(0)
        self.inspected.append(member(subject))

    @precondition(lambda self: self.inspected)
    @rule()
    def end_to_inspect(self) -> None:
        subject = self.inspected.pop()
        waited = bool(self.queue)
        answer = self.pool.inspected(subject)
        cold = sum(m.cold for m in self.idle) if not self.pool._always_cold else len(self.pool._cold) - 1
        self.settle(answer, subject)
        if not waited and not self.ended:  # among those that idle, it is the youngest of the cold
            self.idle.insert(cold, self.idle.pop())

    @precondition(lambda self: not self.ended)
    @rule(sure=st.integers(0, 9))
    def close(self, sure: int) -> None:
        if sure:
            return  # seldom: little happens to a closed pool
        idle, places = self.pool.shut()
        assert set(idle) == set(self.idle)
        assert places == self.queue
        self.closing += [subject.connection for subject in idle]
        self.retired["closed"] += len(idle)
        self.idle, self.queue, self.ended = [], [], True

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        assert pool.faults() == []
        assert pool.waiting == len(self.queue)
        assert pool.idle == len(self.idle)
        assert pool.in_use == len(self.lent) + len(self.granted) + len(self.inspected)
        assert pool._dialling == len(self.dials)
        assert pool._closing == len(self.closing)
        assert pool._closed_for == self.retired
        assert pool._retired_uses + sum(m.uses for m in pool._members.values()) == self.borrowed

    def teardown(self) -> None:
        """Whatever happened: when all is done and given back, every slot is there again."""
        if not hasattr(self, "pool") or self.ended:
            return
        for waiter in [*self.queue]:
            self.pool.abandon(waiter)
        self.queue.clear()
        while self.dials:
            self.dials.pop()
            self.pool.failed(None, OSError())
        for waiter in self.granted:
            self.settle(self.pool.give(collected(waiter)), collected(waiter))
        for subject in [*self.lent, *self.inspected]:
            self.settle(self.pool.give(subject), subject)
        while self.closing:
            self.pool.freed(self.closing.pop())
        borrowers = [self.pool.take(wait=True) for _ in range(self.pool._max_connections)]
        while self.pool.permit() is not None:
            self.pool.opened(Thing())
        assert all(isinstance(b, Member) or (isinstance(b, Place) and b.member) for b in borrowers)
        assert self.pool.total == self.pool._max_connections


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=300, stateful_step_count=60)

"""When a connection must go, when to look at it again, when to dial again: numbers alone."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsocketpool.lifetime import NEVER, NO_LIMITS, Limits, full_jitter

# Times far apart from each other and from zero, as those of a monotonic clock are.
times = st.integers(0, 10**6).map(float)
spans = st.floats(0.01, 1e5)
limits = st.builds(
    Limits,
    idle_timeout=st.none() | spans,
    max_lifetime=st.none() | spans,
    lifetime_jitter=st.floats(0.0, 1.0),
    keepalive=st.none() | spans,
)


def none() -> float:
    return 0.0


def most() -> float:
    return 1.0


def test_without_limits_a_connection_never_goes_and_is_never_looked_at() -> None:
    assert NO_LIMITS.retire_at(5.0, most) == NEVER
    assert NO_LIMITS.next_look(NEVER, 0.0, 0.0) == NEVER
    assert not NO_LIMITS.idles_too_long(0.0, 1e12)
    assert not NO_LIMITS.is_unproven(0.0, 1e12)
    assert NO_LIMITS.spared(7.0) == 7.0
    assert NO_LIMITS.max_uses is None


def test_never_is_later_than_any_time() -> None:
    assert NEVER > 1e308


def test_limits_cannot_be_changed_by_mistake() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NO_LIMITS.max_uses = 1  # type: ignore[misc]


def test_a_connection_must_go_when_its_lifetime_is_over() -> None:
    assert Limits(max_lifetime=60.0, lifetime_jitter=0.0).retire_at(1000.0, most) == 1060.0


def test_up_to_the_share_that_jitter_names_is_taken_off_its_life_and_none_is_added() -> None:
    limited = Limits(max_lifetime=60.0, lifetime_jitter=0.5)
    assert limited.retire_at(1000.0, none) == 1060.0
    assert limited.retire_at(1000.0, lambda: 0.5) == 1045.0
    assert limited.retire_at(1000.0, most) == 1030.0


def test_unless_it_is_told_otherwise_up_to_a_tenth_is_taken_off() -> None:
    limited = Limits(max_lifetime=100.0)
    assert limited.retire_at(0.0, most) == pytest.approx(90.0)


def test_what_was_opened_together_does_not_go_together(rng: random.Random) -> None:
    limited = Limits(max_lifetime=600.0, lifetime_jitter=0.1)
    ends = sorted(limited.retire_at(0.0, rng.random) for _ in range(200))
    assert ends[0] < 550.0
    assert ends[-1] > 590.0
    assert max(later - earlier for earlier, later in pairwise(ends)) < 6.0


def test_the_first_of_the_deadlines_is_when_to_look() -> None:
    limited = Limits(idle_timeout=10.0, keepalive=4.0)
    assert limited.next_look(NEVER, since=100.0, proven=100.0) == 104.0
    assert limited.next_look(103.0, since=100.0, proven=100.0) == 103.0
    assert limited.next_look(NEVER, since=100.0, proven=108.0) == 110.0
    assert Limits(idle_timeout=10.0).next_look(NEVER, since=100.0, proven=0.0) == 110.0
    assert Limits(keepalive=4.0).next_look(NEVER, since=100.0, proven=103.0) == 107.0
    assert NO_LIMITS.next_look(50.0, since=100.0, proven=0.0) == 50.0


def test_it_idles_too_long_when_idle_timeout_is_over_and_not_before() -> None:
    limited = Limits(idle_timeout=10.0)
    assert not limited.idles_too_long(100.0, 109.99)
    assert limited.idles_too_long(100.0, 110.0)


def test_it_is_unproven_when_keepalive_is_over_and_not_before() -> None:
    limited = Limits(keepalive=10.0)
    assert not limited.is_unproven(100.0, 109.99)
    assert limited.is_unproven(100.0, 110.0)


def test_what_is_spared_is_looked_at_again_after_a_tenth_of_idle_timeout() -> None:
    limited = Limits(idle_timeout=60.0)
    assert limited.next_look(NEVER, limited.spared(500.0), 0.0) == pytest.approx(506.0)


@given(limited=limits, since=times, proven=times, retire_at=times)
def test_when_it_is_looked_at_something_is_due_and_before_that_nothing_is(
    limited: Limits, since: float, proven: float, retire_at: float
) -> None:
    look = limited.next_look(retire_at, since, proven)
    assert look >= retire_at or limited.idles_too_long(since, look) or limited.is_unproven(proven, look)
    before = look - 0.001
    assert before < retire_at
    assert not limited.idles_too_long(since, before)
    assert not limited.is_unproven(proven, before)


@given(limited=limits, opened=times, chance=st.floats(0.0, 1.0))
def test_a_life_is_never_longer_than_max_lifetime_nor_shorter_than_jitter_allows(
    limited: Limits, opened: float, chance: float
) -> None:
    if limited.max_lifetime is None:
        assert limited.retire_at(opened, lambda: chance) == NEVER
    else:
        life = limited.retire_at(opened, lambda: chance) - opened
        assert life <= limited.max_lifetime * 1.001
        assert life >= limited.max_lifetime * (1 - limited.lifetime_jitter) * 0.999 - 0.001


def test_the_bound_of_the_delay_doubles_with_each_setback_up_to_the_longest() -> None:
    assert [full_jitter(n, 0.1, 1.0, most) for n in range(1, 7)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_the_delay_is_anything_up_to_its_bound() -> None:
    assert full_jitter(3, 0.1, 30.0, none) == 0.0
    assert full_jitter(3, 0.1, 30.0, lambda: 0.25) == pytest.approx(0.1)


def test_a_delay_that_begins_with_the_longest_stays_there() -> None:
    assert [full_jitter(n, 5.0, 5.0, most) for n in (1, 2, 9)] == [5.0, 5.0, 5.0]


def test_setbacks_for_weeks_do_not_overflow() -> None:
    assert full_jitter(10**6, 0.1, 30.0, most) == 30.0


def test_a_longest_delay_of_months_is_reached_too() -> None:
    assert full_jitter(40, 0.001, 1e7, most) == 1e7


@given(
    setbacks=st.integers(1, 10**6),
    first=st.floats(0.001, 10.0),
    more=st.floats(0.0, 1e6),
    chance=st.floats(0.0, 1.0, exclude_max=True),
)
def test_no_delay_is_below_zero_or_above_the_longest(setbacks: int, first: float, more: float, chance: float) -> None:
    assert 0.0 <= full_jitter(setbacks, first, first + more, lambda: chance) <= first + more

"""Who holds what: `holders`, leaks reported and reclaimed, and a `PoolExhaustedError` that tells the whole story."""

from __future__ import annotations

import gc
import inspect
import logging
import pickle
import re
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import gevent
import greenlet
import pytest
from gevent.event import Event

import gsocketpool
from gsocketpool import Pool, PoolClosedError, PoolExhaustedError, TcpConnection
from gsocketpool.loans import Loan
from tests.conftest import Crashed, Logged
from tests.dials import BOUND, Attempt, Dials, nobody_else_runs
from tests.lines import Line, borrow, give_back, line_pool
from tests.servers import LineEchoServer, refused_port

#: The pool notes its borrowers; nobody is reported for as long as a test lasts.
NOTED: dict[str, Any] = {"leak_threshold": 1000}
RECLAIMING: dict[str, Any] = {"reclaim": True}
WATCHED: dict[str, Any] = {**NOTED, **RECLAIMING}
ALL = [NOTED, RECLAIMING, WATCHED]
IDS = ["leak_threshold", "reclaim", "both"]


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def dials(server: LineEchoServer) -> Dials:
    return Dials(server)


def line_number() -> int:
    """Where the caller is."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def report_at(pool: Pool[Any], seconds_from_now: float) -> None:
    """Have the upkeep report leaks as if it were so much later."""
    assert pool._ledger is not None
    pool._ledger.report(pool, time.monotonic() + seconds_from_now)


def id_in(thing: object) -> str:
    """What tells an object from others wherever it is shown."""
    return f"0x{id(thing):x}"


def run_to_end(job: Callable[[], object]) -> gevent.Greenlet[..., object]:
    """A greenlet that did this and has ended."""
    task = gevent.spawn(job)
    task.join(BOUND)
    assert task.ready()
    return task


def wait_for(condition: Callable[[], bool]) -> None:
    """Let others run until it holds."""
    with gevent.Timeout(BOUND):
        while not condition():
            gevent.sleep(0.001)


def loans_alive() -> int:
    gc.collect()
    return sum(type(found) is Loan for found in gc.get_objects())


# What is noted, and when


@pytest.mark.parametrize("options", [{}, {"leak_threshold": None}, {"reclaim": False}], ids=str)
def test_nothing_is_noted_and_the_lanes_stay_open_unless_somebody_asks_for_it(
    server: LineEchoServer, options: dict[str, Any]
) -> None:
    before = loans_alive()
    with line_pool(server, **options) as pool:
        line = pool.acquire()
        with pool.connection() as other:
            assert (pool._lane_out is pool._warm, pool._lane_in, pool._ledger) == (True, True, None)
            assert [member.loan for member in pool._members.values()] == [None, None]
            assert loans_alive() == before
            held = pool.holders()
            assert {id(holder.connection) for holder in held} == {id(line), id(other)}
            assert {(holder.greenlet, holder.held, holder.stack) for holder in held} == {(None, None, None)}
        pool.release(line)
        assert pool.holders() == []


@pytest.mark.parametrize("options", ALL, ids=IDS)
def test_every_borrowing_is_noted_when_somebody_asks_for_it(server: LineEchoServer, options: dict[str, Any]) -> None:
    with line_pool(server, **options) as pool:
        me = gevent.getcurrent()
        for _ in range(3):  # dialled, then idle
            line = pool.acquire()
            acquired_at = line_number() - 1
            [holder] = pool.holders()
            assert (holder.connection, holder.greenlet) == (line, me)
            assert holder.held is not None
            assert 0 <= holder.held < BOUND
            assert holder.stack is not None
            assert f'File "{__file__}", line {acquired_at}, in {inspect.stack()[0].function}' in holder.stack
            assert "gsocketpool/" not in holder.stack.replace(__file__, "")
            pool.release(line)
            assert pool.holders() == []
            for block in (pool.connection(), pool.connection(timeout=BOUND), pool.connection(timeout=None)):
                with block as line:
                    entered_at = line_number() - 1
                    [holder] = pool.holders()
                    assert (holder.connection, holder.greenlet) == (line, me)
                    assert f'File "{__file__}", line {entered_at}' in str(holder.stack)
                assert pool.holders() == []


def test_who_has_held_one_longest_is_listed_first(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=3, **NOTED) as pool:
        lines = [pool.acquire()]
        for _ in range(2):
            gevent.sleep(0.001)
            lines.append(pool.acquire())
        pool.release(lines[1])
        gevent.sleep(0.001)
        lines.append(pool.acquire())  # the second one again, now the youngest
        holders = pool.holders()
        assert [holder.connection for holder in holders] == [lines[0], lines[2], lines[1]]
        held = [holder.held or 0 for holder in holders]
        assert held == sorted(held, reverse=True)
        assert 0 <= held[-1] < held[0]
        give_back(pool, lines[1:3] + lines[:1])


def test_who_holds_what_is_known_of_each_greenlet(server: LineEchoServer) -> None:
    done = Event()
    with line_pool(server, max_connections=4, **NOTED) as pool:

        def by_hand() -> None:
            line = pool.acquire(timeout=BOUND)
            assert done.wait(BOUND)
            pool.release(line)

        def by_block() -> None:
            with pool.connection():
                assert done.wait(BOUND)

        tasks = [gevent.spawn(by_hand), gevent.spawn(by_block), gevent.spawn(by_hand)]
        raw = gevent.spawn_raw(by_block)
        wait_for(lambda: pool.in_use == 4)
        gevent.sleep(0)
        by_greenlet = {id(holder.greenlet): holder.stack or "" for holder in pool.holders()}
        assert by_greenlet.keys() == {id(task) for task in [*tasks, raw]}
        assert "in by_hand" in by_greenlet[id(tasks[0])]
        assert "in by_block" in by_greenlet[id(tasks[1])]
        assert "in by_block" in by_greenlet[id(raw)]
        done.set()
        gevent.joinall(tasks, timeout=BOUND, raise_error=True)
        wait_for(lambda: pool.in_use == 0)
        assert pool.holders() == []


def test_what_was_granted_and_not_collected_yet_is_held_by_nobody(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, **NOTED) as pool:
        line = pool.acquire()
        waiter = Attempt(pool.acquire, timeout=None)
        pool.release(line)
        assert (pool.in_use, pool.holders()) == (1, [])
        assert waiter.result() is line
        [holder] = pool.holders()
        assert holder.greenlet is waiter.greenlet
        pool.release(line)


def test_what_is_being_reset_is_held_by_nobody(server: LineEchoServer) -> None:
    resetting, may_end = Event(), Event()

    class Resetting(Line):
        def reset(self) -> None:
            resetting.set()
            assert may_end.wait(BOUND)

    with line_pool(server, Resetting, **WATCHED) as pool:
        line = pool.acquire()
        releasing = Attempt(pool.release, line)
        assert resetting.is_set()
        assert (pool.in_use, pool.holders()) == (1, [])
        may_end.set()
        assert releasing.result() is None


def test_what_the_pool_looks_at_is_held_by_nobody(server: LineEchoServer) -> None:
    looking, may_end = Event(), Event()

    class Thorough(Line):
        def is_expired(self) -> bool:
            looking.set()
            return not may_end.wait(BOUND)

    with line_pool(server, Thorough, initial_connections=1, **NOTED) as pool:
        reaping = Attempt(pool.drop_expired)
        assert looking.is_set()
        assert (pool.in_use, pool.holders()) == (1, [])
        may_end.set()
        assert reaping.result() is None


def test_a_stack_says_how_the_borrower_came_there_and_not_what_the_pool_did(server: LineEchoServer) -> None:
    with line_pool(server, **NOTED) as pool:

        def inner() -> Line:
            return pool.acquire()

        def outer() -> Line:
            return inner()

        line = outer()
        [holder] = pool.holders()
        assert holder.stack is not None
        names = re.findall(r"in (\w+)\n", holder.stack)
        assert names[-2:] == ["outer", "inner"]  # the innermost one last, as in a traceback
        assert "return pool.acquire()" in holder.stack.splitlines()[-1]
        pool.release(line)


def test_a_deep_stack_is_cut_where_it_is_farthest_from_the_borrower(server: LineEchoServer) -> None:
    with line_pool(server, **NOTED) as pool:

        def dig(depth: int) -> Line:
            return dig(depth - 1) if depth else pool.acquire()

        line = dig(200)
        [holder] = pool.holders()
        assert set(re.findall(r"in (\w+)\n", str(holder.stack))) == {"dig"}
        assert len(str(holder.stack).splitlines()) < 100
        pool.release(line)


def test_a_subclass_with_an_acquire_of_its_own_is_noted_too(server: LineEchoServer) -> None:
    class Counting(Pool[TcpConnection]):
        taken = 0

        def acquire(self, *args: Any, **options: Any) -> TcpConnection:
            self.taken += 1
            return super().acquire(*args, **options)

    with Counting(TcpConnection, {"host": "127.0.0.1", "port": server.port}, **WATCHED) as pool:
        with pool.connection(timeout=BOUND) as connection:
            entered_at = line_number() - 1
            [holder] = pool.holders()
            assert holder.connection is connection
            assert f'File "{__file__}", line {entered_at}' in str(holder.stack)
        assert (pool.holders(), pool.taken) == ([], 1)


def test_a_note_keeps_nothing_alive_that_the_borrower_had_at_hand(server: LineEchoServer) -> None:
    class Big:
        pass

    seen: list[weakref.ref[Big]] = []

    with line_pool(server, **WATCHED) as pool:

        def borrow_with_much_at_hand() -> Line:
            big = Big()
            seen.append(weakref.ref(big))
            return pool.acquire()

        lines = [borrow_with_much_at_hand() for _ in range(3)]
        gc.collect()
        assert [ref() for ref in seen] == [None] * 3
        assert len(pool.holders()) == 3
        give_back(pool, lines)


def test_notes_end_with_the_loan(server: LineEchoServer) -> None:
    before = loans_alive()
    with line_pool(server, max_connections=3, discard_on=KeyError, **WATCHED) as pool:
        for _ in range(20):
            lines = borrow(pool, 3)
            assert loans_alive() == before + 3
            pool.release(lines[0])
            pool.drop(lines[1])
            pool.clear()
            pool.release(lines[2])
            with pytest.raises(KeyError), pool.connection(timeout=BOUND):
                raise KeyError
            with pytest.raises(PoolExhaustedError):
                pool.resize(1)
                with pool.connection(timeout=BOUND):
                    pool.acquire(timeout=0)
            pool.resize(3)
            assert loans_alive() == before
        assert pool._ledger is not None
        assert list(pool._ledger._unreported) == []
        assert (pool.faults(), pool.holders()) == ([], [])


def test_g9_a_pool_that_notes_its_borrowers_is_collected_when_nobody_refers_to_it(server: LineEchoServer) -> None:
    before = loans_alive()
    pool = line_pool(server, **WATCHED)
    line = pool.acquire()
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    wait_for(lambda: gone() is None)
    line.close()
    assert loans_alive() == before


# Leaks


@pytest.mark.parametrize("options", [{}, {"check_after_idle": None, "reap_expired_connections": False}], ids=str)
def test_who_holds_one_for_too_long_is_reported_once_and_again_when_it_comes_back(
    server: LineEchoServer, logged: Logged, options: dict[str, Any]
) -> None:
    me = id_in(gevent.getcurrent())
    with line_pool(server, leak_threshold=0.02, name="orders", **options) as pool:
        line = pool.acquire()
        at = line_number() - 1
        [record] = logged.take(1)  # by the pool itself
        text = record.getMessage()
        assert (record.levelno, record.name) == (logging.WARNING, "gsocketpool")
        assert "'orders'" in text
        assert me in text
        assert id_in(line) in text
        assert re.search(r"for \d+\.\d s, longer than leak_threshold=0.02", text)
        assert f'File "{__file__}", line {at}, in {inspect.stack()[0].function}' in text
        for _ in range(3):
            pool._upkeep.tend(pool)
        report_at(pool, 1000)
        assert line.ask("still mine") == "still mine"
        logged.take(0)
        pool.release(line)
        [record] = logged.take(1)
        text = record.getMessage()
        assert record.levelno == logging.WARNING
        assert "'orders'" in text
        assert me in text
        assert id_in(line) in text
        assert re.search(r"came back after \d+\.\d s", text)
        assert pool.acquire() is line  # it is as good as any
        pool.release(line)


def test_who_holds_one_for_less_than_that_is_not_reported(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, leak_threshold=100) as pool:
        for _ in range(3):
            with pool.connection():
                report_at(pool, 99)
            report_at(pool, 1000)
        logged.take(0)


def test_only_those_are_reported_who_have_had_one_for_too_long(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, leak_threshold=100) as pool:

        def borrow_later(seconds: float) -> Line:
            line = pool.acquire()
            pool._members[id(line)].loan.since += seconds
            return line

        first, second, third = borrow_later(0), borrow_later(0), borrow_later(50)
        report_at(pool, 120)
        reported = [record.getMessage() for record in logged.take(2)]
        assert (id_in(first) in reported[0], id_in(second) in reported[1]) == (True, True)
        pool.release(second)
        logged.take(1)
        assert borrow_later(100) is second  # anew
        report_at(pool, 160)
        assert id_in(third) in logged.take(1)[0].getMessage()
        give_back(pool, [first, second, third])
        back = [record.getMessage() for record in logged.take(2)]
        assert (id_in(first) in back[0], id_in(third) in back[1]) == (True, True)


def borrow_in_a_block(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    with pool.connection() as line:
        at = line_number() - 1
        then(line)
    return at


def borrow_in_a_block_with_a_timeout(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    with pool.connection(timeout=BOUND) as line:
        at = line_number() - 1
        then(line)
    return at


def borrow_in_a_block_that_fails(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    try:
        with pool.connection() as line:
            at = line_number() - 1
            then(line)
            raise KeyError
    except KeyError:
        return at


def borrow_by_hand(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    line = pool.acquire()
    at = line_number() - 1
    then(line)
    pool.release(line)
    return at


def borrow_by_hand_with_a_timeout(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    line = pool.acquire(timeout=BOUND)
    at = line_number() - 1
    then(line)
    pool.release(line)
    return at


def borrow_by_hand_and_drop(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    line = pool.acquire(retry=3)
    at = line_number() - 1
    then(line)
    pool.drop(line)
    return at


def borrow_by_hand_and_fail(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    line = pool.acquire()
    at = line_number() - 1
    try:
        then(line)
        raise KeyError
    except KeyError:
        pool.release(line)
    return at


def borrow_from_a_pool_that_is_cleared(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    with pool.connection() as line:
        at = line_number() - 1
        pool.clear()
        then(line)
    return at


def borrow_from_a_pool_that_is_closed(pool: Pool[Line], then: Callable[[Line], None]) -> int:
    with pool.connection() as line:
        at = line_number() - 1
        then(line)
        pool.close()
    return at


@pytest.mark.parametrize(
    "how",
    [
        borrow_in_a_block,
        borrow_in_a_block_with_a_timeout,
        borrow_in_a_block_that_fails,
        borrow_by_hand,
        borrow_by_hand_with_a_timeout,
        borrow_by_hand_and_drop,
        borrow_by_hand_and_fail,
        borrow_from_a_pool_that_is_cleared,
        borrow_from_a_pool_that_is_closed,
    ],
)
@pytest.mark.parametrize("options", [{}, RECLAIMING], ids=["", "reclaim"])
def test_a_report_says_where_it_was_borrowed_and_when_it_comes_back_however_that_was_done(
    server: LineEchoServer,
    logged: Logged,
    how: Callable[[Pool[Line], Callable[[Line], None]], int],
    options: dict[str, Any],
) -> None:
    held: list[Line] = []
    with line_pool(server, leak_threshold=100, name="orders", **options) as pool:

        def too_long(line: Line) -> None:
            held.append(line)
            report_at(pool, 200)
            report_at(pool, 300)

        def job() -> int:
            return how(pool, too_long)

        task = gevent.spawn(job)
        at = task.get(timeout=BOUND)
        gevent.sleep(0)
        gevent.sleep(0)
        leaked, back = logged.take(2)
        assert f"line {at}, in {how.__name__}" in leaked.getMessage()
        assert id_in(task) in leaked.getMessage()
        assert "came back after" in back.getMessage()
        assert (pool.stats().closed["reclaimed"], pool.holders(), pool.faults()) == (0, [], [])


def test_one_that_is_drained_away_from_a_leaking_borrower_leaves_no_note(
    server: LineEchoServer, logged: Logged
) -> None:
    pool = line_pool(server, leak_threshold=100)
    line = pool.acquire()
    report_at(pool, 200)
    logged.take(1)
    pool.close(0)
    logged.take()
    assert pool.holders() == []
    pool.release(line)
    assert pool._ledger is not None
    assert list(pool._ledger._unreported) == []


def test_a_leak_of_one_whose_repr_fails_is_reported_all_the_same(server: LineEchoServer, logged: Logged) -> None:
    class Unprintable(Line):
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    with line_pool(server, Unprintable, leak_threshold=100, reclaim=True) as pool:
        line = pool.acquire()
        report_at(pool, 200)
        assert "Unprintable" in logged.take(1)[0].getMessage()
        pool.release(line)
        assert "Unprintable" in logged.take(1)[0].getMessage()


# Reclaiming


def acquire_and_end(pool: Pool[Line], seen: list[Line]) -> None:
    seen.append(pool.acquire(timeout=BOUND))


def acquire_and_fail(pool: Pool[Line], seen: list[Line]) -> None:
    seen.append(pool.acquire(timeout=BOUND))
    raise OSError("the borrower's own")


def acquire_and_die(pool: Pool[Line], seen: list[Line]) -> None:
    seen.append(pool.acquire(timeout=BOUND))
    raise gevent.GreenletExit


def enter_and_never_leave(pool: Pool[Line], seen: list[Line]) -> None:
    def rows() -> Iterator[str]:
        with pool.connection(timeout=BOUND) as line:
            seen.append(line)
            yield line.ask("row")
            yield line.ask("never asked for")

    unfinished = rows()
    KEPT.append(unfinished)  # else the collector would finish it, and give the connection back
    assert next(unfinished) == "row"


KEPT: list[Iterator[str]] = []


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    yield
    KEPT.clear()


@pytest.mark.parametrize("options", [RECLAIMING, WATCHED], ids=["reclaim", "both"])
@pytest.mark.parametrize("how", [acquire_and_end, acquire_and_fail, acquire_and_die, enter_and_never_leave])
def test_g4_what_a_greenlet_had_when_it_ended_is_closed_counted_and_logged_and_a_waiter_served(
    server: LineEchoServer, logged: Logged, crashed: Crashed, how: Callable[..., None], options: dict[str, Any]
) -> None:
    seen: list[Line] = []
    with line_pool(server, max_connections=1, name="orders", **options) as pool:
        task = gevent.spawn(how, pool, seen)
        waiter = Attempt(pool.acquire, timeout=BOUND)
        line = waiter.result()
        assert line is not seen[0]
        assert not seen[0].is_connected()
        assert task.ready()
        [record] = logged.take(1)
        text = record.getMessage()
        assert record.levelno == logging.WARNING
        assert "'orders'" in text
        assert "ended without releasing" in text
        assert id_in(seen[0]) in text
        assert id_in(task) in text
        assert f'File "{__file__}", line ' in text
        assert ("in rows" if how is enter_and_never_leave else f"in {how.__name__}") in text
        assert pool.stats().closed["reclaimed"] == 1
        pool.release(line)
        KEPT.clear()  # the generator ends now, and with it its block
        gc.collect()
        assert (pool.idle, pool.in_use, pool.faults()) == (1, 0, [])
        assert server.most == 1
        assert [str(error) for error in crashed.take()] == (["the borrower's own"] if how is acquire_and_fail else [])


def test_g4_all_that_a_greenlet_had_is_taken_back(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, max_connections=5, **WATCHED) as pool:
        run_to_end(lambda: borrow(pool, 5))
        lines = borrow(pool, 5)
        logged.take(5)
        assert pool.stats().closed["reclaimed"] == 5
        give_back(pool, lines)
        assert server.most == 5


def test_what_was_given_back_in_time_is_not_reclaimed(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, max_connections=2, **WATCHED) as pool:

        def by_hand() -> None:
            pool.release(pool.acquire(timeout=BOUND))

        def by_block() -> None:
            with pool.connection():
                pass

        def by_drop() -> None:
            pool.drop(pool.acquire(timeout=BOUND))

        def by_failing() -> None:
            with pytest.raises(KeyError), pool.connection():
                raise KeyError

        for job in (by_hand, by_block, by_drop, by_failing, by_hand):
            run_to_end(job)
            gevent.sleep(0)
            gevent.sleep(0)
        logged.take(0)
        closed = pool.stats().closed
        assert (closed["reclaimed"], closed["dropped"], closed["discarded"]) == (0, 1, 1)


def test_what_somebody_else_has_borrowed_since_stays_his(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, max_connections=1, **RECLAIMING) as pool:
        go_on = Event()

        def borrow_give_back_and_live_on() -> None:
            pool.release(pool.acquire())
            assert go_on.wait(BOUND)

        former = gevent.spawn(borrow_give_back_and_live_on)
        gevent.sleep(0)
        wait_for(lambda: pool.idle == 1)
        line = pool.acquire()
        go_on.set()
        former.join(BOUND)
        gevent.sleep(0)
        assert line.ask("still mine") == "still mine"
        pool.release(line)
        logged.take(0)


def test_what_is_given_back_by_another_greenlet_before_its_borrower_ends_is_not_reclaimed(
    server: LineEchoServer, logged: Logged
) -> None:
    with line_pool(server, max_connections=1, **RECLAIMING) as pool:

        def borrow_and_have_it_given_back() -> None:
            line = pool.acquire()
            run_to_end(lambda: pool.release(line))

        run_to_end(borrow_and_have_it_given_back)
        gevent.sleep(0)
        logged.take(0)
        assert (pool.idle, pool.stats().closed["reclaimed"]) == (1, 0)


def test_without_reclaim_a_connection_may_be_passed_on_and_outlive_its_borrower(
    server: LineEchoServer, logged: Logged
) -> None:
    with line_pool(server, max_connections=1, **NOTED) as pool:
        task = gevent.spawn(pool.acquire)
        line = task.get(timeout=BOUND)
        gevent.sleep(0)
        gevent.sleep(0)
        [holder] = pool.holders()
        assert holder.greenlet is task
        assert line.ask("passed on") == "passed on"
        run_to_end(lambda: pool.release(line))
        assert (pool.idle, pool.stats().closed["reclaimed"]) == (1, 0)
        logged.take(0)


def test_a_release_that_comes_too_late_is_refused_and_harms_nobody(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, max_connections=1, **RECLAIMING) as pool:
        task = gevent.spawn(pool.acquire)
        line = task.get(timeout=BOUND)
        other = pool.acquire(timeout=BOUND)
        logged.take(1)
        with pytest.raises(Exception, match="no such connection"):
            pool.release(line)
        assert other.ask("mine") == "mine"
        pool.release(other)
        assert pool.faults() == []


def test_what_is_given_back_in_the_moment_in_which_its_borrower_ends_is_not_reclaimed(
    server: LineEchoServer, logged: Logged
) -> None:
    with line_pool(server, max_connections=1, **RECLAIMING) as pool:
        task = gevent.Greenlet(pool.acquire)
        # Called before the pool's own, since it was there first: the pool finds that there is nothing to take back.
        task.rawlink(lambda ended: pool.release(cast(Line, ended.value)))
        task.start()
        task.join(BOUND)
        gevent.sleep(0)
        gevent.sleep(0)
        logged.take(0)
        assert (pool.idle, pool.stats().closed["reclaimed"]) == (1, 0)


def test_what_was_lent_anew_in_the_moment_in_which_its_borrower_ended_is_not_reclaimed(
    server: LineEchoServer, logged: Logged
) -> None:
    with line_pool(server, max_connections=1, **RECLAIMING) as pool:
        line = pool.acquire()
        pool.release(line)

        def pass_on(ended: object) -> None:
            pool.release(line)
            assert pool.acquire(timeout=0) is line

        def borrow_and_end() -> None:
            assert pool.acquire() is line
            cast("gevent.Greenlet[..., None]", gevent.getcurrent()).rawlink(
                pass_on
            )  # called after the pool's own, and before the pool acts

        run_to_end(borrow_and_end)
        gevent.sleep(0)
        gevent.sleep(0)
        assert line.ask("somebody has it") == "somebody has it"
        assert (pool.in_use, pool.stats().closed["reclaimed"]) == (1, 0)
        pool.release(line)
        logged.take(0)


def test_a_leak_that_was_reported_is_reclaimed_without_having_come_back(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, max_connections=1, leak_threshold=100, reclaim=True) as pool:
        may_end = Event()

        def borrow_for_too_long() -> None:
            pool.acquire()
            assert may_end.wait(BOUND)

        task = gevent.spawn(borrow_for_too_long)
        wait_for(lambda: pool.in_use == 1 and bool(pool.holders()))
        report_at(pool, 200)
        assert "longer than leak_threshold" in logged.take(1)[0].getMessage()
        may_end.set()
        task.join(BOUND)
        [record] = logged.take(1)
        assert "ended without releasing" in record.getMessage()
        server.wait_open(0)


@pytest.mark.parametrize("options", [RECLAIMING, WATCHED], ids=["reclaim", "both"])
def test_raw_greenlets_and_the_main_one_are_not_watched(
    server: LineEchoServer, logged: Logged, options: dict[str, Any]
) -> None:
    assert not isinstance(gevent.getcurrent(), gevent.Greenlet)  # pytest runs in the main one
    seen: list[Line] = []
    with line_pool(server, initial_connections=3, **options) as pool:
        mine = pool.acquire()
        raw = gevent.spawn_raw(acquire_and_end, pool, seen)
        pure = greenlet.greenlet(lambda: seen.append(pool.acquire(timeout=0)), gevent.get_hub())
        gevent.get_hub().loop.run_callback(pure.switch)
        wait_for(lambda: raw.dead and pure.dead)
        gevent.sleep(0)
        gevent.sleep(0)
        assert {id(holder.greenlet) for holder in pool.holders()} == {id(gevent.getcurrent()), id(raw), id(pure)}
        assert [line.ask("nobody takes it back") for line in seen] == ["nobody takes it back"] * 2
        give_back(pool, [mine, *seen])
        logged.take(0)
        assert (pool.in_use, pool.faults()) == (0, [])


def test_reclaiming_in_a_closed_pool_ends_its_drain(server: LineEchoServer, logged: Logged) -> None:
    pool = line_pool(server, **RECLAIMING)
    may_end = Event()

    def hold() -> None:
        pool.acquire()
        assert may_end.wait(BOUND)

    holding = gevent.spawn(hold)
    wait_for(lambda: pool.in_use == 1 and bool(pool.holders()))
    draining = Attempt(pool.close, 1000)
    assert not draining.ready()
    may_end.set()
    assert draining.result() is None
    holding.join(BOUND)
    assert (pool.total, pool.stats().closed["reclaimed"]) == (0, 1)
    assert "ended without releasing" in logged.take(1)[0].getMessage()


def test_a_borrower_that_outlives_the_pool_ends_in_peace(server: LineEchoServer, logged: Logged) -> None:
    may_end = Event()
    pools = [line_pool(server, **RECLAIMING)]

    def hold() -> None:
        line = pools[0].acquire()
        pools.clear()
        assert may_end.wait(BOUND)
        line.close()

    holding = gevent.spawn(hold)
    wait_for(lambda: not pools)
    gc.collect()
    may_end.set()
    holding.get(timeout=BOUND)
    logged.take(0)


def test_g4_what_is_paused_or_shrunk_is_reclaimed_like_any_other(server: LineEchoServer, logged: Logged) -> None:
    with line_pool(server, max_connections=2, **RECLAIMING) as pool:
        lost = gevent.spawn(borrow, pool, 2)
        lost.join(BOUND)
        pool.resize(1)
        pool.pause()
        server.wait_open(0)
        wait_for(lambda: pool.total == 0)
        logged.take(2)
        pool.resume()
        pool.release(pool.acquire(timeout=BOUND))
        assert pool.faults() == []


def test_a_greenlet_that_lives_long_keeps_nothing_of_what_it_has_borrowed(server: LineEchoServer) -> None:
    before = loans_alive()
    with line_pool(server, max_connections=2, **WATCHED) as pool:

        def live_long() -> int:
            for _ in range(2000):
                with pool.connection():
                    pass
                pool.release(pool.acquire())
            # Whatever would be called at its end would hold a loan each.
            return loans_alive()

        assert gevent.spawn(live_long).get(timeout=BOUND) == before
        assert pool.stats().acquired == 4000


@pytest.mark.parametrize("options", ALL, ids=IDS)
def test_g1_g2_g4_greenlets_that_end_with_or_without_giving_back_under_load(
    server: LineEchoServer, logged: Logged, rng: Any, options: dict[str, Any]
) -> None:
    reclaims = "reclaim" in options
    with line_pool(server, max_connections=4, **options) as pool:
        lost = 0

        def use(who: int, forgets: bool) -> None:
            nonlocal lost
            for turn in range(5):
                with pool.connection(timeout=BOUND) as line:
                    assert line.ask(f"{who}.{turn}") == f"{who}.{turn}"
            line = pool.acquire(timeout=BOUND)
            assert line.ask(f"{who}") == f"{who}"
            if forgets:
                lost += 1
            else:
                pool.release(line)

        tasks = [gevent.spawn(use, who, reclaims and rng.random() < 0.3) for who in range(60)]
        gevent.joinall(tasks, timeout=BOUND, raise_error=True)
        assert all(task.successful() for task in tasks)
        lines = borrow(pool, 4)
        assert pool.stats().closed["reclaimed"] == lost == len(logged.take())
        assert (lost > 0) == reclaims
        assert server.most <= 4
        give_back(pool, lines)
        assert pool.faults() == []


# What PoolExhaustedError says


def exhausted(pool: Pool[Any], timeout: float = 0.01) -> PoolExhaustedError:
    with pytest.raises(PoolExhaustedError) as raised:
        pool.acquire(timeout=timeout)
    return raised.value


def test_it_says_how_many_there_are_and_how_long_this_one_waited(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2, name="orders") as pool:
        lines = borrow(pool, 2)
        others = [Attempt(pool.acquire, timeout=None) for _ in range(3)]
        error = exhausted(pool)
        assert re.match(r"Pool 'orders' has no connection to lend after \d\.\d{3} s: ", str(error))
        for part in ("2 of at most 2 in use", "0 idle", "0 opening", "0 closing", "3 others waiting"):
            assert part in str(error)
        assert "raise max_connections" in str(error)
        assert error.stats is not None
        assert (error.stats.in_use, error.stats.max_connections, error.stats.waiting) == (2, 2, 3)
        assert error.waited >= 0.01
        assert error.last_error is None
        assert "has held one" not in str(error)  # nobody asked for it to be noted
        give_back(pool, lines)
        for other in others:
            pool.release(other.result())


@pytest.mark.parametrize("options", ALL, ids=IDS)
def test_it_says_who_has_held_one_longest_and_where_that_was_borrowed(
    server: LineEchoServer, options: dict[str, Any]
) -> None:
    done = Event()
    with line_pool(server, max_connections=2, **options) as pool:

        def hold() -> None:
            with pool.connection():
                at.append(line_number() - 1)
                assert done.wait(BOUND)

        at: list[int] = []
        longest = gevent.spawn(hold)
        wait_for(lambda: bool(at))
        second = pool.acquire()
        text = str(exhausted(pool))
        assert re.search(rf"{re.escape(repr(longest))} has held one for \d+\.\d{{3}} s, ", text)
        assert f"borrowed in hold ({__file__}:{at[0]})" in text
        assert text.count("has held one") == 1
        done.set()
        longest.join(BOUND)
        text = str(exhausted_of_two(pool))
        assert repr(gevent.getcurrent()) in text
        pool.release(second)


def exhausted_of_two(pool: Pool[Line]) -> PoolExhaustedError:
    with pool.connection():
        return exhausted(pool)


def test_it_says_that_the_pool_is_paused_and_who_is_in_the_way_of_what(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, max_waiting=1, **NOTED) as pool:
        line = pool.acquire()
        pool.pause()
        waiter = Attempt(pool.acquire, timeout=None)
        text = str(exhausted(pool, BOUND))  # refused at once, for max_waiting
        assert "as many wait as max_waiting=1 allows" in text
        assert "the pool is paused: resume() lends again" in text
        assert "raise max_connections" not in text
        pool.resume()
        pool.release(line)
        pool.release(waiter.result())


def test_it_says_what_became_of_the_last_dial(logged: Logged) -> None:
    pool: Pool[Line] = Pool(Line, {"host": "127.0.0.1", "port": refused_port()}, max_connections=1)
    with pool:
        with pytest.raises(ConnectionRefusedError) as refused:
            pool.acquire(timeout=BOUND)
        error = exhausted(pool, 0)
        assert isinstance(error.last_error, ConnectionRefusedError)
        assert error.last_error.args == refused.value.args
        assert repr(refused.value) in str(error)
        assert "last connect error" in str(error)


def test_it_says_that_a_dial_is_what_takes_so_long(dials: Dials) -> None:
    with dials.pool(max_connections=1) as pool:
        text = str(exhausted(pool))
        assert "1 opening" in text
        assert "connect_timeout=" in text
        dials[0].go_on()


@pytest.mark.parametrize("options", [{}, *ALL], ids=["plain", *IDS])
def test_it_can_be_pickled(server: LineEchoServer, options: dict[str, Any]) -> None:
    with line_pool(server, max_connections=1, **options) as pool:
        line = pool.acquire()
        error = exhausted(pool)
        error.last_error = ConnectionRefusedError(111, "refused")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.stats, copy.waited) == (
            PoolExhaustedError,
            str(error),
            error.stats,
            error.waited,
        )
        assert (type(copy.last_error), copy.last_error.args) == (ConnectionRefusedError, (111, "refused"))
        pool.release(line)
    closed = pickle.loads(pickle.dumps(PoolClosedError("closed")))
    assert (type(closed), str(closed)) == (PoolClosedError, "closed")


# Deadlocks


def nested(pool: Pool[Line], all_hold: Event, holding: list[Line], count: int, timeout: float | None) -> str:
    """Borrow, and while holding that, borrow again."""
    with pool.connection(timeout=BOUND) as line:
        holding.append(line)
        if len(holding) == count:
            all_hold.set()
        assert all_hold.wait(BOUND)
        try:
            with pool.connection(timeout=timeout):
                return "served"
        except PoolExhaustedError as error:
            return str(error)


@pytest.mark.parametrize("options", ALL, ids=IDS)
def test_a_deadlock_of_nested_acquires_is_named(server: LineEchoServer, options: dict[str, Any]) -> None:
    with line_pool(server, max_connections=3, **options) as pool:
        all_hold, holding = Event(), list[Line]()
        # The first one gives up soon, and that lets the others go on.
        tasks = [gevent.spawn(nested, pool, all_hold, holding, 3, limit) for limit in (0.02, BOUND, None)]
        texts = [task.get(timeout=2 * BOUND) for task in tasks]
        assert "a deadlock: every borrower is waiting for a further connection" in texts[0]
        assert id_in(tasks[0]) in texts[0]  # the one who has held longest, and where
        assert "in nested (" in texts[0]
        assert texts[1:] == ["served", "served"]


def test_a_deadlock_with_oneself_is_named(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, **NOTED) as pool, pool.connection():
        for timeout in (0, 0.01):
            assert "; a deadlock:" in str(exhausted(pool, timeout))
        with pytest.raises(PoolExhaustedError, match="a deadlock"):
            pool.acquire(1)


def test_a_deadlock_of_others_is_named_to_a_newcomer_too(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2, **NOTED) as pool:
        all_hold, holding = Event(), list[Line]()
        tasks = [gevent.spawn(nested, pool, all_hold, holding, 2, None) for _ in range(2)]
        wait_for(lambda: pool.waiting == 2)
        assert "; a deadlock:" in str(exhausted(pool))
        pool.resize(3)  # is one way out
        assert [task.get(timeout=BOUND) for task in tasks] == ["served", "served"]


def test_no_deadlock_is_named_while_one_of_the_holders_works(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=3, **NOTED) as pool:
        all_hold, holding, done = Event(), list[Line](), Event()

        def work() -> None:
            with pool.connection() as line:
                holding.append(line)
                if len(holding) == 3:
                    all_hold.set()
                assert done.wait(BOUND)

        working = gevent.spawn(work)
        tasks = [gevent.spawn(nested, pool, all_hold, holding, 3, None) for _ in range(2)]
        wait_for(lambda: pool.waiting == 2)
        for timeout in (0, 0.01):
            assert "; a deadlock:" not in str(exhausted(pool, timeout))
        done.set()
        assert [task.get(timeout=BOUND) for task in tasks] == ["served", "served"]
        working.join(BOUND)


def test_no_deadlock_is_named_while_one_was_granted_and_not_collected(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, **NOTED) as pool:
        line = pool.acquire()
        waiter = Attempt(pool.acquire, timeout=None)
        pool.release(line)
        with nobody_else_runs():
            assert "; a deadlock:" not in str(exhausted(pool, 0))
        pool.release(waiter.result())


def test_no_deadlock_is_named_when_nobody_knows(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1) as pool, pool.connection():
        assert "; a deadlock:" not in str(exhausted(pool))


def test_no_deadlock_is_named_while_there_is_room(dials: Dials) -> None:
    with dials.pool(max_connections=2, **NOTED) as pool:

        def ask_for_two() -> str:
            with pool.connection(timeout=BOUND):
                return str(exhausted(pool))

        asking = Attempt(ask_for_two)
        dials.wait(1)
        dials[0].go_on()
        assert "; a deadlock:" not in asking.result()  # all who hold one wait, but for a dial
        dials[1].go_on()


def test_a_paused_pool_is_no_deadlock(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, **NOTED) as pool, pool.connection():
        pool.pause()
        text = str(exhausted(pool))
        assert "paused" in text
        assert "; a deadlock:" not in text
        pool.resume()


# The picture


SECRET = "not for the log"


def test_what_a_greenlet_was_given_is_shown_nowhere(server: LineEchoServer, logged: Logged) -> None:
    def login(password: str, may_end: Event, returns: bool) -> None:
        line = pool.acquire(timeout=BOUND)
        assert may_end.wait(BOUND)
        if returns:
            pool.release(line)

    def told(text: str) -> bool:
        return ": login>" in text and SECRET not in text

    with line_pool(server, max_connections=2, **WATCHED) as pool:
        may_end = Event()
        tasks = [gevent.spawn(login, SECRET, may_end, returns) for returns in (True, False)]
        tasks[0].name = "who logs in"
        waiting = gevent.spawn(login, SECRET, may_end, True)
        wait_for(lambda: (pool.in_use, pool.waiting) == (2, 1))
        picture = pool.debug()
        assert picture.count(": login>") == 3
        assert "<Greenlet 'who logs in' at 0x" in picture
        assert told(picture)
        assert told(str(exhausted(pool, 0)))
        report_at(pool, 2000)
        may_end.set()
        gevent.joinall([*tasks, waiting], BOUND)
        texts = [record.getMessage() for record in logged.take(4)]
        assert not any(SECRET in text for text in texts)
        assert [told(text) for text in texts if "longer than leak_threshold" in text] == [True, True]
        assert [told(text) for text in texts if "came back after" in text] == [True]
        assert sum("ended without releasing" in text for text in texts) == 1
        wait_for(lambda: pool.in_use == 0)


def test_nothing_is_announced_that_a_pool_never_does(server: LineEchoServer) -> None:
    with line_pool(server, reap_expired_connections=False, check_after_idle=None) as pool, pool.connection():
        assert "what the pool does next" not in pool.debug()
    with line_pool(server, check_after_idle=None, reap_interval=1010) as pool, pool.connection():
        announced = pool.debug().partition("what the pool does next\n")[2]
        assert re.fullmatch(r"    in 16 min \d+ s: drop_expired\(\)\n?", announced)


def test_a_greenlet_whose_repr_fails_is_shown_and_named_all_the_same(server: LineEchoServer) -> None:
    class Odd(gevent.Greenlet):  # type: ignore[type-arg]
        def __repr__(self) -> str:
            raise ValueError("no repr")

        def _run(self) -> None:
            with pool.connection(timeout=BOUND):
                assert may_end.wait(BOUND)

    class OddArgument:
        __repr__ = Odd.__repr__

    def work(_: object) -> None:
        Odd._run(holder)

    with line_pool(server, max_connections=1, **NOTED) as pool:
        may_end = Event()
        holder = Odd()
        holder.start()
        wait_for(lambda: pool.in_use == 1)
        waiter = gevent.spawn(work, OddArgument())
        wait_for(lambda: pool.waiting == 1)
        for text in (pool.debug(), gsocketpool.debug()):
            assert f"<Odd at {id_in(holder)}: " in text
            assert f"<Greenlet at {id_in(waiter)}: work> for " in text
        assert f"<Odd at {id_in(holder)}: " in str(exhausted(pool, 0))
        may_end.set()
        for task in (holder, waiter):
            task.get(timeout=BOUND)


def test_others_may_come_while_the_picture_is_drawn(server: LineEchoServer) -> None:
    class Raw(greenlet.greenlet):
        def __repr__(self) -> str:
            waiters.append(gevent.spawn(borrow_once))
            wait_for(lambda: pool.waiting > len(waiters))
            return "<somebody who lets another one come>"

    def borrow_once() -> None:
        with pool.connection(timeout=BOUND):
            pass

    waiters: list[Any] = []
    with line_pool(server, max_connections=1) as pool:
        with pool.connection():
            hub = gevent.get_hub()
            hub.loop.run_callback(Raw(borrow_once, hub).switch)
            wait_for(lambda: pool.waiting == 1)
            assert "    <somebody who lets another one come>\n" in pool.debug()
            assert len(waiters) == 1
        gevent.joinall(waiters, BOUND, raise_error=True)
        assert pool.stats().acquired == 3

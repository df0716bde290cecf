"""Connections that are kept fresh: `max_lifetime`, `idle_timeout`, `max_uses`, `keepalive`, peers that hang up on what
idles, and `clear()`."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from gsocketpool import Pool, PoolExhaustedError, TcpConnection, UnixConnection, wrap
from gsocketpool.core import Core, Member
from gsocketpool.lifetime import NEVER, Limits
from tests.conftest import Logged
from tests.dials import BOUND, Attempt, Dials, nobody_else_runs
from tests.knife import ASLEEP, WAKING, Knife
from tests.lines import Line, borrow, give_back, line_pool
from tests.proxy import Proxy
from tests.servers import Authority, LineEchoServer, Server, echo_lines, refused_port, say, swallow
from tests.test_kills import CAP, THROWN, SlowToClose, World
from tests.test_kills import Line as VictimsLine
from tests.test_warm import FOR_EVER, HARDLY_ANY, is_stocked, strike_everywhere, until

AUTHORITY = Authority()


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def dials(server: LineEchoServer) -> Dials:
    return Dials(server)


def member_of(pool: Pool[Any], connection: object) -> Member[Any]:
    return pool._members[id(connection)]


def members_of(pool: Pool[Any]) -> list[Member[Any]]:
    return list(pool._members.values())


def closed_for(pool: Pool[Any]) -> dict[str, int]:
    """How many were closed, by reason, without those of which there were none."""
    return {reason: count for reason, count in pool.stats().closed.items() if count}


# max_lifetime


def test_idle_connections_are_closed_when_their_time_is_over(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=3, max_lifetime=0.05) as pool:
        server.wait_open(0)
        until("their slots are free", lambda: pool.total == 0)
        assert closed_for(pool) == {"expired": 3}
        assert server.accepted == 3
        with pool.connection() as line:
            assert line.ask("another") == "another"


def test_idle_connections_whose_time_is_over_are_replaced_where_they_are_wanted(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=3, max_lifetime=0.05) as pool:
        server.wait_accepted(12)
        until("nine have gone", lambda: pool.stats().closed["expired"] >= 9)
        assert set(closed_for(pool)) == {"expired"}
        pool.wait_ready(BOUND)


def test_what_is_borrowed_when_its_time_is_over_is_closed_when_it_comes_back(server: LineEchoServer) -> None:
    with line_pool(server, max_lifetime=0.03, lifetime_jitter=0) as pool:
        by_hand, with_block = borrow(pool, 1)[0], pool.connection()
        line = with_block.__enter__()
        until("both are too old", lambda: [m.fate for m in members_of(pool)] == ["expired", "expired"])
        assert [by_hand.ask("still"), line.ask("open")] == ["still", "open"]
        assert closed_for(pool) == {}
        pool.release(by_hand)
        with_block.__exit__(None, None, None)
        server.wait_open(0)
        until("their slots are free", lambda: pool.total == 0)
        assert closed_for(pool) == {"expired": 2}


def test_who_waits_for_what_is_too_old_gets_another(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1, max_lifetime=0.03) as pool:
        (old,) = borrow(pool, 1)
        waiter = Attempt(pool.acquire, timeout=None)
        until("it is too old", lambda: member_of(pool, old).fate == "expired")
        pool.release(old)
        line = waiter.result()
        assert line is not old
        assert line.ask("new") == "new"
        pool.release(line)
        assert server.most == 1


def test_the_time_of_a_connection_begins_when_it_is_open(dials: Dials) -> None:
    with dials.pool(max_lifetime=1000, lifetime_jitter=0) as pool:
        first, second = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        dials.wait(2)
        before = time.monotonic()
        dials[1].go_on()
        between = time.monotonic()
        dials[0].go_on()
        after = time.monotonic()
        lent = [first.result(), second.result()]
        assert before + 1000 <= member_of(pool, dials[1]).retire_at <= between + 1000
        assert between + 1000 <= member_of(pool, dials[0]).retire_at <= after + 1000
        for connection in lent:
            pool.release(connection)


@pytest.mark.parametrize("jitter", [0, 0.1, 0.5, 1])
def test_what_was_opened_together_does_not_go_together(server: LineEchoServer, jitter: float) -> None:
    before = time.monotonic()
    with line_pool(server, initial_connections=30, max_lifetime=1000, lifetime_jitter=jitter) as pool:
        now = time.monotonic()
        ends = sorted(member.retire_at for member in members_of(pool))
        assert before + 1000 * (1 - jitter) <= ends[0]
        assert ends[-1] <= now + 1000
        # Thirty numbers that all lie within a third of their range have one chance in 10 ** 12.
        assert ends[-1] - ends[0] >= 1000 * jitter / 3


@pytest.mark.parametrize(("chance", "end"), [(0.0, 110.0), (0.5, 105.0), (1.0, 100.0)])
def test_jitter_only_ever_takes_off(chance: float, end: float) -> None:
    limits = Limits(max_lifetime=100, lifetime_jitter=0.1)
    assert limits.retire_at(10.0, lambda: chance) == pytest.approx(end)
    assert Limits().retire_at(10.0, lambda: chance) == NEVER


def test_the_cost_of_what_expires_grows_with_what_expires_and_not_with_what_idles() -> None:
    class Counting(Limits):
        looks = 0

        def idles_too_long(self, since: float, now: float) -> bool:
            Counting.looks += 1
            return super().idles_too_long(since, now)

    core: Core[object] = Core(1000, max_connecting=1000, limits=Counting(max_lifetime=10_000, idle_timeout=10_000))
    for number in range(1000):
        assert core.permit_unasked()
        core.opened(object(), retire_at=10.0 if number < 3 else 10_000.0, look_at=10.0 if number < 3 else 10_000.0)
    core.cool(0.0)
    for now in range(10):
        assert core.audit(float(now)) == []
        assert core.next_audit() == 10
    assert len(core.audit(10.0)) == 3
    assert core.next_audit() == 10_000
    assert Counting.looks == 0  # not one of the others was looked at


# idle_timeout


@pytest.mark.parametrize("check_after_idle", [0, 0.5, None])
@pytest.mark.parametrize("order", ["lifo", "fifo"])
@pytest.mark.parametrize("stock", [0, 2])
def test_what_nobody_touches_is_closed_down_to_the_stock(
    server: LineEchoServer, stock: int, order: str, check_after_idle: float | None
) -> None:
    options: dict[str, Any] = {"check_after_idle": check_after_idle, "order": order}
    with line_pool(server, initial_connections=5, min_idle=stock, idle_timeout=0.05, **options) as pool:
        server.wait_open(stock)
        until("down to the stock", is_stocked(pool, stock))
        gevent.sleep(0.1)  # twice the time in which the stock must not go
        assert closed_for(pool) == {"idle": 5 - stock}
        assert (server.accepted, pool.idle) == (5, stock)


def test_the_surplus_after_a_spike_goes_and_what_is_in_use_stays(server: LineEchoServer) -> None:
    with line_pool(server, idle_timeout=0.05) as pool:
        give_back(pool, borrow(pool, 6))
        used: set[int] = set()
        while pool.stats().closed["idle"] < 5:
            with gevent.Timeout(BOUND), pool.connection(timeout=0) as line:
                used.add(id(line))
                gevent.sleep(0.001)
        assert len(used) == 1
        assert (pool.size, server.accepted) == (1, 6)


def test_what_is_borrowed_does_not_idle(server: LineEchoServer) -> None:
    with line_pool(server, idle_timeout=0.03) as pool:
        line, other = borrow(pool, 2)
        pool.release(other)
        until("the other one is closed", lambda: pool.total == 1)
        gevent.sleep(0.06)
        assert (pool.in_use, closed_for(pool)) == (1, {"idle": 1})
        assert line.ask("here") == "here"
        pool.release(line)


@pytest.mark.parametrize("always_cold", [False, True])
def test_what_has_just_been_used_is_not_closed_however_old_it_is(always_cold: bool) -> None:
    core: Core[object] = Core(1, max_connecting=1, limits=Limits(idle_timeout=10), always_cold=always_cold)
    assert core.permit_unasked()
    core.opened(object(), look_at=10.0)
    core.cool(0.0)
    member = core.take(wait=False)
    assert isinstance(member, Member)
    member.cold = False  # as whoever lends it does
    core.give(member)
    assert core.audit(10.0) == []
    core.cool(11.0)
    assert core.audit(20.0) == []
    assert core.next_audit() == 21
    assert core.audit(21.0) == [member]


def test_keepalives_and_the_reaper_do_not_keep_idle_connections_from_being_closed(server: LineEchoServer) -> None:
    with line_pool(
        server, initial_connections=3, idle_timeout=0.1, keepalive=0.02, reap_interval=0.02, max_uses=1000
    ) as pool:
        server.wait_open(0)
        until("their slots are free", lambda: pool.total == 0)
        assert closed_for(pool) == {"idle": 3}


# max_uses


@pytest.mark.parametrize("how", ["with", "by hand"])
def test_a_connection_is_lent_as_often_as_it_may_be_and_not_once_more(server: LineEchoServer, how: str) -> None:
    with line_pool(server, max_uses=3) as pool:
        uses: list[Line] = []
        for _ in range(10):
            if how == "with":
                with pool.connection() as line:
                    uses.append(line)
            else:
                uses += borrow(pool, 1)
                pool.release(uses[-1])
        assert [count for _, count in sorted(Counter(map(uses.index, uses)).items())] == [3, 3, 3, 1]
        until("three have gone", lambda: pool.total == 1)
        assert closed_for(pool) == {"expired": 3}
        assert pool.stats().acquired == 10


def test_what_is_handed_to_a_waiter_is_a_use_too(server: LineEchoServer) -> None:
    uses: list[Line] = []
    with line_pool(server, max_uses=4, max_connections=1) as pool:

        def use() -> None:
            with pool.connection(timeout=None) as line:
                uses.append(line)
                gevent.sleep(0)

        users = [gevent.spawn(use) for _ in range(12)]
        gevent.joinall(users, timeout=BOUND, raise_error=True)
        assert [count for _, count in sorted(Counter(map(uses.index, uses)).items())] == [4, 4, 4]
        assert (server.accepted, server.most) == (3, 1)


def test_what_a_killed_waiter_was_granted_is_no_use(server: LineEchoServer) -> None:
    with line_pool(server, max_uses=2, max_connections=1) as pool:
        (line,) = borrow(pool, 1)
        waiter = Attempt(pool.acquire, timeout=None)
        waiter.greenlet.kill(block=False)
        pool.release(line)  # it is granted, and killed before he collects it
        gevent.sleep(0)
        assert borrow(pool, 1) == [line]
        pool.release(line)
        until("it has gone", lambda: pool.total == 0)
        assert pool.stats().acquired == 2


def test_with_one_use_each_every_borrower_gets_a_new_connection(server: LineEchoServer) -> None:
    with line_pool(server, max_uses=1, max_connections=2, min_idle=1) as pool:
        for turn in range(10):
            with pool.connection(timeout=BOUND) as line:
                assert line.ask(str(turn)) == str(turn)
        assert pool.stats().closed["expired"] == 10
        assert server.most <= 2


# keepalive


class Proven(Line):
    """Says `alive` when it is asked, after `may_answer`. What happens is noted in `book`."""

    def __init__(self, host: str, port: int, book: Book) -> None:
        super().__init__(host, port)
        self.book = book
        self.keepalives = 0

    def keepalive(self) -> bool:
        self.keepalives += 1
        self.book.begin(self)
        try:
            assert self.book.may_answer.wait(BOUND), "the test never let this keepalive go on"
            return bool(self.book.answer())
        finally:
            self.book.running.remove(self)


class Book:
    """What happened to the `Proven` connections of a pool, and what is to happen."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.may_answer = Event()
        self.may_answer.set()
        self.answer: Callable[[], Any] = lambda: True
        self.running: list[Proven] = []
        self.asked: list[Proven] = []
        self.greenlets: list[Any] = []
        self.most = 0

    def begin(self, line: Proven) -> None:
        self.running.append(line)
        self.asked.append(line)
        self.greenlets.append(gevent.getcurrent())
        self.most = max(self.most, len(self.running))

    def pool(self, **options: Any) -> Pool[Proven]:
        return Impatient(Proven, {"host": "127.0.0.1", "port": self.server.port, "book": self}, **options)

    def wait(self, count: int) -> None:
        until(f"{count} keepalives", lambda: len(self.asked) >= count)

    def hold(self, count: int = 1) -> None:
        """Let no keepalive go on that begins from now on, and wait until so many have begun."""
        self.may_answer.clear()
        self.wait(len(self.asked) + count)


class Impatient(Pool[Any]):
    keepalive_grace: ClassVar[float] = BOUND


class VeryImpatient(Pool[Any]):
    keepalive_grace: ClassVar[float] = 0.03


@pytest.fixture
def book(server: LineEchoServer) -> Book:
    return Book(server)


def test_keepalive_is_called_again_and_again_on_what_idles_and_on_nothing_else(book: Book) -> None:
    started = time.monotonic()
    with book.pool(initial_connections=3, keepalive=0.02) as pool, pool.connection(timeout=0) as lent:
        idle = [member.connection for member in members_of(pool) if member.connection is not lent]
        until("each has been asked four times", lambda: all(line.keepalives >= 4 for line in idle))
        assert time.monotonic() >= started + 4 * 0.02  # not more often than that
        assert lent.keepalives == 0
        assert closed_for(pool) == {}
        assert pool.stats().acquired == 1
        lent.ask("x")
    assert book.greenlets[0] is not gevent.getcurrent()


def test_what_is_used_all_the_time_is_not_asked(book: Book) -> None:
    with book.pool(initial_connections=2, keepalive=0.02) as pool:
        used: set[Proven] = set()
        while len(book.asked) < 4:
            with gevent.Timeout(BOUND), pool.connection(timeout=0) as line:
                used.add(line)
                gevent.sleep(0.001)
        (line,) = used
        assert line.keepalives == 0


@pytest.mark.parametrize(("keepalive", "since", "proven", "due"), [(10, 0, 0, 10), (10, 5, 0, 15), (10, 5, 8, 18)])
def test_a_keepalive_is_due_so_long_after_the_last_use_or_answer(
    keepalive: float, since: float, proven: float, due: float
) -> None:
    limits = Limits(keepalive=keepalive)
    assert limits.next_look(NEVER, since, max(since, proven)) == due
    assert not limits.is_unproven(max(since, proven), due - 0.1)
    assert limits.is_unproven(max(since, proven), due)


def test_what_has_been_due_for_long_is_asked_once() -> None:
    core: Core[object] = Core(1, max_connecting=1, limits=Limits(keepalive=10))
    assert core.permit_unasked()
    core.opened(object(), look_at=10.0)
    core.cool(0.0)
    for now in 10.0, 20.0, 30.0:  # no greenlet was free to ask
        core.audit(now)
    member = core.prove()
    assert member is not None
    core.inspected(member, first=True)
    assert core.prove() is None


@pytest.mark.parametrize("max_uses", [None, 100])
def test_what_is_asked_does_not_become_the_one_that_is_lent_next(max_uses: int | None) -> None:
    core: Core[str] = Core(2, max_connecting=2, limits=Limits(keepalive=10, max_uses=max_uses))
    for name in "old", "newer":
        assert core.permit_unasked()
        core.opened(name, look_at=10.0 if name == "old" else 11.0)
        core.cool(0.0)
    core.audit(10.0)
    member = core.prove()
    assert member is not None
    assert member.connection == "old"
    assert core.inspected(member, first=True) is None
    lent = core.take(wait=False)
    assert isinstance(lent, Member)
    assert lent.connection == "newer"


def test_a_connection_that_does_not_answer_its_keepalive_is_replaced(book: Book) -> None:
    with book.pool(min_idle=2, keepalive=0.02) as pool:
        pool.wait_ready(BOUND)
        first = {id(member.connection) for member in members_of(pool)}
        book.answer = lambda: False
        until("both are closed", lambda: pool.stats().closed["stale"] >= 2)
        book.answer = lambda: True
        until("a stock of 2", is_stocked(pool, 2))
        assert set(closed_for(pool)) == {"stale"}
        assert not first & {id(member.connection) for member in members_of(pool)} or book.server.accepted >= 4
        book.server.wait_open(2)


@pytest.mark.parametrize("error", [ConnectionResetError, ValueError, gevent.Timeout, gevent.GreenletExit])
def test_a_keepalive_that_raises_is_logged_and_the_connection_replaced(
    book: Book, error: type[BaseException], logged: Logged
) -> None:
    def answer() -> bool:
        if len(book.asked) == 1:
            raise error
        return True

    book.answer = answer
    with book.pool(min_idle=1, keepalive=0.02) as pool:
        book.wait(2)
        assert book.asked[0] is not book.asked[1]
        assert closed_for(pool) == {"stale": 1}
        (record,) = logged.take(1)
        assert "keepalive() failed; the connection is closed: " in record.getMessage()
        assert error.__name__ in record.getMessage()
        assert record.exc_info is not None
        assert pool.faults() == []


def test_a_keepalive_that_hangs_counts_as_failed(server: LineEchoServer, logged: Logged) -> None:
    hung: list[object] = []

    class Hanging(Line):
        def keepalive(self) -> bool:
            if not hung:
                hung.append(self)
                Event().wait(BOUND)
            return True

    with VeryImpatient(Hanging, {"host": server.host, "port": server.port}, min_idle=1, keepalive=0.02) as pool:
        (record,) = logged.take(1)
        assert (
            "keepalive() failed; the connection is closed: TimeoutError('not done after 0.03 s')" in record.getMessage()
        )
        server.wait_accepted(2)
        until("a stock of 1", is_stocked(pool, 1))
        assert closed_for(pool) == {"stale": 1}
        assert members_of(pool)[0].connection is not hung[0]


def test_a_connection_is_not_lent_while_it_is_asked(book: Book) -> None:
    with book.pool(initial_connections=1, max_connections=1, keepalive=0.02) as pool:
        book.may_answer.clear()
        book.wait(1)
        assert pool.idle == 0
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0)
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.01)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
        book.may_answer.set()
        line = waiters[0].result()
        assert line is book.asked[0]
        assert line.ask("alive") == "alive"
        assert not waiters[1].ready()
        pool.release(line)
        assert waiters[1].result() is line
        pool.release(line)
        assert (closed_for(pool), pool.stats().acquired) == ({}, 2)


def test_who_waits_for_a_connection_that_turns_out_to_be_dead_gets_another(book: Book) -> None:
    with book.pool(initial_connections=1, max_connections=1, keepalive=0.02) as pool:
        book.may_answer.clear()
        book.wait(1)
        waiter = Attempt(pool.acquire, timeout=None)
        book.answer = lambda: False
        book.may_answer.set()
        line = waiter.result()
        assert line is not book.asked[0]
        assert line.ask("new") == "new"
        pool.release(line)
        assert book.server.most == 1


def test_what_is_asked_is_part_of_the_stock(book: Book) -> None:
    with book.pool(min_idle=2, keepalive=0.02) as pool:
        pool.wait_ready(BOUND)
        book.hold(2)
        assert (pool.idle, pool.size) == (0, 2)
        pool._start_dials()
        assert (pool.total, book.server.accepted) == (2, 2)
        book.may_answer.set()
        until("a stock of 2", is_stocked(pool, 2))


def test_no_more_are_asked_at_once_than_may_be_dialled(book: Book) -> None:
    book.may_answer.clear()
    with book.pool(initial_connections=7, max_connecting=2, keepalive=0.02) as pool:
        book.wait(2)
        gevent.sleep(0.05)  # more than twice the time after which the others are due
        assert len(book.asked) == 2
        assert pool.idle == 5
        book.may_answer.set()
        until("all have been asked", lambda: len(set(book.asked)) == 7)
        assert book.most == 2


@pytest.mark.parametrize("how", ["closed", "cleared", "dropped", "expired", "shrunk"])
def test_what_is_given_up_while_it_is_asked_goes_when_it_has_answered(book: Book, how: str) -> None:
    with book.pool(initial_connections=1, keepalive=0.02, max_lifetime=1000) as pool:
        book.may_answer.clear()
        book.wait(1)
        (line,) = book.asked
        member = member_of(pool, line)
        if how == "closed":
            pool.close()
        elif how == "cleared":
            pool.clear()
        elif how == "dropped":
            pool.drop(line)
        elif how == "shrunk":
            pool.resize(1)
            other = gevent.spawn(pool.acquire, timeout=None)
            gevent.sleep(0)
            assert not other.ready()
            book.may_answer.set()
            assert other.get(timeout=BOUND) is line
            pool.release(line)
            return
        else:
            assert pool.audit(time.monotonic() + 1000) == []  # as if so much later; nothing is to be closed yet
            assert member.fate == "expired"
        assert pool.faults() == []
        book.may_answer.set()
        book.server.wait_open(0)
        until("its slot is free", lambda: pool.total == 0)
        assert closed_for(pool) == {how: 1}


def test_a_greenlet_that_asks_can_be_killed(book: Book, logged: Logged) -> None:
    with book.pool(min_idle=1, keepalive=0.02, max_connecting=1) as pool:
        for turn in range(1, 4):
            book.may_answer.clear()
            book.wait(turn)
            book.greenlets[-1].kill()
            (record,) = logged.take(1)
            assert "keepalive() failed; the connection is closed: GreenletExit" in record.getMessage()
            assert pool.faults() == []
            book.server.wait_accepted(1 + turn)
        book.may_answer.set()
        until("a stock of 1", is_stocked(pool, 1))
        assert closed_for(pool) == {"stale": 3}
        with pool.connection(timeout=BOUND) as line:
            assert line.ask("still") == "still"


def test_a_greenlet_that_is_killed_before_it_could_ask_loses_nothing(server: LineEchoServer) -> None:
    kept_alive: list[object] = []

    class Noted(Line):
        def keepalive(self) -> bool:
            kept_alive.append(self)
            return True

    with line_pool(server, Noted, initial_connections=1, keepalive=0.02) as pool:
        spawn = Pool._spawn
        killed: list[Any] = []

        def spawn_and_kill(job: Callable[..., object], *args: object) -> object:
            task: Any = spawn(pool, job, *args)
            if not killed and getattr(job, "__name__", "") == "_prove":
                killed.append(task)
                task.kill(block=False)
            return task

        pool._spawn = spawn_and_kill  # type: ignore[method-assign]
        until("it is asked all the same", lambda: len(kept_alive) >= 2)
        del pool._spawn
        assert len(killed) == 1
        assert closed_for(pool) == {}


def test_by_default_a_keepalive_finds_that_the_peer_has_hung_up(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2, keepalive=0.02, check_after_idle=None) as pool:
        server.wait_accepted(2)
        server.hang_up()
        until("both are closed", lambda: pool.total == 0)
        assert closed_for(pool) == {"stale": 2}


@pytest.mark.parametrize("how", ["keepalive", "check", "neither"])
def test_wrapped_objects_are_kept_alive(server: LineEchoServer, how: str) -> None:
    asked = 0

    def ask(sock: Any) -> bool:
        nonlocal asked
        asked += 1
        if how == "keepalive":  # it may wait for the peer
            sock.sendall(b"alive?\n")
            return bool(sock.recv(7) == b"alive?\n")
        return True

    functions: dict[str, Any] = {} if how == "neither" else {how: ask}

    def connect() -> Any:
        return socket.create_connection(("127.0.0.1", server.port))

    with Pool(wrap(connect, **functions), initial_connections=1, keepalive=0.02, check_after_idle=None) as pool:
        if how != "neither":
            until("it has been asked three times", lambda: asked >= 3)
        with pool.connection(timeout=BOUND) as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(100) == b"hello\n"


# Peers that hang up on what idles


def peek(sock: Any) -> bool:
    """What a driver's own look at its socket would do."""
    try:
        sock._sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class Plain:
    """An object with a descriptor that knows nothing of pools."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))

    def fileno(self) -> int:
        return int(self.sock.fileno())

    def close(self) -> None:
        self.sock.close()


KINDS = ["TCP", "TLS", "TLS, used before", "Unix", "wrapped", "wrapped, by its own fileno", "wrapped socket"]


def server_of(kind: str, folder: Path, handler: Callable[[Any], None] = echo_lines) -> Server:
    if kind == "Unix":
        return Server(handler, path=folder / "socket")
    return Server(handler, tls=AUTHORITY.server_context() if kind.startswith("TLS") else None)


def pool_of(kind: str, server: Server, **options: Any) -> Pool[Any]:
    port = server.port

    def connect() -> Any:
        return socket.create_connection(("127.0.0.1", port))

    if kind == "TCP":
        return Pool(TcpConnection, {"host": "127.0.0.1", "port": port}, **options)
    if kind.startswith("TLS"):
        tls = {"host": "127.0.0.1", "port": port, "tls": AUTHORITY.client_context()}
        return Pool(TcpConnection, tls, **options)
    if kind == "Unix":
        return Pool(UnixConnection, {"path": server._address}, **options)
    if kind == "wrapped":
        wrapped = wrap(
            lambda: [connect()],
            close=lambda box: box[0].close(),
            check=lambda box: peek(box[0]),
            fileno=lambda box: int(box[0].fileno()),
        )
        return Pool(wrapped, **options)
    if kind == "wrapped, by its own fileno":
        return Pool(wrap(lambda: Plain(port), check=lambda plain: peek(plain.sock)), **options)
    return Pool(wrap(connect, check=peek), **options)


def use(kind: str, pool: Pool[Any], count: int) -> None:
    """Have all of them talk to the server; TLS then has read its tickets."""
    lent = [pool.acquire(timeout=BOUND) for _ in range(count)]
    for connection in lent:
        if kind == "TLS, used before":
            connection.send(b"hello\n")
            assert connection.recv_until(b"\n") == b"hello"
    for connection in lent:
        pool.release(connection)


def are_watched(pool: Pool[Any]) -> Callable[[], bool]:
    return lambda: all(member.watch is not None for member in members_of(pool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check_after_idle", [0, 0.04])
def test_g8_a_peer_that_hangs_up_on_idle_connections_is_noticed_without_a_borrower(
    kind: str, check_after_idle: float, tmp_path: Path
) -> None:
    with (
        server_of(kind, tmp_path) as server,
        pool_of(kind, server, initial_connections=3, check_after_idle=check_after_idle) as pool,
    ):
        use(kind, pool, 3)
        until("all are watched", are_watched(pool))
        assert (pool.idle, closed_for(pool)) == (3, {})
        server.hang_up()
        until("all are closed", lambda: pool.total == 0)
        assert closed_for(pool) == {"stale": 3}
        assert pool.stats().acquired == 3
        assert pool.faults() == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_peer_hung_up_on_before_it_was_watched_is_noticed_too(kind: str, tmp_path: Path) -> None:
    with (
        server_of(kind, tmp_path) as server,
        pool_of(kind, server, initial_connections=2, check_after_idle=0.04) as pool,
    ):
        use(kind, pool, 2)
        server.wait_accepted(2)
        server.hang_up()
        until("both are closed", lambda: pool.total == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_peer_hung_up_on_is_replaced_where_it_is_wanted(kind: str, tmp_path: Path) -> None:
    with server_of(kind, tmp_path) as server, pool_of(kind, server, min_idle=2, check_after_idle=0.04) as pool:
        for turn in range(1, 4):
            until("a stock of 2", is_stocked(pool, 2))
            server.wait_open(2)
            server.hang_up()
            server.wait_accepted(2 + 2 * turn)
        until("a stock of 2", is_stocked(pool, 2))
        assert closed_for(pool) == {"stale": 6}


def test_session_tickets_do_not_cost_a_connection_and_do_not_blind_the_pool(tmp_path: Path) -> None:
    with (
        server_of("TLS", tmp_path) as server,
        pool_of("TLS", server, min_idle=2, check_after_idle=0.04, max_uses=100) as pool,
    ):
        until("a stock of 2", is_stocked(pool, 2))
        gevent.sleep(0.1)  # a few ticks, in which the tickets are found
        until("both are watched", are_watched(pool))
        assert (closed_for(pool), server.accepted) == ({}, 2)
        server.hang_up()
        server.wait_accepted(4)
        assert closed_for(pool) == {"stale": 2}


def test_what_says_something_unasked_is_closed_without_a_borrower() -> None:
    speak = Event()

    def handler(sock: Any) -> None:
        speak.wait()
        sock.sendall(b"stray")
        swallow(sock)

    with Server(handler) as server, line_pool(server, initial_connections=2, check_after_idle=0.04) as pool:
        until("both are watched", are_watched(pool))
        speak.set()
        until("both are closed", lambda: pool.total == 0)
        assert closed_for(pool) == {"stale": 2}


def test_a_connection_without_a_descriptor_is_found_dead_by_its_next_borrower_only(server: LineEchoServer) -> None:
    class Dumb(Line):
        def fileno(self) -> int | None:
            return None

    with line_pool(server, Dumb, initial_connections=2, check_after_idle=0.02) as pool:
        server.wait_accepted(2)
        server.hang_up()
        gevent.sleep(0.1)  # ten ticks
        until("both are checked when they are lent", lambda: all(map(pool.is_cold, members_of(pool))))
        assert (pool.idle, closed_for(pool)) == (2, {})
        with pool.connection(timeout=BOUND) as line:
            assert line.ask("new") == "new"
        assert closed_for(pool) == {"stale": 2}


@pytest.mark.parametrize("fileno", [lambda _: "x", lambda _: -1, lambda _: 1 / 0, lambda _: None, lambda _: 10**9])
def test_a_fileno_of_no_use_costs_nothing_but_the_watching(
    server: LineEchoServer, fileno: Callable[[Any], Any]
) -> None:
    asked = 0

    def counting(sock: Any) -> Any:
        nonlocal asked
        asked += 1
        return fileno(sock)

    def connect() -> Any:
        return socket.create_connection(("127.0.0.1", server.port))

    with Pool(wrap(connect, check=peek, fileno=counting), initial_connections=2, check_after_idle=0.04) as pool:
        until("both have been asked", lambda: asked >= 2)
        gevent.sleep(0.05)
        assert (pool.idle, closed_for(pool)) == (2, {})
        with pool.connection() as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(100) == b"hello\n"


def test_a_check_that_leaves_what_arrived_does_not_keep_the_hub_busy() -> None:
    checks = 0

    def check(_: Any) -> bool:
        nonlocal checks
        checks += 1
        return True

    with Server(say(b"hello")) as server:

        def connect() -> Any:
            return socket.create_connection(("127.0.0.1", server.port))

        started = time.monotonic()
        with Pool(wrap(connect, check=check), initial_connections=1, check_after_idle=0.04) as pool:
            until("it has been checked", lambda: checks > 0)
            gevent.sleep(0.1)
            assert checks <= (time.monotonic() - started) / 0.02 + 1  # a tick is 0.02 s
            with pool.connection() as sock:
                assert sock.recv(100) == b"hello"


def test_what_the_reaper_has_looked_at_is_watched_all_the_same(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2, check_after_idle=0.04) as pool:
        pool.drop_expired()
        until("both are watched", are_watched(pool))
        server.hang_up()
        until("both are closed", lambda: pool.total == 0)
        assert closed_for(pool) == {"stale": 2}


def test_nothing_is_watched_where_nothing_is_checked(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=2, check_after_idle=None, keepalive=0.03) as pool:
        gevent.sleep(0.05)
        assert [member.watch for member in members_of(pool)] == [None, None]


@pytest.mark.parametrize("order", ["lifo", "fifo"])
def test_only_what_idles_is_watched(server: LineEchoServer, order: str) -> None:
    with line_pool(server, initial_connections=3, check_after_idle=0.04, order=order) as pool:
        members = members_of(pool)
        for _ in range(3):
            until("all are watched", are_watched(pool))
            lines = borrow(pool, 2)
            assert [member_of(pool, line).watch for line in lines] == [None, None]
            assert sum(member.watch is not None for member in members) == 1
            gevent.sleep(0.05)  # ticks do not bring them back
            assert [member_of(pool, line).watch for line in lines] == [None, None]
            give_back(pool, lines)
        until("all are watched", are_watched(pool))
        pool.drop(members[0].connection)
        assert members[0].watch is None
        with pytest.raises(ValueError), pool.connection() as line:
            raise ValueError
        member = next(member for member in members if member.connection is line)
        assert member.watch is None
    assert [member.watch for member in members] == [None, None, None]


def test_what_is_asked_for_a_sign_of_life_is_not_watched_meanwhile_and_is_afterwards(book: Book) -> None:
    with book.pool(initial_connections=1, keepalive=0.1, check_after_idle=0.04) as pool:
        until("it is watched", are_watched(pool))
        (member,) = members_of(pool)
        book.hold()
        assert member.watch is None
        book.may_answer.set()
        until("it is watched again", are_watched(pool))
        with pool.connection() as line:
            assert member.watch is None
            assert line.ask("hello") == "hello"


@pytest.mark.parametrize("kind", ["TCP", "TLS", "Unix"])
def test_the_borrower_of_what_was_watched_gets_every_byte(kind: str, tmp_path: Path) -> None:
    payload = random.Random(3).randbytes(300_000).replace(b"\n", b" ") + b"\n"
    with (
        server_of(kind, tmp_path) as server,
        pool_of(kind, server, initial_connections=2, check_after_idle=0.04) as pool,
    ):
        for _ in range(3):
            until("both are watched", are_watched(pool))
            lent = [pool.acquire(timeout=0) for _ in range(2)]
            for connection in lent:
                sending = gevent.spawn(connection.send, payload)
                assert connection.recv_exactly(len(payload)) == payload
                sending.get(timeout=BOUND)
            for connection in lent:
                pool.release(connection)
        assert server.accepted == 2


def test_what_stirs_in_the_moment_in_which_it_is_lent_is_its_borrowers(server: LineEchoServer) -> None:
    with line_pool(server, initial_connections=1, check_after_idle=0.04) as pool:
        until("it is watched", are_watched(pool))
        (member,) = members_of(pool)
        line = pool.acquire(timeout=0)
        line.send(b"hello\n")
        gevent.sleep(0.05)  # the answer arrives, and a tick or two
        assert (member.watch, pool.in_use) == (None, 1)
        assert line.recv_until(b"\n") == b"hello"
        pool.release(line)
        assert closed_for(pool) == {}


def test_connections_that_went_are_not_kept_alive_by_what_was_noted_of_them(server: LineEchoServer) -> None:
    with line_pool(server, check_after_idle=None) as pool:
        (line,) = borrow(pool, 1)
        pool.release(line)
        pool.drop_expired()
        pool.drop(line)
        ref = weakref.ref(line)
        del line

        def is_gone() -> bool:
            gc.collect()
            return ref() is None

        until("it is collected", is_gone)


# clear()


def test_clear_closes_what_idles_before_it_returns_and_what_is_borrowed_when_it_comes_back(
    server: LineEchoServer,
) -> None:
    with line_pool(server) as pool:
        lines = borrow(pool, 5)
        give_back(pool, lines[:3])
        pool.clear()
        assert not any(line.is_connected() for line in lines[:3])
        assert (pool.idle, pool.in_use, pool.total) == (0, 2, 2)
        server.wait_open(2)
        assert [line.ask("still") for line in lines[3:]] == ["still", "still"]
        give_back(pool, lines[3:4])
        with pytest.raises(ValueError), pool.connection(timeout=BOUND):
            raise ValueError
        pool.drop(lines[4])
        until("all have gone", lambda: pool.total == 0)
        assert closed_for(pool) == {"cleared": 4, "discarded": 1, "dropped": 1}
        with pool.connection(timeout=BOUND) as line:
            assert line.ask("new") == "new"
        pool.acquire(timeout=0)
        pool.release(line)
        assert pool.idle == 1  # what was opened afterwards is not concerned


def test_clear_twice_and_clear_of_an_empty_or_closed_pool_are_fine(server: LineEchoServer) -> None:
    with line_pool(server) as pool:
        with nobody_else_runs():
            pool.clear()
        lines = borrow(pool, 2)
        pool.clear()
        pool.clear()
        give_back(pool, lines)
        until("both have gone", lambda: pool.total == 0)
        assert closed_for(pool) == {"cleared": 2}
        give_back(pool, borrow(pool, 2))
    pool.clear()
    assert closed_for(pool) == {"cleared": 2, "closed": 2}


def test_a_dial_under_way_when_the_pool_is_cleared_is_not_lent(dials: Dials) -> None:
    with dials.pool(max_connections=2) as pool:
        borrowers = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
        dials.wait(2)
        pool.clear()
        dials[0].go_on()
        dials[1].go_on()
        dials.wait(4)
        assert not any(borrower.ready() for borrower in borrowers)
        dials[2].go_on()
        dials[3].go_on()
        lent = [borrower.result() for borrower in borrowers]
        assert lent == dials[2:]
        assert closed_for(pool) == {"cleared": 2}
        assert dials.server.most <= 2
        for connection in lent:
            pool.release(connection)


def test_who_waits_while_the_pool_is_cleared_is_served_by_a_new_connection(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=2) as pool:
        old = borrow(pool, 2)
        waiters = [Attempt(pool.acquire, timeout=None) for _ in range(2)]
        pool.clear()
        give_back(pool, old)
        new = [waiter.result() for waiter in waiters]
        assert not set(map(id, new)) & set(map(id, old))
        assert [line.ask("new") for line in new] == ["new", "new"]
        give_back(pool, new)
        assert server.most == 2


def test_what_was_granted_and_not_collected_when_the_pool_is_cleared_is_not_lent(server: LineEchoServer) -> None:
    with line_pool(server, max_connections=1) as pool:
        (old,) = borrow(pool, 1)
        first, second = Attempt(pool.acquire, timeout=None), Attempt(pool.acquire, timeout=None)
        pool.release(old)
        pool.clear()
        new = first.result()
        assert new is not old
        assert not second.ready()
        pool.release(new)
        assert second.result() is new
        pool.release(new)
        assert (closed_for(pool), server.most) == ({"cleared": 1}, 1)


def test_the_stock_is_new_after_a_clear(server: LineEchoServer) -> None:
    with line_pool(server, min_idle=3, max_connections=4) as pool:
        pool.wait_ready(BOUND)
        old = {id(member) for member in members_of(pool)}
        kept = members_of(pool)
        pool.clear()
        until("a stock of 3", is_stocked(pool, 3))
        assert not old & {id(member) for member in members_of(pool)}
        assert all(member.watch is None for member in kept)
        assert server.most <= 4


def test_clear_under_load_leaves_nothing_old(server: LineEchoServer, rng: random.Random) -> None:
    with line_pool(server, max_connections=4, min_idle=2) as pool:
        lent_since: list[tuple[int, int]] = []
        generations: weakref.WeakKeyDictionary[Line, int] = weakref.WeakKeyDictionary()
        cleared = 0

        def use(who: int) -> None:
            for turn in range(20):
                asked_in = cleared
                with pool.connection(timeout=BOUND) as line:
                    born = generations.setdefault(line, cleared)
                    lent_since.append((born, asked_in))
                    assert line.ask(f"{who}.{turn}") == f"{who}.{turn}"
                    if rng.random() < 0.3:
                        gevent.sleep(0)

        users = [gevent.spawn(use, who) for who in range(12)]
        for _ in range(10):
            gevent.sleep(0.002)
            cleared += 1
            pool.clear()
        gevent.joinall(users, timeout=BOUND, raise_error=True)
        assert all(each.successful() for each in users)
        # Who asked after a clear never had one that was seen before it.
        assert [pair for pair in lent_since if pair[0] < pair[1]] == []
        until("no dial or close is under way", lambda: pool.total == pool.size)
        assert pool.faults() == []
        assert server.most <= 4


def test_one_clear_moves_everything_to_the_other_server_after_a_failover() -> None:
    def answer(name: bytes) -> Callable[[Any], None]:
        def handler(sock: Any) -> None:
            while sock.recv(100):
                sock.sendall(name + b"\n")

        return handler

    with Server(answer(b"one")) as one, Server(answer(b"two")) as two:
        primary = one

        def connect() -> Line:
            return Line(primary.host, primary.port)

        with Pool(connect, max_connections=6, min_idle=2) as pool:
            pool.wait_ready(BOUND)
            held = pool.acquire(timeout=BOUND)
            assert held.ask("who?") == "one"
            # `one` goes on answering: no check can find out that it no longer is the right one.
            primary = two
            with pool.connection(timeout=0) as line:
                assert line.ask("who?") == "one"
            pool.clear()
            replies = []
            for _ in range(10):
                with pool.connection(timeout=BOUND) as line:
                    replies.append(line.ask("who?"))
            assert replies == ["two"] * 10
            assert held.ask("who?") == "one"
            pool.release(held)
            one.wait_open(0)
            until("a stock of 2", lambda: pool.idle >= 2 and pool.total == pool.size)
            two.wait_open(pool.size)


# G9, all of it at once


def everything(**more: Any) -> dict[str, Any]:
    return {
        "min_idle": 2,
        "idle_timeout": 0.2,
        "max_lifetime": 0.3,
        "max_uses": 7,
        "keepalive": 0.05,
        "check_after_idle": 0.04,
        "backoff": HARDLY_ANY,
        "leak_threshold": 1000,
        "reclaim": True,
        "reap_interval": 0.05,
        **more,
    }


@pytest.mark.parametrize("state", ["warm", "watched", "asked", "dialling", "resting"])
def test_g9_a_pool_with_all_features_that_nobody_refers_to_is_collected(
    server: LineEchoServer, state: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps all log records of a test, and those of errors have their tracebacks.
    monkeypatch.setattr(logging.getLogger("gsocketpool"), "propagate", False)
    book = Book(server)
    port = refused_port() if state == "resting" else server.port
    kind, options = Proven, {"host": "127.0.0.1", "port": port, "book": book}
    pool = Pool(kind, options, **everything(backoff=FOR_EVER))
    ref = weakref.ref(pool)
    if state == "resting":
        until("it rests", lambda: ref().stats().open_failures == 2)  # type: ignore[union-attr]
        assert logged.take() != []
    elif state != "dialling":
        pool.wait_ready(BOUND)
        with pool.connection() as line:
            assert line.ask("hello") == "hello"
        if state == "watched":
            until("all are watched", are_watched(pool))
        elif state == "asked":
            book.hold()
        del line
    del pool
    gc.collect()
    book.may_answer.set()
    server.wait_open(0)

    def is_gone() -> bool:
        gc.collect()
        return ref() is None

    until("it is collected", is_gone)


def test_g9_a_pool_that_watches_and_is_collected_in_another_thread_is_closed_in_its_own(
    server: LineEchoServer,
) -> None:
    pools = [line_pool(server, **everything(idle_timeout=None, max_lifetime=None))]
    pools[0].wait_ready(BOUND)
    until("all are watched", are_watched(pools[0]))
    members = members_of(pools[0])
    thread = threading.Thread(target=pools.clear)
    thread.start()
    gevent.get_hub().threadpool.apply(thread.join)
    server.wait_open(0)
    assert [member.watch for member in members] == [None] * len(members)


def test_g9_what_is_borrowed_from_a_pool_that_nobody_refers_to_stays_open_for_its_borrower(
    server: LineEchoServer,
) -> None:
    pool = line_pool(server, **everything())
    line = pool.acquire(timeout=BOUND)
    ref = weakref.ref(pool)
    del pool

    def is_gone() -> bool:
        gc.collect()
        return ref() is None

    until("it is collected", is_gone)
    server.wait_open(1)
    assert line.ask("mine") == "mine"
    line.close()


def test_g1_g2_g3_g4_everything_at_once(server: LineEchoServer, rng: random.Random, logged: Logged) -> None:
    cap = 5
    using: Counter[int] = Counter()
    with Proxy(server.host, server.port) as proxy:
        with line_pool(proxy, **everything(max_connections=cap, max_connecting=2, leak_threshold=None)) as pool:

            def use(who: int) -> None:
                for turn in range(15):
                    text = f"{who}.{turn}"
                    try:
                        limit = gevent.Timeout(rng.choice([None, None, None, 0.002]))
                        with limit, pool.connection(timeout=BOUND) as line:
                            using[id(line)] += 1
                            try:
                                assert using[id(line)] == 1
                                assert line.ask(text) == text
                                gevent.sleep(rng.choice([0, 0, 0.001]))
                            finally:
                                using[id(line)] -= 1
                    except (gevent.Timeout, OSError):
                        gevent.sleep(rng.choice([0, 0.005, 0.02]))

            def disturb() -> None:
                for turn in range(12):
                    gevent.sleep(0.02)
                    rng.choice([proxy.reset, proxy.hang_up, pool.clear, pool.drop_expired])()
                    proxy.forward()
                    if turn % 4 == 0:
                        pool.pause()
                        gevent.sleep(0.005)
                        pool.resume()
                    if turn % 5 == 0:
                        pool.resize(2)
                        gevent.sleep(0.005)
                        pool.resize(cap)
                    assert pool.faults() == []

            users = [gevent.spawn(use, who) for who in range(20)]
            disturbing = gevent.spawn(disturb)
            gevent.sleep(0.03)
            for user in rng.sample(users, 6):
                user.kill(block=False)
            everybody: list[gevent.Greenlet[..., None]] = [*users, disturbing]
            gevent.joinall(everybody, timeout=2 * BOUND, raise_error=True)
            assert all(greenlet.ready() for greenlet in everybody), "somebody was never served"
            assert pool.faults() == []
            assert proxy.most <= cap
            until("nobody has anything", lambda: pool.in_use == pool.waiting == 0)
            pool.clear()  # what was reset a moment ago, after it was used, would be lent unchecked
            lines = borrow(pool, cap)
            assert [line.ask("served") for line in lines] == ["served"] * cap
            give_back(pool, lines)
        proxy.wait_open(0)
        assert (pool.total, pool.faults()) == (0, [])
    logged.take()


# A kill at every switch point


class SlowToProve(VictimsLine):
    """Asks the server for a sign of life, and tells `world` that it does."""

    def keepalive(self) -> bool:
        self.world.aim("keepalive")
        proving.set()
        self.ask("alive?")
        gevent.sleep(0)
        return True


proving = Event()


def clearing(world: World) -> None:
    with world.pool.connection(timeout=BOUND):
        world.borrow(timeout=BOUND)
    world.pool.clear()
    world.borrow(timeout=BOUND)


def while_it_is_asked(world: World) -> None:
    world.borrow(timeout=BOUND)
    for _ in range(2):
        proving.clear()
        assert proving.wait(BOUND)
        world.borrow(timeout=BOUND)


def old(world: World) -> None:
    for _ in range(3):
        world.borrow(timeout=BOUND)
        gevent.sleep(0.004)


#: name -> what the victim does, the connection's class, who is the victim, the pool's options, who else uses the pool.
SCENARIOS: dict[str, tuple[Callable[[World], None], type[VictimsLine], str, dict[str, Any], int]] = {
    "whoever clears": (clearing, SlowToClose, "borrow", {}, 0),
    "whoever clears while others borrow": (clearing, SlowToClose, "borrow", {"min_idle": 1}, 2),
    "a close while the pool is cleared": (clearing, SlowToClose, "close", {}, 0),
    "a borrower while it is asked": (
        while_it_is_asked,
        SlowToProve,
        "borrow",
        {"max_connections": 1, "keepalive": 0.02},
        0,
    ),
    "a keepalive while a borrower waits": (
        while_it_is_asked,
        SlowToProve,
        "keepalive",
        {"max_connections": 1, "keepalive": 0.02},
        0,
    ),
    "a borrower of what is too old": (old, SlowToClose, "borrow", {"max_lifetime": 0.005, "min_idle": 1}, 2),
    "a close of what is too old": (old, SlowToClose, "close", {"max_lifetime": 0.005, "min_idle": 1}, 0),
    "a borrower of what was used enough": (old, SlowToClose, "borrow", {"max_uses": 2, "min_idle": 1}, 2),
}


def run(knife: Knife, name: str) -> None:
    scenario, kind, victim_does, options, bystanders = SCENARIOS[name]
    with LineEchoServer() as server, knife:
        world = World(knife, server, kind, victim_does, backoff=HARDLY_ANY, **options)
        others = world.bystanders(bystanders)

        def be_the_victim() -> None:
            try:
                scenario(world)
            except AssertionError:
                raise  # a wrong reply
            except (Exception, gevent.GreenletExit, gevent.Timeout):
                assert knife.struck

        victim = gevent.Greenlet(be_the_victim)
        if victim_does == "borrow":
            knife.aim(victim)
        victim.start()
        gevent.joinall([victim, *others], timeout=2 * BOUND, raise_error=True)
        assert all(greenlet.successful() for greenlet in [victim, *others]), "somebody was never served"

        pool = world.pool
        assert pool.faults() == []
        if options.get("max_connections") == 1:
            world.borrow(timeout=BOUND)
        else:
            world.serves_everybody()
        assert pool.faults() == []
        assert server.most <= CAP, f"the server saw {server.most} sockets, the cap is {CAP}"
        pool.close()
        server.wait_open(0)
        until("all slots are free", lambda: pool.total == 0)
        assert pool.faults() == []


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("thrown", THROWN)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
def test_g1_g2_g3_g4_a_kill_at_any_switch_point_costs_nobody_else_anything(
    name: str, thrown: str, when: str, logged: Logged
) -> None:
    strikes = strike_everywhere(run, name, thrown, when)
    assert len(logged.take()) <= strikes

"""What is particular to the pool for threads. What it has in common with the others is tested in `conformance`."""

from __future__ import annotations

import _thread
import gc
import inspect
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import gsocketpool
from gsocketpool import threading as pools
from gsocketpool.poller import Poller
from gsocketpool.threading import (
    Budget,
    Connection,
    Listener,
    Pool,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
    PoolGroup,
    TcpConnection,
)
from gsocketpool.workers import Crew, crew

from .conformance.server import EchoServer

ROOT = Path(__file__).parent.parent

#: Seconds after which what a test waits for is taken not to come.
BOUND = 20.0


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as server:
        yield server
        server.wait_until(lambda: server.serving == 0)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places at every opportunity."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def eventually(condition: Callable[[], Any], what: Callable[[], object] = lambda: "") -> None:
    """Return when a condition holds; fail if it does not come to that."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, f"it has not come to that: {what()}"
        time.sleep(0.001)


class Thread(threading.Thread):
    """Runs a function; `end()` answers what it returned, or raises what it raised."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._arguments = args
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:
            self._error = error

    def end(self) -> Any:
        self.join(BOUND)
        assert not self.is_alive(), "a thread does not end"
        if self._error is not None:
            raise self._error
        return self._result


class Plain(Connection):
    """Open or not, and no more."""

    connected = False

    def open(self) -> None:
        self.connected = True

    def close(self) -> None:
        self.connected = False

    def is_connected(self) -> bool:
        return self.connected


def ask(line: TcpConnection, word: str) -> None:
    """Nobody else's answer may come."""
    line.send(word.encode() + b"\n")
    answer = line.recv_until(b"\n").decode()
    assert answer == word, f"{word!r} was answered by {answer!r}"


def lines(server: EchoServer, **settings: Any) -> Pool[TcpConnection]:
    return Pool(TcpConnection, {"host": server.host, "port": server.port, "timeout": BOUND}, **settings)


def at_rest(*some: Pool[Any]) -> None:
    for pool in some:
        eventually(lambda pool=pool: pool.faults() == [], lambda pool=pool: (pool, pool.faults()))  # type: ignore[misc]


# Many threads at once


class Cut(Exception):
    """What an interrupted borrower raises."""


def use_at_random(pool: Pool[TcpConnection], rng: random.Random, name: str) -> None:
    what = rng.random()
    if what < 0.4:
        with pool.connection(timeout=BOUND) as line:
            ask(line, name)
    elif what < 0.75:
        line = pool.acquire(timeout=BOUND)
        try:
            ask(line, name)
        finally:
            pool.release(line)
    elif what < 0.8:
        line = pool.acquire(timeout=BOUND)
        line.send(name.encode() + b"\n")  # its answer must reach nobody
        pool.drop(line)
    elif what < 0.86:
        with pytest.raises(Cut), pool.connection(timeout=BOUND) as line:
            line.send(name.encode() + b"\n")
            raise Cut
    elif what < 0.93:
        try:
            with pool.connection(timeout=rng.random() * 0.002) as line:
                ask(line, name)
        except PoolExhaustedError:
            pass
    elif what < 0.95:
        pool.clear()
    elif what < 0.97:
        pool.drop_expired()
    elif what < 0.98:
        pool.pause()
        pool.resume()
    elif what < 0.99:
        pool.resize(rng.randint(3, 6))
    else:
        assert pool.size >= 0
        assert repr(pool)
        pool.holders()
        pool.stats()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {
                "min_idle": 2,
                "keepalive": 0.03,
                "idle_timeout": 0.05,
                "max_lifetime": 0.2,
                "reap_interval": 0.02,
                "check_after_idle": 0.04,
            },
            id="tended",
        ),
        pytest.param({"order": "fifo", "max_uses": 3, "leak_threshold": BOUND, "reclaim": True}, id="recorded"),
        pytest.param({"check_after_idle": 0, "max_connecting": 1}, id="checked"),
    ],
)
def test_many_threads_that_do_everything_at_once_break_nothing(
    server: EchoServer, rng: random.Random, settings: dict[str, Any]
) -> None:
    pool = lines(server, max_connections=6, **settings)
    seeds = [rng.random() for _ in range(16)]

    def work(number: int) -> None:
        mine = random.Random(seeds[number])
        for turn in range(60):
            use_at_random(pool, mine, f"{number}-{turn}")

    for thread in [Thread(work, number) for number in range(16)]:
        thread.end()
    at_rest(pool)
    assert pool.in_use <= settings.get("max_connecting", 8)  # keepalives
    assert server.most <= 6
    pool.resize(6)
    held = [pool.acquire(timeout=BOUND) for _ in range(6)]  # no slot is lost
    for line in held:
        ask(line, "still")
        pool.release(line)
    pool.close(BOUND)
    assert (pool.size, pool.total, pool.waiting) == (0, 0, 0)
    assert pool.faults() == []


@pytest.mark.usefixtures("hasty")
def test_g1_threads_that_share_a_group_and_a_budget_keep_to_its_cap(server: EchoServer, rng: random.Random) -> None:
    budget = Budget(5)
    group = PoolGroup(
        TcpConnection, max_connections=4, budget=budget, forget_after=0.01, key=lambda **options: options["lifetime"]
    )
    own = lines(server, max_connections=3, budget=budget)
    seeds = [rng.random() for _ in range(12)]

    def work(number: int) -> None:
        mine = random.Random(seeds[number])
        for turn in range(50):
            what = mine.random()
            if what < 0.2:
                with own.connection(timeout=BOUND) as line:
                    ask(line, f"{number}-{turn}")
            elif what < 0.97:
                where = {"host": server.host, "port": server.port, "lifetime": mine.randint(600, 603)}
                with group.connection(BOUND, **where) as line:
                    ask(line, f"{number}-{turn}")
            elif what < 0.98:
                budget.resize(mine.randint(3, 5))
            elif what < 0.99:
                group.clear()
            else:
                assert repr(group)
                assert group.stats().size <= 5
                assert len(group.pools) <= 4

    for thread in [Thread(work, number) for number in range(12)]:
        thread.end()
    eventually(lambda: budget.faults() == [], budget.faults)
    at_rest(own, *group.pools)
    assert server.most <= 5
    group.close(BOUND)
    own.close(BOUND)
    assert budget.used == 0


@pytest.mark.usefixtures("hasty")
def test_budgets_and_pools_of_one_are_made_by_many_threads_at_once() -> None:
    for _ in range(20):
        budget = Budget(3)
        begin = threading.Barrier(6)

        def make(budget: Budget = budget, begin: threading.Barrier = begin) -> Pool[Plain]:
            begin.wait(BOUND)
            pool = Pool(Plain, budget=budget)
            with pool.connection(timeout=BOUND):
                pass
            return pool

        made = [thread.end() for thread in [Thread(make) for _ in range(6)]]
        assert len({id(pool._monitor) for pool in made}) == 1
        for pool in made:
            pool.close(BOUND)
        assert budget.used == 0


# Nothing is held while the user's code runs


class Gate:
    """Somebody stands in it until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        assert self._open.wait(BOUND)

    def open(self) -> None:
        self._open.set()


class Gated(Plain):
    """Stands still in one of its methods, once, when it is told to."""

    gates: ClassVar[dict[str, Gate]]
    lock = threading.Lock()

    def pass_through(self, name: str) -> None:
        with self.lock:
            gate = self.gates.pop(name, None)
        if gate is not None:
            gate.pass_through()

    def open(self) -> None:
        self.pass_through("open")
        super().open()

    def close(self) -> None:
        self.pass_through("close")
        super().close()

    def is_connected(self) -> bool:
        self.pass_through("is_connected")
        return super().is_connected()

    def is_expired(self) -> bool:
        self.pass_through("is_expired")
        return False

    def check(self) -> bool:
        self.pass_through("check")
        return True

    def reset(self) -> None:
        self.pass_through("reset")

    def keepalive(self) -> bool:
        self.pass_through("keepalive")
        return True

    def fileno(self) -> int | None:
        self.pass_through("fileno")
        return None


@pytest.mark.parametrize(
    "name",
    [
        "factory",
        "open",
        "close",
        "is_connected",
        "is_expired",
        "check",
        "reset",
        "keepalive",
        "fileno",
        "_create_connection",
        "handler",
    ],
)
def test_others_borrow_and_give_back_while_something_of_the_users_stands_still(name: str, logged: Any) -> None:
    gate = Gate()

    class OfThisTest(Gated):
        gates: ClassVar[dict[str, Gate]] = {}

        def __init__(self) -> None:
            self.pass_through("factory")

        def close(self) -> None:
            super().close()
            if name == "handler":
                raise OSError("this is logged")

    class OfThisPool(Pool[OfThisTest]):
        def _create_connection(self) -> OfThisTest:
            gate = OfThisTest.gates.pop("_create_connection", None)
            if gate is not None:
                gate.pass_through()
            return super()._create_connection()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gate = OfThisTest.gates.pop("handler", None)
            if gate is not None:
                gate.pass_through()

    settings: dict[str, Any] = {}
    if name in ("check", "fileno", "keepalive"):
        settings = {"check_after_idle": 0.04}
    if name == "keepalive":
        settings["keepalive"] = 0.05
    pool = OfThisPool(OfThisTest, initial_connections=2, max_connections=4, reap_interval=0.02, **settings)
    with pool.connection(timeout=BOUND):  # so that it knows that there is a reset()
        pass
    slow = Slow()
    logger = logging.getLogger("gsocketpool")
    logger.addHandler(slow)
    try:
        OfThisTest.gates[name] = gate
        if name in ("factory", "open", "_create_connection"):
            user = Thread(borrow_at_once, pool, 3)
        elif name in ("close", "is_connected", "handler"):
            user = Thread(lambda: pool.drop(pool.acquire(timeout=BOUND)))
        elif name in ("check", "reset"):
            user = Thread(borrow_until, pool, gate)
        else:
            user = Thread(lambda: None)
        assert gate.entered.wait(BOUND)
        for _ in range(3):
            with pool.connection(timeout=BOUND):
                pass
            pool.release(pool.acquire(timeout=BOUND))
        assert repr(pool)
        assert pool.stats().size >= 1
        gate.open()
        user.end()
        pool.close(BOUND)
    finally:
        gate.open()
        logger.removeHandler(slow)
    at_rest(pool)
    if name == "handler":
        logged.take(sum(pool.stats().closed.values()))


def borrow_at_once(pool: Pool[Any], count: int) -> None:
    for connection in [pool.acquire(timeout=BOUND) for _ in range(count)]:
        pool.release(connection)


def borrow_until(pool: Pool[Any], gate: Gate) -> None:
    deadline = time.monotonic() + BOUND
    while not gate.entered.is_set() and time.monotonic() < deadline:
        with pool.connection(timeout=BOUND):
            pass
        time.sleep(0.05)  # so that it has idled


def test_the_key_of_a_group_is_asked_while_others_borrow() -> None:
    gate = Gate()

    def key(slow: bool) -> bool:
        if slow:
            gate.pass_through()
        return slow

    class Other(Plain):
        def __init__(self, slow: bool) -> None:
            pass

    with PoolGroup(Other, key=key) as group:
        user = Thread(lambda: group.pool(slow=True))
        assert gate.entered.wait(BOUND)
        with group.connection(BOUND, slow=False):
            pass
        gate.open()
        assert user.end() is group.pool(slow=True)


def test_a_subclass_with_its_own_acquire_and_release_is_called_with_nothing_held() -> None:
    held: list[bool] = []

    class Own(Pool[Plain]):
        def acquire(self, *args: Any, **options: Any) -> Plain:
            held.append(others_can_enter(self))
            return super().acquire(*args, **options)

        def release(self, conn: Plain) -> None:
            held.append(others_can_enter(self))
            super().release(conn)

    with Own(Plain) as pool:
        with pool.connection():
            assert pool.in_use == 1
        with pytest.raises(Cut), pool.connection(timeout=BOUND):
            raise Cut
        with pool.connection() as connection:
            pool.drop(connection)
        assert held == [True] * 4
        assert pool.stats().closed["discarded"] == 1


def others_can_enter(pool: Pool[Any]) -> bool:
    return bool(Thread(lambda: pool.size >= 0).end())


# What cannot be interrupted


def test_a_close_that_hangs_costs_its_own_pool_no_more_than_its_grace_and_others_nothing(logged: Any) -> None:
    gates = [Gate() for _ in range(40)]
    waiting = [*gates]

    class Stuck(Plain):
        def close(self) -> None:
            super().close()
            waiting.pop().pass_through()

    class Short(Pool[Stuck]):
        close_grace = 0.05

    pool = Short(Stuck, initial_connections=40, max_connections=40, max_connecting=40)
    with Pool(Plain, initial_connections=1) as other:
        closing = Thread(pool.close, BOUND)
        eventually(lambda: gates[-1].entered.is_set())
        with other.connection(timeout=BOUND) as connection:
            other.drop(connection)  # which is to wait for nobody else's close
        assert closing.end() is None
    assert pool.total == 0
    assert len(logged.take(40)) == 40
    for gate in gates:
        gate.open()


def test_a_thousand_connections_are_closed_by_a_few_threads() -> None:
    most = 0

    class Counted(Plain):
        def close(self) -> None:
            nonlocal most
            super().close()
            most = max(most, sum(thread.name.startswith("gsocketpool") for thread in threading.enumerate()))

    pool = Pool(Counted, initial_connections=1000, max_connections=10_000)
    before = len(threading.enumerate())
    pool.close()
    assert pool.total == 0
    assert most <= before + 2 * pools.MOST_CLOSING + 1


def test_ten_thousand_that_have_expired_are_dropped() -> None:
    class Old(Plain):
        __slots__ = ()

        def is_expired(self) -> bool:
            return True

    pool = Pool(Old, initial_connections=10_000, max_connections=10_000, reap_expired_connections=False)
    pool.drop_expired()
    assert (pool.total, pool.stats().closed["expired"]) == (0, 10_000)
    pool.close()


def test_a_system_exit_in_a_close_ends_no_other_close(logged: Any) -> None:
    class Leaving(Plain):
        def close(self) -> None:
            super().close()
            raise SystemExit

    pool = Pool(Leaving, initial_connections=100, max_connections=100)
    pool.close(BOUND)
    assert pool.total == 0
    assert logged.take() == []


def test_what_a_thread_had_borrowed_is_taken_back_when_it_has_ended(logged: Any) -> None:
    pool = Pool(Plain, max_connections=2, reclaim=True)
    pool.release(pool.acquire())
    Thread(lambda: pool.acquire()).end()
    _thread.start_new_thread(lambda: pool.acquire(timeout=BOUND), ())
    eventually(lambda: pool.stats().closed["reclaimed"] == 2)
    for record in logged.take(2):
        assert "ended without releasing" in record.getMessage()
    mine = pool.acquire()  # this thread goes on
    Thread(lambda: pool.release(pool.acquire())).end()
    gc.collect()
    assert pool.in_use == 1
    pool.release(mine)
    pool.close(BOUND)


# What a listener hears, and what is shown


def test_a_listener_that_ends_its_thread_at_a_leak_does_not_end_the_upkeep(logged: Any) -> None:
    leaks: list[object] = []

    class Leaving(Listener):
        def leaked(self, pool: Any, holder: Any) -> None:
            leaks.append(holder.connection)
            sys.exit(3)

    with Pool(Plain, max_connections=3, leak_threshold=0.02, min_idle=1, listeners=[Leaving()]) as pool:
        for count in (1, 2):
            pool.acquire(timeout=BOUND)
            eventually(lambda count=count: len(leaks) == count)  # type: ignore[misc]
        eventually(lambda: pool.idle == 1)
        for holder in pool.holders():
            pool.release(holder.connection)
        logged.take(4)  # of each that it leaked, and that it came back


def test_a_thread_whose_repr_fails_is_shown_all_the_same() -> None:
    class Odd(Thread):
        def __repr__(self) -> str:
            raise ValueError("no repr")

    def borrow() -> None:
        with pool.connection(timeout=BOUND):
            begun.set()
            done.wait(BOUND)

    begun, done = threading.Event(), threading.Event()
    with Pool(Plain, max_connections=1, leak_threshold=BOUND) as pool:
        holder = Odd(borrow)
        assert begun.wait(BOUND)
        waiter = Odd(borrow)
        eventually(lambda: pool.waiting == 1)
        for text in (pool.debug(), gsocketpool.debug()):
            assert f"<Odd at {id(holder):#x}>, borrowed in " in text
            assert f"<Odd at {id(waiter):#x}> for " in text
        with pytest.raises(PoolExhaustedError, match=rf"<Odd at {id(holder):#x}> has held one"):
            pool.acquire(timeout=0)
        done.set()
        holder.end()
        waiter.end()


def test_all_pools_can_be_shown_while_other_threads_make_and_lose_some(hasty: None) -> None:
    def churn() -> None:
        for _ in range(40):
            some = [Pool(Plain, reap_expired_connections=False, check_after_idle=None) for _ in range(10)]
            for pool in some:
                pool.close()

    with Pool(Plain, name="one that stays"):
        churning = [Thread(churn) for _ in range(2)]
        looks = 0
        while any(thread.is_alive() for thread in churning) or not looks:
            assert "Pool 'one that stays'" in gsocketpool.debug()
            looks += 1
        for thread in churning:
            thread.end()


# Interrupts


def interrupt(thread: int) -> None:
    signal.pthread_kill(thread, signal.SIGINT)


def test_g4_an_interrupt_while_the_monitor_is_taken_again_leaves_nothing_undone() -> None:
    me = threading.get_ident()
    pool = Pool(Plain, max_connections=1)
    connection = pool.acquire()

    def give_back_and_hold() -> None:
        eventually(lambda: pool.waiting == 1)
        with pool._monitor:
            pool.release(connection)  # whoever waits is awake, and wants the monitor
            time.sleep(0.05)
            interrupt(me)
            time.sleep(0.05)

    other = Thread(give_back_and_hold)
    with pytest.raises(KeyboardInterrupt):
        pool.acquire(timeout=BOUND)
    other.end()
    assert others_can_enter(pool)
    assert pool.faults() == []
    assert pool.idle == 1
    pool.close()


def test_g4_interrupts_at_any_moment_lose_no_slot(rng: random.Random) -> None:
    me = threading.get_ident()
    pool = Pool(Plain, max_connections=2)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            with pool.connection(timeout=BOUND):
                time.sleep(0.0002)

    users = [Thread(keep_busy) for _ in range(3)]
    struck = 0
    for _ in range(60):
        ready = threading.Event()

        def strike(pause: float = rng.random() * 0.003, ready: threading.Event = ready) -> None:
            assert ready.wait(BOUND)
            eventually(lambda: pool.waiting >= 2)  # the main thread is likely to be one of them
            time.sleep(pause)
            interrupt(me)

        striker = Thread(strike)
        connection = None
        try:
            try:
                ready.set()
                while True:
                    connection = pool.acquire(timeout=BOUND)
                    given, connection = connection, None
                    pool.drop(given)
            finally:
                if connection is not None:
                    pool.drop(connection)
        except KeyboardInterrupt:
            struck += 1
        striker.end()
        assert others_can_enter(pool)
    stop.set()
    for user in users:
        user.end()
    assert struck == 60
    at_rest(pool)
    pool.close(BOUND)


# Idle connections are watched


def test_g8_a_peer_that_hangs_up_on_what_idles_is_noticed_without_a_borrower(server: EchoServer) -> None:
    pool = lines(server, check_after_idle=0.04, initial_connections=3)
    server.wait_until(lambda: server.accepted == 3)
    server.hang_up()
    eventually(lambda: pool.size == 0)
    assert pool.stats().closed["stale"] == 3
    pool.close()


def test_what_the_stock_loses_is_replaced(server: EchoServer) -> None:
    pool = lines(server, min_idle=2)
    pool.wait_ready(BOUND)
    server.wait_until(lambda: server.accepted == 2)
    for accepted in (4, 6):
        server.hang_up()
        server.wait_until(lambda accepted=accepted: server.accepted == accepted)  # type: ignore[misc]
        pool.wait_ready(BOUND)
    pool.close()


def test_what_was_lent_while_its_descriptor_was_asked_for_is_not_watched(server: EchoServer) -> None:
    gate = Gate()

    class Slow(TcpConnection):
        def fileno(self) -> int | None:
            if not gate.entered.is_set():
                gate.pass_through()
            return super().fileno()

    pool = Pool(Slow, {"host": server.host, "port": server.port}, check_after_idle=0.04, initial_connections=1)
    assert gate.entered.wait(BOUND)
    with pool.connection() as line:
        ask(line, "hello")
        gate.open()
        time.sleep(0.05)
        assert not pools._poller._watches
    eventually(lambda: pools._poller._watches)
    pool.close()


def test_the_upkeep_ends_with_the_pool_though_it_was_asking_for_a_descriptor_meanwhile(server: EchoServer) -> None:
    gate = Gate()
    asked: list[threading.Thread] = []

    class Slow(TcpConnection):
        def fileno(self) -> int | None:
            asked.append(threading.current_thread())
            gate.pass_through()
            return None

    pool = Pool(Slow, {"host": server.host, "port": server.port}, check_after_idle=0.04, initial_connections=1)
    assert gate.entered.wait(BOUND)
    pool.close()
    gate.open()
    eventually(lambda: asked[0] in crew._resting)


def test_watching_ends_when_nothing_idles_any_more(server: EchoServer) -> None:
    poller = pools._poller
    pool = lines(server, check_after_idle=0.04)
    for _ in range(5):
        with pool.connection(timeout=BOUND) as line:
            ask(line, "hello")
            eventually(lambda: poller._bell is None)
        eventually(lambda: poller._watches)
    pool.close()
    eventually(lambda: poller._bell is None)


def test_what_is_no_longer_watched_is_not_found() -> None:
    crew = Crew()
    crew.begin()
    poller = Poller(crew)
    found: list[object] = []
    reader, writer = os.pipe()
    other, keeps = os.pipe()
    try:
        kept = poller.watch(other, found.append)
        for _ in range(100):
            watch = poller.watch(reader, found.append)
            assert watch is not None
            poller.unwatch(watch)
        os.write(writer, b"!")
        first, second = poller.watch(reader, found.append), poller.watch(reader, found.append)
        eventually(lambda: found)
        assert found in ([first], [second], [first, second])
        assert kept is not None
        poller.unwatch(kept)
        poller.unwatch(kept)
        eventually(lambda: poller._bell is None)
    finally:
        for end in (reader, writer, other, keeps):
            os.close(end)


# Collected


def test_g9_a_pool_that_nobody_refers_to_is_closed_by_another_thread(server: EchoServer) -> None:
    pool = lines(server, min_idle=3)
    pool.wait_ready(BOUND)
    ref = weakref.ref(pool)
    del pool
    eventually(lambda: ref() is None)
    server.wait_until(lambda: server.serving == 0)


def test_g9_a_pool_can_be_collected_while_the_standard_library_starts_a_thread(server: EchoServer) -> None:
    """As the collector may do it in the middle of anything, with whatever locks are held there."""
    held = threading._active_limbo_lock  # type: ignore[attr-defined]
    for _ in range(3):
        pool = lines(server, initial_connections=40, max_connections=40)
        with held:
            crew._resting.clear()  # so that a thread must be started for it
            del pool
    server.wait_until(lambda: server.serving == 0)


def test_nothing_is_decided_by_the_collector_itself() -> None:
    pool = Pool(Plain, initial_connections=1)
    with pool._monitor:  # somebody is in the middle of a decision
        Thread(pool.__del__).end()
        assert not pool.closed
    eventually(lambda: pool.closed)
    eventually(lambda: pool.total == 0)


def test_an_endpoint_that_is_asked_for_while_it_is_collected_lives_on() -> None:
    with PoolGroup(Plain, forget_after=0.001) as group:
        pool = group.pool()
        with pool.connection(timeout=BOUND) as connection:
            pool.drop(connection)
        group._forget(pool)  # type: ignore[arg-type]
        with group._monitor:  # so that it cannot vanish meanwhile
            pool.__del__()  # as the collector does
            assert group.pool() is pool
        with group.connection(BOUND) as connection:
            assert not pool.closed
            pool.drop(connection)
        group._forget(pool)  # type: ignore[arg-type]
        key = pool._key  # type: ignore[attr-defined]
        pool.__del__()
        eventually(lambda: key not in group._known)
        eventually(lambda: pool.closed)


# Who may be together with whom


def test_a_budget_serves_pools_of_one_runtime() -> None:
    budget = Budget(3)
    green = gsocketpool.Pool(Plain, budget=budget)
    with pytest.raises(PoolError, match="another runtime"):
        Pool(Plain, budget=budget)
    green.close()
    budget = Budget(3)
    with Pool(Plain, budget=budget), pytest.raises(PoolError):
        gsocketpool.Pool(Plain, budget=budget)


def test_it_has_the_parameters_and_the_methods_of_the_others() -> None:
    for ours, theirs in ((Pool, gsocketpool.Pool), (PoolGroup, gsocketpool.PoolGroup)):
        names = {name for name in dir(theirs) if not name.startswith("_")}
        assert names <= {*dir(ours)}
        assert inspect.signature(ours) == inspect.signature(theirs)
        for name in names:
            one, other = getattr(ours, name), getattr(theirs, name)
            assert inspect.getdoc(one) == inspect.getdoc(other), name
            if inspect.isfunction(one):
                assert inspect.signature(one) == inspect.signature(other), name
    assert {*gsocketpool.__all__} <= {*pools.__all__}


def test_a_pool_that_was_refused_can_be_shown() -> None:
    class Refused(Pool[Plain]):
        def __init__(self) -> None:
            shown.append(repr(self))
            super().__init__(Plain, max_connections=0)

    shown: list[str] = []
    with pytest.raises(ValueError, match="max_connections"):
        Refused()
    assert shown == ["<Refused that was refused>"]


# Programs of their own


def run(program: str, *arguments: object) -> str:
    """What it prints. It must end by itself, well, and say nothing else."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    done = subprocess.run(
        # To fork beside other threads is what is tested here; newer versions of Python warn of it.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + program, *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


PREAMBLE = """
import atexit, faulthandler, os, signal, sys, threading, time
faulthandler.dump_traceback_later(30, exit=True)
from gsocketpool.threading import *

class Plain(Connection):
    connected = False
    def open(self): self.connected = True
    def close(self): self.connected = False
    def is_connected(self): return self.connected

def eventually(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)

def forked(child):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.alarm(20)
            child()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
"""


def test_no_other_runtime_is_loaded() -> None:
    assert run("print(sorted({'gevent', 'eventlet', 'asyncio', 'greenlet', 'ssl'} & {*sys.modules}))") == "[]\n"


def test_a_pool_is_closed_at_exit_by_who_asks_for_it() -> None:
    program = """
class Loud(Plain):
    def close(self):
        super().close()
        os.write(1, b"closed\\n")

pool = Pool(Loud, initial_connections=2)
atexit.register(pool.close, 5)
from gsocketpool.workers import crew
crew._resting.clear()
"""
    assert run(program) == "closed\n" * 2


def test_g12_a_generator_that_is_ended_by_the_interpreter_gives_back_though_a_thread_holds_the_monitor_for_ever() -> (
    None
):
    program = """
pool = Pool(Plain, max_connections=1)
entered = threading.Event()

def hold():
    with pool._monitor:
        entered.set()
        threading.Event().wait()

def borrow():
    with pool.connection() as connection:
        yield connection

class Late:
    def __del__(self):
        pool.release(connection)
        print(pool)
        pool.drop(pool.acquire())
        pool.close()
        print(pool)

generator = borrow()
next(generator)
generator.close()
connection = pool.acquire()
sys.modules["kept"] = type(sys)("kept")  # until modules are taken apart
sys.modules["kept"].late = Late()
goes = threading.Event()
threading.Thread(target=lambda: goes.wait() and hold(), daemon=True).start()  # at exit none can be started
atexit.register(lambda: (goes.set(), entered.wait()))
"""
    assert run(program).split("\n") == [
        "<Pool of Plain: 1 idle, 0 in use, 0 opening, 0 waiting, max 1>",
        "<Pool of Plain: 0 idle, 0 in use, 0 opening, 0 waiting, closed>",
        "",
    ]


def test_at_the_limit_of_threads_everything_is_done_one_after_another() -> None:
    program = """
from gsocketpool.workers import crew

def nobody_rests():
    for _ in range(30):
        crew._resting.clear()
        time.sleep(0.01)

pool = Pool(Plain, min_idle=1, max_connections=3, keepalive=0.05, reap_interval=0.05, check_after_idle=0.04)
pool.wait_ready(20)
usual = threading.stack_size(1 << 46)  # no thread can be started with such a stack
nobody_rests()
try:
    threading.Thread(target=print).start()
except (RuntimeError, MemoryError):
    print("no more")
held = [pool.acquire(timeout=20) for _ in range(3)]
for each in held:
    pool.release(each)
pool.clear()
nobody_rests()
second = Pool(Plain, min_idle=2, reap_interval=0.05)  # which nobody tends for now
second.release(second.acquire(timeout=20))
second.drop(second.acquire())
pool.close(20)
threading.stack_size(usual)
eventually(lambda: second.idle == 2)
second.close(20)
print(pool.total, second.total)
"""
    assert run(program) == "no more\n0 0\n"


def test_g10_whoever_waited_in_another_thread_is_not_there_in_the_child_of_a_fork(server: EchoServer) -> None:
    program = """
port = int(sys.argv[1])
pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": port}, max_connections=2, leak_threshold=60)
held = [pool.acquire(), pool.acquire()]

def wait():
    with pool.connection(timeout=20) as line:
        line.send(b"parent\\n")
        assert line.recv_until(b"\\n") == b"parent"

threads = [threading.Thread(target=wait) for _ in range(4)]
draining = threading.Thread(target=pool.wait_ready, daemon=True)
for each in threads:
    each.start()
eventually(lambda: pool.waiting == 4)

def child():
    assert (pool.waiting, pool.in_use, pool.faults()) == (0, 0, []), (pool, pool.faults())
    assert pool._ledger.waiting() == []
    for each in held:
        pool.release(each)  # nothing
    with pool.connection(timeout=20) as one, pool.connection(timeout=20) as other:
        for line in (one, other):
            line.send(b"child\\n")
            assert line.recv_until(b"\\n") == b"child"
    pool.close(20)

forked(child)
for each in held:
    pool.release(each)
for each in threads:
    each.join()
pool.close(20)
"""
    run(program, server.port)
    spoken = [{*client.lines} for client in server.clients if client.lines]
    assert set().union(*spoken) == {b"parent", b"child"}
    assert all(len(words) == 1 for words in spoken), "a connection was used on both sides"


@pytest.mark.parametrize("tls", [False, True], ids=["in clear text", "with TLS"])
def test_g10_no_job_is_the_first_to_import_what_it_needs(server: EchoServer, tls: bool) -> None:
    """A fork while another thread imports a module leaves the child with that module's lock, for ever."""
    program = """
port, tls = int(sys.argv[1]), sys.argv[2] == "True"
options = {"host": "localhost", "port": port, "timeout": 20}
with Pool(TcpConnection, options | {"tls": tls, "port": 1}) as pool:
    before = {*sys.modules}
    try:
        pool.acquire(timeout=20)
    except OSError:
        pass
with Pool(TcpConnection, options, min_idle=1, keepalive=0.01, reap_interval=0.01, check_after_idle=0) as pool:
    pool.wait_ready(20)
    with pool.connection(timeout=20) as line:
        line.send(b"x\\n")
        assert line.recv_until(b"\\n") == b"x"
        pool.drop(line)
    pool.wait_ready(20)
print(sorted({*sys.modules} - before), "ssl" in before)
"""
    assert run(program, server.port, tls) == f"[] {tls}\n"


def test_g10_a_fork_finds_no_decision_half_made(server: EchoServer) -> None:
    program = """
sys.setswitchinterval(1e-6)
port = int(sys.argv[1])
options = {"host": "127.0.0.1", "port": port}
budget = Budget(4)
pool = Pool(TcpConnection, options, max_connections=3, min_idle=1, budget=budget, reap_interval=0.01)
group = PoolGroup(TcpConnection, max_total=3, min_idle=1, keepalive=0.02)
stop = []

def work(n):
    while not stop:
        try:
            with (pool.connection(timeout=20) if n % 2 else group.connection(20, **options)) as line:
                line.send(b"x\\n")
                assert line.recv_until(b"\\n") == b"x"
                if n == 0:
                    raise KeyError
        except KeyError:
            pass
        Pool(Plain, initial_connections=1)

threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
for each in threads:
    each.start()

def child():
    for _ in range(5):
        with pool.connection(timeout=10) as line, group.connection(10, **options) as other:
            for each in (line, other):
                each.send(b"child\\n")
                assert each.recv_until(b"\\n") == b"child"
    pool.wait_ready(10)
    assert pool.faults() == [], pool.faults()
    for each in group.pools:
        each.wait_ready(10)
        assert each.faults() == [], each.faults()
        eventually(lambda: each.stats().acquired)
    group.close(10)
    pool.close(10)
    eventually(lambda: budget.used == 0)

for _ in range(15):
    time.sleep(0.005)
    forked(child)
stop.append(1)
for each in threads:
    each.join()
group.close(10)
pool.close(10)
"""
    run(program, server.port)


def test_g10_what_the_pool_was_doing_begins_anew_in_the_child() -> None:
    program = """
class Slow(Plain):
    hangs = True
    def __init__(self, **names):
        self.asked = self.reaped = self.closed = 0
        made.append(self)
    def hang(self):
        while self.hangs:
            time.sleep(0.01)
    def keepalive(self):
        self.asked += 1
        self.hang()
        return True
    def is_expired(self):
        self.reaped += 1
        self.hang()
        return False
    def close(self):
        super().close()
        self.closed += 1
        self.hang()

made = []
asking = Pool(Slow, min_idle=1, keepalive=0.03, max_connecting=1, reap_expired_connections=False)
reaping = Pool(Slow, min_idle=1, reap_interval=0.02)
group = PoolGroup(Slow, min_idle=1, keepalive=0.03, max_connecting=1)
asked = group.pool()
closing = Pool(Slow, max_connections=50, initial_connections=50)
for each in (asking, reaping, asked):
    each.wait_ready(20)
eventually(lambda: sum(each.asked for each in made) == 2 and any(each.reaped for each in made))
threading.Thread(target=closing.clear).start()
eventually(lambda: sum(each.closed for each in made) == 32)

def child():
    made.clear()
    Slow.hangs = False
    for each in (asking, reaping, asked):
        each.wait_ready(20)
        assert each.size == 1
    eventually(lambda: len(made) == 3 and sum(each.asked > 1 for each in made) == 2)
    eventually(lambda: any(each.reaped > 1 for each in made))
    closing.drop(closing.acquire(timeout=20))
    for each in (asking, reaping, closing, group):
        each.close(20)
    assert made[-1].closed == 1

forked(child)
Slow.hangs = False
for each in (asking, reaping, closing, group):
    each.close(20)
"""
    run(program)


def test_g10_a_pool_that_was_closing_is_closed_in_the_child() -> None:
    program = """
pool = Pool(Plain, max_connections=1)
connection = pool.acquire()
closing = threading.Thread(target=pool.close, args=(20,))
closing.start()
eventually(lambda: pool.closed)

def child():
    pool.close(20)
    assert (pool.total, pool.faults()) == (0, [])
    try:
        pool.acquire()
    except PoolClosedError:
        return
    raise AssertionError

forked(child)
pool.release(connection)
closing.join()
"""
    run(program)


def test_a_thread_may_fork_from_within_what_a_pool_calls() -> None:
    program = """
class Forks(Plain):
    def open(self):
        super().open()
        forked(lambda: pool.close(20))

pool = Pool(Forks)
with pool.connection(timeout=20):
    pass
pool.close(20)
print("done")
"""
    assert run(program) == "done\n"


def test_whoever_waits_when_the_pool_is_closed_is_told() -> None:
    pool = Pool(Plain, max_connections=1)
    connection = pool.acquire()
    waiters = [Thread(lambda: pool.acquire(timeout=BOUND)) for _ in range(5)]
    eventually(lambda: pool.waiting == 5)
    pool.close()
    for waiter in waiters:
        with pytest.raises(PoolClosedError):
            waiter.end()
    pool.release(connection)
    eventually(lambda: pool.total == 0)

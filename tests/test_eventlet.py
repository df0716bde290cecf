"""What is eventlet's alone. What holds for every runtime is in `conformance/`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import eventlet
import eventlet.event
import eventlet.hubs
import pytest
from greenlet import GreenletExit

import gsocketpool
import gsocketpool.eventlet
from gsocketpool.eventlet import (
    Connection,
    Pool,
    PoolError,
    PoolExhaustedError,
    PoolGroup,
    TcpConnection,
    wrap,
)

from .conformance.server import EchoServer
from .conftest import Logged

ROOT = Path(__file__).parent.parent

#: Seconds after which what a test waits for is taken not to come.
BOUND = 10.0


@pytest.fixture(autouse=True)
def _nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """G12. eventlet's hub prints whatever ends a green thread."""
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def server() -> Iterator[EchoServer]:
    """Answers each line with the same line. When the test has ended nobody is connected to it any more."""
    with EchoServer() as server:
        yield server
        server.wait_until(lambda: server.serving == 0)


def until(condition: Callable[[], object]) -> None:
    """Let others run until a condition holds."""
    with eventlet.Timeout(BOUND, AssertionError("it has not come to that")):
        while not condition():
            eventlet.sleep(0.001)


class Beside:
    """A call in a green thread. Whatever it is ended by is kept: the hub would print it."""

    def __init__(self, call: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.outcome: Any = None
        self.thread = eventlet.spawn(self._run, call, args, options)

    def _run(self, call: Callable[..., Any], args: Any, options: Any) -> None:
        try:
            self.outcome = call(*args, **options)
        except BaseException as error:
            self.outcome = error

    def end(self) -> Any:
        """What it has returned or raised, when that is so."""
        with eventlet.Timeout(BOUND, AssertionError("it does not end")):
            self.thread.wait()
        return self.outcome


class Echo(TcpConnection):
    """Asks for a line to be echoed."""

    def ask(self, text: str) -> str:
        self.send(text.encode() + b"\n")
        return self.recv_until(b"\n").decode()


class Still(Connection):
    """Connected to nothing."""

    connected = False

    def open(self) -> None:
        self.connected = True

    def close(self) -> None:
        self.connected = False

    def is_connected(self) -> bool:
        return self.connected


def echo_pool(server: EchoServer, **settings: Any) -> Pool[Echo]:
    return Pool(Echo, {"host": server.host, "port": server.port}, **settings)


def program(text: str, *arguments: object, **environment: str) -> str:
    """Run a program in a process of its own. Answers what it prints; fails if it prints anything to stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.strip()


# What is offered


def test_the_names_are_those_of_gsocketpool() -> None:
    assert gsocketpool.eventlet.__all__ == gsocketpool.__all__
    assert all(hasattr(gsocketpool.eventlet, name) for name in gsocketpool.__all__)


def test_gevent_is_not_loaded() -> None:
    text = """
        import sys
        import gsocketpool.eventlet
        pool = gsocketpool.eventlet.Pool(gsocketpool.eventlet.wrap(object))
        with pool.connection():
            pass
        print("gevent" in sys.modules)
    """
    assert program(text) == "False"


def test_without_eventlet_it_says_how_to_install_it() -> None:
    text = """
        import sys
        sys.modules["eventlet"] = None
        try:
            import gsocketpool.eventlet
        except ImportError as error:
            print(error)
    """
    assert program(text).splitlines() == [
        "gsocketpool.eventlet needs eventlet, which is not there. Install it with:",
        '    pip install "gsocketpool[eventlet]"',
    ]


# Kills and timeouts


def test_g4_a_borrower_that_is_woken_and_killed_in_one_turn_hands_on_what_it_got() -> None:
    pool = Pool(Still, max_connections=1)
    first = pool.acquire()
    victim, heir = [Beside(pool.acquire, timeout=BOUND) for _ in range(2)]
    until(lambda: pool.waiting == 2)
    pool.release(first)
    eventlet.kill(victim.thread)
    assert isinstance(victim.end(), GreenletExit)
    assert heir.end() is first
    pool.release(first)
    pool.close()


def test_a_borrower_that_was_woken_and_killed_is_not_woken_elsewhere() -> None:
    pool = Pool(Still, max_connections=1)
    first = pool.acquire()
    said = eventlet.event.Event()

    def borrows() -> bool:
        try:
            pool.acquire(timeout=BOUND)
        except GreenletExit:
            said.wait(timeout=BOUND)  # returns when anything wakes it
        return bool(said.ready())

    victim = Beside(borrows)
    until(lambda: pool.waiting == 1)
    pool.release(first)
    eventlet.kill(victim.thread)
    for _ in range(5):
        eventlet.sleep(0)
    said.send()
    assert victim.end() is True
    pool.close()


def test_g7_a_timeout_ends_a_wait_and_leaves_no_place_behind() -> None:
    pool = Pool(Still, max_connections=1)
    first = pool.acquire()
    with pytest.raises(eventlet.Timeout), eventlet.Timeout(0.01):
        pool.acquire(timeout=BOUND)
    assert pool.waiting == 0
    with pytest.raises(PoolExhaustedError):
        pool.acquire(timeout=0.01)
    pool.release(first)
    pool.close()


def test_g3_a_timeout_in_the_block_discards_the_connection(server: EchoServer) -> None:
    pool = echo_pool(server, max_connections=1)
    server.hold()
    with pytest.raises(eventlet.Timeout), pool.connection(timeout=BOUND) as conn, eventlet.Timeout(0.05):
        conn.ask("an answer that comes too late")
    server.let_go()
    with pool.connection() as conn:
        assert conn.ask("mine") == "mine"
    assert pool.stats().closed["discarded"] == 1
    pool.close()


def test_a_killed_dial_is_an_error_of_whoever_waits_for_it() -> None:
    dialling: list[Any] = []

    class Slow(Still):
        def open(self) -> None:
            if not dialling:
                dialling.append(eventlet.getcurrent())
                eventlet.sleep(BOUND)
            super().open()

    pool = Pool(Slow, max_connections=1)
    borrower = Beside(pool.acquire, timeout=BOUND)
    until(lambda: dialling)
    eventlet.kill(dialling[0])
    outcome = borrower.end()
    assert isinstance(outcome, PoolError)
    assert "a dial was killed" in str(outcome)
    pool.release(pool.acquire(timeout=BOUND))
    pool.close()


def test_a_close_that_hangs_is_ended_and_its_slot_is_free(logged: Logged) -> None:
    class Hangs(Still):
        def close(self) -> None:
            super().close()
            eventlet.sleep(BOUND)

    class Impatient(Pool[Hangs]):
        close_grace = 0.01

    pool = Impatient(Hangs, max_connections=1)
    pool.drop(pool.acquire())
    assert pool.stats().size == 0
    assert "TimeoutError" in logged.take(1)[0].getMessage()
    pool.close()


def test_the_hub_itself_cannot_borrow_and_loses_nothing_by_trying() -> None:
    pool = Pool(Still, max_connections=1)
    errors: list[BaseException] = []

    def tries() -> None:
        try:
            pool.acquire(timeout=BOUND)
        except AssertionError as error:
            errors.append(error)

    eventlet.hubs.get_hub().schedule_call_global(0, tries)
    until(lambda: errors)
    pool.release(pool.acquire(timeout=BOUND))
    assert (pool.size, pool.waiting) == (1, 0)
    pool.close()


def test_a_borrower_who_was_served_in_time_is_not_woken_when_that_is_over() -> None:
    pool = Pool(Still, max_connections=1)
    first = pool.acquire()
    said = eventlet.event.Event()

    def borrows() -> bool:
        pool.release(pool.acquire(timeout=2))
        said.wait(timeout=BOUND)  # returns when anything wakes it
        return bool(said.ready())

    borrower = Beside(borrows)
    until(lambda: pool.waiting == 1)
    pool.release(first)
    eventlet.sleep(2.1)
    said.send()
    assert borrower.end() is True
    pool.close()


@pytest.mark.parametrize("hub", ["epolls", "poll", "selects"])
def test_a_time_longer_than_the_hub_can_wait_is_no_error(hub: str) -> None:
    text = """
        import threading
        import eventlet
        from eventlet.green import socket
        from gsocketpool.eventlet import Pool, wrap

        pool = Pool(wrap(object, close=id), None, 0, 1, False, check_after_idle=None)   # no timer but the borrower's
        first = pool.acquire()
        borrower = eventlet.spawn(pool.acquire, timeout=10.0**12)
        here, there = socket.socketpair()
        threading.Timer(0.1, there.fd.send, [b"."]).start()
        here.recv(1)
        pool.release(first)
        print(borrower.wait() is first)
    """
    assert program(text, EVENTLET_HUB=hub) == "True"


# Who has borrowed what


def test_what_a_green_thread_leaves_behind_is_taken_back(logged: Logged) -> None:
    pool = Pool(Still, max_connections=1, reclaim=True)
    eventlet.spawn(pool.acquire).wait()
    until(lambda: pool.in_use == 0)
    assert "ended without releasing" in logged.take(1)[0].getMessage()
    assert pool.stats().closed["reclaimed"] == 1
    pool.close()


def test_what_one_of_spawn_n_leaves_behind_is_not() -> None:
    pool = Pool(Still, max_connections=1, reclaim=True)
    kept: list[Still] = []
    eventlet.spawn_n(lambda: kept.append(pool.acquire()))
    until(lambda: kept)
    for _ in range(5):
        eventlet.sleep(0)
    assert pool.in_use == 1
    pool.release(kept.pop())
    pool.close()


# Idle connections that the hub watches


def test_g8_an_idle_connection_that_the_server_closes_is_noticed(server: EchoServer) -> None:
    pool = echo_pool(server, check_after_idle=0.04)
    with pool.connection() as conn:
        conn.ask("hello")
    until(lambda: _watched(conn))
    server.hang_up()
    until(lambda: pool.size == 0)
    assert pool.stats().closed["stale"] == 1
    pool.close()


def test_a_connection_that_is_watched_can_be_read_by_its_borrower(server: EchoServer) -> None:
    pool = echo_pool(server, check_after_idle=0.04)
    with pool.connection() as conn:
        conn.ask("hello")
    until(lambda: _watched(conn))
    with pool.connection() as again:
        assert again is conn
        assert again.ask("and again") == "and again"
    pool.close()


def test_a_watched_connection_that_was_closed_by_hand_is_found_when_its_descriptor_is_anothers(
    server: EchoServer,
) -> None:
    pool = echo_pool(server, check_after_idle=0.04)
    with pool.connection() as conn:
        conn.ask("hello")
    until(lambda: _watched(conn))
    descriptor = conn.fileno()
    conn.socket.close()
    other = Echo(server.host, server.port)
    other.open()
    assert other.fileno() == descriptor
    until(lambda: pool.size == 0)
    assert other.ask("mine") == "mine"
    other.close()
    with pool.connection() as conn:
        assert conn.ask("hello again") == "hello again"
    pool.close()


def test_a_descriptor_that_the_hub_cannot_watch_is_left_alone() -> None:
    looked: list[object] = []

    def look(file: Any) -> int:
        looked.append(file)
        return int(file.fileno())

    pool = Pool(wrap(tempfile.TemporaryFile, check=lambda _: True, fileno=look), check_after_idle=0.04)
    for _ in range(3):
        with pool.connection() as file:
            descriptor = file.fileno()
        until(looked.__len__)
        looked.clear()
        assert descriptor not in eventlet.hubs.get_hub().listeners["read"]
    pool.close()
    assert file.closed


def _watched(conn: Echo) -> bool:
    return any(each.fileno == conn.fileno() for each in eventlet.hubs.get_hub().get_readers())


# Other threads


def in_a_thread(call: Callable[[], object]) -> object:
    """What it returns or raises there."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: not thread.is_alive())
    thread.join()
    return outcome.pop()


def test_a_pool_cannot_be_waited_for_in_another_thread() -> None:
    pool = Pool(Still, max_connections=1)
    first = pool.acquire()
    outcome = in_a_thread(pool.acquire)
    assert isinstance(outcome, PoolError)
    assert "made in another thread" in str(outcome)
    assert pool.waiting == 0
    pool.release(first)
    pool.close()


def test_a_group_cannot_be_asked_in_another_thread() -> None:
    group = PoolGroup(Still)
    outcome = in_a_thread(group.pool)
    assert isinstance(outcome, PoolError)
    assert "made in another thread" in str(outcome)
    group.close()


def test_a_budget_serves_one_thread() -> None:
    budget = gsocketpool.Budget(1)
    pool = Pool(Still, budget=budget)
    outcome = in_a_thread(lambda: Pool(Still, budget=budget))
    assert isinstance(outcome, PoolError)
    pool.close()


def test_g9_a_pool_that_is_collected_in_another_thread_is_closed_in_its_own(server: EchoServer) -> None:
    closed: list[threading.Thread] = []

    class Notes(Echo):
        def close(self) -> None:
            closed.append(threading.current_thread())
            super().close()

    pools = [Pool(Notes, {"host": server.host, "port": server.port}, min_idle=2)]
    pools[0].wait_ready(BOUND)
    gone = weakref.ref(pools[0])
    in_a_thread(pools.clear)
    until(lambda: len(closed) == 2)
    assert set(closed) == {threading.main_thread()}
    gc.collect()
    assert gone() is None


def test_g9_more_pools_than_the_bell_can_be_rung_for_are_closed_all_the_same() -> None:
    closed: list[object] = []
    pools = [Pool(wrap(object, close=closed.append), min_idle=1) for _ in range(400)]
    for pool in pools:
        pool.wait_ready(BOUND)
    del pool

    def drop() -> None:
        pools.clear()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()  # the hub does not turn meanwhile
    assert not closed
    until(lambda: len(closed) == 400)


def test_g9_a_pool_can_outlive_its_thread() -> None:
    text = """
        import gc, os, threading
        from gsocketpool.eventlet import Pool, wrap

        def make():
            pool = Pool(wrap(object, close=print), min_idle=1)
            pool.wait_ready(10)
            pools.append(pool)

        pools = []
        before = len(os.listdir("/dev/fd"))
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert pools[0].idle == 1
        pools.clear()
        gc.collect()
        print(len(os.listdir("/dev/fd")) - before)   # the epoll, which eventlet itself leaves behind
    """
    assert program(text) == "1"


# Other hubs, and one in the place of another


HUBS = ["epolls", "poll", "selects", "asyncio"]

SERVES = """
    import sys, time
    import eventlet, eventlet.hubs
    from gsocketpool.eventlet import PoolGroup, TcpConnection

    address = {"host": "127.0.0.1", "port": int(sys.argv[1])}
    group = PoolGroup(TcpConnection, max_connections=2, check_after_idle=0.04)
    pool = group.pool(**address)
    said = []

    def ask(text):
        for _ in range(5):
            with group.pool(**address).connection(timeout=10) as conn:
                conn.send(text.encode() + b"\\n")
                said.append(conn.recv_until(b"\\n") == text.encode())

    threads = [eventlet.spawn(ask, "line %d" % number) for number in range(5)]
    for thread in threads:
        thread.wait()
    hub = eventlet.hubs.get_hub()
    idle = [member.connection.fileno() for member in pool._members.values()]
    while not all(descriptor in hub.listeners["read"] for descriptor in idle):
        eventlet.sleep(0.01)
    pool.close()
    print(type(hub).__module__, len(said), all(said), pool.size)
"""


@pytest.mark.parametrize("hub", HUBS)
def test_every_hub_serves(hub: str, server: EchoServer) -> None:
    assert program(SERVES, server.port, EVENTLET_HUB=hub) == f"eventlet.hubs.{hub} 25 True 0"


@pytest.mark.parametrize("patched", ["before", "after"])
def test_it_serves_where_the_standard_library_is_patched(patched: str, server: EchoServer) -> None:
    patch = "import eventlet; eventlet.monkey_patch()\n"
    text = textwrap.dedent(SERVES)
    text = patch + text if patched == "before" else text.replace("group = ", patch + "group = ", 1)
    assert program(text, server.port) == "eventlet.hubs.epolls 25 True 0"


def test_what_is_left_at_the_end_of_a_program_is_no_error(server: EchoServer) -> None:
    text = """
        import sys
        import eventlet
        from gsocketpool.eventlet import Pool, PoolGroup, TcpConnection

        address = {"host": "127.0.0.1", "port": int(sys.argv[1])}
        pool = Pool(TcpConnection, address, min_idle=2)
        pool.wait_ready(10)
        group = PoolGroup(TcpConnection, max_connections=1)
        kept = group.pool(**address).acquire()
        waiting = eventlet.spawn(group.pool(**address).acquire, timeout=None)
        eventlet.sleep(0)
        print("done")
    """
    assert program(text, server.port) == "done"


def test_a_pool_goes_on_with_another_hub(server: EchoServer) -> None:
    text = """
        import sys, threading
        import eventlet, eventlet.hubs
        from gsocketpool.eventlet import Pool, TcpConnection

        def until(condition):
            while not condition():
                eventlet.sleep(0.001)

        address = {"host": "127.0.0.1", "port": int(sys.argv[1])}
        unbegun = Pool(TcpConnection, address, min_idle=1)   # nothing of it runs before the hub is another
        begun = Pool(TcpConnection, address, min_idle=1, idle_timeout=0.05, max_connections=3)
        begun.wait_ready(10)
        unbegun2 = Pool(TcpConnection, address, min_idle=1)
        eventlet.hubs.use_hub("poll")
        begun.drop(begun.acquire(timeout=10))
        begun.wait_ready(10)
        both = [begun.acquire(timeout=10), begun.acquire(timeout=10)]
        for each in both:
            begun.release(each)
        until(lambda: begun.size == 1)    # its upkeep goes on, too
        unbegun.wait_ready(10)
        unbegun2.wait_ready(10)
        pools = [unbegun]
        closed = []
        del unbegun
        thread = threading.Thread(target=pools.clear)
        thread.start()
        thread.join()
        eventlet.sleep(0)
        begun.close()
        unbegun2.close()
        print("done")
    """
    assert program(text, server.port) == "done"
    server.wait_until(lambda: server.serving == 0)


def test_g4_whoever_waited_when_the_hub_was_replaced_takes_nothing_with_him() -> None:
    text = """
        import eventlet, eventlet.hubs
        from gsocketpool.eventlet import Pool, wrap

        pool = Pool(wrap(object, close=lambda _: None), max_connections=1)
        first = pool.acquire()
        lost = [eventlet.spawn(pool.acquire, timeout=None) for _ in range(2)]
        while pool.waiting < 2:
            eventlet.sleep(0)
        pool.release(first)      # it is the first one's, who has not taken it yet
        eventlet.hubs.use_hub()
        pool.release(pool.acquire(timeout=None))
        print(pool.idle, pool.waiting, pool.faults())
    """
    assert program(text) == "1 0 []"


# Forks

FORKS = """
    import os, sys, time
    import eventlet, eventlet.event, eventlet.hubs
    from gsocketpool.eventlet import Pool, PoolGroup, TcpConnection, wrap

    address = {"host": "127.0.0.1", "port": int(sys.argv[1])}

    def until(condition):
        with eventlet.Timeout(10):
            while not condition():
                eventlet.sleep(0.001)

    def ask(pool, text, timeout=10):
        with pool.connection(timeout=timeout) as conn:
            conn.send(text + b"\\n")
            assert conn.recv_until(b"\\n") == text

    def child(work):
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            if sys.argv[2] == "with a hub of its own":
                eventlet.hubs.use_hub()
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait_for(pid):
        until(lambda: os.waitpid(pid, os.WNOHANG)[0])
"""


def forks(text: str, *arguments: object, **environment: str) -> str:
    return program(textwrap.dedent(FORKS) + textwrap.dedent(text), *arguments, **environment)


CHILDREN = pytest.mark.parametrize("child", ["with a hub of its own", "with the parent's hub"])


@CHILDREN
@pytest.mark.parametrize(
    ("hub", "state"),
    [("epolls", "unused"), ("epolls", "used"), ("epolls", "about to go on"), ("poll", "used"), ("selects", "used")],
)
def test_g10_a_pool_that_was_made_before_the_fork_serves_parent_and_child(
    hub: str, state: str, child: str, server: EchoServer
) -> None:
    text = """
        pool = Pool(TcpConnection, address, min_idle=1, idle_timeout=0.05, max_connections=3)
        state = sys.argv[3]
        if state != "unused":
            ask(pool, b"parent")
        if state == "used":
            pool.wait_ready(10)
            until(lambda: eventlet.hubs.get_hub().get_readers())

        def work():
            pool.wait_ready(10)
            with pool.connection(timeout=10), pool.connection(timeout=10):
                pass
            ask(pool, b"child")
            until(lambda: pool.size == 1)
            pool.close()

        pid = child(work)
        ask(pool, b"parent")
        wait_for(pid)
        pool.wait_ready(10)
        ask(pool, b"parent")
        until(lambda: pool.size == 1)
        pool.close()
        print("done")
    """
    assert forks(text, server.port, child, state, EVENTLET_HUB=hub) == "done"
    server.wait_until(lambda: server.serving == 0)
    assert all(len(set(client.lines)) <= 1 for client in server.clients)


@CHILDREN
def test_g10_a_group_that_was_made_before_the_fork_serves_parent_and_child(child: str, server: EchoServer) -> None:
    text = """
        group = PoolGroup(TcpConnection, max_connections=2, max_total=3, forget_after=0.05)
        ask(group.pool(**address), b"parent")

        def work():
            ask(group.pool(**address), b"child")
            group.clear()
            until(lambda: not group.pools)   # its rounds go on
            ask(group.pool(**address), b"child")
            group.close()

        wait_for(child(work))
        ask(group.pool(**address), b"parent")
        group.close()
        print("done")
    """
    assert forks(text, server.port, child) == "done"


@CHILDREN
@pytest.mark.parametrize(
    ("hub", "known"), [("epolls", "known"), ("epolls", "unknown"), ("poll", "unknown"), ("selects", "unknown")]
)
def test_g10_a_dial_that_was_under_way_is_the_parents_alone(
    hub: str, known: str, child: str, server: EchoServer
) -> None:
    # The child must send nothing on it, and not take it from the epoll that waits for it in the parent.
    text = """
        import eventlet.green.socket
        dialling = []

        def dial():
            sock = eventlet.green.socket.socket()
            sock.connect((address["host"], address["port"]))
            dialling.append(sock)
            try:
                sock.sendall(b"hello\\n")
                assert sock.recv(100) == b"hello\\n"
                sock.sendall(b"hello again\\n")
                assert sock.recv(100) == b"hello again\\n"
            except BaseException:
                sock.close()
                raise
            return sock

        class Greets(TcpConnection):
            def open(self):
                super().open()
                dialling.append(self)
                self.send(b"hello\\n")
                assert self.recv_until(b"\\n") == b"hello"
                self.send(b"hello again\\n")
                assert self.recv_until(b"\\n") == b"hello again"

        if sys.argv[3] == "known":
            pool = Pool(Greets, address, max_connections=1)
        else:
            pool = Pool(wrap(dial), max_connections=1)
        borrower = eventlet.spawn(pool.acquire, timeout=20)
        until(lambda: dialling)
        until(lambda: len(eventlet.hubs.get_hub().get_readers()) == 2)

        def work():
            with eventlet.green.socket.create_connection((address["host"], address["port"])) as sock:
                sock.sendall(b"go on\\n")
                sock.recv(100)
            for _ in range(10):     # what the parent's dial is told by now, the child's copy of it could read
                eventlet.sleep(0.005)
            pool.close()

        wait_for(child(work))
        pool.release(borrower.wait())
        pool.close()
        print("done")
    """
    server.hold()

    def lets_go() -> None:
        server.wait_until(lambda: b"go on" in server.heard, timeout=30)
        server.let_go()

    thread = threading.Thread(target=lets_go)
    thread.start()
    assert forks(text, server.port, child, known, EVENTLET_HUB=hub) == "done"
    thread.join()
    assert server.clients[0].lines == [b"hello", b"hello again"]


def test_what_waits_in_the_parent_waits_in_a_child_that_keeps_the_hub() -> None:
    text = """
        from eventlet.green import socket

        pool = Pool(wrap(object, close=id))
        here, there = socket.socketpair()
        heard = []
        eventlet.spawn(lambda: heard.append(here.recv(1)))
        eventlet.sleep(0)

        def work():
            there.send(b".")
            until(lambda: heard)

        pid = child(work)
        os.waitpid(pid, 0)    # without the hub: it would hear it, too
        print(heard)
    """
    assert forks(text, 0, "with the parent's hub") == "[]"


@CHILDREN
def test_g10_a_job_from_another_thread_reaches_the_child_and_not_the_parent(child: str, server: EchoServer) -> None:
    text = """
        import threading
        import eventlet.green.socket
        pools = [Pool(TcpConnection, address, min_idle=1, check_after_idle=None, reap_expired_connections=False)]
        pools[0].wait_ready(10)

        def collect():
            thread = threading.Thread(target=pools.clear)
            thread.start()
            thread.join()

        def work():
            closed = []

            class Notes(TcpConnection):
                def close(self):
                    closed.append(self)
                    super().close()

            pools[:] = [Pool(Notes, address)]
            ask(pools[0], b"child")
            collect()
            until(lambda: closed)

        wait_for(child(work))
        collect()
        with eventlet.green.socket.create_connection((address["host"], address["port"])) as sock:
            sock.sendall(b"last\\n")
            sock.recv(100)
        print("done")
    """
    assert (
        forks(text.replace("import threading", "import threading, eventlet.green.socket"), server.port, child) == "done"
    )

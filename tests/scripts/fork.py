"""Programs that fork, one for each run: ``python fork.py SCENARIO KIND ADDRESSES``, beside `test_fork.py`.

A process of its own, so that no copy of the test's process is ever about, and since some of them patch the standard
library. What the two sides did is seen where it counts, at the server: every line that they send begins with the
sender's process id, and the server tells what came on which connection. A child says what went wrong on its standard
error and ends with 1; it never outlives `BOUND`. All is well if this program prints nothing and exits 0.
"""

from __future__ import annotations

import sys

if sys.argv[2] == "patched":
    from gevent import monkey

    monkey.patch_all()

import atexit
import contextlib
import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import gevent
import gevent.os
import greenlet
from gevent import socket
from gevent.event import Event
from gevent.monkey import get_original

from gsocketpool import Pool, PoolClosedError, PoolError, TcpConnection, wrap

#: Seconds that whatever should happen soon may take.
BOUND = 20

#: Where the server is: ports of 127.0.0.1, and the file of its authority.
AT: dict[str, Any] = json.loads(sys.argv[3])

Fork = Callable[[], int]
Job = Callable[[], object]


# Forking


def plain() -> int:
    """`os.fork`, and gevent told of it in the child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes it where there are threads
        pid = os.fork()
    if pid == 0:
        gevent.reinit()
    return pid


#: gevent's own once used, its handler takes the ends of all children: it must come last.
FORKS: dict[str, list[Fork]] = {
    "plain": [plain],
    "plain and gevent": [plain, gevent.os.fork],
    "patched": [os.fork],
}


#: At once: gevent's own waits for the hub.
close = get_original("os", "close")


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def end(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """The last that a child does."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)


def forked(fork: Fork) -> int:
    """Fork, and let the child go on from here."""
    pid = fork()
    if pid == 0:
        signal.alarm(BOUND)
        halves[0] = 0
    return pid


class Child:
    """A copy of this process that does a job, says so, and lives on until it is told to end.

    This process stands still until the job is done, its hub too: if the child can take what is meant for the parent, it
    does.
    """

    def __init__(self, fork: Fork, job: Job) -> None:
        said, says = os.pipe()
        hears, tells = os.pipe()
        before = descriptors()
        self.pid = forked(fork)
        if self.pid == 0:
            close(said)
            close(tells)
            self._live(job, len(before) - 2, says, hears)
        self._fork = fork
        self._tells = tells
        close(says)
        close(hears)
        self.done = os.read(said, 1) == b"."
        close(said)

    def _live(self, job: Job, descriptors_before: int, says: int, hears: int) -> None:
        with last_words():
            assert len(descriptors()) <= descriptors_before, "the child has more descriptors than the parent"
            settle()
            job()
            settle()
            os.write(says, b".")
            close(says)
            os.set_blocking(hears, False)
            gevent.os.nb_read(hears, 1)

    def end(self) -> None:
        """Let it end, and see that all was well."""
        close(self._tells)
        wait_for(self.pid, self._fork)
        assert self.done


def wait_for(pid: int, fork: Fork) -> None:
    wait = os.waitpid if fork is plain else gevent.os.waitpid
    _, status = wait(pid, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"


@contextlib.contextmanager
def child(fork: Fork, job: Job) -> Iterator[None]:
    """A child that has done its job, and lives as long as the block."""
    copy = Child(fork, job)
    try:
        yield
    finally:
        copy.end()


def settle() -> None:
    """Let everybody run who can."""
    for _ in range(10):
        gevent.sleep(0.001)


def until(what: str, happened: Callable[[], object]) -> None:
    with gevent.Timeout(BOUND / 2, AssertionError(f"{what}: it has not come to that")):
        while not happened():
            gevent.sleep(0.002)


# The server


def connect() -> socket.socket:
    sock = socket.socket()
    sock.connect(("127.0.0.1", AT["port"]))  # create_connection() would look the address up in another thread
    return sock


class Heard:
    """What the server has heard on one connection."""

    def __init__(self, lines: list[str], rest: str, ended: bool) -> None:
        self.lines = lines
        self.rest = rest
        self.ended = ended
        self.pids = {int(line.split()[0]) for line in lines if line.split()[0].isdigit()}

    def __repr__(self) -> str:
        return f"<{self.lines} {self.rest!r} {'ended' if self.ended else 'open'}>"


class Server:
    """The server, as one can ask it."""

    def _command(self, what: str) -> Any:
        with connect() as sock:
            sock.sendall(b"control " + what.encode() + b"\n")
            answer = b""
            while data := sock.recv(65536):
                answer += data
        return json.loads(answer)

    def begin(self) -> None:
        """Forget what was; there must be no connection left."""
        until("no connection is left", lambda: all(each.ended for each in self.heard()))
        self._command("begin")

    def heard(self) -> list[Heard]:
        """What came on each connection, in the order in which they were accepted."""
        return [Heard(*each) for each in self._command("heard")]

    def of(self, pid: int) -> list[Heard]:
        """What came on the connections of a process."""
        return [each for each in self.heard() if pid in each.pids]

    def let_go(self) -> None:
        """Answer what is held."""
        self._command("let go")

    def hold_a_handshake(self) -> None:
        """The next one."""
        self._command("hold a handshake")

    def hang_up(self) -> None:
        self._command("hang up")

    def hole(self) -> int:
        """A port at which a connect is neither accepted nor refused."""
        return int(self._command("hole"))

    def open_the_hole(self) -> None:
        self._command("open the hole")

    def wait_held(self, count: int) -> None:
        until(f"{count} requests are held", lambda: self._command("held") == count)

    def wait_ended(self, pid: int) -> None:
        """Wait until all of its connections have ended."""
        until(f"the connections of {pid} have ended", lambda: all(each.ended for each in self.of(pid)))

    def wait_accepted(self, count: int) -> None:
        until(f"{count} connections", lambda: len(self.heard()) == count)

    def check(self) -> None:
        """Nothing came from two processes on one connection, and nothing that no line should hold."""
        for each in self.heard():
            assert len(each.pids) <= 1, f"two processes spoke on one connection: {each}"
            assert each.rest == "", each
            assert all(line.split()[0].isdigit() for line in each.lines), each


SERVER = Server()


# Connections and pools


def exchange(sock: Any, text: str) -> None:
    """Send a line that says who sends it, and have it answered."""
    line = f"{os.getpid()} {text}\n".encode()
    sock.sendall(line)
    reply = b""
    while not reply.endswith(b"\n"):
        data = sock.recv(1024)
        if not data:
            raise ConnectionError(f"the stream ended after {reply!r}")
        reply += data
    assert reply == line, f"somebody else's reply: {reply!r}"


#: How often `word` is still to say what is answered by half only.
halves = [0]


def word() -> str:
    """What is said when something opens, closes or is kept alive. The first ones stand still halfway."""
    halves[0] -= 1
    return "half" if halves[0] >= 0 else "hello"


class Line(TcpConnection):
    def ask(self, text: str = "hello") -> None:
        line = f"{os.getpid()} {text}"
        self.send(line.encode() + b"\n")
        reply = self.recv_until(b"\n").decode()
        assert reply == line, f"somebody else's reply: {reply!r}"


class Polite(Line):
    """Takes its leave, and waits for the answer."""

    def close(self) -> None:
        try:
            self.ask(word())
        finally:
            super().close()


class Opaque(Polite):
    """Whoever sees it does not see its descriptor. Its finalizer speaks too."""

    def fileno(self) -> None:
        return None

    def __del__(self) -> None:
        if self.is_connected():
            with contextlib.suppress(OSError):
                self.socket._sock.send(f"{os.getpid()} finalizer\n".encode())  # type: ignore[attr-defined]


def line_pool(kind: type[Line] = Line, **options: Any) -> Pool[Line]:
    where = {"host": "127.0.0.1", "port": AT["port"], **options.pop("at", {})}
    options = {"acquire_timeout": BOUND / 2, "max_connections": 2, "name": "lines", **options}
    return Pool(kind, where, **options)


def tls_options() -> dict[str, Any]:
    import ssl

    return {"port": AT["tls"], "tls": ssl.create_default_context(cafile=AT["authority"])}


def ask_all(pool: Pool[Line], text: str = "hello", count: int = 2) -> None:
    """So many borrowers at once, each with a connection of its own."""
    everyone = Event()
    asked: list[None] = []

    def borrower() -> None:
        with pool.connection() as conn:
            conn.ask(text)
            asked.append(None)
            if len(asked) == count:
                everyone.set()
            assert everyone.wait(BOUND / 2)

    gevent.joinall([gevent.spawn(borrower) for _ in range(count)], raise_error=True)


def serves(pool: Pool[Line], count: int = 2) -> None:
    """The pool is in order, and lends as many as it may at once."""
    assert pool.faults() == [], (pool.faults(), pool)
    ask_all(pool, count=count)
    assert pool.faults() == [], (pool.faults(), pool)


def wait_waiting(pool: Pool[Any], count: int) -> None:
    until(f"{count} wait", lambda: pool.waiting == count)


def wait_idle(pool: Pool[Any], count: int) -> None:
    until(f"{count} idle", lambda: pool.idle == count)


def wait_closed(pool: Pool[Any]) -> None:
    """Wait until no close is under way."""
    until("all is closed that was to be", lambda: pool._closing == 0)


def is_cut_off(conn: TcpConnection) -> None:
    """What this process has in hand leads nowhere: to write is an error, and so is to read, which is no end."""
    for act in (lambda: conn.send(b"from the child"), lambda: conn.recv_exactly(1), lambda: conn.recv_until(b"\n")):
        try:
            act()
        except OSError:
            pass
        else:
            raise AssertionError("it went through")
    assert not conn.check()


def both_go_on(pool: Pool[Line], fork: Fork, in_child: Job, *, kept: int) -> None:
    """Fork; the child does its job, and then all that one does with a pool; so does the parent after it.

    :param kept: connections of the parent's, which it goes on with.
    """

    def job() -> None:
        in_child()
        before = descriptors()
        serves(pool)
        pool.close()
        SERVER.wait_ended(os.getpid())
        assert descriptors() == before, "the child's own connections have left descriptors behind"

    opened = pool.stats().opened
    with child(fork, job):
        serves(pool)
        assert pool.stats().opened == max(opened, 2), "the parent lost a connection"
        assert len([each for each in SERVER.of(os.getpid()) if not each.ended]) == max(kept, 2)
        SERVER.check()
        pool.close()
        # While the child lives: it keeps nothing open.
        SERVER.wait_ended(os.getpid())
    SERVER.check()


# What a fork may find: idle and borrowed connections


def idle(fork: Fork) -> None:
    pool = line_pool()
    ask_all(pool)

    def in_child() -> None:
        assert (pool.size, pool.idle, pool.in_use, pool.waiting) == (0, 0, 0, 0)
        for conn in conns:
            is_cut_off(conn)

    conns = [pool.acquire(), pool.acquire()]
    for conn in conns:
        pool.release(conn)
    both_go_on(pool, fork, in_child, kept=2)


def watched(fork: Fork) -> None:
    """The parent's hub goes on watching what idles; the child's has never had to do with it."""
    pool = line_pool(check_after_idle=0.05)
    ask_all(pool)
    until("the hub watches", lambda: all(member.watch is not None for member in pool._members.values()))
    with child(fork, lambda: serves(pool)):
        SERVER.hang_up()
        until("the parent has noticed", lambda: pool.stats().closed["stale"] == 2)
        serves(pool)
        pool.close()
    SERVER.check()


def block(fork: Fork) -> None:
    for mishap in (None, ValueError(), gevent.GreenletExit()):
        pool = line_pool()
        pid = -1
        with contextlib.suppress(ValueError, gevent.GreenletExit), pool.connection() as conn:
            conn.ask("before")
            pid = forked(fork)
            if mishap is not None:
                raise mishap
        if pid == 0:
            with last_words():
                assert (pool.size, pool.stats().closed["discarded"]) == (0, 0)
                is_cut_off(conn)
                serves(pool)
                pool.close()
        wait_for(pid, fork)
        assert pool.stats().closed["discarded"] == (mishap is not None)
        serves(pool)
        pool.close()
        SERVER.check()


def by_hand(fork: Fork) -> None:
    pool = line_pool()
    first, second = pool.acquire(), pool.acquire()
    first.ask()

    def in_child() -> None:
        assert pool.holders() == []
        is_cut_off(first)
        pool.drop(first)
        try:
            raise ValueError
        except ValueError:
            pool.release(second)
        assert pool.size == 0
        serves(pool)
        pool.close()

    with child(fork, in_child):
        first.ask()
        second.ask()
        pool.release(first)
        pool.release(second)
        serves(pool)
        assert pool.stats().opened == 2
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()


def subclassed(fork: Fork) -> None:
    """A subclass with an acquire of its own has another kind of block."""

    class Own(Pool[Line]):
        def acquire(self, *args: Any, **options: Any) -> Line:
            return super().acquire(*args, **options)

    pool = Own(Line, {"host": "127.0.0.1", "port": AT["port"]}, max_connections=2)
    with pool.connection() as conn:
        conn.ask()
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: None)
            other = stack.enter_context(pool.connection())
            other.ask()

            def in_child() -> None:
                stack.close()
                is_cut_off(other)
                serves(pool)
                pool.close()

            with child(fork, in_child):
                other.ask()
        conn.ask()
    serves(pool)
    pool.close()
    SERVER.check()


def mid_request(fork: Fork) -> None:
    """Half of the reply is here. The other half is the parent's, though the child is the first to wait for it."""
    pool = line_pool(max_connections=3)
    errors: list[OSError] = []

    def borrower(receive: Callable[[Line], bytes]) -> None:
        try:
            with pool.connection() as conn:
                line = f"{os.getpid()} half"
                conn.send(line.encode() + b"\n")
                assert receive(conn).decode().strip() == line
        except OSError as error:
            errors.append(error)

    def to_the_end(conn: Line) -> bytes:
        reply = b""
        while data := conn.recv():  # an end of the stream would make half a reply a whole one
            reply += data
            if reply.endswith(b"\n"):
                break
        return reply

    borrowers = [
        gevent.spawn(borrower, lambda conn: conn.recv_until(b"\n")),
        gevent.spawn(borrower, to_the_end),
    ]
    SERVER.wait_held(2)

    def in_child() -> None:
        SERVER.let_go()
        gevent.joinall(borrowers, timeout=BOUND / 2, raise_error=True)
        assert len(errors) == 2, errors
        serves(pool)
        pool.close()

    with child(fork, in_child):
        gevent.joinall(borrowers, timeout=BOUND / 2, raise_error=True)
        assert errors == []
        assert (pool.stats().opened, pool.idle) == (2, 2), pool
        serves(pool)
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()


# Those who wait


def waiters(fork: Fork) -> None:
    """They wait on in both, each for the own side's connection, in the order in which they came."""
    pool = line_pool(max_connections=1)
    conn = pool.acquire()
    conn.ask()
    served: list[int] = []

    def waiter(number: int) -> None:
        with pool.connection() as mine:
            mine.ask(f"waiter {number}")
            served.append(number)

    queue = [gevent.spawn(waiter, number) for number in range(3)]
    wait_waiting(pool, 3)

    def in_child() -> None:
        gevent.joinall(queue, timeout=BOUND / 2, raise_error=True)
        assert served == [0, 1, 2]
        pool.release(conn)
        serves(pool, 1)
        assert pool.stats().opened == 2
        pool.close()
        SERVER.wait_ended(os.getpid())

    with child(fork, in_child):
        assert served == []
        conn.ask()
        pool.release(conn)
        gevent.joinall(queue, timeout=BOUND / 2, raise_error=True)
        assert served == [0, 1, 2]
        assert pool.stats().opened == 1
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()


def granted(fork: Fork) -> None:
    """Granted a connection, and not yet run."""
    for closed in (False, True):
        pool = line_pool(max_connections=1)
        conn = pool.acquire()
        outcome: list[object] = []

        def waiter(pool: Pool[Line] = pool, outcome: list[object] = outcome) -> None:
            try:
                with pool.connection(timeout=None) as mine:
                    mine.ask()
                    outcome.append("served")
            except Exception as error:
                outcome.append(error)

        queued = gevent.spawn(waiter)
        wait_waiting(pool, 1)
        pool.release(conn)
        if closed:
            pool._shut()

        def in_child(
            queued: Any = queued, pool: Pool[Line] = pool, outcome: list[object] = outcome, closed: bool = closed
        ) -> None:
            queued.join(BOUND / 2)
            if closed:
                assert len(outcome) == 1, (outcome, pool)
                assert isinstance(outcome[0], PoolClosedError), outcome
                assert pool.faults() == [], pool.faults()
            else:
                assert outcome == ["served"], (outcome, pool)
                serves(pool, 1)
                pool.close()

        with child(fork, in_child):
            queued.join(BOUND / 2)
            assert outcome == ["served"]
            pool.close()
            SERVER.wait_ended(os.getpid())
    SERVER.check()


def told(fork: Fork) -> None:
    """Those who wait for a drain, or for the pool to be ready."""
    pool = line_pool(max_connections=1)
    conn = pool.acquire()
    draining = gevent.spawn(pool.close, timeout=BOUND)
    settle()
    assert not draining.ready()

    def in_child() -> None:
        draining.get(timeout=BOUND / 2)
        assert pool.closed
        assert pool.faults() == []

    with child(fork, in_child):
        conn.ask()
        assert not draining.ready()
        pool.release(conn)
        draining.get(timeout=BOUND / 2)
    SERVER.wait_ended(os.getpid())

    halves[0] = 2
    pool = line_pool(Greeting, min_idle=2, max_connections=2)
    ready = gevent.spawn(pool.wait_ready)
    SERVER.wait_held(2)

    def becomes_ready() -> None:
        SERVER.let_go()
        ready.get(timeout=BOUND / 2)
        serves(pool)
        pool.close()

    with child(fork, becomes_ready):
        ready.get(timeout=BOUND / 2)
        assert pool.stats().opened == 2
        serves(pool)
        pool.close()
    SERVER.check()


# Dials


class Greeting(Line):
    """Says something before it is open, and waits for the answer."""

    def open(self) -> None:
        super().open()
        self.ask(word())


class OpaqueGreeting(Opaque, Greeting):
    pass


class ForkAtSpawn(Pool[Line]):
    """Does something as soon as a job is to be done, before it begins."""

    job = ""
    act: Job


def spawn_and_act(pool: Any, job: Callable[..., object], *args: object) -> object:
    task = Pool._spawn(pool, job, *args)
    if job.__name__ == pool.job:
        pool.job = ""
        pool.act()
    return task


ForkAtSpawn._spawn = spawn_and_act  # type: ignore[method-assign, assignment]


def dial_not_begun(fork: Fork) -> None:
    """A pool is made, and forked at once: what is to dial has not begun."""
    pool = line_pool(min_idle=2)

    def in_child() -> None:
        pool.wait_ready(BOUND / 2)
        settle()
        assert (pool.size, pool.stats().opened) == (2, 2), pool
        serves(pool)
        pool.close()

    with child(fork, in_child):
        pool.wait_ready(BOUND / 2)
        serves(pool)
        assert pool.stats().opened == 2
        pool.close()
    assert len(SERVER.heard()) == 4

    # The same for a borrower's dial. The borrower itself is who forks, before it waits.
    forking = ForkAtSpawn(Line, {"host": "127.0.0.1", "port": AT["port"]}, max_connections=2, acquire_timeout=BOUND)

    def others_borrow() -> None:
        serves(forking, 1)
        assert forking.stats().opened == 2, "one for the borrower, one for who came after it"

    def act() -> None:
        with child(fork, others_borrow):
            pass

    forking.act, forking.job = act, "_dial"
    ask_all(forking, count=1)
    assert forking.stats().opened == 1
    forking.close()
    SERVER.check()


def dial(fork: Fork, pool: Pool[Line], *, opaque: bool = False) -> None:
    """One side's dial is under way; who waits for it in the child gets a connection of the child's own."""
    asked: list[int] = []

    def borrower() -> None:
        with pool.connection() as conn:
            conn.ask()
            asked.append(os.getpid())

    waiting = gevent.spawn(borrower)
    SERVER.wait_held(1)
    assert pool.stats().opening == 1

    def in_child() -> None:
        SERVER.let_go()
        waiting.get(timeout=BOUND / 2)
        assert asked == [os.getpid()]
        settle()
        serves(pool)
        pool.close()
        SERVER.wait_ended(os.getpid())

    with child(fork, in_child):
        SERVER.let_go()
        waiting.get(timeout=BOUND / 2)
        assert asked == [os.getpid()]
        assert pool.stats().opened == 1
        serves(pool)
        pool.close()
        if not opaque:
            SERVER.wait_ended(os.getpid())
    SERVER.wait_ended(os.getpid())
    SERVER.check()


def connecting(fork: Fork) -> None:
    """The connect is neither accepted nor refused. The child's copy goes nowhere; another place serves the child."""
    pid, hole = os.getpid(), SERVER.hole()
    pool = Pool(
        lambda: Line("127.0.0.1", hole if os.getpid() == pid else AT["port"]),
        max_connections=2,
        acquire_timeout=BOUND,
    )
    waiting = gevent.spawn(ask_all, pool, count=1)
    until("a dial is under way", lambda: pool.stats().opening == 1)
    settle()

    def in_child() -> None:
        waiting.get(timeout=BOUND / 2)
        serves(pool)
        pool.close()

    with child(fork, in_child):
        assert pool.stats().opening == 1
        SERVER.open_the_hole()
        waiting.get(timeout=BOUND / 2)
        assert pool.stats().opened == 1
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()


def handshake(fork: Fork) -> None:
    SERVER.hold_a_handshake()
    pool = line_pool(at=tls_options())
    dial(fork, pool)


def greeting(fork: Fork) -> None:
    halves[0] = 1
    dial(fork, line_pool(Greeting))


def opaque_dial(fork: Fork) -> None:
    """The pool cannot know what it dials with."""
    halves[0] = 1
    dial(fork, line_pool(OpaqueGreeting), opaque=True)


class Wrapped:
    """A connection of some library's."""

    def __init__(self) -> None:
        self.sock = connect()
        try:
            self.ask(word())
        except BaseException:
            self.sock.close()
            raise

    def ask(self, text: str = "hello") -> None:
        exchange(self.sock, text)

    def close(self) -> None:
        try:
            self.ask("quit")
        finally:
            self.sock.close()


class WrappedWithFileno(Wrapped):
    def fileno(self) -> int:
        return int(self.sock.fileno())


def wrapped_dial(fork: Fork) -> None:
    """The pool has nothing in hand before it is open."""
    halves[0] = 1
    pool: Any = Pool(wrap(Wrapped), max_connections=2, acquire_timeout=BOUND / 2)
    dial(fork, pool)


def wrapped(fork: Fork) -> None:
    for kind, knows in ((Wrapped, False), (WrappedWithFileno, True)):
        pool: Any = Pool(wrap(kind), max_connections=2, acquire_timeout=BOUND / 2)
        ask_all(pool)
        first, second = pool.acquire(), pool.acquire()
        pool.release(second)

        def in_child(first: Any = first, second: Any = second, knows: bool = knows, pool: Any = pool) -> None:
            pool.release(first)
            for each in (first, second) if knows else ():
                try:
                    each.ask("from the child")
                except OSError:
                    pass
                else:
                    raise AssertionError("it went through")
            serves(pool)
            pool.close()

        with child(fork, in_child):
            first.ask()
            pool.release(first)
            serves(pool)
            assert pool.stats().opened == 2
            pool.close()
            if knows:
                SERVER.wait_ended(os.getpid())
    SERVER.wait_ended(os.getpid())
    SERVER.check()


def several_pools(fork: Fork) -> None:
    """What goes wrong with one is nothing to the others."""

    class Faulty(Line):
        def fileno(self) -> int | None:
            if os.getpid() != pid:
                raise SystemExit
            return super().fileno()

    pid = os.getpid()
    # Nobody asks for its descriptor, but the fork.
    faulty = line_pool(Faulty, check_after_idle=None)
    pools = [line_pool(), line_pool(check_after_idle=None), line_pool(order="fifo")]
    closed = line_pool()
    closed.close()
    for pool in (faulty, *pools):
        ask_all(pool)
    held = [pool.acquire() for pool in pools]

    def in_child() -> None:
        for pool, conn in zip(pools, held, strict=True):
            is_cut_off(conn)
            pool.release(conn)
            serves(pool)
        serves(faulty)

    with child(fork, in_child):
        for pool, conn in zip(pools, held, strict=True):
            pool.release(conn)
            serves(pool)
        serves(faulty)
        for pool in (faulty, *pools):
            assert pool.stats().opened == 2
            pool.close()
    SERVER.check()


def made_after(fork: Fork) -> None:
    """Pools made before the fork and after it, on either side."""
    before = line_pool()
    ask_all(before)

    def in_child() -> None:
        after = line_pool()
        for pool in (before, after):
            serves(pool)
            pool.close()

    with child(fork, in_child):
        after = line_pool()
        for pool in (before, after):
            serves(pool)
            pool.close()
        SERVER.wait_ended(os.getpid())
    assert before.stats().opened == 2
    SERVER.check()


# Closes and upkeep


def closing(fork: Fork) -> None:
    """Under way, or not yet begun."""
    for kind in (Polite, Opaque):
        for begun in (False, True):
            pool = line_pool(kind)
            with pool.connection() as conn:
                conn.ask()
                halves[0] = 1
                pool._discard(pool._members[id(conn)])
            if begun:
                SERVER.wait_held(1)

            def in_child(pool: Pool[Line] = pool, begun: bool = begun) -> None:
                if begun:
                    SERVER.let_go()
                settle()
                serves(pool)
                pool.close()
                SERVER.wait_ended(os.getpid())

            with child(fork, in_child):
                if not begun:
                    SERVER.wait_held(1)
                    SERVER.let_go()
                wait_closed(pool)
                assert pool.total == 0
                if kind is Polite:
                    SERVER.wait_ended(os.getpid())
            (heard,) = SERVER.of(os.getpid())
            assert heard.lines == [f"{os.getpid()} {text}" for text in ("hello", "half")]
            SERVER.check()
            SERVER.begin()


class Kept(Line):
    def keepalive(self) -> bool:
        self.ask(word())
        return True


class OpaqueAndKept(Opaque, Kept):
    pass


def keepalive(fork: Fork) -> None:
    """Under way."""
    for kind in (Kept, OpaqueAndKept):
        pool = line_pool(kind, keepalive=0.05)
        with pool.connection() as conn:
            conn.ask()
            halves[0] = 1
        SERVER.wait_held(1)

        def in_child(pool: Pool[Line] = pool) -> None:
            SERVER.let_go()
            settle()
            serves(pool)
            pool.close()
            SERVER.wait_ended(os.getpid())

        with child(fork, in_child):
            wait_idle(pool, 1)
            assert pool.stats().opened == 1
            serves(pool)
            pool.close()
            if kind is Kept:
                SERVER.wait_ended(os.getpid())
        SERVER.check()
        SERVER.begin()


def keepalive_not_begun(fork: Fork) -> None:
    where = {"host": "127.0.0.1", "port": AT["port"]}
    pool = ForkAtSpawn(OpaqueAndKept, where, max_connections=2, keepalive=0.05)
    forked = Event()

    def in_child() -> None:
        settle()
        assert (pool.size, pool._closing) == (0, 0), pool
        serves(pool)
        pool.close()

    def act() -> None:
        with child(fork, in_child):
            pass
        forked.set()

    pool.act, pool.job = act, "_prove"
    with pool.connection() as conn:
        conn.ask()
    assert forked.wait(BOUND / 2)
    serves(pool)
    pool.close()
    SERVER.check()


def upkeep(fork: Fork) -> None:
    """Each side keeps its own stock."""
    pool = line_pool(min_idle=2, idle_timeout=60, max_lifetime=60)
    pool.wait_ready(BOUND / 2)
    mine = {id(member.connection) for member in pool._members.values()}

    def in_child() -> None:
        pool.wait_ready(BOUND / 2)
        assert pool.size == 2
        serves(pool)
        with pool.connection() as conn:
            pool.drop(conn)
        pool.wait_ready(BOUND / 2)
        serves(pool)
        pool.close()

    with child(fork, in_child):
        assert {id(member.connection) for member in pool._members.values()} == mine
        serves(pool)
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()


def reaping(fork: Fork) -> None:
    """One connection has expired, and whether the other one has is being asked."""
    pids: list[int] = []

    class Reaped(Opaque):
        asked = 0

        def is_expired(self) -> bool:
            Reaped.asked += 1
            if Reaped.asked == 2:
                pids.append(forked(fork))
            return True

    pool = line_pool(Reaped)
    ask_all(pool)
    pool.drop_expired()
    if pids == [0]:
        with last_words():
            settle()
            assert pool._closing == 0
            serves(pool)
            pool.close()
    wait_for(pids[0], fork)
    assert pool.stats().closed["expired"] == 2
    pool.close()
    SERVER.check()


def backing_off(fork: Fork) -> None:
    """Dials for the stock fail; the child does not wait for the parent's pause."""
    pid = os.getpid()
    logging.getLogger("gsocketpool").setLevel(logging.ERROR)  # the parent's warning is right
    pool = Pool(
        lambda: Line("127.0.0.1", AT["refused" if os.getpid() == pid else "port"]),
        min_idle=1,
        max_connections=2,
        backoff=(1000, 1000),
    )
    until("it failed", lambda: pool.stats().open_failures)

    def in_child() -> None:
        pool.wait_ready(BOUND / 2)
        serves(pool)
        pool.close()

    with child(fork, in_child):
        pass
    pool.close()
    SERVER.check()


def paused(fork: Fork) -> None:
    """It stays paused, or closed, on both sides."""
    pool = line_pool()
    ask_all(pool)
    pool.pause()
    waiting = gevent.spawn(ask_all, pool)
    wait_waiting(pool, 2)

    def in_child() -> None:
        settle()
        assert (pool.size, pool.waiting) == (0, 2), pool
        pool.resume()
        waiting.get(timeout=BOUND / 2)
        serves(pool)
        pool.close()
        with contextlib.suppress(PoolClosedError), pool.connection():
            raise AssertionError("it is closed")

    with child(fork, in_child):
        assert pool.waiting == 2
        pool.resume()
        waiting.get(timeout=BOUND / 2)
        assert pool.stats().opened == 2
        pool.close()
        SERVER.wait_ended(os.getpid())

    def is_closed() -> None:
        with contextlib.suppress(PoolClosedError), pool.connection():
            raise AssertionError("it is closed")

    with child(fork, is_closed):
        pass
    SERVER.check()


def loans(fork: Fork) -> None:
    """Who holds what is noted: in the child nobody holds anything, and no report is made of it."""
    logger = logging.getLogger("gsocketpool")
    logger.setLevel(logging.ERROR)  # where the server takes its time, a report is right
    pool = line_pool(leak_threshold=0.5, reclaim=True)
    asked, dies = Event(), Event()

    def borrower() -> None:
        pool.acquire().ask()
        asked.set()
        dies.wait(BOUND)

    careless = gevent.spawn(borrower)
    assert asked.wait(BOUND / 2)

    def in_child() -> None:
        logger.setLevel(logging.WARNING)
        assert pool.holders() == []
        dies.set()
        careless.join(BOUND / 2)
        gevent.sleep(0.6)  # past the threshold, and a tick
        logger.setLevel(logging.ERROR)
        serves(pool)
        pool.close()

    with child(fork, in_child):
        assert len(pool.holders()) == 1
        pool.drop(pool.holders()[0].connection)
    dies.set()
    careless.join()
    pool.close()
    SERVER.check()
    logger.setLevel(logging.WARNING)

    # The end of one is known, and nothing done about it so far. That is in the hub, which cannot wait for a child.
    where = {"host": "127.0.0.1", "port": AT["port"]}
    reclaiming = ForkAtSpawn(Line, where, max_connections=2, reclaim=True)
    pids: list[int] = []

    def act() -> None:
        pids.append(forked(fork))
        if pids != [0]:
            logger.setLevel(logging.ERROR)  # what the parent says of it is right

    reclaiming.act, reclaiming.job = act, "take_back"
    gevent.spawn(lambda: reclaiming.acquire().ask()).join()
    settle()
    if pids == [0]:
        with last_words():
            assert reclaiming.stats().closed["reclaimed"] == 0
            serves(reclaiming)
            reclaiming.close()
    until("it is taken back", lambda: reclaiming.stats().closed["reclaimed"] == 1)
    wait_for(pids[0], fork)
    reclaiming.close()
    SERVER.check()


# TLS


def tls(fork: Fork) -> None:
    """Its record numbers are in the memory of both: one byte from the child, and the parent's is out of step."""
    pool = line_pool(at=tls_options())
    ask_all(pool)
    borrowed = pool.acquire()
    borrowed.ask()

    def in_child() -> None:
        is_cut_off(borrowed)
        with contextlib.suppress(OSError):
            borrowed.socket.unwrap()  # type: ignore[attr-defined]
        borrowed.close()
        pool.release(borrowed)
        serves(pool)
        pool.close()

    with child(fork, in_child):
        borrowed.ask()
        pool.release(borrowed)
        serves(pool)
        assert pool.stats().opened == 2
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()


# Ends


def exits(fork: Fork) -> None:
    """A child that ends as any program does: blocks are left, exit handlers and finalizers run."""
    for kind in (Polite, Opaque):
        pool = line_pool(kind)
        ask_all(pool)
        held = pool.acquire()
        with pool.connection() as conn:
            conn.ask()
            pid = forked(fork)
            if pid == 0:
                own = line_pool(Polite)
                serves(pool)
                serves(own)
                atexit.register(pool.close)
                atexit.register(own.close)
                atexit.register(pool.release, held)
                keep.extend([pool, own, held])
                sys.exit()
        wait_for(pid, fork)
        held.ask()
        pool.release(held)
        serves(pool)
        assert pool.stats().opened == 2
        pool.close()
        SERVER.wait_ended(os.getpid())
        SERVER.check()
        SERVER.begin()


#: What is here is torn down with the module.
keep: list[object] = []


def forgotten(fork: Fork) -> None:
    """The child drops all references to a pool, and to its connections: what the parent has open is not finalized."""
    for kind in (Line, Opaque):
        pools = [line_pool(kind)]
        ask_all(pools[0])
        borrowed = [pools[0].acquire()]

        def in_child(pools: list[Pool[Line]] = pools, borrowed: list[Line] = borrowed) -> None:
            pools[0].release(borrowed[0])
            borrowed.clear()
            ref = weakref.ref(pools[0])
            pools.clear()
            settle()
            gc.collect()
            assert ref() is None, "the pool is kept alive"

        with child(fork, in_child):
            borrowed[0].ask()
            pools[0].release(borrowed.pop())
            serves(pools[0])
            assert pools[0].stats().opened == 2
            pools[0].close()
        SERVER.wait_ended(os.getpid())
        SERVER.check()
        SERVER.begin()


# Other ways to have a copy


def thread(fork: Fork) -> None:
    """A thread forks: in the child there is no other. It cannot use the pools of the others, nor do them harm."""
    pool = line_pool(check_after_idle=0.05)
    ask_all(pool)
    borrowed = pool.acquire()
    problems: list[BaseException] = []

    def in_child(own: Pool[Line]) -> None:
        is_cut_off(borrowed)
        assert pool.size == 0
        serves(own)
        own.close()
        with contextlib.suppress(PoolError), pool.connection(timeout=5):
            raise AssertionError("a pool of another thread has lent a connection")
        fresh = line_pool()
        serves(fresh)
        fresh.close()

    def in_thread() -> None:
        try:
            with line_pool() as own:
                ask_all(own)
                with child(fork, lambda: in_child(own)):
                    serves(own)
                    assert own.stats().opened == 2
        except BaseException as error:
            traceback.print_exc()
            problems.append(error)

    forking = threading.Thread(target=in_thread)
    forking.start()
    while forking.is_alive():  # meanwhile this thread goes on using its own
        borrowed.ask()
        gevent.sleep(0.001)
    forking.join()
    assert problems == []
    pool.release(borrowed)
    serves(pool)
    assert pool.stats().opened == 2
    pool.close()
    SERVER.wait_ended(os.getpid())
    SERVER.check()


def grandchild(fork: Fork) -> None:
    pool = line_pool()
    ask_all(pool)
    first = pool.acquire()

    def in_child() -> None:
        second = pool.acquire()
        second.ask()

        def in_grandchild() -> None:
            is_cut_off(first)
            is_cut_off(second)
            pool.release(second)
            pool.release(first)
            serves(pool)
            pool.close()

        with child(fork, in_grandchild):
            second.ask()
            pool.release(second)
            serves(pool)
            pool.close()
            SERVER.wait_ended(os.getpid())

    with child(fork, in_child):
        first.ask()
        pool.release(first)
        serves(pool)
        assert pool.stats().opened == 2
        pool.close()
        SERVER.wait_ended(os.getpid())
    SERVER.check()
    assert len({pid for each in SERVER.heard() for pid in each.pids}) == 3


def in_worker(conn: Any) -> None:
    signal.alarm(BOUND)
    gevent.reinit()
    (pool,) = keep
    assert isinstance(pool, Pool)
    serves(pool)
    pool.close()
    conn.send("done")
    conn.recv()


def modules(fork: Fork) -> None:
    """What the standard library starts: copies of this process, and other programs."""
    pool = line_pool()
    ask_all(pool)
    keep.append(pool)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        worker = context.Process(target=in_worker, args=(there,))
        worker.start()
    # The other program outlives the connections.
    with subprocess.Popen(["sleep", str(BOUND)], preexec_fn=lambda: None) as program:
        try:
            assert here.poll(BOUND)
            assert here.recv() == "done"
            serves(pool)
            pool.close()
            SERVER.wait_ended(os.getpid())
            here.send("end")
            worker.join(BOUND)
            assert worker.exitcode == 0, worker.exitcode
        finally:
            program.kill()
    SERVER.check()


# Hard cases


def limit(fork: Fork) -> None:
    """No descriptor is free, as long as there is not one closed."""
    pools = [line_pool(), line_pool()]
    for pool in pools:
        ask_all(pool)
    held = [pool.acquire() for pool in pools]
    said, says = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, descriptors())) + 2, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        pid = forked(fork)
    finally:
        for descriptor in taken:
            close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if pid == 0:
        with last_words():
            for pool, conn in zip(pools, held, strict=True):
                is_cut_off(conn)
                conn.close()
                pool.release(conn)
                serves(pool)
                pool.close()
            os.write(says, b".")
    close(says)
    assert os.read(said, 1) == b"."
    close(said)
    wait_for(pid, fork)
    for pool, conn in zip(pools, held, strict=True):
        conn.ask()
        pool.release(conn)
        serves(pool)
        assert pool.stats().opened == 2
        pool.close()
    SERVER.check()


def figures(fork: Fork) -> None:
    """What `stats` counts never falls."""
    pool = line_pool()
    ask_all(pool)
    before = pool.stats()
    pid = os.getpid()

    def in_child() -> None:
        after = pool.stats()
        assert (after.size, after.idle, after.in_use, after.opening, after.waiting) == (0, 0, 0, 0, 0)
        assert after.acquired == before.acquired
        assert after.opened == before.opened
        assert after.closed == before.closed, "the child has closed nothing"
        serves(pool)
        assert pool.stats().acquired == before.acquired + 2

    with child(fork, in_child):
        assert pool.stats() == before
    assert os.getpid() == pid
    pool.close()
    SERVER.check()


# A fork at every switch point


class Busy(Line):
    """Has switch points in all that a pool asks of it."""

    def open(self) -> None:
        super().open()
        self.ask("open")

    def close(self) -> None:
        try:
            self.ask("close")
        finally:
            super().close()

    def reset(self) -> None:
        self.ask("reset")

    def check(self) -> bool:
        gevent.sleep(0)
        return super().check()

    def is_expired(self) -> bool:
        gevent.sleep(0)
        return True


class Scalpel:
    """Forks at one of the switches of this program, in the middle of whatever runs then."""

    def __init__(self, point: int, fork: Fork) -> None:
        self._point = point
        self._fork = fork
        self.points = 0
        self.pid = -1

    def __enter__(self) -> Scalpel:
        greenlet.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        greenlet.settrace(None)

    def _trace(self, event: str, args: Any) -> None:
        self.points += 1
        if self.points == self._point:
            self.pid = self._fork()
            if self.pid == 0:
                signal.alarm(BOUND)


def busy_day(pool: Pool[Line], scalpel: Scalpel) -> None:
    """Borrowers who wait, who fail; dials and closes, resets and checks, and what has expired."""

    def borrower(number: int) -> None:
        for turn in range(2):
            pid = os.getpid()
            try:
                if number == 0:
                    conn = pool.acquire()
                    conn.ask(f"{number}.{turn}")
                    pool.release(conn)
                else:
                    with pool.connection() as conn:
                        conn.ask(f"{number}.{turn}")
                        if (number, turn) == (1, 0):
                            raise ValueError
            except ValueError:
                pass
            except (OSError, AssertionError):
                # Who has begun as the parent, and goes on as the child, gets no answer. Nobody else fails.
                if os.getpid() == pid:
                    raise

    def reaper() -> None:
        gevent.sleep(0.001)
        pool.drop_expired()

    jobs: list[gevent.Greenlet[..., None]] = [gevent.spawn(borrower, number) for number in range(4)]
    jobs.append(gevent.spawn(reaper))
    done = gevent.joinall(jobs, timeout=BOUND / 2, raise_error=True)
    assert len(done) == len(jobs), "some hang"


def every_switch(fork: Fork) -> None:
    point = 0
    while True:
        point += 1
        pool = line_pool(Busy, check_after_idle=0, max_connecting=1)
        scalpel = Scalpel(point, fork)
        try:
            with scalpel:
                busy_day(pool, scalpel)
            settle()
            wait_closed(pool)
            serves(pool)
            pool.close()
        except BaseException:
            if scalpel.pid == 0:
                print(f"forked at switch {point}", file=sys.stderr)
                traceback.print_exc()
                end(1)
            raise
        if scalpel.pid == 0:
            end(0)
        assert (pool.stats().open_failures, pool.stats().closed["discarded"]) == (0, 1), pool.stats()
        if scalpel.pid == -1:
            break
        wait_for(scalpel.pid, fork)
    assert point > 50, point
    SERVER.check()


# psycopg, in a program with a patched standard library


def psycopg(fork: Fork) -> None:
    import psycopg

    def connect() -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(AT["dsn"])

    def query(pool: Pool[psycopg.Connection[tuple[Any, ...]]], pids: set[int]) -> None:
        with pool.connection() as one, pool.connection() as other:
            for conn in (one, other):
                assert conn.execute("SELECT 1").fetchone() == (1,)
                conn.rollback()
                pids.add(conn.info.backend_pid)

    pool = Pool(wrap(connect, check=lambda conn: not conn.closed), max_connections=2, acquire_timeout=BOUND / 2)
    mine: set[int] = set()
    query(pool, mine)
    with pool.connection() as conn:
        conn.execute("CREATE TEMP TABLE mine AS SELECT 17 AS n")
        pid = forked(fork)
        if pid == 0:
            try:
                conn.execute("SELECT 18")
            except psycopg.OperationalError:
                pass
            else:
                raise AssertionError("the child's query went through")
            conn.close()
            others: set[int] = set()
            query(pool, others)
            assert len(others) == 2
            assert not others & mine
            pool.close()
            del pool, conn
            gc.collect()
            sys.exit()  # finalizers and all
    wait_for(pid, fork)
    with pool.connection() as conn:
        assert conn.execute("SELECT n FROM mine").fetchone() == (17,), "another session"
        conn.rollback()
    query(pool, mine)
    assert len(mine) == 2
    assert pool.stats().opened == 2
    pool.close()


def psycopg_dial(fork: Fork) -> None:
    """At each stage of its dial: the child's copy is not to speak, nor to take what the parent is told."""
    import psycopg

    rows: list[object] = []

    def borrow(pool: Pool[psycopg.Connection[tuple[Any, ...]]]) -> None:
        with pool.connection() as conn:
            rows.append(conn.execute("SELECT 1").fetchone())

    for turns in range(12):
        pool = Pool(wrap(lambda: psycopg.connect(AT["dsn"])), max_connections=2, acquire_timeout=BOUND / 2)
        rows.clear()
        waiting = gevent.spawn(borrow, pool)
        for _ in range(turns):
            gevent.sleep(0)

        def in_child(waiting: Any = waiting, pool: Any = pool) -> None:
            waiting.get(timeout=BOUND / 2)
            assert rows == [(1,)]
            settle()
            assert pool.faults() == []
            pool.close()

        with child(fork, in_child):
            waiting.get(timeout=BOUND / 2)
            assert rows == [(1,)]
            assert pool.stats().open_failures == 0
            pool.close()


SCENARIOS: dict[str, Callable[[Fork], None]] = {
    scenario.__name__: scenario
    for scenario in (
        idle,
        watched,
        block,
        by_hand,
        subclassed,
        mid_request,
        waiters,
        granted,
        told,
        dial_not_begun,
        connecting,
        handshake,
        greeting,
        opaque_dial,
        wrapped_dial,
        wrapped,
        several_pools,
        made_after,
        closing,
        keepalive,
        keepalive_not_begun,
        upkeep,
        reaping,
        backing_off,
        paused,
        loans,
        tls,
        exits,
        forgotten,
        thread,
        grandchild,
        modules,
        limit,
        figures,
        every_switch,
        psycopg,
        psycopg_dial,
    )
}

if __name__ == "__main__":
    faulthandler.register(signal.SIGALRM, chain=True)  # the children too say where they stood
    signal.alarm(50)  # before who started it loses patience
    for each in FORKS[sys.argv[2]]:
        SCENARIOS[sys.argv[1]](each)
        SERVER.begin()

"""A month of a service in a few minutes: ``python -m tests.soak``, or ``make soak``.

Three pools (see `SITES`) serve many greenlets. By day borrowers are killed and timed out, give up waiting, leave by
exceptions, drop what they borrowed or forget to give it back, while servers restart, reset, hang and cut replies short,
and pools are cleared, resized, paused and deployed anew. By night everything comes to rest: as many borrowers as there
are slots are served at once, idle connections whose peer hung up are replaced, surplus ones go. Then, with nothing
under way, what the process holds is counted. The month is good if nothing has grown, no reply was wrong, no server ever
saw a socket too many, service resumed after every restart, no invariant was broken, and nothing is left in the end.

Scaled time: what takes hours in a service (a lifetime, an idle timeout) takes tenths of a second here; a day lasts as
long as its share of the borrowings. What happens is decided by a seed, in which order is up to the machine.
"""

from __future__ import annotations

import gc
import logging
import re
import statistics
import sys
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from types import TracebackType
from typing import Any, Final

import click
import gevent
import gevent.hub
import gevent.socket
import greenlet
import psutil
from gevent import socket
from gevent.event import Event
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from gsocketpool import (
    Budget,
    ConnectionNotFoundError,
    Pool,
    PoolClosedError,
    PoolError,
    PoolExhaustedError,
    TcpConnection,
    wrap,
)
from gsocketpool.core import Member, Place
from tests.servers import Server, reset, swallow

#: Seconds that a borrower waits for a reply; some never come.
ANSWER: Final = 0.25

#: States of a TCP socket whose peer has not hung up: established, and half closed from this side.
CONNECTED: Final = (1, 4, 5)

#: Most sockets of a pool.
CAP: Final = 6

#: Kept ready by each pool.
READY: Final = 2


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    :ivar borrowings: how often connections are lent.
    :ivar days: into how many days and nights they are divided; each night everything is counted.
    :ivar workers: greenlets that borrow from each pool.
    :ivar seed: decides who is killed, what breaks, and when.
    :ivar patience: seconds after which what has to happen is taken not to come.
    """

    borrowings: int = 1_000_000
    days: int = 30
    workers: int = 16
    seed: int = 2017
    patience: float = 20.0


# The server


class Service(Server):
    """Echoes lines, and fails now and then; it can be restarted at its port."""

    def __init__(self, rng: Random) -> None:
        super().__init__(self._answer)
        self._rng = rng
        self.patience = 0.0  # seconds that a handshake takes
        self.refuses = False  # each handshake

    def __enter__(self) -> Service:
        # Holds the port while nobody listens on it.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self._address = self._holder.getsockname()
        return super().__enter__()

    def close(self) -> None:
        super().close()
        self._holder.close()

    def _listen(self) -> Any:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(self._address)
        listener.listen(1024)
        return listener

    def _is_open(self, sock: Any) -> bool:
        # What this side has half closed is the client's until the client closes it.
        if not hasattr(socket, "TCP_INFO"):
            return super()._is_open(sock)
        fileno: int = sock.fileno()
        return fileno >= 0 and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in CONNECTED

    @property
    def handlers(self) -> int:
        """How many connections it still serves."""
        return len(self._greenlets)

    # What it does to its clients

    def restart(self, brutally: bool, downtime: float) -> None:
        """Hang up on all clients, be away, and listen again."""
        self._stop_accepting()
        if brutally:
            self._reset(self._greenlets.values())
        else:
            self.hang_up()
        gevent.sleep(downtime)
        self._listener = self._listen()
        self._accepting = gevent.spawn(self._accept, self._listener)

    def reset_some(self) -> None:
        self._reset(self._some())

    def half_close_some(self) -> None:
        for sock in self._some():
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # gone already

    def _reset(self, socks: Iterable[Any]) -> None:
        for sock in list(socks):
            if sock.fileno() >= 0:  # else its handler has just closed it
                reset(sock)

    def _some(self) -> list[Any]:
        return [sock for sock in self._greenlets.values() if self._rng.random() < 0.5]

    def _answer(self, sock: Any) -> None:
        rest = b""
        while data := sock.recv(4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                luck = self._rng.random()
                if line == b"hello":
                    gevent.sleep(self.patience * luck)
                    if self.refuses:
                        return
                elif luck < 0.0003:  # cut short
                    sock.sendall(line[:-1])
                    return reset(sock)
                elif luck < 0.0008:  # never
                    return swallow(sock)
                elif luck < 0.0012:
                    sock.shutdown(socket.SHUT_WR)
                    return swallow(sock)
                elif luck < 0.03:
                    gevent.sleep(0.1 * luck)
                sock.sendall(line + b"\n")


# The connections


class Caller(TcpConnection):
    """Asks for lines to be echoed, beginning with a handshake."""

    def __init__(self, port: int, lifetime: float | None = None) -> None:
        super().__init__("127.0.0.1", port, lifetime, ANSWER)

    def open(self) -> None:
        super().open()
        self.ask(b"hello")

    def ask(self, line: bytes) -> bytes:
        self.send(line + b"\n")
        return self.recv_until(b"\n")

    def keepalive(self) -> bool:
        return self.ask(b"ping") == b"ping"


class TidyCaller(Caller):
    """Has a reset that talks to the server."""

    def reset(self) -> None:
        if self.ask(b"reset") != b"reset":
            raise ConnectionError("the reset was not answered")


def call(port: int) -> Any:
    """Open a plain socket, which knows nothing of pools."""
    sock = socket.socket()
    try:
        sock.settimeout(ANSWER)
        sock.connect(("127.0.0.1", port))
        ask_plain(sock, b"hello")
    except BaseException:
        sock.close()
        raise
    return sock


def ask_plain(sock: Any, line: bytes) -> bytes:
    sock.sendall(line + b"\n")
    reply = b""
    while not reply.endswith(b"\n"):
        data = sock.recv(4096)
        if not data:
            raise ConnectionError("the server hung up")
        reply += data
    return reply[:-1]


def ask(connection: Any, line: bytes) -> bytes:
    return connection.ask(line) if isinstance(connection, Caller) else ask_plain(connection, line)


# The pools


def with_blocks(kind: type[Pool[Any]], port: int) -> Pool[Any]:
    """Last in, first out, lent by ``with``; what a greenlet forgot to give back is taken back."""
    return kind(
        Caller,
        {"port": port},
        max_connections=CAP,
        name="with",
        check_after_idle=0.05,
        max_connecting=3,
        budget=Budget(CAP),
        **upkeep(max_uses=400, leak_threshold=0.2, reclaim=True),
    )


def by_hand(kind: type[Pool[Any]], port: int) -> Pool[Any]:
    """First in, first out, checked each time, reset each time, lent by hand, with few places in the queue; a reaper."""
    return kind(
        TidyCaller,
        {"port": port, "lifetime": 1.5},
        max_connections=CAP,
        reap_interval=0.3,
        name="by hand",
        check_after_idle=0,
        max_waiting=8,
        order="fifo",
        **upkeep(leak_threshold=0.2),
    )


def plain(kind: type[Pool[Any]], port: int) -> Pool[Any]:
    """Sockets as they are; only their own errors discard them; nobody records who holds what."""
    return kind(
        wrap(call, check=is_quiet, keepalive=lambda sock: ask_plain(sock, b"ping") == b"ping"),
        {"port": port},
        max_connections=CAP,
        name="plain",
        check_after_idle=0.05,
        discard_on=OSError,
        **upkeep(),
    )


def upkeep(**more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "min_idle": READY,
        "idle_timeout": 0.2,
        "max_lifetime": 0.6,
        "lifetime_jitter": 0.2,
        "keepalive": 0.1,
        "backoff": (0.005, 0.1),
        **more,
    }
    return options


def is_quiet(sock: Any) -> bool:
    """Whether nothing has arrived, the end of the stream included."""
    timeout = sock.gettimeout()
    sock.settimeout(0)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        sock.settimeout(timeout)
    return False


Maker = Callable[[type[Pool[Any]], int], Pool[Any]]

SITES: Final[tuple[Maker, ...]] = (with_blocks, by_hand, plain)


# The service


class StuckError(Exception):
    """Something that must happen does not."""


class Lapse(Exception):
    """A borrower's own error, raised inside the block."""


class Site:
    """A pool, its server, those who borrow, and what happens to them."""

    def __init__(self, make: Maker, kind: type[Pool[Any]], plan: Plan, log: Log, rng: Random) -> None:
        self._make = make
        self._plan = plan
        self._kind = kind
        self._log = log
        self._rng = rng
        self.name = make.__name__.replace("_", " ")
        self.service = Service(Random(rng.random()))
        self.borrowed = 0
        self._token = count()
        self._lent: set[int] = set()
        self._goal = 0
        self._next = 0.0  # incident
        self._due = Event()
        self._deck: list[Callable[[], None]] = []

    def __enter__(self) -> Site:
        self.service.__enter__()
        self.pool = self._make(self._kind, self.service.port)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.pool.close(timeout=0)
        self._leave()
        try:
            self.service.wait_open(0, self._plan.patience)
        finally:
            self.service.close()

    def _leave(self) -> None:
        """Take down why the pool closed its connections."""
        for reason, times in self.pool.stats().closed.items():
            self._log.count(f"closed: {reason}", times)

    # By day

    def day(self, borrowings: int) -> list[gevent.Greenlet[..., None]]:
        """Let so many connections be lent. Returns the greenlets that end when that is done."""
        self._goal = self.borrowed + borrowings
        self._expect_incident()
        seeds = [self._rng.random() for _ in range(self._plan.workers)]
        return [gevent.spawn(self._trouble), *(gevent.spawn(self._work, Random(seed)) for seed in seeds)]

    def _work(self, rng: Random) -> None:
        acts, weights = zip(*ACTS, strict=True)
        while self.borrowed < self._goal:
            (act,) = rng.choices(acts, weights)
            try:
                act(self, rng)
            except PoolClosedError:
                self._log.count("came while the pool was replaced")
                gevent.sleep(0.001)
            except (OSError, Lapse) as error:
                self._log.count(f"failed: {type(error).__name__}")
            except Exception as error:
                self._log.fail(f"{self.name}: {type(error).__name__} in a borrower", error)

    def _lend(self, timeout: float, job: Callable[[Any], None]) -> None:
        """Borrow as this pool is used, and do a job with what was borrowed."""
        pool = self.pool
        if self._make is not by_hand:
            with pool.connection(timeout=timeout) as connection:
                self._use(connection, job)
            return
        connection = pool.acquire(timeout=timeout)
        try:
            self._use(connection, job)
        finally:
            try:
                pool.release(connection)
            except ConnectionNotFoundError:
                self._log.count("dropped while it was used")

    def _use(self, connection: Any, job: Callable[[Any], None]) -> None:
        key = id(connection)
        if key in self._lent:
            self._log.fail(f"{self.name}: a connection was lent to two borrowers")
        self._lent.add(key)
        self.borrowed += 1
        if self.borrowed >= self._next or self.borrowed >= self._goal:
            self._due.set()
        try:
            job(connection)
        finally:
            self._lent.discard(key)

    def _talk(self, connection: Any) -> None:
        line = b"%d for %s" % (next(self._token), self.name.encode())
        reply = ask(connection, line)
        if reply == line:
            self._log.count("right")
        else:
            self._log.fail(f"{self.name}: {line!r} was answered by {reply!r}")

    # What borrowers do

    def _patient(self, rng: Random) -> None:
        try:
            self._lend(self._plan.patience, self._talk)
        except PoolExhaustedError as error:
            if error.waited > self._plan.patience / 2:
                self._log.fail(f"{self.name}: not served", error)
            self._log.count("turned away by max_waiting")
            gevent.sleep(0.001)

    def _impatient(self, rng: Random) -> None:
        try:
            self._lend(rng.choice((0, 0.001 * rng.random())), self._talk)
        except PoolExhaustedError:
            self._log.count("gave up waiting")

    def _killed(self, rng: Random) -> None:
        victim = gevent.spawn(self._quietly, self._patient, rng)
        timer = gevent.get_hub().loop.timer(0.004 * rng.random() ** 2)
        timer.start(victim.kill, gevent.GreenletExit, False)
        try:
            victim.join()
        finally:
            timer.close()
        self._log.count("killed" if isinstance(victim.value, gevent.GreenletExit) else "outran the kill")

    def _quietly(self, act: Callable[[Random], None], rng: Random) -> None:
        try:
            act(rng)
        except (OSError, Lapse, PoolClosedError) as error:
            self._log.count(f"failed: {type(error).__name__}")
        except Exception as error:
            self._log.fail(f"{self.name}: {type(error).__name__} in a borrower", error)

    def _timed_out(self, rng: Random) -> None:
        timeout = gevent.Timeout.start_new(0.004 * rng.random() ** 2)
        try:
            self._patient(rng)
        except gevent.Timeout as error:
            if error is not timeout:
                raise
            self._log.count("timed out")
        finally:
            timeout.close()

    def _failing(self, rng: Random) -> None:
        def job(connection: Any) -> None:
            self._talk(connection)
            raise Lapse

        try:
            self._lend(self._plan.patience, job)
        except PoolExhaustedError:
            self._log.count("turned away by max_waiting")

    def _dropping(self, rng: Random) -> None:
        def job(connection: Any) -> None:
            self._talk(connection)
            pool.drop(connection)
            self._log.count("dropped by its borrower")

        pool = self.pool
        try:
            self._lend(self._plan.patience, job)
        except ConnectionNotFoundError:
            self._log.count("dropped while it was used")
        except PoolExhaustedError:
            self._log.count("turned away by max_waiting")

    def _forgetful(self, rng: Random) -> None:
        """Ends without a release."""
        if self._make is not with_blocks:
            return

        def borrow() -> None:
            self._use(self.pool.acquire(timeout=self._plan.patience), self._talk)
            self._log.count("not given back")

        gevent.spawn(self._quietly, lambda rng: borrow(), rng).join()

    def _greedy(self, rng: Random) -> None:
        """Borrows a second one before it gives the first one back."""

        def job(connection: Any) -> None:
            self._talk(connection)
            self._lend(0.02, self._talk)

        try:
            self._lend(self._plan.patience, job)
        except PoolExhaustedError:
            self._log.count("got no second one, or was turned away")

    # What happens

    def _incidents(self) -> dict[Callable[[], None], int]:
        return {
            self._restart: 8,
            self._reset_some: 2,
            self._half_close_some: 2,
            self._slow_handshakes: 1,
            self._no_handshakes: 1,
            self._drop_any: 2,
            self._clear: 1,
            self._resize: 1,
            self._squeeze: 1,
            self._pause: 1,
            self._deploy: 1,
        }

    def _expect_incident(self) -> None:
        self._due.clear()
        self._next = self.borrowed + self._rng.expovariate(1 / BETWEEN_INCIDENTS)

    def _trouble(self) -> None:
        while self.borrowed < self._goal:
            self._due.wait()
            if self.borrowed >= self._goal:
                return
            if not self._deck:  # shuffled, so that each has its turn
                self._deck = [method for method, times in self._incidents().items() for _ in range(times)]
                self._rng.shuffle(self._deck)
            incident = self._deck.pop()
            incident()
            self._log.count(incident.__name__[1:].replace("_", " "))
            self._log.faults(self.name, self.pool)
            self._log.longest("anybody held a connection", max((h.held or 0 for h in self.pool.holders()), default=0))
            self._expect_incident()

    def _restart(self) -> None:
        self.service.restart(self._rng.random() < 0.5, 0.01 * self._rng.random())
        began = time.monotonic()
        while True:
            try:
                self._lend(self._plan.patience, self._talk)
                break
            except (OSError, PoolExhaustedError) as error:
                if time.monotonic() - began > self._plan.patience:
                    raise StuckError(f"{self.name}: no service {self._plan.patience:g} s after a restart") from error
                gevent.sleep(0.001)
        self._log.longest("service back after a restart", time.monotonic() - began)

    def _reset_some(self) -> None:
        self.service.reset_some()

    def _half_close_some(self) -> None:
        self.service.half_close_some()

    def _slow_handshakes(self) -> None:
        self.service.patience = 0.05
        gevent.sleep(0.05)
        self.service.patience = 0.0

    def _no_handshakes(self) -> None:
        self.service.refuses = True
        gevent.sleep(0.02)
        self.service.refuses = False

    def _drop_any(self) -> None:
        """Drop one, whoever has it."""
        for member in self._rng.sample([*self.pool._members.values()], min(1, self.pool.size)):
            self.pool.drop(member.connection)

    def _clear(self) -> None:
        self.pool.clear()

    def _resize(self) -> None:
        self.pool.resize(self._rng.randint(READY, CAP - 1))
        gevent.sleep(0.02)
        self.pool.resize(CAP)

    def _squeeze(self) -> None:
        """Others have a larger share of what there is for all."""
        if self.pool._budget is not None:
            self.pool._budget.resize(READY)
            gevent.sleep(0.02)
            self.pool._budget.resize(CAP)

    def _pause(self) -> None:
        self.pool.pause()
        gevent.sleep(0.01 * self._rng.random())
        self.pool.resume()

    def _deploy(self) -> None:
        """A new pool in place of the old one, which may finish what it is at for a moment."""
        self.pool.close(timeout=0.05)
        self._log.faults(self.name, self.pool)
        self._leave()
        self.pool = self._make(self._kind, self.service.port)
        self.pool.wait_ready(self._plan.patience)

    # By night

    def full_house(self) -> None:
        """Lend all that there may be, at once: no slot is lost."""
        try:
            connections = [self.pool.acquire(timeout=self._plan.patience) for _ in range(CAP)]
        except (OSError, PoolExhaustedError) as error:
            raise StuckError(f"{self.name}: not as many served at once as there are slots: {error}") from error
        for connection in connections:
            try:
                self._talk(connection)
            except OSError:  # the server hung up on it a moment ago
                self.pool.drop(connection)
            else:
                self.pool.release(connection)
        self._log.count("served at once by night", CAP)

    def forget(self) -> None:
        """Refer to the pool no more, and make another one."""
        gc.collect()  # borrowers that were interrupted, and their tracebacks
        forgotten = weakref.ref(self.pool)
        self._leave()
        del self.pool
        try:
            self.service.wait_open(0, self._plan.patience)
            if (pool := forgotten()) is not None and not pool.closed:
                self._log.fail(f"{self.name}: something still refers to {pool!r}")
            del pool
        finally:
            self.pool = self._make(self._kind, self.service.port)

    def disturb(self) -> None:
        """Have the server hang up on connections that nobody uses: the pool is to replace them by itself."""
        match self._rng.randrange(3):
            case 0:
                self.service.reset_some()
            case 1:
                self.service.half_close_some()
            case 2:
                self.service.restart(True, 0.1)
                self._log.count("restart by night")

    def rests(self) -> bool:
        """Whether nothing is under way, and no more is open than what is kept ready."""
        pool = self.pool
        return (
            pool.size == pool.idle == READY
            and pool.total == pool.size == self.service.open == self.service.handlers
            and not pool.waiting
        )

    def __str__(self) -> str:
        return f"{self.pool!r}, {self.pool.total - self.pool.size} being opened or closed, {self.service.open} sockets"


#: What borrowers do, and how often.
ACTS: Final[tuple[tuple[Callable[[Site, Random], None], float], ...]] = (
    (Site._patient, 80),
    (Site._impatient, 8),
    (Site._killed, 5),
    (Site._timed_out, 4),
    (Site._failing, 1),
    (Site._greedy, 1),
    (Site._dropping, 0.5),
    (Site._forgetful, 0.5),
)

#: How many borrowings, on average.
BETWEEN_INCIDENTS: Final = 150


# What is found


class Log(logging.Handler):
    """Counts what happens, and takes down what must not."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        self.longest_times: dict[str, float] = {}
        self.failures: list[str] = []

    def count(self, what: str, times: int = 1) -> None:
        self.counts[what] += times

    def longest(self, what: str, seconds: float) -> None:
        self.longest_times[what] = max(seconds, self.longest_times.get(what, 0))

    def fail(self, what: str, error: BaseException | None = None) -> None:
        self.counts["failures"] += 1
        if len(self.failures) < MOST_FAILURES:
            details = "".join(traceback.format_exception(error)) if error is not None else ""
            self.failures.append(f"{what}\n{details}".rstrip())

    def faults(self, name: str, pool: Pool[Any]) -> None:
        for fault in (*pool.faults(), *(pool._budget.faults() if pool._budget is not None else [])):
            self.fail(f"{name}: {fault}: {pool!r}")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        for pattern, name in LOGGED.items():
            if re.search(pattern, message):
                return self.count(f"logged: {name}")
        self.fail(f"logged: {record.levelname}: {message}")

    def handle_error(
        self,
        context: object,
        type: type[BaseException] | None,
        value: BaseException | str | None,
        tb: TracebackType | None,
    ) -> None:
        """In place of the hub's own, which would print it."""
        hub = gevent.get_hub()
        kind, error, tb = hub._normalize_exception(type, value, tb)  # type: ignore[attr-defined]
        if context is None or issubclass(kind, hub.SYSTEM_ERROR):
            hub.handle_system_error(kind, error, tb)
        elif not issubclass(kind, hub.NOT_ERROR):
            self.fail(f"{context!r} died", error)

    @contextmanager
    def listening(self) -> Iterator[None]:
        hub = gevent.get_hub()
        logger = logging.getLogger("gsocketpool")
        before = logger.propagate, logger.handlers, vars(hub).get("handle_error")
        logger.propagate, logger.handlers = False, [self]
        hub.handle_error = self.handle_error  # type: ignore[method-assign]
        try:
            yield
        finally:
            logger.propagate, logger.handlers, handle_error = before
            del hub.handle_error
            if handle_error is not None:
                hub.handle_error = handle_error  # type: ignore[method-assign]


MOST_FAILURES: Final = 20

#: What a pool may well log here.
LOGGED: Final = {
    "a dial failed that nobody waits for": "a dial that nobody waits for failed",
    r"a dial for min_idle=\d failed": "a dial for min_idle failed",
    r"reset\(\) failed": "a reset failed",
    r"keepalive\(\) failed": "a keepalive failed",
    "longer than leak_threshold": "held for long",
    "for so long came back": "came back after long",
    "ended without releasing": "taken back",
}


def sample() -> tuple[dict[str, int], Counter[type]]:
    """Count what the process holds, and of which types; nothing else runs meanwhile."""
    gc.collect()
    gc.collect()
    process = psutil.Process()
    found = gc.get_objects()
    watcher: Any = type(gevent.get_hub().loop.timer(0)).__mro__[1]
    figures = {
        "descriptors": process.num_fds(),
        "greenlets": sum(issubclass(type(o), greenlet.greenlet) and bool(o) for o in found),
        "members": sum(type(o) is Member for o in found),
        "places": sum(type(o) is Place for o in found),
        "timers, watchers": sum(issubclass(type(o), watcher) for o in found),
        "sockets": sum(issubclass(type(o), (Caller, gevent.socket.socket)) for o in found),
        "objects": len(found),
        "memory blocks": sys.getallocatedblocks(),
        "resident KiB": process.memory_info().rss // 1024,
    }
    return figures, Counter(map(type, found))


#: Of all borrowers, so large a share must get their reply, with all that happens.
LEAST_RIGHT: Final = 0.9

#: By how much the median of the last quarter may lie above that of the second one.
MAY_GROW: Final = {
    "descriptors": 0,
    "greenlets": 0,
    "members": 0,
    "places": 0,
    "timers, watchers": CAP,  # an idle connection has one from its first tick on, before the count or after
    "sockets": CAP,  # some are closed, and still known to a greenlet that is about to end
    "objects": 100,
    "memory blocks": 500,
    "resident KiB": 4096,
}


#: What there must not be more of in the end than in the beginning; the others keep what was imported and learnt.
COUNTED: Final = ("descriptors", "greenlets", "members", "places", "timers, watchers", "sockets")


@dataclass
class Trend:
    """One figure through the month: its medians by the quarter."""

    name: str
    quarters: list[float]
    may_grow: float

    @property
    def growth(self) -> float:
        return self.quarters[3] - self.quarters[1]

    @property
    def grows(self) -> bool:
        return self.growth > self.may_grow


def trends(samples: list[dict[str, int]]) -> list[Trend]:
    """Compare the last quarter with the second one: the first one is for warming up."""
    size = len(samples) / 4
    quarters = [samples[round(i * size) : round((i + 1) * size)] for i in range(4)]
    return [
        Trend(name, [statistics.median(s[name] for s in quarter) for quarter in quarters], may_grow)
        for name, may_grow in MAY_GROW.items()
    ]


# The month


@dataclass
class Report:
    """What came of it."""

    plan: Plan
    seconds: float = 0.0
    borrowed: int = 0
    accepted: int = 0
    most_sockets: int = 0
    samples: list[dict[str, int]] = field(default_factory=list)
    halfway: Counter[type] = field(default_factory=Counter)  # objects by their types
    finally_: Counter[type] = field(default_factory=Counter)
    log: Log = field(default_factory=Log)

    @property
    def failures(self) -> list[str]:
        return self.log.failures

    def note(self, figures: dict[str, int], types: Counter[type]) -> None:
        """Take down what was counted in a night."""
        self.samples.append(figures)
        if len(self.samples) * 2 <= self.plan.days:
            self.halfway = types
        self.finally_ = types

    def grown_types(self) -> str:
        """Of which types there are more in the end than halfway."""
        growth = (self.finally_ - self.halfway).most_common(8)
        return ", ".join(f"{number} {kind.__module__}.{kind.__qualname__}" for kind, number in growth) or "none"


class Soak:
    """Plays the plan.

    :param kind: the class of the pools; a test gives one that leaks.
    """

    def __init__(self, plan: Plan, kind: type[Pool[Any]] = Pool) -> None:
        self.report = Report(plan)
        self._rng = Random(plan.seed)
        log = self.report.log
        self._running: list[gevent.Greenlet[..., None]] = []
        self._sites = [Site(make, kind, plan, log, Random(self._rng.random())) for make in SITES]

    def run(self, every_day: Callable[[Report, int], None] = lambda report, day: None) -> Report:
        """Play all of it.

        :param every_day: called after each night.
        """
        plan, report, log = self.report.plan, self.report, self.report.log
        began = time.monotonic()
        gevent.sleep(0.001)  # starts the hub
        traceback.format_stack()  # reads the sources, as the first report of a leak will do
        before, _ = sample()
        with log.listening():
            try:
                with self._sites[0], self._sites[1], self._sites[2]:
                    for day in range(plan.days):
                        self._day()
                        self._night()
                        report.seconds = time.monotonic() - began
                        every_day(report, day + 1)
                self._settle(before)
            except (StuckError, PoolError, OSError, AssertionError) as error:
                log.fail("it had to be broken off", error)
            finally:
                gevent.killall(self._running)
        report.seconds = time.monotonic() - began
        if log.counts["right"] < report.borrowed * LEAST_RIGHT:
            log.fail(f"of {report.borrowed:,} borrowers only {log.counts['right']:,} got a reply")
        if len(report.samples) == plan.days:
            for trend in trends(report.samples):
                if trend.grows:
                    log.fail(
                        f"{trend.name} grew by {trend.growth:g} from the second quarter to the last one, more than "
                        f"{trend.may_grow:g}; types that grew: {report.grown_types()}"
                    )
        return report

    def _day(self) -> None:
        plan, report = self.report.plan, self.report
        share = plan.borrowings // plan.days // len(self._sites)
        self._running = [g for site in self._sites for g in site.day(share)]
        latest, moved = -1, time.monotonic()
        while self._running:
            gevent.joinall(self._running, timeout=0.2)
            self._running = [g for g in self._running if not g.dead]
            report.borrowed = sum(site.borrowed for site in self._sites)
            report.most_sockets = max(site.service.most for site in self._sites)
            for site in self._sites:
                report.log.faults(site.name, site.pool)
            if report.borrowed != latest:
                latest, moved = report.borrowed, time.monotonic()
            elif time.monotonic() - moved > 2 * plan.patience:
                stacks = "\n".join("".join(traceback.format_stack(g.gr_frame, 3)) for g in self._running[:8])
                raise StuckError(f"nothing happens: {'; '.join(map(str, self._sites))}\n{stacks}")
        if report.most_sockets > CAP:
            report.log.fail(f"a server saw {report.most_sockets} sockets at once, and the cap is {CAP}")

    def _night(self) -> None:
        plan = self.report.plan
        for site in self._sites:
            site.full_house()
            if self._rng.random() < 0.2:
                site.forget()
                self.report.log.count("a pool forgotten")
            site.disturb()
        gevent.sleep(0.3)  # idle long enough to be kept alive, or to go
        deadline = time.monotonic() + plan.patience
        while not all(site.rests() for site in self._sites):
            if time.monotonic() > deadline:
                raise StuckError(f"it does not come to rest: {'; '.join(map(str, self._sites))}")
            gevent.sleep(0.005)
        self.report.note(*sample())

    def _settle(self, before: dict[str, int]) -> None:
        """See that nothing is left of it."""
        plan, report = self.report.plan, self.report
        report.accepted = sum(site.service.accepted for site in self._sites)
        self._sites.clear()
        deadline = time.monotonic() + plan.patience
        while left := [name for name, number in sample()[0].items() if name in COUNTED and number > before[name]]:
            if time.monotonic() > deadline:
                report.log.fail(f"in the end there are more {', more '.join(left)} than before")
                break
            gevent.sleep(0.05)


# The command line


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--borrowings", type=click.IntRange(min=1000), default=Plan.borrowings, show_default=True, help="In all.")
@click.option("--days", type=click.IntRange(min=4), default=Plan.days, show_default=True, help="Counted after each.")
@click.option("--workers", type=click.IntRange(min=2), default=Plan.workers, show_default=True, help="For each pool.")
@click.option("--seed", type=int, default=Plan.seed, show_default=True, help="Decides what happens.")
def main(borrowings: int, days: int, workers: int, seed: int) -> None:
    """A month of a service in a few minutes. The exit status is 1 if anything grew, broke, or got lost."""
    plan = Plan(borrowings, days, workers, seed)
    console = Console(highlight=False)
    console.print(
        f"{plan.borrowings:,} borrowings in {plan.days} days from {len(SITES)} pools of {CAP} connections, "
        f"{plan.workers} borrowers at a time each (seed {plan.seed})"
    )
    report = watch(Soak(plan), console)
    console.print(*tables(report), sep="\n")
    for failure in report.failures:
        console.print("FAILED:", failure, style="bold red", markup=False, soft_wrap=True)
    if report.failures:
        sys.exit(1)


def watch(soak: Soak, console: Console) -> Report:
    plan = soak.report.plan
    with Progress(
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,  # not from rich's thread
        transient=True,
    ) as progress:
        task = progress.add_task("", total=plan.days)

        def every_day(report: Report, day: int) -> None:
            rate = report.borrowed / report.seconds
            text = f"day {day}: {report.borrowed:,} borrowings, {rate:,.0f} a second, {len(report.failures)} failures"
            progress.update(task, completed=day, description=text, refresh=True)
            if not console.is_terminal and day % 5 == 0:
                console.print(f"{text}, {report.samples[-1]}", soft_wrap=True)

        return soak.run(every_day)


def tables(report: Report) -> list[Table]:
    counts = Table(box=None, padding=(0, 2, 0, 0))
    counts.add_column("what happened")
    counts.add_column("how often", justify="right")
    log = report.log
    rows = {
        "seconds that it took": f"{report.seconds:.1f}",
        "borrowings": f"{report.borrowed:,}",
        "connections that the servers accepted": f"{report.accepted:,}",
        "most sockets that a server saw": f"{report.most_sockets}, of at most {CAP}",
        **{name: f"{number:,}" for name, number in sorted(log.counts.items())},
        **{f"longest: {name}": f"{seconds * 1000:.0f} ms" for name, seconds in log.longest_times.items()},
    }
    for row in rows.items():
        counts.add_row(*row)
    if len(report.samples) < report.plan.days:
        return [counts]
    found = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("median by night", "1st quarter", "2nd", "3rd", "4th", "may grow by"):
        found.add_column(title, justify="left" if title == "median by night" else "right")
    for trend in trends(report.samples):
        style = "bold red" if trend.grows else None
        found.add_row(trend.name, *(f"{q:,g}" for q in trend.quarters), f"{trend.may_grow:,g}", style=style)
    return [counts, found]


if __name__ == "__main__":
    main(prog_name="python -m tests.soak")

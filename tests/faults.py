"""What a server or the network does to a pool, at each stage of a connection's life: the cells of a matrix.

`measure` plays one cell: it brings borrowers to a phase, lets the fault strike, counts who fails, heals what is left
to heal, and looks whether anything was lost. That a phase has been reached is seen by the pool, by the proxy or by the
server itself; nothing here sleeps and hopes. What should come out of each cell, and why, is in `expected`.

It runs in a monkey-patched process as well as in any other, and knows servers by a `Service` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, TypeAlias

import gevent
import psutil
from gevent.event import Event

from gsocketpool import Pool, PoolError
from gsocketpool.retrying import retry
from tests.proxy import Proxy

#: Seconds for whatever should happen soon.
BOUND: Final = 20.0

#: Seconds that an impatient borrower allows for something that cannot happen while the fault lasts.
IMPATIENCE: Final = 0.15

#: Connections of the pool, and borrowers that are counted.
SIZE: Final = 4

KILL, STOP, RESTART = "kill -9", "SIGSTOP, then SIGCONT", "restart"
REFUSE, BLACK_HOLE, RESET, HALF_CLOSE = "refuse", "black hole", "reset", "half-close"
SLOW, TRUNCATE = "slow handshake", "truncated reply"
FAULTS: Final = (KILL, STOP, RESTART, REFUSE, BLACK_HOLE, RESET, HALF_CLOSE, SLOW, TRUNCATE)
#: After these the connections that were open, or being opened, are of no use.
BREAKS: Final = (KILL, RESTART, RESET, HALF_CLOSE, TRUNCATE)

IDLE, WAITING, DIALLING = "idle", "waiting", "dialling"
MID_REQUEST, RELEASING, HANDING_ON = "mid-request", "releasing", "handing on"
PHASES: Final = (IDLE, WAITING, DIALLING, MID_REQUEST, RELEASING, HANDING_ON)


# What should come out


@dataclass(frozen=True)
class Dash:
    """This cell makes no sense."""

    why: str


@dataclass(frozen=True)
class Outcome:
    """So many of `SIZE` requests failed, with an error of this class."""

    failed: int
    error: str = ""
    why: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.failed} of {SIZE}" + (f": {self.error}" if self.failed else "")


UNDER_WAY = (
    "The request was under way on a connection that broke. Whether the server has done what it was asked nobody can "
    "know, so this error has to reach who asked."
)
NO_DIAL = "The dial that was made for this borrower failed, and the borrower learns so at once."
DEADLINE_IN_REQUEST = (
    "The deadline ended while the server was silent. The connection is closed, so a reply that comes late reaches "
    "nobody. Borrowers without a deadline get their own replies when the silence ends."
)
DEADLINE_IN_ACQUIRE = (
    "The deadline of ``acquire`` ended. If a dial was under way for this borrower it goes on, and what it opens is the "
    "next one's."
)
DEADLINE_IN_RESET = (
    "The reply had come. The deadline ended while ``reset()`` waited for the server: that is part of leaving the block."
)
SILENT = (
    "Nothing tells a connection that has gone silent from one that is idle: it was lent, and the deadline ended the "
    "request. The connection is closed."
)
HANDED_ON = (
    "The connection broke when its borrower had its reply, and went straight from that borrower to this one, without a "
    "check. A ``reset()`` that talks to the server finds out: see PostgreSQL."
)


@dataclass(frozen=True)
class Traits:
    """What differs from server to server in what should come out.

    :param broken: what a request raises when its connection breaks.
    :param broken_dial: what a dial raises then.
    :param refused: what a dial raises when nobody listens.
    :param always_resets: whether the pool resets connections in every cell, and not in the phase of releasing alone.
    """

    name: str
    broken: str = "ConnectionError"
    broken_dial: str = "ConnectionError"
    refused: str = "ConnectionRefusedError"
    always_resets: bool = False


VALKEY: Final = Traits("Valkey")
# psycopg has one class for all that befalls a connection. It opens a transaction by itself, so reset() rolls it back.
POSTGRES: Final = Traits("PostgreSQL", "OperationalError", "OperationalError", "OperationalError", always_resets=True)
# The dials are TLS's, whose end of the stream is an ssl.SSLEOFError; whether it is that or a reset is a matter of luck.
NGINX: Final = Traits("nginx", broken_dial="OSError")
SERVERS: Final = (VALKEY, POSTGRES, NGINX)


def expected(traits: Traits, fault: str, phase: str, retrying: bool = False) -> Outcome | Dash:
    """What must come out of a cell."""
    if fault == SLOW and phase not in (WAITING, DIALLING):
        return Dash("A connection that is open has its handshake behind it.")
    if fault == TRUNCATE and phase in (IDLE, HANDING_ON):
        return Dash("No reply is on its way.")
    if retrying or (fault == REFUSE and phase != DIALLING):
        return Outcome(0)
    if fault == REFUSE:
        return Outcome(SIZE, traits.refused, NO_DIAL)
    if fault in BREAKS:
        if phase == DIALLING:
            return Outcome(SIZE, traits.broken_dial, NO_DIAL)
        if phase == MID_REQUEST:
            return Outcome(SIZE, traits.broken, UNDER_WAY)
        if phase == HANDING_ON and not traits.always_resets:
            return Outcome(SIZE, traits.broken, HANDED_ON)
        return Outcome(0)
    if fault == SLOW:
        return Outcome(SIZE // 2, "PoolExhaustedError", DEADLINE_IN_ACQUIRE) if phase == DIALLING else Outcome(0)
    failed = SIZE if fault == BLACK_HOLE else SIZE // 2
    if phase in (WAITING, DIALLING):
        return Outcome(failed, "PoolExhaustedError", DEADLINE_IN_ACQUIRE)
    if phase == RELEASING:
        return Outcome(failed, "Timeout", DEADLINE_IN_RESET)
    return Outcome(failed, "Timeout", DEADLINE_IN_REQUEST if phase == MID_REQUEST else SILENT)


def expected_warnings(traits: Traits, fault: str, phase: str) -> int:
    """How often the pool must have logged that a ``reset()`` failed; it has nothing else to complain of."""
    resets = phase == RELEASING or (phase == HANDING_ON and traits.always_resets)
    return SIZE if resets and fault in BREAKS else 0


# The parts


class Process(Protocol):
    """A server process, as `tests.peers` has them."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    def kill(self) -> None: ...
    def start(self) -> None: ...
    def restart(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def connections(self) -> int: ...


class Service:
    """One kind of server, and what its clients say to it.

    Two requests: `ask` is answered at once; `hold` is answered when `let_go` has been called since `arm`. The answer to
    either is its token.

    :param server: the process.
    """

    traits: ClassVar[Traits]
    #: What a request or a dial may raise.
    errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, server: Process) -> None:
        self.server = server

    def port(self, tls: bool) -> int:
        """The server's port."""
        return self.server.port

    def pool(self, port: int, tls: bool, reset: Callable[[Any], None] | None, **options: Any) -> Pool[Any]:
        """A pool of connections to a port of the server's, or of the proxy's.

        :param tls: whether they begin with a handshake, where the protocol has none of its own.
        :param reset: does a round trip when a connection is given back; None: the service's own way.
        """
        raise NotImplementedError

    def ask(self, conn: Any, token: str) -> str:
        raise NotImplementedError

    def hold(self, conn: Any, token: str) -> str:
        raise NotImplementedError

    def alive(self, conn: Any) -> bool:
        """What the pool's check says of it."""
        raise NotImplementedError

    def arm(self) -> None:
        raise NotImplementedError

    def let_go(self) -> None:
        raise NotImplementedError

    def held(self) -> int:
        """How many requests the server holds."""
        raise NotImplementedError

    def is_at_rest(self) -> bool:
        """Whether nothing of a cell is left over on this side."""
        return True


def until(what: str, happened: Callable[[], bool]) -> None:
    """Wait until something has happened, and let everybody else run meanwhile."""
    with gevent.Timeout(BOUND, AssertionError(f"{what}: it has not come to that in {BOUND:g} s")):
        while not happened():
            gevent.sleep(0.001)


def kind_of(error: BaseException, traits: Traits, phase: str) -> str:
    """The class of an error, as the table names it: no finer than what does not depend on luck."""
    names = [kind.__name__ for kind in type(error).__mro__]
    broken = traits.broken_dial if phase == DIALLING else traits.broken
    return next(name for name in ("Timeout", "PoolExhaustedError", traits.refused, broken, names[0]) if name in names)


Borrower: TypeAlias = "gevent.Greenlet[[str, int], None]"


class Scene:
    """One cell: a pool before a server, its borrowers, and the fault."""

    def __init__(self, service: Service, fault: str, phase: str, retrying: bool) -> None:
        self.service = service
        self.fault = fault
        self.phase = phase
        self.retrying = retrying
        self.wrong: list[tuple[str, str]] = []
        self.right = 0
        self.borrowers: dict[Borrower, BaseException | None] = {}
        self.failures: tuple[type[BaseException], ...] = (*service.errors, PoolError, gevent.Timeout)
        self.proxy: Proxy
        self.pool: Pool[Any]

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        service, own = self.service, self.fault in (KILL, STOP, RESTART)
        tls = self.phase == DIALLING or self.fault in (SLOW, BLACK_HOLE)
        with Proxy(service.server.host, service.port(tls)) as self.proxy:
            # What the server's own process can do to its clients it does to them directly; but a dial stands still
            # halfway in the proxy only.
            self.direct = own and self.phase != DIALLING
            self.pool = service.pool(
                service.port(tls) if self.direct else self.proxy.port,
                tls,
                self.reset if self.phase == RELEASING else None,
                max_connections=SIZE,
                acquire_timeout=BOUND,
                check_after_idle=0,
            )
            try:
                with self.pool:
                    yield
            except BaseException:
                # The next cell is to find nothing of this one.
                gevent.killall(list(self.borrowers))
                service.server.kill()
                service.server.start()
                service.let_go()
                raise
            until("the server counts no connection", lambda: service.server.connections() == 0)
            until("the proxy has none", lambda: self.proxy.open == 0)

    # Borrowers

    def reset(self, conn: Any) -> None:
        self.exchange(self.service.hold, conn, f"reset.{id(conn)}")

    def exchange(self, request: Callable[[Any, str], str], conn: Any, token: str) -> None:
        reply = request(conn, token)
        if reply == token:
            self.right += 1
        else:
            self.wrong.append((token, reply))

    def borrow(
        self,
        request: Callable[[Any, str], str],
        count: int = SIZE,
        *,
        wait: Callable[[int], float] = lambda number: BOUND,
        deadline: Callable[[int], float | None] = lambda number: None,
        then: Callable[[], object] = lambda: None,
    ) -> list[Borrower]:
        """Start borrowers, each for one request.

        :param wait: the timeout of their acquire, by number.
        :param deadline: that of all they do.
        :param then: what they do when they have had their reply, before they give the connection back.
        """

        def once(token: str, number: int) -> None:
            with gevent.Timeout(deadline(number)), self.pool.connection(timeout=wait(number)) as conn:
                self.exchange(request, conn, token)
                then()

        act = retry(exc_classes=self.service.errors, interval=0.001, max_failures=5)(once) if self.retrying else once

        def borrower(token: str, number: int) -> None:
            try:
                act(token, number)
            except self.failures as error:
                self.borrowers[gevent.getcurrent()] = error  # type: ignore[index]

        started: list[Borrower] = []
        for number in range(count):
            started.append(gevent.spawn(borrower, f"request.{len(self.borrowers)}", number))
            self.borrowers[started[-1]] = None
        return started

    def end(self, borrowers: list[Borrower]) -> list[BaseException]:
        """Wait until all have ended; answer the errors of those that failed."""
        done = gevent.joinall(borrowers, timeout=BOUND, raise_error=True)
        assert len(done) == len(borrowers), f"{len(borrowers) - len(done)} borrowers hang"
        return [error for each in borrowers if (error := self.borrowers[each]) is not None]

    def time_out(self, borrowers: list[Borrower]) -> None:
        """End what they do as a ``gevent.Timeout`` of their own would."""
        for each in borrowers:
            gevent.kill(each, gevent.Timeout())
        self.end(borrowers)

    def impatient(self, number: int) -> bool:
        """Whether a borrower has a deadline that ends before the fault does."""
        return self.fault == BLACK_HOLE or (self.fault in (STOP, SLOW) and number < SIZE // 2)

    def wait(self, number: int) -> float:
        return IMPATIENCE if self.impatient(number) else BOUND

    def deadline(self, number: int) -> float | None:
        return IMPATIENCE if self.impatient(number) else None

    def some_impatient(self, borrowers: list[Borrower]) -> list[Borrower]:
        return [each for number, each in enumerate(borrowers) if self.impatient(number)]

    # The fault

    def strike(self) -> None:
        server, proxy = self.service.server, self.proxy
        if self.direct:
            assert server.connections() <= SIZE
        if self.fault == KILL:
            server.kill()
            server.start()
        elif self.fault == RESTART:
            server.restart()
        elif self.fault == STOP:
            server.pause()
        elif self.fault == REFUSE:
            proxy.refuse()
        elif self.fault == BLACK_HOLE:
            proxy.black_hole()
        elif self.fault == RESET:
            proxy.reset("open")
        elif self.fault == HALF_CLOSE:
            proxy.half_close("open")
        elif self.fault == SLOW:
            proxy.black_hole("new")
        else:
            proxy.truncate(3, "open")

    def heal(self) -> None:
        if self.fault == STOP:
            self.service.server.resume()
        else:
            self.proxy.forward()

    def until_dead(self, connections: list[Any]) -> None:
        """What breaks connections has reached them, as far as it can be seen."""
        if self.fault in BREAKS:
            until("the connections are seen to be broken", lambda: not any(map(self.service.alive, connections)))

    # The phases. Each answers the borrowers that count, all of which have ended.

    def idle(self) -> list[Borrower]:
        seen = self.fill()
        self.strike()
        self.until_dead(seen)
        hit = self.borrow(self.service.ask, deadline=self.deadline)
        self.end(self.some_impatient(hit))
        if self.fault == REFUSE:
            self.end(hit)
        self.heal()
        self.end(hit)
        assert self.pool.stats().closed["stale"] == (SIZE if self.fault in BREAKS else 0)
        return hit

    def waiting(self) -> list[Borrower]:
        if self.fault == SLOW:
            return self.waiting_for_a_slow_dial()
        holders = self.held_requests()
        hit = self.borrow(self.service.ask, wait=self.wait)
        until("the others wait", lambda: self.pool.waiting == SIZE)
        self.strike()
        if self.fault == BLACK_HOLE:
            self.time_out(holders)
        self.end(self.some_impatient(hit))
        self.go_on([*holders, *hit])
        failed = len(self.end(holders))
        assert failed == (SIZE if self.fault in (*BREAKS, BLACK_HOLE) and not self.retrying else 0)
        return hit

    def waiting_for_a_slow_dial(self) -> list[Borrower]:
        """A waiter takes what comes first, and does not insist on the dial that was made for it."""
        holders = self.held_requests(SIZE // 2)
        self.strike()
        hit = self.borrow(self.service.ask)
        until("dials are under way", lambda: self.proxy.heard == SIZE)
        assert self.pool.waiting == SIZE
        self.service.let_go()
        assert self.end([*holders, *hit]) == []
        assert self.pool.stats().opening == SIZE // 2
        self.heal()
        return hit

    def dialling(self) -> list[Borrower]:
        early = self.fault in (STOP, REFUSE, BLACK_HOLE, SLOW)  # what makes a dial hang, or hits none that is under way
        if early:
            self.strike()
        else:
            self.proxy.black_hole()
        hit = self.borrow(self.service.ask, wait=self.wait)
        if self.fault != REFUSE:
            until("dials are under way", lambda: self.proxy.heard == SIZE)
        if not early:
            self.strike()
        self.end(self.some_impatient(hit))
        if self.fault in (*BREAKS, REFUSE) and not self.retrying:
            self.end(hit)
        self.proxy.forward()
        self.heal()
        self.end(hit)
        until("all dials have ended", lambda: self.pool.stats().opening == 0)
        if self.fault in (STOP, SLOW, BLACK_HOLE):
            assert self.pool.stats().opened == SIZE, "what was dialled for the impatient was lost"
        return hit

    def mid_request(self) -> list[Borrower]:
        hit = self.held_requests()
        self.strike()
        self.time_out(self.some_impatient(hit))
        self.go_on(hit)
        return hit

    def releasing(self) -> list[Borrower]:
        self.service.arm()
        hit = self.borrow(self.service.ask)
        until("resets are under way", lambda: self.service.held() == SIZE)
        assert self.right == SIZE
        self.strike()
        self.time_out(self.some_impatient(hit))
        self.go_on(hit)
        return hit

    def handing_on(self) -> list[Borrower]:
        done = Event()
        seen = self.fill()
        holders = self.borrow(self.service.ask, then=done.wait)
        until("the first have their replies", lambda: self.right == 2 * SIZE)
        hit = self.borrow(self.service.ask)
        until("the others wait", lambda: self.pool.waiting == SIZE)
        self.strike()
        self.until_dead(seen)
        done.set()
        if not self.service.traits.always_resets:
            assert self.end(holders) == []
        self.time_out(self.some_impatient(hit))
        if self.fault == BLACK_HOLE and self.service.traits.always_resets:
            self.time_out(holders)
        self.go_on([*holders, *hit])
        return hit

    def held_requests(self, count: int = SIZE) -> list[Borrower]:
        self.service.arm()
        borrowers = self.borrow(self.service.hold, count)
        until("requests are under way", lambda: self.service.held() == count)
        return borrowers

    def go_on(self, borrowers: list[Borrower]) -> None:
        """The server answers what it held, the fault ends, and so do they."""
        if self.fault in (STOP, BLACK_HOLE):
            self.heal()
        self.service.let_go()
        self.end(borrowers)
        self.heal()

    # Whether anything was lost

    def fill(self) -> list[Any]:
        """As many borrowers as there may be connections, all at once, each with its own reply; answer what they had."""
        everyone = Event()
        seen: list[Any] = []

        def request(conn: Any, token: str) -> str:
            seen.append(conn)
            if len(seen) == SIZE:
                everyone.set()
            assert everyone.wait(BOUND), "the pool does not serve as many as it should at once"
            return self.service.ask(conn, token)

        assert self.end(self.borrow(request)) == []
        assert len(set(map(id, seen))) == SIZE
        return seen

    def look_for_losses(self) -> None:
        self.fill()
        stats = self.pool.stats()
        assert (stats.size, stats.idle, stats.in_use, stats.opening, stats.waiting) == (SIZE, SIZE, 0, 0, 0), stats
        assert self.pool.faults() == []
        assert self.wrong == []
        until("the server counts what the pool has", lambda: self.service.server.connections() == SIZE)
        if not self.direct:
            assert self.proxy.most <= SIZE


def measure(service: Service, fault: str, phase: str, retrying: bool = False) -> Outcome:
    """Play a cell; an AssertionError says what was lost. Answers how many failed.

    :param retrying: whether the borrowers use :func:`gsocketpool.retry`.
    """
    scene = Scene(service, fault, phase, retrying)
    before = psutil.Process().num_fds()
    with scene.set_up():
        hit = getattr(scene, phase.replace("-", "_").replace(" ", "_"))()
        errors = scene.end(hit)
        assert len(hit) == SIZE
        scene.look_for_losses()
    kinds = sorted({kind_of(error, service.traits, phase) for error in errors})
    assert len(kinds) <= 1, errors
    outcome = Outcome(len(errors), *kinds)
    # An error knows the frames that it went through, and these know the cell.
    del errors, hit
    scene.borrowers.clear()
    until("nothing is left over", service.is_at_rest)
    until("all descriptors are closed", lambda: psutil.Process().num_fds() == before)
    return outcome

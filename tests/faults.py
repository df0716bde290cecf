"""What a server or the network does to a pool, at each stage of a connection's life: the cells of a matrix.

`measure` plays one cell: it brings borrowers to a phase, lets the fault strike, counts who fails, heals what is left
to heal, and looks whether anything was lost. That a phase has been reached is seen by the pool, by the proxy or by the
server itself; nothing here sleeps and hopes. What should come out of each cell, and why, is in `expected`.

It is written for all runtimes, runs in a monkey-patched process as well as in any other, and knows servers by a
`Service` alone.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, TypeAlias

import psutil

from tests.conformance.harness import Asyncio, Blocking, Runtime, Task, Threads, do, drive, within
from tests.conformance.proxy import Proxy
from tests.conformance.services import BOUND, Meanwhile, Service, nothing

#: Seconds that an impatient borrower allows for something that cannot happen while the fault lasts.
IMPATIENCE: Final = 0.05

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

NO_INTERRUPTION = (
    "Nothing can interrupt a thread, and psycopg's connections have no timeout. The borrowers get their replies when "
    "the silence ends."
)
RESET_IN_VAIN = (
    "The deadline is the connection's ``timeout``. It ends the ``reset()``, which is an error like any other there: "
    "the connection is closed, and the borrower, who has had the reply, goes on."
)


@dataclass(frozen=True)
class Traits:
    """What differs from server to server in what should come out.

    :param broken: what a request raises when its connection breaks.
    :param broken_dial: what a dial raises then.
    :param refused: what a dial raises when nobody listens.
    :param always_resets: whether the pool resets connections in every cell, and not in the phase of releasing alone.
    :param has_timeouts: whether connections have a timeout of their own.
    """

    name: str
    broken: str = "ConnectionError"
    broken_dial: str = "ConnectionError"
    refused: str = "ConnectionRefusedError"
    always_resets: bool = False
    has_timeouts: bool = True


VALKEY: Final = Traits("Valkey")
# psycopg has one class for all that befalls a connection. It opens a transaction by itself, so reset() rolls it back.
POSTGRES: Final = Traits(
    "PostgreSQL",
    "OperationalError",
    "OperationalError",
    "OperationalError",
    always_resets=True,
    has_timeouts=False,
)
# The dials are TLS's, whose end of the stream is an ssl.SSLEOFError; whether it is that or a reset is a matter of luck.
NGINX: Final = Traits("nginx", broken_dial="OSError")
SERVERS: Final = (VALKEY, POSTGRES, NGINX)


def traits_of(name: str) -> Traits:
    """A server's, by its name."""
    (traits,) = (traits for traits in SERVERS if traits.name == name)
    return traits


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


def in_runtime(name: str, traits: Traits, phase: str, outcome: Outcome) -> Outcome:
    """What comes out instead where nothing can interrupt a borrower."""
    if name != "threading" or outcome.error != "Timeout":
        return outcome
    if not traits.has_timeouts:
        return Outcome(0, why=NO_INTERRUPTION)
    return Outcome(0, why=RESET_IN_VAIN) if phase == RELEASING else outcome


def expected_warnings(name: str, traits: Traits, fault: str, phase: str) -> int:
    """How often the pool must have logged that a ``reset()`` failed; it has nothing else to complain of."""
    resets = phase == RELEASING or (phase == HANDING_ON and traits.always_resets)
    if resets and fault in BREAKS:
        return SIZE
    outcome = expected(traits, fault, phase)
    if name == "threading" and phase == RELEASING and traits.has_timeouts and isinstance(outcome, Outcome):
        return outcome.failed
    return 0


# The parts

Request: TypeAlias = Callable[[Any, str, Meanwhile], Awaitable[str]]


class Deadline:
    """``async with``: a borrower's time for all that it does, which is over after so many seconds, or when it is told.

    Where nothing can interrupt a borrower (in threads) it does nothing.

    :param seconds: None: only when it is told.
    """

    def __init__(self, rt: Runtime, seconds: float | None) -> None:
        self._rt = rt
        self._seconds = BOUND if seconds is None else seconds
        self._limit: Any = None

    async def __aenter__(self) -> None:
        if not isinstance(self._rt, Threads):
            self._limit = self._rt.limit(self._seconds)
            await self._limit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._limit is not None:
            await self._limit.__aexit__(kind, error, traceback)

    def end(self, task: Task) -> None:
        """The time of this borrower is over."""
        if isinstance(self._rt, Asyncio):
            self._limit._expire()
        elif not isinstance(self._rt, Threads):
            getattr(self._rt, self._rt.name).kill(task.native, self._rt.timed_out())

    @property
    def is_over(self) -> bool:
        """Whether it is; asyncio's can tell."""
        return self._limit is not None and self._limit._expired


def kind_of(error: BaseException, rt: Runtime, traits: Traits, phase: str) -> str:
    """The class of an error, as the table names it: no finer than what does not depend on luck."""
    names = [kind.__name__ for kind in type(error).__mro__]
    broken = traits.broken_dial if phase == DIALLING else traits.broken
    if isinstance(error, rt.timed_out) and "PoolExhaustedError" not in names:
        return "Timeout"
    return next(name for name in ("PoolExhaustedError", traits.refused, broken, names[0]) if name in names)


class Scene:
    """One cell: a pool before a server, its borrowers, and the fault."""

    def __init__(self, rt: Runtime, service: Service, fault: str, phase: str, retrying: bool) -> None:
        self.rt = rt
        self.service = service
        self.traits = traits_of(service.name)
        self.fault = fault
        self.phase = phase
        self.retrying = retrying
        self.wrong: list[tuple[str, str]] = []
        self.right: list[str] = []
        self.deadlines: dict[Task, Deadline] = {}
        self.impatient_ones: set[int] = set()  # connections whose borrowers are, in threads
        self.struck = rt.event()
        self.up = threading.Event()
        self.up.set()
        self.failures: tuple[type[BaseException], ...] = (*service.errors, rt.api.PoolError, rt.timed_out)
        self.proxy: Proxy
        self.pool: Any

    async def __aenter__(self) -> None:
        service, own = self.service, self.fault in (KILL, STOP, RESTART)
        tls = self.phase == DIALLING or self.fault in (SLOW, BLACK_HOLE)
        self.proxy = Proxy(service.server.host, service.port(tls))
        self.proxy.__enter__()
        # What the server's own process can do to its clients it does to them directly; but a dial stands still
        # halfway in the proxy only.
        self.direct = own and self.phase != DIALLING
        self.pool = service.pool(
            self.rt,
            service.port(tls) if self.direct else self.proxy.port,
            tls,
            self.until_up,
            self.reset if self.phase == RELEASING else None,
            max_connections=SIZE,
            acquire_timeout=BOUND,
            check_after_idle=0,
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                # The next cell is to find nothing of this one.
                self.up.set()
                self.struck.set()
                self.service.server.kill()
                self.service.server.start()
                self.service.let_go()
                return
            await do(self.pool.close())
            await self.until("the server counts no connection", lambda: self.service.server.connections() == 0)
            await self.until("the proxy has none", lambda: self.proxy.open == 0)
        finally:
            self.proxy.__exit__(None, None, None)

    async def until_up(self) -> None:
        """A dial waits until a server that was killed runs again. In most runtimes nobody runs in the meantime."""
        if isinstance(self.rt, Threads):
            assert self.up.wait(BOUND)

    async def until(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait until something has happened, and let everybody else run meanwhile."""
        await self.rt.until(happened, lambda: f"{what}; {self.pool!r}", BOUND)

    # Borrowers

    async def reset(self, conn: Any) -> None:
        await self.exchange(self.service.hold, conn, f"reset.{id(conn)}")

    async def exchange(self, request: Request, conn: Any, token: str) -> None:
        async def meanwhile() -> None:
            # In threads a borrower's deadline is its connection's timeout. It begins when the fault has struck.
            if id(conn) in self.impatient_ones and (request == self.service.hold or self.struck.is_set()):
                await self.struck.wait()
                self.service.limit(conn, IMPATIENCE)

        reply = await request(conn, token, meanwhile)
        if reply == token:
            self.right.append(token)
        else:
            self.wrong.append((token, reply))

    def borrow(
        self,
        request: Request,
        count: int = SIZE,
        *,
        wait: Callable[[int], float] = lambda number: BOUND,
        deadline: Callable[[int], float | None] = lambda number: None,
        hasty: Callable[[int], bool] = lambda number: False,
        then: Meanwhile = nothing,
    ) -> list[Task]:
        """Start borrowers, each for one request.

        :param wait: the timeout of their acquire, by number.
        :param deadline: that of all they do.
        :param hasty: whether their time will be over while the fault lasts, by `deadline` or by `time_out`.
        :param then: what they do when they have had their reply, before they give the connection back.
        """
        in_threads = isinstance(self.rt, Threads) and self.traits.has_timeouts

        async def once(token: str, number: int, until: Deadline) -> None:
            async with until, within(self.pool.connection(timeout=wait(number))) as conn:
                if in_threads and hasty(number):
                    self.impatient_ones.add(id(conn))
                await self.exchange(request, conn, token)
                await then()

        act = self.with_retry(once) if self.retrying else once

        async def borrower(token: str, number: int, until: Deadline) -> BaseException | None:
            try:
                await act(token, number, until)
            except self.failures as error:
                return error
            return None

        started: list[Task] = []
        for number in range(count):
            until = Deadline(self.rt, deadline(number))
            started.append(self.rt.spawn(borrower, f"request.{len(self.deadlines)}", number, until))
            self.deadlines[started[-1]] = until
        return started

    def with_retry(self, once: Callable[..., Any]) -> Callable[..., Any]:
        again = self.rt.api.retry(exc_classes=self.service.errors, interval=0.001, max_failures=5)
        if not isinstance(self.rt, Blocking):
            return again(once)  # type: ignore[no-any-return]

        def plain(*arguments: Any) -> None:
            drive(once(*arguments))

        async def act(*arguments: Any) -> None:
            tried(*arguments)

        tried = again(plain)
        return act

    async def end(self, borrowers: list[Task]) -> list[BaseException]:
        """Wait until all have ended; answer the errors of those that failed."""
        return [error for error in await self.rt.join(*borrowers) if error is not None]

    async def time_out(self, borrowers: list[Task]) -> None:
        """End what they do as a ``Timeout`` of their own would."""
        for each in borrowers:
            self.deadlines[each].end(each)
        await self.end_by_themselves(borrowers)

    async def end_by_themselves(self, borrowers: list[Task]) -> None:
        """Wait until those whose time is over have ended, if that is what they can do as long as the fault lasts."""
        if self.traits.has_timeouts or not isinstance(self.rt, (Asyncio, Threads)):
            await self.end(borrowers)
        elif isinstance(self.rt, Asyncio):
            # psycopg ends a cancelled query only when the server has answered.
            hasty = [self.deadlines[each] for each in borrowers]
            await self.until("their time is over", lambda: all(each.is_over for each in hasty))

    def impatient(self, number: int) -> bool:
        """Whether a borrower has a deadline that ends before the fault does."""
        return self.fault == BLACK_HOLE or (self.fault in (STOP, SLOW) and number < SIZE // 2)

    def wait(self, number: int) -> float:
        return IMPATIENCE if self.impatient(number) else BOUND

    def deadline(self, number: int) -> float | None:
        return IMPATIENCE if self.impatient(number) else None

    def some_impatient(self, borrowers: list[Task]) -> list[Task]:
        return [each for number, each in enumerate(borrowers) if self.impatient(number)]

    # The fault

    def strike(self) -> None:
        server, proxy = self.service.server, self.proxy
        if self.direct:
            assert server.connections() <= SIZE
        self.up.clear()
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
        self.up.set()
        self.struck.set()

    def heal(self) -> None:
        if self.fault == STOP:
            self.service.server.resume()
        else:
            self.proxy.forward()

    async def until_dead(self, connections: list[Any]) -> None:
        """What breaks connections has reached them, as far as it can be seen."""
        if self.fault in BREAKS:
            alive = self.service.alive
            await self.until("the connections are seen to be broken", lambda: not any(map(alive, connections)))

    # The phases. Each answers the borrowers that count, all of which have ended.

    async def idle(self) -> list[Task]:
        seen = await self.fill()
        self.strike()
        await self.until_dead(seen)
        hit = self.borrow(self.service.ask, deadline=self.deadline, hasty=self.impatient)
        await self.end_by_themselves(self.some_impatient(hit))
        if self.fault == REFUSE:
            await self.end(hit)
        self.heal()
        await self.end(hit)
        stale = SIZE if self.fault in BREAKS else 0
        await self.until("they are closed", lambda: self.pool.stats().closed["stale"] == stale)
        return hit

    async def waiting(self) -> list[Task]:
        if self.fault == SLOW:
            return await self.waiting_for_a_slow_dial()
        end_early = self.fault == BLACK_HOLE
        holders = await self.held_requests(hasty=lambda number: end_early)
        hit = self.borrow(self.service.ask, wait=self.wait)
        await self.until("the others wait", self.all_have_waited)
        self.strike()
        if end_early:
            await self.time_out(holders)
        await self.end(self.some_impatient(hit))
        await self.go_on([*holders, *hit])
        if end_early:
            early = Outcome(SIZE, "Timeout")
        else:
            early = Outcome(SIZE if self.fault in BREAKS and not self.retrying else 0)
        assert len(await self.end(holders)) == in_runtime(self.rt.name, self.traits, self.phase, early).failed
        return hit

    def all_have_waited(self) -> bool:
        """Whether all wait for a connection; some of the impatient may have given up before the last one came."""
        stats = self.pool.stats()
        return bool(stats.waiting + stats.exhausted == SIZE)

    async def waiting_for_a_slow_dial(self) -> list[Task]:
        """A waiter takes what comes first, and does not insist on the dial that was made for it."""
        holders = await self.held_requests(SIZE // 2)
        self.strike()
        hit = self.borrow(self.service.ask)
        await self.until("dials are under way", lambda: self.proxy.heard == self.pool.waiting == SIZE)
        self.service.let_go()
        assert await self.end([*holders, *hit]) == []
        assert self.pool.stats().opening == SIZE // 2
        self.heal()
        return hit

    async def dialling(self) -> list[Task]:
        early = self.fault in (STOP, REFUSE, BLACK_HOLE, SLOW)  # what makes a dial hang, or hits none that is under way
        if early:
            self.strike()
        else:
            self.proxy.black_hole()
        hit = self.borrow(self.service.ask, wait=self.wait)
        if self.fault != REFUSE:
            await self.until("dials are under way", lambda: self.proxy.heard == SIZE)
        if not early:
            self.strike()
        await self.end(self.some_impatient(hit))
        if self.fault in (*BREAKS, REFUSE) and not self.retrying:
            await self.end(hit)
        self.proxy.forward()
        self.heal()
        await self.end(hit)
        await self.until("all dials have ended", lambda: self.pool.stats().opening == 0)
        if self.fault in (STOP, SLOW, BLACK_HOLE):
            assert self.pool.stats().opened == SIZE, "what was dialled for the impatient was lost"
        return hit

    async def mid_request(self) -> list[Task]:
        hit = await self.held_requests(hasty=self.impatient)
        self.strike()
        await self.time_out(self.some_impatient(hit))
        await self.go_on(hit)
        return hit

    async def releasing(self) -> list[Task]:
        self.service.arm()
        hit = self.borrow(self.service.ask, hasty=self.impatient)
        await self.until("resets are under way", lambda: self.service.held() == SIZE)
        assert len(self.right) == SIZE
        self.strike()
        await self.time_out(self.some_impatient(hit))
        await self.go_on(hit)
        return hit

    async def handing_on(self) -> list[Task]:
        done = self.rt.event()
        seen = await self.fill()
        holders = self.borrow(self.service.ask, then=done.wait)
        await self.until("the first have their replies", lambda: len(self.right) == 2 * SIZE)
        # All have what they were handed before the first one fails, or its dial might serve the next.
        request = self.all_at_once([]) if self.fault in BREAKS and not self.retrying else self.service.ask
        hit = self.borrow(request, hasty=self.impatient)
        await self.until("the others wait", lambda: self.pool.waiting == SIZE)
        self.strike()
        await self.until_dead(seen)
        done.set()
        if not self.traits.always_resets:
            assert await self.end(holders) == []
        await self.time_out(self.some_impatient(hit))
        if self.fault == BLACK_HOLE and self.traits.always_resets:
            await self.time_out(holders)
        await self.go_on([*holders, *hit])
        return hit

    async def held_requests(self, count: int = SIZE, hasty: Callable[[int], bool] = lambda number: False) -> list[Task]:
        self.service.arm()
        borrowers = self.borrow(self.service.hold, count, hasty=hasty)
        await self.until("requests are under way", lambda: self.service.held() == count)
        return borrowers

    async def go_on(self, borrowers: list[Task]) -> None:
        """The server answers what it held, the fault ends, and so do they."""
        if self.fault in (STOP, BLACK_HOLE):
            self.heal()
        self.service.let_go()
        await self.end(borrowers)
        self.heal()

    # Whether anything was lost

    async def fill(self) -> list[Any]:
        """As many borrowers as there may be connections, all at once, each with its own reply; answer what they had."""
        seen: list[Any] = []
        request = self.all_at_once(seen)
        assert await self.end(self.borrow(request)) == []
        assert len(set(map(id, seen))) == SIZE
        return seen

    def all_at_once(self, seen: list[Any]) -> Request:
        """A request that each makes when all have a connection; `seen` is where these go."""
        everyone = self.rt.event()

        async def request(conn: Any, token: str, meanwhile: Meanwhile) -> str:
            seen.append(conn)
            if len(seen) == SIZE:
                everyone.set()
            await everyone.wait()  # or the pool does not serve as many as it should at once
            return await self.service.ask(conn, token)

        return request

    async def look_for_losses(self) -> None:
        self.impatient_ones.clear()
        await self.fill()
        stats = self.pool.stats()
        assert (stats.size, stats.idle, stats.in_use, stats.opening, stats.waiting) == (SIZE, SIZE, 0, 0, 0), stats
        assert self.pool.faults() == []
        assert self.wrong == []
        server = self.service.server
        await self.until("the server counts what the pool has", lambda: server.connections() == SIZE)
        if not self.direct:
            # psycopg asks the server over one connection more to cancel a query, if there is a Timeout in asyncio.
            most = 1 if self.traits.has_timeouts or not isinstance(self.rt, Asyncio) else 2
            assert self.proxy.most <= SIZE * most


async def measure(rt: Runtime, service: Service, fault: str, phase: str, retrying: bool = False) -> Outcome:
    """Play a cell; an AssertionError says what was lost. Answers how many failed.

    :param retrying: whether the borrowers use the runtime's `retry`.
    """
    scene = Scene(rt, service, fault, phase, retrying)
    # What the runtime's pools open once and keep is open then.
    await do(rt.api.Pool(rt.api.Connection).close())
    before = psutil.Process().num_fds()
    async with scene:
        hit = await getattr(scene, phase.replace("-", "_").replace(" ", "_"))()
        errors = await scene.end(hit)
        assert len(hit) == SIZE
        await scene.look_for_losses()
    kinds = sorted({kind_of(error, rt, scene.traits, phase) for error in errors})
    assert len(kinds) <= 1, errors
    outcome = Outcome(len(errors), *kinds)
    # An error knows the frames that it went through, and these know the cell.
    del errors, hit
    scene.deadlines.clear()
    for task in rt.tasks:
        task.value = None
    await scene.until("nothing is left over", service.is_at_rest)
    await scene.until("all descriptors are closed", lambda: psutil.Process().num_fds() == before)
    return outcome

"""The work behind ``python -m gsocketpool``: many greenlets, few connections, a server that counts, and some kills."""

from __future__ import annotations

import select
from collections import deque
from dataclasses import dataclass, field
from random import Random
from time import perf_counter
from types import TracebackType
from typing import Any, Final

import gevent
from gevent import getcurrent
from gevent.event import Event
from gevent.pool import Group
from gevent.server import StreamServer

from gsocketpool.connection import TcpConnection
from gsocketpool.pool import Pool

__all__ = ["Demo", "Plan", "Report"]

#: Seconds that the server takes for a reply, from ... to. So there is a middle of a request to be killed in.
THINKING: Final = (0.005, 0.015)

#: Half of the way through, so many times in a row, so many borrowers of each kind are killed.
VOLLEYS: Final = 5
VICTIMS: Final = 5
BETWEEN_VOLLEYS: Final = 0.03

#: Seconds after which something has gone wrong.
PATIENCE: Final = 30.0

#: Seconds after which a borrower who finds nobody else at work has met a slot that is lost.
LOST: Final = 5.0


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    :ivar requests: how many requests are sent and answered.
    :ivar greenlets: how many send them side by side.
    :ivar connections: the pool's ``max_connections``.
    :ivar seed: for who is killed, and for how long the server thinks.
    """

    requests: int = 4000
    greenlets: int = 200
    connections: int = 10
    seed: int = 2017


@dataclass
class Report:
    """What came of it. Durations are in seconds.

    :ivar answered: requests that got the right reply.
    :ivar wrong: replies to somebody else's request.
    :ivar errors: what else went wrong in borrowers, or in the pool.
    :ivar seconds: how long all requests took.
    :ivar latencies: of each request, from sending it to its reply.
    :ivar waits: of each request, for a connection.
    :ivar killed_working: greenlets killed between request and reply.
    :ivar killed_waiting: greenlets killed while they waited for a connection.
    :ivar opened: connections that the pool opened.
    :ivar reused: how often it lent one that had been lent before.
    :ivar most_sockets: the most sockets that the server saw at once.
    :ivar served_at_once: how many borrowers the pool served at once when all was over.
    """

    plan: Plan
    answered: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    killed_working: int = 0
    killed_waiting: int = 0
    opened: int = 0
    reused: int = 0
    most_sockets: int = 0
    served_at_once: int = 0

    @property
    def slots_lost(self) -> int:
        """Connections that the pool ought to lend at once, and could not."""
        return self.plan.connections - self.served_at_once

    def failures(self) -> list[str]:
        """What should not have happened: nothing, if the pool keeps its word."""
        plan = self.plan
        found = []
        if self.wrong:
            found.append(f"{self.wrong:,} of {plan.requests:,} requests got the reply to another one")
        if self.errors:
            others = f" (and {len(self.errors) - 1:,} errors more)" if len(self.errors) > 1 else ""
            found.append(f"{self.errors[0]}{others}")
        if self.answered != plan.requests and not (self.wrong or self.errors):
            found.append(f"only {self.answered:,} of {plan.requests:,} requests were answered")
        if self.slots_lost:
            found.append(
                f"{self.slots_lost} of {plan.connections} slots are lost: "
                f"in the end only {self.served_at_once} borrowers were served at once"
            )
        if self.most_sockets > plan.connections:
            found.append(f"the server saw {self.most_sockets} sockets at once, and the cap is {plan.connections}")
        if not self.killed_working:
            found.append("the kill hit nobody in the middle of a request, so it has shown nothing")
        return found


def quantile(values: list[float], share: float) -> float:
    """The value that so large a share of `values` does not exceed; 0 where there are none."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0


class Demo:
    """Plays the plan. A context manager: the server runs inside its block.

    ::

        with Demo(Plan()) as demo:
            while not demo.wait(0.1):
                print(demo.report.answered)
            report = demo.finish()
    """

    def __init__(self, plan: Plan) -> None:
        self.report = Report(plan)
        self._random = Random(plan.seed)
        self._todo = deque(range(plan.requests))
        self._working: dict[object, None] = {}  # sets that keep their order, so that the seed decides
        self._waiting: dict[object, None] = {}
        self._half_done = Event()
        self._borrowers = Group()
        self._server = EchoServer(Random(plan.seed))

    def __enter__(self) -> Demo:
        plan = self.report.plan
        self._server.start()
        self.pool = Pool(
            TcpConnection,
            {"host": "127.0.0.1", "port": self._server.port, "timeout": PATIENCE},
            max_connections=plan.connections,
            name="demo",
        )
        self._started = perf_counter()
        for _ in range(plan.greenlets):
            self._borrowers.spawn(self._borrow)
        self._killer = gevent.spawn(self._kill_some)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._killer.kill()
        self._borrowers.kill()
        self.pool.close()
        self._server.stop()

    def wait(self, timeout: float) -> bool:
        """Let the work go on for so many seconds; whether it is done, or has taken too long."""
        self._borrowers.join(timeout)
        self.report.seconds = perf_counter() - self._started
        return not self._borrowers or self.report.seconds > PATIENCE

    def finish(self) -> Report:
        """See what is left of the pool, and report."""
        report = self.report
        self._killer.kill()
        if self._borrowers:
            report.errors.append(f"{len(self._borrowers)} borrowers were not done after {PATIENCE:g} s")
            self._borrowers.kill()
        stats = self.pool.stats()
        report.opened = stats.opened
        report.reused = stats.acquired - stats.opened
        report.served_at_once = self._serve_all_at_once()
        report.errors += self.pool.faults()
        report.most_sockets = self._server.most
        return report

    def _borrow(self) -> None:
        """Send one request after the other, until there are no more. The request of one that is killed is still to be
        sent."""
        while self._todo:
            number = self._todo.popleft()
            try:
                self._request(number)
            except Exception as error:
                self.report.errors.append(f"{type(error).__name__}: {error}")
            except BaseException:
                self._todo.append(number)
                raise

    def _request(self, number: int) -> None:
        report, me = self.report, getcurrent()
        began = perf_counter()
        self._waiting[me] = None
        try:
            with self.pool.connection(timeout=PATIENCE) as connection:
                del self._waiting[me]
                self._working[me] = None
                sent = perf_counter()
                right = _ask(connection, b"request %d" % number)
                report.latencies.append(perf_counter() - sent)
        except gevent.GreenletExit:
            if me in self._working:
                report.killed_working += 1
            else:
                report.killed_waiting += 1
            raise
        finally:
            self._waiting.pop(me, None)
            self._working.pop(me, None)
        report.waits.append(sent - began)
        if not right:
            report.wrong += 1
            return
        report.answered += 1
        if report.answered * 2 >= report.plan.requests:
            self._half_done.set()

    def _kill_some(self) -> None:
        """Half of the way through, kill borrowers between request and reply, and others in the queue."""
        self._half_done.wait()
        for _ in range(VOLLEYS):
            victims: list[Any] = []
            for group in (self._working, self._waiting):
                victims += self._random.sample(list(group), min(VICTIMS, len(group)))
            gevent.killall(victims)
            for _ in victims:
                self._borrowers.spawn(self._borrow)
            gevent.sleep(BETWEEN_VOLLEYS)

    def _serve_all_at_once(self) -> int:
        """How many borrowers hold a connection that works at the same time, if as many come as there may be."""
        wanted = self.report.plan.connections
        holding = settled = 0
        all_settled = Event()

        def settle() -> None:
            nonlocal settled
            settled += 1
            if settled == wanted:
                all_settled.set()

        def borrow(number: int) -> None:
            nonlocal holding
            try:
                with self.pool.connection(timeout=LOST) as connection:
                    if _ask(connection, b"at once %d" % number):
                        holding += 1
                    settle()
                    all_settled.wait()  # until each of the others has one as well, or has given up
            except Exception as error:
                self.report.errors.append(f"when all was over, {type(error).__name__}: {error}")
                settle()

        borrowers = [gevent.spawn(borrow, number) for number in range(wanted)]
        gevent.joinall(borrowers, PATIENCE)
        gevent.killall(borrowers)
        return holding


def _ask(connection: TcpConnection, line: bytes) -> bool:
    """Whether the reply is the one to this request."""
    connection.send(line + b"\n")
    return connection.recv_until(b"\n") == line


class EchoServer:
    """Sends each line back after some thinking, and counts the sockets that clients have open.

    Where a client has closed its end, the kernel knows so at once, and this server perhaps a little later: so the
    kernel is asked.
    """

    def __init__(self, random: Random) -> None:
        self.most = 0
        self._random = random
        self._open = 0
        self._hung_up = select.poll()
        self._server = StreamServer(("127.0.0.1", 0), self._serve)

    def start(self) -> None:
        """Listen."""
        self._server.start()

    def stop(self) -> None:
        """Stop listening, and hang up."""
        self._server.stop()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._server.socket.getsockname()[1]
        return port

    def _serve(self, sock: Any, address: object) -> None:
        self._open += 1
        self._hung_up.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))  # POLLHUP comes unasked
        self.most = max(self.most, self._open - len(self._hung_up.poll(0)))
        try:
            rest = b""
            while data := sock.recv(8192):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    gevent.sleep(self._random.uniform(*THINKING))
                    sock.sendall(line + b"\n")
        except OSError:
            pass  # the client is gone: killed, most likely
        finally:
            self._hung_up.unregister(sock.fileno())
            self._open -= 1

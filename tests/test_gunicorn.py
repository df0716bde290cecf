"""gunicorn with gevent workers whose requests borrow connections, under load: a worker is killed, all are replaced by a
reload, and in the end they are told to stop.

The application and its settings are the examples'. The server behind it notes which process has used which connection.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import gevent
import pytest

from gsocketpool import TcpConnection

from .conformance.server import EchoServer
from .peers import PATIENCE, Peer, _lives, _tell_guard

ROOT = Path(__file__).parent.parent

#: As in the examples.
WORKERS, MAX_CONNECTIONS = 2, 4
#: What the load consists of: so many requests at least, so many at a time, or a few more.
REQUESTS, CLIENTS, MOST_CLIENTS = 2_000, 24, 100

#: Seconds for whatever should happen soon.
BOUND = 30.0


class Gunicorn(Peer):
    """The master and its workers. Their log says what happened to each request."""

    name = "gunicorn"
    settings: ClassVar[str] = "gunicorn_watched.py"
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, peers: Path, backend: EchoServer) -> None:
        super().__init__(peers)
        self._backend = backend

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", "--config", str(ROOT / "tests" / "scripts" / self.settings)),
            *("--bind", f"{self.host}:{self.port}", "--env", f"BACKEND_PORT={self._backend.port}"),
            *("--pythonpath", f"{ROOT},{ROOT / 'examples'}", *self.options, "gunicorn_app:app"),
        ]

    def ready(self) -> None:
        socket.create_connection((self.host, self.port), PATIENCE).close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        assert self._process is not None
        self._process.send_signal(number)

    def workers(self) -> set[int]:
        return {worker.pid for worker in self._workers()}

    def kill_worker(self, pid: int) -> None:
        """SIGKILL to one of them."""
        (worker,) = (each for each in self._workers() if each.pid == pid)
        worker.kill()

    def said(self, regex: str) -> list[str]:
        """What the log says, as often as it does."""
        return re.findall(regex, self.log.read_text(errors="replace"), re.MULTILINE)

    def wait_ended(self) -> tuple[int, list[int]]:
        """Wait until the master has ended. Return its exit status, and which of its workers have outlived it."""
        assert self._process is not None
        process, workers = self._process, self._workers()
        wait_until(lambda: process.poll() is not None)
        _tell_guard(process.pid, 0)
        self._process = None
        return process.returncode, [worker.pid for worker in workers if _lives(worker)]


class Preloaded(Gunicorn):
    name = "gunicorn-preloaded"
    options = ("--preload",)


class Patched(Preloaded):
    name = "gunicorn-patched"
    settings = "gunicorn_patched.py"


def wait_until(happened: Callable[[], object], meanwhile: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + BOUND
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        gevent.sleep(0.01)
        meanwhile()


class Client(TcpConnection):
    """As much of HTTP/1.1 as gunicorn speaks here, over a connection that is kept."""

    def ask(self, token: str) -> tuple[int, str]:
        self.send(f"GET /?{token} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = self.recv_until(b"\r\n\r\n").decode()
        fields = dict(line.lower().split(": ") for line in head.split("\r\n")[1:])
        body = self.recv_exactly(int(fields["content-length"])).decode()
        if fields["connection"] == "close":
            self.close()
        return int(head.split()[1]), body


class Load:
    """Clients who ask one question after the other, and once more with another token where the connection broke.

    A connection serves a few of them, so that each worker gets new clients now and then.

    :ivar answers: to each token that was answered the status and the body.
    :ivar lost: the tokens that were not.
    :ivar over: set when gunicorn has been told to stop: who is refused then is content.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = itertools.count(1)
        self._clients: list[gevent.Greenlet[..., None]] = []
        for _ in range(CLIENTS):
            self.add()
        self.answers: dict[str, tuple[int, str]] = {}
        self.lost: list[str] = []
        self.over = False

    def add(self) -> None:
        """Let one more client ask."""
        assert len(self._clients) < MOST_CLIENTS
        self._clients.append(gevent.spawn(self._ask_on))

    def _ask_on(self) -> None:
        with contextlib.closing(Client("127.0.0.1", self._port, timeout=BOUND)) as client:
            for number in self._numbers:
                for attempt in range(10):
                    token = f"{number}.{attempt}"
                    try:
                        if not client.is_connected():
                            client.open()
                        self.answers[token] = client.ask(token)
                        if number % 10 == 0:
                            client.close()
                        gevent.sleep(0.01)
                        break
                    except (ConnectionError, EOFError):
                        self.lost.append(token)
                        client.close()
                        if self.over:
                            return
                else:
                    raise AssertionError(f"request {number} was not answered in 10 attempts")

    def wait_answered(self, count: int) -> None:
        """Wait until there are so many answers."""
        wait_until(lambda: len(self.answers) >= count or self.failed())
        assert not self.failed(), self.failed()

    def failed(self) -> list[BaseException]:
        return [client.exception for client in self._clients if client.exception is not None]

    def wait_ended(self) -> None:
        assert len(gevent.joinall(self._clients, BOUND, raise_error=True)) == len(self._clients)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *error: object) -> None:
        gevent.killall(self._clients)


@pytest.fixture
def backend() -> Iterator[EchoServer]:
    with EchoServer() as server:
        yield server


@pytest.fixture(params=[Gunicorn, Preloaded, Patched], ids=lambda kind: kind.name)
def gunicorn(request: pytest.FixtureRequest, backend: EchoServer, _peers: Path) -> Iterator[Gunicorn]:
    server: Gunicorn
    with request.param(Path(tempfile.mkdtemp(dir=_peers)), backend) as server:
        try:
            yield server
        finally:
            print(*server.said("^(?!.* begins ).+"), sep="\n")  # shown if the test fails


def users(backend: EchoServer) -> list[set[int]]:
    """Which processes have used each of the connections."""
    return [{int(line.split()[0]) for line in client.lines} for client in list(backend.clients)]


def held(backend: EchoServer) -> list[bytes]:
    """The questions that wait for their answers."""
    return [line for client in list(backend.clients) for line in client.held]


@contextlib.contextmanager
def all_busy(backend: EchoServer, load: Load, workers: set[int]) -> Iterator[None]:
    """While this lasts, each of these workers has requests that wait for their answers, and all others wait, too."""
    wait_until(lambda: workers <= set().union(*users(backend)))
    backend.hold()
    polls = itertools.count(1)
    try:
        # Clients that wait stay with their worker. If one has all of them, others have to come; not all at once, since
        # a worker may just stand still.
        wait_until(
            lambda: workers <= {int(line.split()[0]) for line in held(backend)},
            meanwhile=lambda: load.add() if next(polls) % 20 == 0 else None,
        )
        yield
    finally:
        backend.let_go()


def test_g1_g3_g10_gunicorn_loses_no_request_and_mixes_up_none_while_workers_come_and_go(
    gunicorn: Gunicorn, backend: EchoServer
) -> None:
    masters = MAX_CONNECTIONS if isinstance(gunicorn, Preloaded) else 0
    with Load(gunicorn.port) as load:
        load.wait_answered(400)
        wait_until(lambda: len(gunicorn.workers()) == WORKERS)
        first = gunicorn.workers()

        # One worker is killed in the middle of its requests.
        killed = min(first)
        with all_busy(backend, load, first):
            gunicorn.kill_worker(killed)
        wait_until(lambda: len(gunicorn.workers() - {killed}) == WORKERS)
        load.wait_answered(800)
        # The sockets of who was killed were closed before there was another worker.
        assert backend.most <= WORKERS * MAX_CONNECTIONS + masters

        # All are replaced, in order. For a while there are the old ones and the new ones.
        old = gunicorn.workers()
        booted = len(gunicorn.said("Booting worker"))
        with all_busy(backend, load, old):
            gunicorn.signal(signal.SIGHUP)
            wait_until(lambda: len(gunicorn.said("Booting worker")) == booted + WORKERS)
        wait_until(lambda: len(gunicorn.workers()) == WORKERS and not gunicorn.workers() & old)
        new = gunicorn.workers()
        assert backend.most <= 2 * WORKERS * MAX_CONNECTIONS + masters
        backend.wait_until(lambda: backend.open <= WORKERS * MAX_CONNECTIONS + masters, BOUND)
        backend.most = backend.open
        load.wait_answered(max(REQUESTS, len(load.answers) + 400))

        # And all are told to stop, in the middle of their requests.
        with all_busy(backend, load, new):
            load.over = True
            gunicorn.signal(signal.SIGTERM)
            wait_until(lambda: gunicorn.said("Handling signal: term"))
        assert gunicorn.wait_ended() == (0, [])
        load.wait_ended()
    assert backend.most <= WORKERS * MAX_CONNECTIONS + masters
    backend.wait_until(lambda: backend.serving == 0, BOUND)
    workers = first | old | new

    # Whoever was answered got 200 and his own answer.
    wrong = {
        token: answer
        for token, answer in load.answers.items()
        if answer not in [(200, f"{pid} {token}") for pid in workers]
    }
    assert wrong == {}
    # No connection was ever used by two processes.
    assert [pids for pids in users(backend) if len(pids) > 1] == []
    # Who was not answered was with the worker that was killed, or has not come so far as to begin.
    begun = {token: int(pid) for pid, token in (line.split(" begins ") for line in gunicorn.said(r"\d+ begins .+"))}
    lost = [begun[token] for token in load.lost if token in begun]
    assert set(lost) == {killed}
    assert len(lost) <= MOST_CLIENTS
    # All the other workers ended by themselves, in gunicorn's time, and had closed their pools.
    assert len(gunicorn.said("SIGKILL")) == 1
    assert gunicorn.said("(?i)traceback|exception|error handling|timeout") == []
    drained = gunicorn.said(r"(?<=\[)\d+(?=\] \[INFO\] drained: <Pool 'backend': 0 idle, 0 in use, .*, closed>)")
    assert sorted(map(int, drained)) == sorted(workers - {killed})
    # The master, where it had connections, used them before the first fork and after the end of each worker.
    assert len(gunicorn.said("the master has asked")) == (1 + len(workers) if masters else 0)
    print(f"{len(load.answers)} answered, {len(lost)} lost with their worker, {len(load.lost) - len(lost)} never begun")


@pytest.mark.parametrize("gunicorn", [Gunicorn], indirect=True, ids=lambda kind: kind.name)
def test_g11_at_a_quick_stop_who_has_a_connection_finishes_and_who_waits_for_one_is_told(
    gunicorn: Gunicorn, backend: EchoServer
) -> None:
    with Load(gunicorn.port) as load:
        load.wait_answered(200)
        with all_busy(backend, load, gunicorn.workers()):
            asked = [line.split()[1].decode() for line in held(backend)]
            load.over = True
            gunicorn.signal(signal.SIGINT)
            wait_until(lambda: any(status == 503 for status, _ in load.answers.values()))
        assert gunicorn.wait_ended() == (0, [])
        load.wait_ended()
    backend.wait_until(lambda: backend.serving == 0, BOUND)
    assert {load.answers[token][0] for token in asked} == {200}
    assert {status for status, _ in load.answers.values()} == {200, 503}
    assert gunicorn.said("(?i)traceback|SIGKILL") == []
    assert len(gunicorn.said("drained: <Pool 'backend': 0 idle, 0 in use, .*, closed>")) == WORKERS

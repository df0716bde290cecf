"""Load for a server, by way of a pool: what :mod:`gsocketpool.cli.sizing` makes its figures of.

The loop is closed: so many greenlets each borrow a connection, send a request, read the reply, give the connection
back, and begin again.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from time import perf_counter, process_time
from typing import Any, Final
from urllib.parse import urlsplit

import gevent
from gevent import socket
from gevent.event import Event

from gsocketpool.cli.sizing import Plan, Sample, Step, merge
from gsocketpool.connection import (
    EndOfStreamError,
    LimitExceededError,
    StreamConnection,
    TcpConnection,
    UnixConnection,
)
from gsocketpool.pool import Pool

__all__ = ["Address", "Request", "Target", "first_contact", "measure", "run", "unescape"]

#: Looks at the pool in one step: how many connections are lent.
LOOKS: Final = 25
#: Seconds for which a borrower stays away after a request that failed.
AFTER_AN_ERROR: Final = 0.02
#: The first contact: most requests, most seconds, and the seconds in which a reply that goes on has to do so.
FIRST_REQUESTS: Final = 5
FIRST_SECONDS: Final = 1.0
GOES_ON: Final = 0.05


# What is asked, and whom


_ESCAPES: Final = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\", "'": b"'", '"': b'"'}


def unescape(text: str) -> bytes:
    r"""Bytes from what somebody typed: ``\r \n \t \0 \\ \' \"`` and ``\x1f`` mean what they do in Python.

    :raises ValueError: another backslash.
    """

    def replaced(found: re.Match[str]) -> str:
        byte = bytes([int(found[1], 16)]) if found[1] else _ESCAPES.get(found[2])
        if byte is None:
            raise ValueError(f"there is no {found[0]}: a backslash begins \\r, \\n, \\t, \\0, \\x1f or \\\\")
        return byte.decode("utf-8", "surrogateescape")

    return re.sub(r"\\(?:x([0-9a-fA-F]{2})|(.?))", replaced, text, flags=re.DOTALL).encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Request:
    """What to send, and where the reply ends.

    :ivar send: the bytes of one request.
    :ivar until: what ends a reply; None if `size` says it.
    :ivar size: how many bytes a reply has.
    """

    send: bytes
    until: bytes | None = None
    size: int = 0

    def exchange(self, connection: StreamConnection) -> bytes:
        """Send the request; return the reply, without `until`."""
        connection.send(self.send)
        return connection.recv_exactly(self.size) if self.until is None else connection.recv_until(self.until)


@dataclass(frozen=True)
class Address:
    """``tcp://host:port`` or ``unix:/path``.

    :ivar text: as it was given.
    :ivar host: a name or an address; empty if it is a path.
    """

    text: str
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read one.

        :raises ValueError: it is none.
        """
        if text.startswith("unix:"):
            path = re.sub("^//(?=/)", "", text.removeprefix("unix:"))
            if not path:
                raise ValueError(f"there is no path in {text!r}: give unix:/path")
            return cls(text, path=path)
        wanted = f"{text!r} is no address: give tcp://host:port or unix:/path"
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"{wanted} ({error})") from None
        if parts.scheme != "tcp" or not host or not port or "@" in parts.netloc:
            raise ValueError(wanted)
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError(f"{wanted}; there is more behind the port")
        return cls(text, host, port)

    def resolve(self) -> list[str]:
        """The IP addresses of the host, none for a path.

        :raises OSError: there are none.
        :raises UnicodeError: it is no name.
        """
        if self.path:
            return []
        self.host.encode("idna")  # which getaddrinfo() does in a thread, where it would be complained of
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(place[4][0]) for place in found))


def is_here(places: list[str]) -> bool:
    """Whether all of these IP addresses are the loopback's."""
    return all(_is_loopback(place) for place in places)


def _is_loopback(place: str) -> bool:
    address = ipaddress.ip_address(place.partition("%")[0])
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (inner or address).is_loopback


@dataclass
class Target:
    """A server, and what to ask it.

    :ivar address: where it is.
    :ivar request: what to ask.
    :ivar places: the IP addresses to try: the first one that can be connected to is kept to, so that no step looks a
        name up.
    :ivar tls: None, or how to verify the server.
    :ivar timeout: seconds for a connect, and for a reply.
    """

    address: Address
    request: Request
    places: list[str] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    timeout: float = 5.0

    def dialling(self) -> tuple[Callable[..., StreamConnection], dict[str, Any]]:
        """What a pool takes: a factory, and its options."""
        times = {"timeout": self.timeout, "connect_timeout": self.timeout, "lifetime": None}
        if self.address.path:
            return UnixConnection, {"path": self.address.path, **times}
        tls = {} if self.tls is None else {"tls": self.tls, "server_hostname": self.address.host}
        return TcpConnection, {"host": self.places[0], "port": self.address.port, **tls, **times}


class NoAnswerError(Exception):
    """The server cannot be measured; the text says why."""


def first_contact(target: Target) -> tuple[bytes, float]:
    """Ask a few times, over one connection, to see that the server answers as expected.

    :returns: the first reply, and how many seconds a request took (the median).
    :raises NoAnswerError: it does not.
    """
    connection = _connect(target)
    times: list[float] = []
    replies: list[bytes] = []
    try:
        ending = perf_counter() + FIRST_SECONDS
        while len(times) < FIRST_REQUESTS and (not times or perf_counter() < ending):
            began = perf_counter()
            replies.append(target.request.exchange(connection))
            times.append(perf_counter() - began)
            if len(times) == 1:
                _ends_there(connection, target)
    except OSError as error:
        came = f"; the reply before was {shorten(replies[-1])}" if replies else ""
        raise NoAnswerError(
            f"{target.address.text} does not answer as expected: {error}. A request is "
            f"{shorten(target.request.send)}, and {_ending(target.request)} is to end a reply{came}."
        ) from error
    finally:
        connection.close()
    return replies[0], median(times)


def _connect(target: Target) -> StreamConnection:
    failures = []
    for _ in range(max(1, len(target.places))):
        factory, options = target.dialling()
        connection = factory(**options)
        try:
            connection.open()
            return connection
        except OSError as error:
            failures.append(error)
            target.places = [*target.places[1:], *target.places[:1]]
    raise NoAnswerError(f"{target.address.text} cannot be reached: {'; '.join(map(str, failures))}.") from failures[-1]


def _ends_there(connection: StreamConnection, target: Target) -> None:
    """See that nothing follows the reply: it would be taken for the next one."""
    connection.socket.settimeout(GOES_ON)
    try:
        more = connection.recv()
    except TimeoutError:
        connection.socket.settimeout(target.timeout)
        return
    if not more:
        raise NoAnswerError(
            f"{target.address.text} ends the connection after a reply. There is nothing to pool: each request needs a "
            "connection of its own."
        )
    raise NoAnswerError(
        f"{target.address.text} goes on after {_ending(target.request)} with {shorten(more)}: that would be taken for "
        "the next reply. Give the end of the whole reply as --until, or its length as --expect-bytes."
    )


def _ending(request: Request) -> str:
    return f"byte {request.size:,}" if request.until is None else repr(request.until)


def shorten(data: bytes) -> str:
    """Bytes for people to read."""
    return repr(data) if len(data) <= 60 else f"{data[:60]!r}..."


# Load


def run(target: Target, plan: Plan, stop: Callable[[], bool]) -> Iterator[tuple[Step, Sample | None]]:
    """Do what the plan says, as long as it may take.

    :param stop: asked all the time; True ends the run.
    :returns: each step twice: with None before it is done, then with its sample.
    """
    samples: list[Sample] = []
    ending = perf_counter() + plan.longest()
    steps = plan.steps()
    refining = False
    while steps:
        step, *steps = steps
        if stop() or perf_counter() > ending:
            return
        yield step, None
        sample = measure(target, step, plan, stop)
        if stop():
            return
        samples.append(sample)
        yield step, sample
        if not steps and not refining:
            refining = True
            steps = plan.refined(merge(samples))


def measure(target: Target, step: Step, plan: Plan, stop: Callable[[], bool]) -> Sample:
    """Put one load on the server.

    It begins with warming up, until each greenlet has had its turn or as many seconds are over as are then measured;
    afterwards requests under way are awaited, and nothing new is sent.
    """
    return _Load(target, step, plan, stop).sample()


class _Load:
    def __init__(self, target: Target, step: Step, plan: Plan, stop: Callable[[], bool]) -> None:
        self._target, self._step, self._plan, self._stop = target, step, plan, stop
        self._request = target.request
        self._over = False
        self._measuring = False
        self._warm = Event()
        self._enough = Event()
        self._turns = 0
        # Eight bytes for each time, and nothing for the collector to look through while the load runs.
        self._in_use = array("d")
        self._waits = array("d")
        self._errors: Counter[str] = Counter()

    def sample(self) -> Sample:
        plan, step = self._plan, self._step
        factory, options = self._target.dialling()
        pool: Pool[Any] = Pool(factory, options, max_connections=step.size, name="size")
        borrowers = [gevent.spawn(self._borrow, pool) for _ in range(step.greenlets)]
        lent = []
        try:
            self._watch(self._warm, plan.seconds)
            began, worked, queued = perf_counter(), process_time(), _queued()
            self._measuring = True
            for in_use in self._watch_pool(pool):
                lent.append(in_use)
            self._measuring = False
            seconds, work, queue = perf_counter() - began, process_time() - worked, _queued() - queued
        finally:
            self._over = True
            pool.close(plan.timeout)
            gevent.joinall(borrowers, timeout=1)
            gevent.killall(borrowers)
        return Sample(
            step=step,
            seconds=seconds,
            in_use=self._in_use,
            waits=self._waits,
            errors=self._errors,
            busy=min(work / max(seconds - queue, work, 1e-9), 1.0),
            lent=fmean(lent or [0.0]),
        )

    def _watch(self, event: Event, seconds: float) -> None:
        for _ in range(LOOKS):
            if self._stop() or event.wait(seconds / LOOKS):
                return

    def _watch_pool(self, pool: Pool[Any]) -> Iterator[int]:
        ending = perf_counter() + self._plan.seconds
        while (left := ending - perf_counter()) > 0 and not self._stop() and not self._enough.is_set():
            self._enough.wait(min(left, self._plan.seconds / LOOKS))
            yield pool.in_use

    def _borrow(self, pool: Pool[Any]) -> None:
        while not self._over:
            asked = perf_counter()
            try:
                with pool.connection(timeout=None) as connection:
                    if self._over:
                        return
                    borrowed = perf_counter()
                    self._request.exchange(connection)
                    answered = perf_counter()
            except Exception as error:
                if self._over:
                    return
                self._turn()
                if self._measuring:
                    self._errors[kind_of(error)] += 1
                gevent.sleep(AFTER_AN_ERROR)
                continue
            self._turn()
            if self._measuring:
                self._in_use.append(answered - borrowed)
                self._waits.append(borrowed - asked)
                if len(self._in_use) >= self._plan.requests:
                    self._measuring = False
                    self._enough.set()

    def _turn(self) -> None:
        self._turns += 1
        if self._turns >= self._step.greenlets:
            self._warm.set()


def _queued() -> float:
    """Seconds that this process has waited for a processor; 0 where the system does not tell."""
    try:
        with open("/proc/self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


_KINDS: Final[list[tuple[type[Exception], str]]] = [
    (TimeoutError, "timed out"),
    (ConnectionRefusedError, "refused"),
    (EndOfStreamError, "hung up"),
    (LimitExceededError, "reply too long"),
    (ConnectionResetError, "reset"),
    (ConnectionAbortedError, "reset"),
    (BrokenPipeError, "reset"),
]


def kind_of(error: Exception) -> str:
    """What to count an error as."""
    return next((word for kind, word in _KINDS if isinstance(error, kind)), type(error).__name__)

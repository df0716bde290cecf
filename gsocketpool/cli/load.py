"""Load for a server, by way of a pool: what :mod:`gsocketpool.cli.sizing` makes its figures of.

The loop is closed: so many greenlets each borrow a connection, send a request, read the reply, give the connection
back, and begin again.
"""

from __future__ import annotations

import dataclasses
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

from gsocketpool.cli.sizing import PATIENCE, Plan, Sample, Step, gone, merge
from gsocketpool.connection import (
    EndOfStreamError,
    LimitExceededError,
    StreamConnection,
    TcpConnection,
    UnixConnection,
)
from gsocketpool.pool import Pool

__all__ = ["Address", "Request", "Run", "Target", "first_contact", "measure", "unescape"]

#: Looks at the pool in one step: how many connections are lent.
LOOKS: Final = 25
#: Seconds beyond the timeout in which a request has to notice that it is over; and for a pool to close.
GRACE: Final = 0.5
#: Seconds between two looks at whether somebody wants to stop, while replies are awaited.
LOOK: Final = 0.05
#: Seconds for which a borrower stays away after a request that failed.
AFTER_AN_ERROR: Final = 0.02
#: The first contact: most requests, most seconds, and the seconds in which a reply that goes on has to do so.
FIRST_REQUESTS: Final = 5
FIRST_SECONDS: Final = 1.0
GOES_ON: Final = 0.05
#: How much of a reply that is not whole is looked at, and how a complaint of TLS begins (RFC 8446, section 5.1).
MOST_SHOWN: Final = 65536
TLS_ALERT: Final = b"\x15\x03"


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


class _EndlessError(Exception):
    """A reply came piece by piece, and did not end. No OSError: those are the connection's to explain."""


def first_contact(target: Target) -> tuple[bytes, float]:
    """Ask a few times, over one connection, to see that the server answers as expected.

    :returns: the first reply, and how many seconds a request took (the median).
    :raises NoAnswerError: it does not.
    """
    connection = _connect(target)
    times: list[float] = []
    replies: list[bytes] = []
    try:
        _be_told_nothing(connection, target)
        ending = perf_counter() + FIRST_SECONDS
        while len(times) < FIRST_REQUESTS and (not times or perf_counter() < ending):
            began = perf_counter()
            # For the whole reply: the connection's own timeout begins again with each piece of it.
            with gevent.Timeout(target.timeout + GRACE, _EndlessError(f"no end of a reply in {target.timeout:g} s")):
                replies.append(target.request.exchange(connection))
            times.append(perf_counter() - began)
            if len(times) == 1:
                _ends_there(connection, target, replies[0])
    except (OSError, _EndlessError) as error:
        raise NoAnswerError(_otherwise(target, connection, error, replies)) from error
    finally:
        connection.close()
    return replies[0], median(times)


def _connect(target: Target) -> StreamConnection:
    failures: list[OSError] = []
    for _ in range(max(1, len(target.places))):
        factory, options = target.dialling()
        connection = factory(**options)
        try:
            connection.open()
            return connection
        except OSError as error:
            failures.append(error)
            target.places = [*target.places[1:], *target.places[:1]]
    hint = ""
    if any(_speaks_no_tls(error) for error in failures):
        hint = " Does it speak TLS at that port? If not, leave --tls out."
    raise NoAnswerError(
        f"{target.address.text} cannot be reached: {'; '.join(map(str, failures))}.{hint}"
    ) from failures[-1]


def _speaks_no_tls(error: OSError) -> bool:
    return isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLCertVerificationError)


def _otherwise(target: Target, connection: StreamConnection, error: Exception, replies: list[bytes]) -> str:
    """What to say if the server answers otherwise than expected."""
    came = _what_came(connection, target)
    late = isinstance(error, (TimeoutError, _EndlessError))
    what = "nothing came"
    if came:
        what = f"what came{f' in {target.timeout:g} s' if late else ''} is {shorten(came)} ({len(came):,} bytes)"
    if replies:
        what += f"; the reply before was {shorten(replies[-1])}"
    why = "" if late and came else f": {error}"
    hint = ""
    if target.tls is None and came.startswith(TLS_ALERT):
        hint = " That is TLS: give --tls."
    elif target.tls is None and not (came or replies or target.address.path) and isinstance(error, ConnectionError):
        hint = " If it speaks TLS, give --tls."
    elif came and late:
        hint = " If that is the whole reply, say so with --until or --expect-bytes."
    return (
        f"{target.address.text} does not answer as expected{why}. A request is {shorten(target.request.send)}, and "
        f"{_ending(target.request)} is to end a reply; {what}.{hint}"
    )


def _what_came(connection: StreamConnection, target: Target) -> bytes:
    """What there is of a reply that was not whole."""
    try:
        return _goes_on(connection, target) or b""
    except OSError:
        return b""


def _be_told_nothing(connection: StreamConnection, target: Target) -> None:
    """See that the server waits for a request: a greeting would be taken for the first reply, each one for the next."""
    greeting = _goes_on(connection, target)
    if greeting:
        raise NoAnswerError(
            f"{target.address.text} speaks first, and says {shorten(greeting)}. Only a server that speaks when it is "
            "asked can be measured."
        )


def _ends_there(connection: StreamConnection, target: Target, reply: bytes) -> None:
    """See that nothing follows the reply: it would be taken for the next one."""
    more = _goes_on(connection, target)
    if more is None:
        return
    if not more:
        raise NoAnswerError(
            f"{target.address.text} ends the connection after a reply. There is nothing to pool: each request needs a "
            "connection of its own."
        )
    raise NoAnswerError(
        f"{target.address.text} says {shorten(reply)} and goes on after {_ending(target.request)} with "
        f"{shorten(more)}: that would be taken for the next reply. Give the end of the whole reply as --until, or its "
        "length as --expect-bytes."
    )


def _goes_on(connection: StreamConnection, target: Target) -> bytes | None:
    """What comes unasked: None if nothing does, nothing if it is the end."""
    connection.socket.settimeout(GOES_ON)
    try:
        return connection.recv(MOST_SHOWN)
    except TimeoutError:
        connection.socket.settimeout(target.timeout)
        return None


def _ending(request: Request) -> str:
    return f"byte {request.size:,}" if request.until is None else repr(request.until)


def shorten(data: bytes) -> str:
    """Bytes for people to read."""
    return repr(data) if len(data) <= 60 else f"{data[:60]!r}..."


# Load

#: Seconds that a server may take at most to see to what it was asked when every request had failed.
MOST_PATIENCE: Final = 60.0


class Run:
    """What a plan says, done step by step: iterate over it, once. It gives each step before that is done.

    :param stop: asked all the time; True ends the run.
    :ivar samples: of the steps so far.
    :ivar ended: None, or why it ended before the plan was done: ``interrupted`` (`stop` said so), ``late`` (it took as
        long as it may take) or ``gone`` (the server: see :func:`gsocketpool.cli.sizing.gone`).
    """

    def __init__(self, target: Target, plan: Plan, stop: Callable[[], bool]) -> None:
        self._target, self._plan, self._stop = target, plan, stop
        self.samples: list[Sample] = []
        self.ended: str | None = None
        self._too_large: int | None = None  # so many connections, with which each request failed, of a live server

    def __iter__(self) -> Iterator[Step]:
        self._ending = perf_counter() + self._plan.longest()
        yield from self._do(self._plan.steps())
        if self.ended is None:
            yield from self._do(self._plan.refined(merge(self.samples)))

    def _do(self, steps: list[Step]) -> Iterator[Step]:
        for step in steps:
            if perf_counter() > self._ending:
                self.ended = "late"
                return
            if self._too_large is not None and step.size >= self._too_large:
                continue
            yield step
            sample = measure(self._target, step, self._plan, self._stop)
            if self._stop():
                self.ended = "interrupted"
                return
            self.samples.append(sample)
            if gone(self.samples):
                if not self._still_answers():
                    self.ended = "gone"
                    return
                self._too_large = min(sample.step.size for sample in self.samples[-PATIENCE:])

    def _still_answers(self) -> bool:
        """Whether it does if nobody else asks, and it has had the time for what it was asked before."""
        asked = sum(sum(sample.errors.values()) for sample in self.samples[-PATIENCE:])
        best = max(sample.rate for sample in self.samples)
        patience = self._target.timeout + (min(asked / best, MOST_PATIENCE) if best else 0.0)
        try:
            first_contact(dataclasses.replace(self._target, timeout=patience))
        except NoAnswerError:
            return False
        return True


def measure(target: Target, step: Step, plan: Plan, stop: Callable[[], bool]) -> Sample:
    """Put one load on the server.

    It begins with warming up, until each greenlet has had its turn or as many seconds are over as are then measured.
    Afterwards nothing new is sent. Requests under way are awaited, for as long as a reply may take; those that fail
    then, or have no reply by then, count as failed.
    """
    return _Load(target, step, plan, stop).sample()


class _Load:
    def __init__(self, target: Target, step: Step, plan: Plan, stop: Callable[[], bool]) -> None:
        self._target, self._step, self._plan, self._stop = target, step, plan, stop
        self._request = target.request
        self._warming = True
        self._measuring = False
        self._over = False
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
        try:
            self._watch(self._warm, plan.seconds)
            began, worked, queued = perf_counter(), process_time(), _queued()
            self._warming, self._measuring = False, True
            lent = list(self._watch_pool(pool))
            self._measuring = False
            seconds, work, queue = perf_counter() - began, process_time() - worked, _queued() - queued
            self._over = True
            self._await_replies(borrowers)
            if pool.in_use:
                self._errors["timed out"] += pool.in_use
        finally:
            self._over = True
            gevent.killall(borrowers)
            pool.close(GRACE)
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

    def _await_replies(self, borrowers: list[gevent.Greenlet[..., None]]) -> None:
        ending = perf_counter() + self._plan.timeout + GRACE
        while (left := ending - perf_counter()) > 0 and not self._stop():
            if len(gevent.joinall(borrowers, timeout=min(left, LOOK))) == len(borrowers):
                return

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
                self._turn()
                if not self._warming:
                    self._errors[kind_of(error)] += 1
                if not self._over:
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
    (FileNotFoundError, "no such path"),
    (EndOfStreamError, "hung up"),
    (LimitExceededError, "reply too long"),
    (ConnectionResetError, "reset"),
    (ConnectionAbortedError, "reset"),
    (BrokenPipeError, "reset"),
]


def kind_of(error: Exception) -> str:
    """What to count an error as."""
    return next((word for kind, word in _KINDS if isinstance(error, kind)), type(error).__name__)

"""The `retry` decorator: what it does again, when it gives up, and that nothing holds up a kill."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import math
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.event import Event
from hypothesis import given
from hypothesis import strategies as st

from gsocketpool import EndOfStreamError, Pool, PoolClosedError, PoolError, PoolExhaustedError, TcpConnection, retry

from .conftest import Logged
from .knife import ASLEEP, WAKING, Knife
from .peers import Valkey
from .servers import LineEchoServer

if TYPE_CHECKING:
    from typing_extensions import assert_type

BOUND = 20.0  # seconds for whatever should happen soon
NEVER = 3600.0  # seconds that no test waits


class Flaky:
    """A function that fails so many times, and then returns what it is given."""

    __name__ = "flaky"

    def __init__(self, failures: float, error: Callable[[], BaseException] = ConnectionResetError) -> None:
        self.failures = failures
        self.error = error
        self.calls = 0

    def __call__(self, value: str = "done") -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error()
        return value


class Clock:
    """The time that `retry` reads. It stands still, but for what a test adds."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gsocketpool.retrying.monotonic", lambda: clock.now)
    return clock


class Notes(logging.Handler):
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.logger = logging.Logger("notes")
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[tuple[int, str]]:
        return [(record.levelno, record.getMessage()) for record in self.records]


# -- What is decorated --


@retry
def shout(word: str, *, times: int = 1) -> str:
    """Say it loud."""
    return word.upper() * times


class Client:
    def __init__(self) -> None:
        self.calls = 0

    @retry(interval=0)
    def ask(self, number: int) -> list[int]:
        self.calls += 1
        if self.calls < 3:
            raise ConnectionResetError
        return [number]

    @staticmethod
    @retry
    def version() -> int:
        return 1

    @classmethod
    @retry(max_failures=1)
    def make(cls) -> Client:
        return cls()


def test_a_decorated_function_keeps_its_name_its_text_its_signature_and_its_types() -> None:
    assert shout("hey", times=2) == "HEYHEY"
    assert (shout.__name__, shout.__doc__) == ("shout", "Say it loud.")
    assert list(inspect.signature(shout).parameters) == ["word", "times"]
    if TYPE_CHECKING:
        assert_type(shout("hey"), str)
        assert_type(Client().ask(1), list[int])
        assert_type(Client.version(), int)
        assert_type(Client.make(), Client)
        assert_type(retry(deadline=1)(shout)("hey"), str)
        assert_type(retry(shout, deadline=1)("hey"), str)
        # mypy would complain of an ignore that is not needed: so these are found to be wrong.
        shout(5)  # type: ignore[arg-type]
        shout("hey", time=2)  # type: ignore[call-arg]
        Client().ask("1")  # type: ignore[arg-type]
        retry(max_failures="3")  # type: ignore[call-overload]


def test_a_decorated_method_is_a_method() -> None:
    client = Client()
    assert client.ask(7) == [7]
    assert client.calls == 3
    assert Client.ask(client, 8) == [8]
    assert Client.version() == 1
    assert isinstance(Client.make(), Client)


def test_the_decorator_with_its_settings_can_be_kept_and_used_again() -> None:
    for again in (retry(max_failures=2, interval=0), functools.partial(retry, max_failures=2, interval=0)):
        one, two = Flaky(2), Flaky(3)
        assert again(one)() == "done"
        with pytest.raises(ConnectionResetError):
            again(two)()
        assert (one.calls, two.calls) == (3, 3)


def test_geventconnpools_parameters_may_be_given_in_its_order() -> None:
    notes = Notes()
    flaky = Flaky(3, KeyError)
    again = retry(flaky, (KeyError,), notes.logger, logging.DEBUG, "{f} {e!r}", 2, 0, logging.CRITICAL, "{f} {e!r}!")
    with pytest.raises(KeyError):
        again()
    assert flaky.calls == 3
    assert notes.lines == [
        (logging.DEBUG, "flaky KeyError()"),
        (logging.DEBUG, "flaky KeyError()"),
        (logging.CRITICAL, "flaky KeyError()!"),
    ]


def generator() -> Iterator[int]:
    yield 1


async def coroutine() -> None:
    pass


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("thing", "why"),
    [
        (5, "f must be a plain function, not 5"),
        (OSError, "exc_classes="),
        ((OSError, EOFError), "given by name"),
        (staticmethod(shout), "put @retry below @staticmethod"),
        (Client.__dict__["make"], "put @retry below @classmethod"),
        (generator, "a plain function"),
        (coroutine, "a plain function.*gsocketpool.asyncio has a retry"),
        (async_generator, "a plain function"),
    ],
)
def test_what_cannot_be_tried_again_is_refused(thing: Any, why: str) -> None:
    for decorator in (retry, retry(max_failures=1)):
        with pytest.raises(TypeError, match=why):
            decorator(thing)


NO_SECONDS: tuple[Any, ...] = ("3", b"3", [], True, 1j)
SECONDS_TOO_LOW = (-1, -0.001, math.nan, math.inf)
NO_WHOLE_NUMBERS: tuple[Any, ...] = ("3", 2.5, True, [])
NO_CLASSES = (5, None, "OSError", OSError(), int, BaseException, gevent.Timeout, gevent.GreenletExit, (OSError, 5))

#: Each parameter, with values of a wrong type and wrong values of a right type.
WRONG: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "exc_classes": (NO_CLASSES, ()),
    "logger": ((5, "logger", True), ()),
    "retry_log_level": ((*NO_WHOLE_NUMBERS, None), (-1,)),
    "retry_log_message": ((None, 5, b"{f}"), ("{", "{}", "{0}", "{g}", "{f} {error}")),
    "max_failures": (NO_WHOLE_NUMBERS, (-1,)),
    "interval": (NO_SECONDS, SECONDS_TOO_LOW),
    "max_failure_log_level": ((*NO_WHOLE_NUMBERS, None), (-1,)),
    "max_failure_log_message": ((None, 5, b"{f}"), ("{", "{}", "{pause}")),
    "backoff": ((5, "ab", (), (1,), (1, 2, 3), [1, 2], ("1", 2), (1, None)), ((0, 1), (2, 1), (1, math.inf))),
    "deadline": (NO_SECONDS, (0, *SECONDS_TOO_LOW)),
}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        pytest.param(name, value, kind, id=f"{name}={value!r}")
        for name, values in WRONG.items()
        for kind, of_kind in zip((TypeError, ValueError), values, strict=True)
        for value in of_kind
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(name: str, value: Any, kind: type[Exception]) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(kind, match=f"^{name} "):
        retry(**arguments)


def test_every_parameter_has_its_wrong_values() -> None:
    assert set(inspect.signature(retry).parameters) - {"f"} == set(WRONG)


def test_an_interval_and_a_backoff_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="interval and backoff exclude each other"):
        retry(interval=0, backoff=(1, 2))


# -- What is done again --


@pytest.mark.parametrize("error", [OSError, socket.timeout, socket.gaierror, ConnectionResetError, EndOfStreamError])
def test_a_bare_retry_does_it_again_after_what_connections_raise(error: type[Exception]) -> None:
    flaky = Flaky(2, error)
    assert retry(flaky)("hello") == "hello"
    assert flaky.calls == 3


@pytest.mark.parametrize("error", [PoolError, PoolExhaustedError, PoolClosedError, ValueError, EOFError])
def test_other_errors_are_raised_at_once(error: type[Exception]) -> None:
    flaky = Flaky(2, error)
    with pytest.raises(error):
        retry(flaky)()
    assert flaky.calls == 1


@pytest.mark.parametrize("classes", [PoolError, [ValueError, PoolError], (c for c in (PoolError, ValueError))])
def test_exc_classes_are_one_class_or_several(classes: Any) -> None:
    again = retry(exc_classes=classes, interval=0)
    assert again(Flaky(2, PoolExhaustedError))() == "done"
    assert again(Flaky(1, PoolError))() == "done"
    flaky = Flaky(1)
    with pytest.raises(ConnectionResetError):
        again(flaky)()
    assert flaky.calls == 1


@pytest.mark.parametrize("max_failures", [0, 1, 2, 10])
def test_one_call_more_than_max_failures_is_made(max_failures: int) -> None:
    flaky = Flaky(max_failures)
    assert retry(flaky, max_failures=max_failures, interval=0)() == "done"
    flaky = Flaky(math.inf)
    with pytest.raises(ConnectionResetError):
        retry(flaky, max_failures=max_failures, interval=0)()
    assert flaky.calls == max_failures + 1


def test_the_last_error_is_raised_as_it_was() -> None:
    causes = [KeyError(number) for number in range(3)]

    @retry(max_failures=2, interval=0)
    def ask() -> None:
        try:
            raise causes[calls.pop(0)]
        except KeyError as error:
            raise ConnectionResetError(error.args[0]) from error

    calls = [0, 1, 2]
    with pytest.raises(ConnectionResetError, match="^2$") as caught:
        ask()
    assert caught.value.__cause__ is causes[2]


def test_every_call_counts_its_own_failures() -> None:
    again = retry(max_failures=1, interval=0)

    @again
    def ask(flaky: Flaky) -> str:
        return flaky()

    several = [Flaky(1) for _ in range(20)]
    jobs = [gevent.spawn(ask, flaky) for flaky in several]
    assert [job.get(timeout=BOUND) for job in jobs] == ["done"] * 20
    assert [flaky.calls for flaky in several] == [2] * 20


# -- The pauses --


@pytest.mark.parametrize("pause", [{"interval": 0}, {"interval": 0.001}, {"backoff": (0.001, 0.001)}, {}])
def test_others_run_while_it_waits_for_the_next_try(pause: dict[str, Any]) -> None:
    mended = Event()

    @retry(**pause)
    def ask() -> str:
        if not mended.is_set():
            raise ConnectionResetError
        return "done"

    gevent.spawn(mended.set)  # it never runs, if nothing yields
    assert ask() == "done"


def pauses(failures: int, **arguments: Any) -> list[float]:
    notes = Notes()
    retry(Flaky(failures), logger=notes.logger, retry_log_message="{pause!r}", **arguments)()
    return [float(line) for _, line in notes.lines]


@given(first=st.floats(1e-9, 1e-6), factor=st.floats(1, 1e3), failures=st.integers(1, 20))
def test_pauses_are_drawn_from_a_window_that_doubles_up_to_the_longest(
    first: float, factor: float, failures: int
) -> None:
    longest = first * factor
    drawn = pauses(failures, backoff=(first, longest))
    assert len(drawn) == failures
    assert all(0 <= pause <= min(longest, first * 2**n) for n, pause in enumerate(drawn))


def test_pauses_fill_their_window() -> None:
    drawn = pauses(200, backoff=(1e-5, 1e-5))
    # With full jitter the odds against either are 1 to 4 ** 200 / 3 ** 200, that is 10 ** 24.
    assert min(drawn) < 0.25e-5
    assert max(drawn) > 0.75e-5


def test_an_interval_is_kept_to() -> None:
    assert pauses(3, interval=0.001) == [0.001] * 3


def test_an_outage_may_be_as_long_as_it_likes() -> None:
    flaky = Flaky(1_100)
    assert retry(flaky, backoff=(1e-7, 1e-6))() == "done"
    assert flaky.calls == 1_101


# -- The deadline --


def test_within_its_deadline_it_tries_as_ever() -> None:
    flaky = Flaky(3)
    assert retry(flaky, deadline=BOUND)() == "done"
    assert flaky.calls == 4


def test_no_pause_begins_that_would_not_end_before_the_deadline() -> None:
    flaky = Flaky(math.inf)
    with pytest.raises(ConnectionResetError):
        retry(flaky, deadline=NEVER, interval=NEVER)()
    assert flaky.calls == 1


def test_the_last_error_is_raised_when_the_deadline_has_passed(clock: Clock) -> None:
    @retry(deadline=10, backoff=(0.001, 0.002))
    def ask() -> None:
        calls.append(1)
        clock.now += 4
        raise ConnectionResetError(len(calls))

    calls: list[int] = []
    with gevent.Timeout(BOUND), pytest.raises(ConnectionResetError, match="^3$"):
        ask()
    assert len(calls) == 3


@pytest.mark.usefixtures("clock")
def test_a_try_that_runs_at_the_deadline_is_ended_and_the_error_before_it_raised() -> None:
    interrupted: list[BaseException] = []

    @retry(deadline=0.02, interval=0.001)
    def ask() -> None:
        if not failed.is_set():
            failed.set()
            raise ConnectionResetError("the first")
        try:
            gevent.sleep(NEVER)
        except BaseException as error:
            interrupted.append(error)
            raise

    failed = Event()
    with pytest.raises(ConnectionResetError, match="^the first$") as caught:
        ask()
    assert caught.value.__context__ is None
    assert [type(error) for error in interrupted] == [gevent.Timeout]


def test_a_first_try_that_runs_at_the_deadline_is_ended_by_a_timeout_error() -> None:
    notes = Notes()

    @retry(deadline=0.02, logger=notes.logger)
    def ask() -> None:
        gevent.sleep(NEVER)

    with pytest.raises(TimeoutError, match=r"^ask\(\) did not return within its deadline of 0.02 s$") as caught:
        ask()
    assert isinstance(caught.value.__cause__, gevent.Timeout)
    assert [level for level, _ in notes.lines] == [logging.ERROR]


def test_a_pause_that_took_too_long_is_not_followed_by_a_try() -> None:
    @retry(deadline=0.02, interval=0.001)
    def ask() -> None:
        calls.append(1)
        gevent.spawn(hold_up)
        raise ConnectionResetError

    def hold_up() -> None:
        timer = gevent.get_hub().loop.now()
        while gevent.get_hub().loop.now() < timer + 0.03:
            gevent.get_hub().loop.update_now()

    calls: list[int] = []
    with pytest.raises(ConnectionResetError):
        ask()
    assert calls == [1]


def test_an_error_made_of_the_deadlines_timeout_is_raised() -> None:
    @retry(deadline=0.02)
    def ask() -> None:
        try:
            gevent.sleep(NEVER)
        except gevent.Timeout as timeout:
            raise ConnectionResetError("too slow") from timeout

    with pytest.raises(ConnectionResetError, match="too slow"):
        ask()


# -- Kills --


class Poison(BaseException):
    pass


@pytest.mark.parametrize("lethal", [gevent.GreenletExit, gevent.Timeout, Poison, KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_is_never_tried_again(lethal: type[BaseException]) -> None:
    flaky = Flaky(1, lethal)
    with pytest.raises(lethal):
        retry(flaky, exc_classes=Exception, deadline=BOUND)()
    assert flaky.calls == 1


@pytest.mark.parametrize("when", [ASLEEP, WAKING])
@pytest.mark.parametrize("lethal", [gevent.GreenletExit, gevent.Timeout, Poison])
@pytest.mark.parametrize("deadline", [None, BOUND])
def test_a_kill_at_any_switch_point_is_the_end(when: str, lethal: type[BaseException], deadline: float | None) -> None:
    ended: list[BaseException] = []

    class Chatty(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            switch()

    def switch() -> None:
        gevent.sleep(0.0001)  # a timer, since a `sleep(0)` is answered before a knife can strike

    logger = logging.Logger("chatty")
    logger.addHandler(Chatty())

    def victim() -> None:
        @retry(exc_classes=Exception, logger=logger, backoff=(1e-5, 1e-4), max_failures=3, deadline=deadline)
        def ask() -> None:
            switch()
            raise ConnectionResetError

        knife.aim()
        try:
            ask()
        except BaseException as error:
            ended.append(error)

    with Knife() as knife:
        gevent.spawn(victim).join(BOUND)
    points = knife.points
    # Four calls, four records and three pauses.
    assert points == 11
    assert isinstance(ended.pop(), ConnectionResetError)

    for point in range(1, points + 1):
        with Knife(point, when, lethal) as knife:
            gevent.spawn(victim).join(BOUND)
        assert knife.struck
        assert knife.points == point, "it went on after the kill"
        assert type(ended.pop()) is lethal
    assert not ended


@pytest.mark.parametrize("deadline", [None, 2 * NEVER])
def test_a_kill_in_a_long_pause_is_not_delayed(deadline: float | None) -> None:
    flaky = Flaky(math.inf)
    job = gevent.spawn(retry(flaky, interval=NEVER, deadline=deadline))
    gevent.sleep(0)
    assert flaky.calls == 1
    job.kill(timeout=BOUND)
    assert isinstance(job.value, gevent.GreenletExit)
    assert flaky.calls == 1


def test_a_timeout_around_it_ends_a_long_pause_and_a_long_try() -> None:
    @retry(interval=NEVER, deadline=2 * NEVER)
    def ask(what: str) -> None:
        if what == "fail":
            raise ConnectionResetError
        gevent.sleep(NEVER)

    for what in ("fail", "hang"):
        with pytest.raises(gevent.Timeout) as caught, gevent.Timeout(0.01) as outer:
            ask(what)
        assert caught.value is outer


def test_the_deadline_of_an_outer_retry_ends_an_inner_one() -> None:
    inner = Flaky(math.inf)
    outer = retry(retry(inner, interval=NEVER), deadline=0.02)
    with gevent.Timeout(BOUND), pytest.raises(TimeoutError):
        outer()
    assert inner.calls == 1


def test_a_kill_is_not_forgotten_for_an_error_that_took_its_place() -> None:
    calls = 0

    @retry(interval=0)
    def ask() -> None:
        nonlocal calls
        calls += 1
        try:
            gevent.sleep(NEVER)
        finally:
            try:
                raise BrokenPipeError
            except BrokenPipeError:
                raise ConnectionResetError("while saying goodbye")  # noqa: B904

    def run() -> None:
        with pytest.raises(ConnectionResetError, match="goodbye"):
            ask()

    job = gevent.spawn(run)
    gevent.sleep(0)
    job.kill(timeout=BOUND)
    assert job.ready()
    assert calls == 1
    job.get()


@pytest.mark.parametrize("mean_it", ["from timeout", "from None"])
def test_an_error_that_was_made_of_a_timeout_on_purpose_is_tried_again(mean_it: str) -> None:
    calls = 0

    @retry(interval=0)
    def ask() -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            return "done"
        try:
            with gevent.Timeout(0.001):
                gevent.sleep(NEVER)
        except gevent.Timeout as timeout:
            raise ConnectionResetError from (timeout if mean_it == "from timeout" else None)
        raise AssertionError("unreachable")

    assert ask() == "done"
    assert calls == 3


def test_somebody_who_was_killed_may_still_try_more_than_once() -> None:
    flaky = Flaky(2)

    def run() -> str:
        try:
            gevent.sleep(NEVER)
        except gevent.GreenletExit:
            return retry(flaky, interval=0)("said goodbye")
        raise AssertionError("unreachable")

    job = gevent.spawn(run)
    gevent.sleep(0)
    job.kill(timeout=BOUND)
    assert job.value == "said goodbye"
    assert flaky.calls == 3


# -- What is logged, and what is left behind --


def test_nothing_is_logged_unless_a_logger_is_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConnectionResetError):
        retry(Flaky(math.inf), max_failures=2, interval=0)()
    assert not caplog.records


def test_each_failure_is_logged_and_the_last_one_as_such() -> None:
    notes = Notes()
    with pytest.raises(ConnectionResetError):
        retry(Flaky(math.inf), max_failures=2, interval=0, logger=notes.logger)()
    assert notes.lines == [
        (logging.INFO, "flaky() failed, 1 so far: ConnectionResetError(); next try in 0.00 s"),
        (logging.INFO, "flaky() failed, 2 so far: ConnectionResetError(); next try in 0.00 s"),
        (logging.ERROR, "flaky() failed, 3 in all: ConnectionResetError(); giving up"),
    ]


def test_a_percent_sign_in_a_message_is_a_percent_sign() -> None:
    notes = Notes()
    retry(Flaky(1), interval=0, logger=logging.LoggerAdapter(notes.logger, {}), retry_log_message="100 %s {e!r}")()
    assert notes.lines == [(logging.INFO, "100 %s ConnectionResetError()")]


class Burden:
    """Something that the function has in its hands when it ends."""


def test_no_cycle_keeps_what_the_function_had_in_its_hands() -> None:
    burdens: list[weakref.ref[Burden]] = []

    def ask(*ends: Any) -> None:
        burden = Burden()
        burdens.append(weakref.ref(burden))
        end = ends[min(len(burdens), len(ends)) - 1]
        if end is not None:
            if end is gevent.sleep:
                gevent.sleep(NEVER)
            raise end()

    reset = ConnectionResetError
    scenarios: list[tuple[tuple[Any, ...], type[BaseException] | None, float | None]] = [
        ((reset, None), None, None),
        ((reset, None), None, BOUND),
        ((reset,), reset, None),
        ((reset,), reset, BOUND),
        ((reset, gevent.GreenletExit), gevent.GreenletExit, None),
        ((reset, gevent.GreenletExit), gevent.GreenletExit, BOUND),
        ((reset, gevent.sleep), reset, 0.02),
        ((gevent.sleep,), TimeoutError, 0.02),
    ]
    gc.disable()
    try:
        for ends, error, deadline in scenarios:
            again = retry(ask, max_failures=2, interval=0, deadline=deadline)
            if error is None:
                again(*ends)
            else:
                try:
                    again(*ends)
                except error:
                    pass
                else:
                    pytest.fail(f"{error} expected")
            gevent.sleep(0.001)  # the hub is still in the callback in which it threw a timeout
            assert burdens
            assert not any(burden() for burden in burdens), (ends, error, deadline)
            burdens.clear()
    finally:
        gc.enable()


# -- With a pool --


def test_another_connection_is_used_for_each_try() -> None:
    with LineEchoServer() as server, Pool(TcpConnection, {"host": server.host, "port": server.port}) as pool:
        used: list[TcpConnection] = []

        @retry(interval=0)
        def ask(question: bytes) -> bytes:
            with pool.connection(timeout=BOUND) as conn:
                used.append(conn)
                conn.send(question + b"\n")
                if len(used) < 3:
                    conn.socket.shutdown(socket.SHUT_RDWR)
                return conn.recv_until(b"\n")

        assert ask(b"hello") == b"hello"
        assert len(used) == len(set(map(id, used))) == 3
        assert pool.stats().closed["discarded"] == 2
        assert (pool.idle, pool.in_use) == (1, 0)


class Resp(TcpConnection):
    """As much of Valkey's protocol as this test speaks."""

    def ask(self, *words: str) -> bytes:
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        self.send(f"*{len(words)}\r\n{''.join(parts)}".encode())
        kind = self.recv_until(b"\r\n")
        if not kind.startswith(b"$"):
            raise ConnectionResetError(kind)  # it is starting or shutting down
        return self.recv_exactly(int(kind[1:]) + 2)[:-2]


@pytest.mark.parametrize("outage", ["none", "until a request has failed"])
def test_no_request_fails_when_the_server_restarts(valkey: Valkey, logged: Logged, outage: str) -> None:
    requests, greenlets, connections = 60, 10, 6
    notes = Notes()
    failed = Event()
    halfway = Event()
    replies = 0

    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failed.set()

    notes.logger.addHandler(Failing())

    @retry(logger=notes.logger, backoff=(0.001, 0.05), deadline=BOUND)
    def ask(text: str) -> bytes:
        with pool.connection(timeout=BOUND) as conn:
            return conn.ask("ECHO", text)

    def borrower(number: int) -> None:
        nonlocal replies
        for turn in range(requests):
            text = f"{number}.{turn}"
            assert ask(text).decode() == text
            replies += 1
            if replies == requests * greenlets // 2:
                halfway.set()

    options = {"host": valkey.host, "port": valkey.port, "timeout": BOUND}
    with Pool(Resp, options, max_connections=connections) as pool:
        jobs = [gevent.spawn(borrower, number) for number in range(greenlets)]
        assert halfway.wait(BOUND)
        if outage == "none":
            valkey.restart()
        else:
            valkey.kill()
            assert failed.wait(BOUND)
            gevent.sleep(0)
            valkey.start()
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert all(job.successful() for job in jobs)
        assert replies == requests * greenlets
        assert failed.is_set()
        assert {level for level, _ in notes.lines} == {logging.INFO}
        assert pool.in_use == 0
    # A dial may have failed when its borrower had found another connection.
    assert all("a dial failed" in record.getMessage() for record in logged.take())
    valkey.wait_for_connections(0)

"""What a pool does with arguments, factories, connections and peers that are not as they should be.

Whatever it is, the pool goes on and no slot is lost: after each test as many borrowers as there may be are served at
once.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import gevent
import pytest
from gevent.event import Event

from gsocketpool import (
    Connection,
    ConnectionNotFoundError,
    Pool,
    PoolError,
    PoolExhaustedError,
    TcpConnection,
    wrap,
)
from gsocketpool.connection import EndOfStreamError, LimitExceededError

from .conftest import Crashed, Logged, shown
from .proxy import Proxy
from .servers import LineEchoServer, Server, swallow

#: Seconds after which what a test waits for is taken not to come.
BOUND = 10.0

NUMBERS_TOO_LOW = (-1, -(2**70))
NO_WHOLE_NUMBERS: tuple[Any, ...] = ("3", 2.5, None, True, [], math.nan)
NO_SECONDS: tuple[Any, ...] = ("3", b"3", [], True, 1j)
SECONDS_TOO_LOW = (-1, -0.001, math.nan, math.inf, -math.inf)

#: Each parameter of the pool, with values of a wrong type and wrong values of a right type.
WRONG: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "factory": ((None, 5, "TcpConnection", Connection(), {}), ()),
    "options": ((5, "host", [("port", 1)], {1: 2}), ()),
    "initial_connections": (NO_WHOLE_NUMBERS, (*NUMBERS_TOO_LOW, 5)),  # max_connections is 4
    "max_connections": (NO_WHOLE_NUMBERS, (0, *NUMBERS_TOO_LOW)),
    "reap_expired_connections": (("no", 2.5, []), ()),
    "reap_interval": ((*NO_SECONDS, None), (0, 0.0, *SECONDS_TOO_LOW)),
    "name": ((5, b"name", ["name"]), ()),
    "acquire_timeout": (NO_SECONDS, SECONDS_TOO_LOW),
    "check_after_idle": (NO_SECONDS, SECONDS_TOO_LOW),
    "discard_on": ((5, None, "OSError", OSError(), int, [OSError], (OSError, 5), (OSError, (KeyError,))), ()),
    "max_connecting": (NO_WHOLE_NUMBERS, (0, *NUMBERS_TOO_LOW)),
    "max_waiting": (("3", 2.5, True, [], math.nan), NUMBERS_TOO_LOW),
    "order": ((), ("", "LIFO", "random", 5, None, b"lifo", [])),
    "min_idle": (NO_WHOLE_NUMBERS, (*NUMBERS_TOO_LOW, 5)),
    "idle_timeout": (NO_SECONDS, (0, 0.0, *SECONDS_TOO_LOW)),
    "max_lifetime": (NO_SECONDS, (0, 0.0, *SECONDS_TOO_LOW)),
    "lifetime_jitter": ((*NO_SECONDS, None), (1.001, 2, *SECONDS_TOO_LOW)),
    "max_uses": (("3", 2.5, True, [], math.nan), (0, *NUMBERS_TOO_LOW)),
    "keepalive": (NO_SECONDS, (0, 0.0, *SECONDS_TOO_LOW)),
    "backoff": ((None, 5, "12", [1, 2], (), (1,), (1, 2, 3)), ((2, 1), (0.2, 0.1))),
    "leak_threshold": (NO_SECONDS, (0, 0.0, *SECONDS_TOO_LOW)),
    "reclaim": (("no", 2.5, []), ()),
}


def cases(of: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]) -> list[Any]:
    """One for each wrong value: parameter, value, error."""
    return [
        pytest.param(name, value, kinds, id=f"{name}={shown(value)}")
        for name, (types, values) in of.items()
        for kinds, wrong in ((TypeError, types), (ValueError, values))
        for value in wrong
    ]


class Never(Connection):
    """Must not even be made."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1


def check_refusal(error: BaseException, name: str, value: object) -> None:
    """It names the parameter and says what that takes, and what it got."""
    text = str(error)
    assert re.match(rf"{name} must (not )?be ", text), text
    assert repr(value) in text or str(value) in text


# Arguments


@pytest.mark.parametrize(("name", "value", "kind"), cases(WRONG))
def test_a_wrong_argument_is_refused_by_its_name_before_anything_is_opened(
    name: str, value: Any, kind: type[Exception]
) -> None:
    Never.made = 0
    arguments: dict[str, Any] = {"factory": Never, "max_connections": 4, "initial_connections": 1, name: value}
    with pytest.raises(kind) as raised:
        Pool(**arguments)

    check_refusal(raised.value, name, value)
    assert Never.made == 0


WRONG_IN_BACKOFF = {"backoff": ((*NO_SECONDS, None), (0, 0.0, *SECONDS_TOO_LOW))}


@pytest.mark.parametrize(("name", "value", "kind"), cases(WRONG_IN_BACKOFF))
@pytest.mark.parametrize("first", [True, False])
def test_a_backoff_of_which_one_part_is_wrong_is_refused(
    name: str, value: Any, kind: type[Exception], first: bool
) -> None:
    Never.made = 0
    with pytest.raises(kind) as raised:
        Pool(Never, min_idle=1, backoff=(value, 1) if first else (1, value))
    check_refusal(raised.value, name, value)
    assert Never.made == 0


@pytest.mark.parametrize(
    "options",
    [
        {"min_idle": 4, "initial_connections": 4},
        {"idle_timeout": 10**9, "max_lifetime": 1e9, "keepalive": 1e9, "leak_threshold": 1e9},
        {"idle_timeout": 1e-9, "max_lifetime": None, "keepalive": None, "leak_threshold": None, "max_uses": None},
        {"lifetime_jitter": 0, "max_lifetime": 1000},
        {"lifetime_jitter": 1.0, "max_lifetime": 1e9},
        {"max_uses": 1},
        {"max_uses": 2**70},
        {"backoff": (1, 1)},
        {"backoff": (0.001, 1e9)},
        {"reclaim": 1},
    ],
    ids=str,
)
def test_values_at_the_edge_of_what_may_be_are_taken(server: LineEchoServer, options: dict[str, Any]) -> None:
    with Pool(Line, options_for(server), max_connections=4, **options) as pool:
        for _ in range(3):
            serves_all_at_once(pool, 4)


def test_an_argument_that_there_is_not_is_named() -> None:
    with pytest.raises(TypeError, match="max_conections"):
        Pool(Never, max_conections=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        Pool(Never, {}, 1, 1, True, 60, "name")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="factory"):
        Pool()  # type: ignore[call-arg]


def test_a_pool_that_was_refused_is_harmless() -> None:
    pool: Pool[Any] = Pool.__new__(Pool)
    with pytest.raises(TypeError):
        pool.__init__(None)  # type: ignore[misc]
    repr(pool)
    pool.__del__()


class Line(TcpConnection):
    """Speaks in lines."""

    def ask(self, line: bytes) -> bytes:
        self.send(line + b"\n")
        return self.recv_until(b"\n")


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


def options_for(server: Server) -> dict[str, Any]:
    return {"host": server.host, "port": server.port}


def serves_all_at_once(pool: Pool[Any], count: int) -> None:
    """As many borrowers as the pool may serve get an open connection at the same time."""
    holding: list[object] = []
    all_here = Event()

    def borrow(number: int) -> None:
        with pool.connection(timeout=BOUND) as connection:
            holding.append(connection)
            if len(holding) == count:
                all_here.set()
            assert all_here.wait(BOUND), f"only {len(holding)} of {count} are served at once: {pool!r}"
            if isinstance(connection, Line):
                assert connection.ask(b"%d" % number) == b"%d" % number

    greenlets = [gevent.spawn(borrow, number) for number in range(count)]
    try:
        gevent.joinall(greenlets, raise_error=True, timeout=3 * BOUND)
    finally:
        gevent.killall(greenlets)
    assert len({id(connection) for connection in holding}) == count
    assert pool.faults() == []
    assert pool.in_use == pool.waiting == 0


WRONG_FOR_ACQUIRE: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "retry": (NO_WHOLE_NUMBERS, NUMBERS_TOO_LOW),
    "retried": (NO_WHOLE_NUMBERS, NUMBERS_TOO_LOW),
    "timeout": (NO_SECONDS, SECONDS_TOO_LOW),
}


@pytest.mark.parametrize("state", ["empty", "idle", "full"])
@pytest.mark.parametrize(("name", "value", "kind"), cases(WRONG_FOR_ACQUIRE))
def test_a_wrong_argument_of_acquire_is_refused_whatever_the_pool_has(
    server: LineEchoServer, state: str, name: str, value: Any, kind: type[Exception]
) -> None:
    with Pool(Line, options_for(server), initial_connections=(state != "empty" and 1) or 0, max_connections=1) as pool:
        borrowed = pool.acquire() if state == "full" else None
        size = pool.size
        with pytest.raises(kind) as raised:
            pool.acquire(**{name: value})
        check_refusal(raised.value, name, value)
        assert (pool.size, pool.in_use, pool.waiting) == (size, size if borrowed else 0, 0)
        if borrowed:
            pool.release(borrowed)
        serves_all_at_once(pool, 1)


@pytest.mark.parametrize("state", ["empty", "idle"])
@pytest.mark.parametrize(("name", "value", "kind"), cases({"timeout": WRONG_FOR_ACQUIRE["timeout"]}))
def test_a_wrong_argument_of_connection_is_refused_whatever_the_pool_has(
    server: LineEchoServer, state: str, name: str, value: Any, kind: type[Exception]
) -> None:
    with Pool(Line, options_for(server), initial_connections=(state == "idle" and 1) or 0, max_connections=1) as pool:
        size = pool.size
        with pytest.raises(kind) as raised, pool.connection(**{name: value}):
            pass
        check_refusal(raised.value, name, value)
        assert (pool.size, pool.in_use) == (size, 0)
        serves_all_at_once(pool, 1)


@pytest.mark.parametrize(("name", "value", "kind"), cases({"max_connections": WRONG["max_connections"]}))
def test_a_wrong_size_is_refused_and_the_pool_keeps_the_one_it_has(
    server: LineEchoServer, name: str, value: Any, kind: type[Exception]
) -> None:
    with Pool(Line, options_for(server), initial_connections=2, max_connections=2) as pool:
        before = pool.stats()
        with pytest.raises(kind) as raised:
            pool.resize(value)
        check_refusal(raised.value, name, value)
        assert pool.stats() == before
        serves_all_at_once(pool, 2)


@pytest.mark.parametrize("method", ["wait_ready", "close"])
@pytest.mark.parametrize(("name", "value", "kind"), cases({"timeout": WRONG_FOR_ACQUIRE["timeout"]}))
def test_a_wrong_timeout_is_refused_before_anything_is_waited_for_or_closed(
    server: LineEchoServer, method: str, name: str, value: Any, kind: type[Exception]
) -> None:
    with Pool(Line, options_for(server), max_connections=2, min_idle=1) as pool:
        with pytest.raises(kind) as raised:
            getattr(pool, method)(value)
        check_refusal(raised.value, name, value)
        assert not pool.closed
        pool.wait_ready(BOUND)
        serves_all_at_once(pool, 2)


@pytest.mark.parametrize("method", ["clear", "pause", "resume", "holders", "stats"])
def test_methods_that_take_no_argument_say_so(server: LineEchoServer, method: str) -> None:
    with Pool(Line, options_for(server), max_connections=2) as pool:
        with pytest.raises(TypeError, match=method):
            getattr(pool, method)(1)
        serves_all_at_once(pool, 2)


def test_text_is_not_sent_and_the_pool_goes_on(server: LineEchoServer) -> None:
    with Pool(Line, options_for(server), max_connections=2) as pool:
        with pytest.raises(TypeError, match="encode"), pool.connection() as line:
            line.send("text")  # type: ignore[arg-type]
        serves_all_at_once(pool, 2)


@pytest.mark.parametrize("stranger", [None, 5, "connection", Connection(), Line, []], ids=lambda s: type(s).__name__)
def test_what_is_no_connection_of_the_pool_can_be_neither_released_nor_dropped(
    server: LineEchoServer, stranger: Any
) -> None:
    with Pool(Line, options_for(server), max_connections=2, name="mine") as pool:
        for _ in range(2):  # with and without a connection that idles
            with pytest.raises(ConnectionNotFoundError, match="'mine'"):
                pool.release(stranger)
            with pytest.raises(ConnectionNotFoundError, match="'mine'"):
                pool.drop(stranger)
            serves_all_at_once(pool, 2)


def test_a_block_cannot_be_entered_twice(server: LineEchoServer) -> None:
    with Pool(Line, options_for(server), max_connections=2) as pool:
        block = pool.connection()
        with block as line:
            with pytest.raises(RuntimeError, match="entered already"), block:
                pass
            assert line.ask(b"still mine") == b"still mine"
        serves_all_at_once(pool, 2)


# Factories


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "product", [None, 5, "a connection", object(), Line, Unprintable()], ids=lambda p: type(p).__name__
)
def test_a_factory_of_something_else_than_a_connection_is_a_type_error_and_costs_no_slot(
    server: LineEchoServer, product: Any
) -> None:
    wrong = [product] * 3

    def factory() -> Any:
        return wrong.pop() if wrong else Line(**options_for(server))

    with Pool(factory, max_connections=2) as pool:
        for _ in range(3):
            with pytest.raises(TypeError, match=r"no gsocketpool\.Connection: .*wrap"):
                pool.acquire()
            assert pool.size == 0
        serves_all_at_once(pool, 2)


@pytest.mark.parametrize("product", [None, 5], ids=shown)
def test_initial_connections_of_a_wrong_kind_are_refused_by_the_constructor(
    server: LineEchoServer, product: Any
) -> None:
    right = [Line(**options_for(server)) for _ in range(2)]

    with pytest.raises(TypeError, match=r"no gsocketpool\.Connection"):
        Pool(lambda: right.pop() if right else product, initial_connections=4, max_connecting=1)
    server.wait_open(0)
    assert server.accepted == 2


def test_a_wrapped_factory_that_returns_none_is_a_type_error_and_costs_no_slot() -> None:
    wrong = [None] * 3

    class Thing:
        def close(self) -> None:
            pass

    with Pool(wrap(lambda: wrong.pop() if wrong else Thing()), max_connections=2) as pool:
        for _ in range(3):
            with pytest.raises(TypeError, match=r"wrap\(\) returned None"):
                pool.acquire()
        serves_all_at_once(pool, 2)


@pytest.mark.parametrize("while_it", ["is lent", "idles", "is being opened", "is being closed"])
def test_the_same_object_twice_is_a_clear_error_and_costs_no_slot(server: LineEchoServer, while_it: str) -> None:
    go_on, there = Event(), Event()

    class Slow(Line):
        def open(self) -> None:
            if while_it == "is being opened":
                there.set()
                go_on.wait()
            super().open()

        def close(self) -> None:
            if while_it == "is being closed":
                there.set()
                go_on.wait()
            super().close()

    same = Slow(**options_for(server))
    products: list[Line] = [same, same]

    def factory() -> Line:
        return products.pop() if products else Line(**options_for(server))

    with Pool(factory, max_connections=4) as pool:
        first = gevent.spawn(pool.acquire)
        if while_it == "is being opened":
            there.wait()
        else:
            first.join()
        dropping = None
        if while_it == "idles":
            pool.release(same)
            pool.expect_resets()
        if while_it == "is being closed":
            dropping = gevent.spawn(pool.drop, same)
            there.wait()
        others = [pool.acquire()] if while_it == "idles" else []
        if while_it == "idles":
            assert others == [same]
        with pytest.raises(PoolError, match="in the pool already, where a new one each time is needed"):
            pool.acquire()
        go_on.set()
        first.join()
        if dropping:
            dropping.join()
        else:
            assert same.ask(b"neither opened again nor closed") == b"neither opened again nor closed"
            pool.release(same)
        serves_all_at_once(pool, 4)


def test_a_wrapped_function_that_returns_the_same_object_twice_is_a_clear_error(server: LineEchoServer) -> None:
    same = Line(**options_for(server))
    same.open()
    products = [same, same, same]

    def connect() -> Line:
        if products:
            return products.pop()
        line = Line(**options_for(server))
        line.open()
        return line

    with Pool(wrap(connect), max_connections=3) as pool:
        with pool.connection():
            for _ in range(2):
                with pytest.raises(PoolError, match="in the pool already"):
                    pool.acquire()
            assert same.ask(b"open") == b"open"
        serves_all_at_once(pool, 3)


class Odd(Exception):
    """Somebody's own."""


class OddBase(BaseException):
    """Somebody's own, that is no Exception."""


@pytest.mark.parametrize("error", [Odd("odd"), OSError(5, "odd"), OddBase("odd"), gevent.Timeout(5)], ids=shown)
def test_what_a_factory_raises_is_raised_in_the_borrower_and_costs_no_slot(
    server: LineEchoServer, error: BaseException
) -> None:
    errors = [error] * 3

    def factory(**options: Any) -> Line:
        if errors:
            raise errors.pop()
        return Line(**options)

    with Pool(factory, options_for(server), max_connections=2) as pool:
        for _ in range(3):
            with pytest.raises(type(error)) as raised:
                pool.acquire()
            assert raised.value is error
        serves_all_at_once(pool, 2)
        assert pool.stats().open_failures == 3


def test_options_that_the_factory_does_not_take_are_its_own_error(server: LineEchoServer) -> None:
    with Pool(Line, {**options_for(server), "prot": 5}, max_connections=2) as pool:
        for _ in range(3):
            with pytest.raises(TypeError, match="prot"):
                pool.acquire()
        assert pool.faults() == []
        assert pool.stats().opening == 0


# Connections that misbehave


class Trouble:
    """Says what goes wrong: a function for each method in question. It may raise, block, or return another answer."""

    def __init__(self, **on: Callable[[Any], Any]) -> None:
        self.on = on
        self.times: dict[str, int] = {}

    def strike(self, method: str, connection: Any) -> Any:
        if method not in self.on:
            return None
        self.times[method] = self.times.get(method, 0) + 1
        return self.on[method](connection)

    def over(self) -> None:
        self.on.clear()


class Faulty(Line):
    """In trouble. `open` strikes before it is open, `opened` after; `close` before it closes, which it always does."""

    def __init__(self, host: str, port: int, trouble: Trouble) -> None:
        super().__init__(host, port, timeout=BOUND)
        self.trouble = trouble

    def open(self) -> None:
        self.trouble.strike("open", self)
        super().open()
        self.trouble.strike("opened", self)

    def close(self) -> None:
        try:
            self.trouble.strike("close", self)
        finally:
            super().close()

    def is_connected(self) -> bool:
        answer = self.trouble.strike("is_connected", self)
        return super().is_connected() if answer is None else bool(answer)

    def is_expired(self) -> bool:
        answer = self.trouble.strike("is_expired", self)
        return super().is_expired() if answer is None else bool(answer)

    def check(self) -> bool:
        answer = self.trouble.strike("check", self)
        return super().check() if answer is None else bool(answer)


class FaultyWithReset(Faulty):
    def reset(self) -> None:
        self.trouble.strike("reset", self)


class HastyPool(Pool[Any]):
    close_grace: ClassVar[float] = 0.05


def faulty_pool(server: Server, trouble: Trouble, count: int = 3, **keywords: Any) -> Pool[Any]:
    factory = FaultyWithReset if "reset" in trouble.on else Faulty
    return HastyPool(
        factory, {**options_for(server), "trouble": trouble}, max_connections=count, name="faulty", **keywords
    )


def raising(error: BaseException) -> Callable[[Any], Any]:
    def strike(connection: Any) -> Any:
        raise error

    return strike


def hanging(connection: Any) -> None:
    Event().wait()


def check_logged(logged: Logged, count: int, text: str) -> None:
    """So many records, each with the pool's name and the error."""
    for record in logged.take(count):
        assert record.getMessage().startswith("HastyPool 'faulty': ")
        assert text in record.getMessage()
        assert record.exc_info


ERRORS = [Odd("odd"), AssertionError(), OSError(5, "odd"), TimeoutError("odd"), PoolError("odd")]
INTERRUPTIONS = [gevent.GreenletExit(), gevent.Timeout(5), OddBase("odd"), GeneratorExit()]


# open()


@pytest.mark.parametrize("moment", ["open", "opened"])
@pytest.mark.parametrize("error", [*ERRORS, *INTERRUPTIONS], ids=lambda e: type(e).__name__)
def test_an_open_that_raises_is_raised_in_the_borrower_and_costs_no_slot(
    server: LineEchoServer, error: BaseException, moment: str
) -> None:
    trouble = Trouble(**{moment: raising(error)})
    with faulty_pool(server, trouble) as pool:
        for _ in range(4):
            with pytest.raises(PoolError if isinstance(error, gevent.GreenletExit) else type(error)) as raised:
                pool.acquire()
            if not isinstance(error, gevent.GreenletExit):  # that would end the borrower, whom nobody has killed
                assert raised.value is error
            assert pool.size == 0
        server.wait_open(0)  # what was open already was closed
        trouble.over()
        serves_all_at_once(pool, 3)
        assert pool.stats().open_failures == 4


def test_an_open_that_fails_and_then_cannot_be_closed_either_is_raised_and_costs_no_slot(
    server: LineEchoServer,
) -> None:
    trouble = Trouble(opened=raising(Odd("odd")), close=raising(Odd("close is odd, too")))
    with faulty_pool(server, trouble) as pool:
        for _ in range(4):
            with pytest.raises(Odd, match=r"^odd$"):
                pool.acquire()
        server.wait_open(0)
        trouble.over()
        serves_all_at_once(pool, 3)


def test_an_open_that_fails_and_then_hangs_as_it_closes_is_raised_and_costs_no_slot(server: LineEchoServer) -> None:
    trouble = Trouble(opened=raising(Odd("odd")), close=hanging)
    with faulty_pool(server, trouble) as pool:
        for _ in range(4):
            with pytest.raises(Odd, match=r"^odd$"):
                pool.acquire(timeout=BOUND)
        server.wait_open(0)
        trouble.over()
        serves_all_at_once(pool, 3)


def test_an_open_that_hangs_keeps_nobody_beyond_his_deadline_and_gives_its_slot_back_in_the_end(
    server: LineEchoServer,
) -> None:
    go_on = Event()
    trouble = Trouble(open=lambda connection: go_on.wait() and None)
    with faulty_pool(server, trouble) as pool:
        for _ in range(5):
            with gevent.Timeout(BOUND), pytest.raises(PoolExhaustedError):
                pool.acquire(timeout=0.01)
        assert pool.stats().opening == 3  # no more than there are slots
        go_on.set()
        trouble.over()
        server.wait_open(3)
        serves_all_at_once(pool, 3)
        assert server.accepted == 3


def test_an_open_that_hangs_and_fails_when_nobody_waits_any_more_is_logged_once(
    server: LineEchoServer, logged: Logged
) -> None:
    go_on = Event()

    def hang_and_fail(connection: Any) -> None:
        go_on.wait()
        raise Odd("odd")

    trouble = Trouble(open=hang_and_fail)
    with faulty_pool(server, trouble) as pool:
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.01)
        go_on.set()
        check_logged(logged, 1, "odd")
        trouble.over()
        serves_all_at_once(pool, 3)


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
def test_an_open_whose_greenlet_is_killed_is_an_error_of_the_borrower_and_costs_no_slot(
    server: LineEchoServer, error: BaseException
) -> None:
    dials: list[Any] = []
    there = Event()

    def hang(connection: Any) -> None:
        dials.append(gevent.getcurrent())
        there.set()
        hanging(connection)

    trouble = Trouble(open=hang)
    with faulty_pool(server, trouble) as pool:
        for _ in range(4):
            there.clear()
            borrower = gevent.spawn(error_of, pool.acquire, timeout=BOUND)
            there.wait()
            dials[-1].kill(error)
            assert isinstance(borrower.get(), PoolError if isinstance(error, gevent.GreenletExit) else type(error))
        trouble.over()
        serves_all_at_once(pool, 3)


def test_a_dial_that_is_killed_before_it_begins_is_made_all_the_same(server: LineEchoServer) -> None:
    with faulty_pool(server, Trouble()) as pool:
        before = greenlets()
        borrower = gevent.spawn(pool.acquire, timeout=BOUND)
        borrower.start()
        gevent.sleep(0)
        for dial in greenlets() - before - {borrower}:
            dial.kill(block=False)
        borrower.join(BOUND)
        assert borrower.successful(), borrower.exception
        pool.release(borrower.value)
        serves_all_at_once(pool, 3)


def error_of(function: Callable[..., Any], **arguments: Any) -> BaseException | None:
    """Call it, and return what it raises."""
    try:
        function(**arguments)
    except BaseException as error:
        return error
    return None


def greenlets() -> set[Any]:
    """Greenlets that have not ended."""
    import gc

    return {g for g in gc.get_objects() if isinstance(g, gevent.Greenlet) and not g.dead}


def test_initial_connections_of_which_one_fails_are_closed_and_its_error_raised(server: LineEchoServer) -> None:
    opened: list[Any] = []

    def third_fails(connection: Any) -> None:
        opened.append(connection)
        if len(opened) == 3:
            raise Odd("odd")

    with pytest.raises(Odd, match="odd"):
        faulty_pool(server, Trouble(opened=third_fails), count=10, initial_connections=5)
    server.wait_open(0)


# close()


@pytest.mark.parametrize("error", [*ERRORS, *INTERRUPTIONS], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("by", ["drop", "discard", "check", "expire", "close"])
def test_a_close_that_raises_is_logged_once_and_costs_no_slot(
    server: LineEchoServer, logged: Logged, error: BaseException, by: str
) -> None:
    trouble = Trouble(close=raising(error))
    with faulty_pool(server, trouble, check_after_idle=0) as pool:
        line = pool.acquire()
        if by == "drop":
            pool.drop(line)
        elif by == "discard":
            pool.release(line)
            with pytest.raises(Odd, match="in the block"), pool.connection():
                raise Odd("in the block")
        elif by == "check":
            pool.release(line)
            trouble.on["check"] = lambda connection: connection is not line
            with pool.connection() as other:
                assert other is not line
        elif by == "expire":
            pool.release(line)
            trouble.on["is_expired"] = lambda connection: True
            pool.drop_expired()
        else:
            pool.release(line)
            pool.close()
            pool.close()
        check_logged(logged, 1, "close() failed")
        assert trouble.times["close"] == 1
        trouble.over()
        if by != "close":
            serves_all_at_once(pool, 3)
        assert pool.faults() == []
    assert pool.total == 0


@pytest.mark.parametrize("by", ["drop", "discard", "expire", "close"])
def test_a_close_that_blocks_is_given_up_and_logged_and_costs_no_slot(
    server: LineEchoServer, logged: Logged, by: str
) -> None:
    trouble = Trouble(close=hanging)
    with faulty_pool(server, trouble, count=1) as pool:
        line = pool.acquire()
        if by == "drop":
            pool.drop(line)
        elif by == "discard":
            pool.release(line)
            with pytest.raises(Odd, match="in the block"), pool.connection():
                raise Odd("in the block")
        elif by == "expire":
            pool.release(line)
            trouble.on["is_expired"] = lambda connection: True
            pool.drop_expired()
        else:
            pool.release(line)
            pool.close()
        if by == "discard":
            # Its socket is still open: so its slot is taken until it is given up.
            with pytest.raises(PoolExhaustedError):
                pool.acquire(timeout=0)
        check_logged(logged, 1, "not done after 0.05 s")
        trouble.over()
        if by != "close":
            serves_all_at_once(pool, 1)
        assert (server.most, pool.faults()) == (1, [])
    server.wait_open(0)


def test_a_close_that_swallows_the_kill_is_waited_for_and_costs_no_slot(server: LineEchoServer) -> None:
    go_on, tried = Event(), Event()

    def stubborn(connection: Any) -> None:
        try:
            go_on.wait()
        except BaseException:
            tried.set()
            go_on.wait()

    trouble = Trouble(close=stubborn)
    with faulty_pool(server, trouble, count=1) as pool:
        with pytest.raises(Odd), pool.connection():
            raise Odd
        tried.wait()
        with pytest.raises(PoolExhaustedError):
            pool.acquire(timeout=0.01)
        assert server.open == 1
        go_on.set()
        serves_all_at_once(pool, 1)
        trouble.over()
        assert server.most == 1


def test_a_close_whose_greenlet_is_killed_is_logged_once_and_costs_no_slot(
    server: LineEchoServer, logged: Logged
) -> None:
    closing: list[Any] = []
    there = Event()

    def hang(connection: Any) -> None:
        closing.append(gevent.getcurrent())
        there.set()
        hanging(connection)

    trouble = Trouble(close=hang)
    with faulty_pool(server, trouble, count=1) as pool:
        pool.close_grace = BOUND  # type: ignore[misc]
        line = pool.acquire()
        dropping = gevent.spawn(pool.drop, line)
        there.wait()
        closing[0].kill()
        dropping.get(timeout=BOUND)
        check_logged(logged, 1, "close() failed")
        trouble.over()
        serves_all_at_once(pool, 1)


def test_connections_that_all_block_as_they_close_are_closed_side_by_side(
    server: LineEchoServer, logged: Logged
) -> None:
    go_on, all_here = Event(), Event()

    def hang(connection: Any) -> None:
        if trouble.times["close"] == 40:
            all_here.set()
        go_on.wait()
        raise Odd("odd")

    trouble = Trouble(close=hang)
    with faulty_pool(server, trouble, count=40, initial_connections=40) as pool:
        pool.close_grace = 3 * BOUND  # type: ignore[misc]
        closing = gevent.spawn(pool.close)
        assert all_here.wait(BOUND), f"{trouble.times} at once, not 40"
        assert not closing.ready()
        go_on.set()
        closing.get(timeout=BOUND)
    check_logged(logged, 40, "odd")
    trouble.over()
    server.wait_open(0)


# is_connected(), is_expired(), check(), reset()


@pytest.mark.parametrize("by", ["drop", "close", "expire"])
@pytest.mark.parametrize("error", [Odd("odd"), OddBase("odd"), gevent.GreenletExit()], ids=lambda e: type(e).__name__)
def test_an_is_connected_that_raises_is_logged_once_and_the_connection_closed_all_the_same(
    server: LineEchoServer, logged: Logged, error: BaseException, by: str
) -> None:
    trouble = Trouble()
    with faulty_pool(server, trouble) as pool:
        line = pool.acquire()
        trouble.on["is_connected"] = raising(error)
        if by == "drop":
            pool.drop(line)
        else:
            pool.release(line)
            if by == "close":
                pool.close()
            else:
                trouble.on["is_expired"] = lambda connection: True
                pool.drop_expired()
        check_logged(logged, 1, repr(error))
        server.wait_open(0)
        trouble.over()
        if by != "close":
            serves_all_at_once(pool, 3)
        assert pool.faults() == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_check_that_raises_discards_the_connection_and_is_logged_once(
    server: LineEchoServer, logged: Logged, error: BaseException
) -> None:
    trouble = Trouble()
    with faulty_pool(server, trouble, check_after_idle=0) as pool:
        with pool.connection() as line:
            pass
        trouble.on["check"] = raising(error)
        with pool.connection() as other:
            assert other is not line
            assert other.ask(b"hello") == b"hello"
        check_logged(logged, 1, "check() failed")
        trouble.over()
        assert pool.stats().closed["stale"] == 1
        serves_all_at_once(pool, 3)


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
def test_a_check_that_is_interrupted_discards_the_connection_and_is_raised(
    server: LineEchoServer, error: BaseException
) -> None:
    trouble = Trouble()
    with faulty_pool(server, trouble, check_after_idle=0) as pool:
        with pool.connection():
            pass
        trouble.on["check"] = raising(error)
        with pytest.raises(type(error)), pool.connection():
            pass
        trouble.over()
        server.wait_open(0)
        assert pool.size == 0
        serves_all_at_once(pool, 3)


def test_checks_that_raise_for_all_that_idles_lead_to_a_new_connection(server: LineEchoServer, logged: Logged) -> None:
    trouble = Trouble()
    with faulty_pool(server, trouble, count=5, initial_connections=5, check_after_idle=0) as pool:
        trouble.on["check"] = raising(Odd("odd"))
        with pool.connection(timeout=BOUND) as line:
            assert line.ask(b"hello") == b"hello"
        check_logged(logged, 5, "odd")
        trouble.over()
        serves_all_at_once(pool, 5)


def test_the_default_check_of_a_connection_whose_is_connected_raises(logged: Logged) -> None:
    class Toy(Connection):
        """Without a socket, as a connection over shared memory may be."""

        odd = False
        closed = 0

        def open(self) -> None:
            pass

        def close(self) -> None:
            self.closed += 1

        def is_connected(self) -> bool:
            if self.odd:
                raise Odd("odd")
            return True

    with HastyPool(Toy, max_connections=2, check_after_idle=0, name="faulty") as pool:
        with pool.connection() as toy:
            toy.odd = True
        with pool.connection() as other:
            assert other is not toy
        serves_all_at_once(pool, 2)
        assert toy.closed == 1
        records = logged.take()
        assert 1 <= len(records) <= 2  # it failed twice: as it was checked, and before it was closed


def test_an_is_expired_that_raises_discards_that_connection_and_is_logged_once(
    server: LineEchoServer, logged: Logged
) -> None:
    trouble = Trouble()
    with faulty_pool(server, trouble, initial_connections=3) as pool:
        victim = pool.acquire()
        pool.release(victim)

        def expire(connection: Any) -> None:
            if connection is victim:
                raise Odd("odd")

        trouble.on["is_expired"] = expire
        pool.drop_expired()
        check_logged(logged, 1, "is_expired() failed")
        server.wait_open(2)
        assert pool.size == 2
        assert trouble.times["is_expired"] == 3
        trouble.over()
        serves_all_at_once(pool, 3)


def test_the_reaper_survives_an_is_expired_that_raises(server: LineEchoServer, logged: Logged) -> None:
    trouble = Trouble(is_expired=raising(Odd("odd")))
    with faulty_pool(server, trouble, reap_interval=0.02) as pool:
        for _ in range(3):  # each needs a living reaper
            with pool.connection():
                pass
            check_logged(logged, 1, "is_expired() failed")
            server.wait_open(0)
        trouble.over()
        serves_all_at_once(pool, 3)


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
def test_an_is_expired_that_is_interrupted_discards_the_connection_and_is_raised(
    server: LineEchoServer, error: BaseException
) -> None:
    trouble = Trouble()
    with faulty_pool(server, trouble, initial_connections=3) as pool:
        trouble.on["is_expired"] = raising(error)
        with pytest.raises(type(error)):
            pool.drop_expired()
        trouble.over()
        server.wait_open(2)
        serves_all_at_once(pool, 3)


def test_the_reaper_survives_an_is_expired_that_ends_its_greenlet(
    server: LineEchoServer, logged: Logged, crashed: Crashed
) -> None:
    asked = Event()

    def expire(connection: Any) -> None:
        asked.set()
        raise OddBase("odd")

    trouble = Trouble(is_expired=expire)
    with faulty_pool(server, trouble, initial_connections=1, reap_interval=0.02) as pool:
        assert asked.wait(BOUND)
        server.wait_open(0)
        trouble.over()
        # It reaps what expires later.
        with pool.connection():
            pass
        trouble.on["is_expired"] = lambda connection: True
        server.wait_open(1)
        server.wait_open(0)
        trouble.over()
        check_logged(logged, 1, "odd")
        serves_all_at_once(pool, 3)
    assert crashed.take() == []  # nothing is raised in the background


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("by", ["release", "block", "failed block"])
def test_a_reset_that_raises_discards_the_connection_and_is_logged_once(
    server: LineEchoServer, logged: Logged, error: BaseException, by: str
) -> None:
    trouble = Trouble(reset=raising(error))
    with faulty_pool(server, trouble, discard_on=()) as pool:
        if by == "release":
            pool.release(pool.acquire())
        elif by == "block":
            with pool.connection():
                pass
        else:
            with pytest.raises(KeyError, match="mine"), pool.connection():
                raise KeyError("mine")
        check_logged(logged, 1, "reset() failed")
        server.wait_open(0)
        assert pool.stats().closed["discarded"] == 1
        trouble.over()
        serves_all_at_once(pool, 3)


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("by", ["release", "block"])
def test_a_reset_that_is_interrupted_discards_the_connection_and_is_raised(
    server: LineEchoServer, error: BaseException, by: str
) -> None:
    trouble = Trouble(reset=raising(error))
    with faulty_pool(server, trouble) as pool:
        if by == "release":
            line = pool.acquire()
            with pytest.raises(type(error)):
                pool.release(line)
        else:
            with pytest.raises(type(error)), pool.connection():
                pass
        server.wait_open(0)
        trouble.over()
        serves_all_at_once(pool, 3)


def test_a_reset_that_hangs_holds_up_its_borrower_alone_and_costs_no_slot(server: LineEchoServer) -> None:
    there = Event()

    def hang(connection: Any) -> None:
        there.set()
        hanging(connection)

    trouble = Trouble(reset=hang)
    with faulty_pool(server, trouble) as pool:
        line = pool.acquire()
        releasing = gevent.spawn(pool.release, line)
        there.wait()
        trouble.over()
        with pool.connection() as other:
            assert other is not line  # not before it is as new
        releasing.kill()
        serves_all_at_once(pool, 3)
        assert pool.stats().closed["discarded"] == 1


def test_errors_of_wrapped_functions_are_treated_alike(logged: Logged) -> None:
    class Thing:
        pass

    calls: list[str] = []

    def fail(what: str) -> Callable[[Thing], object]:
        def function(thing: Thing) -> object:
            calls.append(what)
            raise Odd(what)

        return function

    pool = HastyPool(
        wrap(Thing, close=fail("close"), check=fail("check")), max_connections=2, check_after_idle=0, name="faulty"
    )
    with pool:
        with pool.connection() as thing:
            pass
        with pool.connection() as other:
            assert other is not thing
        logged.take(2)
        assert calls == ["check", "close"]
        serves_all_at_once(pool, 2)
        logged.take()
    logged.take()
    assert pool.faults() == []

    calls.clear()
    with HastyPool(wrap(Thing, close=lambda t: None, reset=fail("reset")), max_connections=2, name="faulty") as pool:
        with pool.connection():
            pass
        check_logged(logged, 1, "reset")
        assert calls == ["reset"]
        assert (pool.size, pool.faults()) == (0, [])


class Hostile(Line):
    """Told apart by identity alone, or not at all."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise Odd("no comparison")

    def __bool__(self) -> bool:
        raise Odd("no truth")

    def __len__(self) -> int:
        raise Odd("no length")

    def __repr__(self) -> str:
        raise Odd("no repr")


def test_connections_that_can_be_neither_compared_nor_hashed_nor_shown_are_pooled_like_others(
    server: LineEchoServer,
) -> None:
    with Pool(Hostile, options_for(server), initial_connections=1, max_connections=3, check_after_idle=0) as pool:
        serves_all_at_once(pool, 3)
        with pool.connection() as one, pool.connection() as two:
            assert one is not two
        with contextlib.suppress(Odd), pool.connection():
            raise Odd
        with pytest.raises(PoolError):
            pool.release(one)
        pool.drop_expired()
        dropped = pool.acquire()
        pool.drop(dropped)
        with pytest.raises(PoolError):
            pool.drop(dropped)
        serves_all_at_once(pool, 3)
        repr(pool), pool.stats()


# Peers


@pytest.fixture
def proxy(server: LineEchoServer) -> Iterator[Proxy]:
    with Proxy(server.host, server.port) as proxy:
        yield proxy


class Unwatched(Line):
    """What its peer does while it idles is noticed when it is lent, and not before."""

    def fileno(self) -> None:
        pass


def close_to(proxy: Proxy, count: int = 3, **keywords: Any) -> Pool[Line]:
    return Pool(Unwatched, {**options_for(proxy), "timeout": BOUND}, max_connections=count, **keywords)


@pytest.mark.parametrize("fault", ["reset", "half_close"])
def test_g8_what_a_peer_did_to_idle_connections_no_borrower_ever_sees(proxy: Proxy, fault: str) -> None:
    with close_to(proxy, initial_connections=3, check_after_idle=0) as pool:
        proxy.wait_open(3)
        getattr(proxy, fault)()
        for number in range(3):
            wait_for_news(pool._members[sorted(pool._members)[number]].connection)
        proxy.forward()
        serves_all_at_once(pool, 3)
        assert pool.stats().closed["stale"] == 3


def wait_for_news(line: Line) -> None:
    """Wait until something has arrived on an idle connection: bytes, the end, or a reset."""
    hub = gevent.get_hub()
    with gevent.Timeout(BOUND):
        hub.wait(hub.loop.io(line.socket.fileno(), 1))


def test_g8_garbage_that_a_peer_sends_unasked_is_no_borrowers_reply() -> None:
    send = Event()

    def noisy(sock: Any) -> None:
        while data := sock.recv(1024):
            sock.sendall(data)
            if b"noise" in data:
                send.wait()
                sock.sendall(b"\xff\x00garbage\n")

    with Server(noisy) as server, Pool(Unwatched, options_for(server), max_connections=3, check_after_idle=0) as pool:
        with pool.connection() as line:
            assert line.ask(b"noise") == b"noise"
        send.set()
        wait_for_news(line)
        with pool.connection() as other:
            assert other is not line
            assert other.ask(b"hello") == b"hello"
        assert pool.stats().closed["stale"] == 1
        serves_all_at_once(pool, 3)


@pytest.mark.parametrize("fault", ["reset", "half_close", "truncate"])
def test_a_peer_that_fails_in_the_middle_of_a_request_costs_that_borrower_his_connection_and_nobody_a_slot(
    proxy: Proxy, fault: str
) -> None:
    with close_to(proxy) as pool:

        def ask_and_fail() -> None:
            with pool.connection() as line:
                assert line.ask(b"hello") == b"hello"
                getattr(proxy, fault)(*([3] if fault == "truncate" else []))
                line.ask(b"hello again")

        for _ in range(4):
            proxy.forward()
            with pytest.raises((ConnectionError, EndOfStreamError)):
                ask_and_fail()
            proxy.wait_open(0)
        proxy.forward()
        serves_all_at_once(pool, 3)
        assert pool.stats().closed["discarded"] == 4


def test_a_peer_that_says_nothing_costs_that_borrower_his_connection_and_nobody_a_slot() -> None:
    with Server(swallow) as server:
        options = {**options_for(server), "timeout": 0.02, "connect_timeout": BOUND}
        with Pool(Line, options, max_connections=2) as pool:
            for _ in range(3):
                with pytest.raises(TimeoutError), pool.connection() as line:
                    line.ask(b"hello")
                server.wait_open(0)
            assert pool.faults() == []
            assert pool.stats().closed["discarded"] == 3


def test_a_peer_that_sends_without_end_costs_that_borrower_his_connection_and_nobody_a_slot() -> None:
    def babble(sock: Any) -> None:
        while True:
            sock.sendall(bytes(65536))

    with Server(babble) as server, Pool(Line, options_for(server), max_connections=2) as pool:
        for _ in range(3):
            with pytest.raises(LimitExceededError), pool.connection() as line:
                line.ask(b"hello")
            server.wait_open(0)
        assert pool.faults() == []


def test_a_peer_that_resets_every_connection_as_it_comes_costs_no_slot(proxy: Proxy) -> None:
    with close_to(proxy) as pool:
        proxy.reset()
        for _ in range(6):
            with contextlib.suppress(OSError), pool.connection(timeout=BOUND) as line:
                line.ask(b"hello")
                pytest.fail("a reply from a connection that was reset")
        proxy.forward()
        serves_all_at_once(pool, 3)


def test_a_peer_that_refuses_is_an_error_of_the_borrower_with_its_address_and_costs_no_slot(proxy: Proxy) -> None:
    with close_to(proxy) as pool:
        proxy.refuse()
        for _ in range(4):
            with pytest.raises(ConnectionRefusedError, match=str(proxy.port)):
                pool.acquire()
        proxy.forward()
        serves_all_at_once(pool, 3)


def test_who_gets_no_connection_is_told_the_last_connect_error_until_a_connect_succeeds(proxy: Proxy) -> None:
    with faulty_pool(proxy, Trouble(), count=1) as pool:
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError) as refused:
            pool.acquire()
        with pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0)
        assert repr(raised.value.last_error) == repr(refused.value)
        assert "Connection refused" in str(raised.value)
        proxy.forward()
        with pool.connection(), pytest.raises(PoolExhaustedError) as raised:
            pool.acquire(timeout=0)
        assert raised.value.last_error is None
        assert "refused" not in str(raised.value)
        serves_all_at_once(pool, 1)

"""Groups: how endpoints are told apart, found, named, counted, closed and forgotten. Their upkeep is in `test_rounds`,
what a cap over all decides in `test_budget`.
"""

from __future__ import annotations

import array
import contextlib
import copy
import gc
import logging
import os
import pickle
import random
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.socket
import pytest
from gevent.event import Event

from gsocketpool import (
    BreakerOpenError,
    Budget,
    Connection,
    ConnectionNotFoundError,
    Pool,
    PoolClosedError,
    PoolExhaustedError,
    PoolGroup,
    TcpConnection,
    UnixConnection,
)
from gsocketpool.forking import pools as all_pools
from gsocketpool.group import MOST_CALLS
from gsocketpool.pool import Endpoint
from tests.conftest import Logged
from tests.dials import BOUND, Attempt
from tests.servers import LineEchoServer, Server, echo_lines, refused_port

SECRET = "hunter2"


class Marked(TcpConnection):
    """Takes any options beside its address: so that one server can be many endpoints."""

    def __init__(self, host: str, port: int, **marks: Any) -> None:
        super().__init__(host, port)
        self.marks = marks

    def ask(self, text: str) -> str:
        self.send(text.encode() + b"\n")
        return self.recv_until(b"\n").decode()


class Slow(Marked):
    """Its close waits until the test lets it go on."""

    begun = 0
    may_go_on = Event()

    def close(self) -> None:
        Slow.begun += 1
        assert Slow.may_go_on.wait(BOUND)
        super().close()


class Gated(Marked):
    """Its dial waits until the test opens the gate."""

    gate = Event()

    def open(self) -> None:
        assert Gated.gate.wait(BOUND)
        super().open()


class Nothing(Connection):
    """A connection to nothing, that takes any options."""

    def __init__(self, /, **options: Any) -> None:
        self.options = options
        self.connected = False

    def open(self) -> None:
        self.connected = True

    def close(self) -> None:
        self.connected = False

    def is_connected(self) -> bool:
        return self.connected


class ServerAt(Server):
    """Listens at a given port."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(echo_lines, host=host)
        self._address = (host, port)


def until(what: str, happened: Callable[[], bool], bound: float = BOUND) -> None:
    """Wait until something has happened, and let everybody else run meanwhile."""
    with gevent.Timeout(bound, AssertionError(f"{what}: it has not come to that in {bound:g} s")):
        while not happened():
            gevent.sleep(0.001)


def at(server: Server) -> dict[str, Any]:
    return {"host": server.host, "port": server.port}


def lend_and_return(group: PoolGroup[Any], **options: Any) -> None:
    with group.connection(BOUND, **options):
        pass


@pytest.fixture
def server() -> Iterator[LineEchoServer]:
    with LineEchoServer() as server:
        yield server


@pytest.fixture
def group() -> Iterator[PoolGroup[Marked]]:
    with PoolGroup(Marked) as group:
        yield group


@pytest.fixture
def slow() -> Iterator[type[Slow]]:
    Slow.begun = 0
    Slow.may_go_on = Event()
    yield Slow
    Slow.may_go_on.set()


@pytest.fixture
def gated() -> Iterator[type[Gated]]:
    Gated.gate = Event()
    yield Gated
    Gated.gate.set()


# Which endpoint


def test_a_pool_is_made_when_it_is_first_asked_for_and_is_the_same_each_time(group: PoolGroup[Marked]) -> None:
    assert group.pools == []
    pool = group.pool(host="127.0.0.1", port=1)
    assert isinstance(pool, Pool)
    assert group.pool(host="127.0.0.1", port=1) is pool
    assert group.pools == [pool]
    assert (pool.size, pool.stats().opening) == (0, 0)  # nobody has asked for a connection


def test_another_value_and_another_option_are_another_endpoint(group: PoolGroup[Marked]) -> None:
    asked: list[dict[str, Any]] = [{"port": 1}, {"port": 2}, {"port": 1, "db": 0}, {"port": 1, "db": None}, {}]
    pools = [group.pool(host="127.0.0.1", **options) for options in asked]
    assert len(set(map(id, pools))) == len(group.pools) == len(asked)


def test_the_order_of_options_says_nothing(group: PoolGroup[Marked], server: Server) -> None:
    with group.connection(host=server.host, port=server.port, db=1) as conn:
        pass
    with group.connection(db=1, port=server.port, host=server.host) as other:
        assert other is conn
    assert group.pool(port=server.port, db=1, host=server.host) is group.pools[0]
    assert len(group.pools) == 1


def test_each_endpoint_has_its_own_connections(group: PoolGroup[Marked]) -> None:
    with LineEchoServer() as one, LineEchoServer() as other:
        for _ in range(3):
            for server in one, other:
                with group.connection(**at(server)) as conn:
                    assert conn.socket.getpeername() == (server.host, server.port)
                    assert conn.ask("hello") == "hello"
        assert (one.accepted, other.accepted) == (1, 1)


def test_a_connection_is_made_with_the_options_of_its_endpoint(group: PoolGroup[Marked], server: Server) -> None:
    with group.connection(**at(server), db=7, names=["a"]) as conn:
        assert conn.marks == {"db": 7, "names": ["a"]}


def test_max_connections_is_for_each_endpoint(server: Server) -> None:
    with PoolGroup(Marked, max_connections=1) as group, group.connection(**at(server)):
        with pytest.raises(PoolExhaustedError, match="1 of at most 1 in use"), group.connection(0, **at(server)):
            pass
        with group.connection(**at(server), db=1):
            server.wait_open(2)


def test_a_number_is_the_same_endpoint_however_it_is_written(group: PoolGroup[Marked]) -> None:
    pool = group.pool(host="h", port=1, timeout=2)
    assert group.pool(host="h", port=1, timeout=2.0) is pool
    assert group.connection(host="h", port=1, timeout=2.0)._pool is pool


def test_an_option_may_be_called_timeout_since_the_time_to_wait_goes_by_position(server: Server) -> None:
    with PoolGroup(TcpConnection, max_connections=1) as group:
        with group.connection(BOUND, **at(server), timeout=30) as conn:
            assert conn.socket.gettimeout() == 30
            with pytest.raises(PoolExhaustedError), group.connection(0, **at(server), timeout=30):
                pass
        with group.connection(None, **at(server), timeout=30), group.connection(BOUND, **at(server), timeout=40):
            assert len(group.pools) == 2


@pytest.mark.parametrize("name", ["self", "key", "name", "options", "pool", "group", "factory", "budget"])
def test_an_option_may_have_any_name(name: str) -> None:
    with PoolGroup(Nothing) as group, group.connection(**{name: 1}) as conn:
        assert conn.options == {name: 1}
        assert group.pool(**{name: 1}) is group.pools[0]


def test_a_group_without_options_has_one_endpoint(server: Server) -> None:
    with PoolGroup(lambda: Marked(server.host, server.port)) as group:
        with group.connection() as conn:
            assert conn.ask("hello") == "hello"
        assert group.pool() is group.pools[0]
        assert group.pools[0].stats().acquired == 1


# Values that cannot be hashed

Value = Callable[[], Any]


class Pair(NamedTuple):
    a: str
    b: list[str]


@pytest.mark.parametrize(
    ("value", "change", "other"),
    [
        pytest.param(lambda: ["a", "b"], lambda v: v.append("c"), ["b", "a"], id="list"),
        pytest.param(lambda: {"a": 1, "b": 2}, lambda v: v.pop("a"), {"a": 2, "b": 1}, id="dict"),
        pytest.param(lambda: {"a", "b"}, lambda v: v.add("c"), {"a"}, id="set"),
        pytest.param(lambda: bytearray(b"ab"), lambda v: v.extend(b"c"), bytearray(b"ba"), id="bytearray"),
        pytest.param(
            lambda: [["a"], {"b": [{"c"}]}], lambda v: v[1]["b"].append(1), [["a"], {"b": [{"d"}]}], id="nested"
        ),
        pytest.param(lambda: ("a", ["b"]), lambda v: v[1].append("c"), ("a", ["c"]), id="tuple of lists"),
        pytest.param(lambda: Pair("a", ["b"]), lambda v: v.b.append("c"), Pair("a", ["c"]), id="named tuple"),
        pytest.param(lambda: {"a": {"b": bytearray(b"c")}}, lambda v: v["a"].clear(), {"a": {}}, id="dict of dicts"),
        pytest.param(lambda: OrderedDict(a=[1]), lambda v: v["a"].append(2), OrderedDict(a=[2]), id="ordered dict"),
        pytest.param(lambda: UserDict(a=1), lambda v: v.update(a=2), UserDict(a=3), id="mapping"),
        pytest.param(list, lambda v: v.append(1), [1, 1], id="empty list"),
    ],
)
def test_a_value_that_cannot_be_hashed_tells_endpoints_apart_by_what_is_in_it(
    value: Value, change: Callable[[Any], object], other: Any
) -> None:
    with PoolGroup(Nothing) as group:
        mine = value()
        pool = group.pool(host="h", extra=mine)
        assert group.pool(extra=value(), host="h") is pool
        assert group.connection(host="h", extra=value())._pool is pool
        assert group.pool(host="h", extra=other) is not pool
        change(mine)
        assert group.pool(host="h", extra=value()) is pool
        assert group.pool(host="h", extra=mine) is not pool
        with pool.connection() as conn:
            assert conn.options == {"host": "h", "extra": value()}  # as they were when it was made


@pytest.mark.parametrize("one", [["a"], {"a"}, {"a": None}, bytearray(b"a")])
@pytest.mark.parametrize("other", [("a",), "a", b"a", [["a"]], {"a": "a"}, ["a", "a"], [], None, {"b"}])
def test_values_of_different_types_are_different(one: Any, other: Any) -> None:
    with PoolGroup(Nothing) as group:
        assert group.pool(extra=one) is not group.pool(extra=other) or one == other


def test_only_containers_are_copied_and_not_what_is_in_them() -> None:
    class Hook:
        def called(self) -> None: ...

    hook, lock = Hook(), threading.Lock()
    with PoolGroup(Nothing) as group, group.connection(hooks=[hook.called], locks={"a": lock}) as conn:
        assert conn.options["hooks"][0].__self__ is hook
        assert conn.options["locks"]["a"] is lock


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return SECRET


@pytest.mark.parametrize(
    "value",
    [
        Unhashable(),
        [Unhashable()],
        {"a": (1, Unhashable())},
        deque([SECRET]),
        array.array("b", SECRET.encode()),
        slice(SECRET),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_other_value_that_cannot_be_hashed_is_refused_and_the_error_says_what_to_do(
    value: Any, group: PoolGroup[Marked]
) -> None:
    if isinstance(value, slice) and sys.version_info >= (3, 12):
        value = deque()  # a slice can be hashed now
    for call in (group.pool, group.connection):
        with pytest.raises(TypeError, match=r"by the option credentials: a \w+ cannot be hashed.*key=") as caught:
            call(host="h", credentials=value)
        assert SECRET not in str(caught.value)
    assert group.pools == []


def test_with_a_key_no_value_has_to_be_hashed() -> None:
    value = Unhashable()
    with PoolGroup(Nothing, key=lambda host, **others: host) as group:
        with group.connection(host="h", credentials=value) as conn:
            assert conn.options["credentials"] is value
        assert group.pool(host="h", credentials=Unhashable()) is group.pools[0]


# key=


def test_a_key_says_which_options_mean_the_same_and_the_first_ones_are_dialled_with(server: Server) -> None:
    with PoolGroup(Marked, key=lambda host, port, **others: (host, port)) as group:
        with group.connection(**at(server), request=1) as conn:
            assert conn.marks == {"request": 1}
        with group.connection(**at(server), request=2) as other:
            assert other is conn
            with group.connection(**at(server), request=3) as third:
                assert third.marks == {"request": 1}
        assert list(group.stats().endpoints) == [(server.host, server.port)]


@pytest.mark.parametrize(
    "error", [ValueError("no such tenant"), KeyError("tenant"), TypeError("odd"), gevent.Timeout()]
)
def test_what_a_key_raises_is_raised_and_nothing_is_made(error: BaseException) -> None:
    def key(**options: Any) -> str:
        raise error

    with PoolGroup(Nothing, key=key) as group:
        for call in (group.pool, group.connection):
            with pytest.raises(type(error)) as caught:
                call(host="h")
            assert caught.value is error
        assert group.pools == []
    if isinstance(error, gevent.Timeout):
        error.close()


@pytest.mark.parametrize("answer", [[SECRET], {"password": SECRET}, ("h", [SECRET]), Unhashable()])
def test_a_key_that_answers_what_cannot_be_hashed_is_told_so_without_the_answer(answer: Any) -> None:
    with PoolGroup(Nothing, key=lambda **options: answer) as group:
        for call in (group.pool, group.connection):
            with pytest.raises(TypeError, match="key must answer something that can be hashed") as caught:
                call(host="h")
            assert SECRET not in str(caught.value)


def test_a_key_that_lets_others_run_makes_one_pool_for_one_endpoint() -> None:
    def key(host: str, **others: Any) -> str:
        gevent.sleep(0)
        return host

    with PoolGroup(Nothing, key=key) as group:
        found = [Attempt(group.pool, host="h", request=number) for number in range(10)]
        assert {id(attempt.result()) for attempt in found} == {id(group.pool(host="h"))}
        assert len(group.pools) == 1


def test_a_group_that_is_closed_while_a_key_lets_others_run_makes_no_pool() -> None:
    gate = Event()

    def key(**options: Any) -> str:
        assert gate.wait(BOUND)
        return "one"

    group = PoolGroup(Nothing, key=key)
    late = Attempt(group.pool, host="h")
    group.close()
    gate.set()
    assert isinstance(late.result(), PoolClosedError)
    assert group.pools == []


def test_none_may_be_a_key() -> None:
    with PoolGroup(Nothing, key=lambda **options: None) as group:
        assert group.pool(a=1) is group.pool(b=2)


# How many ways to call are remembered


def test_ways_to_call_are_remembered_in_a_bounded_number_and_all_of_them_work() -> None:
    names = [f"option{number}" for number in range(5)]
    with PoolGroup(Nothing) as group:
        pool = group.pool(**dict.fromkeys(names, 1))
        generator = random.Random(4)
        for _ in range(200):
            generator.shuffle(names)
            assert group.connection(**dict.fromkeys(names, 1))._pool is pool
        assert len(group._by_call) == len(pool._calls) == MOST_CALLS  # type: ignore[attr-defined]


def test_an_option_for_each_request_that_the_key_leaves_out_costs_no_memory() -> None:
    with PoolGroup(Nothing, key=lambda host, **others: host) as group:
        for number in range(1000):
            lend_and_return(group, host="h", request=number)
        assert (len(group.pools), len(group._by_call)) == (1, MOST_CALLS)
        assert group.pools[0].stats().acquired == 1000


def test_the_same_call_is_remembered_once() -> None:
    with PoolGroup(Nothing) as group:
        for _ in range(2 * MOST_CALLS):
            group.pool(host="h", port=1)
        lend_and_return(group, port=1, host="h")
        assert len(group._by_call) == 2


def test_who_calls_with_what_cannot_be_hashed_is_not_remembered() -> None:
    with PoolGroup(Nothing) as group:
        lend_and_return(group, hosts=["a"])
        lend_and_return(group, hosts=["a"])
        assert (len(group.pools), len(group._by_call)) == (1, 0)


# What is refused


def never(**options: Any) -> Nothing:
    raise AssertionError("nothing may be opened")


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"factory": None}, TypeError, "factory must be a Connection class or another callable, not None"),
        ({"key": "host"}, TypeError, "key must be a function of the options or None, not 'host'"),
        ({"max_connections": 0}, ValueError, "max_connections must be at least 1, not 0"),
        ({"max_connections": "8"}, TypeError, "max_connections must be an int, not '8'"),
        ({"max_connections": True}, TypeError, "max_connections must be an int, not True"),
        ({"max_total": 0}, ValueError, "max_total must be at least 1, not 0"),
        ({"max_total": 2.0}, TypeError, "max_total must be an int, not 2.0"),
        ({"max_total": True}, TypeError, "max_total must be an int, not True"),
        ({"max_total": 5, "budget": Budget(5)}, ValueError, "max_total and budget are two ways to say the same"),
        ({"budget": 5}, TypeError, "budget must be a Budget or None, not 5"),
        ({"budget": "5"}, TypeError, "budget must be a Budget or None, not '5'"),
        ({"forget_after": -1}, ValueError, "forget_after must be 0 or more seconds, not -1"),
        ({"forget_after": None}, TypeError, "forget_after must be a number of seconds, not None"),
        ({"forget_after": "60"}, TypeError, "forget_after must be a number of seconds, not '60'"),
        ({"forget_after": True}, TypeError, "forget_after must be a number of seconds, not True"),
        ({"forget_after": float("inf")}, ValueError, "forget_after must be 0 or more seconds, not inf"),
        ({"forget_after": float("nan")}, ValueError, "forget_after must be 0 or more seconds, not nan"),
        ({"name": 5}, TypeError, "name must be a string or None, not 5"),
        ({"max_connecting": 0}, ValueError, "max_connecting must be at least 1, not 0"),
        ({"max_connecting": "2"}, TypeError, "max_connecting must be an int, not '2'"),
        ({"breaker": 0}, ValueError, "breaker must be at least 1, not 0"),
        ({"breaker": True}, TypeError, "breaker must be an int, not True"),
        ({"breaker": "5"}, TypeError, "breaker must be an int, not '5'"),
        ({"initial_connections": 1}, TypeError, "takes no initial_connections: use min_idle, and wait_ready"),
        ({"initial_connections": 0}, TypeError, "initial_connections"),
        ({"options": {"host": "h"}}, TypeError, "options.*pool"),
        ({"forget_afer": 5}, TypeError, "takes no forget_afer: there is no such parameter"),
        ({"max_conections": 5}, TypeError, "takes no max_conections"),
        ({"maxtotal": 5}, TypeError, "takes no maxtotal"),
        ({"host": "h"}, TypeError, "takes no host"),
        # What goes to each pool is looked at here, too.
        (
            {"min_idle": 3, "max_connections": 2},
            ValueError,
            "min_idle must not be more than max_connections .2., not 3",
        ),
        ({"min_idle": -1}, ValueError, "min_idle must be at least 0, not -1"),
        ({"acquire_timeout": "1"}, TypeError, "acquire_timeout must be a number of seconds, not '1'"),
        ({"check_after_idle": -1}, ValueError, "check_after_idle must be 0 or more seconds, not -1"),
        ({"discard_on": OSError()}, TypeError, "discard_on must be an exception class"),
        ({"max_waiting": -1}, ValueError, "max_waiting must be at least 0, not -1"),
        ({"order": "random"}, ValueError, "order must be 'lifo' or 'fifo', not 'random'"),
        ({"idle_timeout": 0}, ValueError, "idle_timeout must be more than 0 seconds, not 0"),
        ({"max_lifetime": "1h"}, TypeError, "max_lifetime must be a number of seconds, not '1h'"),
        ({"lifetime_jitter": 2}, ValueError, "lifetime_jitter must be a number from 0 to 1, not 2"),
        ({"max_uses": 0}, ValueError, "max_uses must be at least 1, not 0"),
        ({"keepalive": 0}, ValueError, "keepalive must be more than 0 seconds, not 0"),
        ({"backoff": 1}, TypeError, "backoff must be two numbers of seconds"),
        ({"leak_threshold": 0}, ValueError, "leak_threshold must be more than 0 seconds, not 0"),
        ({"reclaim": "yes"}, TypeError, "reclaim must be True or False, not 'yes'"),
        ({"reap_expired_connections": 2}, TypeError, "reap_expired_connections must be True or False, not 2"),
        ({"reap_interval": 0}, ValueError, "reap_interval must be more than 0 seconds, not 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_parameter_is_refused_by_its_name_before_anything_is_made(
    settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        PoolGroup(**{"factory": never, **settings})
    assert type(caught.value) is kind


def test_all_but_the_factory_goes_by_keyword() -> None:
    make: Any = PoolGroup
    with pytest.raises(TypeError, match="positional"):
        make(never, 5)
    with pytest.raises(TypeError, match="factory"):
        make(max_connections=5)


@pytest.mark.parametrize(("timeout", "kind"), [("5", TypeError), (-1, ValueError), (True, TypeError)])
def test_a_wrong_time_is_refused_and_nothing_has_happened(
    timeout: Any, kind: type[Exception], group: PoolGroup[Marked], server: Server
) -> None:
    lend_and_return(group, **at(server))
    with pytest.raises(kind, match="timeout must be"), group.connection(timeout, **at(server)):
        pass
    with pytest.raises(kind, match="timeout must be"):
        group.close(timeout)
    assert not group.closed
    with group.connection(**at(server)) as conn:
        assert conn.ask("hello") == "hello"


def test_a_copy_is_refused(group: PoolGroup[Marked]) -> None:
    pool = group.pool(host="h", port=1)
    for thing in group, pool:
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled: make another one"):
                how(thing)


def test_the_factory_s_refusal_of_an_option_is_the_borrower_s_error_and_the_endpoint_can_be_forgotten(
    server: Server,
) -> None:
    with PoolGroup(TcpConnection, forget_after=0) as group:
        with pytest.raises(TypeError, match="flavour"), group.connection(**at(server), flavour="vanilla"):
            pass
        until("it is forgotten", lambda: group.pools == [])


def test_most_dials_at_once_are_a_quarter_of_the_total_if_that_is_less() -> None:
    for total, most in ((None, 8), (1000, 8), (16, 4), (7, 1), (1, 1)):
        with PoolGroup(Nothing, max_total=total) as group:
            assert group.pool(host="h")._max_connecting == most
        with PoolGroup(Nothing, budget=None if total is None else Budget(total)) as group:
            assert group.pool(host="h")._max_connecting == most
    with PoolGroup(Nothing, max_total=16, max_connecting=10) as group:
        assert group.pool(host="h")._max_connecting == 10


# Names


def test_a_pool_is_called_by_its_group_and_its_address() -> None:
    with PoolGroup(Nothing, name="billing") as named, PoolGroup(Nothing) as plain:
        for options, name in (
            ({"host": "10.0.0.1", "port": 6000, "password": SECRET}, "10.0.0.1:6000"),
            ({"host": "db.internal", "user": "root"}, "db.internal"),
            ({"path": "/run/valkey.sock", "password": SECRET}, "/run/valkey.sock"),
        ):
            assert repr(named.pool(**options)).startswith(f"<Endpoint 'billing {name}': 0 idle")
            assert repr(plain.pool(**options)).startswith(f"<Endpoint '{name}': 0 idle")
        assert repr(named) == "<PoolGroup 'billing': 3 endpoints, 0 idle, 0 in use, 0 opening, 0 waiting>"
        named.close()
        assert repr(named).startswith("<PoolGroup 'billing': closed, ")


def test_no_two_endpoints_without_an_address_have_one_name() -> None:
    with PoolGroup(Nothing) as group:
        pools = [group.pool(dsn=number) for number in range(3)]
        pools.pop(0).close()
        until("the closed one is gone", lambda: gc.collect() >= 0 and len(group._known) == 2)
        pools += [group.pool(dsn=number) for number in range(3, 6)]
        assert len({repr(pool) for pool in pools}) == 5


@pytest.mark.parametrize(
    ("path", "name"),
    [(b"/run/a.sock", "/run/a.sock"), (Path("/run/a.sock"), "/run/a.sock"), ("\0abstract", "@abstract")],
)
def test_a_path_is_a_name_however_it_is_given(path: Any, name: str) -> None:
    with PoolGroup(UnixConnection) as group:
        assert repr(group.pool(path=path)).startswith(f"<Endpoint '{name}': ")


def test_no_other_option_is_ever_shown(server: Server, logged: Logged) -> None:
    """Among the options there may be passwords; host, port and path are told apart from all the others."""
    secrets: dict[str, Any] = {"password": SECRET, "credentials": {"token": [SECRET]}, SECRET: 1}
    said: list[object] = []

    def fails(job: Callable[[], object], *kinds: type[Exception]) -> None:
        with pytest.raises(kinds) as caught:
            job()
        said.extend([str(caught.value), repr(caught.value)])

    settings: dict[str, Any] = {"leak_threshold": 0.01, "breaker": 1, "backoff": (1e6, 1e6), "max_connections": 1}
    with PoolGroup(Marked, name="tenants", max_total=2, **settings) as group:
        down = {"host": "127.0.0.1", "port": refused_port(), **secrets}
        fails(lambda: lend_and_return(group, **down), OSError)
        fails(lambda: lend_and_return(group, **down), BreakerOpenError)
        up = {**at(server), **secrets}
        pool = group.pool(**up)
        conn = pool.acquire()
        fails(lambda: group.connection(0, **up).__enter__(), PoolExhaustedError)
        fails(lambda: group.connection(0.01, **up).__enter__(), PoolExhaustedError)
        fails(lambda: pool.release(Marked("h", 1)), ConnectionNotFoundError)
        said += [record.getMessage() for record in logged.take(2)]  # the breaker's, the leak's
        pool.release(conn)
        said += [record.getMessage() for record in logged.take(1)]  # it came back
        fails(lambda: group.pool(**secrets, odd=Unhashable()), TypeError)
        said += [repr(group), repr(pool), repr(group.pools), repr(group.stats()), str(group.stats())]
        said += [repr(pool.stats()), repr(group.budget), repr(pool.holders()), repr(group.pool(**secrets))]
        said += [repr(group.connection(**up))]
        group.close()
        fails(lambda: group.pool(**up), PoolClosedError)
        fails(lambda: lend_and_return(group, **up), PoolClosedError)
        fails(pool.acquire, PoolClosedError)
        said += [repr(group), repr(pool), repr(group.stats())]
    assert [text for text in said if SECRET in str(text)] == []
    assert "tenants 127.0.0.1:" in str(said)


def test_what_a_key_answers_is_not_shown_either() -> None:
    """It may well be an option as it is."""
    with PoolGroup(Nothing, key=lambda dsn: dsn) as group:
        lend_and_return(group, dsn=f"postgres://root:{SECRET}@h/db")
        for text in repr(group), repr(group.pools), repr(group.stats()):
            assert SECRET not in text


def test_endpoints_of_one_address_are_told_apart_by_a_number(server: Server) -> None:
    with PoolGroup(Marked) as group:
        pools = [group.pool(**at(server), db=number) for number in range(5)]
        names = [repr(pool).split("'")[1] for pool in pools]
        assert len(set(names)) == 5
        assert all(name.startswith(f"{server.host}:{server.port}") for name in names)


def test_an_address_of_ipv6_is_shown_with_brackets() -> None:
    with PoolGroup(Nothing) as group:
        assert repr(group.pool(host="::1", port=6000)).startswith("<Endpoint '[::1]:6000'")


# Figures


def test_the_figures_of_a_group_are_the_sums_of_its_endpoints(server: Server, gated: type[Gated]) -> None:
    with PoolGroup(Gated, max_connections=2, max_total=10) as group:
        Gated.gate.set()
        with group.connection(**at(server)), group.connection(**at(server)):
            waiter = Attempt(group.pool(**at(server)).acquire, timeout=None)
            lend_and_return(group, **at(server), db=1)
            Gated.gate.clear()
            dials = [gevent.spawn(lend_and_return, group, **at(server), db=2) for _ in range(2)]
            until("both dial", lambda: group.stats().opening == 2)
            stats = group.stats()
            assert (stats.size, stats.idle, stats.in_use, stats.opening, stats.waiting) == (3, 1, 2, 2, 3)
            assert stats.max_total == 10
            assert len(stats.endpoints) == 3
            assert sorted(each.in_use for each in stats.endpoints.values()) == [0, 0, 2]
            assert stats.endpoints[frozenset(at(server).items())].waiting == 1
            assert repr(group) == ("<PoolGroup: 3 endpoints, 1 idle, 2 in use, 2 opening of at most 10, 3 waiting>")
        group.pool(**at(server)).release(waiter.result())
        assert (stats.in_use, group.stats().in_use) == (2, 0)  # the first was one look
        Gated.gate.set()
        gevent.joinall(dials, timeout=BOUND, raise_error=True)
        assert (group.stats().opening, group.stats().waiting) == (0, 0)


def test_a_group_without_a_cap_says_so(group: PoolGroup[Marked]) -> None:
    assert (group.budget, group.stats().max_total) == (None, None)
    assert (group.stats().size, group.stats().endpoints) == (0, {})


def test_a_budget_is_the_group_s_own_or_the_one_that_was_given() -> None:
    budget = Budget(7)
    with PoolGroup(Nothing, max_total=5) as own, PoolGroup(Nothing, budget=budget) as given:
        assert own.budget is not None
        assert (own.budget.max_total, own.stats().max_total) == (5, 5)
        assert given.budget is budget
        budget.resize(3)
        assert given.stats().max_total == 3


def test_the_pools_are_listed_in_a_copy(group: PoolGroup[Marked]) -> None:
    pool = group.pool(host="h", port=1)
    group.pools.clear()
    assert group.pools == [pool]


# clear()


def test_clear_closes_what_idles_everywhere_and_what_is_lent_as_it_returns(
    group: PoolGroup[Marked], server: Server
) -> None:
    with group.connection(**at(server), db=0):
        for number in range(3):
            lend_and_return(group, **at(server), db=number)
        server.wait_open(4)
        group.clear()
        server.wait_open(1)
        assert (group.stats().idle, group.stats().in_use) == (0, 1)
    server.wait_open(0)
    assert sum(stats.closed["cleared"] for stats in group.stats().endpoints.values()) == 4
    lend_and_return(group, **at(server), db=1)  # and all goes on


def test_clear_of_one_endpoint_leaves_the_others(group: PoolGroup[Marked], server: Server) -> None:
    for number in range(3):
        lend_and_return(group, **at(server), db=number)
    group.pool(**at(server), db=1).clear()
    server.wait_open(2)
    assert [pool.idle for pool in group.pools] == [1, 0, 1]


@pytest.mark.parametrize("how", ["clear", "close"])
def test_endpoints_are_cleared_and_closed_side_by_side(how: str, server: Server, slow: type[Slow]) -> None:
    with PoolGroup(slow) as group:
        for number in range(5):
            lend_and_return(group, **at(server), db=number)
        ending = Attempt(getattr(group, how))
        until("all closes have begun", lambda: Slow.begun == 5)
        assert not ending.ready()
        Slow.may_go_on.set()
        assert ending.result() is None
        server.wait_open(0)


# close()


def test_g11_close_closes_what_idles_and_wakes_whoever_waits_at_every_endpoint(server: Server) -> None:
    group = PoolGroup(Marked, max_connections=1)
    lend_and_return(group, **at(server), db=9)
    with group.connection(**at(server), db=0), group.connection(**at(server), db=1):
        waiters = [Attempt(group.connection(None, **at(server), db=number % 2).__enter__) for number in range(4)]
        group.close()
        assert group.closed
        assert [type(waiter.result()) for waiter in waiters] == [PoolClosedError] * 4
        server.wait_open(2)
    server.wait_open(0)
    group.close()
    group.close(0.01)


def test_g11_a_closed_group_lends_nothing_and_makes_no_pool(server: Server) -> None:
    with PoolGroup(Marked, name="billing") as group:
        lend_and_return(group, **at(server))
        pool = group.pool(**at(server))
    for call in (group.pool, group.connection):
        with pytest.raises(PoolClosedError, match="PoolGroup 'billing' is closed"), call(**at(server), db=1):
            pass
    with pytest.raises(PoolClosedError), group.connection(**at(server)):
        pass
    with pytest.raises(PoolClosedError), pool.connection():
        pass
    assert group.pools == []
    assert group.stats().endpoints == {}
    group.clear()


def test_a_block_closes_its_group_and_swallows_nothing(server: Server) -> None:
    with pytest.raises(ZeroDivisionError), PoolGroup(Marked) as group:
        lend_and_return(group, **at(server))
        raise ZeroDivisionError
    assert group.closed
    server.wait_open(0)


def test_g11_close_with_a_time_waits_for_what_is_lent_anywhere(server: Server) -> None:
    group = PoolGroup(Marked)
    leases = [group.connection(**at(server), db=number) for number in range(3)]
    for lease in leases:
        lease.__enter__()
    closing = Attempt(group.close, BOUND)
    for lease in leases:
        gevent.sleep(0)
        assert not closing.ready()
        lease.__exit__(None, None, None)
    assert closing.result() is None
    server.wait_open(0)


def test_g11_close_with_a_time_then_takes_what_is_lent_anywhere(server: Server) -> None:
    group = PoolGroup(Marked)
    leases = [group.connection(**at(server), db=number) for number in range(3)]
    conns = [lease.__enter__() for lease in leases]
    group.close(0.01)
    server.wait_open(0)
    assert not any(conn.is_connected() for conn in conns)
    for lease in leases:
        lease.__exit__(None, None, None)


def test_g11_one_time_is_for_all_endpoints_and_so_is_the_second_for_their_closing(
    server: Server, slow: type[Slow]
) -> None:
    """Ten would take more than ten seconds one after the other."""
    with gevent.Timeout(9):
        group = PoolGroup(slow)
        leases = [group.connection(**at(server), db=number) for number in range(10)]
        for lease in leases:
            lease.__enter__()
        group.close(0.05)
        assert Slow.begun == 10
    Slow.may_go_on.set()
    server.wait_open(0)


def test_g11_close_with_a_time_does_not_wait_for_a_dial_that_hangs(server: Server, gated: type[Gated]) -> None:
    group = PoolGroup(gated)
    dial = Attempt(group.connection(None, **at(server)).__enter__)
    until("it dials", lambda: group.stats().opening == 1)
    group.close(0.01)
    assert isinstance(dial.result(), PoolClosedError)
    Gated.gate.set()
    server.wait_accepted(1)
    server.wait_open(0)


def test_g11_a_dial_that_ends_after_the_group_is_closed_is_closed(server: Server, gated: type[Gated]) -> None:
    group = PoolGroup(gated)
    borrower = Attempt(group.connection(**at(server)).__enter__)
    group.close()
    assert isinstance(borrower.result(), PoolClosedError)
    Gated.gate.set()
    server.wait_accepted(1)
    server.wait_open(0)


def test_an_endpoint_that_was_closed_is_made_anew_when_it_is_asked_for(
    group: PoolGroup[Marked], server: Server
) -> None:
    lend_and_return(group, **at(server))
    lend_and_return(group, **at(server), db=1)
    old = group.pool(**at(server))
    old.close()
    server.wait_open(1)
    assert old not in group.pools
    lend_and_return(group, **at(server))
    assert group.pool(**at(server)) is not old
    assert group.stats().idle == 2
    old.close()
    assert len(group.pools) == 2  # the old one takes nothing with it
    with group.connection(**at(server)) as conn:
        assert conn.ask("hello") == "hello"


def test_an_endpoint_in_a_block_is_closed_after_it_and_made_anew(group: PoolGroup[Marked], server: Server) -> None:
    for _ in range(3):
        with group.pool(**at(server)) as pool, pool.connection() as conn:
            assert conn.ask("hello") == "hello"
        assert group.pools == []
    server.wait_open(0)
    assert server.accepted == 3


def test_what_a_closed_group_has_lent_by_hand_can_be_given_back(server: Server) -> None:
    group = PoolGroup(Marked)
    conn = group.pool(**at(server)).acquire()
    group.close()
    gevent.sleep(0)
    gc.collect()
    group.pool(**at(server)).release(conn)
    server.wait_open(0)
    with pytest.raises(PoolClosedError):
        group.pool(**at(server))


def test_what_a_closed_group_has_lent_by_hand_is_waited_for_and_taken_by_a_later_close_with_a_time(
    server: Server,
) -> None:
    group = PoolGroup(Marked)
    conn = group.pool(**at(server)).acquire()
    group.close()
    gevent.sleep(0)
    gc.collect()
    group.close(0.01)
    assert not conn.is_connected()
    server.wait_open(0)


def test_what_a_closed_endpoint_has_lent_is_taken_when_the_group_closes_with_a_time(server: Server) -> None:
    group = PoolGroup(Marked)
    old = group.pool(**at(server))
    conn = old.acquire()
    old.close()
    lend_and_return(group, **at(server))
    group.close(0.01)
    assert not conn.is_connected()
    server.wait_open(0)


# Forgetting


def test_a_pool_that_stays_empty_is_forgotten_with_its_counts_and_made_anew(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0.01) as group:
        lend_and_return(group, **at(server))
        group.pool(**at(server)).clear()
        until("it is forgotten", lambda: group.pools == [])
        assert (group._by_call, group.stats().endpoints) == ({}, {})
        lend_and_return(group, **at(server))
        assert group.pool(**at(server)).stats().acquired == 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"breaker": None},
        {"check_after_idle": None},
        {"check_after_idle": 0},
        {"reap_expired_connections": False},
        {"check_after_idle": None, "reap_expired_connections": False},
        {"check_after_idle": None, "reap_expired_connections": False, "breaker": None},
        {"idle_timeout": 1000},
        {"max_lifetime": 1000},
        {"max_total": 3},
        {"leak_threshold": 1000, "reclaim": True},
        {"keepalive": 1000},
        {"order": "fifo"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("used", [False, True], ids=["never_used", "used"])
def test_a_pool_that_stays_empty_is_forgotten_whatever_else_is_to_do(
    settings: dict[str, Any], used: bool, server: Server
) -> None:
    with PoolGroup(Marked, forget_after=0.01, **settings) as group:
        group.pool(**at(server))
        if used:
            lend_and_return(group, **at(server))
            gevent.sleep(0)  # for the upkeep to see it in use, and to sleep
            group.pool(**at(server)).clear()
        until("it is forgotten", lambda: group.pools == [])
        until("and gone", lambda: gc.collect() >= 0 and len(group._known) == 0)


def test_a_pool_with_anything_to_do_is_not_forgotten(server: Server, gated: type[Gated], slow: type[Slow]) -> None:
    def make(kind: type[Marked] = Marked, **options: Any) -> Marked:
        return kind(**options)

    Gated.gate.clear()
    with PoolGroup(make, forget_after=0) as group:
        lend_and_return(group, **at(server), what="idle")
        waited_for = group.pool(**at(server), what="waited for")
        waited_for.pause()
        waiter = Attempt(waited_for.acquire, timeout=None)
        dialled = Attempt(lend_and_return, group, **at(server), kind=gated)
        lend_and_return(group, **at(server), kind=slow)
        ending = Attempt(group.pool(**at(server), kind=slow).clear)
        with group.connection(**at(server), what="in use"):
            for number in range(5):  # all have been looked at again and again
                group.pool(**at(server), what=number)
                until("the empty one is forgotten", lambda: len(group.pools) == 5)
            Slow.may_go_on.set()
            assert ending.result() is None
            until("what was closing is empty now, and forgotten", lambda: len(group.pools) == 4)
            Gated.gate.set()
            assert dialled.result() is None
            waited_for.resume()
            waited_for.release(waiter.result())
        assert len(group.pools) == 4


def test_a_pool_that_keeps_a_stock_is_not_forgotten(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0, min_idle=1) as group:
        pool = group.pool(**at(server))
        pool.wait_ready(BOUND)
        pool.clear()
        pool.wait_ready(BOUND)
        assert group.pools == [pool]


def test_a_paused_pool_is_not_forgotten(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0) as group:
        group.pool(**at(server)).pause()
        group.pool(**at(server), db=1)
        until("the other one is forgotten", lambda: len(group.pools) == 1)
        with pytest.raises(PoolExhaustedError, match="paused"), group.connection(0, **at(server)):
            pass
        group.pool(**at(server)).resume()
        until("it is forgotten", lambda: group.pools == [])


def test_an_endpoint_whose_breaker_is_open_is_remembered_until_its_next_try(logged: Logged) -> None:
    with PoolGroup(Marked, forget_after=0, breaker=1, backoff=(1, 1)) as group:
        down = {"host": "127.0.0.1", "port": refused_port()}
        with pytest.raises(ConnectionRefusedError):
            lend_and_return(group, **down)
        with pytest.raises(BreakerOpenError):
            lend_and_return(group, **down)
        assert group.pools[0].stats().breaker == "open"
        until("it is forgotten", lambda: group.pools == [])
    logged.take(1)


def test_a_forgotten_pool_is_found_again_while_somebody_still_has_it(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0.01) as group:
        pool = group.pool(**at(server))
        until("it is forgotten", lambda: group.pools == [])
        lend_and_return(group, **at(server))
        assert (pool.idle, group.pools) == (1, [pool])
        pool.clear()
        until("it is forgotten again", lambda: group.pools == [])
        with pool.connection() as conn:
            assert conn.ask("hello") == "hello"
        assert group.pool(**at(server)) is pool
        assert group.stats().idle == 1


def test_a_pool_that_was_found_again_is_forgotten_again(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0.01) as group:
        pool = group.pool(**at(server))
        until("it is forgotten", lambda: group.pools == [])
        assert group.pool(**at(server)) is pool
        assert group.pools == [pool]
        until("it is forgotten again", lambda: group.pools == [])


@pytest.mark.parametrize("max_total", [None, 5])
def test_a_forgotten_pool_that_was_let_go_a_moment_ago_is_not_handed_out(server: Server, max_total: int | None) -> None:
    with PoolGroup(Marked, forget_after=0, max_total=max_total) as group:
        pool = group.pool(**at(server))
        until("it is forgotten", lambda: group.pools == [])
        del pool
        with group.connection(**at(server)) as conn:
            assert conn.ask("hello") == "hello"
        if group.budget is not None:
            assert group.budget.used == 1
            assert group.budget.faults() == []


def test_what_is_left_of_a_forgotten_pool_is_closed_with_its_group(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0) as group:
        pool = group.pool(**at(server))
        until("it is forgotten", lambda: group.pools == [])
        with pool.connection():
            pass
        assert pool.idle == 1
    assert pool.closed
    server.wait_open(0)


def test_a_lease_that_was_made_before_its_pool_was_forgotten_borrows_all_the_same(server: Server) -> None:
    with PoolGroup(Marked, forget_after=0) as group:
        lease = group.connection(**at(server))
        until("it is forgotten", lambda: group.pools == [])
        with lease as conn:
            assert conn.ask("hello") == "hello"
            assert group.pool(**at(server)).in_use == 1


@pytest.mark.parametrize("max_total", [None, 40])
def test_there_are_never_two_pools_for_one_endpoint(server: Server, max_total: int | None, rng: random.Random) -> None:
    """Endpoints are asked for, used, held, let go, cleared and closed at random, and forgotten all the time."""
    with PoolGroup(Marked, forget_after=0, max_total=max_total, max_connections=2) as group:
        made: list[tuple[int, Pool[Marked]]] = []

        def somebody() -> None:
            for _ in range(60):
                db = rng.randrange(4)
                made[:] = [(other, pool) for other, pool in made if rng.random() < 0.8 and not pool.closed]
                with group.connection(BOUND, **at(server), db=db) as conn:
                    assert conn.marks == {"db": db}
                    pool = group.pool(**at(server), db=db)
                    assert {id(each) for other, each in made if other == db and not each.closed} <= {id(pool)}
                    made.append((db, pool))
                    gevent.sleep(0)
                if rng.random() < 0.4:
                    pool.clear()
                if rng.random() < 0.05:
                    pool.close()
                del pool, conn
                gevent.sleep(rng.choice((0, 0.001)))

        # Who closes an endpoint may close it under somebody else's hands.
        people = [Attempt(somebody) for _ in range(8)]
        assert {str(person.result()) for person in people if not isinstance(person.result(), PoolClosedError)} <= {
            "None"
        }
        made.clear()
        group.clear()
        if group.budget is not None:
            until("all is closed", lambda: group.budget is not None and group.budget.used == 0)
            assert group.budget.faults() == []
    server.wait_open(0)


def leftovers(group: PoolGroup[Any]) -> dict[str, int]:
    """What there is, in whatever the group and its upkeep keep."""
    containers = (dict, set, list, deque, weakref.WeakValueDictionary, weakref.WeakSet)
    found = {
        what: len(value)
        for what, value in (*vars(group).items(), *vars(group._rounds).items())
        if isinstance(value, containers) and what != "_settings"
    }
    found["maintenance"] = group._rounds._begun
    found["of all"] = sum(isinstance(pool, Endpoint) and pool._rounds is group._rounds for pool in all_pools.values())
    if group.budget is not None:
        found["budget's pools"] = len(group.budget._pools)
        found["units"] = group.budget.used
    return {what: count for what, count in found.items() if count}


def is_tidy(group: PoolGroup[Any]) -> bool:
    """Whether the budget's heaps have no more entries than they may; looked at when something is put into them."""
    budget = group.budget
    return budget is None or max(len(budget.claims), len(budget._idlers)) <= 2 * len(budget._pools) + 17


@pytest.mark.parametrize("held", [False, True], ids=["", "held"])
@pytest.mark.parametrize("max_total", [None, 20, 5000])
@pytest.mark.parametrize(
    "settings",
    [
        {"idle_timeout": 0.05},
        {"max_lifetime": 0.05},
        {"max_lifetime": 0.05, "check_after_idle": None, "reap_expired_connections": False},
        {"max_uses": 1},
        {"max_uses": 1, "leak_threshold": 1000, "reclaim": True},
        {"idle_timeout": 0.05, "keepalive": 0.03, "order": "fifo"},
    ],
    ids="-".join,
)
def test_a_thousand_endpoints_come_and_go_and_leave_nothing_behind(
    settings: dict[str, Any], max_total: int | None, held: bool, server: Server
) -> None:
    with PoolGroup(Marked, forget_after=0.05, max_total=max_total, **settings) as group:
        kept = []
        for number in range(1000 if settings == {"idle_timeout": 0.05} else 200):
            with group.connection(BOUND, **at(server), db=number, names=[number] if number % 2 else number):
                if held:
                    kept.append(group.pools[-1])
            if number % 50 == 0:
                gevent.sleep(0)
        until("all are forgotten", lambda: group.pools == [])
        kept.clear()
        until("nothing is left", lambda: gc.collect() >= 0 and leftovers(group) == {})
        server.wait_open(0)
        lend_and_return(group, **at(server))  # and all goes on
        assert is_tidy(group)


def test_a_thousand_endpoints_that_are_down_leave_nothing_behind(
    logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps the records, these keep the errors, these their tracebacks, and these whatever was at hand there.
    monkeypatch.setattr(logging.getLogger("gsocketpool"), "propagate", False)
    with PoolGroup(Marked, forget_after=0.05, breaker=1, backoff=(0.02, 0.02), max_total=100) as group:
        port = refused_port()

        def ask(db: int) -> None:
            with pytest.raises(ConnectionRefusedError):
                lend_and_return(group, host="127.0.0.1", port=port, db=db)
            with pytest.raises((BreakerOpenError, ConnectionRefusedError)):  # the latter if its pause is over already
                lend_and_return(group, host="127.0.0.1", port=port, db=db)

        for number in range(0, 1000, 50):
            gevent.joinall([gevent.spawn(ask, db) for db in range(number, number + 50)], raise_error=True)
        assert len(logged.take()) >= 1000  # more if one was forgotten between the two
        until("all are forgotten", lambda: group.pools == [])
        until("nothing is left", lambda: gc.collect() >= 0 and leftovers(group) == {})


@pytest.mark.parametrize("max_total", [None, 20])
def test_endpoints_that_keep_a_stock_and_are_closed_by_hand_leave_nothing_behind(
    server: Server, max_total: int | None
) -> None:
    with PoolGroup(Marked, min_idle=2, max_total=max_total) as group:
        for number in range(300):
            with group.pool(**at(server), db=number) as pool:
                pool.wait_ready(BOUND)
            del pool
        group.clear()
        until("nothing is left", lambda: gc.collect() >= 0 and leftovers(group) == {})
        server.wait_open(0)


@pytest.mark.parametrize("max_total", [None, 5000])
def test_endpoints_that_come_and_go_take_no_memory(max_total: int | None) -> None:
    """All objects that the collector knows are counted after one thousand and after the next."""
    with PoolGroup(Nothing, forget_after=0, max_uses=1, max_total=max_total) as group:

        def thousand(begin: int) -> int:
            for number in range(begin, begin + 1000):
                lend_and_return(group, host=number)
            until("nothing is left", lambda: gc.collect() >= 0 and leftovers(group) == {})
            lend_and_return(group, host="last")
            assert is_tidy(group)
            until("nothing is left again", lambda: gc.collect() >= 0 and leftovers(group) == {})
            return len(gc.get_objects())

        thousand(0)
        before = thousand(1000)
        assert thousand(2000) - before < 100


# Nobody refers to it


@pytest.mark.parametrize("max_total", [None, 10])
def test_g9_a_group_that_nobody_refers_to_is_collected_and_its_connections_are_closed(
    server: Server, max_total: int | None
) -> None:
    group = PoolGroup(Marked, max_total=max_total, leak_threshold=1000, min_idle=1)
    for number in range(3):
        lend_and_return(group, **at(server), db=number)
    gevent.sleep(0.01)  # the upkeep sleeps
    before = sum(isinstance(pool, Endpoint) for pool in all_pools.values())
    del group
    gc.collect()
    server.wait_open(0)
    until(
        "the pools are gone",
        lambda: gc.collect() >= 0 and before - 3 >= sum(isinstance(pool, Endpoint) for pool in all_pools.values()),
    )


@pytest.mark.parametrize("max_total", [None, 10])
def test_g9_a_pool_outlives_its_group_as_long_as_somebody_uses_it(server: Server, max_total: int | None) -> None:
    group = PoolGroup(Marked, max_total=max_total, idle_timeout=0.05)
    pool = group.pool(**at(server))
    lease = group.connection(**at(server), db=1)
    conn = lease.__enter__()
    lend_and_return(group, **at(server), db=2)
    lend_and_return(group, **at(server))
    del group
    server.wait_until(lambda: server.open <= 2)
    assert conn.ask("hello") == "hello"
    with pool.connection() as other:
        assert other.ask("hello") == "hello"
    until("it is still tended", lambda: pool.idle == 0)
    lease.__exit__(None, None, None)
    del lease
    server.wait_open(0)
    pool.close()


# Names that mean another address now


@pytest.fixture
def two_addresses() -> Iterator[tuple[Server, Server]]:
    """Two servers at one port."""
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(LineEchoServer())
        yield old, stack.enter_context(ServerAt("127.0.0.2", old.port))


def resolve(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def getaddrinfo(name: str, port: int, *how: Any) -> list[Any]:
        assert name == "primary.test"
        gevent.sleep(0)
        return [(gevent.socket.AF_INET, gevent.socket.SOCK_STREAM, 6, "", (host, port))]

    monkeypatch.setattr(gevent.socket, "getaddrinfo", getaddrinfo)


def test_a_name_that_means_another_address_is_followed_by_new_dials_and_max_lifetime_moves_the_rest(
    two_addresses: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two_addresses
    primary: dict[str, Any] = {"host": "primary.test", "port": old.port}
    with PoolGroup(Marked, max_lifetime=0.3, lifetime_jitter=0.5, min_idle=2, max_connections=4) as group:
        resolve(monkeypatch, "127.0.0.1")
        pool = group.pool(**primary)
        pool.wait_ready(BOUND)
        lease = group.connection(**primary)
        lent = lease.__enter__()
        assert lent.socket.getpeername()[0] == "127.0.0.1"
        resolve(monkeypatch, "127.0.0.2")
        old.wait_until(lambda: old.open == 1)  # what idled there is gone
        new.wait_until(lambda: new.open >= 2)
        assert lent.ask("hello") == "hello"  # what is lent is left alone
        lease.__exit__(None, None, None)
        old.wait_open(0)
        with group.connection(**primary) as conn:
            assert conn.socket.getpeername()[0] == "127.0.0.2"
            assert conn.ask("hello") == "hello"
        assert group.pools == [pool]


def test_clear_moves_all_to_the_new_address_at_once(
    two_addresses: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two_addresses
    primary: dict[str, Any] = {"host": "primary.test", "port": old.port}
    with PoolGroup(Marked) as group:
        resolve(monkeypatch, "127.0.0.1")
        lend_and_return(group, **primary)
        resolve(monkeypatch, "127.0.0.2")
        with group.connection(**primary) as conn:
            assert conn.socket.getpeername()[0] == "127.0.0.1"  # it works, so it stays
        group.clear()
        with group.connection(**primary) as conn:
            assert conn.socket.getpeername()[0] == "127.0.0.2"
        assert (old.accepted, new.accepted) == (1, 1)


# Fork

FORKS = """
import json, os, sys, warnings
import gevent, gevent.os
from gsocketpool import PoolGroup, TcpConnection
from gsocketpool.lifetime import Limits

port, kind = int(sys.argv[1]), sys.argv[2]
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes a fork where there are threads

class Line(TcpConnection):
    def __init__(self, host, port, db):
        super().__init__(host, port)

def ask(group, db):
    with group.connection(10, host="127.0.0.1", port=port, db=db) as conn:
        conn.send(f"{os.getpid()} {db}\\n".encode())
        assert conn.recv_until(b"\\n") == f"{os.getpid()} {db}".encode()
        return conn.socket.getsockname()[1]

# In the parent nothing idles too long: it is to find its connections again.
group = PoolGroup(
    Line, max_total=4, check_after_idle=0.1, idle_timeout=1000, forget_after=0.2, min_idle=int(sys.argv[3])
)
mine = {ask(group, db) for db in range(3)}
gevent.sleep(0.01)
held = group.connection(10, host="127.0.0.1", port=port, db=0)
held.__enter__()
if kind == "plain":
    pid = os.fork()
    if pid == 0:
        gevent.reinit()
else:
    pid = gevent.os.fork()
try:
    with gevent.Timeout(20):
        if pid == 0:
            for pool in group.pools:
                pool._limits = Limits(idle_timeout=0.1)
            assert group.budget.faults() == [], group.budget.faults()
            theirs = {ask(group, db) for db in range(3)}
            assert not mine & theirs, (mine, theirs)
            assert group.budget.used <= 4, group.budget
            if not int(sys.argv[3]):
                while group.pools:
                    gevent.sleep(0.01)  # the upkeep goes on in the child, too: all idle too long, and are forgotten
                assert group.budget.used == 0, group.budget
        else:
            if not int(sys.argv[3]):  # else the stock may have made room for others meanwhile
                assert mine == {ask(group, db) for db in (1, 2)} | {held._member.connection.socket.getsockname()[1]}
            wait = os.waitpid if kind == "plain" else gevent.os.waitpid
            while (done := wait(pid, os.WNOHANG))[0] == 0:
                gevent.sleep(0.01)
            assert done[1] == 0, done
        held.__exit__(None, None, None)
        assert {ask(group, db) for db in range(3)}
        assert group.budget.faults() == [], group.budget.faults()
        group.close(5)
        assert group.budget.used == 0, group.budget
except BaseException:
    import traceback
    traceback.print_exc()
    os._exit(1)
if pid == 0:
    os._exit(0)
print("all is well")
"""


@pytest.mark.parametrize("min_idle", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "gevent"])
def test_g10_the_child_of_a_fork_begins_anew_with_all_endpoints_and_the_parent_goes_on(
    kind: str, min_idle: int
) -> None:
    """The server tells on which connection it heard whom: never two processes on one."""
    heard: dict[int, set[str]] = {}

    def witness(sock: Any) -> None:
        mine = heard.setdefault(id(sock), set())
        rest = b""
        while data := sock.recv(65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                mine.add(line.split()[0].decode())
                sock.sendall(line + b"\n")

    socks = []  # so that no two have one id

    def keep(sock: Any) -> None:
        socks.append(sock)
        witness(sock)

    with Server(keep) as server:
        root = Path(__file__).parent.parent
        program = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(server.port), kind, str(min_idle)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        try:
            until("it has ended", lambda: program.poll() is not None, 5 * BOUND)
        finally:
            program.kill()
            out, err = program.communicate()
        assert (out, err, program.returncode) == ("all is well\n", "", 0)
        server.wait_open(0)
    assert max(len(who) for who in heard.values()) == 1
    assert len(set().union(*heard.values())) == 2


# Threads


def test_a_group_serves_the_thread_in_which_it_was_made_and_says_so_elsewhere(server: Server) -> None:
    found: list[object] = []

    def elsewhere(group: PoolGroup[Marked]) -> None:
        try:
            found.append(group.pool(**at(server), db=1))
        except Exception as error:
            found.append(str(error))

    with PoolGroup(Marked, name="billing") as group:
        lend_and_return(group, **at(server))
        thread = threading.Thread(target=elsewhere, args=(group,))
        thread.start()
        until("it has ended", lambda: not thread.is_alive())
        thread.join()
        assert len(group.pools) == 1
    assert "PoolGroup 'billing' was made in another thread" in str(found[0])

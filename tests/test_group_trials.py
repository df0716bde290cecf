"""What trials of groups, budgets and breakers have found, each as a test."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import gevent
import pytest
from gevent.event import Event

from gsocketpool import (
    BreakerOpenError,
    Budget,
    Connection,
    Pool,
    PoolError,
    PoolExhaustedError,
    PoolGroup,
    TcpConnection,
    retry,
)
from tests.conftest import Logged
from tests.dials import BOUND
from tests.servers import LineEchoServer, refused_port


class Nowhere(Connection):
    """Leads nowhere; `dials` says what each dial does."""

    dials: Any = staticmethod(lambda: None)

    def __init__(self, **options: object) -> None:
        self.options = options

    def open(self) -> None:
        self.dials()

    def close(self) -> None:
        pass

    def is_connected(self) -> bool:
        return True


def refuse() -> None:
    raise ConnectionRefusedError("refused, says the test")


def dialling(dials: Any) -> type[Nowhere]:
    return type("Nowhere", (Nowhere,), {"dials": staticmethod(dials)})


def until(what: str, condition: Any) -> None:
    with gevent.Timeout(BOUND, AssertionError(f"{what}: it has not come to that")):
        while not condition():
            gevent.sleep(0.001)


def is_refused(pool: Pool[Nowhere]) -> None:
    with pytest.raises(ConnectionRefusedError):
        pool.acquire(timeout=BOUND)


def test_options_in_place_of_the_timeout_are_refused_without_showing_them() -> None:
    with PoolGroup(Nowhere) as group:
        with pytest.raises(TypeError, match="options go by keyword") as raised:
            group.connection({"host": "h", "password": "hunter2"})  # type: ignore[arg-type]
        assert "hunter2" not in str(raised.value)
        assert group.pools == []


def test_a_pool_that_somebody_kept_and_uses_again_is_among_the_groups_figures_again() -> None:
    with PoolGroup(Nowhere, forget_after=0.01, idle_timeout=0.01, check_after_idle=0.02) as group:
        kept = group.pool(host="h")
        until("it is forgotten", lambda: not group.pools)
        with kept.connection():
            until("it is found again", lambda: group.stats().in_use == 1)
            assert group.pools == [kept]


def test_a_dial_that_was_begun_before_a_clear_does_not_count_for_the_breaker() -> None:
    go_on = Event()

    def hang() -> None:
        assert go_on.wait(BOUND)
        refuse()

    with Pool(dialling(hang), breaker=1, max_connections=2) as pool:
        borrower = gevent.spawn(is_refused, pool)
        until("it dials", lambda: pool.stats().opening == 1)
        pool.clear()
        go_on.set()
        borrower.get(timeout=BOUND)
        assert pool.stats().breaker == "closed"


def test_a_wrong_call_of_the_factory_does_not_count_for_the_breaker() -> None:
    with Pool(TcpConnection, {"hots": "h"}, breaker=1) as pool:
        for _ in range(3):
            with pytest.raises(TypeError, match="hots"):
                pool.acquire()
        assert pool.stats().breaker == "closed"


def test_clear_lets_all_endpoints_dial_before_it_waits_for_any(logged: Logged) -> None:
    go_on = Event()

    class Slow(Nowhere):
        def close(self) -> None:
            if self.options["host"] == "slow":
                assert go_on.wait(BOUND)

        def open(self) -> None:
            if self.options["host"] == "broken":
                self.dials()

    with PoolGroup(Slow, breaker=1, backoff=(60, 60), check_after_idle=None) as group:
        with group.connection(host="slow"):
            pass
        broken = group.pool(host="broken")
        Slow.dials = staticmethod(refuse)
        with pytest.raises(ConnectionRefusedError):
            broken.acquire()
        assert [record.levelname for record in logged.take(1)] == ["WARNING"]
        Slow.dials = staticmethod(lambda: None)
        clearing = gevent.spawn(group.clear)
        gevent.sleep(0)
        broken.release(broken.acquire(timeout=BOUND))
        assert not clearing.ready()
        go_on.set()
        clearing.get(timeout=BOUND)


def test_clear_ends_the_rest_of_the_stock_too(logged: Logged) -> None:
    kind = dialling(refuse)
    with Pool(kind, min_idle=1, backoff=(1e6, 1e6)) as pool:
        logged.take(1)
        kind.dials = staticmethod(lambda: None)
        pool.clear()
        pool.wait_ready(BOUND)


def test_retry_outlasts_a_breaker(logged: Logged) -> None:
    with LineEchoServer() as server:
        port = refused_port()
        ports = [port] * 12

        class Moving(TcpConnection):
            def __init__(self, host: str) -> None:
                super().__init__(host, ports.pop() if ports else server.port)

        with PoolGroup(Moving, breaker=2, backoff=(0.01, 0.02), acquire_timeout=BOUND) as group:

            @retry(deadline=3 * BOUND)
            def ask() -> bytes:
                with group.connection(host="127.0.0.1") as connection:
                    connection.send(b"at last\n")
                    return connection.recv_until(b"\n")

            jobs = [gevent.spawn(ask) for _ in range(10)]
            gevent.joinall(jobs, timeout=3 * BOUND, raise_error=True)
            assert {job.get() for job in jobs} == {b"at last"}
            logged.take()


def test_what_says_when_to_come_again_never_says_at_once() -> None:
    """A trial that hangs leaves nothing to wait for but itself."""
    go_on = Event()
    hangs = False

    def dial() -> None:
        if hangs:
            assert go_on.wait(BOUND)
        refuse()

    with Pool(dialling(dial), breaker=1, max_connecting=1, backoff=(0.01, 0.02), name="x") as pool:
        with pytest.raises(ConnectionRefusedError):
            pool.acquire()
        until("a trial may be made", lambda: pool.stats().breaker == "half-open")
        hangs = True
        trial = gevent.spawn(is_refused, pool)
        until("it is made", lambda: pool.stats().opening == 1)
        until("another could be made", lambda: pool._trial)
        with pytest.raises(BreakerOpenError, match="under way") as raised:
            pool.acquire()
        assert raised.value.retry_after > 0
        go_on.set()
        trial.get(timeout=BOUND)


@pytest.fixture(autouse=True)
def breakers_may_open(logged: Logged) -> Any:
    yield
    for record in logged.take():
        assert "in a row ha" in record.getMessage()


def test_a_budget_belongs_to_one_thread() -> None:
    budget = Budget(5)
    errors = []

    def elsewhere() -> None:
        try:
            Pool(Nowhere, budget=budget, reap_expired_connections=False, check_after_idle=None)
        except PoolError as error:
            errors.append(str(error))

    with Pool(Nowhere, budget=budget):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(BOUND)
        assert errors == ["this budget serves pools of another thread: make one in each thread"]
        gc.collect()
        assert (len(budget._pools), budget.faults()) == (1, [])


def test_a_budget_can_be_neither_copied_nor_pickled() -> None:
    with pytest.raises(TypeError, match="a budget cannot be copied or pickled"):
        copy.copy(Budget(1))


class Keeper:
    """Of a limit elsewhere; away at times."""

    def __init__(self) -> None:
        self.left = 5
        self.away = False

    def take(self) -> bool:
        if self.away:
            raise OSError("its keeper is away")
        self.left -= self.left > 0
        return self.left > 0

    def give_back(self) -> None:
        self.left += 1


def test_g12_a_quota_that_fails_is_logged_once_and_named_in_the_error_until_it_is_well_again(logged: Logged) -> None:
    keeper = Keeper()
    with Pool(Nowhere, budget=Budget(5, quota=keeper), name="x") as pool:
        keeper.away = True
        for _ in range(2):
            with pytest.raises(PoolExhaustedError, match="its budget's quota failed .*its keeper is away"):
                pool.acquire(timeout=0.01)
        assert [record.getMessage() for record in logged.take(1)] == [
            "Pool 'x': its budget's quota failed: OSError('its keeper is away')"
        ]
        keeper.away = False
        with pytest.raises(PoolExhaustedError):
            keeper.left = 0
            pool.acquire(timeout=0.01)
        pool._budget.replenished()  # type: ignore[union-attr]
        with pytest.raises(PoolExhaustedError, match=r"quota has no more \(0 of 5 units are taken here\)"):
            pool.acquire(timeout=0.01)
        keeper.left = 3
        pool._budget.replenished()  # type: ignore[union-attr]
        with pool.connection(timeout=BOUND):
            pass

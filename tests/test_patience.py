"""Who waits as long as the pool's own rule says shares one timer with all who do: the order of it, and asyncio's use.

What gevent's does is in ``test_waiting.py``.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

import gsocketpool.patience
from gsocketpool import Connection, PoolExhaustedError
from gsocketpool.asyncio import Pool
from gsocketpool.bridge import expire
from gsocketpool.core import Place, new_place
from gsocketpool.patience import SPARE, Patience

from .conftest import Logged

BOUND = 20.0


class Clock:
    """A pool whose timers go off when it says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], object]]] = []
        self.woken: list[Place[Any]] = []
        self.patience = Patience(weakref.ref(self))

    def _set_timer(self, limit: float, callback: Callable[[], object]) -> Callable[[], object]:
        timer = (self.now + max(limit, 0.0), callback)
        self.timers.append(timer)
        return lambda: self.timers.remove(timer) if timer in self.timers else None

    def _wake(self, place: Place[Any]) -> None:
        if place.waiter is not None:
            assert 0.0 < place.deadline <= self.now, "too early, or one who has left"
            self.woken.append(place)
        place.waiter = None

    def go_on(self, seconds: float, late: float = 0.0) -> None:
        """Let time pass; timers go off when they are due, or so much later."""
        ending = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] + late <= ending]:
            self.now = max(self.now, due[0][0] + late)
            self.timers.remove(due[0])
            due[0][1]()
        self.now = ending


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_everybody_is_woken_at_his_deadline_and_nobody_before_by_one_timer_at_most(
    late: float, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(200):
        clock = Clock()
        monkeypatch.setattr(gsocketpool.patience, "monotonic", lambda clock=clock: clock.now)
        standing: list[Place[Any]] = []
        most = 0

        def left(place: Place[Any], clock: Clock = clock, standing: list[Place[Any]] = standing) -> None:
            standing.remove(place)
            place.waiter = None
            clock.patience.leave(place)
            if rng.random() < 0.2:
                place.waiter = object()  # he stands there again, by a timer of his own

        for _ in range(rng.randrange(60)):
            what = rng.random()
            if what < 0.4:
                for _ in range(rng.randint(1, 5)):
                    place = new_place()
                    place.waiter = object()
                    clock.patience.enter(place, clock.now + 1.0)
                    standing.append(place)
            elif what < 0.6:
                clock.go_on(rng.choice([0.01, 0.1, 0.3, 1.5]), late)
                for place in clock.woken:
                    left(place)
                clock.woken.clear()
                assert all(place.deadline + late >= clock.now for place in standing)
            elif what < 0.7:
                for place in standing[:0:-1]:  # all but the first
                    left(place)
            elif standing:
                place = rng.choice(standing)
                if what < 0.9:
                    place.waiter = None  # the pool has woken him, and he has not run yet
                left(place)
            most = max(most, len(standing)) if standing else 0
            assert len(clock.timers) == (1 if standing else 0)
            assert len(clock.patience) <= 3 * most + SPARE  # who comes is not looked at for that
        clock.go_on(2.0, late)
        assert clock.woken == standing
        for place in clock.woken:
            left(place)
        assert (len(clock.patience), clock.timers) == (0, [])


def test_an_interruption_in_the_middle_of_the_ring_costs_nobody_his_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, say: and the loop is run again."""
    clock = Clock()
    monkeypatch.setattr(gsocketpool.patience, "monotonic", lambda: clock.now)
    for _ in range(3):
        place = new_place()
        place.waiter = object()
        clock.patience.enter(place, 1.0)
    wake = clock._wake

    def interrupted(_: Place[Any]) -> None:
        monkeypatch.setattr(clock, "_wake", wake)
        raise KeyboardInterrupt

    monkeypatch.setattr(clock, "_wake", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clock.go_on(1.0)
    clock.go_on(1.0)
    assert len(clock.woken) == 3


# asyncio


class Plain(Connection):
    """Connected to nobody."""

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def is_connected(self) -> bool:
        return True


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
on_each_loop = pytest.mark.parametrize("loop", LOOPS)


def run(loop: str, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    it = LOOPS[loop]()
    try:
        it.run_until_complete(asyncio.wait_for(scenario(), BOUND))
    finally:
        it.close()
        gc.collect()


async def waiters(pool: Pool[Plain], count: int, **acquiring: Any) -> list[asyncio.Task[Plain]]:
    tasks = [asyncio.create_task(pool.acquire(**acquiring)) for _ in range(count)]
    await asyncio.sleep(0)  # all wait now
    return tasks


def is_empty(pool: Pool[Any]) -> bool:
    return (len(pool._patience), pool._patience._stop, pool.faults()) == (0, None, [])


@on_each_loop
def test_tasks_wait_until_their_deadlines_in_the_order_of_their_coming(loop: str) -> None:
    async def scenario() -> None:
        async with Pool(Plain, max_connections=1, acquire_timeout=0.15) as pool:
            held = await pool.acquire()

            async def come() -> Plain:
                time.sleep(0.02)  # after the one before, and no timer goes off in between
                return await pool.acquire()

            began = time.monotonic()
            queue = [asyncio.create_task(come()) for _ in range(5)]
            order: list[int] = []
            for number, task in enumerate(queue):
                task.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
            errors = await asyncio.gather(*queue, return_exceptions=True)
            assert all(isinstance(error, PoolExhaustedError) for error in errors)
            assert min(error.waited for error in errors if isinstance(error, PoolExhaustedError)) >= 0.15
            assert time.monotonic() - began >= 0.15 + 5 * 0.02 - 0.001
            assert order == sorted(order)
            assert is_empty(pool)
            await pool.release(held)

    run(loop, scenario)


@on_each_loop
def test_tasks_that_wait_for_another_time_are_not_touched(loop: str) -> None:
    async def scenario() -> None:
        async with Pool(Plain, max_connections=1, acquire_timeout=0.1) as pool:
            held = await pool.acquire()
            (for_ever,), (longer,) = await waiters(pool, 1, timeout=None), await waiters(pool, 1, timeout=BOUND)
            usual = await waiters(pool, 3)
            await asyncio.wait(usual)
            assert all(isinstance(task.exception(), PoolExhaustedError) for task in usual)
            assert (for_ever.done(), longer.done(), pool.waiting) == (False, False, 2)
            await pool.release(held)
            await pool.release(await for_ever)
            await pool.release(await longer)
            assert is_empty(pool)

    run(loop, scenario)


def test_a_thousand_tasks_wait_by_one_timer_and_then_there_is_none() -> None:
    async def scenario() -> None:
        def timers() -> list[object]:
            """What is called when somebody's time is over."""
            timers: list[Any] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
            return [each._callback for each in timers if each._callback in (pool._patience._ring, expire)]

        async with Pool(Plain, max_connections=1, acquire_timeout=BOUND) as pool:
            held = await pool.acquire()
            queue = await waiters(pool, 1000)
            assert pool.waiting == 1000
            assert timers().count(pool._patience._ring) == 1
            assert len(timers()) < 5  # the pool's own jobs sleep, too
            await pool.release(held)
            for task in queue:
                await pool.release(await task)
            assert pool._patience._ring not in timers()
            assert is_empty(pool)

    run("asyncio", scenario)


@on_each_loop
def test_tasks_that_are_cancelled_behind_a_patient_one_leave_nothing_behind(loop: str) -> None:
    async def scenario() -> None:
        async with Pool(Plain, max_connections=1, acquire_timeout=3600) as pool:
            held = await pool.acquire()
            first, second = await waiters(pool, 2)  # the very first waits by itself
            for _ in range(20):
                crowd = await waiters(pool, 100)
                for task in crowd[::-1]:
                    task.cancel()
                await asyncio.wait(crowd)
                assert len(pool._patience) <= pool._patience._crowd + 1
            assert len(pool._patience) <= 2 * 101 + SPARE
            await pool.release(held)
            await pool.release(await first)
            await pool.release(await second)
            assert is_empty(pool)

    run(loop, scenario)


@on_each_loop
def test_a_task_that_is_granted_a_connection_in_the_moment_in_which_its_time_is_over_has_it(loop: str) -> None:
    async def scenario() -> None:
        async with Pool(Plain, max_connections=1, acquire_timeout=0.1) as pool:
            held = await pool.acquire()
            waiter, behind = await waiters(pool, 2)
            time.sleep(0.15)  # their time is over, and the loop has not looked yet
            pool._patience._ring()
            await pool.release(held)
            assert await waiter is held
            assert isinstance((await asyncio.gather(behind, return_exceptions=True))[0], PoolExhaustedError)
            await pool.release(held)
            assert is_empty(pool)

    run(loop, scenario)


@on_each_loop
def test_tasks_that_are_woken_for_nothing_and_wait_on_leave_nothing_behind(
    loop: str, logged: Logged, caplog: pytest.LogCaptureFixture
) -> None:
    """They waited for dials, which the breaker called off: from then on each waits by himself."""
    dials: list[asyncio.Future[None]] = []

    class Dialled(Plain):
        async def open(self) -> None:  # type: ignore[override]
            if dials:
                await dials.pop(0)

    async def scenario() -> None:
        pool = Pool(Dialled, max_connections=3, acquire_timeout=3600, breaker=1, backoff=(60, 60))
        held = [await pool.acquire() for _ in range(3)]
        results: list[str] = []

        async def borrow() -> None:
            try:
                async with pool.connection():
                    results.append("served")
                    await asyncio.sleep(0)
            except OSError as error:
                results.append(str(error))

        queue = [asyncio.create_task(borrow()) for _ in range(6)]
        await asyncio.sleep(0)
        failing, going_well = asyncio.get_running_loop().create_future(), asyncio.get_running_loop().create_future()
        dials[:] = [failing, going_well]
        await pool.drop(held.pop())
        await pool.drop(held.pop())
        while dials:
            await asyncio.sleep(0)
        failing.set_exception(OSError("refused"))
        while pool.stats().breaker == "closed":
            await asyncio.sleep(0)
        going_well.set_result(None)
        await pool.release(held.pop())
        await asyncio.gather(*queue)
        assert sorted(results) == ["refused"] + 5 * ["served"]
        assert is_empty(pool)
        await pool.close()

    run(loop, scenario)
    assert len(logged.take()) == 1
    caplog.clear()  # the record refers to the error, that to the loop, and that to greenlets
    gc.collect()


def test_a_pool_that_is_let_go_after_its_tasks_were_cancelled_is_collected() -> None:
    async def scenario() -> None:
        pool = Pool(Plain, max_connections=1, acquire_timeout=3600)
        held = await pool.acquire()
        queue = await waiters(pool, 10)
        for task in queue:
            task.cancel()
        await asyncio.wait(queue)
        await pool.release(held)
        gone = weakref.ref(pool)
        del pool, queue, task
        while gone() is not None:
            gc.collect()
            await asyncio.sleep(0)

    run("asyncio", scenario)

"""What only threads can do to a pool."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from .harness import BOUND, Runtime, do, only, within
from .kinds import Script, ask, line_pool
from .server import EchoServer


@only("threading")
async def test_what_one_thread_has_borrowed_another_may_give_back(rt: Runtime) -> None:
    pool = Script().pool(rt)
    connection = await do(pool.acquire(timeout=BOUND))
    await rt.join(rt.spawn(lambda: do(pool.release(connection))))
    assert pool.idle == 1


@only("threading")
async def test_pools_of_one_budget_are_used_by_many_threads(rt: Runtime) -> None:
    budget = rt.api.Budget(3)
    script = Script()  # of all three, so that it counts them together
    pools = [script.pool(rt, budget=budget) for _ in range(3)]

    async def borrower(number: int) -> None:
        for turn in range(20):
            async with within(pools[(number + turn) % 3].connection(timeout=BOUND)):
                assert script.now <= 3

    await rt.join(*(rt.spawn(borrower, number) for number in range(8)))
    for pool in pools:
        await do(pool.close(BOUND))
    assert budget.used == 0
    assert script.most <= 3


class Interrupt:
    """A KeyboardInterrupt in the main thread, once. The signal is sent until it is raised: one that comes just before
    the thread begins to wait for a lock does not end that waiting (CPython looks for signals before it waits)."""

    def __init__(self, rt: Runtime, condition: Callable[[], object]) -> None:
        assert threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGUSR2, self._interrupt)
        self._rt = rt
        self._main = threading.get_ident()
        self._done = False
        self._task = rt.spawn(self._send, condition)

    def _interrupt(self, number: int, frame: object) -> None:
        if not self._done:
            self._done = True
            raise KeyboardInterrupt

    async def _send(self, condition: Callable[[], object]) -> None:
        await self._rt.until(condition)
        while not self._done:
            signal.pthread_kill(self._main, signal.SIGUSR2)
            await self._rt.sleep(0.01)

    async def is_over(self) -> None:
        await self._rt.join(self._task)
        signal.signal(signal.SIGUSR2, self._before)


@only("threading")
async def test_a_keyboard_interrupt_in_the_main_thread_counts_as_a_kill(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1)
    async with within(pool.connection(timeout=BOUND)):
        interrupt = Interrupt(rt, lambda: pool.waiting)
        with pytest.raises(KeyboardInterrupt):
            await do(pool.acquire(timeout=BOUND))
        await interrupt.is_over()
        assert pool.waiting == 0
    await rt.is_sound(pool)
    assert pool.idle == 1


@only("threading")
async def test_g3_a_keyboard_interrupt_in_a_block_costs_the_connection(rt: Runtime, server: EchoServer) -> None:
    server.hold()
    pool = line_pool(rt, server, max_connections=1)
    interrupt = Interrupt(rt, lambda: server.heard)
    with pytest.raises(KeyboardInterrupt):
        await ask(pool, "never answered", timeout=BOUND)
    await interrupt.is_over()
    server.let_go()
    await ask(pool, "mine", timeout=BOUND)
    assert pool.stats().closed["discarded"] == 1


@only("threading")
async def test_the_threads_of_the_package_are_daemons_and_are_used_again(rt: Runtime) -> None:
    before = set(threading.enumerate())
    pool = Script().pool(rt, max_connections=1)
    for _ in range(50):
        async with within(pool.connection(timeout=BOUND)) as connection:
            await do(pool.drop(connection))
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert all(thread.daemon for thread in started)
    assert len(started) < 10


@only("threading")
async def test_no_lock_is_held_while_a_log_handler_runs(rt: Runtime, logged: Any) -> None:
    """A handler may itself use the pool, or wait for a thread that does."""
    import logging

    async def fail(_: Any) -> None:
        raise OSError("out of order")

    pool = Script(on_close=fail).pool(rt)
    seen: list[str] = []

    class Nosy(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            other = threading.Thread(target=lambda: seen.append(repr(pool.stats()) + repr(pool)), daemon=True)
            other.start()
            other.join(BOUND)

    nosy = Nosy()
    logging.getLogger("gsocketpool").addHandler(nosy)
    try:
        connection = await do(pool.acquire(timeout=BOUND))
        await do(pool.drop(connection))
        await rt.until(lambda: seen)
    finally:
        logging.getLogger("gsocketpool").removeHandler(nosy)
    assert len(logged.take()) == 1


@only("threading")
async def test_dials_of_many_threads_run_side_by_side(rt: Runtime) -> None:
    all_dial = threading.Barrier(4)

    async def dial(_: Any) -> None:
        all_dial.wait(BOUND)

    pool = Script(on_open=dial).pool(rt, max_connections=4)
    tasks = [rt.spawn(lambda: do(pool.acquire(timeout=BOUND))) for _ in range(4)]
    for connection in await rt.join(*tasks):
        await do(pool.release(connection))


@only("threading")
async def test_g7_a_waiter_gives_up_in_time_while_others_are_busy(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1)

    async def busy() -> None:
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            pass

    async with within(pool.connection(timeout=BOUND)):
        tasks = [rt.spawn(busy) for _ in range(3)]
        began = time.monotonic()
        with pytest.raises(rt.api.PoolExhaustedError):
            await do(pool.acquire(timeout=0.05))
        assert time.monotonic() - began < BOUND
        await rt.join(*tasks)

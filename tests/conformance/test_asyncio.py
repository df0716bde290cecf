"""What only asyncio has: its own time limits, groups of tasks, loops, and methods that are plain or not."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from .harness import BOUND, Runtime, only, within
from .kinds import Script, ask, line_pool
from .server import EchoServer

TASKS = ("asyncio", "uvloop")


@only(*TASKS)
async def test_g3_wait_for_ends_a_borrower_in_time_and_costs_its_connection(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, max_connections=1, check_after_idle=None)
    await ask(pool, "before", timeout=BOUND)  # so that there is nothing to wait for but the answer
    server.hold()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ask(pool, "too late", timeout=BOUND), 0.05)
    server.let_go()
    await ask(pool, "mine", timeout=BOUND)
    assert pool.stats().closed["discarded"] == 1


@only(*TASKS)
async def test_g4_wait_for_around_an_acquire_loses_nothing(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1)
    connection = await pool.acquire(timeout=BOUND)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(pool.acquire(timeout=None), 0.02)
    waiting = asyncio.ensure_future(asyncio.wait_for(pool.acquire(timeout=None), BOUND))
    await rt.waiting(pool, 1)
    await pool.release(connection)
    assert await waiting is connection
    await pool.release(connection)


if sys.version_info >= (3, 11):

    @only(*TASKS)
    async def test_asyncio_timeout_ends_who_waits_and_who_uses_a_connection(rt: Runtime, server: EchoServer) -> None:
        pool = line_pool(rt, server, max_connections=1)
        async with pool.connection(timeout=BOUND) as line:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await pool.acquire(timeout=None)
            assert pool.waiting == 0
            await line.echo("unharmed")
        server.hold()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ask(pool, "too late", timeout=BOUND)
        server.let_go()
        await ask(pool, "mine", timeout=BOUND)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    @only(*TASKS)
    async def test_a_task_group_that_fails_ends_all_its_borrowers(rt: Runtime, server: EchoServer) -> None:
        server.hold()
        pool = line_pool(rt, server, max_connections=2)

        async def fail() -> None:
            await rt.until(lambda: len(server.heard) == 2 and pool.waiting == 3)
            raise ValueError("one is enough")

        with pytest.raises(BaseExceptionGroup) as caught:  # noqa: F821
            async with asyncio.TaskGroup() as group:
                for number in range(5):
                    group.create_task(ask(pool, f"of {number}", timeout=BOUND))
                group.create_task(fail())
        assert [type(error) for error in caught.value.exceptions] == [ValueError]
        await rt.until(lambda: pool.total == 0)
        assert (pool.in_use, pool.waiting) == (0, 0)
        server.let_go()
        await ask(pool, "mine", timeout=BOUND)


@only(*TASKS)
async def test_gather_lets_borrowers_share_a_pool(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server)
    await asyncio.gather(*(ask(pool, f"of {number}", timeout=BOUND) for number in range(10)))
    assert server.most <= 2


@only(*TASKS)
async def test_a_connections_methods_may_be_plain_or_not(rt: Runtime) -> None:
    said: list[str] = []

    class Plain(rt.api.Connection):  # type: ignore[name-defined, misc]
        connected = False

        def open(self) -> None:
            said.append("open")
            self.connected = True

        def close(self) -> None:
            said.append("close")
            self.connected = False

        def is_connected(self) -> bool:
            return self.connected

        def check(self) -> bool:
            said.append("check")
            return True

        def reset(self) -> None:
            said.append("reset")

        def keepalive(self) -> bool:
            said.append("keepalive")
            return True

    plain: Any = Plain

    class Awaited(plain):  # type: ignore[misc]
        async def open(self) -> None:
            await asyncio.sleep(0)
            super().open()

        async def close(self) -> None:
            await asyncio.sleep(0)
            super().close()

        async def check(self) -> bool:
            await asyncio.sleep(0)
            return bool(super().check())

        async def reset(self) -> None:
            await asyncio.sleep(0)
            super().reset()

        async def keepalive(self) -> bool:
            await asyncio.sleep(0)
            return bool(super().keepalive())

    for kind in (Plain, Awaited):
        said.clear()
        pool = rt.api.Pool(kind, max_connections=1, check_after_idle=0, keepalive=0.03)
        rt.watch(pool)
        for _ in range(2):
            async with pool.connection(timeout=BOUND):
                pass
        await rt.until(lambda: "keepalive" in said)
        await pool.close()
        assert said[:4] == ["open", "reset", "check", "reset"]
        await rt.until(lambda: said[-1] == "close")  # a keepalive may have been under way


@only(*TASKS)
async def test_plain_objects_are_treated_by_functions_plain_or_not(rt: Runtime) -> None:
    class Thing:
        closed = False

    async def open_it() -> Thing:
        await asyncio.sleep(0)
        return Thing()

    async def close_it(thing: Thing) -> None:
        await asyncio.sleep(0)
        thing.closed = True

    async def check_it(thing: Thing) -> bool:
        await asyncio.sleep(0)
        return not thing.closed

    def close_at_once(thing: Thing) -> None:
        thing.closed = True

    for how in (
        rt.api.wrap(open_it, close=close_it, check=check_it, reset=check_it, keepalive=check_it),
        rt.api.wrap(Thing, close=close_at_once, check=lambda thing: not thing.closed),
        rt.api.wrap(open_it, close=close_at_once),
    ):
        pool = rt.api.Pool(how, max_connections=1, check_after_idle=0)
        rt.watch(pool)
        for _ in range(2):
            async with pool.connection(timeout=BOUND) as thing:
                assert type(thing) is Thing
        await pool.drop(thing)
        assert thing.closed
        assert pool.stats().opened == 1


@only(*TASKS)
async def test_a_pool_of_another_loop_says_so(rt: Runtime) -> None:
    pool = Script().pool(rt)  # without a reset: a release need not wait, and might not notice
    connection = await pool.acquire(timeout=BOUND)
    await pool.release(await pool.acquire(timeout=BOUND))
    errors: list[BaseException] = []

    def elsewhere() -> None:
        async def use() -> None:
            calls: list[Callable[[], Any]] = [
                lambda: pool.acquire(timeout=1),
                lambda: pool.acquire(),
                lambda: pool.connection().__aenter__(),
                lambda: pool.release(connection),
                lambda: pool.clear(),
                lambda: pool.close(),
            ]
            for call in calls:
                try:
                    await call()
                except rt.api.PoolError as error:
                    errors.append(error)

        asyncio.run(use())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await rt.until(lambda: not thread.is_alive())
    thread.join()
    assert len(errors) == 6
    assert all("another event loop" in str(error) for error in errors)
    assert (pool.idle, pool.in_use) == (1, 1)
    await pool.release(connection)


@only(*TASKS)
async def test_a_pool_needs_a_running_loop_and_no_initial_connections(rt: Runtime) -> None:
    with pytest.raises(ValueError, match="min_idle"):
        Script().pool(rt, initial_connections=1)
    errors: list[BaseException] = []

    def without_a_loop() -> None:
        try:
            Script().pool(rt)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=without_a_loop)
    thread.start()
    thread.join()
    assert "loop" in str(errors[0])


@only(*TASKS)
async def test_a_context_variable_of_the_borrower_is_seen_by_its_check_and_reset(rt: Runtime) -> None:
    import contextvars

    request = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def look(_: Any) -> None:
        seen.append(request.get())

    pool = Script(on_check=look, on_reset=look).pool(rt, max_connections=1, check_after_idle=0)

    async def borrow(name: str) -> None:
        request.set(name)
        async with pool.connection(timeout=BOUND):
            pass

    await asyncio.ensure_future(borrow("a"))
    await asyncio.ensure_future(borrow("b"))
    assert seen == ["a", "b", "b"]


@only(*TASKS)
async def test_g4_everything_is_cancelled_again_and_again_and_nothing_is_lost(rt: Runtime, server: EchoServer) -> None:
    """Whoever cancels may not leave it at once: the cleaning up is cancelled, too."""
    pool = line_pool(rt, server, max_connections=1)

    async def borrower() -> None:
        async with within(pool.connection(timeout=BOUND)) as line:
            await line.echo("x")

    for steps in range(12):
        tasks = [asyncio.ensure_future(borrower()) for _ in range(3)]
        for _ in range(steps):
            await asyncio.sleep(0)
        for _ in range(3):
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait(tasks)
    await ask(pool, "fine", timeout=BOUND)
    await rt.is_sound(pool)
    assert (pool.in_use, pool.waiting) == (0, 0)
    assert server.most <= 1


@only(*TASKS)
async def test_a_task_that_is_cancelled_swallows_it_and_goes_on(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, max_connections=1)
    going_on = rt.event()

    async def stubborn() -> None:
        try:
            async with pool.connection(timeout=BOUND) as line:
                await line.echo("first")
                going_on.set()
                await asyncio.sleep(BOUND)
        except asyncio.CancelledError:
            pass
        await ask(pool, "second", timeout=BOUND)

    task = rt.spawn(stubborn)
    await going_on.wait()
    rt.cancel(task)
    await rt.join(task)
    assert server.accepted == 2


@only(*TASKS)
async def test_g12_in_debug_mode_nothing_is_said_either(rt: Runtime, server: EchoServer) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = BOUND
    pool = line_pool(rt, server, min_idle=1, keepalive=0.02, check_after_idle=0.02, max_lifetime=0.1)
    await asyncio.gather(*(ask(pool, f"of {number}", timeout=BOUND) for number in range(6)))
    kept = [pool]
    del pool
    await rt.sleep(0.05)
    thread = threading.Thread(target=kept.clear)
    thread.start()
    await rt.until(lambda: not thread.is_alive())
    thread.join()
    await rt.until(lambda: gc.collect() >= 0 and server.serving == 0)

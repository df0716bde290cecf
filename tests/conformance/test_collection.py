"""A pool that nobody refers to any more is gone, and so is all that it did and had."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from .harness import BOUND, Runtime, do, within
from .kinds import Line, Script, ask, line_pool
from .server import EchoServer

ALL_THAT_IS_DONE_IN_THE_BACKGROUND: dict[str, Any] = {
    "min_idle": 2,
    "max_connections": 4,
    "keepalive": 0.05,
    "idle_timeout": 60,
    "max_lifetime": 60,
    "check_after_idle": 0.05,
    "leak_threshold": 60,
    "reclaim": True,
    "breaker": 3,
}


async def test_g9_a_pool_that_nobody_refers_to_is_collected_and_its_connections_closed(
    rt: Runtime, server: EchoServer
) -> None:
    for settings in ({}, {"min_idle": 1}, ALL_THAT_IS_DONE_IN_THE_BACKGROUND):
        pool = line_pool(rt, server, **settings)
        await ask(pool, "used", timeout=BOUND)
        await rt.quiet()
        ref = weakref.ref(pool)
        del pool
        await rt.until(lambda: gc.collect() >= 0 and ref() is None, lambda: f"{gc.get_referrers(ref())}")  # noqa: B023
        await rt.until(lambda: server.serving == 0)


async def test_g9_a_pool_that_has_waited_dialled_and_failed_is_collected(rt: Runtime) -> None:
    async def refuse_now_and_then(connection: Any) -> None:
        if connection.number % 2:
            raise ConnectionRefusedError("now and then")

    script = Script(on_open=refuse_now_and_then)
    pool = script.pool(rt, max_connections=1)
    for _ in range(4):
        try:
            async with within(pool.connection(timeout=BOUND)) as connection:
                with pytest.raises(rt.api.PoolExhaustedError):
                    await do(pool.acquire(timeout=0.01))
                await do(pool.drop(connection))
        except ConnectionRefusedError:
            pass
        connection = None
    ref = weakref.ref(pool)
    del pool
    await rt.until(lambda: gc.collect() >= 0 and ref() is None)
    await rt.until(lambda: script.now == 0)


async def test_g9_a_group_that_nobody_refers_to_is_collected(rt: Runtime, server: EchoServer) -> None:
    group = rt.group(Line, min_idle=1, max_total=4)
    async with within(group.connection(BOUND, host=server.host, port=server.port)) as line:
        await line.echo("used")
    refs = [weakref.ref(each) for each in (group, *group.pools)]
    del group
    await rt.until(lambda: gc.collect() >= 0 and not any(ref() for ref in refs))
    await rt.until(lambda: server.serving == 0)


async def test_g9_a_pool_that_is_collected_while_something_is_lent_leaves_that_to_its_borrower(
    rt: Runtime, server: EchoServer
) -> None:
    pool = line_pool(rt, server)
    line = await do(pool.acquire(timeout=BOUND))
    other = await do(pool.acquire(timeout=BOUND))
    await do(pool.release(other))
    ref = weakref.ref(pool)
    del pool
    await rt.until(lambda: gc.collect() >= 0 and ref() is None)
    await rt.until(lambda: server.serving == 1)
    await line.echo("still mine")
    await do(line.close())


async def test_g9_a_pool_lives_as_long_as_a_block_uses_it(rt: Runtime, server: EchoServer) -> None:
    async with within(line_pool(rt, server).connection(timeout=BOUND)) as line:
        gc.collect()
        await rt.quiet()
        await line.echo("in use")
    del line
    await rt.until(lambda: gc.collect() >= 0 and server.serving == 0)


async def test_g9_a_pool_may_be_collected_in_another_thread(rt: Runtime, server: EchoServer) -> None:
    every: list[dict[str, Any]] = [{}, ALL_THAT_IS_DONE_IN_THE_BACKGROUND]
    for settings in every:
        kept = [line_pool(rt, server, **settings)]
        await ask(kept[0], "used", timeout=BOUND)
        ref = weakref.ref(kept[0])
        await rt.quiet()
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join(BOUND)
        await rt.until(lambda: gc.collect() >= 0 and ref() is None)  # noqa: B023
        await rt.until(lambda: server.serving == 0)


async def test_a_pool_in_a_circle_is_collected_too(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt)
    async with within(pool.connection(timeout=BOUND)):
        pass
    script.pool_too = pool  # type: ignore[attr-defined]
    ref = weakref.ref(pool)
    del pool, script
    await rt.until(lambda: gc.collect() >= 0 and ref() is None)

"""What `close` means for whoever waits, uses a connection, or dials."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import BOUND, CANCEL, KILL_AT_ONCE, Runtime, do, needs, within
from .kinds import Script, ask, line_pool
from .server import EchoServer


async def test_g11_whoever_waits_is_told_that_the_pool_was_closed(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1, name="closing")
    connection = await do(pool.acquire(timeout=BOUND))
    waiters = [rt.spawn(lambda: do(pool.acquire(timeout=None))) for _ in range(3)]
    await rt.waiting(pool, 3)
    await do(pool.close())
    for waiter in waiters:
        error = await rt.outcome(waiter)
        assert isinstance(error, rt.api.PoolClosedError)
        assert "closing" in str(error)
    await do(pool.release(connection))


async def test_g11_closing_twice_is_fine_and_afterwards_nothing_is_lent(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server)
    await ask(pool, "before", timeout=BOUND)
    assert not pool.closed
    await do(pool.close())
    await do(pool.close())
    await do(pool.close(1))
    assert pool.closed
    assert (pool.size, pool.total) == (0, 0)
    for timeout in (0, 1, None):
        with pytest.raises(rt.api.PoolClosedError):
            await do(pool.acquire(timeout=timeout))
    with pytest.raises(rt.api.PoolClosedError):
        async with within(pool.connection()):
            pass


async def test_g11_what_idles_is_closed_now_and_what_is_lent_when_it_returns(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server)
    idle = await do(pool.acquire(timeout=BOUND))
    async with within(pool.connection(timeout=BOUND)) as line:
        await do(pool.release(idle))
        await do(pool.close())
        assert not idle.is_connected()
        await line.echo("still in use")
        assert (pool.size, server.open) == (1, 1)
    await rt.until(lambda: pool.total == 0)
    assert server.open == 0


async def test_g11_a_dial_under_way_is_closed_when_it_ends(rt: Runtime) -> None:
    may_open = rt.event()
    script = Script(on_open=lambda _: may_open.wait())
    pool = script.pool(rt)
    borrower = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open"))
    await do(pool.close())
    assert isinstance(await rt.outcome(borrower), rt.api.PoolClosedError)
    assert pool.total == 1
    may_open.set()
    await rt.until(lambda: pool.total == 0)
    assert script.now == 0


async def test_g11_close_with_a_timeout_waits_for_what_is_lent(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt)
    connection = await do(pool.acquire(timeout=BOUND))
    closing = rt.spawn(lambda: do(pool.close(BOUND)))
    await rt.until(lambda: pool.closed)
    await rt.quiet()
    assert not rt.has_ended(closing)
    await do(pool.release(connection))
    await rt.join(closing)
    assert script.now == 0


async def test_g11_close_with_a_timeout_takes_what_does_not_come_back(
    rt: Runtime, server: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsocketpool.driver.LAST_MOMENT", BOUND)
    pool = line_pool(rt, server)
    line = await do(pool.acquire(timeout=BOUND))
    await do(pool.close(0.05))
    assert (pool.size, pool.total) == (0, 0)
    await rt.until(lambda: server.open == 0)
    assert not line.is_connected()
    await do(pool.release(line))  # is no mistake
    assert pool.stats().closed["closed"] == 1


async def test_g11_close_with_a_timeout_gives_a_close_that_hangs_one_moment_more(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsocketpool.driver.LAST_MOMENT", 0.1)
    may_close = rt.event()

    async def hang(_: Any) -> None:
        await may_close.wait()

    script = Script(on_close=hang)
    pool = script.pool(rt)
    await do(pool.acquire(timeout=BOUND))
    await do(pool.close(0.01))
    assert (pool.in_use, pool.total) == (0, 1)
    may_close.set()
    await rt.until(lambda: pool.total == 0)


async def test_g11_close_waits_for_what_is_being_closed_already(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsocketpool.driver.LAST_MOMENT", BOUND)
    may_close = rt.event()

    async def hang(_: Any) -> None:
        await may_close.wait()

    script = Script(on_close=hang)
    pool = script.pool(rt)
    connection = await do(pool.acquire(timeout=BOUND))
    dropping = rt.spawn(lambda: do(pool.drop(connection)))
    await rt.until(lambda: script.count("close"))
    closers = [rt.spawn(lambda: do(pool.close())) for _ in range(2)]
    await rt.until(lambda: pool.closed)
    await rt.quiet()
    assert not any(map(rt.has_ended, closers))
    may_close.set()
    await rt.join(dropping, *closers)
    assert pool.total == 0


async def test_g11_close_waits_a_moment_only_for_a_close_that_hangs(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsocketpool.driver.LAST_MOMENT", 0.1)
    may_close = rt.event()

    async def hang(_: Any) -> None:
        await may_close.wait()

    script = Script(on_close=hang)
    pool = script.pool(rt)
    connection = await do(pool.acquire(timeout=BOUND))
    dropping = rt.spawn(lambda: do(pool.drop(connection)))
    await rt.until(lambda: script.count("close"))
    await do(pool.close())
    assert pool.total == 1
    may_close.set()
    await rt.join(dropping)
    assert pool.total == 0


async def test_g11_two_may_close_at_once(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt)
    connection = await do(pool.acquire(timeout=BOUND))
    closers = [rt.spawn(lambda t=timeout: do(pool.close(t))) for timeout in (BOUND, None, BOUND)]
    await rt.until(lambda: pool.closed)
    await do(pool.release(connection))
    await rt.join(*closers)
    assert script.count("close") == 1


async def test_g11_a_pool_is_closed_when_its_block_is_left(rt: Runtime, server: EchoServer) -> None:
    async with within(line_pool(rt, server)) as pool:
        await ask(pool, "inside", timeout=BOUND)
    assert pool.closed
    assert server.open == 0


async def test_g11_what_close_raises_is_logged_and_costs_nothing(rt: Runtime, logged: Any) -> None:
    async def fail(_: Any) -> None:
        raise OSError("it would not close")

    script = Script(on_close=fail)
    pool = script.pool(rt, name="stubborn")
    connection = await do(pool.acquire(timeout=BOUND))
    await do(pool.drop(connection))
    assert pool.total == 0
    [record] = logged.take(1)
    assert "stubborn" in record.getMessage()
    assert "it would not close" in record.getMessage()


async def test_g4_a_close_that_hangs_gives_its_slot_up_after_a_while(rt: Runtime, logged: Any) -> None:
    class Hasty(rt.api.Pool):  # type: ignore[name-defined, misc]
        close_grace = 0.05

    may_close = rt.event()

    async def hang(_: Any) -> None:
        await may_close.wait()

    script = Script(on_close=hang)
    pool = rt.made_by(Hasty, *script.kind, max_connections=1)
    connection = await do(pool.acquire(timeout=BOUND))
    await do(pool.drop(connection))
    assert pool.total == 0
    [record] = logged.take(1)
    assert "close() failed" in record.getMessage()
    may_close.set()
    await rt.until(lambda: script.now == 0)


@needs(KILL_AT_ONCE)
async def test_a_close_that_hangs_is_ended_after_a_while(rt: Runtime, logged: Any) -> None:
    class Hasty(rt.api.Pool):  # type: ignore[name-defined, misc]
        close_grace = 0.05

    never, ended = rt.event(), rt.event()

    async def hang(_: Any) -> None:
        try:
            await never.wait()
        finally:
            ended.set()

    pool = rt.made_by(Hasty, *Script(on_close=hang).kind)
    await do(pool.drop(await do(pool.acquire(timeout=BOUND))))
    await ended.wait()
    assert len(logged.take()) == 1


@needs(CANCEL)
async def test_g11_whoever_closes_may_be_cancelled_and_all_is_closed_nevertheless(rt: Runtime) -> None:
    may_close = rt.event()

    async def slowly(_: Any) -> None:
        await may_close.wait()

    script = Script(on_close=slowly)
    pool = script.pool(rt)
    async with within(pool.connection(timeout=BOUND)):
        pass
    closer = rt.spawn(lambda: do(pool.close()))
    await rt.until(lambda: script.count("close"))
    rt.cancel(closer)
    assert isinstance(await rt.outcome(closer), rt.killed)
    assert pool.closed
    may_close.set()
    await rt.until(lambda: pool.total == 0)
    assert script.now == 0


async def test_g11_whoever_waits_for_the_stock_is_told_that_the_pool_was_closed(rt: Runtime) -> None:
    may_open = rt.event()
    script = Script(on_open=lambda _: may_open.wait())
    pool = script.pool(rt, min_idle=1)
    waiter = rt.spawn(lambda: do(pool.wait_ready(BOUND)))
    await rt.until(lambda: script.count("open"))
    await rt.quiet()
    await do(pool.close())
    assert isinstance(await rt.outcome(waiter), rt.api.PoolClosedError)
    may_open.set()
    await rt.until(lambda: pool.total == 0)

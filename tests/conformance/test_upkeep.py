"""What a pool does of its own accord."""

from __future__ import annotations

from typing import Any

import pytest

from tests.servers import refused_port

from .harness import BOUND, WAITING_CONSTRUCTOR, Runtime, do, needs, within
from .kinds import Line, Script, ask, line_pool
from .server import EchoServer


@needs(WAITING_CONSTRUCTOR)
async def test_the_initial_connections_are_there_when_the_pool_is_made(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, initial_connections=3, max_connections=3)
    assert (pool.idle, pool.size) == (3, 3)
    await ask(pool, "warm", timeout=0)


@needs(WAITING_CONSTRUCTOR)
async def test_a_pool_whose_initial_connections_fail_is_none(rt: Runtime) -> None:
    with pytest.raises(ConnectionRefusedError):
        rt.pool(Line, {"host": "127.0.0.1", "port": refused_port()}, initial_connections=2)


async def test_min_idle_connections_are_kept_ready(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, min_idle=2, max_connections=4)
    await do(pool.wait_ready(BOUND))
    assert pool.idle == 2
    async with within(pool.connection(timeout=0)) as line:
        await line.echo("warm")
        await rt.until(lambda: pool.idle == 2)
    assert pool.size == 3


async def test_what_the_stock_loses_is_replaced(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, min_idle=2, max_connections=4)
    await do(pool.wait_ready(BOUND))
    await rt.until(lambda: server.accepted == 2)  # which may be later than the client knows of it
    server.hang_up()
    await rt.until(lambda: server.accepted >= 4 and pool.idle >= 2)
    await ask(pool, "warm again", timeout=0)


async def test_wait_ready_says_why_there_is_nothing(rt: Runtime, logged: Any) -> None:
    pool = rt.pool(Line, {"host": "127.0.0.1", "port": refused_port()}, min_idle=1, backoff=(0.01, 0.02))
    await rt.until(lambda: pool.stats().open_failures)
    with pytest.raises(rt.api.PoolExhaustedError) as caught:
        await do(pool.wait_ready(0.1))
    assert isinstance(caught.value.last_error, ConnectionRefusedError)
    await do(pool.close(BOUND))  # or it would go on to say so
    await rt.until(lambda: not pool._talking)
    assert logged.take()


async def test_the_stock_is_tried_for_again_after_a_failure(rt: Runtime, logged: Any) -> None:
    async def refuse_twice(connection: Any) -> None:
        if connection.number < 2:
            raise ConnectionRefusedError("for now")

    script = Script(on_open=refuse_twice)
    pool = script.pool(rt, min_idle=1, backoff=(0.01, 0.02))
    await do(pool.wait_ready(BOUND))
    assert script.count("open") == 3
    logged.take(2)


async def test_g8_a_connection_whose_peer_hung_up_is_not_lent(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, max_connections=1, check_after_idle=0)
    for reset in (False, True):
        await ask(pool, "before", timeout=BOUND)
        server.hang_up(reset)
        await ask(pool, "after", timeout=BOUND)
    assert pool.stats().closed["stale"] == 2


async def test_g8_a_connection_on_which_the_peer_said_something_unasked_is_not_lent(
    rt: Runtime, server: EchoServer
) -> None:
    pool = line_pool(rt, server, check_after_idle=0)
    await ask(pool, "before", timeout=BOUND)
    server.say(b"goodbye\n")
    await ask(pool, "after", timeout=BOUND)
    assert server.accepted == 2


async def test_g8_a_peer_that_hangs_up_on_what_idles_is_noticed_without_a_borrower(
    rt: Runtime, server: EchoServer
) -> None:
    pool = line_pool(rt, server, check_after_idle=0.04)
    await ask(pool, "before", timeout=BOUND)
    server.hang_up()
    await rt.until(lambda: pool.size == 0)
    assert pool.stats().closed["stale"] == 1


async def test_what_idles_too_long_is_closed_but_for_the_stock(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, idle_timeout=0.05, min_idle=1, max_connections=3)
    connections = [await do(pool.acquire(timeout=BOUND)) for _ in range(3)]
    for connection in connections:
        await do(pool.release(connection))
    await rt.until(lambda: pool.stats().closed["idle"] == 2)
    assert pool.size == 1


async def test_what_is_too_old_goes_at_once_if_it_idles_and_else_when_it_comes_back(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_lifetime=0.05, max_connections=2)
    lent = await do(pool.acquire(timeout=BOUND))
    async with within(pool.connection(timeout=BOUND)):
        pass
    await rt.until(lambda: pool.stats().closed["expired"] == 1)
    assert pool.in_use == 1
    assert lent.connected
    await do(pool.release(lent))
    await rt.until(lambda: pool.stats().closed["expired"] == 2)


async def test_what_was_used_often_enough_goes_when_it_comes_back(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_uses=2)
    lent = []
    for _ in range(4):
        async with within(pool.connection(timeout=BOUND)) as connection:
            lent.append(connection.number)
    assert lent == [0, 0, 1, 1]


async def test_what_says_that_it_is_expired_is_reaped(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, reap_interval=0.03)
    async with within(pool.connection(timeout=BOUND)):
        pass
    script.expired = True
    await rt.until(lambda: pool.stats().closed["expired"] == 1)
    script.expired = False
    async with within(pool.connection(timeout=BOUND)):
        pass
    script.expired = True
    await do(pool.drop_expired())
    assert pool.idle == 0


async def test_a_keepalive_keeps_what_answers_and_closes_what_does_not(rt: Runtime, server: EchoServer) -> None:
    class Asking(Line):
        async def keepalive(self) -> bool:
            return await self.ask("are you there?") == "are you there?"

    pool = line_pool(rt, server, Asking, keepalive=0.05)
    await ask(pool, "before", timeout=BOUND)
    await rt.until(lambda: server.heard.count(b"are you there?") >= 2)
    assert (pool.size, server.accepted) == (1, 1)


async def test_a_keepalive_that_fails_closes_the_connection(rt: Runtime, logged: Any) -> None:
    async def fail(connection: Any) -> bool:
        if connection.number == 0:
            return False
        raise OSError("no answer")

    script = Script(on_keepalive=fail)
    pool = script.pool(rt, keepalive=0.02, name="kept alive")
    for closed in (1, 2):
        async with within(pool.connection(timeout=BOUND)):
            pass
        await rt.until(lambda: pool.stats().closed["stale"] == closed)  # noqa: B023
    [record] = logged.take()
    assert "kept alive" in record.getMessage()


async def test_a_keepalive_that_hangs_costs_the_connection_after_a_while(rt: Runtime, logged: Any) -> None:
    class Hasty(rt.api.Pool):  # type: ignore[name-defined, misc]
        keepalive_grace = 0.05

    may_answer = rt.event()

    async def hang(_: Any) -> bool:
        await may_answer.wait()
        return True

    script = Script(on_keepalive=hang)
    pool = rt.made_by(Hasty, *script.kind, max_connections=1, keepalive=0.02)
    async with within(pool.connection(timeout=BOUND)):
        pass
    await rt.until(lambda: pool.stats().closed["stale"] == 1)
    [record] = logged.take()
    assert "keepalive() failed" in record.getMessage()
    may_answer.set()
    async with within(pool.connection(timeout=BOUND)) as connection:
        assert connection.number == 1
        await do(pool.drop(connection))  # or there would be another one, which has no time either


async def test_g2_nobody_gets_a_connection_during_its_keepalive(rt: Runtime) -> None:
    may_answer = rt.event()

    async def slowly(_: Any) -> bool:
        await may_answer.wait()
        return True

    script = Script(on_keepalive=slowly)
    pool = script.pool(rt, max_connections=1, keepalive=0.02)
    async with within(pool.connection(timeout=BOUND)):
        pass
    await rt.until(lambda: script.count("keepalive"))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 1)
    may_answer.set()
    assert await rt.join(waiter) == [script.made[0]]
    await do(pool.release(script.made[0]))

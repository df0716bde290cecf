"""What an operator does to a pool, and what it tells him."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import BOUND, CANCEL, Runtime, do, needs, within
from .kinds import Script, ask, line_pool
from .server import EchoServer


async def borrow(pool: Any, count: int) -> list[Any]:
    return [await do(pool.acquire(timeout=BOUND)) for _ in range(count)]


async def give_back(pool: Any, connections: list[Any]) -> None:
    for connection in connections:
        await do(pool.release(connection))


async def test_g5_while_paused_everybody_waits_and_is_served_in_order_afterwards(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    await give_back(pool, await borrow(pool, 1))
    pool.pause()
    pool.pause()
    with pytest.raises(rt.api.PoolExhaustedError):
        await do(pool.acquire(timeout=0))
    served: list[int] = []

    async def waiter(number: int) -> None:
        async with within(pool.connection(timeout=BOUND)):
            served.append(number)
            await rt.sleep(0)

    waiters = []
    for number in range(4):
        waiters.append(rt.spawn(waiter, number))
        await rt.waiting(pool, number + 1)
    assert (pool.idle, served) == (1, [])
    pool.resume()
    await rt.join(*waiters)
    assert served == [*range(4)]


async def test_what_is_lent_comes_back_to_a_paused_pool(rt: Runtime) -> None:
    pool = Script().pool(rt)
    lent = await borrow(pool, 2)
    pool.pause()
    await give_back(pool, lent)
    assert pool.idle == 2
    pool.resume()
    async with within(pool.connection(timeout=0)):
        pass


async def test_growing_serves_waiters_at_once(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1)
    lent = await borrow(pool, 1)
    waiters = [rt.spawn(lambda: do(pool.acquire(timeout=BOUND))) for _ in range(2)]
    await rt.waiting(pool, 2)
    pool.resize(3)
    lent += await rt.join(*waiters)
    assert pool.in_use == 3
    await give_back(pool, lent)


async def test_g1_shrinking_closes_what_idles_and_what_comes_back(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, max_connections=4)
    lent = await borrow(pool, 4)
    await give_back(pool, lent[:2])
    pool.resize(1)
    await rt.until(lambda: server.open == 2)
    await do(pool.release(lent[2]))
    await rt.until(lambda: server.open == 1)
    await do(pool.release(lent[3]))
    assert pool.size == 1
    await ask(pool, "the one that is left", timeout=BOUND)
    assert server.accepted == 4
    assert pool.stats().closed["shrunk"] == 3


async def test_clear_closes_what_idles_and_what_comes_back(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=3)
    lent = await borrow(pool, 3)
    await give_back(pool, lent[1:])
    await do(pool.clear())
    assert (pool.idle, script.count("close")) == (0, 2)
    await do(pool.release(lent[0]))
    await rt.until(lambda: script.count("close") == 3)
    async with within(pool.connection(timeout=BOUND)) as connection:
        assert connection.number == 3


async def test_clear_retires_what_is_being_opened(rt: Runtime) -> None:
    may_open = rt.event()

    async def slowly(connection: Any) -> None:
        if connection.number == 0:
            await may_open.wait()

    script = Script(on_open=slowly)
    pool = script.pool(rt, max_connections=1)
    borrower = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open"))
    await do(pool.clear())
    may_open.set()
    [connection] = await rt.join(borrower)
    await do(pool.release(connection))
    async with within(pool.connection(timeout=BOUND)) as other:
        assert other.number == 1
    assert script.most == 1


async def test_a_drop_closes_the_connection_before_it_returns(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server)
    lent, idle = await borrow(pool, 2)
    await do(pool.release(idle))
    for line in (lent, idle):
        await do(pool.drop(line))
        assert not line.is_connected()
    await rt.until(lambda: server.open == 0)
    assert pool.stats().closed["dropped"] == 2
    with pytest.raises(rt.api.ConnectionNotFoundError):
        await do(pool.release(lent))


async def test_a_drop_in_a_block_frees_the_slot_for_whoever_waits(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    async with within(pool.connection(timeout=BOUND)) as connection:
        waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
        await rt.waiting(pool, 1)
        await do(pool.drop(connection))
        [other] = await rt.join(waiter)
    assert other.number == 1
    await do(pool.release(other))


async def test_the_counts_add_up(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, name="counted")
    lent = await borrow(pool, 2)
    await do(pool.release(lent[0]))
    await do(pool.drop(lent[1]))
    with pytest.raises(rt.api.PoolExhaustedError):
        pool.pause()
        await do(pool.acquire(timeout=0))
    pool.resume()
    stats = pool.stats()
    assert (stats.size, stats.idle, stats.in_use, stats.opening, stats.waiting) == (1, 1, 0, 0, 0)
    assert (stats.acquired, stats.opened, stats.open_failures, stats.exhausted) == (2, 2, 0, 1)
    assert sum(stats.closed.values()) == stats.closed["dropped"] == 1
    assert (pool.size, pool.idle, pool.in_use, pool.waiting) == (1, 1, 0, 0)
    assert "counted" in repr(pool)


async def test_who_holds_a_connection_for_too_long_is_reported_once(rt: Runtime, logged: Any) -> None:
    pool = Script().pool(rt, leak_threshold=0.05, name="leaky")

    async def forgets_to_give_it_back() -> Any:
        return await do(pool.acquire(timeout=BOUND))

    [connection] = await rt.join(rt.spawn(forgets_to_give_it_back))
    reports: list[Any] = []

    def reported() -> bool:
        reports.extend(logged.take())
        return bool(reports)

    await rt.until(reported)
    [record] = reports
    assert "leaky" in record.getMessage()
    assert "forgets_to_give_it_back" in record.getMessage()
    [holder] = pool.holders()
    assert holder.connection is connection
    assert holder.held >= 0.05
    assert "forgets_to_give_it_back" in holder.stack
    reports.clear()
    await do(pool.release(connection))
    assert pool.holders() == []
    await rt.until(reported)
    [record] = reports
    assert "came back" in record.getMessage()


async def test_holders_are_known_by_their_connections_at_least(rt: Runtime) -> None:
    pool = Script().pool(rt)
    async with within(pool.connection(timeout=BOUND)) as connection:
        [holder] = pool.holders()
        assert holder.connection is connection
        assert (holder.greenlet, holder.held, holder.stack) == (None, None, None)
    assert pool.holders() == []


async def test_a_pool_whose_holders_all_wait_for_it_says_so(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1, leak_threshold=BOUND)
    async with within(pool.connection(timeout=BOUND)):
        with pytest.raises(rt.api.PoolExhaustedError, match="deadlock"):
            async with within(pool.connection(timeout=0.02)):
                pass


async def test_g4_what_a_borrower_leaves_behind_when_it_ends_is_taken_back(rt: Runtime, logged: Any) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, reclaim=True)

    async def forgets_to_give_it_back() -> None:
        await do(pool.acquire(timeout=BOUND))

    await rt.join(rt.spawn(forgets_to_give_it_back))
    async with within(pool.connection(timeout=BOUND)) as connection:
        assert connection.number == 1
    [record] = logged.take(1)
    assert "forgets_to_give_it_back" in record.getMessage()
    assert pool.stats().closed["reclaimed"] == 1


@needs(CANCEL)
async def test_g4_what_a_killed_borrower_leaves_behind_is_taken_back(rt: Runtime, logged: Any) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, reclaim=True)
    has_it, never = rt.event(), rt.event()

    async def waits_with_it() -> None:
        await do(pool.acquire(timeout=BOUND))
        has_it.set()
        await never.wait()

    victim = rt.spawn(waits_with_it)
    await has_it.wait()
    rt.cancel(victim)
    await rt.outcome(victim)
    async with within(pool.connection(timeout=BOUND)) as connection:
        assert connection.number == 1
    assert len(logged.take()) == 1


async def test_g12_what_goes_wrong_is_logged_with_the_name_of_the_pool_and_raised_nowhere(
    rt: Runtime, logged: Any
) -> None:
    async def fail(_: Any) -> None:
        raise OSError("out of order")

    script = Script(on_close=fail)
    pool = script.pool(rt, name="loud", max_connections=3)
    lent = await borrow(pool, 3)
    await give_back(pool, lent)
    await do(pool.clear())
    records = logged.take(3)
    assert all(record.name == "gsocketpool" and "loud" in record.getMessage() for record in records)

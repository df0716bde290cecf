"""Many endpoints, one cap over several pools, and a breaker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import refused_port

from .harness import BOUND, CANCEL, Runtime, do, needs, within
from .kinds import Line, Script, Scripted, ask, line_pool
from .server import EchoServer


@pytest.fixture
def other() -> Iterator[EchoServer]:
    """A second server."""
    with EchoServer() as server:
        yield server
        server.wait_until(lambda: server.serving == 0)


def line_group(rt: Runtime, **settings: Any) -> Any:
    return rt.group(Line, **settings)


def at(server: EchoServer) -> dict[str, Any]:
    return {"host": server.host, "port": server.port}


async def ask_at(group: Any, server: EchoServer, text: str) -> None:
    async with within(group.connection(BOUND, **at(server))) as line:
        await line.echo(text)


async def test_a_group_has_a_pool_for_each_endpoint(rt: Runtime, server: EchoServer, other: EchoServer) -> None:
    group = line_group(rt, max_connections=2)
    for _ in range(2):
        await ask_at(group, server, "to the one")
        await ask_at(group, other, "to the other")
    assert (server.accepted, other.accepted) == (1, 1)
    assert group.pool(**at(server)) is group.pool(**dict(reversed(at(server).items())))
    assert len(group.pools) == 2
    assert (group.stats().size, group.stats().idle, group.stats().in_use) == (2, 2, 0)
    rt.watch(*group.pools)
    await do(group.close())
    assert server.open == other.open == 0
    with pytest.raises(rt.api.PoolClosedError):
        group.pool(**at(server))


async def test_g1_all_endpoints_together_keep_to_max_total(rt: Runtime, server: EchoServer) -> None:
    group = line_group(rt, max_connections=2, max_total=2)
    # Of one server, which counts them exactly: between a look at one server and at the next a thread may change both.
    endpoints = [{**at(server), "connect_timeout": BOUND + number} for number in range(2)]

    async def borrower(number: int) -> None:
        for turn in range(4):
            async with within(group.connection(BOUND, **endpoints[(number + turn) % 2])) as line:
                await line.echo(f"{number} {turn}")

    await rt.join(*(rt.spawn(borrower, number) for number in range(6)))
    rt.watch(*group.pools)
    assert len(group.pools) == 2
    assert server.most <= 2
    assert group.budget.used <= 2
    await do(group.close(BOUND))
    assert group.budget.used == 0


async def test_what_idled_longest_elsewhere_makes_room(rt: Runtime, server: EchoServer, other: EchoServer) -> None:
    async with within(line_group(rt, max_total=1)) as group:
        await ask_at(group, server, "first")
        await ask_at(group, other, "second")
        assert (server.open, other.open) == (0, 1)
        assert group.pool(**at(server)).stats().closed["evicted"] == 1
        rt.watch(*group.pools)


async def test_g5_who_waits_for_a_budget_is_served_in_order_across_endpoints(rt: Runtime) -> None:
    budget = rt.api.Budget(1)
    pools = [Script().pool(rt, budget=budget) for _ in range(3)]
    served: list[int] = []

    async def waiter(number: int) -> None:
        async with within(pools[number % 3].connection(timeout=BOUND)):
            served.append(number)
            await rt.sleep(0)

    async with within(pools[0].connection(timeout=BOUND)):
        waiters = []
        for number in range(6):
            waiters.append(rt.spawn(waiter, number))
            await rt.until(lambda: sum(pool.waiting for pool in pools) == len(waiters))
    await rt.join(*waiters)
    assert served == [*range(6)]
    for pool in pools:
        await do(pool.close(BOUND))
    assert budget.used == 0


@needs(CANCEL)
async def test_g4_who_is_cancelled_while_he_waits_for_a_budget_leaves_the_line(rt: Runtime) -> None:
    budget = rt.api.Budget(1)
    pools = [Script().pool(rt, budget=budget) for _ in range(2)]
    async with within(pools[0].connection(timeout=BOUND)):
        victim = rt.spawn(lambda: do(pools[1].acquire(timeout=BOUND)))
        await rt.waiting(pools[1], 1)
        heir = rt.spawn(lambda: do(pools[1].acquire(timeout=BOUND)))
        await rt.waiting(pools[1], 2)
        rt.cancel(victim)
        assert isinstance(await rt.outcome(victim), rt.killed)
    [connection] = await rt.join(heir)
    await do(pools[1].release(connection))


async def test_a_budget_that_grows_serves_who_waits(rt: Runtime) -> None:
    budget = rt.api.Budget(1)
    pools = [Script().pool(rt, budget=budget) for _ in range(2)]
    async with within(pools[0].connection(timeout=BOUND)):
        waiter = rt.spawn(lambda: do(pools[1].acquire(timeout=BOUND)))
        await rt.waiting(pools[1], 1)
        budget.resize(2)
        [connection] = await rt.join(waiter)
    await do(pools[1].release(connection))


async def test_a_quota_is_asked_for_each_unit_and_gets_it_back(rt: Runtime) -> None:
    class Elsewhere:
        left = 2

        def take(self) -> bool:
            taken = self.left > 0
            self.left -= taken
            return taken

        def give_back(self) -> None:
            self.left += 1

    quota = Elsewhere()
    budget = rt.api.Budget(10, quota=quota)
    pool = Script().pool(rt, max_connections=5, budget=budget)
    lent = [await do(pool.acquire(timeout=BOUND)) for _ in range(2)]
    with pytest.raises(rt.api.PoolExhaustedError, match="quota"):
        await do(pool.acquire(timeout=0.02))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 1)
    quota.left += 1
    budget.replenished()
    lent += await rt.join(waiter)
    for connection in lent:
        await do(pool.release(connection))
    await do(pool.close(BOUND))
    assert quota.left == 3


async def test_an_endpoint_that_fails_does_not_take_the_others_share(
    rt: Runtime, server: EchoServer, logged: Any
) -> None:
    async with within(line_group(rt, max_total=2, breaker=2, backoff=(100, 200))) as group:
        dead = {"host": "127.0.0.1", "port": refused_port()}
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                async with within(group.connection(BOUND, **dead)):
                    pass
        with pytest.raises(rt.api.BreakerOpenError) as caught:
            async with within(group.connection(BOUND, **dead)):
                pass
        assert caught.value.failures == 2
        assert caught.value.retry_after > 0
        assert group.pool(**dead).stats().breaker == "open"
        await ask_at(group, server, "fine")
        rt.watch(*group.pools)
    logged.take(1)


async def test_a_breaker_lets_one_trial_pass_and_closes_if_it_succeeds(rt: Runtime, logged: Any) -> None:
    async def refuse_thrice(connection: Any) -> None:
        if connection.number < 3:
            raise ConnectionRefusedError("for now")

    script = Script(on_open=refuse_thrice)
    pool = script.pool(rt, breaker=3, backoff=(0.02, 0.04))
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await do(pool.acquire(timeout=BOUND))
    await rt.until(lambda: pool.stats().breaker == "half-open")
    await do(pool.release(await do(pool.acquire(timeout=BOUND))))
    assert pool.stats().breaker == "closed"
    [record] = logged.take(1)  # that it was open: what it refuses then is told above
    assert "ConnectionRefusedError('for now')" in record.getMessage()


async def test_the_pool_of_an_endpoint_that_stays_empty_is_forgotten(rt: Runtime) -> None:
    script = Script()
    async with within(rt.group(Scripted, forget_after=0.02, max_uses=1)) as group:
        async with within(group.connection(BOUND, script=script)):
            await rt.until(lambda: len(group.pools) == 1)  # it may have been forgotten before it was borrowed from
        await rt.until(lambda: group.pools == [])
        async with within(group.connection(BOUND, script=script)) as connection:
            assert connection.number == 1


async def test_clear_of_a_group_closes_what_idles_at_each_endpoint(
    rt: Runtime, server: EchoServer, other: EchoServer
) -> None:
    async with within(line_group(rt)) as group:
        await ask_at(group, server, "one")
        await ask_at(group, other, "two")
        await do(group.clear())
        assert server.open == other.open == 0
        await ask_at(group, server, "three")
        assert server.accepted == 2


async def test_g11_closing_a_group_tells_whoever_waits_at_any_endpoint(rt: Runtime) -> None:
    script = Script()
    group = rt.group(Scripted, max_connections=1)
    pool = group.pool(script=script)
    rt.watch(pool)
    async with within(group.connection(BOUND, script=script)):
        waiter = rt.spawn(lambda: do(pool.acquire(timeout=None)))
        await rt.waiting(pool, 1)
        closing = rt.spawn(lambda: do(group.close(BOUND)))
        assert isinstance(await rt.outcome(waiter), rt.api.PoolClosedError)
    await rt.join(closing)
    assert script.now == 0


async def test_one_pool_beside_a_group_shares_its_budget(rt: Runtime, server: EchoServer, other: EchoServer) -> None:
    budget = rt.api.Budget(1)
    pool = line_pool(rt, server, budget=budget)
    async with within(line_group(rt, budget=budget)) as group:
        await ask(pool, "one", timeout=BOUND)
        await ask_at(group, other, "two")
        await ask(pool, "three", timeout=BOUND)
        assert (server.open, other.open) == (1, 0)
        assert server.accepted == 2

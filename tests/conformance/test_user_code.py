"""A connection's own methods, where they fail, or take their time."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import BOUND, CANCEL, Runtime, do, needs, within
from .kinds import Script, Scripted


def failing(error: BaseException, times: int = 1) -> Any:
    """Fails so many times, then does nothing."""
    left = times

    async def fail(_: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error

    return fail


async def test_g4_an_open_that_fails_is_closed_again(rt: Runtime) -> None:
    async def half_open(connection: Any) -> None:
        connection.connected = True
        raise ValueError("no greeting")

    script = Script(on_open=half_open)
    pool = script.pool(rt, max_connections=1)
    with pytest.raises(ValueError, match="no greeting"):
        await do(pool.acquire(timeout=BOUND))
    assert script.now == 0
    assert script.said == [("open", 0), ("close", 0)]


async def test_g4_a_check_that_fails_costs_the_connection_and_nothing_else(rt: Runtime, logged: Any) -> None:
    script = Script(on_check=failing(OSError("out of order")))
    pool = script.pool(rt, max_connections=1, check_after_idle=0, name="checked")
    async with within(pool.connection(timeout=BOUND)) as first:
        pass
    async with within(pool.connection(timeout=BOUND)) as second:
        assert second is not first
    [record] = logged.take()
    assert "checked" in record.getMessage()
    assert "out of order" in record.getMessage()
    assert pool.stats().closed["stale"] == 1


async def test_g8_a_check_that_says_no_costs_the_connection_without_a_word(rt: Runtime) -> None:
    async def verdict(connection: Any) -> bool:
        return bool(connection.number != 0)

    script = Script(on_check=verdict)
    pool = script.pool(rt, max_connections=1, check_after_idle=0)
    for expected in (0, 1, 1):
        async with within(pool.connection(timeout=BOUND)) as connection:
            assert connection.number == expected
    assert pool.stats().closed["stale"] == 1
    assert script.most == 1


class Pinging(Scripted):
    """Raises if something is wrong, and answers nothing."""

    async def check(self) -> None:  # type: ignore[override]
        self.script.said.append(("check", self.number))

    async def keepalive(self) -> None:  # type: ignore[override]
        self.script.said.append(("keepalive", self.number))


async def test_a_check_that_raises_nothing_and_answers_nothing_has_passed(rt: Runtime) -> None:
    script = Script()
    pool = rt.pool(Pinging, {"script": script}, max_connections=1, check_after_idle=0)
    for _ in range(3):
        async with within(pool.connection(timeout=BOUND)) as connection:
            assert connection.number == 0
    assert script.count("check") == 2


async def test_a_keepalive_that_raises_nothing_and_answers_nothing_has_passed(rt: Runtime) -> None:
    script = Script()
    pool = rt.pool(Pinging, {"script": script}, max_connections=1, keepalive=0.01)
    async with within(pool.connection(timeout=BOUND)):
        pass
    await rt.until(lambda: script.count("keepalive") >= 2)
    assert pool.stats().opened == 1


async def test_g4_a_reset_that_fails_costs_the_connection_and_nothing_else(rt: Runtime, logged: Any) -> None:
    script = Script(on_reset=failing(OSError("no way back")))
    pool = script.pool(rt, max_connections=1)
    first = await do(pool.acquire(timeout=BOUND))
    await do(pool.release(first))  # raises nothing
    async with within(pool.connection(timeout=BOUND)) as second:
        assert second is not first
    [record] = logged.take()
    assert "no way back" in record.getMessage()
    assert pool.stats().closed["discarded"] == 1


async def test_g2_nobody_gets_a_connection_before_its_reset_is_done(rt: Runtime) -> None:
    may_reset = rt.event()

    async def slowly(_: Any) -> None:
        await may_reset.wait()

    script = Script(on_reset=slowly)
    pool = script.pool(rt, max_connections=1)
    connection = await do(pool.acquire(timeout=BOUND))
    returning = rt.spawn(lambda: do(pool.release(connection)))
    await rt.until(lambda: script.count("reset"))
    with pytest.raises(rt.api.PoolExhaustedError):
        await do(pool.acquire(timeout=0.02))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 1)
    may_reset.set()
    assert await rt.join(waiter, returning) == [connection, None]
    await do(pool.release(connection))


async def test_others_go_on_while_user_code_takes_its_time(rt: Runtime) -> None:
    """Nothing is held while a connection is opened, closed, checked or reset."""
    for method in ("open", "close", "check", "reset"):
        may_go_on = rt.event()
        began = rt.event()

        async def first_waits(connection: Any, began: Any = began, may_go_on: Any = may_go_on) -> None:
            if not began.is_set():
                began.set()
                await may_go_on.wait()

        deeds: dict[str, Any] = {f"on_{method}": first_waits}
        script = Script(**deeds)
        pool = script.pool(rt, max_connections=2, check_after_idle=0)

        async def come_and_go(pool: Any = pool, method: str = method) -> None:
            for _ in range(2):
                connection = await do(pool.acquire(timeout=BOUND))
                await do(pool.drop(connection) if method == "close" else pool.release(connection))

        slow = rt.spawn(come_and_go)
        await began.wait()
        for _ in range(3):
            async with within(pool.connection(timeout=BOUND)):
                assert pool.stats().in_use >= 1
        assert method == "open" or not rt.has_ended(slow), method  # who waits for a dial may get what others return
        may_go_on.set()
        await rt.join(slow)


async def test_a_method_may_use_the_pool_itself(rt: Runtime) -> None:
    """Nested use: a reset that borrows, an open that asks for the pool's state."""
    script = Script(resets=True)
    pool = script.pool(rt, max_connections=2)

    async def borrow_another(connection: Any) -> None:
        if connection.number == 0:
            async with within(pool.connection(timeout=BOUND)) as other:
                assert other is not connection

    async def look(_: Any) -> None:
        assert pool.stats().opening >= 1
        repr(pool)

    script.on_reset = borrow_another
    script.on_open = look
    async with within(pool.connection(timeout=BOUND)), within(pool.connection(timeout=BOUND)):
        pass
    assert pool.idle == 2


async def test_a_connection_can_be_dropped_while_it_is_reset_or_checked(rt: Runtime) -> None:
    for method in ("reset", "check"):
        script = Script(resets=method == "reset")
        pool = script.pool(rt, max_connections=1, check_after_idle=0)

        async def drop_it(connection: Any, pool: Any = pool) -> None:
            if connection.number == 0:
                await do(pool.drop(connection))

        setattr(script, f"on_{method}", drop_it)
        for _ in range(2):
            async with within(pool.connection(timeout=BOUND)):
                pass
        assert pool.stats().closed["dropped"] == 1
        assert pool.idle == 1


async def test_plain_objects_can_be_pooled_by_saying_how_to_treat_them(rt: Runtime) -> None:
    class Thing:
        closed = False

        def close(self) -> None:
            self.closed = True

    checks: list[Thing] = []

    def check(thing: Thing) -> bool:
        checks.append(thing)
        return not thing.closed

    pool = rt.api.Pool(rt.api.wrap(Thing, check=check), max_connections=1, check_after_idle=0)
    rt.watch(pool)
    async with within(pool.connection(timeout=BOUND)) as thing:
        assert type(thing) is Thing
    thing.close()
    async with within(pool.connection(timeout=BOUND)) as other:
        assert other is not thing
    assert checks == [thing]


async def test_a_subclass_may_have_an_acquire_and_a_release_of_its_own(rt: Runtime) -> None:
    class Counting(rt.api.Pool):  # type: ignore[name-defined, misc]
        calls = 0

        def acquire(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return super().acquire(*arguments, **options)

        def release(self, connection: Any) -> Any:
            self.calls += 1
            return super().release(connection)

    script = Script()
    pool = rt.made_by(Counting, *script.kind, max_connections=1)
    for _ in range(2):
        async with within(pool.connection(timeout=BOUND)) as connection:
            assert connection.number == 0
    assert pool.calls == 4
    with pytest.raises(ValueError):
        async with within(pool.connection()):
            raise ValueError
    assert pool.stats().closed["discarded"] == 1


async def test_a_subclass_may_make_the_connections_itself(rt: Runtime) -> None:
    made: list[Any] = []

    class Naming(rt.api.Pool):  # type: ignore[name-defined, misc]
        def _create_connection(self) -> Any:
            connection = super()._create_connection()
            made.append(connection)
            return connection

    pool = rt.made_by(Naming, *Script().kind)
    async with within(pool.connection(timeout=BOUND)) as connection:
        assert made == [connection]
        assert connection.connected


async def test_a_factory_that_raises_is_a_failed_dial(rt: Runtime) -> None:
    class Unlucky:
        def __init__(self) -> None:
            raise LookupError("no such class today")

    pool = rt.pool(Unlucky, max_connections=1)
    for _ in range(2):
        with pytest.raises(LookupError):
            await do(pool.acquire(timeout=BOUND))
    assert pool.stats().open_failures == 2


@needs(CANCEL)
async def test_g3_a_borrower_killed_in_a_check_or_a_reset_costs_the_connection(rt: Runtime) -> None:
    for method in ("check", "reset"):
        began, never = rt.event(), rt.event()

        async def hang(connection: Any, began: Any = began, never: Any = never) -> None:
            if connection.number == 0:
                began.set()
                await never.wait()

        deeds: dict[str, Any] = {f"on_{method}": hang}
        script = Script(**deeds)
        pool = script.pool(rt, max_connections=1, check_after_idle=0)

        async def come_and_go(pool: Any = pool) -> None:
            for _ in range(2):
                await do(pool.release(await do(pool.acquire(timeout=BOUND))))

        victim = rt.spawn(come_and_go)
        await began.wait()
        rt.cancel(victim)
        assert isinstance(await rt.outcome(victim), rt.killed)
        async with within(pool.connection(timeout=BOUND)) as connection:
            assert connection.number == 1
        assert script.most == 1

"""Who gets which connection, who waits, and for how long."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from tests.servers import BlackHole, refused_port

from .harness import BOUND, CANCEL, Runtime, do, needs, within
from .kinds import Line, Script, ask, line_pool
from .server import EchoServer


async def test_g1_the_server_never_sees_more_sockets_than_the_cap(
    rt: Runtime, server: EchoServer, rng: random.Random
) -> None:
    pool = line_pool(rt, server, max_connections=3)

    async def borrower(number: int) -> None:
        for turn in range(8):
            fails = rng.random() < 0.3
            try:
                async with within(pool.connection(timeout=BOUND)) as line:
                    await line.echo(f"{number} {turn}")
                    if fails:
                        raise ValueError
            except ValueError:
                pass

    await rt.join(*(rt.spawn(borrower, number) for number in range(10)))
    assert server.most <= 3
    assert pool.stats().acquired == 80


async def test_g1_a_close_that_takes_its_time_still_counts(rt: Runtime) -> None:
    may_close = rt.event()

    async def slowly(_: Any) -> None:
        await may_close.wait()

    script = Script(on_close=slowly)
    pool = script.pool(rt, max_connections=1)
    connection = await do(pool.acquire(timeout=BOUND))
    dropping = rt.spawn(lambda: do(pool.drop(connection)))
    await rt.until(lambda: script.count("close"))
    with pytest.raises(rt.api.PoolExhaustedError):
        await do(pool.acquire(timeout=0.02))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 1)
    assert script.count("open") == 1
    may_close.set()
    await rt.join(dropping)
    [second] = await rt.join(waiter)
    assert second is not connection
    assert script.most == 1
    await do(pool.release(second))


async def test_g1_no_more_dials_at_once_than_max_connecting(rt: Runtime) -> None:
    may_open = rt.event()
    dialling = 0
    most = 0

    async def slowly(_: Any) -> None:
        nonlocal dialling, most
        dialling += 1
        most = max(most, dialling)
        await may_open.wait()
        dialling -= 1

    script = Script(on_open=slowly)
    pool = script.pool(rt, max_connections=8, max_connecting=2)

    async def borrower() -> None:
        async with within(pool.connection(timeout=BOUND)):
            await rt.sleep(0)

    borrowers = [rt.spawn(borrower) for _ in range(6)]
    await rt.waiting(pool, 6)
    await rt.until(lambda: dialling == 2)
    may_open.set()
    await rt.join(*borrowers)
    assert most == 2


async def test_g4_who_waits_for_his_turn_to_dial_gets_it_when_another_dial_ends(rt: Runtime) -> None:
    async def fail_once(connection: Any) -> None:
        await rt.sleep(0)
        if connection.number == 1:
            raise ConnectionRefusedError("the second")

    pool = Script(on_open=fail_once).pool(rt, max_connections=4, max_connecting=1)
    borrowers = [rt.spawn(lambda: do(pool.acquire(timeout=BOUND))) for _ in range(4)]
    outcomes = [await rt.outcome(borrower) for borrower in borrowers]
    failed = [each for each in outcomes if isinstance(each, ConnectionRefusedError)]
    lent = [each for each in outcomes if each not in failed]
    assert (len(failed), pool.in_use) == (1, 3)
    for connection in lent:
        await do(pool.release(connection))


async def test_g2_a_connection_has_one_borrower_at_a_time(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=3)
    users: dict[int, int] = {}

    async def borrower(number: int) -> None:
        for _ in range(10):
            async with within(pool.connection(timeout=BOUND)) as connection:
                assert users.setdefault(connection.number, number) == number, "two borrowers at once"
                await rt.sleep(0)
                del users[connection.number]

    await rt.join(*(rt.spawn(borrower, number) for number in range(8)))
    assert script.count("open") <= 3


async def test_g3_what_an_error_has_left_half_read_is_never_lent_again(rt: Runtime, server: EchoServer) -> None:
    pool = line_pool(rt, server, max_connections=1)
    with pytest.raises(ValueError):
        async with within(pool.connection(timeout=BOUND)) as line:
            await do(line.send(b"never read\n"))
            raise ValueError
    await ask(pool, "mine", timeout=BOUND)
    assert server.accepted == 2
    assert pool.stats().closed["discarded"] == 1


@needs(CANCEL)
async def test_g3_what_a_killed_borrower_has_left_half_read_is_never_lent_again(
    rt: Runtime, server: EchoServer
) -> None:
    server.hold()
    pool = line_pool(rt, server, max_connections=1)
    victim = rt.spawn(lambda: ask(pool, "the victim's", timeout=BOUND))
    await rt.until(lambda: server.heard)
    rt.cancel(victim)
    assert isinstance(await rt.outcome(victim), rt.killed)
    server.let_go()
    await ask(pool, "mine", timeout=BOUND)
    assert server.accepted == 2
    assert server.most == 1


@needs(CANCEL)
async def test_g3_what_a_borrower_whose_time_is_over_has_left_half_read_is_never_lent_again(
    rt: Runtime, server: EchoServer
) -> None:
    pool = line_pool(rt, server, max_connections=1, check_after_idle=None)
    await ask(pool, "before", timeout=BOUND)  # so that there is nothing to wait for but the answer
    server.hold()
    with pytest.raises(rt.timed_out):
        async with rt.limit(0.05):
            await ask(pool, "too late", timeout=BOUND)
    server.let_go()
    await ask(pool, "mine", timeout=BOUND)
    assert pool.stats().closed["discarded"] == 1


async def test_g3_what_is_released_while_an_error_passes_through_is_not_lent_again(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    connection = await do(pool.acquire(timeout=BOUND))
    with pytest.raises(ValueError):
        try:
            raise ValueError
        finally:
            await do(pool.release(connection))
    async with within(pool.connection(timeout=BOUND)) as second:
        assert second is not connection


async def test_g3_an_error_that_discard_on_does_not_name_leaves_the_connection_in_the_pool(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, discard_on=OSError)
    with pytest.raises(KeyError):
        async with within(pool.connection(timeout=BOUND)):
            raise KeyError
    assert (pool.idle, script.count("close")) == (1, 0)
    with pytest.raises(OSError):
        async with within(pool.connection(timeout=BOUND)):
            raise OSError
    await rt.until(lambda: script.count("close") == 1)


async def test_g5_waiters_are_served_in_the_order_in_which_they_came(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    served: list[int] = []

    async def waiter(number: int) -> None:
        async with within(pool.connection(timeout=BOUND)):
            served.append(number)
            await rt.sleep(0)

    async with within(pool.connection(timeout=BOUND)):
        waiters = []
        for number in range(6):
            waiters.append(rt.spawn(waiter, number))
            await rt.waiting(pool, number + 1)
    await rt.join(*waiters)
    assert served == [*range(6)]
    assert script.count("open") == 1


async def test_g5_those_who_wait_by_other_rules_wait_in_the_same_line(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, acquire_timeout=BOUND)
    served: list[int] = []

    async def waiter(number: int, **options: Any) -> None:
        connection = await do(pool.acquire(**options))
        served.append(number)
        await do(pool.release(connection))

    async with within(pool.connection()):
        waiters = []
        for number, options in enumerate([{"timeout": None}, {}, {"timeout": BOUND}, {}, {"timeout": None}]):
            waiters.append(rt.spawn(lambda n=number, o=options: waiter(n, **o)))
            await rt.waiting(pool, number + 1)
    await rt.join(*waiters)
    assert served == [*range(5)]


async def test_g5_nobody_barges_past_the_queue(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    connection = await do(pool.acquire(timeout=BOUND))
    used = rt.event()

    async def waiter() -> None:
        async with within(pool.connection(timeout=BOUND)) as mine:
            assert mine is connection
            await used.wait()

    task = rt.spawn(waiter)
    await rt.waiting(pool, 1)
    await do(pool.release(connection))
    # It is the waiter's, who may not even have woken up.
    with pytest.raises(rt.api.PoolExhaustedError):
        await do(pool.acquire(timeout=0))
    used.set()
    await rt.join(task)


async def test_g5_who_leaves_the_queue_does_not_stand_in_the_way(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)

    async def impatient() -> None:
        with pytest.raises(rt.api.PoolExhaustedError):
            await do(pool.acquire(timeout=0.02))

    async def patient() -> None:
        async with within(pool.connection(timeout=BOUND)):
            pass

    async with within(pool.connection(timeout=BOUND)):
        first = rt.spawn(impatient)
        await rt.until(lambda: pool.waiting or rt.has_ended(first))
        second = rt.spawn(patient)
        await rt.join(first)
        await rt.waiting(pool, 1)
    await rt.join(second)


async def test_g6_what_is_given_back_goes_to_the_waiter_itself(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    connection = await do(pool.acquire(timeout=BOUND))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=None)))
    await rt.waiting(pool, 1)
    await do(pool.release(connection))
    assert (pool.idle, pool.in_use, pool.waiting) == (0, 1, 0)  # granted by the release, before the waiter runs
    assert await rt.join(waiter) == [connection]
    await do(pool.release(connection))


async def test_g7_an_acquire_gives_up_in_time_whatever_its_dial_does(rt: Runtime) -> None:
    may_open = rt.event()
    script = Script(on_open=lambda _: may_open.wait())
    pool = script.pool(rt, max_connections=1)
    with pytest.raises(rt.api.PoolExhaustedError) as caught:
        await do(pool.acquire(timeout=0.05))
    assert caught.value.waited >= 0.05
    assert caught.value.stats.opening == 1
    may_open.set()
    await rt.until(lambda: pool.idle == 1)
    async with within(pool.connection(timeout=0)) as connection:
        assert connection is script.made[0]


async def test_g7_an_acquire_gives_up_in_time_where_nobody_answers(rt: Runtime, logged: Any) -> None:
    with BlackHole() as hole:
        where = {"host": hole.host, "port": hole.port}
        with pytest.raises(TimeoutError):
            await do(rt.pool(Line, {**where, "connect_timeout": 0.05}).acquire(timeout=BOUND))
        pool = rt.pool(Line, {**where, "connect_timeout": 3 * BOUND})
        with pytest.raises(rt.api.PoolExhaustedError):
            await do(pool.acquire(timeout=0.05))
        assert pool.stats().opening == 1
    # Now it is refused, when the kernel asks the next time.
    await rt.until(lambda: pool.total == 0, timeout=2 * BOUND)
    [record] = logged.take(1)
    assert "nobody waits for any more" in record.getMessage()


async def test_g12_while_a_server_is_down_a_dial_that_nobody_waits_for_is_told_once(rt: Runtime, logged: Any) -> None:
    up = False
    may_fail = rt.event()

    async def open_or_fail(_: Any) -> None:
        await may_fail.wait()
        if not up:
            raise OSError("nobody there")

    script = Script(on_open=open_or_fail)
    pool = script.pool(rt, max_connections=1)

    async def give_up() -> None:
        nonlocal may_fail
        may_fail = rt.event()
        failures = pool.stats().open_failures
        with pytest.raises(rt.api.PoolExhaustedError):
            await do(pool.acquire(timeout=0.005))
        may_fail.set()
        await rt.until(lambda: pool.total == 0 and pool.stats().open_failures == failures + 1)

    for _ in range(3):
        await give_up()
    [record] = logged.take(1)
    assert record.getMessage().endswith("a dial failed that nobody waits for any more: OSError('nobody there')")
    up = True
    async with within(pool.connection(timeout=BOUND)):
        pass
    await do(pool.clear())
    up = False
    await give_up()
    logged.take(1)


async def test_g7_an_acquire_gives_up_in_time_at_a_full_pool(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, name="full")
    async with within(pool.connection(timeout=BOUND)):
        for timeout in (0.02, 0):
            with pytest.raises(rt.api.PoolExhaustedError, match="full"):
                await do(pool.acquire(timeout=timeout))
        with pytest.raises(rt.api.PoolExhaustedError):
            async with within(pool.connection(timeout=0.02)):
                pass
        with pytest.raises(rt.api.PoolExhaustedError):
            await do(pool.acquire(retry=1))  # a tenth of a second, as in 0.1.6
    assert pool.waiting == 0
    assert pool.stats().exhausted == 4


async def test_g7_a_deadline_that_was_met_disturbs_nobody_later(rt: Runtime) -> None:
    pool = Script().pool(rt, max_connections=1, acquire_timeout=0.1)

    async def waiter(**options: Any) -> None:
        try:
            connection = await do(pool.acquire(**options))
        except rt.api.PoolExhaustedError:
            return  # a machine that stands still may not meet it
        began = time.monotonic()
        await rt.sleep(0.15)  # beyond the deadline
        assert time.monotonic() - began > 0.14
        await do(pool.release(connection))

    every: list[dict[str, Any]] = [{"timeout": 0.1}, {}]
    for options in every:
        connection = await do(pool.acquire(timeout=BOUND))
        task = rt.spawn(lambda: waiter(**options))  # noqa: B023
        await rt.until(lambda: pool.waiting or rt.has_ended(task))  # noqa: B023
        await do(pool.release(connection))
        await rt.join(task)


@needs(CANCEL)
async def test_g4_a_grant_that_comes_too_late_disturbs_nobody(rt: Runtime) -> None:
    """Cancelled, and then granted before that has reached it: the waking must not reach what it does next."""
    pool = Script().pool(rt, max_connections=1)
    for timeout in (None, BOUND):
        connection = await do(pool.acquire(timeout=BOUND))

        async def be_the_victim(timeout: float | None = timeout) -> None:
            try:
                await do(pool.acquire(timeout=timeout))
            except rt.killed:
                began = time.monotonic()
                await rt.sleep(0.05)
                assert time.monotonic() - began > 0.04
                return
            raise AssertionError("it was cancelled first")

        victim = rt.spawn(be_the_victim)
        await rt.waiting(pool, 1)
        rt.cancel(victim)
        await do(pool.release(connection))
        await rt.join(victim)
        assert pool.idle == 1


async def test_g7_without_a_timeout_the_usual_rule_waits_for_a_dial_as_long_as_that_takes(rt: Runtime) -> None:
    may_open = rt.event()
    script = Script(on_open=lambda _: may_open.wait())
    pool = script.pool(rt)
    borrower = rt.spawn(lambda: do(pool.acquire(retry=0)))
    await rt.until(lambda: script.count("open"))
    await rt.quiet()
    assert not rt.has_ended(borrower)
    may_open.set()
    await rt.join(borrower)
    await do(pool.release(script.made[0]))


async def test_without_time_an_acquire_takes_what_idles_or_raises_and_lets_nobody_else_run(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)

    async def try_once() -> Any:
        return await do(pool.acquire(timeout=0))

    with pytest.raises(rt.api.PoolExhaustedError):
        await rt.at_once(try_once())
    assert script.count("open") == 0
    async with within(pool.connection(timeout=BOUND)) as connection:
        pass
    assert await rt.at_once(try_once()) is connection
    with pytest.raises(rt.api.PoolExhaustedError):
        await rt.at_once(try_once())
    await rt.at_once(do(pool.release(connection)))
    assert pool.idle == 1


async def test_an_idle_connection_is_lent_and_given_back_without_letting_others_run(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt)

    async def by_hand() -> None:
        await do(pool.release(await do(pool.acquire())))
        await do(pool.release(await do(pool.acquire(timeout=None))))
        async with within(pool.connection()):
            pass

    await by_hand()
    await rt.at_once(by_hand())
    assert script.count("open") == 1


async def test_more_than_max_waiting_fail_at_once(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, max_waiting=1)
    async with within(pool.connection(timeout=BOUND)):
        waiter = rt.spawn(lambda: ask_nothing(pool))
        await rt.waiting(pool, 1)
        with pytest.raises(rt.api.PoolExhaustedError):
            await rt.at_once(do(pool.acquire(timeout=None)))
    await rt.join(waiter)


async def ask_nothing(pool: Any) -> None:
    async with within(pool.connection(timeout=BOUND)):
        pass


async def test_an_error_of_a_dial_reaches_the_borrower_for_whom_it_was_made_and_nobody_else(rt: Runtime) -> None:
    may_go_on = [rt.event(), rt.event()]

    async def dial(connection: Any) -> None:
        await may_go_on[connection.number].wait()
        if connection.number == 0:
            raise ConnectionRefusedError("the first is refused")

    script = Script(on_open=dial)
    pool = script.pool(rt, max_connections=2)
    first = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open") == 1)
    second = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open") == 2)
    may_go_on[0].set()
    error = await rt.outcome(first)
    assert isinstance(error, ConnectionRefusedError)
    assert not rt.has_ended(second)
    may_go_on[1].set()
    assert await rt.join(second) == [script.made[1]]
    await do(pool.release(script.made[1]))
    assert pool.stats().open_failures == 1


async def test_g4_failed_dials_cost_no_slot(rt: Runtime) -> None:
    script = Script()

    async def refuse(_: Any) -> None:
        raise ConnectionRefusedError("for now")

    script.on_open = refuse
    pool = script.pool(rt, max_connections=2)
    for _ in range(5):
        with pytest.raises(ConnectionRefusedError, match="for now"):
            await do(pool.acquire(timeout=BOUND))
    script.on_open = Script().on_open
    connections = [await do(pool.acquire(timeout=BOUND)) for _ in range(2)]
    for connection in connections:
        await do(pool.release(connection))


async def test_a_refused_connect_is_told_to_the_borrower(rt: Runtime) -> None:
    pool = rt.pool(Line, {"host": "127.0.0.1", "port": refused_port()})
    with pytest.raises(ConnectionRefusedError):
        await do(pool.acquire(timeout=BOUND))
    assert pool.total == 0


async def test_a_waiter_takes_what_comes_first_a_release_or_its_dial(rt: Runtime) -> None:
    may_open = rt.event()

    async def dial(connection: Any) -> None:
        if connection.number:
            await may_open.wait()

    script = Script(on_open=dial)
    pool = script.pool(rt, max_connections=2)
    first = await do(pool.acquire(timeout=BOUND))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open") == 2)
    await do(pool.release(first))
    assert await rt.join(waiter) == [first]
    may_open.set()
    await rt.until(lambda: pool.idle == 1)
    await do(pool.release(first))


@needs(CANCEL)
async def test_g4_a_grant_that_meets_a_cancellation_is_handed_on(rt: Runtime) -> None:
    never = rt.event()
    pool = Script().pool(rt, max_connections=1)

    async def be_the_victim() -> None:
        async with within(pool.connection(timeout=BOUND)):
            await never.wait()  # where the grant wakes it before the cancellation reaches it

    connection = await do(pool.acquire(timeout=BOUND))
    victim = rt.spawn(be_the_victim)
    await rt.waiting(pool, 1)
    heir = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 2)
    await do(pool.release(connection))  # granted, and before the victim runs
    rt.cancel(victim)
    assert isinstance(await rt.outcome(victim), rt.killed)
    [connection] = await rt.join(heir)
    await do(pool.release(connection))


@needs(CANCEL)
async def test_g4_a_waiter_that_is_cancelled_leaves_the_queue(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1)
    async with within(pool.connection(timeout=BOUND)):
        victims = [rt.spawn(lambda: do(pool.acquire(timeout=None))) for _ in range(3)]
        await rt.waiting(pool, 3)
        for victim in victims:
            rt.cancel(victim)
            assert isinstance(await rt.outcome(victim), rt.killed)
        assert pool.waiting == 0
    assert pool.idle == 1


@needs(CANCEL)
async def test_g4_a_dial_goes_on_for_others_when_its_borrower_is_cancelled(rt: Runtime) -> None:
    may_open = rt.event()
    script = Script(on_open=lambda _: may_open.wait())
    pool = script.pool(rt, max_connections=1)
    victim = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open"))
    heir = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 2)
    rt.cancel(victim)
    assert isinstance(await rt.outcome(victim), rt.killed)
    may_open.set()
    assert await rt.join(heir) == [script.made[0]]
    await do(pool.release(script.made[0]))
    assert script.count("open") == 1


async def test_idle_connections_are_lent_in_the_order_that_was_asked_for(rt: Runtime) -> None:
    for order, expected in (("lifo", [1, 0]), ("fifo", [0, 1])):
        script = Script()
        pool = script.pool(rt, order=order)
        connections = [await do(pool.acquire(timeout=BOUND)) for _ in range(2)]
        for connection in connections:
            await do(pool.release(connection))
        lent = [await do(pool.acquire(timeout=BOUND)) for _ in range(2)]
        assert [connection.number for connection in lent] == expected
        for connection in lent:
            await do(pool.release(connection))


async def test_wrong_calls_say_so(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, name="strict")
    connection = await do(pool.acquire(timeout=BOUND))
    await do(pool.release(connection))
    with pytest.raises(rt.api.ConnectionNotFoundError, match="released twice"):
        await do(pool.release(connection))
    with pytest.raises(rt.api.ConnectionNotFoundError, match="strict"):
        await do(pool.drop(object()))
    with pytest.raises(rt.api.ConnectionNotFoundError, match="with block"):
        async with within(pool.connection(timeout=BOUND)) as mine:
            await do(pool.release(mine))
    with pytest.raises(TypeError, match="timeout"):
        await do(pool.acquire(timeout="1"))
    with pytest.raises(ValueError, match="max_connections"):
        script.pool(rt, max_connections=0)

"""Many borrowers at once, each with words of its own, and everything that can happen to them, at random."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from .harness import BOUND, CANCEL, Runtime, do, needs, only, within
from .kinds import Line, Script, line_pool
from .server import EchoServer

#: How often each thread borrows.
TURNS = 400


class Checked(Line):
    """Asks in its check and its reset, too."""

    async def reset(self) -> None:
        await self.echo("reset")


async def live(rt: Runtime, pool: Any, rng: random.Random, words: Iterator[int], turns: int, kills: bool) -> None:
    """A borrower's life."""
    for _ in range(turns):
        text = f"word {next(words)}"
        fate = rng.random()
        try:
            if fate < 0.4:
                async with within(pool.connection(timeout=BOUND)) as line:
                    await line.echo(text)
            elif fate < 0.6:
                line = await do(pool.acquire(timeout=BOUND))
                try:
                    await line.echo(text)
                finally:
                    await do(pool.release(line))
            elif fate < 0.7:
                line = await do(pool.acquire(timeout=BOUND))
                try:
                    await line.echo(text)
                finally:
                    await do(pool.drop(line))
            elif fate < 0.8:
                async with within(pool.connection(timeout=0.001)) as line:
                    await line.echo(text)
            elif fate < 0.9:
                async with within(pool.connection(timeout=BOUND)) as line:
                    await do(line.send(text.encode() + b"\n"))
                    raise ValueError("changed its mind")  # and leaves an answer behind
            elif kills:
                async with rt.limit(rng.uniform(0, 0.005)), within(pool.connection(timeout=BOUND)) as line:
                    await line.echo(text)
                    await rt.sleep(0.01)
            else:
                async with within(pool.connection(timeout=0)) as line:
                    await line.echo(text)
        except (ValueError, rt.api.PoolExhaustedError, rt.timed_out):
            pass


@needs(CANCEL)
@pytest.mark.parametrize("seed", range(3))
async def test_g2_g3_no_reply_reaches_the_wrong_borrower_whoever_is_killed(
    rt: Runtime, server: EchoServer, seed: int, logged: Any
) -> None:
    rng = random.Random(seed)
    words = itertools.count()
    pool = line_pool(
        rt,
        server,
        Checked,
        max_connections=4,
        check_after_idle=rng.choice([0, 0.5, None]),
        order=rng.choice(["lifo", "fifo"]),
        max_uses=rng.choice([None, 5]),
        leak_threshold=rng.choice([None, BOUND]),
    )
    borrowers = [rt.spawn(live, rt, pool, rng, words, 6, True) for _ in range(20)]
    for _ in range(40):
        await rt.sleep(rng.uniform(0, 0.002))
        deed = rng.random()
        if deed < 0.4:
            rt.cancel(rng.choice(borrowers))
        elif deed < 0.5:
            server.hang_up()
        elif deed < 0.6:
            await do(pool.clear())
        elif deed < 0.7:
            pool.pause()
            await rt.sleep(0)
            pool.resume()
        elif deed < 0.8:
            pool.resize(rng.randint(1, 4))
        else:
            borrowers.append(rt.spawn(live, rt, pool, rng, words, 3, True))
    outcomes = [await rt.outcome(borrower) for borrower in borrowers]
    unexpected = [each for each in outcomes if each is not None and not isinstance(each, (rt.killed, OSError))]
    assert unexpected == [], f"seed {seed}"
    await rt.is_sound(pool)
    assert (pool.in_use, pool.waiting) == (0, 0)
    assert server.most <= 4
    await do(pool.close(BOUND))  # or its upkeep could go on to say something
    await rt.until(lambda: not pool._talking)  # a dial that has failed says so after it has given up its slot
    for record in logged.take():
        assert "reset() failed" in record.getMessage() or "nobody waits" in record.getMessage()


async def test_g2_g3_no_reply_reaches_the_wrong_borrower(rt: Runtime, server: EchoServer) -> None:
    words = itertools.count()
    pool = line_pool(rt, server, Checked, max_connections=4)
    await rt.join(
        *(rt.spawn(live, rt, pool, random.Random(number), words, 10, False) for number in range(12)), timeout=30
    )
    assert (pool.in_use, pool.waiting) == (0, 0)
    assert server.most <= 4


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@only("threading")
@pytest.mark.parametrize("seed", range(4))
async def test_g1_g2_g4_many_threads_that_take_turns_all_the_time(
    rt: Runtime, seed: int, restless: None, logged: Any
) -> None:
    rng = random.Random(seed)

    async def dial(connection: Any) -> None:
        if connection.number % 7 == 3:
            raise ConnectionRefusedError("now and then")

    async def reset(connection: Any) -> None:
        if connection.number % 11 == 5:
            raise OSError("now and then")

    script = Script(on_open=dial, on_reset=reset) if seed % 2 else Script(on_open=dial)
    pool = script.pool(
        rt,
        max_connections=4,
        check_after_idle=rng.choice([0, 0.02, None]),
        max_uses=rng.choice([None, 10]),
        leak_threshold=rng.choice([None, BOUND]),
        min_idle=rng.choice([0, 1]),
        backoff=(0.001, 0.002),
    )
    users: dict[int, int] = {}

    async def borrower(number: int) -> None:
        mine = random.Random(seed * 100 + number)
        for _ in range(40):
            try:
                timeout = mine.choice([0, 0.001, 0.01, BOUND, None])
                if mine.random() < 0.5:
                    async with within(pool.connection(timeout=timeout)) as connection:
                        assert users.setdefault(id(connection), number) == number, "two borrowers at once"
                        del users[id(connection)]
                        if mine.random() < 0.1:
                            raise ValueError
                else:
                    connection = await do(pool.acquire(timeout=timeout))
                    assert users.setdefault(id(connection), number) == number, "two borrowers at once"
                    del users[id(connection)]
                    await do(pool.release(connection) if mine.random() < 0.9 else pool.drop(connection))
            except (ValueError, ConnectionRefusedError, rt.api.PoolExhaustedError):
                pass

    async def operator() -> None:
        mine = random.Random(seed + 1)
        for _ in range(30):
            deed = mine.randrange(6)
            if deed == 0:
                await do(pool.clear())
            elif deed == 1:
                pool.pause()
                pool.resume()
            elif deed == 2:
                pool.resize(mine.randint(1, 4))
            elif deed == 3:
                await do(pool.drop_expired())
            else:
                assert pool.stats().size <= 4
                pool.holders()
                repr(pool)

    tasks = [rt.spawn(borrower, number) for number in range(16)] + [rt.spawn(operator)]
    await rt.join(*tasks, timeout=40)
    await rt.is_sound(pool)
    assert (pool.in_use, pool.waiting) == (0, 0)
    assert script.most <= 4
    assert pool.stats().acquired > 0
    await do(pool.close(BOUND))  # or its upkeep could go on to say something
    await rt.until(lambda: not pool._talking)  # a dial that has failed says so after it has given up its slot
    for record in logged.take():
        assert "now and then" in record.getMessage()


@only("threading")
@pytest.mark.parametrize(("cap", "threads"), [(1, 2), (2, 3), (3, 8)])
async def test_g2_g4_what_threads_hand_to_each_other_is_neither_lost_nor_shared(
    rt: Runtime, cap: int, threads: int, restless: None
) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=cap, acquire_timeout=BOUND)
    users: dict[int, int] = {}

    async def borrower(number: int) -> None:
        for _ in range(TURNS):
            async with within(pool.connection(timeout=BOUND)) as connection:
                assert users.setdefault(id(connection), number) == number, "two borrowers at once"
                del users[id(connection)]
            connection = await do(pool.acquire())
            assert users.setdefault(id(connection), number) == number, "two borrowers at once"
            del users[id(connection)]
            await do(pool.release(connection))

    await rt.join(*(rt.spawn(borrower, number) for number in range(threads)), timeout=40)
    await rt.is_sound(pool)
    assert (pool.in_use, pool.waiting) == (0, 0)
    assert pool.stats().acquired == threads * TURNS * 2
    assert script.count("close") == 0


@only("threading")
async def test_g4_a_deadline_that_meets_a_grant_loses_nothing(rt: Runtime, restless: None) -> None:
    pool = Script().pool(rt, max_connections=1)
    await do(pool.release(await do(pool.acquire(timeout=BOUND))))  # nobody's patience is used up by a dial

    async def impatient(number: int) -> int:
        lent = 0
        for turn in range(50):
            try:
                connection = await do(pool.acquire(timeout=0.0002 * (1 + (number + turn) % 5)))
            except rt.api.PoolExhaustedError:
                continue
            lent += 1
            await do(pool.release(connection))
        return lent

    assert sum(await rt.join(*(rt.spawn(impatient, number) for number in range(8)))) > 0
    await rt.is_sound(pool)
    assert (pool.idle, pool.in_use, pool.waiting) == (1, 0, 0)

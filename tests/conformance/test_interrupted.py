"""A kill at every point where a borrower or a dial waits: whatever it was doing for the pool, nothing is lost.

Each scenario runs once to count the points of its victim, then once for each of them, each way to strike (asleep, or in
the moment of being woken) and each thing to strike with. After each run the core's invariants hold, no reply reached
the wrong borrower, the server never saw more sockets than the cap, the pool serves `max_connections` borrowers at once,
and after `close()` the server has no socket left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from .harness import ASLEEP, BOUND, CANCEL, WAKING, Knife, Runtime, do, needs, within
from .kinds import CAP, Line, ask, line_pool
from .server import EchoServer


class Watched(Line):
    """What the scenario needs to know of it goes through `world`."""

    world: World


class SlowToOpen(Watched):
    """Greets the server before it is open: it waits after the connect, too."""

    async def open(self) -> None:
        await self.world.aim("open", self._open())

    async def _open(self) -> None:
        await do(super().open())
        try:
            await self.echo("hello")
        except BaseException:
            await do(super().close())
            raise


class SlowToClose(Watched):
    async def close(self) -> None:
        await self.world.aim("close", self._close())

    async def _close(self) -> None:
        try:
            await self.rt.sleep(0)
            await self.rt.sleep(0)
        finally:
            await do(super().close())


class SlowToReset(Watched):
    async def reset(self) -> None:
        await self.echo("reset")


class SlowToCheck(Watched):
    async def check(self) -> bool:
        await self.rt.sleep(0)
        return bool(await do(super().check()))

    def is_expired(self) -> bool:
        return self.world.expired


class World:
    """A server, a pool, bystanders who use it too, and a victim."""

    def __init__(self, rt: Runtime, knife: Knife, server: EchoServer, kind: type, victim: str, **options: Any) -> None:
        self.rt = rt
        self.knife = knife
        self.server = server
        self.victim = victim
        self.expired = False
        self.pool = line_pool(rt, server, type(kind.__name__, (kind,), {"world": self}), **options)
        self.patience: dict[str, Any] = {} if "acquire_timeout" in options else {"timeout": BOUND}
        self.asked = 0

    async def aim(self, doing: str, job: Any) -> None:
        """Run a job, as the victim if the victim is who does that."""
        await (self.knife.upon(job) if self.victim == doing else job)

    async def borrow(self, **options: Any) -> None:
        self.asked += 1
        await ask(self.pool, f"line {self.asked}", **options)

    async def use(self) -> None:
        for _ in range(2):
            try:
                await self.borrow(**self.patience)
            except (self.rt.api.PoolError, self.rt.timed_out):
                # What befell a dial is told to the borrower for whom it was made, and to nobody else.
                if not self.pool.closed and self.victim != "open":
                    raise

    async def serves_everybody(self) -> None:
        entered: list[Any] = []
        everybody = self.rt.event()

        async def use() -> None:
            async with within(self.pool.connection(timeout=BOUND)) as line:
                entered.append(line)
                if len(entered) == CAP:
                    everybody.set()
                await everybody.wait()
                await line.echo("everybody")

        await self.rt.join(*(self.rt.spawn(use) for _ in range(CAP)))
        assert len(set(map(id, entered))) == CAP


#: Runs in which a point was not met, until it is taken not to be there.
TRIES = 2

Deed = Callable[[World], Awaitable[None]]


async def by_with(world: World) -> None:
    await world.borrow(**world.patience)


async def by_hand(world: World) -> None:
    line = await do(world.pool.acquire(timeout=BOUND))
    try:
        await line.echo("by hand")
    finally:
        await do(world.pool.release(line))


async def by_the_rule_of_016(world: World) -> None:
    line = await do(world.pool.acquire(retry=50))
    try:
        await line.echo("the old way")
    finally:
        await do(world.pool.release(line))


async def dropping(world: World) -> None:
    line = await do(world.pool.acquire(timeout=BOUND))
    try:
        await line.echo("and no more")
    finally:
        await do(world.pool.drop(line))


async def clearing(world: World) -> None:
    await world.borrow(timeout=BOUND)
    await do(world.pool.clear())


async def reaping(world: World) -> None:
    await world.borrow(timeout=BOUND)
    world.expired = True
    try:
        await do(world.pool.drop_expired())
    finally:
        world.expired = False


async def closing(world: World) -> None:
    await world.borrow(timeout=BOUND)
    await do(world.pool.close())


async def draining(world: World) -> None:
    await world.borrow(timeout=BOUND)
    await do(world.pool.close(BOUND))


async def after_the_peer_hung_up(world: World) -> None:
    await world.borrow(timeout=BOUND)
    world.server.hang_up()
    await world.borrow(timeout=BOUND)


async def readying(world: World) -> None:
    await do(world.pool.wait_ready(BOUND))
    await world.borrow(timeout=BOUND)


ONE = {"max_connections": 1}

#: name -> what the victim does, the connection's class, who is the victim, the pool's options, who else uses the pool.
SCENARIOS: dict[str, tuple[Deed, type, str, dict[str, Any], int]] = {
    "a borrower that dials": (by_with, SlowToOpen, "borrow", {}, 0),
    "a borrower that waits in the queue": (by_with, Line, "borrow", ONE, 3),
    "a borrower that waits as long as all do": (by_with, Line, "borrow", {**ONE, "acquire_timeout": BOUND}, 4),
    "a borrower among many": (by_with, SlowToReset, "borrow", {"check_after_idle": 0}, 4),
    "a borrower by hand": (by_hand, Line, "borrow", {}, 3),
    "a borrower by the rule of 0.1.6": (by_the_rule_of_016, Line, "borrow", {}, 3),
    "a borrower whose connection is reset": (by_hand, SlowToReset, "borrow", {}, 2),
    "a borrower whose connection is checked": (by_with, SlowToCheck, "borrow", {"check_after_idle": 0}, 2),
    "a borrower who is noted": (by_with, Line, "borrow", {**ONE, "leak_threshold": BOUND}, 2),
    "a borrower who meets stale connections": (after_the_peer_hung_up, Line, "borrow", {"check_after_idle": 0}, 0),
    "a borrower who drops": (dropping, SlowToClose, "borrow", {}, 2),
    "whoever clears": (clearing, SlowToClose, "borrow", {}, 2),
    "whoever reaps": (reaping, SlowToCheck, "borrow", {}, 2),
    "whoever closes the pool": (closing, SlowToClose, "borrow", {}, 2),
    "whoever drains the pool": (draining, SlowToClose, "borrow", {}, 2),
    "whoever waits for the stock": (readying, SlowToOpen, "borrow", {"min_idle": 2}, 0),
    "a dial": (by_with, SlowToOpen, "open", {}, 2),
    "a dial without a bystander": (by_with, SlowToOpen, "open", {"max_connecting": 1}, 0),
    "a close": (dropping, SlowToClose, "close", {}, 2),
}


async def happen(rt: Runtime, knife: Knife, name: str) -> None:
    deed, kind, victim, options, bystanders = SCENARIOS[name]
    with EchoServer() as server:
        world = World(rt, knife, server, kind, victim, **options)
        others = [rt.spawn(world.use) for _ in range(bystanders)]
        errors: list[BaseException] = []

        async def be_the_victim() -> None:
            try:
                await world.aim("borrow", deed(world))
            except AssertionError:
                raise  # a wrong reply
            except BaseException as error:
                errors.append(error)

        await rt.join(rt.spawn(be_the_victim), *others)
        if not knife.point:
            assert errors == []
        pool = world.pool
        await rt.is_sound(pool)
        if not pool.closed:
            await (world.borrow(timeout=BOUND) if "max_connections" in options else world.serves_everybody())
            await rt.is_sound(pool)
        assert server.most <= CAP, f"the server saw {server.most} sockets, the cap is {CAP}"
        await do(pool.close(BOUND))
        await rt.until(lambda: server.serving == 0)
        assert (pool.size, pool.stats().opening, pool.total, pool.waiting) == (0, 0, 0, 0)
        assert pool.faults() == []


@needs(CANCEL)
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("when", [ASLEEP, WAKING])
async def test_g1_g2_g3_g4_a_kill_wherever_something_waits_costs_nobody_else_anything(
    rt: Runtime, name: str, when: str, logged: Any
) -> None:
    count = rt.knife()
    await happen(rt, count, name)
    assert count.points > 0, "the victim never waits: it proves nothing"
    strikes = 0
    for thrown, error in rt.thrown.items():
        point = 1
        # How often it waits depends on how fast the server answers: on until it is not met at that point any more.
        misses = 0
        while misses < TRIES:
            knife = rt.knife(point, when, error)
            try:
                await happen(rt, knife, name)
            except BaseException as failure:
                raise AssertionError(f"{name}: {thrown} at point {point}, {when}") from failure
            strikes += knife.struck
            misses = 0 if knife.struck else misses + 1
            point += knife.struck
        assert point > 1
    assert len(logged.take()) <= strikes  # G12: a dial or a close that was killed is logged once

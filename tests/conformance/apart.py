"""Programs of their own, for what a test's process should not go through: ``python -m tests.conformance.apart RUNTIME
PROGRAM PORT``, beside `test_apart.py`. All is well if one prints nothing and exits with 0.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from .harness import BOUND, Asyncio, Job, Runtime, do, drive, make, within
from .kinds import Line, Script, ask

Program = Callable[[Runtime, dict[str, Any]], Coroutine[Any, Any, None]]

#: What is still there when the interpreter ends.
KEPT: list[Any] = []

#: All that a pool may do in the background.
BUSY = {"min_idle": 1, "keepalive": 0.02, "idle_timeout": 60, "max_lifetime": 60, "check_after_idle": 0.02}


async def ends_with_a_pool_that_idles(rt: Runtime, at: dict[str, Any]) -> None:
    pool = rt.pool(Line, at, **BUSY)
    await ask(pool, "idle", timeout=BOUND)
    await rt.sleep(0.05)
    KEPT.append(pool)


async def ends_with_a_pool_that_nobody_keeps(rt: Runtime, at: dict[str, Any]) -> None:
    await ask(rt.pool(Line, at, **BUSY), "gone", timeout=BOUND)


async def ends_while_all_is_under_way(rt: Runtime, at: dict[str, Any]) -> None:
    """Something is lent, somebody waits, a dial hangs, and so do a close and a keepalive."""
    never = rt.event()
    # With asyncio the end of this task is that of a borrower, which would be reported as it should.
    reclaim = not isinstance(rt, Asyncio)
    pool = rt.pool(Line, at, max_connections=1, leak_threshold=60, reclaim=reclaim)
    line = await do(pool.acquire(timeout=BOUND))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=None)))
    await rt.waiting(pool, 1)

    async def hang(_: Any) -> None:
        await never.wait(10 * BOUND)

    dialling = Script(on_open=hang)
    hanging = dialling.pool(rt)
    dialler = rt.spawn(lambda: do(hanging.acquire(timeout=None)))
    await rt.until(lambda: dialling.count("open"))
    closing = Script(on_close=hang, on_keepalive=hang)
    closed = closing.pool(rt, keepalive=0.02)
    connections = [await do(closed.acquire(timeout=BOUND)) for _ in range(2)]
    closer = rt.spawn(lambda: do(closed.drop(connections[0])))
    await do(closed.release(connections[1]))
    await rt.until(lambda: closing.count("close") and closing.count("keepalive"))
    KEPT.extend([pool, line, waiter, dialler, hanging, closed, closer])


async def ends_inside_a_block(rt: Runtime, at: dict[str, Any]) -> None:
    pool = rt.pool(Line, at)
    KEPT.append(pool)
    async with within(pool.connection(timeout=BOUND)) as line:
        await line.echo("and then it ends")
        sys.exit()


async def forks(rt: Runtime, at: dict[str, Any]) -> None:
    """The child uses none of the parent's sockets; both go on working."""
    me = os.getpid()
    may_open = rt.event()

    async def use(pool: Any) -> Any:
        """Whoever is running, and on which side: greenlets live on in the child, threads do not."""
        async with within(pool.connection(timeout=BOUND)) as line:
            if isinstance(line, Line):
                await line.echo("parent" if os.getpid() == me else "child")
            return line

    pool = rt.pool(Line, at, max_connections=4, **BUSY, leak_threshold=60)
    lent, idle = [await do(pool.acquire(timeout=BOUND)) for _ in range(2)]
    await lent.echo("parent")
    await idle.echo("parent")
    await do(pool.release(idle))
    full = rt.pool(Line, at, max_connections=1)
    taken = await do(full.acquire(timeout=BOUND))
    await taken.echo("parent")
    waiter = rt.spawn(use, full)
    await rt.waiting(full, 1)
    dialling = Script(on_open=lambda _: may_open.wait())
    slow = dialling.pool(rt)
    dialler = rt.spawn(use, slow)
    await rt.until(lambda: dialling.count("open"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, in newer Pythons, and of eventlet's
        child = os.fork()
    if not child:
        with _last_words():
            if isinstance(rt, Asyncio):
                asyncio.run(_be_another_loop(rt, at, [lent, taken]))
            else:
                rt.reinit()
                may_open.set()
                drive(_be_the_child(rt, [pool, full, slow], lent, taken, use))
    status: list[int] = []

    def has_ended() -> bool:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            status.append(code)
        return bool(pid)

    await rt.until(has_ended, timeout=2 * BOUND)
    assert status == [0], "the child has failed"
    await lent.echo("parent")
    await taken.echo("parent")
    await do(full.release(taken))
    assert await rt.join(waiter) == [taken]
    assert await use(full) is taken
    await do(pool.release(lent))
    await use(pool)
    may_open.set()
    assert await rt.join(dialler) == dialling.made
    for each in (pool, full, slow):
        await rt.is_sound(each)
        await do(each.close(BOUND))


async def _be_the_child(rt: Runtime, pools: list[Any], lent: Any, taken: Any, use: Job) -> None:
    for line in (lent, taken):
        try:
            await line.ask("child")
        except OSError:
            pass
        else:
            raise AssertionError("the child has used the parent's socket")
    pool, full, _ = pools
    await do(pool.release(lent))  # is no mistake
    await do(full.drop(taken))
    for each in pools:
        line = await use(each)
        assert line not in (lent, taken)
    for each in pools:
        await rt.is_sound(each)
        await do(each.close(BOUND))
        assert each.total == 0
    gc.collect()


async def _be_another_loop(rt: Runtime, at: dict[str, Any], parents: list[Any]) -> None:
    child = make(rt.name)
    pool = child.pool(Line, at, **BUSY)
    await ask(pool, "child", timeout=BOUND)
    for line in parents:
        try:
            await asyncio.wait_for(line.ask("child"), 0.1)
        except (OSError, RuntimeError, asyncio.TimeoutError):
            pass
    await pool.close()
    parents.clear()
    gc.collect()


class _last_words:
    """The last that a child does."""

    def __enter__(self) -> None:
        faulthandler.dump_traceback_later(1.5 * BOUND, exit=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> NoReturn:
        if error is not None:
            traceback.print_exception(error)
            sys.stderr.flush()
        os._exit(error is not None)


PROGRAMS: dict[str, Program] = {
    each.__name__: each
    for each in (
        ends_with_a_pool_that_idles,
        ends_with_a_pool_that_nobody_keeps,
        ends_while_all_is_under_way,
        ends_inside_a_block,
        forks,
    )
}


def main(name: str, program: str, port: int) -> None:
    rt = make(name)
    scenario = PROGRAMS[program](rt, {"host": "127.0.0.1", "port": port})
    if name == "asyncio":
        asyncio.run(scenario)
    elif name == "uvloop":
        import uvloop

        uvloop.run(scenario)
    else:
        drive(scenario)
    for other in ("gevent", "eventlet"):
        assert name == other or other not in sys.modules, f"{other} was loaded"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

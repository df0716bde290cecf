"""What is particular to asyncio; what is the same in all runtimes is in `conformance`."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import gc
import logging
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar

import gevent
import greenlet
import pytest

import gsocketpool.pool
from gsocketpool.asyncio import Pool, PoolGroup
from gsocketpool.budget import Budget
from gsocketpool.connection import Connection, wrap
from gsocketpool.exceptions import ConnectionNotFoundError, PoolClosedError, PoolError, PoolExhaustedError

from .conftest import Logged

R = TypeVar("R")
Job = Callable[[], Coroutine[Any, Any, R]]

#: Seconds after which a test gives up.
BOUND = 10.0


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What a test's errors refer to goes before anybody looks for what it has left behind."""
    yield
    gc.collect()


def run(main: Job[R], debug: bool = True) -> R:
    """Run it in a loop of its own, in asyncio's debug mode; fail if anything is raised in the background."""
    complaints: list[dict[str, Any]] = []

    async def bounded() -> R:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        asyncio.get_running_loop().slow_callback_duration = BOUND
        return await asyncio.wait_for(main(), BOUND)

    try:
        return asyncio.run(bounded(), debug=debug)
    finally:
        gc.collect()
        assert not complaints, complaints


async def until(condition: Callable[[], object]) -> None:
    """Let others run until it holds."""
    deadline = asyncio.get_running_loop().time() + BOUND
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "what was waited for has not happened"
        await asyncio.sleep(0.001)


class Plain(Connection):
    """Connected to nobody, by plain methods."""

    def __init__(self, **options: Any) -> None:
        self.connected = False

    def open(self) -> None:
        self.connected = True

    def close(self) -> None:
        self.connected = False

    def is_connected(self) -> bool:
        return self.connected


class Async(Connection):
    """The same by coroutines, each of which lets others run once."""

    def __init__(self, **options: Any) -> None:
        self.connected = False

    async def open(self) -> None:
        await asyncio.sleep(0)
        self.connected = True

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.connected = False

    async def check(self) -> bool:
        await asyncio.sleep(0)
        return self.connected

    async def reset(self) -> None:
        await asyncio.sleep(0)

    def is_connected(self) -> bool:
        return self.connected


def written(kind: type, function: Callable[[Any], None]) -> Callable[[Any], Any]:
    """The method that does this, as those of that class are written."""

    async def later(self: Any) -> None:
        await asyncio.sleep(0)
        function(self)

    return later if kind is Async else function


async def at_rest(pool: Pool[Any]) -> None:
    """Nothing is broken or lost: as many can be borrowed at once as ever."""
    await until(lambda: not (pool.in_use or pool._closing or pool._dialling or pool.waiting))
    assert pool.faults() == []
    most = pool._max_connections
    borrowed = [await pool.acquire(timeout=BOUND) for _ in range(most)]
    assert len({id(conn) for conn in borrowed}) == most
    for conn in borrowed:
        await pool.release(conn)
    await until(lambda: not pool.in_use)
    assert pool.faults() == []


# Cancellation


@pytest.mark.parametrize("kind", [Plain, Async])
def test_g4_a_borrower_cancelled_in_the_very_moment_of_waking_hands_on_what_it_was_granted(kind: type) -> None:
    async def main() -> None:
        pool = Pool(kind, max_connections=1)
        conn = await pool.acquire()
        first = asyncio.create_task(pool.acquire(timeout=None))
        second = asyncio.create_task(pool.acquire(timeout=None))
        await until(lambda: pool.waiting == 2)
        await pool.release(conn)  # `first` has it, and has not run since
        first.cancel()
        assert await second is conn
        assert first.cancelled()
        await pool.release(conn)
        await at_rest(pool)
        await pool.close()

    run(main)


def test_g3_a_second_cancellation_while_the_first_is_handled_costs_the_connection_and_nothing_else() -> None:
    async def main() -> None:
        began = asyncio.Event()

        class Slow(Async):
            async def reset(self) -> None:
                began.set()
                try:
                    await asyncio.sleep(BOUND)
                except asyncio.CancelledError:
                    began.clear()
                    await asyncio.sleep(BOUND)

        pool = Pool(Slow, max_connections=1)
        conn = await pool.acquire()
        task = asyncio.create_task(pool.release(conn))
        await began.wait()
        task.cancel("first")
        await until(lambda: not began.is_set())
        task.cancel("second")
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not pool.size)
        assert pool.stats().closed["discarded"] == 1
        assert pool.faults() == []
        await pool.close()

    run(main)


def test_g4_wait_for_gather_and_shield_lose_nothing() -> None:
    async def main() -> None:
        pool = Pool(Async, max_connections=2)
        held = [await pool.acquire() for _ in range(2)]
        for _ in range(20):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool.acquire(timeout=None), 0.001)
        shielded = asyncio.ensure_future(pool.acquire(timeout=None))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(shielded), 0.001)
        all_of_them = asyncio.gather(*(pool.acquire(timeout=None) for _ in range(5)))
        await until(lambda: pool.waiting == 6)
        all_of_them.cancel()
        with pytest.raises(asyncio.CancelledError):
            await all_of_them
        assert pool.waiting == 1
        await pool.release(held[0])
        await pool.release(await shielded)
        await pool.release(held[1])
        await at_rest(pool)
        await pool.close()

    run(main)


if sys.version_info >= (3, 11):

    def test_g3_asyncio_timeout_around_a_block_discards_and_is_a_timeout_error() -> None:
        async def main() -> None:
            pool = Pool(Async, max_connections=1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit, pool.connection():
                    limit.reschedule(asyncio.get_running_loop().time())
                    await asyncio.sleep(BOUND)
            held = await pool.acquire()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pool.acquire(timeout=None)
            await pool.release(held)
            current = asyncio.current_task()
            assert current is not None
            assert current.cancelling() == 0
            assert pool.stats().closed["discarded"] == 1
            await at_rest(pool)
            await pool.close()

        run(main)

    def test_g4_a_task_group_that_fails_leaves_no_borrower_behind() -> None:
        async def borrow(pool: Pool[Async]) -> None:
            async with pool.connection(timeout=None):
                await asyncio.sleep(BOUND)

        async def fail() -> None:
            await asyncio.sleep(0.01)
            raise ValueError

        async def main() -> None:
            pool = Pool(Async, max_connections=2)
            with pytest.raises(Exception, match="unhandled errors in a TaskGroup"):
                async with asyncio.TaskGroup() as group:
                    for _ in range(10):
                        group.create_task(borrow(pool))
                    group.create_task(fail())
            await at_rest(pool)
            await pool.close()

        run(main)


if sys.version_info >= (3, 12):

    def test_eager_tasks_borrow_and_give_back() -> None:
        async def main() -> None:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            pool = Pool(Async, max_connections=2)

            async def borrow() -> None:
                async with pool.connection(timeout=None):
                    await asyncio.sleep(0)

            tasks = [asyncio.create_task(borrow()) for _ in range(50)]
            for task in tasks[::3]:
                task.cancel()
            await asyncio.wait(tasks)
            await at_rest(pool)
            await pool.close()

        run(main)


class Steps(Awaitable[R | None]):
    """Awaits a coroutine, and closes it where it suspends for the so-manieth time, from 1."""

    def __init__(self, coroutine: Coroutine[Any, Any, R], point: int) -> None:
        self._coroutine = coroutine
        self._left = point

    def __await__(self) -> Generator[Any, Any, R | None]:
        while True:
            try:
                waits_for = self._coroutine.send(None)
            except StopIteration as end:
                result: R = end.value
                return result
            self._left -= 1
            if not self._left:
                if waits_for is not None:
                    waits_for._asyncio_future_blocking = False
                self._coroutine.close()
                return None
            yield waits_for


@pytest.mark.parametrize("call", ["acquire", "block", "release", "drop", "clear", "close", "wait_ready"])
def test_g4_a_coroutine_may_be_closed_wherever_it_waits(call: str) -> None:
    async def main(point: int) -> bool:
        pool = Pool(Async, max_connections=2, check_after_idle=0, min_idle=2 * (call == "wait_ready"))

        async def block() -> None:
            async with pool.connection(timeout=BOUND):
                await asyncio.sleep(0)

        if call == "acquire":
            job: Coroutine[Any, Any, Any] = pool.acquire(timeout=BOUND)
        elif call == "block":
            job = block()
        elif call in ("release", "drop"):
            job = getattr(pool, call)(await pool.acquire())
        else:
            if call != "wait_ready":
                await pool.release(await pool.acquire())
            job = getattr(pool, call)()
        steps = Steps(job, point)
        conn = await steps
        if conn is not None:
            await pool.release(conn)
        if call == "close":
            await until(lambda: not pool.total)
            assert pool.faults() == []
        else:
            await at_rest(pool)
            await pool.close()
        return steps._left > 0

    points = 1
    while not run(functools.partial(main, points)):
        points += 1
    assert points > 1, "it has not waited anywhere"


# The end of a loop

PRELUDE = """
import asyncio, gc, sys
from gsocketpool.asyncio import Pool
from gsocketpool.connection import Connection

class Conn(Connection):
    connected = False
    async def open(self):
        await asyncio.sleep(0)
        self.connected = True
    async def close(self):
        await asyncio.sleep(0)
        self.connected = False
    def is_connected(self):
        return self.connected

class Hangs(Conn):
    async def open(self):
        begun.set()
        await asyncio.sleep(100)

class HangsClosing(Conn):
    async def close(self):
        begun.set()
        await asyncio.sleep(100)

class HangsProving(Conn):
    async def keepalive(self):
        begun.set()
        await asyncio.sleep(100)

async def borrow(pool):
    async with pool.connection(timeout=None):
        begun.set()
        await asyncio.sleep(100)

async def bounded():
    global begun
    asyncio.get_running_loop().slow_callback_duration = 100  # a busy machine is no news
    begun = asyncio.Event()
    await asyncio.wait_for(main(), 20)
"""

ENDS = {
    "open": "pool = Pool(Conn, min_idle=2); await pool.wait_ready()",
    "borrowed": "pool = Pool(Conn); await pool.acquire()",
    "borrowed_by_a_task": "pool = Pool(Conn); task = asyncio.create_task(borrow(pool)); await begun.wait()",
    "waiting": "pool = Pool(Conn, max_connections=1)\n"
    "    tasks = [asyncio.create_task(borrow(pool)) for _ in range(5)]; await begun.wait()",
    "dialling": "pool = Pool(Hangs); tasks = [asyncio.create_task(borrow(pool)) for _ in range(5)]; await begun.wait()",
    "dialling_for_the_stock": "pool = Pool(Hangs, min_idle=2); await begun.wait()",
    "closing": "pool = Pool(HangsClosing); conn = await pool.acquire()\n"
    "    task = asyncio.create_task(pool.drop(conn)); await begun.wait()",
    "proving": "pool = Pool(HangsProving, keepalive=0.02)\n"
    "    await pool.release(await pool.acquire()); await begun.wait()",
}


@pytest.mark.parametrize("case", sorted(ENDS))
@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
def test_g12_a_loop_may_end_at_any_time_and_nothing_is_printed(case: str, kept: bool) -> None:
    keeps = "    global pools; pools = pool\n" if kept else ""
    program = f"{PRELUDE}\nasync def main():\n    {ENDS[case]}\n{keeps}\nasyncio.run(bounded())\ngc.collect()\n"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        env={**environment, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))},
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", [Plain, Async])
def test_g12_what_ends_the_program_in_user_code_is_raised_once(kind: type[Any]) -> None:
    def leave(_: object) -> None:
        raise SystemExit(7)

    class Fatal(kind):  # type: ignore[misc]
        open = written(kind, leave)

    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with Pool(Fatal) as pool:
            await pool.acquire()

    task = loop.create_task(main())
    with pytest.raises(SystemExit):
        loop.run_until_complete(task)
    with pytest.raises(PoolError, match="a dial was killed"):
        loop.run_until_complete(task)
    loop.close()


def test_a_loop_that_was_stopped_goes_on_in_another_greenlet() -> None:
    loop = asyncio.new_event_loop()

    async def make() -> tuple[Pool[Async], Async, asyncio.Task[Async]]:
        pool = Pool(Async, max_connections=1, min_idle=1)
        conn = await pool.acquire()
        waiter = asyncio.ensure_future(pool.acquire(timeout=None))
        await until(lambda: pool.waiting)
        return pool, conn, waiter

    async def use(pool: Pool[Async], conn: Async, waiter: asyncio.Task[Async]) -> None:
        await pool.release(conn)
        await pool.release(await waiter)
        await at_rest(pool)
        await pool.close()

    made = greenlet.greenlet(lambda: loop.run_until_complete(make())).switch()
    greenlet.greenlet(lambda: loop.run_until_complete(use(*made))).switch()
    loop.close()


# Elsewhere

CALLS: dict[str, Callable[[Pool[Any], Any], Awaitable[Any]]] = {
    "acquire": lambda pool, conn: pool.acquire(),
    "acquire_with_a_timeout": lambda pool, conn: pool.acquire(timeout=1),
    "connection": lambda pool, conn: pool.connection().__aenter__(),
    "release": lambda pool, conn: pool.release(conn),
    "drop": lambda pool, conn: pool.drop(conn),
    "drop_expired": lambda pool, conn: pool.drop_expired(),
    "clear": lambda pool, conn: pool.clear(),
    "wait_ready": lambda pool, conn: pool.wait_ready(),
    "close": lambda pool, conn: pool.close(),
}


@pytest.mark.parametrize("call", sorted(CALLS))
def test_another_loop_gets_a_clear_error_and_changes_nothing(call: str) -> None:
    async def elsewhere(pool: Pool[Any], conn: Any) -> None:
        with pytest.raises(PoolError, match="Pool of Plain was made in another event loop"):
            await CALLS[call](pool, conn)

    loop = asyncio.new_event_loop()

    async def make() -> tuple[Pool[Plain], Plain]:
        pool = Pool(Plain, max_connections=2)
        conns = [await pool.acquire() for _ in range(2)]
        await pool.release(conns[1])
        return pool, conns[0]

    async def end(pool: Pool[Plain], conn: Plain) -> None:
        assert (pool.idle, pool.in_use) == (1, 1)
        await pool.release(conn)
        await at_rest(pool)
        await pool.close()

    made = loop.run_until_complete(make())
    run(lambda: elsewhere(*made))
    errors: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            run(lambda: elsewhere(*made))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join(BOUND)
    assert not errors
    loop.run_until_complete(end(*made))
    loop.close()


def test_plain_methods_that_change_something_are_refused_in_another_thread() -> None:
    errors: list[str] = []

    async def main() -> None:
        pool = Pool(Plain, max_connections=2)

        def in_a_thread() -> None:
            calls: list[Callable[[], None]] = [lambda: pool.resize(1), pool.pause, pool.resume]
            for call in calls:
                try:
                    call()
                except PoolError as error:
                    errors.append(str(error))
            assert pool.stats().max_connections == 2
            assert pool.holders() == []

        await asyncio.get_running_loop().run_in_executor(None, in_a_thread)
        pool.pause()
        pool.resume()
        pool.resize(1)
        await at_rest(pool)
        await pool.close()

    run(main)
    assert len(errors) == 3
    assert all("made in another event loop" in error for error in errors)


def test_without_a_loop_the_error_says_where_to_make_it() -> None:
    with pytest.raises(RuntimeError, match="no event loop is running: make the pool in a coroutine"):
        Pool(Plain)
    with pytest.raises(RuntimeError, match="no event loop is running: make the group in a coroutine"):
        PoolGroup(Plain)


def test_a_budget_and_a_group_belong_to_one_loop() -> None:
    async def first() -> tuple[Budget, PoolGroup[Plain]]:
        budget = Budget(2)
        group = PoolGroup(Plain, budget=budget)
        async with group.connection(host="a"):
            pass
        await group.clear()
        await group.close()
        return budget, group

    async def second(budget: Budget, group: PoolGroup[Plain]) -> None:
        with pytest.raises(PoolError, match="this budget serves pools of another event loop"):
            Pool(Plain, budget=budget)
        for call in (group.clear, group.close):
            with pytest.raises(PoolError, match="made in another event loop"):
                await call()
        with pytest.raises(PoolError, match="made in another event loop"):
            group.pool(host="b")

    made = run(first)
    run(lambda: second(*made))


def test_gevent_in_one_thread_and_asyncio_in_another() -> None:
    served: list[int] = []

    async def main() -> None:
        pool = Pool(Async, max_connections=2)

        async def borrow() -> None:
            async with pool.connection(timeout=None):
                await asyncio.sleep(0)
            served.append(1)

        await asyncio.gather(*(borrow() for _ in range(200)))
        await pool.close()

    errors: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            run(main)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    with gsocketpool.pool.Pool(Plain, max_connections=2) as pool:

        def borrow() -> None:
            with pool.connection(timeout=None):
                gevent.sleep(0)

        gevent.joinall([gevent.spawn(borrow) for _ in range(200)], raise_error=True)
    thread.join(BOUND)
    assert (len(served), errors) == (200, [])


# Collection


def kept_greenlets() -> list[object]:
    gc.collect()
    return [
        each
        for each in gc.get_objects()
        if issubclass(type(each), greenlet.greenlet) and each and "gsocketpool/asyncio" in str(each.gr_frame)
    ]


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_g9_a_pool_is_collected_while_its_loop_runs(closed: bool) -> None:
    async def main() -> None:
        pool: Pool[Async] | None = Pool(Async, min_idle=2, keepalive=60)
        assert pool is not None
        await pool.wait_ready()
        conns = [member.connection for member in pool._members.values()]
        if closed:
            await pool.close()
        ref = weakref.ref(pool)
        pool = None
        await until(lambda: gc.collect() is not None and ref() is None)
        await until(lambda: not any(conn.connected for conn in conns))
        await until(lambda: not kept_greenlets())

    run(main, debug=False)


def test_g9_a_pool_is_collected_in_another_thread_and_closed_in_its_own() -> None:
    async def main() -> None:
        pools = [Pool(Async, min_idle=2)]
        await pools[0].wait_ready()
        conns = [member.connection for member in pools[0]._members.values()]
        ref = weakref.ref(pools[0])
        thread = threading.Thread(target=pools.clear)
        thread.start()
        await until(lambda: not thread.is_alive())
        await until(lambda: not any(conn.connected for conn in conns))
        await until(lambda: gc.collect() is not None and ref() is None)

    run(main, debug=False)


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closed"])
def test_g9_nothing_is_kept_when_the_loop_was_closed_first(closes: bool) -> None:
    loop = asyncio.new_event_loop()

    async def main() -> Pool[Async]:
        pool = Pool(Async, min_idle=2, keepalive=60)
        await pool.wait_ready()
        if closes:
            await pool.close()
        return pool

    pool = loop.run_until_complete(main())
    loop.close()
    ref = weakref.ref(pool)
    del pool, loop
    gc.collect()
    assert ref() is None
    assert not kept_greenlets()


# The greenlets in which calls are made

PLACE: contextvars.ContextVar[str] = contextvars.ContextVar("place")


@pytest.mark.parametrize("kind", [Plain, Async])
def test_user_code_sees_its_callers_context_and_what_it_changes_there_stays(kind: type[Any]) -> None:
    seen: list[str] = []

    def look(_: object) -> None:
        seen.append(PLACE.get())
        PLACE.set(f"{PLACE.get()}, reset")

    class Looks(kind):  # type: ignore[misc]
        reset = written(kind, look)

    async def borrow(pool: Pool[Any], name: str) -> str:
        PLACE.set(name)
        async with pool.connection(timeout=None):
            await asyncio.sleep(0)
        return PLACE.get()

    async def main() -> None:
        PLACE.set("outside")
        pool = Pool(Looks, max_connections=3)
        names = [str(number) for number in range(30)]
        after = await asyncio.gather(*(borrow(pool, name) for name in names))
        assert after == [f"{name}, reset" for name in names]
        assert sorted(seen, key=int) == names
        assert PLACE.get() == "outside"
        await pool.close()

    run(main)


def test_no_call_gets_another_calls_result_or_error() -> None:
    rng = random.Random(5)

    async def echo(pool: Pool[Async], number: int) -> int:
        def answer() -> int:
            if number % 3 == 0:
                raise KeyError(number)
            return number

        async def later() -> int:
            await asyncio.sleep(rng.random() / 1000)
            return answer()

        try:
            got: int = await pool._run(pool._call, later if number % 2 else answer)
        except KeyError as error:
            return int(error.args[0])
        return got

    async def main() -> None:
        pool = Pool(Async)
        assert await asyncio.gather(*(echo(pool, number) for number in range(500))) == list(range(500))
        await pool.close()

    run(main)


@pytest.mark.parametrize("kind", [Plain, Async])
def test_an_error_keeps_its_identity_traceback_cause_and_context(kind: type[Any]) -> None:
    class Fatal(BaseException):
        pass

    causes: list[BaseException] = []

    def fail(_: object) -> None:
        try:
            raise KeyError("the context")
        except KeyError as error:
            causes.append(error)
            causes.append(Fatal("itself"))
            raise causes[-1] from LookupError("the cause")

    class Fails(kind):  # type: ignore[misc]
        reset = written(kind, fail)

    async def main() -> None:
        pool = Pool(Fails)
        conn = await pool.acquire()
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            with pytest.raises(Fatal) as caught:
                async with pool.connection():
                    pass
        error = caught.value
        assert error is causes[1]
        assert error.__context__ is causes[0]
        assert isinstance(error.__cause__, LookupError)
        assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1] == "fail"
        with pytest.raises(PoolExhaustedError) as exhausted:
            try:
                raise ZeroDivisionError
            except ZeroDivisionError:
                await pool.acquire(timeout=0)
                await pool.acquire(timeout=0)
        assert isinstance(exhausted.value.__context__, ZeroDivisionError)
        await pool.drop(conn)
        await pool.close()

    run(main)


@pytest.mark.parametrize("how", ["dial", "reset", "check", "close", "exhausted", "cancelled", "late"])
def test_a_failure_leaves_no_circle_of_references(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("gsocketpool"), "disabled", True)  # pytest keeps what is logged

    class Mark:
        pass

    class Fails(Async):
        async def _fail(self, where: str) -> None:
            mark = Mark()
            marks.append(weakref.ref(mark))
            future = asyncio.get_running_loop().create_future()
            if where == how:
                asyncio.get_running_loop().call_soon(future.set_exception, ValueError(where))
            elif (where, how) == ("close", "late"):
                asyncio.get_running_loop().call_later(BOUND, future.cancel)
            else:
                future.set_result(None)
            try:
                await future
            finally:
                del future  # it keeps its error, which refers to this frame

        async def open(self) -> None:
            await super().open()
            await self._fail("dial")

        async def close(self) -> None:
            self.connected = False
            await self._fail("close")

        async def check(self) -> bool:
            await self._fail("check")
            return True

        async def reset(self) -> None:
            await self._fail("reset")

    class Hasty(Pool[Fails]):
        close_grace = 0.01 if how == "late" else BOUND

    marks: list[weakref.ref[Mark]] = []

    async def main() -> None:
        pool = Hasty(Fails, max_connections=1, check_after_idle=0)
        gc.disable()
        try:
            for _ in range(2):
                try:
                    conn = await pool.acquire(timeout=BOUND)
                    if how == "exhausted":
                        with pytest.raises(PoolExhaustedError):
                            await pool.acquire(timeout=0.001)
                    elif how == "cancelled":
                        task = asyncio.create_task(pool.acquire(timeout=None))
                        await asyncio.sleep(0)
                        assert pool.waiting
                        task.cancel()
                        await asyncio.wait([task])
                        del task
                    await pool.release(conn)
                    if how in ("close", "late"):
                        await pool.drop(conn)
                    del conn
                except ValueError:
                    pass
            refs = [weakref.ref(member.connection) for member in pool._members.values()]
            await pool.close()
            ended = weakref.ref(pool)
            del pool
            await until(lambda: ended() is None)
            assert not any(ref() for ref in refs)
            assert not any(mark() for mark in marks)
        finally:
            gc.enable()

    run(main, debug=False)


def test_a_greenlet_exit_of_the_users_own_reaches_him() -> None:
    async def main() -> None:
        mine = greenlet.GreenletExit("mine")

        class Leaves(Plain):
            def reset(self) -> None:
                raise mine

        pool = Pool(Leaves, max_connections=1)
        with pytest.raises(greenlet.GreenletExit) as caught:
            await pool.release(await pool.acquire())
        assert caught.value is mine
        await until(lambda: not pool.size)
        await pool.close()

    run(main)


def test_a_call_from_the_depth_of_a_recursion_leaves_no_shallow_stack_behind() -> None:
    def falls(depth: int) -> int:
        return 0 if depth == 0 else 1 + falls(depth - 1)

    class Recurses(Plain):
        def reset(self) -> None:
            falls(sys.getrecursionlimit() // 2)

    async def deep(pool: Pool[Recurses], depth: int) -> None:
        if depth:
            await deep(pool, depth - 1)
        else:
            await pool.drop(await pool.acquire())

    async def main() -> None:
        pool = Pool(Recurses, max_connections=1)
        await deep(pool, sys.getrecursionlimit() * 7 // 10 - len(traceback.extract_stack()))
        await pool.release(await pool.acquire())
        assert pool.idle == 1
        await pool.close()

    run(main)


# Giving back while an error is handled


def test_g3_release_in_a_finally_discards_after_an_error_and_only_then() -> None:
    async def main() -> None:
        pool = Pool(Async, max_connections=1)

        async def borrow(error: BaseException | None) -> None:
            conn = await pool.acquire(timeout=BOUND)
            try:
                await asyncio.sleep(0)
                if error is not None:
                    raise error
            finally:
                await pool.release(conn)

        await borrow(None)
        assert pool.stats().closed["discarded"] == 0
        for number, error in enumerate((ValueError(), asyncio.CancelledError()), 1):
            with pytest.raises(type(error)):
                await borrow(error)
            assert pool.stats().closed["discarded"] == number
        try:
            raise ValueError
        except ValueError:
            conn = await pool.acquire(timeout=BOUND)
            await pool.release(conn)
            assert pool.stats().closed["discarded"] == 3
            async with pool.connection(timeout=BOUND):  # the block itself has ended well
                pass
            assert pool.stats().closed["discarded"] == 3
        await at_rest(pool)
        await pool.close()

    run(main)


def test_an_error_that_is_handled_where_the_loop_is_run_discards_nothing() -> None:
    async def main() -> None:
        pool = Pool(Async, max_connections=1)
        await asyncio.sleep(0)
        for _ in range(3):
            await pool.release(await pool.acquire(timeout=BOUND))
        assert pool.stats().opened == 1
        with pytest.raises(KeyError):
            conn = await pool.acquire()
            try:
                raise KeyError
            finally:
                await pool.release(conn)
        assert pool.stats().closed["discarded"] == 1
        await pool.close()

    try:
        raise ImportError
    except ImportError:
        run(main)


# What the user has written


def test_plain_and_async_functions_and_awaitables_of_any_kind_serve_wrap() -> None:
    class Later:
        def __init__(self, value: object) -> None:
            self.value = value

        def __await__(self) -> Generator[Any, Any, object]:
            yield
            return self.value

    class Raw:
        closed = 0

    async def close(raw: Any) -> None:
        await asyncio.sleep(0)
        raw.closed += 1

    def check(raw: Any) -> Any:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, True)
        return future

    def reset(raw: Any) -> Any:
        return asyncio.get_running_loop().create_task(asyncio.sleep(0))

    async def main() -> None:
        pool: Pool[Any] = Pool(wrap(lambda: Later(Raw()), close=close, check=check, reset=reset), check_after_idle=0)
        async with pool.connection() as raw:
            assert type(raw) is Raw
        async with pool.connection() as again:
            assert again is raw
        await pool.close()
        assert raw.closed == 1

    run(main)


def test_create_connection_may_be_overridden_by_a_plain_or_an_async_method() -> None:
    class PlainHook(Pool[Any]):
        def _create_connection(self) -> Any:
            conn = super()._create_connection()
            conn.tag = "plain"
            return conn

    class AsyncHook(Pool[Any]):
        async def _create_connection(self) -> Any:
            await asyncio.sleep(0)
            conn = await super()._create_connection()
            conn.tag = "async"
            return conn

    class Refuses(Async):
        async def open(self) -> None:
            await super().open()
            raise OSError("refused")

    async def use(kind: type[Pool[Any]], tag: str) -> None:
        pool = kind(Async, max_connections=1)
        async with pool.connection() as conn:
            assert conn.tag == tag
        await at_rest(pool)
        await pool.close()
        refused = kind(Refuses, max_connections=1)
        with pytest.raises(OSError, match="refused"):
            await refused.acquire()
        await until(lambda: not refused._dialling)
        assert refused.faults() == []
        await refused.close()

    async def main() -> None:
        await use(PlainHook, "plain")
        await use(AsyncHook, "async")

    run(main)


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, StopIteration, StopAsyncIteration, OSError])
@pytest.mark.parametrize("where", ["open", "close", "check", "reset", "keepalive"])
def test_g4_whatever_user_code_raises_no_slot_is_lost(where: str, error: type[BaseException], logged: Logged) -> None:
    fails = [True]

    def fail(name: str) -> None:
        if name == where and fails:
            fails.clear()
            raise error

    class Fails(Plain):
        def open(self) -> None:
            self.connected = True
            fail("open")

        def close(self) -> None:
            self.connected = False
            fail("close")

        def check(self) -> bool:
            fail("check")
            return True

        def reset(self) -> None:
            fail("reset")

        def keepalive(self) -> bool:
            fail("keepalive")
            return True

    async def main() -> None:
        pool = Pool(Fails, max_connections=1, check_after_idle=0, keepalive=0.02 if where == "keepalive" else None)
        for _ in range(4):
            try:
                conn = await pool.acquire(timeout=BOUND)
                await pool.release(conn)
                if where == "close":
                    await pool.drop(conn)
                elif where == "keepalive":
                    await until(lambda: not fails)
            except (error, PoolError, RuntimeError):
                pass
        assert not fails
        await at_rest(pool)
        await pool.close()

    run(main)
    logged.take()


@pytest.mark.parametrize("where", ["close", "keepalive"])
def test_g4_user_code_that_hangs_costs_no_slot_and_its_late_error_is_not_printed(where: str, logged: Logged) -> None:
    async def main() -> None:
        hung = asyncio.Event()

        class Hangs(Async):
            async def _hang(self) -> None:
                try:
                    await asyncio.sleep(BOUND)
                finally:
                    hung.set()
                    raise ValueError("late")

            async def close(self) -> None:
                self.connected = False
                if where == "close" and not hung.is_set():
                    await self._hang()

            async def keepalive(self) -> bool:
                if not hung.is_set():
                    await self._hang()
                return True

        class Hasty(Pool[Hangs]):
            close_grace = 0.01 if where == "close" else BOUND
            keepalive_grace = 0.01 if where == "keepalive" else BOUND

        pool = Hasty(Hangs, max_connections=1, keepalive=0.02 if where == "keepalive" else None)
        conn = await pool.acquire()
        await (pool.drop(conn) if where == "close" else pool.release(conn))
        await hung.wait()
        gc.collect()
        await at_rest(pool)
        await pool.close()

    run(main)
    assert [where in record.getMessage() for record in logged.take()] == [True]


def test_user_code_may_use_another_pool_and_the_same_one() -> None:
    async def main() -> None:
        inner = Pool(Async, max_connections=1)

        class Nested(Async):
            async def open(self) -> None:
                async with inner.connection(timeout=BOUND):
                    await super().open()

            async def reset(self) -> None:
                if not resetting:
                    resetting.append(self)
                    async with outer.connection(timeout=BOUND) as other:
                        assert other is not self

        resetting: list[object] = []
        outer = Pool(Nested, max_connections=2)
        async with outer.connection(timeout=BOUND):
            pass
        assert resetting
        await at_rest(outer)
        await at_rest(inner)
        await outer.close()
        await inner.close()

    run(main)


def test_user_code_may_have_a_bridge_of_its_own() -> None:
    async def bridged(function: Callable[[], Any]) -> Any:
        """As other libraries do, SQLAlchemy among them."""
        there = greenlet.greenlet(function)
        answer = there.switch()
        while not there.dead:
            answer = there.switch(await answer)
        return answer

    def wait(awaitable: Awaitable[Any]) -> Any:
        parent = greenlet.getcurrent().parent
        assert parent is not None
        return parent.switch(awaitable)

    class Bridged(Async):
        async def open(self) -> None:
            await bridged(lambda: wait(asyncio.sleep(0)))
            self.connected = True

        async def reset(self) -> None:
            await bridged(lambda: wait(asyncio.sleep(0)))

    async def main() -> None:
        pool = Pool(Bridged, max_connections=1)

        def borrow() -> str:
            conn = wait(pool.acquire(timeout=BOUND))
            wait(asyncio.sleep(0))
            wait(pool.release(conn))
            return "done"

        assert await asyncio.gather(*(bridged(borrow) for _ in range(10))) == ["done"] * 10
        await at_rest(pool)
        await pool.close()

    run(main)


def test_a_subclass_may_have_an_acquire_and_a_release_of_its_own() -> None:
    class Counts(Pool[Async]):
        acquired = released = 0

        async def acquire(self, *args: Any, **options: Any) -> Async:
            self.acquired += 1
            return await super().acquire(*args, **options)

        async def release(self, conn: Async) -> None:
            await super().release(conn)
            self.released += 1

    async def main() -> None:
        pool = Counts(Async, max_connections=1)
        async with pool.connection(timeout=BOUND) as conn:
            pass
        with pytest.raises(ValueError):
            async with pool.connection():
                raise ValueError
        assert not conn.connected or pool.stats().closed["discarded"] == 1
        async with pool.connection(timeout=BOUND) as conn:
            await pool.drop(conn)
        assert (pool.acquired, pool.released) == (3, 1)
        await at_rest(pool)
        await pool.close()

    run(main)


# Watching over borrowers and connections


def test_a_task_that_ends_without_releasing_gives_its_connection_up(logged: Logged) -> None:
    async def forgetful(pool: Pool[Async]) -> None:
        await pool.acquire()

    async def main() -> None:
        pool = Pool(Async, max_connections=1, reclaim=True, name="mine")
        await asyncio.create_task(forgetful(pool), name="the forgetful one")
        await until(lambda: not pool.size)
        assert pool.stats().closed["reclaimed"] == 1
        await at_rest(pool)
        await pool.close()

    run(main)
    (record,) = logged.take()
    assert "the forgetful one" in record.getMessage()
    assert "ended without releasing" in record.getMessage()


def test_who_holds_a_connection_is_a_task() -> None:
    async def main() -> None:
        pool = Pool(Async, leak_threshold=60)
        async with pool.connection() as conn:
            (holder,) = pool.holders()
            assert holder.connection is conn
            assert holder.greenlet is asyncio.current_task()
        await pool.close()

    run(main)


class Streamed(Connection):
    """Over a transport of the loop's."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def close(self) -> None:
        assert self.writer is not None
        writer, self.writer = self.writer, None
        writer.close()
        await writer.wait_closed()

    def is_connected(self) -> bool:
        return self.writer is not None

    def check(self) -> bool:
        return self.writer is not None and not self.reader.at_eof()

    def fileno(self) -> int | None:
        number: int | None = None if self.writer is None else self.writer.get_extra_info("socket").fileno()
        return number


class Listener:
    """Accepts connections, and keeps them."""

    async def __aenter__(self) -> Listener:
        self.writers: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            await reader.read()
        finally:
            writer.close()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await until(lambda: all(writer.transport.is_closing() for writer in self.writers))
        await self._server.wait_closed()


def test_g8_a_peer_that_hangs_up_is_noticed_though_a_transport_has_the_socket() -> None:
    async def main() -> None:
        async with Listener() as listener:
            pool = Pool(Streamed, {"port": listener.port}, check_after_idle=0.02)
            async with pool.connection():
                pass
            await until(lambda: any(member.watch is not None for member in pool._members.values()))
            (member,) = pool._members.values()
            assert member.watch.descriptor != member.connection.fileno()
            listener.writers[0].close()
            await until(lambda: not pool.size)
            assert pool.stats().closed["stale"] == 1
            await pool.close()

    run(main)


def test_g4_no_descriptor_is_left_by_a_watch_whose_loop_was_closed_first() -> None:
    loop = asyncio.new_event_loop()
    here, there = socket.socketpair()

    class Raw(Plain):
        def fileno(self) -> int | None:
            return here.fileno()

        def check(self) -> bool:
            return True

    async def main() -> Pool[Raw]:
        asyncio.get_running_loop().add_reader(here.fileno(), int)
        pool = Pool(Raw, check_after_idle=0.02)
        async with pool.connection():
            pass
        (member,) = pool._members.values()
        await until(lambda: member.watch is not None)
        member.watch.duplicate()  # as if a transport had it
        return pool

    pool = loop.run_until_complete(main())
    (member,) = pool._members.values()
    descriptor = member.watch.descriptor
    loop.close()
    del pool, member
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)
    here.close()
    there.close()


def test_g10_the_child_of_a_fork_takes_no_watch_from_its_parent() -> None:
    async def main() -> None:
        async with Listener() as listener:
            pool = Pool(Streamed, {"port": listener.port}, check_after_idle=0.02)
            async with pool.connection():
                pass
            (member,) = pool._members.values()
            await until(lambda: member.watch is not None)
            child = os.fork()
            if not child:
                os._exit(bool(pool.size))
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert status == 0
            assert member.watch is not None
            listener.writers[0].close()
            await until(lambda: not pool.size)
            await pool.close()

    run(main)


# All at once


def test_g4_a_thousand_tasks_and_random_cancellations_lose_nothing(rng: random.Random) -> None:
    users: dict[int, object] = {}
    served = 0

    async def borrow(pool: Pool[Async]) -> None:
        nonlocal served
        me = object()
        async with pool.connection(timeout=rng.choice([None, None, 0.05])) as conn:
            assert users.setdefault(id(conn), me) is me, "two borrowers at a time"
            try:
                await asyncio.sleep(rng.choice([0, 0, 0.001]))
            finally:
                del users[id(conn)]
            served += 1

    async def main() -> None:
        pool = Pool(Async, max_connections=10, check_after_idle=0.02, max_uses=50)
        tasks = [asyncio.create_task(borrow(pool)) for _ in range(1000)]
        while not all(task.done() for task in tasks):
            for task in rng.sample(tasks, 5):
                if rng.random() < 0.3:
                    task.cancel()
            assert pool.faults() == []
            assert pool.total <= 10
            await asyncio.sleep(0)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, (asyncio.CancelledError, PoolExhaustedError)), outcome
        assert served > 10
        assert not users
        await at_rest(pool)
        await pool.close()

    run(main, debug=False)


def test_memory_stays_the_same_over_many_acquires_with_timeouts() -> None:
    async def some(pool: Pool[Plain], count: int) -> None:
        async def borrow() -> None:
            for _ in range(count // 20):
                async with pool.connection(timeout=BOUND):
                    await asyncio.sleep(0)

        await asyncio.gather(*(borrow() for _ in range(20)))
        with pytest.raises(PoolExhaustedError):
            async with pool.connection(timeout=BOUND), pool.connection(timeout=BOUND):
                await pool.acquire(timeout=0.001)

    async def main() -> None:
        pool = Pool(Plain, max_connections=2)
        await some(pool, 4000)
        gc.collect()
        before = sys.getallocatedblocks()
        await some(pool, 40_000)
        gc.collect()
        assert sys.getallocatedblocks() - before < 2000
        await pool.close()

    run(main, debug=False)


def test_a_pool_is_neither_copied_nor_pickled_and_says_what_it_is() -> None:
    async def main() -> None:
        pool = Pool(Plain, name="mine", max_connections=3)
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a pool cannot be copied or pickled"):
                attempt(pool)
        conn = await pool.acquire()
        assert repr(pool) == "<Pool 'mine': 0 idle, 1 in use, 0 opening, 0 waiting, max 3>"
        await pool.release(conn)
        with pytest.raises(ConnectionNotFoundError, match="released twice"):
            await pool.release(conn)
        await pool.close()
        assert repr(pool) == "<Pool 'mine': 0 idle, 0 in use, 0 opening, 0 waiting, closed>"
        with pytest.raises(PoolClosedError):
            await pool.acquire()

    run(main)


# A subclass's own


@pytest.mark.parametrize("what_ends", ["the loop", "the task"])
def test_g12_an_async_drop_expired_that_is_under_way_may_be_cancelled(what_ends: str) -> None:
    class Slow(Pool[Plain]):
        begun = 0
        last: asyncio.Task[Any] | None = None

        def drop_expired(self) -> Any:
            self.begun += 1
            # A loop that is about to close would never get to the next one.
            return self.take_long() if self.begun == 1 or what_ends == "the task" else None

        async def take_long(self) -> None:
            self.last = asyncio.current_task()
            await asyncio.sleep(BOUND)
            await super().drop_expired()

    async def main() -> None:
        pool = Slow(Plain, reap_interval=0.02)
        await pool.release(await pool.acquire())
        await until(lambda: pool.last)
        if what_ends == "the task":
            assert pool.last is not None
            pool.last.cancel()
            await until(lambda: pool.begun == 2)  # it goes on reaping
            await pool.close()

    run(main)

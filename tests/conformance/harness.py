"""One way to write a scenario for all runtimes.

A scenario is an ``async def`` that is given a `Runtime`. Whatever may wait it awaits: `do(pool.acquire(timeout=1))` for
the pool's own calls, and the runtime's `spawn`, `join`, `sleep`, `until`. With asyncio it runs on a loop. With the
others, whose code waits by standing still, nothing that it awaits ever suspends it, so `drive` runs it to its end with
one step.

What a runtime cannot promise stands in `limits.py`; a scenario that asks for it is not made for that runtime.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeVar

import greenlet

from .knives import ASLEEP, WAKING, GreenletKnife, Knife, Stepwise, TaskKnife
from .limits import CANCEL, KILL_AT_ONCE, RUNTIMES, WAITING_CONSTRUCTOR, needs, only, runtimes_for

__all__ = [
    "ASLEEP",
    "BOUND",
    "CANCEL",
    "KILL_AT_ONCE",
    "RUNTIMES",
    "WAITING_CONSTRUCTOR",
    "WAKING",
    "Asyncio",
    "Blocking",
    "Event",
    "Job",
    "Knife",
    "Runtime",
    "Task",
    "do",
    "drive",
    "make",
    "needs",
    "only",
    "runtimes_for",
    "within",
]

T = TypeVar("T")
Job = Callable[..., Coroutine[Any, Any, Any]]

#: Seconds after which what a scenario waits for is taken not to come.
BOUND: Final = 10.0

# What scenarios say


async def do(outcome: Any) -> Any:
    """Await a call where it is to be awaited: ``await do(pool.acquire())``."""
    return await outcome if inspect.isawaitable(outcome) else outcome


class within:
    """``async with`` for what is entered by ``with`` in some runtimes."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._plain = not hasattr(context, "__aenter__")

    async def __aenter__(self) -> Any:
        return self._context.__enter__() if self._plain else await self._context.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        if self._plain:
            return self._context.__exit__(kind, error, traceback)
        return await self._context.__aexit__(kind, error, traceback)


def drive(job: Coroutine[Any, Any, T]) -> T:
    """Run what never suspends."""
    try:
        job.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    job.close()
    raise AssertionError("a scenario waits for something that belongs to asyncio")


class Task:
    """A job that runs beside the one that has spawned it."""

    native: Any

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    async def run(self, job: Job, args: tuple[Any, ...]) -> None:
        try:
            self.value = await job(*args)
        except BaseException as error:
            self.error = error.with_traceback(None) if isinstance(error, SystemExit) else error


class Event:
    """Happens once."""

    def __init__(self, native: Any, is_set: Callable[[], bool], wait: Callable[[float], Any]) -> None:
        self._native = native
        self._is_set = is_set
        self._wait = wait

    def set(self) -> None:
        """It happens now; once more is nothing."""
        if not self._is_set():
            getattr(self._native, "set", getattr(self._native, "send", None))()  # type: ignore[misc]

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._is_set()

    async def wait(self, timeout: float = BOUND) -> None:
        """Wait for it; fail if it does not come."""
        try:
            await do(self._wait(timeout))
        except asyncio.TimeoutError:
            pass
        assert self._is_set(), f"what was waited for has not happened in {timeout} s"


class Runtime:
    """What differs between runtimes. `api` is the module with its `Pool` and all that goes with it."""

    name: str
    module: str

    #: What a borrower that is killed, or cancelled, dies of; and one whose time runs out.
    killed: type[BaseException]
    timed_out: type[BaseException]

    #: What a `Knife` may throw.
    thrown: Mapping[str, Callable[[], BaseException]]

    def __init__(self) -> None:
        self.api: Any = importlib.import_module(self.module)
        self.made: list[weakref.ref[Any]] = []
        self.tasks: list[Task] = []
        self._adapted: dict[tuple[type, ...], type] = {}

    # Running

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        """Run a scenario to its end, and see that it leaves nothing undone."""
        raise NotImplementedError

    async def whole(self, scenario: Coroutine[Any, Any, T]) -> T:
        """A scenario, and what holds at the end of each."""
        try:
            result = await scenario
        except BaseException:
            for task in self.tasks:
                self.cancel(task)
            for pool in self._pools():
                await do(pool.close())
            raise
        for task in self.tasks:
            assert self.has_ended(task), "the scenario has left something running"
        for pool in self._pools():
            await self.is_sound(pool)
            await do(pool.close(BOUND))
            assert (pool.size, pool.stats().opening, pool.total) == (0, 0, 0), repr(pool)
            assert pool.faults() == []
        return result

    def _pools(self) -> list[Any]:
        return [pool for ref in self.made if (pool := ref()) is not None]

    async def is_sound(self, pool: Any) -> None:
        """The core's invariants hold, as soon as nothing is under way."""
        await self.until(lambda: pool.faults() == [], lambda: f"{pool!r}: {pool.faults()}")

    def spawn(self, job: Job, *args: Any) -> Task:
        """Run a job beside this one."""
        task = Task()
        task.native = self._spawn(functools.partial(task.run, job, args))
        self.tasks.append(task)
        return task

    def _spawn(self, job: Job) -> Any:
        raise NotImplementedError

    def has_ended(self, task: Task) -> bool:
        """Whether it has ended, in whatever way."""
        raise NotImplementedError

    def cancel(self, task: Task) -> None:
        """Kill it, or cancel it; returns without waiting for it."""

    async def join(self, *tasks: Task, timeout: float = BOUND) -> list[Any]:
        """Wait for their ends. Answers what they returned; raises what the first that has failed has raised."""
        outcomes = [await self.outcome(task, timeout) for task in tasks]
        for task in tasks:
            if task.error is not None:
                raise task.error
        return outcomes

    async def outcome(self, task: Task, timeout: float = BOUND) -> Any:
        """Wait for its end. Answers what it returned or raised."""
        await self.until(lambda: self.has_ended(task), lambda: "a task does not end", timeout)
        return task.value if task.error is None else task.error

    async def sleep(self, seconds: float) -> None:
        """Let others run for so long."""
        raise NotImplementedError

    async def until(
        self, condition: Callable[[], Any], what: Callable[[], str] = lambda: "", timeout: float = BOUND
    ) -> None:
        """Return when a condition holds; fail if it does not come to that."""
        deadline = time.monotonic() + timeout
        pauses = 0
        while not condition():
            assert time.monotonic() < deadline, f"it has not come to that in {timeout} s: {what()}"
            pauses += 1
            await self.sleep(0 if pauses < 10 else 0.001)

    async def waiting(self, pool: Any, count: int) -> None:
        """Return when so many wait for a connection."""
        await self.until(lambda: pool.waiting == count, lambda: repr(pool))

    async def quiet(self) -> None:
        """Let everybody else get on as far as they can: for seeing that something does not happen."""
        for _ in range(8):
            await self.sleep(0)

    def event(self) -> Event:
        """Something that has not happened yet."""
        raise NotImplementedError

    def limit(self, seconds: float) -> Any:
        """``async with``: raises `timed_out` in there after so many seconds."""
        raise NotImplementedError

    async def at_once(self, job: Coroutine[Any, Any, T]) -> T:
        """Await something that hands over to nobody else; fail if it does."""
        raise NotImplementedError

    def knife(self, point: int = 0, when: str = WAKING, error: Callable[[], BaseException] | None = None) -> Knife:
        """A kill at exactly one point."""
        raise NotImplementedError

    def reinit(self) -> None:
        """In the child of a fork."""

    # Making pools

    def pool(self, kind: type, options: dict[str, Any] | None = None, **settings: Any) -> Any:
        """A pool of such connections, that is closed and looked at when the scenario has ended."""
        return self.made_by(self.api.Pool, kind, options, **settings)

    def made_by(self, pool_type: Callable[..., Any], kind: type, *args: Any, **settings: Any) -> Any:
        """As `pool`, for a subclass of the runtime's."""
        pool = pool_type(self.adapt(kind), *args, **settings)
        self.made.append(weakref.ref(pool))
        return pool

    def group(self, kind: type, **settings: Any) -> Any:
        """A group of such connections. Its pools are looked at if the scenario calls `watch`."""
        return self.api.PoolGroup(self.adapt(kind), **settings)

    def watch(self, *pools: Any) -> None:
        """These pools are closed and looked at, too, when the scenario has ended."""
        self.made += map(weakref.ref, pools)

    def adapt(self, kind: type) -> type:
        """A class that is written for all runtimes, as this one takes it: `kind` says by `base` what it derives from;
        its coroutine methods become plain ones where that is what the runtime calls."""
        base = getattr(self.api, getattr(kind, "base", "Connection"))
        adapted = self._adapted.get((kind, base))
        if adapted is None:
            adapted = self._adapted[kind, base] = type(kind.__name__, (kind, base), {"rt": self, **self._plain(kind)})
        return adapted

    def _plain(self, kind: type) -> dict[str, Any]:
        return {}


# Runtimes whose code waits by standing still


class Blocking(Runtime):
    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        return drive(self.whole(scenario))

    def _plain(self, kind: type) -> dict[str, Any]:
        return {
            name: _driven(method)
            for name in dir(kind)
            if inspect.iscoroutinefunction(method := getattr(kind, name)) and name in USER_METHODS
        }


#: What a pool calls that may wait.
USER_METHODS: Final = frozenset({"open", "close", "check", "reset", "keepalive"})


def _driven(method: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., T]:
    def plain(self: Any) -> T:
        return drive(method(self))

    return plain


class Gevent(Blocking):
    name = "gevent"
    module = "gsocketpool"

    def __init__(self) -> None:
        super().__init__()
        import gevent.event

        self.gevent: Any = gevent
        self.killed = gevent.GreenletExit
        self.timed_out = gevent.Timeout
        self.thrown = {"a kill": gevent.GreenletExit, "a Timeout": gevent.Timeout}

    def _spawn(self, job: Job) -> Any:
        return self.gevent.spawn(lambda: drive(job()))

    def has_ended(self, task: Task) -> bool:
        if not task.native.ready():
            return False
        if task.error is None and not task.native.successful():
            task.error = task.native.exception
        elif task.error is None and isinstance(task.native.value, self.killed):  # before it had begun
            task.error = task.native.value
        return True

    def cancel(self, task: Task) -> None:
        task.native.kill(block=False)

    async def sleep(self, seconds: float) -> None:
        self.gevent.sleep(seconds)

    def event(self) -> Event:
        event = self.gevent.event.Event()
        return Event(event, event.is_set, event.wait)

    def limit(self, seconds: float) -> Any:
        return within(self.gevent.Timeout(seconds))

    async def at_once(self, job: Coroutine[Any, Any, T]) -> T:
        return await _without_switch(job)

    def knife(self, point: int = 0, when: str = WAKING, error: Callable[[], BaseException] | None = None) -> Knife:
        hub = self.gevent.get_hub()
        return GreenletKnife(point, when, error or self.killed, hub, hub.loop.run_callback)

    def reinit(self) -> None:
        self.gevent.reinit()


class Eventlet(Blocking):
    name = "eventlet"
    module = "gsocketpool.eventlet"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that eventlet is on its way out is no news here
            import eventlet.event
            import eventlet.hubs
        super().__init__()

        self.eventlet: Any = eventlet
        self.killed = greenlet.GreenletExit
        self.timed_out = eventlet.Timeout
        self.thrown = {"a kill": greenlet.GreenletExit, "a Timeout": eventlet.Timeout}

    def _spawn(self, job: Job) -> Any:
        return self.eventlet.spawn(lambda: drive(job()))

    def has_ended(self, task: Task) -> bool:
        if not task.native.dead:
            return False
        if task.error is None and task.value is None:
            try:
                task.native.wait()
            except BaseException as error:  # killed before it had begun
                task.error = error
        return True

    def cancel(self, task: Task) -> None:
        self.eventlet.kill(task.native)

    async def sleep(self, seconds: float) -> None:
        self.eventlet.sleep(seconds)

    def event(self) -> Event:
        event = self.eventlet.event.Event()
        return Event(event, event.ready, lambda timeout: event.wait(timeout=timeout))

    def limit(self, seconds: float) -> Any:
        return within(self.eventlet.Timeout(seconds))

    async def at_once(self, job: Coroutine[Any, Any, T]) -> T:
        return await _without_switch(job)

    def knife(self, point: int = 0, when: str = WAKING, error: Callable[[], BaseException] | None = None) -> Knife:
        hub = self.eventlet.hubs.get_hub()
        later = functools.partial(hub.schedule_call_global, 0)
        return GreenletKnife(point, when, error or self.killed, hub.greenlet, later)

    def reinit(self) -> None:
        self.eventlet.hubs.use_hub()


async def _without_switch(job: Coroutine[Any, Any, T]) -> T:
    me = greenlet.getcurrent()
    switches: list[object] = []

    def trace(event: str, args: Any) -> None:
        if args[0] is me:
            switches.append(args[1])

    before = greenlet.settrace(trace)
    try:
        return await job
    finally:
        greenlet.settrace(before)
        assert not switches, "it has let others run"


class Threads(Blocking):
    name = "threading"
    module = "gsocketpool.threading"
    killed = KeyboardInterrupt
    timed_out = TimeoutError
    thrown: Mapping[str, Callable[[], BaseException]] = MappingProxyType({})

    def _spawn(self, job: Job) -> Any:
        thread = threading.Thread(target=lambda: drive(job()), daemon=True)
        thread.start()
        return thread

    def has_ended(self, task: Task) -> bool:
        return not task.native.is_alive()

    async def outcome(self, task: Task, timeout: float = BOUND) -> Any:
        task.native.join(timeout)
        return await super().outcome(task, 0)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds or 0.0001)

    async def quiet(self) -> None:
        time.sleep(0.02)

    def event(self) -> Event:
        event = threading.Event()
        return Event(event, event.is_set, event.wait)

    async def at_once(self, job: Coroutine[Any, Any, T]) -> T:
        return await job  # whether others run is the interpreter's to say


# asyncio


class Asyncio(Runtime):
    name = "asyncio"
    module = "gsocketpool.asyncio"
    killed = asyncio.CancelledError
    timed_out = TimeoutError
    thrown = MappingProxyType({"a cancellation": asyncio.CancelledError})

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """A loop of this kind."""
        return asyncio.new_event_loop()

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        complaints: list[dict[str, Any]] = []
        loop = self.new_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        try:
            result = loop.run_until_complete(self.whole(scenario))
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
                loop.run_until_complete(asyncio.wait({task}, timeout=1))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            self.tasks.clear()  # they refer to the loop
        assert not complaints, f"raised in the background: {complaints}"
        return result

    async def whole(self, scenario: Coroutine[Any, Any, T]) -> T:
        result = await super().whole(scenario)
        await self.until(lambda: len(asyncio.all_tasks()) == 1, lambda: f"{asyncio.all_tasks()} are left")
        return result

    def _spawn(self, job: Job) -> Any:
        return asyncio.ensure_future(job())

    def has_ended(self, task: Task) -> bool:
        if not task.native.done():
            return False
        if task.native.cancelled():  # before it had begun
            task.error = task.error or asyncio.CancelledError()
        return True

    def cancel(self, task: Task) -> None:
        task.native.cancel()

    async def outcome(self, task: Task, timeout: float = BOUND) -> Any:
        await asyncio.wait({task.native}, timeout=timeout)
        return await super().outcome(task, 0)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def event(self) -> Event:
        event = asyncio.Event()
        return Event(event, event.is_set, lambda timeout: asyncio.wait_for(event.wait(), timeout))

    def limit(self, seconds: float) -> Any:
        return AsyncLimit(seconds)

    async def at_once(self, job: Coroutine[Any, Any, T]) -> T:
        return await Stepwise[T](job, lambda: _fail("it has let others run"))

    def knife(self, point: int = 0, when: str = WAKING, error: Callable[[], BaseException] | None = None) -> Knife:
        return TaskKnife(point, when, error or asyncio.CancelledError)


class Uvloop(Asyncio):
    name = "uvloop"

    def new_loop(self) -> asyncio.AbstractEventLoop:
        import uvloop

        return uvloop.new_event_loop()


def _fail(message: str) -> None:
    raise AssertionError(message)


class AsyncLimit:
    """``asyncio.timeout``, which Python 3.10 does not have."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._expired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._alarm = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        if self._expired:
            getattr(self._task, "uncancel", int)()
            if kind is asyncio.CancelledError:
                raise TimeoutError from error


KINDS: Final[dict[str, type[Runtime]]] = {kind.name: kind for kind in (Gevent, Threads, Asyncio, Uvloop, Eventlet)}


def make(name: str) -> Runtime:
    """A runtime by its name. Whatever it needs is imported now."""
    return KINDS[name]()

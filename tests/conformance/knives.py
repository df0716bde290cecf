"""Kill a job at exactly one of the points at which it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final, TypeVar

import greenlet

T = TypeVar("T")

#: When a `Knife` strikes.
ASLEEP: Final = "asleep"
WAKING: Final = "waking"


class Knife:
    """Counts the points at which a job waits, and kills it at one of them: while it is asleep, so that nothing has
    answered it yet, or in the moment in which it is woken, so that the answer and the kill arrive together.

    :ivar points: how many there were.
    :ivar struck: whether it has.
    """

    def __init__(self, point: int, when: str, error: Callable[[], BaseException]) -> None:
        self.point = point
        self.when = when
        self.error = error
        self.points = 0
        self.struck = False

    async def upon(self, job: Coroutine[Any, Any, T]) -> T:
        """Run a job, here, as the victim."""
        raise NotImplementedError


class GreenletKnife(Knife):
    """A point is where the victim hands over to the hub."""

    def __init__(
        self, point: int, when: str, error: Callable[[], BaseException], hub: Any, later: Callable[..., object]
    ) -> None:
        super().__init__(point, when, error)
        self._hub = hub
        self._later = later
        self._victim: greenlet.greenlet | None = None

    async def upon(self, job: Coroutine[Any, Any, T]) -> T:
        if self._victim is not None:
            return await job  # the first is the victim
        self._victim = greenlet.getcurrent()
        before = greenlet.settrace(self._trace)
        try:
            return await job
        finally:
            greenlet.settrace(before)

    def _trace(self, event: str, args: Any) -> None:
        if event not in ("switch", "throw") or self.struck:
            return
        origin, target = args
        if origin is self._victim and target is self._hub:
            self.points += 1
            if self.points == self.point and self.when == ASLEEP:
                self.struck = True
                self._later(self._strike)
        elif target is self._victim and self.points == self.point > 0 and self.when == WAKING:
            self.struck = True
            raise self.error()  # a trace function runs in the target: there this is as if it had been thrown

    def _strike(self) -> None:
        if self._victim:  # else it has ended
            self._victim.throw(self.error())


class Stepwise(Awaitable[T]):
    """Awaits a job, and calls something each time it suspends; what `wakes` raises is raised in it."""

    def __init__(
        self, job: Coroutine[Any, Any, T], sleeps: Callable[[], object], wakes: Callable[[], object] = lambda: None
    ) -> None:
        self._job = job
        self._sleeps = sleeps
        self._wakes = wakes

    def __await__(self) -> Generator[Any, Any, T]:
        error: BaseException | None = None
        while True:
            try:
                waits_for = self._job.send(None) if error is None else self._job.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            self._sleeps()
            error = None
            try:
                yield waits_for
            except BaseException as thrown:
                error = thrown
            try:
                self._wakes()
            except BaseException as thrown:
                error = thrown


class TaskKnife(Knife):
    """A point is where the victim suspends."""

    def __init__(self, point: int, when: str, error: Callable[[], BaseException]) -> None:
        super().__init__(point, when, error)
        self._aimed = False

    async def upon(self, job: Coroutine[Any, Any, T]) -> T:
        if self._aimed:
            return await job  # the first is the victim
        self._aimed = True
        self._task = asyncio.current_task()
        return await Stepwise[T](job, self._sleeps, self._wakes)

    def _sleeps(self) -> None:
        if self.struck:
            return
        self.points += 1
        if self.points == self.point and self.when == ASLEEP and self._task is not None:
            self.struck = True
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def _wakes(self) -> None:
        # As a task does for whoever was cancelled between the result and the step that takes it.
        if self.points == self.point > 0 and self.when == WAKING and not self.struck:
            self.struck = True
            raise self.error()

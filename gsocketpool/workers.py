"""Threads of the package's own, for what a pool of :mod:`gsocketpool.threading` does beside its borrowers.

They are daemons, so they keep no process alive; each is used again, and ends when nothing was to be done for a while.

`Crew.hire` may be called anywhere: inside a lock, and by the collector in the middle of anything, the standard
library's `threading` for one. So it takes no lock that somebody might hold: where no worker rests, it leaves it to the
*usher*, a thread that does nothing else, to start one.
"""

from __future__ import annotations

import itertools
import sys
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

__all__ = ["Crew", "crew"]

R = TypeVar("R")

#: Seconds that a worker with nothing to do waits for more.
REST: Final = 5.0

#: Seconds until the usher tries again to start a thread for what must have one of its own.
RETRY: Final = 0.5

_numbers = itertools.count(1)


class _Errand:
    """A job for one worker. `stays`: it waits for others, so it must have a thread of its own."""

    __slots__ = ("args", "job", "stays")

    def __init__(self, job: Callable[..., object], args: tuple[Any, ...], stays: bool) -> None:
        self.job = job
        self.args = args
        self.stays = stays

    def run(self) -> None:
        # Whoever runs it must not keep what belongs to it.
        job, args = self.job, self.args
        del self.job, self.args
        try:
            job(*args)
        except SystemExit:
            pass  # as in any thread, it ends what runs there


class _Worker(threading.Thread):
    def __init__(self, resting: deque[_Worker], errand: _Errand) -> None:
        super().__init__(name=f"gsocketpool-{next(_numbers)}", daemon=True)
        self._resting = resting
        self._gate = allocate_lock()
        self._gate.acquire()
        self._errand: _Errand | None = errand

    def give(self, errand: _Errand) -> None:
        self._errand = errand
        self._gate.release()

    def run(self) -> None:
        while True:
            errand, self._errand = self._errand, None
            if errand is not None:
                errand.run()
            del errand
            self._resting.append(self)
            if not self._gate.acquire(timeout=REST):
                try:
                    self._resting.remove(self)
                    return
                except ValueError:  # somebody has just taken it from there, and will give it something
                    self._gate.acquire()


class _Call:
    """A call that another thread makes."""

    __slots__ = ("_args", "_function", "done", "error", "result")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self.done = allocate_lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def make(self) -> None:
        function, args = self._function, self._args
        del self._function, self._args
        try:
            self.result = function(*args)
        except BaseException as error:
            self.error = error
        self.done.release()

    def answer(self) -> Any:
        if self.error is None:
            return self.result
        try:
            raise self.error
        finally:
            self.error = None  # it refers to this frame


class Crew:
    """All workers of this process."""

    def __init__(self) -> None:
        self._resting: deque[_Worker] = deque()
        self._errands: SimpleQueue[_Errand] = SimpleQueue()
        self._usher: threading.Thread | None = None

    def begin(self) -> None:
        """Be ready for `hire`. To be called first, and again in the child of a fork; by one thread at a time.

        :raises RuntimeError: no thread can be started.
        """
        if self._usher is None:
            usher = threading.Thread(target=self._usher_in, name="gsocketpool-usher", daemon=True)
            usher.start()
            self._usher = usher

    def lose(self) -> None:
        """All threads but this one are gone, and so is whatever they were to do: this is the child of a fork."""
        self._resting = deque()
        self._errands = SimpleQueue()
        self._usher = None

    def hire(self, job: Callable[..., object], *args: Any, stays: bool = False) -> None:
        """Have a job done, soon, in another thread. Where none can be started, those that there are do it, one job
        after another; at the very end of the process, when there are no others any more, it is done here.

        :param stays: it may wait for other jobs. Then it waits until it can have a thread; at the end it is not done.
        """
        errand = _Errand(job, args, stays)
        if sys.is_finalizing():
            if not stays:
                errand.run()
            return
        try:
            worker = self._resting.pop()
        except IndexError:
            self._errands.put(errand)
        else:
            worker.give(errand)

    def within(self, limit: float, function: Callable[..., R], args: tuple[Any, ...]) -> R:
        """Have another thread call a function, and wait for it. If it takes longer than `limit` seconds, that is a
        TimeoutError, and nobody hears what becomes of the call."""
        if threading.current_thread() is self._usher or sys.is_finalizing():
            return function(*args)  # there is nobody else
        call = _Call(function, args)
        self.hire(call.make)
        if not call.done.acquire(timeout=min(limit, threading.TIMEOUT_MAX)):
            raise TimeoutError(f"not done after {limit:g} s")
        answer: R = call.answer()
        return answer

    def _usher_in(self) -> None:
        errands = self._errands
        postponed: deque[_Errand] = deque()
        while True:
            try:
                errand = errands.get(timeout=RETRY if postponed else None)
            except Empty:
                errand = postponed.popleft()
            if self._put_to_work(errand):
                continue
            if errand.stays:
                postponed.append(errand)
                continue
            try:
                errand.run()
            except BaseException:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            del errand

    def _put_to_work(self, errand: _Errand) -> bool:
        try:
            self._resting.pop().give(errand)
            return True
        except IndexError:
            pass
        try:
            _Worker(self._resting, errand).start()
            return True
        except (RuntimeError, MemoryError):  # as many as there may be; or the process is about to end
            return False


#: The one crew of this process.
crew: Final = Crew()

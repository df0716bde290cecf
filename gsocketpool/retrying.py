"""The decorator that does it again when a connection broke, for every runtime.

`_Policy` and `_Call` decide: after which error, how long a pause, when to give up, what is logged. What a runtime
brings is at the end: how to sleep, and how to end a try when its time is over.
"""

from __future__ import annotations

import functools
import inspect
import logging
import random
import re
import string
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import nullcontext
from importlib import import_module
from time import monotonic
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from gsocketpool.arguments import seconds, two_delays, whole_number
from gsocketpool.exceptions import BreakerOpenError
from gsocketpool.lifetime import full_jitter

__all__ = ["AsyncRetry", "Retry", "for_asyncio", "for_eventlet", "for_threads", "retry"]

P = ParamSpec("P")
R = TypeVar("R")

#: Where neither `interval` nor `backoff` is given. Short enough at first to go unnoticed after a restart; at most two
#: seconds, so that nobody waits much longer than the server does.
USUAL_BACKOFF = (0.05, 2.0)


# -- What is decided --


class _Policy:
    """What a decorator was asked for, looked at once."""

    def __init__(
        self,
        exc_classes: object,
        logger: Any,
        retry_log_level: int,
        retry_log_message: str,
        max_failures: int | None,
        interval: float | None,
        max_failure_log_level: int,
        max_failure_log_message: str,
        backoff: tuple[float, float] | None,
        deadline: float | None,
    ) -> None:
        self.catch = _classes(exc_classes)
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise TypeError(f"logger must be a logger or None, not {logger!r}")
        self.logger = logger
        self.retry_log_level = whole_number("retry_log_level", retry_log_level)
        self.max_failure_log_level = whole_number("max_failure_log_level", max_failure_log_level)
        self.retry_log_message = _message("retry_log_message", retry_log_message, {"f", "e", "failures", "pause"})
        self.max_failure_log_message = _message(
            "max_failure_log_message", max_failure_log_message, {"f", "e", "failures"}
        )
        self.max_failures = None if max_failures is None else whole_number("max_failures", max_failures)
        self.interval = None if interval is None else seconds("interval", interval, zero=True)
        if interval is not None and backoff is not None:
            raise ValueError(f"interval and backoff exclude each other: interval={interval!r}, backoff={backoff!r}")
        self.backoff = USUAL_BACKOFF if backoff is None else two_delays("backoff", backoff)
        self.deadline = None if deadline is None else seconds("deadline", deadline, zero=False)

    def pause_after(self, error: Exception, failures: int) -> float:
        if self.interval is not None:
            return self.interval
        least = error.retry_after if isinstance(error, BreakerOpenError) else 0.0
        return max(least, full_jitter(failures, *self.backoff, random.random))


class _Call:
    """One call of a decorated function: how often it has failed, and what comes next. It neither waits nor raises.

    An error knows, by its traceback, the frame that has called the function. So that frame must not know the error when
    it is left, nor anything that does, a `_Call` included: all that the function had in its hands would stay until the
    collector comes by.

    :ivar left: seconds for the next try, or None.
    :ivar pause: seconds until then.
    """

    def __init__(self, policy: _Policy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._handled = sys.exc_info()[1]
        self._ends = None if policy.deadline is None else monotonic() + policy.deadline
        self._failures = 0
        self._last: Exception | None = None
        self.left = policy.deadline
        self.pause = 0.0

    def may_try(self) -> bool:
        """Whether there is time for a try. The first one always comes."""
        if self._ends is not None and self._failures:
            self.left = self._ends - monotonic()
        return self.left is None or self.left > 0

    def goes_on_after(self, error: Exception) -> bool:
        """Whether there is a `pause` now and then another try. If not, the error is to be raised."""
        policy = self._policy
        if _displaced_another(error, self._handled):
            return False
        self._failures += 1
        self.pause = policy.pause_after(error, self._failures)
        if (policy.max_failures is not None and self._failures > policy.max_failures) or (
            self._ends is not None and monotonic() + self.pause >= self._ends
        ):
            self._log_the_end(error)
            return False
        if policy.logger is not None:
            text = policy.retry_log_message.format(f=self._name, e=error, failures=self._failures, pause=self.pause)
            policy.logger.log(policy.retry_log_level, text)
        if self._ends is not None:
            self._last = error
        return True

    def out_of_time(self, ended_by: BaseException | None = None) -> Exception:
        """What to raise when the deadline has come: in a pause, or in a try that was ended by something."""
        error = self._last
        if error is None:
            error = TimeoutError(f"{self._name}() did not return within its deadline of {self._policy.deadline:g} s")
            error.__cause__ = ended_by
        self._log_the_end(error)
        return error

    def _log_the_end(self, error: Exception) -> None:
        policy = self._policy
        if policy.logger is not None:
            text = policy.max_failure_log_message.format(f=self._name, e=error, failures=self._failures)
            policy.logger.log(policy.max_failure_log_level, text)


def _displaced_another(error: BaseException, handled: BaseException | None) -> bool:
    """Whether a kill, or something else that is no `Exception`, was on its way out and this error took its place.

    :param handled: what was being handled before the function was called, and is no business of its.
    """
    while not error.__suppress_context__:
        before = error.__context__
        if before is None or before is handled:
            return False
        if not isinstance(before, Exception):
            return True
        error = before
    return False


def _classes(value: object) -> tuple[type[Exception], ...]:
    classes = (value,) if isinstance(value, type) or not isinstance(value, Iterable) else tuple(value)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise TypeError(f"exc_classes must be a subclass of Exception or several of them, not {value!r}")
    return cast("tuple[type[Exception], ...]", classes)


def _message(name: str, value: object, known: set[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {value!r}")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(value) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name} must be a format string, not {value!r}: {error}") from None
    for field in fields:
        if re.split(r"[.\[]", field)[0] not in known:
            raise ValueError(f"{name} can name {', '.join(sorted(known))}, and not {field!r}")
    return value


def _name(f: Any, *, awaited: bool) -> str:
    """What messages call the function; a TypeError if trying it again is no use.

    :param awaited: whether the call is awaited.
    """
    kind = "an async def function" if awaited else "a plain function"
    if isinstance(f, (staticmethod, classmethod)):
        raise TypeError(f"f must be a function: put @retry below @{type(f).__name__}")
    if not callable(f):
        raise TypeError(f"f must be {kind}, not {f!r}; retry's parameters are given by name")
    if isinstance(f, type) and issubclass(f, BaseException):
        raise TypeError(f"f must be {kind}, not {f!r}; errors are named by exc_classes=")
    # An object may be called by an `async def __call__`.
    is_async = inspect.iscoroutinefunction(f) or inspect.iscoroutinefunction(type(f).__call__)
    if inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) or (is_async and not awaited):
        hint = "; gsocketpool.asyncio has a retry for it" if is_async else ""
        raise TypeError(f"f must be {kind}, not {f!r}: its errors come when the call is over{hint}")
    if awaited and not is_async:
        raise TypeError(
            f"f must be {kind}, not {f!r}: asyncio's retry awaits it. Plain functions have gsocketpool.threading's "
            "retry, gsocketpool.eventlet's, and for gevent gsocketpool.retry"
        )
    return str(getattr(f, "__name__", None) or repr(f))


# -- What is offered --


class Retry(Protocol):
    """The type of `retry` where functions wait by standing still."""

    @overload
    def __call__(self, f: Callable[P, R], /, *args: Any, **kwargs: Any) -> Callable[P, R]: ...
    @overload
    def __call__(
        self,
        *,
        exc_classes: type[Exception] | Iterable[type[Exception]] = ...,
        logger: logging.Logger | logging.LoggerAdapter[Any] | None = ...,
        retry_log_level: int = ...,
        retry_log_message: str = ...,
        max_failures: int | None = ...,
        interval: float | None = ...,
        max_failure_log_level: int = ...,
        max_failure_log_message: str = ...,
        backoff: tuple[float, float] | None = ...,
        deadline: float | None = ...,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


class AsyncRetry(Protocol):
    """The type of `retry` where functions are awaited."""

    @overload
    def __call__(
        self, f: Callable[P, Coroutine[Any, Any, R]], /, *args: Any, **kwargs: Any
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self,
        *,
        exc_classes: type[Exception] | Iterable[type[Exception]] = ...,
        logger: logging.Logger | logging.LoggerAdapter[Any] | None = ...,
        retry_log_level: int = ...,
        retry_log_message: str = ...,
        max_failures: int | None = ...,
        interval: float | None = ...,
        max_failure_log_level: int = ...,
        max_failure_log_message: str = ...,
        backoff: tuple[float, float] | None = ...,
        deadline: float | None = ...,
    ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]: ...


_TEXT = """A decorator that calls %(function)s again when it raises because a connection broke. ``@retry``, or
``@retry(deadline=5)`` with any of the parameters below; what the latter returns can be kept and used again.

Without parameters it tries until the function returns. **The function may run more than once**, and an error does
not say whether the server has done what it was asked: decorate only what may be done twice.

What is no :exc:`Exception`, %(lethal)s, ends it at once, in a try and between two.
So does an error that took its place, raised in a ``finally`` on its way out; ``raise ... from`` says that you mean
the error%(unless)s.

The parameters up to `max_failure_log_message` are geventconnpool's, in its order. Times are seconds.

:param exc_classes: an exception class or several: after these it tries again. The default is what connections
    raise, and of a pool's own errors :exc:`~gsocketpool.BreakerOpenError` alone: nothing was sent, and it says when
    it is worth asking again, which no pause after it undercuts but a fixed `interval`.
:param logger: gets a record of each failure; None: nothing is logged.
:param retry_log_level: the level of the record when it will try again.
:param retry_log_message: its text. It may name ``{f}``, the function's name; ``{e}``, the error; ``{failures}``,
    how often it has failed; ``{pause}``, the seconds until the next try.
:param max_failures: so many failures are made up for: one more is raised, so there is one call more than this says.
    None: no limit.
:param interval: seconds between a failure and the next try; 0: at once.
:param max_failure_log_level: the level of the record when it gives up.
:param max_failure_log_message: its text; as above, without ``{pause}``.
:param backoff: two numbers of seconds, instead of `interval`. The pause after a failure is drawn at random, from 0
    up to the first number, twice that after the next failure, and so on, up to the second number ("full jitter").
    Where neither is given it is ``(0.05, 2)``.
:param deadline: seconds for the whole call, all tries and pauses. What has not succeeded by then raises the last
    try's error; %(running)s.
    No pause begins that would not end in time.
:raises TypeError: a parameter has the wrong type; the message names it and says what it takes. So for
    %(refused)s.
:raises ValueError: a parameter has a wrong value; likewise.
"""

_ENDED = """a try that still runs is ended, by %s of its own, and the error before it is
    raised, or :exc:`TimeoutError` if it was the first"""


def _offer(decorate: Callable[[_Policy, Any], Any], **words: str) -> Any:
    def retry(
        f: Callable[..., Any] | None = None,
        exc_classes: type[Exception] | Iterable[type[Exception]] = (OSError, BreakerOpenError),
        logger: logging.Logger | logging.LoggerAdapter[Any] | None = None,
        retry_log_level: int = logging.INFO,
        retry_log_message: str = "{f}() failed, {failures} so far: {e!r}; next try in {pause:.2f} s",
        max_failures: int | None = None,
        interval: float | None = None,
        max_failure_log_level: int = logging.ERROR,
        max_failure_log_message: str = "{f}() failed, {failures} in all: {e!r}; giving up",
        *,
        backoff: tuple[float, float] | None = None,
        deadline: float | None = None,
    ) -> Any:
        policy = _Policy(
            exc_classes,
            logger,
            retry_log_level,
            retry_log_message,
            max_failures,
            interval,
            max_failure_log_level,
            max_failure_log_message,
            backoff,
            deadline,
        )

        def decorator(f: Callable[..., Any]) -> Any:
            return decorate(policy, f)

        return decorator if f is None else decorator(f)

    retry.__qualname__ = "retry"
    usual = {
        "function": "a function",
        "unless": "",
        "refused": "a generator and an ``async def``, whose errors come when the call is over",
    }
    retry.__doc__ = _TEXT % {**usual, **words}
    return retry


# -- Runtimes whose functions wait by standing still --

#: How to sleep so many seconds, and a context that ends what runs in it after so many, or never, by raising itself.
_Primitives = tuple[Callable[[float], object], Callable[[float | None], Any]]


def _blocking(primitives: Callable[[], _Primitives], policy: _Policy, f: Callable[..., Any]) -> Callable[..., Any]:
    name = _name(f, awaited=False)
    sleep, timeout = primitives()

    @functools.wraps(f)
    def tried(*args: Any, **kwargs: Any) -> Any:
        call = _Call(policy, name)
        timer = None
        ended_by: BaseException | None = None
        try:
            while call.may_try():
                timer = timeout(call.left)
                try:
                    with timer:
                        return f(*args, **kwargs)
                except policy.catch as error:
                    if not call.goes_on_after(error):
                        raise
                except BaseException as error:
                    if error is not timer:
                        raise
                    ended_by = error
                    break
                sleep(call.pause)
            raise call.out_of_time(ended_by)
        finally:
            del call, timer, ended_by

    return tried


def _gevent() -> _Primitives:
    import gevent

    return gevent.sleep, gevent.Timeout


def _eventlet() -> _Primitives:
    eventlet = import_module("eventlet")
    return eventlet.sleep, eventlet.Timeout


def _threads() -> _Primitives:
    return time.sleep, nullcontext


retry: Retry = _offer(
    functools.partial(_blocking, _gevent),
    lethal="a kill or a ``gevent.Timeout``",
    running=_ENDED % "a ``gevent.Timeout``",
)

for_eventlet: Retry = _offer(
    functools.partial(_blocking, _eventlet),
    lethal="a kill or an ``eventlet.Timeout``",
    running=_ENDED % "an ``eventlet.Timeout``",
)

for_threads: Retry = _offer(
    functools.partial(_blocking, _threads),
    lethal="say a :exc:`KeyboardInterrupt`",
    running="""no further try begins. One that still runs goes on, since nothing can end it from outside, and what it
    returns late is returned: give a timeout to whatever may wait in it""",
)


# -- asyncio --


def _awaited(policy: _Policy, f: Callable[..., Any]) -> Callable[..., Any]:
    import asyncio

    name = _name(f, awaited=True)

    @functools.wraps(f)
    async def tried(*args: Any, **kwargs: Any) -> Any:
        call = _Call(policy, name)
        ended_by: BaseException | None = None
        try:
            while call.may_try():
                one = _AsyncTry(call.left)
                try:
                    return await one.run(f, args, kwargs)
                except policy.catch as error:
                    if one.cancelled or not call.goes_on_after(error):
                        raise
                except asyncio.CancelledError as error:
                    if not one.timed_out:
                        raise
                    ended_by = error
                    break
                await asyncio.sleep(call.pause)
            raise call.out_of_time(ended_by)
        finally:
            del call, ended_by

    return tried


class _AsyncTry:
    """Awaits a function, and cancels it when its time is over.

    :ivar timed_out: whether it has, and nobody else.
    :ivar cancelled: whether somebody else has cancelled the task meanwhile, and has not taken it back.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._expired = self.timed_out = self.cancelled = False

    if sys.version_info >= (3, 11):

        async def run(self, f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            import asyncio

            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("what retry decorates has to be awaited in an asyncio task")
            before = task.cancelling()
            alarm = None
            if self._seconds is not None:
                alarm = asyncio.get_running_loop().call_later(self._seconds, self._expire, task)
            try:
                return await f(*args, **kwargs)
            finally:
                if alarm is not None:
                    alarm.cancel()
                if self._expired:
                    task.uncancel()
                # A task counts who wants it to end, so nobody who came in the same moment is overlooked.
                cancelled = task.cancelling() > before
                self.timed_out = self._expired and not cancelled
                # Before Python 3.13 a TaskGroup that failed may leave its own cancellation counted.
                self.cancelled = cancelled and sys.version_info >= (3, 13)
                # The task will know the error, the error knows this frame, and the alarm that rang knows the task.
                task = alarm = None

        def _expire(self, task: Any) -> None:
            self._expired = True
            task.cancel()

    else:

        async def run(self, f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            """Here a task does not count who wants it to end: of two who cancel it in the same moment one is lost. So
            a try that has a deadline is a task of its own, which notes who cancels it."""
            import asyncio

            if self._seconds is None:
                return await f(*args, **kwargs)
            task = _task_of_its_own()(f(*args, **kwargs))
            alarm = asyncio.get_running_loop().call_later(self._seconds, task.expire)
            try:
                return await task
            except asyncio.CancelledError as error:
                if not task.cancelled() and task.exception() is None:
                    # The cancellation has come after the result. Neither is lost: the result is returned, and whatever
                    # is awaited next is cancelled.
                    waiting = asyncio.current_task()
                    assert waiting is not None
                    waiting.cancel(*error.args)
                    return task.result()
                raise
            finally:
                alarm.cancel()
                self.cancelled = task.cancelled_by_others
                self.timed_out = task.expired and not self.cancelled
                del task, alarm  # the task knows the error, and the error knows this frame


@functools.cache
def _task_of_its_own() -> Any:
    import asyncio

    class Task(asyncio.Task[Any]):
        expired = False
        cancelled_by_others = False

        def cancel(self, msg: Any = None) -> bool:
            """Whoever cancels the task that awaits this one calls this, too."""
            self.cancelled_by_others = True
            return super().cancel(msg)

        def expire(self) -> None:
            self.expired = True
            super().cancel()

    return Task


for_asyncio: AsyncRetry = _offer(
    _awaited,
    function="an ``async def`` function",
    lethal="a cancellation",
    unless=""", as ``asyncio.timeout`` does. But while the task is being cancelled (``Task.cancelling()``, from Python
3.13 on) it is the end whatever you say""",
    running=_ENDED % "a cancellation",
    refused="a function that is no ``async def``",
)

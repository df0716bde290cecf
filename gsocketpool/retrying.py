"""The decorator that does it again when a connection broke."""

from __future__ import annotations

import functools
import inspect
import logging
import random
import re
import string
import sys
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, ParamSpec, TypeVar, cast, overload

import gevent

from gsocketpool.arguments import seconds, two_delays, whole_number
from gsocketpool.exceptions import BreakerOpenError
from gsocketpool.lifetime import full_jitter

__all__ = ["retry"]

P = ParamSpec("P")
R = TypeVar("R")

#: Where neither `interval` nor `backoff` is given. Short enough at first to go unnoticed after a restart; at most two
#: seconds, so that nobody waits much longer than the server does.
USUAL_BACKOFF = (0.05, 2.0)


@overload
def retry(f: Callable[P, R], /, *args: Any, **kwargs: Any) -> Callable[P, R]: ...
@overload
def retry(
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
    """A decorator that calls a function again when it raises because a connection broke. ``@retry``, or
    ``@retry(deadline=5)`` with any of the parameters below; what the latter returns can be kept and used again.

    Without parameters it tries until the function returns. **The function may run more than once**, and an error does
    not say whether the server has done what it was asked: decorate only what may be done twice.

    What is no :exc:`Exception`, a kill or a ``gevent.Timeout``, ends it at once, in a try and between two. So does an
    error that took its place, raised in a ``finally`` on its way out; ``raise ... from`` says that you mean the error.

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
        try's error; a try that still runs is ended, by a ``gevent.Timeout`` of its own, and the error before it is
        raised, or :exc:`TimeoutError` if it was the first. No pause begins that would not end in time.
    :raises TypeError: a parameter has the wrong type; the message names it and says what it takes. So for a generator
        and an ``async def``, whose errors come when the call is over.
    :raises ValueError: a parameter has a wrong value; likewise.
    """
    catch = _classes(exc_classes)
    if logger is not None and not callable(getattr(logger, "log", None)):
        raise TypeError(f"logger must be a logger or None, not {logger!r}")
    whole_number("retry_log_level", retry_log_level)
    whole_number("max_failure_log_level", max_failure_log_level)
    _message("retry_log_message", retry_log_message, {"f", "e", "failures", "pause"})
    _message("max_failure_log_message", max_failure_log_message, {"f", "e", "failures"})
    if max_failures is not None:
        whole_number("max_failures", max_failures)
    if interval is not None:
        seconds("interval", interval, zero=True)
        if backoff is not None:
            raise ValueError(f"interval and backoff exclude each other: interval={interval!r}, backoff={backoff!r}")
    first, longest = USUAL_BACKOFF if backoff is None else two_delays("backoff", backoff)
    if deadline is not None:
        seconds("deadline", deadline, zero=False)

    def pause_after(error: Exception, failures: int) -> float:
        if interval is not None:
            return interval
        least = error.retry_after if isinstance(error, BreakerOpenError) else 0.0
        return max(least, full_jitter(failures, first, longest, random.random))

    def decorate(f: Callable[P, R]) -> Callable[P, R]:
        name = _name(f)

        def give_up(error: Exception, failures: int) -> None:
            if logger is not None:
                logger.log(max_failure_log_level, max_failure_log_message.format(f=name, e=error, failures=failures))

        @functools.wraps(f)
        def tried(*args: P.args, **kwargs: P.kwargs) -> R:
            handled = sys.exc_info()[1]
            ends = None if deadline is None else monotonic() + deadline
            left = deadline
            failures = 0
            last: Exception | None = None
            timer: gevent.Timeout | None = None
            try:
                while left is None or left > 0:
                    timer = gevent.Timeout(left)
                    try:
                        with timer:
                            return f(*args, **kwargs)
                    except gevent.Timeout as timeout:
                        if timeout is not timer:
                            raise
                        if last is None:
                            last = TimeoutError(f"{name}() did not return within its deadline of {deadline:g} s")
                            last.__cause__ = timeout
                        break
                    except catch as error:
                        if _displaced_another(error, handled):
                            raise
                        failures += 1
                        pause = pause_after(error, failures)
                        if (max_failures is not None and failures > max_failures) or (
                            ends is not None and monotonic() + pause >= ends
                        ):
                            give_up(error, failures)
                            raise
                        if logger is not None:
                            text = retry_log_message.format(f=name, e=error, failures=failures, pause=pause)
                            logger.log(retry_log_level, text)
                        if ends is not None:
                            last = error
                    gevent.sleep(pause)
                    if ends is not None:
                        left = ends - monotonic()
                assert last is not None
                give_up(last, failures)
                raise last
            finally:
                # An error knows this frame by its traceback. If the frame knew the error too, all that the function had
                # in its hands would stay until the collector comes by.
                last = timer = handled = None

        return tried

    return decorate if f is None else decorate(f)


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


def _message(name: str, value: object, known: set[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {value!r}")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(value) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name} must be a format string, not {value!r}: {error}") from None
    for field in fields:
        if re.split(r"[.\[]", field)[0] not in known:
            raise ValueError(f"{name} can name {', '.join(sorted(known))}, and not {field!r}")


def _name(f: Any) -> str:
    """What messages call the function; a TypeError if trying it again is no use."""
    if isinstance(f, (staticmethod, classmethod)):
        raise TypeError(f"f must be a function: put @retry below @{type(f).__name__}")
    if not callable(f):
        raise TypeError(f"f must be a function, not {f!r}; retry's parameters are given by name")
    if isinstance(f, type) and issubclass(f, BaseException):
        raise TypeError(f"f must be a function, not {f!r}; errors are named by exc_classes=")
    if inspect.iscoroutinefunction(f) or inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f):
        raise TypeError(f"f must be a plain function, not {f!r}: its errors come when the call is over")
    return str(getattr(f, "__name__", None) or repr(f))

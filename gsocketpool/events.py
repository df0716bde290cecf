"""What a pool tells of itself, to whoever wants to hear it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import iscoroutinefunction, signature
from typing import TYPE_CHECKING, Any, Final

from gsocketpool.log import say
from gsocketpool.operations import refuse_coroutine, shown

if TYPE_CHECKING:
    from gsocketpool.driver import Driver
    from gsocketpool.exceptions import PoolExhaustedError
    from gsocketpool.stats import Holder

__all__ = ["Audience", "Listener", "audience_of"]


class Listener:
    """Hears what happens in a pool. Subclass it, override what you want to hear, and give it to the pool:
    ``Pool(..., listeners=[MyListener()])``. What nobody overrides costs nothing.

    Each method is a plain function, called where the thing happens, so be quick: a borrower waits for `borrowed` and
    `returned`, and a dial is not done before `opened` is. Of one connection they come in this order: `opened`, then
    `borrowed` and `returned` in turn, then `closed`. An :exc:`Exception` that one raises is logged and ignored. A
    listener that keeps a pool keeps it from being collected: let it refer to the pool weakly.

    The events are those of MongoDB's specification for connection pools, but for `leaked`.
    """

    def attached(self, pool: Any) -> None:
        """A pool with this listener is being made. Nothing of it is open."""

    def detached(self, pool: Any) -> None:
        """The pool was closed, by hand or because nobody referred to it. `returned` and `closed` may still come, of
        what is lent or being closed."""

    def opened(self, pool: Any, connection: Any, seconds: float) -> None:
        """A dial has succeeded.

        :param seconds: how long it took.
        """

    def open_failed(self, pool: Any, error: BaseException, seconds: float) -> None:
        """A dial has failed.

        :param seconds: how long it took.
        """

    def borrowed(self, pool: Any, connection: Any, waited: float) -> None:
        """Somebody has borrowed a connection.

        :param waited: seconds from the call of `acquire()`, or from entering the block, on.
        """

    def returned(self, pool: Any, connection: Any, held: float) -> None:
        """It is no longer lent: it was given back, and is not reset yet, or it was discarded, dropped, reclaimed.

        :param held: seconds since it was borrowed.
        """

    def closed(self, pool: Any, connection: Any, reason: str) -> None:
        """A connection has been closed.

        :param reason: one of those that :attr:`PoolStats.closed` counts.
        """

    def exhausted(self, pool: Any, error: PoolExhaustedError) -> None:
        """That error is about to be raised in whoever asked for a connection."""

    def leaked(self, pool: Any, holder: Holder[Any]) -> None:
        """Somebody has held a connection for longer than `leak_threshold`. Told once for each loan."""


#: What can be heard.
EVENTS: Final = tuple(name for name in vars(Listener) if not name.startswith("_"))


class Audience:
    """The listeners of one pool."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._methods: dict[str, list[Callable[..., object]]] = {
            event: [
                method
                for listener in listeners
                if getattr(method := getattr(listener, event), "__func__", None) is not getattr(Listener, event)
            ]
            for event in EVENTS
        }
        self._failed: set[tuple[str, int]] = set()  # the event, and whose method
        #: What somebody listens to.
        self.heard = frozenset(event for event, methods in self._methods.items() if methods)
        #: Whether that is, among other things, who borrows or gives back.
        self.hears_loans = not self.heard.isdisjoint(("borrowed", "returned"))

    def hear(self, pool: Driver[Any], event: str, *args: object) -> None:
        """Tell everybody who listens to it."""
        interrupted: BaseException | None = None
        for number, method in enumerate(self._methods[event]):
            try:
                answer = method(pool, *args)
                if answer is not None:
                    refuse_coroutine(answer, f"{event}() of a listener", "nobody awaits it")
            except Exception as error:
                # Once as a warning: a pool has as many events as an error of a listener would fill a disk with.
                level = logging.DEBUG if (event, number) in self._failed else logging.WARNING
                self._failed.add((event, number))
                say(level, "%s: %s() of a listener failed: %s", pool._label, event, shown(error), error=error)
            except BaseException as error:
                interrupted = interrupted or error  # the others have to hear of it all the same
        if interrupted is not None:
            try:
                raise interrupted
            finally:
                del interrupted  # it refers to this frame


#: Nobody listens.
NOBODY: Final = Audience(())


def audience_of(listeners: Sequence[Listener]) -> Audience:
    """Whoever listens.

    :raises TypeError: one of them is no `Listener`, or has a method that cannot be called, or would have to be awaited.
    """
    if isinstance(listeners, (str, bytes)) or not isinstance(listeners, Sequence):
        raise TypeError(f"listeners must be a list of Listener, not {listeners!r}")
    for listener in listeners:
        if not isinstance(listener, Listener):
            raise TypeError(f"listeners must be a list of objects of a subclass of Listener, and one is {listener!r}")
        for event in EVENTS:
            method = getattr(listener, event)
            if iscoroutinefunction(method):
                raise TypeError(f"{type(listener).__name__}.{event}() must be a plain function: nobody would await it")
            takes = [*signature(getattr(Listener, event)).parameters][1:]
            try:
                signature(method).bind(*takes)
            except TypeError:
                raise TypeError(f"{type(listener).__name__}.{event}() must take ({', '.join(takes)})") from None
            except ValueError:
                pass  # it is written in C, and does not say what it takes
    return Audience(listeners) if listeners else NOBODY

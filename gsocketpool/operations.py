"""The operations through which a pool reaches its connections, and the two ways to supply them: the methods of a
`Connection`, or the functions that `wrap` was given."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Final, Generic, Protocol, TypeVar

from gsocketpool.connection import AnyStream, Connection, Wrap

__all__ = [
    "Functions",
    "Methods",
    "Operations",
    "address_in",
    "describe",
    "descriptor_of",
    "operations_of",
    "passes",
    "plainly",
    "refuse_coroutine",
    "shown",
]

#: As much of a repr is shown.
LONGEST_REPR: Final = 300

C = TypeVar("C")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)


class Operations(Protocol[T_contra]):
    """What a pool does with a connection. Each may raise whatever user code raises, and answers what that answered."""

    def vet(self, connection: T_contra) -> None:
        """Refuse, with a TypeError, what a factory should not have returned."""

    def open(self, connection: T_contra) -> object:
        """Open what the factory returned."""

    def close(self, connection: T_contra) -> object:
        """Close it, if it is open."""

    def is_expired(self, connection: T_contra) -> bool:
        """Whether the reaper should take it."""

    def check(self, connection: T_contra) -> object:
        """Whether it can be lent after it idled."""

    def checks(self, connection: T_contra) -> bool:
        """Whether `check` looks at anything."""

    def reset(self, connection: T_contra) -> object:
        """Make it as new, before anyone else can have it."""

    def resets(self, connection: T_contra) -> bool:
        """Whether `reset` does anything."""

    def keepalive(self, connection: T_contra) -> object:
        """Whether the peer still answers."""

    def fileno(self, connection: T_contra) -> int | None:
        """The descriptor of its socket, where that is known."""


class Methods:
    """The methods of a `Connection`."""

    def __init__(self, call: Callable[..., Any], awaits: bool) -> None:
        self._call = call
        self._awaits = awaits
        self._known: type | None = None

    def vet(self, connection: Connection) -> None:
        if type(connection) is not self._known and not self._awaits:
            refuse_async(type(connection).__name__, type(connection))
        self._known = type(connection)
        if not isinstance(connection, Connection):
            raise TypeError(
                f"the factory returned {describe(connection)}, which is no gsocketpool.Connection: inherit that, or, "
                "if the factory returns it open already, use Pool(wrap(factory))"
            )

    def open(self, connection: Any) -> object:
        return connection.open()

    def close(self, connection: Any) -> object:
        try:
            connected = connection.is_connected()
        except BaseException:
            self._call(connection.close)  # it may well be open
            raise
        return connection.close() if connected else None

    def is_expired(self, connection: Connection) -> bool:
        return connection.is_expired()

    def check(self, connection: Connection) -> object:
        return connection.check()

    def checks(self, connection: Connection) -> bool:
        return type(connection).check is not Connection.check

    def reset(self, connection: Any) -> object:
        return connection.reset()

    def resets(self, connection: Connection) -> bool:
        # Asked of the class: an instance's __getattr__ may be a remote call.
        return type(connection).reset is not Connection.reset

    def keepalive(self, connection: Connection) -> object:
        return connection.keepalive()

    def fileno(self, connection: Connection) -> int | None:
        return connection.fileno()


class Functions(Generic[C]):
    """The functions that `wrap` was given."""

    def __init__(self, wrapped: Wrap[C]) -> None:
        self._wrapped = wrapped

    def vet(self, connection: C) -> None:
        if connection is None:
            raise TypeError("the open function of wrap() returned None instead of a connection")
        if isinstance(connection, Connection) and not connection.is_connected():
            raise TypeError(f"{describe(connection)} is a Connection, and not open: pool it without wrap()")

    def open(self, connection: C) -> None:
        """Nothing to do: the factory's own call opened it."""

    def close(self, connection: C) -> object:
        return self._wrapped.close(connection)

    def is_expired(self, connection: C) -> bool:
        return False

    def check(self, connection: C) -> object:
        return self._wrapped.check is None or self._wrapped.check(connection)

    def checks(self, connection: C) -> bool:
        return self._wrapped.check is not None

    def reset(self, connection: C) -> object:
        return None if self._wrapped.reset is None else self._wrapped.reset(connection)

    def resets(self, connection: C) -> bool:
        return self._wrapped.reset is not None

    def keepalive(self, connection: C) -> object:
        if self._wrapped.keepalive is None:
            return self.check(connection)
        return self._wrapped.keepalive(connection)

    def fileno(self, connection: C) -> int | None:
        if self._wrapped.fileno is not None:
            return self._wrapped.fileno(connection)
        own = getattr(type(connection), "fileno", None)  # of the class, as for `reset`
        return None if own is None else own(connection)


def descriptor_of(operations: Operations[Any], connection: object) -> int | None:
    """What `fileno` says, if that is an open descriptor: event loops and the kernel take any number at its word.

    :raises OSError: it is none.
    :raises TypeError: it is no number.
    """
    descriptor = operations.fileno(connection)
    if descriptor is None or descriptor < 0:
        return None
    os.fstat(descriptor)
    return descriptor


def describe(connection: object) -> str:
    """Name it without its repr, which is user code and may rely on the peer."""
    if connection is None:
        return "None"
    return f"<{type(connection).__name__} at {id(connection):#x}>"


def address_in(options: Mapping[str, Any]) -> str | None:
    """The host and port, or the path, that is among the options. No others: there may be a password in them."""
    where = options.get("host", options.get("path"))
    if not isinstance(where, (str, bytes, os.PathLike)):
        return None
    where = os.fsdecode(where).encode(errors="backslashreplace").decode().replace("\0", "@")
    if "host" in options and "port" in options:
        return f"[{where}]:{options['port']}" if ":" in where else f"{where}:{options['port']}"
    return where


def shown(value: object) -> str:
    """Its repr, or what can be said instead: that is user code, may fail, and may be as long as it likes."""
    try:
        text = repr(value)
    except Exception:
        return describe(value)
    return text if len(text) <= LONGEST_REPR else f"{text[:LONGEST_REPR]}..."


def refuse_coroutine(answer: object, whose: str, why: str = "only a pool of gsocketpool.asyncio can await it") -> None:
    """What was to be awaited has not been: it must not pass for done."""
    if isinstance(answer, Coroutine):
        answer.close()
        raise TypeError(f"{whose} answered a coroutine: {why}")


def passes(answer: object) -> bool:
    """Whether a check or a keepalive that has answered this has passed. What raises if something is wrong, such as a
    ``ping()``, often answers None."""
    return answer is None or bool(answer)


def refuse_async(name: str, treatment: object) -> None:
    """Nobody would await what these answer, and it would pass for done, or for true."""
    if isinstance(treatment, type) and issubclass(treatment, AnyStream):
        return  # the pool says which to use
    for method in ("open", "close", "check", "reset", "keepalive"):
        if iscoroutinefunction(getattr(treatment, method, None)):
            raise TypeError(f"{name}.{method}() is async: only a pool of gsocketpool.asyncio can await it")


class Called:
    """Operations, each of which is called by a function of the runtime's."""

    def __init__(self, operations: Operations[Any], call: Callable[..., Any]) -> None:
        self.checks, self.resets = operations.checks, operations.resets  # call nothing
        for name in ("vet", "open", "close", "is_expired", "check", "reset", "keepalive", "fileno"):
            setattr(self, name, partial(call, getattr(operations, name)))


def plainly(function: Callable[..., R], *args: Any, **options: Any) -> R:
    """Call it."""
    return function(*args, **options)


def operations_of(factory: object, call: Callable[..., Any] = plainly, awaits: bool = False) -> Operations[Any]:
    """The operations for what this factory makes.

    :param call: calls what the user has written.
    :param awaits: it awaits what that answers, where it can be awaited.
    :raises TypeError: it does not, and it is seen already that it should.
    """
    if not awaits:
        if isinstance(factory, Wrap):
            refuse_async("wrap", factory)
        elif isinstance(factory, type) and issubclass(factory, Connection):
            refuse_async(factory.__name__, factory)
    operations: Any = Functions(factory) if isinstance(factory, Wrap) else Methods(call, awaits)
    return operations if call is plainly else Called(operations, call)  # type: ignore[return-value]

"""wrap: objects that are no Connection."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gsocketpool.connection import Wrap, wrap


class Thing:
    """Something to pool that knows nothing of the package."""

    def __init__(self, colour: str = "grey") -> None:
        self.colour = colour
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_a_wrap_is_a_factory_of_what_open_returns() -> None:
    wrapped = wrap(Thing)
    thing: Thing = wrapped()
    assert thing.colour == "grey"
    assert wrapped(colour="red").colour == "red"
    assert isinstance(wrapped, Wrap)


def test_by_default_an_object_is_closed_by_its_own_close_and_nothing_else_is_done() -> None:
    wrapped = wrap(Thing)
    thing = wrapped()
    wrapped.close(thing)
    assert thing.closed
    assert (wrapped.open, wrapped.check, wrapped.reset, wrapped.keepalive) == (Thing, None, None, None)


def test_each_operation_can_be_given() -> None:
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda thing: calls.append(name)

    wrapped = wrap(Thing, note("close"), note("check"), note("reset"), note("keepalive"))
    thing = wrapped()
    assert wrapped.check is not None
    assert wrapped.reset is not None
    assert wrapped.keepalive is not None
    for operation in (wrapped.close, wrapped.check, wrapped.reset, wrapped.keepalive):
        operation(thing)
    assert calls == ["close", "check", "reset", "keepalive"]
    assert not thing.closed


@pytest.mark.parametrize("name", ["open", "close", "check", "reset", "keepalive"])
def test_what_cannot_be_called_is_refused_by_its_name(name: str) -> None:
    operations: dict[str, Any] = {"open": Thing, name: "no function"}
    with pytest.raises(TypeError, match=rf"{name} must be callable.*not 'no function'"):
        wrap(**operations)


@pytest.mark.parametrize("name", ["open", "close"])
def test_opening_and_closing_cannot_be_left_out(name: str) -> None:
    operations: dict[str, Any] = {"open": Thing, name: None}
    with pytest.raises(TypeError, match=f"{name} must be callable, not None"):
        wrap(**operations)


def test_a_wrap_cannot_be_changed_and_equals_itself_alone() -> None:
    wrapped = wrap(Thing)
    with pytest.raises(dataclasses.FrozenInstanceError):
        wrapped.close = print  # type: ignore[misc]
    assert wrapped != wrap(Thing)
    assert len({wrapped, wrapped, wrap(Thing)}) == 2

"""Scenarios are made for each runtime that can do what they need, and run by it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from .harness import Runtime, make, runtimes_for
from .server import EchoServer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rt" in metafunc.fixturenames:
        metafunc.parametrize("rt", runtimes_for(metafunc.function), indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in wanted}
    runtime: Runtime = arguments["rt"]
    runtime.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def rt(
    request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[Runtime]:
    """The runtime. G12: nothing is printed."""
    yield make(request.param)
    caplog.get_records("call").clear()  # their tracebacks keep pools, and those what asyncio's loops have at hand
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.fixture
def server() -> Iterator[EchoServer]:
    """Answers each line with the same line. When the scenario has ended nobody is connected to it any more."""
    with EchoServer() as server:
        yield server
        server.wait_until(lambda: server.serving == 0)

"""Parts of different runtimes, put together by mistake: refused, by name, before anything is opened."""

from __future__ import annotations

import asyncio
import socket
from itertools import permutations
from typing import Any

import pytest

import gsocketpool
import gsocketpool.asyncio
import gsocketpool.threading

BLOCKING = [gsocketpool, gsocketpool.threading]
ALL = [*BLOCKING, gsocketpool.asyncio]


async def borrow(module: Any, factory: Any, options: dict[str, Any]) -> None:
    if module is gsocketpool.asyncio:
        async with module.Pool(factory, options) as pool:
            await pool.acquire(timeout=5)
    else:
        with module.Pool(factory, options) as pool:
            pool.acquire(timeout=5)


def run(module: Any, factory: Any, **options: Any) -> None:
    job = borrow(module, factory, options)
    if module is gsocketpool.asyncio:
        asyncio.run(job)
    else:
        with pytest.raises(StopIteration):  # it never suspends
            job.send(None)


@pytest.mark.parametrize(
    ("module", "kind"),
    [pytest.param(module, kind, id=f"{kind.__name__} in {module.__name__}") for module, kind in permutations(ALL, 2)],
)
def test_a_connection_of_another_runtime_is_refused_and_says_where_to_find_the_right_one(
    module: Any, kind: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(TypeError, match=f"of {kind.__name__}, which .* import both from {module.__name__}$"):
            run(module, kind.TcpConnection, host="127.0.0.1", port=listener.getsockname()[1])
        with pytest.raises(BlockingIOError):  # nobody has connected
            listener.accept()


@pytest.mark.parametrize("module", BLOCKING, ids=lambda module: module.__name__)
def test_an_async_open_is_refused_where_nobody_would_await_it(module: Any) -> None:
    class Later(gsocketpool.Connection):
        async def open(self) -> None:
            raise AssertionError("nobody awaits this")

        def close(self) -> None:
            raise AssertionError("nothing was opened")

        def is_connected(self) -> bool:
            return False

    with pytest.raises(TypeError, match=r"^the open\(\) is async, which only pools of gsocketpool.asyncio can await$"):
        run(module, Later)


@pytest.mark.parametrize("module", BLOCKING, ids=lambda module: module.__name__)
def test_so_is_an_async_function_that_is_wrapped(module: Any) -> None:
    async def connect() -> object:
        raise AssertionError("nobody awaits this")

    with pytest.raises(TypeError, match="^the factory is async, which only pools of gsocketpool.asyncio can await$"):
        run(module, gsocketpool.wrap(connect, close=lambda connection: None))

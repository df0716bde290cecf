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


class Plain(gsocketpool.Connection):
    """Nothing of it is called."""

    def open(self) -> object:
        raise AssertionError("it was to be refused")

    close = open

    def is_connected(self) -> bool:
        return False


async def later(*_: object) -> bool:
    raise AssertionError("nobody awaits this")


@pytest.mark.parametrize("method", ["open", "close", "check", "reset", "keepalive"])
@pytest.mark.parametrize("module", BLOCKING, ids=lambda module: module.__name__)
def test_an_async_method_is_refused_where_nobody_would_await_it(module: Any, method: str) -> None:
    kind = type("Later", (Plain,), {method: later})
    refusal = rf"^Later\.{method}\(\) is async: only a pool of gsocketpool.asyncio can await it$"
    with pytest.raises(TypeError, match=refusal):
        module.Pool(kind)
    with pytest.raises(TypeError, match=refusal):
        run(module, lambda: kind())
    with pytest.raises(TypeError, match=refusal.replace("Later", "wrap")):
        functions: dict[str, Any] = {"open": object, "close": id, method: later}
        module.Pool(gsocketpool.wrap(**functions))


@pytest.mark.parametrize("module", BLOCKING, ids=lambda module: module.__name__)
def test_so_is_a_coroutine_in_disguise(module: Any) -> None:
    class Later(Plain):
        def open(self) -> object:
            return later()

        def close(self) -> None:
            pass

    with pytest.raises(TypeError, match="^open.. of <Later at .*> answered a coroutine: only a pool of gsocketpool.as"):
        run(module, Later)
    with pytest.raises(TypeError, match="^the factory of .* answered a coroutine: only a pool of gsocketpool.asyncio"):
        run(module, gsocketpool.wrap(lambda: later(), close=id))


def test_with_instead_of_async_with_says_so() -> None:
    async def main() -> None:
        async with gsocketpool.asyncio.Pool(Plain) as pool, gsocketpool.asyncio.PoolGroup(Plain) as group:
            for context in (pool, pool.connection(), group, group.connection()):
                name = type(context).__name__
                with pytest.raises(TypeError, match=f"a {name} of gsocketpool.asyncio is entered by `async with`, not"):
                    context.__enter__()

    asyncio.run(main())

"""What a runtime cannot promise, as data: scenarios that ask for it are not made for it, and the docs have the table.

``python -m tests.conformance.limits`` prints that, as reStructuredText.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """Something that a runtime cannot promise. `need` is how scenarios ask for it, None where none does."""

    runtime: str
    what: str
    why: str
    need: str | None = None


CANCEL: Final = "cancel"
KILL_AT_ONCE: Final = "kill at once"
WAITING_CONSTRUCTOR: Final = "waiting constructor"

LIMITS: Final = [
    Limit(
        "threading",
        "A borrower can be killed, or its time be over, while it waits or uses a connection",
        "Nothing can interrupt a thread from outside. Give `timeout=` to whatever may wait. A `KeyboardInterrupt`, "
        "which the main thread alone gets, counts as a kill where that waits or uses a connection. If it strikes in "
        "the microseconds in which the pool decides, it may cost a slot: a handler that sets a flag never does.",
        CANCEL,
    ),
    Limit(
        "threading",
        "A `close()` or a `keepalive()` that hangs is ended after `close_grace` or `keepalive_grace`",
        "For the same reason. Its slot or its connection is given up in time; the thread in there ends when it does.",
        KILL_AT_ONCE,
    ),
    Limit(
        "threading",
        "`connect_timeout` holds while a name is looked up",
        "The system's resolver cannot be interrupted. `acquire(timeout=)` returns in time all the same.",
    ),
    Limit(
        "threading",
        "Two may use one connection at once, one to send and one to receive, under TLS too",
        "OpenSSL lets one thread at a time use a connection. Without TLS they may, and `close()` is always safe.",
    ),
    Limit(
        "threading",
        "What `idle`, `size` or `stats()` said is still so at the next line",
        "Threads run side by side. In the others nothing changes as long as nothing is waited for.",
    ),
    Limit(
        "asyncio",
        "`initial_connections`",
        "A constructor cannot be awaited. Use `min_idle`, and `await pool.wait_ready()`.",
        WAITING_CONSTRUCTOR,
    ),
    Limit(
        "asyncio",
        "What is open is closed when nobody refers to the pool any more, or the program ends",
        "Only as long as its loop runs: nothing can be awaited afterwards. Close the pool before the loop ends, or use "
        "`async with`.",
    ),
    Limit(
        "asyncio",
        "The child of a fork goes on with the parent's pool",
        "A loop cannot be used on both sides. Make a new loop and a new pool in the child; what the parent has open "
        "stays silent.",
    ),
    Limit(
        "gevent",
        "One pool serves all threads",
        "It serves the greenlets of the thread in which it was made. Calls from another raise `PoolError` where they "
        "would have to wait. So it is in eventlet; in asyncio a pool serves one loop.",
    ),
    Limit(
        "gevent",
        "`reclaim` takes back what any greenlet leaves behind",
        "A raw `greenlet.greenlet` tells nobody of its end; a `gevent.Greenlet` does.",
    ),
    Limit(
        "eventlet",
        "The child of a fork goes on with the parent's pool, with eventlet's hub over asyncio",
        "That hub does not outlive a fork. eventlet's others do.",
    ),
    Limit(
        "eventlet",
        "`reclaim` takes back what any green thread leaves behind",
        "`eventlet.spawn_n` makes greenlets whose end nobody is told of; `eventlet.spawn` and a `GreenPool` do not.",
    ),
]

#: The runtimes, in the order of the docs.
RUNTIMES: Final = ["gevent", "threading", "asyncio", "uvloop", "eventlet"]


def cannot(name: str) -> set[str | None]:
    """What a runtime cannot promise."""
    family = "asyncio" if name == "uvloop" else name
    return {limit.need for limit in LIMITS if limit.runtime == family}


def needs(*what: str) -> Callable[[T], T]:
    """Make a scenario only for runtimes that can do this."""
    assert {*what} <= {limit.need for limit in LIMITS}, "a need that every runtime meets"

    def mark(scenario: T) -> T:
        scenario.needs = {*what}  # type: ignore[attr-defined]
        return scenario

    return mark


def only(*names: str) -> Callable[[T], T]:
    """Make a scenario only for these runtimes: it is about what no other has."""

    def mark(scenario: T) -> T:
        scenario.only = names  # type: ignore[attr-defined]
        return scenario

    return mark


def runtimes_for(scenario: object) -> list[str]:
    """Those that a scenario is made for."""
    wanted = getattr(scenario, "only", RUNTIMES)
    needed = set(getattr(scenario, "needs", ()))
    return [name for name in RUNTIMES if name in wanted and not needed & cannot(name)]


def table() -> str:
    """All of it, as a table of the docs."""
    rows = [".. list-table::", "   :header-rows: 1", "   :widths: 12 38 50", ""]
    for cells in [("Runtime", "What does not hold", "Why, and what to do"), *_cells()]:
        for marker, cell in zip(("* -", "  -", "  -"), cells, strict=True):
            rows.append(f"   {marker} {cell}")
    return "\n".join(rows) + "\n"


def _cells() -> list[tuple[str, str, str]]:
    return [(limit.runtime, limit.what.replace("`", "``"), limit.why.replace("`", "``")) for limit in LIMITS]


if __name__ == "__main__":
    print(table(), end="")

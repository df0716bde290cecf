"""What a pool tells its listeners, in every runtime."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from .harness import BOUND, Runtime, do, within
from .kinds import Line, Script, Scripted, line_pool
from .server import EchoServer


class Heard:
    """What a listener has heard: the name of the event and the connection's number, if it is about one."""

    def __init__(self, rt: Runtime, but: str = "") -> None:
        self.events: list[tuple[Any, ...]] = []
        self.figures: list[float] = []
        self.pools: list[Any] = []
        heard = self

        class Listener(rt.api.Listener):  # type: ignore[misc, name-defined]
            pass

        def hearing(event: str) -> Callable[..., None]:
            def hear(_: Any, pool: Any, *args: Any) -> None:
                number = [arg.number for arg in args if hasattr(arg, "number")]
                said = [arg for arg in args if isinstance(arg, str)]
                heard.figures += [arg for arg in args if isinstance(arg, float)]
                heard.events.append((event, *number, *said))
                if pool not in heard.pools:
                    heard.pools.append(pool)

            return hear

        for event in ("attached", "opened", "open_failed", "borrowed", "returned", "closed", "exhausted", "leaked"):
            if event != but:
                setattr(Listener, event, hearing(event))
        self.listener = Listener()


async def test_the_life_of_a_connection_is_told_in_its_order(rt: Runtime) -> None:
    heard = Heard(rt)
    script = Script()
    pool = script.pool(rt, max_connections=1, listeners=[heard.listener])
    assert heard.events == [("attached",)]
    async with within(pool.connection(timeout=BOUND)):
        pass
    connection = await do(pool.acquire(timeout=BOUND))
    await do(pool.release(connection))
    await do(pool.close())
    await rt.until(lambda: len(heard.events) == 7)
    assert heard.events[1:] == [
        ("opened", 0),
        ("borrowed", 0),
        ("returned", 0),
        ("borrowed", 0),
        ("returned", 0),
        ("closed", 0, "closed"),
    ]
    assert all(0 <= figure < BOUND for figure in heard.figures)
    assert len(heard.figures) == 5
    assert heard.pools == [pool]


async def test_what_comes_back_is_told_before_the_next_one_has_it(rt: Runtime) -> None:
    heard = Heard(rt)
    script = Script()
    pool = script.pool(rt, max_connections=1, listeners=[heard.listener])
    first = await do(pool.acquire(timeout=BOUND))
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 1)
    await do(pool.release(first))
    [second] = await rt.join(waiter)
    assert heard.events == [("attached",), ("opened", 0), ("borrowed", 0), ("returned", 0), ("borrowed", 0)]
    await do(pool.release(second))


async def test_why_a_connection_was_closed_is_told(rt: Runtime) -> None:
    heard = Heard(rt)
    script = Script()
    pool = script.pool(rt, max_connections=3, listeners=[heard.listener])
    with pytest.raises(ValueError, match="mine"):
        async with within(pool.connection(timeout=BOUND)):
            raise ValueError("mine")
    dropped = await do(pool.acquire(timeout=BOUND))
    await do(pool.drop(dropped))
    async with within(pool.connection(timeout=BOUND)):
        await do(pool.clear())
    await rt.until(lambda: [event for event, *_ in heard.events].count("closed") == 3)
    reasons = [event[1:] for event in heard.events if event[0] == "closed"]
    assert sorted(reasons) == [(0, "discarded"), (1, "dropped"), (2, "cleared")]
    assert [event for event, *_ in heard.events].count("borrowed") == 3
    assert [event for event, *_ in heard.events].count("returned") == 3


async def test_a_dial_that_failed_and_a_pool_that_is_exhausted_are_told(rt: Runtime) -> None:
    async def fail(_: Any) -> None:
        raise OSError("nobody there")

    heard = Heard(rt)
    script = Script(on_open=fail)
    pool = script.pool(rt, max_connections=1, listeners=[heard.listener])
    with pytest.raises(OSError, match="nobody there"):
        await do(pool.acquire(timeout=BOUND))
    with pytest.raises(rt.api.PoolExhaustedError):
        await do(pool.acquire(timeout=0))
    await rt.until(lambda: len(heard.events) == 3)
    assert sorted(heard.events[1:]) == [("exhausted",), ("open_failed",)]


async def test_a_leak_is_told_once(rt: Runtime, logged: Any) -> None:
    heard = Heard(rt)
    script = Script()
    pool = script.pool(rt, max_connections=1, leak_threshold=0.02, listeners=[heard.listener])
    async with within(pool.connection(timeout=BOUND)):
        await rt.until(lambda: ("leaked",) in heard.events)
        await rt.sleep(0.05)  # and is looked at again
    assert heard.events.count(("leaked",)) == 1
    reports: list[Any] = []

    def both() -> bool:
        reports.extend(logged.take())
        return len(reports) == 2

    await rt.until(both)


async def test_a_listener_that_fails_costs_nobody_anything_and_is_logged(rt: Runtime, logged: Any) -> None:
    class Failing(rt.api.Listener):  # type: ignore[misc, name-defined]
        def borrowed(self, pool: Any, connection: Any, waited: float) -> None:
            raise LookupError("no such metric")

        returned = closed = opened = borrowed

    heard = Heard(rt)
    script = Script()
    pool = script.pool(rt, max_connections=1, name="told", listeners=[Failing(), heard.listener])
    for _ in range(3):
        async with within(pool.connection(timeout=BOUND)) as connection:
            assert connection.number == 0
    warnings = [record for record in logged.take() if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == [
        f"Pool 'told': {event}() of a listener failed: LookupError('no such metric')"
        for event in ("opened", "borrowed", "returned")
    ]
    assert all(record.exc_info for record in warnings)
    assert [event for event, *_ in heard.events].count("returned") == 3
    assert pool.faults() == []
    await do(pool.close())
    await rt.until(lambda: heard.events[-1][0] == "closed")
    logged.take()


async def test_a_listener_may_drop_what_is_about_to_be_borrowed(rt: Runtime) -> None:
    dropped: list[int] = []

    class Choosy(rt.api.Listener):  # type: ignore[misc, name-defined]
        def borrowed(self, pool: Any, connection: Any, waited: float) -> None:
            if connection.number == 0:
                dropped.append(connection.number)
                pool._discard(pool._members[id(connection)])

    script = Script()
    pool = script.pool(rt, max_connections=1, listeners=[Choosy()])
    async with within(pool.connection(timeout=BOUND)) as connection:
        assert connection.number == 1
    assert dropped == [0]
    assert pool.faults() == []


async def test_who_listens_to_opens_and_closes_only_leaves_the_fast_way_open(rt: Runtime) -> None:
    class Counting(rt.api.Listener):  # type: ignore[misc, name-defined]
        def opened(self, *_: Any) -> None:
            pass

        closed = exhausted = open_failed = attached = opened

    script = Script()
    pool = script.pool(rt, listeners=[Counting()])
    async with within(pool.connection(timeout=BOUND)):
        pass
    assert pool._lane_out is pool._warm
    assert pool._lane_with is pool._warm
    assert pool._lane_in


@pytest.mark.parametrize(
    ("listeners", "text"),
    [
        (7, "listeners must be a list of Listener, not 7"),
        ("words", "listeners must be a list of Listener, not 'words'"),
        ([object], "listeners must be a list of objects of a subclass of Listener, and one is <class 'object'>"),
    ],
)
async def test_what_is_no_listener_is_refused_by_name(rt: Runtime, listeners: Any, text: str) -> None:
    script = Script()
    with pytest.raises(TypeError) as caught:
        script.pool(rt, listeners=listeners)
    assert str(caught.value) == text
    assert script.made == []


async def test_a_listener_that_would_have_to_be_awaited_is_refused(rt: Runtime) -> None:
    class Slow(rt.api.Listener):  # type: ignore[misc, name-defined]
        async def opened(self, pool: Any, connection: Any, seconds: float) -> None:
            raise AssertionError("called")

    with pytest.raises(TypeError, match=r"Slow\.opened\(\) must be a plain function"):
        Script().pool(rt, listeners=[Slow()])


async def test_a_method_that_is_set_on_the_listener_itself_is_heard_too(rt: Runtime) -> None:
    opened: list[int] = []
    listener = rt.api.Listener()
    listener.opened = lambda pool, connection, seconds: opened.append(connection.number)
    pool = Script().pool(rt, max_connections=1, listeners=[listener])
    async with within(pool.connection(timeout=BOUND)):
        assert opened == [0]


async def test_a_listener_with_a_parameter_too_few_is_refused(rt: Runtime) -> None:
    class Short(rt.api.Listener):  # type: ignore[misc, name-defined]
        def opened(self, pool: Any, connection: Any) -> None:
            raise AssertionError("called")

    with pytest.raises(TypeError, match=r"^Short\.opened\(\) must take \(pool, connection, seconds\)$"):
        Script().pool(rt, listeners=[Short()])


async def test_a_listener_of_a_group_hears_each_endpoint(rt: Runtime) -> None:
    heard = Heard(rt)
    scripts = [Script(), Script()]
    group = rt.group(Scripted, max_connections=1, listeners=[heard.listener])
    for script in scripts:
        async with within(group.connection(BOUND, script=script)):
            pass
    assert heard.events == [("attached",), ("opened", 0), ("borrowed", 0), ("returned", 0)] * 2
    assert len(heard.pools) == 2
    assert all(line in group.debug() for line in (repr(group), "'endpoint #2': 0 in use, 1 idle"))
    heard.pools.clear()
    await do(group.close())


# The picture


async def test_the_picture_says_who_has_what_and_who_waits(rt: Runtime) -> None:
    script = Script()
    pool = script.pool(rt, max_connections=1, name="watched", leak_threshold=100 * BOUND)
    has_begun, may_end = rt.event(), rt.event()

    async def hold_for_long() -> None:
        async with within(pool.connection(timeout=BOUND)):
            has_begun.set()
            await may_end.wait()

    holder = rt.spawn(hold_for_long)
    await has_begun.wait()
    waiter = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.waiting(pool, 1)
    lines = pool.debug().splitlines()
    assert lines[0] == "Pool 'watched': 1 in use, 0 idle, 0 opening, 0 closing: 1 of at most 1; 1 waiting"
    lent = lines[lines.index("  in use, the longest held first") + 1]
    assert "<Scripted at " in lent
    assert re.search(r", borrowed in \w+ \(.*\.py:\d+\), now in [\w<>]+ \(.*\.py:\d+\)$", lent), lent
    [waits] = [line for line in lines if re.search(r" for \d\.\d{3} s$", line)]
    assert lines.index(waits) == lines.index("  waiting, who is served next first") + 1
    assert all(line in rt.api.debug().splitlines() for line in (lines[0], "  waiting, who is served next first"))
    may_end.set()
    [_, second] = await rt.join(holder, waiter)
    await do(pool.release(second))
    lines = pool.debug().splitlines()
    assert "since the start: 2 lent, 1 opened, " in lines[1]
    assert re.search(r"just now, lent 2 times$", lines[lines.index("  idle, what is lent next first") + 1])


async def test_the_picture_says_what_is_being_opened_and_what_went_wrong_last(rt: Runtime) -> None:
    may_open = rt.event()

    async def fail(_: Any) -> None:
        await may_open.wait()
        raise OSError("nobody there")

    script = Script(on_open=fail)
    pool = script.pool(rt, max_connections=1)
    asking = rt.spawn(lambda: do(pool.acquire(timeout=BOUND)))
    await rt.until(lambda: script.count("open"))
    lines = pool.debug().splitlines()
    opening = lines[lines.index("  opening, closing, asking whether it lives") + 1]
    assert re.fullmatch(r"    opening for \d\.\d{3} s", opening), opening
    may_open.set()
    with pytest.raises(OSError, match="nobody there"):
        await rt.join(asking)
    said = next(line for line in pool.debug().splitlines() if "in a row" in line)
    assert re.fullmatch(
        r"    1 dial in a row has failed, the last one \d\.\d{3} s ago: OSError\('nobody there'\)", said
    )


async def test_the_picture_of_a_closed_or_paused_pool_says_so(rt: Runtime) -> None:
    pool = Script().pool(rt, name="halted")
    pool.pause()
    assert pool.debug().startswith("Pool 'halted', PAUSED: 0 in use")
    await do(pool.close())
    assert pool.debug().startswith("Pool 'halted', CLOSED, PAUSED: 0 in use")


async def test_the_picture_is_drawn_though_what_is_in_it_cannot_be_shown(rt: Runtime) -> None:
    class Unspeakable(OSError):
        def __repr__(self) -> str:
            raise ValueError("no repr")

    errors = [OSError("much" * 1000), Unspeakable()]

    async def fail_at_first(_: Any) -> None:
        if errors:
            raise errors.pop()

    pool = Script(on_open=fail_at_first).pool(rt, max_connections=1, name="odd")
    for shown in ("<Unspeakable at 0x", "OSError('muchmuch"):
        with pytest.raises(OSError):
            await do(pool.acquire(timeout=BOUND))
        with pytest.raises(rt.api.PoolExhaustedError, match=re.escape(shown)):
            await do(pool.acquire(timeout=0))
        assert rt.api.debug()
        for text in (pool.debug(), rt.api.debug(pool)):
            [said] = [line for line in text.splitlines() if "in a row" in line]
            assert shown in said
            assert len(said) < 400


async def test_the_picture_is_drawn_though_a_connection_does_not_know_its_descriptor(
    rt: Runtime, server: EchoServer
) -> None:
    class Odd(Line):
        def fileno(self) -> int:
            raise LookupError("no such thing")

    pool = line_pool(rt, server, Odd, name="odd")
    async with within(pool.connection(timeout=BOUND)):
        assert re.search(r"^    <Odd at 0x[0-9a-f]+>", pool.debug(), re.MULTILINE)


async def test_a_pool_whose_picture_fails_hides_no_other(rt: Runtime) -> None:
    class Shy(rt.api.Pool):  # type: ignore[misc, name-defined]
        def debug(self) -> str:
            raise LookupError("not today")

    shy = rt.made_by(Shy, *Script().kind, name="shy")
    pool = Script().pool(rt, name="other")
    text = rt.api.debug()
    assert pool.debug() in text
    assert "Shy 'shy': no picture of it could be made: LookupError('not today')" in text
    await do(shy.close())


async def test_a_pool_that_is_half_made_has_a_picture(rt: Runtime) -> None:
    texts: list[str] = []

    class Early(rt.api.Pool):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **options: Any) -> None:
            texts.append(self.debug())
            super().__init__(*args, **options)

    rt.made_by(Early, *Script().kind)
    assert texts == ["<Early that was refused>"]

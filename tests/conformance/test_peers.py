"""Pools in front of real servers: Valkey over TCP, PostgreSQL through psycopg, nginx over TCP and TLS."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

from tests.conftest import Logged
from tests.faults import Deadline
from tests.peers import Nginx, Peer, Postgres, Valkey

from . import postgres as scenarios
from .harness import CANCEL, Asyncio, Runtime, Task, do, needs, within
from .services import BOUND, Http, Resp

ROOT = Path(__file__).parent.parent.parent

# What holds in the end


@asynccontextmanager
async def serving(rt: Runtime, server: Peer, pool: Any) -> AsyncIterator[Any]:
    """A block in which a pool serves. When it is left the pool serves as many as it should, at once, and no more; and
    when it is closed the server counts no connection."""
    yield pool
    await serves_all_at_once(rt, pool)
    assert server.connections() <= pool.stats().max_connections
    await do(pool.close())
    await rt.until(lambda: server.connections() == 0, lambda: repr(server))


async def serves_all_at_once(rt: Runtime, pool: Any) -> None:
    """As many borrowers as there may be hold a working connection at the same time."""
    size = pool.stats().max_connections
    everyone = rt.event()
    served: list[str] = []

    async def borrower(number: int) -> None:
        async with within(pool.connection(timeout=BOUND)) as conn:
            served.append(await echo(conn, str(number)))
            if len(served) == size:
                everyone.set()
            await everyone.wait()

    await rt.join(*(rt.spawn(borrower, number) for number in range(size)))
    assert sorted(served) == sorted(map(str, range(size)))


async def echo(conn: Any, token: str) -> str:
    if isinstance(conn, Resp):
        return str(await conn.ask("ECHO", token))
    return str((await conn.request(f"/echo?{token}"))[0])


# -- Valkey --


def resp_pool(rt: Runtime, valkey: Valkey, size: int) -> Any:
    options = {"host": valkey.host, "port": valkey.port, "timeout": BOUND}
    return rt.pool(Resp, options, max_connections=size, acquire_timeout=BOUND, check_after_idle=0)


async def test_g1_g2_a_hundred_borrowers_share_eight_connections_and_get_their_own_replies(
    rt: Runtime, valkey: Valkey
) -> None:
    valkey.ask("FLUSHALL")
    opened = valkey.opened()
    turns = 8
    seen: list[int] = []

    async def borrower(number: int) -> None:
        for turn in range(turns):
            mine = f"{number}.{turn}"
            async with within(pool.connection()) as conn:
                assert await conn.ask("PING", mine) == mine
                assert await conn.ask("SET", f"key{number}", mine) == "OK"
                assert await conn.ask("GET", f"key{number}") == mine
                assert isinstance(await conn.ask("INCR", "turns"), int)
            if number == 0:
                seen.append(valkey.connections())

    async with serving(rt, valkey, resp_pool(rt, valkey, 8)) as pool:
        await rt.join(*(rt.spawn(borrower, number) for number in range(100)))
        stats = pool.stats()
        assert valkey.ask("GET", "turns") == str(100 * turns)
        assert stats.acquired == 100 * turns
        assert stats.opened <= 8
        # What the server counted, at any time and all in all; a dial that nobody needs any more may still be under way.
        assert max(seen) <= 8
        await rt.until(lambda: valkey.opened() - opened == pool.stats().opened, lambda: repr(pool))


class Mishap(Exception):
    pass


def cancel(rt: Runtime, borrower: Task, deadline: Deadline) -> None:
    rt.cancel(borrower)


def time_out(rt: Runtime, borrower: Task, deadline: Deadline) -> None:
    deadline.end(borrower)


@needs(CANCEL)
@pytest.mark.parametrize("interrupt", [cancel, time_out])
async def test_g3_the_reply_to_an_interrupted_borrower_reaches_nobody_else(
    rt: Runtime, valkey: Valkey, interrupt: Callable[[Runtime, Task, Deadline], None]
) -> None:
    valkey.ask("FLUSHALL")
    deadline = Deadline(rt, None)

    async def borrower() -> None:
        async with deadline, within(pool.connection()) as conn:
            await conn.ask("BLPOP", "list", "0")

    async with serving(rt, valkey, resp_pool(rt, valkey, 1)) as pool:
        first = rt.spawn(borrower)
        await rt.until(valkey.blocked)
        interrupt(rt, first, deadline)
        assert isinstance(await rt.outcome(first), rt.killed if interrupt is cancel else rt.timed_out)
        await reply_is_nobodys(valkey, pool)


async def test_g3_the_reply_to_a_borrower_that_fails_before_it_has_come_reaches_nobody_else(
    rt: Runtime, valkey: Valkey
) -> None:
    valkey.ask("FLUSHALL")

    async def fail() -> None:
        await rt.until(valkey.blocked)
        raise Mishap

    async with serving(rt, valkey, resp_pool(rt, valkey, 1)) as pool:
        with pytest.raises(Mishap):
            async with within(pool.connection()) as conn:
                await conn.ask("BLPOP", "list", "0", meanwhile=fail)
        await reply_is_nobodys(valkey, pool)


async def reply_is_nobodys(valkey: Valkey, pool: Any) -> None:
    """It comes now, or would."""
    async with within(pool.connection()) as conn:
        assert await conn.ask("PING", "before") == "before"
        assert await conn.ask("RPUSH", "list", "for the first") == 1
        assert await conn.ask("PING", "after") == "after"
    valkey.wait_for_connections(1)
    assert pool.stats().closed["discarded"] == 1


async def test_g4_a_server_that_is_killed_and_started_again_under_load_costs_no_slot(
    rt: Runtime, valkey: Valkey, logged: Logged
) -> None:
    failures: list[Exception] = []
    replies: list[None] = []
    stopping = rt.event()

    async def borrower(number: int) -> None:
        while not stopping.is_set():
            try:
                async with within(pool.connection()) as conn:
                    assert await conn.ask("PING", str(number)) == str(number)
                    replies.append(None)
            except (OSError, rt.api.PoolError) as error:
                failures.append(error.with_traceback(None))
                await rt.sleep(0.001)

    async with serving(rt, valkey, resp_pool(rt, valkey, 8)) as pool:
        tasks = [rt.spawn(borrower, number) for number in range(40)]
        await rt.until(lambda: len(replies) >= 500)
        valkey.kill()
        await rt.until(lambda: failures)
        valkey.start()
        at_restart = len(replies)
        while len(replies) < at_restart + 500:
            assert valkey.connections() <= 8
            await rt.sleep(0.005)
        stopping.set()
        await rt.join(*tasks)
    assert all(isinstance(error, OSError) for error in failures)
    # A dial may have failed when its borrower had found another connection.
    assert all("a dial failed" in record.getMessage() for record in logged.take())


@pytest.mark.parametrize("how", ["hung up", "killed"])
async def test_g8_connections_that_the_server_ended_while_they_idled_are_not_lent(
    rt: Runtime, valkey: Valkey, how: str
) -> None:
    async with serving(rt, valkey, resp_pool(rt, valkey, 3)) as pool:
        await serves_all_at_once(rt, pool)
        assert pool.idle == valkey.connections() == 3
        if how == "hung up":
            assert valkey.ask("CLIENT", "KILL", "TYPE", "normal") == ":3"
            valkey.wait_for_connections(0)
        else:
            valkey.kill()
            valkey.start()
        async with within(pool.connection()) as conn:
            assert await conn.ask("PING") == "PONG"
        await serves_all_at_once(rt, pool)
        assert pool.stats().closed["stale"] == 3


# -- PostgreSQL --


async def play(rt: Runtime, postgres: Postgres, scenario: str) -> None:
    """psycopg under greenlets wants the standard library patched. The tests do not do that, so these have a process of
    their own."""
    if rt.name not in ("gevent", "eventlet"):
        with psycopg.connect(postgres.dsn, autocommit=True, application_name="asking") as conn:
            return await scenarios.SCENARIOS[scenario](rt, postgres.dsn, scenarios.Observer(rt, conn))
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            str(ROOT / "tests" / "scripts" / "postgres.py"),
            rt.name,
            scenario,
            postgres.dsn,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    # Nothing printed is G12.
    assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), result.stderr
    return None


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("overlap", id="g1_queries_overlap_and_the_server_never_sees_more_than_the_cap"),
        pytest.param("crowd", id="g2_forty_borrowers_share_four_connections_and_get_their_own_answers"),
        pytest.param("reset", id="reset_rolls_back_before_the_next_borrower"),
        pytest.param("terminated", id="g8_a_terminated_idle_connection_is_replaced"),
        pytest.param("terminated_unnoticed", id="a_terminated_connection_that_check_misses_fails_one_borrower_only"),
    ],
)
async def test_psycopg(rt: Runtime, postgres: Postgres, scenario: str) -> None:
    await play(rt, postgres, scenario)


@needs(CANCEL)
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("killed", id="g3_the_answer_to_a_killed_borrower_reaches_nobody_else"),
        pytest.param("timed_out", id="g3_the_answer_to_a_timed_out_borrower_reaches_nobody_else"),
    ],
)
async def test_psycopg_interrupted(rt: Runtime, postgres: Postgres, scenario: str) -> None:
    await play(rt, postgres, scenario)


# -- nginx --


def http_pool(rt: Runtime, nginx: Nginx, scheme: str, size: int = 4) -> Any:
    options = {"host": nginx.host, "port": nginx.port, "timeout": BOUND}
    if scheme == "https":
        options |= {"port": nginx.tls_port, "tls": nginx.tls, "server_hostname": "localhost"}
    return rt.pool(Http, options, max_connections=size, acquire_timeout=BOUND, check_after_idle=0)


schemes = pytest.mark.parametrize("scheme", ["http", "https"])


@schemes
async def test_g1_g2_fifty_borrowers_keep_four_connections_to_nginx_alive(
    rt: Runtime, nginx: Nginx, scheme: str
) -> None:
    numbers: set[str] = set()
    seen: list[int] = []

    async def borrower(number: int) -> None:
        for turn in range(4):
            async with within(pool.connection()) as conn:
                answer, connection, _ = await conn.request(f"/echo?{number}.{turn}")
            assert answer == f"{number}.{turn}"
            numbers.add(connection)
        if number % 10 == 0:
            seen.append(nginx.connections())

    async with serving(rt, nginx, http_pool(rt, nginx, scheme)) as pool:
        await rt.join(*(rt.spawn(borrower, number) for number in range(50)))
        assert len(numbers) <= pool.stats().opened <= 4  # there may be one that came when nobody needed it any more
        assert 1 <= max(seen) <= 4


@schemes
@pytest.mark.parametrize("target", ["/brief", "/last"])
async def test_g8_a_connection_that_nginx_no_longer_keeps_alive_is_not_lent(
    rt: Runtime, nginx: Nginx, scheme: str, target: str
) -> None:
    async with serving(rt, nginx, http_pool(rt, nginx, scheme)) as pool:
        async with within(pool.connection()) as conn:
            _, first, _ = await conn.request(f"{target}?1")
        nginx.wait_for_connections(0)
        async with within(pool.connection()) as conn:
            answer, second, count = await conn.request("/echo?2")
        assert (answer, count) == ("2", "1")
        assert first != second
        await rt.until(lambda: pool.stats().closed["stale"] == 1)


@schemes
async def test_a_connection_that_idled_in_good_health_is_lent_again(rt: Runtime, nginx: Nginx, scheme: str) -> None:
    async with serving(rt, nginx, http_pool(rt, nginx, scheme, size=1)) as pool:
        for turn in range(1, 4):
            async with within(pool.connection()) as conn:
                # Under TLS 1.3 the server sends session tickets unasked; they are no reason to discard.
                assert (await conn.request("/echo?x"))[2] == str(turn)
        assert pool.stats().opened == 1


@pytest.mark.parametrize("reason", ["unknown authority", "wrong name"])
async def test_a_certificate_that_does_not_verify_fails_the_acquire_and_leaves_nothing(
    rt: Runtime, nginx: Nginx, reason: str
) -> None:
    options: dict[str, object] = {"host": nginx.host, "port": nginx.tls_port, "timeout": BOUND, "tls": True}
    if reason == "wrong name":
        options |= {"tls": nginx.tls, "server_hostname": "another.example"}
    pool = rt.pool(Http, options, max_connections=1)
    for _ in range(3):
        with pytest.raises(ssl.SSLCertVerificationError):
            await do(pool.acquire())
    assert (pool.size, pool.stats().open_failures) == (0, 3)
    await rt.until(lambda: nginx.connections() == 0)


@schemes
async def test_g7_a_frozen_server_holds_up_nobody_beyond_the_time_limits(
    rt: Runtime, nginx: Nginx, scheme: str
) -> None:
    async def ask_in_vain(target: str, timeout: float) -> None:
        async with within(pool.connection(timeout=timeout)) as conn:
            # Only now: what should succeed has all the time it needs.
            if isinstance(rt, Asyncio):
                conn._timeout = 0.2
            else:
                conn.socket.settimeout(0.2)
            await conn.request(target)

    async with serving(rt, nginx, http_pool(rt, nginx, scheme, size=2)) as pool:
        async with within(pool.connection()) as conn:
            await conn.request("/echo?1")
        nginx.pause()
        started = monotonic()
        with pytest.raises(TimeoutError):
            await ask_in_vain("/echo?2", BOUND)
        # The kernel answers for it, so a connection opens, but no handshake gets anywhere.
        if scheme == "https":
            with pytest.raises(rt.api.PoolExhaustedError):
                await ask_in_vain("/echo?3", 0.1)
        else:
            with pytest.raises(TimeoutError):
                await ask_in_vain("/echo?3", BOUND)
        assert monotonic() - started < BOUND
        nginx.resume()
        async with within(pool.connection()) as one, within(pool.connection()) as two:
            assert ((await one.request("/echo?4"))[0], (await two.request("/echo?5"))[0]) == ("4", "5")

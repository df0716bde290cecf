"""Pools in front of real servers: Valkey over TCP, PostgreSQL through psycopg, nginx over TCP and TLS."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import gevent
import pytest
from gevent.event import Event

from gsocketpool import Pool, PoolError, PoolExhaustedError, TcpConnection

from .conftest import Logged
from .peers import Nginx, Postgres, Valkey

BOUND = 20.0  # seconds for whatever should happen soon

# -- Valkey --


class Resp(TcpConnection):
    """As much of Valkey's protocol as the tests speak."""

    def ask(self, *words: str) -> str | int | None:
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        self.send(f"*{len(words)}\r\n{''.join(parts)}".encode())
        return self.reply()

    def reply(self) -> str | int | None:
        line = self.recv_until(b"\r\n").decode()
        kind, rest = line[0], line[1:]
        if kind == ":":
            return int(rest)
        if kind == "$":
            return None if rest == "-1" else self.recv_exactly(int(rest) + 2)[:-2].decode()
        if kind == "+":
            return rest
        raise ValueError(line)


def resp_pool(valkey: Valkey, size: int) -> Pool[Resp]:
    options = {"host": valkey.host, "port": valkey.port, "timeout": BOUND}
    return Pool(Resp, options, max_connections=size, acquire_timeout=BOUND, check_after_idle=0)


def serves_all_at_once(pool: Pool[Resp], size: int) -> bool:
    """Whether `size` borrowers can hold a working connection at the same time."""
    everyone = Event()
    served: list[bool] = []

    def borrower(number: int) -> None:
        with pool.connection(timeout=BOUND) as conn:
            served.append(conn.ask("ECHO", str(number)) == str(number))
            if len(served) == size:
                everyone.set()
            assert everyone.wait(BOUND)

    gevent.joinall([gevent.spawn(borrower, number) for number in range(size)], raise_error=True)
    return all(served)


def test_g1_g2_a_hundred_greenlets_share_eight_connections_and_get_their_own_replies(valkey: Valkey) -> None:
    valkey.ask("FLUSHALL")
    opened = valkey.opened()
    turns = 20
    seen: list[int] = []

    def borrower(number: int) -> None:
        for turn in range(turns):
            mine = f"{number}.{turn}"
            with pool.connection() as conn:
                assert conn.ask("PING", mine) == mine
                assert conn.ask("SET", f"key{number}", mine) == "OK"
                assert conn.ask("GET", f"key{number}") == mine
                assert isinstance(conn.ask("INCR", "turns"), int)
            if number == 0:
                seen.append(valkey.connections())

    with resp_pool(valkey, 8) as pool:
        gevent.joinall([gevent.spawn(borrower, number) for number in range(100)], raise_error=True)
        stats = pool.stats()
    assert valkey.ask("GET", "turns") == str(100 * turns)
    assert stats.acquired == 100 * turns
    assert stats.opened <= 8
    # What the server counted, at any time and all in all.
    assert max(seen) <= 8
    assert valkey.opened() - opened == stats.opened
    valkey.wait_for_connections(0)


class Mishap(Exception):
    pass


def kill(borrower: gevent.Greenlet[[], None]) -> None:
    borrower.kill()


def time_out(borrower: gevent.Greenlet[[], None]) -> None:
    gevent.kill(borrower, gevent.Timeout())
    borrower.join()


def raise_in_it(borrower: gevent.Greenlet[[], None]) -> None:
    gevent.kill(borrower, Mishap())
    borrower.join()


@pytest.mark.parametrize("interrupt", [kill, time_out, raise_in_it])
def test_g3_the_reply_to_an_interrupted_borrower_reaches_nobody_else(
    valkey: Valkey, interrupt: Callable[[gevent.Greenlet[[], None]], None]
) -> None:
    valkey.ask("FLUSHALL")

    def borrower() -> None:
        try:
            with pool.connection() as conn:
                conn.ask("BLPOP", "list", "0")
        except (gevent.Timeout, Mishap):
            pass

    with resp_pool(valkey, 1) as pool:
        first = gevent.spawn(borrower)
        with gevent.Timeout(BOUND):
            while not valkey.blocked():
                gevent.sleep(0.001)
        interrupt(first)
        with pool.connection() as conn:
            assert conn.ask("PING", "before") == "before"
            assert conn.ask("RPUSH", "list", "for the first") == 1
            assert conn.ask("PING", "after") == "after"
        valkey.wait_for_connections(1)
        assert pool.stats().closed["discarded"] == 1


def test_g4_a_server_that_is_killed_and_started_again_under_load_costs_no_slot(valkey: Valkey, logged: Logged) -> None:
    failures: list[Exception] = []
    replies = 0
    stopping = Event()
    warm = Event()
    failed = Event()

    def borrower(number: int) -> None:
        nonlocal replies
        while not stopping.is_set():
            try:
                with pool.connection() as conn:
                    assert conn.ask("PING", str(number)) == str(number)
                    replies += 1
            except (OSError, PoolError) as error:
                failures.append(error)
                failed.set()
                gevent.sleep(0.001)
            if replies >= 1_000:
                warm.set()

    with resp_pool(valkey, 8) as pool:
        greenlets = [gevent.spawn(borrower, number) for number in range(40)]
        assert warm.wait(BOUND)
        valkey.kill()
        assert failed.wait(BOUND)
        valkey.start()
        at_restart = replies
        with gevent.Timeout(BOUND):
            while replies < at_restart + 1_000:
                assert valkey.connections() <= 8
                gevent.sleep(0.001)
        stopping.set()
        gevent.joinall(greenlets, raise_error=True)
        assert serves_all_at_once(pool, 8)
        assert valkey.connections() <= 8
    assert failures
    assert all(isinstance(error, OSError) for error in failures)
    # A dial may have failed when its borrower had found another connection.
    assert all("a dial failed" in record.getMessage() for record in logged.take())


@pytest.mark.parametrize("how", ["hung up", "killed"])
def test_g8_connections_that_the_server_ended_while_they_idled_are_not_lent(valkey: Valkey, how: str) -> None:
    with resp_pool(valkey, 3) as pool:
        assert serves_all_at_once(pool, 3)
        assert pool.idle == valkey.connections() == 3
        if how == "hung up":
            assert valkey.ask("CLIENT", "KILL", "TYPE", "normal") == ":3"
            valkey.wait_for_connections(0)
        else:
            valkey.kill()
            valkey.start()
        with pool.connection() as conn:
            assert conn.ask("PING") == "PONG"
        assert serves_all_at_once(pool, 3)
        assert pool.stats().closed["stale"] == 3


# -- PostgreSQL --


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("overlap", id="g1_queries_overlap_and_the_server_never_sees_more_than_the_cap"),
        pytest.param("crowd", id="g2_forty_greenlets_share_four_connections_and_get_their_own_answers"),
        pytest.param("killed", id="g3_the_answer_to_a_killed_borrower_reaches_nobody_else"),
        pytest.param("timed_out", id="g3_the_answer_to_a_timed_out_borrower_reaches_nobody_else"),
        pytest.param("reset", id="reset_rolls_back_before_the_next_borrower"),
        pytest.param("terminated", id="g8_a_terminated_idle_connection_is_replaced"),
        pytest.param("terminated_unnoticed", id="a_terminated_connection_that_check_misses_fails_one_borrower_only"),
    ],
)
def test_psycopg(postgres: Postgres, scenario: str) -> None:
    script = Path(__file__).parent / "scripts" / "postgres.py"
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script), scenario, postgres.dsn],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    # Nothing printed is G12.
    assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), result.stderr


# -- nginx --


class Http(TcpConnection):
    """As much of HTTP/1.1 as the tests speak."""

    def request(self, target: str) -> list[str]:
        """Return what was asked, the number that the server gave the connection, and that of the request on it."""
        self.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = self.recv_until(b"\r\n\r\n").decode()
        status, *headers = head.split("\r\n")
        assert status == "HTTP/1.1 200 OK", head
        (length,) = (int(line[16:]) for line in headers if line.startswith("Content-Length: "))
        return self.recv_exactly(length).decode().split()


def http_pool(nginx: Nginx, scheme: str, size: int = 4, timeout: float = BOUND) -> Pool[Http]:
    options = {"host": nginx.host, "port": nginx.port, "timeout": timeout}
    if scheme == "https":
        options |= {"port": nginx.tls_port, "tls": nginx.tls, "server_hostname": "localhost"}
    return Pool(Http, options, max_connections=size, acquire_timeout=BOUND, check_after_idle=0)


schemes = pytest.mark.parametrize("scheme", ["http", "https"])


@schemes
def test_g1_g2_fifty_greenlets_keep_four_connections_to_nginx_alive(nginx: Nginx, scheme: str) -> None:
    numbers: set[str] = set()
    seen: list[int] = []

    def borrower(number: int) -> None:
        for turn in range(10):
            with pool.connection() as conn:
                echo, connection, _ = conn.request(f"/echo?{number}.{turn}")
            assert echo == f"{number}.{turn}"
            numbers.add(connection)
            if number == 0:
                seen.append(nginx.connections())

    with http_pool(nginx, scheme) as pool:
        gevent.joinall([gevent.spawn(borrower, number) for number in range(50)], raise_error=True)
        assert len(numbers) == pool.stats().opened <= 4
        assert 1 <= max(seen) <= 4
    nginx.wait_for_connections(0)


@schemes
@pytest.mark.parametrize("target", ["/brief", "/last"])
def test_g8_a_connection_that_nginx_no_longer_keeps_alive_is_not_lent(nginx: Nginx, scheme: str, target: str) -> None:
    with http_pool(nginx, scheme) as pool:
        with pool.connection() as conn:
            _, first, _ = conn.request(f"{target}?1")
        assert pool.idle == 1
        nginx.wait_for_connections(0)
        with pool.connection() as conn:
            echo, second, count = conn.request("/echo?2")
        assert (echo, count) == ("2", "1")
        assert first != second
        assert pool.stats().closed["stale"] == 1


@schemes
def test_a_connection_that_idled_in_good_health_is_lent_again(nginx: Nginx, scheme: str) -> None:
    with http_pool(nginx, scheme) as pool:
        for turn in range(1, 4):
            with pool.connection() as conn:
                # Under TLS 1.3 the server sends session tickets unasked; they are no reason to discard.
                assert conn.request("/echo?x")[2] == str(turn)
        assert pool.stats().opened == 1


@pytest.mark.parametrize("reason", ["unknown authority", "wrong name"])
def test_a_certificate_that_does_not_verify_fails_the_acquire_and_leaves_nothing(nginx: Nginx, reason: str) -> None:
    options: dict[str, object] = {"host": nginx.host, "port": nginx.tls_port, "timeout": BOUND, "tls": True}
    if reason == "wrong name":
        options |= {"tls": nginx.tls, "server_hostname": "another.example"}
    with Pool(Http, options, max_connections=1) as pool:
        for _ in range(3):
            with pytest.raises(ssl.SSLCertVerificationError):
                pool.acquire()
        assert (pool.size, pool.stats().open_failures) == (0, 3)
        nginx.wait_for_connections(0)


@schemes
def test_g7_a_frozen_server_holds_up_nobody_beyond_the_time_limits(nginx: Nginx, logged: Logged, scheme: str) -> None:
    with http_pool(nginx, scheme, size=2, timeout=0.2) as pool:
        with pool.connection() as conn:
            conn.request("/echo?1")
        nginx.pause()
        started = monotonic()
        with pytest.raises(TimeoutError), pool.connection() as conn:
            conn.request("/echo?2")
        # The kernel answers for it, so a connection opens, but no handshake gets anywhere.
        expected = PoolExhaustedError if scheme == "https" else TimeoutError
        with pytest.raises(expected), pool.connection(timeout=0.1) as conn:
            conn.request("/echo?3")
        assert monotonic() - started < 5
        nginx.resume()
        with pool.connection() as one, pool.connection() as two:
            assert (one.request("/echo?4")[0], two.request("/echo?5")[0]) == ("4", "5")
    nginx.wait_for_connections(0)
    # The dial that the borrower did not wait for failed when its own time was up.
    assert len(logged.take()) <= 1

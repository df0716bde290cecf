"""The recipes for data servers against the real ones: psycopg and PostgreSQL; valkey-py, and plain RESP, and Valkey.

psycopg and valkey-py run in patched processes: `examples/postgres.py` and `valkey_client.py`, and
`scripts/recipes_postgres.py` and `recipes_valkey.py`, which put them through one scenario in each run.
`examples/resp.py` needs no patching, and is put through its scenarios here.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

import gsocketpool.threading
from examples.resp import ProtocolError, ReplyError, Resp
from gsocketpool import Pool

from .conftest import SEED, Logged
from .knife import ASLEEP, WAKING, Knife
from .peers import Peer, Postgres, Valkey
from .servers import Server, say
from .test_docs import run

ROOT = Path(__file__).parent.parent
BOUND = 20.0


def until(condition: Callable[[], object]) -> None:
    with gevent.Timeout(BOUND):
        while not condition():
            gevent.sleep(0.005)


def play(script: str, scenario: str, target: str, restarts: Peer | None = None) -> None:
    """Put a client through a scenario, which must end well and say nothing.

    :param restarts: the server that the scenario asks to be restarted.
    """
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "scripts" / script), scenario, str(SEED), target],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if restarts is not None:
                assert process.stdout is not None
                assert process.stdout.readline() == "restart it\n"
                restarts.restart()
            printed, complaints = process.communicate(None if restarts is None else "done\n", timeout=50)
        finally:
            process.kill()
    assert (process.returncode, printed, complaints) == (0, "", ""), complaints


# -- PostgreSQL --


def test_the_postgresql_example_runs(postgres: Postgres) -> None:
    assert run("postgres.py", postgres.dsn) == [
        str([number * number for number in range(20)]),
        "20 times lent",
        "refused by keys_pkey; 0 closed",
        "given up; 1 closed",
        "7 * 7 is 49",
    ]
    postgres.wait_for_connections(0)


POSTGRES = {
    "refused": "what_is_refused_is_rolled_back_and_costs_no_connection",
    "cleaned": "what_a_borrower_left_uncommitted_or_changed_is_gone",
    "session": "what_outlives_a_rollback_is_gone_with_discard_all",
    "ended_idle": "a_connection_that_was_ended_while_it_idled_is_replaced_and_nobody_notices",
    "ended_in_use": "a_connection_that_was_ended_under_a_query_is_discarded",
    "given_up": "a_kill_and_a_time_limit_discard_and_end_the_query_in_the_server",
    "swallowed": "a_connection_that_is_given_back_in_the_middle_of_a_query_is_discarded",
    "by_state": "what_was_cancelled_costs_a_connection_unless_nothing_but_its_state_counts",
    "asked": "the_keepalive_leaves_no_transaction_open_and_finds_the_dead",
    "crowd": "of_fifty_a_third_is_killed_in_a_query_and_no_answer_is_wrong",
}


@pytest.mark.parametrize("scenario", POSTGRES, ids=POSTGRES.get)
def test_postgresql(postgres: Postgres, scenario: str) -> None:
    play("recipes_postgres.py", scenario, postgres.dsn)


def test_postgresql_that_is_restarted_costs_the_connections_and_nothing_else(postgres: Postgres) -> None:
    play("recipes_postgres.py", "restart", postgres.dsn, restarts=postgres)


# -- Valkey, with valkey-py --


def test_the_valkey_example_runs(valkey: Valkey) -> None:
    valkey.ask("FLUSHALL")
    assert run("valkey_client.py", valkey.host, str(valkey.port)) == [
        "key7 is b'49'",
        "a transaction: [65]",
        "refused: WRONGTYPE Operation against a key holding the wrong kind of value",
        "0 closed",
        "given up; 1 closed",
        "the next one hears b'my own reply'",
        "key10 is b'100'",
    ]
    valkey.wait_for_connections(0)


VALKEY = {
    "api": "the_whole_client_goes_through_the_pool_and_leaves_nothing_borrowed",
    "refused": "a_refused_command_costs_no_connection",
    "exhausted": "an_exhausted_pool_is_an_error_that_the_clients_callers_know",
    "down": "a_server_that_cannot_be_reached_is_the_clients_own_error",
    "given_up": "a_kill_and_a_time_limit_discard_and_the_reply_reaches_nobody",
    "cleaned": "what_a_borrower_changed_is_taken_back_on_the_same_connection",
    "half_read": "a_connection_that_is_given_back_before_its_reply_has_come_is_discarded",
    "hung_up": "a_connection_that_the_server_closed_while_it_idled_is_replaced_and_nobody_notices",
    "asked": "the_keepalive_is_a_ping",
    "crowd": "of_fifty_a_third_is_killed_in_a_request_and_no_reply_is_wrong",
    "everywhere": "a_kill_at_any_switch_point_leaves_nothing_borrowed",
    "unwatching": "a_pipeline_that_forgets_its_connection_is_found_out_by_reclaim",
}


@pytest.mark.parametrize("scenario", VALKEY, ids=VALKEY.get)
def test_valkey_py(valkey: Valkey, scenario: str) -> None:
    play("recipes_valkey.py", scenario, str(valkey.port))


def test_valkey_that_is_restarted_costs_the_connections_and_nothing_else(valkey: Valkey) -> None:
    play("recipes_valkey.py", "restart", str(valkey.port), restarts=valkey)


# -- Valkey, with nothing but TcpConnection --


@pytest.fixture
def clean(valkey: Valkey) -> Iterator[Valkey]:
    """A server with empty databases; in the end no connection is left."""
    valkey.ask("FLUSHALL")
    yield valkey
    until(lambda: valkey.connections() == 0)


def resp_pool(
    port: int, size: int = 1, options: dict[str, Any] | None = None, kind: type[Resp] = Resp, **settings: Any
) -> Pool[Resp]:
    return Pool(
        kind,
        {"host": "127.0.0.1", "port": port, "timeout": BOUND} | (options or {}),
        max_connections=size,
        acquire_timeout=BOUND,
        check_after_idle=0,
        discard_on=OSError,
        **settings,
    )


def everyone(pool: Pool[Resp], valkey: Valkey, size: int) -> None:
    """As many as there may be hold a connection that works, at once, and the server counts no more."""
    held = [pool.acquire(timeout=BOUND) for _ in range(size)]
    assert [conn.call("ECHO", number) for number, conn in enumerate(held)] == [b"%d" % n for n in range(size)]
    until(lambda: valkey.connections() == size)
    for conn in held:
        pool.release(conn)
    assert (pool.in_use, pool.waiting) == (0, 0)


def test_the_resp_example_runs(clean: Valkey) -> None:
    assert run("resp.py", clean.host, str(clean.port)) == [
        r"key7 is b'\x07\x00\r\n'",
        "key77 is None",
        "a transaction: [4, ReplyError('ERR value is not an integer or out of range')]",
        "refused: ERR value is not an integer or out of range",
        "0 closed",
        "given up; 1 closed",
        "the next one hears b'my own reply'",
    ]


def test_resp_reads_every_kind_of_reply(clean: Valkey) -> None:
    with resp_pool(clean.port) as pool, pool.connection() as conn:
        assert conn.call("SET", "key", "grüße") == b"OK"
        assert conn.call("GET", b"key") == "grüße".encode()
        assert conn.call("GET", "nothing") is None
        assert conn.call("SET", "key", "") == b"OK"
        assert conn.call("GET", "key") == b""
        assert conn.call("DECRBY", "number", 7) == -7
        assert conn.call("INCRBYFLOAT", "float", 0.5) == b"0.5"
        assert conn.call("LRANGE", "nothing", 0, -1) == []
        assert conn.call("BLPOP", "nothing", 0.01) is None  # a nil that stands for an array
        nested = "return {1, {'a', {}, false, redis.error_reply('ERR inside')}, redis.status_reply('fine')}"
        (one, (a, empty, nil, error), fine) = conn.call("EVAL", nested, 0)  # type: ignore[misc]
        assert (one, a, empty, nil, fine) == (1, b"a", [], None, b"fine")
        assert isinstance(error, ReplyError)
        assert str(error) == "ERR inside"
        assert conn.call("PING") == b"PONG"


def test_resp_is_safe_for_any_bytes_of_any_size(clean: Valkey, rng: random.Random) -> None:
    with resp_pool(clean.port) as pool, pool.connection() as conn:
        for size in (1, 2, 8191, 8192, 8193, 1_000_000):
            data = rng.randbytes(size - 2) + b"\r\n" if size > 1 else b"\r"
            assert conn.call("ECHO", data) == data
            assert conn.call("SET", data[-9:], memoryview(data)) == b"OK"  # type: ignore[arg-type]
            assert conn.call("GET", data[-9:]) == data


def test_resp_refuses_what_cannot_be_sent_and_sends_nothing(clean: Valkey) -> None:
    with resp_pool(clean.port) as pool:
        for wrong in (None, True, ["a"], object()):
            with pytest.raises(TypeError, match="a command is made of"), pool.connection() as conn:
                conn.call("SET", "key", wrong)  # type: ignore[arg-type]
        everyone(pool, clean, 1)
        assert pool.stats().opened == 1


def test_resp_an_error_reply_costs_no_connection(clean: Valkey) -> None:
    with resp_pool(clean.port) as pool:
        for _ in range(3):
            with pytest.raises(ReplyError, match="ERR unknown command"), pool.connection() as conn:
                conn.call("NONSENSE")
        everyone(pool, clean, 1)
        assert pool.stats().opened == 1


WRONG = {
    "no kind": b"OK\r\n",
    "empty": b"\r\n",
    "no number": b":seven\r\n",
    "a number that never ends": b":" + b"9" * 5000 + b"\r\n",
    "no size": b"$\r\n",
    "a size below nil": b"$-2\r\n",
    "a size that is too small": b"$2\r\nabc\r\n",
    "an array below nil": b"*-2\r\n",
    "an array without an end": b"*1\r\n" * 40,
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "RESP3": b"%1\r\n+a\r\n+b\r\n",
}


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG)
def test_resp_what_is_no_reply_spoils_the_connection(reply: bytes) -> None:
    def answer(sock: Any) -> None:
        sock.recv(1024)
        say(reply)(sock)
        sock.recv(1024)

    with Server(answer) as server, resp_pool(server.port) as pool:
        with pytest.raises(ProtocolError, match="has sent what is no reply"), pool.connection() as conn:
            conn.call("PING")
        assert pool.stats().closed["discarded"] == 1
        # Nor can it be used on.
        with pytest.raises(ConnectionError, match="earlier reply"), pool.connection() as conn:
            with pytest.raises(ProtocolError):
                conn.call("PING")
            conn.call("PING")
        assert pool.stats().closed["discarded"] == 2


def test_resp_a_line_without_an_end_and_a_reply_that_breaks_off_spoil_it_too() -> None:
    def answer(sock: Any) -> None:
        sock.recv(1024)
        say(b"+" + b"x" * 100_000)(sock)

    def break_off(sock: Any) -> None:
        sock.recv(1024)
        say(b"*2\r\n$3\r\nabc\r\n$100\r\nabc")(sock)

    for handler in (answer, break_off):
        with Server(handler) as server, resp_pool(server.port) as pool:
            with pytest.raises(ConnectionError), pool.connection() as conn:
                conn.call("PING")
            assert pool.stats().closed["discarded"] == 1


def test_resp_a_reply_that_comes_in_pieces_is_put_together() -> None:
    whole = b"*3\r\n$6\r\na\r\n\r\nb\r\n:12\r\n*1\r\n+fine\r\n"
    cuts = (1, 3, 5, 8, 11, 14, 16, 20, 24, len(whole))
    pieces = [whole[start:end] for start, end in zip((0, *cuts), cuts, strict=False)]

    def answer(sock: Any) -> None:
        sock.recv(1024)
        say(*pieces)(sock)
        sock.recv(1024)

    with Server(answer) as server, resp_pool(server.port) as pool, pool.connection() as conn:
        assert conn.call("PING") == [b"a\r\n\r\nb", 12, [b"fine"]]


def test_resp_logs_in_and_chooses_the_database_in_open(clean: Valkey) -> None:
    clean.ask("ACL", "SETUSER", "recipe", "on", ">s3cret", "~*", "&*", "+@all")
    options = {"user": "recipe", "password": "s3cret", "db": 2}
    with resp_pool(clean.port, options=options) as pool, pool.connection() as conn:
        assert conn.call("ACL", "WHOAMI") == b"recipe"
        conn.call("SET", "key", "of database 2")
    assert clean.ask("EXISTS", "key") == ":0"
    mistakes: list[dict[str, Any]] = [{"user": "recipe", "password": "wrong"}, {"db": 99}]
    for wrong in mistakes:
        with resp_pool(clean.port, options=wrong) as pool:
            with pytest.raises(ReplyError):
                pool.acquire()
            assert pool.size == 0
        conn = Resp(clean.host, clean.port, **wrong)
        with pytest.raises(ReplyError):
            conn.open()
        assert not conn.is_connected()
    clean.ask("ACL", "DELUSER", "recipe")


def test_resp_what_a_borrower_changed_is_taken_back_on_the_same_connection(clean: Valkey) -> None:
    clean.ask("ACL", "SETUSER", "recipe", "on", ">s3cret", "~*", "&*", "+@all")
    for options in ({}, {"user": "recipe", "password": "s3cret", "db": 2}):
        with resp_pool(clean.port, options=options) as pool:

            def left(*commands: tuple[str, ...], pool: Pool[Resp] = pool) -> None:
                with pool.connection() as conn:
                    for command in commands:
                        conn.call(*command)

            with pool.connection() as conn:
                first = conn.call("CLIENT", "ID")
            left(("SELECT", "5"))
            left(("MULTI",), ("SET", "key", "queued"))
            left(("WATCH", "key"))
            left(("SUBSCRIBE", "news"))
            left(("client", "setname", "other"))
            left(("AUTH", "default", "any"))
            left(("MULTI",), ("SELECT", "6"), ("EXEC",))
            with pool.connection() as conn:
                assert conn.call("CLIENT", "ID") == first
                assert conn.call("ACL", "WHOAMI") == str(options.get("user", "default")).encode()
                assert conn.call("CLIENT", "GETNAME") is None
                found = clean.ask("CLIENT", "LIST", "ID", str(first))
                for state in (f" db={options.get('db', 0)} ", " flags=N ", " watch=0 ", " sub=0 "):
                    assert state in found, found
            # A transaction that is over, and what is watched no longer, need no RESET.
            left(("WATCH", "key"), ("MULTI",), ("PING",), ("EXEC",))
            left(("WATCH", "key"), ("UNWATCH",))
            assert " cmd=unwatch " in clean.ask("CLIENT", "LIST", "ID", str(first))
            assert pool.stats().opened == 1
    clean.ask("ACL", "DELUSER", "recipe")


def test_resp_a_connection_whose_reply_is_under_way_is_discarded_though_nothing_was_raised(
    clean: Valkey, logged: Logged
) -> None:
    with resp_pool(clean.port) as pool:
        with pool.connection() as conn:
            conn.socket.settimeout(0.1)
            with pytest.raises(TimeoutError):
                conn.call("BLPOP", "list", 0)
            with pytest.raises(ConnectionError, match="earlier reply"):
                conn.call("PING")
        (record,) = logged.take()
        assert "reset() failed; the connection is closed" in record.getMessage()
        clean.ask("RPUSH", "list", "not yours")
        with pool.connection() as conn:
            assert conn.call("ECHO", "yours") == b"yours"
            conn.call("SUBSCRIBE", "news")
            clean.ask("PUBLISH", "news", "not yours")
        (record,) = logged.take()
        assert "reset() failed" in record.getMessage()
        everyone(pool, clean, 1)
        assert pool.stats().closed["discarded"] == 2


def test_resp_a_connection_that_the_server_closed_while_it_idled_is_replaced_and_nobody_notices(clean: Valkey) -> None:
    with resp_pool(clean.port) as pool:
        with pool.connection() as conn:
            first = conn.call("CLIENT", "ID")
        assert clean.ask("CLIENT", "KILL", "ID", str(first)) == ":1"
        with pool.connection() as conn:
            assert conn.call("CLIENT", "ID") != first
        assert pool.stats().closed["stale"] == 1


def test_resp_the_keepalive_is_a_ping(clean: Valkey) -> None:
    with resp_pool(clean.port, keepalive=0.1) as pool:
        with pool.connection() as conn:
            first = conn.call("CLIENT", "ID")
        until(lambda: " cmd=ping " in clean.ask("CLIENT", "LIST", "ID", str(first)))
        assert pool.stats().closed["stale"] == 0
        pool.close(timeout=BOUND)  # one may be under way


def test_resp_a_server_that_is_restarted_costs_the_connections_and_nothing_else(valkey: Valkey) -> None:
    with resp_pool(valkey.port, 4) as pool:
        everyone(pool, valkey, 4)
        failures: list[Exception] = []

        def wait_for_ever() -> None:
            try:
                with pool.connection() as conn:
                    conn.call("BLPOP", "nothing", 0)
            except ConnectionError as error:
                failures.append(error)

        jobs = [gevent.spawn(wait_for_ever) for _ in range(2)]
        until(lambda: valkey.blocked() == 2)
        valkey.restart()
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert len(failures) == 2
        failures.clear()
        everyone(pool, valkey, 4)
        closed = pool.stats().closed
        assert (closed["discarded"], closed["stale"]) == (2, 2)


def test_resp_of_fifty_a_third_is_killed_in_a_request_and_no_reply_is_wrong(clean: Valkey, rng: random.Random) -> None:
    wrong: list[str] = []
    replies: list[Any] = []
    waiting: set[int] = set()
    counted: list[int] = []
    victims = {number: rng.randrange(20) for number in rng.sample(range(50), 50 // 3)}

    def borrower(number: int) -> None:
        for turn in range(20):
            token = f"{number}.{turn}".encode()
            with pool.connection() as conn:
                if victims.get(number) == turn:
                    waiting.add(number)
                    conn.call("BLPOP", f"for {number}", 0)
                reply = conn.call("ECHO", token)
            replies.append(reply)
            if reply != token:
                wrong.append(f"{reply!r} to {token!r}")

    with resp_pool(clean.port, 8) as pool:
        jobs = [gevent.spawn(borrower, number) for number in range(50)]
        for _ in victims:
            until(lambda: waiting)
            victim = waiting.pop()
            jobs[victim].kill(block=False)
            gevent.sleep(0)
            clean.ask("RPUSH", f"for {victim}", "the reply that nobody waits for")
            counted.append(clean.connections())
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert sum(isinstance(job.value, gevent.GreenletExit) for job in jobs) == len(victims)
        assert wrong == []
        assert len(replies) == 34 * 20 + sum(victims.values())
        assert max(counted) <= 8, counted
        everyone(pool, clean, 8)
        assert pool.stats().closed["discarded"] == len(victims)


class Slow(Resp):
    """Each line is waited for, even if it is there already, so that there is a switch point before it."""

    def recv_until(self, sep: bytes | bytearray, limit: int = 65536) -> bytes:
        gevent.sleep(0.001)
        return super().recv_until(sep, limit)


def test_resp_a_kill_at_any_switch_point_leaves_nothing_borrowed(clean: Valkey) -> None:
    def conversation(knife: Knife) -> None:
        knife.aim()
        with pool.connection() as conn:
            conn.call("ECHO", "not yours")
            conn.call("SELECT", 3)  # so there is a RESET
        with pool.connection() as conn:
            conn.call("EVAL", "return {'not', {'yours'}}", 0)

    struck = 0
    with resp_pool(clean.port, 2, kind=Slow) as pool:
        for when in ASLEEP, WAKING:
            point = 0
            while True:
                point += 1
                with Knife(point, when) as knife:
                    job = gevent.spawn(conversation, knife)
                    job.join(BOUND)
                assert job.ready()
                with pool.connection() as conn:
                    assert conn.call("ECHO", "yours") == b"yours"
                    assert " db=0 " in clean.ask("CLIENT", "LIST", "ID", str(conn.call("CLIENT", "ID")))
                everyone(pool, clean, 2)
                if not knife.struck:  # there were fewer
                    assert job.successful(), job.exception
                    break
                assert isinstance(job.value, gevent.GreenletExit), (when, point, job.value, job.exception)
                struck += 1
    assert struck >= 14, struck


# -- With threads --


def for_threads(example: str) -> dict[str, Any]:
    """The names of an example, changed as its page says."""
    source = (ROOT / "examples" / example).read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if not line.startswith(("from gevent import monkey", "monkey."))]
    changed = "\n".join(lines).replace("from gsocketpool import", "from gsocketpool.threading import")
    names: dict[str, Any] = {"__name__": f"{example} for threads"}
    exec(changed.replace('monkey.get_original("select", "poll")', "select.poll"), names)
    assert names["Pool"] is gsocketpool.threading.Pool
    return names


def in_threads(ask: Callable[[str], object]) -> None:
    """Eight threads ask for their own words to be repeated."""
    wrong: list[object] = []

    def talk(number: int) -> None:
        for turn in range(10):
            token = f"{number}.{turn}"
            answer = ask(token)
            if answer not in (token, token.encode()):
                wrong.append((token, answer))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
    assert wrong == []


def test_the_postgresql_recipe_serves_threads(postgres: Postgres) -> None:
    names = for_threads("postgres.py")

    def ask(token: str) -> object:
        with pool.connection() as conn:
            conn.execute("BEGIN")
            return conn.execute("SELECT %s::text", [token]).fetchone()[0]

    with names["Pool"](names["connections"](postgres.dsn), max_connections=4, acquire_timeout=BOUND) as pool:
        in_threads(ask)
        assert (pool.stats().acquired, pool.in_use) == (80, 0)
        assert pool.stats().opened <= 4
    postgres.wait_for_connections(0)


def test_the_valkey_recipe_serves_threads(valkey: Valkey) -> None:
    names = for_threads("valkey_client.py")
    connection_pool = names["ConnectionPool"](
        max_connections=4, settings={"acquire_timeout": BOUND}, host=valkey.host, port=valkey.port
    )
    client = names["valkey"].Redis(connection_pool=connection_pool)
    in_threads(client.echo)
    assert (connection_pool.pool.stats().acquired, connection_pool.pool.in_use) == (80, 0)
    assert connection_pool.pool.stats().opened <= 4
    connection_pool.close()
    valkey.wait_for_connections(0)


def test_the_resp_recipe_serves_threads(valkey: Valkey) -> None:
    names = for_threads("resp.py")

    def ask(token: str) -> object:
        with pool.connection() as conn:
            conn.call("SELECT", 3)
            return conn.call("ECHO", token)

    options = {"host": valkey.host, "port": valkey.port, "timeout": BOUND}
    with names["Pool"](names["Resp"], options, max_connections=4, acquire_timeout=BOUND) as pool:
        in_threads(ask)
        assert (pool.stats().acquired, pool.in_use) == (80, 0)
        assert pool.stats().opened <= 4
    valkey.wait_for_connections(0)

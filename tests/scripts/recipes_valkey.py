"""Pools as in ``examples/valkey_client.py``, one scenario for each run: ``recipes_valkey.py SCENARIO SEED PORT``.

It prints nothing and exits 0 if all is well; but for `restart`, which says when it wants the server restarted.
"""

from __future__ import annotations

from tests import patched

patched.by("gevent")

import importlib
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent

from gsocketpool import Pool, PoolExhaustedError
from tests.knife import ASLEEP, WAKING, Knife

recipe: Any = importlib.import_module("examples.valkey_client")
valkey: Any = recipe.valkey

BOUND = 20.0
HOST, PORT = "127.0.0.1", int(sys.argv[3])


class Logged(logging.Handler):
    """Takes down what is logged; whatever a scenario does not expect fails it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.texts.append(f"{record.name}: {record.getMessage()} {error}")

    def expect(self, count: int, text: str) -> None:
        """So many records that contain this, and no others."""
        assert [text in found for found in self.texts] == [True] * count, self.texts
        self.texts.clear()


logged = Logged()
asking: Any = valkey.Redis(HOST, PORT, client_name="asking", decode_responses=True)


def clients() -> list[dict[str, str]]:
    """What the server sees, this question's own connection not included."""
    return [client for client in asking.client_list() if client["name"] != "asking"]


def until(condition: Callable[[], object]) -> None:
    with gevent.Timeout(BOUND):
        while not condition():
            gevent.sleep(0.002)


@contextmanager
def raises(kind: type[BaseException]) -> Iterator[Any]:
    caught: list[BaseException] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
        return
    raise AssertionError(f"no {kind.__name__}")


def raw_pool(size: int = 1, settings: dict[str, Any] | None = None, **options: Any) -> Pool[Any]:
    options = {"host": HOST, "port": PORT, "socket_timeout": BOUND} | options
    settings = {"acquire_timeout": BOUND, "check_after_idle": 0} | (settings or {})
    return Pool(recipe.connections(**options), max_connections=size, discard_on=recipe.SPOILING, **settings)


@contextmanager
def client_of(size: int = 1, settings: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A client over a pool, which serves as many as it should in the end."""
    options = {"host": HOST, "port": PORT, "socket_timeout": BOUND} | options
    settings = {"acquire_timeout": BOUND, "check_after_idle": 0} | (settings or {})
    connection_pool = recipe.ConnectionPool(max_connections=size, settings=settings, **options)
    yield valkey.Redis(connection_pool=connection_pool)
    everyone(connection_pool.pool, size)
    connection_pool.close()
    with raises(valkey.ConnectionError):
        connection_pool.get_connection()


def call(conn: Any, *words: Any) -> Any:
    conn.send_command(*words)
    return conn.read_response()


def everyone(pool: Pool[Any], size: int) -> None:
    """As many as there may be hold a connection that works, at once, and the server counts no more."""
    held = [pool.acquire(timeout=BOUND) for _ in range(size)]
    assert [call(conn, "ECHO", number) for number, conn in enumerate(held)] == [b"%d" % n for n in range(size)]
    until(lambda: len(clients()) == size)
    for conn in held:
        pool.release(conn)
    assert (pool.in_use, pool.waiting) == (0, 0)


def closed(client: Any) -> int:
    return sum(client.connection_pool.pool.stats().closed.values())


# The whole client


def api(_: None) -> None:
    """What the client can do goes through the pool, and leaves nothing borrowed."""
    with client_of(3) as client:
        pool = client.connection_pool.pool
        assert client.ping() is True
        assert client.set("text", "grüße") is True
        assert client.get("text") == "grüße".encode()
        assert client.rpush("list", *range(5)) == 5
        assert client.lrange("list", 0, -1) == [b"%d" % n for n in range(5)]
        assert client.mset({f"scan{n}": n for n in range(100)}) is True
        assert len(set(client.scan_iter("scan*", count=10))) == 100
        assert client.pipeline(transaction=False).set("a", 1).incr("a").get("a").execute() == [True, 2, b"2"]
        assert client.pipeline().set("a", 1).incr("a").get("a").execute() == [True, 2, b"2"]
        assert client.transaction(lambda pipe: (pipe.get("a"), pipe.multi(), pipe.incr("a"))[1], "a") == [3]
        assert client.register_script("return {KEYS[1], ARGV[1]}")(keys=["k"], args=["v"]) == [b"k", b"v"]
        with client.lock("lock", timeout=10):
            assert client.exists("lock") == 1
        assert client.exists("lock") == 0
        with client.monitor() as monitor:
            client.echo("overheard")
            while "overheard" not in monitor.next_command()["command"]:
                pass
        subscriber = client.pubsub()
        subscriber.subscribe("news")
        assert subscriber.get_message(timeout=BOUND)["type"] == "subscribe"
        assert client.publish("news", "hello") == 1
        assert subscriber.get_message(timeout=BOUND)["data"] == b"hello"
        assert pool.in_use == 1
        subscriber.close()
        with client.client() as single:
            assert single.connection is not None
            assert single.ping() is True
        assert pool.in_use == 0
        assert pool.stats().opened <= 5, pool.stats()
        assert closed(client) == 2  # the monitor's and the subscriber's
        until(lambda: len(clients()) <= 3)
    other = recipe.ConnectionPool.from_url(f"redis://{HOST}:{PORT}/3?max_connections=2&decode_responses=true")
    client = valkey.Redis(connection_pool=other)
    assert client.set("only", "here") is True
    assert client.get("only") == "here"
    assert asking.get("only") is None
    assert other.pool.stats().max_connections == 2
    client.flushdb()
    other.disconnect()
    assert other.pool.idle == 0
    assert client.get("only") is None
    other.close()
    secure = recipe.ConnectionPool.from_url("rediss://localhost")
    assert issubclass(secure.connection_class, valkey.SSLConnection)
    secure.close()


def refused(_: None) -> None:
    """A refused command, a watched key that changed, an argument that cannot be sent: none costs a connection."""
    with client_of() as client:
        client.set("text", "no number")
        for _turn in range(3):
            with raises(valkey.ResponseError):
                client.incr("text")
            with raises(valkey.ResponseError):
                client.pipeline().incr("text").get("text").execute()
            with raises(valkey.ResponseError):
                client.pipeline(transaction=False).incr("text").get("text").execute()
            with raises(valkey.DataError):
                client.set("text", object())
            with raises(valkey.WatchError), client.pipeline() as pipe:
                pipe.watch("text")
                asking.set("text", "changed")
                pipe.multi()
                pipe.get("text")
                pipe.execute()
        assert client.connection_pool.pool.stats().opened == 1
        assert closed(client) == 0


def exhausted(_: None) -> None:
    """If no connection is to be had, that is an error that callers of the client know."""
    with client_of(settings={"leak_threshold": 600}) as client:
        subscriber = client.pubsub()
        subscriber.subscribe("news")
        pool = client.connection_pool.pool
        patient, pool.acquire = pool.acquire, lambda: patient(timeout=0.1)
        with raises(valkey.ConnectionError) as caught:
            client.ping()
        pool.acquire = patient
        assert isinstance(caught[0].__cause__, PoolExhaustedError)
        assert "1 of at most 1 in use" in str(caught[0])
        subscriber.close()
        assert client.ping() is True


def down(_: None) -> None:
    """If the server cannot be reached, that is the client's own error."""
    connection_pool = recipe.ConnectionPool(host=HOST, port=1, settings={"acquire_timeout": BOUND})
    with raises(valkey.ConnectionError) as caught:
        valkey.Redis(connection_pool=connection_pool).ping()
    assert "refused" in str(caught[0])
    assert caught[0].__cause__ is None
    assert (connection_pool.pool.in_use, connection_pool.pool.size) == (0, 0)
    with raises(NotImplementedError):
        connection_pool.set_retry(None)
    connection_pool.close()


def given_up(_: None) -> None:
    """A time limit and a kill in the middle of a request cost the connection, and nobody gets that reply."""
    with client_of() as client:
        client.ping()  # so that it need not dial within the time limit

        def time_out() -> None:
            with raises(gevent.Timeout), gevent.Timeout(0.2):
                client.blpop("queue")

        def wait_for_ever() -> None:
            client.blpop("queue")

        for number, way in enumerate((time_out, wait_for_ever), start=1):
            job = gevent.spawn(way)
            if way is time_out:
                job.get(timeout=BOUND)
            else:
                until(lambda: any("b" in each["flags"] for each in clients()))
                job.kill()
            asking.rpush("queue", "not yours")
            assert client.echo("yours") == b"yours"
            assert closed(client) == number
            asking.delete("queue")


# Connections alone


def cleaned(_: None) -> None:
    """What a borrower changed, its successor does not find, on the same connection."""
    asking.mset({"text": "of database 0"})
    asking.execute_command("ACL", "SETUSER", "recipe", "on", ">s3cret", "~*", "&*", "+@all")
    logins: list[dict[str, Any]] = [{}, {"username": "recipe", "password": "s3cret", "db": 2}, {"protocol": 3}]
    for options in logins:
        with raw_pool(**options) as pool:
            with pool.connection() as conn:
                first = call(conn, "CLIENT", "ID")

            def left(*commands: tuple[str, ...], pool: Any = pool) -> None:
                with pool.connection() as conn:
                    for command in commands:
                        call(conn, *command)

            left(("SELECT", "5"))
            left(("MULTI",), ("SET", "text", "queued"))
            left(("WATCH", "text"))
            if "protocol" not in options:  # where it is not answered by a reply
                left(("SUBSCRIBE", "news"))
            left(("CLIENT", "SETNAME", "other"))
            left(("AUTH", "default", "any"))
            with pool.connection() as conn:
                conn.send_packed_command(conn.pack_commands([("MULTI",), ("SELECT", "6"), ("EXEC",)]))
                assert [conn.read_response() for _ in range(3)][2] == [b"OK"]
            with pool.connection() as conn:
                assert call(conn, "CLIENT", "ID") == first
                assert call(conn, "ACL", "WHOAMI") == options.get("username", "default").encode()
                assert call(conn, "CLIENT", "GETNAME") is None
                (me,) = [each for each in clients() if each["id"] == str(first)]
                assert (me["db"], me["flags"], me["watch"], me["sub"]) == (str(options.get("db", 0)), "N", "0", "0")
                assert me["resp"] == str(options.get("protocol", 2))
            assert pool.stats().opened == 1
            # A transaction that is over, and what is watched no longer, need no RESET.
            left(("MULTI",), ("PING",), ("EXEC",))
            left(("WATCH", "text"), ("UNWATCH",))
            (me,) = clients()
            assert me["cmd"] == "unwatch"
    asking.execute_command("ACL", "DELUSER", "recipe")


def half_read(_: None) -> None:
    """A borrower that leaves before its reply has come costs the connection, though it raised nothing."""
    with raw_pool() as pool:
        with pool.connection() as conn:
            conn.send_command("ECHO", "not yours")
        logged.expect(1, "given back before all replies had come")
        with pool.connection() as conn:
            assert call(conn, "ECHO", "yours") == b"yours"
            conn.send_packed_command(conn.pack_commands([("ECHO", "yours"), ("ECHO", "not yours")]))
            assert conn.read_response() == b"yours"
        logged.expect(1, "given back before all replies had come")
        with pool.connection() as conn:
            conn.disconnect()
        logged.expect(1, "the connection was closed by its borrower")
        with pool.connection() as conn:
            call(conn, "SUBSCRIBE", "news")
            assert asking.publish("news", "unread") == 1
        logged.expect(1, "something else before it answered RESET")
        everyone(pool, 1)
        assert pool.stats().closed["discarded"] == 4


def hung_up(_: None) -> None:
    """A connection that the server closes while it idles is replaced, and nobody notices; likewise one that talks."""
    with raw_pool() as pool:
        everyone(pool, 1)
        assert asking.client_kill_filter(_id=clients()[0]["id"]) == 1
        everyone(pool, 1)
        assert pool.stats().closed["stale"] == 1
    with client_of() as client:
        client.ping()
        assert asking.client_kill_filter(_id=clients()[0]["id"]) == 1
        assert client.ping() is True
        assert client.connection_pool.pool.stats().closed["stale"] == 1


def asked(_: None) -> None:
    """The keepalive is a PING, and finds out who no longer answers."""
    with raw_pool(settings={"keepalive": 0.1}) as pool:
        with pool.connection() as conn:
            call(conn, "GET", "text")
        until(lambda: [each["cmd"] for each in clients()] == ["ping"])
        assert pool.stats().closed["stale"] == 0


# Faults


def restart(_: None) -> None:
    """After a restart of the server whoever comes gets a new connection."""
    with client_of(4) as client:

        def wait_for_ever() -> None:
            with raises(valkey.ConnectionError):
                client.blpop("queue")

        jobs = [gevent.spawn(wait_for_ever) for _ in range(2)]
        until(lambda: sum("b" in each["flags"] for each in clients()) == 2)
        pool = client.connection_pool.pool
        with pool.connection(), pool.connection():
            pass
        asking.close()
        print("restart it", flush=True)
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert sys.stdin.readline() == "done\n"
        everyone(pool, 4)
        assert pool.stats().closed["stale"] == 2
        assert pool.stats().opened == 8


def crowd(_: None) -> None:
    """Fifty greenlets over eight connections, a third of them killed in the middle of a request: no wrong reply."""
    rng = random.Random(sys.argv[2])
    wrong: list[str] = []
    replies: list[Any] = []
    waiting: set[int] = set()
    counted: list[int] = []
    victims = {number: rng.randrange(20) for number in rng.sample(range(50), 50 // 3)}

    def borrower(number: int, client: Any) -> None:
        for turn in range(20):
            token = f"{number}.{turn}".encode()
            if victims.get(number) == turn:
                waiting.add(number)
                client.blpop(f"for {number}")
            if turn % 3:
                reply = client.echo(token)
            else:
                (reply, _) = client.pipeline(transaction=bool(turn % 2)).echo(token).get("text").execute()
            replies.append(reply)
            if reply != token:
                wrong.append(f"{reply!r} to {token!r}")

    with client_of(8) as client:
        jobs = [gevent.spawn(borrower, number, client) for number in range(50)]
        for turn in range(len(victims)):
            until(lambda: waiting)
            if turn % 2:  # those that have a connection already
                until(lambda: any("b" in each["flags"] for each in clients()))
            victim = waiting.pop()
            jobs[victim].kill(block=False)
            asking.rpush(f"for {victim}", "the reply that nobody waits for")
            counted.append(len(clients()))
        gevent.joinall(jobs, timeout=BOUND, raise_error=True)
        assert sum(isinstance(job.value, gevent.GreenletExit) for job in jobs) == len(victims)
        assert wrong == []
        assert len(replies) == 34 * 20 + sum(victims.values())
        assert max(counted) <= 8, counted


def everywhere(_: None) -> None:
    """A kill at each single switch point of a conversation leaves no connection behind, and no wrong reply."""

    def conversation(client: Any) -> None:
        client.echo("not yours")
        with client.pipeline() as pipe:
            pipe.watch("watched")
            pipe.get("watched")
            pipe.multi()
            pipe.incr("watched")
            pipe.execute()
        subscriber = client.pubsub()
        try:
            subscriber.subscribe("news")
            subscriber.get_message(timeout=BOUND)
        finally:
            subscriber.close()
        client.echo("not yours")

    at_every_point(conversation)


def unwatching(_: None) -> None:
    """Where a kill has valkey-py forget its connection, the pool takes it back when the greenlet has ended."""

    def conversation(client: Any) -> None:
        with client.pipeline() as pipe:
            pipe.watch("watched")  # and leaves without execute(), so that it says UNWATCH

    at_every_point(conversation, reclaim=True)
    logged.expect(len(logged.texts) or 1, "ended without releasing a connection, which is closed")


class Slow(valkey.Connection):  # type: ignore[misc]
    """Each reply is waited for, even if it is there already, so that there is a switch point before it."""

    def read_response(self, *args: Any, **options: Any) -> Any:
        gevent.sleep(0.001)
        return super().read_response(*args, **options)


def at_every_point(conversation: Callable[[Any], None], **settings: Any) -> None:
    def be_the_victim(client: Any, knife: Knife) -> None:
        knife.aim()
        conversation(client)

    asking.set("watched", 0)
    struck = 0
    with client_of(2, settings, connection_class=Slow) as client:
        client.ping()
        for when in ASLEEP, WAKING:
            point = 0
            while True:
                point += 1
                with Knife(point, when) as knife:
                    job = gevent.spawn(be_the_victim, client, knife)
                    job.join(BOUND)
                assert job.ready()
                assert client.echo("yours") == b"yours"
                everyone(client.connection_pool.pool, 2)
                if not knife.struck:  # there were fewer
                    assert job.successful(), job.exception
                    break
                assert isinstance(job.value, gevent.GreenletExit), (when, point, job.value, job.exception)
                struck += 1
    assert struck >= 4, struck


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        api,
        refused,
        exhausted,
        down,
        given_up,
        cleaned,
        half_read,
        hung_up,
        asked,
        restart,
        crowd,
        everywhere,
        unwatching,
    )
}

if __name__ == "__main__":
    logging.getLogger().addHandler(logged)
    asking.flushall()
    SCENARIOS[sys.argv[1]](None)
    until(lambda: not clients())
    asking.close()
    logged.expect(0, "")

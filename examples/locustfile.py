"""Locust users who share a pool of TCP connections.

Run it: locust -f locustfile.py --host tcp://127.0.0.1:9000
"""

import itertools
import os
import time
from urllib.parse import urlsplit

from locust import User, constant_pacing, events, task
from locust.exception import RescheduleTask

from gsocketpool import Pool, TcpConnection

numbers = itertools.count(1)


class LineConnection(TcpConnection):
    def ask(self, question):
        self.send(question + b"\n")
        reply = self.recv_until(b"\n")
        if reply != question:  # the server is to echo
            raise ValueError(f"asked {question!r}, got {reply!r}")
        return reply


class PooledUser(User):
    """Borrows from one pool, that of all users in this process."""

    abstract = True
    host = "tcp://127.0.0.1:9000"  # where no --host is given
    pool = None

    def ask(self, name, question):
        """Ask one question. It counts twice: the wait for a connection, and the call itself."""
        kind, begun = "pool", time.perf_counter()
        try:
            with self.pool.connection() as conn:
                self.count(kind, name, begun)
                kind, begun = "tcp", time.perf_counter()
                reply = conn.ask(question)
        except Exception as error:
            self.count(kind, name, begun, error=error)
            raise RescheduleTask from error  # the task ends, and the next one begins
        self.count(kind, name, begun, len(reply))
        return reply

    def count(self, kind, name, begun, length=0, error=None):
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=(time.perf_counter() - begun) * 1000,
            response_length=length,
            exception=error,
            context=self.context(),
        )


@events.test_start.add_listener
def make_pool(environment, **_):
    where = urlsplit(environment.host or PooledUser.host)
    PooledUser.pool = Pool(
        LineConnection,
        {"host": where.hostname, "port": where.port, "connect_timeout": 2, "timeout": 5},
        max_connections=int(os.environ.get("MAX_CONNECTIONS", "5")),
        acquire_timeout=5,
        name="load",
    )


@events.test_stop.add_listener
def close_pool(**_):
    if PooledUser.pool is not None:
        PooledUser.pool.close(timeout=5)


class LineUser(PooledUser):
    wait_time = constant_pacing(0.05)

    @task
    def greet(self):
        self.ask("greeting", b"hello %d" % next(numbers))

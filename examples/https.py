"""Twenty greenlets share four HTTPS connections of http.client, and keep them alive.

Run it: python examples/https.py HOST PORT PATH [FILE WITH AUTHORITIES]
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before http.client is imported: it uses `socket` and `ssl`

import http.client
import ssl
import sys
from collections.abc import Mapping
from typing import Any

import gevent

from gsocketpool import Pool, PoolError, retry, wrap


class Response(http.client.HTTPResponse):
    """Remembers that it was closed before its end: then the rest of it is still to come."""

    cut_short = False

    def close(self) -> None:
        self.cut_short = self.cut_short or not self.isclosed()
        super().close()


class KeptAlive(http.client.HTTPSConnection):
    """An HTTPS connection that knows whether a next request can follow, and does not dial by itself."""

    auto_open = 0  # else it connects anew without a word, and nobody counts that socket
    response_class = Response
    response: http.client.HTTPResponse | None = None
    asked = False

    def putrequest(self, *args: Any, **kwargs: Any) -> None:  # so each request begins
        self.asked, self.response = True, None
        super().putrequest(*args, **kwargs)

    def getresponse(self) -> http.client.HTTPResponse:
        self.response = super().getresponse()
        return self.response

    def is_settled(self) -> bool:
        """Whether what was asked has been answered, and the answer read to its end."""
        if not self.asked:
            return True
        response = self.response
        if not isinstance(response, Response) or response.status < 200:
            return False
        return response.isclosed() and not response.cut_short

    def close(self) -> None:
        super().close()
        if self.response is not None:
            self.response.close()  # after "Connection: close" the socket is the response's


def dial(host: str, port: int, context: ssl.SSLContext) -> KeptAlive:
    conn = KeptAlive(host, port, timeout=5, context=context)  # seconds for each wait, those of the dial too
    try:
        conn.connect()
    except BaseException:
        conn.close()
        raise
    return conn


def is_quiet(conn: KeptAlive) -> bool:
    """Whether the server has neither hung up nor said anything. What TLS itself says, a ticket say, does not count."""
    sock = conn.sock
    if sock is None:
        return False
    timeout = sock.gettimeout()
    sock.settimeout(0)  # so that the next line does not wait
    try:
        sock.recv(1)
        return False  # the end, or a byte that nobody has asked for
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    except OSError:
        return False
    finally:
        sock.settimeout(timeout)


def finish(conn: KeptAlive) -> None:
    """See that nothing is left for the next borrower to read."""
    if not conn.is_settled():
        raise http.client.ResponseNotReady("given back before the response was read to its end")
    if not is_quiet(conn):
        raise http.client.NotConnected("the server has hung up, or says more than it was asked for")


def https_pool(host: str, port: int, context: ssl.SSLContext, **options: Any) -> Pool[KeptAlive]:
    usual: dict[str, Any] = {
        "max_connections": 4,
        "acquire_timeout": 5,
        "check_after_idle": 0,
        "idle_timeout": 50,
        "name": host,
    }
    return Pool(
        wrap(
            lambda: dial(host, port, context),
            check=is_quiet,
            reset=finish,
            fileno=lambda conn: None if conn.sock is None else conn.sock.fileno(),
        ),
        **(usual | options),
    )


def fetch(
    pool: Pool[KeptAlive],
    method: str,
    target: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request, once. Return the response, closed, and its body."""
    with pool.connection() as conn:
        conn.request(method, target, body, headers or {})
        with conn.getresponse() as response:
            content = response.read()  # all of it
        if conn.sock is None:  # "Connection: close", so http.client has closed it
            pool.drop(conn)
        return response, content


@retry(exc_classes=(OSError, http.client.IncompleteRead), deadline=10, max_failures=3)
def get(pool: Pool[KeptAlive], target: str) -> tuple[http.client.HTTPResponse, bytes]:
    """A request that may be sent twice, and is if the connection breaks."""
    return fetch(pool, "GET", target)


def main(host: str, port: str, target: str, authorities: str | None = None) -> None:
    context = ssl.create_default_context(cafile=authorities)  # one for all: it verifies chain and host name
    with https_pool(host, int(port), context, initial_connections=1) as pool:
        jobs = [gevent.spawn(get, pool, target) for _ in range(20)]
        try:
            gevent.joinall(jobs, raise_error=True)
        finally:
            gevent.killall(jobs)  # where one has failed the others need not go on
        print(sorted({job.get()[0].status for job in jobs}))
        stats = pool.stats()
        print(f"{stats.acquired} requests over at most {stats.max_connections} connections")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, http.client.HTTPException, PoolError) as error:
        sys.exit(str(error))

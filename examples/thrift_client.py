"""Twenty greenlets share four connections of thriftpy2's client.

Run it: python examples/thrift_client.py [HOST PORT]
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before thriftpy2 is imported: it uses `socket`

import select
import sys
import threading
from pathlib import Path
from typing import Any

import gevent
import thriftpy2
from thriftpy2.protocol import TBinaryProtocolFactory
from thriftpy2.server import TThreadedServer
from thriftpy2.thrift import TApplicationException, TClient, TException, TProcessor
from thriftpy2.transport import TBufferedTransportFactory, TServerSocket, TSocket

from gsocketpool import Connection, Pool, PoolError

stock: Any = thriftpy2.load(str(Path(__file__).parent / "stock.thrift"), module_name="stock_thrift")
poll = monkey.get_original("select", "poll")  # asked with a timeout of 0 it answers at once

#: What the service answers, be it an error. The connection is as good as before.
ANSWERS = (stock.NoSuchArticle, TApplicationException)


class StockClient(TClient, Connection):
    """The service's client, and a connection that can be pooled."""

    def __init__(self, host: str, port: int, timeout: float = 5) -> None:
        # These count in milliseconds; of each wait for the peer.
        self.tcp = TSocket(host, port, connect_timeout=timeout * 1000, socket_timeout=timeout * 1000)
        self.transport = TBufferedTransportFactory().get_transport(self.tcp)
        super().__init__(stock.Stock, TBinaryProtocolFactory().get_protocol(self.transport))

    def open(self) -> None:
        self.transport.open()

    def close(self) -> None:
        self.transport.close()

    def is_connected(self) -> bool:
        return bool(self.transport.is_open())

    def check(self) -> bool:
        """Whether the server has neither hung up nor sent anything unasked."""
        if not self.is_connected():
            return False
        look = poll()
        look.register(self.tcp.sock, select.POLLIN)
        return not look.poll(0)

    def keepalive(self) -> bool:
        self.ping()  # a method of the service that costs little: the protocol has none
        return True

    def fileno(self) -> int | None:
        return self.tcp.sock.fileno() if self.is_connected() else None


def stock_pool(host: str, port: int, timeout: float = 5, **options: Any) -> Pool[StockClient]:
    usual: dict[str, Any] = {"max_connections": 4, "acquire_timeout": 5, "keepalive": 60, "name": "stock"}
    return Pool(StockClient, {"host": host, "port": port, "timeout": timeout}, **(usual | options))


def call(pool: Pool[StockClient], method: str, *arguments: object) -> Any:
    """One call over a connection of the pool. An error that is the service's answer does not discard it."""
    with pool.connection() as client:
        try:
            return getattr(client, method)(*arguments)
        except ANSWERS as error:
            answer = error
    try:
        raise answer
    finally:
        del answer  # or error and frame would refer to each other


class Shelves:
    """The server's side: enough of one to have something to talk to."""

    def count(self, article: str) -> int:
        if article != "apple":
            raise stock.NoSuchArticle(article)
        return 12

    def ping(self) -> None:
        pass


def start_server() -> int:
    """Start one here, and return its port. Being patched, its threads are greenlets."""
    listener: Any = TServerSocket("127.0.0.1", 0, client_timeout=None)
    listener.listen()
    listener.listen = lambda: None  # the server would do it again
    server = TThreadedServer(TProcessor(stock.Stock, Shelves()), listener, daemon=True)
    threading.Thread(target=server.serve, daemon=True).start()
    return int(listener.sock.getsockname()[1])


def main(host: str = "127.0.0.1", port: str | None = None) -> None:
    with stock_pool(host, int(port) if port else start_server(), initial_connections=1) as pool:
        jobs = [gevent.spawn(call, pool, "count", "apple") for _ in range(20)]
        try:
            gevent.joinall(jobs, raise_error=True)
        finally:
            gevent.killall(jobs)  # where one has failed the others need not go on
        print([job.get() for job in jobs])
        try:
            call(pool, "count", "pear")
        except stock.NoSuchArticle as error:
            print("no such article:", error.name)
        stats = pool.stats()
        calls = f"{stats.acquired} calls over at most {stats.max_connections} connections"
        print(f"{calls}, {stats.closed['discarded']} discarded")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, TException, PoolError) as error:
        sys.exit(str(error))

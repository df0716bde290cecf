"""A hundred greenlets share ten connections to an echo server.

Run it: python examples/echo.py
"""

import gevent
from gevent.server import StreamServer

from gsocketpool import Pool, TcpConnection


def echo(sock, address):
    while data := sock.recv(1024):
        sock.sendall(data)


server = StreamServer(("127.0.0.1", 0), echo)
server.start()

pool = Pool(
    TcpConnection,
    {"host": "127.0.0.1", "port": server.server_port, "connect_timeout": 2, "timeout": 5},
    max_connections=10,
    acquire_timeout=5,
    name="echo",
)


def ask(number):
    with pool.connection() as conn:
        conn.send(b"hello %d\n" % number)
        return conn.recv_until(b"\n")


jobs = [gevent.spawn(ask, number) for number in range(100)]
replies = [job.get() for job in jobs]

print(f"{len(replies)} replies, the last is {replies[-1]!r}")
print(pool)
print(f"{pool.stats().acquired} times lent, {pool.stats().opened} connections opened")

pool.close()
server.stop()

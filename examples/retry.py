"""A server is restarted while greenlets talk to it. No request fails.

Run it: python examples/retry.py
"""

import logging

import gevent
from gevent.pool import Group
from gevent.server import StreamServer

from gsocketpool import Pool, TcpConnection, retry

logging.getLogger("gsocketpool").setLevel(logging.ERROR)  # that dials fail now and then is what we are here for


def echo(sock, address):
    while data := sock.recv(1024):
        gevent.sleep(0.002)
        sock.sendall(data)


def start(port=0):
    clients = Group()  # they are ended when the server is stopped
    server = StreamServer(("127.0.0.1", port), echo, spawn=clients.spawn)
    server.start()
    return server, clients


def stop(server, clients):
    server.stop()
    clients.kill()


server, clients = start()
port = server.server_port

pool = Pool(
    TcpConnection,
    {"host": "127.0.0.1", "port": port, "connect_timeout": 2, "timeout": 5},
    max_connections=4,
    acquire_timeout=5,
)


@retry(deadline=10)
def ask(question):
    with pool.connection() as conn:
        conn.send(question + b"\n")
        return conn.recv_until(b"\n")


def work(number):
    return [ask(b"question %d.%d" % (number, turn)) for turn in range(30)]


jobs = [gevent.spawn(work, number) for number in range(10)]

while pool.stats().acquired < 100:
    gevent.sleep(0.01)
stop(server, clients)
gevent.sleep(0.2)  # nobody is there
server, clients = start(port)

replies = [reply for job in jobs for reply in job.get()]
print(f"{len(replies)} requests answered, the last with {replies[-1]!r}")
print("connections that broke:", "some" if pool.stats().closed["discarded"] else "none")

pool.close()
stop(server, clients)

"""A pool is made and used before a fork. Parent and child go on with it, and never share a connection.

Run it: python examples/fork.py
"""

import atexit
import itertools
import os
import signal

import gevent.os
from gevent.server import StreamServer

from gsocketpool import Pool, TcpConnection

numbers = itertools.count(1)


def answer(sock, address):
    number = next(numbers)
    while data := sock.recv(1024):
        sock.sendall(b"%s on connection %d\n" % (data.strip(), number))


server = StreamServer(("127.0.0.1", 0), answer)
server.init_socket()
server_process = gevent.os.fork()
if server_process == 0:
    server.serve_forever()
server.close()  # here
atexit.register(os.kill, server_process, signal.SIGTERM)
host, port = server.address

pool = Pool(TcpConnection, {"host": host, "port": port, "timeout": 5}, acquire_timeout=5)


def ask(who):
    with pool.connection() as conn:
        conn.send(b"%s\n" % who)
        return conn.recv_until(b"\n").decode()


print(ask(b"the parent"), flush=True)

child = gevent.os.fork()
if child == 0:
    print(pool, flush=True)
    print(ask(b"the child"), flush=True)
    os._exit(0)

gevent.os.waitpid(child, 0)
print(ask(b"the parent"))
pool.close()

"""A greenlet is killed while it waits for a reply. The next borrower does not get that reply.

Run it: python examples/kill.py
"""

import gevent
from gevent.event import Event
from gevent.server import StreamServer

from gsocketpool import Pool, TcpConnection

asked = Event()
go_on = Event()


def slow_echo(sock, address):
    while data := sock.recv(1024):
        asked.set()
        go_on.wait()
        sock.sendall(data)


server = StreamServer(("127.0.0.1", 0), slow_echo)
server.start()

pool = Pool(TcpConnection, {"host": "127.0.0.1", "port": server.server_port}, max_connections=1)


def ask(question):
    with pool.connection(timeout=2) as conn:
        conn.send(question)
        return conn.recv()


alice = gevent.spawn(ask, b"alice's account")
asked.wait()  # the server is thinking, the only connection is in use
alice.kill()
go_on.set()  # now it answers alice, who is gone

print("bob gets:", ask(b"bob's account"))
print("closed since alice was interrupted:", pool.stats().closed["discarded"])

pool.close()
server.stop()

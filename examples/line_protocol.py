"""A connection of your own: a key-value store that speaks in lines and wants a login.

Run it: python examples/line_protocol.py
"""

import gevent
from gevent.server import StreamServer

from gsocketpool import Pool, TcpConnection


class StoreError(Exception):
    """The store refused a command. The connection is as good as before."""


class StoreConnection(TcpConnection):
    def __init__(self, host, port, user, password, **options):
        super().__init__(host, port, **options)
        self._user = user
        self._password = password
        self._requests = 0

    def open(self):
        super().open()
        self.ask(f"LOGIN {self._user} {self._password}")

    def reset(self):
        self.ask("USE main")  # the borrower may have changed to another database

    def is_expired(self):
        return self._requests > 10_000 or super().is_expired()

    def ask(self, command):
        self._requests += 1
        self.send(command.encode() + b"\r\n")
        status, _, text = self.recv_until(b"\r\n").decode().partition(" ")
        if status != "OK":
            raise StoreError(f"{command.split()[0]}: {text}")
        return text


class Store:
    """The server: enough of one to have something to talk to."""

    def __init__(self):
        self.logins = 0
        self.databases = {"main": {}, "archive": {}}

    def serve(self, sock, address):
        user, database = None, "main"
        with sock.makefile("rb") as lines:
            for line in lines:
                match line.decode().split():
                    case ["LOGIN", "app", "s3cret"]:
                        user = "app"
                        self.logins += 1
                        reply = "OK"
                    case _ if user is None:
                        reply = "NO log in first"
                    case ["USE", name] if name in self.databases:
                        database = name
                        reply = "OK"
                    case ["SET", key, value]:
                        self.databases[database][key] = value
                        reply = "OK"
                    case ["GET", key] if key in self.databases[database]:
                        reply = "OK " + self.databases[database][key]
                    case _:
                        reply = "NO such thing"
                sock.sendall(reply.encode() + b"\r\n")


def main():
    store = Store()
    server = StreamServer(("127.0.0.1", 0), store.serve)
    server.start()

    options = {"host": "127.0.0.1", "port": server.server_port, "user": "app", "password": "s3cret", "timeout": 5}
    pool = Pool(StoreConnection, options, max_connections=4, acquire_timeout=5, discard_on=OSError)

    def put(number):
        with pool.connection() as store:
            store.ask(f"SET key{number} {number * number}")

    with pool:
        gevent.joinall([gevent.spawn(put, number) for number in range(50)], raise_error=True)

        with pool.connection() as conn:
            print("key7 is", conn.ask("GET key7"))
            conn.ask("USE archive")  # reset() takes this back

        try:
            with pool.connection() as conn:
                conn.ask("GET nothing")
        except StoreError as error:
            print("refused:", error)

        print(f"{store.logins} logins for {pool.stats().acquired} uses")
        print(f"{pool.stats().closed['discarded']} discarded")
    server.stop()


if __name__ == "__main__":
    main()

"""valkey-py over this package's pool: its connections alone, and the whole client.

Run it: python examples/valkey_client.py 127.0.0.1 6379

For redis-py change one line: import redis as valkey
"""

from gevent import monkey

monkey.patch_all()  # valkey-py uses the standard library's sockets

import sys

import gevent
import valkey

from gsocketpool import Pool, PoolError, wrap

#: Commands that the next borrower would feel, and those that undo them.
LASTING = {"AUTH", "CLIENT", "HELLO", "MONITOR", "MULTI", "READONLY", "SELECT", "WATCH"}
LASTING |= {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"}
UNDOING = {"UNWATCH": {"WATCH"}, "EXEC": {"MULTI", "WATCH"}, "DISCARD": {"MULTI", "WATCH"}}


#: What leaves a connection in doubt. A ResponseError does not: it is a reply like any other.
SPOILING = (valkey.ConnectionError, valkey.TimeoutError, valkey.InvalidResponse, OSError)


class Pooled:
    """What is added to a connection of valkey-py's: it takes down what a borrower leaves behind, for `clean_up`."""

    def __init__(self, **options):
        self.awaited = 0  # replies
        self.left = set()  # commands whose effect lasts
        self.retired = False
        super().__init__(**options)

    def connect(self):
        if self.retired:  # valkey-py connects again by itself, and would have a socket that the pool knows nothing of
            raise valkey.ConnectionError("the pool has closed this connection")
        super().connect()

    def on_connect(self):
        before = self.awaited, set(self.left)  # valkey-py may connect again in the middle of a borrower's command
        super().on_connect()
        self.awaited, self.left = before

    def disconnect(self, *args):
        super().disconnect(*args)
        self.awaited = 0
        self.left.clear()

    def send_command(self, *words, **options):
        super().send_command(*words, **options)
        self._note(words[0])

    def pack_commands(self, commands):
        commands = list(commands)
        packed = super().pack_commands(commands)
        for words in commands:
            self._note(words[0])
        return packed

    def _note(self, command):
        self.awaited += 1
        name = (command.decode() if isinstance(command, bytes) else command).upper().partition(" ")[0]
        if name in LASTING:
            self.left.add(name)
        else:
            self.left -= UNDOING.get(name, set())

    def read_response(self, *args, **options):
        try:
            reply = super().read_response(*args, **options)
        except valkey.ResponseError:  # a reply as well
            self.awaited -= 1
            raise
        self.awaited -= 1
        return reply

    @property
    def is_open(self):
        """Whether there is a socket. valkey-py closes it by itself when a reply is not read to its end."""
        return self._sock is not None

    # What the pool calls

    def is_quiet(self):
        """Whether the server has neither hung up nor sent anything. It does not wait."""
        try:
            return self.is_open and not self.can_read(0)
        except (valkey.RedisError, OSError):
            return False

    def clean_up(self):
        """Take back what the borrower has changed."""
        if not self.is_open:
            raise valkey.ConnectionError("the connection was closed by its borrower, or after an error")
        if self.awaited:
            raise valkey.ConnectionError("the connection was given back before all replies had come")
        if self.left:
            self.send_command("RESET")
            if self.read_response() not in (b"RESET", "RESET"):
                raise valkey.ConnectionError("the server has sent something else before it answered RESET")
            self.left.clear()
            self.on_connect()  # logs in, and chooses the database

    def retire(self):
        self.retired = True
        self.disconnect()

    def is_alive(self):
        self.send_command("PING", check_health=False)
        return self.read_response() in (b"PONG", "PONG")

    def fileno(self):
        return self._sock.fileno() if self.is_open else None


def connections(kind=valkey.Connection, **options):
    """What a pool needs to know of valkey-py's connections.

    :param kind: `valkey.Connection`, `SSLConnection` or `UnixDomainSocketConnection`.
    :param options: for each of them: host, port, db, password, socket_timeout and so on.
    """
    pooled = type(f"Pooled{kind.__name__}", (Pooled, kind), {})

    def connect():
        conn = pooled(**options)
        conn.connect()
        return conn

    return wrap(
        connect,
        close=pooled.retire,
        check=pooled.is_quiet,
        reset=pooled.clean_up,
        keepalive=pooled.is_alive,
        fileno=pooled.fileno,
    )


class ConnectionPool(valkey.ConnectionPool):
    """What valkey-py takes as ``connection_pool=``, with a pool of this package beneath.

    :param max_connections: most sockets at any time.
    :param settings: what else that pool is to be given, a dictionary.
    :param options: for the connections, as above.
    """

    def __init__(self, connection_class=valkey.Connection, max_connections=50, settings=None, **options):
        super().__init__(connection_class, max_connections, **options)
        self.pool = Pool(
            connections(connection_class, **options),
            max_connections=max_connections,
            discard_on=SPOILING,
            **(settings or {}),
        )

    def get_connection(self, command_name=None, *keys, **options):
        try:
            return self.pool.acquire()
        except PoolError as error:
            raise valkey.ConnectionError(str(error)) from error  # what callers of valkey-py know

    def release(self, connection):
        if connection.is_open:
            self.pool.release(connection)
        else:  # after an error, and after each subscription
            self.pool.drop(connection)

    def disconnect(self, inuse_connections=True):
        """Retire all connections: idle ones now, those in use as they come back."""
        self.pool.clear()

    def close(self):
        self.pool.close()

    def set_retry(self, retry):
        raise NotImplementedError("give retry= to the ConnectionPool: its connections are made with that")


def main(host, port):
    options = {"host": host, "port": int(port), "socket_connect_timeout": 2, "socket_timeout": 5}
    settings = {"acquire_timeout": 5, "max_lifetime": 1800, "keepalive": 60, "leak_threshold": 30, "name": "valkey"}
    settings["initial_connections"] = 1  # if that fails, its error is raised here

    # The whole client. It is one object for all greenlets; each command borrows a connection.
    connection_pool = ConnectionPool(max_connections=4, settings=settings, **options)
    client = valkey.Redis(connection_pool=connection_pool)

    def put(number):
        client.set(f"key{number}", number * number, ex=60)

    jobs = [gevent.spawn(put, number) for number in range(50)]
    try:
        gevent.joinall(jobs, raise_error=True)
    finally:
        gevent.killall(jobs)  # where one has failed the others need not go on
    print("key7 is", client.get("key7"))

    with client.pipeline() as pipe:
        pipe.watch("key8")
        pipe.multi()
        pipe.incr("key8")
        print("a transaction:", pipe.execute())

    try:
        client.lpush("key9", "no list")
    except valkey.ResponseError as error:
        print("refused:", error)
    print(sum(connection_pool.pool.stats().closed.values()), "closed")

    try:
        with gevent.Timeout(0.2):
            client.blpop("nothing")
    except gevent.Timeout:
        print("given up;", sum(connection_pool.pool.stats().closed.values()), "closed")
    print("the next one hears", client.echo("my own reply"))
    connection_pool.close()

    # Connections alone, for who speaks to them directly.
    with Pool(connections(**options), max_connections=4, discard_on=SPOILING, **settings) as pool:
        with pool.connection() as conn:
            conn.send_command("SELECT", 3)
            conn.read_response()
        with pool.connection() as conn:
            conn.send_command("GET", "key10")  # not of database 3: that was taken back
            print("key10 is", conn.read_response())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (valkey.RedisError, OSError, PoolError) as error:
        sys.exit(str(error))

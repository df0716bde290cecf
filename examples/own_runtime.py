"""A runtime of your own: plain greenlets on a small loop, and a pool for them.

Run it: python examples/own_runtime.py
"""

import errno
import functools
import itertools
import os
import selectors
import socket
from collections import deque
from contextlib import contextmanager
from heapq import heappop, heappush
from threading import get_ident
from time import monotonic

from greenlet import GreenletExit, getcurrent, greenlet

from gsocketpool import PoolExhaustedError, connection
from gsocketpool.blocking import BlockingGroup, BlockingPool
from gsocketpool.group import Endpoint as GroupEndpoint
from gsocketpool.lifetime import NEVER
from gsocketpool.sockets import Sockets
from gsocketpool.upkeep import stirred

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Spot:
    """Somewhere to stand still."""

    waiter = None


class Loop:
    """Who has to wait switches to the hub, a greenlet that does nothing but call what is due."""

    def __init__(self):
        self._calls = deque()
        self._timers = []  # a heap
        self._numbers = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._thread = get_ident()
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self.listen(self._bell.fileno(), READ, lambda: self._bell.recv(4096))
        self.hub = greenlet(self._run)

    def _run(self):
        while True:
            while self._timers and self._timers[0][0] <= monotonic():
                heappop(self._timers)[2]()
            for _ in range(len(self._calls)):
                self._calls.popleft()()
            pause = 60.0 if not self._timers else self._timers[0][0] - monotonic()
            for key, _ in self._selector.select(0 if self._calls else max(0, min(pause, 60))):
                if key.fd in self._selector.get_map():  # still
                    key.data()

    def close(self):
        """End it. Whoever stands still stays there."""
        self.hub.throw(GreenletExit)
        for each in (self._selector, self._bell, self._rope):
            each.close()

    def call(self, function, *args):
        """Have it called soon. From any thread."""
        self._calls.append(functools.partial(function, *args))
        if get_ident() != self._thread:
            try:
                self._rope.send(b".")
            except BlockingIOError:
                pass  # it has been pulled often enough

    def call_later(self, seconds, function, *args):
        """Have it called after so many seconds. Answers a timer."""
        timer = [monotonic() + seconds, next(self._numbers), functools.partial(function, *args)]
        heappush(self._timers, timer)
        return timer

    def cancel(self, timer):
        """Do nothing when its time has come."""
        timer[2] = int

    def listen(self, descriptor, event, function):
        """Have it called while a descriptor can be read, or written. One function for each descriptor."""
        self._selector.register(descriptor, event, function)

    def unlisten(self, descriptor, function):
        """No longer."""
        key = self._selector.get_map().get(descriptor)
        if key is not None and key.data is function:  # else the number is another one's by now
            self._selector.unregister(descriptor)

    def hang_up(self, descriptor):
        """It is about to be closed: whoever waits for it goes on, and finds out."""
        key = self._selector.get_map().get(descriptor)
        if key is not None:
            self._selector.unregister(descriptor)
            self.call(key.data)

    def stand(self, spot, seconds=None):
        """Stand still until somebody calls `go_on(spot)`, or so many seconds have passed."""
        spot.waiter = getcurrent()
        timer = None if seconds in (None, NEVER) else self.call_later(seconds, self.go_on, spot)
        try:
            self.hub.switch()
        finally:  # killed, maybe
            spot.waiter = None
            if timer is not None:
                self.cancel(timer)

    def go_on(self, spot):
        """Let whoever stands there go on. The hub calls this, nobody else."""
        if spot.waiter is not None:
            spot.waiter.switch()

    def spawn(self, function, *args):
        """Run it in a greenlet of its own, soon."""
        task = greenlet(function, self.hub)
        self.call(task.switch, *args)
        return task

    def kill(self, task):
        """Raise GreenletExit where a greenlet stands."""
        self.call(lambda: task.dead or task.throw(GreenletExit))

    @contextmanager
    def limit(self, seconds):
        """A TimeoutError in the block, wherever it stands, after so many seconds. None: never."""
        timer = None
        if seconds is not None:
            timer = self.call_later(seconds, getcurrent().throw, TimeoutError(f"not done after {seconds:g} s"))
        try:
            yield
        finally:
            if timer is not None:
                self.cancel(timer)

    def wait(self, descriptor, event, seconds):
        """Stand still until a descriptor can be read, or written."""
        spot = Spot()
        wake = functools.partial(self.go_on, spot)
        self.listen(descriptor, event, wake)
        try:
            with self.limit(seconds):
                self.stand(spot)
        finally:
            self.unlisten(descriptor, wake)

    def sleep(self, seconds):
        """Let others run for so long."""
        self.stand(Spot(), seconds)


loop = Loop()


class Pool(BlockingPool):
    """A pool for the greenlets of `loop`."""

    _runtime = __name__  # what is not of this runtime is refused

    # These have to be there.

    def _park(self, place, limit):
        loop.stand(place, limit)

    def _wake(self, place):
        loop.call(loop.go_on, place)

    _rouse = _wake  # may be called from any thread, as `call` may

    def _spawn(self, job, *args):
        loop.call(_begin, job, args)

    def _sleeper(self):
        return loop.stand

    def _within(self, limit, function, *args):
        with loop.limit(limit):
            return function(*args)

    def _borrower(self):
        return getcurrent()

    def _may_raise(self, error):
        return not isinstance(error, GreenletExit)

    # These may be left out. With them, a server that hangs up is noticed at once.

    def _watch(self, descriptor, member):
        watch = descriptor, functools.partial(stirred, self._ref, member)
        loop.listen(descriptor, READ, watch[1])
        return watch

    def _unwatch(self, watch):
        loop.unlisten(*watch)


def _begin(job, args):
    greenlet(job).switch(*args)  # made by the hub, in the end, so that nobody can kill it before it has begun


class Endpoint(GroupEndpoint, Pool):
    """The pool of one endpoint of a group."""


class PoolGroup(BlockingGroup):
    """A pool for each endpoint."""

    _endpoint = Endpoint


class Socket(socket.socket):
    """A socket for which one waits by standing still."""

    _limit = None

    def settimeout(self, seconds):
        self._limit = seconds

    def gettimeout(self):
        return self._limit

    def recv(self, *args):
        return self._patiently(READ, super().recv, *args)

    def send(self, *args):
        return self._patiently(WRITE, super().send, *args)

    def sendall(self, data):
        while data:
            data = data[self.send(data) :]

    def connect(self, address):
        error = self.connect_ex(address)
        if error == errno.EINPROGRESS:
            loop.wait(self.fileno(), WRITE, self._limit)
            error = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    def _patiently(self, event, function, *args):
        while True:
            try:
                return function(*args)
            except BlockingIOError:
                loop.wait(self.fileno(), event, self._limit)


class LoopSockets(Sockets):
    """What the package's connections ask of a runtime."""

    _runtime = __name__

    def _new_socket(self, family, proto):
        sock = Socket(family, socket.SOCK_STREAM, proto)
        sock.setblocking(False)
        return sock

    def _getaddrinfo(self, host, port):
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)  # a real runtime would let others run meanwhile

    def _time_limit(self, seconds):
        return loop.limit(seconds)

    def _sleep(self, seconds):
        loop.sleep(seconds)

    def _peek(self, sock):
        return socket.socket.recv(sock, 1, socket.MSG_PEEK)

    def _hang_up(self, sock):
        loop.hang_up(sock.fileno())
        sock.close()


class TcpConnection(LoopSockets, connection.TcpConnection):
    """A TCP connection for the greenlets of `loop`. For TLS it would need a `_wrap_tls` besides."""


def main():
    """Borrow, wait, be late, be killed."""
    import socketserver
    import threading

    class Echo(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                if line != b"say nothing\n":
                    self.wfile.write(line)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    serving.start()

    options = {"host": "127.0.0.1", "port": server.server_address[1]}
    pool = Pool(TcpConnection, options, max_connections=3, acquire_timeout=10)
    replies = []

    def ask(question):
        with pool.connection() as conn:
            conn.send(question + b"\n")
            replies.append(conn.recv_until(b"\n"))

    def until(condition):
        with loop.limit(10):
            while not condition():
                loop.sleep(0.001)

    for number in range(30):
        loop.spawn(ask, b"hello %d" % number)
    until(lambda: len(replies) == 30 and pool.idle == 3)
    print(f"{len(set(replies))} replies over {pool.stats().opened} connections")

    silent = [loop.spawn(ask, b"say nothing") for _ in range(3)]
    until(lambda: pool.in_use == 3)
    try:
        pool.acquire(timeout=0.1)
    except PoolExhaustedError:
        print("none to be had in 0.1 s")

    loop.spawn(ask, b"is it my turn?")
    until(lambda: pool.waiting == 1)
    loop.kill(silent[0])
    until(lambda: len(replies) == 31)
    print(f"killed: {pool.stats().closed['discarded']}; the next one hears {replies[-1].decode()!r}")

    for task in silent:
        loop.kill(task)
    pool.close(timeout=10)
    print(pool)

    loop.close()
    server.shutdown()
    serving.join()
    server.server_close()


if __name__ == "__main__":
    main()

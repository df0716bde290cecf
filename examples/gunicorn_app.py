"""A WSGI application for gunicorn's gevent workers: each request borrows a connection and asks a server one line.

Run it: BACKEND_PORT=9000 gunicorn -c gunicorn_conf.py gunicorn_app:app
"""

import os

from gsocketpool import Pool, PoolError, TcpConnection


class LineConnection(TcpConnection):
    def ask(self, question):
        self.send(question + b"\n")
        return self.recv_until(b"\n")


pool = Pool(
    LineConnection,
    {
        "host": os.environ.get("BACKEND_HOST", "127.0.0.1"),
        "port": int(os.environ.get("BACKEND_PORT", "9000")),
        "connect_timeout": 2,
        "timeout": 10,
    },
    max_connections=4,  # of each worker
    min_idle=2,
    acquire_timeout=10,
    name="backend",
)


def app(environ, start_response):
    question = b"%d %s" % (os.getpid(), environ["QUERY_STRING"].encode())
    try:
        with pool.connection() as conn:
            status, reply = "200 OK", conn.ask(question)
    except (PoolError, OSError):  # all are in use, or this worker is about to end; or the backend is down or hung up
        status, reply = "503 Service Unavailable", b"try again"
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(reply)))])
    return [reply]

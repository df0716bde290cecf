"""gunicorn's settings for gunicorn_app.py."""

import os

workers = 2
worker_class = "gevent"
worker_connections = 100  # clients that one worker serves at once
graceful_timeout = 15


def worker_exit(server, worker):
    """Runs in a worker that ends, after its last request."""
    if worker.pid == os.getpid():
        from gunicorn_app import pool  # here: whatever this file imports at its top is loaded into the master

        pool.close(timeout=5)
        worker.log.info("drained: %r", pool)

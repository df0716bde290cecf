"""gunicorn's settings of the example, and what the test needs besides: a log line for each request that begins, and a
master that uses connections of its own, if it has loaded the application before it forks."""

import os
import runpy
from pathlib import Path
from typing import Any

globals().update(runpy.run_path(str(Path(__file__).parents[2] / "examples" / "gunicorn_conf.py")))

control_socket = "control"  # of each server its own


def pre_request(worker: Any, req: Any) -> None:
    worker.log.info("%d begins %s", os.getpid(), req.query)


def when_ready(server: Any) -> None:
    ask(server)


def child_exit(server: Any, worker: Any) -> None:
    ask(server)


def ask(server: Any) -> None:
    """The master uses its connections, before the first fork and after each child that has gone."""
    if server.cfg.preload_app:
        from gunicorn_app import pool  # type: ignore[import-not-found]

        pool.wait_ready(20)
        with pool.connection() as one, pool.connection() as other:
            question = b"%d master" % os.getpid()
            assert [one.ask(question), other.ask(question)] == [question, question]
        assert sum(pool.stats().closed.values()) == 0, pool.stats()
        server.log.info("the master has asked")

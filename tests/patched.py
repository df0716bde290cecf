"""psycopg waits in the `select` module, so a program under gevent or eventlet patches the standard library first. The
tests themselves do not, hence processes of their own."""

import os
import warnings


def by(runtime: str) -> None:
    """Patch it. Call this before anything else is imported."""
    if runtime == "gevent":
        from gevent import monkey

        monkey.patch_all()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is on its way out is no news here
            import eventlet
        eventlet.monkey_patch()
        # psycopg knows of gevent, and would else wait in C.
        os.environ["PSYCOPG_WAIT_FUNC"] = "wait_select"

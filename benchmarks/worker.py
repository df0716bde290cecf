"""Runs measurements in a process of its own: ``python -m benchmarks.worker [--patched]``.

Reads a list of jobs from standard input, each ``{"case": module, ...}``; calls ``measure(**job)`` of that module, one
after the other, and prints one line of JSON for each. ``--patched`` monkey-patches first, for pools made for threads.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Do the jobs."""
    if "--patched" in sys.argv[1:]:
        from gevent import monkey

        monkey.patch_all()

    import gc
    import importlib
    import json
    import time

    for job in json.load(sys.stdin):
        module = importlib.import_module(f"benchmarks.{job.pop('case')}")
        # What the job before left behind, pools that close themselves for instance, is not this one's to clear away.
        gc.collect()
        # A case of another runtime does not load gevent.
        sys.modules.get("gevent", time).sleep(0.01)
        print(json.dumps(module.measure(**job)), flush=True)


if __name__ == "__main__":
    main()

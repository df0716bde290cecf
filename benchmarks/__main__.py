"""``python -m benchmarks [--quick] [case ...]``: measures everything, or the cases that are named."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import os
import platform

import gsocketpool
from benchmarks import asyncio, listening, threads
from benchmarks import measure as m
from benchmarks.peers import PEERS

CASES = {
    "pair": "Uncontended: one acquire and release",
    "contended": "Contended: many greenlets, few connections",
    "echo": "Echo over real sockets",
    "growth": "Growth: many waiters, many idle connections",
    "endpoints": "Many endpoints",
    "kills": "The kill test",
    "threads": "Threads: unpatched, without gevent",
    "asyncio": "asyncio",
    "listening": "Listeners and metrics",
}


def head() -> str:
    """Say when, with what and on what this run measures."""
    now = datetime.datetime.now(datetime.timezone.utc)
    versions = [f"{platform.python_implementation()} {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in ("gevent", "greenlet")]
    versions += [f"gsocketpool {gsocketpool.__version__}"]
    peers = {
        peer.distribution: peer
        for peers in (PEERS, threads.PEERS, asyncio.PEERS, listening.PEERS)
        for peer in peers.values()
    }
    versions += [f"{name} {peer.version()}" for name, peer in peers.items() if peer.version()]
    if asyncio.uvloop_there():
        versions += [f"uvloop {importlib.metadata.version('uvloop')}"]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{now:%Y-%m-%d %H:%M} UTC; {', '.join(versions)};"
        f" {platform.system()} {platform.machine()}, {m.cores()} cores{load}"
    )


def main() -> None:
    """Measure, print a table for each case, and the targets at the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"which of: {', '.join(CASES)} (all)")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it works; figures mean nothing"
    )
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    run = m.Run(quick=options.quick)
    print(head())
    for case in options.cases or CASES:
        print(f"\n{CASES[case]}\n{'-' * len(CASES[case])}\n", flush=True)
        importlib.import_module(f"benchmarks.{case}").report(run)
    for note in run.notes:
        print(f"\nLeft out: {note}")
    if run.targets:
        print("\nTargets\n-------\n")
        print(m.table(["what", "target", "measured", "reached"], run.targets))


if __name__ == "__main__":
    main()

"""Contended: many greenlets, few connections; each acquires, lets the others run once, and releases."""

from __future__ import annotations

import time

import gevent

from benchmarks import measure as m
from benchmarks.fakes import Fake
from benchmarks.peers import PEERS

CONNECTIONS = 10


def measure(peer: str, greenlets: int, turns: int) -> m.Result:
    """Let them take turns; say how many were taken each second, and how long one waited."""
    built = PEERS[peer].build(Fake, CONNECTIONS)
    acquire, release, sleep, clock = built.acquire, built.release, gevent.sleep, time.perf_counter
    waits: list[float] = []
    ended = 0.0

    def borrower() -> None:
        nonlocal ended
        for _ in range(turns):
            began = clock()
            connection = acquire()
            waits.append(clock() - began)
            sleep(0)
            release(connection)
        ended = clock()

    borrowers = [gevent.spawn(borrower) for _ in range(greenlets)]
    began = clock()
    gevent.joinall(borrowers, raise_error=True)
    assert len(waits) == greenlets * turns
    waits.sort()
    return {
        "turns/s": len(waits) / (ended - began),
        "p50": m.percentile(waits, 0.5),
        "p99": m.percentile(waits, 0.99),
        "max": waits[-1],
    }


def report(run: m.Run) -> None:
    """Print the table."""
    names = run.available(PEERS, [name for name in PEERS if name != "ours, patient"])
    if run.quick:
        # It polls: its waiters sleep for a tenth of a second at a time.
        names = [name for name in names if name != "gsocketpool-0.1.6"]
    greenlets, turns = (100, 5) if run.quick else (1000, 20)
    results = run.side_by_side(
        {name: {"case": "contended", "peer": name, "greenlets": greenlets, "turns": turns} for name in names},
        patched=[name for name in names if PEERS[name].patched],
        processes=15,
        apart=True,  # hundreds of deep stacks leave little of the memory in one piece
    )
    floor = results["floor"]
    print(f"{greenlets:,} greenlets, {CONNECTIONS} connections, {turns} turns each; waits in milliseconds\n")
    print(
        m.table(
            ["pool", "turns/s", "best", "x floor", "p50", "p99", "max", "max x floor"],
            [
                [
                    PEERS[name].title,
                    f"{m.median(found, 'turns/s'):,.0f}",
                    f"{max(result['turns/s'] for result in found):,.0f}",
                    f"{m.ratio(found, floor, 'turns/s'):.2f}",
                    *(f"{m.median(found, key) * 1e3:,.1f}" for key in ("p50", "p99", "max")),
                    f"{m.ratio(found, floor, 'max'):.2f}",
                ]
                for name, found in results.items()
            ],
        )
    )
    for name, call in (("ours", "acquire()"), ("ours, for ever", "acquire(timeout=None)")):
        run.target(f"contended, turns, x floor's: {call}", m.ratio(results[name], floor, "turns/s"), at_least=0.6)
        run.target(f"contended, longest wait, x floor's: {call}", m.ratio(results[name], floor, "max"), at_most=1.5)

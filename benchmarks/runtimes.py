"""What the cases of threads and asyncio share: their tables and targets, and what psycopg_pool is fed with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from benchmarks import measure as m
from benchmarks.peer import Peer

#: How many times as good as the best peer a pool of these runtimes is meant to be.
TIMES = 3.0

#: The peers that serve whoever waits longest. With all others a newcomer can pass those who wait, which saves switches.
IN_ORDER = ("psycopg_pool",)

Peers = Mapping[str, Peer]
Results = Mapping[str, Sequence[m.Result]]


class PsycopgFacts:
    """What psycopg_pool looks at when a connection comes back: the fakes that it lends have it besides.

    That is fair, or favours it. Its pools lend connections of any class, and ask each that comes back whether it is
    in a transaction: an attribute here, a call of libpq there. The ``with`` block of a real one ends the transaction
    as well.
    """

    class pgconn:
        """In no transaction: what libpq calls ``PQTRANS_IDLE``."""

        transaction_status = 0


def summary(waits: list[float], seconds: float) -> m.Result:
    """Sum up how many turns were taken each second, and how long a borrower waited for his."""
    waits.sort()
    return {
        "turns/s": len(waits) / seconds,
        "p50": m.percentile(waits, 0.5),
        "p99": m.percentile(waits, 0.99),
        "max": waits[-1],
    }


def report_pairs(
    run: m.Run, label: str, peers: Peers, found: Mapping[tuple[str, str], Sequence[m.Result]], no_pools: Collection[str]
) -> None:
    """Print what one acquire and release cost, with columns for each way to write it."""
    results: dict[str, dict[str, Sequence[m.Result]]] = {}
    for (way, name), figures_of in found.items():
        results.setdefault(way, {})[name] = figures_of

    def figures(found: Sequence[m.Result] | None, ours: Sequence[m.Result] | None) -> list[str]:
        if not found:
            return ["", "", ""]
        return [
            f"{m.median(found, 'ns'):,.0f}",
            f"{min(result['ns'] for result in found):,.0f}",
            f"{m.ratio(found, ours, 'ns'):.2f}" if ours else "",
        ]

    print(
        m.table(
            ["nanoseconds", *(cell for way in results for cell in (way, "best", "x ours"))],
            [
                [peer.title, *(cell for ways in results.values() for cell in figures(ways.get(name), ways.get("ours")))]
                for name, peer in peers.items()
                if any(name in ways for ways in results.values())
            ],
        )
    )
    for way, ways in results.items():
        _target(run, f"{label}, uncontended {way}", ways, "ns", no_pools)


def report_turns(
    run: m.Run, label: str, peers: Peers, results: Results, no_pools: Collection[str], *, targets: bool = True
) -> None:
    """Print how many turns the borrowers took, and how long they waited."""
    floor = results["floor"]
    print(
        m.table(
            ["waits in milliseconds", "turns/s", "best", "x floor", "p50", "p99", "max", "max x floor"],
            [
                [
                    peers[name].title,
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
    if not targets:
        return
    _target(run, f"{label}, contended turns", results, "turns/s", no_pools)
    in_order = {name: found for name, found in results.items() if name in (*IN_ORDER, "ours")}
    _target(run, f"{label}, contended turns, of those that serve in order", in_order, "turns/s")
    _target(run, f"{label}, contended longest wait", results, "max", no_pools)


def _target(run: m.Run, what: str, results: Results, key: str, no_pools: Collection[str] = ()) -> None:
    """Keep a line for how many times as good as the best of the peers ours is."""
    ours = results["ours"]
    times = {
        name: m.ratio(ours, found, key) if key == "turns/s" else m.ratio(found, ours, key)
        for name, found in results.items()
        if name not in no_pools and not name.startswith("ours")
    }
    if times:
        best = min(times, key=times.__getitem__)
        run.target(f"{what}, x the best peer ({best})", times[best], at_least=TIMES)

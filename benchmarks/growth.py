"""Growth: what one operation costs while few or very many wait, or lie idle; and what each of them weighs.

All of it is processor time: what else the machine does meanwhile would look like growth.
"""

from __future__ import annotations

import gc
import random
import time
import timeit
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gevent
import gevent.event

from benchmarks import measure as m
from benchmarks.fakes import Expired, Fake
from benchmarks.peer import Built
from benchmarks.peers import PEERS

#: The longest queue that a peer is asked for, where a longer one would take it minutes.
LARGEST = {"lifo": 30_000}


def measure(what: str, peer: str, size: int, **how: Any) -> m.Result:
    """Measure one of the functions below at one size."""
    return MEASURES[what](peer, size, **how)


def queue(peer: str, size: int, operations: int) -> m.Result:
    """Let so many greenlets queue for one connection, then hand it from one to the next; nanoseconds of each step."""
    enqueued = handed = 0.0
    times = max(1, operations // size)
    for _ in range(times):
        built = PEERS[peer].build(Fake, 1)
        connection = built.acquire()
        served = 0
        ended = 0.0

        def waiter(built: Built = built) -> None:
            nonlocal served, ended
            built.release(built.acquire())
            served += 1
            ended = time.process_time()

        waiters = [gevent.spawn(waiter) for _ in range(size)]
        began = time.process_time()
        gevent.sleep(0)
        enqueued += time.process_time() - began
        if peer.startswith("ours"):
            assert built.pool.waiting == size
        began = time.process_time()
        built.release(connection)
        gevent.joinall(waiters, raise_error=True)
        handed += ended - began
        assert served == size
        end(built.pool)
    return {"enqueue": enqueued / times / size * 1e9, "hand-off": handed / times / size * 1e9}


def timeouts(peer: str, size: int, order: str) -> m.Result:
    """Let so many waiters time out at once: processor time in all, and how late the last one learns of it.

    :param order: "queued", all at one moment; or "random", where those in the middle of the queue go before its head.
    """
    spread = [0] * size if order == "queued" else random.Random(size).sample(range(size), size)
    # Long enough for all to queue first, even on a machine that has other things to do.
    delay = 0.05 + size * 8e-5
    while (found := _time_out(waits_at_most(peer), spread, delay)) is None:
        delay *= 2
    return found


def _time_out(wait: Callable[[float], object], spread: Sequence[int], delay: float) -> m.Result | None:
    left = len(spread)
    all_done = gevent.event.Event()
    deadline = time.perf_counter() + delay

    def waiter(position: int) -> None:
        nonlocal left
        wait(max(0.0, deadline + position * 1e-7 - time.perf_counter()))
        left -= 1
        if not left:
            all_done.set()

    waiters = [gevent.spawn(waiter, position) for position in spread]
    gevent.sleep(0)
    used = time.process_time()
    in_time = time.perf_counter() < deadline
    all_done.wait()
    found = {"seconds": time.process_time() - used, "late": time.perf_counter() - deadline}
    gevent.joinall(waiters, raise_error=True)
    return found if in_time else None


def waits_at_most(peer: str) -> Callable[[float], object]:
    """Return what waits so many seconds in vain, and no longer."""
    if peer == "floor":
        return gevent.sleep
    pool = PEERS[peer].build(Fake, 1).pool
    if peer == "lifo":
        import gevent.queue as queues

        pool.get()

        def get(seconds: float) -> None:
            try:
                pool.get(timeout=seconds)
            except queues.Empty:
                return
            raise AssertionError("nothing was put back")

        return get

    from gsocketpool import PoolExhaustedError

    pool.acquire()

    def acquire(seconds: float) -> None:
        try:
            pool.acquire(timeout=seconds)
        except PoolExhaustedError:
            return
        raise AssertionError("nothing was given back")

    return acquire


def waiter_memory(peer: str, size: int, traced: bool) -> m.Result:
    """Weigh so many waiting greenlets: bytes for each, its greenlet included."""
    built = PEERS[peer].build(Fake, 1)
    built.acquire()
    acquire = built.acquire

    def waiter() -> None:
        acquire()

    return {"bytes": weigh(lambda: [gevent.spawn(waiter) for _ in range(size)], size, traced)}


def idle_memory(peer: str, size: int, traced: bool) -> m.Result:
    """Weigh so many idle connections: bytes for each, the connection object included."""
    if peer == "floor":
        return {"bytes": weigh(lambda: [_open_fake() for _ in range(size)], size, traced)}
    return {"bytes": weigh(lambda: PEERS[peer].build(Fake, size), size, traced)}


def _open_fake() -> Fake:
    fake = Fake()
    fake.open()
    return fake


def weigh(make: Callable[[], object], size: int, traced: bool) -> float:
    """Return the bytes that one of ``size`` things costs: as Python counts them, or as the machine does."""
    gevent.sleep(0)
    gc.collect()
    if traced:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] if traced else resident()
    kept = make()
    gevent.sleep(0)
    gevent.sleep(0)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0] if traced else resident()
    tracemalloc.stop()
    del kept
    return (after - before) / size


def resident() -> int:
    """Return the bytes of memory that this process occupies; 0 where the system has no ``/proc``."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def idle(peer: str, size: int, operations: int) -> m.Result:
    """With so many idle connections: nanoseconds of a pair, of a drop, of ``drop_expired()`` for each connection.

    And of a pair while so many are borrowed.
    """
    made: list[Fake] = []

    def factory(kind: type[Fake]) -> Fake:
        connection = kind()
        made.append(connection)
        return connection

    pool = PEERS[peer].build(lambda: factory(Fake), size).pool
    timer = timeit.Timer("pool.release(pool.acquire())", timer=time.process_time, globals={"pool": pool})
    found = {"pair": timer.timeit(operations) / operations * 1e9}

    scans = max(1, operations // size)
    began = time.process_time()
    for _ in range(scans):
        pool.drop_expired()
    found["scan"] = (time.process_time() - began) / scans / size * 1e9
    assert pool.size == size

    borrowed = [pool.acquire() for _ in range(size)]
    places = random.Random(size).choices(range(size), k=operations // 10)
    began = time.process_time()
    for place in places:
        pool.release(borrowed[place])
        borrowed[place] = pool.acquire()
    found["borrowed"] = (time.process_time() - began) / len(places) * 1e9
    for connection in borrowed:
        pool.release(connection)
    end(pool)

    some = max(1, min(size // 2, 1000))
    times = max(1, operations // 20 // some)
    chance = random.Random(size)
    spent = 0.0
    for _ in range(times):
        made.clear()
        pool = PEERS[peer].build(lambda: factory(Fake), size).pool
        doomed = chance.sample(made, some)
        began = time.process_time()
        for connection in doomed:
            pool.drop(connection)
        settle(doomed)
        spent += time.process_time() - began
        assert pool.size == size - some
        end(pool)
    found["drop"] = spent / times / some * 1e9

    times = max(1, operations // 10 // size)
    spent = 0.0
    for _ in range(times):
        made.clear()
        pool = PEERS[peer].build(lambda: factory(Expired), size).pool
        began = time.process_time()
        pool.drop_expired()
        settle(made)
        spent += time.process_time() - began
        assert pool.size == 0
        end(pool)
    found["expire"] = spent / times / size * 1e9
    return found


def end(pool: Any) -> None:
    """Close a pool now: forgotten, it would close itself while the next one is measured."""
    if hasattr(pool, "close"):
        pool.close()


def settle(connections: Sequence[Fake]) -> None:
    """Let a pool that closes in the background finish."""
    while any(connection.connected for connection in connections):
        gevent.sleep(0)


MEASURES: dict[str, Callable[..., m.Result]] = {
    "queue": queue,
    "timeouts": timeouts,
    "waiter_memory": waiter_memory,
    "idle": idle,
    "idle_memory": idle_memory,
}


def report(run: m.Run) -> None:
    """Print the tables."""
    _report_queue(run)
    _report_timeouts(run)
    print()
    _report_idle(run)
    print()
    _report_memory(run)


def _operations(run: m.Run) -> int:
    """How many operations one figure is made of, at least: few waiters are measured many times over."""
    return 1_000 if run.quick else 20_000


def _report_queue(run: m.Run) -> None:
    sizes = [10, 100, 1000] if run.quick else [10, 100, 1_000, 10_000, 100_000]
    names = ["floor", "lifo", "ours, patient", "ours, for ever"]
    results = run.side_by_side(
        {
            (name, n): {"case": "growth", "what": "queue", "peer": name, "size": n, "operations": _operations(run)}
            for n in sizes
            for name in names
            if n <= LARGEST.get(name, n)
        },
        processes=3,
        rounds=2,
    )
    found = {name: [n for n in sizes if (name, n) in results] for name in names}
    for step, says in (
        ("enqueue", "nanoseconds to join a queue, the start of the greenlet included"),
        ("hand-off", "nanoseconds to hand a connection from one waiter to the next"),
    ):
        print(f"{says}\n")
        print(
            m.table(
                ["waiters", *(f"{n:,}" for n in sizes), "x floor at most"],
                [
                    [
                        PEERS[name].title,
                        *(f"{m.median(results[name, n], step):,.0f}" if n in found[name] else "" for n in sizes),
                        f"{max(m.ratio(results[name, n], results['floor', n], step) for n in found[name]):.2f}",
                    ]
                    for name in names
                ],
            ),
            end="\n\n",
        )
        few, many = (m.ratio(results["ours, patient", n], results["floor", n], step) for n in (sizes[0], sizes[-1]))
        run.target(f"{sizes[-1]:,} waiters, {step}, x that of 10, each in floors", many / few, at_most=2)


def _report_timeouts(run: m.Run) -> None:
    sizes = [100, 300, 1000] if run.quick else [10_000, 30_000, 100_000]
    names = [("floor", "queued"), ("ours", "queued"), ("floor", "random"), ("ours", "random"), ("lifo", "random")]
    results = run.side_by_side(
        {
            (name, order, n): {"case": "growth", "what": "timeouts", "peer": name, "size": n, "order": order}
            for n in sizes
            for name, order in names
            if n <= LARGEST.get(name, n)
        },
        processes=3,
        rounds=1,
    )
    rows = []
    for name, order in names:
        found = {n: results[name, order, n] for n in sizes if (name, order, n) in results}
        costs = {n: m.median(found[n], "seconds") for n in found}
        grows = m.exponent(list(costs), list(costs.values()))
        title = "floor: gevent.sleep" if name == "floor" else PEERS[name].title
        rows.append(
            [
                f"{title}, {'all at once' if order == 'queued' else 'in random order'}",
                *(f"{costs[n]:,.3f}" if n in costs else "" for n in sizes),
                f"{m.median(found[max(found)], 'late'):,.2f}",
                f"{grows:.2f}",
            ]
        )
        if name == "ours":
            run.target(f"{sizes[-1]:,} time-outs at once, {order} order: exponent of the time", grows, at_most=1.3)
    print("seconds of processor time for all to time out at once; how late the last one of the most was\n")
    print(m.table(["waiters", *(f"{n:,}" for n in sizes), "late", "exponent"], rows))


def _report_idle(run: m.Run) -> None:
    sizes = [10, 100] if run.quick else [10, 100, 1_000, 10_000]
    names = run.available(PEERS, ["gsocketpool-0.1.6", "ours"])
    results = run.side_by_side(
        {
            (name, n): {"case": "growth", "what": "idle", "peer": name, "size": n, "operations": _operations(run)}
            for n in sizes
            for name in names
        },
        processes=3,
        rounds=2,
    )
    steps = {
        "pair": "acquire + release",
        "borrowed": "release + acquire, so many borrowed",
        "drop": "drop() of an idle one",
        "scan": "drop_expired(), for each that has not expired",
        "expire": "drop_expired(), for each that has expired",
    }
    print("nanoseconds\n")
    print(
        m.table(
            ["connections", *(f"{n:,}" for n in sizes)],
            [
                [f"{PEERS[name].title}: {says}", *(f"{m.median(results[name, n], step):,.0f}" for n in sizes)]
                for step, says in steps.items()
                for name in names
            ],
        )
    )
    for step, says in steps.items():
        few, many = (m.median(results["ours", n], step) for n in (sizes[0], sizes[-1]))
        run.target(f"{sizes[-1]:,} connections, {says}, x that of 10", many / few, at_most=2)


def _report_memory(run: m.Run) -> None:
    sizes = {
        "waiter_memory": 1_000 if run.quick else 100_000,
        "idle_memory": 1_000 if run.quick else 10_000,
    }
    says = {
        ("waiter_memory", "floor"): "a greenlet that does nothing but wait",
        ("waiter_memory", "ours, patient"): "the same, waiting in acquire(timeout=...)",
        ("waiter_memory", "ours, for ever"): "the same, waiting in acquire(timeout=None)",
        ("idle_memory", "floor"): "an open connection (one to nowhere)",
        ("idle_memory", "ours"): "the same, idle in a pool",
    }
    jobs: list[m.Job] = [
        {"case": "growth", "what": what, "peer": peer, "size": sizes[what], "traced": traced}
        for what, peer in says
        for traced in (True, False)
    ]
    # Each in a process of its own, which has not grown before.
    results = iter(m.run(jobs) if run.quick else [m.run([job])[0] for job in jobs])
    rows = []
    for (_, peer), title in says.items():
        found = [next(results)["bytes"], next(results)["bytes"]]
        if peer == "floor":
            floor = found
        net = [cost - bare for cost, bare in zip(found, floor, strict=True)]
        rows.append([title, *(f"{cost:,.0f}" for cost in found), *(f"{cost:,.0f}" if any(net) else "" for cost in net)])
    print("memory as Python counts it, and as the machine does (resident)\n")
    print(m.table(["bytes for each", "Python", "resident", "Python, net", "resident, net"], rows))

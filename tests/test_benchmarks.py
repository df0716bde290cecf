"""The benchmarks run, and say what they should. No test makes a timed claim: those are in benchmarks/README.rst."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import asyncio as tasks
from benchmarks import measure, runtimes, threads
from benchmarks.peers import PEERS

ROOT = Path(__file__).resolve().parent.parent


def benchmarks(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        # Not what coverage sets to be measured in the processes that a test starts: they would be twice as slow.
        env={**{name: value for name, value in os.environ.items() if not name.startswith("COV")}, **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.mark.timeout(180)
def test_a_quick_run_prints_what_it_ran_on_a_table_for_each_case_and_the_targets(tmp_path: Path) -> None:
    # No peer that has to be installed on the side: what is missing is left out with a note.
    done = benchmarks("--quick", "pair", "contended", "growth", "endpoints", GSOCKETPOOL_016=str(tmp_path))
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert f"CPython {sys.version.split()[0]}" in head
    assert "gevent" in head
    assert "cores" in head
    for title in ("Uncontended", "Contended", "Growth", "Many endpoints", "Targets"):
        assert any(line.startswith(title) for line in lines), f"no {title} in\n{done.stdout}"
    assert "Left out: gsocketpool 0.1.6: not found in" in done.stdout
    for name, peer in PEERS.items():
        if name != "gsocketpool-0.1.6":
            assert any(line.startswith((peer.title, f"Left out: {peer.title}")) for line in lines), peer.title
    targets = lines[lines.index("Targets") :]
    assert any("contended, longest wait" in line and line.endswith(("yes", "no")) for line in targets)
    assert any("time-outs at once" in line and line.endswith(("yes", "no")) for line in targets)


@pytest.mark.timeout(180)
def test_a_quick_run_with_threads_and_on_asyncio_measures_every_peer_that_is_installed() -> None:
    done = benchmarks("--quick", "threads", "asyncio")
    assert done.returncode == 0, done.stderr
    _head, *lines = done.stdout.splitlines()
    for title in ("one thread, uncontended", "32 threads, 4 connections", "asyncio's loop, 200 tasks"):
        assert any(line.startswith(title) for line in lines), f"no {title} in\n{done.stdout}"
    for peer in (*threads.PEERS.values(), *tasks.PEERS.values()):
        assert any(line.startswith((peer.title, f"Left out: {peer.title}")) for line in lines), peer.title


def test_the_target_beside_peers_is_held_against_the_best_of_them_and_not_against_what_is_no_pool(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def found(turns: float, longest: float) -> list[measure.Result]:
        return [{"turns/s": turns, "p50": 0.0, "p99": 0.0, "max": longest}]

    results = {
        "floor": found(900, 0.001),
        "connpool": found(200, 0.9),
        "psycopg_pool": found(100, 0.03),
        "ours": found(400, 0.01),
        "ours, for ever": found(500, 0.01),
    }
    run = measure.Run()
    runtimes.report_turns(run, "threads", threads.PEERS, results, threads.NO_POOLS)
    assert "gsocketpool" in capsys.readouterr().out
    assert run.targets == [
        ("threads, contended turns, x the best peer (connpool)", ">= 3", "2.00", "no"),
        (
            "threads, contended turns, of those that serve in order, x the best peer (psycopg_pool)",
            ">= 3",
            "4.00",
            "yes",
        ),
        ("threads, contended longest wait, x the best peer (psycopg_pool)", ">= 3", "3.00", "yes"),
    ]


def test_the_pools_for_threads_and_asyncio_are_measured_in_processes_without_gevent() -> None:
    code = "import sys; from benchmarks import asyncio, threads; import gsocketpool.threading, gsocketpool.asyncio"
    code += "; sys.exit('gevent' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=55, check=False).returncode == 0


def test_a_case_that_does_not_exist_is_refused_with_the_names_of_those_that_do() -> None:
    done = benchmarks("pear")
    assert done.returncode == 2
    assert "no case pear; there are pair, contended, echo, growth, endpoints, kills, threads, asyncio" in done.stderr


@pytest.mark.parametrize(("cost", "power"), [(lambda n: 3 * n, 1.0), (lambda n: n * n / 7, 2.0)])
def test_the_exponent_tells_linear_from_quadratic(cost: Callable[[float], float], power: float) -> None:
    sizes = [10.0, 30.0, 100.0]
    assert measure.exponent(sizes, [cost(n) for n in sizes]) == pytest.approx(power)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(n) for n in range(1, 101)]
    assert measure.percentile(values, 0.5) == 50
    assert measure.percentile(values, 0.99) == 99
    assert measure.percentile([7.0], 0.99) == 7


def test_a_table_lines_its_columns_up_and_shows_a_dash_for_what_was_not_measured() -> None:
    assert measure.table(["call", "ns"], [["pair", "104"], ["with", ""]]).splitlines() == [
        "====  ===",
        "call   ns",
        "====  ===",
        "pair  104",
        "with    —",
        "====  ===",
    ]

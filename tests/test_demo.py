"""``python -m gsocketpool``: what a newcomer runs first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gevent.event import Event
from rich.console import Console

import gsocketpool
from gsocketpool import Pool, PoolExhaustedError
from gsocketpool.cli import demo
from gsocketpool.cli.demo import Demo, Plan, Report, quantile
from gsocketpool.cli.main import main

ROOT = Path(__file__).parent.parent

# What makes rich colour its output, or not, whatever it writes to.
STYLING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "TERM")


def run(*arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, with pipes; `before` is code that runs there first."""
    code = ("-c", f"{before}\nimport runpy; runpy.run_module('gsocketpool', run_name='__main__')") if before else None
    return subprocess.run(
        [sys.executable, *(code or ("-m", "gsocketpool")), *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in STYLING} | environment,
        capture_output=True,
        text=True,
        timeout=50,
    )


def figures(output: str) -> dict[str, float]:
    """The table that it ends with: names and numbers."""
    rows = re.findall(r"^([a-z][a-z0-9 ]*?) {2,}([\d,.]+)(?: ms)?(?:  .*)?$", output, re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number in rows}


def test_the_demo_runs_without_arguments_and_ends_with_a_table() -> None:
    ended = run()

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    table = figures(ended.stdout)
    assert list(table) == [
        *("requests", "throughput", "latency p50", "latency p99", "usual wait", "longest wait"),
        *("opened", "reused", "most at once", "killed", "wrong replies", "errors", "slots lost"),
    ]
    assert table["requests"] == 4000
    assert table["throughput"] > 0
    assert 5 <= table["latency p50"] <= table["latency p99"]
    assert 0 < table["usual wait"] <= table["longest wait"]
    assert table["killed"] > 0
    assert table["most at once"] == 10
    assert table["opened"] <= 10 + table["killed"]
    assert table["reused"] >= 4000 - table["opened"]
    assert (table["wrong replies"], table["errors"], table["slots lost"]) == (0, 0, 0)
    assert "10 borrowers were then served at once" in ended.stdout
    assert "The kill cost nobody anything." in ended.stdout


def test_a_pipe_gets_no_control_characters_and_sees_how_it_goes() -> None:
    ended = run("demo", "--requests", "400")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not re.search(r"[^\x20-\x7e\n]", ended.stdout)
    assert "25 % of the requests are answered" in ended.stdout
    assert figures(ended.stdout)["requests"] == 400


def test_it_can_say_so_in_ascii_and_in_a_narrow_terminal() -> None:
    ended = run("demo", "--requests", "100", PYTHONIOENCODING="ascii", COLUMNS="40")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert max(map(len, ended.stdout.splitlines())) <= 40


def test_a_terminal_gets_a_bar_that_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = (tmp_path / "screen").open("w+", encoding="utf-8")

    class Terminal(Console):
        def __init__(self, **options: Any) -> None:
            super().__init__(
                **options | {"file": screen, "force_terminal": True, "_environ": {"TERM": "xterm"}, "width": 100}
            )

    monkeypatch.setattr("gsocketpool.cli.main.Console", Terminal)
    with screen:
        result = CliRunner().invoke(main, ["demo", "--requests", "300"])
        screen.seek(0)
        shown = screen.read()

    assert result.exit_code == 0, shown
    assert re.search(r"\d+/300\S* 10 in use, \d+ waiting", shown)
    assert "killed" in shown
    assert "\x1b[2K" in shown  # erased the line
    assert "\x1b[?25h" in shown  # the cursor is back
    assert shown.rindex("\x1b[2K") < shown.index("wrong replies")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_seed_will_do(seed: int) -> None:
    with Demo(Plan(requests=200, greenlets=40, connections=4, seed=seed)) as running:
        while not running.wait(0.05):
            pass
        report = running.finish()

    assert report.failures() == []
    assert report.answered == len(report.latencies) == len(report.waits) == 200
    assert report.killed_working > 0
    assert report.killed_waiting > 0
    assert report.most_sockets == report.served_at_once == 4


def test_it_says_its_version() -> None:
    ended = run("--version")

    assert ended.returncode == 0
    assert ended.stdout == f"gsocketpool, version {gsocketpool.__version__}\n"


def test_help_names_the_commands_and_their_options() -> None:
    ended, of_demo = run("--help"), run("demo", "-h")

    assert (ended.returncode, of_demo.returncode) == (0, 0)
    assert "Usage: python -m gsocketpool [OPTIONS]" in ended.stdout
    assert "demo" in ended.stdout
    for option in ("--requests", "--greenlets", "--connections", "--seed"):
        assert option in of_demo.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("demo", "--requests", "many"), "'--requests'"),
        (("demo", "--requests", "0"), "0 is not in the range x>=100"),
        (("demo", "--greenlets", "0"), "'--greenlets'"),
        (("demo", "--connections", "0"), "'--connections'"),
        (("demo", "--seed", "x"), "'--seed'"),
        (("sell",), "No such command 'sell'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], complaint: str) -> None:
    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 2
    assert complaint in result.output


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_how_to_install_it(missing: str) -> None:
    ended = run(before=f"import sys; sys.modules[{missing!r}] = None")

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert missing in ended.stderr
    assert 'pip install "gsocketpool[cli]"' in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ctrl_c_ends_it_at_once_and_without_a_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "gsocketpool", "demo", "--requests", "100000"],
        cwd=ROOT,
        # Not measured: a Ctrl-C that hits the code which coverage runs for each new file is lost, one time in twenty.
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")} | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)

    assert process.returncode == 1
    assert "Aborted!" in errors
    assert "Traceback" not in errors


# It would notice


def demonstrate(monkeypatch: pytest.MonkeyPatch, pool: type[Pool[Any]]) -> Result:
    monkeypatch.setattr(demo, "Pool", pool)
    result = CliRunner().invoke(main, ["demo", "--requests", "200", "--greenlets", "40"])
    assert result.exit_code == 1, result.output
    assert "The kill cost nobody anything." not in result.output
    return result


def test_a_pool_that_lends_interrupted_connections_again_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(Pool[Any]):
        pass

    Careless._discard = Careless._return  # type: ignore[method-assign, assignment]

    result = demonstrate(monkeypatch, Careless)

    assert "requests got the reply to another one" in result.output


def test_a_pool_that_loses_a_slot_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(Pool[Any]):
        pass

    def close_one(pool: Any, member: Any, *rest: Any) -> None:
        if pool._closed_for["discarded"] == 1 and pool.closes(member):
            member.connection.close()  # and nobody says that its slot is free
        else:
            Pool._close_one(pool, member, *rest)

    Losing._close_one = close_one  # type: ignore[method-assign, assignment]
    monkeypatch.setattr(demo, "VICTIMS", 1)
    monkeypatch.setattr(demo, "LOST", 2.0)
    result = demonstrate(monkeypatch, Losing)

    assert "1 of 10 slots are lost: in the end only 9 borrowers were served at once" in result.output


def test_a_pool_that_opens_too_many_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(Pool[Any]):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.resize(12)

    result = demonstrate(monkeypatch, Greedy)

    assert "the server saw 12 sockets at once, and the cap is 10" in result.output


def test_an_error_in_a_borrower_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moody(Pool[Any]):
        def connection(self, timeout: Any = ...) -> Any:
            if self.stats().acquired == 50:
                raise PoolExhaustedError("not today")
            return super().connection(timeout)

    result = demonstrate(monkeypatch, Moody)

    assert "FAILED: PoolExhaustedError: not today (and" in result.output


def test_a_pool_that_gets_stuck_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Pool[Any]):
        def connection(self, timeout: Any = ...) -> Any:
            if self.stats().acquired >= 50:
                monkeypatch.setattr(demo, "PATIENCE", 0.5)  # not before: all that goes well may take longer
                Event().wait()
            return super().connection(timeout)

    result = demonstrate(monkeypatch, Stuck)

    assert "were not done after 0.5 s" in result.output


def test_a_report_without_a_kill_proves_nothing() -> None:
    plan = Plan(requests=100)
    report = Report(plan, answered=100, served_at_once=10, most_sockets=10)

    assert report.failures() == ["the kill hit nobody in the middle of a request, so it has shown nothing"]


def test_requests_that_vanish_are_missed() -> None:
    plan = Plan(requests=100)
    report = Report(plan, answered=99, served_at_once=10, most_sockets=10, killed_working=1)

    assert report.failures() == ["only 99 of 100 requests were answered"]


def test_quantiles() -> None:
    values = [float(n) for n in range(100, 0, -1)]

    assert quantile(values, 0.5) == 51
    assert quantile(values, 0.99) == 100
    assert quantile([], 0.5) == 0

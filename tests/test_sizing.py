"""``python -m gsocketpool size``: what it makes of figures, how it comes by them, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pty
import random
import re
import signal
import socket
import struct
import subprocess as std_subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gevent
import psutil
import pytest
from click.testing import CliRunner
from gevent import subprocess
from gevent.event import Event
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from gsocketpool.cli import load
from gsocketpool.cli.load import (
    Address,
    NoAnswerError,
    Request,
    Run,
    Target,
    first_contact,
    is_here,
    measure,
    unescape,
)
from gsocketpool.cli.main import main
from gsocketpool.cli.sizing import (
    SPARE,
    Plan,
    Point,
    Sample,
    Step,
    Verdict,
    between,
    check_words,
    cut_short,
    gone,
    judge,
    little,
    merge,
    step_seconds,
    words,
)

from .peers import Valkey
from .servers import Authority, BlackHole, LineEchoServer, Server, reset, say, swallow

ROOT = Path(__file__).parent.parent
STYLING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "TERM")
#: As short as it gets: what comes of it is not looked at as a measurement. Each step ends with its hundredth request,
#: so that it has so many even if this machine stands still meanwhile.
BRIEF = ("--max", "4", "--seconds", "5", "--requests", "100", "--repeats", "2", "--timeout", "20")
#: Where a server does not answer so many. There may be steps without any request.
SHORT = ("--max", "4", "--seconds", "0.05", "--repeats", "2", "--timeout", "20")
LINES = ("--send", r"ping\n", "--until", r"\n")


def command(*arguments: str, before: str = "") -> list[str]:
    """The command line; `before` is code that runs in that process first."""
    code = ("-c", f"{before}\nimport runpy; runpy.run_module('gsocketpool', run_name='__main__')") if before else None
    return [sys.executable, *(code or ("-m", "gsocketpool")), "size", *arguments]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in STYLING} | {"COLUMNS": "100"}


def run(*arguments: str, before: str = "") -> Any:
    """Run it in a process of its own, while this one's servers go on."""
    return subprocess.run(
        command(*arguments, before=before),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=50,
    )


def measured(*arguments: str) -> dict[str, Any]:
    """What it says to machines."""
    ended = CliRunner().invoke(main, ["size", *arguments, "--json"])
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def flat(text: str) -> str:
    """Text as one line, however it was broken."""
    return " ".join(text.split())


# What to measure


def test_sizes_double_up_to_the_most() -> None:
    assert Plan(most=32).sizes() == [1, 2, 4, 8, 16, 32]
    assert Plan(most=20).sizes() == [1, 2, 4, 8, 16, 20]


def test_each_step_is_done_once_in_each_repeat_in_an_order_that_the_seed_decides() -> None:
    plan = Plan(most=8, greenlets=(2, 16), repeats=3, seed=7)
    once = [Step(1, 2), Step(2, 2), Step(1, 16), Step(2, 16), Step(4, 16), Step(8, 16)]
    steps = plan.steps()

    assert len(steps) == 3 * len(once)
    for n in range(3):
        assert sorted(steps[6 * n : 6 * n + 6], key=once.index) == once
    assert steps == plan.steps()
    assert steps != Plan(most=8, greenlets=(2, 16), repeats=3, seed=8).steps()
    assert plan.most_steps() == 18 + 12
    assert plan.longest() == 30 * 2 * plan.seconds + SPARE


def test_sizes_in_between_are_evenly_apart() -> None:
    assert between(4, 8) == [5, 6, 7]
    assert between(16, 32) == [20, 24, 28]
    assert between(2, 4) == [3]
    assert between(1, 2) == []


def test_a_closer_look_is_taken_below_what_seems_to_be_the_knee() -> None:
    plan = Plan(most=32, greenlets=(64,), repeats=2)

    assert sorted(step.size for step in plan.refined(curve({n: min(n, 6) for n in plan.sizes()}))) == [
        *(5, 5, 6, 6, 7, 7),
        *(8, 8),
    ]
    assert plan.refined(curve(dict.fromkeys(plan.sizes(), 100))) == []
    assert plan.refined(curve({n: min(n, 2) for n in plan.sizes()})) == []
    assert plan.refined([]) == []


def test_a_step_is_as_long_as_twenty_requests_one_after_the_other() -> None:
    assert step_seconds(0.0001) == 0.5
    assert step_seconds(0.1) == 2
    assert step_seconds(5) == 10


def test_samples_of_a_step_are_put_together() -> None:
    step = Step(2, 8)
    (point,) = merge(
        [
            Sample(step, 1.0, [0.01] * 90, [0.03] * 90, {"reset": 1}, busy=0.2, lent=2.0),
            Sample(step, 0.5, [0.01] * 50, [0.03] * 50, busy=0.4, lent=1.0),
            Sample(step, 1.0, [0.02] * 95, [0.01] * 95, {"reset": 2, "timed out": 1}, busy=0.3, lent=1.5),
        ]
    )

    assert (point.size, point.greenlets, point.rates) == (2, 8, (90, 100, 95))
    assert (point.rate, point.requests, point.fewest) == (95, 235, 50)
    assert point.spread == pytest.approx(10 / 95)
    assert (point.in_use_p50, point.in_use_p99, point.wait_p50, point.wait_p99) == (0.01, 0.02, 0.03, 0.03)
    assert point.in_use == pytest.approx((140 * 0.01 + 95 * 0.02) / 235)
    assert (point.errors, point.failed) == ({"reset": 3, "timed out": 1}, 4)
    assert point.busy == pytest.approx(0.3)
    assert point.lent == pytest.approx(1.5)


# What figures say


def curve(
    rates: Mapping[int, float | Sequence[float]],
    *,
    greenlets: int = 64,
    fewest: int = 100,
    busy: float = 0.2,
    in_use: float = 0.005,
    errors: Mapping[int, Mapping[str, int]] = {},
) -> list[Point]:
    """Points of these sizes with these throughputs, or some for several runs."""
    return [
        Point(
            size=size,
            greenlets=greenlets,
            rates=tuple(given) if isinstance(given, Sequence) else (given, given, given),
            requests=3 * fewest,
            fewest=fewest,
            in_use=in_use,
            busy=busy,
            lent=size,
            errors=errors.get(size, {}),
        )
        for size, given in rates.items()
    ]


SIZES = Plan().sizes()


def test_the_knee_is_the_smallest_size_that_is_as_good_as_any() -> None:
    verdict = judge(curve({1: 200, 2: 400, 3: 600, 4: 790, 8: 800, 16: 800, 32: 795}), 64)

    assert (verdict.kind, verdict.knee, verdict.reached) == ("knee", 4, 4)
    assert (verdict.best, verdict.best_size, verdict.largest, verdict.tolerance) == (800, 8, 32, 0.05)
    assert verdict.needed == pytest.approx(4.0)
    assert verdict.agrees


def test_the_knee_of_a_server_that_suffers_from_many_is_before_its_peak() -> None:
    verdict = judge(curve({1: 200, 2: 400, 4: 780, 6: 800, 8: 700, 16: 500, 32: 300}), 64)

    assert (verdict.kind, verdict.knee) == ("knee", 4)


def test_what_still_rises_has_no_knee() -> None:
    for rises in (
        {n: 100.0 * n for n in SIZES},
        {n: 100.0 * math.sqrt(n) for n in SIZES},
        {n: 100.0 * math.log2(1 + n) for n in SIZES},
        {1: 100, 2: 200, 4: 400, 8: 800, 16: 1600, 24: 2400, 28: 2800, 32: 3000},
    ):
        verdict = judge(curve(rises), 64)
        assert (verdict.kind, verdict.knee) == ("rising", None), rises


def test_a_knee_at_the_very_end_is_none() -> None:
    assert judge(curve({1: 1, 2: 2, 3: 3, 4: 4, 6: 4}), 64).kind == "rising"
    assert judge(curve({1: 1, 2: 2, 3: 3, 4: 4, 8: 4}), 64).knee == 4
    assert judge(curve({n: min(n, 30) for n in [*SIZES, 20, 24, 28]}), 64).kind == "rising"
    assert judge(curve({n: min(n, 20) for n in [*SIZES, 20, 24, 28]}), 64).knee == 20


def test_a_flat_line_has_no_knee() -> None:
    for rates in (dict.fromkeys(SIZES, 800), {n: 800 - n for n in SIZES}, {n: 800 / n for n in SIZES}):
        verdict = judge(curve(rates), 64)
        assert (verdict.kind, verdict.knee, verdict.reached) == ("flat", None, 1)


def test_where_this_process_was_the_limit_nothing_is_called_a_knee() -> None:
    rates = {n: min(n, 4) * 200 for n in SIZES}

    assert judge(curve(rates, busy=0.89), 64).kind == "knee"
    verdict = judge(curve(rates, busy=0.97), 64)
    assert (verdict.kind, verdict.knee, verdict.reached) == ("client", None, 4)


def test_noise_that_hides_the_knee_is_named() -> None:
    rates = {n: [min(n, 4) * each for each in (150, 200, 250)] for n in SIZES}

    assert judge(curve(rates), 64).kind == "noisy"


def test_noise_widens_what_is_as_good_as_the_best() -> None:
    steady = {1: 200, 2: 400, 3: 600, 4: 720, 8: 800, 16: 800, 32: 800}
    noisy = {n: [rate * each for each in (0.93, 1, 1.05)] for n, rate in steady.items()}

    assert judge(curve(steady), 64).knee == 8
    verdict = judge(curve(noisy), 64)
    assert verdict.knee == 4
    assert verdict.tolerance == pytest.approx(0.12)


def test_one_run_that_was_disturbed_does_not_count() -> None:
    rates: dict[int, Sequence[float]] = {n: [200 * min(n, 4)] * 3 for n in SIZES}
    rates[8] = [800, 100, 800]

    assert judge(curve(rates), 64).knee == 4


def test_too_few_requests_tell_nothing() -> None:
    assert judge(curve({n: min(n, 4) for n in SIZES}, fewest=9), 64).kind == "brief"


def test_too_few_sizes_tell_nothing() -> None:
    assert judge(curve({1: 200, 2: 400}), 64).kind == "few"
    assert judge([], 64).kind == "few"


def test_sizes_at_which_requests_failed_are_left_out() -> None:
    rates = {n: min(n, 4) * 200 for n in SIZES}
    some = {8: {"timed out": 4}, 16: {"refused": 100}, 32: {"reset": 4, "timed out": 4}}

    verdict = judge(curve(rates, errors=some), 64)
    assert (verdict.kind, verdict.knee, verdict.largest, verdict.failing) == ("rising", None, 4, (8, 16, 32))
    verdict = judge(curve(rates, errors={32: some[32]}), 64)
    assert (verdict.knee, verdict.largest, verdict.failing) == (4, 16, (32,))
    assert judge(curve(rates, errors={n: {"reset": 2} for n in SIZES}), 64).knee == 4
    assert judge(curve(rates, errors={n: {"reset": 200} for n in SIZES}), 64).kind == "failing"
    assert judge(curve(rates, errors={n: {"reset": 200} for n in SIZES[2:]}), 64).kind == "failing"


def step_of(answered: int, **errors: int) -> Sample:
    return Sample(Step(2, 8), 0.5, [0.01] * answered, [0.0] * answered, errors)


def test_a_server_is_gone_if_every_request_of_two_steps_in_a_row_failed() -> None:
    assert gone([step_of(9), step_of(0, refused=3), step_of(0, reset=3)])
    assert not gone([step_of(0, refused=3)])
    assert not gone([step_of(0, refused=3), step_of(9), step_of(0, refused=3)])
    assert not gone([step_of(0, refused=3), step_of(1, refused=300)])
    assert not gone([step_of(0), step_of(0)])  # too short for a reply to come, and none failed


def test_only_the_greenlets_asked_for_count() -> None:
    points = curve({n: min(n, 4) for n in SIZES}) + curve(dict.fromkeys(SIZES[:4], 100), greenlets=8)

    assert judge(points, 64).knee == 4
    assert judge(points, 8).kind == "flat"


def machine_repair(customers: int, servers: int, service: float, away: float) -> float:
    """The throughput of a closed system: each customer needs one of the servers for `service` seconds on average, and
    is then away for so many; both are exponential. From the balance of births and deaths."""
    weight, weights = 1.0, [1.0]
    for there in range(1, customers + 1):
        weight *= (customers - there + 1) * service / (min(there, servers) * away)
        weights.append(weight)
        if weight > 1e200:
            weight, weights = weight / 1e200, [each / 1e200 for each in weights]
    busy = sum(each * min(there, servers) for there, each in enumerate(weights)) / sum(weights)
    return busy / service


def sized(plan: Plan, rate: Any, rng: random.Random, noise: float, in_use: float) -> Verdict:
    """The verdict on a server with that throughput, as the command comes to it."""
    rates: dict[int, list[float]] = {}

    def do(steps: list[Step]) -> list[Point]:
        for step in steps:
            rates.setdefault(step.size, []).append(rate(step.size) * rng.uniform(1 - noise, 1 + noise))
        return curve(rates, greenlets=plan.heaviest, in_use=in_use)

    return judge(do([*plan.steps(), *plan.refined(do(plan.steps()))]), plan.heaviest)


@given(
    servers=st.integers(2, 12),
    away=st.floats(0.01, 2.0),
    noise=st.floats(0, 0.02),
    seed=st.integers(0, 2**32),
)
def test_the_recommended_size_is_near_the_truth(servers: int, away: float, noise: float, seed: int) -> None:
    # So many are at work if all servers are busy and as many as belong to them are on their way.
    truth = servers * (1 + away)
    plan = Plan(most=128, greenlets=(256,))

    def rate(size: int) -> float:
        return machine_repair(size, servers, 1.0, away)

    verdict = sized(plan, rate, random.Random(seed), noise, 1 + away)

    assert verdict.kind == "knee"
    assert verdict.knee is not None
    assert truth / 2 <= verdict.knee <= truth * 2
    assert verdict.agrees


@given(servers=st.integers(2, 40), most=st.integers(4, 64), noise=st.floats(0, 0.02), seed=st.integers(0, 2**32))
def test_the_knee_of_so_many_workers_is_their_number_or_none_is_named(
    servers: int, most: int, noise: float, seed: int
) -> None:
    plan = Plan(most=most, greenlets=(2 * most,))

    verdict = sized(plan, lambda size: min(size, servers), random.Random(seed), noise, 1)

    if servers > most / 1.25:
        assert verdict.kind == "rising"
    if verdict.knee is not None:
        # The sizes that are tried are a quarter of the gap apart.
        assert 0.8 * servers <= verdict.knee <= 1.3 * servers


@given(power=st.floats(0.2, 1.0), most=st.integers(8, 256), noise=st.floats(0, 0.01), seed=st.integers(0, 2**32))
def test_whatever_still_rises_gets_no_knee(power: float, most: int, noise: float, seed: int) -> None:
    plan = Plan(most=most, greenlets=(2 * most,))

    assert sized(plan, lambda size: 100 * size**power, random.Random(seed), noise, 1).kind == "rising"


@given(most=st.integers(4, 256), noise=st.floats(0, 0.02), seed=st.integers(0, 2**32))
def test_whatever_is_flat_gets_no_knee(most: int, noise: float, seed: int) -> None:
    plan = Plan(most=most, greenlets=(2 * most,))

    assert sized(plan, lambda size: 100, random.Random(seed), noise, 1).kind == "flat"


@given(
    rates=st.dictionaries(st.integers(1, 64), st.lists(st.floats(0, 1e6), min_size=1, max_size=4), max_size=8),
    busy=st.floats(0, 1),
    fewest=st.integers(0, 20),
)
def test_any_figures_get_a_verdict_that_can_be_said(rates: dict[int, list[float]], busy: float, fewest: int) -> None:
    points = curve(rates, busy=busy, fewest=fewest)
    verdict = judge(points, 64)

    assert (verdict.knee is not None) == (verdict.kind == "knee")
    assert verdict.knee is None or verdict.knee in rates
    assert all(words(verdict, Plan()))
    assert all(check_words(verdict, points))


@given(rate=st.floats(0, 1e6), seconds=st.floats(0, 100))
def test_littles_law(rate: float, seconds: float) -> None:
    assume(rate * seconds < 1e300)
    assert little(rate, seconds) == rate * seconds


# What is said, read aloud


def said(verdict: Verdict) -> str:
    return " ".join(words(verdict, Plan()))


def test_it_says_what_it_recommends_and_why() -> None:
    points = curve({1: 200, 2: 400, 3: 600, 4: 790, 8: 800, 16: 800, 32: 795})
    verdict = judge(points, 64)

    assert said(verdict) == (
        "The knee is at 4 connections: the smallest pool that comes within 5% of the best throughput (800 requests a "
        "second, at 8 connections). Recommended: max_connections=4, for all processes together that use this server."
    )
    assert check_words(verdict, points) == [
        "Little's law: 800 requests a second x 5.00 ms in use (in the smallest pool) = 4.0 connections at work.",
        "With 4 connections it gives 4.0 at work (lent, as counted: 4.0) and 4 requests under way, waiting ones "
        "included (offered: 64).",
    ]


def test_it_says_if_littles_law_gives_something_else() -> None:
    points = curve({n: 200 * min(n, 4) for n in SIZES}, in_use=0.001)
    verdict = judge(points, 64)

    assert verdict.knee == 4
    assert not verdict.agrees
    assert "The two differ by more than a factor of two" in check_words(verdict, points)[-1]
    assert "did not get round to using them" in check_words(verdict, points)[-2]


def test_it_says_why_it_recommends_nothing() -> None:
    rates = {n: min(n, 4) * 200 for n in SIZES}

    assert said(judge(curve({n: 100 * n for n in SIZES}), 64)) == (
        "No knee found up to 32 connections: throughput may still be rising there (best: 3,200 requests a second, at "
        "32 connections). Measure further, with a larger --max."
    )
    assert said(judge(curve(dict.fromkeys(SIZES, 100)), 64)).startswith(
        "No knee found up to 32 connections: one connection did as much as many, within 5% (best: 100 requests a "
        "second, at 1 connection)."
    )
    assert said(judge(curve(rates, busy=0.97), 64)).startswith(
        "No knee can be named: this process was the limit, not the server. It was busy for 97% of the time"
    )
    assert "runs of the same size differ by 50%" in said(
        judge(curve({n: [min(n, 4) * each for each in (150, 200, 250)] for n in SIZES}), 64)
    )
    assert "some runs hold fewer than 10 requests" in said(judge(curve(rates, fewest=9), 64))
    assert said(judge(curve(rates, errors={16: {"reset": 50}, 32: {"reset": 50}}), 64)).endswith(
        "Left out, since more than 1% of the requests failed: pools of 16, 32."
    )


def test_it_says_how_requests_failed_and_raises_the_timeout_only_if_that_helps() -> None:
    failing = {size: {"refused": 1000, "reset": 2} for size in SIZES[1:]}
    points = curve(dict.fromkeys(SIZES, 100), errors=failing)

    assert said(judge(points, 64)) == (
        "No knee can be named: too many requests failed (5,000 refused, 10 reset). See what the server says."
    )
    late = judge(curve(dict.fromkeys(SIZES, 100), errors={size: {"timed out": 200} for size in SIZES}), 64)
    assert said(late) == (
        "No knee can be named: too many requests failed (1,200 timed out). A reply may take 5 s (--timeout): see what "
        "the server does, or raise that."
    )


def test_it_makes_nothing_of_figures_that_are_not_whole() -> None:
    points = curve({1: 200, 2: 400, 3: 600, 4: 790, 8: 800, 16: 800, 32: 795})
    whole = judge(points, 64)
    left = cut_short(whole, [step_of(9), step_of(9)])
    dead = cut_short(whole, [step_of(9), step_of(0, refused=1000), step_of(0, refused=1)])

    assert (left.kind, left.knee, dead.kind, dead.knee) == ("unfinished", None, "gone", None)
    assert said(left) == "No knee is named: not all steps were done."
    assert said(dead) == "The server is gone: 1,001 refused. That is every request of the last 2 steps."
    assert len(check_words(whole, points)) == 2
    assert check_words(left, points) == check_words(dead, points) == []
    assert check_words(judge(points[:2], 64), points) != []
    failing = curve(dict.fromkeys(SIZES, 100), errors={size: {"reset": 200} for size in SIZES[2:]})
    assert check_words(judge(failing, 64), failing) == []


# What is asked, and whom


def test_the_help_shows_an_example_that_can_be_copied() -> None:
    shown = CliRunner().invoke(main, ["size", "--help"]).output

    assert "\n  python -m gsocketpool size tcp://127.0.0.1:6379 \\\n" in shown
    assert "\n      --send 'PING\\r\\n' --until '\\r\\n'\n" in shown
    assert "\\b" not in shown
    assert "\b" not in shown


def test_escapes_are_those_of_python() -> None:
    assert unescape(r"PING\r\n") == b"PING\r\n"
    assert unescape(r"\x00\xff\0\t\\n\'\"") == b"\x00\xff\0\t\\n'\""
    assert unescape("süß") == "süß".encode()
    for wrong in (r"\q", r"\x1", "\\", r"\u1234"):
        with pytest.raises(ValueError, match="a backslash begins"):
            unescape(wrong)


def test_addresses_are_read() -> None:
    assert Address.parse("tcp://localhost:6379") == Address("tcp://localhost:6379", "localhost", 6379)
    assert Address.parse("tcp://[::1]:80/") == Address("tcp://[::1]:80/", "::1", 80)
    assert Address.parse("unix:/run/x.sock").path == "/run/x.sock"
    assert Address.parse("unix:///run/x.sock").path == "/run/x.sock"
    assert Address.parse("unix:/run/x.sock").resolve() == []


def test_only_loopback_is_here() -> None:
    assert is_here(["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
    assert is_here([])
    for place in ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "0.0.0.0", "fe80::1%lo"):
        assert not is_here(["127.0.0.1", place])


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["size", *arguments])
    return result.exit_code, flat(result.output)


SERVER = "tcp://127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((SERVER,), r"--send is missing: what is a request? For instance --send 'PING\r\n' --until '\r\n'"),
        ((SERVER, "--send", "x"), "where does a reply end? Give --until or --expect-bytes"),
        ((SERVER, *LINES, "--expect-bytes", "3"), "--until and --expect-bytes both say where a reply ends"),
        ((SERVER, "--send", r"\q", "--until", "x"), r"Invalid value for '--send': there is no \q: a backslash begins"),
        ((SERVER, "--send", "", "--until", "x"), "Invalid value for '--send': it is empty"),
        ((SERVER, "--send", "x", "--until", ""), "Invalid value for '--until': it is empty"),
        ((SERVER, *LINES, "--ca", "README.rst"), "--ca is of no use without --tls"),
        ((SERVER, *LINES, "--tls", "--ca", "README.rst"), "Invalid value for '--ca': 'README.rst' has no certificates"),
        (("unix:/x", *LINES, "--tls"), "--tls is for tcp://host:port, not for a Unix socket"),
        ((SERVER, *LINES, "--workers", "3"), "--workers is for the practice server"),
        ((SERVER, *LINES, "--service", "3"), "--service is for the practice server"),
        (LINES, "--send is for a server of yours, and no address is given"),
        (("--tls",), "--tls is for a server of yours, and no address is given"),
        (("localhost:80", *LINES), "'localhost:80' is no address: give tcp://host:port or unix:/path"),
        (("http://localhost:80", *LINES), "is no address"),
        (("tcp://localhost", *LINES), "is no address"),
        (("tcp://localhost:x", *LINES), "is no address"),
        (("tcp://localhost:0", *LINES), "is no address"),
        (("tcp://me@localhost:80", *LINES), "is no address"),
        (("tcp://localhost:80/x", *LINES), "there is more behind the port"),
        (("unix:", *LINES), "there is no path in 'unix:'"),
        (("--max", "3"), "3 is not in the range 4<=x<=1024"),
        (("--max", "32", "--greenlets", "8"), "8 greenlets cannot use a pool of --max 32"),
        (("--seconds", "60", "--repeats", "20"), "and 15 are the limit: give a smaller --seconds"),
        (("--seconds", "0"), "'--seconds'"),
        (("--timeout", "0"), "'--timeout'"),
        (("--requests", "0"), "'--requests'"),
        (("--picture", "x.jpg"), "'x.jpg' must end in .svg or .png"),
        (("--picture", "nowhere/x.svg"), "there is no folder 'nowhere'"),
    ],
)
def test_wrong_input_is_refused_by_name(
    arguments: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    status, output = invoke(*arguments)

    assert status == 2
    assert complaint in output


def test_more_connections_than_descriptors_are_refused() -> None:
    ended = run("--max", "1000", before="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))")

    assert ended.returncode == 2
    assert "--max 1000 needs 1064 descriptors, and this process may have 512 (ulimit -n)" in flat(ended.stderr)


def test_a_picture_without_matplotlib_is_refused_before_the_load_is_run(tmp_path: Path) -> None:
    without = "import sys; sys.modules['matplotlib'] = None"
    ended = run("--picture", str(tmp_path / "x.svg"), before=without)

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "--picture needs matplotlib, and it is not there" in ended.stderr
    assert 'pip install "gsocketpool[cli]"' in ended.stderr


# Others are asked about

#: Says of each attempt to connect to, or to send to, anything by IP where to.
WATCHED = """
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        print("SENT", *arguments[1], file=sys.stderr)
sys.addaudithook(hook)
"""


def test_without_somebody_to_ask_another_machine_is_refused() -> None:
    ended = run("tcp://192.0.2.1:7", *LINES, before=WATCHED)

    assert ended.returncode == 2
    assert "192.0.2.1 is not this machine" in flat(ended.stderr)
    assert "give --yes if it is" in flat(ended.stderr)
    assert "SENT" not in ended.stderr


def test_another_machine_is_asked_about_before_anything_is_sent() -> None:
    ours, theirs = pty.openpty()
    with (
        os.fdopen(ours, "wb", buffering=0) as keyboard,
        os.fdopen(theirs, "rb", buffering=0) as terminal,
        std_subprocess.Popen(
            command("tcp://192.0.2.1:7", *LINES, before=WATCHED),
            cwd=ROOT,
            env=environment(),
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        keyboard.write(b"n\n")
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "192.0.2.1 is not this machine. It would get load: up to 32 connections" in flat(errors)
    assert "Go on? [y/N]" in errors
    assert "Nothing was sent." in errors
    assert "SENT" not in output + errors


def test_the_watch_over_what_is_sent_sees_what_is_sent() -> None:
    with Server(say(b"welcome")) as server:
        ended = run(f"tcp://127.0.0.1:{server.port}", *LINES, before=WATCHED)

    assert ended.returncode == 1
    assert f"SENT 127.0.0.1 {server.port}" in ended.stderr


# The practice server


def assert_machines_can_read_it(found: dict[str, Any]) -> None:
    assert list(found) == [
        *("gsocketpool", "address", "practice", "send", "reply", "request_seconds", "plan", "took", "done", "ended"),
        *("points", "verdict", "words", "check"),
    ]
    assert found["practice"] == {"workers": 2, "service": 0.015}
    assert (found["send"], found["reply"], found["done"], found["ended"]) == ("ping\n", "pong", True, None)
    assert found["plan"] == {
        "most": 8,
        "greenlets": [8],
        "seconds": 0.22,
        "repeats": 3,
        "requests": 100_000,
        "timeout": 20.0,
        "seed": 1961,
    }
    assert {point["size"] for point in found["points"]} >= {1, 2, 4, 8}
    for point in found["points"]:
        assert list(point) == [
            *("size", "greenlets", "rates", "requests", "fewest", "in_use", "in_use_p50", "in_use_p99"),
            *("wait", "wait_p50", "wait_p99", "errors", "busy", "lent", "rate", "spread", "failing"),
        ]
        assert point["errors"] == {}
        assert point["requests"] > 0
    assert set(found["verdict"]) >= {"kind", "greenlets", "knee", "recommended", "best", "needed", "agrees", "failing"}


def assert_people_can_read_it(picture: Path, knee: int | None) -> None:
    root = ElementTree.parse(picture).getroot()
    texts = {flat("".join(each.itertext())) for each in root.iter("{http://www.w3.org/2000/svg}text")}

    assert texts >= {
        "practice server, 2 workers, 8 greenlets",
        "requests a second",
        "milliseconds",
        "connections in the pool (max_connections)",
        "throughput (median)",
        "each run",
        "wait for a connection, p50",
        "wait for a connection, p99",
        "latency of the server, p50",
        "latency of the server, p99",
    }
    assert [text for text in texts if text.startswith("knee")] == ([f"knee: {knee}"] if knee else [])
    assert texts >= {"1", "2", "8"}


TWO_WORKERS = ("--max", "8", "--greenlets", "8", "--workers", "2", "--service", "0.015", "--timeout", "20")


def test_what_two_workers_give_is_measured_told_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "sizing.svg"
    ended = run(*TWO_WORKERS, "--seconds", "0.22", "--json", "--picture", str(picture))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)

    assert_machines_can_read_it(found)
    # However slow the machine is, they are no faster than they can be, and what is said is what was measured.
    for point in found["points"]:
        assert 0.014 <= point["in_use_p50"] <= point["in_use_p99"]
        assert 0 <= point["wait_p50"] <= point["wait_p99"]
        assert 0 < point["lent"] <= point["size"]
        assert 0 <= point["busy"] <= 1
        # Replies to each connection may have come shortly before, and be read only now.
        assert max(point["rates"]) * 0.22 <= 2 * (0.22 / 0.014 + 1) + point["size"]
    figures = {field.name for field in dataclasses.fields(Point)}
    points = [Point(**{name: point[name] for name in point if name in figures}) for point in found["points"]]
    verdict = judge(points, 8)
    assert (found["verdict"]["kind"], found["verdict"]["knee"]) == (verdict.kind, verdict.knee)
    assert found["verdict"]["recommended"] == verdict.knee
    assert found["words"] == words(verdict, Plan(most=8, greenlets=(8,), seconds=0.22, timeout=20))
    assert found["check"] == check_words(verdict, points)
    assert_people_can_read_it(picture, verdict.knee)
    # How it goes is told to people.
    assert "a practice server of 2 workers, 15 ms a request" in flat(ended.stderr)
    assert re.search(r"done in \d+ s at the latest \(seed 1961\)", flat(ended.stderr))
    assert "50 % of the steps are done" in ended.stderr
    assert f"The picture is in {picture}." in ended.stderr


#: Their figures if nothing disturbs them: whoever has a connection is served by one of the two, or queues for one.
UNDISTURBED = """
from gsocketpool.cli import load

def measure(target, step, plan, stop):
    rate = min(step.size, 2) / 0.015
    in_use = max(step.size, 2) / 2 * 0.015
    count = int(rate * plan.seconds)
    waits = [step.greenlets / rate - in_use] * count
    return load.Sample(step, plan.seconds, [in_use] * count, waits, busy=0.1, lent=step.size)

load.measure = measure
"""


def test_their_knee_is_recommended_and_drawn_where_nothing_disturbs_them(tmp_path: Path) -> None:
    picture = tmp_path / "sizing.svg"
    ended = run(*TWO_WORKERS, "--seconds", "3", "--json", "--picture", str(picture), before=UNDISTURBED)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    verdict = found["verdict"]

    assert (verdict["kind"], verdict["knee"], verdict["recommended"], verdict["agrees"]) == ("knee", 2, 2, True)
    assert verdict["needed"] == pytest.approx(2)
    assert "Recommended: max_connections=2" in " ".join(found["words"])
    assert "Little's law: 133 requests a second x 15.00 ms in use" in " ".join(found["check"])
    assert_people_can_read_it(picture, 2)


def test_people_get_a_table_for_each_number_of_greenlets_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "sizing.png"
    ended = run(*SHORT, "--workers", "2", "--picture", str(picture), before=UNDISTURBED)

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert not re.search(r"[^\x20-\x7e\n]", ended.stdout)
    assert "Pools of 1 to 4 connections, 1 and 8 greenlets" in flat(ended.stdout)
    one, eight = re.split(r"8 greenlets; times in milliseconds", ended.stdout.partition("1 greenlets; times")[2])
    row = r"^ *(\d+) +[\d,]+(?: +[\d,]+\.\d\d){4}"
    assert re.findall(row, one, re.MULTILINE) == ["1"]
    assert set(re.findall(row, eight, re.MULTILINE)) >= {"1", "2", "4"}
    assert "Little's law:" in ended.stdout
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) > 500


def test_a_terminal_gets_a_bar_that_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = (tmp_path / "screen").open("w+", encoding="utf-8")

    class Terminal(Console):
        def __init__(self, **options: Any) -> None:
            super().__init__(
                **options | {"file": screen, "force_terminal": True, "_environ": {"TERM": "xterm"}, "width": 100}
            )

    monkeypatch.setattr("gsocketpool.cli.size.Console", Terminal)
    with screen:
        result = CliRunner().invoke(main, ["size", *SHORT, "--service", "0.002"])
        screen.seek(0)
        shown = screen.read()

    assert result.exit_code == 0, shown
    assert re.search(r"\d+/16\S* .*a pool of [124], [18] greenlets", shown)
    assert "% of the steps" not in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    assert shown.rindex("\x1b[2K") < shown.index("8 greenlets; times in milliseconds")


#: After a quarter of 42 steps there is one that is not over before somebody has pressed Ctrl-C.
LONG_IN_THE_END = """
import dataclasses
import itertools
from gsocketpool.cli import load

numbers, real = itertools.count(1), load.measure

def measure(target, step, plan, stop):
    return real(target, step, dataclasses.replace(plan, seconds=20) if next(numbers) > 11 else plan, stop)

load.measure = measure
"""


def test_ctrl_c_shows_what_there_is_and_leaves_no_server() -> None:
    arguments = ("--max", "4", "--greenlets", "4", "--seconds", "0.07", "--repeats", "6", "--timeout", "20")
    with std_subprocess.Popen(
        command(*arguments, before=LONG_IN_THE_END),
        cwd=ROOT,
        env={k: v for k, v in environment().items() if not k.startswith("COV")} | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        while "25 % of the steps are done" not in (line := process.stdout.readline()):
            assert line, "it ended"
            lines.append(line)
        (server,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 1, errors
    assert errors == ""
    assert "4 greenlets; times in milliseconds" in output
    assert "No knee is named: not all steps were done." in output
    assert re.search(r"Ended early, after \d+ of at most 42 steps and \d+ s: Ctrl-C was pressed\.", flat(output))
    assert "Little's law" not in output
    assert not server.is_running()


def test_ctrl_c_before_anything_is_measured_is_told_in_a_word() -> None:
    asked = Event()

    def hear(sock: Any) -> None:
        sock.recv(100)
        asked.set()
        swallow(sock)

    with (
        Server(hear) as server,
        subprocess.Popen(
            command(f"tcp://127.0.0.1:{server.port}", *LINES, "--timeout", "20"),
            cwd=ROOT,
            env={k: v for k, v in environment().items() if not k.startswith("COV")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert asked.wait(20)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)

    assert (process.returncode, output, errors.strip()) == (1, "", "Aborted!")


def test_the_practice_server_ends_with_who_started_it() -> None:
    code = "\n".join(
        (
            "import sys",
            "from gsocketpool.cli.practice import Practice, PracticeServer",
            "with PracticeServer(Practice()) as server:",
            "    print(server._process.pid, flush=True)",
            "    sys.stdin.read()",
        )
    )
    with std_subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.kill()
    psutil.wait_procs([server], timeout=20)

    assert not server.is_running()


# Real servers


def test_valkey_is_measured(valkey: Valkey) -> None:
    before = valkey.opened()
    found = measured(f"tcp://{valkey.host}:{valkey.port}", "--send", r"PING\r\n", "--until", r"\r\n", *BRIEF)

    assert (found["send"], found["reply"], found["practice"]) == ("PING\r\n", "+PONG", None)
    assert all(point["requests"] > 0 and point["errors"] == {} for point in found["points"])
    steps = 2 * (3 + 1)
    assert 0 < valkey.opened() - before <= 1 + 4 * (steps + 2 * 2)
    deadline = gevent.Timeout.start_new(20)
    while valkey.connections():
        gevent.sleep(0.01)
    deadline.close()


def test_the_server_sees_no_more_connections_than_the_pool_may_have() -> None:
    with LineEchoServer() as server:
        found = measured(f"tcp://localhost:{server.port}", *LINES, *BRIEF)

        assert 1 <= server.most <= 4
        server.wait_open(0)
    assert found["reply"] == "ping"


def test_a_reply_may_be_known_by_its_length() -> None:
    with LineEchoServer() as server:
        found = measured(f"tcp://127.0.0.1:{server.port}", "--send", r"ping\n", "--expect-bytes", "5", *BRIEF)

    assert found["reply"] == "ping\n"


def test_a_unix_socket_is_measured(tmp_path: Path) -> None:
    with LineEchoServer(path=tmp_path / "s") as server:
        found = measured(f"unix:{tmp_path}/s", *LINES, *BRIEF)
        assert server.accepted > 4

    assert found["points"][-1]["requests"] > 0


def test_tls_is_verified(tmp_path: Path) -> None:
    authority = Authority()
    with LineEchoServer(tls=authority.server_context("localhost")) as server:
        address = f"tcp://localhost:{server.port}"
        message = refused(address, *LINES, "--tls")
        found = measured(address, *LINES, *BRIEF, "--tls", "--ca", str(authority.write(tmp_path)))

    assert "cannot be reached" in message
    assert "certificate verify failed" in message
    assert "Does it speak TLS" not in message
    assert found["points"][-1]["errors"] == {}


def size_of(server: Server, *arguments: str) -> tuple[int, str]:
    """What it shows, with its lines."""
    result = CliRunner().invoke(main, ["size", f"tcp://127.0.0.1:{server.port}", *LINES, *arguments])
    return result.exit_code, result.output


def last_words(output: str) -> str:
    """What it says after the tables, in one line; the figures are not looked at."""
    assert "Little's law" not in output
    assert "did not get round" not in output
    return flat(re.split(r"^(?=The server|No knee)", output, maxsplit=1, flags=re.MULTILINE)[-1])


def test_what_fails_is_counted_and_left_out() -> None:
    busy = 0

    def serve(sock: Any) -> None:
        nonlocal busy
        busy += 1
        try:
            while data := sock.recv(100):
                if busy > 2:
                    return reset(sock)
                gevent.sleep(0.001)
                sock.sendall(data)
        finally:
            busy -= 1

    with Server(serve) as server:
        status, output = size_of(server, *BRIEF)

    assert status == 0
    assert re.search(r"^ +4 .* \d+ reset *$", output, re.MULTILINE)
    assert "No knee can be named: too many requests failed (" in last_words(output)


def test_requests_are_bounded() -> None:
    plan = Plan(most=4, greenlets=(8,), seconds=20, requests=100, timeout=20)
    with LineEchoServer() as server:
        sample = measure(target_at(server, timeout=20), Step(2, 8), plan, lambda: False)
        server.wait_open(0)

    assert len(sample.in_use) == len(sample.waits) == 100
    assert sample.errors == {}
    assert sample.seconds < 20


PING = Request(b"ping\n", b"\n")


def target_at(server: Server, timeout: float, request: Request = PING) -> Target:
    return Target(Address.parse(f"tcp://127.0.0.1:{server.port}"), request, ["127.0.0.1"], timeout=timeout)


def put_load_on(server: Server, *, timeout: float, of_connections: float | None = None, **options: Any) -> Sample:
    """Four greenlets with two connections, for a short while."""
    plan = Plan(most=4, greenlets=(4,), timeout=timeout, **options)
    target = target_at(server, of_connections or timeout)
    sample = measure(target, Step(2, 4), plan, lambda: False)
    server.wait_open(0)
    return sample


def test_a_reply_that_never_comes_is_an_error_of_the_load_too() -> None:
    with Server(swallow) as server:
        sample = put_load_on(server, seconds=1.2, timeout=0.1)

    assert len(sample.in_use) == 0
    assert set(sample.errors) == {"timed out"}


def drip(sock: Any) -> None:
    """Begin a reply, and never end it."""
    sock.recv(100)
    while True:
        sock.sendall(b"x")
        gevent.sleep(0.02)


@pytest.mark.parametrize(
    ("serve", "times"),
    [
        (swallow, {"timeout": 1.6}),
        (drip, {"timeout": 0.3, "of_connections": 20}),  # these begin again with each piece
    ],
    ids=["swallow", "drip"],
)
def test_what_is_under_way_when_a_step_ends_has_failed_if_no_reply_comes_in_time(
    serve: Any, times: dict[str, float]
) -> None:
    with Server(serve) as server:
        sample = put_load_on(server, seconds=0.05, **times)

    assert len(sample.in_use) == 0
    assert sample.errors == {"timed out": 2}  # two were asked; two waited for a connection, and were then not needed


def test_what_is_under_way_when_a_step_ends_has_not_failed_if_it_takes_longer_than_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = Event()

    def slow(sock: Any) -> None:
        while data := sock.recv(100):
            over.wait()
            sock.sendall(data)

    def await_replies(of_step: Any, borrowers: Any) -> None:
        over.set()
        real(of_step, borrowers)

    real = load._Load._await_replies
    monkeypatch.setattr(load._Load, "_await_replies", await_replies)
    with Server(slow) as server:
        sample = put_load_on(server, seconds=0.05, timeout=20)

    assert (len(sample.in_use), sample.errors) == (0, {})
    assert not merge([sample])[0].failing


def server_that_fails(when: int, how: Any) -> Server:
    """It echoes so many requests in all, and does ``how(server)`` at the next one: if that returns, it says nothing."""
    left = when

    def serve(sock: Any) -> None:
        nonlocal left
        while data := sock.recv(100):
            left -= 1
            if left < 0:
                how(server)
                return swallow(sock)
            gevent.sleep(0.002)
            sock.sendall(data)

    server = Server(serve)
    return server


def dies(server: Server) -> None:
    server._stop_accepting()
    gevent.spawn(server.hang_up)


def hangs(server: Server) -> None:
    pass


def test_a_server_that_dies_in_the_middle_ends_the_run_and_fills_no_screen() -> None:
    with server_that_fails(20, dies) as server:
        ended = run(f"tcp://127.0.0.1:{server.port}", *LINES, *SHORT)

    assert (ended.returncode, ended.stderr) == (1, "")
    assert re.search(r"^ +\d .* 0 +- +- +- +- +\d+ +\d+ refused *$", ended.stdout, re.MULTILINE)
    assert re.fullmatch(
        r"The server is gone: (\d+ (hung up|refused|reset)(, )?)+\. That is every request of the last 2 steps\. "
        r"Ended early, after \d+ of at most 16 steps and \d+ s: the server is gone\.",
        last_words(ended.stdout),
    )


def test_a_server_that_stops_answering_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_first(target: Target) -> tuple[bytes, float]:
        return first_contact(dataclasses.replace(target, timeout=20))

    monkeypatch.setattr("gsocketpool.cli.size.first_contact", at_first)
    with server_that_fails(6, hangs) as server:
        status, output = size_of(server, *SHORT, "--timeout", "0.3")

    assert status == 1
    assert re.search(r"^ +\d .* 0 +- +- +- +- +\d+ +\d+ timed out *$", output, re.MULTILINE)
    assert re.fullmatch(
        r"The server is gone: \d+ timed out\. That is every request of the last 2 steps\. A reply may take 0\.3 s "
        r"\(--timeout\): see what the server does, or raise that\. "
        r"Ended early, after \d+ of at most 16 steps and \d+ s: the server is gone\.",
        last_words(output),
    )


def test_a_server_that_bears_a_few_connections_only_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger pools get no reply at all; but it answers whoever asks alone."""
    open_now = 0

    def patiently_or_not(target: Target, step: Step, plan: Plan, stop: Any) -> Sample:
        seconds, timeout = (5, 20) if step.size <= 2 else (0.05, 0.3)
        plan = dataclasses.replace(plan, seconds=seconds, timeout=timeout)
        return measure(dataclasses.replace(target, timeout=timeout), step, plan, stop)

    monkeypatch.setattr(load, "measure", patiently_or_not)

    def serve(sock: Any) -> None:
        nonlocal open_now
        open_now += 1
        try:
            while line := sock.recv(100):
                if open_now <= 2:
                    sock.sendall(line)
        except OSError:
            pass  # the pool has given up
        finally:
            open_now -= 1

    with Server(serve) as server:
        plan = Plan(most=8, greenlets=(8,), requests=100, repeats=2)
        measuring = Run(target_at(server, timeout=20), plan, lambda: False)
        steps = [step.size for step in measuring]
    assert measuring.ended is None
    failed = {sample.step.size for sample in measuring.samples if not sample.in_use}
    assert failed <= {4, 8}
    assert failed
    assert {1, 2} <= {sample.step.size for sample in measuring.samples if sample.in_use}
    assert len(steps) < 12, "no larger pool is tried again"


def test_a_server_that_is_gone_after_the_first_contact_ends_the_run() -> None:
    def once(sock: Any) -> None:
        server._stop_accepting()
        LineEchoServer()._handler(sock)

    with Server(once) as server:
        ended = CliRunner().invoke(main, ["size", f"tcp://127.0.0.1:{server.port}", *LINES, *SHORT, "--json"])
    found = json.loads(ended.stdout)

    assert ended.exit_code == 1
    assert (found["done"], found["ended"], found["verdict"]["kind"]) == (False, "gone", "gone")
    assert (found["verdict"]["recommended"], found["check"]) == (None, [])
    assert set(found["verdict"]["errors"]) == {"refused"}
    assert re.search(r"Ended early, after \d of at most 16 steps", flat(ended.stderr))


def test_a_run_that_takes_too_long_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsocketpool.cli.sizing.SPARE", 0.0)
    left = 5  # so many are asked for at first, and they need not take long

    def serve(sock: Any) -> None:
        nonlocal left
        while data := sock.recv(100):
            left -= 1
            gevent.sleep(0.3 if left < 0 else 0)
            sock.sendall(data)

    with Server(serve) as server:
        status, output = size_of(server, *SHORT, "--greenlets", "4")

    assert status == 1
    assert re.fullmatch(
        r"No knee is named: not all steps were done\. Ended early, after \d+ of at most 14 steps and \d+ s: the time "
        r"was up; late replies had to be awaited after each step, for up to 20 s \(--timeout\)\.",
        last_words(output),
    )


def test_a_run_that_is_whole_has_done_all_steps() -> None:
    plan = Plan(most=4, greenlets=(8,), seconds=5, requests=100, repeats=2, timeout=20)
    with LineEchoServer() as server:
        measuring = Run(target_at(server, timeout=20), plan, lambda: False)
        steps = list(measuring)

    assert measuring.ended is None
    assert steps[:6] == plan.steps()
    assert steps[6:] == plan.refined(merge(measuring.samples[:6]))
    assert [sample.step for sample in measuring.samples] == steps


def refused(address: str, *arguments: str, timeout: str = "20") -> str:
    """What it says, where there is nothing to measure.

    :param timeout: where that is over before it says so, this machine may stand still for a second before.
    """
    status, output = invoke(address, *(arguments or LINES), "--timeout", timeout)
    assert status == 1, output
    assert output.startswith("Error: ")
    return output


def test_a_server_that_is_not_there_is_one_clear_message() -> None:
    with socket.socket() as taken:  # so that nobody else listens there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        ended = run(f"tcp://127.0.0.1:{port}", *LINES)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"Error: tcp://127.0.0.1:{port} cannot be reached: ")
    assert "Connection refused" in ended.stderr
    assert ended.stderr.count("\n") == 1
    with BlackHole() as hole:
        assert "cannot be reached" in refused(f"tcp://127.0.0.1:{hole.port}", timeout="0.3")
    assert "cannot be reached: 'a..b' is not known" in refused("tcp://a..b:80")
    assert "cannot be reached" in refused("unix:/nowhere/at.all")


def test_a_server_that_answers_otherwise_is_one_clear_message() -> None:
    with Server(swallow) as server:
        message = refused(f"tcp://127.0.0.1:{server.port}", timeout="1.3")
    assert "does not answer as expected" in message
    assert "sent nothing within 1.3 s" in message
    assert r"A request is b'ping\n', and b'\n' is to end a reply; nothing came." in message


def test_a_reply_that_does_not_end_as_it_should_is_shown() -> None:
    def pong(sock: Any) -> None:
        while sock.recv(100):
            sock.sendall(b"+PONG\r\n")

    def complaint(server: Server, request: Request) -> str:
        with pytest.raises(NoAnswerError) as caught:
            first_contact(target_at(server, 1.3, request))
        return str(caught.value)

    with Server(pong) as server, Server(drip) as endless:
        requests = {"b'OK'": Request(b"ping\n", b"OK"), "byte 100": Request(b"ping\n", size=100)}
        never = gevent.spawn(complaint, endless, PING)
        waiting = {what: gevent.spawn(complaint, server, request) for what, request in requests.items()}
        for what, job in waiting.items():
            message = job.get()
            assert f"{what} is to end a reply; what came in 1.3 s is b'+PONG\\r\\n' (7 bytes)." in message
            assert "If that is the whole reply, say so with --until or --expect-bytes." in message
        message = refused(f"tcp://127.0.0.1:{server.port}", *LINES[:2], "--expect-bytes", "3")
        assert r"says b'+PO' and goes on after byte 3 with b'NG\r\n'" in message
        assert "what came in 1.3 s is b'xxx" in never.get()


def test_a_server_that_speaks_first_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GOES_ON", 20.0)  # it does speak; on a machine that is busy a little later
    with Server(say(b"220 welcome\r\n")) as server:
        message = refused(f"tcp://127.0.0.1:{server.port}")

    assert r"speaks first, and says b'220 welcome\r\n'. Only a server that speaks when it is asked" in message


def test_tls_on_one_side_only_is_one_clear_message() -> None:
    def error(sock: Any) -> None:
        sock.recv(1000)
        sock.sendall(b"-ERR what?\r\n")

    with Server(swallow) as silent, Server(error) as loud:
        assert "does it speak TLS?" in refused(f"tcp://127.0.0.1:{silent.port}", *LINES, "--tls", timeout="1.3")
        message = refused(f"tcp://127.0.0.1:{loud.port}", *LINES, "--tls")
        assert "Does it speak TLS at that port? If not, leave --tls out." in message
    with LineEchoServer(tls=Authority().server_context("localhost")) as server:
        assert "give --tls." in refused(f"tcp://127.0.0.1:{server.port}")


def test_a_server_that_breaks_off_is_one_clear_message() -> None:
    def serve(sock: Any) -> None:
        sock.sendall(sock.recv(100))
        sock.recv(100)

    with Server(serve) as server:
        message = refused(f"tcp://127.0.0.1:{server.port}")

    assert "does not answer as expected" in message
    assert r"the reply before was b'ping'" in message


def test_a_reply_that_goes_on_is_noticed() -> None:
    with LineEchoServer() as server:
        message = refused(f"tcp://127.0.0.1:{server.port}", "--send", r"a\nb\n", "--until", r"\n")

    assert r"goes on after b'\n' with b'b\n'" in message
    assert "Give the end of the whole reply as --until" in message


def test_a_server_that_hangs_up_after_a_reply_has_nothing_to_pool() -> None:
    def once(sock: Any) -> None:
        sock.sendall(sock.recv(100))

    with Server(once) as server:
        message = refused(f"tcp://127.0.0.1:{server.port}")

    assert "ends the connection after a reply. There is nothing to pool" in message

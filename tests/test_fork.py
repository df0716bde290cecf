"""What becomes of pools when their process is forked, seen from the server.

The programs that fork are in `scripts/fork.py`, one scenario for each run, forked by a plain `os.fork` and by gevent's.
Their server is here: it takes down what comes on which connection, and when it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from .peers import Postgres
from .servers import Authority, BlackHole, Server, refused_port

ROOT = Path(__file__).parent.parent

AUTHORITY = Authority()


class Heard:
    """What came on one connection."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rest = b""  # no line, so far
        self.ended = False

    def as_json(self) -> tuple[list[str], str, bool]:
        return self.lines, self.rest.decode("latin-1"), self.ended


class Witness:
    """Answers lines with the same line, and takes them down.

    A line that says ``half`` is answered by half of it, and by the other half when the program has told it to let go. A
    connection that begins with ``control`` is the program's means to ask; it is not counted.
    """

    def __init__(self) -> None:
        self._heard: dict[Any, Heard] = {}
        self._let_go = Event()
        self._held = 0
        self._hold_handshake = False
        self._tls = AUTHORITY.server_context("127.0.0.1")
        self._hole = BlackHole()
        self._stack = ExitStack()

    def __enter__(self) -> Witness:
        with ExitStack() as stack:
            self.plain = stack.enter_context(Server(self.serve))
            self.tls = stack.enter_context(Server(self._shake_hands))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def addresses(self, folder: Path) -> dict[str, Any]:
        """Where a program finds it."""
        return {
            "port": self.plain.port,
            "tls": self.tls.port,
            "refused": refused_port(),
            "authority": str(AUTHORITY.write(folder)),
        }

    def serve(self, sock: Any) -> None:
        heard = self._heard[sock] = Heard()
        try:
            while data := sock.recv(65536):
                *lines, heard.rest = (heard.rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"control "):
                        del self._heard[sock]
                        sock.sendall(json.dumps(self._control(line[8:].decode())).encode())
                        return
                    heard.lines.append(line.decode("latin-1"))
                    if line.endswith(b" half"):
                        sock.sendall(line[:-2])
                        self._wait()
                        sock.sendall(line[-2:] + b"\n")
                    else:
                        sock.sendall(line + b"\n")
        finally:
            heard.ended = True

    def _wait(self) -> None:
        self._held += 1
        try:
            self._let_go.wait()
        finally:
            self._held -= 1

    def _shake_hands(self, sock: Any) -> None:
        if self._hold_handshake:
            self._hold_handshake = False
            self._wait()
        with self._tls.wrap_socket(sock, server_side=True) as tls:
            self.serve(tls)

    def _control(self, what: str) -> Any:
        if what == "heard":
            return [heard.as_json() for heard in self._heard.values()]
        if what == "held":
            return self._held
        if what == "begin":
            self._heard.clear()
        elif what == "let go":
            self._let_go.set()
            self._let_go = Event()
        elif what == "hold a handshake":
            self._hold_handshake = True
        elif what == "hang up":
            for sock in self._heard:
                sock.shutdown(socket.SHUT_RDWR)
        elif what == "hole":
            self._hole = self._stack.enter_context(BlackHole())
            return self._hole.port
        elif what == "open the hole":
            self._open_the_hole()
        else:
            raise ValueError(what)
        return None

    def _open_the_hole(self) -> None:
        """Serve those who have waited to be accepted."""
        hole, *fillers = self._hole._sockets
        for sock in fillers:
            sock.close()
        listener = self._stack.enter_context(socket.socket(fileno=os.dup(hole.fileno())))
        self._stack.callback(gevent.spawn(self._accept, listener).kill)

    def _accept(self, listener: Any) -> None:
        while True:
            sock, _ = listener.accept()
            self._stack.callback(gevent.spawn(self._serve_and_close, sock).kill)

    def _serve_and_close(self, sock: Any) -> None:
        with sock:
            self.serve(sock)


@pytest.fixture
def witness() -> Iterator[Witness]:
    with Witness() as witness:
        yield witness


def run(scenario: str, kind: str, addresses: dict[str, Any], **environment: str) -> None:
    script = Path(__file__).parent / "scripts" / "fork.py"

    def in_a_thread() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), scenario, kind, json.dumps(addresses)],
            env={
                **os.environ,
                "PYTHONWARNINGS": "error",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=55,
            check=False,
        )

    # Not here: the program's server runs in this one.
    ended = gevent.get_hub().threadpool.apply(in_a_thread)
    # Nothing printed is G12: what a fork breaks in the child is nobody's fault, and not worth a warning.
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), ended.stderr


SCENARIOS = {
    "idle": "idle_connections_stay_the_parents",
    "watched": "the_parent_still_notices_that_an_idle_connection_was_hung_up_on",
    "block": "the_child_leaves_a_with_block_of_the_parents_in_silence",
    "by_hand": "the_child_gives_back_what_the_parent_acquired_in_silence",
    "subclassed": "the_block_of_a_subclass_with_its_own_acquire_is_left_in_silence",
    "mid_request": "the_rest_of_a_reply_reaches_the_parent_alone",
    "waiters": "who_waits_is_served_on_both_sides_in_order",
    "granted": "who_was_granted_a_connection_and_has_not_run_gets_one_on_both_sides",
    "told": "who_waits_for_a_drain_or_for_readiness_is_told_on_both_sides",
    "dial_not_begun": "a_dial_that_has_not_begun_belongs_to_the_parent",
    "connecting": "a_connect_under_way_goes_on_in_the_parent_alone",
    "handshake": "a_handshake_under_way_goes_on_in_the_parent_alone",
    "greeting": "a_login_under_way_goes_on_in_the_parent_alone",
    "opaque_dial": "a_login_on_an_unknown_descriptor_goes_on_in_the_parent_alone",
    "wrapped_dial": "a_wrapped_dial_under_way_goes_on_in_the_parent_alone",
    "wrapped": "wrapped_objects_stay_the_parents_with_a_fileno_or_without",
    "several_pools": "one_pools_trouble_is_nothing_to_the_others",
    "made_after": "pools_made_before_and_after_work_on_both_sides",
    "closing": "a_close_under_way_or_not_begun_is_the_parents",
    "keepalive": "a_keepalive_under_way_is_the_parents",
    "keepalive_not_begun": "a_keepalive_that_has_not_begun_is_the_parents",
    "upkeep": "each_side_keeps_its_own_stock",
    "reaping": "reaping_under_way_is_the_parents",
    "backing_off": "the_child_does_not_wait_for_the_parents_pause",
    "paused": "a_paused_or_closed_pool_stays_so_on_both_sides",
    "loans": "the_child_owes_no_report_of_the_parents_borrowers",
    "tls": "tls_goes_on_in_the_parent_with_its_records_in_step",
    "exits": "a_child_that_ends_as_programs_do_says_nothing",
    "forgotten": "a_child_that_forgets_the_pool_finalizes_nothing",
    "grandchild": "a_grandchild_uses_neither_the_childs_connections_nor_the_parents",
    "limit": "at_the_limit_of_descriptors_the_child_is_cut_off_all_the_same",
    "figures": "the_counts_go_on_and_the_state_begins_anew",
    "every_switch": "a_fork_at_every_switch_point_harms_nobody",
}


@pytest.mark.parametrize("scenario", [pytest.param(name, id=f"g10_{what}") for name, what in SCENARIOS.items()])
def test_g10_fork(witness: Witness, tmp_path: Path, scenario: str) -> None:
    run(scenario, "plain and gevent", witness.addresses(tmp_path))


@pytest.mark.parametrize("scenario", ["block", "mid_request", "wrapped_dial", "exits", "tls"])
def test_g10_fork_in_a_program_with_a_patched_standard_library(witness: Witness, tmp_path: Path, scenario: str) -> None:
    run(scenario, "patched", witness.addresses(tmp_path))


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("thread", id="g10_by_a_thread"),
        pytest.param("modules", id="g10_by_multiprocessing_beside_a_subprocess"),
    ],
)
def test_g10_fork_in_other_ways(witness: Witness, tmp_path: Path, scenario: str) -> None:
    run(scenario, "plain", witness.addresses(tmp_path))


@pytest.mark.parametrize("scenario", ["watched", "mid_request"])
def test_g10_fork_with_the_other_event_loop(witness: Witness, tmp_path: Path, scenario: str) -> None:
    """libuv's changes what it shares with the parent at once, where libev's waits until it has a copy of its own."""
    run(scenario, "plain", witness.addresses(tmp_path), GEVENT_LOOP="libuv", PYTHONWARNINGS="ignore")


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("psycopg", id="g10_the_parents_session_goes_on"),
        pytest.param("psycopg_dial", id="g10_a_connect_under_way_goes_on_in_the_parent_alone"),
    ],
)
def test_psycopg_and_fork(witness: Witness, postgres: Postgres, tmp_path: Path, scenario: str) -> None:
    run(scenario, "patched", {**witness.addresses(tmp_path), "dsn": postgres.dsn})
    postgres.wait_for_connections(0)

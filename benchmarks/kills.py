"""The kill test: borrowers are killed and timed out at random. Does anybody get somebody else's answer?"""

from __future__ import annotations

import functools
import random
from typing import Any

import gevent
import gevent.event

from benchmarks import measure as m
from benchmarks.peers import PEERS
from benchmarks.server import DELAY, Server
from gsocketpool import TcpConnection

CONNECTIONS = 8
GREENLETS = 200
#: Seconds that a borrower waits for a connection before the case is called stuck.
STUCK = 60.0


class Fate:
    """What is to happen to one borrower: a third are struck, once, in one of their turns, waiting or talking."""

    def __init__(self, chance: random.Random, turns: int) -> None:
        self.struck = chance.random() < 1 / 3
        self.turn = chance.randrange(turns)
        self.talking = chance.random() < 0.5
        self.by_kill = chance.random() < 0.5
        self.delay = chance.uniform(0, DELAY if self.talking else 10 * DELAY)
        self._timer: Any = None

    def strikes(self, turn: int, *, talking: bool) -> bool:
        """Say whether it is now that the clock starts to tick."""
        return self.struck and turn == self.turn and talking == self.talking

    def start(self) -> None:
        """Strike the calling greenlet, a moment later."""
        if self.by_kill:
            self._timer = gevent.get_hub().loop.timer(self.delay)
            borrower: Any = gevent.getcurrent()
            self._timer.start(borrower.kill, gevent.GreenletExit, False)
        else:
            self._timer = gevent.Timeout.start_new(self.delay)

    def miss(self) -> None:
        """Come too late: the greenlet is done."""
        if self._timer is not None:
            self._timer.close()


def measure(peer: str, port: int, seed: int, turns: int, at_once: float) -> m.Result:
    """Let them talk; count the answers and the wrong ones, and whether the pool is whole afterwards.

    :param at_once: seconds in which all its connections must then be lent, and answer.
    """
    chance = random.Random(seed)
    pool = PEERS[peer].build(functools.partial(TcpConnection, "127.0.0.1", port), CONNECTIONS, fill=False)
    found = {"answers": 0, "wrong": 0, "struck": 0, "failed": 0, "lent": 0, "right": 0}

    def borrower(number: int, fate: Fate) -> None:
        try:
            for turn in range(turns):
                question = b"%d %d" % (number, turn)
                if fate.strikes(turn, talking=False):
                    fate.start()
                with pool.connection() as connection:
                    if fate.strikes(turn, talking=True):
                        fate.start()
                    answer = ask(connection, question)
                found["answers"] += 1
                found["wrong"] += answer != question
        except (gevent.GreenletExit, gevent.Timeout):
            found["struck"] += 1
        except Exception:
            found["failed"] += 1
        finally:
            fate.miss()

    def late_borrower() -> None:
        with pool.connection() as connection:
            found["lent"] += 1
            if found["lent"] == CONNECTIONS:
                everybody.set()
            everybody.wait()
            answer = ask(connection, b"afterwards")
            found["right"] += answer == b"afterwards"

    greenlets = [gevent.spawn(borrower, number, Fate(chance, turns)) for number in range(GREENLETS)]
    gevent.joinall(greenlets, timeout=STUCK)
    found["stuck"] = sum(not greenlet.dead for greenlet in greenlets)
    gevent.killall(greenlets, timeout=1)

    everybody = gevent.event.Event()
    late = [gevent.spawn(late_borrower) for _ in range(CONNECTIONS)]
    everybody.wait(at_once)
    lent = found["lent"]
    everybody.set()
    gevent.joinall(late, timeout=at_once)
    gevent.killall(late, timeout=1)
    return {**found, "lent": lent}


def ask(connection: Any, question: bytes) -> bytes:
    """Send one line and return the line that comes back."""
    connection.send(question + b"\n")
    answer: bytes = connection.recv_until(b"\n", 1024)
    return answer.rstrip(b"\n")


def report(run: m.Run) -> None:
    """Print the table."""
    names = run.available(PEERS, [name for name in PEERS if name not in ("floor", "ours, for ever", "ours, patient")])
    seeds = [1] if run.quick else [1, 2, 3, 4, 5]
    turns = 5 if run.quick else 20
    rows = []
    for name in names:
        found: list[m.Result] = []
        for seed in seeds:
            job = {"case": "kills", "peer": name, "seed": seed, "turns": turns, "at_once": 0.3 if run.quick else 2.0}
            with Server("lines") as server:
                found += m.run([{**job, "port": server.port}], patched=PEERS[name].patched)
            found[-1]["peak"] = server.peak
        wrong = sum(result["wrong"] for result in found)
        peak, lent, right = (
            max(result["peak"] for result in found),
            min(result["lent"] for result in found),
            min(result["right"] for result in found),
        )
        sums = (sum(result[key] for result in found) for key in ("answers", "struck", "failed", "stuck"))
        rows.append(
            [PEERS[name].title, f"{wrong:,}", *(f"{number:,}" for number in sums), *map(str, (peak, lent, right))]
        )
        if name == "ours":
            run.target("kill test: wrong replies", wrong, at_most=0)
            run.target("kill test: most sockets that the server saw", peak, at_most=CONNECTIONS)
            run.target("kill test: borrowers served at once afterwards", min(lent, right), at_least=CONNECTIONS)
    print(
        f"{GREENLETS} greenlets, {CONNECTIONS} connections, {turns} lines each, a third killed or timed out at random;"
        f"\nseeds {', '.join(map(str, seeds))}: replies and greenlets summed up, the most sockets, the fewest of"
        f" {CONNECTIONS} borrowers served afterwards\n"
    )
    head = ["pool", "wrong", "of replies", "struck", "failed", "stuck", "sockets", "lent at once", "answered right"]
    print(m.table(head, rows))

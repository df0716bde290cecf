"""A pool's core on a stage: steps are played to it, and what it does is written down, for `pool_pictures` to draw.

Nothing is decided here. Who gets which connection, who waits, what is dialled and what is closed is what the core
answers; this plays the parts of those around it: borrowers, dials that succeed or fail, closes that end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from gsocketpool.budget import Budget
from gsocketpool.core import CLOSED, INSPECTED, Core, Member, Place
from gsocketpool.exceptions import BreakerOpenError, PoolClosedError
from gsocketpool.lifetime import NEVER, Limits

__all__ = ["STATES", "STORIES", "Borrower", "Frame", "Move", "Slot", "Socket", "Stage", "life", "play"]

# What a connection can be, as the core knows it.
NONE: Final = "no socket"
DIALLING: Final = "dialling"
IDLE: Final = "idle"
GRANTED: Final = "granted"
IN_USE: Final = "in use"
TAKEN_OUT: Final = "taken out"
DOOMED: Final = "to be closed"
CLOSING: Final = "closing"

STATES: Final = (NONE, DIALLING, IDLE, GRANTED, IN_USE, TAKEN_OUT, DOOMED, CLOSING)


class Socket:
    """What the core takes for a connection."""

    def __init__(self, core: _Watched, number: int) -> None:
        self.core = core
        self.number = number
        self.place: Place[Socket] | None = None  # for whom it is dialled
        self.generation = core._generation
        self.was_open = False

    def __repr__(self) -> str:
        return f"#{self.number}"

    @property
    def member(self) -> Member[Socket] | None:
        """It, while it is the pool's."""
        return self.core._members.get(id(self))

    @property
    def state(self) -> str:
        """One of `STATES`."""
        member = self.member
        if member is None:
            if id(self) not in self.core._claimed:
                return NONE
            return CLOSING if self.was_open else DIALLING
        if member.holder is None:
            return IDLE
        if member.fate is not None:
            return DOOMED
        if member.holder is INSPECTED:
            return TAKEN_OUT
        return GRANTED if isinstance(member.holder, Place) else IN_USE


class Borrower:
    """Waits in the queue, or has a connection, or neither any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.place: Place[Socket] | None = None
        self.member: Member[Socket] | None = None

    def __repr__(self) -> str:
        return self.name


class Move(NamedTuple):
    """A connection has gone from one state into another, through a call, for a reason if it is closed."""

    before: str
    after: str
    call: str
    reason: str | None


class Slot(NamedTuple):
    """One of at most `max_connections` in a picture. `number` is the connection's, `who` its borrower."""

    state: str
    number: int | None = None
    who: str | None = None


class Frame(NamedTuple):
    """A moment of a story."""

    title: str
    calls: tuple[str, ...]
    slots: tuple[Slot, ...]
    waiting: tuple[str, ...]
    told: tuple[tuple[str, str], ...]  # who, which error
    max_connections: int
    closed: bool


class _Watched(Core[Socket]):
    """The core as it is; but whatever it retires is written down with its reason."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.reasons: dict[Socket, str] = {}

    def retire(self, member: Member[Socket], reason: str) -> Place[Socket] | None:
        self.reasons[member.connection] = reason
        return super().retire(member, reason)


class Record:
    """What has happened, on one stage or on several."""

    def __init__(self) -> None:
        self.sockets: list[Socket] = []  # those that the server may see
        self.moves: Counter[Move] = Counter()
        self.calls: list[str] = []


class Stage:
    """A core, and those around it."""

    def __init__(
        self, max_connections: int, *, max_connecting: int = 2, record: Record | None = None, **settings: Any
    ) -> None:
        self.core = _Watched(max_connections, max_connecting=max_connecting, **settings)
        self.record = record or Record()
        self.borrowers: list[Borrower] = []
        self.retire_at: Callable[[], tuple[float, float]] = lambda: (NEVER, NEVER)
        self.frames: list[Frame] = []
        self._slots: list[Socket | None] = []
        self._numbers = 0
        self._told: list[tuple[str, str]] = []

    def sockets(self, *states: str) -> list[Socket]:
        """Those of this core that are in one of these states."""
        return [each for each in self.record.sockets if each.core is self.core and each.state in states]

    def socket(self, number: int) -> Socket:
        return next(each for each in self.sockets(*STATES) if each.number == number)

    def borrower(self, name: str) -> Borrower:
        return next(each for each in self.borrowers if each.name == name)

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """What changes in here was done by that call."""
        before = {each: each.state for each in self.record.sockets}
        yield
        for each in list(self.record.sockets):
            was, now = before.get(each, NONE), each.state
            if was == now:
                continue
            reason = each.core.reasons[each] if now == CLOSING else None
            self.record.moves[Move(was, now, name, reason)] += 1
            if now == NONE:
                self.record.sockets.remove(each)
        self._agree()

    def _agree(self) -> None:
        """What is shown is what the core counts."""
        core = self.core
        shown = Counter(each.state for each in self.record.sockets if each.core is core)
        lent = shown[GRANTED] + shown[IN_USE] + shown[TAKEN_OUT] + shown[DOOMED]
        seen = (shown[IDLE], lent, shown[DIALLING], shown[CLOSING])
        counted = (core.idle, core.in_use, core._dialling, core._closing)
        if seen != counted:
            raise AssertionError(f"the picture shows {seen}, the core counts {counted}")

    def says(self, text: str, answer: object = None) -> None:
        """Write down a call as a caption shows it."""
        if isinstance(answer, Place):
            answer = self._name(answer) or "a place"
        elif isinstance(answer, Member):
            answer = answer.connection
        self.record.calls.append(text if answer is None else f"{text} → {answer!s}".replace("<", "").replace(">", ""))

    def _name(self, place: Place[Socket] | None) -> str | None:
        return next((each.name for each in self.borrowers if each.place is place), None) if place else None

    # The borrowers

    def borrows(self, name: str, wait: bool = True) -> Borrower:
        borrower = Borrower(name)
        with self.call("take"):
            found = self.core.take(wait)
            if isinstance(found, Member):
                found.holder = borrower
        self.says("take()", found)
        if isinstance(found, Place):
            borrower.place = found
        elif isinstance(found, Member):
            borrower.member = found
        elif found is CLOSED:
            self._told.append((name, PoolClosedError.__name__))
        if borrower.place or borrower.member:
            self.borrowers.append(borrower)
        self.dial()
        return borrower

    def runs(self, borrower: Borrower) -> None:
        """Who was granted a connection collects it."""
        assert borrower.place is not None
        member = borrower.place.member
        assert member is not None
        with self.call("collect"):
            borrower.member, borrower.place.member, borrower.place = member, None, None
            member.holder = borrower

    def hears(self, borrower: Borrower) -> None:
        """Who was told an error leaves."""
        assert borrower.place is not None
        self._told.append((borrower.name, type(borrower.place.error).__name__))
        self.borrowers.remove(borrower)

    def returns(self, borrower: Borrower) -> None:
        member = self._leaves(borrower)
        if member is None:
            return
        with self.call("give"):
            outcome = self.core.give(member)
        self.says(f"give({member.connection})", outcome)
        self.dial()

    def discards(self, borrower: Borrower, reason: str = "discarded") -> None:
        """It was interrupted, or failed, while it had a connection."""
        member = self._leaves(borrower)
        if member is not None:
            self.retires(member, reason)

    def fails_the_check(self, borrower: Borrower) -> None:
        """What it was about to get turned out to be dead, and it comes again."""
        member = borrower.member
        if self._leaves(borrower) is None or member is None:
            return
        with self.call("reject"):
            self.core.reject(member)
        self.says(f"reject({member.connection})")
        self.dial()
        borrower.member = None
        with self.call("retake"):
            found = self.core.retake(True)
            if isinstance(found, Member):
                found.holder = borrower
        self.says("retake()", found)
        if isinstance(found, Member):
            borrower.member = found
            self.borrowers.append(borrower)
        elif isinstance(found, Place):
            borrower.place = found
            self.borrowers.append(borrower)
        self.dial()

    def _leaves(self, borrower: Borrower) -> Member[Socket] | None:
        """Answers what it had, if that is still the pool's."""
        self.borrowers.remove(borrower)
        member = borrower.member
        return member if member is not None and member.holder is borrower else None

    def is_killed(self, borrower: Borrower) -> None:
        """Wherever it is."""
        if borrower.place is None:
            self.discards(borrower)
            return
        place = borrower.place
        with self.call("abandon"):
            unused = self.core.abandon(place)
        self.says(f"abandon({borrower})", unused)
        self.borrowers.remove(borrower)
        if unused is not None:
            with self.call("give"):
                outcome = self.core.give(unused)
            self.says(f"give({unused.connection})", outcome)
        self.dial()

    # What the pool itself does

    def dial(self, spare: bool = False) -> None:
        """Begin to dial, as often as it is permitted."""
        core = self.core
        while (place := core.permit()) is not None:
            self._begins(place)
            self.says("permit()", place)
        while spare and core.permit_spare():
            self._begins(None, "permit_spare")
        for each in core.hopeless():
            each.error = BreakerOpenError("the breaker is open")
        while core._budget is not None:
            with self.call("next_to_close"):
                found = core._budget.next_to_close()
            if found is None:
                break

    def _begins(self, place: Place[Socket] | None, call: str = "permit") -> None:
        self._numbers += 1
        socket = Socket(self.core, self._numbers)
        socket.place = place
        # The permit was given a line earlier: it and the object that is being opened are one step.
        self.core.claim(socket)
        self.record.sockets.append(socket)
        self.record.moves[Move(NONE, DIALLING, call, None)] += 1
        self._agree()

    def opens(self, socket: Socket) -> None:
        """A dial succeeds."""
        with self.call("opened"):
            self.core.disclaim(socket)
            retire_at, look_at = self.retire_at()
            socket.was_open = True
            outcome = self.core.opened(socket, socket.generation, retire_at, look_at)
        self.says(f"opened({socket})", outcome)
        self.dial()

    def fails(self, socket: Socket, error: BaseException) -> None:
        """A dial fails."""
        with self.call("failed"):
            self.core.disclaim(socket)
            told = self.core.failed(socket.place, error, spare=socket.place is None)
        self.says(f"failed({socket})", told)
        self.dial()

    def retires(self, member: Member[Socket], reason: str) -> None:
        with self.call("retire"):
            told = self.core.retire(member, reason)
            if told is not None:
                told.error = PoolClosedError("closed")
        self.says(f"retire({member.connection}, {reason})")
        self.dial()

    def is_closed(self, socket: Socket) -> None:
        """A `close()` has ended."""
        for each in [each for each in self.core._unclosed if each.connection is socket]:
            self.core.closes(each)
        with self.call("freed"):
            self.core.freed(socket)
        self.says(f"freed({socket})")
        self.dial()

    def resizes(self, max_connections: int) -> None:
        with self.call("set_cap"):
            self.core.set_cap(max_connections)
        self.says(f"set_cap({max_connections})")
        self.dial()

    def clears(self) -> None:
        with self.call("retire_all"):
            self.core.retire_all()
        self.says("retire_all()")
        self.dial()

    def pauses(self) -> None:
        with self.call("hold"):
            self.core.hold()
        self.says("hold()")

    def resumes(self) -> None:
        with self.call("unhold"):
            self.core.unhold()
        self.says("unhold()")
        self.dial()

    def shuts(self) -> None:
        with self.call("shut"):
            _, places = self.core.shut()
        self.says("shut()")
        for place in places:
            place.error = PoolClosedError("closed")

    # Stories

    def tells(self, title: str) -> None:
        """This is the next picture."""
        for borrower in self.borrowers[:]:
            if borrower.place is not None and borrower.place.error is not None:
                self.hears(borrower)
        if faults := self.core.faults():
            raise AssertionError(f"{title}: {faults}")
        self.frames.append(
            Frame(
                title,
                tuple(self.record.calls),
                tuple(self._picture()),
                tuple(self._name(place) or "?" for place in (*self.core._dialled, *self.core._undialled)),
                tuple(self._told),
                self.core._max_connections,
                self.core._closed,
            )
        )
        self.record.calls.clear()
        self._told.clear()

    def all_run(self) -> None:
        """Whoever was granted a connection collects it."""
        for borrower in self.borrowers:
            if borrower.place is not None and borrower.place.member is not None:
                self.runs(borrower)

    def _picture(self) -> Iterator[Slot]:
        """The slots; a connection stays in the one in which it was dialled."""
        there = self.sockets(*STATES[1:])
        self._slots = [each if each in there else None for each in self._slots]
        count = max(self.core._max_connections, len(there))
        for socket in there:
            if socket not in self._slots:
                self._slots += [None] * (count - len(self._slots))
                self._slots[self._slots.index(None)] = socket
        while len(self._slots) > count and None in self._slots:
            self._slots.remove(None)
        self._slots += [None] * (count - len(self._slots))
        for each in self._slots:
            if each is None:
                yield Slot(NONE)
                continue
            yield Slot(each.state, each.number, self._who(each))

    def _who(self, socket: Socket) -> str | None:
        """The name of whoever has it."""
        holder = socket.member.holder if socket.member is not None else None
        if isinstance(holder, Place):
            return self._name(holder)
        return holder.name if isinstance(holder, Borrower) else None


# Stories: what happens is written here, what comes of it is not.


def _lending() -> Stage:
    stage = Stage(2)
    stage.tells("A new pool. Nothing is open.")
    stage.borrows("A")
    stage.tells("A borrows. Nothing idles, so a connection is opened.")
    stage.opens(stage.socket(1))
    stage.all_run()
    stage.tells("It is open, and A uses it.")
    stage.returns(stage.borrower("A"))
    stage.tells("A gives it back. It stays open.")
    stage.borrows("B")
    stage.tells("B borrows, and has it at once.")
    stage.borrows("C")
    stage.tells("C borrows. There is room for one more.")
    stage.opens(stage.socket(2))
    stage.all_run()
    stage.borrows("D")
    stage.tells("C has the second one. D has to wait.")
    stage.returns(stage.borrower("B"))
    stage.all_run()
    stage.tells("B gives back, and D has it.")
    return stage


def _busy(max_connections: int, names: str) -> Stage:
    """The first of them talk, the others wait."""
    stage = Stage(max_connections, max_connecting=max_connections)
    for name in names:
        stage.borrows(name)
    while dials := stage.sockets(DIALLING):
        stage.opens(dials[0])
    stage.all_run()
    stage.record.calls.clear()
    return stage


def _interrupted() -> Stage:
    stage = _busy(2, "ABC")
    stage.tells("A and B talk to the server, C waits.")
    first = stage.sockets(IN_USE)[0]
    stage.is_killed(stage.borrower("A"))
    stage.tells("A is killed before its reply has come. The connection is closed, not handed to C.")
    stage.is_closed(first)
    stage.tells("Now it is closed. Only now is its slot free, and another one is dialled, for C.")
    stage.opens(stage.sockets(DIALLING)[0])
    stage.all_run()
    stage.tells("C has a connection on which nobody waited for anything.")
    return stage


def _queue() -> Stage:
    stage = _busy(1, "ABCD")
    stage.tells("A talks. B, C and D wait.")
    stage.is_killed(stage.borrower("B"))
    stage.tells("B is killed. That costs a place in the queue, nothing else.")
    stage.returns(stage.borrower("A"))
    stage.tells("A gives back. The connection is C's from now on, though C has not run yet.")
    stage.is_killed(stage.borrower("C"))
    stage.tells("C is killed at that very moment. What it was granted goes on to D.")
    return stage


def _dials() -> Stage:
    stage = Stage(2)
    for name in "ABC":
        stage.borrows(name)
    stage.tells("A, B and C come. Two dials run; for C there is no room.")
    stage.is_killed(stage.borrower("A"))
    stage.opens(stage.socket(1))
    stage.all_run()
    stage.tells("A is killed. The dial that was begun for A goes on, succeeds, and serves B, who is first now.")
    stage.fails(stage.socket(2), ConnectionRefusedError("refused"))
    stage.tells("B's own dial fails. B has a connection, so the error is nobody's. There is room to dial for C.")
    stage.fails(stage.socket(3), ConnectionRefusedError("refused"))
    stage.tells("That fails too, and C is told at once.")
    return stage


def _resize() -> Stage:
    stage = _busy(4, "ABCD")
    stage.tells("Four are lent.")
    stage.resizes(2)
    stage.tells("resize(2): nobody is interrupted.")
    stage.returns(stage.borrower("A"))
    stage.returns(stage.borrower("B"))
    stage.tells("A and B give theirs back. These are too many, and are closed.")
    for each in stage.sockets(CLOSING):
        stage.is_closed(each)
    stage.returns(stage.borrower("C"))
    stage.tells("C gives back. That one stays: there are two.")
    return stage


def _drain() -> Stage:
    stage = _busy(3, "AB")
    stage.borrows("C")
    stage.is_killed(stage.borrower("C"))
    stage.returns(stage.borrower("B"))
    stage.record.calls.clear()
    stage.tells("A talks, one idles, one is being opened, though whoever wanted it has left.")
    idle = stage.sockets(IDLE)
    stage.shuts()
    stage.tells("close(): what idles is closed now.")
    for each in idle:
        stage.is_closed(each)
    for each in stage.sockets(DIALLING):
        stage.opens(each)
    stage.borrows("D")
    stage.tells("What was being opened is closed as it arrives. Nobody can borrow any more.")
    for each in stage.sockets(CLOSING):
        stage.is_closed(each)
    stage.returns(stage.borrower("A"))
    stage.tells("A has finished, and gives back the last one. It is closed too.")
    return stage


STORIES: Final[dict[str, Callable[[], Stage]]] = {
    "lending": _lending,
    "interrupted": _interrupted,
    "queue": _queue,
    "dials": _dials,
    "resize": _resize,
    "drain": _drain,
}


def play(name: str) -> list[Frame]:
    """The pictures of a story."""
    return STORIES[name]().frames


# Any order of steps


class _Walk:
    """Steps at random. Each is one that a driver could take at that moment; the core decides what comes of it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.demand = rng.choice([0.1, 0.25, 0.4])
        self.record = Record()
        budget = Budget(rng.randint(1, 3)) if rng.random() < 0.4 else None
        self.stages = [self._stage(budget) for _ in range(2 if budget else 1)]

    def _stage(self, budget: Budget | None) -> Stage:
        rng = self.rng
        limits = Limits(
            idle_timeout=rng.choice([None, 0.5]),
            max_lifetime=rng.choice([None, 2.0]),
            max_uses=rng.choice([None, 2]),
            keepalive=rng.choice([None, 0.3]),
        )
        stage = Stage(
            rng.randint(1, 4),
            max_connecting=rng.randint(1, 3),
            record=self.record,
            min_idle=rng.choice([0, 0, 1]),
            limits=limits,
            fifo=rng.random() < 0.2,
            budget=budget,
        )

        def retire_at() -> tuple[float, float]:
            at = limits.retire_at(self.now, rng.random)
            return at, limits.next_look(at, self.now, self.now)

        stage.retire_at = retire_at
        return stage

    def step(self) -> None:
        rng, stage = self.rng, self.rng.choice(self.stages)
        self.now += 0.1
        for borrower in stage.borrowers[:]:
            if borrower.place is not None and borrower.place.error is not None:
                stage.hears(borrower)
        parts = (self.borrower, self.borrower, self.borrower, self.job, self.upkeep, self.upkeep, self.rare, self.rare)
        rng.choice(parts)(stage)
        for each in self.stages:
            each.dial(spare=True)

    def borrower(self, stage: Stage) -> None:
        """Somebody comes, or somebody goes on."""
        rng = self.rng
        if len(stage.borrowers) < 6 and rng.random() < self.demand:
            stage.borrows("somebody", wait=rng.random() < 0.8)
        elif stage.borrowers:
            borrower = rng.choice(stage.borrowers)
            if borrower.place is not None:
                if borrower.place.member is not None and rng.random() < 0.5:
                    stage.runs(borrower)
                elif rng.random() < 0.2:
                    stage.is_killed(borrower)
            elif rng.random() < 0.6:
                stage.returns(borrower)
            elif rng.random() < 0.3:
                stage.fails_the_check(borrower)
            else:
                stage.discards(borrower, rng.choice(["discarded", "reclaimed"]))

    def job(self, stage: Stage) -> None:
        """A dial ends, and a close."""
        if dials := stage.sockets(DIALLING):
            socket = self.rng.choice(dials)
            if self.rng.random() < 0.9:
                stage.opens(socket)
            else:
                stage.fails(socket, OSError("refused"))
        if closing := stage.sockets(CLOSING):
            stage.is_closed(self.rng.choice(closing))

    def upkeep(self, stage: Stage) -> None:
        """What the pool does of its own accord."""
        rng, core = self.rng, stage.core
        inspected = [
            each.member
            for each in stage.sockets(TAKEN_OUT, DOOMED)
            if each.member is not None and each.member.holder is INSPECTED
        ]
        if inspected and rng.random() < 0.3:
            member = rng.choice(inspected)
            if rng.random() < 0.4:  # while it was asked
                if rng.random() < 0.6:
                    stage.resizes(1)
                for each in self.stages[::-1]:
                    each.borrows("somebody")
            if member.holder is not INSPECTED:
                return
            if rng.random() < 0.6:
                with stage.call("inspected"):
                    core.inspected(member, first=rng.random() < 0.5)
            else:
                stage.retires(member, rng.choice(["stale", "expired", "discarded"]))
            return
        idle = stage.sockets(IDLE)
        what = rng.randrange(7)
        if what == 0:
            core.cool(self.now)
        elif what == 1:
            self.now += rng.choice([0, 1])
            with stage.call("audit"):
                core.audit(self.now)
        elif what == 2:
            core.rested()
        elif what == 3:
            with stage.call("inspect"):
                core.inspect()
        elif what == 4 and idle:
            found = rng.choice(idle).member
            assert found is not None
            with stage.call("take_out"):
                core.take_out(found)
        elif what > 4:
            with stage.call("prove"):
                core.prove()

    def rare(self, stage: Stage) -> None:
        """What somebody does to the whole pool."""
        rng, core = self.rng, stage.core
        what = rng.randrange(16)
        if what < 2:
            stage.resizes(rng.randint(1, 4))
        elif what == 2:
            stage.clears()
        elif what == 3:
            stage.pauses()
        elif what < 8 and core._paused:
            stage.resumes()
        elif what == 8 and core._members:
            granted = [each.member for each in stage.sockets(GRANTED)]
            stage.retires(rng.choice([each for each in granted if each] or [*core._members.values()]), "dropped")
        elif what == 9:
            stage.shuts()
        elif what > 12 and core._closed and core._members:
            stage.retires(rng.choice([*core._members.values()]), "closed")


def life(seed: int = 1, worlds: int = 4000, steps: int = 70) -> Counter[Move]:
    """Which ways there are through the life of a connection, and how often each was gone: found by random walks over
    the core. Only one is left out: in the child of a fork the core forgets every connection, whatever its state."""
    rng = random.Random(seed)
    found: Counter[Move] = Counter()
    for _ in range(worlds):
        walk = _Walk(rng)
        for _ in range(steps):
            walk.step()
        found += walk.record.moves
    return found

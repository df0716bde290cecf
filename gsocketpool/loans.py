"""Who has borrowed what: noted only where `leak_threshold` or `reclaim` asks for it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from gsocketpool.core import Member
from gsocketpool.operations import describe
from gsocketpool.stats import Holder

if TYPE_CHECKING:
    from gsocketpool.driver import Driver

__all__ = ["HERE", "Ledger", "Loan", "outwards"]

#: Frames of the borrower that are kept: the innermost ones.
DEPTH: Final = 20

#: Where the package is.
HERE: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep


def outwards(frame: FrameType | None) -> list[FrameType]:
    """A frame, who called it, who called that, and so on."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


class Loan:
    """Who has borrowed a connection, when, and where.

    `reported` says that it was reported as a leak; `unlink`, where it is not None, ends the watch over the borrower.
    """

    __slots__ = ("_frames", "borrower", "reported", "since", "unlink")

    def __init__(self, borrower: object, since: float, outer: FrameType | None) -> None:
        self.borrower = borrower
        self.since = since
        self.reported = False
        self.unlink: Callable[[], object] | None = None
        # Names and numbers alone: a frame would keep alive whatever the borrower had at hand.
        self._frames: list[tuple[str, int, str]] = []
        frame = sys._getframe(1)
        while frame is not None and len(self._frames) < DEPTH:
            code = frame.f_code
            # Not the pool's own frames on the way here, unless it was spawned with nothing above them.
            if self._frames or not code.co_filename.startswith(HERE) or not (frame.f_back or outer):
                self._frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back or outer  # type: ignore[assignment]
            if frame is outer:
                outer = None

    def stack(self) -> str:
        """Where it was borrowed, as a traceback's text."""
        frames = [(file, line, name, None) for file, line, name in reversed(self._frames)]
        return "".join(traceback.StackSummary.from_list(frames).format())

    def where(self) -> str:
        """Where it was borrowed, in one line."""
        if not self._frames:
            return "in an unknown place"
        file, line, name = self._frames[0]
        return f"in {name} ({file}:{line})"


class Ledger:
    """The loans of one pool."""

    def __init__(self, leak_threshold: float | None, reclaim: bool) -> None:
        self._leak_threshold = leak_threshold
        self._reclaim = reclaim
        self._unreported: OrderedDict[Member[Any], None] = OrderedDict()  # in the order in which they were lent
        self._waiting: dict[int, tuple[object, float]] = {}  # borrowers, by their identity, and since when

    def waits(self, borrower: object, since: float) -> None:
        """He stands in the queue."""
        self._waiting[id(borrower)] = borrower, since

    def waits_no_more(self, borrower: object) -> None:
        """He has left it."""
        self._waiting.pop(id(borrower), None)

    def is_waiting(self, borrower: object) -> bool:
        """Whether he stands in the queue."""
        return id(borrower) in self._waiting

    def waiting(self) -> list[tuple[object, float]]:
        """Who stands in the queue, and since when by `monotonic`'s time; in the order in which they came there."""
        return list(self._waiting.values())

    def only_waits(self, borrower: object) -> None:
        """Nobody but him, if he does."""
        self._waiting = {key: found for key, found in self._waiting.items() if key == id(borrower)}

    def begin(self, pool: Driver[Any], member: Member[Any]) -> None:
        """Whoever is running has borrowed it."""
        loan = member.loan = Loan(pool._borrower(), monotonic(), pool._outer_frame())
        if self._leak_threshold is not None:
            self._unreported[member] = None
        if self._reclaim:
            ref = weakref.ref(pool)

            def ended(_: object) -> None:
                pool = ref()
                if pool is not None and member.loan is loan:
                    pool._spawn(take_back, pool, member, loan)

            loan.unlink = pool._when_over(loan.borrower, ended)

    def end(self, pool: Driver[Any], member: Member[Any]) -> None:
        """It came back, or was given up."""
        loan: Loan | None = member.loan
        if loan is None:
            return
        member.loan = None
        self._unreported.pop(member, None)
        if loan.unlink is not None:
            loan.unlink()
        if loan.reported:
            # In the background: a log handler may wait, and be killed there, before the connection is given back.
            pool._spawn(
                pool._say,
                logging.WARNING,
                "%s: the connection that %s had for so long came back after %.1f s: %s",
                pool._label,
                pool._name_of(loan.borrower),
                monotonic() - loan.since,
                describe(member.connection),
            )

    def report(self, pool: Driver[Any], now: float) -> None:
        """Log, once each, whose loans are longer than `leak_threshold`."""
        while self._leak_threshold is not None and self._unreported:
            member = next(iter(self._unreported))
            loan: Loan = member.loan
            if loan.since + self._leak_threshold > now:
                break
            del self._unreported[member]
            loan.reported = True
            held = now - loan.since
            pool._say(
                logging.WARNING,
                "%s: %s has held a connection for %.1f s, longer than leak_threshold=%g: %s; it was borrowed here:\n%s",
                pool._label,
                pool._name_of(loan.borrower),
                held,
                self._leak_threshold,
                describe(member.connection),
                loan.stack(),
            )
            if "leaked" in pool._audience.heard:  # in a job of its own: the upkeep has other things to do
                holder = Holder(member.connection, loan.borrower, held, loan.stack())
                pool._spawn(pool._tell_alone, "leaked", holder)

    def forget(self, members: list[Member[Any]]) -> None:
        """Nobody has borrowed anything any more."""
        for member in members:
            member.loan = None
        self._unreported.clear()


def take_back(pool: Driver[Any], member: Member[Any], loan: Loan) -> None:
    """The borrower has ended, and nobody else will give it back."""
    if member.loan is loan:
        loan.reported = False  # it does not come back
        try:
            pool._discard(member, "reclaimed")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            pool._report("returned() of a listener was interrupted", error)
        pool._say(
            logging.WARNING,
            "%s: %s ended without releasing a connection, which is closed: %s; it was borrowed here:\n%s",
            pool._label,
            pool._name_of(loan.borrower),
            describe(member.connection),
            loan.stack(),
        )

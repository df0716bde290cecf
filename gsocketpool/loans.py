"""What a pool notes of a borrower, where it was told to."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Final

__all__ = ["Loan"]

#: Frames of the borrower that are kept: the innermost ones.
DEPTH: Final = 20

_HERE: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Loan:
    """Who has borrowed a connection, when, and where.

    `reported` says that it was reported as a leak; `unlink`, where it is not None, ends the watch over the borrower.
    """

    __slots__ = ("_frames", "borrower", "reported", "since", "unlink")

    def __init__(self, borrower: object, since: float) -> None:
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
            if self._frames or not code.co_filename.startswith(_HERE) or frame.f_back is None:
                self._frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back  # type: ignore[assignment]

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

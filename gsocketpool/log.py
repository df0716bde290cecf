"""Saying what goes on, under the logger `gsocketpool`."""

from __future__ import annotations

import logging

__all__ = ["say"]

_logger = logging.getLogger("gsocketpool")


def say(level: int, text: str, *args: object, error: BaseException | None = None) -> None:
    """Log it. A filter or a handler that raises must not cost the pool anything: what it raises is ignored."""
    try:
        _logger.log(level, text, *args, exc_info=error)
    except Exception:
        pass

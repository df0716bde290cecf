"""Refusing a wrong argument by its name, with what it takes instead."""

from __future__ import annotations

import math

__all__ = ["seconds", "whole_number"]


def whole_number(name: str, value: object, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")
    return value


def seconds(name: str, value: object, *, zero: bool) -> float:
    """A finite number of seconds: more than zero, or zero too where `zero` says so."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(
            f"{name} must be a number of seconds, {'zero' if zero else 'more than zero'}"
            f"{' or more' if zero else ''}, not {value}"
        )
    return float(value)

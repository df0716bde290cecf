"""Refusing a wrong argument by its name, with what it takes instead."""

from __future__ import annotations

import math

__all__ = ["is_int", "is_seconds", "seconds", "share", "two_delays", "whole_number"]


def is_int(value: object) -> bool:
    """Whether it is an int: a bool is none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_seconds(value: object) -> bool:
    """Whether it is None or a plain finite number of at least 0: a quick look, where anything else gets a slow one."""
    return value is None or ((type(value) is float or type(value) is int) and 0 <= value < math.inf)


def whole_number(name: str, value: int, least: int = 0) -> int:
    """An int of at least `least`."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def seconds(name: str, value: float, *, zero: bool) -> float:
    """A finite number of seconds: above zero, or zero too where `zero` says so."""
    if not (is_int(value) or isinstance(value, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'0 or more' if zero else 'more than 0'} seconds, not {value!r}")
    return value


def share(name: str, value: float) -> float:
    """A number from 0 to 1."""
    if not (is_int(value) or isinstance(value, float)):
        raise TypeError(f"{name} must be a number from 0 to 1, not {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")
    return value


def two_delays(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Two numbers of seconds above zero, the shorter one first."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"{name} must be two numbers of seconds, (first, longest), not {value!r}")
    first, longest = (seconds(name, each, zero=False) for each in value)
    if first > longest:
        raise ValueError(f"{name} must be (first, longest) with the shorter one first, not {value!r}")
    return first, longest

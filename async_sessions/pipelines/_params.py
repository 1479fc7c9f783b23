"""Values of a request's parameters, or an `InvalidRequestError` whose sentence says what would do."""

from __future__ import annotations

import reprlib
from typing import Any

from async_sessions.errors import InvalidRequestError


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number; 17.0, which a page's slider may send, is one."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not good or not least <= value <= most:
        raise InvalidRequestError(f"{name} must be a whole number from {least} to {most}, not {reprlib.repr(value)}.")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequestError(f"{name} must be a number from {least:g} to {most:g}, not {reprlib.repr(value)}.")
    return float(value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be text, not {reprlib.repr(value)}.")
    return value

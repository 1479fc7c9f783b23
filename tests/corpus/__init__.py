"""Inputs that a store may be given, good, odd and hostile, each with what becomes of it.

`REFUSED` tells the reason. `TAKEN` keeps its pixels as they are; so does `CLEANED`, without the secret that it holds.
`FORGIVEN` is what Pillow alone does not open and browsers show; its fault is in what is dropped.
"""

from __future__ import annotations

from typing import Any

from async_sessions.records import Limits
from tests.corpus import bmff, foreign, jpeg, png, webp
from tests.corpus.base import SECRETS, Forgiven, Make, RefusedAny

__all__ = ["CLEANED", "FORGIVEN", "LIMITS", "REFUSED", "SECRETS", "TAKEN"]

LIMITS = Limits(formats=("JPEG", "PNG", "WEBP", "AVIF", "HEIC"))

_MODULES = {"PNG": png, "JPEG": jpeg, "WebP": webp, "AVIF and HEIC": bmff, "foreign": foreign}


def _all(kind: str) -> dict[str, Any]:
    return {
        f"{form}: {name}": case for form, module in _MODULES.items() for name, case in getattr(module, kind, {}).items()
    }


REFUSED: dict[str, RefusedAny] = _all("REFUSED")
TAKEN: dict[str, Make] = _all("TAKEN")
CLEANED: dict[str, Make] = _all("CLEANED")
FORGIVEN: dict[str, Forgiven] = _all("FORGIVEN")

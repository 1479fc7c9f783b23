"""What the inputs of every format share: where a file is cut, and what is hidden in it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable
from typing import TypeAlias

from PIL import Image

from async_sessions.errors import RejectReason
from tests.images import CAMERA, PLACE

Make: TypeAlias = Callable[[], bytes]
Refused: TypeAlias = tuple[Make, RejectReason]
RefusedAny: TypeAlias = tuple[Callable[[], bytes | Image.Image], RejectReason]
Forgiven: TypeAlias = tuple[Make, bytes]  # and what is stored of it

NOTE = b"a note that nobody else is to read"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:li>' + NOTE + b"</rdf:li></x:xmpmeta>"
PAGE = b"<!DOCTYPE html><html><script>alert(document.cookie)</script></html>"
SCRIPT = b"*/=1;alert(document.cookie);/*"


def _archive() -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("run.js", "alert(1)")
    return written.getvalue()


ARCHIVE = _archive()

# Whatever is hidden has one of these in it.
SECRETS = (PLACE, CAMERA.encode(), NOTE, b"document.cookie", b"run.js")

TAILS = {"an HTML page": PAGE, "a ZIP archive": ARCHIVE, "JavaScript": SCRIPT, "a PDF": b"%PDF-1.7\n" + NOTE}


def given(data: bytes) -> Make:
    return lambda: data


def cuts(data: bytes, ends: Iterable[tuple[str, int]]) -> dict[str, Refused]:
    """The file when it ends at each of these places."""
    return {f"cut {number}, {where}": (given(data[:end]), "truncated") for number, (where, end) in enumerate(ends)}


def tails(data: bytes) -> dict[str, Make]:
    """The file with something else behind its end, which others would take for a file of their own."""
    return {f"{name} behind it": given(data + tail) for name, tail in TAILS.items()}

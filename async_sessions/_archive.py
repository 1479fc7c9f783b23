"""ZIP files of stored entries: written in pieces, and read where nobody knows who wrote them. For a worker thread.

Nothing is compressed: images and videos are so already, and what a ZIP holds is then no larger than the ZIP.
No name in a ZIP becomes a path: names are compared, and nothing is unpacked.
"""

from __future__ import annotations

import contextlib
import io
import stat
import struct
import zipfile
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Final, cast

from async_sessions.errors import BundleError
from async_sessions.records import KIB, MIB

_CHUNK: Final = MIB
_END_BYTES: Final = 66 * KIB  # read at most, from the end, to learn where the directory is
_LINE_BYTES: Final = 256  # of the directory, for one entry; those of a bundle take at most 200
_HEADER_BYTES: Final = 30  # before each entry, beside its name
_EARLIEST: Final = (1980, 1, 1, 0, 0, 0)
_ENCRYPTED: Final = 0x1

# What `zipfile` was seen to raise on damaged files.
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile, ArithmeticError, EOFError, LookupError, RuntimeError, ValueError, struct.error
)  # fmt: skip


class ZipWriter:
    """Makes a ZIP and holds nothing of it: `take` hands out what was written since it was last called."""

    def __init__(self) -> None:
        self._tape = _Tape()
        self._zip = zipfile.ZipFile(cast("IO[bytes]", self._tape), "w")
        self._entry: IO[bytes] = io.BytesIO()

    def take(self) -> bytes:
        return self._tape.take()

    def begin(self, name: str, size: int, modified: datetime) -> None:
        """Begin an entry of `size` bytes, which tell whether it needs ZIP64."""
        self._entry.close()
        info = zipfile.ZipInfo(name, max(modified.timetuple()[:6], _EARLIEST))
        info.file_size = size
        self._entry = self._zip.open(info, "w")

    def write(self, chunk: bytes) -> None:
        self._entry.write(chunk)

    def close(self) -> None:
        """Write the end of the ZIP, which holds its directory."""
        self._entry.close()
        self._zip.close()


class _Tape:
    """A file that can only be written to; what can't be sought gets sizes and checksums after the data."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(data)
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken


class ZipReader:
    """The entries of a ZIP that may be hostile. `sizes` maps their names to bytes.

    `BundleError` unless `file` holds at most `max_entries` entries, each under a name of its own, in a place of its
    own, neither compressed nor encrypted, nor a link. No more of the directory is read than so many entries need.
    """

    def __init__(self, file: IO[bytes], *, max_entries: int) -> None:
        bounded = _Bounded(file, _END_BYTES + max_entries * _LINE_BYTES, f"more than {max_entries:,} files")
        with _in_our_words():
            self._zip = zipfile.ZipFile(cast("IO[bytes]", bounded))
            bounded.lift()
            self._check(max_entries)
        self.sizes = {entry.filename: entry.file_size for entry in self._zip.infolist()}

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of an entry. `BundleError` where they don't have its checksum."""
        with _in_our_words(), self._zip.open(name) as entry:
            while chunk := entry.read(_CHUNK):
                yield chunk

    def _check(self, max_entries: int) -> None:
        entries = self._zip.infolist()
        if len(entries) > max_entries:
            raise _refusal(f"it holds more than {max_entries:,} files")
        if len({entry.filename for entry in entries}) < len(entries):
            raise _refusal("two of its files have the same name")
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.flag_bits & _ENCRYPTED:
                raise _refusal("it is encrypted")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _refusal("it is compressed")
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
                raise _refusal("it holds a link, or something else that is no file")
            if entry.header_offset < end:
                raise _refusal("its files overlap")
            end = entry.header_offset + _HEADER_BYTES + len(entry.orig_filename) + entry.compress_size
        if end > self._zip.start_dir:
            raise _refusal("its files overlap")


class _Bounded:
    """`file`, of which `left` bytes can be read until the bound is lifted: `zipfile` reads a directory whole."""

    def __init__(self, file: IO[bytes], left: int, excess: str) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable
        self._file = file
        self._left: int | None = left
        self._excess = excess

    def read(self, size: int = -1) -> bytes:
        if self._left is None:
            return self._file.read(size)
        data = self._file.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise _refusal(f"it holds {self._excess}")
        return data

    def lift(self) -> None:
        self._left = None


def _refusal(why: str) -> BundleError:
    return BundleError(f"This is no bundle as `export_session` writes it: {why}. Give the file as it was exported.")


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except BundleError:
        raise
    except _ZIP_ERRORS as error:
        raise BundleError("The bundle is damaged, or no ZIP file at all. Export it again.") from error

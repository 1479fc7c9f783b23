"""Damaged files, as many as some seconds allow: `python -m tests.proof.fuzz SECONDS FIRST PROGRESS`.

Whatever goes wrong, a hang too, or a decoder that takes the process with it, has a number, from which its file can be
made again: as `FIRST`, for 0 seconds.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

from tests import damage

_HANG = 20.0  # seconds without another file


def fuzz(folder: Path, *, seconds: int = 60) -> str:
    """What came of it, in a process of its own; `AssertionError` for the file that was too much for it."""
    progress, before = folder / "progress", ""
    progress.touch()
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.proof.fuzz",
        str(seconds),
        str(time.time_ns()),
        str(progress),
    ]
    worker = subprocess.Popen(command)
    while worker.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(_HANG)
            break
        if progress.read_text() == before:
            worker.kill()
            worker.wait()
        before = progress.read_text()
    text = progress.read_text()
    assert worker.returncode == 0, f"`python -m tests.proof.fuzz 0 {text} /dev/null` ends with {worker.returncode}"
    return text


def _main(seconds: float, first: int, progress: int) -> None:
    taken, refused = Counter[str](), Counter[str]()
    end = time.monotonic() + seconds
    forms = list(damage.SEEDS)
    for number in itertools.count(first):
        os.pwrite(progress, str(number).encode(), 0)
        form = forms[number % len(forms)]
        (taken if damage.check(damage.damaged(Random(number), form)) else refused)[form] += 1
        if time.monotonic() >= end:
            break
    counts = ", ".join(f"{form} {taken[form] + refused[form]:,}" for form in forms)
    report = (
        f"{seconds:g} s of damaged files: {counts}; {taken.total():,} still good, {refused.total():,} refused, 0 wrong"
    )
    os.pwrite(progress, report.encode(), 0)


if __name__ == "__main__":
    with open(sys.argv[3], "w") as file:
        _main(float(sys.argv[1]), int(sys.argv[2]), file.fileno())

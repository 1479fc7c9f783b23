"""The figures as Markdown."""

from __future__ import annotations

import math
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from PIL import features

from tests.benchmarks.lag import BEAT, PACKAGE, VOID, Run, median_of

if TYPE_CHECKING:
    from tests.benchmarks.ratios import Row

LAG_GOALS = 0.015, 0.040  # seconds above idle: p99, longest
SIZE_GOAL = 1.2
FLAT_GOAL = 128 * 1024  # bytes more
LOOP_NOTE = """\
More sessions would make the threaded design's runs longer, and in threads not worse: one works while the others wait
for its lock. In the loop, nothing else runs until the last image is stored. *Busy cores* is for how long, when the lag
was longest, the loop's thread was ready to run and had no core, because the encoders or other programs had them all."""

_METHOD = f"""\
The threaded design holds one lock around `tobytes`, MD5, `save(optimize=True)` and `json.dump`; it is called in
`asyncio.to_thread` unless a line says otherwise. **It syncs nothing**: a power cut may lose what it acknowledged.
This package verifies what it stores, makes a thumbnail, and **syncs file and directory (fsync) before it returns**.

Both run in turn, in one process, on the same images: photographs side by side without resampling, unless a line says
otherwise. A figure is the median over the rounds of *threaded / this package*, so 2 is twice as fast, with the lowest
and the highest round in brackets; CPU is that of all cores. Milliseconds are context and depend on the machine. The
pixels that were read were compared with those that were stored. Reads find their files in the page cache.

Lag is the time by which the event loop is late to run what is due, at every {1000 * BEAT:g} ms of the run. Idle is the
same loop before and after. A run is void where idle's p99 exceeds {1000 * VOID:g} ms.
"""


def environment(started: tuple[float, float, float]) -> str:
    load = f"{started[0]:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    return "\n".join(
        [
            f"- {platform.system()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores; load average {load}",
            f"- Python {platform.python_version()}, Pillow {PIL.__version__} (zlib-ng {features.version('zlib_ng')}), "
            f"NumPy {np.__version__}, asyncio's own event loop",
            f"- files on {_filesystem()}",
        ]
    )


def method() -> str:
    return _METHOD.rstrip()


def lag_table(runs: dict[str, list[Run]]) -> str:
    lines, notes = [], []
    for name, heard in runs.items():
        idle, busy = median_of([run.idle for run in heard]), median_of([run.busy for run in heard])
        added = [run.busy.p99 - run.idle.p99 for run in heard], [run.busy.longest - run.idle.longest for run in heard]
        cells = [f"{name}, {heard[0].stores} sessions"]
        cells += [f"{_ms(before)} / {_ms(during)}" for before, during in zip(idle[:3], busy[:3], strict=True)]
        for values, goal in zip(added, LAG_GOALS, strict=True):
            met = _yes(statistics.median(values) <= goal) if name == PACKAGE else ""
            cells += [f"**{_spread([1000 * value for value in values])}**", met]
        lines.append([*cells, _ms(busy.busy_cores)])
        if any(run.voided or not run.valid for run in heard):
            void = sum(not run.valid for run in heard)
            notes.append(f"{name}: runs void and repeated, {sum(run.voided for run in heard)}; void and shown, {void}.")
    p99, longest = (f"at most {1000 * goal:g}" for goal in LAG_GOALS)
    names = ["", "p50", "p99", "longest", "added to p99", p99, "added to longest", longest, "of longest, busy cores"]
    shown = f"Milliseconds, idle / busy, the median of the runs ({len(runs[PACKAGE])} of each).\n{LOOP_NOTE}"
    return "\n\n".join([shown, _table(names, lines), *(notes or ["No run was void."])])


def ratio_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        wall = statistics.median(row.wall())
        there, here = row.seconds()
        goal, met = "", ""
        if row.goal is not None:
            goal, met = f"{row.goal:g}", _yes(wall >= row.goal)
        if row.within is not None:
            goal, met = f"{1000 * row.within:g} ms", _yes(here <= row.within)
        times = f"{_ms(there)} / {_ms(here)}"
        lines.append(
            [row.what, f"**{_spread(row.wall())}**", _spread(row.cpu()), goal, met, str(len(row.rounds)), times]
        )
    return _table(["", "times as fast", "by CPU", "goal", "met", "rounds", "ms, threaded / this"], lines)


def size_table(photographs: Sequence[Row], flat: Row) -> str:
    lines = []
    for row in photographs:
        ratios = [size.package / size.threaded for size in row.sizes]
        median = statistics.median(ratios)
        lines.append([row.what, _spread(ratios), f"{SIZE_GOAL:g}", _yes(median <= SIZE_GOAL)])
    added = [(size.package - size.threaded) / 1024 for size in flat.sizes]
    met = _yes(max(added) * 1024 <= FLAT_GOAL)
    lines.append([flat.what, f"{min(added):+.0f} to {max(added):+.0f} KB", f"+{FLAT_GOAL // 1024} KB", met])
    return _table(["", "this package's file / that of `optimize=True`", "at most", "met"], lines)


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *lines))


def _spread(values: Sequence[float]) -> str:
    middle, low, high = map(_figure, (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _figure(value: float) -> str:
    """Three digits are all that a noisy machine can tell."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def _ms(seconds: float) -> str:
    return _figure(1000 * seconds)


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def _filesystem() -> str:
    """The kind of file system under the temporary files: a tmpfs makes fsync free."""
    folder = Path(tempfile.gettempdir()).resolve()
    kinds = {}
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return "a file system of unknown kind"
    for mount in mounts:
        _, point, kind, *_ = mount.split()
        if folder.is_relative_to(point):
            kinds[len(point)] = kind
    return kinds[max(kinds)]

"""The figures as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tests.benchmarks.designs import PACKAGE, THREADED, Cost, Facts
from tests.benchmarks.device import AHEAD
from tests.benchmarks.lag import Run, median_of
from tests.benchmarks.scale import INTERVAL

if TYPE_CHECKING:
    from tests.benchmarks.device import Waits
    from tests.benchmarks.memory import Memory
    from tests.benchmarks.ratios import Row
    from tests.benchmarks.scale import Scale

LAG_GOALS = 0.015, 0.040  # seconds above idle: p99, longest
SIZE_GOAL = 1.2
FLAT_GOAL = 128 * 1024  # bytes more
RESTORE_GOAL = 0.002  # seconds
SCAN_GOAL = 5  # times the old scan
IDLE_GOAL = 0.005  # seconds
CORE_GOAL = 0.001  # of a core, at the largest size
NOT_MEASURED = "-"


def facts_table(facts: Sequence[Facts]) -> str:
    names = ["", "file and directory synced", "an image is found by", "a Pillow image is encoded by", "what it lacks"]
    return _table(names, [[each.name, _yes(each.synced), each.found_by, each.encoder, each.lacks] for each in facts])


def goal_table(rows: Sequence[Row]) -> str:
    """This package beside the threaded design, with the goals."""
    lines = []
    for row in rows:
        wall, here = statistics.median(row.times(THREADED)), row.seconds()
        goal, met = "", ""
        if row.goal is not None:
            goal, met = f"{row.goal:g}", _yes(wall >= row.goal)
        if row.within is not None:
            goal, met = f"{1000 * row.within:g} ms", _yes(here <= row.within)
        cells = [f"**{_spread(row.times(THREADED))}**", _spread(row.times_by_cpu(THREADED)), goal, met]
        lines.append([row.what, *cells, f"{len(row.costs[PACKAGE])}", f"{_ms(row.seconds(THREADED))} / {_ms(here)}"])
    return _table(["", "times as fast", "by CPU", "goal", "met", "rounds", "ms, threaded / this"], lines)


def peer_table(rows: Sequence[Row], peers: Sequence[str], base: str) -> str:
    """`base` beside several designs. A design that a row was measured without has no figure in it."""
    lines = []
    for row in rows:
        cells = [_spread(row.times(peer, base)) if peer in row.costs else NOT_MEASURED for peer in peers]
        lines.append([row.what, *cells, _ms(row.seconds(base))])
    return _table(["", *peers, f"ms, {base}"], lines)


def size_table(photographs: Sequence[Row], flat: Row) -> str:
    lines = []
    for row in photographs:
        ratios = [own / other for own, other in zip(row.sizes[PACKAGE], row.sizes[THREADED], strict=True)]
        lines.append([row.what, _spread(ratios), f"{SIZE_GOAL:g}", _yes(statistics.median(ratios) <= SIZE_GOAL)])
    added = [own - other for own, other in zip(flat.sizes[PACKAGE], flat.sizes[THREADED], strict=True)]
    more = f"{min(added) / 1024:+.0f} to {max(added) / 1024:+.0f} KB"
    lines.append([flat.what, more, f"+{FLAT_GOAL // 1024} KB", _yes(max(added) <= FLAT_GOAL)])
    return _table(["", "this package's file / that of `optimize=True`", "at most", "met"], lines)


def lag_table(runs: Mapping[str, Sequence[Run]]) -> str:
    lines, notes = [], []
    for name, heard in runs.items():
        idle, busy = median_of([run.idle for run in heard]), median_of([run.busy for run in heard])
        added = [run.busy.p99 - run.idle.p99 for run in heard], [run.busy.longest - run.idle.longest for run in heard]
        cells = [f"{name}, {heard[0].users} sessions"]
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
    return "\n\n".join([_table(names, lines), *(notes or ["No run was void."])])


def device_table(measured: Mapping[str, Waits]) -> str:
    lines = []
    for name, waits in measured.items():
        goal = _yes(waits.median <= IDLE_GOAL) if name == AHEAD else ""
        cells = [f"**{_ms(waits.median)}**", goal, _ms(waits.p95), _ms(max(waits.between)), f"{waits.used:.1%}"]
        lags = [
            f"{_ms(waits.idle.p99)} / {_ms(waits.busy.p99)}",
            f"{_ms(waits.idle.longest)} / {_ms(waits.busy.longest)}",
        ]
        lines.append([name, *cells, *lags])
    goal = f"at most {1000 * IDLE_GOAL:g}"
    names = ["", "idle between runs, median", goal, "p95", "longest", "device at work", "lag, p99", "lag, longest"]
    notes = [f"{name}: void, the idle loop was late." for name, waits in measured.items() if not waits.valid]
    return "\n\n".join([_table(names, lines), *(notes or ["No run was void."])])


def memory_table(memories: Mapping[str, Memory], bound: int) -> str:
    """`bound`: what this package may take at most, beyond what it takes when it is empty."""
    counts = max((memory.sessions for memory in memories.values()), key=len)
    lines = []
    for name, memory in memories.items():
        held = [f"{_mb(size)}" for size in memory.held] + [NOT_MEASURED] * (len(counts) - len(memory.held))
        most, met = ("", "") if name != PACKAGE else (_mb(bound), _yes(memory.peak <= bound))
        lines.append([name, *held, _mb(memory.per_session()), _mb(memory.peak), most, met])
    names = [f"{count} sessions" for count in counts]
    return _table(["MB", *names, "each further session", "peak", "at most", "met"], lines)


def scale_table(scales: Sequence[Scale]) -> str:
    lines: list[list[str]] = []

    def line(what: str, show: Callable[[Scale], str], goal: str = "", met: bool | None = None) -> None:
        lines.append([what, *map(show, scales), goal, "" if met is None else _yes(met)])

    largest = scales[-1]
    ratios = {scale.sessions: _ratios(scale.scans, scale.sweeps) for scale in scales}
    share = {scale.sessions: _median(scale.sweeps).cpu / INTERVAL.total_seconds() for scale in scales}
    line("opening, ms", lambda scale: _ms(scale.opening))
    restored = max(scale.restoring for scale in scales) <= RESTORE_GOAL
    line("restoring a session, ms", lambda scale: _ms(scale.restoring), f"{1000 * RESTORE_GOAL:g}", restored)
    line("the same during the first pass, ms", lambda scale: _ms(scale.restoring_while_sweeping))
    line("the same by the threaded design, ms", lambda scale: _ms(scale.restoring_threaded))
    line("a sweep with nothing due, ms of CPU", lambda scale: _ms(_median(scale.sweeps).cpu))
    line("the threaded design's scan, ms of CPU", lambda scale: _ms(_median(scale.scans).cpu))
    met = min(statistics.median(values) for values in ratios.values()) >= SCAN_GOAL
    line("the scan / the sweep, by CPU", lambda scale: f"**{_spread(ratios[scale.sessions])}**", f"{SCAN_GOAL}", met)
    cheap = share[largest.sessions] <= CORE_GOAL
    line("of a core, every half hour, %", lambda scale: _figure(100 * share[scale.sessions]), f"{CORE_GOAL:.1%}", cheap)
    line("longest lag of the event loop in a sweep, ms", lambda scale: _ms(scale.stall))
    line("a pass over everything, ms of CPU", lambda scale: _ms(scale.full.cpu) if scale.full else NOT_MEASURED)
    line("memory that the sweeps keep, bytes a session", lambda scale: f"{scale.remembered / scale.sessions:.0f}")
    return _table(["", *(f"{scale.sessions:,} sessions" for scale in scales), "goal", "met"], lines)


def _ratios(scans: Sequence[Cost], sweeps: Sequence[Cost]) -> list[float]:
    return [scan.cpu / sweep.cpu for scan, sweep in zip(scans, sweeps, strict=True)]


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(*map(statistics.median, zip(*costs, strict=True)))


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


def _mb(size: float) -> str:
    return _figure(size / 1e6)


def _yes(met: bool) -> str:
    return "yes" if met else "no"

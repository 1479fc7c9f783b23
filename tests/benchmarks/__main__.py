"""`python -m tests.benchmarks` measures for ten minutes and writes RESULTS.md; with `--quick`, it only prints."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from async_sessions._budget import DEFAULT_PIXELS
from tests.benchmarks import cases, device, lag, memory, peers, pictures, ratios, report, scale, tables
from tests.benchmarks.designs import PACKAGE, THREADED, UNSYNCED, Package, Threaded, ThreadedInLoop
from tests.benchmarks.lag import Load
from tests.benchmarks.pictures import HD, TWELVE_MEGAPIXELS

RESULTS = Path(__file__).with_name("RESULTS.md")
OTHERS = peers.GRADIO, peers.DISKCACHE, peers.OBSTORE, peers.BARE
SESSIONS = 10_000, 100_000


async def measure(*, quick: bool) -> str:
    load, started = os.getloadavg()[0], time.monotonic()
    speed = await _speed(quick=quick)
    lags = await _lags(quick=quick)
    _tell("a device and its queue")
    waits = await device.measure(jobs=6 if quick else device.JOBS)
    memories = await _memories(quick=quick)
    _tell("many sessions")
    scales = [
        await memory.in_fresh_process(scale.measure, count, 3 if quick else 5, not quick or count == SESSIONS[0])
        for count in SESSIONS
    ]
    return "\n\n".join(
        [
            "# This package beside what else an app could use",
            *(["A quick run: few rounds, and fewer lines."] if quick else []),
            report.environment(load, time.monotonic() - started),
            report.METHOD,
            "## The designs",
            report.PROMISES,
            tables.facts_table([opened(Path(), 0).facts for opened in reversed(peers.EVERYBODY)]),
            *speed,
            "## The event loop, while images are stored",
            report.LAG,
            tables.lag_table(lags),
            "## A device between two jobs",
            report.DEVICE,
            tables.device_table(waits),
            "## Memory",
            report.MEMORY,
            tables.memory_table(memories, memory.CACHE_BYTES + 4 * DEFAULT_PIXELS),
            "## Many sessions",
            report.SCALE.format(place=report.filesystem(scale.place(SESSIONS[-1]))),
            tables.scale_table(scales),
        ]
    )


async def _speed(*, quick: bool) -> list[str]:
    stores, reads = [], []
    for case in cases.chosen(quick=quick):
        _tell(case.what)
        measured = await ratios.rows(case)
        stores.append(measured.stores)
        if case.reads:
            reads.append(measured.reads)
    _tell("reading from memory")
    image, rounds = pictures.collage(HD, 0), 3 if quick else 8
    warm = [
        await ratios.cached("`retrieve_image` of a cached 1080p image", image, rounds=rounds, within=0.0003),
        await ratios.read_record("`read_record` of it, in memory", image, rounds=rounds, within=0.00001),
    ]
    *photographs, flat = [row for row in stores if THREADED in row.costs]
    wide = [row for row in stores if UNSYNCED in row.costs]
    read_by_all = [row for row in reads if peers.GRADIO in row.costs]
    return [
        "## Store, beside the threaded design",
        report.STORES,
        tables.goal_table([*photographs, flat]),
        "## Store, nothing synced",
        report.UNSYNCED,
        tables.peer_table(wide, [THREADED, *OTHERS], UNSYNCED),
        "## Store, synced",
        report.SYNCED,
        tables.peer_table(wide, [peers.BARE_SYNCED], PACKAGE),
        "## Size of the stored file",
        tables.size_table([row for row in photographs if "JPEG" not in row.what], flat),
        "## Retrieve",
        tables.goal_table([*(row for row in reads if row.goal), *warm]),
        report.READS,
        tables.peer_table(read_by_all, [THREADED, *OTHERS], PACKAGE),
    ]


async def _lags(*, quick: bool) -> dict[str, list[lag.Run]]:
    _tell("listening to the event loop")
    hd = [pictures.collage(HD, seed) for seed in range(4)]
    uploads = [pictures.upload(TWELVE_MEGAPIXELS, seed) for seed in range(4)]
    users = 2 if quick else 8
    loads = [
        Load(PACKAGE, Package, hd, 64),
        Load(f"{THREADED}, in threads", Threaded, hd, users),
        Load(f"{THREADED}, in the loop", ThreadedInLoop, hd, users),
        Load(f"{peers.GRADIO}, in threads", peers.GradioCache, hd, users),
        Load(f"{peers.GRADIO}, in the loop", peers.GradioInLoop, hd, users),
        Load(f"{peers.GRADIO}, 12 MP uploads, in the loop", peers.GradioInLoop, uploads, users),
    ]
    return await lag.lags(loads, rounds=1 if quick else 3, idle=0.5 if quick else 1.5, reruns=1 if quick else 3)


async def _memories(*, quick: bool) -> dict[str, memory.Memory]:
    _tell("memory")
    sessions = (16, 64, 192) if quick else (32, 128, 512)
    return {
        PACKAGE: await memory.in_fresh_process(memory.of_package, sessions),
        THREADED: await memory.in_fresh_process(memory.of_threaded, sessions[:2]),
    }


def _tell(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, under three minutes, and only print")
    quick = parser.parse_args().quick
    text = asyncio.run(measure(quick=quick))
    print(text)
    if not quick:
        RESULTS.write_text(f"{text}\n")


if __name__ == "__main__":
    main()

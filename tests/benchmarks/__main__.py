"""`python -m tests.benchmarks` measures for some minutes and writes RESULTS.md; with `--quick`, it only prints."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from tests.benchmarks import lag, pictures, ratios, report
from tests.benchmarks.pictures import HD, SMALL, TWELVE_MEGAPIXELS

RESULTS = Path(__file__).with_name("RESULTS.md")


async def measure(*, quick: bool) -> str:
    started = os.getloadavg()
    seeds = range(4)
    hd = [pictures.collage(HD, seed) for seed in seeds]
    uploads = [pictures.upload(TWELVE_MEGAPIXELS, seed) for seed in seeds[: 1 if quick else None]]
    rounds = 3 if quick else 8

    _tell("storing one image")
    alone = await ratios.stores(
        "1080p RGB image, alone", [[image] for image in (hd if quick else hd + hd)], goal=12
    )  # fmt: skip
    small = await ratios.stores(
        "720p RGBA image, alone", [[pictures.faded(SMALL, seed)] for seed in seeds[: 1 if quick else None]]
    )
    smooth = await ratios.stores(
        "1080p RGB photograph that was scaled up, alone",
        [[pictures.scaled_up(HD, seed)] for seed in seeds[: 1 if quick else None]],
    )
    flat = await ratios.stores("1080p flat image, alone", [[image] for image in pictures.drawings(HD)])
    _tell("storing eight images at once")
    together = await ratios.stores(
        "1080p RGB images, 8 sessions at once", [hd + hd for _ in range(1 if quick else 3)], goal=25
    )
    _tell("storing uploads")
    uploaded = await ratios.stores(
        "upload of a 12 MP JPEG, verified and durable", [[data] for data in uploads], goal=30
    )
    _tell("retrieving")
    cold = [
        await ratios.cold("1080p, cold, alone", hd[:1], rounds=rounds, goal=0.9),
        await ratios.cold("1080p, cold, 8 sessions at once", hd + hd, rounds=rounds, goal=1.5),
    ]
    warm = [
        await ratios.cached("`retrieve_image` of a cached 1080p image", hd[0], rounds=rounds, within=0.0003),
        await ratios.read_record(
            "`read_record` of a cached 1080p image, in memory", hd[0], rounds=rounds, within=0.00001
        ),
    ]
    _tell("listening to the event loop")
    runs = await lag.lags(hd, others=2 if quick else 8, rounds=1 if quick else 3, idle=1 if quick else 2)

    return "\n\n".join(
        [
            "# This package and the threaded design, measured side by side",
            *(["A quick run: few rounds."] if quick else []),
            report.environment(started),
            report.method(),
            "## The event loop, while 1080p images are stored",
            report.lag_table(runs),
            "## Store",
            report.ratio_table([alone, together, uploaded, small, smooth, flat]),
            "## Size of the stored file",
            report.size_table([alone, small, smooth], flat),
            "## Retrieve",
            report.ratio_table([*cold, *warm]),
        ]
    )


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

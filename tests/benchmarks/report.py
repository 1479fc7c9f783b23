"""What the report says beside its tables: the machine, the method, and how each table is to be read."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import gradio
import numpy as np
import obstore
import PIL
from diskcache import __version__ as diskcache_version  # type: ignore[import-untyped]
from PIL import features

from tests.benchmarks.device import FRAME, RUN
from tests.benchmarks.lag import BEAT, VOID
from tests.benchmarks.memory import CACHE_BYTES

METHOD = """\
All designs run in turn, in one process, on the same images: photographs side by side without resampling, unless a line
says otherwise. A figure is the median over the rounds of *the other design / this package*, so 2 is twice as fast and
0.5 half as fast, with the lowest and the highest round in brackets; CPU is that of all cores. Milliseconds are context
and depend on the machine. What was read was compared with what was stored, pixel by pixel. Reads find their files in
the page cache. Before each round the disk is synced, so that nobody waits for what others wrote. The sweep of this
package is off where it is not measured."""

PROMISES = """\
*Synced* is what is on the disk, file and directory, before a store returns; a power cut may lose the rest.
The designs that block are called in `asyncio.to_thread` unless a line says otherwise."""

STORES = """\
The threaded design syncs nothing; this package has verified an image and has it on the disk when it returns."""

UNSYNCED = """\
Nobody syncs: this package can't be told so, and `os.fsync` is made to do nothing for these figures. It is measured with
all else that it does and the others don't do. The bare write is the limit, of bytes that were encoded beforehand.
The threaded design is left out (-) of what would take it minutes: it has one lock, so 64 images take it 64 times as
long as one."""

SYNCED = """\
What returns is on the disk. Only this package does that; the others have no switch for it. The bare write, again, has
its bytes beforehand; it syncs one file and one directory, while this package writes image, thumbnail and manifest."""

READS = """\
Every design decodes the image that it finds; what was in memory was forgotten before. Only this package and the
threaded design keep images in memory: any read by the others is one of these. Uploads are JPEG files, but for the
threaded design, which made PNG files of them. This package compares each file with its digest."""

LAG = f"""\
Lag is the time by which the event loop is late to run what is due, at every {1000 * BEAT:g} ms of the run. Idle is the
same loop before and after. A run is void where idle's p99 exceeds {1000 * VOID:g} ms. Milliseconds, idle / busy, the
median of the runs, with 1080p images where nothing else is said. More sessions would make the threaded design's runs
longer, and in threads not worse: one works while the others wait for its lock. In the loop, nothing else runs until
the last image is stored; Gradio works so for the image of a `gr.update` and for files from outside its cache. *Busy
cores* is for how long, when the lag was longest, the loop's thread was ready to run and had no core, because the
encoders or other programs had them all."""

DEVICE = f"""\
A queue of jobs, each with two 12 MP JPEGs of its own, for one device that is at work for {RUN:g} s of each: a pipeline
decodes the images, crops and resizes them to {FRAME[0]}x{FRAME[1]} and lays them out. Idle is the time between the end
of a run and the start of the next, in milliseconds. In turn means that the device's thread does what `Pipeline.prepare`
does ahead. Lag is that of the event loop, idle / meanwhile."""

MEMORY = f"""\
Megabytes resident beyond those of the empty store, in a process of its own, with a flat 1080p image (8.3 MB in memory)
stored by each session, 8 at a time; what was freed was given back to the system before. This package was told to keep
{CACHE_BYTES / 1e6:.0f} MB of decoded images; at most it may take these and its budget of decoded pixels."""

SCALE = """\
Restoring reads one manifest and decodes nothing. A sweep with nothing due lists the sessions and reads none; the
threaded design's scan reads the metadata of each. A pass over everything reads each session: when a store has been
opened, in the background, and then daily. The files are in {place} and nothing waits for a disk; none is an image."""


def environment(load_before: float, seconds: float) -> str:
    load = f"{load_before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
    return "\n".join(
        [
            f"- {platform.system()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores; load average {load}",
            f"- Python {platform.python_version()}, Pillow {PIL.__version__} (zlib-ng {features.version('zlib_ng')}), "
            f"NumPy {np.__version__}, asyncio's own event loop",
            f"- Gradio {gradio.__version__}, diskcache {diskcache_version}, obstore {obstore.__version__}",
            f"- files on {filesystem(Path(tempfile.gettempdir()))}",
            f"- measured in {seconds / 60:.1f} minutes",
        ]
    )


def filesystem(folder: Path) -> str:
    """The kind of file system that a folder is on: a tmpfs makes fsync free."""
    folder = folder.resolve()
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

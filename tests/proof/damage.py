"""Damage of every kind to a store's files, one at a time: what `verify` tells of it, and what is harmed by it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
from msgspec.structs import replace
from PIL import Image

from async_sessions import (
    AsyncSessionsError,
    CorruptBlobError,
    CorruptManifestError,
    JobInfo,
    Session,
    SessionNotFoundError,
    SessionStore,
    open_store,
)
from async_sessions.testing.clock import FrozenClock
from tests.faults import files_below

SLOTS = ("a", "b", "c", "d", "e")

Part = tuple[str, str]  # a session's key, and what one can ask it for
Answer = bytes | type[AsyncSessionsError]


class Variant(NamedTuple):
    file: str
    how: str
    at: int


def damage(root: Path) -> str:
    done = anyio.run(check_damage, root, 10, 400, 1)
    kinds = ", ".join(f"{count} x {how}" for how, count in sorted(done.items()))
    return f"{sum(done.values())} damaged variants of a 50-image store ({kinds}): all reported, 0 others harmed"


async def check_damage(root: Path, sessions: int, variants: int, seed: int) -> Counter[str]:
    """Damage one file of a store with five images a session, again and again. Returns how often it was done how.

    Each time `verify` tells it and nothing else, what the file holds is answered with a type and all the rest is whole;
    once repaired, the store is without a finding, and still nothing else is gone.
    """
    rng = random.Random(seed)
    whole, damaged = root / "whole", root / "damaged"
    clock = FrozenClock()
    async with open_store(whole, cleanup_interval=None, clock=clock) as store:
        made = [await store.create_session() for _ in range(sessions)]
        for number, session in enumerate(made):
            await fill(session, number)
        expected = await read_everything(store, frozenset(session.key for session in made))
    clock.advance(hours=2)
    files = [[str(path.relative_to(whole)) for path in files_below(whole, name)] for name in ("manifests", "blobs")]
    done: Counter[str] = Counter()
    for _ in range(variants):
        await anyio.to_thread.run_sync(shutil.copytree, whole, damaged)
        variant = pick(rng, whole, files)
        apply(variant, damaged)
        # no use is recorded: a manifest that is written anew would not be the one that was damaged
        async with open_store(damaged, cleanup_interval=None, clock=clock, ttl=timedelta(days=365)) as store:
            await check(store, variant, expected)
        await anyio.to_thread.run_sync(shutil.rmtree, damaged)
        done[variant.how] += 1
    return done


async def fill(session: Session, number: int) -> None:
    for place, slot in enumerate(SLOTS):
        await session.store_image(Image.new("RGB", (40 + number, 30 + place), (number, place, 0)), slot)
    output = await session.store_output(b"a video of %d" % number, name="video", media_type="video/mp4")
    entry = JobInfo(
        id=f"{session.key}.{number:016x}",
        pipeline="p",
        inputs={},
        params={},
        submitted_at=output.stored_at,
        owner="o",
        status="succeeded",
        finished_at=output.stored_at,
        outputs={"video": output},
    )
    await session.edit_job(entry.id, lambda _: replace(entry))


async def read_everything(store: SessionStore, keys: frozenset[str]) -> dict[Part, Answer]:
    """What each part of each session is, or the error that stands for it."""
    found: dict[Part, Answer] = {}
    for key in keys:
        parts = [f"{what} {slot}" for what in ("image", "thumbnail") for slot in SLOTS] + ["output"]
        try:
            session = await store.open_by_key(key)
        except AsyncSessionsError as error:
            found |= {(key, part): type(error) for part in parts}
        else:
            found |= {(key, part): await read(session, *part.split()) for part in parts}
    return found


async def read(session: Session, what: str, slot: str = "") -> Answer:
    try:
        if what == "image":
            return await session.retrieve_bytes(slot)
        if what == "thumbnail":
            return await session.retrieve_thumbnail(slot)
        (job,) = (await session.info()).jobs.values()
        if job.error is not None:
            return CorruptBlobError
        async with session.output_file(job.outputs["video"]) as path:
            return path.read_bytes()
    except AsyncSessionsError as error:
        return type(error)


def pick(rng: random.Random, root: Path, files: list[list[str]]) -> Variant:
    """One in three is a manifest, of which there are few."""
    file = rng.choice(rng.choices(files, (1, 2))[0])
    size = (root / file).stat().st_size
    how = rng.choice(("flip", "truncate", "delete"))
    return Variant(file, how, rng.randrange(8 * size if how == "flip" else size))


def apply(variant: Variant, root: Path) -> None:
    path = root / variant.file
    match variant.how:
        case "flip":
            data = bytearray(path.read_bytes())
            data[variant.at // 8] ^= 1 << variant.at % 8
            path.write_bytes(data)
        case "truncate":
            path.write_bytes(path.read_bytes()[: variant.at])
        case "delete":
            path.unlink()


async def check(store: SessionStore, variant: Variant, expected: dict[Part, Answer]) -> None:
    keys = frozenset(key for key, _ in expected)
    names = await named_parts(store, keys)
    found = await read_everything(store, keys)
    harmed = {part for part in expected if found[part] != expected[part]}
    report = await store.verify()
    reported = {finding.key for finding in report.findings}
    if variant.file.startswith("manifests/"):
        key = Path(variant.file).stem
        assert harmed == {part for part in expected if part[0] == key}, variant
        error = SessionNotFoundError if variant.how == "delete" else CorruptManifestError
        assert {found[part] for part in harmed} == {error}, variant
        lost = {blob for blob in files_of(store, "blobs") if blob not in names}
        assert reported == (lost if variant.how == "delete" else lost | {variant.file}), variant
    else:
        assert harmed == {names[variant.file]}, variant
        assert {found[part] for part in harmed} == {CorruptBlobError}, variant
        assert reported == {variant.file}, variant
    repaired = await store.verify(repair=True)
    assert {finding.key for finding in repaired.findings} == reported, variant
    assert repaired.unrepaired == (), variant
    assert (await store.verify()).findings == (), variant
    left = await read_everything(store, keys)
    whole = {part: answer for part, answer in left.items() if not isinstance(answer, type)}
    assert whole.items() <= expected.items(), variant
    images = {(key, name.replace("image", "thumbnail")) for key, name in harmed}
    assert expected.keys() - whole.keys() <= harmed | images, variant


async def named_parts(store: SessionStore, keys: frozenset[str]) -> dict[str, Part]:
    """For every blob that a readable session names, what it is."""
    named: dict[str, Part] = {}
    for key in keys:
        try:
            info = await (await store.open_by_key(key)).info()
        except AsyncSessionsError:
            continue
        for slot, record in info.images.items():
            named[record.blob] = key, f"image {slot}"
            named[f"{record.blob}.thumb"] = key, f"thumbnail {slot}"
        named |= {output.blob: (key, "output") for job in info.jobs.values() for output in job.outputs.values()}
    return named


def files_of(store: SessionStore, folder: str) -> list[str]:
    root = store.blobs.root  # type: ignore[attr-defined]
    return [str(path.relative_to(root)) for path in files_below(root, folder)]

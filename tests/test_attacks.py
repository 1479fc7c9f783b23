"""Names that mean to be paths: through every door that takes a name, and not one file outside the store is opened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

ATTACKS = (
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "....//....//etc/passwd",
    "..\\..\\windows\\win.ini",
    "%2e%2e%2fetc%2fpasswd",
    "..%c0%af..%c0%afetc/passwd",
    "~/.ssh/id_rsa",
    "~root",
    "file:///etc/passwd",
    "C:\\windows",
    "\\\\server\\share",
    "start\0.png",
    "start/../../x",
    "start\n",
    "start\r\nX-Injected: 1",
    "",
    ".",
    "-rf",
    "$(id)",
    "`id`",
    "; rm -rf /",
    "| cat /etc/passwd",
    "' OR 1=1 --",
    "<script>alert(1)</script>",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.x",
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/x",
    "st\N{COMBINING ACUTE ACCENT}art",
    "\ud800",
    "A" * 100_000,
)
PIECES = (
    "..",
    "/",
    "\\",
    "\0",
    "%2f",
    "etc",
    "passwd",
    "~",
    ".",
    "blobs",
    "manifests",
    "tmp",
    "a",
    "0",
    "\n",
    " ",
    "é",
)

WATCHED = """
import asyncio, sys
from pathlib import Path
from PIL import Image
from async_sessions import AsyncSessionsError, GenerationRequest, Session, open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.testing.pipeline import FakePipeline
from tests.test_attacks import strings
from tests.watch import Watch

root, watch = Path(sys.argv[1]), Watch()

async def main():
    red = Image.new("RGB", (8, 8), "red")
    async with open_store(root, cleanup_interval=None) as store, LocalDispatcher(store, [FakePipeline()]) as dispatcher:
        good = await store.create_session()
        record = await good.store_image(red, "start")
        before = await good.info()

        async def image_file(slot):
            async with good.image_file(slot):
                pass

        doors = {
            "store_image": lambda name: good.store_image(red, name),
            "store_images": lambda name: good.store_images({"start": red, name: red}),
            "retrieve_image": good.retrieve_image,
            "retrieve_bytes": good.retrieve_bytes,
            "retrieve_thumbnail": good.retrieve_thumbnail,
            "image_file": image_file,
            "has_image": good.has_image,
            "clear_image": good.clear_image,
            "restore_recent": lambda name: good.restore_recent(name, "start"),
            "restore_recent into": lambda name: good.restore_recent(record.digest, name),
            "generation_request": lambda name: good.generation_request("fake", slots=[name]),
            "restore_session": store.restore_session,
            "delete_session": store.delete_session,
            "open_by_key": store.open_by_key,
            "job": lambda name: dispatcher.job(good, name),
            "submit": lambda name: dispatcher.submit(GenerationRequest(session_key=name, pipeline="fake", inputs={})),
        }
        await good.store_image(red, "end", name="a.png")  # from here on all modules are loaded
        await good.clear_image("end")
        watch.on = True
        refused = taken = 0
        for name in strings():
            for call in doors.values():
                try:
                    await call(name)
                    taken += 1
                except AsyncSessionsError as error:
                    refused += 1
                    assert "Traceback" not in str(error)
        for name in strings():  # these take any name, and no path is made of it
            await store.session_of(name).store_image(red, "start", name=name)
            await (await store.session_for(name)).delete()
            await good.pin(repr(name), until=store.clock())
            await good.unpin(repr(name))
        watch.on = False
        info = await good.info()
        assert info.images["start"].blob == before.images["start"].blob, info.images
        assert set(info.images) == {"start"}
    print(refused, taken)

asyncio.run(main())
outside = sorted(path for path in watch.touched if not path.startswith(str(root)))
assert len(watch.touched) > 10, watch.touched
assert not outside, outside
"""


def strings() -> list[str]:
    chance = Random(1)
    made = ["".join(chance.choices(PIECES, k=chance.randint(1, 9))) for _ in range(200)]
    return [*ATTACKS, *(name for name in made if not re.fullmatch("[a-z][a-z0-9]*", name))]


def test_no_name_opens_a_file_outside_the_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "sessions")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, taken = map(int, done.stdout.split())
    assert refused > 10 * len(strings())
    assert taken < 2 * len(strings())

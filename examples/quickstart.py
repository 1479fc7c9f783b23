"""Plain asyncio: keep two images, come back to them after a restart, make a video from them.

python examples/quickstart.py [FOLDER]
"""

import asyncio
import shutil
import sys
from pathlib import Path

from PIL import Image

from async_sessions import open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.pipelines.preview import PreviewPipeline


async def upload(folder: Path) -> str:
    async with open_store(folder) as store:
        session = await store.create_session(prompt="from dusk to dawn")
        await session.store_image(Image.linear_gradient("L").convert("RGB"), "start")
        await session.store_image(Image.radial_gradient("L").convert("RGB"), "end")
        if session.id is None:
            raise RuntimeError("a session that was just created has an id")
        return session.id  # the user's secret: keep it in a signed cookie, never in a log


async def generate(folder: Path, session_id: str) -> Path:
    async with open_store(folder) as store, LocalDispatcher(store, [PreviewPipeline()]) as dispatcher:
        session = await store.restore_session(session_id)
        request = await session.generation_request("preview", params={"num_frames": 17, "fps": 8})
        job = await dispatcher.submit(request)
        async for event in job.events():
            print(event)
        video = (await job.result())["video"]
        async with session.output_file(video) as path:
            return Path(await asyncio.to_thread(shutil.copy, path, folder.with_suffix(".mp4")))


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-sessions")
    session_id = asyncio.run(upload(folder))
    print(asyncio.run(generate(folder, session_id)))


if __name__ == "__main__":
    main()

"""A photograph becomes a video: Wan2.2 I2V-A14B, from a folder as diffusers stores it.

python examples/wan.py MODEL_DIR PHOTOGRAPH PROMPT [area=399360 num_frames=33 ...]
"""

import asyncio
import json
import shutil
import sys
from pathlib import Path

import torch

from async_sessions import open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import Progress
from async_sessions.pipelines.wan import WanPipeline


async def generate(model_dir: Path, photograph: Path, prompt: str, **params: float) -> Path:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # two experts of 28 GB each and a text encoder of 11 GB: they take turns on the device
    wan = WanPipeline(model_dir, "i2v-A14B", device=device, offload="model")
    async with open_store("wan-sessions") as store, LocalDispatcher(store, [wan], devices=[device]) as dispatcher:
        session = await store.create_session()
        await session.store_image(photograph, "start")
        request = await session.generation_request("i2v-A14B", slots=["start"], params={"prompt": prompt, **params})
        job = await dispatcher.submit(request)
        async for event in job.events():
            if isinstance(event, Progress):
                print(f"{event.note} {event.step} of {event.total}")
        async with session.output_file((await job.result())["video"]) as path:
            return Path(await asyncio.to_thread(shutil.copy, path, photograph.with_suffix(".mp4").name))


def main() -> None:
    model_dir, photograph, prompt, *values = sys.argv[1:]
    params = {name: json.loads(value) for name, _, value in (each.partition("=") for each in values)}
    print(asyncio.run(generate(Path(model_dir), Path(photograph), prompt, **params)))


if __name__ == "__main__":
    main()

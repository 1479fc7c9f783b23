"""Tiny models of the three kinds, through diffusers' own loading and sampling, from a real session to a real mp4."""

from __future__ import annotations

import gc
import io
import json
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from async_sessions import (
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    Session,
    SessionStore,
)
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import CancelFlag, JobContext, Lane, Progress
from async_sessions.pipelines._latents import LatentColours
from async_sessions.pipelines.wan import WanPipeline
from async_sessions.renditions import fit, to_tensor
from tests.images import photograph
from tests.videos import comment_of, frames_of

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("wan")]  # the models are made in one process

START, END = photograph(480, 320, seed=1), photograph(300, 400, seed=2)
SMALL: dict[str, Any] = {"prompt": "a dog runs on the beach", "area": 64 * 64, "num_frames": 5, "steps": 3, "seed": 7}


class Made(NamedTuple):
    video: bytes
    frames: list[np.ndarray]
    comment: dict[str, Any]
    progress: list[Progress]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """One loop: what is tested here runs in threads, and takes a second each."""
    return ("asyncio", {"use_uvloop": False})


@pytest.fixture
async def session(session_store: SessionStore) -> Session:
    session = await session_store.create_session()
    await session.store_images({"start": START, "end": END})
    return session


@pytest.fixture
async def wan(session_store: SessionStore, tiny_wan: Mapping[str, Path]) -> AsyncIterator[LocalDispatcher]:
    pipelines = [WanPipeline(folder, name, device="cpu") for name, folder in tiny_wan.items()]
    async with LocalDispatcher(session_store, pipelines) as dispatcher:
        yield dispatcher


@pytest.fixture
def made(wan: LocalDispatcher, session: Session) -> Any:
    return partial(make, wan, session)


async def make(dispatcher: LocalDispatcher, session: Session, pipeline: str, *slots: str, **params: Any) -> Made:
    job = await dispatcher.submit(await session.generation_request(pipeline, slots=slots, params={**SMALL, **params}))
    progress = [event async for event in job.events() if isinstance(event, Progress)]
    output = (await job.result())["video"]
    assert output.media_type == "video/mp4"
    video = b"".join([chunk async for chunk in session.stream_output(output)])
    frames = frames_of(video)
    comment = json.loads(comment_of(video))
    for secret in (str(session.id), session.key, job.id.rpartition(".")[2]):
        assert secret.encode() not in video
    return Made(video, frames, comment, progress)


def differ(one: Made, other: Made) -> bool:
    return not np.array_equal(np.stack(one.frames), np.stack(other.frames))


@asynccontextmanager
async def loaded(pipeline: WanPipeline) -> AsyncIterator[Lane]:
    async with Lane("cpu", {pipeline.spec.name: pipeline}) as lane:
        await lane.load()
        assert lane.failures == {}
        yield lane


async def generated(
    lane: Lane,
    pipeline: WanPipeline,
    ready: Any,
    tell: Callable[[Any], None] = lambda report: None,
    flag: CancelFlag | None = None,
) -> bytes:
    videos: list[bytes] = []

    def call() -> None:
        path = pipeline.generate(ready, {}, JobContext("job", 1, "cpu", tell=tell, flag=flag))["video"]
        assert isinstance(path, Path)
        videos.append(path.read_bytes())
        path.unlink()

    raised = await lane.run(call)
    if raised is not None:
        raise raised
    return videos[0]


async def prepared(pipeline: WanPipeline, session: Session, *slots: str, **params: Any) -> Any:
    images = (await session.info()).images
    inputs = {slot: await session.read_record(images[slot]) for slot in slots}
    return await anyio.to_thread.run_sync(pipeline.prepare, inputs, {**pipeline.spec.defaults, **SMALL, **params})


@pytest.mark.parametrize(
    ("model", "slots", "size", "fps"),
    [
        ("t2v-A14B", (), (80, 48), 16),  # the shape of the model's own size, 1280 x 720
        ("i2v-A14B", ("start",), (64, 48), 16),
        ("i2v-A14B", ("start", "end"), (64, 48), 16),
        ("ti2v-5B", (), (64, 32), 24),
        ("ti2v-5B", ("start",), (64, 64), 24),
    ],
)
async def test_a_request_becomes_an_mp4_that_says_how_it_was_made(
    made: Any, model: str, slots: tuple[str, ...], size: tuple[int, int], fps: int
) -> None:
    found: Made = await made(model, *slots, num_frames=9)
    width, height = size
    assert [frame.shape for frame in found.frames] == [(height, width, 3)] * 9
    assert found.video.index(b"moov") < found.video.index(b"mdat")  # it plays while it loads
    with av.open(io.BytesIO(found.video), "r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(fps), 9)
    expected = {"model": model, "prompt": SMALL["prompt"], "seed": 7, "steps": 3, "num_frames": 9, "fps": fps}
    assert found.comment.items() >= {**expected, "width": width, "height": height}.items()
    last = found.progress[-1]
    assert (last.step, last.total, last.note) == (3, 3, "Decoding")
    assert [event.step for event in found.progress] == sorted({event.step for event in found.progress})


async def test_images_and_values_all_count(made: Any) -> None:
    start = await made("i2v-A14B", "start")
    assert differ(start, await made("i2v-A14B", "start", "end"))
    assert differ(start, await made("i2v-A14B", "start", seed=8))
    assert differ(start, await made("i2v-A14B", "start", guidance_scale=9))
    assert differ(start, await made("i2v-A14B", "start", guidance_scale_2=9))
    assert differ(start, await made("i2v-A14B", "start", shift=1))
    assert differ(await made("ti2v-5B", width=64, height=64), await made("ti2v-5B", "start", width=64, height=64))


async def test_the_same_seed_makes_the_same_file(session: Session, tiny_wan: Mapping[str, Path]) -> None:
    videos = set()
    for _ in range(2):  # with other things in the memory each time, which x264 has let show
        pipeline = WanPipeline(tiny_wan["ti2v-5B"], "ti2v-5B", device="cpu")
        async with loaded(pipeline) as lane:
            for number in range(4):
                side = 64 + 32 * (number % 2)
                ready = await prepared(pipeline, session, "start", width=side, height=64)
                videos.add((side, await generated(lane, pipeline, ready)))
    assert len(videos) == 2


async def test_a_seed_of_chance_is_recorded(made: Any) -> None:
    first, second = [await made("t2v-A14B", seed=None) for _ in range(2)]
    assert first.comment["seed"] != second.comment["seed"]
    assert differ(first, second)


@pytest.mark.parametrize("model", ["i2v-A14B", "ti2v-5B"])
async def test_what_is_recorded_repeats_the_video(made: Any, model: str) -> None:
    first = await made(model, "start", seed=None, guidance_scale=4, shift=3)
    assert first.comment.pop("model") == model
    assert (await made(model, "start", **first.comment)).video == first.video


async def test_a_long_prompt_in_any_script_is_recorded_whole(made: Any) -> None:
    prompt = "海辺を走る犬 \U0001f415 " * 800
    assert (await made("t2v-A14B", prompt=prompt)).comment["prompt"] == prompt


async def test_an_image_that_the_model_would_ignore_is_refused(wan: LocalDispatcher, session: Session) -> None:
    for model, slots, said in (
        ("ti2v-5B", ["start", "end"], r"'ti2v-5B' takes no image as 'end'; it takes: start\."),
        ("t2v-A14B", ["end"], r"'t2v-A14B' takes no image as 'end'; it takes: none\."),
        ("t2v-A14B", ["start"], r"'t2v-A14B' takes no image as 'start'; it takes: none\."),
        ("i2v-A14B", ["end"], r"'i2v-A14B' needs an image as 'start'; store one first\."),
    ):
        request = await session.generation_request(model, slots=slots, params=SMALL)
        with pytest.raises(InvalidRequestError, match=said):
            await wan.submit(request)


async def test_a_value_that_does_not_fit_is_told_before_any_work(
    made: Any, session: Session, tiny_wan: Mapping[str, Path]
) -> None:
    said = "width must be a multiple of 16 for i2v-A14B, such as 64 or 80, not 70"
    pipeline = WanPipeline(tiny_wan["i2v-A14B"], device="cpu")  # not even loaded
    images = (await session.info()).images
    pipeline.check(images, {**pipeline.spec.defaults, **SMALL})
    with pytest.raises(InvalidRequestError, match=said):
        pipeline.check(images, {**pipeline.spec.defaults, **SMALL, "width": 70, "height": 64})
    with pytest.raises((InvalidRequestError, JobFailedError), match=said):
        await made("i2v-A14B", "start", width=70, height=64)


async def test_images_are_cropped_to_one_size_and_never_stretched(
    session: Session, tiny_wan: Mapping[str, Path]
) -> None:
    pipeline = WanPipeline(tiny_wan["i2v-A14B"], device="cpu")
    found = await prepared(pipeline, session, "start", "end", area=128 * 128)
    size = (found.plan.width, found.plan.height)
    assert size == (144, 96)  # 156 x 104 has that area and the shape of the start image
    for tensor, image in ((found.start, START), (found.end, END)):
        assert torch.equal(tensor, to_tensor(fit(image, size)))


async def test_a_cancelled_job_ends_within_a_step(session: Session, tiny_wan: Mapping[str, Path]) -> None:
    pipeline = WanPipeline(tiny_wan["i2v-A14B"], device="cpu", offload="model")
    flag = CancelFlag()
    told: list[int] = []

    def tell(report: Any) -> None:
        told.append(report[0])
        if len(told) == 2:
            flag.set()

    async with loaded(pipeline) as lane:
        ready = await prepared(pipeline, session, "start", steps=50)
        with pytest.raises(JobCancelledError):
            await generated(lane, pipeline, ready, tell, flag)
        assert told == [1, 2]
        assert await generated(lane, pipeline, await prepared(pipeline, session, "start"))  # fit for the next one


@pytest.mark.parametrize("error", [JobCancelledError, torch.OutOfMemoryError, RuntimeError])
async def test_a_run_that_is_stopped_or_fails_leaves_nothing_of_its_video_in_memory(
    session: Session, tiny_wan: Mapping[str, Path], error: type[Exception]
) -> None:
    pipeline = WanPipeline(tiny_wan["i2v-A14B"], device="cpu")

    def stop(report: Any) -> None:
        raise error("Stopped.")

    async with loaded(pipeline) as lane:
        ready = await prepared(pipeline, session, "start")
        with no_collection():
            before = videos_in_memory()
            with pytest.raises(error, match=r"Stopped\.") as raised:
                await generated(lane, pipeline, ready, stop)
            left = videos_in_memory() - before
        assert not left  # though somebody still looks at the error
        assert "in after_step" in "".join(traceback.format_exception(raised.value))  # it says where it came from
        assert await generated(lane, pipeline, ready)  # fit for the next one


@contextmanager
def no_collection() -> Iterator[None]:
    """What only a collection would free is as good as kept: it may come long after."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def videos_in_memory() -> Counter[torch.Size]:
    """How many tensors there are of each shape that a batch of videos, or of latents, has; weights too."""
    return Counter(each.shape for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.ndim == 5)


async def test_a_cancelled_run_leaves_no_file(
    wan: LocalDispatcher, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    params = {**SMALL, "steps": 200}
    job = await wan.submit(await session.generation_request("i2v-A14B", slots=["start"], params=params))
    steps = []
    async for event in job.events():
        if isinstance(event, Progress):
            steps.append(event.step)
            await job.cancel()
    assert (await job.info()).status == "cancelled"
    assert steps[-1] < 200
    assert list((tmp_path / "temporary").iterdir()) == []


async def test_every_step_is_reported_and_some_show_what_comes(session: Session, tiny_wan: Mapping[str, Path]) -> None:
    told: list[Any] = []
    pipeline = WanPipeline(tiny_wan["ti2v-5B"], "ti2v-5B", device="cpu")
    async with loaded(pipeline) as lane:
        ready = await prepared(pipeline, session, "start", width=128, height=96)
        await generated(lane, pipeline, ready, told.append)
    assert [report[:3] for report in told] == [(1, 3, "Step"), (2, 3, "Step"), (3, 3, "Decoding")]
    with Image.open(io.BytesIO(told[0][3])) as shown:
        assert (shown.format, shown.size) == ("WEBP", (8, 6))


class LinearVae:
    """Its latents are the mean colours of squares of 8 x 8, in channels of their own: 16, each a mixture."""

    dtype = torch.float32
    config = SimpleNamespace(latents_mean=[0.3] * 16, latents_std=[2.0] * 16)
    mixture = torch.randn((16, 3), generator=torch.Generator().manual_seed(4))

    def encode(self, samples: torch.Tensor) -> Any:
        squares = torch.nn.functional.avg_pool2d(samples[:, :, 0], 8)
        latents = torch.einsum("cr,brhw->bchw", self.mixture, squares).unsqueeze(2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


def test_a_preview_has_the_colours_that_the_latents_stand_for() -> None:
    vae: Any = LinearVae()
    picture = photograph(1280, 960, seed=1)
    latents = vae.encode((to_tensor(picture) * 2 - 1).unsqueeze(2)).latent_dist.mode()[0]
    preview = LatentColours(vae, torch.device("cpu")).webp((latents - 0.3) / 2)
    with Image.open(io.BytesIO(preview)) as shown:
        assert shown.size == (160, 120)
        found = np.asarray(shown, int)
    expected = np.asarray(picture.resize((160, 120), Image.Resampling.BOX), int)
    assert np.abs(found - expected).mean() < 8
    chance = LatentColours(vae, torch.device("cpu")).webp(torch.randn(16, 21, 90, 160) * 100)
    assert len(chance) < 64 * 1024  # what an event may carry


async def test_offload_and_tiling_change_nothing_that_is_seen(session: Session, tiny_wan: Mapping[str, Path]) -> None:
    videos = []
    options: dict[str, Any]
    for number in range(2):
        options = {"offload": "model", "vae_tiling": True} if number else {}
        pipeline = WanPipeline(tiny_wan["ti2v-5B"], "ti2v-5B", device="cpu", **options)
        async with loaded(pipeline) as lane:
            for slots in (("start",), (), ("start",)):
                ready = await prepared(pipeline, session, *slots, width=64, height=64)
                videos.append(await generated(lane, pipeline, ready))
    assert videos[:3] == videos[3:]
    assert videos[0] == videos[2] != videos[1]


async def test_a_released_model_is_gone_and_can_be_loaded_again(session: Session, tiny_wan: Mapping[str, Path]) -> None:
    pipeline = WanPipeline(tiny_wan["ti2v-5B"], "ti2v-5B", device="cpu")
    async with loaded(pipeline) as lane:
        assert weights()
        await lane.run(pipeline.release)
        assert not weights()
        await lane.run(pipeline.release)
        assert await lane.run(partial(pipeline.load, "cpu")) is None
        assert await generated(lane, pipeline, await prepared(pipeline, session, "start"))
    assert not weights()


def weights() -> list[Any]:
    return [each for each in gc.get_objects() if issubclass(type(each), diffusers.WanTransformer3DModel)]


async def failure(store: SessionStore, session: Session, pipeline: WanPipeline) -> tuple[str, str]:
    async with LocalDispatcher(store, [pipeline], devices=[pipeline.spec.device]) as dispatcher:
        request = await session.generation_request(pipeline.spec.name, slots=["start"], params=SMALL)
        job = await dispatcher.submit(request)
        with pytest.raises(JobFailedError) as raised:
            await job.result()
        error = (await job.info()).error
    assert error is not None
    return error.kind, str(raised.value)


async def test_a_model_that_cant_be_loaded_fails_the_job_in_a_sentence(
    session_store: SessionStore, session: Session, tiny_wan: Mapping[str, Path], tmp_path: Path
) -> None:
    fail = partial(failure, session_store, session)
    kind, said = await fail(WanPipeline(tmp_path / "nothing", device="cpu"))
    assert (kind, "has no model_index.json" in said) == ("ModelError", True)
    kind, said = await fail(WanPipeline(tiny_wan["ti2v-5B"], device="cpu"))
    assert (kind, "'ti2v-5B' holds ti2v-5B, not i2v-A14B." in said) == ("ModelError", True)
    kind, said = await fail(WanPipeline(tiny_wan["i2v-A14B"], device="xpu"))
    assert (kind, "There is no xpu device here" in said) == ("ModelError", True)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer_2", "tokenizer"])
async def test_a_folder_of_which_a_part_is_missing_or_damaged_fails_the_job_in_a_sentence(
    session_store: SessionStore, session: Session, tiny_wan: Mapping[str, Path], tmp_path: Path, part: str
) -> None:
    half = shutil.copytree(tiny_wan["i2v-A14B"], tmp_path / "half")
    for file in (half / part).iterdir():
        if file.name in ("config.json", "tokenizer.json"):
            file.write_bytes(file.read_bytes()[:100])
    damaged = await failure(session_store, session, WanPipeline(half, device="cpu"))
    shutil.rmtree(half / part)
    missing = await failure(session_store, session, WanPipeline(half, device="cpu"))
    for (kind, said), expected in (
        (damaged, "i2v-A14B can't be loaded from 'half': a file is missing or damaged"),
        (missing, f"'half' is not complete: {part} is missing."),
    ):
        assert (kind, expected in said) == ("ModelError", True), said
        assert str(tmp_path) not in said  # the page shows it


def test_what_cant_be_set_up_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'i2v' here; there are: t2v-A14B, i2v-A14B, ti2v-5B\."):
        WanPipeline(tmp_path, "i2v")
    with pytest.raises(ValueError, match="`offload` is one of none, model, sequential; not 'disk'"):
        WanPipeline(tmp_path, offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nowhere to offload to"):
        WanPipeline(tmp_path, device="cpu", offload="sequential")

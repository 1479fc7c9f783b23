from __future__ import annotations

import io
import json
import tempfile
from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from skimage import data

from async_sessions import JobFailedError, Session, SessionStore
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import PipelineSpec, Progress
from async_sessions.pipelines.preview import PreviewPipeline
from tests.videos import frames_of

pytestmark = pytest.mark.anyio

CAT = Image.fromarray(data.chelsea())  # type: ignore[no-untyped-call]  # 451x300
ASTRONAUT = Image.fromarray(data.astronaut())  # type: ignore[no-untyped-call]  # 512x512
SMALL = {"num_frames": 9, "area": 320 * 208}


@pytest.fixture
async def previews(session_store: SessionStore) -> AsyncIterator[LocalDispatcher]:
    pipelines = [
        PreviewPipeline(),
        PreviewPipeline("t2v-A14B", slots={}),
        PreviewPipeline("ti2v-5B", slots={"start": False, "end": False}, defaults={"fps": 24, "steps": 50}),
    ]
    async with LocalDispatcher(session_store, pipelines) as dispatcher:
        yield dispatcher


async def video_of(
    dispatcher: LocalDispatcher, session: Session, pipeline: str = "preview", **params: Any
) -> tuple[bytes, list[int]]:
    """The mp4, and the steps that were reported."""
    slots = [slot for slot in (await session.info()).images if pipeline != "t2v-A14B"]
    job = await dispatcher.submit(await session.generation_request(pipeline, slots=slots, params={**SMALL, **params}))
    steps = [event.step async for event in job.events() if isinstance(event, Progress)]
    output = (await job.result())["video"]
    assert output.media_type == "video/mp4"
    return b"".join([chunk async for chunk in session.stream_output(output)]), steps


def difference(frame: np.ndarray, image: Image.Image) -> float:
    """Mean absolute difference, of 255, to `image` cropped to the frame's size."""
    height, width = frame.shape[:2]
    expected = np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))
    return float(np.abs(frame.astype(int) - expected).mean())


async def test_a_video_leads_from_the_start_image_to_the_end_image(previews: LocalDispatcher, session: Session) -> None:
    await session.store_images({"start": CAT, "end": ASTRONAUT})
    video, steps = await video_of(previews, session, num_frames=17)
    frames = frames_of(video)
    assert len(frames) == 17
    assert frames[0].shape == (208, 320, 3)  # 66,560 pixels at 451:300, in multiples of 16
    assert difference(frames[0], CAT) < 3
    assert difference(frames[-1], ASTRONAUT) < 4
    middle = frames[8]
    assert difference(middle, CAT) > 20
    assert difference(middle, ASTRONAUT) > 20
    distances = [difference(frame, CAT) for frame in frames]
    assert distances == sorted(distances)
    assert steps == sorted(set(steps))
    assert steps[-1] == 17


async def test_one_image_is_pushed_into_slowly(previews: LocalDispatcher, session: Session) -> None:
    await session.store_image(CAT, "start")
    frames = frames_of((await video_of(previews, session))[0])
    assert difference(frames[0], CAT) < 3
    width, height = CAT.size
    margin = (1 - 1 / 1.15) / 2
    closer = CAT.crop(
        (round(width * margin), round(height * margin), round(width * (1 - margin)), round(height * (1 - margin)))
    )
    assert difference(frames[-1], closer) < difference(frames[-1], CAT) / 2


async def test_an_end_image_alone_is_arrived_at(previews: LocalDispatcher, session: Session) -> None:
    await session.store_image(CAT, "end")
    frames = frames_of((await video_of(previews, session, "ti2v-5B"))[0])
    assert difference(frames[-1], CAT) < 3
    assert difference(frames[0], CAT) > 3


async def test_without_an_image_the_prompt_and_the_seed_paint(previews: LocalDispatcher, session: Session) -> None:
    first, _ = await video_of(previews, session, "t2v-A14B", prompt="a dog", seed=1)
    same, _ = await video_of(previews, session, "t2v-A14B", prompt="a dog", seed=1)
    other, _ = await video_of(previews, session, "t2v-A14B", prompt="a dog", seed=2)
    assert first == same
    assert first != other
    frames = frames_of(first)
    assert frames[0].std() > 10
    assert np.abs(frames[0].astype(int) - frames[4]).mean() > 5


async def test_the_file_is_an_h264_mp4_that_says_what_it_is(previews: LocalDispatcher, session: Session) -> None:
    await session.store_image(CAT, "start")
    video, _ = await video_of(previews, session, "ti2v-5B", num_frames=25, prompt="secret plans")
    assert b"secret plans" not in video
    assert video.index(b"moov") < video.index(b"mdat")  # it plays while it loads
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(24), 25)
        assert container.metadata["comment"] == "async_sessions preview: made without a model"
        assert not container.streams.audio


@pytest.mark.parametrize(
    ("params", "size"),
    [
        ({}, (768, 512)),
        ({"area": 1280 * 720}, (1184, 784)),
        ({"width": 320}, (320, 208)),
        ({"height": 208}, (320, 208)),
        ({"width": 100, "height": 500}, (96, 496)),
        ({"width": 320.0}, (320, 208)),
    ],
)
async def test_the_size_follows_the_parameters_and_the_first_image(
    previews: LocalDispatcher, session: Session, params: dict[str, Any], size: tuple[int, int]
) -> None:
    await session.store_image(CAT, "start")
    params = {"area": 832 * 480, "num_frames": 1, **params}
    frames = frames_of((await video_of(previews, session, **params))[0])
    assert [frame.shape for frame in frames] == [(size[1], size[0], 3)]


@pytest.mark.parametrize(
    "params",
    [
        {"num_frames": 0},
        {"num_frames": 1001},
        {"num_frames": 8.5},
        {"num_frames": "many"},
        {"num_frames": True},
        {"num_frames": None},
        {"fps": 0},
        {"fps": 121},
        {"width": 8},
        {"height": 5000},
        {"area": 1},
    ],
    ids=lambda params: json.dumps(params),
)
async def test_a_value_that_cant_be_used_fails_the_job_in_a_sentence(
    previews: LocalDispatcher, session: Session, params: dict[str, Any]
) -> None:
    request = await session.generation_request("t2v-A14B", slots=(), params={**SMALL, **params})
    with pytest.raises(
        JobFailedError, match=rf"^{next(iter(params))} must be a whole number from \d+ to \d+, not .*\.$"
    ):
        await (await previews.submit(request)).result()


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (sixteen_bit(), Image.fromarray((np.asarray(sixteen_bit()) >> 8).astype(np.uint8))),
        (ASTRONAUT.convert("L"), ASTRONAUT.convert("L")),
        (ASTRONAUT.quantize(64), ASTRONAUT.quantize(64)),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), Image.new("RGB", (64, 64), (128, 128, 128))),
        (Image.new("LA", (64, 64), (255, 255)), Image.new("RGB", (64, 64), "white")),
    ],
    ids=["16 bit", "grey", "palette", "transparent", "grey with alpha"],
)
async def test_every_kind_of_image_is_shown_as_a_person_sees_it(
    previews: LocalDispatcher, session: Session, image: Image.Image, expected: Image.Image
) -> None:
    await session.store_image(image, "start")
    video, _ = await video_of(previews, session, width=128, height=128)
    frames = frames_of(video)
    assert difference(frames[0], expected) < 5


async def test_an_image_is_cropped_and_never_stretched(previews: LocalDispatcher, session: Session) -> None:
    circle = Image.new("RGB", (600, 200), "white")
    ImageDraw.Draw(circle).ellipse((220, 20, 380, 180), fill="black")
    await session.store_image(circle, "start")
    frames = frames_of((await video_of(previews, session, width=208, height=208))[0])
    dark = np.argwhere(frames[0].mean(axis=2) < 128)
    height, width = dark.max(axis=0) - dark.min(axis=0)
    assert abs(int(height) - int(width)) <= 2


async def test_a_cancelled_or_failed_preview_leaves_no_temporary_file(
    previews: LocalDispatcher, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    await session.store_image(CAT, "start")
    request = await session.generation_request("preview", params={"num_frames": 1000})
    job = await previews.submit(request)
    async for event in job.events():
        if isinstance(event, Progress) and not (await job.info()).cancel_requested:
            assert list((tmp_path / "temporary").iterdir()) != []
            await job.cancel()
    assert (await job.info()).status == "cancelled"
    await video_of(previews, session)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_it_takes_the_place_of_a_model_under_its_name() -> None:
    pipeline = PreviewPipeline("i2v-A14B", slots={"start": True}, defaults={"steps": 4, "guidance_scale": 3.5})
    assert pipeline.spec == PipelineSpec(
        name="i2v-A14B",
        slots={"start": True},
        defaults={**PreviewPipeline().spec.defaults, "steps": 4, "guidance_scale": 3.5},
    )
    with pytest.raises(ValueError, match="mask"):
        PreviewPipeline(slots={"mask": True})

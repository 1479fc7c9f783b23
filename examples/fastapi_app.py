"""A FastAPI app in which every browser has images and jobs of its own that survive a restart. No Gradio.

uvicorn examples.fastapi_app:app --timeout-graceful-shutdown 2

Without that timeout a server that is told to stop waits for everybody who follows a job.
"""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, JsonValue
from starlette.requests import ClientDisconnect

from async_sessions import ImageRecord, JobInfo, Session, errors, open_store
from async_sessions.asgi import SessionCookie, SessionImages, SessionOutputs, stored_signer
from async_sessions.dispatch import Job, LocalDispatcher
from async_sessions.jobs import JobEvent, event_order, terminal_event
from async_sessions.pipelines.preview import PreviewPipeline

STATUS: Mapping[int, tuple[type[Exception], ...]] = {
    400: (ClientDisconnect,),
    404: (errors.SessionNotFoundError, errors.SlotEmptyError, errors.JobNotFoundError),
    422: (errors.ImageRejectedError, errors.InvalidKeyError, errors.InvalidRequestError, errors.UnknownPipelineError),
    429: (errors.QueueFullError,),
    503: (errors.StoreClosedError,),
    507: (errors.QuotaExceededError, errors.StorageFullError),
}
FILE = {"requestBody": {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}

store = open_store("~/fastapi-sessions")
dispatcher = LocalDispatcher(store, [PreviewPipeline()])
signer = partial(stored_signer, store.blobs)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with store, dispatcher:
        yield


app = FastAPI(docs_url="/", lifespan=lifespan)
app.add_middleware(SessionCookie, signer=signer)


class ImageOut(BaseModel):
    width: int
    height: int
    media_type: str
    byte_size: int
    source_name: str | None


class OutputOut(BaseModel):
    media_type: str
    byte_size: int


class JobOut(BaseModel):
    id: str
    pipeline: str
    params: dict[str, Any]
    status: str
    submitted_at: datetime
    outputs: dict[str, OutputOut]  # to be had at /jobs/{id}/outputs/{name}


class JobIn(BaseModel):
    pipeline: str = "preview"
    params: dict[str, JsonValue] = {}
    slots: list[str] = ["start", "end"]


@app.exception_handler(ClientDisconnect)
@app.exception_handler(errors.AsyncSessionsError)
async def refused(request: Request, error: Exception) -> Response:
    """What the library refuses, with its sentence, which says what to do. What is not in the table is a 500."""
    status = next((status for status, kinds in STATUS.items() if isinstance(error, kinds)), None)
    if status is None:
        raise error
    reason, after = getattr(error, "reason", type(error).__name__), getattr(error, "retry_after", None)
    headers = None if after is None else {"Retry-After": str(math.ceil(after))}
    status = 413 if reason == "too_many_bytes" else status
    return JSONResponse({"detail": str(error), "reason": reason}, status, headers)


async def current_session(request: Request) -> Session:
    """That of the browser's cookie. A handle: nothing is read or written here."""
    session_id = (await signer()).session_id(request.cookies)
    if session_id is None:
        raise errors.SessionNotFoundError("The request has no cookie of this app; open / first, and allow cookies.")
    return store.session(session_id)


CurrentSession = Annotated[Session, Depends(current_session)]


async def current_job(job_id: str, session: CurrentSession) -> Job:
    return await dispatcher.job(session, job_id)


CurrentJob = Annotated[Job, Depends(current_job)]


async def news(job: CurrentJob, last_event_id: Annotated[str | None, Header()] = None) -> AsyncIterator[JobEvent]:
    """An EventSource that has had the end asks again nevertheless; 204 tells it not to."""
    seen, end = event_order(last_event_id), terminal_event(await job.info())
    if end is not None and event_order(end.id) <= seen:
        raise HTTPException(204)
    return job.events(after=last_event_id)


@app.get("/images", response_model=dict[str, ImageOut])
async def list_images(session: CurrentSession) -> Mapping[str, ImageRecord]:
    with suppress(errors.SessionNotFoundError):  # it begins with its first image
        return (await session.info()).images
    return {}


@app.post("/images/{slot}", response_model=ImageOut, status_code=201, openapi_extra=FILE)
async def upload(slot: str, session: CurrentSession, request: Request, name: str | None = None) -> ImageRecord:
    return await session.store_image(request.stream(), slot, name=name)


@app.delete("/images/{slot}", status_code=204)
async def clear(slot: str, session: CurrentSession) -> None:
    await session.clear_image(slot)


@app.get("/jobs", response_model=list[JobOut])
async def list_jobs(session: CurrentSession) -> list[JobInfo]:
    with suppress(errors.SessionNotFoundError):
        return await dispatcher.jobs(session)
    return []


@app.post("/jobs", response_model=JobOut, status_code=202)
async def generate(wanted: JobIn, session: CurrentSession) -> JobInfo:
    request = await session.generation_request(wanted.pipeline, slots=wanted.slots, params=wanted.params)
    return await (await dispatcher.submit(request)).info()


@app.delete("/jobs/{job_id}", response_model=JobOut)
async def cancel(job: CurrentJob) -> JobInfo:
    return await job.cancel()


@app.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def follow(events: Annotated[AsyncIterator[JobEvent], Depends(news)]) -> AsyncIterator[ServerSentEvent]:
    async for event in events:
        data = msgspec.json.encode(event).decode()
        yield ServerSentEvent(id=event.id, event=type(event).__name__.lower(), raw_data=data)


app.mount("/images", SessionImages(store, signer=signer))  # GET /images/{slot} and /images/{slot}/thumbnail
app.mount("/jobs", SessionOutputs(store, signer=signer))  # GET /jobs/{id}/outputs/{name}

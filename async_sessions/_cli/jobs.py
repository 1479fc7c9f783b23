"""`jobs ls`, `show`, `cancel` and `retry`: for whoever runs the server. No job is run, or taken over, here."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import anyio
import msgspec
import typer
from rich.filesize import decimal

from async_sessions import _keys
from async_sessions._cli.options import DEFAULT_ROOT, LOOKING, AsJson, Root, on_store
from async_sessions._cli.terminal import PROBLEMS, Output, age, at, plain
from async_sessions.dispatch._job import LocalJob
from async_sessions.dispatch._lease import lives
from async_sessions.errors import StorageError
from async_sessions.jobs import Failed, Started, Succeeded, accept_job, cancel_job, repeated
from async_sessions.records import JobInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from async_sessions.jobs import JobEvent
    from async_sessions.store import SessionStore

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `jobs ls` prints it.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over; exit code 1 if it failed.")]

app = typer.Typer(name="jobs", help="Look after the jobs of a store, beside the app that runs them.")


@app.callback(no_args_is_help=True)
def _root() -> None:
    """Look after the jobs of a store, beside the app that runs them."""


class Row(msgspec.Struct, frozen=True):
    """One job in a list. `owner_lives` says whether somebody looks after it; of a job that is over nobody needs to."""

    id: str
    pipeline: str
    status: str
    attempt: int
    submitted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    owner: str
    owner_lives: bool | None
    error: str | None


@app.command("ls")
def ls(
    root: Root = DEFAULT_ROOT,
    everything: Annotated[bool, typer.Option("--all", help="Also jobs that are over.")] = False,
    session: Annotated[str | None, typer.Option(metavar="KEY", help="Only those of one session.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs that are not over, the oldest first. A session that can't be read is exit code 1.

    An owner whose lease lapsed a short while ago is watched for some seconds: its clock may be behind.
    """

    async def rows(store: SessionStore) -> tuple[datetime, list[Row]]:
        if session is None:
            infos = [info async for info in store.sessions()]
        else:
            infos = [await (await store.open_by_key(session)).info()]
        found = [job for info in infos for job in info.jobs.values() if everything or job.unfinished]
        living = await living_of({job.owner for job in found if job.unfinished}, store)
        return store.clock(), [row_of(job, living) for job in sorted(found, key=lambda job: job.submitted_at)]

    (now, found), heard = on_store(root, rows, ttl=LOOKING)
    if as_json:
        Output().json(found)
    else:
        headings = ("job", "pipeline", "status", "attempt", "submitted", "ran", "owner")
        Output().table(headings, [cells(row, now) for row in found])
    Output(stderr=True).pairs(("left out", plain(line)) for line in heard)
    if heard:
        raise typer.Exit(PROBLEMS)


async def living_of(owners: Iterable[str], store: SessionStore) -> dict[str, bool]:
    """Which of them live; looked at together, since a look at one may take seconds."""
    living: dict[str, bool] = {}
    failures: list[StorageError] = []  # which a group would wrap in another

    async def look(owner: str) -> None:
        try:
            living[owner] = await lives(owner, store)
        except StorageError as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        for owner in owners:
            group.start_soon(look, owner)
    for failure in failures:
        raise failure
    return living


def row_of(job: JobInfo, living: dict[str, bool]) -> Row:
    return Row(
        job.id,
        job.pipeline,
        "cancelling" if job.unfinished and job.cancel_requested else job.status,
        job.attempt,
        job.submitted_at,
        job.started_at,
        job.finished_at,
        job.owner,
        living[job.owner] if job.unfinished else None,
        None if job.error is None else f"{job.error.kind}: {job.error.message}",
    )


def cells(row: Row, now: datetime) -> tuple[str, ...]:
    ran = "-" if row.started_at is None else age((row.finished_at or now) - row.started_at)
    owner = {None: "-", True: "alive", False: "gone"}[row.owner_lives]
    submitted = f"{age(now - row.submitted_at)} ago"
    return row.id, plain(row.pipeline), row.status, str(row.attempt), submitted, ran, owner


@app.command("show")
def show(job_id: JobId, root: Root = DEFAULT_ROOT, follow: Follow = False, as_json: AsJson = False) -> None:
    """Show one job; with --follow, what happens to it as well."""

    async def look(store: SessionStore) -> JobInfo:
        job = await opened(store, job_id)
        entry = await job.info()
        living = await lives(entry.owner, store) if entry.unfinished else None
        if as_json:
            Output().json([{**msgspec.to_builtins(entry), "owner_lives": living}])
        else:
            Output().pairs(described(entry, living, store.clock()))
        return await followed(job, as_json=as_json) if follow else entry

    entry, _ = on_store(root, look, ttl=LOOKING)
    if follow and entry.status != "succeeded":
        raise typer.Exit(PROBLEMS)


@app.command("cancel")
def cancel(job_id: JobId, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Cancel one job: at once if it waits, else at its next report. One that is over is left alone."""

    async def ask(store: SessionStore) -> JobInfo:
        return await (await opened(store, job_id)).cancel()

    entry, _ = on_store(root, ask, ttl=LOOKING)
    if as_json:
        Output().json([entry])
    elif entry.unfinished:
        Output().pairs([("job", entry.id), ("status", f"{entry.status}; it stops at its pipeline's next report")])
    else:
        Output().pairs([("job", entry.id), ("status", entry.status)])


@app.command("retry")
def retry(job_id: JobId, root: Root = DEFAULT_ROOT, follow: Follow = False, as_json: AsJson = False) -> None:
    """Submit a job that is over once more, with the same images and parameters, for a running app to take over."""

    async def submit(store: SessionStore) -> JobInfo:
        request = repeated(await (await opened(store, job_id)).info())
        entry = JobInfo(
            id=_keys.job_id(request.session_key, _keys.job_hex(None)),
            pipeline=request.pipeline,
            inputs=request.inputs,
            params=request.params,
            priority=request.priority,
            submitted_at=store.clock(),
            owner=secrets.token_hex(8),  # nobody's, so that a dispatcher takes it at its next look
        )
        await accept_job(entry, await store.open_by_key(request.session_key), blobs=store.blobs)
        if as_json:
            Output().json([entry])
        else:
            Output().pairs([("job", entry.id), ("status", await prospect(store))])
        return await followed(await opened(store, entry.id), as_json=as_json) if follow else entry

    entry, _ = on_store(root, submit, ttl=LOOKING)
    if follow and entry.status != "succeeded":
        raise typer.Exit(PROBLEMS)


async def prospect(store: SessionStore) -> str:
    owners = [_keys.owner_of_lease(blob.key) async for blob in store.blobs.list(_keys.OWNERS)]
    if any((await living_of(owners, store)).values()):
        return "queued; a running app that has the pipeline takes it over within seconds"
    return "queued; no app runs on this store, and it waits for the next one"


async def opened(store: SessionStore, job_id: str) -> LocalJob:
    """A job that other processes run: followed by its entry alone. `JobNotFoundError`."""

    async def ask(job_id: str) -> JobInfo:
        return await cancel_job(job_id, store=store, emit=lambda event: None)

    session = await store.open_by_key(_keys.split_job_id(job_id)[0])
    job = LocalJob(session, job_id, log=lambda job_id: None, cancel=ask)
    await job.info()
    return job


async def followed(job: LocalJob, *, as_json: bool) -> JobInfo:
    """Print what happens until the job is over; returns its entry as it is then."""
    async for event in job.events():
        if as_json:
            Output().json([event])
        else:
            Output().pairs([(f"{event.at:%H:%M:%S}", plain(told(event)))])
    return await job.info()


def told(event: JobEvent) -> str:
    match event:
        case Started(attempt=attempt):
            return f"running, attempt {attempt}"
        case Succeeded(outputs=outputs):
            return f"succeeded: {', '.join(outputs) or 'nothing made'}"
        case Failed(error=error):
            return f"failed: {error.kind}: {error.message}"
        case _:
            return type(event).__name__.lower()


def described(entry: JobInfo, living: bool | None, now: datetime) -> Iterable[tuple[str, str]]:
    """A job in words; what a user wrote is made plain."""
    owner = {None: "", True: ", alive", False: ", gone: the next dispatcher that looks takes the job over"}[living]
    asked = ", to be cancelled" if entry.unfinished and entry.cancel_requested else ""
    waits = f", waits for a retry ({entry.retry})" if entry.retry else ""
    yield "job", entry.id
    yield "pipeline", plain(entry.pipeline)
    yield "status", f"{entry.status}{asked}{waits}"
    yield (
        "attempt",
        f"{entry.attempt}" + (f", {entry.excused} of them stopped with the server" if entry.excused else ""),
    )
    yield "owner", f"{plain(entry.owner)}{owner}"
    yield "submitted", at(entry.submitted_at, now)
    yield "started", at(entry.started_at, now)
    yield "finished", at(entry.finished_at, now)
    if entry.error is not None:
        yield "error", plain(f"{entry.error.kind}: {entry.error.message}")
    for role, record in entry.inputs.items():
        yield f"image {role}", f"{record.width} x {record.height} {record.media_type}, {decimal(record.byte_size)}"
    for output in entry.outputs.values():
        yield f"result {plain(output.name)}", f"{plain(output.media_type)}, {decimal(output.byte_size)}"
    yield "parameters", plain(msgspec.json.encode(entry.params).decode())

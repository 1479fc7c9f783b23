"""`async-sessions jobs`: what whoever runs the server can see of jobs, and do about them, from another process."""

from __future__ import annotations

import json
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from PIL import Image

from async_sessions import JobFailedError, JobInfo, Session, SessionStore
from async_sessions.jobs import Started
from tests.clock import WallClock
from tests.faults import files_below, keys_of
from tests.steps import StepPipeline, local
from tests.test_cli_commands import HOSTILE, command_line, contents, on, run

if TYPE_CHECKING:
    from async_sessions.dispatch import LocalDispatcher

UNKNOWN = f"{'0' * 32}.{'0' * 16}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def steps() -> StepPipeline:
    return StepPipeline(start=False)


async def submitted(dispatcher: LocalDispatcher, session: Session, **params: Any) -> Any:
    return await dispatcher.submit(await session.generation_request("steps", params=params))


async def fill(store: SessionStore) -> tuple[str, str, str, str]:
    """The session's id and key, and two jobs: one that has failed, and one whose dispatcher is gone."""
    session = await store.create_session()
    await session.store_image(Image.new("RGB", (40, 30), "red"), "start")
    async with local(store, [steps()]) as dispatcher:
        failed = await submitted(dispatcher, session, fail=HOSTILE)
        async for _ in failed.events():
            pass
        dispatcher.pause()
        waiting = await submitted(dispatcher, session, label=HOSTILE)
    assert session.id is not None
    return session.id, session.key, failed.id, waiting.id


async def drive(store: SessionStore, until: int) -> list[str]:
    """Run what is there until so many jobs are over; their statuses, oldest first."""
    async with local(store, [steps()]) as dispatcher:
        (key,) = [info.key async for info in store.sessions()]
        session = await store.open_by_key(key)
        entries = await dispatcher.jobs(session)
        for entry in entries:
            async for _ in (await dispatcher.job(session, entry.id)).events():
                pass
        entries = await dispatcher.jobs(session)
    assert len(entries) == until
    return [entry.status for entry in entries]


def entry_of(root: Path, job_id: str) -> JobInfo:
    async def look(store: SessionStore) -> JobInfo:
        return (await (await store.open_by_key(job_id.partition(".")[0])).info()).jobs[job_id]

    entry = on(root, look)
    assert isinstance(entry, JobInfo)
    return entry


def test_ls_lists_what_is_not_over_and_with_all_what_is(root: Path) -> None:
    _, key, failed, waiting = on(root, fill)
    heading, line = run("jobs", "ls", "--root", root).stdout.splitlines()
    assert heading.split() == ["job", "pipeline", "status", "attempt", "submitted", "ran", "owner"]
    assert (line.split()[:4], line.split()[-1]) == ([waiting, "steps", "queued", "0"], "gone")
    rows = [json.loads(each) for each in run("jobs", "ls", "--all", "--json", "--root", root).stdout.splitlines()]
    assert [(row["id"], row["status"], row["owner_lives"]) for row in rows] == [
        (failed, "failed", None),
        (waiting, "queued", False),
    ]
    assert len(run("jobs", "ls", "--all", "--session", key, "--root", root).stdout.splitlines()) == 3
    assert run("jobs", "ls", "--session", "f" * 32, "--root", root).exit_code == 2


def test_a_job_whose_dispatcher_lives_says_so(root: Path) -> None:
    async def look(store: SessionStore) -> str:
        session = await store.create_session()
        async with local(store, [steps()], start_paused=True) as dispatcher:
            job = await submitted(dispatcher, session)
            done = await run_in_another_process("jobs", "ls", "--root", root)
            assert job.id in done
            shown = await run_in_another_process("jobs", "show", job.id, "--root", root)
            assert "alive" in shown
        return done

    assert on(root, look).split()[-1] == "alive"


def test_a_clock_that_is_ahead_of_the_apps_takes_no_living_run_for_lost(root: Path) -> None:
    """As on another machine; what has not been renewed for long is gone at once."""
    clock = WallClock()
    clock.ahead = -timedelta(minutes=5)

    async def look(store: SessionStore) -> tuple[str, str]:
        session = await store.create_session()
        async with local(store, [steps()], start_paused=True, lease=timedelta(seconds=0.6)) as dispatcher:
            job = await submitted(dispatcher, session)
            listed = await run_in_another_process("jobs", "ls", "--root", root)
            return listed, await run_in_another_process("jobs", "show", job.id, "--root", root)

    listed, shown = on(root, look, clock=clock)
    assert listed.split()[-1] == "alive"
    assert "alive" in shown


def test_a_dispatcher_that_was_killed_is_gone_once_its_lease_lapsed(root: Path) -> None:
    async def left(store: SessionStore) -> str:
        session = await store.create_session()
        async with local(store, [steps()], start_paused=True, lease=timedelta(seconds=0.01)) as dispatcher:
            job = await submitted(dispatcher, session)
            (key,) = await keys_of(store.blobs, "owners/")
            lease = await store.blobs.get(key)
        assert lease is not None
        await store.blobs.put(key, lease.data)  # as it is after a `kill -9`
        return job.id  # type: ignore[no-any-return]

    job_id = on(root, left)
    assert "gone" in run("jobs", "show", job_id, "--root", root).stdout
    assert run("jobs", "ls", "--root", root).stdout.split()[-1] == "gone"


async def run_in_another_process(*arguments: str | Path) -> str:
    return (await anyio.run_process(command_line(*arguments))).stdout.decode()


def test_show_tells_what_a_job_is_and_why_it_failed(root: Path) -> None:
    _, _, failed, waiting = on(root, fill)
    shown = run("jobs", "show", failed, "--root", root).stdout
    for each in (failed, "steps", "failed", "RuntimeError", "[bold]red", "40 x 30 image/png", '"steps":3'):
        assert each in shown
    assert "gone" in run("jobs", "show", waiting, "--root", root).stdout
    info = json.loads(run("jobs", "show", waiting, "--json", "--root", root).stdout)
    assert (info["id"], info["params"]["label"], info["owner_lives"]) == (waiting, HOSTILE, False)


def test_show_follows_a_job_that_another_process_runs_to_its_end(root: Path) -> None:
    _, _, failed, waiting = on(root, fill)
    with subprocess.Popen(
        command_line("jobs", "show", waiting, "--follow", "--json", "--root", root), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["status"] == "queued"
        on(root, lambda store: drive(store, 2))
        *_, last = [json.loads(line) for line in process.stdout]
    assert (last["event"], list(last["outputs"]), process.returncode) == ("succeeded", ["text", "start"], 0)
    done = run("jobs", "show", failed, "--follow", "--root", root)
    assert (done.exit_code, "failed: RuntimeError" in done.stdout) == (1, True)


def test_cancel_ends_a_job_that_waits_and_leaves_one_that_is_over(root: Path) -> None:
    _, _, failed, waiting = on(root, fill)
    done = run("jobs", "cancel", waiting, "--root", root)
    assert (done.exit_code, "cancelled" in done.stdout, entry_of(root, waiting).status) == (0, True, "cancelled")
    assert files_below(root, "queue") == []
    assert json.loads(run("jobs", "cancel", failed, "--json", "--root", root).stdout)["status"] == "failed"


def test_cancel_stops_a_job_that_an_app_runs(root: Path) -> None:
    async def look(store: SessionStore) -> tuple[str, str]:
        session = await store.create_session()
        async with local(store, [steps()]) as dispatcher:
            job = await submitted(dispatcher, session, endless=True)
            async for event in job.events():
                if isinstance(event, Started):
                    while (await job.info()).status != "running":
                        pass
                    told = await run_in_another_process("jobs", "cancel", job.id, "--root", root)
            return told, (await job.info()).status

    told, status = on(root, look)
    assert "next report" in told
    assert status == "cancelled"


def test_a_retried_job_is_a_new_one_that_the_next_dispatcher_runs(root: Path) -> None:
    _, _, failed, _ = on(root, fill)
    done = run("jobs", "retry", failed, "--root", root)
    assert done.exit_code == 0
    assert "no app runs on this store" in done.stdout
    new = entry_of(root, done.stdout.split()[1])
    old = entry_of(root, failed)
    assert (new.inputs, new.params, new.status, new.attempt, new.error) == (old.inputs, old.params, "queued", 0, None)
    assert on(root, lambda store: drive(store, 3)) == ["failed", "succeeded", "failed"]


def test_a_retried_job_is_run_by_a_dispatcher_that_lives(root: Path) -> None:
    _, key, failed, _ = on(root, fill)

    async def look(store: SessionStore) -> str:
        session = await store.open_by_key(key)
        async with local(store, [StepPipeline("other"), steps()], lease=timedelta(seconds=0.6)) as dispatcher:
            told = await run_in_another_process("jobs", "retry", failed, "--root", root)
            with pytest.raises(JobFailedError):
                await (await dispatcher.job(session, told.split()[1])).result()
        return told

    assert "takes it over within seconds" in on(root, look)


def test_a_job_that_is_not_over_is_not_retried(root: Path) -> None:
    _, _, _, waiting = on(root, fill)
    before = contents(root)
    done = run("jobs", "retry", waiting, "--root", root)
    assert (done.exit_code, len(done.stderr.splitlines()), "not over yet" in done.stderr) == (2, 1, True)
    assert contents(root) == before


@pytest.mark.parametrize("command", ["show", "cancel", "retry"])
@pytest.mark.parametrize("job", ["", "x", "../../etc/passwd", UNKNOWN, "\x1b[2J"])
def test_a_job_that_is_not_there_is_one_sentence(root: Path, command: str, job: str) -> None:
    on(root, fill)
    done = run("jobs", command, job, "--root", root)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_a_job_of_another_session_is_not_there(root: Path) -> None:
    _, _, failed, _ = on(root, fill)
    other = on(root, lambda store: store.create_session())
    done = run("jobs", "show", f"{other.key}.{failed.partition('.')[2]}", "--root", root)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)


def test_looking_at_jobs_changes_nothing_and_prints_no_session_id(root: Path) -> None:
    session_id, _, failed, waiting = on(root, fill)
    before = contents(root)
    for command in (("ls",), ("ls", "--all"), ("show", failed), ("show", waiting)):
        for form in ((), ("--json",)):
            done = run("jobs", *command, "--root", root, *form)
            assert done.exit_code == 0
            assert session_id not in done.output
            assert all(character.isprintable() or character == "\n" for character in done.stdout)
    assert contents(root) == before


def test_a_session_that_can_not_be_read_is_exit_code_1(root: Path) -> None:
    _, key, _, _ = on(root, fill)
    (root / "manifests" / key[:2] / f"{key}.json").write_bytes(b"{")
    done = run("jobs", "ls", "--root", root)
    assert (done.exit_code, key in done.stderr) == (1, True)


@pytest.mark.parametrize("command", [("ls",), ("show", UNKNOWN), ("cancel", UNKNOWN), ("retry", UNKNOWN)])
def test_a_root_that_holds_no_store_stays_as_it_is(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run("jobs", *command, "--root", tmp_path / "missing")
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert not (tmp_path / "missing").exists()

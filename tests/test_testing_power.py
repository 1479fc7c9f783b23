from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from async_sessions.testing.power import Acknowledge, power_cuts

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

NAMES = ("a", "b")


def in_thread(call: Callable[..., object]) -> Callable[..., Awaitable[object]]:
    return lambda *arguments: anyio.to_thread.run_sync(call, *arguments)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put(root: Path, name: str, data: bytes, file: bool, directory: bool) -> None:
    temporary = root / f".{name}"
    temporary.write_bytes(data)
    if file:
        sync(temporary)
    temporary.rename(root / name)
    if directory:
        sync(root)


async def outcomes(*, file: bool, directory: bool) -> set[str]:
    """What a store that syncs this much does in a power cut: blobs first, then the list that names them."""

    async def operation(root: Path, acknowledge: Acknowledge) -> None:
        named = {}
        for name in NAMES:
            data = name.encode() * 100
            await anyio.to_thread.run_sync(put, root, name, data, file, directory)
            named[name] = hashlib.sha256(data).hexdigest()
            listed = json.dumps(named).encode()
            await anyio.to_thread.run_sync(put, root, "list.json", listed, file, directory)
            await acknowledge(name)

    def look(root: Path, acknowledged: Sequence[str]) -> None:
        try:
            named = json.loads((root / "list.json").read_bytes())
        except FileNotFoundError:
            named = {}
        except ValueError:
            found.add("unreadable")
            return
        if not named.keys() >= set(acknowledged):
            found.add("lost")
        for name, digest in named.items():
            if not (root / name).exists():
                found.add("dangling")
            elif hashlib.sha256((root / name).read_bytes()).hexdigest() != digest:
                found.add("torn")

    found: set[str] = set()
    await power_cuts(operation, in_thread(look))
    return found


async def test_a_store_that_syncs_files_and_directories_survives() -> None:
    assert await outcomes(file=True, directory=True) == set()


async def test_a_store_that_syncs_no_files_is_found_unreadable_and_torn() -> None:
    assert await outcomes(file=False, directory=True) == {"unreadable", "torn"}


async def test_a_store_that_syncs_no_directory_loses_and_dangles() -> None:
    assert await outcomes(file=True, directory=False) == {"lost", "dangling"}


async def states(
    operation: Callable[[Path], object], prepare: Callable[[Path], object] = lambda root: None, limit: int = 256
) -> list[dict[str, bytes | None]]:
    """The last states, those after the whole operation, by path."""

    async def run(root: Path, acknowledge: Acknowledge) -> None:
        await anyio.to_thread.run_sync(operation, root)
        await acknowledge("done")

    def look(root: Path, acknowledged: Sequence[str]) -> None:
        if acknowledged:
            paths = sorted(root.rglob("*"))
            seen.append({str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths})

    seen: list[dict[str, bytes | None]] = []
    await power_cuts(run, in_thread(look), prepare=in_thread(prepare), limit=limit)
    return seen


def by_name(state: dict[str, bytes | None]) -> str:
    return " ".join(state)


async def test_what_was_written_and_not_synced_is_whole_old_torn_or_gone() -> None:
    found = await states(
        lambda root: (root / "a").write_bytes(b"newer") and None, lambda root: (root / "a").write_bytes(b"old")
    )
    assert {state["a"] for state in found} == {b"newer", b"old", b"ne", bytes(5), b""}


async def test_syncing_a_file_saves_its_data_and_not_its_name() -> None:
    def operation(root: Path) -> None:
        (root / "a").write_bytes(b"a")
        sync(root / "a")

    assert sorted(map(by_name, await states(operation))) == ["", "a"]


async def test_a_rename_into_another_directory_ends_with_either_name_both_or_none() -> None:
    def prepare(root: Path) -> None:
        (root / "x").mkdir()
        (root / "y").mkdir()
        (root / "x" / "a").write_bytes(b"a")

    found = await states(lambda root: os.rename(root / "x" / "a", root / "y" / "b"), prepare)
    assert sorted(map(by_name, found)) == ["x x/a y", "x x/a y y/b", "x y", "x y y/b"]


async def test_a_file_in_a_directory_that_is_not_durable_is_gone_with_it() -> None:
    def operation(root: Path) -> None:
        (root / "x").mkdir()
        (root / "x" / "a").write_bytes(b"a")
        sync(root / "x" / "a")
        sync(root / "x")

    assert sorted(map(by_name, await states(operation))) == ["", "x x/a"]


async def test_names_that_are_not_synced_survive_in_any_order() -> None:
    def operation(root: Path) -> None:
        for name in "abc":
            (root / name).mkdir()
        (root / "a").rmdir()

    found = await states(operation)
    assert len(found) == 8  # also with `a`, which was there for a while
    assert {len(state) for state in found} == {0, 1, 2, 3}


async def test_an_inode_that_is_used_again_is_another_file() -> None:
    def operation(root: Path) -> None:
        for number in range(5):
            (root / "a").write_bytes(b"%d" % number)
            sync(root / "a")
            sync(root)
            (root / "a").unlink()
            sync(root)
        (root / "b").write_bytes(b"b")

    assert {state.get("b") for state in await states(operation)} == {None, b"", b"b", b"\0"}


async def test_too_many_states_are_sampled_up_to_the_limit() -> None:
    def operation(root: Path) -> None:
        for name in "abcdefgh":
            (root / name).mkdir()

    found = list(map(by_name, await states(operation, limit=40)))
    assert 30 < len(found) <= 40
    assert {*"abcdefgh"} < {*found}  # single survivors
    assert {"", "a b", "a b c d e f", "a b c d e f g h"} < {*found}  # in the order of events
    assert "b c d e f g h" in found  # single losses


async def test_an_error_comes_out_with_the_state_that_it_is_about() -> None:
    async def operation(root: Path, acknowledge: Acknowledge) -> None:
        await anyio.Path(root / "a").write_bytes(b"four")
        await acknowledge("a")

    async def check(root: Path, acknowledged: Sequence[str]) -> None:
        found = await anyio.Path(root / "a").read_bytes() if await anyio.Path(root / "a").exists() else b"four"
        assert not acknowledged or found == b"four"

    with pytest.raises(AssertionError) as caught:
        await power_cuts(operation, check)
    assert caught.value.__notes__ == [
        "with the power cut after acknowledging 'a' and this left on the disk:\n  a: 0 bytes"
    ]


async def test_the_functions_of_os_are_put_back() -> None:
    before = os.fsync, os.replace
    assert await states(lambda root: None) == [{}]
    assert (os.fsync, os.replace) == before

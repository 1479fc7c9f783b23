from __future__ import annotations

import secrets
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from async_sessions import BlobStore, LocalBlobStore, MemoryBlobStore
from async_sessions.blobs import BlobData, Expect, Expectation
from async_sessions.testing.machine import BlobStoreMachine
from examples.sqlite_store import SQLiteBlobStore


class MemoryMachine(BlobStoreMachine):
    """Memory outlives nothing: what is reopened is the object itself."""

    make: type[MemoryBlobStore] = MemoryBlobStore

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.make()

    def reopen(self) -> BlobStore:
        return self.memory


class DiskMachine(BlobStoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.root = Path(self.folder.name) / "root"

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


class LocalMachine(DiskMachine):
    def reopen(self) -> LocalBlobStore:
        return LocalBlobStore(self.root)

    def crash(self) -> None:
        (self.root / "tmp" / secrets.token_hex(16)).write_bytes(b"half a write")


class SQLiteMachine(DiskMachine):
    def reopen(self) -> SQLiteBlobStore:
        return SQLiteBlobStore(self.root.with_suffix(".db"))


TestMemory = MemoryMachine.TestCase
TestLocal = LocalMachine.TestCase
TestTheExample = SQLiteMachine.TestCase

TestMemory.settings = settings(TestMemory.settings, max_examples=30)
TestLocal.settings = settings(TestLocal.settings, max_examples=10)
TestTheExample.settings = settings(TestTheExample.settings, max_examples=10)


class Forgetful(MemoryBlobStore):
    """Counts the versions of a key from one again after a delete."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        if key not in self._blobs:
            self._versions = count(1)
        return await super().put(key, data, expect=expect)


class InPlace(MemoryBlobStore):
    """Shows a write before it has ended."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        if isinstance(data, bytes):
            return await super().put(key, data, expect=expect)
        self._check(key, expect)
        chunks = b""
        async for chunk in data:  # type: ignore[union-attr]
            chunks += chunk
            version = await super().put(key, chunks)
        return version


class ForgetfulMachine(MemoryMachine):
    make = Forgetful


class InPlaceMachine(MemoryMachine):
    make = InPlace


class LosingMachine(MemoryMachine):
    """A restart loses everything."""

    def reopen(self) -> BlobStore:
        return MemoryBlobStore()


@pytest.mark.parametrize("machine", [ForgetfulMachine, InPlaceMachine, LosingMachine])
def test_a_broken_store_is_found_out(machine: type[BlobStoreMachine]) -> None:
    found = settings(database=None, derandomize=True, deadline=None, phases=[Phase.generate])
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(machine, settings=found)

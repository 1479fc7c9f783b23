"""`BlobStoreMachine`: hypothesis drives a blob store through operations, restarts and crashes, and a dict beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import checkpoint
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, initialize, multiple, rule

from async_sessions.blobs.base import Blob, BlobStore, Expect, Expectation
from async_sessions.errors import VersionConflictError

T = TypeVar("T")
Written: TypeAlias = tuple[str, str]  # a key, and a version that it has had

KEYS = st.sampled_from(("a", "b/c", "b/d", "e/f/g"))
PREFIXES = st.sampled_from(("", "b/", "e/", "e/f/", "x/"))
DATA = st.binary(min_size=1, max_size=40)
OFFSETS = st.integers(0, 50)


class BlobStoreMachine(RuleBasedStateMachine):
    """Subclass it, say in `reopen` how a store is opened on your medium, and give its `TestCase` to pytest:

        TestMyBlobStore = MyMachine.TestCase

    Each machine has a medium of its own, to be made in `__init__` and removed in `teardown`, and an event loop, in
    which `run` awaits. What is read is compared with a dict. A failure is shown as the shortest run that leads to it.
    """

    written: Bundle[Written] = Bundle("written")

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._model: dict[str, Blob] = {}
        self._versions: dict[Written, bytes] = {}

    def reopen(self) -> BlobStore:
        """A store on this machine's medium, as a process that has just started opens it."""
        raise NotImplementedError

    def crash(self) -> None:
        """Leave on the medium what a killed process or server would: by default nothing.

        Called when a put was cut off in the middle and the event loop closed; `reopen` follows.
        """

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def teardown(self) -> None:
        self._runner.close()

    @initialize()
    def start(self) -> None:
        self.blobs = self.reopen()

    @rule(target=written, key=KEYS, data=DATA, chunked=st.booleans())
    def put(self, key: str, data: bytes, chunked: bool) -> Written | MultipleResults[Written]:
        return self._put(key, data, Expect.ANY, chunked=chunked)

    @rule(target=written, key=KEYS, data=DATA)
    def put_absent(self, key: str, data: bytes) -> Written | MultipleResults[Written]:
        return self._put(key, data, Expect.ABSENT)

    @rule(target=written, at=written, data=DATA)
    def put_version(self, at: Written, data: bytes) -> Written | MultipleResults[Written]:
        return self._put(at[0], data, at[1])

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self._delete(key, Expect.ANY)

    @rule(at=written)
    def delete_version(self, at: Written) -> None:
        self._delete(*at)

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        assert self.run(self.blobs.get(key)) == self._model.get(key)

    @rule(key=KEYS, start=OFFSETS, end=st.none() | OFFSETS, chunk_size=st.integers(1, 50))
    def stream(self, key: str, start: int, end: int | None, chunk_size: int) -> None:
        async def streamed() -> bytes:
            chunks = self.blobs.stream(key, start=start, end=end, chunk_size=chunk_size)
            return b"".join([chunk async for chunk in chunks])

        try:
            data = self.run(streamed())
        except FileNotFoundError:
            assert key not in self._model
        else:
            assert data == self._model[key].data[start:end]

    @rule(prefix=PREFIXES)
    def list_below(self, prefix: str) -> None:
        listed = self.run(self._listed(prefix))
        assert sorted(listed) == sorted(
            (key, len(blob.data)) for key, blob in self._model.items() if key.startswith(prefix)
        )

    @rule()
    def sweep(self) -> None:
        """Delete what unfinished writes have left, as the janitor does."""
        for key, _ in self.run(self._listed("tmp/")):
            self.run(self.blobs.delete(key))
        assert self.run(self._listed("tmp/")) == []

    @rule()
    def restart(self) -> None:
        self._runner.close()
        self._restart()

    @rule(key=KEYS, data=DATA)
    def crash_in_a_put(self, key: str, data: bytes) -> None:
        async def cut_off() -> None:
            with anyio.CancelScope() as scope:
                await self.blobs.put(key, _chunks(data, scope))

        self.run(cut_off())
        self._runner.close()
        self.crash()
        self._restart()

    def _restart(self) -> None:
        self._runner = asyncio.Runner()
        self.blobs = self.reopen()
        self.list_below("")
        for key in self._model:
            self.get(key)

    def _put(
        self, key: str, data: bytes, expect: Expectation, *, chunked: bool = False
    ) -> Written | MultipleResults[Written]:
        try:
            version = self.run(self.blobs.put(key, _chunks(data) if chunked else data, expect=expect))
        except VersionConflictError:
            assert not self._holds(key, expect)
            return multiple()
        assert self._holds(key, expect)
        assert self._versions.setdefault((key, version), data) == data, "two contents have had the same version"
        self._model[key] = Blob(data, version)
        return key, version

    def _delete(self, key: str, expect: Expectation) -> None:
        try:
            self.run(self.blobs.delete(key, expect=expect))
        except VersionConflictError:
            assert key in self._model
            assert not self._holds(key, expect)
        else:
            assert key not in self._model or self._holds(key, expect)
            self._model.pop(key, None)

    def _holds(self, key: str, expect: Expectation) -> bool:
        found = self._model.get(key)
        return expect in (Expect.ANY, Expect.ABSENT if found is None else found.version)

    async def _listed(self, prefix: str) -> list[tuple[str, int]]:
        return [(info.key, info.size) async for info in self.blobs.list(prefix)]


async def _chunks(data: bytes, cancel: anyio.CancelScope | None = None) -> AsyncIterator[bytes]:
    yield data[: len(data) // 2 + 1]
    if cancel is not None:
        cancel.cancel()
        await checkpoint()
    yield data[len(data) // 2 + 1 :]

"""`SessionStore`: opens, finds, lists, cleans and deletes sessions. You own it: there is none but the one you enter."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
from anyio import AsyncContextManagerMixin

from async_sessions import _keys, stats
from async_sessions._budget import DEFAULT_PIXELS, PixelBudget
from async_sessions._cache import ImageCache
from async_sessions._context import StoreContext
from async_sessions._draft import Draft, drafted
from async_sessions._manifest import Lifetime
from async_sessions._manifests import Manifests
from async_sessions._merge import Merged, merge
from async_sessions._reading import Reader
from async_sessions._reckoning import Reckoning
from async_sessions._repair import Repair
from async_sessions._tasks import COMMIT_DEADLINE, Commits, utc_now
from async_sessions._verification import Progress, Verification
from async_sessions.blobs import BlobStore, LocalBlobStore, MemoryBlobStore
from async_sessions.errors import (
    InvalidKeyError,
    SessionNotFoundError,
    StorageError,
    StoreClosedError,
    VersionConflictError,
)
from async_sessions.janitor import CleanupReport, Janitor
from async_sessions.records import JSON, MIB, Limits, SessionInfo
from async_sessions.session import Session

if TYPE_CHECKING:
    from async_sessions.stats import StoreStats
    from async_sessions.verify import VerifyReport

_LEAST_PERIOD = timedelta(milliseconds=1)
_LONGEST_PERIOD = timedelta(days=36_500)
_OPTIONAL = ("max_age", "cleanup_interval")  # of the periods
_TOLERANCE = timedelta(minutes=1)  # by which two clocks may differ at least

_logger = logging.getLogger("async_sessions")


class SessionStore(AsyncContextManagerMixin):
    """Sessions over a `BlobStore`. An async context manager; used outside it, it raises `StoreClosedError`.

    A session expires `ttl` (and up to `ttl/24`: uses are recorded that coarsely) after its last use, or `max_age` after
    its creation. What was replaced or cleared can be undone for `grace`, which is two minutes at least: so long a blob
    may be part of a commit under way. A sweep runs at once and then every `cleanup_interval`; `None` turns it off.
    `slots` restricts slot names.

    `cache_bytes` bounds the decoded images that are kept in memory for the next read; 0 keeps none. `decode_pixels`
    bounds those that are decoded, encoded or converted at one time: calls beyond it wait. Both are for the whole store,
    and a pixel takes about 4 bytes; the files that waiting calls have read come on top.

    `clock` tells the time in UTC. It is checked against the event loop's time, or against its own `steady()` (seconds)
    where it has one. Where the two disagree the clock was set; from then on, until all that is unused by then would be
    over anyway, nothing goes that is not over by both.

    Leaving finishes what is being committed; with `delete_on_close` it also deletes the sessions that this object
    created and that no unfinished job needs.
    """

    def __init__(
        self,
        blobs: BlobStore,
        *,
        ttl: timedelta = timedelta(hours=24),
        max_age: timedelta | None = None,
        cleanup_interval: timedelta | None = timedelta(minutes=30),
        grace: timedelta = timedelta(hours=1),
        slots: Collection[str] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        cache_bytes: int = 256 * MIB,
        decode_pixels: int = DEFAULT_PIXELS,
        delete_on_close: bool = False,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        if not all(callable(getattr(blobs, name, None)) for name in ("get", "stream", "put", "delete", "list")):
            raise TypeError("SessionStore takes a BlobStore; for a folder use open_store('folder').")
        if cache_bytes < 0:
            raise ValueError(f"`cache_bytes` is 0, for no cache, or more; not {cache_bytes}.")
        self.blobs = blobs
        self.limits = limits
        self.grace = grace
        if isinstance(slots, str):
            raise TypeError(f"`slots` is a collection of slot names, for example [{slots!r}].")
        for name, period, least in (
            ("ttl", ttl, _LEAST_PERIOD),
            ("max_age", max_age, _LEAST_PERIOD),
            ("cleanup_interval", cleanup_interval, _LEAST_PERIOD),
            ("grace", grace, 2 * timedelta(seconds=COMMIT_DEADLINE)),
        ):
            if period is None and name in _OPTIONAL:
                continue
            if not isinstance(period, timedelta):
                raise TypeError(f"`{name}` is a timedelta, for example timedelta(hours=24); not {period!r}.")
            if not least <= period <= _LONGEST_PERIOD:
                raise ValueError(f"`{name}` is between {least} and {_LONGEST_PERIOD}, not {period}.")
        self._lifetime = Lifetime(ttl=ttl, max_age=max_age, grace=grace)
        self._interval = cleanup_interval
        self._slots = None if slots is None else frozenset(map(_keys.check_slot, slots))
        self._cache_bytes = cache_bytes
        self._decode_pixels = PixelBudget(decode_pixels).pixels
        self._delete_on_close = delete_on_close
        self._clock = clock
        self._entered: tuple[StoreContext, Janitor] | None = None

    def __repr__(self) -> str:
        return f"SessionStore({self.blobs!r}, {'open' if self._entered else 'closed'})"

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[Self]:
        # one read of a key that no session has, so that an unusable backend is refused here
        await self.blobs.get(_keys.manifest("0" * 32))
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            context = self._make_context(Commits(group))
            janitor = Janitor(context, self._interval)
            context.sweep_for_room = janitor.make_room
            self._entered = context, janitor
            sweeps = anyio.CancelScope()

            async def sweep_periodically() -> None:
                with sweeps:
                    await janitor.run()

            group.start_soon(sweep_periodically)
            try:
                yield self
            except Exception as error:  # noqa: BLE001 - the caller's own, which the group would wrap in another
                failure = error
            finally:
                sweeps.cancel()
                self._entered = None
                context.close()
                context.cache.close()
        if self._delete_on_close:
            try:
                with anyio.CancelScope(shield=True):
                    await self._delete_created(context)
            except StorageError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def clock(self) -> datetime:
        """The time that this store goes by, in UTC."""
        return self._clock()

    def steady(self) -> float:
        """Seconds of a clock that nobody can set: the clock's own `steady()`, or else the event loop's."""
        return self._context().reckoning.steady()

    async def create_session(self, /, **state: JSON) -> Session:
        """Mint an id and write the session, with `state`."""
        session = self.session(_keys.new_session_id())
        await session.update_state(**state)
        return session

    def draft(self, state: Mapping[str, JSON] | None = None) -> AbstractAsyncContextManager[Draft]:
        """`async with store.draft() as draft`: a session that nobody sees before it is whole; see `Draft`."""
        return drafted(self._context(), state or {})

    def check_slot(self, slot: str) -> str:
        """`slot`, where it is well formed and one of the store's; else `InvalidKeyError`."""
        return _keys.check_slot(slot, self._slots)

    def session(self, session_id: str) -> Session:
        """A handle for an id that you minted and signed; no I/O. The first write creates the session.

        Never for an id that a client made up: whoever knows an id is the session.
        """
        return Session(self._context(), _keys.key_of_id(session_id), session_id=session_id, incarnation=None)

    async def restore_session(self, session_id: str) -> Session:
        """The session of that id. `SessionNotFoundError` for unknown, expired and deleted alike."""
        return await self._existing(_keys.key_of_id(session_id), session_id)

    async def session_for(self, identity: str) -> Session:
        """The session of an authenticated user, created where there is none. `identity` is your name for that user."""
        key = _keys.key_of_identity(identity)
        try:
            return await self._existing(key, None)
        except SessionNotFoundError:
            session = self.session_of(identity)
            await session.update_state()
            return session

    def session_of(self, identity: str) -> Session:
        """Like `session`, for an authenticated user: no I/O, and the first write creates the session."""
        return Session(self._context(), _keys.key_of_identity(identity), session_id=None, incarnation=None)

    async def merge(self, source: Session, *, into: Session) -> Merged:
        """Take what `source` holds along into another session, at a login, and delete `source`. Can be repeated.

        Images go to slots that are empty, and where the user has another one there, to `SessionInfo.recent`; values to
        names that have none; jobs that are over, with their results. Nothing of `into` goes. What it has no room for
        (see `Limits`), what can't be copied, and jobs that still run, stay in `source`, which lives on with them.
        """
        return await merge(self._context(), source._life, into._life)

    async def open_by_key(self, key: str) -> Session:
        """The session of that storage key, for workers and the command line; never from a client's input."""
        return await self._existing(_keys.check_session_key(key), None)

    async def delete_session(self, session_id: str) -> None:
        """Remove a session with all that it holds; no error where there is none."""
        await self.session(session_id).delete()

    async def sessions(self) -> AsyncIterator[SessionInfo]:
        """Every living session, in no particular order. A damaged one is skipped, and logged."""
        context = self._context()
        async for listed in self.blobs.list(_keys.MANIFESTS):
            key = _keys.session_key_of(listed.key)
            try:
                manifest = await context.manifests.read(key)
            except (StorageError, InvalidKeyError) as error:
                _logger.warning("session %s is left out: %s", key, error)
                continue
            now = context.now()
            if manifest is not None and self._lifetime.alive(manifest, now):
                yield manifest.info(self._lifetime, now)

    async def cleanup(self, *, now: datetime | None = None, dry_run: bool = False) -> CleanupReport:
        """Sweep everything, as of `now`. `dry_run` returns the same report and touches nothing.

        `now` is obeyed. Without one, it is the store's: the clock's, unless that was set since the store was opened.
        What other processes are writing is known by its age only: don't set `now` into the future while they do.
        """
        context, janitor = self._open()
        return await janitor.sweep(now=now or context.now(), full=True, dry_run=dry_run)

    async def verify(self, *, repair: bool = False, progress: Progress | None = None) -> VerifyReport:
        """Read every byte that a session names and look for what none does; see `Finding` for what is found.

        Nothing is written, unless with `repair`: then what is damaged, and what no session names, moves to
        `quarantine/`, where it stays until you delete it. Others may use the store meanwhile. `progress` is called with
        the sessions done and those there are.
        """
        context = self._context()
        return await Verification(context, Repair(context) if repair else None).run(progress)

    async def stats(self) -> StoreStats:
        """How much there is, by reading every manifest; and how the cache of this process does."""
        return await stats.count(self._context())

    def _open(self) -> tuple[StoreContext, Janitor]:
        if self._entered is None:
            raise StoreClosedError("The store is not open; use it inside `async with store`.")
        return self._entered

    def _context(self) -> StoreContext:
        return self._open()[0]

    def _make_context(self, commits: Commits) -> StoreContext:
        cpu = anyio.CapacityLimiter(os.cpu_count() or 1)
        budget = PixelBudget(self._decode_pixels)
        cache = ImageCache(self._cache_bytes)
        tolerance = min(max(self._interval or _TOLERANCE, _TOLERANCE), self._lifetime.grace / 2)
        reckoning = Reckoning(self._clock, tolerance, self._lifetime.longest)
        return StoreContext(
            blobs=self.blobs,
            manifests=Manifests(self.blobs, reckoning.latest, cache.drop),
            reader=Reader(self.blobs, cache, cpu, budget, commits),
            cache=cache,
            commits=commits,
            cpu=cpu,
            budget=budget,
            reckoning=reckoning,
            lifetime=self._lifetime,
            limits=self.limits,
            slots=self._slots,
        )

    async def _existing(self, key: str, session_id: str | None) -> Session:
        context = self._context()
        manifest = self._lifetime.living(await context.manifests.read(key), context.now())
        return Session(context, key, session_id=session_id, incarnation=manifest.incarnation)

    async def _delete_created(self, context: StoreContext) -> None:
        for key in context.created:
            found = await context.manifests.read_version(key)
            if found is not None and not any(found[0].unfinished_jobs()):
                with suppress(VersionConflictError):  # another process uses it
                    await context.manifests.bury(*found)


def open_store(target: str | Path | BlobStore, **options: Any) -> SessionStore:
    """A store on a folder (a path, created 0700 if missing), `"memory://"`, or a `BlobStore`; enter it to use it.

    `options` are those of `SessionStore`.
    """
    if isinstance(target, Path):
        return SessionStore(LocalBlobStore(target), **options)
    if not isinstance(target, str):
        return SessionStore(target, **options)
    if target == "memory://":
        return SessionStore(MemoryBlobStore(), **options)
    if "://" in target:
        raise ValueError(f"{target!r} is neither a folder nor 'memory://'. Pass a BlobStore for anything else.")
    return SessionStore(LocalBlobStore(target), **options)

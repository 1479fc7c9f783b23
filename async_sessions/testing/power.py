"""`power_cuts`: cuts the power at every step of an operation, and checks every state that the disk may then be in.

    async def operation(root, acknowledge):
        await LocalBlobStore(root).put("a", b"new")
        await acknowledge("new")

    async def check(root, acknowledged):
        found = await LocalBlobStore(root).get("a")
        assert (found is not None and found.data == b"new") or not acknowledged

    print(await power_cuts(operation, check))

The disk is one that keeps no promise but that of fsync:

- A file is as it was when it was last synced (empty, if it never was), or as it was seen at any time since, or torn: of
  its latest content the first half is there, or zeros are, or nothing is.
- A name in a directory leads to what it led to when the *directory* was last synced, or to what it led to at any time
  since, whatever becomes of other names and of the order of events. So a rename into another directory may end with
  both names, with either or with none; but a name leads to one file, old or new, and syncing a file saves none of its
  names.

ext4, XFS and btrfs keep more than that: what survives here survives there. What a disk does that lies about fsync, and
that loses what was synced, is not in it.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias
from unittest import mock

import anyio
import anyio.to_thread

# The disk is looked at before and after each of these. What is written in between is seen before the next one.
_CALLS: Final = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "truncate", "ftruncate", "fsync")

_ROOT: Final = 0
_Option: TypeAlias = "tuple[int, Any]"  # since which event, and what: bytes, a node or None
_Question: TypeAlias = "tuple[int, str]"  # a directory and a name in it, or a file and ""
Acknowledge: TypeAlias = Callable[[object], Awaitable[None]]
_Tree: TypeAlias = "dict[str, bytes | None]"  # by path: what a file holds, None for a directory


class PowerCuts(NamedTuple):
    """What was tried: how many moments, how many different states of the disk, and at how many of the moments there
    were more legal states than the limit, so that only some of them were tried.
    """

    cuts: int
    states: int
    sampled: int


async def power_cuts(
    operation: Callable[[Path, Acknowledge], Awaitable[object]],
    check: Callable[[Path, Sequence[Any]], Awaitable[object]],
    *,
    prepare: Callable[[Path], Awaitable[object]] | None = None,
    limit: int = 256,
    seed: int = 0,
) -> PowerCuts:
    """Run `operation(root, acknowledge)` once, then `check(root, acknowledged)` on each state that a cut may leave.

    `operation` works below `root` with Python's file functions, in whichever threads; it awaits `acknowledge(what)`
    for what must survive from then on. `check` gets a folder of its own that holds one state, and what was acknowledged
    before that cut; an error of its comes out with the state in a note. What `prepare(root)` left is durable.

    A moment with more than `limit` legal states is sampled: everything lost, everything kept, every single loss, every
    single survivor, every prefix in the order of events, and others by `seed` up to the limit. All files below `root`
    are read at every step, so keep them small. Linux only; no symbolic links, no other process.
    """
    async with anyio.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        await anyio.Path(root).mkdir(mode=0o700)
        if prepare is not None:
            await prepare(root)
        disk = await anyio.to_thread.run_sync(_Disk, root)
        with disk.watched():
            await operation(root, disk.acknowledge)
        tried: set[object] = set()
        sampled = 0
        for cut in disk.cuts:
            trees, complete = cut.trees(limit, random.Random(seed))
            sampled += not complete
            for tree in trees:
                if (state := (cut.acknowledged, frozenset(tree.items()))) not in tried:
                    tried.add(state)
                    await _check(check, Path(folder, str(len(tried))), tree, disk.acknowledged[: cut.acknowledged], cut)
        return PowerCuts(len(disk.cuts), len(tried), sampled)


async def _check(
    check: Callable[[Path, Sequence[Any]], Awaitable[object]],
    root: Path,
    tree: _Tree,
    acknowledged: Sequence[Any],
    cut: _Cut,
) -> None:
    await anyio.to_thread.run_sync(_write, root, tree)
    try:
        await check(root, acknowledged)
    except BaseException as error:
        listed = [f"  {path}{'/' if data is None else f': {len(data)} bytes'}" for path, data in sorted(tree.items())]
        error.add_note("\n".join([f"with the power cut after {cut.after} and this left on the disk:", *listed]))
        raise
    await anyio.to_thread.run_sync(shutil.rmtree, root)


def _write(root: Path, tree: _Tree) -> None:
    root.mkdir(mode=0o700)
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir(mode=0o700)
        else:
            (root / path).write_bytes(data)
            (root / path).chmod(0o600)


class _Cut(NamedTuple):
    """A moment: what each file and each name in a directory may be afterwards, the durable option first."""

    after: str
    acknowledged: int
    files: dict[int, tuple[_Option, ...]]
    names: dict[int, dict[str, tuple[_Option, ...]]]

    def trees(self, limit: int, rng: random.Random) -> tuple[Iterator[_Tree], bool]:
        """The legal states, and whether these are all."""
        questions = dict(self._questions())
        distinct = [tuple({what: (when, what) for when, what in each}.values()) for each in questions.values()]
        complete = math.prod(map(len, distinct)) <= limit
        chosen: Iterable[tuple[_Option, ...]] = itertools.product(*distinct)
        if not complete:
            chosen = _sample([*questions.values()], limit, rng)
        return (self._tree(dict(zip(questions, answers, strict=True))) for answers in chosen), complete

    def _questions(self) -> Iterator[tuple[_Question, tuple[_Option, ...]]]:
        """What has more than one answer and can be reached from the root in one of the states."""
        seen, todo = {_ROOT}, [_ROOT]
        while todo:
            node = todo.pop()
            for name, options in self.names.get(node, {}).items():
                if len(options) > 1:
                    yield (node, name), options
                below = {child for _, child in options if child is not None} - seen
                seen |= below
                todo += below
            if len(options := self.files.get(node, ())) > 1:
                when, latest = options[-1]
                torn = [latest[: len(latest) // 2], bytes(len(latest)), b""]
                yield (node, ""), (*options[:-1], *((when, data) for data in torn), options[-1])

    def _tree(self, answers: dict[_Question, _Option]) -> _Tree:
        tree: _Tree = {}
        todo = [(_ROOT, "")]
        while todo:
            directory, above = todo.pop()
            for name, options in self.names[directory].items():
                node = answers.get((directory, name), options[-1])[1]
                if node in self.files:
                    tree[above + name] = answers.get((node, ""), self.files[node][-1])[1]
                elif node is not None:
                    tree[above + name] = None
                    todo.append((node, f"{above}{name}/"))
        return tree


def _sample(options: list[tuple[_Option, ...]], limit: int, rng: random.Random) -> Iterator[tuple[_Option, ...]]:
    lost, kept = tuple(each[0] for each in options), tuple(each[-1] for each in options)
    yield lost
    yield kept
    drawn = 2
    for number, each in enumerate(options):
        for option in each[:-1]:
            yield (*kept[:number], option, *kept[number + 1 :])
        yield (*lost[:number], each[-1], *lost[number + 1 :])
        drawn += len(each)
    moments = {when for each in options for when, _ in each}
    for moment in moments:
        yield tuple([option for option in each if option[0] <= moment][-1] for each in options)
    for _ in range(limit - drawn - len(moments)):
        yield tuple(map(rng.choice, options))


class _Disk:
    """Looks at a directory again and again, and remembers what was durable and what has been there since."""

    def __init__(self, root: Path) -> None:
        self.acknowledged: list[Any] = []
        self.cuts: list[_Cut] = []
        self._root = root
        self._lock = threading.RLock()  # one call at a time
        self._events = itertools.count(1)
        self._nodes = itertools.count(_ROOT + 1)
        self._live = {root.stat().st_ino: _ROOT}  # nodes by inode, of what is there now; inodes are used again
        self._files: dict[int, list[_Option]] = {}
        self._names: dict[int, dict[str, list[_Option]]] = {}
        self._look()
        for node in self._live.values():
            self._synced(node)

    async def acknowledge(self, what: object) -> None:
        def note() -> None:
            with self._lock:
                self._look()
                self.acknowledged.append(what)
                self._cut(f"acknowledging {what!r}")

        await anyio.to_thread.run_sync(note)

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in _CALLS:
                stack.enter_context(mock.patch.object(os, name, self._watching(name, getattr(os, name))))
            stack.enter_context(mock.patch.object(os, "fdatasync", self._watching("fsync", os.fdatasync)))
            yield

    def _watching(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watching(*args: Any, **options: Any) -> Any:
            with self._lock:
                described = f"os.{name}({', '.join(map(str, args))})"
                self._look()
                self._cut(f"what came before {described}")
                result = call(*args, **options)
                if name == "fsync" and (node := self._live.get(os.fstat(args[0]).st_ino)) is not None:
                    self._synced(node)
                self._look()
                self._cut(described)
                return result

        return watching

    def _cut(self, after: str) -> None:
        files = {node: tuple(options) for node, options in self._files.items()}
        names = {node: {name: tuple(options) for name, options in names.items()} for node, names in self._names.items()}
        self.cuts.append(_Cut(after, len(self.acknowledged), files, names))

    def _look(self) -> None:
        found = {self._root.stat().st_ino: _ROOT}
        todo = [(self._root, _ROOT)]
        while todo:
            folder, directory = todo.pop()
            there = {}
            for entry in os.scandir(folder):
                inode = entry.inode()
                node = found[inode] = there[entry.name] = found.get(inode) or self._live.get(inode) or next(self._nodes)
                if entry.is_dir(follow_symlinks=False):
                    todo.append((Path(entry.path), node))
                else:
                    self._note(self._files.setdefault(node, [(0, b"")]), Path(entry.path).read_bytes())
            names = self._names.setdefault(directory, {})
            for name in names.keys() | there.keys():
                self._note(names.setdefault(name, [(0, None)]), there.get(name))
        self._live = found

    def _note(self, options: list[_Option], now: object) -> None:
        if options[-1][1] != now:
            options.append((next(self._events), now))

    def _synced(self, node: int) -> None:
        """What was there when it was last looked at is durable."""
        for options in (self._files.get(node, []), *self._names.get(node, {}).values()):
            options[:] = [(0, what) for _, what in options[-1:]]

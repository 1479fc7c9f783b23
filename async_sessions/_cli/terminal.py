"""How the commands speak: to people in tables, to programs in lines of JSON."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NoReturn

import msgspec
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

PROBLEMS, MISTAKE = 1, 2  # exit codes
_GAP = 2  # blanks between columns
_NARROW = 20  # cells; a terminal below that breaks the lines itself
_AGES = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def fail(sentence: str, code: int = MISTAKE) -> NoReturn:
    """Say what is wrong, and end the command."""
    Output(stderr=True).print(Text(plain(sentence), style="bold red"), soft_wrap=True)
    raise typer.Exit(code)


class Output(Console):
    """Standard output, or error. What is printed into a pipe that nobody reads any more is dropped."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        # in a pipe a line is as long as it is
        super().__init__(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else 10_000)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # what is still buffered goes there
        os.close(nowhere)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.on_broken_pipe()
            fail(f"The output can't be written: {error.strerror}.", PROBLEMS)

    def json(self, values: Iterable[object]) -> None:
        self._lines(json.dumps(msgspec.to_builtins(value)) for value in values)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns that the terminal has no room for are left out, from the right: half a number is a wrong one.

        Not rich's table, which takes a minute for 100,000 rows.
        """
        widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
        ends = itertools.accumulate(width + _GAP for width in widths)
        shown = max(1, sum(end - _GAP <= self.width for end in ends))

        def line(cells: Sequence[str]) -> str:
            padded = (cell + " " * (width + _GAP - cell_len(cell)) for cell, width in zip(cells, widths, strict=True))
            return "".join(itertools.islice(padded, shown)).rstrip()

        self.out(line(headings), style="bold")
        self._lines(map(line, rows))

    def _lines(self, lines: Iterable[str]) -> None:
        rest = iter(lines)
        while block := list(itertools.islice(rest, 1000)):
            self.out("\n".join(block))

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """A name and what there is to say of it, on as many lines as that takes."""
        rows = list(rows)
        indent = max((cell_len(name) + _GAP for name, _ in rows), default=0)
        for name, text in rows:
            names = itertools.chain([name], itertools.repeat(""))
            lines = Text(text, overflow="fold").wrap(self, max(_NARROW, self.width - indent))
            for beside, line in zip(names, lines, strict=False):
                line.rstrip()
                self.print(Text.assemble((f"{beside:{indent}}", "bold"), line), soft_wrap=True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal; it moves once it is told of how many how many are done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def plain(text: str) -> str:
    """What a user of the app may have written, without what a terminal would obey."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def age(span: timedelta) -> str:
    """In the largest unit that it is at least two of: `90 min`."""
    seconds = max(0, round(span.total_seconds()))
    for size, unit in _AGES:
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def at(moment: datetime | None, now: datetime) -> str:
    """When that is or was, to the minute, and how far away: `2026-03-01 12:00 UTC (3 h ago)`."""
    if moment is None:
        return "-"
    distance = f"in {age(moment - now)}" if moment > now else f"{age(now - moment)} ago"
    return f"{moment:%Y-%m-%d %H:%M} UTC ({distance})"

"""Progress of long work: a live bar on a terminal, plain lines elsewhere, always with what remains."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=False, highlight=False, soft_wrap=True)

PLAIN_EVERY_SECONDS = 20.0


class Ticker:
    """Counts finished units of one task."""

    def __init__(self, description: str, total: int, bar: Progress | None):
        self.description, self.total, self.bar = description, total, bar
        self.done, self.note = 0, ""
        self.skipped = self.added = 0
        self.started = self.said = time.monotonic()
        self.task = bar.add_task(description, total=total, note="") if bar else None

    def extend(self, units: int) -> None:
        """There is more to do than was thought; how much more, nobody knows yet."""
        self.total += units
        self.added += units
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, total=self.total)

    def skip(self, units: int) -> None:
        """Units finished by an earlier run."""
        self.skipped += units
        self.advance(units)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Report finished units; `note` stays beside the bar."""
        self.done += units
        self.note = note if note is not None else self.note
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif time.monotonic() - self.said > PLAIN_EVERY_SECONDS and self.done < self.total:
            self.said = time.monotonic()
            elapsed = self.said - self.started
            worked = max(1, self.done - self.skipped)
            remains = elapsed / worked * (self.total - self.done)
            left = f"{self.added} more than planned" if self.added else f"{remains:.0f} s remain"
            note_text = f"  {self.note}" if self.note else ""
            print(f"  {self.description} {self.done}/{self.total}, {left}{note_text}", flush=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Ticker]:
    """A ticker for `total` units of work."""
    if sys.stdout.isatty():
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield Ticker(description, total, bar)
    else:
        yield Ticker(description, total, None)

"""Tables for terminals of any width: columns that do not fit go below the others, and no figure is cut."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table

from puzzle_nas.progress import console

BETWEEN = 2
"""Characters between columns."""


def print_tables(renderable: RenderableType) -> None:
    """Print, wrapped between words at the terminal's width; as wide as it is where it goes to a file."""
    console.print(renderable, soft_wrap=not _has_width(console), crop=False)


def _has_width(console: Console) -> bool:
    return console.is_terminal or "COLUMNS" in os.environ


class FigureTable:
    """Rows of cells under headings, the first column on the left of each row of columns."""

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        units: Sequence[Sequence[int]] | None = None,
        fold: int | None = None,
    ):
        """`units`: columns after the first that stay together; None means each alone, and right-aligned.

        `fold`: characters after which a cell goes on in the next line, for cells that hold more than a figure.
        """
        self.title, self.columns, self.rows, self.fold = title, columns, rows, fold
        self.left = units is not None
        self.units = units or [[place] for place in range(1, len(columns))]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = self.title
        for group in self._groups(options.max_width if _has_width(console) else None):
            places = [0, *chain.from_iterable(group)]
            table = Table(title=title or None, title_justify="left", box=None, padding=(0, BETWEEN // 2))
            for place in places:
                left = self.left or place == 0
                column = {"justify": "left" if left else "right", "no_wrap": self.fold is None, "overflow": "fold"}
                table.add_column(self.columns[place], max_width=self.fold, **column)
            for row in self.rows:
                table.add_row(*(row[place] for place in places))
            yield from console.render(table, options.update(max_width=self._width(places)))
            title = ""

    def _groups(self, width: int | None) -> Iterator[list[Sequence[int]]]:
        """As many units as fit beside the first column, then the next ones."""
        group: list[Sequence[int]] = []
        for unit in self.units:
            if group and width is not None and self._width([0, *chain.from_iterable([*group, unit])]) > width:
                yield group
                group = []
            group.append(unit)
        yield group

    def _width(self, places: Sequence[int]) -> int:
        def width(place: int) -> int:
            widest = max(map(cell_len, [self.columns[place], *(row[place] for row in self.rows)]))
            return widest if self.fold is None else min(self.fold, widest)

        return sum(width(place) + BETWEEN for place in places)

"""What a search is about: a table of variants, an objective, limits; and what it answers. No torch."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from puzzle_nas.errors import RecipeError
from puzzle_nas.text_files import opened

Position: TypeAlias = Hashable
KEYS = ("layer", "variant")


@dataclass(frozen=True, eq=False)
class Table:
    """The variants of every position, with a number for each in every column.

    A position is a place in the chain of the model, a layer or a sub-block, in the model's order. A variant
    of span s stands for its own position and the s - 1 that follow.

    Raises:
        RecipeError: no positions or variants, a variant twice, numbers missing or not finite, spans that do
            not fit.
    """

    positions: tuple[Position, ...]
    """Labels, in the order of the model."""
    variants: tuple[tuple[str, ...], ...]
    """For each position the ids of its variants."""
    columns: Mapping[str, tuple[np.ndarray, ...]]
    """For each column and position a float64 array, one number per variant."""
    spans: tuple[np.ndarray, ...] = ()
    """For each position how many positions each variant covers; empty means one each."""

    def __post_init__(self) -> None:
        if not self.positions:
            raise RecipeError("The table has no rows; give at least one variant for each layer.")
        if not self.spans:
            object.__setattr__(self, "spans", tuple(np.ones(len(v), np.int64) for v in self.variants))
        columns = {n: tuple(np.asarray(a, np.float64) for a in arrays) for n, arrays in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        for name, arrays in columns.items():
            for position, variants, values in zip(self.positions, self.variants, arrays, strict=True):
                if values.shape != (len(variants),) or not np.isfinite(values).all():
                    raise RecipeError(f"Column {name} needs one finite number for each variant of layer {position}.")
        for position, variants in zip(self.positions, self.variants, strict=True):
            if not variants:
                raise RecipeError(f"Layer {position} has no variants; give it at least one.")
            if len(set(variants)) < len(variants):
                twice = next(v for v in variants if variants.count(v) > 1)
                raise RecipeError(f"Layer {position} has variant {twice} twice; keep one of the two rows.")
        self._check_spans()

    def _check_spans(self) -> None:
        for index, position in enumerate(self.positions):
            left = len(self.positions) - index
            for variant, span in zip(self.variants[index], self.spans[index], strict=True):
                if not 1 <= span <= left:
                    raise RecipeError(
                        f"Variant {variant} of layer {position} has span {span}, but the table has {left} "
                        "positions from there on; spans lie between 1 and that."
                    )

    @property
    def has_spans(self) -> bool:
        """Whether some variant covers more than one position."""
        return any((spans > 1).any() for spans in self.spans)

    def column(self, name: str) -> tuple[np.ndarray, ...]:
        """The numbers of one column, by position.

        Raises:
            RecipeError: no such column; names those there are.
        """
        if name not in self.columns:
            raise RecipeError(f"The table has no column {name}; it has {', '.join(self.columns) or 'none'}.")
        return self.columns[name]

    def restricted(self, keep: Callable[[Position, str], bool]) -> Table:
        """The table with only those variants for which `keep(position, variant)` holds.

        Raises:
            RecipeError: a position would have none left.
        """
        masks = [
            np.array([keep(position, variant) for variant in variants], bool)
            for position, variants in zip(self.positions, self.variants, strict=True)
        ]
        return Table(
            self.positions,
            tuple(
                tuple(v for v, kept in zip(variants, mask, strict=True) if kept)
                for variants, mask in zip(self.variants, masks, strict=True)
            ),
            {
                name: tuple(values[mask] for values, mask in zip(column, masks, strict=True))
                for name, column in self.columns.items()
            },
            tuple(spans[mask] for spans, mask in zip(self.spans, masks, strict=True)),
        )

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Table:
        """A table from rows with `layer`, `variant`, numbers and optionally `span`.

        Layers that are all integers are sorted; other labels keep the order in which they first appear.

        Args:
            columns: the columns to read; None reads all, and then all must be numbers.

        Raises:
            RecipeError: no rows, a missing column (naming those there are), a value that is no finite number
                (naming its row), the same layer and variant twice, a span below 1.
        """
        rows = list(rows)
        if not rows:
            raise RecipeError("The table has no rows; give at least one variant for each layer.")
        present = list(rows[0])
        if columns is None:
            columns = [name for name in present if name not in (*KEYS, "span")]
        wanted = [*KEYS, *columns, *(["span"] if "span" in present else [])]
        grouped: dict[Position, dict[str, list[float]]] = {}
        for number, row in enumerate(rows, start=1):
            for name in wanted:
                if name not in row:
                    raise RecipeError(f"Row {number} of the table has no column {name}; it has {', '.join(row)}.")
            variant = str(row["variant"])
            where = f"row {number} (layer {row['layer']}, variant {variant})"
            variants = grouped.setdefault(row["layer"], {})
            if variant in variants:
                raise RecipeError(f"The table has {where} for the second time; keep one of the two rows.")
            variants[variant] = [_number(row[name], name, where) for name in wanted[2:]]
            if "span" in present and (variants[variant][-1] % 1 or variants[variant][-1] < 1):
                raise RecipeError(f"The span in {where} is {row['span']}; it must be a whole number from 1 up.")
        if all(isinstance(layer, int) for layer in grouped):
            grouped = dict(sorted(grouped.items()))  # type: ignore[type-var]
        numbers = [np.array(list(variants.values())).reshape(len(variants), -1) for variants in grouped.values()]
        return cls(
            tuple(grouped),
            tuple(tuple(variants) for variants in grouped.values()),
            {name: tuple(block[:, i].copy() for block in numbers) for i, name in enumerate(columns)},
            tuple(block[:, -1].astype(np.int64) for block in numbers) if "span" in present else (),
        )


def _number(value: Any, column: str, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(f"Column {column} in {where} holds {value!r}, which is not a finite number.") from None
    return number


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with opened(path, newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row.pop(None, None)  # type: ignore[call-overload]
    with_layers = [row for row in rows if "layer" in row]
    if all(str(row["layer"]).lstrip("-").isdecimal() for row in with_layers):
        for row in with_layers:
            row["layer"] = int(row["layer"])
    return rows


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Table:
    """`Table.from_rows` of a .csv, .jsonl or .parquet file.

    Raises:
        RecipeError: the file is missing, of another kind or damaged, or its rows are no table.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"{path} is not a table that can be read; use {', '.join(READERS)}.")
    if not path.is_file():
        raise RecipeError(f"There is no table {path}; check the path.")
    try:
        rows = reader(path)
    except (ValueError, OSError, csv.Error) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{path} is damaged or not a {path.suffix} file: {reason}.") from None
    try:
        return Table.from_rows(rows, columns)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Limit:
    """A bound on a column's total, both ends included. None means no bound at that end."""

    column: str
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.minimum, self.maximum) if bound is not None]
        if not bounds or not all(math.isfinite(bound) for bound in bounds):
            raise RecipeError(f"The limit on {self.column} needs a finite minimum or maximum.")


@dataclass(frozen=True)
class Problem:
    """Choose one variant for each position (an exact cover when variants have spans) so that limits hold.

    A column's total is its `fixed` part (embeddings, ...) plus the sum over the chosen variants.

    Raises:
        RecipeError: a column that the table does not have.
    """

    table: Table
    objective: str
    sense: Literal["minimise", "maximise"] = "minimise"
    limits: tuple[Limit, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sense not in ("minimise", "maximise"):
            raise RecipeError(f"The sense is {self.sense!r}; choose minimise or maximise.")
        object.__setattr__(self, "limits", tuple(self.limits))
        for name in (self.objective, *(limit.column for limit in self.limits), *self.fixed):
            self.table.column(name)
        for name, value in self.fixed.items():
            if not math.isfinite(value):
                raise RecipeError(f"The fixed part of {name} is {value}, which is not a finite number.")

    def costs(self, choices: Mapping[Position, str]) -> dict[str, float]:
        """The total of every column for a choice of variants, correctly rounded."""
        picked = [
            (index, self.table.variants[index].index(choices[position]))
            for index, position in enumerate(self.table.positions)
            if position in choices
        ]
        return {
            name: math.fsum([self.fixed.get(name, 0.0), *(float(column[i][j]) for i, j in picked)])
            for name, column in self.table.columns.items()
        }


@dataclass(frozen=True)
class Solution:
    """A choice of variants that meets every limit."""

    choices: dict[Position, str]
    """The variant of each position; with spans only the positions at which a variant starts."""
    score: float
    """Total of the objective."""
    bound: float | None
    """No choice has a better total than this; None for baselines, which have no bound."""
    gap: float | None
    """|score - bound| / max(|score|, |bound|): 0 when proven optimal; None without a bound."""
    costs: dict[str, float]
    """Total of every column."""
    status: Literal["optimal", "feasible"]
    """Whether the gap asked for was reached."""
    seconds: float
    """Wall time of the search."""

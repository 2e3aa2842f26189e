"""Tables from rows and files, and what is wrong with them in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from puzzle_nas.errors import PuzzleError, RecipeError
from puzzle_nas.search import Limit, Problem, Table, read_table, solve

ROWS = [
    {"layer": 10, "variant": "a", "score": 0.0, "memory": 5},
    {"layer": 10, "variant": "b", "score": 1.0, "memory": 2.5},
    {"layer": 9, "variant": "a", "score": 0.5, "memory": 1e9},
]


def write(path, rows):
    """Rows in the format that the suffix names."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_three_formats_give_the_same_table(tmp_path, suffix):
    table = read_table(write(tmp_path / f"table{suffix}", ROWS))
    assert table.positions == (9, 10)
    assert table.variants == (("a",), ("a", "b"))
    assert [values.tolist() for values in table.column("memory")] == [[1e9], [5.0, 2.5]]
    assert list(table.columns) == ["score", "memory"]
    assert all(values.dtype == np.float64 for values in table.column("score"))


def test_labels_keep_their_order_and_spans_are_read():
    rows = [
        {"layer": "03.ffn", "variant": "x", "score": 1, "span": 2},
        {"layer": "03.ffn", "variant": "y", "score": 1, "span": 1},
        {"layer": "03.attention", "variant": "x", "score": 1, "span": 1},
    ]
    table = Table.from_rows(rows)
    assert table.positions == ("03.ffn", "03.attention")
    assert [spans.tolist() for spans in table.spans] == [[2, 1], [1]]
    assert table.has_spans and list(table.columns) == ["score"]


def test_only_the_columns_asked_for_must_be_numbers():
    rows = [{"layer": 0, "variant": "a", "score": 1.0, "note": "the parent"}]
    assert list(Table.from_rows(rows, ["score"]).columns) == ["score"]
    with pytest.raises(RecipeError, match=r"Column note in row 1 .* holds 'the parent'"):
        Table.from_rows(rows)


@pytest.mark.parametrize("value", ["fast", float("nan"), float("inf"), None, "", True])
def test_a_value_that_is_no_number_is_named_with_its_row(value):
    rows = [*ROWS, {"layer": 9, "variant": "b", "score": 0.5, "memory": value}]
    with pytest.raises(RecipeError, match=r"Column memory in row 4 \(layer 9, variant b\) holds"):
        Table.from_rows(rows)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_files_without_a_column(tmp_path, suffix):
    rows = [{key: value for key, value in row.items() if key != "variant"} for row in ROWS]
    with pytest.raises(RecipeError, match="no column variant; it has layer, score, memory"):
        read_table(write(tmp_path / f"table{suffix}", rows))
    with pytest.raises(RecipeError, match="no column runtime; it has layer, variant, score, memory"):
        read_table(write(tmp_path / f"other{suffix}", ROWS), ["score", "runtime"])


def test_duplicates_and_emptiness():
    with pytest.raises(RecipeError, match=r"row 4 \(layer 10, variant a\) for the second time"):
        Table.from_rows([*ROWS, ROWS[0]])
    with pytest.raises(RecipeError, match="no rows"):
        Table.from_rows([])
    with pytest.raises(RecipeError, match="Layer 0 has no variants"):
        Table((0,), ((),), {})
    with pytest.raises(RecipeError, match="Layer 0 has variant a twice"):
        Table((0,), (("a", "a"),), {})
    with pytest.raises(RecipeError, match="one finite number for each variant of layer 0"):
        Table((0,), (("a",),), {"score": (np.array([np.nan]),)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "There is no table"),
        ("table.xlsx", b"", r"use \.csv, \.jsonl, \.parquet"),
        ("table.jsonl", b"{", "damaged"),
        ("table.jsonl", b"[1]", "line 1 is not an object"),
        ("table.parquet", b"PAR1", "damaged"),
        ("table.csv", b"\xff\xfe\x00", "not UTF-8 text"),
        ("table.csv", b"layer,variant,score\n", "no rows"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PuzzleError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([2, 2], "span 2, but the table has 1"),
        ([0, 1], "must be a whole number"),
        ([1.5, 1], "must be a whole number"),
    ],
)
def test_spans_that_do_not_fit(spans, message):
    rows = [{"layer": i, "variant": "a", "score": 1.0, "span": span} for i, span in enumerate(spans)]
    with pytest.raises(RecipeError, match=message):
        Table.from_rows(rows)


def test_spans_are_laid_end_to_end():
    spans = (np.array([2]), np.array([2]), np.array([1]))
    table = Table((0, 1, 2), (("a",),) * 3, {"score": (np.zeros(1),) * 3}, spans)
    assert solve(Problem(table, "score"))[0].choices == {0: "a", 2: "a"}


def test_problems_name_columns_that_exist():
    table = Table.from_rows(ROWS)
    with pytest.raises(RecipeError, match="no column runtime; it has score, memory"):
        Problem(table, "score", limits=(Limit("runtime", maximum=1.0),))
    with pytest.raises(RecipeError, match="finite minimum or maximum"):
        Limit("memory")
    with pytest.raises(RecipeError, match="finite minimum or maximum"):
        Limit("memory", maximum=float("nan"))
    with pytest.raises(RecipeError, match="choose minimise or maximise"):
        Problem(table, "score", "least")
    with pytest.raises(RecipeError, match="fixed part of memory"):
        Problem(table, "score", fixed={"memory": float("inf")})


def test_restricted_to_some_variants():
    table = Table.from_rows(ROWS).restricted(lambda position, variant: variant == "a")
    assert table.variants == (("a",), ("a",))
    assert [values.tolist() for values in table.column("score")] == [[0.5], [0.0]]
    with pytest.raises(RecipeError, match="Layer 9 has no variants"):
        table.restricted(lambda position, variant: position != 9)


def test_the_search_imports_no_torch():
    code = "import sys, puzzle_nas.search; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"

"""Runs side by side: the table, the JSON, the page, and what forbids comparing."""

from __future__ import annotations

import json

import pytest

from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.errors import ArtifactError, RecipeError
from puzzle_nas.report.comparison import ROWS, comparison_notes, comparison_rows, load_runs, render_comparison
from tests.conftest import puzzle
from tests.report.browser import chromium, visit
from tests.report.test_page import drawn, make_run, own_part


def finished(folder, validation="abc", **changes):
    """A run with its summary; `changes` are of the summary's top level."""
    _, run, summary = make_run(folder)
    merged = {name: summary[name] | value if isinstance(value, dict) else value for name, value in changes.items()}
    write_json(run.summary, summary | merged)
    run.write_record("prepare_data", "x", {"data/validation.safetensors": validation})
    return run


@pytest.fixture
def two(tmp_path):
    runs = [finished(tmp_path / "a/child"), finished(tmp_path / "b/child")]
    summary = read_json(runs[1].summary)
    summary["child"] |= {"speedup_measured": 1.75, "validation_kl_nats_distilled": 0.4567}
    write_json(runs[1].summary, summary)
    return runs


def test_rows_hold_each_runs_figures_under_names_that_differ(two):
    runs = load_runs(two)
    assert [run.name for run in runs] == ["a/child", "b/child"]
    rows = {name: cells for name, *cells in comparison_rows(runs)}
    assert set(rows) == set(ROWS)
    assert rows["KL, distilled"] == ["0.2101", "0.4567"]
    assert rows["speed-up, measured"] == ["1.317x", "1.750x"]
    assert rows["FFN"][0] == "7 w1536, 2 w768, 1 w384, 1 linear, 1 no_op"
    assert comparison_notes(runs) == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"validation": "other"}, "validation text differs"),
        ({"machine": {"processor": "Another CPU"}}, "Machine, engine or versions differ"),
        ({"scenarios": []}, "scenarios differ"),
        ({"parent": {"source": "another"}}, "parents differ"),
    ],
)
def test_what_forbids_comparing_is_said(tmp_path, changes, note):
    runs = load_runs([finished(tmp_path / "a"), finished(tmp_path / "b", **changes)])
    (found,) = comparison_notes(runs)
    assert note in found


def test_one_run_or_an_unfinished_one_is_refused(two, tmp_path):
    for folders in (two[:1], [two[0], two[0]]):
        with pytest.raises(RecipeError, match="two or more different runs"):
            load_runs(folders)
    with pytest.raises(ArtifactError, match="puzzle write-report"):
        load_runs([two[0], RunFolder(tmp_path / "nothing")])
    older = read_json(two[1].summary)
    del older["engine"]
    write_json(two[1].summary, older)
    with pytest.raises(ArtifactError, match=r"no engine: another version.* --again"):
        load_runs(two)


def test_the_page_holds_every_run(two):
    page = own_part(render_comparison(load_runs(two)))
    figures = drawn(page)
    (points,) = figures["decision"][0]
    assert points["x"] == [1.317, 1.75] and points["y"] == [0.2101, 0.4567]
    (layers,) = figures["layers"][0]
    assert layers["y"] == ["b/child, FFN", "b/child, attention", "a/child, FFN", "a/child, attention"]
    assert "<td>0.4567</td>" in page


def test_the_command_prints_a_table_json_and_a_page(two, tmp_path):
    text = puzzle("compare", *two, "--html", tmp_path / "compare.html").stdout
    row = next(line for line in text.splitlines() if line.strip().startswith("KL, distilled"))
    assert row.split()[-2:] == ["0.2101", "0.4567"]
    found = json.loads(puzzle("compare", *two, "--json").stdout)
    assert found["runs"]["b/child"] == read_json(two[1].summary) and found["notes"] == []
    refused = puzzle("compare", two[0], check=False)
    assert refused.returncode == 2 and "two or more" in refused.stderr
    with chromium() as browser:
        seen = visit(browser, tmp_path / "compare.html", width=360)
        assert seen.page.locator(".plot.drawn").count() == 2
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert seen.complaints == [] and len(seen.requests) == 1

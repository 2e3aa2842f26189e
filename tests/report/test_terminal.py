"""Tables on narrow terminals and plain ones, and what they say of measurements that cannot be relied on."""

import re

import pytest
from rich.console import Console

from puzzle_nas.artifacts import read_json, write_json
from puzzle_nas.report.comparison import load_runs, show_comparison
from puzzle_nas.report.summary import build_summary
from puzzle_nas.report.tables import model_rows, show, speed_note
from puzzle_nas.report.terminal import FigureTable
from tests.conftest import puzzle
from tests.report.test_comparison import finished
from tests.report.test_page import make_run


def printed(renderable, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(width=width, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(renderable, soft_wrap=False, crop=False)
    return capture.get()


@pytest.mark.parametrize("width", [46, 60, 80, 200])
def test_no_figure_is_cut(tmp_path, monkeypatch, width):
    _, _, summary = make_run(tmp_path)
    text = printed(show(summary), width, monkeypatch)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    figures = [cell for row in model_rows(summary) for cell in row[1:] if cell != "-"]
    for figure in figures:
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text), figure


def test_wide_enough_tables_stay_whole(tmp_path, monkeypatch):
    _, _, summary = make_run(tmp_path)
    narrow, wide = (printed(show(summary), width, monkeypatch) for width in (60, 100))
    assert narrow.count("child, assembled") == 2 and wide.count("child, assembled") == 1


def test_a_column_wider_than_the_terminal_is_still_whole(monkeypatch):
    table = FigureTable("", ("model", "figures"), [("a", "0.1234 " * 9)])
    assert ("0.1234 " * 9).strip() in printed(table, 20, monkeypatch)


def test_comparisons_fold_words_and_no_figures(tmp_path, monkeypatch):
    runs = load_runs([finished(tmp_path / name) for name in ("a", "b")])
    text = printed(show_comparison(runs), 60, monkeypatch)
    assert text.count("0.2101") == 2 and "…" not in text and max(map(len, text.splitlines())) <= 60


def test_plain_characters_where_output_is_not_utf8(tmp_path):
    run = finished(tmp_path)
    out = puzzle("show", run, env={"PYTHONIOENCODING": "ascii"}).stdout
    assert out.isascii() and "##########" in out and "1.317x" in out
    assert "██████████" in puzzle("show", run, env={"PYTHONIOENCODING": "utf-8"}).stdout


def test_how_much_of_kl_is_rounding_is_said(tmp_path, monkeypatch):
    _, _, summary = make_run(tmp_path)
    assert "of rounding" not in printed(show(summary), 100, monkeypatch)
    summary["parent"]["validation_kl_nats_of_rounding"] = 0.00187
    assert "KL has 0.0019 nats of rounding in it" in printed(show(summary), 100, monkeypatch)


def test_a_speed_up_measured_beside_other_work_is_doubted(tmp_path):
    _, _run, summary = make_run(tmp_path)
    assert "Do not rely" not in speed_note(summary)
    summary["child"]["other_load_percent"] = 47.0
    note = speed_note(summary)
    assert "Do not rely on this speed-up: other work kept 47 % of the machine busy meanwhile." in note
    assert "puzzle evaluate-child RUN --again, then puzzle write-report RUN" in note


def test_show_says_what_is_newer_than_the_summary(tmp_path):
    recipe, run, _ = make_run(tmp_path / "a run")
    run.write_record("evaluate_child", "x", {"measured.json": "a"})
    run.write_record("write_report", "x", {"summary.json": "a"})
    write_json(run.summary, build_summary(recipe, run))
    assert set(read_json(run.summary)["made_from"]) == {"evaluate_child"}
    assert "Older" not in puzzle("show", run).stdout
    run.write_record("evaluate_child", "x", {"measured.json": "b"})
    shown = puzzle("show", run).stdout
    assert (
        f"Older than what evaluate-child has made since; bring it up to date with: puzzle write-report '{run}'" in shown
    )

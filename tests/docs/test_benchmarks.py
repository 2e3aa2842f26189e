"""Benchmarks: one door lists them all, each says what it takes, and what a user can mend is one sentence."""

import json

import pytest

from benchmarks.__main__ import FOLDER, benchmarks, run

HELPERS = {"__main__", "alternative_starts", "common", "draft_worker"}
"""Modules that measure nothing themselves."""


def test_the_door_lists_every_module(capsys):
    modules = {path.stem for path in FOLDER.glob("*.py")} | {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert set(benchmarks()) == modules - HELPERS - {"__init__"}
    assert run([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in benchmarks().items():
        assert line and f"  {name:16} {line}" in lines


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_says_what_it_takes(name, capsys):
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: python -m benchmarks {name}" in shown
    assert benchmarks()[name].split()[0] in shown


def test_mistakes_are_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["nothing"]) == 2
    assert run(["alternatives", "nothing"]) == 2
    assert run(["paper", "table_06"]) == 2
    # Neither text of ../shared nor a run is in this folder.
    assert run(["continuations"]) == 2
    assert run(["paper", "table_02"]) == 2
    out, err = capsys.readouterr()
    sentences = err.splitlines()
    assert not out and len(sentences) == 5 and all(line.startswith("benchmarks: ") for line in sentences)
    assert "../shared/data/validation is not here" in sentences[3]
    assert "puzzle evaluate runs/torch" in sentences[4]


def test_results_name_the_command_that_made_them():
    for path in FOLDER.glob("results/**/*.json"):
        found = json.loads(path.read_text())
        assert found["command"].startswith("python ") and found["figures"], path

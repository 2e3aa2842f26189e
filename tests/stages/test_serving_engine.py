"""A run whose costs, search and child are timed on a serving engine: `puzzle run ... engine=llama.cpp`."""

import json
import shutil

import pytest

from tests.conftest import puzzle
from tests.stages.test_bad_input import check_refused

ENGINE = "engine=llama.cpp"
HIDDEN = 128


@pytest.fixture(scope="module")
def llama_run(tiny_run, tmp_path_factory):
    """(run folder, what was printed). Made from a finished run on torch: what does not depend on times stays."""
    folder = tmp_path_factory.mktemp("llama") / "run"
    shutil.copytree(tiny_run, folder)
    few = ("costs.mixtures=2", "gkd.tokens=0")
    limits = "search.limits={speedup: 1.05}"
    result = puzzle("run", tiny_run.parent / "tiny.yaml", ENGINE, *few, limits, "--run-dir", folder)
    return folder, result.stdout


def test_costs_and_bytes_are_the_engines(llama_run, tiny_run):
    run, out = llama_run
    assert [path.name for path in (run / "costs").iterdir()] == ["llama.cpp.json"]
    table, torch_table = (
        json.loads(p.read_text()) for p in (run / "costs/llama.cpp.json", tiny_run / "costs/torch.json")
    )
    machine = table["machine"]
    assert (machine["engine"], machine["device"], machine["precision"], machine["threads"]) == (
        *("llama.cpp", "cpu", "bfloat16", 1),
    )
    assert machine["llama-cpp-python"] and "torch" not in machine
    # An engine that serves has weights and cache in 16 bits, where torch has 32 here; norms stay in 32.
    assert 2 * table["bytes"]["cache_itemsize"] == torch_table["bytes"]["cache_itemsize"] == 4
    for group, variants in torch_table["bytes"]["variants"].items():
        for name, counted in variants.items():
            halved = {**counted, "parameter_bytes": counted["parameter_bytes"] // 2}
            here = table["bytes"]["variants"][group][name]
            norm = 2 * HIDDEN if counted["parameters"] and group != "head" else 0
            # One FFN of zeros, 32 wide, where there is none; two where a matrix stands in its place.
            zeros = {"ffn.no_op": 1, "ffn.linear": 2}.get(name, 0) * HIDDEN * (3 * 32 * 2 + 4)
            assert here == {**halved, "parameter_bytes": halved["parameter_bytes"] + norm + zeros}
    (here,), (there,) = table["scenarios"].values(), torch_table["scenarios"].values()
    assert here["parent_measured"] != there["parent_measured"] and here["working_bytes"] == there["working_bytes"]
    assert any(part["prefill_ms"] > 0 for group in here["variants"].values() for part in group.values())
    assert "predicted over measured" in out
    assert "distill-blocks: already done" in out and "search: already done" not in out


def test_the_search_and_the_child_are_timed_there_and_it_is_said(llama_run):
    run, out = llama_run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["engine"] == summary["machine"]["engine"] == "llama.cpp"
    assert 1 <= len(summary["search"]["speed_checks"]) <= 3
    assert summary["child"]["speedup_measured"] > 0 and summary["child"]["speedup_measured_repeats"] >= 2
    assert "side by side on llama.cpp." in out and "side by side on llama.cpp." in puzzle("show", run).stdout
    page = (run / "report.html").read_text()
    assert "side by side on llama.cpp." in page and "What each variant costs" in page
    assert not list((run / "scratch").iterdir())


def test_a_table_of_another_engine_is_refused(llama_run, tiny_run, tmp_path):
    run, _ = llama_run
    shutil.copytree(run, tmp_path / "copy")
    file = f"costs.file={tiny_run / 'costs/torch.json'}"
    check_refused("measure-costs", tmp_path / "copy", file, contains=["engine torch, here llama.cpp", "costs.force"])
    own = tmp_path / "own.json"
    shutil.copy(run / "costs/llama.cpp.json", own)
    puzzle("measure-costs", tmp_path / "copy", f"costs.file={own}")
    assert (tmp_path / "copy/costs/llama.cpp.json").read_bytes() == own.read_bytes()


def test_a_missing_engine_is_said_before_anything_is_done(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path / "engines"))
    recipe = tiny_run.parent / "tiny.yaml"
    install = "puzzle engine install llama.cpp"
    check_refused(
        *("run", recipe, ENGINE, "--run-dir", tmp_path / "r"), contains=["llama.cpp is not installed in", install]
    )
    assert not list(tmp_path.iterdir())
    check_refused(
        "run", recipe, "engine=tensorrt", "--run-dir", tmp_path / "r", contains=["engine", "torch, llama.cpp"]
    )

"""`puzzle frontier` on the tiny run: what holds for every row, and the picture."""

import json
import shutil
from itertools import pairwise

import pytest

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.frontier import LimitRange, solve_frontier
from puzzle_nas.errors import InfeasibleError, RecipeError
from puzzle_nas.pipeline import open_run
from puzzle_nas.report.frontier_page import FRONTIER_MODELS, render_frontier
from tests.conftest import puzzle


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run after `puzzle frontier`."""
    folder = tmp_path_factory.mktemp("frontier") / "run"
    shutil.copytree(tiny_run, folder)
    puzzle("frontier", folder)
    return folder


@pytest.fixture(scope="module")
def found(run):
    return ArchitectureSearch.load(open_run(RunFolder(run)), RunFolder(run))


@pytest.fixture(scope="module")
def frontier(run):
    return json.loads((run / "search/frontier.json").read_text())


def rows_of(frontier, model):
    return [row for row in frontier["rows"] if row["model"] == model and "infeasible" not in row]


def test_the_range_goes_from_105_to_the_fastest_child(frontier, found):
    fastest = found.parent
    for layer, _, spec in found.space:
        faster = fastest.replaced(layer, spec)
        if found.costs.mix_ms(faster) < found.costs.mix_ms(fastest):
            fastest = faster
    largest = found.costs.mix_ms(found.parent) / found.costs.mix_ms(fastest)
    assert frontier["limit"] == "speedup" and len(frontier["values"]) == 12
    assert frontier["values"][0] == pytest.approx(1.05) and frontier["values"][-1] == pytest.approx(largest)
    assert [row["limit"] for row in rows_of(frontier, "child")] == frontier["values"]


def test_every_row_meets_its_limit_and_adds_up(frontier, found):
    for row in frontier["rows"]:
        if "infeasible" in row:
            continue
        architecture = Architecture.from_list(row["architecture"])
        assert row["score_sum"] == pytest.approx(sum(found.scores[i, (spec,)] for i, _, spec in architecture))
        assert row["speedup_predicted"] == pytest.approx(
            found.costs.mix_ms(found.parent) / found.costs.mix_ms(architecture)
        )
        assert row["speedup_predicted"] >= row["limit"] * (1 - 1e-12)


def test_no_baseline_beats_the_child_and_faster_children_are_no_better(frontier):
    child = {row["limit"]: row["score_sum"] for row in rows_of(frontier, "child")}
    for row in frontier["rows"]:
        assert "infeasible" in row or row["score_sum"] >= child[row["limit"]] * (1 - 1e-4)
    assert {row["model"] for row in frontier["rows"]} == set(FRONTIER_MODELS)
    sums = list(child.values())
    assert all(later >= earlier * (1 - 1e-4) for earlier, later in pairwise(sums))
    assert sums[-1] > sums[0]


def test_baselines_are_what_they_are_called(frontier, found):
    speed = {row["limit"]: row["speedup_predicted"] for row in rows_of(frontier, "child")}
    for row in rows_of(frontier, "no_op_only"):
        for layer, slot, spec in Architecture.from_list(row["architecture"]):
            assert spec.kind == "no_op" or spec == found.parent.layers[layer][slot]
    for row in rows_of(frontier, "random"):
        assert row["speedup_predicted"] <= speed[row["limit"]] / 0.99 * (1 + 1e-12)
    for row in rows_of(frontier, "max_params"):
        others = [r for r in frontier["rows"] if r["limit"] == row["limit"] and "infeasible" not in r]
        assert row["parameters"] >= max(r["parameters"] for r in others) * (1 - 1e-4)


def test_the_picture_holds_every_model_and_loads_nothing(run, frontier):
    page = (run / "search/frontier.html").read_text()
    for label, _ in FRONTIER_MODELS.values():
        assert f'"name": "{label}"' in page
    assert "default-src 'none'" in page and "<script src" not in page and "<link" not in page
    for row in rows_of(frontier, "greedy"):
        assert f"{row['score_sum']:.4f}" in page
    assert str(rows_of(frontier, "child")[5]["score_sum"]) in page


def test_it_repeats(run, frontier):
    before = (run / "search/frontier.json").read_bytes()
    assert f"{rows_of(frontier, 'child')[5]['score_sum']:.4f}" in puzzle("frontier", run).stdout
    assert (run / "search/frontier.json").read_bytes() == before


def test_another_range_and_limits_that_hold_throughout(run, found):
    recipe = open_run(RunFolder(run))
    parent = found.costs.parameters(found.parent)
    recipe = recipe.model_copy(update={"search": recipe.search.model_copy(update={"limits": {"speedup": 1.3}})})
    frontier = solve_frontier(recipe, found, LimitRange.parse(f"parameters={parent / 1e3}:{parent}:3"))
    first, _, last = (row for row in frontier["rows"] if row["model"] == "child")
    assert "can reach" in first["infeasible"]
    assert last["parameters"] <= parent and last["speedup_predicted"] >= 1.3
    assert last["score_sum"] == pytest.approx(found.solve({"speedup": 1.3}, 0.0, 60)[0].score, rel=1e-4)
    assert frontier["other_limits"] == {"speedup": 1.3}
    assert "Throughout, speedup = 1.3" in render_frontier(frontier, "tiny")
    with pytest.raises(InfeasibleError, match="can reach"):
        solve_frontier(recipe, found, LimitRange.parse("parameters=1:2:2"))


@pytest.mark.parametrize("text", ["speedup", "speedup=2", "speedup=1:a", "speedup=1:2:1", "speedup=0:2", "x=1:2:3:4"])
def test_ranges_that_are_none(text):
    with pytest.raises(RecipeError, match="write NAME=FROM:TO"):
        LimitRange.parse(text)


def test_a_range_of_something_unknown(run):
    refused = puzzle("frontier", run, "--limit-range", "speed=1:2", check=False)
    assert refused.returncode == 2 and "'speed' is not a limit" in refused.stderr


def test_values_in_equal_ratios():
    assert LimitRange.parse("speedup=1:4:3").values == pytest.approx((1, 2, 4))

"""Which batch size to serve at: measured, chosen by the search, used by everything after it."""

import json
import shutil

import pytest

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.recipe_text import parse_recipe
from tests.conftest import puzzle

SCENARIO = {"name": "chat", "batch_size": [1, 2, 4], "prefill_tokens": 16, "decode_tokens": 8}
MS_BY_BATCH = {1: 1.0, 2: 1.2, 4: 1.5}


@pytest.fixture
def swept(tiny_run, tiny_settings, tmp_path):
    """(recipe, run) whose costs grow with the batch size as MS_BY_BATCH says."""
    shutil.copytree(tiny_run, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    table = json.loads(run.costs("torch").read_text())
    (one,) = table["scenarios"].values()
    del one["measured"]  # models' own times, which the search does not read

    def scaled(value, factor):
        return {k: scaled(v, factor) for k, v in value.items()} if isinstance(value, dict) else value * factor

    table["scenarios"] = {f"chat-b{size}": scaled(one, factor) for size, factor in MS_BY_BATCH.items()}
    run.costs("torch").write_text(json.dumps(table))
    return parse_recipe(json.dumps({**tiny_settings, "scenarios": [SCENARIO]})), run


def throughput(costs, architecture):
    (scenario,) = costs.scenarios
    return 1e3 * scenario.batch_size * scenario.decode_tokens / costs.request_ms(architecture, scenario)


def test_the_search_chooses_the_batch_size_that_harms_least(swept):
    recipe, run = swept
    tables = CostTable.load_mixes(run, recipe)
    parent = ArchitectureSearch.load_with(tables[0], recipe, run).parent
    limits = {"throughput_tokens_per_second": 1.3 * throughput(tables[1], parent)}
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, limits)
    # At batch 4 the parent itself is fast enough.
    assert [s.batch_size for s in found.costs.scenarios] == [4]
    assert found.architecture(found.solve(limits, 0, 60)[0]) == found.parent
    # Memory may forbid it.
    limits["memory_bytes"] = tables[1].memory_bytes(parent)
    tight = ArchitectureSearch.at_best_batch_sizes(recipe, run, limits)
    lowest = {}
    for costs in tables:
        at = ArchitectureSearch.load_with(costs, recipe, run)
        try:
            lowest[costs.scenarios[0].batch_size] = at.solve(limits, 0, 60)[0].score
        except InfeasibleError:
            continue
    assert tight.costs.scenarios[0].batch_size == min(lowest, key=lowest.__getitem__)
    with pytest.raises(
        InfeasibleError, match=r"At no batch size of scenarios; at the largest .chat-b4 at 4.*can reach"
    ):
        ArchitectureSearch.at_best_batch_sizes(recipe, run, {"throughput_tokens_per_second": 1e9})


def test_a_run_with_batch_sizes_says_what_to_serve_at(tiny_settings, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    settings = {**tiny_settings, "scenarios": [{**SCENARIO, "batch_size": [1, 2]}]}
    settings |= {
        "search": {"limits": {"parameters": 6.5e5}, "effort": "fast"},
        "bld": {"tokens": 0},
        "gkd": {"tokens": 0},
    }
    recipe.write_text(json.dumps(settings))
    puzzle("run", recipe, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (scenario,) = summary["scenarios"]
    assert scenario["name"] == f"chat-b{scenario['batch_size']}" and scenario["batch_size"] in (1, 2)
    costs = json.loads((tmp_path / "run/costs/torch.json").read_text())
    assert list(costs["scenarios"]) == ["chat-b1", "chat-b2"]
    measured = json.loads((tmp_path / "run/measured.json").read_text())
    assert list(measured["scenarios"]) == [scenario["name"]]

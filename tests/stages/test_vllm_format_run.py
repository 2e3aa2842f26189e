"""A run that searches int8 on vLLM, from nothing to an export that vLLM computes as the child does."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.machine import int8_sums_saturate
from puzzle_nas.pipeline import open_run
from tests.conftest import puzzle
from tests.stages.test_bad_input import check_refused

exact_int8 = pytest.mark.skipif(int8_sums_saturate(), reason="vLLM's int8 products are wrong without VNNI")
LIMIT_BYTES = 1_100_000
"""Of weights, cache and activations: less than any child in full shape takes in bfloat16."""


@pytest.fixture(scope="module")
def recipe(tiny_settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "formats.yaml"
    settings = {**tiny_settings, "engine": "vllm-eager", "costs": {"mixtures": 2}}
    settings["search_space"] = {"kv_heads": [1], "width_fractions": [0.5], "formats": ["int8"]}
    settings["search"] = {"limits": {"memory_bytes": LIMIT_BYTES}, "effort": "fast"}
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "formats"
    puzzle("run", recipe, "--run-dir", folder)
    return RunFolder(folder)


@exact_int8
def test_the_child_is_in_int8_but_for_its_head(run):
    found = read_json(run.architecture())
    architecture = Architecture.from_list(found["architecture"])
    assert architecture.formats == ("int8",) and architecture.head.format is None
    assert found["memory_bytes"] <= LIMIT_BYTES
    child = Child.load(run / "child-gkd")
    assert child.matrices.keys() == child.forms.keys() and child.matrices
    summary = read_json(run.summary)
    assert summary["baselines"]["parent@int8"]["speedup_measured"] > 0
    assert 0 < summary["baselines"]["parent@int8"]["validation_kl_nats_assembled"] < 0.1


@exact_int8
def test_bytes_are_those_of_the_file(run, tmp_path):
    child, costs = Child.load(run / "child-gkd"), ArchitectureSearch.load(open_run(run), run).costs
    EXPORTERS["vllm"].write(child, tmp_path, "bfloat16")
    of_weights = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    cache = sum(spec.cache_bytes(24, 32, 2) for _, _, spec in child.architecture) * 2
    working = costs.data["scenarios"]["chat"]["working_bytes"]
    assert costs.memory_bytes(child.architecture) == of_weights + cache + working


@exact_int8
def test_its_export_is_verified_on_vllm(run):
    puzzle("export", run.path, "--to", "vllm")
    (exported,) = (run / "exports").iterdir()
    record = read_json(exported / "export.json")
    assert exported.name == "vllm-int8" and record["tensor_types"]["I8"] == len(Child.load(run / "child-gkd").matrices)
    served = record["verification"]["bfloat16, as served"]
    assert record["verification"]["bfloat16"]["mean_nats"] < served["mean_nats"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search_space.formats=[q8_0]", "does not serve the format q8_0; set engine: llama.cpp"),
        ("search_space.formats=[int4]", "int4 cannot hold mlp.down_proj.weight of ffn.w341@int4: its rows of 341"),
    ],
)
def test_mistakes(recipe, tmp_path, override, sentence):
    check_refused("run", recipe, override, "--to", "measure-costs", "--run-dir", tmp_path / "r", contains=[sentence])


def test_a_processor_whose_int8_products_overflow(recipe, tmp_path, monkeypatch):
    """As oneDNN's are when it may not use VNNI: a child in int8 would be computed wrongly."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    check_refused("run", recipe, "--run-dir", tmp_path / "r", contains=["no VNNI", "leave out int8"])
    assert not (tmp_path / "r/stages/prepare_parent.json").exists()

"""Runs on parents of whose families llama.cpp serves the parent's own layers only: formats are all that is searched."""

import copy
import json

import gguf
import pytest
import torch
from transformers import AutoConfig

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import head_dim_of
from puzzle_nas.formats.stored import FILE, read_matrices
from puzzle_nas.pipeline import open_run
from tests.conftest import puzzle
from tests.exporters.children import OWN_LAYERS, SIZES, tokenizer
from tests.families.parents import random_parent

MEMORY_BYTES = {"gemma3_text": 400_000, "qwen3_moe": 930_000}
"""Two thirds of the parent's."""
ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}


@pytest.fixture(scope="module", params=MEMORY_BYTES)
def run(request, tiny_settings, tmp_path_factory):
    """A finished run."""
    family, folder = request.param, tmp_path_factory.mktemp("own")
    parent = random_parent(AutoConfig.for_model(family, **copy.deepcopy(SIZES | OWN_LAYERS[family])))
    parent.save_pretrained(folder / "parent")
    tokenizer().save_pretrained(folder / "parent")
    settings = {**tiny_settings, "parent": str(folder / "parent"), "engine": "llama.cpp"}
    nothing = ("kv_heads", "width_fractions", "expert_counts", "experts_per_token", "linear", "no_op")
    settings["search_space"] = {**{name: [] for name in nothing}, "formats": ["q8_0", "q4_0", "mxfp4"]}
    settings["search"] = {"limits": {"memory_bytes": MEMORY_BYTES[family]}, "effort": "normal"}
    settings["gkd"] = {**settings["gkd"], "also_train": ["experts"]}
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    puzzle("run", folder / "recipe.yaml", "--run-dir", folder / "run")
    return RunFolder(folder / "run")


@pytest.fixture
def family(run):
    """The parent's."""
    return Child.load(run / "child-gkd").family


def test_formats_are_searched_and_nothing_else(run, family):
    found = read_json(run.architecture())
    architecture = Architecture.from_list(found["architecture"])
    assert found["memory_bytes"] <= MEMORY_BYTES[family] and architecture.formats
    assert architecture.plain == Architecture.from_list(read_json(run.parent)["architecture"])
    table = read_json(run.costs("llama.cpp"))["scenarios"]["chat"]
    assert {"first part of 2", "first part of 4", "parent@mxfp4"} < set(table["measured"])


def test_distilling_keeps_scales_and_the_checkpoint_is_what_is_stored(run, family):
    refitted = read_json(run / "refit.json")["kept"]
    before, after = (read_matrices(run / name / FILE) for name in ("child-refit" if refitted else "child", "child-gkd"))
    child = Child.load(run / "child-gkd")
    changed = set()
    for name, matrix in after.items():
        assert torch.equal(matrix.rounded.grid.step_OG, before[name].rounded.grid.step_OG)
        assert torch.equal(matrix.weight, child.model.get_parameter(name))
        if not torch.equal(matrix.rounded.codes_OI, before[name].rounded.codes_OI):
            changed.add(name.rpartition(".")[2])
    gkd = read_json(run / "gkd.json")
    if gkd["selection_kl_nats_best"] < gkd["selection_kl_nats_start"]:
        assert changed >= ({"gate_up_proj", "down_proj"} if family == "qwen3_moe" else {"weight"})


def test_bytes_are_those_of_the_file(run, tmp_path):
    child, found = Child.load(run / "child-gkd"), ArchitectureSearch.load(open_run(run), run)
    EXPORTERS["gguf"].write(Child(child.model, None, matrices=child.matrices), tmp_path, "bfloat16")
    written = sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    cache = sum(spec.cache_bytes(24, head_dim_of(child.config), 2) for _, _, spec in child.architecture) * 2
    working = found.costs.data["scenarios"]["chat"]["working_bytes"]
    assert found.costs.memory_bytes(child.architecture) == written + cache + working


def test_the_child_is_exported_verified_served_and_timed(run, family, tmp_path):
    out = puzzle("export", run, "--to", "gguf", "--out", tmp_path).stdout
    (exported,) = tmp_path.iterdir()
    record = json.loads((exported / EXPORT_RECORD).read_text())
    assert str(exported) in out and record["verification"]["float32"]["num_tokens"] >= 512
    file = gguf.GGUFReader(exported / "model.gguf")
    assert file.fields["general.architecture"].contents() == ARCHITECTURES[family]
    if family == "qwen3_moe":
        return
    arguments = ("--engine", "llama.cpp", "--scenarios", "32/8", "--scale", "1", "--batch-sizes", "1", "--repeats", "1")
    puzzle("bench", exported, exported, *arguments, "--out", tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["scenarios"]["32/8"]["child"]["kv_cache_bytes"] is None
    assert "unknown" in (tmp_path / "bench.html").read_text()

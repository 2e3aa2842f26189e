"""A run on a parent of whose family llama.cpp serves the parent's own layers only: formats are all that is searched."""

import json

import gguf
import pytest
from transformers import AutoConfig

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.engines.base import EXPORT_RECORD
from tests.conftest import puzzle
from tests.exporters.children import OWN_LAYERS, SIZES, tokenizer
from tests.families.parents import random_parent

MEMORY_BYTES = 400_000
"""Two thirds of the parent's."""


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("own")
    parent = random_parent(AutoConfig.for_model("gemma3_text", **SIZES | OWN_LAYERS["gemma3_text"]))
    parent.save_pretrained(folder / "parent")
    tokenizer().save_pretrained(folder / "parent")
    settings = {**tiny_settings, "parent": str(folder / "parent"), "engine": "llama.cpp"}
    only_formats = {"kv_heads": [], "width_fractions": [], "linear": [], "no_op": []}
    settings["search_space"] = {**only_formats, "formats": ["q8_0", "q4_0", "mxfp4"]}
    settings["search"] = {"limits": {"memory_bytes": MEMORY_BYTES}, "effort": "normal"}
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    puzzle("run", folder / "recipe.yaml", "--run-dir", folder / "run")
    return RunFolder(folder / "run")


def test_formats_are_searched_and_nothing_else(run):
    found = read_json(run.architecture())
    architecture = Architecture.from_list(found["architecture"])
    assert found["memory_bytes"] <= MEMORY_BYTES and architecture.formats
    assert architecture.plain == Architecture.from_list(read_json(run.parent)["architecture"])
    table = read_json(run.costs("llama.cpp"))["scenarios"]["chat"]
    assert {"1 layer of 2", "1 layer of 4", "parent@mxfp4"} < set(table["measured"])


def test_the_child_is_exported_verified_served_and_timed(run, tmp_path):
    out = puzzle("export", run, "--to", "gguf", "--out", tmp_path).stdout
    (exported,) = tmp_path.iterdir()
    record = json.loads((exported / EXPORT_RECORD).read_text())
    assert str(exported) in out and record["verification"]["float32"]["num_tokens"] >= 512
    file = gguf.GGUFReader(exported / "model.gguf")
    assert file.fields["general.architecture"].contents() == "gemma3"
    arguments = ("--engine", "llama.cpp", "--scenarios", "32/8", "--scale", "1", "--batch-sizes", "1", "--repeats", "1")
    puzzle("bench", exported, exported, *arguments, "--out", tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["scenarios"]["32/8"]["child"]["kv_cache_bytes"] is None
    assert "unknown" in (tmp_path / "bench.html").read_text()

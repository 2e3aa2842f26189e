"""A run that searches formats too, on llama.cpp: what it stores is what the engine reads, whatever was searched."""

from __future__ import annotations

import dataclasses
import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.refinement import Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import ENGINES
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.errors import ArtifactError, RecipeError
from puzzle_nas.evaluation.evaluate import Asked, evaluate
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import architecture_of, load_model, load_parent
from puzzle_nas.formats.stored import FILE, read_matrices
from puzzle_nas.library import assemble, matrices_path, read_variant, rounded_already, rounded_ends_of
from puzzle_nas.machine import machine_of
from puzzle_nas.pipeline import open_run
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.scoring.replacement import final_states
from puzzle_nas.specs import Head
from puzzle_nas.stages import distill_child
from puzzle_nas.training import parallel
from puzzle_nas.training.refitting import refit_if_better, rounded_ends
from tests.conftest import puzzle
from tests.stages.test_bad_input import check_refused

FORMATS = ("q8_0", "q4_0")
WIDTH = 352
"""Of the tiny parent's FFNs, once they are padded to whole blocks of 32."""


@pytest.fixture(scope="module")
def padded_parent(tiny_parent, tmp_path_factory):
    """The tiny parent with channels of zeros, so that every row divides into blocks; the same function."""
    folder = tmp_path_factory.mktemp("padded")
    for file in tiny_parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if ".mlp." in name:
            added = [0, WIDTH - weight.shape[1]] if "down_proj" in name else [0, 0, 0, WIDTH - weight.shape[0]]
            weights[name] = torch.nn.functional.pad(weight, added).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": WIDTH}))
    return folder


@pytest.fixture(scope="module")
def recipe(padded_parent, tiny_settings, tmp_path_factory):
    """A recipe file; the limit in bytes is one that no child in full precision meets."""
    path = tmp_path_factory.mktemp("recipes") / "formats.yaml"
    settings = {**tiny_settings, "parent": str(padded_parent), "engine": "llama.cpp", "kv_format": "q8_0"}
    settings["search_space"] = {"kv_heads": [1], "width_fractions": [0.5], "formats": list(FORMATS)}
    settings["search"] = {"limits": {"memory_bytes": 400_000}, "effort": "normal"}
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "formats"
    puzzle("run", recipe, "--run-dir", folder)
    return RunFolder(folder)


def test_the_child_is_stored_in_the_formats_that_were_searched(run):
    found = read_json(run.architecture())
    architecture = Architecture.from_list(found["architecture"])
    assert architecture.formats and found["memory_bytes"] <= 400_000
    for folder in ("child", "child-gkd", "baselines/parent@q4_0"):
        child = Child.load(run / folder)
        stored = {name: matrix.form for name, matrix in child.matrices.items()}
        wanted = {name: form for name, form in _formats_of(child).items() if form}
        assert stored == wanted and stored
        weights = load_file(run / folder / "model.safetensors")
        for name, matrix in read_matrices(run / folder / FILE).items():
            assert torch.equal(weights[name], matrix.weight.to(weights[name].dtype))


def _formats_of(child):
    """By the name of every matrix, its format."""
    kinds = {"self_attn": "attention", "mlp": "ffn"}
    found = {"model.embed_tokens.weight": child.architecture.head.format}
    for name, weight in child.model.named_parameters():
        if ".layers." in name and weight.ndim > 1:
            _, _, layer, mixer, *_ = name.split(".")
            found[name] = child.architecture.layers[int(layer)][kinds[mixer]].format
    return found


def test_what_llama_cpp_reads_is_what_torch_has(run, tmp_path):
    child = Child.load(run / "child-gkd")
    EXPORTERS["gguf"].write(Child(child.model, None, matrices=child.matrices), tmp_path, "float32")
    file = gguf.GGUFReader(tmp_path / "model.gguf")
    read = sum(gguf.quants.dequantize(t.data, t.tensor_type).astype("float64").sum() for t in file.tensors)
    plain = child.rounded(torch.float32)
    assert EXPORTERS["gguf"].differing(plain, tmp_path, "float32") == []
    EXPORTERS["gguf"].write(Child(plain.model, None), tmp_path, "float32")
    again = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {t.tensor_type.name for t in again.tensors} == {"F32"}
    assert read == sum(t.data.astype("float64").sum() for t in again.tensors)
    # One bit of one weight is seen.
    plain.model.get_parameter("model.norm.weight").data[0] += 1e-6
    assert EXPORTERS["gguf"].differing(plain, tmp_path, "float32") == ["output_norm.weight"]


def test_assembled_it_is_what_was_scored(run):
    """The library's own bits, in the child and in the quantised parents; the rest is rounded on its way."""
    parent = load_parent(open_run(run), run)
    number = 0
    for folder in ("child", "baselines/parent@q8_0", "baselines/parent@q4_0"):
        architecture = Child.load(run / folder).architecture
        weights = load_file(run / folder / "model.safetensors")
        places = rounded_already(run, parent, architecture)
        in_formats = {(layer, slot) for layer, slot, spec in architecture if spec.format and not spec.empty}
        assert folder == "child" or set(places) == in_formats | {(len(architecture.layers), "head")}
        for layer, slot in places:
            spec = architecture.layers[layer][slot] if slot != "head" else architecture.head
            prefix = f"model.layers.{layer}." if slot != "head" else ""
            for name, weight in read_variant(run.variant(layer, spec.id), "distill-blocks").items():
                assert torch.equal(weights[prefix + name], weight), (folder, layer, name)
                number += 1
    assert number


def test_refitting_keeps_the_ends_that_the_library_rounded(run):
    parent = load_parent(open_run(run), run)
    own = architecture_of(parent.config)
    child = dataclasses.replace(own, head=own.head.stored("q4_0"))
    (ends,) = rounded_ends_of(run, parent, child).values()
    tokens = load_tokens(run, "calibration")[:4]
    reference = ParentReference(parent, load_tokens(run, "selection"))
    place = (len(own.layers), own.head.slot)
    _, stored, _ = refit_if_better(parent, assemble(run, parent, child), reference, tokens, already={place: ends})
    assert stored.keys() == ends.keys() == {"model.embed_tokens.weight"}
    assert all(torch.equal(stored[name].rounded.codes_OI, matrix.rounded.codes_OI) for name, matrix in ends.items())
    # On other text they would be others.
    again = rounded_ends(parent, "q4_0", final_states(parent, tokens, 4))
    assert not all(torch.equal(again[name].rounded.codes_OI, m.rounded.codes_OI) for name, m in ends.items())


def test_a_damaged_file_of_codes_is_refused(run, tmp_path):
    copied = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    parent = load_parent(open_run(copied), copied)
    own = architecture_of(parent.config)
    for layer, spec in ((1, own.layers[1]["ffn"].stored("q8_0")), (len(own.layers), own.head.stored("q8_0"))):
        child, file = own.replaced(layer, spec), matrices_path(copied.initial_variant(layer, spec.id))
        assert rounded_already(copied, parent, child)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(
            ArtifactError, match=f"{spec.id}.formats.safetensors is missing or corrupted. Make it again"
        ):
            rounded_already(copied, parent, child)


def test_distilling_keeps_scales_and_lowers_kl(run):
    gkd = read_json(run / "gkd.json")
    assert gkd["selection_kl_nats_best"] < gkd["selection_kl_nats_start"]
    refitted = read_json(run / "refit.json")["kept"]
    before, after = (read_matrices(run / name / FILE) for name in ("child-refit" if refitted else "child", "child-gkd"))
    changed = 0
    for name, matrix in after.items():
        assert torch.equal(matrix.rounded.grid.step_OG, before[name].rounded.grid.step_OG)
        changed += not torch.equal(matrix.rounded.codes_OI, before[name].rounded.codes_OI)
    assert changed > len(after) // 2
    recipe = open_run(run)
    start = load_model(run / "child-gkd", machine_of(recipe))
    parent = load_parent(recipe, run)
    trials = Trials(run, parent, recipe, {s: load_tokens(run, s) for s in ("calibration", "scoring", "selection")})
    assert trials._selection.compare(start).kl_nats == pytest.approx(gkd["selection_kl_nats_best"], rel=1e-6)


def test_scores_add_up_and_the_summary_has_the_quantised_parents(run):
    found = ArchitectureSearch.load(open_run(run), run)
    heads = {spec.format: score for (layer, (spec,)), score in found.scores.items() if isinstance(spec, Head)}
    assert list(heads) == [None, *FORMATS] and 0 == heads[None] < heads["q8_0"] < heads["q4_0"]
    for layer, (spec,) in found.scores:
        if spec.format and not isinstance(spec, Head):
            own = found.space.own(layer, spec.slot)
            parts = found.scores[layer, (spec.plain,)], found.scores[layer, (own.stored(spec.format),)]
            assert found.scores[layer, (spec,)] == pytest.approx(sum(parts))
    baselines = read_json(run.summary)["baselines"]
    kl, speeds = (
        [baselines[f"parent@{form}"][key] for form in FORMATS]
        for key in ("validation_kl_nats_assembled", "speedup_measured")
    )
    assert 0 < kl[0] < kl[1] and min(speeds) > 0
    sizes = [found.costs.memory_bytes(a) for a in (found.parent, *found.space.quantised_parents.values())]
    assert sizes == sorted(sizes, reverse=True)


def test_bytes_are_those_of_the_file(run, tmp_path):
    """The zeros in place of a removed FFN are counted as often as they can come, those of a first attention are not."""
    found = ArchitectureSearch.load(open_run(run), run)
    child = Child.load(run / "child-gkd")
    EXPORTERS["gguf"].write(Child(child.model, None, matrices=child.matrices), tmp_path, "bfloat16")
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    architecture = child.architecture
    zeros = tuple(t.name.removesuffix("gate.weight") for t in tensors if "ffn_gate" in t.name and not t.data.any())
    if architecture.layers[0]["attention"].empty:
        tensors = [t for t in tensors if not t.name.startswith("blk.0.attn_")]
    of_zeros = sum(int(t.n_bytes) for t in tensors if t.name.startswith(zeros))
    of_weights = sum(int(t.n_bytes) for t in tensors) - of_zeros
    fillers = sum(ENGINES["llama.cpp"].filler_bytes(spec, child.config) for _, _, spec in architecture)
    assert of_zeros <= fillers
    cache = sum(spec.cache_bytes(24, 32, 34 / 32) for _, _, spec in architecture) * 2
    working = found.costs.data["scenarios"]["chat"]["working_bytes"]
    assert found.costs.memory_bytes(architecture) == of_weights + fillers + cache + working


def test_an_export_is_evaluated_as_its_engine_computes_it(run, padded_parent, tmp_path):
    """The engine rounds activations to eight bits; in float32 it computes what torch does."""
    text = tmp_path / "text.txt"
    text.write_text((padded_parent / "config.json").read_text() * 4)
    asked = Asked((str(text),), sequence_length=32, tokens=256)
    found = {}
    child = Child.load(run / "child-gkd")
    written = {"formats": Child(child.model, None, matrices=child.matrices), "plain": child.rounded(torch.float32)}
    for name, what in written.items():
        folder = tmp_path / name
        folder.mkdir()
        EXPORTERS["gguf"].write(Child(what.model, None, matrices=what.matrices), folder, "float32")
        write_json(folder / EXPORT_RECORD, {"format": "gguf", "precision": "float32"})
        found[name] = evaluate(folder, padded_parent, asked)["text"]["all"]["kl_nats"]["mean"]
    torchs = evaluate(run / "child-gkd", padded_parent, asked)["text"]["all"]["kl_nats"]["mean"]
    # The KV cache has 16 bits.
    assert found["plain"] == pytest.approx(torchs, rel=1e-2)
    assert found["formats"] == pytest.approx(torchs, rel=0.2) and found["formats"] != found["plain"]
    check_refused("evaluate", tmp_path / "formats", "--data", text, contains=["is an export", "--parent"])


def test_an_export_is_evaluated_with_the_kv_cache_that_it_is_served_with(padded_parent, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((padded_parent / "config.json").read_text() * 4)
    EXPORTERS["gguf"].write(Child(Child.load(padded_parent).model, None), tmp_path, "float32")
    found = []
    for kv_format in ("f32", "q8_0", "q4_0"):
        write_json(tmp_path / EXPORT_RECORD, {"format": "gguf", "precision": "float32", "kv_format": kv_format})
        asked = Asked((str(text),), sequence_length=32, tokens=256)
        found.append(evaluate(tmp_path, padded_parent, asked)["text"]["all"]["kl_nats"]["mean"])
    assert found[0] < found[1] < found[2] / 10


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("engine=torch", "the engine torch does not serve the format q8_0; set engine: llama.cpp"),
        ("search_space.formats=[q3_x]", "There is no format q3_x; formats are bf16"),
        ("search_space.formats=[int8]", "the engine llama.cpp does not serve the format int8"),
        ("search_space.formats=[q4_k]", "q4_k cannot hold self_attn.q_proj.weight of attention.kv2@q4_k"),
        ("kv_format=q3", "the engine llama.cpp has no KV cache in q3; choose one of f32, f16, bf16, q8_0"),
        ("search.limits={memory_bytes: 1000}", "memory_bytes=1000 can reach"),
    ],
)
def test_mistakes(recipe, run, tmp_path, override, sentence):
    check_refused("run", recipe, override, "--to", "measure-costs", "--run-dir", tmp_path / "r", contains=[sentence])


def test_several_processes_are_refused_before_anything_is_trained(run, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="distilled by one process"):
        distill_child.run(open_run(run), run)

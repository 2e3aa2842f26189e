"""What passes the examination, what prepare-parent and inspect make of it, and what the fingerprint sees."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.commands.parents import inspect_command
from puzzle_nas.errors import ArtifactError, CheckpointError
from puzzle_nas.exporters.served import may_become
from puzzle_nas.families import open_parent
from puzzle_nas.parents import describe, examine, parent_fingerprint
from puzzle_nas.recipe_text import parse_recipe
from tests.parents.checkpoints import byte_tokenizer, edit, logits_of, reweigh, theirs, tiny, write_gguf
from tests.parents.test_quantised import as_fp8
from tests.stages.test_bad_input import check_refused


def add_harmless(weights):
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.rotary_emb.inv_freq"] = torch.ones(8)


def test_harmless_extras_pass(tmp_path):
    folder = tiny(tmp_path / "p")
    reweigh(folder, add_harmless)
    assert examine(folder).warnings == ()


def test_a_tied_head_that_is_stored_and_equal_passes(tmp_path):
    folder = tiny(tmp_path / "p", tie_word_embeddings=True)
    reweigh(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    examined = examine(folder)
    assert torch.equal(logits_of(open_parent(folder, examined)[0]), logits_of(theirs(folder)))
    assert examined.parameters == sum(p.numel() for p in theirs(folder).parameters())


def test_an_index_that_names_the_whole_file_passes(tmp_path):
    folder = tiny(tmp_path / "p")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert examine(folder).warnings == ()


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_pickled_weights_and_names_without_prefix_pass(prefix, tmp_path):
    folder = tiny(tmp_path / "p")
    weights = {name.replace("model.", prefix): w for name, w in load_file(folder / "model.safetensors").items()}
    wanted = logits_of(theirs(folder))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    examined = examine(folder)
    assert examined.stored.format == "pytorch" and len(examined.stored.tensors) == len(weights)
    assert torch.equal(logits_of(open_parent(folder, examined)[0]), wanted)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("mixtral", {"num_local_experts": 3}),
        ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("gemma3_text", {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_families_pass_and_a_missing_tensor_is_named(family, changes, tmp_path):
    folder = tiny(tmp_path / "p", family, **changes)
    examined = examine(folder)
    assert examined.parameters == sum(p.numel() for p in theirs(folder).parameters())
    name = next(n for n in sorted(examined.stored.tensors) if "mlp" in n or "moe" in n)
    reweigh(folder, lambda w: w.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks .* weights? .*{name.split('.mlp')[0].split('.block')[0]}"):
        examine(folder)


def test_inspect_prints_what_was_found(tmp_path, capsys):
    folder = tiny(tmp_path / "p", tokenizer=byte_tokenizer(eos="<|im_end|>"), rope_parameters=None)
    inspect_command(str(folder), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == {**describe(examine(folder)), **may_become(examine(folder))}
    assert found["family"] == "llama" and found["parameters"] == 108_864 and found["sizes"]["num_key_value_heads"] == 2
    assert found["rope"] == {"rope_theta": 10000.0, "rope_type": "default"} and found["types"] == {"float32": 21}
    assert found["document_separator"] == {"id": 0, "text": "<|endoftext|>"} and found["bos"] is None
    assert found["end_tokens"] == [{"id": 0, "text": "<|endoftext|>"}, {"id": 2, "text": "<|im_end|>"}]
    inspect_command(str(write_gguf(folder, tmp_path / "p.gguf", pre="smollm")))
    lines = capsys.readouterr().out.splitlines()
    assert "tokenizer           272 entries, split as smollm" in lines and "chat template       none" in lines
    assert "unusual             nothing" in lines and any("21 F32" in line for line in lines)


def test_inspect_says_what_slots_may_become_and_what_serves_them(tmp_path, capsys):
    hybrid = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    found = {}
    for family, changes in {"llama": {}, "qwen3": {}, "lfm2": hybrid, "stablelm": {}}.items():
        inspect_command(str(tiny(tmp_path / family, family, **changes)), as_json=True)
        found[family] = json.loads(capsys.readouterr().out)
    assert found["llama"]["slots"]["attention"] == {"layers": 2, "may_become": ["grouped", "window", "linear", "no_op"]}
    assert found["llama"]["not_served_by"] == {} and found["llama"]["served_by"]["llama.cpp"] == ["window"]
    assert found["qwen3"]["served_by"]["llama.cpp"] == ["sizes but the parent's"]
    assert found["qwen3"]["not_served_by"]["vllm-stock"] == ["it has no layers of qwen3"]
    assert "vllm" in found["qwen3"]["served_by"] and found["lfm2"]["slots"]["attention"]["layers"] == 1
    assert found["lfm2"]["not_served_by"]["vllm"][-1] == "it has no layers of lfm2"
    assert found["stablelm"]["slots"] == found["stablelm"]["served_by"] == {}
    inspect_command(str(tmp_path / "qwen3"))
    lines = capsys.readouterr().out.splitlines()
    assert "slots may become    attention of 2 layers: grouped, window, linear, no_op" in lines
    assert "served by           transformers, vllm, llama.cpp (no sizes but the parent's)" in lines
    inspect_command(str(tmp_path / "stablelm"))
    assert "unknown: stablelm has no adapter (docs/new-family.md)" in capsys.readouterr().out


def test_inspect_refuses_in_one_sentence(tmp_path):
    folder = tiny(tmp_path / "p")
    edit(folder / "config.json", rms_norm_eps="1e-5")
    check_refused("inspect", folder, contains=["rms_norm_eps: '1e-5'"])


def prepare(settings, run_dir):
    recipe = parse_recipe(json.dumps(settings))
    pipeline.run_stages(recipe, RunFolder(run_dir), last="prepare-parent")


def test_prepare_parent_stops_and_goes_on_once_the_mistake_is_corrected(tmp_path, tiny_settings):
    settings = {**tiny_settings, "parent": str(tmp_path / "wrong"), "memory": "stream"}
    with pytest.raises(CheckpointError, match="no checkpoint"):
        prepare(settings, tmp_path / "r")
    shutil.copytree(tiny_settings["parent"], tmp_path / "right")
    edit(tmp_path / "right/config.json", num_hidden_layers=3)
    settings["parent"] = str(tmp_path / "right")
    with pytest.raises(CheckpointError, match="num_hidden_layers: 3, but layers 0 to 3 are stored"):
        prepare(settings, tmp_path / "r")
    edit(tmp_path / "right/config.json", num_hidden_layers=4)
    prepare(settings, tmp_path / "r")
    assert (tmp_path / "r/parent.json").is_file()
    with pytest.raises(ArtifactError, match="belongs to another recipe"):
        prepare(tiny_settings, tmp_path / "r")


@pytest.fixture
def parent(tmp_path):
    folder = tiny(tmp_path / "p")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def change_a_byte(file):
    """In the middle, with size and time of change as before."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "chat_template.jinja", "tokenizer.json", "generation_config.json"],
)
def test_the_fingerprint_sees_any_changed_byte(name, parent, tmp_path):
    cache = tmp_path / "hashes.json"
    before = parent_fingerprint(parent, cache)
    assert parent_fingerprint(parent, cache) == before == parent_fingerprint(parent, tmp_path / "other.json")
    change_a_byte(parent / name)
    assert parent_fingerprint(parent, cache) != before


def test_the_fingerprint_does_not_look_at_what_nobody_reads(parent, tmp_path):
    before = parent_fingerprint(parent, tmp_path / "hashes.json")
    (parent / "README.md").write_text("x")
    (parent / "training_args.bin").write_bytes(b"x")
    os.utime(parent / "config.json")
    assert parent_fingerprint(parent, tmp_path / "hashes.json") == before


def test_a_second_look_reads_nothing(parent, tmp_path, monkeypatch):
    cache = tmp_path / "hashes.json"
    before = parent_fingerprint(parent, cache)
    monkeypatch.setattr("puzzle_nas.parents.fingerprint._digest", None)
    assert parent_fingerprint(parent, cache) == before
    monkeypatch.undo()
    cache.write_text("damaged")
    assert parent_fingerprint(parent, cache) == before


def test_a_changed_parent_is_noticed_by_a_run(tmp_path, tiny_settings, capsys):
    shutil.copytree(tiny_settings["parent"], tmp_path / "p")
    settings = {**tiny_settings, "parent": str(tmp_path / "p")}
    prepare(settings, tmp_path / "r")
    prepare(settings, tmp_path / "r")
    assert capsys.readouterr().out.count("already done") == 1
    (tmp_path / "p/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    prepare(settings, tmp_path / "r")
    assert "already done" not in capsys.readouterr().out


def test_an_fp8_parent_is_written_out_whole_and_read_where_it_lies_streamed(tmp_path, tiny_settings):
    folder = tiny(tmp_path / "p")
    as_fp8(folder)
    settings = {**tiny_settings, "parent": str(folder)}
    prepare(settings, tmp_path / "whole")
    assert torch.allclose(logits_of(theirs(tmp_path / "whole/parent")), logits_of(theirs(folder)), atol=1e-4)
    prepare({**settings, "memory": "stream"}, tmp_path / "streamed")
    assert not (tmp_path / "streamed/parent").exists()
    facts = [json.loads((tmp_path / name / "parent.json").read_text()) for name in ("whole", "streamed")]
    assert facts[0]["architecture"] == facts[1]["architecture"]

"""Every sentence of `problems`, met by a file as people have it."""

import json
import re
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import find_checkpoint
from puzzle_nas.parents import PROBLEMS, examine
from tests.parents.checkpoints import byte_tokenizer, edit, reweigh, tiny, write_gguf

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 269060552\n"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint, the same in shards, and the same as GGUF; tests spoil copies."""
    folder = tmp_path_factory.mktemp("sound")
    tiny(folder / "whole")
    tiny(folder / "shards", shards=True)
    write_gguf(folder / "whole", folder / "whole.gguf")
    return folder


def weights_of(folder):
    return load_file(folder / SINGLE)


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def changed(change):
    return lambda folder: reweigh(folder, change)


def quantised(**fields):
    return config(quantization_config=fields)


def in_shards(change):
    """Spoil the sharded checkpoint instead of the whole one."""
    return change, "shards"


def in_gguf(*fields, **arguments):
    """Another GGUF file of the whole checkpoint."""

    def write(folder):
        write_gguf(folder, folder.parent / "p.gguf", fields=fields, **arguments)
        return folder.parent / "p.gguf"

    return write


def spoilt_gguf(change):
    def spoil(folder):
        path = folder.parent / "p.gguf"
        path.write_bytes(change(write_gguf(folder, path).read_bytes()))
        return path

    return spoil


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def index_of(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def move_in_index(folder):
    names = index_of(folder)
    first, last = min(names.values()), max(names.values())
    tensor = next(name for name, file in names.items() if file == first)
    edit(folder / INDEX, weight_map={**names, tensor: last})


def drop_from_index(folder):
    names = index_of(folder)
    files = list(names.values())
    names.pop(next(name for name, file in names.items() if files.count(file) > 1))
    edit(folder / INDEX, weight_map=names)


def store_twice(folder):
    names = index_of(folder)
    files = sorted(set(names.values()))
    first, last = (load_file(folder / name) for name in (files[0], files[-1]))
    last |= {name: weight for name, weight in first.items() if name not in last}
    save_file(last, folder / files[-1], metadata={"format": "pt"})


def pickled(value):
    def write(folder):
        (folder / SINGLE).unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return write


def both_names(weights):
    weights["layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].clone()


def tied_but_stored(folder):
    edit(folder / "config.json", tie_word_embeddings=True)


def only_other_weights(folder):
    (folder / SINGLE).rename(folder / "consolidated.00.pth")


def heads_that_do_not_go_together(folder):
    shutil.rmtree(folder)
    tiny(folder, num_key_value_heads=3)


def longer_tokenizer(folder):
    byte_tokenizer(extra=[f"w{i}" for i in range(20)]).save_pretrained(folder)


def renamed_model(folder):
    edit(folder / "tokenizer.json", model={**json.loads((folder / "tokenizer.json").read_text())["model"], "type": "X"})


def another_architecture(data):
    return data.replace(b"llama", b"lxama")


CASES = {
    "no checkpoint": [(lambda folder: folder / "nowhere", ["nowhere"])],
    "no config": [
        (without("config.json"), ["has no config.json."]),
        (
            lambda f: f.rename(f.parent / "snapshot") and (f.mkdir(), (f.parent / "snapshot").rename(f / "b"))[0],
            ["b has one"],
        ),
    ],
    "a file of it": [(lambda f: f / SINGLE, ["model.safetensors is a file", "name "])],
    "adapter": [
        (
            lambda f: (edit(f / "config.json"), (f / "config.json").rename(f / "adapter_config.json"))[1] and None,
            ["LoRA", "merge_and_unload"],
        )
    ],
    "adapter beside a model": [(written("adapter_config.json", "{}"), ["LoRA", "adapter_config.json"])],
    "Git LFS pointer": [
        (written(SINGLE, POINTER), [SINGLE, "git lfs pull"]),
        (written("tokenizer.json", POINTER), ["tokenizer.json"]),
        (written("config.json", POINTER), ["config.json"]),
        (in_shards(lambda f: first_shard(f).write_text(POINTER)), ["model-00001"]),
        (spoilt_gguf(lambda data: POINTER.encode()), ["p.gguf"]),
    ],
    "web page": [(written(SINGLE, "<!DOCTYPE html><html>404</html>"), [SINGLE, "download failed"])],
    "not JSON": [
        (cut("config.json", 40), ["config.json"]),
        (written("tokenizer_config.json", "{'a': 1}"), ["tokenizer_config.json"]),
        (in_shards(cut(INDEX, 100)), [INDEX]),
        (written("generation_config.json", "nothing"), ["generation_config.json"]),
    ],
    "not an object": [
        (written("config.json", "[]"), ["a list"]),
        (in_shards(written(INDEX, "{}")), ["no weight_map"]),
        (pickled([1, 2]), ["pytorch_model.bin"]),
    ],
    "no weights": [(without(SINGLE), ["pytorch_model.bin"])],
    "other weights": [(only_other_weights, ["consolidated.00.pth"])],
    "cut file": [
        (cut(SINGLE, 100_000), [SINGLE]),
        (cut(SINGLE, 0), [SINGLE]),
        (cut(SINGLE, 20), [SINGLE]),
        (in_shards(lambda f: cut(first_shard(f).name, 5000)(f)), ["model-00001"]),
        (lambda f: (pickled({"a": torch.ones(99)})(f), cut("pytorch_model.bin", 500)(f))[0], ["pytorch_model.bin"]),
    ],
    "unsafe file": [(pickled({"a": re.compile("x")}), ["run code"])],
    "two parents": [(lambda f: shutil.copy(f.parent / "shards" / INDEX, f / INDEX) and None, [SINGLE, INDEX])],
    "empty index": [(in_shards(lambda f: edit(f / INDEX, weight_map={})), ["weight_map is empty"])],
    "missing shard": [(in_shards(lambda f: first_shard(f).unlink()), ["model-00001"])],
    "index and shard disagree": [(in_shards(move_in_index), [INDEX])],
    "not in the index": [(in_shards(drop_from_index), [INDEX])],
    "tensor twice": [(in_shards(store_twice), ["model-00001"])],
    "field": [
        (config(initializer_range=1), ["initializer_range: 1,", "a number with a point"]),
        (config(rms_norm_eps="1e-5"), ["rms_norm_eps: '1e-5'", "a number with a point"]),
        (config(eos_token_id="0"), ["eos_token_id: '0'", "a whole number"]),
        (config(tie_word_embeddings="true"), ["tie_word_embeddings: 'true'", "true or false"]),
        (config(vocab_size=272.0), ["vocab_size: 272.0", "a whole number"]),
        (config(num_hidden_layers=5), ["num_hidden_layers: 5", "layers 0 to 1 are stored"]),
        (config(num_hidden_layers=10**9), ["num_hidden_layers: 1000000000", "layers 0 to 1 are stored"]),
        (config(rope_theta=1e6), ["rope_theta: 1000000.0", "rope_parameters says 10000.0"]),
        (config(model_type=None), ["model_type: None"]),
        (
            lambda f: edit(f / "generation_config.json", eos_token_id=[0, 999]),
            ["generation_config.json says eos_token_id: 999", "271"],
        ),
        (
            lambda f: edit(f / "generation_config.json", eos_token_id="0"),
            ["generation_config.json says eos_token_id: '0'"],
        ),
    ],
    "contradiction": [
        (config(num_attention_heads=5), ["hidden size (64)", "attention heads (5)"]),
        (config(rope_parameters={"rope_type": "linear"}), ["factor"]),
        (config(layer_types=["none"]), ["layer_types"]),
    ],
    "unknown model": [(config(model_type="llama9"), ["llama9", "5."])],
    "own code": [
        (config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"}), ["configuration_mine.py"])
    ],
    "not a language model": [(config(model_type="vit"), ["vit"])],
    "no class": [
        (config(hidden_act="sillu"), ["sillu"]),
        (config(rope_parameters={"rope_type": "lienar", "factor": 2.0}), ["lienar"]),
        (config(hidden_size=-64), ["-64"]),
        (config(pad_token_id=9999), ["adding_idx"]),
    ],
    "missing tensors": [
        (changed(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), ["layers.1.mlp.up_proj.weight"]),
        (config(attention_bias=True), ["attention_bias: True"]),
        (changed(lambda w: w.pop("lm_head.weight")), ["lm_head.weight", "tie_word_embeddings: False"]),
    ],
    "unused tensors": [
        (
            changed(lambda w: w.update({f"model.layers.0.self_attn.{n}_proj.bias": torch.ones(9) for n in "qkv"})),
            ["3 weights", "attention_bias: False"],
        ),
        (config(num_hidden_layers=1), ["9 weights", "num_hidden_layers: 1", "layers 0 to 1"]),
        (
            changed(lambda w: w.update({"value_head.weight": torch.ones(4)})),
            ["1 weight that", "(archit"],
        ),
    ],
    "shapes": [
        (config(vocab_size=280), ["[272, 64]", "[280, 64]", "vocab_size: 280"]),
        (config(num_key_value_heads=1), ["[32, 64]", "num_key_value_heads: 1"]),
        (config(intermediate_size=96), ["intermediate_size: 96"]),
    ],
    "same place": [(changed(both_names), ["layers.0.mlp.up_proj.weight"])],
    "tied and stored": [(tied_but_stored, ["lm_head.weight", "tie_word_embeddings: false"])],
    "integers": [
        (changed(lambda w: w.update({k: v.to(torch.int8) for k, v in w.items() if "up_proj" in k})), ["int8"]),
        (changed(lambda w: w.update({k: v.to(torch.float8_e4m3fn) for k, v in w.items() if "up_" in k})), ["float8"]),
    ],
    "not computed": [(heads_that_do_not_go_together, ["size of tensor a"])],
    "quantised": [
        (quantised(quant_method="gptq", bits=4, group_size=128), ["GPTQ", "gptqmodel"]),
        (quantised(quant_method="awq", bits=4, group_size=128), ["AWQ", "gptqmodel"]),
        (quantised(load_in_4bit=True), ["bitsandbytes", "dequantize()"]),
        (quantised(quant_method="hqq"), ["HQQ"]),
        (config(quantization={"group_size": 64, "bits": 4}), ["MLX"]),
        (written("hf_quant_config.json", "{}"), ["ModelOpt"]),
        (written("quantize_config.json", "{}"), ["GPTQ"]),
        (quantised(quant_method="fp8", weight_block_size=[1]), ["fp8"]),
    ],
    "unsaid quantisation": [
        (changed(lambda w: w.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(4)})), ["as GPTQ or AWQ writes"]),
        (
            changed(lambda w: w.update({"model.layers.0.mlp.experts.up_proj_blocks": torch.ones(4)})),
            ["as mxfp4 writes"],
        ),
    ],
    "not GGUF": [
        (spoilt_gguf(lambda data: b"GGML" + data[4:]), ["p.gguf"]),
        (spoilt_gguf(lambda data: data[:300]), ["p.gguf"]),
        (spoilt_gguf(lambda data: b""), ["p.gguf"]),
    ],
    "cut GGUF": [(spoilt_gguf(lambda data: data[:-5000]), ["p.gguf", "fetch it again"])],
    "split GGUF": [(in_gguf(("add_uint16", "split.count", 3)), ["3 parts", "llama-gguf-split --merge"])],
    "GGUF architecture": [
        (spoilt_gguf(another_architecture), ["lxama", "llama, mistral, qwen2, qwen3, qwen3moe, gemma2"])
    ],
    "GGUF tensors": [
        (in_gguf(tensors={"blk.0.attn_rel_b.weight": torch.ones(4)}), ["blk.0.attn_rel_b.weight"]),
        (in_gguf(tensors={"blk.2.attn_q.weight": torch.ones(64, 64)}), ["blk.2.attn_q.weight"]),
    ],
    "GGUF type": [
        (in_gguf(zeros={"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_1}), ["blk.0.ffn_up.weight", "Q8_1"])
    ],
    "GGUF rope": [
        (
            in_gguf(("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE), ("add_rope_scaling_factor", 4.0)),
            ["longrope"],
        ),
        (in_gguf(("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)), ["yarn"]),
        (in_gguf(tensors={"rope_freqs.weight": torch.linspace(1, 3, 8)}), ["rope_freqs.weight"]),
        (in_gguf(tensors={"rope_freqs.weight": torch.ones(5)}), ["5 factors"]),
    ],
    "GGUF field": [
        (in_gguf(("add_sliding_window", 128)), ["sliding_window: 128"]),
        (in_gguf(("add_expert_count", 8)), ["expert_count: 8"]),
        (in_gguf(("add_key_length", 16), ("add_value_length", 32)), ["value_length: 32"]),
        (in_gguf(("add_type", "adapter")), ["general.type: adapter"]),
        (in_gguf(("add_float32", "llama.attention.temperature_scale", 0.1)), ["temperature_scale: 0.1"]),
    ],
    "GGUF tokenizer": [
        (in_gguf(pre="my-own"), ["tokenizer.ggml.pre: my-own"]),
        (in_gguf(pre="deepseek-llm"), ["deepseek-llm"]),
    ],
    "no tokenizer": [(without("tokenizer.json"), ["no usable", "it has no tokenizer.json"])],
    "tokenizer too new": [(renamed_model, ["tokenizer.json", "tokenizers 0."])],
    "tokenizer too long": [(longer_tokenizer, ["282 entries", "272", "belongs to another model", "resize_token"])],
    "not reachable": [(lambda folder: "nobody/has-this-model", ["nobody/has-this-model"])],
}
NOT_HERE = {"no scale"}
"""Met in tests/parents/test_quantised.py."""


def test_every_sentence_is_met():
    assert set(CASES) | NOT_HERE == set(PROBLEMS)


@pytest.mark.parametrize(
    ("kind", "case"), [pytest.param(k, c, id=f"{k}-{i}") for k, cases in CASES.items() for i, c in enumerate(cases)]
)
def test_one_sentence(kind, case, sound, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil, parts = case
    spoil, base = spoil if isinstance(spoil, tuple) else (spoil, "whole")
    folder = tmp_path / "parent"
    shutil.copytree(sound / base, folder)
    if kind == "two parents":
        shutil.copytree(sound / "shards", tmp_path / "shards")
    where = spoil(folder)
    where = folder if where is None or isinstance(where, (int, list)) else where
    with pytest.raises(CheckpointError) as refused:
        examine(where)
    sentence = str(refused.value)
    pattern = re.sub(r"\\{\w+\\}", ".*", re.escape(PROBLEMS[kind]))
    assert re.fullmatch(pattern, sentence), sentence
    assert all(part in sentence for part in parts), sentence


def test_sound_files_pass(sound):
    whole, shards, file = (examine(sound / name) for name in ("whole", "shards", "whole.gguf"))
    assert whole.warnings == shards.warnings == file.warnings == ()
    assert (
        whole.parameters
        == shards.parameters
        == file.parameters
        == sum(w.numel() for w in weights_of(sound / "whole").values())
    )
    assert find_checkpoint(str(sound / "whole"), sound) == sound / "whole"

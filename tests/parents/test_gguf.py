"""GGUF parents compute what the folder that they were made from computes, and split text as llama.cpp does."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import open_parent
from puzzle_nas.parents import describe, examine
from puzzle_nas.parents.gguf_config import gguf_config
from puzzle_nas.parents.gguf_file import read_gguf
from puzzle_nas.parents.gguf_tokenizer import SPLITTINGS
from tests.parents.checkpoints import AWKWARD, byte_tokenizer, logits_of, theirs, tiny, write_gguf

THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
YARN = [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
YARN += [("add_rope_scaling_orig_ctx_len", 16)]
ROPES = {
    "plain": ({"rope_type": "default"}, []),
    "linear": ({"rope_type": "linear", "factor": 4.0}, LINEAR),
    "linear as before": ({"rope_type": "linear", "factor": 4.0}, [("add_float32", "llama.rope.scale_linear", 4.0)]),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, YARN),
}


def gap(one, other, tokens=200):
    return float((logits_of(one, tokens) - logits_of(other, tokens)).abs().max())


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_is_read(name, tmp_path):
    rope, fields = ROPES[name]
    folder = tiny(tmp_path / "p", rope_parameters=THETA | rope)
    model, _ = open_parent(write_gguf(folder, tmp_path / "p.gguf", fields=fields))
    assert model.config.rope_parameters == THETA | rope
    assert gap(model, theirs(folder)) < 1e-5
    if name != "plain":
        assert gap(model, theirs(tiny(tmp_path / "plain"))) > 0.01


def llama3_table(rope):
    """What llama.cpp's converter writes for heads of 16 channels."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return rope["rope_theta"] ** -(torch.arange(0, 16, 2).float() / 16) / stretched


def test_the_factors_of_llama_3_are_read(tmp_path):
    folder = tiny(tmp_path / "p", rope_parameters=THETA | LLAMA3)
    table = {"rope_freqs.weight": llama3_table(THETA | LLAMA3)}
    file = write_gguf(folder, tmp_path / "p.gguf", tensors=table)
    model, _ = open_parent(file)
    assert model.config.rope_parameters == THETA | LLAMA3
    assert gap(model, theirs(folder)) < 1e-5
    ones = write_gguf(folder, tmp_path / "q.gguf", tensors={"rope_freqs.weight": torch.ones(8)})
    assert examine(ones).config.rope_parameters == THETA | {"rope_type": "default"}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_biases_heads_and_families(family, changes, tmp_path):
    folder = tiny(tmp_path / "p", family, **changes)
    file = write_gguf(folder, tmp_path / "p.gguf", pre="qwen2" if family != "llama" else "gpt-2")
    assert gap(open_parent(file)[0], theirs(folder)) < 1e-5


FAMILIES = {
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    "phi3": {"rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "smollm3": {"num_hidden_layers": 5, "tie_word_embeddings": False},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11180339887498949,
        "residual_multiplier": 0.22,
        "logits_scaling": 2.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "full_attention_interval": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": THETA
        | {"rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}
"""Sizes of tiny models of the families that are read from GGUF, besides Llama's relatives."""


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    """Every number of the file that differs from the family's defaults is read: else logits or shapes would differ."""
    folder = tiny(tmp_path / "p", family, **FAMILIES[family])
    with torch.no_grad():
        model = theirs(folder)
        for name, parameter in model.named_parameters():
            if "norm" in name or parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    file = write_gguf(folder, tmp_path / "p.gguf")
    opened, _ = open_parent(file)
    assert type(opened) is type(model) and opened.dtype == torch.float32
    assert gap(opened, model, tokens=100) < 1e-4
    assert examine(file).parameters == sum(p.numel() for p in model.parameters())


def test_gemma_files_that_lack_caps_or_windows(tmp_path):
    """llama.cpp takes Gemma 2's own for the former, and no windows for Gemma 3."""

    def without_fields(family):
        file = read_gguf(write_gguf(tiny(tmp_path / family, family, **FAMILIES[family]), tmp_path / f"{family}.gguf"))
        left = {key: value for key, value in file.metadata.items() if not key.endswith(("softcapping", "window"))}
        return gguf_config(dataclasses.replace(file, metadata=left))

    config = without_fields("gemma2")
    assert (config.attn_logit_softcapping, config.final_logit_softcapping, config.sliding_window) == (50.0, 30.0, 4096)
    assert set(without_fields("gemma3_text").layer_types) == {"full_attention"}


def test_granite_files_that_lack_multipliers(tmp_path):
    """llama.cpp takes these for those left out, but needs what divides logits; and one field turns positions off."""
    file = read_gguf(write_gguf(tiny(tmp_path / "p", "granite", **FAMILIES["granite"]), tmp_path / "p.gguf"))
    left = {key: value for key, value in file.metadata.items() if not key.endswith("_scale")}
    config = gguf_config(dataclasses.replace(file, metadata=left | {"granite.logit_scale": 2.0}))
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling) == (1.0, 1.0, 2.0)
    left = {key: value for key, value in file.metadata.items() if not key.endswith("attention.scale")}
    assert gguf_config(dataclasses.replace(file, metadata=left)).attention_multiplier == 16**-0.5
    for name, value in ("logit_scale", 0.0), ("rope.scaling.finetuned", False):
        spoilt = dataclasses.replace(file, metadata={**file.metadata, f"granite.{name}": value})
        with pytest.raises(CheckpointError, match=rf"says granite.{name}: {value}, which is not read here"):
            gguf_config(spoilt)


@pytest.mark.parametrize(
    ("family", "fields", "name"),
    [
        # OLMo 3 is of the same architecture.
        ("olmo2", [("add_sliding_window", 16)], "olmo2.attention.sliding_window: 16"),
        ("smollm3", [("add_sliding_window", 16)], "smollm3.attention.sliding_window: 16"),
        ("smollm3", [("add_attention_scale", 0.5)], "smollm3.attention.scale: 0.5"),
    ],
)
def test_fields_that_families_do_not_have_are_refused(family, fields, name, tmp_path):
    file = write_gguf(tiny(tmp_path / "p", family), tmp_path / "p.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=name):
        examine(file)


LONG = {
    "rope_type": "longrope",
    "partial_rotary_factor": 1.0,
    "long_factor": [float(2 + i) for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "original_max_position_embeddings": 64,
}


def test_long_rope_is_read(tmp_path):
    folder = tiny(tmp_path / "p", "phi3", rope_parameters=THETA | LONG, original_max_position_embeddings=64)
    tables = {f"rope_factors_{name}.weight": torch.tensor(LONG[f"{name}_factor"]) for name in ("long", "short")}
    opened, _ = open_parent(write_gguf(folder, tmp_path / "p.gguf", tensors=tables))
    for tokens in (48, 128):
        assert gap(opened, theirs(folder), tokens) < 1e-4


def test_types_are_those_that_transformers_dequantises_for_the_architecture(tmp_path):
    """Its newer reader, of LFM2 and Qwen 3.5, lacks Q5_0; of Llama it does not stand in the way of small tables."""
    table = {"rope_freqs.weight": llama3_table(THETA | LLAMA3)}
    zeros = {"blk.0.ffn_down.weight": gguf.GGMLQuantizationType.Q5_0}
    file = write_gguf(tiny(tmp_path / "p"), tmp_path / "p.gguf", tensors=table, zeros=zeros)
    model, _ = open_parent(file)
    assert model.config.rope_parameters == THETA | LLAMA3 and not model.model.layers[0].mlp.down_proj.weight.any()
    assert examine(file).loading_arguments["quantization_config"].dequantize
    lfm2 = tiny(tmp_path / "lfm2", "lfm2", **FAMILIES["lfm2"])
    with pytest.raises(CheckpointError, match=r"stores blk\.0\.ffn_down\.weight as Q5_0, which transformers does not"):
        examine(write_gguf(lfm2, tmp_path / "p.gguf", zeros=zeros))


def test_the_largest_gemmas_scale_queries_otherwise(tmp_path):
    """llama.cpp knows them by their number of layers, as no field says so."""
    sizes = {"num_hidden_layers": 46, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    folder = tiny(tmp_path / "p", "gemma2", query_pre_attn_scalar=8, **sizes)
    assert examine(write_gguf(folder, tmp_path / "p.gguf")).config.query_pre_attn_scalar == 8


def test_the_configuration_is_transformers_own_but_for_what_it_drops(tmp_path):
    file = write_gguf(tiny(tmp_path / "p"), tmp_path / "p.gguf")
    ours = gguf_config(read_gguf(file)).to_dict()
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="p.gguf").to_dict()
    left_out = {"_name_or_path", "rms_norm_eps", "_model_name_or_path", "bos_token_id", "unk_token_id"}
    assert {k: v for k, v in ours.items() if k not in left_out} == {k: theirs[k] for k in ours if k not in left_out}
    assert ours["rms_norm_eps"] == 1e-6


CUTS = {
    "gpt-2": [
        "Steps",
        ":",
        "\n",
        "\n",
        "1",
        ".",
        " Do",
        " 23",
        "\t",
        "4",
        " ",
        " x",
        "'s",
        " \r\n",
        " I",
        "'",
        "LL",
        "  ",
    ],
    "smollm": ["Steps", ":", "\n\n", "1", ".", " Do", " ", "2", "3", "\t", "4", " ", " x", "'s", " \r\n", " I", "'"],
    "llama-bpe": ["Steps", ":\n\n", "1", ".", " Do", " ", "23", "\t", "4", " ", " x", "'s", " \r\n", " I", "'LL", "  "],
    "qwen2": ["Steps", ":\n\n", "1", ".", " Do", " ", "2", "3", "\t", "4", " ", " x", "'s", " \r\n", " I", "'LL", "  "],
    "default": [
        "Steps",
        ":",
        "\n",
        "\n",
        "1",
        ".",
        " Do",
        " ",
        "23",
        "\t",
        "4",
        " ",
        " x",
        "'",
        "s",
        " \r\n",
        " I",
        "'",
    ],
}
"""Where llama.cpp cuts the beginning of the awkward text, by its regular expressions."""


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_llama_cpp_cuts_it(pre, tmp_path):
    file = write_gguf(tiny(tmp_path / "p"), tmp_path / "p.gguf", pre=pre)
    tokenizer = examine(file).tokenizer
    cuts = [
        AWKWARD[start:end] for _, (start, end) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(AWKWARD)
    ]
    assert cuts[: len(CUTS[pre])] == CUTS[pre]
    assert tokenizer.decode(tokenizer(AWKWARD).input_ids) == AWKWARD


def test_every_known_way_of_cutting_loses_nothing(tmp_path):
    folder = tiny(tmp_path / "p")
    for pre in SPLITTINGS:
        tokenizer = examine(write_gguf(folder, tmp_path / "p.gguf", pre=pre)).tokenizer
        assert tokenizer.decode(tokenizer(AWKWARD, add_special_tokens=False).input_ids) == AWKWARD, pre


def test_a_file_that_does_not_say_how_it_cuts(tmp_path):
    examined = examine(write_gguf(tiny(tmp_path / "p"), tmp_path / "p.gguf", pre=None))
    assert "tokenizer.ggml.pre" in examined.warnings[0]


def test_whole_tokens_before_merges(tmp_path):
    """Llama 3's tokenizer takes a word that is a token as it is, though no merges lead there."""
    tokenizer = byte_tokenizer(extra=["Do"])
    folder = tiny(tmp_path / "p", tokenizer=tokenizer)
    lengths = {
        pre: len(examine(write_gguf(folder, tmp_path / "p.gguf", pre=pre)).tokenizer("Do", add_special_tokens=False)[0])
        for pre in ("llama-bpe", "gpt-2")
    }
    assert lengths == {"llama-bpe": 1, "gpt-2": 2}


def test_bos_where_the_file_does_not_say(tmp_path):
    folder = tiny(tmp_path / "p")
    bos = [("add_bos_token_id", 1)]
    found = {pre: examine(write_gguf(folder, tmp_path / "p.gguf", pre, bos)).bos for pre in ("llama-bpe", "gpt-2")}
    assert found == {"llama-bpe": 1, "gpt-2": None}
    said = [*bos, ("add_add_bos_token", False)]
    assert examine(write_gguf(folder, tmp_path / "p.gguf", "llama-bpe", said)).bos is None


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_puts_a_space_before_text_as_the_file_says(prefix, tmp_path):
    words = ["▁", "▁a", "ab", "▁ab", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *"ab", *words]
    scores = [0.0] * 260 + [-9.0, -9.0, -8.0, -3.0, -2.0, -1.0, -7.0]
    types = [2, 3, 3, 3, *[6] * 256, *[1] * 7]
    fields = [("add_bos_token_id", 1)] + ([] if prefix is None else [("add_add_space_prefix", prefix)])
    folder = tiny(tmp_path / "p")
    file = write_gguf(folder, tmp_path / "p.gguf", fields=fields, vocabulary=(tokens, scores, types))
    tokenizer = examine(file).tokenizer
    got = {text: tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) for text in ("ab ab", " ab", "\n")}
    if prefix is False:
        assert got == {"ab ab": ["<s>", "ab", "▁ab"], " ab": ["<s>", "▁ab"], "\n": ["<s>", "<0x0A>"]}
    else:
        assert got == {"ab ab": ["<s>", "▁ab", "▁ab"], " ab": ["<s>", "▁", "▁ab"], "\n": ["<s>", "▁", "<0x0A>"]}
    assert tokenizer.decode(tokenizer("ab ab").input_ids[1:]) == "ab ab"


def test_end_of_turn_is_an_end_too(tmp_path):
    file = write_gguf(tiny(tmp_path / "p"), tmp_path / "p.gguf", fields=[("add_eot_token_id", 2)])
    examined = examine(file)
    assert examined.end_tokens == (0, 2) and describe(examined)["tokenizer"]["pre"] == "gpt-2"
    assert open_parent(file)[0].generation_config.eos_token_id == [0, 2]


def test_the_epsilon_of_a_float32(tmp_path):
    folder = tiny(tmp_path / "p", rms_norm_eps=1e-5)
    assert float(np.float32(1e-5)) != 1e-5
    assert examine(write_gguf(folder, tmp_path / "p.gguf")).config.rms_norm_eps == 1e-5

"""Quantised parents compute what their codes and scales mean, loaded whole and streamed."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import load_model, open_parent
from puzzle_nas.families.loading import stream_model
from puzzle_nas.formats.registry import format_of
from puzzle_nas.formats.rounding import round_matrix
from puzzle_nas.machine import Machine
from puzzle_nas.parents import describe, examine
from tests.parents.checkpoints import edit, logits_of, theirs, tiny

BLOCK = 32
MACHINE = Machine(torch.device("cpu"), torch.float32)


def check_loads(folder, wanted, **tolerance):
    """A run's own ways to load a parent from its folder give these logits, and nothing in it speaks of codes."""
    for load in (load_model, stream_model):
        model = load(folder, MACHINE)
        assert not hasattr(model.config, "quantization_config")
        assert torch.allclose(logits_of(model), wanted, **tolerance), load


def as_fp8(folder):
    """Store a folder's projections in blocks of fp8 with scales; return the weights that these stand for."""
    weights = load_file(folder / "model.safetensors")
    stored, meant = {}, {}
    for name, weight in weights.items():
        if "proj" not in name:
            stored[name] = meant[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max * torch.tensor([1.0])
        small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = small.reshape(rows, columns)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = (small.float() * scales[:, None, :, None]).reshape(rows, columns)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit(folder / "config.json", quantization_config=fields)
    return meant


MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MXFP4 = torch.cat([MXFP4, -MXFP4])
"""What the sixteen codes of four bits stand for."""
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64}
GPT_OSS |= {"sliding_window": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def as_mxfp4(folder):
    """Store a folder's experts in blocks of 32 codes, two in a byte, with a power of two; return what they mean."""
    weights = load_file(folder / "model.safetensors")
    stored, meant = {}, {}
    for name, weight in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = meant[name] = weight
            continue
        blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
        exponents = blocks.abs().amax(-1).log2().floor() - 2
        scales = 2 ** exponents[..., None]
        codes = ((blocks / scales)[..., None] - MXFP4).abs().argmin(-1)
        stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        meant[name] = (MXFP4[codes] * scales).flatten(2).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    return meant


@pytest.fixture
def mxfp4(tmp_path):
    folder = tiny(tmp_path / "mxfp4", "gpt_oss", **GPT_OSS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(as_mxfp4(folder))
    return folder, logits_of(model)


def test_mxfp4_is_loaded_with_its_scales(mxfp4):
    folder, wanted = mxfp4
    examined = examine(folder)
    assert describe(examined)["quantisation"] == "mxfp4" and "dequantised" in examined.warnings[0]
    # Not the bytes that they are packed in.
    assert examined.parameters == sum(p.numel() for p in examined.model.parameters()) == 160_464
    model, _ = open_parent(folder, examined)
    assert not hasattr(model.config, "quantization_config")
    assert torch.allclose(logits_of(model), wanted, atol=1e-4)
    check_loads(folder, wanted, atol=1e-4)


def test_mxfp4_that_lacks_scales(mxfp4):
    folder, _ = mxfp4
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj_blocks is stored without its scale"):
        examine(folder)


@pytest.fixture
def fp8(tmp_path):
    folder = tiny(tmp_path / "fp8")
    meant = as_fp8(folder)
    model = LlamaForCausalLM(examine(folder).config)
    model.load_state_dict(meant)
    return folder, logits_of(model)


def test_fp8_is_loaded_with_its_scales(fp8):
    folder, wanted = fp8
    examined = examine(folder)
    assert describe(examined)["quantisation"] == "fp8" and "dequantised" in examined.warnings[0]
    assert examined.parameters == 108_864
    model, _ = open_parent(folder, examined)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert torch.allclose(logits_of(model), wanted, atol=1e-4)
    assert torch.allclose(logits_of(theirs(folder)), wanted, atol=1e-4)
    check_loads(folder, wanted, atol=1e-4)


def test_fp8_that_lacks_scales(fp8):
    folder, _ = fp8
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored without its scale"):
        examine(folder)


SCHEMES = {
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
}


# transformers gives back fused experts of packed formats alone; others are refused.
@pytest.mark.parametrize(("family", "form"), [("llama", "int8"), ("llama", "int4"), ("qwen3_moe", "int4")])
def test_compressed_tensors_are_loaded_with_their_scales(tmp_path, form, family):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
    folder = tiny(tmp_path / form, family, hidden_size=128, **(experts if family == "qwen3_moe" else {}))
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = meant[name] = weight
            continue
        rounded = round_matrix(format_of(form), weight, None)
        prefix = name.removesuffix("weight")
        stored |= {prefix + kind: tensor for kind, tensor in format_of(form).pack(rounded).items()}
        # transformers multiplies in the precision of the scales.
        meant[name] = rounded.dequantised().to(rounded.grid.stored["scale"].dtype).float()
    save_file(meant, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = logits_of(theirs(folder))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    layout, weights = SCHEMES[form]
    group = {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}
    said = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    edit(folder / "config.json", quantization_config={**said, "config_groups": {"all": group}, "ignore": ["lm_head"]})
    examined = examine(folder)
    assert describe(examined)["quantisation"] == "compressed-tensors"
    model, _ = open_parent(folder, examined)
    assert torch.allclose(logits_of(model), wanted, atol=1e-4)
    check_loads(folder, wanted, atol=1e-4)


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    folder = tiny(tmp_path / "p")
    edit(folder / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install compressed-tensors"):
        examine(folder)

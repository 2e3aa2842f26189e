"""Children in compressed-tensors' formats, without vLLM: what is written, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import Child
from puzzle_nas.exporters.vllm_format import VllmExporter
from puzzle_nas.families import build, child_config
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.specs import GatedFFN, Head, Linear
from tests.exporters.children import EVERY_KIND, child_of, in_formats

LARGE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
KINDS = {**EVERY_KIND, 2: [Linear("attention"), GatedFFN(128)]}


@pytest.fixture(scope="module")
def child():
    return in_formats(child_of(KINDS, **LARGE), ["int8", None, "int4"])


def test_every_matrix_has_the_format_of_its_sub_block(child, tmp_path):
    VllmExporter().write(child, tmp_path, "bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert config["format"] == "mixed-precision" and set(groups) == {"int8", "int4"}
    assert groups["int8"]["input_activations"]["strategy"] == "token"
    assert groups["int8"]["input_activations"]["dynamic"] and groups["int4"]["input_activations"] is None
    tensors = load_file(tmp_path / "model.safetensors")
    listed = {target: form for form, group in groups.items() for target in group["targets"]}
    places = {"self_attn": "attention", "mlp": "ffn"}
    for name, module in child.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if name == "lm_head":
            assert name in config["ignore"]
            continue
        _, _, layer, mixer, _ = name.split(".")
        form = child.architecture.layers[int(layer)][places[mixer]].format
        assert listed.get(name) == form and (name in config["ignore"]) == (form is None)
        parts = {key: t for key, t in tensors.items() if key.startswith(f"{name}.") and "shape" not in key}
        size = sum(t.numel() * t.element_size() for t in parts.values())
        assert size == layout_of(form or "bf16").bytes_of(*module.weight.shape)
    assert VllmExporter().differing(child, tmp_path, "bfloat16") == []


@pytest.mark.parametrize("part", ["weight", "weight_packed", "weight_scale"])
def test_one_changed_number_is_seen(part, child, tmp_path):
    VllmExporter().write(child, tmp_path, "bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    names = (f"{weight.removesuffix('weight')}{part}" for weight in child.forms)
    name = next(name for name in names if name in tensors)
    tensors[name].view(-1)[3] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert VllmExporter().differing(child, tmp_path, "bfloat16") == [f"{name.rpartition('.')[0]}.weight"]


def test_what_does_not_fit_is_refused_by_name():
    narrow = in_formats(child_of({0: [GatedFFN(96)]}, **LARGE, num_hidden_layers=1), ["int8"])
    VllmExporter().refuse(narrow)
    layers = tuple({slot: spec.stored("int4") for slot, spec in block.items()} for block in narrow.architecture.layers)
    architecture = type(narrow.architecture)(layers)
    model = build(child_config(narrow.config, architecture), narrow.model.state_dict())
    with pytest.raises(ExportError, match=r"int4 cannot hold model.layers.0.mlp.down_proj.weight, whose rows of 96"):
        VllmExporter().refuse(Child(model, None))
    headed = type(architecture)(narrow.architecture.layers, Head(format="int8"))
    model = build(child_config(narrow.config, headed), narrow.model.state_dict())
    with pytest.raises(ExportError, match="embeddings and LM head in the model's precision only"):
        VllmExporter().refuse(Child(model, None))


def test_int8_rounds_what_its_matrices_receive(child):
    """Each token by itself; gradients pass, and other formats leave tokens alone."""
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100])[:, None]
    of_form = {
        form: child.model.get_submodule(name.removesuffix(".weight"))
        for name, form in child.forms.items()
        if child.model.get_parameter(name).shape[1] == 128
    }
    matrix, plain = of_form["int8"], of_form["int4"]
    steps = x.abs().amax(-1, keepdim=True) / 127
    expected = torch.nn.functional.linear((x / steps).round() * steps, matrix.weight, matrix.bias)
    torch.testing.assert_close(matrix(x), expected)
    x.requires_grad_(True)
    matrix(x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.weight.sum(0).expand_as(x))
    assert torch.equal(plain(x), torch.nn.functional.linear(x, plain.weight, plain.bias))

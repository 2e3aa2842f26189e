"""The child's own transformers checkpoint, which our vLLM plugin serves as it is, and compressed-tensors' formats.

Source: vLLM, model_executor/layers/quantization/compressed_tensors/, and what each scheme there asks of shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from puzzle_nas.exporters.base import DTYPES, Child, Exporter
from puzzle_nas.exporters.llama_like import FAMILIES
from puzzle_nas.exporters.transformers_format import write_checkpoint
from puzzle_nas.families.loading import entry_of
from puzzle_nas.formats.compressed import Symmetric
from puzzle_nas.formats.registry import format_of
from puzzle_nas.servable import SERVERS

INT4_ROWS = 32
"""vLLM's products on CPUs take outputs of four-bit matrices by so many."""


class VllmExporter(Exporter):
    """Every child that vLLM's transformers backend can be brought to run."""

    name = "vllm"
    server = "vllm"
    engine = "vllm"
    families = (*FAMILIES, "qwen3", "granite")
    writers = dict.fromkeys(SERVERS[server].kinds, entry_of)

    def family_problems(self, child: Child) -> list[str]:
        """See `Exporter.family_problems`."""
        found = []
        if not child.model.is_backend_compatible():
            how = "computes attention by itself, where vLLM exchanges only transformers' interface to it"
            found.append(f"{child.family} {how}")
        for name, form in child.forms.items():
            rows, columns = child.model.get_parameter(name).shape
            if not (layout := format_of(form).layout).holds(columns):
                found.append(
                    f"{form} cannot hold {name}, whose rows of {columns} weights do not divide into {layout.block}"
                )
            if form == "int4" and rows % INT4_ROWS:
                found.append(f"vLLM multiplies {form} by {INT4_ROWS} outputs at once, and {name} has {rows}")
        return found

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        if not child.forms:
            return write_checkpoint(child, folder, dtype)
        stored = {
            name: {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in child.matrix(name).parts.items()}
            for name in child.forms
        }
        write_checkpoint(child, folder, dtype, stored)
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {"quantization_config": quantization_config(child)}
        file.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        return None

    def differing(self, child: Child, folder: Path, dtype: str) -> list[str]:
        """See `Exporter.differing`."""
        expected = dict(child.rounded(DTYPES[dtype]).model.named_parameters())
        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        names = set()
        for name, weight in expected.items():
            values = read_back(found, name, child.forms.get(name), DTYPES[dtype])
            if values is None or not torch.equal(values, weight):
                names.add(name)
        return sorted(names | set(found))


def read_back(tensors: dict[str, torch.Tensor], name: str, form: str | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight as vLLM reads it, float32, and out of `tensors`; None where it is not there.

    Args:
        dtype: of the model, and so of the scales of groups.
    """
    if form is None:
        return None if name not in tensors else tensors.pop(name).float()
    module = name.removesuffix("weight")
    scale = tensors.pop(f"{module}weight_scale", None)
    codes = tensors.pop(f"{module}{'weight' if form == 'int8' else 'weight_packed'}", None)
    if codes is None or scale is None:
        return None
    if form == "int4":
        shape = tensors.pop(f"{module}weight_shape", torch.tensor([])).tolist()
        places = 4 * torch.arange(8)
        codes, scale = ((codes.unsqueeze(2) >> places) & 15).flatten(1) - 8, scale.to(dtype)
        if list(codes.shape) != shape:
            return None
    return (codes.float().unflatten(1, (scale.shape[1], -1)) * scale.float().unsqueeze(2)).flatten(1)


def quantization_config(child: Child) -> dict[str, Any]:
    """What config.json says of a child in formats: a group for each format, which names its matrices one by one."""
    groups: dict[str, dict[str, Any]] = {}
    for form in dict.fromkeys(child.forms.values()):
        modules = [name.removesuffix(".weight") for name, of in child.forms.items() if of == form]
        groups[form] = {"targets": modules, **_group_config(form)}
    formats = [group["format"] for group in groups.values()]
    stored = {name.removesuffix(".weight") for name in child.forms}
    linears = [name for name, module in child.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in stored],
    }


def _group_config(form: str) -> Mapping[str, Any]:
    found = format_of(form)
    assert isinstance(found, Symmetric)
    return found.group_config

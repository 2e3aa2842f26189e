"""Which quantisation a parent is stored in, and whether transformers gives its weights back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedConfig

from puzzle_nas.parents.problems import LIBRARY_ERRORS, first_line, problem

DEQUANTISED: dict[str, Callable[[dict], Any]] = {
    "fp8": lambda fields: FineGrainedFP8Config.from_dict({**fields, "dequantize": True}),
    "mxfp8": lambda fields: FineGrainedFP8Config.from_dict({**fields, "dequantize": True}),
    "mxfp4": lambda fields: Mxfp4Config.from_dict({**fields, "dequantize": True}),
    "compressed-tensors": lambda fields: CompressedTensorsConfig.from_dict({**fields, "dequantize": True}),
}
"""Methods whose weights transformers gives back in the model's own precision, and what it is told to do so."""

PACKAGES = {"compressed-tensors": "compressed_tensors"}
NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "gptq or awq": "GPTQ or AWQ",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
}
WAYS_OUT = {
    "bitsandbytes": "dequantise it on a GPU with bitsandbytes: AutoModelForCausalLM.from_pretrained(folder)"
    ".dequantize().save_pretrained(another)",
    "gptq": "dequantise it with gptqmodel",
    "awq": "dequantise it with gptqmodel",
}
MARKS = {
    ".g_idx": "gptq",
    ".qzeros": "gptq or awq",
    ".qweight": "gptq or awq",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    "_blocks": "mxfp4",
}
"""Ends of tensors' names that only a quantisation writes."""


FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where tools wrote what they did before config.json had a place for it."""


@dataclass(frozen=True)
class Quantisation:
    """A quantisation that transformers undoes when it loads the whole parent."""

    method: str
    argument: Any
    """`quantization_config` for `from_pretrained`, so that the weights come dequantised on every device."""


def quantisation_of(where: Path, config: PreTrainedConfig, tensors: Collection[str] = ()) -> Quantisation | None:
    """The quantisation of a checkpoint folder; None for plain weights.

    Args:
        tensors: names of what is stored, for marks of a quantisation that the configuration does not mention.

    Raises:
        CheckpointError: one that is not read here, with the way out.
    """
    fields = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not fields:
        if isinstance(getattr(config, "quantization", None), dict):
            raise refused(where, "MLX")
        for name, method in FILES.items():
            if (where / name).is_file():
                raise refused(where, method)
        for end, method in MARKS.items():
            if marked := sorted(name for name in tensors if name.endswith(end)):
                raise problem("unsaid quantisation", where=where, name=marked[0], method=NAMES.get(method, method))
        return None
    if not isinstance(fields, dict):
        fields = fields.to_dict()
    method = str(fields.get("quant_method") or _bitsandbytes(fields) or "a method without a name")
    if method not in DEQUANTISED:
        raise refused(where, method)
    package = PACKAGES.get(method)
    if package and importlib.util.find_spec(package) is None:
        raise problem("quantised", where=where, method=method, way_out=f"install its package: pip install {method}")
    try:
        return Quantisation(method, DEQUANTISED[method](fields))
    except LIBRARY_ERRORS as error:
        shown = f"{method} ({first_line(error)})"
        raise problem("quantised", where=where, method=shown, way_out=_way_out(method)) from error


def forget_quantisation(config: PreTrainedConfig) -> None:
    """Let the configuration of a dequantised parent speak of plain weights."""
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)


def _bitsandbytes(fields: dict) -> str | None:
    return "bitsandbytes" if fields.get("load_in_4bit") or fields.get("load_in_8bit") else None


def refused(where: Path, method: str):
    """The error that names a method and the way out."""
    return problem("quantised", where=where, method=NAMES.get(method, method), way_out=_way_out(method))


def _way_out(method: str) -> str:
    return WAYS_OUT.get(method, "dequantise it with the tool that quantised it")

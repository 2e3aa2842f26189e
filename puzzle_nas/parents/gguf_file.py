"""A GGUF file's header: what it says of itself, and its tensors against transformers' own class."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported, reader
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from puzzle_nas.parents.fit import META, quiet
from puzzle_nas.parents.problems import LIBRARY_ERRORS, counted, first_line, problem, some_names
from puzzle_nas.parents.weights import StoredTensor, StoredWeights, check_is_no_placeholder

VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)
NO_WEIGHTS = r"rot_embd|attn_rot|rope_freqs|rope_factors"
"""In names of tables of rotary frequencies: of Llama 3's and of long rope's, and what old converters wrote for all."""
NEIGHBOURS = ("smollm3", "granite")
"""Architectures besides Llama's in which the two rows of queries or keys that are rotated together are neighbours."""
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""torch's types by GGML's number."""


# transformers reads the tensors of these too once it knows of them, and of the fields that undo the pairing.
_HEADS: dict[str, Any] = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
for _name in (*NEIGHBOURS, "olmo2"):
    GGUF_SUPPORTED_ARCHITECTURES.append(_name)
    GGUF_TO_TRANSFORMERS_MAPPING["config"][_name] = _HEADS
for _name in NEIGHBOURS:
    TENSOR_PROCESSORS[_name] = LlamaTensorProcessor


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says before its tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int]] = field(repr=False)
    """Shape in torch's order and GGML type, by GGUF's name."""
    starts: Mapping[str, int] = field(repr=False)
    """Byte at which each tensor begins."""

    @property
    def architecture(self) -> str:
        """GGUF's name of it."""
        return self.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """A field of the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def values(self, name: str) -> torch.Tensor:
        """A small unquantised tensor, flat, in float64."""
        shape, kind = self.tensors[name]
        stored = np.memmap(self.path, np.uint8, "r", self.starts[name], (_size(shape, kind),))
        plain = gguf.dequantize(np.array(stored)[None], gguf.GGMLQuantizationType(kind))
        return torch.from_numpy(plain.astype(np.float64)).flatten()

    @property
    def stored(self) -> StoredWeights:
        """Its tensors as those of a checkpoint folder."""
        tensors = {
            name: StoredTensor(self.path, shape, PLAIN.get(kind, gguf.GGMLQuantizationType(kind).name))
            for name, (shape, kind) in self.tensors.items()
        }
        return StoredWeights((self.path,), tensors, "gguf")

    def types(self) -> dict[str, int]:
        """How many tensors are of each GGML type, the commonest first."""
        names = [gguf.GGMLQuantizationType(kind).name for _, kind in self.tensors.values()]
        return dict(sorted(((n, names.count(n)) for n in set(names)), key=lambda item: -item[1]))


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file.

    Raises:
        CheckpointError: it is none, is cut, or is one part of several.
    """
    check_is_no_placeholder(path)
    try:
        blob = reader._mapped(str(path))
        metadata, count, position = reader._read_metadata(blob, str(path), VOCABULARY)
        table, position = reader._read_tensor_table(blob, count, position)
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-position // alignment) * alignment
        starts = {name: start + offset for name, _, _, offset in table}
        end = max((starts[name] + _size(shape, kind) for name, shape, kind, _ in table), default=position)
    except (*LIBRARY_ERRORS, MemoryError) as error:
        raise problem("not GGUF", file=path, reason=first_line(error)) from error
    if metadata.get("general.type", "model") != "model":
        raise problem("GGUF field", file=path, key="general.type", value=metadata["general.type"])
    if metadata.get("split.count", 1) > 1:
        raise problem("split GGUF", file=path, count=metadata["split.count"])
    if end > path.stat().st_size:
        raise problem("cut GGUF", file=path, end=end, size=path.stat().st_size)
    return GGUFFile(path, metadata, {name: (shape, kind) for name, shape, kind, _ in table}, starts)


def _size(shape: tuple[int, ...], kind: int) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return math.prod(shape) // elements * size


def check_gguf_fit(file: GGUFFile, config: PreTrainedConfig) -> PreTrainedModel:
    """Every tensor of the file against transformers' class, which is returned on the meta device.

    Raises:
        CheckpointError: one is missing, unused, of another shape or of a type that is not dequantised.
    """
    _check_types(file)
    weights = {name: shape for name, (shape, _) in file.tensors.items() if not re.search(NO_WEIGHTS, name)}
    try:
        with quiet(), META:
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            places = _places(file.architecture, model, weights)
    except LIBRARY_ERRORS as error:
        raise problem("no class", where=file.path, reason=first_line(error)) from error
    expected = dict(model.state_dict())
    unused = sorted(name for name in weights if places.get(name) not in expected and not _is_prediction(places, name))
    if unused:
        raise problem("GGUF tensors", file=file.path, count=len(unused), names=some_names(unused))
    given = {places[name] for name in weights}
    tied = model.all_tied_weights_keys
    missing = sorted(name for name in expected.keys() - given if tied.get(name, name) not in given)
    if missing:
        facts = {"count": counted(missing), "names": some_names(missing), "because": ""}
        raise problem("missing tensors", where=file.path, **facts)
    by_place: dict[str, list[str]] = {}
    for name in weights:
        by_place.setdefault(places[name], []).append(name)
    for place, names in by_place.items():
        if place in expected and not _fits([weights[name] for name in names], tuple(expected[place].shape)):
            facts = {"name": names[0], "stored": list(weights[names[0]]), "expected": list(expected[place].shape)}
            raise problem("shapes", where=file.path, because="", **facts)
    return model


def _check_types(file: GGUFFile) -> None:
    """Raises: CheckpointError: tensors are stored in a type that transformers does not dequantise."""
    own = is_gguf_arch_supported(file.architecture)
    for name, (_, kind) in file.tensors.items():
        if kind not in PLAIN and not (kind in GGML_BLOCK if own else _is_dequantised(kind)):
            raise problem("GGUF type", file=file.path, name=name, type=gguf.GGMLQuantizationType(kind).name)


@functools.cache
def _is_dequantised(kind: int) -> bool:
    """Whether the package gguf, which transformers calls for most architectures, dequantises a type."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType(kind))
    except NotImplementedError:
        return False
    return True


def _places(architecture: str, model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Parameter by GGUF name."""
    if is_gguf_arch_supported(architecture):
        mapping = get_gguf_conversion_mapping(architecture, model.config)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        return {name: rename_source_key(name, renamings, converters)[0] for name in tensors}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    # transformers looks through every submodule, which takes seconds: only where needed.
    top = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=dict)
    places = get_gguf_hf_weights_map(top, processor)
    # Experts put together are parameters without `.weight`.
    stems = {name: name if name in places else name.removesuffix(".weight") for name in tensors}
    if not set(stems.values()) <= places.keys():
        places = get_gguf_hf_weights_map(model, processor)
    return {name: places[stem] for name, stem in stems.items() if stem in places}


def _is_prediction(places: Mapping[str, str], name: str) -> bool:
    """Whether a tensor is of Qwen's layer that predicts several tokens, which transformers leaves out."""
    return places.get(name, "").startswith("mtp.")


def _fits(shapes: Sequence[tuple[int, ...]], expected: tuple[int, ...]) -> bool:
    """Whether stored shapes, of one tensor or of several put together, are a parameter's; ones do not count."""
    one = [size for size in shapes[0] if size != 1]
    wanted = [size for size in expected if size != 1]
    return one == wanted if len(shapes) == 1 else sum(map(math.prod, shapes)) == math.prod(expected)

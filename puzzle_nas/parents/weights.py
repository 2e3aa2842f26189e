"""The weight files of a checkpoint folder: every header is opened, no weight is read."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from puzzle_nas.parents.problems import first_line, problem
from puzzle_nas.text_files import POINTER

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHERS = ("*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "consolidated*.safetensors", "*.npz", "*.ckpt")
HARMLESS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".attention.masked_bias", ".attention.bias")
"""Ends of names that old versions stored and that follow from the configuration."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """torch's type, or the file's name of one that torch does not have."""


@dataclass(frozen=True)
class StoredWeights:
    """What transformers reads of a checkpoint folder."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    """By the name in the file."""
    format: str
    """`safetensors`, `pytorch` or `gguf`."""

    @property
    def size_bytes(self) -> int:
        """Of the files."""
        return sum(file.stat().st_size for file in self.files)


def check_is_no_placeholder(file: Path) -> None:
    """Raises: CheckpointError: a Git LFS pointer or a web page lies in place of the file."""
    with open(file, "rb") as opened:
        head = opened.read(200)
    if head.startswith(POINTER):
        raise problem("Git LFS pointer", file=file, size=file.stat().st_size)
    if head.lstrip()[:1] == b"<" and b"html" in head.lower():
        raise problem("web page", file=file)


def read_object(file: Path) -> dict[str, Any]:
    """A file of one JSON object.

    Raises:
        CheckpointError: it holds something else.
    """
    check_is_no_placeholder(file)
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise problem("not JSON", file=file, reason=first_line(error)) from error
    if not isinstance(value, dict):
        raise problem("not an object", file=file, kind=f"a {type(value).__name__}", what="an object of fields")
    return value


def stored_weights(folder: Path) -> StoredWeights:
    """Every tensor of a checkpoint folder, from the headers of its files.

    Raises:
        CheckpointError: a file is missing, cut, or at odds with the index.
    """
    index, whole = folder / INDEX, folder / SINGLE
    if whole.is_file():
        if index.is_file() and set(_weight_map(index).values()) != {SINGLE}:
            raise problem("two parents", where=folder, one=SINGLE, other=INDEX)
        return _collected(folder, [whole], "safetensors")
    if index.is_file():
        return _sharded(folder, index, "safetensors")
    if (folder / PICKLED).is_file():
        return _collected(folder, [folder / PICKLED], "pytorch")
    if (folder / PICKLED_INDEX).is_file():
        return _sharded(folder, folder / PICKLED_INDEX, "pytorch")
    others = sorted(path.name for pattern in OTHERS for path in folder.glob(pattern))
    if others:
        raise problem("other weights", where=folder, file=others[0])
    raise problem("no weights", where=folder)


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor.

    Raises:
        CheckpointError: the index has none.
    """
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise problem("not an object", file=index, kind="no weight_map", what="one of tensors' names and files")
    if not found:
        raise problem("empty index", file=index)
    return found


def _sharded(folder: Path, index: Path, kind: str) -> StoredWeights:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise problem("missing shard", file=index, shard=lacking[0], more=more)
    stored = _collected(folder, [folder / name for name in names], kind)
    for tensor, name in weight_map.items():
        if tensor not in stored.tensors or stored.tensors[tensor].file.name != Path(name).name:
            raise problem("index and shard disagree", index=index, tensor=tensor, file=name)
    for tensor, place in stored.tensors.items():
        if tensor not in weight_map and not tensor.endswith(HARMLESS):
            raise problem("not in the index", index=index, tensor=tensor, file=place.file)
    return stored


def _collected(folder: Path, files: Iterable[Path], kind: str) -> StoredWeights:
    tensors: dict[str, StoredTensor] = {}
    files = tuple(files)
    for file in files:
        check_is_no_placeholder(file)
        for name, tensor in (_safetensors_header if kind == "safetensors" else _pickled_header)(file).items():
            if name in tensors:
                raise problem("tensor twice", tensor=name, one=tensors[name].file.name, other=file.name, where=folder)
            tensors[name] = tensor
    return StoredWeights(files, tensors, kind)


def _safetensors_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return {
                name: StoredTensor(file, tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise problem("cut file", file=file, reason=first_line(error)) from error


def _pickled_header(file: Path) -> dict[str, StoredTensor]:
    try:
        held = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise problem("unsafe file", file=file, reason=first_line(error)) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise problem("cut file", file=file, reason=first_line(error)) from error
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise problem("not an object", file=file, kind="other things", what="a table of tensors")
    return {name: StoredTensor(file, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}

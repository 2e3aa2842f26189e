"""GGUF for llama.cpp: children of Llama's relatives as `deci`, those of others as their parent's own architecture."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from puzzle_nas.exporters.base import DTYPES, Child, Exporter
from puzzle_nas.exporters.gguf_contents import Contents
from puzzle_nas.exporters.gguf_deci import WRITERS, deci_contents, deci_problems
from puzzle_nas.exporters.gguf_own import own_contents, own_problems
from puzzle_nas.exporters.gguf_tokenizer import tokenizer_notes, tokenizer_problems, write_tokenizer
from puzzle_nas.exporters.llama_like import FAMILIES
from puzzle_nas.formats.registry import format_of
from puzzle_nas.servable import SERVERS

FILE_NAME = "model.gguf"
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}


class GGUFExporter(Exporter):
    """One file, `model.gguf`, with the tokenizer in it."""

    name = "gguf"
    server = "llama.cpp"
    engine = "llama.cpp"
    families = (*FAMILIES, *SERVERS["llama.cpp"].own_layers)
    writers = WRITERS

    def family_problems(self, child: Child) -> list[str]:
        """See `Exporter.family_problems`."""
        found = deci_problems(child) if child.family in FAMILIES else own_problems(child)
        return found + tokenizer_problems(child.tokenizer)

    def notes(self, child: Child) -> list[str]:
        """See `Exporter.notes`."""
        return tokenizer_notes(child.tokenizer, end_tokens(child))

    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """See `Exporter.write`."""
        contents = contents_of(child)
        writer = gguf.GGUFWriter(folder / FILE_NAME, contents.architecture)
        contents.write_sizes(writer)
        writer.add_file_type(FILE_TYPES[dtype])
        write_tokenizer(writer, child.tokenizer, child.config.vocab_size, end_tokens(child))
        for name, (weight, form) in contents.tensors.items():
            _add(writer, name, weight, dtype, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def differing(self, child: Child, folder: Path, dtype: str) -> list[str]:
        """See `Exporter.differing`. Some tensors are in float32, whatever `dtype`."""
        expected = contents_of(child.rounded(DTYPES[dtype])).tensors
        for name, tensor in contents_of(child).tensors.items():
            if in_float32(name, tensor[0]):
                expected[name] = tensor
        found = gguf.GGUFReader(folder / FILE_NAME).tensors
        names = {tensor.name for tensor in found} ^ set(expected)
        for tensor in found:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name not in names and not np.array_equal(values, expected[tensor.name][0].float().numpy()):
                names.add(tensor.name)
        return sorted(names)


def contents_of(child: Child) -> Contents:
    """What the file of a child holds, besides the tokenizer."""
    return deci_contents(child) if child.family in FAMILIES else own_contents(child)


def end_tokens(child: Child) -> list[int]:
    """The tokens at which answers end, by the model's generation settings."""
    ends = child.model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def in_float32(name: str, weight: torch.Tensor) -> bool:
    """Whether llama.cpp's own converter writes a tensor in float32 always: vectors, and the routers of experts."""
    return weight.ndim < 2 or name.endswith("ffn_gate_inp.weight")


def _add(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, dtype: str, form: str | None = None) -> None:
    """Matrices in `form`, else in `dtype`, and what `in_float32` says in that."""
    weight = weight.cpu()
    if form is not None and weight.ndim > 1:
        if weight.dtype != torch.uint8:
            weight = format_of(form).pack(format_of(form).nearest(weight))["weight"]
        writer.add_tensor(name, weight.contiguous().numpy(), raw_dtype=gguf.GGMLQuantizationType[form.upper()])
    elif in_float32(name, weight) or dtype == "float32":
        writer.add_tensor(name, weight.float().contiguous().numpy())
    elif dtype == "float16":
        writer.add_tensor(name, weight.to(DTYPES[dtype]).contiguous().numpy())
    else:
        raw = weight.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

"""What can go wrong in loading a parent: one sentence for each, what is wrong, where, and the way out."""

from __future__ import annotations

import struct
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from puzzle_nas.errors import CheckpointError

LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    struct.error,
)
"""What transformers, torch, safetensors and gguf raise for files that they cannot read."""

PROBLEMS = {
    # finding it
    "no checkpoint": "There is no checkpoint at {where}.",
    "no config": "{where} is not a checkpoint: it has no config.json{inner}.",
    "a file of it": "{where} is a file, where a checkpoint's folder is expected; name {folder}, or a .gguf file.",
    "not reachable": "{where} can be loaded neither from this disk nor from the model hub. ({reason})",
    "adapter": "{where} holds a LoRA adapter ({file}), not a model; merge it into its base model first (peft: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)) and name the merged folder.",
    "adapter beside a model": "{where} holds a whole model and a LoRA adapter ({file}), and it is not clear which is "
    "meant; merge the adapter (peft: merge_and_unload) and name the merged folder, or move {file} away.",
    # files
    "Git LFS pointer": "{file} is a Git LFS pointer of {size} bytes, not the file itself; fetch it with: git lfs pull",
    "web page": "{file} is a web page, not a model's file: the download failed; fetch it again.",
    "not JSON": "{file} is not JSON; it is incomplete or damaged, fetch it again. ({reason})",
    "not an object": "{file} holds {kind}, where {what} is expected.",
    "no weights": "{where} has no weights: neither model.safetensors, model.safetensors.index.json nor "
    "pytorch_model.bin.",
    "other weights": "{where} has no weights that transformers reads; it has {file}. Convert it to safetensors first.",
    "cut file": "{file} cannot be read; it is incomplete or damaged, fetch it again. ({reason})",
    "unsafe file": "{file} is not a plain table of weights: loading it would run code. Save it as safetensors where it "
    "was made. ({reason})",
    "two parents": "{where} holds {one} and {other}, which are two models; move one of them away.",
    "empty index": "{file} names no weights: its weight_map is empty; fetch it again.",
    "missing shard": "{file} names {shard}, which is not there{more}; fetch it again.",
    "index and shard disagree": "{index} says that {tensor} is in {file}, but it is not; fetch both again.",
    "not in the index": "{file} holds {tensor}, which {index} does not name; fetch both again.",
    "tensor twice": "{tensor} is in {one} and in {other}; remove the file that does not belong to {where}.",
    # config.json
    "field": "{file} says {field}: {value}, where {expected}; correct it there.",
    "contradiction": "config.json of {where} contradicts itself: {reason}",
    "unknown model": "config.json of {where} says model_type: {value}, which transformers {version} does not know; "
    "use a version that does, or a checkpoint of a family that `puzzle families` lists.",
    "own code": "{where} brings its own code ({file}) for model_type {value}, which is not run here; use a checkpoint "
    "of a family that transformers knows.",
    "not a language model": "{where} is of the family '{value}', which transformers has no causal language model for.",
    "no class": "transformers cannot build the model that config.json of {where} describes: {reason}",
    # tensors against config.json
    "missing tensors": "The checkpoint {where} lacks {count} that its config.json asks for, {names}{because}.",
    "unused tensors": "The checkpoint {where} holds {count} that its config.json leaves no place for, "
    "{names}{because}.",
    "shapes": "The checkpoint {where} does not fit its config.json: {name} is {stored}, where {expected} is "
    "expected{because}.",
    "same place": "The checkpoint {where} stores some weights twice under two names ({names}); remove one of each.",
    "tied and stored": "config.json of {where} ties the head to the embeddings (tie_word_embeddings: true), but "
    "another head is stored ({name}); say tie_word_embeddings: false there if the stored head is the model's, or "
    "delete it.",
    "integers": "{name} of {where} is stored as {dtype}, and config.json names no quantisation that explains it; use "
    "the checkpoint it was made from.",
    "not computed": "The model that config.json of {where} describes cannot compute: {reason}",
    # quantisation
    "quantised": "{where} is quantised with {method}, which is not read here; name the checkpoint that it was made "
    "from, or {way_out}.",
    "unsaid quantisation": "{where} holds {name}, as {method} writes it, but its config.json has no "
    "quantization_config; fetch config.json again.",
    "no scale": "The checkpoint {where} is quantised with {method}, but {name} is stored without its scale; fetch it "
    "again.",
    # GGUF
    "not GGUF": "{file} is not a readable GGUF file; it is incomplete or damaged, fetch it again. ({reason})",
    "cut GGUF": "{file} is cut: its tensors end at byte {end}, but it has {size} bytes; fetch it again.",
    "split GGUF": "{file} is one of {count} parts; join them with: llama-gguf-split --merge {file} whole.gguf",
    "GGUF architecture": "{file} is of the architecture {architecture}; GGUF files are read of {known}. Name the "
    "checkpoint folder that it was made from.",
    "GGUF tensors": "{file} holds {count} tensors that transformers does not read, {names}; name the checkpoint folder "
    "that it was made from.",
    "GGUF type": "{file} stores {name} as {type}, which transformers does not dequantise here; name the checkpoint "
    "folder that it was made from, or a GGUF file of another type.",
    "GGUF rope": "{file} has rotary positions that are not read here ({what}); name the checkpoint folder that it was "
    "made from.",
    "GGUF field": "{file} says {key}: {value}, which is not read here; name the checkpoint folder that it was made "
    "from.",
    "GGUF tokenizer": "{file} says tokenizer.ggml.{key}: {value}, a way of splitting text that is not known here; "
    "name the checkpoint folder that it was made from.",
    # tokenizer
    "no tokenizer": "The checkpoint {where} has no usable tokenizer. ({reason})",
    "tokenizer too new": "{file} cannot be read by tokenizers {version}: it is damaged, or a newer version wrote it; "
    "fetch it again, or install that version. ({reason})",
    "tokenizer too long": "The tokenizer of {where} has {entries} entries but the parent's vocabulary only "
    "{vocab_size}: it belongs to another model, or the model must be lengthened first "
    "(model.resize_token_embeddings({entries}), then train).",
}


def problem(kind: str, /, **facts: Any) -> CheckpointError:
    """The error of one kind, its sentence filled in."""
    return CheckpointError(PROBLEMS[kind].format(**facts))


def first_line(error: BaseException, length: int = 200) -> str:
    """What a library's error says, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


def counted(names: list[str]) -> str:
    """How many weights."""
    return f"{len(names)} weight{'s' * (len(names) != 1)}"


def some_names(names: list[str]) -> str:
    """The first of many names, as they stand in a sentence."""
    return f"{names[0]} among them" if len(names) > 1 else names[0]

"""Text -> packed token blocks of the five splits."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_bytes, write_json
from puzzle_nas.data import packing
from puzzle_nas.data.parent_samples import sample_documents
from puzzle_nas.data.sources import Document, documents
from puzzle_nas.errors import DataError
from puzzle_nas.families import architecture_of, head_dim_of, load_parent, load_tokenizer, parent_checkpoint
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import PARENT_SAMPLES, SPLITS, Recipe
from puzzle_nas.training import parallel

SAMPLING_ROWS = {"cpu": 128, "cuda": 4096}
"""Rows that the parent writes together at most."""
SAMPLING_BYTES = 1 << 30
"""Of memory that their KV cache and logits may take; half of what is free on a GPU."""
LOGIT_BYTES = 16
"""In bfloat16, in float32, and what sampling makes of them."""


def run(recipe: Recipe, run: RunFolder) -> None:
    """Write `data/SPLIT.safetensors` for each split and data/data.json, which says what is in them."""
    parent = read_json(run.parent, "prepare-parent")
    checkpoint = parent_checkpoint(run)
    tokenizer = load_tokenizer(checkpoint)
    _check_sequence_length(recipe.data.sequence_length, checkpoint)
    names = _source_names(recipe)
    # The first document of each text source is read before the parent writes: that a file is missing should
    # not come out minutes later.
    streams = [
        None if settings.source == PARENT_SAMPLES else _opened(documents(settings, recipe.seed))
        for settings in recipe.data.sources
    ]
    samples = _parent_samples(recipe, run, parent, tokenizer) if None in streams else []
    sources = [
        packing.TextSource(name, settings.weight, samples, "raise data.train_tokens")
        if stream is None
        else packing.TextSource(name, settings.weight, stream)
        for name, settings, stream in zip(names, recipe.data.sources, streams, strict=True)
    ]
    total = sum(map(recipe.data.blocks, SPLITS)) * recipe.data.sequence_length
    with progress("reading text, tokens", total) as ticker:
        splits = packing.pack(
            sources,
            tokenizer,
            parent["vocab_size"],
            recipe.data,
            recipe.seed,
            lambda tokens: ticker.advance(min(tokens, total - ticker.done)),
        )
    _write(recipe, run, names, splits, packing.Encoder(tokenizer, recipe.data.separator))


def _write(
    recipe: Recipe, run: RunFolder, names: list[str], splits: dict[str, packing.PackedSplit], encoder: packing.Encoder
) -> None:
    facts = {}
    for name, split in splits.items():
        write_bytes(run.split(name), safetensors.numpy.save({"tokens": split.tokens}))
        facts[name] = {
            "tokens": split.tokens.size,
            "blocks": len(split.tokens),
            "documents": split.documents,
            "tokens_by_source": dict(split.tokens_by_source),
            "fingerprint": hashlib.sha256(split.tokens.tobytes()).hexdigest(),
        }
    asked, found = recipe.data.train_tokens, facts["train"]["tokens"]
    if found < asked - recipe.data.sequence_length:
        console.print(f"  train has {found:,} of the {asked:,} tokens asked for: the sources have no more.")
    if not any(settings.source == PARENT_SAMPLES for settings in recipe.data.sources):
        _samples_path(run).unlink(missing_ok=True)
    sources = [
        {"name": name, **settings.model_dump()} for name, settings in zip(names, recipe.data.sources, strict=True)
    ]
    write_json(
        run / "data" / "data.json",
        {
            "sequence_length": recipe.data.sequence_length,
            "separator_id": encoder.separator,
            "beginning_id": encoder.beginning,
            "sources": sources,
            "splits": facts,
        },
    )


def _opened(stream: Iterator[Document]) -> Iterator[Document]:
    """The same documents, the first of them read already."""
    return itertools.chain([next(stream)], stream)


def _source_names(recipe: Recipe) -> list[str]:
    """A name for each source: what the recipe calls it, with its column where one file gives two."""
    given = [settings.source for settings in recipe.data.sources]
    names = [
        settings.source if given.count(settings.source) == 1 else f"{settings.source} ({settings.text_field})"
        for settings in recipe.data.sources
    ]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data.sources names {name} twice; name it once and add up the weights.")
    return names


def _check_sequence_length(sequence_length: int, checkpoint: Path) -> None:
    longest = getattr(AutoConfig.from_pretrained(checkpoint), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise DataError(f"data.sequence_length is {sequence_length}, but the parent has {longest} positions; lower it.")


# What the parent wrote is kept beside the splits: other sources or sizes of splits need no new writing.


def _samples_path(run: RunFolder) -> Path:
    return run / "data" / "sources" / f"{PARENT_SAMPLES}.safetensors"


def _parent_samples(recipe: Recipe, run: RunFolder, parent: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    num_tokens, length = recipe.data.sampled_tokens(), recipe.data.sequence_length
    made_from = fingerprint([parent, recipe.seed, recipe.precision, recipe.device, num_tokens, length])
    kept = _read_samples(_samples_path(run), made_from)
    if kept is not None:
        return kept
    model = load_parent(recipe, run)
    head_dim, itemsize = head_dim_of(model.config), model.dtype.itemsize
    cached = sum(spec.cache_bytes(length, head_dim, itemsize) for _, _, spec in architecture_of(model.config))
    bytes_per_row = cached + LOGIT_BYTES * parent["vocab_size"]
    room = SAMPLING_BYTES if model.device.type == "cpu" else parallel.share_of_memory(model.device) / 2
    batch_size = max(1, min(SAMPLING_ROWS[model.device.type], int(room // bytes_per_row)))
    with progress("parent writes, tokens", num_tokens) as ticker:
        samples = sample_documents(
            model,
            tokenizer,
            num_tokens,
            recipe.seed,
            length,
            batch_size,
            lambda tokens: ticker.advance(min(tokens, num_tokens - ticker.done)),
        )
    tensors = {
        "tokens": np.concatenate([np.asarray(sample, np.int32) for sample in samples]),
        "lengths": np.asarray([len(sample) for sample in samples], np.int32),
    }
    write_bytes(_samples_path(run), safetensors.numpy.save(tensors, {"made_from": made_from}))
    return samples


def _read_samples(path: Path, made_from: str) -> list[list[int]] | None:
    """Samples of an earlier try, if they were made from the same things."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("made_from") != made_from:
                return None
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
    except SafetensorError:
        return None
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]

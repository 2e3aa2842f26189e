"""Checkpoint -> what an engine serves, checked against the child. Folder: exports/FORMAT-PRECISION/.

Not one of the pipeline's stages: it is asked for by name and any number of exports may lie side by side.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from puzzle_nas import __version__
from puzzle_nas.artifacts import complete_folder, file_checksum, read_json, write_json
from puzzle_nas.data.sources import stdlib_documents
from puzzle_nas.engines import serving_engine
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.engines.verification import LEAST_TOKENS, cut_prompts, verify, verify_quantised, verify_served
from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.exporters.base import DTYPES
from puzzle_nas.progress import console


def export_child(
    checkpoint: Path, to: str, dtype: str | None, quantise: str | None, exports: Path, kv_format: str | None = None
) -> Path:
    """Write, verify and only then name an export; its folder.

    Args:
        checkpoint: a child's (or parent's) folder.
        to: a key of `EXPORTERS`.
        dtype: precision of the weights; None is the engine's for the checkpoint's (`Engine.weights_dtype`).
        quantise: the engine's quantised type, such as q8_0, or None.
        exports: where the export gets its folder.
        kv_format: in which its engine is to keep the KV cache; noted where that engine can.

    Raises:
        ExportError: the format cannot hold the child, or the engine computes something else from it.
        EngineError: the engine that verifies is not installed, or fails.
    """
    if to not in EXPORTERS:
        raise ExportError(f"There is no export format '{to}'; formats: {', '.join(EXPORTERS)}.")
    exporter = EXPORTERS[to]
    child = Child.load(checkpoint)
    exporter.refuse(child)
    engine = serving_engine(exporter.engine)
    engine.python()
    # What is quantised is not rounded twice.
    own = child.own_dtype if quantise else engine.weights_dtype(child.own_dtype)
    dtype = dtype or str(own).removeprefix("torch.")
    if dtype not in exporter.dtypes:
        raise ExportError(f"{to} is not written in {dtype}; precisions: {', '.join(exporter.dtypes)}.")
    if quantise is not None and quantise not in engine.quantised:
        kinds = ", ".join(engine.quantised) or "none"
        raise ExportError(f"{engine.name} does not quantise {to} to {quantise}; types: {kinds}.")
    formats = child.architecture.formats
    engine.refuse_here(formats, kv_format)
    if formats and quantise is not None:
        raise ExportError(f"The child is stored in {', '.join(formats)} already; leave out --quantize {quantise}.")
    folder = exports / f"{to}-{quantise or '+'.join(formats) or dtype}"
    made_from = {
        "puzzle_nas": __version__,
        "checkpoint": _checksums(checkpoint, "*.safetensors"),
        "format": to,
        "precision": quantise or dtype,
        "formats": list(formats),
        "kv_format": kv_format if kv_format in engine.kv_formats else None,
    }
    if (folder / EXPORT_RECORD).is_file():
        record = read_json(folder / EXPORT_RECORD)
        if record.items() >= made_from.items() and record.get("files") == _checksums(folder, "[!.]*", EXPORT_RECORD):
            console.print(f"  {folder} holds this very child already, verified.")
            return folder
    prompts = cut_prompts(_text_tokens(child), child.config.max_position_embeddings)
    notes = exporter.notes(child)
    for note in notes:
        console.print(f"  {note}")
    tensor_types: dict[str, int] | None = None
    with complete_folder(folder) as partial:
        checks = {}
        if engine.tolerances[dtype].max_nats > engine.tolerances["float32"].max_nats:
            # Rounded arithmetic hides small errors; the same weights written in float32 show them.
            console.print(f"  write the same weights in float32 and verify with {engine.name}")
            rounded, exact = child.rounded(DTYPES[dtype]), partial / "float32"
            exact.mkdir()
            exporter.write(rounded, exact, "float32")
            checks["float32"] = verify(exporter, engine, rounded, exact, "float32", prompts)
            shutil.rmtree(exact)
        console.print(f"  write {to}, {dtype}")
        exporter.write(child, partial, dtype)
        console.print(f"  verify with {engine.name}")
        checks[dtype] = verify(exporter, engine, child, partial, dtype, prompts)
        if formats and engine.served_in_16_bits:
            console.print(f"  verify with {engine.name} as it is served")
            checks[f"{dtype}, as served"] = verify_served(exporter, engine, child, partial, dtype, prompts)
        if formats:
            if differing := exporter.differing(child, partial, dtype):
                raise ExportError(f"The file does not hold the child's weights: {', '.join(differing)} differ.")
            tensor_types = engine.tensor_types(partial)
            types = ", ".join(f"{count} are {name}" for name, count in tensor_types.items())
            of_types = f"of {sum(tensor_types.values())} tensors {types}, all" if types else "all tensors are"
            console.print(f"  {of_types} as the child has them")
        if quantise is not None:
            console.print(f"  quantise to {quantise} and verify")
            tensor_types = engine.quantise(partial, quantise)
            types = ", ".join(f"{count} are {name}" for name, count in tensor_types.items())
            console.print(
                f"  of {sum(tensor_types.values())} tensors {types}: what does not fit a type becomes another"
            )
            checks[quantise] = verify_quantised(exporter, engine, child, partial, quantise, prompts)
        found = {"verification": checks, "notes": notes, "tensor_types": tensor_types}
        found["files"] = _checksums(partial, "[!.]*")
        write_json(partial / EXPORT_RECORD, made_from | found)
    for precision, check in checks.items():
        console.print(
            f"  {precision}: {check['num_tokens']} tokens, log-probabilities differ by {check['mean_nats']:.2g} nats "
            f"on average, {check['max_nats']:.2g} at most; {check['continued_likewise']} of "
            f"{check['continued_tokens']} greedily continued tokens are torch's too"
        )
    return folder


def _checksums(folder: Path, pattern: str, but: str = "") -> dict[str, str]:
    files = sorted(file for file in folder.glob(pattern) if file.is_file() and file.name != but)
    return {file.name: file_checksum(file) for file in files}


def _text_tokens(child: Child) -> list[int]:
    """Real text, of more tokens than verification needs."""
    tokens: list[int] = []
    for text in _texts():
        tokens += child.tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) > 4 * LEAST_TOKENS:
            break
    return tokens


def _texts() -> Iterator[str]:
    return stdlib_documents(seed=0)

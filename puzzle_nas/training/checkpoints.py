"""What an interrupted training goes on from: tensors, the step, and checksums.

One file for what a single process trains, a folder for what lies in shards; any number of processes can read that.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from puzzle_nas.artifacts import (
    complete_folder,
    explained_disk_errors,
    file_checksum,
    read_json,
    write_json,
    write_whole,
)
from puzzle_nas.errors import ArtifactError
from puzzle_nas.progress import console
from puzzle_nas.training import parallel

CHECKSUMS = "checksums.json"


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Write tensors, from any device, and the step to continue with."""
    kept = {name: w.detach().cpu().contiguous().clone() for name, w in tensors.items()}
    facts = {"step": str(step), "checksum": _checksum(kept, step)}
    write_whole(path, lambda partial: save_file(kept, partial, facts))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], int] | None:
    """Tensors on the CPU and the step; None where there is no file, or only a damaged one, which is deleted."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(facts["step"])
        if facts["checksum"] == _checksum(tensors, step):
            return tensors, step
    except (SafetensorError, KeyError, ValueError):
        pass
    _say_damaged(path)
    path.unlink()
    return None


def _say_damaged(path: Path) -> None:
    console.print(f"  The checkpoint {path} is damaged; what it was for is trained again.")


def _checksum(tensors: Mapping[str, torch.Tensor], step: int) -> str:
    value = zlib.crc32(str(step).encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return str(value)


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Write tensors to `folder`/step_N, each process its shards of them, and forget earlier steps."""
    import torch.distributed.checkpoint as checkpoint

    target = folder / f"step_{step:08d}"
    # Only the first makes the folder, and gives it its name when all are done.
    partial = target.with_name(target.name + ".partial")
    with complete_folder(target) if parallel.is_first() else explained_disk_errors(target):
        parallel.gathered(())
        writer = checkpoint.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            checkpoint.save(dict(tensors), storage_writer=writer, no_dist=parallel.world_size() == 1)
        except checkpoint.CheckpointException as failed:
            raise next(cause for cause, _ in failed.failures.values()) from None
        parallel.gathered(())
        if parallel.is_first():
            write_json(partial / CHECKSUMS, {path.name: file_checksum(path) for path in sorted(partial.iterdir())})
    if parallel.is_first():
        for path in folder.glob("step_*"):
            if path != target:
                shutil.rmtree(path)


def read_shards(folder: Path, parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int] | None:
    """The last step's tensors and the step; None where there is none, or only a damaged one, which is deleted.

    Tensors named `.../NAME` come sharded as the parameter NAME is, others whole.
    """
    import torch.distributed.checkpoint as checkpoint

    found = parallel.from_first(lambda: _last_sound(folder))
    if found is None:
        return None
    reader = checkpoint.HuggingFaceStorageReader(str(found))
    tensors: dict[str, torch.Tensor] = {}
    for key, facts in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(facts, checkpoint.metadata.TensorStorageMetadata)
        like = parameters.get(key.partition("/")[2])
        if like is not None and like.shape == facts.size:
            tensors[key] = torch.empty_like(like, dtype=facts.properties.dtype, requires_grad=False)
        else:
            tensors[key] = torch.empty(facts.size, dtype=facts.properties.dtype)
    checkpoint.load(tensors, storage_reader=reader, no_dist=parallel.world_size() == 1)
    return tensors, int(found.name.removeprefix("step_"))


def _last_sound(folder: Path) -> Path | None:
    """The last step whose files are those that were written; damaged ones are deleted."""
    for path in sorted(folder.glob("step_????????"), reverse=True):
        sums = path / CHECKSUMS
        with suppress(ArtifactError, FileNotFoundError):
            if all(file_checksum(path / name) == checksum for name, checksum in read_json(sums).items()):
                return path
        _say_damaged(path)
        shutil.rmtree(path)
    return None

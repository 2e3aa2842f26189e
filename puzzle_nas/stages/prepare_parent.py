"""Find the parent; convert it to a transformers checkpoint where it is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puzzle_nas.artifacts import RunFolder, complete_folder, explained_disk_errors, fingerprint, read_json, write_json
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import Machine, find_checkpoint, load_tokenizer, machine_of, open_parent, to_puzzle
from puzzle_nas.families.loading import shape_of, shape_to_dict, stream_model
from puzzle_nas.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle_nas.recipe import Recipe

NAME = "prepare_parent"
COMMAND = "prepare-parent"
NEEDS = ()
SETTINGS = ("parent", "precision", "device")
OUTPUTS = ("parent.json", "parent/*")


def weights_fingerprint(folder: Path) -> str:
    """Which weights a checkpoint folder or a file holds: names, sizes, and both ends of every weight file."""
    facts = []
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
    for path in files:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            facts.append([path.name, path.stat().st_size, fingerprint([head.hex(), file.read().hex()])])
    return fingerprint(facts)


def local_weights(recipe: Recipe) -> str | None:
    """Fingerprint of a parent that lies on this machine, so that another in its place is noticed; None elsewhere."""
    path = Path(recipe.parent).expanduser()
    return weights_fingerprint(path) if path.exists() else None


def run(recipe: Recipe, run: RunFolder) -> None:
    """Write parent.json, and parent/ unless the parent is a local checkpoint already."""
    where = find_checkpoint(recipe.parent, run / "download")
    machine = machine_of(recipe)
    if recipe.memory != "all" and isinstance(where, Path) and (where / "config.json").is_file():
        checkpoint, tokenizer = where.resolve(), load_tokenizer(where)
        config = stream_model(checkpoint, machine).config
    else:
        checkpoint, tokenizer, config = _opened(where, run, machine)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {len(tokenizer)} entries but the parent's vocabulary only "
            f"{config.vocab_size}: it belongs to another model."
        )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PuzzleForCausalLM(config).parameters())
    write_json(
        run.parent,
        {
            "source": recipe.parent,
            "checkpoint": run.relative(checkpoint),
            "family": read_json(checkpoint / "config.json")["model_type"],
            "shape": shape_to_dict(shape_of(config)),
            "vocab_size": config.vocab_size,
            "parameters": parameters,
            "weights_fingerprint": weights_fingerprint(checkpoint),
        },
    )


def _opened(where: Path | str, run: RunFolder, machine: Machine) -> tuple[Path, Any, PuzzleConfig]:
    """Checkpoint, tokenizer and configuration of a parent, loaded whole and written where it is no local checkpoint."""
    model, tokenizer = open_parent(where)
    if isinstance(where, Path) and where.is_dir():
        checkpoint = where.resolve()
    else:
        # transformers refuses to save a model loaded from GGUF: the weights move into a fresh one.
        fresh = type(model)(model.config).to(machine.dtype)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config = model.generation_config
        checkpoint = run / "parent"
        with complete_folder(checkpoint) as folder, explained_disk_errors(folder):
            fresh.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        model = fresh
    return checkpoint, tokenizer, to_puzzle(model).config

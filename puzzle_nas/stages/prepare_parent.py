"""Find the parent; convert it to a transformers checkpoint where it is none."""

from __future__ import annotations

from pathlib import Path

from puzzle_nas.artifacts import RunFolder, complete_folder, explained_disk_errors, fingerprint, write_json
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import find_checkpoint, open_parent, to_puzzle
from puzzle_nas.families.loading import family_of, machine_of, shape_of, shape_to_dict
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
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {len(tokenizer)} entries but the parent's vocabulary only "
            f"{model.config.vocab_size}: it belongs to another model."
        )
    puzzle = to_puzzle(model)
    write_json(
        run.parent,
        {
            "source": recipe.parent,
            "checkpoint": run.relative(checkpoint),
            "family": family_of(model.config.model_type).model_type,
            "shape": shape_to_dict(shape_of(puzzle.config)),
            "vocab_size": puzzle.config.vocab_size,
            "parameters": sum(p.numel() for p in puzzle.parameters()),
            "weights_fingerprint": weights_fingerprint(checkpoint),
        },
    )

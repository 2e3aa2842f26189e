"""Find and examine the parent; convert it to a plain transformers checkpoint where it is none."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from puzzle_nas.artifacts import RunFolder, complete_folder, explained_disk_errors, write_json
from puzzle_nas.engines import ENGINES, ServingEngine
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import architecture_of, family_of, find_checkpoint, open_parent
from puzzle_nas.families.anatomy import check_adapter
from puzzle_nas.families.loading import stream_model
from puzzle_nas.machine import Machine, machine_of
from puzzle_nas.parents import Examined, examine, parent_fingerprint
from puzzle_nas.planning.refusals import check_shapes
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe


def local_weights(recipe: Recipe) -> str | None:
    """Fingerprint of a parent that lies on this machine, so that another in its place is noticed; None elsewhere."""
    path = Path(recipe.parent).expanduser()
    return parent_fingerprint(path) if path.exists() else None


def run(recipe: Recipe, run: RunFolder) -> None:
    """Write parent.json, and parent/ unless the parent is a local, plain checkpoint already."""
    where = find_checkpoint(recipe.parent, run / "download")
    machine = machine_of(recipe)
    examined = examine(where, lambda config: family_of(config.model_type))
    for line in examined.warnings:
        console.print(f"  {line}")
    _refuse(recipe, examined)
    if recipe.memory != "all" and isinstance(where, Path) and (where / "config.json").is_file():
        checkpoint = where.resolve()
        model = stream_model(checkpoint, machine)
    else:
        checkpoint, model = _opened(where, examined, run, machine)
    config = model.config
    architecture = architecture_of(config)
    check_adapter(model, sorted(set(architecture.groups)))
    write_json(
        run.parent,
        {
            "source": recipe.parent,
            "checkpoint": run.relative(checkpoint),
            "family": config.model_type,
            "architecture": architecture.to_list(),
            "vocab_size": config.vocab_size,
            "parameters": examined.parameters,
            "weights_fingerprint": parent_fingerprint(checkpoint),
        },
    )


def _refuse(recipe: Recipe, examined: Examined) -> None:
    """Refuse what cannot go on, and say where the engine cannot serve the tokenizer: children are then only timed.

    Raises:
        RecipeError, FormatError, ExportError: see `check_shapes`; or a format is not computed rightly here.
    """
    check_shapes(recipe, examined.model)
    engine = ENGINES[recipe.engine]
    if not isinstance(engine, ServingEngine):
        return
    engine.refuse_here(recipe.search_space.formats, recipe.kv_format)
    exporter = EXPORTERS[engine.formats[0]]
    for reason in exporter.reasons(Child(examined.model, examined.tokenizer)):
        console.print(f"  The child will run on {engine.name} but not be exported to {exporter.name}: {reason}.")


def _opened(where: Path | str, examined: Examined, run: RunFolder, machine: Machine) -> tuple[Path, PreTrainedModel]:
    """Checkpoint and model of a parent, loaded whole and written where it is no local, plain checkpoint."""
    dtype = "auto" if examined.quantisation is None else machine.dtype
    model, tokenizer = open_parent(where, examined, dtype)
    if isinstance(where, Path) and where.is_dir() and examined.quantisation is None:
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
    return checkpoint, model

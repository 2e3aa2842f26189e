"""Blockwise local distillation, decoupled: every variant on its own (Puzzle, section 2). Files: library/main/."""

from __future__ import annotations

from puzzle_nas.architecture import Spec
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import facts_path, read_variant, write_variant
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.training import parallel
from puzzle_nas.training.block_distillation import distill_blocks
from puzzle_nas.training.block_steps import Job

NAME = "distill_blocks"
COMMAND = "distill-blocks"
NEEDS = ("build_library",)
SETTINGS = ("seed", "bld")
OUTPUTS = ("library/main/*/*",)


def run(recipe: Recipe, run: RunFolder) -> None:
    """Train every variant that has weights; copy those that have none."""
    parent, shape = load_parent(run, by_layer=True)
    parallel.divide_threads()
    jobs = [
        [_job(run, index, spec) for slot, specs in slots.items() for spec in specs if spec != shape.parent_spec(slot)]
        for index, slots in enumerate(search_space_of(recipe, shape).options)
    ]
    if recipe.bld.tokens == 0:
        for job in parallel.share([job for layer_jobs in jobs for job in layer_jobs]):
            write_variant(job.path, job.specs, job.start(), {"tokens": 0})
        return
    distill_blocks(recipe, recipe.bld, run, NAME, parent, load_tokens(run, "train"), jobs, block_order)


def _job(run: RunFolder, layer: int, spec: Spec) -> Job:
    initial = run.initial_variant(layer, spec.id)
    facts = read_json(facts_path(initial), "build-library")
    facts = {key: value for key, value in facts.items() if key not in ("spec", "parameters", "checksum")}
    return Job((spec,), run.variant(layer, spec.id), lambda: read_variant(initial, "build-library"), facts)

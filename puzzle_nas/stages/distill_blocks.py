"""Blockwise local distillation, decoupled: every variant on its own (Puzzle, section 2). Files: library/main/."""

from __future__ import annotations

from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.families import architecture_of, load_parent
from puzzle_nas.library import facts_path, read_variant, variant_is_stored, write_variant
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.specs import Spec
from puzzle_nas.training import parallel
from puzzle_nas.training.block_distillation import distill_blocks
from puzzle_nas.training.block_steps import Job

MADE_WITH_IT = ("spec", "parameters", "checksum", "matrices_checksum")
"""Facts of a file and not of how a variant came about."""
NAME = __name__.rpartition(".")[2]


def run(recipe: Recipe, run: RunFolder) -> None:
    """Train every variant that has weights; copy those that have none, and what is rounded."""
    parent = load_parent(recipe, run, by_layer=True)
    parallel.divide_threads()
    space = search_space_of(recipe, architecture_of(parent.config))
    rounded = [(layer, spec) for layer, (spec,) in space.scored() if spec.format]
    for layer, spec in parallel.share(rounded):
        if not variant_is_stored(run.variant(layer, spec.id)):
            job = _job(run, layer, spec)
            write_variant(job.path, job.specs, job.start(), {"tokens": 0})
    plain = [[spec for spec in space.variants(index) if not spec.format] for index in range(len(space.options))]
    jobs = [[_job(run, index, spec) for spec in specs] for index, specs in enumerate(plain)]
    if recipe.bld.tokens == 0:
        for job in parallel.share([job for layer_jobs in jobs for job in layer_jobs]):
            write_variant(job.path, job.specs, job.start(), {"tokens": 0})
        return
    distill_blocks(recipe, recipe.bld.tokens, run, NAME, parent, load_tokens(run, "train"), jobs, block_order)


def _job(run: RunFolder, layer: int, spec: Spec) -> Job:
    initial = run.initial_variant(layer, spec.id)
    facts = read_json(facts_path(initial), "build-library")
    facts = {key: value for key, value in facts.items() if key not in MADE_WITH_IT}
    return Job((spec,), run.variant(layer, spec.id), lambda: read_variant(initial, "build-library"), facts)

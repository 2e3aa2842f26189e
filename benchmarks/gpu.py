"""One GPU: what fraction of it BLD, scoring and GKD use, what capturing and compiling gain; GKD in shards by NCCL.

Reads a run that was made there (benchmarks/general_gpu.yaml) and a child of it. Each part has a file of its own,
results/gpu_PART.json. python benchmarks/gpu.py PART RUN CHILD

    rates      tokens/s of BLD, scoring and GKD, each over the rate of its matrix products alone; BLD also without
               CUDA graphs, GKD also with gkd.compile
    shards     GKD whole, and with parent and child in shards (FSDP2) of one rank: KL on selection, seconds
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from achieved import achieved, median_seconds
from results import save
from throughput import LAYER, STEPS, gkd, scoring, trained
from torch.distributed.device_mesh import init_device_mesh

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, machine_of
from puzzle_nas.families.loading import shape_of
from puzzle_nas.library import read_variant
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.stages.distill_child import Training
from puzzle_nas.training import parallel
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Steps, Trainee
from puzzle_nas.training.parent_outputs import LiveParent

BATCH_TOKENS = (2_048, 8_192, 32_768)
BLD_BATCHES = 4
SHARD_STEPS = 16


def bld(run: RunFolder, parent: torch.nn.Module, recipe: Recipe, batch_tokens: int) -> dict[str, float]:
    """A step of every trained variant of one layer: captured, as in a run, and started kernel by kernel."""
    length = recipe.data.sequence_length
    tokens = load_tokens(run, "train")[: BLD_BATCHES * batch_tokens // length]
    activations = LayerActivations(parent, tokens, run.scratch("benchmark"))
    activations.climb_to(LAYER)
    block = parent.get_submodule(f"model.layers.{LAYER}")
    task = BlockTask(activations, block, "token", parent.dtype == torch.bfloat16)
    starts = {
        spec: read_variant(run.initial_variant(LAYER, spec.id), "build-library")
        for layer, _, spec in search_space_of(recipe, shape_of(parent.config))
        if layer == LAYER and trained(run, spec)
    }
    batches = itertools.cycle(torch.arange(len(tokens), device=activations.device).split(batch_tokens // length))

    def steps() -> tuple[Steps, Callable[[], object]]:
        trainees = [
            Trainee(Job((spec,), Path(), dict, {}), start, parent, block, recipe.bld, STEPS)
            for spec, start in starts.items()
        ]
        taken = Steps(task, trainees, batch_tokens // length)
        return taken, lambda: taken.take(0, next(batches), trainees)

    (_, captured), (one_by_one, work) = steps(), steps()
    one_by_one.can_capture = False
    # The first step of either is not captured, so that its products can be counted.
    done, before = achieved(captured), median_seconds({"step": work})["step"]
    activations.delete()
    name = f"_{batch_tokens}_tokens_a_step"
    return {
        "bld_fraction_of_matmul_rate" + name: done.fraction,
        "bld_fraction_of_matmul_rate_not_captured" + name: done.fraction * done.seconds / before,
        "bld_variant_tokens_per_second" + name: batch_tokens * len(starts) / done.seconds,
        "bld_milliseconds_a_variant" + name: 1e3 * done.seconds / len(starts),
        "bld_milliseconds_a_variant_not_captured" + name: 1e3 * before / len(starts),
    }


def with_gkd(recipe: Recipe, **settings) -> Recipe:
    """The same, with other settings of GKD."""
    return recipe.model_copy(update={"gkd": recipe.gkd.model_copy(update=settings)})


def rates(run: RunFolder, child: Path) -> dict[str, float]:
    """See above."""
    recipe, (parent, shape) = open_run(run), load_parent(run)
    figures: dict[str, float] = {}
    for batch_tokens in BATCH_TOKENS:
        figures |= bld(run, parent, recipe, batch_tokens)
    sequences = recipe.scoring.batch_tokens // recipe.data.sequence_length
    done = achieved(scoring(run, parent, search_space_of(recipe, shape), recipe, sequences))
    figures["scoring_fraction_of_matmul_rate"] = done.fraction
    figures["scoring_teraflops_per_second"] = done.flops / done.seconds / 1e12
    for batch_tokens in BATCH_TOKENS:
        plain, compiled = (with_gkd(recipe, batch_tokens=batch_tokens, compile=value) for value in (False, True))
        done = achieved(gkd(run, parent, plain, child))
        begin = time.perf_counter()
        # A parent of its own: layers stay compiled.
        work = gkd(run, load_parent(run)[0], compiled, child)
        work()
        compiling = time.perf_counter() - begin
        seconds = median_seconds({"step": work})["step"]
        name = f"_{batch_tokens}_tokens_a_step"
        figures["gkd_fraction_of_matmul_rate" + name] = done.fraction
        figures["gkd_fraction_of_matmul_rate_compiled" + name] = done.fraction * done.seconds / seconds
        figures["gkd_tokens_per_second" + name] = batch_tokens / done.seconds
        figures["gkd_tokens_per_second_compiled" + name] = batch_tokens / seconds
        figures["gkd_seconds_to_compile" + name] = compiling
        figures["gkd_matmul_teraflops_per_second" + name] = done.matmul_flops_per_second / 1e12
    return figures


def shards(run: RunFolder, child: Path) -> dict[str, float]:
    """See above. One rank would not divide anything by itself, so it is told that there were two."""
    recipe = open_run(run)
    settings = {
        "tokens": SHARD_STEPS * recipe.gkd.batch_tokens,
        "evaluate_every_steps": SHARD_STEPS // 2,
        "learning_rate": 3e-4,
    }
    recipe = with_gkd(recipe, **settings)
    figures: dict[str, float] = {}

    def train(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for kept in ("data", "parent", "parent.json"):
                (Path(folder) / kept).symlink_to((run / kept).resolve())

            def training() -> Training:
                parent = LiveParent(load_parent(run)[0])
                return Training(recipe, RunFolder(folder), parent, load_model(child, machine_of(recipe)))

            first = training()
            begin = time.perf_counter()
            first.train()
            figures[f"seconds_{name}"] = time.perf_counter() - begin
            figures[f"selection_kl_nats_{name}"] = first.curve[-1]["selection_kl_nats"]
            figures[f"resumes_at_step_{name}"] = training().load()

    train("whole")
    train("whole_again")
    on_gpu = torch.cuda.is_available()
    with tempfile.NamedTemporaryFile() as store:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(store.name, 1), rank=0, world_size=1)
        for place, name in ((parallel, "shard_layers"), (parallel.ShardedLoss, "__init__")):
            setattr(place, name, _as_if_two(getattr(place, name)))
        parallel._mesh = lambda device: init_device_mesh(device, (1,))
        train("shards")
        dist.destroy_process_group()
    return figures


def _as_if_two(function):
    def told(*arguments) -> None:
        real, parallel.world_size = parallel.world_size, lambda: 2
        function(*arguments)
        parallel.world_size = real

    return told


PARTS = {"rates": rates, "shards": shards}


def main() -> None:
    """Measure, print, keep."""
    if len(sys.argv) != 4 or sys.argv[1] not in PARTS:
        raise SystemExit(__doc__)
    part, run = sys.argv[1], RunFolder(Path(sys.argv[2]))
    figures = PARTS[part](run, Path(sys.argv[3]))
    shutil.rmtree(run.scratch("benchmark"), ignore_errors=True)
    for name, value in figures.items():
        print(f"  {name:75s} {value:14.3f}")
    print("Written to", save(f"gpu_{part}", figures))


if __name__ == "__main__":
    main()

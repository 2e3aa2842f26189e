"""GKD in shards (FSDP2) of one rank against GKD whole: KL on selection, seconds, and whether it resumes.

Of a run and a child of it, through NCCL on a GPU (such as of `puzzle run benchmarks/general_gpu.yaml`), else through
gloo. One rank would not divide anything, so while a training is set up it is told that there were two; the mesh has
one. Figures in results/gpu_shards.json.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from benchmarks.common import RunArgument, linked, report
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.families import load_model, load_parent
from puzzle_nas.machine import machine_of
from puzzle_nas.pipeline import open_run
from puzzle_nas.training import parallel
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent

STEPS = 16


@contextlib.contextmanager
def as_if_two():
    """Within, models are divided, over a mesh of the one rank that there is."""
    mesh = device_mesh.init_device_mesh
    with (
        mock.patch.object(parallel, "world_size", lambda: 2),
        mock.patch.object(device_mesh, "init_device_mesh", lambda device, _: mesh(device, (1,))),
        mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "1"}),
    ):
        yield


def main(run: RunArgument, child: Path) -> None:
    """Whole twice, whose difference is noise, then in shards."""
    base = RunFolder(run)
    recipe = open_run(base)
    settings = {"tokens": STEPS * recipe.gkd.batch_tokens, "learning_rate": 3e-4}
    recipe = recipe.model_copy(update={"gkd": recipe.gkd.model_copy(update=settings)})
    figures: dict[str, float] = {}

    def train(name: str, divided: contextlib.AbstractContextManager[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:

            def training() -> Training:
                parent = LiveParent(load_parent(recipe, base))
                return Training(recipe, linked(base, Path(folder)), parent, load_model(child, machine_of(recipe)))

            with divided:
                first, second = training(), training()
            begin = time.perf_counter()
            first.train()
            figures[f"seconds_{name}"] = time.perf_counter() - begin
            figures[f"selection_kl_nats_{name}"] = first.curve[-1]["selection_kl_nats"]
            figures[f"resumes_at_step_{name}"] = second.load()

    train("whole", contextlib.nullcontext())
    train("whole_again", contextlib.nullcontext())
    with tempfile.NamedTemporaryFile() as store:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(store.name, 1), rank=0, world_size=1)
        train("shards", as_if_two())
        dist.destroy_process_group()
    report("gpu_shards", figures)

"""One GPU: what fraction of it BLD, scoring and GKD use, and what capturing and compiling gain; GKD in shards by NCCL.

    python benchmarks/gpu.py rates
        Tokens/s of BLD, scoring and GKD, each over the rate of its matrix products alone, on random weights of
        SmolLM2-135M's sizes and random tokens; BLD also without CUDA graphs, GKD also with gkd.compile.
    python benchmarks/gpu.py shards RUN CHILD
        GKD whole, and with parent and child in shards (FSDP2) of one rank: KL on selection, seconds. Of a run made
        there (benchmarks/general_gpu.yaml) and a child of it.

Figures in results/gpu_rates.json and gpu_shards.json.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from achieved import achieved, median_seconds
from results import save
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from puzzle_nas.architecture import GatedFFN, Linear
from puzzle_nas.artifacts import RunFolder, write_bytes, write_json
from puzzle_nas.families import Anatomy, architecture_of, child_config, load_model, load_parent
from puzzle_nas.machine import machine_of, this_machine
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.subblocks import Weights, made_subblock, subblock_weights
from puzzle_nas.training import parallel
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Steps, Trainee
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent

SIZES = {"vocab_size": 49_152, "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1_536}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
"""SmolLM2-135M's."""
VARIANTS = (GatedFFN(1_152), GatedFFN(768), GatedFFN(384), Linear("ffn"), Linear("attention"))
"""Which a layer may become, and of which the child has one in every layer, in turns."""
LAYER = 14
BATCH_TOKENS = (2_048, 8_192, 32_768)
SEQUENCE_LENGTH = 256
SEQUENCES = 4 * max(BATCH_TOKENS) // SEQUENCE_LENGTH
SCORING_TOKENS = 16_384
STEPS = 1_000
"""Where schedules end; no more than a few are taken."""
SHARD_STEPS = 16


def random_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Parent and child."""
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)
    architecture = architecture_of(config)
    for layer in range(config.num_hidden_layers):
        architecture = architecture.replaced(layer, VARIANTS[layer % len(VARIANTS)])
    machine = this_machine()
    models = (LlamaForCausalLM(config), AutoModelForCausalLM.from_config(child_config(config, architecture)))
    parent, child = (m.to(machine.device, machine.dtype).eval().requires_grad_(False) for m in models)
    return parent, child


def weights_in_child(child: PreTrainedModel, number: int) -> Weights:
    """The weights of one of `VARIANTS`, named relative to its layer."""
    return subblock_weights(Anatomy(child).subblocks(number)[VARIANTS[number].slot])


def bld(parent: PreTrainedModel, child: PreTrainedModel, tokens: torch.Tensor, batch_tokens: int) -> dict[str, float]:
    """A step of every variant of one layer: captured, as in a run, and started kernel by kernel."""
    sequences = batch_tokens // SEQUENCE_LENGTH
    with tempfile.TemporaryDirectory() as folder:
        activations = LayerActivations(parent, tokens[: 4 * sequences], Path(folder))
        activations.climb_to(LAYER)
        task = BlockTask(activations, "token", parent.dtype == torch.bfloat16)
        batches = itertools.cycle(torch.arange(4 * sequences, device=activations.device).split(sequences))

        def steps() -> tuple[Steps, Callable[[], object]]:
            trainees = []
            for number, spec in enumerate(VARIANTS):
                job, start = Job((spec,), Path(), dict, {}), weights_in_child(child, number)
                trainees.append(Trainee(job, start, parent, LAYER, recipe().bld, STEPS))
            taken = Steps(task, trainees, sequences)
            return taken, lambda: taken.take(0, next(batches), trainees)

        (_, captured), (one_by_one, work) = steps(), steps()
        one_by_one.can_capture = False
        # The first step of either is not captured, so that its products can be counted.
        done, before = achieved(captured), median_seconds({"step": work})["step"]
    name = f"_{batch_tokens}_tokens_a_step"
    return {
        "bld_fraction_of_matmul_rate" + name: done.fraction,
        "bld_fraction_of_matmul_rate_not_captured" + name: done.fraction * done.seconds / before,
        "bld_variant_tokens_per_second" + name: batch_tokens * len(VARIANTS) / done.seconds,
        "bld_milliseconds_a_variant" + name: 1e3 * done.seconds / len(VARIANTS),
        "bld_milliseconds_a_variant_not_captured" + name: 1e3 * before / len(VARIANTS),
    }


def scoring(parent: PreTrainedModel, child: PreTrainedModel, tokens: torch.Tensor) -> dict[str, float]:
    """All variants of one layer."""
    walk = ReplacementWalk(parent, tokens[: SCORING_TOKENS // SEQUENCE_LENGTH], SCORING_TOKENS)
    walk.climb_to(LAYER)
    blocks = [
        {spec.slot: made_subblock(parent, LAYER, spec, weights_in_child(child, number))}
        for number, spec in enumerate(VARIANTS)
    ]
    done = achieved(lambda: walk.try_variants(blocks))
    return {
        "scoring_fraction_of_matmul_rate": done.fraction,
        "scoring_teraflops_per_second": done.flops / done.seconds / 1e12,
    }


def gkd(parent: PreTrainedModel, child: PreTrainedModel, run: RunFolder, batch_tokens: int) -> dict[str, float]:
    """A step of the child: as it is, and compiled and captured."""

    def steps(**settings) -> Callable[[], object]:
        gkd_settings = {"tokens": 4 * batch_tokens, "batch_tokens": batch_tokens, **settings}
        training = Training(recipe(gkd=gkd_settings), run, LiveParent(parent), child)
        return lambda: training.step(0)

    done = achieved(steps())
    begin = time.perf_counter()
    compiled = steps(compile=True)
    for _ in range(3):
        compiled()
    compiling = time.perf_counter() - begin
    seconds = median_seconds({"step": compiled})["step"]
    for layer in Anatomy(parent).layers:
        layer._compiled_call_impl = None
    name = f"_{batch_tokens}_tokens_a_step"
    return {
        "gkd_fraction_of_matmul_rate" + name: done.fraction,
        "gkd_fraction_of_matmul_rate_compiled" + name: done.fraction * done.seconds / seconds,
        "gkd_tokens_per_second" + name: batch_tokens / done.seconds,
        "gkd_tokens_per_second_compiled" + name: batch_tokens / seconds,
        "gkd_seconds_to_compile" + name: compiling,
        "gkd_matmul_teraflops_per_second" + name: done.matmul_flops_per_second / 1e12,
    }


def recipe(**settings) -> Recipe:
    """Defaults, and what is given."""
    return Recipe.model_validate({"parent": "random", "data": {"sources": [{"source": "random"}]}, **settings})


def rates() -> Iterator[dict[str, float]]:
    """See above."""
    torch.manual_seed(0)
    parent, child = random_models()
    tokens = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, SEQUENCE_LENGTH))
    for batch_tokens in BATCH_TOKENS:
        yield bld(parent, child, tokens, batch_tokens)
    yield scoring(parent, child, tokens)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        splits = {"train": tokens, "selection": tokens[:4]}
        for split, part in splits.items():
            write_bytes(run.split(split), safetensors.torch.save({"tokens": part}))
        prints = {s: {"fingerprint": hashlib.sha256(part.numpy().tobytes()).hexdigest()} for s, part in splits.items()}
        write_json(run / "data/data.json", {"splits": prints})
        for batch_tokens in BATCH_TOKENS:
            yield gkd(parent, child, run, batch_tokens)


def shards(run: RunFolder, child: Path) -> Iterator[dict[str, float]]:
    """See above; one rank would not divide anything by itself, so it is told that there were two."""
    recipe = open_run(run)
    settings = {
        "tokens": SHARD_STEPS * recipe.gkd.batch_tokens,
        "evaluate_every_steps": SHARD_STEPS // 2,
        "learning_rate": 3e-4,
    }
    recipe = recipe.model_copy(update={"gkd": recipe.gkd.model_copy(update=settings)})
    figures: dict[str, float] = {}

    def train(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for kept in ("data", "parent", "parent.json"):
                (Path(folder) / kept).symlink_to((run / kept).resolve())

            def training() -> Training:
                parent = LiveParent(load_parent(recipe, run))
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
    yield figures


def _as_if_two(function):
    def told(*arguments) -> None:
        real, parallel.world_size = parallel.world_size, lambda: 2
        function(*arguments)
        parallel.world_size = real

    return told


def main() -> None:
    """Measure, print and keep what is there so far."""
    part, *where = sys.argv[1:] or [""]
    if (part, len(where)) not in {("rates", 0), ("shards", 2)}:
        raise SystemExit(__doc__)
    figures: dict[str, float] = {}
    for found in rates() if part == "rates" else shards(RunFolder(where[0]), Path(where[1])):
        figures |= found
        for name, value in found.items():
            print(f"  {name:75s} {value:14.3f}", flush=True)
        path = save(f"gpu_{part}", figures)
    print("Written to", path)


if __name__ == "__main__":
    main()

"""Tokens/s of BLD, scoring and GKD on this machine, each over the rate of its matrix products alone.

On random weights of SmolLM2-135M's sizes and random tokens. BLD: a step of every variant of one layer, on a GPU as
captured and with kernels started one by one. Scoring: all variants of one layer, on what prefix reuse leaves. GKD: a
step of a child, on a GPU also with gkd.compile. Wants a quiet machine. Figures in results/gpu_rates.json, without a GPU
in cpu_rates.json; they are written as they come.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import by_arithmetic, report, timed_in_turns
from puzzle_nas.artifacts import RunFolder, write_bytes, write_json
from puzzle_nas.families import Anatomy, architecture_of, child_config
from puzzle_nas.machine import this_machine
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.specs import GatedFFN, Linear
from puzzle_nas.subblocks import Weights, made_subblock, subblock_weights
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
GPU_BATCHES, CPU_BATCHES = (2_048, 8_192, 32_768), (512, 2_048)
"""Tokens a step."""
SEQUENCE_LENGTH = 256
GPU_SCORING_TOKENS, CPU_SCORING_TOKENS = 16_384, 1_024
STEPS = 1_000
"""Where schedules end; no more than a few are taken."""
REPEATS = 9
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


class Products(TorchDispatchMode):
    """Counts every matrix product by shape, and the FLOPs of attention."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter[tuple] = Counter()
        self.attention_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in PRODUCTS:
            # In inference mode `linear` and `matmul` come whole.
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func in PRODUCTS:
            left, right = args[-2:]
            self.shapes[tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in (left, right))] += 1
        elif "scaled_dot_product" in func.__name__:
            backward = "backward" in func.__name__
            *heads, length, width = args[1 if backward else 0].shape
            # Two products forward, five backward, of which a causal mask leaves half.
            self.attention_flops += (5 if backward else 2) * heads[0] * heads[1] * length * length * width
        return func(*args, **(kwargs or {}))

    def flops(self) -> float:
        """Of all products."""
        return sum(
            count * 2.0 * torch.Size(left[0]).numel() * right[0][-1] for (left, right), count in self.shapes.items()
        )

    def seconds(self) -> float:
        """Of the products alone, each shape timed on its own, the best of its repeats: what the machine can."""
        total = 0.0
        for layout, count in self.shapes.items():
            left, right = (
                torch.randn(1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
                .to(device, dtype)
                .as_strided(shape, stride)
                for shape, stride, dtype, device in layout
            )
            works = {"product": lambda left=left, right=right: torch.matmul(left, right)}
            total += count * min(timed_in_turns(works, 2 * REPEATS)["product"])
        return total


def median_seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    return statistics.median(timed_in_turns({"work": work}, REPEATS)["work"])


@dataclass(frozen=True)
class Achieved:
    """A piece of work beside its products."""

    seconds: float
    flops: float
    matmul_flops_per_second: float
    """Of its products alone."""

    @classmethod
    def by(cls, work: Callable[[], object]) -> Achieved:
        """Measure `work`, which must do the same products each time."""
        with Products() as products:
            work()
        rate = products.flops() / products.seconds()
        return cls(median_seconds(work), products.flops() + products.attention_flops, rate)

    @property
    def fraction(self) -> float:
        """FLOP/s achieved over those of the products alone."""
        return self.flops / self.seconds / self.matmul_flops_per_second

    def figures(self, work: str, suffix: str = "") -> dict[str, float]:
        """Under names of the piece of work."""
        return {
            f"{work}_fraction_of_matmul_rate{suffix}": self.fraction,
            f"{work}_gflops_per_second{suffix}": self.flops / self.seconds / 1e9,
            f"{work}_matmul_gflops_per_second{suffix}": self.matmul_flops_per_second / 1e9,
        }


def random_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Parent and child."""
    config = LlamaConfig.from_dict({**SIZES, **HEADS, "tie_word_embeddings": True})
    architecture = architecture_of(config)
    for layer in range(config.num_hidden_layers):
        architecture = architecture.replaced(layer, VARIANTS[layer % len(VARIANTS)])
    machine = this_machine()
    models: tuple[Any, ...] = (
        LlamaForCausalLM(config),
        AutoModelForCausalLM.from_config(child_config(config, architecture)),
    )
    parent, child = (m.to(machine.device, machine.dtype).eval().requires_grad_(False) for m in models)
    return parent, child


def weights_in_child(child: PreTrainedModel, number: int) -> Weights:
    """The weights of one of `VARIANTS`, named relative to its layer."""
    return subblock_weights(Anatomy(child).subblocks(number)[VARIANTS[number].slot])


def recipe(**settings) -> Recipe:
    """Defaults, and what is given."""
    return Recipe.model_validate({"parent": "random", "data": {"sources": [{"source": "random"}]}, **settings})


def bld(parent: PreTrainedModel, child: PreTrainedModel, tokens: torch.Tensor, batch_tokens: int) -> dict[str, float]:
    """A step of every variant of one layer; on a GPU captured, as in a run, and started kernel by kernel."""
    sequences = batch_tokens // SEQUENCE_LENGTH
    with tempfile.TemporaryDirectory() as folder:
        activations = LayerActivations(parent, tokens[: 4 * sequences], Path(folder))
        activations.climb_to(LAYER)
        task = BlockTask(activations, parent.dtype == torch.bfloat16)
        batches = itertools.cycle(torch.arange(4 * sequences, device=activations.device).split(sequences))

        def steps() -> tuple[Steps, Callable[[], object]]:
            trainees = []
            for number, spec in enumerate(VARIANTS):
                job, start = Job((spec,), Path(), dict, {}), weights_in_child(child, number)
                trainees.append(Trainee(job, start, parent, LAYER, recipe().bld, STEPS))
            taken = Steps(task, trainees, sequences)
            return taken, lambda: taken.take(0, next(batches), trainees)

        (captured, work), (one_by_one, started) = steps(), steps()
        one_by_one.can_capture = False
        # The first step of either is not captured, so that its products can be counted.
        done = Achieved.by(work)
        name = f"_{batch_tokens}_tokens_a_step"
        figures = done.figures("bld", name) | {
            "bld_variant_tokens_per_second" + name: batch_tokens * len(VARIANTS) / done.seconds,
            "bld_milliseconds_a_variant" + name: 1e3 * done.seconds / len(VARIANTS),
        }
        if captured.can_capture:
            before = median_seconds(started)
            figures["bld_fraction_of_matmul_rate_not_captured" + name] = done.fraction * done.seconds / before
            figures["bld_milliseconds_a_variant_not_captured" + name] = 1e3 * before / len(VARIANTS)
    return figures


def scoring(parent: PreTrainedModel, child: PreTrainedModel, tokens: torch.Tensor) -> dict[str, float]:
    """All variants of one layer."""
    walk = ReplacementWalk(parent, tokens, tokens.numel())
    walk.climb_to(LAYER)
    blocks = [
        {spec.slot: made_subblock(parent, LAYER, spec, weights_in_child(child, number))}
        for number, spec in enumerate(VARIANTS)
    ]
    return Achieved.by(lambda: walk.try_variants(blocks)).figures("scoring")


def gkd(parent: PreTrainedModel, child: PreTrainedModel, run: RunFolder, batch_tokens: int) -> dict[str, float]:
    """A step of the child: as it is, and on a GPU compiled."""

    def steps(**settings) -> Callable[[], object]:
        gkd_settings = {"tokens": 4 * batch_tokens, "batch_tokens": batch_tokens, **settings}
        training = Training(recipe(gkd=gkd_settings), run, LiveParent(parent), child)
        return lambda: training.step(0)

    with torch.compiler.set_stance("force_eager"):
        done = Achieved.by(steps())
    name = f"_{batch_tokens}_tokens_a_step"
    figures = done.figures("gkd", name) | {"gkd_tokens_per_second" + name: batch_tokens / done.seconds}
    if not torch.cuda.is_available():
        return figures
    begin = time.perf_counter()
    compiled = steps(compile=True)
    for _ in range(3):
        compiled()
    compiling = time.perf_counter() - begin
    seconds = median_seconds(compiled)
    return figures | {
        "gkd_fraction_of_matmul_rate_compiled" + name: done.fraction * done.seconds / seconds,
        "gkd_tokens_per_second_compiled" + name: batch_tokens / seconds,
        "gkd_seconds_to_compile" + name: compiling,
    }


def rates() -> Iterator[dict[str, float]]:
    """Figures of one piece of work after the other."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    batches = GPU_BATCHES if on_gpu else CPU_BATCHES
    parent, child = random_models()
    tokens = torch.randint(0, SIZES["vocab_size"], (4 * max(batches) // SEQUENCE_LENGTH, SEQUENCE_LENGTH))
    for batch_tokens in batches:
        yield bld(parent, child, tokens, batch_tokens)
    scored = GPU_SCORING_TOKENS if on_gpu else CPU_SCORING_TOKENS
    yield scoring(parent, child, tokens[: scored // SEQUENCE_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        splits = {"train": tokens, "selection": tokens[:4]}
        for split, part in splits.items():
            write_bytes(run.split(split), safetensors.torch.save({"tokens": part}))
        prints = {s: {"fingerprint": hashlib.sha256(part.numpy().tobytes()).hexdigest()} for s, part in splits.items()}
        write_json(run / "data/data.json", {"splits": prints})
        for batch_tokens in batches:
            yield gkd(parent, child, run, batch_tokens)


def main() -> None:
    """Measure, print and keep what is there so far."""
    figures: dict[str, float] = {}
    for found in rates():
        figures |= found
        report("gpu_rates" if torch.cuda.is_available() else by_arithmetic("cpu_rates"), figures)

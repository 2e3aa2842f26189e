"""KL when half of a working mixture's experts go, by each ranking, against random removal.

They go in every layer, or with --every N in every Nth, from the middle of the first N on.

`solved` solves the last matrices of those that stay; `bld` trains layers alone, with a router that trains or does not.

The mixture is made of a dense Llama: 8 experts of a third of each FFN's channels, 2 for a token, taught block by block.
RUN is a folder whose parent is taken, such as the quickstart's; without it, the tests' tiny parent (glassllm, 4 layers,
hidden size 128).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import report
from puzzle_nas.data.sources import documents
from puzzle_nas.families import Anatomy, architecture_of, build, child_config
from puzzle_nas.recipe import SourceSettings
from puzzle_nas.specs import Mixture
from puzzle_nas.subblocks import (
    Context,
    Origin,
    Weights,
    add_observations,
    made_subblock,
    observed,
    subblock_weights,
    variant_of,
)
from puzzle_nas.subblocks.experts import solved, with_experts
from tests.conftest import glassllm_as_llama
from tests.mixtures import learn, upcycled

LENGTH = 64
CALIBRATION, VALIDATION = 128, 48
"""Sequences."""
EXPERTS, PER_TOKEN, STEPS = 8, 2, 300
KEPT = 4
SEEDS = 5


def texts(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [S, T] for teaching and statistics, and others, of other documents, for the figures."""
    stream = documents(SourceSettings(source="python-stdlib"), 0)

    def rows(wanted: int) -> torch.Tensor:
        tokens: list[int] = []
        while len(tokens) < wanted * LENGTH:
            tokens += tokenizer(next(stream))["input_ids"]
        return torch.tensor(tokens[: wanted * LENGTH]).view(wanted, LENGTH)

    return rows(CALIBRATION), rows(VALIDATION)


def candidates(
    parent: PreTrainedModel, tokens_ST: torch.Tensor, spec: Mixture, layers: Sequence[int]
) -> dict[str, dict[int, Weights]]:
    """By name, the mixtures of these layers with fewer experts."""
    parts = Anatomy(parent)
    inputs = parts.inputs(LENGTH)
    hidden = parts.embed(tokens_ST)
    found: dict[str, dict[int, Weights]] = {}
    for layer in range(max(layers) + 1):
        origin, variant = Origin(parent, layer, "experts"), variant_of(spec)
        activations, hidden = observed(list(parts.subblocks(layer).values()), hidden, inputs[layer])
        if layer not in layers:
            continue
        print(f"layer {layer}", flush=True)
        sums: dict = {}
        add_observations(sums, variant.observations(spec, origin), activations["experts"])
        context = Context(origin, sums, 1e-4)
        made = variant.least_squares(spec, context)
        del made["least_squares"]
        for seed in range(SEEDS):
            kept = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(100 * layer + seed))[:KEPT]
            made[f"random_{seed}"] = with_experts(origin, kept)
        made |= {f"{name}_solved": solved(spec, context, weights) for name, weights in made.items()}
        for start in ("elimination", "elimination_solved"):
            for freeze in (False, True):
                name = f"{start}_bld_router_{'frozen' if freeze else 'trained'}"
                made[name] = taught(context, spec, made[start], activations["experts"].read_ND, freeze)
        for name, weights in made.items():
            found.setdefault(name, {})[layer] = weights
    return found


def taught(context: Context, spec: Mixture, weights: Weights, read_ND: torch.Tensor, freeze: bool) -> Weights:
    """A layer's mixture after `STEPS` steps towards the parent's output."""
    origin = context.origin
    own = {name: w.clone() for name, w in weights.items()}
    subblock = made_subblock(origin.parent, origin.layer, spec, own)
    subblock.mixer.requires_grad_(True)
    subblock.mixer.gate.requires_grad_(not freeze)
    with torch.enable_grad():
        learn(lambda x: origin.mixer(x.unsqueeze(0)).squeeze(0), read_ND, subblock.mixer, STEPS)
    return subblock_weights(subblock)


@torch.no_grad()
def kl_nats(parent: PreTrainedModel, child: PreTrainedModel, tokens_ST: torch.Tensor) -> float:
    """Mean KL(parent || child) per token."""
    p, q = (model(tokens_ST).logits.log_softmax(-1) for model in (parent, child))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def halves(parent: PreTrainedModel, teaching: torch.Tensor, validation: torch.Tensor, every: int) -> dict[str, float]:
    """KL in nats of children with half of the experts in every so many layers, by name."""
    spec = Mixture(KEPT, PER_TOKEN, parent.config.intermediate_size)
    architecture = architecture_of(parent.config)
    changed = range(every // 2, len(architecture.layers), every)
    for layer in changed:
        architecture = architecture.replaced(layer, spec)
    config = child_config(parent.config, architecture)
    results = {}
    for name, layers in candidates(parent, teaching, spec, changed).items():
        weights = dict(parent.state_dict())
        for layer, own in layers.items():
            weights |= {f"model.layers.{layer}.{part}": w for part, w in own.items()}
        results[name] = kl_nats(parent, build(config, weights), validation)
    return results


def dense_parent(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def main(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]")] = None,
    every: Annotated[int, typer.Option(min=1, help="Half of the experts go in every so many layers.")] = 1,
) -> None:
    """Print the table and keep the figures."""
    torch.manual_seed(0)
    dense, tokenizer = dense_parent(run / "parent") if run else glassllm_as_llama()
    teaching, validation = texts(tokenizer)
    width = -(-dense.config.intermediate_size // 3 // 64) * 64
    parent = upcycled(dense, teaching, EXPERTS, PER_TOKEN, width, STEPS)
    figures = {"upcycled_from_dense_kl_nats": kl_nats(dense, parent, validation)}
    results = halves(parent, teaching, validation, every)
    for suffix in ("", "_solved"):
        random = [results.pop(f"random_{seed}{suffix}") for seed in range(SEEDS)]
        results |= {f"random{suffix}_mean": statistics.mean(random), f"random{suffix}_best": min(random)}
    figures |= {f"half_by_{name}_kl_nats": value for name, value in results.items()}
    name = f"experts_{run.name}" if run else "experts"
    report(name if every == 1 else f"{name}_every_{every}", figures)

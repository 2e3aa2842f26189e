"""KL of a parent whose every sub-block is rounded as libraries round the parent's own, by text and by pull.

Of each sub-block the last matrix makes up for the rounding of the others, by least squares on the first TOKENS of RUN's
calibration text, pulled towards what it was as strongly as PULL tokens would; without a pull it is only rounded.
results/own_rounding.json has kl_FORMAT_TOKENS_pull_PULL in nats, on the selection split.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.common import RunArgument, opened, report
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import Anatomy, architecture_of, build
from puzzle_nas.machine import describe, machine_of
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.subblocks import made_subblock, subblock_weights
from puzzle_nas.training.refitting import BATCH_TOKENS, Correction

FORMATS = ("q8_0", "q4_0")
TRIED: tuple[tuple[int, float | None], ...] = (
    (2048, 0.2),
    (2048, 6144),
    (4096, 6144),
    (6144, 2048),
    (6144, 6144),
    (6144, 18432),
    (6144, None),
)
"""Tokens, and the pull in tokens."""


@torch.inference_mode()
def rounded_parent(parent, tokens_ST: torch.Tensor, form: str, ridge: float | None):
    """The parent with every sub-block in a format, embeddings and LM head as they were."""
    parts, own, length = Anatomy(parent), architecture_of(parent.config), tokens_ST.shape[1]
    inputs, weights = parts.inputs(length), dict(parent.state_dict())
    hidden = list(parts.embed(tokens_ST).split(max(1, BATCH_TOKENS // length)))
    for layer in range(len(parts.layers)):
        for slot, subblock in parts.subblocks(layer).items():
            goal = [h + subblock.added(h, inputs[layer]) for h in hidden]
            spec = own.layers[layer][slot].stored(form)
            made = made_subblock(parent, layer, spec, subblock_weights(subblock))
            Correction(made, spec, inputs[layer], ridge).applied(list(hidden), goal)
            weights |= {f"{parts.layer_prefix}{layer}.{name}": w for name, w in subblock_weights(made).items()}
            hidden = goal
    return build(parent.config, weights)


def main(run: RunArgument = Path("runs/quickstart")) -> None:
    """Round, compare, print and save."""
    folder = RunFolder(run)
    recipe, parent = opened(folder)
    reference, calibration = (
        ParentReference(parent, load_tokens(folder, "selection")),
        load_tokens(folder, "calibration"),
    )
    figures = {}
    for form in FORMATS:
        for tokens, pull in TRIED:
            text = calibration[: max(1, tokens // calibration.shape[1])]
            ridge = None if pull is None else pull / text.numel()
            kl = reference.compare(rounded_parent(parent, text, form, ridge)).kl_nats
            figures[f"kl_{form}_{tokens}_pull_{pull:g}" if pull else f"kl_{form}_{tokens}_not_solved"] = kl
            print(form, tokens, pull, f"{kl:.5f}", flush=True)
    report("own_rounding", figures, describe(machine_of(recipe)))

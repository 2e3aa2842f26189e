"""Every variant of every layer, initialised from the parent, and the parent's own sub-blocks in every format.

Files: library/initial/layer_NN/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from puzzle_nas.artifacts import RunFolder, fingerprint
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import Anatomy, LayerInputs, architecture_of, load_parent
from puzzle_nas.library import variant_is_stored, write_variant
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.specs import Head, Spec
from puzzle_nas.subblocks import (
    Context,
    LayerStatistics,
    Observe,
    Origin,
    add_observations,
    made_subblock,
    observed,
    variant_of,
    windows_of,
)
from puzzle_nas.training.refitting import rounded_alone, rounded_ends

OBSERVED_BATCH_TOKENS = 4096
ROUNDING_TOKENS = 8192
"""Whose Gram matrices decide how the parent's own sub-blocks are rounded; refitting rounds again."""
HELD_BACK_TOKENS = 1024
"""Enough to tell initialisations apart that differ much; those that do not differ much need no choosing."""


def run(recipe: Recipe, run: RunFolder) -> None:
    """Observe each parent layer on calibration text, initialise its variants, keep the best of each."""
    parent = load_parent(recipe, run, by_layer=True)
    parts = Anatomy(parent)
    space = search_space_of(recipe, architecture_of(parent.config))
    tokens = load_tokens(run, "calibration")
    length = tokens.shape[1]
    held_back = max(1, len(tokens) // 4)
    windows = windows_of(spec for _, _, spec in space)
    held = tokens[-max(1, min(held_back, HELD_BACK_TOKENS // length)) :]
    walk = ReplacementWalk(parent, held, OBSERVED_BATCH_TOKENS, windows=windows)
    inputs = parts.inputs(length, windows)
    with torch.inference_mode(), progress("initialise variants, layer", len(parts.layers)) as ticker:
        hidden = parts.embed(tokens[:-held_back].to(parent.device))
        batches = list(hidden.split(max(1, OBSERVED_BATCH_TOKENS // length)))
        for index in range(len(parts.layers)):
            missing = [
                spec for spec in space.variants(index) if not variant_is_stored(run.initial_variant(index, spec.id))
            ]
            specs = [spec for spec in missing if spec.format is None]
            subblocks = list(parts.subblocks(index).values())
            observations: dict[str, dict[str, Observe]] = {subblock.slot: {} for subblock in subblocks}
            for spec in specs:
                origin = Origin(parent, index, spec.slot)
                observations[spec.slot] |= variant_of(spec).observations(spec, origin)
            statistics: dict[str, LayerStatistics] = {slot: {} for slot in observations}
            in_formats = [spec for spec in missing if spec.format]
            _round_own(run, parent, index, in_formats, batches, inputs[index])
            for number, batch in enumerate(batches):
                activations, batches[number] = observed(subblocks, batch, inputs[index])
                for slot, wanted in observations.items():
                    add_observations(statistics[slot], wanted, activations[slot])
            for spec in specs:
                context = Context(Origin(parent, index, spec.slot), statistics[spec.slot])
                _initialise(recipe, run, index, spec, context, walk)
            ticker.advance()
            if index + 1 < len(parts.layers):
                walk.advance()
        final = [parts.norm(batch) for batch in batches] if len(space.heads) > 1 else []
        for head in space.heads[1:]:
            _round_head(run, parent, head, final)


ROUNDED = {"initialisation": "rounded", "chosen": "rounded"}


def _round_own(
    run: RunFolder,
    parent: PreTrainedModel,
    index: int,
    specs: Sequence[Spec],
    batches: Sequence[torch.Tensor],
    inputs: LayerInputs,
) -> None:
    """The parent's own sub-blocks of a layer in formats; `batches` are what the layer reads, each [B, T, D]."""
    hidden = list(batches)[: max(1, ROUNDING_TOKENS // batches[0].shape[:2].numel())] if specs else []
    for slot, subblock in Anatomy(parent).subblocks(index).items():
        goal = [h + subblock.added(h, inputs) for h in hidden]
        for spec in specs:
            if spec.slot == slot:
                weights, matrices = rounded_alone(parent, index, spec, hidden, goal, inputs)
                write_variant(run.initial_variant(index, spec.id), [spec], weights, ROUNDED, matrices)
        hidden = goal


def _round_head(run: RunFolder, parent: PreTrainedModel, head: Head, final: Sequence[torch.Tensor]) -> None:
    """Embeddings and LM head in a format; `final` are the parent's final hidden states, each [B, T, D]."""
    assert head.format is not None
    path = run.initial_variant(len(Anatomy(parent).layers), head.id)
    if not variant_is_stored(path):
        ends = rounded_ends(parent, head.format, final)
        weights = {name: matrix.weight.to(parent.dtype) for name, matrix in ends.items()}
        write_variant(path, [head], weights, ROUNDED, ends)


def _initialise(
    recipe: Recipe, run: RunFolder, index: int, spec: Spec, context: Context, walk: ReplacementWalk
) -> None:
    variant, method = variant_of(spec), recipe.library.initialisation
    if method == "least_squares":
        candidates = variant.least_squares(spec, context)
    elif method == "paper":
        candidates = {"paper": variant.paper(spec, context)}
    else:
        seed = int(fingerprint([recipe.seed, index, spec.id]), 16) % 2**63
        candidates = {"random": variant.random(spec, context, torch.Generator().manual_seed(seed))}
    facts: dict = {"initialisation": method, "chosen": next(iter(candidates))}
    if len(candidates) > 1:
        # The block's own error does not tell whether massive activations survive; KL does.
        tried = [made_subblock(context.origin.parent, index, spec, w) for w in candidates.values()]
        results = walk.try_variants([{spec.slot: subblock} for subblock in tried])
        kl = {name: float(r.kl_nats.mean()) for name, r in zip(candidates, results, strict=True)}
        finite = {name: value for name, value in kl.items() if math.isfinite(value)}
        if finite:
            facts["chosen"] = min(finite, key=finite.__getitem__)
        facts["held_back_kl_nats"] = {name: finite.get(name) for name in kl}
    write_variant(run.initial_variant(index, spec.id), [spec], candidates[facts["chosen"]], facts)

"""Every variant of every layer, initialised from the parent. Files: library/initial/layer_NN/."""

from __future__ import annotations

import math

import torch

from puzzle_nas.architecture import Spec
from puzzle_nas.artifacts import RunFolder, fingerprint
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import variant_is_stored, write_variant
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.subblocks import LayerContext, LayerStatistics, observe_layer, subblock_layer, variant_of
from puzzle_nas.subblocks.statistics import add_observations
from puzzle_nas.training.replacement import ReplacementWalk

NAME = "build_library"
COMMAND = "build-library"
NEEDS = ("prepare_parent", "prepare_data")
SETTINGS = ("seed", "precision", "device", "search_space", "library")
OUTPUTS = ("library/initial/*/*",)

OBSERVED_BATCH_TOKENS = 4096
HELD_BACK_TOKENS = 1024
"""Enough to tell initialisations apart that differ much; those that do not differ much need no choosing."""


def run(recipe: Recipe, run: RunFolder) -> None:
    """Observe each parent layer on calibration text, initialise its variants, keep the best of each."""
    parent, shape = load_parent(run, by_layer=True)
    space = search_space_of(recipe, shape)
    tokens = load_tokens(run, "calibration")
    held_back = max(1, len(tokens) // 4)
    walk = ReplacementWalk(
        parent, tokens[-max(1, min(held_back, HELD_BACK_TOKENS // tokens.shape[1])) :], OBSERVED_BATCH_TOKENS
    )
    with torch.inference_mode(), progress("initialise variants, layer", shape.num_hidden_layers) as ticker:
        hidden = parent.model.embed_tokens(tokens[:-held_back].to(parent.device))
        batches = list(hidden.split(max(1, OBSERVED_BATCH_TOKENS // tokens.shape[1])))
        for index, layer in enumerate(parent.model.layers):
            specs = [
                spec
                for slot, options in space.options[index].items()
                for spec in options
                if spec != shape.parent_spec(slot)
            ]
            done = all(variant_is_stored(run.initial_variant(index, spec.id)) for spec in specs)
            observations = {}
            if not done:
                for spec in specs:
                    observations |= variant_of(spec).observations(spec, layer)
            statistics: LayerStatistics = {}
            for number, batch in enumerate(batches):
                activations = observe_layer(layer, batch, walk.inputs)
                add_observations(statistics, observations, activations)
                batches[number] = activations.out_ND.view_as(batch)
            if not done:
                context = LayerContext(parent.config, layer, statistics, recipe.library.ridge)
                for spec in specs:
                    _initialise(recipe, run, index, spec, context, walk)
            ticker.advance()
            if index + 1 < shape.num_hidden_layers:
                walk.advance()


def _initialise(
    recipe: Recipe, run: RunFolder, index: int, spec: Spec, context: LayerContext, walk: ReplacementWalk
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
        layers = [subblock_layer(context.config, context.layer.layer_type, spec, w) for w in candidates.values()]
        results = walk.try_variants([{spec.slot: layer} for layer in layers])
        kl = {name: float(r.kl_nats.mean()) for name, r in zip(candidates, results, strict=True)}
        finite = {name: value for name, value in kl.items() if math.isfinite(value)}
        if finite:
            facts["chosen"] = min(finite, key=finite.__getitem__)
        facts["held_back_kl_nats"] = {name: finite.get(name) for name in kl}
    write_variant(run.initial_variant(index, spec.id), [spec], candidates[facts["chosen"]], facts)

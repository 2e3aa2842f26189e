"""Replace-1-block scores of every variant (Puzzle, section 3). Files: scores/main/kl/layer_NN.VARIANT.json."""

from __future__ import annotations

import itertools

import torch

from puzzle_nas.architecture import SLOTS, choice_id
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import variant_layer
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.training import parallel
from puzzle_nas.training.losses import Divergence
from puzzle_nas.training.replacement import ReplacementWalk

NAME = "score_blocks"
COMMAND = "score-blocks"
NEEDS = ("distill_blocks",)
SETTINGS = ("scoring",)
OUTPUTS = ("scores/main/*/*.json",)


def summarise(values_S: torch.Tensor) -> dict[str, float]:
    """Mean and standard error over sequences."""
    count = len(values_S)
    error = (values_S.std() / count**0.5).item() if count > 1 else 0.0
    return {"mean": values_S.mean().item(), "standard_error": error}


def score_of(divergence: Divergence, parent: Divergence) -> dict:
    """The JSON of one variant. All figures are means over the tokens of a sequence, then over sequences."""
    kl = divergence.kl_nats.double().mean(1)
    # The last position of a sequence has no label.
    lm_loss = divergence.lm_loss_nats[:, :-1].double().mean(1)
    increase = lm_loss - parent.lm_loss_nats[:, :-1].double().mean(1)
    return {
        "kl_nats": summarise(kl),
        "lm_loss_increase_nats": summarise(increase),
        "top1_agreement": summarise(divergence.top1_agrees.double().mean(1)),
        "kl_nats_by_sequence": [round(v, 8) for v in kl.tolist()],
        "lm_loss_increase_nats_by_sequence": [round(v, 8) for v in increase.tolist()],
    }


def run(recipe: Recipe, run: RunFolder) -> None:
    """Score every variant of every layer in the parent."""
    parent, shape = load_parent(run, by_layer=True)
    parallel.divide_threads()
    space = search_space_of(recipe, shape)
    tokens = load_tokens(run, "scoring")
    metric = recipe.scoring.metric
    with progress("score blocks, layer", shape.num_hidden_layers) as ticker:
        scratch = run.scratch(NAME) / f"rank_{parallel.rank()}" if recipe.memory == "stream" else None
        walk = ReplacementWalk(parent, tokens, recipe.scoring.batch_tokens, scratch=scratch)
        parent_scores: Divergence | None = None
        own = {shape.parent_spec(slot) for slot in SLOTS}
        paths = {
            (layer, specs): run.score(layer, choice_id(specs), metric=metric)
            for layer, specs in space.choices(by_block=recipe.scoring.unit == "block")
            if not own.issuperset(specs)
        }
        mine = parallel.share([choice for choice, path in paths.items() if not path.exists()])
        for index in range(shape.num_hidden_layers):
            missing = [specs for layer, specs in mine if layer == index]
            if missing:
                if parent_scores is None:
                    parent_scores = walk.model_itself()
                blocks = {
                    spec: variant_layer(run, parent, index, spec)
                    for spec in dict.fromkeys(itertools.chain.from_iterable(missing))
                }
                replacements = [{spec.slot: blocks[spec] for spec in specs} for specs in missing]
                for specs, divergence in zip(missing, walk.try_variants(replacements), strict=True):
                    write_json(paths[index, specs], score_of(divergence, parent_scores))
                ticker.advance()
            else:
                ticker.skip(1)
            if index + 1 < shape.num_hidden_layers:
                walk.advance()

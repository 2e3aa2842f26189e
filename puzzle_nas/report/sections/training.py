"""The library, blockwise distillation (BLD), the refit and global distillation (GKD)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable

from puzzle_nas.artifacts import read_json
from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.common import slot_name
from puzzle_nas.report.figures.layers import Distillation, distillation_figure
from puzzle_nas.report.figures.runs import training_figure
from puzzle_nas.report.layout import figure, listed, pair, paragraph, table


def training(facts: Facts) -> str:
    """What was trained, and what came of it."""
    return _blocks(facts) + _coupled(facts) + _child(facts)


def _blocks(facts: Facts) -> str:
    recipe, library = facts.recipe, facts.library
    specs = [spec for slot in library.specs for spec in library.specs[slot]]
    if not specs:
        return paragraph("The run holds no library.")
    trained: dict[str, list[Distillation]] = {slot: [] for slot in library.specs}
    rows = []
    for spec in specs:
        start, end = library.values(spec, "held_out_loss_start"), library.values(spec, "held_out_loss_end")
        fell = [bool(value) for value in library.values(spec, "fell_back")]
        known = [value for value in start if value is not None]
        if known:
            trained[spec.slot].append(Distillation(spec, start, end, fell))
        chosen = Counter(
            library.initial[layer, spec.id].get("chosen", "-")
            for layer in range(library.num_layers)
            if (layer, spec.id) in library.initial
        )
        rows.append(
            (
                spec.id,
                ", ".join(f"{name} {count}" for name, count in chosen.most_common()) or "-",
                _median(start),
                _median(end),
                listed([layer for layer, value in enumerate(fell) if value]) or ("none" if known else "-"),
            )
        )
    columns = ("variant", "initialisation (layers)", "median loss before", "after", "fell back in layers")
    facts_of_variants = table(columns, rows, text=("initialisation (layers)", "fell back in layers"))
    every = [variant for slot in library.specs for variant in trained[slot]]
    if not every:
        skipped = recipe.bld.tokens == 0
        why = "BLD was skipped (bld.tokens is 0)" if skipped else "The run holds no losses of BLD"
        return paragraph(f"{why}: variants are as they were initialised.") + facts_of_variants
    fallen = sum(sum(variant.fell_back) for variant in every)
    total = sum(value is not None for variant in every for value in variant.start)
    text = paragraph(
        f"{total} variants trained on {recipe.bld.tokens:,} tokens each to give the parent's block output. "
        + (
            f"Training made {fallen} of them worse on held-out text: they fell back to the initialisation."
            if fallen
            else "Training made none of them worse on held-out text, so none fell back to the initialisation."
        )
    )
    losses = [value for variant in every for values in (variant.start, variant.end) for value in values]
    drawn = "".join(
        figure(
            f"bld-{slot}",
            distillation_figure(trained[slot], losses),
            f"Held-out loss before and after BLD: {slot_name(slot)}",
            "Dotted before, solid after." + (" A cross marks a variant that fell back." if fallen else ""),
        )
        for slot in library.specs
        if trained[slot]
    )
    return text + pair(drawn) + facts_of_variants


def _coupled(facts: Facts) -> str:
    """What coupled BLD did; nothing where the recipe leaves it out."""
    recipe, run = facts.recipe, facts.run
    if not recipe.bld.coupled_tokens or not run.coupled_pairs.exists():
        return ""
    pairs = [(layer, ids) for layer, here in enumerate(read_json(run.coupled_pairs)["layers"]) for ids in here]
    trained = [read_json(run.variant(layer, ids, "coupled").with_suffix(".json")) for layer, ids in pairs]
    before, after = (_median([f[f"held_out_loss_{end}"] for f in trained]) for end in ("start", "end"))
    blocks = ["+".join(found["variant"] for found in row["slots"].values()) for row in facts.summary["architecture"]]
    return paragraph(
        f"Coupled BLD then trained {len(pairs)} pairs of attention and FFN, those that the first search used, on "
        f"{recipe.bld.coupled_tokens:,} tokens each, from a median loss of {before} to {after}; "
        f"{sum(f['fell_back'] for f in trained)} fell back to the decoupled variants. "
        f"{sum(block in pairs for block in enumerate(blocks))} of the child's {len(blocks)} blocks are such pairs."
    )


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else "-"


def _child(facts: Facts) -> str:
    recipe, refit, gkd = facts.recipe, facts.summary["refit"], facts.summary["gkd"]
    if not refit.get("tried"):
        text = paragraph("The refit was not tried (refit is false).")
    else:
        fate = "kept" if refit["kept"] else "discarded"
        before, after = refit["selection_kl_nats_before"], refit["selection_kl_nats_after"]
        started = "" if before is None else f"from {before:.4g} "
        text = paragraph(
            f"The refit took the assembled child's KL on the selection split {started}"
            f"to {'no finite number of' if after is None else f'{after:.4g}'} nats and was {fate}."
        )
    if not gkd["tokens"]:
        return text + paragraph("GKD was skipped (gkd.tokens is 0).")
    before, after = gkd["selection_kl_nats_start"], gkd["selection_kl_nats_best"]
    if gkd["best_step"]:
        best = gkd["best_step"]
        result = f"took KL on the selection split from {before:.4g} to {after:.4g} nats, best at step {best}"
    else:
        result = f"lowered KL, {before:.4g} nats at the start, at no step: the child stays as it was"
    text += paragraph(f"GKD on {gkd['tokens']:,} tokens {result}.")
    curve = (facts.file("gkd.json") or {}).get("curve", [])
    if len(curve) < 2:
        return text + paragraph("The run holds no curve of GKD.")
    length = recipe.data.sequence_length
    step_tokens = max(1, recipe.gkd.batch_tokens // length) * length
    tokens = [point["step"] * step_tokens for point in curve]
    steps = [point["step"] for point in curve]
    best = steps.index(gkd["best_step"]) if gkd["best_step"] in steps else None
    kl = [point["selection_kl_nats"] for point in curve]
    drawn = figure(
        "gkd-kl", training_figure(tokens, kl, "KL, nats", best), "GKD: KL on the selection split",
        f"{step_tokens:,} tokens to a step; the ring marks the weights that were kept.",
    ) + figure(
        "gkd-loss",
        training_figure(tokens[1:], [point.get("loss") for point in curve[1:]], "training loss"),
        "GKD: training loss",
        "Mean of the steps since the last measurement.",
    )  # fmt: skip
    return text + pair(drawn)

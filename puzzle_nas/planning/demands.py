"""What each stage of a run asks of a machine: work, memory, disk. No torch.

How many children a search measures, and how often timings are repeated, depends on what is found; the constants here
say what is assumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puzzle_nas.architecture import Choice
from puzzle_nas.choosing.cost_fit import uniform_models
from puzzle_nas.choosing.costs import REPEATS, timed_steps
from puzzle_nas.effort import EFFORTS
from puzzle_nas.formats.layout import LAYOUTS
from puzzle_nas.planning.counting import BATCH_TOKENS, Counts, Work
from puzzle_nas.recipe import PARENT_SAMPLES, steps_between_measurements
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, Mixture, Spec

GGUF_SECONDS, GGUF_SECONDS_PER_PARAMETER = 8.0, 6e-8
"""To fetch a package, and to turn a GGUF file into a checkpoint (SmolLM2-135M: 16 s in all)."""
TEXT_TOKENS_PER_SECOND = 2e5
"""Read, tokenised and packed by one core."""
SAMPLED_ROWS = {False: 128, True: 4096}
"""Rows that the parent writes together, on a GPU (True) or not."""
SAMPLED_BYTES = 2**30
"""What their caches may take; half of what is free on a GPU."""
SCORED_TOKENS = {False: 2048, True: 16_384}
"""Tokens whose activations scoring holds together, on a GPU (True) or not (scoring/replacement.py)."""
TIMED_AGAIN = 2.5
"""Repeats made until times are steady, over those asked for; runs make up to three times as many."""
PROBE_SECONDS = 1.0
"""To build a model that is timed."""
HELD_BACK_TOKENS, REFITTED_TOKENS, ROUNDED_TOKENS = 1024, 8192, 8192
"""To choose between initialisations, to refit the candidates of a search with, and to round own sub-blocks with."""
ROUNDING_PASSES = {True: 5, False: 21}
"""Products of a matrix's errors with its Gram matrix while it is rounded: to eight bits, and to fewer."""
ROUNDED_AT_ONCE, ROUNDING_BYTES, ROUNDED_BYTES = 1 << 24, 40, 8
"""Weights that are rounded together, what each takes, and its codes and what engines read of them."""
TIMING_REPEATS = 5
"""Of parent and child, at the end."""
SPEED_CHECKS, SPEED_REPEATS = 2, 14
"""Of what search found: each time parent and child are timed so often."""
NEAR = 4
"""Children that a round of refinement measures."""
SOLVER_SECONDS = 10.0
"""Of all programs of a search."""
SAVED = 3
"""Numbers kept for the backward pass for each one that a matrix gives: inputs, norms, activation functions."""
TRAINEE_BYTES = 24
"""For each parameter in BLD: weight, gradient and moments in float32, and copies."""
SAVING_BYTES = 24
"""For each parameter in GKD while a checkpoint is written: weight and moments, twice, in main memory."""
GRAM_BYTES = 36
"""For each entry of a Gram matrix from which channels are chosen: itself, damped, inverted (float64), and copies."""


@dataclass(frozen=True)
class Demand:
    """What one stage asks of a machine."""

    stage: str
    work: Work
    device_bytes: float
    """What the fullest process holds where it computes: in a GPU's memory, or else in main memory."""
    loaded_bytes: float = 0.0
    """Weights that one process loads: all go through main memory."""
    disk_bytes: float = 0.0
    """Left in the run folder."""
    scratch_bytes: float = 0.0
    """On disk while it runs."""
    is_shared: bool = False
    """Whether processes divide the work; otherwise the first does it alone."""


def prepare_parent(counts: Counts) -> Demand:
    """Read, examined and checked; what is not a checkpoint becomes one in the run folder."""
    parent, parameters = counts.recipe.parent, counts.size.parameters
    if parent.endswith(".gguf") or parent.startswith("package:"):
        seconds = GGUF_SECONDS + GGUF_SECONDS_PER_PARAMETER * parameters
        # Twice, as read and in a model; the largest matrix three times in float32 while it is dequantised.
        held = 2 * counts.parent_bytes + 12 * counts.ends
        return Demand("prepare_parent", Work(seconds=seconds), 0, held, counts.parent_bytes)
    work = Work(seconds=2, file_bytes=2 * counts.parent_bytes)
    # Of a mapped file, what is looked at.
    return Demand("prepare_parent", work, 0, counts.one_layer_bytes)


def prepare_data(counts: Counts) -> Demand:
    """Text is read and packed; the parent writes some."""
    recipe = counts.recipe
    tokens = sum(counts.tokens(split) for split in ("train", "calibration", "scoring", "selection", "validation"))
    work = Work(seconds=5 + tokens / TEXT_TOKENS_PER_SECOND)
    if not any(source.source == PARENT_SAMPLES for source in recipe.data.sources):
        return Demand("prepare_data", work, 0, disk_bytes=4 * tokens)
    row_bytes = counts.itemsize * counts.length * counts.size.body.cached + 16 * counts.size.vocabulary
    rows = math.ceil(recipe.data.sampled_tokens() / counts.length)
    room = (counts.device_bytes - counts.parent_bytes) / 2 if counts.is_on_gpu else SAMPLED_BYTES
    together = int(max(1, min(rows, SAMPLED_ROWS[counts.is_on_gpu], room // row_bytes)))
    step = counts.decode_step(together, counts.length / 2) + Work(scored_logits=together * counts.size.vocabulary)
    work += step * (math.ceil(rows / together) * counts.length)
    return Demand("prepare_data", work, counts.parent_bytes + together * row_bytes, counts.parent_bytes, 4 * tokens)


def measure_costs(counts: Counts) -> Demand:
    """Every variant in a stack, and random mixtures, interleaved."""
    recipe = counts.recipe
    if recipe.costs.file is not None:
        return Demand("measure_costs", Work(seconds=SOLVER_SECONDS / 2), 0)
    stacks, mixtures = len(uniform_models(counts.space)), recipe.costs.mixtures
    # In the mean, a stack keeps most of the parent, and a mixture half of it.
    timed = counts.requests(timed_steps(recipe.engine)) * (0.8 * stacks + 0.6 * mixtures)
    work = timed * (TIMED_AGAIN * REPEATS) + counts.requests() * 3
    work += Work(seconds=(stacks + mixtures) * PROBE_SECONDS + SOLVER_SECONDS / 2)
    # What the parent lacks has placeholders, which all models share.
    held = counts.parent_bytes + counts.library_bytes + _request_bytes(counts)
    return Demand("measure_costs", work, held, counts.parent_bytes)


def _request_bytes(counts: Counts) -> float:
    """Of the scenario with the largest caches, or the longest prefills, in the parent."""
    cached = counts.itemsize * counts.size.body.cached
    return max(
        s.batch_size * (cached * s.total_tokens + counts.running_bytes(s.prefill_tokens))
        for s in counts.recipe.traffic()
    )


def build_library(counts: Counts) -> Demand:
    """Sums over calibration text in each layer, linear systems, and the candidates of each variant tried."""
    tokens, parent = 0.75 * counts.tokens("calibration"), counts.size.architecture
    held_back = max(counts.length, min(counts.tokens("calibration") / 4, HELD_BACK_TOKENS))
    work = counts.forward(tokens + held_back) + Work(file_bytes=2 * counts.library_bytes)
    if counts.recipe.library.initialisation == "least_squares":
        for layer in counts.layers:
            for spec, _ in counts.variants(layer):
                tried = _candidates(spec, parent.layers[layer][spec.slot])
                work += _closed_form(counts, layer, spec, tokens) * tried
                if tried > 1:
                    work += counts.replacement(held_back, layer, (spec,)) * tried
    for form in counts.formats:
        work += sum((_rounded(counts, min(tokens, ROUNDED_TOKENS), *own, form) for own in parent), Work())
    ends, hidden = counts.ends, counts.size.hidden
    forms = [head.format for head in counts.space.heads if head.format]
    for form in forms:
        work += counts.gram(tokens, hidden) + _passes(form, 2.0 * ends * hidden)
    during = max(_statistics_bytes(counts, layer) for layer in counts.layers) + counts.logit_bytes(2)
    during = max(during, _rounded_bytes(counts))
    if forms:
        during = max(during, ends * (ROUNDED_BYTES + 2 * counts.itemsize) + ROUNDING_BYTES * min(ends, ROUNDED_AT_ONCE))
    held = counts.walked_bytes + counts.stream_bytes(tokens + 2 * held_back) + counts.running_bytes(BATCH_TOKENS)
    disk = counts.library_bytes + len(forms) * ends * (1 + counts.itemsize)
    return Demand("build_library", work, held + during, counts.walked_bytes, disk)


def _candidates(spec: Spec, own: Spec) -> int:
    """Initialisations of which held-back text chooses one."""
    match spec, own:
        case GroupedAttention(), GroupedAttention():
            return own.num_key_value_heads // spec.num_key_value_heads
        case Linear(), _:
            return 1 if spec.slot == "attention" else 3
        case Mixture(), Mixture():
            return 4 if spec.num_experts < own.num_experts else 2
    return 1


def _rounded(counts: Counts, tokens: float, layer: int, slot: str, own: Spec, form: str) -> Work:
    """A sub-block's matrices rounded one after another, the last one solved for; each expert's by its own tokens."""
    size, hidden, last = counts.size.of(layer, own), counts.size.hidden, counts.size.last_input(layer, own)
    if isinstance(own, Mixture):
        seen, width = tokens * own.num_experts_per_tok, own.moe_intermediate_size
        work = counts.passed(2 * tokens, size, 2) + counts.gram(seen, hidden) + counts.gram(seen, width)
        return work + _passes(form, own.num_experts * (4.0 * width * hidden**2 + 2.0 * hidden * width**2))
    inside = max(0, size.multiplied - last * hidden)
    work = counts.passed(2 * tokens, size, 2) + counts.gram(tokens, hidden) + counts.gram(tokens, last, hidden)
    products = 2.0 * (inside * hidden + last * hidden * last)
    return work + counts.solved(last, hidden) + _passes(form, products)


def _rounded_bytes(counts: Counts) -> float:
    """The experts of a layer in codes, and as engines read them: the largest of what is rounded at once but heads."""
    sizes = [counts.size.of(layer, own) for layer, _, own in counts.size.architecture if isinstance(own, Mixture)]
    most = max((size.parameters for size in sizes), default=0)
    return most * (ROUNDED_BYTES + counts.itemsize) if counts.formats else 0.0


def _passes(form: str, products: float) -> Work:
    """Of the FLOPs of one product of the errors with the Gram matrix, all that rounding takes."""
    # In float32, which is twice as fast as float64.
    has_eight_bits = LAYOUTS[form].block_bytes >= LAYOUTS[form].block
    return Work(float64_flops=ROUNDING_PASSES[has_eight_bits] * products / 2)


def _closed_form(counts: Counts, layer: int, spec: Spec, tokens: float) -> Work:
    """Sums and the linear system of one candidate."""
    hidden, width = counts.size.hidden, counts.size.last_input(layer, spec)
    match spec:
        case GatedFFN():
            whole = counts.size.last_input(layer, counts.size.architecture.layers[layer][spec.slot])
            # The Gram matrix, its inverse and the order of the channels serve all widths.
            share = 1 / sum(isinstance(s, GatedFFN) for s, _ in counts.variants(layer))
            once = counts.gram(tokens, whole) + counts.solved(whole, whole) + Work(flops=2 / 3 * whole**3)
            return once * share + counts.solved(width, hidden)
        case GroupedAttention():
            passed = counts.passed(tokens, counts.size.of(layer, spec), 1)
            return passed + counts.gram(tokens, width, hidden) + counts.solved(width, hidden)
        case Linear():
            return counts.gram(tokens, hidden, hidden) + counts.solved(hidden, hidden)
        case Mixture():
            each = counts.solved(spec.moe_intermediate_size, hidden)
            return counts.passed(BATCH_TOKENS, counts.size.of(layer, spec), 1) + each * (2 * spec.num_experts)
    return Work()


def _statistics_bytes(counts: Counts, layer: int) -> float:
    """Sums of a layer's activations, in float64."""
    hidden, held = counts.size.hidden, 0.0
    for slot, own in counts.size.architecture.layers[layer].items():
        if isinstance(own, GatedFFN):
            held += GRAM_BYTES * counts.size.last_input(layer, own) ** 2
        for spec in counts.space.options[layer][slot][1:]:
            width = {GroupedAttention: counts.size.last_input(layer, spec), Linear: hidden}.get(type(spec), 0)
            held += 8 * _candidates(spec, own) * width * (width + hidden)
    return held


def distill_blocks(counts: Counts) -> Demand:
    """Every variant of a layer on the parent's activations, layer after layer."""
    jobs = [[(spec,) for spec, size in counts.variants(layer) if size.parameters] for layer in counts.layers]
    return _blocks_distilled("distill_blocks", counts, counts.recipe.bld.tokens, jobs)


def _blocks_distilled(stage: str, counts: Counts, tokens: int, jobs: Sequence[Sequence[Sequence[Spec]]]) -> Demand:
    """Each layer's jobs trained on so many tokens, each of one variant or of several slots' together."""
    settings = counts.recipe.bld
    trained = [[_parameters(counts, layer, specs) for specs in here] for layer, here in enumerate(jobs)]
    every, kept = sum(map(sum, trained)), counts.itemsize * sum(map(sum, trained))
    if not tokens:
        return Demand(stage, Work(file_bytes=3 * kept), counts.walked_bytes, counts.walked_bytes, kept, is_shared=True)
    batch = max(counts.length, settings.batch_tokens)
    steps, read = math.ceil(tokens / batch), min(tokens, counts.tokens("train")) + batch
    # Of several processes, each goes through its layers twice, so that the next one can begin.
    work = counts.forward(read) * (1 if counts.processes == 1 else 2)
    work += Work(updates=steps * every, file_bytes=3 * kept)
    # GPUs take a step as one graph.
    work += Work(layer_calls=0 if counts.is_on_gpu else 2 * steps * sum(map(len, jobs)))
    a_token = [_block_trained(counts, layer, specs) for layer, here in enumerate(jobs) for specs in here]
    # Losses are measured before and after: forward alone, a third of the work.
    work += sum(a_token, Work()) * (tokens + 2 / 3 * batch)
    free = (counts.device_bytes - counts.walked_bytes) / 2
    shard = min(read, (settings.shard_tokens or read) + batch)
    activations = (1 + max(map(len, counts.size.architecture.layers))) * counts.stream_bytes(shard)
    in_memory = activations if counts.is_on_gpu and activations < free else 0
    held = counts.walked_bytes + in_memory + SAVED * counts.running_bytes(batch)
    # As many together as half of the free memory holds.
    together, one = max(map(sum, trained), default=0), max(itertools.chain(*trained), default=0)
    held += TRAINEE_BYTES * (one if counts.streams else min(together, max(one, free / TRAINEE_BYTES)))
    scratch = activations - in_memory + (12 * every if shard < read else 0)
    return Demand(stage, work, held, counts.walked_bytes, kept, scratch, is_shared=True)


def _parameters(counts: Counts, layer: int, specs: Sequence[Spec]) -> int:
    return sum(counts.size.of(layer, spec).parameters for spec in specs)


def _block_trained(counts: Counts, layer: int, specs: Sequence[Spec]) -> Work:
    """One token through the slots from the first that trains on, and back."""
    slots = counts.size.architecture.layers[layer]
    trained = {spec.slot: spec for spec in specs}
    flops = numbers = 0.0
    reached = False
    for slot, own in slots.items():
        if slot in trained:
            size = counts.size.of(layer, trained[slot])
            # Forward, gradients of weights, and those of activations behind the first matrices.
            inner = 0 if isinstance(trained[slot], Linear) and not reached else 2 / 3
            flops += (4 + inner) * size.multiplied + 3.5 * 4 * counts.length * size.attended
        elif reached:
            size = counts.size.of(layer, own)
            flops += 4 * size.multiplied + 3.5 * 4 * counts.length * size.attended
        else:
            continue
        reached, numbers = True, numbers + size.made
    return Work(flops=flops, block_numbers=numbers)


def score_blocks(counts: Counts) -> Demand:
    """Every variant of every layer in the parent."""
    return _scored("score_blocks", counts, counts.choices)


def _scored(stage: str, counts: Counts, choices: Sequence[Choice]) -> Demand:
    tokens = counts.tokens("scoring")
    most = max(Counter(layer for layer, _ in choices).values(), default=0)
    held = counts.walked_bytes + counts.logit_bytes(1 + most, tokens)
    held += 2 * counts.stream_bytes(tokens) + counts.running_bytes(SCORED_TOKENS[counts.is_on_gpu])
    work = _all_scored(counts, choices)
    if not counts.streams:
        held += most * counts.stream_bytes(SCORED_TOKENS[counts.is_on_gpu])
        return Demand(stage, work, held, counts.walked_bytes, is_shared=True)
    # Each layer reads those above it once more, and residual streams of its variants lie in files.
    read = sum(number * size.parameters for number, size in enumerate(counts.size.layers, start=1))
    work += Work(file_bytes=counts.itemsize * read)
    streams = most * counts.stream_bytes(tokens)
    return Demand(stage, work, held, counts.walked_bytes, scratch_bytes=streams, is_shared=True)


def _all_scored(counts: Counts, choices: Sequence[Choice]) -> Work:
    tokens = counts.tokens("scoring")
    work = counts.forward(2 * tokens) + counts.head(tokens) * len(counts.layers)
    return sum((counts.replacement(tokens, layer, specs) for layer, specs in choices), work)


def couple_blocks(counts: Counts) -> Demand:
    """Pairs of what a first search uses, trained and scored."""
    pairs = [_likely_pairs(slots) for slots in counts.space.options]
    trained = _blocks_distilled("couple_blocks", counts, counts.recipe.bld.coupled_tokens, pairs)
    scored = _scored("couple_blocks", counts, [(layer, pair) for layer, here in enumerate(pairs) for pair in here])
    work = trained.work + scored.work + Work(seconds=SOLVER_SECONDS)
    held, scratch = max(trained.device_bytes, scored.device_bytes), max(trained.scratch_bytes, scored.scratch_bytes)
    return dataclasses.replace(trained, work=work, device_bytes=held, scratch_bytes=scratch)


def _likely_pairs(slots: Mapping[str, tuple[Spec, ...]]) -> list[tuple[Spec, ...]]:
    """What solutions may use in a layer: of each slot the parent's own and one in the middle, but not all as it was."""
    return list(itertools.product(*([specs[0], specs[len(specs) // 2]] for specs in slots.values())))[1:]


def search_architecture(counts: Counts) -> Demand:
    """The program; candidates assembled, refitted, compared; scores around the best; speed checked."""
    effort, work = EFFORTS[counts.recipe.search.effort], Work(seconds=SOLVER_SECONDS)
    checks = SPEED_CHECKS if counts.recipe.costs.file is None else 0
    pair = counts.requests(timed_steps(counts.recipe.engine)) * (1 + counts.child_share)
    work += pair * (checks * SPEED_REPEATS)
    if not effort.measures_children:
        held = counts.parent_bytes + counts.child_bytes + _request_bytes(counts) if checks else 0
        return Demand("search_architecture", work, held, counts.parent_bytes if checks else 0)
    tokens, removed = counts.tokens("scoring"), effort.removed_runs * len(counts.layers)
    children = effort.by_sums + effort.removed_runs + NEAR * effort.refine_rounds
    work += counts.forward(tokens + counts.tokens("selection")) + counts.child_compared(tokens) * removed
    work += (_refitted(counts, REFITTED_TOKENS) + counts.child_compared(2 * counts.tokens("selection"))) * children
    work += Work(file_bytes=children * counts.child_bytes)
    work += _all_scored(counts, counts.choices) * (effort.refine_rounds * counts.child_share)
    most = max(Counter(layer for layer, _ in counts.choices).values(), default=0)
    # A candidate shares with the parent what it has of it.
    held = counts.parent_bytes + counts.child_bytes + _refit_bytes(counts, REFITTED_TOKENS)
    held += counts.logit_bytes(1 + most, tokens)
    return Demand("search_architecture", work, held, counts.parent_bytes)


def _refitted(counts: Counts, most_tokens: float) -> Work:
    """Every last matrix of a child solved for, on the calibration text or a part of it."""
    if not counts.recipe.refit:
        return Work()
    tokens = min(most_tokens, counts.tokens("calibration"))
    work = counts.forward(tokens) * (1 + counts.child_share)
    searched = [layer for layer, slots in enumerate(counts.space.options) if any(len(o) > 1 for o in slots.values())]
    for layer, _, own in counts.size.architecture:
        # Below the first exchanged layer nothing differs, and nothing is corrected.
        if layer < min(searched, default=len(counts.layers)):
            continue
        width = counts.size.last_input(layer, own)
        work += counts.gram(tokens, width, counts.size.hidden) * counts.child_share
        work += counts.solved(width, counts.size.hidden) * counts.child_share**3
    return work + _child_rounded(counts, tokens)


def _child_rounded(counts: Counts, tokens: float) -> Work:
    """In the mean of the recipe's formats."""
    rounded = (_rounded(counts, tokens, *own, form) for own in counts.size.architecture for form in counts.formats)
    return sum(rounded, Work()) * (counts.child_share / max(1, len(counts.formats)))


def _refit_bytes(counts: Counts, tokens: float) -> float:
    """Residual streams of parent and child, one sub-block's activations, and its sums in float64."""
    tokens = min(tokens, counts.tokens("calibration"))
    widest = max(counts.size.last_inputs.values())
    held = tokens * counts.itemsize * (widest + 5 * counts.size.hidden) + counts.running_bytes(BATCH_TOKENS)
    return held + max(24 * widest * (widest + counts.size.hidden), _rounded_bytes(counts))


def assemble_child(counts: Counts) -> Demand:
    """The child and three baselines, or the parent in each format, as checkpoints."""
    held, children = counts.walked_bytes + counts.child_bytes, 1 + (len(counts.formats) or 3)
    work = Work(seconds=1, file_bytes=2 * children * counts.child_bytes)
    if counts.formats:
        tokens = counts.tokens("calibration")
        work += counts.forward(tokens) + _child_rounded(counts, tokens) * children
    return Demand("assemble_child", work, held, held, children * counts.child_bytes)


def refit_child(counts: Counts) -> Demand:
    """The child on all of the calibration text."""
    tokens = counts.tokens("calibration")
    if not counts.recipe.refit:
        return Demand("refit_child", Work(), 0)
    work = _refitted(counts, tokens) + counts.child_compared(2 * counts.tokens("selection"))
    held = counts.walked_bytes + 2 * counts.child_bytes + _refit_bytes(counts, tokens)
    loaded = counts.walked_bytes + counts.child_bytes
    return Demand("refit_child", work + Work(file_bytes=3 * counts.child_bytes), held, loaded, counts.child_bytes)


def distill_child(counts: Counts) -> Demand:
    """The whole child against the parent (GKD)."""
    settings = counts.recipe.gkd
    if not settings.tokens:
        work = counts.child_compared(counts.tokens("selection")) + Work(file_bytes=3 * counts.child_bytes)
        loaded = counts.parent_bytes + counts.child_bytes
        return Demand("distill_child", work, loaded + counts.logit_bytes(2), loaded, counts.child_bytes)
    batch = max(counts.length, settings.batch_tokens)
    steps = math.ceil(settings.tokens / batch)
    measured = 1 + math.ceil(steps / steps_between_measurements(steps))
    trained = _trained_parameters(counts)
    work = _token_distilled(counts) * settings.tokens + counts.child_compared(counts.tokens("selection")) * measured
    # Rounding in every step takes about as long as AdamW.
    updates = steps * trained * (2 if counts.formats else 1)
    work += Work(updates=updates, file_bytes=36 * trained * measured + 3 * counts.child_bytes)
    micro = max(counts.length, min(batch, settings.micro_batch_tokens or batch))
    work += Work(layer_calls=4 * math.ceil(settings.tokens / micro) * len(counts.layers))
    loaded = max(counts.child_bytes + counts.parent_bytes, SAVING_BYTES * trained / counts.processes)
    held = _distilling_bytes(counts, trained, micro)
    scratch = 16 * trained + (6 * settings.parent_top_k * counts.tokens("train") if settings.parent_top_k else 0)
    return Demand("distill_child", work, held, loaded, counts.child_bytes, scratch, is_shared=True)


def _trained_parameters(counts: Counts) -> float:
    """Weights of the child that GKD changes."""
    settings, size = counts.recipe.gkd, counts.size
    body = sum(
        size.of(layer, spec).parameters
        for layer, _, spec in size.architecture
        if "experts" in settings.also_train or not isinstance(spec, Mixture)
    )
    return counts.child_share * body + (size.fixed_parameters if "embeddings" in settings.also_train else 0)


def _token_distilled(counts: Counts) -> Work:
    """A token through parent and child, and back through the child."""
    settings = counts.recipe.gkd
    parent, head = counts.forward(1), counts.head(1)
    passes = 3 + settings.gradient_checkpointing
    child = Work(flops=passes * parent.flops, trained_numbers=passes / 3 * parent.forward_numbers) * counts.child_share
    heads = head * (3 + ("embeddings" in settings.also_train))
    logits = Work(distilled_logits=counts.size.vocabulary)
    theirs = Work(flops=parent.flops, forward_numbers=parent.forward_numbers)
    return theirs + child + heads + logits


def _distilling_bytes(counts: Counts, trained: float, micro: float) -> float:
    """The most of several moments: both models loaded, the child in float32 as well, a step, measuring, saving."""
    settings, ranks = counts.recipe.gkd, counts.processes
    parent = 0 if settings.parent_top_k else counts.parent_bytes
    weights = 4 * counts.child_parameters
    states = 12 * trained
    copies = 0 if counts.itemsize == 4 else counts.child_bytes
    depth = counts.size.hidden * len(counts.layers)
    passed = micro * counts.itemsize * (SAVED * counts.child_share * counts.size.body.made + 2 * depth)
    if settings.gradient_checkpointing:
        passed = micro * 8 * depth + SAVED * counts.running_bytes(micro)
    step = (parent + weights + states + copies) / ranks + passed + counts.logit_bytes(2)
    resting = (parent + weights + states) / ranks
    measured = resting + counts.child_bytes + counts.logit_bytes(2)
    saved = resting + (0 if counts.is_on_gpu else SAVING_BYTES * trained / ranks)
    alone = counts.parent_bytes + counts.running_bytes(counts.length)
    return max(alone, counts.child_bytes + max(parent, parent / ranks + weights, step, measured, saved))


def evaluate_child(counts: Counts) -> Demand:
    """Parent, child as assembled, refitted and distilled, and baselines compared; child and parent timed, and the
    parent in formats."""
    tokens, repeats, forms = counts.tokens("validation"), TIMING_REPEATS, len(counts.formats)
    compared = 4 + (forms or 3)
    work = counts.forward(tokens) + counts.child_compared(tokens) * compared
    work += Work(file_bytes=compared * counts.child_bytes)
    work += counts.requests() * ((1 + counts.child_share * (1 + forms)) * TIMED_AGAIN * repeats)
    held = counts.parent_bytes + counts.child_bytes + _request_bytes(counts) + counts.logit_bytes(2)
    return Demand("evaluate_child", work, held, counts.parent_bytes + counts.child_bytes)


def write_report(counts: Counts) -> Demand:
    """From what the other stages left."""
    return Demand("write_report", Work(seconds=3), 0)


DEMANDS = {
    demand.__name__: demand
    for demand in (
        prepare_parent,
        prepare_data,
        measure_costs,
        build_library,
        distill_blocks,
        score_blocks,
        couple_blocks,
        search_architecture,
        assemble_child,
        refit_child,
        distill_child,
        evaluate_child,
        write_report,
    )
}
"""By the names of stages, in order."""


def demands(counts: Counts) -> list[Demand]:
    """Of every stage that the recipe does not leave out."""
    left_out = () if counts.recipe.bld.coupled_tokens else ("couple_blocks",)
    return [demand(counts) for stage, demand in DEMANDS.items() if stage not in left_out]

"""The loop of global knowledge distillation (Puzzle, section 4): the whole child learns from the parent.

Shapes: S sequences, B of them in a batch, T tokens, N = B * T, D hidden.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from puzzle_nas.architecture import Mixture
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.errors import ArtifactError
from puzzle_nas.families import Anatomy, LayerInputs, architecture_of, load_parent
from puzzle_nas.formats.stored import Matrix
from puzzle_nas.machine import machine_of
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import GKDSettings, Recipe
from puzzle_nas.scoring.replacement import next_tokens
from puzzle_nas.training import parallel
from puzzle_nas.training.adapters import add_adapters, merged_weights
from puzzle_nas.training.checkpoints import read_checkpoint, read_shards, write_checkpoint, write_shards
from puzzle_nas.training.compilation import compile_layers
from puzzle_nas.training.losses import cosine_loss, distillation_loss
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.parent_outputs import LiveParent, ParentOutputs, StoredParent
from puzzle_nas.training.step_graph import StepGraph

STAGE = "distill_child"
"""Whose scratch folder holds checkpoints."""
MOST_SKIPPED = 3
"""Steps without a finite gradient that are skipped between two checkpoints; more, or all, are a setback."""
MOST_SETBACKS = 3
"""Returns to the last good checkpoint, each with half the learning rate, before GKD stops."""


def gkd_loss(
    parent: ParentOutputs,
    child: PreTrainedModel,
    tokens_BT: torch.Tensor,
    blocks_B: torch.Tensor,
    settings: GKDSettings,
    inputs: Sequence[LayerInputs],
) -> torch.Tensor:
    """Weighted sum of cosine loss on hidden states, KL and LM loss on logits, scalar.

    Args:
        blocks_B: where the tokens lie in the split.
        inputs: of the child's layers, for sequences of this length.
    """
    cosine = bool(settings.cosine_weight)
    theirs, their_states = parent.outputs(tokens_BT, blocks_B, cosine)
    parts = Anatomy(child)
    with torch.autocast(parent.device.type, dtype=torch.bfloat16, enabled=parent.dtype == torch.bfloat16):
        *my_states, final = parts.states(tokens_BT, inputs)
    loss = torch.zeros((), device=parent.device)
    if cosine:
        loss = loss + settings.cosine_weight * cosine_loss(my_states, their_states, settings.compile)
    if settings.kl_weight or settings.lm_weight:
        loss = loss + distillation_loss(
            final.flatten(0, 1),
            parts.head,
            theirs,
            next_tokens(tokens_BT).flatten(),
            settings.kl_weight,
            settings.lm_weight,
            parent.dtype,
            settings.compile,
        )
    return loss


def freeze_mixtures(child: PreTrainedModel) -> None:
    """Let routers and experts stay as they are."""
    parts = Anatomy(child)
    for layer, slot, spec in architecture_of(child.config):
        if isinstance(spec, Mixture):
            parts.subblocks(layer)[slot].mixer.requires_grad_(False)


class Training:
    """The child in training, with everything that a resumed run needs."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        parent: ParentOutputs,
        start: PreTrainedModel,
        matrices: Mapping[str, Matrix] | None = None,
    ):
        """`matrices`: what `start` stores in formats. It trains with these rounded to the scales that they have, and
        gradients pass through the rounding as if it were not there."""
        self.recipe, self.run, self.parent, self.start = recipe, run, parent, start
        self.matrices = {name: matrix.to(start.device) for name, matrix in (matrices or {}).items()}
        settings = recipe.gkd
        tokens = load_tokens(run, "train")
        self.batch_sequences = max(1, settings.batch_tokens // tokens.shape[1])
        order = _order(recipe, tokens)
        self.tokens = tokens
        self.batches = order.split(self.batch_sequences) if len(order) else ()
        self.micro_sequences = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.shape[1])
        self.reference = parent.reference(load_tokens(run, "selection"))
        parent.prepare(settings.compile)
        self.curve: list[dict[str, float]] = []
        self.setbacks = 0
        self.state_folder = run.scratch(STAGE) / "state"
        self.best_path = run.scratch(STAGE) / "best.safetensors"
        self.begin()

    def begin(self) -> None:
        """Child and optimiser as they are before the first step."""
        settings = self.recipe.gkd
        self.child = copy.deepcopy(self.start)
        if settings.lora_rank:
            self.child.requires_grad_(False)
            add_adapters(self.child.base_model, settings.lora_rank, self.recipe.seed)
        else:
            self.child.float().requires_grad_(True)
            for name, matrix in self.matrices.items():
                self.child.get_parameter(name).data.copy_(matrix.weight_OI)
            if not settings.train_embeddings:
                self.child.get_input_embeddings().requires_grad_(False)
                self.child.get_output_embeddings().requires_grad_(False)
            if not settings.train_experts:
                freeze_mixtures(self.child)
        if settings.gradient_checkpointing:
            self.child.activation_checkpointing_enable()
        if settings.compile:
            compile_layers(self.child)
        self.child.train()
        inputs = Anatomy(self.child).inputs(self.tokens.shape[1])
        self.loss = parallel.ShardedLoss(
            self.child, lambda tokens, blocks: gkd_loss(self.parent, self.child, tokens, blocks, settings, inputs)
        )
        self.optimiser = Optimiser(self.child, settings, len(self.batches))
        self.graph: StepGraph | None = None
        self.whole_steps = 0
        self.curve = self.curve[:1]
        self.losses: list[float] = []

    @property
    def best(self) -> dict[str, float]:
        """The point of the curve with the lowest KL; ties go to the earlier."""
        return min(self.curve, key=lambda point: point["selection_kl_nats"])

    def measure(self, step: int) -> bool:
        """Add a point to the curve; keep the weights if they are the best so far.

        Returns:
            False if KL has exploded: more than a nat above twice the start's, or not finite. Then nothing is kept.
        """
        candidate = copy.deepcopy(self.start) if parallel.is_first() else self.start
        weights = dict(candidate.named_parameters())
        trained = merged_weights(self.child) if self.recipe.gkd.lora_rank else self.optimiser.parameters.items()
        changed: dict[str, torch.Tensor] = {}
        for name, weight in trained:
            whole = parallel.whole_tensor(weight.detach())
            if parallel.is_first() and name in self.matrices:
                # In float32 it still says which codes it is made of.
                changed[name] = self.matrices[name].of(whole).weight_OI
                weights[name].data.copy_(changed[name])
            elif parallel.is_first():
                changed[name] = weights[name].data.copy_(whole)
        kl = parallel.from_first(lambda: self.reference.compare(candidate).kl_nats)
        if not math.isfinite(kl) or (self.curve and kl > 2 * self.curve[0]["selection_kl_nats"] + 1):
            return False
        recent = self.losses[-self.recipe.gkd.evaluate_every_steps :]
        loss = sum(recent) / len(recent) if recent else None
        self.curve.append({"step": step, "selection_kl_nats": kl, **({} if loss is None else {"loss": loss})})
        if step and self.best["step"] == step and parallel.is_first():
            write_checkpoint(self.best_path, changed, step)
        return True

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        tensors = self.optimiser.state()
        history = [[p["step"], p["selection_kl_nats"], p.get("loss", -1.0)] for p in self.curve]
        tensors |= {
            "curve": torch.tensor(history, dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        tensors["setbacks"] = torch.tensor(self.setbacks)
        write_shards(self.state_folder, tensors, step)

    def load(self) -> int:
        """The step to continue with: the last checkpoint's, or the first."""
        kept = read_shards(self.state_folder, self.optimiser.parameters)
        if kept is None:
            return 0
        tensors, step = kept
        losses, history = tensors.pop("losses").tolist(), tensors.pop("curve").tolist()
        curve = [
            {"step": int(at), "selection_kl_nats": kl, **({} if loss < 0 else {"loss": loss})}
            for at, kl, loss in history
        ]
        improved = any(point["selection_kl_nats"] < curve[0]["selection_kl_nats"] for point in curve)
        if improved and parallel.from_first(lambda: read_checkpoint(self.best_path) is None):
            return 0
        self.losses, self.curve = losses, curve
        self.setbacks = max(self.setbacks, int(tensors.pop("setbacks")))
        self.optimiser.load(tensors)
        # It knows the old moments.
        self.graph = None
        return step

    @property
    def can_capture(self) -> bool:
        """Whether steps may become a CUDA graph: nothing in them waits for a disk or another rank."""
        on_gpu = self.child.device.type == "cuda" and isinstance(self.parent, LiveParent)
        settings = self.recipe.gkd
        return settings.compile and on_gpu and settings.optimiser == "adamw" and parallel.world_size() == 1

    def step(self, step: int) -> bool:
        """One update; False if its loss or gradient is not finite: then nothing changed."""
        blocks = self.batches[step]
        tokens = self.tokens[blocks]
        rate = 0.5**self.setbacks * self.optimiser.rate_at(step)
        is_whole = len(blocks) == self.batch_sequences
        # torch may compile once more in the second.
        if is_whole and self.can_capture and self.whole_steps >= 2:
            if self.graph is None:
                update = functools.partial(self._update, blocks=blocks)
                self.graph = StepGraph(update, [tokens.to(self.child.device)])
            done = self.graph.step(rate, [tokens])
        else:
            done = self._update(rate, tokens, blocks)
            self.whole_steps += is_whole
        loss, updated = done.tolist()
        if updated:
            self.losses.append(loss)
        return bool(updated)

    def _update(self, rate: float | torch.Tensor, tokens: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """The loss, and whether it led to an update, [2]."""
        with self._rounded():
            loss = self.loss.backward(tokens, blocks, self.micro_sequences)
        return torch.stack([loss, self.optimiser.update(rate, loss)])

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """The child as engines will read it; afterwards as it is trained (straight-through estimator)."""
        trained = self.optimiser.parameters
        kept = {name: trained[name].data.clone() for name in self.matrices if name in trained}
        for name, weight in kept.items():
            trained[name].data.copy_(self.matrices[name].of(weight).weight_OI)
        try:
            yield
        finally:
            for name, weight in kept.items():
                trained[name].data.copy_(weight)

    def set_back(self, step: int, what: str) -> int:
        """Return to the last checkpoint with half the learning rate; the step to continue with."""
        self.setbacks += 1
        if not (last := self.load()):
            self.begin()
        way_on = f"it goes on from step {last} with half the learning rate"
        if self.setbacks > MOST_SETBACKS:
            last, way_on = len(self.batches), "it stops here, and the best checkpoint counts"
        console.print(f"  GKD: {what} at step {step}; {way_on}. A lower gkd.learning_rate may help.")
        return last

    def train(self) -> None:
        """All steps, from wherever the last run stopped."""
        step, every = self.load(), self.recipe.gkd.evaluate_every_steps
        if not self.curve and not self.measure(0):
            parallel.stop(
                ArtifactError(
                    "The KL of the child is not a number before GKD. "
                    f"Make it again: puzzle assemble-child {self.run} --again"
                )
            )
        skipped = 0
        with progress("distil the child, step", len(self.batches)) as ticker:
            ticker.skip(step)
            while step < len(self.batches):
                skipped += not self.step(step)
                step += 1
                ticker.advance(note=f"KL {self.curve[-1]['selection_kl_nats']:.4f}")
                if skipped > MOST_SKIPPED or skipped == every:
                    step, skipped = self.set_back(step, "the gradient is not finite"), 0
                elif step % every == 0 or step == len(self.batches):
                    if skipped:
                        console.print(f"  GKD: {skipped} of the steps up to {step} had no finite gradient: skipped.")
                    skipped = 0
                    if self.measure(step):
                        self.save(step)
                    else:
                        step = self.set_back(step, "KL has exploded")

    def finish(self) -> PreTrainedModel:
        """The start with the best weights in it; `matrices` then are those."""
        if self.best["step"]:
            kept = read_checkpoint(self.best_path)
            assert kept is not None
            parameters = dict(self.start.named_parameters())
            for name, weight in kept[0].items():
                parameters[name].data.copy_(weight)
                if name in self.matrices:
                    self.matrices[name] = self.matrices[name].of(weight.to(self.start.device))
        return self.start


def parent_outputs(recipe: Recipe, run: RunFolder) -> ParentOutputs:
    """From the parent, or, with `gkd.parent_top_k`, from files, written first where they are missing."""

    def load() -> PreTrainedModel:
        parent = load_parent(recipe, run)
        parallel.divide_threads()
        return parent

    if recipe.gkd.parent_top_k is None or not recipe.gkd.tokens:
        return LiveParent(load())
    tokens = load_tokens(run, "train")
    return StoredParent(
        run.scratch(STAGE) / "parent",
        load,
        tokens,
        _order(recipe, tokens),
        load_tokens(run, "selection"),
        recipe.gkd.parent_top_k,
        machine_of(recipe).device,
    )


def _order(recipe: Recipe, tokens_ST: torch.Tensor) -> torch.Tensor:
    """The blocks that GKD trains on, in order."""
    return block_order(len(tokens_ST), math.ceil(recipe.gkd.tokens / tokens_ST.shape[1]), recipe.seed)

"""The loop of global knowledge distillation (Puzzle, section 4): the whole child learns from the parent.

Shapes: S sequences, B of them in a batch, T tokens, N = B * T, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.errors import ArtifactError, puzzle_command
from puzzle_nas.families import Anatomy, LayerInputs, architecture_of, load_parent
from puzzle_nas.formats.stored import Matrix
from puzzle_nas.machine import machine_of
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import GKDSettings, Recipe, steps_between_measurements
from puzzle_nas.scoring.replacement import next_tokens
from puzzle_nas.specs import Mixture
from puzzle_nas.training import parallel
from puzzle_nas.training.checkpoints import read_checkpoint, read_shards, write_checkpoint, write_shards
from puzzle_nas.training.compilation import compile_layers
from puzzle_nas.training.losses import cosine_loss, distillation_loss
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.parent_outputs import LiveParent, ParentOutputs, StoredParent

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
    kl, cosine, lm = (settings.losses.get(name, 0.0) for name in ("kl", "cosine", "lm"))
    theirs, their_states = parent.outputs(tokens_BT, blocks_B, cosine > 0)
    parts = Anatomy(child)
    with torch.autocast(parent.device.type, dtype=torch.bfloat16, enabled=parent.dtype == torch.bfloat16):
        *my_states, final = parts.states(tokens_BT, inputs)
    loss = torch.zeros((), device=parent.device)
    if cosine:
        loss = loss + cosine * cosine_loss(my_states, their_states, settings.compile)
    if kl or lm:
        loss = loss + distillation_loss(
            final.flatten(0, 1),
            parts.head,
            theirs,
            next_tokens(tokens_BT).flatten(),
            kl,
            lm,
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


def not_a_number(run: RunFolder) -> ArtifactError:
    """What is wrong with a child whose KL is none before GKD."""
    return ArtifactError(
        "The KL of the child is not a number before GKD. "
        f"Make it again: {puzzle_command('assemble-child', run, '--again')}"
    )


class Training:
    """The child in training, with everything that a resumed run needs. The recipe has tokens for it."""

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
        self.batches = order.split(self.batch_sequences)
        self.every = steps_between_measurements(len(self.batches))
        """Steps between measurements on the selection split, each also a checkpoint."""
        self.micro_sequences = max(1, (settings.micro_batch_tokens or settings.batch_tokens) // tokens.shape[1])
        self.reference = parent.reference(load_tokens(run, "selection"))
        parent.prepare(settings.compile)
        self.curve: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.setbacks = 0
        self.state_folder = run.scratch(STAGE) / "state"
        self.best_path = run.scratch(STAGE) / "best.safetensors"
        self.begin()

    def begin(self) -> None:
        """Child and optimiser as they are before the first step."""
        settings = self.recipe.gkd
        self.child = copy.deepcopy(self.start)
        self.child.float().requires_grad_(True)
        for name, matrix in self.matrices.items():
            self.child.get_parameter(name).data.copy_(matrix.weight)
        if "embeddings" not in settings.also_train:
            self.child.get_input_embeddings().requires_grad_(False)
            self.child.get_output_embeddings().requires_grad_(False)
        if "experts" not in settings.also_train:
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
        self.optimiser = Optimiser(self.child, settings.learning_rate, len(self.batches))
        self.curve = self.curve[:1]
        self.losses = []

    @property
    def best(self) -> dict[str, float]:
        """The point of the curve with the lowest KL; ties go to the earlier."""
        return min(self.curve, key=lambda point: point["selection_kl_nats"])

    def measure(self, step: int) -> bool:
        """Add a point to the curve; keep the weights if they are the best so far.

        Returns:
            False if KL has exploded: more than a nat above twice the start's, or not finite. Then nothing is kept.
        """
        trained = self.optimiser.parameters
        candidate = copy.deepcopy(self.start) if parallel.is_first() else self.start
        weights = dict(candidate.named_parameters())
        changed: dict[str, torch.Tensor] = {}
        for name, weight in trained.items():
            whole = parallel.whole_tensor(weight.detach())
            if parallel.is_first() and name in self.matrices:
                # In float32 it still says which codes it is made of.
                changed[name] = self.matrices[name].of(whole).weight
                weights[name].data.copy_(changed[name])
            elif parallel.is_first():
                changed[name] = weights[name].data.copy_(whole)
        kl = parallel.from_first(lambda: self.reference.compare(candidate).kl_nats)
        if not math.isfinite(kl) or (self.curve and kl > 2 * self.curve[0]["selection_kl_nats"] + 1):
            return False
        recent = self.losses[-self.every :]
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
        return step

    def step(self, step: int) -> bool:
        """One update; False if its loss or gradient is not finite: then nothing changed."""
        blocks = self.batches[step]
        with self._rounded():
            loss = self.loss.backward(self.tokens[blocks], blocks, self.micro_sequences)
        rate = 0.5**self.setbacks * self.optimiser.rate_at(step)
        # Read together: a GPU is waited for once.
        value, updated = torch.stack([loss, self.optimiser.update(rate, loss)]).tolist()
        if updated:
            self.losses.append(value)
        return bool(updated)

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """The child as engines will read it; afterwards as it is trained (straight-through estimator)."""
        trained = self.optimiser.parameters
        kept = {name: trained[name].data.clone() for name in self.matrices if name in trained}
        for name, weight in kept.items():
            trained[name].data.copy_(self.matrices[name].of(weight).weight)
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
        step = self.load()
        if not self.curve and not self.measure(0):
            parallel.stop(not_a_number(self.run))
        skipped = 0
        with progress("distil the child, step", len(self.batches)) as ticker:
            ticker.skip(step)
            while step < len(self.batches):
                skipped += not self.step(step)
                step += 1
                ticker.advance(note=f"KL {self.curve[-1]['selection_kl_nats']:.4f}")
                if skipped > MOST_SKIPPED or skipped == self.every:
                    step, skipped = self.set_back(step, "the gradient is not finite"), 0
                elif step % self.every == 0 or step == len(self.batches):
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

    if recipe.gkd.parent_top_k is None:
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

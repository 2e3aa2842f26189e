"""Global knowledge distillation (Puzzle, section 4): the whole child learns from the parent. File: child-gkd/.

Shapes: S sequences, B of them in a batch, T tokens, N = B * T, D hidden.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping

import torch

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_json
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.errors import ArtifactError
from puzzle_nas.families import load_model, load_parent, load_tokenizer, machine_of, save_model
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import GKDSettings, Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.training import parallel
from puzzle_nas.training.adapters import add_adapters, merged_weights
from puzzle_nas.training.checkpoints import read_checkpoint, read_shards, write_checkpoint, write_shards
from puzzle_nas.training.compilation import compile_layers
from puzzle_nas.training.losses import cosine_loss, distillation_loss
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.parent_outputs import LiveParent, ParentOutputs, StoredParent, causal_masks
from puzzle_nas.training.replacement import next_tokens
from puzzle_nas.training.step_graph import StepGraph

NAME = "distill_child"
COMMAND = "distill-child"
NEEDS = ("refit_child",)
SETTINGS = ("seed", "gkd")
OUTPUTS = ("gkd.json", "child-gkd/*")


MOST_SKIPPED = 3
"""Steps without a finite gradient that are skipped between two checkpoints; more, or all, are a setback."""
MOST_SETBACKS = 3
"""Returns to the last good checkpoint, each with half the learning rate, before GKD stops."""


def gkd_loss(
    parent: ParentOutputs,
    child: PuzzleForCausalLM,
    tokens_BT: torch.Tensor,
    blocks_B: torch.Tensor,
    settings: GKDSettings,
    masks: Mapping[str, torch.Tensor | None],
) -> torch.Tensor:
    """Weighted sum of cosine loss on hidden states, KL and LM loss on logits, scalar.

    Args:
        blocks_B: where the tokens lie in the split.
        masks: `causal_masks` of the child.
    """
    cosine = bool(settings.cosine_weight)
    theirs, their_states = parent.outputs(tokens_BT, blocks_B, cosine)
    with torch.autocast(parent.device.type, dtype=torch.bfloat16, enabled=parent.dtype == torch.bfloat16):
        mine = child.model(tokens_BT, attention_mask=masks, use_cache=False, output_hidden_states=cosine)
    loss = torch.zeros((), device=parent.device)
    if cosine:
        loss = loss + settings.cosine_weight * cosine_loss(mine.hidden_states[1:], their_states, settings.compile)
    if settings.kl_weight or settings.lm_weight:
        loss = loss + distillation_loss(
            mine.last_hidden_state.flatten(0, 1),
            child.lm_head,
            theirs,
            next_tokens(tokens_BT).flatten(),
            settings.kl_weight,
            settings.lm_weight,
            parent.dtype,
            settings.compile,
        )
    return loss


class Training:
    """The child in training, with everything that a resumed run needs."""

    def __init__(self, recipe: Recipe, run: RunFolder, parent: ParentOutputs, start: PuzzleForCausalLM):
        self.recipe, self.run, self.parent, self.start = recipe, run, parent, start
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
        self.state_folder = run.scratch(NAME) / "state"
        self.best_path = run.scratch(NAME) / "best.safetensors"
        self.begin()

    def begin(self) -> None:
        """Child and optimiser as they are before the first step."""
        settings = self.recipe.gkd
        self.child = copy.deepcopy(self.start)
        if settings.lora_rank:
            self.child.requires_grad_(False)
            add_adapters(self.child.model, settings.lora_rank, self.recipe.seed)
        else:
            self.child.float().requires_grad_(True)
            if not settings.train_embeddings:
                self.child.model.embed_tokens.requires_grad_(False)
                self.child.lm_head.requires_grad_(False)
        if settings.gradient_checkpointing:
            self.child.activation_checkpointing_enable()
        if settings.compile:
            compile_layers(self.child)
        self.child.train()
        masks = causal_masks(self.child, self.tokens.shape[1])
        self.loss = parallel.ShardedLoss(
            self.child, lambda tokens, blocks: gkd_loss(self.parent, self.child, tokens, blocks, settings, masks)
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
            if parallel.is_first():
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
        loss = self.loss.backward(tokens, blocks, self.micro_sequences)
        return torch.stack([loss, self.optimiser.update(rate, loss)])

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
                    f"The KL of the child is not a number before GKD. Make it anew: puzzle assemble {self.run} --again"
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

    def finish(self) -> PuzzleForCausalLM:
        """The start with the best weights in it."""
        if self.best["step"]:
            kept = read_checkpoint(self.best_path)
            assert kept is not None
            parameters = dict(self.start.named_parameters())
            for name, weight in kept[0].items():
                parameters[name].data.copy_(weight)
        return self.start


def parent_outputs(recipe: Recipe, run: RunFolder) -> ParentOutputs:
    """From the parent, or, with `gkd.parent_top_k`, from files, written first where they are missing."""

    def load() -> PuzzleForCausalLM:
        parent = load_parent(run)[0]
        parallel.divide_threads()
        return parent

    if recipe.gkd.parent_top_k is None or not recipe.gkd.tokens:
        return LiveParent(load())
    tokens = load_tokens(run, "train")
    return StoredParent(
        run.scratch(NAME) / "parent",
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


def run(recipe: Recipe, run: RunFolder) -> None:
    """Distil; the best checkpoint on the selection split is the result."""
    refitted = read_json(run / "refit.json", "refit")["kept"]
    parent = parent_outputs(recipe, run)
    start = load_model(run / ("child-refit" if refitted else "child"), machine_of(recipe))
    parallel.divide_threads()
    training = Training(recipe, run, parent, start)
    training.train()
    if not parallel.is_first():
        return
    start_kl, best = training.curve[0]["selection_kl_nats"], training.best
    if not best["step"] and recipe.gkd.tokens:
        console.print(
            f"  GKD lowered KL at no step (start {start_kl:.4f} nats on the selection split): "
            "the child stays as it was."
        )
    result = training.finish()
    architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
    with complete_folder(run / "child-gkd") as partial:
        save_model(result.eval(), load_tokenizer(parent_checkpoint(run)), partial)
        refit = "refit, " if refitted else ""
        how = f"block library, search, {refit}then {recipe.gkd.tokens} tokens of global distillation"
        (partial / "README.md").write_text(model_card(recipe.parent, architecture, __version__, how))
    write_json(
        run / "gkd.json",
        {
            "tokens": recipe.gkd.tokens,
            "best_step": best["step"],
            "selection_kl_nats_start": start_kl,
            "selection_kl_nats_best": best["selection_kl_nats"],
            "curve": training.curve,
        },
    )

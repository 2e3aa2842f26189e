"""Global knowledge distillation (Puzzle, section 4): the whole child learns from the parent. File: child-gkd/.

Shapes: S sequences, B of them in a batch, T tokens, N = B * T, D hidden.
"""

from __future__ import annotations

import copy
import math

import safetensors.torch
import torch

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_bytes, write_json
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.families import load_model, load_parent, load_tokenizer, machine_of, save_model
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import GKDSettings, Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.training import parallel
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.losses import cosine_loss, distillation_loss
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.replacement import next_tokens

NAME = "distill_child"
COMMAND = "distill-child"
NEEDS = ("refit_child",)
SETTINGS = ("seed", "gkd")
OUTPUTS = ("gkd.json", "child-gkd/*")


def gkd_loss(
    parent: PuzzleForCausalLM, child: PuzzleForCausalLM, tokens_BT: torch.Tensor, settings: GKDSettings
) -> torch.Tensor:
    """Weighted sum of cosine loss on hidden states, KL and LM loss on logits, scalar."""
    with torch.no_grad():
        theirs = parent.model(tokens_BT, use_cache=False, output_hidden_states=True)
    with torch.autocast(parent.device.type, dtype=torch.bfloat16, enabled=parent.dtype == torch.bfloat16):
        mine = child.model(tokens_BT, use_cache=False, output_hidden_states=True)
    loss = torch.zeros((), device=parent.device)
    if settings.cosine_weight:
        loss = loss + settings.cosine_weight * cosine_loss(mine.hidden_states[1:], theirs.hidden_states[1:])
    if settings.kl_weight or settings.lm_weight:
        loss = loss + distillation_loss(
            mine.last_hidden_state.flatten(0, 1),
            child.lm_head,
            theirs.last_hidden_state.flatten(0, 1),
            parent.lm_head,
            next_tokens(tokens_BT).flatten(),
            settings.kl_weight,
            settings.lm_weight,
        )
    return loss


class Training:
    """The child in training, with everything that a resumed run needs."""

    def __init__(self, recipe: Recipe, run: RunFolder, parent: PuzzleForCausalLM, start: PuzzleForCausalLM):
        self.recipe, self.run, self.parent = recipe, run, parent
        settings = recipe.gkd
        tokens = load_tokens(run, "train")
        batch_sequences = max(1, settings.batch_tokens // tokens.shape[1])
        wanted = math.ceil(settings.tokens / tokens.shape[1])
        self.tokens = tokens
        self.batches = block_order(len(tokens), wanted, recipe.seed).split(batch_sequences) if wanted else ()
        self.child = copy.deepcopy(start).float()
        self.child.requires_grad_(True)
        self.child.train()
        if not settings.train_embeddings:
            self.child.model.embed_tokens.requires_grad_(False)
            self.child.lm_head.requires_grad_(False)
        self.reference = ParentReference(parent, load_tokens(run, "selection"))
        self.loss = parallel.ShardedLoss(parent, self.child, lambda *models_tokens: gkd_loss(*models_tokens, settings))
        self.optimiser = Optimiser(self.child, settings, len(self.batches))
        self.curve: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.state_folder = run.scratch(NAME) / "state"
        self.best_path = run.scratch(NAME) / "best.safetensors"

    @property
    def best(self) -> dict[str, float]:
        """The point of the curve with the lowest KL; ties go to the earlier."""
        return min(self.curve, key=lambda point: point["selection_kl_nats"])

    def measure(self, step: int) -> None:
        """Add a point to the curve; keep the weights if they are the best so far."""
        candidate = parallel.whole(self.child, self.parent.dtype)
        kl = parallel.from_first(lambda: self.reference.compare(candidate).kl_nats)
        if not math.isfinite(kl):
            return
        recent = self.losses[-self.recipe.gkd.evaluate_every_steps :]
        loss = sum(recent) / len(recent) if recent else None
        self.curve.append({"step": step, "selection_kl_nats": kl, **({} if loss is None else {"loss": loss})})
        if step and self.best["step"] == step and candidate is not None:
            trained = {n: p.detach().cpu().contiguous() for n, p in candidate.named_parameters()}
            tensors = {n: p for n, p in trained.items() if n in self.optimiser.parameters}
            write_bytes(self.best_path, safetensors.torch.save(tensors, {"step": str(step)}))

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        tensors = self.optimiser.state()
        history = [[p["step"], p["selection_kl_nats"], p.get("loss", -1.0)] for p in self.curve]
        tensors |= {
            "curve": torch.tensor(history, dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        parallel.save_checkpoint(self.state_folder, step, tensors)

    def load(self) -> int:
        """The step to continue with."""
        saved = parallel.load_checkpoint(self.state_folder, self.optimiser.parameters)
        if saved is None:
            return 0
        step, tensors = saved
        self.losses = tensors.pop("losses").tolist()
        for at, kl, loss in tensors.pop("curve").tolist():
            self.curve.append({"step": int(at), "selection_kl_nats": kl, **({} if loss < 0 else {"loss": loss})})
        self.optimiser.load(tensors)
        return step

    def train(self) -> None:
        """All steps, from wherever the last run stopped."""
        begin, every = self.load(), self.recipe.gkd.evaluate_every_steps
        if not self.curve:
            self.measure(0)
        with progress("distil the child, step", len(self.batches)) as ticker:
            ticker.skip(begin)
            for step in range(begin, len(self.batches)):
                tokens = self.tokens[self.batches[step]].to(self.parent.device)
                loss = self.loss.backward(tokens)
                if not math.isfinite(loss):
                    console.print(
                        f"  The loss of GKD is {loss} at step {step + 1}: it stops here and the best checkpoint "
                        "so far counts. Try a lower gkd.learning_rate."
                    )
                    break
                self.optimiser.step(step)
                self.losses.append(loss)
                if (step + 1) % every == 0 or step + 1 == len(self.batches):
                    self.measure(step + 1)
                    self.save(step + 1)
                ticker.advance(note=f"KL {self.curve[-1]['selection_kl_nats']:.4f}")

    def finish(self, start: PuzzleForCausalLM) -> None:
        """Put the best weights into the child from which training started."""
        if self.best["step"]:
            start.load_state_dict(safetensors.torch.load_file(self.best_path), strict=False)


def run(recipe: Recipe, run: RunFolder) -> None:
    """Distil; the best checkpoint on the selection split is the result."""
    parent, _ = load_parent(run)
    refitted = read_json(run / "refit.json", "refit")["kept"]
    start = load_model(run / ("child-refit" if refitted else "child"), machine_of(recipe))
    parallel.divide_threads()
    training = Training(recipe, run, parent, start)
    training.train()
    if not parallel.is_first():
        return
    start_kl, best = training.curve[0]["selection_kl_nats"], training.best
    training.finish(start)
    if not best["step"] and recipe.gkd.tokens:
        console.print(
            f"  GKD lowered KL at no step (start {start_kl:.4f} nats on the selection split): "
            "the child stays as it was."
        )
    architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
    with complete_folder(run / "child-gkd") as partial:
        save_model(start, load_tokenizer(parent_checkpoint(run)), partial)
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

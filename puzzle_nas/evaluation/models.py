"""Any causal transformers model, split into a body and a head, so that logits are formed chunk by chunk.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import FAMILIES, Anatomy, Head, load_model, load_tokenizer
from puzzle_nas.families.anatomy import parent_type
from puzzle_nas.families.loading import LOADING_ERRORS, explain_loading, load_with_tokenizer, parent_checkpoint
from puzzle_nas.machine import Machine, machine_of, this_machine
from puzzle_nas.recipe import Recipe
from puzzle_nas.recipe_text import load_run_recipe

RUN_CHILD = "child-gkd"
"""The folder of a run's result."""


class Evaluated(nn.Module):
    """A model as comparisons need it: final hidden states and a head (`training.comparison.Evaluable`).

    Where a family that is not known does more to its logits than a product, final states are logits and the head
    passes them on.
    """

    def __init__(self, whole: Any, tokenizer: Any):
        super().__init__()
        self.whole, self.tokenizer = whole, tokenizer
        self.body = whole.base_model
        if parent_type(whole.config) in FAMILIES:
            self.head = Anatomy(whole).head
        elif self._factors():
            self.head = Head(whole.get_output_embeddings())
        else:
            self.body, self.head = _Logits(whole), Head(Same(whole.dtype))
        self.eval()

    def final_states(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """What the head receives, [B, T, D]."""
        return self.body(tokens_BT, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def _factors(self) -> bool:
        """Whether the logits are the head's product with the last hidden state, and nothing more."""
        head = self.whole.get_output_embeddings()
        if head is None:
            return False
        tokens = torch.arange(8, device=self.device).unsqueeze(0)
        logits = self.whole(tokens, use_cache=False).logits
        product = head(self.final_states(tokens))
        return product.shape == logits.shape and torch.allclose(product, logits, rtol=1e-2, atol=1e-2)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.whole.device

    @property
    def vocab_size(self) -> int:
        """Entries of its logits."""
        return self.whole.config.get_text_config().vocab_size

    @property
    def max_length(self) -> int | None:
        """Positions that it knows, where its configuration says so."""
        return getattr(self.whole.config.get_text_config(), "max_position_embeddings", None)


class _Logits(nn.Module):
    def __init__(self, whole: Any):
        super().__init__()
        self.whole = [whole]

    def forward(self, tokens_BT: torch.Tensor, **arguments: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.whole[0](tokens_BT, **arguments).logits)


class Same(nn.Module):
    """A head that passes logits on."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.empty(0, dtype=dtype)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class FirstEntries(nn.Module):
    """A head whose logits end after `size` entries: families pad the vocabulary of each size of model otherwise."""

    def __init__(self, head: Any, size: int):
        super().__init__()
        self.head, self.size = head, size
        self.weight = head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)[..., : self.size]


def open_model(checkpoint: Path, machine: Machine) -> Evaluated:
    """A parent (also a .gguf file), a child, or any other causal transformers model, in eval mode, without gradients.

    Raises:
        CheckpointError: missing, damaged, or no causal language model.
    """
    if checkpoint.suffix == ".gguf" and checkpoint.is_file():
        return Evaluated(*load_with_tokenizer(checkpoint, machine))
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"There is no checkpoint at {checkpoint}.")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if parent_type(config) in FAMILIES:
            whole = load_model(checkpoint, machine)
        else:
            whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=machine.dtype)
            whole = whole.to(machine.device).eval().requires_grad_(False)
    except LOADING_ERRORS as error:
        raise explain_loading(checkpoint, error) from error
    return Evaluated(whole, load_tokenizer(checkpoint))


@dataclass(frozen=True)
class Subject:
    """What is evaluated, against what, and where."""

    checkpoint: Path
    parent: Path | None
    machine: Machine
    run: RunFolder | None
    """The run folder that was named, if any."""
    recipe: Recipe | None
    seed: int

    @classmethod
    def of(cls, model: Path, parent: Path | None) -> Subject:
        """The child of a run folder, or an export of it, and its parent; or the checkpoints as given."""
        is_export = model.parent.name == "exports" and (model.parent.parent / "recipe.yaml").is_file()
        run = RunFolder(model.parent.parent if is_export else model)
        if not run.recipe.is_file():
            return cls(model, parent, this_machine(), None, None, 0)
        recipe = load_run_recipe(run.recipe)
        child = model if is_export else model / RUN_CHILD
        return cls(child, parent or parent_checkpoint(run), machine_of(recipe), run, recipe, recipe.seed)

    def open_parent(self) -> Evaluated | None:
        """The parent, where there is one."""
        return None if self.parent is None else open_model(self.parent, self.machine)

    def open(self) -> tuple[Evaluated, Evaluated | None]:
        """The model and its parent."""
        return open_model(self.checkpoint, self.machine), self.open_parent()


def comparable(child: Evaluated, parent: Evaluated) -> None:
    """Give both the same vocabulary, in place.

    Raises:
        CheckpointError: their tokenizers differ, so distributions over tokens cannot be compared.
    """
    if child.tokenizer.get_vocab() != parent.tokenizer.get_vocab():
        raise CheckpointError(
            "The two models split text into different tokens, so KL and agreement between them mean nothing; "
            "compare them by --tasks, or evaluate each without --parent."
        )
    size = min(child.vocab_size, parent.vocab_size)
    for model in (child, parent):
        if model.vocab_size > size:
            model.head = replace(model.head, matrix=FirstEntries(model.head.matrix, size))

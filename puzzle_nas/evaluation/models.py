"""Any causal transformers model, split into a body and a head, so that logits are formed chunk by chunk.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import FAMILIES, Machine, load_model, load_tokenizer
from puzzle_nas.families.loading import LOADING_ERRORS, explain_loading, machine_of, parent_checkpoint, this_machine
from puzzle_nas.modeling import PuzzleConfig
from puzzle_nas.recipe import Recipe, parse_recipe

RUN_CHILD = "child-gkd"
"""The folder of a run's result."""


class Evaluated(nn.Module):
    """A model as comparisons need it: `model(tokens).last_hidden_state` and `lm_head`, whose product is its logits.

    Where a family does more than that to its logits, the body gives logits and the head passes them on.
    """

    def __init__(self, whole: Any, tokenizer: Any):
        super().__init__()
        self.whole, self.tokenizer = whole, tokenizer
        self.model, self.lm_head = whole.base_model, whole.get_output_embeddings()
        if not isinstance(whole.config, PuzzleConfig) and not self._factors():
            self.model, self.lm_head = _Logits(whole), _Same(whole.dtype)
        self.eval()

    @torch.inference_mode()
    def _factors(self) -> bool:
        """Whether the logits are the head's product with the last hidden state, and nothing more."""
        if self.lm_head is None:
            return False
        tokens = torch.arange(8, device=self.device).unsqueeze(0)
        logits = self.whole(tokens, use_cache=False).logits
        product = self.lm_head(self.model(tokens, use_cache=False).last_hidden_state)
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


class _Same(nn.Module):
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
    """A parent, a child, or any other causal transformers model, in eval mode, without gradients.

    Raises:
        CheckpointError: missing, damaged, or no causal language model.
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"There is no checkpoint at {checkpoint}.")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if isinstance(config, PuzzleConfig) or config.model_type in FAMILIES:
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
        """A run folder's child and its parent, or the checkpoints as given."""
        if not (model / "recipe.yaml").is_file():
            return cls(model, parent, this_machine(), None, None, 0)
        run = RunFolder(model)
        recipe = parse_recipe(run.recipe.read_text(), name=str(run.recipe))
        return cls(model / RUN_CHILD, parent or parent_checkpoint(run), machine_of(recipe), run, recipe, recipe.seed)

    def open(self) -> tuple[Evaluated, Evaluated | None]:
        """The model and its parent."""
        child = open_model(self.checkpoint, self.machine)
        return child, None if self.parent is None else open_model(self.parent, self.machine)


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
            model.lm_head = FirstEntries(model.lm_head, size)

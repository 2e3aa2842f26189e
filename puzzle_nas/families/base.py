"""What a family adapter says of a parent: how its configuration reads as a `PuzzleConfig`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class Family(ABC):
    """One parent family. Weights keep their names; families whose names differ override `rename`."""

    model_type: ClassVar[str]

    @abstractmethod
    def specifics(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Fields of `PuzzleConfig` that only this family sets."""

    def rename(self, name: str) -> str:
        """The child's name of a parent's weight."""
        return name

    def puzzle_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """All fields of the `PuzzleConfig` that computes what this parent computes."""
        shared = {
            name: getattr(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "hidden_act",
                "max_position_embeddings",
                "initializer_range",
                "rms_norm_eps",
                "tie_word_embeddings",
                "rope_parameters",
                "attention_dropout",
                "pad_token_id",
                "bos_token_id",
                "eos_token_id",
            )
        }
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {**shared, "head_dim": head_dim, **self.specifics(config)}

"""What every export format has: a table of writers by kind of variant, and refusal by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig

from puzzle_nas.architecture import Architecture, Spec
from puzzle_nas.errors import ExportError
from puzzle_nas.families.loading import Machine, architecture_of, build, child_config, load_model, load_tokenizer
from puzzle_nas.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle_nas.servable import SERVERS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The precisions that weights can be written in, by the names that `--dtype` takes."""


@dataclass(frozen=True)
class Child:
    """What is exported: a model (a child, a parent, a probe) and its tokenizer.

    Verification needs float32 on the CPU.
    """

    model: PuzzleForCausalLM
    tokenizer: Any
    """None writes none, for models that are only timed."""
    own_dtype: torch.dtype = torch.float32
    """What the checkpoint stores."""

    @classmethod
    def load(cls, checkpoint: Path) -> Child:
        """From a checkpoint folder.

        Raises:
            CheckpointError: missing, truncated, or of an unknown family.
        """
        machine = Machine(torch.device("cpu"), torch.float32)
        model = load_model(checkpoint, machine)
        own = AutoConfig.from_pretrained(checkpoint).dtype
        return cls(model, load_tokenizer(checkpoint), own or torch.float32)

    @property
    def config(self) -> PuzzleConfig:
        """The model's configuration."""
        return self.model.config

    @cached_property
    def architecture(self) -> Architecture:
        """What stands in every layer."""
        return architecture_of(self.model.config)

    def layer_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The weights of one layer, named relative to it."""
        return {name: weight.detach() for name, weight in self.model.model.layers[layer].state_dict().items()}

    def rounded(self, dtype: torch.dtype) -> Child:
        """The same child with every weight rounded to `dtype`; arithmetic stays float32."""
        weights = {name: w.to(dtype).to(torch.float32) for name, w in self.model.state_dict().items()}
        return Child(build(self.config, weights), self.tokenizer)

    def truncated(self, num_layers: int) -> Child:
        """The first `num_layers` layers, then final norm and LM head."""
        config = child_config(self.config, Architecture(self.architecture.layers[:num_layers]))
        weights = {
            name: w
            for name, w in self.model.state_dict().items()
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers
        }
        return Child(build(config, weights), self.tokenizer)


class Exporter(ABC):
    """Writes one format."""

    name: ClassVar[str]
    """What `--to` takes."""
    server: ClassVar[str]
    """The key of `servable.SERVERS` that says what it can hold."""
    engine: ClassVar[str]
    """The key of `engines.SERVING_ENGINES` that loads and verifies it."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    """Keys of `DTYPES` that it can be written in."""
    writers: ClassVar[Mapping[type[Spec], Callable[..., Any]]]
    """What writes each kind of variant; a kind that is missing here is refused."""

    def refuse(self, child: Child) -> None:
        """Refuse what the format cannot hold.

        Raises:
            ExportError: names every layer and why.
        """
        server = SERVERS[self.server]
        reasons: dict[str, list[int]] = {}
        for layer, _, spec in child.architecture:
            reason = server.refusal(layer, spec)
            if reason is None and type(spec) not in self.writers:
                reason = f"{self.name} has no {spec.id}"
            if reason:
                reasons.setdefault(reason, []).append(layer)
        texts = [f"{reason} (layer {', '.join(map(str, layers))})" for reason, layers in reasons.items()]
        texts += [f"it has {reason}" for reason in self.family_problems(child.config)]
        if texts:
            raise ExportError(f"This child cannot be exported to {self.name}: {'; '.join(texts)}.")

    def family_problems(self, config: PuzzleConfig) -> list[str]:
        """What of the parent's family the format lacks, as `norms on queries and keys, which deci lacks`."""
        return []

    @abstractmethod
    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """Fill an existing, empty folder with everything that the engine needs. `dtype` is one of `dtypes`."""

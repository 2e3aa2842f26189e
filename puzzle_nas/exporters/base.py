"""What every export format has: a table of writers by kind of variant, and refusal by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from puzzle_nas.architecture import Architecture
from puzzle_nas.errors import ExportError
from puzzle_nas.families import FAMILIES, Anatomy, architecture_of, build, child_config, load_model, load_tokenizer
from puzzle_nas.families.anatomy import parent_type
from puzzle_nas.families.loading import parents_architecture
from puzzle_nas.formats.stored import FILE, Matrix, put, read_matrices
from puzzle_nas.machine import Machine
from puzzle_nas.servable import SERVERS
from puzzle_nas.specs import Spec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The precisions that weights can be written in, by the names that `--dtype` takes."""


@dataclass(frozen=True)
class Child:
    """What is exported: a model (a child, a parent, a probe) and its tokenizer.

    Verification needs float32 on the CPU.
    """

    model: PreTrainedModel
    tokenizer: Any
    """None writes none, for models that are only timed."""
    own_dtype: torch.dtype = torch.float32
    """What the checkpoint stores."""
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    """What it stores in formats, by the names of the weights; without them writers round to nearest."""

    @classmethod
    def load(cls, checkpoint: Path) -> Child:
        """From a checkpoint folder.

        Raises:
            CheckpointError: missing, truncated, or of an unknown family.
        """
        machine = Machine(torch.device("cpu"), torch.float32)
        model = load_model(checkpoint, machine)
        own = AutoConfig.from_pretrained(checkpoint).dtype
        matrices = read_matrices(checkpoint / FILE)
        put(model, matrices)
        dtype = own if isinstance(own, torch.dtype) else torch.float32
        return cls(model, load_tokenizer(checkpoint), dtype, matrices)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.model.config

    @cached_property
    def architecture(self) -> Architecture:
        """What stands in every layer."""
        return architecture_of(self.model.config)

    def layer_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The weights of one layer, named relative to it; what it stores in formats as files hold it."""
        parts = Anatomy(self.model)
        weights = {name: weight.detach() for name, weight in parts.layers[layer].state_dict().items()}
        stored = {name: self.matrices.get(f"{parts.layer_prefix}{layer}.{name}") for name in weights}
        return {name: weights[name] if m is None else m.parts["weight"] for name, m in stored.items()}

    @cached_property
    def forms(self) -> dict[str, str]:
        """The format of each matrix of a layer that has one, by the name of its weight."""
        parts, found = Anatomy(self.model), {}
        for layer, slot, spec in self.architecture:
            if spec.format is not None:
                matrices = parts.subblocks(layer)[slot].matrices
                found |= {f"{parts.layer_prefix}{layer}.{name}": spec.format for name in matrices}
        return found

    def matrix(self, name: str) -> Matrix:
        """A matrix of `forms`: as it is stored, or rounded to nearest."""
        if (stored := self.matrices.get(name)) is not None:
            return stored
        module = self.model.get_submodule(name.rpartition(".")[0])
        return Matrix.nearest(self.forms[name], module, self.model.get_parameter(name).detach())

    def rounded(self, dtype: torch.dtype, as_served: bool = False) -> Child:
        """The same child with every weight rounded to `dtype`, or as its format stores it; arithmetic stays float32.

        Args:
            as_served: its formats are known still, for what they do to activations; otherwise it has none.
        """
        stored = {self.model.get_parameter(name).data_ptr() for name in self.matrices}
        weights = {
            name: weight if weight.data_ptr() in stored else weight.to(dtype).to(torch.float32)
            for name, weight in self.model.state_dict().items()
        }
        architecture = self.architecture if as_served else self.architecture.plain
        return Child(build(child_config(self.config, architecture), weights), self.tokenizer)

    @property
    def family(self) -> str:
        """transformers' name of the parent's family."""
        return parent_type(self.config)

    def truncated(self, num_layers: int) -> Child:
        """The first `num_layers` layers, nothing in the others, then final norm and LM head."""
        removed = range(num_layers, len(self.architecture.layers))
        prefix = Anatomy(self.model).layer_prefix
        gone = tuple(f"{prefix}{layer}." for layer in removed)
        weights = {name: w for name, w in self.model.state_dict().items() if not name.startswith(gone)}
        left = build(child_config(self.config, self.architecture.without(removed)), weights)
        matrices = {name: matrix for name, matrix in self.matrices.items() if name in weights}
        return Child(left, self.tokenizer, self.own_dtype, matrices)


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
    """What writes each kind of variant; a kind that is missing here is refused, but in a parent's own layers where the
    server takes no others of its family."""
    families: ClassVar[Collection[str]] = FAMILIES
    """Those whose parents' own layers it can hold; others are refused."""

    def refuse(self, child: Child) -> None:
        """Refuse what the format cannot hold.

        Raises:
            ExportError: names every layer and why.
        """
        if reasons := self.reasons(child):
            raise ExportError(f"This child cannot be exported to {self.name}: {'; '.join(reasons)}.")

    def reasons(self, child: Child) -> list[str]:
        """Why the format cannot hold a model, each a clause that names the layers; none where it can."""
        server, own = SERVERS[self.server], parents_architecture(child.config)
        reasons: dict[str, dict[int, None]] = {}
        for layer, slot, spec in child.architecture:
            is_removed = all(other.empty for other in child.architecture.layers[layer].values())
            if child.family in server.own_layers and is_removed:
                continue
            reason = server.refusal(layer, spec, own.layers[layer][slot], child.family)
            if reason is None and child.family not in server.own_layers and type(spec) not in self.writers:
                reason = f"{self.name} has no {spec.id}"
            if reason:
                reasons.setdefault(reason, {})[layer] = None
        texts = [f"{reason} (layer {', '.join(map(str, layers))})" for reason, layers in reasons.items()]
        if reason := server.refusal(len(child.architecture.layers), child.architecture.head, own.head, child.family):
            texts.append(f"{reason} (embeddings and LM head)")
        if child.family in self.families:
            return texts + self.family_problems(child)
        return [*texts, f"it has no layers of {child.family}"]

    def family_problems(self, child: Child) -> list[str]:
        """What of a parent of one of `families` the format cannot hold, each a clause."""
        return []

    def differing(self, child: Child, folder: Path, dtype: str) -> list[str]:
        """The tensors of a written file whose values, as an engine reads them, are not the child's; none by default."""
        return []

    def notes(self, child: Child) -> list[str]:
        """What of the child the format does not say, where it can be written all the same."""
        return []

    @abstractmethod
    def write(self, child: Child, folder: Path, dtype: str) -> None:
        """Fill an existing, empty folder with everything that the engine needs. `dtype` is one of `dtypes`."""

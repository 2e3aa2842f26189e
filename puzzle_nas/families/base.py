"""What a family adapter says of a parent: where its parts are. It computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from puzzle_nas.specs import GatedFFN, GroupedAttention, Spec


@dataclass(frozen=True)
class Place:
    """The parts of one slot, by the names of a layer's attributes.

    What the slot adds to the residual stream is `scale * output_norm(mixer(norm(x)))`.
    """

    mixer: str
    norm: str | None
    last: str | None
    """The mixer's last matrix, relative to it; None where its inside is not looked at."""
    output_norm: str | None = None
    scale: str | None = None
    """An attribute of the layer that holds a number."""
    pair: bool = False
    """Whether the mixer returns a tuple that begins with its output."""


@dataclass(frozen=True)
class Slot:
    """A slot of one layer: where it is, and the parent's own spec."""

    place: Place
    own: Spec


ATTENTION = Place("self_attn", "input_layernorm", "o_proj", pair=True)
FFN = Place("mlp", "post_attention_layernorm", "down_proj")


class Family:
    """Decoders whose layers are a norm, attention, a norm, a gated FFN, as Llama's are; others override.

    A family is one subclass in a file of its own, and a line in `families/registry.py`. Opening a parent compares what
    the adapter says with what the family's own layers compute.
    """

    model_type: ClassVar[str]
    """transformers' name of the family."""
    places: ClassVar[Mapping[str, Place]] = {"attention": ATTENTION, "ffn": FFN}
    """Where the parts of each slot are, in the order in which slots run."""
    final_norm: ClassVar[str] = "norm"
    """The body's attribute that holds it."""
    embedding_scale: ClassVar[str | None] = None
    """The field of the configuration by which the body multiplies embeddings."""
    logit_scale: ClassVar[str | None] = None
    """The field by which logits are divided."""
    logit_cap: ClassVar[str | None] = None
    """The field c of logits that are c * tanh(logits / c)."""

    def slots(self, config: PreTrainedConfig, layer: int) -> dict[str, Slot]:
        """What stands in a layer, in the order in which it runs."""
        own = {"attention": self.attention(config, layer), "ffn": GatedFFN(config.intermediate_size)}
        return {slot: Slot(self.places[slot], spec) for slot, spec in own.items()}

    def attention(self, config: PreTrainedConfig, layer: int) -> GroupedAttention:
        """The parent's own attention of a layer."""
        return GroupedAttention(config.num_key_value_heads, self.window(config, layer))

    def window(self, config: PreTrainedConfig, layer: int) -> int | None:
        """How many tokens a layer's attention sees at most; None means all."""
        types = getattr(config, "layer_types", None)
        if types is not None and types[layer] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)

    def state_bytes(self, config: PreTrainedConfig, slot: str, itemsize: int) -> int:
        """What one sequence keeps in the mixer of a slot, however long it is."""
        return 0

    def fields(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The `changes` of a spec by the names that the family's configuration has for them."""
        return dict(changes)

    def number(self, config: PreTrainedConfig, field: str | None) -> float | None:
        """A field of the configuration, None where the family has none or it is not set."""
        value: Any = None if field is None else getattr(config, field, None)
        return None if value is None else float(value)

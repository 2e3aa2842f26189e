"""A model taken apart: embeddings, layers, their sub-blocks, final norm and head, each to be run alone.

No forward pass of a family is written here. Layers and mixers are the family's own modules, and what it passes to them
(masks, rotary positions, ...) is recorded while its own body runs over layers that compute nothing.

Shapes: B batch, T tokens, D hidden, N tokens of all sequences, V vocabulary, I width of a matrix's input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families.base import Family, Place
from puzzle_nas.families.registry import family_of
from puzzle_nas.modeling import WINDOW_MASKS, Nothing, PuzzleConfig, window_masks


@dataclass(frozen=True)
class LayerInputs:
    """What a layer receives besides the residual stream, for sequences of one length without padding or cache."""

    layer: Mapping[str, Any]
    mixers: Mapping[str, Mapping[str, Any]]
    """By slot, what the layer passes to the mixer."""


class SubBlock:
    """One slot of one layer: `added` is what it adds to the residual stream, `last` its last matrix.

    Args:
        layer: the family's own, or a shell of it that holds this slot alone.
    """

    def __init__(self, layer: nn.Module, slot: str, place: Place):
        self.layer, self.slot, self.place = layer, slot, place

    @property
    def mixer(self) -> nn.Module:
        """The attention, the FFN, ..."""
        return getattr(self.layer, self.place.mixer)

    @property
    def empty(self) -> bool:
        """Whether nothing is left to run."""
        return not hasattr(self.layer, self.place.mixer) or isinstance(self.mixer, Nothing)

    @property
    def norm(self) -> nn.Module | None:
        """In front of the mixer."""
        return None if self.place.norm is None else getattr(self.layer, self.place.norm)

    def read(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What the mixer reads of the residual stream, [B, T, D]."""
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def mixed(self, read_BTD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """The mixer's output, [B, T, D]."""
        output = self.mixer(read_BTD, **inputs.mixers[self.slot])
        return output[0] if self.place.pair else output

    def finished(self, mixed_BTD: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream where the mixer gives `mixed_BTD`, [B, T, D]."""
        if self.place.output_norm is not None:
            mixed_BTD = getattr(self.layer, self.place.output_norm)(mixed_BTD)
        return mixed_BTD if self.place.scale is None else mixed_BTD * getattr(self.layer, self.place.scale)

    def added(self, x_BTD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """What is added to the residual stream, [B, T, D]."""
        if self.empty:
            return torch.zeros_like(x_BTD)
        return self.finished(self.mixed(self.read(x_BTD), inputs))

    def before_output(self, wanted: torch.Tensor, mixed: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """What the mixer must give more for `wanted` more to be added, the output norm taken as it is now.

        Args:
            mixed, added: the mixer's output and what it adds, as they are. All shapes [B, T, D].
        """
        if self.place.output_norm is None and self.place.scale is None:
            return wanted
        mixed = mixed.float()
        slope = added.float() / torch.where(mixed.abs() < 1e-6, torch.full_like(mixed, 1e-6), mixed)
        # Where little gets through the norm, much more would have to be given, which would make all else smaller: what
        # one channel gives costs the others about the mean square of their slopes, divided by their number.
        cost = slope.square().mean(-1, keepdim=True) / slope.shape[-1]
        return wanted * slope / (slope.square() + cost)

    @property
    def last(self) -> nn.Linear | None:
        """The mixer's last matrix, which a module of ours names itself; None where there is none to be solved for."""
        if self.empty:
            return None
        name = getattr(self.mixer, "last_matrix", self.place.last)
        found: Any = None if name is None else self.mixer.get_submodule(name)
        return found

    @property
    def matrices(self) -> dict[str, nn.Module]:
        """The weights that formats hold, by names relative to the layer, each with the module that has it.

        They are those of linear maps and of experts, which transformers stacks; those of routers are not.
        """
        found: dict[str, nn.Module] = {}
        for path, module in () if self.empty else self.mixer.named_modules(prefix=self.place.mixer):
            # Only modules of stacked experts say whether these are transposed.
            has_experts = hasattr(module, "is_transposed")
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == (3 if has_experts else 2) and (has_experts or isinstance(module, nn.Linear)):
                    found[f"{path}.{name}"] = module
        return found

    def with_last_input(self, read_BTD: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixer's output, [B, T, D], and what its last matrix received for it, [B, T, I]."""
        received: list[torch.Tensor] = []
        matrix = self.last
        assert matrix is not None
        hook = matrix.register_forward_pre_hook(lambda _, arguments: received.append(arguments[0]))
        try:
            mixed = self.mixed(read_BTD, inputs)
        finally:
            hook.remove()
        return mixed, received[0].reshape(*read_BTD.shape[:-1], -1)

    def names(self) -> tuple[str, ...]:
        """Prefixes of the names of its weights, relative to the layer."""
        return prefixes(self.place)


def prefixes(place: Place) -> tuple[str, ...]:
    """Prefixes of the names of a slot's weights, relative to the layer."""
    return tuple(f"{name}." for name in (place.norm, place.mixer, place.output_norm) if name is not None)


@dataclass(frozen=True)
class Head:
    """From final hidden states to logits: a product, a division, a soft cap."""

    matrix: nn.Module
    divisor: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> torch.Tensor:
        """[V, D]."""
        return self.matrix.weight  # type: ignore[return-value]

    def shaped_(self, products: torch.Tensor) -> torch.Tensor:
        """Logits of float32 products, [..., V], in place."""
        if self.divisor != 1.0:
            products.div_(self.divisor)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def slope_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """A gradient in logits, [..., V], as one in products, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.divisor == 1.0 else gradient.div_(self.divisor)


@dataclass(frozen=True)
class Anatomy:
    """Where a model's parts are; the model is of a known family, or a child of one."""

    model: PreTrainedModel

    @property
    def family(self) -> Family:
        """The adapter."""
        return family_of(parent_type(self.model.config))

    @property
    def body(self) -> Any:
        """The model without its head."""
        return self.model.base_model

    @property
    def layers(self) -> Any:
        """The layers, in order."""
        return self.body.layers

    def new_layer(self, config: PreTrainedConfig, layer: int) -> nn.Module:
        """A layer of the family's, with new weights."""
        layers = self.layers
        made = type(layers.shell(layer) if hasattr(layers, "shell") else layers[layer])
        return made(config, layer)

    @property
    def layer_prefix(self) -> str:
        """What the names of all weights of layers begin with."""
        return f"{self.model.base_model_prefix}.layers."

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return getattr(self.body, self.family.final_norm)

    @property
    def embeddings(self) -> nn.Module:
        """From tokens to vectors."""
        return self.body.get_input_embeddings()

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """What the first layer receives, [B, T, D]."""
        embedded = self.embeddings(tokens_BT)
        scale = self.family.number(self.model.config, self.family.embedding_scale)
        return embedded if scale is None else embedded * scale

    @property
    def head(self) -> Head:
        """The LM head with what the family does to its products."""
        config, family = self.model.config, self.family
        divisor = family.number(config, family.logit_scale)
        matrix = self.model.get_output_embeddings()
        return Head(matrix, 1.0 if divisor is None else divisor, family.number(config, family.logit_cap))

    def places(self, layer: int) -> dict[str, Place]:
        """Where the slots of a layer are, in the order in which they run."""
        return {slot: found.place for slot, found in self.family.slots(self.model.config, layer).items()}

    def subblocks(self, layer: int) -> dict[str, SubBlock]:
        """The slots of a layer, in the order in which they run."""
        module = self.layers[layer]
        return {slot: SubBlock(module, slot, place) for slot, place in self.places(layer).items()}

    def inputs(self, length: int, windows: Sequence[int] = ()) -> list[LayerInputs]:
        """What the family passes to every layer, and that to its mixers, for any number of sequences of one length.

        Args:
            windows: for which attention masks are needed besides the model's own.
        """
        key = (length, tuple(windows), self.model.dtype, self.model.device, self.model.config._attn_implementation)
        known = vars(self.model).setdefault("recorded_inputs", {})
        if key not in known:
            # The caller may be in inference mode, and somebody else may train with what is made here.
            with torch.inference_mode(False), torch.no_grad():
                known[key] = self._recorded(length, windows)
        return known[key]

    def _recorded(self, length: int, windows: Sequence[int]) -> list[LayerInputs]:
        config, body = self.model.config, self.body
        twin = meta_twin(self.model)
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for index, layer in enumerate(twin.base_model.layers):
            of_layer, of_mixers = {}, {}
            found.append((of_layer, of_mixers))
            layer.register_forward_pre_hook(_noting(of_layer), with_kwargs=True)
            for name, _ in list(layer.named_children()):
                # Norms and the like, which have no weights here.
                setattr(layer, name, nn.Identity())
            for slot, place in self.places(index).items():
                if hasattr(layer, place.mixer):
                    of_mixers[slot] = {}
                    setattr(layer, place.mixer, _Recorder(of_mixers[slot], place.pair))
        example = torch.zeros(1, length, config.hidden_size, dtype=self.model.dtype, device=self.model.device)
        arguments: dict[str, Any] = {"inputs_embeds": example, "use_cache": False}
        if windows:
            known = {window: None for window in (*windows, *getattr(body, "windows", {}))}
            arguments[WINDOW_MASKS] = window_masks(config, known, example)
        present, was_training = body.layers, body.training
        try:
            body.layers = twin.base_model.layers
            body(**arguments)
        finally:
            body.layers = present
            body.train(was_training)
        return [LayerInputs(of_layer, of_mixers) for of_layer, of_mixers in found]

    def states(self, tokens_BT: torch.Tensor, inputs: Sequence[LayerInputs]) -> Iterable[torch.Tensor]:
        """The residual stream after each layer, [B, T, D], and at last what the head receives."""
        hidden = self.embed(tokens_BT)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, **inputs[index].layer)
            yield hidden
        yield self.norm(hidden)


def _noting(found: dict[str, Any]):
    def note(_, args, kwargs):
        found.update({name: value for name, value in kwargs.items() if name != "hidden_states"})

    return note


class _Recorder(nn.Module):
    """In place of a mixer: notes what it is given, and adds nothing."""

    def __init__(self, found: dict[str, Any], pair: bool):
        super().__init__()
        self.found, self.pair = found, pair

    def forward(self, hidden_states, **kwargs):
        """A scalar zero."""
        self.found.update(kwargs)
        zero = hidden_states.new_zeros(())
        return (zero, None) if self.pair else zero


def meta_twin(model: PreTrainedModel) -> Any:
    """A model of the same class and configuration, without memory for weights."""
    with torch.device("meta"), no_init_weights():
        twin = type(model)(model.config)
    twin.tie_weights()
    return twin


def parent_type(config: PreTrainedConfig) -> str:
    """The family's name by which transformers knows a parent, or the parent of a child."""
    return config.parent_type if isinstance(config, PuzzleConfig) else config.model_type  # type: ignore[return-value]


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Relative, of what a family computes against what its adapter says; otherwise that of bfloat16."""


@torch.no_grad()
def check_adapter(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """See that embeddings, sub-blocks one after another, and the head compute what the family's own code does.

    Raises:
        CheckpointError: an adapter that misses something.
    """
    parts = Anatomy(model)
    for what, found, expected in _comparisons(parts, layers):
        error = ((found - expected).float().norm() / expected.float().norm().clamp_min(1e-6)).item()
        if not error <= TOLERANCE.get(model.dtype, 3e-2):
            raise CheckpointError(
                f"{what} of this {parts.family.model_type} parent computes something that its adapter does not know "
                f"(relative difference {error:.2g}); it cannot be used."
            )


def _comparisons(parts: Anatomy, layers: Iterable[int]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What is looked at, as the adapter has it, and as the family's own code has it."""
    tokens = torch.arange(8, device=parts.model.device)[None]
    first, logits = _without_layers(parts, tokens)
    yield "The embedding", parts.embed(tokens), first
    yield "The head", parts.head.shaped_(parts.head.matrix(parts.norm(first)).float()), logits
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(first.shape, generator=generator).to(first)
    inputs = parts.inputs(len(tokens[0]))
    for index in layers:
        found = x
        for subblock in parts.subblocks(index).values():
            found = found + subblock.added(found, inputs[index])
        yield f"Layer {index}", found - x, parts.layers[index](x, **inputs[index].layer) - x


def _without_layers(parts: Anatomy, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the family's own forward pass gives to the first layer, [B, T, D], and the logits made of it, [B, T, V]."""
    noted = _Passed()
    present = parts.body.layers
    try:
        parts.body.layers = nn.ModuleList([noted])
        logits = parts.model(tokens_BT, use_cache=False).logits
    finally:
        parts.body.layers = present
    return noted.received[0], logits


class _Passed(nn.Module):
    """In place of a layer: notes the residual stream, and hands it on."""

    def __init__(self):
        super().__init__()
        self.received: list[torch.Tensor] = []

    def forward(self, hidden_states, **_):
        """As it came."""
        self.received.append(hidden_states)
        return hidden_states

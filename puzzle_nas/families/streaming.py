"""A parent whose layers stay on disk: one is read from its safetensors when asked for, and then dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights
from transformers.quantizers import AutoHfQuantizer

from puzzle_nas.artifacts import read_json
from puzzle_nas.errors import CheckpointError
from puzzle_nas.parents.quantisation import Quantisation

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Source:
    """A stored tensor that a weight is made of."""

    name: str
    pattern: str | None
    """What it is to the converter."""
    converter: WeightConverter | None
    """How transformers makes a weight of several, such as experts stored one by one; None where it is the weight."""


class WeightFiles:
    """Where each weight of a checkpoint lies, and how transformers makes it of what is stored.

    Args:
        quantisation: which transformers undoes; None for plain weights.

    Raises:
        CheckpointError: the checkpoint is not in safetensors.
    """

    def __init__(
        self, checkpoint: Path, device: torch.device, dtype: torch.dtype, quantisation: Quantisation | None = None
    ):
        self.checkpoint, self.device, self.dtype, self.quantisation = checkpoint, device, dtype, quantisation
        self._model: Any = None
        self.sources: dict[str, list[Source]] = {}
        if (checkpoint / INDEX).is_file():
            self.places: Mapping[str, str] = read_json(checkpoint / INDEX)["weight_map"]
        elif (checkpoint / SINGLE).is_file():
            with safe_open(checkpoint / SINGLE, "pt") as file:
                self.places = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(
                f"Single layers are read from safetensors; {checkpoint} has none. Save it as such or use memory: all."
            )

    def match(self, model: PreTrainedModel) -> None:
        """Find out what each weight of a model, which may be on the meta device, is made of."""
        quantizer = None
        if self.quantisation is not None:
            quantizer = AutoHfQuantizer.from_config(self.quantisation.argument, pre_quantized=True)
            quantizer.validate_environment(dtype=self.dtype, device_map=None)
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        # Its list of layers will be another.
        self._model = copy.deepcopy(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted = model.state_dict()
        for name in sorted(self.places, key=dot_natural_key):
            made, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
            if made in wanted:
                converter = None if pattern is None else by_pattern[pattern]
                self.sources.setdefault(made, []).append(Source(name, pattern, converter))

    def _read(self, made: str, sources: Sequence[Source]) -> dict[str, torch.Tensor]:
        tensors = {}
        for source in sources:
            with safe_open(self.checkpoint / self.places[source.name], "pt") as file:
                # A copy: what the file maps is let go with it.
                tensors[source] = file.get_tensor(source.name).to(self.device, copy=True)
        if sources[0].converter is None:
            return {made: tensors[sources[0]].to(self.dtype)}
        converter = copy.deepcopy(sources[0].converter)
        for source, tensor in tensors.items():
            converter.add_tensor(made, source.name, source.pattern, tensor)
        results = converter.convert(made, model=self._model, config=self._model.config)
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Read a module's weights, in place of those on the meta device.

        Raises:
            CheckpointError: a weight is missing or of another shape.
        """
        wanted = {name: prefix + name for name in module.state_dict()}
        here = {made: sources for made, sources in self.sources.items() if made.startswith(prefix)}
        read = {name: tensor for made, sources in here.items() for name, tensor in self._read(made, sources).items()}
        lacking = [name for name in wanted.values() if name not in read]
        if lacking:
            raise CheckpointError(
                f"The checkpoint {self.checkpoint} lacks {len(lacking)} weights, {lacking[0]} among them."
            )
        weights = {name: read[full_name] for name, full_name in wanted.items()}
        try:
            module.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"The checkpoint {self.checkpoint} does not fit its configuration: {reason}"
            ) from error
        module.eval().requires_grad_(False)


class StreamedLayers(nn.Module):
    """Stands in for a model's list of layers; holds the one last asked for.

    Args:
        model: with its layers on the meta device, which become empty shells here.
    """

    def __init__(self, model: PreTrainedModel, files: WeightFiles):
        super().__init__()
        self._shells, self._files = tuple(model.base_model.layers), files
        self._prefix = f"{model.base_model_prefix}.layers."
        self._shared = {id(model.config): model.config}
        self._present: tuple[int, nn.Module] | None = None

    def shell(self, index: int) -> nn.Module:
        """A layer without weights."""
        return self._shells[index]

    def __len__(self) -> int:
        return len(self._shells)

    def __getitem__(self, index: int | slice) -> Any:
        """A layer, read when it is asked for; of a slice, one after another."""
        if isinstance(index, slice):
            return (self[place] for place in range(*index.indices(len(self))))
        if self._present is None or self._present[0] != index:
            self._present = None
            # Whoever asks may be in inference mode, and somebody else train through the layer afterwards.
            with torch.inference_mode(False):
                layer = copy.deepcopy(self._shells[index], dict(self._shared))
                self._files.fill(layer, f"{self._prefix}{index}.")
            self._present = index, layer
        return self._present[1]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def streamed(config: PreTrainedConfig, files: WeightFiles) -> PreTrainedModel:
    """A parent with embeddings, final norm and LM head in memory, and its layers on disk.

    Raises:
        CheckpointError: see `WeightFiles`.
    """
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=files.dtype)
    files.match(model)
    compute_buffers(model, files.device)
    body, head = model.base_model, model.get_output_embeddings()
    body.layers = StreamedLayers(model, files)
    for name, module in model.named_modules():
        is_tied = config.tie_word_embeddings and module is head
        if list(module.parameters(recurse=False)) and not is_tied:
            files.fill(module, f"{name}.")
    if config.tie_word_embeddings:
        head.weight = body.get_input_embeddings().weight
    return model.eval().requires_grad_(False)


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what is not stored in checkpoints, such as rotary frequencies, of a model on the meta device."""
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            model._init_weights(module)

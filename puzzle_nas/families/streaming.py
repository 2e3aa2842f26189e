"""A parent whose layers stay on disk: one is read from its safetensors when asked for, and dropped unless kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from puzzle_nas.artifacts import read_json
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families.base import Family
from puzzle_nas.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightFiles:
    """Where each weight of a checkpoint lies, by its name in a `PuzzleForCausalLM`.

    Raises:
        CheckpointError: the checkpoint is not in safetensors.
    """

    def __init__(self, checkpoint: Path, family: Family, device: torch.device, dtype: torch.dtype):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        if (checkpoint / INDEX).is_file():
            files: Mapping[str, str] = read_json(checkpoint / INDEX)["weight_map"]
        elif (checkpoint / SINGLE).is_file():
            with safe_open(checkpoint / SINGLE, "pt") as file:
                files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(
                f"Single layers are read from safetensors; {checkpoint} has none. Save it as such or use memory: all."
            )
        self.places = {family.rename(name): (file, name) for name, file in files.items()}

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Read a module's weights, in place of those on the meta device.

        Raises:
            CheckpointError: a weight is missing or of another shape.
        """
        wanted = {name: prefix + name for name in module.state_dict()}
        lacking = [name for name in wanted.values() if name not in self.places]
        if lacking:
            raise CheckpointError(
                f"The checkpoint {self.checkpoint} lacks {len(lacking)} weights, {lacking[0]} among them."
            )
        weights = {}
        for name, full_name in wanted.items():
            path, stored_name = self.places[full_name]
            with safe_open(self.checkpoint / path, "pt") as file:
                # A copy: what the file maps is let go with it.
                weights[name] = file.get_tensor(stored_name).to(self.device, self.dtype, copy=True)
        try:
            module.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"The checkpoint {self.checkpoint} does not fit its configuration: {reason}"
            ) from error
        module.eval().requires_grad_(False)


class StreamedLayers(nn.Module):
    """Stands in for a model's list of layers; holds the one last asked for, and those to keep."""

    def __init__(self, config: PuzzleConfig, files: WeightFiles):
        super().__init__()
        self.config, self.files = config, files
        self._present: tuple[int, PuzzleDecoderLayer] | None = None
        self._kept: dict[int, PuzzleDecoderLayer] = {}

    def keep(self, layers: Iterable[int]) -> None:
        """Read some layers and hold them from now on."""
        self._kept = {index: self[index] for index in layers}

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def __getitem__(self, index: int) -> PuzzleDecoderLayer:
        if index in self._kept:
            return self._kept[index]
        if self._present is None or self._present[0] != index:
            self._present = None
            assert self.config.layer_types is not None
            layer_config, layer_type = self.config.per_layer_config[index], self.config.layer_types[index]
            # Whoever asks may be in inference mode, and somebody else train through the layer afterwards.
            with torch.inference_mode(False):
                with torch.device("meta"):
                    layer = PuzzleDecoderLayer(self.config, layer_config, layer_type, index)
                self.files.fill(layer, f"model.layers.{index}.")
            self._present = index, layer
        return self._present[1]

    def __iter__(self) -> Iterator[PuzzleDecoderLayer]:
        return (self[index] for index in range(len(self)))


def streamed(config: PuzzleConfig, files: WeightFiles) -> PuzzleForCausalLM:
    """A parent with embeddings, final norm and LM head in memory, and its layers on disk.

    Raises:
        CheckpointError: see `WeightFiles`.
    """
    with torch.device("meta"):
        model = PuzzleForCausalLM(config)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=config).to(files.device)
    model.model.layers = StreamedLayers(config, files)
    files.fill(model.model.embed_tokens, "model.embed_tokens.")
    files.fill(model.model.norm, "model.norm.")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        files.fill(model.lm_head, "lm_head.")
    return model.eval().requires_grad_(False)

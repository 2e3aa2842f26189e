"""The block library on disk: one safetensors file and one JSON of facts for each variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from puzzle_nas.architecture import Architecture, Spec
from puzzle_nas.artifacts import RunFolder, file_checksum, read_json, write_bytes, write_json
from puzzle_nas.errors import ArtifactError
from puzzle_nas.families import child_config
from puzzle_nas.families.loading import build, shape_of
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle_nas.subblocks import Weights, subblock_layer, subblock_weights


def facts_path(path: Path) -> Path:
    """Where the facts of a variant lie."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".json")


def variant_is_stored(path: Path) -> bool:
    """Whether a variant is complete (its facts are written last)."""
    return facts_path(path).exists()


def write_variant(path: Path, spec: Spec, weights: Weights, facts: dict[str, Any]) -> None:
    """Write weights, then facts: `spec`, `parameters`, checksum, and whatever the maker adds."""
    tensors = {name: w.detach().cpu().contiguous().clone() for name, w in weights.items()}
    write_bytes(path, safetensors.torch.save(tensors))
    parameters = sum(w.numel() for w in tensors.values())
    facts = {"spec": spec.to_dict(), "parameters": parameters, "checksum": file_checksum(path), **facts}
    write_json(facts_path(path), facts)


def read_variant(path: Path, made_by: str) -> Weights:
    """Weights of a variant.

    Raises:
        ArtifactError: missing or corrupted.
    """
    facts = read_json(facts_path(path), None)
    if not path.exists() or file_checksum(path) != facts["checksum"]:
        raise ArtifactError(f"{path} is missing or corrupted. Make it anew with: puzzle {made_by} RUN --again")
    try:
        return safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise ArtifactError(f"{path} is corrupted ({error}).") from None


def variant_weights(
    run: RunFolder, parent: PuzzleForCausalLM, layer: int, spec: Spec, library: str = "main"
) -> Weights:
    """Weights of a variant on the parent's device; the parent's own sub-block comes from the parent itself."""
    if spec == shape_of(parent.config).parent_spec(spec.slot):
        return subblock_weights(parent.model.layers[layer], spec.slot)
    made_by = "build-library" if library == "initial" else "distill-blocks"
    weights = read_variant(run.variant(layer, spec.id, library), made_by)
    return {name: w.to(device=parent.device, dtype=parent.dtype) for name, w in weights.items()}


def variant_layer(
    run: RunFolder, parent: PuzzleForCausalLM, layer: int, spec: Spec, library: str = "main"
) -> PuzzleDecoderLayer:
    """A variant as a runnable sub-block."""
    weights = variant_weights(run, parent, layer, spec, library)
    return subblock_layer(parent.config, parent.model.layers[layer].layer_type, spec, weights)


def assemble(run: RunFolder, parent: PuzzleForCausalLM, architecture: Architecture) -> PuzzleForCausalLM:
    """The child in memory. It shares what it has in common with the parent."""
    weights = {n: w for n, w in parent.state_dict().items() if not n.startswith("model.layers.")}
    for layer, _, spec in architecture:
        for name, weight in variant_weights(run, parent, layer, spec).items():
            weights[f"model.layers.{layer}.{name}"] = weight
    child = build(child_config(parent.config, architecture), weights)
    child.generation_config = parent.generation_config
    return child

"""The block library on disk: one safetensors file and one JSON of facts for each variant or coupled pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from puzzle_nas.architecture import Architecture, choice_id
from puzzle_nas.artifacts import RunFolder, file_checksum, read_json, write_json, write_whole
from puzzle_nas.errors import ArtifactError
from puzzle_nas.families import Anatomy, SubBlock, architecture_of, build, child_config
from puzzle_nas.families.loading import aligned
from puzzle_nas.formats.stored import Matrices, read_matrices, write_matrices
from puzzle_nas.specs import Spec
from puzzle_nas.subblocks import Weights, made_subblock, subblock_weights, weights_of_slot

Place: TypeAlias = tuple[int, str]
"""A layer and a slot."""
MADE_BY = {"initial": "build-library", "main": "distill-blocks", "coupled": "couple-blocks"}


def facts_path(path: Path) -> Path:
    """Where the facts of a variant lie."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".json")


def variant_is_stored(path: Path) -> bool:
    """Whether a variant is complete (its facts are written last)."""
    return facts_path(path).exists()


def matrices_path(path: Path) -> Path:
    """Where the matrices of a variant in a format lie."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".formats.safetensors")


def write_variant(
    path: Path,
    specs: Sequence[Spec],
    weights: Weights,
    facts: Mapping[str, Any],
    matrices: Matrices | None = None,
) -> None:
    """Write weights, then facts: `spec` (of a pair `specs`), `parameters`, checksum, and whatever the maker adds.

    Args:
        matrices: what the variant stores in a format, by the names of `weights`.
    """
    tensors = {name: w.detach().cpu().contiguous().clone() for name, w in weights.items()}
    write_whole(path, partial(save_file, tensors))
    parameters = sum(w.numel() for w in tensors.values())
    what = {"spec": specs[0].to_dict()} if len(specs) == 1 else {"specs": [spec.to_dict() for spec in specs]}
    made = {"parameters": parameters, "checksum": file_checksum(path)}
    if matrices:
        write_whole(matrices_path(path), partial(write_matrices, matrices))
        made["matrices_checksum"] = file_checksum(matrices_path(path))
    write_json(facts_path(path), {**what, **made, **facts})


def read_variant(path: Path, made_by: str) -> Weights:
    """Weights of a variant.

    Raises:
        ArtifactError: missing or corrupted.
    """
    facts = read_json(facts_path(path), None)
    if not path.exists() or file_checksum(path) != facts["checksum"]:
        raise ArtifactError(f"{path} is missing or corrupted. Make it again with: puzzle {made_by} RUN --again")
    try:
        return {name: aligned(w) for name, w in safetensors.torch.load(path.read_bytes()).items()}
    except SafetensorError as error:
        raise ArtifactError(f"{path} is corrupted ({error}).") from None


def _read_matrices(path: Path) -> Matrices:
    """What an initial variant stores in a format; nothing of one that an earlier version made.

    Raises:
        ArtifactError: missing or corrupted.
    """
    made_by = MADE_BY["initial"]
    matrices, facts = matrices_path(path), read_json(facts_path(path), made_by)
    if "matrices_checksum" not in facts:
        return {}
    if not matrices.exists() or file_checksum(matrices) != facts["matrices_checksum"]:
        raise ArtifactError(f"{matrices} is missing or corrupted. Make it again with: puzzle {made_by} RUN --again")
    return read_matrices(matrices)


def variant_weights(run: RunFolder, parent: PreTrainedModel, layer: int, spec: Spec, library: str = "main") -> Weights:
    """Weights of a variant on the parent's device; the parent's own sub-block comes from the parent itself.

    What has none need not be in the library.
    """
    if spec.empty:
        return {}
    if spec == architecture_of(parent.config).layers[layer][spec.slot]:
        return subblock_weights(Anatomy(parent).subblocks(layer)[spec.slot])
    return _like_parent(parent, read_variant(run.variant(layer, spec.id, library), MADE_BY[library]))


def _like_parent(parent: PreTrainedModel, weights: Weights) -> Weights:
    return {name: w.to(device=parent.device, dtype=parent.dtype) for name, w in weights.items()}


def variant_subblock(
    run: RunFolder, parent: PreTrainedModel, layer: int, spec: Spec, library: str = "main"
) -> SubBlock:
    """A variant as a runnable sub-block."""
    return made_subblock(parent, layer, spec, variant_weights(run, parent, layer, spec, library))


def block_weights(
    run: RunFolder, parent: PreTrainedModel, layer: int, specs: Sequence[Spec], library: str = "main"
) -> Weights:
    """Weights of one or both sub-blocks of a layer: the coupled pair's if `library` has it, else each variant's own."""
    if library == "coupled":
        if variant_is_stored(pair := run.variant(layer, choice_id(specs), library)):
            return _like_parent(parent, read_variant(pair, MADE_BY[library]))
        library = "main"
    parts = [variant_weights(run, parent, layer, spec, library) for spec in specs]
    return {name: weight for part in parts for name, weight in part.items()}


def block_subblocks(
    run: RunFolder, parent: PreTrainedModel, layer: int, choices: Sequence[Sequence[Spec]], library: str = "main"
) -> list[dict[str, SubBlock]]:
    """For each choice its runnable sub-blocks by slot. What several choices share is read once."""
    alone: dict[Spec, SubBlock] = {}
    uncoupled = "main" if library == "coupled" else library
    own = Anatomy(parent).subblocks(layer)
    result = []
    for specs in choices:
        if library == "coupled" and variant_is_stored(run.variant(layer, choice_id(specs), library)):
            weights = block_weights(run, parent, layer, specs, library)
            parts = {s.slot: made_subblock(parent, layer, s, weights_of_slot(weights, own[s.slot])) for s in specs}
        else:
            for spec in specs:
                if spec not in alone:
                    alone[spec] = variant_subblock(run, parent, layer, spec, uncoupled)
            parts = {spec.slot: alone[spec] for spec in specs}
        result.append(parts)
    return result


def rounded_already(run: RunFolder, parent: PreTrainedModel, architecture: Architecture) -> dict[Place, Matrices]:
    """What the library has rounded of a child: the parent's own sub-blocks, and behind the last layer its ends.

    Returns:
        By layer and slot; matrices by the names of the model's weights.

    Raises:
        ArtifactError: a file of the library is missing or corrupted.
    """
    prefix, own = Anatomy(parent).layer_prefix, architecture_of(parent.config)
    found: dict[Place, Matrices] = {}
    for layer, slot, spec in architecture:
        if spec.format and spec.plain == own.layers[layer][slot]:
            matrices = _read_matrices(run.initial_variant(layer, spec.id))
            found[layer, slot] = {f"{prefix}{layer}.{name}": matrix for name, matrix in matrices.items()}
    return _there(found, parent) | rounded_ends_of(run, parent, architecture)


def rounded_ends_of(run: RunFolder, parent: PreTrainedModel, architecture: Architecture) -> dict[Place, Matrices]:
    """Of `rounded_already` the embeddings and the LM head, which no refitting changes.

    Raises:
        ArtifactError: a file of the library is missing or corrupted.
    """
    head, behind = architecture.head, len(architecture.layers)
    if not head.format:
        return {}
    return _there({(behind, head.slot): _read_matrices(run.initial_variant(behind, head.id))}, parent)


def _there(found: Mapping[Place, Matrices], parent: PreTrainedModel) -> dict[Place, Matrices]:
    """On the parent's device, without what is empty."""
    return {
        place: {n: m.to(parent.device) for n, m in matrices.items()} for place, matrices in found.items() if matrices
    }


def with_ends(parent: PreTrainedModel, ends: Weights) -> PreTrainedModel:
    """The parent with other embeddings or LM head, by the names of their weights; it shares all others."""
    return build(parent.config, {**parent.state_dict(), **_like_parent(parent, ends)})


def assemble(
    run: RunFolder, parent: PreTrainedModel, architecture: Architecture, library: str = "main"
) -> PreTrainedModel:
    """The child in memory, not rounded yet where it has formats. It shares what it has in common with the parent."""
    prefix = Anatomy(parent).layer_prefix
    weights = {n: w for n, w in parent.state_dict().items() if not n.startswith(prefix)}
    for layer, block in enumerate(architecture.layers):
        specs = [spec.plain for spec in block.values()]
        for name, weight in block_weights(run, parent, layer, specs, library).items():
            weights[f"{prefix}{layer}.{name}"] = weight
    child = build(child_config(parent.config, architecture), weights)
    child.generation_config = parent.generation_config
    return child

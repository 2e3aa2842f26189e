"""Every stored tensor against transformers' own class, built and filled on the meta device: no weight is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from puzzle_nas.parents.problems import LIBRARY_ERRORS, counted, first_line, problem, some_names
from puzzle_nas.parents.quantisation import Quantisation
from puzzle_nas.parents.weights import HARMLESS, StoredWeights

META = torch.device("meta")
ROWS_COMPARED = 4096
"""Rows of a tied head that are compared with the embeddings at once."""


@dataclass(frozen=True)
class Fit:
    """How a checkpoint's tensors fit its class."""

    model: PreTrainedModel
    """On the meta device: names, shapes and types without memory."""
    ignored: tuple[str, ...]
    """Stored tensors that are known to be harmless and that the model does not use."""


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says what it finds in many lines; ours are the sentences of `problems`."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def check_fit(
    where: Path, config: PreTrainedConfig, stored: StoredWeights, quantisation: Quantisation | None = None
) -> Fit:
    """Load the checkpoint as transformers does, but with tensors that have no values.

    Raises:
        CheckpointError: a tensor is missing, unused, stored twice or of another shape; or the model cannot compute.
    """
    check_types(where, stored, quantisation)
    check_layers(where, config, stored)
    try:
        with quiet(), META:
            model, found = _loaded(config, stored, quantisation)
    except LIBRARY_ERRORS as error:
        _explain_by_names(where, config, stored)
        raise problem("no class", where=where, reason=first_line(error)) from error
    unused = sorted(name for name in found["unexpected_keys"] if not name.endswith(HARMLESS))
    missing = sorted(found["missing_keys"])
    if any(name not in stored.tensors for name, _, _ in found["mismatched_keys"]):
        _explain_by_names(where, config, stored)
    for name, stored_shape, expected in sorted(found["mismatched_keys"]):
        _refuse_shape(where, config, name, stored_shape, expected)
    _refuse_names(where, config, stored.tensors, missing, unused)
    if quantisation is None:
        _check_used_once(where, model, stored, found["unexpected_keys"])
        _check_tied(where, model, stored)
    check_computes(where, model)
    return Fit(model, tuple(sorted(found["unexpected_keys"])))


def _loaded(config: PreTrainedConfig, stored: StoredWeights, quantisation: Quantisation | None) -> tuple[Any, dict]:
    """A model on the meta device and transformers' own report on its loading."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype if isinstance(tensor.dtype, torch.dtype) else torch.uint8)
        for name, tensor in stored.tensors.items()
    }
    extra = {} if quantisation is None else {"quantization_config": quantisation.argument}
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        device_map={"": "meta"},
        dtype=_dtype(config, stored),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        # Fused kernels do not look at shapes where there are no values.
        attn_implementation="eager",
        experts_implementation="eager",
        **extra,
    )


def _dtype(config: PreTrainedConfig, stored: StoredWeights) -> torch.dtype:
    """The precision of the model: what config.json says, else that of the first plain weight."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    plain = (t.dtype for t in stored.tensors.values() if isinstance(t.dtype, torch.dtype))
    return next((d for d in plain if d.is_floating_point and d.itemsize >= 2), torch.float32)


def check_types(where: Path, stored: StoredWeights, quantisation: Quantisation | None) -> None:
    """Raises: CheckpointError: weights are whole numbers or of 8 bits and less without a quantisation or a scale."""
    for name, tensor in stored.tensors.items():
        plain = isinstance(tensor.dtype, torch.dtype) and tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2
        if quantisation is not None and not plain:
            check_scale(where, name, stored, quantisation)
        elif not plain and not name.endswith(HARMLESS):
            raise problem("integers", where=where, name=name, dtype=str(tensor.dtype).removeprefix("torch."))


def check_layers(where: Path, config: PreTrainedConfig, stored: StoredWeights) -> None:
    """Raises: CheckpointError: the configuration has more layers than are stored: too many even to build them."""
    layers, there = getattr(config, "num_hidden_layers", None), _stored_layers(stored.tensors)
    if isinstance(layers, int) and there and layers > max(there) + 1:
        expected = f"layers 0 to {max(there)} are stored"
        raise problem("field", file=where / "config.json", field="num_hidden_layers", value=layers, expected=expected)


def _stored_layers(stored: Collection[str]) -> set[int]:
    """The numbers of the layers that are stored."""
    return {int(match[1]) for name in stored if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))}


def check_scale(where: Path, name: str, stored: StoredWeights, quantisation: Quantisation) -> None:
    """Raises: CheckpointError: a quantised weight is stored without its scale, for which transformers takes 1."""
    stem = name.rsplit(".", 1)[0] if name.endswith("weight") else name.removesuffix("_blocks").removesuffix("_packed")
    needs = name.endswith(("weight", "_blocks", "_packed"))
    if needs and not any(other.startswith(stem) and "scale" in other for other in stored.tensors if other != name):
        raise problem("no scale", where=where, name=name, method=quantisation.method)


def expected_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers would store for a configuration; tied weights once."""
    with quiet(), META:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        tied = set(model.all_tied_weights_keys)
        weights = {name: w for name, w in model.state_dict().items() if name not in tied}
        return {name: tuple(w.shape) for name, w in revert_weight_conversion(model, weights).items()}


def _explain_by_names(where: Path, config: PreTrainedConfig, stored: StoredWeights) -> None:
    """Raises: CheckpointError: names or shapes say why transformers could not put the weights together."""
    try:
        expected = expected_tensors(config)
    except LIBRARY_ERRORS:
        return
    missing = sorted(expected.keys() - stored.tensors.keys())
    unused = sorted(n for n in stored.tensors.keys() - expected.keys() if not n.endswith(HARMLESS))
    for name in sorted(expected.keys() & stored.tensors.keys()):
        if stored.tensors[name].shape != expected[name]:
            _refuse_shape(where, config, name, stored.tensors[name].shape, expected[name])
    _refuse_names(where, config, stored.tensors, missing, unused)


def _refuse_shape(where: Path, config: PreTrainedConfig, name: str, stored: Any, expected: Any) -> None:
    fields = next((fields for end, fields in SHAPE_FIELDS.items() if end in name), ("hidden_size",))
    said = ", ".join(f"{field}: {getattr(config, field)}" for field in fields if hasattr(config, field))
    because = f" ({said})" if said else ""
    raise problem(
        "shapes", where=where, name=name, stored=list(stored), expected=list(expected), because=because
    ) from None


SHAPE_FIELDS = {
    "embed_tokens": ("vocab_size", "hidden_size"),
    "lm_head": ("vocab_size", "hidden_size"),
    "k_proj": ("num_key_value_heads", "head_dim"),
    "v_proj": ("num_key_value_heads", "head_dim"),
    "q_proj": ("num_attention_heads", "head_dim"),
    "o_proj": ("num_attention_heads", "head_dim"),
    "experts": ("num_local_experts", "moe_intermediate_size", "intermediate_size"),
    "mlp.": ("intermediate_size", "hidden_size"),
}
"""Fields that decide a weight's shape, by a part of its name."""


def _refuse_names(
    where: Path, config: PreTrainedConfig, stored: Collection[str], missing: list[str], unused: list[str]
) -> None:
    """Raises: CheckpointError: names are missing or unused, with the field that explains them."""
    for kind, names in (("unused tensors", unused), ("missing tensors", missing)):
        if names:
            because = _because(config, stored, names, kind == "unused tensors")
            raise problem(kind, where=where, count=counted(names), names=some_names(names), because=because) from None


def _because(config: PreTrainedConfig, stored: Collection[str], names: list[str], unused: bool) -> str:
    """The field of config.json that explains missing or unused names, in brackets."""
    layers = getattr(config, "num_hidden_layers", 0)
    there = _stored_layers(stored)
    if unused and there and max(there) + 1 > layers:
        return f" (num_hidden_layers: {layers}, but layers 0 to {max(there)} are stored)"
    rules = {
        r"(q|k|v|o|c|qkv|query_key_value)_?(proj|attn)?\.bias$": "attention_bias",
        r"mlp\..*\.bias$": "mlp_bias",
        r"lm_head": "tie_word_embeddings",
        r"experts": "num_local_experts",
        r"^(score|classifier|v_head|value_head)\.": "architectures",
        r"(q|k)_norm": "model_type",
    }
    for pattern, field in rules.items():
        if any(re.search(pattern, name) for name in names) and hasattr(config, field):
            return f" ({field}: {getattr(config, field)})"
    return ""


def _check_used_once(where: Path, model: PreTrainedModel, stored: StoredWeights, ignored: Collection[str]) -> None:
    """Raises: CheckpointError: more numbers are stored than the model holds, so two tensors go to one place."""
    held = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in _persistent_buffers(model).values())
    given = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith(HARMLESS)}
    if sum(_numel(tensor.shape) for name, tensor in given.items() if name not in ignored) <= held:
        return
    prefix = f"{model.base_model_prefix}."
    twice = sorted(name for name in given if prefix + name in given)
    raise problem("same place", where=where, names=some_names(twice or sorted(given)))


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _check_tied(where: Path, model: PreTrainedModel, stored: StoredWeights) -> None:
    """Raises: CheckpointError: weights that the configuration ties are both stored, and differ."""
    for target, source in model.all_tied_weights_keys.items():
        first, second = (_stored_name(model, name, stored.tensors) for name in (target, source))
        if first and second and first != second and not _equal(stored, first, second):
            raise problem("tied and stored", where=where, name=first)


def _stored_name(model: PreTrainedModel, name: str, stored: Mapping[str, Any]) -> str | None:
    """A parameter's name in the file: with the prefix of the base model or without."""
    return next((n for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in stored), None)


def _equal(stored: StoredWeights, one: str, other: str) -> bool:
    """Whether two stored tensors hold the same values; stops at the first rows that differ."""
    first, second = stored.tensors[one], stored.tensors[other]
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if stored.format == "pytorch":
        held = {tensor.file: torch.load(tensor.file, weights_only=True) for tensor in (first, second)}
        return torch.equal(held[first.file][one], held[second.file][other])
    with safe_open(first.file, "pt") as a, safe_open(second.file, "pt") as b:
        a_rows, b_rows = a.get_slice(one), b.get_slice(other)
        starts = range(0, first.shape[0], ROWS_COMPARED)
        return all(torch.equal(a_rows[i : i + ROWS_COMPARED], b_rows[i : i + ROWS_COMPARED]) for i in starts)


def check_computes(where: Path, model: PreTrainedModel) -> None:
    """Push two tokens without values through the model: shapes that do not go together show here.

    Raises:
        CheckpointError: they do not.
    """
    try:
        with quiet(), torch.no_grad(), META:
            ids = torch.zeros(1, 2, dtype=torch.long)
            # With a mask of its own, as the model would look at values to make one.
            model(input_ids=ids, attention_mask=torch.zeros(1, 1, 2, 2, dtype=model.dtype), use_cache=False)
    except LIBRARY_ERRORS as error:
        # Which expert gets which token depends on values.
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return
        raise problem("not computed", where=where, reason=first_line(error)) from error

"""What a folder's files say twice in two ways, or in words that transformers does not read: each gets a line."""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from puzzle_nas.parents.problems import problem
from puzzle_nas.parents.weights import StoredWeights, read_object

ROPE_FIELDS = {
    "*": {"rope_type", "type", "rope_theta", "partial_rotary_factor"},
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
"""What each way of stretching rotary positions reads."""


def unusual_fields(folder: Path, config: PreTrainedConfig, stored: StoredWeights) -> list[str]:
    """Lines on config.json.

    Raises:
        CheckpointError: it gives the base of the rotary positions twice, with two values.
    """
    fields = read_object(folder / "config.json")
    lines = [*_misspelt(fields, config), *_rope(folder, fields, config), *_precision(config, stored)]
    return lines + _own_code(folder, fields, config)


def _misspelt(fields: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Fields that the class does not have, almost spelt like one that is not given."""
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    lines = []
    for name in sorted(fields.keys() - known):
        near = difflib.get_close_matches(name, known - fields.keys(), n=1, cutoff=0.85)
        if near:
            used = getattr(config, near[0], None)
            lines.append(f"config.json says {name}, which is not read; {near[0]} is taken to be {used}.")
    return lines


def _rope(folder: Path, fields: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Two bases, or parameters that the way of stretching does not read."""
    rope = getattr(config, "rope_parameters", None) or {}
    used, said = rope.get("rope_theta"), fields.get("rope_theta")
    if isinstance(used, (int, float)) and isinstance(said, (int, float)) and used != said:
        expected = f"rope_parameters says {used}"
        raise problem("field", file=folder / "config.json", field="rope_theta", value=said, expected=expected)
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_INIT_FUNCTIONS and kind != "default":
        return []
    unread = sorted(name for name in rope if name not in ROPE_FIELDS["*"] | ROPE_FIELDS.get(kind, set()))
    return [f"config.json gives rope_parameters of type {kind} a {name}, which is not read." for name in unread]


def _precision(config: PreTrainedConfig, stored: StoredWeights) -> list[str]:
    """Weights that are stored in another precision than config.json says."""
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values())
    (common, count), said = types.most_common(1)[0], str(config.dtype).removeprefix("torch.")
    if said == common or said not in ("float32", "float16", "bfloat16") or not common.startswith(("float", "bfloat")):
        return []
    return [f"config.json says dtype {said}, but {count} of {sum(types.values())} tensors are stored as {common}."]


def _own_code(folder: Path, fields: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Code in the folder that may compute something other than transformers' class of the same name does."""
    files = sorted(path.name for path in folder.glob("modeling_*.py"))
    if "auto_map" not in fields or not files:
        return []
    used = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return [f"It brings code of its own ({files[0]}), which is not run: transformers' {used} is used in its place."]


def unusual_tokenizer(folder: Path, tokenizer: Any) -> list[str]:
    """Lines on tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    fields = read_object(file) if file.is_file() else {}
    lines = []
    said, adds = fields.get("add_bos_token"), _starts_with_bos(tokenizer)
    if isinstance(said, bool) and said != adds and tokenizer.bos_token_id is not None:
        puts = "puts one" if adds else "puts none"
        lines.append(
            f"tokenizer_config.json says add_bos_token: {str(said).lower()}, but tokenizer.json {puts}; so do we."
        )
    if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        lines.append(f"The tokenizer ends every text with {tokenizer.eos_token}; prompts are given without it.")
    own = folder / "chat_template.jinja"
    other = fields.get("chat_template")
    if own.is_file() and isinstance(other, str) and own.read_text(encoding="utf-8-sig").strip() != other.strip():
        lines.append("tokenizer_config.json has another chat_template than chat_template.jinja; the latter is used.")
    return lines


def _starts_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id

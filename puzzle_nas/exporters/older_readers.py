"""What transformers 5 spells in a new way, spelt in the old way too: for transformers 4, older vLLM and SGLang.

Reports: vllm 42624, sglang 14745, unsloth 8444.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def spell_for_older_readers(folder: Path) -> None:
    """Add the old spellings to a written checkpoint's config.json and tokenizer_config.json, where they exist."""
    for name, spell in {"config.json": old_config, "tokenizer_config.json": old_tokenizer_config}.items():
        file = folder / name
        if file.is_file():
            file.write_text(json.dumps(spell(json.loads(file.read_text())), indent=1, ensure_ascii=False) + "\n")


def old_config(fields: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` next to `rope_parameters`, `torch_dtype` next to `dtype`."""
    rope = fields.get("rope_parameters") or {}
    # Parameters by kind of layer have no old spelling.
    if "rope_theta" in rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        fields["rope_theta"] = rope["rope_theta"]
        fields["rope_scaling"] = scaling if rope.get("rope_type", "default") != "default" else None
    if "dtype" in fields:
        fields["torch_dtype"] = fields["dtype"]
    return fields


def old_tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The class and the list of more special tokens by the names that transformers 4 knows."""
    if fields.get("tokenizer_class") == NEW_CLASS:
        fields["tokenizer_class"] = OLD_CLASS
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields

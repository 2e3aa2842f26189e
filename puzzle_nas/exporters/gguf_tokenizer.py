"""A byte-level BPE tokenizer as GGUF fields."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from puzzle_nas.errors import ExportError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Vocabulary, merges, how text is split before merging, special tokens, chat template; for None that there is none.

    Raises:
        ExportError: the tokenizer is of a kind that we cannot write.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = data["model"], _pre_tokenizer_name(data)
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()}
    tokens, types = [], []
    for index in range(vocab_size):
        entry = added.get(index)
        if entry is not None:
            tokens.append(entry["content"])
            types.append(TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED)
        elif index in by_id:
            tokens.append(by_id[index])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(index)
    # What the tokenizer itself puts around text.
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer_name(data: dict) -> str:
    """llama.cpp's name of the way text is split.

    Raises:
        ExportError: it has none that we know.
    """
    if data["model"]["type"] != "BPE" or data["model"].get("byte_fallback"):
        raise ExportError("This child cannot be exported to gguf: its tokenizer is no byte-level BPE.")
    pre = data["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds[0] == "Split" else None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and pattern == _LLAMA3_SPLIT:
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and pattern == _QWEN2_SPLIT:
        return "qwen2"
    raise ExportError(
        "This child cannot be exported to gguf: its tokenizer splits text in a way that has no name there "
        f"({', '.join(map(str, kinds))})."
    )

"""A BPE tokenizer as GGUF fields: of bytes (GPT-2, Llama 3, Qwen), or as SentencePiece makes it (Llama 2, Mistral).

llama.cpp merges the latter's pieces by the score of the result, transformers by the rank of the pair. The score of a
token is therefore the rank of its first pair, negated; where that merges otherwise, verification finds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gguf import GGUFWriter, TokenType

from puzzle_nas.errors import ExportError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "▁"
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class _Unsayable(Exception):
    """What of a tokenizer GGUF cannot say, a clause."""


MORE_ENDS = 2
"""End tokens that GGUF can name besides the tokenizer's own: of a turn, and of a message."""


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int, end_tokens: Sequence[int] = ()) -> None:
    """Vocabulary, merges, how text is split before merging, special tokens, chat template; for None that there is none.

    Args:
        end_tokens: those at which answers end.

    Raises:
        ExportError: the tokenizer is of a kind that we cannot write.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    try:
        name, splitting, space_prefix = _kind(data)
    except _Unsayable as clause:
        raise ExportError(f"This child cannot be exported to gguf: {clause}.") from None
    writer.add_tokenizer_model(name)
    writer.add_tokenizer_pre(splitting)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, types = _vocabulary(data, vocab_size)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(index)
    more = (writer.add_eot_token_id, writer.add_eom_token_id)
    for index, add in zip(_more_ends(tokenizer, end_tokens), more, strict=False):
        add(index)
    # What the tokenizer itself puts around text.
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def tokenizer_problems(tokenizer: Any) -> list[str]:
    """Why GGUF cannot hold a tokenizer, a clause; nothing of None."""
    try:
        if tokenizer is not None:
            _kind(json.loads(tokenizer.backend_tokenizer.to_str()))
    except _Unsayable as clause:
        return [str(clause)]
    return []


def _kind(data: dict) -> tuple[str, str, bool | None]:
    """llama.cpp's names of the vocabulary and of the way text is split; whether a space comes first (SentencePiece).

    Raises:
        _Unsayable: it has none that we know.
    """
    model = data["model"]
    if model["type"] != "BPE":
        raise _Unsayable(f"its tokenizer is {model['type']}, not BPE")
    if model.get("byte_fallback"):
        return "llama", "default", _space_prefix(data)
    _normalisers(data)
    return "gpt2", _pre_tokenizer_name(data), None


def tokenizer_notes(tokenizer: Any, end_tokens: Sequence[int] = ()) -> list[str]:
    """What of a tokenizer that can be written GGUF does not say, in sentences."""
    if tokenizer is None:
        return []
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    notes = []
    if not data["model"].get("byte_fallback") and _normalisers(data):
        notes.append(
            "The child's tokenizer puts text into Unicode's composed form (NFC) and llama.cpp does not: text with "
            "combining accents is split otherwise there; send composed text."
        )
    if lost := _more_ends(tokenizer, end_tokens)[MORE_ENDS:]:
        names = ", ".join(tokenizer.convert_ids_to_tokens(lost))
        notes.append(f"GGUF names three end tokens at most: llama.cpp may not end answers at {names}.")
    return notes


def _more_ends(tokenizer: Any, end_tokens: Sequence[int]) -> list[int]:
    """End tokens besides the tokenizer's own."""
    return [index for index in dict.fromkeys(end_tokens) if index != tokenizer.eos_token_id]


def _normalisers(data: dict) -> list[str]:
    """What a tokenizer of bytes does to text before it splits it: nothing, or Unicode's composed form.

    Raises:
        _Unsayable: anything else.
    """
    kinds = [step["type"] for step in _steps(data["normalizer"], "normalizers")]
    if others := [kind for kind in kinds if kind != "NFC"]:
        raise _Unsayable(
            f"its tokenizer changes text before splitting it ({', '.join(others)}), which GGUF has no word for"
        )
    return kinds


def _vocabulary(data: dict, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """The tokens by id, unused ids filled up, and what each is."""
    model = data["model"]
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()}
    tokens, types = [], []
    for index in range(vocab_size):
        entry, token = added.get(index), by_id.get(index)
        if token is not None and model.get("byte_fallback") and token == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif entry is not None:
            token = entry["content"]
            kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        elif token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        else:
            kind = TokenType.BYTE if model.get("byte_fallback") and _BYTE.fullmatch(token) else TokenType.NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _space_prefix(data: dict) -> bool:
    """Whether a space is put before text, by a tokenizer that reads spaces as SentencePiece does.

    Raises:
        _Unsayable: it changes or splits text in another way.
    """
    normalisers, pre_tokenizers = (
        _steps(data["normalizer"], "normalizers"),
        _steps(data["pre_tokenizer"], "pretokenizers"),
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    metaspaces = [step for step in pre_tokenizers if step["type"] == "Metaspace" and step["replacement"] == _SPACE]
    as_normaliser = not pre_tokenizers and normalisers in ([replace], [prepend, replace])
    as_pre_tokenizer = not normalisers and len(metaspaces) == len(pre_tokenizers) == 1
    if not as_normaliser and not as_pre_tokenizer:
        kinds = ", ".join(step["type"] for step in normalisers + pre_tokenizers) or "none"
        raise _Unsayable(
            f"its tokenizer falls back to bytes, but does not read spaces as SentencePiece does (its steps: {kinds})"
        )
    return prepend in normalisers or any(step["prepend_scheme"] != "never" for step in metaspaces)


def _steps(step: dict | None, name: str) -> list[dict]:
    """A tokenizer's step as a list, a sequence being many."""
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]


def _pre_tokenizer_name(data: dict) -> str:
    """llama.cpp's name of the way text is split.

    Raises:
        _Unsayable: it has none that we know.
    """
    steps = _steps(data["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    pattern = steps[0]["pattern"].get("Regex") if kinds[:1] == ["Split"] else None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and pattern == _LLAMA3_SPLIT:
        # Both cut alike; the former takes a piece that is a token without merging.
        return "llama-bpe" if data["model"].get("ignore_merges") else "dbrx"
    if kinds == ["Split", "ByteLevel"] and pattern == _QWEN2_SPLIT:
        return "qwen2"
    raise _Unsayable(f"its tokenizer splits text in a way that has no name in GGUF ({', '.join(kinds) or 'none'})")

"""The tokenizer of a GGUF file: the same ids as llama.cpp's.

transformers builds the vocabulary and the merges, but splits text as GPT-2 does where it does not know
`tokenizer.ggml.pre`, never takes whole tokens before merging, and always puts a space before SentencePiece's text.

Source: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    _GPT4O_SPLIT,
    _LLAMA3_SPLIT,
    _QWEN2_SPLIT,
    _QWEN35_SPLIT,
    _TEKKEN_SPLIT,
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from puzzle_nas.parents.gguf_file import GGUFFile
from puzzle_nas.parents.problems import LIBRARY_ERRORS, first_line, problem

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = "digits"
"""Stands for `Digits(individual_digits=True)`: the same as a split at \\p{N}, by the name that exporters know."""


@dataclass(frozen=True)
class Splitting:
    """How llama.cpp cuts text before it merges."""

    patterns: tuple[str, ...]
    """Applied in turn to what the one before has cut."""
    ignore_merges: bool = False
    """A piece that is a token is taken as it is, without merging."""
    adds_bos: bool = False
    """Where the file does not say."""


_GPT2 = Splitting((GPT2,))
_DIGITS = Splitting((DIGITS, GPT2))
_LLAMA3 = Splitting((_LLAMA3_SPLIT,), ignore_merges=True, adds_bos=True)
_QWEN2 = Splitting((_QWEN2_SPLIT,))
_GPT4O = Splitting((_GPT4O_SPLIT,))

SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "modern-bert"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("lfm2", "jina-v5-nano"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Splitting((_LLAMA3_SPLIT,))),
    **dict.fromkeys(("glm4", "glm5"), Splitting((_LLAMA3_SPLIT,), ignore_merges=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("solar-open", "grok-2"), _QWEN2),
    "qwen35": Splitting((_QWEN35_SPLIT,)),
    # llama.cpp writes these two with ASCII's cases only; here they are as the models were trained.
    "tekken": Splitting((_TEKKEN_SPLIT,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": Splitting((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_WORDS)),
}
"""By `tokenizer.ggml.pre`."""


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes.

    Raises:
        CheckpointError: it is of a kind, or splits text in a way, that is not known here.
    """
    group = {name: f"tokenizer.{key}" for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()}
    fields = {name: file.metadata[key] for name, key in group.items() if key in file.metadata}
    kind, pre = fields.get("tokenizer_type"), fields.pop("pre_tokenizer_type", "default")
    if not isinstance(fields.get("tokens"), list):
        raise problem("no tokenizer", where=file.path, reason="it has no tokenizer.ggml.tokens")
    if kind == "gpt2" and pre not in SPLITTINGS:
        raise problem("GGUF tokenizer", file=file.path, key="pre", value=pre)
    if kind not in ("gpt2", "llama"):
        raise problem("GGUF tokenizer", file=file.path, key="model", value=kind)
    try:
        backend, _ = convert_gguf_tokenizer(file.architecture, fields)
        if kind == "gpt2":
            _split_as(backend, SPLITTINGS[pre])
        else:
            _space_as(backend, fields.get("add_prefix_space", True))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **_settings(file, kind, pre))
    except LIBRARY_ERRORS as error:
        raise problem("no tokenizer", where=file.path, reason=first_line(error)) from error


def _split_as(backend: Tokenizer, splitting: Splitting) -> None:
    """Cut text as llama.cpp does."""
    steps: list[Any] = []
    for pattern in splitting.patterns:
        if pattern == DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif pattern != GPT2:
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
        elif pattern is splitting.patterns[-1]:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        else:
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splitting.patterns[-1] != GPT2:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    backend.normalizer = None
    backend.decoder = decoders.ByteLevel()
    backend.model.ignore_merges = splitting.ignore_merges


def _space_as(backend: Tokenizer, prefix: bool) -> None:
    """Read spaces as llama.cpp does: one more before text, unless the file says otherwise."""
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    backend.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _settings(file: GGUFFile, kind: str, pre: str) -> dict[str, Any]:
    """Special tokens, what is put around text, and the chat template."""
    tokens = file.metadata["tokenizer.ggml.tokens"]
    found: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        found[f"{name}_token"] = tokens[index] if index is not None and index < len(tokens) else None
    adds = kind == "llama" or SPLITTINGS[pre].adds_bos
    found["add_bos_token"] = file.metadata.get("tokenizer.ggml.add_bos_token", adds) and found["bos_token"] is not None
    found["add_eos_token"] = file.metadata.get("tokenizer.ggml.add_eos_token", False) and found["eos_token"] is not None
    if template := file.metadata.get("tokenizer.chat_template"):
        found["chat_template"] = template
    return found

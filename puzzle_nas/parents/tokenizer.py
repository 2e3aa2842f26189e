"""A folder's tokenizer against its own tokenizer.json, the embeddings and its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from puzzle_nas.errors import ChatTemplateError
from puzzle_nas.parents.chat import ChatTemplate
from puzzle_nas.parents.fit import quiet
from puzzle_nas.parents.problems import LIBRARY_ERRORS, first_line, problem
from puzzle_nas.parents.weights import check_is_no_placeholder, read_object

FILE = "tokenizer.json"
VOCABULARIES = ("vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")
"""What else a tokenizer can be made of."""
STEPS = ("normalizer", "pre_tokenizer", "decoder")
MODEL_SETTINGS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
MODEL_SETTINGS += ("byte_fallback", "ignore_merges")
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "[EOS]")
"""Tokens that end documents in pretraining, by the names that families give them."""
TURN_ENDS = ("im_end", "eot", "end_of_turn", "<|end|>", "<|return|>")
"""Parts of the names of tokens that end turns."""


def read_tokenizer(folder: Path) -> tuple[Any, list[str]]:
    """A folder's tokenizer, and what is unusual about it.

    Where transformers' class for it would split text otherwise than the folder's tokenizer.json says, the file is used.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = folder / FILE
    own = _tokenizer_of(file) if file.is_file() else None
    if own is None and not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
        # transformers makes one of a class's three special tokens then.
        raise problem("no tokenizer", where=folder, reason=f"it has no {FILE}")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    try:
        with quiet():
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if own is None or not (differing := differences(loaded, own)):
                return loaded, []
            used = PreTrainedTokenizerFast.from_pretrained(folder)
    except LIBRARY_ERRORS as error:
        raise problem("no tokenizer", where=folder, reason=first_line(error)) from error
    if left := differences(used, own):
        raise problem("no tokenizer", where=folder, reason=f"transformers changes its {', '.join(left)}")
    return used, [
        f"transformers' {type(loaded).__name__} would change the {', '.join(differing)} of tokenizer.json; "
        "the file is used."
    ]


def _tokenizer_of(file: Path) -> Tokenizer:
    check_is_no_placeholder(file)
    # Names what is no JSON at all; anything else that tokenizers cannot read is newer than it, or damaged.
    read_object(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        facts = {"version": tokenizers.__version__, "reason": first_line(error, 100)}
        raise problem("tokenizer too new", file=file, **facts) from error


def differences(loaded: Any, own: Tokenizer) -> list[str]:
    """Parts in which a loaded tokenizer differs from its file."""
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        return ["class"]
    found = [name.replace("_", "-") for name in STEPS if _state(getattr(backend, name)) != _state(getattr(own, name))]
    if _settings(backend.model) != _settings(own.model):
        found.append("model")
    elif backend.get_vocab(with_added_tokens=False) != own.get_vocab(with_added_tokens=False):
        found.append("vocabulary")
    return found


def _settings(model: Any) -> list[Any]:
    """How a model merges; nothing, nought and an empty text are the same."""
    return [type(model), *(getattr(model, name, None) or None for name in MODEL_SETTINGS)]


def _state(step: Any) -> Any:
    """What a step does, in comparable form."""
    return None if step is None else json.loads(step.__getstate__())


def check_length(where: Path, tokenizer: Any, vocab_size: int) -> list[str]:
    """What to say of a tokenizer that is longer than the embeddings.

    Raises:
        CheckpointError: text, a template or the end of text would use an entry that has no embedding.
    """
    if len(tokenizer) <= vocab_size and max(tokenizer.get_vocab().values(), default=0) < vocab_size:
        return []
    surplus = {token: index for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    added = {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    if any(token not in added or token in used or token in template for token in surplus):
        entries = max(surplus.values()) + 1
        raise problem("tokenizer too long", where=where, entries=entries, vocab_size=vocab_size)
    names = ", ".join(sorted(surplus, key=lambda token: surplus[token])[:3])
    return [
        f"The tokenizer has {len(surplus)} more entries ({names}) than the model has embeddings ({vocab_size}); "
        "no text may hold them."
    ]


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before text; None where it puts none."""
    if tokenizer.bos_token_id is None:
        return None
    around = tokenizer("a").input_ids
    return tokenizer.bos_token_id if around and around[0] == tokenizer.bos_token_id else None


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Text to be continued: begun as the tokenizer begins text, and not ended, whatever it puts after text."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = bos_of(tokenizer)
    return ids if begin is None else [begin, *ids]


def separator_of(tokenizer: Any) -> int | None:
    """The token that ends a document: not the one that ends a turn, where the tokenizer has both."""
    end = tokenizer.eos_token
    if end is not None and (end in DOCUMENT_ENDS or not _ends_a_turn(tokenizer, end)):
        return tokenizer.eos_token_id
    known = tokenizer.get_vocab()
    return next((known[name] for name in DOCUMENT_ENDS if name in known), tokenizer.eos_token_id)


def _ends_a_turn(tokenizer: Any, token: str) -> bool:
    """Whether the end-of-text token stands in the chat template, or is called what ends of turns are."""
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template or ""]
    return any(token in text or "eos_token" in text for text in templates) or any(name in token for name in TURN_ENDS)


def try_template(tokenizer: Any) -> tuple[str, list[str]]:
    """What the chat template makes of two questions and an answer, and what is unusual about it.

    Returns:
        `none`, `works`, `works given ...` or `fails`, and a line where it fails.
    """
    try:
        template = ChatTemplate.of(tokenizer)
    except ChatTemplateError as error:
        return "fails", [f"The chat template cannot write a conversation ({error}); plain text is used."]
    if template is None:
        return "none", []
    return f"works given {template.wants}" if template.wants else "works", []

"""Text from a checkpoint, piece by piece."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from puzzle_nas.errors import ChatTemplateError, CheckpointError, DataError
from puzzle_nas.parents.chat import MARKS, ChatTemplate
from puzzle_nas.parents.tokenizer import prompt_ids


def answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool, temperature: float
) -> Iterator[str]:
    """The answer to a prompt, through the chat template if there is one and `chat` is set.

    Where the model has no room for the whole answer, says so.

    Raises:
        CheckpointError: its chat template fails.
        DataError: the prompt alone is longer than the model's positions.
    """
    text = _as_chat(tokenizer, prompt) if chat else None
    # A chat template begins by itself.
    ids = prompt_ids(tokenizer, prompt) if text is None else tokenizer(text, add_special_tokens=False).input_ids
    num_tokens = len(ids)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - num_tokens)
    if room < 1:
        raise DataError(f"The prompt has {num_tokens} tokens, but the model has {positions} positions; shorten it.")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    inputs = torch.tensor([ids], device=model.device)
    arguments = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "max_new_tokens": room}
    arguments |= {"streamer": streamer, **sampling}
    written: list[int] = []

    def write() -> None:
        try:
            written.append(model.generate(**arguments).shape[1] - num_tokens)
        finally:
            # Whoever reads would wait for ever.
            streamer.end()

    thread = Thread(target=write, daemon=True)
    thread.start()
    yield from streamer
    # A thread that still computes while the interpreter ends aborts the process.
    thread.join()
    if room < max_new_tokens and written == [room]:
        print(f"\n(Cut here: the model has {positions} positions.)", file=sys.stderr)


def _as_chat(tokenizer: Any, prompt: str) -> str | None:
    """The prompt as the chat template writes it, None where there is none."""
    try:
        template = ChatTemplate.of(tokenizer, [{"role": "user", "content": MARKS[0]}])
        message = {"role": "user", "content": prompt}
        return None if template is None else template.render([message], add_generation_prompt=True)
    except ChatTemplateError as error:
        raise CheckpointError(
            f"The model's chat template fails ({error}); mend it, or go on without it: puzzle generate --plain."
        ) from None

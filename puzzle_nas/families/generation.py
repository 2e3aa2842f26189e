"""Text from a checkpoint, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from transformers import TextIteratorStreamer

from puzzle_nas.families.loading import load_model, load_tokenizer, this_machine


def generate(checkpoint: Path, prompt: str, max_new_tokens: int, chat: bool, temperature: float) -> Iterator[str]:
    """The answer to a prompt, through the chat template if there is one and `chat` is set.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    model = load_model(checkpoint, this_machine())
    yield from answer(model, load_tokenizer(checkpoint), prompt, max_new_tokens, chat, temperature)


def answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool, temperature: float
) -> Iterator[str]:
    """`generate` of a model that is loaded already."""
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    arguments = {**inputs.to(model.device), "max_new_tokens": max_new_tokens, "streamer": streamer, **sampling}
    thread = Thread(target=model.generate, kwargs=arguments, daemon=True)
    thread.start()
    yield from streamer
    # A thread that still computes while the interpreter ends aborts the process.
    thread.join()

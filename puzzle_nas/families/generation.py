"""Text from a checkpoint, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from puzzle_nas.families.loading import Machine, bfloat16_is_fast, load_model, load_tokenizer


def generate(checkpoint: Path, prompt: str, max_new_tokens: int, chat: bool, temperature: float) -> Iterator[str]:
    """The answer to a prompt, through the chat template if there is one and `chat` is set.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    model, tokenizer = load_model(checkpoint, Machine(device, dtype)), load_tokenizer(checkpoint)
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    arguments = {**inputs.to(device), "max_new_tokens": max_new_tokens, "streamer": streamer, **sampling}
    thread = Thread(target=model.generate, kwargs=arguments, daemon=True)
    thread.start()
    yield from streamer
    # A thread that still computes while the interpreter ends aborts the process.
    thread.join()

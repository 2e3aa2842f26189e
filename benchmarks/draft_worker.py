"""Speculative decoding on llama.cpp's low-level calls, greedy: what benchmarks/draft.py asks for. Runs in the engine's
environment.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "puzzle_nas/engines/workers"))

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
from llama_cpp_worker import Context, LlamaCpp  # pyright: ignore[reportMissingImports]
from protocol import answer_requests  # pyright: ignore[reportMissingImports]


class Speculation:
    """A parent and its drafts, by name, all loaded."""

    def __init__(self):
        self._models = {}

    def load(self, name, folder, threads):
        """`folder` holds model.gguf."""
        self._models[name] = LlamaCpp()
        self._models[name].load(folder, None, threads, None)

    def forget(self, name):
        """Free a model."""
        llama_cpp.llama_model_free(self._models.pop(name)._model)

    def alone(self, model, prompt, num_tokens):
        """Greedily, one by one. Seconds are of what follows the prompt's pass."""
        with Context(self._models[model], 1, len(prompt) + num_tokens) as context:
            tokens = context.prefill([prompt])
            start = time.perf_counter()
            while len(tokens) < num_tokens:
                tokens += context.step(tokens[-1:], [len(prompt) + len(tokens) - 1])
            return {"tokens": tokens, "seconds": time.perf_counter() - start}

    def drafted(self, model, draft, prompt, num_tokens, drafts):
        """The same tokens, from passes over what the draft wrote.

        `compared` counts the drafts up to the first that was not accepted, `passes` those of the model.
        """
        room = len(prompt) + num_tokens + drafts + 1
        accepted = compared = passes = 0
        with Context(self._models[model], 1, room) as parent, Context(self._models[draft], 1, room) as small:
            tokens = parent.prefill([prompt])
            small.prefill([prompt])
            read = 0  # Of `tokens`, by the draft.
            start = time.perf_counter()
            while len(tokens) < num_tokens:
                first = len(prompt) + len(tokens) - 1
                proposed, waiting = [], tokens[read:]
                for _ in range(drafts):
                    proposed += small.prefill([waiting], len(prompt) + read)
                    read += len(waiting)
                    waiting = proposed[-1:]
                batch = [(0, first + place, token) for place, token in enumerate([tokens[-1], *proposed])]
                own = parent.decode(batch, [True] * len(batch)).argmax(-1).tolist()
                right = next((n for n, (a, b) in enumerate(zip(proposed, own, strict=False)) if a != b), drafts)
                accepted, compared, passes = accepted + right, compared + min(right + 1, drafts), passes + 1
                tokens += [*proposed[:right], own[right]]
                # Both forget what was not accepted; the draft has not read its last proposal yet.
                read = min(read, len(tokens) - 1)
                _forget(parent, len(prompt) + len(tokens) - 1)
                _forget(small, len(prompt) + read)
            seconds = time.perf_counter() - start
        written = len(tokens) - 1
        return {
            "tokens": tokens[:num_tokens],
            "seconds": seconds * (num_tokens - 1) / written,
            "accepted": accepted,
            "compared": compared,
            "passes": passes,
        }

    def top_two_gaps(self, model, prompt, tokens):
        """How far the most likely token is ahead of the next one at each place of `tokens`, one by one; nats."""
        with Context(self._models[model], 1, len(prompt) + len(tokens)) as context:
            logits = context.decode(
                [(0, p, token) for p, token in enumerate(prompt)], [False] * (len(prompt) - 1) + [True]
            )
            gaps = []
            for place, token in enumerate(tokens):
                second, largest = np.partition(logits[0], -2)[-2:]
                gaps.append(float(largest - second))
                logits = context.decode([(0, len(prompt) + place, token)], [True])
            return gaps

    def time_passes(self, model, prompt, sizes, repeats):
        """Milliseconds of a pass over so many tokens after the prompt, logits of all: the fastest half's mean."""
        found = {size: [] for size in sizes}
        with Context(self._models[model], 1, len(prompt) + max(sizes)) as context:
            context.prefill([prompt])
            for repeat in range(repeats + 1):
                for size in sizes:
                    batch = [(0, len(prompt) + place, prompt[place]) for place in range(size)]
                    start = time.perf_counter()
                    context.decode(batch, [True] * size).argmax(-1)
                    if repeat:
                        found[size].append(1e3 * (time.perf_counter() - start))
                    _forget(context, len(prompt))
        return [float(np.mean(sorted(found[size])[: max(1, repeats // 2)])) for size in sizes]


def _forget(context, position):
    """Everything from that position on."""
    memory = llama_cpp.llama_get_memory(context._context)
    if not llama_cpp.llama_memory_seq_rm(memory, 0, position, -1):
        raise RuntimeError("this model's memory cannot go back")


if __name__ == "__main__":
    answer_requests(Speculation())

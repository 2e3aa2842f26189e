"""Log-likelihood of continuations, with logits only where a continuation stands.

Shapes: N continuations, B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from puzzle_nas.families import Head
from puzzle_nas.parents.tokenizer import prompt_ids
from puzzle_nas.training.losses import MATMUL_ROWS, log_softmax, softmax_rows

BATCH_TOKENS = 2048

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context, and of what may follow it."""


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Tokens of both, split where the context's own end; spaces at its end belong to the continuation.

    What lm-eval does.
    """
    kept = context.rstrip()
    whole, start = prompt_ids(tokenizer, context + continuation), prompt_ids(tokenizer, kept)
    return start, whole[len(start) :]


def padded(pairs: Sequence[Pair], max_length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [N, T], padded on the right with 0, and labels [N, T], -100 wherever no continuation is predicted.

    What is longer than `max_length` loses its beginning. Padding needs no mask: no position sees a later one.
    """
    rows = []
    for context, continuation in pairs:
        whole = [*context, *continuation]
        labels = [-100] * (len(context) - 1) + list(continuation)
        first = 0 if max_length is None else max(0, len(labels) - max_length)
        rows.append((whole[first:-1], labels[first:]))
    length = max(len(labels) for _, labels in rows)
    inputs_NT = torch.zeros(len(rows), length, dtype=torch.int64)
    labels_NT = torch.full((len(rows), length), -100)
    for place, (inputs, labels) in enumerate(rows):
        inputs_NT[place, : len(inputs)] = torch.tensor(inputs)
        labels_NT[place, : len(labels)] = torch.tensor(labels)
    return inputs_NT, labels_NT


@torch.inference_mode()
def of_labels(final_BTD: torch.Tensor, head: Head, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability of each row's labels [B] in nats, and whether each of them is the most likely token [B].

    Args:
        final_BTD: hidden states after the final norm.
        head: LM head.
        labels_BT: -100 where nothing is asked.
    """
    labels_BT = labels_BT.to(final_BTD.device)
    rows, places = (labels_BT >= 0).nonzero(as_tuple=True)
    hidden, labels = final_BTD[rows, places], labels_BT[rows, places]
    log_p = torch.zeros(len(labels), device=final_BTD.device)
    likeliest = torch.zeros(len(labels), dtype=torch.bool, device=final_BTD.device)
    at_once = softmax_rows(final_BTD.device)
    for start in range(0, len(labels), MATMUL_ROWS):
        products = head.matrix(hidden[start : start + MATMUL_ROWS])
        for offset in range(0, len(products), at_once):
            part = log_softmax(products[offset : offset + at_once], head)
            place = slice(start + offset, start + offset + len(part))
            log_p[place] = part.gather(1, labels[place].unsqueeze(1)).squeeze(1)
            likeliest[place] = part.argmax(-1) == labels[place]
    sums = torch.zeros(len(labels_BT), device=final_BTD.device).index_add_(0, rows, log_p)
    wrong = torch.zeros(len(labels_BT), device=final_BTD.device).index_add_(0, rows, (~likeliest).float())
    return sums, wrong == 0


@torch.inference_mode()
def log_likelihoods(
    model: Any, pairs: Sequence[Pair], max_length: int | None, on_rows: Callable[[int], object] = lambda rows: None
) -> list[tuple[float, bool]]:
    """Of each pair: the continuation's log-probability in nats, and whether greedy decoding would give it.

    Args:
        model: an `Evaluable`.
        on_rows: called with the number of pairs done since the last call.
    """
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    while order:
        step = max(1, BATCH_TOKENS // max(1, sum(map(len, pairs[order[0]]))))
        batch, order = order[:step], order[step:]
        inputs_BT, labels_BT = padded([pairs[i] for i in batch], max_length)
        final = model.final_states(inputs_BT.to(model.device))
        sums, greedy = of_labels(final, model.head, labels_BT)
        for i, value, exact in zip(batch, sums.tolist(), greedy.tolist(), strict=True):
            found[i] = value, exact
        on_rows(len(batch))
    return found
